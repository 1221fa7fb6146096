"""MovingAverage: the fp32 moving average of a network's parameters, where it is kept, and the network that runs it."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor, nn

from sapiens_accel.config.schema import Place
from sapiens_accel.runtime import distributed, launch

PIECE = 2**22  # elements that are worked on at a time: what is allocated on the way does not grow with the network
ALIGN = 64  # elements: in the flat copy every tensor begins where the fast kernels want it


class Ranks(NamedTuple):
    """The ranks among which an average is shared; one of its own by default.

    Attributes:
        share: fills a flat tensor of one equal part for each rank, of which each has written its own, on all of them.
    """

    rank: int = 0
    num: int = 1
    share: Callable[[Tensor], None] = lambda whole: None


class Cut(NamedTuple):
    """A run of elements of one parameter: where it is in there, its average, and its copy for the forward if any."""

    of: slice
    mean: Float[Tensor, "n"]
    copy: Tensor | None


class MovingAverage:
    """mean <- mean + (student - mean) * (1 - decay) for every parameter, in fp32.

    `network` runs the average forward; its buffers stay as they are. Where its fp32 values are kept:

    - `device`: they are the network's own parameters. Under mixed precision its forward needs autocast.
    - `sharded`: each rank keeps its part of them, and a copy of the whole in `dtype`, which is the network.
    - `host`: as `sharded`, each rank's part in host memory.

    Subtracting, scaling and adding are three operations, each correctly rounded: fused in a `lerp` they would be
    rounded differently from device to device, and on a CPU with the place of an element. So all three ways, any number
    of ranks and any device give the same bits.

    Args:
        network: a network of its own with the student's values in fp32. Where it is on the host and the average is not
            kept on `device`, nothing of it is ever there in fp32.
        device: where the forward runs; by default where the network is.
        dtype: of the copy, for `sharded` and `host`.
    """

    def __init__(
        self,
        network: nn.Module,
        place: Place = "device",
        *,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        ranks: Ranks | None = None,
    ) -> None:
        self.network = network.float().eval().requires_grad_(False)
        self.ranks = ranks or Ranks()
        device = device or next(network.parameters()).device
        self._own: Tensor | None = None  # this rank's part of the flat average
        self._copy: Tensor | None = None  # all of it in `dtype`; the network's parameters are views of it
        # Through these, pinned, the host's part goes down and up: pinning the part itself would round its size up to a
        # power of two.
        self._down: Tensor | None = None
        self._up: Tensor | None = None
        if place == "device":
            network.to(device)
            flat = [parameter.detach().view(-1) for parameter in network.parameters()]
            self._cuts = [[Cut(of, values[of], None) for of in _pieces(0, len(values))] for values in flat]
        else:
            self._cuts = self._split(device, torch.device("cpu") if place == "host" else device, dtype)

    def _split(self, device: torch.device, place: torch.device, dtype: torch.dtype) -> list[list[Cut]]:
        """Lay the parameters out one behind the other, and take this rank's part of them."""
        parameters = list(self.network.parameters())
        starts, total = [], 0
        for parameter in parameters:
            starts.append(total)
            total += _rounded(parameter.numel(), ALIGN)
        part = _rounded(total, ALIGN * self.ranks.num) // self.ranks.num
        first = self.ranks.rank * part
        self._own = own = torch.zeros(part, device=place)
        self._copy = copy = torch.zeros(self.ranks.num * part, dtype=dtype, device=device)
        if place != device:
            self._up = torch.empty(min(PIECE, part), dtype=dtype, pin_memory=True)
        cuts = []
        for start, parameter in zip(starts, parameters, strict=True):
            values = parameter.detach().flatten()
            end = start + len(values)
            copy[start:end].copy_(values)
            # Tensor by tensor: the fp32 one goes as its copy comes.
            parameter.data = copy[start:end].view(parameter.shape)
            mine = _pieces(max(start, first), min(end, first + part))
            cuts.append(
                [
                    Cut(slice(at.start - start, at.stop - start), own[at.start - first : at.stop - first], copy[at])
                    for at in mine
                ]
            )
            for cut in cuts[-1]:
                cut.mean.copy_(values[cut.of])
        for name, buffer in self.network.named_buffers():
            owner, _, last = name.rpartition(".")
            self.network.get_submodule(owner)._buffers[last] = buffer.to(device)
        return cuts

    @torch.no_grad()
    def update(self, student: Iterable[Tensor], decay: float) -> None:
        """Move towards the student's whole parameters, given in the network's order. All ranks must call it."""
        for cuts, values in zip(self._cuts, student, strict=True):
            for cut in cuts:
                change = self._beside(values.detach().flatten()[cut.of]) - cut.mean
                cut.mean.add_(change.mul_(1 - decay))
                self._forward(cut)
        if self._copy is not None:
            self.ranks.share(self._copy)

    def _beside(self, values: Tensor) -> Tensor:
        """The student's values where the average is."""
        if self._up is None:
            return values
        if self._down is None:
            self._down = torch.empty(len(self._up), dtype=values.dtype, pin_memory=True)
        return self._down[: len(values)].copy_(values)

    def _forward(self, cut: Cut) -> None:
        """Let the network follow the average."""
        if cut.copy is not None:
            cut.copy.copy_(cut.mean if self._up is None else self._up[: len(cut.mean)].copy_(cut.mean))

    def sample(self) -> Float[Tensor, "n"]:
        """Up to 64 fp32 values of each of up to 64 places, spread over this rank's part; to see whether they move."""
        cuts = [cut.mean for cuts in self._cuts for cut in cuts]
        cuts = cuts[:: max(1, len(cuts) // 64)]
        return torch.cat([mean[:: max(1, len(mean) // 64)][:64] for mean in cuts])

    def state_dict(self) -> dict[str, Tensor]:
        """The average, whole, in fp32, and the network's buffers, on the CPU of rank 0 (empty elsewhere).

        All ranks must call it. To be written before the next update: what is there already is not copied.
        """
        whole = self._gathered()
        if self.ranks.rank:
            return {}
        state = {name: value.cpu() for name, value in self.network.state_dict().items()}
        if whole is not None and self._copy is not None:
            for name, parameter in self.network.named_parameters():
                start = parameter.storage_offset()
                state[name] = whole[start : start + parameter.numel()].view(parameter.shape)
        return state

    def _gathered(self) -> Tensor | None:
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
        """What `state_dict` gave on rank 0, on every rank; kept in any place, among any number of ranks.

        Raises:
            RuntimeError: other names or shapes.
        """
        self.network.load_state_dict(state)
        for cuts, (name, _) in zip(self._cuts, self.network.named_parameters(), strict=True):
            for cut in cuts:
                cut.mean.copy_(state[name].flatten()[cut.of])


def _rounded(num: int, unit: int) -> int:
    return math.ceil(num / unit) * unit


def _pieces(start: int, stop: int, most: int = PIECE) -> list[slice]:
    return [slice(at, min(at + most, stop)) for at in range(start, stop, most)]


def moving_average(accelerator: Accelerator, network: nn.Module, place: Place) -> MovingAverage:
    """The average of what `network` begins with, shared among the ranks where it is not kept whole on the device."""
    if place == "host":
        launch.use_all_cores()
    several = accelerator.num_processes > 1
    ranks = Ranks(accelerator.process_index, accelerator.num_processes, distributed.share_parts) if several else Ranks()
    dtype = distributed.autocast_dtype(accelerator) or torch.float32
    return MovingAverage(network, place, device=accelerator.device, dtype=dtype, ranks=ranks)
