"""The hold-out against arithmetic of its own, with a teacher that knows the answers; whole runs that are in trouble."""

import copy
import dataclasses
import json
import math
import os
import re
import subprocess
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import forks
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sapiens_accel.config.schema import AugmentConfig, DataConfig, TeacherConfig
from sapiens_accel.data import build
from sapiens_accel.data.augment import Augmenter
from sapiens_accel.models import export
from sapiens_accel.models import load as weights
from sapiens_accel.models.sapiens import SapiensPose
from sapiens_accel.pose.heatmap import Codec
from sapiens_accel.pose.skeleton import COCO17
from sapiens_accel.sources import synthetic
from sapiens_accel.training import run_folder
from sapiens_accel.training.ema import MovingAverage
from sapiens_accel.training.mean_teacher import MeanTeacher, TeacherSetup, cut_out
from sapiens_accel.training.objectives import Supervised
from sapiens_accel.training.pseudo_label_quality import Holdout, LabeledPair, panel, probe

ROOT = Path(__file__).resolve().parents[2]
INPUT_HW = (128, 96)
CODEC = Codec(input_hw=INPUT_HW, heatmap_hw=(64, 48), sigma=2.0)
DIAGONAL = math.hypot(*INPUT_HW)
MIRROR = list(COCO17.mirror)


# ---- The hold-out


@pytest.fixture(scope="module")
def holdout(tmp_path_factory: pytest.TempPathFactory) -> Holdout:
    root = synthetic.write(tmp_path_factory.mktemp("holdout") / "drawn", num_train=4, num_unlabelled=4, num_val=40)
    file = root / DataConfig.val_annotations
    tree, rng = json.loads(file.read_text()), np.random.default_rng(0)
    for person in tree["annotations"]:
        for k in np.flatnonzero(rng.random(17) < 0.2):
            person["keypoints"][3 * k + 2] = 0  # nobody has labeled it, but the teacher speaks of it all the same
    file.write_text(json.dumps(tree))
    knobs = DataConfig(root=str(root), input_hw=INPUT_HW, num_workers=0, cache_dir=str(root.parent / "cache"))
    sets = build.open_people(knobs, COCO17, unlabeled=False)
    augmenter = Augmenter(config=AugmentConfig(), skeleton=COCO17, input_hw=INPUT_HW)
    return Holdout(sets.val, augmenter, knobs, num_cutouts=2, seed=0)


def _applied(matrix: np.ndarray, points_xy: np.ndarray) -> np.ndarray:
    x, y = points_xy.T
    rows = [matrix[i, 0] * x + matrix[i, 1] * y + matrix[i, 2] for i in (0, 1)]
    return np.stack(rows, axis=1)


