"""A run directory that version 0.1 wrote before the package was divided: it is still resumed, and its weights load."""

import json
import tarfile
from pathlib import Path

import forks
import pytest

from sapiens_accel.models import load
from sapiens_accel.models.sapiens import SapiensPose
from sapiens_accel.pose.skeleton import COCO17

ROOT = Path(__file__).parents[2]
# What the same code went on to log in steps 3 and 4 of that run, without an interruption.
LOSSES = {3: (5.2264628410339355, 0.10483451932668686), 4: (5.594505786895752, 0.17733275890350342)}
WORDS = [
    "--stage=ssl", "--output_dir=run", "--data.input_hw=[64,48]", "--data.sigma=1", "--data.synthetic.num_train=8",
    "--data.synthetic.num_unlabelled=8", "--data.synthetic.num_val=2", "--data.num_workers=0", "--log_every=1",
    "--report_to=none", "--ssl.global_batch=4", "--ssl.steps=200", "--ssl.optim.warmup_steps=2",
    '--ssl.frozen=["embeddings","block_*","head"]', "--eval.num_pictures=0", "--eval.num_worst=0", "--max_steps=4",
    "--resume_from_checkpoint=latest",
]  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    with tarfile.open(ROOT / "tests" / "golden" / "run_of_0.1.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "run"


@pytest.mark.launch
def test_a_run_of_the_earlier_version_is_resumed(run: Path) -> None:
    done = forks.run([ROOT / "train.py", *WORDS], cwd=run.parent)
    assert done.returncode == 0, done.stderr
    assert "optimizer's state is NOT" not in done.stdout
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: (line["loss"], line["loss_unlabelled"]) for line in lines if "loss" in line}
    assert {step: losses[step] for step in LOSSES} == {
        step: pytest.approx(values, rel=1e-6) for step, values in LOSSES.items()
    }


def test_its_weights_load(run: Path) -> None:
    model = SapiensPose("sapiens_tiny", 17, (64, 48))
    report = load.load(model, str(run / "ssl" / "checkpoints" / "step_2" / "weights"), COCO17.names)
    assert not report.missing and len(report.loaded) == len(list(model.parameters())), report
