"""Plan the memory of a run before it starts, and find the fastest way to launch it on the available GPUs.

    python -m sapiens_accel.memory --recipe sapiens_1b_coco --stage phase2 --gpu_memory 16GiB --host_memory 64GiB

Nothing is allocated and no GPU is needed: everything is predicted (`estimate`).
"""

import dataclasses
import gc
import importlib.util
import json
import re
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from sapiens_accel.config import parse as config
from sapiens_accel.config.commands import memory_parser
from sapiens_accel.config.schema import Config, StageName
from sapiens_accel.data import build
from sapiens_accel.errors import UserError
from sapiens_accel.memory.estimate import CONTEXT, Plan, Room, Stage, measure_stage, predict
from sapiens_accel.memory.fitting import fit
from sapiens_accel.memory.strategies import Way, command, list_ways
from sapiens_accel.models import attention
from sapiens_accel.models.load import starting_point
from sapiens_accel.runtime import distributed, failures, host
from sapiens_accel.runtime.device import LEAST_CAPABILITY
from sapiens_accel.runtime.distributed import Strategy
from sapiens_accel.runtime.files import GIB

COLUMNS = """
way: ZeRO stage and what is kept in host memory; micro-batch: labeled people in a forward pass; checkpointed: blocks
that are recomputed in the backward pass, to save memory; head chunk: people in the head at a time; GPU peak: of each
GPU; host: memory of the machine; time: of an optimizer step, as a multiple of the fastest way that fits."""

FIX = "Use a smaller model or more GPUs"

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


@dataclass(frozen=True, kw_only=True)
class LaunchInfo:
    """The launch of a run, for its plan.

    Attributes:
        capability: compute capability of the GPUs; None on CPUs.
        rank: rank of this process.
        words: the arguments of train.py, to print a command that fits.
    """

    strategy: Strategy
    room: Room
    words: Sequence[str]
    rank: int = 0
    capability: tuple[int, int] | None = None


def plan_run(
    accelerator: Accelerator, run: Config, words: Sequence[str], num_keypoints: int = 17
) -> dict[StageName, Plan]:
    """Plan each stage for the free memory of the launch's devices; see `plan_stages`."""
    free = distributed.free_bytes(accelerator)
    free_host = None if free is None else distributed.least(accelerator, host.free_bytes())
    launch = LaunchInfo(
        strategy=distributed.strategy(accelerator),
        room=Room(device=free, host=free_host),
        words=words,
        rank=accelerator.process_index,
        capability=attention.capability_on(accelerator.device),
    )
    return plan_stages(run, launch, num_keypoints)


def plan_stages(run: Config, launch: LaunchInfo, num_keypoints: int = 17) -> dict[StageName, Plan]:
    """Plan all stages before the first one starts, so that a later one is not refused after days.

    Raises:
        UserError: a stage does not fit (unless --memory.force), or options contradict each other.
    """
    memory, strategy = run.memory, launch.strategy
    if memory.adam_8bit and strategy.zero:
        raise UserError("--memory.adam_8bit: only without DeepSpeed (expected a launch such as single_gpu.yaml)")
    if memory.adam_8bit and importlib.util.find_spec("torchao") is None:
        raise UserError("--memory.adam_8bit: torchao is not installed. Run pip install torchao")
    if memory.compile_blocks and strategy.zero == 3:
        raise UserError("--memory.compile_blocks: not with ZeRO-3, which gathers the weights of a block while it runs")
    offloads, eight_bit = memory.offload_activations, memory.adam_8bit
    way = Way(name="this launch", launch="", strategy=strategy, offload_activations=offloads, adam_8bit=eight_bit)
    padded = attention.needs_padding(launch.capability, half=strategy.half)
    chosen = {}
    for name in run.stages:
        stage = measure_stage(run, name, strategy.half, num_keypoints, padded=padded)
        plan = fit(stage, name, way, launch.room, launch.rank)
        chosen[name] = dataclasses.replace(plan, otherwise=_smaller_options(stage, plan))
        if not plan.fits and not memory.force:
            suggestion = _suggest_launch(run, plan, launch, num_keypoints)
            raise UserError(f"{name}: {_describe_shortage(plan)}; {suggestion}, or --memory.force to try")
    return chosen


