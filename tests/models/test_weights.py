"""Weights of every published layout come in, tensor by tensor; what goes out is loaded by us and by transformers."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Sapiens2ForPoseEstimation

from sapiens_accel.errors import UserError
from sapiens_accel.models import export
from sapiens_accel.models import load as weights
from sapiens_accel.models.load import Report
from sapiens_accel.models.sapiens import SapiensPose, sapiens2_config
from sapiens_accel.pose.skeleton import COCO17

State = dict[str, Tensor]
HW = (64, 48)  # a grid of 4 x 3 patches
DEPTH, WIDTH = 4, 128
FAMILIES = ("sapiens_tiny", "sapiens2_tiny")
POSITIONS = "backbone.embeddings.position_embeddings"
PREDICTOR = {"sapiens_tiny": "head.final_layer", "sapiens2_tiny": "head.predictor"}


def _model(name: str, seed: int = 0, num_keypoints: int = 17, input_hw: tuple[int, int] = HW) -> SapiensPose:
    """Every tensor random and unlike every other, so that none can be taken for another."""
    model = SapiensPose(name, num_keypoints, input_hw)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, value in model.state_dict().items():
            value.copy_(torch.randn(value.shape, generator=generator) * 0.1)
            if key == POSITIONS:
                value[:, 0] = 0.0
    return model


def _state(model: SapiensPose) -> State:
    return {key: value.clone() for key, value in model.state_dict().items()}


def _assert_equal(ours: State, theirs: State, keys: list[str] | None = None) -> None:
    unequal = [key for key in (keys or theirs) if not torch.equal(ours[key], theirs[key])]
    assert unequal == []
    assert keys or list(ours) == list(theirs)


def _load(model: SapiensPose, path: Path) -> Report:
    report = weights.load(model, str(path))
    # Of the model's tensors each is in one list, and of the file's too.
    ours = [*report.loaded, *report.reshaped, *report.mapped, *report.reinitialized, *report.missing]
    assert sorted(ours) == sorted(model.state_dict())
    return report


def _sections(report: Report) -> dict[str, list[str]]:
    """Those with something in them."""
    names = ("loaded", "reshaped", "mapped", "reinitialized", "missing", "unused")
    return {name: sorted(getattr(report, name)) for name in names if getattr(report, name)}


def _pixels(num: int = 2) -> Tensor:
    return torch.randint(0, 256, (num, 3, *HW), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))


def _error(path: Path | str, *named: str, name: str = "sapiens_tiny") -> None:
    model = _model(name)
    before = _state(model)
    with pytest.raises(UserError) as caught:
        weights.load(model, str(path))
    text = str(caught.value)
    assert [word for word in (str(path), *named) if word not in text] == [], text
    assert "\n" not in text
    _assert_equal(_state(model), before)


# ---- Out, and in again


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_exported_loads_bit_equal(name: str, tmp_path: Path) -> None:
    source, target = _model(name, 1), _model(name, 2)
    export.export(tmp_path / "weights", _state(source), source, COCO17, 2.0)
    everything = sorted(source.state_dict())
    for reference in (tmp_path / "weights", tmp_path / "weights" / weights.FILE):
        report = _load(target, reference)
        assert _sections(report) == {"loaded": everything}
        _assert_equal(_state(target), _state(source))
        target = _model(name, 3)
    assert {value.dtype for value in load_file(tmp_path / "weights" / weights.FILE).values()} == {torch.float32}


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_written_beside_the_weights(name: str, tmp_path: Path) -> None:
    model = _model(name, input_hw=(128, 96))
    export.export(tmp_path, _state(model), model, COCO17, 1.5)
    ours = weights.description(tmp_path)
    assert (ours["name"], ours["num_keypoints"], ours["input_hw"]) == (name, 17, [128, 96])
    assert (ours["heatmap_hw"], ours["sigma"], ours["keypoints"]) == ([32, 24], 1.5, list(COCO17.names))
    preprocessor = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert preprocessor["size"] == {"height": 128, "width": 96}
    assert preprocessor["image_mean"] == pytest.approx([0.485, 0.456, 0.406], abs=1e-12)
    assert preprocessor["image_std"] == pytest.approx([0.229, 0.224, 0.225], abs=1e-12)


def test_the_config_names_keypoints_and_mirror_pairs(tmp_path: Path) -> None:
    model = _model("sapiens2_tiny")
    export.export(tmp_path, _state(model), model, COCO17, 2.0)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["id2label"] == {str(k): name for k, name in enumerate(COCO17.names)}
    assert config["label2id"] == {name: k for k, name in enumerate(COCO17.names)}
    assert config["flip_pairs"] == [[1, 2], [3, 4], [5, 6], [7, 8], [9, 10], [11, 12], [13, 14], [15, 16]]


def test_a_folder_of_somebody_else_is_no_description(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json"):
        weights.description(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="sapiens_accel"):
        weights.description(tmp_path)


# ---- Sapiens v1 as published


def _published_v1(state: State, positions: Tensor) -> State:
    """The names and shapes of facebookresearch/sapiens' backbone, written out by hand."""
    out = {"cls_token": torch.full((1, 1, WIDTH), 7.0), "pos_embed": positions}
    for part in ("weight", "bias"):
        out[f"patch_embed.projection.{part}"] = state[f"backbone.embeddings.patch_embeddings.projection.{part}"]
        out[f"ln1.{part}"] = state[f"backbone.layernorm.{part}"]
        for i in range(DEPTH):
            ours, theirs = f"backbone.encoder.layer.{i}", f"layers.{i}"
            out[f"{theirs}.ln1.{part}"] = state[f"{ours}.layernorm_before.{part}"]
            out[f"{theirs}.ln2.{part}"] = state[f"{ours}.layernorm_after.{part}"]
            qkv = [state[f"{ours}.attention.attention.{one}.{part}"] for one in ("query", "key", "value")]
            out[f"{theirs}.attn.qkv.{part}"] = torch.cat(qkv)
            out[f"{theirs}.attn.proj.{part}"] = state[f"{ours}.attention.output.dense.{part}"]
            out[f"{theirs}.ffn.layers.0.0.{part}"] = state[f"{ours}.mlp.fc1.{part}"]
            out[f"{theirs}.ffn.layers.1.{part}"] = state[f"{ours}.mlp.fc2.{part}"]
    return out


