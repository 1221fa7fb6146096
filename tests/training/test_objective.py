"""The losses against their formulas; the teacher's part with a network that knows the answers."""

import copy
import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sapiens_accel.config.schema import TeacherConfig
from sapiens_accel.data.dataset import Batch, Labeled, Pair, View
from sapiens_accel.models.chunked_head import ChunkedHead
from sapiens_accel.models.sapiens import SapiensPose
from sapiens_accel.pose.geometry import Crop, apply
from sapiens_accel.pose.heatmap import Codec
from sapiens_accel.pose.skeleton import COCO17
from sapiens_accel.training.ema import MovingAverage
from sapiens_accel.training.mean_teacher import (
    MeanTeacher,
    PseudoLabels,
    TeacherSetup,
    cut_out,
    ema_decay,
    learned_ratio,
)
from sapiens_accel.training.objectives import Supervised, heatmap_kl, literal_kl

SIZES = [((64, 48), 2), ((128, 96), 3), ((256, 192), 6)]
CODEC = Codec(input_hw=(256, 192), heatmap_hw=(64, 48), sigma=2.0)
TINY_CODEC = Codec(input_hw=(64, 48), heatmap_hw=(16, 12), sigma=1.0)
MIRROR = list(COCO17.mirror)


# ---- heatmap_kl


def _gaussians(heatmap_hw: tuple[int, int], sigma: float, points_xy: list[list[float]]) -> Tensor:
    """[1, k, h, w] of whole Gaussians, points in heatmap px."""
    y, x = np.mgrid[: heatmap_hw[0], : heatmap_hw[1]]
    maps = [np.exp(-((x - px) ** 2 + (y - py) ** 2) / (2 * sigma**2)) for px, py in points_xy]
    return torch.tensor(np.stack(maps), dtype=torch.float32)[None]


def _reference_kl(student: np.ndarray, target: np.ndarray, sigma: float, temperature: float) -> np.ndarray:
    """KL(P_target || P_student), P = exp(l(h) / T) / sum, in float64; l is the log with a straight line below 0.02."""

    def distribution(maps: np.ndarray) -> np.ndarray:
        line = math.log(0.02) - 1 + maps / 0.02
        power = np.exp(np.where(maps >= 0.02, np.log(np.maximum(maps, 0.02)), line) / temperature)
        return power / power.sum(axis=(2, 3), keepdims=True)

    p, q = distribution(target.astype(np.float64)), distribution(student.astype(np.float64))
    height, width = student.shape[2:]
    return (p * np.log(p / q)).sum(axis=(2, 3)) * math.pi * sigma**2 * temperature / (height * width)


