"""The doctor finds each planted fault, by name, and nothing in data that are fine; its report, grid and exit code."""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import yaml

from sapiens_accel.config import parse as config
from sapiens_accel.config import schema
from sapiens_accel.config.schema import Config, DataConfig, EvalConfig, LoraConfig, ModelConfig
from sapiens_accel.data import build
from sapiens_accel.data import dataset as data
from sapiens_accel.data import people as coco
from sapiens_accel.doctor import environment, preview
from sapiens_accel.doctor import labels as examine
from sapiens_accel.doctor import report as doctor
from sapiens_accel.doctor.environment import Launch
from sapiens_accel.doctor.labels import Finding, Labels
from sapiens_accel.errors import UserError
from sapiens_accel.pose import draw, geometry, mirror_pairs, skeleton
from sapiens_accel.pose.heatmap import Codec
from sapiens_accel.pose.skeleton import COCO17, WHOLEBODY133, Skeleton
from sapiens_accel.runtime import distributed
from sapiens_accel.sources import convert, synthetic

TRAIN, VAL = (f"annotations/person_keypoints_{split}2017.json" for split in ("train", "val"))
REPOSITORY = Path(__file__).resolve().parents[2]
REAL = REPOSITORY / os.environ.get("SAPIENS_ACCEL_TEST_DATA", "../shared/data") / "coco_mini"
TOKEN = "hf_" + "notARealToken0123456789abcdefghij"
LEFT_WRIST, RIGHT_WRIST = (COCO17.names.index(f"{side}_wrist") for side in ("left", "right"))
Tree = dict[str, Any]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    counts = {"num_train": 120, "num_unlabelled": 2, "num_val": 40}
    return synthetic.write(tmp_path_factory.mktemp("doctor") / "drawn", **counts, image_hw=(160, 240))


@pytest.fixture
def root(drawn: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(drawn, tmp_path / "root"))


def _words(root: Path, *more: object) -> list[str]:
    """Of a run with the demo's recipe in a folder beside the root."""
    words = ["--data.root", str(root), "--data.cache_dir", str(root.parent / "cache"), "--data.num_workers", "0"]
    return [*words, "--stage", "phase2", "--output_dir", str(root.parent / "run"), *map(str, more)]


def _run(root: Path, **changes: Any) -> Config:
    return Config(data=DataConfig(root=str(root), cache_dir=str(root.parent / "cache"), **changes))


def _change(root: Path, change: Callable[[list[Tree]], object], file: str = TRAIN) -> None:
    tree = json.loads((root / file).read_text())
    change(tree["annotations"])
    (root / file).write_text(json.dumps(tree))


def _found(run: Config, check: str) -> list[Finding]:
    return [finding for finding in doctor.check_data(run)[0].findings if finding.check == check]


# ---- Nothing, where nothing is


def test_drawn_people_are_fine(drawn: Path) -> None:
    report, labels, _ = doctor.check_data(_run(drawn))
    assert [f for f in report.findings if f.level != "note"] == []
    assert len(labels) == report.people["train"]["people"] == 120 and report.people["val"]["people"] == 40
    tree = json.loads((drawn / VAL).read_text())["annotations"]
    visible = sum(a["keypoints"][2] == 2 for a in tree) / 40
    assert report.people["val"]["visible"]["nose"] == pytest.approx(visible, abs=1e-4)
    assert report.people["val"]["box_height"][1] == pytest.approx(np.median([a["bbox"][3] for a in tree]), abs=0.1)


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no real images: {REAL} (SAPIENS_ACCEL_TEST_DATA)")
def test_real_people_are_fine() -> None:
    report, _, _ = doctor.check_data(Config(data=DataConfig(root=str(REAL))))
    expected = {(check, "note") for check in ("keypoints/names", "train/crowd", "val/crowd")}
    assert {(f.check, f.level) for f in report.findings} == expected


WHOLE = REAL.with_name("coco_wholebody_mini")


@pytest.mark.skipif(not WHOLE.is_dir(), reason=f"no real images: {WHOLE} (SAPIENS_ACCEL_TEST_DATA)")
def test_whole_bodies_are_checked_with_all_their_keypoints(tmp_path: Path) -> None:
    """Published hands have a v between 0 and 1, which counts as none, in two people."""
    file = "annotations/coco_wholebody_val_v1.0.json"
    names = {"train_annotations": file, "val_annotations": file, "train_images": "val2017"}
    run = Config(data=DataConfig(root=str(WHOLE), cache_dir=str(tmp_path), **names))
    report, labels, skeleton = doctor.check_data(run)
    told = {finding.check: finding for finding in report.findings if finding.level != "note"}
    assert skeleton.num_keypoints == 133 and labels.keypoints.shape[1:] == (133, 3)
    assert set(told) == {"train/visibility", "val/visibility", "train and val/leaks"}
    assert len(told["val/visibility"].culprits) == 2 and len(told["train and val/leaks"].culprits) == 4


# ---- Each fault, by name


def _swap(people: list[Tree], first: int, second: int, every: int = 1) -> None:
    for person in people[::every]:
        points = np.reshape(person["keypoints"], (17, 3))
        points[[first, second]] = points[[second, first]]
        person["keypoints"] = points.ravel().tolist()


def test_a_pair_that_is_swapped_is_named_and_no_other(root: Path) -> None:
    _change(root, lambda people: _swap(people, 11, 12))
    (finding,) = _found(_run(root), "train/mirror")
    assert finding.level == "error" and finding.text.startswith("left_hip and right_hip ")
    assert len(finding.culprits) > 60


def test_a_pair_that_is_swapped_in_a_tenth_is_nothing(root: Path) -> None:
    _change(root, lambda people: _swap(people, 11, 12, every=10))
    assert _found(_run(root), "train/mirror") == []


def test_left_and_right_exchanged_in_all_pairs_are_seen(root: Path) -> None:
    def exchange(people: list[Tree]) -> None:
        for left in range(1, 17, 2):
            _swap(people, left, left + 1)

    _change(root, exchange)
    (finding,) = _found(_run(root), "train/mirror")
    assert finding.level == "warning" and "left shoulder" in finding.text


@pytest.mark.parametrize("degrees", [0, 90, 180, 250])
def test_left_and_right_are_seen_with_the_head_up(degrees: float) -> None:
    """Divers, and people who lie: turned by any angle, who is right stays right and who is exchanged is seen."""
    labels = _labels(40)
    assert _mirrored(labels, labels.keypoints, degrees) == []
    assert len(_mirrored(labels, labels.keypoints * [-1, 1, 1], degrees)) == 1


