"""Choose among the ways to launch a run, say why the others are not recommended, and what would fit where none does."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from sapiens_accel.config.schema import Config, LoraConfig, StageName
from sapiens_accel.errors import UserError
from sapiens_accel.memory.estimate import Plan, Room
from sapiens_accel.memory.fitting import fit
from sapiens_accel.memory.stages import COCO_PEOPLE, Stage, measure_stage
from sapiens_accel.memory.strategies import Way, find_refusal, list_ways
from sapiens_accel.models import kernels
from sapiens_accel.models.sapiens import SIZES
from sapiens_accel.runtime.files import GIB

Table = Mapping[StageName, Sequence[Plan]]

RANK = 16  # of the adapters that are proposed
TIGHT = 0.9  # of the host memory: a way that takes more leaves no room for an error of the prediction
TIGHT_COST, EIGHT_BIT_COST, BF16_COST = 2.0, 1.5, 1.2  # factors on the time, in the comparison of ways


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What the ways are planned for.

    Attributes:
        gpus: of one machine.
        capability: compute capability of the GPUs; None for CPUs.
        num_people: labeled people of training.
    """

    run: Config
    gpus: int
    room: Room
    capability: tuple[int, int] | None
    num_keypoints: int = 17
    num_people: int = COCO_PEOPLE

    @property
    def precision(self) -> str:
        """GPUs without a flash kernel have no bf16 either."""
        return "fp16" if kernels.needs_padding(self.capability) else "bf16"

    def stage(self, name: StageName) -> Stage:
        padded = kernels.needs_padding(self.capability)
        return measure_stage(
            self.run, name, num_keypoints=self.num_keypoints, padded=padded, num_people=self.num_people
        )

    def table(self) -> Table:
        """Plan every stage for every way that its options allow, in 16 bits.

        Raises:
            UserError: they allow none.
        """
        ways = list_ways(self.gpus, self.precision)
        refusals = [find_refusal(self._run_by(way), way.strategy) for way in ways]
        if all(refusals):
            raise UserError(str(refusals[0]))
        every = [way for way, refusal in zip(ways, refusals, strict=True) if not refusal]
        stages: dict[StageName, Stage] = {name: self.stage(name) for name in self.run.stages}
        return {name: [fit(stage, name, way, self.room) for way in every] for name, stage in stages.items()}

    def _run_by(self, way: Way) -> Config:
        """The run with the options that a way sets itself."""
        options = {name: getattr(way, name) for name in ("adam_8bit", "bf16_weights", "offload_activations")}
        return dataclasses.replace(self.run, memory=dataclasses.replace(self.run.memory, **options))


def columns(table: Table) -> list[list[Plan]]:
    """The plans of all stages, by way."""
    return [list(plans) for plans in zip(*table.values(), strict=True)]


def choose(table: Table) -> list[Plan] | None:
    """The plans of the way of the lowest cost that fits all stages; None if none does."""
    fitting = [plans for plans in columns(table) if all(plan.fits for plan in plans)]
    return min(fitting, key=cost, default=None)


def cost(plans: Sequence[Plan]) -> float:
    """The time of all stages; more for what nearly fills the host, and for what changes the losses."""
    hours, way = sum(plan.seconds * max(plan.steps, 1) for plan in plans), plans[0].way
    inexact = (EIGHT_BIT_COST if way.adam_8bit else 1.0) * (BF16_COST if way.bf16_weights else 1.0)
    return hours * (TIGHT_COST if is_tight(plans) else 1.0) * inexact


def is_tight(plans: Sequence[Plan]) -> bool:
    return any(plan.host_room is not None and plan.host_peak > TIGHT * plan.host_room for plan in plans)


def reasons(table: Table, best: Sequence[Plan] | None) -> list[str | None]:
    """Why each way is not recommended; None for the one that is."""
    return [None if best and plans[0].way == best[0].way else _why_not(plans, best) for plans in _named(table, best)]


def _named(table: Table, best: Sequence[Plan] | None) -> list[list[Plan]]:
    """`columns`; the teacher's place is a part of a plan's way, but names no other way."""
    every = columns(table)
    if best is None:
        return every
    return [list(best) if plans[0].way.name == best[0].way.name else plans for plans in every]


def _why_not(plans: Sequence[Plan], best: Sequence[Plan] | None) -> str:
    short = next((plan for plan in plans if not plan.fits), None)
    if short is not None:
        return describe_shortage(short)
    assert best is not None  # it fits, so something is recommended
    time = sum(plan.hours for plan in plans) / max(sum(plan.hours for plan in best), 1e-12)
    text = f"takes {time:.2f} times as long"
    if is_tight(plans) and not is_tight(best):
        most = max(plans, key=lambda plan: plan.host_peak)
        assert most.host_room is not None
        text += f" and {most.host_peak / GIB:.1f} of {most.host_room / GIB:.1f} GiB of host memory"
    if plans[0].way.bf16_weights:
        return text + ", and bf16 weights with 8-bit moments change the losses more than the other ways"
    if plans[0].way.adam_8bit and not best[0].way.adam_8bit:
        text += ", and 8-bit moments change the losses a little"
    return text


def describe_shortage(plan: Plan, *, with_parts: bool = False) -> str:
    """The memory that a plan lacks: of the GPU, with the largest parts of it if wanted, or of the host."""
    needs = plan.gpu_peak + plan.allowance
    if plan.room is not None and not plan.fits_device:
        usable = max(plan.room, 0) / GIB
        shortage = f"needs {needs / GIB:.1f} GiB of GPU memory (predicted), {usable:.1f} GiB can be used"
        largest = sorted(plan.gpu, key=lambda part: -plan.gpu[part])[:3]
        parts = ", ".join(f"{part} {plan.gpu[part] / GIB:.1f}" for part in largest)
        return f"{shortage} ({parts}, ...)" if with_parts else shortage
    assert plan.host_room is not None
    return f"needs {plan.host_peak / GIB:.1f} GiB of host memory (predicted), {plan.host_room / GIB:.1f} GiB are free"


