"""One thread, no progress bars: the same numbers and the same log on every machine."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["WHENCE_QUIET"] = "1"

import torch

torch.set_num_threads(1)
