"""Where people's boxes are from: annotated, made from keypoints, whole images.

By a reference in plain loops, by what must hold of any box, and by the files of `own_data_cases`, through the reader of
a run and in whole runs.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import forks
import numpy as np
import pytest
import yaml

from sapiens_accel.config.schema import Config, DataConfig
from sapiens_accel.data import build
from sapiens_accel.data.dataset import Sets
from sapiens_accel.data.detections import BoxesFile
from sapiens_accel.data.people import boxes_of, keypoints_of
from sapiens_accel.doctor import report as doctor
from sapiens_accel.errors import UserError
from sapiens_accel.pose import person_boxes
from sapiens_accel.pose.person_boxes import ANNOTATED, FROM_KEYPOINTS, GUESSED_SIDE, NO_BOX, WHOLE_IMAGE
from sapiens_accel.sources import convert, synthetic

REPOSITORY = Path(__file__).resolve().parents[2]
CASES = (REPOSITORY / os.environ.get("SAPIENS_ACCEL_TEST_DATA", "../shared/data") / "own_data_cases").resolve()
with_cases = pytest.mark.skipif(not CASES.is_dir(), reason=f"no own data: {CASES} (SAPIENS_ACCEL_TEST_DATA)")
NAN = float("nan")
TYPICAL = (11.0, 17.0)


# ---- The rule


def _reference(
    annotated: list[float], points: list[tuple[float, float]], size: tuple[float, float], which: str, margin: float
) -> tuple[list[float], int]:
    """One person, in words of the documentation."""
    has_box = annotated[2] > 0 and annotated[3] > 0
    if which == "image":
        return [0, 0, *size], WHOLE_IMAGE
    if not points or (has_box and which == "annotation"):
        return annotated, ANNOTATED if has_box else NO_BOX
    ends = [(min(p[axis] for p in points), max(p[axis] for p in points)) for axis in (0, 1)]
    sides = [(high - low) * (1 + 2 * margin) if high - low >= 1 else None for low, high in ends]
    origin = FROM_KEYPOINTS if None not in sides else GUESSED_SIDE
    filled = [TYPICAL[axis] if side is None else side for axis, side in enumerate(sides)]
    corner = [(low + high) / 2 - side / 2 for (low, high), side in zip(ends, filled, strict=True)]
    return [*corner, *filled], origin


@pytest.mark.parametrize("which", ["annotation", "keypoints", "image"])
def test_boxes_are_those_of_the_rule_and_contain_their_keypoints(which: Any) -> None:
    rng = np.random.default_rng(4)
    num, k = 400, 5
    points, labeled = rng.uniform(0, 90, (num, k, 2)), rng.random((num, k)) < 0.35
    points[::7, :, 1] = 33  # in a line
    annotated = np.concatenate([rng.uniform(0, 50, (num, 2)), rng.uniform(-10, 50, (num, 2))], axis=1)
    annotated[::3, 2:] = 0
    sizes = np.full((num, 2), (100.0, 90.0))
    made = person_boxes.choose_boxes(annotated, points, labeled, sizes, (which, 0.2), lambda: np.array(TYPICAL))
    counts = np.zeros(5, int)
    for i in range(num):
        own = [(float(x), float(y)) for (x, y), seen in zip(points[i], labeled[i], strict=True) if seen]
        box, origin = _reference(annotated[i].tolist(), own, (100, 90), which, 0.2)
        assert made.origins[i] == origin and made.boxes_xywh[i].tolist() == pytest.approx(box), i
        counts[origin] += 1
        x, y, w, h = made.boxes_xywh[i]
        inside = all(x - 1e-9 <= a <= x + w + 1e-9 and y - 1e-9 <= b <= y + h + 1e-9 for a, b in own)
        assert origin in (ANNOTATED, NO_BOX) or inside
    assert (counts > 20).sum() == {"annotation": 4, "keypoints": 4, "image": 1}[which], counts


def test_without_others_a_missing_side_is_the_persons_own_and_a_single_keypoint_takes_the_image() -> None:
    """A box around one keypoint would have it in its center: the network would learn the center."""
    points = np.array([[[10.0, 20], [40, 20]], [[10, 20], [0, 0]], [[-3, 20], [0, 0]]])
    labeled = np.array([[True, True], [True, False], [True, False]])
    sizes, none = np.full((3, 2), (64.0, 48.0)), np.zeros((3, 4))
    made = person_boxes.choose_boxes(none, points, labeled, sizes, ("annotation", 0.1), lambda: np.full(2, NAN))
    assert made.boxes_xywh.tolist() == [[7, 2, 36, 36], [0, 0, 64, 48], [-3, 0, 67, 48]]
    assert made.origins.tolist() == [GUESSED_SIDE, WHOLE_IMAGE, WHOLE_IMAGE]


def test_the_margin_has_one_default() -> None:
    assert DataConfig().box_margin == person_boxes.BOX_MARGIN


# ---- Files


def _lay_out(name: str, out: Path) -> Path:
    subprocess.run([sys.executable, CASES / "lay.py", name, out], check=True, capture_output=True)
    return out


def _config(root: Path, **more: Any) -> DataConfig:
    names: dict[str, Any] = {}
    for split in ("train", "val"):
        found = [root / f"{split}.json", root / split / "result_ui.json"]
        if file := next((file for file in found if file.is_file()), None):
            names[f"{split}_annotations"] = str(file.relative_to(root))
            folder = split if (root / split / "images").exists() or not (root / "images").is_dir() else "images"
            names[f"{split}_images"] = folder
    return DataConfig(root=str(root), cache_dir=str(root.parent / "cache"), num_workers=0, **names, **more)


def _open(config: DataConfig) -> Sets:
    return build.open_people(config, build.open_skeleton(config)[0], unlabeled=False)


def _labeled_in_file(config: DataConfig) -> dict[int, list[list[float]]]:
    """The labeled keypoints of each annotation that has any."""
    tree = json.loads((Path(str(config.root)) / config.train_annotations).read_text())
    found = {}
    for one in tree["annotations"]:
        numbers = one.get("keypoints") or []
        points = [numbers[i : i + 2] for i in range(0, len(numbers), 3) if numbers[i + 2] > 0]
        if points:
            found[one["id"]] = points
    return found


CASE_NAMES = ("bbox_missing_half", "k1_tight_box", "k2_half_horizontal", "dlc_names", "sleap_export", "label_studio",
              "conv_noarea")  # fmt: skip


@with_cases
@pytest.mark.parametrize("rule", ["annotation", "keypoints", "image"])
@pytest.mark.parametrize("name", [*CASE_NAMES, "bbox_missing"])
def test_everybody_with_a_labeled_keypoint_is_used(name: str, rule: Any, tmp_path: Path) -> None:
    config = _config(_lay_out(name, tmp_path / name), boxes=rule)
    if (name, rule) == ("bbox_missing", "annotation"):
        with pytest.raises(UserError, match=r"none of its 6 annotations has a box \('bbox'\)\. .*--data\.boxes keypoint"
                                            r"s, .*--data\.boxes image$"):  # fmt: skip
            _open(config)
        return
    people = _open(config).train
    labeled, boxes = _labeled_in_file(config), boxes_of(people.rows)
    assert sorted(people.rows["ann_id"][:]) == sorted(labeled)
    for ann_id, (x, y, w, h) in zip(people.rows["ann_id"][:], boxes.tolist(), strict=True):
        assert w > 0 and h > 0
        for a, b in labeled[ann_id]:
            assert x <= a <= x + w and y <= b <= y + h
    assert keypoints_of(people.rows)[..., 2].astype(bool).any(axis=1).all()
    if rule == "image":
        assert boxes.tolist() == [[0, 0, 320, 240]] * len(boxes)


@with_cases
@pytest.mark.parametrize(
    ("name", "texts"),
    [
        ("bbox_missing_half", ["train.json: 3 of 6 people have no box", "15% larger on each side"]),
        (
            "k1_tight_box",
            ["train.json: 6 of 6 people have no box", "6 with one keypoint, and nobody has a box"],
        ),
        ("k2_half_horizontal", ["3 of 6 people have no box", "3 with one keypoint or keypoints in a line"]),
        ("sleap_export", ["1 of 6 people have no box", "1 with one keypoint or keypoints in a line"]),
        ("dlc_names", []),
    ],
)
def test_boxes_that_were_made_are_counted_in_one_line_of_each_file(name: str, texts: list[str], tmp_path: Path) -> None:
    config = _config(_lay_out(name, tmp_path / name))
    lines = [line for line in _open(config).warnings if "no box" in line]
    assert len(lines) == 2 * bool(texts), lines
    assert [text for text in texts if text not in lines[0]] == []
    report, _, _ = doctor.check_data(Config(data=config))
    found = [one for one in report.findings if one.check == "train/made_boxes"]
    assert len(found) == bool(texts)
    assert not found or (found[0].culprits and "made from their keypoints" in found[0].text)


@with_cases
def test_whole_images_of_unknown_size_are_refused_once(tmp_path: Path) -> None:
    config = _config(_lay_out("dlc_names", tmp_path / "case"), boxes="image")
    file = tmp_path / "case" / "train.json"
    tree = json.loads(file.read_text())
    for image in tree["images"]:
        del image["width"]
    file.write_text(json.dumps(tree))
    with pytest.raises(UserError, match="none of its 6 images has a 'width' and a 'height'"):
        _open(config)
    report, _, _ = doctor.check_data(Config(data=config))
    (error,) = [one for one in report.findings if one.level == "error"]
    assert error.check == "train/boxes" and "none of its 6 images" in error.text


@with_cases
def test_the_doctor_names_missing_boxes_once(tmp_path: Path) -> None:
    config = _config(_lay_out("bbox_missing", tmp_path / "case"))
    report, _, _ = doctor.check_data(Config(data=config))
    errors = [one for one in report.findings if one.level == "error"]
    assert [one.check for one in errors] == ["train/boxes", "val/boxes"]
    assert "--data.boxes keypoints" in errors[0].text and report.people["train"]["people"] == 6


def test_boxes_stay_the_same_in_shards_and_streams(tmp_path: Path) -> None:
    """A box in three is taken away, another has no width; some people keep one keypoint."""
    root = synthetic.write(tmp_path / "drawn", num_train=24, num_unlabelled=1, num_val=3, image_hw=(160, 240))
    file = root / "annotations/person_keypoints_train2017.json"
    tree = json.loads(file.read_text())
    for index, one in enumerate(tree["annotations"]):
        if index % 3 == 0:
            del one["bbox"], one["area"]
        elif index % 3 == 1:
            one |= {"bbox": [5, 5, 0, 9], "area": 0}
        if index % 5 == 0:
            one["keypoints"][3:] = [0] * (len(one["keypoints"]) - 3)
            one["keypoints"][:3] = [100, 80, 2]
    file.write_text(json.dumps(tree))
    convert.main(["convert", "coco", str(root), str(tmp_path / "shards"), "--shard_mb", "0.2", "--group_rows", "2"])
    for rule in ("annotation", "keypoints", "image"):
        of_json, of_shards = (_open(_config(folder, boxes=rule)) for folder in (root, tmp_path / "shards"))
        streamed = _open(_config(tmp_path / "shards", boxes=rule, streaming=True))
        found = []
        for sets in (of_json, of_shards, streamed):
            rows = [sets.train.rows[index] for index in range(len(sets.train))]
            found.append({row["ann_id"]: (np.asarray(row["box_xywh"]).tolist(), row["area"]) for row in rows})
            assert len(found[-1]) == 24 and _note_of(sets) == _note_of(of_json)
        assert found[0] == found[1] == found[2]
        shared = 24 - len(set(of_json.train.rows["file_name"][:]))
        told = f"; {shared} of 24 people share their image with another one" in of_json.train.box_note
        assert shared > 5 and told == (rule == "image")
        assert streamed.skeleton.people is not None and of_json.skeleton.people == of_shards.skeleton.people


def _run(*words: object) -> str:
    done = forks.run(words)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@with_cases
def test_a_run_without_boxes_from_training_to_its_own_images(tmp_path: Path) -> None:
    """DeepLabCut's habit, and boxes from keypoints: train, evaluate, and look at images, by the programs."""
    root = _lay_out("bbox_missing", tmp_path / "case")
    common = ("--data.num_workers", 0, "--data.cache_dir", tmp_path / "cache")
    files = [f"--data.{split}_{what}={split}{end}" for split in ("train", "val") for what, end in
             (("annotations", ".json"), ("images", ""))]  # fmt: skip
    words = ("--data.root", root, *files, *common, "--stage", "phase2", "--max_steps", 1, "--report_to", "none",
             "--phase2.global_batch", 2)  # fmt: skip
    for rule, share, told in (("keypoints", 0.2, "boxes are made from the keypoints"), ("image", 1.0, "whole images")):
        out = tmp_path / rule
        said = _run("train.py", *words, "--data.boxes", rule, "--output_dir", out)
        assert f"train.json: {told}" in said or f"train.json: boxes are {told}" in said
        assert ("proposed for whole images" in said) == (rule == "image")
        assert yaml.safe_load((out / "config.yaml").read_text())["data"]["boxes"] == rule
        sizes = json.loads((out / "phase2/weights/skeleton.json").read_text())["people"]
        assert sizes["share"][1] == pytest.approx(share, abs=0.1) and len(sizes["aspect"]) == 3
        assert "val.json: boxes are" in _run("eval.py", out, *common)
        said = _run("eval.py", out, "--images", root / "val", *common)
        assert ("boxes take up 100% of their image" in said) == (rule == "keypoints")


