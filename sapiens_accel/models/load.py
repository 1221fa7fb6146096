"""Load a weights file into a network, with a report of every tensor."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sapiens_accel.config.schema import STAGES, BaseDtype, StageName
from sapiens_accel.errors import UserError
from sapiens_accel.models import checkpoint_formats as published
from sapiens_accel.models import quantized
from sapiens_accel.models.checkpoint_formats import FILE, MappedPages, State, Weights
from sapiens_accel.models.sapiens import SIZES, SapiensPose, resize_positions

FROM_RANDOM = "starts from RANDOM weights; to start from published weights, or from those of a run, give --weights"
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
POSITIONS = "backbone.embeddings.position_embeddings"


@dataclass(frozen=True, kw_only=True)
class Report:
    """The result of loading, tensor by tensor.

    Attributes:
        source: the file.
        loaded: tensors of the model that were loaded unchanged.
        reshaped: tensors of the model that were resized from the file's (position embeddings).
        mapped: tensors of the model whose rows were copied by keypoint name.
        reinitialized: tensors of the model that stay random: the file's have another shape or unknown keypoints.
        missing: tensors of the model that stay random: the file has none.
        unused: tensors of the file that were not loaded.
        mapping: how many keypoints were mapped and where their names are from, for the report.
        new_keypoints: keypoints of the run that the file lacks; their rows stay random.
        values: what was loaded, as views of the mapped file where they are unchanged.
    """

    source: str
    loaded: list[str]
    reshaped: list[str]
    mapped: list[str]
    reinitialized: list[str]
    missing: list[str]
    unused: list[str]
    mapping: str = ""
    new_keypoints: tuple[str, ...] = ()
    values: State = field(default_factory=dict, repr=False)

    def __str__(self) -> str:
        lines = [f"weights from {self.source}"]
        for name in ("loaded", "reshaped", "mapped", "reinitialized", "missing", "unused"):
            keys: list[str] = getattr(self, name)
            if keys or name == "missing":
                lines.append(f"  {name:<14}{len(keys):>5}  {_shorten(keys)}".rstrip())
                lines[-1] += f": {self.mapping}" if name == "mapped" else ""
                lines[-1] += " (random)" if name == "missing" and keys else ""
        if self.new_keypoints:
            lines.append(f"  {'new keypoints':<14}{len(self.new_keypoints):>5}  {_shorten(self.new_keypoints, 8)}")
        return "\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class Home:
    """Where the parameters of a network are to be: a device, and a dtype (None: each in its own).

    Attributes:
        base_dtype: the matrices of the blocks are rounded to this type.
    """

    device: str | torch.device = "cpu"
    dtype: torch.dtype | None = None
    base_dtype: BaseDtype | None = None


def goes_to_device(zero: int, *, sixteen: bool, adapted: bool, teacher: bool, frozen: bool) -> bool:
    """Whether a stage loads its weights straight onto a GPU, in their final dtype, and not in fp32 on the host.

    ZeRO-3 shards them from the host. The average of a teacher begins with fp32 values; and frozen values that the
    engine rounds are exported as they were. Under adapters a file holds those.

    Args:
        zero: DeepSpeed's ZeRO stage; 0 without it.
        sixteen: the weights have 16 bits.
        frozen: some parameters do not learn.
    """
    return zero < 3 and (adapted or not (teacher or (frozen and sixteen)))


def load(model: SapiensPose, reference: str, names: Sequence[str] | None = None, home: Home | None = None) -> Report:
    """Load a file or folder into the model.

    Tensor by tensor, from the mapped file to its place: beside the network, one tensor of the file is in memory.

    Position embeddings are resized to the model's grid. The rows of the head's last layer are matched by keypoint name
    if the file's names are known (from its metadata, a config.json beside it or, for a published layout, their number),
    else by position if there are as many; else that layer stays random.

    Args:
        model: on any device, or without values in its backbone (`SapiensPose(empty=True)`); values that the file lacks
            stay as they are.
        reference: a local file or folder; see `published.find`.
        names: keypoints of the run; None matches rows by position.
        home: where to put the parameters; by default where the network is, those without values on the CPU.

    Raises:
        UserError: as `published.read`; weights of another size or family; a tensor of the backbone that is missing or
            does not fit; values that are integers or complex, or not finite.
    """
    weights, own = published.read(reference), model.state_dict()
    _check_size(weights, model)
    _check_types(weights, own)
    state = dict(weights.state)
    reshaped = _fit_positions(state, weights, own, model)
    mapping, new = _fit_rows(state, weights, own, model, names)
    mapped = list(_rows(model)) if mapping else []
    fitting = {key: value for key, value in state.items() if key in own and value.shape == own[key].shape}
    absent = [key for key in own if key not in fitting]
    _check_backbone(weights, state, own, absent, model)
    pages = MappedPages()
    for key, value in fitting.items():  # all of them first: a file that is refused changes nothing
        _check_value(weights, key, value, torch.finfo(own[key].dtype).max)
        pages.give_back(value)
    for key, value in fitting.items():
        _put(model, key, value, home)
        pages.give_back(value)
    if home is not None:
        _move(model, home)
    return Report(
        source=str(weights.file),
        loaded=sorted(set(fitting) - {*reshaped, *mapped}),
        reshaped=reshaped,
        mapped=mapped,
        reinitialized=[key for key in absent if key in weights.state],
        missing=[key for key in absent if key not in weights.state],
        unused=sorted(set(weights.state) - set(fitting)),
        mapping=mapping,
        new_keypoints=new,
        values=fitting,
    )


def load_fixed(folder: Path, home: Home) -> SapiensPose:
    """The network of a weights folder, in evaluation mode and without gradients.

    Raises:
        UserError: as `description` and `load`.
    """
    about = description(folder)
    model = SapiensPose(about["name"], about["num_keypoints"], tuple(about["input_hw"]), empty=True)
    load(model, str(folder), home=home)
    return model.eval().requires_grad_(False)


def starting_point(run_folder: Path, stage: StageName) -> str | None:
    """The weights of the last stage before this one in the run directory, if there are any."""
    for earlier in reversed(STAGES[: STAGES.index(stage)]):
        if (run_folder / earlier / "weights" / FILE).is_file():
            return str(run_folder / earlier / "weights")
    return None


def description(folder: Path) -> dict[str, Any]:
    """The network's description that `export.export` wrote: name, num_keypoints, input_hw, sigma, keypoints.

    Raises:
        UserError: this package did not write the folder.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(f"{folder}: no config.json in it (expected a weights folder)")
    about, _ = published.read_config(file)
    if not isinstance(about.get("name"), str):
        raise UserError(f"{file}: no 'sapiens_accel' with a name in it (expected a weights folder of this package)")
    return about


