"""What a forward saves for its backward waits in host memory; on a GPU the copies overlap with the arithmetic.

With checkpointed blocks, what is saved are the blocks' inputs: 2 * tokens * width bytes a person and block in 16 bits.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
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


@dataclass
class _Offload(saved_tensors_hooks):
    """Copies on a stream of their own, and in the backward one tensor ahead of what is asked for.

    A parameter is not moved (it stays on the device anyway), nor is what is small.
    """

    device: torch.device
    waiting: list[_Waiting] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(self._pack, self._unpack)
        self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def _pack(self, tensor: Tensor) -> "Tensor | _Waiting":
        if isinstance(tensor, torch.nn.Parameter) or tensor.nbytes < SMALLEST or tensor.device != self.device:
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

    def _unpack(self, item: "Tensor | _Waiting") -> Tensor:
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
