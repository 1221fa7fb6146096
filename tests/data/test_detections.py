"""A detector's results: what is read of them, and what is refused in one line."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sapiens_accel.data import people as coco
from sapiens_accel.data.people import People
from sapiens_accel.errors import UserError
from sapiens_accel.evaluation import boxes as detections
from sapiens_accel.sources import synthetic

REPOSITORY = Path(__file__).resolve().parents[2]
DATA = REPOSITORY / os.environ.get("SAPIENS_ACCEL_TEST_DATA", "../shared/data")
VAL = "annotations/person_keypoints_val2017.json"
PersonBoxes = list[dict[str, Any]]


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> People:
    root = synthetic.write(tmp_path_factory.mktemp("detections") / "drawn", num_train=1, num_unlabelled=1, num_val=8)
    return coco.labeled_people(root, VAL, "val2017", 17, root.parent / "cache")


def _found(people: People) -> PersonBoxes:
    """A detection of everybody, 0.9, 0.8, ..., in the order of the rows."""
    rows = people.rows.to_list()
    return [
        {"image_id": row["image_id"], "category_id": 1, "bbox": row["box_xywh"], "score": 0.9 - 0.1 * i}
        for i, row in enumerate(rows)
    ]


def _write(tmp_path: Path, content: Any) -> Path:
    file = tmp_path / "detector.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return file


def test_a_box_a_row_with_its_score_and_image(people: People, tmp_path: Path) -> None:
    boxes = detections.load_boxes(str(_write(tmp_path, _found(people))), people)
    assert boxes.boxes_xywh == pytest.approx(coco.boxes_of(people.rows))
    assert boxes.scores == pytest.approx(0.9 - 0.1 * np.arange(8))
    assert boxes.file_names == list(people.rows["file_name"][:]) and boxes.root == people.root
    assert boxes.image_ids.tolist() == list(people.rows["image_id"][:])
    assert (boxes.source, boxes.labeled, boxes.note) == ("detector (detector.json)", False, "")
    own = detections.load_boxes("gt", people)
    assert (own.source, own.labeled, own.scores.tolist()) == ("ground truth", True, [1.0] * 8)


def test_other_images_and_other_categories_are_left_out_and_reported(people: People, tmp_path: Path) -> None:
    found = _found(people)
    more = [found[0] | {"image_id": 10**9}, found[1] | {"category_id": 3}, found[2] | {"category_id": 44}]
    boxes = detections.load_boxes(str(_write(tmp_path, [*more, *found])), people)
    assert len(boxes) == 8
    assert "detections are left out: 1 of other images, 2 of other categories" in boxes.note
    # Nothing is too unsure: the published evaluation has no threshold on boxes.
    assert len(detections.load_boxes(str(_write(tmp_path, [found[0] | {"score": 0.001}])), people)) == 1


def test_a_file_is_found_here_or_in_the_root(people: People, tmp_path: Path) -> None:
    folder = people.root / "boxes"
    folder.mkdir(exist_ok=True)
    (folder / "them.json").write_text(json.dumps(_found(people)))
    assert len(detections.load_boxes("boxes/them.json", people)) == 8


def _without(key: str) -> Callable[[PersonBoxes], Any]:
    return lambda found: [found[0], {k: v for k, v in found[1].items() if k != key}]


def _with(**changed: Any) -> Callable[[PersonBoxes], Any]:
    return lambda found: [*found[:3], found[3] | changed]


def _with_all(**changed: Any) -> Callable[[PersonBoxes], Any]:
    return lambda found: [one | changed for one in found]


REFUSED = [
    pytest.param(lambda found: [], ["an empty list"], id="empty"),
    pytest.param(lambda found: {"annotations": found}, ["expected a detector's results"], id="annotations"),
    pytest.param(lambda found: "[{", ["not JSON"], id="no JSON"),
    pytest.param(lambda found: ["box"], ["detection 0", "'box'"], id="no objects"),
    pytest.param(_without("score"), ["detection 1", "no 'score'"], id="no score"),
    pytest.param(_without("bbox"), ["detection 1", "no 'bbox'"], id="no box"),
    pytest.param(_without("image_id"), ["detection 1", "no 'image_id'"], id="no image"),
    pytest.param(_with(score=None), ["detection 3", "None"], id="score None"),
    pytest.param(_with(score=float("nan")), ["detection 3", "nan"], id="score nan"),
    pytest.param(_with(bbox=[1, 2, 3]), ["detection 3", "4 numbers", "[1, 2, 3]"], id="three numbers"),
    pytest.param(_with_all(bbox=[10, 10, 0, 30]), ["detection 0", "[10, 10, 0, 30]", "no area"], id="no width"),
    pytest.param(_with_all(bbox=[10, 10, 30, -2]), ["detection 0", "no area"], id="negative height"),
    pytest.param(_with_all(bbox=[5000, 10, 30, 30]), ["detection 0", "outside image"], id="right of the image"),
    pytest.param(_with_all(bbox=[-40, 10, 30, 30]), ["detection 0", "outside image"], id="left of the image"),
    pytest.param(_with_all(bbox=[0, 4000, 30, 30]), ["detection 0", "outside image"], id="below the image"),
    pytest.param(
        lambda found: [one | {"image_id": 10**9 + i} for i, one in enumerate(found)],
        ["another image set", "none of its 8 images", "1000000000", "person_keypoints_val2017.json"],
        id="another image set",
    ),
    pytest.param(
        lambda found: [one | {"category_id": 18} for one in found], ["category 1 (person)", "18"], id="only dogs"
    ),
]


@pytest.mark.parametrize(("change", "named"), REFUSED)
def test_what_cannot_be_used_is_refused_in_one_line(
    people: People, tmp_path: Path, change: Callable[[PersonBoxes], Any], named: list[str]
) -> None:
    file = _write(tmp_path, change(_found(people)))
    with pytest.raises(UserError) as caught:
        detections.load_boxes(str(file), people)
    text = str(caught.value)
    assert [word for word in [str(file), *named] if word not in text] == [], text
    assert "\n" not in text


def test_a_box_that_cannot_be_used_is_left_out_and_counted(people: People, tmp_path: Path) -> None:
    """One of them ended a whole evaluation."""
    found = _found(people)
    odd = [found[0] | {"bbox": box} for box in ([10, 10, 0, 30], [5000, 10, 30, 30], [-40, 10, 30, 30])]
    boxes = detections.load_boxes(str(_write(tmp_path, [*found, *odd])), people)
    assert len(boxes) == len(found)
    assert boxes.note.endswith(
        f"of its {len(found) + 3} detections are left out: 1 without area, 2 outside of their image"
    )


def test_a_file_that_is_not_there_is_refused(people: People) -> None:
    with pytest.raises(UserError, match=r"--eval\.boxes nowhere\.json: no such file"):
        detections.load_boxes("nowhere.json", people)


def test_a_image_that_is_not_there_is_named(people: People, tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "annotations").mkdir(parents=True)
    (root / VAL).write_text(people.annotations.read_text())
    (root / "val2017").mkdir()
    moved = coco.labeled_people(root, VAL, "val2017", 17, tmp_path / "cache")
    with pytest.raises(UserError, match=r"detection 0: its image .*\.jpg is not there"):
        detections.load_boxes(str(_write(tmp_path, _found(people))), moved)


def test_a_labeled_box_outside_its_image_is_refused(people: People, tmp_path: Path) -> None:
    tree = json.loads(people.annotations.read_text())
    tree["annotations"][2]["bbox"] = [2000, 10, 40, 90]
    (tmp_path / "val.json").write_text(json.dumps(tree))
    moved = coco.labeled_people(tmp_path, "val.json", "val2017", 17, tmp_path / "cache")
    with pytest.raises(UserError) as caught:
        detections.ground_truth_boxes(moved)
    number = tree["annotations"][2]["id"]
    assert f"annotation {number}: its box [2000, 10, 40, 90] is outside image" in str(caught.value)


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no real images: {DATA} (SAPIENS_ACCEL_TEST_DATA)")
def test_a_real_detectors_file_and_one_of_another_set(tmp_path: Path) -> None:
    mini, whole = DATA / "coco_mini", DATA / "coco_wholebody_mini"
    file = whole / "person_detection_results" / "COCO_val2017_detections_AP_H_56_person.json"
    here = coco.labeled_people(whole, VAL, "val2017", 17, tmp_path)
    boxes = detections.load_boxes(str(file), here)
    assert len(boxes) == 118 and 0 < boxes.scores.min() < 0.01 < 0.99 < boxes.scores.max()
    assert set(boxes.image_ids.tolist()) == {785, 40083, 196141, 197388}
    other = coco.labeled_people(mini, "annotations/person_keypoints_train2017.json", "train2017", 17, tmp_path)
    with pytest.raises(UserError, match="another image set: none of its 4 images"):
        detections.load_boxes(str(file), other)
