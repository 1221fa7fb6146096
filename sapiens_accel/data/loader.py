"""Samples to batches on the device: a batch is a function of (seed, stage, step).

order (seed, stage, step) -> keys of one global batch -> this rank's micro-batches -> workers: decode, crop, augment
"""

import ctypes
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import cv2
import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from sapiens_accel.data.dataset import Batch, Key, Labeled, Pair, TrainingPeople
from sapiens_accel.data.sampling import Share
from sapiens_accel.errors import UserError
from sapiens_accel.runtime import signals as interrupt

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
Loaded = TypeVar("Loaded")


def batches(
    people: TrainingPeople, share: Share, steps: range, num_workers: int, device: torch.device
) -> Iterator[Batch]:
    """This rank's micro-batches of the steps, `share.accumulation` for each, on the device.

    Pinned memory and non-blocking copies on CUDA; workers stay alive between batches.
    """
    loader = DataLoader(
        people,
        batch_sampler=_Keys(people, share, steps),  # pyright: ignore[reportArgumentType]  (a sampler of keys, not of ints)
        collate_fn=collate,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        prefetch_factor=4 if num_workers else None,
        pin_memory=device.type == "cuda",
        worker_init_fn=begin_worker,
    )
    for batch in unwrap_errors(loader):
        yield to_device(batch, device)


def unwrap_errors(loader: Iterable[Loaded]) -> Iterator[Loaded]:
    """What it loads; a UserError of a loading process, which comes wrapped in that process's traceback, as one line.

    Raises:
        UserError
    """
    try:
        yield from loader
    except UserError as error:
        raise UserError(
            str(error).strip().splitlines()[-1].removeprefix(f"{UserError.__module__}.UserError: ")
        ) from None


class _Keys:
    """One list of keys for each micro-batch of this rank."""

    def __init__(self, people: TrainingPeople, share: Share, steps: range) -> None:
        self.ratio, self.share, self.steps = people.ratio, share, steps

    def __len__(self) -> int:
        return len(self.steps) * self.share.accumulation

    def __iter__(self) -> Iterator[list[Key]]:
        for step in self.steps:
            for micro_step in range(self.share.accumulation):
                positions = self.share.positions(micro_step)
                pairs = range(positions.start * self.ratio, positions.stop * self.ratio)
                yield [Key(step, p, False) for p in positions] + [Key(step, p, True) for p in pairs]


def collate(samples: Sequence[Labeled | Pair]) -> Batch:
    """Stack labeled people and pairs, each among themselves."""
    labeled = [sample for sample in samples if isinstance(sample, Labeled)]
    pairs = [sample for sample in samples if isinstance(sample, Pair)]
    return Batch(default_collate(labeled), default_collate(pairs) if pairs else None)


def to_device(tree: Any, device: torch.device) -> Any:
    """Any tree of NamedTuples and tensors on the device."""
    if isinstance(tree, Tensor):
        return tree.to(device, non_blocking=True)
    if isinstance(tree, tuple):
        return type(tree)(*(to_device(item, device) for item in tree))
    return tree


def begin_worker(_: int) -> None:
    """Start a worker with one decoding thread: the workers are the parallelism. Signals are the training's to hear."""
    cv2.setNumThreads(0)
    keep_freed_memory()
    interrupt.leave_to_parent()


def keep_freed_memory() -> None:
    """Have glibc keep what is freed for the next image: new pages from the system cost 5 % of a batch's time."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc and hasattr(libc, "mallopt"):  # not every Linux has glibc
        for option in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
            libc.mallopt(option, 2**30)
