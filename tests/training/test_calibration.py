"""Confidence as the probability of being right: fitted on scores whose probabilities are known."""

import dataclasses

import numpy as np
import pytest
import torch
from numpy import ndarray as Array
from torch import nn

from sapiens_accel.config.schema import AugmentConfig, TeacherConfig
from sapiens_accel.data.augment import Augmenter
from sapiens_accel.pose.geometry import Crop
from sapiens_accel.pose.heatmap import Codec
from sapiens_accel.pose.skeleton import COCO17
from sapiens_accel.training.ema import MovingAverage
from sapiens_accel.training.mean_teacher import MeanTeacher, TeacherSetup
from sapiens_accel.training.objectives import Supervised
from sapiens_accel.training.pseudo_label_quality import Judged, ProbeResult, draw_calibration
from sapiens_accel.visibility.regression import fit_calibration

OFFSETS = np.linspace(-2.5, 2.5, 17)  # from a keypoint that the teacher is bad at to one that it is good at
SLOPE, INTERCEPT = 9.0, -4.0


def _drawn(num: int, seed: int) -> tuple[Array, Array, Array]:
    """Scores, the probability that each is right, and whether it is."""
    rng = np.random.default_rng(seed)
    scores = rng.uniform(0, 1, (num, 17))
    p = 1 / (1 + np.exp(-(SLOPE * scores + INTERCEPT + OFFSETS)))
    return scores, p, rng.random(p.shape) < p


def _objective(calibration: torch.Tensor) -> MeanTeacher:
    codec, network = Codec(input_hw=(64, 48), heatmap_hw=(16, 12), sigma=1.0), nn.Linear(1, 1)
    setup = TeacherSetup(average=MovingAverage(network), student_parameters=list, num_steps=9, gather=lambda t: t)
    config = TeacherConfig(confidence="calibrated", threshold=0.9)
    objective = MeanTeacher(Supervised(codec=codec), setup, config, COCO17.mirror, COCO17.names)
    assert not objective.calibration.any()
    objective.calibrate(calibration)
    return objective


def test_nine_of_ten_are_right_where_it_says_so() -> None:
    """On people that it was not fitted on, for each keypoint, within three binomial errors of those."""
    scores, _, right = _drawn(4000, 0)
    objective = _objective(fit_calibration(scores, right, np.ones_like(right)))
    scores, p, right = _drawn(4000, 1)
    confidence = objective._confidence(torch.tensor(scores)).numpy()
    assert np.abs(confidence - p).max() < 0.05 and np.abs(confidence - p).mean() < 0.01
    near = (confidence > 0.88) & (confidence < 0.92)
    for k in range(17):
        num = near[:, k].sum()
        assert num > 100 and abs(right[near[:, k], k].mean() - 0.9) < 3 * np.sqrt(0.09 / num) + 0.005
    kept = confidence > 0.9
    assert right[kept].mean() > 0.95 and not kept[:, 0].all() and (kept.mean(axis=0)[-1] > 4 * kept.mean(axis=0)[0])


def test_the_fit_is_the_optimum() -> None:
    """Of the penalized likelihood as torch differentiates it; keypoints that do not count change nothing."""
    scores, _, right = _drawn(40, 2)
    counted = np.random.default_rng(3).random(right.shape) < 0.7
    fitted = fit_calibration(np.where(counted, scores, 0.9), np.where(counted, right, True), counted)
    values = fitted.clone().requires_grad_()
    x, k = torch.tensor(scores[counted]), torch.tensor(np.nonzero(counted)[1])
    num = right[counted].sum(), (~right[counted]).sum()
    target = torch.tensor(np.where(right[counted], (num[0] + 1) / (num[0] + 2), 1 / (num[1] + 2)))
    logit = values[0] * x + values[1] + values[2:][k]
    loss = nn.functional.binary_cross_entropy_with_logits(logit, target, reduction="sum")
    loss = loss + 0.5 * values[2:].square().sum() + 0.5e-3 * values[:2].square().sum()
    (gradient,) = torch.autograd.grad(loss, values)
    assert gradient.abs().max() < 1e-6
    assert torch.equal(fitted, fit_calibration(scores, right, counted))


@pytest.mark.parametrize("case", ["few", "all right", "all wrong", "separable", "inverted", "nobody"])
def test_few_people_give_no_certainty(case: str) -> None:
    scores, _, right = _drawn(5, 4)
    counted = np.full(right.shape, case != "nobody")
    right = {"all right": right | True, "all wrong": right & False, "separable": scores > 0.5,
             "inverted": scores < 0.5}.get(case, right)  # fmt: skip
    calibration = fit_calibration(scores, right, counted)
    confidence = _objective(calibration)._confidence(torch.tensor(scores))
    assert calibration.isfinite().all() and calibration[0] >= 0, "a higher peak never counts for less"
    assert calibration.abs().max() < 40 and confidence.min() > 1e-4 and confidence.max() < 0.9999
    if case == "all right":
        assert confidence.min() > 0.97 and confidence.max() < 0.995  # 85 of 85: (85 + 1) / (85 + 2)
    if case == "nobody":
        assert torch.equal(confidence, torch.full_like(confidence, 0.5)), "above no threshold worth the name"


def test_a_resumed_teacher_has_its_calibration() -> None:
    scores, _, right = _drawn(50, 5)
    one = _objective(fit_calibration(scores, right, np.ones_like(right)))
    other = _objective(torch.ones(19))
    other.load_state_dict(one.state_dict())
    assert torch.equal(one.calibration, other.calibration)
    plain = dataclasses.replace(one.config, confidence="keypoint")
    one.config = plain
    assert "calibration" not in one.state_dict(), "checkpoints of other runs are as they were"


def test_the_curve_is_drawn_as_high_as_its_share() -> None:
    confidence = np.full((100, 1), 0.85)
    right = np.arange(100)[:, None] < 60
    all_of_them = np.ones_like(right)
    judged = Judged(confidence, confidence, all_of_them, right, all_of_them, all_of_them, all_of_them)
    image = draw_calibration(ProbeResult({}, (), judged).bins)[-400:]
    column = (image[:, 8 * 40 + 36] == (59, 125, 216)).all(axis=-1)
    assert column.sum() == pytest.approx(0.6 * 400, abs=4) and not (image[:, 20] == (59, 125, 216)).all(axis=-1).any()


def test_a_body_without_halves_is_not_halved() -> None:
    """A mouse by its snout and tail was cropped to its upper half as if it stood."""
    config = AugmentConfig(strong_half_body_p=1.0, strong_rotation=0, strong_scale=0, strong_shift=0, flip_p=0)
    whole = Crop(center_xy=(50.0, 60.0), size_wh=(30.0, 40.0))
    for upper, halved in (((), False), (tuple(range(17)), False), (COCO17.upper, True)):
        skeleton = dataclasses.replace(COCO17, upper=upper)
        crop = Augmenter(config=config, skeleton=skeleton, input_hw=(64, 48)).strong_crop(
            whole, np.random.default_rng(0)
        )
        assert (crop.size_wh != whole.size_wh) == halved
