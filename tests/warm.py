"""Loaded once by the process that tests/forks.py forks: what train.py and eval.py import, and their options."""

import gc

import torch

import eval  # noqa: F401
import train  # noqa: F401
from sapiens_accel.config import parse

torch.set_num_threads(1)
parse.load(["--stage=all"])  # builds the parser of all options
gc.freeze()  # what is loaded is not copied by every child's garbage collection
