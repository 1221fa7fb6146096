"""Images in shards: a manifest names the files of a split, and images and people are read out of them in place.

A manifest is a small JSON, SPLIT.shards. An image of it is named as if the manifest were a folder,
SPLIT.shards/RECORD/FILE_NAME, so that whatever takes an image's path takes these, too. The files are Arrow
(memory-mapped), tar (read by offset), or parquet (a row group at a time, also from another machine).
"""

import bisect
import io
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
from typing import Any, BinaryIO, Literal

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sapiens_accel.errors import UserError
from sapiens_accel.hub.errors import why, without_token
from sapiens_accel.sources import columns as layout
from sapiens_accel.sources import schema
from sapiens_accel.sources.columns import Layout

SUFFIX = ".shards"
CATEGORIES = "categories.json"  # the same beside tar shards
METADATA = b"sapiens_accel"  # key of the categories in a shard's schema, as JSON
GROUP = 100  # images read together where files do not say which
HELD_BYTES = 512 << 20  # row groups of images that one process keeps
INSIDE = re.compile(rf"(.*{re.escape(SUFFIX)})/(\d+)/.*", re.DOTALL)
LISTS = ("bbox", "keypoints", "foot_kpts", "face_kpts", "lefthand_kpts", "righthand_kpts")
Kind = Literal["arrow", "tar", "parquet"]
Bytes = bytes | memoryview | mmap.mmap
PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
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
        columns: a Layout's fields, where the files' columns are not ours.
    """

    kind: Kind
    files: list[str]
    rows: list[list[int]]
    categories: list[dict[str, Any]]
    digest: str
    index: str | None = None
    columns: dict[str, Any] | None = None

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
    def layout(self) -> Layout | None:
        return Layout(**self.columns) if self.columns else None

    def needed(self, columns: Sequence[str], there: Sequence[str]) -> list[str]:
        """The files' columns that hold these of ours, as far as they have them."""
        if self.layout:
            return self.layout.needed(list(columns), list(there))
        return [name for name in columns if name in there]

    def ours(self, table: pa.Table) -> pa.Table:
        """A table of the files' columns by our names.

        Raises:
            UserError: as `layout.ours`.
        """
        try:
            return layout.ours(table, self.layout) if self.layout else table
        except UserError as error:
            raise UserError(f"{self.files[0]}: {error}") from None

    def part_of(self, record: int) -> int:
        return bisect.bisect_right(self.starts, record, hi=len(self.parts)) - 1


def write(manifest: Manifest, path: Path) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(asdict(manifest)))
    temporary.replace(path)


@lru_cache(maxsize=16)
def read(path: Path) -> Manifest:
    return Manifest(**json.loads(path.read_text()))


def is_manifest(path: Path) -> bool:
    return path.suffix == SUFFIX


def inside(path: Path) -> bool:
    """Whether a path is of an image in shards."""
    return INSIDE.fullmatch(str(path)) is not None


# ---- Images


def content(path: Path) -> Bytes:
    """An image file's bytes, wherever it is; those in Arrow files are not copied."""
    found = INSIDE.fullmatch(str(path))
    if found is None:
        return path.read_bytes()
    manifest, record = read(Path(found[1])), int(found[2])
    part = manifest.part_of(record)
    row = record - manifest.starts[part]
    if manifest.kind == "tar":
        return _in_tar(manifest, record)
    table = _group(Path(found[1]), part) if manifest.kind == "parquet" else mapped(manifest.files[part])
    image = table.column(manifest.layout.columns["image"] if manifest.layout else "image")[row]
    value = image["bytes"] if pa.types.is_struct(image.type) else image
    if not value.is_valid:
        raise UserError(f"{path}: no bytes in its row; expected the image itself in column 'image'")
    return memoryview(value.as_buffer()).cast("B")  # pyarrow counts bytes from -128


def opened(path: Path) -> BinaryIO:
    """An image file for reading, wherever it is."""
    return io.BytesIO(content(path)) if inside(path) else path.open("rb")


def size_of(path: Path) -> int:
    return len(content(path)) if inside(path) else path.stat().st_size