def _mirrored(labels: Labels, points: np.ndarray, degrees: float) -> list[Finding]:
    turned = points.copy()
    turned[..., :2] = points[..., :2] @ _rotation(degrees)
    return list(examine.find_mirrored(dataclasses.replace(labels, keypoints=turned), COCO17))


def _rotation(degrees: float) -> np.ndarray:
    cos, sin = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    return np.array([[cos, sin], [-sin, cos]])


LEGS = ("shoulder", "elbow", "front_paw", "hip", "knee", "back_paw")
TROT = Skeleton(
    names=tuple(f"{side}_{part}" for part in LEGS for side in ("left", "right")),
    mirror=tuple(k ^ 1 for k in range(12)),
    sigmas=(0.05,) * 12,
    upper=(),
    edges=(),
)


def test_animals_that_trot_past_have_no_swapped_pairs() -> None:
    """The left front leg is ahead with the right hind leg: each pair lies otherwise than the sum of the others."""
    rng = np.random.default_rng(0)
    ahead = np.repeat([1, -1], 3) * rng.choice([-20, 20], (200, 1))
    x = np.stack([ahead, -ahead], axis=-1).reshape(200, 12) + rng.normal(0, 4, (200, 12))
    keypoints = np.stack([x, rng.normal(100, 4, (200, 12)), np.full((200, 12), 2)], axis=-1)
    labels = dataclasses.replace(_labels(200), keypoints=keypoints)
    assert list(examine.find_swapped_pairs(labels, TROT)) == []


def test_each_name_is_read_for_its_side_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the doctor of 10,000 keypoints, and every image of a training, would take time by the square of them."""
    read, side = [], skeleton.side_of
    monkeypatch.setattr(skeleton, "side_of", lambda *names: read.append(names) or side(*names))
    whole = dataclasses.replace(WHOLEBODY133)
    pairs = examine._sides(whole)
    draw.draw_person(np.zeros((64, 48, 3), np.uint8), np.full((133, 2), 20.0), np.ones(133), whole)
    assert len(read) == 133 and len(pairs) > 50
    assert all(whole.names[a].replace("left", "right") == whole.names[b] for a, b in pairs if a < 17)


def test_pairs_that_chance_decides_are_not_reported() -> None:
    """Sixty pairs of a small face, labeled by coin: none of them is swapped."""
    pairs = 60
    names = tuple(f"{side}_{k}" for k in range(pairs) for side in ("left", "right"))
    mirror = tuple(k ^ 1 for k in range(2 * pairs))
    face = Skeleton(names=names, mirror=mirror, sigmas=(0.05,) * 2 * pairs, upper=(), edges=())
    for seed in range(5):
        rng = np.random.default_rng(seed)
        x = rng.choice([-9.0, 9.0], (35, pairs))
        x[:, :40] = 9  # these are clear, and the others are held against them
        keypoints = np.stack([x, -x], axis=-1).reshape(35, 2 * pairs, 1) * [1, 0, 0] + [100, 100, 2]
        assert list(examine.find_swapped_pairs(dataclasses.replace(_labels(35), keypoints=keypoints), face)) == []


def test_people_who_lie_or_turn_vote_alike() -> None:
    """The pair's direction counts, not x: turned by any angle the same people are for and against."""
    labels = _labels(60)
    points = labels.keypoints.copy()
    points[:, [LEFT_WRIST, RIGHT_WRIST]] = points[:, [RIGHT_WRIST, LEFT_WRIST]]
    for degrees in (0, 90, 200):
        turned = points.copy()
        turned[..., :2] = points[..., :2] @ _rotation(degrees)
        (finding,) = examine.find_swapped_pairs(dataclasses.replace(labels, keypoints=turned), COCO17)
        assert finding.text.startswith("left_wrist and right_wrist") and len(finding.culprits) == 60


def test_pairs_are_proposed_as_a_line_to_paste() -> None:
    labels = _labels(60)
    points = labels.keypoints.copy()
    points[:, 2::2, 1] = points[:, 1::2, 1]  # both sides at one height
    (finding,) = examine.propose_pairs(dataclasses.replace(labels, keypoints=points), COCO17)
    proposed = yaml.safe_load(finding.text.partition("FILE:")[2])
    pairs = [[COCO17.names[a], COCO17.names[b]] for a, b in enumerate(COCO17.mirror) if a < b]
    assert (proposed, finding.level) == ({"mirror": pairs}, "note")
    (finding,) = examine.propose_pairs(_labels(9), COCO17)
    assert "too few people" in finding.text and "found 9" in finding.text


def _labels(num: int) -> Labels:
    """People who all stand alike: every left keypoint to the right in the image."""
    x = np.array([0.0, *[10, -10] * 8])
    points = np.column_stack([x + 100, np.linspace(10, 200, 17), np.full(17, 2.0)])
    boxes = np.tile([80.0, 5.0, 40.0, 200.0], (num, 1))
    names = np.array([f"train2017/{i}.jpg" for i in range(num)], object)
    keypoints, size = np.tile(points, (num, 1, 1)), np.tile([240.0, 320.0], (num, 1))
    areas, ids = boxes[:, 2] * boxes[:, 3], np.arange(num)
    ids[:1] = 1000  # 0 is a finding
    return Labels(
        ann_ids=ids, given_ids=ids.astype(object), file_names=names, boxes_xywh=boxes,
        areas=areas, keypoints=keypoints, size_wh=size, box_made=np.zeros(num, bool),
    )  # fmt: skip


FAULTS: dict[str, tuple[Callable[[Labels], Labels], str, str]] = {
    "box outside": (lambda b: _with(b, "boxes_xywh", 7, [240 + 1.5, 5, 40, 200]), "boxes", "error"),
    "box half outside": (lambda b: _with(b, "boxes_xywh", 7, [220, 5, 40, 200]), "boxes", "warning"),
    "box outside above": (lambda b: _with(b, "boxes_xywh", 7, [5, -300, 40, 200]), "boxes", "error"),
    "area 0": (lambda b: _with(b, "areas", 7, 0), "area", "warning"),
    "area of more than the box": (lambda b: _with(b, "areas", 7, 9000), "area", "warning"),
    "keypoint outside": (
        lambda b: _with(b, "keypoints", 7, [[240.5, 5, 1], *b.keypoints[7, 1:]]), "keypoints", "warning",
    ),
    "keypoint above": (lambda b: _with(b, "keypoints", 7, [[9, -1.5, 1], *b.keypoints[7, 1:]]), "keypoints", "warning"),
    "v of 3": (lambda b: _with(b, "keypoints", 7, [[9, 5, 3], *b.keypoints[7, 1:]]), "visibility", "warning"),
    "v of 1/2": (lambda b: _with(b, "keypoints", 7, [[9, 5, 0.5], *b.keypoints[7, 1:]]), "visibility", "warning"),
}  # fmt: skip


