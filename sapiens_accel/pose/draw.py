"""Draw people, heatmaps and grids of images: uint8 RGB [h, w, 3]."""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import Bool, Float, UInt8
from numpy import ndarray as Array

from sapiens_accel.pose.skeleton import Skeleton

LEFT, RIGHT, MIDDLE = (255, 128, 0), (0, 160, 255), (60, 220, 60)
SIDES = {"left": LEFT, "right": RIGHT}
NEAR, FAR = (60, 220, 60), (255, 40, 40)
# Colors of scores 0, 0.5 and 1, distinguishable for the color-blind.
UNSURE, HALF_SURE, SURE = (255, 50, 50), (255, 225, 90), (80, 170, 255)
DARK = (20, 20, 20)
# Of identities in a video: light enough for a dark number on them, and none is that of a side.
TRACK_COLORS = (
    (255, 225, 25), (70, 240, 240), (240, 50, 230), (170, 255, 60), (255, 120, 120), (190, 150, 255), (255, 190, 130),
    (0, 200, 160), (250, 250, 250), (170, 170, 60),
)  # fmt: skip
SHORT = 8  # px: bones shorter than this have no outline, and their keypoints are dots
SCALE_TO = 384  # px: small images are enlarged to about this height, so that keypoints do not overlap
MANY = 40  # keypoints: skeletons with more are drawn with smaller ones
HEADER_WIDTH = 900  # px of an image whose header is as it is drawn
DOT = 1  # px: smallest radius of a keypoint, if others are close
LARGEST_COORDINATE = 2.0**24  # that is passed to cv2
STRIP, TEXT_COLOR, BACKGROUND = 20, (235, 235, 235), (24, 24, 24)
FONT = cv2.FONT_HERSHEY_SIMPLEX
Color = tuple[int, int, int]


