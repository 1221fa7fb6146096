"""COCO keypoint JSON and picture folders to Hugging Face `datasets` rows, one per person.

Labelled and unlabelled people share one schema; a person without a single v > 0 is unlabelled. The table is Arrow,
memory-mapped, cached by the content of the JSON; pictures are referenced by name and never copied.
"""

import hashlib
import json
import os
import re
import shutil
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import cv2
import datasets
import numpy as np
from datasets import Array2D, Dataset, Features, List, Value, concatenate_datasets
from jaxtyping import Bool, Float, Int, Shaped
from numpy import ndarray as Array
from tqdm import tqdm

from sapiens_accel.config import UserError

if not sys.stderr.isatty():
    datasets.disable_progress_bars()

SCHEMA_VERSION = 2
DECODE_AT_MOST = 5000
COLON = re.compile(r":\s*")
# COCO-WholeBody keeps its 133 keypoints in five lists.
WHOLE_BODY = ("keypoints", "foot_kpts", "face_kpts", "lefthand_kpts", "righthand_kpts")
JPEG_END = b"\xff\xd9"
JPEG_START_OF_SCAN = 0xDA
PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
FARTHEST = 1e7  # px: more than any picture has, and its square is still a number in float32
NUMBERS = {int, float, bool}
BROKEN = (KeyError, TypeError, ValueError, AttributeError, OverflowError)  # what a row of odd types raises


@dataclass(frozen=True, kw_only=True)
class People:
    """Rows of people and the folder that their pictures are in.

    A row: file_name (relative to root), image_id, ann_id, box_xywh [4] and keypoints [K, 3] (x, y, v) in image px, area
    in px^2.

    Attributes:
        annotations: the JSON that the rows came from, or the folder of whole pictures.
        num_skipped: people left out because their picture does not decode.
        sources: what `together` joined: a broken picture is told with its own JSON.
    """

    rows: Dataset
    root: Path
    annotations: Path
    num_skipped: int = 0
    sources: tuple["People", ...] = ()

    def __len__(self) -> int:
        return len(self.rows)


def labelled_people(root: Path, annotations: str, images: str, num_keypoints: int, cache: Path) -> People:
    """The people of a COCO keypoint JSON with at least one labelled keypoint; crowds and empty boxes are left out.

    Args:
        annotations, images: the JSON and the folder of its pictures, relative to `root`.

    Raises:
        UserError: the file is missing, is no COCO keypoint JSON, or names no such person.
    """
    people = _people(root, annotations, images, num_keypoints, cache)
    kept = np.flatnonzero(_labelled(people.rows))
    if not len(kept):
        raise UserError(f"{root / annotations}: none of its {len(people)} people has a labelled keypoint (v > 0)")
    return replace(people, rows=people.rows.select(kept))


def by_picture(people: People, images: str) -> Int[Array, "n"]:
    """The people's indices in the order of the JSON's `images`, and in that of its annotations within a picture."""
    listed = [f"{images}/{image['file_name']}" for image in pictures_of(people.annotations)]
    places = {name: place for place, name in reversed(list(enumerate(listed)))}
    return np.argsort([places[name] for name in people.rows["file_name"][:]], kind="stable")


def withheld_people(
    root: Path,
    annotations: str,
    images: str,
    num_keypoints: int,
    places: Int[Array, "n"],
    min_side: float,
    cache: Path,
) -> People:
    """The people at these places of `labelled_people`, with boxes of at least `min_side` px and all keypoints zero.

    Raises:
        UserError: as `labelled_people`.
    """
    labelled = _people(root, annotations, images, num_keypoints, cache)
    # A table of its own, row by row the labelled one: what is not in it cannot be learnt from by mistake.
    people = _people(root, annotations, images, num_keypoints, cache, keypoints="withheld")
    chosen = np.flatnonzero(_labelled(labelled.rows))[places]
    sides = boxes_of(people.rows)[chosen, 2:].min(axis=1, initial=np.inf)
    return replace(people, rows=people.rows.select(chosen[sides >= min_side]))


def people_with_boxes(
    root: Path, annotations: str, images: str, num_keypoints: int, min_side: float, cache: Path
) -> People:
    """The people of a COCO JSON that have a box of at least `min_side` px and no labelled keypoint.

    Raises:
        UserError: the file is missing or is no COCO JSON.
    """
    people = _people(root, annotations, images, num_keypoints, cache, keypoints="optional")
    sides = boxes_of(people.rows)[:, 2:].min(axis=1, initial=np.inf)
    return replace(people, rows=people.rows.select(np.flatnonzero(~_labelled(people.rows) & (sides >= min_side))))


