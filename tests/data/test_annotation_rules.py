"""The rules of annotations: both forms of them, for one annotation of a JSON and for columns, say the same."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from sapiens_accel.data import annotation_rules
from sapiens_accel.data.annotation_rules import PeopleReader
from sapiens_accel.errors import UserError
from sapiens_accel.sources import schema, shards
from sapiens_accel.sources.discover import open_source
from sapiens_accel.sources.schema import PLAIN, WHOLE_BODY, Reading

NAN, INF = float("nan"), float("inf")
K = 3
ROW = pa.schema(
    [
        *((name, pa.int64()) for name in ("image_id", "width", "height")),
        ("file_name", pa.string()),
        ("people", pa.list_(schema.PERSON)),
    ]
)
CATEGORIES = [{"id": 4, "name": "person"}, {"id": 7, "name": "dog"}]
# What may stand in an annotation, and what each value does: "" it is taken or left out, else what a refusal names.
GOOD: dict[str, list[Any]] = {
    "bbox": [[1, 2, 3, 4], [0, 0, 0, 5], [5, 5, 5, -1], [1.5, 2.5, 1e7, 1], None, []],
    "keypoints": [
        None,
        [],
        [1, 2, 2] * K,
        [0, 0, 0, 1.5, 2, 1, 3, 4, 2],
        [1, 1, -1, 2, 2, 0, 3, 3, 1],
        [NAN, NAN, 0, 2, 2, 2, NAN, NAN, NAN],
    ],
    "area": [None, 0, 3.5, 1e14],
    "iscrowd": [None, 0, 0, 0, 1],
    "category_id": [4, 4, 4, None, 7],
}
BAD: dict[str, list[Any]] = {
    "bbox": [
        [1, 2, 3],
        [1, 2, 3, 4, 5],
        [1, 2, NAN, 4],
        [INF, 1, 1, 1],
        [1, 1, -INF, 1],
        [1.1e7, 1, 1, 1],
        [-1e9, 1, 0, 1],
        [1, 1, 1e-9, 1],
    ],
    "keypoints": [
        [1, 2, 2] * (K + 1),
        [1, 2],
        [1, NAN, 2] * K,
        [1, 2, INF] * K,
        [1, 1e8, 2] * K,
        [1, 2, 0.7] * K,
        [1, 2, 3] * K,
        [NAN, NAN, 2] * K,
        [NAN, 1, 0] * K,
        [NAN, NAN, 0.1] * K,
        [1, 2, NAN] * K,
        [1, 2, 0.7, NAN, NAN, 0.3, 3, 4, 0.2] + [5, 6, 1] * (K - 3),
    ],
    "area": [-1, NAN, INF, 2e14],
    "iscrowd": [2, -1],
}


def _people(rng: np.random.Generator, num: int, num_bad: int) -> list[dict[str, Any]]:
    people = []
    for index in range(num):
        person = {key: values[rng.integers(len(values))] for key, values in GOOD.items()}
        people.append({"id": 100 + index, "image_id": int(rng.integers(5)), **person})
    for index in rng.choice(num, num_bad, replace=False):
        key = list(BAD)[rng.integers(len(BAD))]
        people[index] |= {"bbox": [1, 2, 3, 4], "iscrowd": 0, "category_id": 4}
        people[index][key] = BAD[key][rng.integers(len(BAD[key]))]
    return people


def _as_json(folder: Path, people: list[dict[str, Any]]) -> Path:
    images = [{"id": index, "file_name": f"{index}.jpg", "width": 30, "height": 40 + index} for index in range(5)]
    # A category or area that is null counts as one that is not there.
    present = [
        {key: value for key, value in person.items() if value is not None or key in ("category_id", "area")}
        for person in people
    ]
    tree = {"images": images, "annotations": present, "categories": CATEGORIES}
    (folder / "train.json").write_text(json.dumps(tree))
    return folder / "train.json"


def _as_shards(folder: Path, people: list[dict[str, Any]]) -> Path:
    """The same in two Arrow files, each of some of the images."""
    rows: list[dict[str, Any]] = [
        {"image_id": i, "file_name": f"{i}.jpg", "width": 30, "height": 40 + i, "people": []} for i in range(5)
    ]
    for place, person in enumerate(people):
        rows[person["image_id"]]["people"].append(
            {key: person.get(key) for key in schema.PERSON.names} | {"place": place}
        )
    files = []
    for name, part in (("a", rows[:2]), ("b", rows[2:])):
        files.append(str(folder / f"{name}.arrow"))
        with pa.OSFile(files[-1], "wb") as sink, pa.ipc.new_stream(sink, ROW) as writer:
            writer.write_table(pa.Table.from_pylist(part, schema=ROW))
    shards.read_manifest.cache_clear()
    shards.mapped.cache_clear()
    manifest = shards.Manifest("arrow", files, [[2], [3]], CATEGORIES, "0")
    shards.write_manifest(manifest, folder / "train.shards")
    return folder / "train.shards"


def _outcome(file: Path, num_keypoints: int, reading: Reading) -> list[Any] | str:
    """The people in the order of the file, or the annotation that a refusal names."""
    reader = PeopleReader(source=open_source(file), prefix="x", num_keypoints=num_keypoints, reading=reading)
    try:
        chunks = list(reader.chunks(needs_keypoints=False))
    except UserError as error:
        assert "\n" not in str(error)
        return re.findall(r"annotation \d+", str(error))[0]
    rows = [(chunk.position[i], chunk.row(i)) for chunk in chunks for i in range(len(chunk))]
    people = [row for _, row in sorted(rows, key=lambda row: row[0])]
    return [row | {"file_name": Path(row["file_name"]).name} for row in people]


@pytest.mark.parametrize(
    "reading",
    [
        PLAIN,
        Reading(count=K, source=(2, -1, 0, 1)),
        Reading(categories=("dog",)),
        Reading(boxes="keypoints", box_margin=0.3),
        Reading(boxes="image"),
        Reading(threshold=0.5),
    ],
)
def test_both_forms_take_leave_out_and_refuse_the_same(tmp_path: Path, reading: Reading) -> None:
    rng = np.random.default_rng(len(repr(reading)))
    taken = refused = 0
    num_keypoints = len(reading.source or range(K))
    for number in range(75):
        people = _people(rng, 12, num_bad=number % 3)
        found = _outcome(_as_json(tmp_path, people), num_keypoints, reading)
        columns = _outcome(_as_shards(tmp_path, people), num_keypoints, reading)
        if number % 3 < 2:
            assert str(found) == str(columns), people
        else:  # each form names the fault that it comes to first
            assert isinstance(found, str) == isinstance(columns, str), people
        taken += len(found) if isinstance(found, list) else 0
        refused += isinstance(found, str)
    assert taken > 100 and (refused > 30 or reading.categories)


@pytest.mark.parametrize("num_keypoints", [17, 133])
def test_five_lists_of_a_whole_body_are_taken_alike(tmp_path: Path, num_keypoints: int) -> None:
    """v of hands and faces is a confidence in COCO-WholeBody; who lacks one of the lists has no 133 keypoints."""
    rng = np.random.default_rng(3)
    people = _people(rng, 8, 0)
    for person in people:
        lists = {name: (rng.integers(0, 90, 3 * count) + 0.5).tolist() for name, count in WHOLE_BODY.items()}
        person |= {"bbox": [1, 2, 3, 4], **lists, "keypoints": [1.0, 2.0, 2.0] * 17}
        person["face_kpts"][2] = 0.3
    found = [_outcome(write(tmp_path, people), num_keypoints, PLAIN) for write in (_as_json, _as_shards)]
    assert str(found[0]) == str(found[1]) and len(found[0]) > 2
    people[1] |= {"iscrowd": 0, "category_id": 4, "foot_kpts": None}
    found = [_outcome(write(tmp_path, people), num_keypoints, PLAIN) for write in (_as_json, _as_shards)]
    assert str(found[0]) == str(found[1]) and isinstance(found[0], str) == (num_keypoints == 133)


def test_scores_in_place_of_v_are_refused_in_one_line(tmp_path: Path) -> None:
    """They gave a loss and a gradient of 0 while the loss took v from 1 on."""
    people = [{"id": 7, "image_id": 0, "bbox": [1, 2, 3, 4], "keypoints": [1, 2, 0.87] * K, "category_id": 4}]
    for write in (_as_json, _as_shards):
        reader = PeopleReader(source=open_source(write(tmp_path, people)), prefix="x", num_keypoints=K)
        with pytest.raises(
            UserError, match=r"annotation 7: expected v of 0 .* found 0.87; .*--data.visibility_threshold"
        ):
            list(reader.chunks(needs_keypoints=True))


def test_a_point_that_no_float_holds_is_no_labeled_point() -> None:
    annotation = {"keypoints": [5, 6, 2, 10**400, 6, 2, 7, 8, 0, float("nan"), 1, 2, 9.5, 8, 1]}
    assert annotation_rules.labeled_points(annotation).tolist() == [[5, 6], [9.5, 8]]
