"""Numbers that are none: of weights, skeletons, networks and boxes; none reaches a table or native code."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from networks import untrained
from safetensors.torch import load_file, save_file

from sapiens_accel import train
from sapiens_accel.config.schema import Config, DataConfig, EvalConfig
from sapiens_accel.data import build
from sapiens_accel.data.detections import BoxesFile
from sapiens_accel.data.people import People
from sapiens_accel.errors import UserError
from sapiens_accel.evaluation import boxes, evaluate, networks
from sapiens_accel.evaluation.networks import Candidate
from sapiens_accel.evaluation.predict import Diverged
from sapiens_accel.inference import predict_media
from sapiens_accel.models import load
from sapiens_accel.models.sapiens import SapiensPose
from sapiens_accel.pose import draw
from sapiens_accel.pose.skeleton import COCO17
from sapiens_accel.sources import synthetic

NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("not_finite")
    root = synthetic.write(folder / "drawn", num_train=4, num_unlabelled=2, num_val=4, image_hw=(80, 100))
    data = DataConfig(root=str(root), cache_dir=str(folder / "cache"), num_workers=0, input_hw=(64, 48))
    return Config(data=data, eval=EvalConfig(flip=False, num_pictures=4, num_worst=0))


@pytest.fixture(scope="module")
def people(run: Config) -> People:
    return build.open_split(run.data, COCO17, "val")


def _candidate(folder: Path) -> Candidate:
    return Candidate(name="x", weights=folder, folder=folder)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_that_are_no_numbers_are_refused(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    file = untrained(tmp_path / "w") / "model.safetensors"
    state = {key: tensor.to(dtype) for key, tensor in load_file(file).items()}
    name = "backbone.encoder.layer.2.mlp.fc1.weight"
    state[name][3, 5], state[name][0, 0] = value, value
    save_file(state, file)
    model = SapiensPose("sapiens_tiny", 17, (64, 48))
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(UserError, match=rf"{name}' holds 2 values of {state[name].numel()} that are not finite"):
        load.load(model, str(tmp_path / "w"))
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    state[name][3, 5], state[name][0, 0] = 0.5, torch.finfo(dtype).max
    save_file(state, file)
    assert not load.load(model, str(tmp_path / "w")).missing


def test_numbers_that_only_double_precision_holds_are_refused(tmp_path: Path) -> None:
    file = untrained(tmp_path / "w") / "model.safetensors"
    state = {key: tensor.double() for key, tensor in load_file(file).items()}
    state["head.final_layer.bias"][4] = 1e39
    save_file(state, file)
    with pytest.raises(UserError, match=r"'head.final_layer.bias' holds 1 values of 17"):
        load.load(SapiensPose("sapiens_tiny", 17, (64, 48)), str(file))


@pytest.mark.parametrize("sigma", [NAN, INF, 0, -0.026, 1.5, "0.026", None, True])
def test_sigmas_that_are_none_are_refused(tmp_path: Path, run: Config, sigma: object) -> None:
    """With sigmas of 0 AP was 50.5 for a network whose AP is 0."""
    file = untrained(tmp_path / "w") / "skeleton.json"
    tree = json.loads(file.read_text())
    tree["sigmas"][3] = sigma
    file.write_text(json.dumps(tree))
    annotations = Path(str(run.data.root)) / run.data.val_annotations
    with pytest.raises(UserError) as caught:
        networks.choose_skeleton([_candidate(tmp_path / "w")], annotations, None, tmp_path)
    assert str(caught.value).startswith(f"{file}: not the skeleton of weights: sigmas: expected 17 numbers above 0")
    assert repr(sigma) in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("mirror", list(range(1, 18)), "whole numbers from 0 to 16"),
        ("mirror", [1, 2, 0, *range(3, 17)], "mirroring twice"),
        ("mirror", [0.0, *range(1, 17)], "whole numbers"),
        ("mirror", list(range(16)), "mirroring twice"),
        ("upper", [-1], "whole numbers"),
        ("edges", [[0, 17]], "whole numbers"),
        ("edges", [[0, 1, 2]], "too many values"),
        ("names", ["nose"] * 17, "different names"),
        ("names", [None] * 17, "different names"),
        ("sigmas", [0.1] * 16, "expected 17 numbers"),
    ],
)
def test_a_skeleton_that_is_none_is_refused(tmp_path: Path, run: Config, key: str, value: object, named: str) -> None:
    file = untrained(tmp_path / "w") / "skeleton.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    annotations = Path(str(run.data.root)) / run.data.val_annotations
    with pytest.raises(UserError, match=named):
        networks.choose_skeleton([_candidate(tmp_path / "w")], annotations, None, tmp_path)


@pytest.mark.parametrize("side", [NAN, INF, -INF, 1e308, 1e8, 5e-324, 1e-9, 0, -3, None, "5", [5]])
@pytest.mark.parametrize("place", [0, 3])
def test_a_box_that_is_none_is_refused(tmp_path: Path, people: People, side: object, place: int) -> None:
    """A crop of a box of 1e308 px was a division by zero."""
    if place == 0 and side in (5e-324, 1e-9, 0, -3):
        return  # a place of an image
    box: list[object] = [10.0, 10.0, 30.0, 40.0]
    box[place] = side
    whole = {"category_id": 1, "bbox": [5.0, 5.0, 20.0, 20.0], "score": 0.9}
    names = [str(row["image_id"]) for row in people.rows]
    found = [{**whole, "image_id": int(names[0])}, {**whole, "image_id": int(names[1]), "bbox": box}]
    file = tmp_path / "boxes.json"
    file.write_text(json.dumps(found))
    if side in (0, -3):  # those are left out
        assert "1 without area" in boxes.load_boxes(str(file), people).note
    else:
        with pytest.raises(UserError, match=r"boxes\.json: detection 1: "):
            boxes.load_boxes(str(file), people)
        with pytest.raises(UserError, match=r"boxes\.json: detection 1: "):
            BoxesFile(file, [f"{int(name):012d}.jpg" for name in names], 0.3)


@pytest.mark.parametrize("size", [[], "big", None, 0, -5, {}])
def test_a_size_that_is_none_tells_nothing(people: People, size: object) -> None:
    box = np.array([10.0, 10.0, 5.0, 5.0])
    assert not boxes._outside(box, {"width": size, "height": size})
    assert boxes._outside(box, {"width": 9, "height": size}) and not boxes._outside(box, {"width": 11, "height": size})


def _overflowing(folder: Path) -> Path:
    """Weights that are numbers, of a network whose heatmaps are not."""
    file = untrained(folder) / "model.safetensors"
    state = load_file(file)
    for key in state:
        if "layernorm" in key or key.startswith("head."):
            state[key] = torch.full_like(state[key], 3e38)
    save_file(state, file)
    return folder


def test_a_diverged_network_is_one_line(tmp_path: Path, run: Config, people: People) -> None:
    """It ended the process by heap corruption when its people were drawn."""
    accelerator, folder = Accelerator(cpu=True), _overflowing(tmp_path / "w")
    loaded = networks.build_networks(accelerator, [_candidate(folder)], run, COCO17)
    with pytest.raises(Diverged) as caught:
        evaluate.evaluate_networks(accelerator, loaded, people, COCO17, run.data, run.eval)
    text = str(caught.value)
    assert text.startswith(f"{folder}: heatmaps are not numbers (nan or inf) for 4 of 4 people")
    assert people.rows[0]["file_name"] in text


def test_a_diverged_network_draws_nobody(tmp_path: Path, run: Config) -> None:
    folder, images = _overflowing(tmp_path / "w"), Path(str(run.data.root)) / "val2017"
    looked = replace(run, eval=replace(run.eval, images=str(images), boxes="whole"))
    with pytest.raises(Diverged, match="heatmaps are not numbers"):
        predict_media.predict_media(Accelerator(cpu=True), [_candidate(folder)], looked)
    assert not list(folder.rglob("keypoints.json"))


def test_points_that_are_no_numbers_are_drawn_nowhere() -> None:
    """Of NaN a cast makes the least integer, with which OpenCV writes beyond the image."""
    image = np.full((60, 50, 3), 100, np.uint8)
    points = np.random.default_rng(0).uniform(5, 45, (17, 2))
    plain = draw.draw_people(image, points[None], np.ones((1, 17), bool), COCO17)
    assert (plain != image).any()
    for odd in (NAN, INF, -INF, 1e300, -1e300, 2.0**40):
        broken = points.copy()
        broken[[0, 5, 16]] = odd
        broken[7, 1] = odd
        for picture in (
            draw.draw_people(image, broken[None], np.ones((1, 17), bool), COCO17),
            draw.draw_person(image, broken, np.ones(17), COCO17),
            draw.draw_errors(image, broken, points, np.ones(17, bool), np.ones(17, bool)),
        ):
            assert picture.dtype == np.uint8
        nowhere = draw.draw_people(image, np.full((1, 17, 2), odd), np.ones((1, 17), bool), COCO17)
        assert np.array_equal(nowhere, image)


def test_a_stage_that_diverges_ends_with_its_record(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Its evaluation is a warning and an AP of 0: the run, its other stages and earlier weights are not lost."""
    out = tmp_path / "run"
    words = [
        "--stage=phase1", f"--output_dir={out}", f"--data.cache_dir={tmp_path / 'cache'}", "--data.input_hw=[64,48]",
        "--data.sigma=1", "--data.synthetic.num_train=8", "--data.synthetic.num_unlabelled=2",
        "--data.synthetic.num_val=3", "--data.num_workers=0", "--report_to=none", "--phase1.global_batch=4",
        "--phase1.steps=20", "--phase1.optim.warmup_steps=0", "--phase1.optim.lr=1e37", "--eval.num_worst=2",
        "--eval.num_pictures=2", "--max_steps=3", "--model.name=sapiens_tiny", "--phase1.optim.clip_norm=1",
    ]  # fmt: skip
    train.main(words)
    assert "phase1: warning: AP counts as 0: the network: heatmaps are not numbers" in capfd.readouterr().out
    record = json.loads((out / "phase1" / "eval.json").read_text())
    assert record["AP"] == 0 and record["step"] == 3 and math.isfinite(record["AR"])
    assert (out / "phase1" / "weights" / "model.safetensors").is_file()
