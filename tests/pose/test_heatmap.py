"""The codec against mmpose's UDPHeatmap, written here keypoint by keypoint in numpy."""

import cv2
import numpy as np
import pytest
import torch

from sapiens_accel.pose import heatmap
from sapiens_accel.pose.heatmap import Codec, flip
from sapiens_accel.pose.skeleton import COCO17

SIZES = [((128, 96), 3), ((256, 192), 6), ((64, 48), 2)]  # heatmap height and width, sigma
every_size = pytest.mark.parametrize(("heatmap_hw", "sigma"), SIZES)


def _codec(heatmap_hw: tuple[int, int], sigma: int) -> Codec:
    height, width = heatmap_hw
    return Codec(input_hw=(4 * height, 4 * width), heatmap_hw=heatmap_hw, sigma=float(sigma))


def _input_per_heatmap(codec: Codec) -> np.ndarray:
    """UDP: sizes are measured between the centers of the first and the last pixel."""
    (input_h, input_w), (height, width) = codec.input_hw, codec.heatmap_hw
    return np.array([(input_w - 1) / (width - 1), (input_h - 1) / (height - 1)])


def _input_px(codec: Codec, heatmap_xy: np.ndarray) -> torch.Tensor:
    return torch.tensor(heatmap_xy * _input_per_heatmap(codec), dtype=torch.float32)[None]


def _reference_encode(
    points_xy: np.ndarray, visible: np.ndarray, heatmap_hw: tuple[int, int], sigma: int
) -> tuple[np.ndarray, np.ndarray]:
    """mmpose generate_udp_gaussian_heatmaps; points in heatmap px."""
    height, width = heatmap_hw
    radius = 3 * sigma
    heatmaps, weights = np.zeros((len(points_xy), height, width)), visible.copy()
    axis = np.arange(2 * radius + 1)
    for k, point in enumerate(points_xy):
        if visible[k] < 0.5:
            continue
        pixel = (point + 0.5).astype(np.int64)
        (left, top), (right, bottom) = pixel - radius, pixel + radius + 1
        if left >= width or top >= height or right < 0 or bottom < 0:
            weights[k] = 0
            continue
        x0, y0 = radius + point - pixel
        patch = np.exp(-((axis - x0) ** 2 + (axis[:, None] - y0) ** 2) / (2 * sigma**2))
        x1, x2, y1, y2 = max(0, left), min(width, right), max(0, top), min(height, bottom)
        heatmaps[k, y1:y2, x1:x2] = patch[y1 - top : y2 - top, x1 - left : x2 - left]
    return heatmaps, weights


def _reference_decode(heatmaps: np.ndarray) -> np.ndarray:
    """mmpose refine_keypoints_dark_udp with the published blur of 11; heatmap px."""
    return np.stack([_reference_decode_one(heatmap) for heatmap in heatmaps])


def _reference_decode_one(heatmap: np.ndarray) -> np.ndarray:
    y, x = np.unravel_index(heatmap.argmax(), heatmap.shape)
    blurred = cv2.GaussianBlur(np.pad(heatmap, 5), (11, 11), 0)[5:-5, 5:-5]
    p = np.pad(np.log(np.clip(blurred * (heatmap.max() / blurred.max()), 1e-3, 50)), 1, mode="edge")
    p = p[y : y + 3, x : x + 3]
    dx, dy = (p[1, 2] - p[1, 0]) / 2, (p[2, 1] - p[0, 1]) / 2
    dxx, dyy = p[1, 2] - 2 * p[1, 1] + p[1, 0], p[2, 1] - 2 * p[1, 1] + p[0, 1]
    dxy = (p[2, 2] - p[1, 2] - p[2, 1] + 2 * p[1, 1] - p[1, 0] - p[0, 1] + p[0, 0]) / 2
    hessian = np.array([[dxx, dxy], [dxy, dyy]]) + np.finfo(np.float32).eps * np.eye(2)
    return np.array([x, y]) - np.linalg.solve(hessian, [dx, dy])


def _points(rng: np.random.Generator, heatmap_hw: tuple[int, int], num: int, low: float, high: float) -> np.ndarray:
    """Heatmap px, each between `low` and `high` px inside one of the four borders, and anywhere along it."""
    last = np.array([heatmap_hw[1] - 1, heatmap_hw[0] - 1])
    points_xy = rng.uniform(low, last - low, (num, 2))
    distance, axis = rng.uniform(low, high, num), rng.integers(0, 2, num)
    points_xy[np.arange(num), axis] = np.where(rng.random(num) < 0.5, distance, last[axis] - distance)
    return points_xy


