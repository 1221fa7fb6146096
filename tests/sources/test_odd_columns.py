"""Parquet whose columns are of other types than ours: each file opens, or is refused in one line."""

import dataclasses
import itertools
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sapiens_accel.config.schema import DataConfig
from sapiens_accel.data import build
from sapiens_accel.errors import UserError
from sapiens_accel.evaluation.ground_truth import read_images
from sapiens_accel.pose.skeleton import COCO17
from sapiens_accel.sources import coco, images

IMAGE = cv2.imencode(".jpg", np.full((48, 64, 3), 90, np.uint8))[1].tobytes()
PERSON: dict[str, Any] = {"id": 3, "category_id": 1, "iscrowd": 0, "area": 400.0, "bbox": [4.0, 4.0, 40.0, 40.0],
                          "keypoints": [20.0, 20.0, 2.0] * 17}  # fmt: skip
ROW: dict[str, Any] = {"image": {"bytes": IMAGE, "path": "a.jpg"}, "image_id": 7, "file_name": "a.jpg", "width": 64,
                       "height": 48}  # fmt: skip
ODD: dict[str, Any] = {
    "text": "000000000012", "words": "img_7", "float": 12.0, "half": 0.5, "nan": float("nan"), "true": True,
    "none": None, "list": [1, 2], "texts": ["1", "2"], "struct": {"a": 1}, "bytes": b"\x00\xff", "large": 2**62,
    "negative": -5, "decimal": Decimal("1.5"), "time": np.datetime64("2020-01-01", "s"), "empty list": [],
    "list of lists": [[1.0], [2.0]], "list of structs": [{"a": 1}],
}  # fmt: skip
TYPED = {
    "int8": pa.array([7], pa.int8()), "uint64": pa.array([2**64 - 1], pa.uint64()),
    "large text": pa.array(["7"], pa.large_string()), "dictionary": pa.array(["7"]).dictionary_encode(),
    "fixed list": pa.array([[1.0] * 4], pa.list_(pa.float32(), 4)), 
    "large list": pa.array([[1, 2]], pa.large_list(pa.int16())),
}  # fmt: skip


def _tables() -> Iterator[tuple[str, pa.Table]]:
    forms = {
        "ours": {**ROW, "people": [PERSON]},
        "lists": {**ROW, "objects": {key: [value] for key, value in PERSON.items()}},
        "rows": {**ROW, **PERSON},
    }
    for form, row in forms.items():
        for name, (kind, value) in itertools.product(row, ODD.items()):
            yield f"{form}, {name}: {kind}", pa.Table.from_pylist([row | {name: value}])
        for name, (kind, column) in itertools.product(row, TYPED.items()):
            table = pa.Table.from_pylist([row])
            yield f"{form}, {name}: {kind}", table.set_column(table.column_names.index(name), name, column)
    for name, (kind, value) in itertools.product(PERSON, ODD.items()):
        person = PERSON | {name: value}
        yield f"a person's {name}: {kind}", pa.Table.from_pylist([{**ROW, "people": [person]}])
        objects = {key: [one] for key, one in person.items()}
        yield f"a list of {name}: {kind}", pa.Table.from_pylist([{**ROW, "objects": objects}])
    table = pa.Table.from_pylist([forms["ours"]])
    yield "the same column twice", table.append_column("people", table.column("people"))


@pytest.mark.parametrize("part", [0, *(pytest.param(number, marks=pytest.mark.slow) for number in range(1, 7))])
def test_each_opens_or_is_one_line(tmp_path: Path, part: int) -> None:
    opened, refused, failed = 0, 0, []
    for number, (name, table) in enumerate(itertools.islice(_tables(), part, None, 7)):
        folder = tmp_path / str(number)
        folder.mkdir()
        for split in ("train", "val"):
            pq.write_table(table, folder / f"{split}.parquet")
        config = DataConfig(root=str(folder), cache_dir=str(tmp_path / "cache"), input_hw=(64, 48))
        config = dataclasses.replace(config, streaming=number % 5 == 0)
        try:
            sets = build.open_people(config, COCO17, unlabeled=False)
            assert np.isfinite(np.asarray(sets.train.rows[0]["box_xywh"])).all()
            opened += 1
        except UserError as error:
            assert "\n" not in str(error) and (str(tmp_path) in str(error) or "--data" in str(error)), (
                name,
                str(error),
            )
            refused += 1
        except Exception as error:
            failed.append(f"{name}: {type(error).__name__}: {error}"[:300])
    assert not failed, "\n".join([f"{len(failed)} of {opened + refused + len(failed)}", *failed])
    assert opened > 10 and refused > 20, (opened, refused)


