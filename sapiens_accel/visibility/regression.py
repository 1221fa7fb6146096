"""Logistic regressions: of keypoints' descriptions on their labels, and of a score on whether it is right.

Shape letters: n people, k keypoints, d numbers of a description.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from numpy import ndarray as Array
from torch import Tensor

from sapiens_accel.pose.visibility import is_labeled, is_visible
from sapiens_accel.visibility import quality
from sapiens_accel.visibility.output import NUM_SHAPE, OUTPUTS, VisibilityOutput

OFFSET_RIDGE = 1.0  # keypoints' offsets have a standard deviation of about 1 in log-odds
SLOPE_RIDGE = 1e-3  # none to speak of: it makes Newton's matrix invertible
NEWTON_STEPS = 50  # it takes about 8
RIDGES = (1e-2, 1e-1, 1.0)
BIAS_RIDGE = 1e-3  # of about one person, where there are a thousand keypoints
LEVEL_RIDGE = 1e-5  # none to speak of: where all keypoints are there, the level would grow without end
STEPS = 200


def fit_calibration(
    scores: Float[Array, "n k"], right: Bool[Array, "n k"], counted: Bool[Array, "n k"]
) -> Float[Tensor, "2+k"]:
    """Fit P(right) = sigmoid(slope * score + intercept + offset of the keypoint); returned in this order.

    A logistic regression by Newton's method, with a ridge on the offsets, and with the targets of Platt 1999
    (Probabilistic Outputs for Support Vector Machines, section 2.2): (N+ + 1) / (N+ + 2) and 1 / (N- + 2) in place of 1
    and 0. So a few people whose keypoints are all right give no certainty. A higher score never means a lower
    probability: a negative slope is 0.
    """
    k = np.nonzero(counted)[1]
    x, is_right = scores[counted].astype(np.float64), right[counted]
    num = scores.shape[1]
    positive, negative = int(is_right.sum()), int((~is_right).sum())
    target = np.where(is_right, (positive + 1) / (positive + 2), 1 / (negative + 2))
    common, offsets = np.zeros(2), np.zeros(num)

    def loss(common: Float[Array, "2"], offsets: Float[Array, "k"]) -> float:
        logit = common[0] * x + common[1] + offsets[k]
        ridge = SLOPE_RIDGE * common @ common + OFFSET_RIDGE * offsets @ offsets
        return float((np.logaddexp(0, logit) - target * logit).sum() + ridge / 2)

    for _ in range(NEWTON_STEPS):
        p = 1 / (1 + np.exp(-(common[0] * x + common[1] + offsets[k])))
        weight, error = p * (1 - p), p - target
        by_keypoint = np.bincount(k, error, num) + OFFSET_RIDGE * offsets
        gradient = np.array([error @ x, error.sum()]) + SLOPE_RIDGE * common
        diagonal = np.bincount(k, weight, num) + OFFSET_RIDGE
        mixed = np.stack([np.bincount(k, weight * x, num), np.bincount(k, weight, num)])
        whole = np.array([[weight @ x**2, weight @ x], [weight @ x, weight.sum()]]) + SLOPE_RIDGE * np.eye(2)
        # The offsets' part of the Hessian is diagonal, so 2 equations are left.
        step = np.linalg.solve(whole - (mixed / diagonal) @ mixed.T, gradient - (mixed / diagonal) @ by_keypoint)
        further, length = (by_keypoint - step @ mixed) / diagonal, 1.0
        before = loss(common, offsets)
        while length > 1e-6 and loss(common - length * step, offsets - length * further) > before:
            length /= 2
        common, offsets = common - length * step, offsets - length * further
        if max(abs(step).max(), abs(further).max(initial=0)) < 1e-9:
            break
    if common[0] < 0:
        return fit_calibration(np.zeros_like(scores), right, counted)
    return torch.from_numpy(np.concatenate([common, offsets]))


Fit = tuple[Float[Tensor, "2 k d"], Float[Tensor, "2 k"]]


class DescribedPeople(NamedTuple):
    """People's keypoints: descriptions, heatmap peaks, and what their labels say."""

    descriptions: Float[Tensor, "n k d"]
    peaks: Float[Array, "n k"]
    present: Bool[Tensor, "n k"]
    visible: Bool[Tensor, "n k"]

    @classmethod
    def of(
        cls, descriptions: Float[Array, "n k d"] | None, peaks: Float[Array, "n k"], labels: Float[Array, "n k 3"]
    ) -> "DescribedPeople":
        """From predictions and labels (x, y, v)."""
        assert descriptions is not None
        present, visible = torch.from_numpy(is_labeled(labels)), torch.from_numpy(is_visible(labels))
        return cls(torch.from_numpy(descriptions), peaks, present, visible)

    def take(self, people: slice) -> "DescribedPeople":
        """Some of them."""
        return DescribedPeople(
            self.descriptions[people], self.peaks[people], self.present[people], self.visible[people]
        )


