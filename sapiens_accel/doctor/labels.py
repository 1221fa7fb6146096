"""What is wrong with labeled people, checked on whole columns: each check names all that it finds.

Shape letters: n people, k keypoints. All coordinates are image px.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped
from numpy import ndarray as Array

from sapiens_accel.config.schema import Config, DataConfig
from sapiens_accel.errors import count
from sapiens_accel.pose import geometry, mirror_pairs, person_boxes, visibility
from sapiens_accel.pose.skeleton import Skeleton
from sapiens_accel.sources.coco import show_value

Level = Literal["error", "warning", "note"]
LEVELS: tuple[Level, ...] = ("error", "warning", "note")
PERCENTILES = (5, 50, 95)
LEAST_CORNERS, MOST_CORNERS = 4, 0.9  # people, and the share of them that must seem so
CORNER_SLACK = 0.1  # of a side, by which keypoints may lie outside of their box
SLACK = 1.0  # px by which a label may lie outside of its image: rounding
LEAST_VOTES = 30  # people in whom a pair was compared: of fewer, chance decides
UNLIKELY = 3.5  # standard deviations
AGREED = 0.5  # mean length of the others' directions: all alike 1, at random 0
UPRIGHT = 0.7  # the sine of 45 degrees
SWAPPED, DOUBTFUL = 0.75, 0.6  # shares of people in whom a pair disagrees with the others; arms that cross do so in few
MOST_LOST = 0.05  # of the labeled keypoints, by the crop
SIGMA_SHARES = (1 / 48, 1 / 20)  # of the heatmap's width: published are 1/32 (Sapiens) and 1/24 (ViTPose, UDP)
LEAST_SIGMA = 0.8  # heatmap px: a narrower Gaussian lies between the pixels


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What a check has found.

    Attributes:
        level: an error spoils the training or its numbers; a warning may; a note says how things are.
        check: its name; before a slash, what was looked at.
        culprits: every annotation, image, keypoint or file that it is about.
    """

    level: Level
    check: str
    text: str
    culprits: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Labels:
    """The people of one annotation file, column by column.

    Attributes:
        ann_ids: as whole numbers; a text has that of `coco.number_of_id`.
        given_ids: as the file writes them.
        keypoints: x, y and v, see `visibility`.
        size_wh: of each person's image; not a number where it is not known.
        box_made: whether a person's box is not the file's own (`--data.boxes`): it is not the file's fault.
    """

    ann_ids: Int[Array, "n"]
    given_ids: Shaped[Array, "n"]
    file_names: Shaped[Array, "n"]
    boxes_xywh: Float[Array, "n 4"]
    areas: Float[Array, "n"]
    keypoints: Float[Array, "n k 3"]
    size_wh: Float[Array, "n 2"]
    box_made: Bool[Array, "n"]

    def __len__(self) -> int:
        return len(self.ann_ids)

    @property
    def labeled(self) -> Bool[Array, "n k"]:
        return visibility.is_labeled(self.keypoints)

    def names(self, chosen: Bool[Array, "n"]) -> tuple[str, ...]:
        return _annotation_names(self.given_ids[chosen], self.file_names[chosen])

    def at(self, indices: Int[Array, "m"]) -> "Labels":
        """The people of these indices."""
        return Labels(**{column.name: getattr(self, column.name)[indices] for column in dataclasses.fields(self)})


def join_labels(several: Sequence[Labels]) -> Labels:
    """The people of several files, one after another."""
    columns = [column.name for column in dataclasses.fields(Labels)]
    return Labels(**{name: np.concatenate([getattr(one, name) for one in several]) for name in columns})


def describe_people(labels: Labels, skeleton: Skeleton) -> dict[str, Any]:
    """How many people, the share in whom each keypoint is visible and occluded, and percentiles of sizes (px)."""
    visible, num = visibility.is_visible(labels.keypoints), max(len(labels), 1)
    sides = {"box_width": labels.boxes_xywh[:, 2], "box_height": labels.boxes_xywh[:, 3], "area": labels.areas}
    shares = {"visible": visible, "occluded": labels.labeled & ~visible}
    by_keypoint = {
        name: dict(zip(skeleton.names, (which.sum(axis=0) / num).round(4).tolist(), strict=True))
        for name, which in shares.items()
    }
    return {
        "people": len(labels),
        "pictures": len(set(labels.file_names)),
        "joints_labelled": float(labels.labeled.sum() / num),
        **by_keypoint,
        "percentiles": list(PERCENTILES),
        **{name: np.percentile(of, PERCENTILES).round(1).tolist() if len(of) else [] for name, of in sides.items()},
    }


