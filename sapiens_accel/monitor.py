"""Is the semi-supervised stage healthy? Labelled people put through the unlabelled path, pictures of them, and alarms.

Shape letters: b people, k keypoints, H W the input.
"""

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from numpy import ndarray as Array
from numpy.random import default_rng
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, default_collate

from sapiens_accel import draw, geometry
from sapiens_accel.augment import Augmenter, change_pixels
from sapiens_accel.coco import People, read_image
from sapiens_accel.config import DataConfig, UserError
from sapiens_accel.data import Pair, one_thread, pair_of, seen_in, to_device
from sapiens_accel.evaluate import oks
from sapiens_accel.objective import MeanTeacher, Taught, cut_out
from sapiens_accel.skeleton import Skeleton

NUM_HOLDOUT = 256  # some 3,000 joints: a precision of 0.9 is known to +-0.01, and they take seconds
NUM_SHOWN = 6
NEAR = 0.05  # of the crop's diagonal: a pseudo-label that is no farther from its joint is right


# ---- Labelled people as the unlabelled path sees them


class Known(NamedTuple):
    """A pair of a labelled person, with the truth in the strong view: input px, in its left/right order."""

    pair: Pair
    truth_xy: Float[Tensor, "*b k 2"]
    labelled: Bool[Tensor, "*b k"]
    area: Float[Tensor, "*b"]  # of the person, input px^2


Seen = Sequence[tuple[Known, Taught]]  # of one person each


class Holdout(Dataset[Known]):
    """Up to 256 labelled people, evenly spread over a set; their views are the same each time."""

    def __init__(
        self, people: People, augmenter: Augmenter, config: DataConfig, *, num_cutouts: int, seed: int
    ) -> None:
        self.people, self.augmenter, self.config = people, augmenter, config
        self.num_cutouts, self.seed = num_cutouts, seed
        self.changes = partial(change_pixels, augmenter.pixel_changes())
        self.chosen = np.linspace(0, len(people) - 1, min(NUM_HOLDOUT, len(people))).round().astype(int).tolist()

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> Known:
        row = self.people.rows[self.chosen[index]]
        rng = default_rng([self.seed, zlib.crc32(b"holdout"), index])
        base = geometry.box_crop(np.asarray(row["box_xywh"]), self.config.box_padding, self.config.input_hw)
        image = read_image(self.people.root / row["file_name"])
        pair, strong = pair_of(image, base, self.augmenter, self.changes, self.num_cutouts, rng)
        truth = seen_in(strong, np.asarray(row["keypoints"]), self.config.input_hw, self.augmenter.skeleton)
        area = row["area"] * abs(np.linalg.det(strong.matrix(self.config.input_hw)[:, :2]))
        points_xy = torch.from_numpy(truth[:, :2].astype(np.float32))
        return Known(pair, points_xy, torch.from_numpy(truth[:, 2] > 0), torch.tensor(area, dtype=torch.float64))


