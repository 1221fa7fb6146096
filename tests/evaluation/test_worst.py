"""Planted errors are called what they are; the truth has none; every number agrees with plain loops."""

import math
from itertools import product

import numpy as np
import pytest

from sapiens_accel.evaluation import error_analysis as worst
from sapiens_accel.evaluation.error_analysis import NOBODY, UNLABELED, Diagnosis, Kind, diagnose
from sapiens_accel.pose import oks as score
from sapiens_accel.pose.skeleton import COCO17, SAPIENS308, WHOLEBODY133, Skeleton

Array = np.ndarray
AT = {name: k for k, name in enumerate(COCO17.names)}
# A person of 100 x 200 px who stands upright, by keypoint: x, y.
STANDING = {
    "nose": (50, 15), "eye": (8, 10), "ear": (14, 13), "shoulder": (22, 45), "elbow": (32, 75), "wrist": (38, 105),
    "hip": (15, 105), "knee": (17, 150), "ankle": (18, 190),
}  # fmt: skip
AREA = 9000.0


def _person(left: float = 0.0) -> Array:
    """x, y and visibility 2 of 17 keypoints; the person's left is on the picture's right."""
    points = []
    for name in COCO17.names:
        side, _, part = name.rpartition("_")
        x, y = STANDING[part]
        points.append((left + (50 + (x if side == "left" else -x) if side else x), y, 2.0))
    return np.array(points)


def _diagnosed(found: Array, labels: Array, images: list[int] | None = None) -> Diagnosis:
    scores = np.full(found.shape[:2], 0.9)
    return diagnose(found, scores, labels, np.full(len(labels), AREA), images or [1] * len(labels), COCO17)


def _two() -> Array:
    return np.stack([_person(), _person(300.0)])


def test_swapped_arms_are_a_swap() -> None:
    labels = _two()
    found = labels[..., :2].copy()
    arms = [AT[f"{side}_{part}"] for part in ("elbow", "wrist") for side in ("left", "right")]
    found[0, arms] = found[0, [COCO17.mirror[k] for k in arms]]
    diagnosed = _diagnosed(found, labels)
    assert set(np.flatnonzero(diagnosed.kinds[0] == Kind.SWAPPED)) == set(arms)
    assert (np.delete(diagnosed.kinds[0], arms) == Kind.GOOD).all() and (diagnosed.kinds[1] == Kind.GOOD).all()
    assert diagnosed.reason(0, COCO17) == (Kind.SWAPPED, "left and right elbow, wrist swapped")
    assert diagnosed.oks == pytest.approx([13 / 17, 1.0], abs=1e-2)


def test_one_side_on_the_other_is_a_swap_of_that_keypoint() -> None:
    labels = _two()
    found = labels[..., :2].copy()
    found[0, AT["left_wrist"]] = found[0, AT["right_wrist"]]
    assert _diagnosed(found, labels).reason(0, COCO17) == (Kind.SWAPPED, "left wrist swapped")


def test_another_persons_keypoints_are_the_wrong_person() -> None:
    labels = _two()
    found = labels[..., :2].copy()
    found[0, AT["left_ankle"]] = labels[1, AT["left_ankle"], :2]  # the same
    found[0, AT["left_knee"]] = labels[1, AT["right_knee"], :2]  # the mirrored one
    found[0, AT["nose"]] = labels[1, AT["right_hip"], :2]  # any other
    told = _diagnosed(found, labels).reason(0, COCO17)
    assert told == (Kind.WRONG_PERSON, "nose, left knee, left ankle on another person")
    elsewhere = _diagnosed(found, labels, [1, 2])
    assert elsewhere.reason(0, COCO17).kind == Kind.MISSED, "people of another image are not to be confused with"
    found[0] = labels[1, :, :2]
    assert _diagnosed(found, labels).reason(0, COCO17) == (Kind.WRONG_PERSON, "all 17 keypoints on another person")


def test_keypoints_of_others_that_nobody_labeled_do_not_count() -> None:
    labels = _two()
    labels[1, :, 2] = 0
    labels[1, 0, 2] = 1
    found = labels[..., :2].copy()
    found[0, AT["left_ankle"]] = labels[1, AT["left_ankle"], :2]
    diagnosed = _diagnosed(found, labels)
    assert diagnosed.reason(0, COCO17) == (Kind.MISSED, "left ankle missed")
    assert diagnosed.kinds[1].tolist() == [Kind.GOOD] + [UNLABELED] * 16
    labels[0, AT["right_wrist"], 2] = 0
    found[0, AT["left_wrist"]] = labels[0, AT["right_wrist"], :2]
    assert _diagnosed(found, labels).kinds[0, AT["left_wrist"]] == Kind.MISSED


