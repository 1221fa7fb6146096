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
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple

import cv2
import datasets
import numpy as np
import pyarrow as pa
from datasets import Array2D, Dataset, Features, List, Value, concatenate_datasets
from datasets.arrow_writer import ArrowWriter
from jaxtyping import Bool, Float, Int, Shaped, UInt8
from numpy import ndarray as Array
from tqdm import tqdm

from sapiens_accel import roster, shards
from sapiens_accel.config import UserError
from sapiens_accel.roster import FARTHEST, PLAIN, Reading

if not sys.stderr.isatty():
    datasets.disable_progress_bars()

SCHEMA_VERSION = 2
DECODE_AT_MOST = 5000
LOOK_AT_ALL = 1_000_000  # people; of more, auto looks at pictures of DECODE_AT_MOST, evenly spread
COLON = re.compile(r":\s*")
# COCO-WholeBody keeps its 133 keypoints in five lists.
WHOLE_BODY = ("keypoints", "foot_kpts", "face_kpts", "lefthand_kpts", "righthand_kpts")
# The files of the table of people in shards: rows, which are labelled, and their order where it is another.
PEOPLE, LABELLED, ORDER = "people.arrow", "labelled.npy", "order.npy"
JPEG_END = b"\xff\xd9"
JPEG_START_OF_SCAN = 0xDA
JPEG_START_OF_FRAME = (0xC0, 0xC1, 0xC2)  # baseline, extended, progressive: those that are decoded at other sizes
JPEG_APP1 = 0xE1
# OpenCV from 4.11 on decodes to RGB; a reduction is named with the flag of grey, which the one of colour overrules.
RGB = getattr(cv2, "IMREAD_COLOR_RGB", None)
REDUCED = {
    1: 0,
    2: cv2.IMREAD_REDUCED_GRAYSCALE_2,
    4: cv2.IMREAD_REDUCED_GRAYSCALE_4,
    8: cv2.IMREAD_REDUCED_GRAYSCALE_8,
}
PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
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
        reading: how the JSON was read; evaluation reads it in the same way.
    """

    rows: Dataset
    root: Path
    annotations: Path
    num_skipped: int = 0
    sources: tuple["People", ...] = ()
    reading: Reading = PLAIN

    def __len__(self) -> int:
        return len(self.rows)


def labelled_people(
    root: Path, annotations: str, images: str, num_keypoints: int, cache: Path, reading: Reading = PLAIN
) -> People:
    """The people of a COCO keypoint JSON with at least one labelled keypoint; crowds and empty boxes are left out.

    Args:
        annotations, images: the JSON and the folder of its pictures, relative to `root`.

    Raises:
        UserError: the file is missing, is no COCO keypoint JSON, or names no such person.
    """
    people = _people(root, annotations, images, num_keypoints, cache, reading=reading)
    kept = np.flatnonzero(_labelled(people.rows))
    if not len(kept):
        raise UserError(f"{root / annotations}: none of its {len(people)} people has a labelled keypoint (v > 0)")
    return chosen_of(people, kept)


def chosen_of(people: People, chosen: Int[Array, "n"]) -> People:
    """These of the people, in this order, ascending; all of them are taken as they are, whatever their number."""
    return people if len(chosen) == len(people) else replace(people, rows=people.rows.select(chosen))


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
    reading: Reading = PLAIN,
) -> People:
    """The people at these places of `labelled_people`, with boxes of at least `min_side` px and all keypoints zero.

    Raises:
        UserError: as `labelled_people`.
    """
    labelled = _people(root, annotations, images, num_keypoints, cache, reading=reading)
    # A table of its own, row by row the labelled one: what is not in it cannot be learnt from by mistake.
    people = _people(root, annotations, images, num_keypoints, cache, keypoints="withheld", reading=reading)
    chosen = np.flatnonzero(_labelled(labelled.rows))[places]
    sides = boxes_of(people.rows)[chosen, 2:].min(axis=1, initial=np.inf)
    return replace(people, rows=people.rows.select(chosen[sides >= min_side]))


def people_with_boxes(
    root: Path,
    annotations: str,
    images: str,
    num_keypoints: int,
    min_side: float,
    cache: Path,
    reading: Reading = PLAIN,
) -> People:
    """The people of a COCO JSON that have a box of at least `min_side` px and no labelled keypoint.

    Raises:
        UserError: the file is missing or is no COCO JSON.
    """
    people = _people(root, annotations, images, num_keypoints, cache, keypoints="optional", reading=reading)
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
    some = check == "auto" and len(people) > most_looked_at(people.annotations)
    rows = some_of(people.rows, DECODE_AT_MOST) if some else people.rows
    names = list(dict.fromkeys(rows["file_name"][:]))
    outside = [path for name in names if not shards.inside(path := people.root / name)]
    folders = {folder: listing(folder) for folder in {path.parent for path in outside}}
    for path in outside:
        if path.name not in folders[path.parent]:
            raise UserError(f"{_whose(people.sources or (people,), path)}: its picture {path} is not there")
    sizes = looks(people.root, names, decodes(check, len(names)))
    bad = [name for name, size in sizes.items() if size is None]
    if bad and on_bad_image == "stop":
        raise UserError(f"{people.root / bad[0]}: does not decode; mend it, or --data.on_bad_image skip")
    for name in bad:
        print(f"skipped: {people.root / name} does not decode", flush=True)
    if not bad:
        return people
    kept = np.flatnonzero(~np.isin(np.array(people.rows["file_name"][:]), bad))
    num_skipped = len(people) - len(kept)
    if not len(kept):
        files = dict.fromkeys(str(source.annotations) for source in people.sources or (people,))
        raise UserError(f"{' and '.join(files)}: nobody is left: none of its {len(names)} pictures decodes")
    return replace(people, rows=people.rows.select(kept), num_skipped=num_skipped)


def most_looked_at(annotations: Path) -> int:
    """Of more people auto looks at some. Shards are whole if their ends are there: few of their pictures will do."""
    return DECODE_AT_MOST if shards.is_manifest(annotations) else LOOK_AT_ALL


def some_of(rows: Dataset, number: int) -> Dataset:
    """Up to so many rows, evenly spread: checks of a large set take the time of a small one."""
    if len(rows) <= number:
        return rows
    return rows.select(np.linspace(0, len(rows) - 1, number).astype(int))


class Picture(NamedTuple):
    """A decoded picture. One of its pixels stands for reduction x reduction of the file's, and lies amid them."""

    pixels: UInt8[Array, "h w 3"]
    reduction: int


