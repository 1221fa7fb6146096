"""Points against points: OKS, suppression of duplicates, a person's score; and what single keypoints are worth.

Shape letters: n people (or predictions of one), k keypoints. All in image px.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray as Array

from sapiens_accel.pose.visibility import is_labeled

NEAR, PCK_10, PCK_5 = 0.2, 0.1, 0.05  # PCK: of the longer side of the person's box
# A person's area where the annotations have none, as a share of the box: the evaluation of CrowdPose
# (https://github.com/Jeff-sjtu/CrowdPose), and mmpose's of AI Challenger, JHMDB and others.
AREA_OF_BOX = 0.53
RIGHT = 0.5  # OKS of one keypoint above which it counts as right, for its calibration
NUM_BINS = 10


class Distances(NamedTuple):
    """How far predicted keypoints are from labeled ones; nan where no keypoint is labeled.

    Attributes:
        mean_px, median_px: px of the image, over the people who have a prediction.
        pck_10, pck_5: the shares within 0.1 and 0.05 of the longer side of the person's labeled box, as
            `KeypointQuality.pck`; of a person without a prediction none is.
    """

    mean_px: Float[Array, "*k"]
    median_px: Float[Array, "*k"]
    pck_10: Float[Array, "*k"]
    pck_5: Float[Array, "*k"]


@dataclass(frozen=True, kw_only=True)
class KeypointQuality:
    """How good the predictions of a set of people's labeled keypoints are; nan where no person has one.

    Attributes:
        count: how many people have each keypoint.
        oks: its mean similarity exp(-d^2 / (2 area (2 sigma)^2)).
        pck: the share whose distance is at most 0.2 of the longer side of the person's labeled box: PCK as Yang and
            Ramanan define it (Articulated human detection with flexible mixtures of parts, TPAMI 2013, section 7).
        distances: of each keypoint.
        mean_oks, mean_pck, all_distances: over all labeled keypoints.
        ece: expected calibration error of the scores; see `calibration_error`.
    """

    count: Int[Array, "k"]
    oks: Float[Array, "k"]
    pck: Float[Array, "k"]
    distances: Distances
    mean_oks: float
    mean_pck: float
    all_distances: Distances
    ece: float


def person_scores(scores: Float[Array, "n k"], threshold: float) -> Float[Array, "n"]:
    """Mean of each person's keypoint scores above the threshold; 0 where there is none."""
    counted = scores > threshold
    return (scores * counted).sum(axis=1) / np.maximum(counted.sum(axis=1), 1)


def similarities(
    points_xy: Float[Array, "*n k 2"],
    others_xy: Float[Array, "n k 2"],
    areas: Float[Array, "n"],
    sigmas: Sequence[float],
) -> Float[Array, "n k"]:
    """Each keypoint's term of OKS: exp(-d^2 / (2 area (2 sigma)^2)), https://cocodataset.org/#keypoints-eval."""
    variances = (2 * np.array(sigmas)) ** 2
    squared = ((others_xy - points_xy) ** 2).sum(axis=-1)
    return np.exp(-squared / (2 * variances * (areas[:, None] + np.spacing(1))))


def oks(
    points_xy: Float[Array, "k 2"],
    others_xy: Float[Array, "n k 2"],
    areas: Float[Array, "n"],
    sigmas: Sequence[float],
    counted: Bool[Array, "k"] | None = None,
) -> Float[Array, "n"]:
    """Object keypoint similarity: the mean of `similarities`.

    Args:
        areas: px^2, one for each comparison.
        counted: the keypoints that count; all of them by default.
    """
    terms = similarities(points_xy, others_xy, areas, sigmas)
    return terms.mean(axis=-1) if counted is None else terms[:, counted].mean(axis=-1)


def oks_nms(
    points_xy: Float[Array, "n k 2"],
    scores: Float[Array, "n"],
    areas: Float[Array, "n"],
    sigmas: Sequence[float],
    threshold: float,
) -> Int[Array, "m"]:
    """Indices of the people that stay, best first: of two whose OKS is above the threshold, the better one."""
    left, kept = np.argsort(-scores, kind="stable"), []
    while len(left):
        best, rest = left[0], left[1:]
        kept.append(best)
        # The mean of both areas, as the reference takes it.
        similarity = oks(points_xy[best], points_xy[rest], (areas[best] + areas[rest]) / 2, sigmas)
        left = rest[similarity <= threshold]
    return np.array(kept, dtype=int)


