"""--model.visibility: training is the same with it, and its file follows the weights. Whole runs on drawn people."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import forks
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sapiens_accel import PoseEstimator, evaluate
from sapiens_accel.visibility import output

SMALL = [
    "--model.name=sapiens_tiny", "--data.input_hw=[64,48]", "--data.sigma=1", "--data.synthetic.num_train=24",
    "--data.synthetic.num_unlabelled=16", "--data.synthetic.num_val=12", "--data.num_workers=0", "--log_every=1",
    "--eval.num_pictures=0", "--eval.num_worst=0", "--report_to=none", "--phase2.steps=4", "--eval_every=2",
    "--phase2.optim.warmup_steps=0", "--phase2.global_batch=8", "--ssl.steps=2", "--ssl.global_batch=8",
    "--save_every=2",
]  # fmt: skip
ON = "--model.visibility=true"
Main = Callable[..., None]


@pytest.fixture(scope="module")
def main(train_here: Main) -> Main:
    return partial(train_here, SMALL)


@pytest.fixture(scope="module")
def trained(main: Main, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("with")
    main(folder, "--stage=phase2,ssl", "--weights=random", ON)
    return folder


def _lines(folder: Path) -> list[dict[str, Any]]:
    times = ("people_per_second", "host_peak_gib", "time")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in times} for line in lines]


def _output(folder: Path) -> output.VisibilityOutput:
    read = output.read(folder)
    assert read is not None
    return read


def test_training_is_the_same_with_and_without_it(
    main: Main, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Losses, metrics, weights and checkpoints, random states included, in a stage with a teacher too.

    A finished run that is resumed with the option says that its weights have no such output.
    """
    main(tmp_path, "--stage=phase2,ssl", "--weights=random")
    assert _lines(trained) == _lines(tmp_path)
    for stage in ("phase2", "ssl"):
        files = [path.relative_to(tmp_path) for path in (tmp_path / stage).rglob("*.safetensors")]
        assert len(files) > 2
        for file in files:
            ours, theirs = load_file(trained / file), load_file(tmp_path / file)
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[key], theirs[key]) for key in ours), file
        state = f"{stage}/checkpoints/latest/state/random_states_0.pkl"
        ours, theirs = (torch.load(folder / state, weights_only=False) for folder in (trained, tmp_path))
        assert torch.equal(ours["torch_manual_seed"], theirs["torch_manual_seed"])
        assert not (tmp_path / stage / "weights" / output.FILE).exists()
        assert (trained / stage / "weights" / output.FILE).is_file()
    assert "no visibility.safetensors" not in capsys.readouterr().out
    main(tmp_path, "--stage=phase2,ssl", "--weights=random", ON, "--resume_from_checkpoint=latest")
    said = capsys.readouterr().out
    for stage in ("phase2", "ssl"):
        assert f"warning: {tmp_path / stage / 'weights'}: no visibility.safetensors (expected one by " in said


@pytest.mark.slow
def test_a_resumed_stage_fits_the_same(main: Main, trained: Path, tmp_path: Path) -> None:
    main(tmp_path, "--stage=phase2", "--weights=random", ON, "--max_steps=2")
    main(tmp_path, "--stage=phase2", "--weights=random", ON, "--resume_from_checkpoint=latest")
    ours, theirs = (_output(folder / "phase2" / "weights") for folder in (tmp_path, trained))
    assert torch.equal(ours.weight, theirs.weight)
    assert torch.equal(ours.bias, theirs.bias)
    assert ours.about == theirs.about


@pytest.mark.slow
def test_weights_without_it_remove_the_file_of_those_before(main: Main, trained: Path, tmp_path: Path) -> None:
    main(tmp_path, "--stage=phase2", "--weights=random", ON, "--max_steps=2")
    assert (tmp_path / "phase2" / "weights" / output.FILE).is_file()
    main(tmp_path, "--stage=phase2", "--weights=random", "--resume_from_checkpoint=latest")
    assert not (tmp_path / "phase2" / "weights" / output.FILE).exists()


def test_it_is_in_predictions_and_in_evaluations(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A flip test does not change it: it is of the plain crop."""
    rows = []
    for flip in (True, False):
        file = tmp_path / f"{flip}.json"
        options = {"flip": flip, "save_predictions": str(file), "csv": "long", "output_dir": str(tmp_path)}
        evaluate(trained / "ssl" / "weights", options)
        rows.append(sorted((one["image_id"], *one["keypoint_visible"]) for one in json.loads(file.read_text())))
    np.testing.assert_allclose(np.array(rows[0]), np.array(rows[1]), rtol=0, atol=2e-4)
    assert "present, by peak" in capsys.readouterr().out
    (measured,) = json.loads((tmp_path / "eval.json").read_text()).values()
    assert set(measured["visibility"]) == {"present", "visible"}
    header, row = (tmp_path / "True.csv").read_text().splitlines()[:2]
    assert header.endswith("score,present,visible")
    assert len(row.split(",")) == len(header.split(","))


def test_it_is_in_the_results_of_images(trained: Path, tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (64, 48, 3), dtype=np.uint8)
    estimator = PoseEstimator.from_pretrained(trained / "ssl" / "weights", device="cpu")
    result = estimator(image)
    assert result.present is not None
    assert result.visible is not None
    assert result.present.shape == result.scores.shape
    assert (result.visible <= result.present).all()
    (annotation,) = result.to_coco()["annotations"]
    assert annotation["keypoint_present"] == result.present[0].astype(np.float64).round(4).tolist()
    assert annotation["keypoint_visible"] == result.visible[0].astype(np.float64).round(4).tolist()
    assert result.to_csv().splitlines()[0].endswith("score,present,visible")
    nobody = estimator(image, boxes=np.zeros((0, 4)))
    assert nobody.to_csv() == result.to_csv().splitlines()[0] + "\n"


@pytest.mark.slow
def test_two_processes_fit_what_one_fits(tmp_path: Path) -> None:
    """Each describes its part of the people, an odd number of whom are validated."""
    words = [*SMALL, "--stage=phase2", "--weights=random", ON, "--data.synthetic.num_val=13"]
    found = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        done = forks.run(["train.py", *words, f"--output_dir={folder}"], processes=processes)
        assert done.returncode == 0, done.stderr
        found.append(_output(folder / "phase2" / "weights").about)
    one, two = found
    assert (one["people"], one["calibration_people"]) == (two["people"], two["calibration_people"]) == (24, 13)
    for name in output.OUTPUTS:
        assert one["quality"][name]["share"] == two["quality"][name]["share"]
        for score in ("output", "peak"):
            assert two["quality"][name][score] == pytest.approx(one["quality"][name][score], abs=0.02)
