"""Rows of people to seeded batches of crops: a batch is a function of (seed, stage, step).

    order (seed, stage, step) -> keys of one global batch -> this rank's micro-batches -> workers: decode, crop, augment

Each person's augmentation has a generator of its own, seeded by its place in the run, so the number of workers, ranks
and accumulated micro-batches changes no byte, and a run can start at any step. Workers ship uint8 images and points.
"""

import zlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import cv2
import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from numpy import ndarray as Array
from numpy.random import Generator, default_rng
from torch import Tensor
from torch.utils.data import Dataset

from sapiens_accel.config.schema import DataConfig, StageConfig
from sapiens_accel.data import sampling
from sapiens_accel.data.augment import Augmenter, change_pixels
from sapiens_accel.data.people import People, Rows
from sapiens_accel.data.sampling import Mixture
from sapiens_accel.data.streaming import OrderKey, StreamRows
from sapiens_accel.errors import UserError
from sapiens_accel.pose import geometry
from sapiens_accel.pose.geometry import Crop
from sapiens_accel.pose.skeleton import COCO17, Skeleton
from sapiens_accel.pose.visibility import is_labeled, target_weights
from sapiens_accel.sources.images import DecodedImage, read_reduced_image
from sapiens_accel.sources.jpeg_region import Region

LARGE = 1 << 30  # px: no image has such a side


class View(NamedTuple):
    """What is seen of one person: the crop, the matrix input_from_image that made it, and whether it is mirrored."""

    image: UInt8[Tensor, "*b 3 H W"]
    matrix: Float[Tensor, "*b 2 3"]
    flipped: Bool[Tensor, "*b"]


class Labeled(NamedTuple):
    """A view with its keypoints in input px (left and right already swapped where it is mirrored).

    A negative weight is that of an empty target map.
    """

    view: View
    points_xy: Float[Tensor, "*b k 2"]
    weights: Float[Tensor, "*b k"]
    ann_id: Int[Tensor, "*b"]


class Pair(NamedTuple):
    """Two views of one unlabeled person: the teacher's and the student's.

    `cutout` holds uniform draws for `objective.cut_out`: which keypoint, offset in x and y, size. They are drawn here
    so that they depend on the person's place in the run, as everything random does.
    """

    weak: View
    strong: View
    cutout: Float[Tensor, "*b n 4"]


class Batch(NamedTuple):
    """One micro-batch; `pair` is None in a supervised stage."""

    labeled: Labeled
    pair: Pair | None


class Key(NamedTuple):
    """The position of one person in the run."""

    step: int
    position: int
    unlabeled: bool


class Sets(NamedTuple):
    """The people of a run, what their keypoints are, and lines to say about them."""

    train: People
    val: People
    unlabeled: People | None
    warnings: tuple[str, ...] = ()
    skeleton: Skeleton = COCO17
    mixture: Mixture | None = None

    def split(self, name: Literal["val", "train"]) -> People:
        """The people of one split to evaluate by: of several training sets the first's, whose JSON is the truth."""
        train = self.train.parts[0] if self.mixture else self.train
        return self.val if name == "val" else train

    def __str__(self) -> str:
        splits = [("train", self.train), ("val", self.val), ("unlabeled", self.unlabeled)]
        skipped = sum(people.num_skipped for _, people in splits if people)
        counts = ", ".join(f"{len(people)} {name}" for name, people in splits if people)
        left_out = f" ({skipped} skipped: their images cannot be used)" if skipped else ""
        mixture = [str(self.mixture)] if self.mixture else []
        lines = [of.left_out for _, people in splits[:2] if people for of in people.parts or (people,) if of.left_out]
        return "\n".join([f"people: {counts}{left_out}", *lines, *mixture, *self.warnings])


