"""Offload the activations that a forward saves for its backward to host memory; copies overlap with compute.

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

MIN_BYTES = 2**20  # smaller tensors stay on the device
MAX_OUTGOING = 2  # copies to the host in flight before compute waits for the oldest


def offloaded(device: torch.device, *, wanted: bool) -> AbstractContextManager:
    """A context for one forward. Its backward may run outside, once."""
    return _Offload(device) if wanted else nullcontext()


@dataclass(kw_only=True)
class _OffloadedTensor:
    """A saved tensor on the host, and on the device again once it has been fetched."""

    index: int
    host: Tensor
    device: torch.device
    on_device: Tensor | None = None
    arrived: Any = None  # a CUDA event
    used: bool = False


class _Offload(saved_tensors_hooks):
    """The hooks own the copies; there is no reference cycle, so memory is free as soon as the backward has run."""

    def __init__(self, device: torch.device) -> None:
        copies = _Copies(device)
        super().__init__(copies.pack, copies.unpack)
        self.tensors = copies.tensors


class _Copies:
    """Copies on a stream of their own, in the backward one tensor ahead.

    Parameters and small tensors stay on the device. All device memory belongs to the compute stream: it waits for a
    copy before memory that the copy reads or writes is used again, so at most MAX_OUTGOING tensors are being copied out
    and one is being copied in, however far Python runs ahead of the device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = _stream(device) if device.type == "cuda" else None
        self.tensors: list[_OffloadedTensor] = []
        self.outgoing: deque[tuple[Tensor, Any]] = deque()
        self.prefetched: _OffloadedTensor | None = None

    def pack(self, tensor: Tensor) -> "Tensor | _OffloadedTensor":
        base = tensor if tensor._base is None else tensor._base  # a linear layer saves its weight transposed
        if isinstance(base, torch.nn.Parameter) or tensor.nbytes < MIN_BYTES or tensor.device.type != self.device.type:
            return tensor
        if self.stream is None:
            host = tensor.clone()
        else:
            host = torch.empty_like(tensor, device="cpu", pin_memory=True)
            compute = torch.cuda.current_stream(self.device)
            self.stream.wait_stream(compute)
            with torch.cuda.stream(self.stream):
                host.copy_(tensor, non_blocking=True)
            self.outgoing.append((tensor, self.stream.record_event()))
            if len(self.outgoing) > MAX_OUTGOING:
                compute.wait_event(self.outgoing.popleft()[1])
        item = _OffloadedTensor(index=len(self.tensors), host=host, device=tensor.device)
        self.tensors.append(item)
        return item

    def unpack(self, item: "Tensor | _OffloadedTensor") -> Tensor:
        if isinstance(item, Tensor):
            return item
        if self.stream is None:
            return item.host
        compute = torch.cuda.current_stream(self.device)
        while self.outgoing:
            compute.wait_event(self.outgoing.popleft()[1])
        if self.prefetched is not None and self.prefetched is not item:  # prefetched in vain
            compute.wait_event(self.prefetched.arrived)
            self.prefetched.on_device = None
        tensor = self._fetch(item)
        compute.wait_event(item.arrived)
        item.on_device, item.used, self.prefetched = None, True, None
        if item.index and not self.tensors[item.index - 1].used:  # the backward goes from the last to the first
            self.prefetched = self.tensors[item.index - 1]
            self._fetch(self.prefetched)
        return tensor

    def _fetch(self, item: _OffloadedTensor) -> Tensor:
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
