"""What happens with broken and odd files: each has the outcome written beside it, none is a traceback.

refused   one line that names file and culprit, exit code 2; the doctor names it too, with everything else
image   named and refused; with --data.on_bad_image skip named and left out
left out  its person is not learned from; the doctor says who
warned    taken as it is; the doctor names it
read      taken, and right
"""

import dataclasses
import importlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import forks
import numpy as np
import pytest
from PIL import Image

from sapiens_accel.config.schema import Config, DataConfig
from sapiens_accel.data import build, detections
from sapiens_accel.data import dataset as data
from sapiens_accel.data import people as coco
from sapiens_accel.doctor import report as doctor
from sapiens_accel.errors import UserError
from sapiens_accel.pose.skeleton import COCO17
from sapiens_accel.sources import images as photo
from sapiens_accel.sources import synthetic

REPOSITORY = Path(__file__).resolve().parents[2]
TRAIN = "annotations/person_keypoints_train2017.json"
NUM = 6
Tree = dict[str, Any]
INF, NAN = float("inf"), float("nan")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("broken")
    counts = {"num_train": NUM, "num_unlabelled": 2, "num_val": 3}
    return synthetic.write(folder / "drawn", **counts, image_hw=(160, 240))


@pytest.fixture
def root(drawn: Path, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    return Path(shutil.copytree(drawn, tmp_path / "root"))


@pytest.fixture
def run(root: Path, drawn: Path) -> Config:
    return Config(data=DataConfig(root=str(root), cache_dir=str(drawn.parent / "cache"), num_workers=0))


def _open(run: Config, **changes: Any) -> data.Sets:
    return build.open_people(dataclasses.replace(run.data, **changes), COCO17, unlabeled=False)


def _refused(run: Config, *named: str, **changes: Any) -> None:
    with pytest.raises(UserError) as caught:
        _open(run, **changes)
    text = str(caught.value)
    assert len(text.splitlines()) == 1 and len(text) < 700, text
    assert [name for name in named if name not in text] == [], text


def _told(run: Config, level: str, name: str) -> None:
    """The doctor has a finding of this level that names it."""
    report, _, _ = doctor.check_data(run)
    found = [" ".join([f.text, *f.culprits]) for f in report.findings if f.level == level]
    assert any(name in text for text in found), report.findings
    json.dumps(report.as_json())


# ---- JSON


def _person(**changes: Any) -> Callable[[Tree], Tree]:
    """Another third annotation."""
    return lambda t: t | {"annotations": [a | changes if i == 2 else a for i, a in enumerate(t["annotations"])]}


def _picture(**changes: Any) -> Callable[[Tree], Tree]:
    """Another second image."""
    return lambda t: t | {"images": [a | changes if i == 1 else a for i, a in enumerate(t["images"])]}


def _without(key: str, name: str) -> Callable[[Tree], Tree]:
    return lambda t: t | {key: [{k: v for k, v in a.items() if k != name} for a in t[key]]}


def _point(place: int, value: Any) -> Callable[[Tree], Tree]:
    """One keypoint number of the third annotation."""

    def change(t: Tree) -> Tree:
        numbers = t["annotations"][2]["keypoints"]
        return _person(keypoints=[*numbers[:place], value, *numbers[place + 1 :]])(t)

    return change


FILES = {
    "empty file": (b"", "not JSON"),
    "UTF-16": ("{}".encode("utf-16"), "not JSON"),
    "nested 100,000 deep": (b'{"images": ' + b"[" * 100_000, "not JSON"),
    "gzip": (b"\x1f\x8b\x08\0\0\0\0\0", "not JSON"),
    "a number": (b"7", "'images'"),
    "a list": (b"[]", "'images'"),
    "images null": (b'{"images": null, "annotations": []}', "'images'"),
    "annotations an object": (b'{"images": [], "annotations": {}}', "'annotations'"),
    "a number of 5,000 digits": (b'{"images": [], "annotations": [' + b"9" * 5000 + b"]}", "not JSON"),
}
LONG = "x" * 300 + ".jpg"
REFUSED: dict[str, tuple[Callable[[Tree], Tree], str]] = {
    "an annotation null": (lambda t: t | {"annotations": [None, *t["annotations"]]}, "None"),
    "an annotation of text": (lambda t: t | {"annotations": ["a", *t["annotations"]]}, "'a'"),
    "no file_name": (_without("images", "file_name"), "file_name"),
    "file_name a number": (_picture(file_name=5), "found 5"),
    "file_name empty": (_picture(file_name=""), "id 2"),
    "file_name a dot": (_picture(file_name="."), "'.'"),
    "file_name of two lines": (_picture(file_name="a\nb.jpg"), "a\\nb.jpg"),
    "file_name with a zero byte": (_picture(file_name="a\0.jpg"), "a\\x00.jpg"),
    "file_name with half a character": (_picture(file_name="a\ud800.jpg"), "a\\ud800.jpg"),
    "file_name up": (_picture(file_name="../outside/secret.jpg"), "../outside/secret.jpg"),
    "file_name up further on": (_picture(file_name="a/../../../outside/secret.jpg"), "outside/secret.jpg"),
    "file_name absolute": (_picture(file_name="/etc/passwd"), "/etc/passwd"),
    "file_name too long": (_picture(file_name=LONG), "is not there"),
    "file_name of a long folder": (_picture(file_name=f"{LONG}/a.jpg"), "is not there"),
    "image id a list": (_picture(id=[1]), "[1]"),
    "image id of two images": (_picture(id=1), "two images"),
    "image id of 70 bits": (
        lambda t: json.loads(json.dumps(t).replace('"id": 2, "file', f'"id": {2**70}, "file').replace(
            '"image_id": 2,', f'"image_id": {2**70},')), "64 bits"),
    "its image not listed": (_person(image_id=777), "777"),
    "image_id a list": (_person(image_id=[1]), "annotation 3"),
    "id of 70 bits": (_person(id=2**70), "64 bits"),
    "id of 4,000 digits": (_person(id=10**4000), "64 bits"),
    "id a fraction": (_person(id=2.5), "2.5"),
    "id NaN": (_person(id=NAN), "nan"),
    "id infinite": (_person(id=INF), "inf"),
    "v of 7": (_point(2, 7), "found 7"),
    "bbox with NaN": (_person(bbox=[NAN, 1, 9, 9]), "annotation 3"),
    "bbox infinite": (_person(bbox=[1, 1, INF, 9]), "annotation 3"),
    "bbox beyond any image": (_person(bbox=[1, 1, 1e300, 1e300]), "annotation 3"),
    "bbox of text": (_person(bbox=["1", "1", "9", "9"]), "annotation 3"),
    "bbox a number": (_person(bbox=7), "annotation 3"),
    "bbox an object": (_person(bbox={"x": 1}), "annotation 3"),
    "area NaN": (_person(area=NAN), "'area'"),
    "area negative": (_person(area=-4), "'area'"),
    "area of text": (_person(area="12"), "'area'"),
    "area a list": (_person(area=[4]), "'area'"),
    "keypoints with NaN": (_point(0, NAN), "annotation 3"),
    "keypoints beyond any image": (_point(1, -1e12), "annotation 3"),
    "keypoints with 10^400": (_point(0, 10**400), "annotation 3"),
    "keypoints of text": (_point(2, "2"), "annotation 3"),
    "keypoints in threes": (_person(keypoints=[[1, 2, 2]] * 17), "annotation 3"),
    "iscrowd of text": (_person(iscrowd="0"), "'iscrowd'"),
    "categories of text": (lambda t: t | {"categories": "person"}, "categories"),
    "categories of numbers": (lambda t: t | {"categories": [1]}, "categories"),
    "two categories of one id": (
        lambda t: t | {"categories": [*t["categories"], t["categories"][0] | {"name": "dog"}]},
        "id 1 is of two categories, 'person' and 'dog'",
    ),
    "v of 3, as AI Challenger writes": (_point(2, 3), "AI Challenger"),
    "a box outside of the image": (_person(bbox=[900, 20, 30, 40]), "annotation 3"),
    "keypoints of false": (_person(keypoints=False), "annotation 3"),
}  # fmt: skip
LEFT_OUT: dict[str, tuple[Callable[[Tree], Tree], str]] = {
    "box of no width, no keypoint": (_person(bbox=[5, 5, 0, 9], keypoints=[0] * 51, num_keypoints=0), "annotation 3"),
    "no box, no keypoint": (_person(bbox=None, keypoints=[0] * 51, num_keypoints=0), "annotation 3"),
    "a crowd": (_person(iscrowd=1), "annotation 3"),
    "another kind of thing": (_person(category_id=2), "annotation 3"),
}
WARNED: dict[str, tuple[Callable[[Tree], Tree], str, str]] = {
    "an id of two annotations": (_person(id=1), "warning", "annotation 1 "),
    "keypoints outside of the image": (_point(0, 5000.0), "warning", "annotation 3"),
    "v=0 with coordinates": (_point(2, 0), "warning", "annotation 3"),
    "box of no width": (_person(bbox=[5, 5, 0, 9]), "warning", "annotation 3"),
    "box of negative size": (_person(bbox=[50, 50, -20, -30]), "warning", "annotation 3"),
    "bbox null": (_person(bbox=None), "warning", "annotation 3"),
    "area 0": (_person(area=0), "warning", "annotation 3"),
    "num_keypoints that is not so": (_person(num_keypoints=3), "warning", "annotation 3"),
    "another size in the JSON": (_picture(width=480, height=320), "error", "000000000002.jpg"),
}  # fmt: skip
READ: dict[str, Callable[[Tree], Tree]] = {
    "categories null": lambda t: t | {"categories": None},
    "no categories": lambda t: {k: v for k, v in t.items() if k != "categories"},
    "sizes of text": _picture(width="wide"),
    "no sizes": _without("images", "width"),
    "ids as text": lambda t: t | {"annotations": [a | {"id": str(a["id"])} for a in t["annotations"]]},
    "ids as 5.0": lambda t: t | {"annotations": [a | {"id": float(a["id"])} for a in t["annotations"]]},
    "unknown keys": _person(segmentation=[[[{}]]], note=None),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_is_no_annotation_file_is_refused(run: Config, root: Path, case: str) -> None:
    content, named = FILES[case]
    (root / TRAIN).write_bytes(content)
    _refused(run, str(root / TRAIN), named)
    _told(run, "error", named)


@pytest.mark.parametrize("case", REFUSED)
def test_a_broken_annotation_file_is_refused(run: Config, root: Path, case: str) -> None:
    change, named = REFUSED[case]
    (root / TRAIN).write_text(json.dumps(change(json.loads((root / TRAIN).read_text()))))
    _refused(run, str(root / TRAIN), named)
    _told(run, "error", named if "not there" not in named else LONG)


@pytest.mark.parametrize("case", LEFT_OUT)
def test_who_is_left_out_is_named_by_the_doctor(run: Config, root: Path, case: str) -> None:
    change, named = LEFT_OUT[case]
    (root / TRAIN).write_text(json.dumps(change(json.loads((root / TRAIN).read_text()))))
    assert list(_open(run).train.rows["ann_id"]) == [1, 2, 4, 5, 6]
    report, _, _ = doctor.check_data(run)
    assert [f.check for f in report.findings if named in f.culprits] != []
    assert report.count("error") == 0


@pytest.mark.parametrize("case", WARNED)
def test_what_is_taken_as_it_is_is_named_by_the_doctor(run: Config, root: Path, case: str) -> None:
    change, level, named = WARNED[case]
    (root / TRAIN).write_text(json.dumps(change(json.loads((root / TRAIN).read_text()))))
    assert len(_open(run).train) == NUM
    _told(run, level, named)


@pytest.mark.parametrize("case", READ)
def test_an_odd_annotation_file_is_read(run: Config, root: Path, case: str) -> None:
    before = _open(run).train.rows.remove_columns("size_wh").to_list()
    tree = READ[case](json.loads((root / TRAIN).read_text()))
    (root / TRAIN).write_text(json.dumps(tree), encoding="utf-8-sig")  # with a byte order mark
    assert _open(run).train.rows.remove_columns("size_wh").to_list() == before
    assert doctor.check_data(run)[0].count("error") == 0


def test_an_area_of_null_is_a_missing_one(run: Config, root: Path) -> None:
    tree = json.loads((root / TRAIN).read_text())
    (root / TRAIN).write_text(json.dumps(_without("annotations", "area")(tree)))
    without = _open(run).train.rows.to_list()
    (root / TRAIN).write_text(json.dumps(tree | {"annotations": [a | {"area": None} for a in tree["annotations"]]}))
    assert _open(run).train.rows.to_list() == without
    assert doctor.check_data(run)[0].count("error") == 0


def test_areas_of_another_unit_and_crowds_are_reported_before_training(run: Config, root: Path) -> None:
    val = root / TRAIN.replace("train", "val")
    tree = json.loads(val.read_text())
    said: list[str] = []
    doctor.check_evaluation(lambda line: said.append(str(line)), _open(run), run)
    assert not [line for line in said if "warning" in line]
    for one in tree["annotations"]:
        one["area"] /= 240 * 160
    val.write_text(json.dumps(tree))
    one_person = dataclasses.replace(run, eval=dataclasses.replace(run.eval, max_people=1))
    doctor.check_evaluation(lambda line: said.append(str(line)), _open(run), one_person)
    assert [line for line in said if "in the median" in line and "--eval.area box" in line]
    people = [one["image_id"] for one in tree["annotations"]]
    assert bool([line for line in said if "--eval.max_people" in line]) == (len(set(people)) < len(people))


def test_validation_images_among_those_of_training_are_a_warning_of_the_run(run: Config, root: Path) -> None:
    assert not [line for line in _open(run).warnings if "validation images" in line]
    data = dataclasses.replace(run.data, val_annotations=TRAIN, val_images="train2017")
    (line,) = [line for line in _open(dataclasses.replace(run, data=data)).warnings if "validation images" in line]
    assert line.startswith("warning: ") and "train2017" in line


def test_a_refused_image_is_one_error_not_one_of_each_annotation_as_well(run: Config, root: Path) -> None:
    for change in ({"file_name": "/etc/passwd"}, {"id": True}):
        tree = json.loads((root / TRAIN).read_text())
        first = tree["images"][1]["id"]
        tree["images"][1] |= change
        for one in tree["annotations"]:
            if one["image_id"] == first:
                one["image_id"] = change.get("id", first)
        (root / "annotations/other.json").write_text(json.dumps(tree))
        other = dataclasses.replace(run, data=dataclasses.replace(run.data, train_annotations="annotations/other.json"))
        report, _, _ = doctor.check_data(other)
        found = [f.check for f in report.findings if f.level == "error"]
        assert "train/images" in found and "train/annotations" not in found


def test_annotations_without_ids_are_numbered(run: Config, root: Path) -> None:
    tree = json.loads((root / TRAIN).read_text())
    (root / TRAIN).write_text(json.dumps(_without("annotations", "id")(tree)))
    assert _open(run).train.rows["ann_id"][:] == list(range(NUM))
    del tree["annotations"][2]["id"]
    (root / TRAIN).write_text(json.dumps(tree))
    assert _open(run).train.rows["ann_id"][:] == [1, 2, NUM + 1, *range(4, NUM + 1)]
    assert doctor.check_data(run)[0].count("error") == 0


def test_nothing_outside_of_the_root_is_opened(run: Config, root: Path, drawn: Path) -> None:
    outside = root.parent / "outside"
    outside.mkdir()
    shutil.copy(next((drawn / "train2017").iterdir()), outside / "secret.jpg")
    opened: list[str] = []
    watching = [True]
    sys.addaudithook(lambda event, words: opened.append(str(words[0])) if watching and event in EVENTS else None)
    try:
        for name in ("../../outside/secret.jpg", f"{outside}/secret.jpg", "../train2017/../../outside/secret.jpg"):
            tree = _picture(file_name=name)(json.loads((drawn / TRAIN).read_text()))
            (root / TRAIN).write_text(json.dumps(tree))
            _refused(run, "leads out")
            _told(run, "error", "leads out")
    finally:
        watching.clear()
    assert any(str(root) in path for path in opened), "what is opened is seen"
    assert not [path for path in opened if str(outside) in path or "secret" in path]


EVENTS = ("open", "os.listdir", "os.scandir")


# ---- Images


def _whole(root: Path) -> Path:
    return root / "train2017" / "000000000002.jpg"


def _rgb(path: Path) -> np.ndarray:
    return np.array(Image.open(path).convert("RGB"))


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _cut_png(path: Path) -> None:
    Image.open(path).save(path, "PNG")
    _cut(path)


def _instead(action: Callable[[Path], object]) -> Callable[[Path], None]:
    return lambda path: (path.unlink(), action(path))[1]


def _huge(side: int) -> Callable[[Path], None]:
    # One bit a pixel: the file is small and quickly written, its colors take 3 bytes a pixel.
    return lambda path: Image.new("1", (side, side)).save(path, "PNG")


PICTURES: dict[str, Callable[[Path], object]] = {
    "cut JPEG": _cut,
    "cut PNG": _cut_png,
    "0 bytes": lambda path: path.write_bytes(b""),
    "1 byte": lambda path: path.write_bytes(b"\xff"),
    "noise": lambda path: path.write_bytes(np.random.default_rng(0).bytes(5000)),
    "a web page": lambda path: path.write_text("<html>404</html>" * 50),
    "a JPEG's header alone": lambda path: path.write_bytes(path.read_bytes()[:300] + b"\xff\xd9"),
    "a folder": _instead(Path.mkdir),
    "a named pipe": _instead(os.mkfifo),
    "a link to nothing": _instead(lambda path: path.symlink_to("nowhere.jpg")),
    "a link to itself": _instead(lambda path: path.symlink_to(path.name)),
    "144 megapixels": _huge(12_000),
}


@pytest.mark.parametrize("case", PICTURES)
def test_a_image_that_cannot_be_read_is_named_and_can_be_skipped(
    run: Config, root: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    PICTURES[case](_whole(root))
    gone = [a["id"] for a in json.loads((root / TRAIN).read_text())["annotations"] if a["image_id"] == 2]
    _refused(run, str(_whole(root)))
    _told(run, "error", "train2017/000000000002.jpg")
    sets = _open(run, on_bad_image="skip")
    assert [i for i in range(1, NUM + 1) if i not in sets.train.rows["ann_id"]] == gone != []
    reason = "has more than 134,217,728 px" if case == "144 megapixels" else "does not decode"
    assert f"skipped: {_whole(root)} {reason}" in capsys.readouterr().out


def test_a_image_that_is_not_there_is_refused_even_with_skip(run: Config, root: Path) -> None:
    _whole(root).unlink()
    for policy in ("stop", "skip"):
        _refused(run, str(_whole(root)), "annotation", on_bad_image=policy)
    _told(run, "error", "train2017/000000000002.jpg")


KINDS: dict[str, tuple[str, Callable[[Image.Image, Path], object]]] = {
    "gray JPEG": ("L", lambda i, path: i.save(path, "JPEG", quality=95)),
    "gray PNG": ("L", lambda i, path: i.save(path, "PNG")),
    "gray and alpha": ("L", lambda i, path: i.convert("LA").save(path, "PNG")),
    "alpha": ("RGB", lambda i, path: i.convert("RGBA").save(path, "PNG")),
    "palette": ("P", lambda i, path: i.save(path, "PNG")),
    "CMYK": ("CMYK", lambda i, path: i.save(path, "JPEG", quality=95)),
    "progressive": ("RGB", lambda i, path: i.save(path, "JPEG", progressive=True, quality=95)),
    "BMP": ("RGB", lambda i, path: i.save(path, "BMP")),
    "TIFF": ("RGB", lambda i, path: i.save(path, "TIFF")),
    "WebP": ("RGB", lambda i, path: i.save(path, "WEBP", lossless=True)),
    "animated WebP": ("RGB", lambda i, path: _animated(i, path, "WEBP", lossless=True)),
    "animated PNG": ("RGB", lambda i, path: _animated(i, path, "PNG")),
    "16 bits": ("RGB", lambda i, path: path.write_bytes(_deep(i))),
}


def _animated(image: Image.Image, path: Path, kind: str, **options: Any) -> None:
    inverse = Image.fromarray(255 - np.array(image))
    image.save(path, kind, save_all=True, append_images=[inverse], duration=100, **options)


def _deep(image: Image.Image) -> bytes:
    return cv2.imencode(".png", np.array(image)[..., ::-1].astype(np.uint16) * 257)[1].tobytes()


@pytest.mark.parametrize("case", KINDS)
def test_every_kind_of_image_is_read_as_8_bit_colors(run: Config, root: Path, case: str) -> None:
    mode, save = KINDS[case]
    path = _whole(root)
    image = Image.open(path).convert(mode)
    save(image, path)  # the name still ends in .jpg: what counts is the content
    expected = np.array(image.convert("RGB")).astype(int)
    assert len(_open(run).train) == NUM
    found = photo.read_image(path)
    assert found.dtype == np.uint8 and found.shape == (160, 240, 3)
    assert np.abs(found - expected).mean() < 4, "JPEG loses as much of the drawings' noise"
    assert doctor.check_data(run)[0].count("error") == 0


@pytest.mark.parametrize("name", ["Zoë 人物.jpg", "a b (1) %20#?.jpg", "🤸.JPG", "sub folder/c.jpg"])
def test_any_name_is_read(run: Config, root: Path, name: str) -> None:
    (root / "train2017" / name).parent.mkdir(exist_ok=True)
    _whole(root).rename(root / "train2017" / name)
    (root / TRAIN).write_text(json.dumps(_picture(file_name=name)(json.loads((root / TRAIN).read_text()))))
    sets = _open(run)
    assert len(sets.train) == NUM and f"train2017/{name}" in sets.train.rows["file_name"]
    assert doctor.check_data(run)[0].count("error") == 0


def test_links_that_the_user_made_may_lead_out_of_the_root(run: Config, root: Path) -> None:
    """Data disks are joined to a root by links; only names in a JSON may not lead out."""
    (root / "train2017").rename(root.parent / "disk")
    (root / "train2017").symlink_to(root.parent / "disk")
    single = root.parent / "disk" / "000000000001.jpg"
    single.rename(root.parent / "elsewhere.jpg")
    single.symlink_to(root.parent / "elsewhere.jpg")
    assert len(_open(run).train) == NUM
    assert doctor.check_data(run)[0].count("error") == 0


def test_a_image_that_its_exif_turns_is_read_so_and_reported_if_its_labels_are_not(run: Config, root: Path) -> None:
    path = _whole(root)
    upright = _rgb(path).astype(int)
    exif = Image.Exif()
    exif[0x112] = 6  # to be shown turned by 90 degrees, clockwise
    Image.open(path).save(path, "JPEG", exif=exif, quality=95)
    found = photo.read_image(path)
    assert found.shape == (240, 160, 3)
    assert np.abs(found - np.rot90(upright, -1)).mean() < 4
    assert len(_open(run).train) == NUM
    _told(run, "error", "train2017/000000000002.jpg: 240 x 160 in the JSON, about 160 x 240 as read")
    (root / TRAIN).write_text(json.dumps(_picture(width=160, height=240)(json.loads((root / TRAIN).read_text()))))
    report, _, _ = doctor.check_data(run)
    assert not [f for f in report.findings if f.check == "train/size"], "labeled as it is shown"


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_images_of_another_size_than_the_json_says_are_refused_by_the_run_as_well(
    run: Config, root: Path, scale: float
) -> None:
    tree = json.loads((root / TRAIN).read_text())
    for image in tree["images"]:
        image["width"], image["height"] = int(scale * image["width"]), int(scale * image["height"])
    tree["images"][0]["width"] += 8
    (root / TRAIN).write_text(json.dumps(tree))
    if scale == 1:
        (line,) = [line for line in _open(run).warnings if "another size" in line]
        assert line.startswith("warning: ") and "1 images have another size" in line
        return
    with pytest.raises(
        UserError, match=r"of (\d+) images \1 images have another size than the JSON says .* x 640 in the JSON"
    ):
        _open(run)


def test_100_megapixels_are_read(run: Config, root: Path) -> None:
    _huge(10_000)(_whole(root))
    assert len(_open(run).train) == NUM


# ---- Other files


def test_a_name_that_is_no_text_is_refused_in_a_folder_of_images(root: Path, tmp_path: Path) -> None:
    (root / "unlabeled2017" / os.fsdecode(b"caf\xe9.jpg")).write_bytes(b"")
    with pytest.raises(UserError, match=r"caf\\udce9\.jpg"):
        coco.whole_images(root, "unlabeled2017", 17, tmp_path / "cache")


def test_a_link_to_nothing_among_whole_images_is_named(root: Path, tmp_path: Path) -> None:
    (root / "unlabeled2017" / "gone.jpg").symlink_to("nowhere.jpg")
    os.mkfifo(root / "unlabeled2017" / "pipe.jpg")  # to open it would wait for ever
    people = coco.whole_images(root, "unlabeled2017", 17, tmp_path / "cache")
    with pytest.raises(UserError, match=r"gone\.jpg"):
        coco.check_people(people, "stop", "auto")


@pytest.mark.parametrize(
    ("change", "named"),
    [({"score": NAN}, "score"), ({"score": None}, "detection 0"), ({"bbox": [1, 1, NAN, 3]}, "bbox"),
     ({"image_id": 2**70}, "64 bits"), ({"score": 10**400}, "detection 0")],
)  # fmt: skip
def test_a_broken_detection_is_refused(root: Path, tmp_path: Path, change: dict[str, Any], named: str) -> None:
    thing = {"image_id": 10_000_001, "category_id": 1, "bbox": [1, 1, 50, 50], "score": 0.9} | change
    (root / "found.json").write_text(json.dumps([thing]))
    files = coco.PeopleFiles(root, "found.json", "unlabeled2017", 17, tmp_path / "cache")
    with pytest.raises(UserError, match=named) as caught:
        detections.detected_people(files, 1, 0.5)
    assert "\n" not in str(caught.value)


# ---- The programs themselves


def _words(root: Path, cache: Path, out: Path) -> list[str]:
    words = ["--data.root", str(root), "--data.cache_dir", str(cache), "--output_dir", str(out), "--report_to", "none"]
    return [*words, "--stage", "phase2", "--max_steps", "1", "--phase2.global_batch", "6", "--data.num_workers", "0"]


@pytest.mark.slow
@pytest.mark.launch
def test_training_learns_from_odd_images_and_from_what_is_left_of_broken_ones(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(REPOSITORY))
    paths = sorted((root / "train2017").iterdir())
    for path, case in zip(paths, ("CMYK", "16 bits", "gray JPEG"), strict=False):
        KINDS[case][1](Image.open(path).convert(KINDS[case][0]), path)
    _cut(paths[-1])
    words = [*_words(root, tmp_path / "cache", tmp_path / "run"), "--data.on_bad_image", "skip", "--dry_run"]
    importlib.import_module("sapiens_accel.train").main(words)
    assert f"skipped: {paths[-1]} does not decode" in capsys.readouterr().out


@pytest.mark.launch
def test_a_user_sees_one_line_and_exit_code_2(root: Path, tmp_path: Path) -> None:
    tree = _picture(file_name="../../outside/secret.jpg")(json.loads((root / TRAIN).read_text()))
    (root / TRAIN).write_text(json.dumps(tree))
    words = _words(root, tmp_path / "cache", tmp_path / "run")
    done = forks.run(["train.py", *words])
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if "error" in line]
    assert len(errors) == 1 and "../../outside/secret.jpg" in errors[0] and "Traceback" not in done.stderr
