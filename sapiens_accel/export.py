"""Weights out: a folder that rebuilds the network (`model.safetensors`, `config.json`, `preprocessor_config.json`)."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from sapiens_accel.model import PIXEL_MEAN, PIXEL_STD, SapiensPose, sapiens2_config
from sapiens_accel.skeleton import Skeleton
from sapiens_accel.weights import FILE


def export(
    folder: Path,
    state: Mapping[str, Tensor],
    model: SapiensPose,
    skeleton: Skeleton,
    sigma: float,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write weights with what rebuilds and feeds the network. Sapiens2 folders load with plain transformers.

    Args:
        state: whole tensors by the model's own names.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {_published(key, model): value.to(dtype).contiguous() for key, value in state.items()}
    temporary = folder / f".{FILE}.tmp"
    save_file(tensors, temporary, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(_config(model, skeleton, sigma), indent=2))
    (folder / "preprocessor_config.json").write_text(json.dumps(_preprocessor(model, sigma), indent=2))
    # Last and in one step: a folder with this file in it is whole.
    temporary.replace(folder / FILE)


def _published(key: str, model: SapiensPose) -> str:
    if model.size.family == "sapiens":
        return key
    return re.sub(r"^head\.", "decode_head.", re.sub(r"^backbone\.", "model.", key))


def _config(model: SapiensPose, skeleton: Skeleton, sigma: float) -> dict[str, Any]:
    ours = {**model.description(), "heatmap_hw": list(model.heatmap_hw), "sigma": sigma, "keypoints": skeleton.names}
    if model.size.family == "sapiens":
        return {"architectures": ["SapiensPose"], "model_type": "sapiens_pose", "sapiens_accel": ours}
    config = sapiens2_config(model.size, model.num_keypoints, model.input_hw)
    config.id2label = dict(enumerate(skeleton.names))
    config.label2id = {name: index for index, name in enumerate(skeleton.names)}
    config.flip_pairs = [[k, other] for k, other in enumerate(skeleton.mirror) if k < other]
    tree = config.to_dict()
    return {**tree, "architectures": ["Sapiens2ForPoseEstimation"], "dtype": "float32", "sapiens_accel": ours}


def _preprocessor(model: SapiensPose, sigma: float) -> dict[str, Any]:
    height, width = model.input_hw
    return {
        "image_processor_type": "Sapiens2ImageProcessor",
        "size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [mean / 255 for mean in PIXEL_MEAN],
        "image_std": [std / 255 for std in PIXEL_STD],
        "keypoint_heatmap_sigma": sigma,
    }