def _drawn(codec: Codec, heatmap_xy: np.ndarray, noise: float = 0.0, seed: int = 0) -> torch.Tensor:
    """Maps as a network gives them: not quite of height 1, with noise."""
    heatmaps, _ = codec.encode(_input_px(codec, heatmap_xy), torch.ones(1, len(heatmap_xy)))
    return 0.8 * heatmaps + noise * torch.randn(heatmaps.shape, generator=torch.Generator().manual_seed(seed))


def _errors(codec: Codec, heatmaps: torch.Tensor, heatmap_xy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distances from the truth in input px: ours and the reference's."""
    scale = _input_per_heatmap(codec)
    ours = codec.decode(heatmaps)[0][0].numpy()
    reference = _reference_decode(heatmaps[0].numpy()) * scale
    return tuple(np.linalg.norm(found - heatmap_xy * scale, axis=1) for found in (ours, reference))


# ---- Encode


@every_size
def test_encode_is_mmpose(heatmap_hw: tuple[int, int], sigma: int) -> None:
    """Inside, on the border, negative, so far outside that only a corner of the square or nothing is left."""
    codec, rng = _codec(heatmap_hw, sigma), np.random.default_rng(0)
    height, width = heatmap_hw
    anywhere = rng.uniform(-0.4, 1.4, (60, 2)) * [width, height]
    border = np.array([[0, 0], [width - 1, height - 1], [0, 20.3], [width - 1, 20.3], [20.3, 0], [20.3, height - 1]])
    # Around the distance at which a point is dropped: its square's radius, by half pixels, on each side.
    reach = 3 * sigma + np.arange(-2, 3.5, 0.5) + 0.2
    middle = np.full_like(reach, 20.3)
    just_outside = [(-reach, middle), (width - 1 + reach, middle), (middle, -reach), (middle, height - 1 + reach)]
    points_xy = np.concatenate([anywhere, border, *(np.stack(pair, axis=1) for pair in just_outside)])
    visible = rng.choice([0.0, 0.5, 1.0], len(points_xy))
    expected, expected_weights = _reference_encode(points_xy, visible, heatmap_hw, sigma)
    heatmaps, weights = codec.encode(_input_px(codec, points_xy), torch.tensor(visible, dtype=torch.float32)[None])
    assert heatmaps.dtype == torch.float32 and heatmaps.shape == (1, len(points_xy), *heatmap_hw)
    np.testing.assert_allclose(heatmaps[0].numpy(), expected, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(weights[0].numpy(), expected_weights)
    assert 0 < (expected_weights < visible).sum() < len(points_xy) / 2, "some points were far enough outside"


def test_weights_keep_their_value_and_draw_the_same_map_unless_they_are_0() -> None:
    codec = _codec((64, 48), 2)
    points_xy = torch.full((1, 3, 2), 80.0)
    heatmaps, weights = codec.encode(points_xy, torch.tensor([[1.0, 0.5, 0.0]]))
    assert weights.tolist() == [[1.0, 0.5, 0.0]]
    assert torch.equal(heatmaps[0, 0], heatmaps[0, 1])
    assert heatmaps[0, 0].max() > 0.9 and not heatmaps[0, 2].any()


# ---- Decode


@pytest.mark.parametrize("noise", [0.0, 0.01, 0.03])
@every_size
def test_decode_is_mmpose_away_from_the_border(heatmap_hw: tuple[int, int], sigma: int, noise: float) -> None:
    codec, rng = _codec(heatmap_hw, sigma), np.random.default_rng(1)
    points_xy = rng.uniform(8, np.array([heatmap_hw[1], heatmap_hw[0]]) - 9, (40, 2))
    heatmaps = _drawn(codec, points_xy, noise)
    found, scores = codec.decode(heatmaps)
    expected = _reference_decode(heatmaps[0].numpy()) * _input_per_heatmap(codec)
    assert np.abs(found[0].numpy() - expected).max() < 1e-3
    assert torch.equal(scores, heatmaps.amax(dim=(2, 3)))


@every_size
def test_decode_at_the_border_is_never_worse_than_mmpose_on_clean_maps(heatmap_hw: tuple[int, int], sigma: int) -> None:
    """mmpose's blur sees zeros beyond the map: 1.0 to 2.7 input px off in the mean. Ours: 0.0002 at most."""
    codec = _codec(heatmap_hw, sigma)
    points_xy = _points(np.random.default_rng(2), heatmap_hw, 60, 0, 6)
    ours, reference = _errors(codec, _drawn(codec, points_xy), points_xy)
    assert (ours <= reference + 1e-3).all()
    assert ours.max() < 1e-3
    assert reference.mean() > 0.5, "the reference does have that error"


@pytest.mark.parametrize("noise", [0.01, 0.03])
@every_size
def test_decode_at_the_border_is_better_in_the_mean_with_noise(
    heatmap_hw: tuple[int, int], sigma: int, noise: float
) -> None:
    codec = _codec(heatmap_hw, sigma)
    points_xy = _points(np.random.default_rng(3), heatmap_hw, 60, 0, 5)
    ours, reference = _errors(codec, _drawn(codec, points_xy, noise), points_xy)
    assert ours.mean() < 0.4 * reference.mean()


@every_size
def test_round_trip(heatmap_hw: tuple[int, int], sigma: int) -> None:
    """Measured: at most 0.0002 input px off, inside and at the border alike."""
    codec, rng = _codec(heatmap_hw, sigma), np.random.default_rng(4)
    last = np.array([heatmap_hw[1], heatmap_hw[0]]) - 1
    inside = rng.uniform(8, last - 8, (60, 2))
    for points_xy in (inside, _points(rng, heatmap_hw, 60, 0, 8)):
        heatmaps, weights = codec.encode(_input_px(codec, points_xy), torch.ones(1, 60))
        found, scores = codec.decode(heatmaps)
        assert (found - _input_px(codec, points_xy)).abs().max() < 1e-3
        assert weights.all() and (scores > 0.88).all() and (scores <= 1).all()


def test_bf16_maps_decode_within_a_fiftieth_of_a_heatmap_px() -> None:
    """8 bits of mantissa are noise of up to 0.2 %: measured 0.009 heatmap px at sigma 6, where the top is flattest."""
    for heatmap_hw, sigma in SIZES:
        codec = _codec(heatmap_hw, sigma)
        points_xy = np.random.default_rng(5).uniform(8, np.array(heatmap_hw[::-1]) - 9, (60, 2))
        found, _ = codec.decode(_drawn(codec, points_xy).bfloat16())
        assert found.dtype == torch.float32
        error = (found[0].numpy() - _input_px(codec, points_xy)[0].numpy()) / _input_per_heatmap(codec)
        assert np.abs(error).max() < 0.02


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_a_map_without_anything_above_0_gives_its_middle(value: float) -> None:
    codec = _codec((64, 48), 2)
    points_xy, scores = codec.decode(torch.full((1, 2, 64, 48), value))
    np.testing.assert_allclose(points_xy[0].numpy(), [[95.5, 127.5]] * 2, atol=1e-4)
    assert (scores == value).all()


@pytest.mark.parametrize("value", [1e-30, 1e-3, 1.0, 1e4])
def test_a_constant_map_gives_a_finite_point_on_the_map(value: float) -> None:
    codec = _codec((64, 48), 2)
    points_xy, scores = codec.decode(torch.full((1, 2, 64, 48), value))
    margin = 5 * _input_per_heatmap(codec).max()  # no step is longer than the blur reaches
    assert points_xy.isfinite().all()
    assert (points_xy > -margin - 1e-3).all() and (points_xy < 256 + margin).all()
    assert torch.equal(scores, torch.full((1, 2), value))


def test_single_pixels_and_noise_decode_near_their_maximum() -> None:
    """Nothing that a network can give sends a point further than the blur reaches."""
    codec = _codec((64, 48), 2)
    heatmaps = torch.randn(1, 40, 64, 48, generator=torch.Generator().manual_seed(6))
    heatmaps[0, :20] = 0
    corners = [(0, 0), (0, 47), (63, 0), (63, 47), (30, 20)]
    for k in range(20):
        heatmaps[0, k][corners[k % 5]] = 10.0 ** (k - 10)
    points_xy, _ = codec.decode(heatmaps)
    index = heatmaps.flatten(2).argmax(-1)
    peak_xy = torch.stack([index % 48, index // 48], dim=-1)
    step = points_xy / torch.tensor(_input_per_heatmap(codec)).float() - peak_xy
    assert step.isfinite().all() and step.abs().max() <= 5 + 1e-3


@pytest.mark.parametrize("scale", [80.0, 3e-3, 1e-3])
@every_size
def test_decode_is_mmpose_where_its_clamp_acts(heatmap_hw: tuple[int, int], sigma: int, scale: float) -> None:
    """Below 1e-3 and above 50 it matters that the blurred map is scaled to the maximum of the whole map."""
    codec, rng = _codec(heatmap_hw, sigma), np.random.default_rng(9)
    heatmaps = scale * _drawn(codec, rng.uniform(8, np.array(heatmap_hw[::-1]) - 9, (40, 2)), noise=0.02)
    # A second, broader hill makes the blurred map's highest pixel another one than the map's.
    heatmaps[..., :16, :16] = 0.75 * scale
    expected = _reference_decode(heatmaps[0].numpy()) * _input_per_heatmap(codec)
    top = np.stack(np.unravel_index(heatmaps[0].flatten(1).argmax(-1).numpy(), heatmap_hw)[::-1], axis=-1)
    inside = ((top > 6) & (top < np.array(heatmap_hw[::-1]) - 7)).all(1)
    # Beyond the blur's reach ours cuts the step.
    short = np.abs(expected / _input_per_heatmap(codec) - top).max(1) < 5
    found, _ = codec.decode(heatmaps)
    assert (inside & short).sum() > 25
    assert np.abs(found[0].numpy() - expected)[inside & short].max() < 5e-3


def test_where_only_some_maps_need_it_decode_is_that_of_each_map_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU the border's fit and the whole blur are computed for the maps that need them; on a GPU for all."""
    codec, rng = _codec((64, 48), 2), np.random.default_rng(10)
    heatmaps = _drawn(codec, rng.uniform(0, [47, 63], (60, 2)), noise=0.01)
    heatmaps *= torch.tensor([1.0, 1e-3, 80.0, 0.0]).repeat(15)[None, :, None, None]
    heatmaps = heatmaps.view(3, 20, 64, 48)
    points_xy, scores = codec.decode(heatmaps)
    for person, k in ((0, 0), (0, 1), (1, 2), (1, 3), (2, 19)):
        alone_xy, alone = codec.decode(heatmaps[person : person + 1, k : k + 1])
        torch.testing.assert_close(alone_xy[0, 0], points_xy[person, k], rtol=0, atol=2e-3)
        assert alone == scores[person, k]
    monkeypatch.setattr(heatmap, "_select", lambda needed: slice(None))
    torch.testing.assert_close(codec.decode(heatmaps)[0], points_xy, rtol=0, atol=2e-3)


def test_of_equal_maxima_the_first_is_decoded_and_any_layout_in_memory_will_do() -> None:
    codec = _codec((64, 48), 2)
    heatmaps = torch.zeros(2, 3, 64, 48)
    for y, x in ((40, 12), (20, 31), (20, 17)):
        heatmaps[..., y, x] = 1.0
    points_xy, _ = codec.decode(heatmaps)
    expected = torch.tensor([17.0, 20.0]) * torch.tensor(_input_per_heatmap(codec)).float()
    torch.testing.assert_close(points_xy, expected.expand(2, 3, 2), rtol=0, atol=1e-3)
    turned = heatmaps.to(memory_format=torch.channels_last)
    assert not turned.is_contiguous() and torch.equal(codec.decode(turned)[0], points_xy)
    none_xy, none = codec.decode(heatmaps[:0])
    assert none_xy.shape == (0, 3, 2) and none.shape == (0, 3)


# ---- Flip


def test_flip_twice_changes_nothing() -> None:
    heatmaps = torch.randn(2, 17, 64, 48, generator=torch.Generator().manual_seed(7))
    assert torch.equal(flip(flip(heatmaps, COCO17.mirror), COCO17.mirror), heatmaps)
    assert not torch.equal(flip(heatmaps, COCO17.mirror), heatmaps)


@every_size
def test_flip_gives_the_maps_of_the_mirrored_points(heatmap_hw: tuple[int, int], sigma: int) -> None:
    """A mirrored image shows the point x at W - 1 - x, and the left wrist as a right one."""
    codec, rng = _codec(heatmap_hw, sigma), np.random.default_rng(8)
    points_xy = _input_px(codec, rng.uniform(0, np.array([heatmap_hw[1], heatmap_hw[0]]) - 1, (17, 2)))
    weights = torch.tensor(rng.choice([0.0, 0.5, 1.0], (1, 17)), dtype=torch.float32)
    mirror = [COCO17.names.index(_other_side(name)) for name in COCO17.names]
    mirrored_xy = points_xy[:, mirror] * torch.tensor([-1.0, 1.0]) + torch.tensor([codec.input_hw[1] - 1.0, 0.0])
    mirrored, _ = codec.encode(mirrored_xy, weights[:, mirror])
    heatmaps, _ = codec.encode(points_xy, weights)
    torch.testing.assert_close(flip(mirrored, COCO17.mirror), heatmaps, rtol=0, atol=1e-5)


def _other_side(name: str) -> str:
    return name.replace("left", "?").replace("right", "left").replace("?", "right")
