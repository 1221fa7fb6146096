# SPDX-License-Identifier: Apache-2.0
"""The image processor of Sapiens pose networks for transformers: boxes to crops, heatmaps to keypoints. No torchvision.

This file is copied into weights folders, with heatmap_numpy.py beside it:

    AutoImageProcessor.from_pretrained(FOLDER, trust_remote_code=True)
"""

from typing import Any

import cv2
import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from transformers.image_processing_base import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor

from sapiens_accel.pose.heatmap_numpy import NumpyCodec

PADDING = 1.25  # of boxes, where the folder does not say with which they were trained


class SapiensPoseImageProcessor(BaseImageProcessor):
    """Crops people for a Sapiens pose network and decodes its heatmaps; called as transformers' Sapiens2ImageProcessor.

    Its arguments are those of preprocessor_config.json, whose other keys it stores for other image processors.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012  (as transformers declares it)

    def __init__(
        self,
        size: dict[str, int],
        image_mean: list[float],
        image_std: list[float],
        rescale_factor: float = 1 / 255,
        keypoint_heatmap_sigma: float = 6.0,
        box_padding: float = PADDING,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.size = dict(size)
        self.image_mean, self.image_std, self.rescale_factor = list(image_mean), list(image_std), rescale_factor
        self.keypoint_heatmap_sigma, self.box_padding = keypoint_heatmap_sigma, box_padding

    def preprocess(self, images: Any, boxes: Any = None, return_tensors: Any = None, **kwargs: Any) -> BatchFeature:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Crops of people, as the network takes them.

        Args:
            images: a PIL image, an array of uint8 [h, w, 3] in RGB order, or a list of these.
            boxes: of each image, its people's boxes: left, top, width, height in px. Default: the whole image.
            return_tensors: "pt" for torch, "np" for NumPy.

        Returns:
            pixel_values [N, 3, H, W], float32, normalized: N people of all images, in order.

        Raises:
            ValueError: images or boxes of another form, or not as many.
        """
        if unknown := sorted(kwargs):
            raise ValueError(f"{unknown[0]}: no such argument (expected images, boxes, return_tensors)")
        pixels = [_to_array(image) for image in (images if isinstance(images, list | tuple) else [images])]
        if boxes is None:
            boxes = [[[0, 0, image.shape[1], image.shape[0]]] for image in pixels]
        if len(boxes) != len(pixels):
            raise ValueError(f"boxes: expected a list of boxes for each of {len(pixels)} images, found {len(boxes)}")
        crops = [
            cv2.warpAffine(image, self._matrix(box), (self.size["width"], self.size["height"]), flags=cv2.INTER_LINEAR)
            for image, of_image in zip(pixels, boxes, strict=True)
            for box in of_image
        ]
        batch = np.array(crops, np.float32).reshape(-1, self.size["height"], self.size["width"], 3)
        # In levels of 0 to 255, as in training: another order of float32 operations moves unsure keypoints by 1e-3 px.
        mean, std = (np.array(one) / self.rescale_factor for one in (self.image_mean, self.image_std))
        scaled = (batch - mean.astype(np.float32)) / std.astype(np.float32)
        return BatchFeature({"pixel_values": scaled.transpose(0, 3, 1, 2).copy()}, tensor_type=return_tensors)

    def post_process_pose_estimation(
        self, outputs: Any, boxes: Any, outputs_flipped: Any = None, threshold: float | None = None
    ) -> list[list[dict[str, torch.Tensor]]]:
        """Keypoints in px of the images.

        Args:
            outputs: of the model: heatmaps [N, K, h, w].
            boxes: as in `preprocess`.
            outputs_flipped: of the model for mirrored pixel_values, with `flip_pairs`; both are averaged.
            threshold: keypoints with a score up to this are left out.

        Returns:
            For each image, for each person: keypoints [K, 2], scores [K], labels [K] (indices of the keypoints), bbox
            [4] (left, top, right, bottom).
        """
        heatmaps = outputs.heatmaps.float()
        if outputs_flipped is not None:
            heatmaps = (heatmaps + outputs_flipped.heatmaps.float()) / 2
        input_hw, heatmap_hw = (self.size["height"], self.size["width"]), (heatmaps.shape[2], heatmaps.shape[3])
        codec = NumpyCodec(input_hw=input_hw, heatmap_hw=heatmap_hw, sigma=self.keypoint_heatmap_sigma)
        decoded = zip(*codec.decode(heatmaps.detach().cpu().numpy()), strict=True)
        return [[self._describe_person(box, *next(decoded), threshold) for box in of_image] for of_image in boxes]

    def _describe_person(
        self, box: Any, points_xy: np.ndarray, scores: np.ndarray, threshold: float | None
    ) -> dict[str, torch.Tensor]:
        matrix, (x, y, w, h) = self._matrix(box), (float(value) for value in box)
        image_xy = (points_xy - matrix[:, 2]) / matrix.diagonal()
        kept = np.flatnonzero(scores > (-np.inf if threshold is None else threshold))
        return {
            "keypoints": torch.from_numpy(image_xy[kept]).float(),
            "scores": torch.from_numpy(scores[kept]).float(),
            "labels": torch.from_numpy(kept),
            "bbox": torch.tensor([x, y, x + w, y + h]),
        }

    def _matrix(self, box: Any) -> np.ndarray:
        """input_from_image [2, 3] of the crop around a box: padded, then in the input's aspect; corners are pixels'
        centers (UDP)."""
        x, y, w, h = (float(value) for value in box)
        if not (w > 0 and h > 0):
            raise ValueError(f"box {x:g} {y:g} {w:g} {h:g}: no area (expected left, top, width, height in px)")
        size_wh = np.array([self.size["width"], self.size["height"]], np.float64)
        crop_wh = self.box_padding * max(w / size_wh[0], h / size_wh[1]) * size_wh
        scale = (size_wh - 1) / crop_wh
        corner = np.array([x + w / 2, y + h / 2]) - crop_wh / 2
        return np.column_stack([np.diag(scale), -scale * corner])


def _to_array(image: Any) -> np.ndarray:
    if isinstance(image, PIL.Image.Image):
        return np.asarray(PIL.ImageOps.exif_transpose(image).convert("RGB"))
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        found = f"{image.dtype} {list(image.shape)}" if isinstance(image, np.ndarray) else type(image).__name__
        raise ValueError(f"image: expected a PIL image or uint8 [height, width, 3] in RGB order, found {found}")
    return image
