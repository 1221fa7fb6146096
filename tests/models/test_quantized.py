"""A base in 4 or 8 bits: near the real one by the known error, fixed under rounding again, and never learning."""

import importlib.util
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Sapiens2ForPoseEstimation

from sapiens_accel.config.schema import BaseDtype, LoraConfig
from sapiens_accel.models import adapters, export, load, quantized
from sapiens_accel.models.modeling_sapiens_pose import SapiensForPoseEstimation
from sapiens_accel.models.quantized import QuantizedLinear
from sapiens_accel.models.sapiens import Layout, SapiensPose, _normalize
from sapiens_accel.pose.skeleton import COCO17

pytest.importorskip("bitsandbytes")
LORA = LoraConfig(rank=3, alpha=4.5)
KINDS: tuple[BaseDtype, ...] = ("nf4", "int8")
# Of normal values, relative to their standard deviation, in blocks of 64 (QLoRA reports 0.09), and in rows of 128 by
# step / sqrt(12), the step being the largest of 128 (2.83 on average) / 127.
ERROR = {"nf4": 0.091, "int8": 0.00643}


def layer_of(matrix: Tensor, kind: BaseDtype) -> QuantizedLinear:
    plain = torch.nn.Linear(matrix.shape[1], matrix.shape[0])
    return QuantizedLinear(plain, matrix, kind)


def rounded(model: SapiensPose, kind: BaseDtype) -> SapiensPose:
    model = deepcopy(model)
    quantized.replace_all(model, kind)
    return model


def adapted(model: SapiensPose) -> SapiensPose:
    torch.manual_seed(1)
    adapters.add(model, LORA)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if adapters.is_adapter(name):
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_the_error_is_that_of_the_type(kind: BaseDtype) -> None:
    matrix = 0.02 * torch.randn(512, 128, generator=torch.Generator().manual_seed(0))
    layer = layer_of(matrix, kind)
    error = (layer.matrix() - matrix).std() / matrix.std()
    assert error == pytest.approx(ERROR[kind], rel=0.04)
    taken = sum(p.numel() * p.element_size() for p in (layer.weight, layer.scales))
    assert taken == quantized.num_bytes((512, 128), kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1e-3, 0.37, 3.1])
def test_rounding_again_changes_no_bit(kind: BaseDtype, scale: float) -> None:
    matrix = scale * torch.randn(96, 192, generator=torch.Generator().manual_seed(0))
    matrix[3] = 0.0
    once = layer_of(matrix, kind)
    again = layer_of(once.matrix(), kind)
    assert torch.equal(again.weight, once.weight) and torch.equal(again.scales, once.scales)
    assert torch.equal(again.matrix(), once.matrix())
    assert torch.equal(once.matrix()[3], matrix[3])


@pytest.mark.parametrize("kind", KINDS)
def test_the_forward_is_that_of_the_rounded_matrices_and_only_adapters_norms_and_head_learn(
    tiny: SapiensPose, picture: Tensor, kind: BaseDtype
) -> None:
    model = rounded(tiny, kind)
    state = dict(quantized.PlainState(model, {}))
    assert [*state] == [*tiny.state_dict()]
    plain = deepcopy(tiny)
    plain.load_state_dict(state)
    assert quantized.num_values(model) == quantized.num_values(tiny) == sum(p.numel() for p in tiny.parameters())
    with torch.no_grad():
        found, exact, other = model(picture), plain(picture), tiny(picture)
    assert (found - exact).abs().max() < 1e-6 * exact.abs().max()
    # The network adds up the errors of its layers.
    assert 0 < (found - other).square().mean().sqrt() / other.std() < 6 * ERROR[kind]

    model, plain = adapted(model), adapted(plain)
    model.lay_out(Layout(checkpointed_blocks=2))
    for network in (model, plain):
        network(picture).square().mean().backward()
    expected = dict(plain.named_parameters())
    assert len(adapters.find_targets(rounded(tiny, kind), LORA)) == len(adapters.find_targets(tiny, LORA))
    parameter: Any
    for name, parameter in model.named_parameters():
        learns = adapters.is_adapter(name) or "norm" in name or name.startswith("head.")
        assert parameter.requires_grad == learns and (parameter.grad is not None) == learns, name
        if learns:
            gradient: Any = expected[name].grad
            assert torch.allclose(parameter.grad, gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max())), name


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_multiplies_in_16_bits(tiny: SapiensPose, picture: Tensor, kind: BaseDtype) -> None:
    model = rounded(tiny, kind)
    plain = deepcopy(tiny)
    plain.load_state_dict(dict(quantized.PlainState(model, {})))
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        assert torch.equal(model(picture), plain(picture))


@pytest.mark.parametrize("kind", KINDS)
def test_an_exported_network_is_the_one_that_was_trained(
    tiny: SapiensPose, picture: Tensor, tmp_path: Path, kind: BaseDtype
) -> None:
    """Weights are rounded while they are loaded; the base is written rounded; and plain transformers loads the sum."""
    export.export(tmp_path / "start", tiny.state_dict(), tiny, COCO17, 2.0)
    model = SapiensPose(tiny.name, 17, (64, 48), empty=True)
    loaded = load.load(model, str(tmp_path / "start"), COCO17.names, load.Home(base_dtype=kind))
    base = quantized.PlainState(model, loaded.values)
    adapted(model)
    export.export(tmp_path / "base", base, tiny, COCO17, 2.0)
    learned = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    state = adapters.Merged(load.published.read(str(tmp_path / "base")).state, learned, LORA.scale)
    export.export(tmp_path / "weights", state, tiny, COCO17, 2.0)
    auto = Sapiens2ForPoseEstimation if tiny.size.family == "sapiens2" else SapiensForPoseEstimation
    with torch.no_grad():
        found = auto.from_pretrained(tmp_path / "weights").eval()(_normalize(picture)).heatmaps
        expected = model.eval()(picture)
        assert (found - expected).abs().max() < 1e-5 * expected.abs().max()

    again = SapiensPose(tiny.name, 17, (64, 48), empty=True)
    load.load(again, str(tmp_path / "base"), COCO17.names, load.Home(base_dtype=kind))
    for name, layer in again.named_modules():
        if isinstance(layer, QuantizedLinear):
            own: Any = model.get_submodule(name).base_layer
            assert torch.equal(layer.weight, own.weight) and torch.equal(layer.scales, own.scales), name


def test_nf4_without_its_package_is_refused_in_one_line(tiny: SapiensPose, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    with pytest.raises(quantized.UserError, match=r"nf4: bitsandbytes is not installed\. Run pip install"):
        quantized.replace_all(tiny, "nf4")
    quantized.replace_all(tiny, "int8")  # needs no package