def _open(folder: Path, table: pa.Table, suffix: str = ".parquet", **changes: Any) -> Any:
    folder.mkdir()
    for split in ("train", "val"):
        if suffix == ".parquet":
            pq.write_table(table, folder / f"{split}.parquet")
        else:
            with pa.ipc.new_file(folder / f"{split}.arrow", table.schema) as writer:
                writer.write_table(table)
    config = DataConfig(root=str(folder), cache_dir=str(folder / "cache"), input_hw=(64, 48), **changes)
    return build.open_people(config, COCO17, unlabeled=False).train


OURS = pa.Table.from_pylist([{**ROW, "people": [PERSON]}, {**ROW, "image_id": 8, "people": [PERSON | {"id": 4}]}])


def _with(name: str, column: pa.Array) -> pa.Table:
    return OURS.set_column(OURS.column_names.index(name), name, column)


@pytest.mark.parametrize(
    "ids",
    [
        pa.array(["000007", " 8 "]), pa.array(["000007", "8"], pa.large_string()), pa.array([7.0, 8.0]),
        pa.array(["7", "8"], pa.string_view()), pa.array(["7", "008"]).dictionary_encode(),
        pa.array([7, 8]).dictionary_encode(),
    ],
    ids=lambda ids: str(ids.type),
)  # fmt: skip
def test_ids_are_whole_numbers_however_they_are_written(tmp_path: Path, ids: pa.Array) -> None:
    """A detector's JSON names images by them: to number them by their rows instead moves its boxes to other images."""
    people = _open(tmp_path / "a", _with("image_id", ids), ".arrow")
    assert people.rows["image_id"][:] == [7, 8] and people.rows["ann_id"][:] == [3, 4]
    objects = pa.array([{"id": [one], **{key: [PERSON[key]] for key in ("bbox", "keypoints")}} for one in "78"])
    table = OURS.drop_columns(["people"]).append_column("objects", objects)
    assert _open(tmp_path / "b", table).rows["ann_id"][:] == [7, 8]


def test_ids_that_are_texts_are_known_again(tmp_path: Path) -> None:
    people = _open(tmp_path / "a", _with("image_id", pa.array(["img-7", "0x8"])), ".arrow")
    ids = people.rows["image_id"][:]
    assert ids == [coco.number_of_id("img-7"), coco.number_of_id("0x8")]
    assert [coco.given_id(read_images(people)[number]) for number in ids] == ["img-7", "0x8"]


@pytest.mark.parametrize(
    ("name", "column", "named"),
    [
        ("image_id", pa.array(["7", " "]), "'image_id' holds ' '; expected ids"),
        ("image_id", pa.array([7.0, 8.5]), "'image_id' is double; expected int64"),
        ("image_id", pa.array([[7], [8]]), "'image_id' is list"),
        ("file_name", pa.array([1.5, 2.5]), "'file_name' is double; expected text"),
        ("width", pa.array(["64", "wide"]), "'width' is string; expected numbers"),
    ],
)
def test_a_column_that_cannot_be_converted_is_named_not_left_out(
    tmp_path: Path, name: str, column: pa.Array, named: str
) -> None:
    with pytest.raises(UserError) as caught:
        _open(tmp_path / "a", _with(name, column))
    assert named in str(caught.value) and "train.parquet" in str(caught.value)


@pytest.mark.parametrize("text", [pa.string_view(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_names_of_any_type_of_text_are_kept(tmp_path: Path, text: pa.DataType) -> None:
    column = pa.array(["a.jpg", "b.jpg"], text)
    people = _open(tmp_path / "a", _with("file_name", column), ".arrow")
    assert [Path(name).name for name in people.rows["file_name"][:]] == ["a.jpg", "b.jpg"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
@pytest.mark.parametrize("binary", [pa.binary_view(), pa.binary(len(IMAGE)), pa.large_binary()], ids=str)
def test_images_of_any_type_of_bytes_are_read(
    tmp_path: Path, binary: pa.DataType, suffix: str, streaming: bool
) -> None:
    table = _with("image", pa.array([IMAGE, IMAGE], binary))
    people = _open(tmp_path / "a", table, suffix, streaming=streaming)
    assert images.read_image(people.root / people.rows[1]["file_name"]).shape == (48, 64, 3)


def test_a_repeated_column_that_nobody_reads_is_no_fault(tmp_path: Path) -> None:
    table = OURS.append_column("note", pa.array([1, 2])).append_column("note", pa.array([3, 4]))
    assert len(_open(tmp_path / "a", table, ".arrow")) == 2
