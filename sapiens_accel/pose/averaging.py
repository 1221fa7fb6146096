"""Test-time averaging of heatmaps, for any loop: over a crop and its mirror image, over scales, over networks.

    maps = average_flip(network, images, skeleton.mirror)                      [b, k, h, w], in place of network(images)
    maps = average_views([View(maps, matrices, input_hw), ...], input_hw, heatmap_hw)      of scales and of networks
    points_xy, scores = Codec(input_hw=input_hw, heatmap_hw=heatmap_hw, sigma=2.0).decode(maps)

Shape letters: b people, k keypoints, H W the network's input, h w the heatmap.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from sapiens_accel.pose import geometry, heatmap


class View(NamedTuple):
    """Heatmaps of people in one crop of each.

    Attributes:
        maps: [b, k, h, w].
        matrices: input_from_image of each crop (`geometry.Crop.matrix`), float64, px.
        input_hw: height and width of the crops in px.
    """

    maps: Float[Tensor, "b k h w"]
    matrices: Float[Tensor, "b 2 3"]
    input_hw: tuple[int, int]


def scale_sizes(input_hw: tuple[int, int], scales: Sequence[float], patch: int) -> list[tuple[int, int]]:
    """The input sizes (height, width in px) at these factors of one: multiples of the patch, but for factor 1."""
    sizes = [tuple(max(1, round(side * scale / patch)) * patch for side in input_hw) for scale in scales]
    # The network's own size need not be of patches for whatever is no ViT.
    return [input_hw if scale == 1 else (size[0], size[1]) for scale, size in zip(scales, sizes, strict=True)]


def average_flip(
    network: Callable[[Shaped[Tensor, "b 3 H W"]], Float[Tensor, "b k h w"]],
    images: Shaped[Tensor, "b 3 H W"],
    mirror: Sequence[int],
) -> Float[Tensor, "b k h w"]:
    """The mean of a network's heatmaps of the images and of their mirror images, mirrored back (UDP: without a shift).

    Args:
        mirror: `mirror[k]` is the keypoint that k becomes in a mirrored image (`Skeleton.mirror`).
    """
    return (network(images) + heatmap.flip(network(images.flip(-1)), mirror)) / 2


def average_views(
    views: Iterable[View], input_hw: tuple[int, int], heatmap_hw: tuple[int, int]
) -> Float[Tensor, "b k h w"]:
    """The mean of heatmaps of the same people in several crops: of other sizes, places or networks.

    Each is warped into the frame of the mean, bilinear, zeros outside: the first view's part of the image at
    `input_hw`. An iterator of views has one view's heatmaps in memory at a time.

    Args:
        input_hw: height and width in px of the input to which the mean belongs, for `Codec`.
        heatmap_hw: its heatmap's.

    Raises:
        ValueError: there are no views.
    """
    total, frame, num = None, None, 0
    for maps, matrices, view_hw in views:
        frame = resize_matrices(matrices, view_hw, input_hw) if frame is None else frame
        if not torch.equal(matrices, frame) or tuple(maps.shape[-2:]) != heatmap_hw:
            frame_from_view = geometry.strong_from_weak(frame, matrices).float().to(maps.device)
            maps = geometry.warp_maps(maps, frame_from_view, view_hw, other_input_hw=input_hw, other_hw=heatmap_hw)
        total, num = maps if total is None else total + maps, num + 1
    if total is None:
        raise ValueError("no views to average")
    return total / num


def resize_matrices(
    matrices: Float[Tensor, "b 2 3"], from_hw: tuple[int, int], to_hw: tuple[int, int]
) -> Float[Tensor, "b 2 3"]:
    """input_from_image matrices of the same part of the image at another input size."""
    if from_hw == to_hw:
        return matrices
    factors = [(to_hw[1] - 1) / (from_hw[1] - 1), (to_hw[0] - 1) / (from_hw[0] - 1)]
    return matrices * torch.tensor(factors, dtype=torch.float64)[:, None]
