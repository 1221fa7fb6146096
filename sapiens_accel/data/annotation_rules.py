"""Which annotations a run learns from, and what is wrong with the others: of COCO's JSON, and of shards as columns.

The rules either raise at the first fault, or collect every fault for the doctor.
"""

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
from sapiens_accel.sources.coco import BROKEN, image_names, parsed, reason, shown, whole_number
from sapiens_accel.sources.schema import COLUMNS, FARTHEST, PLAIN, WHOLE_BODY, Fault, Reading, count, pc

NUMBERS = {int, float, bool}


@dataclass(frozen=True, kw_only=True)
class PeopleColumns:
    """n people, neither crowds nor with empty boxes, in the order of their images.

    Attributes:
        place: which annotation of the whole JSON it was.
        labeled: whether a keypoint has v > 0.
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
    def labeled(self) -> Bool[Array, "n"]:
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


def chunks(path: Path, prefix: str, num_keypoints: int, reading: Reading = PLAIN) -> Iterator[PeopleColumns]:
    """The people of a manifest; `prefix` is what their images' names begin with.

    Images of a split in which nobody is marked are one unlabeled person each, whose box is the image.

    Raises:
        UserError: the annotation that has no box, or another number of keypoints.
    """
    manifest, record, person = shards.read(path), 0, 0
    marked = any(count(table) for table in shards.records(manifest, ("people",)))
    for table in shards.records(manifest, COLUMNS):
        yield (
            people_of(table, path, prefix, num_keypoints, (record, person), reading)
            if marked
            else whole(table, path, prefix, num_keypoints, record)
        )
        record, person = record + table.num_rows, person + count(table)


def people_of(
    table: pa.Table,
    path: Path,
    prefix: str,
    num_keypoints: int,
    first: tuple[int, int],
    reading: Reading = PLAIN,
) -> PeopleColumns:
    """The people of some images.

    Args:
        first: which record of the manifest `path` the first image is, and which of its people their first.

    Raises:
        UserError: as `chunks`.
    """
    first_record, first_person = first
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
    return PeopleColumns(
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


def whole(table: pa.Table, path: Path, prefix: str, num_keypoints: int, first: int) -> PeopleColumns:
    table = table.combine_chunks()
    if not {"width", "height"} <= set(table.column_names):
        raise UserError(f"{path}: images without people in them need columns 'width' and 'height' (px)")
    sizes = np.stack([_ints(_one(table, name)) for name in ("width", "height")], axis=1).astype(np.float64)
    numbers = first + np.arange(table.num_rows)
    return PeopleColumns(
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
    """The rules of `row_of`, for columns."""
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


def category_ids(tree: dict[str, Any], reading: Reading) -> list[Any]:
    """A JSON of many kinds of things names those that count among them; empty: all count."""
    wanted = reading.categories or ("person",)
    return [kind.get("id") for kind in tree.get("categories") or () if kind.get("name") in wanted]


def person_category(annotations: Path, reading: Reading = PLAIN) -> Any:
    """The category_id of people in their COCO JSON: that of the name, else the only one; 1 where it does not tell."""
    tree = parsed(annotations)
    listed = [kind.get("id") for kind in tree.get("categories") or ()]
    return next(iter(category_ids(tree, reading) or listed), 1)


def rows_of(
    tree: dict[str, Any],
    path: Path,
    images: str,
    num_keypoints: int,
    reading: Reading | None = PLAIN,
    collect: list[Fault] | None = None,
) -> Iterator[dict[str, Any]]:
    """The rows of the annotations that a run learns from, of a tree of `coco.read_json`.

    Args:
        images: the folder of its images, relative to the root.
        reading: None: it is not known how its keypoints become the run's; another number of them is then no fault of
            each annotation.
        collect: gets every fault, and every annotation that is left out; None: the first fault is raised.

    Raises:
        UserError: the first annotation that is not what it should be.
    """
    names = image_names(tree, path)
    known = reading or PLAIN
    kinds = category_ids(tree, known)
    for index, annotation in enumerate(tree["annotations"]):
        try:
            if kinds and annotation.get("category_id", kinds[0]) not in kinds:
                row, check = None, "kind"
            else:
                without = reading is None and _is_other_number(annotation, num_keypoints)
                taken = annotation | {"keypoints": []} if without else annotation
                row = row_of(taken, names, images, num_keypoints, known)
                check = "crowd" if annotation.get("iscrowd") else "boxes"
        except BROKEN as error:
            text = f"{_who(annotation, index)}: {reason(error)}"
            if collect is None:
                raise UserError(f"{path}: {text}") from None
            collect.append(Fault("annotations", text))
            continue
        if row is None and collect is not None:
            collect.append(Fault(check, _who(annotation, index)))
        elif row is not None:
            if collect is not None:
                collect += _wrong_count(annotation, index)
            yield row


def _who(annotation: Any, index: int) -> str:
    is_object = isinstance(annotation, dict)
    return f"annotation {shown(annotation.get('id'))}" if is_object else f"entry {index}, {shown(annotation)}"


def _is_other_number(annotation: dict[str, Any], num_keypoints: int) -> bool:
    numbers = annotation.get("keypoints")
    return isinstance(numbers, list) and len(numbers) % 3 == 0 and len(numbers) != 3 * num_keypoints


def _wrong_count(annotation: dict[str, Any], index: int) -> Iterator[Fault]:
    """Of the five lists of a whole body the count is of the first."""
    told = annotation.get("num_keypoints")
    labeled = sum(v > 0 for v in (annotation.get("keypoints") or ())[2::3])
    if told is not None and told != labeled:
        text = f"{_who(annotation, index)}: num_keypoints {shown(told)}, labeled {labeled}"
        yield Fault("num_keypoints", text)


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
        raise ValueError(f"its image {person.get('image_id')} is not among 'images'")
    points = _numbers(keypoint_numbers(person, num_keypoints, reading) or [0] * 3 * num_keypoints)
    if points.shape != (3 * num_keypoints,) or not np.isfinite(points).all():
        raise ValueError(f"expected {3 * num_keypoints} keypoint numbers, found {points.size}")
    if max(np.abs(box).max(), np.abs(points).max()) > FARTHEST:
        raise ValueError(f"expected pixels of an image, found numbers above {FARTHEST:g}")
    area = person.get("area", float(box[2] * box[3]))
    if not isinstance(area, int | float) or not 0 <= area <= FARTHEST**2:
        raise ValueError(f"expected 'area' of a number from 0 up, found {shown(area)}")
    return {
        "file_name": f"{images}/{names[person['image_id']]}",
        "image_id": id_of(person["image_id"]),
        "ann_id": id_of(person["id"]),
        "box_xywh": box.tolist(),
        "area": float(area),
        "keypoints": points.reshape(num_keypoints, 3),
    }


def id_of(value: Any) -> int:
    """A whole number that Arrow can keep, which has 64 bits."""
    number = whole_number(value)
    if isinstance(number, bool) or not isinstance(number, int):
        raise ValueError(f"expected an id that is a whole number, found {shown(value)}")
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
        raise ValueError("it has no 'bbox'; expected x, y, width, height in pixels of the image")
    box = _numbers(thing["bbox"])
    if box.shape != (4,) or not np.isfinite(box).all():
        raise ValueError(f"expected 'bbox' of 4 numbers, found {thing['bbox']!r}")
    return box


def _numbers(values: Any) -> Float[Array, "n"]:
    # numpy would read the numbers in a text, too.
    if not isinstance(values, list) or not set(map(type, values)) <= NUMBERS:
        raise ValueError(f"expected a list of numbers for 'bbox' and 'keypoints', found {str(values)[:60]}")
    return np.asarray(values, dtype=np.float64)
