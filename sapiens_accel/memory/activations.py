"""Activation memory of the phases of a training step, measured by running the step on fake tensors.

A fake tensor has a shape and no data: a block of the 5B runs in milliseconds and allocates nothing. Live storages are
tracked operation by operation, as in torch.distributed._tools.mem_tracker (which fails on frozen parameters).

Shape letters: p people of a micro-batch (labeled and unlabeled), n people of one chunk of the head.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import lru_cache, partial
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.models.sapiens2.modeling_sapiens2 import get_patches_center_coordinates

from sapiens_accel.config.schema import BaseDtype, LoraConfig, StageConfig
from sapiens_accel.data.dataset import Batch, Labeled, View
from sapiens_accel.models import adapters, quantized
from sapiens_accel.models.kernels import PADDED
from sapiens_accel.models.sapiens import SIZES, Layout, SapiensPose
from sapiens_accel.pose.heatmap import Codec
from sapiens_accel.pose.skeleton import Skeleton
from sapiens_accel.training import optim
from sapiens_accel.training.ema import MovingAverage
from sapiens_accel.training.mean_teacher import PseudoLabels, TeacherPrediction, TeacherSetup, build_objective
from sapiens_accel.training.objectives import Objective

ALLOCATION_UNIT = 512  # bytes: the allocator rounds sizes up to a multiple of it


class Linear(tuple[float, float, float]):
    """Bytes as a linear function: a constant, a rate for each of p people, and one for each of n people in a chunk."""

    def __call__(self, p: int, n: int = 0) -> float:
        return self[0] + self[1] * p + self[2] * n


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Memory of the phases of a micro-batch's forward and backward, without parameters and their gradients.

    Attributes:
        entry: peak of the embeddings, from the images on.
        stem: stored by the embeddings, including the first block's input.
        kept: stored by a checkpointed block: the next block's input.
        selected: stored by a selectively checkpointed block, likewise.
        saved: stored by a block without checkpoint, likewise.
        neck: stored between the last block and the head.
        head: peak of the head and the loss, above what is stored before them.
        gradient: left by the head: the gradients of the features and of the head's parameters.
        whole: peak of the backward of a block without checkpoint, above what is stored when it begins.
        partly: peak of recomputation and backward of a selectively checkpointed block, likewise.
        again: peak of recomputation and backward of a checkpointed block, above what is stored before that block.
        forward: peak of a forward without gradients, including the heatmaps.
    """

    entry: Linear
    stem: Linear
    kept: Linear
    selected: Linear
    saved: Linear
    neck: Linear
    head: Linear
    gradient: Linear
    whole: Linear
    partly: Linear
    again: Linear
    forward: Linear


@dataclass(frozen=True, kw_only=True)
class NetworkShape:
    """The network whose step is measured.

    Attributes:
        name: a key of `SIZES`.
        input_hw: px.
        sigma: of the target heatmaps, heatmap px.
        padded: attention is padded, as on GPUs without a flash kernel.
        lora: its adapters.
        base_dtype: of the frozen matrices under them, if they are rounded.
    """

    name: str
    num_keypoints: int
    input_hw: tuple[int, int]
    sigma: float
    padded: bool = False
    lora: LoraConfig = field(default_factory=LoraConfig)
    base_dtype: BaseDtype | None = None


