"""Rows of people to seeded batches of crops: a batch is a function of (seed, stage, step).

    order (seed, stage, step) -> keys of one global batch -> this rank's micro-batches -> workers: decode, crop, augment

Each person's augmentation has a generator of its own, seeded by its place in the run, so the number of workers, ranks
and accumulated micro-batches changes no byte, and a run can start at any step. Workers ship uint8 pictures and points.
"""

import ctypes
import dataclasses
import os
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import cv2
import datasets
import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from numpy import ndarray as Array
from numpy.random import Generator, default_rng
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from sapiens_accel.config.schema import DataConfig, MoreData, StageConfig
from sapiens_accel.data import keypoint_mapping as category
from sapiens_accel.data import people as coco
from sapiens_accel.data import sampling as mixture
from sapiens_accel.data import streaming as stream
from sapiens_accel.data import unlabeled as pool
from sapiens_accel.data.augment import Augmenter, change_pixels
from sapiens_accel.data.people import People, Rows, boxes_of, keypoints_of
from sapiens_accel.data.sampling import Mixture
from sapiens_accel.errors import UserError
from sapiens_accel.pose import geometry
from sapiens_accel.pose import infer_skeleton as custom
from sapiens_accel.pose.geometry import Crop
from sapiens_accel.pose.infer_skeleton import Category
from sapiens_accel.pose.skeleton import COCO17, Skeleton
from sapiens_accel.runtime import signals as interrupt
from sapiens_accel.sources import discover as sources
from sapiens_accel.sources import shards, synthetic
from sapiens_accel.sources.images import Picture, read_picture

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
CHECKED = 5_000  # people whose targets are looked at before a run, evenly spread
UNCOMPARED = "streaming: the pictures of training were not compared with those of validation"
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
    """The people of a run, what their keypoints are, and lines to say about them."""

    train: People
    val: People
    unlabelled: People | None
    warnings: tuple[str, ...] = ()
    skeleton: Skeleton = COCO17
    mixture: Mixture | None = None

    def split(self, name: Literal["val", "train"]) -> People:
        """The people of one split to judge by: of several training sets the first's, whose JSON is the truth."""
        train = self.train.sources[0] if self.mixture else self.train
        return self.val if name == "val" else train

    def __str__(self) -> str:
        named = [("train", self.train), ("val", self.val), ("unlabelled", self.unlabelled)]
        skipped = sum(people.num_skipped for _, people in named if people)
        counts = ", ".join(f"{len(people)} {name}" for name, people in named if people)
        left_out = f" ({skipped} skipped: their pictures do not decode)" if skipped else ""
        mixed = [str(self.mixture)] if self.mixture else []
        return "\n".join([f"people: {counts}{left_out}", *mixed, *self.warnings])


def open_skeleton(config: DataConfig) -> tuple[Skeleton, tuple[str, ...]]:
    """What the keypoints of a run are, and what to say about it: as its training sets and `data.skeleton` tell.

    Raises:
        UserError: they do not tell; as `category.described`, `custom.given` and `custom.skeleton`.
    """
    config = located(config)
    root, cache = places(config)
    asked = custom.given(config.skeleton, root) if config.skeleton else None
    return custom.skeleton([category_of(one, config, root, cache) for one in train_sets(config)], asked)


