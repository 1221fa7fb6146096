"""COCO's annotation JSON: what is read of it, and what is refused, by name.

Of a manifest of shards it is the JSON that its rows would be.
"""

import json
import re
import unicodedata
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray as Array

from sapiens_accel.data.annotation_rules import FARTHEST, PLAIN, Reading
from sapiens_accel.errors import UserError
from sapiens_accel.sources import shards

COLON = re.compile(r":\s*")
# COCO-WholeBody keeps its 133 keypoints in five lists.
WHOLE_BODY = ("keypoints", "foot_kpts", "face_kpts", "lefthand_kpts", "righthand_kpts")
NUMBERS = {int, float, bool}
BROKEN = (KeyError, TypeError, ValueError, AttributeError, OverflowError)  # what a row of odd types raises


def parsed(path: Path) -> Any:
    """A JSON file's content; of a manifest of shards, the COCO JSON that its rows would be.

    Raises:
        UserError: it is not JSON.
    """
    if shards.is_manifest(path):
        return shards.tree(path)
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON: {error}") from None


def read_json(path: Path) -> dict[str, Any]:
    """A COCO annotation file: a tree with lists of images and annotations.

    Raises:
        UserError: it is none.
    """
    tree = parsed(path)
    for key, needed in (("images", ("id", "file_name")), ("annotations", ())):
        items = tree.get(key) if isinstance(tree, dict) else None
        if not isinstance(items, list):
            raise UserError(f"{path}: no list {key!r} in it; expected a COCO annotation file")
        odd = [item for item in items if not isinstance(item, dict) or any(name not in item for name in needed)]
        if odd:
            raise UserError(f"{path}: {key}: expected {' and '.join(needed) or 'keys'}, found {shown(odd[0])}")
    kinds = tree.get("categories") or []
    if not isinstance(kinds, list) or not all(isinstance(kind, dict) for kind in kinds):
        raise UserError(f"{path}: categories: expected a list of objects with 'id' and 'name', found {shown(kinds)}")
    for image in tree["images"]:
        if reason := fault_of(image):
            raise UserError(f"{path}: images: {reason}")
    return tree


def fault_of(image: dict[str, Any]) -> str | None:
    """Why one of a JSON's `images` cannot be taken. A name must stay in the folder of pictures, and in one line."""
    key, name = image["id"], image["file_name"]
    if isinstance(key, bool) or not isinstance(key, int | float | str):
        return f"expected an id that is a whole number, found {shown(key)}"
    if not isinstance(name, str) or not PurePosixPath(name).name:
        return f"id {shown(key)}: expected the name of a file, found {shown(name)}"
    if name.startswith("/") or ".." in name.split("/"):
        return f"id {shown(key)}: {shown(name)} leads out of the folder of pictures; expected a name inside it"
    odd = {"Cc", "Cs", "Zl", "Zp"}  # ends of lines, other control characters, halves of characters
    if not (name.isascii() and name.isprintable()) and any(unicodedata.category(letter) in odd for letter in name):
        return f"id {shown(key)}: expected a name of letters that can be shown, found {shown(name)}"
    return None


def picture_names(tree: dict[str, Any], path: Path) -> dict[Any, str]:
    """Each picture's name by its id, of what `read_json` has accepted.

    Raises:
        UserError: an id of two pictures.
    """
    names: dict[Any, str] = {}
    for image in tree["images"]:
        if names.setdefault(image["id"], image["file_name"]) != image["file_name"]:
            both = f"{names[image['id']]} and {image['file_name']}"
            raise UserError(f"{path}: images: id {shown(image['id'])} is of two pictures, {both}")
    return names


def pictures_of(path: Path) -> list[dict[str, Any]]:
    """The `images` of a file that `read_json` has accepted. What follows them, in COCO the people, is not parsed."""
    if shards.is_manifest(path):
        return shards.pictures(path)
    text, decode = path.read_text(encoding="utf-8-sig"), json.JSONDecoder().raw_decode
    key, value, at = "", [], text.index("{")
    while key != "images":
        key, at = decode(text, text.index('"', at))
        value, at = decode(text, next(COLON.finditer(text, at)).end())
    return value


def category_ids(tree: dict[str, Any], reading: Reading) -> list[Any]:
    """A JSON of many kinds of things names those that count among them; empty: all count."""
    wanted = reading.categories or ("person",)
    return [kind.get("id") for kind in tree.get("categories") or () if kind.get("name") in wanted]


