"""Before a run: what it needs, and the fastest way to fit it on the GPUs that there are.

    python -m sapiens_accel.memory --recipe sapiens_1b_coco --stage phase2 --gpu_memory 16GiB --host_memory 64GiB

Nothing is allocated and no GPU is needed. All of it is predicted (`plan`).
"""

import dataclasses
import gc
import importlib.util
import json
import re
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from sapiens_accel.config import parse as config
from sapiens_accel.config.commands import memory_parser
from sapiens_accel.config.schema import Config, StageName
from sapiens_accel.data import build
from sapiens_accel.errors import UserError
from sapiens_accel.memory.estimate import CONTEXT, Plan, Stage, Way, command, fit, need, stage_of, ways
from sapiens_accel.models import attention
from sapiens_accel.runtime import distributed, host
from sapiens_accel.runtime.device import LEAST_CAPABILITY
from sapiens_accel.runtime.distributed import Strategy
from sapiens_accel.runtime.files import GIB

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


# ---- In a run

Table = Mapping[StageName, Sequence[Plan]]


def plans(
    accelerator: Accelerator, run: Config, words: Sequence[str], num_keypoints: int = 17
) -> dict[StageName, Plan]:
    """This launch's plan of each stage of the run, for what its devices have free; see `planned`."""
    room = distributed.free_bytes(accelerator)
    host_room = None if room is None else distributed.least(accelerator, host.free_bytes())
    strategy = distributed.strategy(accelerator)
    card = attention.capability_on(accelerator.device)
    return planned(run, strategy, room, host_room, words, accelerator.process_index, num_keypoints, capability=card)


def planned(
    run: Config, strategy: Strategy, room: float | None, host_room: float | None, words: Sequence[str], rank: int = 0,
    num_keypoints: int = 17, *, capability: tuple[int, int] | None = None,
) -> dict[StageName, Plan]:  # fmt: skip
    """The plan of each stage, made before the first of them, so that the last is not refused after days.

    Args:
        room: bytes of a device that may be used; None where memory does not limit.
        host_room: likewise of the host.
        words: the command line, to say which one would fit.
        capability: compute capability of the GPUs; None on CPUs.

    Raises:
        UserError: a stage that does not fit (not with --memory.force); options that do not go together.
    """
    memory = run.memory
    if memory.adam_8bit and strategy.zero:
        raise UserError("--memory.adam_8bit is for launches without DeepSpeed, such as single_gpu.yaml")
    if memory.adam_8bit and importlib.util.find_spec("torchao") is None:
        raise UserError("--memory.adam_8bit needs torchao: pip install torchao")
    if memory.compile_blocks and strategy.zero == 3:
        raise UserError("--memory.compile_blocks does not go with ZeRO-3, whose weights come by while a block runs")
    offloads, eight_bit = memory.offload_activations, memory.adam_8bit
    way = Way(name="this launch", launch="", strategy=strategy, offload_activations=offloads, adam_8bit=eight_bit)
    padded = attention.needs_padding(capability, half=strategy.half)
    chosen = {}
    for name in run.stages:
        stage = stage_of(run, name, strategy.half, num_keypoints, padded=padded)
        plan = fit(stage, name, way, room, host_room, rank)
        chosen[name] = dataclasses.replace(plan, otherwise=_otherwise(stage, plan))
        if not plan.fits and not memory.force:
            way_out = _way_out(run, plan, words, num_keypoints, capability)
            raise UserError(f"{name}: {_shortage(plan)}; {way_out}, or --memory.force to try")
    return chosen


