"""Paired differences against scipy, and OKS of people against COCO's own terms."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from sapiens_accel.config.schema import DataConfig
from sapiens_accel.data import build
from sapiens_accel.data.people import keypoints_of
from sapiens_accel.evaluation.paired import mean_oks, paired_difference, person_oks
from sapiens_accel.evaluation.predict import Predictions
from sapiens_accel.pose.skeleton import COCO17
from sapiens_accel.sources import synthetic


def test_the_standard_error_is_that_of_the_paired_t_test() -> None:
    rng = np.random.default_rng(0)
    before = rng.uniform(0, 1, 57)
    after = before + rng.normal(0.01, 0.05, 57)
    found = paired_difference([*before, math.nan, 0.3], [*after, 0.9, math.nan])
    test = stats.ttest_rel(after, before)
    assert found.num == 57, "who has no label in either is no pair"
    assert found.mean == pytest.approx(np.mean(after - before), abs=1e-15)
    assert found.mean / found.stderr == pytest.approx(test.statistic, rel=1e-12)
    assert found.is_known == (abs(test.statistic) > 2)


def test_pairing_sees_what_two_means_do_not() -> None:
    """The same small gain of everybody: people differ by far more than it."""
    before = np.linspace(0, 0.9, 40)
    after = before + 0.01 + 0.002 * np.where(np.arange(40) % 2, 1, -1)
    assert paired_difference(before.tolist(), after.tolist()).is_known
    assert abs(stats.ttest_ind(after, before).statistic) < 0.5


@pytest.mark.parametrize("values", [[], [0.5], [math.nan]])
def test_of_few_people_nothing_is_known(values: list[float]) -> None:
    found = paired_difference(values, [value + 0.3 for value in values])
    assert math.isnan(found.stderr) and not found.is_known
    assert math.isnan(mean_oks([math.nan])) and mean_oks([0.2, math.nan, 0.4]) == pytest.approx(0.3)


def test_the_oks_of_a_person_is_cocos(tmp_path: Path) -> None:
    root = synthetic.write(tmp_path / "drawn", num_train=2, num_unlabelled=2, num_val=5)
    data = DataConfig(root=str(root), input_hw=(64, 48), num_workers=0, cache_dir=str(tmp_path / "cache"))
    people = build.open_people(data, COCO17, unlabeled=False).val
    labels = keypoints_of(people.rows).copy()
    labels[1, :, 2], labels[2, ::2, 2] = 0, 0
    feature = people.rows.features["keypoints"]
    rows = people.rows.remove_columns("keypoints").add_column("keypoints", labels.tolist(), feature=feature)
    people = dataclasses.replace(people, rows=rows)
    found_xy = labels[..., :2] + np.random.default_rng(1).normal(0, 3, labels[..., :2].shape)
    scores = np.ones(labels.shape[:2])
    found_xy[4], scores[4] = 0, 0
    values = person_oks(Predictions(points_xy=found_xy, scores=scores), people, COCO17)
    assert math.isnan(values[1]) and values[4] == 0
    for person in (0, 2, 3):
        terms = [
            math.exp(-math.dist(found_xy[person, k], labels[person, k, :2]) ** 2
                     / (2 * people.rows["area"][person] * (2 * COCO17.sigmas[k]) ** 2))
            for k in range(17) if labels[person, k, 2] > 0
        ]  # fmt: skip
        assert values[person] == pytest.approx(np.mean(terms), abs=1e-9)
