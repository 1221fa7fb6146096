"""The people in shards as columns, some thousand pictures at a time: the rules are those of COCO's JSON in `coco`."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
from jaxtyping import Bool, Float, Int
from numpy import ndarray as Array

from sapiens_accel.errors import UserError
from sapiens_accel.sources import shards

pc: Any = pyarrow.compute  # its functions are made at run time
COLUMNS = ("image_id", "file_name", "width", "height", "people")
# COCO-WholeBody's 133 keypoints in five lists, as its JSON has them.
FARTHEST = 1e7  # px: more than any picture has, and its square is still a number in float32
WHOLE_BODY = {"keypoints": 17, "foot_kpts": 6, "face_kpts": 68, "lefthand_kpts": 21, "righthand_kpts": 21}

# One annotation as it stands in a row's list of people; `place` is its place in the whole JSON.
PERSON = pa.struct(
    [
        *((name, pa.int64()) for name in ("id", "place", "category_id")),
        ("iscrowd", pa.int8()),
        ("area", pa.float64()),
        *((name, pa.list_(pa.float64())) for name in ("bbox", *WHOLE_BODY)),
    ]
)


def person(annotation: dict[str, Any], place: int | None) -> dict[str, Any]:
    """A COCO annotation as PERSON; what it does not say is None.

    Raises:
        ValueError: an id that is no whole number.
    """
    told = {key: annotation.get(key) for key in ("id", "category_id")}
    for key, value in told.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise ValueError(f"expected a whole number as {key!r}, found {value!r}")
    area, lists = annotation.get("area"), {name: annotation.get(name) for name in ("bbox", *WHOLE_BODY)}
    numbers = {name: [float(number) for number in value] if value else None for name, value in lists.items()}
    crowd, size = int(bool(annotation.get("iscrowd"))), None if area is None else float(area)
    return {**told, "place": place, "iscrowd": crowd, "area": size, **numbers}


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Which annotations of a JSON count, and which of their keypoints are the run's; see `category.reading`.

    Attributes:
        categories: the names of those that count; empty: person where there is one, else all.
        count: keypoints of an annotation.
        source: for each of the run's keypoints its place in an annotation, -1 for one that is not there (v=0); None:
            they are the run's own, in its order.
    """

    categories: tuple[str, ...] = ()
    count: int | None = None
    source: tuple[int, ...] | None = None


PLAIN = Reading()


@dataclass(frozen=True, kw_only=True)
class People:
    """n people, neither crowds nor with empty boxes, in the order of their pictures.

    Attributes:
        place: which annotation of the whole JSON it was.
        labelled: whether a keypoint has v > 0.
    """

    file_name: pa.Array
    image_id: Int[Array, "n"]
    ann_id: Int[Array, "n"]
    box_xywh: Float[Array, "n 4"]
    area: Float[Array, "n"]
    keypoints: Float[Array, "n k 3"]
    place: Int[Array, "n"]

    def __len__(self) -> int:
        return len(self.image_id)

    @property
    def labelled(self) -> Bool[Array, "n"]:
        return np.asarray((self.keypoints[..., 2] > 0).any(axis=-1))

    def row(self, index: int) -> dict[str, Any]:
        """As a row of `coco`."""
        names = ("image_id", "ann_id", "box_xywh", "area", "keypoints")
        values = {name: getattr(self, name)[index].tolist() for name in names}
        return {"file_name": self.file_name[index].as_py(), **values}

    def table(self, schema: pa.Schema) -> pa.Table:
        """As a table of `coco`'s schema."""
        count = self.keypoints.shape[1]
        triples = _lists(_lists(pa.array(self.keypoints.reshape(-1)), 3), count)
        columns = {
            "file_name": self.file_name,
            "image_id": pa.array(self.image_id),
            "ann_id": pa.array(self.ann_id),
            "box_xywh": pa.FixedSizeListArray.from_arrays(pa.array(self.box_xywh.reshape(-1)), 4),
            "area": pa.array(self.area),
            "keypoints": pa.ExtensionArray.from_storage(schema.field("keypoints").type, triples),
        }
        return pa.Table.from_arrays([columns[name].cast(schema.field(name).type) if name != "keypoints" else
                                     columns[name] for name in schema.names], schema=schema)  # fmt: skip