def _published_v1_pose(state: State) -> State:
    backbone = _published_v1(state, state[POSITIONS][:, 1:])
    del backbone["cls_token"]  # a published pose network has neither a class token nor its position
    head = {key: value for key, value in state.items() if key.startswith("head.")}
    names = {key.rsplit(".", 1)[0] for key in head}
    layers = ("deconv_layers.0", "deconv_layers.3", "conv_layers.0", "conv_layers.3", "final_layer")
    assert names == {f"head.{layer}" for layer in layers}
    return {f"backbone.{key}": value for key, value in backbone.items()} | head


def _save(tree: object, path: Path) -> Path:
    torch.save(tree, path)
    return path


def _square(with_class: bool, seed: int = 11) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((1, 25 + with_class, WIDTH), generator=generator)


def _resized(positions: Tensor) -> Tensor:
    """5 x 5 positions on the grid of 4 x 3, bicubic; slot 0 is VitPose's and stays empty."""
    grid = positions[:, -25:].reshape(1, 5, 5, WIDTH).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(4, 3), mode="bicubic", align_corners=False, antialias=False)
    return torch.cat([torch.zeros(1, 1, WIDTH), grid.permute(0, 2, 3, 1).reshape(1, 12, WIDTH)], dim=1)


def _flat(state: State) -> object:
    return state


def _of_mmengine(state: State) -> object:
    optimizer = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]}
    nested = {f"backbone.{key}": value for key, value in state.items()}
    return {"meta": {"epoch": 1600, "lr": np.float64(0.5)}, "state_dict": nested, "optimizer": optimizer}


