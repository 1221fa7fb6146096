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
# Of the user: the same settings in the environment.
SETTINGS_OF_MALLOC = re.compile(r"^MALLOC_(MMAP|TRIM)_THRESHOLD_=|glibc\.malloc\.(mmap|trim)_threshold=")


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
    Before version 2.35 it can be set to no more than that, either. What a user has set in the environment stays.
    """
    if any(SETTINGS_OF_MALLOC.search(f"{name}={value}") for name, value in os.environ.items()):
        return
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if not libc or not hasattr(libc, "mallopt"):  # not every Linux has glibc
        return
    # One that is refused stays at 128 KiB as soon as the other is set: every array would have new pages.
    if libc.mallopt(M_MMAP_THRESHOLD, 2**30) or libc.mallopt(M_MMAP_THRESHOLD, 2**25):
        libc.mallopt(M_TRIM_THRESHOLD, 2**30)
