"""What this process may take of its machine: CPU cores and memory, as cgroups (containers, SLURM) limit them."""

import ctypes
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil

CGROUPS = Path("/sys/fs/cgroup")  # of version 2
OWN_GROUP = Path("/proc/self/cgroup")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def usable_cores() -> int:
    """Logical cores that this process may run on, at least 1: its affinity, and the quotas of its groups."""
    cores = float(len(os.sched_getaffinity(0)))
    for group in _groups():
        # "QUOTA PERIOD", both in microseconds; "max PERIOD" without a limit.
        quota, _, period = _read(group / "cpu.max").partition(" ")
        if quota.isdigit() and period.isdigit():
            cores = min(cores, int(quota) / int(period))
    return max(1, int(cores))


def free_bytes() -> float:
    """Memory that this machine, and the groups that this process is in, can still give."""
    free = float(psutil.virtual_memory().available)
    for group in _groups():
        limit, used = _read(group / "memory.max"), _read(group / "memory.current")
        if limit.isdigit() and used.isdigit():
            cached = re.search(r"^inactive_file (\d+)", _read(group / "memory.stat"), re.MULTILINE)
            # Files that were read are given back.
            free = min(free, int(limit) - int(used) + (int(cached[1]) if cached else 0))
    return free


def total_bytes() -> float:
    """Memory of this machine, or the limit of the groups that this process is in."""
    total = float(psutil.virtual_memory().total)
    limits = (_read(group / "memory.max") for group in _groups())
    return min([total, *(float(limit) for limit in limits if limit.isdigit())])


def _groups() -> Iterator[Path]:
    """This process's own group and those above it, up to the root that is mounted here.

    A container may see the path of the machine, and mount only its own group: folders that are not there say nothing.
    """
    own = re.search(r"^0::/(.*)$", _read(OWN_GROUP), re.MULTILINE)
    path = Path(own[1]) if own and ".." not in Path(own[1]).parts else Path()
    yield CGROUPS / path
    yield from (CGROUPS / above for above in path.parents)


def _read(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""


def keep_freed_memory() -> None:
    """Have glibc keep what this process frees for its next arrays, up to 1 GiB each: new pages come zeroed, one by one.

    They cost 5 % of the time of a batch of images. In a step on a CPU, instance norm and SiLU of a published head
    (38 MB for 4 people) took 111 ms with new pages and 35 without; by itself glibc keeps arrays below 32 MiB at most.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc and hasattr(libc, "mallopt"):  # not every Linux has glibc
        for option in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
            libc.mallopt(option, 2**30)
