"""People a second of our training step, against what a user would write instead (`peer`), and model FLOPs utilisation.

    python benchmarks/throughput.py [--models sapiens_0.3b ...] [--batch 32] [--limit 15GiB] [--min_ratio 1.0]
    accelerate launch --config_file accelerate_configs/zero2.yaml benchmarks/throughput.py --models sapiens_0.3b

Stage phase2, the same noise for both, in turns in one process: ours, the peer, ours, the peer, ...
"""

import argparse
import gc
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import repeat
from typing import Any

import sapiens_accel  # isort: skip  # noqa: F401  (before torch: it sets how threads wait)
import record
import torch
from accelerate import Accelerator
from cases import case_of_plan
from peer import forward_flops, peak_tflops, peer_of, plain_steps
from speeds import Row, speeds, text
from subject import codec_of, network, people, run_of, stepping
from torch import Tensor

from sapiens_accel.config.schema import Config
from sapiens_accel.data.dataset import Batch
from sapiens_accel.errors import UserError, run_main
from sapiens_accel.memory import planner as memory
from sapiens_accel.memory.estimate import FEW, Plan, Way, fit, need, stage_of
from sapiens_accel.models.sapiens import Layout, SapiensPose
from sapiens_accel.pose.skeleton import COCO17 as SKELETON
from sapiens_accel.runtime import distributed
from sapiens_accel.runtime.files import GIB

TOLD = ("model", "stage", "way", "precision", "micro_batch", "checkpointed_blocks", "head_chunk")
# What sets the layout of a runner, and its steps.
Runner = tuple[Callable[[], None], Iterator[Any]]


def main(words: Sequence[str]) -> None:
    cuda = torch.cuda.is_available()
    os.environ.setdefault("ACCELERATE_MIXED_PRECISION", "bf16" if cuda else "no")
    accelerator = distributed.start()
    asked = options(words, accelerator)
    kind, device = ("cuda", torch.cuda.get_device_name()) if cuda else ("cpu", record.cpu_name())
    path = record.place("throughput", kind, device, asked.out)
    peak = asked.peak_tflops or peak_tflops(device)
    names = ("input_hw", "batch", "repetitions", "steps", "warm_up", "limit")
    settings = {name: getattr(asked, name) for name in names}
    heading = record.heading("throughput", kind, device, peak_tflops=peak, **settings)
    print(f"{device}, people a second: median (lowest to highest) of {asked.repetitions}")
    rows = []
    for name in asked.models:
        try:
            rows.append(compare(accelerator, name, asked, peak))
        except torch.OutOfMemoryError as error:
            raise UserError(f"{name}: ours ran out of memory beside the peer; take a smaller --batch") from error
        print(text(rows[-1]), flush=True)
        record.write(path, heading, cases=rows)
        accelerator.free_memory()
        tidy()
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
    asked.limit, asked.input_hw = int(memory.bytes_of("limit", asked.limit)), tuple(asked.input_hw)
    if accelerator.num_processes > 1:
        raise UserError(f"{accelerator.num_processes} processes: the peer has one; take --num_processes 1")
    if distributed.is_deepspeed(accelerator) and len(asked.models) > 1:
        raise UserError(f"--models {' '.join(asked.models)}: under DeepSpeed one at a time")
    if min(asked.batch, asked.repetitions, asked.steps, asked.warm_up) < 1:
        raise UserError("--batch, --repetitions, --steps, --warm_up: expected 1 or more of each")
    return asked


# ---- One model


