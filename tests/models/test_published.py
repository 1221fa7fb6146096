"""Files as published: every name and shape, what the network computes, whose keypoints, what is refused."""

import io
import json
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

import native
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from sapiens_accel.errors import UserError
from sapiens_accel.models import checkpoint_formats as published
from sapiens_accel.models import export
from sapiens_accel.models import load as weights
from sapiens_accel.models.load import POSITIONS
from sapiens_accel.models.sapiens import SIZES, SapiensPose, Size, sapiens2_config
from sapiens_accel.pose.skeleton import COCO17, SAPIENS308, WHOLEBODY133, Skeleton

State = dict[str, Tensor]
HW = (64, 48)  # 4 x 3 patches
# Deep enough for grouped queries: they are in all but the first and last eight blocks.
WIDE, DEEP, HEADS = 32, 18, 4
V1_HEAD, V2_HEAD = ((64, 32), (32, 32)), ((16, 16), (16, 16, 8))


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes that nobody published, with every kind of block."""
    size = Size(family="sapiens2", width=WIDE, depth=DEEP, heads=HEADS, upsample=(16, 16), convs=(16, 16, 8))
    monkeypatch.setitem(SIZES, "sapiens2_narrow", size)
    size = Size(family="sapiens", width=WIDE, depth=2, heads=HEADS, upsample=(16, 16), convs=(16, 16))
    monkeypatch.setitem(SIZES, "sapiens_narrow", size)


def _v1(num_keypoints: int = 17, seed: int = 1) -> State:
    shapes = native.v1_backbone(128, 4, 12) | native.v1_head(128, *V1_HEAD, num_keypoints)
    return native.random(shapes, seed)


def _v2(num_keypoints: int = 17, seed: int = 1) -> State:
    shapes = native.v2_backbone(WIDE, DEEP, HEADS) | native.v2_head(WIDE, *V2_HEAD, num_keypoints)
    return native.random(shapes, seed)


def _bare(state: State) -> State:
    return {key: value for key, value in state.items() if "head." not in key}


def _prefixed(state: State, prefix: str = "backbone.") -> State:
    return {key if "head." in key else f"{prefix}{key}": value for key, value in state.items()}


def _pixels() -> Tensor:
    return torch.randint(0, 256, (2, 3, *HW), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))


def _save(tree: object, path: Path) -> Path:
    path.parent.mkdir(exist_ok=True, parents=True)
    torch.save(tree, path)
    return path


def _save_tensors(state: State, path: Path) -> Path:
    path.parent.mkdir(exist_ok=True, parents=True)
    save_file({key: value.contiguous() for key, value in state.items()}, path, metadata={"format": "pt"})
    return path


def _refused(reference: Path | str, *named: str, model: str = "sapiens_tiny", hw: tuple[int, int] = HW) -> None:
    network = SapiensPose(model, 17, hw)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with pytest.raises(UserError) as caught:
        weights.load(network, str(reference), COCO17.names)
    text = str(caught.value)
    assert [word for word in (str(reference), *named) if word not in text] == [], text
    assert "\n" not in text and "Traceback" not in text
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


# ---- Every published name and shape


def _meta(shapes: native.Shapes) -> State:
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


def _shapes(state: State) -> native.Shapes:
    return {key: tuple(value.shape) for key, value in state.items()}


def _on_meta(name: str, num_keypoints: int) -> native.Shapes:
    with torch.device("meta"):
        return _shapes(SapiensPose(name, num_keypoints, (1024, 768)).state_dict())


@pytest.mark.parametrize("name", sorted(native.V1))
def test_every_tensor_of_a_published_v1_pose_network_has_its_place(name: str) -> None:
    width, depth, _ = native.V1[name]
    file = _prefixed(_meta(native.v1_backbone(width, depth, 64 * 48) | native.v1_head(width, *([(768, 768)] * 2), 308)))
    assert published.family_of(file) == "sapiens"
    expected = _on_meta(name, 308)
    expected[POSITIONS] = (1, 64 * 48, width)  # before the empty slot is put in front
    assert _shapes(published.rename(file, "sapiens")) == expected


@pytest.mark.parametrize("name", sorted(native.V2))
@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_every_tensor_of_a_published_sapiens2_network_has_its_place(name: str, prefix: str) -> None:
    width, depth, heads, up, convs = native.V2[name]
    shapes = native.v2_backbone(width, depth, heads) | (native.v2_head(width, up, convs, 308) if up else {})
    file = _prefixed(_meta(shapes), prefix)
    assert published.family_of(file) == "sapiens2"
    expected = _on_meta(name, 308)
    if not up:
        expected = {key: shape for key, shape in expected.items() if key.startswith("backbone.")}
    assert _shapes(published.rename(file, "sapiens2")) == expected


def test_every_published_size_is_looked_at() -> None:
    assert set(native.V1) | set(native.V2) | {"sapiens_tiny", "sapiens2_tiny"} == set(SIZES) - {
        "sapiens_narrow",
        "sapiens2_narrow",
    }


# ---- What is loaded computes what was published


def _assert_same(ours: Tensor, theirs: Tensor) -> None:
    assert theirs.std() > 0.1
    assert (ours - theirs).abs().max() < 1e-5 * max(1.0, float(theirs.abs().max()))


def _heatmaps(name: str, file: Path, num_keypoints: int = 17) -> Tensor:
    model = SapiensPose(name, num_keypoints, HW).eval()
    report = weights.load(model, str(file))
    assert (report.missing, report.reinitialized, report.unused, report.mapped) == ([], [], [], [])
    assert sorted(report.loaded) == sorted(model.state_dict())
    with torch.no_grad():
        return model(_pixels())


@pytest.mark.parametrize("layout", ["pose", "distributed", "class slot"])
def test_a_v1_file_computes_what_was_published(tmp_path: Path, layout: str) -> None:
    state = _v1()
    file = dict(state)
    if layout == "class slot":
        file["pos_embed"] = torch.cat([torch.full((1, 1, 128), 9.0), state["pos_embed"]], dim=1)
        file["cls_token"] = torch.full((1, 1, 128), 9.0)
    file = _prefixed(file)
    file = {f"module.{key}": value for key, value in file.items()} if layout == "distributed" else file
    path = _save({"state_dict": file, "meta": {"epoch": 210}}, tmp_path / "pose.pth")
    _assert_same(_heatmaps("sapiens_tiny", path), native.v1_heatmaps(state, _pixels(), depth=4, heads=4))


def _transformers(state: State, folder: Path) -> Path:
    """Written by hand, as transformers' own checkpoint of the same network is named."""
    out: State = {}
    fixed = {
        "cls_token": "model.embeddings.cls_token",
        "storage_tokens": "model.embeddings.register_tokens",
        "patch_embed.projection.weight": "model.embeddings.patch_embeddings.weight",
        "patch_embed.projection.bias": "model.embeddings.patch_embeddings.bias",
        "ln1.weight": "model.norm.weight",
    }
    numbers = {"deconv_layers.0": "upsample_layers.0", "deconv_layers.3": "upsample_layers.1"}
    numbers |= {f"conv_layers.{3 * i}": f"conv_layers.{i}" for i in range(3)}
    names = {
        "ln1": "norm1", "ln2": "norm2", "attn.wq": "attention.q_proj", "attn.wk": "attention.k_proj",
        "attn.wv": "attention.v_proj", "attn.proj": "attention.o_proj", "attn.q_norm": "attention.q_norm",
        "attn.k_norm": "attention.k_norm", "ffn.w3": "mlp.down_proj",
    }  # fmt: skip
    for key, value in state.items():
        stem, part = key.rsplit(".", 1) if "." in key else (key, "")
        if key in fixed:
            out[fixed[key]] = value
        elif key.startswith("decode_head.conv_pose"):
            out[f"decode_head.predictor.{part}"] = value
        elif key.startswith("decode_head."):
            out[f"decode_head.{numbers[stem.removeprefix('decode_head.')]}.convolution.{part}"] = value
        elif key.startswith("blocks."):
            _, i, name = stem.split(".", 2)
            block = f"model.model.layer.{i}"
            if name == "attn.gamma":
                out[f"{block}.layer_scale1.lambda1"] = value
            elif name == "ffn.w12":
                halves = value.clone().chunk(2)
                out |= {f"{block}.mlp.{half}_proj.{part}": v for half, v in zip(("gate", "up"), halves, strict=True)}
            else:
                out[f"{block}.{names[name]}.{part}"] = value
    return _save_tensors(out, folder / "model.safetensors")