class TrainingPeople(Dataset[Labeled | Pair]):
    """Key -> augmented sample. `seed` and `stage` complete the key.

    Raises:
        UserError: a set of a mixture that would never be seen.
    """

    def __init__(
        self, sets: Sets, augmenter: Augmenter, config: DataConfig, plan: StageConfig, *, seed: int, stage: str
    ) -> None:
        self.labeled, self.unlabeled, self.mixture = sets.train, sets.unlabeled, sets.mixture
        self.labeled_rows = _rows_of(sets.train)
        self.unlabeled_rows = _rows_of(sets.unlabeled) if sets.unlabeled else None
        self.augmenter, self.config = augmenter, config
        self.seed, self.stage, self.global_batch = seed, stage, plan.global_batch
        self.plan, self.unlabeled_steps = plan, plan.unlabeled_steps(sampling.num_steps(plan, len(sets.train)))
        self.num_cutouts = plan.teacher.num_cutouts(augmenter.skeleton.num_keypoints) if plan.teacher else 0
        self.changes = partial(change_pixels, augmenter.pixel_changes())
        if self.mixture and 0 in (shares := self.mixture.shares(self.global_batch)):
            number = shares.index(0) + 1
            raise UserError(
                f"--data.more: the weight of set {number} gives it no place among {sum(shares)} of an epoch"
            )

    def __getitem__(self, key: Key) -> Labeled | Pair:
        name = f"{self.stage}/unlabelled" if key.unlabeled else self.stage
        rng = default_rng([self.seed, zlib.crc32(name.encode()), key.step, key.position])
        if not key.unlabeled:
            chosen = self._order(self.labeled, name, key.step, self.global_batch)
            return self._labeled(int(chosen[key.position]), rng)
        assert self.unlabeled is not None
        chosen = self._order(self.unlabeled, name, key.step, self.plan.num_unlabeled(self.global_batch))
        return self._pair(int(chosen[key.position]), rng)

    def _order(self, people: People, name: str, step: int, global_batch: int) -> Int[Array, "global_batch"]:
        if isinstance(people.rows, StreamRows):
            parts, window = self.config.stream_parts, self.config.stream_window
            return people.rows.order(OrderKey(self.seed, name, global_batch, parts, window), step)
        if self.mixture and people is self.labeled:
            return self.mixture.order(self.seed, name, step, global_batch)
        return sampling.order(self.seed, name, step, len(people), global_batch)

    def _labeled(self, index: int, rng: Generator) -> Labeled:
        row = self.labeled_rows[index]
        keypoints = np.asarray(row["keypoints"])
        crop = self.augmenter.train_crop(self._base(row), keypoints, rng)
        image = read_for_crops([crop], self.labeled.root / row["file_name"], self.config)
        view = _view(image, crop, self.config.input_hw, partial(self.changes, rng=rng))
        return _with_labels(view, keypoints, crop, row, self.config, self.augmenter.skeleton)

    def _pair(self, index: int, rng: Generator) -> Pair:
        assert self.unlabeled is not None and self.unlabeled_rows is not None
        row = self.unlabeled_rows[index]
        path = self.unlabeled.root / row["file_name"]
        settings = PairSettings(self.augmenter, self.config, self.changes, self.num_cutouts)
        return make_pair(path, self._base(row), settings, rng)[0]

    def _base(self, row: dict) -> Crop:
        return geometry.crop_around_box(np.asarray(row["box_xywh"]), self.config.box_padding, self.config.input_hw)


def _rows_of(people: People) -> Rows | StreamRows:
    return people.rows if isinstance(people.rows, StreamRows) else Rows(people.rows)


class PairSettings(NamedTuple):
    """How pairs of views are made; `changes` is `change_pixels` with the strong view's changes."""

    augmenter: Augmenter
    config: DataConfig
    changes: Callable
    num_cutouts: int