def probe(
    objective: MeanTeacher,
    holdout: Holdout,
    *,
    batch_size: int,
    rank: int = 0,
    num_ranks: int = 1,
    gather: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> tuple[dict[str, float], Seen]:
    """What the teacher's labels of the hold-out are worth (the same on all ranks), and some of this rank's people.

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
        worker_init_fn=one_thread,
        generator=torch.Generator(),  # its own: the draws of this process stay what they are without a hold-out
    )
    sums, seen, position = torch.zeros(6, dtype=torch.float64), [], 0
    for known in loader:
        taught: Taught = _map(Tensor.cpu, objective.pseudo_labels(to_device(known.pair, device)))
        sums += _sums(known, taught, holdout)
        for row in range(len(known.area)):
            if position + row in shown:
                seen.append(_map(lambda tensor, row=row: tensor[row : row + 1], (known, taught)))
        position += len(known.area)
    right, judged, kept, true, similarity, people = gather(sums[None].to(device)).sum(dim=0).tolist()
    ratios = {"precision": (right, judged), "coverage": (kept, true), "oks": (similarity, people)}
    return {f"pseudo_{name}": a / b if b else math.nan for name, (a, b) in ratios.items()}, seen


def _sums(known: Known, taught: Taught, holdout: Holdout) -> Float[Tensor, "6"]:
    """Numerators and denominators of precision, coverage and OKS."""
    height, width = holdout.config.input_hw
    x, y = known.truth_xy.unbind(-1)
    true = known.labelled & (x >= 0) & (y >= 0) & (x <= width - 1) & (y <= height - 1)
    judged = known.labelled & taught.kept
    right = judged & near(taught.points_xy, known.truth_xy, holdout.config.input_hw)
    sigmas = holdout.augmenter.skeleton.sigmas
    similarities = [
        oks(truth, found[None].numpy(), area[None].numpy(), sigmas, counted.numpy())[0]
        for truth, found, area, counted in zip(
            known.truth_xy.double().numpy(), taught.points_xy.double(), known.area, judged, strict=True
        )
        if counted.any()
    ]
    counts = [right.sum(), judged.sum(), (true & taught.kept).sum(), true.sum(), sum(similarities), len(similarities)]
    return torch.tensor([float(count) for count in counts], dtype=torch.float64)


def near(
    found_xy: Float[Tensor, "*b k 2"], true_xy: Float[Tensor, "*b k 2"], input_hw: tuple[int, int]
) -> Bool[Tensor, "*b k"]:
    """Whether a point is within 5 % of the crop's diagonal of the true one."""
    return (found_xy - true_xy).norm(dim=-1) <= NEAR * math.hypot(*input_hw)


def _map(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """The function of every tensor of a tree of tuples."""
    if isinstance(tree, Tensor):
        return function(tree)
    items = [_map(function, item) for item in tree]
    return type(tree)(*items) if hasattr(tree, "_fields") else tuple(items)


def panel(seen: Seen, skeleton: Skeleton) -> UInt8[Array, "h w 3"]:
    """One person a column: the teacher's view and points (hollow: not kept), what the student learns, and the errors.

    The student's view has its squares of the mean colour; lines go from what it learns to the truth, red where they
    are longer than 5 % of the diagonal.
    """
    columns = [_column(known, taught, skeleton) for known, taught in seen]
    return draw.grid([cell for row in zip(*columns, strict=True) for cell in row], columns=len(columns))


def _column(known: Known, taught: Taught, skeleton: Skeleton) -> list[UInt8[Array, "h w 3"]]:
    pair, kept = known.pair, taught.kept[0].numpy()
    weak, strong, cut = (
        image[0].permute(1, 2, 0).numpy()
        for image in (pair.weak.image, pair.strong.image, cut_out(pair, taught.points_xy))
    )
    input_hw = (strong.shape[0], strong.shape[1])
    swapped = bool(pair.weak.flipped[0] != pair.strong.flipped[0])
    order = list(skeleton.mirror) if swapped else list(range(skeleton.num_keypoints))
    weak_from_strong = geometry.strong_from_weak(pair.weak.matrix, pair.strong.matrix)
    weak_xy = geometry.apply_batch(weak_from_strong, taught.points_xy)[0].numpy()[order]
    found_xy, true_xy = taught.points_xy[0].numpy(), known.truth_xy[0].numpy()
    right = near(taught.points_xy, known.truth_xy, input_hw)[0].numpy()
    judged = kept & known.labelled[0].numpy()
    turned = " (mirrored)" if swapped else ""
    return [
        draw.titled(draw.person(weak, weak_xy, np.where(kept, 1.0, 0.5)[order], skeleton), f"keeps {kept.sum()}"),
        draw.titled(draw.person(cut, found_xy, kept.astype(float), skeleton), f"to learn{turned}"),
        draw.titled(
            draw.errors(strong, found_xy, true_xy, judged, right), f"{(judged & ~right).sum()} of {judged.sum()} far"
        ),
    ]


# ---- Alarms

IN_A_ROW = 3  # logs: one batch may be odd
LONG = 500  # steps
COLLAPSED = 0.5  # of the first peak: annotation noise and augmentation move it by a fifth
INFLATED = 1.2  # a target's peak is 1; the decoder's overshoot and noise reach 1.1
SPREAD = 0.3  # of the labelled points' spread
KEPT = (0.05, 0.98)
MOVED = 0.01  # in fp32 nearly every weight moves; what rounds the average away leaves it at 0
GRADIENTS = 10.0  # of the unlabelled loss to the labelled one; in balance they are within 0.2 to 2
PRECISION_LOST = 0.03
STUDENT_AHEAD = 0.01  # AP: an average that follows is at least as good as what it averages
AP_LOST = 0.005


class Stopped(UserError):  # noqa: N818  (no mistake of the program's)
    """Going on would spoil what the stage has learnt."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Something that is wrong while `holds(values, first values)` does, for so many values in a row and so many steps.

    Without the values it needs nothing is known, and nothing changes.
    """

    needs: tuple[str, ...]
    holds: Callable[[Mapping[str, float], Mapping[str, float]], bool]
    says: str  # what it is, what it means and what to change; a format of the values and of `first`
    in_a_row: int = 1
    steps: int = 0
    stops: bool = False


RULES = (
    Rule(
        needs=("teacher_peak",),
        holds=lambda now, first: now["teacher_peak"] < COLLAPSED * first["teacher_peak"],
        says="teacher_peak {teacher_peak:.3f} is below half of its first {first[teacher_peak]:.3f}: the student learns "
        "the background; lower --ssl.teacher.weight or raise --ssl.teacher.ramp",
        in_a_row=IN_A_ROW,
        stops=True,
    ),
    Rule(
        needs=("teacher_peak_p99",),
        holds=lambda now, _: now["teacher_peak_p99"] > INFLATED,
        says="teacher_peak_p99 {teacher_peak_p99:.2f} is above 1.2, where targets end at 1: what is learnt lifts the "
        "peaks that it is taken from; lower --ssl.teacher.weight, and use no loss that sharpens the teacher alone "
        "(literal)",
        in_a_row=IN_A_ROW,
        stops=True,
    ),
    # Not of a network that never knew more than the mean pose: that is a warning, below.
    Rule(
        needs=("spread", "spread_labelled"),
        holds=lambda now, first: _narrow(now) and not _narrow(first),
        says="the teacher's points spread over {spread:.3f} of the crop, those of labelled people over "
        "{spread_labelled:.3f}: it says the same of everybody; lower --ssl.teacher.weight or --ssl.optim.lr",
        in_a_row=IN_A_ROW,
        stops=True,
    ),
    Rule(
        needs=("spread", "spread_labelled"),
        holds=lambda now, first: _narrow(now) and _narrow(first),
        says="the teacher's points spread over {spread:.3f} of the crop, those of labelled people over "
        "{spread_labelled:.3f}, since the start: it says the same of everybody; train longer before ssl "
        "(--phase2.epochs), or start from better --weights",
        in_a_row=IN_A_ROW,
    ),
    Rule(
        needs=("keep",),
        holds=lambda now, _: now["keep"] < KEPT[0],
        says="keep {keep:.3f}, for 500 steps below 0.05: next to nothing is learnt from unlabelled people; lower "
        "--ssl.teacher.threshold",
        steps=LONG,
    ),
    Rule(
        needs=("keep",),
        holds=lambda now, _: now["keep"] > KEPT[1],
        says="keep {keep:.3f}, for 500 steps above 0.98: the mask leaves out nothing; raise --ssl.teacher.threshold, "
        "or make the strong view harder (--augment.strong_rotation, --ssl.teacher.cutout)",
        steps=LONG,
    ),
    Rule(
        needs=("ema_moved", "lr"),
        holds=lambda now, _: now["ema_moved"] < MOVED and now["lr"] > 0,
        says="ema_moved {ema_moved:.4f}: the teacher's weights stand still; lower --ssl.teacher.ema_decay or raise "
        "--ssl.optim.lr",
        in_a_row=IN_A_ROW,
    ),
    Rule(
        needs=("grad_ratio",),
        holds=lambda now, _: now["grad_ratio"] > GRADIENTS,
        says="grad_ratio {grad_ratio:.1f}: unlabelled people outweigh the labelled ones more than ten times; lower "
        "--ssl.teacher.weight",
        in_a_row=IN_A_ROW,
    ),
    Rule(
        needs=("pseudo_precision",),
        holds=lambda now, first: now["pseudo_precision"] < first["pseudo_precision"] - PRECISION_LOST,
        says="pseudo_precision {pseudo_precision:.3f}, first {first[pseudo_precision]:.3f}: the teacher's labels get "
        "worse; raise --ssl.teacher.threshold or lower --ssl.teacher.weight",
    ),
    Rule(
        needs=("AP", "student_AP"),
        holds=lambda now, _: now["student_AP"] > now["AP"] + STUDENT_AHEAD,
        says="student_AP {student_AP:.3f} is above the teacher's {AP:.3f}: the average is too slow; lower "
        "--ssl.teacher.ema_decay",
        in_a_row=2,
    ),
    Rule(
        needs=("AP", "student_AP"),
        holds=lambda now, first: now["AP"] < first["AP"] - AP_LOST,
        says="the teacher's AP {AP:.3f} is below its first {first[AP]:.3f}: the stage does harm; lower "
        "--ssl.teacher.weight or --ssl.optim.lr, or leave the stage out",
    ),
)


def _narrow(values: Mapping[str, float]) -> bool:
    return values["spread"] < SPREAD * values["spread_labelled"]


@dataclass(kw_only=True)
class Alarms:
    """What the values of one stage say about its health. Equal values on all ranks: all of them stop together.

    Attributes:
        good: where the last good weights are, for the message.
        first: the first value of each name, of this run or of the one that it goes on from.
    """

    good: str
    first: dict[str, float] = field(default_factory=dict)
    held: dict[Rule, tuple[int, int]] = field(default_factory=dict, init=False)  # since which step, how many times
    said: set[Rule] = field(default_factory=set, init=False)

    @property
    def healthy(self) -> bool:
        """Whether nothing is going on that stops a stage if it lasts."""
        return not any(rule.stops for rule in self.held)

    def check(self, step: int, values: Mapping[str, float]) -> list[str]:
        """Warnings that these values give rise to, each said once until it clears.

        Raises:
            Stopped: with what to change, and where the last good weights are.
        """
        known = {name: value for name, value in values.items() if math.isfinite(value)}
        self.first = known | self.first
        said = []
        for rule in RULES:
            if not known.keys() >= set(rule.needs):
                continue
            if not rule.holds(known, self.first):
                self.held.pop(rule, None)
                self.said.discard(rule)
                continue
            since, times = self.held.get(rule, (step, 0))
            self.held[rule] = since, times + 1
            lasts = times + 1 >= rule.in_a_row and step - since >= rule.steps
            text = rule.says.format(first=self.first, **known)
            if lasts and rule.stops:
                raise Stopped(f"stage ssl stopped at step {step}: {text}; the last good weights are {self.good}")
            if (lasts or rule.stops) and rule not in self.said:
                self.said.add(rule)
                said.append(f"{text} (the stage stops after {rule.in_a_row} logs of this)" if rule.stops else text)
        return said