def test_boxes_that_a_run_makes_are_no_fault_of_the_file() -> None:
    boxes = _with(_with(_labels(9), "boxes_xywh", 7, [220, 5, 40, 200]), "areas", 7, 9000)
    checks = [{one.check for one in examine.find_faults(it, COCO17, scored=True)} for it in (
        boxes, dataclasses.replace(boxes, box_made=np.ones(9, bool)))]  # fmt: skip
    assert {"boxes", "area"} <= checks[0] and not {"boxes", "area"} & checks[1]


def _with(labels: Labels, name: str, place: int | list[int], value: Any) -> Labels:
    column = getattr(labels, name).copy()
    column[place] = value
    return dataclasses.replace(labels, **{name: column})


def test_an_annotation_of_id_0_is_a_note_where_people_are_scored() -> None:
    labels = _with(_labels(60), "ann_ids", 7, 0)
    labels = _with(labels, "given_ids", 7, 0)
    (note,) = examine.find_faults(labels, COCO17, scored=True)
    assert (note.level, note.culprits) == ("note", ("annotation 0 (train2017/7.jpg)",))
    assert "pycocotools itself takes a match with it for none" in note.text
    assert examine.find_faults(labels, COCO17, scored=False) == []


@pytest.mark.parametrize("case", FAULTS)
def test_one_person_of_many_is_named(case: str) -> None:
    change, check, level = FAULTS[case]
    assert examine.find_faults(_labels(60), COCO17, scored=True) == []
    (finding,) = examine.find_faults(change(_labels(60)), COCO17, scored=True)
    assert (finding.check, finding.level) == (check, level)
    assert finding.culprits == ("annotation 7 (train2017/7.jpg)",)


def test_what_v_0_and_areas_mean_is_as_the_run_says() -> None:
    people = _with(_labels(60), "keypoints", 7, [[9, 5, 0], *_labels(60).keypoints[7, 1:]])
    people = dataclasses.replace(people, areas=people.areas * 0)

    def texts(**data: Any) -> dict[str, str]:
        run = Config(data=DataConfig(**data), eval=EvalConfig(area="box" if data else "annotation"))
        return {one.check: one.text for one in examine.find_faults(people, COCO17, scored=True, run=run)}

    assert "v=0 is no label, so nothing is learned" in texts()["visibility"]
    assert "nothing is learned" not in (text := texts(absent_is_background=True)["visibility"])
    assert "not in the image (--data.absent_is_background true)" in text
    assert "a score below --data.visibility_threshold 0.3" in texts(visibility_threshold=0.3)["visibility"]
    assert texts()["area"].endswith("always: measure OKS by the box instead, --eval.area box")
    assert "missed" not in texts(absent_is_background=True)["area"]


def test_within_a_pixel_of_the_border_is_inside() -> None:
    inside = _with(_labels(60), "keypoints", 7, [[240.0, -1.0, 2], *_labels(1).keypoints[0, 1:]])
    assert examine.find_faults(inside, COCO17, scored=True) == []
    unseen = _with(_labels(60), "keypoints", 7, [[900.0, -50.0, 0], *_labels(1).keypoints[0, 1:]])
    (finding,) = examine.find_faults(unseen, COCO17, scored=True)
    assert finding.text.startswith("1 keypoint (0% of those with coordinates) of 1 person have v=0"), "not outside"


@pytest.mark.parametrize(("scored", "level"), [(True, "error"), (False, "warning")])
def test_ids_of_two_are_all_named(scored: bool, level: str) -> None:
    labels = _labels(60)
    for name in ("ann_ids", "given_ids"):
        labels = _with(labels, name, [7, 20], 9)
    (finding,) = examine.find_faults(labels, COCO17, scored=scored)
    assert finding.level == level
    assert finding.culprits == tuple(f"annotation 9 (train2017/{i}.jpg)" for i in (7, 9, 20))


def test_a_keypoint_that_nobody_has_is_named(root: Path) -> None:
    def unlabel(people: list[Tree]) -> None:
        for person in people:
            person["keypoints"][3 * LEFT_WRIST : 3 * LEFT_WRIST + 3] = [0, 0, 0]
            person["num_keypoints"] = sum(v > 0 for v in person["keypoints"][2::3])

    _change(root, unlabel)
    (finding,) = _found(_run(root), "train/keypoints")
    assert finding.culprits == ("left_wrist",)


def test_all_faults_are_reported_at_once(root: Path) -> None:
    def spoil(people: list[Tree]) -> None:
        people[1]["bbox"] = [1, 2, 3]
        people[5]["image_id"] = 999
        people[9]["iscrowd"] = 1
        people[11]["bbox"][2] = 0

    _change(root, spoil)
    missing, cut = (root / "train2017" / f"{i:012d}.jpg" for i in (20, 30))
    missing.unlink()
    cut.write_bytes(cut.read_bytes()[:400])
    shutil.copy(root / "val2017" / "000020000003.jpg", root / "train2017" / "000000000040.jpg")
    found = {f.check: f for f in doctor.check_data(_run(root))[0].findings}
    assert [c.split(":")[0] for c in found["train/annotations"].culprits] == ["annotation 2", "annotation 6"]
    assert found["train/crowd"].culprits == ("annotation 10",)
    assert found["train/made_boxes"].culprits == ("annotation 12",)
    assert found["train/missing"].culprits == ("train2017/000000000020.jpg",)
    assert found["train/unreadable"].culprits == ("train2017/000000000030.jpg",)
    leak = "train2017/000000000040.jpg is val2017/000020000003.jpg"
    assert found["train and val/leaks"].culprits == (leak,)
    errors = {"train/annotations", "train/missing", "train/unreadable", "train and val/leaks"}
    assert {check for check, f in found.items() if f.level == "error"} == errors


def test_ids_of_both_files_are_a_note(root: Path) -> None:
    tree = json.loads((root / VAL).read_text())
    first = tree["images"][0]["id"]
    text = (root / VAL).read_text().replace(f'"id": {first}, "file', '"id": 1, "file')
    (root / VAL).write_text(text.replace(f'"image_id": {first},', '"image_id": 1,'))
    (finding,) = _found(_run(root), "train and val/ids")
    assert (finding.level, finding.culprits) == ("note", ("1",))