@pytest.mark.parametrize("layout", [_flat, _of_mmengine])
@pytest.mark.parametrize("with_class", [True, False])
def test_a_v1_pretrained_file(tmp_path: Path, layout: Callable[[State], object], with_class: bool) -> None:
    source, target = _state(_model("sapiens_tiny", 1)), _model("sapiens_tiny", 2)
    random_head = {key: value for key, value in _state(target).items() if key.startswith("head.")}
    positions = _square(with_class)
    file = _save(layout(_published_v1(source, positions)), tmp_path / "pretrained.pth")
    report = _load(target, file)
    backbone = sorted(key for key in source if key.startswith("backbone.") and key != POSITIONS)
    assert _sections(report) == {
        "loaded": backbone,
        "reshaped": [POSITIONS],
        "missing": sorted(random_head),
    }
    loaded = _state(target)
    _assert_equal(loaded, source, backbone)
    _assert_equal(loaded, random_head, list(random_head))
    assert torch.equal(loaded[POSITIONS], _resized(positions))


@pytest.mark.parametrize("with_class", [False, True])
def test_a_v1_file_of_the_model_s_own_grid(tmp_path: Path, with_class: bool) -> None:
    # VitPose adds slot 0 to every position, so a class position must not end there.
    source = _state(_model("sapiens_tiny", 1))
    positions = source[POSITIONS][:, 1:]
    published = torch.cat([torch.ones(1, 1, WIDTH), positions], dim=1) if with_class else positions
    target = _model("sapiens_tiny", 2)
    _load(target, _save(_published_v1(source, published), tmp_path / "x.pth"))
    loaded = _state(target)[POSITIONS]
    assert torch.equal(loaded[:, 0], torch.zeros(1, WIDTH))
    assert torch.equal(loaded[:, 1:], positions)


@pytest.mark.parametrize("prefix", ["backbone.", ""])
def test_a_v1_pose_file(tmp_path: Path, prefix: str) -> None:
    source, target = _state(_model("sapiens_tiny", 1)), _model("sapiens_tiny", 2)
    published = _published_v1_pose(source)
    if not prefix:
        published = {key.removeprefix("backbone."): value for key, value in published.items()}
    meta = {
        "epoch": 210,
        "ap": np.float64(0.82),
        "num": np.int64(3),
        "sigmas": np.array([0.026, 0.025]),
        "pairs": np.array([[1, 2], [3, 4]]),
        "classes": ("person",),
    }
    file = _save({"meta": meta, "state_dict": published}, tmp_path / "pose.pth")
    report = _load(target, file)
    assert _sections(report) == {"loaded": sorted(source)}
    _assert_equal(_state(target), source)
    original = SapiensPose("sapiens_tiny", 17, HW).eval()
    original.load_state_dict(source)
    with torch.no_grad():
        assert (target.eval()(_pixels()) - original(_pixels())).abs().max() < 1e-4


def test_a_v1_pose_file_on_another_input_size(tmp_path: Path) -> None:
    source = _state(_model("sapiens_tiny", 1))
    target = _model("sapiens_tiny", 2, input_hw=(128, 96))
    file = _save({"state_dict": _published_v1_pose(source)}, tmp_path / "pose.pth")
    assert _load(target, file).reshaped == [POSITIONS]
    grid = source[POSITIONS][:, 1:].reshape(1, 4, 3, WIDTH).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(8, 6), mode="bicubic", align_corners=False)
    assert torch.equal(_state(target)[POSITIONS][:, 1:], grid.permute(0, 2, 3, 1).reshape(1, 48, WIDTH))


def test_our_own_v1_export_on_another_input_size(tmp_path: Path) -> None:
    source = _model("sapiens_tiny", 1)
    export.export(tmp_path, _state(source), source, COCO17, 2.0)
    target = _model("sapiens_tiny", 2, input_hw=(128, 96))
    report = _load(target, tmp_path)
    assert (report.reshaped, report.reinitialized, report.unused) == ([POSITIONS], [], [])
    grid = _state(source)[POSITIONS][:, 1:].reshape(1, 4, 3, WIDTH).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(8, 6), mode="bicubic", align_corners=False)
    loaded = _state(target)[POSITIONS]
    assert torch.equal(loaded[:, 1:], grid.permute(0, 2, 3, 1).reshape(1, 48, WIDTH))
    assert not loaded[:, 0].any()


