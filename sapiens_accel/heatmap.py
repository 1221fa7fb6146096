"""The UDP heatmap codec: keypoints to Gaussian maps and back, batched, on any device.

Notation: b people, k keypoints, h w the heatmap. Keypoints are input px; heatmap px = input px * (w - 1) / (W - 1).

The arithmetic is that of mmpose's `UDPHeatmap` (codecs/udp_heatmap.py), which Sapiens trains with:
UDP, https://arxiv.org/abs/1911.07524; DARK, https://arxiv.org/abs/1910.06278.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

BLUR_KERNEL = 11  # published for every heatmap size and sigma
BLUR_SIGMA = 2.0  # what OpenCV derives from a kernel of 11: 0.3 * ((11 - 1) / 2 - 1) + 0.8


@dataclass(frozen=True, kw_only=True)
class Codec:
    """What fixes the maps: input and heatmap size (height, width) and the Gaussian's sigma in heatmap px."""

    input_hw: tuple[int, int]
    heatmap_hw: tuple[int, int]
    sigma: float

    def encode(
        self, points_xy: Float[Tensor, "b k 2"], weights: Float[Tensor, "b k"]
    ) -> tuple[Float[Tensor, "b k h w"], Float[Tensor, "b k"]]:
        """Target maps, peak 1 at the sub-pixel point, cut to the published square of 3 sigma around its pixel.

        Args:
            points_xy: input px.
            weights: target weights; a keypoint of weight 0 gets an empty map.

        Returns:
            The float32 maps, and the weights with 0 for keypoints whose whole square lies outside the map.
        """
        height, width = self.heatmap_hw
        radius = int(3 * self.sigma)
        x, y = self._to_heatmap(points_xy).unbind(-1)
        # The cast of the reference truncates towards 0, also for points left of and above the map.
        pixel_x, pixel_y = (x + 0.5).trunc(), (y + 0.5).trunc()
        outside = (pixel_x - radius >= width) | (pixel_y - radius >= height)
        outside |= (pixel_x + radius + 1 < 0) | (pixel_y + radius + 1 < 0)
        weights = weights.masked_fill(outside, 0.0)
        drawn = (weights > 0).float()
        column = self._profile(x, pixel_x, width, radius)
        row = self._profile(y, pixel_y, height, radius) * drawn[..., None]
        return row[..., :, None] * column[..., None, :], weights

    def decode(self, heatmaps: Float[Tensor, "b k h w"]) -> tuple[Float[Tensor, "b k 2"], Float[Tensor, "b k"]]:
        """Keypoints with sub-pixel accuracy, and their scores.

        Returns:
            Points in input px, and the score of each: its map's raw maximum. A map without anything above 0 gives the
            middle of the map and the score of its maximum.
        """
        heatmaps = heatmaps.float()
        scores, index = heatmaps.flatten(2).max(dim=-1)
        width = heatmaps.shape[-1]
        peak_xy = torch.stack([index % width, index // width], dim=-1)
        points_xy = peak_xy + _dark_step(heatmaps, peak_xy, scores)
        seen = scores > 0
        middle_x, middle_y = ((size - 1) / 2 for size in reversed(self.heatmap_hw))
        x, y = points_xy.unbind(-1)
        points_xy = torch.stack([torch.where(seen, x, middle_x), torch.where(seen, y, middle_y)], dim=-1)
        return self._to_input(points_xy), scores

    # With plain numbers, not tensors of them: a copy to the device would wait for it in every step.

    def _to_heatmap(self, points_xy: Float[Tensor, "*batch 2"]) -> Float[Tensor, "*batch 2"]:
        scale_x, scale_y = self._heatmap_per_input()
        return torch.stack([points_xy[..., 0].float() * scale_x, points_xy[..., 1].float() * scale_y], dim=-1)

    def _to_input(self, points_xy: Float[Tensor, "*batch 2"]) -> Float[Tensor, "*batch 2"]:
        scale_x, scale_y = self._heatmap_per_input()
        return torch.stack([points_xy[..., 0] / scale_x, points_xy[..., 1] / scale_y], dim=-1)

    def _heatmap_per_input(self) -> tuple[float, float]:
        (heatmap_h, heatmap_w), (input_h, input_w) = self.heatmap_hw, self.input_hw
        return (heatmap_w - 1) / (input_w - 1), (heatmap_h - 1) / (input_h - 1)

    def _profile(
        self, center: Float[Tensor, "b k"], pixel: Float[Tensor, "b k"], size: int, radius: int
    ) -> Float[Tensor, "b k size"]:
        """The Gaussian along one axis; the map is the product of two, so no exponential is taken per map pixel."""
        axis = torch.arange(size, device=center.device, dtype=torch.float32)
        gaussian = torch.exp(-((axis - center[..., None]) ** 2) / (2 * self.sigma**2))
        return gaussian * ((axis - pixel[..., None]).abs() <= radius)


def flip(heatmaps: Float[Tensor, "b k h w"], mirror: Sequence[int]) -> Float[Tensor, "b k h w"]:
    """The maps of a mirrored picture as maps of the picture itself; under UDP nothing shifts."""
    return heatmaps[:, list(mirror)].flip(-1)


def _dark_step(
    heatmaps: Float[Tensor, "b k h w"], peak_xy: Int[Tensor, "b k 2"], peak: Float[Tensor, "b k"]
) -> Float[Tensor, "b k 2"]:
    """From each map's highest pixel to the top of the parabola through its logarithm, heatmap px.

    Inside: one Newton step on the blurred map, as published. That blur sees zeros beyond the map and pulls points near
    the border inwards (by 2.7 input px on average at sigma 6), so there the parabola is fitted to the map's own pixels.
    """
    reach = BLUR_KERNEL // 2
    height, width = heatmaps.shape[-2:]
    x, y = peak_xy.unbind(-1)
    near_border = (x <= reach) | (y <= reach) | (x >= width - 1 - reach) | (y >= height - 1 - reach)
    inside = -_newton(_blurred_patch(heatmaps, peak_xy, peak).clamp(1e-3, 50.0).log())
    step = torch.where(near_border[..., None], _fitted_step(heatmaps, peak_xy), inside)
    # Further than the blur reaches, a step has left the data that it was computed from.
    return step.nan_to_num(0.0).clamp(-reach, reach)


def _fitted_step(heatmaps: Float[Tensor, "b k h w"], peak_xy: Int[Tensor, "b k 2"]) -> Float[Tensor, "b k 2"]:
    """Least squares of log h = a + bx + cy + dx^2 + ey^2 over the pixels around the peak that lie on the map.

    The weights are h^2, since noise on h is noise / h on its logarithm, times the published blur's own window. Exact
    for a Gaussian wherever its top is; zeros beyond the map have no weight.
    """
    reach = BLUR_KERNEL // 2
    h = _patch(heatmaps, peak_xy, reach).flatten(2).clamp_min(0.0)
    h = h / h.amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    axis = torch.arange(-reach, reach + 1, device=h.device, dtype=torch.float32) / reach
    y, x = (grid.flatten() for grid in torch.meshgrid(axis, axis, indexing="ij"))
    terms = torch.stack([torch.ones_like(x), x, y, x**2, y**2], dim=-1)  # [n, 5]
    weights = h**2 * torch.exp(-(x**2 + y**2) * (reach / BLUR_SIGMA) ** 2 / 2)
    normal = torch.einsum("bkn,ni,nj->bkij", weights, terms, terms)
    right = torch.einsum("bkn,ni->bki", weights * h.clamp_min(1e-3).log(), terms)
    fit = torch.linalg.solve_ex(normal, right)[0]  # solve_ex: does not wait for the device to check for singularity
    linear, square = fit[..., 1:3], fit[..., 3:5]
    return torch.where(square < 0, -linear / (2 * square), 0.0) * reach


def _newton(p: Float[Tensor, "b k 3 3"]) -> Float[Tensor, "b k 2"]:
    """inv(Hessian) @ gradient in the middle of 3x3 patches (rows are y), by the reference's differences."""
    dx, dy = 0.5 * (p[..., 1, 2] - p[..., 1, 0]), 0.5 * (p[..., 2, 1] - p[..., 0, 1])
    eps = torch.finfo(torch.float32).eps
    dxx = p[..., 1, 2] - 2 * p[..., 1, 1] + p[..., 1, 0] + eps
    dyy = p[..., 2, 1] - 2 * p[..., 1, 1] + p[..., 0, 1] + eps
    corners = p[..., 2, 2] + p[..., 0, 0] + 2 * p[..., 1, 1]
    dxy = 0.5 * (corners - p[..., 1, 2] - p[..., 2, 1] - p[..., 1, 0] - p[..., 0, 1])
    determinant = dxx * dyy - dxy * dxy
    step = torch.stack([dyy * dx - dxy * dy, dxx * dy - dxy * dx], dim=-1) / determinant[..., None]
    return step


def _patch(heatmaps: Float[Tensor, "b k h w"], center_xy: Int[Tensor, "b k 2"], reach: int) -> Float[Tensor, "b k n n"]:
    """The square of 2 * reach + 1 pixels around each centre, zeros beyond the map."""
    offset = torch.arange(2 * reach + 1, device=heatmaps.device)
    padded = F.pad(heatmaps, [reach] * 4)
    rows = center_xy[..., 1, None, None] + offset[:, None]
    columns = center_xy[..., 0, None, None] + offset
    index = (rows * padded.shape[-1] + columns).flatten(2)
    return padded.flatten(2).gather(2, index).unflatten(2, (len(offset), len(offset)))


def _blurred_patch(
    heatmaps: Float[Tensor, "b k h w"], center_xy: Int[Tensor, "b k 2"], peak: Float[Tensor, "b k"]
) -> Float[Tensor, "b k 3 3"]:
    """3x3 pixels of the blurred map, scaled back to the map's own maximum (as the reference does)."""
    blurred = _blur(heatmaps)
    scale = peak / blurred.flatten(2).amax(-1).clamp_min(torch.finfo(torch.float32).tiny)
    return _patch(blurred, center_xy, 1) * scale[..., None, None]


def _blur(heatmaps: Float[Tensor, "b k h w"]) -> Float[Tensor, "b k h w"]:
    axis = torch.arange(BLUR_KERNEL, device=heatmaps.device, dtype=torch.float32) - BLUR_KERNEL // 2
    kernel = torch.exp(-(axis**2) / (2 * BLUR_SIGMA**2))
    kernel = kernel / kernel.sum()
    maps = heatmaps.flatten(0, 1)[:, None]
    maps = F.conv2d(maps, kernel.view(1, 1, 1, -1), padding=(0, BLUR_KERNEL // 2))
    return F.conv2d(maps, kernel.view(1, 1, -1, 1), padding=(BLUR_KERNEL // 2, 0)).view(heatmaps.shape)
