"""eval.py --images: keypoints in a user's own images and videos are those that evaluation predicts."""

import importlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import forks
import numpy as np
import pandas as pd
import PIL.Image
import pytest
import torch
from detectors import tiny
from networks import untrained
from transformers import AutoImageProcessor

from sapiens_accel.config import parse as config
from sapiens_accel.config.schema import EvalConfig
from sapiens_accel.data import people as coco
from sapiens_accel.errors import UserError
from sapiens_accel.evaluation import boxes as detections
from sapiens_accel.evaluation import networks as candidates
from sapiens_accel.evaluation.networks import Candidate
from sapiens_accel.evaluation.predict import PredictionSetup, predict
from sapiens_accel.inference import detect_people as boxes
from sapiens_accel.inference import outputs, predict_media
from sapiens_accel.inference.estimator import PoseEstimator
from sapiens_accel.pose import draw, geometry
from sapiens_accel.pose.person_boxes import PeopleSizes
from sapiens_accel.pose.skeleton import COCO17, SAPIENS308, WHOLEBODY133, Skeleton
from sapiens_accel.sources import images as photo
from sapiens_accel.sources import synthetic

REPOSITORY = Path(__file__).resolve().parents[2]
REAL = (REPOSITORY / os.environ.get("SAPIENS_ACCEL_TEST_DATA", "../shared/data") / "coco_mini").resolve()
VAL = "annotations/person_keypoints_val2017.json"
ALL = ("--eval.nms_threshold", "1", "--eval.score_threshold", "0")
Main = Callable[..., tuple[dict[str, Any], str]]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic.write(tmp_path_factory.mktemp("own") / "drawn", num_train=1, num_unlabelled=1, num_val=9)


@pytest.fixture(scope="module")
def weights(root: Path) -> Path:
    return untrained(root.parent / "mine")


@pytest.fixture(scope="module")
def detector(root: Path) -> Path:
    return tiny(root.parent / "detector")