def _note_of(sets: Sets) -> str:
    """Without the file's name, and without what is not counted of a stream."""
    return sets.train.box_note.replace(str(sets.train.annotations), "").removeprefix("warning: ").split("; ")[0]


@pytest.mark.parametrize("which", ["annotation", "keypoints"])
def test_own_images_have_the_boxes_of_the_rule(which: Any, tmp_path: Path) -> None:
    """One person with a box, one whose box is missing, one of no width, one without a box or a keypoint."""
    points = [10, 20, 2, 50, 80, 1, 0, 0, 0]
    people = [{"bbox": [5, 10, 60, 90]}, {}, {"bbox": [7, 7, 0, 9]}, {"keypoints": [0] * 9}]
    annotations = [
        {"id": number, "image_id": 1, "category_id": None, "keypoints": points, **one}
        for number, one in enumerate(people)
    ]
    images = [{"id": 1, "file_name": "a.jpg", "width": 100, "height": 100}]
    (tmp_path / "b.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    file = BoxesFile(tmp_path / "b.json", ["a.jpg"], 0.3, rule=(which, 0.25))
    from_keypoints = [0, 5, 60, 90]  # 10 to 50 and 20 to 80, each side half as long again
    first = [5, 10, 60, 90] if which == "annotation" else from_keypoints
    np.testing.assert_allclose(file.of("a.jpg").boxes_xywh, [first, from_keypoints, from_keypoints])
    num = 2 if which == "annotation" else 3
    assert f"{num} boxes are made from keypoints; of its 4 boxes are left out: 1 without a box" in file.note
