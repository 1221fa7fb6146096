"""A person's row and a generator to a crop (half body, scale, rotation, shift, mirror), and changes of pixels.

The geometry follows facebookresearch/sapiens, pose/mmpose/datasets/transforms/common_transforms.py; draws differ, since
every one comes from the generator that is passed in. Pixels are changed here, or by transforms of albumentations.
"""

import inspect
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import cv2
import numpy as np
from jaxtyping import Float, UInt8
from numpy import ndarray as Array
from numpy.random import Generator, default_rng

from sapiens_accel.config.schema import BUILT_IN, AugmentConfig
from sapiens_accel.errors import UserError
from sapiens_accel.pose.geometry import Crop, fit_aspect
from sapiens_accel.pose.infer_skeleton import nearest
from sapiens_accel.pose.skeleton import Skeleton
from sapiens_accel.pose.visibility import is_labeled

if TYPE_CHECKING:
    from albumentations import BasicTransform

# albumentations asks the network for its newest version on import. It is imported where transforms of it are asked for,
# which most runs do not: that takes 0.7 s of CPU.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

HALF_BODY_MIN_KEYPOINTS = 9
HALF_BODY_MIN_UPPER, HALF_BODY_MIN_LOWER = 2, 3
HALF_BODY_UPPER_P = 0.7
HALF_BODY_PADDING = 1.5
STRONG_HALF_BODY_SCALE = (0.5, 0.6)
# The published ranges of the changes of pixels: brightness in levels, hue in turns, blurs in px, holes in sides.
BRIGHTNESS, HUE = 32.0, 0.1
CONTRAST = SATURATION = (0.5, 1.5)
BLUR_SIDES = (3, 5, 7)
HOLE = (0.2, 0.4)
IDENTITY, NO_OFFSET = np.eye(3), np.zeros(3)
AXIS = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)  # of grays, as a cross product
AXIS_TWICE = AXIS @ AXIS
GRAY = np.full((3, 1), 1.0) * (0.299, 0.587, 0.114)  # ITU-R BT.601
BUILT_IN_OPTIONS = ("photometric_p", "blur_p", "coarse_dropout_p")
TRIES = 16  # draws of a transform, of which one must change a pixel
# Warnings of albumentations about a transform as such, whatever its arguments.
ADVICE = (r"\w+ is a specialized version of ", r"\w+ is an alias for ")

Pixels = UInt8[Array, "h w 3"]


class Change(NamedTuple):
    """A change of pixels and its probability; it may use the image's own memory."""

    p: float
    apply: Callable[[Pixels, Generator], Pixels]


