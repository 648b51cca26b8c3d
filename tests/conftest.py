import faulthandler
import os
import sys
from pathlib import Path

# idle threads sleep: the cores are shared by several test processes
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import matplotlib
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # for `games`
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
