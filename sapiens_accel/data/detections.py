"""Detections as a JSON: how images are named in it, how it is written, and how any such file is read again."""

import re
import sys
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset
from jaxtyping import Float
from numpy import ndarray as Array

from sapiens_accel.data import annotation_rules
from sapiens_accel.data import people as people_tables
from sapiens_accel.data.people import People, PeopleFiles
from sapiens_accel.errors import UserError
from sapiens_accel.pose import person_boxes
from sapiens_accel.pose.person_boxes import BOX_MARGIN, BoxRule
from sapiens_accel.pose.sides import words
from sapiens_accel.pose.skeleton import COCO17, Skeleton
from sapiens_accel.sources import coco


class PersonBoxes(NamedTuple):
    """The people of one image: boxes x y w h in image px.

    Attributes:
        category_ids: of each; empty: all are of the same category.
    """

    boxes_xywh: Float[Array, "n 4"]
    scores: Float[Array, "n"]
    category_ids: tuple[Any, ...] = ()


# Why boxes of a file are not among those that are looked at.
NO_SIDE, MIN_SCORE = "without a width or a height", "--data.unlabelled_min_score"
NOT_TAKEN = ("of other categories", "of crowds", "without a box, or a labeled keypoint to make one from")
NOBODY = PersonBoxes(np.zeros((0, 4)), np.zeros(0))


def make_ids(names: Sequence[str]) -> list[Any]:
    """An image_id for each name, all different, by which stage ssl finds the image again.

    COCO's own number (000000000785.jpg is 785), else the name without its suffix, else the whole name.
    """
    ids: list[Any] = []
    for rule in (_number, lambda name: str(Path(name).with_suffix("")), str):
        ids = [rule(name) for name in names]
        if len(set(ids)) == len(ids):
            break
    return ids


def _number(name: str) -> int | str:
    path = Path(name)
    stem = path.with_suffix("").as_posix()
    is_number = re.fullmatch(r"0|[1-9]\d*", stem, re.ASCII) or re.fullmatch(r"\d{12}\.jpg", name, re.ASCII)
    return int(stem) if is_number else stem


def read_ids(annotations: Path, names: Sequence[str]) -> list[Any]:
    """The images' ids in a COCO JSON.

    Raises:
        UserError: no JSON with `images`, or an image that is not among them.
    """
    if not annotations.is_file():
        raise UserError(f"--annotations {annotations}: no such file")
    known = {image["file_name"]: image["id"] for image in read_list(annotations, "images", ("id", "file_name"))}
    ids = [known.get(name, known.get(Path(name).name)) for name in names]
    if None in ids:
        raise UserError(f"--annotations {annotations}: image {names[ids.index(None)]} is not among its images")
    return ids


def read_list(file: Path, key: str, needed: Sequence[str]) -> list[dict[str, Any]]:
    """A list of objects in a COCO JSON.

    Raises:
        UserError: it is not there, or one of them lacks what is needed.
    """
    tree = coco.parse_json(file)
    things = tree.get(key) if isinstance(tree, dict) else None
    if not isinstance(things, list):
        raise UserError(f"{file}: no list {key!r} in it; expected a COCO annotation file")
    for thing in things:
        is_named = isinstance(thing, dict) and all(name in thing for name in needed)
        if (
            not is_named
            or not isinstance(thing.get("file_name"), str | None)
            or not isinstance(thing.get("id"), Hashable)
        ):
            raise UserError(f"{file}: {key}: expected {' and '.join(needed)}, found {str(thing)[:80]}")
    return things


def to_coco(
    names: Sequence[str], ids: Sequence[Any], category: Any, detections: Sequence[PersonBoxes | None]
) -> list[Any]:
    """Detections in COCO's form, to 0.01 px; with the image's name, which other readers pass over."""
    return [
        {"image_id": key, "category_id": category, "bbox": box, "score": score, "file_name": name}
        for name, key, people in zip(names, ids, detections, strict=True)
        for box, score in _rounded(people)
    ]


