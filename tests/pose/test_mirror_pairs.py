"""Pairs that a mirrored image swaps, from labels whose names were taken away."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from sapiens_accel.pose.mirror_pairs import find_pairs
from sapiens_accel.pose.skeleton import COCO17

DATA = Path(__file__).resolve().parents[2] / os.environ.get("SAPIENS_ACCEL_TEST_DATA", "../shared/data")
with_real_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no real labels: {DATA} (SAPIENS_ACCEL_TEST_DATA)")
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


@with_real_data
def test_pairs_of_real_people_and_none_where_there_are_none() -> None:
    def read(file: str) -> list[dict]:
        return [one for one in json.loads((DATA / file).read_text())["annotations"] if one.get("keypoints")]

    def array(lists: list[list[float]]) -> np.ndarray:
        return np.array(lists, float).reshape(len(lists), -1, 3)

    for split in ("train", "val"):
        pairs = _pairs(
            array([one["keypoints"] for one in read(f"coco_mini/annotations/person_keypoints_{split}2017.json")])
        )
        assert len(pairs) >= 6 and all(COCO17.mirror[a] == b for a, b in pairs)
    people = read("coco_wholebody_mini/annotations/coco_wholebody_val_v1.0.json")
    assert _pairs(array([one[f"{side}hand_kpts"] for one in people for side in ("left", "right")])) == set()
    assert _pairs(array([one["keypoints"] for one in read("mirror_mouse/annotations/train.json")])) == set()
