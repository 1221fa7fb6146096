"""The boxes that evaluation predicts people in: the labeled ones or those of a detector, checked against the images."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8
from numpy import ndarray as Array

from sapiens_accel.data.annotation_rules import size_of
from sapiens_accel.data.detections import Detection, read_detections
from sapiens_accel.data.people import People, boxes_of, read_given_ids
from sapiens_accel.errors import UserError
from sapiens_accel.evaluation.ground_truth import evaluated_categories, read_images
from sapiens_accel.pose.person_boxes import are_outside, measure_sizes
from sapiens_accel.pose.skeleton import Skeleton
from sapiens_accel.sources.coco import given_id, number_of_id, show_value, whole_number
from sapiens_accel.sources.images import read_image

GROUND_TRUTH = "gt"


@dataclass(frozen=True, kw_only=True)
class Boxes:
    """n boxes in images.

    Attributes:
        root: the folder of the images; `file_names` [n] are relative to it.
        image_ids: [n], as in the annotations.
        boxes_xywh: image px.
        scores: of the boxes; 1 for ground truth.
        source: ground truth, or the detector's file.
        labeled: whether row i is the labeled person i.
        category_ids: [n], as numbers, None where not known; None: those of the labeled people, or of a single category.
        note: what was left out, in a line; empty if nothing was.
        pixels: the image of an image_id, RGB, where images are not files.
    """

    root: Path
    file_names: list[str]
    image_ids: Int[Array, "n"]
    boxes_xywh: Float[Array, "n 4"]
    scores: Float[Array, "n"]
    source: str
    labeled: bool
    category_ids: Sequence[Any] | None = None
    note: str = ""
    pixels: Callable[[int], UInt8[Array, "h w 3"]] | None = None

    def __len__(self) -> int:
        return len(self.file_names)

    def read_image(self, index: int) -> UInt8[Array, "h w 3"]:
        """The whole image of a box, RGB.

        Raises:
            UserError: it does not decode.
        """
        if self.pixels is not None:
            return self.pixels(int(self.image_ids[index]))
        return read_image(self.root / self.file_names[index])


def load_boxes(given: str, people: People) -> Boxes:
    """`gt`, or a detector's results in COCO's form, relative to here or to the people's root.

    Raises:
        UserError: as `ground_truth_boxes` and `detector_boxes`; no such file.
    """
    if given == GROUND_TRUTH:
        return ground_truth_boxes(people)
    candidates = [Path(given), people.root / given]
    file = next((path for path in candidates if path.is_file()), None)
    if file is None:
        raise UserError(f"--eval.boxes {given}: no such file; expected gt, or a detector's results in COCO's form")
    return detector_boxes(file, people)


def describe_misfit(boxes: Boxes, people: People, skeleton: Skeleton) -> str:
    """A line, if boxes are of another size in their images than people of the weights' training; else empty."""
    images, trained = read_images(people), skeleton.people
    if trained is None or not len(boxes):
        return ""
    sizes = measure_sizes(boxes.boxes_xywh, np.array([size_of(images[key]) for key in boxes.image_ids.tolist()]))
    misfit = sizes.describe_misfit(trained) if sizes else ""
    return f"warning: {boxes.source}: {misfit}: keypoints will be far less accurate" if misfit else ""


def ground_truth_boxes(people: People) -> Boxes:
    """The labeled people's own boxes.

    Raises:
        UserError: a box that has nothing of its image in it.
    """
    boxes, image_ids = boxes_of(people.rows), np.asarray(people.rows["image_id"][:], dtype=np.int64)
    sizes = read_images(people)
    for box, image_id, ann_id in zip(boxes, image_ids.tolist(), people.rows["ann_id"][:], strict=True):
        if _outside(box, sizes[image_id]):
            (given,) = read_given_ids(people, np.array([ann_id]))
            raise UserError(f"{people.annotations}: annotation {show_value(given)}: {_beyond(box, sizes[image_id])}")
    return Boxes(
        root=people.root, file_names=list(people.rows["file_name"][:]), image_ids=image_ids, boxes_xywh=boxes,
        scores=np.ones(len(boxes)), source="ground truth", labeled=True, note=people.box_note,
    )  # fmt: skip


