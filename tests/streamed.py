"""Run by test_hub_data.py: processes of gloo that stream a data set of the Hub.

    python tests/streamed.py RECORDS ROOT CACHE RUN_DIR WORDS...

First one epoch of ROOT with 1 and 2 processes and 0, 1 and 3 workers; then train.py with 2 processes, killed after its
third checkpoint, and resumed to its end.

Each process is a fork of this one, which has torch loaded. RECORDS/NAME-RANK.jsonl gets the annotation ids of each
micro-batch: [step, ids].
"""

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import distributed as dist

from sapiens_accel import train
from sapiens_accel.config.schema import AugmentConfig, DataConfig, StageConfig
from sapiens_accel.data import build, loader
from sapiens_accel.data.augment import Augmenter
from sapiens_accel.data.dataset import TrainingPeople
from sapiens_accel.data.sampling import Share
from sapiens_accel.pose.skeleton import COCO17
from sapiens_accel.training import checkpoint

BATCH, PEOPLE = 8, 48
records, root, cache, folder, *words = sys.argv[1:]
plain = loader.batches


def recorded(name: str) -> Callable[..., Iterator[Any]]:
    """`data.batches`, written down as they are handed out."""

    def batches(people: TrainingPeople, share: Share, steps: range, *more: Any) -> Iterator[Any]:
        with (Path(records) / f"{name}-{share.rank}.jsonl").open("a") as file:
            for number, batch in enumerate(plain(people, share, steps, *more)):
                file.write(json.dumps([steps[number // share.accumulation], batch.labeled.ann_id.tolist()]) + "\n")
                file.flush()
                yield batch

    return batches


def world(size: int, action: Callable[[], None]) -> list[int]:
    """Fork so many processes that find each other by the variables of a launcher."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(size):
        child = os.fork()
        if not child:
            os.setsid()  # its workers are killed with it
            found = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1"}
            os.environ |= {name: str(value) for name, value in (found | {"MASTER_PORT": port}).items()}
            action()
            os._exit(0)
        children.append(child)
    return children


def ended(children: list[int]) -> None:
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert not any(codes), codes


def epoch(workers: int) -> None:
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    config = DataConfig(root=root, cache_dir=cache, streaming=True, input_hw=(64, 48))
    sets = build.open_people(config, COCO17, unlabeled=False)
    augmenter = Augmenter(config=AugmentConfig(), skeleton=COCO17, input_hw=(64, 48))
    people = TrainingPeople(sets, augmenter, config, StageConfig(global_batch=BATCH), seed=0, stage="phase2")
    share = Share(rank=rank, num_ranks=size, micro_batch=BATCH // size, accumulation=1)
    for _ in recorded(f"{size}x{workers}")(people, share, range(PEOPLE // BATCH), workers, torch.device("cpu")):
        pass
    dist.destroy_process_group()


for size in (1, 2):
    for workers in (0, 1, 3):
        ended(world(size, lambda n=workers: epoch(n)))
checkpoints = Path(folder) / "phase2" / "checkpoints"
for name, more in (("first", []), ("second", ["--resume_from_checkpoint=latest"])):
    loader.batches = recorded(name)
    children = world(2, lambda more=more: train.main([*words, f"--output_dir={folder}", *more]))
    if name == "second":
        ended(children)
        continue
    deadline = time.monotonic() + 120
    while not any(found.name == "step_3" for found in checkpoint.list_checkpoints(checkpoints)):
        assert time.monotonic() < deadline
        time.sleep(0.002)
    for child in children:
        os.killpg(child, signal.SIGKILL)
    assert [os.waitpid(child, 0)[1] for child in children] == [signal.SIGKILL] * 2