def person_category(annotations: Path, reading: Reading = PLAIN) -> Any:
    """The category_id of people in their COCO JSON: that of the name, else the only one; 1 where it does not tell."""
    tree = parsed(annotations)
    listed = [kind.get("id") for kind in tree.get("categories") or ()]
    return next(iter(category_ids(tree, reading) or listed), 1)


def row_of(
    person: dict[str, Any], names: dict[Any, str], images: str, num_keypoints: int, reading: Reading = PLAIN
) -> dict[str, Any] | None:
    """The row of one COCO annotation; None for a crowd or an empty box.

    Raises:
        one of BROKEN: something in it is not what it should be.
    """
    if person.get("iscrowd", 0) not in (0, 1, None):
        raise ValueError(f"expected 'iscrowd' of 0 or 1, found {shown(person['iscrowd'])}")
    if person.get("iscrowd"):
        return None
    box = box_of(person)
    if box[2] <= 0 or box[3] <= 0:
        return None
    if person.get("image_id") not in names:
        raise ValueError(f"its picture {person.get('image_id')} is not among 'images'")
    points = _numbers(keypoint_numbers(person, num_keypoints, reading) or [0] * 3 * num_keypoints)
    if points.shape != (3 * num_keypoints,) or not np.isfinite(points).all():
        raise ValueError(f"expected {3 * num_keypoints} keypoint numbers, found {points.size}")
    if max(np.abs(box).max(), np.abs(points).max()) > FARTHEST:
        raise ValueError(f"expected pixels of a picture, found numbers above {FARTHEST:g}")
    area = person.get("area", float(box[2] * box[3]))
    if not isinstance(area, int | float) or not 0 <= area <= FARTHEST**2:
        raise ValueError(f"expected 'area' of a number from 0 up, found {shown(area)}")
    return {
        "file_name": f"{images}/{names[person['image_id']]}",
        "image_id": id_of(person["image_id"]),
        "ann_id": id_of(person["id"]),
        "box_xywh": box.tolist(),
        "area": float(area),
        "keypoints": points.reshape(num_keypoints, 3),
    }


def id_of(value: Any) -> int:
    """A whole number that Arrow can keep, which has 64 bits."""
    if not isinstance(value, int | str) and not (isinstance(value, float) and value.is_integer()):
        raise ValueError(f"expected an id that is a whole number, found {shown(value)}")
    number = int(value)
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"expected an id of at most 64 bits, found {shown(value)}")
    return number


def keypoint_numbers(person: dict[str, Any], num_keypoints: int, reading: Reading = PLAIN) -> list[Any] | None:
    """An annotation's x, y, v, x, y, v, ... for the run's keypoints; None where it has none.

    COCO-WholeBody's five lists are taken as one where 133 are asked for.

    Raises:
        ValueError: those that the run's are to be taken from are more or fewer than they should be.
    """
    count, numbers = reading.count or num_keypoints, person.get("keypoints")
    if count == 133 and all(key in person for key in WHOLE_BODY):
        numbers = [number for key in WHOLE_BODY for number in person[key]]
    if not numbers or reading.source is None:
        return numbers
    if not isinstance(numbers, list) or len(numbers) != 3 * count:
        raise ValueError(f"expected {3 * count} keypoint numbers, found {shown(numbers)}")
    return [number for k in reading.source for number in (numbers[3 * k : 3 * k + 3] if k >= 0 else (0, 0, 0))]


def box_of(thing: dict[str, Any]) -> Float[Array, "4"]:
    """The `bbox` of an annotation or a detection.

    Raises:
        ValueError: there is none, or it is not four finite numbers.
    """
    if "bbox" not in thing:
        raise ValueError("it has no 'bbox'; expected x, y, width, height in pixels of the picture")
    box = _numbers(thing["bbox"])
    if box.shape != (4,) or not np.isfinite(box).all():
        raise ValueError(f"expected 'bbox' of 4 numbers, found {thing['bbox']!r}")
    return box


def _numbers(values: Any) -> Float[Array, "n"]:
    # numpy would read the numbers in a text, too.
    if not isinstance(values, list) or not set(map(type, values)) <= NUMBERS:
        raise ValueError(f"expected a list of numbers for 'bbox' and 'keypoints', found {str(values)[:60]}")
    return np.asarray(values, dtype=np.float64)


def reason(error: Exception) -> str:
    """Why an annotation is BROKEN, in one line; our own words stand for themselves."""
    told = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
    return " ".join(told.split())[:200]


def shown(value: Any) -> str:
    """A value from a JSON, short and in one line."""
    return repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:60]}..."
