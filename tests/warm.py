"""Loaded once by the process that tests/forks.py forks: what train.py and eval.py import, and their options."""

import gc
import importlib
import sys

import torch

from sapiens_accel.config import parse

for program in ("sapiens_accel.eval", "sapiens_accel.train"):
    importlib.import_module(program)
    del sys.modules[program]  # runpy warns of a module that was imported before it runs
torch.set_num_threads(1)
parse.load(["--stage=all"])  # builds the parser of all options
gc.freeze()  # what is loaded is not copied by every child's garbage collection
