"""Choose micro-batch, checkpointed blocks, head chunks and the teacher's place for one way to launch a stage."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product

from sapiens_accel.config.schema import StageConfig, TeacherPlacement
from sapiens_accel.data.sampling import Share
from sapiens_accel.errors import UserError, count
from sapiens_accel.memory.duration import step_seconds
from sapiens_accel.memory.estimate import UNLIMITED, Plan, Room, predict
from sapiens_accel.memory.stages import Stage
from sapiens_accel.memory.strategies import Way
from sapiens_accel.models.sapiens import Layout

MAX_CHUNK, MIN_CHUNK = 16, 4  # people of a head chunk: larger chunks gain nothing, smaller ones leave the GPU idle


def fit(stage: Stage, name: str, way: Way, room: Room = UNLIMITED, rank: int = 0) -> Plan:
    """Plan the largest micro-batch that fits, with the fewest checkpointed blocks; if none fits, the smallest memory.

    A larger micro-batch with the teacher off the device is preferred to a smaller one with the teacher on it.

    Raises:
        UserError: the global batch is no multiple of processes x micro-batch, or no micro-batch has a whole number of
            unlabeled people; more checkpointed blocks than the network has; a sharded teacher with one process.
    """
    asked, ranks = stage.memory, way.strategy.num_ranks
    placements = _placements(stage, ranks)
    part = people_of_a_rank(name, stage.plan, ranks, asked.micro_batch)
    largest = min(part, asked.max_micro_batch or part)
    sizes = [asked.micro_batch] if asked.micro_batch else divide(stage.plan, part, largest)
    if not sizes:
        raise UserError(
            f"--memory.max_micro_batch {largest}: no whole number of unlabeled people comes with so few labeled ones "
            f"(expected at least {min(divide(stage.plan, part, part))}, for --{name}.teacher.ratio {stage.ratio:g})"
        )
    blocks = _blocks(stage, way, limited=room.device is not None)
    if room.device is None:  # memory is not a limit: no recomputation
        share = Share(rank=rank, num_ranks=ranks, micro_batch=sizes[0], accumulation=part // sizes[0])
        layout = replace(blocks[0], head_chunk=asked.head_chunk)
        way = replace(way, teacher=placements[0])
        seconds = step_seconds(stage, way, share, layout, room.rates)
        return Plan(way=way, share=share, layout=layout, seconds=seconds, steps=stage.steps)
    tried = []
    for size, placement in product(sizes, placements):
        way = replace(way, teacher=placement)
        share = Share(rank=rank, num_ranks=ranks, micro_batch=size, accumulation=part // size)
        for layout in blocks:
            last = layout == blocks[-1]
            for chunk in _chunks(stage, way, share, layout, cuda=room.cuda, smallest=last):
                plan = predict(stage, way, share, replace(layout, head_chunk=chunk), room)
                is_tight = not last and plan.gpu_peak + plan.allowance > asked.kept_share * room.device
                if plan.fits and not is_tight:
                    return plan
                tried.append(plan)
    return min(tried, key=lambda plan: plan.gpu_peak + plan.allowance)


def _blocks(stage: Stage, way: Way, *, limited: bool) -> list[Layout]:
    """What the blocks may store, fastest first: the first that fits is taken.

    A selectively checkpointed block saves most of the time of a whole one for half of its memory (of Sapiens2 a third),
    so that no block is checkpointed in full before all are selectively.

    Raises:
        UserError: more blocks are asked for than the network has.
    """
    asked, depth = stage.memory, stage.depth
    first, then = asked.checkpointed_blocks, asked.selective_blocks
    if (first or 0) + (then or 0) > depth:
        of_first = f"--memory.checkpointed_blocks {first}" if first else ""
        both = " + ".join(filter(None, [of_first, f"--memory.selective_blocks {then}" if then else ""]))
        raise UserError(f"{both}: expected at most {depth}")
    # Without a checkpoint a block would keep its gathered weights under ZeRO-3, and offload more than its input.
    all_or_none = (way.offload_activations or way.strategy.zero == 3) and limited
    how = {"compiled": asked.compile_blocks, "fused": asked.fused_kernels}
    if first is None and all_or_none:
        return [Layout(checkpointed_blocks=depth, **how)]
    if first is not None or then is not None or asked.compile_blocks or all_or_none:
        every = range(depth - (then or 0) + 1) if first is None else [first]
        pairs = [(num, then or 0) for num in every]
    else:
        pairs = [(0, num) for num in range(depth)] + [(num, depth - num) for num in range(depth + 1)]
    return [Layout(checkpointed_blocks=a, selective_blocks=b, **how) for a, b in pairs]


def _placements(stage: Stage, ranks: int) -> list[TeacherPlacement]:
    """The possible placements of the teacher's average, fastest first."""
    asked = stage.memory.teacher
    if asked == "sharded" and ranks == 1 and stage.plan.teacher:
        raise UserError("--memory.teacher sharded: there is only one process (expected device or host)")
    if stage.plan.teacher is None:
        return ["device"]
    return [asked] if asked else ["device", "sharded", "host"] if ranks > 1 else ["device", "host"]


def _chunks(stage: Stage, way: Way, share: Share, blocks: Layout, *, cuda: bool, smallest: bool) -> Sequence[int]:
    """Head chunks to try: the largest that does not raise the peak, but at least MIN_CHUNK.

    Args:
        smallest: also try a single person, since nothing else can save memory.
    """
    if stage.memory.head_chunk:
        return [stage.memory.head_chunk]
    p = stage.people(share)
    largest = 1
    for n in range(1, min(p, MAX_CHUNK) + 1):
        plan = predict(stage, way, share, replace(blocks, head_chunk=n), Room(cuda=cuda))
        if "head_chunk" in plan.gpu:
            break
        largest = n
    chunk = max(largest, min(p, MIN_CHUNK))
    return [chunk, 1] if smallest and chunk > 1 else [chunk]


def people_of_a_rank(name: str, plan: StageConfig, ranks: int, micro_batch: int | None) -> int:
    """Labeled people of a process in an optimizer step.

    Raises:
        UserError: the global batch is not a multiple of processes x micro-batch; no whole number of unlabeled people
            comes with that many labeled ones.
    """
    if plan.global_batch % (ranks * (micro_batch or 1)):
        raise UserError(
            f"--{name}.global_batch {plan.global_batch} is not divisible by {ranks} processes"
            + (f" x micro-batch {micro_batch} (--memory.micro_batch)" if micro_batch else "")
        )
    if not plan.pairs_with(num := micro_batch or plan.global_batch // ranks):
        spread = f"--{name}.global_batch on {count(ranks, 'process')}"
        where = "micro-batches (--memory.micro_batch)" if micro_batch else spread
        fits = [n for n in range(1, plan.global_batch + 1) if plan.pairs_with(n)]
        change = f"Make that number a multiple of {fits[0]}" if fits else "Use 0.5, 0.25 or a whole number"
        raise UserError(
            f"--{name}.teacher.ratio {plan.ratio:g}: no whole number of unlabeled people comes with {num} labeled ones "
            f"in {where}. {change}"
        )
    return plan.global_batch // ranks


def divide(plan: StageConfig, part: int, largest: int) -> list[int]:
    """Micro-batches that a process's part of a step can be made of, in labeled people, from `largest` down."""
    return [n for n in range(largest, 0, -1) if part % n == 0 and plan.pairs_with(n)]
