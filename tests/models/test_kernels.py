"""Kernels of GPUs, against torch's own operations on the networks as they are: attention that keeps its kernel without
flash attention; fused norms and gated MLPs, in Triton's interpreter."""

import os
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sapiens_accel.config.schema import LoraConfig
from sapiens_accel.models import adapters, kernels, sapiens
from sapiens_accel.models.sapiens import SIZES, Layout, SapiensPose

# Heads of the channels of sapiens_2b and sapiens2_5b, and of one that fits; every sapiens2 has grouped queries.
HEADS = {"sapiens": (60, 64), "sapiens2": (76, 64)}
CASES = [(family, dim) for family, dims in HEADS.items() for dim in dims]


def network(monkeypatch: pytest.MonkeyPatch, family: str, dim: int) -> SapiensPose:
    """Two blocks of four heads with so many channels, and weights that make every layer matter."""
    size = replace(SIZES[f"{family}_tiny"], width=4 * dim, depth=2)
    monkeypatch.setitem(sapiens.SIZES, "here", size)
    torch.manual_seed(0)
    model = SapiensPose("here", 17, (64, 48)).double()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 or name.startswith("head."):
            torch.nn.init.normal_(parameter, mean=0.5, std=0.1)
    return model


def outcome(model: SapiensPose, image: Tensor) -> tuple[Tensor, dict[str, Any]]:
    model.zero_grad()
    maps: Any = model.train()(image)
    maps.square().sum().backward()
    return maps.detach(), {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize(("family", "dim"), CASES)
@pytest.mark.parametrize("checkpointed", [0, 2])
def test_padded_attention_is_the_same_function(
    family: str, dim: int, checkpointed: int, picture: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Heatmaps and every gradient, to fp64's and to fp32's rounding."""
    model = network(monkeypatch, family, dim)
    model.lay_out(Layout(checkpointed_blocks=checkpointed))
    for dtype, close in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
        model.to(dtype)
        model.backbone.config._attn_implementation = "sdpa"
        maps, gradients = outcome(model, picture)
        model.backbone.config._attn_implementation = kernels.PADDED
        same_maps, same = outcome(model, picture)
        assert (same_maps - maps).norm() <= close * maps.norm() and maps.std() > 1e-3
        for name, gradient in gradients.items():
            assert gradient is not None and gradient.norm() > 0, name
            # A key's bias moves all of a query's products alike: its gradient is nothing but rounding.
            scale = gradient.norm() if not name.endswith("key.bias") else maps.norm()
            assert (same[name] - gradient).norm() <= close * scale, name


class Kernels(TorchDispatchMode):
    """The shapes of what attention is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[list[tuple[int, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "attention" in str(func) and "backward" not in str(func):
            self.shapes.append([tuple(states.shape) for states in args[:3]])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("family", "dim"), CASES)
def test_the_memory_efficient_kernel_gets_what_it_takes(
    family: str, dim: int, picture: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = network(monkeypatch, family, dim).float()
    model.backbone.config._attn_implementation = kernels.PADDED
    with Kernels() as called:
        model(picture)
    assert len(called.shapes) == 2
    for query, key, value in called.shapes:
        assert query == key == value and query[-1] % 8 == 0 and query[-1] - dim < 8


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Which of both functions was taken."""
    names: list[str] = []
    monkeypatch.setattr(kernels, "padded_attention", lambda *_, **__: names.append("padded"))
    monkeypatch.setattr(kernels, "sdpa_attention_forward", lambda *_, **__: names.append("plain"))
    yield names


def test_on_a_cpu_nothing_is_padded(picture: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model = network(monkeypatch, "sapiens", 60).float()
    with Kernels() as called:
        model(picture)
    assert [query[-1] for query, _, _ in called.shapes] == [60, 60]


@pytest.mark.parametrize("name", ["sapiens_tiny", "sapiens2_tiny"])
def test_what_is_exported_does_not_know_of_it(name: str) -> None:
    """transformers' configs, and the names of the weights."""
    with torch.device("meta"):
        model = SapiensPose(name, 17, (64, 48))
    assert model.backbone.config._attn_implementation == kernels.BY_DEVICE
    assert "sdpa" not in str(model.backbone.config.to_dict())
    assert not any("attention_by_device" in key for key in model.state_dict())


@pytest.mark.parametrize("dim", [1, 7, 8, 60, 64, 76, 80])
def test_padding_is_the_next_multiple_of_8(dim: int) -> None:
    assert kernels.padded_dim(dim) == next(n for n in range(dim, dim + 8) if n % 8 == 0)


# ---- Fused norms and gated MLPs


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Liger's kernels on a CPU: Triton's interpreter runs them row by row.

    The compiler gives a kernel fp32 scalars and the GPU's square root, which the interpreter does not have.
    """
    pytest.importorskip("liger_kernel", reason="an extra: pip install sapiens_accel[kernels]")
    if os.environ.get("TRITON_INTERPRET") != "1":  # Triton reads it when it is imported, and torch imports it
        pytest.skip("TRITON_INTERPRET=1 is not set")
    import numpy as np
    import triton.language as tl  # pyright: ignore[reportMissingImports]
    from liger_kernel.ops import rms_norm  # pyright: ignore[reportMissingImports]
    from triton.runtime import interpreter  # pyright: ignore[reportMissingImports]

    convert = interpreter._implicit_cvt

    def with_floats(value: Any) -> Any:
        if type(value) is float:
            handle = interpreter.TensorHandle(np.array([value], dtype=np.float32), tl.float32)
            return tl.tensor(handle, tl.float32)
        return convert(value)

    monkeypatch.setattr(interpreter, "_implicit_cvt", with_floats)
    monkeypatch.setattr(rms_norm, "rsqrt", lambda value: tl.rsqrt(value))


LORA = LoraConfig(rank=2)


@pytest.mark.slow
@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("frozen", ["", "adapters"])
@pytest.mark.parametrize("layout", [Layout(), Layout(checkpointed_blocks=1, selective_blocks=1)])
def test_fused_norms_and_mlps_are_the_same_function(layout: Layout, frozen: str, picture: Tensor) -> None:
    """Heatmaps and every gradient, to fp32's rounding; also of a copy, as the mean teacher's network is one."""
    torch.manual_seed(0)
    model = SapiensPose("sapiens2_tiny", 17, (64, 48), depth=2)
    if frozen:
        adapters.add(model, LORA)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=0.0 if name.endswith("bias") else 1.0, std=0.2)
        elif name.startswith("head.") or "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    names = set(model.state_dict())
    model.lay_out(layout)
    maps, gradients = outcome(model, picture[:1])
    unused = {name for name, gradient in gradients.items() if gradient is None}  # the mask token, and what is frozen
    model.lay_out(replace(layout, fused=True))
    num = sum(type(module) in kernels.FUSED.values() for module in model.modules())
    assert num == 2 * (2 + 2 + 1) + 1  # of a block two norms, those of queries and keys, the MLP; the last norm
    assert set(model.state_dict()) == names
    for network in (model, deepcopy(model)):
        same_maps, same = outcome(network, picture[:1])
        assert (same_maps - maps).norm() <= 1e-4 * maps.norm() and maps.std() > 1e-3
        assert {name for name, gradient in same.items() if gradient is None} == unused
        for name in set(gradients) - unused:
            gradient = gradients[name]
            # A bias before the head's instance norm changes nothing: its gradient is nothing but rounding.
            assert (same[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-5 * maps.norm(), name
    model.lay_out(layout)
    assert not any(type(module) in kernels.FUSED.values() for module in model.modules())
    assert torch.equal(outcome(model, picture[:1])[0], maps)
