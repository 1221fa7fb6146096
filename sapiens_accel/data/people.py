"""Sources of annotated images to Hugging Face `datasets` rows, one per person.

Labeled and unlabeled people share one schema; a person without a single v > 0 is unlabeled. The table is Arrow,
memory-mapped, cached by the content of its source; images are referenced by name and never copied.
"""

import hashlib
import json
import os
import shutil
import sys
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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

from sapiens_accel.data import annotation_rules
from sapiens_accel.data.annotation_rules import PeopleColumns, PeopleReader
from sapiens_accel.errors import UserError
from sapiens_accel.pose.person_boxes import (
    ANNOTATED,
    FROM_KEYPOINTS,
    GUESSED_SIDE,
    NO_BOX,
    WHOLE_IMAGE,
    PeopleSizes,
    measure_sizes,
)
from sapiens_accel.sources import images
from sapiens_accel.sources.coco import HASHED_BIT, find_image_fault, show_value
from sapiens_accel.sources.discover import open_source
from sapiens_accel.sources.foreign import suggest_conversion
from sapiens_accel.sources.schema import PLAIN, Reading, Source

if not sys.stderr.isatty():
    datasets.disable_progress_bars()

SCHEMA_VERSION = 8
MEASURED = 20_000  # people, evenly spread, whose sizes are measured
EIGHTH = 8  # `images.check_images` gives sizes to this many px
MOST_OF_OTHER_SIZE = 0.25  # of the images: with more of them labels and images do not belong together
DECODE_AT_MOST = 5000  # images; of people above the source's `max_looked_at`, the check auto looks at so many
# The files of a table of people: rows, which are labeled, where boxes are from, and their order where it is another.
PEOPLE, LABELED, BOXES, ORDER = "people.arrow", "labelled.npy", "boxes.npy", "order.npy"
LEFT_OUT = "left_out.json"  # how many annotations are not in it, by cause


@dataclass(frozen=True, kw_only=True)
class People:
    """Rows of people and the folder that their images are in.

    A row: file_name (relative to root), image_id, ann_id, box_xywh [4] and keypoints [K, 3] (x, y, v) in image px, area
    in px^2, box_area in px^2 (see `PeopleBoxes.areas`), size_wh [2] of the image (0 where it is not known).

    Attributes:
        annotations: the file that the rows came from, or the folder of whole images.
        num_skipped: people left out because their image does not decode.
        left_out: which annotations are not among them, and why, in a line; empty if all are.
        parts: what `join_people` joined: a message about a broken image names its own file of annotations.
        reading: how the file was read; evaluation reads it in the same way.
        box_note: of boxes that are not the annotated ones, in a line: how many, and how they were made; may be empty.
        size_note: of images of another size than their file says, in a line; may be empty.
    """

    rows: Dataset
    root: Path
    annotations: Path
    num_skipped: int = 0
    left_out: str = ""
    parts: tuple["People", ...] = ()
    reading: Reading = PLAIN
    box_note: str = ""
    size_note: str = ""

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def source(self) -> Source:
        return open_source(self.annotations)


@dataclass(frozen=True)
class PeopleFiles:
    """Where the people of a set are, and what is read of them.

    Attributes:
        annotations, images: the file of annotations and the folder of its images, relative to `root`.
        cache: the folder of tables.
    """

    root: Path
    annotations: str
    images: str
    num_keypoints: int
    cache: Path
    reading: Reading = PLAIN

    def read(self, keypoints: Literal["needed", "optional", "withheld"] = "needed") -> People:
        """Everybody in the file.

        Args:
            keypoints: needed: a JSON that has none at all is refused; withheld: all of them are 0.

        Raises:
            UserError: the file is missing, or there is an annotation in it against the rules.
        """
        file = annotation_file(self.root, self.annotations)
        source = open_source(file)
        rows, left_out = _people_table(self, source, keypoints)
        is_labeled = _read_labeled(rows)
        counts = left_out | {annotation_rules.NO_LABEL: int((~is_labeled).sum())}
        why = annotation_rules.describe_left_out(counts, source, self.reading)
        count = f"{sum(counts.values())} of its {len(rows) + sum(left_out.values())} annotations"
        line = f"{file}: {count} are left out of the labeled people: {why}" if why else ""
        unboxed = left_out.get(annotation_rules.NO_SIZE, 0)
        note = f"warning: {file}: {unboxed} annotations without a box of a width and a height are left out"
        return People(
            rows=rows, root=self.root, annotations=file, reading=self.reading, left_out=line,
            box_note=note if unboxed and keypoints == "optional" else "",
        )  # fmt: skip


