"""A loop of a user's own, with the functions alone: heatmaps of mirror images, sizes and places, averaged."""

import numpy as np
import pytest
import torch
from torch import Tensor

from sapiens_accel.pose import geometry, heatmap
from sapiens_accel.pose.averaging import View, average_flip, average_views, scale_sizes
from sapiens_accel.pose.heatmap import Codec
from sapiens_accel.pose.skeleton import COCO17

INPUT_HW, HEATMAP_HW = (256, 192), (64, 48)


def _view(points_xy: np.ndarray, box_xywh: list[float], input_hw: tuple[int, int]) -> View:
    """The maps [1, 17, h, w] of keypoints (image px) in the crop of a box at an input size."""
    matrix = geometry.crop_around_box(np.array(box_xywh), 1.25, INPUT_HW).matrix(input_hw)
    codec = Codec(input_hw=input_hw, heatmap_hw=(input_hw[0] // 4, input_hw[1] // 4), sigma=2.0)
    points = torch.from_numpy(geometry.apply(matrix, points_xy))[None]
    return View(codec.encode(points, torch.ones(1, 17))[0], torch.from_numpy(matrix)[None], input_hw)


def test_views_of_other_sizes_and_places_meet_in_the_frame_of_the_first() -> None:
    points_xy = np.random.default_rng(0).uniform((130, 120), (190, 260), (17, 2))
    sizes = scale_sizes(INPUT_HW, (1.0, 0.5, 1.5), 16)
    assert sizes == [(256, 192), (128, 96), (384, 288)]
    views = [_view(points_xy, [110, 100, 100, 180], size) for size in sizes]
    views.append(_view(points_xy, [90, 80, 150, 230], (320, 256)))  # a crop of another network: of other size and shape
    mean = average_views(iter(views), INPUT_HW, HEATMAP_HW)
    assert mean.shape == (1, 17, *HEATMAP_HW)
    decoded_xy, _ = Codec(input_hw=INPUT_HW, heatmap_hw=HEATMAP_HW, sigma=2.0).decode(mean)
    found_xy = geometry.apply(geometry.invert(views[0].matrices[0].numpy()), decoded_xy[0].double().numpy())
    assert np.abs(found_xy - points_xy).max() < 0.15  # a heatmap px is 5 px of the image
    # Of a smaller view first, the frame is the same part of the image at the size that is asked for.
    other = average_views([views[1], views[0]], INPUT_HW, HEATMAP_HW)
    assert (other - average_views(views[:2], INPUT_HW, HEATMAP_HW)).abs().max() < 1e-5


def test_one_view_in_its_own_frame_is_unchanged() -> None:
    view = _view(np.full((17, 2), 150.0), [110, 100, 100, 180], INPUT_HW)
    assert torch.equal(average_views([view], INPUT_HW, HEATMAP_HW), view.maps)
    with pytest.raises(ValueError, match="no views"):
        average_views([], INPUT_HW, HEATMAP_HW)


def test_flip_is_the_mean_of_both() -> None:
    """A network that sees mirrored images gives mirrored maps; one that does not is averaged with what it gives."""
    images = torch.rand(2, 3, 16, 12, generator=torch.Generator().manual_seed(0))

    def network(given: Tensor) -> Tensor:
        return given.mean(1, keepdim=True) * torch.arange(1.0, 18.0)[:, None, None]

    mean = average_flip(network, images, COCO17.mirror)
    assert torch.equal(mean, (network(images) + heatmap.flip(network(images.flip(-1)), COCO17.mirror)) / 2)
    left, right = COCO17.names.index("left_eye"), COCO17.names.index("right_eye")
    assert torch.allclose(mean[:, left], mean[:, right])  # the mean of factors 2 and 3 in both