def _rounded(people: PersonBoxes | None) -> list[tuple[list[float], float]]:
    if people is None:
        return []
    return list(zip(people.boxes_xywh.round(2).tolist(), people.scores.round(5).tolist(), strict=True))


class Detection(NamedTuple):
    """One box of a detector's results.

    Attributes:
        position: its place in the file.
        image_id: None where it has none; then there is a file_name.
        box_xywh: image px.
        score: 1 where the file has none.
    """

    position: int
    image_id: Any
    file_name: Any
    category_id: Any
    box_xywh: Float[Array, "4"]
    score: float


def read_detections(file: Path, needed: Sequence[str] = ("image_id", "bbox", "score")) -> list[Detection]:
    """A detector's results in COCO's form: a list of image_id, category_id (1 where there is none), bbox and score.

    Args:
        needed: what each of them must have.

    Raises:
        UserError: no list, or one of them that lacks something or is no box.
    """
    things = coco.parse_json(file)
    if not isinstance(things, list):
        raise UserError(f"{file}: expected a detector's results: a list of image_id, category_id, bbox and score")
    return [_detection(file, index, thing, needed) for index, thing in enumerate(things)]


def _detection(file: Path, index: int, thing: Any, needed: Sequence[str]) -> Detection:
    try:
        if not isinstance(thing, dict):
            raise ValueError(f"expected image_id, category_id, bbox, score; found {coco.show_value(thing)}")
        for key in needed:
            if key not in thing:
                raise ValueError(f"it has no {key!r}; expected image_id, bbox and score")
        if not {"image_id", "file_name"} & set(thing):
            raise ValueError(f"expected image_id, bbox and score, found {coco.show_value(thing)}")
        image_id, name = thing.get("image_id"), thing.get("file_name")
        if not isinstance(image_id, str | None):
            image_id = annotation_rules.id_of(image_id)
        if not isinstance(name, str | None):
            raise ValueError(f"expected a text as 'file_name', found {coco.show_value(name)}")
        score = thing.get("score", 1.0)
        is_number = isinstance(score, int | float) and not isinstance(score, bool)
        if not is_number or not abs(score) <= sys.float_info.max:
            raise ValueError(f"expected a number as 'score', found {coco.show_value(score)}")
        if not isinstance(thing.get("category_id"), int | float | str | None):
            raise ValueError(
                f"expected a number or a text as 'category_id', found {coco.show_value(thing['category_id'])}"
            )
        box = annotation_rules.box_of(thing)
    except coco.BROKEN as error:
        raise UserError(f"{file}: detection {index}: {coco.reason(error)}") from None
    category = 1 if thing.get("category_id") is None else thing["category_id"]
    return Detection(index, image_id, name, category, box, float(score))


