"""What other datasets call their columns, and their tables as ours: a row for each image, with its people.

Ours: image, image_id, file_name, width, height, and people, a list of id, category_id, iscrowd, area, bbox and
keypoints. Read as well, by the names in COLUMNS and PERSON or those that `data.columns` gives:

lists   `objects` (as on the Hub) with a list for each field, or those lists as columns of their own
rows    a row for each person, with columns bbox, keypoints, ...; the image's bytes are in each of its rows

Boxes are x, y, width, height and keypoints x, y, v (in one list, or a list each) in pixels of the image, as COCO's.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute
from jaxtyping import Int
from numpy import ndarray as Array

from sapiens_accel.errors import UserError
from sapiens_accel.sources.coco import number_of_id

pc: Any = pyarrow.compute  # its functions are made at run time
# Ours, and what they are called; the first that is there counts.
COLUMNS = {
    "image": ("image", "img", "picture", "jpg"),
    "image_id": ("image_id", "img_id"),
    "file_name": ("file_name", "filename"),
    "width": ("width", "image_width"),
    "height": ("height", "image_height"),
    "people": ("people", "objects", "annotations", "persons"),
}
PERSON = {
    "id": ("id", "ann_id", "annotation_id", "bbox_id"),
    "category_id": ("category_id", "category", "label"),
    "iscrowd": ("iscrowd", "is_crowd"),
    "area": ("area",),
    "bbox": ("bbox", "bboxes", "box", "boxes"),
    "keypoints": ("keypoints", "kpts"),
    **{name: (name,) for name in ("foot_kpts", "face_kpts", "lefthand_kpts", "righthand_kpts")},
}
Form = Literal["ours", "lists", "rows", "none"]
NEEDED = ("bbox", "keypoints")
PLACE = "place"  # of an annotation in the JSON that was converted: the order of the people
NUMBERS = {"id": pa.int64(), PLACE: pa.int64(), "category_id": pa.int64(), "iscrowd": pa.int8(), "area": pa.float64()}
# What the columns of the image table may be of.
TYPES = {"image_id": pa.types.is_integer, "file_name": pa.types.is_string,
         "width": pa.types.is_integer, "height": pa.types.is_integer}  # fmt: skip
IMAGE_TYPES = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view, pa.types.is_fixed_size_binary)


@dataclass(frozen=True)
class ColumnMapping:
    """Where a table has what.

    Attributes:
        form: how people are stored: as `people` of ours, in lists, in rows of their own, or not at all.
        columns: ours to theirs, of an image.
        fields: ours to theirs, of a person.
        is_ours: whether there is nothing to change.
    """

    form: Form
    columns: dict[str, str]
    fields: dict[str, str]
    is_ours: bool

    def columns_for(self, ours: list[str], present: list[str]) -> list[str]:
        """The columns of a file that hold these of ours."""
        beside = [] if "people" in self.columns or "people" not in ours else list(self.fields.values())
        wanted = [self.columns[name] for name in ours if name in self.columns] + beside
        return [name for name in present if name in wanted]


def infer_mapping(schema: pa.Schema, given: Mapping[str, str], where: str, *, labeled: bool) -> ColumnMapping:
    """How the columns of a table map to the image table.

    Args:
        given: ours to theirs, where they are not called as others are.
        labeled: whether people with keypoints are expected.

    Raises:
        UserError: what is missing, what was found, and what to do; an odd name in `given`.
    """
    for name in given:
        if name not in COLUMNS | PERSON:
            raise UserError(f"--data.columns: no such name {name!r}; there are: {', '.join(COLUMNS | PERSON)}")
    columns = _match_names(COLUMNS, schema.names, given)
    _refuse_repeated(schema.names, columns, where)
    if "image" not in columns:
        raise _missing_column(where, "image", "the bytes of the image", schema, given)
    _check_image(schema.field(columns["image"]), where)
    form, kinds = _find_people(schema, columns.get("people"), given, where)
    fields = _match_names(PERSON, list(kinds), given)
    if form == "none" and "bbox" in fields:
        form = "lists" if _depth(kinds[fields["bbox"]]) > 1 else "rows"
    plain = form == "ours" and all(_depth(kinds[fields[name]]) == 1 for name in fields if name not in NUMBERS)
    lacks = [name for name in NEEDED if name not in fields]
    if labeled and lacks:
        raise _missing_column(where, lacks[0], "of each person", schema, given)
    lost = [f"{ours}: {name}" for ours, name in given.items() if name not in (columns | fields).values()]
    if labeled and lost:
        raise UserError(f"{where}: --data.columns {{{lost[0]}}}: no such column; it has: {_list_columns(schema)}")
    fields = {} if form == "none" else fields
    of_people = form == "none" or (plain and all(_is_our_number(kinds[fields[k]], k) for k in NUMBERS if k in fields))
    is_typed = of_people and all(
        test(schema.field(columns[name]).type) for name, test in TYPES.items() if name in columns
    )
    renamed = any(ours != theirs for ours, theirs in (columns | fields).items())
    return ColumnMapping(form, columns, fields, is_ours=is_typed and not renamed)


def _refuse_repeated(present: list[str], wanted: Mapping[str, str], where: str) -> None:
    if again := next((name for name in wanted.values() if present.count(name) > 1), None):
        raise UserError(f"{where}: several columns are called {again!r}; rename all but one")


def _check_image(field: pa.Field, where: str) -> None:
    kind = field.type
    if pa.types.is_struct(kind) and (index := kind.get_field_index("bytes")) >= 0:
        kind = kind.field(index).type
    if not any(test(kind) for test in IMAGE_TYPES):
        raise UserError(f"{where}: column {field.name!r} is {field.type}; expected the bytes of an image in each row")


def _find_people(
    schema: pa.Schema, people: str | None, given: Mapping[str, str], where: str
) -> tuple[Form, dict[str, pa.DataType]]:
    """The form of a column of people, and its fields; without one, the columns themselves."""
    if people is None:
        _refuse_repeated(schema.names, _match_names(PERSON, schema.names, given), where)
        return "none", {field.name: field.type for field in schema}
    kind = inside = schema.field(people).type
    if _is_list(kind):
        inside = kind.value_type
    if not pa.types.is_struct(inside):
        raise UserError(f"{where}: column {people!r} is {kind}; expected fields in it, such as bbox and keypoints")
    names = [inside.field(i).name for i in range(inside.num_fields)]
    _refuse_repeated(names, _match_names(PERSON, names, given), f"{where}: column {people!r}")
    fields = {inside.field(i).name: inside.field(i).type for i in range(inside.num_fields)}
    return "lists" if inside is kind else "ours", fields


def _match_names(known: Mapping[str, tuple[str, ...]], present: list[str], given: Mapping[str, str]) -> dict[str, str]:
    """Ours to theirs: the name that is given, else the first known one that is there."""
    candidates = {ours: (given[ours],) if ours in given else names for ours, names in known.items()}
    first = {ours: next((name for name in names if name in present), None) for ours, names in candidates.items()}
    return {ours: name for ours, name in first.items() if name is not None}


def _depth(kind: pa.DataType) -> int:
    depth = 0
    while _is_list(kind):
        kind, depth = kind.value_type, depth + 1
    return depth


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _missing_column(where: str, name: str, what: str, schema: pa.Schema, given: Mapping[str, str]) -> UserError:
    known = (given[name],) if name in given else (COLUMNS | PERSON)[name]
    inside = " (a column, or in 'people' or 'objects')" if name in PERSON else ""
    return UserError(
        f"{where}: no column '{name}', {what}; looked for {' or '.join(known)}{inside}, found: "
        f"{_list_columns(schema)}; say what it is called by --data.columns '{{{name}: THEIR_NAME}}', "
        f"or convert the set, see README"
    )


def _list_columns(schema: pa.Schema) -> str:
    """The columns, and what is in those of several fields."""
    words = []
    for field in schema:
        kind = field.type
        while _is_list(kind):
            kind = kind.value_type
        inside = ", ".join(kind.field(i).name for i in range(kind.num_fields)) if pa.types.is_struct(kind) else ""
        words.append(f"{field.name} ({inside})" if inside and "bytes" not in inside else field.name)
    return ", ".join(words)[:300]


def read_categories(schema: pa.Schema, mapping: ColumnMapping) -> list[dict[str, Any]]:
    """COCO's categories from the names that `datasets` keeps of a ClassLabel; none where it has none."""
    info = read_metadata(schema, b"huggingface").get("info")
    features = info.get("features") if isinstance(info, dict) else None
    names = _class_names(features, mapping.fields.get("category_id", ""))
    return [{"id": index, "name": name} for index, name in enumerate(names or ())]