# ---- Checks


def _check_size(weights: Weights, model: SapiensPose) -> None:
    patches = {"sapiens": "patch_embeddings.projection.weight", "sapiens2": "patch_embeddings.weight"}
    projection = weights.state.get(f"backbone.embeddings.{patches[weights.family]}")
    blocks = [int(block[1]) for key in weights.state if (block := re.search(r"^backbone\..*\.layer\.(\d+)\.", key))]
    width, depth = len(projection) if projection is not None and projection.ndim else None, max(blocks, default=-1) + 1
    if weights.family == model.size.family and width in (model.size.width, None) and depth == model.size.depth:
        return
    sizes = [
        name for name, size in SIZES.items() if (size.family, size.width, size.depth) == (weights.family, width, depth)
    ]
    what = f"{sizes[0]} ({width} wide, {depth} blocks)" if sizes else f"a {weights.family} {width} wide, {depth} blocks"
    ours = f"{model.name} is {model.size.width} wide, {model.size.depth} blocks"
    remedy = f"Give --model.name {sizes[0]}, or other weights" if sizes else "Give weights of this size"
    family = "" if weights.family == model.size.family else f", and of family {model.size.family}"
    raise UserError(f"--weights {weights.file}: this is {what}; {ours}{family}. {remedy}")


def _check_backbone(weights: Weights, state: State, own: State, absent: Sequence[str], model: SapiensPose) -> None:
    lost = [key for key in absent if key.startswith("backbone.")]
    if not lost:
        return
    first, expected = lost[0], "x".join(map(str, own[lost[0]].shape))
    what = f"is {'x'.join(map(str, state[first].shape))}" if first in state else "is missing"
    raise UserError(
        f"--weights {weights.file}: {first!r} {what}; {model.name} at {model.input_hw[0]}x{model.input_hw[1]} needs "
        f"{expected} ({len(lost)} backbone tensors are missing or do not fit). Download the file again, or give others"
    )


def _check_types(weights: Weights, own: State) -> None:
    """Refuse values that would become other ones as floats: those of quantized weights, say."""
    for key, value in weights.state.items():
        if key in own and own[key].is_floating_point() and value.dtype not in FLOATS:
            kind, known = str(value.dtype).removeprefix("torch."), ", ".join(str(one)[6:] for one in FLOATS)
            raise UserError(
                f"--weights {weights.file}: {key!r} is of type {kind} (expected one of {known}). Use weights that are "
                "not quantized"
            )


def _check_value(weights: Weights, key: str, value: Tensor, most: float) -> None:
    """Refuse values that are not finite, or too large for the network's dtype."""
    values = value if value.dtype in FLOATS else value.float()
    low, high = (float(bound) for bound in torch.aminmax(values.detach()))
    if not (-most <= low and high <= most):
        bad = int((~(values.double().abs() <= most)).sum())
        raise UserError(
            f"--weights {weights.file}: {key!r} holds {bad} values of {value.numel()} that are not finite numbers "
            f"(nan, inf): the training that wrote it has diverged. Use weights of an earlier step"
        )


