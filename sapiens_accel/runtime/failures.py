"""A stage that fails: what was trained is saved where that is still possible, and one line says how to continue."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate import Accelerator

from sapiens_accel.errors import Interrupted, UserError, continue_with

IN_THE_STEP = "the optimizer was changing the weights: they are of no whole step"


class SharedError(UserError):
    """A UserError that all ranks raise at the same moment, between two steps: together they can still save.

    Attributes:
        cause: what happened on this rank, if it was our bug.
    """

    def __init__(self, text: str, cause: Exception | None = None) -> None:
        super().__init__(text)
        self.cause = cause


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
        possible = (shared or accelerator.num_processes == 1) and IN_THE_STEP not in getattr(error, "__notes__", ())
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