def find_faults(labels: Labels, skeleton: Skeleton, *, scored: bool, run: Config | None = None) -> list[Finding]:
    """Every fault of the labels.

    Args:
        scored: whether AP is computed of these people: some faults spoil it that do not matter to learning.
        run: its options say what v=0 means, and which area is used; None: the defaults.
    """
    run = run or Config()
    checks: tuple[Callable[..., Iterator[Finding]], ...] = (
        _check_boxes,
        _check_corners,
        _check_keypoints,
    )
    findings = [finding for check in checks for finding in check(labels, scored)] if len(labels) else []
    if len(labels):
        findings += _check_areas(labels, scored and run.eval.area == "annotation")
        findings += _check_visibility(labels, run.data)
    findings += find_repeated_ids(labels.ann_ids, labels.given_ids, labels.file_names, scored=scored)
    findings += _find_zero_id(labels, scored)
    return [
        *findings,
        *_find_never_labeled(labels, skeleton),
        *find_swapped_pairs(labels, skeleton),
        *find_mirrored(labels, skeleton),
    ]


def is_repeated(ids: Int[Array, "n"]) -> Bool[Array, "n"]:
    """Which are there more than once."""
    distinct, counts = np.unique(ids, return_counts=True)
    return np.isin(ids, distinct[counts > 1])


def find_repeated_ids(
    ann_ids: Int[Array, "n"], given_ids: Shaped[Array, "n"], file_names: Shaped[Array, "n"], *, scored: bool
) -> Iterator[Finding]:
    """Annotations that share their id with another one."""
    again = is_repeated(ann_ids)
    if again.any():
        text = f"{again.sum()} annotations share their id with another one"
        yield Finding(
            level="error" if scored else "warning",
            check="ids",
            text=text + ("; COCO's evaluation takes one of each" if scored else ""),
            culprits=_annotation_names(given_ids[again], file_names[again]),
        )


def _find_zero_id(labels: Labels, scored: bool) -> Iterator[Finding]:
    zero = labels.ann_ids == 0
    if scored and zero.any():
        text = (
            "an annotation has id 0, and pycocotools itself takes a match with it for none: its AP of saved "
            "predictions is lower than the one here, which is right; number annotations from 1"
        )
        yield Finding(level="note", check="ids", text=text, culprits=labels.names(zero))


def _check_boxes(labels: Labels, scored: bool) -> Iterator[Finding]:
    x, y, w, h = labels.boxes_xywh.T
    width, height = labels.size_wh.T
    with np.errstate(invalid="ignore"):
        inside_w = np.clip(np.minimum(x + w, width + SLACK) - np.maximum(x, -SLACK), 0, None)
        inside_h = np.clip(np.minimum(y + h, height + SLACK) - np.maximum(y, -SLACK), 0, None)
        share = inside_w * inside_h / (w * h)
    gone = person_boxes.are_outside(labels.boxes_xywh, labels.size_wh) & labels.labeled.any(axis=1)
    if gone.any():
        text = f"{_count(gone, 'box', 'boxes')} outside of the image"
        yield Finding(level="error", check="boxes", text=text, culprits=labels.names(gone))
    partly = ~labels.box_made & ~gone & (share < 0.9)
    if partly.any():
        text = f"{_count(partly, 'box', 'boxes')} with more than a tenth outside of the image"
        yield Finding(level="warning", check="boxes", text=text, culprits=labels.names(partly))


