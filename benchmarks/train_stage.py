"""A stage trained in this process, as often as a benchmark likes."""

import json
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState, GradientState

from sapiens_accel.train import main


def list_options(asked: Namespace) -> dict[str, Any]:
    """The options of a benchmark for its record, without folders, which are of one machine."""
    return {name: value for name, value in vars(asked).items() if name not in ("work", "out", "coco")}


def train_stage(folder: Path, stage: str, words: Sequence[str]) -> float:
    """AP (0 to 100) of a stage that is trained with these options; its weights are in the folder."""
    try:
        main([f"--stage={stage}", *words, f"--output_dir={folder}"])
    finally:
        AcceleratorState._reset_state()
        GradientState._reset_state()
    return 100 * json.loads((folder / stage / "eval.json").read_text())["AP"]


def finish_stage(folder: Path, stage: str, words: Sequence[str]) -> float:
    """As `train_stage`, unless the folder holds the finished stage."""
    file = folder / stage / "eval.json"
    return 100 * json.loads(file.read_text())["AP"] if file.is_file() else train_stage(folder, stage, words)
