"""What a step minimizes: the protocol of an objective, the supervised loss, and the terms they are made of.

Shape letters: b labeled people, u unlabeled people, k keypoints, h w the heatmap. Everything is computed in fp32,
whatever the precision of the network. Single-device code.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from sapiens_accel.data.dataset import Batch, Labeled
from sapiens_accel.pose.heatmap import Codec

LOG_FLOOR = 0.02  # eps of `log_linear`
LABELED_PARTS = ("loss_labelled", "loss_distill")  # of labeled people: by their labels, by a fixed teacher's heatmaps


class Objective(Protocol):
    """What the loop asks of an objective."""

    def prepare(self, batches: Sequence[Batch], step: int) -> list[Any]:
        """Whatever the losses of one step's micro-batches need to know of each other; one item for each."""
        ...

    def loss(self, model: nn.Module, batch: Batch, prepared: Any) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """The loss of one micro-batch; the step's loss is the mean over micro-batches and ranks."""
        ...

    def after_step(self) -> None:
        """Called after each optimizer step."""
        ...

    def health(self) -> dict[str, Tensor]:
        """What is worth a look now and then; it is computed where logs are written."""
        ...

    @property
    def codec(self) -> Codec: ...

    def result(self, model: nn.Module) -> nn.Module:
        """What is evaluated and handed on."""
        ...

    def results(self, student: Mapping[str, Tensor]) -> dict[str, Mapping[str, Tensor]]:
        """What is written, by folder: `weights` are the result's. All ranks must call it; rank 0 writes."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """What a resumed run needs beside the model and the optimizer. All ranks must call it; rank 0 writes."""
        ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None: ...


@dataclass(frozen=True, kw_only=True)
class FixedTeacher:
    """A trained network that does not change, whose heatmaps are learned beside the labels (distillation).

    Attributes:
        network: in evaluation mode, without gradients, in the precision that it is to run in.
        weight: of the loss that compares with it, relative to the labeled one.
    """

    network: nn.Module
    weight: float = 1.0

    @torch.no_grad()
    def __call__(self, image: UInt8[Tensor, "n 3 H W"]) -> Float[Tensor, "n k h w"]:
        with torch.autocast(image.device.type, enabled=False):
            return self.network(image).float()


@dataclass(kw_only=True)
class Supervised:
    """The published loss: mean over people, keypoints and pixels of weight * (heatmap - target)^2.

    With a fixed teacher also the mean of (heatmap - its heatmap)^2, over all keypoints, labeled or not (Hinton et al.
    2015, https://arxiv.org/abs/1503.02531, by heatmaps as in Zhang et al. 2019, https://arxiv.org/abs/1811.05419).
    """

    codec: Codec
    loss_weight: float = 1.0
    teacher: FixedTeacher | None = None

    def prepare(self, batches: Sequence[Batch], step: int) -> list[None]:
        return [None] * len(batches)

    def loss(self, model: nn.Module, batch: Batch, prepared: None) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        def terms(heatmaps: Float[Tensor, "n k h w"], people: slice) -> Float[Tensor, "t"]:
            labeled = self.heatmap_loss(heatmaps, batch.labeled, people)
            return torch.stack([labeled, *self.teacher_losses(heatmaps, batch.labeled, people)])

        loss, parts = model(batch.labeled.view.image, terms)
        return loss, dict(zip(LABELED_PARTS, parts, strict=False)) if self.teacher else {}

    def heatmap_loss(self, heatmaps: Float[Tensor, "n k h w"], labeled: Labeled, people: slice) -> Float[Tensor, ""]:
        """What the labels of these people add to the micro-batch's loss. Only their targets are drawn here."""
        errors, weights = self.keypoint_errors(heatmaps, labeled, people)
        return self.labeled_loss(weights * errors, labeled)

    def keypoint_errors(
        self, heatmaps: Float[Tensor, "n k h w"], labeled: Labeled, people: slice
    ) -> tuple[Float[Tensor, "n k"], Float[Tensor, "n k"]]:
        """The mean squared errors of these people's keypoints, and their weights: 0 for those without a target."""
        target, weights = self.codec.encode(labeled.points_xy[people], labeled.weights[people])
        return (heatmaps.float() - target).square().mean(dim=(2, 3)), weights

    def labeled_loss(self, errors: Float[Tensor, "n k"], labeled: Labeled) -> Float[Tensor, ""]:
        """What weighted errors of some people add to the loss of the micro-batch `labeled`."""
        return self.loss_weight * self.sum_errors(errors) / labeled.weights.numel()

    def teacher_losses(
        self, heatmaps: Float[Tensor, "n k h w"], labeled: Labeled, people: slice
    ) -> list[Float[Tensor, ""]]:
        """What the fixed teacher's heatmaps add to the loss for these people; empty without a fixed teacher."""
        if self.teacher is None:
            return []
        if not len(heatmaps):  # of a chunk of unlabeled people
            return [heatmaps.new_zeros((), dtype=torch.float32)]
        difference = heatmaps.float() - self.teacher(labeled.view.image[people])
        weight = self.loss_weight * self.teacher.weight / labeled.weights.numel()
        return [weight * difference.square().mean(dim=(2, 3)).sum()]

    def sum_errors(self, errors: Float[Tensor, "n k"]) -> Float[Tensor, ""]:
        """The labeled loss of some people times the micro-batch's number of keypoints.

        Args:
            errors: weighted, of each keypoint.
        """
        return errors.sum()

    def after_step(self) -> None:
        pass

    def health(self) -> dict[str, Tensor]:
        return {}

    def result(self, model: nn.Module) -> nn.Module:
        return model

    def results(self, student: Mapping[str, Tensor]) -> dict[str, Mapping[str, Tensor]]:
        return {"weights": student}

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        pass


def log_linear(h: Float[Tensor, "*shape"], floor: float = LOG_FLOOR) -> Float[Tensor, "*shape"]:
    """log h above `floor`, and below it the line that continues it smoothly: no dead zone, slope at most 1 / floor."""
    return torch.where(h >= floor, h.clamp_min(floor).log(), math.log(floor) - 1 + h / floor)


def heatmap_kl(
    student: Float[Tensor, "u k h w"],
    target: Float[Tensor, "u k h w"],
    sigma: float,
    temperature: float,
    sharper: Float[Tensor, "u k 1"] | float = 1.0,
) -> Float[Tensor, "u k"]:
    """KL(P(target) || P(student)) with P(h) = softmax(log_linear(h) / T) = h^(1/T) / sum h^(1/T), in units of MSE.

    A shift of d heatmap px costs d^2 / (2 sigma^2 T) in KL and pi d^2 / (2 h w) in mean squared error, so the factor
    pi sigma^2 T / (h w) makes it weigh as much as the labeled loss. The same T on both sides: sharpening the teacher
    alone shrinks and lifts the student's peaks without end.

    Args:
        sharper: the target's T is this times T. For a target that the teacher's doubt has widened: such a map is a
            Gaussian of peak c and variance sigma^2 / c, and c is what undoes it.
    """
    log_q = F.log_softmax(log_linear(student.float().flatten(2)) / temperature, dim=-1)
    log_p = F.log_softmax(log_linear(target.float().flatten(2)) / (temperature * sharper), dim=-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(dim=-1)
    return kl * (math.pi * sigma**2 * temperature / (student.shape[-1] * student.shape[-2]))


def literal_kl(
    student: Float[Tensor, "u k h w"], target: Float[Tensor, "u k h w"], temperature: float
) -> Float[Tensor, "u k"]:
    """KL(softmax(target / T) || softmax(student)): only the teacher sharpened, raw heatmaps as logits. For comparison.

    To second order it is half the variance of (target / T - student): with T = 0.5, a mean squared error to twice the
    teacher's height. Peaks grow without end.
    """
    log_q = F.log_softmax(student.float().flatten(2), dim=-1)
    log_p = F.log_softmax(target.float().flatten(2) / temperature, dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)
