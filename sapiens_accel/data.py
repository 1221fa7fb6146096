"""Rows of people to seeded batches of crops: a batch is a function of (seed, stage, step).

    order (seed, stage, step) -> keys of one global batch -> this rank's micro-batches -> workers: decode, crop, augment

Each person's augmentation has a generator of its own, seeded by its place in the run, so the number of workers, ranks
and accumulated micro-batches changes no byte, and a run can start at any step. Workers ship uint8 pictures and points.
"""

import dataclasses
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import cv2
import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from numpy import ndarray as Array
from numpy.random import Generator, default_rng
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from sapiens_accel import coco, geometry, interrupt, pool, synthetic
from sapiens_accel.augment import Augmenter, change_pixels
from sapiens_accel.coco import People, boxes_of, keypoints_of, read_image
from sapiens_accel.config import DataConfig, StageConfig, UserError
from sapiens_accel.examine import in_crop
from sapiens_accel.geometry import Crop
from sapiens_accel.skeleton import Skeleton

Loaded = TypeVar("Loaded")


class View(NamedTuple):
    """What is seen of one person: the crop, the matrix input_from_image that made it, and whether it is mirrored."""

    image: UInt8[Tensor, "*b 3 H W"]
    matrix: Float[Tensor, "*b 2 3"]
    flipped: Bool[Tensor, "*b"]


class Labelled(NamedTuple):
    """A view with its keypoints in input px (left and right already swapped where it is mirrored)."""

    view: View
    points_xy: Float[Tensor, "*b k 2"]
    weights: Float[Tensor, "*b k"]
    ann_id: Int[Tensor, "*b"]


class Pair(NamedTuple):
    """Two views of one unlabelled person: the teacher's and the student's.

    `cutout` holds uniform draws for `objective.cut_out`: which keypoint, offset in x and y, size. They are drawn here
    so that they depend on the person's place in the run, as everything random does.
    """

    weak: View
    strong: View
    cutout: Float[Tensor, "*b n 4"]


class Batch(NamedTuple):
    """One micro-batch; `pair` is None in a supervised stage."""

    labelled: Labelled
    pair: Pair | None


class Key(NamedTuple):
    """The place of one person in the run."""

    step: int
    position: int
    unlabelled: bool


class Sets(NamedTuple):
    """The people of a run, and lines to say about them."""

    train: People
    val: People
    unlabelled: People | None
    warnings: tuple[str, ...] = ()

    def split(self, name: Literal["val", "train"]) -> People:
        return self.val if name == "val" else self.train

    def __str__(self) -> str:
        named = [("train", self.train), ("val", self.val), ("unlabelled", self.unlabelled)]
        skipped = sum(people.num_skipped for _, people in named if people)
        counts = ", ".join(f"{len(people)} {name}" for name, people in named if people)
        left_out = f" ({skipped} skipped: their pictures do not decode)" if skipped else ""
        return "\n".join([f"people: {counts}{left_out}", *self.warnings])


def open_people(config: DataConfig, skeleton: Skeleton, *, unlabelled: bool) -> Sets:
    """Find (or draw), read and check the people of a run.

    Args:
        unlabelled: whether the run has a stage that learns from unlabelled people.

    Raises:
        UserError: what is missing or broken, by name.
    """
    root, cache = places(config)
    k = skeleton.num_keypoints
    train = coco.labelled_people(root, config.train_annotations, config.train_images, k, cache)
    labelled = pool.labelled_places(config, train)
    found = {
        "train": dataclasses.replace(train, rows=train.rows.select(labelled)),
        "val": coco.labelled_people(root, config.val_annotations, config.val_images, k, cache),
    }
    warnings: tuple[str, ...] = ()
    if unlabelled:
        found["unlabelled"], warnings = pool.gather(root, config, k, cache, train, labelled)
    checked = {n: coco.checked(p, config.on_bad_image, config.check_images) for n, p in found.items()}
    sets = Sets(checked["train"], checked["val"], checked.get("unlabelled"), warnings)
    check_targets(sets.train, config)
    if sets.unlabelled:
        pool.refuse_leaks(sets.val, sets.train, sets.unlabelled)
    return sets


def open_split(config: DataConfig, skeleton: Skeleton, split: Literal["val", "train"]) -> People:
    """The people of one split alone, as `open_people` has them.

    Raises:
        UserError: as `open_people`.
    """
    root, cache = places(config)
    files = (config.val_annotations, config.val_images)
    if split == "train":
        files = (config.train_annotations, config.train_images)
    people = coco.labelled_people(root, *files, skeleton.num_keypoints, cache)
    if split == "train":
        people = dataclasses.replace(people, rows=people.rows.select(pool.labelled_places(config, people)))
    return coco.checked(people, config.on_bad_image, config.check_images)