def read_image(path: Path) -> UInt8[Array, "h w 3"]:
    """An RGB picture, turned as its EXIF data says.

    Raises:
        UserError: the file does not decode.
    """
    return read_picture(path).pixels


def read_picture(path: Path, at_most: int = 1) -> Picture:
    """`read_image`, smaller where that decodes sooner.

    Args:
        at_most: the largest reduction that may be made, 1, 2, 4 or 8.

    Raises:
        UserError: the file does not decode.
    """
    try:
        content = shards.content(path)
    except OSError:
        content = b""
    reduction = at_most if at_most > 1 and _reducible(content, at_most) else 1
    pixels = _decoded(content, REDUCED[reduction])
    if pixels is None:
        raise UserError(f"{path}: does not decode; mend it, or run with --data.check_images decode")
    return Picture(pixels, reduction)


def _decoded(content: shards.Bytes, size: int) -> UInt8[Array, "h w 3"] | None:
    image = _imdecode(content, size | (RGB or cv2.IMREAD_COLOR))
    return image if image is None or RGB is not None else cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def _imdecode(content: shards.Bytes, how: int) -> Array | None:
    try:
        return cv2.imdecode(np.frombuffer(content, np.uint8), how) if content else None
    except cv2.error:  # of more pixels than OpenCV may read; before 5.0 it returned None
        return None


def _reducible(content: shards.Bytes, reduction: int) -> bool:
    """Whether the decoder itself reduces the picture, and its pixels then lie amid those that they stand for.

    That holds for JPEG, counted from the corner where the file begins. EXIF may have the picture turned round
    afterwards: if the sides are no multiples of the reduction, that corner's opposite would be taken for it.
    """
    at, may_turn = 2, False
    while content[:2] == b"\xff\xd8" and at + 9 <= len(content) and content[at] == 0xFF:
        marker = content[at + 1]
        if marker in JPEG_START_OF_FRAME:
            sides = int.from_bytes(content[at + 5 : at + 7], "big"), int.from_bytes(content[at + 7 : at + 9], "big")
            return not may_turn or all(side % reduction == 0 for side in sides)
        may_turn |= marker == JPEG_APP1 and content[at + 4 : at + 8] == b"Exif"
        at += 2 + int.from_bytes(content[at + 2 : at + 4], "big")
    return False


class Rows:
    """Rows one at a time, lists as float64 arrays that lie where the table does: a row by `Dataset` costs 0.5 ms."""

    def __init__(self, rows: Dataset) -> None:
        self.rows = rows
        batches = rows.data.to_batches()
        self.ends = np.cumsum([batch.num_rows for batch in batches]).tolist()
        self.batches = [
            {name: _values(batch.column(name), feature) for name, feature in rows.features.items()} for batch in batches
        ]
        # What `select` has chosen; the table itself is never copied.
        self.places = None if rows._indices is None else rows._indices.column(0).to_numpy()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.rows,)  # a process that is not forked opens the table itself

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        place = index if self.places is None else int(self.places[index])
        number = bisect_right(self.ends, place)
        place -= self.ends[number - 1] if number else 0
        return {name: _value(values[place]) for name, values in self.batches[number].items()}


