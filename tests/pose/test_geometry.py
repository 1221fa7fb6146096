import cv2
import numpy as np
import pytest
import torch

from sapiens_accel.pose import geometry
from sapiens_accel.pose.geometry import Crop, apply, crop_around_box, invert, strong_from_weak, warp

INPUT_HW = (256, 192)


def _random_crop(rng: np.random.Generator, input_hw: tuple[int, int] = INPUT_HW, *, image: float = 2000.0) -> Crop:
    width = rng.uniform(40, 900)
    return Crop(
        center_xy=(rng.uniform(0, image), rng.uniform(0, image)),
        size_wh=(width, width * input_hw[0] / input_hw[1]),
        degrees=rng.uniform(-180, 180),
        flip=bool(rng.random() < 0.5),
    )


def _udp_points(crop: Crop, points_xy: np.ndarray, input_hw: tuple[int, int]) -> np.ndarray:
    """mmpose's get_udp_warp_matrix as equations for a point, then x -> W - 1 - x for a mirrored view."""
    (center_x, center_y), (w, h) = crop.center_xy, crop.size_wh
    angle = crop.degrees * np.pi / 180
    x, y = points_xy[:, 0] - center_x, points_xy[:, 1] - center_y
    moved_x = (input_hw[1] - 1) / w * (np.cos(angle) * x - np.sin(angle) * y + w / 2)
    moved_y = (input_hw[0] - 1) / h * (np.sin(angle) * x + np.cos(angle) * y + h / 2)
    return np.stack([input_hw[1] - 1 - moved_x if crop.flip else moved_x, moved_y], axis=1)


