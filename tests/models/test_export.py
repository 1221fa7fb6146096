"""What leaves the house works without it: in plain transformers, by a card's snippet, in ONNX and torch.export."""

import ast
import dataclasses
import json
import os
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import VitPoseBackbone

from sapiens_accel import PoseEstimator
from sapiens_accel.errors import UserError
from sapiens_accel.models import export
from sapiens_accel.models import export_graph as graph
from sapiens_accel.models import export_runtimes as runtimes
from sapiens_accel.models import load as weights
from sapiens_accel.models.modeling_sapiens_pose import SapiensForPoseEstimation, SapiensPoseConfig, SapiensPoseHead
from sapiens_accel.models.sapiens import PIXEL_MEAN, PIXEL_STD, SIZES, HeatmapHead, SapiensPose
from sapiens_accel.pose import geometry
from sapiens_accel.pose.heatmap import Codec
from sapiens_accel.pose.skeleton import COCO17, Skeleton
from sapiens_accel.visibility import output as visibility

# Unlike each other, and one of them not 4:3.
INPUT_HW = {"sapiens_tiny": (64, 48), "sapiens2_tiny": (96, 64)}
FAMILIES = tuple(INPUT_HW)
BOX = (120, 80, 160, 400)  # the snippet's
SIGMA = 1.5
needs_onnx = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")), reason="needs sapiens_accel[onnx]"
)


def _model(name: str, seed: int = 0, depth: int | None = None) -> SapiensPose:
    """Every layer's tensors matter in the output."""
    model = SapiensPose(name, 17, INPUT_HW[name], depth=depth)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, value in model.named_parameters():
            value.copy_(torch.randn(value.shape, generator=generator) * 0.1)
            if key.endswith("position_embeddings"):
                value[:, 0] = 0.0
    return model.eval()