def labeled_people(
    root: Path, annotations: str, images: str, num_keypoints: int, cache: Path, reading: Reading = PLAIN
) -> People:
    """The people with at least one labeled keypoint; crowds are left out.

    Args:
        annotations, images: the file of annotations and the folder of its images, relative to `root`.

    Raises:
        UserError: the file is missing, has no keypoints, or no such person.
    """
    people = PeopleFiles(root, annotations, images, num_keypoints, cache, reading).read()
    labeled = np.flatnonzero(_read_labeled(people.rows))
    if not len(labeled):
        raise UserError(
            (people.left_out and f"{people.left_out}; nobody is left")
            or f"{people.annotations}: no annotation in it; expected labeled people with 'keypoints', as in COCO's "
            "person_keypoints files"
        )
    origins = _read_beside(people.rows, BOXES)
    note = describe_boxes(np.bincount(origins[labeled], minlength=NO_BOX), people.annotations, reading)
    chosen = select_people(people, labeled)
    shared = len(chosen) - len(set(chosen.rows["file_name"][:])) if reading.boxes == "image" else 0
    if shared:
        note = (
            f"warning: {note}; {shared} of {len(chosen)} people share their image with another one: the network cannot "
        )
        note += "tell which of them is meant"
    return replace(chosen, box_note=note)


def describe_boxes(counts: Int[Array, "origins"], annotations: Path, reading: Reading) -> str:
    """A line about the boxes that are not the annotated ones; empty if there are none.

    Args:
        counts: of the people, by where their boxes are from: ANNOTATED, FROM_KEYPOINTS, ...
    """
    num, guessed, whole = counts.sum(), counts[GUESSED_SIDE], counts[WHOLE_IMAGE]
    if reading.boxes == "image":
        return f"{annotations}: boxes are whole images (--data.boxes image)"
    made = num - counts[ANNOTATED]
    if not made:
        return ""
    larger = f"{reading.box_margin:.0%} larger on each side (--data.box_margin {reading.box_margin:g})"
    if reading.boxes == "keypoints":
        line = f"{annotations}: boxes are made from the keypoints (--data.boxes keypoints), {larger}"
    else:
        line = f"warning: {annotations}: {made} of {num} people have no box with a width and a height: it is made from "
        line += f"their keypoints, {larger}"
    if guessed:
        line += f"; {guessed} with one keypoint or keypoints in a line: the missing side is the other people's median"
    if whole:
        line += f"; {whole} with one keypoint, and nobody has a box: it is the whole image (see --data.boxes image)"
    return line


def select_people(people: People, chosen: Int[Array, "n"]) -> People:
    """The people of these indices, ascending; all of them are taken as they are, whatever their number."""
    return people if len(chosen) == len(people) else replace(people, rows=people.rows.select(chosen))


def order_by_image(people: People, folder: str) -> Int[Array, "n"]:
    """The people's indices in the order of the source's images, and in that of its annotations within an image."""
    names = [f"{folder}/{image['file_name']}" for image in people.source.images()]
    index_of = {name: index for index, name in reversed(list(enumerate(names)))}
    return np.argsort([index_of[name] for name in people.rows["file_name"][:]], kind="stable")