def places(config: DataConfig) -> tuple[Path, Path]:
    """The root of the data, drawn if there is none, and the folder of the tables made of it.

    Raises:
        UserError: no such root.
    """
    default = os.environ.get("SAPIENS_ACCEL_CACHE") or Path.home() / ".cache" / "sapiens_accel"
    cache = Path(config.cache_dir or default)
    root = Path(config.root) if config.root else _drawn(config, cache)
    if not root.is_dir():
        raise UserError(f"--data.root {root}: no such folder")
    return root, cache


def _drawn(config: DataConfig, cache: Path) -> Path:
    drawn = config.synthetic
    name = f"synthetic{synthetic.VERSION}-{drawn.num_train}-{drawn.num_unlabelled}-{drawn.num_val}-{drawn.seed}"
    return synthetic.write(cache / name, **dataclasses.asdict(drawn))


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
        parts = f"{self.num_ranks} process(es) x {self.micro_batch} x {self.accumulation} accumulated"
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
        stream: the name of the sequence (a stage, labelled or not), part of the seed.
    """
    per_epoch = steps_per_epoch(num_people, global_batch)
    # Fewer people than a batch: pass over them again and again.
    passes = -(-global_batch // num_people)
    start = step % per_epoch * global_batch
    return _permutations(seed, stream, step // per_epoch, num_people, passes)[start : start + global_batch]


@lru_cache(maxsize=8)
def _permutations(seed: int, stream: str, epoch: int, num_people: int, passes: int) -> Int[Array, "n"]:
    # Kept for the epoch: permuting all of COCO takes 2 ms, and every sample asks.
    rng = default_rng([seed, zlib.crc32(stream.encode()), epoch])
    return np.concatenate([rng.permutation(num_people) for _ in range(passes)])


class TrainingPeople(Dataset[Labelled | Pair]):
    """Key -> augmented sample. `seed` and `stage` complete the key."""

    def __init__(
        self, sets: Sets, augmenter: Augmenter, config: DataConfig, plan: StageConfig, *, seed: int, stage: str
    ) -> None:
        self.labelled, self.unlabelled = sets.train, sets.unlabelled
        self.augmenter, self.config = augmenter, config
        self.seed, self.stage, self.global_batch = seed, stage, plan.global_batch
        self.ratio = plan.ratio
        self.cutout = plan.teacher.cutout if plan.teacher else 0
        self.changes = partial(change_pixels, augmenter.pixel_changes())

    def __getitem__(self, key: Key) -> Labelled | Pair:
        stream = f"{self.stage}/unlabelled" if key.unlabelled else self.stage
        rng = default_rng([self.seed, zlib.crc32(stream.encode()), key.step, key.position])
        if not key.unlabelled:
            chosen = order(self.seed, stream, key.step, len(self.labelled), self.global_batch)
            return self._labelled(int(chosen[key.position]), rng)
        assert self.unlabelled is not None
        chosen = order(self.seed, stream, key.step, len(self.unlabelled), self.global_batch * self.ratio)
        return self._pair(int(chosen[key.position]), rng)

    def _labelled(self, index: int, rng: Generator) -> Labelled:
        row = self.labelled.rows[index]
        keypoints = np.asarray(row["keypoints"])
        crop = self.augmenter.train_crop(self._base(row), keypoints, rng)
        image = read_image(self.labelled.root / row["file_name"])
        view = _view(image, crop, self.config.input_hw, partial(self.changes, rng=rng))
        return _with_labels(view, keypoints, crop, row, self.config, self.augmenter.skeleton)

    def _pair(self, index: int, rng: Generator) -> Pair:
        assert self.unlabelled is not None
        row = self.unlabelled.rows[index]
        image = read_image(self.unlabelled.root / row["file_name"])
        return pair_of(image, self._base(row), self.augmenter, self.changes, self.cutout, rng)[0]

    def _base(self, row: dict) -> Crop:
        return geometry.box_crop(np.asarray(row["box_xywh"]), self.config.box_padding, self.config.input_hw)


class EvaluationPeople(Dataset[Labelled]):
    """Index -> the upright, unchanged crop of a person; what evaluation sees."""

    def __init__(self, people: People, config: DataConfig, skeleton: Skeleton) -> None:
        self.people, self.config, self.skeleton = people, config, skeleton

    def __len__(self) -> int:
        return len(self.people)

    def __getitem__(self, index: int) -> Labelled:
        row = self.people.rows[index]
        crop = geometry.box_crop(np.asarray(row["box_xywh"]), self.config.box_padding, self.config.input_hw)
        view = _view(read_image(self.people.root / row["file_name"]), crop, self.config.input_hw)
        return _with_labels(view, np.asarray(row["keypoints"]), crop, row, self.config, self.skeleton)


def pair_of(
    image: UInt8[Array, "h w 3"], base: Crop, augmenter: Augmenter, changes: Callable, num_cutouts: int, rng: Generator
) -> tuple[Pair, Crop]:
    """Both views of the person whose upright crop is `base`, and the strong view's crop.

    Args:
        changes: `change_pixels` with the strong view's changes.
    """
    weak = augmenter.weak_crop(base, rng)
    strong = augmenter.strong_crop(weak, rng)
    weak_view = _view(image, weak, augmenter.input_hw)
    strong_view = _view(image, strong, augmenter.input_hw, partial(changes, rng=rng))
    cutout = torch.from_numpy(rng.random((num_cutouts, 4), dtype=np.float32))
    return Pair(weak_view, strong_view, cutout), strong


def _view(image: UInt8[Array, "h w 3"], crop: Crop, input_hw: tuple[int, int], changes=None) -> View:
    matrix = crop.matrix(input_hw)
    picture = geometry.warp(image, matrix, input_hw)
    picture = changes(picture) if changes else picture
    channels_first = torch.from_numpy(np.ascontiguousarray(picture.transpose(2, 0, 1)))
    return View(channels_first, torch.from_numpy(matrix.astype(np.float32)), torch.tensor(crop.flip))


def _with_labels(
    view: View, keypoints: Float[Array, "k 3"], crop: Crop, row: dict, config: DataConfig, skeleton: Skeleton
) -> Labelled:
    seen = seen_in(crop, keypoints, config.input_hw, skeleton)
    points_xy, weights = seen[:, :2].astype(np.float32), target_weights(seen[:, 2], config.occluded_weight)
    return Labelled(view, torch.from_numpy(points_xy), torch.from_numpy(weights), torch.tensor(row["ann_id"]))


def seen_in(
    crop: Crop, keypoints: Float[Array, "k 3"], input_hw: tuple[int, int], skeleton: Skeleton
) -> Float[Array, "k 3"]:
    """Keypoints (x and y in image px, visibility) in a crop's input px, left and right swapped where it is mirrored."""
    if crop.flip:
        keypoints = keypoints[list(skeleton.mirror)]
    points_xy = geometry.apply(crop.matrix(input_hw), keypoints[:, :2])
    return np.concatenate([points_xy, keypoints[:, 2:]], axis=1)


