"""Real people: the tiny network learns COCO's by heart."""

import json
import os
from pathlib import Path

import forks
import pytest

ROOT = Path(__file__).resolve().parents[2]
REAL = (ROOT / os.environ.get("SAPIENS_ACCEL_TEST_DATA", "../shared/data") / "coco_mini").resolve()

pytestmark = [
    pytest.mark.launch,
    pytest.mark.slow,  # by default tests/test_cli.py learns drawn people by heart
    pytest.mark.skipif(not REAL.is_dir(), reason=f"no real images: {REAL} (SAPIENS_ACCEL_TEST_DATA)"),
]


def test_86_real_people_are_learned_by_heart(tmp_path: Path) -> None:
    """AP on the training images at least 0.90: decode, crop, codec, loss and evaluation agree to a pixel or so."""
    options = {
        "--stage": "phase2", "--data.root": REAL, "--output_dir": tmp_path / "run", "--report_to": "none",
        "--eval.split": "train", "--eval.flip": "false", "--phase2.global_batch": "16", "--phase2.steps": "550",
        "--phase2.optim.lr": "2e-3",
        # Each person always the same crop.
        **{f"--augment.{knob}": "0" for knob in ("flip_p", "rotation", "scale", "shift")},
    }  # fmt: skip
    words = [word for option in options.items() for word in option]
    done = forks.run(["train.py", *words], env={**os.environ, "SAPIENS_ACCEL_CACHE": str(tmp_path)})
    assert done.returncode == 0, done.stderr[-4000:]
    metrics = json.loads((tmp_path / "run" / "phase2" / "eval.json").read_text())
    assert metrics["split"] == "train" and metrics["AP"] >= 0.90
