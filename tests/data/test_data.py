"""Batches: one function of (seed, stage, step) whatever workers and ranks do; pixels and points that agree."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from upright import UprightPeople

from sapiens_accel.config.schema import AugmentConfig, DataConfig, StageConfig, TeacherConfig
from sapiens_accel.data import build, loader, sampling
from sapiens_accel.data import dataset as data
from sapiens_accel.data import people as coco
from sapiens_accel.data.augment import Augmenter
from sapiens_accel.data.dataset import Batch, Key, Labeled, Pair, Sets, TrainingPeople, View
from sapiens_accel.data.sampling import Share
from sapiens_accel.errors import UserError
from sapiens_accel.pose.geometry import Crop
from sapiens_accel.pose.skeleton import COCO17
from sapiens_accel.pose.visibility import target_weights
from sapiens_accel.sources import images as photo
from sapiens_accel.sources import jpeg_region, synthetic
from sapiens_accel.sources.jpeg_region import Region

TRAIN = "annotations/person_keypoints_train2017.json"
REPOSITORY = Path(__file__).resolve().parents[2]
REAL = REPOSITORY / os.environ.get("SAPIENS_ACCEL_TEST_DATA", "../shared/data") / "coco_mini"
with_real_data = pytest.mark.skipif(not REAL.is_dir(), reason=f"no real images: {REAL} (SAPIENS_ACCEL_TEST_DATA)")
CPU = torch.device("cpu")
INPUT_HW = (64, 48)
STEPS = 6
# Nothing that changes pixels: a dot in the image is the same dot in the crop.
SAME_PIXELS = AugmentConfig(photometric_p=0.0, blur_p=0.0, coarse_dropout_p=0.0)


@dataclass(frozen=True)
class Run:
    """The people of one folder, and what makes batches of them."""

    sets: Sets
    config: DataConfig
    plan: StageConfig

    def people(
        self, seed: int = 0, stage: str = "ssl", augment: AugmentConfig | None = None, **plan: Any
    ) -> TrainingPeople:
        augmenter = Augmenter(config=augment or AugmentConfig(), skeleton=COCO17, input_hw=self.config.input_hw)
        return TrainingPeople(self.sets, augmenter, self.config, replace(self.plan, **plan), seed=seed, stage=stage)


def _open(root: Path, cache: Path, **changes: Any) -> Run:
    options: dict[str, Any] = {"unlabelled_min_side": 0.0, "input_hw": INPUT_HW} | changes
    config = DataConfig(root=str(root), cache_dir=str(cache), **options)
    sets = build.open_people(config, COCO17, unlabeled=True)
    return Run(sets, config, StageConfig(global_batch=6, teacher=TeacherConfig(ratio=2, cutout=3)))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic.write(tmp_path_factory.mktemp("data") / "drawn", num_train=20, num_unlabelled=15, num_val=5)


@pytest.fixture(scope="module")
def run(drawn: Path) -> Run:
    return _open(drawn, drawn.parent / "cache")


def _share(rank: int = 0, num_ranks: int = 1, micro_batch: int = 3, accumulation: int = 2) -> Share:
    return Share(rank=rank, num_ranks=num_ranks, micro_batch=micro_batch, accumulation=accumulation)


def _batches(people: TrainingPeople, share: Share | None = None, first: int = 0, workers: int = 0) -> list[Batch]:
    return list(loader.batches(people, share or _share(), range(first, STEPS), workers, CPU))


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif tree is not None:
        for item in tree:
            yield from _tensors(item)


def _bytes(tree: Any) -> bytes:
    return b"".join(tensor.numpy().tobytes() for tensor in _tensors(tree))


@pytest.fixture(scope="module")
def reference(run: Run) -> list[Batch]:
    return _batches(run.people())


# ---- A batch is a function of (seed, stage, step)


def test_shapes_and_types_of_a_batch(run: Run, reference: list[Batch]) -> None:
    assert len(reference) == STEPS * 2
    for batch in reference:
        assert batch.pair is not None
        for view, num in ((batch.labeled.view, 3), (batch.pair.weak, 6), (batch.pair.strong, 6)):
            assert (view.image.shape, view.image.dtype) == ((num, 3, *INPUT_HW), torch.uint8)
            assert (view.matrix.shape, view.matrix.dtype) == ((num, 2, 3), torch.float32)
            assert (view.flipped.shape, view.flipped.dtype) == ((num,), torch.bool)
        assert (batch.labeled.points_xy.shape, batch.labeled.points_xy.dtype) == ((3, 17, 2), torch.float32)
        assert (batch.labeled.weights.shape, batch.labeled.weights.dtype) == ((3, 17), torch.float32)
        assert (batch.pair.cutout.shape, batch.pair.cutout.dtype) == ((6, 3, 4), torch.float32)
        assert batch.pair.cutout.min() >= 0 and batch.pair.cutout.max() < 1
    supervised = next(iter(loader.batches(run.people(teacher=None), _share(), range(1), 0, CPU)))
    assert supervised.pair is None


@pytest.mark.parametrize("end", [0.0, 0.3, 0.5])
def test_the_last_steps_have_labeled_people_alone(run: Run, end: float) -> None:
    """Of 6 steps those before 6 * (1 - end) have pairs: 6, 5 and 3. What they have depends on no other step."""
    assert run.plan.teacher
    whole, cut = (
        _batches(run.people(steps=STEPS, teacher=replace(run.plan.teacher, labeled_end=part))) for part in (0.0, end)
    )
    num = {0.0: 6, 0.3: 5, 0.5: 3}[end] * 2  # micro-batches
    assert [batch.pair is not None for batch in cut] == [True] * num + [False] * (STEPS * 2 - num)
    assert _bytes(cut[:num]) == _bytes(whole[:num])
    assert _bytes([batch.labeled for batch in cut]) == _bytes([batch.labeled for batch in whole])


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than this machine has cores
@pytest.mark.parametrize("workers", [1, 3])
def test_the_number_of_workers_changes_no_byte(run: Run, reference: list[Batch], workers: int) -> None:
    assert _bytes(_batches(run.people(), workers=workers)) == _bytes(reference)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_a_loading_process_is_its_line_alone(drawn: Path, tmp_path: Path, workers: int) -> None:
    root = Path(shutil.copytree(drawn, tmp_path / "root"))
    people = _open(root, tmp_path / "cache").people(teacher=None)
    for path in (root / "train2017").iterdir():
        path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError) as caught:
        _batches(people, workers=workers)
    assert str(caught.value).startswith(f"{root}/train2017/")
    assert not re.search(r"Traceback|Caught|\\n", str(caught.value))


class _Refusing(Dataset[int]):
    """Every sample's error quotes lines that are like a traceback's, and is too long to be shown whole."""

    text = f"a.json: '\nsapiens_accel.errors.UserError: b\n{'c' * 3_000}' is no number"

    def __len__(self) -> int:
        return 1

    def __getitem__(self, _: int) -> int:
        raise UserError(self.text)


def test_the_line_of_a_loading_process_is_that_of_the_error_where_it_was_raised() -> None:
    with pytest.raises(UserError) as caught:
        list(loader.unwrap_errors(DataLoader(_Refusing(), num_workers=1, worker_init_fn=loader.begin_worker)))
    assert str(caught.value) == str(UserError(_Refusing.text))


def test_a_run_may_start_at_any_step(run: Run, reference: list[Batch]) -> None:
    assert _bytes(_batches(run.people(), first=5)) == _bytes(reference[2 * 5 :])
    assert _bytes(_batches(run.people(), first=2, workers=1)) == _bytes(reference[2 * 2 :])


def test_no_byte_depends_on_what_this_process_did_before(run: Run, reference: list[Batch]) -> None:
    people = run.people()
    np.random.default_rng().random(3)
    torch.manual_seed(int(torch.randint(1 << 30, ())))
    backwards = [[people[Key(step, p, False)] for p in range(6)] for step in reversed(range(STEPS))]
    images = torch.stack([sample.view.image for step in reversed(backwards) for sample in step])
    assert torch.equal(images, torch.cat([batch.labeled.view.image for batch in reference]))


def test_another_seed_stage_or_step_gives_other_bytes(run: Run, reference: list[Batch]) -> None:
    for other in (_batches(run.people(seed=1)), _batches(run.people(stage="phase2"))):
        for ours, theirs in zip(reference, other, strict=True):
            for part in ("labeled", "pair"):
                a, b = (list(_tensors(getattr(batch, part))) for batch in (ours, theirs))
                assert not torch.equal(a[0], b[0]) and not torch.equal(a[1], b[1])
    assert len({_bytes(batch.labeled) for batch in reference}) == len(reference)
    assert len({_bytes(batch.pair) for batch in reference}) == len(reference)


def test_every_sample_has_draws_of_its_own(run: Run, reference: list[Batch]) -> None:
    flipped = torch.cat([batch.labeled.view.flipped for batch in reference])
    assert 0 < flipped.sum() < len(flipped)
    cutouts = torch.cat([batch.pair.cutout for batch in reference if batch.pair])
    assert len(torch.unique(cutouts.flatten())) == cutouts.numel()


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
def test_a_loading_process_keeps_the_memory_of_its_images() -> None:
    """Page faults of the second and third time that as many images are made as a batch holds; 4 KB a page."""
    code = """
