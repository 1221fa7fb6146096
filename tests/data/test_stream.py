"""Streaming: everybody once an epoch whatever processes and workers do, and a run that goes on where it stopped."""

import itertools
import json
import os
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import forks
import numpy as np
import pytest
import torch

from sapiens_accel.config.schema import AugmentConfig, DataConfig, StageConfig, TeacherConfig
from sapiens_accel.data import build, loader
from sapiens_accel.data import streaming as stream
from sapiens_accel.data.augment import Augmenter
from sapiens_accel.data.dataset import Sets, TrainingPeople
from sapiens_accel.data.sampling import Share
from sapiens_accel.errors import UserError
from sapiens_accel.pose.skeleton import COCO17
from sapiens_accel.sources import convert, shards, synthetic
from sapiens_accel.sources import images as photo

REPOSITORY = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
PEOPLE, BATCH = 48, 8


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 labeled people in row groups of two images."""
    folder = tmp_path_factory.mktemp("data")
    drawn = synthetic.write(folder / "drawn", num_train=PEOPLE, num_unlabelled=20, num_val=4)
    words = ["convert", "coco", str(drawn), str(folder / "parquet"), "--shard_mb", "0.2", "--group_rows", "2"]
    convert.main(words)
    convert.main([*words[:3], str(folder / "tar"), "--to", "webdataset"])
    return folder / "parquet"


def _config(root: Path, **changes: Any) -> DataConfig:
    options: dict[str, Any] = {"unlabelled_min_side": 0.0, "input_hw": (64, 48), "streaming": True} | changes
    return DataConfig(root=str(root), cache_dir=str(root.parent / "cache"), **options)


@pytest.fixture(scope="module")
def sets(root: Path) -> Sets:
    return build.open_people(_config(root), COCO17, unlabeled=True)


def _people(sets: Sets, config: DataConfig, seed: int = 0, **plan: Any) -> TrainingPeople:
    augmenter = Augmenter(config=AugmentConfig(), skeleton=COCO17, input_hw=config.input_hw)
    return TrainingPeople(sets, augmenter, config, StageConfig(global_batch=BATCH, **plan), seed=seed, stage="phase2")


def _share(rank: int = 0, num_ranks: int = 1, accumulation: int = 1) -> Share:
    micro_batch = BATCH // num_ranks // accumulation
    return Share(rank=rank, num_ranks=num_ranks, micro_batch=micro_batch, accumulation=accumulation)


def _ids(sets: Sets, config: DataConfig, steps: range, share: Share | None = None, workers: int = 0) -> list[list[int]]:
    """The annotations of each micro-batch of a rank."""
    return [
        b.labeled.ann_id.tolist() for b in loader.batches(_people(sets, config), share or _share(), steps, workers, CPU)
    ]


def _flat(lists: Iterable[list[Any]]) -> list[Any]:
    return list(itertools.chain.from_iterable(lists))


# ---- Who is where


def test_everybody_is_in_an_epoch_once(root: Path, sets: Sets) -> None:
    """Over 1, 2 and 4 processes, 1 and 2 accumulated micro-batches, 0, 1 and 3 workers; and all see one order."""
    everybody = sorted(person["id"] for person in sets.train.source.read()["annotations"])
    assert len(everybody) == PEOPLE and PEOPLE % BATCH == 0
    steps = range(PEOPLE // BATCH)
    whole = _ids(sets, _config(root), steps)
    assert sorted(_flat(whole)) == everybody
    for num_ranks, accumulation, workers in ((1, 1, 1), (1, 2, 3), (2, 1, 0), (2, 1, 3), (2, 2, 1), (4, 1, 0)):
        parts = [
            _ids(sets, _config(root), steps, _share(r, num_ranks, accumulation), workers) for r in range(num_ranks)
        ]
        assert sorted(_flat(_flat(parts))) == everybody
        joined = [_flat(parts[r][step * accumulation + m] for m in range(accumulation) for r in range(num_ranks))
                  for step in steps]  # fmt: skip
        assert joined == whole, (num_ranks, accumulation, workers)


def test_annotations_that_a_stream_leaves_out_are_counted(tmp_path: Path, sets: Sets) -> None:
    drawn = synthetic.write(tmp_path / "drawn", num_train=8, num_unlabelled=2, num_val=2)
    file = drawn / "annotations/person_keypoints_train2017.json"
    tree = json.loads(file.read_text())
    tree["annotations"][0]["iscrowd"], tree["annotations"][1]["category_id"] = 1, 7
    tree["categories"].append({"id": 7, "name": "dog"})
    file.write_text(json.dumps(tree))
    convert.main(["convert", "coco", str(drawn), str(tmp_path / "parquet")])
    opened = build.open_people(_config(tmp_path / "parquet"), COCO17, unlabeled=False)
    assert "2 of its 8 annotations are left out" in str(opened) and not sets.train.left_out


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_a_run_goes_on_with_the_same_people(root: Path, sets: Sets, workers: int) -> None:
    """Over the end of an epoch, from every step."""
    last = 2 * PEOPLE // BATCH + 3
    whole = _ids(sets, _config(root), range(last))
    for first in (1, 5, 6, 13):
        assert _ids(sets, _config(root), range(first, last), workers=workers) == whole[first:]
    halves = [_ids(sets, _config(root), range(7, last), _share(rank, 2), workers) for rank in range(2)]
    assert [a + b for a, b in zip(*halves, strict=True)] == whole[7:]


def test_epochs_seeds_and_stages_have_orders_of_their_own(sets: Sets) -> None:
    rows: Any = sets.train.rows
    per_epoch = PEOPLE // BATCH

    def epoch(number: int, seed: int = 0, name: str = "phase2") -> list[int]:
        steps = range(number * per_epoch, (number + 1) * per_epoch)
        return np.concatenate([rows.order(stream.OrderKey(seed, name, BATCH, 8, 2), step) for step in steps]).tolist()

    orders = [epoch(0), epoch(1), epoch(0, seed=1), epoch(0, name="ssl")]
    assert all(sorted(order) == list(range(PEOPLE)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4 and epoch(0) == orders[0]
    assert list(range(PEOPLE)) not in orders


@pytest.mark.parametrize("people", [1, 5, 37, 64, 1000])
@pytest.mark.parametrize("batch", [1, 6, 8, 64])
@pytest.mark.parametrize("parts", [1, 3, 8])
def test_nobody_twice_for_any_numbers(people: int, batch: int, parts: int) -> None:
    """Whole batches of an epoch are of different people; those who are left over are fewer than a batch."""
    rng = np.random.default_rng(people)
    counts = np.bincount(rng.integers(0, 9, people), minlength=9)  # some groups may be of nobody
    rows = stream.StreamRows([], counts)
    per_epoch = max(1, people // batch)
    for epoch in range(2):
        steps = range(epoch * per_epoch, (epoch + 1) * per_epoch)
        found = np.concatenate([rows.order(stream.OrderKey(0, "ssl", batch, parts, 2), step) for step in steps])
        times = np.bincount(found, minlength=people)
        assert len(times) == people
        if people >= batch:
            assert times.max() == 1 and people - times.sum() < batch
        else:
            assert len(found) == batch and times.max() - times.min() <= 1


def test_a_process_reads_its_own_groups_alone() -> None:
    """8 processes of 4 workers: no row group is read by more than two, those at the ends of lanes; and in a row."""
    counts, batch, ranks, workers = np.full(3200, 10), 64, 8, 4
    rows = stream.StreamRows([], counts)
    read: dict[int, set[tuple[int, int]]] = {}
    turns: dict[tuple[int, int], list[int]] = {}
    for step in range(counts.sum() // batch):
        groups = rows.order(stream.OrderKey(0, "x", batch, 8, 2), step) // 10
        for rank in range(ranks):
            for group in groups[rank * batch // ranks : (rank + 1) * batch // ranks].tolist():
                read.setdefault(group, set()).add((rank, step % workers))
                turns.setdefault((rank, step % workers), []).append(group)
    assert len(read) == 3200 and max(map(len, read.values())) <= 2
    assert sum(len(readers) > 1 for readers in read.values()) <= 2 * ranks * workers
    for groups in turns.values():  # a group's people come within a window of two groups, and never again
        spans = {group: (groups.index(group), len(groups) - groups[::-1].index(group)) for group in set(groups)}
        assert max(end - start for start, end in spans.values()) <= 20


# ---- What is read


def test_a_streamed_person_is_the_one_of_the_opened_shards(root: Path, sets: Sets) -> None:
    opened = build.open_people(_config(root, streaming=False), COCO17, unlabeled=True)
    for name in ("train", "unlabeled"):
        ours, theirs = getattr(sets, name), getattr(opened, name)
        known = {row["ann_id"]: row for row in theirs.rows}
        assert len(ours) == len(theirs) == len(known)
        for index in range(len(ours)):
            row = ours.rows[index]
            assert row == known[row["ann_id"]]
            a, b = (bytes(photo.read_bytes(people.root / row["file_name"])) for people in (ours, theirs))
            assert a == b
    manifest = shards.read_manifest(sets.train.annotations)
    assert manifest.kind == "parquet" and all(Path(file).parent == root / "data" for file in manifest.files)


def test_the_tar_of_the_same_images_streams_too(root: Path) -> None:
    config = _config(root.parent / "tar")
    found = build.open_people(config, COCO17, unlabeled=True)
    ids = _flat(_ids(found, config, range(PEOPLE // BATCH), workers=1))
    assert len(set(ids)) == PEOPLE
    assert found.unlabeled is not None and len(found.unlabeled) == 20


def test_addresses_are_read_where_they_are(root: Path, sets: Sets) -> None:
    """Another machine's shards, here by fsspec's file://: parquet, read by row groups."""
    config = replace(_config(root), root=f"file://{root}")
    found = build.open_people(config, COCO17, unlabeled=True)
    assert all(file.startswith("file://") for file in shards.read_manifest(found.train.annotations).files)
    steps = range(PEOPLE // BATCH)
    assert _ids(found, config, steps, workers=2) == _ids(sets, _config(root), steps)


def test_pairs_are_streamed(root: Path, sets: Sets) -> None:
    people = _people(sets, _config(root), teacher=TeacherConfig(ratio=2, cutout=3))
    share = Share(rank=0, num_ranks=1, micro_batch=4, accumulation=2)
    batches = list(loader.batches(people, share, range(2), 1, CPU))
    assert all(batch.pair is not None and len(batch.pair.weak.image) == 8 for batch in batches)


def test_shards_that_changed_under_a_run_are_reported(root: Path, sets: Sets) -> None:
    rows: Any = sets.train.rows
    fewer = stream.StreamRows(rows.groups, rows.counts + 1)
    with pytest.raises(UserError, match=r"train\.shards: .*have changed"):
        fewer[0]


def test_columns_of_all_people_are_refused(sets: Sets) -> None:
    with pytest.raises(UserError, match=r"--data\.streaming true: 'ann_id'"):
        sets.train.rows["ann_id"]


# ---- Whole runs


def _run(cache: Path, *words: object) -> str:
    done = forks.run(["train.py", *words], env={**os.environ, "SAPIENS_ACCEL_CACHE": str(cache)})
    assert done.returncode == 0, done.stderr
    return done.stdout


def _losses(folder: Path) -> list[Any]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


def test_a_cut_run_goes_on_bit_for_bit(root: Path, tmp_path: Path) -> None:
    words = ["--recipe", "demo", "--stage", "phase2", "--phase2.steps", 6, "--phase2.global_batch", 4]
    words += ["--model.name", "sapiens_tiny", "--data.input_hw", "[64,48]", "--eval.num_pictures", 1, "--log_every", 1]
    words += ["--data.root", root, "--data.streaming", "--data.num_workers", 2, "--report_to", "none"]
    _run(tmp_path / "cache", *words, "--output_dir", tmp_path / "whole")
    _run(tmp_path / "cache", *words, "--output_dir", tmp_path / "cut", "--max_steps", 3, "--save_every", 3)
    resumed = ["--output_dir", tmp_path / "cut", "--resume_from_checkpoint", "latest"]
    said = _run(tmp_path / "cache", *words, *resumed)
    assert re.search("phase2: steps 4 to 6", said)
    assert _losses(tmp_path / "cut") == _losses(tmp_path / "whole") and len(_losses(tmp_path / "whole")) == 6