def test_columns_are_those_of_the_chosen_rows(drawn: Path) -> None:
    rows = build.open_people(_run(drawn).data, COCO17, unlabeled=False).train.rows
    chosen = rows.select([70, 3, 41]).select([2, 0])
    assert coco.column_of(chosen, "ann_id").tolist() == [rows[41]["ann_id"], rows[70]["ann_id"]]
    assert list(coco.column_of(chosen, "file_name")) == [rows[41]["file_name"], rows[70]["file_name"]]
    assert np.array_equal(coco.keypoints_of(chosen), [np.array(rows[i]["keypoints"]) for i in (41, 70)])
    assert np.array_equal(coco.boxes_of(chosen), [rows[i]["box_xywh"] for i in (41, 70)])


# ---- Other keypoints, other sources


def _renamed(root: Path, names: Sequence[str], order: Sequence[int], *files: str) -> None:
    """Keypoints of other names, in another order."""
    for file in files:
        tree = json.loads((root / file).read_text())
        tree["categories"][0] |= {"keypoints": [names[k] for k in order], "skeleton": []}
        for one in tree["annotations"]:
            one["keypoints"] = np.reshape(one["keypoints"], (17, 3))[list(order)].ravel().tolist()
        (root / file).write_text(json.dumps(tree))


def test_keypoints_of_other_names_are_reported_by_their_names(root: Path, tmp_path: Path) -> None:
    names = ["tip", "L_1", "R_1", *[f"{side}_{k}" for k in range(3, 17, 2) for side in ("L", "R")]]
    _renamed(root, names, range(17), TRAIN)
    _renamed(root, names, range(16, -1, -1), VAL)
    _change(root, lambda people: _swap(people, 11, 12))
    report, labels, skeleton = doctor.check_data(_run(root))
    assert skeleton.names == tuple(names) and labels.keypoints.shape == (120, 17, 3)
    (swapped,) = [finding for finding in report.findings if finding.level == "error"]
    assert swapped.check == "train/mirror" and swapped.text.startswith("L_11 and R_11 "), "in val, read by name, not"
    sigmas = [f for f in report.findings if f.check == "keypoints/names" and f.level == "warning"]
    assert len(sigmas) == 1 and "sigma" in sigmas[0].text
    of_train, of_val = (report.people[name]["visible"] for name in ("train", "val"))
    tree = json.loads((root / VAL).read_text())["annotations"]
    assert of_val["tip"] == pytest.approx(sum(a["keypoints"][-1] == 2 for a in tree) / 40, abs=1e-4)
    assert list(of_train) == list(of_val) == names


def test_keypoints_that_cannot_be_inferred_are_an_error_among_the_others(root: Path) -> None:
    _renamed(root, ["nose", "nose", *COCO17.names[2:]], range(17), TRAIN)
    missing = root / "val2017" / "000020000003.jpg"
    missing.unlink()
    report, _, skeleton = doctor.check_data(_run(root))
    errors = {finding.check: finding.text for finding in report.findings if finding.level == "error"}
    assert set(errors) == {"keypoints/names", "val/missing"} and skeleton is COCO17
    assert "'nose' is there twice" in errors["keypoints/names"]


def _of_21(tree: Tree) -> None:
    tree["categories"] = [{"id": 1, "name": "hand"}]
    for one in tree["annotations"]:
        one |= {"keypoints": [*one["keypoints"], *one["keypoints"][:12]], "num_keypoints": 21}


def test_keypoints_without_names_are_one_error_and_no_fault_of_each_person(root: Path) -> None:
    """What else is wrong is told with it."""
    for file in (TRAIN, VAL):
        tree = json.loads((root / file).read_text())
        _of_21(tree)
        tree["annotations"][4].update(bbox=[1, 2, 3], num_keypoints=0)
        (root / file).write_text(json.dumps(tree))
    report, _, _ = doctor.check_data(_run(root))
    errors = {finding.check: finding for finding in report.findings if finding.level == "error"}
    assert set(errors) == {"keypoints/names", "train/annotations", "val/annotations"}
    assert "names its 21 keypoints" in errors["keypoints/names"].text
    (culprit,) = errors["train/annotations"].culprits
    assert culprit.startswith("annotation 5: ") and "bbox" in culprit


def test_other_keypoints_in_validation_are_one_error_of_its_file(root: Path) -> None:
    tree = json.loads((root / VAL).read_text())
    _of_21(tree)
    (root / VAL).write_text(json.dumps(tree))
    report, _, _ = doctor.check_data(_run(root))
    (error,) = [finding for finding in report.findings if finding.level == "error"]
    assert error.check == "val/keypoints" and "have 21 keypoints" in error.text


def test_images_whose_size_is_not_recorded_are_said_to_be_unchecked(root: Path) -> None:
    tree = json.loads((root / TRAIN).read_text())
    del tree["images"][3]["width"]
    tree["images"][4]["height"] = "high"
    (root / TRAIN).write_text(json.dumps(tree))
    (finding,) = _found(_run(root), "train/size")
    assert finding.level == "note" and "not looked at" in finding.text
    assert finding.culprits == tuple(f"train2017/{image['file_name']}" for image in tree["images"][3:5])


def test_width_and_height_exchanged_are_not_laid_on_exif_data_alone(root: Path) -> None:
    tree = json.loads((root / TRAIN).read_text())
    for image in tree["images"]:
        image["width"], image["height"] = image["height"], image["width"]
    (root / TRAIN).write_text(json.dumps(tree))
    (finding,) = _found(_run(root), "train/size")
    assert finding.level == "error" and "exchanged in the JSON" in finding.text
    assert len(finding.culprits) == len({one["image_id"] for one in tree["annotations"]})


def test_boxes_in_fractions_are_reported_as_such(root: Path) -> None:
    """Their keypoints lie inside of them: that all targets are zero would contradict itself."""

    def scale(people: list[Tree]) -> None:
        for person in people:
            person["bbox"] = [side / 240 for side in person["bbox"]]
            person["keypoints"] = [n if k % 3 == 2 else n / 240 for k, n in enumerate(person["keypoints"])]

    _change(root, scale)
    with pytest.raises(UserError, match=r"boxes are less than 2 px.* expected both in pixels") as caught:
        build.open_people(_run(root).data, COCO17, unlabeled=False)
    assert "zero" not in str(caught.value)