def _export(model: SapiensPose, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    export.export(folder, model.state_dict(), model, COCO17, SIGMA, dtype)
    return folder


def _json(file: Path) -> dict:
    return json.loads(file.read_text())


def _pictures(num: int, hw: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """uint8 noise as our network takes it, and normalized as preprocessor_config.json says: by the constants."""
    pixels = torch.randint(0, 256, (num, 3, *hw), dtype=torch.uint8, generator=torch.Generator().manual_seed(num))
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (PIXEL_MEAN, PIXEL_STD))
    return pixels, (pixels.float() - mean) / std


def _far(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    assert ours.std() > 1e-2, "maps that say nothing prove nothing"
    return float((ours - theirs).abs().max() / ours.abs().max().clamp_min(1.0))


# ---- The folder


@pytest.mark.parametrize("name", FAMILIES)
def test_the_folder_says_what_its_keypoints_are(name: str, tmp_path: Path) -> None:
    _export(_model(name), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json", "heatmap_numpy.py", "image_processing_sapiens_pose.py", "model.safetensors",
        *(["modeling_sapiens_pose.py"] if name == "sapiens_tiny" else []), "preprocessor_config.json", "skeleton.json",
    ]  # fmt: skip
    tree, config = _json(tmp_path / "skeleton.json"), _json(tmp_path / "config.json")
    pairs = [[1, 2], [3, 4], [5, 6], [7, 8], [9, 10], [11, 12], [13, 14], [15, 16]]
    assert tree.pop("flip_pairs") == config["flip_pairs"] == pairs and tree.pop("mirror_known") is True
    assert tree.pop("people") is None  # of no training
    as_tuples = {key: tuple(tuple(v) if isinstance(v, list) else v for v in value) for key, value in tree.items()}
    assert Skeleton(**as_tuples) == COCO17
    assert list(config["id2label"].values()) == list(COCO17.names)
    assert config["image_size"] == list(INPUT_HW[name])


@pytest.mark.parametrize("name", FAMILIES)
def test_the_file_is_bf16_on_demand(name: str, tmp_path: Path) -> None:
    model = _model(name, seed=1)
    _export(model, tmp_path / "bf16", torch.bfloat16)
    assert _json(tmp_path / "bf16" / "config.json")["dtype"] == "bfloat16"
    assert {value.dtype for value in load_file(tmp_path / "bf16" / weights.FILE).values()} == {torch.bfloat16}
    target = _model(name, seed=2)
    assert not weights.load(target, str(tmp_path / "bf16")).reinitialized
    for key, value in target.state_dict().items():
        assert torch.equal(value, model.state_dict()[key].bfloat16().float()), key


def _names_of(source: ast.Module, kind: str) -> set[str]:
    """What a class declares: its attributes and annotations."""
    (found,) = (node for node in source.body if isinstance(node, ast.ClassDef) and node.name == kind)
    assigned = {
        t.id for node in found.body if isinstance(node, ast.Assign) for t in node.targets if isinstance(t, ast.Name)
    }
    return assigned | {
        n.target.id for n in found.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)
    }


def test_the_preprocessor_speaks_the_language_of_transformers(tmp_path: Path) -> None:
    """Its class needs torchvision, so its source is read: a key that it does not know would be ignored."""
    from transformers.processing_utils import ImagesKwargs

    spec = find_spec("transformers.models.sapiens2")
    assert spec is not None and spec.origin is not None
    source = ast.parse((Path(spec.origin).parent / "image_processing_sapiens2.py").read_text())
    tree = _json(_export(_model("sapiens_tiny"), tmp_path) / "preprocessor_config.json")
    kind = tree.pop("image_processor_type")
    assert tree.pop("auto_map") == {"AutoImageProcessor": "image_processing_sapiens_pose.SapiensPoseImageProcessor"}
    known = _names_of(source, kind) | _names_of(source, f"{kind}Kwargs") | set(ImagesKwargs.__annotations__)
    assert set(tree) - known == set()
    assert (tree["keypoint_heatmap_sigma"], tree["keypoint_heatmap_downscale_factor"]) == (SIGMA, 4)
    image = 200.0
    for mean, std, pixel_mean, pixel_std in zip(
        tree["image_mean"], tree["image_std"], PIXEL_MEAN, PIXEL_STD, strict=True
    ):
        theirs = (image * tree["rescale_factor"] - mean) / std
        assert theirs == pytest.approx((image - pixel_mean) / pixel_std, abs=1e-12)


# ---- The modelling file


@pytest.mark.parametrize("name", ["sapiens_tiny", "sapiens_0.3b"])
def test_both_heads_are_one(name: str) -> None:
    size = dataclasses.replace(SIZES[name], width=64)
    ours = HeatmapHead(size, 5)
    config = SapiensPoseConfig(
        hidden_size=64, upsample_out_channels=list(size.upsample), conv_out_channels=list(size.convs), num_labels=5
    )  # fmt: skip
    theirs = SapiensPoseHead(config)
    with torch.no_grad():
        for value in ours.parameters():
            value.normal_(std=0.1)
        theirs.load_state_dict(ours.state_dict())
        features = torch.randn(2, 64, 4, 3)
        assert torch.equal(theirs(features), ours(features))
        assert ours(features).std() > 1e-2


def test_a_fresh_network_of_the_file_is_sapiens() -> None:
    """No first slot of positions, a head that starts near zero, LayerNorm's published eps."""
    network = SapiensForPoseEstimation(SapiensPoseConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=2))
    assert isinstance(network.backbone, VitPoseBackbone)
    positions = network.backbone.embeddings.position_embeddings
    assert not positions[:, 0].any() and positions[:, 1:].std() > 1e-3
    assert network.head.final_layer.weight.std().item() == pytest.approx(1e-3, rel=0.1)
    assert network.backbone.layernorm.eps == 1e-6
    assert network.backbone.encoder.layer[0].layernorm_before.eps == 1e-6


# ---- A stranger's process