@pytest.mark.parametrize("temperature", [0.5, 1.0])
@pytest.mark.parametrize(("heatmap_hw", "sigma"), SIZES[:2])
def test_heatmap_kl_is_its_formula(heatmap_hw: tuple[int, int], sigma: int, temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    target = _gaussians(heatmap_hw, sigma, [[20.0, 30.0], [10.3, 40.8], [0.0, 63.0]])
    other = _gaussians(heatmap_hw, sigma, [[21.5, 29.0], [30.3, 10.8], [3.0, 60.0]])
    noise = 0.05 * torch.randn(target.shape, generator=generator)
    for student in (other, 0.6 * other + noise, target + noise):
        expected = _reference_kl(student.numpy(), target.numpy(), sigma, temperature)
        found = heatmap_kl(student, target, float(sigma), temperature)
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize(("heatmap_hw", "sigma"), SIZES)
def test_heatmap_kl_weighs_a_shift_as_mean_squared_error_does(heatmap_hw: tuple[int, int], sigma: int) -> None:
    x, y = heatmap_hw[1] / 2, heatmap_hw[0] / 2
    target = _gaussians(heatmap_hw, sigma, [[x, y]])
    for shift in (0.1, 0.25, 0.5, 1.0):
        for direction in ((1.0, 0.0), (0.0, -1.0), (math.sqrt(0.5), math.sqrt(0.5))):
            moved = [x + shift * sigma * direction[0], y + shift * sigma * direction[1]]
            student = _gaussians(heatmap_hw, sigma, [moved])
            ratio = heatmap_kl(student, target, float(sigma), 0.5) / (student - target).square().mean()
            assert 0.95 < ratio.item() < 1.12


@pytest.mark.parametrize(("heatmap_hw", "sigma"), SIZES)
def test_heatmap_kl_is_0_at_a_match_and_hardly_sees_the_amplitude(heatmap_hw: tuple[int, int], sigma: int) -> None:
    """Peaks of half the height cost 0.07 of their mean squared error, higher ones 0.015 (measured)."""
    target = _gaussians(heatmap_hw, sigma, [[20.3, 30.6]])
    assert heatmap_kl(target, target, float(sigma), 0.5).abs().item() < 1e-9
    for height in (0.5, 0.7, 1.3, 1.5):
        kl = heatmap_kl(height * target, target, float(sigma), 0.5)
        assert 0 <= kl.item() < 0.08 * ((1 - height) * target).square().mean().item()


@pytest.mark.parametrize("student", ["zero", "negative", "flat", "far away"])
def test_heatmap_kl_has_no_dead_zone_and_no_explosion(student: str) -> None:
    target = _gaussians((64, 48), 2, [[20.0, 30.0]])
    far = _gaussians((64, 48), 2, [[40.0, 5.0]])
    maps = {"zero": 0 * target, "negative": 0 * target - 0.3, "flat": 0 * target + 0.5, "far away": far}[student]
    maps.requires_grad_(True)
    kl = heatmap_kl(maps, target, 2.0, 0.5)
    kl.sum().backward()
    assert kl.isfinite().all() and kl.item() > 1e-3
    assert maps.grad is not None and maps.grad.isfinite().all()
    assert maps.grad[0, 0, 30, 20] < 0, "the student is told to rise where the target is"
    # d KL / d logit is at most 1, d logit / d h at most 1 / (0.02 T); then the constant factor.
    assert maps.grad.abs().max() <= math.pi * 2**2 * 0.5 / (64 * 48) / (0.02 * 0.5) + 1e-6


def test_heatmap_kl_of_a_bf16_student_is_that_of_its_fp32_values() -> None:
    """All arithmetic is fp32: only the rounding of the heatmap itself is left."""
    target = _gaussians((64, 48), 2, [[20.0, 30.0], [10.3, 40.8]])
    student = _gaussians((64, 48), 2, [[21.0, 30.7], [12.3, 40.8]])
    exact = heatmap_kl(student, target, 2.0, 0.5)
    rounded = heatmap_kl(student.bfloat16(), target, 2.0, 0.5)
    assert rounded.dtype == torch.float32
    assert torch.equal(rounded, heatmap_kl(student.bfloat16().float(), target, 2.0, 0.5))
    torch.testing.assert_close(rounded, exact, rtol=1e-3, atol=0)


# ---- Supervised


def _view(image: Tensor) -> View:
    return View(image, torch.eye(2, 3).repeat(len(image), 1, 1), torch.zeros(len(image), dtype=torch.bool))


def test_supervised_is_the_mean_of_weighted_squared_errors() -> None:
    """Over all people, keypoints and pixels, those of weight 0 included: the published normalization."""
    rng = np.random.default_rng(1)
    points_xy = torch.tensor(rng.uniform(20, 150, (3, 17, 2)), dtype=torch.float32)
    weights = torch.tensor(rng.choice([0.0, 0.5, 1.0], (3, 17)), dtype=torch.float32)
    heatmaps = torch.tensor(rng.normal(size=(3, 17, 64, 48)), dtype=torch.float32)
    image = torch.zeros(3, 3, 256, 192, dtype=torch.uint8)
    batch = Batch(Labeled(_view(image), points_xy, weights, torch.arange(3)), None)
    target = CODEC.encode(points_xy, weights)[0].double().numpy()
    error = (heatmaps.double().numpy() - target) ** 2
    expected = 10 * sum(
        float(weights[i, k]) * error[i, k].sum() for i in range(3) for k in range(17)
    ) / (3 * 17 * 64 * 48)  # fmt: skip
    objective = Supervised(codec=CODEC, loss_weight=10.0)
    network = _Constant(heatmaps)
    loss, logs = objective.loss(network, batch, *objective.prepare([batch], 0))
    assert loss.item() == pytest.approx(expected, rel=1e-5) and logs == {}
    assert objective.result(network) is network and objective.state_dict() == {}


class _Constant(ChunkedHead):
    def __init__(self, heatmaps: Tensor) -> None:
        super().__init__()
        self.heatmaps = heatmaps

    def maps(self, features: Tensor) -> Tensor:
        return self.heatmaps[: len(features)]


# ---- MeanTeacher with a network that knows the answers


class Oracle(ChunkedHead):
    """Reads an index from a picture's first pixel and draws that entry's points, at that entry's heights."""

    def __init__(self, codec: Codec, points_xy: Tensor, heights: Tensor | None = None) -> None:
        super().__init__()
        self.codec, self.points_xy = codec, points_xy
        self.heights = torch.ones(points_xy.shape[:2]) if heights is None else heights
        self.gain = nn.Parameter(torch.ones(()))

    def maps(self, features: Tensor) -> Tensor:
        index = features[:, 0, 0, 0].long()
        maps, _ = self.codec.encode(self.points_xy[index], torch.ones_like(self.heights[index]))
        return self.gain * self.heights[index][..., None, None] * maps


def _indexed(index: Sequence[int], input_hw: tuple[int, int], seed: int = 0) -> Tensor:
    """Images of noise whose first pixel is an index into an Oracle's entries."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (len(index), 3, *input_hw), dtype=torch.uint8, generator=generator)
    image[:, 0, 0, 0] = torch.tensor(index, dtype=torch.uint8)
    return image


def _points(num: int, codec: Codec, seed: int = 2, margin: float = 0.15) -> Tensor:
    rng = np.random.default_rng(seed)
    last = np.array([codec.input_hw[1] - 1, codec.input_hw[0] - 1])
    return torch.tensor(rng.uniform(margin, 1 - margin, (num, 17, 2)) * last, dtype=torch.float32)


def _mean_teacher(
    teacher: nn.Module,
    codec: Codec = CODEC,
    gather: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    student: Sequence[Tensor] = (),
    **changes: float | str,
) -> MeanTeacher:
    config = TeacherConfig(**changes)  # pyright: ignore[reportArgumentType]
    supervised = Supervised(codec=codec)
    setup = TeacherSetup(
        average=MovingAverage(teacher), student_parameters=lambda: student, num_steps=1000, gather=gather
    )
    return MeanTeacher(supervised, setup, config, MIRROR, COCO17.names)


def _same_views(points_xy: Tensor, codec: Codec) -> Batch:
    """As many labeled as unlabeled people; the student sees exactly what the teacher sees."""
    num = len(points_xy)
    view = _view(_indexed(range(num), codec.input_hw))
    labeled = Labeled(view, points_xy, torch.ones(num, 17), torch.arange(num))
    return Batch(labeled, Pair(view, view, torch.zeros(num, 0, 4)))


def test_a_perfect_student_has_no_loss() -> None:
    points_xy = _points(4, CODEC)
    batch = _same_views(points_xy, CODEC)
    objective, student = _mean_teacher(Oracle(CODEC, points_xy)), Oracle(CODEC, points_xy)
    (prepared,) = objective.prepare([batch], step=300)
    loss, logs = objective.loss(student, batch, prepared)
    assert (prepared.weights > 0.7).all(), "everything is learned from"
    assert logs["keep"].item() == 1.0
    assert abs(logs["loss_unlabelled"].item()) < 1e-5
    assert logs["loss_labelled"].item() < 1e-10
    assert loss.item() == pytest.approx(logs["loss_labelled"].item() + logs["loss_unlabelled"].item(), abs=1e-12)


@pytest.mark.parametrize(("step", "ramp"), [(0, math.exp(-5)), (25, math.exp(-5 / 4)), (50, 1.0), (650, 0.5)])
def test_unlabeled_loss_is_the_weighted_kl_over_the_kept_keypoints(step: int, ramp: float) -> None:
    """With a ramp over the first 50 of 1000 steps, and another over the last 700."""
    points_xy = _points(4, CODEC)
    batch, wrong = _same_views(points_xy, CODEC), Oracle(CODEC, points_xy + torch.tensor([6.0, -4.0]))
    objective = _mean_teacher(Oracle(CODEC, points_xy), weight=0.5)
    (prepared,) = objective.prepare([batch], step)
    _, logs = objective.loss(wrong, batch, prepared)
    target, _ = CODEC.encode(prepared.prediction.points_xy, torch.ones(4, 17))
    student = wrong(batch.labeled.view.image).detach()
    kl = _reference_kl(student.numpy(), target.numpy(), 2.0, 0.5)
    weights = prepared.weights.numpy()
    expected = 0.5 * ramp * (weights * kl).sum() / (weights > 0).sum()
    assert expected > 1e-6
    assert logs["loss_unlabelled"].item() == pytest.approx(expected, rel=1e-3)


def _affine_pairs(num: int) -> tuple[Batch, Tensor, Tensor, list[tuple[Crop, Crop]]]:
    """People seen through random crops: true points in the weak and in the strong view as a network names them."""
    rng = np.random.default_rng(3)
    weak_xy, strong_xy, crops, matrices, flips = [], [], [], [], []
    for _ in range(num):
        center, width = rng.uniform(500, 4000, 2), rng.uniform(100, 600)
        body_xy = center + rng.normal(0, 0.17, (17, 2)) * [width, width * 4 / 3]
        pair = []
        for turn, grow, shift in ((20, 0.15, 0.0), (60, 0.35, 0.06)):
            size = width * rng.uniform(1 - grow, 1 + grow)
            pair.append(
                Crop(
                    center_xy=tuple(center + rng.uniform(-shift, shift, 2) * width),
                    size_wh=(size, size * 4 / 3),
                    degrees=rng.uniform(-turn, turn),
                    flip=bool(rng.random() < 0.5),
                )
            )
        for crop, points in zip(pair, (weak_xy, strong_xy), strict=True):
            # In a mirrored image the left wrist looks like a right one, and is called so.
            points.append(apply(crop.matrix(CODEC.input_hw), body_xy[MIRROR] if crop.flip else body_xy))
        crops.append(tuple(pair))
        matrices.append([crop.matrix(CODEC.input_hw).astype(np.float32) for crop in pair])
        flips.append([crop.flip for crop in pair])
    matrices, flips = torch.tensor(np.array(matrices)), torch.tensor(flips)
    image = _indexed(range(num), CODEC.input_hw)
    views = [View(image, matrices[:, i], flips[:, i]) for i in (0, 1)]
    labeled = Labeled(views[0], torch.zeros(num, 17, 2), torch.zeros(num, 17), torch.arange(num))
    batch = Batch(labeled, Pair(*views, torch.zeros(num, 0, 4)))
    return batch, *(torch.tensor(np.array(points), dtype=torch.float32) for points in (weak_xy, strong_xy)), crops


def test_the_teachers_points_are_the_true_ones_in_the_strong_view() -> None:
    """Through random crops, with left and right swapped exactly where one of the views is mirrored."""
    batch, weak_xy, strong_xy, crops = _affine_pairs(60)
    (prepared,) = _mean_teacher(Oracle(CODEC, weak_xy)).prepare([batch], step=300)
    kept = prepared.weights > 0
    heatmap_px = torch.tensor([47 / 191, 63 / 255])
    error = ((prepared.prediction.points_xy - strong_xy) * heatmap_px).abs().amax(dim=-1)
    assert error[kept].max() < 0.01
    last = torch.tensor([191.0, 255.0])
    outside = ((strong_xy < -0.5) | (strong_xy > last + 0.5)).any(dim=-1)
    assert outside.any() and not kept[outside].any(), "what has left the view is not learned from"
    in_both = ((strong_xy > 2) & (strong_xy < last - 2) & (weak_xy > 8) & (weak_xy < last - 8)).all(dim=-1)
    in_both &= in_both.sum(dim=1, keepdim=True) >= 4
    assert kept[in_both].all() and in_both.float().mean() > 0.7
    combinations = {(weak.flip, strong.flip) for weak, strong in crops}
    assert len(combinations) == 4


def test_the_teachers_confidence_goes_with_its_keypoint() -> None:
    """One wrist of low confidence in the weak view is the other wrist of a mirrored strong view."""
    batch, weak_xy, _, crops = _affine_pairs(60)
    unsure = COCO17.names.index("left_wrist")
    heights = torch.ones(60, 17)
    heights[:, unsure] = 0.3
    objective = _mean_teacher(Oracle(CODEC, weak_xy, heights))
    objective.reference = torch.ones(17)
    (prepared,) = objective.prepare([batch], step=300)
    swapped = torch.tensor([weak.flip != strong.flip for weak, strong in crops])
    assert 10 < swapped.sum() < 50
    wrists = {True: COCO17.names.index("right_wrist"), False: unsure}
    for changed, unsure_there in wrists.items():
        rows = prepared.weights[swapped == changed]
        assert not rows[:, unsure_there].any()
        assert (rows[:, wrists[not changed]] > 0).float().mean() > 0.5


def test_a_person_with_fewer_than_four_good_keypoints_is_not_learned_from() -> None:
    points_xy = _points(3, CODEC)
    heights = torch.full((3, 17), 0.3)
    for person, num in enumerate((3, 4, 17)):
        heights[person, :num] = 1.0
    objective = _mean_teacher(Oracle(CODEC, points_xy, heights))
    objective.reference = torch.ones(17)
    (prepared,) = objective.prepare([_same_views(points_xy, CODEC)], step=300)
    assert (prepared.weights > 0).sum(dim=1).tolist() == [0, 4, 17]


def test_confidence_is_relative_to_a_running_quantile_of_each_keypoint() -> None:
    points_xy = _points(10, CODEC)
    heights = torch.linspace(0.1, 1.0, 10)[:, None] * torch.linspace(0.5, 1.0, 17)
    objective = _mean_teacher(Oracle(CODEC, points_xy, heights))
    batch = _same_views(points_xy, CODEC)
    scores = CODEC.decode(objective.teacher(batch.labeled.view.image))[1].detach().numpy()
    first = np.quantile(scores, 0.9, axis=0)
    objective.prepare([batch], step=0)
    np.testing.assert_allclose(objective.reference.numpy(), first, rtol=1e-5)
    objective.teacher.heights = 0.5 * heights
    (prepared,) = objective.prepare([batch], step=1)
    second = 0.95 * first + 0.05 * 0.5 * first
    np.testing.assert_allclose(objective.reference.numpy(), second, rtol=1e-5)
    confidence = np.minimum(0.5 * scores / np.maximum(second, 0.2), 1)
    kept = confidence > 0.7
    expected = confidence * kept * (kept.sum(axis=1, keepdims=True) >= 4)
    np.testing.assert_allclose(prepared.weights.numpy(), expected, rtol=1e-5)


def test_no_gradient_reaches_the_teacher() -> None:
    points_xy = _points(4, CODEC)
    teacher, student = Oracle(CODEC, points_xy), Oracle(CODEC, points_xy + 5)
    objective, batch = _mean_teacher(teacher), _same_views(points_xy, CODEC)
    (prepared,) = objective.prepare([batch], step=300)
    tensors = [value for value in (*prepared, *prepared.prediction) if isinstance(value, Tensor)]
    assert tensors and not any(value.requires_grad for value in tensors)
    objective.loss(student, batch, prepared)[0].backward()
    assert teacher.gain.grad is None and not teacher.gain.requires_grad and not teacher.training
    assert student.gain.grad is not None and student.gain.grad != 0


def _tiny_batch(num: int = 4) -> tuple[Batch, Oracle]:
    """Labeled and unlabeled people for a tiny network, and a teacher that is sure of some keypoints only."""
    points_xy = _points(num, TINY_CODEC)
    weights = torch.ones(num, 17)
    weights[0, :5] = 0.5
    heights = torch.ones(num, 17)
    heights[0, 3:] = 0.25  # unequal halves: 0 + 17 against 9 + 17 kept keypoints
    heights[2, 9:] = 0.25
    weak, strong, seen = (_view(_indexed(range(num), TINY_CODEC.input_hw, seed)) for seed in (0, 1, 2))
    cutout = torch.rand(num, 2, 4, generator=torch.Generator().manual_seed(3))
    labeled = Labeled(seen, points_xy, weights, torch.arange(num))
    return Batch(labeled, Pair(weak, strong, cutout)), Oracle(TINY_CODEC, points_xy, heights)


def _rows(tree: object, rows: slice) -> object:
    """The same tree of NamedTuples, of some of its people."""
    return tree[rows] if isinstance(tree, Tensor) else type(tree)(*(_rows(item, rows) for item in tree))


def _halves(batch: Batch) -> list[Batch]:
    return [_rows(batch, slice(0, 2)), _rows(batch, slice(2, 4))]


def _step(objective: MeanTeacher, student: nn.Module, batches: Sequence[Batch]) -> tuple[float, Tensor]:
    """The loop's step: the mean over micro-batches, and its gradient."""
    student.zero_grad()
    total = 0.0
    for batch, prepared in zip(batches, objective.prepare(batches, step=300), strict=True):
        loss = objective.loss(student, batch, prepared)[0] / len(batches)
        loss.backward()
        total += loss.item()
    objective.limit.end_step()
    return total, torch.cat([parameter.grad.flatten() for parameter in student.parameters()])


def test_two_micro_batches_are_one_batch(tiny: SapiensPose) -> None:
    """Also where one half keeps far fewer keypoints than the other."""
    batch, teacher = _tiny_batch()
    student = tiny.double()
    objectives = [_mean_teacher(teacher, TINY_CODEC, learned=1.5) for _ in range(2)]
    whole, gradient = _step(objectives[0], student, [batch])
    halves, same = _step(objectives[1], student, _halves(batch))
    errors = [objective.limit.errors for objective in objectives]
    assert errors[0].all()
    torch.testing.assert_close(*errors, rtol=1e-6, atol=0)
    kept = [(p.weights > 0).sum().item() for p in _mean_teacher(teacher, TINY_CODEC).prepare(_halves(batch), 300)]
    assert kept[0] < kept[1] and min(kept) > 0
    assert halves == pytest.approx(whole, rel=1e-6)
    torch.testing.assert_close(same, gradient, rtol=1e-5, atol=1e-6 * gradient.abs().max().item())


@pytest.mark.parametrize("unsure", [[], [0, 1], [0, 1, 2, 3]])
def test_two_ranks_are_one_batch(tiny: SapiensPose, unsure: list[int]) -> None:
    """Two threads that gather from each other, as two processes do; the engine averages over ranks.

    Args:
        unsure: people of whom nothing is kept: of nobody's, of all of the first rank's, of everybody's.
    """
    batch, teacher = _tiny_batch()
    teacher.heights[unsure] = 0.1
    student = tiny.double()
    alone = _mean_teacher(teacher, TINY_CODEC, learned=1.5)
    whole, gradient = _step(alone, student, [batch])
    barrier, slots = threading.Barrier(2, timeout=60), [torch.empty(0)] * 2

    def rank(r: int) -> tuple[tuple[float, Tensor], MeanTeacher]:
        def gather(tensor: Tensor) -> Tensor:
            slots[r] = tensor
            barrier.wait()
            gathered = torch.cat(slots)
            barrier.wait()
            return gathered

        objective = _mean_teacher(copy.deepcopy(teacher), TINY_CODEC, gather, learned=1.5)
        return _step(objective, copy.deepcopy(student), [_halves(batch)[r]]), objective

    with ThreadPoolExecutor(2) as ranks:
        ((loss_0, gradient_0), one), ((loss_1, gradient_1), other) = ranks.map(rank, range(2))
    assert torch.equal(one.reference, other.reference) and torch.equal(one.limit.errors, other.limit.errors)
    torch.testing.assert_close(one.limit.errors, alone.limit.errors, rtol=1e-6, atol=0)
    assert alone.limit.errors.all() == (len(unsure) < 4)
    assert (loss_0 + loss_1) / 2 == pytest.approx(whole, rel=1e-6)
    average = (gradient_0 + gradient_1) / 2
    # The copies of a v1 network have no hook on their positions: the slot that Sapiens does not have is left out.
    same = average[gradient != 0], gradient[gradient != 0]
    torch.testing.assert_close(*same, rtol=1e-5, atol=1e-6 * gradient.abs().max().item())


def test_a_batch_without_any_good_keypoint_is_the_supervised_one(tiny: SapiensPose) -> None:
    batch, teacher = _tiny_batch()
    teacher.heights = torch.zeros(4, 17)
    student = tiny.double()
    loss, gradient = _step(_mean_teacher(teacher, TINY_CODEC), student, [batch])
    student.zero_grad()
    alone, _ = Supervised(codec=TINY_CODEC).loss(student, batch, None)
    alone.backward()
    expected = torch.cat([parameter.grad.flatten() for parameter in student.parameters()])
    assert loss == pytest.approx(alone.item(), rel=1e-6) and gradient.any()
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6 * expected.abs().max().item())


