"""COCO's annotation JSON as a source: what is read of it, and what is refused, by name."""

import hashlib
import json
import re
import unicodedata
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa

from sapiens_accel.errors import UserError
from sapiens_accel.sources.foreign import suggest_conversion
from sapiens_accel.sources.schema import Fault, Span

MAX_TREES = 2  # parsed files that are held: of training and of validation
MAX_ANNOTATIONS_HELD = 100_000  # COCO's validation has 11,000; the 262,000 of its training take 2 GB as objects
WHOLE_NUMBER = re.compile(r"\s*-?\d{1,40}\s*", re.ASCII)
HASHED_BIT = 62  # set in the number of an id that is a text
NO_ANNOTATION = "expected an object with image_id and keypoints"
COLON = re.compile(r":\s*")
BROKEN = (KeyError, TypeError, ValueError, AttributeError, OverflowError)  # what a row of odd types raises

_trees: OrderedDict[tuple[Path, int, int, int], Any] = OrderedDict()


def parse_json(path: Path) -> Any:
    """A JSON file's content.

    A file is parsed once while it does not change, so callers must not change what they get. Ids of images,
    annotations and categories are whole numbers however they are written (see `number_of_id`), so that whoever compares
    them (Arrow's tables, pycocotools, detections) has the same; what was written as text is there as `given_id`,
    `given_image_id` and `given_category_id`. An annotation without an id has one that no other has.

    Raises:
        UserError: it is not JSON.
    """
    key = _version(path)
    if key not in _trees:
        tree = load_json(path)
        if isinstance(tree, dict):
            _normalize_ids(tree)
        _trees[key] = tree
        while len(_trees) > MAX_TREES:
            _trees.popitem(last=False)
    _trees.move_to_end(key)
    return _trees[key]


def _version(path: Path) -> tuple[Path, int, int, int]:
    stat = path.stat()
    return path, stat.st_ino, stat.st_size, stat.st_mtime_ns


def load_json(path: Path) -> Any:
    """
    Raises:
        UserError: the file cannot be read, or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        hint = suggest_conversion(path) or _explain_no_json(path, error)  # other tools' files are no text at all
        raise UserError(f"{path}: not JSON: {error}{hint}") from None


def _explain_no_json(path: Path, error: Exception) -> str:
    """What a file is that is no JSON, and what to do about it, as the end of a message; empty: not known."""
    with path.open("rb") as stream:
        head = stream.read(4)
    if not head:
        return ". The file is empty"
    if head[:2] == b"\x1f\x8b" or head == b"PK\x03\x04":
        return f". It is compressed: unpack it ({'gunzip' if head[:2] != b'PK' else 'unzip'})"
    if isinstance(error, UnicodeDecodeError):
        return ". It is of another encoding: save it as UTF-8"
    if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data":
        return (
            ". Several values follow each other, as in JSON Lines: expected one object with 'images' and 'annotations'"
        )
    return ""


def release_large_trees() -> None:
    """Forget parsed files of many annotations: processes that load images would each get a copy of them."""
    for key, tree in list(_trees.items()):
        annotations = tree.get("annotations") if isinstance(tree, dict) else tree
        if isinstance(annotations, list) and len(annotations) > MAX_ANNOTATIONS_HELD:
            del _trees[key]


@dataclass(frozen=True)
class CocoFile:
    """A COCO annotation JSON; also a folder or a detector's results, as far as no more than their name is asked for."""

    file: Path
    max_looked_at: int = 1_000_000

    @property
    def digest(self) -> str:
        """
        Raises:
            UserError: the file cannot be read.
        """
        try:
            return _digest_of(*_version(self.file))
        except OSError as error:
            raise UserError(f"{self.file}: cannot be read: {error.strerror}") from None

    @property
    def categories(self) -> list[dict[str, Any]]:
        tree = parse_json(self.file)
        categories = tree.get("categories") if isinstance(tree, dict) else None
        return [one for one in categories if isinstance(one, dict)] if isinstance(categories, list) else []

    def images(self) -> list[dict[str, Any]]:
        return read_image_list(self.file)

    def read(self, collect: list[Fault] | None = None) -> dict[str, Any]:
        return read_json(self.file, collect)

    def some_annotations(self) -> Sequence[Any]:
        return read_json(self.file)["annotations"]

    def tables(self, columns: Sequence[str]) -> Iterator[pa.Table] | None:
        return None

    def groups(self) -> list[Span]:
        return []

    def read_group(self, first: int, count: int, columns: Sequence[str] | None = None) -> pa.Table:
        raise NotImplementedError(f"{self.file}: a JSON has no groups")


