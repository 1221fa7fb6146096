"""Labels withheld by the published rule, the pool of people without labels, and no validation image in it."""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from sapiens_accel.config.schema import AugmentConfig, DataConfig, StageConfig, TeacherConfig
from sapiens_accel.data import build, leakage
from sapiens_accel.data import people as coco
from sapiens_accel.data.augment import Augmenter
from sapiens_accel.data.dataset import Key, Labeled, Pair, Sets, TrainingPeople
from sapiens_accel.data.people import People
from sapiens_accel.errors import UserError
from sapiens_accel.pose.skeleton import COCO17
from sapiens_accel.sources import synthetic
from sapiens_accel.training import run_folder

TRAIN = "annotations/person_keypoints_train2017.json"
BOXES = "annotations/person_boxes_unlabeled2017.json"
REPOSITORY = Path(__file__).resolve().parents[2]
REAL = REPOSITORY / os.environ.get("SAPIENS_ACCEL_TEST_DATA", "../shared/data") / "coco_mini"
with_real_data = pytest.mark.skipif(not REAL.is_dir(), reason=f"no real images: {REAL} (SAPIENS_ACCEL_TEST_DATA)")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all tests: tables are keyed by content."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic.write(tmp_path_factory.mktemp("pool") / "drawn", num_train=20, num_unlabelled=8, num_val=6)


