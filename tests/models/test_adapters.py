"""Adapters against formulae, full fine-tuning, and peft's own reading of their folder."""

import warnings
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import Sapiens2ForPoseEstimation

from sapiens_accel.config.schema import LoraConfig, OptimConfig
from sapiens_accel.errors import UserError
from sapiens_accel.models import adapters, export
from sapiens_accel.models.modeling_sapiens_pose import SapiensForPoseEstimation
from sapiens_accel.models.sapiens import Layout, SapiensPose, _normalize
from sapiens_accel.pose.skeleton import COCO17
from sapiens_accel.training import optim

LORA = LoraConfig(rank=3, alpha=4.5)
DORA = LoraConfig(rank=3, dora=True)
TARGET = torch.linspace(-1, 1, 2 * 17 * 16 * 12, dtype=torch.float64).view(2, 17, 16, 12)


def adapted(model: SapiensPose, lora: LoraConfig = LORA, frozen: tuple[str, ...] = ()) -> SapiensPose:
    """A copy with adapters, each of which changes the output."""
    model = deepcopy(model)
    model.freeze(frozen)
    torch.manual_seed(1)
    assert adapters.add(model, lora)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if adapters.is_adapter(name):
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def learned(model: SapiensPose) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def merged(base: SapiensPose, model: SapiensPose, lora: LoraConfig = LORA) -> SapiensPose:
    """A plain network of the merged weights."""
    plain = deepcopy(base)
    plain.load_state_dict(dict(adapters.Merged(base.state_dict(), learned(model), lora.scale)))
    return plain


def loss_of(model: SapiensPose, picture: Tensor) -> Tensor:
    maps = model(picture)
    return (maps - TARGET.to(maps.dtype)).square().mean()


@pytest.mark.parametrize(("target", "num"), [("attention", 16), ("all", None)])
def test_adapters_norms_and_head_learn_and_the_output_is_unchanged(
    tiny: SapiensPose, picture: Tensor, target: str, num: int | None
) -> None:
    before = tiny(picture)
    model = deepcopy(tiny)
    added = adapters.add(model, LoraConfig(rank=3, target=target))  # pyright: ignore[reportArgumentType]
    assert added == (num or {"sapiens": 24, "sapiens2": 28}[tiny.size.family])
    assert torch.equal(model(picture), before)
    for name, parameter in model.named_parameters():
        expected = adapters.is_adapter(name) or "norm" in name or name.startswith("head.")
        assert parameter.requires_grad == expected, name
    pairs = [name for name in learned(model) if ".lora_A." in name]
    assert len(pairs) == added
    groups = optim.param_groups(model.layer_groups(), OptimConfig(layer_decay=0.5))
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            block = int(name.split(".layer.")[1].split(".")[0])
            assert scale[id(parameter)] == 0.5 ** (4 - block)


def test_frozen_blocks_get_no_adapters_and_phase1_none_at_all(tiny: SapiensPose) -> None:
    model = adapted(tiny, frozen=("block_0", "block_2", "head"))
    blocks = {name.split(".layer.")[1][0] for name in learned(model) if ".layer." in name}
    assert blocks == {"1", "3"} and not any(name.startswith("head.") for name in learned(model))
    phase1 = deepcopy(tiny)
    phase1.freeze(("embeddings", "block_*", "norm"))
    assert adapters.add(phase1, LORA) == 0
    assert [*phase1.state_dict()] == [*tiny.state_dict()] and all(n.startswith("head.") for n in learned(phase1))


def test_gradients_are_those_of_the_matrices_by_the_chain_rule(tiny: SapiensPose, picture: Tensor) -> None:
    """W' = W + s B A: dA = s B^T dW', dB = s dW' A^T, with dW' by a plain network at W'."""
    base = tiny.double()
    model = adapted(base)
    plain = merged(base, model)
    loss_of(model, picture).backward()
    loss_of(plain, picture).backward()
    parameter: Any
    whole: dict[str, Any] = dict(plain.named_parameters())
    count = 0
    for name, parameter in model.named_parameters():
        if ".lora_A." in name:
            layer: Any = model.get_submodule(name.split(".lora_A.")[0])
            other = layer.lora_B["default"].weight
            gradient = whole[name.split(".lora_A.")[0] + ".weight"].grad
            assert torch.allclose(parameter.grad, 1.5 * other.T @ gradient, rtol=1e-9, atol=1e-15)
            assert torch.allclose(other.grad, 1.5 * gradient @ parameter.T, rtol=1e-9, atol=1e-15)
            assert gradient.abs().max() > 0
            count += 1
        elif parameter.requires_grad and ".lora_" not in name:
            assert torch.allclose(parameter.grad, whole[name].grad, rtol=1e-9, atol=1e-15), name
    assert count == len(adapters.find_targets(deepcopy(tiny), LORA))