def draw_person(
    image: UInt8[Array, "h w 3"],
    points_xy: Float[Array, "k 2"],
    shown: Float[Array, "k"],
    skeleton: Skeleton,
    scores: Float[Array, "k"] | None = None,
) -> UInt8[Array, "H W 3"]:
    """Draw bones and keypoints on an enlarged copy: the person's left in orange, right in blue, the midline in green.

    Args:
        points_xy: px of `image`.
        shown: keypoints above 0 are drawn, those below 0.75 hollow.
        scores: if given, keypoints have the colors of their scores (`score_color`), and bones those of their side.
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
    predicted_xy: Float[Array, "k 2"],
    true_xy: Float[Array, "k 2"],
    shown: Bool[Array, "k"],
    near: Bool[Array, "k"],
) -> UInt8[Array, "H W 3"]:
    """Draw a line from each predicted point to the true one, which is a dot: green if they are near, else red.

    Args:
        predicted_xy, true_xy: px of `image`.
        shown: keypoints to draw.
    """
    return draw_displacements(image, predicted_xy, true_xy, shown, [NEAR if is_near else FAR for is_near in near])


def draw_displacements(
    image: UInt8[Array, "h w 3"],
    predicted_xy: Float[Array, "k 2"],
    true_xy: Float[Array, "k 2"],
    shown: Bool[Array, "k"],
    colors: Sequence[Color],
) -> UInt8[Array, "H W 3"]:
    """Draw as `draw_errors` does, with a given color for each keypoint."""
    canvas, points = _enlarged(image, np.concatenate([predicted_xy, true_xy]))
    thickness = _thickness(canvas, len(points) // 2)
    ends = points[len(predicted_xy) :]
    radii = _radii(ends, shown, 2 * thickness + (len(ends) > MANY))
    for k in np.flatnonzero(shown).tolist():
        # A dark outline for contrast on any background; not where keypoints are close, as it would cover them.
        for color, rim in ((DARK, 1), (colors[k], 0)) if radii[k] > DOT else ((colors[k], 0),):
            cv2.line(canvas, points[k], ends[k], color, thickness + 2 * rim, cv2.LINE_AA)
            cv2.circle(canvas, ends[k], radii[k] + rim, color, -1, cv2.LINE_AA)
    return canvas


def add_title(image: UInt8[Array, "h w 3"], text: str, height: int = SCALE_TO) -> UInt8[Array, "H W 3"]:
    """Scale an image to this height (px), and write a line of small text at its top."""
    size = (round(image.shape[1] * height / image.shape[0]), height)
    canvas = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    scale = height / 900
    cv2.rectangle(canvas, (0, 0), (size[0], round(36 * scale)), (0, 0, 0), -1)
    origin = (round(6 * scale), round(26 * scale))
    cv2.putText(canvas, text, origin, cv2.FONT_HERSHEY_SIMPLEX, scale, (255, 255, 255), 1, cv2.LINE_AA)
    return canvas


def overlay_heatmaps(
    image: UInt8[Array, "h w 3"], heatmaps: Float[Array, "k map_h map_w"], weights: Float[Array, "k"]
) -> UInt8[Array, "H W 3"]:
    """Overlay an enlarged copy with the maximum of the heatmaps of weight above 0, as color; 0 is transparent."""
    factor = max(1, round(SCALE_TO / image.shape[0]))
    size = (image.shape[1] * factor, image.shape[0] * factor)
    top = (heatmaps * (weights > 0)[:, None, None]).max(axis=0).clip(0, 1).astype(np.float32)
    top = cv2.resize(top, size)
    heat = cv2.cvtColor(cv2.applyColorMap((top * 255).astype(np.uint8), cv2.COLORMAP_JET), cv2.COLOR_BGR2RGB)
    opacity = 0.8 * np.sqrt(top)[..., None]  # so that low values are visible
    return (cv2.resize(image, size) * (1 - opacity) + heat * opacity).round().astype(np.uint8)


def draw_side_key(width: int, skeleton: Skeleton) -> UInt8[Array, "h w 3"]:
    """The color key of a labeled person, a strip of this width (px): of the sides that the skeleton has."""
    entries = [(name, color) for name, color in SIDES.items() if name in skeleton.sides]
    no_side = [("no side", MIDDLE)] if None in skeleton.sides else []
    return draw_key(width, [("labeled:", (0, 0, 0)), *entries, *no_side])


def draw_score_ramp(width: int) -> UInt8[Array, "h w 3"]:
    """The color scale of scores, a strip of this width (px)."""
    strip = np.full((STRIP, width, 3), BACKGROUND, np.uint8)
    left, right = width * 3 // 8, width - width // 16
    for x in range(left, right):
        strip[5:-5, x] = score_color((x - left) / (right - 1 - left))
    _text(strip, "predicted: score 0", 6, TEXT_COLOR)
    _text(strip, "1", right + 6, TEXT_COLOR)
    return strip


def draw_key(width: int, entries: Sequence[tuple[str, Color]]) -> UInt8[Array, "h w 3"]:
    """A color key, a strip of this width (px). An entry in black is a text without a color."""
    strip, x = np.full((STRIP, width, 3), BACKGROUND, np.uint8), 6
    for text, color in entries:
        if any(color):
            cv2.circle(strip, (x + 4, STRIP // 2), 4, color, -1, cv2.LINE_AA)
            x += 12
        x += _text(strip, text, x, TEXT_COLOR) + 9
    return strip


def add_header(image: UInt8[Array, "h w 3"], text: str) -> UInt8[Array, "H w 3"]:
    """Put text above an image, wrapped to its width; larger above an image that a screen shows smaller."""
    enlarged = max(1, round(image.shape[1] / HEADER_WIDTH))
    width = image.shape[1] // enlarged
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        lines = [*lines[:-1], longer] if _width(longer) <= width - 12 else [*lines, word]
    header = np.concatenate([draw_key(width, [(line, (0, 0, 0))]) for line in lines])
    if enlarged > 1:
        header = cv2.resize(header, (image.shape[1], enlarged * len(header)), interpolation=cv2.INTER_LINEAR)
    return np.concatenate([header, image])


def encode_jpeg(image: UInt8[Array, "h w 3"], max_bytes: int) -> bytes:
    """Encode as JPEG of limited size: the quality is reduced first, then the image size, until it fits."""
    bgr, quality = cv2.cvtColor(image, cv2.COLOR_RGB2BGR), 88
    while True:
        content = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()
        if len(content) <= max_bytes or min(bgr.shape[:2]) < 32:
            return content
        quality -= 14
        if quality < 50:
            bgr, quality = cv2.resize(bgr, None, fx=0.75, fy=0.75, interpolation=cv2.INTER_AREA), 76


def arrange_grid(images: Sequence[UInt8[Array, "h w 3"]], columns: int) -> UInt8[Array, "H W 3"]:
    """Arrange images of equal size row by row; the rest of the last row is black."""
    blank = np.zeros_like(images[0])
    padded = [*images, *[blank] * (-len(images) % columns)]
    rows = [np.concatenate(padded[i : i + columns], axis=1) for i in range(0, len(padded), columns)]
    return np.concatenate(rows, axis=0)


def save_image(image: UInt8[Array, "h w 3"], path: Path) -> Path:
    """Write a PNG or JPEG, according to the suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not cv2.imwrite(str(path), cv2.cvtColor(image, cv2.COLOR_RGB2BGR)):
        raise OSError(f"{path}: could not be written")
    return path