@lru_cache(maxsize=16)
def _digest_of(path: Path, *_: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:32]


def whole_number(value: Any) -> Any:
    """An id as an int where it is one, however it is written; anything else as it is."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return int(value) if isinstance(value, str) and WHOLE_NUMBER.fullmatch(value) else value


def number_of_id(value: Any) -> Any:
    """An id as an int: the whole number that it is, however it is written; of any other text, a 62-bit hash of it.

    The same text has the same number in every file, table and stream, so nobody keeps a list of them. What is no id
    stays as it is.
    """
    number = whole_number(value)
    is_long = isinstance(value, str) and isinstance(number, int) and not -(2**63) <= number < 2**63
    if not is_long and (not isinstance(number, str) or not number.strip()):
        return number
    digest = hashlib.blake2b(str(value).strip().encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return 1 << HASHED_BIT | int.from_bytes(digest, "big") >> 2


def given_id(item: dict[str, Any]) -> Any:
    """The id of an image, annotation or category as it was written, for messages and for files that others read."""
    return item.get("given_id", item.get("id"))


def _normalize_ids(tree: dict[str, Any]) -> None:
    of_annotation = {"id": "given_id", "image_id": "given_image_id", "category_id": "given_category_id"}
    for key, names in (
        ("images", {"id": "given_id"}),
        ("categories", {"id": "given_id"}),
        ("annotations", of_annotation),
    ):
        items = tree.get(key)
        for item in items if isinstance(items, list) else ():
            for name, given in names.items() if isinstance(item, dict) else ():
                if type(value := item.get(name)) in (float, str):
                    item[name] = number_of_id(value)
                    if isinstance(value, str):
                        item[given] = value
    _normalize_sizes(tree.get("images"))
    _number_those_without_id(tree.get("annotations"))


def _normalize_sizes(images: Any) -> None:
    """Some tools write the width and height of images as text; one that is no number says nothing."""
    for image in images if isinstance(images, list) else ():
        for name in ("width", "height") if isinstance(image, dict) else ():
            if isinstance(image.get(name), str):
                try:
                    image[name] = whole_number(float(image[name]))
                except ValueError:
                    image[name] = None


def _number_those_without_id(annotations: Any) -> None:
    """Some tools write none: the numbers that follow the largest id, or from 0."""
    objects = [one for one in annotations if isinstance(one, dict)] if isinstance(annotations, list) else []
    without = [one for one in objects if one.get("id") is None]
    largest = max((one["id"] for one in objects if type(one.get("id")) is int), default=-1) if without else -1
    for number, one in enumerate(without, start=largest + 1):
        one["id"] = number


def read_json(path: Path, collect: list[Fault] | None = None) -> dict[str, Any]:
    """A COCO annotation file: a tree with lists of images and annotations.

    Args:
        collect: gets every fault of images and categories, which are then left out; None: the first fault is raised.

    Raises:
        UserError: it is none.
    """
    tree = parse_json(path)
    for key in ("images", "annotations"):
        if not isinstance(tree, dict) or not isinstance(tree.get(key), list):
            text = f"no list {key!r} in it; expected a COCO annotation file{_explain_no_lists(tree, key)}"
            raise UserError(f"{path}: {text}{suggest_conversion(path)}")
    images: list[dict[str, Any]] = []
    faults = list(_image_faults(tree["images"], images))
    kinds = tree.get("categories") or []
    if not isinstance(kinds, list) or not all(isinstance(kind, dict) for kind in kinds):
        text = f"categories: expected a list of objects with 'id' and 'name', found {show_value(kinds)}"
        faults.append(Fault("categories", text))
        kinds = []
    faults += _category_faults(kinds)
    if collect is not None:
        collect += faults
        return tree | {"images": images, "categories": kinds, "annotations": _of_other_images(tree, images)}
    odd = [(index, item) for index, item in enumerate(tree["annotations"]) if not isinstance(item, dict)]
    texts = [fault.text for fault in faults if fault.check != "ids"]
    texts += [f"annotations: entry {index}, {show_value(item)}: {NO_ANNOTATION}" for index, item in odd[:1]]
    if texts:
        raise UserError(f"{path}: {texts[0]}")
    return tree if kinds or "categories" not in tree else tree | {"categories": kinds}  # null, 0 and {} are none too


def _explain_no_lists(tree: Any, key: str) -> str:
    if isinstance(tree, list):
        return ", found a list: annotations or a detector's results alone?"
    return f", found {key!r} of {show_value(tree[key])}" if isinstance(tree, dict) and key in tree else ""


def _category_faults(kinds: Sequence[dict[str, Any]]) -> Iterator[Fault]:
    """Categories of another name with the same id: whose annotations these are nobody can say."""
    named: dict[str, Any] = {}
    for kind in kinds:
        key, name = repr(kind.get("id")), kind.get("name")
        if kind.get("id") is not None and named.setdefault(key, name) != name:
            both = f"{show_value(named[key])} and {show_value(name)}"
            text = f"categories: id {show_value(given_id(kind))} is of two categories, {both}; give each its own id"
            yield Fault("categories", text)


def _of_other_images(tree: dict[str, Any], valid: Sequence[dict[str, Any]]) -> list[Any]:
    """The annotations without those of images that are refused, which are named already."""
    ids = [repr(image["id"]) for image in tree["images"] if isinstance(image, dict) and "id" in image]
    refused = set(ids) - {repr(image["id"]) for image in valid}
    annotations = tree["annotations"]
    if not refused:
        return annotations
    return [one for one in annotations if not isinstance(one, dict) or repr(one.get("image_id")) not in refused]


def image_names(tree: dict[str, Any], path: Path) -> dict[int, str]:
    """Each image's file_name by its id.

    Raises:
        UserError: an id of two images. Who reads no annotations, `read_json` alone, does not mind.
    """
    twice = [fault for fault in _image_faults(tree["images"]) if fault.check == "ids"]
    if twice:
        raise UserError(f"{path}: {twice[0].text}")
    return {image["id"]: image["file_name"] for image in tree["images"]}


def _image_faults(images: list[Any], valid: list[dict[str, Any]] | None = None) -> Iterator[Fault]:
    """What is wrong with a JSON's `images`; those that can be taken are added to `valid`."""
    names: dict[Any, str] = {}
    for index, image in enumerate(images):
        if not isinstance(image, dict) or "id" not in image or "file_name" not in image:
            reason = f"expected id and file_name, found {show_value(image)}"
        else:
            reason = find_image_fault(image)
        if reason:
            yield Fault("images", f"images, entry {index}: {reason}")
        elif names.setdefault(image["id"], image["file_name"]) != image["file_name"]:
            both = f"{names[image['id']]} and {image['file_name']}"
            yield Fault("ids", f"images: id {show_value(given_id(image))} is of two images, {both}")
        elif valid is not None:
            valid.append(image)


