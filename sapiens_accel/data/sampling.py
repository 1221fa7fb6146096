"""Which people a step's global batch holds, and which of them a rank: functions of (seed, stage, step) alone.

Of several datasets (`Mixture`) an epoch has a fixed number of positions. Each set has its share of them, to within one
place, in an order of its own for every epoch; and each set is gone through permutation by permutation, so nobody in it
is seen a second time more than anybody else. Nothing is remembered between steps: a run can start at any of them.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Int
from numpy import ndarray as Array
from numpy.random import default_rng

from sapiens_accel.config.schema import StageConfig
from sapiens_accel.errors import count


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
        return _mixed(self, seed, stream, step, global_batch)

    def steps_per_epoch(self, global_batch: int) -> int:
        """As `data.steps_per_epoch` of all sets together."""
        return max(1, sum(self.sizes) // global_batch)

    def shares(self, global_batch: int) -> tuple[int, ...]:
        """How many people of each set an epoch takes, by weight: rounded down, the rest by the largest remainders."""
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
def _mixed(mixture: Mixture, seed: int, stream: str, step: int, global_batch: int) -> Int[Array, "global_batch"]:
    # Kept for the step: every sample asks.
    steps, shares = mixture.steps_per_epoch(global_batch), mixture.shares(global_batch)
    epoch, begin = step // steps, step % steps * global_batch
    sets, ranks = _epoch(seed, stream, epoch, shares)
    people = np.empty(global_batch, dtype=np.int64)
    for position in range(global_batch):
        which = int(sets[begin + position])
        number = epoch * shares[which] + int(ranks[begin + position])
        turn, index = divmod(number, mixture.sizes[which])
        order = _permutation(seed, f"{stream}/{which}", turn, mixture.sizes[which])
        people[position] = sum(mixture.sizes[:which]) + order[index]
    return people


@lru_cache(maxsize=8)
def _epoch(seed: int, stream: str, epoch: int, shares: tuple[int, ...]) -> tuple[Int[Array, "n"], Int[Array, "n"]]:
    """The set of each position of an epoch, and how many of that set come before it."""
    sets = np.repeat(np.arange(len(shares)), shares)
    sets = _rng(seed, f"{stream}/sets", epoch).permutation(sets)
    ranks = np.empty_like(sets)
    for which in range(len(shares)):
        positions = np.flatnonzero(sets == which)
        ranks[positions] = np.arange(len(positions))
    return sets, ranks


@lru_cache(maxsize=32)
def _permutation(seed: int, stream: str, turn: int, num_people: int) -> Int[Array, "n"]:
    return _rng(seed, stream, turn).permutation(num_people)


def _rng(seed: int, stream: str, number: int) -> np.random.Generator:
    return default_rng([seed, zlib.crc32(stream.encode()), number])


def fill_weights(sizes: Sequence[int], given: Sequence[float | None]) -> tuple[float, ...]:
    """The weights given, or the sizes where none is.

    Raises:
        ValueError: some are given and some not, or one is not above 0.
    """
    if all(weight is None for weight in given):
        return tuple(float(size) for size in sizes)
    if any(weight is None or not 0 < weight < float("inf") for weight in given):
        raise ValueError("expected a number above 0 for each set, or none for all")
    return tuple(float(weight) for weight in given if weight is not None)


@dataclass(frozen=True, kw_only=True)
class Share:
    """This rank's part of every global batch.

    Micro-batch m of rank r holds positions (m * num_ranks + r) * micro_batch and following: ranks are disjoint, and
    together they are the global batch.
    """

    rank: int
    num_ranks: int
    micro_batch: int
    accumulation: int

    @property
    def global_batch(self) -> int:
        return self.num_ranks * self.micro_batch * self.accumulation

    def __str__(self) -> str:
        parts = f"{count(self.num_ranks, 'process')} x {self.micro_batch} x {self.accumulation} accumulated"
        return f"{self.global_batch} people a step = {parts}"

    def positions(self, micro_step: int) -> range:
        start = (micro_step * self.num_ranks + self.rank) * self.micro_batch
        return range(start, start + self.micro_batch)


def steps_per_epoch(num_people: int, global_batch: int) -> int:
    """Whole global batches in one pass; what is left over waits for another order (drop_last)."""
    return max(1, num_people // global_batch)


def num_steps(plan: StageConfig, num_people: int, at_most: int | None = None) -> int:
    """Optimizer steps of a stage; `at_most` cuts it short."""
    by_epochs = max(1, round(plan.epochs * steps_per_epoch(num_people, plan.global_batch)))
    steps = by_epochs if plan.steps is None else plan.steps
    return steps if at_most is None else min(steps, at_most)


def order(seed: int, stream: str, step: int, num_people: int, global_batch: int) -> Int[Array, "global_batch"]:
    """Which people the global batch of a step holds: each epoch goes through its own permutation.

    Args:
        stream: the name of the sequence (a stage, labeled or not), part of the seed.
    """
    per_epoch = steps_per_epoch(num_people, global_batch)
    # Fewer people than a batch: pass over them again and again.
    passes = -(-global_batch // num_people)
    start = step % per_epoch * global_batch
    return _permutations(seed, stream, step // per_epoch, num_people, passes)[start : start + global_batch]


@lru_cache(maxsize=3)
def _permutations(seed: int, stream: str, epoch: int, num_people: int, passes: int) -> Int[Array, "n"]:
    # Kept for the epoch: permuting all of COCO takes 2 ms, and every sample asks.
    rng = default_rng([seed, zlib.crc32(stream.encode()), epoch])
    return np.concatenate([rng.permutation(num_people) for _ in range(passes)])