def _sharded(state: State, folder: Path) -> Path:
    keys = sorted(state)
    names = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    for i, name in enumerate(names):
        _save_tensors({key: state[key] for key in keys[i::3]}, folder / name)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {key: names[i % 3] for i, key in enumerate(keys)}}))
    return folder


@pytest.mark.parametrize("layout", ["native pose", "pickled", "transformers", "sharded", "hub folder", "ours"])
def test_a_sapiens2_file_computes_what_was_published(tmp_path: Path, layout: str) -> None:
    state = _v2()
    pose = _prefixed(state)
    path = {
        "native pose": lambda: _save_tensors(pose, tmp_path / "pose.safetensors"),
        "pickled": lambda: _save({"state_dict": pose}, tmp_path / "pose.pth"),
        "transformers": lambda: _transformers(state, tmp_path),
        "sharded": lambda: _sharded(pose, tmp_path),
        "hub folder": lambda: _save_tensors(pose, tmp_path / "sapiens2_0.4b_pose.safetensors").parent,
        "ours": lambda: _ours(pose, tmp_path),
    }[layout]()
    _assert_same(_heatmaps("sapiens2_narrow", path), native.v2_heatmaps(state, _pixels(), DEEP, HEADS))


def _ours(pose: State, folder: Path) -> Path:
    model = SapiensPose("sapiens2_narrow", 17, HW)
    weights.load(model, str(_save_tensors(pose, folder / "in" / "pose.safetensors")))
    export.export(folder / "out", model.state_dict(), model, COCO17, 2.0)
    return folder / "out"