def _check_corners(labels: Labels, scored: bool) -> Iterator[Finding]:
    """Boxes whose numbers are those of two corners, as other tools write them."""
    people = labels.at(np.flatnonzero(labels.labeled.any(axis=1)))
    if len(people) < LEAST_CORNERS:
        return
    corners = people.boxes_xywh
    low, extent = person_boxes.measure_keypoints(people.keypoints[..., :2], people.labeled)
    high = low + extent
    reach = SLACK + CORNER_SLACK * (corners[:, 2:] - corners[:, :2])
    # What lies in x1 to x2 is left of x + w, too; only the true reading is as tight as the keypoints.
    fits = (corners[:, 2:] > corners[:, :2]) & (low >= corners[:, :2] - reach) & (high <= corners[:, 2:] + reach)
    sides = np.maximum(extent, SLACK)
    nearer = np.abs(np.log((corners[:, 2:] - corners[:, :2]).clip(SLACK) / sides)).sum(axis=1)
    farther = np.abs(np.log(corners[:, 2:] / sides)).sum(axis=1)
    are_corners = np.asarray(fits.all(axis=1)) & (nearer < farther)
    if are_corners.mean() >= MOST_CORNERS:
        counted = _count(are_corners, "box looks", "boxes look")
        text = f"{counted} like corners, x1, y1, x2, y2; expected x, y, width, height: "
        text += "write x2 - x1 and y2 - y1, or make boxes from the keypoints, --data.boxes keypoints"
        yield Finding(level="warning", check="corners", text=text, culprits=people.names(are_corners))


def _check_areas(labels: Labels, scored: bool) -> Iterator[Finding]:
    none = labels.areas <= 0
    if none.any():
        text = f"{_count(none, 'person', 'people')} of area 0" + ("; they count as missed, always" if scored else "")
        text += ": measure OKS by the box instead, --eval.area box" if scored and none.all() else ""
        yield Finding(level="warning", check="area", text=text, culprits=labels.names(none))
    large = ~labels.box_made & (labels.areas > 1.1 * labels.boxes_xywh[:, 2] * labels.boxes_xywh[:, 3])
    if large.any():
        text = f"{_count(large, 'area')} larger than the person's box"
        yield Finding(level="warning", check="area", text=text, culprits=labels.names(large))


def _check_keypoints(labels: Labels, scored: bool) -> Iterator[Finding]:
    points = labels.keypoints[..., :2]
    with np.errstate(invalid="ignore"):
        beyond = (points > labels.size_wh[:, None] - 1 + SLACK) | (points < -SLACK)
    outside = beyond.any(axis=-1) & labels.labeled
    people = np.asarray(outside.any(axis=1))
    if people.any():
        text = f"{_count(outside, 'labeled keypoint')} outside of the image"
        yield Finding(level="warning", check="keypoints", text=text, culprits=labels.names(people))


def _check_visibility(labels: Labels, data: DataConfig) -> Iterator[Finding]:
    v = labels.keypoints[..., 2]
    unused = visibility.has_unused_position(labels.keypoints)
    odd = np.asarray((~np.isin(v, (0, 1, 2)) & ~unused).any(axis=1))
    if odd.any():
        text = f"{_count(odd, 'person', 'people')} with a v that is not 0, 1 or 2: above 0 it is a label, else none"
        yield Finding(level="warning", check="visibility", text=text, culprits=labels.names(odd))
    if (people := np.asarray(unused.any(axis=1))).any():
        below = bool((v[unused] < 0).any())
        share = unused.sum() / max(unused.sum() + labels.labeled.sum(), 1)
        text = (
            f"{_count(unused, 'keypoint')} ({share:.0%} of those with coordinates) of "
            f"{_count(people, 'person', 'people')} have {_explain_unused(data, below)}"
        )
        yield Finding(level="warning", check="visibility", text=text, culprits=labels.names(people))


def _explain_unused(data: DataConfig, below: bool) -> str:
    """What becomes of coordinates without a label; `below`: some have a v below 0."""
    if data.visibility_threshold is not None:
        return (
            f"a score below --data.visibility_threshold {data.visibility_threshold:g}: no label, so "
            f"{'they are learned as not in the image' if data.absent_is_background else 'nothing is learned of them'}"
        )
    what = "v of 0 or less" if below else "v=0"
    if data.absent_is_background:
        return (
            f"{what} and coordinates: {what} is taken for a keypoint that is not in the image "
            f"(--data.absent_is_background true), and AP does not count them. Write v=1 (hidden) or 2 where "
            f"they are labels"
        )
    return (
        f"{what} and coordinates: {what} is no label, so nothing is learned of them and AP does not count them. Write "
        f"v=1 (hidden) or 2 where they are labels"
    )