def is_detections(file: Path) -> bool:
    """Whether a JSON is a detector's results: a list, where an annotation file is an object."""
    if not file.is_file():
        return False
    with file.open("rb") as stream:
        return stream.read(100).lstrip().startswith(b"[")


def detected_people(
    root: Path, detections: str, images: str, num_keypoints: int, min_side: float, min_score: float, cache: Path
) -> People:
    """The people of a detector's results in COCO's form, a list of image_id, bbox, score and, may be, category_id.

    Kept: a score of at least `min_score`, a box of at least `min_side` px, and category 1 where categories are given.
    The picture of image_id 7 is 000000000007.jpg or the one whose name without its suffix is 7.

    Raises:
        UserError: no list of detections, or a picture that is not in the folder.
    """
    file = root / detections
    # Names that have come or gone change which picture is whose.
    names = _picture_names(root / images)
    digest = _digest(file.read_bytes(), "detections", images, str(min_score), *names)
    source = {"detections": str(file), "folder": str(root / images), "min_score": min_score, "names": names}
    people = People(
        rows=_table(_detected_rows, digest, num_keypoints, cache, **source, images=images), root=root, annotations=file
    )
    sides = boxes_of(people.rows)[:, 2:].min(axis=1, initial=np.inf)
    return replace(people, rows=people.rows.select(np.flatnonzero(sides >= min_side)))


def whole_pictures(root: Path, images: str, num_keypoints: int, cache: Path) -> People:
    """Every picture of a folder as one unlabelled person, whose box is the picture.

    Raises:
        UserError: the folder holds no picture.
    """
    folder = root / images
    names = _picture_names(folder)
    if not names:
        raise UserError(f"{folder}: no pictures ({', '.join(PICTURES)}) in it")
    # A link to nothing is named by `checked`, like any other picture that does not decode.
    stats = [(path if path.exists() else folder).stat() for path in (folder / name for name in names)]
    content = [f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in zip(names, stats, strict=True)]
    digest = _digest("\n".join(content).encode(), str(folder))
    rows = _table(_whole_picture_rows, digest, num_keypoints, cache, root=str(root), images=images, names=names)
    return People(rows=rows, root=root, annotations=folder)


def together(several: Sequence[People]) -> People:
    """The people of several sources of one root."""
    rows = concatenate_datasets([people.rows for people in several])
    return replace(several[0], rows=rows, sources=tuple(several))


def decodes(check: Literal["auto", "ends", "decode"], num_pictures: int) -> bool:
    """Whether so many pictures are decoded to check them."""
    return check == "decode" or (check == "auto" and num_pictures <= DECODE_AT_MOST)


def checked(people: People, on_bad_image: Literal["stop", "skip"], check: Literal["auto", "ends", "decode"]) -> People:
    """The same people once every picture is known to be there and to decode.

    Raises:
        UserError: a picture that is not there, whatever `on_bad_image` says; a corrupt one, unless it says skip.
    """
    names = people.rows.unique("file_name")
    folders = {folder: listing(folder) for folder in {(people.root / name).parent for name in names}}
    for path in (people.root / name for name in names):
        if path.name not in folders[path.parent]:
            raise UserError(f"{_whose(people.sources or (people,), path)}: its picture {path} is not there")
    sizes = looks(people.root, names, decodes(check, len(names)))
    bad = [name for name, size in sizes.items() if size is None]
    if bad and on_bad_image == "stop":
        raise UserError(f"{people.root / bad[0]}: does not decode; mend it, or --data.on_bad_image skip")
    for name in bad:
        print(f"skipped: {people.root / name} does not decode", flush=True)
    kept = np.flatnonzero(~np.isin(np.array(people.rows["file_name"][:]), bad))
    num_skipped = len(people) - len(kept)
    if not len(kept):
        files = dict.fromkeys(str(source.annotations) for source in people.sources or (people,))
        raise UserError(f"{' and '.join(files)}: nobody is left: none of its {len(names)} pictures decodes")
    return replace(people, rows=people.rows.select(kept), num_skipped=num_skipped) if bad else people


