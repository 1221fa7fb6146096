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
from sapiens_accel.visibility.output import OUTPUTS, VisibilityOutput

OFFSET_RIDGE = 1.0  # keypoints' offsets have a standard deviation of about 1 in log-odds
SLOPE_RIDGE = 1e-3  # none to speak of: it makes Newton's matrix invertible
NEWTON_STEPS = 50  # it takes about 8
RIDGE = 1e-2  # on the weights of standardized numbers, beside a mean of log losses
BIAS_RIDGE = 1e-3  # where a kind of keypoint is always there, its bias would grow without end
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
    """Fit on some people, calibrate on others.

    `about` of the output has the numbers of people, and `quality` (see `quality.measure_output`) on the others: each
    half of them is judged by what was calibrated on the other half.
    """
    fitted = fit_output(people.descriptions, people.present, people.visible, check)
    halves = [others.take(slice(start, None, 2)) for start in (0, 1)] if len(others.peaks) > 1 else [others, others]
    judged = [
        VisibilityOutput(names, *calibrate_output(*fitted, calibrating)).judge(half.descriptions.float())
        for half, calibrating in zip(halves, halves[::-1], strict=True)
    ]
    peaks = np.concatenate([half.peaks for half in halves])
    labels = {name: torch.cat([getattr(half, name) for half in halves]).numpy() for name in OUTPUTS}
    measured = quality.measure_output(torch.cat(judged).numpy(), peaks, labels)
    about = {"people": len(people.peaks), "calibration_people": len(others.peaks), "quality": measured}
    return VisibilityOutput(names, *calibrate_output(*fitted, others), about)


def fit_output(
    descriptions: Float[Tensor, "n k d"],
    present: Bool[Tensor, "n k"],
    visible: Bool[Tensor, "n k"],
    check: Callable[[], None] = lambda: None,
) -> tuple[Float[Tensor, "2 k d"], Float[Tensor, "2 k"]]:
    """Weights and biases of `VisibilityOutput`: of present, and of visible among those present.

    Each keypoint has its own weights, which are those of all keypoints plus a difference, and a ridge on both holds
    rare kinds to the common ones (Evgeniou and Pontil 2004, Regularized multi-task learning). Convex; by L-BFGS.

    Args:
        check: called in each step; what it raises ends the fit.
    """
    width = descriptions.shape[-1]
    x = descriptions.transpose(0, 1).to(torch.float32, copy=True, memory_format=torch.contiguous_format)  # [k, n, d]
    variance, mean = torch.var_mean(x, dim=(0, 1), correction=0)
    scale = variance.sqrt().clamp_min(1e-6)
    x.sub_(mean).div_(scale)
    target = torch.stack([present, visible], dim=-1).transpose(0, 1).float()
    counted = torch.stack([torch.ones_like(present), present], dim=-1).transpose(0, 1).float()
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
        ridge = RIDGE * (common.square().sum() + own.square().sum()) + BIAS_RIDGE * offset.square().sum()
        (loss + ridge / 2).backward()
        return loss.detach() + ridge.detach() / 2

    optimizer.step(closure)
    weight = ((common + own).detach() / scale[:, None]).permute(2, 0, 1)
    bias = (level + offset).detach()[:, 0].T - weight @ mean
    return weight.contiguous(), bias.contiguous()


def calibrate_output(
    weight: Float[Tensor, "2 k d"],
    bias: Float[Tensor, "2 k"],
    people: DescribedPeople,
) -> tuple[Float[Tensor, "2 k d"], Float[Tensor, "2 k"]]:
    """The same regressions with a slope and an intercept each, so that these people's probabilities are right."""
    logits = torch.einsum("nkd,okd->onk", people.descriptions.float(), weight) + bias[:, None]
    weight, bias = weight.clone(), bias.clone()
    masks = ((people.present, torch.ones_like(people.present)), (people.visible, people.present))
    for index, (right, counted) in enumerate(masks):
        rows = (one.reshape(-1, 1).numpy() for one in (logits[index], right, counted))
        slope, intercept, offset = fit_calibration(*rows).float()
        weight[index], bias[index] = slope * weight[index], slope * bias[index] + intercept + offset
    return weight, bias