# ---- What is compared, and what is said of it


@pytest.mark.parametrize(
    "changes", [{"loss": "mse"}, {"loss": "mse", "target": "heatmap"}, {"target": "heatmap"}, {"loss": "literal"}]
)
def test_other_losses_are_their_formulas(changes: dict[str, str]) -> None:
    """Same views, so that the teacher's map needs no warping; peaks below 1, where the sharpening by the peak shows."""
    points_xy, heights = _points(4, CODEC), torch.linspace(0.8, 1.0, 17).expand(4, 17)
    batch, student = _same_views(points_xy, CODEC), Oracle(CODEC, points_xy + torch.tensor([6.0, -4.0]))
    objective = _mean_teacher(Oracle(CODEC, points_xy, heights), **changes)
    (prepared,) = objective.prepare([batch], step=300)
    _, logs = objective.loss(student, batch, prepared)
    image = batch.labeled.view.image
    h_s, h_t = (network(image).detach().double().numpy() for network in (student, objective.teacher))
    points = prepared.prediction.points_xy
    drawn = CODEC.encode(points, torch.ones(4, 17))[0].double().numpy()
    if changes.get("loss") == "mse":
        expected = ((h_s - (h_t if "target" in changes else drawn)) ** 2).mean(axis=(2, 3))
    elif changes.get("loss") == "literal":
        p, q = (np.exp(maps) / np.exp(maps).sum(axis=(2, 3), keepdims=True) for maps in (h_t / 0.5, h_s))
        expected = (p * np.log(p / q)).sum(axis=(2, 3))
    else:
        expected = np.zeros((4, 17))
        for k in range(17):
            peak = h_t[:, k].max(axis=(1, 2))
            for person in range(4):
                one = np.s_[person : person + 1, k : k + 1]
                expected[person, k] = _reference_kl_of(h_s[one], h_t[one], 2.0, 0.5, 0.5 * peak[person])
    weights = prepared.weights.numpy()
    assert (weights > 0.7).all()
    assert logs["loss_unlabelled"].item() == pytest.approx((weights * expected).sum() / weights.size, rel=2e-3)