import resource, sys
import numpy as np
from sapiens_accel.runtime import host
if sys.argv[1] == "kept": host.keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    images = [np.ones(589824, np.uint8) for _ in range(32)]
    del images
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(*[faults() for _ in range(3)])
"""
    counts = {}
    for word in ("kept", "freed"):
        done = subprocess.run([sys.executable, "-c", code, word], cwd=REPOSITORY, capture_output=True, text=True)
        counts[word] = [int(count) for count in done.stdout.split()]
    assert max(counts["kept"][1:]) < 200 and min(counts["freed"][1:]) > 2000, counts


# ---- Ranks


COMBINATIONS = [(1, 12, 1), (1, 3, 4), (2, 6, 1), (2, 2, 3), (3, 4, 1), (4, 1, 3), (6, 2, 1), (12, 1, 1)]


@pytest.mark.parametrize(("num_ranks", "micro_batch", "accumulation"), COMBINATIONS)
def test_positions_of_the_ranks_are_the_global_batch(num_ranks: int, micro_batch: int, accumulation: int) -> None:
    shares = [_share(rank, num_ranks, micro_batch, accumulation) for rank in range(num_ranks)]
    assert {share.global_batch for share in shares} == {12}
    # In the order of the optimizer step: micro-batch by micro-batch, rank by rank.
    positions = [p for micro in range(accumulation) for share in shares for p in share.positions(micro)]
    assert positions == list(range(12))


@pytest.mark.parametrize(("num_ranks", "micro_batch", "accumulation"), [(1, 3, 2), (2, 3, 1), (3, 1, 2), (6, 1, 1)])
def test_ranks_together_hold_the_global_batch_in_content(
    run: Run, num_ranks: int, micro_batch: int, accumulation: int
) -> None:
    whole = _batches(run.people(), _share(0, 1, 6, 1), first=STEPS - 2)
    shares = [_share(rank, num_ranks, micro_batch, accumulation) for rank in range(num_ranks)]
    ranks = [_batches(run.people(), share, first=STEPS - 2) for share in shares]
    for step, expected in enumerate(whole):
        parts = [ranks[r][step * accumulation + m] for m in range(accumulation) for r in range(num_ranks)]
        for tensors in zip(*(list(_tensors(batch)) for batch in (*parts, expected)), strict=True):
            assert torch.equal(torch.cat(tensors[:-1]), tensors[-1])


@pytest.mark.parametrize(("num_ranks", "micro_batch", "accumulation"), [(1, 6, 1), (1, 2, 3), (3, 2, 1)])
def test_half_as_many_unlabeled_people_are_divided_among_micro_batches_and_ranks(
    run: Run, num_ranks: int, micro_batch: int, accumulation: int
) -> None:
    """Three in a step of 6, the same however they are divided."""
    assert run.plan.teacher
    people = run.people(steps=5, teacher=replace(run.plan.teacher, ratio=0.5))
    whole = list(loader.batches(people, _share(0, 1, 6, 1), range(5), 0, CPU))
    shares = [_share(rank, num_ranks, micro_batch, accumulation) for rank in range(num_ranks)]
    ranks = [list(loader.batches(people, share, range(5), 0, CPU)) for share in shares]
    for step, expected in enumerate(whole):
        parts = [ranks[r][step * accumulation + m] for m in range(accumulation) for r in range(num_ranks)]
        assert all(len(part.pair.cutout) == micro_batch // 2 for part in parts if part.pair) and expected.pair
        for tensors in zip(*(list(_tensors(batch)) for batch in (*parts, expected)), strict=True):
            assert torch.equal(torch.cat(tensors[:-1]), tensors[-1])


# ---- Order


@pytest.mark.parametrize(("num_people", "global_batch"), [(20, 5), (24, 6), (7, 7), (9, 1), (1, 1)])
def test_every_person_once_an_epoch_where_the_batch_divides(num_people: int, global_batch: int) -> None:
    per_epoch = sampling.steps_per_epoch(num_people, global_batch)
    assert per_epoch == num_people // global_batch
    epochs = [_epoch(epoch, per_epoch, num_people, global_batch) for epoch in range(4)]
    assert all(sorted(epoch) == list(range(num_people)) for epoch in epochs)
    if num_people > 5:
        assert all(a != b for a, b in pairwise(epochs)), "each epoch has an order of its own"
        assert epochs[0] != _epoch(0, per_epoch, num_people, global_batch, seed=1)
        assert epochs[0] != _epoch(0, per_epoch, num_people, global_batch, stream="phase1")


def _epoch(
    epoch: int, per_epoch: int, num_people: int, global_batch: int, seed: int = 0, stream: str = "phase2"
) -> list[int]:
    steps = range(epoch * per_epoch, (epoch + 1) * per_epoch)
    return [int(i) for step in steps for i in sampling.order(seed, stream, step, num_people, global_batch)]


def test_what_is_left_over_waits_for_another_order() -> None:
    assert sampling.steps_per_epoch(23, 6) == 3
    epochs = [_epoch(epoch, 3, 23, 6) for epoch in range(60)]
    assert all(len(epoch) == len(set(epoch)) == 18 for epoch in epochs)
    assert set().union(*epochs) == set(range(23))
    # 5 of 23 wait in each epoch: in 60 epochs, each person 13 times on average.
    waited = np.array([sum(person not in epoch for epoch in epochs) for person in range(23)])
    assert waited.sum() == 5 * 60 and waited.min() >= 2 and waited.max() <= 30


@pytest.mark.parametrize(("num_people", "global_batch"), [(5, 8), (5, 10), (1, 4), (3, 32)])
def test_fewer_people_than_a_batch(num_people: int, global_batch: int) -> None:
    assert sampling.steps_per_epoch(num_people, global_batch) == 1
    for step in range(5):
        chosen = sampling.order(0, "ssl", step, num_people, global_batch)
        assert len(chosen) == global_batch
        times = np.bincount(chosen, minlength=num_people)
        assert times.max() - times.min() <= 1, "nobody a second time more than anybody else"


def test_batches_hold_the_people_that_the_order_says(run: Run) -> None:
    ids = list(run.sets.train.rows["ann_id"])
    people = run.people(global_batch=5, teacher=None)
    batches = list(loader.batches(people, _share(0, 1, 5, 1), range(8), 0, CPU))
    for step, batch in enumerate(batches):
        assert batch.labeled.ann_id.tolist() == [ids[i] for i in sampling.order(0, "ssl", step, 20, 5)]
    for epoch in (batches[:4], batches[4:]):
        assert sorted(i for batch in epoch for i in batch.labeled.ann_id.tolist()) == sorted(ids)


def test_fewer_people_than_a_batch_make_whole_batches(run: Run) -> None:
    people = run.people(global_batch=24)
    batch = next(iter(loader.batches(people, _share(0, 1, 24, 1), range(1), 0, CPU)))
    assert sorted(set(batch.labeled.ann_id.tolist())) == sorted(run.sets.train.rows["ann_id"])
    assert batch.pair is not None and len(batch.labeled.ann_id) == 24 and len(batch.pair.cutout) == 48


def test_the_length_of_a_stage() -> None:
    assert sampling.num_steps(StageConfig(epochs=3, global_batch=6), 23) == 9
    assert sampling.num_steps(StageConfig(epochs=0.5, global_batch=6), 24) == 2
    assert sampling.num_steps(StageConfig(epochs=2, global_batch=32), 5) == 2
    assert sampling.num_steps(StageConfig(epochs=3, steps=100, global_batch=6), 23) == 100
    assert sampling.num_steps(StageConfig(steps=100), 23, 7) == 7
    assert sampling.num_steps(StageConfig(steps=5), 23, 7) == 5


# ---- Points and pixels


@pytest.fixture
def dots(drawn: Path, tmp_path: Path) -> Run:
    """A copy whose images are black; larger crops, so that a dot spans several pixels of them."""
    root = Path(shutil.copytree(drawn, tmp_path / "root"))
    run = _open(root, tmp_path / "cache", input_hw=(192, 144))
    for path in root.glob("*2017/*.jpg"):
        _paint(path, None)
    return run


def _paint(path: Path, point_xy: Sequence[float] | None) -> None:
    """A black image with one round dot whose center of mass is the point; PNG bytes, which change no pixel."""
    y, x = np.mgrid[:240, :240]
    picture = np.zeros((240, 240, 3), np.uint8)
    if point_xy is not None:
        gaussian = np.exp(-((x - point_xy[0]) ** 2 + (y - point_xy[1]) ** 2) / (2 * 2.5**2))
        picture[:] = np.round(250 * gaussian)[..., None]
    path.write_bytes(cv2.imencode(".png", picture)[1].tobytes())


def _dot(image: Tensor) -> np.ndarray:
    """Center of mass of a crop, input px (x, y)."""
    gray = image.double().mean(0).numpy()
    y, x = np.mgrid[: gray.shape[0], : gray.shape[1]]
    return np.array([(gray * x).sum(), (gray * y).sum()]) / gray.sum()


def _inside(point_xy: np.ndarray, input_hw: tuple[int, int], margin: float) -> bool:
    """Whether a whole dot lies in the crop."""
    return bool((point_xy > margin).all() and (point_xy < np.array(input_hw[::-1]) - 1 - margin).all())


def _whole_in_picture(point_xy: np.ndarray) -> bool:
    return _inside(point_xy, (240, 240), 9)


def test_training_points_are_where_the_pixels_are(dots: Run) -> None:
    people = dots.people(augment=SAME_PIXELS, teacher=None, global_batch=20)
    found = {False: 0, True: 0}
    for position in range(20):
        key = Key(0, position, False)
        index = int(sampling.order(0, "ssl", 0, 20, 20)[position])
        row = dots.sets.train.rows[index]
        for k, (x, y, v) in list(enumerate(row["keypoints"]))[position % 3 :: 3]:
            if v == 0 or not _whole_in_picture(np.array([x, y])):
                continue
            _paint(dots.sets.train.root / row["file_name"], (x, y))
            sample = people[key]
            assert isinstance(sample, Labeled) and sample.ann_id == row["ann_id"]
            flipped = bool(sample.view.flipped)
            # In a mirrored crop the person's left wrist looks like a right one, and is labeled so.
            point_xy = sample.points_xy[COCO17.mirror[k] if flipped else k].double().numpy()
            if _inside(point_xy, dots.config.input_hw, 20):
                assert np.abs(_dot(sample.view.image) - point_xy).max() < 0.2, (k, flipped)
                found[flipped] += 1
        _paint(dots.sets.train.root / row["file_name"], None)
    assert min(found.values()) >= 15, found


def test_a_mirrored_crop_is_the_crop_mirrored(run: Run) -> None:
    # The same draws but the one that mirrors: column x of one image is column W - 1 - x of the other.
    plain, mirrored = (
        run.people(augment=replace(SAME_PIXELS, flip_p=p), teacher=None, global_batch=20) for p in (0.0, 1.0)
    )
    width = run.config.input_hw[1]
    for position in range(20):
        ours, theirs = plain[Key(0, position, False)], mirrored[Key(0, position, False)]
        assert isinstance(ours, Labeled) and isinstance(theirs, Labeled)
        assert not ours.view.flipped and theirs.view.flipped
        expected = ours.points_xy[list(COCO17.mirror)] * torch.tensor([-1, 1]) + torch.tensor([width - 1, 0])
        assert (theirs.points_xy - expected).abs().max() < 1e-3
        # Rounding of the interpolation apart; one column further, noise and edges differ by far more.
        assert (theirs.view.image.int() - ours.view.image.flip(-1).int()).abs().float().mean() < 0.5


def test_evaluation_points_are_where_the_pixels_are_and_where_udp_puts_them(dots: Run) -> None:
    people = UprightPeople(dots.sets.val, dots.config, COCO17)
    height, width = dots.config.input_hw
    found = 0
    for index in range(len(people)):
        row = dots.sets.val.rows[index]
        x, y, w, h = row["box_xywh"]
        crop_w = max(w * 1.25, h * 1.25 * width / height)
        crop_h = crop_w * height / width
        left, top = x + w / 2 - crop_w / 2, y + h / 2 - crop_h / 2
        keypoints = np.array(row["keypoints"])
        # UDP: the center of the first pixel is the left border of the crop, the center of the last one the right.
        expected = (keypoints[:, :2] - [left, top]) / [crop_w, crop_h] * [width - 1, height - 1]
        sample = people[index]
        assert np.abs(sample.points_xy.numpy() - expected).max() < 1e-3
        assert not sample.view.flipped
        assert sample.ann_id == row["ann_id"]
        for k in np.flatnonzero(keypoints[:, 2] > 0)[::3]:
            if _inside(expected[k], dots.config.input_hw, 20) and _whole_in_picture(keypoints[k, :2]):
                _paint(dots.sets.val.root / row["file_name"], keypoints[k, :2])
                assert np.abs(_dot(people[index].view.image) - expected[k]).max() < 0.2
                found += 1
    assert found >= 10


def test_both_views_of_a_pair_show_one_point_where_their_matrices_say(dots: Run) -> None:
    assert dots.sets.unlabeled is not None
    people = dots.people(augment=SAME_PIXELS, global_batch=8)
    order = sampling.order(0, "ssl/unlabelled", 0, len(dots.sets.unlabeled), 16)
    seen, found = set(), 0
    for position in range(16):
        row = dots.sets.unlabeled.rows[int(order[position])]
        x, y, w, h = row["box_xywh"]
        point = np.array([x + 0.4 * w, y + 0.35 * h])
        if not _whole_in_picture(point):
            continue
        _paint(dots.sets.unlabeled.root / row["file_name"], point)
        pair = people[Key(0, position, True)]
        assert isinstance(pair, Pair)
        for view in (pair.weak, pair.strong):
            matrix = view.matrix.double().numpy()
            expected = matrix[:, :2] @ point + matrix[:, 2]
            # A mirrored view turns the plane over.
            assert bool(view.flipped) == (np.linalg.det(matrix[:, :2]) < 0)
            if _inside(expected, dots.config.input_hw, 20):
                assert np.abs(_dot(view.image) - expected).max() < 0.2
                found += 1
        seen.add((bool(pair.weak.flipped), bool(pair.strong.flipped)))
        _paint(dots.sets.unlabeled.root / row["file_name"], None)
    assert found >= 16
    assert len(seen) == 4, "each view is mirrored or not, independently"


def test_pixels_change_in_the_strong_view_alone(dots: Run) -> None:
    assert dots.sets.unlabeled is not None
    for path in (dots.sets.unlabeled.root / "unlabeled2017").iterdir():
        path.write_bytes(cv2.imencode(".png", np.full((240, 240, 3), 100, np.uint8))[1].tobytes())
    always = AugmentConfig(photometric_p=1.0, blur_p=0.0, coarse_dropout_p=1.0)
    people = dots.people(augment=always, global_batch=8)
    num_changed = 0
    for position in range(16):
        pair = people[Key(0, position, True)]
        assert isinstance(pair, Pair)
        center = (slice(None), slice(86, 106), slice(64, 80))
        assert (pair.weak.image[center] == 100).all()
        num_changed += not (pair.strong.image[center] == 100).all()
    assert num_changed >= 14  # a change of brightness and one of contrast can cancel


def _samples(people: TrainingPeople, num: int) -> list[Labeled | Pair]:
    return [people[Key(0, position, unlabeled)] for unlabeled in (False, True) for position in range(num)]


def _views(sample: Labeled | Pair) -> list[View]:
    return [sample.view] if isinstance(sample, Labeled) else [sample.weak, sample.strong]


def test_reduced_decoding_changes_pixels_a_little_and_nothing_else(
    drawn: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crop of twice as many pixels as it shows: the same draws, points and matrices; pixels as good as the same."""
    known: list[tuple[int, int]] = []
    read = data.read_reduced_image

    def told(path: Path, at_most: int = 1, region: Region | None = None) -> photo.DecodedImage:
        known.append((at_most, read(path, at_most).reduction))
        return read(path, at_most, region)

    monkeypatch.setattr(data, "read_reduced_image", told)
    whole = replace(run, config=replace(run.config, reduced_decode=False))
    ours, theirs = (_samples(r.people(augment=SAME_PIXELS, global_batch=20), 20) for r in (run, whole))
    assert known[40:] == [(1, 1)] * 40, "one image for the two views of a pair; whole where that is asked for"
    assert known[:40] == [(most, most) for most, _ in known[:40]]
    assert {most for most, _ in known[:40]} >= {1, 2}
    for (most, _), one, other in zip(known[:40], ours, theirs, strict=True):
        images = [[view.image.int() for view in _views(sample)] for sample in (one, other)]
        rest = [[tensor for tensor in _tensors(sample) if tensor.ndim < 3] for sample in (one, other)]
        assert all(torch.equal(a, b) for a, b in zip(*rest, strict=True))
        for a, b in zip(*images, strict=True):
            # The drawn images are noisy: a pixel of several means is smoother than what bilinear warps pick.
            assert torch.equal(a, b) if most == 1 else 0 < (a - b).abs().float().mean() < 10
            if most > 1:  # a pixel further, edges would differ
                smooth = [torch.nn.functional.avg_pool2d(image.float(), 4) for image in (a, b)]
                assert (smooth[0] - smooth[1]).abs().mean() < 2.5
    known.clear()
    people = UprightPeople(run.sets.val, run.config, COCO17)
    assert [people[index].view.image.shape for index in range(len(people))] and set(known) == {(1, 1)}


