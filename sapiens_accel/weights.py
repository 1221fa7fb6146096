"""Weights in, with a report of every key.

A `weights/` folder or model.safetensors of ours; Sapiens v1 `.pth` files (pre-trained, flat or mmengine's, and pose);
Sapiens2 `.safetensors` (native and transformers).
"""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from sapiens_accel.config import STAGES, StageName, UserError
from sapiens_accel.model import SapiensPose

State = dict[str, Tensor]
FILE = "model.safetensors"
FROM_RANDOM = "starts from RANDOM weights; the published ones, or a stage of an earlier run, come in by --weights"

# Published key -> ours, tried in order; `qkv` is split afterwards.
_V1_KEYS = (
    (r"^backbone\.", ""),
    (r"^pos_embed$", "backbone.embeddings.position_embeddings"),
    (r"^patch_embed\.projection\.", "backbone.embeddings.patch_embeddings.projection."),
    (r"^layers\.(\d+)\.ln1\.", r"backbone.encoder.layer.\1.layernorm_before."),
    (r"^layers\.(\d+)\.ln2\.", r"backbone.encoder.layer.\1.layernorm_after."),
    (r"^layers\.(\d+)\.attn\.qkv\.", r"backbone.encoder.layer.\1.attention.attention.qkv."),
    (r"^layers\.(\d+)\.attn\.proj\.", r"backbone.encoder.layer.\1.attention.output.dense."),
    (r"^layers\.(\d+)\.ffn\.layers\.0\.0\.", r"backbone.encoder.layer.\1.mlp.fc1."),
    (r"^layers\.(\d+)\.ffn\.layers\.1\.", r"backbone.encoder.layer.\1.mlp.fc2."),
    (r"^ln1\.", "backbone.layernorm."),
)
# What transformers' own conversion of Sapiens2 does (conversion_mapping.py), for files with the native names.
_V2_KEYS = (
    (r"^backbone\.", ""),
    (r"^model\.(?=embeddings|model|norm)", ""),
    (r"^(embeddings|model|norm)\.", r"backbone.\1."),
    (r"^decode_head\.", "head."),
    (r"^head\.conv_pose\.", "head.predictor."),
    (r"^head\.deconv_layers\.0\.", "head.upsample_layers.0.convolution."),
    (r"^head\.deconv_layers\.3\.", "head.upsample_layers.1.convolution."),
    (r"^head\.conv_layers\.0\.(?!convolution)", "head.conv_layers.0.convolution."),
    (r"^head\.conv_layers\.3\.", "head.conv_layers.1.convolution."),
    (r"^head\.conv_layers\.6\.", "head.conv_layers.2.convolution."),
    (r"^cls_token$", "backbone.embeddings.cls_token"),
    (r"^storage_tokens$", "backbone.embeddings.register_tokens"),
    (r"^patch_embed\.projection\.", "backbone.embeddings.patch_embeddings."),
    (r"^blocks\.(\d+)\.ln1\.", r"backbone.model.layer.\1.norm1."),
    (r"^blocks\.(\d+)\.ln2\.", r"backbone.model.layer.\1.norm2."),
    (r"^blocks\.(\d+)\.attn\.w([qkv])\.", r"backbone.model.layer.\1.attention.\2_proj."),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"backbone.model.layer.\1.attention.o_proj."),
    (r"^blocks\.(\d+)\.attn\.gamma\.weight$", r"backbone.model.layer.\1.layer_scale1.lambda1"),
    (r"^blocks\.(\d+)\.attn\.", r"backbone.model.layer.\1.attention."),
    (r"^blocks\.(\d+)\.ffn\.w12\.", r"backbone.model.layer.\1.mlp.gate_up."),
    (r"^blocks\.(\d+)\.ffn\.w3\.", r"backbone.model.layer.\1.mlp.down_proj."),
    (r"^ln1\.", "backbone.norm."),
)


@dataclass(frozen=True, kw_only=True)
class Report:
    """What became of every tensor: the model's (loaded, reshaped, re-initialised) and the file's others (unused)."""

    source: str
    loaded: list[str]
    reshaped: list[str]
    reinitialised: list[str]
    unused: list[str]

    def __str__(self) -> str:
        rows = [(name, getattr(self, name)) for name in ("loaded", "reshaped", "reinitialised", "unused")]
        lines = [f"  {name:<14}{len(keys):>5}  {_short(keys)}" for name, keys in rows if keys]
        return "\n".join([f"weights from {self.source}", *lines])