def _enlarged(
    image: UInt8[Array, "h w 3"], points_xy: Float[Array, "n 2"]
) -> tuple[UInt8[Array, "H W 3"], list[tuple[int, int]]]:
    """A copy that is enlarged to a height of about SCALE_TO, and the points in its pixels."""
    factor = max(1, round(SCALE_TO / image.shape[0]))
    canvas = np.ascontiguousarray(cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_LINEAR))
    # Enlarging preserves the corners of pixels, and points refer to their centers.
    return canvas, [
        (round(x), round(y)) for x, y in _drawable((np.asarray(points_xy, np.float64) + 0.5) * factor).tolist()
    ]


def _drawable(points: Float[Array, "n 2"]) -> Float[Array, "n 2"]:
    """Clip points to the range of cv2; NaN becomes a point far outside of any image.

    A cast of NaN gives the lowest integer, with which cv2 writes outside of the image's memory.
    """
    return np.nan_to_num(points, nan=-LARGEST_COORDINATE).clip(-LARGEST_COORDINATE, LARGEST_COORDINATE)


def _text(canvas: UInt8[Array, "h w 3"], text: str, x: int, color: Color) -> int:
    """Write text into a strip, and return its width (px). Characters that the font lacks become ?."""
    plain = text.encode("ascii", "replace").decode()
    cv2.putText(canvas, plain, (x, STRIP - 6), FONT, 0.38, color, 1, cv2.LINE_AA)
    return _width(plain)


def _width(text: str) -> int:
    return cv2.getTextSize(text, FONT, 0.38, 1)[0][0]


def _radii(points: Sequence[tuple[int, int]], shown: Bool[Array, "k"], largest: int) -> list[int]:
    """The radius (px) of each keypoint. Close ones of many keypoints are small, so that none covers another."""
    positions = np.array(points, dtype=np.float64)
    if len(positions) <= MANY:
        return [largest] * len(positions)
    distances = np.linalg.norm(positions[:, None] - positions[None], axis=-1)
    distances[:, ~shown], distances[np.diag_indices(len(positions))] = np.inf, np.inf
    return (distances.min(axis=1) / 2 - 1).clip(DOT, largest - 1).astype(int).tolist()


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
    tracks: Sequence[int] | None = None,
) -> UInt8[Array, "h w 3"]:
    """Draw all people on a copy, in the colors of `draw_person`; line width depends on the size of the person.

    Args:
        people_xy: px of `image`; the first person is drawn last, on top.
        shown: keypoints to draw.
        tracks: identities in a video. Bones then have the color of the person (`track_color`), and the number is
            above it; keypoints keep the colors of their sides.
    """
    canvas = image.copy()
    numbers = tracks if tracks is not None else [None] * len(people_xy)
    for points_xy, shown_points, number in reversed(list(zip(people_xy, shown, numbers, strict=True))):
        if shown_points.any():
            _draw_on(canvas, points_xy, shown_points, skeleton, None if number is None else track_color(number))
            if number is not None:
                _draw_number(canvas, points_xy[shown_points], number)
    return canvas


