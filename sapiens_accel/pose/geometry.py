"""Crops of people as 2x3 matrices: construction, inverse, warping of images and heatmaps.

Frames: *image* px are those of the image file, *input* px those of the crop that the network gets; x to the right, y
down, and the center of the first pixel is (0, 0). The unbiased convention (UDP, Huang et al. 2020,
https://arxiv.org/abs/1911.07524) measures sizes between the centers of the first and the last pixel, W - 1. It is
implemented in this module alone.
"""

import math
from dataclasses import dataclass, field

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, UInt8
from numpy import ndarray as Array
from torch import Tensor

from sapiens_accel.pose.visibility import is_labeled

REDUCTIONS = (1, 2, 4, 8)  # of JPEG decoders
FOUR_CHANNEL_LIMIT = 2**21  # pixels; converting a larger image to four channels takes longer than it saves


@dataclass(frozen=True, kw_only=True)
class Crop:
    """A rotated rectangle of the image, possibly mirrored.

    Attributes:
        center_xy: its center, image px.
        size_wh: its width and height, image px; `fit_aspect` makes their ratio that of the input.
        degrees: rotation of its content in the input image, clockwise on the screen (y is down).
        flip: the input image is mirrored; the caller swaps left and right keypoints.
        box_wh: width and height of the padded box, image px, before it got the input's aspect.
    """

    center_xy: tuple[float, float]
    size_wh: tuple[float, float]
    degrees: float = 0.0
    flip: bool = False
    box_wh: tuple[float, float] | None = field(default=None, compare=False)

    def matrix(self, input_hw: tuple[int, int]) -> Float[Array, "2 3"]:
        """input_from_image: float64, the UDP warp of mmpose's `get_udp_warp_matrix`, then the mirror if `flip`."""
        input_h, input_w = input_hw
        (center_x, center_y), (width, height) = self.center_xy, self.size_wh
        scale_x, scale_y = (input_w - 1) / width, (input_h - 1) / height
        angle = math.radians(self.degrees)
        cos, sin = math.cos(angle), math.sin(angle)
        across, down = scale_x * cos, -scale_x * sin
        offset = scale_x * (-center_x * cos + center_y * sin + 0.5 * width)
        if self.flip:
            across, down, offset = -across, -down, input_w - 1 - offset
        below = scale_y * (-center_x * sin - center_y * cos + 0.5 * height)
        return np.array([[across, down, offset], [scale_y * sin, scale_y * cos, below]])


def crop_around_box(box_xywh: Float[Array, "4"], padding: float, input_hw: tuple[int, int]) -> Crop:
    """The upright crop around a box (image px): enlarged by `padding`, then the short side to the input's aspect."""
    x, y, w, h = (float(v) for v in box_xywh)
    padded = (w * padding, h * padding)
    return Crop(center_xy=(x + w / 2, y + h / 2), size_wh=fit_aspect(padded, input_hw), box_wh=padded)


def fit_aspect(size_wh: tuple[float, float], input_hw: tuple[int, int]) -> tuple[float, float]:
    """Grow the short side until width / height is the input's."""
    aspect = input_hw[1] / input_hw[0]
    width, height = size_wh
    return (width, width / aspect) if width > height * aspect else (height * aspect, height)


def warp(
    image: UInt8[Array, "image_h image_w 3"], matrix: Float[Array, "2 3"], input_hw: tuple[int, int]
) -> UInt8[Array, "h w 3"]:
    """Warp an image to the input image: bilinear, black outside of the image. Also works on one map, float [h, w]."""
    size_wh = (input_hw[1], input_hw[0])
    if image.ndim == 2:
        return cv2.warpAffine(image, matrix, size_wh, flags=cv2.INTER_LINEAR)
    left, top, right, bottom = visible_rectangle(matrix, input_hw, image.shape[:2])
    if left >= right or top >= bottom:
        return np.zeros((*input_hw, 3), np.uint8)
    visible, matrix = image[top:bottom, left:right], matrix.copy()
    matrix[:, 2] += matrix[:, :2] @ (left, top)
    if visible.shape[0] * visible.shape[1] > FOUR_CHANNEL_LIMIT:
        return cv2.warpAffine(visible, matrix, size_wh, flags=cv2.INTER_LINEAR)
    # The same bytes in half the time: aligned pixels of four bytes are faster to load.
    warped = cv2.warpAffine(cv2.cvtColor(visible, cv2.COLOR_RGB2RGBA), matrix, size_wh, flags=cv2.INTER_LINEAR)
    return cv2.cvtColor(warped, cv2.COLOR_RGBA2RGB)