def withheld_people(train: People, folder: str, indices: Int[Array, "n"], min_side: float, cache: Path) -> People:
    """The people of these indices of `labeled_people`, with boxes of at least `min_side` px and all keypoints zero.

    Their boxes are annotated ones, or whole images by `--data.boxes image`: a box around keypoints would show what is
    withheld. Those without one are left out, with a note.

    Args:
        train: the labeled people.

    Raises:
        UserError: as `labeled_people`.
    """
    files = files_of(train, folder, cache)
    # A table of its own, row by row the labeled one: what is not in it cannot be learned from by mistake.
    everybody = files.read("needed")
    if files.reading.boxes == "keypoints":
        files = replace(files, reading=replace(files.reading, boxes="annotation"))
    people = files.read("withheld")
    ids = np.array(everybody.rows["ann_id"][:])[np.flatnonzero(_read_labeled(everybody.rows))[indices]]
    index_of = {number: index for index, number in enumerate(people.rows["ann_id"][:])}
    chosen = np.array([index_of[number] for number in ids.tolist()], np.int64)
    sides = boxes_of(people.rows)[chosen, 2:].min(axis=1, initial=np.inf)
    without = int((sides == 0).sum())
    note = f"{train.annotations}: {without} people with withheld labels are left out: no box of theirs is annotated"
    num_small = int(((sides > 0) & (sides < min_side)).sum())
    return replace(
        people, rows=people.rows.select(chosen[(sides > 0) & (sides >= min_side)]), annotations=train.annotations,
        box_note=note if without else "",
        left_out=_describe_small(train.annotations, num_small, len(sides), "people with withheld labels", min_side),
    )  # fmt: skip


def unlabeled_people(files: PeopleFiles, min_side: float) -> People:
    """The people who have a box of at least `min_side` px and no labeled keypoint.

    Raises:
        UserError: the file is missing or is no COCO JSON.
    """
    people = files.read("optional")
    is_large = boxes_of(people.rows)[:, 2:].min(axis=1, initial=np.inf) >= min_side
    is_unlabeled = ~_read_labeled(people.rows)
    num, chosen = int(is_unlabeled.sum()), np.flatnonzero(is_unlabeled & is_large)
    line = _describe_small(people.annotations, num - len(chosen), num, "people without labels", min_side)
    return replace(people, rows=people.rows.select(chosen), left_out=line)  # what was read is of the labeled ones


def _describe_small(file: Path, num_small: int, num: int, of_whom: str, min_side: float) -> str:
    """How many people are not learned from as too small, in a line; empty if all are large enough."""
    return f"{file}: {num_small} of its {num} {of_whom} are left out: {too_small(min_side)}" if num_small else ""


def too_small(min_side: float) -> str:
    """Why an unlabeled box is left out, with the option that says so."""
    return f"with a side below {min_side:g} px (--data.unlabelled_min_side)"


def files_of(people: People, folder: str, cache: Path) -> PeopleFiles:
    """What these people were read from."""
    # A relative root must not be put before the annotations' path a second time.
    annotations, num_keypoints = str(people.annotations.absolute()), people.rows.features["keypoints"].shape[0]
    return PeopleFiles(people.root, annotations, folder, num_keypoints, cache, people.reading)


def whole_images(root: Path, folder: str, num_keypoints: int, cache: Path) -> People:
    """Every image of a folder as one unlabeled person, whose box is the image.

    Raises:
        UserError: the folder holds no image.
    """
    path = root / folder
    names = list_image_names(path)
    if not names:
        raise UserError(f"{path}: no images ({', '.join(images.IMAGE_SUFFIXES)}) in it")
    # A link to nothing is named by `check_people`, like any other image that does not decode.
    stats = [(file if file.exists() else path).stat() for file in (path / name for name in names)]
    content = [f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in zip(names, stats, strict=True)]
    digest = digest_of("\n".join(content).encode(), str(path))
    rows, _ = cached_table(
        lambda _: _whole_image_rows(path, folder, names, num_keypoints), digest, num_keypoints, cache
    )
    return People(rows=rows, root=root, annotations=path)


def join_people(parts: Sequence[People]) -> People:
    """The people of several sources of one root."""
    rows = concatenate_datasets([people.rows for people in parts])
    return replace(parts[0], rows=rows, parts=tuple(parts))


def decodes(check: Literal["auto", "ends", "decode"], num_images: int) -> bool:
    """Whether so many images are decoded to check them."""
    return check == "decode" or (check == "auto" and num_images <= DECODE_AT_MOST)


