# SPDX-License-Identifier: Apache-2.0
"""The UDP heatmap codec of `pose/heatmap.py` for NumPy: the same encoding and decoding, without torch.

It imports NumPy alone: this file is also copied into weights folders, for their image processor. Notation: b people,
k keypoints, h w the heatmap. Keypoints are px of the network's input; heatmap px = input px * (w - 1) / (W - 1).
"""

from dataclasses import dataclass

import numpy as np

BLUR_KERNEL, BLUR_SIGMA = 11, 2.0
REACH = BLUR_KERNEL // 2
LOWEST, HIGHEST = 1e-3, 50.0
EPS = float(np.finfo(np.float32).eps)


@dataclass(frozen=True, kw_only=True)
class NumpyCodec:
    """Encodes and decodes heatmaps of given input and heatmap size (height, width) and sigma (heatmap px).

    Points differ from those of `pose.heatmap.Codec`, which computes in float32, by less than 1e-6 of the input's size.
    """

    input_hw: tuple[int, int]
    heatmap_hw: tuple[int, int]
    sigma: float

    def encode(self, points_xy: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Encode target maps: peak 1 at the sub-pixel point, cut to the published square of 3 sigma around its pixel.

        Args:
            points_xy: [b, k, 2], input px.
            weights: [b, k], target weights; the map of a keypoint of weight 0, or of a negative weight, is empty.

        Returns:
            Maps [b, k, h, w] in float32, and weights [b, k]: 0 for keypoints whose square is entirely outside of the
            map, and the absolute value of negative ones.
        """
        height, width = self.heatmap_hw
        radius = int(3 * self.sigma)
        x, y = np.moveaxis(np.asarray(points_xy, np.float32) * np.float32(self._heatmap_per_input()), -1, 0)
        pixel_x, pixel_y = np.trunc(x + np.float32(0.5)), np.trunc(y + np.float32(0.5))
        outside = (pixel_x - radius >= width) | (pixel_y - radius >= height)
        outside |= (pixel_x + radius + 1 < 0) | (pixel_y + radius + 1 < 0)
        weights = np.asarray(weights)
        drawn = (weights > 0) & ~outside
        row = self._profile(y, pixel_y, height, radius) * drawn[..., None]
        maps = row[..., :, None] * self._profile(x, pixel_x, width, radius)[..., None, :]
        return maps.astype(np.float32), np.where(drawn, weights, np.abs(np.minimum(weights, 0)))

    def decode(self, heatmaps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Decode keypoints with sub-pixel accuracy, and their scores.

        Args:
            heatmaps: [b, k, h, w].

        Returns:
            Points [b, k, 2] in input px, float64, and scores [b, k]: the maximum of each map. A map without positive
            values gives the middle of the map.
        """
        height, width = self.heatmap_hw
        maps = np.asarray(heatmaps).reshape(-1, height, width)
        scores = maps.max(axis=(1, 2), initial=-np.inf).astype(np.float64)
        peak = maps.reshape(len(maps), -1).argmax(axis=1) if len(maps) else np.zeros(0, int)
        peak_xy = np.stack([peak % width, peak // width], axis=-1)
        points = peak_xy + _refine(maps, peak_xy, scores)
        points = np.where((scores > 0)[:, None], points, [(width - 1) / 2, (height - 1) / 2])
        people = heatmaps.shape[:2]
        return (points / self._heatmap_per_input()).reshape(*people, 2), scores.reshape(people)

    def _heatmap_per_input(self) -> np.ndarray:
        """Of x and y."""
        return (np.array(self.heatmap_hw[::-1]) - 1) / (np.array(self.input_hw[::-1]) - 1)

    def _profile(self, center: np.ndarray, pixel: np.ndarray, size: int, radius: int) -> np.ndarray:
        """The Gaussian along one axis, [b, k, size]."""
        axis = np.arange(size, dtype=np.float32)
        inside = np.abs(axis - pixel[..., None]) <= radius
        return np.exp(np.maximum((axis - center[..., None]) ** 2 * (-0.5 / self.sigma**2), -80.0)) * inside


def flip(heatmaps: np.ndarray, mirror: list[int] | tuple[int, ...]) -> np.ndarray:
    """Mirror the maps [b, k, h, w] of a mirrored image back; `mirror[k]` is the keypoint that k becomes."""
    return heatmaps[:, list(mirror), :, ::-1]


def _refine(maps: np.ndarray, peak_xy: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """The step [n, 2] from each map's highest pixel to the maximum of the parabola through its logarithm.

    A Newton step on the blurred map; near the border, where the blur includes zeros outside of the map, a parabola that
    is fitted to pixels that are not blurred.
    """
    height, width = maps.shape[1:]
    near_border = ((peak_xy <= REACH) | (peak_xy >= np.array([width, height]) - 1 - REACH)).any(axis=1)
    windows = _windows(maps, peak_xy)
    blur = _blur_matrix(2 * REACH + 3)
    blurred = (blur @ windows @ blur)[:, REACH:-REACH, REACH:-REACH]
    clamped = ((blurred.min(axis=(1, 2), initial=np.inf) < LOWEST) | (scores > HIGHEST)) & (scores > 0) & ~near_border
    for n in np.flatnonzero(clamped):  # the blurred map scaled to its original maximum, as published
        whole = _blur_matrix(height) @ maps[n].astype(np.float64) @ _blur_matrix(width)
        blurred[n] *= scores[n] / max(whole.max(), float(np.finfo(np.float32).tiny))
    with np.errstate(divide="ignore", invalid="ignore"):
        steps = -_newton(np.log(blurred.clip(LOWEST, HIGHEST)))
    for n in np.flatnonzero(near_border):
        steps[n] = _fit(windows[n, 1:-1, 1:-1])
    return np.nan_to_num(steps, nan=0.0, posinf=REACH, neginf=-REACH).clip(-REACH, REACH)


def _windows(maps: np.ndarray, peak_xy: np.ndarray) -> np.ndarray:
    """The square [n, 13, 13] around each peak that the blurred 3x3 pixels depend on, zeros outside of the map."""
    offsets = np.arange(-REACH - 1, REACH + 2)
    columns, rows = peak_xy[:, 0, None] + offsets, peak_xy[:, 1, None] + offsets
    height, width = maps.shape[1:]
    pixels = maps[
        np.arange(len(maps))[:, None, None], rows.clip(0, height - 1)[:, :, None], columns.clip(0, width - 1)[:, None]
    ].astype(np.float64)
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None]
    return np.where(inside, pixels, 0.0)


def _newton(p: np.ndarray) -> np.ndarray:
    """inv(Hessian) @ gradient in the middle of 3x3 patches [n, 3, 3] (rows are y)."""
    dx, dy = 0.5 * (p[:, 1, 2] - p[:, 1, 0]), 0.5 * (p[:, 2, 1] - p[:, 0, 1])
    dxx = p[:, 1, 2] - 2 * p[:, 1, 1] + p[:, 1, 0] + EPS
    dyy = p[:, 2, 1] - 2 * p[:, 1, 1] + p[:, 0, 1] + EPS
    corners = p[:, 2, 2] + p[:, 0, 0] + 2 * p[:, 1, 1]
    dxy = 0.5 * (corners - p[:, 1, 2] - p[:, 2, 1] - p[:, 1, 0] - p[:, 0, 1])
    return np.stack([dyy * dx - dxy * dy, dxx * dy - dxy * dx], axis=-1) / (dxx * dyy - dxy * dxy)[:, None]


def _fit(window: np.ndarray) -> np.ndarray:
    """Weighted least squares of log h = a + bx + cy + dx^2 + ey^2 over 11x11 pixels: the maximum of the parabola."""
    h = window.ravel().clip(0.0)
    h = h / max(h.max(), float(np.finfo(np.float32).tiny))
    axis = np.arange(-REACH, REACH + 1) / REACH
    y, x = (grid.ravel() for grid in np.meshgrid(axis, axis, indexing="ij"))
    terms = np.stack([np.ones_like(x), x, y, x**2, y**2], axis=-1)
    weights = h**2 * np.exp(-(x**2 + y**2) * (REACH / BLUR_SIGMA) ** 2 / 2)
    try:
        fit = np.linalg.solve(terms.T * weights @ terms, terms.T @ (weights * np.log(h.clip(1e-3))))
    except np.linalg.LinAlgError:
        return np.zeros(2)
    linear, square = fit[1:3], fit[3:5]
    return np.where(square < 0, -linear / np.where(square < 0, 2 * square, 1.0), 0.0) * REACH


def _blur_matrix(size: int) -> np.ndarray:
    """The published blur along an axis as a symmetric matrix."""
    distance = np.abs(np.arange(size)[:, None] - np.arange(size))
    window = np.exp(-(distance**2) / (2 * BLUR_SIGMA**2)) * (distance <= REACH)
    taps = np.arange(-REACH, REACH + 1)
    return window / np.exp(-((taps / BLUR_SIGMA) ** 2) / 2).sum()