# ---- Sapiens2 as published


def _published_v2(state: State) -> State:
    """The names of facebookresearch/sapiens2, written out by hand."""
    out = {
        "cls_token": state["backbone.embeddings.cls_token"],
        "storage_tokens": state["backbone.embeddings.register_tokens"],
        "rope_embed.periods": torch.linspace(1, 2, 8),
        "patch_embed.projection.weight": state["backbone.embeddings.patch_embeddings.weight"],
        "patch_embed.projection.bias": state["backbone.embeddings.patch_embeddings.bias"],
        "ln1.weight": state["backbone.norm.weight"],
    }
    for i in range(DEPTH):
        ours, theirs = f"backbone.model.layer.{i}", f"blocks.{i}"
        for norm, number in (("ln1", 1), ("ln2", 2)):
            out[f"{theirs}.{norm}.weight"] = state[f"{ours}.norm{number}.weight"]
        for theirs_name, name in (("wq", "q_proj"), ("wk", "k_proj"), ("wv", "v_proj"), ("proj", "o_proj")):
            for part in ("weight", "bias"):
                out[f"{theirs}.attn.{theirs_name}.{part}"] = state[f"{ours}.attention.{name}.{part}"]
        for norm in ("q_norm", "k_norm"):
            out[f"{theirs}.attn.{norm}.weight"] = state[f"{ours}.attention.{norm}.weight"]
        out[f"{theirs}.attn.gamma.weight"] = state[f"{ours}.layer_scale1.lambda1"]
        for part in ("weight", "bias"):
            halves = [state[f"{ours}.mlp.{half}.{part}"] for half in ("gate_proj", "up_proj")]
            out[f"{theirs}.ffn.w12.{part}"] = torch.cat(halves)
            out[f"{theirs}.ffn.w3.{part}"] = state[f"{ours}.mlp.down_proj.{part}"]
    return out


def _published_v2_head(state: State) -> State:
    out = {}
    for theirs, i in (("deconv_layers.0", 0), ("deconv_layers.3", 1)):
        out[f"decode_head.{theirs}.weight"] = state[f"head.upsample_layers.{i}.convolution.weight"]
    for part in ("weight", "bias"):
        for theirs, i in (("conv_layers.0", 0), ("conv_layers.3", 1), ("conv_layers.6", 2)):
            out[f"decode_head.{theirs}.{part}"] = state[f"head.conv_layers.{i}.convolution.{part}"]
        out[f"decode_head.conv_pose.{part}"] = state[f"head.predictor.{part}"]
    return out


def _save_tensors(state: State, path: Path) -> Path:
    save_file({key: value.contiguous() for key, value in state.items()}, path, metadata={"format": "pt"})
    return path


@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_a_sapiens2_pretrained_file(tmp_path: Path, prefix: str) -> None:
    source, target = _state(_model("sapiens2_tiny", 1)), _model("sapiens2_tiny", 2)
    random_head = {key: value for key, value in _state(target).items() if key.startswith("head.")}
    published = {f"{prefix}{key}": value for key, value in _published_v2(source).items()}
    report = _load(target, _save_tensors(published, tmp_path / "pretrained.safetensors"))
    backbone = sorted(key for key in source if key.startswith("backbone."))
    assert _sections(report) == {
        "loaded": backbone,
        "missing": sorted(random_head),
    }
    _assert_equal(_state(target), source, backbone)
    _assert_equal(_state(target), random_head, list(random_head))


