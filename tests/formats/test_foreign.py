"""Files of another tool where COCO's are expected: one line with a command that makes a folder to train on."""

import json
import re
import shlex
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

import foreign
import pytest

from sapiens_accel import cli
from sapiens_accel.config import parse
from sapiens_accel.data import build
from sapiens_accel.errors import UserError
from sapiens_accel.formats import cvat, yolo

Words = list[str]


def _open(*words: str) -> int:
    """How many people a run would train on."""
    config = parse.load(["--recipe", "demo", *words])
    skeleton, _ = build.open_skeleton(config.data)
    return len(build.open_people(config.data, skeleton, unlabeled=False).train)


def _root(folder: Path) -> Words:
    return ["--data.root", str(folder)]


def _file(file: Path) -> Words:
    return ["--data.root", str(file.parent), "--data.train_annotations", file.name]


def _collected_data(folder: Path) -> Path:
    every = foreign.shots(1)
    foreign.write_images(folder / "labeled-data", every)
    file = folder / "CollectedData.csv"
    file.write_text("\n".join(",".join(map(str, row)) for row in foreign.collected_data(every, 1, 1)))
    return file


def _animalpose(folder: Path) -> Path:
    tree = json.loads(foreign.crowdpose(folder).read_text())
    tree["images"] = {str(image["id"]): image["file_name"] for image in tree["images"]}
    for one in tree["annotations"]:
        x, y, w, h = one["bbox"]
        one["bbox"] = [x, y, x + w, y + h]
    file = folder / "keypoints.json"
    file.write_text(json.dumps(tree))
    return file


GIVEN: dict[str, Callable[[Path], Words]] = {
    "a project of DeepLabCut": lambda folder: _root(foreign.deeplabcut(folder)),
    "its CSV": lambda folder: _file(_collected_data(folder)),
    "a .slp": lambda folder: _file(foreign.sleap(folder)),
    "a .slp as root": lambda folder: _root(foreign.sleap(folder)),
    "a folder with a .slp": lambda folder: _root(foreign.sleap(folder).parent),
    "Label Studio": lambda folder: _file(foreign.label_studio(folder)),
    "CVAT": lambda folder: _file(foreign.cvat_images(folder) / "annotations.xml"),
    "a folder of CVAT": lambda folder: _root(foreign.cvat_images(folder)),
    "a folder of YOLO": lambda folder: _root(foreign.yolo(folder)),
    "labelme": lambda folder: _file(foreign.labelme(folder) / "day1" / "img001.json"),
    "a folder of labelme": lambda folder: _root(foreign.labelme(folder) / "day1"),
    "AnimalPose": lambda folder: _file(_animalpose(folder)),
    "a folder of MPII": lambda folder: _root(foreign.mpii(folder)),
}


def test_a_rotated_rectangle_of_cvat_is_the_upright_one_around_it() -> None:
    corners = {"xtl": "10", "ytl": "20", "xbr": "50", "ybr": "40"}
    for angle, expected in ((0, (10, 20, 40, 20)), (90, (20, 10, 20, 40)), (45, (8.787, 8.787, 42.426, 42.426))):
        shape = ET.Element("box", {**corners, "label": "mouse", "rotation": str(angle)})
        assert cvat._box(shape).xywh == pytest.approx(expected, abs=1e-3)


def test_a_list_file_of_yolo_may_hold_names_with_spaces(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("images/my image.jpg\n\nimages/b.jpg\n")
    layout = yolo.YoloLayout(
        file=tmp_path / "data.yaml", root=tmp_path, tree={"train": "train.txt"},
        num_keypoints=1, dims=3, classes=["mouse"],
    )  # fmt: skip
    assert [path.name for path in yolo._images(layout, "train")] == ["my image.jpg", "b.jpg"]


@pytest.mark.parametrize("case", GIVEN)
def test_the_command_that_is_named_converts_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if ".slp" in case:
        pytest.importorskip("sleap_io")
    (tmp_path / "of a tool").mkdir()
    words = GIVEN[case](tmp_path / "of a tool")
    cache = ["--data.cache_dir", str(tmp_path / "cache")]
    with pytest.raises(UserError) as error:
        _open(*cache, *words)
    message = str(error.value)
    command = re.search(r"`(sapiens-accel convert .*) OUT`", message)
    assert command and "\n" not in message, message
    monkeypatch.chdir(tmp_path)
    cli.run([*shlex.split(command[1])[1:], "OUT"])
    assert "--weights facebook/sapiens-pretrain-0.3b --data.root OUT" in capsys.readouterr().out
    assert _open(*cache, "--data.root", "OUT") > 0


def test_a_folder_of_cocos_that_lacks_a_file_is_of_no_tool(tmp_path: Path) -> None:
    (tmp_path / "val.json").write_text('{"images": [], "annotations": [], "categories": []}')
    (tmp_path / "boxes.json").write_text('[{"image_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}]')
    with pytest.raises(UserError, match=r"no such annotation file; see --data\.root and --data\.\*_annotations$"):
        _open("--data.root", str(tmp_path))
