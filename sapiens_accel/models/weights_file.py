"""Weights in files, without a copy of the file in memory: mapped pages are given back, tensors written one by one."""

import ctypes
import json
import mmap
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

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


def save(
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