def test_without_unlabeled_people_the_labeled_ones_are_still_looked_at(root: Path, tmp_path: Path) -> None:
    shutil.rmtree(root / "unlabeled2017")
    for boxes in root.glob("annotations/*unlabeled*"):
        boxes.unlink()
    for stage in ("all", "ssl"):
        run = config.load([*_words(root), "--stage", stage])
        report = doctor.examine(run, environment.read_launch(None), tmp_path / "out")
        errors = [finding for finding in report.findings if finding.level == "error"]
        (about,) = [finding for finding in report.findings if finding.check.endswith("unlabelled/reader")]
        if stage == "all":
            assert not errors and about.text.startswith("--stage all leaves ssl out: no unlabeled people")
        else:
            assert errors == [about] and "or leave stage ssl out: --stage phase2 " in about.text
        assert report.grid and Path(report.grid).is_file()
        assert {"crops/resolution", "crops/sigma", "crops/codec"} <= {finding.check for finding in report.findings}


def test_why_no_pairs_of_left_and_right_are_proposed_is_said() -> None:
    few, many = _labels(mirror_pairs.MIN_PEOPLE - 1), _labels(2 * mirror_pairs.MIN_PEOPLE)
    (said,) = examine.propose_pairs(few, COCO17)
    assert said.level == "note" and "expected at least 10 with 4 or more labeled keypoints, found 9" in said.text
    few.keypoints[0, 3:, 2] = 0
    (said,) = examine.propose_pairs(few, COCO17)
    assert "found 8" in said.text, "three keypoints have no shape"
    many.keypoints[..., :2] = np.random.default_rng(0).uniform(0, 200, many.keypoints[..., :2].shape)
    (said,) = examine.propose_pairs(many, COCO17)
    assert "the shapes of 20 people show none clearly" in said.text


def _ssl(root: Path, **changes: Any) -> Config:
    words = [*_words(root), "--stage", "ssl"]
    return config.load([*words, *(word for key, value in changes.items() for word in (f"--data.{key}", str(value)))])


def test_all_that_is_wrong_with_images_without_labels_is_named(root: Path) -> None:
    folder = root / "found"
    folder.mkdir()
    for name in ("a.jpg", "b.jpg"):
        shutil.copy(root / "val2017" / "000020000003.jpg", folder / name)
    shutil.copy(next((root / "unlabeled2017").iterdir()), folder / "c.jpg")
    for name in ("cut.jpg", "empty.jpg"):
        (folder / name).write_bytes((folder / "c.jpg").read_bytes()[: 400 * (name == "cut.jpg")])
    report, _, _ = doctor.check_data(_ssl(root, unlabelled_images="found"))
    told = {finding.check: finding.culprits for finding in report.findings if finding.level == "error"}
    leaks = tuple(f"found/{name}.jpg is val2017/000020000003.jpg" for name in "ab")
    assert told == {"unlabelled/unreadable": ("found/cut.jpg", "found/empty.jpg"), "unlabelled/leaks": leaks}
    report, _, _ = doctor.check_data(config.load([*_words(root), "--data.unlabelled_images", "found"]))
    assert [f for f in report.findings if f.check.startswith("unlabelled/")] == [], "nothing is learned from them"


def test_boxes_of_images_without_labels_that_are_not_there_are_all_named(root: Path) -> None:
    gone = sorted(path.name for path in (root / "unlabeled2017").iterdir())
    shutil.rmtree(root / "unlabeled2017")
    (finding,) = _found(_ssl(root, unlabelled_min_side=1), "unlabelled/missing")
    assert finding.culprits == tuple(f"unlabeled2017/{name}" for name in gone)
    (finding,) = _found(_ssl(root, unlabelled_images="nowhere"), "unlabelled/reader")
    assert finding.level == "error" and "--data.unlabelled_images" in finding.text


def test_each_set_of_a_mixture_is_looked_at(root: Path, drawn: Path, tmp_path: Path) -> None:
    """The second one has ids of the first, which is nothing, a keypoint fewer, a leak and an annotation of area 0."""
    other = Path(shutil.copytree(drawn, tmp_path / "other"))
    kept = [*range(9), *range(10, 17)]

    def change(people: list[Tree]) -> None:
        people[4]["area"] = 0
        for person in people:
            person["keypoints"] = np.reshape(person["keypoints"], (17, 3))[kept].ravel().tolist()
            person["num_keypoints"] = sum(v > 0 for v in person["keypoints"][2::3])

    _change(other, change)
    tree = json.loads((other / TRAIN).read_text())
    tree["categories"][0] |= {"keypoints": [COCO17.names[k] for k in kept], "skeleton": []}
    (other / TRAIN).write_text(json.dumps(tree))
    shutil.copy(root / "val2017" / "000020000003.jpg", other / "train2017" / "000000000040.jpg")
    more = schema.MoreData(root=str(other), train_annotations=TRAIN, train_images="train2017")
    run = _run(root, more=(more,))
    report, labels, _ = doctor.check_data(run)
    told = {finding.check: finding for finding in report.findings if finding.level != "note"}
    leak = f"{other / 'train2017/000000000040.jpg'} is val2017/000020000003.jpg"
    assert told.pop("train 2 and val/leaks").culprits == (leak,)
    assert told.pop("train 2/keypoints").culprits == ("left_wrist",)
    assert told.pop("train 2/area").culprits[0].startswith("annotation 5 (") and not told
    assert len(labels) == 240 and report.people["train 2"]["visible"]["left_wrist"] == 0
    assert report.people["train 2"]["visible"]["nose"] == report.people["train"]["visible"]["nose"] > 0
    run = _run(root, more=(more,), on_leak="skip")
    report, _, _ = doctor.check_data(run)
    (found,) = [finding for finding in report.findings if finding.check == "train 2 and val/leaks"]
    assert found.level == "note" and found.text.endswith("their people are left out (--data.on_leak skip)")
    sets, said = build.open_people(run.data, COCO17, unlabeled=False), []
    doctor.summarize(said.append, sets, run)
    assert [line for line in map(str, said[1:]) if "/ids" in line] == []
    assert any("train 2/area: 1 person of area 0: annotation 5 " in str(line) for line in said)


