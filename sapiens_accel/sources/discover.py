"""What --data.root may be: a folder in COCO's form, or one, here or on the Hub, of parquet, Arrow or tar shards.

The names of shards say their split: train, val or validation, unlabeled. For each split a manifest (`shards`) is
written to the cache, and from then on named in place of the COCO JSON and of the folder of images.
"""

import dataclasses
import hashlib
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import datasets
import fsspec
import pyarrow as pa
from tqdm import tqdm

from sapiens_accel.config import credentials
from sapiens_accel.config.schema import DataConfig
from sapiens_accel.errors import UserError
from sapiens_accel.hub import download
from sapiens_accel.hub.errors import explain, hide_token
from sapiens_accel.sources import shards
from sapiens_accel.sources.coco import CocoFile, load_json, show_value
from sapiens_accel.sources.columns import ColumnMapping, infer_mapping, read_categories, read_metadata
from sapiens_accel.sources.schema import Source
from sapiens_accel.sources.shards import Kind, Manifest

SPLITS = {
    "train": {"train", "training"},
    "val": {"val", "validation", "valid", "dev"},
    "unlabelled": {"unlabelled", "unlabeled"},
}
KINDS: dict[str, Kind] = {".parquet": "parquet", ".arrow": "arrow", ".tar": "tar"}
VERSION = 4  # of manifests, and of how their tables are read
READERS = 16  # files whose ends are read at a time: from another machine the time is latency


class ShardFile(NamedTuple):
    """A shard by its path or address, and what changes when it does."""

    name: str
    version: str


def find_folder(root: str, cache: Path, *, streaming: bool, columns: Mapping[str, str] | None = None) -> Path:
    """The folder that `DataConfig.root` stands for: the root itself where it is in COCO's form, else one of manifests.

    Args:
        streaming: parquet of train and unlabeled is read where it is, a row group at a time, never copied.
        columns: `DataConfig.columns`.

    Raises:
        UserError: no such root, no shards in it or of no split, a broken one; a root that cannot be streamed.
    """
    root = credentials.take(root)
    local = Path(root).expanduser()
    is_remote = "://" in root
    if not is_remote and (not local.is_dir() or any(local.glob(f"*{shards.SUFFIX}"))):
        return local
    files_of_split = _find_shards(root if is_remote else str(local), streaming=streaming)
    if not files_of_split:
        if is_remote or streaming:
            what = "streaming needs parquet, Arrow or tar shards; a folder in COCO's form has none, see README: Data"
            reason = f"--data.streaming true: {what}" if not is_remote else "no parquet, Arrow or tar shards in it"
            raise UserError(f"--data.root {root}: {reason}")
        return local
    digest = hashlib.sha256(repr((VERSION, files_of_split, streaming, columns)).encode()).hexdigest()[:16]
    name = re.sub(r"\W+", "_", root.rstrip("/").split("/")[-1])
    folder = cache / "sources" / f"{name}-{digest}"
    for split, files in files_of_split.items():
        if not (file := folder / f"{split}{shards.SUFFIX}").is_file():
            folder.mkdir(parents=True, exist_ok=True)
            in_place = streaming and split != "val"
            shards.write_manifest(_make_manifest(split, files, file, cache, in_place, columns or {}), file)
    return folder


def open_source(file: Path) -> Source:
    """The source that a file of annotations stands for: a COCO JSON or the manifest of shards."""
    return shards.ShardedSource(file) if file.suffix == shards.SUFFIX else CocoFile(file)


def name_files(config: DataConfig, root: Path) -> DataConfig:
    """The config with this root, and its manifests in place of COCO's files where it has them."""
    manifests = {split: f"{split}{shards.SUFFIX}" for split in SPLITS if (root / f"{split}{shards.SUFFIX}").is_file()}
    if manifests:  # what is missing is then a manifest
        manifests |= {split: f"{split}{shards.SUFFIX}" for split in ("train", "val")}
    fields = {f"{split}_{kind}": name for split, name in manifests.items() for kind in ("annotations", "images")}
    return dataclasses.replace(config, root=str(root), **fields)