class BoxesFile:
    """The boxes of a file, for the images of these names: a list of detections, or a COCO annotation file.

    A detection's image is its `file_name`, or the one that its `image_id` names (see `make_ids`). Boxes without a score
    count as sure. Taken are, of an annotation file, the categories that the skeleton has, by their name or by the names
    of their keypoints; else all. A list has no names: all of it if it has a single category or the skeleton has
    several; else, of people, category 1 where there is one, and of others the one of that name. The rest, those below
    `min_score`, and crowds are left out.

    Args:
        rule: how the boxes of an annotation file are made (`person_boxes.choose_boxes`): as in training.

    Attributes:
        categories: those that are taken, names by their ids.
        note: how many boxes are made or left out, and why, in a line; empty if none are.

    Raises:
        UserError: no such file, no boxes in it, a box that is none, or none of these images; several categories of a
            list, none of which is known to be that of the weights; all boxes are left out.
    """

    def __init__(
        self,
        file: Path,
        names: Sequence[str],
        min_score: float,
        skeleton: Skeleton = COCO17,
        rule: tuple[BoxRule, float] = ("annotation", BOX_MARGIN),
    ) -> None:
        self.file, self.min_score, self._skeleton, self._rule = file, min_score, skeleton, rule
        self.categories: dict[Any, str] = {}
        if not file.is_file():
            raise UserError(
                f"--eval.boxes {file}: no such file; expected whole, a JSON of boxes, detector, or one's name"
            )
        self._left_out: Counter[str] = Counter()
        self._num_made = 0
        boxes = list(self._detections() if coco.is_detections(file) else self._annotations())
        if not boxes:
            raise UserError(
                f"{file}: no box in it, and no labeled keypoint to make one from (expected a list of detections or a "
                f"COCO annotation file). To take each image as one person, --eval.boxes whole"
            )
        self._of: dict[str, list[Detection]] = {}
        name_of, others = _names_by_key(names), 0
        for key, one in boxes:
            name = name_of.get(key, name_of.get(Path(key).name if isinstance(key, str) else f"{key:012d}"))
            if name is None:
                others += 1
            elif one.score < min_score:
                self._left_out[f"with a score below {min_score:g} (--eval.min_box_score)"] += 1
            elif not (one.box_xywh[2:] > 0).all():
                self._left_out[NO_SIDE] += 1
            else:
                self._of.setdefault(name, []).append(one)
        if others == len(boxes):
            raise UserError(
                f"{file}: of other images: the first of its {len(boxes)} boxes is of {boxes[0][0]}, the first of "
                f"these {len(names)} images is {names[0] if names else '(none)'}"
            )
        parts = {"of other images": others, **self._left_out}
        listed = ", ".join(f"{count} {what}" for what, count in parts.items() if count)
        num = len(boxes) + sum(count for what, count in self._left_out.items() if what.startswith(NOT_TAKEN))
        left_out = f"of its {num} boxes are left out: {listed}"
        if not self._of:
            raise UserError(f"{file}: {left_out}; none is left. To take each image as one person, --eval.boxes whole")
        made = f"{self._num_made} boxes are made from keypoints" * bool(self._num_made)
        self.note = f"{file}: " * bool(made or listed) + "; ".join(filter(None, [made, listed and left_out]))

    def of(self, name: str) -> PersonBoxes:
        """The people of an image."""
        if not (detections := self._of.get(name)):
            return NOBODY
        boxes, scores = np.stack([one.box_xywh for one in detections]), np.array([one.score for one in detections])
        return PersonBoxes(boxes, scores, tuple(one.category_id for one in detections))

    def _detections(self) -> Iterator[tuple[Any, Detection]]:
        listed = self._read_list()
        detections = [one._replace(category_id=coco.number_of_id(one.category_id)) for one in listed]
        ids = list(dict.fromkeys(one.category_id for one in detections))
        if len(ids) > 1 and len(self._skeleton.categories) <= 1:
            given = {coco.number_of_id(one.category_id): one.category_id for one in listed}
            ids = self._ids_of_only_category(ids, given)
        one_name = " or ".join(self._skeleton.categories) or "person"
        self.categories = {key: one_name if len(ids) == 1 else str(key) for key in ids}
        for one in detections:
            if one.category_id in self.categories:
                yield one.image_id if one.file_name is None else one.file_name, one
            else:
                self._left_out[f"{NOT_TAKEN[0]} (category_id {one.category_id})"] += 1

    def _ids_of_only_category(self, ids: list[Any], given: dict[Any, Any]) -> list[Any]:
        """Of several categories of a list the one that the weights are of: by name, and of people COCO's 1."""
        name = (self._skeleton.categories or ("person",))[0]
        named = [key for key in ids if str(given[key]).strip().casefold() == name.casefold()]
        if named or (1 in ids and name == "person"):
            return named or [1]
        if name == "person":
            return ids
        raise UserError(
            f"{self.file}: its boxes are of several categories ({', '.join(str(given[key]) for key in ids[:6])}), and "
            f"the weights are of {name}: which of them is it? Leave only its boxes in the file, or give "
            f"a COCO annotation file, whose categories have names"
        )

    def _read_list(self) -> list[Detection]:
        return read_detections(self.file, ("bbox",))

    def _annotations(self) -> Iterator[tuple[Any, Detection]]:
        images = {image["id"]: image for image in read_list(self.file, "images", ("id", "file_name"))}
        categories = coco.CocoFile(self.file).categories
        listed = {one.get("id"): one for one in categories if isinstance(one.get("id"), int | float | str | None)}
        taken = _choose_categories(list(listed.values()), self._skeleton)
        ids = {one.get("id"): coco.given_id(one) for one in taken} or {1: 1}
        self.categories = {coco.given_id(one): str(one.get("name")) for one in taken} or {1: "person"}
        first, people = next(iter(ids)), []
        for index, thing in enumerate(read_list(self.file, "annotations", ("image_id",))):
            category = thing.get("category_id", first)
            category = category if isinstance(category, int | float | str) else first
            if thing.get("iscrowd"):
                self._left_out[NOT_TAKEN[1]] += 1
            elif taken and category not in ids:
                name = listed.get(category, {}).get("name", category)
                self._left_out[f"{NOT_TAKEN[0]} ({name})"] += 1
            else:
                bbox = thing.get("bbox") or [0.0] * 4
                one = _detection(self.file, index, {**thing, "bbox": bbox}, ())
                people.append((one._replace(category_id=ids.get(category, 1)), annotation_rules.labeled_points(thing)))
        of_images = [images.get(coco.number_of_id(one.image_id), {}) for one, _ in people]
        for image, (one, _), box in zip(of_images, people, self._make_boxes(people, of_images), strict=True):
            if not (box[2:] > 0).all():
                self._left_out[NOT_TAKEN[2]] += 1
            else:
                yield image.get("file_name", one.image_id), one._replace(box_xywh=box)

    def _make_boxes(
        self, people: Sequence[tuple[Detection, Float[Array, "k 2"]]], of_images: Sequence[dict[str, Any]]
    ) -> Float[Array, "n 4"]:
        """The box of each annotation, by the rule; sides of 0 where there is none.

        Args:
            people: with their labeled keypoints, image px.
            of_images: the entry of each one's image.
        """
        boxes_xywh = np.array([one.box_xywh for one, _ in people]).reshape(-1, 4)
        most = max((len(points) for _, points in people), default=0) or 1
        points_xy, labeled = np.zeros((len(people), most, 2)), np.zeros((len(people), most), bool)
        for index, (_, points) in enumerate(people):
            points_xy[index, : len(points)], labeled[index, : len(points)] = points, True
        size_wh = np.array([annotation_rules.size_of(image) for image in of_images]).reshape(-1, 2)
        sides = boxes_xywh[(boxes_xywh[:, 2:] > 0).all(axis=1), 2:]
        typical = np.median(sides, axis=0) if len(sides) else np.full(2, np.nan)
        made = person_boxes.choose_boxes(boxes_xywh, points_xy, labeled, size_wh, self._rule, lambda: typical)
        is_made = np.isin(made.origins, (person_boxes.FROM_KEYPOINTS, person_boxes.GUESSED_SIDE))
        self._num_made = int(is_made.sum())
        return np.nan_to_num(made.boxes_xywh)