def read_metadata(schema: pa.Schema, key: bytes) -> dict[str, Any]:
    """Keys and values that a table has beside its columns; none if they are no such."""
    try:
        tree = json.loads((schema.metadata or {}).get(key, b"{}"))
    except (ValueError, RecursionError):
        return {}
    return tree if isinstance(tree, dict) else {}


def _class_names(tree: Any, key: str) -> list[str] | None:
    if not isinstance(tree, dict):
        return None
    label = tree.get(key)
    while isinstance(label, dict):
        if label.get("_type") == "ClassLabel":
            names = label.get("names")
            return names if isinstance(names, list) else None
        label = label.get("feature")
    return next((names for one in tree.values() if (names := _class_names(one, key))), None)


# ---- Tables as ours


def to_image_table(table: pa.Table, mapping: ColumnMapping) -> pa.Table:
    """The table's columns but for the image, as far as it has them, by our names; `people` as a list of structs.

    Raises:
        UserError: columns or fields of a person of a type that cannot be converted, or lists of one image that differ
            in length.
    """
    if mapping.is_ours:
        return table
    made = {name: _column(table, theirs) for name, theirs in mapping.columns.items() if theirs in table.column_names}
    nested = made.pop("people", None)
    made.pop("image", None)
    if "image_id" in made and pa.types.is_string((texts := _simplify(made["image_id"])).type):
        made["given_id"] = texts
    for name in set(made) & set(TYPES):
        theirs = mapping.columns[name]
        made[name] = _to_ids(made[name], name, theirs) if name == "image_id" else _to_type(made[name], name, theirs)
    if nested is not None or (mapping.fields and set(mapping.fields.values()) <= set(table.column_names)):
        made["people"] = _build_people(table, mapping, nested)
    return pa.table(made) if made else table.select([])


