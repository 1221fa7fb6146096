"""How many people of one step a device holds: closed formulas, predicted and not measured on a GPU.

Weights, gradients and AdamW states by the ZeRO stage; for each person the block inputs that checkpointing keeps, one
block's working set and the head's activations.
"""

from collections.abc import Mapping

from accelerate import Accelerator

from sapiens_accel import distributed
from sapiens_accel.config import MemoryConfig, StageConfig, UserError
from sapiens_accel.data import Share
from sapiens_accel.distributed import Strategy
from sapiens_accel.model import SapiensPose

RESERVE = 0.85  # the part of free memory to plan with: context, workspaces and fragmentation take the rest
BLOCK_WORKING_SET = 34  # half-precision values a token and channel that one block's backward holds
HEAD_MAPS = 10  # maps of the head's width at full size that its backward holds


def state_bytes(num_parameters: int, num_learning: int, strategy: Strategy) -> float:
    """Bytes of weights, gradients, masters and Adam moments on one device."""
    zero, ranks = strategy.zero, strategy.num_ranks
    sixteen = strategy.half and zero > 0  # without DeepSpeed, weights stay fp32 under autocast
    weights = (2 if sixteen else 4) * num_parameters / (ranks if zero == 3 else 1)
    gradients = (2 if sixteen else 4) * num_learning / (ranks if zero >= 2 else 1)
    optimizer = (12 if sixteen else 8) * num_learning / (ranks if zero >= 1 else 1)
    return (0 if strategy.offload_weights else weights) + (0 if strategy.offload else gradients + optimizer)


def person_bytes(model: SapiensPose, *, half: bool, checkpointed: bool) -> float:
    """Bytes of activations that one more person in the micro-batch takes."""
    size, (height, width) = model.size, model.input_hw
    tokens = (height // size.patch) * (width // size.patch)
    blocks = size.depth + BLOCK_WORKING_SET if checkpointed else BLOCK_WORKING_SET * size.depth
    learns = any(p.requires_grad for p in model.backbone.parameters())
    map_h, map_w = model.heatmap_hw
    head = map_h * map_w * max(size.upsample + size.convs) * HEAD_MAPS
    return (2 if half else 4) * (head + tokens * size.width * (blocks if learns else BLOCK_WORKING_SET))


def largest_micro_batch(
    model: SapiensPose, free_bytes: int | None, strategy: Strategy, *, checkpointed: bool, teacher: bool
) -> int:
    """How many people are predicted to fit; at least 1.

    Raises:
        UserError: the training state alone does not fit.

    Args:
        free_bytes: what the device has left; None is a device whose memory does not limit (a CPU).
        teacher: a second network in fp32 lives on the device, and each labelled person brings an unlabelled one.
    """
    if free_bytes is None:
        return 2**31
    num_parameters = sum(p.numel() for p in model.parameters())
    num_learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    states = state_bytes(num_parameters, num_learning, strategy) + (4 * num_parameters if teacher else 0)
    if states > free_bytes:
        raise UserError(
            f"{model.name}: weights, gradients and optimizer state need {states / 2**30:.1f} GiB (predicted), the GPU "
            f"has {free_bytes / 2**30:.1f} GiB free; try accelerate_configs/zero2_offload.yaml or zero3_offload.yaml, "
            "more GPUs under zero2.yaml or zero3.yaml, a smaller model, or --memory.micro_batch N to try all the same"
        )
    person = person_bytes(model, half=strategy.half, checkpointed=checkpointed) * (2 if teacher else 1)
    return max(1, int((free_bytes * RESERVE - states) / person))


def share_of(
    accelerator: Accelerator, stage: str, plan: StageConfig, model: SapiensPose, config: MemoryConfig
) -> Share:
    """This rank's micro-batches: as asked for, else the largest that are predicted to fit."""
    if config.micro_batch:  # asked for: the device will tell, not a prediction
        return distributed.divide(accelerator, stage, plan.global_batch, config.micro_batch, config.micro_batch)
    largest = largest_micro_batch(
        model,
        distributed.free_bytes(accelerator),
        distributed.strategy(accelerator),
        checkpointed=config.gradient_checkpointing,
        teacher=plan.teacher is not None,
    )
    return distributed.divide(accelerator, stage, plan.global_batch, None, largest)


def check_plans(
    accelerator: Accelerator, plans: Mapping[str, StageConfig], model: SapiensPose, config: MemoryConfig
) -> None:
    """Refuse now what a later stage would refuse after hours of the ones before it.

    Args:
        model: the network that all stages train; on the meta device it costs nothing.

    Raises:
        UserError: a global batch that does not divide, a frozen pattern that matches nothing.
    """
    for stage, plan in plans.items():
        model.freeze(plan.frozen)
        distributed.divide(accelerator, stage, plan.global_batch, config.micro_batch, largest=1)
