"""Files of another tool where COCO's are expected: one line with a command that makes a folder to train on."""

import json
import re
import shlex
import xml.etree.ElementTree as ET
import zipfile
from collections.abc import Callable
from pathlib import Path

import foreign
import pytest

from sapiens_accel import cli
from sapiens_accel.config import parse
from sapiens_accel.data import build
from sapiens_accel.errors import UserError
from sapiens_accel.formats import convert
from sapiens_accel.formats.tools import cvat, yolo

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


def test_of_a_folder_of_cocos_with_other_names_the_options_are_named(tmp_path: Path) -> None:
    (tmp_path / "val.json").write_text('{"images": [], "annotations": [], "categories": []}')
    (tmp_path / "boxes.json").write_text('[{"image_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}]')
    with pytest.raises(UserError, match=r"no such annotation file; .* images by .* \(found val\.json in \S+\)$"):
        _open("--data.root", str(tmp_path))
    (tmp_path / "train").mkdir()
    (tmp_path / "val.json").rename(tmp_path / "train" / "_annotations.coco.json")  # as Roboflow
    with pytest.raises(UserError, match=r"\(found _annotations\.coco\.json in \S+train\)$"):
        _open("--data.root", str(tmp_path))


# By the tools' documentation, which is all that there was of them.
NOT_CONVERTED = {
    "V7": '{"version": "2.0", "schema_ref": "https://x/darwin_json_2_0.schema.json", "annotations": [{"name": "a"}]}',
    "Supervisely": '{"size": {"height": 2, "width": 3}, "objects": [{"id": 1, "geometryType": "graph", "nodes": {}}]}',
    "VIA": '{"a.png12": {"filename": "a.png", "regions": [{"shape_attributes": {"name": "point", "cx": 1, "cy": 2}}]}}',
    "Datumaro": '{"dm_format_version": "1.0", "infos": {}, "categories": {}, "items": []}',
}


@pytest.mark.parametrize("tool", NOT_CONVERTED)
def test_of_tools_that_are_not_converted_their_own_export_is_named(tool: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(NOT_CONVERTED[tool])
    expected = rf"It is of {tool}.* COCO"
    for words in (_root(tmp_path), _file(tmp_path / "a.json")):
        with pytest.raises(UserError, match=expected):
            _open(*words)
    for form in ("labelme", "cvat", "label_studio", "sleap", "yolo", "deeplabcut", "mpii", "crowdpose", "animalpose"):
        with pytest.raises(UserError, match=expected) as error:
            convert.read(form, tmp_path / "a.json")
        assert "\n" not in str(error.value) and str(error.value).count("It is") == 1


def test_a_zip_is_to_be_unpacked(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "task.zip", "w") as archive:
        archive.writestr("annotations.xml", "<annotations/>")
    for form in ("labelme", "cvat", "label_studio", "yolo", "ap10k"):
        with pytest.raises(UserError, match=r"It is a ZIP: unpack it, and name the folder or the file in it$"):
            convert.read(form, tmp_path / "task.zip")
    with pytest.raises(UserError, match=r"a file \(expected a folder\)\. It is a ZIP: unpack it"):
        _open(*_root(tmp_path / "task.zip"))


MADE = {
    "deeplabcut": foreign.deeplabcut,
    "label_studio": foreign.label_studio,
    "cvat": foreign.cvat_images,
    "yolo": foreign.yolo,
    "labelme": foreign.labelme,
    "mpii": foreign.mpii,
}


@pytest.mark.parametrize("form", MADE)
def test_another_format_than_that_of_the_files_is_refused_with_the_right_one(form: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    source = MADE[form](tmp_path / "in")
    for other in {*convert.READERS} - {form, "lightning_pose"}:
        with pytest.raises(UserError, match=rf"`sapiens-accel convert {form} \S+ OUT`") as error:
            convert.read(other, source)
        assert "\n" not in str(error.value), other


def test_the_only_xml_of_a_folder_is_that_of_cvat(tmp_path: Path) -> None:
    """Datumaro's export to CVAT's form is called default.xml."""
    folder = foreign.cvat_images(tmp_path / "task")
    (folder / "annotations.xml").rename(folder / "default.xml")
    assert len(convert.read("cvat", folder).images) == 6
    (folder / "b.xml").touch()
    with pytest.raises(UserError, match=r"no annotations\.xml in it \(found b\.xml, default\.xml\)\. Name the file"):
        convert.read("cvat", folder)
