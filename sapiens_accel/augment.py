"""A person's row and a generator to a crop (half body, scale, rotation, shift, mirror), and changes of pixels.

The geometry follows facebookresearch/sapiens, pose/mmpose/datasets/transforms/common_transforms.py; draws differ, since
every one comes from the generator that is passed in. Pixels are changed by albumentations.
"""

import os
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, UInt8
from numpy import ndarray as Array
from numpy.random import Generator

from sapiens_accel.config import AugmentConfig
from sapiens_accel.geometry import Crop, with_aspect
from sapiens_accel.skeleton import Skeleton

# albumentations asks the network for its newest version on import.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
import albumentations as A

HALF_BODY_MIN_KEYPOINTS = 9
HALF_BODY_MIN_UPPER, HALF_BODY_MIN_LOWER = 2, 3
HALF_BODY_UPPER_P = 0.7
HALF_BODY_PADDING = 1.5
STRONG_HALF_BODY_SCALE = (0.5, 0.6)


@dataclass(frozen=True, kw_only=True)
class Augmenter:
    """The augmentation of one run: what to draw, for which skeleton and input."""

    config: AugmentConfig
    skeleton: Skeleton
    input_hw: tuple[int, int]

    def train_crop(self, base: Crop, keypoints: Float[Array, "k 3"], rng: Generator) -> Crop:
        """A training crop of a person whose upright crop is `base`.

        Args:
            base: from `geometry.box_crop`.
            keypoints: x, y (image px) and visibility.
            rng: everything random comes from here.
        """
        config = self.config
        flip = bool(rng.random() < config.flip_p)
        half = self._half_body(keypoints, rng) if rng.random() < config.half_body_p else None
        crop = half or base
        shift = _truncated_normal(rng, 1.0, 2) * config.shift * (rng.random() < config.shift_p)
        scale = 1 + config.scale * _truncated_normal(rng, 1.0, 1)[0]
        degrees = config.rotation * _truncated_normal(rng, 1.0, 1)[0] * (rng.random() < config.rotation_p)
        return replace(_moved(crop, shift, scale, degrees), flip=flip)

    def weak_crop(self, base: Crop, rng: Generator) -> Crop:
        """The teacher's view: a little turned and scaled, mirrored or not."""
        config = self.config
        degrees = config.weak_rotation * _truncated_normal(rng, 2.0, 1)[0]
        scale = rng.uniform(1 - config.weak_scale, 1 + config.weak_scale)
        return replace(_moved(base, np.zeros(2), scale, degrees), flip=bool(rng.random() < config.flip_p))

    def strong_crop(self, weak: Crop, rng: Generator) -> Crop:
        """The student's view: the teacher's or a half of it, turned, scaled, shifted and mirrored further."""
        config = self.config
        # Drawn whether or not it is used: no later draw depends on the probability.
        is_half, is_upper = rng.random() < config.strong_half_body_p, rng.random() < HALF_BODY_UPPER_P
        scale_of_half = rng.uniform(*STRONG_HALF_BODY_SCALE)
        weak = _half(weak, scale_of_half, upper=is_upper) if is_half else weak
        shift = rng.uniform(-config.strong_shift, config.strong_shift, 2)
        scale = rng.uniform(1 - config.strong_scale, 1 + config.strong_scale)
        degrees = config.strong_rotation * _truncated_normal(rng, 2.0, 1)[0] * (rng.random() < 0.8)
        return replace(_moved(weak, shift, scale, degrees), flip=weak.flip ^ bool(rng.random() < config.flip_p))

    def pixel_changes(self) -> A.Compose:
        """Photometric changes, blurs and one black rectangle; `change_pixels` seeds and runs it.

        The published ranges: brightness +-32, contrast and saturation x 0.5 to 1.5, hue +-18, kernels of 3 to 7 px, one
        hole of 20-40 % of the height and of the width.
        """
        p = self.config.photometric_p
        return A.Compose(
            [
                A.RandomBrightnessContrast(brightness_limit=32 / 255, contrast_limit=0.5, p=p),
                A.ColorJitter(brightness=(1, 1), contrast=(1, 1), saturation=(0.5, 1.5), hue=0.1, p=p),
                A.ChannelShuffle(p=p),
                A.Blur(blur_limit=(3, 7), p=self.config.blur_p),
                A.MedianBlur(blur_limit=(3, 7), p=self.config.blur_p),
                A.CoarseDropout(
                    num_holes_range=(1, 1),
                    hole_height_range=(0.2, 0.4),
                    hole_width_range=(0.2, 0.4),
                    fill=0,
                    p=self.config.coarse_dropout_p,
                ),
            ]
        )

    def _half_body(self, keypoints: Float[Array, "k 3"], rng: Generator) -> Crop | None:
        labelled = keypoints[:, 2] > 0
        if labelled.sum() < HALF_BODY_MIN_KEYPOINTS or not (self.skeleton.upper and self.skeleton.lower):
            return None  # few, or of a skeleton that has no halves: a hand
        upper = [k for k in self.skeleton.upper if labelled[k]]
        lower = [k for k in self.skeleton.lower if labelled[k]]
        halves = [upper] * (len(upper) >= HALF_BODY_MIN_UPPER) + [lower] * (len(lower) >= HALF_BODY_MIN_LOWER)
        if not halves:
            return None
        chosen = halves[0] if len(halves) == 1 or rng.random() < HALF_BODY_UPPER_P else halves[1]
        points_xy = keypoints[chosen, :2]
        width, height = np.ptp(points_xy, axis=0) * HALF_BODY_PADDING
        if min(width, height) < 1.0:  # all in one line: no box
            return None
        center_x, center_y = points_xy.mean(axis=0)
        size_wh = with_aspect((float(width), float(height)), self.input_hw)
        return Crop(center_xy=(float(center_x), float(center_y)), size_wh=size_wh)


