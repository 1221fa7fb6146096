"""The frozen matrices of a network's blocks in 4 or 8 bits, for adapters to learn beside them (QLoRA).

nf4: blocks of 64 values share a scale, each value is one of 16 (Dettmers et al. 2023, https://arxiv.org/abs/2305.14314),
by bitsandbytes: 0.5625 bytes a value. int8: a row shares a scale: 1 byte a value. A matrix is computed in the precision
of its input where it is used, in the forward and again in the backward; the input is not rounded.

The scales themselves are not quantized: so rounding the rounded values again gives the same bits, and `STAGE/base`,
which holds these values in fp32, is all that a resumed stage needs.
"""

import importlib.util
import logging
import math
from collections.abc import Iterator, Mapping
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from sapiens_accel.config.schema import BaseDtype
from sapiens_accel.errors import UserError

BLOCK = 64  # values that share a scale in nf4
LARGEST = 127  # of int8
SCALES = "scales"


class QuantizedLinear(nn.Linear):
    """A frozen linear layer whose matrix is stored in few bits.

    Attributes:
        weight: the packed matrix: nf4 uint8 [out * in / 2, 1], int8 [out, in].
        scales: fp32, as int32 of the same bits, since engines cast parameters of floating point.
        gets_adapters: the layer would learn if it had no adapters.
    """

    def __init__(self, layer: nn.Linear, matrix: Float[Tensor, "out in"], kind: BaseDtype) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.kind = layer.in_features, layer.out_features, kind
        self.gets_adapters = layer.weight.requires_grad
        packed, scales = _round_nf4(matrix) if kind == "nf4" else _round_int8(matrix)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.scales = nn.Parameter(scales.view(torch.int32), requires_grad=False)
        self.bias = layer.bias

    def matrix(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "out in"]:
        """The rounded matrix."""
        scales = self.scales.view(torch.float32)
        if self.kind == "int8":
            # In this order the largest value of a row is its scale, to the bit.
            return (self.weight / LARGEST * scales[:, None]).to(dtype)
        shape = (self.out_features, self.in_features)
        return torch.ops.bitsandbytes.dequantize_4bit(self.weight, scales, BLOCK, "nf4", shape, dtype)

    def forward(self, input: Tensor) -> Tensor:
        device = input.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else input.dtype
        return _Multiply.apply(input.to(dtype), self)  # pyright: ignore[reportReturnType]


class _Multiply(torch.autograd.Function):
    """The product with a layer's matrix, which is not stored for the backward but computed again."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        bias = None if layer.bias is None else layer.bias.to(input.dtype)
        return F.linear(input, layer.matrix(input.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,) = gradients
        return gradient @ ctx.layer.matrix(gradient.dtype), None


def _round_nf4(matrix: Float[Tensor, "out in"]) -> tuple[Tensor, Tensor]:
    require_package("nf4")
    return torch.ops.bitsandbytes.quantize_4bit(matrix.float().contiguous(), BLOCK, "nf4", torch.uint8)


def _round_int8(matrix: Float[Tensor, "out in"]) -> tuple[Tensor, Tensor]:
    scales = matrix.float().abs().amax(dim=1)
    rounded = matrix.float() / scales.clamp(min=torch.finfo(torch.float32).tiny)[:, None] * LARGEST
    return rounded.round().to(torch.int8), scales


def require_package(kind: BaseDtype | None) -> None:
    """Import what this type needs.

    Raises:
        UserError: bitsandbytes is not installed.
    """
    if kind != "nf4":
        return
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("--model.base_dtype nf4: bitsandbytes is not installed. Run pip install bitsandbytes")
    silence()
    import bitsandbytes  # noqa: F401  # pyright: ignore[reportMissingImports]  (it registers its operations)


def silence() -> None:
    """Keep bitsandbytes from printing that a kernel for inference, which is not used here, is not installed."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def num_bytes(shape: tuple[int, ...], kind: BaseDtype) -> float:
    """Bytes of a matrix with its scales."""
    num = math.prod(shape)
    return num / 2 + 4 * math.ceil(num / BLOCK) if kind == "nf4" else num + 4 * shape[0]


def num_values(model: nn.Module) -> int:
    """The number of values of all parameters, whatever they are stored in."""
    layers = [layer for layer in model.modules() if isinstance(layer, QuantizedLinear)]
    packed = sum(layer.weight.numel() + layer.scales.numel() for layer in layers)
    matrices = sum(layer.in_features * layer.out_features for layer in layers)
    return sum(parameter.numel() for parameter in model.parameters()) + matrices - packed


def is_matrix(module: nn.Module, name: str) -> TypeGuard[nn.Linear]:
    """Whether a module of this name is a linear layer of a block, whose matrix can be rounded."""
    return ".layer." in name and isinstance(module, nn.Linear)


def replace(model: nn.Module, name: str, matrix: Float[Tensor, "out in"], kind: BaseDtype) -> None:
    """Replace a linear layer of the network, which may be without values, by one of this rounded matrix."""
    owner, _, own = name.rpartition(".")
    layer: Any = model.get_submodule(name)
    setattr(model.get_submodule(owner), own, QuantizedLinear(layer, matrix, kind))


def replace_all(model: nn.Module, kind: BaseDtype) -> None:
    """Round the matrices of all blocks of a network with values, or on the meta device."""
    for name, module in list(model.named_modules()):
        if is_matrix(module, name):
            replace(model, name, module.weight.detach(), kind)


class PlainState(Mapping[str, Tensor]):
    """The weights of a network by its usual keys, each rounded matrix in fp32, computed when it is read.

    Args:
        values: values of other tensors to use in place of the network's, which an engine may have rounded.
    """

    def __init__(self, model: nn.Module, values: Mapping[str, Tensor]) -> None:
        self._layers = {f"{n}.weight": m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
        state = {**model.state_dict(), **values}
        self._tensors = {key: value for key, value in state.items() if not key.endswith(f".{SCALES}")}

    def __getitem__(self, key: str) -> Tensor:
        layer = self._layers.get(key)
        return self._tensors[key] if layer is None else layer.matrix()

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)
