"""COCO keypoint JSON and image folders to Hugging Face `datasets` rows, one per person.

Labeled and unlabeled people share one schema; a person without a single v > 0 is unlabeled. The table is Arrow,
memory-mapped, cached by the content of the JSON; images are referenced by name and never copied.
"""

import hashlib
import os
import shutil
import sys
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import cv2
import datasets
import numpy as np
import pyarrow as pa
from datasets import Array2D, Dataset, Features, List, Value, concatenate_datasets
from datasets.arrow_writer import ArrowWriter
from jaxtyping import Bool, Float, Int, Shaped
from numpy import ndarray as Array

from sapiens_accel.data import annotation_rules as roster
from sapiens_accel.errors import UserError
from sapiens_accel.sources import coco as coco_json
from sapiens_accel.sources import images as photo
from sapiens_accel.sources import shards
from sapiens_accel.sources.schema import PLAIN, Reading

if not sys.stderr.isatty():
    datasets.disable_progress_bars()

SCHEMA_VERSION = 2
DECODE_AT_MOST = 5000
LOOK_AT_ALL = 1_000_000  # people; of more, auto looks at images of DECODE_AT_MOST, evenly spread
# The files of the table of people in shards: rows, which are labeled, and their order where it is another.
PEOPLE, LABELED, ORDER = "people.arrow", "labelled.npy", "order.npy"


