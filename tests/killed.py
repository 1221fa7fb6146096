"""Run by test_checkpoint.py: a training run that is killed again and again at random moments, and goes on each time.

    python tests/killed.py KILLS SEED RUN_DIR ARGUMENTS...

Each life is a fork of this process, which has torch loaded already. The last lines say where the kills fell.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from sapiens_accel import train
from sapiens_accel.runtime.files import UNFINISHED
from sapiens_accel.training import checkpoint

kills, seed, folder, *words = sys.argv[1:]
draw, moments = random.Random(int(seed)), []
checkpoints = next(
    Path(folder) / stage / "checkpoints" for stage in ("phase1", "phase2", "ssl") if f"--stage={stage}" in words
)


def newest() -> int:
    return max((int(path.name.removeprefix("step_")) for path in checkpoint.list_checkpoints(checkpoints)), default=0)


for _ in range(int(kills)):
    before, child = newest(), os.fork()
    if not child:
        # The first life begins anew, each later one must go on.
        train.main([*words, *(["--resume_from_checkpoint=latest"] if before else [])])
        os._exit(0)
    deadline = time.monotonic() + 120
    while newest() <= before and time.monotonic() < deadline and os.waitpid(child, os.WNOHANG) == (0, 0):
        time.sleep(0.002)
    time.sleep(draw.uniform(0, 0.3))
    unfinished = sorted(path.name for path in checkpoints.glob(f"*{UNFINISHED}"))
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL, "it had ended before it was killed"
    assert newest() > before, "it did not get one step further"
    moments.append(f"after step {newest()}" + (f", writing {unfinished[-1]}" if unfinished else ""))
print(*moments, sep="\n")
