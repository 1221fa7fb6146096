"""Shards whose keypoints are not those of a run: taken by name, opened, streamed and mixed with a COCO folder."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sapiens_accel.config.schema import AugmentConfig, DataConfig, MoreData, StageConfig
from sapiens_accel.data import build, loader
from sapiens_accel.data import people as coco
from sapiens_accel.data.augment import Augmenter
from sapiens_accel.data.dataset import Sets, TrainingPeople
from sapiens_accel.data.people import People
from sapiens_accel.data.sampling import Share
from sapiens_accel.pose.skeleton import COCO17, WHOLEBODY133, Skeleton
from sapiens_accel.sources import convert, synthetic

SPLITS = ("train", "val")
PARTS = (("foot_kpts", 6), ("face_kpts", 68), ("lefthand_kpts", 21), ("righthand_kpts", 21))
NAMES = ["right_wrist", "tail_tip", "nose", "left_wrist"]  # one that COCO has not, and an order of its own
OF_COCO = [COCO17.names.index(name) if name in COCO17.names else -1 for name in NAMES]


def _file(split: str) -> str:
    return f"annotations/person_keypoints_{split}2017.json"


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One set of people with COCO's 17, with 133 in five lists, and with four of their own; each as shards, too."""
    base = tmp_path_factory.mktemp("data")
    made = {"17": synthetic.write(base / "17", num_train=12, num_unlabelled=1, num_val=4)}
    rng = np.random.default_rng(1)
    for kind in ("133", "own"):
        made[kind] = Path(shutil.copytree(made["17"], base / kind))
        for split in SPLITS:
            tree = json.loads((made[kind] / _file(split)).read_text())
            for person in tree["annotations"]:
                person["id"] += 1000
                points = np.reshape(person["keypoints"], (-1, 3))
                for name, count in PARTS if kind == "133" else ():
                    places = person["bbox"][:2] + rng.random((count, 2)) * person["bbox"][2:]
                    person[name] = np.concatenate([places, rng.integers(0, 3, (count, 1))], axis=1).ravel().tolist()
                if kind == "own":
                    tip = [[person["bbox"][0] + 1, person["bbox"][1] + 1, 2]]
                    chosen = [points[k].tolist() if k >= 0 else tip[0] for k in OF_COCO]
                    person["keypoints"] = np.ravel(chosen).tolist()
            if kind == "own":
                tree["categories"] = [{"id": 1, "name": "person", "keypoints": NAMES, "skeleton": [[1, 3]]}]
            (made[kind] / _file(split)).write_text(json.dumps(tree))
    for kind in list(made):
        made[f"{kind} shards"] = base / f"{kind}_shards"
        convert.main(["convert", "coco", str(made[kind]), str(base / f"{kind}_shards"), "--group_rows", "2"])
    return made


def _config(root: Path, cache: Path, **changes: Any) -> DataConfig:
    return DataConfig(root=str(root), cache_dir=str(cache), input_hw=(64, 48), **changes)


def _open(config: DataConfig) -> tuple[Skeleton, Sets]:
    skeleton, _ = build.open_skeleton(config)
    return skeleton, build.open_people(config, skeleton, unlabeled=False)


def _points(people: People) -> dict[int, Any]:
    rows = (people.rows[index] for index in range(len(people)))
    return {row["ann_id"]: np.asarray(row["keypoints"]).tolist() for row in rows}


@pytest.mark.parametrize(("kind", "asked"), [("133", "coco17"), ("133", None), ("own", "coco17"), ("own", None),
                                             ("17", "wholebody133")])  # fmt: skip
@pytest.mark.parametrize("streaming", [False, True])
def test_keypoints_are_those_of_the_folder(
    roots: dict[str, Path], tmp_path: Path, kind: str, asked: str | None, streaming: bool
) -> None:
    skeleton, ours = _open(_config(roots[f"{kind} shards"], tmp_path, skeleton=asked, streaming=streaming))
    other, theirs = _open(_config(roots[kind], tmp_path, skeleton=asked))
    assert skeleton == other == ours.skeleton == theirs.skeleton
    assert _points(ours.train) == _points(theirs.train) and _points(ours.val) == _points(theirs.val)
    some = np.array(list(_points(ours.train).values()))
    assert some.shape[1] == skeleton.num_keypoints
    if kind == "own" and asked:
        here = np.isin(np.arange(17), OF_COCO)
        assert (some[:, here, 2] > 0).any() and not some[:, ~here].any(), "those that are not there weigh nothing"
        lines = [line.split(": ", 1)[1] for line in ours.warnings if "weight 0" in line]
        assert lines and all(line.startswith("has 3 of the 17 keypoints, by name") for line in lines)


def test_shards_of_133_are_mixed_with_a_folder_of_17(roots: dict[str, Path], tmp_path: Path) -> None:
    """The same batches as of both folders; what the folder does not label has weight 0, by name."""
    more = (MoreData(root=str(roots["133 shards"])),)
    mixed = _config(roots["17"], tmp_path, more=more)
    plain = dataclasses.replace(mixed, more=(MoreData(root=str(roots["133"])),))
    found = []
    for config in (mixed, plain):
        skeleton, sets = _open(config)
        assert skeleton == WHOLEBODY133
        augmenter = Augmenter(config=AugmentConfig(), skeleton=skeleton, input_hw=(64, 48))
        people = TrainingPeople(sets, augmenter, config, StageConfig(global_batch=8), seed=3, stage="phase2")
        share = Share(rank=0, num_ranks=1, micro_batch=8, accumulation=1)
        found.append([batch.labeled for batch in loader.batches(people, share, range(3), 0, torch.device("cpu"))])
    ours, theirs = ([torch.cat(parts) for parts in zip(*(b[1:] for b in one), strict=True)] for one in found)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a.view.image, b.view.image)
    weights, ids = ours[1], ours[2]
    body = torch.tensor([name in COCO17.names for name in WHOLEBODY133.names])
    assert len(ids.unique()) == 24 and not weights[ids < 1000][:, ~body].any()
    assert weights[ids < 1000][:, body].any() and weights[ids >= 1000][:, ~body].any()


def test_a_folder_of_133_is_the_first_and_shards_of_their_own_the_second(
    roots: dict[str, Path], tmp_path: Path
) -> None:
    """Names that only the second set has come after those of the first."""
    skeleton, sets = _open(_config(roots["17 shards"], tmp_path, more=(MoreData(root=str(roots["own shards"])),)))
    assert skeleton.names == (*COCO17.names, "tail_tip")
    points = coco.keypoints_of(sets.train.rows)
    own = np.array(sets.train.rows["ann_id"][:]) >= 1000
    assert own.sum() == 12 and (points[own][:, 17, 2] == 2).all() and not points[~own][:, 17].any()
    assert not points[own][:, COCO17.names.index("left_knee")].any()
