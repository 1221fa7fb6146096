"""Ids written as text or with a decimal point: taken as the numbers that they are, in training and in evaluation."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from sapiens_accel.config.schema import DataConfig, EvalConfig
from sapiens_accel.data import build
from sapiens_accel.data.dataset import Sets
from sapiens_accel.data.detections import read_detections
from sapiens_accel.data.people import keypoints_of
from sapiens_accel.errors import UserError
from sapiens_accel.evaluation import boxes, coco_metrics
from sapiens_accel.evaluation.ground_truth import read_ground_truth
from sapiens_accel.evaluation.predict import Predictions
from sapiens_accel.pose.skeleton import COCO17
from sapiens_accel.sources import coco as coco_json
from sapiens_accel.sources import convert, synthetic

FILES = ("person_keypoints_train2017.json", "person_keypoints_val2017.json")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ids")
    return synthetic.write(folder / "drawn", num_train=6, num_unlabelled=2, num_val=4, image_hw=(160, 240))


def _with_ids(drawn: Path, folder: Path, write: Callable[[int], Any]) -> Path:
    """The same data, its ids written otherwise."""
    (folder / "annotations").mkdir(parents=True)
    for images in ("train2017", "val2017"):
        (folder / images).symlink_to(drawn / images)
    for name in FILES:
        tree = json.loads((drawn / "annotations" / name).read_text())
        for item in tree["images"]:
            item["id"] = write(item["id"])
        for item in tree["annotations"]:
            item |= {"id": write(item["id"]), "image_id": write(item["image_id"])}
        (folder / "annotations" / name).write_text(json.dumps(tree))
    return folder


def _open(root: Path, cache: Path) -> Sets:
    return build.open_people(DataConfig(root=str(root), cache_dir=str(cache)), COCO17, unlabeled=False)


def _metrics(sets: Sets) -> dict[str, float]:
    """Of people found where they are labeled, but for one: AP is neither 0 nor 1."""
    tree = read_ground_truth(sets.val, 17).dataset
    labeled = [person for person in tree["annotations"] if any(person["keypoints"])]
    found = [
        {"image_id": one["image_id"], "category_id": 1, "keypoints": one["keypoints"], "score": 1.0} for one in labeled
    ]
    return coco_metrics.compute_metrics(found[1:], sets.val, COCO17, "pycocotools")[0]


@pytest.mark.parametrize("write", [lambda i: f"{i:012d}", str, float], ids=["twelve digits", "text", "float"])
def test_ids_are_the_numbers_that_they_are(drawn: Path, tmp_path: Path, write: Callable[[int], Any]) -> None:
    ours = _open(_with_ids(drawn, tmp_path / "root", write), tmp_path / "cache")
    theirs = _open(drawn, tmp_path / "cache")
    for one, other in ((ours.train, theirs.train), (ours.val, theirs.val)):
        assert one.rows.to_list() == other.rows.to_list()
    assert _metrics(ours) == _metrics(theirs) and 0 < _metrics(theirs)["AP"] < 1
    assert read_ground_truth(ours.val, 17).unmeasured_ids == ()
    assert np.array_equal(boxes.ground_truth_boxes(ours.val).image_ids, boxes.ground_truth_boxes(theirs.val).image_ids)
    # A detector that writes them in the same way finds its images again.
    them = [
        {"image_id": write(image_id), "category_id": 1, "bbox": box, "score": 0.5}
        for image_id, box in zip(theirs.val.rows["image_id"][:], theirs.val.rows["box_xywh"][:], strict=True)
    ]
    (tmp_path / "boxes.json").write_text(json.dumps(them))
    detected = boxes.load_boxes(str(tmp_path / "boxes.json"), ours.val)
    assert detected.image_ids.tolist() == theirs.val.rows["image_id"][:] and not detected.note


@pytest.mark.parametrize(
    "write",
    [lambda i: f"img-{i}.jpg", lambda i: f"{i:032x}-ü", lambda i: 2**63 - 1 - i, lambda i: f"{i:012d}", lambda i: -i],
    ids=["text", "not ASCII", "64 bits", "twelve digits", "negative"],
)
@pytest.mark.parametrize("backend", ["pycocotools", "faster_coco_eval"])
def test_any_ids_are_evaluated_and_written_back(
    drawn: Path, tmp_path: Path, write: Callable[[int], Any], backend: Any
) -> None:
    pytest.importorskip(backend)
    ours = _open(_with_ids(drawn, tmp_path / "root", write), tmp_path / "cache")
    labels = keypoints_of(ours.val.rows)
    found = Predictions(points_xy=labels[..., :2], scores=np.ones(labels.shape[:2]))
    config = DataConfig(input_hw=(64, 48))
    results, _ = coco_metrics.coco_results(found, boxes.load_boxes("gt", ours.val), COCO17, config, EvalConfig())
    assert coco_metrics.compute_metrics(results, ours.val, COCO17, backend)[0]["AP"] == pytest.approx(1.0)
    coco_metrics.save_results(results, tmp_path / "saved.json", ours.val, COCO17)
    listed = {image["id"] for image in json.loads(ours.val.annotations.read_text())["images"]}
    assert {one["image_id"] for one in json.loads((tmp_path / "saved.json").read_text())} == listed
    truth = read_ground_truth(ours.val, 17)
    people = [truth.given_ids.get(number, number) for number in ours.val.rows["ann_id"][:]]
    tree = json.loads(ours.val.annotations.read_text())
    assert people == [one["id"] for one in tree["annotations"] if one["id"] in people] and people
    # A detector that writes the same ids, and one that does not.
    them = [{"image_id": one, "category_id": 1, "bbox": [9, 9, 50, 90], "score": 0.5} for one in sorted(listed)]
    (tmp_path / "boxes.json").write_text(json.dumps(them))
    assert len(boxes.load_boxes(str(tmp_path / "boxes.json"), ours.val)) == len(listed)
    (tmp_path / "boxes.json").write_text(json.dumps([{**one, "image_id": "elsewhere"} for one in them]))
    with pytest.raises(UserError, match=r"of another image set: .*the first is elsewhere"):
        boxes.load_boxes(str(tmp_path / "boxes.json"), ours.val)


@pytest.mark.parametrize("write", [lambda i: f"img-{i}.jpg", lambda i: f"{i:012d}", int], ids=["text", "digits", "int"])
def test_parquet_keeps_ids_as_they_are_written(drawn: Path, tmp_path: Path, write: Callable[[int], Any]) -> None:
    root = _with_ids(drawn, tmp_path / "root", write)
    file = root / "annotations" / FILES[1]
    tree = json.loads(file.read_text())
    file.write_text(json.dumps(tree | {"annotations": tree["annotations"][::-1]}))  # an order of their own
    convert.main(["convert", "coco", str(root), str(tmp_path / "shards")])
    ours, theirs = (_open(folder, tmp_path / "cache") for folder in (tmp_path / "shards", root))
    for column in ("image_id", "ann_id", "box_xywh", "keypoints"):
        assert ours.val.rows[column][:] == theirs.val.rows[column][:]
    assert _metrics(ours) == _metrics(theirs)
    (row,) = pq.read_table(tmp_path / "shards" / "data", columns=["image_id"]).slice(0, 1).to_pylist()
    assert type(row["image_id"]) is type(write(1))
    saved, given = [], []
    for sets in (ours, theirs):
        labels = keypoints_of(sets.val.rows)
        found = Predictions(points_xy=labels[..., :2], scores=np.ones(labels.shape[:2]))
        config = DataConfig(input_hw=(64, 48))
        results, _ = coco_metrics.coco_results(found, boxes.load_boxes("gt", sets.val), COCO17, config, EvalConfig())
        coco_metrics.save_results(results, tmp_path / "saved.json", sets.val, COCO17)
        saved.append(json.loads((tmp_path / "saved.json").read_text()))
        given.append(dict(read_ground_truth(sets.val, 17).given_ids))
    assert saved[0] == saved[1] and {one["image_id"] for one in saved[0]} == {image["id"] for image in tree["images"]}
    assert given[0] == given[1] and bool(given[0]) == (write is not int)


def test_ids_that_shards_cannot_keep_are_refused(drawn: Path, tmp_path: Path) -> None:
    some = _with_ids(drawn, tmp_path / "some", lambda i: "first" if i == 1 else i)
    with pytest.raises(UserError, match=r"train2017\.json: images: 1 of 4 ids are texts \(expected all or none\)"):
        convert.main(["convert", "coco", str(some), str(tmp_path / "out")])
    every = _with_ids(drawn, tmp_path / "every", str)
    with pytest.raises(
        UserError, match=r"train2017\.json: images: ids are texts \(expected numbers\)\. Use --to parquet"
    ):
        convert.main(["convert", "coco", str(every), str(tmp_path / "out"), "--to", "webdataset"])


@pytest.mark.parametrize("odd", [" ", 2.5, True, [1]])
def test_other_ids_are_refused_when_the_file_is_read(drawn: Path, tmp_path: Path, odd: Any) -> None:
    root = _with_ids(drawn, tmp_path / "root", lambda i: odd if i == 2 else i)
    with pytest.raises(
        UserError, match=r"train2017\.json: images, entry 1: expected an id that is a whole number or a text"
    ):
        _open(root, tmp_path / "cache")


def test_a_file_is_parsed_once_until_it_changes(drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "some.json"
    file.write_text((drawn / "annotations" / FILES[1]).read_text())
    loads: list[int] = []
    real = json.loads
    monkeypatch.setattr(coco_json.json, "loads", lambda text: loads.append(1) or real(text))
    first = coco_json.read_json(file)
    assert coco_json.read_json(file) is first and coco_json.read_image_list(file) is first["images"] and len(loads) == 1
    file.write_text(json.dumps(first | {"annotations": []}))
    assert coco_json.read_json(file)["annotations"] == [] and len(loads) == 2
    monkeypatch.setattr(coco_json, "MAX_ANNOTATIONS_HELD", -1)
    coco_json.release_large_trees()
    coco_json.read_json(file)
    assert len(loads) == 3


def test_what_the_readers_of_detections_read_is_one(tmp_path: Path) -> None:
    (tmp_path / "found.json").write_text(json.dumps([{"file_name": "a.jpg", "bbox": [1, 2, 3, 4]}]))
    (one,) = read_detections(tmp_path / "found.json", ("bbox",))
    assert (one.position, one.image_id, one.file_name, one.category_id, one.score) == (0, None, "a.jpg", 1, 1.0)
    with pytest.raises(UserError, match=r"found\.json: detection 0: it has no 'image_id'; expected image_id, bbox"):
        read_detections(tmp_path / "found.json")