def train_files(folder: Path, annotations: str, images: str) -> tuple[str, str]:
    """Absolute paths of a folder's training annotations and images: its manifest where it has one, else these of it."""
    manifest = folder / f"train{shards.SUFFIX}"
    files = (manifest, manifest) if manifest.is_file() else (folder / annotations, folder / images)
    return str(files[0]), str(files[1])


def _find_shards(root: str, *, streaming: bool) -> dict[str, list[ShardFile]]:
    """The shards of each split, by name."""
    listed, hub = root, download.parse_address(root)
    if hub and streaming:
        listed = download.pin_to_commit(root, hub)
    elif hub:
        listed = str(download.download_dataset(root, hub, tuple(KINDS)))
    files = list(_list_remote(root, listed) if "://" in listed else _list_local(Path(listed), deep=hub is not None))
    base = listed.rstrip("/") + "/"
    kinds = {PurePosixPath(file.name).suffix for file in files}
    if len(kinds) > 1:
        raise UserError(f"--data.root {root}: shards of several kinds, {' and '.join(sorted(kinds))}; expected one")
    files_of_split = {
        split: [file for file in files if words & _split_words(file.name.removeprefix(base))]
        for split, words in SPLITS.items()
    }
    if files and not files_of_split["train"] and not files_of_split["val"]:
        raise UserError(
            f"--data.root {root}: {len(files)} shards, the first {PurePosixPath(files[0].name).name}; expected 'train' "
            f"and 'val' or 'validation' in their names"
        )
    return {split: chosen for split, chosen in files_of_split.items() if chosen}


def _split_words(name: str) -> set[str]:
    return set(re.split(r"[^a-z]+", name.lower()))


def _list_local(root: Path, *, deep: bool) -> Iterator[ShardFile]:
    # Two levels, as the Hub's data/train-*.parquet: folders of hundreds of thousands of images are not walked.
    if (root / "annotations").is_dir():
        return
    depths = ("**/",) if deep else ("", "*/")
    for path in sorted(path for ending in KINDS for depth in depths for path in root.glob(f"{depth}*{ending}")):
        if not path.name.startswith("cache-"):
            stat = path.stat()
            yield ShardFile(str(path), f"{stat.st_size} {stat.st_mtime_ns}")


def _list_remote(root: str, listed: str) -> Iterator[ShardFile]:
    try:
        system, path = fsspec.core.url_to_fs(credentials.put_back(listed))
        files = system.find(path, detail=True)
    except Exception as error:
        raise UserError(f"--data.root {root}: {hide_token(explain(error, root))}") from None
    for name, details in sorted(files.items()):
        if name.endswith(tuple(KINDS)):
            address = credentials.take(system.unstrip_protocol(name))
            version = [details.get(key) for key in ("size", "blob_id", "ETag", "etag", "LastModified", "mtime")]
            # Many a web server says nothing but a size: then only the address tells two files of one name apart.
            yield ShardFile(address, repr(version if any(version[1:]) else [*version, address]))


# ---- Manifests


def _make_manifest(
    split: str, files: Sequence[ShardFile], path: Path, cache: Path, in_place: bool, columns: Mapping[str, str]
) -> Manifest:
    versions = [(Path(file.name).name, file.version) for file in files]
    digest = hashlib.sha256(repr((VERSION, versions, sorted(columns.items()))).encode()).hexdigest()[:32]
    names = [file.name for file in files]
    origin = names[0]
    kind: Kind = KINDS[PurePosixPath(names[0]).suffix]
    if kind == "tar":
        index, rows = path.with_suffix(".index.arrow"), []
        with pa.OSFile(str(index), "wb") as sink, pa.ipc.new_stream(sink, shards.INDEX) as writer:
            for number, name in enumerate(tqdm(names, desc="reading tar shards", disable=None, leave=False)):
                table = shards.index_tar(name, number)
                writer.write_table(table)
                rows.append([table.num_rows])
        categories = _categories_beside(names[0], split)
        return Manifest(kind, names, rows, categories, digest, str(index), origin=origin)
    with ThreadPoolExecutor(READERS) as pool:
        progress = tqdm(pool.map(partial(_inspect, kind=kind), names), total=len(names), desc="reading shards",
                        disable=None, leave=False)  # fmt: skip
        inspected = list(progress)
    schemas = {name: one.schema for name, one in zip(names, inspected, strict=True)}
    mapping = _common_mapping(schemas, columns, labeled=split != "unlabelled")
    categories = _own_categories(inspected[0].schema) or read_categories(inspected[0].schema, mapping)
    theirs = None if mapping.is_ours else dataclasses.asdict(mapping)
    if kind == "parquet" and not in_place:
        names, kind = (
            _convert_to_arrow(split, [download.download_file(name) for name in names], cache),
            "arrow",
        )
        return Manifest(
            kind, names, [[_count_rows(name)] for name in names], categories, digest, columns=theirs, origin=origin
        )
    return Manifest(kind, names, [one.rows for one in inspected], categories, digest, columns=theirs, origin=origin)


