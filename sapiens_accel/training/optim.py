"""Layer groups and OptimConfig to AdamW parameter groups; the learning rate as a function of the step."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sapiens_accel.config.schema import OptimConfig
from sapiens_accel.errors import UserError

WARMUP_FROM = 0.001


def param_groups(
    layer_groups: Mapping[str, Sequence[tuple[str, nn.Parameter]]], config: OptimConfig
) -> list[dict[str, Any]]:
    """One group for each layer and kind of weight decay, of the parameters that learn.

    Layer-wise decay as published (sapiens, pose/mmpose/engine/optim_wrappers/layer_decay_optim_wrapper.py): embeddings
    are layer 0, block i is layer i + 1, the final norm and the head are layer depth + 1 at the full rate. Biases,
    norms (all parameters of one dimension) and the position embedding have no weight decay.

    Args:
        layer_groups: `SapiensPose.layer_groups()`.

    Returns:
        AdamW groups with `name`, `lr_scale` and `weight_decay` beside `params`.
    """
    names = list(layer_groups)
    last = names.index("norm")
    groups = []
    for index, name in enumerate(names):
        scale = config.layer_decay ** (last - min(index, last))
        learning = [(n, p) for n, p in layer_groups[name] if p.requires_grad]
        for decays, label in ((True, "decay"), (False, "no_decay")):
            params = [p for n, p in learning if _decays(n, p) == decays]
            if params:
                decay = config.weight_decay if decays else 0.0
                groups.append({"params": params, "name": f"{name}.{label}", "lr_scale": scale, "weight_decay": decay})
    return groups


def _decays(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim > 1 and not name.endswith(".bias") and "position_embeddings" not in name


def adamw(
    groups: list[dict[str, Any]],
    config: OptimConfig,
    device: torch.device,
    *,
    eight_bit: bool = False,
    stochastic: bool = False,
) -> torch.optim.Optimizer:
    """torch's AdamW over the groups; or torchao's, which keeps its moments in 8 bits.

    Fused on GPUs and on CPUs, where it is 2.8 times as fast. 8 bits: blocks of 256 values share a scale (Dettmers et
    al. 2021, https://arxiv.org/abs/2110.02861).

    Args:
        stochastic: torchao's rounds new values of bf16 parameters up or down at random, so that their mean is exact;
            to the nearest, changes of less than half the distance of two bf16 numbers (1/512 of a value) would be lost.

    Raises:
        UserError: torchao is not installed.
    """
    if not eight_bit:
        return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=device.type in ("cuda", "cpu"))
    try:
        from torchao.optim import AdamW8bit  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError("--memory.adam_8bit needs torchao: pip install torchao") from None
    return AdamW8bit(groups, lr=config.lr, betas=config.betas, bf16_stochastic_round=stochastic)


def list_matrices(layer_groups: Mapping[str, Sequence[tuple[str, nn.Parameter]]]) -> list[nn.Parameter]:
    """The learning matrices of the blocks and the head: all but 1 % of a network's parameters.

    Norms and biases are small, and embeddings (of patches and positions) set the precision of the first input.
    """
    return [
        parameter
        for name, members in layer_groups.items()
        if name == "head" or name.startswith("block_")
        for _, parameter in members
        if parameter.requires_grad and parameter.ndim > 1
    ]


def keep_in_bf16(parameters: Sequence[nn.Parameter]) -> None:
    """Round parameters to bf16, in which autocast would multiply them anyway; so are their gradients then."""
    for parameter in parameters:
        parameter.data = parameter.data.to(torch.bfloat16)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group its share of the rate."""
    for group in optimizer.param_groups:
        rate = lr * group["lr_scale"]
        if isinstance(group["lr"], Tensor):  # compiled optimizers: another number would compile them again
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def lr_at(step: int, num_steps: int, config: OptimConfig) -> float:
    """The rate of the step that follows `step` finished ones, of a stage of `num_steps`.

    Linear warm-up from WARMUP_FROM of the peak over `warmup_steps` (at most a tenth of the stage), then the schedule.
    """
    warmup = min(config.warmup_steps, num_steps // 10)
    if step < warmup:
        return config.lr * (WARMUP_FROM + (1 - WARMUP_FROM) * step / warmup)
    where = (step - warmup) / max(1, num_steps - warmup)  # the fraction done of what follows the warm-up
    match config.schedule:
        case "constant":
            return config.lr
        case "multistep":
            return config.lr * 0.1 ** sum(step >= milestone * num_steps for milestone in config.milestones)
        case "cosine":
            return config.lr * 0.5 * (1 + math.cos(math.pi * where))
        case "linear":
            return config.lr * (1 - where)
