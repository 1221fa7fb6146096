"""Why a predicted person is not where it was labeled: a kind of error for each keypoint, a reason for each person.

The kinds are those of Ronchi and Perona 2017 (Benchmarking and Error Diagnosis in Multi-Instance Pose Estimation,
section 3.1, https://arxiv.org/abs/1707.05388), by keypoint similarity, the term of OKS:

    theirs      ours            the prediction's similarity is largest to, and is
    good        good            the true keypoint, at least 0.85
    jitter      imprecise       the true keypoint, 0.5 to 0.85
    inversion   left/right swap the mirrored keypoint of the same person, at least 0.5
    swap        wrong person    the same or the mirrored keypoint of another labeled person of the image, at least 0.5
    miss        missed keypoint    none of them: below 0.5

Ours also calls it a wrong person if a keypoint that would be missed lies at any other keypoint of another person.

Shape letters: n people, k keypoints, j labeled keypoints of the others. All in image px.
"""

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple, cast

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray as Array

from sapiens_accel.pose.oks import NUM_BINS, is_predicted, similarities
from sapiens_accel.pose.skeleton import Skeleton
from sapiens_accel.pose.visibility import is_labeled

GOOD_FROM, NEAR_FROM = 0.85, 0.5
MOST_NAMED = 6  # keypoints of a sentence; of a whole body's 133 there may be more
UNLABELED = -1  # in an array of kinds: nothing to compare with
NOBODY = "not found: no box in the image"


class Kind(IntEnum):
    """What is wrong with a predicted keypoint, the mildest first."""

    GOOD = 0
    IMPRECISE = 1
    SWAPPED = 2
    WRONG_PERSON = 3
    MISSED = 4

    @property
    def words(self) -> str:
        return ("good", "imprecise", "left/right swap", "wrong person", "missed keypoint")[self]


class Reason(NamedTuple):
    """What costs a person the most OKS, and all that is wrong, in words."""

    kind: Kind
    text: str


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """Predictions of labeled people, held against the labels.

    Attributes:
        oks: of each person.
        similar: of each keypoint: exp(-d^2 / (2 area (2 sigma)^2)).
        kinds: of each keypoint, a `Kind` or UNLABELED.
        is_predicted: whether there is a prediction at all; without one every keypoint is missed.
    """

    oks: Float[Array, "n"]
    similar: Float[Array, "n k"]
    kinds: Int[Array, "n k"]
    is_predicted: Bool[Array, "n"]

    def worst(self, num: int) -> Int[Array, "m"]:
        """The people of the lowest OKS, lowest first; of equals (to 1e-3) in their order."""
        return np.argsort(self.oks.round(3), kind="stable")[:num]

    def reason(self, person: int, skeleton: Skeleton) -> Reason:
        if not self.is_predicted[person]:
            return Reason(Kind.MISSED, NOBODY)
        return reason(self.kinds[person], self.similar[person], skeleton)

    def counts(self) -> Int[Array, "kinds k"]:
        """How many people have each keypoint of each kind."""
        return np.stack([(self.kinds == kind).sum(axis=0) for kind in Kind])