class Inspected(NamedTuple):
    """A shard's schema, and the images of each of its parts."""

    schema: pa.Schema
    rows: list[int]


def _inspect(name: str, kind: Kind) -> Inspected:
    """Read the schema and the row counts of a shard.

    Raises:
        UserError: it cannot be read.
    """
    try:
        if kind == "parquet":
            file = shards.open_parquet(name)
            parts = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
            return Inspected(file.schema_arrow, parts)
        return Inspected(shards.mapped(name).schema, [_count_rows(name)])
    except Exception as error:
        reason = hide_token(shards.one_line(error))
        raise UserError(f"{name}: no {kind} file that can be read: {reason}") from None


def _common_mapping(schemas: Mapping[str, pa.Schema], columns: Mapping[str, str], *, labeled: bool) -> ColumnMapping:
    mappings = {name: infer_mapping(schema, columns, name, labeled=labeled) for name, schema in schemas.items()}
    first = next(iter(schemas))
    if odd := next((name for name, one in mappings.items() if one != mappings[first]), None):
        raise UserError(f"{odd}: its columns are not those of {first}; expected shards of one kind")
    return mappings[first]


def _own_categories(schema: pa.Schema) -> list[dict[str, Any]]:
    content = read_metadata(schema, shards.METADATA).get("categories")
    return [one for one in content if isinstance(one, dict)] if isinstance(content, list) else []


def _categories_beside(name: str, split: str) -> list[dict[str, Any]]:
    """Those of the split in categories.json, which `convert` writes above the tar shards."""
    file = Path(name).parent.parent / shards.CATEGORIES
    every = load_json(file) if file.is_file() else []
    if not isinstance(every, list) or not all(isinstance(one, dict) for one in every):
        raise UserError(f"{file}: expected a list of categories with their split, found {show_value(every)}")
    return [{k: v for k, v in one.items() if k != "split"} for one in every if str(one.get("split")) in SPLITS[split]]


def _count_rows(name: str) -> int:
    return shards.mapped(name).num_rows


def _convert_to_arrow(split: str, names: list[str], cache: Path) -> list[str]:
    """Parquet as Arrow files that can be memory-mapped, by `datasets` and in a cache of ours."""
    try:
        with _copy_if_credentials_needed(names, cache) as copies:
            rows = datasets.load_dataset(
                "parquet", data_files={split: copies}, split=split, cache_dir=str(cache / "datasets")
            )
    except Exception as error:
        cause = error.__cause__ or error
        raise UserError(f"{Path(names[0]).parent}: {split} shards cannot be read: {shards.one_line(cause)}") from None
    return [file["filename"] for file in rows.cache_files]


@contextmanager
def _copy_if_credentials_needed(names: list[str], cache: Path) -> Iterator[list[str]]:
    """The files, or copies of those that need credentials: `datasets` writes what it opens to its cache."""
    with ExitStack() as stack:
        copies = []
        for number, name in enumerate(names):
            if (address := credentials.put_back(name)) != name:
                folder = Path(stack.enter_context(TemporaryDirectory(dir=cache)))
                name = str(folder / f"{number:05d}.parquet")
                with fsspec.open(address, "rb") as source, Path(name).open("wb") as copy:
                    shutil.copyfileobj(source, copy, 1 << 24)  # pyright: ignore[reportArgumentType]
            copies.append(name)
        yield copies