def measure_points(
    predicted_xy: Float[Array, "n k 2"],
    scores: Float[Array, "n k"],
    labels: Float[Array, "n k 3"],
    areas: Float[Array, "n"],
    boxes_xywh: Float[Array, "n 4"],
    sigmas: Sequence[float],
) -> KeypointQuality:
    """What each keypoint is worth, over the people who have it labeled.

    Args:
        predicted_xy, scores: each person's prediction; all 0 is none: its keypoints have an OKS of 0 and are not near.
        labels: x, y and v; those without label do not count.
        areas, boxes_xywh: the persons' own, as labeled.
    """
    labeled = is_labeled(labels)
    predicted = is_predicted(predicted_xy, scores)[:, None]
    similar = similarities(predicted_xy, labels[..., :2], areas, sigmas) * predicted
    distance = np.linalg.norm(predicted_xy - labels[..., :2], axis=-1)
    share = distance / boxes_xywh[:, 2:].max(axis=1)[:, None]
    near = predicted & (distance <= NEAR * boxes_xywh[:, 2:].max(axis=1)[:, None])
    measured = labeled & predicted
    whole = measure_distances(*(values.reshape(-1, 1) for values in (distance, share, labeled, measured)))
    return KeypointQuality(
        count=labeled.sum(axis=0),
        oks=_mean(similar, labeled),
        pck=_mean(near, labeled),
        distances=measure_distances(distance, share, labeled, measured),
        mean_oks=float(_mean(similar.ravel(), labeled.ravel())),
        mean_pck=float(_mean(near.ravel(), labeled.ravel())),
        all_distances=Distances(*(values[0] for values in whole)),
        ece=calibration_error(scores[labeled], similar[labeled] > RIGHT),
    )


def measure_distances(
    distance: Float[Array, "n k"], share: Float[Array, "n k"], labeled: Bool[Array, "n k"], measured: Bool[Array, "n k"]
) -> Distances:
    """Distances of each column, in px and as shares of the person's box.

    Args:
        measured: labeled keypoints of a person who has a prediction; the other labeled ones are wrong, at no distance.
    """
    columns = zip(distance.T, measured.T, strict=True)
    medians = np.array([np.median(column[counted]) if counted.any() else np.nan for column, counted in columns])
    return Distances(
        mean_px=_mean(distance, measured),
        median_px=medians,
        pck_10=_mean(measured & (share <= PCK_10), labeled),
        pck_5=_mean(measured & (share <= PCK_5), labeled),
    )


def is_predicted(predicted_xy: Float[Array, "n k 2"], scores: Float[Array, "n k"]) -> Bool[Array, "n"]:
    """Whether there is a prediction of each person at all: one of all zeros is none (an image without a box)."""
    return np.any(scores, axis=1) | np.any(predicted_xy, axis=(1, 2))


def calibration_error(scores: Float[Array, "m"], right: Bool[Array, "m"]) -> float:
    """Expected calibration error (Guo et al. 2017, https://arxiv.org/abs/1706.04599, equation 3).

    Scores, clipped to 0..1, in 10 bins of equal width (the upper edge belongs to a bin); the mean distance between a
    bin's score and its share of right keypoints, weighted by its size. nan without scores.
    """
    if not len(scores):
        return float("nan")
    scores = scores.clip(0.0, 1.0)
    bins = np.maximum(np.ceil(scores * NUM_BINS).astype(int) - 1, 0)
    # Of a bin with n of N members, n / N * |mean score - mean right| is |sum score - sum right| / N.
    return float(np.abs(np.bincount(bins, scores - right, NUM_BINS)).sum() / len(scores))


def _mean(values: Array, counted: Bool[Array, "..."]) -> Array:
    """Over the first axis, of what is counted; nan where nothing is."""
    num = counted.sum(axis=0)
    return np.where(num > 0, (values * counted).sum(axis=0) / np.maximum(num, 1), np.nan)