class Answers:
    """By hand, in float64: the truth in both views of each person, and what a teacher with given errors says."""

    def __init__(self, holdout: Holdout, far: float = 0.0, unsure: float = 0.0, swap: bool = False) -> None:
        rng = np.random.default_rng(7)
        self.images, self.weak_xy, self.heights = [], [], []
        self.right = self.judged = self.kept_true = self.true = self.kept = 0
        self.by_channel = np.zeros((2, 17), int)  # right and judged, by what the teacher calls them
        self.similarities: list[float] = []
        self.mirrored = 0
        for index in range(len(holdout)):
            known = holdout[index]
            row = holdout.people.rows[holdout.chosen[index]]
            keypoints = np.array(row["keypoints"])
            weak, weak_matrix = known.pair.weak, known.pair.weak.matrix.double().numpy()
            # The teacher names what it sees: in a mirrored image the left wrist looks like a right one.
            seen_weak = keypoints[MIRROR] if weak.flipped else keypoints
            weak_xy = _applied(weak_matrix, seen_weak[:, :2])
            # A point that is to be wrong goes an eighth of the diagonal towards the middle, others stay within a pixel.
            wrong = rng.random(17) < far
            middle = np.array([INPUT_HW[1] / 2, INPUT_HW[0] / 2])
            towards = (middle - weak_xy) / (np.linalg.norm(middle - weak_xy, axis=1, keepdims=True) + 1e-9)
            said = np.where(wrong[:, None], weak_xy + towards * DIAGONAL / 8, weak_xy + rng.uniform(-1, 1, (17, 2)))
            sure = (rng.random(17) >= unsure) & self._inside(said, 6)
            self.images.append(weak.image)
            self.weak_xy.append(said[MIRROR] if swap else said)
            self.heights.append(np.where(sure[MIRROR] if swap else sure, 1.0, 0.1))
            self._count(known, row, said, sure)

    def _count(self, known: LabeledPair, row: Mapping[str, Any], said: np.ndarray, sure: np.ndarray) -> None:
        keypoints, weak, strong = np.array(row["keypoints"]), known.pair.weak, known.pair.strong
        weak_matrix, strong_matrix = weak.matrix.double().numpy(), strong.matrix.double().numpy()
        seen_strong = keypoints[MIRROR] if strong.flipped else keypoints
        true_xy = _applied(strong_matrix, seen_strong[:, :2])
        np.testing.assert_allclose(known.truth_xy.numpy(), true_xy, atol=1e-2)
        back = np.linalg.inv(np.vstack([weak_matrix, [0, 0, 1]]))
        found_xy = _applied(strong_matrix, _applied(back, said))
        if bool(weak.flipped) != bool(strong.flipped):
            found_xy, sure = found_xy[MIRROR], sure[MIRROR]
            self.mirrored += 1
        kept = sure & self._inside(found_xy, 0)
        kept &= kept.sum() >= 4
        labeled = seen_strong[:, 2] > 0
        error = np.linalg.norm(found_xy - true_xy, axis=1)
        # Nothing stands so near a border that the rounding of the heatmap could push it over.
        assert (np.abs(error[kept] - 0.05 * DIAGONAL) > 0.3).all()
        self.right += (kept & labeled & (error <= 0.05 * DIAGONAL)).sum()
        self.judged += (kept & labeled).sum()
        self.kept += kept.sum()
        counts = np.stack([kept & labeled & (error <= 0.05 * DIAGONAL), kept & labeled])
        self.by_channel += counts[:, MIRROR] if bool(weak.flipped) != bool(strong.flipped) else counts
        true = labeled & self._inside(true_xy, 0)
        self.true += true.sum()
        self.kept_true += (true & kept).sum()
        area = row["area"] * abs(strong_matrix[0, 0] * strong_matrix[1, 1] - strong_matrix[0, 1] * strong_matrix[1, 0])
        if (kept & labeled).any():
            spread = 2 * area * (2 * np.array(COCO17.sigmas)) ** 2
            self.similarities.append(np.exp(-(error**2) / spread)[kept & labeled].mean())

    @staticmethod
    def _inside(points_xy: np.ndarray, margin: float) -> np.ndarray:
        last = np.array([INPUT_HW[1] - 1, INPUT_HW[0] - 1])
        return ((points_xy >= margin) & (points_xy <= last - margin)).all(axis=1)


class Knowing(nn.Module):
    """Knows each weak view by its pixels, and draws the answer."""

    def __init__(self, answers: Answers) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))
        self.answers = {
            image.numpy().tobytes(): (torch.tensor(points_xy).float(), torch.tensor(heights).float())
            for image, points_xy, heights in zip(answers.images, answers.weak_xy, answers.heights, strict=True)
        }

    def forward(self, image: Tensor) -> Tensor:
        points_xy, heights = zip(*(self.answers[one.numpy().tobytes()] for one in image), strict=True)
        maps, _ = CODEC.encode(torch.stack(points_xy), torch.ones(len(image), 17))
        return self.gain * torch.stack(heights)[..., None, None] * maps


def _objective(answers: Answers) -> MeanTeacher:
    supervised, teacher = Supervised(codec=CODEC), Knowing(answers)
    setup = TeacherSetup(
        average=MovingAverage(teacher), student_parameters=list, num_steps=100, gather=lambda tensor: tensor
    )
    objective = MeanTeacher(supervised, setup, TeacherConfig(), MIRROR, COCO17.names)
    objective.reference = torch.ones(17)
    return objective


