"""Shards: what a COCO folder becomes, and that everything reads the same out of it."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import datasets
import forks
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from coco_ap import coco_ap
from torch import Tensor

from sapiens_accel.config.schema import AugmentConfig, DataConfig, EvalConfig, StageConfig, TeacherConfig
from sapiens_accel.data import build, loader
from sapiens_accel.data import people as coco
from sapiens_accel.data.augment import Augmenter
from sapiens_accel.data.dataset import Sets, TrainingPeople
from sapiens_accel.data.people import People
from sapiens_accel.data.sampling import Share
from sapiens_accel.errors import UserError
from sapiens_accel.evaluation import boxes as detections
from sapiens_accel.evaluation.ground_truth import read_ground_truth
from sapiens_accel.evaluation.predict import Predictions
from sapiens_accel.pose.skeleton import COCO17, WHOLEBODY133
from sapiens_accel.sources import convert, discover, shards, synthetic
from sapiens_accel.sources import images as photo

TRAIN, VAL = (f"annotations/person_keypoints_{split}2017.json" for split in ("train", "val"))
REPOSITORY = Path(__file__).resolve().parents[2]
FORMS = ("parquet", "webdataset")
MARKS = {"image_id", "ann_id", "box_xywh", "area", "keypoints"}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn people; annotations in another order than images; crowds, somebody without keypoints, without an area."""
    root = synthetic.write(tmp_path_factory.mktemp("data") / "drawn", num_train=20, num_unlabelled=15, num_val=8)
    for name in (TRAIN, VAL):
        tree = json.loads((root / name).read_text())
        people = tree["annotations"] = tree["annotations"][::-2] + tree["annotations"][::2]
        people = tree["annotations"] = list({person["id"]: person for person in people}.values())
        people[1] |= {"iscrowd": 1, "segmentation": {"counts": [1], "size": [1, 1]}}
        people[2] |= {"keypoints": [0] * 51, "num_keypoints": 0}
        people[4] |= {
            "keypoints": [number + 0.125 if i % 3 < 2 else number for i, number in enumerate(people[4]["keypoints"])]
        }
        del people[3]["area"]
        (root / name).write_text(json.dumps(tree))
    return root


@pytest.fixture(scope="module")
def shard(drawn: Path) -> dict[str, Path]:
    """The same in shards of a few images each, by form; `datasets` has written the Arrow files."""
    made = {}
    for form in FORMS:
        made[form] = drawn.parent / form
        convert.main(_words(drawn, made[form], "--to", form))
    made["arrow"] = drawn.parent / "arrow"
    for split in ("train", "validation", "unlabelled"):
        files = sorted(map(str, made["parquet"].glob(f"data/{split}-*")))
        cached = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(drawn.parent / "hf"))
        cached.save_to_disk(str(made["arrow"] / split), num_shards=2)
    return made


def _words(root: Path, out: Path, *more: str) -> list[str]:
    return ["convert", "coco", str(root), str(out), "--shard_mb", "0.1", "--group_rows", "2", *more]


def _config(root: Path, cache: Path, **changes: Any) -> DataConfig:
    options: dict[str, Any] = {"unlabelled_min_side": 0.0, "input_hw": (64, 48)} | changes
    return DataConfig(root=str(root), cache_dir=str(cache), **options)


def _open(root: Path, cache: Path, **changes: Any) -> Sets:
    return build.open_people(_config(root, cache, **changes), COCO17, unlabeled=True)


def _marks(people: People) -> list[dict[str, Any]]:
    return [{key: row[key] for key in MARKS} | {"name": Path(row["file_name"]).name} for row in people.rows]


def _bytes(tree: Any) -> bytes:
    if isinstance(tree, Tensor):
        return tree.numpy().tobytes()
    return b"".join(map(_bytes, tree)) if tree is not None else b""


# ---- The same people, the same bytes, the same AP


