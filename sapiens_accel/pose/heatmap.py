"""The UDP heatmap codec: keypoints to Gaussian maps and back, batched, on any device.

Notation: b people, k keypoints, h w the heatmap. Keypoints are input px; heatmap px = input px * (w - 1) / (W - 1).

The arithmetic is that of mmpose's `UDPHeatmap` (codecs/udp_heatmap.py), which Sapiens trains with:
UDP, https://arxiv.org/abs/1911.07524; DARK, https://arxiv.org/abs/1910.06278.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

BLUR_KERNEL = 11  # published for every heatmap size and sigma
BLUR_SIGMA = 2.0  # what OpenCV derives from a kernel of 11: 0.3 * ((11 - 1) / 2 - 1) + 0.8
REACH = BLUR_KERNEL // 2
LOWEST, HIGHEST = 1e-3, 50.0  # range to which the reference clamps blurred maps, before the logarithm


@dataclass(frozen=True, kw_only=True)
class Codec:
    """Encodes and decodes heatmaps of given input and heatmap size (height, width) and sigma (heatmap px)."""

    input_hw: tuple[int, int]
    heatmap_hw: tuple[int, int]
    sigma: float

    def encode(
        self, points_xy: Float[Tensor, "b k 2"], weights: Float[Tensor, "b k"]
    ) -> tuple[Float[Tensor, "b k h w"], Float[Tensor, "b k"]]:
        """Encode target maps: peak 1 at the sub-pixel point, cut to the published square of 3 sigma around its pixel.

        Args:
            points_xy: input px.
            weights: target weights; the map of a keypoint of weight 0, or of a negative weight, is empty.

        Returns:
            The float32 maps, and the weights: 0 for keypoints whose square is entirely outside of the map, and the
            absolute value of negative ones, whose empty maps are targets too.
        """
        height, width = self.heatmap_hw
        radius = int(3 * self.sigma)
        x, y = self._to_heatmap(points_xy).unbind(-1)
        # The cast of the reference truncates towards 0, even for points left of and above the map.
        pixel_x, pixel_y = (x + 0.5).trunc(), (y + 0.5).trunc()
        outside = (pixel_x - radius >= width) | (pixel_y - radius >= height)
        outside |= (pixel_x + radius + 1 < 0) | (pixel_y + radius + 1 < 0)
        drawn = (weights > 0) & ~outside
        weights = torch.where(drawn, weights, weights.clamp_max(0.0).abs())
        drawn = drawn.float()
        column = self._profile(x, pixel_x, width, radius)
        row = self._profile(y, pixel_y, height, radius).mul_(drawn[..., None])
        row, column = row[..., :, None], column[..., None, :]
        return torch.mul(row, column, out=_empty((*x.shape, height, width), x.device)), weights

    def decode(self, heatmaps: Float[Tensor, "b k h w"]) -> tuple[Float[Tensor, "b k 2"], Float[Tensor, "b k"]]:
        """Decode keypoints with sub-pixel accuracy, and their scores.

        Returns:
            Points in input px, and the score of each: the maximum of its map. A map without positive values gives the
            middle of the map.
        """
        maps = heatmaps.flatten(0, 1)
        peak_xy, scores = _peak(maps)
        x, y = (peak_xy + _dark_step(maps, peak_xy, scores)).unbind(-1)
        has_peak = scores > 0
        middle_x, middle_y = ((size - 1) / 2 for size in reversed(self.heatmap_hw))
        points_xy = torch.stack([torch.where(has_peak, x, middle_x), torch.where(has_peak, y, middle_y)], dim=-1)
        people = heatmaps.shape[:2]
        return self._to_input(points_xy.unflatten(0, people)), scores.unflatten(0, people)

    # With Python numbers: tensors of them would be copied to the device, with a synchronization, in every step.

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
        """The Gaussian along one axis. A map is the product of two of them, which saves an exponential per pixel."""
        axis = torch.arange(size, device=center.device, dtype=torch.float32)
        inside = (axis >= pixel[..., None] - radius) & (axis <= pixel[..., None] + radius)
        exponent = (axis - center[..., None]).square_().mul_(-0.5 / self.sigma**2)
        # Below, float32 underflows, which is 7 times as slow on a CPU; the square ends long before, near -5.
        return exponent.clamp_min_(-80.0).exp_().mul_(inside)


def flip(heatmaps: Float[Tensor, "b k h w"], mirror: Sequence[int]) -> Float[Tensor, "b k h w"]:
    """Mirror the maps of a mirrored image back; under UDP without a shift."""
    return heatmaps[:, list(mirror)].flip(-1)


def _empty(shape: tuple[int, ...], device: torch.device) -> Float[Tensor, "..."]:
    """An uninitialized float32 tensor.

    On a CPU it is allocated by numpy, which on Linux requests huge pages, as torch does not: every step allocates maps
    anew, and with small pages the allocation took 4 times as long as writing the maps.
    """
    if device.type != "cpu":
        return torch.empty(shape, device=device)
    return torch.from_numpy(np.empty(shape, np.float32))


def _peak(maps: Float[Tensor, "n h w"]) -> tuple[Int[Tensor, "n 2"], Float[Tensor, "n"]]:
    """The highest pixel of each map (the first of equals) and its value.

    The maxima of rows are computed first: a reduction without an index is 3 times as fast on a CPU.
    """
    peak, y = maps.amax(-1).max(-1)
    row = maps.gather(1, y[:, None, None].expand(-1, 1, maps.shape[-1])).squeeze(1)
    return torch.stack([row.max(-1).indices, y], dim=-1), peak.float()


def _dark_step(
    maps: Float[Tensor, "n h w"], peak_xy: Int[Tensor, "n 2"], peak: Float[Tensor, "n"]
) -> Float[Tensor, "n 2"]:
    """The step from each map's highest pixel to the maximum of the parabola through its logarithm, heatmap px.

    Inside: one Newton step on the blurred map, as published. The blur includes zeros outside of the map and pulls
    points near the border inwards (by 2.7 input px on average at sigma 6), so there the parabola is fitted to pixels
    that are not blurred.
    """
    height, width = maps.shape[-2:]
    x, y = peak_xy.unbind(-1)
    near_border = (x <= REACH) | (y <= REACH) | (x >= width - 1 - REACH) | (y >= height - 1 - REACH)
    window = _window(maps, peak_xy)
    # Blurring takes most of the time, and the step reads 9 blurred pixels, so only the window around these is blurred.
    blurred = _blur(window)[:, REACH:-REACH, REACH:-REACH]
    lowest = blurred.amin((-2, -1))
    clamped = ((lowest < LOWEST) | (peak > HIGHEST)) & (peak > 0) & ~near_border
    affected = _select(clamped)
    blurred[affected] *= _peak_scale(maps[affected], peak[affected])
    step = -_newton(blurred.clamp(LOWEST, HIGHEST).log())
    affected = _select(near_border)
    fitted = _fitted_step(window[affected, 1:-1, 1:-1])
    step[affected] = torch.where(near_border[affected, None], fitted, step[affected])
    # A longer step would leave the pixels that it was computed from.
    return step.nan_to_num(0.0).clamp(-REACH, REACH)


def _select(needed: Bool[Tensor, "n"]) -> Int[Tensor, "m"] | slice:
    """The maps to compute something for that only some of them need: on a CPU only these, on a GPU all of them.

    A GPU is fast enough, and a selection would need a synchronization.
    """
    return needed.nonzero()[:, 0] if needed.device.type == "cpu" else slice(None)


def _fitted_step(h: Float[Tensor, "n m m"]) -> Float[Tensor, "n 2"]:
    """Least squares of log h = a + bx + cy + dx^2 + ey^2 over the pixels around the peak that are on the map.

    Weights are h^2, since noise on h is noise / h on its logarithm, times the window of the published blur. Exact for a
    Gaussian with any maximum; zeros outside of the map have no weight.
    """
    h = h.flatten(1).clamp_min(0.0)
    h = h / h.amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    axis = torch.arange(-REACH, REACH + 1, device=h.device, dtype=torch.float32) / REACH
    y, x = (grid.flatten() for grid in torch.meshgrid(axis, axis, indexing="ij"))
    terms = torch.stack([torch.ones_like(x), x, y, x**2, y**2], dim=-1)  # [m * m, 5]
    products = (terms[:, :, None] * terms[:, None, :]).flatten(1)
    weights = h**2 * torch.exp(-(x**2 + y**2) * (REACH / BLUR_SIGMA) ** 2 / 2)
    normal = (weights @ products).unflatten(-1, (5, 5))
    right = (weights * h.clamp_min(1e-3).log()) @ terms
    fit = torch.linalg.solve_ex(normal, right)[0]  # solve_ex: without a check for singularity, which would synchronize
    linear, square = fit[..., 1:3], fit[..., 3:5]
    return torch.where(square < 0, -linear / (2 * square), 0.0) * REACH


def _newton(p: Float[Tensor, "n 3 3"]) -> Float[Tensor, "n 2"]:
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


def _window(maps: Float[Tensor, "n h w"], center_xy: Int[Tensor, "n 2"]) -> Float[Tensor, "n m m"]:
    """The float32 square around each center that the blurred 3x3 pixels depend on, zeros outside of the map."""
    height, width = maps.shape[-2:]
    offset = torch.arange(-REACH - 1, REACH + 2, device=maps.device)
    columns, rows = (center_xy[..., None] + offset).unbind(1)
    on_map_x, on_map_y = columns.clamp(0, width - 1), rows.clamp(0, height - 1)
    beyond = (rows != on_map_y)[:, :, None] | (columns != on_map_x)[:, None, :]
    index = (on_map_y * width)[:, :, None] + on_map_x[:, None, :]
    pixels = maps.flatten(1).gather(1, index.flatten(1)).view(index.shape)
    return pixels.float().masked_fill(beyond, 0.0)


def _peak_scale(maps: Float[Tensor, "n h w"], peak: Float[Tensor, "n"]) -> Float[Tensor, "n 1 1"]:
    """The factor that scales blurred maps back to their original maxima, as the reference does.

    It is a constant in the logarithm and cancels in its differences, unless a pixel is clamped. It is at least 1, and
    no scaled pixel exceeds the peak: only pixels below LOWEST before scaling, or a peak above HIGHEST, need it.
    """
    top = _blur(maps.float()).amax((-2, -1)).clamp_min(torch.finfo(torch.float32).tiny)
    return (peak / top)[:, None, None]


def _blur(maps: Float[Tensor, "*batch h w"]) -> Float[Tensor, "*batch h w"]:
    """The published blur, zeros outside of the map; two matrix products are 7 times as fast as a convolution (CPU)."""
    return _blur_matrix(maps.shape[-2], maps.device) @ (maps @ _blur_matrix(maps.shape[-1], maps.device))


def _blur_matrix(size: int, device: torch.device) -> Float[Tensor, "size size"]:
    """The blur along an axis as a symmetric matrix."""
    axis = torch.arange(size, device=device, dtype=torch.float32)
    distance = (axis - axis[:, None]).abs()
    window = torch.exp(-(distance**2) / (2 * BLUR_SIGMA**2)) * (distance <= REACH)
    whole = sum(math.exp(-((tap / BLUR_SIGMA) ** 2) / 2) for tap in range(-REACH, REACH + 1))
    return window / whole
