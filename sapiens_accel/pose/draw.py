"""People, heatmaps and grids as images: uint8 RGB [h, w, 3]."""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import Bool, Float, UInt8
from numpy import ndarray as Array

from sapiens_accel.pose.skeleton import Skeleton

LEFT, RIGHT, MIDDLE = (255, 128, 0), (0, 160, 255), (60, 220, 60)
NEAR, FAR = (60, 220, 60), (255, 40, 40)
# Scores of 0, 0.5 and 1; told apart without red and green.
UNSURE, HALF_SURE, SURE = (255, 50, 50), (255, 225, 90), (80, 170, 255)
DARK = (20, 20, 20)
SHORT = 8  # px: a bone shorter than this has no rim, and no keypoints larger than a dot
SCALE_TO = 384  # images are enlarged to about this height, so that keypoints can be told apart
MANY = 40  # keypoints: more are drawn smaller
DOT = 1  # px: radius of a keypoint that is close to others
FARTHEST = 2.0**24  # a coordinate that cv2 is given
STRIP, INK, PAPER = 20, (235, 235, 235), (24, 24, 24)
FONT = cv2.FONT_HERSHEY_SIMPLEX
Color = tuple[int, int, int]


def draw_person(
    image: UInt8[Array, "h w 3"],
    points_xy: Float[Array, "k 2"],
    shown: Float[Array, "k"],
    skeleton: Skeleton,
    scores: Float[Array, "k"] | None = None,
) -> UInt8[Array, "H W 3"]:
    """An enlarged copy with bones and keypoints: the person's left orange, right blue, the midline green.

    Args:
        points_xy: px of `image`.
        shown: keypoints above 0 are drawn, those below 0.75 hollow.
        scores: color the keypoints by these instead (see `ramp`), on bones in the color of their side.
    """
    canvas, points = _enlarged(image, points_xy)
    thickness = _thickness(canvas, len(points))
    radii = _radii(points, np.asarray(shown) > 0, 2 * thickness + 1)
    for a, b in skeleton.edges:
        if shown[a] > 0 and shown[b] > 0:
            cv2.line(canvas, points[a], points[b], _color(skeleton, a, b), thickness, cv2.LINE_AA)
    for k, point in enumerate(points):
        if shown[k] > 0:
            filled = -1 if shown[k] >= 0.75 or radii[k] == DOT else thickness
            if scores is not None and radii[k] > DOT:
                cv2.circle(canvas, point, radii[k] + 1, (0, 0, 0), filled, cv2.LINE_AA)
            color = _color(skeleton, k, k) if scores is None else score_color(float(scores[k]))
            cv2.circle(canvas, point, radii[k], color, filled, cv2.LINE_AA)
    return canvas


def score_color(score: float) -> Color:
    """The color of a score: red at 0, yellow at 0.5, blue at 1."""
    r, g, b = (round(float(np.interp(score, (0, 0.5, 1), of))) for of in zip(UNSURE, HALF_SURE, SURE, strict=True))
    return r, g, b


