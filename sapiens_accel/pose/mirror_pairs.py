"""Which keypoints a mirrored image swaps, estimated from labeled people: for data sets whose names say no side.

Each person's keypoints z (complex, x + iy) are reflected onto themselves: z -> a conj(z) + b, the similarity with a
reflection that brings each keypoint as near as possible to its partner. Partners and reflections are improved in
turns, as in the iterative closest point method (Besl and McKay 1992), all people sharing one set of partners. It is a
proposal: a shape whose front and back are alike (an animal in profile) gives front and hind as a pair. docs/own_data.md
has what it found, and what not, where names were taken away.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Complex, Float, Int
from numpy import ndarray as Array

from sapiens_accel.pose.visibility import is_labeled

MAX_PEOPLE = 300
MAX_DISTANCES = 1_500_000  # people x keypoints x keypoints, so that 133 and 308 keypoints take seconds
TRIED_ON, IMPROVED = 50, 3  # people on whom each start is tried; starts that are improved on all
# First reflections that are tried: the axis of symmetry by steps of 15 degrees, from upright.
ANGLES = np.arange(12) * np.pi / 12
RESAMPLES = 20
# Of the resamples, as many must agree on a pair; and it must be nearer than any other by a quarter.
AGREEMENT, MARGIN = 0.9, 1.25
MIN_PEOPLE, MIN_KEYPOINTS = 10, 4  # people, each with so many labeled keypoints
# Reflected, keypoints lie this near to their partners (those of the midline to themselves) on average, in units of a
# person's spread: COCO's 0.20 and 0.24, a mouse's 0.47, hands' 0.58, which have no symmetry.
NEAR = 0.35
FAR = 9.0  # further than any keypoint, in units of a person's spread


@dataclass(frozen=True)
class MirrorPair:
    """Two keypoints, by index, and in which share of the resampled people they came out as partners."""

    first: int
    second: int
    agreement: float


def has_enough_keypoints(keypoints: Float[Array, "n k 3"]) -> Bool[Array, " n"]:
    """Return which people have enough labeled keypoints to be compared."""
    return is_labeled(keypoints).sum(1) >= MIN_KEYPOINTS


def find_pairs(keypoints: Float[Array, "n k 3"], seed: int = 0) -> list[MirrorPair]:
    """The pairs that are near certain, in the order of keypoints; none where people are too few or have no symmetry.

    Args:
        keypoints: x, y (px) and v.
        seed: of the people that are compared, and of the resamples.
    """
    rng = np.random.default_rng(seed)
    keypoints = keypoints[has_enough_keypoints(keypoints)]
    if len(keypoints) < MIN_PEOPLE:
        return []
    most = min(MAX_PEOPLE, max(3 * MIN_PEOPLE, MAX_DISTANCES // keypoints.shape[1] ** 2))
    keypoints = keypoints[np.sort(rng.permutation(len(keypoints))[:most])]
    z = _normalize(keypoints)
    views = (z, _turn_alike(z))
    starts = [_partners(_distances(one, np.exp(2j * angle) * -one.conj())) for one in views for angle in ANGLES]
    tried = sorted((_improve(z[:TRIED_ON], start) for start in starts), key=lambda result: _residual(*result))
    improved = (_improve(z, start) for start, _ in tried[:IMPROVED])
    partners, distances = min(improved, key=lambda result: _residual(*result))
    if _residual(partners, distances) > NEAR:
        return []
    same = np.zeros(len(partners))
    for _ in range(RESAMPLES):
        again, _ = _improve(z[rng.integers(0, len(z), len(z))], partners)
        same += again == partners
    k, second = np.arange(len(partners)), np.sort(distances, axis=1)[:, 1]
    clear = (second >= MARGIN * distances[k, partners]) & (distances[k, partners] <= NEAR)
    agreement = np.minimum(same, same[partners]) / RESAMPLES
    return [
        MirrorPair(int(a), int(b), float(agreement[a]))
        for a, b in enumerate(partners)
        if a < b and clear[a] and clear[b] and agreement[a] >= AGREEMENT
    ]


def _normalize(keypoints: Float[Array, "n k 3"]) -> Complex[Array, "n k"]:
    """Around each person's mean and by the root mean square distance from it; NaN where not labeled."""
    z = keypoints[..., 0] + 1j * keypoints[..., 1]
    z = np.where(is_labeled(keypoints), z, np.nan + 1j * np.nan)
    z = z - np.nanmean(z, axis=1, keepdims=True)
    return z / np.maximum(np.sqrt(np.nanmean(np.abs(z) ** 2, axis=1, keepdims=True)), 1e-6)


