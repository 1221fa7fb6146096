"""How long a stage takes: operations of its steps over the rates of a machine, and the copies that they wait for."""

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from sapiens_accel.data.sampling import Share
from sapiens_accel.memory.gpus import Rates
from sapiens_accel.memory.stages import Stage
from sapiens_accel.memory.strategies import Way
from sapiens_accel.models.sapiens import SIZES, Layout, SapiensPose

SELFTEST = Path("selftest", "selftest.json")  # where `python -m sapiens_accel.selftest` writes what it measured

# Of memory that AdamW on the host moves for a parameter: 28 for the step, 8 to unscale and clip, 6 to cast.
HOST_BYTES = 42
# Of a block's forward: norms, activations and residuals, which a selectively checkpointed block recomputes. By the
# bytes that they read and write: 0.09 (T4) to 0.13 (A100) of a block of the 1B, 0.2 to 0.3 with Sapiens2's norms. On a
# CPU in fp32 0.12 (0.3B, 256x192).
SELECTIVE = 0.15
WAIT = 3e-5  # seconds, of a wait of the host for the device


@dataclass(frozen=True, kw_only=True)
class PartFlops:
    """Operations in a forward for one person: products, convolutions, attention."""

    stem: int
    block: int
    head: int
    depth: int

    @property
    def backbone(self) -> int:
        return self.stem + self.depth * self.block

    @property
    def whole(self) -> int:
        return self.backbone + self.head


@lru_cache
def part_flops(name: str, num_keypoints: int, input_hw: tuple[int, int]) -> PartFlops:
    """Count on meta tensors, where attention is two products that torch counts (not within the CPU's kernel)."""
    one, two = (_forward_flops(name, num_keypoints, input_hw, depth) for depth in (1, 2))
    block = two[0] - one[0]
    return PartFlops(stem=one[0] - block, block=block, head=one[1], depth=SIZES[name].depth)


def _forward_flops(name: str, num_keypoints: int, input_hw: tuple[int, int], depth: int) -> tuple[int, int]:
    """Operations of a backbone of so many blocks, and of the head."""
    with torch.device("meta"):
        model = SapiensPose(name, num_keypoints, input_hw, depth=depth)
        image = torch.zeros(1, 3, *input_hw, dtype=torch.uint8)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(image)
    counts = counter.get_flop_counts()
    head = sum(next((counts[key] for key in counts if key.endswith(".head")), {}).values())
    return counter.get_total_flops() - head, head


def flops_of_step(stage: Stage, people: int, recomputed_blocks: float) -> float:
    """Operations for a number of labeled people, and the unlabeled ones that come with them in the mean of all steps.

    A backward computes the gradients of inputs and of weights, each of which takes as much as the forward; a frozen
    matrix (under adapters) has the first alone, and a frozen backbone has no backward.
    """
    parts = part_flops(stage.network.name, stage.network.num_keypoints, stage.network.input_hw)
    learns = stage.num_learning > stage.head_learning
    passes = (2 if stage.adapted else 3) if learns else 1
    recomputed = recomputed_blocks * parts.block if learns else 0
    student = passes * parts.backbone + recomputed + 3 * parts.head
    ratio = stage.plan.mean_ratio
    teacher = ratio * parts.whole
    if stage.fixed:  # of labeled people too
        name, num_keypoints, input_hw = stage.fixed.name, stage.network.num_keypoints, stage.network.input_hw
        teacher = (1 + ratio) * part_flops(name, num_keypoints, input_hw).whole
    return people * ((1 + ratio) * student + teacher)


def step_seconds(stage: Stage, way: Way, share: Share, layout: Layout, rates: Rates) -> float:
    """Seconds of an optimizer step; its operations are the mean of the stage's steps."""
    strategy, ranks = way.strategy, way.strategy.num_ranks
    people = stage.people(share)
    recomputed = layout.checkpointed_blocks + SELECTIVE * layout.selective_blocks
    flops = flops_of_step(stage, share.micro_batch, recomputed)
    # Casts between fp32 and 16 bits (ZeRO 0), hooks at every layer (ZeRO-3).
    overhead = {0: 1.1, 3: 1.05}.get(strategy.zero, 1.0)
    small_batch = 1 + 1 / people  # kernel launches and small matrices
    compute = share.accumulation * flops * overhead * small_batch / rates.flops
    copies = _offload_seconds(stage, way, share.accumulation, rates)
    if strategy.zero == 3:
        copies += share.accumulation * 3 * 2 * stage.num_parameters / rates.bus * 0.5
    if way.offload_activations:
        kept = stage.footprint_of(strategy.zero == 0 and strategy.half, way.bf16_weights).kept(people)
        copies += share.accumulation * 2 * layout.checkpointed_blocks * kept / rates.bus * 0.3
    if ranks > 1:
        copies += (4 if strategy.zero else 8) * stage.num_learning / rates.bus * 0.5
    if stage.plan.teacher and way.teacher == "host":
        copies += (2 * 2 / rates.bus + 12 / rates.host) * stage.averaged / ranks
    if stage.plan.teacher and way.teacher != "device" and ranks > 1:
        copies += 2 * stage.averaged / rates.bus * 0.5
    return compute + copies + (0.002 if way.adam_8bit else 0.0)


def _offload_seconds(stage: Stage, way: Way, accumulation: int, rates: Rates) -> float:
    """Seconds that an offloaded optimizer adds to a step.

    DeepSpeed copies each gradient down as fp32 and waits for it; the optimizer runs on the host; 16-bit weights go up.
    Sums of several micro-batches in bf16 stay on the device until the last.
    """
    strategy, part = way.strategy, stage.num_learning / way.strategy.num_ranks
    if not strategy.offload:
        return 0.0
    down = 1 if strategy.bf16 and strategy.zero < 3 else accumulation
    waits = down * stage.tensors_learning * WAIT
    return waits + down * 4 * part / rates.bus + HOST_BYTES * part / rates.host + 2 * part / rates.bus


def measured_flops(device: str | None, folder: Path = Path()) -> float | None:
    """16-bit operations a second that the selftest has measured in training steps; None without its result.

    Args:
        device: a part of the name of the card; None is whatever was measured there.
        folder: the selftest ran in.
    """
    try:
        tree = json.loads((folder / SELFTEST).read_text())
        gpu = tree["machine"]["gpu"]
        if gpu is None or (device is not None and device not in gpu):
            return None
        rows = [row for check in tree["checks"] for row in check["rows"]]
        rates = [_flops_of_row(row) for row in rows if row.get("phase2_rate") and row.get("comparison")]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # there is none, or of another version
    return max(rates, default=None)


def _flops_of_row(row: dict[str, Any]) -> float:
    parts = part_flops(row["model"], 17, tuple(row["input_hw"]))
    layout = row["comparison"]
    recomputed = layout["checkpointed_blocks"] + SELECTIVE * layout.get("selective_blocks", 0)
    return row["phase2_rate"] * (3 * parts.whole + recomputed * parts.block)
