"""Experiment trackers beside TensorBoard, by accelerate's classes: wandb, trackio, mlflow, comet_ml."""

import importlib.util
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from jaxtyping import UInt8
from numpy import ndarray as Array

from sapiens_accel.errors import UserError, escape

PROJECT = "sapiens_accel"


def check_installed(names: tuple[str, ...]) -> None:
    """Refuse a tracker that is not installed, before hours without its curves.

    Raises:
        UserError: with the package to install.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"--report_to {name}: not installed. Install it: pip install {name}")


class Trackers:
    """The runs of one stage in each tracker, on rank 0; with no names it does nothing.

    A tracker that fails gets no more values and costs a warning; training continues.
    """

    def __init__(
        self,
        names: tuple[str, ...],
        run_folder: Path,
        stage: str,
        config: Mapping[str, Any],
        warn: Callable[[str], None],
    ) -> None:
        """Start a run of each tracker.

        Args:
            config: what is stored as the run's settings.
            warn: gets one line for a tracker that failed.
        """
        self._warn, self._active = warn, dict[str, GeneralTracker]()
        title = f"{run_folder.name}/{stage}"
        options: dict[str, dict[str, Any]] = {
            "wandb": {"run_name": PROJECT, "name": title, "group": run_folder.name, "dir": str(run_folder)},
            "trackio": {"run_name": PROJECT, "name": title},
            "mlflow": {"experiment_name": PROJECT, "run_name": title},
            "comet_ml": {"run_name": PROJECT},
        }
        plain = {key: value if isinstance(value, bool | int | float) else str(value) for key, value in config.items()}

        def start(name: str) -> None:
            tracker = LOGGER_TYPE_TO_CLASS[name](**options.get(name, {"run_name": title}))
            self._active[name] = tracker
            tracker.start()
            tracker.store_init_configuration(plain)

        for name in names:
            self._try(name, lambda name=name: start(name))

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Log scalars of a step."""
        for name, tracker in [*self._active.items()]:
            named = {_valid_name(name, key): value for key, value in values.items()}
            self._try(name, lambda tracker=tracker, named=named: tracker.log(named, step=step))

    def log_image(self, tag: str, image: UInt8[Array, "h w 3"], step: int) -> None:
        """Log an image of a step."""
        for name, tracker in [*self._active.items()]:
            valid = _valid_name(name, tag)
            self._try(name, lambda name=name, tracker=tracker, tag=valid: _log_image(name, tracker, tag, image, step))

    def finish(self) -> None:
        """End the runs."""
        for name, tracker in [*self._active.items()]:
            self._try(name, tracker.finish)
        self._active.clear()

    def _try(self, name: str, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as error:  # of any library and network: none of it may end a training
            self._active.pop(name, None)
            reason = escape(" ".join(str(error).split())[:300], keep="") or type(error).__name__
            self._warn(f"--report_to {name}: {reason}; it gets no more values, training continues")


def _valid_name(tracker: str, name: str) -> str:
    """A name that a tracker takes: mlflow refuses a whole step for one such as PCK@0.1 or a keypoint with brackets."""
    return re.sub(r"[^\w\-. :/]", "_", name) if tracker == "mlflow" else name


def _log_image(name: str, tracker: Any, tag: str, image: UInt8[Array, "h w 3"], step: int) -> None:
    """Log an image; accelerate's classes for some trackers have no method for that."""
    if name == "mlflow":
        importlib.import_module("mlflow").log_image(image, key=tag, step=step)
    elif name == "comet_ml":
        tracker.tracker.log_image(image, name=tag, step=step)
    elif name == "trackio":
        tracker.tracker.log({tag: importlib.import_module("trackio").Image(image)}, step=step)
    else:
        tracker.log_images({tag: np.asarray(image)[None]}, step=step)
