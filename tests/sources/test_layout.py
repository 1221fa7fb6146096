"""Data sets with columns of their own: the same people, the same bytes, the same AP as from the COCO folder."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from coco_ap import coco_ap
from datasets import ClassLabel, Features, Image, List, Value

from sapiens_accel.config.schema import AugmentConfig, DataConfig, EvalConfig, StageConfig
from sapiens_accel.data import build, loader
from sapiens_accel.data import people as coco
from sapiens_accel.data.augment import Augmenter
from sapiens_accel.data.dataset import TrainingPeople
from sapiens_accel.data.people import People
from sapiens_accel.data.sampling import Share
from sapiens_accel.errors import UserError
from sapiens_accel.evaluation.predict import Predictions
from sapiens_accel.pose.skeleton import COCO17
from sapiens_accel.sources import columns as layout
from sapiens_accel.sources import images as photo
from sapiens_accel.sources import synthetic

FILES = {"train": "annotations/person_keypoints_train2017.json", "val": "annotations/person_keypoints_val2017.json"}
Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn people; one is a crowd, one a dog, and one has no keypoints."""
    root = synthetic.write(tmp_path_factory.mktemp("data") / "drawn", num_train=20, num_unlabelled=1, num_val=8)
    for name in FILES.values():
        tree = json.loads((root / name).read_text())
        tree["categories"].append({"id": 3, "name": "dog"})
        tree["annotations"][1]["iscrowd"] = 1
        tree["annotations"][2] |= {"category_id": 3, "keypoints": [0] * 51}
        tree["annotations"][4] |= {"keypoints": [0] * 51, "num_keypoints": 0}
        (root / name).write_text(json.dumps(tree))
    return root


def _pictures(root: Path, split: str) -> Rows:
    """A row for each image, with its annotations."""
    tree = json.loads((root / FILES[split]).read_text())
    of = {image["id"]: [a for a in tree["annotations"] if a["image_id"] == image["id"]] for image in tree["images"]}
    bytes_of = lambda image: (root / f"{split}2017" / image["file_name"]).read_bytes()  # noqa: E731
    return [
        image | {"image": {"bytes": bytes_of(image), "path": None}, "of": of[image["id"]]} for image in tree["images"]
    ]


def _triples(person: dict[str, Any]) -> list[list[float]]:
    return np.reshape(person["keypoints"], (-1, 3)).tolist()


def _objects(root: Path, split: str) -> pa.Table:
    """As most of the Hub: `objects` with a list for each field, a ClassLabel, keypoints as triples."""
    rows = [
        {"image": one["image"], "image_id": one["id"], "width": one["width"], "height": one["height"],
         "objects": {"id": [a["id"] for a in one["of"]], "bbox": [a["bbox"] for a in one["of"]],
                     "area": [a["area"] for a in one["of"]], "is_crowd": [bool(a["iscrowd"]) for a in one["of"]],
                     "category": [a["category_id"] for a in one["of"]], "keypoints": [_triples(a) for a in one["of"]]}}
        for one in _pictures(root, split)
    ]  # fmt: skip
    inside = {
        "id": List(Value("int64")), "bbox": List(List(Value("float64"), length=4)), "area": List(Value("float64")),
        "is_crowd": List(Value("bool")), "category": List(ClassLabel(names=["none", "person", "cat", "dog"])),
        "keypoints": List(List(List(Value("float64")))),
    }  # fmt: skip
    sizes = {name: Value("int64") for name in ("image_id", "width", "height")}
    features = Features({"image": Image(), **sizes, "objects": inside})
    made = datasets.Dataset.from_list(rows, features=features)
    return made.data.table.replace_schema_metadata(made.features.arrow_schema.metadata)


def _own_names(root: Path, split: str) -> pa.Table:
    """A list of people, by other names; those that are not told are None."""
    people = lambda one: [{"nr": a["id"], "xywh": a["bbox"], "points": a["keypoints"], "crowd": a["iscrowd"],  # noqa: E731
                           "kind": a["category_id"] if a["category_id"] == 1 else 0, "area": a["area"]}
                          for a in one["of"]]  # fmt: skip
    rows = [{"picture": one["image"], "number": one["id"], "whom": people(one)} for one in _pictures(root, split)]
    return pa.Table.from_pylist(rows)


OWN = {"image_id": "number", "people": "whom", "id": "nr", "bbox": "xywh", "keypoints": "points", "iscrowd": "crowd",
       "category_id": "kind"}  # fmt: skip


