"""The wheel, installed where there is no checkout: every command, the recipes and the launch files are in it."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

pytestmark = [pytest.mark.launch, pytest.mark.slow]

REPOSITORY = Path(__file__).resolve().parents[1]
SMALL = [
    "--stage",
    "phase1",
    "--phase1.steps",
    "2",
    "--phase1.global_batch",
    "4",
    "--data.synthetic.num_train",
    "8",
    "--data.synthetic.num_val",
    "4",
    "--data.synthetic.num_unlabelled",
    "4",
    "--data.num_workers",
    "0",
    "--data.input_hw",
    "64",
    "48",
]


def _run(words: list[str], folder: Path, path: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"PATH": f"{path}{os.pathsep}{os.environ['PATH']}", "SAPIENS_ACCEL_CACHE": str(path / "cache")}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the programs of an environment that has this package from its wheel, the others by a path."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("sapiens_accel", "accelerate_configs", "ds_configs"):
        shutil.copytree(REPOSITORY / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "train.py", "eval.py"):
        shutil.copy(REPOSITORY / name, folder / "source" / name)
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), str(folder / "source")]
    subprocess.run(build, check=True)
    shutil.rmtree(folder / "source")
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv" / "bin" / "python"
    (wheel,) = folder.glob("*.whl")
    subprocess.run([*pip, "--python", str(python), "install", "--no-deps", str(wheel)], check=True)
    site = next((folder / "venv" / "lib").glob("python*")) / "site-packages"
    (site / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python.parent


def test_an_installed_package_trains_evaluates_and_plans_in_an_empty_folder(programs: Path, tmp_path: Path) -> None:
    said = _run(["sapiens-accel", "train", "--launch", "zero2", "--num_processes", "1", *SMALL], tmp_path, programs)
    assert said.startswith("demo: 1 process on CPU, ZeRO-2, bf16")
    run = tmp_path / "runs" / "demo"
    assert json.loads((run / "phase1" / "eval.json").read_text())["step"] == 2
    assert "sapiens-accel eval runs/demo --images FOLDER" in said
    assert "sapiens-accel train --launch zero2 --num_processes 1 --stage phase1" in said, "how to resume"
    assert "phase1" in _run(
        ["sapiens-accel", "eval", "runs/demo", "--pictures", "0", "--worst", "0"], tmp_path, programs
    )
    planned = _run(["sapiens-accel", "memory", "--recipe", "sapiens_1b_coco", "--stage", "phase2"], tmp_path, programs)
    assert re.search(r"sapiens-accel train --launch \w+ --num_processes 1 --recipe sapiens_1b_coco", planned)
    module = ["python", "-m", "accelerate.commands.launch", "--cpu", "-m", "sapiens_accel.train", "--help"]
    assert "--help all" in _run(module, tmp_path, programs)


def test_every_command_is_installed(programs: Path, tmp_path: Path) -> None:
    said = _run(["sapiens-accel", "--help"], tmp_path, programs)
    for name in ("train", "eval", "doctor", "memory", "selftest", "detect", "convert", "export", "push"):
        assert f"\n  {name} " in said
        assert "usage:" in _run(["sapiens-accel", name, "--help"], tmp_path, programs)