def _choose_categories(listed: list[dict[str, Any]], skeleton: Skeleton) -> list[dict[str, Any]]:
    """The categories of an annotation file whose boxes are of what the skeleton is of; all, if nothing tells."""
    names = {name.casefold() for name in skeleton.categories or ("person",)}
    keypoints = [words(name) for name in skeleton.names]

    def has_keypoints(one: dict[str, Any]) -> bool:
        theirs = one.get("keypoints")
        return isinstance(theirs, list) and [words(str(name)) for name in theirs] == keypoints

    return [one for one in listed if str(one.get("name")).casefold() in names or has_keypoints(one)] or listed


def _names_by_key(names: Sequence[str]) -> dict[Any, str]:
    """Every key that an image may go by: its name, its id, the end of its name where no other ends so."""
    ends: dict[Any, list[str]] = {}
    for name in names:
        for end in {Path(name).name, Path(name).stem}:
            ends.setdefault(end, []).append(name)
    by_end: dict[Any, str] = {end: those[0] for end, those in ends.items() if len(those) == 1}
    return by_end | dict(zip(make_ids(names), names, strict=True)) | {name: name for name in names}


def detected_people(files: PeopleFiles, min_side: float, min_score: float) -> People:
    """The people of a detector's results in COCO's form, a list of image_id, bbox, score and, may be, category_id.

    Kept: a score of at least `min_score`, a box of at least `min_side` px, and of several categories category 1.
    How many others there are, by cause, is in the people's `left_out`.
    The image of image_id 7 is 000000000007.jpg or the one whose name without its suffix is 7.

    Raises:
        UserError: no list of detections, or an image that is not in the folder.
    """
    file, folder = files.root / files.annotations, files.root / files.images
    # Names that have come or gone change which image is whose.
    names = people_tables.list_image_names(folder)
    digest = people_tables.digest_of(file.read_bytes(), "counted, one category", files.images, str(min_score), *names)
    table, left_out = people_tables.cached_table(
        lambda counts: _detected_rows(files, names, min_score, counts), digest, files.num_keypoints, files.cache
    )
    rows = _keep_large(table, min_side, left_out)
    num, num_all = sum(left_out.values()), len(rows) + sum(left_out.values())
    why = _describe_left_out(left_out)
    line = f"{file}: {num} of its {num_all} detections are left out of the unlabeled people: {why}" if num else ""
    return People(rows=rows, root=files.root, annotations=file, left_out=line)


