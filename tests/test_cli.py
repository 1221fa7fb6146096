"""The programs as a user starts them: what they refuse, what a run leaves behind, and that a cut run goes on."""

import importlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import forks
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sapiens_accel.config.schema import STAGES
from sapiens_accel.data import sampling
from sapiens_accel.errors import UserError
from sapiens_accel.evaluation.coco_metrics import METRICS, UNITS
from sapiens_accel.pose.skeleton import COCO17
from sapiens_accel.sources import synthetic
from sapiens_accel.training import run_folder

pytestmark = pytest.mark.launch

REPOSITORY = Path(__file__).resolve().parents[1]
TRAIN = "annotations/person_keypoints_train2017.json"
COUNTS = {"num_train": 32, "num_unlabelled": 8, "num_val": 8}
DRAWN = [word for name, num in COUNTS.items() for word in (f"--data.synthetic.{name}", str(num))]
SMALL = ["--data.num_workers", "0", "--report_to", "none", "--log_every", "1"]
OF_THE_MACHINE = {"people_per_second", "host_peak_gib", "gpu_peak_gib"}
STEPS = [word for stage in STAGES for word in (f"--{stage}.steps", "2", f"--{stage}.global_batch", "4")]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cli") / "cache"


@pytest.fixture(scope="module")
def drawn(cache: Path) -> Path:
    return synthetic.write(cache.parent / "drawn", **COUNTS)


@pytest.fixture
def root(drawn: Path, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    return Path(shutil.copytree(drawn, tmp_path / "root"))


@pytest.fixture
def main(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Sequence[str]], None]]:
    """train.py's main in this process: importing torch for each of a dozen errors would take minutes."""
    monkeypatch.setenv("SAPIENS_ACCEL_CACHE", str(cache))
    monkeypatch.syspath_prepend(str(REPOSITORY))
    num_threads = torch.get_num_threads()
    yield importlib.import_module("sapiens_accel.train").main
    torch.set_num_threads(num_threads)


def _launch(program: str, cache: Path, *words: object) -> subprocess.CompletedProcess[str]:
    return forks.run([program, *words], env=os.environ | {"SAPIENS_ACCEL_CACHE": str(cache)})


def _run(program: str, cache: Path, *words: object) -> str:
    done = _launch(program, cache, *words)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# ---- What is refused


def _tree(root: Path) -> dict[str, Any]:
    return json.loads((root / TRAIN).read_text())


def _write(root: Path, tree: dict[str, Any]) -> None:
    (root / TRAIN).write_text(json.dumps(tree))


def _picture(root: Path, index: int = 0) -> Path:
    return sorted((root / "train2017").iterdir())[index]


def _no_annotations(root: Path) -> list[str]:
    (root / TRAIN).unlink()
    return [str(root / TRAIN)]


def _no_picture(root: Path) -> list[str]:
    path = _picture(root, 2)
    path.unlink()
    tree = _tree(root)
    image = next(image["id"] for image in tree["images"] if image["file_name"] == path.name)
    first = next(person["id"] for person in tree["annotations"] if person["image_id"] == image)
    return [str(root / TRAIN), f"annotation {first}:", str(path)]


def _cut_picture(root: Path) -> list[str]:
    path = _picture(root, 1)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return [str(path), "--data.on_bad_image skip"]


def _no_keypoints(root: Path) -> list[str]:
    tree = _tree(root)
    for person in tree["annotations"]:
        del person["keypoints"]
    _write(root, tree)
    return [str(root / TRAIN), "'keypoints'"]


def _no_labels(root: Path) -> list[str]:
    tree = _tree(root)
    for person in tree["annotations"]:
        person["keypoints"] = [0] * 51
    _write(root, tree)
    return [str(root / TRAIN), "32 of its 32 annotations"]


def _zero_targets(root: Path) -> list[str]:
    tree = _tree(root)
    for person in tree["annotations"]:
        person["keypoints"] = [v if j % 3 == 2 else v / 240 for j, v in enumerate(person["keypoints"])]
    _write(root, tree)
    return [str(root / TRAIN), "all targets are zero", "annotation 1:"]


