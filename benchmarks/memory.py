"""Predicted and measured peak of a training step, by model, stage and way to run it.

    python benchmarks/memory.py [--models sapiens_1b ...] [--stages phase2 ...] [--limit 15GiB]

On a CPU tiny networks are measured, and the real ones are predicted for a GPU with `--limit` bytes for torch. On a GPU
each case runs in a process of its own, in which torch cannot allocate more than `--limit`.
"""

import argparse
import tempfile
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import sapiens_accel  # isort: skip  # noqa: F401  (before torch: it sets how threads wait)
import cases
import record
import torch
from cases import REAL_BATCH, REAL_HW, Planned, Wanted

from sapiens_accel.config.schema import STAGES
from sapiens_accel.errors import UserError, run_main
from sapiens_accel.memory import report as memory
from sapiens_accel.runtime.files import GIB
from sapiens_accel.selftest import checks
from sapiens_accel.selftest.peak_memory import launch_case, way_of
from sapiens_accel.selftest.training_step import (
    OUT_OF_MEMORY,
    Measurement,
    bytes_made_before,
    measure_on_cpu,
    start_accelerator,
)

MIB = 2**20
ON_GPU_BY_DEFAULT = ("plain", "zero2", "zero2_offload", "zero2_offload+activations")


def main(words: Sequence[str]) -> None:
    cuda = torch.cuda.is_available()
    asked = options(words, cuda)
    kind = "cuda" if cuda else "cpu"
    device, capability = gpu() if cuda else (checks.cpu_name(), (0, 0))
    path = record.place("memory", kind, device, asked.out)
    heading = record.heading("memory", kind, device, unit="bytes", limit=asked.limit, batch=asked.batch)
    wanted = Wanted(**{name: getattr(asked, name) for name in ("models", "stages", "ways", "input_hw", "batch")})
    print(f"{device}\n{TITLES}")
    rows: list[dict[str, Any]] = []
    here = chain.from_iterable(cases.on_cpu(wanted, precision) for precision in asked.precisions)
    for planned in cases.on_gpu(wanted, asked.limit, capability) if cuda else here:
        rows.append(row(planned, measured(planned, asked.limit)))
        print(line(rows[-1]), flush=True)
        record.write(path, heading, cases=rows)  # each time: an hour of a GPU is not lost with the last case
    if not cuda and not asked.measured_only:
        print(f"\npredicted for a GPU on which torch may allocate {asked.limit / GIB:g} GiB")
        for planned in cases.on_a_missing_gpu(asked.limit):
            rows.append(row(planned, {"measured": None, "outcome": "predicted: no GPU here"}))
            print(line(rows[-1]), flush=True)
        record.write(path, heading, cases=rows)
    print(f"\n{path}")


def options(words: Sequence[str], cuda: bool) -> argparse.Namespace:
    """The command line; what it leaves out is what is usual on this device."""
    models = ["sapiens_0.3b", "sapiens_1b", "sapiens_2b"] if cuda else ["sapiens_tiny", "sapiens2_tiny"]
    names = list(ON_GPU_BY_DEFAULT) if cuda else ["plain"]
    size, batch = (REAL_HW, REAL_BATCH) if cuda else ((256, 192), 8)
    parser = argparse.ArgumentParser(prog="memory.py", description="Predicted and measured peaks.", allow_abbrev=False)
    parser.add_argument("--models", nargs="+", default=models, help=f"({' '.join(models)})")
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=STAGES, help=f"({' '.join(STAGES)})")
    parser.add_argument("--ways", nargs="+", default=names, help=f"({' '.join(names)})")
    parser.add_argument("--limit", default="15GiB", help="what torch may allocate on a GPU (15GiB)")
    parser.add_argument("--input_hw", nargs=2, type=int, default=size, help=f"({size[0]} {size[1]})")
    parser.add_argument("--batch", type=int, default=batch, help=f"labeled people of one step ({batch})")
    parser.add_argument("--precisions", nargs="+", default=["no", "bf16"], choices=["no", "bf16"], help="on a CPU")
    parser.add_argument("--measured_only", action="store_true", help="on a CPU: predict nothing for a GPU")
    parser.add_argument("--out", help="the JSON (benchmarks/results/memory_DEVICE_DATE.json)")
    asked = parser.parse_args(words)
    asked.limit, asked.input_hw = int(memory.parse_bytes("limit", asked.limit)), tuple(asked.input_hw)
    for name in asked.ways:
        way_of(name)
    if asked.batch < 2 or asked.batch % 2:
        raise UserError(f"--batch {asked.batch}: expected an even number: a case accumulates two halves of it")
    return asked


