"""Pairs that a mirrored image swaps, from labels whose names were taken away."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from sapiens_accel.pose.mirror_pairs import find_pairs
from sapiens_accel.pose.skeleton import COCO17, SAPIENS308, WHOLEBODY133

DATA = Path(__file__).resolve().parents[2] / os.environ.get("SAPIENS_ACCEL_TEST_DATA", "../shared/data")
with_real_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no real labels: {DATA} (SAPIENS_ACCEL_TEST_DATA)")
OWN_DATA = Path(__file__).resolve().parents[2] / "docs" / "own_data.md"
# Seen from above: head, neck, four legs in three joints each, two ears, tail.
SIDES = ((3, -5), (5, -6), (6, -8), (3, 4), (5, 5), (6, 8), (1.5, -8))
ANIMAL = np.array([[0, -9], [0, -6], *((s * x, y) for x, y in SIDES for s in (-1, 1)), [0, 6], [0, 10]], float)


def _animals(rng: np.random.Generator, points: np.ndarray, noise: float, upright: bool) -> np.ndarray:
    """Animals of one shape, turned at random if not upright, with some keypoints not labeled."""
    people = []
    for _ in range(60):
        angle = rng.normal(0, 0.2) if upright else rng.uniform(0, 2 * np.pi)
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        one = (points + rng.normal(0, noise, points.shape)) @ turn.T * rng.uniform(2, 20) + rng.uniform(0, 500, 2)
        people.append(np.column_stack([one, 2.0 * (rng.random(len(points)) < 0.9)]))
    return np.stack(people)


def _pairs(keypoints: np.ndarray) -> set[tuple[int, int]]:
    return {(pair.first, pair.second) for pair in find_pairs(keypoints)}


@pytest.mark.parametrize("upright", [True, False])
def test_all_pairs_of_a_symmetric_animal(upright: bool) -> None:
    rng = np.random.default_rng(1)
    order = rng.permutation(len(ANIMAL))
    pairs = _pairs(_animals(rng, ANIMAL[order], 0.5, upright))
    k = {int(old): new for new, old in enumerate(order)}
    assert pairs == {tuple(sorted((k[a], k[a + 1]))) for a in range(2, 16, 2)}


@pytest.mark.parametrize("seed", range(5))
def test_no_pair_of_a_shape_without_symmetry(seed: int) -> None:
    rng = np.random.default_rng(seed)
    assert _pairs(_animals(rng, rng.normal(0, 5, (12, 2)), 1.0, upright=False)) == set()


def test_few_people_and_unlabeled_ones_prove_nothing() -> None:
    people = _animals(np.random.default_rng(2), ANIMAL, 0.3, upright=True)
    assert _pairs(people[:9]) == set() and _pairs(people * [1, 1, 0]) == set() and _pairs(people[:0]) == set()


# ---- Labels whose names were taken away: the table of docs/own_data.md


def _annotations(file: str) -> list[dict]:
    return [one for one in json.loads((DATA / file).read_text())["annotations"] if one.get("keypoints")]


def _array(lists: list[list[float]]) -> np.ndarray:
    return np.array(lists, float).reshape(len(lists), -1, 3)


def _coco(split: str) -> np.ndarray:
    keypoints = [one["keypoints"] for one in _annotations(f"coco_mini/annotations/person_keypoints_{split}2017.json")]
    return _array(keypoints)


WHOLEBODY = "coco_wholebody_mini/annotations/coco_wholebody_val_v1.0.json"


def _wholebody() -> tuple[np.ndarray, np.ndarray]:
    """Keypoints and boxes of the 12 people of whom at least four keypoints are labeled."""
    people, parts = _annotations(WHOLEBODY), ("keypoints", "foot_kpts", "face_kpts", "lefthand_kpts", "righthand_kpts")
    keypoints = _array([[number for part in parts for number in one[part]] for one in people])
    enough = (keypoints[..., 2] > 0).sum(1) >= 4
    return keypoints[enough], np.array([one["bbox"] for one in people])[enough]


def _drawn(num: int, noise: float) -> np.ndarray:
    """People of one shape: the mean of the 12 in their boxes, made symmetric, as the mean of many people is.

    Args:
        noise: of each point, as a share of the shape's height.
    """
    rng, (keypoints, boxes) = np.random.default_rng(0), _wholebody()
    points = np.where(keypoints[..., 2:] > 0, keypoints[..., :2], np.nan) - boxes[:, None, :2]
    shape = np.nanmean(points / boxes[:, None, 2:] * np.median(boxes[:, None, 2:], axis=0), axis=0)
    shape -= shape.mean(0)
    shape = (shape + shape[list(WHOLEBODY133.mirror)] * (-1, 1)) / 2
    people = shape / np.ptp(shape[:, 1]) + rng.normal(0, noise, (num, *shape.shape))
    a = rng.normal(0, 0.2, num)
    turns = np.array([[np.cos(a), np.sin(a)], [-np.sin(a), np.cos(a)]]).transpose(2, 0, 1)
    people = people @ turns * rng.uniform(20, 100, (num, 1, 1)) + 200
    return np.concatenate([people, np.full((num, len(shape), 1), 2.0)], axis=-1)


SHARED = [k for k, name in enumerate(WHOLEBODY133.names) if name in SAPIENS308.names]
SHARED_MIRROR = SAPIENS308.select([WHOLEBODY133.names[k] for k in SHARED]).mirror
# What is measured, the pairs that the names tell, and the table's row: pairs, found, wrong.
ROWS: dict[str, tuple[Callable[[], list[np.ndarray]], Sequence[int], tuple[str, str, str]]] = {
    "COCO's 17 keypoints": (lambda: [_coco("train"), _coco("val")], COCO17.mirror, ("8", "7, 7", "0, 0")),
    "21 keypoints of a hand": (
        lambda: [_array([one[f"{side}hand_kpts"] for one in _annotations(WHOLEBODY) for side in ("left", "right")])],
        range(21),
        ("0", "0", "0"),
    ),
    "COCO-WholeBody's 133": (lambda: [_wholebody()[0]], WHOLEBODY133.mirror, ("61", "0", "0")),
    "the same 133": (
        lambda: [_drawn(20, 0.005), _drawn(20, 0.02)],
        WHOLEBODY133.mirror,
        ("61", "19, 6", "0, 0"),
    ),
    "the 53 of Sapiens' 308": (
        lambda: [_drawn(60, 0.005)[:, SHARED], _drawn(60, 0.02)[:, SHARED]],
        SHARED_MIRROR,
        ("26", "14, 8", "0, 0"),
    ),
    "AP-10K's names": (
        lambda: [
            _array(
                [
                    one["keypoints"]
                    for split in ("train", "val")
                    for one in _annotations(f"own_data_cases/ap10k/{split}.json")
                ]
            )
        ],
        COCO17.mirror,  # the names are AP-10K's, the drawn people COCO's
        ("8", "8", "0"),
    ),
    "a mouse": (
        lambda: [_array([one["keypoints"] for one in _annotations("mirror_mouse/annotations/train.json")])],
        range(17),
        ("0", "0", "0"),
    ),
}


@with_real_data
@pytest.mark.parametrize(
    "row", [pytest.param(row, marks=pytest.mark.slow) if row == "the same 133" else row for row in ROWS]
)
def test_the_table_of_the_docs(row: str) -> None:
    make, mirror, expected = ROWS[row]
    pairs = [_pairs(keypoints) for keypoints in make()]
    right = [sum(mirror[a] == b for a, b in found) for found in pairs]
    wrong = [len(found) - number for found, number in zip(pairs, right, strict=True)]
    measured = (str(sum(other > k for k, other in enumerate(mirror))), str(right)[1:-1], str(wrong)[1:-1])
    assert measured == expected
    (line,) = [line for line in OWN_DATA.read_text().splitlines() if line.startswith(f"| {row}")]
    assert tuple(line.strip("| ").split(" | ")[1:]) == expected