@pytest.mark.skipif(jpeg_region.find_package() is None, reason='pip install "sapiens_accel[jpeg]"')
def test_views_of_a_part_of_an_image_are_those_of_all_of_it(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    read, parts = data.read_reduced_image, []

    def told(path: Path, at_most: int = 1, region: Region | None = None) -> photo.DecodedImage:
        parts.append((found := read(path, at_most, region)).corner_xy != (0, 0))
        return found

    monkeypatch.setattr(data, "read_reduced_image", told)
    ours = _samples(run.people(global_batch=20), 20)
    assert sum(parts) > 10
    monkeypatch.setattr(jpeg_region, "find_package", lambda: None)
    monkeypatch.setattr(jpeg_region, "cut_below", lambda *_: None)
    for one, other in zip(ours, _samples(run.people(global_batch=20), 20), strict=True):
        for a, b in zip(_tensors(one), _tensors(other), strict=True):
            assert (a.double() - b.double()).abs().max() <= (1 if a.ndim > 2 and a.dtype == torch.uint8 else 0)


def test_a_pair_is_decoded_as_its_finer_view_needs(run: Run) -> None:
    near, far = (Crop(center_xy=(120.0, 120.0), size_wh=(47.0 * f, 63.0 * f)) for f in (2.5, 4.5))
    assert run.sets.unlabeled is not None
    path = run.sets.unlabeled.root / run.sets.unlabeled.rows[0]["file_name"]
    found = [
        data.read_for_crops(crops, path, run.config).reduction for crops in ([far], [near], [far, near], [near, far])
    ]
    assert found == [4, 2, 2, 2]


def test_target_weights() -> None:
    weights = target_weights(np.array([0.0, 1.0, 2.0, 0.0, 2.0]), 0.5)
    assert weights.tolist() == [0.0, 0.5, 1.0, 0.0, 1.0]
    assert weights.dtype == np.float32
    assert target_weights(np.array([1.0, 2.0]), 1.0).tolist() == [1.0, 1.0]
    # A confidence, as in COCO-WholeBody's lists, is a label as everywhere else.
    assert target_weights(np.array([0.3, -1.0, 1.5]), 0.5).tolist() == [0.5, 0.0, 0.5]


def test_weights_of_a_sample_follow_its_keypoints(run: Run) -> None:
    people = UprightPeople(run.sets.train, run.config, COCO17)
    seen: set[float] = set()
    for index in range(len(people)):
        visibility = np.array(run.sets.train.rows[index]["keypoints"])[:, 2]
        assert people[index].weights.tolist() == [{0: 0.0, 1: 0.5, 2: 1.0}[int(v)] for v in visibility]
        seen |= set(visibility)
    assert seen == {0, 1, 2}


def test_weights_are_mirrored_with_the_points(run: Run) -> None:
    people = run.people(teacher=None, global_batch=20)
    order = sampling.order(0, "ssl", 0, 20, 20)
    one_sided = 0
    for position, index in enumerate(order):
        sample = people[Key(0, position, False)]
        visibility = np.array(run.sets.train.rows[int(index)]["keypoints"])[:, 2]
        expected = target_weights(visibility, 0.5)
        mirrored = expected[list(COCO17.mirror)]
        one_sided += bool(sample.view.flipped) and (mirrored != expected).any()
        assert np.array_equal(sample.weights, mirrored if sample.view.flipped else expected)
    assert one_sided >= 3


# ---- Opening and refusing


def _changed(drawn: Path, root: Path, scale: float) -> Path:
    """A copy whose keypoints are multiplied by a factor."""
    shutil.copytree(drawn, root)
    tree = json.loads((root / TRAIN).read_text())
    for person in tree["annotations"]:
        person["keypoints"] = [v if j % 3 == 2 else v * scale for j, v in enumerate(person["keypoints"])]
    (root / TRAIN).write_text(json.dumps(tree))
    return root


def test_keypoints_normalized_to_one_are_refused(drawn: Path, tmp_path: Path) -> None:
    root = _changed(drawn, tmp_path / "root", 1 / 240)
    with pytest.raises(UserError, match=r"all targets are zero.*annotation \d+: box") as caught:
        _open(root, tmp_path / "cache")
    assert str(root / TRAIN) in str(caught.value)


@with_real_data
def test_real_keypoints_normalized_to_one_are_refused(tmp_path: Path) -> None:
    root = _changed(REAL, tmp_path / "root", 1 / 640)
    with pytest.raises(UserError, match=r"annotation \d+"):
        _open(root, tmp_path / "cache")


def test_skipping_everybody_is_refused(drawn: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(drawn, tmp_path / "root"))
    for path in (root / "train2017").iterdir():
        path.write_bytes(b"")
    with pytest.raises(UserError, match="person_keypoints_train2017"):
        _open(root, tmp_path / "cache", on_bad_image="skip")


def test_good_people_pass(run: Run) -> None:
    build.check_targets(run.sets.train, run.config)
    build.check_targets(run.sets.val, run.config)


@with_real_data
def test_real_people_open(tmp_path: Path) -> None:
    run = _open(REAL, tmp_path)
    assert run.sets.unlabeled is not None
    # 10 whole images, and the 81 training people without a label.
    assert (len(run.sets.train), len(run.sets.val), len(run.sets.unlabeled)) == (86, 68, 91)
    counts, *said = str(run.sets).splitlines()
    assert counts == "people: 86 train, 68 val, 91 unlabeled"
    why = "left out of the labeled people: 5 crowds, 81 without a labeled keypoint"
    assert f"86 of its 172 annotations are {why}" in said[0] and "50 of its 118 annotations" in said[1]
    assert len(said) == 3 and "Boxes of single people" in said[2], "whole images are no person's shape"
    only_pictures = _open(REAL, tmp_path, unlabelled_train_people=False)
    assert only_pictures.sets.unlabeled is not None and len(only_pictures.sets.unlabeled) == 10
    batch = next(iter(loader.batches(run.people(), _share(), range(1), 0, CPU)))
    assert batch.pair is not None and batch.labeled.weights.sum() > 0


def test_counts_of_drawn_people(run: Run, drawn: Path, tmp_path: Path) -> None:
    assert run.sets.unlabeled is not None
    assert (len(run.sets.train), len(run.sets.val), len(run.sets.unlabeled)) == (20, 5, 15)
    assert run.sets.split("val") is run.sets.val and run.sets.split("train") is run.sets.train
    config = replace(run.config, cache_dir=str(tmp_path))
    assert build.open_people(config, COCO17, unlabeled=False).unlabeled is None


def test_skipped_people_are_counted(drawn: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(drawn, tmp_path / "root"))
    people = coco.labeled_people(root, TRAIN, "train2017", 17, tmp_path / "cache")
    names = list(people.rows["file_name"])
    (root / names[0]).write_bytes((root / names[0]).read_bytes()[:2000])
    left = 20 - names.count(names[0])
    run = _open(root, tmp_path / "cache", on_bad_image="skip")
    assert len(run.sets.train) == left
    assert f"people: {left} train, 5 val, 15 unlabeled ({20 - left} skipped" in str(run.sets)


def test_without_unlabeled_people_nothing_can_be_learned_from_them(drawn: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(drawn, tmp_path / "root"))
    shutil.rmtree(root / "unlabeled2017")
    (root / "annotations" / "person_boxes_unlabeled2017.json").unlink()
    with pytest.raises(UserError, match="unlabeled") as caught:
        _open(root, tmp_path / "cache")
    assert str(root / "unlabeled2017") in str(caught.value) and "\n" not in str(caught.value)
    config = DataConfig(root=str(root), cache_dir=str(tmp_path / "cache"))
    assert len(build.open_people(config, COCO17, unlabeled=False).train) == 20


def test_people_are_drawn_where_no_root_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAPIENS_ACCEL_CACHE", str(tmp_path))
    counts = replace(DataConfig().synthetic, num_train=4, num_unlabelled=3, num_val=2)
    config = DataConfig(synthetic=counts, unlabelled_min_side=0.0)
    for _ in range(2):
        sets = build.open_people(config, COCO17, unlabeled=True)
        assert sets.unlabeled is not None
        assert (len(sets.train), len(sets.unlabeled), len(sets.val)) == (4, 3, 2)
    tables, drawn = sorted(path.name for path in tmp_path.iterdir())
    assert tables == "people" and "4-3-2-0" in drawn, "drawn once, and named after its counts and seed"
    with pytest.raises(UserError, match="no such folder"):
        build.open_people(replace(config, root=str(tmp_path / "absent")), COCO17, unlabeled=False)