def _otherwise(stage: Stage, plan: Plan) -> str:
    """What takes less than this plan, should it be too much: nearest first, by the plan's own count."""
    part = plan.share.micro_batch * plan.share.accumulation
    for size in (n for n in range(plan.share.micro_batch - 1, 0, -1) if part % n == 0):
        share = dataclasses.replace(plan.share, micro_batch=size, accumulation=part // size)
        if plan.room is None or need(stage, plan.way, share, plan.layout, None, None).gpu_peak < 0.95 * plan.gpu_peak:
            # Planned anew, blocks would be kept whole in the room that this makes.
            blocks = "" if plan.room is None else f" --memory.checkpointed_blocks {plan.layout.checkpointed_blocks}"
            # ... and a teacher would come back to the device.
            kept = "" if plan.way.teacher == "device" else f" --memory.teacher {plan.way.teacher}"
            return f"--memory.micro_batch {size}{blocks}{kept}"
    if not plan.way.offload_activations:
        return "--memory.offload_activations"
    return "another launch: `python -m sapiens_accel.memory` lists them"


def _shortage(plan: Plan) -> str:
    needs = plan.gpu_peak + plan.allowance
    if plan.room is not None and needs > plan.room:
        where = f"needs {needs / GIB:.1f} GiB of GPU memory (predicted), {max(plan.room, 0) / GIB:.1f} GiB can be used"
        largest = sorted(plan.gpu, key=lambda part: -plan.gpu[part])[:3]
        return f"{where} ({', '.join(f'{part} {plan.gpu[part] / GIB:.1f}' for part in largest)}, ...)"
    assert plan.host_room is not None
    return f"needs {plan.host_peak / GIB:.1f} GiB of host memory (predicted), {plan.host_room / GIB:.1f} GiB are free"


def _way_out(
    run: Config, plan: Plan, words: Sequence[str], num_keypoints: int, capability: tuple[int, int] | None
) -> str:
    """The nearest launch that fits all stages, of the same GPUs."""
    if plan.way.strategy.num_local < plan.way.strategy.num_ranks:
        return "take a launch with more ZeRO or offload on these machines"
    asked = dataclasses.replace(run.memory, checkpointed_blocks=None, head_chunk=None, micro_batch=None, teacher=None)
    free = dataclasses.replace(run, memory=asked)
    table = _table(free, plan.way.strategy.num_ranks, plan.room, plan.host_room, num_keypoints, capability)
    best = _fastest(table)
    if best is None:
        return _nothing_fits(table)
    return f"the nearest that fits: {command(best[0].way, _without(words, '--memory.'))}"


def _table(
    run: Config, gpus: int, room: float | None, host_room: float | None, num_keypoints: int,
    capability: tuple[int, int] | None,
) -> Table:  # fmt: skip
    """Every stage by every way, in 16 bits; GPUs without a flash kernel for those have no bf16 either."""
    padded = attention.needs_padding(capability)
    every = ways(gpus, "fp16" if padded else "bf16")
    stages: dict[StageName, Stage] = {
        name: stage_of(run, name, num_keypoints=num_keypoints, padded=padded) for name in run.stages
    }
    return {name: [fit(stage, name, way, room, host_room) for way in every] for name, stage in stages.items()}


def _fastest(table: Table) -> list[Plan] | None:
    """The plans of the way that fits all stages and takes the least time over them.

    Moments in 8 bits change the losses a little: they are for where nothing else fits.
    """
    columns = [list(plans) for plans in zip(*table.values(), strict=True)]
    fitting = [plans for plans in columns if all(plan.fits for plan in plans)]
    return min(fitting, key=lambda p: (p[0].way.adam_8bit, sum(plan.seconds for plan in p)), default=None)


def _nothing_fits(table: Table) -> str:
    for name, plans in table.items():
        if not any(plan.fits for plan in plans):
            least = min(plans, key=lambda plan: plan.gpu_peak + plan.allowance)
            gpu, host = (least.gpu_peak + least.allowance) / GIB, least.host_peak / GIB
            takes = f"takes {gpu:.1f} GiB of it and {host:.1f} GiB of host memory (predicted)"
            why = f"{name}: what needs the least GPU memory, {least.way.name}, {takes}"
            return f"nothing fits: {why}; take a smaller model or more GPUs"
    return "no one launch fits all stages; ask for each with --stage"


def _without(words: Sequence[str], *options: str) -> list[str]:
    """A command line without the options that begin so, and their values."""
    kept, value_follows = [], False
    for word in words:
        gone = word.startswith(options) or (value_follows and not word.startswith("--"))
        if not gone:
            kept.append(word)
        value_follows = gone and word.startswith("--") and "=" not in word
    return kept


# ---- Out of memory all the same


@contextmanager
def out_of_memory_told(
    accelerator: Accelerator,
    name: StageName,
    plan: Plan,
    drop: Callable[[], None] | None = None,
    save: Callable[[], Path | None] | None = None,
) -> Iterator[None]:
    """Turn running out of memory into one line that says what to do, after what was trained has been saved.

    Of several processes only some may have come here, and saving needs all: then the last checkpoint has to do.

    Args:
        drop: forgets the gradients of the step that was cut off.
        save: writes the state of the last whole step and returns where; None where there is nothing to save.

    Raises:
        UserError: in place of torch's error.
    """
    try:
        yield
        return
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        said = str(error).split(". ")[0].splitlines()[0]
        traceback.clear_frames(error.__traceback__)  # they hold the activations
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if drop:
        drop()
    kept = save() if save and accelerator.num_processes == 1 else None
    predicted = f" ({plan.gpu_peak / GIB:.1f} GiB were predicted)" if plan.gpu else ""
    again = f"the state is in {kept}: go on with --resume_from_checkpoint latest and" if kept else "try"
    tried = f"out of memory with micro-batch {plan.share.micro_batch}{predicted}"
    raise UserError(f"{name}: {tried}; {again} {plan.otherwise} [{said}]")


def _is_out_of_memory(error: BaseException) -> bool:
    """Of a device, of cuBLAS and cuDNN on it, of pinned memory, or of the host under a run on the CPU."""
    said = ("out of memory", "ALLOC_FAILED", "can't allocate memory")
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in said)


