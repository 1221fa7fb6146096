"""A dataset in COCO's own folder form: what --data.root reads without another option.

annotations/person_keypoints_{train,val}2017.json, train2017/ and val2017/, whatever the category.
"""

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from jaxtyping import Float
from numpy import ndarray as Array
from tqdm import tqdm

from sapiens_accel.config.schema import DataConfig
from sapiens_accel.errors import UserError, count
from sapiens_accel.formats.dataset import PoseCategory, PoseDataset, PoseImage, PoseInstance, read_size
from sapiens_accel.inference.media import save_image
from sapiens_accel.pose.oks import AREA_OF_BOX
from sapiens_accel.pose.person_boxes import (
    ANNOTATED,
    BOX_MARGIN,
    FROM_KEYPOINTS,
    GUESSED_SIDE,
    NO_BOX,
    WHOLE_IMAGE,
    BoxRule,
    PeopleBoxes,
    choose_boxes,
)  # fmt: skip
from sapiens_accel.pose.visibility import is_labeled
from sapiens_accel.sources.coco import find_image_fault

FILES = {
    "train": (DataConfig.train_annotations, DataConfig.train_images),
    "val": (DataConfig.val_annotations, DataConfig.val_images),
}
SKELETON = "skeleton.yaml"
ORIGINS = {
    ANNOTATED: "of the tool",
    FROM_KEYPOINTS: f"from the keypoints, with a margin of {BOX_MARGIN:g}",
    GUESSED_SIDE: "from keypoints in a line or a single one, with the median side of the others",
    WHOLE_IMAGE: "of whole images",
    NO_BOX: "missing, without a keypoint to make one from",
}
WITH_AREA = f"with an area of {AREA_OF_BOX} of the tool's box or of the one from keypoints"

Split = Literal["train", "val"]


@dataclass(frozen=True, kw_only=True)
class WriteOptions:
    """How a dataset is written.

    Attributes:
        val: the share of the images that validate, where the tool has no split.
        seed: of the choice of images or sessions.
        boxes: as --data.boxes: the tool's own where there is one, else from the keypoints; all from them; whole images.
        link: images are links, not copies.
    """

    val: float = 0.2
    seed: int = 0
    boxes: BoxRule = "annotation"
    link: bool = False


def write(dataset: PoseDataset, out: Path, options: WriteOptions) -> list[str]:
    """Write the folder, whole or not at all, and say what is in it, a line each.

    Raises:
        UserError: no labeled keypoint, an invalid keypoint, an `out` that exists, an image that cannot be read.
    """
    check_new(out)
    if not any(one.keypoints[:, 2].any() for image in dataset.images for one in image.instances):
        raise UserError(
            f"no labeled keypoint in the {count(len(dataset.images), 'image')} that were read (expected some)"
        )
    _check(dataset)
    lines = split_images(dataset.images, options)
    boxes: Counter[str] = Counter()
    with whole_folder(out) as temporary:
        for split in FILES:
            images = [image for image, one in zip(dataset.images, lines.splits, strict=True) if one == split]
            boxes += _write_split(temporary, split, images, dataset.categories, options)
        if mirror := _mirror_pairs(dataset.categories):
            (temporary / SKELETON).write_text(yaml.safe_dump({"mirror": mirror}, default_flow_style=None, width=120))
    summary = [_describe(split, dataset, lines) for split in FILES]
    summary += [f"split: {lines.rule}", "boxes: " + ", ".join(f"{number} {what}" for what, number in boxes.items())]
    left_out = [f"{what} ({number})" for what, number in dataset.left_out.items() if number]
    summary += [f"left out: {', '.join(left_out)}"] * bool(left_out) + list(dataset.notes)
    summary += [f"left and right as the tool has them: --data.skeleton {SKELETON}"] * bool(mirror)
    return summary


