"""Files that are there whole or not at all, and what a rank that could not write one tells the others."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError

from sapiens_accel.errors import UserError

GIB = 2**30
UNFINISHED, CORRUPT = ".tmp", ".corrupt"
# What a full or broken disk raises: torch and safetensors have words of their own for it.
NOT_WRITTEN = (OSError, RuntimeError, SafetensorError)


def write_json(file: Path, tree: Mapping[str, Any]) -> None:
    """Write a small JSON so that it is there whole or as it was."""
    temporary = file.with_name(file.name + UNFINISHED)
    temporary.write_text(json.dumps(tree, indent=2))
    temporary.replace(file)


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
    """What went wrong, if anything: the other ranks must not wait for one whose disk is full."""
    try:
        action()
    except NOT_WRITTEN as error:
        return " ".join(str(error).split())[:200] or type(error).__name__
    return None


def write_on_main(accelerator: Accelerator, action: Callable[[], object], what: Path, *, needed: bool) -> bool:
    """Let rank 0 write something; whether it could. All ranks must call it.

    Raises:
        UserError: it could not, and it is needed.
    """
    problem = broadcast_object_list([error_of(action) if accelerator.is_main_process else None])[0]
    if problem and needed:
        raise UserError(
            f"{what} could not be written: {problem}; make room, and go on with --resume_from_checkpoint latest"
        )
    if problem:
        accelerator.print(f"warning: {what} could not be written: {problem}; training continues")
    return problem is None
