"""Files of weights as others and we publish them: found, read without running anything in them, and renamed to ours.

Sapiens v1 `.pth` (pre-trained, flat or mmengine's, and pose), Sapiens2 `.safetensors` (native and transformers', whole
or in shards), and our own.
"""

import json
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from sapiens_accel.errors import UserError, read_tree
from sapiens_accel.pose.skeleton import PUBLISHED

State = dict[str, Tensor]
Family = Literal["sapiens", "sapiens2"]
FILE = "model.safetensors"
SKELETON_FILE = "skeleton.json"
INDEX = f"{FILE}.index.json"
LARGEST_SIDE = 16_384  # px of a crop that a config.json may ask for

# Published key -> ours, tried in order; `qkv` and `gate_up` are split afterwards.
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
# Of pre-training, or computed anew from the picture's size: no loss, and so in no report.
_NEEDLESS = {"sapiens": r"(backbone\.)?cls_token", "sapiens2": r"(backbone\.)?rope_embed\.periods"}
_FAMILY_OF = {
    "sapiens": r"(backbone\.)?layers\.\d+\.attn\.qkv\.|(backbone\.)?encoder\.layer\.\d+\.",
    "sapiens2": r"(backbone\.)?blocks\.\d+\.attn\.wq\.|((backbone|model)\.)?model\.layer\.\d+\.attention\.q_proj\.",
}
_FUSED = {"qkv": ("query", "key", "value"), "gate_up": ("gate_proj", "up_proj")}


@dataclass(frozen=True, kw_only=True)
class Weights:
    """What a file holds, by our names.

    Attributes:
        file: where it was found.
        family: whose network it is.
        state: the tensors; memory-mapped, and views of the file where they were split.
        as_published: Meta's own layout, whose positions may have a class slot where ours have an empty one.
        names: its keypoints by name and order; None if it does not tell.
        names_from: where the names stand.
        input_hw: the pixels of the crop it was trained on; None if it does not tell.
    """

    file: Path
    family: Family
    state: State
    as_published: bool
    names: tuple[str, ...] | None
    names_from: str
    input_hw: tuple[int, int] | None


def read(reference: str) -> Weights:
    """Find a file of weights in a file's or folder's path and read it.

    Raises:
        UserError: nothing there, several files, a program instead of tensors, a file that needs more than tensors,
            numbers and arrays to be unpickled, or tensors of another network.
    """
    file = find(reference)
    tensors, meta = _tensors(file)
    tensors = {re.sub(r"^(module\.|_orig_mod\.)+", "", key): value for key, value in tensors.items()}
    family = _known_family(file, tensors)
    state = renamed(tensors, family)
    config = file.parent / "config.json"
    ours, names_from_config = read_config(config) if config.is_file() else ({}, None)
    names, names_from = _meta_names(meta), "the file"
    if names is None:
        names, names_from = names_from_config, "config.json"
    # A native file has not been through our hands or transformers'.
    as_published = any(re.match(r"(backbone\.)?(pos_embed|blocks\.)", key) for key in tensors)
    count = num_keypoints(state)
    if names is None or len(names) != count:
        known = PUBLISHED.get(count) if as_published or count == 308 else None
        names, names_from = (known.names, "their number") if known else (None, "")
    input_hw = tuple(ours["input_hw"]) if "input_hw" in ours and not as_published else None
    return Weights(
        file=file, family=family, state=state, as_published=as_published, names=names, names_from=names_from,
        input_hw=input_hw,
    )  # fmt: skip


def find(reference: str) -> Path:
    """The one file of weights that a path means: the file itself, or the one in a folder.

    In a folder `model.safetensors` goes before all others, then its index of shards; of a clean and another variant of
    the same file the clean one is taken.

    Raises:
        UserError: no such path, no file of weights, or several.
    """
    path = Path(reference)
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"--weights {reference}: no such file or folder")
    for name in (FILE, INDEX):
        if (path / name).is_file():
            return path / name
    names = sorted(one.name for one in path.iterdir() if one.suffix in (".safetensors", ".pth", ".pt2"))
    names = [name for name in names if not name.startswith(".")]
    names = [name for name in names if not (name.endswith(".pth") and f"{name[:-4]}_clean.pth" in names)]
    names = [name for name in names if not name.endswith(".pt2")] or names
    if not names:
        hint = f"; did you mean {path / 'weights'}?" if (path / "weights" / FILE).is_file() else ""
        raise UserError(f"--weights {reference}: no {FILE} and no other .safetensors or .pth file in this folder{hint}")
    if len(names) > 1:
        raise UserError(f"--weights {reference}: several files of weights, name one of them: {', '.join(names)}")
    return path / names[0]


