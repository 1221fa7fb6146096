"""A stage trained in this process, as often as a benchmark likes."""

import json
from collections.abc import Sequence
from pathlib import Path

from accelerate.state import AcceleratorState, GradientState

from sapiens_accel.train import main


def train_stage(folder: Path, stage: str, words: Sequence[str]) -> float:
    """AP (0 to 100) of a stage that is trained with these options; its weights are in the folder."""
    try:
        main([f"--stage={stage}", *words, f"--output_dir={folder}"])
    finally:
        AcceleratorState._reset_state()
        GradientState._reset_state()
    return 100 * json.loads((folder / stage / "eval.json").read_text())["AP"]
