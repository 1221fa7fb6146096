"""Errors of one rank end all of them; a stage that fails is saved if possible, and one line says how to continue."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar, cast

from accelerate import Accelerator
from accelerate.utils import gather_object

from sapiens_accel.errors import Interrupted, UserError, continue_with

Result = TypeVar("Result")
IN_THE_STEP = "the optimizer was changing the weights: they belong to no complete step"


@contextmanager
def changing_weights() -> Iterator[None]:
    """Mark an error that is raised inside: until optimizer and teacher are done, the weights are inconsistent."""
    try:
        yield
    except Exception as error:
        mark_torn(error)
        raise


def mark_torn(error: Exception) -> None:
    """Note on an error that the weights are inconsistent and must not be saved."""
    if not is_torn(error):
        error.add_note(IN_THE_STEP)


def is_torn(error: BaseException) -> bool:
    """Return whether an error was raised while the weights were changing."""
    return IN_THE_STEP in getattr(error, "__notes__", ())


class SharedError(UserError):
    """A UserError that all ranks raise at the same point, between two steps, so that they can still save together.

    Attributes:
        cause: the exception of this rank, if it is a bug of this package.
    """

    def __init__(self, text: str, cause: Exception | None = None) -> None:
        super().__init__(text)
        self.cause = cause


def on_each_rank(action: Callable[[], Result]) -> Result:
    """Run an action on every rank; if it fails on one, all of them raise. All ranks must call it.

    Raises:
        UserError: the action's own, or a description of another rank's error.
    """
    result, problem = None, None
    try:
        result = action()
    except Exception as error:
        problem = error
    problems = [text for text in gather_object([problem and describe(problem)]) if text]
    if problem is not None:
        raise problem
    if problems:
        raise UserError(problems[0])
    return cast(Result, result)


def on_main_first(accelerator: Accelerator, action: Callable[[], Result]) -> Result:
    """Run an action on rank 0, which downloads and fills caches, and then on the others. All ranks must call it.

    Accelerate's `main_process_first` leaves the others waiting where rank 0 fails.

    Raises:
        UserError: as `on_each_rank`.
    """
    is_main = accelerator.is_main_process
    first = on_each_rank(lambda: action() if is_main else None)
    others = on_each_rank(lambda: None if is_main else action())
    return cast(Result, first if is_main else others)


def describe(error: Exception) -> str:
    """Describe an error in one line, for the other ranks."""
    if isinstance(error, UserError):
        return str(error)
    return f"another process of this launch has failed: {type(error).__name__}: {error}; see its output"


@contextmanager
def save_on_failure(accelerator: Accelerator, name: str, save: Callable[[], Path | None]) -> Iterator[None]:
    """Save the last complete step of a stage when an error ends it.

    A single process always can; several can only if all of them raise (`SharedError`).

    Args:
        name: the stage's name.
        save: saves the state if that is not done yet, and returns the checkpoint; None without one.

    Raises:
        UserError: the same error, with the checkpoint and the command that continues.
    """
    try:
        yield
    except Interrupted:  # saved already
        raise
    except Exception as error:
        shared = isinstance(error, SharedError)
        possible = (shared or accelerator.num_processes == 1) and not is_torn(error)
        saved = save() if possible else None
        where = f"the last complete step is in {saved}; {continue_with()}" if saved else ""
        cause = error.cause if isinstance(error, SharedError) else error
        if isinstance(error, UserError) and not (shared and cause):
            if where and "--resume_from_checkpoint" not in str(error):  # it may say itself how to continue
                raise UserError(f"{str(error).rstrip('.')}; {where}") from None
            raise
        if where:  # a traceback follows
            accelerator.print(f"{name}: failed; {where}")
        if shared and cause:
            raise cause from None
        raise
