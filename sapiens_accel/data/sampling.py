"""Several data sets in one stream of people: which set, and who of it, as a function of (seed, stage, step).

An epoch is a fixed number of places. Each set has its share of them, to within one place, in an order of its own for
every epoch; and each set is gone through permutation by permutation, so nobody in it is seen a second time more than
anybody else. Nothing is remembered between steps: a run can start at any of them.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Int
from numpy import ndarray as Array
from numpy.random import default_rng


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Sets of people that lie behind one another in one table.

    Attributes:
        sizes: people of each.
        weights: how much of an epoch each has, in any unit.
    """

    sizes: tuple[int, ...]
    weights: tuple[float, ...]

    def order(self, seed: int, stream: str, step: int, global_batch: int) -> Int[Array, "global_batch"]:
        """Which people (indices into the whole table) the global batch of a step holds."""
        return _order(self, seed, stream, step, global_batch)

    def steps_per_epoch(self, global_batch: int) -> int:
        """As `data.steps_per_epoch` of all sets together."""
        return max(1, sum(self.sizes) // global_batch)

    def places(self, global_batch: int) -> tuple[int, ...]:
        """An epoch's places shared out by weight: rounded down, what is left over to the largest remainders."""
        num = self.steps_per_epoch(global_batch) * global_batch
        exact = np.array(self.weights, dtype=np.float64) / sum(self.weights) * num
        whole = np.floor(exact).astype(int)
        largest = np.argsort(whole - exact, kind="stable")[: num - whole.sum()]
        whole[largest] += 1
        return tuple(whole.tolist())

    def __str__(self) -> str:
        shares = np.array(self.weights) / sum(self.weights)
        parts = [f"{size} people ({share:.1%} of an epoch)" for size, share in zip(self.sizes, shares, strict=True)]
        return f"mixture of {' + '.join(parts)}"


@lru_cache(maxsize=8)
def _order(mixture: Mixture, seed: int, stream: str, step: int, global_batch: int) -> Int[Array, "global_batch"]:
    # Kept for the step: every sample asks.
    steps, places = mixture.steps_per_epoch(global_batch), mixture.places(global_batch)
    epoch, begin = step // steps, step % steps * global_batch
    sets, ranks = _epoch(seed, stream, epoch, places)
    found = np.empty(global_batch, dtype=np.int64)
    for place in range(global_batch):
        which = int(sets[begin + place])
        number = epoch * places[which] + int(ranks[begin + place])
        turn, index = divmod(number, mixture.sizes[which])
        people = _permutation(seed, f"{stream}/{which}", turn, mixture.sizes[which])
        found[place] = sum(mixture.sizes[:which]) + people[index]
    return found


@lru_cache(maxsize=8)
def _epoch(seed: int, stream: str, epoch: int, places: tuple[int, ...]) -> tuple[Int[Array, "n"], Int[Array, "n"]]:
    """The set of each place of an epoch, and how many of that set come before it."""
    sets = np.repeat(np.arange(len(places)), places)
    sets = _rng(seed, f"{stream}/sets", epoch).permutation(sets)
    ranks = np.empty_like(sets)
    for which in range(len(places)):
        here = np.flatnonzero(sets == which)
        ranks[here] = np.arange(len(here))
    return sets, ranks


@lru_cache(maxsize=32)
def _permutation(seed: int, stream: str, turn: int, num_people: int) -> Int[Array, "n"]:
    return _rng(seed, stream, turn).permutation(num_people)


def _rng(seed: int, stream: str, number: int) -> np.random.Generator:
    return default_rng([seed, zlib.crc32(stream.encode()), number])


def weights_of(sizes: Sequence[int], given: Sequence[float | None]) -> tuple[float, ...]:
    """The weights given, or the sizes where none is.

    Raises:
        ValueError: some are given and some not, or one is not above 0.
    """
    if all(weight is None for weight in given):
        return tuple(float(size) for size in sizes)
    if any(weight is None or not 0 < weight < float("inf") for weight in given):
        raise ValueError("expected a number above 0 for each set, or none for all")
    return tuple(float(weight) for weight in given if weight is not None)