@dataclass(frozen=True, kw_only=True)
class Augmenter:
    """The augmentation of one run: what to draw, for which skeleton and input."""

    config: AugmentConfig
    skeleton: Skeleton
    input_hw: tuple[int, int]

    def train_crop(self, base: Crop, keypoints: Float[Array, "k 3"], rng: Generator) -> Crop:
        """A training crop of a person whose upright crop is `base`.

        Args:
            base: from `geometry.crop_around_box`.
            keypoints: x, y (image px) and visibility.
            rng: everything random comes from here.
        """
        config = self.config
        flip = bool(rng.random() < config.flip_p)
        half = self._half_body(keypoints, rng) if rng.random() < config.half_body_p else None
        crop = half or base
        moves = _truncated_normal(rng, 1.0, 2)
        shift_x, shift_y = (move * config.shift for move in moves) if rng.random() < config.shift_p else (0.0, 0.0)
        if config.shift_of == "box" and crop.box_wh is not None:
            shift_x *= crop.box_wh[0] / crop.size_wh[0]
            shift_y *= crop.box_wh[1] / crop.size_wh[1]
        scale = 1 + config.scale * _truncated_normal(rng, 1.0, 1)[0]
        degrees = config.rotation * _truncated_normal(rng, 1.0, 1)[0] * (rng.random() < config.rotation_p)
        return _moved(crop, (shift_x, shift_y), scale, degrees, flip=flip)

    def weak_crop(self, base: Crop, rng: Generator) -> Crop:
        """The teacher's view: a little turned and scaled, mirrored or not."""
        config = self.config
        degrees = config.weak_rotation * _truncated_normal(rng, 2.0, 1)[0]
        scale = rng.uniform(1 - config.weak_scale, 1 + config.weak_scale)
        return _moved(base, (0.0, 0.0), scale, degrees, flip=bool(rng.random() < config.flip_p))

    def strong_crop(self, weak: Crop, rng: Generator) -> Crop:
        """The student's view: the teacher's or a half of it, turned, scaled, shifted and mirrored further."""
        config = self.config
        # Drawn whether or not it is used: no later draw depends on the probability.
        is_half, is_upper = rng.random() < config.strong_half_body_p, rng.random() < HALF_BODY_UPPER_P
        scale_of_half = rng.uniform(*STRONG_HALF_BODY_SCALE)
        has_halves = bool(self.skeleton.upper and self.skeleton.lower)
        weak = _half(weak, scale_of_half, upper=is_upper) if is_half and has_halves else weak
        shift = rng.uniform(-config.strong_shift, config.strong_shift, 2).tolist()
        scale = rng.uniform(1 - config.strong_scale, 1 + config.strong_scale)
        degrees = config.strong_rotation * _truncated_normal(rng, 2.0, 1)[0] * (rng.random() < 0.8)
        return _moved(weak, shift, scale, degrees, flip=weak.flip ^ bool(rng.random() < config.flip_p))

    def pixel_changes(self) -> tuple[Change, ...]:
        """Photometric changes, blurs and one black rectangle, or the transforms of `augment.albumentations`.

        `change_pixels` draws and runs them.

        Raises:
            UserError: as `open_transforms`.
        """
        if self.config.albumentations is None:
            return self._built_in_changes()
        changes: list[Change] = []
        for transform in open_transforms(self.config.albumentations):
            changes += self._built_in_changes() if transform is None else [Change(1.0, partial(_apply, transform))]
        return tuple(changes)

    def _built_in_changes(self) -> tuple[Change, ...]:
        p = self.config.photometric_p
        return (
            Change(1.0, partial(_colors, p=p)),
            Change(self.config.blur_p, _box_blur),
            Change(self.config.blur_p, _median_blur),
            Change(self.config.coarse_dropout_p, _hole),
        )

    def _half_body(self, keypoints: Float[Array, "k 3"], rng: Generator) -> Crop | None:
        labeled = is_labeled(keypoints)
        if labeled.sum() < HALF_BODY_MIN_KEYPOINTS or not (self.skeleton.upper and self.skeleton.lower):
            return None  # few, or of a skeleton that has no halves: a hand
        upper = [k for k in self.skeleton.upper if labeled[k]]
        lower = [k for k in self.skeleton.lower if labeled[k]]
        halves = [upper] * (len(upper) >= HALF_BODY_MIN_UPPER) + [lower] * (len(lower) >= HALF_BODY_MIN_LOWER)
        if not halves:
            return None
        chosen = halves[0] if len(halves) == 1 or rng.random() < HALF_BODY_UPPER_P else halves[1]
        points_xy = keypoints[chosen, :2]
        width, height = np.ptp(points_xy, axis=0) * HALF_BODY_PADDING
        if min(width, height) < 1.0:  # all in one line: no box
            return None
        center_x, center_y = points_xy.mean(axis=0)
        box_wh = (float(width), float(height))
        size_wh = fit_aspect(box_wh, self.input_hw)
        return Crop(center_xy=(float(center_x), float(center_y)), size_wh=size_wh, box_wh=box_wh)


def change_pixels(changes: Sequence[Change], image: Pixels, rng: Generator) -> Pixels:
    """Those of the changes that are drawn, all from `rng`; `image` may be changed itself, fresh memory costs time."""
    for change in changes:
        if rng.random() < change.p:
            image = change.apply(image, rng)
    return image


# ---- The user's own changes of pixels


def open_transforms(listed: Sequence[Mapping[str, Any] | str] | str) -> "list[BasicTransform | None]":
    """The transforms of `augment.albumentations`; None stands for the built-in changes.

    Args:
        listed: {NAME: {ARGUMENT: VALUE, ...}} each, as `config.parse` reads them.

    Raises:
        UserError: a transform that is not there, that moves pixels, or that needs more than an image; an argument that
            it does not have (albumentations itself would only warn) or a value that it does not take; an argument of
            the built-in changes, which are options.
    """
    assert not isinstance(listed, str), "config.parse has read the file"
    pairs = [(name, arguments or {}) for one in listed if isinstance(one, Mapping) for name, arguments in one.items()]
    for argument in [key for name, arguments in pairs if name == BUILT_IN for key in arguments]:
        known = [one for one in BUILT_IN_OPTIONS if one == argument] or BUILT_IN_OPTIONS
        raise UserError(
            f"--augment.albumentations: {BUILT_IN}: expected no arguments, found {str(argument)[:100]!r}. Use "
            + ", ".join(f"--augment.{one}" for one in known)
        )
    return [None if name == BUILT_IN else _open_transform(name, arguments) for name, arguments in pairs]


