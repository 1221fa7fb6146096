"""What a step minimises: Supervised and MeanTeacher, (model, batch) -> loss and logs. Single-device code.

Shape letters: b labelled people, u unlabelled people, k keypoints, h w the heatmap. All of it in fp32, whatever the
precision of the network.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, UInt8
from torch import Tensor, nn

from sapiens_accel import geometry
from sapiens_accel.config import TeacherConfig
from sapiens_accel.data import Batch, Labelled, Pair
from sapiens_accel.heatmap import Codec
from sapiens_accel.model import PIXEL_MEAN

LOG_FLOOR = 0.02  # eps of `log_linear`
MIN_KEPT = 4  # keypoints of a person that must be kept for any of them to count
CONFIDENCE_MOMENTUM = 0.95
CONFIDENCE_QUANTILE = 0.9
CONFIDENCE_FLOOR = 0.2
CUTOUT_NOISE = 0.05  # of the input's width
CUTOUT_HALF_SIDE = (0.05, 0.10)  # of the input's width


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

    @property
    def codec(self) -> Codec: ...

    def result(self, model: nn.Module) -> nn.Module:
        """What is evaluated and handed on."""
        ...

    def results(self, student: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """What is written, by folder: `weights` are the result's."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """What a resumed run needs beside the model and the optimizer."""
        ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None: ...