@pytest.fixture
def main(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Main:
    """eval.py's main in this process, in an empty folder: what it wrote and what it said."""
    monkeypatch.syspath_prepend(str(REPOSITORY))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SAPIENS_ACCEL_CACHE", str(tmp_path / "cache"))
    program = importlib.import_module("sapiens_accel.eval").main

    def run(weights: Path, images: Path, *words: object) -> tuple[dict[str, Any], str]:
        shutil.rmtree(tmp_path / "evaluations", ignore_errors=True)
        program([str(weights), "--images", str(images), "--data.num_workers", "0", *map(str, words)])
        (file,) = tmp_path.glob("evaluations/*/images/*/keypoints.json")
        return json.loads(file.read_text()), capsys.readouterr().out

    return run


def _people(tree: dict[str, Any]) -> dict[tuple[str, tuple[float, ...]], dict[str, Any]]:
    """Annotations by image and box."""
    names = {image["id"]: image["file_name"] for image in tree["images"]}
    found = {(names[one["image_id"]], tuple(np.round(one["bbox"], 1))): one for one in tree["annotations"]}
    assert len(found) == len(tree["annotations"])
    return found


def _numbers(tree: dict[str, Any]) -> np.ndarray:
    """[people, keypoints, x y v score], in the order of the file."""
    rows = [np.reshape(one["keypoints"], (-1, 3)).T for one in tree["annotations"]]
    return np.stack([[*row, one["keypoint_scores"]] for row, one in zip(rows, tree["annotations"], strict=True)])


# ---- The same keypoints


def test_keypoints_are_those_of_evaluation(main: Main, weights: Path, root: Path, tmp_path: Path) -> None:
    """Boxes of the labels' own file; flip test and two scales; the prediction is evaluation's, within 1e-4 px."""
    scales = ("--scales", "0.7", "1.0")
    tree, said = main(weights, root / "val2017", "--boxes", root / VAL, *scales, *ALL)
    people = coco.labeled_people(root, VAL, "val2017", 17, tmp_path / "cache")
    run = config.load(["--eval.scales=[0.7,1.0]", "--data.num_workers=0"])
    network, _ = candidates.build_network(
        Candidate(name="mine", weights=weights, folder=tmp_path), run, COCO17, torch.device("cpu")
    )
    setup = PredictionSetup(skeleton=COCO17, data=run.data, config=run.eval, device=torch.device("cpu"))
    theirs = predict([network], detections.ground_truth_boxes(people), setup)
    assert len(tree["annotations"]) == len(people) == 9 and "9 people in" in said
    ours = _people(tree)
    for row, points_xy, scores in zip(people.rows, theirs.points_xy, theirs.scores, strict=True):
        one = ours[Path(row["file_name"]).name, tuple(np.round(row["box_xywh"], 1))]
        points = np.reshape(one["keypoints"], (-1, 3))
        assert points[:, :2] == pytest.approx(points_xy, abs=1e-4)
        assert one["keypoint_scores"] == pytest.approx(scores, abs=1e-4)
        assert points[:, 2].tolist() == (2 * (scores > 0)).tolist()
        assert one["score"] == pytest.approx(scores[scores > 0].mean(), abs=1e-4)


def test_the_file_is_cocos_and_can_be_learned_from(main: Main, weights: Path, root: Path, tmp_path: Path) -> None:
    words = ("--boxes", root / VAL, "--eval.nms_threshold", 1)
    threshold = round(float(np.median(_numbers(main(weights, root / "val2017", *words)[0])[:, 3])), 3)
    tree, _ = main(weights, root / "val2017", *words, "--eval.score_threshold", threshold)
    numbers, kind = _numbers(tree), tree["categories"][0]
    labeled = numbers[:, 3] > threshold
    assert 0.05 < labeled.mean() < 0.95
    far = abs(numbers[:, 3] - threshold) > 1e-4  # of the scores, four digits are written
    assert (numbers[:, 2] == 2 * labeled)[far].all()
    assert [one["num_keypoints"] for one in tree["annotations"]] == (numbers[:, 2] > 0).sum(axis=1).tolist()
    assert kind["keypoints"] == list(COCO17.names) and {len(edge) for edge in kind["skeleton"]} == {2}
    assert [[a - 1, b - 1] for a, b in kind["skeleton"]] == [list(edge) for edge in COCO17.edges]
    assert all((image["width"], image["height"]) == (240, 240) for image in tree["images"])
    (tmp_path / "data").mkdir()
    shutil.copytree(root / "val2017", tmp_path / "data" / "val2017")
    (tmp_path / "data" / "mine.json").write_text(json.dumps(tree))
    people = coco.labeled_people(tmp_path / "data", "mine.json", "val2017", 17, tmp_path / "cache")
    with_any = [one for one in tree["annotations"] if one["num_keypoints"]]
    assert coco.keypoints_of(people.rows).reshape(-1, 51).tolist() == [one["keypoints"] for one in with_any]


def test_without_boxes_each_image_is_a_person(main: Main, weights: Path, root: Path, tmp_path: Path) -> None:
    """Images of different shapes; the same as a file that says so."""
    folder = tmp_path / "pics"
    folder.mkdir()
    whole = []
    for index, path in enumerate(sorted((root / "val2017").iterdir())):
        image = cv2.imread(str(path))
        assert image is not None
        cv2.imwrite(str(folder / f"p{index}.png"), image[: 240 - 30 * index, : 120 + 30 * index])
        whole.append({"image_id": f"p{index}", "bbox": [0, 0, min(240, 120 + 30 * index), 240 - 30 * index]})
    (tmp_path / "whole.json").write_text(json.dumps(whole))
    alone, said = main(weights, folder, *ALL)
    filed, _ = main(weights, folder, "--boxes", tmp_path / "whole.json", *ALL)
    assert "boxes: whole images" in said
    assert alone["annotations"] == filed["annotations"] and len(alone["annotations"]) == len(whole) > 3
    assert alone["images"] == filed["images"]
    one, _ = main(weights, folder / "p2.png", "--boxes", "whole", *ALL)
    assert one["annotations"][0]["keypoints"] == pytest.approx(alone["annotations"][2]["keypoints"], abs=2e-4)


def test_people_of_one_image_are_distinguished_and_nobody_is_there_twice(
    main: Main, weights: Path, root: Path, tmp_path: Path
) -> None:
    rows = [row for row in json.loads((root / VAL).read_text())["annotations"] if row["num_keypoints"]]
    several = next(row["image_id"] for row in rows if sum(row["image_id"] == one["image_id"] for one in rows) > 1)
    here = [{"image_id": several, "bbox": row["bbox"], "score": 0.9} for row in rows if row["image_id"] == several]
    again = {**here[0], "score": 0.7}
    unsure = {**here[0], "score": 0.4}
    for name, listed in (("once.json", here), ("twice.json", [again, *here, unsure])):
        (tmp_path / name).write_text(json.dumps(listed))
    once, _ = main(weights, root / "val2017", "--boxes", tmp_path / "once.json")
    twice, said = main(weights, root / "val2017", "--boxes", tmp_path / "twice.json")
    left_out = f"1 of {len(here) + 1} boxes are left out: their people are those of others (OKS above"
    assert left_out in said
    assert _people(twice).keys() == _people(once).keys() and len(_people(once)) == len(here)
    assert {one["box_score"] for one in twice["annotations"]} == {0.9}
    kept, _ = main(weights, root / "val2017", "--boxes", tmp_path / "twice.json", "--eval.nms_threshold", 1,
                   "--eval.min_box_score", 0.3)  # fmt: skip
    assert len(kept["annotations"]) == len(here) + 2


# ---- Detectors and videos


def _video(path: Path, root: Path, num: int) -> list[np.ndarray]:
    """Images of people that move; the frames as OpenCV decodes them (BGR)."""
    pictures = [cv2.imread(str(path)) for path in sorted((root / "val2017").iterdir())]
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 12, (240, 200))
    for index in range(num):
        picture = pictures[index % 2]
        assert picture is not None
        writer.write(np.roll(picture, 5 * index, axis=1)[:200])
    writer.release()
    capture, frames = cv2.VideoCapture(str(path)), []
    while (read := capture.read())[0]:
        frames.append(read[1])
    assert len(frames) == num
    return frames


