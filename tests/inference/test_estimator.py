"""PoseEstimator: the predictions of eval.py --images, to the last digit, and what it refuses."""

import importlib
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import PIL.Image
import pytest
import torch
from detectors import tiny
from networks import untrained

from sapiens_accel import PoseEstimator, PoseResult, UserError
from sapiens_accel.inference import estimator, predict_media
from sapiens_accel.pose.skeleton import COCO17
from sapiens_accel.sources import synthetic

Run = Callable[..., dict[str, Any]]
OPTIONS = {"scales": (0.7, 1.0), "nms_threshold": 0.8, "score_threshold": 0.1}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic.write(tmp_path_factory.mktemp("estimator") / "drawn", num_train=1, num_unlabelled=1, num_val=5)


@pytest.fixture(scope="module")
def weights(root: Path) -> Path:
    return untrained(root.parent / "mine")


@pytest.fixture(scope="module")
def files(root: Path) -> list[Path]:
    return sorted((root / "val2017").iterdir())


@pytest.fixture(scope="module")
def pose(weights: Path) -> PoseEstimator:
    return PoseEstimator.from_pretrained(weights, device="cpu")


@pytest.fixture
def program(tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """eval.py --images in this process: its keypoints.json."""
    monkeypatch.chdir(tmp_path)
    main = importlib.import_module("sapiens_accel.eval").main

    def run(images: Path, *words: object) -> dict[str, Any]:
        shutil.rmtree(tmp_path / "evaluations", ignore_errors=True)
        main([str(weights), "--images", str(images), "--data.num_workers", "0", "--pictures", "0", *map(str, words)])
        (file,) = tmp_path.glob("evaluations/*/images/*/keypoints.json")
        return json.loads(file.read_text())

    return run


def _video(path: Path, files: list[Path], num: int) -> None:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 12, (240, 200))
    for index in range(num):
        image = cv2.imread(str(files[index % 2]))
        assert image is not None
        writer.write(np.roll(image, 5 * index, axis=1)[:200])
    writer.release()


def _merged(results: list[PoseResult]) -> dict[str, Any]:
    tree: dict[str, Any] = {"images": [], "annotations": []}
    for number, result in enumerate(results, start=1):
        one = result.to_coco(number, len(tree["annotations"]) + 1)
        tree = one | {key: tree[key] + one[key] for key in ("images", "annotations")}
    return tree


def _assert_same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert len(ours["annotations"]) >= len(ours["images"]) > 1
    for key in ("images", "annotations", "categories"):
        assert ours[key] == theirs[key]


# ---- Equal to eval.py


@pytest.mark.parametrize("by", ["image", "detector"])
def test_a_list_is_what_eval_predicts(program: Run, weights: Path, files: list[Path], by: str, tmp_path: Path) -> None:
    """Every digit of keypoints.json: scales, flip test, NMS, thresholds, categories, order."""
    detector = str(tiny(tmp_path / "detector")) if by == "detector" else "whole"
    words = ["--scales", "0.7", "1", "--eval.nms_threshold", "0.8", "--eval.score_threshold", "0.1"]
    theirs = program(files[0].parent, "--boxes", detector, *words)
    ours = PoseEstimator.from_pretrained(weights, device="cpu", **OPTIONS)(files, detector)
    _assert_same(_merged(ours), theirs)


