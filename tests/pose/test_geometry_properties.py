"""Points and pixels move together, whatever the crop, the rotation, the mirror, the size and the reduction."""

import struct
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sapiens_accel.config.schema import AugmentConfig
from sapiens_accel.data import dataset as data
from sapiens_accel.data.augment import Augmenter
from sapiens_accel.pose import geometry
from sapiens_accel.pose.geometry import (
    Crop,
    adjust_to_reduction,
    apply,
    apply_batch,
    crop_around_box,
    invert,
    strong_from_weak,
    warp,
)
from sapiens_accel.pose.skeleton import COCO17
from sapiens_accel.sources import images as photo

settings.register_profile("same_every_time", derandomize=True, deadline=None, max_examples=60, database=None)
settings.load_profile("same_every_time")

INPUTS = st.sampled_from([(64, 48), (96, 72), (128, 96), (120, 120)])
SHARES = st.floats(-1, 1)
REDUCTIONS = st.sampled_from(geometry.REDUCTIONS)
AUGMENTED = Augmenter(config=AugmentConfig(), skeleton=COCO17, input_hw=(64, 48))


@st.composite
def crops(draw: st.DrawFn, input_hw: tuple[int, int] = (64, 48), most: float = 3000.0) -> Crop:
    """Any crop of any person in an image of up to `most` px."""
    width = draw(st.floats(8, most))
    center_xy = (draw(st.floats(-0.2 * most, 1.2 * most)), draw(st.floats(-0.2 * most, 1.2 * most)))
    size_wh = (width, width * input_hw[0] / input_hw[1])
    return Crop(center_xy=center_xy, size_wh=size_wh, degrees=draw(st.floats(-360, 360)), flip=draw(st.booleans()))


@st.composite
def dots(draw: st.DrawFn, finest: float = 0.4) -> tuple[tuple[int, int], Crop, np.ndarray, float]:
    """An input size, a crop with `finest` or up to three times as many image px a pixel of it, and a dot in its middle.

    The dot is wide enough to be a dot in the image and in the input: its standard deviation is 2 px of both at least.
    """
    input_hw = draw(INPUTS)
    ratio = finest * draw(st.floats(1, 3))
    size_wh = (ratio * (input_hw[1] - 1), ratio * (input_hw[0] - 1))
    dot_xy = np.array([draw(st.floats(0, 1)), draw(st.floats(0, 1))])
    offset = np.array([draw(SHARES), draw(SHARES)]) * min(size_wh) * 0.08
    crop = Crop(
        center_xy=(float(offset[0]), float(offset[1])),
        size_wh=size_wh,
        degrees=draw(st.floats(-180, 180)),
        flip=draw(st.booleans()),
    )
    return input_hw, crop, dot_xy, 2.0 * max(1.0, ratio)


def image_of(dot_xy: np.ndarray, sigma: float, size_wh: tuple[int, int]) -> np.ndarray:
    """A black image with a round dot; its center of mass is the point."""
    x, y = np.arange(size_wh[0]) - dot_xy[0], np.arange(size_wh[1]) - dot_xy[1]
    rows, columns = np.exp(-(y**2) / (2 * sigma**2)), np.exp(-(x**2) / (2 * sigma**2))
    return np.repeat(np.rint(250 * rows[:, None] * columns).astype(np.uint8)[..., None], 3, axis=2)


def center_of_mass(image: np.ndarray) -> np.ndarray:
    mass = image.astype(float).mean(axis=2)
    mass[mass < 6] = 0  # what a JPEG leaves around a dot
    x, y = np.arange(mass.shape[1]), np.arange(mass.shape[0])
    return np.array([(mass.sum(axis=0) * x).sum(), (mass.sum(axis=1) * y).sum()]) / mass.sum()


def placed(
    crop: Crop, dot_xy: np.ndarray, sigma: float, odd: tuple[int, int]
) -> tuple[Crop, np.ndarray, tuple[int, int]]:
    """The crop moved to a dot in an image with room for both, of sides that are `odd` px longer than need be."""
    room = int(4 * sigma) + 8
    center = dot_xy + room
    crop = replace(crop, center_xy=(crop.center_xy[0] + center[0], crop.center_xy[1] + center[1]))
    return crop, center, (2 * room + odd[0], 2 * room + odd[1])