def test_bf16_tensors_are_loaded_as_they_are(tmp_path: Path) -> None:
    state = {key: value.bfloat16() for key, value in _v2().items()}
    rounded = {key: value.float() for key, value in state.items()}
    path = _save_tensors(_prefixed(state), tmp_path / "pose.safetensors")
    _assert_same(_heatmaps("sapiens2_narrow", path), native.v2_heatmaps(rounded, _pixels(), DEEP, HEADS))


@pytest.mark.parametrize("name", ["sapiens_tiny", "sapiens2_narrow"])
def test_a_pretrained_file_is_the_backbone_of_the_pose_file(tmp_path: Path, name: str) -> None:
    state = _v1() if name == "sapiens_tiny" else _v2()
    pose, pretrained = SapiensPose(name, 17, HW), SapiensPose(name, 17, HW)
    weights.load(pose, str(_save({"state_dict": _prefixed(state)}, tmp_path / "pose.pth")))
    head = {key: value.clone() for key, value in pretrained.state_dict().items() if key.startswith("head.")}
    report = weights.load(pretrained, str(_save(_bare(state), tmp_path / "pretrained_clean.pth")), COCO17.names)
    assert (sorted(report.missing), report.reinitialized, report.unused) == (sorted(head), [], [])
    expected = pose.state_dict() | head
    assert [key for key, value in pretrained.state_dict().items() if not torch.equal(value, expected[key])] == []


# ---- What else is in them


def _with_numpy_1_names(path: Path) -> Path:
    """The same file as numpy 1 would have written it, in whose time the published ones were."""
    out = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(out, "w") as new:
        for member in old.infolist():
            content = old.read(member)
            if member.filename.endswith("data.pkl"):
                assert b"numpy._core.multiarray" in content
                content = content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
            new.writestr(member, content)
    path.write_bytes(out.getvalue())
    return path


