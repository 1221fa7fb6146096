"""Which weights a stage hands over: whole runs of train.main in this process, on a few drawn people."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sapiens_accel.config import parse as config
from sapiens_accel.evaluation.error_analysis import parse_reliability
from sapiens_accel.evaluation.paired import PairedDifference, mean_oks, paired_difference
from sapiens_accel.publish import model_card
from sapiens_accel.training.logger import StageLogger
from sapiens_accel.training.ssl_monitor import StageResult, describe_result

SMALL = [
    "--model.name=sapiens_tiny", "--data.input_hw=[64,48]", "--data.sigma=1", "--data.synthetic.num_train=24",
    "--data.synthetic.num_unlabelled=16", "--data.synthetic.num_val=12", "--data.num_workers=0", "--log_every=1",
    "--eval.num_pictures=0", "--eval.num_worst=0", "--eval.flip=false", "--save_every=2", "--keep_checkpoints=9",
    "--report_to=none", "--phase2.steps=40", "--phase2.optim.warmup_steps=2", "--phase2.global_batch=8",
    "--ssl.steps=6", "--ssl.global_batch=8", "--ssl.teacher.threshold=0.9", "--ssl.teacher.ema_decay=0.5",
    "--ssl.teacher.on_alarm=warn", "--ssl.optim.schedule=constant", "--ssl.optim.warmup_steps=3",
    "--ssl.teacher.weight=0.02",
]  # fmt: skip
LATEST = "--resume_from_checkpoint=latest"
# With a confidence that is fitted at each evaluation, so that a resumed stage needs that too.
GOOD = (
    "--ssl.optim.lr=1e-3",
    "--ssl.teacher.confidence=calibrated",
    "--ssl.teacher.threshold=0.2",
    "--ssl.teacher.labeled_end=0.2",
)  # fmt: skip  (the last of its 6 steps has labeled people alone)
HARM = "--ssl.optim.lr=4e-3", "--ssl.optim.warmup_steps=0"  # Adam's first steps, at their full size
Main = Callable[..., None]


@pytest.fixture(scope="module")
def main(train_here: Main) -> Main:
    return partial(train_here, SMALL)


@pytest.fixture(scope="module")
def begun(main: Main, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights that know a little: both better and worse ones are near."""
    folder = tmp_path_factory.mktemp("begun")
    main(folder, "--stage=phase2", "--save_every=100", "--max_steps=12")
    return folder / "phase2" / "weights"