def move_origin(matrix: Float[Array, "2 3"], corner_xy: tuple[int, int]) -> Float[Array, "2 3"]:
    """input_from_image of a part of the image, whose first pixel is that at `corner_xy` of the whole."""
    moved = matrix.copy()
    moved[:, 2] += matrix[:, :2] @ corner_xy
    return moved


def visible_rectangle(
    matrix: Float[Array, "2 3"], input_hw: tuple[int, int], image_hw: tuple[float, ...]
) -> tuple[int, int, int, int]:
    """The rectangle of image pixels that the input shows: left, top, and one past right and bottom.

    In Python numbers, which are faster than numpy for so few of them.
    """
    (height, width), (image_h, image_w) = input_hw, image_hw
    (a, b, x), (c, d, y) = matrix.tolist()
    scale = 1 / (a * d - b * c)
    first_x, first_y = (b * y - d * x) * scale, (c * x - a * y) * scale
    across_x, across_y, down_x, down_y = d * width * scale, -c * width * scale, -b * height * scale, a * height * scale
    left, top = first_x + min(across_x, 0) + min(down_x, 0), first_y + min(across_y, 0) + min(down_y, 0)
    right, bottom = first_x + max(across_x, 0) + max(down_x, 0), first_y + max(across_y, 0) + max(down_y, 0)
    return (
        max(0, math.floor(left) - 1), max(0, math.floor(top) - 1),
        min(image_w, math.ceil(right) + 2), min(image_h, math.ceil(bottom) + 2),
    )  # fmt: skip


def choose_reduction(crop: Crop, input_hw: tuple[int, int]) -> int:
    """The factor (1, 2, 4 or 8) by which the image may be reduced in decoding without enlarging it in the input."""
    image_from_input = min(crop.size_wh[0] / (input_hw[1] - 1), crop.size_wh[1] / (input_hw[0] - 1))
    return max(factor for factor in REDUCTIONS if factor <= max(1.0, image_from_input))


def adjust_to_reduction(matrix: Float[Array, "2 3"], reduction: int) -> Float[Array, "2 3"]:
    """input_from_reduced: the same view of an image each of whose pixels is the mean of reduction x reduction pixels.

    The center of the first pixel of the reduced image is at (reduction - 1) / 2 of the full image, in x and y.
    """
    if reduction == 1:
        return matrix
    first_xy = np.full(2, (reduction - 1) / 2)
    return np.column_stack([matrix[:, :2] * reduction, apply(matrix, first_xy)])


def apply(matrix: Float[Array, "2 3"], points_xy: Float[Array, "*batch 2"]) -> Float[Array, "*batch 2"]:
    """Transform points by a matrix."""
    return points_xy @ matrix[:, :2].T + matrix[:, 2]


def invert(matrix: Float[Array, "2 3"]) -> Float[Array, "2 3"]:
    """The inverse of a matrix: image_from_input of an input_from_image."""
    return np.linalg.inv(np.vstack([matrix, [0.0, 0.0, 1.0]]))[:2]


def apply_batch(matrices: Float[Tensor, "b 2 3"], points_xy: Float[Tensor, "b k 2"]) -> Float[Tensor, "b k 2"]:
    """`apply` for a batch of views, on the device."""
    return points_xy @ matrices[:, :, :2].mT + matrices[:, None, :, 2]


