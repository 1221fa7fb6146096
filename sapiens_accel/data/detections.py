"""Detections as a JSON: how pictures are named in it, how it is written, and how any such file is read again."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from numpy import ndarray as Array

from sapiens_accel.data import annotation_rules
from sapiens_accel.data import people as coco
from sapiens_accel.errors import UserError
from sapiens_accel.sources import coco as coco_json


class Found(NamedTuple):
    """The people of one picture, the surest first: boxes x y w h in image px, within the picture."""

    boxes_xywh: Float[Array, "n 4"]
    scores: Float[Array, "n"]


NOBODY = Found(np.zeros((0, 4)), np.zeros(0))


def ids_of(names: Sequence[str]) -> list[Any]:
    """An image_id for each name, all different, by which stage ssl finds the picture again.

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


def ids_in(annotations: Path, names: Sequence[str]) -> list[Any]:
    """The pictures' ids in a COCO JSON.

    Raises:
        UserError: no JSON with `images`, or a picture that is not among them.
    """
    if not annotations.is_file():
        raise UserError(f"--annotations {annotations}: no such file")
    known = {image["file_name"]: image["id"] for image in listed(annotations, "images", ("id", "file_name"))}
    found = [known.get(name, known.get(Path(name).name)) for name in names]
    if None in found:
        raise UserError(f"--annotations {annotations}: picture {names[found.index(None)]} is not among its images")
    return found


def listed(file: Path, key: str, needed: Sequence[str]) -> list[dict[str, Any]]:
    """A list of objects in a COCO JSON.

    Raises:
        UserError: it is not there, or one of them lacks what is needed.
    """
    tree = coco_json.parsed(file)
    things = tree.get(key) if isinstance(tree, dict) else None
    if not isinstance(things, list):
        raise UserError(f"{file}: no list {key!r} in it; expected a COCO annotation file")
    for thing in things:
        if not isinstance(thing, dict) or any(name not in thing for name in needed):
            raise UserError(f"{file}: {key}: expected {' and '.join(needed)}, found {str(thing)[:80]}")
    return things


def rows(names: Sequence[str], ids: Sequence[Any], category: Any, found: Sequence[Found | None]) -> list[Any]:
    """Detections in COCO's form, to 0.01 px; with the picture's name, which other readers pass over."""
    return [
        {"image_id": key, "category_id": category, "bbox": box, "score": score, "file_name": name}
        for name, key, people in zip(names, ids, found, strict=True)
        for box, score in _rounded(people)
    ]


def _rounded(people: Found | None) -> list[tuple[list[float], float]]:
    if people is None:
        return []
    return list(zip(people.boxes_xywh.round(2).tolist(), people.scores.round(5).tolist(), strict=True))


class BoxesFile:
    """The boxes of a file, for the pictures of these names: a list of detections, or a COCO annotation file.

    A detection's picture is its `file_name`, or the one that its `image_id` names (see `ids_of`). Boxes without a score
    count as sure; those below `min_score`, crowds and other categories than people are left out.

    Attributes:
        told: what of it is of other pictures, in a line; empty if nothing is.

    Raises:
        UserError: no such file, no boxes in it, a box that is none, or none of these pictures.
    """

    def __init__(self, file: Path, names: Sequence[str], min_score: float) -> None:
        self.file, self.min_score = file, min_score
        if not file.is_file():
            raise UserError(
                f"--eval.boxes {file}: no such file; expected whole, a JSON of boxes, detector, or one's name"
            )
        is_list = coco_json.is_detections(file)
        things = list(self._detections() if is_list else self._annotations())
        if not things:
            raise UserError(f"{file}: no box in it; expected a list of detections or a COCO annotation file")
        self._of: dict[str, list[tuple[Any, float]]] = {}
        places, others = _places(names), 0
        for index, (key, thing) in enumerate(things):
            name = places.get(key, places.get(Path(key).name if isinstance(key, str) else f"{key:012d}"))
            kept = self._box(index, thing)
            if name is None:
                others += 1
            elif kept is not None:
                self._of.setdefault(name, []).append(kept)
        if others == len(things):
            raise UserError(
                f"{file}: of other pictures: the first of its {len(things)} boxes is of {things[0][0]}, the first of "
                f"these {len(names)} pictures is {names[0] if names else '(none)'}"
            )
        self.told = f"{file}: {others} of its {len(things)} boxes are of other pictures" if others else ""

    def of(self, name: str) -> Found:
        """The people of a picture."""
        if name not in self._of:
            return NOBODY
        boxes, scores = zip(*self._of[name], strict=True)
        return Found(np.stack(boxes), np.array(scores))

    def _detections(self) -> Iterator[tuple[Any, dict[str, Any]]]:
        for index, thing in enumerate(coco_json.parsed(self.file)):
            if not isinstance(thing, dict) or not {"file_name", "image_id"} & set(thing):
                raise UserError(f"{self.file}: box {index}: expected image_id, bbox and score, found {str(thing)[:80]}")
            if thing.get("category_id", 1) == 1:
                yield thing.get("file_name", thing.get("image_id")), thing

    def _annotations(self) -> Iterator[tuple[Any, dict[str, Any]]]:
        names = {image["id"]: image["file_name"] for image in listed(self.file, "images", ("id", "file_name"))}
        person = annotation_rules.person_category(self.file)
        for thing in listed(self.file, "annotations", ("image_id", "bbox")):
            if not thing.get("iscrowd") and thing.get("category_id", person) == person:
                yield names.get(thing["image_id"], thing["image_id"]), thing

    def _box(self, index: int, thing: dict[str, Any]) -> tuple[Any, float] | None:
        """A box and its score; None for one that is not to be looked at."""
        score = thing.get("score", 1.0)
        try:
            box = annotation_rules.box_of(thing)
            if isinstance(score, bool) or not isinstance(score, int | float) or not np.isfinite(score):
                raise ValueError(f"expected a number as 'score', found {score!r}")
        except ValueError as error:
            raise UserError(f"{self.file}: box {index}: {error}") from None
        return (box, float(score)) if score >= self.min_score and (box[2:] > 0).all() else None