def _reference_kl_of(student: np.ndarray, target: np.ndarray, sigma: float, t_student: float, t_target: float) -> float:
    """`_reference_kl` with a temperature of its own for the target."""

    def distribution(maps: np.ndarray, temperature: float) -> np.ndarray:
        line = math.log(0.02) - 1 + maps / 0.02
        power = np.exp(np.where(maps >= 0.02, np.log(np.maximum(maps, 0.02)), line) / temperature)
        return power / power.sum(axis=(2, 3), keepdims=True)

    p, q = distribution(target, t_target), distribution(student, t_student)
    height, width = student.shape[2:]
    return float((p * np.log(p / q)).sum() * math.pi * sigma**2 * t_student / (height * width))


def test_the_literal_loss_pulls_to_twice_the_teachers_height() -> None:
    """Why it is only there to be compared with: a student that equals its teacher is told to rise at the peak."""
    maps = _gaussians((64, 48), 2, [[20.0, 30.0]]).requires_grad_(True)
    literal_kl(maps, maps.detach(), 0.5).sum().backward()
    assert maps.grad is not None and maps.grad[0, 0, 30, 20] < -1e-5
    twice = (2 * maps.detach()).requires_grad_(True)
    literal_kl(twice, maps.detach(), 0.5).sum().backward()
    assert twice.grad is not None and twice.grad.abs().max() < 1e-7


