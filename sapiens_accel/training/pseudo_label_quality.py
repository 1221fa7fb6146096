"""The quality of the pseudo-labels of stage ssl, measured on labeled people, and images of them.

Shape letters: b people, k keypoints, H W the input.
"""

import math
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from numpy import ndarray as Array
from numpy.random import default_rng
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, default_collate

from sapiens_accel.config.schema import DataConfig
from sapiens_accel.data.augment import Augmenter, change_pixels
from sapiens_accel.data.dataset import Pair, PairSettings, make_pair, transform_keypoints
from sapiens_accel.data.loader import begin_worker, to_device, unwrap_errors
from sapiens_accel.data.people import People
from sapiens_accel.evaluation.error_analysis import Reliability, bin_scores
from sapiens_accel.evaluation.evaluate import oks
from sapiens_accel.pose import draw, geometry
from sapiens_accel.pose.skeleton import Skeleton
from sapiens_accel.pose.visibility import is_labeled
from sapiens_accel.training.mean_teacher import MeanTeacher, TeacherPrediction, cut_out

NUM_HOLDOUT = 256  # some 3,000 keypoints: a precision of 0.9 is known to +-0.01, in seconds
NUM_SHOWN = 6
CURVE_PX = 400
NEAR = 0.05  # of the crop's diagonal: a pseudo-label that is no farther from its keypoint counts as right


class LabeledPair(NamedTuple):
    """A pair of a labeled person, with the truth in the strong view: input px, in its left/right order."""

    pair: Pair
    truth_xy: Float[Tensor, "*b k 2"]
    labeled: Bool[Tensor, "*b k"]
    area: Float[Tensor, "*b"]  # of the person, input px^2


ShownPeople = Sequence[tuple[LabeledPair, TeacherPrediction]]  # of one person each


class Judged(NamedTuple):
    """The teacher's keypoints of the hold-out, all people on all ranks, by the teacher's own channels.

    Attributes:
        scores, confidence: raw peaks, and what is compared with the threshold.
        counted: it is in the strong view, and the truth is known (of an absent one where v=0 means absent).
        right: it is within 5 % of the crop's diagonal of the truth.
        kept: the student would learn from it.
        labeled: it has a label.
        true: it has a label inside the strong view.
    """

    scores: Float[Array, "n k"]
    confidence: Float[Array, "n k"]
    counted: Bool[Array, "n k"]
    right: Bool[Array, "n k"]
    kept: Bool[Array, "n k"]
    labeled: Bool[Array, "n k"]
    true: Bool[Array, "n k"]


class ProbeResult(NamedTuple):
    """The numbers of a probe, what they are of, and some of this rank's people to draw."""

    values: dict[str, float]
    shown_people: ShownPeople
    judged: Judged

    @property
    def bins(self) -> Reliability:
        """The counted keypoints by their confidence, and how many of them are right."""
        return bin_scores(self.judged.confidence[self.judged.counted], self.judged.right[self.judged.counted])


class Holdout(Dataset[LabeledPair]):
    """Up to 256 labeled people, evenly spread over a dataset; their views are the same each time."""

    def __init__(
        self, people: People, augmenter: Augmenter, config: DataConfig, *, num_cutouts: int, seed: int
    ) -> None:
        self.people, self.augmenter, self.config = people, augmenter, config
        self.num_cutouts, self.seed = num_cutouts, seed
        self.changes = partial(change_pixels, augmenter.pixel_changes())
        self.chosen = np.linspace(0, len(people) - 1, min(NUM_HOLDOUT, len(people))).round().astype(int).tolist()

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> LabeledPair:
        row = self.people.rows[self.chosen[index]]
        rng = default_rng([self.seed, zlib.crc32(b"holdout"), index])
        base = geometry.crop_around_box(np.asarray(row["box_xywh"]), self.config.box_padding, self.config.input_hw)
        path = self.people.root / row["file_name"]
        settings = PairSettings(self.augmenter, self.config, self.changes, self.num_cutouts)
        pair, strong = make_pair(path, base, settings, rng)
        truth = transform_keypoints(strong, np.asarray(row["keypoints"]), self.config.input_hw, self.augmenter.skeleton)
        area = row["area"] * abs(np.linalg.det(strong.matrix(self.config.input_hw)[:, :2]))
        points_xy = torch.from_numpy(truth[:, :2].astype(np.float32))
        return LabeledPair(
            pair, points_xy, torch.from_numpy(is_labeled(truth)), torch.tensor(area, dtype=torch.float64)
        )