@lru_cache(maxsize=32)
def footprint(
    network: NetworkShape, plan: StageConfig, half: bool, cast: bool, bf16_matrices: bool = False
) -> Footprint:
    """Measure the step of a stage.

    Args:
        half: computation is in 16 bits ...
        cast: ... by autocast over fp32 weights; else the weights have 16 bits.
        bf16_matrices: the matrices that learn have them under autocast too.
    """
    # transformers caches patch coordinates in their first computation: the cache must not hold fake tensors.
    size = SIZES[network.name]
    grid = [pixels // size.patch for pixels in network.input_hw]
    get_patches_center_coordinates(*grid, dtype=torch.float32, device=torch.device("cpu"))
    precision = _Precision(half=half, cast=cast, bf16_matrices=bf16_matrices)
    few = next(b for b in count(2) if plan.pairs_with(b))
    p = few + plan.num_unlabeled(few)
    small, large, chunked = (_probe(network, plan, precision, b, n) for b, n in ((few, 1), (2 * few, 1), (2 * few, 2)))
    parts = {
        field.name: _line(small[field.name], large[field.name], chunked[field.name], p) for field in fields(Footprint)
    }
    return Footprint(**parts)


def _line(small: float, large: float, chunked: float, p: int) -> Linear:
    """The linear function through measurements at (p, 1), (2 p, 1) and (2 p, 2)."""
    per_person, per_chunk = (large - small) / p, chunked - large
    return Linear((small - per_person * p - per_chunk, per_person, per_chunk))


@dataclass(frozen=True, kw_only=True)
class _Precision:
    half: bool
    cast: bool
    bf16_matrices: bool


def _probe(network: NetworkShape, plan: StageConfig, precision: _Precision, b: int, n: int) -> dict[str, float]:
    """Measure a step of b labeled people and their unlabeled ones in chunks of n.

    With three blocks: checkpointed, selectively so, and not.
    """
    with torch.device("meta"):
        model = SapiensPose(network.name, network.num_keypoints, network.input_hw, depth=3).train()
    model.backbone.config._attn_implementation = PADDED if network.padded else "sdpa"
    if "block_*" in plan.frozen:  # other frozen groups save little and are counted as trained
        model.freeze(("embeddings", "block_*", "norm"))
    with torch.device("meta"):
        if network.base_dtype and adapters.find_targets(model, network.lora):
            quantized.replace_all(model, network.base_dtype)
        adapters.add(model, network.lora)
    base = {id(p) for p in adapters.frozen_matrices(model)} if network.lora.rank else set()
    if precision.bf16_matrices:
        base |= {id(p) for p in optim.list_matrices(model.layer_groups())}
    model.lay_out(Layout(checkpointed_blocks=1, selective_blocks=1, head_chunk=n))
    objective = _objective(model, plan, network.sigma)
    with FakeTensorMode(allow_non_fake_inputs=True):
        _fill(model, torch.bfloat16 if precision.half and not precision.cast else torch.float32, base, precision.half)
        live = LiveBytes(model.parameters(), model.buffers())
        casts = precision.half and precision.cast
        autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=casts, cache_enabled=False)
        step = _step(model, objective, plan, b)
        with live:
            sizes = _phases(model, live, step, autocast)
        with live, autocast, torch.no_grad():
            image = torch.zeros(b + plan.num_unlabeled(b), 3, *network.input_hw, dtype=torch.uint8)
            before = live.mark()
            model(image)
            sizes["forward"] = live.peak - before
    return sizes


def _fill(model: nn.Module, dtype: torch.dtype, base: set[int], half: bool) -> None:
    """Replace meta tensors by fake tensors; parameters get this dtype, those of the base 16 bits if `half`.

    Rounded matrices keep theirs.
    """
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            own = torch.bfloat16 if half and id(p) in base else dtype if p.is_floating_point() else p.dtype
            fake = nn.Parameter(torch.empty(p.shape, dtype=own), requires_grad=p.requires_grad)
            if p.requires_grad:
                fake.register_post_accumulate_grad_hook(_forget_gradient)
            setattr(module, name, fake)
        for name, b in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(b.shape, dtype=b.dtype))


def _forget_gradient(parameter: Tensor) -> None:
    parameter.grad = None  # parameter gradients are counted in `estimate`


def _objective(model: SapiensPose, plan: StageConfig, sigma: float) -> Objective:
    """The objective of a stage, with a placeholder for the teacher, whose forward is counted separately."""
    codec = Codec(input_hw=model.input_hw, heatmap_hw=model.heatmap_hw, sigma=sigma)
    keypoints = tuple(range(model.num_keypoints))
    names, sigmas = tuple(map(str, keypoints)), (0.05,) * len(keypoints)  # of any value: losses do not read sigmas
    skeleton = Skeleton(names=names, mirror=keypoints, sigmas=sigmas, upper=(), edges=())
    setup = TeacherSetup(
        average=MovingAverage(nn.Linear(1, 1)), student_parameters=list, num_steps=1, gather=lambda tensor: tensor,
        unlabeled_each=1.0,
    )  # fmt: skip
    return build_objective(plan, codec, skeleton, setup)


