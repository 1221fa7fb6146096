"""Weights files, published or our own: located, read without running code in them, and renamed to our keys.

Sapiens v1 `.pth` (pre-trained, flat or mmengine's, and pose), Sapiens2 `.safetensors` (native and transformers', whole
or in shards), and our own.

They are read and written without a copy of the file in memory: mapped pages are given back, tensors written one by one.
"""

import ctypes
import json
import mmap
import re
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

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
LARGEST_SIDE = 16_384  # px; of input_hw in a config.json

# Published key -> our key, applied in order; `qkv` and `gate_up` are split afterwards.
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
# For files with the native names: the conversion of Sapiens2 in transformers (conversion_mapping.py).
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
# Used in pre-training only, or computed from the image size: dropped and not reported as unused.
_NOT_NEEDED = {"sapiens": r"(backbone\.)?cls_token", "sapiens2": r"(backbone\.)?rope_embed\.periods"}
_FAMILY_OF = {
    "sapiens": r"(backbone\.)?layers\.\d+\.attn\.qkv\.|(backbone\.)?encoder\.layer\.\d+\.",
    "sapiens2": r"(backbone\.)?blocks\.\d+\.attn\.wq\.|((backbone|model)\.)?model\.layer\.\d+\.attention\.q_proj\.",
}
_FUSED = {"qkv": ("query", "key", "value"), "gate_up": ("gate_proj", "up_proj")}


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The content of a weights file, by our keys.

    Attributes:
        file: the file that was read.
        family: architecture of the network.
        state: the tensors, memory-mapped; fused ones are split into views.
        as_published: Meta's own layout, whose position embedding may start with a class position where ours has an
            empty slot.
        names: keypoint names in the order of the rows; None if unknown.
        names_from: where the names were read.
        input_hw: height and width (px) of the crop in training; None if unknown.
    """

    file: Path
    family: Family
    state: State
    as_published: bool
    names: tuple[str, ...] | None
    names_from: str
    input_hw: tuple[int, int] | None


def read(reference: str) -> Weights:
    """Read the weights file at a path or in a folder.

    Raises:
        UserError: no such file, several files, a program instead of tensors, a pickle of anything but tensors, numbers
            and arrays, or tensors of another network.
    """
    file = find(reference)
    tensors, meta = _tensors(file)
    tensors = {re.sub(r"^(module\.|_orig_mod\.)+", "", key): value for key, value in tensors.items()}
    family = _known_family(file, tensors)
    state = rename(tensors, family)
    config = file.parent / "config.json"
    ours, names_from_config = read_config(config) if config.is_file() else ({}, None)
    names, names_from = _meta_names(meta), "the file"
    if names is None:
        names, names_from = names_from_config, "config.json"
    # Native keys: the file was written neither by us nor by transformers.
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
    """The weights file at a path: the file itself, or the one in a folder.

    In a folder `model.safetensors` takes precedence, then its index of shards; of two variants of a file, the one that
    ends in _clean is used.

    Raises:
        UserError: no such path, no weights file, or several.
    """
    path = Path(reference)
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"--weights {reference}: no such file or folder")
    for name in (FILE, INDEX):
        if (path / name).is_file():
            return path / name
    if (path / "adapter_config.json").is_file():
        raise UserError(
            f"--weights {reference}: adapters without the network they belong to (expected merged weights). Give the "
            "weights folder that this folder is in"
        )
    names = sorted(one.name for one in path.iterdir() if one.suffix in (".safetensors", ".pth", ".pt2"))
    names = [name for name in names if not name.startswith(".")]
    names = [name for name in names if not (name.endswith(".pth") and f"{name[:-4]}_clean.pth" in names)]
    names = [name for name in names if not name.endswith(".pt2")] or names
    if not names:
        hint = f"; did you mean {path / 'weights'}?" if (path / "weights" / FILE).is_file() else ""
        raise UserError(f"--weights {reference}: no {FILE} and no other .safetensors or .pth file in this folder{hint}")
    if len(names) > 1:
        raise UserError(f"--weights {reference}: several weights files. Name one of them: {', '.join(names)}")
    return path / names[0]


def predictor(family: Family) -> str:
    """The name of the last layer, each row of which is a keypoint."""
    return {"sapiens": "head.final_layer", "sapiens2": "head.predictor"}[family]


def num_keypoints(state: State) -> int:
    """Number of rows of the head's last layer; 0 without a head."""
    keys = (f"{predictor(family)}.weight" for family in ("sapiens", "sapiens2"))
    return next((len(state[key]) for key in keys if key in state and state[key].ndim), 0)


# ---- Reading