def open_people(config: DataConfig, skeleton: Skeleton, *, unlabelled: bool) -> Sets:
    """Find (or draw), read and check the people of a run.

    Args:
        unlabelled: whether the run has a stage that learns from unlabelled people.

    Raises:
        UserError: what is missing or broken, by name.
    """
    config = located(config)
    if config.streaming:
        return _open_streams(config, skeleton, unlabelled=unlabelled)
    root, cache = places(config)
    first, *others = train_sets(config)
    train, told = _labelled_people(first, config, skeleton, root, cache)
    labelled = pool.labelled_places(config, train)
    val, told_of_val = _labelled_people(val_set(config), config, skeleton, root, cache)
    found = {"train": coco.chosen_of(train, labelled), "val": val}
    warnings = [told, told_of_val]
    if unlabelled:
        found["unlabelled"], more = pool.gather(root, config, skeleton.num_keypoints, cache, train, labelled)
        warnings += more
    checked = {n: coco.checked(p, config.on_bad_image, config.check_images) for n, p in found.items()}
    several = [checked["train"]]
    for one in others:
        people, told = _labelled_people(one, config, skeleton, root, cache)
        several.append(coco.checked(people, config.on_bad_image, config.check_images))
        warnings.append(told)
    for people in several:
        check_targets(people, config)
    num_skipped = sum(people.num_skipped for people in several)
    sets = Sets(
        train=dataclasses.replace(coco.together(several), num_skipped=num_skipped) if others else several[0],
        val=checked["val"],
        unlabelled=checked.get("unlabelled"),
        warnings=tuple(line for line in warnings if line),
        skeleton=skeleton,
        mixture=_mixture(config, [len(people) for people in several]) if others else None,
    )
    if sets.unlabelled:
        told = pool.refuse_leaks(sets.val, sets.train, sets.unlabelled)
        sets = sets._replace(warnings=(*sets.warnings, *told))
    return sets


def _open_streams(config: DataConfig, skeleton: Skeleton, *, unlabelled: bool) -> Sets:
    """The same, of pictures that are read when they are needed; those of validation are few, and opened as always."""
    for knob in ("labels", "on_bad_image", "more"):
        if getattr(config, knob) != getattr(DataConfig, knob):
            raise UserError(
                f"--data.{knob} {getattr(config, knob)}: not with --data.streaming true; convert what is meant"
            )
    root, cache = places(config)
    k, of_train = skeleton.num_keypoints, (root / config.train_annotations, config.train_images)
    if not shards.is_manifest(of_train[0]):
        raise UserError(f"--data.root {config.root}: --data.streaming true needs parquet, Arrow or tar shards of train")
    reading, told = category.reading(category_of(train_sets(config)[0], config, root, cache), skeleton.names)
    train = stream.people(root, [stream.Source(*of_train, stream.labelled, reading)], k, cache)
    first = datasets.Dataset.from_list(list(stream.sample(train, 100)), features=coco.features_of(k))
    check_targets(dataclasses.replace(train, rows=first), config)
    val = open_split(config, skeleton, "val")
    others = None
    if unlabelled:
        chosen = stream.Unlabelled(config.unlabelled_min_side)
        given = root / (config.unlabelled_annotations or "")
        places_of = [(given, config.unlabelled_images)] * shards.is_manifest(given)
        places_of += [(*of_train, reading)] * config.unlabelled_train_people
        if not places_of:
            raise UserError(f"--data.root {config.root}: no shards of 'unlabelled' in it for stage ssl")
        found = [stream.Source(path, images, chosen, *how) for path, images, *how in places_of]
        others = stream.people(root, found, k, cache)
    return Sets(train, val, others, tuple(line for line in (told, UNCOMPARED) if line), skeleton)


def open_split(config: DataConfig, skeleton: Skeleton, split: Literal["val", "train"]) -> People:
    """The people of one split alone (of training, the first set's), as `open_people` has them.

    Raises:
        UserError: as `open_people`.
    """
    config = located(config)
    root, cache = places(config)
    one = val_set(config) if split == "val" else train_sets(config)[0]
    people, _ = _labelled_people(one, config, skeleton, root, cache)
    if split == "train":
        people = coco.chosen_of(people, pool.labelled_places(config, people))
    return coco.checked(people, config.on_bad_image, config.check_images)


def train_sets(config: DataConfig) -> tuple[MoreData, ...]:
    """The training sets of a `located` config, each as one of `data.more`."""
    files, category, weight = (config.train_annotations, config.train_images), config.category, config.weight
    first = MoreData(train_annotations=files[0], train_images=files[1], category=category, weight=weight)
    return first, *config.more