@pytest.fixture
def pieces_of_3_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predict_media, "FRAMES", 3)


@pytest.mark.usefixtures("pieces_of_3_frames")
@pytest.mark.parametrize("by", ["whole", pytest.param("detector", marks=pytest.mark.slow)])
def test_a_video_is_its_frames(main: Main, weights: Path, root: Path, detector: Path, tmp_path: Path, by: str) -> None:
    """Frame by frame what the images of the frames give, in pieces of 3 frames; and a video of as many frames."""
    frames = _video(tmp_path / "clip.avi", root, 8)
    folder = tmp_path / "frames"
    folder.mkdir()
    for index, frame in enumerate(frames):
        cv2.imwrite(str(folder / f"clip_{index:06d}.png"), frame)
    words = ("--boxes", detector if by == "detector" else by, *ALL)
    pictures, _ = main(weights, folder, *words)
    video, said = main(weights, tmp_path / "clip.avi", *words)
    num = len({one["track_id"] for one in video["annotations"]})
    line = f"{len(video['annotations'])} people in 8 frames of "
    assert line in said and f", {num} identit" in said.split(line)[1].splitlines()[0]
    visible = sum(v > 0 for one in video["annotations"] for v in one["keypoints"][2::3])
    assert f"of {17 * len(video['annotations'])} keypoints {visible} are drawn (score above 0, --eval.score" in said
    assert [one["file_name"] for one in video["images"]] == [f"clip_{index:06d}.jpg" for index in range(8)]
    if by == "detector":
        assert len(video["annotations"]) > 16
    assert [one["image_id"] for one in video["annotations"]] == [one["image_id"] for one in pictures["annotations"]]
    assert _numbers(video) == pytest.approx(_numbers(pictures), abs=2e-2 if by == "detector" else 1e-3)
    place = tmp_path / "evaluations" / "mine" / "images" / "clip"
    assert sorted(path.name for path in place.iterdir()) == ["drawn.mp4", "keypoints.json"]
    drawn = cv2.VideoCapture(str(place / "drawn.mp4"))
    shown = []
    while (read := drawn.read())[0]:
        shown.append(read[1])
    assert drawn.get(cv2.CAP_PROP_FPS) == pytest.approx(12)
    assert [one.shape for one in shown] == [(200, 240, 3)] * 8
    for index, one in enumerate(shown):
        difference = [np.abs(one.astype(int) - frame).mean() for frame in frames]
        assert int(np.argmin(difference)) == index


