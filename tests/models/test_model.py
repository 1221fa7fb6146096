from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import Sapiens2Config, Sapiens2ForPoseEstimation

from sapiens_accel.config.schema import STAGES, Config, LoraConfig, OptimConfig
from sapiens_accel.errors import UserError
from sapiens_accel.memory.activations import LiveBytes
from sapiens_accel.models import adapters
from sapiens_accel.models.sapiens import SIZES, Layout, SapiensPose
from sapiens_accel.training import optim

PHASE1 = ("embeddings", "block_*", "norm")

# From the published checkpoints and configs, with 17 keypoints in the head, at 1024x768.
HEADS = {
    "sapiens_0.3b": 23_214_353,
    "sapiens_0.6b": 26_360_081,
    "sapiens_1b": 29_505_809,
    "sapiens_2b": 34_224_401,
    "sapiens2_0.4b": 30_152_209,
    "sapiens2_0.8b": 34_346_513,
    "sapiens2_1b": 64_231_185,
    "sapiens2_5b": 53_220_881,
}
BACKBONES = {
    "sapiens_0.3b": 306_244_608,
    "sapiens_0.6b": 634_597_120,
    "sapiens_1b": 1_139_163_648,
    "sapiens_2b": 2_131_943_040,
    "sapiens2_0.1b": 113_993_472,
    "sapiens2_0.4b": 395_450_368,
    "sapiens2_0.8b": 814_283_520,
    "sapiens2_1b": 1_455_474_176,
    "sapiens2_5b": 5_066_902_976,
}


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _on_meta(name: str, input_hw: tuple[int, int]) -> SapiensPose:
    with torch.device("meta"):
        return SapiensPose(name, 17, input_hw)


def _gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


# ---- Sizes


@pytest.mark.parametrize("name", sorted(BACKBONES))
def test_parameter_counts_are_the_published_ones(name: str) -> None:
    model = _on_meta(name, (1024, 768))
    # VitPose adds one position slot that Sapiens does not have.
    extra = model.size.width if model.size.family == "sapiens" else 0
    assert _count(model.backbone) - extra == BACKBONES[name]
    if name in HEADS:
        assert _count(model.head) == HEADS[name]
    assert model.heatmap_hw == (256, 192)


def test_every_size_is_counted_or_tiny() -> None:
    assert set(SIZES) - set(BACKBONES) == {"sapiens_tiny", "sapiens2_tiny"}


def test_every_recipe_builds_and_its_heatmap_is_a_quarter_of_its_input(recipes: dict[str, Config]) -> None:
    for run in recipes.values():
        _check_build(run)


