"""Files that no tool should write and users have: each is one line that says what it is, and what to do."""

import gzip
import json
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from sapiens_accel.config.schema import Config, DataConfig
from sapiens_accel.data import build
from sapiens_accel.data.dataset import Sets
from sapiens_accel.doctor import report
from sapiens_accel.errors import UserError
from sapiens_accel.sources import synthetic

Tree = dict[str, Any]
TRAIN, VAL = (f"annotations/person_keypoints_{split}2017.json" for split in ("train", "val"))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("odd")
    return synthetic.write(folder / "drawn", num_train=5, num_unlabelled=1, num_val=3, image_hw=(120, 160))


@pytest.fixture
def root(drawn: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(drawn, tmp_path / "root"))


def _config(root: Path, **options: Any) -> DataConfig:
    return DataConfig(root=str(root), cache_dir=str(root.parent / "cache"), num_workers=0, **options)


def _open(config: DataConfig) -> Sets:
    skeleton, _ = build.open_skeleton(config)
    return build.open_people(config, skeleton, unlabeled=False)


def _refused(config: DataConfig) -> str:
    """The line, which the doctor has too."""
    with pytest.raises(UserError) as caught:
        _open(config)
    line = str(caught.value)
    assert "\n" not in line
    assert report.check_data(Config(data=config))[0].count("error") or report.examine(
        Config(data=config), report.environment.Launch(), Path(config.root or "") / "doctor"
    ).count("error")
    return line


def _change(file: Path, change: Callable[[Tree], Any]) -> None:
    tree = json.loads(file.read_text())
    change(tree)
    file.write_text(json.dumps(tree))


BYTES: dict[str, tuple[Callable[[Tree], bytes], str]] = {
    "empty": (lambda tree: b"", "The file is empty"),
    "gzip": (lambda tree: gzip.compress(json.dumps(tree).encode()), "It is compressed: unpack it (gunzip)"),
    "zip": (lambda tree: b"PK\x03\x04....", "It is compressed: unpack it (unzip)"),
    "latin-1": (lambda tree: json.dumps(tree)[:-1].encode() + b', "note": "\xe4"}', "save it as UTF-8"),
    "UTF-16": (lambda tree: json.dumps(tree).encode("utf-16"), "save it as UTF-8"),
    "JSON Lines": (lambda tree: "\n".join(map(json.dumps, tree["annotations"])).encode(), "as in JSON Lines"),
    "a list": (lambda tree: json.dumps(tree["annotations"]).encode(), "found a list: annotations or a detector's"),
    "images by id": (
        lambda tree: json.dumps(tree | {"images": {str(one["id"]): one for one in tree["images"]}}).encode(),
        "found 'images' of {",
    ),
    "no annotation": (lambda tree: json.dumps(tree | {"annotations": []}).encode(), "no annotation in it"),
}


@pytest.mark.parametrize("kind", BYTES)
@pytest.mark.parametrize("file", [TRAIN, VAL])
def test_a_file_that_is_something_else_is_named(root: Path, kind: str, file: str) -> None:
    content, text = BYTES[kind]
    (root / file).write_bytes(content(json.loads((root / file).read_text())))
    line = _refused(_config(root))
    assert line.startswith(f"{root / file}: ") and text in line and "AnimalPose" not in line


NAMES: dict[str, Callable[[str], str]] = {
    "case": str.upper,
    "no suffix": lambda name: name.removesuffix(".jpg"),
    "another suffix": lambda name: name.replace(".jpg", ".png"),
    "a space at its end": lambda name: f"{name} ",
    "an address": lambda name: f"https://host/a/{name}?size=large",
    "Windows": lambda name: f"C:\\data\\{name}",
    "percent": lambda name: name.replace("ö", "%C3%B6"),
    "decomposed": lambda name: unicodedata.normalize("NFD", name),
    "another folder": lambda name: f"images/train/{name}",
}