def probe(
    objective: MeanTeacher,
    holdout: Holdout,
    *,
    batch_size: int,
    rank: int = 0,
    num_ranks: int = 1,
    gather: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> ProbeResult:
    """Measure the pseudo-labels of the hold-out (equal on all ranks).

    `pseudo_precision`: the share of the kept keypoints with a label that lie within 5 % of the crop's diagonal of the
    truth; with `data.absent_is_background` those without a label count as wrong. `pseudo_precision_absent_wrong`: they
    do in any case. `pseudo_coverage`: the share of the true keypoints in the strong view that it keeps. `pseudo_oks`:
    mean OKS over people, of the kept keypoints alone. Precision and coverage also as NAME/KEYPOINT. Each is nan where
    there is nothing to measure. `pseudo_precision_stderr`: the binomial standard error of the first.

    Args:
        gather: concatenates a tensor over all ranks along its first dimension. All ranks must call this.
    """
    device = next(objective.teacher.parameters()).device
    mine = list(range(rank, len(holdout), num_ranks))
    shown = set(np.linspace(0, len(mine) - 1, min(NUM_SHOWN, len(mine))).round().astype(int).tolist())
    sums, shown_people, position = torch.zeros(2, dtype=torch.float64), [], 0
    # Equally many rows on each rank, as gathering needs.
    num_rows, num_keypoints = math.ceil(len(holdout) / num_ranks), holdout.augmenter.skeleton.num_keypoints
    rows = torch.full((num_rows, len(Judged._fields), num_keypoints), math.nan)
    for labeled_pair in unwrap_errors(_load(holdout, mine, batch_size)):
        prediction: TeacherPrediction = _map(Tensor.cpu, objective.pseudo_labels(to_device(labeled_pair.pair, device)))
        sums += _similarity(labeled_pair, prediction, holdout)
        rows[position : position + len(labeled_pair.area)] = _judge(labeled_pair, prediction, holdout)
        for row in range(len(labeled_pair.area)):
            if position + row in shown:
                shown_people.append(_map(lambda tensor, row=row: tensor[row : row + 1], (labeled_pair, prediction)))
        position += len(labeled_pair.area)
    similarity, people = gather(sums[None].to(device)).sum(dim=0).tolist()
    # In the hold-out's order, whatever the number of ranks: sums of floats depend on it. Rows of nobody come last.
    table = gather(rows.to(device)).cpu().numpy().reshape(num_ranks, *rows.shape).swapaxes(0, 1)
    scores, confidence, *masks = table.reshape(-1, *rows.shape[1:])[: len(holdout)].swapaxes(0, 1)
    judged = Judged(scores, confidence, *(mask > 0 for mask in masks))
    oks_of_kept = {"pseudo_oks": similarity / people if people else math.nan}
    return ProbeResult(_shares(judged, holdout) | oks_of_kept, shown_people, judged)


def _load(holdout: Holdout, rows: Sequence[int], batch_size: int) -> DataLoader:
    return DataLoader(
        Subset(holdout, rows),
        batch_size=batch_size,
        num_workers=holdout.config.num_workers,
        collate_fn=default_collate,
        worker_init_fn=begin_worker,
        generator=torch.Generator(),  # so that the global random state is the same with and without a hold-out
    )


def _shares(judged: Judged, holdout: Holdout) -> dict[str, float]:
    """Precision and coverage, whole and by keypoint."""
    kept, right = judged.kept, judged.kept & judged.right
    compared = kept & (judged.labeled | holdout.config.absent_is_background)
    pairs = {
        "pseudo_precision": (right, compared),
        "pseudo_precision_absent_wrong": (right, kept),
        "pseudo_coverage": (judged.true & kept, judged.true),
    }
    values = {name: _ratio(part.sum(), whole.sum()) for name, (part, whole) in pairs.items()}
    values["pseudo_precision_stderr"] = _binomial_error(int((right & compared).sum()), int(compared.sum()))
    for name in ("pseudo_precision", "pseudo_coverage"):
        part, whole = (mask.sum(axis=0) for mask in pairs[name])
        names = holdout.augmenter.skeleton.names
        values |= {f"{name}/{k}": _ratio(a, b) for k, a, b in zip(names, part, whole, strict=True)}
    return values


def _ratio(part: int, whole: int) -> float:
    return int(part) / int(whole) if whole else math.nan


def _binomial_error(part: int, whole: int) -> float:
    """The standard error of a share, as if two more were counted each way: that of 3 of 3 is not 0; nan of none.

    Source: Agresti and Coull 1998, Approximate is better than "exact" for interval estimation of binomial proportions.
    """
    share = (part + 2) / (whole + 4)
    return math.sqrt(share * (1 - share) / (whole + 4)) if whole else math.nan


def _judge(labeled_pair: LabeledPair, prediction: TeacherPrediction, holdout: Holdout) -> Float[Tensor, "b fields k"]:
    """The fields of `Judged` of a batch."""
    input_hw = holdout.config.input_hw
    labeled = labeled_pair.labeled
    right = labeled & is_near(prediction.points_xy, labeled_pair.truth_xy, input_hw)
    counted = _inside(prediction.points_xy, input_hw) & (labeled | holdout.config.absent_is_background)
    true = labeled & _inside(labeled_pair.truth_xy, input_hw)
    fields = (prediction.scores, prediction.confidence, counted, right, prediction.kept, labeled, true)
    values = torch.stack([field.float() for field in fields], dim=1)
    # The strong view's order of left and right to the teacher's, that of the weak one.
    swapped = labeled_pair.pair.weak.flipped != labeled_pair.pair.strong.flipped
    return torch.where(swapped[:, None, None], values[:, :, list(holdout.augmenter.skeleton.mirror)], values)


def _inside(points_xy: Float[Tensor, "*b k 2"], input_hw: tuple[int, int]) -> Bool[Tensor, "*b k"]:
    x, y = points_xy.unbind(-1)
    return (x >= 0) & (y >= 0) & (x <= input_hw[1] - 1) & (y <= input_hw[0] - 1)


def _similarity(labeled_pair: LabeledPair, prediction: TeacherPrediction, holdout: Holdout) -> Float[Tensor, "2"]:
    """The sum of the OKS of people's kept keypoints, and how many people have any."""
    compared = labeled_pair.labeled & prediction.kept
    sigmas = holdout.augmenter.skeleton.sigmas
    similarities = [
        oks(truth, predicted[None].numpy(), area[None].numpy(), sigmas, counted.numpy())[0]
        for truth, predicted, area, counted in zip(
            labeled_pair.truth_xy.double().numpy(),
            prediction.points_xy.double(),
            labeled_pair.area,
            compared,
            strict=True,
        )
        if counted.any()
    ]
    return torch.tensor([float(sum(similarities)), float(len(similarities))], dtype=torch.float64)


def is_near(
    predicted_xy: Float[Tensor, "*b k 2"], true_xy: Float[Tensor, "*b k 2"], input_hw: tuple[int, int]
) -> Bool[Tensor, "*b k"]:
    """Return whether a point is within 5 % of the crop's diagonal of the true one."""
    return (predicted_xy - true_xy).norm(dim=-1) <= NEAR * math.hypot(*input_hw)


def _map(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """Apply a function to every tensor of a tree of tuples."""
    if isinstance(tree, Tensor):
        return function(tree)
    if tree is None:
        return None
    items = [_map(function, item) for item in tree]
    return type(tree)(*items) if hasattr(tree, "_fields") else tuple(items)


def draw_calibration(bins: Reliability) -> UInt8[Array, "h w 3"]:
    """Draw the share of keypoints that is right (upwards) by confidence in 10 bins; calibrated ones end at the line."""
    side, image = CURVE_PX, np.full((CURVE_PX, CURVE_PX, 3), 255, dtype=np.uint8)
    width = side / len(bins.num)
    for place, (num, right) in enumerate(zip(bins.num, bins.right, strict=True)):
        if num:
            left, top = round(place * width) + 1, round((1 - right) * (side - 1))
            cv2.rectangle(image, (left, top), (round((place + 1) * width) - 2, side - 1), (59, 125, 216), -1)
            cv2.putText(image, str(num), (left, side - 6), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (20, 20, 20), 1, cv2.LINE_AA)
    cv2.line(image, (0, side - 1), (side - 1, 0), (20, 20, 20), 1, cv2.LINE_AA)
    return draw.add_header(image, "share that is right (up, 0-1) by confidence (0-1)")


def panel(shown_people: ShownPeople, skeleton: Skeleton) -> UInt8[Array, "h w 3"]:
    """Draw a person in each column: the teacher's view and keypoints (hollow: not kept), the student's, and the errors.

    The student's view has its cutouts; lines lead from the pseudo-label to the truth, red if they are longer than 5 %
    of the diagonal.
    """
    columns = [_column(labeled_pair, prediction, skeleton) for labeled_pair, prediction in shown_people]
    return draw.arrange_grid([cell for row in zip(*columns, strict=True) for cell in row], columns=len(columns))


def _column(
    labeled_pair: LabeledPair, prediction: TeacherPrediction, skeleton: Skeleton
) -> list[UInt8[Array, "h w 3"]]:
    pair, kept = labeled_pair.pair, prediction.kept[0].numpy()
    weak, strong, cut = (
        image[0].permute(1, 2, 0).numpy()
        for image in (pair.weak.image, pair.strong.image, cut_out(pair, prediction.points_xy))
    )
    input_hw = (strong.shape[0], strong.shape[1])
    swapped = bool(pair.weak.flipped[0] != pair.strong.flipped[0])
    order = list(skeleton.mirror) if swapped else list(range(skeleton.num_keypoints))
    weak_from_strong = geometry.strong_from_weak(pair.weak.matrix, pair.strong.matrix)
    weak_xy = geometry.apply_batch(weak_from_strong, prediction.points_xy)[0].numpy()[order]
    predicted_xy, true_xy = prediction.points_xy[0].numpy(), labeled_pair.truth_xy[0].numpy()
    right = is_near(prediction.points_xy, labeled_pair.truth_xy, input_hw)[0].numpy()
    compared = kept & labeled_pair.labeled[0].numpy()
    turned = " (mirrored)" if swapped else ""
    return [
        draw.add_title(
            draw.draw_person(weak, weak_xy, np.where(kept, 1.0, 0.5)[order], skeleton),
            f"teacher: {kept.sum()} of {len(kept)} kept",
        ),
        draw.add_title(draw.draw_person(cut, predicted_xy, kept.astype(float), skeleton), f"student{turned}"),
        draw.add_title(
            draw.draw_errors(strong, predicted_xy, true_xy, compared, right),
            f"{(compared & ~right).sum()} of {compared.sum()} wrong" if compared.any() else "no label to compare",
        ),
    ]