def val_set(config: DataConfig) -> MoreData:
    """That of validation, in the same form."""
    return MoreData(train_annotations=config.val_annotations, train_images=config.val_images, category=config.category)


def files_of(one: MoreData, root: Path, cache: Path) -> tuple[str, str]:
    """The annotations and the folder of pictures of a set, relative to the root, or absolute where it has its own.

    Raises:
        UserError: its own root is no folder; as `sources.folder`.
    """
    if one.root is None:
        return one.train_annotations, one.train_images
    own = sources.folder(one.root, cache, streaming=False, columns=one.columns).resolve()
    if not own.is_dir():
        raise UserError(f"--data.more: root {one.root}: no such folder")
    if (manifest := own / f"train{shards.SUFFIX}").is_file():
        return str(manifest), str(manifest)
    return str(own / one.train_annotations), str(own / one.train_images)


def category_of(one: MoreData, config: DataConfig, root: Path, cache: Path) -> Category:
    """What the JSON of a set tells of its keypoints.

    Raises:
        UserError: as `category.described`.
    """
    file = coco.annotation_file(root, files_of(one, root, cache)[0])
    return category.described(file, one.category or config.category, cache)


def _labelled_people(
    one: MoreData, config: DataConfig, skeleton: Skeleton, root: Path, cache: Path
) -> tuple[People, str]:
    """The labelled people of a set with the run's keypoints, and a line about those that it lacks ("" if none)."""
    reading, told = category.reading(category_of(one, config, root, cache), skeleton.names)
    return coco.labelled_people(root, *files_of(one, root, cache), skeleton.num_keypoints, cache, reading), told


def _mixture(config: DataConfig, sizes: Sequence[int]) -> Mixture:
    given = [one.weight for one in train_sets(config)]
    try:
        return Mixture(sizes=tuple(sizes), weights=mixture.weights_of(sizes, given))
    except ValueError as error:
        raise UserError(f"--data.weight and the weights of --data.more, {given}: {error}") from None


def located(config: DataConfig) -> DataConfig:
    """The config with the files and folders that its root really has: those of COCO, or manifests of shards.

    Raises:
        UserError: as `places`.
    """
    return sources.named(config, places(config)[0])


def places(config: DataConfig) -> tuple[Path, Path]:
    """The root of the data, drawn if there is none, and the folder of the tables made of it.

    Raises:
        UserError: no such root.
    """
    default = os.environ.get("SAPIENS_ACCEL_CACHE") or Path.home() / ".cache" / "sapiens_accel"
    cache = Path(config.cache_dir or default)
    root = _folder(config, cache) if config.root else _drawn(config, cache)
    if not root.is_dir():
        raise UserError(f"--data.root {root}: no such folder")
    return root, cache


def _folder(config: DataConfig, cache: Path) -> Path:
    return sources.folder(str(config.root), cache, streaming=config.streaming, columns=config.columns)


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


@lru_cache(maxsize=3)
def _permutations(seed: int, stream: str, epoch: int, num_people: int, passes: int) -> Int[Array, "n"]:
    # Kept for the epoch: permuting all of COCO takes 2 ms, and every sample asks.
    rng = default_rng([seed, zlib.crc32(stream.encode()), epoch])
    return np.concatenate([rng.permutation(num_people) for _ in range(passes)])