def test_far_is_missed_and_noise_is_imprecise() -> None:
    labels, rng = _two(), np.random.default_rng(0)
    found = labels[..., :2].copy()
    found[0] += 2000
    # A similarity of 0.7 in any direction.
    turn = rng.uniform(0, 2 * np.pi, 17)
    reach = np.sqrt(-2 * AREA * (2 * np.array(COCO17.sigmas)) ** 2 * math.log(0.7))
    found[1] += reach[:, None] * np.stack([np.cos(turn), np.sin(turn)], axis=1)
    diagnosed = _diagnosed(found, labels, [1, 2])
    assert diagnosed.reason(0, COCO17) == (Kind.MISSED, "all 17 keypoints missed")
    assert diagnosed.similar[1] == pytest.approx(np.full(17, 0.7))
    # Close keypoints of the head may be mistaken for each other.
    assert set(diagnosed.kinds[1].tolist()) == {Kind.IMPRECISE}
    assert diagnosed.reason(1, COCO17) == (Kind.IMPRECISE, "all 17 keypoints imprecise")


def test_the_costliest_kind_is_reported_first() -> None:
    labels = _two()
    found = labels[..., :2].copy()
    found[0, AT["nose"]] += 1000
    found[0, AT["left_hip"], 1] += 2 * 0.107 * math.sqrt(AREA)
    legs = [AT[f"{side}_{part}"] for part in ("knee", "ankle") for side in ("left", "right")]
    found[0, legs] = found[0, [COCO17.mirror[k] for k in legs]]
    told = _diagnosed(found, labels).reason(0, COCO17)
    assert told == (Kind.SWAPPED, "left and right knee, ankle swapped; nose missed; left hip imprecise")


def test_without_a_prediction_all_is_missed() -> None:
    labels = _two()
    found, scores = labels[..., :2].copy(), np.full((2, 17), 0.9)
    found[1], scores[1] = 0, 0
    labels[1, 0, :2] = 0  # a keypoint in the corner is no find either
    diagnosed = diagnose(found, scores, labels, np.full(2, AREA), [1, 2], COCO17)
    assert diagnosed.oks.tolist() == [1, 0]
    assert diagnosed.is_predicted.tolist() == [True, False] and (diagnosed.kinds[1] == Kind.MISSED).all()
    assert diagnosed.reason(1, COCO17) == (Kind.MISSED, NOBODY)
    assert diagnosed.worst(5).tolist() == [1, 0]


# ---- Any skeleton, any crowd


def _crowd(skeleton: Skeleton, num: int = 7) -> tuple[Array, Array, list[int]]:
    rng = np.random.default_rng(skeleton.num_keypoints)
    labels = np.concatenate(
        [rng.uniform(0, 200, (num, skeleton.num_keypoints, 2)), rng.integers(0, 3, (num, skeleton.num_keypoints, 1))],
        axis=2,
    )
    labels[:, 0, 2] = 2
    return labels, rng.uniform(2000, 20000, num), [1, 1, 2, 2, 2, 3, 1]


@pytest.mark.parametrize("skeleton", [COCO17, WHOLEBODY133, SAPIENS308], ids=lambda one: str(one.num_keypoints))
def test_the_truth_has_no_error(skeleton: Skeleton) -> None:
    labels, areas, images = _crowd(skeleton)
    diagnosed = diagnose(labels[..., :2], np.ones(labels.shape[:2]), labels, areas, images, skeleton)
    assert diagnosed.oks == pytest.approx(np.ones(len(labels)))
    assert (diagnosed.kinds == np.where(labels[..., 2] > 0, Kind.GOOD, UNLABELED)).all()
    assert {diagnosed.reason(person, skeleton) for person in range(len(labels))} == {(Kind.GOOD, "no error")}
    assert diagnosed.counts()[Kind.GOOD].tolist() == (labels[..., 2] > 0).sum(axis=0).tolist()
    assert not diagnosed.counts()[1:].any()