@pytest.fixture
def root(drawn: Path, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    return Path(shutil.copytree(drawn, tmp_path / "root"))


def _open(root: Path, cache: Path, unlabeled: bool = True, **changes: Any) -> Sets:
    options: dict[str, Any] = {"unlabelled_min_side": 0.0, "input_hw": (64, 48)} | changes
    return build.open_people(DataConfig(root=str(root), cache_dir=str(cache), **options), COCO17, unlabeled=unlabeled)


def _pool(root: Path, cache: Path, **changes: Any) -> People:
    people = _open(root, cache, **changes).unlabeled
    assert people is not None
    return people


def _error(action: Callable[[], object], *named: object) -> None:
    """The action ends in a UserError of one line that names all of these."""
    with pytest.raises(UserError) as caught:
        action()
    text = str(caught.value)
    assert "\n" not in text
    assert [str(name) for name in named if str(name) not in text] == [], text


def _tree(path: Path) -> Any:
    return json.loads(path.read_text())


def _labeled_ids(path: Path, num: int | None = None) -> list[int]:
    """Ids of the people with keypoints in the order of the JSON, read without our code; or of the first `num`.

    The first ones are found as xierc/Semi_Human_Pose does: image by image, in the order of `images`.
    """
    people = _tree(path)["annotations"]
    people = [a for a in people if not a["iscrowd"] and a["num_keypoints"] > 0 and min(a["bbox"][2:]) > 0]
    pictures = [image["id"] for image in _tree(path)["images"]]
    first = {a["id"] for a in [a for picture in pictures for a in people if a["image_id"] == picture][:num]}
    return [a["id"] for a in people if a["id"] in first]


def _ids(people: People) -> list[int]:
    return list(people.rows["ann_id"])


# ---- Which people keep their labels


@with_real_data
def test_the_people_of_the_first_images_are_labeled_and_the_others_withheld(cache: Path) -> None:
    everybody, expected = _labeled_ids(REAL / TRAIN), _labeled_ids(REAL / TRAIN, 30)
    assert len(everybody) == 86 and everybody != sorted(everybody), "the order of the file is not that of the ids"
    assert len(expected) == 30 and set(expected) != set(everybody[:30]), "nor that of its images"
    sets = _open(REAL, cache, labels=30)
    assert sets.unlabeled is not None
    assert _ids(sets.train) == expected
    # 10 whole images, 56 withheld, 81 without keypoints: nobody twice, and no keypoint in any of them.
    assert len(sets.unlabeled) == 10 + 56 + 81
    assert _ids(sets.unlabeled)[10:66] == [i for i in everybody if i not in expected]
    assert not coco.keypoints_of(sets.unlabeled.rows).any()
    assert not set(_ids(sets.train)) & set(_ids(sets.unlabeled)[10:])
    whole = {row["ann_id"]: row for row in _open(REAL, cache).train.rows}
    for row in sets.unlabeled.rows.select(range(10, 66)):
        theirs = whole[row["ann_id"]]
        assert all(row[key] == theirs[key] for key in ("file_name", "image_id", "box_xywh", "area"))
    assert coco.keypoints_of(sets.train.rows).any(axis=(1, 2)).all(), "those who keep them keep them"


@pytest.mark.parametrize("num", range(1, 21, 3))
def test_first_is_by_image_however_images_and_people_are_ordered(root: Path, cache: Path, num: int) -> None:
    tree = _tree(root / TRAIN)
    assert len(tree["images"]) < 20, "images of several people are cut through"
    for seed, key in enumerate(("images", "annotations")):
        np.random.default_rng(seed).shuffle(tree[key])
    (root / TRAIN).write_text(json.dumps(tree))
    expected = _labeled_ids(root / TRAIN, num)
    assert _ids(_open(root, cache, labels=num, unlabeled=False).train) == expected
    assert (expected == _labeled_ids(root / TRAIN)[:num]) is (num == 20)


@pytest.mark.parametrize("indent", [None, 1])
def test_images_are_found_wherever_they_stand_in_the_json(root: Path, cache: Path, indent: int | None) -> None:
    tree = _tree(root / TRAIN)
    tree["images"].reverse()
    noise = {"info": {"images": [1, '"images": [2]']}, "images ": "]}", "licenses": [], "year": 2017}
    for parts in (noise | tree, noise | {"annotations": tree["annotations"]} | tree, tree | noise):
        (root / TRAIN).write_text(json.dumps(parts, indent=indent, separators=(" ,", "  :")))
        assert _ids(_open(root, cache, labels=7, unlabeled=False).train) == _labeled_ids(root / TRAIN, 7)


def test_at_random_is_by_seed_and_in_the_order_of_the_json(drawn: Path, cache: Path) -> None:
    order = _labeled_ids(drawn / TRAIN)
    draws = [
        _ids(_open(drawn, cache, labels=8, labels_by="random", labels_seed=s, unlabeled=False).train) for s in (0, 0, 1)
    ]
    assert draws[0] == draws[1] != draws[2]
    for ids in draws:
        assert len(ids) == 8 and ids == [i for i in order if i in ids]
    assert order[:8] not in draws


@pytest.mark.parametrize(
    ("labels", "num"), [(1, 1), ("7", 7), ("5%", 1), ("12.5%", 2), (20, 20), ("100%", 20), (None, 20)]
)
def test_a_count_or_a_share(drawn: Path, cache: Path, labels: int | str | None, num: int) -> None:
    sets = _open(drawn, cache, labels=labels)
    assert sets.unlabeled is not None
    assert _ids(sets.train) == _labeled_ids(drawn / TRAIN)[:num]
    assert len(sets.unlabeled) == 8 + 20 - num
    assert len(_open(drawn, cache, labels=labels, unlabeled=False).train) == num
    assert len(sets.val) == 6


@pytest.mark.parametrize(
    "labels", [21, 0, -3, "0%", "101%", "100.1%", "-5%", "0.1%", "nan%", "inf%", "many", "%", "1e3", "5.5"]
)
def test_labels_that_cannot_be_are_one_line(drawn: Path, cache: Path, labels: int | str) -> None:
    _error(lambda: _open(drawn, cache, labels=labels, unlabeled=False), f"--data.labels {labels}:", "expected")


def test_more_labels_than_people_says_how_many_there_are(drawn: Path, cache: Path) -> None:
    _error(lambda: _open(drawn, cache, labels=21), "20 people with keypoints", drawn / TRAIN)


def test_small_people_are_withheld_and_join_no_pool(drawn: Path, cache: Path) -> None:
    boxes = {a["id"]: a["bbox"] for a in _tree(drawn / TRAIN)["annotations"]}
    side = float(np.median([min(box[2:]) for box in boxes.values()]))
    sets = _open(drawn, cache, labels=5, unlabelled_min_side=side)
    people = sets.unlabeled
    assert people is not None
    of_train = [i for i in _ids(people) if i in boxes]
    assert of_train == [i for i in _labeled_ids(drawn / TRAIN)[5:] if min(boxes[i][2:]) >= side]
    assert 0 < len(of_train) < 15
    num = 15 - len(of_train)
    small = f"people with withheld labels are left out: with a side below {side:g} px (--data.unlabelled_min_side)"
    assert f"{drawn / TRAIN}: {num} of its 15 {small}" in str(sets).splitlines()


def test_no_box_of_withheld_people_shows_their_keypoints(root: Path, cache: Path) -> None:
    """With boxes from keypoints theirs are the annotated ones; those without are left out, with a count."""
    tree = _tree(root / TRAIN)
    without = tree["annotations"][-1]
    del without["bbox"]
    (root / TRAIN).write_text(json.dumps(tree))
    boxes = {one["id"]: one["bbox"] for one in tree["annotations"][:-1]}
    sets = _open(root, cache, labels=5, boxes="keypoints", unlabelled_min_side=0)
    assert sets.unlabeled is not None
    theirs = {row["ann_id"]: row["box_xywh"] for row in sets.unlabeled.rows if row["ann_id"] in boxes}
    assert len(theirs) == 14 and without["id"] not in _ids(sets.unlabeled)
    assert all(theirs[number] == pytest.approx(boxes[number]) for number in theirs)
    assert any("1 people with withheld labels are left out" in line for line in sets.warnings)
    labeled = next(iter(sets.train.rows))
    assert labeled["box_xywh"] != pytest.approx(boxes[labeled["ann_id"]])


def test_batches_see_the_labeled_people_alone_and_pairs_the_withheld(drawn: Path, cache: Path) -> None:
    sets = _open(drawn, cache, labels=4)
    config = DataConfig(input_hw=(64, 48))
    plan = StageConfig(global_batch=4, teacher=TeacherConfig(cutout=1))
    augmenter = Augmenter(config=AugmentConfig(), skeleton=COCO17, input_hw=(64, 48))
    people = TrainingPeople(sets, augmenter, config, plan, seed=0, stage="ssl")
    samples = [people[Key(step, position, False)] for step in range(3) for position in range(4)]
    assert {int(s.ann_id) for s in samples if isinstance(s, Labeled)} == set(_labeled_ids(drawn / TRAIN)[:4])
    assert isinstance(people[Key(0, 0, True)], Pair)


def test_the_labeled_ids_are_written_with_their_rule(drawn: Path, cache: Path, tmp_path: Path) -> None:
    config = DataConfig(labels="25%", labels_by="random", labels_seed=3)
    train = _open(drawn, cache, labels="25%", labels_by="random", labels_seed=3, unlabeled=False).train
    run_folder.write_labeled_ids(tmp_path / "labelled_ann_ids.json", train, config)
    told = _tree(tmp_path / "labelled_ann_ids.json")
    images = {a["id"]: a["image_id"] for a in _tree(drawn / TRAIN)["annotations"]}
    assert told == {
        "labels": "25%",
        "labels_by": "random",
        "labels_seed": 3,
        "annotations": Path(TRAIN).name,
        "num_people": 5,
        "ann_ids": sorted(_ids(train)),
        "image_ids": sorted({images[i] for i in _ids(train)}),
    }


def test_text_ids_are_recorded_as_the_file_writes_them(
    root: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = _tree(root / TRAIN)
    for item in tree["images"]:
        item["id"] = f"image {item['id']:03}"
    for item in tree["annotations"]:
        item |= {"id": f"person {item['id']:05}", "image_id": f"image {item['image_id']:03}"}
    (root / TRAIN).write_text(json.dumps(tree))
    train, file = _open(root, cache, labels=5, unlabeled=False).train, tmp_path / "labelled_ann_ids.json"
    run_folder.write_labeled_ids(file, train, DataConfig(labels=5))
    record = _tree(file)
    texts = {one["id"]: one["image_id"] for one in tree["annotations"]}
    assert len(record["ann_ids"]) == 5 and set(record["ann_ids"]) <= set(texts)
    assert set(record["image_ids"]) == {texts[one] for one in record["ann_ids"]}
    capsys.readouterr()
    file.write_text(json.dumps(record | {"ann_ids": _ids(train)}))  # as earlier versions wrote them
    run_folder.write_labeled_ids(file, train, DataConfig(labels=5))
    assert capsys.readouterr().out == "" and _tree(file) == record


def _record(folder: Path, root: Path, cache: Path, **labels: Any) -> list[int]:
    """Write a run's record as train.py does; the ids of its labeled people."""
    train = _open(root, cache, **labels, unlabeled=False).train
    run_folder.write_labeled_ids(folder / "labelled_ann_ids.json", train, DataConfig(**labels))
    return sorted(_ids(train))


def test_labels_that_an_earlier_stage_saw_are_reported_and_its_record_is_kept(
    drawn: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    everybody = _record(tmp_path, drawn, cache)
    assert _record(tmp_path, drawn, cache) == everybody and capsys.readouterr().out == "", "the same people: no word"
    few = _record(tmp_path, drawn, cache, labels=5)
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and said.startswith(f"warning: {tmp_path / 'labelled_ann_ids.json'}: 20 people were ")
    for named in ("5 are now", "labelled_ann_ids.1.json", "15 people were labeled then", "withholds", "--output_dir"):
        assert named in said
    assert _record(tmp_path, drawn, cache) == everybody
    said = capsys.readouterr().out
    assert "5 people were labeled" in said and "20 are now" in said and "withholds" not in said, "nothing is withheld"
    kept = [_tree(tmp_path / f"labelled_ann_ids{number}.json")["ann_ids"] for number in ("", ".1", ".2")]
    assert kept == [everybody, everybody, few] and len(list(tmp_path.iterdir())) == 3


def test_as_many_other_people_are_reported_but_ids_of_another_json_are_not_compared(
    root: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    draws = [_record(folder, root, cache, labels=8, labels_by="random", labels_seed=seed) for seed in (0, 1)]
    assert f"{len(set(draws[0]) - set(draws[1]))} people were labeled then and are not now" in capsys.readouterr().out
    (root / "annotations" / "other.json").write_bytes((root / TRAIN).read_bytes())
    _record(folder, root, cache, labels=8, train_annotations="annotations/other.json")
    said = capsys.readouterr().out
    assert "8 people were labeled" in said and "8 are now" in said and "withholds" not in said


def test_people_left_out_with_a_broken_image_are_not_withheld(
    drawn: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _record(tmp_path, drawn, cache)
    train = _open(drawn, cache, unlabeled=False).train
    left = dataclasses.replace(train, rows=train.rows.select(range(19)), num_skipped=1)
    run_folder.write_labeled_ids(tmp_path / "labelled_ann_ids.json", left, DataConfig())
    said = capsys.readouterr().out
    assert "20 people were labeled" in said and "19 are now" in said and "withholds" not in said


def test_a_broken_record_is_named(drawn: Path, cache: Path, tmp_path: Path) -> None:
    (tmp_path / "labelled_ann_ids.json").write_text("{")
    _error(lambda: _record(tmp_path, drawn, cache), tmp_path / "labelled_ann_ids.json", "not JSON", "Move it away")


# ---- No validation image


@with_real_data
def test_real_people_leak_nothing(cache: Path) -> None:
    sets = _open(REAL, cache)
    assert sets.unlabeled is not None
    leakage.refuse_leaks(sets.val, sets.train, sets.unlabeled)


def _val_picture(root: Path) -> Path:
    return next(iter(sorted((root / "val2017").iterdir())))


def test_a_validation_image_under_another_name_is_found_by_its_bytes(root: Path, cache: Path) -> None:
    val, ours = _val_picture(root), sorted((root / "unlabeled2017").iterdir())[2]
    shutil.copyfile(val, ours)
    _error(lambda: _open(root, cache), ours, val, "1 such", "--data.val_images")
    assert len(_open(root, cache, unlabeled=False).train) == 20
    (root / BOXES).unlink()
    _error(lambda: _open(root, cache), ours, val)


def test_a_byte_more_or_less_is_another_image(root: Path, cache: Path) -> None:
    val, ours = _val_picture(root), sorted((root / "unlabeled2017").iterdir())[2]
    content = val.read_bytes()
    # The same size, and the same beginning: only the last look tells them apart.
    ours.write_bytes(content[:-40] + bytes([content[-40] ^ 1]) + content[-39:])
    assert len(_pool(root, cache)) == 8


def _same_id_and_name(root: Path, id_too: bool) -> tuple[Path, Path]:
    """An unlabeled image with a validation picture's name, other bytes, and its id or its own."""
    val = _val_picture(root)
    tree = _tree(root / BOXES)
    first = tree["images"][0]
    mine = (root / "unlabeled2017" / first["file_name"]).rename(root / "unlabeled2017" / val.name)
    new_id = int(val.stem) if id_too else first["id"]
    for person in tree["annotations"]:
        person["image_id"] = new_id if person["image_id"] == first["id"] else person["image_id"]
    first |= {"id": new_id, "file_name": val.name}
    (root / BOXES).write_text(json.dumps(tree))
    return mine, val


def _encode_anew(picture: Path, target: Path) -> None:
    image = cv2.imread(str(picture), cv2.IMREAD_COLOR)
    assert image is not None
    cv2.imwrite(str(target), image, [cv2.IMWRITE_JPEG_QUALITY, 60])


def test_the_same_id_and_name_of_other_images_are_a_numbering(root: Path, cache: Path) -> None:
    _same_id_and_name(root, id_too=True)
    assert len(_pool(root, cache)) == 8


def test_the_same_id_name_and_look_are_the_same_image_whatever_its_bytes(root: Path, cache: Path) -> None:
    mine, val = _same_id_and_name(root, id_too=True)
    _encode_anew(val, mine)
    assert mine.read_bytes() != val.read_bytes()
    _error(lambda: _open(root, cache), mine, val, "1 such")


def test_the_same_name_and_look_alone_are_not(root: Path, cache: Path) -> None:
    """Not looked at: it would take a comparison of all images with all."""
    mine, val = _same_id_and_name(root, id_too=False)
    _encode_anew(val, mine)
    assert len(_pool(root, cache)) == 8


@with_real_data
def test_photographs_look_like_themselves_alone(tmp_path: Path) -> None:
    pictures = sorted((REAL / "val2017").iterdir())[:12]
    for a in pictures:
        _encode_anew(a, tmp_path / a.name)
        assert [b for b in pictures if leakage._are_alike(tmp_path / a.name, b)] == [a]


def test_few_of_many_collisions_are_looked_at(root: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[Path] = []
    monkeypatch.setattr(leakage, "LOOKED_AT", 2)
    monkeypatch.setattr(leakage, "_are_alike", lambda path, other: bool(looked.append(path)))
    val = _open(root, cache, unlabeled=False).val
    copies = Path(shutil.copytree(root, root.with_name("copies")))
    for picture in (copies / "val2017").iterdir():
        picture.write_bytes(picture.read_bytes() + b"more")
    copied = dataclasses.replace(val, root=copies)
    assert leakage.find_leaks(leakage._image_ids_of(copied), leakage._image_ids_of(val)) == {}
    assert len(looked) == 2 < len(list((copies / "val2017").iterdir()))


def test_a_training_image_that_is_a_validation_image_is_refused(root: Path, cache: Path) -> None:
    ours = root / _open(root, cache, unlabeled=False).train.rows[4]["file_name"]
    shutil.copyfile(_val_picture(root), ours)
    _error(lambda: _open(root, cache), ours, _val_picture(root), "train")


def test_equal_files_are_found_among_many_of_equal_size(tmp_path: Path) -> None:
    """Against comparing all bytes of all pairs: equal sizes, equal beginnings, several copies, empty files."""
    rng = np.random.default_rng(0)
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        for i in range(40):
            start, end = rng.integers(0, 2, 2)
            content = bytes([start]) * leakage.HEAD_BYTES + bytes([end]) * int(rng.integers(0, 3))
            (tmp_path / folder / f"{i}").write_bytes(content if i else b"")
    ours, theirs = (sorted((tmp_path / folder).iterdir()) for folder in ("a", "b"))
    found = leakage.find_same_files(ours, theirs)
    expected = {a for a in ours if any(a.read_bytes() == b.read_bytes() for b in theirs)}
    assert set(found) == expected and 0 < len(expected) < 40
    assert all(a.read_bytes() == b.read_bytes() for a, b in found.items())
    assert leakage.find_same_files(ours, []) == leakage.find_same_files([], theirs) == {}


# ---- Where the pool comes from


def _detections(root: Path, **changes: Any) -> list[dict[str, Any]]:
    """The drawn boxes as a detector's results; the first one changed (what is None is taken out)."""
    boxes = _tree(root / BOXES)["annotations"]
    found = [{"image_id": b["image_id"], "bbox": b["bbox"], "score": 0.9, "category_id": 1} for b in boxes]
    found[0] = {k: v for k, v in (found[0] | changes).items() if v is not None}
    return found


def _give(root: Path, found: Any) -> dict[str, str]:
    (root / "detections.json").write_text(json.dumps(found))
    return {"unlabelled_annotations": "detections.json"}


def test_a_detectors_results_are_the_boxes_that_a_coco_json_gives(root: Path, cache: Path) -> None:
    by_boxes, by_detector = _pool(root, cache), _pool(root, cache, **_give(root, _detections(root)))
    for key in ("file_name", "image_id", "box_xywh"):
        assert list(by_boxes.rows[key]) == list(by_detector.rows[key])
    assert _ids(by_detector) == list(range(8)) and not coco.keypoints_of(by_detector.rows).any()


@pytest.mark.parametrize("change", [{"score": 0.49}, {"category_id": 18}, {"bbox": [5.0, 5.0, 0.0, 9.0]}])
def test_weak_detections_and_other_things_are_left_out(root: Path, cache: Path, change: dict[str, Any]) -> None:
    assert _ids(_pool(root, cache, **_give(root, _detections(root, **change)))) == list(range(1, 8))


def test_how_many_detections_are_left_out_is_said_by_cause(root: Path, cache: Path) -> None:
    found, rest = _detections(root), _detections(root)
    more = [rest[0] | {"category_id": number} for number in (18, 18, 2)] + [rest[0] | {"score": 0.1}]
    given = _give(root, [*found, *more, rest[0] | {"bbox": [5.0, 5.0, 0.0, 9.0]}])
    side = sorted(min(one["bbox"][2:]) for one in found)[1]
    expected = (
        f"{root / 'detections.json'}: 6 of its 13 detections are left out of the unlabeled people: "
        "3 of other categories (category_id 18, 2; expected 1), "
        "1 with a score below 0.5 (--data.unlabelled_min_score), 1 without a width or a height, "
        f"1 with a side below {side:g} px (--data.unlabelled_min_side)"
    )
    for _ in range(2):  # the second time of the cached table
        assert expected in str(_open(root, cache, **given, unlabelled_min_side=side)).splitlines()
    assert "unlabeled people:" not in str(_open(root, cache, **_give(root, found)))


def test_the_score_and_the_side_of_detections_are_knobs(root: Path, cache: Path) -> None:
    given = _give(root, _detections(root, score=0.49))
    assert len(_pool(root, cache, **given, unlabelled_min_score=0.4)) == 8
    assert _ids(_pool(root, cache, **_give(root, _detections(root, category_id=None)))) == list(range(8))
    side = max(min(d["bbox"][2:]) for d in _detections(root))
    assert len(_pool(root, cache, **given, unlabelled_min_side=side)) < 8
    _error(
        lambda: _open(root, cache, **given, unlabelled_min_side=side + 1), root / "detections.json", f"{side + 1:g} px"
    )


def test_detections_find_images_by_stem(root: Path, cache: Path) -> None:
    found = _detections(root)
    for picture in sorted((root / "unlabeled2017").iterdir()):
        picture.rename(picture.with_name(f"holiday {int(picture.stem)}.jpeg"))
    for thing in found:
        thing["image_id"] = f"holiday {thing['image_id']}"
    people = _pool(root, cache, **_give(root, found))
    assert [Path(name).stem for name in people.rows["file_name"]] == [thing["image_id"] for thing in found]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"bbox": None}, "'bbox'"),
        ({"score": None}, "'score'"),
        ({"image_id": None}, "'image_id'"),
        ({"bbox": [1, 2, 3]}, "4 numbers"),
        ({"image_id": 123456}, "000000123456.jpg"),
        ({"image_id": "nowhere"}, "nowhere.*"),
    ],
)
def test_a_broken_detection_is_named(root: Path, cache: Path, change: dict[str, Any], named: str) -> None:
    given = _give(root, _detections(root, **change))
    _error(lambda: _open(root, cache, **given), f"{root / 'detections.json'}: detection 0:", named)


def test_no_detection_at_all_is_named(root: Path, cache: Path) -> None:
    _error(lambda: _open(root, cache, **_give(root, [])), root / "detections.json", "no unlabeled person")
    (root / "detections.json").write_text("[{")
    _error(lambda: _open(root, cache, unlabelled_annotations="detections.json"), root / "detections.json", "not JSON")


def test_boxes_that_are_missing_are_named(root: Path, cache: Path) -> None:
    _error(lambda: _open(root, cache, unlabelled_annotations="absent.json"), root / "absent.json", "no such")
    tree = _tree(root / BOXES)
    del tree["annotations"][3]["bbox"]
    (root / BOXES).write_text(json.dumps(tree))
    sets = _open(root, cache)
    assert str(sets).splitlines() == [
        "people: 20 train, 6 val, 7 unlabeled",
        f"warning: {root / BOXES}: 1 annotations without a box of a width and a height are left out",
    ]


def test_a_folder_or_a_image_that_is_not_there_is_named(root: Path, cache: Path) -> None:
    _error(lambda: _open(root, cache, unlabelled_images="holidays"), "--data.unlabelled_images", root / "holidays")
    gone = next((root / "unlabeled2017").iterdir())
    gone.unlink()
    _error(lambda: _open(root, cache), root / BOXES, "annotation", gone, "not there")


def test_a_missing_image_of_a_withheld_person_names_the_json_of_that_person(root: Path, cache: Path) -> None:
    """The pool begins with the boxes' JSON, whose images are all there."""
    tree = _tree(root / TRAIN)
    person = tree["annotations"][-1]
    gone = root / "train2017" / next(i["file_name"] for i in tree["images"] if i["id"] == person["image_id"])
    gone.unlink()
    first = next(a["id"] for a in tree["annotations"] if a["image_id"] == person["image_id"])
    _error(lambda: _open(root, cache, labels=1), f"{root / TRAIN}: annotation {first}:", gone, "not there")


def test_a_corrupt_image_of_the_pool_is_named_or_left_out(
    root: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = root / _pool(root, cache).rows[0]["file_name"]
    bad.write_bytes(bad.read_bytes()[:900])
    _error(lambda: _open(root, cache), bad, "--data.on_bad_image skip")
    people = _pool(root, cache, on_bad_image="skip")
    assert len(people) + people.num_skipped == 8 and people.num_skipped > 0
    assert f"skipped: {bad} does not decode" in capsys.readouterr().out


def test_an_empty_pool_says_all_that_would_fill_it(root: Path, cache: Path) -> None:
    shutil.rmtree(root / "unlabeled2017")
    (root / BOXES).unlink()
    _error(
        lambda: _open(root, cache), root / "unlabeled2017", root / TRAIN, "--data.labels", "--data.unlabelled_images"
    )
    assert len(_pool(root, cache, labels="50%")) == 10


# ---- Boxes of another shape


def test_whole_images_beside_boxes_are_reported_once(root: Path, cache: Path) -> None:
    assert str(_open(root, cache)) == "people: 20 train, 6 val, 8 unlabeled"
    (root / BOXES).unlink()
    for picture in (root / "unlabeled2017").iterdir():
        cv2.imwrite(str(picture), cv2.resize(cv2.imread(str(picture)), (480, 160)))
    sets = _open(root, cache, labels=10)
    first, second = str(sets).splitlines()
    assert first == f"people: 10 train, 6 val, {len(list((root / 'unlabeled2017').iterdir())) + 10} unlabeled"
    start = f"warning: {root / 'unlabeled2017'}: unlabeled people are whole images: they are 100% of their image's side"
    assert second.startswith(start) and second.endswith(
        "Boxes of single people (--data.unlabelled_annotations) teach more"
    )


@pytest.mark.parametrize(
    ("wide", "high", "what", "advice"),
    [
        (2.0, 2.0, "% of their image's side in the median, labeled people ", "Make them as tight as the labeled ones"),
        (
            0.4,
            0.4,
            "% of their image's side in the median, labeled people ",
            "or leave small ones out by --data.unlabelled_min_side",
        ),
        (0.6, 1.5, "labeled people's ", "Make them around whole people, as the labeled ones"),
        (1.2, 1.2, "", ""),
    ],
)
def test_boxes_that_are_made_otherwise_are_reported_with_what_to_do(
    root: Path, cache: Path, wide: float, high: float, what: str, advice: str
) -> None:
    """In one line, which proposes no boxes to those who have some."""
    train, tree = _tree(root / TRAIN), _tree(root / BOXES)
    size_of = {image["id"]: (image["width"], image["height"]) for image in train["images"]}
    sides = [(np.prod(a["bbox"][2:]) / np.prod(size_of[a["image_id"]])) ** 0.5 for a in train["annotations"]]
    shapes = [a["bbox"][2] / a["bbox"][3] for a in train["annotations"]]
    images = {image["id"]: image for image in tree["images"]}
    for one in tree["annotations"]:
        image = images[one["image_id"]]
        side = np.median(sides) * (image["width"] * image["height"]) ** 0.5
        shape = np.median(shapes) ** 0.5
        one["bbox"] = [0.0, 0.0, wide * side * shape, high * side / shape]
    (root / BOXES).write_text(json.dumps(tree))
    lines = str(_open(root, cache)).splitlines()[1:]
    assert len(lines) == bool(what)
    for line in lines:
        assert (
            line.startswith(f"warning: {root / BOXES}: unlabeled boxes are not as the labeled ones: ") and what in line
        )
        assert line.endswith(advice) and "--data.unlabelled_annotations" not in line
