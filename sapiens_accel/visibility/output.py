"""The second output of a network: the probabilities that each keypoint is present and that it is visible.

Present means that people would label it (v > 0), visible that it is not hidden either (v = 2). Both are logistic
regressions on a description of the keypoint: the features that the head sees, averaged where the keypoint's heatmap is
high, and the shape of the heatmap. The network does not learn from them. They are a file of their own beside
model.safetensors, which stays what transformers loads.

Shape letters: b people, k keypoints, c channels of the features, d numbers of a description, h w the heatmap.
"""

import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from jaxtyping import Float
from numpy import ndarray as Array
from safetensors import safe_open
from torch import Tensor, nn

from sapiens_accel.errors import UserError

FILE, WEIGHTS = "visibility.safetensors", "model.safetensors"
NUM_PIECES, PIECE = 256, 4096  # of a fingerprint
OUTPUTS = ("present", "visible")
NUM_SHAPE = 7  # numbers of a description that are of the heatmap
LOG_FLOOR = 0.01  # peaks below it are alike
EMPTY = 1e-12  # the mass of a heatmap that is nowhere above 0
LARGEST = 65504.0  # of a description: what fp16 holds, in which those of many people are kept


def describe(
    features: Float[Tensor, "b c grid_h grid_w"], heatmaps: Float[Tensor, "b k h w"]
) -> Float[Tensor, "b k d"]:
    """Each keypoint in c + NUM_SHAPE numbers, in float32.

    The mean of the features, weighted by the square of the heatmap; its peak, the logarithm of that, the mean peak of
    the person's keypoints, the center of those weights (x and y from -1 to 1 over the crop), its squared distance from
    the middle and their spread, in the same unit.
    """
    features, heatmaps = features.float(), heatmaps.float()
    cell = heatmaps.shape[-1] // features.shape[-1]
    weights = F.avg_pool2d(heatmaps.clamp_min(0), cell).square()
    weights = weights / (weights.sum(dim=(2, 3), keepdim=True) + EMPTY)
    pooled = torch.einsum("bkhw,bchw->bkc", weights, features)
    peak = heatmaps.amax(dim=(2, 3))
    x, y = (torch.linspace(-1, 1, num, device=features.device) for num in (features.shape[3], features.shape[2]))
    columns, rows = weights.sum(dim=2), weights.sum(dim=3)
    center_x, center_y = columns @ x, rows @ y
    spread = columns @ x.square() + rows @ y.square() - center_x.square() - center_y.square()
    mean_peak = peak.mean(dim=1, keepdim=True).expand_as(peak)
    outside = center_x.square() + center_y.square()
    shape = (peak, peak.clamp_min(LOG_FLOOR).log(), mean_peak, center_x, center_y, outside, spread)
    return torch.cat([pooled, torch.stack(shape, dim=-1)], dim=-1).clamp(-LARGEST, LARGEST)