def describe_transforms(config: AugmentConfig) -> list[str]:
    """Which changes of pixels are not the built-in ones, in a line; none where all are."""
    if config.albumentations is None:
        return []
    import albumentations

    names = [name for one in config.albumentations if isinstance(one, dict) for name in one]
    instead = "" if BUILT_IN in names else f", in place of the built-in ones ({', '.join(BUILT_IN_OPTIONS)})"
    return [f"changes of pixels: {', '.join(names) or 'none'} (albumentations {albumentations.__version__}){instead}"]


def _open_transform(name: str, arguments: Mapping[str, Any]) -> "BasicTransform":
    import albumentations

    where = f"--augment.albumentations: {name}"
    kind = getattr(albumentations, name, None)
    if not (isinstance(kind, type) and issubclass(kind, albumentations.BasicTransform)):
        is_group = isinstance(kind, type) and issubclass(kind, albumentations.BaseCompose)
        hint = (
            " but a group of them. List them, each with its own p" if is_group else nearest(name, _pixel_transforms())
        )
        raise UserError(f"{where}: no transform of albumentations {albumentations.__version__}{hint}")
    if not issubclass(kind, albumentations.ImageOnlyTransform | albumentations.DualTransform):
        raise UserError(f"{where}: makes no image of an image (expected a transform of colors or noise). Leave it out")
    if not _moves_nothing(kind):
        raise UserError(
            f"{where}: moves pixels, and keypoints would not follow (expected a transform of colors or noise). "
            "Rotation, scale, shift and flip are --augment.rotation, .scale, .shift and .flip_p"
        )
    known = _arguments_of(kind)
    for argument in arguments:
        if argument not in known:
            takes = f"(expected {', '.join(known)})"
            raise UserError(f"{where}: no argument {argument!r} {takes}{nearest(argument, known)}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # it warns where it replaces a value by its default
            for advice in ADVICE:
                warnings.filterwarnings("ignore", advice)
            transform = kind(**arguments)
    except Exception as error:
        raise UserError(f"{where}: {_reason(error)}") from None
    _try_out(where, transform)
    return transform


def _arguments_of(kind: type) -> list[str]:
    return [key for key in inspect.signature(kind).parameters if key not in ("args", "kwargs")]


def _moves_nothing(kind: type) -> bool:
    """Whether no pixel moves: transforms of the image alone, and those that put something over it."""
    import albumentations
    from albumentations.augmentations.dropout.transforms import BaseDropout

    over = (BaseDropout, albumentations.PixelDropout, albumentations.XYMasking)
    return issubclass(kind, (albumentations.ImageOnlyTransform, *over))


def _pixel_transforms() -> list[str]:
    import albumentations

    every = vars(albumentations).items()
    return [name for name, kind in every if isinstance(kind, type) and _moves_nothing(kind)]


def _try_out(where: str, transform: "BasicTransform") -> None:
    """Refuse what does not make another image of an image alone: it needs more, makes another type or changes none."""
    # From dark to bright as photographs are: noise of the whole range has neither contrast to gain nor a main color.
    image = np.linspace(40, 180, 96).astype(np.uint8)[:, None, None] + default_rng(0).integers(
        0, 32, (96, 72, 3), dtype=np.uint8
    )
    changed = image
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for seed in range(TRIES):
                transform.set_random_seed(seed)
                changed = transform(image=image.copy(), force_apply=True)["image"]
                if not np.array_equal(changed, image):
                    break
    except Exception as error:
        raise UserError(f"{where}: fails on an image: {_reason(error)}") from None
    if changed.dtype != np.uint8 or changed.shape != image.shape:
        shape = "x".join(map(str, changed.shape))
        raise UserError(
            f"{where}: makes {changed.dtype} of {shape} of an image (expected uint8 of 96x72x3); leave it out"
        )
    if np.array_equal(changed, image):
        raise UserError(
            f"{where}: changes no pixel of an image, with these arguments and no masks or boxes (expected some). Set "
            f"others of its arguments ({', '.join(_arguments_of(type(transform)))}), or leave it out"
        )


def _reason(error: Exception) -> str:
    """An error of albumentations in one line; pydantic lists what is wrong with each argument."""
    list_faults: Any = getattr(error.__cause__, "errors", None)
    faults: Any = list_faults() if callable(list_faults) else []
    texts = [f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}, found {fault['input']!r}" for fault in faults]
    return " ".join(("; ".join(texts) or f"{type(error).__name__}: {error}").split())[:300]


def _apply(transform: "BasicTransform", image: Pixels, rng: Generator) -> Pixels:
    """The transform with randomness of its own that follows from `rng`; it draws itself whether it does anything."""
    transform.set_random_seed(int(rng.integers(2**32)))
    return np.ascontiguousarray(transform(image=image)["image"])


# ---- The built-in changes of pixels


def _colors(image: Pixels, rng: Generator, p: float) -> Pixels:
    """Brightness and contrast, saturation and hue, the order of channels: each drawn, all in one pass over the pixels.

    Hue turns colors about the axis of grays, which leaves grays alone, as Paeth and Haeberli do it.
    """
    scale, offset = IDENTITY, NO_OFFSET
    if rng.random() < p:
        scale, offset = scale * rng.uniform(*CONTRAST), offset + rng.uniform(-BRIGHTNESS, BRIGHTNESS)
    if rng.random() < p:
        changed = _turn(rng.uniform(-HUE, HUE)) @ _saturation(rng.uniform(*SATURATION))
        scale, offset = changed @ scale, changed @ offset
    if rng.random() < p:
        order = rng.permutation(3)
        scale, offset = scale[order], offset[order]
    if not offset.any() and (scale == IDENTITY).all():
        return image
    matrix = np.empty((3, 4))
    matrix[:, :3], matrix[:, 3] = scale, offset
    return cv2.transform(image, matrix)  # into the image itself would take a copy of it


def _saturation(factor: float) -> Float[Array, "3 3"]:
    """Takes a color away from its gray, or to it."""
    return factor * IDENTITY + (1 - factor) * GRAY


def _turn(turns: float) -> Float[Array, "3 3"]:
    """Rotates about the axis of grays (Rodrigues): red goes to green by a third of a turn."""
    angle = 2 * math.pi * turns
    return IDENTITY + math.sin(angle) * AXIS + (1 - math.cos(angle)) * AXIS_TWICE


def _box_blur(image: Pixels, rng: Generator) -> Pixels:
    side = BLUR_SIDES[rng.integers(len(BLUR_SIDES))]
    return cv2.blur(image, (side, side))


def _median_blur(image: Pixels, rng: Generator) -> Pixels:
    """7 px as 5 and then 3, which reach as far: OpenCV's own takes 20 times as long, and a tenth of all this work."""
    for side in ((3,), (5,), (5, 3))[rng.integers(len(BLUR_SIDES))]:
        image = cv2.medianBlur(image, side)
    return image


def _hole(image: Pixels, rng: Generator) -> Pixels:
    height, width = image.shape[:2]
    hole_h, hole_w = int(height * rng.uniform(*HOLE)), int(width * rng.uniform(*HOLE))
    top, left = rng.integers(0, height - hole_h + 1), rng.integers(0, width - hole_w + 1)
    image[top : top + hole_h, left : left + hole_w] = 0
    return image


def _half(crop: Crop, scale: float, *, upper: bool) -> Crop:
    """The crop scaled about the middle of its upper or lower edge, as one sees it in the input image."""
    (x, y), (w, h) = crop.center_xy, crop.size_wh
    # The input's vertical axis in the image; mirroring leaves it alone.
    angle = np.deg2rad(crop.degrees)
    along = (1 - scale) / 2 * h * (-1 if upper else 1)
    center_xy = (x + float(along * np.sin(angle)), y + float(along * np.cos(angle)))
    return replace(crop, center_xy=center_xy, size_wh=(w * scale, h * scale))


def _moved(crop: Crop, shift: Sequence[float], scale: float, degrees: float, *, flip: bool) -> Crop:
    """The crop shifted by a fraction of its size, scaled and turned further, then mirrored or not."""
    (x, y), (w, h) = crop.center_xy, crop.size_wh
    # What is seen mirrored turns the other way round.
    turn = -degrees if crop.flip else degrees
    return Crop(
        center_xy=(x + shift[0] * w, y + shift[1] * h),
        size_wh=(w * float(scale), h * float(scale)),
        degrees=crop.degrees + float(turn),
        flip=flip,
        box_wh=crop.box_wh,
    )


def _truncated_normal(rng: Generator, limit: float, num: int) -> list[float]:
    """Standard normal draws within +-limit, by drawing again: the number of draws never depends on scipy's version."""
    values = [rng.standard_normal() for _ in range(num)]  # one by one, so few are sooner drawn
    while outside := [index for index, value in enumerate(values) if abs(value) > limit]:
        for index in outside:
            values[index] = rng.standard_normal()
    return values