def make_pair(path: Path, base: Crop, settings: PairSettings, rng: Generator) -> tuple[Pair, Crop]:
    """Both views of the person whose upright crop is `base`, from one decoded image, and the strong view's crop."""
    augmenter, config, changes, num_cutouts = settings
    weak = augmenter.weak_crop(base, rng)
    strong = augmenter.strong_crop(weak, rng)
    image = read_for_crops([weak, strong], path, config)
    weak_view = _view(image, weak, augmenter.input_hw)
    strong_view = _view(image, strong, augmenter.input_hw, partial(changes, rng=rng))
    cutout = torch.from_numpy(rng.random((num_cutouts, 4), dtype=np.float32))
    return Pair(weak_view, strong_view, cutout), strong


def read_for_crops(crops: Sequence[Crop], path: Path, config: DataConfig) -> DecodedImage:
    """The image that the crops are cut from, or its part that they show, as small as shows all that is seen in each.

    Raises:
        UserError: it does not decode.
    """
    at_most = min(geometry.choose_reduction(crop, config.input_hw) for crop in crops) if config.reduced_decode else 1
    return read_reduced_image(path, at_most, _visible_region(crops, config.input_hw))


def _visible_region(crops: Sequence[Crop], input_hw: tuple[int, int]) -> Region:
    """The part of the image that any of the crops shows; of an image of any size."""
    seen = [geometry.visible_rectangle(crop.matrix(input_hw), input_hw, (LARGE, LARGE)) for crop in crops]
    left, top, right, bottom = zip(*seen, strict=True)
    return Region(min(left), min(top), max(right), max(bottom))


def _view(image: DecodedImage, crop: Crop, input_hw: tuple[int, int], changes: Callable | None = None) -> View:
    matrix = crop.matrix(input_hw)
    from_decoded = geometry.move_origin(geometry.adjust_to_reduction(matrix, image.reduction), image.corner_xy)
    pixels = geometry.warp(image.pixels, from_decoded, input_hw)
    pixels = changes(pixels) if changes else pixels
    return View(_channels_first(pixels), torch.from_numpy(matrix.astype(np.float32)), _scalar(crop.flip))


def _channels_first(image: UInt8[Array, "h w 3"]) -> UInt8[Tensor, "3 h w"]:
    planes = np.empty((3, *image.shape[:2]), np.uint8)
    cv2.split(image, [planes[0], planes[1], planes[2]])  # half the time of a copy of the transposed array
    return torch.from_numpy(planes)


def _scalar(value: bool | int) -> Tensor:
    return torch.from_numpy(np.array(value))  # a third of the time of torch.tensor


def _with_labels(
    view: View, keypoints: Float[Array, "k 3"], crop: Crop, row: dict, config: DataConfig, skeleton: Skeleton
) -> Labeled:
    seen = transform_keypoints(crop, keypoints, config.input_hw, skeleton)
    points_xy, weights = seen[:, :2].astype(np.float32), target_weights(seen[:, 2], config.occluded_weight)
    if config.absent_is_background:
        weights = np.where(is_labeled(seen), weights, np.float32(-1))
    if config.outside_keypoints == "ignored":
        # As sapiens2, sapiens/pose/src/datasets/transforms/pose_transforms.py: 0 <= x < width.
        inside = ((points_xy >= 0) & (points_xy < config.input_hw[::-1])).all(axis=1)
        weights = np.where(inside | (weights < 0), weights, np.float32(0))
    return Labeled(view, torch.from_numpy(points_xy), torch.from_numpy(weights), _scalar(row["ann_id"]))


def transform_keypoints(
    crop: Crop, keypoints: Float[Array, "k 3"], input_hw: tuple[int, int], skeleton: Skeleton
) -> Float[Array, "k 3"]:
    """Keypoints (x and y in image px, visibility) in a crop's input px, left and right swapped where it is mirrored."""
    if crop.flip:
        keypoints = keypoints[list(skeleton.mirror)]
    points_xy = geometry.apply(crop.matrix(input_hw), keypoints[:, :2])
    return np.concatenate([points_xy, keypoints[:, 2:]], axis=1)