@pytest.mark.parametrize(
    "spoil", [_no_annotations, _no_picture, _cut_picture, _no_keypoints, _no_labels, _zero_targets]
)
def test_broken_data_is_refused_by_name_before_the_first_step(
    main: Callable[[Sequence[str]], None], root: Path, tmp_path: Path, spoil: Callable[[Path], list[str]]
) -> None:
    named = spoil(root)
    _assert_refused(main, tmp_path, ["--data.root", str(root), "--stage", "phase2"], named)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--recipe", "sapiens_0.3b_cocoo"], ["sapiens_0.3b_cocoo", "did you mean sapiens_0.3b_coco?", "demo"]),
        (["--recipe", "absent.yaml"], ["absent.yaml"]),
        (["--phase2.optim.leaning_rate", "1"], ["--phase2.optim.leaning_rate"]),
        (["--phase2.optim.lr", "fast"], ["phase2.optim.lr", "fast"]),
        (["--stage", "phase3"], ["stage", "phase3"]),
        (["--data.root", "/no/such/folder"], ["--data.root /no/such/folder"]),
        (["--data.labels", "33"], ["--data.labels 33", "32 people"]),
        (["--weights", "/no/such/file.pth"], ["--weights /no/such/file.pth"]),
        (["--phase1.frozen", "[blok_*]"], ["blok_*", "block_0"]),
        (["--phase1.frozen", '["*"]'], ["nothing to learn"]),
        (["--phase1.global_batch", "6", "--memory.micro_batch", "4"], ["--phase1.global_batch 6", "micro-batch 4"]),
        (["--resume_from_checkpoint", "/no/such/step_3"], ["/no/such/step_3"]),
        (["--model.name", "sapiens_3b"], ["sapiens_3b", "sapiens_tiny"]),
        (["--data.input_hw", "[100,96]"], ["100x96", "16"]),
    ],
)
def test_wrong_options_are_refused_by_name_before_the_first_step(
    main: Callable[[Sequence[str]], None], tmp_path: Path, words: list[str], named: list[str]
) -> None:
    _assert_refused(main, tmp_path, [*DRAWN, *words], named)


def test_ssl_without_unlabeled_people_is_refused(
    main: Callable[[Sequence[str]], None], root: Path, tmp_path: Path
) -> None:
    shutil.rmtree(root / "unlabeled2017")
    (root / "annotations" / "person_boxes_unlabeled2017.json").unlink()
    named = ["ssl", "unlabelled", str(root / "unlabeled2017")]
    for stage in ("ssl", "phase1,ssl"):
        _assert_refused(main, tmp_path, ["--data.root", str(root), "--stage", stage], named)