def _to_ids(values: pa.Array, name: str, theirs: str) -> pa.Array:
    """Whole numbers, however they are written: as floats (pandas, if one is missing) and as any texts, as in a JSON."""
    values = _simplify(values)
    kind = values.type
    if pa.types.is_string(kind):
        distinct = values.dictionary_encode()
        numbers = [None if text is None else number_of_id(text) for text in distinct.dictionary.to_pylist()]
        if odd := [text for text in numbers if not (text is None or (isinstance(text, int) and abs(text) < 2**63))]:
            raise UserError(f"column {theirs!r} holds {odd[0]!r}; expected ids, numbers of at most 64 bits or texts")
        return pa.array(numbers, pa.int64()).take(distinct.indices)
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_null(kind)):
        raise UserError(f"column {theirs!r} is {kind}; expected whole numbers")
    return values if pa.types.is_integer(kind) else _cast(values, pa.int64(), theirs)


def _to_type(values: pa.Array, name: str, theirs: str) -> pa.Array:
    """A file_name as text, a width or height as whole numbers."""
    values = _simplify(values)
    kind = values.type
    if name == "file_name":
        if not (pa.types.is_string(kind) or pa.types.is_integer(kind) or pa.types.is_null(kind)):
            raise UserError(f"column {theirs!r} is {kind}; expected text")
        return _cast(values, pa.string(), theirs)
    if not _is_number(kind):
        raise UserError(f"column {theirs!r} is {kind}; expected numbers")
    return _cast(values, pa.int64(), theirs)


def _simplify(values: pa.Array) -> pa.Array:
    """Values that a dictionary holds once (categories of pandas) one by one, and text of any type as `string`."""
    if pa.types.is_dictionary(values.type):
        return pa.DictionaryArray.from_arrays(values.indices, _simplify(values.dictionary)).dictionary_decode()
    is_text = pa.types.is_large_string(values.type) or pa.types.is_string_view(values.type)
    return values.cast(pa.string()) if is_text else values


def _build_people(table: pa.Table, mapping: ColumnMapping, nested: pa.Array | None) -> pa.Array:
    if mapping.form == "ours":
        assert nested is not None
        lengths, flat = _lengths(nested), nested.flatten()
        fields = {name: _child(flat, theirs) for name, theirs in mapping.fields.items()}
        if (index := flat.type.get_field_index(PLACE)) >= 0 and pa.types.is_integer(flat.type.field(index).type):
            fields[PLACE] = _child(flat, PLACE)
        return _list_people(lengths, fields)
    if nested is not None:
        given = {name: _child(nested, theirs) for name, theirs in mapping.fields.items()}
    else:
        given = {name: _column(table, theirs) for name, theirs in mapping.fields.items()}
    if mapping.form == "rows":
        has = given["bbox"].is_valid()
        return _list_people(has.cast(pa.int64()).to_numpy(), {name: one.filter(has) for name, one in given.items()})
    lengths = _lengths(given["bbox"])
    for name, values in given.items():
        if (_lengths(values) != lengths).any():
            row = int(np.flatnonzero(_lengths(values) != lengths)[0])
            raise UserError(
                f"column {mapping.fields[name]!r} has {_lengths(values)[row]} entries where "
                f"{mapping.fields['bbox']!r} has {lengths[row]}; expected one for each person of an image"
            )
    return _list_people(lengths, {name: _to_variable_list(values).flatten() for name, values in given.items()})