def target_weights(visibility: Float[Array, "k"], occluded: float) -> Float[Array, "k"]:
    """COCO's v (0 unlabelled, 1 occluded, 2 visible) to float32 target weights 0, `occluded`, 1."""
    return np.select([visibility >= 2, visibility >= 1], [1.0, occluded], 0.0).astype(np.float32)


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
    for batch in plainly(loader):
        yield to_device(batch, device)


def plainly(loader: Iterable[Loaded]) -> Iterator[Loaded]:
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


def collate(samples: Sequence[Labelled | Pair]) -> Batch:
    """Stack labelled people and pairs, each among themselves."""
    labelled = [sample for sample in samples if isinstance(sample, Labelled)]
    pairs = [sample for sample in samples if isinstance(sample, Pair)]
    return Batch(default_collate(labelled), default_collate(pairs) if pairs else None)


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
    interrupt.leave_to_parent()


def check_targets(people: People, config: DataConfig) -> None:
    """Refuse people whose labelled keypoints mostly lie outside their crops: nearly every target would be zero.

    Raises:
        UserError: with an annotation for which it is so.
    """
    keypoints, boxes = keypoints_of(people.rows), boxes_of(people.rows)
    labelled = keypoints[..., 2] > 0
    inside = in_crop(boxes, keypoints, config.box_padding, config.input_hw)
    tiny = np.median(boxes[:, 2:]) < 2  # boxes in fractions of the picture, not in pixels
    if inside.sum() < labelled.sum() / 2 or tiny:
        worst = int(np.argmin(inside.sum(axis=1) / np.maximum(labelled.sum(axis=1), 1)))
        raise UserError(
            f"{people.annotations}: {'nearly ' if inside.any() else ''}all targets are zero: {inside.sum()} of "
            f"{labelled.sum()} labelled keypoints lie in their person's box (annotation "
            f"{people.rows[worst]['ann_id']}: box {boxes[worst].tolist()}); expected both in pixels of the picture"
        )
