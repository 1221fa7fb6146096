"""People's boxes: as annotated, from their keypoints, or the whole image; and how large people are in their images.

Shape letters: n people, k keypoints. All coordinates are image px.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray as Array

BoxRule = Literal["annotation", "keypoints", "image"]
# Where a box is from. NO_BOX: there is none, and no labeled keypoint to make one from.
ANNOTATED, FROM_KEYPOINTS, GUESSED_SIDE, WHOLE_IMAGE, NO_BOX = range(5)
# Against the annotated boxes of coco_mini (146 people): mean IoU 0.57 at 0.05, 0.63 at 0.1, 0.64 at 0.15, 0.63 at 0.2,
# 0.57 at 0.3; the crop is then 3 % too large in the median. Boxes that end at the image's border add 0.01: not done, so
# that the size of the image need not be known.
BOX_MARGIN = 0.15
LEAST_EXTENT = 1.0  # px: keypoints that are nearer than this in x or y do not show how wide or high somebody is


@dataclass(frozen=True, kw_only=True)
class PeopleBoxes:
    """The boxes of n people.

    Attributes:
        origins: ANNOTATED, ... NO_BOX, of each.
        areas: of the person (px^2), whatever the box is: of the annotated box, else of the one made from keypoints.
    """

    boxes_xywh: Float[Array, "n 4"]
    origins: Int[Array, "n"]
    areas: Float[Array, "n"]


def choose_boxes(
    annotated_xywh: Float[Array, "n 4"],
    keypoints_xy: Float[Array, "n k 2"],
    labeled: Bool[Array, "n k"],
    size_wh: Float[Array, "n 2"],
    rule: tuple[BoxRule, float],
    typical_wh: Callable[[], Float[Array, "2"]],
) -> PeopleBoxes:
    """The box of each person.

    annotation: the annotated box; where it has no width or no height, the one from keypoints. keypoints: that one for
    all who have a labeled keypoint. image: the whole image, whose size must be known.

    A box from keypoints is theirs, each side larger by 2 * margin of itself. A side along which they do not extend (one
    keypoint, two in a line) is that of the other people; where that is not known, the person's other side; and without
    it the box is the whole image, so that its center does not say where the keypoint is.

    Args:
        annotated_xywh: sides of 0 or less where there is none.
        size_wh: of each person's image; not a number where it is not known.
        rule: which of the three, and the margin.
        typical_wh: a function that finds the median width and height of other people; not a number: nobody has any.
            It is called if such a side is missing.
    """
    which, margin = rule
    has_box, has_keypoints = np.asarray((annotated_xywh[:, 2:] > 0).all(axis=1)), np.asarray(labeled.any(axis=1))
    makes = has_keypoints & ((which == "keypoints") | ~has_box)
    made, origins = np.zeros_like(annotated_xywh), np.full(len(makes), ANNOTATED)
    made[makes], origins[makes] = _boxes_from_keypoints(
        keypoints_xy[makes], labeled[makes], size_wh[makes], margin, typical_wh
    )
    boxes = np.where(makes[:, None], made, annotated_xywh)
    origins[~makes & ~has_box] = NO_BOX
    areas = np.where(has_box, annotated_xywh[:, 2] * annotated_xywh[:, 3], made[:, 2] * made[:, 3])
    if which == "image":
        boxes = np.concatenate([np.zeros_like(size_wh), size_wh], axis=1)
        origins = np.full(len(makes), WHOLE_IMAGE)
    return PeopleBoxes(boxes_xywh=boxes, origins=origins, areas=areas)


def clip_boxes(boxes_xywh: Float[Array, "n 4"], size_wh: Float[Array, "n 2"]) -> Float[Array, "n 4"]:
    """Boxes that end at the border of their images: corners within 0 and W - 1, H - 1.

    As published (sapiens, pose/mmpose/datasets/datasets/base/base_coco_style_dataset.py). A box of which nothing would
    be left, and one whose image's size is not known (not a number), stays as it is.
    """
    first, last = boxes_xywh[:, :2], boxes_xywh[:, :2] + boxes_xywh[:, 2:]
    border = np.where(np.isfinite(size_wh), size_wh - 1, np.inf)
    first, last = (np.minimum(np.maximum(corner, 0), border) for corner in (first, last))
    clips = np.asarray((last > first).all(axis=1) & np.isfinite(size_wh).all(axis=1))
    return np.where(clips[:, None], np.concatenate([first, last - first], axis=1), boxes_xywh)


def are_outside(boxes_xywh: Float[Array, "n 4"], size_wh: Float[Array, "n 2"]) -> Bool[Array, "n"]:
    """Of whose box nothing is in their image, as far as its size is known (else not a number)."""
    first, last = boxes_xywh[:, :2], boxes_xywh[:, :2] + boxes_xywh[:, 2:]
    return np.asarray(((last <= 0) | (first >= size_wh)).any(axis=1))


def measure_keypoints(
    keypoints_xy: Float[Array, "n k 2"], labeled: Bool[Array, "n k"]
) -> tuple[Float[Array, "n 2"], Float[Array, "n 2"]]:
    """The least x and y of each person's labeled keypoints, of whom there is one at least, and their extent."""
    low = np.where(labeled[..., None], keypoints_xy, np.inf).min(axis=1)
    return low, np.where(labeled[..., None], keypoints_xy, -np.inf).max(axis=1) - low