@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_a_sapiens2_pose_file_is_what_transformers_makes_of_it(tmp_path: Path, prefix: str) -> None:
    model = _model("sapiens2_tiny", 1)
    source, target = _state(model), _model("sapiens2_tiny", 2)
    published = {f"{prefix}{key}": value for key, value in _published_v2(source).items()} | _published_v2_head(source)
    report = _load(target, _save_tensors(published, tmp_path / weights.FILE))
    assert _sections(report) == {"loaded": sorted(source)}
    _assert_equal(_state(target), source)
    if prefix:  # the form whose whole names transformers' conversion knows
        sapiens2_config(model.size, 17, HW).save_pretrained(tmp_path)
        theirs, info = Sapiens2ForPoseEstimation.from_pretrained(tmp_path, output_loading_info=True)
        assert not info["missing_keys"] and not info["mismatched_keys"]
        reference = {_ours(key): value for key, value in theirs.state_dict().items()}
        _assert_equal(_state(target), reference)


def _ours(key: str) -> str:
    group, rest = key.split(".", 1)
    return ".".join([{"model": "backbone", "decode_head": "head"}[group], rest])


# ---- Heads, and files that do not fit


@pytest.mark.parametrize("name", FAMILIES)
def test_another_number_of_keypoints_starts_the_predictor_anew_and_nothing_else(name: str, tmp_path: Path) -> None:
    source, target = _model(name, 1, num_keypoints=21), _model(name, 2)
    fresh = _state(target)
    export.export(tmp_path, _state(source), source, COCO17, 2.0)
    report = _load(target, tmp_path)
    predictor = sorted(f"{PREDICTOR[name]}.{part}" for part in ("weight", "bias"))
    others = sorted(set(fresh) - set(predictor))
    assert _sections(report) == {"loaded": others, "reinitialized": predictor, "unused": predictor}
    _assert_equal(_state(target), _state(source), others)
    _assert_equal(_state(target), fresh, predictor)


def test_a_published_v1_head_of_another_size_keeps_what_fits(tmp_path: Path) -> None:
    source, target = _state(_model("sapiens_tiny", 1, num_keypoints=133)), _model("sapiens_tiny", 2)
    report = _load(target, _save({"state_dict": _published_v1_pose(source)}, tmp_path / "wholebody.pth"))
    assert sorted(report.reinitialized) == sorted(report.unused) == ["head.final_layer.bias", "head.final_layer.weight"]
    assert "head.deconv_layers.3.weight" in report.loaded


@pytest.mark.parametrize("lost", ["layers.2.attn.qkv.weight", "patch_embed.projection.bias", "ln1.weight", "pos_embed"])
def test_a_missing_backbone_tensor_is_named(tmp_path: Path, lost: str) -> None:
    published = _published_v1(_state(_model("sapiens_tiny", 1)), _square(True))
    del published[lost]
    ours = {
        "layers.2.attn.qkv.weight": "backbone.encoder.layer.2.attention.attention.query.weight",
        "patch_embed.projection.bias": "backbone.embeddings.patch_embeddings.projection.bias",
        "ln1.weight": "backbone.layernorm.weight",
        "pos_embed": POSITIONS,
    }
    _error(_save(published, tmp_path / "x.pth"), ours[lost], "sapiens_tiny")


def test_a_missing_sapiens2_tensor_is_named(tmp_path: Path) -> None:
    published = _published_v2(_state(_model("sapiens2_tiny", 1)))
    del published["blocks.3.ffn.w12.weight"]
    file = _save_tensors(published, tmp_path / "x.safetensors")
    _error(file, "backbone.model.layer.3.mlp.gate_proj.weight", "2 backbone tensors", name="sapiens2_tiny")


@pytest.mark.parametrize("kind", [torch.int8, torch.bool, torch.float8_e4m3fn, torch.complex64])
def test_values_of_another_type_are_refused(tmp_path: Path, kind: torch.dtype) -> None:
    """Those of quantized weights loaded as numbers up to 127, and the network was garbage; fp8 was a traceback."""
    model = _model("sapiens_tiny")
    state = _state(model)
    state["head.final_layer.weight"] = state["head.final_layer.weight"].to(kind)
    save_file(state, tmp_path / "model.safetensors")
    named = rf"'head\.final_layer\.weight' is of type {str(kind)[6:]} \(expected one of float64, float32"
    with pytest.raises(UserError, match=named):
        weights.load(model, str(tmp_path / "model.safetensors"))
    for float_kind in (torch.float64, torch.float16, torch.bfloat16):
        save_file({key: value.to(float_kind) for key, value in state.items()}, tmp_path / "model.safetensors")
        weights.load(model, str(tmp_path / "model.safetensors"))


