"""What stage ssl costs beside phase2: time of a step, and peak memory.

    python benchmarks/cost.py --models sapiens_0.3b --batch 2 --input_hw 128 96

Time: a step with as many unlabeled as labeled people over a step with the labeled ones alone, in turns. With every
block checkpointed that is 9 / 4 = 2.25 of the arithmetic: forward, forward again and backward (4) for the labeled
ones; the same for twice as many, and the teacher's forward (1). Memory: the peak of a step with n labeled and n
unlabeled people, without the teacher's weights, over that of a phase2 step with 2 n people. On a GPU and on a CPU.
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from itertools import repeat
from statistics import median
from typing import Any

import sapiens_accel  # isort: skip  # noqa: F401  (before torch: it sets how threads wait)
import record
import torch
from accelerate import Accelerator

from sapiens_accel.config.schema import StageName
from sapiens_accel.data.dataset import Batch
from sapiens_accel.errors import run_main
from sapiens_accel.models.sapiens import SIZES
from sapiens_accel.runtime import distributed
from sapiens_accel.selftest import checks
from sapiens_accel.selftest.training_step import TrainingCase, build_network, peak_of, random_batch, take_steps

BARS = {"time_ratio": 2.3, "memory_ratio": 1.10}
WARM_UP, MEASURED = 1, 2  # steps before each repetition's clock starts, and under it


def main(words: Sequence[str]) -> None:
    asked = parse(words)
    accelerator = distributed.start()
    kind = accelerator.device.type
    name = torch.cuda.get_device_name() if kind == "cuda" else checks.cpu_name()
    path = record.place("cost", kind, name, asked.out)
    heading = record.heading("cost", kind, name, bars=BARS)
    rows = []
    for model in asked.models:
        rows.append(row(accelerator, model, asked))
        record.write(path, heading, cases=rows)
        print(
            f"{model}, {asked.batch} people: time x {rows[-1]['time_ratio']:.2f} (bar {BARS['time_ratio']}), memory "
            f"without the teacher x {rows[-1]['memory_ratio']:.2f} (bar {BARS['memory_ratio']})",
            flush=True,
        )
    print(path)


def parse(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--models", nargs="+", default=["sapiens_tiny", "sapiens2_tiny"], help="(the tiny ones)")
    parser.add_argument("--batch", type=int, default=8, help="labeled people of a step (8)")
    parser.add_argument("--input_hw", nargs=2, type=int, default=[256, 192], help="(256 192)")
    parser.add_argument("--repetitions", type=int, default=3, help="(3)")
    parser.add_argument("--precision", choices=["no", "bf16", "fp16"], default="no", help="of the launch (no)")
    parser.add_argument("--out", help="JSON file (results/cost_DEVICE_DATE.json)")
    return parser.parse_args(words)


def row(accelerator: Accelerator, model: str, asked: argparse.Namespace) -> dict[str, Any]:
    """One model's times and peaks."""
    size = SIZES[model]
    shape = {"model": model, "way": "plain", "launch": "single_gpu", "precision": asked.precision}
    layout = {"accumulation": 1, "checkpointed_blocks": size.depth, "head_chunk": 2}

    def case(stage: StageName, batch: int) -> TrainingCase:
        return TrainingCase(stage=stage, micro_batch=batch, input_hw=tuple(asked.input_hw), **shape, **layout)

    supervised, ssl, twice = case("phase2", asked.batch), case("ssl", asked.batch), case("phase2", 2 * asked.batch)
    times: dict[str, list[float]] = {"phase2": [], "ssl": []}
    for _ in range(asked.repetitions):
        for one in (supervised, ssl):
            times[one.stage].append(seconds(accelerator, one))
    ratios = [b / a for a, b in zip(times["phase2"], times["ssl"], strict=True)]
    teacher = 4 * sum(p.numel() for p in build_network(ssl.run, "ssl").parameters())
    peaks = {name: peak(accelerator, one) for name, one in (("phase2_twice_the_people", twice), ("ssl", ssl))}
    return {
        **ssl.as_json(),
        "seconds": {name: [round(value, 4) for value in values] for name, values in times.items()},
        "time_ratio": round(median(ratios), 3),
        "time_ratios": [round(value, 3) for value in sorted(ratios)],
        "peak_bytes": peaks,
        "teacher_bytes": teacher,
        "memory_ratio": round((peaks["ssl"] - teacher) / peaks["phase2_twice_the_people"], 4),
    }


def seconds(accelerator: Accelerator, case: TrainingCase) -> float:
    """Of one step, the first ones left out."""
    stream = take_steps(accelerator, case, build_network(case.run, case.stage), batches(accelerator, case))
    for _ in range(WARM_UP):
        next(stream)
    wait(accelerator)
    since = time.perf_counter()
    for _ in range(MEASURED):
        next(stream)
    wait(accelerator)
    found = (time.perf_counter() - since) / MEASURED
    del stream
    accelerator.free_memory()
    return found


def peak(accelerator: Accelerator, case: TrainingCase) -> int:
    """The most bytes that two steps had allocated at a time, the network and its optimizer with them."""
    one = next(batches(accelerator, case))

    def work() -> None:
        for _ in take_steps(accelerator, case, build_network(case.run, case.stage), repeat_twice(one)):
            pass

    if accelerator.device.type == "cpu":
        found = peak_of(work)
    else:
        torch.cuda.reset_peak_memory_stats()
        work()
        found = torch.cuda.max_memory_allocated()
    accelerator.free_memory()
    return found


def batches(accelerator: Accelerator, case: TrainingCase) -> Iterator[Batch]:
    return repeat(random_batch(case.micro_batch, case.num_unlabeled, case.input_hw, accelerator.device))


def repeat_twice(batch: Batch) -> Iterator[Batch]:
    return repeat(batch, 2)


def wait(accelerator: Accelerator) -> None:
    if accelerator.device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    run_main(main)
    distributed.stop()