@pytest.fixture(scope="module", params=[FAMILIES[0], pytest.param(FAMILIES[1], marks=pytest.mark.slow)])
def fitted(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[SapiensPose, Path, np.ndarray]:
    """A network that finds 17 points in one drawn image; a folder with the image and weights/; the points."""
    torch.manual_seed(0)
    folder, hw = tmp_path_factory.mktemp(request.param), INPUT_HW[request.param]
    generator = np.random.default_rng(0)
    image = cv2.resize(
        generator.integers(0, 256, (18, 14, 3), dtype=np.uint8), (420, 540), interpolation=cv2.INTER_CUBIC
    )
    cv2.imwrite(str(folder / "people.jpg"), image)
    model = SapiensPose(request.param, 17, hw)
    truth_xy = generator.uniform(6, np.array([hw[1], hw[0]]) - 7, (17, 2))
    codec = Codec(input_hw=hw, heatmap_hw=model.heatmap_hw, sigma=SIGMA)
    target, _ = codec.encode(torch.from_numpy(truth_xy)[None].float(), torch.ones(1, 17))
    crop = _crop(folder, hw)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(100):
        optimizer.zero_grad()
        loss = (model(crop) - target).square().mean() * 100
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.3, loss.item()
    _export(model.eval(), folder / "weights")
    return model, folder, truth_xy


def _matrix(hw: tuple[int, int]) -> np.ndarray:
    return geometry.crop_around_box(np.array(BOX, float), 1.25, hw).matrix(hw)


def _crop(folder: Path, hw: tuple[int, int]) -> Tensor:
    image = cv2.cvtColor(cv2.imread(str(folder / "people.jpg")), cv2.COLOR_BGR2RGB)
    return torch.from_numpy(geometry.warp(image, _matrix(hw), hw)).permute(2, 0, 1)[None]


STRANGER = """
import json, sys
from pathlib import Path
sys.modules["sapiens_accel"] = None  # also where it is installed, it cannot be imported
try:
    import sapiens_accel
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("sapiens_accel is importable here")
import torch
import transformers
from safetensors.torch import load_file, save_file
auto, trust = sys.argv[1], json.loads(sys.argv[2])

def load(folder, auto=auto, **options):
    kind = getattr(transformers, auto)
    model, info = kind.from_pretrained(folder, output_loading_info=True, **trust, **options)
    wrong = {key: info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[key]}
    assert not wrong, wrong
    return model.eval()

model, pixels = load("weights"), load_file("in.safetensors")["pixels"]
assert model.dtype == torch.float32
assert model.config.id2label[16] == "right_ankle"
assert model.config.flip_pairs[0] == [1, 2]
model.save_pretrained("again")
with torch.no_grad():
    outputs = model(pixels, output_hidden_states=True)
    found = {"heatmaps": outputs.heatmaps, "again": load("again", "AutoModelForPoseEstimation")(pixels).heatmaps}
    half = load("weights", dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    found["half"] = half(pixels).heatmaps.float()
assert len(outputs.hidden_states) == model.config.num_hidden_layers + 1
space = {}
exec(Path("snippet.py").read_text(), space)
found |= {"crop": space["inputs"]["pixel_values"], "points": space["people"][0]["keypoints"]}
found["scores"] = space["people"][0]["scores"]
processor, boxes = space["processor"], [[[120, 80, 160, 400], [40.5, 60, 200, 90]], [[-30, 200, 90, 500]]]
assert type(processor).__name__ == "SapiensPoseImageProcessor"
processor.save_pretrained("processor")
again = transformers.AutoImageProcessor.from_pretrained("processor", trust_remote_code=True)
several = again([space["image"], space["image"]], boxes=boxes, return_tensors="pt")
with torch.no_grad():
    pairs = torch.tensor(model.config.flip_pairs)
    mirrored = model(several["pixel_values"].flip(-1), flip_pairs=pairs)
    results = again.post_process_pose_estimation(model(**several), boxes, outputs_flipped=mirrored)
assert [len(people) for people in results] == [2, 1]
found["several"] = torch.stack([one["keypoints"] for people in results for one in people])
found["bbox"] = results[1][0]["bbox"]
middle = float(results[0][0]["scores"].median())
sure = again.post_process_pose_estimation(model(**several), boxes, outputs_flipped=mirrored, threshold=middle)[0][0]
assert len(sure["scores"]) == len(sure["labels"]) == len(sure["keypoints"]) == 8 and (sure["scores"] > middle).all()
save_file({key: value.contiguous() for key, value in found.items()}, "out.safetensors")
assert not any(name.split(".")[0] in ("sapiens_accel", "jaxtyping") and module for name, module in sys.modules.items())
"""


def test_a_stranger_needs_nothing_of_ours(fitted: tuple[SapiensPose, Path, np.ndarray]) -> None:
    """In plain transformers: the same maps, also saved and loaded again, or in bf16; the snippet as it stands."""
    model, folder, truth_xy = fitted
    family, hw = model.size.family, model.input_hw
    pixels, normalised = _pictures(2, hw)
    save_file({"pixels": normalised}, folder / "in.safetensors")
    (folder / "snippet.py").write_text(export.snippet("./weights", family))
    auto = ("AutoModel", {"trust_remote_code": True}) if family == "sapiens" else ("AutoModelForPoseEstimation", {})
    if family == "sapiens2":  # the network is transformers' own
        assert (folder / "snippet.py").read_text().count("trust_remote_code") == 1
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hub")}
    program = [sys.executable, "-I", "-c", STRANGER, auto[0], json.dumps(auto[1])]
    done = subprocess.run(program, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    theirs = load_file(folder / "out.safetensors")
    with torch.no_grad():
        ours = model(pixels)
    assert _far(ours, theirs["heatmaps"]) < 1e-5
    assert _far(ours, theirs["again"]) < 1e-5
    assert 1e-5 < _far(ours, theirs["half"]) < 0.05
    # A matrix that is rounded otherwise may change a pixel by a level, and Pillow decodes a JPEG a little otherwise.
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (PIXEL_MEAN, PIXEL_STD))
    assert ((theirs["crop"][0] * std + mean) - _crop(folder, hw)[0]).abs().max() <= 6
    _assert_points(folder, theirs, truth_xy, model)
    printed = done.stdout.splitlines()[-17:]
    assert [line.split()[0] for line in printed] == list(COCO17.names)
    assert [float(word) for word in printed[0].split()[1:3]] == pytest.approx(theirs["points"][0].tolist(), abs=0.06)


def _assert_points(folder: Path, theirs: dict[str, Tensor], truth_xy: np.ndarray, model: SapiensPose) -> None:
    """Keypoints within 1e-3 px of ours, with and without the flip test, and within a heatmap px of what was drawn."""
    image = PIL.Image.open(folder / "people.jpg")
    alone = PoseEstimator.from_pretrained(folder / "weights", device="cpu", flip=False)(image, [BOX])
    assert np.abs(theirs["points"].numpy() - alone.keypoints[0]).max() < 1e-3
    assert theirs["scores"].numpy() == pytest.approx(alone.scores[0], abs=1e-4)
    boxes = [np.array([BOX, (40.5, 60, 200, 90)]), np.array([[-30, 200, 90, 500]])]
    several = PoseEstimator.from_pretrained(folder / "weights", device="cpu")([image, image], boxes)
    ours = np.concatenate([one.keypoints for one in several])
    far = np.abs(theirs["several"].numpy() - ours).max(axis=-1)
    # In crops that the network was not fitted to, one flat map of 34 was decoded 1.3e-3 px apart, in float32 by ours.
    assert far[0].max() < 1e-3 and far.max() < 5e-3, far
    assert theirs["bbox"].tolist() == [-30, 200, 60, 700]
    hw, (map_h, map_w) = model.input_hw, model.heatmap_hw
    image_from_input = geometry.invert(_matrix(hw))
    map_px = np.array([(hw[1] - 1) / (map_w - 1), (hw[0] - 1) / (map_h - 1)]) * image_from_input[[0, 1], [0, 1]]
    assert (np.abs(alone.keypoints[0] - geometry.apply(image_from_input, truth_xy)) / map_px).max() < 1.0


def test_the_snippet_of_each_family_is_short_and_complete() -> None:
    for family in ("sapiens", "sapiens2"):
        text = export.snippet("someone/pose", family)
        compile(text, "snippet", "exec")
        assert 'from_pretrained("someone/pose"' in text
        assert max(map(len, text.splitlines())) <= 120 and len(text.splitlines()) <= 20
        assert "sapiens_accel" not in text and "torchvision" not in text


# ---- Graphs


@pytest.fixture(scope="module", params=[pytest.param(FAMILIES[0], marks=pytest.mark.slow), FAMILIES[1]])
def shallow(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[SapiensPose, Path]:
    """A network of two blocks, and its weights folder."""
    model = _model(request.param, depth=2)
    return model, _export(model, tmp_path_factory.mktemp("weights"))


@needs_onnx
def test_onnx_gives_the_same_maps_for_any_number_of_people(
    shallow: tuple[SapiensPose, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import onnx
    import onnxruntime

    model, folder = shallow
    beyond = model.size.family == "sapiens2"  # one of both as weights over 2 GB are written
    monkeypatch.setattr(graph, "EXTERNAL_BEYOND", 0 if beyond else graph.EXTERNAL_BEYOND)
    file = tmp_path / "new" / "pose.onnx"
    export.main([str(folder), "--to", "onnx", str(file), *(["--opset", "20"] if beyond else [])])
    said = capsys.readouterr().out
    assert str(file) in said and "batches of 1, 3" in said and "NOT CHECKED" not in said
    assert [path.name for path in sorted(file.parent.iterdir())] == [
        "pose.onnx",
        *(["pose.onnx.data"] if beyond else []),
    ]
    written = onnx.load(file)
    assert {entry.domain: entry.version for entry in written.opset_import}[""] == (20 if beyond else 18)
    notes = {entry.key: json.loads(entry.value) for entry in written.metadata_props if entry.key.endswith(".json")}
    assert notes["skeleton.json"]["names"] == list(COCO17.names)
    assert notes["preprocessor_config.json"]["size"] == {"height": model.input_hw[0], "width": model.input_hw[1]}
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    assert [session.get_inputs()[0].name, session.get_outputs()[0].name] == ["pixel_values", "heatmaps"]
    for num in (1, 3, 4):
        pixels, normalised = _pictures(num, model.input_hw)
        (theirs,) = session.run(None, {"pixel_values": normalised.numpy()})
        with torch.no_grad():
            assert _far(model(pixels), torch.from_numpy(theirs)) < 1e-5


def test_torch_export_gives_the_same_maps_for_any_number_of_people(
    shallow: tuple[SapiensPose, Path], tmp_path: Path
) -> None:
    model, folder = shallow
    export.main([str(folder), "--to", "torch_export", str(tmp_path / "pose.pt2")])
    notes = {name: "" for name in graph.ATTACHED_FILES}
    run = torch.export.load(tmp_path / "pose.pt2", extra_files=notes).module()
    assert json.loads(notes["skeleton.json"])["names"] == list(COCO17.names)
    for num in (1, 3, 4):
        pixels, normalised = _pictures(num, model.input_hw)
        with torch.no_grad():
            assert _far(model(pixels), run(normalised)) < 1e-5


def test_a_batch_of_one_in_bf16(tmp_path: Path) -> None:
    model, file = _model("sapiens2_tiny", depth=1), tmp_path / "pose.pt2"
    words = ["--to", "torch_export", str(file), "--dynamic_batch", "false", "--dtype", "bf16"]
    export.main([str(_export(model, tmp_path / "weights")), *words])
    program = torch.export.load(file)
    assert {value.dtype for value in program.state_dict.values()} == {torch.bfloat16}
    run, (pixels, normalised) = program.module(), _pictures(1, model.input_hw)
    with torch.no_grad():
        theirs = run(normalised)
        assert theirs.dtype == torch.float32
        assert 1e-5 < _far(model(pixels), theirs) < 0.1
        with pytest.raises(Exception, match="1"):
            run(normalised.expand(3, -1, -1, -1))


def test_a_graph_of_other_weights_is_found_out_and_removed(tmp_path: Path) -> None:
    """The check compares numbers, not shapes."""
    folders = [_export(_model("sapiens_tiny", seed, depth=1), tmp_path / str(seed)) for seed in (1, 2)]
    right, wrong = (graph.Network(folder) for folder in folders)
    file = tmp_path / "pose.pt2"
    graph.write(wrong, file, "torch_export")
    assert "differs from PyTorch by 0.0e+00" in runtimes.check(wrong, file, (1, 3))
    with pytest.raises(UserError, match=r"pose\.pt2: differs from PyTorch by .* more than 1e-04; it was removed"):
        runtimes.check(right, file, (1,))
    assert not file.exists()


def _add_visibility(folder: Path, model: SapiensPose) -> visibility.VisibilityOutput:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2, 17, model.size.width + visibility.NUM_SHAPE, generator=generator) * 0.1
    written = visibility.VisibilityOutput(COCO17.names, weight, torch.randn(2, 17, generator=generator))
    visibility.save(folder, written)
    return written


@needs_onnx
@pytest.mark.parametrize("name", FAMILIES)
def test_a_graph_has_the_visibility_output_of_its_weights(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Equal to our own network's, which reads features and maps inside of the head; transformers loads the folder."""
    import onnxruntime

    model = _model(name, depth=1)
    folder, file = _export(model, tmp_path / "weights"), tmp_path / "pose.onnx"
    written = _add_visibility(folder, model)
    export.main([str(folder), "--to", "onnx", str(file)])
    assert "probabilities of visibility by" in capsys.readouterr().out
    pixels, normalized = _pictures(3, model.input_hw)
    with torch.no_grad(), visibility.watch_head(model.head, written) as passes:
        maps = model(pixels)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    assert [one.name for one in session.get_outputs()] == ["heatmaps", "visibility"]
    theirs = session.run(None, {"pixel_values": normalized.numpy()})
    assert _far(maps, torch.from_numpy(theirs[0])) < 1e-4
    assert passes[0].std() > 0.05
    assert _far(passes[0], torch.from_numpy(theirs[1])) < 1e-3


def test_a_graph_of_another_visibility_output_is_found_out_and_removed(tmp_path: Path) -> None:
    model = _model("sapiens_tiny", depth=1)
    folder, file = _export(model, tmp_path / "weights"), tmp_path / "pose.pt2"
    written = _add_visibility(folder, model)
    network = graph.Network(folder)
    graph.write(network, file, "torch_export")
    assert "probabilities of visibility by 0.0e+00" in runtimes.check(network, file, (1, 3))
    visibility.save(folder, visibility.VisibilityOutput(COCO17.names, written.weight, written.bias + 0.1))
    with pytest.raises(UserError, match=r"pose\.pt2: probabilities of visibility .* more than 1e-03; it was removed"):
        runtimes.check(graph.Network(folder), file, (1,))
    assert not file.exists()


# ---- fp16, TensorRT, times


@needs_onnx
def test_fp16_is_close_to_fp32_in_maps_and_points(
    fitted: tuple[SapiensPose, Path, np.ndarray], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the image that the network was fitted to: maps within 1e-2, points within 0.1 px, for any number of people."""
    import onnxruntime

    model, folder, _ = fitted
    file = tmp_path / "half.onnx"
    export.main([str(folder / "weights"), "--to", "onnx", str(file), "--dtype", "fp16"])
    said = capsys.readouterr().out
    assert "batches of 1, 3" in said and "NOT CHECKED" not in said
    assert file.stat().st_size < 0.75 * (folder / "weights" / weights.FILE).stat().st_size
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    assert [one.type for one in (*session.get_inputs(), *session.get_outputs())] == ["tensor(float)"] * 2
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (PIXEL_MEAN, PIXEL_STD))
    for num in (1, 4):
        crops = _crop(folder, model.input_hw).repeat(num, 1, 1, 1)
        (theirs,) = session.run(None, {"pixel_values": ((crops - mean) / std).numpy()})
        with torch.no_grad():
            ours = model(crops)
        assert 1e-5 < _far(ours, torch.from_numpy(theirs)) < 1e-2
        far = runtimes.distances(graph.Network(folder / "weights"), ours, torch.from_numpy(theirs))
        assert len(far) >= 12 * num and 1e-5 < far.max() < 0.1


def test_distances_are_those_of_clear_keypoints(tmp_path: Path) -> None:
    network = graph.Network(_export(_model("sapiens_tiny", depth=1), tmp_path))
    codec = Codec(input_hw=network.input_hw, heatmap_hw=(16, 12), sigma=SIGMA)
    points_xy = torch.tensor([[[20.0, 30.0], [24.5, 31.25], [25.0, 40.0]]])
    maps, _ = codec.encode(points_xy, torch.ones(1, 3))
    moved, _ = codec.encode(points_xy + torch.tensor([0.12, -0.16]), torch.ones(1, 3))
    maps[:, 1] *= 0.1  # too low
    maps[:, 2] = torch.rand(16, 12, generator=torch.Generator().manual_seed(0))
    assert runtimes.distances(network, maps, moved) == pytest.approx([0.2], abs=0.02)


@needs_onnx
def test_the_benchmark_is_a_table_of_each_runtime_and_batch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtimes, "SECONDS", 0.0)
    export.main([str(_export(_model("sapiens_tiny", depth=1), tmp_path)), "--benchmark"])
    head, columns, *rows = capsys.readouterr().out.splitlines()
    assert "fp32" in head and columns.split() == ["batch", "1", "ms", "people/s", "batch", "8", "ms", "people/s"]
    measured = {row.split(" ")[0]: [float(word) for word in row.split()[-4:]] for row in rows[:2]}
    assert list(measured) == ["PyTorch", "ONNX"]
    for ms, people, ms_of_8, people_of_8 in measured.values():
        assert ms * people == pytest.approx(1000, rel=0.1) and ms_of_8 * people_of_8 == pytest.approx(8000, rel=0.1)
    if find_spec("tensorrt") is None:
        assert rows[2].split(maxsplit=1) == ["TensorRT", "not measured: needs tensorrt; pip install tensorrt"]


@pytest.mark.skipif(
    find_spec("tensorrt") is None or not torch.cuda.is_available(), reason="needs tensorrt and the GPU it builds for"
)
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_an_engine_gives_the_same_maps(
    shallow: tuple[SapiensPose, Path], dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "pose.engine"
    export.main([str(shallow[1]), "--to", "tensorrt", str(file), "--dtype", dtype])
    assert "batches of 1, 3" in capsys.readouterr().out and file.is_file()


def test_options_that_exclude_each_other_are_refused_in_one_line(tmp_path: Path) -> None:
    weights_folder, out = str(tmp_path), str(tmp_path / "x.onnx")
    _refused([weights_folder], "--to is missing", "--benchmark")
    _refused([weights_folder, "--to", "onnx"], "OUT is missing")
    _refused([weights_folder, "--benchmark", "--to", "onnx", out], "--benchmark", "--to", "OUT")
    _refused([weights_folder, "--benchmark", "--dynamic_batch", "false"], "--benchmark", "--dynamic_batch")
    _refused([weights_folder, "--to", "tensorrt", out], out, ".engine")
    engine = [weights_folder, "--to", "tensorrt", str(tmp_path / "x.engine")]
    _refused([*engine, "--opset", "18"], "--opset 18", "only for --to onnx")
    if find_spec("tensorrt") is None:
        _refused(engine, "needs tensorrt; pip install tensorrt")


def _refused(words: list[str], *named: str) -> None:
    with pytest.raises(UserError) as caught:
        export.main(words)
    assert [word for word in named if word not in str(caught.value)] == [], caught.value
    assert "\n" not in str(caught.value)


def test_what_cannot_be_written_is_reported_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = str(_export(_model("sapiens_tiny", depth=1), tmp_path / "weights"))
    out = str(tmp_path / "out.onnx")
    _refused([folder, "--to", "torch_export", out], out, ".pt2")
    _refused([folder, "--to", "onnx", str(tmp_path / "out")], ".onnx")
    _refused([str(tmp_path), "--to", "onnx", out], str(tmp_path), "config.json")
    _refused([folder, "--to", "torch_export", str(tmp_path / "x.pt2"), "--opset", "18"], "--opset 18")
    for package in ("onnx", "onnxscript"):
        with monkeypatch.context() as without:
            without.setitem(sys.modules, package, None)
            _refused([folder, "--to", "onnx", out], f"needs {package};", "pip install sapiens_accel[onnx]")
    assert not list(tmp_path.glob("*.onnx*")) and not list(tmp_path.glob("*.pt2"))
    (tmp_path / "weights" / weights.FILE).write_bytes(b"no tensors")
    _refused([folder, "--to", "onnx", out], "cannot be loaded")
    (tmp_path / "weights" / weights.FILE).unlink()
    _refused([folder, "--to", "onnx", out], weights.FILE)


@needs_onnx
@pytest.mark.parametrize(("dtype", "opset"), [("fp32", "17"), ("bf16", "20"), ("fp32", "999")])
def test_an_operator_set_that_cannot_be_is_refused_at_once(tmp_path: Path, dtype: str, opset: str) -> None:
    folder = str(_export(_model("sapiens_tiny", depth=1), tmp_path / "weights"))
    words = [folder, "--to", "onnx", str(tmp_path / "x.onnx"), "--dtype", dtype, "--opset", opset]
    _refused(words, f"--opset {opset}", "expected 22 to" if dtype == "bf16" else "expected 18 to")


@needs_onnx
def test_a_graph_that_nothing_here_runs_is_said_to_be_unchecked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """bf16: onnxruntime has no convolution for it on the CPU. If one day it has, the numbers are compared."""
    folder = str(_export(_model("sapiens_tiny", depth=1), tmp_path / "weights"))
    export.main([folder, "--to", "onnx", str(tmp_path / "x.onnx"), "--dtype", "bf16"])
    said = capsys.readouterr().out
    assert ("a valid graph, but its numbers are NOT CHECKED" in said) != ("batches of 1, 3" in said)


def test_the_command_says_what_is_wrong_and_ends_with_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["export.py", str(tmp_path), "--to", "onnx", "x.onnx"])
    monkeypatch.delitem(
        sys.modules, "sapiens_accel.export", raising=False
    )  # it is run as a program, from its first line
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("sapiens_accel.export", run_name="__main__")
    assert ended.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"export.py: error: {tmp_path}: no config.json"), lines
