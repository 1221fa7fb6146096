"""Plan the memory of a run before it starts, on the devices of its launch."""

import dataclasses
import gc
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator

from sapiens_accel.config.schema import Config, StageName
from sapiens_accel.errors import UserError
from sapiens_accel.memory import choice, duration, gpus, strategies
from sapiens_accel.memory.choice import Setting
from sapiens_accel.memory.estimate import Plan, Room, predict
from sapiens_accel.memory.fitting import divide, fit
from sapiens_accel.memory.gpus import Rates
from sapiens_accel.memory.stages import COCO_PEOPLE, Stage, measure_stage
from sapiens_accel.memory.strategies import Way
from sapiens_accel.models import kernels
from sapiens_accel.runtime import distributed, failures, host
from sapiens_accel.runtime.distributed import Strategy
from sapiens_accel.runtime.files import GIB


@dataclass(frozen=True, kw_only=True)
class LaunchInfo:
    """The launch of a run, for its plan.

    Attributes:
        capability: compute capability of the GPUs; None on CPUs.
        rank: rank of this process.
        words: the arguments of train.py, to print a command that fits.
        num_people: labeled people of training, which decide how many steps a stage has.
    """

    strategy: Strategy
    room: Room
    words: Sequence[str]
    rank: int = 0
    capability: tuple[int, int] | None = None
    num_people: int = COCO_PEOPLE


def plan_run(
    accelerator: Accelerator,
    run: Config,
    words: Sequence[str],
    num_keypoints: int = 17,
    num_people: int = COCO_PEOPLE,
) -> dict[StageName, Plan]:
    """Plan each stage for the free memory of the launch's devices; see `plan_stages`."""
    free = distributed.free_bytes(accelerator)
    free_host = None if free is None else distributed.least(accelerator, host.free_bytes())
    launch = LaunchInfo(
        strategy=distributed.strategy(accelerator),
        room=Room(device=free, host=free_host, rates=_rates(accelerator)),
        words=words,
        rank=accelerator.process_index,
        capability=kernels.capability_on(accelerator.device),
        num_people=num_people,
    )
    return plan_stages(run, launch, num_keypoints)


def _rates(accelerator: Accelerator) -> Rates:
    """The rates of the launch's GPU: measured by a selftest in this folder, else assumed."""
    if accelerator.device.type != "cuda":
        return gpus.ASSUMED
    name = torch.cuda.get_device_name(accelerator.device)
    return gpus.with_measured(gpus.rates_of_device(name), duration.measured_flops(name))


def plan_stages(run: Config, launch: LaunchInfo, num_keypoints: int = 17) -> dict[StageName, Plan]:
    """Plan all stages before the first one starts, so that a later one is not refused after days.

    Raises:
        UserError: a stage does not fit (unless --memory.force), or options contradict each other.
    """
    memory, strategy = run.memory, launch.strategy
    if refusal := strategies.find_refusal(run, strategy):
        raise UserError(refusal)
    options = {name: getattr(memory, name) for name in ("offload_activations", "adam_8bit", "bf16_weights")}
    way = Way(name="this launch", launch="", strategy=strategy, **options)
    if missing := strategies.missing_package(way):
        raise UserError(f"--memory.adam_8bit: torchao is not installed. Run {missing}")
    if memory.fused_kernels:
        _check_fused_kernels(launch.capability)
    padded = kernels.needs_padding(launch.capability, half=strategy.half)
    chosen = {}
    for name in run.stages:
        stage = measure_stage(run, name, strategy.half, num_keypoints, padded=padded, num_people=launch.num_people)
        plan = fit(stage, name, way, launch.room, launch.rank)
        chosen[name] = dataclasses.replace(plan, otherwise=_smaller_options(stage, plan))
        if not plan.fits and not memory.force:
            suggestion = _suggest_launch(run, plan, launch, num_keypoints)
            raise UserError(
                f"{name}: {choice.describe_shortage(plan, with_parts=True)}; {suggestion}, or --memory.force to try"
            )
    return chosen


def _check_fused_kernels(capability: tuple[int, int] | None) -> None:
    """Refuse fused kernels where they do not run."""
    where = "--memory.fused_kernels"
    if capability is None:
        raise UserError(f"{where}: only on GPUs (expected CUDA, found none). Remove it")
    if capability < kernels.TRITON_CAPABILITY:
        least, found = (".".join(map(str, numbers)) for numbers in (kernels.TRITON_CAPABILITY, capability))
        raise UserError(f"{where}: this GPU is too old (expected compute capability {least}, found {found}). Remove it")
    if missing := kernels.missing_package():
        raise UserError(f"{where}: liger-kernel or triton is not installed. Run {missing}")


def _smaller_options(stage: Stage, plan: Plan) -> str:
    """The smallest change of options that needs less memory than this plan, as far as it can be predicted."""
    part = plan.share.micro_batch * plan.share.accumulation
    for size in divide(stage.plan, part, plan.share.micro_batch - 1):
        share = dataclasses.replace(plan.share, micro_batch=size, accumulation=part // size)
        if plan.room is None or predict(stage, plan.way, share, plan.layout).gpu_peak < 0.95 * plan.gpu_peak:
            # Without this option the next plan would use the freed memory for blocks without checkpoints ...
            layout = plan.layout
            blocks = "" if plan.room is None else f" --memory.checkpointed_blocks {layout.checkpointed_blocks}"
            blocks += f" --memory.selective_blocks {layout.selective_blocks}" if layout.selective_blocks else ""
            # ... and without this one it would move the teacher back to the device.
            teacher = "" if plan.way.teacher == "device" else f" --memory.teacher {plan.way.teacher}"
            return f"--memory.micro_batch {size}{blocks}{teacher}"
    if not (plan.way.offload_activations or stage.memory.selective_blocks):
        return "--memory.offload_activations"
    return "another launch: `python -m sapiens_accel.memory` lists them"


def _suggest_launch(run: Config, plan: Plan, launch: LaunchInfo, num_keypoints: int) -> str:
    """The recommended launch on the same GPUs, as a command; what would fit if none does."""
    if plan.way.strategy.num_local < plan.way.strategy.num_ranks:
        return "use a launch with a higher ZeRO stage or with offload"
    plain = {"checkpointed_blocks": None, "selective_blocks": None, "head_chunk": None, "micro_batch": None}
    asked = dataclasses.replace(run.memory, **plain, teacher=None)
    setting = Setting(
        run=dataclasses.replace(run, memory=asked),
        gpus=plan.way.strategy.num_ranks,
        room=launch.room,
        capability=launch.capability,
        num_keypoints=num_keypoints,
        num_people=launch.num_people,
    )
    table = setting.table()
    best = choice.choose(table)
    if best is None:
        return choice.describe_nothing_fits(setting, table)
    missing = strategies.missing_package(best[0].way)
    first = f"{missing}, and " if missing else ""
    return f"{first}launch it by {strategies.command(best[0].way, strategies.without(launch.words, '--memory.'))}"


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