def read_image(path: Path) -> Array:
    """An RGB picture, uint8 [h, w, 3], turned as its EXIF data says.

    Raises:
        UserError: the file does not decode.
    """
    image = decoded(path, cv2.IMREAD_COLOR)
    if image is None:
        raise UserError(f"{path}: does not decode; mend it, or run with --data.check_images decode")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def decoded(path: Path, how: int) -> Array | None:
    """What OpenCV makes of a picture, BGR; None if it does not decode, is larger than OpenCV may read, or is no file.

    Args:
        how: cv2.IMREAD_COLOR (grey, 16 bits, alpha and CMYK become 8-bit colours) or one of its reduced sizes.
    """
    try:
        return cv2.imread(str(path), how) if is_file(path) else None
    except cv2.error:  # beyond OPENCV_IO_MAX_IMAGE_PIXELS; OpenCV 4 returns None
        return None


def is_file(path: Path) -> bool:
    """Whether it can be opened as a file: no folder, no named pipe (opening it would wait for whoever writes into it),
    no link to nothing or to itself, no name that no file can have."""
    try:
        return path.is_file()
    except OSError:
        return False


def keypoints_of(rows: Dataset) -> Float[Array, "n k 3"]:
    """All keypoints (image px, v) as one array."""
    return column_of(rows, "keypoints", rows.features["keypoints"].shape)


def boxes_of(rows: Dataset) -> Float[Array, "n 4"]:
    """All boxes, x y w h in image px."""
    return column_of(rows, "box_xywh", (4,))


def column_of(rows: Dataset, name: str, shape: tuple[int, ...] = ()) -> Shaped[Array, "n *shape"]:
    """A column as one array, of numbers or of text.

    Past `datasets`' own way, which makes an array of each row and a slice of each chosen one: 0.3 ms, COCO a minute.
    """
    column: Any = rows.data.column(name).combine_chunks()
    values = getattr(column, "storage", column)
    for _ in shape:
        values = values.flatten()
    whole = values.to_numpy(zero_copy_only=False).reshape(-1, *shape)
    # A copy: what Arrow maps into memory may not be written to.
    return whole.copy() if rows._indices is None else whole[rows._indices.column(0).to_numpy()]


def _labelled(rows: Dataset) -> Bool[Array, "n"]:
    return np.asarray((keypoints_of(rows)[..., 2] > 0).any(axis=-1))


def _people(
    root: Path,
    annotations: str,
    images: str,
    num_keypoints: int,
    cache: Path,
    keypoints: Literal["needed", "optional", "withheld"] = "needed",
) -> People:
    file = root / annotations
    if not file.is_file():
        raise UserError(f"{file}: no such annotation file; see --data.root and --data.*_annotations")
    try:
        digest = _digest(file.read_bytes(), keypoints, images)
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    source = {"annotations": str(file), "images": images, "keypoints": keypoints}
    return People(rows=_table(_coco_rows, digest, num_keypoints, cache, **source), root=root, annotations=file)


def _digest(content: bytes, *more: str) -> str:
    return hashlib.sha256(b"\0".join([content, *(word.encode() for word in more)])).hexdigest()[:32]


def _table(rows: Any, digest: str, num_keypoints: int, cache: Path, **source: Any) -> Dataset:
    """The Arrow table of a generator, made once for each content: a moved or touched file makes no second one."""
    folder = cache / "people" / f"{digest}-k{num_keypoints}-v{SCHEMA_VERSION}"
    if not (folder / "dataset_info.json").is_file():
        found, features = list(rows(num_keypoints=num_keypoints, **source)), _features(num_keypoints)
        if not found:  # `datasets` cannot read a table of nobody again
            return Dataset.from_dict({name: [] for name in features}, features=features)
        _save_atomically(Dataset.from_list(found, features=features), folder)
    return Dataset.load_from_disk(str(folder))


def _save_atomically(table: Dataset, folder: Path) -> None:
    # A name for this process only: another one may be writing the same table.
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    table.save_to_disk(str(temporary))
    try:
        temporary.rename(folder)
    except OSError:  # the other one was first
        shutil.rmtree(temporary)


def _features(num_keypoints: int) -> Features:
    return Features(
        {
            "file_name": Value("string"),
            "image_id": Value("int64"),
            "ann_id": Value("int64"),
            "box_xywh": List(Value("float64"), length=4),
            "area": Value("float64"),
            "keypoints": Array2D((num_keypoints, 3), "float64"),
        }
    )