def predictor(family: Family) -> str:
    """The module whose rows are the keypoints."""
    return {"sapiens": "head.final_layer", "sapiens2": "head.predictor"}[family]


def num_keypoints(state: State) -> int:
    """The rows of a head's last layer; 0 without a head."""
    keys = (f"{predictor(family)}.weight" for family in ("sapiens", "sapiens2"))
    return next((len(state[key]) for key in keys if key in state and state[key].ndim), 0)


# ---- Reading


def _tensors(file: Path) -> tuple[State, Any]:
    """The tensors of a file and what it tells about itself."""
    if file.name.endswith(".index.json"):
        return _shards(file), None
    if _is_program(file):
        raise UserError(
            f"--weights {file}: a TorchScript or exported program; its tensors cannot be trained, "
            "take the .pth or .safetensors file of the same network"
        )
    try:
        tree = load_file(file) if file.suffix == ".safetensors" else _unpickled(file)
    except Exception as error:
        reason = " ".join(str(error).split())
        more = re.search(r"GLOBAL (\S+)", reason)
        reason = f"it would call {more[1]!r}, and nothing is called" if more else reason[:300]
        raise UserError(f"--weights {file}: not a file of plain tensors: {reason}") from None
    meta = tree.get("meta") if isinstance(tree, dict) else None
    for nested in ("state_dict", "model", "teacher"):
        if isinstance(tree, dict) and isinstance(tree.get(nested), dict):
            tree = tree[nested]
            break
    found = {key: value for key, value in tree.items() if isinstance(value, Tensor)} if isinstance(tree, dict) else {}
    if not found:
        raise UserError(f"--weights {file}: not a file of plain tensors: there is no named tensor in it")
    return found, meta


def _shards(index: Path) -> State:
    try:
        names = sorted(
            {
                str(name)
                for name in read_tree(index, json.loads, "an index of shards with a 'weight_map'")[
                    "weight_map"
                ].values()
            }
        )
    except (KeyError, AttributeError, TypeError):
        raise UserError(f"--weights {index}: not an index of shards; expected a 'weight_map' in it") from None
    found: State = {}
    for name in names:
        shard = index.parent / name
        if Path(name).name != name or shard.suffix != ".safetensors" or not shard.is_file():
            raise UserError(f"--weights {index}: its shard {name} is missing; fetch the whole folder")
        found |= _tensors(shard)[0]
    return found


def _is_program(file: Path) -> bool:
    """Sapiens' `lite` files: TorchScript, or torch.export's."""
    if file.suffix == ".pt2":
        return True
    if file.suffix == ".safetensors" or not zipfile.is_zipfile(file):
        return False
    try:
        with zipfile.ZipFile(file) as archive:
            members = {member.rsplit("/", 1)[-1] for member in archive.namelist()}
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError):
        return False  # a zip by its end alone; whoever reads it says what is wrong
    return bool(members & {"constants.pkl", "archive_format", "serialized_exported_program.json"})


class _History:
    """Stands in for mmengine's curve of a loss, which training files carry and nobody here reads."""


def _unpickled(file: Path) -> Any:
    # Published files carry numpy values in their meta data; nothing else than plain tensors and these is unpickled.
    core = np._core.multiarray  # pyright: ignore[reportAttributeAccessIssue]
    functions = {"scalar": core.scalar, "_reconstruct": core._reconstruct}
    # By both names: numpy 1, with which the published files were written, and numpy 2.
    allowed: list[Any] = [
        (f, f"numpy.{part}.multiarray.{name}") for name, f in functions.items() for part in ("core", "_core")
    ]
    allowed += [(_History, "mmengine.logging.history_buffer.HistoryBuffer")]
    allowed += [np.dtype, np.ndarray, *(getattr(np.dtypes, name) for name in np.dtypes.__all__)]
    # Only torch's present format (a zip) can be mapped instead of read.
    mapped = zipfile.is_zipfile(file)
    with torch.serialization.safe_globals(allowed):
        return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)


