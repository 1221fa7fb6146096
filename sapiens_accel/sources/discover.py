"""What --data.root may be: a folder in COCO's form, or one, here or on the Hub, of parquet, Arrow or tar shards.

Shards are told apart by their names: train, val or validation, unlabeled. Of each split a manifest (`shards`) is made
in the cache; from then on it stands for the COCO JSON and for the folder of images, for everything that reads them.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import datasets
import fsspec
import pyarrow as pa
from tqdm import tqdm

from sapiens_accel.config.schema import DataConfig
from sapiens_accel.errors import UserError
from sapiens_accel.hub import download
from sapiens_accel.hub.errors import why, without_token
from sapiens_accel.sources import columns as layout
from sapiens_accel.sources import shards
from sapiens_accel.sources.columns import Layout
from sapiens_accel.sources.shards import Kind, Manifest

SPLITS = {
    "train": {"train", "training"},
    "val": {"val", "validation", "valid", "dev"},
    "unlabelled": {"unlabelled", "unlabeled"},
}
KINDS: dict[str, Kind] = {".parquet": "parquet", ".arrow": "arrow", ".tar": "tar"}
VERSION = 2  # of manifests
READERS = 16  # files whose ends are read at a time: from another machine the time is latency


class File(NamedTuple):
    """A shard by its path or address, and what changes when it does."""

    name: str
    version: str


def folder(root: str, cache: Path, *, streaming: bool, columns: Mapping[str, str] | None = None) -> Path:
    """The folder that `DataConfig.root` stands for: the root itself where it is in COCO's form, else one of manifests.

    Args:
        streaming: parquet of train and unlabeled is read where it is, a row group at a time, never copied.
        columns: `DataConfig.columns`.

    Raises:
        UserError: no such root, no shards in it or of no split, a broken one; a root that cannot be streamed.
    """
    place = Path(root).expanduser()
    is_remote = "://" in root
    if not is_remote and (not place.is_dir() or any(place.glob(f"*{shards.SUFFIX}"))):
        return place
    found = _found(root if is_remote else str(place), streaming=streaming)
    if not found:
        if is_remote or streaming:
            what = "streaming needs parquet, Arrow or tar shards; a folder in COCO's form has none, see README: Data"
            reason = f"--data.streaming true: {what}" if not is_remote else "no parquet, Arrow or tar shards in it"
            raise UserError(f"--data.root {root}: {reason}")
        return place
    digest = hashlib.sha256(repr((VERSION, found, streaming, columns)).encode()).hexdigest()[:16]
    name = re.sub(r"\W+", "_", root.rstrip("/").split("/")[-1])
    made = cache / "sources" / f"{name}-{digest}"
    for split, files in found.items():
        if not (made / f"{split}{shards.SUFFIX}").is_file():
            made.mkdir(parents=True, exist_ok=True)
            in_place = streaming and split != "val"
            manifest = _manifest(split, files, made, cache, in_place, columns or {})
            shards.write(manifest, made / f"{split}{shards.SUFFIX}")
    return made


def named(config: DataConfig, root: Path) -> DataConfig:
    """The config with this root, and its manifests in place of COCO's files where it has them."""
    there = {split: f"{split}{shards.SUFFIX}" for split in SPLITS if (root / f"{split}{shards.SUFFIX}").is_file()}
    if there:  # what is missing is then a manifest
        there |= {split: f"{split}{shards.SUFFIX}" for split in ("train", "val")}
    fields = {f"{split}_{kind}": name for split, name in there.items() for kind in ("annotations", "images")}
    return dataclasses.replace(config, root=str(root), **fields)


def _found(root: str, *, streaming: bool) -> dict[str, list[File]]:
    """The shards of each split, by name."""
    listed, hub = root, download.parse_address(root)
    if hub and streaming:
        listed = download.pin_to_commit(root, hub)
    elif hub:
        listed = str(download.download_dataset(root, hub, tuple(KINDS)))
    files = list(_remote(root, listed) if "://" in listed else _local(Path(listed), deep=hub is not None))
    base = listed.rstrip("/") + "/"
    kinds = {PurePosixPath(file.name).suffix for file in files}
    if len(kinds) > 1:
        raise UserError(f"--data.root {root}: shards of several kinds, {' and '.join(sorted(kinds))}; expected one")
    found = {split: [f for f in files if words & _words(f.name.removeprefix(base))] for split, words in SPLITS.items()}
    if files and not found["train"] and not found["val"]:
        raise UserError(
            f"--data.root {root}: {len(files)} shards, the first {PurePosixPath(files[0].name).name}; expected 'train' "
            f"and 'val' or 'validation' in their names"
        )
    return {split: chosen for split, chosen in found.items() if chosen}


def _words(name: str) -> set[str]:
    return set(re.split(r"[^a-z]+", name.lower()))