def _tensors(file: Path) -> tuple[State, Any]:
    """The tensors of a file and its `meta` entry."""
    if file.name.endswith(".index.json"):
        return _shards(file), None
    if _is_program(file):
        raise UserError(
            f"--weights {file}: a TorchScript or exported program, which cannot be trained. Use the .pth or "
            ".safetensors file of the same network"
        )
    try:
        tree = load_file(file) if file.suffix == ".safetensors" else _unpickled(file)
    except Exception as error:
        reason = " ".join(str(error).split())
        call = re.search(r"GLOBAL (\S+)", reason)
        if reason.startswith("Weights only load failed"):  # goes on to advise what this package does not do
            reason = "PyTorch cannot read it. It may be incomplete, or no weights"
        reason = f"it would call {call[1]!r}, and no code in it is run" if call else reason[:300]
        raise UserError(f"--weights {file}: not a file of plain tensors: {reason}") from None
    meta = tree.get("meta") if isinstance(tree, dict) else None
    for nested in ("state_dict", "model", "teacher"):
        if isinstance(tree, dict) and isinstance(tree.get(nested), dict):
            tree = tree[nested]
            break
    tensors = {key: value for key, value in tree.items() if isinstance(value, Tensor)} if isinstance(tree, dict) else {}
    if not tensors:
        raise UserError(f"--weights {file}: not a file of plain tensors: there is no named tensor in it")
    return tensors, meta


def _shards(index: Path) -> State:
    tree = read_tree(index, json.loads, "an index of shards with a 'weight_map'")
    try:
        names = sorted({str(name) for name in tree["weight_map"].values()})
    except (KeyError, AttributeError, TypeError):
        raise UserError(f"--weights {index}: not an index of shards (expected a 'weight_map' in it)") from None
    tensors: State = {}
    for name in names:
        shard = index.parent / name
        if Path(name).name != name or shard.suffix != ".safetensors" or not shard.is_file():
            raise UserError(f"--weights {index}: its shard {name} is missing. Download the whole folder")
        tensors |= _tensors(shard)[0]
    return tensors


def _is_program(file: Path) -> bool:
    """Whether a file is TorchScript or a program of torch.export, such as Sapiens' `lite` files."""
    if file.suffix == ".pt2":
        return True
    if file.suffix == ".safetensors" or not zipfile.is_zipfile(file):
        return False
    try:
        with zipfile.ZipFile(file) as archive:
            members = {member.rsplit("/", 1)[-1] for member in archive.namelist()}
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError):
        return False  # only its end looks like a zip; reading it reports what is wrong
    return bool(members & {"constants.pkl", "archive_format", "serialized_exported_program.json"})


class _History:
    """Placeholder for mmengine's HistoryBuffer, which training checkpoints hold and we do not need."""


def _unpickled(file: Path) -> Any:
    # Published files hold numpy values in their metadata. Only these and plain tensors are unpickled.
    core = np._core.multiarray  # pyright: ignore[reportAttributeAccessIssue]
    functions = {"scalar": core.scalar, "_reconstruct": core._reconstruct}
    # Under the names of numpy 1, which wrote the published files, and of numpy 2.
    allowed: list[Any] = [
        (f, f"numpy.{part}.multiarray.{name}") for name, f in functions.items() for part in ("core", "_core")
    ]
    allowed += [(_History, "mmengine.logging.history_buffer.HistoryBuffer")]
    allowed += [np.dtype, np.ndarray, *(getattr(np.dtypes, name) for name in np.dtypes.__all__)]
    # Only torch's current format (a zip) can be memory-mapped.
    mapped = zipfile.is_zipfile(file)
    with torch.serialization.safe_globals(allowed):
        return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)


def _meta_names(meta: Any) -> tuple[str, ...] | None:
    """Keypoint names from mmpose's metadata: {'dataset_meta': {'keypoint_id2name': {0: 'nose', ...}}}."""
    for key in ("dataset_meta", "keypoint_id2name"):
        meta = meta.get(key) if isinstance(meta, dict) else None
    return _in_order(meta)


def read_config(config: Path) -> tuple[dict[str, Any], tuple[str, ...] | None]:
    """Our entry of the config.json beside weights, and the keypoint names in it (or in transformers' id2label).

    Raises:
        UserError: the file does not describe a network.
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
            f"{config}: not the description of a network (expected in sapiens_accel: keypoints, a list of names, and "
            f"input_hw, two sizes of up to {LARGEST_SIDE} px). Correct it, or move the weights to another folder"
        )
    return ours, None if names is None else tuple(names)


def _in_order(id2name: Any) -> tuple[str, ...] | None:
    """{0: 'nose', ...} as a tuple; None if it is none, or holds transformers' placeholders LABEL_0, ..."""
    if not isinstance(id2name, dict) or not all(str(key).isdigit() for key in id2name):
        return None
    names = tuple(str(id2name[key]) for key in sorted(id2name, key=int))
    return None if not names or all(re.fullmatch(r"LABEL_\d+", name) for name in names) else names


