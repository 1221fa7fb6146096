"""What a forward saves for its backward waits in host memory; on a GPU the copies overlap with the arithmetic.

With checkpointed blocks, what is saved are the blocks' inputs: 2 * tokens * width bytes a person and block in 16 bits.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

SMALLEST = 2**20  # bytes; less is not worth a copy


def offloaded(device: torch.device, *, wanted: bool) -> AbstractContextManager:
    """A context for one forward. Its backward may run outside, once."""
    return _Offload(device) if wanted else nullcontext()


@dataclass(kw_only=True)
class _Waiting:
    """A saved tensor on the host, and on the device again once it has been fetched."""

    index: int
    host: Tensor
    on_device: Tensor | None = None
    ready: Any = None  # the event of its arrival


class _Offload(saved_tensors_hooks):
    """The hooks hold the copies and the copies nothing: all is free as soon as the backward has been."""

    def __init__(self, device: torch.device) -> None:
        copies = _Copies(device)
        super().__init__(copies.pack, copies.unpack)
        self.waiting = copies.waiting


class _Copies:
    """Copies on a stream of their own, and in the backward one tensor ahead of what is asked for.

    A parameter is not moved (it stays on the device anyway), nor is what is small.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.waiting: list[_Waiting] = []

    def pack(self, tensor: Tensor) -> "Tensor | _Waiting":
        whole = tensor if tensor._base is None else tensor._base  # a linear layer saves its weight transposed
        if isinstance(whole, torch.nn.Parameter) or tensor.nbytes < SMALLEST or tensor.device.type != self.device.type:
            return tensor
        if self.stream is None:
            item = _Waiting(index=len(self.waiting), host=tensor.clone())
        else:
            host = torch.empty_like(tensor, device="cpu", pin_memory=True)
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self.stream):
                host.copy_(tensor, non_blocking=True)
            tensor.record_stream(self.stream)  # its memory is not given away before the copy is done
            item = _Waiting(index=len(self.waiting), host=host)
        self.waiting.append(item)
        return item

    def unpack(self, item: "Tensor | _Waiting") -> Tensor:
        if isinstance(item, Tensor):
            return item
        if self.stream is None:
            return item.host
        self._fetch(item)
        if item.index:  # the backward goes from the last one to the first
            self._fetch(self.waiting[item.index - 1])
        tensor, current = item.on_device, torch.cuda.current_stream(self.device)
        assert tensor is not None and item.ready is not None
        current.wait_event(item.ready)
        tensor.record_stream(current)
        item.on_device = None
        return tensor

    def _fetch(self, item: _Waiting) -> None:
        if item.on_device is None and self.stream is not None:
            with torch.cuda.stream(self.stream):
                item.on_device = item.host.to(self.device, non_blocking=True)
                item.ready = self.stream.record_event()