def check_people(
    people: People, on_bad_image: Literal["stop", "skip"], check: Literal["auto", "ends", "decode"]
) -> People:
    """The same people once every image is known to be there and to decode.

    Raises:
        UserError: an image that is not there, whatever `on_bad_image` says; a corrupt one, unless it says skip; more
            than MOST_OF_OTHER_SIZE of those that are decoded have another size than the file says.
    """
    is_sample = check == "auto" and len(people) > people.source.max_looked_at
    rows = spread_rows(people.rows, DECODE_AT_MOST) if is_sample else people.rows
    names = list(dict.fromkeys(rows["file_name"][:]))
    for name in images.find_missing(people.root, names)[:1]:
        path = people.root / name
        first = _first_annotation(people.parts or (people,), path)
        raise UserError(f"{first}: its image {path} is not there{images.suggest_image(people.root, name)}")
    results = images.check_images(people.root, names, decodes(check, len(names)))
    bad = {name: result for name, result in results.items() if isinstance(result, str)}
    for name, reason in bad.items():
        if on_bad_image == "stop":
            raise UserError(f"{people.root / name}: {reason}; mend it, or --data.on_bad_image skip")
        print(f"skipped: {people.root / name} {reason}", flush=True)
    if wrong := find_other_sizes(_read_known_sizes(rows), results):
        people = replace(people, size_note=_describe_other_sizes(people, wrong, len(names) - len(bad)))
    if not bad:
        return people
    good = np.flatnonzero(~np.isin(np.array(people.rows["file_name"][:]), list(bad)))
    num_skipped = len(people) - len(good)
    if not len(good):
        files = dict.fromkeys(str(part.annotations) for part in people.parts or (people,))
        raise UserError(f"{' and '.join(files)}: nobody is left: none of its {len(names)} images can be used")
    return replace(people, rows=people.rows.select(good), num_skipped=num_skipped)


def find_other_sizes(
    sizes_wh: Mapping[str, tuple[float, float]], results: Mapping[str, tuple[int, int] | str]
) -> dict[str, tuple[str, ...]]:
    """Images that have another size when read than their file says: what is wrong, with each image that it is about.

    Args:
        sizes_wh: what the file says, of those of whom it does.
        results: of `images.check_images`.
    """
    turned, other = [], []
    for name, hw in results.items():
        if isinstance(hw, str) or not any(hw) or name not in sizes_wh:
            continue
        (width, height), (seen_h, seen_w) = sizes_wh[name], (EIGHTH * side for side in hw)
        if abs(seen_w - width) >= EIGHTH or abs(seen_h - height) >= EIGHTH:
            is_turned = abs(seen_w - height) < EIGHTH and abs(seen_h - width) < EIGHTH
            culprit = f"{name}: {width:g} x {height:g} in the JSON, about {seen_w} x {seen_h} as read"
            (turned if is_turned else other).append(culprit)
    texts = {
        f"{len(turned)} images lie on their side when read: by their EXIF data (were they labeled so?), or width and "
        "height are exchanged in the JSON": tuple(turned),
        f"{len(other)} images have another size than the JSON says": tuple(other),
    }
    return {text: culprits for text, culprits in texts.items() if culprits}


def _read_known_sizes(rows: Dataset) -> dict[str, tuple[float, float]]:
    """The width and height of each image by its name, of those of which the file says them."""
    sizes = column_of(rows, "size_wh", (2,)).tolist()
    return {name: (w, h) for name, (w, h) in zip(rows["file_name"][:], sizes, strict=True) if w > 0 and h > 0}


def _describe_other_sizes(people: People, wrong: Mapping[str, tuple[str, ...]], num_images: int) -> str:
    """A line about a few of them.

    Raises:
        UserError: they are more than a few.
    """
    files = " and ".join(dict.fromkeys(str(part.annotations) for part in people.parts or (people,)))
    what = "; ".join(f"{text} ({culprits[0]})" for text, culprits in wrong.items())
    line = (
        f"{files}: of {num_images} images {what}. Keypoints and boxes are in pixels of the image as it is read: take "
    )
    line += "the images that were labeled, or scale the labels, and write 'width' and 'height' as read"
    if sum(map(len, wrong.values())) > MOST_OF_OTHER_SIZE * num_images:
        raise UserError(line)
    return f"warning: {line}"


def spread_rows(rows: Dataset, number: int) -> Dataset:
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
        self.indices = None if rows._indices is None else rows._indices.column(0).to_numpy()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.rows,)  # a process that is not forked opens the table itself

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = index if self.indices is None else int(self.indices[index])
        number = bisect_right(self.ends, row)
        row -= self.ends[number - 1] if number else 0
        return {name: _value(values[row]) for name, values in self.batches[number].items()}


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