def diagnose(
    predicted_xy: Float[Array, "n k 2"],
    scores: Float[Array, "n k"],
    labels: Float[Array, "n k 3"],
    areas: Float[Array, "n"],
    image_ids: Sequence[int],
    skeleton: Skeleton,
) -> Diagnosis:
    """Diagnose each person's prediction.

    Args:
        scores: of keypoints; all 0 at (0, 0) is nobody (an image without a box).
        labels: x, y and visibility; those of visibility 0 do not count.
        areas: the persons' own, as labeled.
        image_ids: whose people may be taken for one another.
    """
    labeled, mirror = is_labeled(labels), list(skeleton.mirror)
    similar = similarities(predicted_xy, labels[..., :2], areas, skeleton.sigmas)
    to_mirror = similarities(predicted_xy, labels[:, mirror, :2], areas, skeleton.sigmas)
    # The midline mirrors onto itself.
    to_mirror = np.where(labeled[:, mirror] & (np.array(mirror) != np.arange(len(mirror))), to_mirror, 0.0)
    to_others, anywhere = _at_others(predicted_xy, labels, areas, image_ids, skeleton, np.maximum(similar, to_mirror))
    best = np.maximum(to_mirror, to_others)
    kinds = np.select(
        [(similar >= best) & (similar >= GOOD_FROM), (similar >= best) & (similar >= NEAR_FROM), best < NEAR_FROM],
        [Kind.GOOD, Kind.IMPRECISE, np.where(anywhere, Kind.WRONG_PERSON, Kind.MISSED)],
        np.where(to_mirror >= to_others, Kind.SWAPPED, Kind.WRONG_PERSON),
    )
    with_prediction = is_predicted(predicted_xy, scores)
    similar = similar * with_prediction[:, None]
    kinds = np.where(with_prediction[:, None], kinds, Kind.MISSED)
    return Diagnosis(
        oks=(similar * labeled).sum(axis=1) / np.maximum(labeled.sum(axis=1), 1),
        similar=similar,
        kinds=np.where(labeled, kinds, UNLABELED),
        is_predicted=with_prediction,
    )


def _at_others(
    predicted_xy: Float[Array, "n k 2"],
    labels: Float[Array, "n k 3"],
    areas: Float[Array, "n"],
    image_ids: Sequence[int],
    skeleton: Skeleton,
    to_own: Float[Array, "n k"],
) -> tuple[Float[Array, "n k"], Bool[Array, "n k"]]:
    """The largest similarity to another person's same or mirrored keypoint; whether it lies at any keypoint of one.

    Each similarity is by the other person's area. Other keypoints are compared only where nothing better explains it.
    """
    to_others, anywhere = np.zeros(labels.shape[:2]), np.zeros(labels.shape[:2], dtype=bool)
    mirror, sigmas = list(skeleton.mirror), np.array(skeleton.sigmas)
    by_image: dict[int, list[int]] = defaultdict(list)
    for person, image_id in enumerate(image_ids):
        by_image[image_id].append(person)
    for members in by_image.values():
        for person in members if len(members) > 1 else ():
            others = np.array([other for other in members if other != person])
            for order in (slice(None), mirror):
                other_labels = labels[others][:, order]
                near = similarities(predicted_xy[person], other_labels[..., :2], areas[others], skeleton.sigmas)
                to_others[person] = np.maximum(to_others[person], (near * is_labeled(other_labels)).max(axis=0))
            # By the constant of the keypoint that it lies at: [missed, j].
            missed = np.flatnonzero(np.maximum(to_own[person], to_others[person]) < NEAR_FROM)
            owner, keypoint = np.nonzero(is_labeled(labels[others]))
            apart = predicted_xy[person, missed][:, None] - labels[others][owner, keypoint][:, :2]
            variances = areas[others][owner] * (2 * sigmas[keypoint]) ** 2 + np.spacing(1)
            near = np.exp(-(apart**2).sum(axis=-1) / (2 * variances)) >= NEAR_FROM
            anywhere[person, missed] = near.any(axis=1)
    return to_others, anywhere


def reason(kinds: Int[Array, "k"], similar: Float[Array, "k"], skeleton: Skeleton) -> Reason:
    """One person's errors as a sentence, what costs the most OKS first."""
    losses = {kind: float((1 - similar[kinds == kind]).sum()) for kind in Kind if kind and (kinds == kind).any()}
    if not losses:
        return Reason(Kind.GOOD, "no error")
    ordered = sorted(losses, key=lambda kind: -losses[kind])
    num = int((kinds != UNLABELED).sum())
    parts = []
    for kind in ordered:
        keypoints = np.flatnonzero(kinds == kind).tolist()
        names = f"all {num} keypoints" if len(keypoints) == num > 2 else name_keypoints(keypoints, skeleton)
        parts.append(f"{names} {_ENDINGS[kind]}")
    return Reason(ordered[0], "; ".join(parts))