def _coco_rows(num_keypoints: int, annotations: str, images: str, keypoints: str) -> Iterator[dict[str, Any]]:
    path = Path(annotations)
    tree = _read_json(path)
    names = picture_names(tree, path)
    if keypoints != "optional" and not any("keypoints" in person for person in tree["annotations"]):
        raise UserError(f"{path}: no annotation has 'keypoints'; expected a COCO person_keypoints file")
    kinds = person_ids(tree)
    for person in tree["annotations"]:
        if kinds and isinstance(person, dict) and person.get("category_id", kinds[0]) not in kinds:
            continue
        try:
            row = row_of(person, names, images, num_keypoints)
        except BROKEN as error:
            who = person.get("id") if isinstance(person, dict) else person
            reason = f"{type(error).__name__}: {error}"
            raise UserError(f"{path}: annotation {shown(who)}: {' '.join(reason.split())[:200]}") from None
        if row:
            yield row | {"keypoints": np.zeros((num_keypoints, 3))} if keypoints == "withheld" else row


def picture_names(tree: dict[str, Any], path: Path) -> dict[Any, str]:
    """Each picture's name by its id, of what `_read_json` has accepted.

    Raises:
        UserError: an id of two pictures.
    """
    names: dict[Any, str] = {}
    for image in tree["images"]:
        if names.setdefault(image["id"], image["file_name"]) != image["file_name"]:
            both = f"{names[image['id']]} and {image['file_name']}"
            raise UserError(f"{path}: images: id {shown(image['id'])} is of two pictures, {both}")
    return names


def shown(value: Any) -> str:
    """A value from a JSON, short and in one line."""
    return repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:60]}..."


def person_ids(tree: dict[str, Any]) -> list[Any]:
    """A JSON of many kinds of things names the people among them."""
    return [kind.get("id") for kind in tree.get("categories") or () if kind.get("name") == "person"]


def person_category(annotations: Path) -> Any:
    """The category_id of people in a COCO JSON: that of the name, else the only one; 1 where it does not tell."""
    tree = parsed(annotations)
    listed = [kind.get("id") for kind in tree.get("categories") or ()]
    return next(iter(person_ids(tree) or listed), 1)


def row_of(person: dict[str, Any], names: dict[Any, str], images: str, num_keypoints: int) -> dict[str, Any] | None:
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
    points = _numbers(keypoint_numbers(person, num_keypoints) or [0] * 3 * num_keypoints)
    if points.shape != (3 * num_keypoints,) or not np.isfinite(points).all():
        raise ValueError(f"expected {3 * num_keypoints} keypoint numbers, found {points.size}")
    if max(np.abs(box).max(), np.abs(points).max()) > FARTHEST:
        raise ValueError(f"expected pixels of a picture, found numbers above {FARTHEST:g}")
    area = person.get("area", float(box[2] * box[3]))
    if not isinstance(area, int | float) or not 0 <= area <= FARTHEST**2:
        raise ValueError(f"expected 'area' of a number from 0 up, found {shown(area)}")
    return {
        "file_name": f"{images}/{names[person['image_id']]}",
        "image_id": _id(person["image_id"]),
        "ann_id": _id(person["id"]),
        "box_xywh": box.tolist(),
        "area": float(area),
        "keypoints": points.reshape(num_keypoints, 3),
    }


def _id(value: Any) -> int:
    """A whole number that Arrow can keep, which has 64 bits."""
    if not isinstance(value, int | str) and not (isinstance(value, float) and value.is_integer()):
        raise ValueError(f"expected an id that is a whole number, found {shown(value)}")
    number = int(value)
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"expected an id of at most 64 bits, found {shown(value)}")
    return number


def keypoint_numbers(person: dict[str, Any], num_keypoints: int) -> list[Any] | None:
    """An annotation's x, y, v, x, y, v, ...: COCO-WholeBody's five lists as one, where as many are asked for."""
    if num_keypoints == 133 and all(key in person for key in WHOLE_BODY):
        return [number for key in WHOLE_BODY for number in person[key]]
    return person.get("keypoints")


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


def _detected_rows(
    num_keypoints: int, detections: str, images: str, folder: str, min_score: float, names: list[str]
) -> Iterator[dict[str, Any]]:
    found = parsed(Path(detections))
    there, of_stem = set(names), {Path(name).stem: name for name in names}
    place = {name: index for index, name in enumerate(names)}
    for index, thing in enumerate(found):
        try:
            box, score, key = box_of(thing), float(thing["score"]), thing["image_id"]
            if not np.isfinite(score):
                raise ValueError(f"expected a number as its 'score', found {score}")
            image_id = _id(key) if isinstance(key, int) else None
        except BROKEN as error:
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