def test_full_width_adapters_train_as_the_matrices_themselves(tiny: SapiensPose, picture: Tensor) -> None:
    """At the rank of the widest input, with A = 1 / s, W + s B A = W + B: the same AdamW steps, the same losses."""
    base, config = tiny.double(), OptimConfig(lr=1e-3, weight_decay=0.0, layer_decay=0.9)
    lora = LoraConfig(rank=512)
    model, full = deepcopy(base), deepcopy(base)
    adapters.add(model, lora)
    for name, parameter in model.named_parameters():
        if ".lora_A." in name:
            parameter.data.copy_(torch.eye(*parameter.shape) / lora.scale)
            parameter.requires_grad_(False)
    matrices = {f"{name}.weight" for name in adapters.find_targets(base, lora)}
    plain = {name.replace(".base_layer", "") for name in learned(model)}
    for name, parameter in full.named_parameters():
        parameter.requires_grad_(name in matrices or name in plain)

    def train(network: SapiensPose) -> Iterator[float]:
        optimizer = optim.adamw(optim.param_groups(network.layer_groups(), config), config, torch.device("cpu"))
        optim.set_lr(optimizer, config.lr)
        for _ in range(5):
            loss = loss_of(network, picture)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            yield loss.item()

    found, expected = [*train(model)], [*train(full)]
    assert expected[-1] < 0.9 * expected[0]
    assert found == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("lora", [LORA, DORA], ids=["lora", "dora"])
def test_merged_weights_give_the_same_maps_and_so_does_peft(
    tiny: SapiensPose, picture: Tensor, tmp_path: Path, lora: LoraConfig
) -> None:
    model = adapted(tiny, lora, frozen=("block_2",))
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.mul_(1.1)
        expected, other = model(picture), tiny(picture)
        assert (merged(tiny, model, lora)(picture) - expected).abs().max() < 1e-5 < 0.1 < (other - expected).abs().max()
    export.export(tmp_path / "base", tiny.state_dict(), tiny, COCO17, 2.0)
    adapters.write_folder(tmp_path / "adapter", learned(model), tiny, lora)
    auto = Sapiens2ForPoseEstimation if tiny.size.family == "sapiens2" else SapiensForPoseEstimation
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # peft warns of keys that are missing
        read = PeftModel.from_pretrained(auto.from_pretrained(tmp_path / "base"), str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        found = read(_normalize(picture)).heatmaps
    assert (found - expected).abs().max() < 1e-5


def test_the_folder_is_read_again_and_that_of_other_adapters_is_refused(tiny: SapiensPose, tmp_path: Path) -> None:
    model = adapted(tiny)
    adapters.write_folder(tmp_path, learned(model), tiny, LORA)
    again = adapted(tiny, frozen=())
    for parameter in again.parameters():
        parameter.data.mul_(2.0 if parameter.requires_grad else 1.0)
    adapters.load_folder(again, tmp_path)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    with pytest.raises(UserError, match=r"adapter_model\.safetensors: not what this stage learns .*lora, frozen"):
        adapters.load_folder(adapted(tiny, LoraConfig(rank=4)), tmp_path)


def test_a_base_of_16_bits_changes_nothing_under_autocast(tiny: SapiensPose, picture: Tensor) -> None:
    model = adapted(tiny)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = model(picture)
        adapters.keep_base_in(model, torch.bfloat16)
        assert torch.equal(model(picture), expected)
    dtypes = {p.dtype for name, p in model.named_parameters() if ".base_layer.weight" in name}
    assert dtypes == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def test_dropout_is_the_same_in_recomputed_blocks(tiny: SapiensPose, picture: Tensor) -> None:
    gradients = []
    for checkpointed in (0, 4):
        model = adapted(tiny, LoraConfig(rank=3, dropout=0.3)).train()
        model.lay_out(Layout(checkpointed_blocks=checkpointed))
        torch.manual_seed(5)
        loss_of(model, picture).backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))
    torch.manual_seed(6)
    assert not torch.equal(loss_of(model, picture), loss_of(model, picture))
    assert any(isinstance(module, nn.Dropout) and module.p == 0.3 for module in model.modules())