def _boxes_from_keypoints(
    keypoints_xy: Float[Array, "n k 2"],
    labeled: Bool[Array, "n k"],
    size_wh: Float[Array, "n 2"],
    margin: float,
    typical_wh: Callable[[], Float[Array, "2"]],
) -> tuple[Float[Array, "n 4"], Int[Array, "n"]]:
    """The boxes of people with labeled keypoints, and where they are from."""
    low, extent = measure_keypoints(keypoints_xy, labeled)
    sides = extent * (1 + 2 * margin)
    flat = extent < LEAST_EXTENT
    origins = np.full(len(sides), FROM_KEYPOINTS)
    if flat.any():
        sides = np.where(flat, np.maximum(typical_wh(), extent), sides)
        sides = np.where(np.isnan(sides), sides[:, ::-1], sides)
        origins[flat.any(axis=1)] = GUESSED_SIDE
    boxes = np.concatenate([low + extent / 2 - sides / 2, sides], axis=1)
    nowhere = np.isnan(sides).any(axis=1)
    first, last = np.minimum(low, 0), np.maximum(low + extent, size_wh)
    boxes[nowhere] = np.concatenate([first, last - first], axis=1)[nowhere]
    origins[nowhere] = WHOLE_IMAGE
    return boxes, origins


# ---- How large people are in their images

QUANTILES = (0.05, 0.5, 0.95)
FITTING_SIZE = 1.5  # training crops are scaled by up to 1 + augment.scale, 1.5
FITTING_ASPECT = 2.0


@dataclass(frozen=True, kw_only=True)
class PeopleSizes:
    """QUANTILES of people's boxes.

    Attributes:
        share: box area / image area; 1 is the whole image.
        aspect: width / height.
    """

    share: tuple[float, float, float]
    aspect: tuple[float, float, float]

    def __post_init__(self) -> None:
        for numbers in (self.share, self.aspect):
            if len(numbers) != len(QUANTILES) or not all(0 < number < np.inf for number in numbers):
                raise ValueError(f"people: expected {len(QUANTILES)} numbers above 0, found {numbers}")

    def describe_misfit(self, trained: "PeopleSizes") -> str:
        """Why boxes of these sizes do not suit weights that were trained with people of those; empty: they do."""
        low, size, high = (share**0.5 for share in (trained.share[0], self.share[1], trained.share[2]))
        aspect = self.aspect[1]
        fits_size = low / FITTING_SIZE <= size <= high * FITTING_SIZE
        fits_aspect = trained.aspect[0] / FITTING_ASPECT <= aspect <= trained.aspect[2] * FITTING_ASPECT
        if fits_size and fits_aspect:
            return ""
        return (
            f"boxes take up {self.share[1]:.0%} of their image and have a width / height of {aspect:.2f} (median); "
            f"labeled people of training take up {trained.share[0]:.1%} to {trained.share[2]:.0%} (5 to 95 % of them), "
            f"with a width / height of {trained.aspect[1]:.2f}"
        )


def measure_sizes(boxes_xywh: Float[Array, "n 4"], size_wh: Float[Array, "n 2"]) -> PeopleSizes | None:
    """How large the boxes are in images of these sizes; None: not known.

    Left out are sizes that are not known (NaN), and sizes and boxes that are none, which the doctor collects.
    """
    numbers = np.concatenate([boxes_xywh, size_wh], axis=1)
    known = np.isfinite(numbers).all(axis=1) & (numbers[:, 2:] > 1e-3).all(axis=1)  # quotients stay finite
    if not known.any():
        return None
    boxes, sizes = boxes_xywh[known], size_wh[known]
    share = np.quantile(boxes[:, 2:].prod(axis=1) / sizes.prod(axis=1), QUANTILES).round(5).tolist()
    aspect = np.quantile(boxes[:, 2] / boxes[:, 3], QUANTILES).round(4).tolist()
    least = 1e-5
    return PeopleSizes(share=tuple(max(one, least) for one in share), aspect=tuple(max(one, least) for one in aspect))