# ---- Matrices


@given(st.data(), INPUTS)
def test_the_inverse_undoes_a_crop(drawn: st.DataObject, input_hw: tuple[int, int]) -> None:
    crop = drawn.draw(crops(input_hw))
    points_xy = np.array([[0.0, 0.0], [3000.0, 0.0], [0.0, 3000.0], crop.center_xy, [-50.5, 17.25]])
    matrix = crop.matrix(input_hw)
    np.testing.assert_allclose(apply(invert(matrix), apply(matrix, points_xy)), points_xy, rtol=0, atol=1e-7)
    moved = apply(matrix, points_xy)
    np.testing.assert_allclose(
        apply(matrix, apply(invert(matrix), moved)), moved, rtol=0, atol=1e-7 + 1e-12 * abs(moved).max()
    )


@given(st.data(), INPUTS)
def test_a_crops_corners_and_middle_are_the_inputs(drawn: st.DataObject, input_hw: tuple[int, int]) -> None:
    crop = drawn.draw(crops(input_hw))
    last = np.array(input_hw[::-1]) - 1.0
    angle = np.deg2rad(crop.degrees)
    # Along the input's axes, as they lie in the image: its content turns one way, so its frame the other.
    across, down = np.array([np.cos(angle), -np.sin(angle)]), np.array([np.sin(angle), np.cos(angle)])
    for u, v in ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0), (0.5, 0.5)):
        point = np.array(crop.center_xy) + (u - 0.5) * crop.size_wh[0] * across + (v - 0.5) * crop.size_wh[1] * down
        seen = apply(crop.matrix(input_hw), point[None])[0]
        np.testing.assert_allclose(seen, [(1 - u if crop.flip else u) * last[0], v * last[1]], rtol=0, atol=1e-8)


