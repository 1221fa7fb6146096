"""Images in shards: a manifest names the files of a split, and images and people are read out of them in place.

A manifest is a small JSON, SPLIT.shards. An image of it is named as if the manifest were a folder,
SPLIT.shards/RECORD/FILE_NAME, so that whatever takes an image's path takes these, too. The files are Arrow
(memory-mapped), tar (read by offset), or parquet (a row group at a time, also from another machine).
"""

import bisect
import json
import mmap
import os
import re
import tarfile
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

import cv2
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sapiens_accel.config import credentials
from sapiens_accel.errors import UserError
from sapiens_accel.hub.errors import explain, hide_token
from sapiens_accel.sources import columns, schema
from sapiens_accel.sources.coco import BROKEN
from sapiens_accel.sources.columns import ColumnMapping
from sapiens_accel.sources.schema import Fault, Span

SUFFIX = ".shards"
CATEGORIES = "categories.json"  # the same beside tar shards
METADATA = b"sapiens_accel"  # key of the categories in a shard's schema, as JSON
GROUP = 100  # images read together where files do not say which
CACHED_BYTES = 512 << 20  # row groups of images that one process keeps
INSIDE = re.compile(rf"(.*{re.escape(SUFFIX)})/(\d+)/.*", re.DOTALL)
Kind = Literal["arrow", "tar", "parquet"]
Bytes = bytes | memoryview | mmap.mmap
# Of images: what this OpenCV reads, which is what it writes.
SUFFIXES = tuple(
    suffix
    for suffix in (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".jp2", ".avif", ".jpe", ".dib",
                   ".ppm", ".pgm", ".pbm", ".pnm")
    if cv2.haveImageWriter(f"image{suffix}")
)  # fmt: skip
INDEX = pa.schema(
    [
        *((name, pa.int64()) for name in ("file", "offset", "size", "image_id", "width", "height")),
        ("file_name", pa.string()),
        ("people", pa.list_(schema.PERSON)),
    ]
)


@dataclass(frozen=True)
class Manifest:
    """The files of a split.

    Attributes:
        files: paths, or for parquet also addresses that fsspec opens.
        rows: for each file the images of each of its parts: row groups of parquet; else one part is the file.
        categories: COCO's, with the names and edges of keypoints.
        index: for tar, the Arrow file of its records.
        digest: of names, sizes and times of the files that were given.
        columns: a ColumnMapping's fields, where the files' columns are not those of the image table.
        origin: what messages name: the first file that was given, of which `files` may be a copy.
    """

    kind: Kind
    files: list[str]
    rows: list[list[int]]
    categories: list[dict[str, Any]]
    digest: str
    index: str | None = None
    columns: dict[str, Any] | None = None
    origin: str = ""

    def __len__(self) -> int:
        return self.starts[-1]

    @cached_property
    def parts(self) -> list[tuple[int, int]]:
        """(file, part in it), in order."""
        return [(file, part) for file, counts in enumerate(self.rows) for part in range(len(counts))]

    @cached_property
    def starts(self) -> list[int]:
        """The first record of each part, and the number of all."""
        return np.cumsum([0, *(count for counts in self.rows for count in counts)]).tolist()

    @cached_property
    def mapping(self) -> ColumnMapping | None:
        return ColumnMapping(**self.columns) if self.columns else None

    def columns_for(self, columns: Sequence[str], present: Sequence[str]) -> list[str]:
        """The files' columns that hold these of the image table, as far as they have them."""
        if self.mapping:
            return self.mapping.columns_for(list(columns), list(present))
        return [name for name in columns if name in present]

    def to_image_table(self, table: pa.Table) -> pa.Table:
        """A table of the files' columns as the image table.

        Raises:
            UserError: as `columns.to_image_table`.
        """
        try:
            return columns.to_image_table(table, self.mapping) if self.mapping else table
        except (UserError, pa.ArrowException, TypeError, ValueError) as error:
            raise UserError(f"{self.origin}: {one_line(error)}") from None

    def part_of(self, record: int) -> int:
        return bisect.bisect_right(self.starts, record, hi=len(self.parts)) - 1


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def write_manifest(manifest: Manifest, path: Path) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(asdict(manifest)))
    temporary.replace(path)


@lru_cache(maxsize=16)
def read_manifest(path: Path) -> Manifest:
    return Manifest(**json.loads(path.read_text()))


# ---- Images


def find_record(path: Path) -> tuple[Path, int] | None:
    """The manifest and the number of an image in shards; None for the path of a file."""
    name = str(path)
    match = INSIDE.fullmatch(name) if SUFFIX in name else None
    return (Path(match[1]), int(match[2])) if match else None