def _rows(root: Path, split: str) -> pa.Table:
    """A row for each person, with the image in it."""
    rows = [
        {"image": one["image"]["bytes"], "image_id": one["id"], "filename": one["file_name"], "ann_id": a["id"],
         "bbox": a["bbox"], "keypoints": a["keypoints"], "iscrowd": a["iscrowd"], "area": a["area"]}
        for one in _pictures(root, split) for a in one["of"] if a["category_id"] == 1
    ]  # fmt: skip
    rows[3:3] = [{"image": rows[3]["image"], "image_id": rows[3]["image_id"]}]  # of nobody
    return pa.Table.from_pylist(rows)


def _lists(root: Path, split: str) -> pa.Table:
    """Lists as columns of their own."""
    table = _objects(root, split)
    inside = table.column("objects").combine_chunks()
    columns = {f.name: inside.field(f.name) for f in inside.type if f.name != "category"}
    people = [[a["category_id"] for a in one["of"]] for one in _pictures(root, split)]
    kinds = pa.array([[0 if kind == 3 else 1 for kind in one] for one in people])
    made = {"img": table.column("image"), "image_id": table.column("image_id"), **columns, "label": kinds}
    told = json.dumps({"info": {"features": {"label": {"feature": {"names": ["dog", "person"], "_type": "ClassLabel"},
                                                       "_type": "List"}}}})  # fmt: skip
    return pa.table(made).replace_schema_metadata({"huggingface": told})


LAYOUTS: dict[str, tuple[Callable[[Path, str], pa.Table], dict[str, str]]] = {
    "objects": (_objects, {}),
    "own": (_own_names, OWN),
    "rows": (_rows, {}),
    "lists": (_lists, {}),
}


@pytest.fixture(scope="module", params=LAYOUTS)
def theirs(request: pytest.FixtureRequest, drawn: Path) -> tuple[str, Path]:
    folder = drawn.parent / request.param
    folder.mkdir()
    for split, (made, _) in itertools.product(FILES, [LAYOUTS[request.param]]):
        table, half = made(drawn, split), 4
        for number, part in enumerate((table.slice(0, half), table.slice(half))):
            pq.write_table(part, folder / f"{split}-{number}.parquet", row_group_size=2)
    return request.param, folder


def _config(root: Path, cache: Path, **changes: Any) -> DataConfig:
    return DataConfig(root=str(root), cache_dir=str(cache), input_hw=(64, 48), **changes)


def _marks(people: People, count: int) -> list[dict[str, Any]]:
    names = ("image_id", "ann_id", "box_xywh", "area", "keypoints")
    found = [{key: people.rows[index][key] for key in names} for index in range(count)]
    return sorted(found, key=lambda row: row["ann_id"])


def _batches(found: DataConfig) -> bytes:
    augmenter = Augmenter(config=AugmentConfig(), skeleton=COCO17, input_hw=(64, 48))
    sets = build.open_people(found, COCO17, unlabeled=False)
    people = TrainingPeople(sets, augmenter, found, StageConfig(global_batch=6), seed=3, stage="phase2")
    share = Share(rank=0, num_ranks=1, micro_batch=6, accumulation=1)
    batches = loader.batches(people, share, range(3), 0, torch.device("cpu"))
    return b"".join(part.numpy().tobytes() for b in batches for part in (*b.labeled.view, *b.labeled[1:]))


def test_people_batches_and_ap_are_those_of_the_folder(theirs: tuple[str, Path], drawn: Path, tmp_path: Path) -> None:
    name, root = theirs
    ours = _config(root, tmp_path, columns=LAYOUTS[name][1])
    folder = _config(drawn, tmp_path)
    a, b = (build.open_people(one, COCO17, unlabeled=False) for one in (ours, folder))
    assert len(a.train) == len(b.train) == 17 and len(a.val) == len(b.val) == 5
    assert _marks(a.train, 17) == _marks(b.train, 17) and _marks(a.val, 5) == _marks(b.val, 5)
    assert _batches(ours) == _batches(folder)
    streamed = build.open_people(
        _config(root, tmp_path, columns=LAYOUTS[name][1], streaming=True), COCO17, unlabeled=False
    )
    assert _marks(streamed.train, 17) == _marks(b.train, 17)
    scores = []
    for people in (a.val, b.val):
        keypoints = coco.keypoints_of(people.rows)
        noise = np.random.default_rng(0).normal(scale=4.0, size=keypoints[..., :2].shape)
        predicted = Predictions(points_xy=keypoints[..., :2] + noise, scores=np.full(keypoints.shape[:2], 0.9))
        scores.append(coco_ap(predicted, people, COCO17, DataConfig(), EvalConfig()))
    assert scores[0] == scores[1] and 0.05 < scores[0]["AP"] < 0.95


