"""Run by test_zero.py in one or two processes: train.py's own main, several times in one launch, losses to stdout.

    torchrun ... tests/parity.py JOBS.json      JOBS: a list of argument lists for train.main

DeepSpeed or not is what the launch says (ACCELERATE_USE_DEEPSPEED and ACCELERATE_DEEPSPEED_CONFIG_FILE).
"""

import json
import os
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

sys.path.insert(0, str(Path(__file__).parents[1]))

import train

for job in json.loads(Path(sys.argv[1]).read_text()):
    os.environ.update(job.get("env", {}))
    torch.manual_seed(0)
    train.main(job["argv"])
    AcceleratorState._reset_state(reset_partial_state=False)
    GradientState._reset_state()
assert PartialState().num_processes == int(os.environ.get("WORLD_SIZE", "1"))