@pytest.mark.usefixtures("pieces_of_3_frames")
def test_the_csv_has_what_the_json_has(main: Main, root: Path, tmp_path: Path) -> None:
    """Of a film DeepLabCut's table, of which a line is a frame; and the animal keeps its name."""
    _video(tmp_path / "clip.avi", root, 8)
    mouse = untrained(tmp_path / "mine", 0, replace(COCO17, categories=("mouse",)))
    tree, said = main(mouse, tmp_path / "clip.avi", "--csv", "deeplabcut", "--boxes", "whole", *ALL)
    place = tmp_path / "evaluations" / "mine" / "images" / "clip"
    assert str(Path("images") / "clip" / "keypoints.csv") in said
    table = pd.read_csv(place / "keypoints.csv", header=[0, 1, 2], index_col=0)
    assert table.index.tolist() == list(range(8)) and table.shape == (8, 51)
    numbers = _numbers(tree)
    assert table.to_numpy().reshape(8, 17, 3) == pytest.approx(numbers[:, [0, 1, 3]].transpose(0, 2, 1), abs=6e-4)
    assert [one["name"] for one in tree["categories"]] == ["mouse"]
    tree, _ = main(mouse, root / "val2017", "--csv", "long", *ALL)
    table = pd.read_csv(tmp_path / "evaluations" / "mine" / "images" / "val2017" / "keypoints.csv")
    assert set(table.category) == {"mouse"} and set(table.image) == {one["file_name"] for one in tree["images"]}
    assert table.x.to_numpy() == pytest.approx(_numbers(tree)[:, 0].ravel(), abs=6e-4)
    assert set(zip(table.image, table.image_id, strict=True)) == {
        (one["file_name"], one["id"]) for one in tree["images"]
    }


def test_boxes_of_all_categories_of_the_weights_are_used(main: Main, root: Path, tmp_path: Path) -> None:
    """5 of 8 animals were left out in silence: those of other categories than the first."""
    weights = untrained(tmp_path / "animals", 0, replace(COCO17, categories=("dog",)))
    tree = json.loads((root / VAL).read_text())
    tree["categories"] = [
        {"id": 3, "name": "dog", "keypoints": list(COCO17.names)},
        {"id": 7, "name": "cat", "keypoints": list(COCO17.names)},  # with the same keypoints
        {"id": 9, "name": "car"},
    ]
    annotations = tree["annotations"]
    for one, kind in zip(annotations, (3, 7, 7, 3, 9, 7, 3, 3, 7), strict=True):
        one["category_id"] = kind
    annotations[3]["iscrowd"] = 1
    annotations[8]["bbox"][0] = 5000
    (tmp_path / "animals.json").write_text(json.dumps(tree))
    found, said = main(weights, root / "val2017", "--boxes", tmp_path / "animals.json", *ALL)
    assert [(one["id"], one["name"]) for one in found["categories"]] == [(3, "dog"), (7, "cat")]
    shown = {tuple(np.round(one["bbox"], 1)): one["category_id"] for one in found["annotations"]}
    used = [one for place, one in enumerate(annotations) if place not in (3, 4, 8)]
    assert shown == {tuple(np.round(one["bbox"], 1)): one["category_id"] for one in used} and len(shown) == 6
    assert "animals.json: of its 9 boxes are left out: 1 of crowds, 1 of other categories (car)" in said
    assert "1 boxes of " in said and "nothing of them is in their image" in said
    # A list has ids alone: all of them for weights of several categories, else category 1, and the rest is counted.
    names = {image["id"]: image["file_name"] for image in tree["images"]}
    boxes = [
        {"file_name": names[one["image_id"]], "category_id": one["category_id"] % 7, "bbox": one["bbox"], "score": 0.9}
        for one in used
    ]
    for place, one in enumerate(boxes):
        one["category_id"] = 1 + place % 2
    (tmp_path / "list.json").write_text(json.dumps(boxes))
    with pytest.raises(UserError, match=r"several categories \(1, 2\), and the weights are of dog: which of them"):
        main(weights, root / "val2017", "--boxes", tmp_path / "list.json", *ALL)
    person = untrained(tmp_path / "person", 0, COCO17)
    found, said = main(person, root / "val2017", "--boxes", tmp_path / "list.json", *ALL)
    assert len(found["annotations"]) == 3 and "list.json: of its 6 boxes are left out: 3 of other categories" in said
    texts = [one | {"category_id": ("Dog", "cat")[one["category_id"] - 1]} for one in boxes]
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    found, said = main(weights, root / "val2017", "--boxes", tmp_path / "texts.json", *ALL)
    assert len(found["annotations"]) == 3 and "texts.json: of its 6 boxes are left out: 3 of other categories" in said
    both = untrained(tmp_path / "animals", 0, replace(COCO17, categories=("cat", "dog")))
    found, said = main(both, root / "val2017", "--boxes", tmp_path / "list.json", *ALL)
    assert sorted(one["category_id"] for one in found["annotations"]) == [1, 1, 1, 2, 2, 2] and "left out" not in said


