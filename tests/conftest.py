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
    """Each process of xdist gets its share of the slow tests, and begins with them, so that none is
    left alone with one at the end."""
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    slow, fast = [], []
    for item in items:
        (slow if item.get_closest_marker("slow") else fast).append(item)
    items[:] = [
        item
        for number in range(processes)
        for part in (slow, fast)
        for item in part[number::processes]
    ]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A process that has done its part takes from the others."""
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log)


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