def check_new(out: Path) -> None:
    """
    Raises:
        UserError: there is something of this name, other than an empty folder.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists already (expected a new folder). Name another one, or remove it")


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A folder to write into, which gets its name at the end; an exception removes it."""
    temporary = out.with_name(f"{out.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary.replace(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check(dataset: PoseDataset) -> None:
    """
    Raises:
        UserError: a name that leads out of the folder; another number of keypoints than the category has, a coordinate
            that is no number, or a v that is not 0, 1 or 2, with its image.
    """
    for image in dataset.images:
        if fault := find_image_fault({"id": 0, "file_name": image.name}):
            raise UserError(f"an image's name: {fault.removeprefix('id 0: ')}")
        for one in image.instances:
            expected = len(dataset.categories[one.category].keypoints)
            if len(one.keypoints) != expected:
                raise UserError(f"{image.name}: expected {expected} keypoints, found {len(one.keypoints)}")
            if not np.isfinite(one.keypoints).all():
                raise UserError(f"{image.name}: keypoints that are NaN or infinite (expected pixels of an image)")
            if len(odd := one.keypoints[~np.isin(one.keypoints[:, 2], (0, 1, 2)), 2]):
                raise UserError(f"{image.name}: v of a keypoint is {odd[0]:g} (expected 0, 1 or 2). Is it a score?")


def _describe(split: str, dataset: PoseDataset, lines: "ImageSplits") -> str:
    images = [image for image, one in zip(dataset.images, lines.splits, strict=True) if one == split]
    people = [one for image in images for one in image.instances]
    labeled = sum(int((one.keypoints[:, 2] > 0).sum()) for one in people)
    by_category = Counter(dataset.categories[one.category].name for one in people)
    names = ", ".join(f"{number} {name}" for name, number in by_category.items())
    return f"{split}: {count(len(images), 'image')}, {count(len(people), 'annotation')} ({names}), {labeled} keypoints"


def _mirror_pairs(categories: list[PoseCategory]) -> list[list[str]]:
    pairs = {pair for category in categories for pair in category.mirror or ()}
    return [list(pair) for pair in sorted(pairs)]


# ---- Training and validation


@dataclass(frozen=True, kw_only=True)
class ImageSplits:
    """The split of each image, and how they were chosen."""

    splits: list[Split]
    rule: str


def split_images(images: list[PoseImage], options: WriteOptions) -> ImageSplits:
    """Which images train and which validate.

    The tool's own split is kept. Else whole videos or sessions validate, since neighboring frames are nearly the same
    image; of a single video its last frames do. Where no video is known, images are drawn.

    Raises:
        UserError: there is one image alone.
    """
    if any(image.split for image in images):
        splits: list[Split] = ["val" if image.split == "val" else "train" for image in images]
        if len(set(splits)) == 1:
            return split_images([replace(image, split=None) for image in images], options)
        return ImageSplits(splits=splits, rule="as the tool has it")
    num = len(images)
    if num < 2:
        raise UserError(f"{count(num, 'labeled image')} alone (expected 2 or more: some train, others validate)")
    wanted = min(max(round(options.val * num), 1), num - 1)
    order = np.random.default_rng(options.seed)
    groups = sorted({image.group for image in images if image.group is not None})
    if not groups or any(image.group is None for image in images):
        chosen = set(order.permutation(num)[:wanted].tolist())
        rule = f"{count(wanted, 'image')} for validation, drawn with seed {options.seed}"
    elif len(groups) == 1:
        last = sorted(range(num), key=lambda index: images[index].name)[num - wanted :]
        chosen, rule = set(last), f"the last {count(wanted, 'image')} of {groups[0]} for validation"
    else:
        names = _choose_groups(Counter(image.group for image in images), list(order.permutation(groups)), wanted)
        chosen = {index for index, image in enumerate(images) if image.group in names}
        rule = f"{len(names)} of {len(groups)} videos or sessions for validation: {', '.join(sorted(names)[:5])}"
    return ImageSplits(splits=["val" if index in chosen else "train" for index in range(num)], rule=rule)


def _choose_groups(sizes: "Counter[str | None]", order: list[str], wanted: int) -> set[str]:
    """Groups in this order while they bring the number of images nearer to what is wanted; at least one, never all."""
    chosen: set[str] = set()
    num = 0
    for name in order:
        nearer = abs(num + sizes[name] - wanted) < abs(num - wanted)
        if nearer and len(chosen) + 1 < len(order):
            chosen.add(str(name))
            num += sizes[name]
    return chosen or {str(min(order, key=lambda name: sizes[name]))}


# ---- Files


def _write_split(
    root: Path,
    split: str,
    images: list[PoseImage],
    categories: list[PoseCategory],
    options: WriteOptions,
) -> Counter[str]:
    """Write the JSON and the images of one split; where the boxes are from."""
    annotations, folder = FILES[split]
    tree: dict[str, Any] = {
        "images": [],
        "annotations": [],
        "categories": list(map(_category, categories, range(1, 10**6))),
    }
    ids = [image.fields.get("id") for image in images]
    has_ids = all(isinstance(one, int) for one in ids) and len(set(ids)) == len(ids)
    ann_ids = [one.fields.get("id") for image in images for one in image.instances]
    has_ann_ids = all(isinstance(one, int) for one in ann_ids) and len(set(ann_ids)) == len(ann_ids)
    names: set[str] = set()
    sizes = []
    for number, image in enumerate(tqdm(images, desc=split, unit="image", disable=None, leave=False), 1):
        name = _free_name(image.name, names)
        size_wh = _write_image(image, root / folder / name, link=options.link)
        sizes.append(size_wh)
        image_id = image.fields["id"] if has_ids else number
        session = {"session": image.group} if image.group else {}
        tree["images"].append(
            image.fields | session | {"id": image_id, "file_name": name, "width": size_wh[0], "height": size_wh[1]}
        )
        for one in image.instances:
            ann_id = one.fields["id"] if has_ann_ids else len(tree["annotations"]) + 1
            ours = {"id": ann_id, "image_id": image_id, "category_id": one.category + 1}
            tree["annotations"].append(one.fields | ours | _numbers(one))
    counts = _add_boxes(tree["annotations"], images, sizes, options.boxes)
    file = root / annotations
    file.parent.mkdir(parents=True, exist_ok=True)
    (root / folder).mkdir(exist_ok=True)
    file.write_text(json.dumps(tree))
    return counts


def _category(category: PoseCategory, number: int) -> dict[str, Any]:
    edges = [[a + 1, b + 1] for a, b in category.edges]
    names = list(category.keypoints)
    return {"id": number, "name": category.name, "supercategory": category.name, "keypoints": names, "skeleton": edges}


def _free_name(name: str, taken: set[str]) -> str:
    """A name that no image of the split has: of two called alike in different folders the second gets a number."""
    path, number, free = Path(name), 1, name
    while free in taken:
        number += 1
        free = path.with_name(f"{path.stem}_{number}{path.suffix}").as_posix()
    taken.add(free)
    return free


def _write_image(image: PoseImage, target: Path, *, link: bool) -> tuple[int, int]:
    """Put an image's file, bytes or pixels there; its width and height (px)."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(image.source, Path) and link:
        target.symlink_to(image.source.resolve())
    elif isinstance(image.source, Path):
        shutil.copyfile(image.source, target)
    elif isinstance(image.source, bytes):
        target.write_bytes(image.source)
    else:
        pixels = image.source()
        save_image(pixels, target)
        return pixels.shape[1], pixels.shape[0]
    return read_size(image.source if isinstance(image.source, Path) else target)


def _numbers(one: PoseInstance) -> dict[str, Any]:
    """Keypoints of an annotation, and whether it is a crowd."""
    numbers: list[float] = [round(float(value), 3) for value in one.keypoints.reshape(-1)]
    numbers[2::3] = one.keypoints[:, 2].astype(int).tolist()
    fields = {"iscrowd": 0} if "iscrowd" not in one.fields else {}
    return fields | {"keypoints": numbers, "num_keypoints": int(is_labeled(one.keypoints).sum())}


def _add_boxes(
    annotations: list[dict[str, Any]], images: list[PoseImage], sizes: list[tuple[int, int]], rule: BoxRule
) -> Counter[str]:
    """Write the box of each annotation, inside of its image, and count where they are from.

    The rules are those of --data.boxes (`pose.person_boxes`), with its margin, for each category by itself. Where the
    tool has no area and the rule sets its box aside (or the one from keypoints), `area` is written by that box: readers
    take a missing area from the written box, and by a whole image OKS would hardly see a distance.

    Args:
        annotations: of all instances of the images, in their order.
    """
    people = [(one, size) for image, size in zip(images, sizes, strict=True) for one in image.instances]
    counts: Counter[str] = Counter()
    for category in sorted({one.category for one, _ in people}):
        indices = [index for index, (one, _) in enumerate(people) if one.category == category]
        keypoints = np.array([people[index][0].keypoints for index in indices])
        annotated = np.array([people[index][0].box_xywh or (0, 0, 0, 0) for index in indices], float)
        size_wh = np.array([people[index][1] for index in indices], float)
        chosen = _choose_boxes(annotated, keypoints, size_wh, rule)
        replaced = (chosen.areas > 0) & ((rule == "image") | (rule == "keypoints") & (annotated[:, 2:] > 0).all(axis=1))
        for index, box, size, origin in zip(indices, chosen.boxes_xywh, size_wh, chosen.origins, strict=True):
            counts[ORIGINS[int(origin)]] += 1
            if origin != NO_BOX:
                is_made = origin in (FROM_KEYPOINTS, GUESSED_SIDE)
                inside = np.concatenate([np.maximum(box[:2], 0), np.minimum(box[:2] + box[2:], size)])
                inside[2:] -= inside[:2]
                # A box around keypoints that are all outside of the image stays as it is: the doctor names it.
                shown = inside if is_made and min(inside[2:]) > 0 else box
                annotations[index]["bbox"] = [round(float(value), 3) for value in shown]
        for index, area in zip(np.array(indices)[replaced].tolist(), chosen.areas[replaced], strict=True):
            if "area" not in annotations[index]:
                annotations[index]["area"] = round(AREA_OF_BOX * float(area), 3)
                counts[WITH_AREA] += 1
    return counts


def _choose_boxes(
    annotated: Float[Array, "n 4"], keypoints: Float[Array, "n k 3"], size_wh: Float[Array, "n 2"], rule: BoxRule
) -> PeopleBoxes:
    labeled, unknown = is_labeled(keypoints), np.full(2, np.nan)
    points = keypoints[..., :2]

    def typical_wh() -> Float[Array, "2"]:
        which: BoxRule = "keypoints" if rule == "keypoints" else "annotation"
        boxes = choose_boxes(annotated, points, labeled, size_wh, (which, BOX_MARGIN), lambda: unknown)
        sides = boxes.boxes_xywh[labeled.any(axis=1) & (boxes.origins <= FROM_KEYPOINTS), 2:]
        return np.median(sides, axis=0) if len(sides) else unknown

    return choose_boxes(annotated, points, labeled, size_wh, (rule, BOX_MARGIN), typical_wh)