def _smaller_options(stage: Stage, plan: Plan) -> str:
    """The smallest change of options that needs less memory than this plan, as far as it can be predicted."""
    part = plan.share.micro_batch * plan.share.accumulation
    for size in (n for n in range(plan.share.micro_batch - 1, 0, -1) if part % n == 0):
        share = dataclasses.replace(plan.share, micro_batch=size, accumulation=part // size)
        if plan.room is None or predict(stage, plan.way, share, plan.layout).gpu_peak < 0.95 * plan.gpu_peak:
            # Without this option the next plan would use the freed memory for blocks without checkpoints ...
            blocks = "" if plan.room is None else f" --memory.checkpointed_blocks {plan.layout.checkpointed_blocks}"
            # ... and without this one it would move the teacher back to the device.
            teacher = "" if plan.way.teacher == "device" else f" --memory.teacher {plan.way.teacher}"
            return f"--memory.micro_batch {size}{blocks}{teacher}"
    if not plan.way.offload_activations:
        return "--memory.offload_activations"
    return "another launch: `python -m sapiens_accel.memory` lists them"


def _describe_shortage(plan: Plan) -> str:
    needs = plan.gpu_peak + plan.allowance
    if plan.room is not None and needs > plan.room:
        usable = max(plan.room, 0) / GIB
        shortage = f"needs {needs / GIB:.1f} GiB of GPU memory (predicted), {usable:.1f} GiB can be used"
        largest = sorted(plan.gpu, key=lambda part: -plan.gpu[part])[:3]
        return f"{shortage} ({', '.join(f'{part} {plan.gpu[part] / GIB:.1f}' for part in largest)}, ...)"
    assert plan.host_room is not None
    return f"needs {plan.host_peak / GIB:.1f} GiB of host memory (predicted), {plan.host_room / GIB:.1f} GiB are free"


def _suggest_launch(run: Config, plan: Plan, launch: LaunchInfo, num_keypoints: int) -> str:
    """The fastest launch on the same GPUs that fits all stages, as a command."""
    if plan.way.strategy.num_local < plan.way.strategy.num_ranks:
        return "use a launch with a higher ZeRO stage or with offload"
    asked = dataclasses.replace(run.memory, checkpointed_blocks=None, head_chunk=None, micro_batch=None, teacher=None)
    free = dataclasses.replace(run, memory=asked)
    table = _plan_all_ways(free, plan.way.strategy.num_ranks, launch.room, num_keypoints, launch.capability)
    best = _choose_fastest(table)
    if best is None:
        return _describe_nothing_fits(table)
    return f"launch it by {command(best[0].way, _without(launch.words, '--memory.'))}"


def _plan_all_ways(run: Config, gpus: int, room: Room, num_keypoints: int, capability: tuple[int, int] | None) -> Table:
    """Plan every stage for every way, in 16 bits. GPUs without a flash kernel have no bf16 either."""
    padded = attention.needs_padding(capability)
    every = list_ways(gpus, "fp16" if padded else "bf16")
    stages: dict[StageName, Stage] = {
        name: measure_stage(run, name, num_keypoints=num_keypoints, padded=padded) for name in run.stages
    }
    return {name: [fit(stage, name, way, room) for way in every] for name, stage in stages.items()}


def _choose_fastest(table: Table) -> list[Plan] | None:
    """The plans of the fastest way that fits all stages; None if none does.

    8-bit moments change the losses a little, so these ways are chosen only if no other fits.
    """
    columns = [list(plans) for plans in zip(*table.values(), strict=True)]
    fitting = [plans for plans in columns if all(plan.fits for plan in plans)]
    return min(fitting, key=lambda p: (p[0].way.adam_8bit, sum(plan.seconds for plan in p)), default=None)


def _describe_nothing_fits(table: Table) -> str:
    for name, plans in table.items():
        if not any(plan.fits for plan in plans):
            least = min(plans, key=lambda plan: plan.gpu_peak + plan.allowance)
            gpu, host = (least.gpu_peak + least.allowance) / GIB, least.host_peak / GIB
            needs = f"needs {gpu:.1f} GiB of it and {host:.1f} GiB of host memory (predicted)"
            return f"{name}: no launch fits: the one of least GPU memory, {least.way.name}, {needs}. {FIX}"
    return "no single launch fits all stages. Plan each of them with --stage"


def _without(words: Sequence[str], *options: str) -> list[str]:
    """Remove the options that begin like one of `options`, and their values, from a command line."""
    remaining, value_follows = [], False
    for word in words:
        is_removed = word.startswith(options) or (value_follows and not word.startswith("--"))
        if not is_removed:
            remaining.append(word)
        value_follows = is_removed and word.startswith("--") and "=" not in word
    return remaining


# ---- Out of memory in spite of the plan


@contextmanager
def explain_out_of_memory(
    accelerator: Accelerator,
    name: StageName,
    plan: Plan,
    drop: Callable[[], None] | None = None,
    save: Callable[[], Path | None] | None = None,
) -> Iterator[None]:
    """Save the state when memory runs out, and replace torch's error by a line that says what to do.

    With several processes the state is not saved: only some may have failed, and saving needs all of them.

    Args:
        drop: frees the gradients of the interrupted step.
        save: writes the state of the last complete step and returns its folder, or None if there is nothing to save.

    Raises:
        UserError: in place of torch's error.
    """
    try:
        yield
        return
    except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        torn = failures.is_torn(error)
        reason = (str(error) or "MemoryError").split(". ")[0].splitlines()[0]
        traceback.clear_frames(error.__traceback__)  # its frames hold the activations
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if drop:
        drop()
    saved = save() if save and not torn and accelerator.num_processes == 1 else None
    predicted = f" ({plan.gpu_peak / GIB:.1f} GiB were predicted)" if plan.gpu else ""
    fix = f"The state is saved in {saved}: resume with --resume_from_checkpoint latest and" if saved else "Try"
    what = f"out of memory with micro-batch {plan.share.micro_batch}{predicted}"
    explained = UserError(f"{name}: {what}. {fix} {plan.otherwise} [{reason}]")
    if torn:  # so that no outer handler saves the state
        failures.mark_torn(explained)
    raise explained


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means out of memory: on a device, in cuBLAS or cuDNN, of pinned memory, or of the host."""
    texts = ("out of memory", "ALLOC_FAILED", "can't allocate memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(text in str(error) for text in texts)


# ---- python -m sapiens_accel.memory


def main(words: Sequence[str]) -> None:
    asked, rest = memory_parser().parse_known_args(words)
    if asked.gpus < 1:
        raise UserError(f"--gpus {asked.gpus}: expected 1 or more")
    room = Room(
        device=parse_bytes("gpu_memory", asked.gpu_memory) - CONTEXT, host=parse_bytes("host_memory", asked.host_memory)
    )
    run = config.load(rest, prog="python -m sapiens_accel.memory")
    table = _plan_all_ways(run, asked.gpus, room, _num_keypoints(run), parse_capability(asked.capability))
    best = _choose_fastest(table)
    # The printed commands add these options themselves.
    words = _with_placeholders(run, _without(rest, "--memory.offload_activations", "--memory.adam_8bit"))
    if asked.json:
        print(json.dumps(_as_json(table, best, words), indent=2))
    else:
        _show(run, table, best, words, asked)
    if best is None:
        raise UserError(_describe_nothing_fits(table))


def _with_placeholders(run: Config, words: Sequence[str]) -> list[str]:
    """The arguments of a launch, with `--data.root DIR` and `--weights WEIGHTS` added if the run lacks them.

    The demo needs neither: it trains a tiny network from random weights on drawn people.
    """
    if run.recipe == "demo":
        return list(words)
    data = ["--data.root", "DIR"] if run.data.root is None else []
    needs_weights = run.weights is None and starting_point(Path(run.output_dir), run.stages[0]) is None
    return [*words, *data, *(["--weights", "WEIGHTS"] if needs_weights else [])]


def _num_keypoints(run: Config) -> int:
    """The number of keypoints of the dataset if its annotations exist; else COCO's 17."""
    exists = run.data.root is not None and (Path(run.data.root) / run.data.train_annotations).is_file()
    return build.open_skeleton(run.data)[0].num_keypoints if exists else 17


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


def _as_json(table: Table, best: list[Plan] | None, words: Sequence[str]) -> dict[str, Any]:
    """JSON of the table; of several stages, the one that needs the most GPU memory represents each way."""
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
    """The parts of a plan: `gpu` adds up to the peak, the allowance is added to it, `gpu_at_other_times` is not."""
    allowance = {"context": CONTEXT, "workspaces_and_fragmentation": plan.allowance}
    return {"gpu": plan.gpu, "gpu_allowance": allowance, "gpu_at_other_times": plan.later, "host": plan.host}


def _show(run: Config, table: Table, best: list[Plan] | None, words: Sequence[str], asked: Any) -> None:
    print(f"{run.recipe} ({run.model.name}, {run.data.input_hw[0]}x{run.data.input_hw[1]}), predicted, in GiB")
    cuda = f"of which CUDA takes {CONTEXT / GIB:g} GiB"
    padded = attention.needs_padding(parse_capability(asked.capability))
    arithmetic = "fp16, memory-efficient attention" if padded else "bf16, flash attention"
    print(f"{asked.gpus} GPU(s) with {asked.gpu_memory}, {cuda}; {arithmetic}; host {asked.host_memory}")
    print(COLUMNS)
    for name, plans in table.items():
        print(f"\n{name}, global batch {run.get_stage(name).global_batch}")
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