@dataclass(frozen=True, kw_only=True)
class People:
    """Rows of people and the folder that their images are in.

    A row: file_name (relative to root), image_id, ann_id, box_xywh [4] and keypoints [K, 3] (x, y, v) in image px, area
    in px^2.

    Attributes:
        annotations: the JSON that the rows came from, or the folder of whole images.
        num_skipped: people left out because their image does not decode.
        sources: what `together` joined: a broken image is told with its own JSON.
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


def labeled_people(
    root: Path, annotations: str, images: str, num_keypoints: int, cache: Path, reading: Reading = PLAIN
) -> People:
    """The people of a COCO keypoint JSON with at least one labeled keypoint; crowds and empty boxes are left out.

    Args:
        annotations, images: the JSON and the folder of its images, relative to `root`.

    Raises:
        UserError: the file is missing, is no COCO keypoint JSON, or names no such person.
    """
    people = _people(root, (annotations, images), num_keypoints, cache, reading=reading)
    kept = np.flatnonzero(_labeled(people.rows))
    if not len(kept):
        raise UserError(f"{root / annotations}: none of its {len(people)} people has a labeled keypoint (v > 0)")
    return chosen_of(people, kept)


def chosen_of(people: People, chosen: Int[Array, "n"]) -> People:
    """These of the people, in this order, ascending; all of them are taken as they are, whatever their number."""
    return people if len(chosen) == len(people) else replace(people, rows=people.rows.select(chosen))


def by_picture(people: People, images: str) -> Int[Array, "n"]:
    """The people's indices in the order of the JSON's `images`, and in that of its annotations within an image."""
    listed = [f"{images}/{image['file_name']}" for image in coco_json.pictures_of(people.annotations)]
    places = {name: place for place, name in reversed(list(enumerate(listed)))}
    return np.argsort([places[name] for name in people.rows["file_name"][:]], kind="stable")


def withheld_people(train: People, images: str, places: Int[Array, "n"], min_side: float, cache: Path) -> People:
    """The people at these places of `labelled_people`, with boxes of at least `min_side` px and all keypoints zero.

    Args:
        train: the labeled people.

    Raises:
        UserError: as `labelled_people`.
    """
    labeled = _again(train, images, cache, "needed")
    # A table of its own, row by row the labeled one: what is not in it cannot be learned from by mistake.
    people = _again(train, images, cache, "withheld")
    chosen = np.flatnonzero(_labeled(labeled.rows))[places]
    sides = boxes_of(people.rows)[chosen, 2:].min(axis=1, initial=np.inf)
    return replace(people, rows=people.rows.select(chosen[sides >= min_side]))


def people_with_boxes(
    root: Path, annotations: str, images: str, num_keypoints: int, min_side: float, cache: Path
) -> People:
    """The people of a COCO JSON that have a box of at least `min_side` px and no labeled keypoint.

    Raises:
        UserError: the file is missing or is no COCO JSON.
    """
    return _with_boxes(_people(root, (annotations, images), num_keypoints, cache, keypoints="optional"), min_side)


def unlabeled_beside(train: People, images: str, min_side: float, cache: Path) -> People:
    """`people_with_boxes` of the file that the labeled people of training are from, read in the same way."""
    return _with_boxes(_again(train, images, cache, "optional"), min_side)


def _again(train: People, images: str, cache: Path, keypoints: Literal["needed", "optional", "withheld"]) -> People:
    """The file that these people are from, read in the same way."""
    # A relative root must not be put before the annotations' path a second time.
    files, num_keypoints = (str(train.annotations.absolute()), images), train.rows.features["keypoints"].shape[0]
    people = _people(train.root, files, num_keypoints, cache, keypoints, train.reading)
    return replace(people, annotations=train.annotations)


def _with_boxes(people: People, min_side: float) -> People:
    sides = boxes_of(people.rows)[:, 2:].min(axis=1, initial=np.inf)
    return replace(people, rows=people.rows.select(np.flatnonzero(~_labeled(people.rows) & (sides >= min_side))))


def whole_pictures(root: Path, images: str, num_keypoints: int, cache: Path) -> People:
    """Every image of a folder as one unlabeled person, whose box is the image.

    Raises:
        UserError: the folder holds no image.
    """
    folder = root / images
    names = image_names(folder)
    if not names:
        raise UserError(f"{folder}: no images ({', '.join(photo.PICTURES)}) in it")
    # A link to nothing is named by `checked`, like any other image that does not decode.
    stats = [(path if path.exists() else folder).stat() for path in (folder / name for name in names)]
    content = [f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in zip(names, stats, strict=True)]
    digest = digest_of("\n".join(content).encode(), str(folder))
    rows = cached_table(_whole_picture_rows, digest, num_keypoints, cache, root=str(root), images=images, names=names)
    return People(rows=rows, root=root, annotations=folder)


def together(several: Sequence[People]) -> People:
    """The people of several sources of one root."""
    rows = concatenate_datasets([people.rows for people in several])
    return replace(several[0], rows=rows, sources=tuple(several))


def decodes(check: Literal["auto", "ends", "decode"], num_pictures: int) -> bool:
    """Whether so many images are decoded to check them."""
    return check == "decode" or (check == "auto" and num_pictures <= DECODE_AT_MOST)


def checked(people: People, on_bad_image: Literal["stop", "skip"], check: Literal["auto", "ends", "decode"]) -> People:
    """The same people once every image is known to be there and to decode.

    Raises:
        UserError: an image that is not there, whatever `on_bad_image` says; a corrupt one, unless it says skip.
    """
    some = check == "auto" and len(people) > most_looked_at(people.annotations)
    rows = some_of(people.rows, DECODE_AT_MOST) if some else people.rows
    names = list(dict.fromkeys(rows["file_name"][:]))
    outside = [path for name in names if not shards.inside(path := people.root / name)]
    folders = {folder: photo.listing(folder) for folder in {path.parent for path in outside}}
    for path in outside:
        if path.name not in folders[path.parent]:
            raise UserError(f"{_whose(people.sources or (people,), path)}: its image {path} is not there")
    sizes = photo.looks(people.root, names, decodes(check, len(names)))
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
        raise UserError(f"{' and '.join(files)}: nobody is left: none of its {len(names)} images decodes")
    return replace(people, rows=people.rows.select(kept), num_skipped=num_skipped)


def most_looked_at(annotations: Path) -> int:
    """Of more people auto looks at some. Shards are whole if their ends are there: few of their images will do."""
    return DECODE_AT_MOST if shards.is_manifest(annotations) else LOOK_AT_ALL


def some_of(rows: Dataset, number: int) -> Dataset:
    """Up to so many rows, evenly spread: checks of a large set take the time of a small one."""
    if len(rows) <= number:
        return rows
    return rows.select(np.linspace(0, len(rows) - 1, number).astype(int))


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


def _labeled(rows: Dataset) -> Bool[Array, "n"]:
    beside = [Path(file["filename"]).with_name(LABELED) for file in rows.cache_files]
    if beside and beside[0].is_file():
        return np.load(beside[0])
    return np.asarray((keypoints_of(rows)[..., 2] > 0).any(axis=-1))


def _people(
    root: Path,
    files: tuple[str, str],
    num_keypoints: int,
    cache: Path,
    keypoints: Literal["needed", "optional", "withheld"] = "needed",
    reading: Reading = PLAIN,
) -> People:
    annotations, images = files
    file = annotation_file(root, annotations)
    if shards.is_manifest(file):
        rows = _shard_table(file, images, num_keypoints, cache, keypoints, reading)
        return People(rows=rows, root=root, annotations=file, reading=reading)
    how = [] if reading == PLAIN else [repr(reading)]
    try:
        digest = digest_of(file.read_bytes(), keypoints, images, *how)
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    source = {"annotations": str(file), "images": images, "keypoints": keypoints, "reading": reading}
    rows = cached_table(_coco_rows, digest, num_keypoints, cache, **source)
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


def digest_of(content: bytes, *more: str) -> str:
    return hashlib.sha256(b"\0".join([content, *(word.encode() for word in more)])).hexdigest()[:32]


def cached_table(rows: Any, digest: str, num_keypoints: int, cache: Path, **source: Any) -> Dataset:
    """The Arrow table of a generator, made once for each content: a moved or touched file makes no second one."""
    folder = cache / "people" / f"{digest}-k{num_keypoints}-v{SCHEMA_VERSION}"
    if not (folder / "dataset_info.json").is_file():
        found, features = list(rows(num_keypoints=num_keypoints, **source)), features_of(num_keypoints)
        if not found:  # `datasets` cannot read a table of nobody again
            return Dataset.from_dict({name: [] for name in features}, features=features)
        _save_atomically(Dataset.from_list(found, features=features), folder)
    return Dataset.load_from_disk(str(folder))


def _shard_table(file: Path, images: str, num_keypoints: int, cache: Path, keypoints: str, reading: Reading) -> Dataset:
    """The same table of a manifest's people, written some thousand images at a time: memory does not grow with it."""
    how = [] if reading == PLAIN else [repr(reading)]
    digest = digest_of(shards.read(file).digest.encode(), keypoints, images, *how)
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
    places, labeled = [np.empty(0, np.int64)], [np.empty(0, bool)]
    features = features_of(num_keypoints)
    with ArrowWriter(features=features, path=str(folder / PEOPLE)) as writer:
        for people in roster.chunks(file, images, num_keypoints, reading):
            withheld = replace(people, keypoints=people.keypoints * 0) if keypoints == "withheld" else people
            writer.write_table(withheld.table(features.arrow_schema))
            places.append(people.place)
            labeled.append(withheld.labeled)
        writer.finalize()
    place, seen = np.concatenate(places), np.concatenate(labeled)
    if not len(place):  # `datasets` cannot read a table of nobody again
        (folder / PEOPLE).unlink(missing_ok=True)
    order = np.argsort(place, kind="stable")
    np.save(folder / LABELED, seen[order])
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
    tree = coco_json.read_json(path)
    if keypoints != "optional" and not any("keypoints" in person for person in tree["annotations"]):
        raise UserError(f"{path}: no annotation has 'keypoints'; expected a COCO person_keypoints file")
    for row in roster.rows_of(tree, path, images, num_keypoints, reading):
        yield row | {"keypoints": np.zeros((num_keypoints, 3))} if keypoints == "withheld" else row