def _check_build(run: Config) -> None:
    model = _on_meta(run.model.name, run.data.input_hw)
    assert model.heatmap_hw == (run.data.input_hw[0] // 4, run.data.input_hw[1] // 4)
    for stage in STAGES:
        model.freeze(run.get_stage(stage).frozen)


def test_the_heatmap_has_the_size_it_claims(tiny: SapiensPose, picture: Tensor) -> None:
    assert tiny(picture).shape == (2, 17, *tiny.heatmap_hw) == (2, 17, 16, 12)


def test_an_unknown_size_and_an_untileable_input_are_named() -> None:
    with pytest.raises(UserError, match=r"sapiens_9b.*sapiens_1b"):
        SapiensPose("sapiens_9b", 17, (64, 48))
    with pytest.raises(UserError, match="64x50"):
        SapiensPose("sapiens_tiny", 17, (64, 50))


# ---- Layer groups and freezing


def test_layer_groups_are_an_ordered_complete_disjoint_partition(tiny: SapiensPose) -> None:
    groups = tiny.layer_groups()
    assert list(groups) == ["embeddings", "block_0", "block_1", "block_2", "block_3", "norm", "head"]
    members = [name for group in groups.values() for name, _ in group]
    parameters = dict(tiny.named_parameters())
    assert sorted(members) == sorted(parameters), "each exactly once"
    assert all(parameter is parameters[name] for group in groups.values() for name, parameter in group)
    assert all(groups.values())
    assert {name for name, _ in groups["head"]} == {name for name in parameters if name.startswith("head.")}
    for i in range(4):
        assert {name for name, _ in groups[f"block_{i}"]} == {name for name in parameters if f".layer.{i}." in name}
    final_norm = {"sapiens": "backbone.layernorm.", "sapiens2": "backbone.norm."}[tiny.size.family]
    assert all(name.startswith(final_norm) for name, _ in groups["norm"])
    assert all(name.startswith("backbone.embeddings.") for name, _ in groups["embeddings"])


def _groups_from_modules(model: SapiensPose) -> dict[str, set[int]]:
    """By where the parameters sit in the module tree, not by name."""
    v1 = model.size.family == "sapiens"
    backbone = model.backbone
    blocks = backbone.encoder.layer if v1 else backbone.model.layer
    modules = {"embeddings": backbone.embeddings, **{f"block_{i}": block for i, block in enumerate(blocks)}}
    modules |= {"norm": backbone.layernorm if v1 else backbone.norm, "head": model.head}
    return {name: {id(parameter) for parameter in module.parameters()} for name, module in modules.items()}


@pytest.mark.parametrize("name", ["sapiens_2b", "sapiens2_5b"])
def test_layer_groups_of_deep_networks_follow_the_modules(name: str) -> None:
    """More than ten blocks: block_1 is not block_10."""
    model = _on_meta(name, (512, 384))
    groups = {group: {id(p) for _, p in members} for group, members in model.layer_groups().items()}
    assert groups == _groups_from_modules(model)


def test_phase1_leaves_exactly_the_head(tiny: SapiensPose) -> None:
    tiny.freeze(PHASE1)
    learning = {name for name, parameter in tiny.named_parameters() if parameter.requires_grad}
    assert learning == {f"head.{name}" for name, _ in tiny.head.named_parameters()}


def test_freeze_forgets_what_was_frozen_before(tiny: SapiensPose) -> None:
    tiny.freeze(PHASE1)
    tiny.freeze(("block_0", "embeddings"))
    frozen = {name for name, parameter in tiny.named_parameters() if not parameter.requires_grad}
    groups = tiny.layer_groups()
    assert frozen == {name for group in ("embeddings", "block_0") for name, _ in groups[group]}
    tiny.freeze(())
    assert all(parameter.requires_grad for parameter in tiny.parameters())


def test_a_pattern_without_a_match_is_named_and_freezing_everything_is_refused(tiny: SapiensPose) -> None:
    with pytest.raises(UserError, match=r"'blocks_\*'.*block_0"):
        tiny.freeze(("embeddings", "blocks_*"))
    with pytest.raises(UserError, match="nothing to learn"):
        tiny.freeze(("*",))
    with pytest.raises(UserError, match="nothing to learn"):
        tiny.freeze((*PHASE1, "head"))


def test_a_frozen_backbone_gets_no_gradient_and_changes_no_output(tiny: SapiensPose, picture: Tensor) -> None:
    free = tiny(picture)
    expected = torch.autograd.grad(free.square().sum(), list(tiny.head.parameters()))
    tiny.freeze(PHASE1)
    frozen = tiny(picture)
    assert torch.equal(free, frozen)
    frozen.square().sum().backward()
    assert all(parameter.grad is None for parameter in tiny.backbone.parameters())
    assert all(torch.equal(p.grad, gradient) for p, gradient in zip(tiny.head.parameters(), expected, strict=True))


def test_features_carry_a_graph_only_where_the_backbone_learns(tiny: SapiensPose, picture: Tensor) -> None:
    graphs: list[bool] = []
    tiny.head.register_forward_pre_hook(lambda _, inputs: graphs.append(inputs[0].requires_grad))
    assert tiny(picture).requires_grad
    with torch.no_grad():
        assert not tiny(picture).requires_grad
    tiny.freeze(PHASE1)
    assert tiny(picture).requires_grad, "the head learns"
    tiny.freeze(("embeddings", "block_[0-2]"))
    assert tiny(picture).requires_grad
    assert graphs == [True, False, False, True]


# ---- Gradient checkpointing


def _blocks(model: SapiensPose) -> nn.ModuleList:
    return model.backbone.encoder.layer if model.size.family == "sapiens" else model.backbone.model.layer


def _step(model: SapiensPose, picture: Tensor) -> tuple[Tensor, dict[str, Tensor | None], int]:
    """Output, gradients, and how often a block ran."""
    runs: list[None] = []
    for block in _blocks(model):
        next(block.children()).register_forward_hook(lambda *_: runs.append(None))
    output = model.train()(picture)
    output.square().sum().backward()
    return output.detach(), _gradients(model), len(runs)


def _checkpointed(name: str) -> SapiensPose:
    model = SapiensPose(name, 17, (64, 48))
    model.lay_out(Layout(checkpointed_blocks=4))
    return model


def test_only_the_first_blocks_are_checkpointed(tiny: SapiensPose, picture: Tensor) -> None:
    for checkpointed in range(5):
        tiny.lay_out(Layout(checkpointed_blocks=checkpointed))
        runs = [[] for _ in tiny.blocks]
        hooks = [
            next(block.children()).register_forward_hook(lambda *_, mine=mine: mine.append(None))
            for block, mine in zip(tiny.blocks, runs, strict=True)
        ]
        tiny.train()(picture).sum().backward()
        assert [len(mine) for mine in runs] == [2] * checkpointed + [1] * (4 - checkpointed)
        for hook in hooks:
            hook.remove()


def test_gradient_checkpointing_computes_blocks_twice_and_the_same_gradients(
    tiny: SapiensPose, picture: Tensor
) -> None:
    checkpointed = _checkpointed(tiny.name)
    checkpointed.load_state_dict(tiny.state_dict())
    output, gradients, runs = _step(tiny.double(), picture)
    again, same, runs_checkpointed = _step(checkpointed.double(), picture)
    assert (runs, runs_checkpointed) == (4, 8)
    torch.testing.assert_close(again, output, rtol=1e-12, atol=1e-12)
    for name, gradient in gradients.items():
        assert gradient is not None and gradient.any(), name
        torch.testing.assert_close(same[name], gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rank", [None, 2])
def test_selectively_checkpointed_blocks_compute_no_large_product_twice(
    tiny: SapiensPose, picture: Tensor, rank: int | None
) -> None:
    """The same loss and gradients to the bit; of adapters only their small products are computed again."""
    adapters.add(tiny, LoraConfig(rank=rank))
    flops, gradients = {}, {}
    layouts = {"whole": Layout(), "selective": Layout(selective_blocks=4), "full": Layout(checkpointed_blocks=4)}
    for name, layout in {**layouts, "mixed": Layout(checkpointed_blocks=1, selective_blocks=2)}.items():
        tiny.lay_out(layout)
        tiny.zero_grad()
        with FlopCounterMode(display=False) as counter, LiveBytes(tiny.parameters(), tiny.buffers()) as live:
            loss = tiny.train()(picture).square().sum()
            stored = live.now
            loss.backward()
        flops[name], gradients[name] = counter.get_total_flops(), [loss, *(p.grad for p in tiny.parameters())]
        layouts[name] = stored
    for others in (gradients[name] for name in ("selective", "full", "mixed")):
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(gradients["whole"], others, strict=True))
    assert flops["whole"] <= flops["selective"] <= flops["whole"] * (1 if rank is None else 1.05)
    assert flops["full"] > 1.1 * flops["whole"]
    assert layouts["full"] < layouts["mixed"] and layouts["selective"] < 0.85 * layouts["whole"]


@pytest.mark.slow
def test_compiled_blocks_compute_the_same(picture: Tensor) -> None:
    """Checkpointed and whole; and the weights keep their names."""
    torch.manual_seed(0)
    plain = SapiensPose("sapiens_tiny", 17, (64, 48), depth=2)
    compiled = SapiensPose("sapiens_tiny", 17, (64, 48), depth=2)
    compiled.load_state_dict(plain.state_dict())
    compiled.lay_out(Layout(checkpointed_blocks=1, compiled=True))
    for model in (plain, compiled):
        model.train()(picture).square().sum().backward()
    assert list(compiled.state_dict()) == list(plain.state_dict())
    same, expected = (torch.cat([p.grad.flatten() for p in m.parameters()]) for m in (compiled, plain))
    assert (same - expected).norm() < 1e-5 * expected.norm()


def test_a_frozen_backbone_is_not_computed_twice(tiny: SapiensPose, picture: Tensor) -> None:
    checkpointed = _checkpointed(tiny.name)
    checkpointed.freeze(PHASE1)
    assert _step(checkpointed, picture)[2] == 4


def test_checkpointing_with_the_bottom_frozen_gives_the_gradients_of_the_rest(
    tiny: SapiensPose, picture: Tensor
) -> None:
    """The reentrant kind would give none: the first checkpointed input needs no gradient."""
    checkpointed = _checkpointed(tiny.name)
    checkpointed.load_state_dict(tiny.state_dict())
    for model in (tiny.double(), checkpointed.double()):
        model.freeze(("embeddings", "block_0"))
    _, gradients, _ = _step(tiny, picture)
    _, same, _ = _step(checkpointed, picture)
    frozen = {name for group in ("embeddings", "block_0") for name, _ in tiny.layer_groups()[group]}
    for name, gradient in gradients.items():
        assert (gradient is None) == (name in frozen)
        torch.testing.assert_close(same[name], gradient, rtol=1e-9, atol=1e-12)


# ---- What it computes


def _normalised(picture: Tensor) -> Tensor:
    mean = torch.tensor([123.675, 116.28, 103.53]).view(3, 1, 1)
    std = torch.tensor([58.395, 57.12, 57.375]).view(3, 1, 1)
    return (picture.float() - mean) / std


def test_images_are_normalized_by_the_imagenet_constants(tiny: SapiensPose, picture: Tensor) -> None:
    """The bare transformers backbone, fed with (x - mean) / std, then the head."""
    pixels = _normalised(picture)
    if tiny.size.family == "sapiens":
        tokens = tiny.backbone(pixels).feature_maps[-1]
    else:
        tokens = tiny.backbone(pixels).last_hidden_state[:, 1 + 8 :]  # after the class and 8 register tokens
    expected = tiny.head(tokens.transpose(1, 2).reshape(2, 128, 4, 3))
    assert expected.std() > 0.1
    torch.testing.assert_close(tiny(picture), expected, rtol=0, atol=1e-5)


def _sapiens_forward(state: dict[str, Tensor], pixels: Tensor, depth: int, heads: int) -> Tensor:
    """Sapiens v1 from its description alone, in plain torch."""
    x = F.conv2d(
        pixels,
        state["backbone.embeddings.patch_embeddings.projection.weight"],
        state["backbone.embeddings.patch_embeddings.projection.bias"],
        stride=16,
        padding=2,
    )
    grid_hw = x.shape[-2:]
    x = x.flatten(2).transpose(1, 2) + state["backbone.embeddings.position_embeddings"][:, 1:]
    for i in range(depth):
        x = _sapiens_block(_under(state, f"backbone.encoder.layer.{i}."), x, heads)
    x = _layer_norm(_under(state, "backbone.layernorm."), x)
    return _sapiens_head(_under(state, "head."), x.transpose(1, 2).unflatten(2, grid_hw))


@pytest.mark.parametrize("grid_hw", [(4, 3), (8, 6)])
def test_positions_start_as_those_of_masked_autoencoders(grid_hw: tuple[int, int]) -> None:
    """He et al., pos_embed.py, row by row: sines and cosines of the column, then of the row."""
    positions = SapiensPose(
        "sapiens_tiny", 17, (16 * grid_hw[0], 16 * grid_hw[1])
    ).backbone.embeddings.position_embeddings
    quarter = 128 // 4
    for token, (row, column) in enumerate(np.ndindex(*grid_hw)):
        angles = [[place / 10000 ** (i / quarter) for i in range(quarter)] for place in (column, row)]
        expected = np.concatenate([wave(angle) for angle in angles for wave in (np.sin, np.cos)])
        np.testing.assert_allclose(positions[0, 1 + token].detach().numpy(), expected, rtol=0, atol=1e-5)


def _under(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _layer_norm(state: dict[str, Tensor], x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], state["weight"], state["bias"], eps=1e-6)


def _linear(state: dict[str, Tensor], name: str) -> Callable[[Tensor], Tensor]:
    return lambda x: F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def _sapiens_block(state: dict[str, Tensor], x: Tensor, heads: int) -> Tensor:
    h = _layer_norm(_under(state, "layernorm_before."), x)
    q, k, v = (
        _linear(state, f"attention.attention.{name}")(h).unflatten(-1, (heads, -1)).transpose(1, 2)
        for name in ("query", "key", "value")
    )
    attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    x = x + _linear(state, "attention.output.dense")(attended)
    h = _layer_norm(_under(state, "layernorm_after."), x)
    return x + _linear(state, "mlp.fc2")(F.gelu(_linear(state, "mlp.fc1")(h)))


def _sapiens_head(state: dict[str, Tensor], x: Tensor) -> Tensor:
    for i in (0, 3):
        x = F.conv_transpose2d(x, state[f"deconv_layers.{i}.weight"], stride=2, padding=1)
        x = F.silu(F.instance_norm(x, eps=1e-5))
    for i in (0, 3):
        x = F.conv2d(x, state[f"conv_layers.{i}.weight"], state[f"conv_layers.{i}.bias"])
        x = F.silu(F.instance_norm(x, eps=1e-5))
    return F.conv2d(x, state["final_layer.weight"], state["final_layer.bias"])


@pytest.mark.parametrize("tiny", ["sapiens_tiny"], indirect=True)
def test_sapiens_is_its_description(tiny: SapiensPose, picture: Tensor) -> None:
    """In float64, where a LayerNorm's epsilon of 1e-5 would show; then in float32."""
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        state = tiny.to(dtype).state_dict()
        expected = _sapiens_forward(state, _normalised(picture).to(dtype), depth=4, heads=4)
        assert expected.std() > 0.1
        for model in (tiny.train(), tiny.eval()):
            torch.testing.assert_close(model(picture), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("tiny", ["sapiens2_tiny"], indirect=True)
def test_sapiens2_is_transformers_pose_network(tiny: SapiensPose, picture: Tensor) -> None:
    head = {"upsample_out_channels": [64, 64], "conv_out_channels": [64, 64, 32]}
    theirs = Sapiens2ForPoseEstimation(
        Sapiens2Config(
            image_size=[64, 48],
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_attention_heads=2,
            num_labels=17,
            head_config=head,
        )
    )
    renamed = {
        name.replace("backbone.", "model.", 1).replace("head.", "decode_head.", 1): value
        for name, value in tiny.state_dict().items()
    }
    theirs.load_state_dict(renamed, strict=True)
    expected = theirs.eval()(_normalised(picture)).heatmaps
    assert expected.std() > 0.1
    torch.testing.assert_close(tiny.eval()(picture), expected, rtol=0, atol=1e-6)


def test_training_mode_computes_what_evaluation_mode_does(tiny: SapiensPose, picture: Tensor) -> None:
    """transformers rescales Sapiens2's positions at random in training, unless told not to."""
    expected = tiny.eval()(picture)
    for _ in range(3):
        assert torch.equal(tiny.train()(picture), expected)


@pytest.mark.parametrize("tiny", ["sapiens_tiny"], indirect=True)
def test_the_position_slot_that_sapiens_does_not_have_stays_0(tiny: SapiensPose, picture: Tensor) -> None:
    plan = OptimConfig(lr=1e-2, weight_decay=0.1)
    optimizer = optim.adamw(optim.param_groups(tiny.layer_groups(), plan), plan, torch.device("cpu"))
    positions = tiny.backbone.embeddings.position_embeddings
    before = positions.detach().clone()
    assert not before[:, 0].any()
    for _ in range(3):
        tiny(picture).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(positions[:, 0], torch.zeros(1, 128))
    assert (positions[:, 1:] != before[:, 1:]).all()


def test_a_bf16_network_takes_uint8_and_normalises_in_fp32(tiny: SapiensPose, picture: Tensor) -> None:
    """An engine casts the whole module; 255 / std in bf16 would be wrong by up to 0.4 %."""
    seen: list[Tensor] = []
    tiny.bfloat16().backbone.embeddings.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    heatmaps = tiny(picture)
    assert heatmaps.dtype == torch.bfloat16 and heatmaps.isfinite().all()
    assert len(seen) == 1 and torch.equal(seen[0], _normalised(picture).bfloat16())


def test_description_rebuilds_the_network(tiny: SapiensPose) -> None:
    described = tiny.description()
    rebuilt = SapiensPose(described["name"], described["num_keypoints"], tuple(described["input_hw"]))
    rebuilt.load_state_dict(tiny.state_dict(), strict=True)
    assert rebuilt.heatmap_hw == tiny.heatmap_hw


@pytest.mark.parametrize("tiny", ["sapiens_tiny", "sapiens2_tiny"], indirect=True)
def test_no_random_state_is_kept_for_checkpointed_blocks(
    tiny: SapiensPose, picture: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be read at every block, and set again in the backward; nothing in a block is random."""
    rates = {name: rate for name, rate in tiny.backbone.config.to_dict().items() if "drop" in name}
    assert len(rates) == 2 and not any(rates.values())
    tiny.lay_out(Layout(checkpointed_blocks=4))

    def refuse(*_: object) -> None:
        raise AssertionError("the state of a generator was read or set")

    for name in ("get_rng_state", "set_rng_state"):
        monkeypatch.setattr(torch, name, refuse)
    tiny.train()(picture).square().sum().backward()