def test_a_file_of_another_network_is_refused(tmp_path: Path) -> None:
    published = _published_v1(_state(_model("sapiens_tiny", 1)), _square(True))
    _error(_save(published, tmp_path / "v1.pth"), "sapiens2_tiny", name="sapiens2_tiny")
    wider = {key: torch.cat([value, value], dim=-1) for key, value in published.items()}
    _error(_save(wider, tmp_path / "wide.pth"), "backbone.")


class Evil:
    """Unpickling it would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_pickle_is_not_executed(tmp_path: Path) -> None:
    published: dict[str, Any] = _published_v1(_state(_model("sapiens_tiny", 1)), _square(True))
    trap = tmp_path / "executed"
    for number, tree in enumerate((published | {"meta": Evil(trap)}, {"state_dict": published, "hook": Evil(trap)})):
        _error(_save(tree, tmp_path / f"{number}.pth"), "not a file of plain tensors")
    plain = tmp_path / "plain.pkl"
    plain.write_bytes(pickle.dumps(Evil(trap)))
    _error(plain, "not a file of plain tensors")
    assert not trap.exists()
    pickle.loads(plain.read_bytes())
    assert trap.exists(), "the trap works"


def test_a_missing_file_or_an_empty_folder_is_named(tmp_path: Path) -> None:
    _error(tmp_path / "nothing.pth", "no such file")
    _error(tmp_path, weights.FILE)


def test_a_broken_pth_is_named(tmp_path: Path) -> None:
    whole = _save(_published_v1(_state(_model("sapiens_tiny", 1)), _square(True)), tmp_path / "whole.pth")
    cut = tmp_path / "cut.pth"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    _error(cut)
    garbage = tmp_path / "garbage.pth"
    garbage.write_bytes(np.random.default_rng(0).bytes(5000))
    _error(garbage)


def test_a_broken_safetensors_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "garbage.safetensors").write_bytes(np.random.default_rng(0).bytes(5000))
    _error(tmp_path / "garbage.safetensors")


@pytest.mark.parametrize(
    "tree",
    [
        pytest.param([torch.zeros(3)], id="list"),
        pytest.param(torch.zeros(3), id="tensor"),
        pytest.param({"state_dict": [1]}, id="state_dict is a list"),
    ],
)
def test_a_pth_of_something_else_is_named(tmp_path: Path, tree: object) -> None:
    _error(_save(tree, tmp_path / "else.pth"))


def test_the_stage_before_is_the_starting_point(tmp_path: Path) -> None:
    model = _model("sapiens_tiny")
    assert weights.starting_point(tmp_path, "ssl") is None
    for stage in ("phase1", "phase2"):
        export.export(tmp_path / stage / "weights", _state(model), model, COCO17, 2.0)
        assert weights.starting_point(tmp_path, "ssl") == str(tmp_path / stage / "weights")
    assert weights.starting_point(tmp_path, "phase2") == str(tmp_path / "phase1" / "weights")
    assert weights.starting_point(tmp_path, "phase1") is None


def test_the_report_is_reported_in_a_few_lines(tmp_path: Path) -> None:
    published = _published_v1(_state(_model("sapiens_tiny", 1)), _square(True))
    lines = str(_load(_model("sapiens_tiny"), _save(published, tmp_path / "x.pth"))).splitlines()
    assert lines[0] == f"weights from {tmp_path / 'x.pth'}"
    # 4 blocks of 16 tensors, the patch's 2 and the last norm's 2; 8 tensors of the head.
    assert [line.split()[:2] for line in lines[1:]] == [
        ["loaded", "68"], ["reshaped", "1"], ["missing", "8"],
    ]  # fmt: skip
