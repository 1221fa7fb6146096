"""People, heatmaps and grids as pictures: uint8 RGB [h, w, 3]."""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import Bool, Float, UInt8
from numpy import ndarray as Array

from sapiens_accel.skeleton import Skeleton

LEFT, RIGHT, MIDDLE = (255, 128, 0), (0, 160, 255), (60, 220, 60)
NEAR, FAR = (60, 220, 60), (255, 40, 40)
SCALE_TO = 384  # pictures are enlarged to about this height, so that joints can be told apart


def person(
    image: UInt8[Array, "h w 3"], points_xy: Float[Array, "k 2"], shown: Float[Array, "k"], skeleton: Skeleton
) -> UInt8[Array, "H W 3"]:
    """An enlarged copy with bones and joints: the person's left orange, right blue, the midline green.

    Args:
        points_xy: px of `image`.
        shown: keypoints above 0 are drawn, those below 0.75 hollow.
    """
    canvas, points = _enlarged(image, points_xy)
    thickness = max(1, canvas.shape[0] // 200)
    for a, b in skeleton.edges:
        if shown[a] > 0 and shown[b] > 0:
            cv2.line(canvas, points[a], points[b], _colour(skeleton, a, b), thickness, cv2.LINE_AA)
    for k, point in enumerate(points):
        if shown[k] > 0:
            filled = -1 if shown[k] >= 0.75 else thickness
            cv2.circle(canvas, point, 2 * thickness + 1, _colour(skeleton, k, k), filled, cv2.LINE_AA)
    return canvas


def errors(
    image: UInt8[Array, "h w 3"],
    found_xy: Float[Array, "k 2"],
    true_xy: Float[Array, "k 2"],
    shown: Bool[Array, "k"],
    near: Bool[Array, "k"],
) -> UInt8[Array, "H W 3"]:
    """An enlarged copy with a line from each point that was found to the true one, a dot: green if near, else red.

    Args:
        found_xy: px of `image`, as `true_xy` is.
        shown: keypoints to draw.
    """
    canvas, points = _enlarged(image, np.concatenate([found_xy, true_xy]))
    thickness = max(1, canvas.shape[0] // 200)
    for k in np.flatnonzero(shown):
        colour, found, true = NEAR if near[k] else FAR, points[k], points[len(found_xy) + k]
        cv2.line(canvas, found, true, colour, thickness, cv2.LINE_AA)
        cv2.circle(canvas, true, 2 * thickness, colour, -1, cv2.LINE_AA)
    return canvas


def titled(picture: UInt8[Array, "h w 3"], text: str, height: int = SCALE_TO) -> UInt8[Array, "H W 3"]:
    """The picture at this height (px), under a line of small text."""
    size = (round(picture.shape[1] * height / picture.shape[0]), height)
    canvas = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
    scale = height / 900
    cv2.rectangle(canvas, (0, 0), (size[0], round(36 * scale)), (0, 0, 0), -1)
    place = (round(6 * scale), round(26 * scale))
    cv2.putText(canvas, text, place, cv2.FONT_HERSHEY_SIMPLEX, scale, (255, 255, 255), 1, cv2.LINE_AA)
    return canvas


def overlay(
    image: UInt8[Array, "h w 3"], heatmaps: Float[Array, "k map_h map_w"], weights: Float[Array, "k"]
) -> UInt8[Array, "H W 3"]:
    """An enlarged copy under the largest of the heatmaps that have a weight, as colour."""
    factor = max(1, round(SCALE_TO / image.shape[0]))
    size = (image.shape[1] * factor, image.shape[0] * factor)
    top = (heatmaps * (weights > 0)[:, None, None]).max(axis=0).clip(0, 1).astype(np.float32)
    heat = cv2.applyColorMap((cv2.resize(top, size) * 255).astype(np.uint8), cv2.COLORMAP_JET)
    return cv2.addWeighted(cv2.resize(image, size), 0.5, cv2.cvtColor(heat, cv2.COLOR_BGR2RGB), 0.5, 0)


def grid(pictures: Sequence[UInt8[Array, "h w 3"]], columns: int) -> UInt8[Array, "H W 3"]:
    """Pictures of one size, row by row; what is left of the last row stays black."""
    blank = np.zeros_like(pictures[0])
    padded = [*pictures, *[blank] * (-len(pictures) % columns)]
    rows = [np.concatenate(padded[i : i + columns], axis=1) for i in range(0, len(padded), columns)]
    return np.concatenate(rows, axis=0)


def save(picture: UInt8[Array, "h w 3"], path: Path) -> Path:
    """Write a PNG or JPEG, by the name's ending."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not cv2.imwrite(str(path), cv2.cvtColor(picture, cv2.COLOR_RGB2BGR)):
        raise OSError(f"{path}: could not be written")
    return path


def _enlarged(
    image: UInt8[Array, "h w 3"], points_xy: Float[Array, "n 2"]
) -> tuple[UInt8[Array, "H W 3"], list[tuple[int, int]]]:
    """A copy of about SCALE_TO's height or more, and the points on it."""
    factor = max(1, round(SCALE_TO / image.shape[0]))
    canvas = np.ascontiguousarray(cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_LINEAR))
    # Enlarging keeps the corners of pixels in place, points name their centres.
    return canvas, [(round((float(x) + 0.5) * factor), round((float(y) + 0.5) * factor)) for x, y in points_xy]


def _colour(skeleton: Skeleton, a: int, b: int) -> tuple[int, int, int]:
    sides = {side for k in (a, b) if (side := skeleton.sides[k])}
    if len(sides) != 1:
        return MIDDLE
    return LEFT if "left" in sides else RIGHT