def learn(
    people: DescribedPeople, others: DescribedPeople, names: Sequence[str], check: Callable[[], None] = lambda: None
) -> VisibilityOutput:
    """Fit on some people; choose the ridge, or the peak alone, and calibrate on others.

    `about` of the output has the numbers of people, and `quality` (see `quality.measure_output`) on the others: each
    half of them is judged by what was chosen and calibrated on the other half.
    """
    fits = [*(fit_output(people, ridge, check) for ridge in RIDGES), fit_peak(people)]
    halves = [others.take(slice(start, None, 2)) for start in (0, 1)] if len(others.peaks) > 1 else [others, others]
    judged = [
        VisibilityOutput(names, *calibrate_best(fits, calibrating)).judge(half.descriptions.float())
        for half, calibrating in zip(halves, halves[::-1], strict=True)
    ]
    peaks = np.concatenate([half.peaks for half in halves])
    labels = {name: torch.cat([getattr(half, name) for half in halves]).numpy() for name in OUTPUTS}
    measured = quality.measure_output(torch.cat(judged).numpy(), peaks, labels)
    about = {"people": len(people.peaks), "calibration_people": len(others.peaks), "quality": measured}
    return VisibilityOutput(names, *calibrate_best(fits, others), about)


def fit_output(people: DescribedPeople, ridge: float, check: Callable[[], None] = lambda: None) -> Fit:
    """Weights and biases of `VisibilityOutput`: of present, and of visible among those present.

    Each keypoint has its own weights, which are those of all keypoints plus a difference, and a ridge on both holds
    rare kinds to the common ones (Evgeniou and Pontil 2004, Regularized multi-task learning). Convex; by L-BFGS.

    Args:
        ridge: of standardized numbers, beside a mean of log losses.
        check: called in each step; what it raises ends the fit.
    """
    width = people.descriptions.shape[-1]
    # [k, n, d]
    x = people.descriptions.transpose(0, 1).to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    variance, mean = torch.var_mean(x, dim=(0, 1), correction=0)
    scale = variance.sqrt().clamp_min(1e-6)
    x.sub_(mean).div_(scale)
    target = torch.stack([people.present, people.visible], dim=-1).transpose(0, 1).float()
    counted = torch.stack([torch.ones_like(people.present), people.present], dim=-1).transpose(0, 1).float()
    common = torch.zeros(width, 2, requires_grad=True)
    own = torch.zeros(len(x), width, 2, requires_grad=True)
    level = torch.zeros(2, requires_grad=True)
    offset = torch.zeros(len(x), 1, 2, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [common, own, level, offset],
        max_iter=STEPS,
        tolerance_grad=1e-6,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        check()
        optimizer.zero_grad()
        logits = torch.baddbmm(level + offset, x, common + own)
        losses = F.binary_cross_entropy_with_logits(logits, target, weight=counted, reduction="none")
        loss = (losses.sum(dim=(0, 1)) / counted.sum(dim=(0, 1)).clamp_min(1)).sum()
        loss = loss + ridge / 2 * (common.square().sum() + own.square().sum())
        loss = loss + (LEVEL_RIDGE * level.square().sum() + BIAS_RIDGE * offset.square().sum()) / 2
        loss.backward()
        return loss.detach()

    optimizer.step(closure)
    weight = ((common + own).detach() / scale[:, None]).permute(2, 0, 1)
    bias = (level + offset).detach()[:, 0].T - weight @ mean
    return weight.contiguous(), bias.contiguous()


def fit_peak(people: DescribedPeople) -> Fit:
    """The same of the peak alone: a slope for all, a level for each keypoint. A network that has memorized a few people
    describes others so differently that nothing else carries over.
    """
    weight, biases = torch.zeros(2, *people.descriptions.shape[1:]), []
    peaks = people.descriptions[..., -NUM_SHAPE].float().numpy()
    masks = ((people.present, torch.ones_like(people.present)), (people.visible, people.present))
    for index, (right, counted) in enumerate(masks):
        slope, intercept, *offsets = fit_calibration(peaks, right.numpy(), counted.numpy()).float()
        weight[index, :, -NUM_SHAPE] = slope
        biases.append(intercept + torch.stack(offsets))
    return weight, torch.stack(biases)


def calibrate_best(fits: Sequence[Fit], people: DescribedPeople) -> Fit:
    """Of each output the fit whose log loss on these people is least, with a slope and an intercept.

    So that these people's probabilities are right; six numbers are learned of them.
    """
    weights, biases = [], []
    masks = ((people.present, torch.ones_like(people.present)), (people.visible, people.present))
    for index, (right, counted) in enumerate(masks):
        calibrated = [_calibrate(weight[index], bias[index], people, right, counted) for weight, bias in fits]
        _, weight, bias = min(calibrated, key=lambda one: one[0])
        weights.append(weight)
        biases.append(bias)
    return torch.stack(weights), torch.stack(biases)


def _calibrate(
    weight: Float[Tensor, "k d"],
    bias: Float[Tensor, "k"],
    people: DescribedPeople,
    right: Bool[Tensor, "n k"],
    counted: Bool[Tensor, "n k"],
) -> tuple[float, Float[Tensor, "k d"], Float[Tensor, "k"]]:
    """Log loss, weight and bias after the calibration."""
    logits = torch.einsum("nkd,kd->nk", people.descriptions.float(), weight) + bias
    rows = (one.reshape(-1, 1).numpy() for one in (logits, right, counted))
    slope, intercept, offset = fit_calibration(*rows).float()
    logits = slope * logits + intercept + offset
    losses = F.binary_cross_entropy_with_logits(logits, right.float(), reduction="none")
    loss = float((losses * counted).sum() / counted.sum().clamp_min(1))
    return loss, slope * weight, slope * bias + intercept + offset