def read_record(path: Path, record: int) -> Bytes:
    """The bytes of an image of a manifest; those in Arrow files are not copied.

    Raises:
        UserError: there are none.
    """
    manifest = read_manifest(path)
    part = manifest.part_of(record)
    row = record - manifest.starts[part]
    if manifest.kind == "tar":
        return _read_tar(manifest, record)
    table = _cached_row_group(path, part) if manifest.kind == "parquet" else mapped(manifest.files[part])
    image = table.column(manifest.mapping.columns["image"] if manifest.mapping else "image")[row]
    value = image["bytes"] if pa.types.is_struct(image.type) else image
    if not value.is_valid:
        raise UserError(f"{path}: image {record}: no bytes in its row; expected the image itself in column 'image'")
    return memoryview(value.as_buffer()).cast("B")  # pyarrow counts bytes from -128


def _read_tar(manifest: Manifest, record: int) -> bytes:
    row = mapped(str(manifest.index)).slice(record, 1)
    file, offset, size = (row.column(name)[0].as_py() for name in ("file", "offset", "size"))
    # pread: processes that were forked share a handle's position, not its file.
    return os.pread(_handle(manifest.files[file], os.getpid()), size, offset)


@lru_cache(maxsize=256)
def _handle(file: str, _: int) -> int:
    return os.open(file, os.O_RDONLY)


@lru_cache(maxsize=1024)
def mapped(file: str) -> pa.Table:
    """An Arrow file, memory-mapped."""
    return _open_arrow(file).read_all()


def _open_arrow(file: str) -> Any:
    source = pa.memory_map(file)
    try:
        return pa.ipc.open_stream(source)
    except pa.ArrowInvalid:
        return pa.ipc.open_file(source)


# ---- Row groups, also from another machine


_cached: OrderedDict[tuple[Path, int], pa.Table] = OrderedDict()


def _cached_row_group(manifest: Path, part: int) -> pa.Table:
    """All columns of a row group; those used last are kept, up to CACHED_BYTES."""
    key = (manifest, part)
    if key not in _cached:
        file, group = read_manifest(manifest).parts[part]
        _cached[key] = _read_row_group(read_manifest(manifest).files[file], group)
        while sum(table.nbytes for table in _cached.values()) > CACHED_BYTES and len(_cached) > 1:
            _cached.popitem(last=False)
    _cached.move_to_end(key)
    return _cached[key]


def _read_row_group(file: str, number: int, columns: list[str] | None = None) -> pa.Table:
    try:
        return open_parquet(file).read_row_group(number, columns=columns)
    except Exception as error:  # of the file, of the network, of whatever client reads the address
        reason = hide_token(explain(error, file))
        raise UserError(f"{file}: row group {number} cannot be read: {reason}") from None


def open_parquet(file: str) -> pq.ParquetFile:
    """A parquet file, by its path or address; every process and thread has a handle of its own."""
    return _open_parquet(file, os.getpid(), threading.get_ident())


@lru_cache(maxsize=64)
def _open_parquet(file: str, *_: int) -> pq.ParquetFile:
    if "://" not in file:
        return pq.ParquetFile(file)
    system, path = fsspec.core.url_to_fs(credentials.put_back(file))
    # Of what is asked for, all at once and nothing else: to read ahead is to fetch images where people are counted.
    return pq.ParquetFile(system.open(path, "rb", cache_type="none"), pre_buffer=True)


def _column_names(file: str) -> list[str]:
    return open_parquet(file).schema_arrow.names


# ---- The source