def _find_never_labeled(labels: Labels, skeleton: Skeleton) -> Iterator[Finding]:
    never = [name for k, name in enumerate(skeleton.names) if not labels.labeled[:, k].any()]
    if never and len(labels):
        text = f"{len(never)} of {skeleton.num_keypoints} keypoints have no label in any person"
        yield Finding(level="warning", check="keypoints", text=text, culprits=tuple(never))


def find_swapped_pairs(labels: Labels, skeleton: Skeleton) -> Iterator[Finding]:
    """Left and right keypoints that lie the other way round than the other pairs of the same person, in most people.

    From right to left a pair points into the same half-plane as the sum of the others, whichever way a person faces.
    Who is seen from the side has no say: there the legs of a stride lie one way round and the arms the other.
    """
    pairs = [(left, right) for left, right in _sides(skeleton)]
    if len(pairs) < 3 or not len(labels):
        return
    left, right = (np.array(side) for side in zip(*pairs, strict=True))
    both = labels.labeled[:, left] & labels.labeled[:, right]
    towards = (labels.keypoints[:, left, :2] - labels.keypoints[:, right, :2]) * both[..., None]
    length = np.linalg.norm(towards, axis=-1, keepdims=True)
    towards = np.divide(towards, length, out=np.zeros_like(towards), where=length > 0)
    others = towards.sum(axis=1, keepdims=True) - towards
    # Others that do not agree among themselves have no say.
    agreeing = np.linalg.norm(others, axis=-1) >= np.maximum(AGREED * (both.sum(axis=1, keepdims=True) - 1), 1)
    asked = both & agreeing & (length[..., 0] > 0)
    against = asked & ((towards * others).sum(axis=-1) < 0)
    for pair, (a, b) in enumerate(pairs):
        votes = int(asked[:, pair].sum())
        share = against[:, pair].sum() / max(votes, 1)
        if share > DOUBTFUL and _is_significant(share, votes):
            text = (
                f"{skeleton.names[a]} and {skeleton.names[b]} lie the other way round than the person's other pairs in "
                f"{share:.0%} of {votes} people: swapped?"
            )
            level: Level = "error" if share > SWAPPED else "warning"
            yield Finding(level=level, check="mirror", text=text, culprits=labels.names(against[:, pair]))


def find_mirrored(labels: Labels, skeleton: Skeleton) -> Iterator[Finding]:
    """All of left and right exchanged: who shows a face has their left shoulder to the right, seen with the head up.

    No error: who calls left what lies left in the image, in all files, learns that as well.
    """
    names = ("nose", "left_eye", "right_eye", "left_shoulder", "right_shoulder")
    if not set(names) <= set(skeleton.names) or not len(labels):
        return
    *face, left, right = (skeleton.names.index(name) for name in names)
    points = labels.keypoints[..., :2]
    (ax, ay), (ux, uy) = (
        direction.T
        for direction in (
            points[:, left] - points[:, right],
            points[:, face[0]] - (points[:, left] + points[:, right]) / 2,
        )
    )
    # The sine between the shoulders and the way up, whichever that is in the image; times both lengths.
    turn, lengths = ax * uy - ay * ux, np.hypot(ax, ay) * np.hypot(ux, uy)
    facing = visibility.is_visible(labels.keypoints)[:, face].all(axis=1) & labels.labeled[:, [left, right]].all(axis=1)
    shown = facing & (np.abs(turn) > UPRIGHT * lengths)
    wrong = shown & (turn > 0)
    votes = int(shown.sum())
    share = wrong.sum() / max(votes, 1)
    if share > DOUBTFUL and _is_significant(share, votes):
        text = (
            f"{share:.0%} of {votes} people who show their face have the left shoulder on the left as one sees them: "
            f"left and right exchanged, or images mirrored?"
        )
        yield Finding(level="warning", check="mirror", text=text, culprits=labels.names(wrong))