def test_boxes_of_another_size_than_in_training_are_reported(main: Main, root: Path, tmp_path: Path) -> None:
    """On weights trained with tight boxes, whole images gave a mean error of 199 px of 320x240, in silence."""
    people = coco.labeled_people(root, VAL, "val2017", 17, tmp_path / "cache")
    sizes = coco.measure_people([people])
    assert sizes is not None and sizes.share[2] < 0.44
    tight = untrained(tmp_path / "tight", 0, replace(COCO17, people=sizes))
    _, said = main(tight, root / "val2017", *ALL)
    (line,) = [line for line in said.splitlines() if line.startswith("warning")]
    assert "whole images: boxes take up 100% of their image" in line and "--boxes detector" in line
    _, said = main(tight, root / "val2017", "--boxes", root / VAL, *ALL)
    assert "warning" not in said
    whole = PeopleSizes(share=(1, 1, 1), aspect=(1, 1, 1))
    _, said = main(untrained(tmp_path / "whole", 0, replace(COCO17, people=whole)), root / "val2017", *ALL)
    assert "warning" not in said
    # The same boxes, evaluated.
    boxes = detections.ground_truth_boxes(people)
    assert detections.describe_misfit(boxes, people, replace(COCO17, people=sizes)) == ""
    told = detections.describe_misfit(boxes, people, replace(COCO17, people=whole))
    assert told.startswith("warning: ground truth: boxes take up") and "100.0% to 100%" in told


def test_a_file_that_finds_nobody_is_an_error_and_leaves_no_file(
    main: Main, weights: Path, root: Path, tmp_path: Path
) -> None:
    """A file whose boxes all lie outside of their images ended with 0 people and exit code 0."""
    row = json.loads((root / VAL).read_text())["images"][0]
    away = {"image_id": row["id"], "bbox": [9000, 9000, 20, 40], "score": 0.9}
    (tmp_path / "away.json").write_text(json.dumps([away]))
    with pytest.raises(UserError, match=r"away.json: none of its boxes is in one of the 7 images"):
        main(weights, root / "val2017", "--boxes", tmp_path / "away.json", "--csv", "long")
    assert not list(tmp_path.glob("evaluations/**/*.part")) and not list(tmp_path.glob("evaluations/**/keypoints.*"))