@pytest.mark.parametrize("numpy_1", [False, True])
def test_a_training_file_of_mmengine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, numpy_1: bool) -> None:
    """Weights among the decoder of pre-training, the optimizer, curves of the loss and numpy in the meta data."""
    module = types.ModuleType("mmengine.logging.history_buffer")
    history = type("HistoryBuffer", (), {"__module__": module.__name__})
    module.HistoryBuffer = history  # pyright: ignore[reportAttributeAccessIssue]
    curve = history()
    curve.__dict__.update(_log_history=np.array([1.0, 0.5]), _count_history=np.array([1, 1]), max_length=1000000)
    state = _bare(_v1())
    neck = {"neck.mask_token": torch.zeros(1, 1, 64), "neck.decoder_blocks.0.attn.qkv.weight": torch.ones(6, 2)}
    tree = {
        "meta": {"epoch": 1600, "dataset_meta": {"sigmas": np.ones(3, np.float32), "scale": np.float64(2)}},
        "state_dict": _prefixed(state) | neck,
        "message_hub": {"log_scalars": {"train/loss": curve}, "runtime_info": {"iter": 5}},
        "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]},
        "param_schedulers": [{"last_step": 3}],
    }
    with monkeypatch.context() as patched:
        for name in ("mmengine", "mmengine.logging", module.__name__):
            patched.setitem(sys.modules, name, module)
        path = _save(tree, tmp_path / "sapiens_1b_epoch_173.pth")
    path = _with_numpy_1_names(path) if numpy_1 else path
    model, clean = SapiensPose("sapiens_tiny", 17, HW), SapiensPose("sapiens_tiny", 17, HW)
    assert weights.load(model, str(path)).unused == sorted(neck)
    weights.load(clean, str(_save(state, tmp_path / "clean.pth")))
    assert torch.equal(model.backbone.embeddings.position_embeddings, clean.backbone.embeddings.position_embeddings)
    assert all(
        torch.equal(value, clean.backbone.state_dict()[key]) for key, value in model.backbone.state_dict().items()
    )


def test_a_file_that_wants_to_call_something_is_named_with_it(tmp_path: Path) -> None:
    tree = {"state_dict": _v1(), "meta": {"where": Path("x")}}
    _refused(_save(tree, tmp_path / "x.pth"), "not a file of plain tensors", "pathlib", "no code in it is run")


def test_a_program_is_refused(tmp_path: Path) -> None:
    script = torch.jit.trace(torch.nn.Linear(3, 4), torch.ones(1, 3))
    for name in ("sapiens_0.3b_torchscript.pt2", "renamed.pth"):
        torch.jit.save(script, str(tmp_path / name))
        _refused(tmp_path / name, "TorchScript", ".pth")
    torch.export.save(torch.export.export(torch.nn.Linear(3, 4), (torch.ones(1, 3),)), tmp_path / "bfloat16.pt2")
    (tmp_path / "bfloat16.pt2").rename(tmp_path / "exported.pth")
    _refused(tmp_path / "exported.pth", "exported program")


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs /proc")
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_reading_a_file_takes_no_memory(tmp_path: Path, suffix: str) -> None:
    """It is mapped, and split by views: a network of 20 GB is not read beside the one it is loaded into."""
    size = 96 * 2**20
    state = _bare(_v1()) | {"layers.4.attn.qkv.weight": torch.ones(3 * 2**21, 4)}
    path = tmp_path / f"big{suffix}"
    _save(state, path) if suffix == ".pth" else _save_tensors(state, path)
    del state
    before = _anonymous()
    found = published.read(str(path))
    assert found.state["backbone.encoder.layer.4.attention.attention.key.weight"].shape == (2**21, 4)
    assert _anonymous() - before < size / 4