def propose_pairs(labels: Labels, skeleton: Skeleton) -> Iterator[Finding]:
    """The pairs that the shapes of the people suggest, as the line of a skeleton file; or why there are none."""
    pairs = mirror_pairs.find_pairs(labels.keypoints)
    num = int(mirror_pairs.has_enough_keypoints(labels.keypoints).sum())
    if pairs:
        named = json.dumps([[skeleton.names[pair.first], skeleton.names[pair.second]] for pair in pairs])
        text = (
            f"left and right as the shapes of the labeled people suggest: {count(len(pairs), 'pair')}; look at each "
            f"(front and hind may be taken for left and right), add what "
            f"is missing, and put it into --data.skeleton FILE:  mirror: {named}"
        )
    elif num < mirror_pairs.MIN_PEOPLE:
        text = (
            f"no pairs of left and right are proposed: too few people to tell from their shapes (expected at least "
            f"{mirror_pairs.MIN_PEOPLE} with {mirror_pairs.MIN_KEYPOINTS} or more labeled keypoints, found {num}). "
            f"Give the pairs as mirror: [[NAME, NAME], ...] in --data.skeleton FILE"
        )
    else:
        text = (
            f"no pairs of left and right are proposed: the shapes of {num} people show none clearly. Give the pairs as "
            f"mirror: [[NAME, NAME], ...] in --data.skeleton FILE"
        )
    yield Finding(level="note", check="pairs", text=text)


def _is_significant(share: float, votes: int) -> bool:
    """Whether more than half by so much is no chance: of a hundred pairs tossed like coins none is reported."""
    return votes >= LEAST_VOTES and (share - 0.5) * 2 * votes**0.5 > UNLIKELY


def _sides(skeleton: Skeleton) -> list[tuple[int, int]]:
    """The pairs of the mirror order, the left one first by its name."""
    pairs = [(a, b) for a, b in enumerate(skeleton.mirror) if a < b]
    return [(b, a) if skeleton.sides[b] == "left" else (a, b) for a, b in pairs]


def check_lost_by_crop(labels: Labels, padding: float, input_hw: tuple[int, int]) -> Finding:
    """The share of labeled keypoints that lie outside of their person's upright crop: nothing is learned of them."""
    lost = labels.labeled & ~geometry.in_crop(labels.boxes_xywh, labels.keypoints, padding, input_hw)
    share = lost.sum() / max(labels.labeled.sum(), 1)
    text = f"{lost.sum()} of {labels.labeled.sum()} labeled keypoints ({share:.2%}) lie outside of the person's crop"
    return Finding(
        level="warning" if share > MOST_LOST else "note",
        check="crop",
        text=text + (f"; boxes too tight for --data.box_padding {padding:g}?" if share > MOST_LOST else ""),
        culprits=labels.names(np.asarray(lost.any(axis=1))),
    )


def check_sigma(sigma: float, heatmap_hw: tuple[int, int]) -> Finding:
    """Whether the targets' width suits the heatmap's."""
    low, high = (share * heatmap_hw[1] for share in SIGMA_SHARES)
    text = (
        f"sigma {sigma:g} of a heatmap of {heatmap_hw[0]} x {heatmap_hw[1]}: 1/{heatmap_hw[1] / sigma:.0f} of its width"
    )
    fine = low <= sigma <= high and sigma >= LEAST_SIGMA
    if not fine and high < LEAST_SIGMA:
        expected = (
            f"; no sigma suits so small a heatmap: {LEAST_SIGMA:g} px is the least, as a narrower peak lies between "
            f"pixels, and that is more than 1/20 of the width. Enlarge --data.input_hw"
        )
    else:
        expected = f"; published shares are 1/32 and 1/24: --data.sigma {max(heatmap_hw[1] / 32, LEAST_SIGMA):.2g}"
        expected += f" ({LEAST_SIGMA:g} px is the least)" if heatmap_hw[1] / 32 < LEAST_SIGMA else ""
    return Finding(level="note" if fine else "warning", check="sigma", text=text + ("" if fine else expected))


def _annotation_names(given_ids: Shaped[Array, "n"], file_names: Shaped[Array, "n"]) -> tuple[str, ...]:
    pairs = zip(given_ids.tolist(), file_names, strict=True)
    return tuple(f"annotation {show_value(given)} ({name})" for given, name in pairs)


def _count(which: Bool[Array, "*any"], one: str, more: str | None = None) -> str:
    number = int(which.sum())
    return f"{number} {one if number == 1 else more or one + 's'}"