# ---- python -m sapiens_accel.memory


def main(words: Sequence[str]) -> None:
    asked, rest = memory_parser().parse_known_args(words)
    if asked.gpus < 1:
        raise UserError(f"--gpus {asked.gpus}: expected 1 or more")
    room, host_room = bytes_of("gpu_memory", asked.gpu_memory) - CONTEXT, bytes_of("host_memory", asked.host_memory)
    run = config.load(rest, prog="python -m sapiens_accel.memory")
    table = _table(run, asked.gpus, room, host_room, _num_keypoints(run), capability_of(asked.capability))
    best = _fastest(table)
    words = _without(rest, "--memory.offload_activations", "--memory.adam_8bit")  # each way says for itself
    if asked.json:
        print(json.dumps(_as_json(table, best, words), indent=2))
    else:
        _show(run, table, best, words, asked)
    if best is None:
        raise UserError(_nothing_fits(table))


def _num_keypoints(run: Config) -> int:
    """Of the data where it is there, else COCO's 17."""
    found = run.data.root is not None and (Path(run.data.root) / run.data.train_annotations).is_file()
    return build.open_skeleton(run.data)[0].num_keypoints if found else 17


def capability_of(text: str) -> tuple[int, int]:
    """A compute capability.

    Raises:
        UserError: not one of a GPU that can be trained on.
    """
    found = re.fullmatch(r"(\d+)\.(\d)", text)
    if not found or (int(found[1]), int(found[2])) < LEAST_CAPABILITY:
        raise UserError(f"--capability {text}: expected the compute capability of a GPU, 7.0 or newer, such as 7.5")
    return int(found[1]), int(found[2])