def _lists(values: pa.Array, length: int) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array(np.arange(0, len(values) + 1, length, dtype=np.int32)), values)


def chunks(path: Path, prefix: str, num_keypoints: int, reading: Reading = PLAIN) -> Iterator[People]:
    """The people of a manifest; `prefix` is what their pictures' names begin with.

    Pictures of a split in which nobody is marked are one unlabelled person each, whose box is the picture.

    Raises:
        UserError: the annotation that has no box, or another number of keypoints.
    """
    manifest, record, person = shards.read(path), 0, 0
    marked = any(count(table) for table in shards.records(manifest, ("people",)))
    for table in shards.records(manifest, COLUMNS):
        yield (
            people_of(table, path, prefix, num_keypoints, record, person, reading)
            if marked
            else whole(table, path, prefix, num_keypoints, record)
        )
        record, person = record + table.num_rows, person + count(table)


def count(table: pa.Table) -> int:
    if "people" not in table.column_names:
        return 0
    return int(pc.sum(pc.list_value_length(table.column("people"))).as_py() or 0)


def people_of(
    table: pa.Table,
    path: Path,
    prefix: str,
    num_keypoints: int,
    first_record: int,
    first_person: int,
    reading: Reading = PLAIN,
) -> People:
    """The people of some pictures, of which the first is record `first_record` of the manifest `path`.

    Raises:
        UserError: as `chunks`.
    """
    table = table.combine_chunks()
    column = _one(table, "people")
    lengths = _ints(pc.list_value_length(column))
    record = np.repeat(np.arange(table.num_rows), lengths)
    flat = column.flatten()
    ann_id = _field(flat, "id", first_person + np.arange(len(flat)))
    place = _field(flat, "place", first_person + np.arange(len(flat)))
    wanted = reading.categories or ("person",)
    kinds = [kind.get("id") for kind in shards.read(path).categories if kind.get("name") in wanted]
    crowd = _field(flat, "iscrowd", np.zeros(len(flat), np.int64))
    _expect((crowd == 0) | (crowd == 1), crowd, "'iscrowd' of 0 or 1", ann_id, path)
    kept = crowd == 0
    if kinds:
        kept &= np.isin(_field(flat, "category_id", np.full(len(flat), kinds[0])), np.array(kinds))
    boxes, has_box = _vectors(flat, "bbox", 4, kept, ann_id, path)
    if not has_box[kept].all():
        raise UserError(f"{path}: annotation {ann_id[kept & ~has_box][0]}: it has no 'bbox' (x, y, width, height)")
    kept &= (boxes[:, 2] > 0) & (boxes[:, 3] > 0)
    num_theirs = reading.count or num_keypoints
    points = _keypoints(flat, num_theirs, kept, ann_id, path)
    area = _field(flat, "area", boxes[:, 2] * boxes[:, 3])
    _expect((area >= 0) & (area <= FARTHEST**2) | ~kept, area, "'area' of a number from 0 up", ann_id, path)
    chosen = record[kept]
    return People(
        file_name=_names(table, prefix, first_record).take(pa.array(chosen)),
        image_id=_image_ids(table, first_record)[chosen],
        ann_id=ann_id[kept],
        box_xywh=boxes[kept],
        area=area[kept],
        keypoints=_by_name(points[kept].reshape(-1, num_theirs, 3), reading.source),
        place=place[kept],
    )


def _by_name(points: Float[Array, "n m 3"], source: tuple[int, ...] | None) -> Float[Array, "n k 3"]:
    """The run's keypoints of all that there are; zeros for those that are not."""
    return points if source is None else np.where((np.array(source) >= 0)[:, None], points[:, list(source)], 0.0)


def whole(table: pa.Table, path: Path, prefix: str, num_keypoints: int, first: int) -> People:
    table = table.combine_chunks()
    if not {"width", "height"} <= set(table.column_names):
        raise UserError(f"{path}: pictures without people in them need columns 'width' and 'height' (px)")
    sizes = np.stack([_ints(_one(table, name)) for name in ("width", "height")], axis=1).astype(np.float64)
    numbers = first + np.arange(table.num_rows)
    return People(
        file_name=_names(table, prefix, first),
        image_id=_image_ids(table, first),
        ann_id=numbers,
        box_xywh=np.concatenate([np.zeros_like(sizes), sizes], axis=1),
        area=sizes.prod(axis=1),
        keypoints=np.zeros((table.num_rows, num_keypoints, 3)),
        place=numbers,
    )