@pytest.mark.parametrize("input_hw", [(256, 192), (1024, 768), (64, 48)])
def test_matrix_is_the_published_udp_warp(input_hw: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    points_xy = rng.uniform(-500, 2500, (50, 2))
    for _ in range(50):
        crop = _random_crop(rng, input_hw)
        moved = apply(crop.matrix(input_hw), points_xy)
        np.testing.assert_allclose(moved, _udp_points(crop, points_xy, input_hw), rtol=0, atol=1e-7)


def test_corners_of_an_upright_crop_are_the_centers_of_the_corner_pixels() -> None:
    """Unbiased: the crop's width spans W - 1 steps between pixel centers, not W."""
    corners = np.array([[100.0, 50.0], [400.0, 50.0], [100.0, 450.0], [400.0, 450.0]])
    crop = Crop(center_xy=(250.0, 250.0), size_wh=(300.0, 400.0))
    expected = [[0, 0], [191, 0], [0, 255], [191, 255]]
    np.testing.assert_allclose(apply(crop.matrix(INPUT_HW), corners), expected, atol=1e-10)
    mirrored = Crop(center_xy=(250.0, 250.0), size_wh=(300.0, 400.0), flip=True)
    expected = [[191, 0], [0, 0], [191, 255], [0, 255]]
    np.testing.assert_allclose(apply(mirrored.matrix(INPUT_HW), corners), expected, atol=1e-10)


def test_positive_degrees_turn_clockwise_as_seen() -> None:
    """What is right of the center goes below it (y is down)."""
    crop = Crop(center_xy=(0.0, 0.0), size_wh=(191.0, 255.0), degrees=90.0)
    right_of_center = apply(crop.matrix(INPUT_HW), np.array([[10.0, 0.0]]))
    np.testing.assert_allclose(right_of_center, [[95.5, 127.5 + 10.0]], atol=1e-10)


def test_invert_undoes_any_crop() -> None:
    rng = np.random.default_rng(1)
    points_xy = rng.uniform(-200, 400, (100, 2))
    for _ in range(200):
        matrix = _random_crop(rng).matrix(INPUT_HW)
        np.testing.assert_allclose(apply(invert(matrix), apply(matrix, points_xy)), points_xy, rtol=0, atol=1e-9)


def _image_with_blob(x: float, y: float) -> np.ndarray:
    yy, xx = np.mgrid[:400, :500]
    blob = 250 * np.exp(-((xx - x) ** 2 + (yy - y) ** 2) / (2 * 5.0**2))
    return np.repeat(np.rint(blob).astype(np.uint8)[..., None], 3, axis=2)


def _centroid(picture: np.ndarray) -> np.ndarray:
    mass = picture.astype(float).mean(axis=2)
    yy, xx = np.mgrid[: mass.shape[0], : mass.shape[1]]
    return np.array([(mass * xx).sum(), (mass * yy).sum()]) / mass.sum()


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("degrees", [0.0, 33.0, -77.0])
def test_warp_moves_pixels_where_apply_moves_points(flip: bool, degrees: float) -> None:
    rng = np.random.default_rng(2)
    for _ in range(5):
        x, y = rng.uniform(180, 320), rng.uniform(130, 270)
        width = rng.uniform(180, 300)
        crop = Crop(
            center_xy=(x + rng.uniform(-30, 30), y + rng.uniform(-30, 30)),
            size_wh=(width, width * 4 / 3),
            degrees=degrees,
            flip=flip,
        )
        matrix = crop.matrix(INPUT_HW)
        picture = warp(_image_with_blob(x, y), matrix, INPUT_HW)
        assert picture.shape == (*INPUT_HW, 3)
        expected = apply(matrix, np.array([[x, y]]))[0]
        assert np.abs(_centroid(picture) - expected).max() < 0.1


def test_warp_is_black_outside_the_image_and_keeps_pixels_of_an_aligned_crop() -> None:
    image = np.random.default_rng(3).integers(1, 256, (64, 48, 3), dtype=np.uint8)
    whole = Crop(center_xy=(23.5, 31.5), size_wh=(47.0, 63.0)).matrix((64, 48))
    np.testing.assert_array_equal(warp(image, whole, (64, 48)), image)
    shifted = warp(image, Crop(center_xy=(23.5 - 10, 31.5), size_wh=(47.0, 63.0)).matrix((64, 48)), (64, 48))
    assert not shifted[:, :10].any()
    np.testing.assert_array_equal(shifted[:, 10:], image[:, :-10])
    mirrored = Crop(center_xy=(23.5, 31.5), size_wh=(47.0, 63.0), flip=True).matrix((64, 48))
    np.testing.assert_array_equal(warp(image, mirrored, (64, 48)), cv2.flip(image, 1))


def test_a_crop_out_of_a_large_image_is_as_if_all_of_it_were_warped() -> None:
    """Only what is seen is touched: as OpenCV on the whole, to a gray level where it rounds the place differently."""
    rng = np.random.default_rng(5)
    image = cv2.GaussianBlur(rng.integers(0, 256, (480, 640, 3), dtype=np.uint8), (0, 0), 1.5)
    outside = different = 0
    for _ in range(60):
        height = np.exp(rng.uniform(np.log(20), np.log(900)))
        crop = Crop(
            center_xy=(rng.uniform(-200, 840), rng.uniform(-200, 680)),
            size_wh=(height * 0.75, height),
            degrees=rng.uniform(-180, 180),
            flip=bool(rng.integers(2)),
        )
        matrix = crop.matrix(INPUT_HW)
        whole = cv2.warpAffine(image, matrix, INPUT_HW[::-1], flags=cv2.INTER_LINEAR)
        ours = warp(image, matrix, INPUT_HW)
        off = np.abs(ours.astype(int) - whole)
        assert off.max() <= 1
        different += (off > 0).mean() / 60
        outside += not whole.any()
    assert different < 1e-3 and 3 < outside < 40


def _changed(crop: Crop, rng: np.random.Generator) -> Crop:
    """Another view of the same person: up to twice as near or as far, turned and mirrored at will."""
    (x, y), (w, h) = crop.center_xy, crop.size_wh
    factor = 2 ** rng.uniform(-1, 1)
    return Crop(
        center_xy=(x + rng.uniform(-0.2, 0.2) * w, y + rng.uniform(-0.2, 0.2) * h),
        size_wh=(w * factor, h * factor),
        degrees=rng.uniform(-180, 180),
        flip=bool(rng.random() < 0.5),
    )


@pytest.mark.parametrize("input_hw", [(256, 192), (1024, 768)])
def test_strong_from_weak_is_the_float64_composition(input_hw: tuple[int, int]) -> None:
    """The matrices come in as float32, as in a batch; the reference never leaves float64."""
    rng = np.random.default_rng(4)
    weak = [_random_crop(rng, input_hw, image=6000.0) for _ in range(200)]
    strong = [_changed(crop, rng) for crop in weak]
    in_weak = rng.uniform(0, 1, (200, 17, 2)) * [input_hw[1] - 1, input_hw[0] - 1]
    expected = np.stack(
        [
            _udp_points(s, apply(invert(w.matrix(input_hw)), p), input_hw)
            for s, w, p in zip(strong, weak, in_weak, strict=True)
        ]
    )
    as_float32 = [torch.tensor(np.stack([c.matrix(input_hw) for c in crops])).float() for crops in (strong, weak)]
    matrices = strong_from_weak(*as_float32)
    assert matrices.dtype == torch.float32
    moved = geometry.apply_batch(matrices, torch.tensor(in_weak).float())
    assert (moved.double() - torch.tensor(expected)).abs().max() < 1e-2


def test_apply_batch_is_apply_of_each() -> None:
    rng = np.random.default_rng(5)
    matrices = np.stack([_random_crop(rng).matrix(INPUT_HW) for _ in range(4)])
    points_xy = rng.uniform(0, 1000, (4, 17, 2))
    expected = np.stack([apply(m, p) for m, p in zip(matrices, points_xy, strict=True)])
    moved = geometry.apply_batch(torch.tensor(matrices), torch.tensor(points_xy))
    np.testing.assert_allclose(moved.numpy(), expected, rtol=0, atol=1e-9)


def test_box_crop_by_hand() -> None:
    """A box higher than 4:3 grows in width, a wider one in height; padding comes first, the center stays."""
    high = crop_around_box(np.array([100.0, 50.0, 60.0, 200.0]), 1.25, (256, 192))
    assert high == Crop(center_xy=(130.0, 150.0), size_wh=(187.5, 250.0))
    wide = crop_around_box(np.array([0.0, 10.0, 300.0, 100.0]), 1.25, (256, 192))
    assert wide == Crop(center_xy=(150.0, 60.0), size_wh=(375.0, 500.0))
    fits = crop_around_box(np.array([10.0, 10.0, 30.0, 40.0]), 1.0, (256, 192))
    assert fits == Crop(center_xy=(25.0, 30.0), size_wh=(30.0, 40.0))
