"""A training step on the meta device, where tensors have a shape and no data: what waits for a number raises."""

from collections.abc import Iterator
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sapiens_accel.config.schema import StageConfig
from sapiens_accel.data.dataset import Batch, Labeled, Pair, View
from sapiens_accel.models.sapiens import Layout, SapiensPose
from sapiens_accel.pose.heatmap import Codec
from sapiens_accel.pose.skeleton import COCO17
from sapiens_accel.training import optim
from sapiens_accel.training.ema import MovingAverage
from sapiens_accel.training.loop import Step, StepConfig, steps
from sapiens_accel.training.mean_teacher import TeacherSetup, build_objective
from sapiens_accel.training.objectives import Objective

META = torch.device("meta")
INPUT_HW = (512, 384)
MICRO_BATCH = 4


class OneDevice(TorchDispatchMode):
    """Refuses every operation that reads or makes a tensor elsewhere than on the meta device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        elsewhere = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor) and t.device != META]
        assert not elsewhere, f"{func} on {[(t.device.type, tuple(t.shape)) for t in elsewhere]}"
        return result


class Engine:
    """What `steps` asks of an Accelerator, without one; `waits` counts the numbers that the host has waited for."""

    device, scaler, num_processes = META, None, 1

    def __init__(self, accumulation: int) -> None:
        self.accumulation, self.micro_steps, self.waits = accumulation, 0, 0

    @property
    def sync_gradients(self) -> bool:
        return self.micro_steps % self.accumulation == 0

    def accumulate(self, model: SapiensPose) -> nullcontext:
        self.micro_steps += 1
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        (loss / self.accumulation).backward()

    def clip_grad_norm_(self, parameters: Iterator[Tensor], most: float) -> float:
        norm = torch.nn.utils.clip_grad_norm_(parameters, most)
        assert norm.device == META and norm.ndim == 0
        self.waits += 1  # the one number of a step that the host looks at: whether the norm is one
        return 1.0


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """A stage that is about to be trained on the meta device."""

    model: SapiensPose
    engine: Engine
    objective: Objective
    stepping: Iterator[Step]


def rehearse(
    name: str, stage: StageConfig, layout: Layout, *, accumulation: int = 2, dtype: torch.dtype = torch.bfloat16,
    depth: int | None = None,
) -> Rehearsal:  # fmt: skip
    """Build a stage as train.py does, with weights in `dtype` as an engine casts them and a teacher in fp32."""
    with META:
        model = SapiensPose(name, len(COCO17.names), INPUT_HW, depth=depth)
    model.freeze(stage.frozen)
    model.lay_out(layout)
    teacher = MovingAverage(deepcopy(model)) if stage.teacher else None
    model.to(dtype)
    codec = Codec(input_hw=INPUT_HW, heatmap_hw=model.heatmap_hw, sigma=3.0)
    # AdamW as on CUDA: fused. Its own list of devices does not have the meta device.
    optimizer: Any = optim.adamw(
        optim.param_groups(model.layer_groups(), stage.optim), stage.optim, torch.device("cuda")
    )
    optimizer.step_was_skipped = False
    setup = teacher and TeacherSetup(
        average=teacher,
        student_parameters=lambda: (p.data for p in model.parameters()),
        num_steps=100,
        gather=lambda tensor: tensor,
    )
    objective = build_objective(stage, codec, COCO17, setup)
    config = StepConfig(accumulation=accumulation, optim=stage.optim, num_steps=100)
    engine: Any = Engine(accumulation)
    batches = repeat(batch(MICRO_BATCH, stage.num_unlabeled(MICRO_BATCH)))
    stepping = steps(engine, model, optimizer, objective, batches, config)
    return Rehearsal(model=model, engine=engine, objective=objective, stepping=stepping)


def batch(num_labeled: int, num_unlabelled: int) -> Batch:
    """A micro-batch as it comes from the loader, on the meta device."""

    def view(num: int) -> View:
        image = torch.empty(num, 3, *INPUT_HW, dtype=torch.uint8, device=META)
        matrix, flipped = torch.empty(num, 2, 3, device=META), torch.empty(num, dtype=torch.bool, device=META)
        return View(image, matrix, flipped)

    k = len(COCO17.names)
    points_xy, weights = torch.empty(num_labeled, k, 2, device=META), torch.empty(num_labeled, k, device=META)
    labeled = Labeled(view(num_labeled), points_xy, weights, torch.empty(num_labeled, dtype=torch.int64, device=META))
    if not num_unlabelled:
        return Batch(labeled, None)
    cutout = torch.empty(num_unlabelled, 5, 4, device=META)
    return Batch(labeled, Pair(view(num_unlabelled), view(num_unlabelled), cutout))