@pytest.mark.parametrize(("far", "unsure"), [(0.0, 0.0), (0.3, 0.0), (0.3, 0.4), (0.0, 0.8)])
def test_the_hold_out_measures_what_its_labels_say(holdout: Holdout, far: float, unsure: float) -> None:
    answers = Answers(holdout, far, unsure)
    values, *_ = probe(_objective(answers), holdout, batch_size=16)
    assert answers.mirrored > 10 and answers.judged > 30
    assert values["pseudo_precision"] == pytest.approx(answers.right / answers.judged, abs=1e-12)
    share, num = (answers.right + 2) / (answers.judged + 4), answers.judged + 4
    assert values["pseudo_precision_stderr"] == pytest.approx((share * (1 - share) / num) ** 0.5, abs=1e-12)
    assert values["pseudo_coverage"] == pytest.approx(answers.kept_true / answers.true, abs=1e-12)
    assert values["pseudo_precision_absent_wrong"] == pytest.approx(answers.right / answers.kept, abs=1e-12)
    assert answers.kept > 1.1 * answers.judged, "it keeps what nobody has labeled"
    for name, right, judged in zip(COCO17.names, *answers.by_channel, strict=True):
        expected = right / judged if judged else math.nan
        assert values[f"pseudo_precision/{name}"] == pytest.approx(expected, abs=1e-12, nan_ok=True)
    assert values["pseudo_oks"] == pytest.approx(np.mean(answers.similarities), abs=5e-3)
    if far:
        assert values["pseudo_precision"] == pytest.approx(1 - far, abs=0.06)
    else:
        assert values["pseudo_precision"] == 1


def test_where_v_0_means_absent_what_is_kept_of_it_is_wrong(holdout: Holdout) -> None:
    answers, absent = Answers(holdout, 0.3), copy.copy(holdout)
    absent.config = dataclasses.replace(holdout.config, absent_is_background=True)
    values, _, judged = probe(_objective(answers), absent, batch_size=16)
    assert values["pseudo_precision"] == pytest.approx(answers.right / answers.kept, abs=1e-12)
    assert (judged.counted & ~judged.labeled).any() and not (judged.right & ~judged.labeled).any()
    _, _, judged = probe(_objective(answers), holdout, batch_size=16)
    assert not (judged.counted & ~judged.labeled).any(), "else nothing is known of it"


def test_left_and_right_taken_for_each_other_are_seen(holdout: Holdout) -> None:
    """All points are on keypoints, but on those of the other side: only the midline's nose is right, and near pairs."""
    values, *_ = probe(_objective(Answers(holdout, swap=True)), holdout, batch_size=16)
    assert values["pseudo_precision"] < 0.75
    assert values["pseudo_oks"] < 0.6


def test_nothing_kept_is_no_precision(holdout: Holdout) -> None:
    values, seen, _ = probe(_objective(Answers(holdout, unsure=1.0)), holdout, batch_size=16)
    assert values["pseudo_coverage"] == 0
    assert math.isnan(values["pseudo_precision"] + values["pseudo_precision_stderr"]) and math.isnan(
        values["pseudo_oks"]
    )
    assert panel(seen, COCO17).any()


def test_asking_changes_nothing(holdout: Holdout) -> None:
    objective = _objective(Answers(holdout, far=0.3))
    before, draws = copy.deepcopy(objective.state_dict()), torch.get_rng_state()
    first, *_ = probe(objective, holdout, batch_size=16)
    again, *_ = probe(objective, holdout, batch_size=7)
    assert first == pytest.approx(again, abs=1e-9, nan_ok=True), "neither the time nor the batches matter"
    assert torch.equal(draws, torch.get_rng_state())
    after = objective.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