def detector_boxes(file: Path, people: People) -> Boxes:
    """The boxes of a detector's results that are of people in the people's images; no score is too low.

    Results of more images than there are here (of all of COCO, for a part of it), of other categories, without area and
    outside of their image are left out; the note says how many.

    Raises:
        UserError: no list of detections, none at all or none that is not left out; one without image_id, box or score;
            an image that is not there.
    """
    detections = read_detections(file)
    if not detections:
        raise UserError(f"{file}: an empty list; expected a detector's results for {people.annotations}")
    images = read_images(people)
    rows = _list_rows(detections, people)
    of_images = [row for row in rows if isinstance(row[0], int | str) and row[0] in images]
    if not of_images:
        raise UserError(
            f"{file}: of another image set: none of its {len({str(row[0]) for row in rows})} images (the first is "
            f"{detections[0].image_id}) is among the {len(images)} of {people.annotations}"
        )
    of_images, renamed = _rename_only_class(of_images, {one.position: one.category_id for one in detections}, people)
    categories, kinds = evaluated_categories(people), {row[1] for row in of_images}
    is_of_any = len(categories) > 1 and len(kinds) == 1 and _has_one_class(of_images, people)
    kept = [row for row in of_images if is_of_any or row[1] in categories]
    if not kept:
        wanted = ", ".join(f"{given} ({name})" for given, name in list(categories.values())[:9])
        theirs = ", ".join(sorted({str(one.category_id) for one in detections})[:9])
        raise UserError(f"{file}: no detection of category {wanted}; its categories: {theirs}")
    folder = _folder(people)
    faults = [_find_fault(row[2], images[row[0]]) for row in kept]
    if all(faults):
        raise UserError(f"{file}: none of its {len(kept)} boxes can be used: detection {kept[0][4]}: {faults[0]}")
    left_out = _describe_left_out(len(rows), len(of_images), faults)
    lines = [f"{file}: {text}" for text in (left_out, renamed) if text]
    kept = [row for row, fault in zip(kept, faults, strict=True) if not fault]
    if len(categories) > 1 and len(kinds) == 1:
        lines.append(f"{file}: all of category {_describe_only_category(of_images[0][1], categories, is_of_any)}")
    _check_files(file, kept, images, people.root / folder)
    return Boxes(
        root=people.root,
        file_names=[f"{folder}/{images[row[0]]['file_name']}" for row in kept],
        image_ids=np.array([row[0] for row in kept], dtype=np.int64),
        boxes_xywh=np.array([row[2] for row in kept]),
        scores=np.array([row[3] for row in kept]),
        source=f"detector ({file.name})",
        labeled=False,
        category_ids=[None if is_of_any else row[1] for row in kept],
        note="; ".join(lines),
    )


def _list_rows(detections: Sequence[Detection], people: People) -> "list[Row]":
    return [
        (number_of_id(one.image_id), _find_category(one.category_id, people), one.box_xywh, one.score, one.position)
        for one in detections
    ]


def _describe_left_out(num: int, num_of_images: int, faults: Sequence[str]) -> str:
    """How many of `num` detections are left out for each reason; empty for none.

    Args:
        num_of_images: those of the people's images.
        faults: of those that are also of the evaluated categories, what is wrong with each box.
    """
    left_out = {
        "of other images": num - num_of_images,
        "of other categories": num_of_images - len(faults),
        "without area": sum(bool(fault) and "no area" in fault for fault in faults),
        "outside of their image": sum(bool(fault) and "no area" not in fault for fault in faults),
    }
    parts = [f"{count} {what}" for what, count in left_out.items() if count]
    return f"of its {num} detections are left out: {', '.join(parts)}" if parts else ""


def _describe_only_category(category: Any, categories: dict[Any, tuple[Any, str]], is_of_any: bool) -> str:
    """What it means that all detections are of one category, where several are evaluated."""
    if not is_of_any:
        return f"{categories[category][1]}; other categories have no detection"
    first_id, first_name = next(iter(categories.values()))
    return (
        f"{category}: boxes of any of {len(categories)} categories, and no AP of each; --eval.save_predictions saves "
        f"them under the first, {first_id} ({first_name})"
    )