def _meta_names(meta: Any) -> tuple[str, ...] | None:
    """mmpose's record of the data set: {'dataset_meta': {'keypoint_id2name': {0: 'nose', ...}}}."""
    for key in ("dataset_meta", "keypoint_id2name"):
        meta = meta.get(key) if isinstance(meta, dict) else None
    return _in_order(meta)


def read_config(config: Path) -> tuple[dict[str, Any], tuple[str, ...] | None]:
    """What the config.json beside weights tells: what we wrote there, and the keypoints' names (also transformers').

    Raises:
        UserError: it describes no network.
    """
    tree = read_tree(config, json.loads, "JSON")
    ours = tree.get("sapiens_accel", {})
    names = ours.get("keypoints", _in_order(tree.get("id2label"))) if isinstance(ours, dict) else ours
    input_hw = ours.get("input_hw", [1, 1]) if isinstance(ours, dict) else ours
    sides = input_hw if isinstance(input_hw, list) else ()
    if not (
        (names is None or (isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)))
        and len(sides) == 2
        and all(type(side) is int and 0 < side <= LARGEST_SIDE for side in sides)
    ):
        raise UserError(
            f"{config}: not the description of a network (sapiens_accel: keypoints are names, input_hw two sizes in "
            f"px of up to {LARGEST_SIDE}); mend it or move the weights away from it"
        )
    return ours, None if names is None else tuple(names)


def _in_order(choose_name: Any) -> tuple[str, ...] | None:
    """{0: 'nose', ...} as a tuple; None if it is not that, or has transformers' placeholders LABEL_0, ..."""
    if not isinstance(choose_name, dict) or not all(str(key).isdigit() for key in choose_name):
        return None
    names = tuple(str(choose_name[key]) for key in sorted(choose_name, key=int))
    return None if not names or all(re.fullmatch(r"LABEL_\d+", name) for name in names) else names


# ---- Renaming


def family_of(tensors: State) -> Family | None:
    """Whose blocks these are, by their names in any layout."""
    families: tuple[Family, ...] = ("sapiens", "sapiens2")
    return next((one for one in families if any(re.match(_FAMILY_OF[one], key) for key in tensors)), None)


def renamed(tensors: State, family: Family) -> State:
    """By our names, fused tensors split into views; without what has no use here (class token, RoPE's periods)."""
    ours: State = {}
    for key, value in tensors.items():
        if re.fullmatch(_NEEDLESS[family], key):
            continue
        # A v1 file of ours has our names already; published names do not begin like them.
        if not re.match(r"backbone\.(embeddings|encoder|layernorm|model|norm)\b", key):
            for pattern, replacement in _V1_KEYS if family == "sapiens" else _V2_KEYS:
                key = re.sub(pattern, replacement, key)
        ours.update(_split(key, value))
    return ours


def _known_family(file: Path, tensors: State) -> Family:
    family = family_of(tensors)
    if family is None:
        first = ", ".join(list(tensors)[:2])
        raise UserError(
            f"--weights {file}: no blocks of Sapiens or Sapiens2 in its {len(tensors)} tensors ({first}, ...)"
        )
    if any(re.match(r"(backbone\.)?tokenizer\.", key) for key in tensors):
        raise UserError(f"--weights {file}: a network with a window tokenizer (1b-4k); expected one without")
    return family


def _split(key: str, value: Tensor) -> State:
    for fused, parts in _FUSED.items():
        is_whole = value.ndim > 0 and len(value) % len(parts) == 0
        if key.startswith("backbone.") and f".{fused}." in key and is_whole:
            pieces = zip(parts, value.chunk(len(parts)), strict=True)
            return {key.replace(f".{fused}.", f".{part}."): piece for part, piece in pieces}
    return {key: value}