def _by_hand(found: Array, labels: Array, areas: Array, images: list[int], skeleton: Skeleton) -> Array:
    """The rules in plain loops, keypoint by keypoint."""

    def similar(point: Array, person: int, at: int, sigma: float) -> float:
        x, y, visible = labels[person, at]
        squared = (point[0] - x) ** 2 + (point[1] - y) ** 2
        return math.exp(-squared / (2 * areas[person] * (2 * sigma) ** 2)) if visible else 0.0

    kinds = np.full(found.shape[:2], UNLABELED)
    for person, k in product(range(len(found)), range(skeleton.num_keypoints)):
        if not labels[person, k, 2]:
            continue
        point, sigma, mirror = found[person, k], skeleton.sigmas[k], skeleton.mirror[k]
        others = [o for o in range(len(found)) if o != person and images[o] == images[person]]
        near = {Kind.GOOD: similar(point, person, k, sigma)}
        near[Kind.SWAPPED] = similar(point, person, mirror, sigma) if mirror != k else 0.0
        near[Kind.WRONG_PERSON] = max((similar(point, o, at, sigma) for o in others for at in (k, mirror)), default=0.0)
        kind = max(near, key=lambda one: near[one])
        if near[kind] < 0.5:
            joints = product(others, range(skeleton.num_keypoints))
            hit = any(similar(point, o, at, skeleton.sigmas[at]) >= 0.5 for o, at in joints)
            kind = Kind.WRONG_PERSON if hit else Kind.MISSED
        elif kind == Kind.GOOD and near[kind] < 0.85:
            kind = Kind.IMPRECISE
        kinds[person, k] = kind
    return kinds


@pytest.mark.parametrize("skeleton", [COCO17, WHOLEBODY133], ids=lambda one: str(one.num_keypoints))
def test_kinds_are_those_of_plain_loops(skeleton: Skeleton) -> None:
    labels, areas, images = _crowd(skeleton)
    rng = np.random.default_rng(1)
    found = labels[..., :2] + rng.normal(0, 6, labels[..., :2].shape)
    mirrored, other = found[:, list(skeleton.mirror)], found[[1, 6, 3, 4, 2, 5, 0]]
    which = rng.integers(0, 4, labels.shape[:2])[..., None]
    found = np.select([which == 0, which == 1, which == 2], [mirrored, other, rng.uniform(0, 200, found.shape)], found)
    diagnosed = diagnose(found, np.ones(labels.shape[:2]), labels, areas, images, skeleton)
    expected = _by_hand(found, labels, areas, images, skeleton)
    assert set(expected.ravel().tolist()) == {UNLABELED, *Kind}, "all of them happen"
    assert (diagnosed.kinds == expected).all()
    for person in range(len(labels)):
        counted = labels[person, :, 2] > 0
        oks = score.oks(
            labels[person, :, :2], found[person][None], areas[person : person + 1], skeleton.sigmas, counted
        )
        assert diagnosed.oks[person] == pytest.approx(float(oks[0]), abs=1e-9)
    assert diagnosed.worst(3).tolist() == np.argsort(diagnosed.oks, kind="stable")[:3].tolist()


# ---- Words


def test_keypoints_in_words() -> None:
    some = [AT[name] for name in ("nose", "left_knee", "right_knee", "left_ankle", "right_ankle", "right_wrist")]
    assert worst.name_keypoints(sorted(some), COCO17) == "left and right knee, ankle, nose, right wrist"
    assert worst.name_keypoints(range(17), COCO17) == "left and right eye, ear, shoulder and 11 more"
    face = [WHOLEBODY133.names.index(f"face-{i}") for i in range(8)]
    assert worst.name_keypoints([0, *face], WHOLEBODY133) == "nose, face (8 points)"
    assert worst.name_keypoints(face[:3], WHOLEBODY133) == "face-0, face-1, face-2"
    everything = worst.name_keypoints(range(133), WHOLEBODY133)
    assert everything == "left and right eye, ear, shoulder and 127 more"


def test_bins_make_up_the_calibration_error() -> None:
    labels, areas, images = _crowd(COCO17)
    rng = np.random.default_rng(2)
    found, scores = labels[..., :2] + rng.normal(0, 12, labels[..., :2].shape), rng.uniform(0, 1, labels.shape[:2])
    scores[0, :4] = (0.0, 0.1, 1.0, 1.2)
    diagnosed = diagnose(found, scores, labels, areas, images, COCO17)
    bins = worst.reliability(diagnosed, scores)
    labeled = labels[..., 2] > 0
    expected = score.calibration_error(scores[labeled], diagnosed.similar[labeled] > 0.5)
    assert bins.num.sum() == labeled.sum()
    assert np.nansum(bins.num * np.abs(bins.score - bins.right)) / bins.num.sum() == pytest.approx(expected)
