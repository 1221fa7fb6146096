"""Files that the tools themselves wrote (written/README.md) give what was labeled, number by number."""

import shutil
from pathlib import Path

import foreign
import pytest
import yaml
from test_convert import check_mice, read_tree, run

WRITTEN = Path(__file__).parent / "written"


@pytest.mark.parametrize("ending", [".csv", ".h5"])
def test_one_animal_of_deeplabcut(tmp_path: Path, ending: str) -> None:
    pytest.importorskip("tables") if ending == ".h5" else None
    project = tmp_path / "project"
    shutil.copytree(
        WRITTEN / "deeplabcut1", project, ignore=shutil.ignore_patterns({".csv": "*.h5", ".h5": "*.csv"}[ending])
    )
    foreign.write_images(project / "labeled-data", foreign.shots(1))
    run("deeplabcut", project, tmp_path / "out")
    check_mice(tmp_path / "out", animals=1, boxes=False)


def test_several_animals_of_deeplabcut(tmp_path: Path) -> None:
    project = shutil.copytree(WRITTEN / "deeplabcut2", tmp_path / "project")
    foreign.write_images(project / "labeled-data", foreign.shots(2))
    run("deeplabcut", project, tmp_path / "out")
    check_mice(tmp_path / "out", boxes=False)
    assert [one["name"] for one in read_tree(tmp_path / "out", "val")["categories"]] == ["animal"]


def test_labelme(tmp_path: Path) -> None:
    """The first file holds its image as well; the one beside it is read."""
    folder = shutil.copytree(WRITTEN / "labelme", tmp_path / "labels")
    foreign.write_images(folder, foreign.shots())
    run("labelme", folder, tmp_path / "out")
    check_mice(tmp_path / "out", boxes=True)


def test_ultralytics(tmp_path: Path) -> None:
    folder = shutil.copytree(WRITTEN / "ultralytics", tmp_path / "mice")
    for number, shot in enumerate(foreign.shots()):
        split = "val" if number >= 4 else "train"
        foreign.write_images(tmp_path / "scratch", [shot])
        (folder / "images" / split).mkdir(parents=True, exist_ok=True)
        (folder / "labels" / split).mkdir(exist_ok=True)
        (tmp_path / "scratch" / shot.path).rename(folder / "images" / split / shot.name)
        if split == "val":
            (folder / "labels" / "train" / shot.name).with_suffix(".txt").rename(
                (folder / "labels" / "val" / shot.name).with_suffix(".txt")
            )
    tree = {"train": "images/train", "val": "images/val", "names": {0: "mouse"}, "kpt_shape": [4, 3]}
    (folder / "data.yaml").write_text(yaml.safe_dump(tree | {"kpt_names": {0: list(foreign.NAMES)}}))
    run("yolo", folder, tmp_path / "out")
    check_mice(tmp_path / "out", boxes=True)
