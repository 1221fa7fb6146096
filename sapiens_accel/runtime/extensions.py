"""DeepSpeed's C++ extensions, which torch compiles on first use: those of a launch, missing tools, and stale locks.

One process builds and the others wait on a file `lock` without a limit: a build that was killed would block every later
launch without a message.
"""

import ast
import importlib.util
import os
import re
import shutil
import sys
import sysconfig
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch

from sapiens_accel.errors import UserError

# torch holds its lock open while it builds. A lock of another machine that shares the folder shows no holder here, so
# on a network file system its age decides; the longest build that was measured took 134 s.
STALE_SECONDS = {"local": 5, "network": 600}
LOCAL_FILE_SYSTEMS = {"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "overlay", "tmpfs", "apfs", "f2fs"}
BUILD_TIME = "1 to 2 minutes"


def needed_operations(zero: Mapping[str, Any], *, cuda: bool) -> list[str]:
    """List the extensions of a launch: Adam with optimizer offload, file access with NVMe, communication on CPUs.

    DeepSpeed builds the communication on a CPU for a single rank too.
    """
    devices = [(zero.get(f"offload_{part}") or {}).get("device") or "none" for part in ("optimizer", "param")]
    needed = ["cpu_adam"] if devices[0] != "none" else []
    needed += ["async_io"] if "nvme" in devices else []
    return needed + ([] if cuda else ["deepspeed_shm_comm"])


def folder() -> Path:
    """Return the folder in which torch builds extensions, each in a subfolder."""
    if configured := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(configured)
    cuda = f"cu{torch.version.cuda.replace('.', '')}" if torch.version.cuda else "cpu"
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    python = f"py{sys.version_info.major}{sys.version_info.minor}{sys.abiflags}_{cuda}"
    return Path(cache, "torch_extensions", python)


def is_built(operation: str) -> bool:
    """Return whether an extension came with the installation, or was compiled before."""
    spec = importlib.util.find_spec("deepspeed")
    listing = Path(spec.origin).with_name("git_version_info_installed.py") if spec and spec.origin else None
    if listing and listing.is_file():
        installed = re.search(r"^installed_ops=(\{.*\})$", listing.read_text(), re.MULTILINE)
        if installed and ast.literal_eval(installed[1]).get(operation):
            return True
    return (folder() / operation / f"{operation}.so").is_file()


def missing_tools() -> Iterator[str]:
    """Yield what torch needs to build extensions and this machine lacks."""
    if not compiler():
        yield "a C++ compiler (apt-get install g++, or CXX) is"
    if not shutil.which("ninja"):
        yield "ninja on the PATH (pip install ninja) is"
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        yield f"Python.h (apt-get install python{sys.version_info.major}.{sys.version_info.minor}-dev) is"


def compiler() -> str | None:
    """Return the C++ compiler that torch would call."""
    return shutil.which(os.environ.get("CXX", "c++"))


def find_stale_locks(operations: list[str] | None = None) -> dict[Path, float]:
    """Find locks that no process of this machine holds, and their age in seconds.

    Args:
        operations: the extensions to check; all by default.
    """
    names = operations or [path.name for path in folder().glob("*") if path.is_dir()]
    locks = [lock for name in names if (lock := folder() / name / "lock").is_file()]
    held = _open_files() if locks else set()
    ages = {}
    for lock in locks:
        if str(lock.resolve()) not in held:
            with suppress(FileNotFoundError):  # removed meanwhile, by the build that ended
                ages[lock] = time.time() - lock.stat().st_mtime
    return ages


def _open_files() -> set[str]:
    """Return the files that processes of this machine have open, as far as this user may see them."""
    files = set()
    for process in psutil.process_iter():
        with suppress(OSError):  # it has ended, or is another user's
            for link in Path(f"/proc/{process.pid}/fd").iterdir():
                with suppress(OSError):  # closed meanwhile
                    files.add(str(link.readlink()))
    return files


def check_builds(operations: list[str]) -> None:
    """Refuse a launch whose extensions cannot be compiled here. Every rank calls it.

    Raises:
        UserError: a tool is missing.
    """
    missing = [name for name in operations if not is_built(name)]
    if missing and (lacks := list(missing_tools())):
        raise UserError(
            f"DeepSpeed must compile {', '.join(missing)} for this launch, and {' and '.join(lacks)} missing. Install "
            "it, or take a launch that compiles nothing: on a GPU accelerate_configs/zero2.yaml, on a CPU cpu.yaml"
        )


def prepare_builds(operations: list[str]) -> None:
    """Remove stale locks and announce a build, before DeepSpeed is imported. One rank calls it."""
    local = _is_local(folder())
    for lock, age in find_stale_locks(operations).items():
        # What processes of other users have open cannot be seen, so their locks must be old, too.
        if age > STALE_SECONDS["local" if local and _is_ours(lock) else "network"]:
            lock.unlink(missing_ok=True)
            print(f"{lock}: left by a build that was killed, {age:.0f} s old; removed", flush=True)
        else:
            text = f"{lock}: {age:.0f} s old, and no process here holds it. If this launch waits for it, delete it"
            print(text, flush=True)
    if missing := [name for name in operations if not is_built(name)]:
        print(f"DeepSpeed compiles {', '.join(missing)} into {folder()}, once; it takes {BUILD_TIME}", flush=True)


def _is_ours(lock: Path) -> bool:
    with suppress(FileNotFoundError):  # removed meanwhile
        return lock.stat().st_uid == os.getuid()
    return False


def _is_local(path: Path) -> bool:
    """Return whether the folder is on a local file system."""
    whole = path.resolve()
    mounts = [part for part in psutil.disk_partitions(all=True) if whole.is_relative_to(part.mountpoint)]
    return bool(mounts) and max(mounts, key=lambda part: len(part.mountpoint)).fstype in LOCAL_FILE_SYSTEMS