@pytest.fixture(scope="module")
def trained(main: Main, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights that a few steps at a high rate make worse."""
    folder = tmp_path_factory.mktemp("trained")
    main(folder, "--stage=phase2", "--save_every=100")
    return folder / "phase2" / "weights"


@pytest.fixture(scope="module")
def whole(main: Main, begun: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    main(folder, "--stage=ssl", f"--weights={begun}", "--eval_every=2", *GOOD)
    return folder


def read(folder: Path, name: str = "eval.json") -> dict[str, Any]:
    return json.loads((folder / "ssl" / name).read_text())


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def same(one: Path, other: Path) -> bool:
    a, b = (load_file(folder / "model.safetensors") for folder in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_the_best_evaluated_weights_are_handed_over(whole: Path) -> None:
    """Its AP, and of equal AP (here mostly 0) the mean OKS, are the highest; the weights are those of that step."""
    kept, began, result = read(whole, "kept.json"), read(whole, "begin.json"), read(whole)
    evaluated = [line for line in lines(whole) if "AP" in line]
    assert [line["step"] for line in evaluated] == [0, 2, 4, 6] and began["step"] == 0
    # By the gain over the same people as the mean OKS itself.
    ranks = {line["step"]: (line["AP"], mean_oks(began["oks"]) + line.get("oks_gain", 0)) for line in evaluated}
    best = max(ranks, key=lambda step: ranks[step])
    assert best > 0 and kept["step"] == result["weights_step"] == best and result["hand_over"] == "best"
    for name in ("weights", "student"):
        assert same(whole / "ssl" / name, whole / "ssl" / "checkpoints" / f"step_{best}" / name)
    gain = paired_difference(began["oks"], kept["oks"])
    assert (result["oks_gain"], result["oks_gain_stderr"]) == pytest.approx((gain.mean, gain.stderr), abs=1e-15)
    assert gain.num == 12
    oks = f"mean OKS {gain.mean:+.4f}, standard error {gain.stderr:.4f}, by 12 validation people, which are few"
    assert oks in result["summary"]
    # The curve of the pseudo-labels in its last evaluation, for eval.py's page.
    bins = parse_reliability(result["pseudo_labels"])
    assert bins and 0 < bins.num.sum() <= 12 * 17 and ((bins.right >= 0) & (bins.right <= 1))[bins.num > 0].all()
    assert np.abs(np.nan_to_num(bins.score) * 10 - np.arange(10) - 0.5)[bins.num > 0].max() <= 0.5 + 1e-6
    assert config.load([], base=whole / "config.yaml").ssl.hand_over == "best"


def test_weights_that_got_worse_are_not(
    main: Main, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is raised, the last line says so, and what it began with is handed over bit for bit."""
    run = tmp_path / "run"
    main(run, "--stage=ssl", f"--weights={trained}", "--eval_every=2", *HARM)
    said = capsys.readouterr().out.splitlines()
    (line,) = [text for text in said if "hands over" in text]
    assert line.startswith("ssl: hands over the weights that it began with: no later ones are better (AP ")
    assert [text for text in said if text.startswith("ssl")][-2] == line, "before the table, where ssl is a row"
    result = read(run)
    assert (result["weights_step"], result["step"], result["oks_gain"]) == (0, 6, 0) and result["summary"] in line
    assert same(run / "ssl" / "weights", trained)
    model_card.write(tmp_path / "card", model_card.collect(run, "ssl"), "me/pose", None)
    assert "No evaluation of its 6 steps was better" in (tmp_path / "card" / "README.md").read_text()
    # As it was: the last ones are handed over, and what that costs is said.
    main(run, "--stage=ssl", f"--weights={trained}", "--ssl.hand_over=last", "--max_steps=1", *HARM)
    assert read(run)["weights_step"] == 1 and not same(run / "ssl" / "weights", trained)
    assert "hands over the weights of step 1 of 1" in capsys.readouterr().out


def test_what_was_learned_from_unlabeled_people_is_logged_before_the_end_without_them(
    main: Main, begun: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also of a stage shorter than `log_every`, whose last step has labeled people alone."""
    run = tmp_path / "run"
    main(run, "--stage=ssl", f"--weights={begun}", *GOOD, "--log_every=20")
    logged = [line for line in lines(run) if "loss" in line]
    assert [(line["step"], "keep" in line) for line in logged] == [(5, True), (6, False)]
    said = capsys.readouterr().out
    assert "0 blocks checkpointed; from step 6 on labeled people alone" in said
    assert f"it learned from {100 * logged[0]['keep']:.1f} % of the unlabeled keypoints" in said


def test_a_stage_that_was_stopped_in_an_evaluation_makes_it_again(
    whole: Path, main: Main, begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint of that step is there already: its weights were never compared, and a later step was exported."""
    cut, evaluate = tmp_path / "cut", StageLogger.evaluate

    def stop(logger: StageLogger, step: int, *args: Any) -> None:
        if step == 4:
            raise RuntimeError("stopped")
        evaluate(logger, step, *args)

    words = "--stage=ssl", f"--weights={begun}", "--eval_every=2", *GOOD
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="stopped"):
        patch.setattr(StageLogger, "evaluate", stop)
        main(cut, *words)
    assert read(cut, "kept.json")["step"] < 4 and (cut / "ssl" / "checkpoints" / "step_4").is_dir()
    main(cut, *words, LATEST)
    found, expected = ([line for line in lines(run) if "AP" in line] for run in (cut, whole))
    assert found == expected
    assert all(read(cut, name) == read(whole, name) for name in ("kept.json", "eval.json"))


@pytest.mark.parametrize("lost", [False, True], ids=["after an evaluation", "before the best one"])
def test_a_resumed_stage_hands_over_the_same(whole: Path, main: Main, begun: Path, tmp_path: Path, lost: bool) -> None:
    cut = tmp_path / "cut"
    main(cut, "--stage=ssl", f"--weights={begun}", "--eval_every=2", *GOOD, "--max_steps=4")
    assert read(cut, "kept.json")["step"] == 4, "else nothing is proven"
    if lost:  # killed before the checkpoint that follows the best weights
        shutil.rmtree(cut / "ssl" / "checkpoints" / "step_4")
        (cut / "ssl" / "eval.json").unlink()
    main(cut, "--stage=ssl", f"--weights={begun}", "--eval_every=2", *GOOD, LATEST)
    assert all(read(cut, name) == read(whole, name) for name in ("begin.json", "kept.json", "eval.json"))
    assert all(same(cut / "ssl" / name, whole / "ssl" / name) for name in ("weights", "student"))
    found, expected = ([line for line in lines(run) if "AP" in line] for run in (cut, whole))
    assert found == expected, "the first OKS, and the gains over it, are those of the uninterrupted run"
    logged = ([line for line in lines(run) if "loss" in line] for run in (cut, whole))
    found, expected = ([(line["loss"], line.get("keep")) for line in log] for log in logged)
    assert found == expected and len({keep for _, keep in found if keep}) > 1, "what is kept follows the calibration"


def test_a_half_open_limit_and_half_as_many_unlabeled_people_go_on_where_they_were(
    main: Main, begun: Path, tmp_path: Path
) -> None:
    words = [
        "--stage=ssl",
        f"--weights={begun}",
        "--ssl.steps=4",
        "--ssl.teacher.threshold=-1",
        "--memory.micro_batch=2",
    ]
    words += ["--ssl.teacher.weight=50", "--ssl.teacher.max_grad_ratio=0.1", "--ssl.teacher.ramp=0"]
    words += ["--ssl.teacher.ratio=0.5", "--ssl.teacher.temperature=1", "--ssl.teacher.learned=1.15"]
    main(tmp_path / "whole", *words)
    main(tmp_path / "cut", *words, "--max_steps=2")
    main(tmp_path / "cut", *words, LATEST)
    whole, cut = ([line for line in lines(tmp_path / name) if "loss" in line] for name in ("whole", "cut"))
    names = ("loss", "grad_ratio", "weight_unlabelled", "error_ratio", "limit_open")
    assert [[line[name] for name in names] for line in cut] == [[line[name] for name in names] for line in whole]
    assert all(0.02 < line["limit_open"] < 0.98 for line in whole), "else nothing is proven"
    assert all(
        same(tmp_path / "cut" / "ssl" / name, tmp_path / "whole" / "ssl" / name) for name in ("weights", "student")
    )


def test_a_stage_resumed_without_its_record_compares_with_what_it_resumes(
    whole: Path, main: Main, begun: Path, tmp_path: Path
) -> None:
    """From an earlier step, or of a version without the record: what it resumes is evaluated at once."""
    run = Path(shutil.copytree(whole, tmp_path / "run", symlinks=True))
    asked = f"--resume_from_checkpoint={run / 'ssl' / 'checkpoints' / 'step_2'}"
    main(run, "--stage=ssl", f"--weights={begun}", asked, "--eval_every=2", *GOOD)
    evaluated = [(line["step"], line["AP"], line.get("oks_gain", 0)) for line in lines(run) if "AP" in line]
    assert [step for step, *_ in evaluated] == [0, 2, 2, 4, 6], "the second time as what is resumed"
    assert read(run)["weights_step"] == max(evaluated[2:], key=lambda one: one[1:])[0] == 6
    assert read(run, "begin.json") == read(whole, "begin.json")
    assert read(run)["oks_gain"] == pytest.approx(read(whole)["oks_gain"], abs=1e-12), "over what the stage began with"


def test_best_weights_that_were_measured_otherwise_are_not_compared(
    whole: Path, main: Main, begun: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(whole, tmp_path / "run", symlinks=True))
    words = "--eval_every=2", *GOOD, LATEST, "--ssl.steps=8", "--eval.area=box"
    main(run, "--stage=ssl", f"--weights={begun}", *words)
    assert (read(run, "begin.json")["step"], read(run, "begin.json")["area"]) == (6, "box")
    assert read(run, "kept.json")["area"] == "box" and read(run)["weights_step"] >= 6


def _result(**values: Any) -> StageResult:
    known = {"step": 4, "last": 8, "aps": {0: 0.5, 4: 0.6, 8: 0.55}, "began": 0, "keep": 0.4, "limit_open": None,
             "precision": 0.9, "precision_absent_wrong": 0.8, "gain": PairedDifference(0.02, 0.005, 300)}  # fmt: skip
    return StageResult(**known | values)


def test_the_last_line_says_what_is_known() -> None:
    assert describe_result(_result()) == (
        "hands over the weights of step 4 of 8: AP 50.0 -> 60.0; mean OKS +0.0200, standard error 0.0050, by 300 "
        "validation people: better than what it began with; it learned from 40.0 % of the unlabeled keypoints; of the "
        "pseudo-labels that it would keep on validation people 90.0 % are near the truth (80.0 % if those on keypoints "
        "without a label count as wrong)"
    )
    assert describe_result(_result(precision_absent_wrong=0.9)).endswith(" 90.0 % are near the truth")
    few = describe_result(_result(gain=PairedDifference(0.02, 0.005, 99)))
    assert "by 99 validation people, which are few: measure on 100 or more: better" in few
    near = describe_result(_result(gain=PairedDifference(0.009, 0.005, 300)))
    assert "within 2 standard errors, so it is not known whether the stage helped" in near and "better" not in near
    assert "worse than what it began with" in describe_result(_result(gain=PairedDifference(-0.02, 0.005, 300)))
    nothing = describe_result(_result(keep=None, gain=PairedDifference(0.3, float("nan"), 1)))
    assert "not known" in nothing and "learned from" not in nothing
    closed, opened = (describe_result(_result(limit_open=part)) for part in (0.321, 0.96))
    assert closed.endswith("; the limit of the gradient of unlabeled people was 32 % open, since the labels were not "
                           "learned yet") and opened == describe_result(_result())  # fmt: skip
    began = describe_result(_result(step=0))
    assert began.startswith("hands over the weights that it began with: no later ones are better (AP 50.0 -> 55.0 "
                            "at step 8), nothing was gained; it learned from 40.0 %")  # fmt: skip
