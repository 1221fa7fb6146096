"""CONTRIBUTING.md says what is so: its paths, its tables, and the stage that it adds."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import hub_server
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
        modules = {path.stem for path in folder.glob("*.py")} - {"__init__", "__main__"}
        assert modules - set(re.findall(r"\w+", about[folder.name])) == set(), folder.name


def test_the_rows_are_those_of_the_architecture_test() -> None:
    section = TEXT.split("## Who may import whom")[1].split("\n## ")[0]
    rows = {
        int(number): set(re.findall(r"`(\w+)`", packages))
        for number, packages in re.findall(r"^\| (\d+) \| (.*) \|$", section, re.M)
    }
    assert rows == {number: set(packages) - {"__main__"} for number, packages in enumerate(ROWS)}


def _apply(patch: str, root: Path) -> None:
    """Replace each hunk's old lines, which stand once in the file, by its new ones."""
    file = root / re.search(r"^\+\+\+ b/(.*)$", patch, re.MULTILINE)[1]  # type: ignore[index]
    text = file.read_text()
    for hunk in re.split(r"^@@.*\n", patch, flags=re.MULTILINE)[1:]:
        old, new = ("".join(f"{line[1:]}\n" for line in hunk.splitlines() if line[0] in kept) for kept in ("- ", "+ "))
        assert text.count(old) == 1, f"{file}: {old}"
        text = text.replace(old, new)
    file.write_text(text)


@pytest.mark.launch
@pytest.mark.slow
def test_the_stage_that_it_adds_is_trained_evaluated_planned_and_pushed(tmp_path: Path) -> None:
    for name in ("train.py", "eval.py", "sapiens_accel", "accelerate_configs", "ds_configs"):
        copy = shutil.copytree if (REPOSITORY / name).is_dir() else shutil.copy
        copy(REPOSITORY / name, tmp_path / name)
    _apply(re.search(r"```diff\n(.*?)```", TEXT, re.DOTALL)[1], tmp_path)  # type: ignore[index]
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
        said = run("train.py", *SMALL, "--stage", "polish", "--polish.optim.lr", "2e-5", "--save_every", "1")
        assert (tmp_path / "run" / "polish" / "checkpoints" / "step_1").is_dir()
        assert re.search(r"^polish +\d", run("eval.py", "run"), re.MULTILINE)
        assert "polish" in run("-m", "sapiens_accel.memory", "--recipe", "sapiens_0.3b_coco", "--stage", "polish")
        run("-m", "sapiens_accel.hub", "push", "run", "--hub_model_id", f"{hub_server.USER}/pose")
        assert "stage `polish`" in server.repos[f"{hub_server.USER}/pose"].files["README.md"].decode()
