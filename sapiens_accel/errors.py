"""What a user can act on, a run that was asked to stop, and how a program ends with either. Standard library alone."""

import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path


class UserError(Exception):
    """Something the user can mend. Its text is one line: the culprit, what was expected, what to do."""


class Interrupted(Exception):  # noqa: N818  (nothing went wrong)
    """The run was asked to stop and did, with everything saved. Its text says where."""


def run_main(main: Callable[[Sequence[str]], None]) -> None:
    """Run a program: a UserError is one line on stderr and exit code 2; any other exception is our bug.

    A run that was asked to stop leaves with exit code 0, and says how to go on.
    """
    try:
        main(sys.argv[1:])
    except Interrupted as interrupted:
        if os.environ.get("RANK", "0") == "0":
            print(f"{interrupted}; go on with the same launch and: {_resume_command(sys.argv)}", flush=True)
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        if rank != "0":
            time.sleep(10)  # rank 0 mostly says the same; its exit ends this process before the line is said again
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


def _resume_command(words: Sequence[str]) -> str:
    """A command that goes on where the one of these words stopped."""
    option = "--resume_from_checkpoint"
    kept = [word for before, word in pairwise(["", *words]) if not word.startswith(option) and before != option]
    return shlex.join([*kept, option, "latest"])
