"""The fp32 moving average of a network's parameters: on the device, sharded over the ranks, or in host memory."""

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from copy import deepcopy
from typing import NamedTuple

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor, nn

from sapiens_accel.config.schema import TeacherPlacement
from sapiens_accel.runtime import distributed, launch

PIECE = 2**22  # elements processed at a time: temporary memory does not grow with the network
ALIGN = 64  # elements: alignment of every tensor in the flat copy, as the fast kernels need it


class Ranks(NamedTuple):
    """The ranks that share an average; by default only this one.

    Attributes:
        share: all-gathers in place a flat tensor of equal parts, of which each rank has written its own.
    """

    rank: int = 0
    num: int = 1
    share: Callable[[Tensor], None] = lambda whole: None


class Segment(NamedTuple):
    """Consecutive elements of one parameter, their average, and their copy for the forward, if there is one."""

    elements: slice
    mean: Float[Tensor, "n"]
    copy: Tensor | None


class MovingAverage:
    """mean <- mean + (student - mean) * (1 - decay) for every parameter, in fp32.

    `network` runs the average forward; its buffers stay as they are. Where its fp32 values are kept:

    - `device`: they are the network's own parameters. Under mixed precision its forward needs autocast.
    - `sharded`: each rank keeps its part of them, and a copy of the whole in `dtype`, which is the network.
    - `host`: as `sharded`, each rank's part in host memory.

    Subtracting, scaling and adding are three operations, each correctly rounded: fused in a `lerp` they would be
    rounded differently from device to device, and on a CPU with the position of an element. So all three ways, any
    number of ranks and any device give the same bits.

    Args:
        network: a separate network with the student's values in fp32. If it is on the host and the placement is not
            `device`, its fp32 values are never copied to the device.
        device: where the forward runs; by default where the network is.
        dtype: of the copy, for `sharded` and `host`.
        names: parameters that are averaged, in the network's order; the others are left as and where they are, and
            are in no state dict. Default: all.
    """

    def __init__(
        self,
        network: nn.Module,
        placement: TeacherPlacement = "device",
        *,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        ranks: Ranks | None = None,
        names: Collection[str] | None = None,
    ) -> None:
        self._is_whole = names is None
        self.network = (network.float() if self._is_whole else network).eval()
        self.ranks = ranks or Ranks()
        self._averaged = {name: p for name, p in network.named_parameters() if names is None or name in names}
        for parameter in self._averaged.values():
            parameter.data = parameter.data.float()
            parameter.requires_grad_(False)
        device = device or next(network.parameters()).device
        self._own: Tensor | None = None  # this rank's part of the flat average
        self._copy: Tensor | None = None  # all of it in `dtype`; the network's parameters are views of it
        # Pinned buffers through which the host's part is copied: pinning the part itself would round its size up to a
        # power of two.
        self._down: Tensor | None = None
        self._up: Tensor | None = None
        self._move_buffers(device)
        if placement == "device":
            for parameter in self._averaged.values():
                parameter.data = parameter.data.to(device)
            flat = [parameter.detach().view(-1) for parameter in self._averaged.values()]
            self._segments = [
                [Segment(piece, values[piece], None) for piece in _pieces(0, len(values))] for values in flat
            ]
        else:
            self._segments = self._split(device, torch.device("cpu") if placement == "host" else device, dtype)

    def _split(self, device: torch.device, device_of_average: torch.device, dtype: torch.dtype) -> list[list[Segment]]:
        """Lay the parameters out one after the other in a flat buffer, and take this rank's part of it."""
        parameters = list(self._averaged.values())
        starts, total = [], 0
        for parameter in parameters:
            starts.append(total)
            total += _rounded(parameter.numel(), ALIGN)
        part = _rounded(total, ALIGN * self.ranks.num) // self.ranks.num
        first = self.ranks.rank * part
        self._own = own = torch.zeros(part, device=device_of_average)
        self._copy = copy = torch.zeros(self.ranks.num * part, dtype=dtype, device=device)
        if device_of_average != device:
            self._up = torch.empty(min(PIECE, part), dtype=dtype, pin_memory=True)
        segments = []
        for start, parameter in zip(starts, parameters, strict=True):
            values = parameter.detach().flatten()
            end = start + len(values)
            copy[start:end].copy_(values)
            # Tensor by tensor: each fp32 tensor is freed as soon as it is copied.
            parameter.data = copy[start:end].view(parameter.shape)
            mine = _pieces(max(start, first), min(end, first + part))
            segments.append(
                [
                    Segment(slice(at.start - start, at.stop - start), own[at.start - first : at.stop - first], copy[at])
                    for at in mine
                ]
            )
            for segment in segments[-1]:
                segment.mean.copy_(values[segment.elements])
        return segments

    def _move_buffers(self, device: torch.device) -> None:
        for name, buffer in self.network.named_buffers():
            owner, _, last = name.rpartition(".")
            self.network.get_submodule(owner)._buffers[last] = buffer.to(device)

    @torch.no_grad()
    def update(self, student: Iterable[Tensor], decay: float) -> None:
        """Move towards the student's whole parameters, those that are averaged, in the network's order.

        All ranks must call it.
        """
        for segments, values in zip(self._segments, student, strict=True):
            for segment in segments:
                change = self._move_to_average(values.detach().flatten()[segment.elements]) - segment.mean
                segment.mean.add_(change.mul_(1 - decay))
                self._copy_to_network(segment)
        if self._copy is not None:
            self.ranks.share(self._copy)

    def _move_to_average(self, values: Tensor) -> Tensor:
        """The student's values on the device of the average."""
        if self._up is None:
            return values
        if self._down is None:
            self._down = torch.empty(len(self._up), dtype=values.dtype, pin_memory=True)
        return self._down[: len(values)].copy_(values)

    def _copy_to_network(self, segment: Segment) -> None:
        """Copy the new average into the network."""
        if segment.copy is not None:
            segment.copy.copy_(segment.mean if self._up is None else self._up[: len(segment.mean)].copy_(segment.mean))

    def sample(self) -> Float[Tensor, "n"]:
        """Up to 64 x 64 fp32 values, spread over this rank's part, to see whether the average moves."""
        segments = [segment.mean for segments in self._segments for segment in segments]
        segments = segments[:: max(1, len(segments) // 64)]
        return torch.cat([mean[:: max(1, len(mean) // 64)][:64] for mean in segments])

    def state_dict(self) -> dict[str, Tensor]:
        """The average, whole, in fp32, and the network's buffers, on the CPU of rank 0 (empty elsewhere).

        Without the buffers if only some parameters are averaged. All ranks must call it. Use it before the next update:
        tensors on the CPU are not copied.
        """
        whole = self._gather()
        if self.ranks.rank:
            return {}
        values = self.network.state_dict().items()
        state = {name: value.cpu() for name, value in values if self._is_whole or name in self._averaged}
        if whole is not None and self._copy is not None:
            for name, parameter in self._averaged.items():
                start = parameter.storage_offset()
                state[name] = whole[start : start + parameter.numel()].view(parameter.shape)
        return state

    def _gather(self) -> Tensor | None:
        """The flat average of all ranks on the CPU of rank 0."""
        if self._own is None or self._copy is None:
            return None
        rank, num, share = self.ranks
        if num == 1:
            return self._own.cpu()
        part = len(self._own)
        whole = torch.empty(num, part) if rank == 0 else None
        for at in _pieces(0, part, PIECE // num):
            parts = torch.empty(num, at.stop - at.start, device=self._copy.device)
            parts[rank] = self._own[at]
            share(parts.view(-1))
            if whole is not None:
                whole[:, at] = parts
        return whole.view(-1) if whole is not None else None

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load the `state_dict()` of any placement and any number of ranks. Every rank needs the whole state.

        Raises:
            RuntimeError: other names or shapes.
        """
        if not self._is_whole and state.keys() != self._averaged.keys():
            raise RuntimeError("Error(s) in loading state_dict: the average is of other parameters")
        self.network.load_state_dict(state, strict=self._is_whole)
        for segments, name in zip(self._segments, self._averaged, strict=True):
            for segment in segments:
                segment.mean.copy_(state[name].flatten()[segment.elements])


def _rounded(num: int, unit: int) -> int:
    return math.ceil(num / unit) * unit


def _pieces(start: int, stop: int, most: int = PIECE) -> list[slice]:
    return [slice(at, min(at + most, stop)) for at in range(start, stop, most)]


def moving_average(
    accelerator: Accelerator, model: nn.Module, placement: TeacherPlacement, *, shares_frozen: bool = False
) -> MovingAverage:
    """Create a moving average of the values of a model, sharded over the ranks unless its placement is `device`.

    Args:
        shares_frozen: average what learns alone. The frozen parameters are those of the model itself; under ZeRO-3,
            which shards them, a 16-bit copy on each device.
    """
    if placement == "host":
        launch.use_all_cores()
    is_parallel = accelerator.num_processes > 1
    ranks = (
        Ranks(accelerator.process_index, accelerator.num_processes, distributed.gather_parts)
        if is_parallel
        else Ranks()
    )
    dtype, device = distributed.autocast_dtype(accelerator) or torch.float32, accelerator.device
    if not shares_frozen:
        return MovingAverage(deepcopy(model), placement, device=device, dtype=dtype, ranks=ranks)
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    is_sharded = distributed.zero_stage(accelerator) == 3
    network = deepcopy(model, {} if is_sharded else {id(parameter): parameter for parameter in frozen})
    for parameter in network.parameters() if is_sharded else ():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(device, dtype)
    names = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
    return MovingAverage(network, placement, device=device, dtype=dtype, ranks=ranks, names=names)
