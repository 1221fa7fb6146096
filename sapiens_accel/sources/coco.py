"""COCO's annotation JSON: what is read of it, and what is refused, by name.

Of a manifest of shards it is the JSON that its rows would be.
"""

import json
import re
import unicodedata
from pathlib import Path, PurePosixPath
from typing import Any

from sapiens_accel.errors import UserError
from sapiens_accel.sources import shards

COLON = re.compile(r":\s*")
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


def reason(error: Exception) -> str:
    """Why an annotation is BROKEN, in one line; our own words stand for themselves."""
    told = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
    return " ".join(told.split())[:200]


def shown(value: Any) -> str:
    """A value from a JSON, short and in one line."""
    return repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:60]}..."


def is_detections(file: Path) -> bool:
    """Whether a JSON is a detector's results: a list, where an annotation file is an object."""
    if not file.is_file():
        return False
    with file.open("rb") as stream:
        return stream.read(100).lstrip().startswith(b"[")