# ---- One case


def measured(planned: Planned, limit: int) -> Measurement:
    """Run the case: where, its way and the device say. What cannot run here has `measured` None, and says why."""
    plan, strategy = planned.plan, planned.plan.way.strategy
    if planned.on_gpu:
        return (
            launch_case(planned.case, limit)
            if plan.fits
            else {"measured": None, "outcome": "predicted not to fit: not run"}
        )
    if strategy.offload or plan.way.offload_activations or plan.way.adam_8bit:
        return {"measured": None, "outcome": "needs a GPU"}  # a CPU's allocator would count both sides as one
    if strategy.zero:
        return launch_case(planned.case, limit)
    return measure_on_cpu(start_accelerator(planned.case.precision), planned.case)


def gpu() -> tuple[str, tuple[int, int]]:
    """Name and compute capability of the device.

    Asked in another process, since a context of this one would take memory from the cases.
    """
    with tempfile.TemporaryDirectory() as folder:
        machine = checks.inspect_machine(Path(folder))
    if machine.gpu is None or machine.capability is None:
        raise UserError(f"no GPU can be used: {machine.problem}")
    return machine.gpu, machine.capability


# ---- Its line


def row(planned: Planned, found: Measurement) -> dict[str, Any]:
    """A case for the JSON. Sizes are bytes; `predicted` is the sum of `parts`, and what `measured` is to be."""
    case, plan, parts = planned.case, planned.plan, dict(planned.plan.gpu)
    if not planned.on_gpu:
        parts["data"] -= bytes_made_before(case)
    predicted, peak = sum(parts.values()), found["measured"]
    best = predicted if peak is None else peak
    return {
        **case.as_json(),
        "device": "gpu" if planned.on_gpu else "cpu",
        "predicted": round(predicted),
        **found,
        "predicted_over_measured": None if peak is None else round(predicted / peak, 4),
        "bar": planned.bar and round(planned.bar),
        "within_bar": planned.bar and best <= planned.bar and found["outcome"] != OUT_OF_MEMORY,
        "floor": planned.floor and round(planned.floor),
        "peak_over_floor": planned.floor and round(best / planned.floor, 3),
        "fits": plan.fits if planned.on_gpu else None,
        "allowance": round(plan.allowance),
        "host_predicted": round(plan.host_peak),
        "parts": {name: round(size) for name, size in parts.items()},
    }


TITLES = (
    f"{'model':14}{'stage':8}{'way':27}{'prec.':6}{'batch':>7}{'ckpt':>6}{'chunk':>6}"
    f"{'predicted':>12}{'measured':>12}{'ratio':>8}{'x floor':>9}{'bar':>10}  outcome"
)


def line(row: dict[str, Any]) -> str:
    """A case for the terminal."""
    batch = f"{row['micro_batch']}x{row['accumulation']}"
    layout = f"{batch:>7}{row['checkpointed_blocks']:6}{row['head_chunk'] or 'all':>6}"
    sizes = f"{_size(row['predicted']):>12}{_size(row['measured']):>12}"
    ratios = f"{row['predicted_over_measured'] or '-':>8}{row['peak_over_floor'] or '-':>9}"
    name = f"{row['model']:14}{row['stage']:8}{row['way']:27}{row['precision']:6}"
    return f"{name}{layout}{sizes}{ratios}{_size(row['bar']):>10}  {row['outcome']}"


def _size(num: float | None) -> str:
    if num is None:
        return "-"
    return f"{num / GIB:.2f} GiB" if num >= GIB else f"{num / MIB:.1f} MiB"


if __name__ == "__main__":
    run_main(main)
