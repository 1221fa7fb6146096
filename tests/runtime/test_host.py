"""Limits of cgroups, version 2, on files as the kernel writes them."""

import ctypes
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from sapiens_accel.runtime import host, launch

GIB = 2**30
JOB = "system.slice/slurmstepd.scope/job_7/step_0"
Write = Callable[..., None]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes files of a group. The machine has 64 cores, 32 physical ones, and 500 GiB free; we are in `JOB`."""
    monkeypatch.setattr(host, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(host, "OWN_GROUP", tmp_path / "own")
    (tmp_path / "own").write_text(f"1:name=systemd:/\n0::/{JOB}\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: 64 if logical else 32)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=500 * GIB))

    def into(group: str, **files: object) -> None:
        folder = tmp_path / "cgroup" / group
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name.replace("_", ".", 1)).write_text(f"{text}\n")

    return into


def test_without_limits_the_machine_is_all_ours(write: Write) -> None:
    write(JOB, cpu_max="max 100000", memory_max="max", memory_current=5)
    assert host.usable_cores() == 64 and host.free_bytes() == 500 * GIB


@pytest.mark.parametrize("group", ["", JOB, str(Path(JOB).parent)], ids=["root", "own", "above"])
def test_the_tightest_group_on_the_way_up_counts(group: str, write: Write) -> None:
    """A container's limits are at the root that it sees, SLURM's in the process's own group or the job's above it."""
    write("", cpu_max="4800000 100000")
    write(JOB, memory_max=200 * GIB, memory_current=0)
    write(group, cpu_max="850000 100000", memory_max=64 * GIB, memory_current=40 * GIB)
    assert host.usable_cores() == 8 and host.free_bytes() == 24 * GIB
    write(group, memory_stat=f"anon 7\nactive_file 5\ninactive_file {6 * GIB}\nslab 1")
    assert host.free_bytes() == 30 * GIB
    write(group, cpu_max="20000 100000")
    assert host.usable_cores() == 1
    write("another/job", cpu_max="10000 100000", memory_max=1, memory_current=0)
    assert host.free_bytes() == 30 * GIB


@pytest.mark.parametrize("own", ["0::/docker/abc\n", "0::/../../job\n", "4:memory:/job\n", "0::/\n", None])
def test_a_container_that_mounts_its_own_group_only(own: str | None, write: Write, tmp_path: Path) -> None:
    if own is None:
        (tmp_path / "own").unlink()
    else:
        (tmp_path / "own").write_text(own)
    write("", cpu_max="200000 100000", memory_max=8 * GIB, memory_current=GIB)
    assert host.usable_cores() == 2 and host.free_bytes() == 7 * GIB


@pytest.mark.parametrize(
    ("most", "variable", "expected"),
    [
        (2**30, None, [(host.M_MMAP_THRESHOLD, 2**30), (host.M_TRIM_THRESHOLD, 2**30)]),
        (2**25, None, [(host.M_MMAP_THRESHOLD, 2**25), (host.M_TRIM_THRESHOLD, 2**30)]),  # glibc before 2.35
        (0, None, []),
        (2**30, ("MALLOC_TRIM_THRESHOLD_", "131072"), []),
        (2**30, ("GLIBC_TUNABLES", "glibc.malloc.arena_max=2:glibc.malloc.mmap_threshold=131072"), []),
        (2**30, ("GLIBC_TUNABLES", "glibc.malloc.arena_max=2"), [(-3, 2**30), (-1, 2**30)]),
    ],
)
def test_the_allocator_is_set_as_far_as_it_can_be_and_the_user_has_not(
    most: int, variable: tuple[str, str] | None, expected: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A threshold of trimming alone would fix that of new pages at 128 KiB."""
    accepted: list[tuple[int, int]] = []

    def mallopt(option: int, value: int) -> int:
        if option == host.M_MMAP_THRESHOLD and value > most:
            return 0
        accepted.append((option, value))
        return 1

    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace(mallopt=mallopt))
    monkeypatch.setattr(sys, "platform", "linux")
    for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    if variable:
        monkeypatch.setenv(*variable)
    host.keep_freed_memory()
    assert accepted == expected


@pytest.mark.parametrize(("quota", "ranks", "threads"), [("max", 2, 16), ("800000", 2, 4), ("800000", 1, 8)])
def test_the_ranks_share_the_cores_of_the_quota(
    quota: str, ranks: int, threads: int, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(JOB, cpu_max=f"{quota} 100000")
    taken: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    monkeypatch.setattr(launch, "_user_set_threads", lambda: False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    launch.use_all_cores()
    assert taken == [threads] and os.environ["OMP_NUM_THREADS"] == str(threads)
