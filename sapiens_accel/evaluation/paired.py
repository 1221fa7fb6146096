"""Two evaluations of the same people, compared person by person."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from numpy import ndarray as Array

from sapiens_accel.data.people import People, keypoints_of
from sapiens_accel.evaluation.predict import Predictions
from sapiens_accel.pose.oks import is_predicted, similarities
from sapiens_accel.pose.skeleton import Skeleton
from sapiens_accel.pose.visibility import is_labeled

MIN_ERRORS = 2.0  # standard errors: a mean difference that is nearer to 0 may be chance (5 % of those that are)


def person_oks(own: Predictions, people: People, skeleton: Skeleton) -> Float[Array, "n"]:
    """The OKS of each labeled person, 0 without a prediction, nan without a labeled keypoint.

    Args:
        own: predictions in the order of the people's rows.
    """
    labels, areas = keypoints_of(people.rows), np.asarray(people.rows["area"][:], dtype=np.float64)
    labeled = is_labeled(labels)
    similar = similarities(own.points_xy, labels[..., :2], areas, skeleton.sigmas)
    similar = similar * is_predicted(own.points_xy, own.scores)[:, None]
    num = labeled.sum(axis=1)
    return np.where(num > 0, (similar * labeled).sum(axis=1) / np.maximum(num, 1), np.nan)


def mean_oks(values: Sequence[float] | None) -> float:
    """The mean over those people who have a labeled keypoint; nan of none."""
    known = [value for value in values or () if math.isfinite(value)]
    return math.fsum(known) / len(known) if known else math.nan


class PairedDifference(NamedTuple):
    """The mean of a difference over people, its standard error (nan of fewer than two), and how many they are."""

    mean: float
    stderr: float
    num: int

    @property
    def is_known(self) -> bool:
        """Whether the mean is more than two standard errors from 0."""
        return abs(self.mean) > MIN_ERRORS * self.stderr  # false of nan

    def __str__(self) -> str:
        return f"{self.mean:+.4f}, standard error {self.stderr:.4f}, {self.num} people"


def paired_difference(before: Sequence[float], after: Sequence[float]) -> PairedDifference:
    """How much larger values are than those of the same people before. People who are nan in either do not count.

    The standard error is s / sqrt(n), s the standard deviation of the single differences (n - 1 in its denominator).
    """
    differences = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    differences = differences[np.isfinite(differences)]
    num = len(differences)
    stderr = float(differences.std(ddof=1)) / math.sqrt(num) if num > 1 else math.nan
    return PairedDifference(float(differences.mean()) if num else math.nan, stderr, num)