def _places(names: Sequence[str]) -> dict[Any, str]:
    """Every key that a picture may go by: its name, its id, the end of its name where no other ends so."""
    ends: dict[Any, list[str]] = {}
    for name in names:
        for end in {Path(name).name, Path(name).stem}:
            ends.setdefault(end, []).append(name)
    found: dict[Any, str] = {end: those[0] for end, those in ends.items() if len(those) == 1}
    return found | dict(zip(ids_of(names), names, strict=True)) | {name: name for name in names}


def detected_people(
    root: Path, detections: str, images: str, num_keypoints: int, min_side: float, min_score: float, cache: Path
) -> coco.People:
    """The people of a detector's results in COCO's form, a list of image_id, bbox, score and, may be, category_id.

    Kept: a score of at least `min_score`, a box of at least `min_side` px, and category 1 where categories are given.
    The picture of image_id 7 is 000000000007.jpg or the one whose name without its suffix is 7.

    Raises:
        UserError: no list of detections, or a picture that is not in the folder.
    """
    file = root / detections
    # Names that have come or gone change which picture is whose.
    names = coco.image_names(root / images)
    digest = coco.digest_of(file.read_bytes(), "detections", images, str(min_score), *names)
    source = {"detections": str(file), "folder": str(root / images), "min_score": min_score, "names": names}
    people = coco.People(
        rows=coco.cached_table(_detected_rows, digest, num_keypoints, cache, **source, images=images),
        root=root,
        annotations=file,
    )
    sides = coco.boxes_of(people.rows)[:, 2:].min(axis=1, initial=np.inf)
    return replace(people, rows=people.rows.select(np.flatnonzero(sides >= min_side)))


def _detected_rows(
    num_keypoints: int, detections: str, images: str, folder: str, min_score: float, names: list[str]
) -> Iterator[dict[str, Any]]:
    found = coco_json.parsed(Path(detections))
    there, of_stem = set(names), {Path(name).stem: name for name in names}
    place = {name: index for index, name in enumerate(names)}
    for index, thing in enumerate(found):
        try:
            box, score, key = annotation_rules.box_of(thing), float(thing["score"]), thing["image_id"]
            if not np.isfinite(score):
                raise ValueError(f"expected a number as its 'score', found {score}")
            image_id = annotation_rules.id_of(key) if isinstance(key, int) else None
        except coco_json.BROKEN as error:
            reason = f"it has no {error}" if isinstance(error, KeyError) else error
            raise UserError(f"{detections}: detection {index}: {reason}") from None
        if score < min_score or thing.get("category_id", 1) != 1 or box[2] <= 0 or box[3] <= 0:
            continue
        padded = f"{key:012d}.jpg" if isinstance(key, int) else ""
        name = padded if padded in there else of_stem.get(str(key))
        if name is None:
            raise UserError(
                f"{detections}: detection {index}: its picture, {padded or key} or {key}.*, is not in {folder}; "
                f"give the folder by --data.unlabelled_images"
            )
        yield {
            "file_name": f"{images}/{name}",
            "image_id": place[name] if image_id is None else image_id,
            "ann_id": index,
            "box_xywh": box.tolist(),
            "area": float(box[2] * box[3]),
            "keypoints": np.zeros((num_keypoints, 3)),
        }