class TrainingPeople(Dataset[Labelled | Pair]):
    """Key -> augmented sample. `seed` and `stage` complete the key.

    Raises:
        UserError: a set of a mixture that would never be seen.
    """

    def __init__(
        self, sets: Sets, augmenter: Augmenter, config: DataConfig, plan: StageConfig, *, seed: int, stage: str
    ) -> None:
        self.labelled, self.unlabelled, self.mixture = sets.train, sets.unlabelled, sets.mixture
        self.labelled_rows = _rows_of(sets.train)
        self.unlabelled_rows = _rows_of(sets.unlabelled) if sets.unlabelled else None
        self.augmenter, self.config = augmenter, config
        self.seed, self.stage, self.global_batch = seed, stage, plan.global_batch
        self.ratio = plan.ratio
        self.cutout = plan.teacher.cutout if plan.teacher else 0
        self.changes = partial(change_pixels, augmenter.pixel_changes())
        if self.mixture and 0 in (places := self.mixture.places(self.global_batch)):
            number = places.index(0) + 1
            raise UserError(
                f"--data.more: the weight of set {number} gives it no place among {sum(places)} of an epoch"
            )

    def __getitem__(self, key: Key) -> Labelled | Pair:
        name = f"{self.stage}/unlabelled" if key.unlabelled else self.stage
        rng = default_rng([self.seed, zlib.crc32(name.encode()), key.step, key.position])
        if not key.unlabelled:
            chosen = self._order(self.labelled, name, key.step, self.global_batch)
            return self._labelled(int(chosen[key.position]), rng)
        assert self.unlabelled is not None
        chosen = self._order(self.unlabelled, name, key.step, self.global_batch * self.ratio)
        return self._pair(int(chosen[key.position]), rng)

    def _order(self, people: People, name: str, step: int, global_batch: int) -> Int[Array, "global_batch"]:
        if isinstance(people.rows, stream.Rows):
            parts, window = self.config.stream_parts, self.config.stream_window
            return people.rows.order(self.seed, name, step, global_batch, parts, window)
        if self.mixture and people is self.labelled:
            return self.mixture.order(self.seed, name, step, global_batch)
        return order(self.seed, name, step, len(people), global_batch)

    def _labelled(self, index: int, rng: Generator) -> Labelled:
        row = self.labelled_rows[index]
        keypoints = np.asarray(row["keypoints"])
        crop = self.augmenter.train_crop(self._base(row), keypoints, rng)
        picture = read_for([crop], self.labelled.root / row["file_name"], self.config)
        view = _view(picture, crop, self.config.input_hw, partial(self.changes, rng=rng))
        return _with_labels(view, keypoints, crop, row, self.config, self.augmenter.skeleton)

    def _pair(self, index: int, rng: Generator) -> Pair:
        assert self.unlabelled is not None and self.unlabelled_rows is not None
        row = self.unlabelled_rows[index]
        path = self.unlabelled.root / row["file_name"]
        return pair_of(path, self._base(row), self.augmenter, self.config, self.changes, self.cutout, rng)[0]

    def _base(self, row: dict) -> Crop:
        return geometry.box_crop(np.asarray(row["box_xywh"]), self.config.box_padding, self.config.input_hw)


def _rows_of(people: People) -> Rows | stream.Rows:
    return people.rows if isinstance(people.rows, stream.Rows) else Rows(people.rows)


class EvaluationPeople(Dataset[Labelled]):
    """Index -> the upright, unchanged crop of a person; what evaluation sees."""

    def __init__(self, people: People, config: DataConfig, skeleton: Skeleton) -> None:
        self.people, self.config, self.skeleton = people, config, skeleton

    def __len__(self) -> int:
        return len(self.people)

    def __getitem__(self, index: int) -> Labelled:
        row = self.people.rows[index]
        crop = geometry.box_crop(np.asarray(row["box_xywh"]), self.config.box_padding, self.config.input_hw)
        view = _view(read_picture(self.people.root / row["file_name"]), crop, self.config.input_hw)
        return _with_labels(view, np.asarray(row["keypoints"]), crop, row, self.config, self.skeleton)