def test_the_teachers_map_moves_as_its_points_do() -> None:
    """Decoded in the strong view, the warped map has its peak where the moved point is; channels swap with them."""
    batch, weak_xy, _, _ = _affine_pairs(40)
    objective = _mean_teacher(Oracle(CODEC, weak_xy), target="heatmap")
    (prepared,) = objective.prepare([batch], step=300)
    prediction = prepared.prediction
    assert prediction.maps is not None
    found, _ = CODEC.decode(prediction.maps)
    last = torch.tensor([191.0, 255.0])
    well_inside = ((prediction.points_xy > 24) & (prediction.points_xy < last - 24)).all(dim=-1) & prediction.kept
    well_inside &= (prediction.scores > 0.9) & _swapped(((weak_xy > 24) & (weak_xy < last - 24)).all(dim=-1), batch)
    heatmap_px = torch.tensor([47 / 191, 63 / 255])
    error = ((found - prediction.points_xy) * heatmap_px).abs().amax(dim=-1)[well_inside]
    assert len(error) > 200 and error.max() < 0.3


def _swapped(values: Tensor, batch: Batch) -> Tensor:
    assert batch.pair
    swapped = batch.pair.weak.flipped != batch.pair.strong.flipped
    return torch.where(swapped[:, None], values[:, MIRROR], values)


def test_raw_confidence_is_the_peak_itself() -> None:
    points_xy = _points(6, CODEC)
    heights = torch.linspace(0.3, 1.4, 6)[:, None].expand(6, 17)
    objective = _mean_teacher(Oracle(CODEC, points_xy, heights), confidence="raw")
    (prepared,) = objective.prepare([_same_views(points_xy, CODEC)], step=300)
    scores = prepared.prediction.scores
    torch.testing.assert_close(prepared.weights, scores.clamp(max=1) * (scores > 0.7))
    assert prepared.logs["keep"].item() == pytest.approx((scores > 0.7).float().mean().item())


def test_without_unlabeled_people_the_labeled_loss_and_the_average_are_left(tiny: SapiensPose) -> None:
    batch, teacher = _tiny_batch()
    alone, student = Batch(batch.labeled, None), tiny.double()
    objective = _mean_teacher(teacher, TINY_CODEC, student=[torch.tensor(3.0)], ratio=0, ema_decay=0.5)
    assert objective.prepare([alone], 0) == [None]
    loss, logs = objective.loss(student, alone, None)
    assert torch.equal(loss, Supervised(codec=TINY_CODEC).loss(student, alone, None)[0]) and logs == {}
    objective.after_step()
    assert objective.teacher.gain.item() == 2.0


def test_the_gradient_ratio_is_that_of_the_two_losses_by_the_heatmaps(tiny: SapiensPose) -> None:
    batch, teacher = _tiny_batch()
    objective, student = _mean_teacher(teacher, TINY_CODEC), tiny.float()
    (prepared,) = objective.prepare([batch], 300)
    with torch.no_grad():
        heatmaps = student(torch.cat([batch.labeled.view.image, prepared.image]))
    heatmaps.requires_grad_(True)
    labeled = objective.supervised.heatmap_loss(heatmaps[:4], batch.labeled, slice(0, 4))
    unlabeled = objective._agreement(heatmaps[4:], prepared, slice(0, 4))
    norms = [torch.autograd.grad(loss, heatmaps, retain_graph=True)[0].norm() for loss in (labeled, unlabeled)]
    for chunk in (None, 3):
        student.head.chunk = chunk
        found = objective.loss(student, batch, prepared)[1]["grad_ratio"]
        torch.testing.assert_close(found, norms[1] / norms[0], rtol=1e-4, atol=0)


def _gradients(objective: MeanTeacher, student: nn.Module, batch: Batch, step: int = 300) -> Tensor:
    """One step's norms of the labeled and the unlabeled gradient at the heatmaps."""
    (prepared,) = objective.prepare([batch], step)
    heatmaps = student(torch.cat([batch.labeled.view.image, prepared.image])).detach().requires_grad_()
    num = len(batch.labeled.view.image)
    labeled = objective.supervised.heatmap_loss(heatmaps[:num], batch.labeled, slice(0, num))
    unlabeled = objective._agreement(heatmaps[num:], prepared, slice(0, num))
    norms = [torch.autograd.grad(loss, heatmaps, retain_graph=True)[0].norm() for loss in (labeled, unlabeled)]
    objective.loss(student, batch, prepared)
    objective.limit.end_step()
    return torch.stack(norms)