def find_image_fault(image: dict[str, Any]) -> str | None:
    """Why one of a JSON's `images` cannot be taken. A name must stay in the folder of images, and in one line."""
    key, name = given_id(image), image["file_name"]
    if isinstance(image["id"], bool) or not isinstance(image["id"], int):
        return f"expected an id that is a whole number or a text, found {show_value(key)}"
    if not isinstance(name, str) or not PurePosixPath(name).name:
        return f"id {show_value(key)}: expected the name of a file, found {show_value(name)}"
    if name.startswith("/") or ".." in name.split("/"):
        inside = dict.fromkeys((name.lstrip("/"), PurePosixPath(name).name))
        hint = f", such as {' or '.join(map(show_value, inside))}" if ".." not in name.split("/") else ""
        expected = f"expected a name inside it{hint}"
        return f"id {show_value(key)}: {show_value(name)} leads out of the folder of images; {expected}"
    odd = {"Cc", "Cs", "Zl", "Zp"}  # ends of lines, other control characters, halves of characters
    if not (name.isascii() and name.isprintable()) and any(unicodedata.category(letter) in odd for letter in name):
        return f"id {show_value(key)}: expected a name of letters that can be shown, found {show_value(name)}"
    return None


def read_image_list(path: Path) -> list[dict[str, Any]]:
    """The `images` of a file that `read_json` has accepted. What follows them, in COCO the people, is not parsed."""
    if any(key[0] == path for key in _trees):
        return parse_json(path)["images"]
    text, decode = path.read_text(encoding="utf-8-sig"), json.JSONDecoder().raw_decode
    key, value, at = "", [], text.index("{")
    while key != "images":
        key, at = decode(text, text.index('"', at))
        value, at = decode(text, next(COLON.finditer(text, at)).end())
    _normalize_ids({key: value})
    return value


def reason(error: Exception) -> str:
    """Why an annotation is BROKEN, in one line; our own words stand for themselves."""
    text = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
    return " ".join(text.split())[:200]


def show_value(value: Any) -> str:
    """A value from a JSON, short and in one line."""
    return repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:60]}..."


def is_detections(file: Path) -> bool:
    """Whether a JSON is a detector's results: a list, where an annotation file is an object."""
    if not file.is_file():
        return False
    with file.open("rb") as stream:
        return stream.read(100).lstrip().startswith(b"[")
