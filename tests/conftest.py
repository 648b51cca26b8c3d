import sys
from pathlib import Path

import matplotlib
import torch

sys.path.insert(0, str(Path(__file__).parent))  # for `games`
torch.set_num_threads(1)  # small tensors: more threads are no faster, and results do not depend on the machine
matplotlib.use("Agg")  # no windows, also where there is a screen