def _values(column: Any, feature: Any) -> Any:
    """Views of an Arrow column's numbers: [rows, *shape] for lists."""
    if isinstance(feature, Array2D):
        return column.storage.flatten().flatten().to_numpy().reshape(-1, *feature.shape)
    return column.flatten().to_numpy().reshape(len(column), -1) if isinstance(feature, List) else column


def _value(value: Any) -> Any:
    return value if isinstance(value, np.ndarray) else value.as_py()


def whole_image(path: Path) -> Array | None:
    """The picture as `read_image` has it; None if it is cut short or does not decode."""
    return _decoded(_content(path), REDUCED[1]) if _whole(path) else None


def decoded(path: Path, how: int) -> Array | None:
    """What OpenCV makes of a picture, BGR; None if it does not decode, is larger than OpenCV may read, or is no file.

    Args:
        how: cv2.IMREAD_COLOR (grey, 16 bits, alpha and CMYK become 8-bit colours) or one of its reduced sizes.
    """
    return _imdecode(_content(path), how)


def _content(path: Path) -> shards.Bytes:
    """A picture's bytes; none of what cannot be read."""
    try:
        return shards.content(path) if shards.inside(path) or is_file(path) else b""
    except OSError:
        return b""


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
    """A column as one array of its own, of numbers or of text."""
    if not len(rows):
        return np.zeros((0, *shape))
    # Out of Arrow itself: `datasets` makes an object of every person's array, 0.5 ms each.
    table: Any = rows.select_columns([name]).with_format("arrow")[:]
    chunks = (table.combine_chunks() if table.column(name).num_chunks > len(rows) // 100 else table).column(name).chunks
    values = []
    for chunk in chunks:
        array = chunk.storage if isinstance(chunk, pa.ExtensionArray) else chunk
        while pa.types.is_nested(array.type):
            array = array.flatten()
        values.append(array.to_numpy(zero_copy_only=False))
    return np.concatenate(values).reshape(len(rows), *shape)


def _labelled(rows: Dataset) -> Bool[Array, "n"]:
    beside = [Path(file["filename"]).with_name(LABELLED) for file in rows.cache_files]
    if beside and beside[0].is_file():
        return np.load(beside[0])
    return np.asarray((keypoints_of(rows)[..., 2] > 0).any(axis=-1))


def _people(
    root: Path,
    annotations: str,
    images: str,
    num_keypoints: int,
    cache: Path,
    keypoints: Literal["needed", "optional", "withheld"] = "needed",
    reading: Reading = PLAIN,
) -> People:
    file = annotation_file(root, annotations)
    if shards.is_manifest(file):
        rows = _shard_table(file, images, num_keypoints, cache, keypoints, reading)
        return People(rows=rows, root=root, annotations=file, reading=reading)
    how = [] if reading == PLAIN else [repr(reading)]
    try:
        digest = _digest(file.read_bytes(), keypoints, images, *how)
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    source = {"annotations": str(file), "images": images, "keypoints": keypoints, "reading": reading}
    rows = _table(_coco_rows, digest, num_keypoints, cache, **source)
    return People(rows=rows, root=root, annotations=file, reading=reading)


def annotation_file(root: Path, annotations: str) -> Path:
    """The JSON's path.

    Raises:
        UserError: there is none.
    """
    file = root / annotations
    if not file.is_file():
        raise UserError(f"{file}: no such annotation file; see --data.root and --data.*_annotations")
    return file


def _digest(content: bytes, *more: str) -> str:
    return hashlib.sha256(b"\0".join([content, *(word.encode() for word in more)])).hexdigest()[:32]


def _table(rows: Any, digest: str, num_keypoints: int, cache: Path, **source: Any) -> Dataset:
    """The Arrow table of a generator, made once for each content: a moved or touched file makes no second one."""
    folder = cache / "people" / f"{digest}-k{num_keypoints}-v{SCHEMA_VERSION}"
    if not (folder / "dataset_info.json").is_file():
        found, features = list(rows(num_keypoints=num_keypoints, **source)), features_of(num_keypoints)
        if not found:  # `datasets` cannot read a table of nobody again
            return Dataset.from_dict({name: [] for name in features}, features=features)
        _save_atomically(Dataset.from_list(found, features=features), folder)
    return Dataset.load_from_disk(str(folder))


def _shard_table(file: Path, images: str, num_keypoints: int, cache: Path, keypoints: str, reading: Reading) -> Dataset:
    """The same table of a manifest's people, written some thousand pictures at a time: memory does not grow with it."""
    how = [] if reading == PLAIN else [repr(reading)]
    digest = _digest(shards.read(file).digest.encode(), keypoints, images, *how)
    folder = cache / "people" / f"{digest}-k{num_keypoints}-v{SCHEMA_VERSION}"
    if not (folder / ORDER).is_file():
        temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
        temporary.mkdir(parents=True)
        try:
            _write_shard_table(temporary, file, images, num_keypoints, keypoints, reading)
            _rename(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    order = np.load(folder / ORDER)
    if not (folder / PEOPLE).is_file():
        features = features_of(num_keypoints)
        return Dataset.from_dict({name: [] for name in features}, features=features)
    rows = Dataset.from_file(str(folder / PEOPLE))
    return rows.select(order) if len(order) else rows


def _write_shard_table(
    folder: Path, file: Path, images: str, num_keypoints: int, keypoints: str, reading: Reading
) -> None:
    places, labelled = [np.empty(0, np.int64)], [np.empty(0, bool)]
    features = features_of(num_keypoints)
    with ArrowWriter(features=features, path=str(folder / PEOPLE)) as writer:
        for people in roster.chunks(file, images, num_keypoints, reading):
            withheld = replace(people, keypoints=people.keypoints * 0) if keypoints == "withheld" else people
            writer.write_table(withheld.table(features.arrow_schema))
            places.append(people.place)
            labelled.append(withheld.labelled)
        writer.finalize()
    place, seen = np.concatenate(places), np.concatenate(labelled)
    if not len(place):  # `datasets` cannot read a table of nobody again
        (folder / PEOPLE).unlink(missing_ok=True)
    order = np.argsort(place, kind="stable")
    np.save(folder / LABELLED, seen[order])
    np.save(folder / ORDER, np.empty(0, int) if (order[1:] > order[:-1]).all() else order)


def _save_atomically(table: Dataset, folder: Path) -> None:
    # A name for this process only: another one may be writing the same table.
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    table.save_to_disk(str(temporary))
    _rename(temporary, folder)


def _rename(temporary: Path, folder: Path) -> None:
    try:
        temporary.rename(folder)
    except OSError:  # the other one was first
        shutil.rmtree(temporary)


def features_of(num_keypoints: int) -> Features:
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


def _coco_rows(
    num_keypoints: int, annotations: str, images: str, keypoints: str, reading: Reading
) -> Iterator[dict[str, Any]]:
    path = Path(annotations)
    tree = read_json(path)
    names = picture_names(tree, path)
    if keypoints != "optional" and not any("keypoints" in person for person in tree["annotations"]):
        raise UserError(f"{path}: no annotation has 'keypoints'; expected a COCO person_keypoints file")
    kinds = category_ids(tree, reading)
    for person in tree["annotations"]:
        if kinds and isinstance(person, dict) and person.get("category_id", kinds[0]) not in kinds:
            continue
        try:
            row = row_of(person, names, images, num_keypoints, reading)
        except BROKEN as error:
            who = person.get("id") if isinstance(person, dict) else person
            reason = f"{type(error).__name__}: {error}"
            raise UserError(f"{path}: annotation {shown(who)}: {' '.join(reason.split())[:200]}") from None
        if row:
            yield row | {"keypoints": np.zeros((num_keypoints, 3))} if keypoints == "withheld" else row


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


def shown(value: Any) -> str:
    """A value from a JSON, short and in one line."""
    return repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:60]}..."


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
        if not shards.inside(path) and not is_file(path):
            return False
        with shards.opened(path) as file:
            head = file.read(8)
            file.seek(max(0, file.seek(0, os.SEEK_END) - 64))
            tail = file.read()
    except OSError:
        return False
    if head[:2] == b"\xff\xd8":
        # Cameras append data of their own, so the end need not be the last thing in the file.
        return JPEG_END in tail or JPEG_END in _jpeg_scan(bytes(shards.content(path)))
    return b"IEND" in tail if head == b"\x89PNG\r\n\x1a\n" else len(head) == 8


def _jpeg_scan(content: bytes) -> bytes:
    """What follows the headers: they may hold a thumbnail with an end of its own. Segments are marker, length, data."""
    at = 2
    while at + 4 <= len(content) and content[at] == 0xFF and content[at + 1] != JPEG_START_OF_SCAN:
        at += 2 + int.from_bytes(content[at + 2 : at + 4], "big")
    return content[at:]