def _in_tar(manifest: Manifest, record: int) -> bytes:
    row = mapped(str(manifest.index)).slice(record, 1)
    place = {name: row.column(name)[0].as_py() for name in ("file", "offset", "size")}
    # pread: processes that were forked share a handle's position, not its file.
    return os.pread(_handle(manifest.files[place["file"]], os.getpid()), place["size"], place["offset"])


@lru_cache(maxsize=256)
def _handle(file: str, _: int) -> int:
    return os.open(file, os.O_RDONLY)


@lru_cache(maxsize=1024)
def mapped(file: str) -> pa.Table:
    """An Arrow file, memory-mapped."""
    return _reader(file).read_all()


def _reader(file: str) -> Any:
    source = pa.memory_map(file)
    try:
        return pa.ipc.open_stream(source)
    except pa.ArrowInvalid:
        return pa.ipc.open_file(source)


# ---- Row groups, also from another machine


_held: OrderedDict[tuple[Path, int], pa.Table] = OrderedDict()


def _group(manifest: Path, part: int) -> pa.Table:
    """All columns of a row group; those used last are kept, up to HELD_BYTES."""
    key = (manifest, part)
    if key not in _held:
        file, group = read(manifest).parts[part]
        name = read(manifest).files[file]
        _held[key] = _row_group(name, group)
        while sum(table.nbytes for table in _held.values()) > HELD_BYTES and len(_held) > 1:
            _held.popitem(last=False)
    _held.move_to_end(key)
    return _held[key]


def _row_group(file: str, number: int, columns: list[str] | None = None) -> pa.Table:
    try:
        return parquet(file).read_row_group(number, columns=columns)
    except Exception as error:  # of the file, of the network, of whatever client reads the address
        reason = without_token(why(error, file))
        raise UserError(f"{file}: row group {number} cannot be read: {reason}") from None


def parquet(file: str) -> pq.ParquetFile:
    """A parquet file, by its path or address; every process and thread has a handle of its own."""
    return _parquet(file, os.getpid(), threading.get_ident())


@lru_cache(maxsize=64)
def _parquet(file: str, *_: int) -> pq.ParquetFile:
    if "://" not in file:
        return pq.ParquetFile(file)
    system, path = fsspec.core.url_to_fs(file)
    # Of what is asked for, all at once and nothing else: to read ahead is to fetch images where people are counted.
    return pq.ParquetFile(system.open(path, "rb", cache_type="none"), pre_buffer=True)


def groups(manifest: Manifest) -> list[tuple[int, int]]:
    """First record and number of records of what is read together: row groups of parquet, else GROUP images."""
    spans = zip(manifest.starts, (count for counts in manifest.rows for count in counts), strict=False)
    if manifest.kind == "parquet":
        return list(spans)
    return [(first + at, min(GROUP, count - at)) for first, count in spans for at in range(0, count, GROUP)]


def group(path: Path, first: int, count: int, columns: Sequence[str] | None = None) -> pa.Table:
    """One of the manifest's groups: all columns, or what it has of these."""
    manifest = read(path)
    part = manifest.part_of(first)
    if manifest.kind == "parquet" and columns is None:
        return manifest.ours(_group(path, part))
    if manifest.kind == "parquet":
        file, number = manifest.parts[part]
        present = manifest.needed(columns or (), _names_in(manifest.files[file]))
        return manifest.ours(_row_group(manifest.files[file], number, present))
    if manifest.index:
        return mapped(manifest.index).slice(first, count)
    return manifest.ours(mapped(manifest.files[part]).slice(first - manifest.starts[part], count))


def _names_in(file: str) -> list[str]:
    return parquet(file).schema_arrow.names


# ---- What is known of the images, without their bytes


def records(manifest: Manifest, columns: Sequence[str]) -> Iterator[pa.Table]:
    """These columns of all images, as far as the files have them, some thousand images at a time."""
    if manifest.kind == "parquet":
        for file in manifest.files:
            for batch in parquet(file).iter_batches(columns=manifest.needed(columns, _names_in(file))):
                yield manifest.ours(pa.Table.from_batches([batch]))
        return
    for file in [manifest.index] if manifest.index else manifest.files:
        reader = _reader(str(file))
        several = (
            reader if hasattr(reader, "read_next_batch") else map(reader.get_batch, range(reader.num_record_batches))
        )
        for batch in several:
            yield manifest.ours(pa.Table.from_batches([batch]).select(manifest.needed(columns, batch.schema.names)))


