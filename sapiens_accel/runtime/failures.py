"""A stage that fails: what was trained is saved where that is still possible, and one line says how to continue."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar, cast

from accelerate import Accelerator
from accelerate.utils import gather_object

from sapiens_accel.errors import Interrupted, UserError, continue_with

Result = TypeVar("Result")
IN_THE_STEP = "the optimizer was changing the weights: they are of no whole step"


@contextmanager
def changing_weights() -> Iterator[None]:
    """Mark an error inside: until the optimizer and the teacher are done, the weights are of no whole step."""
    try:
        yield
    except Exception as error:
        mark_torn(error)
        raise


def mark_torn(error: Exception) -> None:
    """Note on an error that the weights are of no whole step, and must not be saved."""
    if not is_torn(error):
        error.add_note(IN_THE_STEP)


def is_torn(error: BaseException) -> bool:
    """Whether an error struck while the weights were changing."""
    return IN_THE_STEP in getattr(error, "__notes__", ())


class SharedError(UserError):
    """A UserError that all ranks raise at the same moment, between two steps: together they can still save.

    Attributes:
        cause: what happened on this rank, if it was our bug.
    """

    def __init__(self, text: str, cause: Exception | None = None) -> None:
        super().__init__(text)
        self.cause = cause


def on_each_rank(action: Callable[[], Result]) -> Result:
    """What an action returns on this rank; where it fails on any, all end. All ranks must call it.

    Raises:
        UserError: one of this rank's own, or what happened on another; our bugs are raised where they are.
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


def describe(error: Exception) -> str:
    """An error in one line, for the ranks on which it did not happen."""
    if isinstance(error, UserError):
        return str(error)
    return f"another process of this launch has failed: {type(error).__name__}: {error}; see its output"


@contextmanager
def save_on_failure(accelerator: Accelerator, name: str, save: Callable[[], Path | None]) -> Iterator[None]:
    """Save the last whole step of a stage before an error ends it.

    One process alone can always do so; several only where all of them raise (`SharedError`).

    Args:
        name: of the stage.
        save: writes what is not saved yet, and returns where; None where there is nothing to save, or it cannot be.

    Raises:
        UserError: the same error, with where the step is and how to continue.
    """
    try:
        yield
    except Interrupted:  # saved already
        raise
    except Exception as error:
        shared = isinstance(error, SharedError)
        possible = (shared or accelerator.num_processes == 1) and not is_torn(error)
        saved = save() if possible else None
        where = f"the last whole step is in {saved}; {continue_with()}" if saved else ""
        cause = error.cause if isinstance(error, SharedError) else error
        if isinstance(error, UserError) and not (shared and cause):
            if where:
                raise UserError(f"{str(error).rstrip('.')}; {where}") from None
            raise
        if where:  # a traceback follows: it is our bug
            accelerator.print(f"{name}: failed; {where}")
        if shared and cause:
            raise cause from None
        raise
