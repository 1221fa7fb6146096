"""Atomic writes, and how the ranks agree on a file that could not be written."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from errno import ENOTDIR
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError

from sapiens_accel.errors import UserError
from sapiens_accel.runtime.failures import SharedError

GIB = 2**30
UNFINISHED, CORRUPT = ".tmp", ".corrupt"
# What writing to a full or broken disk raises, in Python, torch and safetensors.
NOT_WRITTEN = (OSError, RuntimeError, SafetensorError)


def write_text(file: Path, text: str) -> None:
    """Write a small file completely or not at all.

    Through a temporary file beside it: on the same device, and with the permissions of any new file.
    """
    temporary = file.with_name(file.name + UNFINISHED)
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(file)
    except OSError:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def write_json(file: Path, tree: Mapping[str, Any]) -> None:
    """Write a small JSON file completely or not at all."""
    write_text(file, json.dumps(tree, indent=2))


def follow_umask(file: Path) -> None:
    """Give a file the permissions of any new one: safetensors lets only the owner read its files."""
    umask = os.umask(0)
    os.umask(umask)
    with suppress(OSError):  # not every file system has permissions
        file.chmod(0o666 & ~umask)


def check_writable(folder: Path, option: str) -> None:
    """Refuse a folder in which no file can be written, before anything slow is started. The folder is not created.

    Args:
        option: the option that names the folder, such as "--output_dir".

    Raises:
        UserError: it is a file, or no file could be written in it, or in its first parent that exists.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists() or path.is_symlink())
    try:
        if not existing.is_dir():
            raise NotADirectoryError(ENOTDIR, "is not a folder")
        with tempfile.NamedTemporaryFile(dir=existing, prefix=".check", suffix=UNFINISHED) as file:
            file.write(bytes(1 << 12))
            file.flush()
    except OSError as error:
        raise UserError(
            f"{option} {folder}: no file can be written there (expected a folder with free space, found {existing}: "
            f"{error.strerror}). Use another {option}"
        ) from None


def read_json(file: Path) -> dict[str, Any] | None:
    """Read a small JSON file; None if it does not exist, cannot be read or holds no keys and values."""
    try:
        tree = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError):
        return None
    return tree if isinstance(tree, dict) else None


def set_aside(old: Path) -> None:
    """Rename NAME to the first free of NAME.1, NAME.2, ..."""
    aside = first_free_name(old)
    old.rename(aside)
    print(f"{old}: exists, and is renamed to {aside}", flush=True)


def first_free_name(path: Path) -> Path:
    """The first of NAME.1, NAME.2, ... that does not exist."""
    number = 1
    while (free := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    return free


def link(source: str | Path, target: str | Path) -> None:
    """Make a hard link; a copy where the file system has none."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def error_of(action: Callable[[], object]) -> str | None:
    """Run an action and return its error in one line, None without one: other ranks must not wait for it."""
    try:
        action()
    except NOT_WRITTEN as error:
        return " ".join(str(error).split())[:200] or type(error).__name__
    return None


def write_on_main(accelerator: Accelerator, action: Callable[[], object], what: Path, *, needed: bool) -> bool:
    """Let rank 0 write something; returns whether that succeeded. All ranks must call it.

    Raises:
        SharedError: it failed, and what is written is needed.
    """
    problem = broadcast_object_list([error_of(action) if accelerator.is_main_process else None])[0]
    if problem and needed:
        raise SharedError(
            f"{what} could not be written: {problem}. Make room, and continue with --resume_from_checkpoint latest"
        )
    if problem:
        accelerator.print(f"warning: {what} could not be written: {problem}; training continues")
    return problem is None
