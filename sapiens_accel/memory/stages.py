"""The properties of a stage that determine its memory and its time: parameters, frozen or not, and its steps."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from sapiens_accel.config.schema import Config, LoraConfig, MemoryConfig, StageConfig, StageName
from sapiens_accel.data import sampling
from sapiens_accel.data.sampling import Share
from sapiens_accel.memory.activations import Footprint, Linear, NetworkShape, footprint
from sapiens_accel.models import adapters, quantized
from sapiens_accel.models.kernels import padded_dim
from sapiens_accel.models.load import description
from sapiens_accel.models.sapiens import SapiensPose, Size
from sapiens_accel.training import optim
from sapiens_accel.training.stage import find_fixed_teacher

COCO_PEOPLE = 149_813  # with labeled keypoints in train2017


@dataclass(frozen=True, kw_only=True)
class FixedNetwork:
    """The fixed teacher of a stage, whole on each device.

    Attributes:
        name: a key of `SIZES`.
        num_parameters: elements of its parameters.
        forward: peak of its forward; see `Footprint`.
    """

    name: str
    num_parameters: int
    forward: Linear


@dataclass(frozen=True, kw_only=True)
class Stage:
    """The properties of a stage that determine its memory and its time.

    Attributes:
        num_parameters, num_learning: elements of all parameters, and of those that are trained.
        head_learning, block_learning: the same of the head, and of one block.
        stem_learning: of the embeddings and the first block.
        head_matrices, block_matrices, stem_matrices: of `matrices`, those of the head, of one block, and of the
            embeddings and the first block.
        tensors_learning: how many tensors are trained.
        adapted: adapters learn in place of the blocks' own matrices, which have no gradients.
        base: elements of the frozen matrices under adapters, which are kept in 16 bits in 16-bit arithmetic.
        matrices: elements of the learning matrices, which `--memory.bf16_weights` keeps in bf16.
        rounded: elements of those of them that are kept in 4 or 8 bits.
        rounded_bytes: bytes of these.
        groups: elements of each parameter group.
        largest: elements of the largest parameter that is trained.
        queries: elements of the queries of a person over all heads, padded if attention pads them.
        steps: optimizer steps of the stage.
        fixed: the teacher of `--distill.teacher`.
        footprint_of: what a step takes; arguments: whether autocast casts fp32 weights, and whether matrices are in
            bf16 already.
    """

    plan: StageConfig
    memory: MemoryConfig
    network: NetworkShape
    num_parameters: int
    num_learning: int
    head_learning: int
    block_learning: int
    stem_learning: int
    head_matrices: int
    block_matrices: int
    stem_matrices: int
    tensors_learning: int
    adapted: bool
    base: int
    matrices: int
    rounded: int
    rounded_bytes: float
    groups: tuple[int, ...]
    largest: int
    depth: int
    image_bytes: int
    queries: int
    map_bytes: int
    num_workers: int
    steps: int
    footprint_of: Callable[..., Footprint]
    fixed: FixedNetwork | None = None

    @property
    def ratio(self) -> float:
        return self.plan.ratio

    def num_unlabeled(self, share: Share) -> int:
        """Of a micro-batch."""
        return self.plan.num_unlabeled(share.micro_batch)

    def people(self, share: Share) -> int:
        """Of a micro-batch, labeled and unlabeled."""
        return share.micro_batch + self.num_unlabeled(share)

    @property
    def averaged(self) -> int:
        """Elements that a teacher has of its own: under adapters it shares what is frozen."""
        return self.num_learning if self.adapted else self.num_parameters


def measure_stage(
    run: Config,
    name: StageName,
    half: bool = True,
    num_keypoints: int = 17,
    *,
    padded: bool = False,
    num_people: int = COCO_PEOPLE,
) -> Stage:
    """Count a stage's parameters and measure its step.

    Args:
        padded: attention is padded (`models.kernels.needs_padding`).
        num_people: labeled people of training; they decide how many steps the stage has.

    Raises:
        UserError: a frozen pattern that matches nothing; adapters, and peft is not installed.
    """
    plan = run.get_stage(name)
    with torch.device("meta"):
        model = SapiensPose(run.model.name, num_keypoints, run.data.input_hw)
        model.freeze(plan.frozen)
        matrices = [module for name, module in model.named_modules() if quantized.is_matrix(module, name)]
        adapted = adapters.add(model, run.lora) > 0
    base_dtype = run.model.base_dtype if adapted else None
    rounded = [tuple(module.weight.shape) for module in matrices if base_dtype]
    layers = model.layer_groups()
    last = f"block_{model.size.depth - 1}"
    network = NetworkShape(
        name=run.model.name,
        num_keypoints=num_keypoints,
        input_hw=run.data.input_hw,
        sigma=run.data.sigma,
        padded=padded,
        lora=run.lora,
        base_dtype=base_dtype,
    )
    return Stage(
        plan=plan,
        memory=run.memory,
        network=network,
        num_parameters=_count(model.parameters()),
        num_learning=_count_learning(model.parameters()),
        head_learning=_count_learning(model.head.parameters()),
        block_learning=_count_learning(model.blocks[-1].parameters()),
        stem_learning=_count_learning(p for part in ("embeddings", "block_0") for _, p in layers[part]),
        head_matrices=_count(optim.list_matrices({"head": layers["head"]})),
        block_matrices=_count(optim.list_matrices({last: layers[last]})),
        stem_matrices=_count(optim.list_matrices({"block_0": layers["block_0"]})),
        tensors_learning=sum(p.requires_grad for p in model.parameters()),
        adapted=adapted,
        base=_count(adapters.frozen_matrices(model)) if adapted else 0,
        matrices=_count(optim.list_matrices(layers)),
        rounded=sum(map(math.prod, rounded)),
        rounded_bytes=sum(quantized.num_bytes(shape, base_dtype) for shape in rounded) if base_dtype else 0.0,
        groups=tuple(_count(group["params"]) for group in optim.param_groups(layers, plan.optim)),
        largest=max(p.numel() for p in model.parameters() if p.requires_grad),
        depth=model.size.depth,
        image_bytes=3 * math.prod(run.data.input_hw),
        queries=_count_queries(model.size, run.data.input_hw, padded),
        map_bytes=4 * num_keypoints * math.prod(model.heatmap_hw),
        num_workers=run.data.num_workers,
        steps=sampling.num_steps(plan, num_people, run.max_steps),
        footprint_of=partial(footprint, network, plan, half),
        fixed=_measure_fixed_teacher(run, network, half=half),
    )


def _count(parameters: Iterable[Tensor]) -> int:
    return sum(p.numel() for p in parameters)


def _count_learning(parameters: Iterable[Tensor]) -> int:
    return _count(p for p in parameters if p.requires_grad)


def _count_queries(size: Size, input_hw: tuple[int, int], padded: bool) -> int:
    height, width = input_hw
    dim = size.width // size.heads
    return (height // size.patch) * (width // size.patch) * size.heads * (padded_dim(dim) if padded else dim)


def _measure_fixed_teacher(run: Config, student: NetworkShape, *, half: bool) -> FixedNetwork | None:
    """
    Raises:
        UserError: `--distill.teacher` is no weights folder.
    """
    folder = find_fixed_teacher(run)
    if folder is None:
        return None
    shape = replace(student, name=description(folder)["name"], lora=LoraConfig(), base_dtype=None)
    with torch.device("meta"):
        network = SapiensPose(shape.name, shape.num_keypoints, shape.input_hw)
    num = sum(p.numel() for p in network.parameters())
    forward = footprint(shape, StageConfig(), half, False).forward
    return FixedNetwork(name=shape.name, num_parameters=num, forward=forward)
