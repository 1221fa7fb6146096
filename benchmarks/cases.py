"""Which cases are measured, and what is predicted of them before."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sapiens_accel.config.schema import StageName
from sapiens_accel.data.sampling import Share
from sapiens_accel.memory.estimate import IN_FLIGHT, Plan, Room, predict
from sapiens_accel.memory.fitting import fit
from sapiens_accel.memory.stages import Stage, measure_stage
from sapiens_accel.models import kernels
from sapiens_accel.models.sapiens import Layout
from sapiens_accel.runtime import host
from sapiens_accel.runtime.files import GIB
from sapiens_accel.selftest.peak_memory import case_of_plan, half_precision, way_of
from sapiens_accel.selftest.training_step import TrainingCase, run_of

REAL_HW, REAL_BATCH = (512, 384), 32

# What this project set itself: GiB of a GPU at 512x384, as one micro-batch of 32.
BARS: dict[tuple[str, StageName, str], float] = {
    ("sapiens_0.3b", "phase2", "zero2"): 8.0,
    ("sapiens_1b", "phase2", "zero2_offload"): 9.5,
    ("sapiens_2b", "phase2", "zero2_offload"): 13.5,
}
# Predicted where there is no GPU to measure them.
REAL: tuple[tuple[str, StageName, str], ...] = (
    *BARS,
    ("sapiens_1b", "ssl", "zero2_offload"),
    ("sapiens2_5b", "phase2", "zero3_offload"),
    ("sapiens2_5b", "phase2", "zero3_offload+activations"),
)


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A case and its plan; `on_gpu` says for which device it was made."""

    case: TrainingCase
    stage: Stage
    plan: Plan
    on_gpu: bool

    @property
    def bar(self) -> float | None:
        """Bytes of the project's own goal, where it has one for this case."""
        real = (self.case.input_hw, self.case.micro_batch, self.case.accumulation) == (REAL_HW, REAL_BATCH, 1)
        gib = BARS.get((self.case.model, self.case.stage, self.case.way)) if real else None
        return None if gib is None else gib * GIB

    @property
    def floor(self) -> float | None:
        """Bytes without which no checkpointed training of this micro-batch and chunk does, state left aside.

        Weights, the blocks' inputs, one block computed again, one chunk of the head. None where no block learns.
        """
        layout = Layout(checkpointed_blocks=self.stage.depth, head_chunk=self.plan.layout.head_chunk)
        plan = predict(self.stage, self.plan.way, self.plan.share, layout, Room(cuda=self.on_gpu))
        strategy, people = plan.way.strategy, self.stage.people(self.plan.share)
        parts = {**plan.later, **plan.gpu}
        if "block_working_set" not in parts:
            return None
        kept = self.stage.footprint_of(strategy.zero == 0 and strategy.half).kept(people)
        inputs = kept * (min(IN_FLIGHT, self.stage.depth) if plan.way.offload_activations else self.stage.depth)
        return parts.get("weights", 0.0) + inputs + parts["block_working_set"] + parts["head_chunk"]


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What the command line asks for: every combination of it; `batch` labeled people of `input_hw` px in a step."""

    models: Sequence[str]
    stages: Sequence[StageName]
    ways: Sequence[str]
    input_hw: tuple[int, int]
    batch: int

    def stage_by_stage(self, half: bool = True, *, padded: bool = False) -> Iterator[tuple[str, StageName, Stage]]:
        for model in self.models:
            for name in self.stages:
                run = run_of(model, name, self.input_hw, self.batch)
                yield model, name, measure_stage(run, name, half, padded=padded)


def on_gpu(wanted: Wanted, limit: int, capability: tuple[int, int]) -> Iterator[Planned]:
    """Planned for `limit` bytes of a device of this compute capability, as train.py would."""
    precision = half_precision(capability)
    for model, name, stage in wanted.stage_by_stage(padded=kernels.needs_padding(capability)):
        for way in wanted.ways:
            plan = fit(stage, name, way_of(way, precision), Room(device=limit, host=host.free_bytes()))
            yield Planned(case=case_of_plan(model, name, wanted.input_hw, plan), stage=stage, plan=plan, on_gpu=True)


def on_cpu(wanted: Wanted, precision: str) -> Iterator[Planned]:
    """In layouts that differ in what they keep, in fp32 ("no") or with 16-bit arithmetic."""
    for model, name, stage in wanted.stage_by_stage(precision != "no"):
        for way in wanted.ways:
            for layout, times in _layouts(stage, name):
                share = Share(rank=0, num_ranks=1, micro_batch=wanted.batch // times, accumulation=times)
                plan = predict(stage, way_of(way, precision), share, layout, Room(cuda=False))
                case = case_of_plan(model, name, wanted.input_hw, plan)
                yield Planned(case=case, stage=stage, plan=plan, on_gpu=False)


def on_a_missing_gpu(limit: int) -> Iterator[Planned]:
    """The cases of `REAL` for a GPU with `limit` bytes for torch, whatever the host has."""
    for model, name, way in REAL:
        stage = measure_stage(run_of(model, name, REAL_HW, REAL_BATCH), name)
        plan = fit(stage, name, way_of(way), Room(device=limit))
        yield Planned(case=case_of_plan(model, name, REAL_HW, plan), stage=stage, plan=plan, on_gpu=True)


def _layouts(stage: Stage, name: StageName) -> list[tuple[Layout, int]]:
    """Layouts with how often they accumulate: all blocks checkpointed, half, none; small chunks of the head, or one."""
    everything = Layout(checkpointed_blocks=stage.depth, head_chunk=2)
    some: list[tuple[Layout, int]] = [(everything, 1), (everything, 2)]
    if name == "phase2":
        some.append((Layout(checkpointed_blocks=stage.depth // 2, head_chunk=None), 1))
        some.append((Layout(checkpointed_blocks=0, head_chunk=2), 1))
    return some
