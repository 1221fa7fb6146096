"""What a forward saves for its backward waits in host memory; on a GPU the copies overlap with the arithmetic.

With checkpointed blocks, what is saved are the blocks' inputs: 2 * tokens * width bytes a person and block in 16 bits.
"""

from collections import deque
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

SMALLEST = 2**20  # bytes; less is not worth a copy
LEAVING = 2  # tensors on their way to the host before the arithmetic waits for the first of them


def offloaded(device: torch.device, *, wanted: bool) -> AbstractContextManager:
    """A context for one forward. Its backward may run outside, once."""
    return _Offload(device) if wanted else nullcontext()


@dataclass(kw_only=True)
class _Waiting:
    """A saved tensor on the host, and on the device again once it has been fetched."""

    index: int
    host: Tensor
    device: torch.device
    on_device: Tensor | None = None
    arrived: Any = None  # a CUDA event
    used: bool = False


class _Offload(saved_tensors_hooks):
    """The hooks hold the copies and the copies nothing: all is free as soon as the backward has been."""

    def __init__(self, device: torch.device) -> None:
        copies = _Copies(device)
        super().__init__(copies.pack, copies.unpack)
        self.waiting = copies.waiting


class _Copies:
    """Copies on a stream of their own, and in the backward one tensor ahead of what is asked for.

    A parameter is not moved (it stays on the device anyway), nor is what is small. All device memory is the compute
    stream's: it waits for a copy before memory that the copy reads or writes is used again, so no more than LEAVING
    tensors are on their way out and one on its way in, however far Python runs ahead of the device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = _stream(device) if device.type == "cuda" else None
        self.waiting: list[_Waiting] = []
        self.leaving: deque[tuple[Tensor, Any]] = deque()
        self.ahead: _Waiting | None = None

    def pack(self, tensor: Tensor) -> "Tensor | _Waiting":
        whole = tensor if tensor._base is None else tensor._base  # a linear layer saves its weight transposed
        if isinstance(whole, torch.nn.Parameter) or tensor.nbytes < SMALLEST or tensor.device.type != self.device.type:
            return tensor
        if self.stream is None:
            host = tensor.clone()
        else:
            host = torch.empty_like(tensor, device="cpu", pin_memory=True)
            compute = torch.cuda.current_stream(self.device)
            self.stream.wait_stream(compute)
            with torch.cuda.stream(self.stream):
                host.copy_(tensor, non_blocking=True)
            self.leaving.append((tensor, self.stream.record_event()))
            if len(self.leaving) > LEAVING:
                compute.wait_event(self.leaving.popleft()[1])
        item = _Waiting(index=len(self.waiting), host=host, device=tensor.device)
        self.waiting.append(item)
        return item

    def unpack(self, item: "Tensor | _Waiting") -> Tensor:
        if isinstance(item, Tensor):
            return item
        if self.stream is None:
            return item.host
        compute = torch.cuda.current_stream(self.device)
        while self.leaving:
            compute.wait_event(self.leaving.popleft()[1])
        if self.ahead is not None and self.ahead is not item:  # fetched, and not asked for
            compute.wait_event(self.ahead.arrived)
            self.ahead.on_device = None
        tensor = self._fetch(item)
        compute.wait_event(item.arrived)
        item.on_device, item.used, self.ahead = None, True, None
        if item.index and not self.waiting[item.index - 1].used:  # the backward goes from the last to the first
            self.ahead = self.waiting[item.index - 1]
            self._fetch(self.ahead)
        return tensor

    def _fetch(self, item: _Waiting) -> Tensor:
        if item.on_device is None:
            assert self.stream is not None
            item.on_device = torch.empty_like(item.host, device=item.device, pin_memory=False)
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self.stream):
                item.on_device.copy_(item.host, non_blocking=True)
            item.arrived = self.stream.record_event()
        return item.on_device


@lru_cache
def _stream(device: torch.device) -> Any:
    """One for each device: the allocator keeps memory apart by stream."""
    return torch.cuda.Stream(device)