@dataclass(kw_only=True)
class Supervised:
    """The published loss: mean over people, keypoints and pixels of weight * (heatmap - target)^2."""

    codec: Codec
    loss_weight: float = 1.0

    def prepare(self, batches: Sequence[Batch], step: int) -> list[None]:
        return [None] * len(batches)

    def loss(self, model: nn.Module, batch: Batch, prepared: None) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        def terms(heatmaps: Float[Tensor, "n k h w"], people: slice) -> Float[Tensor, "1"]:
            return self.heatmap_loss(heatmaps, batch.labelled, people).reshape(1)

        loss, _ = model(batch.labelled.view.image, terms)
        return loss, {}

    def heatmap_loss(self, heatmaps: Float[Tensor, "n k h w"], labelled: Labelled, people: slice) -> Float[Tensor, ""]:
        """What these people of the micro-batch add to its loss. Their targets are drawn here, and only theirs."""
        target, weights = self.codec.encode(labelled.points_xy[people], labelled.weights[people])
        error = (heatmaps.float() - target).square().mean(dim=(2, 3))
        return self.loss_weight * (weights * error).sum() / labelled.weights.numel()

    def after_step(self) -> None:
        pass

    def result(self, model: nn.Module) -> nn.Module:
        return model

    def results(self, student: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        return {"weights": student}

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        pass


class PseudoLabels(NamedTuple):
    """The teacher's keypoints in the student's view: input px, weights (0 = not learnt from), the view with cutouts."""

    points_xy: Float[Tensor, "u k 2"]
    weights: Float[Tensor, "u k"]
    image: UInt8[Tensor, "u 3 H W"]
    scale: Float[Tensor, ""]
    logs: dict[str, Tensor]


class Taught(NamedTuple):
    """What the teacher says of a pair's people, in the strong view's frame (input px) and its left/right order."""

    points_xy: Float[Tensor, "u k 2"]
    scores: Float[Tensor, "u k"]
    confidence: Float[Tensor, "u k"]
    """Scores relative to those of good keypoints of their kind, 0..1."""
    kept: Bool[Tensor, "u k"]
    """What is learnt from."""


class MeanTeacher:
    """Supervised, plus the agreement of the student's strong view with a moving average of itself on the weak view.

    The teacher's heatmap is decoded, its points are moved by the exact matrix into the strong view, rendered again by
    the codec (the sharpest target there is, without drift), and compared by a KL divergence of log-heatmap softmaxes.

    Args:
        supervised: the labelled loss.
        teacher: a network of its own with the student's weights; its parameters become the moving average, in fp32.
        student_parameters: the student's whole parameters, in the teacher's order, whenever it is called.
        mirror: the skeleton's mirror order.
        num_steps: length of the stage; decay and ramp follow from it.
        gather: concatenates a tensor over all ranks along its first dimension.
        autocast: dtype of the teacher's forward; None for fp32.
    """

    def __init__(
        self,
        supervised: Supervised,
        teacher: nn.Module,
        student_parameters: Callable[[], Iterable[Tensor]],
        config: TeacherConfig,
        mirror: Sequence[int],
        *,
        num_steps: int,
        gather: Callable[[Tensor], Tensor],
        autocast: torch.dtype | None = None,
    ) -> None:
        self.supervised, self.codec = supervised, supervised.codec
        self.teacher = teacher.float().eval().requires_grad_(False)
        self.student_parameters, self.config = student_parameters, config
        self.num_steps, self.gather, self.autocast = num_steps, gather, autocast
        self.decay = config.ema_decay if config.ema_decay is not None else ema_decay(num_steps)
        device = next(teacher.parameters()).device
        self.mirror = torch.tensor(mirror, device=device)
        # The confidence of a good keypoint, for each kind: annotation noise keeps a hip's peak lower than an eye's.
        self.reference = torch.zeros(len(self.mirror), device=device)

    @torch.no_grad()
    def prepare(self, batches: Sequence[Batch], step: int) -> list[PseudoLabels]:
        """Pseudo-labels of all micro-batches of a step: their weights share one denominator over all ranks."""
        moved = [self._teach(batch.pair) for batch in batches if batch.pair]
        scores = torch.cat([scores for _, scores in moved])
        self._update_reference(self.gather(scores))
        taught = [self._judge(points_xy, scores) for points_xy, scores in moved]
        kept = torch.stack([labels.kept.sum() for labels in taught]).sum().reshape(1)
        num_kept = self.gather(kept)
        # The loop averages over micro-batches and ranks; this turns that mean into a sum over the kept keypoints.
        scale = (
            self._ramp(step) * self.supervised.loss_weight * len(batches) * len(num_kept) / num_kept.sum().clamp_min(1)
        )
        logs = self._logs(scores, kept, sum(labels.kept.numel() for labels in taught))
        return [
            PseudoLabels(
                labels.points_xy, labels.confidence * labels.kept, cut_out(batch.pair, labels.points_xy), scale, logs
            )
            for batch, labels in zip(batches, taught, strict=True)
            if batch.pair
        ]

    @torch.no_grad()
    def pseudo_labels(self, pair: Pair) -> Taught:
        """What the teacher would teach about these people now; nothing is changed by asking."""
        return self._judge(*self._teach(pair))

    def loss(
        self, model: nn.Module, batch: Batch, prepared: PseudoLabels
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        labelled = batch.labelled.view.image
        border = len(labelled)

        def terms(heatmaps: Float[Tensor, "n k h w"], people: slice) -> Float[Tensor, "2"]:
            """The labelled people come first; a chunk may hold some of both."""
            first, last = (
                slice(min(people.start, border), min(people.stop, border)),
                slice(max(people.start, border) - border, max(people.stop, border) - border),
            )
            num = first.stop - first.start
            supervised = self.supervised.heatmap_loss(heatmaps[:num], batch.labelled, first)
            unsupervised = self._agreement(heatmaps[num:], prepared, last)
            return torch.stack([supervised, unsupervised])

        # One forward for both, so that there is one backward: two would be two micro-steps to DeepSpeed.
        loss, (supervised, unsupervised) = model(torch.cat([labelled, prepared.image]), terms)
        return loss, {"loss_labelled": supervised, "loss_unlabelled": unsupervised, **prepared.logs}

    def _agreement(self, heatmaps: Float[Tensor, "n k h w"], labels: PseudoLabels, people: slice) -> Float[Tensor, ""]:
        target, _ = self.codec.encode(labels.points_xy[people], labels.weights[people])
        kl = heatmap_kl(heatmaps, target, self.codec.sigma, self.config.temperature)
        return labels.scale * (labels.weights[people] * kl).sum()

    @torch.no_grad()
    def after_step(self) -> None:
        for mean, student in zip(self.teacher.parameters(), self.student_parameters(), strict=True):
            mean.lerp_(student.to(mean), 1 - self.decay)

    def result(self, model: nn.Module) -> nn.Module:
        return self.teacher

    def results(self, student: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        teacher = {name: value.cpu() for name, value in self.teacher.state_dict().items()}
        return {"weights": teacher, "student": student}

    def state_dict(self) -> dict[str, Tensor]:
        teacher = {f"teacher.{name}": value for name, value in self.teacher.state_dict().items()}
        return {"reference": self.reference, **teacher}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.reference.copy_(state["reference"])
        self.teacher.load_state_dict({n.removeprefix("teacher."): v for n, v in state.items() if n != "reference"})

    def _teach(self, pair: Pair) -> tuple[Float[Tensor, "u k 2"], Float[Tensor, "u k"]]:
        """The teacher's keypoints in the strong view (input px) and its raw scores, in the strong view's order."""
        device = pair.weak.image.device
        with torch.autocast(device.type, dtype=self.autocast, enabled=self.autocast is not None):
            heatmaps = self.teacher(pair.weak.image)
        points_xy, scores = self.codec.decode(heatmaps)
        matrices = geometry.strong_from_weak(pair.strong.matrix, pair.weak.matrix)
        points_xy = geometry.apply_batch(matrices, points_xy)
        swapped = pair.weak.flipped != pair.strong.flipped
        return self._swap(points_xy, swapped), self._swap(scores, swapped)

    def _swap(self, values: Float[Tensor, "u k *rest"], swapped: Bool[Tensor, "u"]) -> Float[Tensor, "u k *rest"]:
        return torch.where(swapped.view(-1, *[1] * (values.ndim - 1)), values[:, self.mirror], values)

    def _update_reference(self, scores: Float[Tensor, "n k"]) -> None:
        high = torch.quantile(scores.float(), CONFIDENCE_QUANTILE, dim=0)
        mean = torch.lerp(self.reference, high, 1 - CONFIDENCE_MOMENTUM)
        self.reference = torch.where(self.reference == 0, high, mean)

    def _judge(self, points_xy: Float[Tensor, "u k 2"], scores: Float[Tensor, "u k"]) -> Taught:
        """Which points of the strong view are good enough to be learnt from."""
        confidence = (scores / self.reference.clamp_min(CONFIDENCE_FLOOR)).clamp(0, 1)
        x, y = points_xy.unbind(-1)
        inside = (x >= 0) & (y >= 0) & (x <= self.codec.input_hw[1] - 1) & (y <= self.codec.input_hw[0] - 1)
        kept = (confidence > self.config.threshold) & inside
        kept &= kept.sum(dim=1, keepdim=True) >= MIN_KEPT
        return Taught(points_xy, scores, confidence, kept)

    def _ramp(self, step: int) -> float:
        done = min(1.0, step / max(1.0, self.config.ramp * self.num_steps))
        return self.config.weight * math.exp(-5 * (1 - done) ** 2)

    def _logs(self, scores: Float[Tensor, "u k"], kept: Tensor, num: int) -> dict[str, Tensor]:
        return {"keep": kept.squeeze() / num, "teacher_peak": scores.float().mean()}


def ema_decay(num_steps: int) -> float:
    """A window of 2 % of the stage: long enough to average, short enough to follow."""
    return min(max(1 - 50 / num_steps, 0.99), 0.9998)


def log_linear(h: Float[Tensor, "*shape"], floor: float = LOG_FLOOR) -> Float[Tensor, "*shape"]:
    """log h above `floor`, and below it the line that continues it smoothly: no dead zone, slope at most 1 / floor."""
    return torch.where(h >= floor, h.clamp_min(floor).log(), math.log(floor) - 1 + h / floor)


def heatmap_kl(
    student: Float[Tensor, "u k h w"], target: Float[Tensor, "u k h w"], sigma: float, temperature: float
) -> Float[Tensor, "u k"]:
    """KL(P(target) || P(student)) with P(h) = softmax(log_linear(h) / T) = h^(1/T) / sum h^(1/T), in units of MSE.

    A shift of d heatmap px costs d^2 / (2 sigma^2 T) in KL and pi d^2 / (2 h w) in mean squared error, so the factor
    pi sigma^2 T / (h w) makes it weigh as much as the labelled loss. The same T on both sides: sharpening the teacher
    alone shrinks and lifts the student's peaks without end.
    """
    logits = [log_linear(maps.float().flatten(2)) / temperature for maps in (student, target)]
    log_q, log_p = (F.log_softmax(values, dim=-1) for values in logits)
    kl = (log_p.exp() * (log_p - log_q)).sum(dim=-1)
    return kl * (math.pi * sigma**2 * temperature / (student.shape[-1] * student.shape[-2]))


def cut_out(pair: Pair, points_xy: Float[Tensor, "u k 2"]) -> UInt8[Tensor, "u 3 H W"]:
    """The strong view with squares of the mean colour on some of the teacher's keypoints (joint cutout).

    Xie et al. 2021, https://arxiv.org/abs/2011.12498: what is hidden must be inferred from the rest of the body.

    Args:
        points_xy: keypoints in the strong view, input px.
    """
    image = pair.strong.image
    height, width = image.shape[-2:]
    which, offset, size = pair.cutout[..., 0], pair.cutout[..., 1:3], pair.cutout[..., 3]
    index = (which * points_xy.shape[1]).long().clamp(max=points_xy.shape[1] - 1)
    # Uniform draws of this width have the deviation of CUTOUT_NOISE.
    noise = (offset - 0.5) * (math.sqrt(12) * CUTOUT_NOISE * width)
    center_xy = points_xy.gather(1, index[..., None].expand(-1, -1, 2)) + noise
    low, high = CUTOUT_HALF_SIDE
    half = (low + (high - low) * size) * width
    x = torch.arange(width, device=image.device)
    y = torch.arange(height, device=image.device)
    in_x = (x - center_xy[..., 0, None]).abs() <= half[..., None]  # [u, n, W]
    in_y = (y - center_xy[..., 1, None]).abs() <= half[..., None]
    hidden = (in_y[..., :, None] & in_x[..., None, :]).any(dim=1)
    colours = [torch.where(hidden, round(mean), image[:, c]) for c, mean in enumerate(PIXEL_MEAN)]
    return torch.stack(colours, dim=1).to(torch.uint8)