def draw_errors(
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
    return draw_displacements(image, found_xy, true_xy, shown, [NEAR if is_near else FAR for is_near in near])


def draw_displacements(
    image: UInt8[Array, "h w 3"],
    found_xy: Float[Array, "k 2"],
    true_xy: Float[Array, "k 2"],
    shown: Bool[Array, "k"],
    colors: Sequence[Color],
) -> UInt8[Array, "H W 3"]:
    """`errors`, each in a color of its own."""
    canvas, points = _enlarged(image, np.concatenate([found_xy, true_xy]))
    thickness = _thickness(canvas, len(points) // 2)
    ends = points[len(found_xy) :]
    radii = _radii(ends, shown, 2 * thickness + (len(ends) > MANY))
    for k in np.flatnonzero(shown).tolist():
        # A dark rim, so that they are seen on any ground; where keypoints are close, it would be all that is seen.
        for color, rim in ((DARK, 1), (colors[k], 0)) if radii[k] > DOT else ((colors[k], 0),):
            cv2.line(canvas, points[k], ends[k], color, thickness + 2 * rim, cv2.LINE_AA)
            cv2.circle(canvas, ends[k], radii[k] + rim, color, -1, cv2.LINE_AA)
    return canvas


def add_title(picture: UInt8[Array, "h w 3"], text: str, height: int = SCALE_TO) -> UInt8[Array, "H W 3"]:
    """The image at this height (px), under a line of small text."""
    size = (round(picture.shape[1] * height / picture.shape[0]), height)
    canvas = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
    scale = height / 900
    cv2.rectangle(canvas, (0, 0), (size[0], round(36 * scale)), (0, 0, 0), -1)
    place = (round(6 * scale), round(26 * scale))
    cv2.putText(canvas, text, place, cv2.FONT_HERSHEY_SIMPLEX, scale, (255, 255, 255), 1, cv2.LINE_AA)
    return canvas


def overlay_heatmaps(
    image: UInt8[Array, "h w 3"], heatmaps: Float[Array, "k map_h map_w"], weights: Float[Array, "k"]
) -> UInt8[Array, "H W 3"]:
    """An enlarged copy under the largest of the heatmaps that have a weight, as color; where it is 0, as it was."""
    factor = max(1, round(SCALE_TO / image.shape[0]))
    size = (image.shape[1] * factor, image.shape[0] * factor)
    top = (heatmaps * (weights > 0)[:, None, None]).max(axis=0).clip(0, 1).astype(np.float32)
    top = cv2.resize(top, size)
    heat = cv2.cvtColor(cv2.applyColorMap((top * 255).astype(np.uint8), cv2.COLORMAP_JET), cv2.COLOR_BGR2RGB)
    opacity = 0.8 * np.sqrt(top)[..., None]  # low ones are seen as well
    return (cv2.resize(image, size) * (1 - opacity) + heat * opacity).round().astype(np.uint8)


def draw_side_key(width: int) -> UInt8[Array, "h w 3"]:
    """A strip of this width (px) over a person as labeled."""
    return draw_key(width, [("labeled:", (0, 0, 0)), ("left", LEFT), ("right", RIGHT)])


def draw_score_ramp(width: int) -> UInt8[Array, "h w 3"]:
    """A strip of this width (px) that tells which color is which score."""
    strip = np.full((STRIP, width, 3), PAPER, np.uint8)
    left, right = width * 3 // 8, width - width // 16
    for x in range(left, right):
        strip[5:-5, x] = score_color((x - left) / (right - 1 - left))
    _text(strip, "predicted: score 0", 6, INK)
    _text(strip, "1", right + 6, INK)
    return strip


def draw_key(width: int, entries: Sequence[tuple[str, Color]]) -> UInt8[Array, "h w 3"]:
    """A strip of this width (px) that tells what colors mean; a black one is no color, but a word."""
    strip, x = np.full((STRIP, width, 3), PAPER, np.uint8), 6
    for text, color in entries:
        if any(color):
            cv2.circle(strip, (x + 4, STRIP // 2), 4, color, -1, cv2.LINE_AA)
            x += 12
        x += _text(strip, text, x, INK) + 9
    return strip


def add_header(picture: UInt8[Array, "h w 3"], text: str) -> UInt8[Array, "H w 3"]:
    """The image under as many strips of text as it takes."""
    lines, width = [""], picture.shape[1] - 12
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        lines = [*lines[:-1], longer] if _width(longer) <= width else [*lines, word]
    return np.concatenate([*(draw_key(picture.shape[1], [(line, (0, 0, 0))]) for line in lines), picture])


def encode_jpeg(picture: UInt8[Array, "h w 3"], most: int) -> bytes:
    """JPEG of at most this many bytes: of lower quality, then smaller, until it fits."""
    bgr, quality = cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), 88
    while True:
        content = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()
        if len(content) <= most or min(bgr.shape[:2]) < 32:
            return content
        quality -= 14
        if quality < 50:
            bgr, quality = cv2.resize(bgr, None, fx=0.75, fy=0.75, interpolation=cv2.INTER_AREA), 76


def arrange_grid(pictures: Sequence[UInt8[Array, "h w 3"]], columns: int) -> UInt8[Array, "H W 3"]:
    """Images of one size, row by row; what is left of the last row stays black."""
    blank = np.zeros_like(pictures[0])
    padded = [*pictures, *[blank] * (-len(pictures) % columns)]
    rows = [np.concatenate(padded[i : i + columns], axis=1) for i in range(0, len(padded), columns)]
    return np.concatenate(rows, axis=0)


def save_image(picture: UInt8[Array, "h w 3"], path: Path) -> Path:
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
    # Enlarging keeps the corners of pixels in place, points name their centers.
    return canvas, [
        (round(x), round(y)) for x, y in _drawable((np.asarray(points_xy, np.float64) + 0.5) * factor).tolist()
    ]


def _drawable(points: Float[Array, "n 2"]) -> Float[Array, "n 2"]:
    """The points within what cv2 can count, far outside of any image where they are not numbers.

    Of NaN a cast makes the least integer, by which cv2 writes beyond the image's memory.
    """
    return np.nan_to_num(points, nan=-FARTHEST).clip(-FARTHEST, FARTHEST)


def _text(canvas: UInt8[Array, "h w 3"], text: str, x: int, color: Color) -> int:
    """Write into a strip, and return how wide it came out (px). Letters that the font lacks become ?."""
    plain = text.encode("ascii", "replace").decode()
    cv2.putText(canvas, plain, (x, STRIP - 6), FONT, 0.38, color, 1, cv2.LINE_AA)
    return _width(plain)


def _width(text: str) -> int:
    return cv2.getTextSize(text, FONT, 0.38, 1)[0][0]


def _radii(points: Sequence[tuple[int, int]], shown: Bool[Array, "k"], most: int) -> list[int]:
    """Of each joint's circle (px): of many, those that are close are small, so that none hides another."""
    places = np.array(points, dtype=np.float64)
    if len(places) <= MANY:
        return [most] * len(places)
    apart = np.linalg.norm(places[:, None] - places[None], axis=-1)
    apart[:, ~shown], apart[np.diag_indices(len(places))] = np.inf, np.inf
    return (apart.min(axis=1) / 2 - 1).clip(DOT, most - 1).astype(int).tolist()


def _thickness(canvas: UInt8[Array, "h w 3"], num_keypoints: int) -> int:
    return max(1, round(canvas.shape[0] / (190 if num_keypoints <= MANY else 400)))


def _color(skeleton: Skeleton, a: int, b: int) -> Color:
    sides = {side for k in (a, b) if (side := skeleton.sides[k])}
    if len(sides) != 1:
        return MIDDLE
    return LEFT if "left" in sides else RIGHT


def draw_people(
    image: UInt8[Array, "h w 3"],
    people_xy: Float[Array, "n k 2"],
    shown: Bool[Array, "n k"],
    skeleton: Skeleton,
) -> UInt8[Array, "h w 3"]:
    """A copy with everybody's bones and keypoints in the colors of `person`, as thick as suits each one's size.

    Args:
        people_xy: px of `image`; who comes first is drawn last, on top.
        shown: keypoints to draw.
    """
    canvas = image.copy()
    for points_xy, seen in reversed(list(zip(people_xy, shown, strict=True))):
        if seen.any():
            _one_on(canvas, points_xy, seen, skeleton)
    return canvas


def _one_on(
    canvas: UInt8[Array, "h w 3"], points_xy: Float[Array, "k 2"], seen: Bool[Array, "k"], skeleton: Skeleton
) -> None:
    points_xy = _drawable(points_xy * 16) / 16
    extent = float(np.ptp(points_xy[seen], axis=0).max())
    thickest = int(np.clip(round(extent / 90), 1, max(1, max(canvas.shape[:2]) // 160)))
    fixed = (points_xy * 16).round().astype(int).tolist()  # 4 bits of a pixel, cv2's way
    bones = [(a, b, float(np.hypot(*(points_xy[a] - points_xy[b])))) for a, b in skeleton.edges if seen[a] and seen[b]]
    reach = {
        k: max((length for a, b, length in bones if k in (a, b)), default=0.0) for k in np.flatnonzero(seen).tolist()
    }
    for dark in (True, False):  # a dark rim first, so that they are seen on any ground
        for a, b, length in bones:
            if not dark or length >= SHORT:
                color, rim = (DARK, 2) if dark else (_color(skeleton, a, b), 0)
                cv2.line(canvas, fixed[a], fixed[b], color, _bone_width(length, thickest) + rim, cv2.LINE_AA, 4)
        for k, length in reach.items():
            # Fingers and points of the face are dots: full-sized keypoints would hide a hand.
            radius = _bone_width(length, thickest) + 1 if length >= SHORT else 1
            if not dark or length >= SHORT:
                color = DARK if dark else _color(skeleton, k, k)
                cv2.circle(canvas, fixed[k], (radius + dark) * 16, color, -1, cv2.LINE_AA, 4)


def _bone_width(length: float, thickest: int) -> int:
    """Of a bone of this length (px), so that a finger is no blob."""
    return int(np.clip(round(length / 12), 1, thickest))