def _numbers(values: Any) -> Float[Array, "n"]:
    # numpy would read the numbers in a text, too.
    if not isinstance(values, list) or not set(map(type, values)) <= NUMBERS:
        raise ValueError(f"expected a list of numbers for 'bbox' and 'keypoints', found {str(values)[:60]}")
    return np.asarray(values, dtype=np.float64)


def parsed(path: Path) -> Any:
    """A JSON file's content.

    Raises:
        UserError: it is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON: {error}") from None


def _read_json(path: Path) -> dict[str, Any]:
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


def pictures_of(path: Path) -> list[dict[str, Any]]:
    """The `images` of a file that `_read_json` has accepted. What follows them, in COCO the people, is not parsed."""
    text, decode = path.read_text(encoding="utf-8-sig"), json.JSONDecoder().raw_decode
    key, value, at = "", [], text.index("{")
    while key != "images":
        key, at = decode(text, text.index('"', at))
        value, at = decode(text, next(COLON.finditer(text, at)).end())
    return value


def _whole_picture_rows(num_keypoints: int, root: str, images: str, names: list[str]) -> Iterator[dict[str, Any]]:
    for index, name in enumerate(names):
        image = decoded(Path(root) / images / name, cv2.IMREAD_COLOR)
        height, width = (1, 1) if image is None else image.shape[:2]  # `checked` names those that do not decode
        yield {
            "file_name": f"{images}/{name}",
            "image_id": index,
            "ann_id": index,
            "box_xywh": [0.0, 0.0, float(width), float(height)],
            "area": float(width * height),
            "keypoints": np.zeros((num_keypoints, 3)),
        }


def listing(folder: Path) -> set[str]:
    """What is in a folder, by name; nothing in one that is not there."""
    try:
        return {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    except OSError:  # of a name that no folder can have, or of one that may not be read: nothing is there
        return set()


def _picture_names(folder: Path) -> list[str]:
    """The pictures of a folder, by name.

    Raises:
        UserError: a name that is not UTF-8.
    """
    names = sorted(name for name in listing(folder) if Path(name).suffix.lower() in PICTURES)
    for name in names:
        if reason := fault_of({"id": 0, "file_name": name}):
            raise UserError(f"{folder}: {reason.removeprefix('id 0: ')}; rename it")
    return names


def _whose(sources: Sequence[People], picture: Path) -> str:
    """The first annotation of a picture."""
    several = ((people, row) for people in sources for row in enumerate(people.rows["file_name"][:]))
    people, place = next((people, i) for people, (i, name) in several if people.root / name == picture)
    return f"{people.annotations}: annotation {people.rows[place]['ann_id']}"


def looks(root: Path, names: Sequence[str], decode: bool) -> dict[str, tuple[int, int] | None]:
    """Each picture's height and width in eighths, rounded either way; 0, 0 if not decoded; None if it is corrupt."""

    def look(name: str) -> tuple[int, int] | None:
        path = root / name
        if not _whole(path):
            return None
        image = decoded(path, cv2.IMREAD_REDUCED_COLOR_8) if decode else np.empty((0, 0))
        return None if image is None else image.shape[:2]

    with ThreadPoolExecutor(8) as pool:
        progress = tqdm(pool.map(look, names), total=len(names), desc="checking pictures", disable=None, leave=False)
        return dict(zip(names, progress, strict=True))


def _whole(path: Path) -> bool:
    """Whether a JPEG or PNG begins and ends as it must. OpenCV fills what a cut JPEG lacks with grey, silently."""
    try:
        if not is_file(path):
            return False
        with path.open("rb") as file:
            head = file.read(8)
            file.seek(max(0, file.seek(0, os.SEEK_END) - 64))
            tail = file.read()
    except OSError:
        return False
    if head[:2] == b"\xff\xd8":
        # Cameras append data of their own, so the end need not be the last thing in the file.
        return JPEG_END in tail or JPEG_END in _jpeg_scan(path.read_bytes())
    return b"IEND" in tail if head == b"\x89PNG\r\n\x1a\n" else len(head) == 8


def _jpeg_scan(content: bytes) -> bytes:
    """What follows the headers: they may hold a thumbnail with an end of its own. Segments are marker, length, data."""
    at = 2
    while at + 4 <= len(content) and content[at] == 0xFF and content[at + 1] != JPEG_START_OF_SCAN:
        at += 2 + int.from_bytes(content[at + 2 : at + 4], "big")
    return content[at:]