@pytest.mark.parametrize("form", [*FORMS, "arrow"])
@pytest.mark.parametrize("changes", [{}, {"labels": 5}, {"labels": "40%", "labels_by": "random"}])
def test_rows_and_images_are_those_of_the_folder(
    drawn: Path, shard: dict[str, Path], tmp_path: Path, form: str, changes: dict[str, Any]
) -> None:
    ours, theirs = _open(shard[form], tmp_path, **changes), _open(drawn, tmp_path, **changes)
    assert theirs.unlabeled is not None and ours.unlabeled is not None
    for mine, other in ((ours.train, theirs.train), (ours.val, theirs.val), (ours.unlabeled, theirs.unlabeled)):
        assert _marks(mine) == _marks(other) and len(mine) > 4
        for a, b in zip(mine.rows["file_name"], other.rows["file_name"], strict=True):
            assert bytes(photo.read_bytes(mine.root / a)) == (other.root / b).read_bytes()
    if not changes:
        ids = [person["id"] for person in json.loads((drawn / TRAIN).read_text())["annotations"]]
        assert ours.train.rows["ann_id"][:] == [one for i, one in enumerate(ids) if i not in (1, 2)]
        assert ids != sorted(ids), "their order is not that of the images"


@pytest.mark.parametrize("form", [*FORMS, "arrow"])
def test_batches_are_the_same_bytes(drawn: Path, shard: dict[str, Path], tmp_path: Path, form: str) -> None:
    plan = StageConfig(global_batch=6, teacher=TeacherConfig(ratio=2, cutout=3))
    share = Share(rank=0, num_ranks=1, micro_batch=3, accumulation=2)
    found = []
    for root, workers in ((drawn, 0), (shard[form], 0), (shard[form], 2)):
        config = _config(root, tmp_path)
        augmenter = Augmenter(config=AugmentConfig(), skeleton=COCO17, input_hw=(64, 48))
        people = TrainingPeople(_open(root, tmp_path), augmenter, config, plan, seed=3, stage="ssl")
        found.append(_bytes(list(loader.batches(people, share, range(4), workers, torch.device("cpu")))))
    assert found[0] == found[1] == found[2] and len(found[0]) > 100_000


@pytest.mark.parametrize("form", [*FORMS, "arrow"])
def test_ap_is_the_same_to_the_last_digit(drawn: Path, shard: dict[str, Path], tmp_path: Path, form: str) -> None:
    metrics = []
    for root in (drawn, shard[form]):
        people = build.open_split(_config(root, tmp_path), COCO17, "val")
        keypoints = coco.keypoints_of(people.rows)
        noise = np.random.default_rng(0).normal(scale=4.0, size=keypoints[..., :2].shape)
        predicted = Predictions(points_xy=keypoints[..., :2] + noise, scores=np.full(keypoints.shape[:2], 0.9))
        metrics.append(coco_ap(predicted, people, COCO17, DataConfig(), EvalConfig()))
    assert metrics[0] == metrics[1] and 0.05 < metrics[0]["AP"] < 0.95


@pytest.mark.parametrize("form", FORMS)
def test_the_json_comes_back(drawn: Path, shard: dict[str, Path], tmp_path: Path, form: str) -> None:
    """All that AP needs: ids, crowds, areas and their absence, boxes, sizes, in the order of the file."""
    people = build.open_split(_config(shard[form], tmp_path), COCO17, "val")
    ours, theirs = people.source.read(), json.loads((drawn / VAL).read_text())
    kept = ("id", "image_id", "category_id", "iscrowd", "area", "bbox", "keypoints")
    assert ours["annotations"] == [{"iscrowd": 0} | {k: p[k] for k in kept if k in p} for p in theirs["annotations"]]
    assert [i | {"file_name": Path(i["file_name"]).name} for i in ours["images"]] == theirs["images"]
    assert people.source.images() == ours["images"]
    assert ours["categories"] == theirs["categories"]
    copies = [replace(people, annotations=file) for file in (people.annotations, drawn / VAL)]
    truth = [read_ground_truth(copy, 17).dataset for copy in copies]
    assert truth[0] == truth[1]