class CountedGather:
    """Gathers over one rank, and counts how often."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self, tensor: Tensor) -> Tensor:
        self.times += 1
        return tensor


@pytest.mark.parametrize("weight", [1.0, 50.0])
def test_the_unlabeled_gradient_is_held_to_its_share_from_the_second_step_on(tiny: SapiensPose, weight: float) -> None:
    """The batch and the student stand still, so that what one step measures is exact in the next."""
    batch, teacher = _tiny_batch()
    student = tiny.float()
    free = _mean_teacher(teacher, TINY_CODEC, weight=weight)
    free_labeled, free_unlabeled = _gradients(free, student, batch)
    for share in (0.25, 1e6):
        objective = _mean_teacher(teacher, TINY_CODEC, weight=weight, max_grad_ratio=share)
        first, second, third = (_gradients(objective, student, batch) for _ in range(3))
        torch.testing.assert_close(first[1], free_unlabeled, rtol=1e-4, atol=0)
        expected = torch.minimum(free_unlabeled, share * free_labeled)
        for labeled, unlabeled in (second, third):
            torch.testing.assert_close(labeled, free_labeled, rtol=1e-4, atol=0)
            torch.testing.assert_close(unlabeled, expected, rtol=1e-3, atol=0)
    assert free_unlabeled > 0.25 * free_labeled


@pytest.mark.parametrize(
    ("end", "lefts"),
    [(0.0, {199: 1.0, 600: 0.5, 999: 1 / 800}), (0.2, {159: 1.0, 480: 0.5, 799: 1 / 640})],
)
def test_the_labels_have_the_last_word(tiny: SapiensPose, end: float, lefts: dict[int, float]) -> None:
    """Over the last of the steps with unlabeled people the weight falls to 0 in a line, and the limit with it."""
    (batch, teacher), student = _tiny_batch(), tiny.float()
    for share in (None, 0.25):
        ratios = {}
        for part in (0.0, 0.8):
            options: dict = {"max_grad_ratio": share, "ramp_down": part, "labeled_end": end}
            objective = _mean_teacher(teacher, TINY_CODEC, weight=50.0, **options)
            for step in (100, *lefts):  # of 1000
                labeled, unlabeled = _gradients(objective, student, batch, step)
                ratios[part, step] = unlabeled / labeled
        for step, left in lefts.items():
            torch.testing.assert_close(ratios[0.8, step], left * ratios[0.0, step], rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("end", "num_steps", "mixed"), [(0.0, 10, 10), (0.2, 10, 8), (0.2, 4, 4), (0.2, 5, 4), (0.7, 10, 3), (0.9, 1, 1)]
)
def test_the_number_of_steps_with_unlabeled_people_is_exact(end: float, num_steps: int, mixed: int) -> None:
    config = TeacherConfig(labeled_end=end)
    assert config.unlabeled_steps(num_steps) == mixed
    assert TeacherConfig(labeled_end=end, ratio=0).unlabeled_steps(num_steps) == 0


def test_a_step_of_labeled_people_alone_is_supervised_and_leaves_the_measured_ratio_alone(tiny: SapiensPose) -> None:
    batch, teacher = _tiny_batch()
    alone, student = Batch(batch.labeled, None), tiny.float()
    objective = _mean_teacher(teacher, TINY_CODEC, max_grad_ratio=0.25)
    objective.gather = objective.limit.gather = asked = CountedGather()
    _gradients(objective, student, batch)
    ratio, times = objective.limit.ratio.clone(), asked.times
    assert objective.prepare([alone, alone], 900) == [None, None]
    loss, logs = objective.loss(student, alone, None)
    objective.limit.end_step()
    assert torch.equal(loss, Supervised(codec=TINY_CODEC).loss(student, alone, None)[0]) and logs == {}
    assert ratio > 0 and objective.limit.ratio == ratio and asked.times == times


def test_a_step_without_a_kept_keypoint_leaves_the_measured_ratio_alone(tiny: SapiensPose) -> None:
    batch, teacher = _tiny_batch()
    objective, student = _mean_teacher(teacher, TINY_CODEC, max_grad_ratio=0.25), tiny.float()
    _gradients(objective, student, batch)
    ratio, heights = objective.limit.ratio.clone(), teacher.heights
    teacher.heights = objective.teacher.heights = torch.zeros_like(heights)
    _gradients(objective, student, batch)
    assert ratio > 0 and objective.limit.ratio == ratio
    assert _mean_teacher(teacher, TINY_CODEC).limit.ratio == 0


def _errors(student: nn.Module, batch: Batch, prepared: PseudoLabels) -> Tensor:
    """The mean errors of a keypoint with a label in the image, and of a pseudo-labeled one, by their definition."""
    num = len(batch.labeled.view.image)
    with torch.no_grad():
        heatmaps = student(torch.cat([batch.labeled.view.image, prepared.image]))
    points_xy, labels = batch.labeled.points_xy, batch.labeled.weights
    target, weights = TINY_CODEC.encode(points_xy, labels)
    labeled = (heatmaps[:num] - target).square().mean(dim=(2, 3))
    weights = weights * ((labels > 0) & (points_xy.abs().amax(dim=-1) < 1000))
    target, pseudo = TINY_CODEC.encode(prepared.prediction.points_xy, prepared.weights)
    unlabeled = heatmap_kl(heatmaps[num:], target, TINY_CODEC.sigma, TeacherConfig().temperature)
    return torch.stack([(weights * labeled).sum() / weights.sum(), (pseudo * unlabeled).sum() / pseudo.sum()])


@pytest.mark.parametrize("factor", [1.0, 10.0])
def test_the_errors_are_means_over_the_keypoints_that_count(tiny: SapiensPose, factor: float) -> None:
    """Not over those without a label, known to be absent, or outside the image; whatever weights both losses have."""
    (first, teacher), student = _tiny_batch(), tiny.float()
    labels, points_xy = first.labeled.weights.clone(), first.labeled.points_xy.clone()
    labels[0, 3], labels[1, 5], labels[:, 9], labels[2:, 10] = 0.0, 0.5, -1.0, -1.0
    points_xy[1:, 12:15] = 4000.0
    second = first._replace(labeled=first.labeled._replace(weights=labels, points_xy=points_xy))
    for chunk in (None, 3):
        student.head.chunk = chunk
        objective = _mean_teacher(teacher, TINY_CODEC, weight=factor, learned=1.5)
        objective.supervised.loss_weight = 3 * factor
        seen = []
        for step, batch in ((300, first), (500, second), (600, second)):
            (prepared,) = objective.prepare([batch], step)
            objective.loss(student, batch, prepared)
            objective.limit.end_step()
            seen.append(_errors(student, batch, prepared))
        assert (seen[0][0] - seen[1][0]).abs() > 0.01 * seen[0][0]
        expected = 0.98 * (0.98 * seen[0] + 0.02 * seen[1]) + 0.02 * seen[2]
        torch.testing.assert_close(objective.limit.errors, expected, rtol=1e-5, atol=0)
        torch.testing.assert_close(objective.health()["error_ratio"], expected[1] / expected[0], rtol=1e-5, atol=0)


def test_a_step_without_an_error_to_compare_leaves_the_measured_ones_alone(tiny: SapiensPose) -> None:
    """Nothing is kept; no label; a loss is not finite. Before the first measurement nothing is logged of them."""
    (batch, teacher), student = _tiny_batch(), tiny.float()
    objective = _mean_teacher(teacher, TINY_CODEC, learned=1.5)
    assert objective.limit.open_part == 1 and "limit_open" not in objective.health()
    _gradients(objective, student, batch)
    errors, heights = objective.limit.errors.clone(), teacher.heights
    assert errors.all() and objective.health().keys() >= {"error_ratio", "limit_open"}
    teacher.heights = objective.teacher.heights = torch.zeros_like(heights)
    _gradients(objective, student, batch)
    assert torch.equal(objective.limit.errors, errors)
    teacher.heights = objective.teacher.heights = heights
    none = batch.labeled._replace(weights=torch.zeros_like(batch.labeled.weights))
    _gradients(objective, student, batch._replace(labeled=none))
    assert torch.equal(objective.limit.errors, errors)
    for value in (math.nan, math.inf):
        objective.prepare([batch], 300)
        objective.limit.add(torch.ones(2), torch.tensor([[value, 1.0], [1.0, 1.0]]))
        objective.limit.end_step()
        assert torch.equal(objective.limit.errors, errors)


@pytest.mark.parametrize(
    ("ratio", "part"), [(0.5, 0.01), (1.25, 0.01), (1.3, 0.2), (1.45, 0.8), (1.5, 1.0), (4.0, 1.0)]
)
def test_the_limit_is_whole_once_the_labels_are_learned(tiny: SapiensPose, ratio: float, part: float) -> None:
    """The share of the labeled gradient that is left to the unlabeled one, where they err `ratio` times as much."""
    (batch, teacher), student = _tiny_batch(), tiny.float()
    found = {}
    for learned in (1.0, 1.5):
        objective = _mean_teacher(teacher, TINY_CODEC, weight=50.0, max_grad_ratio=0.25, learned=learned)
        _gradients(objective, student, batch)
        objective.limit.errors = torch.tensor([0.02, 0.02 * ratio])
        found[learned] = _gradients(objective, student, batch)
    torch.testing.assert_close(found[1.5][1], part * found[1.0][1], rtol=1e-3, atol=0)
    torch.testing.assert_close(found[1.5][0], found[1.0][0])


@pytest.mark.parametrize(
    ("options", "unlabeled_each", "fixed", "expected"),
    [
        ({}, 4.99, False, 1.5),
        ({}, 5.0, False, 1.0),
        ({}, math.inf, False, 1.0),
        ({"learned": 1.0}, 0.1, False, 1.0),
        ({"learned": 3.0}, 100.0, True, 3.0),
        ({}, 0.1, True, 1.0),
        ({"max_grad_ratio": None}, 0.1, False, 1.0),
        ({"max_grad_ratio": 0.0}, 0.1, False, 1.0),
        ({"weight": 0.0}, 0.1, False, 1.0),
        ({"loss": "literal"}, 0.1, False, 1.0),
        ({"loss": "mse"}, 0.1, False, 1.5),
    ],
)
def test_by_default_labels_come_first_where_unlabeled_people_are_few(
    options: dict[str, float | str | None], unlabeled_each: float, fixed: bool, expected: float
) -> None:
    config = TeacherConfig(**options)  # pyright: ignore[reportArgumentType]
    assert learned_ratio(config, unlabeled_each, fixed=fixed) == expected


@pytest.mark.parametrize(
    ("options", "state", "expected"),
    [
        ({}, {"learned": torch.tensor(1.5)}, 1.5),
        ({}, {"learned": torch.tensor(0.0)}, 1.0),  # an option said it
        ({}, {}, 1.0),
        ({"learned": 2.0}, {"learned": torch.tensor(1.5)}, 2.0),
        ({"loss": "literal"}, {"learned": torch.tensor(1.5)}, 1.0),
    ],
)
@pytest.mark.parametrize("unlabeled_each", [0.1, 9.0])
def test_a_resumed_stage_keeps_its_default_whatever_people_there_are(
    tiny: SapiensPose, options: dict[str, float | str], state: dict[str, Tensor], expected: float, unlabeled_each: float
) -> None:
    """A state without it is from before that default, which was 1."""
    earlier = _mean_teacher(copy.deepcopy(tiny), TINY_CODEC)
    objective = _mean_teacher(tiny, TINY_CODEC, **options)
    objective.limit.learned = by_people = learned_ratio(objective.config, unlabeled_each, fixed=False)
    objective.load_state_dict({k: v for k, v in earlier.state_dict().items() if k != "learned"} | state)
    said_by_option = "learned" in state and not state["learned"]
    assert objective.limit.learned == (by_people if said_by_option else expected)
    asked = {"learned": torch.tensor(0.0 if "learned" in options else objective.limit.learned)}
    torch.testing.assert_close(objective.state_dict()["learned"], asked["learned"])


def test_errors_are_measured_only_where_the_limit_depends_on_them(tiny: SapiensPose) -> None:
    batch, teacher = _tiny_batch()
    objective = _mean_teacher(teacher, TINY_CODEC)
    _gradients(objective, tiny.float(), batch)
    assert objective.limit.ratio > 0 and not objective.limit.errors.any() and "error_ratio" not in objective.health()


class _Colors(ChunkedHead):
    """Finds red, green and blue spots: its heatmaps are the color channels, as large as the codec's."""

    def __init__(self, codec: Codec) -> None:
        super().__init__()
        self.codec, self.gain = codec, nn.Parameter(torch.ones(()))

    def maps(self, features: Tensor) -> Tensor:
        size = self.codec.heatmap_hw
        return self.gain * F.interpolate(features.float() / 255, size, mode="bilinear", align_corners=True)


