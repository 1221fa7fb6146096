"""convert coco_json: one COCO JSON as training and validation, with every field as it was."""

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from sapiens_accel.errors import UserError
from sapiens_accel.formats import convert

FILES = {split: (f"annotations/person_keypoints_{split}2017.json", f"{split}2017") for split in ("train", "val")}


def _export(folder: Path, names: list[str], **changes: Any) -> Path:
    """One JSON with an animal in each image but the last, as a tool exports it: text ids, fields of its own."""
    for number, name in enumerate(names):
        file = folder / "images" / Path(name.replace("\\", "/")).as_posix().removeprefix("../")
        file.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(file), np.full((40, 60, 3), number, np.uint8))
    tree = {
        "info": {"made_by": "a tool"},
        "images": [
            {"id": f"i{n}", "file_name": name, "width": 60, "height": 40, "session": n} for n, name in enumerate(names)
        ],
        "annotations": [
            {"id": n, "image_id": f"i{n}", "category_id": 7, "bbox": [1.5, 2, 30, 20], "area": 77.25, "track": n,
             "keypoints": [5.125, 6, 2, 0, 0, 0]}
            for n in range(len(names) - 1)
        ],
        "categories": [{"id": 7, "name": "mouse", "keypoints": ["nose", "tail"], "color": "red"}],
    }  # fmt: skip
    (folder / "export.json").write_text(json.dumps(tree | changes))
    return folder / "export.json"


def _run(*words: object) -> None:
    convert.main(["coco_json", *map(str, words)])