# ---- Where nothing fits


def describe_nothing_fits(setting: Setting, table: Table) -> str:
    """The limit that binds, and the smallest changes that would fit, in one line."""
    changes = "; ".join(changes_that_fit(setting, table)) or "Use a smaller model or more GPUs"
    for name, plans in table.items():
        if not any(plan.fits for plan in plans):
            return f"{name}: no launch fits: {_binding_limit(plans)}. What would fit: {changes}"
    return f"no single launch fits all stages. Plan each of them with --stage. What would fit: {changes}"


def _binding_limit(plans: Sequence[Plan]) -> str:
    """Host memory if a way fits the GPU, else the GPU's."""
    on_gpu = [plan for plan in plans if plan.fits_device]
    if on_gpu:
        least = min(on_gpu, key=lambda plan: plan.host_peak)
        return f"host memory is the limit: {least.way.name} {describe_shortage(least)}"
    least = min(plans, key=lambda plan: plan.gpu_peak + plan.allowance)
    host = f"and {least.host_peak / GIB:.1f} GiB of host memory"
    return f"GPU memory is the limit: the way of least, {least.way.name}, {describe_shortage(least)} {host}"


def changes_that_fit(setting: Setting, table: Table) -> Iterator[str]:
    """Changes after which some way fits all stages, the smallest first."""
    limited_by_host = all(any(plan.fits_device for plan in plans) for plans in table.values())
    if limited_by_host:
        yield from _fewer_workers(setting)
    yield from _adapters(setting)
    yield from _rounded_base(setting)
    yield from _smaller_model(setting)
    if limited_by_host:
        yield from _more_host_memory(setting)
    else:
        yield from _more_gpu_memory(setting)
    yield from _more_gpus(setting)


def _fewer_workers(setting: Setting) -> Iterator[str]:
    data = setting.run.data
    for num in range(data.num_workers - 1, -1, -1):
        fewer = dataclasses.replace(setting.run, data=dataclasses.replace(data, num_workers=num))
        if best := choose(dataclasses.replace(setting, run=fewer).table()):
            yield f"--data.num_workers {num} (by {best[0].way.name})"
            return


def _adapters(setting: Setting) -> Iterator[str]:
    adapted = dataclasses.replace(setting, run=dataclasses.replace(setting.run, lora=LoraConfig(rank=RANK)))
    if setting.run.lora.rank is None and (best := _choose_or_none(adapted)):
        yield f"--lora.rank {RANK} (by {best[0].way.name})"


def _rounded_base(setting: Setting) -> Iterator[str]:
    """For a run with adapters: a base in 8 bits if it fits, else in 4."""
    run = setting.run
    if run.lora.rank is None or run.model.base_dtype or run.lora.dora or run.memory.compile_blocks:
        return
    found = None
    for base_dtype in ("nf4", "int8"):  # what does not fit in 4 bits is not tried in 8
        rounded = dataclasses.replace(run, model=dataclasses.replace(run.model, base_dtype=base_dtype))
        best = _choose_or_none(dataclasses.replace(setting, run=rounded))
        if best is None:
            break
        found = f"--model.base_dtype {base_dtype} (by {best[0].way.name})"
    if found:
        yield found


def _smaller_model(setting: Setting) -> Iterator[str]:
    """The largest smaller model of the family that fits."""
    own = SIZES[setting.run.model.name]
    names = [name for name, size in SIZES.items() if size.family == own.family and size.width < own.width]
    for name in sorted(names, key=lambda name: -SIZES[name].width):
        model = dataclasses.replace(setting.run.model, name=name)
        smaller = dataclasses.replace(setting, run=dataclasses.replace(setting.run, model=model))
        if best := _choose_or_none(smaller):
            yield f"--model.name {name} (by {best[0].way.name})"
            return


def _more_host_memory(setting: Setting) -> Iterator[str]:
    room = dataclasses.replace(setting.room, host=None)
    plans = [plans for plans in columns(dataclasses.replace(setting, room=room).table()) if all(p.fits for p in plans)]
    if plans:
        least = min(plans, key=lambda plans: max(plan.host_peak for plan in plans))
        needed = max(plan.host_peak for plan in least)
        yield f"{needed / GIB:.1f} GiB of free host memory (by {least[0].way.name})"


def _more_gpu_memory(setting: Setting) -> Iterator[str]:
    every = columns(setting.table())
    fits_host = [plans for plans in every if all(plan.fits_host for plan in plans)]
    if fits_host and setting.room.device is not None:
        needed, name = min(
            (max(plan.gpu_peak + plan.allowance for plan in plans), plans[0].way.name) for plans in fits_host
        )
        yield f"{needed / GIB:.1f} GiB of usable GPU memory (by {name})"


def _more_gpus(setting: Setting) -> Iterator[str]:
    for gpus in (2, 4, 8):
        if gpus > setting.gpus and (best := _choose_or_none(dataclasses.replace(setting, gpus=gpus))):
            yield f"{gpus} such GPUs in the machine (by {best[0].way.name})"
            return


def _choose_or_none(setting: Setting) -> list[Plan] | None:
    """`choose`; also None where an option does not suit the other model or number of GPUs."""
    try:
        return choose(setting.table())
    except UserError:
        return None