def _has_one_class(rows: "list[Row]", people: People) -> bool:
    """Whether detections, all of one category, are of a detector that knows no others.

    It is if the category is not evaluated. Else (many such detectors write 1, which may be the id of a species) it is
    if most of the images that show others alone have a detection too: a detector of that species finds nothing there.
    """
    category, categories = rows[0][1], evaluated_categories(people)
    if category not in categories:
        return True
    shown: dict[Any, set[Any]] = {}
    for one in people.source.read()["annotations"]:
        if one.get("category_id") in categories:
            shown.setdefault(one["image_id"], set()).add(one["category_id"])
    of_others = [image_id for image_id, kinds in shown.items() if category not in kinds]
    detected = {row[0] for row in rows}
    return sum(image_id in detected for image_id in of_others) > len(of_others) / 2


def _find_category(given: Any, people: People) -> Any:
    """The id of a detection's category, which may be given by its name."""
    category, categories = number_of_id(given), evaluated_categories(people)
    if category in categories or not isinstance(given, str):
        return category
    named = [key for key, (_, name) in categories.items() if name.casefold() == given.strip().casefold()]
    return named[0] if named else category


def _rename_only_class(here: "list[Row]", given: dict[int, Any], people: People) -> "tuple[list[Row], str]":
    """Detections of a detector that knows one class, and writes 0, 1 or a text for it, as the only one evaluated."""
    categories, kinds = evaluated_categories(people), {row[1] for row in here}
    theirs = given[here[0][4]]
    names_none = whole_number(theirs) in (0, 1) or isinstance(whole_number(theirs), str)
    if len(categories) > 1 or len(kinds) > 1 or kinds <= set(categories) or not names_none:
        return here, ""
    (key, (written, name)), *_ = categories.items()
    line = f"all of category {theirs}: taken for {written} ({name}), the only category that is evaluated"
    return [(row[0], key, *row[2:]) for row in here], line


Row = tuple[Any, Any, Float[Array, "4"], float, int]  # image_id, category_id, box, score, index in the file


def _find_fault(box: Float[Array, "4"], image: dict[str, Any]) -> str:
    """Why a detection cannot be used; empty if it can."""
    if not (box[2] > 0 and box[3] > 0):
        return f"its box {_shown(box)} has no area (x, y, width, height)"
    return _beyond(box, image) if _outside(box, image) else ""


def _check_files(file: Path, rows: list[Row], images: dict[Any, dict[str, Any]], folder: Path) -> None:
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    for image_id, *_, index in rows:
        image = images[image_id]
        # In a folder of its own (train2017/000.jpg as the name) it is only looked for when it is read.
        if "/" not in image["file_name"] and image["file_name"] not in there:
            raise UserError(f"{file}: detection {index}: its image {folder / image['file_name']} is not there")


def _outside(box: Float[Array, "4"], image: dict[str, Any]) -> bool:
    """Whether nothing of the box is in the image, as far as its size is known."""
    sizes = (image.get(name) for name in ("width", "height"))
    # What is no number says nothing.
    size_wh = [size if isinstance(size, int | float) and size > 0 else np.inf for size in sizes]
    return bool(are_outside(box[None], np.array([size_wh], float))[0])


def _beyond(box: Float[Array, "4"], image: dict[str, Any]) -> str:
    shown = f"{show_value(given_id(image))} ({image.get('width')}x{image.get('height')} px)"
    return f"its box {_shown(box)} is outside image {shown}; expected x, y, width, height in px"


def _shown(box: Float[Array, "4"]) -> str:
    return f"[{', '.join(f'{number:g}' for number in box)}]"


def _folder(people: People) -> str:
    """The folder of the people's images: what stands before each listed name."""
    row = people.rows[0]
    name = read_images(people)[row["image_id"]]["file_name"]
    return row["file_name"].removesuffix(f"/{name}")
