"""The quality of the pseudo-labels of stage ssl, measured on labeled people, and images of them.

Shape letters: b people, k keypoints, H W the input.
"""

import math
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

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
from sapiens_accel.evaluation.evaluate import oks
from sapiens_accel.pose import draw, geometry
from sapiens_accel.pose.skeleton import Skeleton
from sapiens_accel.pose.visibility import is_labeled
from sapiens_accel.training.mean_teacher import MeanTeacher, TeacherPrediction, cut_out

NUM_HOLDOUT = 256  # some 3,000 keypoints: a precision of 0.9 is known to +-0.01, in seconds
NUM_SHOWN = 6
NEAR = 0.05  # of the crop's diagonal: a pseudo-label that is no farther from its keypoint counts as right


class LabeledPair(NamedTuple):
    """A pair of a labeled person, with the truth in the strong view: input px, in its left/right order."""

    pair: Pair
    truth_xy: Float[Tensor, "*b k 2"]
    labeled: Bool[Tensor, "*b k"]
    area: Float[Tensor, "*b"]  # of the person, input px^2


ShownPeople = Sequence[tuple[LabeledPair, TeacherPrediction]]  # of one person each


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
) -> tuple[dict[str, float], ShownPeople]:
    """Measure the pseudo-labels of the hold-out (equal on all ranks), and return some of this rank's people to draw.

    `pseudo_precision`: the share of its keypoints with a label of both kinds that lie within 5 % of the crop's diagonal
    of the truth. `pseudo_coverage`: the share of the true keypoints in the strong view that it keeps. `pseudo_oks`:
    mean OKS over people, of the kept keypoints alone. Each is nan where there is nothing to measure.

    Args:
        gather: concatenates a tensor over all ranks along its first dimension. All ranks must call this.
    """
    device = next(objective.teacher.parameters()).device
    mine = list(range(rank, len(holdout), num_ranks))
    shown = set(np.linspace(0, len(mine) - 1, min(NUM_SHOWN, len(mine))).round().astype(int).tolist())
    loader = DataLoader(
        Subset(holdout, mine),
        batch_size=batch_size,
        num_workers=holdout.config.num_workers,
        collate_fn=default_collate,
        worker_init_fn=begin_worker,
        generator=torch.Generator(),  # so that the global random state is the same with and without a hold-out
    )
    sums, shown_people, position = torch.zeros(6, dtype=torch.float64), [], 0
    for labeled_pair in unwrap_errors(loader):
        prediction: TeacherPrediction = _map(Tensor.cpu, objective.pseudo_labels(to_device(labeled_pair.pair, device)))
        sums += _sums(labeled_pair, prediction, holdout)
        for row in range(len(labeled_pair.area)):
            if position + row in shown:
                shown_people.append(_map(lambda tensor, row=row: tensor[row : row + 1], (labeled_pair, prediction)))
        position += len(labeled_pair.area)
    right, compared, kept, true, similarity, people = gather(sums[None].to(device)).sum(dim=0).tolist()
    ratios = {"precision": (right, compared), "coverage": (kept, true), "oks": (similarity, people)}
    return {f"pseudo_{name}": a / b if b else math.nan for name, (a, b) in ratios.items()}, shown_people


def _sums(labeled_pair: LabeledPair, prediction: TeacherPrediction, holdout: Holdout) -> Float[Tensor, "6"]:
    """Numerators and denominators of precision, coverage and OKS."""
    height, width = holdout.config.input_hw
    x, y = labeled_pair.truth_xy.unbind(-1)
    true = labeled_pair.labeled & (x >= 0) & (y >= 0) & (x <= width - 1) & (y <= height - 1)
    compared = labeled_pair.labeled & prediction.kept
    right = compared & is_near(prediction.points_xy, labeled_pair.truth_xy, holdout.config.input_hw)
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
    counts = [
        right.sum(),
        compared.sum(),
        (true & prediction.kept).sum(),
        true.sum(),
        sum(similarities),
        len(similarities),
    ]
    return torch.tensor([float(count) for count in counts], dtype=torch.float64)


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
            draw.draw_person(weak, weak_xy, np.where(kept, 1.0, 0.5)[order], skeleton), f"keeps {kept.sum()}"
        ),
        draw.add_title(draw.draw_person(cut, predicted_xy, kept.astype(float), skeleton), f"to learn{turned}"),
        draw.add_title(
            draw.draw_errors(strong, predicted_xy, true_xy, compared, right),
            f"{(compared & ~right).sum()} of {compared.sum()} far",
        ),
    ]
