"""Tar shards: WebDataset's KEY.jpg and KEY.json, one after the other; where each picture is, and what is told of it."""

import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa

from sapiens_accel.data import annotation_rules as roster
from sapiens_accel.errors import UserError

PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
INDEX = pa.schema(
    [
        *((name, pa.int64()) for name in ("file", "offset", "size", "image_id", "width", "height")),
        ("file_name", pa.string()),
        ("people", pa.list_(roster.PERSON)),
    ]
)


def index_of(name: str, number: int) -> pa.Table:
    """Where each picture of a tar is, and what its JSON says; reading it goes over the whole file, once.

    Raises:
        UserError: no tar, or compressed; a JSON without a picture, or of other content.
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
        raise UserError(f"{name}: {key}.json has no picture {key}.jpg beside it")
    try:
        told = json.loads(row.get("json", "{}"))
        people = told.get("people", told.get("annotations")) or []
        marked = [roster.person(one, one.get("place")) for one in people]
        about = {key: told.get(key) for key in ("image_id", "file_name", "width", "height")}
        about["file_name"] = about["file_name"] or row["picture"].rpartition("/")[2]
        pa.Table.from_pylist([about | {"people": marked}], schema=INDEX)
    except (ValueError, TypeError, AttributeError, pa.ArrowException) as error:
        raise UserError(f"{name}: {key}.json: {' '.join(str(error).split())[:300]}") from None
    return {**{name: row[name] for name in ("file", "offset", "size")}, **about, "people": marked}