@pytest.mark.parametrize("link", [False, True])
def test_every_image_annotation_and_field_is_in_one_of_the_two(
    link: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [f"sub\\{n}.png" for n in range(10)] + ["../10.png"]
    file, out = _export(tmp_path, names), tmp_path / "out"
    whole = json.loads(file.read_text())
    _run(file, out, "--val", "0.3", *["--link"] * link)
    parts = {split: json.loads((out / annotations).read_text()) for split, (annotations, _) in FILES.items()}
    for key in ("images", "annotations"):
        together = sorted((one for part in parts.values() for one in part[key]), key=lambda one: str(one["id"]))
        expected = sorted(whole[key], key=lambda one: str(one["id"]))
        if key == "images":
            expected = [one | {"file_name": one["file_name"].replace("\\", "/").strip("./")} for one in expected]
        assert together == expected
    assert all(part[key] == whole[key] for part in parts.values() for key in ("info", "categories"))
    for split, part in parts.items():
        ids = {image["id"] for image in part["images"]}
        assert {one["image_id"] for one in part["annotations"]} <= ids
        for image in part["images"]:
            shown = out / FILES[split][1] / image["file_name"]
            assert shown.is_symlink() == link
            assert np.asarray(cv2.imread(str(shown)))[0, 0, 0] == int(image["id"][1:])
    assert len(parts["val"]["images"]) == 3 and "i10" not in {image["id"] for image in parts["val"]["images"]}
    said = capsys.readouterr().out
    assert "split: 3 images for validation, drawn with seed 0; 1 image without a labeled keypoint for training" in said


def test_folders_of_images_stay_together(tmp_path: Path) -> None:
    file = _export(tmp_path, [f"day{n % 3}/{n}.png" for n in range(13)])
    _run(file, tmp_path / "out")
    days = [
        {Path(image["file_name"]).parent for image in json.loads((tmp_path / "out" / name).read_text())["images"]}
        for name, _ in FILES.values()
    ]
    assert len(days[1]) == 1 and len(days[0]) == 2
    assert not days[0] & days[1]


def test_a_folder_with_one_json_is_that_json(tmp_path: Path) -> None:
    """Its images are looked for beside the JSON, wherever in the folder that is."""
    file = _export(tmp_path / "whole", [f"{n}.png" for n in range(4)])
    _run(tmp_path / "whole", tmp_path / "first")
    (tmp_path / "whole" / "annotations").mkdir()
    file.rename(tmp_path / "whole" / "annotations" / "all.json")
    _run(tmp_path / "whole", tmp_path / "second")
    for out in (tmp_path / "first", tmp_path / "second"):
        assert len(list(out.glob("*2017/*.png"))) == 4
    (tmp_path / "whole" / "annotations" / "other.json").write_text("{}")
    with pytest.raises(UserError, match=r"whole: holds 2 JSON files \(expected one\)\. Name the file"):
        _run(tmp_path / "whole", tmp_path / "third")


def test_ids_are_equal_as_in_training_and_stay_as_they_are(tmp_path: Path) -> None:
    names = [f"{n}.png" for n in range(4)]
    images = [{"id": n, "file_name": name} for n, name in enumerate(names)]
    annotations: list[dict[str, Any]] = [{"id": n, "image_id": str(n), "keypoints": [5, 6, 2]} for n in range(3)]
    annotations.append({"id": 3, "image_id": 3.0, "keypoints": None})
    _run(_export(tmp_path, names, images=images, annotations=annotations), tmp_path / "out")
    parts = [json.loads((tmp_path / "out" / file).read_text()) for file, _ in FILES.values()]
    assert sorted((one for part in parts for one in part["annotations"]), key=lambda one: one["id"]) == annotations
    for part in parts:
        assert {int(one["image_id"]) for one in part["annotations"]} == {image["id"] for image in part["images"]}


def test_images_of_one_file_are_in_one_of_the_two(tmp_path: Path) -> None:
    """However many ids they have, with and without labels: what validates is not trained."""
    names = [f"{n}.png" for n in range(12)]
    images = [{"id": n, "file_name": f"./{names[n % 12]}" if n > 11 else names[n]} for n in range(36)]
    annotations = [{"id": n, "image_id": n, "keypoints": [5, 6, 2]} for n in range(24)]
    _run(_export(tmp_path, names, images=images, annotations=annotations), tmp_path / "out", "--val", "0.5")
    shown = [
        {image["file_name"] for image in json.loads((tmp_path / "out" / file).read_text())["images"]}
        for file, _ in FILES.values()
    ]
    assert len(shown[0]) == len(shown[1]) == 6
    assert not shown[0] & shown[1]


def test_a_run_reads_the_folder(tmp_path: Path) -> None:
    from sapiens_accel.sources.coco import read_json

    _run(_export(tmp_path, [f"{n}.png" for n in range(6)]), tmp_path / "out")
    read = [read_json(tmp_path / "out" / annotations) for annotations, _ in FILES.values()]
    assert [(len(one["images"]), len(one["annotations"])) for one in read] == [(5, 4), (1, 1)]


@pytest.mark.parametrize(
    ("changes", "words", "said"),
    [
        ({"images": {}}, [], r"export\.json: no COCO JSON \(expected lists of images, annotations, categories\)"),
        ({"annotations": []}, [], r"none of its annotations has a labeled keypoint"),
        ({"annotations": [{"id": 3, "image_id": 9}]}, [], r"annotation 3: its image 9 is not among 'images'"),
        ({}, ["--category", "rat"], r"^--category: not of coco_json"),
        ({}, ["--boxes", "image"], r"^--boxes: not of coco_json"),
        ({}, ["--images", "nowhere"], r"4 images not found .* Name their folder: --images FOLDER"),
        ({"images": [{"id": 1, "file_name": n} for n in ("a.png", "b.png")]}, [], r"two images have the id 1"),
        (
            {"annotations": [{"id": 3, "image_id": "i0", "keypoints": [5, 6, 2]}]},
            [],
            r"export\.json: 1 labeled image alone \(expected 2 or more",
        ),
    ],
)
def test_refused(changes: dict[str, Any], words: list[str], said: str, tmp_path: Path) -> None:
    file = _export(tmp_path, [f"{n}.png" for n in range(4)], **changes)
    with pytest.raises(UserError, match=said):
        _run(file, tmp_path / "out", *words)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("out.*"))
