import faulthandler
import os
import sys

# idle threads sleep: the cores are shared by several test processes
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import matplotlib
import pytest
import torch

from helpers.chat_models import PROMPTS, make_model, write_prompts
from helpers.last_line import pytest_unconfigure  # noqa: F401, a hook

# small tensors: more threads are no faster, and results do not depend on the machine
torch.set_num_threads(1)
matplotlib.use("Agg")  # no windows, also where there is a screen


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request):
    """Run the test with this many threads. A routine that hangs with two, as some do, is not to be
    interrupted: it ends the process with a traceback."""
    torch.set_num_threads(request.param)
    faulthandler.dump_traceback_later(300, exit=True, file=sys.__stderr__)
    yield request.param
    faulthandler.cancel_dump_traceback_later()
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    """The slow tests come first, so that no process is left alone with one at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def prompts_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    return write_prompts(path, [{"prompt": x} for x in PROMPTS])


@pytest.fixture(scope="session")
def tiny_qwen(tmp_path_factory):
    """A Qwen2: its maps to queries, keys and values have biases, which are not 0."""
    return make_model(tmp_path_factory.mktemp("model"), qkv_bias=True)