@given(st.data(), INPUTS, st.integers(0, 2**32 - 1))
def test_mirroring_twice_changes_nothing(drawn: st.DataObject, input_hw: tuple[int, int], seed: int) -> None:
    crop = drawn.draw(crops(input_hw))
    keypoints = np.column_stack([np.random.default_rng(seed).uniform(0, 3000, (17, 2)), np.arange(17) % 3])
    seen = data.transform_keypoints(crop, keypoints, input_hw, COCO17)
    mirrored = data.transform_keypoints(replace(crop, flip=not crop.flip), keypoints, input_hw, COCO17)
    back = mirrored[list(COCO17.mirror)] * [-1, 1, 1] + [input_hw[1] - 1, 0, 0]
    np.testing.assert_allclose(back, seen, rtol=0, atol=1e-7)
    matrix, other = crop.matrix(input_hw), replace(crop, flip=not crop.flip).matrix(input_hw)
    mirror = np.array([[-1.0, 0.0, input_hw[1] - 1], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    np.testing.assert_allclose(mirror[:2] @ np.vstack([other, [0, 0, 1]]), matrix, rtol=1e-12, atol=1e-7)


@given(st.integers(0, 2**32 - 1), st.floats(10, 2000), st.floats(10, 2000), st.floats(0, 6000), st.floats(0, 6000))
def test_the_teachers_points_land_exactly_in_the_students_view(
    seed: int, width: float, height: float, x: float, y: float
) -> None:
    """strong @ inv(weak) for the views that a run draws: the label of an image point there is its own label."""
    base = crop_around_box(np.array([x, y, width, height]), 1.25, AUGMENTED.input_hw)
    rng = np.random.default_rng(seed)
    weak = AUGMENTED.weak_crop(base, rng)
    strong = AUGMENTED.strong_crop(weak, rng)
    matrices = [crop.matrix(AUGMENTED.input_hw) for crop in (strong, weak)]
    points_xy = np.array([x, y]) + rng.uniform(-0.2, 1.2, (17, 2)) * [width, height]
    in_weak = torch.from_numpy(apply(matrices[1], points_xy))[None]
    aligned = strong_from_weak(*(torch.from_numpy(matrix)[None] for matrix in matrices))
    np.testing.assert_allclose(apply_batch(aligned, in_weak)[0], apply(matrices[0], points_xy), rtol=0, atol=1e-6)
    back = strong_from_weak(*(torch.from_numpy(matrix)[None] for matrix in reversed(matrices)))
    np.testing.assert_allclose(apply_batch(back, apply_batch(aligned, in_weak)), in_weak, rtol=0, atol=1e-6)


@given(st.data(), INPUTS, REDUCTIONS)
def test_a_reduced_images_matrix_is_the_images_own(
    drawn: st.DataObject, input_hw: tuple[int, int], factor: int
) -> None:
    """Pixel (i, j) of the reduced image is the mean of `factor` x `factor` px, and lies where their mean place does."""
    crop = drawn.draw(crops(input_hw))
    pixels_xy = np.array([[0, 0], [7, 0], [0, 5], [113, 240]])
    amid = np.array(
        [[(x * factor + np.arange(factor)).mean(), (y * factor + np.arange(factor)).mean()] for x, y in pixels_xy]
    )
    moved = apply(adjust_to_reduction(crop.matrix(input_hw), factor), pixels_xy.astype(float))
    np.testing.assert_allclose(moved, apply(crop.matrix(input_hw), amid), rtol=1e-12, atol=1e-7)


@given(st.data(), INPUTS)
def test_no_input_pixel_is_finer_than_the_reduced_image(drawn: st.DataObject, input_hw: tuple[int, int]) -> None:
    crop = drawn.draw(crops(input_hw))
    factor = geometry.choose_reduction(crop, input_hw)
    step = np.linalg.norm(
        invert(adjust_to_reduction(crop.matrix(input_hw), factor))[:, :2], axis=0
    )  # reduced px an input px
    assert factor == 1 or step.min() >= 1 - 1e-9
    assert factor == 8 or step.min() < 2


# ---- Pixels


@pytest.mark.parametrize("side", [150, 1500])
def test_a_fourth_channel_changes_no_pixel(side: int) -> None:
    """Small images are warped with one, large ones without; OpenCV has code of its own for each."""
    image = cv2.GaussianBlur(np.random.default_rng(1).integers(0, 256, (side, side, 3), dtype=np.uint8), (0, 0), 2)
    for degrees in (0.0, 33.0, -120.0):
        crop = Crop(center_xy=(side / 2, side / 2), size_wh=(90.0, 120.0), degrees=degrees)
        picture = warp(image, crop.matrix((128, 96)), (128, 96))
        expected = cv2.warpAffine(image, crop.matrix((128, 96)), (96, 128), flags=cv2.INTER_LINEAR)
        assert np.abs(picture.astype(int) - expected).max() <= 1


@given(dots(), st.integers(0, 9), st.integers(0, 9))
def test_a_dot_is_found_where_the_matrix_says(dot: tuple, more_w: int, more_h: int) -> None:
    input_hw, crop, dot_xy, sigma = dot
    crop, dot_xy, size_wh = placed(crop, dot_xy, sigma, (more_w, more_h))
    expected = apply(crop.matrix(input_hw), dot_xy[None])[0]
    assume(_is_whole(expected, crop, sigma, input_hw))
    found = center_of_mass(warp(image_of(dot_xy, sigma, size_wh), crop.matrix(input_hw), input_hw))
    assert np.abs(found - expected).max() < 0.1


@given(dots(), st.integers(0, 9), st.integers(0, 9))
def test_a_mirrored_image_is_the_image_mirrored(dot: tuple, more_w: int, more_h: int) -> None:
    input_hw, crop, dot_xy, sigma = dot
    crop, dot_xy, size_wh = placed(crop, dot_xy, sigma, (more_w, more_h))
    image = image_of(dot_xy, sigma, size_wh)
    picture, other = (warp(image, c.matrix(input_hw), input_hw) for c in (crop, replace(crop, flip=not crop.flip)))
    # Places are rounded to 1/32 px on some processors: a few levels at the dot's flank, where a pixel more is 60.
    assert np.abs(picture.astype(int) - other[:, ::-1]).max() <= 8


@settings(max_examples=80)
@given(st.data(), REDUCTIONS, st.integers(0, 15), st.integers(0, 15), st.integers(1, 8), st.booleans())
def test_a_dot_in_a_jpeg_is_found_at_every_reduction(
    drawn: st.DataObject, factor: int, more_w: int, more_h: int, orientation: int, exif: bool
) -> None:
    """Sides of any length, and EXIF that turns the image in any of its 8 ways, so that it begins at any corner."""
    input_hw, crop, dot_xy, sigma = drawn.draw(dots(finest=1.05 * factor))
    crop, dot_xy, size_wh = placed(crop, dot_xy, sigma, (more_w, more_h))
    expected = apply(crop.matrix(input_hw), dot_xy[None])[0]
    assume(_is_whole(expected, crop, sigma, input_hw))
    assert geometry.choose_reduction(crop, input_hw) >= factor
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "dot.jpg"
        image = image_of(dot_xy, sigma, size_wh)
        path.write_bytes(turned_jpeg(image, orientation) if exif else jpeg(image))
        picture = photo.read_reduced_image(path, factor)
        assert np.abs(photo.read_image(path).astype(int) - image).max() < 12
    divisible = all(side % factor == 0 for side in size_wh)
    assert picture.reduction == (factor if divisible or not exif else 1)
    assert picture.pixels.shape[:2] == tuple(-(-side // picture.reduction) for side in size_wh[::-1])
    seen = warp(picture.pixels, adjust_to_reduction(crop.matrix(input_hw), picture.reduction), input_hw)
    assert np.abs(center_of_mass(seen) - expected).max() < 0.1


def _is_whole(expected_xy: np.ndarray, crop: Crop, sigma: float, input_hw: tuple[int, int]) -> bool:
    """Whether the crop shows the dot with all that a center of mass counts."""
    reach = 3.2 * sigma * (input_hw[1] - 1) / crop.size_wh[0] + 1
    return bool((expected_xy > reach).all() and (expected_xy < np.array(input_hw[::-1]) - 1 - reach).all())


def jpeg(image: np.ndarray) -> bytes:
    return cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 98])[1].tobytes()


def turned_jpeg(image: np.ndarray, orientation: int) -> bytes:
    """A JPEG whose EXIF says how to turn what it holds so that it is the image (EXIF 2.3, tag 0x112)."""
    undone = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: np.rot90(a),
        7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
        8: lambda a: np.rot90(a, -1),
    }
    content = jpeg(np.ascontiguousarray(undone[orientation](image)))
    tags = struct.pack("<2sHIHHHIHHI", b"II", 42, 8, 1, 0x112, 3, 1, orientation, 0, 0)
    segment = b"Exif\0\0" + tags
    return content[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + content[2:]


@cache
def _noise() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (61, 83, 3), dtype=np.uint8)


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_only_a_jpegs_own_decoder_reduces(tmp_path: Path, factor: int) -> None:
    """By what is in the file: of others, OpenCV would make a smaller image after decoding them whole."""
    for name, kind in (("a.png", ".png"), ("b.jpg", ".png"), ("c.jpg", ".bmp"), ("d.jpg", ".webp")):
        (tmp_path / name).write_bytes(cv2.imencode(kind, _noise())[1].tobytes())
        assert photo.read_reduced_image(tmp_path / name, factor).reduction == 1
        assert photo.read_reduced_image(tmp_path / name, factor).pixels.shape == _noise().shape
    progressive = [cv2.IMWRITE_JPEG_PROGRESSIVE, 1]
    for name, options in (("e.png", []), ("f.jpg", progressive)):
        (tmp_path / name).write_bytes(cv2.imencode(".jpg", _noise(), options)[1].tobytes())
        reduced = photo.read_reduced_image(tmp_path / name, factor)
        assert reduced.reduction == factor and reduced.pixels.shape[:2] == (-(-61 // factor), -(-83 // factor))