def test_a_detector_s_boxes_are_looked_for_in_shards(drawn: Path, shard: dict[str, Path], tmp_path: Path) -> None:
    found = [{"image_id": p["image_id"], "category_id": 1, "bbox": p["bbox"], "score": 0.5}
             for p in json.loads((drawn / VAL).read_text())["annotations"]]  # fmt: skip
    (tmp_path / "boxes.json").write_text(json.dumps(found))
    people = build.open_split(_config(shard["parquet"], tmp_path), COCO17, "val")
    boxes = detections.load_boxes(str(tmp_path / "boxes.json"), people)
    assert len(boxes) == len(found) and all(shards.find_record(boxes.root / name) for name in boxes.file_names)
    assert photo.read_image(boxes.root / boxes.file_names[0]).shape[2] == 3


def test_five_lists_of_whole_bodies_survive(drawn: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(drawn, tmp_path / "whole"))
    rng = np.random.default_rng(1)
    for name in (TRAIN, VAL):
        tree = json.loads((root / name).read_text())
        for person in tree["annotations"]:
            for key, count in (("foot_kpts", 6), ("face_kpts", 68), ("lefthand_kpts", 21), ("righthand_kpts", 21)):
                points = np.concatenate([person["bbox"][:2] + rng.random((count, 2)) * person["bbox"][2:],
                                         rng.integers(0, 3, (count, 1))], axis=1)  # fmt: skip
                person[key] = points.ravel().tolist()
        (root / name).write_text(json.dumps(tree))
    convert.main(_words(root, tmp_path / "out"))
    for count, skeleton in ((133, WHOLEBODY133), (17, COCO17)):
        ours, theirs = (build.open_split(_config(r, tmp_path), skeleton, "val") for r in (tmp_path / "out", root))
        assert _marks(ours) == _marks(theirs) and coco.keypoints_of(ours.rows).shape[1] == count


# ---- What others see


def test_plain_load_dataset_sees_images_people_and_names(drawn: Path, shard: dict[str, Path], tmp_path: Path) -> None:
    loaded: Any = datasets.load_dataset(str(shard["parquet"]), cache_dir=str(tmp_path))
    assert set(loaded) == {"train", "validation", "unlabelled"}
    tree = json.loads((drawn / TRAIN).read_text())
    assert loaded["train"]["image_id"][:] == [image["id"] for image in tree["images"]]
    for row, image in zip(loaded["train"], tree["images"], strict=True):
        assert row["image"].size == (image["width"], image["height"]) and row["file_name"] == image["file_name"]
        ids = [person["id"] for person in tree["annotations"] if person["image_id"] == image["id"]]
        assert [person["id"] for person in row["people"]] == ids
    names: Any = datasets.load_dataset(str(shard["parquet"]), "categories", cache_dir=str(tmp_path))["train"]
    assert names[0]["keypoints"] == tree["categories"][0]["keypoints"]


def test_shards_and_groups_are_as_large_as_asked(shard: dict[str, Path]) -> None:
    files = sorted(shard["parquet"].glob("data/train-*.parquet"))
    assert len(files) > 2 and files[0].name == f"train-00000-of-{len(files):05d}.parquet"
    assert all(pq.ParquetFile(file).metadata.row_group(0).num_rows <= 2 for file in files)
    assert max(file.stat().st_size for file in files) < 0.2e6