class VisibilityOutput(nn.Module):
    """Features and heatmaps to probabilities of `OUTPUTS`; visible is present times visible if it is present.

    Args:
        names: of the keypoints.
        weight, bias: of the regressions: present, and visible if it is present.
        about: where it is from and how good it is, for JSON.
    """

    weight: Tensor
    bias: Tensor

    def __init__(
        self,
        names: Sequence[str],
        weight: Float[Tensor, "2 k d"],
        bias: Float[Tensor, "2 k"],
        about: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.names, self.about = tuple(names), dict(about or {})
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(
        self, features: Float[Tensor, "b c grid_h grid_w"], heatmaps: Float[Tensor, "b k h w"]
    ) -> Float[Tensor, "b k 2"]:
        return self.judge(describe(features, heatmaps))

    def judge(self, descriptions: Float[Tensor, "b k d"]) -> Float[Tensor, "b k 2"]:
        """The probabilities of keypoints that are described."""
        logits = torch.einsum("bkd,okd->bko", descriptions, self.weight) + self.bias.T
        present, visible_if_present = logits.sigmoid().unbind(-1)
        return torch.stack([present, present * visible_if_present], dim=-1)

    @property
    def description(self) -> str:
        """What it was fitted on, in a line."""
        num, others = self.about.get("people"), self.about.get("calibration_people")
        return f"visibility: fitted on {num} labeled people, calibrated on {others} validation people"

    def select(self, names: Sequence[str]) -> "VisibilityOutput":
        """That of some keypoints, by their names, which are all among its own."""
        rows = [self.names.index(name) for name in names]
        return VisibilityOutput(names, self.weight[:, rows], self.bias[:, rows], self.about)


def save(folder: Path, output: VisibilityOutput | None) -> None:
    """Write a weights folder's file, after its weights; without an output, remove the file that is there."""
    if output is None:
        (folder / FILE).unlink(missing_ok=True)
        return
    temporary = folder / f".{FILE}.tmp"
    about = {"keypoints": json.dumps(output.names), "about": json.dumps(output.about)}
    about["weights"] = _fingerprint(folder / WEIGHTS)
    tensors = {name: tensor.contiguous() for name, tensor in output.state_dict().items()}
    temporary.write_bytes(safetensors.torch.save(tensors, about))  # `save_file` gives others no access
    temporary.replace(folder / FILE)


@contextmanager
def replacing_weights(folder: Path) -> Iterator[None]:
    """Write other weights into a folder: what is of the weights before is removed once they are replaced, not sooner.

    Meanwhile it has another name, so that a process that is killed leaves no weights with the output of others.
    """
    file, aside = folder / FILE, folder / f".{FILE}.before"
    if file.is_file():
        file.replace(aside)
    try:
        yield
    finally:
        if aside.is_file():
            aside.replace(file)
            try:
                read(folder)
            except UserError:
                file.unlink()


def read(folder: Path, names: Sequence[str] | None = None) -> VisibilityOutput | None:
    """The output of a weights folder; None where it has none.

    Args:
        names: the keypoints that are wanted. Default: all, in the file's order.

    Raises:
        UserError: the file is damaged, of other weights than those beside it, or lacks one of the keypoints.
    """
    file = folder / FILE
    if not file.is_file():
        return None
    try:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
            keypoints, about = json.loads(metadata["keypoints"]), json.loads(metadata["about"])
            output = VisibilityOutput(keypoints, opened.get_tensor("weight"), opened.get_tensor("bias"), about)
        if output.weight.shape[:2] != (2, len(keypoints)) or output.bias.shape != (2, len(keypoints)):
            raise ValueError(f"{len(keypoints)} keypoints, weight of {tuple(output.weight.shape)}")
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{file}: not the visibility output of weights ({reason}). Remove it, or copy it again"
        ) from None
    expected, found = metadata.get("weights"), _fingerprint(folder / WEIGHTS)
    if found != expected:
        raise UserError(
            f"{file}: made for other weights than {WEIGHTS} beside it (expected size and checksum {expected}, found "
            f"{found or 'no file'}). Remove it, or copy both again"
        )
    lacking = [name for name in names or () if name not in output.names]
    if lacking:
        found = f"found {len(output.names)} of other names"
        raise UserError(f"{file}: lacks the keypoint {lacking[0]!r} ({found}). Remove it to predict without visibility")
    return output if names is None else output.select(names)


def _fingerprint(file: Path) -> str:
    """Size, and CRC-32 of pieces spread over the file.

    A step changes all that learns. Where that is the head alone, it is more than the file between two pieces: with 64
    of them that of Sapiens2 5B would not be.
    """
    if not file.is_file():
        return ""
    size, checksum = file.stat().st_size, 0
    with file.open("rb") as stream:
        for index in range(NUM_PIECES):
            stream.seek(max(0, size - PIECE) * index // (NUM_PIECES - 1))
            checksum = zlib.crc32(stream.read(PIECE), checksum)
    return f"{size}-{checksum:08x}"


def name_columns(visibility: Float[Array, "k 2"] | None, decimals: int = 4) -> dict[str, list[float]]:
    """A person's probabilities as lists, by the names that they have in results: keypoint_present, keypoint_visible."""
    if visibility is None:
        return {}
    columns = visibility.astype(np.float64).round(decimals).T.tolist()
    return {f"keypoint_{name}": column for name, column in zip(OUTPUTS, columns, strict=True)}


@contextmanager
def watch_head(head: nn.Module, reader: Any) -> Iterator[list[Tensor]]:
    """Collect `reader(features, heatmaps)` of each forward pass of a head."""
    collected: list[Tensor] = []

    def read_pass(_: nn.Module, inputs: tuple[Any, ...], heatmaps: Tensor) -> None:
        collected.append(reader(inputs[0], heatmaps))

    hook = head.register_forward_hook(read_pass)
    try:
        yield collected
    finally:
        hook.remove()