def _keep_large(table: Dataset, min_side: float, left_out: dict[str, int]) -> Dataset:
    is_large = people_tables.boxes_of(table)[:, 2:].min(axis=1, initial=np.inf) >= min_side
    left_out[people_tables.too_small(min_side)] = int((~is_large).sum())
    return table.select(np.flatnonzero(is_large))


def _describe_left_out(counts: Mapping[str, int]) -> str:
    """How many detections are left out, by cause; of many categories the first ids are shown."""
    kinds = [cause for cause in counts if cause.startswith(NOT_TAKEN[0])]
    ids = ", ".join(kind.removeprefix(f"{NOT_TAKEN[0]} ") for kind in sorted(kinds)[:4]) + ", ..." * (len(kinds) > 4)
    of_kinds = {f"{NOT_TAKEN[0]} (category_id {ids}; expected 1)": sum(counts[kind] for kind in kinds)}
    others = {cause: num for cause, num in counts.items() if cause not in kinds}
    return ", ".join(f"{num} {cause}" for cause, num in (of_kinds | others).items() if num)


def _detected_rows(
    files: PeopleFiles, names: list[str], min_score: float, left_out: Counter[str]
) -> Iterator[dict[str, Any]]:
    file = files.root / files.annotations
    name_of_stem = {Path(name).stem: name for name in names}
    name_of_number = {coco.number_of_id(stem): name for stem, name in name_of_stem.items()}
    index_of = {name: index for index, name in enumerate(names)}
    detections = read_detections(file)
    kinds = {coco.number_of_id(one.category_id) for one in detections}
    taken = kinds if len(kinds) == 1 else {1}
    for index, key, _, category_id, box, score in detections:
        if coco.number_of_id(category_id) not in taken:
            left_out[f"{NOT_TAKEN[0]} {coco.show_value(category_id)}"] += 1
            continue
        if score < min_score or box[2] <= 0 or box[3] <= 0:
            is_weak = score < min_score
            left_out[f"with a score below {min_score:g} ({MIN_SCORE})" if is_weak else NO_SIDE] += 1
            continue
        padded = f"{key:012d}.jpg" if isinstance(key, int) else ""
        name = padded if padded in index_of else name_of_stem.get(str(key), name_of_number.get(coco.number_of_id(key)))
        if name is None:
            raise UserError(
                f"{file}: detection {index}: its image, {padded or key} or {key}.*, is not in "
                f"{files.root / files.images}; give the folder by --data.unlabelled_images"
            )
        yield {
            "file_name": f"{files.images}/{name}",
            "image_id": key if isinstance(key, int) else index_of[name],
            "ann_id": index,
            "box_xywh": box.tolist(),
            "area": float(box[2] * box[3]),
            "box_area": float(box[2] * box[3]),
            "keypoints": np.zeros((files.num_keypoints, 3)),
        }