def _step(model: SapiensPose, objective: Objective, plan: StageConfig, b: int) -> Callable[[], Tensor]:
    """A function that computes the loss of a micro-batch of b labeled people and their unlabeled ones."""
    (height, width), k, u = model.input_hw, model.num_keypoints, plan.num_unlabeled(b)
    view = View(torch.zeros(b, 3, height, width, dtype=torch.uint8), torch.zeros(b, 2, 3), torch.zeros(b))
    batch = Batch(Labeled(view, torch.zeros(b, k, 2), torch.ones(b, k), torch.zeros(b)), None)
    if not u:
        return lambda: objective.loss(model, batch, None)[0]
    image = torch.zeros(u, 3, height, width, dtype=torch.uint8)
    points_xy, ones = torch.zeros(u, k, 2), torch.ones(u, k)
    maps = torch.zeros(u, k, *model.heatmap_hw) if plan.teacher and plan.teacher.compares_maps else None
    labels = PseudoLabels(
        TeacherPrediction(points_xy, ones, ones, ones > 0, points_xy, maps), ones, image, torch.ones(()), {}
    )
    return lambda: objective.loss(model, batch, labels)[0]


def _phases(model: SapiensPose, live: "LiveBytes", step: Callable[[], Tensor], autocast: Any) -> dict[str, float]:
    """Run a step, and record live and peak bytes between its phases."""
    at: dict[str, int] = {}
    peak: dict[str, int] = {}

    def note(name: str, *_: Any) -> None:
        at[name], peak[name] = live.now, live.peak
        live.mark()

    def note_output(name: str, _module: Any, _inputs: Any, output: Any) -> None:
        note(name)
        if isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(partial(note, f"gradient of {name}"))

    first, second, third = model.blocks
    hooks = [
        model.backbone.embeddings.register_forward_hook(_require_gradient),
        first.register_forward_pre_hook(partial(note, "stem")),
        first.register_forward_hook(partial(note_output, "first")),
        second.register_forward_hook(partial(note_output, "second")),
        third.register_forward_hook(partial(note_output, "third")),
        model.head.register_forward_pre_hook(partial(note, "neck")),
        model.head.register_forward_hook(partial(note, "head")),
    ]
    start = live.mark()
    with autocast:
        loss = step()
    live.mark()
    loss.backward()
    note("end")
    for hook in hooks:
        hook.remove()
    if "gradient of first" not in at:  # frozen: each block's input is freed after its use
        head = {"head": peak["head"] - at["neck"], "gradient": at["head"] - at["neck"]}
        backbone = {"entry": peak["stem"] - start, "stem": at["stem"] - start, "neck": at["neck"] - at["stem"]}
        return {**dict.fromkeys(("kept", "selected", "saved", "whole", "partly", "again"), 0), **head, **backbone}
    return {
        "entry": peak["stem"] - start,
        "stem": at["stem"] - start,
        "kept": at["first"] - at["stem"],
        "selected": at["second"] - at["first"],
        "saved": at["third"] - at["second"],
        "neck": at["neck"] - at["third"],
        "head": peak["head"] - at["neck"],
        "gradient": at["head"] - at["neck"],
        "whole": max(peak["gradient of third"], peak["gradient of second"]) - at["head"],
        "partly": peak["gradient of first"] - at["second"],
        "again": peak["end"] - at["stem"],
    }


def _require_gradient(_module: nn.Module, _inputs: Any, output: Any) -> None:
    """Let the measured block compute the gradient of its input, as all blocks but a network's first do.

    Under adapters the embeddings are frozen; in a frozen backbone there are no gradients at all.
    """
    if torch.is_grad_enabled() and isinstance(output, Tensor) and output.is_leaf:
        output.requires_grad_()


class LiveBytes(TorchDispatchMode):
    """Tracks the storages that operations allocate.

    Attributes:
        now: live bytes.
        peak: maximum of `now` since the last `mark`.
    """

    def __init__(self, *known: Any) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.counted: set[int] = set()
        for tensor in tree_leaves([list(tensors) for tensors in known]):
            self._is_new(tensor)

    def mark(self) -> int:
        self.peak = self.now
        return self.now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and self._is_new(leaf):
                storage = leaf.untyped_storage()
                num = -(-storage.nbytes() // ALLOCATION_UNIT) * ALLOCATION_UNIT
                self.now += num
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._freed, num)
        return result

    def _is_new(self, tensor: Tensor) -> bool:
        """Whether the tensor's storage has not been counted yet; that of a view has."""
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self.counted:
            return False
        self.counted.add(key)
        weakref.finalize(storage, self.counted.discard, key)
        return True

    def _freed(self, num: int) -> None:
        self.now -= num
