"""People a second of our training step, against what a user would write instead (`peer`), and model FLOPs utilisation.

    python benchmarks/throughput.py [--models sapiens_0.3b ...] [--batch 32] [--limit 15GiB] [--min_ratio 1.0]
    accelerate launch --config_file accelerate_configs/zero2.yaml benchmarks/throughput.py --models sapiens_0.3b

Stage phase2, the same noise for both, in turns in one process: ours, the peer, ours, the peer, ...
"""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence

import sapiens_accel  # isort: skip  # noqa: F401  (before torch: it sets how threads wait)
import record
import torch
from accelerate import Accelerator

from sapiens_accel.errors import UserError, run_main
from sapiens_accel.memory import report as memory
from sapiens_accel.runtime import distributed
from sapiens_accel.selftest.checks import Row
from sapiens_accel.selftest.throughput import Timing, compare, free_memory, peak_tflops

SETTINGS = ("input_hw", "batch", "repetitions", "steps", "warm_up", "limit")


def main(words: Sequence[str]) -> None:
    cuda = torch.cuda.is_available()
    os.environ.setdefault("ACCELERATE_MIXED_PRECISION", "bf16" if cuda else "no")
    accelerator = distributed.start()
    asked = options(words, accelerator)
    kind, device = ("cuda", torch.cuda.get_device_name()) if cuda else ("cpu", record.cpu_name())
    path = record.place("throughput", kind, device, asked.out)
    peak = asked.peak_tflops or peak_tflops(device)
    settings = {name: getattr(asked, name) for name in SETTINGS}
    heading = record.heading("throughput", kind, device, peak_tflops=peak, **settings)
    print(f"{device}, people a second: median (lowest to highest) of {asked.repetitions}")
    rows = []
    for name in asked.models:
        try:
            rows.append(list(compare(accelerator, name, Timing(**settings, compiled=asked.compile), peak))[-1])
        except torch.OutOfMemoryError as error:
            raise UserError(f"{name}: ours ran out of memory beside the peer; take a smaller --batch") from error
        print(text(rows[-1]), flush=True)
        record.write(path, heading, cases=rows)
        accelerator.free_memory()
        free_memory()
    print(f"\n{path}")
    if slow := [row["model"] for row in rows if row["ratio"] and row["ratio"]["ours"]["median"] < asked.min_ratio]:
        sys.exit(f"below --min_ratio {asked.min_ratio:g}: {', '.join(slow)}")


def options(words: Sequence[str], accelerator: Accelerator) -> argparse.Namespace:
    """The command line; what it leaves out is what is usual on this device."""
    cuda = accelerator.device.type == "cuda"
    models = ["sapiens_0.3b", "sapiens2_0.4b"] if cuda else ["sapiens_tiny", "sapiens2_tiny"]
    models = models[:1] if distributed.is_deepspeed(accelerator) else models
    size, batch = ((512, 384), 32) if cuda else ((256, 192), 8)
    parser = argparse.ArgumentParser(prog="throughput.py", description="People a second.", allow_abbrev=False)
    parser.add_argument("--models", nargs="+", default=models, help=f"({' '.join(models)})")
    parser.add_argument("--input_hw", nargs=2, type=int, default=size, help=f"({size[0]} {size[1]})")
    parser.add_argument("--batch", type=int, default=batch, help=f"people of one step, one micro-batch ({batch})")
    parser.add_argument("--limit", default="1TiB", help="what torch may allocate on a GPU (all that is free)")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--steps", type=int, default=5 if cuda else 2, help="timed steps of a repetition")
    parser.add_argument("--warm_up", type=int, default=3, help="steps of each before any is timed")
    parser.add_argument("--compile", action="store_true", help="ours with compiled blocks too")
    parser.add_argument("--peak_tflops", type=float, help="what the device does at most, for the utilisation")
    parser.add_argument("--min_ratio", type=float, default=0.0, help="exit with 1 if ours/peer is below")
    parser.add_argument("--out", help="the JSON (benchmarks/results/throughput_DEVICE_DATE.json)")
    asked = parser.parse_args(words)
    asked.limit, asked.input_hw = int(memory.parse_bytes("limit", asked.limit)), tuple(asked.input_hw)
    if accelerator.num_processes > 1:
        raise UserError(f"{accelerator.num_processes} processes: the peer has one; take --num_processes 1")
    if distributed.is_deepspeed(accelerator) and len(asked.models) > 1:
        raise UserError(f"--models {' '.join(asked.models)}: under DeepSpeed one at a time")
    if min(asked.batch, asked.repetitions, asked.steps, asked.warm_up) < 1:
        raise UserError("--batch, --repetitions, --steps, --warm_up: expected 1 or more of each")
    return asked


def text(row: Row) -> str:
    """A model for the terminal."""
    head = f"head in chunks of {row['head_chunk']}" if row["head_chunk"] else "head in one chunk"
    blocks = f"{row['checkpointed_blocks']} blocks checkpointed, {head}"
    lines = [f"\n{row['model']}, {row['way']}, {row['precision']}, {row['micro_batch']} people, {blocks}"]
    for name, rate in row["people_per_second"].items():
        ratio, mfu = (row["ratio"] or {}).get(name), (row["mfu"] or {}).get(name)
        times = f"  x {_range(ratio)}" if ratio else ""
        lines.append(f"  {name:20}{_range(rate)}{times}" + (f"  MFU {mfu:.1%}" if mfu else ""))
    if row["chunks_cost"]:
        lines.append(f"  chunks of the head take x {_range(row['chunks_cost'])} the time of one chunk")
    return "\n".join(lines)


def _range(found: Mapping[str, float]) -> str:
    return f"{found['median']:.3f} ({found['lowest']:.3f} to {found['highest']:.3f})"


if __name__ == "__main__":
    run_main(main)
    distributed.stop()