def strong_from_weak(strong: Float[Tensor, "b 2 3"], weak: Float[Tensor, "b 2 3"]) -> Float[Tensor, "b 2 3"]:
    """strong @ inv(weak): maps points of the teacher's view to the student's, both in input px.

    Computed in float64: matrices hold offsets of thousands of pixels, and torch inverts none in half precision.
    """
    last = torch.eye(3, dtype=torch.float64, device=weak.device)[2].expand(len(weak), 1, 3)
    square = [torch.cat([matrix.double(), last], dim=1) for matrix in (strong, weak)]
    return (square[0] @ torch.linalg.inv_ex(square[1])[0])[:, :2].to(strong.dtype)


def about_center(degrees: float, scale: float, input_hw: tuple[int, int]) -> Float[Tensor, "1 2 3"]:
    """The matrix that turns an input image about its middle, clockwise on the screen, and enlarges it: input px."""
    angle, center = math.radians(degrees), torch.tensor([(input_hw[1] - 1) / 2, (input_hw[0] - 1) / 2])
    cosine, sine = scale * math.cos(angle), scale * math.sin(angle)
    turn = torch.tensor([[cosine, -sine], [sine, cosine]])
    return torch.cat([turn, (center - turn @ center)[:, None]], dim=1)[None]


def warp_maps(
    maps: Float[Tensor, "b k h w"],
    matrices: Float[Tensor, "b 2 3"],
    input_hw: tuple[int, int],
    *,
    other_input_hw: tuple[int, int] | None = None,
    other_hw: tuple[int, int] | None = None,
) -> Float[Tensor, "b k other_h other_w"]:
    """Warp heatmaps of one view to another view: bilinear, zeros outside of the first one.

    Args:
        matrices: map points of the first view to the other, input px.
        input_hw: of the first view. Corners of map and input coincide (UDP), so relative positions are equal in both.
        other_input_hw, other_hw: sizes of the other view's input and heatmap. Default: those of the first view.
    """
    (height, width), (other_h, other_w) = other_hw or maps.shape[-2:], other_input_hw or input_hw
    x = torch.linspace(0, other_w - 1, width, device=maps.device)
    y = torch.linspace(0, other_h - 1, height, device=maps.device)
    grid_xy = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).flatten(0, 1)
    identity = torch.eye(2, 3, device=matrices.device).expand_as(matrices)
    source_xy = apply_batch(strong_from_weak(identity, matrices), grid_xy.expand(len(maps), -1, 2))
    source_xy = 2 * relative_positions(source_xy, (input_hw[0] - 1, input_hw[1] - 1)) - 1
    return F.grid_sample(maps, source_xy.unflatten(1, (height, width)), align_corners=True)


def relative_positions(points_xy: Float[Tensor, "*batch 2"], size_hw: tuple[int, int]) -> Float[Tensor, "*batch 2"]:
    """Points relative to width and height. With Python numbers: a tensor of them would cause a synchronization."""
    x, y = points_xy.unbind(-1)
    return torch.stack([x / size_hw[1], y / size_hw[0]], dim=-1)


def in_crop(
    boxes_xywh: Float[Array, "n 4"], keypoints: Float[Array, "n k 3"], padding: float, input_hw: tuple[int, int]
) -> Bool[Array, "n k"]:
    """Whether each labeled keypoint is inside the upright crop of its person (`crop_around_box`)."""
    aspect = input_hw[1] / input_hw[0]
    width, height = (boxes_xywh[:, 2:] * padding).T
    sizes = np.stack([np.maximum(width, height * aspect), np.maximum(height, width / aspect)], axis=-1)
    offset = np.abs(keypoints[..., :2] - (boxes_xywh[:, :2] + boxes_xywh[:, 2:] / 2)[:, None])
    return (offset <= sizes[:, None] / 2).all(axis=-1) & is_labeled(keypoints)
