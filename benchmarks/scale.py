"""Seconds and memory of opening a large data set, and of its first batches, for each process.

    python benchmarks/scale.py [--people 10000000] [--folder FOLDER] [--out FILE]

The people are made up, two in an image of 16x16 px, in Arrow shards: what counts here is how many there are. Opened
twice, each time in a process of its own: the first time the table of people is written to the cache, from then on it is
there. `anonymous` is the memory that a process alone has; `resident` also counts pages of mapped files, which the
kernel takes back when it needs them.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
import sapiens_accel  # isort: skip  # noqa: F401  (before torch: it sets how threads wait)
import cv2
import numpy as np
import psutil
import pyarrow as pa
import record
import torch

from sapiens_accel.config.schema import AugmentConfig, DataConfig, StageConfig
from sapiens_accel.data import build, loader, sampling
from sapiens_accel.data import dataset as data
from sapiens_accel.data.augment import Augmenter
from sapiens_accel.errors import run_main
from sapiens_accel.pose.skeleton import COCO17

Row = dict[str, Any]
BARS = {"open_seconds": 60.0, "anonymous_mib": 1024.0}
CHUNK = 50_000  # images made at a time
FILES = 10
BATCHES, BATCH, WORKERS = 20, 32, 2


def main(words: Sequence[str]) -> None:
    asked = options(words)
    if asked.measure:
        return print(json.dumps(measured(Path(asked.measure))))
    path = record.place("scale", "cpu", record.cpu_name(), asked.out)
    heading = record.heading("scale", "cpu", record.cpu_name(), people=asked.people, bars=BARS, unit="s, MiB a process")
    heading["command"] = f"python benchmarks/scale.py --people {asked.people}"
    heading |= {"batches": BATCHES, "batch": BATCH, "workers": WORKERS, **record.versions("datasets")}
    folder = Path(tempfile.mkdtemp(dir=asked.folder))
    rows = []
    try:
        for split, people in (("train", asked.people), ("val", 100)):
            make(folder / "data", split, people)
        for name in ("first opening", "opening"):
            command = [sys.executable, __file__, "--measure", str(folder)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            rows.append({"case": name, **json.loads(done.stdout.splitlines()[-1])})
            print(rows[-1], flush=True)
        record.write(path, heading | {"mib_on_disk": disk(folder)}, cases=rows)
    finally:
        shutil.rmtree(folder)
    print(f"\n{path}")


def options(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scale.py", description="Opening a large data set.", allow_abbrev=False)
    parser.add_argument("--people", type=int, default=10_000_000, help="people to make up; 0.9 KB of disk for each")
    parser.add_argument("--folder", help="where they are kept meanwhile; default: where temporary files are")
    parser.add_argument("--out", help="JSON to write; default: results/scale_cpu_DATE.json")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    return parser.parse_args(words)


def make(folder: Path, split: str, num_people: int) -> None:
    """Shards of two people an image."""
    folder.mkdir(parents=True, exist_ok=True)
    num_pictures, rng = num_people // 2, np.random.default_rng(0)
    for number in range(FILES):
        first, last = (num_pictures * n // FILES for n in (number, number + 1))
        with pa.OSFile(str(folder / f"{split}-{number:05d}.arrow"), "wb") as sink:
            writer = None
            for start in range(first, last, CHUNK):
                table = pictures(start, min(CHUNK, last - start), rng)
                writer = writer or pa.ipc.new_stream(sink, table.schema)
                writer.write_table(table, max_chunksize=1000)
            if writer:
                writer.close()


def pictures(first: int, count: int, rng: np.random.Generator) -> pa.Table:
    png = cv2.imencode(".png", np.full((16, 16, 3), 90, np.uint8))[1].tobytes()
    boxes = np.concatenate([rng.integers(0, 4, (2 * count, 2)), rng.integers(8, 13, (2 * count, 2))], axis=1)
    points = boxes[:, None, :2] + rng.random((2 * count, 17, 2)) * boxes[:, None, 2:]
    keypoints = np.concatenate([points, np.full((2 * count, 17, 1), 2.0)], axis=2).astype(np.float32)
    people = pa.StructArray.from_arrays(
        [
            pa.array(2 * first + np.arange(2 * count)),
            lists(boxes.astype(np.float32).ravel(), 4),
            lists(keypoints.ravel(), 51),
        ],
        ["id", "bbox", "keypoints"],
    )
    numbers = first + np.arange(count)
    return pa.table(
        {
            "image": pa.array([png] * count, pa.binary()),
            "image_id": pa.array(numbers),
            "file_name": pa.array([f"{number:012d}.png" for number in numbers.tolist()]),
            "people": pa.ListArray.from_arrays(pa.array(np.arange(0, 2 * count + 1, 2, dtype=np.int32)), people),
        }
    )


def lists(values: np.ndarray, length: int) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array(np.arange(0, len(values) + 1, length, dtype=np.int32)), pa.array(values))


def measured(folder: Path) -> Row:
    """Open the people, and take batches of them."""
    before, started = psutil.Process().memory_info().rss, time.perf_counter()
    knobs = DataConfig(root=str(folder / "data"), cache_dir=str(folder / "cache"), input_hw=(64, 48))
    sets = build.open_people(knobs, COCO17, unlabeled=False)
    opened = time.perf_counter()
    augmenter = Augmenter(config=AugmentConfig(), skeleton=COCO17, input_hw=knobs.input_hw)
    plan = StageConfig(global_batch=BATCH)
    people = data.TrainingPeople(sets, augmenter, knobs, plan, seed=0, stage="phase2")
    share = sampling.Share(rank=0, num_ranks=1, micro_batch=BATCH, accumulation=1)
    first, workers = 0.0, []
    for number, _ in enumerate(loader.batches(people, share, range(BATCHES), WORKERS, torch.device("cpu"))):
        first = first or time.perf_counter() - opened
        if number == BATCHES - 1:
            workers = [memory(child.pid) for child in psutil.Process().children()]
    own = memory(os.getpid())
    return {
        "people": len(sets.train),
        "open_seconds": round(opened - started, 2),
        "first_batch_seconds": round(first, 2),
        "before_mib": before >> 20,
        **own,
        **{f"worker_{key}": max(worker[key] for worker in workers) for key in own},
    }


def memory(process: int) -> Row:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    told = {line.split(":")[0]: int(line.split()[1]) >> 10 for line in lines if line.startswith(("Vm", "Rss"))}
    return {"anonymous_mib": told["RssAnon"], "resident_mib": told["VmRSS"], "peak_resident_mib": told["VmHWM"]}


def disk(folder: Path) -> dict[str, int]:
    sizes = {
        name: sum(f.stat().st_size for f in (folder / name).rglob("*") if f.is_file()) for name in ("data", "cache")
    }
    return {name: size >> 20 for name, size in sizes.items()}


if __name__ == "__main__":
    run_main(main)