def test_all_stages_without_unlabeled_people_are_those_without_ssl(
    main: Callable[[Sequence[str]], None], root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(root / "unlabeled2017")
    (root / "annotations" / "person_boxes_unlabeled2017.json").unlink()
    main([*SMALL, *STEPS, "--data.root", str(root), "--output_dir", str(tmp_path / "run")])
    said = capsys.readouterr().out
    (line,) = [line for line in said.splitlines() if "left out" in line]
    assert line.startswith("--stage all: ssl is left out: no unlabeled people: expected images in ")
    assert {line["stage"] for line in _lines(tmp_path / "run")} == {"phase1", "phase2"}
    assert "DRAWN" not in said


def test_several_stages_are_trained_in_their_order(
    main: Callable[[Sequence[str]], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    main([*SMALL, *DRAWN, *STEPS, "--stage", "phase1,phase2", "--phase2.steps", "4", "--eval_every", "2",
          "--output_dir", str(folder)])  # fmt: skip
    assert [line["stage"] for line in _lines(folder) if "loss" in line] == ["phase1"] * 2 + ["phase2"] * 4
    said = capsys.readouterr().out
    assert "people: DRAWN by this program" in said
    # A line for each evaluation: where the weights are, and how long the run still takes.
    evaluated = [line for line in said.splitlines() if ": AP " in line and ": step " in line]
    assert [line.partition(": AP ")[0] for line in evaluated] == [
        "phase1: step 2 of 2", "phase2: step 2 of 4", "phase2: step 4 of 4"]  # fmt: skip
    assert f"weights in {folder / 'phase1' / 'weights'}, about " in evaluated[0] and "left in the run" in evaluated[0]
    assert "weights not saved yet, about " in evaluated[1] or "weights of step_2 in " in evaluated[1]
    assert re.search(r", (the best so far|best \d+\.\d at step 2), weights in ", evaluated[2])
    assert evaluated[2].endswith(f"weights in {folder / 'phase2' / 'weights'}")
    end = said[said.index("\nweights:") :]
    for named in (f"  {folder / 'phase2' / 'weights'}", f"eval.py {folder}", f"eval.py {folder} --images FOLDER"):
        assert named in end, (named, end)
    assert "--logdir" not in end, "of --report_to none"


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--stage", "ssl"], ["--stage ssl: no weights to start from", "--weights random"]),
        (["--stage", "phase2,phase1"], ["--stage", "expected phase1,phase2, found phase2,phase1"]),
        (["--stage", "all,ssl"], ["--stage", "found all"]),
    ],
)
def test_stages_that_make_no_sense_are_refused(
    main: Callable[[Sequence[str]], None], tmp_path: Path, words: list[str], named: list[str]
) -> None:
    _assert_refused(main, tmp_path, [*DRAWN, *words], named)


def test_drawn_people_are_trained_on_by_request_alone(
    main: Callable[[Sequence[str]], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--recipe", "sapiens_0.3b_coco", "--model.name", "sapiens_tiny", "--data.input_hw", "[64,48]"]
    _assert_refused(main, tmp_path, words, ["--data.root DIR", "sapiens_0.3b_coco", "--data.synthetic"])
    main([*SMALL, *STEPS, *words, *DRAWN, "--dry_run", "--data.sigma", "1", "--output_dir", str(tmp_path / "run")])
    assert "people: DRAWN" in capsys.readouterr().out


def _assert_refused(main: Callable[[Sequence[str]], None], tmp_path: Path, words: list[str], named: list[str]) -> None:
    output = tmp_path / "run"
    with pytest.raises(UserError) as caught:
        main([*SMALL, *STEPS, "--output_dir", str(output), *words])
    text = str(caught.value)
    assert [word for word in named if word not in text] == [], text
    assert "\n" not in text and "Traceback" not in text
    assert not (output / "metrics.jsonl").exists(), "a step was taken"


def test_a_broken_image_that_only_a_worker_meets_is_one_line(
    main: Callable[[Sequence[str]], None], root: Path, tmp_path: Path
) -> None:
    # One of the second step's images; the first step's are drawn into crops.jpg by the main process.
    people = _tree(root)["annotations"]
    first, second = ([people[i]["image_id"] for i in sampling.order(0, "phase2", step, 32, 4)] for step in (0, 1))
    image = next(image for image in second if image not in first)
    path = root / "train2017" / f"{image:012d}.jpg"
    path.write_bytes(b"no JPEG at all: the quick check of first and last bytes lets it pass")
    words = ["--data.root", str(root), "--stage", "phase2", "--data.check_images", "ends"]
    with pytest.raises(UserError) as caught:
        main([*SMALL, *STEPS, "--output_dir", str(tmp_path / "run"), *words, "--data.num_workers", "1"])
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("case", ["misspelt", "cut image"])
def test_a_refusal_is_one_line_on_stderr_and_an_exit_code(cache: Path, root: Path, tmp_path: Path, case: str) -> None:
    if case == "misspelt":
        words, named = ["--phase2.optim.lrr", "1"], ["--phase2.optim.lrr", "did you mean --phase2.optim.lr?"]
    else:
        named = _cut_picture(root)
        words = ["--data.root", str(root)]
    done = _launch("train.py", cache, *SMALL, *STEPS, "--output_dir", tmp_path / "run", *words)
    assert done.returncode == 2
    ours = [line for line in done.stderr.splitlines() if line.startswith("train.py: error:")]
    assert len(ours) == 1
    assert [word for word in named if word not in ours[0]] == [], ours[0]
    assert "Traceback" not in done.stderr + done.stdout
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.slow
def test_bad_images_can_be_skipped_and_are_counted(
    main: Callable[[Sequence[str]], None], root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(_cut_picture(root)[0])
    tree = _tree(root)
    image = next(image["id"] for image in tree["images"] if image["file_name"] == path.name)
    num = sum(person["image_id"] == image for person in tree["annotations"])
    output = tmp_path / "run"
    words = ["--data.root", str(root), "--data.on_bad_image", "skip", "--stage", "phase2", "--output_dir", str(output)]
    main([*SMALL, *STEPS, *words])
    said = capsys.readouterr().out
    assert f"skipped: {path} does not decode" in said
    assert f"people: {32 - num} train, 8 val ({num} skipped" in said
    assert [line["step"] for line in _lines(output) if "loss" in line] == [1, 2]


def test_a_dry_run_writes_nothing(
    main: Callable[[Sequence[str]], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    dry = ["--dry_run", "--save_every", "1", "--eval_every", "1", "--report_to", "tensorboard"]
    main([*SMALL, *DRAWN, *STEPS, *dry])
    assert "dry run" in capsys.readouterr().out
    ssl = ["--stage", "ssl", "--weights", "random"]
    main([*SMALL, *DRAWN, *STEPS, *dry, *ssl, "--output_dir", str(tmp_path / "run")])
    assert list(tmp_path.iterdir()) == []


# ---- What a run leaves behind


@pytest.fixture(scope="module")
def finished(cache: Path) -> tuple[Path, str]:
    """A run of all stages that learns its four people by heart, so that its AP is a number; its folder and output."""
    folder = cache.parent / "finished"
    calm = ["rotation", "scale", "shift", "flip_p", "photometric_p", "blur_p", "coarse_dropout_p"]
    by_heart = [word for name in calm for word in (f"--augment.{name}", "0")]
    learning = ["--phase2.steps", "80", "--phase2.optim.lr", "3e-3", "--data.sigma", "2"]
    small = ["--data.num_workers", "0", "--log_every", "1", "--eval.num_pictures", "3"]
    # Mirrored crops were never seen: no flip test.
    small += ["--eval.split", "train", "--eval.flip", "false"]
    counts = [*DRAWN, "--data.synthetic.num_train", "7", "--data.labels", "4"]
    said = _run("train.py", cache, *STEPS, *by_heart, *learning, *small, *counts, "--output_dir", folder)
    return folder, said


def _table(said: str) -> dict[str, list[float]]:
    """The rows of the printed table by stage: of UNITS, in percent or px."""
    lines = said.splitlines()
    head = next(i for i, line in enumerate(lines) if line.split() == [*UNITS])
    rows = [line.split() for line in lines[head + 1 : head + 1 + len(STAGES)]]
    return {row[0]: [float(value) for value in row[1:]] for row in rows if row}


def test_the_files_of_a_run(finished: tuple[Path, str]) -> None:
    folder, said = finished
    assert (folder / "config.yaml").is_file()
    for stage in STAGES:
        names = sorted(path.name for path in (folder / stage / "weights").iterdir())
        described = ["preprocessor_config.json", "skeleton.json"]
        code = ["heatmap_numpy.py", "image_processing_sapiens_pose.py"]
        assert names == ["config.json", *code, "model.safetensors", "modeling_sapiens_pose.py", *described]
        events = list((folder / "tensorboard" / stage).glob("events.out.tfevents.*"))
        assert len(events) == 1 and events[0].stat().st_size > 1000
        for name in ("crops", "predictions"):
            picture = cv2.imread(str(folder / "pictures" / f"{stage}_{name}.jpg"))
            assert picture is not None and picture.std() > 5
            assert str(folder / "pictures" / f"{stage}_{name}.jpg") in said
        # The people of the lowest OKS: labeled, predicted and the errors side by side, two people in a row.
        assert b"worst" in events[0].read_bytes()
        assert cv2.imread(str(folder / "pictures" / f"{stage}_worst.png")).shape[1] == 6 * 320
    assert f"tensorboard --logdir {folder}/tensorboard" in said
    assert f"--output_dir {folder} --resume_from_checkpoint latest" in said
    assert load_file(folder / "ssl" / "student" / "model.safetensors").keys()
    labeled = json.loads((folder / "labelled_ann_ids.json").read_text())
    assert (labeled["labels"], labeled["labels_by"], len(labeled["ann_ids"])) == (4, "first", 4)
    assert "people: 4 train, 8 val, 11 unlabeled" in said, "three people are withheld"


def test_tensorboard_groups_its_values_and_has_ap_as_the_tables(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    groups = {}
    for stage in ("phase2", "ssl"):
        events = EventAccumulator(str(folder / "tensorboard" / stage)).Reload()
        tags = events.Tags()
        groups[stage] = {tag.split("/")[0] for tag in (*tags["scalars"], *tags["images"])}
        assert {"train/loss", "train/lr", "eval/AP", "eval/AP50", "eval/mean_px"} <= set(tags["scalars"])
        assert {"train/crops", "eval/predictions", "eval/worst"} <= set(tags["images"])
        saved = json.loads((folder / stage / "eval.json").read_text())
        assert events.Scalars("eval/AP")[-1].value == pytest.approx(100 * saved["AP"], abs=1e-4)
        assert events.Scalars("eval/mean_px")[-1].value == pytest.approx(saved["mean_px"], rel=1e-6)
    assert groups == {"phase2": {"train", "eval"}, "ssl": {"train", "eval", "ssl"}}
    assert {"ssl/keep", "ssl/keep/nose", "ssl/loss_unlabelled", "ssl/pseudo_precision"} <= set(tags["scalars"])
    assert {"ssl/panel", "ssl/calibration"} <= set(tags["images"]) and "eval/student_AP" in tags["scalars"]


TAUGHT = {
    "loss_labelled",
    "loss_unlabelled",
    "weight_unlabelled",
    "grad_ratio",
    "keep",
    *(f"keep/{name}" for name in COCO17.names),
}
TAUGHT |= {"teacher_peak", "teacher_peak_p99", "spread", "spread_labelled", "ema_moved"}


def test_every_step_has_a_line(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    lines = _lines(folder)
    for stage, last in (("phase1", 2), ("phase2", 80), ("ssl", 2)):
        steps = [line for line in lines if line["stage"] == stage and "loss" in line]
        assert [line["step"] for line in steps] == list(range(1, last + 1))
        keys = {"stage", "step", "loss", "lr", "grad_norm", "skipped"}
        teacher = TAUGHT if stage == "ssl" else set()
        assert all(set(line) - OF_THE_MACHINE == keys | teacher for line in steps)
        assert all(line["people_per_second"] > 0 for line in steps)
        assert all(np.isfinite(line["loss"]) and line["loss"] > 0 and line["lr"] > 0 for line in steps)
        scores = [line for line in lines if line["stage"] == stage and "AP" in line]
        labels = {"pseudo_precision", "pseudo_precision_absent_wrong", "pseudo_coverage", "pseudo_oks"}
        labels |= {"pseudo_precision_stderr"}
        labels |= {f"pseudo_{share}/{name}" for share in ("precision", "coverage") for name in COCO17.names}
        ends = labels | {"student_AP", "oks_gain", "oks_gain_stderr"}
        beside = [set(), ends] if stage == "ssl" else [set()]  # where it begins, where it ends
        assert [set(line) for line in scores] == [{"stage", "step", *UNITS} | more for more in beside]
    losses = [line["loss"] for line in lines if line["stage"] == "phase2" and "loss" in line]
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5]), "it learns"


def test_the_table_is_what_the_files_say(finished: tuple[Path, str]) -> None:
    folder, said = finished
    table = _table(said)
    assert list(table) == list(STAGES)
    for stage in STAGES:
        saved = json.loads((folder / stage / "eval.json").read_text())
        assert (saved["split"], saved["boxes"], saved["flip"]) == ("train", "ground truth", False)
        shown = [saved[name] * (100 if unit == "%" else 1) for name, unit in UNITS.items()]
        assert table[stage] == pytest.approx(shown, abs=0.0501)
    assert table["phase2"][0] > 5, "an AP of nothing would prove nothing"


def test_eval_prints_the_same_numbers(finished: tuple[Path, str], cache: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished[0], tmp_path / "run"))
    evaluated = _run("eval.py", cache, folder, "--data.num_workers", "0")
    assert _table(evaluated) == _table(finished[1])
    written = json.loads((folder / "eval.json").read_text())
    assert list(written) == list(STAGES)
    for stage in STAGES:
        trained = json.loads((finished[0] / stage / "eval.json").read_text())
        assert [written[stage][name] for name in METRICS] == pytest.approx(
            [trained[name] for name in METRICS], abs=1e-9
        )
        assert (written[stage]["split"], written[stage]["flip"]) == ("train", False)
        # What was trained stays finished: a resumed run must not train it again because it was evaluated.
        last = 80 if stage == "phase2" else 2
        assert stage in run_folder.read_finished(folder, {stage: last}, "latest")
        assert not run_folder.read_finished(folder, {stage: last + 1}, "latest")


# ---- A run that was cut goes on


# The teacher follows quickly and everything is learned from: one that was not restored would show in the first loss.
SIX = {
    "phase2": ["--phase2.steps", "6", "--phase2.global_batch", "4", "--memory.micro_batch", "2"],
    "ssl": ["--weights", "random", "--ssl.steps", "6", "--ssl.global_batch", "4", "--ssl.optim.lr", "1e-2",
            "--ssl.teacher.ema_decay", "0.6", "--ssl.teacher.threshold", "-1", "--ssl.teacher.ramp", "0.3",
            "--ssl.hand_over", "last"],
}  # fmt: skip


@pytest.mark.parametrize("stage", ["phase2", "ssl"])
def test_a_cut_run_goes_on_bit_for_bit(cache: Path, drawn: Path, tmp_path: Path, stage: str) -> None:
    words = [*SMALL, "--data.root", drawn, "--stage", stage, *SIX[stage]]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    _run("train.py", cache, *words, "--output_dir", whole)
    _run("train.py", cache, *words, "--output_dir", cut, "--max_steps", 3, "--save_every", 3)
    assert [line["step"] for line in _lines(cut) if "loss" in line] == [1, 2, 3]
    assert (cut / stage / "checkpoints" / "step_3").is_dir()
    said = _run("train.py", cache, *words, "--output_dir", cut, "--max_steps", 6, "--resume_from_checkpoint", "latest")
    assert re.search(rf"{stage}: steps 4 to 6", said)
    ours, theirs = (_steps(folder) for folder in (cut, whole))
    assert [line["step"] for line in ours] == [1, 2, 3, 4, 5, 6]
    assert ours == theirs
    if stage == "ssl":
        assert all(line["loss_unlabelled"] > 0 and line["keep"] > 0 for line in theirs)
        assert len({line["teacher_peak"] for line in theirs}) == 6
    for name in ("weights", "student") if stage == "ssl" else ("weights",):
        a, b = (load_file(folder / stage / name / "model.safetensors") for folder in (cut, whole))
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def _steps(folder: Path) -> list[dict[str, Any]]:
    """Every number of every step but those of the machine."""
    return [{k: v for k, v in line.items() if k not in OF_THE_MACHINE} for line in _lines(folder) if "loss" in line]