def _turn_alike(z: Complex[Array, "n k"]) -> Complex[Array, "n k"]:
    """All people turned as their mean shape is: seen from above, they lie in any direction."""
    shape = z[(~np.isnan(z)).sum(1).argmax()]
    turned = z
    for _ in range(5):
        turn = np.nansum(z.conj() * shape, axis=1, keepdims=True)
        turned = z * turn / np.maximum(np.abs(turn), 1e-9)
        shape = np.nanmean(turned, axis=0)
    return turned


def _improve(z: Complex[Array, "n k"], partners: Int[Array, " k"]) -> tuple[Int[Array, " k"], Float[Array, "k k"]]:
    """Partners that their own reflections confirm, and the distances of reflected keypoints to keypoints."""
    distances = _distances(z, _reflect(z, partners))
    for _ in range(20):
        better = _partners(distances)
        if (better == partners).all():
            break
        partners = better
        distances = _distances(z, _reflect(z, partners))
    return partners, distances


def _reflect(z: Complex[Array, "n k"], partners: Int[Array, " k"]) -> Complex[Array, "n k"]:
    """The least squares reflection of each person onto the partners; a second time without what lies far off."""
    target = z[:, partners]
    both = ~np.isnan(z) & ~np.isnan(target)
    weights, reflected = both.astype(float), z
    for _ in range(2):
        total = np.maximum(weights.sum(1, keepdims=True), 1e-9)
        source, goal = np.where(both, z, 0), np.where(both, target, 0)
        center = (weights * source).sum(1, keepdims=True) / total
        shift = (weights * goal).sum(1, keepdims=True) / total
        spread = (weights * np.abs(source - center) ** 2).sum(1, keepdims=True)
        turn = (weights * (goal - shift) * (source - center)).sum(1, keepdims=True) / np.maximum(spread, 1e-9)
        reflected = turn * (z - center).conj() + shift
        error = np.abs(np.where(both, reflected - target, 0))
        middle = np.ma.median(np.ma.masked_array(error, ~both), axis=1, keepdims=True).filled(0)
        limit = 2.5 * middle + 1e-9
        weights = (both & (error <= limit)).astype(float)
    return np.where(both.sum(1, keepdims=True) >= 3, reflected, np.nan)


def _distances(z: Complex[Array, "n k"], reflected: Complex[Array, "n k"]) -> Float[Array, "k k"]:
    """The median over people, both ways; FAR where hardly anybody has both."""
    apart = np.sort(np.abs(reflected[:, :, None] - z[:, None, :]), axis=0)  # NaN last
    seen = (~np.isnan(apart)).sum(0)
    # np.nanmedian is the same, and took 5 times as long.
    below, above = (np.take_along_axis(apart, k[None], 0)[0] for k in (np.maximum(seen - 1, 0) // 2, seen // 2))
    middle = np.where(seen >= max(2, 0.02 * len(z)), (below + above) / 2, FAR)
    return (middle + middle.T) / 2


def _partners(distances: Float[Array, "k k"]) -> Int[Array, " k"]:
    """Mutual nearest neighbors; each other keypoint is its own."""
    nearest = distances.argmin(1)
    k = np.arange(len(nearest))
    return np.where(nearest[nearest] == k, nearest, k)


def _residual(partners: Int[Array, " k"], distances: Float[Array, "k k"]) -> float:
    return float(distances[np.arange(len(partners)), partners].mean())
