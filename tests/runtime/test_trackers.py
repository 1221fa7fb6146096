"""Trackers: what they get, and that one that fails stops nothing."""

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerate import tracking
from accelerate.tracking import GeneralTracker

from sapiens_accel.config.parse import load
from sapiens_accel.errors import UserError
from sapiens_accel.runtime.trackers import Trackers, check_installed

SMALL = (
    "--stage=phase1 --phase1.steps=2 --phase1.global_batch=4 --data.synthetic.num_train=8 --data.synthetic.num_val=4 "
    "--data.synthetic.num_unlabelled=4 --data.num_workers=0 --data.input_hw=[64,48] --log_every=1"
)


class Fake(GeneralTracker):
    """A tracker of a user, which fails when it is asked to."""

    name, requires_logging_directory = "fake", False
    fails = ""

    def __init__(self, run_name: str, **_: Any) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []
        made.append(self)

    @property
    def tracker(self) -> "Fake":
        return self

    def _note(self, name: str, *values: Any) -> None:
        if self.fails == name:
            raise ConnectionError(f"{name}: the server\nis gone")
        self.calls.append((name, *values))

    def start(self) -> None:
        self._note("start")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self._note("config", values)

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        self._note("log", step, values)

    def log_images(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        self._note("image", step, {name: np.asarray(image).shape for name, image in values.items()})

    def finish(self) -> None:
        self._note("finish")


made: list[Fake] = []


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[Fake]:
    """In place of wandb's class, so that a run can ask for it by name."""
    made.clear()
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", Fake)
    monkeypatch.setattr("sapiens_accel.runtime.trackers.check_installed", lambda names: None)
    monkeypatch.setattr(Fake, "fails", "")
    return Fake


@pytest.mark.parametrize("moment", ["start", "config", "log", "image", "finish"])
def test_a_tracker_that_fails_is_left_out_with_one_line(
    fake: type[Fake], moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake, "fails", moment)
    said: list[str] = []
    trackers = Trackers(("wandb",), tmp_path, "phase2", {"seed": 0, "weights": None}, said.append)
    for step in (1, 2):
        trackers.log({"train/loss": 0.5}, step)
        trackers.log_image("train/crops", np.zeros((4, 6, 3), np.uint8), step)
    trackers.finish()
    assert said == [f"--report_to wandb: {moment}: the server is gone; it gets no more values, training continues"]
    assert sum(call[0] == "log" for call in made[0].calls) == {"finish": 2, "image": 1}.get(moment, 0)


@pytest.mark.parametrize("moment", ["", "log"])
def test_a_run_reports_to_several_and_survives_one_that_fails(
    fake: type[Fake], moment: str, train_here: Callable[..., None], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(fake, "fails", moment)
    train_here(SMALL.split(), tmp_path / "run", "--report_to=tensorboard,wandb")
    said = capsys.readouterr().out
    assert said.count("--report_to wandb: log: the server is gone") == bool(moment)
    assert list((tmp_path / "run" / "tensorboard" / "phase1").iterdir())
    if not moment:
        (one,) = made
        values = {name: value for call in one.calls if call[0] == "log" for name, value in call[2].items()}
        lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
        assert values["train/loss"] == [line["loss"] for line in lines if "loss" in line][-1]
        assert values["eval/AP"] == 100 * lines[-1]["AP"] and one.calls[-1] == ("finish",)
        assert {"train/crops", "eval/predictions"} <= {
            tag for call in one.calls if call[0] == "image" for tag in call[2]
        }
        assert one.calls[1][1]["data.input_hw"] == "(64, 48)" and one.calls[1][1]["phase1.optim.lr"] == 2.5e-3


def test_mlflow_takes_every_name() -> None:
    """It refused a whole evaluation for PCK@0.1."""
    trackers = Trackers((), Path("run"), "phase1", {}, print)
    fakes = {name: Fake("run") for name in ("mlflow", "wandb")}
    trackers._active.update(fakes)
    trackers.log({"eval/PCK@0.1": 0.5, "eval/AP, left (ear)": 0.25, "ssl/keep": 1.0}, step=3)
    logged = {name: list(fake.calls[0][2]) for name, fake in fakes.items()}
    assert logged["mlflow"] == ["eval/PCK_0.1", "eval/AP_ left _ear_", "ssl/keep"]
    assert logged["wandb"] == ["eval/PCK@0.1", "eval/AP, left (ear)", "ssl/keep"]


def test_what_is_not_installed_or_known_is_refused() -> None:
    with pytest.raises(UserError, match="--report_to no_such_tracker: not installed"):
        check_installed(("no_such_tracker",))
    with pytest.raises(UserError, match=r"--report_to: no such value .*found wandbb\); did you mean wandb"):
        load(["--report_to", "tensorboard,wandbb"])
    assert load(["--report_to", "none"]).trackers == ()


@pytest.mark.slow
def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train_here: Callable[..., None]) -> None:
    pytest.importorskip("wandb", reason="not a requirement: pip install wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    train_here(SMALL.split(), tmp_path / "run", "--report_to=wandb")
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    importlib.import_module("wandb").teardown()
