"""Weights out: a folder that rebuilds the network (`model.safetensors`, `config.json`, `preprocessor_config.json`)."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from sapiens_accel.model import PIXEL_MEAN, PIXEL_STD, SapiensPose, sapiens2_config
from sapiens_accel.skeleton import Skeleton
from sapiens_accel.weights import FILE

_SNIPPET = """\
import cv2, numpy as np, torch
from transformers import {auto}

model = {auto}.from_pretrained("{repo_id}"{trust}).eval()
image = cv2.cvtColor(cv2.imread("people.jpg"), cv2.COLOR_BGR2RGB)
x, y, w, h = 120, 80, 160, 400  # one person's box: left, top, width, height in pixels
H, W = model.config.image_size
size = 1.25 * max(w / W, h / H) * np.array([W, H])  # the box with room around it, in the network's aspect
corner, scale = np.array([x + w / 2, y + h / 2]) - size / 2, (np.array([W, H]) - 1) / size
crop = cv2.warpAffine(image, np.column_stack([np.diag(scale), -scale * corner]), (W, H))
pixels = (torch.from_numpy(crop) / 255 - torch.tensor({mean})) / torch.tensor({std})
with torch.no_grad():
    maps = model(pixels.permute(2, 0, 1)[None]).heatmaps[0].float().numpy()
rows_columns = np.array([np.unravel_index(one.argmax(), one.shape) for one in maps])
points = rows_columns[:, ::-1] / (np.array(maps.shape[:0:-1]) - 1) * size + corner  # x, y in pixels of the image
for k, (px, py) in enumerate(points):
    print(f"{{model.config.id2label[k]:>16}} {{px:7.1f}} {{py:7.1f}}  score {{maps[k].max():.2f}}")
"""


def export(folder: Path, state: Mapping[str, Tensor], model: SapiensPose, skeleton: Skeleton, sigma: float) -> None:
    """Write fp32 weights with what rebuilds and feeds the network. Sapiens2 folders load with plain transformers.

    Args:
        state: whole tensors by the model's own names.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {_published(key, model): value.contiguous() for key, value in state.items()}
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


def snippet(repo_id: str, family: str) -> str:
    """Python that a model card shows: a picture and a person's box to keypoints, without this package.

    Args:
        repo_id: what `from_pretrained` is given: a Hub repository or a folder.
        family: sapiens or sapiens2.
    """
    v1 = family == "sapiens"
    return _SNIPPET.format(
        repo_id=repo_id,
        auto="AutoModel" if v1 else "AutoModelForPoseEstimation",
        trust=", trust_remote_code=True" if v1 else "",
        mean=[round(mean / 255, 6) for mean in PIXEL_MEAN],
        std=[round(std / 255, 6) for std in PIXEL_STD],
    )
