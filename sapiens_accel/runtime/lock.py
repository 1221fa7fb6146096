"""The lock of a run directory: one run at a time, on one machine or on several that share the disk.

The lock is a file that names its process. It is created by a hard link, or with O_EXCL where there are none: both are
atomic on NFS too. The process touches it regularly, so that other machines see that it is alive.
"""

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from sapiens_accel.errors import UserError

LOCK = "run.lock"
TOUCH_SECONDS = 30.0
SILENT_SECONDS = 600.0  # since the last touch, after which the lock of a process on another machine is stale


@contextmanager
def lock_directory(folder: Path) -> Iterator[None]:
    """Hold the lock of a directory while entered; the directory is created if necessary.

    The lock of a process that has ended is taken over, with a line: at once if the process ran on this machine (and in
    this container), otherwise ten minutes after the last touch.

    Raises:
        UserError: another run holds the lock, or the lock cannot be read; the directory cannot be written. At the end:
            the directory was renamed, deleted or taken over meanwhile, so that its files are in two places.
    """
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        own = _acquire(folder / LOCK)
    except OSError as error:
        raise UserError(f"--output_dir {folder}: cannot be written ({error}). Use another --output_dir") from None
    ended = threading.Event()
    threading.Thread(target=_touch, args=(folder / LOCK, own, ended), daemon=True).start()
    try:
        yield
        _check_held(folder / LOCK, own)
    finally:
        ended.set()
        with contextlib.suppress(OSError):  # a lock that stays becomes stale
            if _read(folder / LOCK) == own:
                (folder / LOCK).unlink(missing_ok=True)
        if is_new:
            with contextlib.suppress(OSError):  # it is not empty
                folder.rmdir()


def _acquire(lock: Path) -> str:
    """Create the lock; returns its contents."""
    own = json.dumps(_describe_process(), indent=2)
    draft = lock.with_name(f"{LOCK}.{socket.gethostname()}.{os.getpid()}")
    draft.write_text(own)
    try:
        while not _create(lock, draft, own):
            try:
                there = _read(lock)
            except OSError as error:
                raise UserError(
                    f"--output_dir {lock.parent}: another run may be writing in it: {lock.name} cannot be read "
                    f"({error.strerror}). Use another --output_dir; if no run writes in it, delete {lock}"
                ) from None
            if there is None:
                continue  # it was released meanwhile
            if not _is_stale(lock, there, draft):
                raise UserError(_explain(lock, there))
            # By a rename: of two processes that take it over, only one can move it.
            moved = draft.with_name(draft.name + ".stale")
            with contextlib.suppress(FileNotFoundError):
                lock.rename(moved)
                if (other := moved.read_text(errors="replace")) != there:
                    _create(lock, moved, other)
                else:
                    print(f"{lock}: taken over; {_name(there)} has ended without releasing it", flush=True)
                moved.unlink()
    finally:
        draft.unlink()
    return own


def _create(lock: Path, draft: Path, text: str) -> bool:
    """Return whether the lock could be created; it cannot if one exists."""
    try:
        os.link(draft, lock)
    except FileExistsError:
        return False
    except OSError:  # no hard links on this file system
        try:
            with lock.open("x") as file:
                file.write(text)
        except FileExistsError:
            return False
    return True


def _describe_process() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(psutil.Process().create_time())),
        "boot": _first_line("/proc/sys/kernel/random/boot_id"),
        "namespace": _pid_namespace(),
        "start": _start_of(os.getpid()),
    }


def _start_of(pid: object) -> str | None:
    """Return when a process started, as a later one may have the same number; None if there is none."""
    if not isinstance(pid, int):
        return None
    try:
        # Clock ticks since boot (proc(5), field 22): the wall clock may be set meanwhile. The name may have blanks.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        with contextlib.suppress(psutil.Error):
            return f"{psutil.Process(pid).create_time():.0f}"  # no Linux
    return None


def _exists(pid: object) -> bool:
    """Return whether a process of this number exists, also where /proc hides those of other users (hidepid)."""
    if not isinstance(pid, int) or pid <= 0:
        return False
    try:
        os.kill(pid, 0)  # sends nothing
    except PermissionError:
        return True
    except (OSError, OverflowError):
        return False
    return True


def _pid_namespace() -> str:
    """Return the process namespace: containers of one machine may share its host name, and number processes apart."""
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""


def _first_line(file: str) -> str:
    try:
        return Path(file).read_text().strip()
    except OSError:
        return ""


def _read(lock: Path) -> str | None:
    """Return the contents of a lock; None if there is none. Raises OSError if it exists and cannot be read."""
    try:
        return lock.read_text(errors="replace")
    except FileNotFoundError:
        return None


def _parse(text: str) -> dict[str, Any]:
    try:
        tree = json.loads(text)
    except ValueError:
        return {}
    return tree if isinstance(tree, dict) else {}


def _is_stale(lock: Path, text: str, draft: Path) -> bool:
    """Return whether the process of a lock has ended.

    Args:
        draft: a file beside it that was just written: times of one file server are compared, not of two clocks.
    """
    holder, here = _parse(text), _describe_process()
    if all(holder.get(key) == here[key] for key in ("host", "namespace")):
        start = _start_of(holder.get("pid"))
        if holder.get("boot") != here["boot"] or not _exists(holder.get("pid")):
            return True
        if start is not None:
            return start != holder.get("start")
    try:
        os.utime(draft)
        return draft.stat().st_mtime - lock.stat().st_mtime > SILENT_SECONDS
    except OSError:
        return False


def _name(text: str) -> str:
    holder = _parse(text)
    return f"process {holder.get('pid', '?')} on {holder.get('host', '?')}, started {holder.get('started', '?')},"


def _explain(lock: Path, text: str) -> str:
    return (
        f"--output_dir {lock.parent}: another run is writing in it: {_name(text)} holds {lock.name}. Use another "
        f"--output_dir, or wait; if that process no longer runs, delete {lock}"
    )


def _check_held(lock: Path, own: str) -> None:
    """Raise UserError if the lock is no longer this process's."""
    there = own
    with contextlib.suppress(OSError):  # a broken disk says nothing of it
        there = _read(lock)
    if there is None:
        raise UserError(
            f"--output_dir {lock.parent}: was renamed or deleted while the run wrote in it: what came after that is in "
            "a new directory of this name, without config.yaml and the earlier files. Put both together"
        )
    if there != own:
        raise UserError(f"--output_dir {lock.parent}: was taken over by {_name(there)} which writes in it as well")


def _touch(lock: Path, own: str, ended: threading.Event) -> None:
    while not ended.wait(TOUCH_SECONDS):
        with contextlib.suppress(OSError):
            there = _read(lock)
            if ended.is_set():
                return
            if there is None:
                print(
                    f"warning: {lock}: is gone: its directory was renamed or deleted while a run writes in it",
                    flush=True,
                )
                return
            if there != own:  # this process was suspended, or could not reach its disk, for too long
                print(f"warning: {lock}: was taken over by {_name(there)} which writes in it as well", flush=True)
                return
            os.utime(lock)