def load(model: SapiensPose, reference: str) -> Report:
    """Load a file or folder into the model.

    Position embeddings are resized to the model's grid; a head of another shape starts anew.

    Raises:
        UserError: nothing there, not a weights file, or one that lacks a tensor of the backbone.
    """
    path = Path(reference)
    file = path / FILE if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"--weights {reference}: no such file, or a folder without {FILE}")
    read, own = _read(file), model.state_dict()
    state = _renamed(read, model)
    is_published = any(key.endswith("pos_embed") for key in read)
    reshaped = _fit_positions(state, own, model, is_published)
    fitting = {key: value for key, value in state.items() if key in own and value.shape == own[key].shape}
    absent = [key for key in own if key not in fitting]
    lost = [key for key in absent if key.startswith("backbone.")]
    if lost:
        raise UserError(f"--weights {file}: no {lost[0]!r} that fits {model.name} ({len(lost)} backbone tensors lack)")
    model.load_state_dict(fitting, strict=False)
    return Report(
        source=str(file),
        loaded=sorted(set(fitting) - set(reshaped)),
        reshaped=reshaped,
        reinitialised=absent,
        unused=sorted(set(state) - set(fitting)),
    )


def starting_point(run_folder: Path, stage: StageName) -> str | None:
    """The weights of the stage before this one in the run folder, if there are any."""
    for earlier in reversed(STAGES[: STAGES.index(stage)]):
        if (run_folder / earlier / "weights" / FILE).is_file():
            return str(run_folder / earlier / "weights")
    return None


def description(folder: Path) -> dict[str, Any]:
    """What `export.export` wrote of the network: name, num_keypoints, input_hw, sigma, keypoints.

    Raises:
        UserError: the folder is not one of ours.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(f"{folder}: no config.json; expected a weights folder")
    tree = json.loads(file.read_text())
    if "sapiens_accel" not in tree:
        raise UserError(f"{file}: no 'sapiens_accel' in it; expected a weights folder of this project")
    return tree["sapiens_accel"]


def _read(file: Path) -> State:
    # Published files carry numpy scalars in their meta data; nothing else than plain tensors and these is unpickled.
    allowed = [np.dtype, np.ndarray, np._core.multiarray.scalar, np._core.multiarray._reconstruct]  # pyright: ignore
    allowed += [getattr(np.dtypes, name) for name in np.dtypes.__all__]
    try:
        with torch.serialization.safe_globals(allowed):
            safe = file.suffix == ".safetensors"
            tree: Any = load_file(file) if safe else torch.load(file, map_location="cpu", weights_only=True)
        for nested in ("state_dict", "model"):
            tree = tree.get(nested, tree)
        return {key: value for key, value in tree.items() if isinstance(value, Tensor)}
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"--weights {file}: not a file of plain tensors: {reason}") from None


def _renamed(state: State, model: SapiensPose) -> State:
    rules = _V1_KEYS if model.size.family == "sapiens" else _V2_KEYS
    renamed: State = {}
    for key, value in state.items():
        # A v1 file of ours has our names already; published names do not begin like them.
        if not re.match(r"backbone\.(embeddings|encoder|layernorm|model|norm)\b", key):
            for pattern, replacement in rules:
                key = re.sub(pattern, replacement, key)
        for name, part in _split(key, value):
            renamed[name] = part
    return renamed


def _split(key: str, value: Tensor) -> list[tuple[str, Tensor]]:
    if ".qkv." in key:
        return [(key.replace("qkv", n), v) for n, v in zip(("query", "key", "value"), value.chunk(3), strict=True)]
    if ".gate_up." in key:
        return [(key.replace("gate_up", n), v) for n, v in zip(("gate_proj", "up_proj"), value.chunk(2), strict=True)]
    return [(key, value)]


def _fit_positions(state: State, own: State, model: SapiensPose, is_published: bool) -> list[str]:
    """Resize Sapiens v1's position embedding in place to the model's grid, with VitPose's empty slot 0.

    A published one may have a class position where ours has that slot: of equal shape, and not to be taken for it.
    """
    key = "backbone.embeddings.position_embeddings"
    if key not in state or key not in own or (state[key].shape == own[key].shape and not is_published):
        return []
    source, target = state[key].float(), own[key]
    grid_hw = _grid_hw(source.shape[1])
    if grid_hw is None or source.shape[2] != target.shape[2]:
        return []
    target_hw = (model.input_hw[0] // model.size.patch, model.input_hw[1] // model.size.patch)
    patches = source[:, -grid_hw[0] * grid_hw[1] :]
    grid = patches.transpose(1, 2).unflatten(2, grid_hw)
    # As published (pretrain/mmpretrain/models/utils/embed.py): bicubic, in fp32, no antialiasing.
    grid = F.interpolate(grid, size=target_hw, mode="bicubic", align_corners=False)
    state[key] = torch.cat([torch.zeros_like(target[:, :1]), grid.flatten(2).transpose(1, 2)], dim=1)
    return [key]


def _grid_hw(num_positions: int) -> tuple[int, int] | None:
    """The grid of a published embedding: square (pre-training) or 4:3 (pose), with or without a class position."""
    for count in (num_positions, num_positions - 1):
        side, unit = math.isqrt(count), math.isqrt(count // 12)
        if side * side == count:
            return side, side
        if 12 * unit * unit == count:
            return 4 * unit, 3 * unit
    return None


def _short(keys: list[str]) -> str:
    return ", ".join(keys[:2]) + (", ..." if len(keys) > 2 else "")
