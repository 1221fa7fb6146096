"""The memory plan as a command: a table of all ways to launch a run, or JSON.

    python -m sapiens_accel.memory --recipe sapiens_1b_coco --stage phase2 --gpu T4 --host_memory 32GiB

Nothing is allocated and no GPU is needed: everything is predicted (`estimate`).
"""

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sapiens_accel.config import parse as config
from sapiens_accel.config.commands import memory_parser
from sapiens_accel.config.schema import Config
from sapiens_accel.data import build
from sapiens_accel.errors import UserError
from sapiens_accel.memory import choice, duration, gpus
from sapiens_accel.memory.choice import Setting, Table
from sapiens_accel.memory.estimate import CONTEXT, Plan, Room
from sapiens_accel.memory.stages import COCO_PEOPLE
from sapiens_accel.memory.strategies import command, missing_package, without
from sapiens_accel.models import kernels
from sapiens_accel.models.load import starting_point
from sapiens_accel.runtime import host
from sapiens_accel.runtime.device import LEAST_CAPABILITY
from sapiens_accel.runtime.files import GIB

COLUMNS = """
way: ZeRO stage and what is kept in host memory; micro-batch: labeled people in a forward pass; checkpointed: blocks
that are recomputed in the backward pass, to save memory; selectively: blocks of which only norms and activations are;
head chunk: people in the head at a time; GPU peak: of each GPU; host: memory of the machine; people/s: labeled people
in a second; hours: of the stage, without evaluations."""

UNITS = {
    "B": 1,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "M": 2**20,
    "G": 2**30,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}


def main(words: Sequence[str]) -> None:
    asked, rest = memory_parser().parse_known_args(words)
    if asked.gpus < 1:
        raise UserError(f"--gpus {asked.gpus}: expected 1 or more")
    if asked.people is not None and asked.people < 1:
        raise UserError(f"--people {asked.people}: expected 1 or more")
    machine = _machine(asked)
    run = config.load(rest, prog="python -m sapiens_accel.memory")
    data = _data_size(run, asked.people)
    setting = Setting(
        run=run,
        gpus=asked.gpus,
        room=machine.room,
        capability=machine.capability,
        num_keypoints=data.num_keypoints,
        num_people=data.num_people,
    )
    table = setting.table()
    best = choice.choose(table)
    # The printed commands add these options themselves.
    words = _with_placeholders(
        run, without(rest, *(f"--memory.{name}" for name in ("offload_activations", "adam_8bit", "bf16_weights")))
    )
    if asked.json:
        print(json.dumps(_as_json(table, best, words), indent=2))
    else:
        _show(setting, table, best, words, [*_describe(setting, machine), data.note])
    if best is None:
        raise UserError(choice.describe_nothing_fits(setting, table))


class _Machine(NamedTuple):
    name: str
    capability: tuple[int, int]
    room: Room
    host: str


def _machine(asked: argparse.Namespace) -> _Machine:
    """The GPU and the host of the command line; the host is this machine by default."""
    gpu = gpus.get_gpu(asked.gpu) if asked.gpu else None
    memory = parse_bytes("gpu_memory", asked.gpu_memory or "16GiB")
    if gpu is not None and asked.gpu_memory is None:
        memory = float(gpu.memory)
    capability = parse_capability(asked.capability) if asked.capability else gpu.capability if gpu else (8, 0)
    rates = gpu.rates if gpu else gpus.ASSUMED
    if gpu is not None:
        rates = gpus.with_measured(rates, duration.measured_flops(gpu.device))
    of_host = parse_bytes("host_memory", asked.host_memory) if asked.host_memory else host.total_bytes()
    name = f"{asked.gpus} {asked.gpu or 'GPU(s)'} with {asked.gpu_memory or f'{memory / GIB:.1f} GiB'}"
    text = asked.host_memory or f"{of_host / GIB:.1f} GiB (this machine)"
    return _Machine(name, capability, Room(device=memory - CONTEXT, host=of_host, rates=rates), text)


class _DataSize(NamedTuple):
    num_keypoints: int
    num_people: int
    note: str


def _data_size(run: Config, num_people: int | None) -> _DataSize:
    """The number of keypoints and people of the dataset if its annotations exist; else those of COCO."""
    exists = run.data.root is not None and (Path(run.data.root) / run.data.train_annotations).is_file()
    if not exists:
        people = num_people or COCO_PEOPLE
        return _DataSize(17, people, f"hours for {people:,} labeled people{'' if num_people else ', as in COCO'}")
    skeleton, _ = build.open_skeleton(run.data)
    if num_people is None and not run.data.streaming:
        num_people = len(build.open_people(run.data, skeleton, unlabeled=False).train)
    people = num_people or COCO_PEOPLE
    return _DataSize(skeleton.num_keypoints, people, f"hours for {people:,} labeled people")


def _with_placeholders(run: Config, words: Sequence[str]) -> list[str]:
    """The arguments of a launch, with `--data.root DIR` and `--weights WEIGHTS` added if the run lacks them.

    The demo needs neither: it trains a tiny network from random weights on drawn people.
    """
    if run.recipe == "demo":
        return list(words)
    data = ["--data.root", "DIR"] if run.data.root is None else []
    needs_weights = run.weights is None and starting_point(Path(run.output_dir), run.stages[0]) is None
    return [*words, *data, *(["--weights", "WEIGHTS"] if needs_weights else [])]


def parse_capability(text: str) -> tuple[int, int]:
    """Parse a compute capability.

    Raises:
        UserError: it is not that of a GPU that can be trained on.
    """
    match = re.fullmatch(r"(\d+)\.(\d)", text)
    if not match or (int(match[1]), int(match[2])) < LEAST_CAPABILITY:
        raise UserError(f"--capability {text}: expected the compute capability of a GPU, 7.0 or newer, such as 7.5")
    return int(match[1]), int(match[2])


