"""The datasets of a run from its config: which files, how they are read, and whether they can be trained from."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import datasets
import numpy as np

from sapiens_accel.config.schema import DataConfig, MoreData
from sapiens_accel.data import keypoint_mapping as category
from sapiens_accel.data import leakage, sampling
from sapiens_accel.data import people as coco
from sapiens_accel.data import streaming as stream
from sapiens_accel.data import unlabeled as pool
from sapiens_accel.data.dataset import Sets
from sapiens_accel.data.people import People, boxes_of, keypoints_of
from sapiens_accel.data.sampling import Mixture
from sapiens_accel.errors import UserError
from sapiens_accel.pose import geometry
from sapiens_accel.pose import infer_skeleton as custom
from sapiens_accel.pose.infer_skeleton import Category
from sapiens_accel.pose.skeleton import Skeleton
from sapiens_accel.sources import discover as sources
from sapiens_accel.sources import shards, synthetic
from sapiens_accel.sources.coco import release_large_trees

CHECKED = 5_000  # people whose targets are looked at before a run, evenly spread
UNCOMPARED = "streaming: the images of training were not compared with those of validation"


def open_skeleton(config: DataConfig) -> tuple[Skeleton, tuple[str, ...]]:
    """What the keypoints of a run are, and what to say about it: as its training sets and `data.skeleton` tell.

    Raises:
        UserError: they do not tell; as `category.described`, `custom.given` and `custom.skeleton`.
    """
    config = located(config)
    root, cache = places(config)
    asked = custom.load_skeleton(config.skeleton, root) if config.skeleton else None
    return custom.infer_skeleton([category_of(one, config, root, cache) for one in train_sets(config)], asked)


def open_people(config: DataConfig, skeleton: Skeleton, *, unlabeled: bool) -> Sets:
    """Find (or draw), read and check the people of a run.

    Args:
        unlabeled: whether the run has a stage that learns from unlabeled people.

    Raises:
        UserError: what is missing or broken, by name.
    """
    config = located(config)
    if config.streaming:
        return _open_streams(config, skeleton, unlabeled=unlabeled)
    root, cache = places(config)
    first, *others = train_sets(config)
    train, told = _labeled_people(first, config, skeleton, root, cache)
    labeled = pool.labeled_places(config, train)
    val, told_of_val = _labeled_people(val_set(config), config, skeleton, root, cache)
    found = {"train": coco.chosen_of(train, labeled), "val": val}
    warnings = [told, told_of_val]
    if unlabeled:
        found["unlabelled"], more = pool.gather(root, config, skeleton.num_keypoints, cache, train, labeled)
        warnings += more
    checked = {n: coco.checked(p, config.on_bad_image, config.check_images) for n, p in found.items()}
    several = [checked["train"]]
    for one in others:
        people, told = _labeled_people(one, config, skeleton, root, cache)
        several.append(coco.checked(people, config.on_bad_image, config.check_images))
        warnings.append(told)
    for people in several:
        check_targets(people, config)
    num_skipped = sum(people.num_skipped for people in several)
    sets = Sets(
        train=dataclasses.replace(coco.together(several), num_skipped=num_skipped) if others else several[0],
        val=checked["val"],
        unlabeled=checked.get("unlabelled"),
        warnings=tuple(line for line in warnings if line),
        skeleton=skeleton,
        mixture=_mixture(config, [len(people) for people in several]) if others else None,
    )
    if sets.unlabeled:
        told = leakage.refuse_leaks(sets.val, sets.train, sets.unlabeled)
        sets = sets._replace(warnings=(*sets.warnings, *told))
    release_large_trees()
    return sets


def _open_streams(config: DataConfig, skeleton: Skeleton, *, unlabeled: bool) -> Sets:
    """The same, of images that are read when they are needed; those of validation are few, and opened as always."""
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
    train = stream.people(root, [stream.StreamSource(*of_train, stream.labeled, reading)], k, cache)
    first = datasets.Dataset.from_list(list(stream.sample(train, 100)), features=coco.features_of(k))
    check_targets(dataclasses.replace(train, rows=first), config)
    val = open_split(config, skeleton, "val")
    others = None
    if unlabeled:
        chosen = stream.Unlabeled(config.unlabelled_min_side)
        given = root / (config.unlabelled_annotations or "")
        places_of = [(given, config.unlabelled_images)] * shards.is_manifest(given)
        places_of += [(*of_train, reading)] * config.unlabelled_train_people
        if not places_of:
            raise UserError(f"--data.root {config.root}: no shards of 'unlabelled' in it for stage ssl")
        found = [stream.StreamSource(path, images, chosen, *how) for path, images, *how in places_of]
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
    people, _ = _labeled_people(one, config, skeleton, root, cache)
    if split == "train":
        people = coco.chosen_of(people, pool.labeled_places(config, people))
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
    """The annotations and the folder of images of a set, relative to the root, or absolute where it has its own.

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


def _labeled_people(
    one: MoreData, config: DataConfig, skeleton: Skeleton, root: Path, cache: Path
) -> tuple[People, str]:
    """The labeled people of a set with the run's keypoints, and a line about those that it lacks ("" if none)."""
    reading, told = category.reading(category_of(one, config, root, cache), skeleton.names)
    return coco.labeled_people(root, *files_of(one, root, cache), skeleton.num_keypoints, cache, reading), told


def _mixture(config: DataConfig, sizes: Sequence[int]) -> Mixture:
    given = [one.weight for one in train_sets(config)]
    try:
        return Mixture(sizes=tuple(sizes), weights=sampling.weights_of(sizes, given))
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


def check_targets(people: People, config: DataConfig) -> None:
    """Refuse people whose labeled keypoints mostly lie outside their crops: nearly every target would be zero.

    Raises:
        UserError: with an annotation for which it is so.
    """
    people = dataclasses.replace(people, rows=coco.some_of(people.rows, CHECKED))
    keypoints, boxes = keypoints_of(people.rows), boxes_of(people.rows)
    labeled = keypoints[..., 2] > 0
    inside = geometry.in_crop(boxes, keypoints, config.box_padding, config.input_hw)
    tiny = np.median(boxes[:, 2:]) < 2  # boxes in fractions of the image, not in pixels
    if inside.sum() < labeled.sum() / 2 or tiny:
        told = f"{'nearly ' if inside.any() else ''}all targets are zero"
        worst = int(np.argmin(inside.sum(axis=1) / np.maximum(labeled.sum(axis=1), 1)))
        raise UserError(
            f"{people.annotations}: {'boxes are less than 2 px wide or high' if tiny else told}: {inside.sum()} of "
            f"{labeled.sum()} labeled keypoints lie in their person's box (annotation "
            f"{people.rows[worst]['ann_id']}: box {boxes[worst].tolist()}); expected both in pixels of the image"
        )
