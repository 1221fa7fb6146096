"""`from sapiens_accel import ...`: what a script or a notebook calls is what the programs run."""

import importlib
import inspect
import json
import os
import pickle
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState

import sapiens_accel
from sapiens_accel import evaluate, train
from sapiens_accel.config import parse
from sapiens_accel.errors import UserError
from sapiens_accel.runtime import launch

ROOT = Path(__file__).resolve().parents[1]
OVERRIDES = {
    "stage": "phase1", "phase1.steps": 2, "phase1.global_batch": 4, "data.num_workers": 0, "report_to": "none",
    "data.input_hw": [64, 48], "data.sigma": 1.0, "eval.num_pictures": 0, "eval.num_worst": 0, "log_every": 1,
    "data.synthetic": {"num_train": 8, "num_unlabelled": 1, "num_val": 6},
}  # fmt: skip


@pytest.fixture
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAPIENS_ACCEL_CACHE", str(tmp_path_factory.getbasetemp() / "api_cache"))


def _losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


# ---- Names


def test_the_package_loads_nothing_until_a_name_is_used() -> None:
    script = (
        "import sys; before = set(sys.modules); import sapiens_accel; dir(sapiens_accel)\n"
        "print(sorted({name.split('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['sapiens_accel']"


def test_every_public_name_is_there() -> None:
    assert {"train", "evaluate"} <= set(sapiens_accel.__all__)
    for name in sapiens_accel.__all__:
        assert name in dir(sapiens_accel) and getattr(sapiens_accel, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        sapiens_accel.trian  # noqa: B018


@pytest.mark.parametrize("module_first", [False, True])
def test_train_is_one_object_whatever_is_imported_first(module_first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a fresh process: neither the module nor the package's attribute is there."""
    monkeypatch.delitem(sys.modules, "sapiens_accel.train")
    monkeypatch.delattr(sapiens_accel, "train")
    if module_first:
        module = importlib.import_module("sapiens_accel.train")
        from sapiens_accel import train as function
    else:
        from sapiens_accel import train as function

        module = importlib.import_module("sapiens_accel.train")
    assert function is module is sapiens_accel.train
    assert callable(function) and callable(module.main) and module.__name__ == "sapiens_accel.train"
    assert inspect.signature(function) == inspect.signature(module.train) and function.__qualname__ == "train"
    assert pickle.loads(pickle.dumps(function)) is function


# ---- train and evaluate


def _run_main(program: Any, words: list[str]) -> None:
    """The program in this process, as with these words on its command line."""
    program.main(words)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("_cache")
def test_train_and_evaluate_are_the_programs(tmp_path: Path) -> None:
    """Losses and metrics to the last bit: the command line, a recipe with overrides, and a Config."""
    metrics = train("demo", {**OVERRIDES, "output_dir": tmp_path / "a"})
    _run_main(train, parse.to_words({**OVERRIDES, "output_dir": tmp_path / "b"}))
    assert list(metrics) == ["phase1"] and metrics["phase1"].keys() >= {"AP", "AR"}
    assert len(_losses(tmp_path / "a")) == 2 and _losses(tmp_path / "a") == _losses(tmp_path / "b")
    config = parse.load(parse.to_words({**OVERRIDES, "output_dir": str(tmp_path / "a"), "eval.flip": False}))
    evaluated = evaluate(replace(config, seed=1), {"seed": 0})
    _run_main(importlib.import_module("sapiens_accel.eval"), [str(tmp_path / "b"), "--flip", "false"])
    written = json.loads((tmp_path / "b" / "eval.json").read_text())["phase1"]
    assert evaluated["phase1"] == {name: written[name] for name in evaluated["phase1"]}
    assert evaluate(tmp_path / "a", {"flip": False}) == evaluated
    assert evaluate(tmp_path / "a")["phase1"]["AP"] == metrics["phase1"]["AP"]


@pytest.mark.usefixtures("_cache")
def test_train_takes_a_config(tmp_path: Path) -> None:
    config = parse.load(parse.to_words({**OVERRIDES, "output_dir": str(tmp_path / "run")}))
    assert train(replace(config, seed=-1), {"seed": 3, "dry_run": True}) == {"phase1": {}}


def test_a_recipe_by_its_name_is_its_run_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    parse.save(parse.load([]), tmp_path / "runs" / "demo" / "config.yaml")
    with pytest.raises(UserError, match=r"runs/demo: no weights of all"):
        evaluate("demo")


@pytest.mark.parametrize(
    ("recipe", "overrides", "message"),
    [
        ("demoo", {}, "--recipe demoo: no such recipe .* did you mean demo"),
        ("demo", {"phase1.optim.rl": 1}, "no such option --phase1.optim.rl; did you mean"),
        ("demo", {"max_steps": "many"}, "--max_steps: wrong type"),
        ("demo", {"max_steps": object()}, r"max_steps: not the value of an option \(found object\)"),
        (replace(parse.load([]), seed=-1), {}, "seed: out of its range"),
    ],
)
def test_bad_options_are_one_line(recipe: str, overrides: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message) as refused:
        train(recipe, overrides)
    assert "\n" not in str(refused.value)


def test_the_precision_of_a_call_and_of_notebook_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    from sapiens_accel.runtime import distributed

    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    with distributed.use_in_process("bf16"):
        assert distributed.start().mixed_precision == launch.precision_asked() == "bf16"
    monkeypatch.setenv("MIXED_PRECISION", "bf16")  # what notebook_launcher sets
    with distributed.use_in_process(None):
        assert distributed.start().mixed_precision == "bf16"
    monkeypatch.delenv("MIXED_PRECISION")
    with distributed.use_in_process(None):
        assert distributed.start().mixed_precision == "no"


@pytest.mark.slow
@pytest.mark.launch
def test_two_processes_of_notebook_launcher(tmp_path: Path) -> None:
    """The same losses as one process, within 1e-5; the notebook goes on afterwards."""
    overrides = {**OVERRIDES, "output_dir": "two"}
    with socket.socket() as probe:  # that of others is taken while other tests run
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    script = (
        "from accelerate import notebook_launcher\n"
        "from sapiens_accel import train\n"
        f"notebook_launcher(train, ('demo', {overrides!r}), num_processes=2, use_port={port!r})\n"
        f"train('demo', {overrides | {'output_dir': 'one'}!r})\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "SAPIENS_ACCEL_CACHE": str(tmp_path / "cache")}
    words = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, "-c", script], **words, timeout=300)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 processes on CPU" in done.stdout and "1 process on CPU" in done.stdout
    assert _losses(tmp_path / "two") == pytest.approx(_losses(tmp_path / "one"), abs=1e-5)
