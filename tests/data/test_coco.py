"""COCO JSON to rows: against pycocotools on real and drawn people, the cache, and every way in which data is broken."""

import json
import os
import pickle
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import datasets
import numpy as np
import pytest
from pycocotools.coco import COCO

from sapiens_accel.data import people as coco
from sapiens_accel.data.people import People, Rows
from sapiens_accel.errors import UserError
from sapiens_accel.sources import images as photo
from sapiens_accel.sources import synthetic

K = 17
TRAIN = ("annotations/person_keypoints_train2017.json", "train2017")
VAL = ("annotations/person_keypoints_val2017.json", "val2017")
BOXES = ("annotations/person_boxes_unlabeled2017.json", "unlabeled2017")
REPOSITORY = Path(__file__).resolve().parents[2]
REAL = REPOSITORY / os.environ.get("SAPIENS_ACCEL_TEST_DATA", "../shared/data") / "coco_mini"
with_real_data = pytest.mark.skipif(not REAL.is_dir(), reason=f"no real images: {REAL} (SAPIENS_ACCEL_TEST_DATA)")
Tree = dict[str, Any]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic.write(tmp_path_factory.mktemp("coco") / "drawn", num_train=24, num_unlabelled=6, num_val=6)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def root(drawn: Path, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    return Path(shutil.copytree(drawn, tmp_path / "root"))


def _labeled(root: Path, cache: Path, source: tuple[str, str] = TRAIN) -> People:
    return coco.labeled_people(root, *source, K, cache)


def _tree(root: Path, source: tuple[str, str] = TRAIN) -> Tree:
    return json.loads((root / source[0]).read_text())


def _write(root: Path, tree: Any, source: tuple[str, str] = TRAIN) -> Path:
    (root / source[0]).write_text(tree if isinstance(tree, str) else json.dumps(tree))
    return root / source[0]


def _error(action: Callable[[], object], *named: object) -> None:
    """The action ends in a UserError of one line that names all of these."""
    with pytest.raises(UserError) as caught:
        action()
    text = str(caught.value)
    assert "\n" not in text
    assert [str(name) for name in named if str(name) not in text] == [], text


def _files(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of change of every file: equal if none was written again."""
    stats = {str(p.relative_to(folder)): p.stat() for p in folder.rglob("*") if p.is_file()}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in stats.items()}


# ---- Rows


@with_real_data
@pytest.mark.parametrize(("source", "num"), [(TRAIN, 86), (VAL, 68)])
def test_coco_mini_has_so_many_labeled_people(source: tuple[str, str], num: int, cache: Path) -> None:
    people = coco.check_people(_labeled(REAL, cache, source), "stop", "decode")
    assert len(people) == num
    _assert_rows_are_pycocotools(people, REAL, source)


def test_rows_of_drawn_people_are_what_pycocotools_reads(drawn: Path, cache: Path) -> None:
    people = _labeled(drawn, cache)
    assert len(people) == 24
    _assert_rows_are_pycocotools(people, drawn, TRAIN)


def _assert_rows_are_pycocotools(people: People, root: Path, source: tuple[str, str]) -> None:
    reference = COCO(str(root / source[0]))
    expected: Any = reference.loadAnns(reference.getAnnIds(iscrowd=False))
    expected = {a["id"]: a for a in expected if max(a["keypoints"][2::3]) > 0}
    rows = [people.rows[i] for i in range(len(people))]
    assert sorted(row["ann_id"] for row in rows) == sorted(expected)
    for i, row in enumerate(rows):
        theirs = expected[row["ann_id"]]
        picture: Any = reference.loadImgs(theirs["image_id"])[0]
        assert row["file_name"] == f"{source[1]}/{picture['file_name']}"
        assert row["image_id"] == theirs["image_id"]
        assert row["box_xywh"] == theirs["bbox"]
        assert row["area"] == theirs["area"]
        assert np.array_equal(np.array(row["keypoints"]), np.reshape(theirs["keypoints"], (K, 3)))
        # The columns as whole arrays say the same, in the same order; 1e-4: they pass through float32.
        columns = coco.keypoints_of(people.rows)[i].ravel(), coco.boxes_of(people.rows)[i]
        assert np.abs(np.concatenate(columns) - [*theirs["keypoints"], *theirs["bbox"]]).max() < 1e-4


def test_columns_lose_no_digit(drawn: Path, cache: Path) -> None:
    people = _labeled(drawn, cache)
    assert np.array_equal(coco.keypoints_of(people.rows), [np.array(row["keypoints"]) for row in people.rows])


@with_real_data
@pytest.mark.parametrize("min_side", [0.0, 12.0, 40.0, 64.0])
def test_unlabeled_people_of_coco_mini_are_no_crowds_and_not_too_small(min_side: float, cache: Path) -> None:
    people = coco.unlabeled_people(coco.PeopleFiles(REAL, *TRAIN, K, cache), min_side)
    unlabeled = [a for a in _tree(REAL)["annotations"] if not a["iscrowd"] and max(a["keypoints"][2::3]) == 0]
    expected = [a["id"] for a in unlabeled if min(a["bbox"][2:]) >= min_side]
    assert list(people.rows["ann_id"]) == expected
    assert len(expected) == 81 if min_side == 0.0 else len(expected) < 81
    assert not set(expected) & set(_labeled(REAL, cache).rows["ann_id"])


def test_crowds_empty_boxes_and_small_boxes_are_left_out(root: Path, cache: Path) -> None:
    tree = _tree(root)
    people = tree["annotations"]
    crowd, empty, large, small, labeled = people[:5]
    crowd["iscrowd"] = 1
    empty["bbox"][2] = 0.0
    empty["keypoints"] = [0] * 3 * K
    for person, sides in ((large, [40.0, 64.0]), (small, [300.0, 39.9])):
        person["keypoints"] = [0] * 3 * K
        person["bbox"][2:] = sides
    labeled["keypoints"] = [10.0, 20.0, 1] + [0] * 3 * (K - 1)  # one occluded keypoint is a label
    _write(root, tree)
    left = {person["id"] for person in (crowd, empty, large, small)}
    assert list(_labeled(root, cache).rows["ann_id"]) == [p["id"] for p in people if p["id"] not in left]
    unlabeled = coco.unlabeled_people(coco.PeopleFiles(root, *TRAIN, K, cache), 40.0)
    assert list(unlabeled.rows["ann_id"]) == [large["id"]]


def test_boxes_without_keypoints_are_unlabeled_people(drawn: Path, cache: Path) -> None:
    people = coco.unlabeled_people(coco.PeopleFiles(drawn, *BOXES, K, cache), 0.0)
    annotations = _tree(drawn, BOXES)["annotations"]
    assert not any("keypoints" in a for a in annotations)
    assert list(people.rows["ann_id"]) == [a["id"] for a in annotations]
    assert np.array_equal(coco.boxes_of(people.rows), [a["bbox"] for a in annotations])
    assert np.array_equal(coco.keypoints_of(people.rows), np.zeros((6, K, 3)))


def test_a_json_of_crowds_alone_has_nobody_whenever_it_is_read(root: Path, cache: Path) -> None:
    tree = _tree(root, BOXES)
    _write(root, tree | {"annotations": [a | {"iscrowd": 1} for a in tree["annotations"]]}, BOXES)
    for _ in range(2):
        people = coco.unlabeled_people(coco.PeopleFiles(root, *BOXES, K, cache), 0.0)
        assert len(people) == 0 and coco.keypoints_of(people.rows).shape == (0, K, 3)


def test_sources_are_joined_in_order(drawn: Path, cache: Path) -> None:
    first, second = _labeled(drawn, cache), coco.unlabeled_people(coco.PeopleFiles(drawn, *BOXES, K, cache), 0.0)
    joined = coco.join_people([first, second])
    assert len(joined) == 30
    assert list(joined.rows["ann_id"]) == [*first.rows["ann_id"], *second.rows["ann_id"]]
    assert all((joined.root / name).is_file() for name in joined.rows["file_name"])


def test_whole_images_are_boxes_of_their_own_size(tmp_path: Path, cache: Path) -> None:
    folder = tmp_path / "data" / "loose"
    folder.mkdir(parents=True)
    sizes = {"b.png": (30, 41), "a.JPG": (25, 33), "c.jpeg": (17, 19)}
    for name, hw in sizes.items():
        (folder / name).write_bytes(cv2.imencode(Path(name).suffix.lower(), np.full((*hw, 3), 90, np.uint8))[1])
    (folder / "notes.txt").write_text("not an image")
    people = coco.whole_images(tmp_path / "data", "loose", K, cache)
    assert list(people.rows["file_name"]) == ["loose/a.JPG", "loose/b.png", "loose/c.jpeg"]
    assert coco.boxes_of(people.rows).tolist() == [[0, 0, 33, 25], [0, 0, 41, 30], [0, 0, 19, 17]]
    assert list(people.rows["area"]) == [33 * 25, 41 * 30, 19 * 17]
    assert not coco.keypoints_of(people.rows).any()
    assert len(coco.check_people(people, "stop", "decode")) == 3
    (tmp_path / "data" / "empty").mkdir()
    _error(lambda: coco.whole_images(tmp_path / "data", "empty", K, cache), tmp_path / "data" / "empty", ".jpg")


@with_real_data
def test_whole_images_of_coco_mini(cache: Path) -> None:
    people = coco.whole_images(REAL, "unlabeled2017", K, cache)
    assert len(people) == 10
    for name, box in zip(people.rows["file_name"], coco.boxes_of(people.rows), strict=True):
        height, width = cv2.imread(str(REAL / name)).shape[:2]
        assert box.tolist() == [0, 0, width, height]


def test_images_are_read_as_rgb(tmp_path: Path) -> None:
    picture = np.arange(60, dtype=np.uint8).reshape(4, 5, 3)
    cv2.imwrite(str(tmp_path / "x.png"), picture[..., ::-1])
    assert np.array_equal(photo.read_image(tmp_path / "x.png"), picture)
    (tmp_path / "x.jpg").write_bytes(b"no image at all")
    _error(lambda: photo.read_image(tmp_path / "x.jpg"), tmp_path / "x.jpg")


def test_rows_one_by_one_are_the_tables(root: Path, cache: Path) -> None:
    """Whatever was selected and joined, and in another process."""
    rows = _labeled(root, cache).rows
    # Tables in several pieces: joined, and written a few rows at a time.
    pieces = datasets.concatenate_datasets([rows, rows.select([1, 0])])
    chosen = datasets.concatenate_datasets([pieces] * 3).select([5, 0, 3, 3, 1, 6])
    assert len(rows) >= 2
    for table in (rows, pieces, chosen, rows.select([])):
        found = Rows(table)
        assert len(found) == len(table)
        for those in (found, pickle.loads(pickle.dumps(found))):
            for index in range(len(table)):
                row = those[index]
                plain = {name: value.tolist() if hasattr(value, "tolist") else value for name, value in row.items()}
                assert plain == table[index]
                assert row["keypoints"].shape == (K, 3) and row["box_xywh"].dtype == np.float64


# ---- The cache


def test_a_table_is_made_once_for_each_content(root: Path, cache: Path) -> None:
    first = _labeled(root, cache)
    before = _files(cache)
    assert before
    (root / TRAIN[0]).touch()
    second = _labeled(root, cache)
    assert _files(cache) == before, "the second call reads what the first one wrote"
    assert second.rows.to_list() == first.rows.to_list()
    tree = _tree(root)
    tree["annotations"][0]["bbox"][0] += 1.0
    _write(root, tree)
    changed = _labeled(root, cache)
    after = _files(cache)
    assert {name: after[name] for name in before} == before, "the first table is still there"
    assert {name.split("/")[1] for name in after} > {name.split("/")[1] for name in before}
    assert np.array_equal(coco.boxes_of(changed.rows)[0] - coco.boxes_of(first.rows)[0], [1, 0, 0, 0])


def test_the_number_of_keypoints_and_what_is_asked_for_are_part_of_the_key(root: Path, cache: Path) -> None:
    assert len(coco.unlabeled_people(coco.PeopleFiles(root, *TRAIN, K, cache), 0.0)) == 0
    assert len(_labeled(root, cache)) == 24
    _error(lambda: coco.labeled_people(root, *TRAIN, 5, cache), root / TRAIN[0], "15", "51")


def test_a_moved_root_finds_its_table_and_its_images(root: Path, cache: Path, tmp_path: Path) -> None:
    _labeled(root, cache)
    before = _files(cache)
    moved = root.rename(tmp_path / "elsewhere")
    people = coco.check_people(_labeled(moved, cache), "stop", "decode")
    assert _files(cache) == before
    assert people.root == moved
    assert people.annotations == moved / TRAIN[0]
    assert all((people.root / name).is_file() for name in people.rows["file_name"])
    assert not any(str(tmp_path) in name for name in people.rows["file_name"])


def test_no_image_is_copied_into_the_cache(drawn: Path, cache: Path) -> None:
    _labeled(drawn, cache)
    coco.whole_images(drawn, "train2017", K, cache)
    contents = [path.read_bytes() for path in cache.rglob("*") if path.is_file()]
    pictures = [path.read_bytes() for path in (drawn / "train2017").iterdir()]
    # The body of an image, without the header that all JPEGs share, occurs nowhere.
    assert contents and not any(picture[700:900] in content for picture in pictures for content in contents)


# ---- Broken images


def test_a_missing_image_is_named_with_its_annotation_and_never_skipped(root: Path, cache: Path) -> None:
    people = _labeled(root, cache)
    row = people.rows[9]
    (root / row["file_name"]).unlink()
    first = next(a["id"] for a in _tree(root)["annotations"] if a["image_id"] == row["image_id"])
    for policy in ("stop", "skip"):
        named = (root / TRAIN[0], f"annotation {first}:", root / row["file_name"])
        _error(lambda policy=policy: coco.check_people(people, policy, "auto"), *named)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _garbage(path: Path) -> None:
    path.write_bytes(np.random.default_rng(0).bytes(path.stat().st_size))


def _emptied(path: Path) -> None:
    path.write_bytes(b"")


def _cut_png(path: Path) -> None:
    path.write_bytes(cv2.imencode(".png", cv2.imread(str(path)))[1].tobytes())
    _cut(path)


def _huge_png(path: Path) -> None:
    """A whole PNG whose header promises 3.6 thousand million pixels: OpenCV 5 raises where 4 gave nothing."""
    content = bytearray(cv2.imencode(".png", cv2.imread(str(path)))[1].tobytes())
    content[16:24] = struct.pack(">II", 60_000, 60_000)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    path.write_bytes(content)


@pytest.mark.parametrize("spoil", [_cut, _garbage, _emptied, _cut_png, _huge_png])
def test_a_image_that_does_not_decode_stops_or_is_skipped(
    root: Path, cache: Path, capsys: pytest.CaptureFixture[str], spoil: Callable[[Path], None]
) -> None:
    people = _labeled(root, cache)
    names = list(people.rows["file_name"])
    bad = next(name for name in names if names.count(name) > 1)
    spoil(root / bad)
    for check in ("auto", "decode"):
        _error(lambda check=check: coco.check_people(people, "stop", check), root / bad, "--data.on_bad_image skip")
    left = coco.check_people(people, "skip", "auto")
    assert left.num_skipped == names.count(bad) == len(people) - len(left)
    kept = [i for name, i in zip(names, people.rows["ann_id"], strict=True) if name != bad]
    assert list(left.rows["ann_id"]) == kept
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("skipped:")]
    too_large = "has more than 134,217,728 px (OPENCV_IO_MAX_IMAGE_PIXELS): 60000 x 60000"
    reason = too_large if spoil is _huge_png else "does not decode"
    assert said == [f"skipped: {root / bad} {reason}"]


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_a_small_file_of_billions_of_pixels_is_named_everywhere_before_it_is_decoded(
    root: Path, cache: Path, suffix: str
) -> None:
    """4.9 kB decode at an eighth, as images are checked, and need 12.9 GB as a whole, as evaluation wants them."""
    people = _labeled(root, cache)
    names = list(people.rows["file_name"])
    path = root / names[0]
    content = bytearray(cv2.imencode(suffix, np.zeros((16, 16, 3), np.uint8))[1].tobytes())
    side = struct.pack(">H", 65_500)
    if suffix == ".jpg":
        at = content.index(b"\xff\xc0") + 5
        content[at : at + 4] = side + side
    else:
        content[16:24] = (b"\0\0" + side) * 2
        content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    path.write_bytes(content)
    _error(lambda: coco.check_people(people, "stop", "decode"), path, "px", "134,217,728", "--data.on_bad_image skip")
    assert coco.check_people(people, "skip", "decode").num_skipped == names.count(names[0])
    for at_most in (1, 8):  # evaluation, training
        _error(lambda at_most=at_most: photo.read_reduced_image(path, at_most), path, "134,217,728")
    assert photo.whole_image(path) is None, "--images counts it among those that do not decode"


@pytest.mark.parametrize("spoil", [_cut, _emptied, _cut_png])
def test_a_cut_image_is_seen_by_its_ends_alone(root: Path, cache: Path, spoil: Callable[[Path], None]) -> None:
    people = _labeled(root, cache)
    spoil(root / people.rows[3]["file_name"])
    _error(lambda: coco.check_people(people, "stop", "ends"), root / people.rows[3]["file_name"])


@pytest.mark.parametrize("num_bytes", [1, 63, 64, 500])
def test_a_jpeg_with_bytes_after_its_end_is_whole(root: Path, cache: Path, num_bytes: int) -> None:
    people = _labeled(root, cache)
    path = root / people.rows[0]["file_name"]
    path.write_bytes(path.read_bytes() + b"\0" * num_bytes)
    for check in ("auto", "ends", "decode"):
        checked = coco.check_people(people, "stop", check)
        assert (len(checked), checked.num_skipped) == (24, 0)


def test_whole_images_pass_unchanged(drawn: Path, cache: Path) -> None:
    people = _labeled(drawn, cache)
    for check in ("auto", "ends", "decode"):
        assert coco.check_people(people, "stop", check) is people


# ---- Broken JSON


def _without_keypoints(tree: Tree) -> Tree:
    people = [{k: v for k, v in a.items() if k != "keypoints"} for a in tree["annotations"]]
    return tree | {"annotations": people}


def _without_labels(tree: Tree) -> Tree:
    return tree | {"annotations": [a | {"keypoints": [0] * 3 * K} for a in tree["annotations"]]}


def _third(tree: Tree, **changes: Any) -> Tree:
    """With another third annotation; what is None is taken out."""
    third = {k: v for k, v in (tree["annotations"][2] | changes).items() if v is not None}
    return tree | {"annotations": [*tree["annotations"][:2], third, *tree["annotations"][3:]]}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (_without_keypoints, ["'keypoints'"]),
        (_without_labels, ["24 of its 24", "v > 0"]),
        (lambda tree: tree | {"annotations": []}, []),
        (lambda tree: json.dumps(tree)[:-20], ["not JSON"]),
        (lambda tree: "", ["not JSON"]),
        (lambda tree: tree["annotations"], ["'images'"]),
        (lambda tree: {"images": tree["images"]}, ["'annotations'"]),
        (lambda tree: {"annotations": tree["annotations"]}, ["'images'"]),
        (lambda tree: _third(tree, keypoints=[1.0] * 50), ["annotation 3:", "51", "50"]),
        (lambda tree: _third(tree, keypoints=[1.0] * 52), ["annotation 3:", "51", "52"]),
        (lambda tree: _third(tree, bbox=7.0), ["annotation 3:", "'bbox'"]),
        (lambda tree: _third(tree, bbox=[1.0, 2.0, 3.0]), ["annotation 3:", "'bbox'"]),
        (lambda tree: _third(tree, image_id=777), ["annotation 3:", "777"]),
    ],
)  # fmt: skip
def test_a_broken_json_is_named(root: Path, cache: Path, change: Callable[[Tree], Any], named: list[str]) -> None:
    file = _write(root, change(_tree(root)))
    _error(lambda: _labeled(root, cache), file, *named)
    is_read = change is _without_labels or not named  # nobody is labeled, or nobody is there: refused once it is read
    assert not _files(cache) or is_read, "no table is left of a file that cannot be read"


def test_bytes_that_are_no_text_are_no_json(root: Path, cache: Path) -> None:
    (root / TRAIN[0]).write_bytes(b"\x93NUMPY\x01\x00\xff\xfe")
    _error(lambda: _labeled(root, cache), root / TRAIN[0], "not JSON")


def test_a_missing_json_is_named(root: Path, cache: Path) -> None:
    (root / TRAIN[0]).unlink()
    _error(lambda: _labeled(root, cache), root / TRAIN[0], "--data.root")


# ---- Odd files


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"id": ["id"]}, id="id a list"),
        pytest.param({"bbox": ["1", "2", "3", "4"]}, id="bbox of words"),
        pytest.param({"keypoints": 5}, id="keypoints a number"),
        pytest.param({"keypoints": ["x"] * 51}, id="keypoints of words"),
    ],
)
def test_an_annotation_of_odd_types_is_named(root: Path, cache: Path, change: dict[str, Any]) -> None:
    file = _write(root, _third(_tree(root), **change))
    _error(lambda: _labeled(root, cache), file)


def test_a_cut_jpeg_with_a_thumbnail_is_seen(root: Path, cache: Path) -> None:
    people = _labeled(root, cache)
    path = root / people.rows[0]["file_name"]
    whole = path.read_bytes()
    thumbnail = cv2.imencode(".jpg", cv2.resize(cv2.imread(str(path)), (160, 120)))[1].tobytes()
    header = b"\xff\xe1" + (len(thumbnail) + 8).to_bytes(2, "big") + b"Exif\0\0" + thumbnail
    path.write_bytes(whole[:2] + header + whole[2:])
    assert len(coco.check_people(people, "stop", "auto")) == 24
    path.write_bytes(path.read_bytes()[: int(1.6 * len(header))])
    _error(lambda: coco.check_people(people, "stop", "auto"), path)


def test_a_broken_whole_image_can_be_skipped(root: Path, cache: Path) -> None:
    pictures = sorted((root / "unlabeled2017").iterdir())
    _emptied(pictures[1])
    people = coco.check_people(coco.whole_images(root, "unlabeled2017", K, cache), "skip", "auto")
    assert (len(people), people.num_skipped) == (len(pictures) - 1, 1)


def test_a_image_that_was_replaced_has_its_new_size(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "loose").mkdir()
    for hw in ((20, 30), (50, 40)):
        cv2.imwrite(str(tmp_path / "loose" / "a.png"), np.zeros((*hw, 3), np.uint8))
        boxes = coco.boxes_of(coco.whole_images(tmp_path, "loose", K, cache).rows)
        assert boxes.tolist() == [[0, 0, hw[1], hw[0]]]