def parse_bytes(option: str, text: str) -> float:
    """Parse a size with a unit into bytes.

    Raises:
        UserError: not a positive number, or no known unit.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", text)
    unit = UNITS.get(match[2].upper()) if match else None
    if not match or unit is None or float(match[1]) == 0:
        raise UserError(f"--{option} {text}: expected a size with its unit, such as 16GiB, 24GB or 15360MiB")
    return float(match[1]) * unit


# ---- JSON


def _as_json(table: Table, best: list[Plan] | None, words: Sequence[str]) -> dict[str, Any]:
    """JSON of the table; of several stages, the one that needs the most GPU memory represents each way."""
    every = choice.columns(table)
    worst = [max(plans, key=lambda plan: plan.gpu_peak) for plans in every]
    recommended = None if best is None else max(best, key=lambda plan: plan.gpu_peak)
    return {
        "predicted": True,
        "recommended": recommended and _plan_json(recommended, words, None),
        "strategies": [
            _plan_json(plan, words, reason) for plan, reason in zip(worst, choice.reasons(table, best), strict=True)
        ],
    }


def _plan_json(plan: Plan, words: Sequence[str], reason: str | None) -> dict[str, Any]:
    gib = {where: {part: round(size / GIB, 4) for part, size in parts.items()} for where, parts in _parts(plan).items()}
    return {
        "strategy": plan.way.name,
        "precision": "bf16" if plan.way.strategy.bf16 else "fp16",
        "fits": plan.fits,
        "not_recommended": reason,
        "micro_batch": plan.share.micro_batch,
        "accumulation": plan.share.accumulation,
        "checkpointed_blocks": plan.layout.checkpointed_blocks,
        "selective_blocks": plan.layout.selective_blocks,
        "head_chunk": plan.layout.head_chunk,
        "teacher": plan.way.teacher if "ema_teacher" in plan.gpu else None,
        "gpu_peak_gib": round(plan.gpu_peak / GIB, 4),
        "gpu_allowance_gib": round((plan.allowance + CONTEXT) / GIB, 4),
        "host_gib": round(plan.host_peak / GIB, 4),
        "seconds_per_step": round(plan.seconds, 4),
        "people_per_second": round(plan.people_per_second, 3),
        "hours": round(plan.hours, 2),
        "command": command(plan.way, words),
        "parts": gib,
    }


def _parts(plan: Plan) -> dict[str, Mapping[str, float]]:
    """The parts of a plan: `gpu` adds up to the peak, the allowance is added to it, `gpu_at_other_times` is not."""
    allowance = {"context": CONTEXT, "workspaces_and_fragmentation": plan.allowance}
    return {"gpu": plan.gpu, "gpu_allowance": allowance, "gpu_at_other_times": plan.later, "host": plan.host}


# ---- Text


def _describe(setting: Setting, machine: _Machine) -> list[str]:
    half = setting.precision
    kernel = "memory-efficient" if half == "fp16" else "flash"
    rates = setting.room.rates
    source = "measured by the selftest" if rates.measured else "ASSUMED; measured by `python -m sapiens_accel.selftest`"
    return [
        f"{machine.name}, of which CUDA takes {CONTEXT / GIB:g} GiB; {half}, {kernel} attention; host {machine.host}",
        f"{rates.flops / 1e12:.0f} TFLOP/s sustained ({source})",
    ]


def _show(setting: Setting, table: Table, best: list[Plan] | None, words: Sequence[str], notes: Sequence[str]) -> None:
    run = setting.run
    print(f"{run.recipe} ({run.model.name}, {run.data.input_hw[0]}x{run.data.input_hw[1]}), predicted, in GiB")
    print(*notes, COLUMNS, sep="\n")
    reasons = choice.reasons(table, best)
    for name, plans in table.items():
        print(f"\n{name}, global batch {run.get_stage(name).global_batch}")
        layout = f"{'micro-batch':>12}{'checkpointed':>14}{'selectively':>13}{'head chunk':>12}"
        print(f"  {'way':26}{layout}{'GPU peak':>10}{'host':>8}{'people/s':>10}{'hours':>8}")
        for plan, reason in zip(plans, reasons, strict=True):
            print(f"  {_row(plan)}  {reason or 'RECOMMENDED'}")
    for name, plan in zip(table, best or [], strict=False):
        print(f"\n{name} by {plan.way.name}: {plan}; about {plan.hours:,.{0 if plan.hours >= 100 else 1}f} hours")
        for where, parts in _parts(plan).items():
            print(f"  {where.replace('_', ' ')}")
            for part, size in parts.items():
                print(f"    {part.replace('_', ' '):32}{size / GIB:8.2f}")
    if best:
        missing = [missing_package(best[0].way), kernels.missing_package() if run.memory.fused_kernels else None]
        print("\nRecommended:", *filter(None, missing), command(best[0].way, words), sep="\n  ")


def _row(plan: Plan) -> str:
    layout, peak, host_peak = plan.layout, plan.gpu_peak / GIB, plan.host_peak / GIB
    blocks = f"{layout.checkpointed_blocks:14}{layout.selective_blocks:13}"
    sizes = f"{plan.share.micro_batch:12}{blocks}{layout.head_chunk or 0:12}"
    speed = f"{plan.people_per_second:10.2f}{plan.hours:8.{0 if plan.hours >= 100 else 1}f}"
    return f"{plan.way.name:26}{sizes}{peak:10.2f}{host_peak:8.1f}{speed}"