def _list_people(lengths: Int[Array, "n"], fields: dict[str, pa.Array]) -> pa.Array:
    made = {name: _convert_field(name, values) for name, values in fields.items()}
    kept = {name: values for name, values in made.items() if values is not None}
    if "id" in kept and pa.types.is_string((texts := _simplify(fields["id"])).type):
        kept["given_id"] = texts
    people = pa.StructArray.from_arrays(list(kept.values()), names=list(kept))
    return pa.ListArray.from_arrays(pa.array(_offsets(lengths), pa.int32()), people)


def _convert_field(name: str, values: pa.Array) -> pa.Array | None:
    """One number, or one flat list of numbers, for each person; None for ids that are all missing."""
    if name not in NUMBERS:
        return _flatten_numbers(values, name)
    if name == "id":
        return None if pa.types.is_null(values.type) else _cast(_to_ids(values, name, name), pa.int64(), name)
    if not _is_number(values.type):
        raise UserError(f"column '{name}' is {values.type}; expected numbers, as a ClassLabel has them")
    return _cast(values, NUMBERS[name], name)


def _cast(values: pa.Array, kind: pa.DataType, name: str) -> pa.Array:
    try:
        return values.cast(kind)
    except pa.ArrowException as error:
        raise UserError(f"column '{name}' is {values.type}; expected {kind}: {error}") from None


def _is_our_number(kind: pa.DataType, name: str) -> bool:
    return pa.types.is_floating(kind) if name == "area" else pa.types.is_integer(kind)


def _is_number(kind: pa.DataType) -> bool:
    # Arrow would read the numbers in a text, too.
    return any(
        test(kind) for test in (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_null)
    )


def _flatten_numbers(values: pa.Array, name: str) -> pa.Array:
    """[[x, y, v], ...] as [x, y, v, ...]."""
    kind = values.type
    if not _is_list(kind):
        raise UserError(f"column '{name}' is {kind}; expected a list of numbers for each person")
    lengths, inner = _lengths(values), _to_variable_list(values).flatten()
    while _is_list(inner.type):
        if name != "bbox" and (odd := _lengths(inner)[_lengths(inner) != 3]).size:
            raise UserError(
                f"column '{name}' has points of {odd[0]} numbers; expected x, y, v (v: 0 unlabeled, 1 hidden, 2 seen)"
            )
        ends = _offsets(_lengths(inner))[_offsets(lengths)]
        lengths, inner = np.diff(ends), _to_variable_list(inner).flatten()
    if not _is_number(inner.type):
        raise UserError(f"column '{name}' holds {inner.type}; expected numbers")
    return pa.ListArray.from_arrays(pa.array(_offsets(lengths), pa.int32()), _cast(inner, pa.float64(), name))


def _lengths(values: pa.Array) -> Int[Array, "n"]:
    lengths = pc.fill_null(pc.list_value_length(_to_variable_list(values)), 0)
    return lengths.to_numpy(zero_copy_only=False).astype(np.int64)


def _to_variable_list(values: pa.Array) -> pa.Array:
    """A list of lists of one length as one of any lengths: a null then takes no room."""
    is_fixed = pa.types.is_fixed_size_list(values.type)
    return values.cast(pa.list_(values.type.value_type)) if is_fixed else values


def _offsets(lengths: Int[Array, "n"]) -> Int[Array, "n+1"]:
    return np.concatenate([[0], np.cumsum(lengths)])


def _child(values: pa.StructArray, name: str) -> pa.Array:
    """A field; null where the whole is."""
    return values.flatten()[values.type.get_field_index(name)]


def _column(table: pa.Table, name: str) -> pa.Array:
    column = table.column(name).combine_chunks()
    return column if isinstance(column, pa.Array) else pa.concat_arrays(column.chunks)