def sizes_of(rows: Dataset) -> Float[Array, "n 2"]:
    """The width and height of each person's image, as its file says; not a number where it does not."""
    sizes = column_of(rows, "size_wh", (2,))
    return np.where(sizes > 0, sizes, np.nan)


def measure_people(parts: Sequence[People]) -> PeopleSizes | None:
    """How large these people are in their images, by MEASURED of each part; None: no image's size is known."""
    rows = [spread_rows(people.rows, MEASURED) for people in parts]
    boxes, sizes = (np.concatenate([of(some) for some in rows]) for of in (boxes_of, sizes_of))
    return measure_sizes(boxes, sizes)


def read_given_ids(people: People, ann_ids: Int[Array, "n"]) -> Shaped[Array, "n"]:
    """Ids of annotations as their files write them, as objects. These are read again where one may be a text."""
    return _as_written(people, ann_ids, lambda source: source.read()["annotations"])


def read_given_image_ids(people: People, image_ids: Int[Array, "n"]) -> Shaped[Array, "n"]:
    """As `read_given_ids`, of images."""
    return _as_written(people, image_ids, lambda source: source.images())


def _as_written(people: People, ids: Int[Array, "n"], items: Callable[[Source], Iterable[Any]]) -> Shaped[Array, "n"]:
    given = ids.astype(object)
    if not (ids >> HASHED_BIT == 1).any():
        return given
    several = (items(part.source) for part in people.parts or (people,))
    listed = (one for each in several for one in each if isinstance(one, dict) and "given_id" in one)
    texts = {one.get("id"): one["given_id"] for one in listed}
    return np.array([texts.get(number, number) for number in given], object)


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


def _read_labeled(rows: Dataset) -> Bool[Array, "n"]:
    return _read_beside(rows, LABELED).astype(bool)


def _read_beside(rows: Dataset, name: str) -> Shaped[Array, "n"]:
    """A column that lies beside the table of these rows, all of it."""
    return np.load(Path(rows.cache_files[0]["filename"]).with_name(name)) if len(rows) else np.zeros(0, np.int64)


def annotation_file(root: Path, annotations: str) -> Path:
    """The JSON's path.

    Raises:
        UserError: there is none.
    """
    file = root / annotations
    if not file.is_file():
        raise UserError(
            f"{file}: no such annotation file; see --data.root and --data.*_annotations{suggest_conversion(root)}"
        )
    return file


def digest_of(content: bytes, *more: str) -> str:
    return hashlib.sha256(b"\0".join([content, *(word.encode() for word in more)])).hexdigest()[:32]


def cached_table(
    rows: Callable[[Counter[str]], Iterator[dict[str, Any]]], digest: str, num_keypoints: int, cache: Path
) -> tuple[Dataset, dict[str, int]]:
    """The table of a generator of rows, made once for each digest, and what it left out.

    Args:
        rows: counts what it leaves out, by cause.
    """

    def chunks() -> Iterator[PeopleColumns]:
        left_out: Counter[str] = Counter()
        people = PeopleColumns.of_rows(list(rows(left_out)), num_keypoints)
        yield replace(people, left_out=left_out)

    folder = _cached_chunks(chunks, digest, num_keypoints, cache)
    return _open_table(folder, num_keypoints), json.loads((folder / LEFT_OUT).read_text())


def _people_table(files: PeopleFiles, source: Source, keypoints: str) -> tuple[Dataset, dict[str, int]]:
    """A table made once for each content, and who is not in it: a moved or touched JSON makes no second one."""
    options = [] if files.reading == PLAIN else [repr(files.reading)]
    reader = PeopleReader(source=source, prefix=files.images, num_keypoints=files.num_keypoints, reading=files.reading)

    def chunks() -> Iterator[PeopleColumns]:
        for people in reader.chunks(needs_keypoints=keypoints != "optional"):
            yield _withhold(people) if keypoints == "withheld" else people

    kind = "withheld, boxes too" if keypoints == "withheld" else keypoints
    digest = digest_of(source.digest.encode(), kind, files.images, *options)
    folder = _cached_chunks(chunks, digest, files.num_keypoints, files.cache)
    return _open_table(folder, files.num_keypoints), json.loads((folder / LEFT_OUT).read_text())


