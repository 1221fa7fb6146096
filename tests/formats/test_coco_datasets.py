"""CrowdPose, AP-10K and AnimalPose: their ids, species and crowdIndex stay; what they write otherwise is put right.

The inputs are own_data_cases of the test data, and small ones by what the authors publish.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import foreign
import numpy as np
import pytest

from sapiens_accel.errors import UserError
from sapiens_accel.formats import convert

CASES = (
    Path(os.environ.get("SAPIENS_ACCEL_TEST_DATA", Path(__file__).parents[3] / "shared" / "data")) / "own_data_cases"
)


def lay(name: str, out: Path) -> Path:
    if not CASES.is_dir():
        pytest.skip(f"no {CASES}")
    subprocess.run([sys.executable, CASES / "lay.py", name, out], check=True, capture_output=True)
    return out


def run(*words: object) -> None:
    convert.main([str(word) for word in words])


def read_tree(out: Path, split: str) -> dict[str, Any]:
    return json.loads((out / "annotations" / f"person_keypoints_{split}2017.json").read_text())


def test_crowdpose_keeps_its_own_split_ids_and_crowd_index(tmp_path: Path) -> None:
    case = lay("crowdpose", tmp_path / "in")
    for split in ("train", "val"):
        (case / f"{split}.json").rename(case / f"crowdpose_{split}.json")
        (case / split).rename(case / "images") if split == "train" else None
    for image in (case / "val").iterdir():
        image.rename(case / "images" / image.name)
    run("crowdpose", case, tmp_path / "out")
    for split in ("train", "val"):
        ours, theirs = read_tree(tmp_path / "out", split), json.loads((case / f"crowdpose_{split}.json").read_text())
        assert [(one["id"], one["crowdIndex"]) for one in ours["images"]] == [
            (one["id"], one["crowdIndex"]) for one in theirs["images"]
        ]
        for mine, their in zip(ours["annotations"], theirs["annotations"], strict=True):
            assert {key: mine[key] for key in ("id", "image_id", "bbox", "keypoints")} == {
                key: their[key] for key in ("id", "image_id", "bbox", "keypoints")
            }
            assert "area" not in mine  # it has none, and its protocol has a rule for that
        # The case has edges of COCO's 17 keypoints, of which it has 14.
        assert max(end for edge in ours["categories"][0]["skeleton"] for end in edge) <= 14


@pytest.mark.parametrize("edges_from", [0, 1])
def test_edges_count_from_one_afterwards(tmp_path: Path, edges_from: int) -> None:
    run("crowdpose", foreign.crowdpose(tmp_path, edges_from), tmp_path / "out")
    assert read_tree(tmp_path / "out", "val")["categories"][0]["skeleton"] == [[1, 2], [1, 3], [1, 4]]


def test_ap10k_keeps_its_species(tmp_path: Path) -> None:
    case = lay("ap10k", tmp_path / "in")
    for split in ("train", "val"):
        (case / f"{split}.json").rename(case / f"ap10k-{split}-split1.json")
    folders = [path for path in case.iterdir() if path.is_dir()]
    (case / "data").mkdir(exist_ok=True)
    for image in [image for folder in folders for image in folder.rglob("*.jpg")]:
        image.rename(case / "data" / image.name)
    run("ap10k", case, tmp_path / "out")
    theirs = json.loads((case / "ap10k-train-split1.json").read_text())
    ours = read_tree(tmp_path / "out", "train")
    name = {kind["id"]: kind["name"] for kind in theirs["categories"]}
    ours_name = {kind["id"]: kind["name"] for kind in ours["categories"]}
    assert [ours_name[one["category_id"]] for one in ours["annotations"]] == [
        name[one["category_id"]] for one in theirs["annotations"]
    ]
    assert len(set(ours_name.values())) > 1
    assert [one["area"] for one in ours["annotations"]] == [one["area"] for one in theirs["annotations"]]


def test_animalpose_has_corners_for_boxes_and_a_map_of_images(tmp_path: Path) -> None:
    case = lay("animalpose_raw", tmp_path / "in")
    images = next(path for path in case.iterdir() if path.is_dir() and "train" in path.name)
    run("animalpose", case / "train.json", tmp_path / "out", "--images", images)
    theirs = json.loads((case / "train.json").read_text())
    numbers = {number: name for number, name in theirs["images"].items()}
    expected = sorted(
        (numbers[str(one["image_id"])], x0, y0, round(x1 - x0, 3), round(y1 - y0, 3))
        for one in theirs["annotations"]
        for x0, y0, x1, y1 in [one["bbox"]]
    )
    found = []
    for split in ("train", "val"):
        tree = read_tree(tmp_path / "out", split)
        names = {image["id"]: image["file_name"] for image in tree["images"]}
        found += [(names[one["image_id"]], *one["bbox"]) for one in tree["annotations"]]
        assert all(len(one["keypoints"]) == 51 for one in tree["annotations"])
    assert sorted(found) == expected


def test_animalpose_writes_one_for_visible(tmp_path: Path) -> None:
    tree = json.loads(foreign.crowdpose(tmp_path).read_text())
    for one in tree["annotations"]:
        one["keypoints"] = (np.array(one["keypoints"]).reshape(-1, 3) * (1, 1, 0.5)).tolist()
        one["bbox"] = [1, 2, 31, 42]
    tree["images"] = {image["id"]: image["file_name"] for image in tree["images"]}
    (tmp_path / "keypoints.json").write_text(json.dumps(tree))
    run("animalpose", tmp_path / "keypoints.json", tmp_path / "out")
    annotations = [one for split in ("train", "val") for one in read_tree(tmp_path / "out", split)["annotations"]]
    assert {v for one in annotations for v in one["keypoints"][2::3]} == {0, 2}
    assert {tuple(one["bbox"]) for one in annotations} == {(1, 2, 30, 40)}


def test_an_annotation_of_no_image_is_refused(tmp_path: Path) -> None:
    file = foreign.crowdpose(tmp_path)
    tree = json.loads(file.read_text())
    tree["annotations"][3]["image_id"] = 999
    file.write_text(json.dumps(tree))
    with pytest.raises(UserError, match=r"crowdpose\.json: annotation 7003: its image 999 is not among 'images'$"):
        run("crowdpose", file, tmp_path / "out")


@pytest.mark.parametrize(("place", "value", "expected"), [(2, 0.7, "v of a keypoint is 0.7"), (0, float("nan"), "NaN")])
def test_scores_and_no_numbers_are_refused(tmp_path: Path, place: int, value: float, expected: str) -> None:
    file = foreign.crowdpose(tmp_path)
    tree = json.loads(file.read_text())
    tree["annotations"][3]["keypoints"][place] = value
    file.write_text(json.dumps(tree))
    with pytest.raises(UserError, match=rf"^day1/img\d+\.png: .*{expected}"):
        run("crowdpose", file, tmp_path / "out")


def test_no_image_is_written_outside_of_out(tmp_path: Path) -> None:
    file = foreign.crowdpose(tmp_path)
    tree = json.loads(file.read_text())
    tree["images"][0]["file_name"] = "../../../day1/img000.png"
    file.write_text(json.dumps(tree))
    with pytest.raises(UserError, match=r"leads out of the folder"):
        run("crowdpose", file, tmp_path / "out")
    assert not (tmp_path / "out").exists()