def bytes_of(option: str, text: str) -> float:
    """A size with its unit, in bytes.

    Raises:
        UserError: no number, no unit or one that is not known.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", text)
    unit = UNITS.get(found[2].upper()) if found else None
    if not found or unit is None or float(found[1]) == 0:
        raise UserError(f"--{option} {text}: expected a size with its unit, such as 16GiB, 24GB or 15360MiB")
    return float(found[1]) * unit


def _as_json(table: Table, best: list[Plan] | None, words: Sequence[str]) -> dict[str, Any]:
    """Of several stages: the hungriest one's plan for each way."""
    worst = [max(plans, key=lambda plan: plan.gpu_peak) for plans in zip(*table.values(), strict=True)]
    recommended = None if best is None else _plan_json(max(best, key=lambda plan: plan.gpu_peak), words)
    return {"predicted": True, "recommended": recommended, "strategies": [_plan_json(plan, words) for plan in worst]}


def _plan_json(plan: Plan, words: Sequence[str]) -> dict[str, Any]:
    gib = {where: {part: round(size / GIB, 4) for part, size in parts.items()} for where, parts in _parts(plan).items()}
    return {
        "strategy": plan.way.name,
        "precision": "bf16" if plan.way.strategy.bf16 else "fp16",
        "fits": plan.fits,
        "micro_batch": plan.share.micro_batch,
        "accumulation": plan.share.accumulation,
        "checkpointed_blocks": plan.layout.checkpointed_blocks,
        "head_chunk": plan.layout.head_chunk,
        "teacher": plan.way.teacher if "ema_teacher" in plan.gpu else None,
        "gpu_peak_gib": round(plan.gpu_peak / GIB, 4),
        "gpu_allowance_gib": round((plan.allowance + CONTEXT) / GIB, 4),
        "host_gib": round(plan.host_peak / GIB, 4),
        "command": command(plan.way, words),
        "parts": gib,
    }


def _parts(plan: Plan) -> dict[str, Mapping[str, float]]:
    """`gpu` adds up to the peak; the allowance comes on top of it; `gpu_at_other_times` is not there at the peak."""
    allowance = {"context": CONTEXT, "workspaces_and_fragmentation": plan.allowance}
    return {"gpu": plan.gpu, "gpu_allowance": allowance, "gpu_at_other_times": plan.later, "host": plan.host}


def _show(run: Config, table: Table, best: list[Plan] | None, words: Sequence[str], asked: Any) -> None:
    print(f"{run.recipe} ({run.model.name}, {run.data.input_hw[0]}x{run.data.input_hw[1]}), predicted, in GiB")
    cuda = f"of which {CONTEXT / GIB:g} GiB are CUDA's"
    padded = attention.needs_padding(capability_of(asked.capability))
    arithmetic = "fp16, memory-efficient attention" if padded else "bf16, flash attention"
    print(f"{asked.gpus} GPU(s) with {asked.gpu_memory}, {cuda}; {arithmetic}; host {asked.host_memory}")
    for name, plans in table.items():
        print(f"\n{name}, global batch {run.of(name).global_batch}")
        layout = f"{'micro-batch':>12}{'checkpointed':>14}{'head chunk':>12}"
        print(f"  {'way':26}{layout}{'GPU peak':>10}{'host':>8}{'time':>10}")
        fastest = min((plan.seconds for plan in plans if plan.fits), default=None)
        for plan in plans:
            layout, peak, host = plan.layout, plan.gpu_peak / GIB, plan.host_peak / GIB
            time = f"x {plan.seconds / fastest:.2f}" if fastest and plan.fits else "too big"
            sizes = f"{plan.share.micro_batch:12}{layout.checkpointed_blocks:14}{layout.head_chunk:12}"
            print(f"  {plan.way.name:26}{sizes}{peak:10.2f}{host:8.1f}{time:>10}")
    for name, plan in zip(table, best or [], strict=False):
        print(f"\n{name} by {plan.way.name}: {plan}")
        for where, parts in _parts(plan).items():
            print(f"  {where.replace('_', ' ')}")
            for part, size in parts.items():
                print(f"    {part.replace('_', ' '):32}{size / GIB:8.2f}")
    if best:
        print(f"\nRecommended:\n  {command(best[0].way, words)}")