@pytest.mark.parametrize("mirrors", [False, True])
def test_the_mean_of_several_views_has_the_points_of_one(mirrors: bool) -> None:
    """For a network that sees the same however an image is turned: within 0.15 heatmap px, and nearly as sure."""
    points_xy = _points(12, CODEC, margin=0.25)[:, :3]
    whole = Codec(input_hw=CODEC.input_hw, heatmap_hw=CODEC.input_hw, sigma=8.0)
    image = (255 * whole.encode(points_xy, torch.ones(12, 3))[0]).round().to(torch.uint8)
    matrices = torch.eye(2, 3).expand(12, 2, 3)
    view = View(image, matrices, torch.zeros(12, dtype=torch.bool))
    pair = Pair(view, view, torch.zeros(12, 0, 4))
    for views in (1, 2, 3, 4):
        setup = TeacherSetup(
            average=MovingAverage(_Colors(CODEC)), student_parameters=lambda: (), num_steps=1000,
            gather=lambda tensor: tensor, mirrors=mirrors,
        )  # fmt: skip
        objective = MeanTeacher(Supervised(codec=CODEC), setup, TeacherConfig(views=views), range(3), "rgb")
        prediction = objective.pseudo_labels(pair)
        error = (prediction.weak_xy - points_xy) * torch.tensor([47 / 191, 63 / 255])
        assert error.abs().max() < 0.15
        assert prediction.scores.min() > 0.9


def test_views_that_disagree_are_not_sure() -> None:
    """A network that sees the same place whatever it is shown: its views, turned back, are at different places."""
    points_xy = torch.tensor([[[40.0, 60.0]]])
    constant = _Constant(CODEC.encode(points_xy, torch.ones(1, 1))[0])
    constant.gain = nn.Parameter(torch.ones(()))
    view = View(_indexed([0], CODEC.input_hw), torch.eye(2, 3)[None], torch.zeros(1, dtype=torch.bool))
    scores = []
    for views in (1, 4):
        setup = TeacherSetup(
            average=MovingAverage(constant), student_parameters=lambda: (), num_steps=1000,
            gather=lambda tensor: tensor, mirrors=True,
        )  # fmt: skip
        objective = MeanTeacher(Supervised(codec=CODEC), setup, TeacherConfig(views=views), range(1), ["nose"])
        scores.append(objective.pseudo_labels(Pair(view, view, torch.zeros(1, 0, 4))).scores.item())
    assert scores[0] > 0.95 and scores[1] < 0.6


def test_a_step_says_how_its_teacher_is() -> None:
    points_xy = _points(50, CODEC)
    heights = torch.ones(50, 17)
    heights[:10, 3] = 0.25
    heights[0, 0] = 1.3
    batch = _same_views(points_xy, CODEC)
    (prepared,) = _mean_teacher(Oracle(CODEC, points_xy, heights)).prepare([batch], step=300)
    logs, scores = prepared.logs, prepared.prediction.scores.numpy()
    assert logs[f"keep/{COCO17.names[3]}"].item() == pytest.approx(0.8)
    assert logs["keep"].item() == pytest.approx(1 - 0.2 / 17)
    assert logs["teacher_peak"].item() == pytest.approx(scores.mean(), rel=1e-5)
    assert logs["teacher_peak_p99"].item() == pytest.approx(np.quantile(scores, 0.99), rel=1e-5)
    expected = (points_xy.numpy() / [192, 256]).std(axis=0).mean()
    assert logs["spread_labelled"].item() == pytest.approx(expected, rel=1e-4)
    assert logs["spread"].item() == pytest.approx(expected, rel=5e-3), "the teacher knows them all"


def test_spread_leaves_out_what_is_not_labeled() -> None:
    points_xy = _points(20, CODEC)
    batch = _same_views(points_xy, CODEC)
    weights = torch.ones(20, 17)
    weights[10:, :5] = 0
    points_xy[10:, :5] = 1e4
    weights[1:, 16] = 0
    labeled = batch.labeled._replace(points_xy=points_xy, weights=weights)
    (prepared,) = _mean_teacher(Oracle(CODEC, _points(20, CODEC))).prepare([Batch(labeled, batch.pair)], step=300)
    shares = points_xy.numpy() / [192, 256]
    expected = np.concatenate([shares[:10, :5].std(axis=0), shares[:, 5:16].std(axis=0)]).mean()
    assert prepared.logs["spread_labelled"].item() == pytest.approx(expected, rel=1e-4)


def test_ema_moved_is_the_share_that_changed_since_it_was_asked() -> None:
    teacher = nn.Linear(32, 1)
    student = [teacher.weight.detach().clone(), teacher.bias.detach().clone()]
    objective = _mean_teacher(teacher, student=student, ema_decay=0.9)
    assert objective.health()["ema_moved"].item() == 0
    student[0][0, :16] += 1
    objective.after_step()
    assert objective.health()["ema_moved"].item() == pytest.approx(16 / 33)
    assert objective.health()["ema_moved"].item() == 0


# ---- The moving average