@pytest.fixture(scope="module")
def shards(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """People in parquet; one of area 0, one whose box lies outside."""
    folder = tmp_path_factory.mktemp("shards")
    return _shards(drawn, folder, lambda people: (people[5].update(area=0), people[8].update(bbox=[900, 5, 40, 100])))


def _shards(drawn: Path, folder: Path, change: Callable[[list[dict[str, Any]]], object]) -> Path:
    broken = Path(shutil.copytree(drawn, folder / "drawn"))
    _change(broken, change)
    convert.main(["convert", "coco", str(broken), str(folder / "parquet"), "--group_rows", "10"])
    return folder / "parquet"


@pytest.mark.parametrize("streaming", [False, True])
def test_people_in_shards_are_looked_at(shards: Path, tmp_path: Path, streaming: bool) -> None:
    report, labels, _ = doctor.check_data(_run(shards, streaming=streaming, unlabelled_min_side=1))
    told = {finding.check: finding.culprits for finding in report.findings if finding.level != "note"}
    assert set(told) == {"train/area", "train/boxes"} and report.people["train"]["people"] == len(labels) == 120
    assert told["train/area"][0].startswith("annotation 6 (")
    assert told["train/boxes"][0].startswith("annotation 9 (")
    sizes = [finding for finding in report.findings if finding.check.endswith("/size")]
    assert not sizes, "images in shards are decoded for their size as files are"


def test_a_box_outside_of_its_image_starts_no_training(shards: Path) -> None:
    with pytest.raises(UserError, match=r"1 of \d+ people have a box outside their image: annotation 9 has \[900\.0, "):
        build.open_people(_run(shards, streaming=True).data, COCO17, unlabeled=False)


def test_before_a_training_from_a_stream_few_are_fetched(drawn: Path, tmp_path: Path) -> None:
    run = _run(_shards(drawn, tmp_path, lambda people: people[5].update(area=0)), streaming=True)
    sets, said = build.open_people(run.data, COCO17, unlabeled=False), []
    doctor.summarize(said.append, sets, run)
    assert any("train/area: 1 person of area 0: annotation 6 (" in str(line) for line in said)


def test_the_grid_and_the_rest_of_it_for_a_stream(shards: Path, drawn: Path, tmp_path: Path) -> None:
    clean = tmp_path / "parquet"
    convert.main(["convert", "coco", str(drawn), str(clean)])
    words = [*_words(clean), "--data.streaming", "true", "--data.cache_dir", str(tmp_path / "cache")]
    doctor.main([*words, "--json", str(tmp_path / "r.json"), "--out", str(tmp_path / "out")])
    told = json.loads((tmp_path / "r.json").read_text())
    assert told["ok"] and cv2.imread(told["grid"]).shape == (4 * 516, 4 * 388, 3)


# ---- What the network would see


def test_in_crop_is_what_the_crop_holds() -> None:
    rng = np.random.default_rng(0)
    boxes = np.column_stack([rng.uniform(0, 100, (50, 2)), rng.uniform(10, 200, (50, 2))])
    keypoints = np.concatenate([rng.uniform(-60, 300, (50, 17, 2)), rng.integers(0, 3, (50, 17, 1))], axis=-1)
    inside = geometry.in_crop(boxes, keypoints, 1.25, (64, 48))
    for box, points, ours in zip(boxes, keypoints, inside, strict=True):
        crop = geometry.crop_around_box(box, 1.25, (64, 48))
        seen = data.transform_keypoints(crop, points, (64, 48), COCO17)
        expected = ((seen[:, :2] >= 0) & (seen[:, :2] <= (47, 63))).all(axis=1) & (points[:, 2] > 0)
        assert np.array_equal(ours, expected)
    assert 0.1 < inside.mean() < 0.6


def test_keypoints_lost_by_the_crop_are_counted_and_named() -> None:
    far = _with(_labels(10), "keypoints", 7, [[5.0, 250.0, 2], *_labels(1).keypoints[0, 1:]])
    finding = examine.check_lost_by_crop(far, 1.0, (200, 40))
    assert finding.level == "note" and finding.text.startswith("1 of 170 labeled keypoints (0.59%)")
    assert finding.culprits == ("annotation 7 (train2017/7.jpg)",)
    tight = dataclasses.replace(far, boxes_xywh=far.boxes_xywh * [1, 1, 1, 0.5])
    assert examine.check_lost_by_crop(tight, 1.0, (200, 40)).level == "warning"


@pytest.mark.parametrize(
    ("sigma", "hw", "level"),
    [(3, (128, 96), "note"), (6, (256, 192), "note"), (2, (64, 48), "note"), (1, (32, 24), "note"),
     (6, (128, 96), "warning"), (1, (128, 96), "warning"), (0.5, (16, 12), "warning")],
)  # fmt: skip
def test_sigma_is_held_against_the_heatmap(sigma: float, hw: tuple[int, int], level: str) -> None:
    finding = examine.check_sigma(sigma, hw)
    assert finding.level == level
    assert ("Enlarge --data.input_hw" in finding.text) == (hw == (16, 12)), "0.8 px would be a warning again"


def test_the_codec_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    codec = Codec(input_hw=(128, 96), heatmap_hw=(32, 24), sigma=1)
    good = preview.check_codec(_labels(20), codec, 1.25)
    assert good.level == "note" and "off by 0.0" in good.text and "340 keypoints" in good.text
    decode = Codec.decode

    def off(self: Codec, maps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        points, scores = decode(self, maps)
        return points + torch.tensor([3.0, 4.0]), scores

    monkeypatch.setattr(Codec, "decode", off)
    bad = preview.check_codec(_labels(20), codec, 1.25)
    # 200 px of box, times the padding, are 128 px of input.
    assert bad.level == "warning" and "off by 5.0" in bad.text and f"({5 * 250 / 128:.3f} " in bad.text


def test_the_grid_shows_the_keypoints_where_they_are(drawn: Path) -> None:
    """The colors of keypoints that lie free are in the image at the places that the sample names."""
    run = config.load([*_words(drawn), "--augment.rotation", "60"])
    sets = build.open_people(run.data, COCO17, unlabeled=False)
    people = preview.first_stage_people(run, sets, COCO17)
    picture = preview.draw_grid(people, COCO17)
    tile_h, tile_w = 512 + 4, 384 + 4
    assert picture.shape == (4 * tile_h, 4 * tile_w, 3)
    colors = {"left": draw.LEFT, "right": draw.RIGHT}
    near = total = 0
    for number in range(preview.NUM_CROPS):
        sample = people[data.Key(0, number, False)]
        assert isinstance(sample, data.Labeled)
        for name, (x, y), weight in zip(COCO17.names, sample.points_xy.tolist(), sample.weights, strict=True):
            if name[-5:] not in ("wrist", "ankle") or weight < 1 or not (4 < x < 92 and 8 < y < 124):
                continue
            column, row = (number % 4) * tile_w + 2 + (x + 0.5) * 4, (number // 4) * tile_h + 2 + (y + 0.5) * 4
            shown = picture[round(row), round(column)].astype(int)
            near += np.abs(shown - colors[name.split("_")[0]]).max() < 40
            total += 1
    assert total > 20 and near >= 0.9 * total, "a few lie under a later keypoint"


# ---- The machine


def test_what_deepspeed_would_compile_is_what_its_config_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    def needed(name: str, cuda: bool = True) -> Sequence[str]:
        return environment.needed_operations(environment.read_launch(f"accelerate_configs/{name}.yaml"), cuda)

    monkeypatch.chdir(REPOSITORY)
    offloading = ("zero2_offload", "zero3_offload")
    assert all(needed(name) == ["cpu_adam"] for name in offloading)
    assert all(needed(name) == [] for name in ("cpu", "single_gpu", "multi_gpu", "zero1", "zero2", "zero3"))
    assert needed("zero1", cuda=False) == needed("zero2", cuda=False) == ["deepspeed_shm_comm"]


@pytest.mark.parametrize("given", ["absolute", "relative"])
def test_a_launch_from_another_folder_has_the_json_that_train_finds(
    given: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Beside the config or the folder above it, or in the checkout."""
    monkeypatch.chdir(tmp_path)
    configs = tmp_path / "mine" / "configs"
    configs.mkdir(parents=True)
    json_name = "ds_configs/zero2_offload.json"
    (configs / "a.yaml").write_text(
        f"distributed_type: DEEPSPEED\ndeepspeed_config:\n  deepspeed_config_file: {json_name}\n"
    )
    assert environment.read_launch(str(REPOSITORY / "accelerate_configs" / "zero2.yaml")).zero["stage"] == 2
    (tmp_path / "mine" / "ds_configs").mkdir()
    (tmp_path / "mine" / json_name).write_text('{"zero_optimization": {"stage": 1}}')
    monkeypatch.chdir(tmp_path if given == "absolute" else configs)
    launch = environment.read_launch(str(configs / "a.yaml") if given == "absolute" else "a.yaml")
    assert launch.zero == {"stage": 1}
    (configs / "a.yaml").write_text((configs / "a.yaml").read_text().replace(json_name, "ds_configs/gone.json"))
    with pytest.raises(UserError, match=r"a\.yaml: deepspeed_config_file: ds_configs/gone.json is not there"):
        environment.read_launch(str(configs / "a.yaml"))


def test_a_launch_may_be_named_as_train_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where an installed package has no accelerate_configs/
    launch = environment.read_launch("zero2_offload")
    assert launch.name == "sapiens-accel train --launch zero2_offload"
    assert launch.zero["stage"] == 2 and launch.zero["offload_optimizer"]["device"] == "cpu"
    with pytest.raises(UserError, match=r"--launch zero9: no such launch \(expected one of cpu, .*did you mean zero3"):
        environment.read_launch("zero9")


def test_fp16_without_a_gpu_is_a_note_as_train_runs_it_in_bf16() -> None:
    assert distributed.precision_of_device("fp16", False) == "bf16"
    (found,) = environment._precision(Launch(precision="fp16"))
    assert found.level == "note" and "bf16" in found.text


def _machine(launch: Launch) -> dict[str, Finding]:
    return {f.check: f for f in environment.check_machine(Config(), launch, COCO17)}


def test_a_missing_compiler_is_an_error_where_one_is_needed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    launch = Launch(name="x", deepspeed=True, zero={"stage": 2, "offload_optimizer": {"device": "cpu"}})
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    here = _machine(launch)["deepspeed"]
    assert here.level == "note" and here.culprits == ("cpu_adam", "deepspeed_shm_comm")
    monkeypatch.setenv("PATH", str(tmp_path))
    gone = _machine(launch)["deepspeed"]
    assert gone.level == "error" and "C++ compiler" in gone.text and "ninja" in gone.text
    for name in ("cpu_adam", "deepspeed_shm_comm"):
        (tmp_path / "extensions" / name).mkdir(parents=True)
        (tmp_path / "extensions" / name / f"{name}.so").touch()
    assert "built already" in _machine(launch)["deepspeed"].text
    assert "deepspeed" not in _machine(Launch())


def test_a_launch_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("just text")
    for file in ("nowhere.yaml", "a.yaml"):
        with pytest.raises(UserError, match="--launch") as caught:
            environment.read_launch(str(tmp_path / file))
        assert "\n" not in str(caught.value)


ODD_LAUNCHES = {
    "num_processes of text": ("distributed_type: MULTI_GPU\nnum_processes: auto\n", "num_processes"),
    "deepspeed_config of text": ("distributed_type: DEEPSPEED\ndeepspeed_config: zero2\n", "deepspeed_config"),
    "a list": ("[]", "expected DeepSpeed's JSON"),
    "zero_optimization of text": ('{"zero_optimization": "stage 2"}', "expected DeepSpeed's JSON"),
    "offload of text": ('{"zero_optimization": {"offload_optimizer": "cpu"}}', "expected DeepSpeed's JSON"),
    "cut": ('{"zero', "not JSON"),
}


@pytest.mark.parametrize("case", ODD_LAUNCHES)
def test_a_launch_of_odd_types_is_one_line(tmp_path: Path, case: str) -> None:
    text, told = ODD_LAUNCHES[case]
    with pytest.raises(UserError, match=told) as caught:
        environment.read_launch(_launch(tmp_path, text))
    assert "\n" not in str(caught.value)


def _launch(folder: Path, text: str) -> str:
    """An accelerate config; of a DeepSpeed JSON, one that names it."""
    if text.startswith(("[", "{")):
        (folder / "zero.json").write_text(text)
        text = f"distributed_type: DEEPSPEED\ndeepspeed_config:\n  deepspeed_config_file: {folder / 'zero.json'}\n"
    (folder / "launch.yaml").write_text(text)
    return str(folder / "launch.yaml")


@pytest.mark.parametrize("zero", ["null", "{}", '{"offload_optimizer": null, "offload_param": {"device": null}}'])
def test_a_json_that_offloads_nothing_has_nothing_to_compile(tmp_path: Path, zero: str) -> None:
    launch = environment.read_launch(_launch(tmp_path, f'{{"zero_optimization": {zero}}}'))
    assert launch.deepspeed and environment.needed_operations(launch, cuda=True) == []


def test_packages_that_options_need_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    run = dataclasses.replace(Config(), lora=LoraConfig(rank=4), model=ModelConfig(base_dtype="nf4"))
    monkeypatch.setattr(environment, "package_version", lambda name: None if name == "bitsandbytes" else "1.0")
    (finding,) = environment._needed_packages(run)
    assert finding.level == "error" and not [*environment._needed_packages(Config())]
    said = "--model.base_dtype nf4: bitsandbytes is not installed. Run pip install bitsandbytes"
    assert finding.text == said


def test_what_accelerate_config_writes_itself_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offloading told by accelerate's own keys, in the file and to the processes; a `no` that YAML takes for false."""
    told = "distributed_type: DEEPSPEED\nmixed_precision: no\ndeepspeed_config:\n  zero_stage: 2\n"
    launch = environment.read_launch(_launch(tmp_path, f"{told}  offload_optimizer_device: cpu\n"))
    assert launch.precision == "no" and environment.needed_operations(launch, cuda=True) == ["cpu_adam"]
    launch = environment.read_launch(_launch(tmp_path, f"{told}  offload_optimizer_device: none\n"))
    assert environment.needed_operations(launch, cuda=True) == []
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "nvme")
    assert environment.needed_operations(environment.read_launch(None), cuda=True) == ["cpu_adam", "async_io"]


def test_too_little_disk_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = Config(output_dir=str(tmp_path / "a" / "b"), save_every=10)
    needs = environment.disk_bytes(run, COCO17)
    # 1B: three stages' weights and the student's, and 4 checkpoints of weights and Adam's moments each.
    assert needs == pytest.approx(1.2e9 * (16 + 4 * (20 + 20 + 28)), rel=0.1)
    # With adapters in phase2 and ssl: their bases, and checkpoints of merged weights and of the 50 M that learn.
    adapted = environment.disk_bytes(dataclasses.replace(run, lora=LoraConfig(rank=16)), COCO17)
    assert adapted == pytest.approx(1.2e9 * (16 + 8 + 4 * (20 + 4 + 8)) + 4 * 0.05e9 * (16 + 20), rel=0.1)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=int(needs)))
    assert {f.level for f in environment._disk(run, COCO17)} == {"error"}
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=int(2 * needs)))
    assert {f.level for f in environment._disk(run, COCO17)} == {"note"}