def test_two_ranks_find_what_one_does(holdout: Holdout) -> None:
    answers = Answers(holdout, far=0.3, unsure=0.2)
    alone, *_ = probe(_objective(answers), holdout, batch_size=16)
    barrier, slots = threading.Barrier(2, timeout=60), [torch.empty(0)] * 2

    def of_rank(rank: int) -> tuple[dict[str, float], int]:
        def gather(tensor: Tensor) -> Tensor:
            slots[rank] = tensor
            barrier.wait()
            whole = torch.cat(slots)
            barrier.wait()  # before either writes its next part
            return whole

        share = {"rank": rank, "num_ranks": 2, "gather": gather}
        values, seen, _ = probe(_objective(answers), copy.deepcopy(holdout), batch_size=16, **share)
        return values, len(seen)

    with ThreadPoolExecutor(2) as ranks:
        (first, seen), (second, _) = ranks.map(of_rank, range(2))
    assert first == pytest.approx(second, abs=0, rel=0, nan_ok=True) and seen == 6
    assert first == pytest.approx(alone, abs=1e-12, nan_ok=True)


def test_the_hold_out_is_spread_over_the_set(holdout: Holdout, monkeypatch: pytest.MonkeyPatch) -> None:
    assert holdout.chosen == list(range(40))
    monkeypatch.setattr("sapiens_accel.training.pseudo_label_quality.NUM_HOLDOUT", 8)
    few = Holdout(holdout.people, holdout.augmenter, holdout.config, num_cutouts=2, seed=0)
    assert (len(few), few.chosen[0], few.chosen[-1]) == (8, 0, 39)
    assert set(np.diff(few.chosen)) <= {5, 6}


def test_a_panel_has_a_column_for_each_person_and_shows_what_the_student_sees(holdout: Holdout) -> None:
    _, seen, _ = probe(_objective(Answers(holdout, far=0.3)), holdout, batch_size=16)
    picture = panel(seen, COCO17)
    height, width = 384, 288
    assert picture.shape == (3 * height, 6 * width, 3) and picture.dtype == np.uint8
    for column, (known, prediction) in enumerate(seen):
        cells = [picture[r * height : (r + 1) * height, column * width : (column + 1) * width] for r in range(3)]
        images = known.pair.weak.image, cut_out(known.pair, prediction.points_xy), known.pair.strong.image
        for cell, image in zip(cells, images, strict=True):
            alike = cv2.resize(image[0].permute(1, 2, 0).numpy(), (width, height), interpolation=cv2.INTER_LINEAR)
            different = np.abs(cell.astype(int) - alike).max(axis=-1)[20:] > 40
            assert 0 < different.mean() < 0.25, "the view, with something drawn on it"
    wrong = (picture[2 * height :] == (255, 40, 40)).all(axis=-1)
    right = (picture[2 * height :] == (60, 220, 60)).all(axis=-1)
    assert wrong.any() and right.any()
    _, all_right, _ = probe(_objective(Answers(holdout)), holdout, batch_size=16)
    assert not (panel(all_right, COCO17)[2 * height :] == (255, 40, 40)).all(axis=-1).any()


# ---- Whole runs

COMMON = [
    "--data.synthetic.num_train=24", "--data.synthetic.num_unlabelled=16", "--data.synthetic.num_val=6",
    "--data.num_workers=0", "--data.input_hw=[64,48]", "--log_every=1", "--ssl.global_batch=8", "--stage=ssl",
]  # fmt: skip
# Decay takes all weights to 0 as the rate rises, and the teacher follows at once: heatmaps go flat.
WITHER = ["--ssl.steps=200", "--max_steps=20", "--ssl.optim.warmup_steps=4", "--ssl.optim.lr=1e-4",
          "--ssl.optim.weight_decay=1e4", "--ssl.teacher.ema_decay=0"]  # fmt: skip


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def peaked(cache: Path) -> Path:
    """Weights with clear peaks, whatever they see: an untrained head is as flat as a withered one."""
    torch.manual_seed(0)
    model = SapiensPose("sapiens_tiny", 17, (64, 48))
    with torch.no_grad():
        model.head.final_layer.weight.normal_(std=0.08)
    export.export(cache / "peaked", model.state_dict(), model, COCO17, 1.0)
    return cache / "peaked"


def _train(cache: Path, folder: Path, *words: object) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "SAPIENS_ACCEL_CACHE": str(cache)}
    return forks.run(["train.py", *COMMON, f"--output_dir={folder}", *words], env=env)