def test_the_moving_average_is_its_closed_formula_after_3000_steps() -> None:
    """teacher_n = d^n teacher_0 + (1 - d) sum d^(n - i) student_i, here in float64."""
    num, decay = 3000, 0.9998
    path = torch.randn(num, 50, generator=torch.Generator().manual_seed(4)).cumsum(dim=0) * 0.02 + 1
    teacher = nn.Linear(50, 1, bias=False)
    first = teacher.weight.detach().double().clone()
    student: list[Tensor] = [torch.empty(1, 50)]
    objective = _mean_teacher(teacher, student=student, ema_decay=decay)
    for values in path:
        student[0] = values[None]
        objective.after_step()
    powers = decay ** torch.arange(num - 1, -1, -1, dtype=torch.float64)
    expected = decay**num * first + (1 - decay) * powers @ path.double()
    assert teacher.weight.dtype == torch.float32
    torch.testing.assert_close(teacher.weight.double(), expected, rtol=0, atol=3e-6)
    assert (expected - first).abs().max() > 0.1


def test_a_bf16_student_is_averaged_in_fp32() -> None:
    """In bf16 a 5000th of a difference is less than half of the last bit, and the teacher would never move."""
    teacher = nn.Linear(3, 1, bias=False).bfloat16()
    objective = _mean_teacher(teacher, student=[torch.full((1, 3), 2.0, dtype=torch.bfloat16)], ema_decay=0.9998)
    first = teacher.weight.detach().double().clone()
    for _ in range(100):
        objective.after_step()
    assert teacher.weight.dtype == torch.float32
    torch.testing.assert_close(teacher.weight.double(), 2 + (first - 2) * 0.9998**100, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("num_steps", "expected"), [(100, 0.99), (5000, 0.99), (50_000, 0.999), (250_000, 0.9998), (10**7, 0.9998)]
)
def test_ema_decay_has_a_window_of_a_fiftieth_of_the_stage(num_steps: int, expected: float) -> None:
    assert ema_decay(num_steps) == pytest.approx(expected, abs=1e-12)


def test_the_decay_is_the_configured_one_or_follows_from_the_stage() -> None:
    assert _mean_teacher(nn.Linear(1, 1)).decay == ema_decay(1000)
    assert _mean_teacher(nn.Linear(1, 1), ema_decay=0.5).decay == 0.5


def test_state_round_trip_is_exact(tiny: SapiensPose) -> None:
    batch, oracle = _tiny_batch()
    objective = _mean_teacher(oracle, TINY_CODEC, student=[torch.tensor(0.7)], ema_decay=0.9)
    for step in range(3):
        objective.prepare([batch], step)
        objective.after_step()
    state = copy.deepcopy(objective.state_dict())
    assert set(state) == {"reference", "grad_ratio", "errors", "learned", "teacher.gain"}
    assert state["reference"].all() and state["learned"] == 1
    resumed = _mean_teacher(_tiny_batch()[1], TINY_CODEC, student=[torch.tensor(0.7)], ema_decay=0.9)
    resumed.load_state_dict({name: value for name, value in state.items() if name != "errors"})
    assert not resumed.limit.errors.any(), "an earlier version's: they are measured anew"
    state["errors"] = torch.tensor([0.1, 0.3])
    resumed.load_state_dict(state)
    assert all(torch.equal(value, state[name]) for name, value in resumed.state_dict().items())
    for one, other in zip(objective.prepare([batch], 3), resumed.prepare([batch], 3), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one[1:4], other[1:4], strict=True))
        assert all(torch.equal(a, b) for a, b in zip(one.prediction[:5], other.prediction[:5], strict=True))
    assert torch.equal(objective.reference, resumed.reference)
    network = _mean_teacher(copy.deepcopy(tiny), TINY_CODEC)
    again = _mean_teacher(SapiensPose(tiny.name, 17, (64, 48)), TINY_CODEC)
    again.load_state_dict(network.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(again.teacher.parameters(), tiny.parameters(), strict=True))


def test_the_teacher_is_handed_on_and_the_student_is_kept() -> None:
    teacher = nn.Linear(2, 1)
    objective, student = _mean_teacher(teacher), {"weight": torch.zeros(1, 2)}
    written = objective.results(student)
    assert objective.result(nn.Linear(2, 1)) is teacher
    assert set(written) == {"weights", "student"} and written["student"] is student
    assert torch.equal(written["weights"]["weight"], teacher.weight)


# ---- Keypoint cutout


def _expected_cut(pair: Pair, points_xy: Tensor) -> np.ndarray:
    """Pixel by pixel: squares with half sides of 5 to 10 % of the width, centers jittered by a deviation of 5 %."""
    image = pair.strong.image.numpy().copy()
    num, _, height, width = image.shape
    for person in range(num):
        for which, offset_x, offset_y, size in pair.cutout[person].double().tolist():
            x, y = points_xy[person, min(int(which * 17), 16)].double().tolist()
            reach = math.sqrt(3) * 0.05 * width  # uniform within +-sqrt(3) has a deviation of 1
            x, y, half = x + (2 * offset_x - 1) * reach, y + (2 * offset_y - 1) * reach, (0.05 + 0.05 * size) * width
            for row in range(height):
                for column in range(width):
                    if abs(row - y) <= half and abs(column - x) <= half:
                        image[person, :, row, column] = (124, 116, 104)
    return image


def test_cut_out_hides_exactly_its_squares() -> None:
    generator = torch.Generator().manual_seed(5)
    view = _view(_indexed(range(4), (64, 48)))
    points_xy = torch.rand(4, 17, 2, generator=generator) * torch.tensor([60.0, 80.0]) - 8  # some outside the view
    pair = Pair(view, view, torch.rand(4, 3, 4, generator=generator))
    before = view.image.clone()
    found = cut_out(pair, points_xy)
    expected = _expected_cut(pair, points_xy)
    assert found.dtype == torch.uint8
    np.testing.assert_array_equal(found.numpy(), expected)
    assert (expected != before.numpy()).any() and torch.equal(view.image, before)


def test_cut_out_by_hand() -> None:
    """On the last keypoint at (100, 60), in the middle, of half a side of 5 % of 200 px: 21 x 21 pixels."""
    view = _view(torch.zeros(1, 3, 120, 200, dtype=torch.uint8))
    points_xy = torch.zeros(1, 17, 2) - 500
    points_xy[0, 16] = torch.tensor([100.0, 60.0])
    found = cut_out(Pair(view, view, torch.tensor([[[0.9999, 0.5, 0.5, 0.0]]])), points_xy)
    expected = torch.zeros(1, 3, 120, 200, dtype=torch.uint8)
    expected[0, :, 50:71, 90:111] = torch.tensor([124, 116, 104], dtype=torch.uint8)[:, None, None]
    assert torch.equal(found, expected)


def test_few_keypoints_are_not_all_hidden() -> None:
    """Five squares on a body of four would hide three of them on average."""
    counts = {num: TeacherConfig().num_cutouts(num) for num in (1, 4, 10, 16, 17, 133)}
    assert counts == {1: 1, 4: 1, 10: 3, 16: 5, 17: 5, 133: 5}
    assert TeacherConfig(cutout=9).num_cutouts(4) == 9 and TeacherConfig(cutout=0).num_cutouts(17) == 0


def test_no_cutout_changes_nothing() -> None:
    view = _view(_indexed(range(2), (64, 48)))
    assert torch.equal(cut_out(Pair(view, view, torch.zeros(2, 0, 4)), torch.zeros(2, 17, 2)), view.image)