# ---- The command


def test_a_clean_set_ends_with_0_and_the_report_comes_back_whole(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    doctor.main([*_words(drawn), "--json", str(tmp_path / "r.json"), "--out", str(tmp_path / "out")])
    text, written = capsys.readouterr(), (tmp_path / "r.json").read_text()
    assert TOKEN not in text.out + text.err + written and "a token of the Hugging Face Hub is here" in text.out
    told = json.loads(written)
    assert told["ok"] is True and told["errors"] == 0 and "0 errors" in text.out
    findings = [Finding(**{**one, "culprits": tuple(one["culprits"])}) for one in told["findings"]]
    assert [dataclasses.asdict(f) | {"culprits": list(f.culprits)} for f in findings] == told["findings"]
    assert all(finding.text in text.out for finding in findings)
    groups = {finding.check.split("/")[0] for finding in findings}
    assert {"crops", "machine"} <= groups
    assert cv2.imread(told["grid"]).shape == (4 * 516, 4 * 388, 3) and Path(told["grid"]).parent == tmp_path / "out"


def test_faults_end_with_1_and_json_alone_can_be_printed(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _change(root, lambda people: people[1].update(bbox=[1, 2, 3]))
    with pytest.raises(SystemExit) as left:
        doctor.main([*_words(root), "--json", "-"])
    told = json.loads(capsys.readouterr().out)
    assert left.value.code == 1 and told["ok"] is False and told["errors"] == 1
    assert not (root.parent / "run").exists(), "nothing is written of a run that cannot be"


def test_a_file_that_cannot_be_written_is_one_line(drawn: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for words in (["--json", tmp_path / "nowhere" / "r.json"], ["--out", tmp_path / "file" / "out"]):
        with pytest.raises(UserError, match="cannot be written"):
            doctor.main(_words(drawn, *words))


def test_what_the_reader_alone_refuses_is_an_error_too(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _change(root, lambda people: [person.update(keypoints=[0] * 51, num_keypoints=0) for person in people])
    with pytest.raises(SystemExit) as left:
        doctor.main(_words(root))
    assert (
        left.value.code == 1
        and "120 of its 120 annotations are left out of the labeled people: 120 without a labeled keypoint (v > 0)"
        in capsys.readouterr().out
    )


def test_the_text_names_a_few_and_counts_the_rest(drawn: Path) -> None:
    report = doctor.DoctorReport(recipe="r", root=str(drawn))
    report.findings = [Finding(level="error", check="train/missing", text="6 gone", culprits=tuple("abcdef"))]
    report.people = {"train": examine.describe_people(_labels(3), COCO17)}
    assert "  error   missing: 6 gone: a, b, c, d and 2 more" in doctor.text_of(report).splitlines()


# ---- Before every training


def _brief(root: Path) -> list[str]:
    run = config.load(_words(root))
    sets, said = build.open_people(run.data, COCO17, unlabeled=False), []
    try:
        doctor.summarize(lambda text: said.append(str(text)), sets, run)
    except UserError as error:
        said.append(f"refused: {error}")
    return said


def test_before_a_training_of_people_who_are_fine_their_number_is_said_alone(drawn: Path) -> None:
    assert _brief(drawn) == ["people: 120 train, 40 val"]


def test_before_a_training_faults_are_said_and_spoilt_labels_are_refused(root: Path) -> None:
    _change(root, lambda people: people[3].update(area=0))
    said = _brief(root)
    assert len(said) == 3 and said[1].startswith("warning: train/area: 1 person of area 0: annotation 4 (train2017/")
    _change(root, lambda people: _swap(people, 11, 12))
    said = _brief(root)
    assert said[1].startswith("error: train/mirror: left_hip and right_hip"), "said first, and trained: it is no proof"
    assert len(said) <= 6 and all("\n" not in line for line in said)
    _change(root, lambda people: people[3].update(id=people[9]["id"]), VAL)
    assert _brief(root)[-1].startswith("refused: val/ids: 2 annotations share their id")


def test_before_a_training_no_image_is_opened(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = config.load(_words(root))
    sets = build.open_people(run.data, COCO17, unlabeled=False)
    shutil.rmtree(root / "train2017")
    doctor.summarize(print, sets, run)


def test_ids_are_compared_among_all_and_not_in_a_sample(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _change(root, lambda people: people[7].update(id=people[90]["id"]))
    monkeypatch.setattr(doctor, "BRIEF_PEOPLE", 10)
    (line,) = [line for line in _brief(root) if "ids" in line]
    assert line.startswith("warning: train/ids: 2 annotations share their id with another one: annotation 91")
