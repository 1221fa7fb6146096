"""The datasets of a run from its config: which files, how they are read, and whether they can be trained from."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import datasets
import numpy as np

from sapiens_accel.config.schema import DataConfig, MoreData
from sapiens_accel.data import keypoint_mapping, leakage, sampling, streaming
from sapiens_accel.data import people as people_tables
from sapiens_accel.data import unlabeled as unlabeled_data
from sapiens_accel.data.annotation_rules import PeopleReader
from sapiens_accel.data.dataset import Sets
from sapiens_accel.data.people import People, boxes_of, keypoints_of
from sapiens_accel.data.sampling import Mixture
from sapiens_accel.errors import UserError
from sapiens_accel.pose import geometry, infer_skeleton
from sapiens_accel.pose.infer_skeleton import Category
from sapiens_accel.pose.person_boxes import PeopleSizes, are_outside
from sapiens_accel.pose.skeleton import Skeleton
from sapiens_accel.pose.visibility import is_labeled
from sapiens_accel.sources import discover, images, synthetic
from sapiens_accel.sources.coco import release_large_trees, show_value
from sapiens_accel.sources.discover import open_source
from sapiens_accel.sources.foreign import suggest_conversion
from sapiens_accel.sources.schema import Reading

FILLED = 1.15  # an input of an aspect nearer to the image's than this has less than a seventh of itself left empty
SIDE_UNIT = 32  # px of an input's sides: a multiple of all patches, and of the heatmap's quarter
CHECKED = 5_000  # people whose targets are checked before a run, evenly spread
UNCOMPARED = "streaming: the images of training were not compared with those of validation"


def open_skeleton(config: DataConfig) -> tuple[Skeleton, tuple[str, ...]]:
    """What the keypoints of a run are, and what to say about it: as its training sets and `data.skeleton` say.

    Raises:
        UserError: they do not say it; as `keypoint_mapping.describe_keypoints` and `infer_skeleton`.
    """
    config = locate_files(config)
    root, cache = prepare_root(config)
    asked = infer_skeleton.load_skeleton(config.skeleton, root) if config.skeleton else None
    return infer_skeleton.infer_skeleton(
        [read_category(one, config, root, cache) for one in list_train_sets(config)], asked
    )


def open_people(config: DataConfig, skeleton: Skeleton, *, unlabeled: bool) -> Sets:
    """Find (or draw), read and check the people of a run.

    Args:
        unlabeled: whether the run has a stage that learns from unlabeled people.

    Raises:
        UserError: what is missing or broken, by name.
    """
    config = locate_files(config)
    if config.streaming:
        return _open_streams(config, skeleton, unlabeled=unlabeled)
    root, cache = prepare_root(config)
    first, *others = list_train_sets(config)
    train, warning = _labeled_people(first, config, skeleton, root, cache)
    labeled = unlabeled_data.choose_labeled(config, train)
    val, val_warning = _labeled_people(get_val_set(config), config, skeleton, root, cache)
    people_of = {"train": people_tables.select_people(train, labeled), "val": val}
    warnings = [warning, val_warning, train.box_note, val.box_note]
    if unlabeled:
        gathered = unlabeled_data.gather_unlabeled(root, config, skeleton.num_keypoints, cache, train, labeled)
        people_of["unlabelled"], more = gathered
        warnings += more
    checked = {name: _check(people, config) for name, people in people_of.items()}
    warnings += [*(people.size_note for people in checked.values()), _describe_bits(*checked.values())]
    parts = [checked["train"]]
    for one in others:
        people, warning = _labeled_people(one, config, skeleton, root, cache)
        people, leaks = leakage.leave_out_copies(_check(people, config), checked["val"], config.on_leak, cache)
        parts.append(people)
        warnings += [people.size_note, warning, people.box_note, leaks]
    for people in (*parts, checked["val"]):
        check_targets(people, config)
    warnings.append(leakage.describe_leaks(parts[0], checked["val"]))
    num_skipped = sum(people.num_skipped for people in parts)
    sizes = people_tables.measure_people(parts)
    warnings.append(_propose_whole_images(config, sizes))
    sets = Sets(
        train=dataclasses.replace(people_tables.join_people(parts), num_skipped=num_skipped) if others else parts[0],
        val=checked["val"],
        unlabeled=checked.get("unlabelled"),
        warnings=tuple(line for line in warnings if line),
        skeleton=_record_training(skeleton, sizes, config),
        mixture=_mixture(config, [len(people) for people in parts]) if others else None,
    )
    if sets.unlabeled:
        more = leakage.refuse_leaks(sets.val, sets.train, sets.unlabeled)
        sets = sets._replace(warnings=(*sets.warnings, *more))
    release_large_trees()
    return sets


def _check(people: People, config: DataConfig) -> People:
    return people_tables.check_people(people, config.on_bad_image, config.check_images)


def _describe_bits(*several: People) -> str:
    some = [people_tables.spread_rows(people.rows, images.LOOKED_AT)["file_name"][:] for people in several]
    return images.describe_bits(several[0].root, list(dict.fromkeys(name for names in some for name in names)))


def _open_streams(config: DataConfig, skeleton: Skeleton, *, unlabeled: bool) -> Sets:
    """The same, of images that are read when they are needed; those of validation are few, and opened as always."""
    for option in ("labels", "on_bad_image", "more"):
        if (value := getattr(config, option)) != getattr(DataConfig, option):
            raise UserError(
                f"--data.{option} {value}: not with --data.streaming true; leave one of them out, or convert what is "
                f"meant to a set of its own"
            )
    root, cache = prepare_root(config)
    train_source = open_source(root / config.train_annotations)
    if not train_source.groups():
        raise UserError(f"--data.root {config.root}: --data.streaming true needs parquet, Arrow or tar shards of train")
    reading, warning = choose_reading(list_train_sets(config)[0], config, skeleton, root, cache)
    reader = PeopleReader(source=train_source, prefix=config.train_images, num_keypoints=skeleton.num_keypoints,
                          reading=reading)  # fmt: skip
    train = streaming.open_streams(root, [streaming.StreamSource(reader, streaming.labeled)], cache)
    features = people_tables.features_of(skeleton.num_keypoints)
    first = datasets.Dataset.from_list(list(streaming.sample(train, 100)), features=features)
    check_targets(dataclasses.replace(train, rows=first), config)
    val = open_split(config, skeleton, "val")
    others = _open_unlabeled_streams(config, reader, root, cache) if unlabeled else None
    skeleton = _record_training(skeleton, streaming.measure_stream(train), config)
    lines = (
        warning,
        train.box_note,
        val.box_note,
        val.size_note,
        _propose_whole_images(config, skeleton.people),
        UNCOMPARED,
    )
    return Sets(train, val, others, tuple(line for line in lines if line), skeleton)


def _record_training(skeleton: Skeleton, sizes: PeopleSizes | None, config: DataConfig) -> Skeleton:
    """The skeleton with what predictions have to know of the training: exported weights keep it."""
    return dataclasses.replace(skeleton, people=sizes, image_bits=config.image_bits, box_padding=config.box_padding)


def _open_unlabeled_streams(config: DataConfig, train: PeopleReader, root: Path, cache: Path) -> People:
    readers = []
    if config.unlabelled_annotations and (source := open_source(root / config.unlabelled_annotations)).groups():
        prefix = config.unlabelled_images
        readers.append(PeopleReader(source=source, prefix=prefix, num_keypoints=train.num_keypoints))
    if config.unlabelled_train_people:
        readers.append(train)
    if not readers:
        raise unlabeled_data.NoUnlabeledPeople(f"--data.root {config.root} has no shards of 'unlabelled'")
    chosen = streaming.Unlabeled(config.unlabelled_min_side)
    return streaming.open_streams(root, [streaming.StreamSource(reader, chosen) for reader in readers], cache)


def open_split(config: DataConfig, skeleton: Skeleton, split: Literal["val", "train"]) -> People:
    """The people of one split alone (of training, the first set's), as `open_people` has them.

    Raises:
        UserError: as `open_people`.
    """
    config = locate_files(config)
    root, cache = prepare_root(config)
    one = get_val_set(config) if split == "val" else list_train_sets(config)[0]
    people, _ = _labeled_people(one, config, skeleton, root, cache)
    if split == "train":
        people = people_tables.select_people(people, unlabeled_data.choose_labeled(config, people))
    people = _check(people, config)
    lines = [line for line in (people.box_note, _describe_bits(people)) if line]
    return dataclasses.replace(people, box_note="; ".join(lines))


def list_train_sets(config: DataConfig) -> tuple[MoreData, ...]:
    """The training sets of a `locate_files` config, each as one of `data.more`."""
    files, category, weight = (config.train_annotations, config.train_images), config.category, config.weight
    first = MoreData(train_annotations=files[0], train_images=files[1], category=category, weight=weight)
    return first, *config.more


def get_val_set(config: DataConfig) -> MoreData:
    """That of validation, in the same form."""
    return MoreData(train_annotations=config.val_annotations, train_images=config.val_images, category=config.category)


def files_of(one: MoreData, root: Path, cache: Path) -> tuple[str, str]:
    """The annotations and the folder of images of a set, relative to the root, or absolute where it has its own.

    Raises:
        UserError: its own root is no folder; as `discover.find_folder`.
    """
    if one.root is None:
        return one.train_annotations, one.train_images
    own = discover.find_folder(one.root, cache, streaming=False, columns=one.columns).resolve()
    if not own.is_dir():
        raise UserError(f"--data.more: root {one.root}: no such folder")
    return discover.train_files(own, one.train_annotations, one.train_images)


def read_category(one: MoreData, config: DataConfig, root: Path, cache: Path) -> Category:
    """What the JSON of a set says of its keypoints.

    Raises:
        UserError: as `keypoint_mapping.describe_keypoints`.
    """
    file = people_tables.annotation_file(root, files_of(one, root, cache)[0])
    return keypoint_mapping.describe_keypoints(file, one.category or config.category, cache)


def choose_reading(
    one: MoreData, config: DataConfig, skeleton: Skeleton, root: Path, cache: Path
) -> tuple[Reading, str]:
    """How a set's annotations are read as the run's people, and a line about keypoints that it lacks ("" if none).

    Raises:
        UserError: as `read_category` and `keypoint_mapping.choose_reading`; `absent_is_background` of a set that does
            not label all of the keypoints.
    """
    category = read_category(one, config, root, cache)
    if config.skeleton:
        category = category.called(skeleton.names)
    reading, warning = keypoint_mapping.choose_reading(category, skeleton.names)
    if config.absent_is_background and -1 in (reading.source or ()):
        raise UserError(
            f"--data.absent_is_background: {category.file} does not label all of the run's keypoints, so that v=0 does "
            f"not mean there that they are not in the image; leave it out, or the dataset"
        )
    return dataclasses.replace(
        reading,
        threshold=config.visibility_threshold,
        boxes=config.boxes,
        box_margin=config.box_margin,
        clips_boxes=config.clip_boxes,
    ), warning


def _labeled_people(
    one: MoreData, config: DataConfig, skeleton: Skeleton, root: Path, cache: Path
) -> tuple[People, str]:
    """The labeled people of a set with the run's keypoints, and a line about those that it lacks ("" if none)."""
    reading, warning = choose_reading(one, config, skeleton, root, cache)
    annotations, images = files_of(one, root, cache)
    people = people_tables.labeled_people(root, annotations, images, skeleton.num_keypoints, cache, reading)
    return people, warning


def _propose_whole_images(config: DataConfig, sizes: PeopleSizes | None) -> str:
    """With `boxes: image`, a line on how an image fills the network's input; empty where it does."""
    if config.boxes != "image" or sizes is None:
        return ""
    height, width = config.input_hw
    if config.box_padding <= 1 and max(sizes.aspect[1] * height / width, width / height / sizes.aspect[1]) <= FILLED:
        return ""
    side = (height * width / sizes.aspect[1]) ** 0.5
    proposed = [max(SIDE_UNIT, round(one / SIDE_UNIT) * SIDE_UNIT) for one in (side, side * sizes.aspect[1])]
    return (
        f"proposed for whole images (--data.boxes image; width / height {sizes.aspect[1]:.2f} in the median): "
        f'--data.box_padding 1 --data.input_hw "[{proposed[0]}, {proposed[1]}]"; now much of the input is empty'
    )


def _mixture(config: DataConfig, sizes: Sequence[int]) -> Mixture:
    weights = [one.weight for one in list_train_sets(config)]
    try:
        return Mixture(sizes=tuple(sizes), weights=sampling.fill_weights(sizes, weights))
    except ValueError as error:
        raise UserError(f"--data.weight and the weights of --data.more, {weights}: {error}") from None


def locate_files(config: DataConfig) -> DataConfig:
    """The config with the files and folders that its root really has: those of COCO, or manifests of shards.

    Raises:
        UserError: as `prepare_root`.
    """
    return discover.name_files(config, prepare_root(config)[0])


def prepare_root(config: DataConfig) -> tuple[Path, Path]:
    """The root of the data, drawn if there is none, and the folder of the tables made of it.

    Raises:
        UserError: no such root.
    """
    images.set_image_bits(config.image_bits)
    cache = cache_folder(config)
    root = _folder(config, cache) if config.root else _drawn(config, cache)
    if not root.is_dir():
        found = "a file (expected a folder)" if Path(root).is_file() else "no such folder"
        raise UserError(f"--data.root {root}: {found}{suggest_conversion(root)}")
    return root, cache


def cache_folder(config: DataConfig) -> Path:
    """Where drawn people and tables are kept.

    Raises:
        UserError: the user has no home directory (`docker run --user`), and no other folder is named.
    """
    if named := config.cache_dir or os.environ.get("SAPIENS_ACCEL_CACHE"):
        return Path(named)
    try:
        return Path.home() / ".cache" / "sapiens_accel"
    except RuntimeError:
        raise UserError("this user has no home directory for ~/.cache. Set HOME, or give --data.cache_dir") from None


def _folder(config: DataConfig, cache: Path) -> Path:
    return discover.find_folder(str(config.root), cache, streaming=config.streaming, columns=config.columns)


def _drawn(config: DataConfig, cache: Path) -> Path:
    drawn = config.synthetic
    name = f"synthetic{synthetic.VERSION}-{drawn.num_train}-{drawn.num_unlabelled}-{drawn.num_val}-{drawn.seed}"
    return synthetic.write(cache / name, **dataclasses.asdict(drawn))


def _refuse_boxes_outside(people: People) -> None:
    boxes, sizes = boxes_of(people.rows), people_tables.sizes_of(people.rows)
    outside = np.flatnonzero(are_outside(boxes, sizes))
    if not len(outside):
        return
    first = outside[0]
    (given,) = people_tables.read_given_ids(people, np.array([people.rows[int(first)]["ann_id"]]))
    width, height = sizes[first].tolist()
    size = f" in an image of {width:g} x {height:g}" if width > 0 else ""
    raise UserError(
        f"{people.annotations}: {len(outside)} of {len(people)} people have a box outside their image: annotation "
        f"{show_value(given)} has {boxes[first].tolist()}{size}; expected x, y, width, height in "
        "pixels of the image. Correct 'bbox', or the keypoints where the box is made from them"
    )


def check_targets(people: People, config: DataConfig) -> None:
    """Refuse a box outside its image, whose crop would be empty, and people whose labeled keypoints mostly lie outside
    their crops: nearly every target would be zero.

    Raises:
        UserError: with an annotation for which it is so.
    """
    _refuse_boxes_outside(people)
    people = dataclasses.replace(people, rows=people_tables.spread_rows(people.rows, CHECKED))
    keypoints, boxes = keypoints_of(people.rows), boxes_of(people.rows)
    labeled = is_labeled(keypoints)
    inside = geometry.in_crop(boxes, keypoints, config.box_padding, config.input_hw)
    tiny = np.median(boxes[:, 2:]) < 2  # boxes in fractions of the image, not in pixels
    if inside.sum() < labeled.sum() / 2 or tiny:
        what = f"{'nearly ' if inside.any() else ''}all targets are zero"
        worst = int(np.argmin(inside.sum(axis=1) / np.maximum(labeled.sum(axis=1), 1)))
        (given,) = people_tables.read_given_ids(people, np.array([people.rows[worst]["ann_id"]]))
        raise UserError(
            f"{people.annotations}: {'boxes are less than 2 px wide or high' if tiny else what}: {inside.sum()} of "
            f"{labeled.sum()} labeled keypoints lie in their person's box (annotation "
            f"{show_value(given)}: box {boxes[worst].tolist()}); expected both in pixels of the image"
        )
