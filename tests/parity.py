"""Run by test_zero.py in one or two processes: train.py's own main, several times in one launch, losses to stdout.

    torchrun ... tests/parity.py JOBS.json      JOBS: a list of argument lists for train.main

DeepSpeed or not is what the launch says (ACCELERATE_USE_DEEPSPEED and ACCELERATE_DEEPSPEED_CONFIG_FILE). A job's
"without_number" are the steps (from 1) in which the last rank's loss is made NaN.
"""

import gc
import json
import os
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

sys.path.insert(0, str(Path(__file__).parents[1]))

from sapiens_accel import train
from sapiens_accel.training import loop
from sapiens_accel.training.objectives import Supervised

SUPERVISED_LOSS, LR_AT = Supervised.loss, loop.lr_at


def break_steps(steps: list[int]) -> None:
    """Let the last rank's loss be no number in these steps."""
    at = {"step": 0}
    last = int(os.environ.get("RANK", "0")) == int(os.environ.get("WORLD_SIZE", "1")) - 1

    def lr_at(step: int, *rest):
        at["step"] = step + 1
        return LR_AT(step, *rest)

    def loss(self, model, batch, prepared):
        value, parts = SUPERVISED_LOSS(self, model, batch, prepared)
        return (value * float("nan") if last and at["step"] in steps else value), parts

    loop.lr_at, Supervised.loss = lr_at, loss


gc.freeze()  # what the libraries hold is not gone through again at the end of every stage
for job in json.loads(Path(sys.argv[1]).read_text()):
    os.environ.update(job.get("env", {}))
    torch.manual_seed(0)
    break_steps(job.get("without_number", []))
    train.main(job["argv"])
    AcceleratorState._reset_state(reset_partial_state=False)
    GradientState._reset_state()
assert PartialState().num_processes == int(os.environ.get("WORLD_SIZE", "1"))
