"""Attention as transformers' blocks call it, kept out of torch's MATH kernel on GPUs where no flash kernel runs.

Below compute capability 8.0, and in fp32 on every GPU, torch's memory-efficient kernel is what is left. In 16 bits it
wants head dimensions that are multiples of 8 (sapiens_2b has 60, sapiens2_5b 76), and in every precision as many heads
of keys as of queries (every sapiens2 has half as many). Otherwise torch takes its MATH kernel, which keeps whole maps
of tokens x tokens in fp32: for a checkpointed block of sapiens_2b at 32 people, 7.5 GiB in place of 1.8.

Shape letters: b people, h heads, g heads of keys and values, n tokens, d channels of a head.
"""

from functools import lru_cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.modeling_utils import AttentionInterface

FLASH_CAPABILITY = (8, 0)
HALF = (torch.float16, torch.bfloat16)
ALIGNED = 8  # elements of 16 bits: the 16 bytes that tensor cores load at a time

# Names of attention functions in transformers' configs.
PADDED = "sdpa_padded"
BY_DEVICE = "sdpa_by_device"


def padded_attention(  # noqa: PLR0913  (what transformers calls an attention function with)
    module: nn.Module,
    query: Float[Tensor, "b h n d"],
    key: Float[Tensor, "b g n d"],
    value: Float[Tensor, "b g n d"],
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Float[Tensor, "b n h d"], None]:
    """Attention with keys and values repeated for every head, and heads filled up with zeros: exact up to rounding.

    Zeros add nothing to a product of queries and keys, and the channels of the values that they make are cut off.
    """
    dim = query.shape[-1]
    scale = dim**-0.5 if scaling is None else scaling  # of the heads as they are
    key, value = (repeat_kv(states, query.shape[1] // key.shape[1]) for states in (key, value))
    if rest := -dim % ALIGNED:
        query, key, value = (F.pad(states, (0, rest)) for states in (query, key, value))
    output = F.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, dropout_p=dropout, is_causal=False, scale=scale
    )
    return output[..., :dim].transpose(1, 2).contiguous(), None


def attention_by_device(module: nn.Module, query: Tensor, *rest: Any, **options: Any) -> tuple[Tensor, None]:
    """transformers' own SDPA attention; `padded_attention` on GPUs that need it."""
    if _pads(query):
        return padded_attention(module, query, *rest, **options)
    return sdpa_attention_forward(module, query, *rest, **options)


AttentionInterface.register(PADDED, padded_attention)
AttentionInterface.register(BY_DEVICE, attention_by_device)


def _pads(query: Tensor) -> bool:
    if (capability := capability_on(query.device)) is None:
        return False
    # Autocast casts inside of attention: Sapiens2's norm of queries, with weights in fp32, hands on fp32 before it.
    cast = torch.is_autocast_enabled(query.device.type)
    dtype = torch.get_autocast_dtype(query.device.type) if cast else query.dtype
    return needs_padding(capability, half=dtype in HALF)


def needs_padding(capability: tuple[int, int] | None, *, half: bool = True) -> bool:
    """Whether attention is padded: on a GPU of this compute capability (None: on a CPU), where no flash kernel runs.

    Args:
        half: the arithmetic is in 16 bits.
    """
    return capability is not None and (capability < FLASH_CAPABILITY or not half)


def capability_on(device: torch.device) -> tuple[int, int] | None:
    """The compute capability of a GPU; None for a CPU."""
    return _capability(device) if device.type == "cuda" else None


@lru_cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def padded_dim(dim: int) -> int:
    """Channels of a head once it is filled up."""
    return dim + -dim % ALIGNED


Kernel = Literal["flash", "memory-efficient", "math"]


def kernel_on(device: torch.device, heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> Kernel:
    """The kernel that torch takes for `attention_by_device` on a GPU, by torch's own word. Allocates a few kB there.

    Args:
        heads: of the queries.
        kv_heads: of keys and values.
        dim: channels of a head.
    """
    if needs_padding(torch.cuda.get_device_capability(device), half=dtype in HALF):
        kv_heads, dim = heads, padded_dim(dim)
    query, key = (
        torch.empty(1, num, 2 * ALIGNED, dim, dtype=dtype, device=device, requires_grad=True)
        for num in (heads, kv_heads)
    )
    params = torch.backends.cuda.SDPAParams(query, key, key, None, 0.0, False, kv_heads < heads)
    if torch.backends.cuda.can_use_flash_attention(params):
        return "flash"
    return "memory-efficient" if torch.backends.cuda.can_use_efficient_attention(params) else "math"
