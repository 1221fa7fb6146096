"""Weights of tiny networks that tests evaluate: untrained, but each keypoint's map has peaks of its own."""

from pathlib import Path

import torch

from sapiens_accel.models import export
from sapiens_accel.models.sapiens import SapiensPose
from sapiens_accel.pose.skeleton import COCO17, Skeleton

INPUT_HW = (64, 48)


def untrained(folder: Path, seed: int = 0, skeleton: Skeleton = COCO17, name: str = "sapiens_tiny") -> Path:
    """Write the weights folder of a network of 64x48 px input."""
    torch.manual_seed(seed)
    model = SapiensPose(name, skeleton.num_keypoints, INPUT_HW)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.startswith("head.") and parameter.ndim > 1:
                parameter.normal_(std=0.1)
    export.export(folder, model.state_dict(), model, skeleton, 2.0)
    return folder