# ---- Renaming


def family_of(tensors: State) -> Family | None:
    """The family of a network, by the names of its blocks in any layout."""
    families: tuple[Family, ...] = ("sapiens", "sapiens2")
    return next((one for one in families if any(re.match(_FAMILY_OF[one], key) for key in tensors)), None)


def rename(tensors: State, family: Family) -> State:
    """The tensors by our keys, fused ones split into views, without the class token and RoPE's periods."""
    ours: State = {}
    for key, value in tensors.items():
        if re.fullmatch(_NOT_NEEDED[family], key):
            continue
        # A v1 file of ours has our keys already; no published key begins like them.
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
            f"--weights {file}: no blocks of Sapiens or Sapiens2 in it (found {len(tensors)} tensors: {first}, ...)"
        )
    if any(re.match(r"(backbone\.)?tokenizer\.", key) for key in tensors):
        raise UserError(f"--weights {file}: a network with a window tokenizer, 1b-4k (expected one without)")
    return family


def _split(key: str, value: Tensor) -> State:
    for fused, parts in _FUSED.items():
        is_whole = value.ndim > 0 and len(value) % len(parts) == 0
        if key.startswith("backbone.") and f".{fused}." in key and is_whole:
            pieces = zip(parts, value.chunk(len(parts)), strict=True)
            return {key.replace(f".{fused}.", f".{part}."): piece for part, piece in pieces}
    return {key: value}


# ---- Without a copy of the file in memory

DONT_NEED = 4  # madvise(2): the pages are read again when they are used again
MAPPED = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) ...p \S+ \S+ (?!0 )\d+ +/", re.MULTILINE)  # private, of a file

# safetensors' names; it orders tensors by this number, then by name.
_DTYPES = {
    torch.float64: ("F64", 13), torch.float32: ("F32", 10), torch.bfloat16: ("BF16", 8), torch.float16: ("F16", 7),
}  # fmt: skip


class MappedPages:
    """The memory of this process that is mapped from files: what was read of it can be given back at once.

    A process that copies a mapped file, tensor by tensor, would otherwise hold the copy and the file.
    """

    def __init__(self) -> None:
        try:
            text = Path("/proc/self/maps").read_text()
        except OSError:  # not Linux: nothing is given back
            text = ""
        self._ranges = [(int(start, 16), int(end, 16)) for start, end in MAPPED.findall(text)]

    def give_back(self, tensor: Tensor) -> None:
        """Give the pages of this tensor back if it is mapped from a file; they keep their content."""
        start, size = tensor.data_ptr(), tensor.untyped_storage().nbytes() if tensor.is_contiguous() else 0
        size = min(size, tensor.numel() * tensor.element_size())
        # Whole pages only: the first and the last may hold parts of other tensors.
        first, last = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, (start + size) // mmap.PAGESIZE * mmap.PAGESIZE
        if first < last and any(low <= first and last <= high for low, high in self._ranges):
            ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), DONT_NEED)


class Entry(NamedTuple):
    """What a file will hold under a key."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def save_one_by_one(
    path: Path, entries: Mapping[str, Entry], tensors: Iterable[tuple[str, Tensor]], metadata: Mapping[str, str]
) -> None:
    """Write a safetensors file whose tensors are computed one at a time, in any order: the bytes of `save_file`.

    Args:
        tensors: a tensor for each entry, of its shape; cast to its dtype.

    Raises:
        ValueError: they are not those of the entries.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    at, offsets = 0, {}
    for key, entry in sorted(entries.items(), key=lambda item: (-_DTYPES[item[1].dtype][1], item[0])):
        num = entry.dtype.itemsize * torch.Size(entry.shape).numel()
        header[key] = {"dtype": _DTYPES[entry.dtype][0], "shape": list(entry.shape), "data_offsets": [at, at + num]}
        offsets[key], at = at, at + num
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        begin, left = file.tell(), set(entries)
        for key, tensor in tensors:
            if key not in left or tuple(tensor.shape) != entries[key].shape:
                raise ValueError(f"{key}: {tuple(tensor.shape)} is not an entry that is still to be written")
            left.remove(key)
            values = tensor.detach().to("cpu", entries[key].dtype).contiguous()
            file.seek(begin + offsets[key])
            file.write(values.view(-1).view(torch.uint8).numpy().data)
        if left:
            raise ValueError(f"no tensor for {sorted(left)[0]}")