def test_a_video_is_what_eval_predicts(
    program: Run, pose: PoseEstimator, files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In pieces of 3 frames, the last one of 2; frames are read when they are asked for."""
    monkeypatch.setattr(predict_media, "FRAMES", 3)
    monkeypatch.setattr(estimator, "FRAMES", 3)
    _video(tmp_path / "clip.avi", files, 8)
    frames = pose(tmp_path / "clip.avi")
    assert not isinstance(frames, list | PoseResult) and next(frames).image_name == "clip_000000.jpg"
    _assert_same(_merged(list(pose(str(tmp_path / "clip.avi")))), program(tmp_path / "clip.avi"))


def test_the_csv_is_what_eval_writes(program: Run, pose: PoseEstimator, files: list[Path], tmp_path: Path) -> None:
    program(files[0], "--csv", "long")
    (theirs,) = tmp_path.glob("evaluations/*/images/*/keypoints.csv")
    result = pose(files[0])
    assert result.to_csv(tmp_path / "ours.csv") == theirs.read_text() == (tmp_path / "ours.csv").read_text()
    program(files[0], "--csv", "deeplabcut")
    (theirs,) = tmp_path.glob("evaluations/*/images/*/keypoints.csv")
    assert result.to_csv(shape="deeplabcut") == theirs.read_text()


# ---- Images and boxes in every form


def test_all_forms_of_an_image_are_the_same(pose: PoseEstimator, files: list[Path], tmp_path: Path) -> None:
    """A PNG that its EXIF data turns: as a path, bytes, PIL image, array; alone and in a list."""
    turned = tmp_path / "turned.png"
    exif = PIL.Image.Exif()
    exif[274] = 6  # to be shown turned by 90 degrees clockwise
    whole = PIL.Image.open(files[0])
    whole.crop((0, 0, 200, 240)).save(turned, exif=exif)
    upright = np.asarray(whole.crop((0, 0, 200, 240)).rotate(-90, expand=True))
    forms = [turned, str(turned), turned.read_bytes(), PIL.Image.open(turned), upright]
    results = pose(forms)
    assert results[0].image_hw == (200, 240)
    for result in [*results, pose(upright), pose(turned)]:
        assert result.keypoints == pytest.approx(results[0].keypoints, abs=1e-3)
    assert [result.image_name for result in results] == ["turned.png"] * 2 + ["image_2", "image_3", "image_4"]


def test_given_boxes_keep_their_order(pose: PoseEstimator, files: list[Path]) -> None:
    """Also repeated ones; of several images a list of arrays, one of them empty."""
    boxes = np.array([[100, 20, 60, 150], [10, 30, 90, 180], [100, 20, 60, 150], [-20, -10, 100, 300]])
    result = pose(files[0], boxes)
    assert result.keypoints.shape == (4, 17, 2) and result.scores.shape == (4, 17) and result.names == COCO17.names
    assert (result.boxes == boxes).all()
    # Of equal crops in a batch some kernels of a CPU round differently.
    assert result.keypoints[0] == pytest.approx(result.keypoints[2], abs=1e-3)
    assert result.person_scores.shape == result.box_scores.shape == (4,)
    for number, box in enumerate(boxes):
        alone = pose(files[0], [box])
        assert alone.keypoints[0] == pytest.approx(result.keypoints[number], abs=1e-3)
    several = pose(files[:3], [boxes[:1], np.zeros((0, 4)), boxes[1:]])
    assert [len(one) for one in several] == [1, 0, 3]
    first = pose(files[2], boxes[1:])
    assert several[2].keypoints == pytest.approx(first.keypoints, abs=1e-3)


def test_no_boxes_are_no_people(pose: PoseEstimator, files: list[Path]) -> None:
    result = pose(files[0], [])
    assert len(result) == 0
    assert (result.keypoints.shape, result.scores.shape, result.boxes.shape) == ((0, 17, 2), (0, 17), (0, 4))
    assert result.to_coco()["annotations"] == [] and result.to_csv().count("\n") == 1
    assert (result.draw(files[0]) == estimator.read_pixels(files[0])).all()
    assert pose([]) == []


def test_people_are_drawn_in_the_image(pose: PoseEstimator, files: list[Path]) -> None:
    image = estimator.read_pixels(files[0])
    result = pose(image, [[10, 30, 90, 180]])
    drawn = result.draw(PIL.Image.fromarray(image))
    changed = (drawn != image).any(axis=2)
    assert drawn.shape == image.shape and changed.any() and not changed[:, 180:].any()
    with pytest.raises(UserError, match=r"draw: the image is not that of these people \(expected 240x240 px"):
        result.draw(image[:100])


def test_several_weights_are_averaged(weights: Path, files: list[Path], tmp_path: Path, pose: PoseEstimator) -> None:
    other = untrained(tmp_path / "other", 1)
    both, alone = (PoseEstimator.from_pretrained(names, device="cpu")(files[0]) for names in ([weights, other], other))
    first = pose(files[0])
    assert not np.allclose(both.scores, alone.scores) and (both.scores <= np.maximum(alone.scores, first.scores)).all()


def test_bfloat16_is_near(weights: Path, files: list[Path], pose: PoseEstimator) -> None:
    half = PoseEstimator.from_pretrained(weights, "cpu", torch.bfloat16)(files[0])
    whole = pose(files[0])
    assert 0 < np.abs(half.scores - whole.scores).max() < 0.05


# ---- What is refused


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("nothing.jpg", r"nothing\.jpg: no such file or folder"),
        (".", r"\.: a folder \(expected an image or a video\)\. Give a list"),
        (b"no image", r"image 0: its 8 bytes are no image: it does not decode"),
        (b"", r"image 0: its 0 bytes"),
        (
            np.zeros((4, 4, 3)),
            r"uint8 \[height, width, 3\] in RGB order, found float64 \[4, 4, 3\]\. Convert values of 0 to 1 by",
        ),
        (np.zeros((4, 4), np.uint8), r"found uint8 \[4, 4\]"),
        (np.zeros((3, 4, 4), np.uint8), r"found uint8 \[3, 4, 4\]"),
        (np.zeros((1, 4, 4, 3), np.uint8), r"found uint8 \[1, 4, 4, 3\]\. Give the images of a batch as a list"),
        ("https://example.org/a.jpg", r"example\.org/a\.jpg: an address .* Download it"),
        (np.zeros((0, 4, 3), np.uint8), r"found uint8 \[0, 4, 3\]"),
        (PIL.Image.new("I;16", (4, 4)), "a PIL image of mode I;16"),
        (torch.zeros(3, 4, 4), "expected a path, .* found Tensor"),
        (None, "expected a path, .* found NoneType"),
    ],
)
def test_what_is_no_image_is_one_line(pose: PoseEstimator, image: Any, message: str) -> None:
    for given in (image, [np.zeros((9, 9, 3), np.uint8), image]):
        with pytest.raises(UserError, match=message.replace("image 0", "image [01]")) as refused:
            pose(given)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        (
            [1, 2, 3, 4],
            r"boxes of image_0: expected an array \[N, 4\] of x y width height, found \[4\]\. Write one box as \[\[",
        ),
        (np.zeros((2, 5)), r"found \[2, 5\]"),
        ([[1, 2, 3, "x"]], r"expected an array \[N, 4\] of numbers, found list"),
        ([[1, 2, 3, 4], [1, 2, 0, 4]], r"box 1, 1 2 0 4, has no area"),
        ([[1, 2, float("nan"), 4]], "box 0, 1 2 nan 4, has no area"),
        ([[240, 2, 30, 40]], r"box 0, 240 2 30 40, is outside of the image of 240x200 px"),
        ([[-9, 2, 9, 40]], "is outside of the image"),
    ],
)
def test_bad_boxes_are_one_line(pose: PoseEstimator, boxes: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        pose(np.zeros((200, 240, 3), np.uint8), boxes)


def test_boxes_of_another_number_of_images(pose: PoseEstimator, files: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"expected an array \[N, 4\] for each of 2 images, found 1"):
        pose(files[:2], [np.zeros((1, 4))])
    with pytest.raises(UserError, match="boxes nothing/here: "):
        pose(files[0], "nothing/here")
    with pytest.raises(
        UserError, match=r"boxes gt: no such folder \(expected 'image', 'detector', "
    ):  # labels, which an image has not
        pose(files[0], "gt")
    _video(tmp_path / "clip.avi", files, 2)
    with pytest.raises(UserError, match="boxes: an array, for a video"):
        pose(tmp_path / "clip.avi", np.zeros((1, 4)))


def test_a_video_that_ends_in_mid_frame(pose: PoseEstimator, files: list[Path], tmp_path: Path) -> None:
    """The frames that decode come first; one of which nothing decodes is refused at once."""
    _video(tmp_path / "clip.avi", files, 8)
    content = (tmp_path / "clip.avi").read_bytes()
    (tmp_path / "cut.avi").write_bytes(content[: len(content) * 2 // 3])
    results = []
    with pytest.raises(UserError, match=r"cut\.avi: of 8 frames that it says to have, [3-6] decode"):
        for result in pose(tmp_path / "cut.avi"):
            results.append(result)
    assert 3 <= len(results) <= 6
    (tmp_path / "none.avi").write_bytes(content[:100])
    with pytest.raises(UserError, match=r"none\.avi: "):
        list(pose(tmp_path / "none.avi"))


def test_an_image_cut_short(pose: PoseEstimator, files: list[Path], tmp_path: Path) -> None:
    buffer = io.BytesIO()
    PIL.Image.open(files[0]).save(buffer, "JPEG")
    (tmp_path / "cut.jpg").write_bytes(buffer.getvalue()[:-200])
    with pytest.raises(UserError, match=r"cut\.jpg: does not decode"):
        pose(tmp_path / "cut.jpg")
    with pytest.raises(UserError, match=r"image 0: its .* does not decode"):
        pose(buffer.getvalue()[:-200])


def test_a_video_in_a_list_is_refused_as_one(pose: PoseEstimator, files: list[Path], tmp_path: Path) -> None:
    (tmp_path / "clip.mp4").touch()
    with pytest.raises(UserError, match=r"clip\.mp4: a video in a list .* Give a video alone"):
        pose([files[0], tmp_path / "clip.mp4"])


def test_a_notebook_shows_people_in_one_line(pose: PoseEstimator, files: list[Path]) -> None:
    shown = repr(pose(files[0], [[10, 10, 90, 90], [20, 20, 90, 90]]))
    assert shown == f"PoseResult({files[0].name}, 240x240 px: 2 boxes, 17 keypoints each)"


def test_what_from_pretrained_refuses(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such option flp \(expected one of flip, scales"):
        PoseEstimator.from_pretrained(weights, flp=True)
    with pytest.raises(UserError, match=r"--eval.scales: out of its range"):
        PoseEstimator.from_pretrained(weights, scales=(0,))
    with pytest.raises(UserError, match=r"dtype int8: expected one of float32, bfloat16, float16"):
        PoseEstimator.from_pretrained(weights, "cpu", "int8")
    with pytest.raises(UserError, match="dtype float16: not on a CPU"):
        PoseEstimator.from_pretrained(weights, "cpu", torch.float16)
    with pytest.raises(UserError, match="device tpu9: not on this machine"):
        PoseEstimator.from_pretrained(weights, "tpu9")
    with pytest.raises(UserError, match=r"no such run directory or weights here"):
        PoseEstimator.from_pretrained(tmp_path / "nothing")
    other = shutil.copytree(weights, tmp_path / "other")
    (other / "skeleton.json").write_text(json.dumps({"names": ["nose"]}))
    with pytest.raises(UserError, match=r"skeleton\.json: not the skeleton of weights"):
        PoseEstimator.from_pretrained(other)


def test_the_order_of_colors_is_documented() -> None:
    assert "BGR" in (PoseEstimator.__call__.__doc__ or "")
