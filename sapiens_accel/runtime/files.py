"""Files that are there whole or not at all, and how the ranks agree on one that could not be written."""

import json
import os
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
# What a full or broken disk raises: torch and safetensors have words of their own for it.
NOT_WRITTEN = (OSError, RuntimeError, SafetensorError)


def write_text(file: Path, text: str) -> None:
    """Write a small file so that it is there whole or as it was.

    Beside it first, so on the same device, and by the umask, as any new file.
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
    """Write a small JSON so that it is there whole or as it was."""
    write_text(file, json.dumps(tree, indent=2))


def follow_umask(file: Path) -> None:
    """Give a file the permissions of any new one: safetensors makes its files for their owner alone."""
    umask = os.umask(0)
    os.umask(umask)
    with suppress(OSError):  # not every file system has permissions
        file.chmod(0o666 & ~umask)


def check_writable(folder: Path, option: str) -> None:
    """Refuse a folder in which no file can be written, before anything long is begun; it need not exist, nor will it.

    Args:
        option: that names the folder: "--output_dir".

    Raises:
        UserError: it is a file, or a file in it or in the first folder above it that exists could not be written.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists() or path.is_symlink())
    try:
        if not existing.is_dir():
            raise NotADirectoryError(ENOTDIR, "is no folder")
        with tempfile.NamedTemporaryFile(dir=existing, prefix=".check", suffix=UNFINISHED) as file:
            file.write(bytes(1 << 12))
            file.flush()
    except OSError as error:
        raise UserError(
            f"{option} {folder}: no file can be written there (expected a folder with free space, found {existing}: "
            f"{error.strerror}). Give another {option}"
        ) from None


def read_json(file: Path) -> dict[str, Any] | None:
    """What a small JSON says; None if there is none that can be read, or if it holds no keys and values."""
    try:
        tree = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError):
        return None
    return tree if isinstance(tree, dict) else None


def set_aside(old: Path) -> None:
    """NAME becomes the first free of NAME.1, NAME.2, ..."""
    number = 1
    while (kept := old.with_name(f"{old.name}.{number}")).exists():
        number += 1
    old.rename(kept)
    print(f"{old} was there already; it is kept as {kept}", flush=True)


def error_of(action: Callable[[], object]) -> str | None:
    """The error of an action in one line, None without one: other ranks must not wait for one whose disk is full."""
    try:
        action()
    except NOT_WRITTEN as error:
        return " ".join(str(error).split())[:200] or type(error).__name__
    return None


def write_on_main(accelerator: Accelerator, action: Callable[[], object], what: Path, *, needed: bool) -> bool:
    """Let rank 0 write something; returns whether it could. All ranks must call it.

    Raises:
        SharedError: it could not, and it is needed.
    """
    problem = broadcast_object_list([error_of(action) if accelerator.is_main_process else None])[0]
    if problem and needed:
        raise SharedError(
            f"{what} could not be written: {problem}; make room, and go on with --resume_from_checkpoint latest"
        )
    if problem:
        accelerator.print(f"warning: {what} could not be written: {problem}; training continues")
    return problem is None