def pair_of(
    path: Path,
    base: Crop,
    augmenter: Augmenter,
    config: DataConfig,
    changes: Callable,
    num_cutouts: int,
    rng: Generator,
) -> tuple[Pair, Crop]:
    """Both views of the person whose upright crop is `base`, from one decoded picture, and the strong view's crop.

    Args:
        changes: `change_pixels` with the strong view's changes.
    """
    weak = augmenter.weak_crop(base, rng)
    strong = augmenter.strong_crop(weak, rng)
    picture = read_for([weak, strong], path, config)
    weak_view = _view(picture, weak, augmenter.input_hw)
    strong_view = _view(picture, strong, augmenter.input_hw, partial(changes, rng=rng))
    cutout = torch.from_numpy(rng.random((num_cutouts, 4), dtype=np.float32))
    return Pair(weak_view, strong_view, cutout), strong


def read_for(crops: Sequence[Crop], path: Path, config: DataConfig) -> Picture:
    """The picture that the crops are cut from, as small as shows all that is seen in each of them.

    Raises:
        UserError: it does not decode.
    """
    at_most = min(geometry.reduction(crop, config.input_hw) for crop in crops) if config.reduced_decode else 1
    return read_picture(path, at_most)


def _view(picture: Picture, crop: Crop, input_hw: tuple[int, int], changes: Callable | None = None) -> View:
    matrix = crop.matrix(input_hw)
    image = geometry.warp(picture.pixels, geometry.of_reduced(matrix, picture.reduction), input_hw)
    image = changes(image) if changes else image
    return View(_channels_first(image), torch.from_numpy(matrix.astype(np.float32)), _scalar(crop.flip))


def _channels_first(image: UInt8[Array, "h w 3"]) -> UInt8[Tensor, "3 h w"]:
    planes = np.empty((3, *image.shape[:2]), np.uint8)
    cv2.split(image, [planes[0], planes[1], planes[2]])  # half the time of a copy of the transposed array
    return torch.from_numpy(planes)


def _scalar(value: bool | int) -> Tensor:
    return torch.from_numpy(np.array(value))  # a third of the time of torch.tensor


def _with_labels(
    view: View, keypoints: Float[Array, "k 3"], crop: Crop, row: dict, config: DataConfig, skeleton: Skeleton
) -> Labelled:
    seen = seen_in(crop, keypoints, config.input_hw, skeleton)
    points_xy, weights = seen[:, :2].astype(np.float32), target_weights(seen[:, 2], config.occluded_weight)
    return Labelled(view, torch.from_numpy(points_xy), torch.from_numpy(weights), _scalar(row["ann_id"]))


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
    return np.where(visibility >= 2, 1.0, np.where(visibility >= 1, occluded, 0.0)).astype(np.float32)


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
    keep_freed_memory()
    interrupt.leave_to_parent()


def keep_freed_memory() -> None:
    """Have glibc keep what is freed for the next picture: new pages from the system cost 5 % of a batch's time."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc and hasattr(libc, "mallopt"):  # not every Linux has glibc
        for option in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
            libc.mallopt(option, 2**30)


def check_targets(people: People, config: DataConfig) -> None:
    """Refuse people whose labelled keypoints mostly lie outside their crops: nearly every target would be zero.

    Raises:
        UserError: with an annotation for which it is so.
    """
    people = dataclasses.replace(people, rows=coco.some_of(people.rows, CHECKED))
    keypoints, boxes = keypoints_of(people.rows), boxes_of(people.rows)
    labelled = keypoints[..., 2] > 0
    inside = geometry.in_crop(boxes, keypoints, config.box_padding, config.input_hw)
    tiny = np.median(boxes[:, 2:]) < 2  # boxes in fractions of the picture, not in pixels
    if inside.sum() < labelled.sum() / 2 or tiny:
        told = f"{'nearly ' if inside.any() else ''}all targets are zero"
        worst = int(np.argmin(inside.sum(axis=1) / np.maximum(labelled.sum(axis=1), 1)))
        raise UserError(
            f"{people.annotations}: {'boxes are less than 2 px wide or high' if tiny else told}: {inside.sum()} of "
            f"{labelled.sum()} labelled keypoints lie in their person's box (annotation "
            f"{people.rows[worst]['ann_id']}: box {boxes[worst].tolist()}); expected both in pixels of the picture"
        )
