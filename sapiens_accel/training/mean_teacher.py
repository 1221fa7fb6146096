"""The objective of stage ssl: the supervised loss plus agreement with a mean teacher. Single-device code.

Shape letters: b labeled people, u unlabeled people, k keypoints, h w the heatmap. All of it in fp32, whatever the
precision of the network.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor, nn

from sapiens_accel.config.schema import StageConfig, TeacherConfig
from sapiens_accel.data.dataset import Batch, Labeled, Pair
from sapiens_accel.models.sapiens import PIXEL_MEAN
from sapiens_accel.pose import geometry
from sapiens_accel.pose.heatmap import Codec
from sapiens_accel.pose.skeleton import Skeleton
from sapiens_accel.training.ema import MovingAverage
from sapiens_accel.training.objectives import (
    LABELED_PARTS,
    FixedTeacher,
    Objective,
    Supervised,
    heatmap_kl,
    literal_kl,
)  # fmt: skip

PEAK_RANGE = (0.3, 1.0)  # of the factor that sharpens a teacher's own map
CONFIDENCE_MOMENTUM = 0.95
CONFIDENCE_QUANTILE = 0.9
# The teacher's further views, in this order: degrees, scale, and whether mirrored where the run mirrors.
FURTHER_VIEWS = ((0.0, 1.0, True), (12.0, 1.08, False), (-12.0, 0.93, True))
GRADIENT_MOMENTUM = 0.9  # of the measured ratio: it moves slowly, one batch of it by a third
ERROR_MOMENTUM = 0.98  # of the measured errors: one batch of 8 people has up to half more than the next
# By default, between what was measured (docs/semi_supervised.md): 300 drawn people, 3.3 unlabeled ones each, lost 1.0
# and 1.3 AP with 1, and had -0.1 to +0.3 with 1.5; 100, 12 each, had -0.2 to +2.0 AP with 1, and 30, 42 each, gained.
FEW_UNLABELED, LEARNED_WITH_FEW = 5, 1.5
LEAST_OPEN = 0.01  # of the limit: as good as nothing, and the errors can still be measured
CUTOUT_NOISE = 0.05  # of the input's width
CUTOUT_HALF_SIDE = (0.05, 0.10)  # of the input's width


@dataclass(frozen=True, kw_only=True)
class TeacherSetup:
    """How a launch runs a mean teacher.

    Attributes:
        average: the moving average of the student; its first values are the student's.
        student_parameters: the student's whole parameters, in the average's order, at each call.
        num_steps: length of the stage; decay and ramp follow from it.
        gather: concatenates a tensor over all ranks along its first dimension.
        autocast: dtype of the teacher's forward; None for fp32.
        mirrors: whether the run mirrors images; the teacher's further views then do too.
        unlabeled_each: how many unlabeled people there are for each labeled one, whatever the weights of a mixture.
    """

    average: MovingAverage
    student_parameters: Callable[[], Iterable[Tensor]]
    num_steps: int
    gather: Callable[[Tensor], Tensor]
    autocast: torch.dtype | None = None
    mirrors: bool = False
    unlabeled_each: float = math.inf


def build_objective(
    stage: StageConfig,
    codec: Codec,
    skeleton: Skeleton,
    setup: TeacherSetup | None,
    fixed: FixedTeacher | None = None,
) -> Objective:
    """The objective of a stage; one with a mean teacher needs `setup`."""
    supervised = Supervised(codec=codec, loss_weight=stage.loss_weight, teacher=fixed)
    if stage.teacher is None or setup is None:
        return supervised
    return MeanTeacher(supervised, setup, stage.teacher, skeleton.mirror, skeleton.names)


class TeacherPrediction(NamedTuple):
    """The teacher's keypoints for a batch of pairs.

    Attributes:
        points_xy: keypoints in the strong view, input px, in the strong view's order of left and right.
        scores: the raw peaks of the teacher's heatmaps.
        confidence: the scores as shares of what a good keypoint of its kind has, 0 to 1 (or the raw ones, clamped, or
            the probability that the keypoint is right).
        kept: whether a keypoint is learned from.
        weak_xy: keypoints in the weak view, input px, in its own order.
        maps: the teacher's heatmaps as the strong view shows them, where the loss compares with them.
    """

    points_xy: Float[Tensor, "u k 2"]
    scores: Float[Tensor, "u k"]
    confidence: Float[Tensor, "u k"]
    kept: Bool[Tensor, "u k"]
    weak_xy: Float[Tensor, "u k 2"]
    maps: Float[Tensor, "u k h w"] | None


class PseudoLabels(NamedTuple):
    """The target of the student: prediction, weights (0 = not learned from), and its input image, with cutouts."""

    prediction: TeacherPrediction
    weights: Float[Tensor, "u k"]
    image: UInt8[Tensor, "u 3 H W"]
    scale: Float[Tensor, ""]
    logs: dict[str, Tensor]


class GradientLimit:
    """Lowers the weight of the unlabeled loss so that its gradient at the heatmaps stays a share of the labeled one's.

    A step's own gradients are known only when its chunks have been differentiated, so the weight follows the ratio
    that the steps before had, as a moving average: it changes slowly, as labeled people are learned by heart.

    That share is whole once they have been: where the student errs `learned` times as much at pseudo-labels as at
    labels. Until then the labels have more to teach than a teacher that learns from them, and the share falls in a
    line, to a hundredth half-way to equal errors.

    Args:
        share: the largest ratio of the norms; None: no limit, and nothing is measured.
        learned: the ratio of the errors from which on the share is whole; 1: always, and they are not measured.
    """

    def __init__(
        self, share: float | None, learned: float, gather: Callable[[Tensor], Tensor], device: torch.device
    ) -> None:
        self.share, self.learned, self.gather = share, learned, gather
        self.ratio = torch.zeros((), device=device)  # of the norms at weight 1; 0: not measured yet
        self.errors = torch.zeros(2, device=device)  # a labeled and a pseudo-labeled keypoint's mean; 0: not yet
        self.sums = torch.zeros(3, 2, device=device)  # of this step's micro-batches on this rank: see `add`
        self.weight: Tensor | float | None = None  # of this step; None without unlabeled people

    @property
    def measures_errors(self) -> bool:
        return self.share is not None and self.learned > 1

    @property
    def error_ratio(self) -> Float[Tensor, ""]:
        """The error at pseudo-labels as a multiple of that at labels; 0 before the first step."""
        labeled, unlabeled = self.errors
        return torch.where(labeled > 0, unlabeled / labeled, labeled)

    @property
    def open_part(self) -> Tensor | float:
        """The part of the share that the unlabeled gradient may have now."""
        if not self.measures_errors:
            return 1.0
        part = (2 * (self.error_ratio - 1) / (self.learned - 1) - 1).clamp(LEAST_OPEN, 1)
        return torch.where(self.errors[0] > 0, part, 1.0)

    def begin_step(self, wanted: float, part: float = 1.0) -> Tensor | float:
        """The weight of this step: the given part of what is wanted, or of what the limit allows."""
        self.sums = torch.zeros_like(self.sums)
        self.weight = wanted * part
        if self.share is not None:
            # Nothing is measured at ratio 0: the first step is the ramp's.
            allowed = torch.where(self.ratio > 0, self.share * self.open_part / self.ratio, wanted).clamp(max=wanted)
            self.weight = allowed * part
        return self.weight

    def skip_step(self) -> None:
        """This step has no unlabeled people: nothing will be measured."""
        self.weight = None

    def add(self, squares: Float[Tensor, "2"], errors: Float[Tensor, "2 2"]) -> None:
        """Count a micro-batch, labeled and unlabeled.

        Args:
            squares: of the gradients' norms.
            errors: of keypoints, weighted and summed; and the sums of those weights.
        """
        if self.share is not None:
            self.sums = self.sums + torch.cat([squares[None], errors])

    def end_step(self) -> None:
        """Measure the step that was taken. All ranks must call it."""
        if self.share is None or self.weight is None:
            return
        squares, errors, weights = self.gather(self.sums[None]).sum(dim=0)
        labeled, unlabeled = squares.sqrt()
        now = unlabeled / labeled / self.weight
        # Without a kept or a labeled keypoint, or at weight 0, there is nothing to measure.
        now = torch.where(now.isfinite() & (now > 0), now, self.ratio)
        self.ratio = torch.where(self.ratio > 0, torch.lerp(now, self.ratio, GRADIENT_MOMENTUM), now)
        if self.measures_errors:
            means = errors / weights
            means = torch.where((means.isfinite() & (means > 0)).all(), means, self.errors)
            self.errors = torch.where(self.errors > 0, torch.lerp(means, self.errors, ERROR_MOMENTUM), means)


class MeanTeacher:
    """Supervised, plus the agreement of the student's strong view with a moving average of itself on the weak view.

    The teacher's heatmap is decoded, its points are moved by the exact matrix into the strong view, rendered again by
    the codec (the sharpest target there is, without drift), and compared by a KL divergence of log-heatmap softmaxes.

    Args:
        supervised: the labeled loss. If it has a fixed teacher, that one's heatmaps take the place of the average's;
            the average is still the result.
        mirror: the skeleton's mirror order.
        names: of the keypoints, in the logs.
    """

    def __init__(
        self,
        supervised: Supervised,
        setup: TeacherSetup,
        config: TeacherConfig,
        mirror: Sequence[int],
        names: Sequence[str],
    ) -> None:
        self.supervised, self.codec = supervised, supervised.codec
        self.average, self.teacher = setup.average, setup.average.network
        self.student_parameters, self.config = setup.student_parameters, config
        self.num_steps, self.gather, self.autocast = setup.num_steps, setup.gather, setup.autocast
        self.decay = config.ema_decay if config.ema_decay is not None else ema_decay(setup.num_steps)
        device = next(self.teacher.parameters()).device
        self.names, self.mirror = names, torch.tensor(mirror, device=device)
        # The confidence of a good keypoint, for each kind: annotation noise keeps a hip's peak lower than an eye's.
        self.reference = torch.zeros(len(self.mirror), device=device)
        self.calibration = torch.zeros(2 + len(self.mirror), device=device)  # slope, intercept, offsets; 0: not fitted
        self.sample = self.average.sample()
        learned = learned_ratio(config, setup.unlabeled_each, fixed=supervised.teacher is not None)
        self.limit = GradientLimit(config.max_grad_ratio, learned, self.gather, device)
        self.min_kept = math.ceil(config.min_kept * len(self.mirror))
        self.further_views = [
            (geometry.about_center(degrees, scale, self.codec.input_hw).to(device), flip and setup.mirrors)
            for degrees, scale, flip in FURTHER_VIEWS[: config.views - 1]
        ]

    @torch.no_grad()
    def prepare(self, batches: Sequence[Batch], step: int) -> list[PseudoLabels | None]:
        """Pseudo-labels of all micro-batches of a step: their weights share one denominator over all ranks."""
        if batches[0].pair is None:
            self.limit.skip_step()
            return [None] * len(batches)
        views = [(batch.pair, *self._predict(batch.pair)) for batch in batches if batch.pair]
        self._update_reference(self.gather(torch.cat([scores for _, _, scores, _ in views])))
        predictions = [self._select(*view) for view in views]
        kept = torch.stack([labels.kept.sum() for labels in predictions]).sum().reshape(1)
        num_kept = self.gather(kept)
        # The loop averages over micro-batches and ranks; this turns that mean into a sum over the kept keypoints.
        weight = self.limit.begin_step(self._ramp(step), self._ramp_down(step))
        factor = weight * self.supervised.loss_weight * len(batches) * len(num_kept)
        scale, logs = (
            factor / num_kept.sum().clamp_min(1),
            self._logs(predictions, [batch.labeled for batch in batches]),
        )
        logs["weight_unlabelled"] = torch.zeros_like(scale) + weight
        return [
            PseudoLabels(labels, labels.confidence * labels.kept, cut_out(batch.pair, labels.points_xy), scale, logs)
            for batch, labels in zip(batches, predictions, strict=True)
            if batch.pair
        ]

    @torch.no_grad()
    def pseudo_labels(self, pair: Pair) -> TeacherPrediction:
        """The teacher's current prediction for pairs; no state changes."""
        return self._select(pair, *self._predict(pair))

    def loss(
        self, model: nn.Module, batch: Batch, prepared: PseudoLabels | None
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        if prepared is None:
            return self.supervised.loss(model, batch, None)
        labeled = batch.labeled.view.image
        border = len(labeled)
        squares = torch.zeros(2, device=labeled.device)  # of the gradients of both losses by the heatmaps
        learned = torch.zeros(2, device=labeled.device)  # errors at labels, weighted, and the sum of their weights

        def terms(heatmaps: Float[Tensor, "n k h w"], people: slice) -> Float[Tensor, "t"]:
            """The labeled people come first; a chunk may hold some of both."""
            first, last = (
                slice(min(people.start, border), min(people.stop, border)),
                slice(max(people.start, border) - border, max(people.stop, border) - border),
            )
            num = first.stop - first.start
            errors, weights = self.supervised.keypoint_errors(heatmaps[:num], batch.labeled, first)
            supervised = self.supervised.labeled_loss(weights * errors, batch.labeled)
            # Where v=0 means absent, a keypoint's label is an empty map, which is no error to compare with.
            present = weights.detach() * (batch.labeled.weights[first] > 0)
            learned.add_(torch.stack([(present * errors.detach()).sum(), present.sum()]))
            unsupervised = self._agreement(heatmaps[num:], prepared, last)
            teacher = self.supervised.teacher_losses(heatmaps[:num], batch.labeled, first)
            if heatmaps.requires_grad:
                heatmaps.register_hook(partial(_add_squares, squares, num))
            return torch.stack([unsupervised, supervised, *teacher])

        # One forward for both, so that there is one backward: two would be two micro-steps to DeepSpeed.
        loss, (unsupervised, *labeled_parts) = model(torch.cat([labeled, prepared.image]), terms)
        pseudo = torch.stack([unsupervised / prepared.scale, prepared.weights.sum()])
        self.limit.add(squares, torch.stack([learned, pseudo], dim=1))
        ratio = (squares[1] / squares[0].clamp_min(torch.finfo(torch.float32).tiny)).sqrt()
        return loss, {
            **dict(zip(LABELED_PARTS, labeled_parts, strict=False)),
            "loss_unlabelled": unsupervised,
            "grad_ratio": ratio,
            **prepared.logs,
        }

    def _agreement(self, heatmaps: Float[Tensor, "n k h w"], labels: PseudoLabels, people: slice) -> Float[Tensor, ""]:
        weights, prediction, config = labels.weights[people], labels.prediction, self.config
        if prediction.maps is None:
            target, _ = self.codec.encode(prediction.points_xy[people], weights)
        else:
            target = prediction.maps[people]
        if config.loss == "mse":
            error = (heatmaps.float() - target).square().mean(dim=(2, 3))
        elif config.loss == "literal":
            error = literal_kl(heatmaps, target, config.temperature)
        else:
            # A low peak of the teacher's own map means that uncertainty has widened it: T * peak undoes that.
            peak = prediction.scores[people].clamp(*PEAK_RANGE)
            sharper = 1.0 if prediction.maps is None else peak[..., None]
            error = heatmap_kl(heatmaps, target, self.codec.sigma, config.temperature, sharper)
        return labels.scale * (weights * error).sum()

    def after_step(self) -> None:
        self.limit.end_step()
        self.average.update(self.student_parameters(), self.decay)

    def health(self) -> dict[str, Tensor]:
        """What the training of the teacher looks like.

        ema_moved: the share of a sample of the average's values that changed since the last call. Of steps with
        unlabeled people, see `GradientLimit`: error_ratio, and limit_open, its `open_part`.
        """
        before, self.sample = self.sample, self.average.sample()
        moved = {"ema_moved": (self.sample != before).float().mean()}
        if not self.limit.measures_errors or self.limit.weight is None or not self.limit.errors[0] > 0:
            return moved
        opened = torch.as_tensor(self.limit.open_part)
        return {**moved, "error_ratio": self.limit.error_ratio, "limit_open": opened}

    def result(self, model: nn.Module) -> nn.Module:
        return self.teacher

    def results(self, student: Mapping[str, Tensor]) -> dict[str, Mapping[str, Tensor]]:
        return {"weights": self.average.state_dict(), "student": student}

    def state_dict(self) -> dict[str, Tensor]:
        teacher = {f"teacher.{name}": value for name, value in self.average.state_dict().items()}
        measured = {"grad_ratio": self.limit.ratio, "errors": self.limit.errors}
        # 0: an option says it.
        measured["learned"] = torch.tensor(self.limit.learned if self.config.learned is None else 0.0)
        fitted = {"calibration": self.calibration} if self.config.calibrates else {}
        return {"reference": self.reference, **measured, **fitted, **teacher}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.reference.copy_(state["reference"])
        if "grad_ratio" in state:  # checkpoints of version 0.1 have none
            self.limit.ratio.copy_(state["grad_ratio"])
        if "errors" in state:  # checkpoints from before `learned` have none
            self.limit.errors.copy_(state["errors"])
        began = float(state.get("learned", 1.0))  # checkpoints from before its default have none, and 1
        if began and self.config.learned is None and _can_wait(self.config, fixed=self.supervised.teacher is not None):
            self.limit.learned = began  # a stage that is resumed keeps it, however many people there are now
        if self.config.calibrates and "calibration" in state:  # else it is fitted when the stage is resumed
            self.calibration.copy_(state["calibration"])
        teacher = {name: value for name, value in state.items() if name.startswith("teacher.")}
        self.average.load_state_dict({name.removeprefix("teacher."): value for name, value in teacher.items()})
        self.sample = self.average.sample()

    def calibrate(self, calibration: Float[Tensor, "2+k"]) -> None:
        """Use a fit of `visibility.regression.fit_calibration`, that of the first rank. All ranks must call it."""
        self.calibration.copy_(self.gather(calibration.to(self.calibration)[None])[0])

    def _predict(self, pair: Pair) -> tuple[Float[Tensor, "u k 2"], Float[Tensor, "u k"], Tensor | None]:
        """The teacher's keypoints (input px), its raw scores and its maps, all as the weak view has them."""
        image = pair.weak.image
        maps = self._forward(image)
        if self.further_views:
            seen = torch.ones_like(maps[:, :1])
            for matrix, flip in self.further_views:
                more, where = self._see_again(image, matrix.expand(len(image), 2, 3), flip)
                maps, seen = maps.float() + more, seen + where
            maps = maps / seen
        return *self.codec.decode(maps), maps if self.config.compares_maps else None

    def _forward(self, image: UInt8[Tensor, "u 3 H W"]) -> Float[Tensor, "u k h w"]:
        if self.supervised.teacher is not None:
            return self.supervised.teacher(image)
        with torch.autocast(image.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            return self.teacher(image)

    def _see_again(
        self, image: UInt8[Tensor, "u 3 H W"], matrix: Float[Tensor, "u 2 3"], flip: bool
    ) -> tuple[Float[Tensor, "u k h w"], Float[Tensor, "u 1 h w"]]:
        """The maps of a view of the weak view, turned back into it, and where they say anything: 1, else 0."""
        input_hw = self.codec.input_hw
        turned = geometry.warp_maps(image.float(), matrix, input_hw)
        turned = turned.flip(-1) if flip else turned
        maps = self._forward(turned.round().to(torch.uint8)).float()
        maps = maps[:, self.mirror].flip(-1) if flip else maps
        back = geometry.strong_from_weak(torch.eye(2, 3, device=image.device).expand_as(matrix), matrix)
        maps = torch.cat([maps, torch.ones_like(maps[:, :1])], dim=1)
        maps = geometry.warp_maps(maps, back, input_hw)
        return maps[:, :-1], maps[:, -1:]

    def _select(
        self, pair: Pair, weak_xy: Float[Tensor, "u k 2"], scores: Float[Tensor, "u k"], maps: Tensor | None
    ) -> TeacherPrediction:
        """Transform the prediction into the strong view's frame and order, and select the keypoints to learn from."""
        matrices = geometry.strong_from_weak(pair.strong.matrix, pair.weak.matrix)
        swapped = pair.weak.flipped != pair.strong.flipped
        points_xy = self._swap(geometry.apply_batch(matrices, weak_xy), swapped)
        if maps is not None:
            maps = self._swap(geometry.warp_maps(maps.float(), matrices, self.codec.input_hw), swapped)
        # The reference is per kind of keypoint, and both of a mirrored pair have the same kind.
        confidence, scores = (self._swap(values, swapped) for values in (self._confidence(scores), scores))
        kept = (confidence > self.config.threshold) & self._inside(points_xy)
        kept &= kept.sum(dim=1, keepdim=True) >= self.min_kept
        return TeacherPrediction(points_xy, scores, confidence, kept, weak_xy, maps)

    def _swap(self, values: Float[Tensor, "u k *rest"], swapped: Bool[Tensor, "u"]) -> Float[Tensor, "u k *rest"]:
        return torch.where(swapped.view(-1, *[1] * (values.ndim - 1)), values[:, self.mirror], values)

    def _update_reference(self, scores: Float[Tensor, "n k"]) -> None:
        high = torch.quantile(scores.float(), CONFIDENCE_QUANTILE, dim=0)
        # A non-finite peak (fp16 on one image) must not stay in the average.
        high = torch.where(high.isfinite(), high, self.reference)
        mean = torch.lerp(self.reference, high, 1 - CONFIDENCE_MOMENTUM)
        self.reference = torch.where(self.reference == 0, high, mean)

    def _confidence(self, scores: Float[Tensor, "u k"]) -> Float[Tensor, "u k"]:
        if self.config.raw_confidence:
            return scores.clamp(0, 1)
        if self.config.calibrates:
            slope, intercept, offsets = self.calibration[0], self.calibration[1], self.calibration[2:]
            return (slope * scores.float() + intercept + offsets).sigmoid()
        return (scores / self.reference.clamp_min(self.config.confidence_floor)).clamp(0, 1)

    def _inside(self, points_xy: Float[Tensor, "u k 2"]) -> Bool[Tensor, "u k"]:
        x, y = points_xy.unbind(-1)
        return (x >= 0) & (y >= 0) & (x <= self.codec.input_hw[1] - 1) & (y <= self.codec.input_hw[0] - 1)

    def _ramp(self, step: int) -> float:
        done = min(1.0, step / max(1.0, self.config.ramp * self.num_steps))
        return self.config.weight * math.exp(-5 * (1 - done) ** 2)

    def _ramp_down(self, step: int) -> float:
        """The part of the weight that is left: a line to 0 at the end of the steps with unlabeled people."""
        last = self.config.unlabeled_steps(self.num_steps)
        return min(1.0, (last - step) / (self.config.ramp_down * last)) if self.config.ramp_down else 1.0

    def _logs(self, predictions: Sequence[TeacherPrediction], labeled: Sequence[Labeled]) -> dict[str, Tensor]:
        scores, kept = (
            torch.cat([getattr(labels, name) for labels in predictions]).float() for name in ("scores", "kept")
        )
        points_xy, labels_xy = (
            geometry.relative_positions(torch.cat(points), self.codec.input_hw)
            for points in ([labels.weak_xy for labels in predictions], [people.points_xy for people in labeled])
        )
        weights = torch.cat([people.weights for people in labeled])
        each = kept.mean(dim=0)
        return {
            "keep": each.mean(),
            **{f"keep/{name}": share for name, share in zip(self.names, each, strict=True)},
            "teacher_peak": scores.mean(),
            "teacher_peak_p99": torch.quantile(scores, 0.99),
            "spread": _spread(points_xy, torch.ones_like(scores)),
            "spread_labelled": _spread(labels_xy, (weights > 0).float()),
        }


def _spread(points: Float[Tensor, "n k 2"], counted: Float[Tensor, "n k"]) -> Float[Tensor, ""]:
    """Standard deviation over people, of the keypoints that at least two of them have; mean over keypoints, x and y."""
    num = counted.sum(dim=0)
    center = (points * counted[..., None]).sum(dim=0) / num.clamp_min(1)[:, None]
    variance = ((points - center).square() * counted[..., None]).sum(dim=0) / num.clamp_min(1)[:, None]
    several = (num >= 2).float()
    return (variance.sqrt().mean(dim=-1) * several).sum() / several.sum().clamp_min(1)


def _add_squares(squares: Float[Tensor, "2"], border: int, gradient: Float[Tensor, "n k h w"]) -> None:
    # By norms: squares of a gradient would be another tensor of its size.
    squares += torch.stack([torch.linalg.vector_norm(part) ** 2 for part in (gradient[:border], gradient[border:])])


def ema_decay(num_steps: int) -> float:
    """A window of 2 % of the stage: long enough to average, short enough to follow."""
    return min(max(1 - 50 / num_steps, 0.99), 0.9998)


def learned_ratio(config: TeacherConfig, unlabeled_each: float, *, fixed: bool) -> float:
    """`learned` of the options, or what it is by default.

    Args:
        unlabeled_each: how many unlabeled people there are for each labeled one.
        fixed: the teacher does not learn from the labels (`--distill.teacher`).
    """
    if config.learned is not None:
        return config.learned
    return LEARNED_WITH_FEW if unlabeled_each < FEW_UNLABELED and _can_wait(config, fixed=fixed) else 1.0


def _can_wait(config: TeacherConfig, *, fixed: bool) -> bool:
    """Whether unlabeled people can wait for the labels: not without a gradient or a limit of it, by errors of another
    unit, or for a teacher that does not learn from them."""
    return bool(config.weight and config.max_grad_ratio) and config.loss != "literal" and not fixed


def cut_out(pair: Pair, points_xy: Float[Tensor, "u k 2"]) -> UInt8[Tensor, "u 3 H W"]:
    """The strong view with squares of the mean color on some of the teacher's keypoints (keypoint cutout).

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
    colors = [torch.where(hidden, round(mean), image[:, c]) for c, mean in enumerate(PIXEL_MEAN)]
    return torch.stack(colors, dim=1).to(torch.uint8)