def test_images_are_theirs(theirs: tuple[str, Path], drawn: Path, tmp_path: Path) -> None:
    name, root = theirs
    tree = json.loads((drawn / FILES["train"]).read_text())
    names = {image["id"]: image["file_name"] for image in tree["images"]}
    for streaming in (False, True):
        found = _config(root, tmp_path, columns=LAYOUTS[name][1], streaming=streaming)
        people = build.open_people(found, COCO17, unlabeled=False).train
        for index in range(len(people)):
            row = people.rows[index]
            expected = (drawn / "train2017" / names[row["image_id"]]).read_bytes()
            assert bytes(photo.read_bytes(people.root / row["file_name"])) == expected


# ---- What is refused


def _refused(tmp_path: Path, table: pa.Table, *named: str, **changes: Any) -> None:
    folder = tmp_path / f"set{len(list(tmp_path.iterdir()))}"
    folder.mkdir()
    for split in FILES:
        pq.write_table(table, folder / f"{split}.parquet")
    with pytest.raises(UserError) as caught:
        build.open_people(_config(folder, tmp_path / "cache", **changes), COCO17, unlabeled=False)
    said = str(caught.value)
    assert "\n" not in said and [word for word in named if word not in said] == [], said


def test_what_is_missing_is_one_line_with_what_was_found_and_what_to_do(drawn: Path, tmp_path: Path) -> None:
    table = _objects(drawn, "val")
    (tmp_path / "cache").mkdir()
    found = ("found: ", "--data.columns '{", "THEIR_NAME}'", "train.parquet")
    _refused(tmp_path, table.rename_columns(["photo", *table.column_names[1:]]), "no column 'image'", "photo", *found)
    _refused(tmp_path, table.rename_columns([*table.column_names[:-1], "things"]), "no column 'bbox'",
             "things (id, bbox, area, is_crowd, category, keypoints)", *found)  # fmt: skip
    objects = table.column("objects").combine_chunks()
    without = pa.StructArray.from_arrays([objects.field("bbox")], names=["bbox"])
    _refused(tmp_path, table.set_column(4, "objects", without), "no column 'keypoints'", "objects (bbox)", *found)
    _refused(tmp_path, table, "--data.columns", "'boxs'", "bbox", columns={"boxs": "bbox"})
    _refused(tmp_path, table, "no column 'bbox'", "looked for rectangle", columns={"bbox": "rectangle"})
    _refused(tmp_path, table, "{area: size}", "no such column", columns={"area": "size"})


def test_odd_values_are_one_line(drawn: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    picture = {"image": _pictures(drawn, "val")[0]["image"]}

    def one(**objects: Any) -> pa.Table:
        fine = {"bbox": [[1.0, 2, 3, 4]], "keypoints": [[[1.0, 2.0, 2.0]] * 17]}
        return pa.Table.from_pylist([picture | {"objects": fine | objects}])

    _refused(tmp_path, one(keypoints=[[[1.0, 2, 2]]] * 2), "'keypoints' has 2 entries", "'bbox' has 1")
    _refused(tmp_path, one(category=["person"]), "'category_id' is string", "ClassLabel")
    _refused(tmp_path, one(bbox=[["1", "2", "3", "4"]]), "'bbox' holds string", "numbers")
    _refused(tmp_path, one(keypoints=[[[1.0, 2.0]] * 17]), "points of 2 numbers", "x, y, v")
    _refused(tmp_path, pa.Table.from_pylist([picture | {"objects": 3}]), "column 'objects' is int64", "bbox")


def test_what_has_our_names_is_not_touched() -> None:
    """Our own shards are read without a copy: also what no layout knows of."""
    person = pa.struct([("bbox", pa.list_(pa.float64())), ("keypoints", pa.list_(pa.float64())), ("place", pa.int64())])
    schema = pa.schema([("image", pa.binary()), ("people", pa.list_(person))])
    found = layout.infer_mapping(schema, {}, "x", labeled=True)
    assert found.is_ours and found.form == "ours"
    table = pa.Table.from_pylist([{"image": b"", "people": [{"bbox": [1.0], "keypoints": [], "place": 3}]}], schema)
    assert layout.to_image_table(table, found) is table