def test_an_error_leaves_no_part_of_a_file(
    main: Main, weights: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(outputs.draw, "draw_people", fail)
    with pytest.raises(OSError, match="the disk is full"):
        main(weights, root / "val2017", "--csv", "long")
    assert not list(tmp_path.glob("evaluations/**/.*"))


def test_images_are_read_with_the_bits_of_the_training(main: Main, root: Path, tmp_path: Path) -> None:
    """12 bits in 16-bit images were read as nearly black by whoever did not repeat --data.image_bits."""
    (tmp_path / "deep").mkdir()
    (tmp_path / "flat").mkdir()
    for file in sorted((root / "val2017").iterdir())[:2]:
        image = cv2.imread(str(file))
        assert image is not None
        cv2.imwrite(str(tmp_path / "flat" / f"{file.stem}.png"), image)
        cv2.imwrite(str(tmp_path / "deep" / f"{file.stem}.png"), image.astype(np.uint16) << 4)
    twelve = untrained(tmp_path / "twelve", 0, replace(COCO17, image_bits=12))
    assert json.loads((twelve / "skeleton.json").read_text())["image_bits"] == 12
    try:
        flat, _ = main(twelve, tmp_path / "flat", *ALL)
        deep, said = main(twelve, tmp_path / "deep", *ALL)
        assert "16-bit images are read with --data.image_bits 12, as in the training of the weights" in said
        assert [one["keypoints"] for one in deep["annotations"]] == [one["keypoints"] for one in flat["annotations"]]
        dark, said = main(twelve, tmp_path / "deep", "--data.image_bits", 16, *ALL)
        assert "warning: --data.image_bits 16: the weights were trained with 12" in said
        assert [one["keypoints"] for one in dark["annotations"]] != [one["keypoints"] for one in flat["annotations"]]
    finally:
        photo.set_image_bits(None)
    assert "image_bits" not in json.loads((untrained(tmp_path / "plain") / "skeleton.json").read_text())


def test_boxes_are_padded_as_in_the_training(main: Main, root: Path, tmp_path: Path) -> None:
    """Weights away from their run were given 1.25, whatever they were trained with."""
    images, tight = root / "val2017", untrained(tmp_path / "tight", 0, replace(COCO17, box_padding=1.0))
    plain = untrained(tmp_path / "plain", 0)

    def keypoints(*words: Any) -> tuple[list[Any], str]:
        tree, said = main(*words, *ALL)
        return [one["keypoints"] for one in tree["annotations"]], said

    expected, said = keypoints(plain, images, "--data.box_padding", 1)
    assert "box_padding" not in said
    found, said = keypoints(tight, images)
    assert "boxes have --data.box_padding 1, as in the training of the weights" in said
    assert found == expected
    for padding in ("1.25", "1.1"):
        other, said = keypoints(tight, images, "--data.box_padding", padding)
        assert f"warning: --data.box_padding {padding}: the weights were trained with 1" in said
        assert other == keypoints(plain, images, "--data.box_padding", padding)[0] != expected
    file = sorted(images.iterdir())[0]
    whole = PoseEstimator.from_pretrained(tight)(file).to_coco()["annotations"]
    assert [one["keypoints"] for one in whole] == expected[:1]
    processor = AutoImageProcessor.from_pretrained(tight, trust_remote_code=True)
    image = PIL.Image.open(file)
    crop = geometry.crop_around_box(np.array([0.0, 0, *image.size]), 1.0, (64, 48)).matrix((64, 48))
    assert np.allclose(processor._matrix([0, 0, *image.size]), crop, atol=1e-9)


def test_boxes_by_the_detector_are_those_of_the_program(
    main: Main, weights: Path, root: Path, detector: Path, tmp_path: Path
) -> None:
    """eval.py with the detector itself, and with the file that sapiens_accel.boxes wrote with it."""
    words = ["--out", tmp_path / "b.json", "--detector", detector, "--num_workers", 0]
    boxes.main([str(root / "val2017"), *map(str, words)])
    itself, _ = main(weights, root / "val2017", "--boxes", detector, *ALL)
    filed, said = main(weights, root / "val2017", "--boxes", tmp_path / "b.json", *ALL)
    assert f"boxes: of {tmp_path / 'b.json'}" in said
    assert len(itself["annotations"]) == len(filed["annotations"]) > 10
    # Two of nearly equal scores may change places; boxes are written to 0.01 px.
    sides = [sorted((one["image_id"], *one["bbox"]) for one in tree["annotations"]) for tree in (itself, filed)]
    assert np.array(sides[0]) == pytest.approx(np.array(sides[1]), abs=0.011)


def test_a_films_boxes_are_those_of_its_frames(
    main: Main, weights: Path, root: Path, detector: Path, tmp_path: Path
) -> None:
    _video(tmp_path / "clip.avi", root, 6)
    words = [tmp_path / "clip.avi", "--out", tmp_path / "b.json", "--detector", detector, "--every", 2]
    boxes.main([*map(str, words), "--num_workers", "0"])
    tree, _ = main(weights, tmp_path / "clip.avi", "--boxes", tmp_path / "b.json", *ALL)
    assert {one["image_id"] for one in tree["annotations"]} == {1, 3, 5} and len(tree["images"]) == 6


@pytest.mark.slow
@pytest.mark.launch
def test_processes_change_nothing(weights: Path, root: Path, detector: Path, tmp_path: Path) -> None:
    """Two processes: each finds and looks at half of the people; rank 0 writes."""
    _video(tmp_path / "clip.avi", root, 5)
    trees = []
    for num in (1, 2):
        folder = tmp_path / str(num)
        folder.mkdir()
        words = [weights, "--images", tmp_path / "clip.avi", "--boxes", detector, "--data.num_workers", 0, *ALL]
        done = forks.run([REPOSITORY / "eval.py", *words], cwd=folder, processes=num)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("people in 5 frames") == 1
        trees.append(json.loads((folder / "evaluations" / "mine" / "images" / "clip" / "keypoints.json").read_text()))
    one, two = trees
    assert one["images"] == two["images"] and len(one["annotations"]) > 10
    assert [p["image_id"] for p in one["annotations"]] == [p["image_id"] for p in two["annotations"]]
    assert _numbers(one) == pytest.approx(_numbers(two), abs=2e-2)


# ---- Weights


def test_the_keypoints_are_the_weights_own(main: Main, weights: Path, root: Path, tmp_path: Path) -> None:
    names = ("left_toe", "right_toe", "hat")
    three = Skeleton(names=names, mirror=(1, 0, 2), sigmas=(0.1,) * 3, upper=(2,), edges=((0, 2),))
    for skeleton in (WHOLEBODY133, SAPIENS308, three):
        tree, _ = main(
            untrained(tmp_path / f"of{skeleton.num_keypoints}", 0, skeleton), root / "val2017", "--pictures", 0
        )
        assert tree["categories"][0]["keypoints"] == list(skeleton.names)
        assert len(tree["annotations"][0]["keypoints"]) == 3 * skeleton.num_keypoints
    (tmp_path / "of3" / "skeleton.json").unlink()
    with pytest.raises(UserError, match=r"of3: weights of unknown keypoints: 3 keypoints \(left_toe, right_toe, hat"):
        main(tmp_path / "of3", root / "val2017")


def test_of_a_run_the_last_stage_looks(main: Main, root: Path, tmp_path: Path) -> None:
    run = tmp_path / "evaluations" / "run"  # where the fixture looks for results
    first, last = untrained(tmp_path / "first", seed=1), untrained(tmp_path / "last", seed=2)
    expected, _ = main(last, root / "val2017", *ALL)
    for stage, weights in (("phase1", first), ("ssl", last)):
        shutil.copytree(weights, tmp_path / "run" / stage / "weights")
    config.save(config.load(["--data.root=nowhere"]), tmp_path / "run" / "config.yaml")
    program = importlib.import_module("sapiens_accel.eval").main
    program([str(tmp_path / "run"), "--images", str(root / "val2017"), "--data.num_workers=0", *ALL])
    assert not run.exists()
    tree = json.loads((tmp_path / "run" / "images" / "val2017" / "keypoints.json").read_text())
    assert tree["annotations"] == expected["annotations"]
    several = [Candidate(name="w", weights=tmp_path / "run" / stage / "w", folder=run) for stage in ("phase1", "ssl")]
    with pytest.raises(UserError, match="of several weights would all be in"):
        predict_media._groups(several, EvalConfig())


def test_results_of_other_images_of_the_same_name_are_not_replaced(tmp_path: Path) -> None:
    """NAME, NAME.1, ...: those of the same images again in their own folder, which is told by what was written."""
    results, paths = tmp_path / "images" / "val", [tmp_path / one / "val" for one in "abc"]

    def write(path: Path) -> str:
        folder = outputs.choose_folder(results, path)
        writer = outputs.KeypointsWriter(folder / "keypoints.json", COCO17, 0.3, {"pictures": str(path.resolve())})
        writer.close()
        return folder.name

    assert [write(path) for path in (*paths[:2], *paths[:2])] == ["val", "val.1", "val", "val.1"]
    (results / "keypoints.json").write_text("{}")
    assert write(paths[0]) == "val.2", "not known of which images"


# ---- Images


def test_everybody_is_drawn(main: Main, weights: Path, root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pics"
    shutil.copytree(root / "val2017", folder / "below")
    bad = folder / "broken.jpg"
    bad.write_bytes(next((folder / "below").iterdir()).read_bytes()[:2000])
    (folder / "clip.mp4").write_bytes(b"")
    tree, said = main(weights, folder, "--eval.score_threshold", 0)
    assert f"skipped: {bad} does not decode" in said and ", 1 skipped" in said and "left out: clip.mp4" in said
    drawn = tmp_path / "evaluations" / "mine" / "images" / "pics" / "drawn"
    names = sorted(path.relative_to(folder).as_posix() for path in (folder / "below").iterdir())
    assert sorted(path.relative_to(drawn).as_posix() for path in drawn.rglob("*.*")) == names
    assert [image["file_name"] for image in tree["images"]] == names
    people = _numbers(tree)
    for name, person in zip(names, people, strict=True):
        was, now = (photo.read_image(place / name).astype(int) for place in (folder, drawn))
        changed = np.abs(was - now).max(axis=2) > 60
        assert was.shape == now.shape and 0.001 < changed.mean() < 0.5
        assert changed[
            np.clip(person[1].round().astype(int), 0, 239), np.clip(person[0].round().astype(int), 0, 239)
        ].any()
    # What was drawn is no image of the user's.
    shutil.copytree(drawn.parents[3], folder / "evaluations")
    again, _ = main(weights, folder, "--eval.score_threshold", 0)
    assert again["images"] == tree["images"]
    _, said = main(weights, folder, "--pictures", 0)
    assert not drawn.exists() and "pics/drawn" not in said


def test_people_are_drawn_where_they_are() -> None:
    """Lines where the bones are, in the colors of sides, and nothing elsewhere; the image itself stays."""
    image = np.full((120, 200, 3), 128, np.uint8)
    people_xy = np.zeros((2, 17, 2))
    people_xy[:, 5], people_xy[:, 7], people_xy[:, 6], people_xy[:, 8] = (30, 20), (30, 80), (90, 20), (90, 80)
    people_xy[1, :, 0] += 80
    shown = np.zeros((2, 17), dtype=bool)
    shown[0, [5, 7, 6, 8]] = shown[1, [5, 7]] = True
    drawn = draw.draw_people(image, people_xy, shown, COCO17)
    assert (image == 128).all()
    for (x, y), color in (
        ((30, 50), draw.LEFT),
        ((90, 50), draw.RIGHT),
        ((60, 20), draw.MIDDLE),
        ((110, 50), draw.LEFT),
    ):
        assert np.abs(drawn[y, x].astype(int) - color).max() < 30
    assert drawn[50, 170].tolist() == [128] * 3, "not shown"
    changed = (drawn != 128).any(axis=2)
    assert not changed[:, 36:84][26:].any() and not changed[90:].any() and changed[50].sum() <= 24


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no real images: {REAL} (SAPIENS_ACCEL_TEST_DATA)")
def test_real_images(main: Main, weights: Path) -> None:
    file = REAL / "annotations" / "person_keypoints_val2017.json"
    tree, _ = main(weights, REAL / "val2017", "--boxes", file, "--flip", "false", *ALL)
    known = {one["id"]: one for one in json.loads(file.read_text())["images"]}
    boxes = [one for one in json.loads(file.read_text())["annotations"] if not one["iscrowd"]]
    assert len(tree["annotations"]) == len(boxes)
    sizes = {one["file_name"]: (one["width"], one["height"]) for one in known.values()}
    assert {one["file_name"]: (one["width"], one["height"]) for one in tree["images"]} == sizes


# ---- Bad input


def _refused(main: Main, *words: Any) -> str:
    with pytest.raises(UserError) as caught:
        main(*words)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_wrong_input_is_refused(main: Main, weights: Path, root: Path, tmp_path: Path) -> None:
    images = root / "val2017"
    assert "nowhere: no such file or folder" in _refused(main, weights, tmp_path / "nowhere")
    assert "no such file or folder" in _refused(main, tmp_path / "nowhere", images)
    (tmp_path / "empty").mkdir()
    assert "empty: no images" in _refused(main, weights, tmp_path / "empty")
    (tmp_path / "clip.mp4").write_bytes(b"no film")
    assert "clip.mp4: does not open as a video" in _refused(main, weights, tmp_path / "clip.mp4")
    assert "--eval.compare" in _refused(main, weights, images, "--compare")
    assert "--eval.save_predictions" in _refused(main, weights, images, "--save_predictions", "found.json")
    (tmp_path / "empty" / "a.jpg").write_bytes(b"no image")
    assert "none of its images can be used" in _refused(main, weights, tmp_path / "empty")
    assert not (tmp_path / "evaluations").exists()
    assert "--eval.min_box_score: out of its range" in _refused(main, weights, images, "--eval.min_box_score", 2)
    other = untrained(tmp_path / "other", seed=3)
    words = ["--images", str(images), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(UserError, match="results of several weights would all be in"):
        importlib.import_module("sapiens_accel.eval").main([str(weights), str(other), *words])


def test_wrong_boxes_are_refused(main: Main, weights: Path, root: Path, tmp_path: Path) -> None:
    images, file = root / "val2017", tmp_path / "b.json"

    def refused(content: Any) -> str:
        file.write_text(content if isinstance(content, str) else json.dumps(content))
        return _refused(main, weights, images, "--boxes", file)

    name = sorted(images.iterdir())[0].stem
    box = {"image_id": int(name), "bbox": [1, 2, 30, 40], "score": 0.9}
    assert "b.json: not JSON" in refused("[{")
    assert "b.json: no box in it" in refused([])
    assert "of other images: the first of its 1 boxes is of 99999" in refused([box | {"image_id": 99999}])
    assert "of other images" in refused([box | {"image_id": "holiday"}])
    assert "detection 0: expected 'bbox' of 4 numbers" in refused([box | {"bbox": [1, 2]}])
    assert "detection 1: expected a number as 'score'" in refused([box, box | {"score": "high"}])
    assert "detection 0: expected image_id" in refused([{"bbox": [1, 2, 3, 4]}])
    assert "no list 'images'" in refused({"annotations": []})
    tree = {"images": [{"id": 1, "file_name": f"{name}.jpg"}], "annotations": [{"id": 1, "image_id": 1}]}
    assert "b.json: no box in it, and no labeled keypoint" in refused(tree)
    assert "1 with a score below" in (said := refused([box | {"score": 0.01}])) and "none is left" in said
    assert "missing.json: no such file" in _refused(main, weights, images, "--boxes", tmp_path / "missing.json")
    assert "--eval.boxes not/a/name/here: no such" in _refused(main, weights, images, "--boxes", "not/a/name/here")