def _withhold(people: PeopleColumns) -> PeopleColumns:
    """The same people without keypoints, and without the boxes that were made from them."""
    is_made = np.isin(people.box_origins, (FROM_KEYPOINTS, GUESSED_SIDE))
    boxes_xywh = np.where(is_made[:, None], 0.0, people.box_xywh)
    return replace(people, keypoints=people.keypoints * 0, box_xywh=boxes_xywh)


def _cached_chunks(chunks: Callable[[], Iterator[PeopleColumns]], digest: str, num_keypoints: int, cache: Path) -> Path:
    """The folder of a table. Written some thousand images at a time: memory does not grow with the number of people."""
    folder = cache / "people" / f"{digest}-k{num_keypoints}-v{SCHEMA_VERSION}"
    features = features_of(num_keypoints)
    if not (folder / ORDER).is_file():
        temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
        temporary.mkdir(parents=True)
        try:
            _write_table(temporary, chunks(), features)
            _rename(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _open_table(folder: Path, num_keypoints: int) -> Dataset:
    features = features_of(num_keypoints)
    order = np.load(folder / ORDER)
    if not (folder / PEOPLE).is_file():
        return Dataset.from_dict({name: [] for name in features}, features=features)
    rows = Dataset.from_file(str(folder / PEOPLE))
    return rows.select(order) if len(order) else rows


def _write_table(folder: Path, chunks: Iterator[PeopleColumns], features: Features) -> None:
    positions, labeled, origins = [np.empty(0, np.int64)], [np.empty(0, bool)], [np.empty(0, np.int64)]
    left_out: Counter[str] = Counter()
    with ArrowWriter(features=features, path=str(folder / PEOPLE)) as writer:
        for people in chunks:
            writer.write_table(people.table(features.arrow_schema))
            positions.append(people.position)
            labeled.append(people.labeled)
            left_out.update(people.left_out)
            origins.append(people.box_origins)
        writer.finalize()
    position = np.concatenate(positions)
    if not len(position):  # `datasets` cannot read a table of nobody again
        (folder / PEOPLE).unlink(missing_ok=True)
    order = np.argsort(position, kind="stable")
    (folder / LEFT_OUT).write_text(json.dumps(left_out))
    np.save(folder / LABELED, np.concatenate(labeled)[order])
    np.save(folder / BOXES, np.concatenate(origins)[order])
    np.save(folder / ORDER, np.empty(0, int) if (order[1:] > order[:-1]).all() else order)


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
            "box_area": Value("float64"),
            "size_wh": List(Value("float64"), length=2),
            "keypoints": Array2D((num_keypoints, 3), "float64"),
        }
    )


def _whole_image_rows(path: Path, folder: str, names: list[str], num_keypoints: int) -> Iterator[dict[str, Any]]:
    for index, name in enumerate(names):
        image = images.read_unchecked_image(path / name, cv2.IMREAD_COLOR)
        # Those that do not decode are named by `check_people`.
        height, width = (1, 1) if image is None else image.shape[:2]
        yield {
            "file_name": f"{folder}/{name}",
            "image_id": index,
            "ann_id": index,
            "box_xywh": [0.0, 0.0, float(width), float(height)],
            "area": float(width * height),
            "box_area": float(width * height),
            "keypoints": np.zeros((num_keypoints, 3)),
            "size_wh": (float(width), float(height)),
        }


def list_image_names(folder: Path) -> list[str]:
    """The images of a folder, by name.

    Raises:
        UserError: a name that is not UTF-8.
    """
    suffixes = images.IMAGE_SUFFIXES
    names = sorted(name for name in images.list_names(folder) if Path(name).suffix.lower() in suffixes)
    for name in names:
        if reason := find_image_fault({"id": 0, "file_name": name}):
            raise UserError(f"{folder}: {reason.removeprefix('id 0: ')}; rename it")
    return names


def _first_annotation(parts: Sequence[People], image: Path) -> str:
    """Names the first annotation of an image."""
    several = ((people, row) for people in parts for row in enumerate(people.rows["file_name"][:]))
    people, position = next((people, i) for people, (i, name) in several if people.root / name == image)
    (given,) = read_given_ids(people, np.array([people.rows[position]["ann_id"]]))
    return f"{people.annotations}: annotation {show_value(given)}"