def _local(root: Path, *, deep: bool) -> Iterator[File]:
    # Two levels, as the Hub's data/train-*.parquet: folders of hundreds of thousands of images are not walked.
    if (root / "annotations").is_dir():
        return
    depths = ("**/",) if deep else ("", "*/")
    for path in sorted(path for ending in KINDS for depth in depths for path in root.glob(f"{depth}*{ending}")):
        if not path.name.startswith("cache-"):
            stat = path.stat()
            yield File(str(path), f"{stat.st_size} {stat.st_mtime_ns}")


def _remote(root: str, listed: str) -> Iterator[File]:
    try:
        system, path = fsspec.core.url_to_fs(listed)
        files = system.find(path, detail=True)
    except Exception as error:
        raise UserError(f"--data.root {root}: {without_token(why(error, root))}") from None
    for name, about in sorted(files.items()):
        if name.endswith(tuple(KINDS)):
            version = [about.get(key) for key in ("size", "blob_id", "ETag", "etag", "LastModified", "mtime")]
            yield File(system.unstrip_protocol(name), repr(version))


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


# ---- Manifests


def _manifest(
    split: str, files: Sequence[File], made: Path, cache: Path, in_place: bool, columns: Mapping[str, str]
) -> Manifest:
    versions = [(Path(file.name).name, file.version) for file in files]
    digest = hashlib.sha256(repr((versions, sorted(columns.items()))).encode()).hexdigest()[:32]
    names = [file.name for file in files]
    kind: Kind = KINDS[PurePosixPath(names[0]).suffix]
    if kind == "tar":
        index, rows = made / f"{split}.index.arrow", []
        with pa.OSFile(str(index), "wb") as sink, pa.ipc.new_stream(sink, shards.INDEX) as writer:
            for number, name in enumerate(tqdm(names, desc="reading tar shards", disable=None, leave=False)):
                table = shards.index_of(name, number)
                writer.write_table(table)
                rows.append([table.num_rows])
        return Manifest(kind, names, rows, _categories_beside(names[0], split), digest, str(index))
    with ThreadPoolExecutor(READERS) as pool:
        about = pool.map(lambda name: _about(name, kind), names)
        abouts = list(tqdm(about, total=len(names), desc="reading shards", disable=None, leave=False))
    schema = abouts[0].schema
    here = _layout(abouts, names, columns, labeled=split != "unlabelled")
    known = _categories(schema) or layout.categories(schema, here)
    theirs = None if here.is_ours else dataclasses.asdict(here)
    if kind == "parquet" and not in_place:
        names, kind = _as_arrow(split, [download.download_file(name) for name in names], cache), "arrow"
        return Manifest(kind, names, [[_length(name)] for name in names], known, digest, columns=theirs)
    return Manifest(kind, names, [about.rows for about in abouts], known, digest, columns=theirs)


class About(NamedTuple):
    """A shard's schema, and the images of each of its parts."""

    schema: pa.Schema
    rows: list[int]


def _about(name: str, kind: Kind) -> About:
    """What a shard says of itself.

    Raises:
        UserError: it cannot be read.
    """
    try:
        if kind == "parquet":
            file = shards.parquet(name)
            parts = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
            return About(file.schema_arrow, parts)
        return About(shards.mapped(name).schema, [_length(name)])
    except Exception as error:
        reason = without_token(_line(error))
        raise UserError(f"{name}: no {kind} file that can be read: {reason}") from None


def _layout(abouts: Sequence[About], names: Sequence[str], columns: Mapping[str, str], *, labeled: bool) -> Layout:
    several = [
        layout.found(about.schema, columns, name, labeled=labeled) for about, name in zip(abouts, names, strict=True)
    ]
    if odd := next((name for name, one in zip(names, several, strict=True) if one != several[0]), None):
        raise UserError(f"{odd}: its columns are not those of {names[0]}; expected shards of one kind")
    return several[0]


def _categories(schema: pa.Schema) -> list[dict[str, Any]]:
    told = (schema.metadata or {}).get(shards.METADATA)
    return json.loads(told)["categories"] if told else []


def _categories_beside(name: str, split: str) -> list[dict[str, Any]]:
    """Those of the split in categories.json, which `convert` writes above the tar shards."""
    file = Path(name).parent.parent / shards.CATEGORIES
    told = json.loads(file.read_text()) if file.is_file() else []
    return [{k: v for k, v in one.items() if k != "split"} for one in told if one.get("split") in SPLITS[split]]


def _length(name: str) -> int:
    return shards.mapped(name).num_rows


def _as_arrow(split: str, names: list[str], cache: Path) -> list[str]:
    """Parquet as Arrow files that can be memory-mapped, by `datasets` and in a cache of ours."""
    try:
        rows = datasets.load_dataset(
            "parquet", data_files={split: names}, split=split, cache_dir=str(cache / "datasets")
        )
    except Exception as error:
        cause = error.__cause__ or error
        raise UserError(f"{Path(names[0]).parent}: {split} shards cannot be read: {_line(cause)}") from None
    return [file["filename"] for file in rows.cache_files]