def _whole_picture_rows(num_keypoints: int, root: str, images: str, names: list[str]) -> Iterator[dict[str, Any]]:
    for index, name in enumerate(names):
        image = photo.decoded(Path(root) / images / name, cv2.IMREAD_COLOR)
        height, width = (1, 1) if image is None else image.shape[:2]  # `checked` names those that do not decode
        yield {
            "file_name": f"{images}/{name}",
            "image_id": index,
            "ann_id": index,
            "box_xywh": [0.0, 0.0, float(width), float(height)],
            "area": float(width * height),
            "keypoints": np.zeros((num_keypoints, 3)),
        }


def image_names(folder: Path) -> list[str]:
    """The images of a folder, by name.

    Raises:
        UserError: a name that is not UTF-8.
    """
    names = sorted(name for name in photo.listing(folder) if Path(name).suffix.lower() in photo.PICTURES)
    for name in names:
        if reason := coco_json.fault_of({"id": 0, "file_name": name}):
            raise UserError(f"{folder}: {reason.removeprefix('id 0: ')}; rename it")
    return names


def _whose(sources: Sequence[People], picture: Path) -> str:
    """The first annotation of an image."""
    several = ((people, row) for people in sources for row in enumerate(people.rows["file_name"][:]))
    people, place = next((people, i) for people, (i, name) in several if people.root / name == picture)
    return f"{people.annotations}: annotation {people.rows[place]['ann_id']}"