def change_pixels(changes: A.Compose, image: UInt8[Array, "h w 3"], rng: Generator) -> UInt8[Array, "h w 3"]:
    """Run the changes with draws that depend on `rng` alone, whatever ran before in this process."""
    # Each with a seed of its own: Compose gives all of them the same one, and then they fire together or not at all.
    for change in changes.transforms:
        change.set_random_seed(int(rng.integers(2**31)))
    return changes(image=image)["image"]


def _half(crop: Crop, scale: float, *, upper: bool) -> Crop:
    """The crop scaled about the middle of its upper or lower edge, as one sees it in the input picture."""
    (x, y), (w, h) = crop.center_xy, crop.size_wh
    # The input's vertical axis in the image; mirroring leaves it alone.
    angle = np.deg2rad(crop.degrees)
    along = (1 - scale) / 2 * h * (-1 if upper else 1)
    center_xy = (x + float(along * np.sin(angle)), y + float(along * np.cos(angle)))
    return replace(crop, center_xy=center_xy, size_wh=(w * scale, h * scale))


def _moved(crop: Crop, shift: Float[Array, "2"], scale: float, degrees: float) -> Crop:
    """The crop shifted by a fraction of its size, scaled and turned further."""
    (x, y), (w, h) = crop.center_xy, crop.size_wh
    # What is seen mirrored turns the other way round.
    turn = -degrees if crop.flip else degrees
    return replace(
        crop,
        center_xy=(x + float(shift[0]) * w, y + float(shift[1]) * h),
        size_wh=(w * float(scale), h * float(scale)),
        degrees=crop.degrees + float(turn),
    )


def _truncated_normal(rng: Generator, limit: float, num: int) -> Float[Array, "num"]:
    """Standard normal draws within +-limit, by drawing again: the number of draws never depends on scipy's version."""
    values = rng.standard_normal(num)
    while (outside := np.abs(values) > limit).any():
        values[outside] = rng.standard_normal(int(outside.sum()))
    return values