@pytest.mark.parametrize("form", FORMS)
def test_images_of_other_suffixes_stay_and_other_files_are_counted(
    drawn: Path, tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a tar a member is an image by its suffix; in a folder by its content."""
    root = Path(shutil.copytree(drawn, tmp_path / "odd"))
    tree = json.loads((root / TRAIN).read_text())
    for image, suffix in zip(tree["images"], (".jfif", "", ".json", ".part.bin"), strict=False):
        name = Path(image["file_name"]).stem + suffix
        (root / "train2017" / image["file_name"]).rename(root / "train2017" / name)
        image["file_name"] = name
    (root / TRAIN).write_text(json.dumps(tree))
    (root / "annotations" / "person_boxes_unlabeled2017.json").unlink()
    for name in ("Thumbs.db", "notes"):
        (root / "unlabeled2017" / name).write_text("")
    convert.main(_words(root, tmp_path / "out", "--to", form))
    assert "unlabelled: left out: 2 files with other suffixes (.db, no suffix)\n" in capsys.readouterr().out
    of_folder, of_shards = (_open(one, tmp_path / one.name / "cache") for one in (root, tmp_path / "out"))
    assert _marks(of_shards.train) == _marks(of_folder.train)


def test_images_are_where_they_were(shard: dict[str, Path], tmp_path: Path) -> None:
    """A tar and Arrow files are read in place: what is in the cache is small."""
    for form in ("webdataset", "arrow"):
        _open(shard[form], tmp_path / form)
        pictures = sum(file.stat().st_size for file in shard[form].rglob("*.*"))
        cached = sum(file.stat().st_size for file in (tmp_path / form / "sources").rglob("*") if file.is_file())
        assert cached < pictures / 10 and not (tmp_path / form / "datasets").exists()


def test_another_shard_is_another_source(shard: dict[str, Path], drawn: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(shard["webdataset"], tmp_path / "copy"))
    first = _open(root, tmp_path / "cache")
    last = max(root.glob("data/train-*.tar"))
    last.unlink()
    assert len(_open(root, tmp_path / "cache").train) < len(first.train)


def test_files_of_one_name_on_a_server_that_gives_no_versions_are_two_sources(tmp_path: Path) -> None:
    """Else the second data set would get the people of the first out of the cache."""
    digests = []
    for folder in ("a", "b"):
        with fsspec.open(f"memory://{folder}/train-0.parquet", "wb") as file:
            people = [{"bbox": [1.0] * 4, "keypoints": [1.0] * 51}]
            pq.write_table(pa.table({"image": [b"same size"], "people": [people]}), file)
        manifest = discover.find_folder(f"memory://{folder}", tmp_path, streaming=True) / "train.shards"
        digests.append(shards.read_manifest(manifest).digest)
    assert digests[0] != digests[1]


@pytest.mark.slow
def test_a_data_set_of_the_hub_opens_without_a_network_once_it_is_in_the_cache(
    shard: dict[str, Path], drawn: Path, tmp_path: Path
) -> None:
    """The Hub's own cache, as a download leaves it, and HF_HUB_OFFLINE."""
    repository = tmp_path / "hub" / "datasets--someone--people"
    shutil.copytree(shard["parquet"], repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    script = (
        "import json, sys\n"
        "from sapiens_accel.data import build\n"
        "from sapiens_accel.sources.images import read_image\n"
        "from sapiens_accel.config.schema import DataConfig\n"
        "from sapiens_accel.pose.skeleton import COCO17\n"
        "people = build.open_split(DataConfig(root=sys.argv[1]), COCO17, 'val')\n"
        "image = read_image(people.root / people.rows[0]['file_name'])\n"
        "print(json.dumps([people.rows['ann_id'][:], len(image)]))"
    )
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub")}
    try:
        done = _run(["-c", script], tmp_path / "cache", "hf://someone/people")
        absent = _run(["-c", script], tmp_path / "cache", "hf://someone/else")
    finally:
        del os.environ["HF_HUB_OFFLINE"], os.environ["HF_HUB_CACHE"]
    assert done.returncode == 0, done.stderr
    ids, height = json.loads(done.stdout.splitlines()[-1])
    theirs = build.open_split(_config(drawn, tmp_path), COCO17, "val")
    assert ids == theirs.rows["ann_id"][:] and height > 100
    assert "UserError: --data.root hf://someone/else" in absent.stderr


# ---- Whole runs


def _run(program: list[str], cache: Path, *words: object) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "SAPIENS_ACCEL_CACHE": str(cache)}
    if program[0] == "-c":  # a fork has the Hub's variables of when it was imported
        return subprocess.run([sys.executable, *program, *map(str, words)], capture_output=True, text=True, env=env)
    return forks.run([*program, *words], env=env)


def test_a_run_from_parquet_has_the_losses_of_the_folder(drawn: Path, shard: dict[str, Path], tmp_path: Path) -> None:
    words = ["--recipe", "demo", "--stage", "phase2", "--phase2.steps", 3, "--phase2.global_batch", 4]
    words += ["--model.name", "sapiens_tiny", "--data.input_hw", "[64,48]", "--data.num_workers", 1]
    words += ["--eval.num_pictures", 1, "--log_every", 1, "--report_to", "none"]
    lines = []
    for name, root in (("folder", drawn), ("parquet", shard["parquet"])):
        done = _run(["train.py"], tmp_path / "cache", *words, "--data.root", root, "--output_dir", tmp_path / name)
        assert done.returncode == 0, done.stderr
        found = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        kept = ("loss", "grad_norm", "AP", "AR")
        lines.append([{key: line[key] for key in kept if key in line} for line in found])
    assert lines[0] == lines[1] and len(lines[0]) >= 4 and lines[0][0]["loss"] > 0


def test_the_command_writes_all_or_nothing(drawn: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(drawn, tmp_path / "root"))
    gone = max((root / "val2017").iterdir())
    gone.unlink()
    with pytest.raises(UserError, match=re.escape(str(gone))):
        convert.main(_words(root, tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["root"]
    done = _run(["-m", "sapiens_accel.data"], tmp_path, *_words(drawn, tmp_path / "out"))
    assert done.returncode == 0 and f"written: {tmp_path / 'out'}" in done.stdout, done.stderr
    with pytest.raises(UserError, match="there already"):
        convert.main(_words(drawn, tmp_path / "out"))


@pytest.mark.parametrize("form", ["parquet", "webdataset"])
def test_a_json_of_odd_numbers_is_converted_or_named(drawn: Path, tmp_path: Path, form: str) -> None:
    """Categories that are null, 0 or {} are none; an integer that no float holds is in one line."""
    root = Path(shutil.copytree(drawn, tmp_path / "root"))
    file = root / "annotations" / "person_keypoints_train2017.json"
    tree = json.loads(file.read_text())
    for number, none in enumerate((None, 0.0, {})):
        file.write_text(json.dumps(tree | {"categories": none}))
        convert.main([*_words(root, tmp_path / f"out{number}"), "--to", form])
    tree["annotations"][2]["bbox"][0] = 10**400
    file.write_text(json.dumps(tree))
    with pytest.raises(UserError, match=r"annotations\[2\]: .*too large") as caught:
        convert.main([*_words(root, tmp_path / "out"), "--to", form])
    assert "\n" not in str(caught.value)


# ---- What is broken


def _refused(root: Path, cache: Path, *named: str, **changes: Any) -> None:
    with pytest.raises(UserError) as caught:
        build.open_people(_config(root, cache, **changes), COCO17, unlabeled=False)
    said = str(caught.value)
    assert "\n" not in said and all(word in said for word in named), said


def test_a_cut_shard_is_named(shard: dict[str, Path], tmp_path: Path) -> None:
    for form, cut in (("parquet", 0.5), ("webdataset", 0.5), ("arrow", 0.01)):
        root = Path(shutil.copytree(shard[form], tmp_path / form))
        file = min(root.rglob("train*/*.arrow" if form == "arrow" else "data/train-*"))
        file.write_bytes(file.read_bytes()[: int(file.stat().st_size * cut)])
        _refused(root, tmp_path / "cache", str(file))


def _table(folder: Path, **columns: Any) -> Path:
    (folder / "data").mkdir(parents=True)
    for split in ("train", "val"):
        pq.write_table(pa.table(columns), folder / "data" / f"{split}-0.parquet")
    return folder


def test_a_source_of_other_content_is_refused_in_a_line(tmp_path: Path) -> None:
    cache, picture = tmp_path / "cache", [{"bytes": b"no image", "path": "a.jpg"}]
    person = {"id": 7, "bbox": [1.0, 2, 3, 4], "keypoints": [1.0] * 51}
    _refused(_table(tmp_path / "a", other=[1]), cache, "no column 'image'", "other")
    _refused(
        _table(tmp_path / "b", image=picture, people=[[person, person | {"id": 8, "keypoints": [1.0, 2, 2]}]]),
        cache,
        "8",
        "51",
        "found 3",
    )
    _refused(
        _table(tmp_path / "c", image=picture, people=[[person, person | {"id": 8, "bbox": [1.0, 2, 3]}]]),
        cache,
        "8",
        "bbox",
    )
    _refused(_table(tmp_path / "d", image=picture, people=[[person]]), cache, "does not decode", "train.shards/0/0")
    odd = _table(tmp_path / "e", image=picture)
    for file in odd.rglob("*.parquet"):
        file.rename(file.with_name(f"part{file.name[0]}.parquet"))
    _refused(odd, cache, "'train'", "part")
    _refused(odd, cache, "'train'", "part", streaming=True)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"bbox": [NAN, 1.0, 9, 9]}, "'bbox' (sides of 1e-07 to 1e+07), found [nan"),
        ({"bbox": [1.0, 1, INF, 9]}, "'bbox' (sides of 1e-07 to 1e+07), found [1.0, 1.0, inf"),
        ({"bbox": [1.0, 1, 2e7, 9]}, "'bbox'"),
        ({"keypoints": [-1e12, *[1.0] * 50]}, "'keypoints'"),
        ({"keypoints": [NAN, *[1.0] * 50]}, "'keypoints'"),
        ({"area": NAN}, "'area' of a number from 0 up, found nan"),
        ({"area": -4.0}, "'area' of a number from 0 up, found -4.0"),
        ({"iscrowd": 3}, "'iscrowd' of 0 or 1, found 3"),
    ],
)
def test_numbers_in_shards_keep_the_rules_of_a_json(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    """Only of those who count is anything asked: a crowd may have what it likes."""
    picture = [{"bytes": cv2.imencode(".jpg", np.zeros((50, 50, 3), np.uint8))[1].tobytes(), "path": "a.jpg"}]
    person = {"id": 7, "bbox": [1.0, 2, 30, 40], "area": 90.0, "iscrowd": 0, "keypoints": [1.0] * 51}
    whole = _table(tmp_path / "whole", image=picture, people=[[person, {**person, "id": 8, **change}]])
    _refused(whole, tmp_path / "cache", "annotation 8", named)
    crowd = {**person, "id": 8, **change, "iscrowd": 1}
    config = DataConfig(root=str(_table(tmp_path / "crowd", image=picture, people=[[person, crowd]])))
    config = replace(config, cache_dir=str(tmp_path / "cache"))
    assert build.open_people(config, COCO17, unlabeled=False).train.rows["ann_id"][:] == [7]


def test_a_tar_without_images_or_sense_is_refused(tmp_path: Path) -> None:
    def tar(name: str, **members: bytes) -> Path:
        root = tmp_path / name
        root.mkdir()
        with tarfile.open(root / "train-0.tar", "w") as file:
            for member, content in members.items():
                entry = tarfile.TarInfo(member.replace("_", "."))
                entry.size = len(content)
                file.addfile(entry, io.BytesIO(content))
        return root

    _refused(tar("alone", a_json=b"{}"), tmp_path, "train-0.tar", "a.json", "no image")
    _refused(tar("text", a_jpg=b"x", a_json=b"{"), tmp_path, "train-0.tar", "a.json")
    _refused(tar("list", a_jpg=b"x", a_json=b"[1]"), tmp_path, "train-0.tar", "a.json")
    _refused(tar("id", a_jpg=b"x", a_json=b'{"people": [{"id": "one"}]}'), tmp_path, "whole number", "'one'")


def test_streaming_needs_shards(drawn: Path, shard: dict[str, Path], tmp_path: Path) -> None:
    _refused(drawn, tmp_path, "--data.streaming", "shards", streaming=True)
    _refused(shard["parquet"], tmp_path, "--data.labels", "streaming", streaming=True, labels=5)