def track_color(number: int) -> Color:
    """The color of an identity: one of TRACK_COLORS."""
    return TRACK_COLORS[(number - 1) % len(TRACK_COLORS)]


def _draw_number(canvas: UInt8[Array, "h w 3"], points_xy: Float[Array, "n 2"], number: int) -> None:
    """Write the number above a person on a plate of its color, inside of the image."""
    scale = float(np.clip(max(canvas.shape[:2]) / 1100, 0.4, 2.0))
    (width, height), base = cv2.getTextSize(str(number), FONT, scale, 1 + round(scale))
    plate_w, plate_h = width + 6, height + base + 4
    points = _drawable(points_xy)
    left = round(float(points[:, 0].mean())) - plate_w // 2
    top = round(float(points[:, 1].min())) - plate_h - round(18 * scale)
    left, top = max(min(left, canvas.shape[1] - plate_w), 0), max(min(top, canvas.shape[0] - plate_h), 0)
    cv2.rectangle(canvas, (left, top), (left + plate_w - 1, top + plate_h - 1), track_color(number), -1)
    origin = (left + 3, top + height + 3)
    cv2.putText(canvas, str(number), origin, FONT, scale, DARK, 1 + round(scale), cv2.LINE_AA)


def _draw_on(
    canvas: UInt8[Array, "h w 3"],
    points_xy: Float[Array, "k 2"],
    shown: Bool[Array, "k"],
    skeleton: Skeleton,
    bone_color: Color | None = None,
) -> None:
    points_xy = _drawable(points_xy * 16) / 16
    extent = float(np.ptp(points_xy[shown], axis=0).max())
    thickest = int(np.clip(round(extent / 90), 1, max(1, max(canvas.shape[:2]) // 160)))
    fixed = (points_xy * 16).round().astype(int).tolist()  # cv2's fixed point with 4 fractional bits
    edges = [(a, b) for a, b in skeleton.edges if shown[a] and shown[b]]
    bones = [(a, b, float(np.hypot(*(points_xy[a] - points_xy[b])))) for a, b in edges]
    reach = {
        k: max((length for a, b, length in bones if k in (a, b)), default=0.0) for k in np.flatnonzero(shown).tolist()
    }
    for dark in (True, False):  # a dark outline first, for contrast on any background
        for a, b, length in bones:
            if not dark or length >= SHORT:
                color, rim = (DARK, 2) if dark else (bone_color or _color(skeleton, a, b), 0)
                cv2.line(canvas, fixed[a], fixed[b], color, _bone_width(length, thickest) + rim, cv2.LINE_AA, 4)
        for k, length in reach.items():
            # Keypoints of fingers and the face are dots: larger ones would cover a hand.
            radius = _bone_width(length, thickest) + 1 if length >= SHORT else 1
            if not dark or length >= SHORT:
                color = DARK if dark else _color(skeleton, k, k)
                cv2.circle(canvas, fixed[k], (radius + dark) * 16, color, -1, cv2.LINE_AA, 4)


def _bone_width(length: float, thickest: int) -> int:
    """Line width (px) of a bone of this length (px), so that fingers stay separate."""
    return int(np.clip(round(length / 12), 1, thickest))