def _one(table: pa.Table, name: str) -> pa.Array:
    column = table.column(name)
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    return array.chunk(0) if isinstance(array, pa.ChunkedArray) else array


def _ints(array: pa.Array) -> Int[Array, "n"]:
    return pc.fill_null(array, 0).to_numpy(zero_copy_only=False).astype(np.int64)


def _image_ids(table: pa.Table, first: int) -> Int[Array, "n"]:
    numbers = first + np.arange(table.num_rows)
    return _or(_one(table, "image_id"), numbers) if "image_id" in table.column_names else numbers


def _names(table: pa.Table, prefix: str, first: int) -> pa.Array:
    numbers = pa.array(np.arange(first, first + table.num_rows)).cast(pa.string())
    present = "file_name" in table.column_names
    names = pc.coalesce(_one(table, "file_name").cast(pa.string()), numbers) if present else numbers
    return pc.binary_join_element_wise(prefix, numbers, names, "/")


def _field(flat: pa.StructArray, name: str, default: Array) -> Array:
    return _or(flat.field(name), default) if flat.type.get_field_index(name) >= 0 else default


def _or(array: pa.Array, default: Array) -> Array:
    """Values, and the default where there are none."""
    values = pc.fill_null(array, 0).to_numpy(zero_copy_only=False).astype(default.dtype)
    return np.where(pc.is_null(array).to_numpy(zero_copy_only=False), default, values)


def _vectors(
    flat: pa.StructArray, name: str, length: int, kept: Bool[Array, "n"], ann_id: Int[Array, "n"], path: Path
) -> tuple[Float[Array, "n length"], Bool[Array, "n"]]:
    """A list of `length` numbers for each person, and who has one; of those not kept nothing is asked."""
    found, has = np.zeros((len(flat), length)), np.zeros(len(flat), bool)
    if flat.type.get_field_index(name) < 0:
        return found, has
    column = flat.field(name)
    if pa.types.is_fixed_size_list(column.type):
        column = column.cast(pa.list_(column.type.value_type))
    lengths = _ints(pc.list_value_length(column))
    odd = kept & (lengths != 0) & (lengths != length)
    if odd.any():
        who, count = ann_id[odd][0], lengths[odd][0]
        raise UserError(f"{path}: annotation {who}: expected {length} numbers in '{name}', found {count}")
    has = lengths == length
    values = np.asarray(column.flatten().to_numpy(zero_copy_only=False), dtype=np.float64)
    found[has] = values[np.repeat(has, lengths)].reshape(-1, length)
    fine = (np.abs(found) <= FARTHEST).all(axis=1)
    _expect(fine | ~kept, found, f"numbers of at most {FARTHEST:g} in '{name}'", ann_id, path)
    return found, has


def _expect(fine: Bool[Array, "n"], values: Array, expected: str, ann_id: Int[Array, "n"], path: Path) -> None:
    """The rules of `coco_json.row_of`, for columns."""
    if not fine.all():
        at = int(np.argmin(fine))
        raise UserError(f"{path}: annotation {ann_id[at]}: expected {expected}, found {str(values[at].tolist())[:60]}")


def _keypoints(
    flat: pa.StructArray, num_keypoints: int, kept: Bool[Array, "n"], ann_id: Int[Array, "n"], path: Path
) -> Float[Array, "n 3k"]:
    """x, y, v, ...; zeros for those who have none."""
    in_parts = (
        flat.type.get_field_index("foot_kpts") >= 0 and _ints(pc.list_value_length(flat.field("foot_kpts"))).any()
    )
    if num_keypoints != sum(WHOLE_BODY.values()) or not in_parts:
        return _vectors(flat, "keypoints", 3 * num_keypoints, kept, ann_id, path)[0]
    parts = [_vectors(flat, name, 3 * count, kept, ann_id, path) for name, count in WHOLE_BODY.items()]
    points, has = np.concatenate([part for part, _ in parts], axis=1), np.all([has for _, has in parts], axis=0)
    return np.where(has[:, None], points, 0.0)