_ENDINGS = {
    Kind.IMPRECISE: "imprecise",
    Kind.SWAPPED: "swapped",
    Kind.WRONG_PERSON: "on another person",
    Kind.MISSED: "missed",
}


def name_keypoints(keypoints: Sequence[int], skeleton: Skeleton) -> str:
    """Keypoints in words, both sides of one as a pair: `left and right knee, ankle, left wrist, nose`.

    Numbered points of one thing are counted: `face (27 points)`.
    """
    there, pairs, single = set(keypoints), [], []
    for k in keypoints:
        name, other = skeleton.names[k], skeleton.mirror[k]
        side, rest = _sided(name)
        if side == "left" and other in there and other != k:
            pairs.append(rest)
        elif not (side == "right" and other in there and other != k):
            single.append(f"{side} {rest}".strip())
    pairs, shown = pairs[: MOST_NAMED // 2], _series(single)
    shown = dict(list(shown.items())[: MOST_NAMED - 2 * len(pairs)])
    left = len(keypoints) - 2 * len(pairs) - sum(shown.values())
    words = ", ".join([f"left and right {', '.join(pairs)}"] * bool(pairs) + list(shown))
    return words + (f" and {left} more" if left else "")


def _series(names: Sequence[str]) -> dict[str, int]:
    """Names and how many keypoints each stands for: more than three that differ by their number alone are one."""
    stems = [re.sub(r"[- ]?\d+$", "", name) for name in names]
    counts: dict[str, int] = {}
    for name, stem in zip(names, stems, strict=True):
        num = stems.count(stem)
        counts |= {f"{stem} ({num} points)": num} if num > 3 else {name: 1}
    return counts


def _sided(name: str) -> tuple[str, str]:
    """`left_knee` as left, knee; a name without a side as it is."""
    words = re.split(r"[_ ]", name)
    sides = [word for word in words if word in ("left", "right", "l", "r")]
    if len(sides) != 1:
        return "", " ".join(words)
    return {"l": "left", "r": "right"}.get(sides[0], sides[0]), " ".join(word for word in words if word != sides[0])


class Reliability(NamedTuple):
    """Keypoints in 10 bins of their score: how many, their mean score, and the share that is right; nan of none."""

    num: Int[Array, "bins"]
    score: Float[Array, "bins"]
    right: Float[Array, "bins"]


def write_reliability(bins: Reliability) -> dict[str, list[float | None]]:
    """Bins for a JSON."""
    return {
        name: [value if math.isfinite(value) else None for value in values.tolist()]
        for name, values in bins._asdict().items()
    }


def parse_reliability(tree: object) -> Reliability | None:
    """The bins of a JSON; None if it holds none."""
    lists = [tree.get(name) if isinstance(tree, dict) else None for name in Reliability._fields]
    if not all(isinstance(values, list) and len(values) == NUM_BINS for values in lists):
        return None
    num, score, right = (np.array([math.nan if v is None else v for v in cast(list, values)]) for values in lists)
    return Reliability(num.astype(int), score, right)


def reliability(diagnosis: Diagnosis, scores: Float[Array, "n k"]) -> Reliability:
    """What the expected calibration error (`score.calibration_error`) is made of; right is a similarity above 0.5."""
    labeled = diagnosis.kinds != UNLABELED
    return bin_scores(scores[labeled], diagnosis.similar[labeled] > NEAR_FROM)


def bin_scores(scores: Float[Array, "m"], right: Bool[Array, "m"]) -> Reliability:
    """Keypoints by their score, clipped to 0..1, in bins of equal width; the upper edge belongs to a bin."""
    scores = scores.clip(0.0, 1.0)
    bins = np.maximum(np.ceil(scores * NUM_BINS).astype(int) - 1, 0)
    count = np.bincount(bins, minlength=NUM_BINS)
    sums = [np.bincount(bins, values, NUM_BINS) for values in (scores, right)]
    means = [np.where(count > 0, one / np.maximum(count, 1), np.nan) for one in sums]
    return Reliability(count, means[0], means[1])