def _lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.launch
def test_a_stage_is_seen_while_it_runs(cache: Path, peaked: Path) -> None:
    folder = cache / "seen"
    done = _train(cache, folder, f"--weights={peaked}", "--ssl.steps=5", "--eval_every=2", "--ssl.teacher.threshold=0")
    assert done.returncode == 0, done.stderr
    # Without a terminal, the first and the last step at least, however soon they come.
    assert re.search(r"^ssl: step 1 of 5, loss \S+, keep \S+, peak \S+, people/s \S+$", done.stdout, re.MULTILINE)
    assert "ssl: step 5 of 5, loss " in done.stdout
    judged = {line["step"]: line for line in _lines(folder) if "pseudo_coverage" in line}
    assert list(judged) == [1, 2, 4, 5]
    assert [line["step"] for line in _lines(folder) if "AP" in line] == [0, 2, 4, 5]
    for step, line in judged.items():
        assert {"pseudo_precision", "pseudo_oks"} <= line.keys()
        scores = {"AP", "AP50", "student_AP", "oks_gain", "oks_gain_stderr"}
        assert scores <= line.keys() if step > 1 else not scores & line.keys(), "there is no reference before a step"
        assert 0 <= line["pseudo_precision"] <= 1 and 0 < line["pseudo_coverage"] <= 1
        picture = cv2.imread(str(folder / "pictures" / f"ssl_panel_{step}.jpg"))
        assert picture is not None and picture.std() > 5
    assert {"student_AP", "pseudo_precision", "step"} <= json.loads((folder / "ssl" / "eval.json").read_text()).keys()
    board = next((folder / "tensorboard" / "ssl").iterdir()).read_bytes()
    assert b"panel" in board and b"pseudo_precision" in board and b"student_AP" in board
    assert run_folder.read_finished(folder, {"ssl": 5}, "latest")


@pytest.mark.launch
def test_a_stage_that_collapses_stops_and_leaves_its_last_good_weights(cache: Path, peaked: Path) -> None:
    folder = cache / "withered"
    words = [f"--weights={peaked}", "--eval_every=2", "--report_to=none", *WITHER]
    done = _train(cache, folder, *words)
    assert done.returncode == 2, done.stdout + done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("train.py: error:")]
    assert len(said) == 1 and "Traceback" not in done.stderr
    good = folder / "ssl" / "weights"
    assert "--ssl.teacher.weight" in said[0] and said[0].endswith(f"the last good weights are in {good}")
    lines = _lines(folder)
    assert said[0].endswith(lines[-1]["stopped"])
    peaks = [line["teacher_peak"] for line in lines if "teacher_peak" in line]
    assert all(peak < peaks[0] / 2 for peak in peaks[-3:]) and not any(peak < peaks[0] / 2 for peak in peaks[:-3])
    # They are of an evaluation before it began, and still say something.
    for name in ("weights", "student"):
        model = SapiensPose("sapiens_tiny", 17, (64, 48))
        weights.load(model, str(folder / "ssl" / name))
        assert model.head.final_layer.weight.std() > 0.03
    assert not run_folder.read_finished(folder, {"ssl": 20}, "latest"), "a stop does not look finished"


@pytest.mark.slow
@pytest.mark.launch
def test_without_an_evaluation_a_stop_leaves_the_weights_it_started_from(cache: Path, peaked: Path) -> None:
    folder = cache / "withered at once"
    done = _train(cache, folder, f"--weights={peaked}", "--report_to=none", *WITHER)
    assert done.returncode == 2
    said = [line for line in done.stderr.splitlines() if line.startswith("train.py: error:")]
    good = folder / "ssl" / "weights"
    assert len(said) == 1 and said[0].endswith(f"the last good weights are in {good}")
    assert (good / "model.safetensors").read_bytes() == (peaked / "model.safetensors").read_bytes()
    assert [line["step"] for line in _lines(folder) if "pseudo_coverage" in line] == [1]
    assert [line["step"] for line in _lines(folder) if "AP" in line] == [0], "no other evaluation was asked for"
