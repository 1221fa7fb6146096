"""CONTRIBUTING.md says what is so: its paths, its tables, and what its diffs add."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import hub_server
import numpy as np
import pytest
from printed_commands import REPOSITORY
from test_architecture import ROWS

TEXT = (REPOSITORY / "CONTRIBUTING.md").read_text()
SMALL = (  # noqa: SIM905
    "--data.synthetic.num_train 8 --data.synthetic.num_unlabelled 4 --data.synthetic.num_val 4 --data.input_hw [64,48] "
    "--data.sigma 1 --data.num_workers 0 --report_to none --max_steps 1 --output_dir run --polish.global_batch 4 "
    "--phase1.global_batch 4 --phase2.global_batch 4 --ssl.global_batch 4"
).split()


DOCUMENTS = [REPOSITORY / name for name in ("CONTRIBUTING.md", "README.md")] + sorted(
    (REPOSITORY / "docs").glob("*.md")
)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_every_path_exists(document: Path) -> None:
    folders = "sapiens_accel|tests|docs|benchmarks|ds_configs|accelerate_configs"
    paths = set(re.findall(rf"`((?:{folders})/[\w./*-]*)`", document.read_text()))
    assert len(paths) > 20 or document.name != "CONTRIBUTING.md"
    assert [path for path in sorted(paths) if not any(REPOSITORY.glob(path.rstrip("/")))] == []


def test_every_module_is_named() -> None:
    block = re.search(r"```text\n(.*?)```", TEXT, re.DOTALL)[1]  # type: ignore[index]
    about = dict(re.findall(r"^  ([a-z_]+)/? (.*?)(?=^ {0,2}[a-z])", block, re.MULTILINE | re.DOTALL))
    for folder in sorted(path.parent for path in (REPOSITORY / "sapiens_accel").glob("*/__init__.py")):
        modules = {path.stem for path in folder.rglob("*.py")} - {"__init__", "__main__"}
        missing = modules - set(re.findall(r"\w+", about[folder.name]))
        assert not missing, f"CONTRIBUTING.md, Where things are: {folder.name}/ does not name {missing}"


def test_the_rows_are_those_of_the_architecture_test() -> None:
    section = TEXT.split("## Who may import whom")[1].split("\n## ")[0]
    rows = {
        int(number): set(re.findall(r"`(\w+)`", packages))
        for number, packages in re.findall(r"^\| (\d+) \| (.*) \|$", section, re.M)
    }
    assert rows == {number: set(packages) - {"__main__"} for number, packages in enumerate(ROWS)}


def _apply(patch: str, root: Path) -> None:
    """Replace each hunk's old lines, which stand once in their file, by its new ones."""
    for change in re.split(r"^--- .*\n", patch, flags=re.MULTILINE)[1:]:
        file = root / re.search(r"^\+\+\+ b/(.*)$", change, re.MULTILINE)[1]  # type: ignore[index]
        text = file.read_text() if file.exists() else ""
        for hunk in re.split(r"^@@.*\n", change, flags=re.MULTILINE)[1:]:
            lines = hunk.splitlines()
            old, new = ("".join(f"{line[1:]}\n" for line in lines if line[0] in kept) for kept in ("- ", "+ "))
            assert text.count(old) == 1, f"{file}: {old}"
            text = text.replace(old, new)
        file.write_text(text)


# What the format of the example makes of its files: both points of one animal, and none of a file with an odd number.
CONVERT = """
from pathlib import Path
from sapiens_accel.errors import UserError
from sapiens_accel.formats import convert
convert.main(["dotter", "dots.csv", "dots", "--val", "0.5"])
for form, file in (("labelme", "dots.csv"), ("dotter", "odd.csv")):
    try:
        convert.read(form, Path(file))
    except UserError as error:
        print(error)
"""