def _anonymous() -> int:
    """Bytes of this process that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


# ---- Positions


def test_a_pose_network_of_1024x768_at_512x384(tmp_path: Path) -> None:
    """64 x 48 positions, which are no square, on 32 x 24."""
    shapes = native.v1_backbone(WIDE, 2, 64 * 48) | native.v1_head(WIDE, (16, 16), (16, 16), 17)
    state = native.random(shapes, 1)
    model = SapiensPose("sapiens_narrow", 17, (512, 384))
    report = weights.load(model, str(_save({"state_dict": _prefixed(state)}, tmp_path / "x.pth")), COCO17.names)
    assert (report.reshaped, report.missing, report.unused) == ([POSITIONS], [], [])
    grid = state["pos_embed"].reshape(1, 64, 48, WIDE).permute(0, 3, 1, 2)
    expected = F.interpolate(grid, size=(32, 24), mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
    loaded = model.state_dict()[POSITIONS]
    assert torch.equal(loaded, torch.cat([torch.zeros(1, 1, WIDE), expected], dim=1))


@pytest.mark.parametrize("with_config", [True, False])
@pytest.mark.parametrize("hw", [(128, 96), (96, 96), (64, 160)])
def test_our_own_network_on_a_smaller_image(tmp_path: Path, hw: tuple[int, int], with_config: bool) -> None:
    """8 x 6 positions and the empty one are as many as 7 x 7; 4 x 10 are neither square nor 4:3."""
    source, target = SapiensPose("sapiens_narrow", 17, hw), SapiensPose("sapiens_narrow", 17, (64, 48))
    export.export(tmp_path, source.state_dict(), source, COCO17, 2.0)
    if not with_config:
        (tmp_path / "config.json").unlink()
        if hw == (64, 160):
            return _refused(tmp_path / "model.safetensors", "41", "13x32", model="sapiens_narrow")
    assert weights.load(target, str(tmp_path)).reshaped == [POSITIONS]
    grid_hw = (hw[0] // 16, hw[1] // 16)
    grid = source.state_dict()[POSITIONS][:, 1:].reshape(1, *grid_hw, WIDE).permute(0, 3, 1, 2)
    expected = F.interpolate(grid, size=(4, 3), mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
    assert torch.equal(target.state_dict()[POSITIONS][:, 1:], expected)


# ---- Keypoints


def _rows(model: SapiensPose) -> State:
    layer = model.head.final_layer if model.size.family == "sapiens" else model.head.predictor
    return {"weight": layer.weight.detach().clone(), "bias": layer.bias.detach().clone()}  # pyright: ignore


def _file_rows(state: State) -> State:
    layer = "head.final_layer" if "head.final_layer.bias" in state else "decode_head.conv_pose"
    return {part: state[f"{layer}.{part}"] for part in ("weight", "bias")}


@pytest.mark.parametrize(
    ("name", "skeleton"),
    [("sapiens_tiny", WHOLEBODY133), ("sapiens_tiny", SAPIENS308), ("sapiens2_narrow", SAPIENS308)],
)
def test_a_published_head_gives_its_rows_by_name(tmp_path: Path, name: str, skeleton: Skeleton) -> None:
    count = skeleton.num_keypoints
    state = _v1(count) if name == "sapiens_tiny" else _v2(count)
    model = SapiensPose(name, 17, HW).eval()
    path = _save({"state_dict": _prefixed(state)}, tmp_path / "pose.pth")
    report = weights.load(model, str(path), COCO17.names)
    assert (len(report.mapped), report.missing, report.reinitialized, report.unused) == (2, [], [], [])
    assert f"17 of 17 keypoints by name, of the file's {count} (by their number)" in str(report)
    # The whole network's heatmaps, at the places that the data sets' own order says.
    forward, args = (native.v1_heatmaps, (4, 4)) if name == "sapiens_tiny" else (native.v2_heatmaps, (DEEP, HEADS))
    in_goliath = [0, 1, 2, 3, 4, 5, 6, 7, 8, 62, 41, 9, 10, 11, 12, 13, 14]
    places = in_goliath if count == 308 else list(range(17))
    with torch.no_grad():
        _assert_same(model(_pixels()), forward(state, _pixels(), *args)[:, places])


def test_keypoints_that_the_file_lacks_start_anew_and_are_named(tmp_path: Path) -> None:
    state, model = _v1(133), SapiensPose("sapiens_tiny", 4, HW)
    fresh = _rows(model)
    names = ("left_wrist", "tail_root", "face-3", "tail_tip")
    report = weights.load(model, str(_save({"state_dict": _prefixed(state)}, tmp_path / "pose.pth")), names)
    for part, loaded in _rows(model).items():
        theirs = _file_rows(state)[part]
        assert torch.equal(loaded[[0, 2]], theirs[[9, 26]]) and torch.equal(loaded[[1, 3]], fresh[part][[1, 3]])
    assert report.new_keypoints == ("tail_root", "tail_tip")
    assert str(report).splitlines()[-1].split(maxsplit=3) == ["new", "keypoints", "2", "tail_root, tail_tip"]


def test_the_file_s_own_names_go_before_their_number(tmp_path: Path) -> None:
    """17 keypoints that are COCO's backwards, as mmpose records them."""
    state, model = _v1(17), SapiensPose("sapiens_tiny", 17, HW)
    meta = {"dataset_meta": {"keypoint_id2name": dict(enumerate(COCO17.names[::-1]))}}
    report = weights.load(
        model, str(_save({"state_dict": _prefixed(state), "meta": meta}, tmp_path / "pose.pth")), COCO17.names
    )
    assert "by the file" in report.mapping
    assert torch.equal(_rows(model)["weight"], _file_rows(state)["weight"].flip(0))