@pytest.mark.parametrize("kind", NAMES)
def test_the_image_that_is_meant_is_named(root: Path, kind: str) -> None:
    tree = json.loads((root / TRAIN).read_text())
    first = tree["images"][0]
    real = root / "train2017" / unicodedata.normalize("NFC", f"ö{first['file_name']}")
    (root / "train2017" / first["file_name"]).rename(real)
    first["file_name"] = NAMES[kind](real.name)
    (root / TRAIN).write_text(json.dumps(tree))
    assert f"; {real} looks like it" in _refused(_config(root))


def test_a_folder_that_is_not_there_is_named(root: Path) -> None:
    shutil.rmtree(root / "val2017")
    assert f"there is no folder {root / 'val2017'} (see --data.train_images, --data.val_images)" in _refused(
        _config(root)
    )


def test_a_renamed_copy_of_a_validation_image_is_a_warning_of_every_run(root: Path) -> None:
    """The doctor alone said so: a run compared images of the same name."""
    ours, theirs = (sorted((root / folder).iterdir())[1] for folder in ("train2017", "val2017"))
    assert not any("are training images" in line for line in _open(_config(root)).warnings)
    shutil.copy(theirs, ours)
    (line,) = (line for line in _open(_config(root)).warnings if "are training images" in line)
    assert line.startswith("warning: 1 of 3 validation images are training images") and str(ours) in line


def test_validation_in_fractions_of_the_image_is_refused_as_training_is(root: Path) -> None:
    """Whoever had scaled one file alone had a warning about sizes, and AP 0 after the training."""

    def scale(tree: Tree) -> None:
        for one in tree["annotations"]:
            one["bbox"] = [number / 160 for number in one["bbox"]]

    _change(root / VAL, scale)
    assert f"{root / VAL}: boxes are less than 2 px wide or high" in _refused(_config(root))


def test_names_of_a_file_that_the_run_does_not_have_are_said(root: Path) -> None:
    """A misspelled name read as a keypoint that is missing."""
    _change(root / VAL, lambda tree: tree["categories"][0]["keypoints"].__setitem__(5, "left_sholder"))
    line = str(_open(_config(root)))
    assert "has 16 of the 17 keypoints, by name; the others have weight 0 there: left_shoulder" in line
    assert "nothing is learned of its own left_sholder: other names of the same?" in line


def test_a_byte_order_mark_and_images_of_odd_kinds_are_read(root: Path) -> None:
    text = (root / VAL).read_text()
    (root / VAL).write_bytes(b"\xef\xbb\xbf" + text.encode())
    for number, file in enumerate(sorted((root / "val2017").iterdir())):
        gray = np.asarray(cv2.imread(str(file), cv2.IMREAD_GRAYSCALE))
        cv2.imwrite(str(file.with_suffix(".png")), (gray, gray.astype(np.uint16) * 257)[number % 2])
        file.with_suffix(".png").replace(file)  # a PNG under a JPEG's name
    assert len(_open(_config(root)).val) > 0


def _of_two(tree: Tree, first: str, second: str) -> None:
    """Every other annotation is of the second category."""
    (one,) = tree["categories"]
    one["name"] = first
    tree["categories"].append(one | {"id": 7, "name": second})
    for annotation in tree["annotations"][::2]:
        annotation["category_id"] = 7


@pytest.mark.parametrize(
    ("first", "second", "text"),
    [
        ("Dog", "dog", "categories Dog (id 1), dog (id 7) have one name, but for upper and lower case"),
        ("dog", "dog", "categories dog (id 1), dog (id 7) have one name"),
        ("DOG", "wolf", "categories wolf are not among those of training (cat, dog)"),
        ("Dog", "Cat", ""),
    ],
)
def test_categories_that_may_be_one_and_those_that_are_not_trained_are_said(
    root: Path, first: str, second: str, text: str
) -> None:
    for file, names in ((TRAIN, ("dog", "cat")), (VAL, (first, second))):
        tree = json.loads((root / file).read_text())
        _of_two(tree, *names)
        (root / file).write_text(json.dumps(tree))
    said: list[object] = []
    run = Config(data=_config(root))
    report.check_evaluation(said.append, _open(run.data), run)
    warnings = [str(line) for line in said if str(line).startswith("warning: categories: ")]
    assert len(warnings) == bool(text) and all(text in line for line in warnings), said