def _write_dots(folder: Path) -> None:
    for name in ("a.png", "b.png"):
        cv2.imwrite(str(folder / name), np.zeros((60, 80, 3), np.uint8))
    rows = ["a.png,1,nose,10.5,20", "a.png,1,tail,30,40.25", "b.png,1,nose,50,30", "b.png,1,tail,,"]
    (folder / "dots.csv").write_text("\n".join(["image,animal,point,x,y", *rows]))
    (folder / "odd.csv").write_text("image,animal,point,x,y\na.png,1,nose,far,2")


@pytest.mark.launch
@pytest.mark.slow
def test_what_it_adds_is_trained_evaluated_planned_pushed_and_converted(tmp_path: Path) -> None:
    for name in ("train.py", "eval.py", "sapiens_accel", "accelerate_configs", "ds_configs"):
        copy = shutil.copytree if (REPOSITORY / name).is_dir() else shutil.copy
        copy(REPOSITORY / name, tmp_path / name)
    for patch in re.findall(r"```diff\n(.*?)```", TEXT, re.DOTALL):
        _apply(patch, tmp_path)
    _write_dots(tmp_path)
    with hub_server.serve() as server:
        environment = {**os.environ, **server.environment(tmp_path / "hf"), "OMP_NUM_THREADS": "1"}
        environment |= {"SAPIENS_ACCEL_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(tmp_path)}

        def run(*words: str) -> str:
            done = subprocess.run(
                [sys.executable, *words], cwd=tmp_path, env=environment, capture_output=True, text=True
            )
            assert done.returncode == 0, done.stdout + done.stderr
            return done.stdout

        said = run("train.py", *SMALL, "--stage", "all")
        assert "polish: weights from run/ssl/weights" in said
        assert set(json.loads((tmp_path / "run" / "polish" / "eval.json").read_text())) >= {"AP", "AR"}
        loss = re.search(r"polish: step 1 of 1, loss (\S+),", said)[1]  # type: ignore[index]
        options = "--stage polish --polish.optim.lr 2e-5 --polish.hardest 3 --save_every 1".split()  # noqa: SIM905
        said = run("train.py", *SMALL, *options)
        assert (tmp_path / "run" / "polish" / "checkpoints" / "step_1").is_dir()
        # The mean over 3 of 17 keypoints, those with the most.
        assert float(re.search(r"polish: step 1 of 1, loss (\S+),", said)[1]) > 1.02 * float(loss)  # type: ignore[index]
        saved = json.loads((tmp_path / "run" / "polish" / "eval.json").read_text())
        said = run("eval.py", "run", "--html", "page.html")
        *_, shown = re.search(r"^polish +\d.*$", said, re.MULTILINE)[0].split()  # type: ignore[index]
        assert saved["mean_torso"] > 0 and float(shown) == pytest.approx(100 * saved["mean_torso"], abs=0.06)
        assert f"<td>{shown}</td>" in re.sub(r"<td [^>]*>", "<td>", (tmp_path / "page.html").read_text())
        words = "--recipe sapiens_0.3b_coco --stage polish --polish.hardest 8".split()  # noqa: SIM905
        assert "polish" in run("-m", "sapiens_accel.memory", *words)
        run("-m", "sapiens_accel.hub", "push", "run", "--hub_model_id", f"{hub_server.USER}/pose")
        card = server.repos[f"{hub_server.USER}/pose"].files["README.md"].decode()
        assert "stage `polish`" in card and "mean_torso" in card
        said = run("-c", CONVERT)
        assert "left out: points without coordinates (1)" in said
        assert "Found labels of Dotter: `sapiens-accel convert dotter dots.csv OUT`" in said
        assert "odd.csv: not as dotter writes it: " in said
        trees = [json.loads(file.read_text()) for file in (tmp_path / "dots" / "annotations").iterdir()]
        labels = sorted(one["keypoints"] for tree in trees for one in tree["annotations"])
        assert labels == [[10.5, 20, 2, 30, 40.25, 2], [50, 30, 2, 0, 0, 0]]
