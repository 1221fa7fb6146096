"""Kernels of the blocks on GPUs: which one torch's attention gets, and fused ones for Sapiens2's norms and gated MLP.

An attention function for transformers' blocks avoids torch's MATH kernel on GPUs without a flash kernel. Below compute
capability 8.0, and in fp32 on every GPU, torch has only its memory-efficient kernel. In 16 bits it requires head
dimensions that are multiples of 8 (sapiens_2b has 60, sapiens2_5b 76), and in every precision as many heads of keys as
of queries (every sapiens2 has half as many). Otherwise torch falls back to its MATH kernel, which stores whole
attention maps of tokens x tokens in fp32: for a checkpointed block of sapiens_2b with 32 people, 7.5 GiB in place of
1.8.

The fused kernels are Liger's (Hsu et al. 2024, https://arxiv.org/abs/2410.10989; pip install liger-kernel), in Triton,
for GPUs alone: a norm keeps its input and one number a token for the backward, the gated MLP the outputs of its two
matrices and no more.

Shape letters: b people, h heads, g heads of keys and values, n tokens, d channels of a head, c channels.
"""

import importlib.util
from functools import lru_cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.modeling_utils import AttentionInterface
from transformers.models.sapiens2.modeling_sapiens2 import Sapiens2GatedMLP, Sapiens2RMSNorm

FLASH_CAPABILITY = (8, 0)
TRITON_CAPABILITY = (7, 0)
HALF = (torch.float16, torch.bfloat16)
ALIGNMENT = 8  # elements of 16 bits: tensor cores load 16 bytes at a time

# Names of attention functions in transformers' configs.
PADDED = "sdpa_padded"
BY_DEVICE = "sdpa_by_device"


def padded_attention(  # noqa: PLR0913  (the signature of transformers' attention functions)
    module: nn.Module,
    query: Float[Tensor, "b h n d"],
    key: Float[Tensor, "b g n d"],
    value: Float[Tensor, "b g n d"],
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Float[Tensor, "b n h d"], None]:
    """Attention with keys and values repeated for every head, and heads padded with zeros. Exact up to rounding.

    Zeros add nothing to the product of queries and keys, and the padded channels of the output are cut off.
    """
    dim = query.shape[-1]
    scale = dim**-0.5 if scaling is None else scaling  # by the dimension before padding
    key, value = (repeat_kv(states, query.shape[1] // key.shape[1]) for states in (key, value))
    if padding := -dim % ALIGNMENT:
        query, key, value = (F.pad(states, (0, padding)) for states in (query, key, value))
    output = F.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, dropout_p=dropout, is_causal=False, scale=scale
    )
    return output[..., :dim].transpose(1, 2).contiguous(), None


def attention_by_device(module: nn.Module, query: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    """transformers' own SDPA attention; `padded_attention` on GPUs that need it."""
    if _query_needs_padding(query):
        return padded_attention(module, query, *args, **kwargs)
    return sdpa_attention_forward(module, query, *args, **kwargs)


AttentionInterface.register(PADDED, padded_attention)
AttentionInterface.register(BY_DEVICE, attention_by_device)


def _query_needs_padding(query: Tensor) -> bool:
    if (capability := capability_on(query.device)) is None:
        return False
    # Autocast casts inside of attention: with fp32 weights, Sapiens2's norm of queries returns fp32.
    cast = torch.is_autocast_enabled(query.device.type)
    dtype = torch.get_autocast_dtype(query.device.type) if cast else query.dtype
    return needs_padding(capability, half=dtype in HALF)


def needs_padding(capability: tuple[int, int] | None, *, half: bool = True) -> bool:
    """Whether attention has to be padded, because no flash kernel runs at this compute capability (None: a CPU).

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
    """Channels of a head after padding."""
    return dim + -dim % ALIGNMENT


Kernel = Literal["flash", "memory-efficient", "math"]


def kernel_on(device: torch.device, heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> Kernel:
    """The kernel that torch chooses for `attention_by_device` on a GPU, as torch reports it. Allocates a few kB there.

    Args:
        heads: number of query heads.
        kv_heads: number of heads of keys and values.
        dim: channels of a head.
    """
    if needs_padding(torch.cuda.get_device_capability(device), half=dtype in HALF):
        kv_heads, dim = heads, padded_dim(dim)
    query, key = (
        torch.empty(1, num, 2 * ALIGNMENT, dim, dtype=dtype, device=device, requires_grad=True)
        for num in (heads, kv_heads)
    )
    params = torch.backends.cuda.SDPAParams(query, key, key, None, 0.0, False, kv_heads < heads)
    if torch.backends.cuda.can_use_flash_attention(params):
        return "flash"
    return "memory-efficient" if torch.backends.cuda.can_use_efficient_attention(params) else "math"


# ---- Sapiens2's norms and gated MLP


class FusedNorm(Sapiens2RMSNorm):
    """transformers' norm by one kernel; of an input in 16 bits the output is in 16 bits, with fp32 weights too."""

    def forward(self, hidden_states: Float[Tensor, "*n c"]) -> Float[Tensor, "*n c"]:
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction  # pyright: ignore[reportMissingImports]

        # As transformers rounds: only the root mean square is fp32. Not in place: the gradient of the output may be
        # another tensor's too.
        return LigerRMSNormFunction.apply(hidden_states, self.weight, self.variance_epsilon, 0.0, "llama", False)


class FusedGatedMLP(Sapiens2GatedMLP):
    """transformers' MLP, whose activation and product are one kernel."""

    def forward(self, x: Float[Tensor, "*n c"]) -> Float[Tensor, "*n c"]:
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction  # pyright: ignore[reportMissingImports]

        # Its backward writes the gradients over both products: nothing else may need them.
        return self.down_proj(LigerSiLUMulFunction.apply(self.gate_proj(x), self.up_proj(x)))


FUSED: dict[type[nn.Module], type[nn.Module]] = {Sapiens2RMSNorm: FusedNorm, Sapiens2GatedMLP: FusedGatedMLP}


def use_fused(model: nn.Module, wanted: bool = True) -> None:
    """Let Sapiens2's norms and gated MLPs run by fused kernels, or by torch's operations again.

    The class of a module changes, not the module: its parameters, hooks and copies stay what they are.
    """
    replaced = FUSED if wanted else {fused: plain for plain, fused in FUSED.items()}
    for module in model.modules():
        if type(module) in replaced:
            module.__class__ = replaced[type(module)]


def missing_package() -> str | None:
    """How to install the fused kernels; None if they are."""
    is_there = all(importlib.util.find_spec(name) is not None for name in ("liger_kernel", "triton"))
    return None if is_there else "pip install liger-kernel"