@dataclass(frozen=True)
class ShardedSource:
    """The split that a manifest stands for."""

    file: Path
    max_looked_at: int = 5000  # shards are whole if their ends are there: few of their images will do

    @property
    def manifest(self) -> Manifest:
        return read_manifest(self.file)

    @property
    def digest(self) -> str:
        return self.manifest.digest

    @property
    def categories(self) -> list[dict[str, Any]]:
        return self.manifest.categories

    def images(self) -> list[dict[str, Any]]:
        """COCO's `images`; file_name is the name within the manifest."""
        images: list[dict[str, Any]] = []
        for table in self.tables(("image_id", "file_name", "width", "height")):
            for row in table.to_pylist() if table.num_columns else [{}] * table.num_rows:
                record, image_id = len(images), row.get("image_id")
                name = f"{record}/{row.get('file_name') or record}"
                sizes = {key: row[key] for key in ("width", "height", "given_id") if row.get(key)}
                images.append({"id": record if image_id is None else image_id, "file_name": name, **sizes})
        return images

    def read(self, collect: list[Fault] | None = None) -> dict[str, Any]:
        """COCO's lists that the rows were, or would be: annotations in their first order."""
        images, people = self.images(), []
        ids = (image["id"] for image in images)
        for table in self.tables(("image_id", "people")):
            lists = table.column("people").to_pylist() if "people" in table.column_names else [[]] * table.num_rows
            for several, image_id in zip(lists, ids, strict=False):
                people += [{**person, "image_id": image_id} for person in several or ()]
        positions = [person.pop("place", None) for person in people]
        if all(position is not None for position in positions):
            people = [people[index] for index in np.argsort(positions, kind="stable")]
        annotations = [schema.person_to_annotation(person, index) for index, person in enumerate(people)]
        return {"images": images, "annotations": annotations, "categories": self.categories}

    def some_annotations(self) -> list[dict[str, Any]]:
        """Those of the first images in which anybody has keypoints: a file of its own is of one kind."""
        for table in self.tables(("people",)):
            if "people" in table.column_names:
                people = [person for several in table.column("people").to_pylist() for person in several or ()]
                if any(person.get("keypoints") for person in people):
                    return people
        return []

    def tables(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        """
        Raises:
            UserError: a file cannot be read.
        """
        try:
            yield from self._read_tables(columns)
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{self.manifest.origin} or one beside it: {hide_token(one_line(error))}") from None

    def _read_tables(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        manifest = self.manifest
        if manifest.kind == "parquet":
            for file in manifest.files:
                present = manifest.columns_for(columns, _column_names(file))
                for batch in open_parquet(file).iter_batches(columns=present):
                    yield manifest.to_image_table(pa.Table.from_batches([batch]))
            return
        for file in [manifest.index] if manifest.index else manifest.files:
            for batch in _record_batches(str(file)):
                present = manifest.columns_for(columns, batch.schema.names)
                yield manifest.to_image_table(pa.Table.from_batches([batch]).select(present))

    def groups(self) -> list[Span]:
        """Row groups of parquet, else GROUP images."""
        manifest, spans = self.manifest, []
        for (file, part), first in zip(manifest.parts, manifest.starts, strict=False):
            num = manifest.rows[file][part]
            step = max(num, 1) if manifest.kind == "parquet" else GROUP
            spans += [Span(first + at, min(step, num - at), file) for at in range(0, num, step)]
        return spans

    def read_group(self, first: int, count: int, columns: Sequence[str] | None = None) -> pa.Table:
        manifest = self.manifest
        part = manifest.part_of(first)
        if manifest.kind == "parquet" and columns is None:
            return manifest.to_image_table(_cached_row_group(self.file, part))
        if manifest.kind == "parquet":
            file, number = manifest.parts[part]
            present = manifest.columns_for(columns or (), _column_names(manifest.files[file]))
            return manifest.to_image_table(_read_row_group(manifest.files[file], number, present))
        if manifest.index:
            return mapped(manifest.index).slice(first, count)
        return manifest.to_image_table(mapped(manifest.files[part]).slice(first - manifest.starts[part], count))


def _record_batches(file: str) -> Iterator[pa.RecordBatch]:
    reader = _open_arrow(file)
    if hasattr(reader, "read_next_batch"):
        yield from reader
    else:
        yield from map(reader.get_batch, range(reader.num_record_batches))


# ---- Tar


def index_tar(name: str, number: int) -> pa.Table:
    """Where each image of a tar is, and what its JSON says; reading it goes over the whole file, once.

    Raises:
        UserError: no tar, or compressed; a JSON without an image, or of other content.
    """
    members: dict[str, dict[str, Any]] = {}
    try:
        with tarfile.open(name, "r:") as tar:
            for member in tar:
                key, ending = _split_key(member.name)
                if member.isfile() and ending in SUFFIXES:
                    span = {"file": number, "offset": member.offset_data, "size": member.size}
                    members.setdefault(key, {}).update(span, member=member.name)
                elif member.isfile() and ending == ".json":
                    content = tar.extractfile(member)
                    members.setdefault(key, {})["json"] = content.read() if content else b""
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"{name}: no uncompressed tar that can be read: {one_line(error)}") from None
    if not _has_end(Path(name)):
        raise UserError(f"{name}: cut off: it lacks the 512 zero bytes that a tar ends with; copy or write it again")
    rows = [_index_row(name, key, row) for key, row in members.items()]
    return pa.Table.from_pylist(rows, schema=INDEX)


def _has_end(path: Path) -> bool:
    """Whether a tar has its end: one that is cut between two members reads as a shorter one."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 512))
        return file.read() == bytes(512)


def _split_key(member: str) -> tuple[str, str]:
    """WebDataset's: the key ends at the first dot of the last part."""
    folder, _, base = member.rpartition("/")
    key, _, ending = base.partition(".")
    return f"{folder}/{key}", f".{ending.lower()}"


def _index_row(name: str, key: str, row: dict[str, Any]) -> dict[str, Any]:
    if "offset" not in row:
        raise UserError(f"{name}: {key}.json has no image {key}.jpg beside it")
    try:
        tree = json.loads(row.get("json", "{}"))
        annotations = tree.get("people", tree.get("annotations")) or []
        people = [schema.annotation_to_person(one, one.get("place")) for one in annotations]
        image = {key: tree.get(key) for key in ("image_id", "file_name", "width", "height")}
        image["file_name"] = image["file_name"] or row["member"].rpartition("/")[2]
        pa.Table.from_pylist([image | {"people": people}], schema=INDEX)
    except (*BROKEN, RecursionError, pa.ArrowException) as error:
        raise UserError(f"{name}: {key}.json: {one_line(error)}") from None
    return {**{name: row[name] for name in ("file", "offset", "size")}, **image, "people": people}