def compare(accelerator: Accelerator, name: str, asked: argparse.Namespace, peak: float | None) -> Row:
    """Build both with the same weights, let them take turns, and compare."""
    device = accelerator.device
    if device.type == "cuda":
        total = torch.cuda.mem_get_info(device)[1]
        torch.cuda.set_per_process_memory_fraction(min(1.0, asked.limit / total))
    run = run_of(name, "phase2", asked.input_hw, asked.batch, f"--memory.micro_batch={asked.batch}")
    model, batch = network(run, "phase2"), people(asked.batch, 0, asked.input_hw, device)
    theirs, loss_of_peer = peer(accelerator, run, model, batch)
    plan = planned(accelerator, run)
    case = replace(case_of_plan(name, "phase2", asked.input_hw, plan), precision=accelerator.mixed_precision)
    ours = stepping(accelerator, case, model, repeat(batch))
    loss = float(next(ours).logs["loss"])

    runners = {key: (partial(model.lay_out, layout), ours) for key, layout in layouts(run, plan).items()}
    others: dict[str, Runner] = {} if theirs is None else {"peer": (lambda: None, theirs)}
    taken = seconds({**runners, **others}, asked, device)
    if asked.compile:
        compiled = partial(model.lay_out, replace(plan.layout, compiled=True))
        again = seconds({"ours_compiled": (compiled, ours), **others}, asked, device)
        taken |= {"ours_compiled": again["ours_compiled"], "peer_again": again.get("peer", [])}
    flops = 3 * forward_flops(name, SKELETON.num_keypoints, asked.input_hw)
    losses = {"ours": loss, "peer": loss_of_peer}
    told = {key: value for key, value in case.as_json().items() if key in TOLD}
    return {**told, "losses": losses, **speeds(taken, asked.batch, flops, peak)}


def peer(
    accelerator: Accelerator, run: Config, model: SapiensPose, batch: Batch
) -> tuple[Iterator[Tensor] | None, float | None]:
    """The peer after its first step and that step's loss; None where the device cannot hold it."""
    try:
        return _started(accelerator, run, model, batch)
    except torch.OutOfMemoryError:
        pass  # until here its frames hold what it has allocated
    tidy()
    return None, None


def _started(accelerator: Accelerator, run: Config, model: SapiensPose, batch: Batch) -> tuple[Iterator[Tensor], float]:
    plan, autocast = run.of("phase2"), distributed.autocast_dtype(accelerator)
    network = peer_of(model, accelerator.device)
    stream = plain_steps(network, batch, codec_of(run), plan.loss_weight, plan.optim.lr, autocast)
    return stream, float(next(stream))


def planned(accelerator: Accelerator, run: Config) -> Plan:
    """Ours, in what the peer leaves free; on a CPU nothing is computed twice.

    Raises:
        UserError: it does not fit.
    """
    strategy, room = distributed.strategy(accelerator), distributed.free_bytes(accelerator)
    name = "plain" if strategy.zero == 0 else f"zero{strategy.zero}" + "_offload" * strategy.offload
    stage = stage_of(run, "phase2", strategy.half)
    plan = fit(stage, "phase2", Way(name=name, launch="", strategy=strategy), room, None)
    if not plan.fits:
        needs = f"{(plan.gpu_peak + plan.allowance) / GIB:.1f} GiB beside the peer's state"
        raise UserError(
            f"{run.model.name}: {plan.share.micro_batch} people need {needs}; take a smaller --batch or model"
        )
    return plan


def layouts(run: Config, plan: Plan) -> dict[str, Layout]:
    """Ours as planned; with all blocks checkpointed, as the peer has it; with the head the other way."""
    stage = stage_of(run, "phase2", plan.way.strategy.half)
    num, chunk = plan.share.micro_batch, plan.layout.head_chunk
    chunked = chunk is not None and chunk < num
    other = {"ours_one_chunk": None} if chunked else {"ours_chunked": FEW if num > FEW else 1}
    wanted = {
        "ours": plan.layout,
        "ours_checkpointed": replace(plan.layout, checkpointed_blocks=stage.depth),
        **{key: replace(plan.layout, head_chunk=chunk) for key, chunk in other.items()},
    }
    if plan.room is None:
        return wanted
    needs = partial(need, stage, plan.way, plan.share, room=plan.room, host_room=None)
    return {key: layout for key, layout in wanted.items() if key == "ours" or needs(layout).fits}


# ---- Timing


def seconds(runners: Mapping[str, Runner], asked: argparse.Namespace, device: torch.device) -> dict[str, list[float]]:
    """Of one step of each runner, repetition by repetition; they take turns, so that a slow minute meets them all."""
    for arrange, stream in runners.values():
        arrange()
        for _ in range(asked.warm_up):
            next(stream)
    taken: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(asked.repetitions):
        for name, (arrange, stream) in runners.items():
            arrange()
            next(stream)
            wait(device)
            start = time.perf_counter()
            for _ in range(asked.steps):
                next(stream)
            wait(device)
            taken[name].append((time.perf_counter() - start) / asked.steps)
    return taken


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def tidy() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    run_main(main)
    distributed.stop()