@pytest.mark.parametrize("name", ["sapiens_tiny", "sapiens2_narrow"])
def test_our_own_weights_give_their_rows_by_name(tmp_path: Path, name: str) -> None:
    names = ("left_hip", "beak", "nose")
    skeleton = Skeleton(names=names, mirror=(0, 1, 2), sigmas=(0.1, 0.1, 0.1), upper=(), edges=())
    source, target = SapiensPose(name, 3, HW), SapiensPose(name, 2, HW)
    torch.nn.init.normal_(
        next(p for key, p in source.named_parameters() if key.endswith(("final_layer.bias", "r.bias")))
    )
    export.export(tmp_path, source.state_dict(), source, skeleton, 2.0)
    report = weights.load(target, str(tmp_path), ("nose", "left_hip"))
    assert len(report.mapped) == 2 and report.new_keypoints == ()
    for part, loaded in _rows(target).items():
        assert torch.equal(loaded, _rows(source)[part][[2, 0]])


def test_of_transformers_the_labels_are_the_names(tmp_path: Path) -> None:
    state, config = _v2(3), sapiens2_config(SIZES["sapiens2_narrow"], 3, HW)
    _transformers(state, tmp_path)
    fresh = SapiensPose("sapiens2_narrow", 2, HW)
    before = _rows(fresh)["weight"]
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()).get("id2label", {}).get("0", "LABEL_0") == "LABEL_0"
    report = weights.load(fresh, str(tmp_path), ("nose", "left_hip"))
    assert len(report.reinitialized) == 2, "placeholders name nothing"
    assert torch.equal(_rows(fresh)["weight"], before)
    config.id2label = {0: "left_hip", 1: "beak", 2: "nose"}
    config.save_pretrained(tmp_path)
    model = SapiensPose("sapiens2_narrow", 2, HW)
    assert len(weights.load(model, str(tmp_path), ("nose", "left_hip")).mapped) == 2
    assert torch.equal(_rows(model)["bias"], _file_rows(state)["bias"][[2, 0]])


def test_as_many_but_other_keypoints_start_anew(tmp_path: Path) -> None:
    state, model = _v1(17), SapiensPose("sapiens_tiny", 17, HW)
    fresh = _rows(model)["weight"]
    path = _save({"state_dict": _prefixed(state)}, tmp_path / "pose.pth")
    report = weights.load(model, str(path), [f"leaf_{i}" for i in range(17)])
    assert report.reinitialized == report.unused[::-1] == ["head.final_layer.weight", "head.final_layer.bias"]
    assert torch.equal(_rows(model)["weight"], fresh)


# ---- PersonBoxes in a folder


def test_a_folder_s_one_file_is_found_and_the_clean_one_of_two(tmp_path: Path) -> None:
    name = "sapiens_1b_epoch_173"
    for other in ("README.md", "config.json", "optimizer.bin", ".hidden.pth"):
        (tmp_path / other).write_text("{}")
    (tmp_path / f"{name}.pth").touch()
    assert published.find(str(tmp_path)).name == f"{name}.pth"
    (tmp_path / f"{name}_clean.pth").touch()
    assert published.find(str(tmp_path)).name == f"{name}_clean.pth"
    (tmp_path / f"{name}_torchscript.pt2").touch()
    assert published.find(str(tmp_path)).name == f"{name}_clean.pth"
    assert published.find(str(tmp_path / f"{name}.pth")).name == f"{name}.pth"
    (tmp_path / published.INDEX).touch()
    assert published.find(str(tmp_path)).name == published.INDEX
    (tmp_path / published.FILE).touch()
    assert published.find(str(tmp_path)).name == published.FILE


def test_what_cannot_be_found_is_said(tmp_path: Path) -> None:
    _refused(tmp_path / "nothing", "no such file or folder")
    _refused(tmp_path, "no model.safetensors")
    (tmp_path / "lite.pt2").touch()
    _refused(tmp_path / "lite.pt2", "TorchScript")
    for name in ("sapiens_0.3b_coco.pth", "sapiens_0.6b_coco.pth"):
        (tmp_path / name).touch()
    _refused(tmp_path, "several", "sapiens_0.3b_coco.pth, sapiens_0.6b_coco.pth")