# ---- Places


def _put(model: SapiensPose, key: str, value: Tensor, home: Home | None) -> None:
    """Copy a value into a parameter or buffer of the model, or create the parameter if it has no value yet."""
    owner, _, name = key.rpartition(".")
    module = model.get_submodule(owner)
    own = getattr(module, name)
    with torch.no_grad():
        if not own.is_meta:
            own.copy_(value)
            return
        home = home or Home()
        if home.base_dtype and name == "weight" and quantized.is_matrix(module, owner):
            quantized.replace(model, owner, value.to(home.device), home.base_dtype)
            return
        # A copy in any case: the value may be a view of the mapped file.
        there = value.to(device=home.device, dtype=home.dtype or own.dtype, copy=True)
    setattr(module, name, nn.Parameter(there, requires_grad=own.requires_grad))
    model.keep_first_slot_empty()


def _move(model: SapiensPose, home: Home) -> None:
    """Move all that is not at home yet: parameters that the file lacks, and buffers, which keep their dtype."""
    for parameter in model.parameters():
        dtype = home.dtype if parameter.is_floating_point() else None
        parameter.data = parameter.data.to(home.device, dtype or parameter.dtype)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(home.device)


# ---- Positions


def _fit_positions(state: State, weights: Weights, own: State, model: SapiensPose) -> list[str]:
    """Resize Sapiens v1's position embedding to the model's grid, after VitPose's empty slot 0. Returns resized keys.

    A published embedding may begin with a class position; it has the shape of that slot and must not be loaded into it.
    """
    if POSITIONS not in state or POSITIONS not in own or state[POSITIONS].shape[::2] != own[POSITIONS].shape[::2]:
        return []
    source, patch = state[POSITIONS], model.size.patch
    target_hw, known_hw = ((hw[0] // patch, hw[1] // patch) for hw in (model.input_hw, weights.input_hw or (0, 0)))
    counts = [source.shape[1], source.shape[1] - 1] if weights.as_published else [source.shape[1] - 1]
    grid_hw = _grid_hw(counts, known_hw, target_hw)
    if grid_hw is None:
        return []
    patches = source[:, source.shape[1] - grid_hw[0] * grid_hw[1] :]
    if grid_hw != target_hw:
        patches = resize_positions(patches, grid_hw, target_hw)
    empty = torch.zeros_like(own[POSITIONS][:, :1], device=patches.device)
    state[POSITIONS] = torch.cat([empty, patches], dim=1)
    return [POSITIONS] if grid_hw != target_hw else []


def _grid_hw(counts: Sequence[int], known_hw: tuple[int, int], target_hw: tuple[int, int]) -> tuple[int, int] | None:
    """The grid of a number of patches (the first count that has one): the known one, square, 4:3, or the model's."""
    for count in counts:
        side, unit = math.isqrt(count), math.isqrt(count // 12)
        # As published: square in pre-training, 4:3 for pose.
        for grid_hw in (known_hw, (side, side), (4 * unit, 3 * unit), target_hw):
            if grid_hw[0] * grid_hw[1] == count:
                return grid_hw
    return None


# ---- Keypoints


def _rows(model: SapiensPose) -> tuple[str, str]:
    layer = published.predictor(model.size.family)
    return f"{layer}.weight", f"{layer}.bias"


def _fit_rows(
    state: State, weights: Weights, own: State, model: SapiensPose, names: Sequence[str] | None
) -> tuple[str, tuple[str, ...]]:
    """Reorder the last layer's rows by keypoint name. Returns a description, and the keypoints without a row.

    The description is empty if the rows are in this order already, or if the file's names are unknown.
    """
    keys = _rows(model)
    if names is None or weights.names in (None, tuple(names)) or not all(key in state for key in keys):
        return "", ()
    shared = [name for name in names if name in weights.names]
    if not shared or any(state[key].shape != (len(weights.names), *own[key].shape[1:]) for key in keys):
        # No keypoint in common, even if their number is equal; or another number of channels.
        for key in keys:
            del state[key]
        return "", ()
    to, source = ([list(order).index(name) for name in shared] for order in (names, weights.names))
    for key in keys:
        rows = own[key].detach().clone()
        rows[to] = state[key][source].to(rows)
        state[key] = rows
    total = f"of the file's {len(weights.names)} (by {weights.names_from})"
    description = f"{len(shared)} of {len(names)} keypoints by name, {total}"
    return description, tuple(name for name in names if name not in shared)


def _shorten(keys: Sequence[str], at_most: int = 2) -> str:
    return ", ".join(keys[:at_most]) + (", ..." if len(keys) > at_most else "")
