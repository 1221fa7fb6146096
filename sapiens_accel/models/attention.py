"""Attention as transformers' blocks call it, kept out of torch's MATH kernel on GPUs that have no flash kernel.

Below compute capability 8.0 torch's memory-efficient kernel is what is left. In 16 bits it wants head dimensions that
are multiples of 8 (sapiens_2b has 60, sapiens2_5b 76), and as many heads of keys as of queries (every sapiens2 has half
as many). Otherwise torch takes its MATH kernel, which keeps whole maps of tokens x tokens in fp32: for a checkpointed
block of sapiens_2b at 32 people, 7.5 GiB in place of 1.8.

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
ALIGNED = 8  # elements of 16 bits: the 16 bytes that tensor cores load at a time

# Names of attention functions in transformers' configs.
PADDED = "sdpa_padded"
BY_DEVICE = "sdpa_by_device"


def padded_attention(
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
    if pads_on(query.device):
        return padded_attention(module, query, *rest, **options)
    return sdpa_attention_forward(module, query, *rest, **options)


AttentionInterface.register(PADDED, padded_attention)
AttentionInterface.register(BY_DEVICE, attention_by_device)


def pads_on(device: torch.device) -> bool:
    """Whether attention on this device is padded."""
    return device.type == "cuda" and needs_padding(_capability(device))


def needs_padding(capability: tuple[int, int]) -> bool:
    """Whether a GPU of this compute capability has no flash kernel."""
    return capability < FLASH_CAPABILITY


@lru_cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def padded_dim(dim: int) -> int:
    """Channels of a head once it is filled up."""
    return dim + -dim % ALIGNED


Kernel = Literal["flash", "memory-efficient", "math"]


def kernel_on(device: torch.device, heads: int, dim: int, dtype: torch.dtype) -> Kernel:
    """The kernel that torch takes for attention on a GPU, by torch's own word. Allocates a few kB there.

    Args:
        heads: of the queries.
        dim: channels of a head.
    """
    padded = needs_padding(torch.cuda.get_device_capability(device))
    states = torch.empty(1, heads, 2 * ALIGNED, padded_dim(dim) if padded else dim, dtype=dtype, device=device)
    params = torch.backends.cuda.SDPAParams(states, states, states, None, 0.0, False, False)
    if torch.backends.cuda.can_use_flash_attention(params):
        return "flash"
    return "memory-efficient" if torch.backends.cuda.can_use_efficient_attention(params) else "math"