def test_a_stage_s_folder_is_pointed_at_its_weights(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / published.FILE).touch()
    _refused(tmp_path, f"did you mean {tmp_path / 'weights'}?")


@pytest.mark.parametrize(
    "index",
    [
        "{",
        "[]",
        '{"weight_map": 3}',
        '{"weight_map": {"a": "lost.safetensors"}}',
        '{"weight_map": {"a": "model.safetensors.index.json"}}',
    ],
)
def test_a_broken_index_is_named(tmp_path: Path, index: str) -> None:
    (tmp_path / published.INDEX).write_text(index)
    _refused(tmp_path, "shard", "model.safetensors.index.json")


def test_a_config_that_is_none_is_named(tmp_path: Path) -> None:
    _save(_v1(), tmp_path / "x.pth")
    (tmp_path / "config.json").write_text("[")
    with pytest.raises(UserError, match=r"config\.json"):
        published.read(str(tmp_path))


# ---- Whose weights they are


def _thin(shapes: native.Shapes, width: int) -> State:
    """Tensors of the published shapes that take no memory to write: of two sizes, and the rest cut short."""
    kept = ("patch_embed.projection.weight", "ln1.weight", "pos_embed")
    state = {key: torch.zeros(shape) for key, shape in shapes.items() if key in kept}
    return state | {key: torch.zeros(1) for key in shapes if key not in kept}


def test_the_size_of_a_file_is_reported(tmp_path: Path) -> None:
    path = _save(_thin(native.v1_backbone(1280, 32, 4), 1280), tmp_path / "x.pth")
    _refused(
        path, "sapiens_0.6b (1280 wide, 32 blocks)", "sapiens_tiny is 128 wide, 4 blocks", "--model.name sapiens_0.6b"
    )
    path = _save_tensors(_thin(native.v2_backbone(1536, 40, 24), 1536), tmp_path / "x.safetensors")
    _refused(path, "sapiens2_1b (1536 wide, 40 blocks)", "family sapiens", "--model.name sapiens2_1b")
    path = _save(_v1(), tmp_path / "v1.pth")
    _refused(path, "sapiens_tiny (128 wide, 4 blocks)", "family sapiens2", model="sapiens2_tiny")


@pytest.mark.parametrize("depth", [3, 5])
def test_a_deeper_or_shallower_network_is_refused(tmp_path: Path, depth: int) -> None:
    """Of a deeper one every tensor of ours would find a fellow."""
    path = _save(native.random(native.v1_backbone(128, depth, 12), 1), tmp_path / "x.pth")
    _refused(path, f"a sapiens 128 wide, {depth} blocks", "Give weights of this size")


def test_a_network_with_a_window_tokenizer_is_refused(tmp_path: Path) -> None:
    state = _prefixed(_bare(_v2()) | {"tokenizer.blocks.0.ln1.weight": torch.ones(4)})
    _refused(_save_tensors(state, tmp_path / "4k.safetensors"), "window tokenizer", model="sapiens2_narrow")


def test_tensors_of_something_else_are_refused(tmp_path: Path) -> None:
    state = {"conv1.weight": torch.ones(3), "bn1.bias": torch.ones(3)}
    _refused(_save_tensors(state, tmp_path / "resnet.safetensors"), "no blocks of Sapiens", "conv1.weight")


def test_a_tensor_of_another_shape_is_named_with_both(tmp_path: Path) -> None:
    state: dict[str, Any] = _bare(_v1())
    state["layers.1.ffn.layers.1.weight"] = torch.ones(128, 500)
    _refused(_save(state, tmp_path / "x.pth"), "backbone.encoder.layer.1.mlp.fc2.weight", "is 128x500", "needs 128x512")
    state = _bare(_v1())
    state["pos_embed"] = torch.ones(1, 14, 128)
    _refused(_save(state, tmp_path / "x.pth"), POSITIONS, "1x14x128", "1x13x128")
    for value in (torch.ones(()), torch.ones(7), torch.ones(1, 13)):
        for key in ("pos_embed", "patch_embed.projection.weight", "layers.0.attn.qkv.weight", "ln1.bias"):
            _refused(_save(_bare(_v1()) | {key: value}, tmp_path / "x.pth"), "tiny")