def pictures(path: Path) -> list[dict[str, Any]]:
    """The manifest's images as COCO's `images`; file_name is the name within the manifest."""
    found, record = [], 0
    for table in records(read(path), ("image_id", "file_name", "width", "height")):
        for row in table.to_pylist() if table.num_columns else [{}] * table.num_rows:
            sizes = {key: row[key] for key in ("width", "height") if row.get(key)}
            found.append(
                {"id": number(row, "image_id", record), "file_name": f"{record}/{_name(row, record)}", **sizes}
            )
            record += 1
    return found


def number(row: dict[str, Any], key: str, default: int) -> int:
    value = row.get(key)
    return default if value is None else value


def _name(row: dict[str, Any], record: int) -> str:
    return row.get("file_name") or str(record)


def tree(path: Path) -> dict[str, Any]:
    """The COCO JSON that the manifest's rows were, or would be: annotations in their first order."""
    placed, manifest = [], read(path)
    images = pictures(path)
    ids = iter(images)
    for table in records(manifest, ("image_id", "people")):
        present = "people" in table.column_names
        for people in table.column("people").to_pylist() if present else [[]] * table.num_rows:
            image_id = next(ids)["id"]
            placed += [{**person, "image_id": image_id} for person in people or ()]
    places = [person.pop("place", None) for person in placed]
    if all(place is not None for place in places):
        placed = [placed[index] for index in np.argsort(places, kind="stable")]
    annotations = [_annotation(person, index) for index, person in enumerate(placed)]
    return {"images": images, "annotations": annotations, "categories": manifest.categories}


def _annotation(person: dict[str, Any], index: int) -> dict[str, Any]:
    """What was not there is not there again."""
    kept = {key: value for key, value in person.items() if value is not None and not (key in LISTS and not value)}
    return {"id": index, **kept}


def index_of(name: str, number: int) -> pa.Table:
    """Where each image of a tar is, and what its JSON says; reading it goes over the whole file, once.

    Raises:
        UserError: no tar, or compressed; a JSON without an image, or of other content.
    """
    found: dict[str, dict[str, Any]] = {}
    try:
        with tarfile.open(name, "r:") as tar:
            for member in tar:
                key, ending = _key(member.name)
                if member.isfile() and ending in PICTURES:
                    place = {"file": number, "offset": member.offset_data, "size": member.size}
                    found.setdefault(key, {}).update(place, picture=member.name)
                elif member.isfile() and ending == ".json":
                    content = tar.extractfile(member)
                    found.setdefault(key, {})["json"] = content.read() if content else b""
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"{name}: no uncompressed tar that can be read: {' '.join(str(error).split())[:300]}") from None
    if not _ends(Path(name)):
        raise UserError(f"{name}: cut off: it lacks the 512 zero bytes that a tar ends with; copy or write it again")
    rows = [_indexed(name, key, row) for key, row in found.items()]
    return pa.Table.from_pylist(rows, schema=INDEX)


def _ends(path: Path) -> bool:
    """Whether a tar has its end: one that is cut between two members reads as a shorter one."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 512))
        return file.read() == bytes(512)


def _key(member: str) -> tuple[str, str]:
    """WebDataset's: the key ends at the first dot of the last part."""
    folder, _, base = member.rpartition("/")
    key, _, ending = base.partition(".")
    return f"{folder}/{key}", f".{ending.lower()}"


def _indexed(name: str, key: str, row: dict[str, Any]) -> dict[str, Any]:
    if "offset" not in row:
        raise UserError(f"{name}: {key}.json has no image {key}.jpg beside it")
    try:
        told = json.loads(row.get("json", "{}"))
        people = told.get("people", told.get("annotations")) or []
        marked = [schema.person(one, one.get("place")) for one in people]
        about = {key: told.get(key) for key in ("image_id", "file_name", "width", "height")}
        about["file_name"] = about["file_name"] or row["picture"].rpartition("/")[2]
        pa.Table.from_pylist([about | {"people": marked}], schema=INDEX)
    except (ValueError, TypeError, AttributeError, pa.ArrowException) as error:
        raise UserError(f"{name}: {key}.json: {' '.join(str(error).split())[:300]}") from None
    return {**{name: row[name] for name in ("file", "offset", "size")}, **about, "people": marked}
