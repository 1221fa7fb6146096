"""What a user can act on, a run that was asked to stop, and how a program ends with either. Standard library alone."""

import atexit
import errno
import os
import re
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from itertools import pairwise
from pathlib import Path
from typing import Any, TextIO, cast

LONGEST = 2_000
# A disk that is full, over quota, broken or read-only.
OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM)
OF_THE_DISK += (errno.EBUSY, errno.EXDEV)  # a folder that a volume is mounted on, which cannot be renamed
SECONDS_TO_END = 15.0  # from the end of a program that failed to that of its process


def escape(text: str, keep: str = "\n\t") -> str:
    """Text that a terminal only shows: control codes, invisible marks and halves of characters as their escapes.

    A name in a file may hold codes that recolor, move or retitle a terminal, turn the order of letters around, or
    that no encoding can print. Text that was escaped before stays as it is. Credentials in addresses are left out.

    Args:
        keep: characters that are left alone.
    """
    text = hide_credentials(text)
    if text.isprintable():
        return text
    return "".join(
        letter if letter.isprintable() or letter in keep else letter.encode("unicode_escape").decode()
        for letter in text
    )


def count(number: int, noun: str) -> str:
    """`1 image`, `2 images`, `2 processes`."""
    return f"{number} {noun}" + ("" if number == 1 else "es" if noun.endswith("s") else "s")


def hide_credentials(text: str) -> str:
    """Text with *** for user and password of the addresses in it (scheme://USER:PASSWORD@host), and for their keys."""
    if "://" not in text:
        return text
    text = re.sub(r"(?<=://)[^/\s@'\"]+@", "***@", text)
    return re.sub(r"(?i)([?&][\w-]*(?:token|sig|signature|secret|password|credential|key)=)[^&\s'\"]+", r"\1***", text)


class UserError(Exception):
    """Something the user can mend. Its text is one line: the culprit, what was expected, what to do.

    A value that is quoted in it may be of any size: of a text of more than LONGEST letters the middle is left out.

    Attributes:
        given: the text before it was escaped and shortened. Not to be shown.
    """

    def __init__(self, text: str) -> None:
        self.given = text
        text = escape(text, keep="")
        super().__init__(text if len(text) <= LONGEST else f"{text[: LONGEST - 500]} [...] {text[-500:]}")


class Interrupted(Exception):  # noqa: N818  (nothing went wrong)
    """The run was asked to stop and did, with everything saved. Its text says where.

    Attributes:
        signal: the number of the signal that asked for it.
    """

    def __init__(self, text: str, signal: int) -> None:
        super().__init__(text)
        self.signal = signal


def read_tree(file: Path, parse: Callable[[str], Any], form: str) -> dict[str, Any]:
    """The keys and values that a small text file holds.

    Args:
        parse: `json.loads`, `yaml.safe_load`: what it raises means that the file is not of its form, whatever it is
            (of an odd file: ValueError, RecursionError, KeyError, AttributeError and more).
        form: what to call that.

    Raises:
        UserError: it cannot be read, is not of that form, or holds something else than keys and values.
    """
    try:
        tree = parse(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"{file}: not {form}: {reason}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{file}: expected keys and values ({form}), found {type(tree).__name__}")
    return tree


def run_main(main: Callable[[Sequence[str]], None]) -> None:
    """Run a program: a UserError is one line on stderr and exit code 2; any other exception is our bug.

    A run that was asked to stop leaves with 128 + the signal's number, as a shell has it, and says how to continue.
    What is printed is escaped. However a program fails, its process ends within `SECONDS_TO_END`.
    """
    try:
        with redirect_stdout(cast(TextIO, _EscapedOutput(sys.stdout))):
            main(sys.argv[1:])
    except Interrupted as interrupted:
        if os.environ.get("RANK", "0") == "0":
            print(escape(f"{interrupted}; {continue_with()}"), flush=True)
        _end_soon(128 + interrupted.signal)
        sys.exit(128 + interrupted.signal)
    except KeyboardInterrupt:
        print(f"{_program()}: stopped by Ctrl-C", file=sys.stderr, flush=True)
        _end_soon(128 + signal.SIGINT)
        sys.exit(128 + signal.SIGINT)
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        if rank != "0":
            time.sleep(5)  # rank 0 mostly says the same; its exit ends this process before the line is said again
        print(f"{_program()}: error: {error}", file=sys.stderr, flush=True)
        _end_soon(2)
        sys.exit(2)
    except OSError as error:
        if error.errno not in OF_THE_DISK:
            _end_soon(1)
            raise
        where = f"{error.filename}: " if error.filename else ""
        reason = f"{where}{error.strerror}. Make room there, or give another folder (--output_dir, --data.cache_dir)"
        print(escape(f"{_program()}: error: {reason}"), file=sys.stderr, flush=True)
        _end_soon(2)
        sys.exit(2)
    except Exception:
        _end_soon(1)
        raise


def _end_soon(code: int) -> None:
    """Let nothing hold up the end of this process: a thread, a process or a device that no longer answers."""

    def end() -> None:
        time.sleep(SECONDS_TO_END)
        os._exit(code)

    atexit.register(threading.Thread(target=end, daemon=True).start)  # the last registered one runs first


def _program() -> str:
    """The running program as it was called: `train.py`, `sapiens-accel doctor`, `python -m sapiens_accel.doctor`."""
    file = Path(sys.argv[0])
    return f"python -m sapiens_accel.{file.parent.name}" if file.name == "__main__.py" else file.name


class _EscapedOutput:
    """A stream whose text is escaped; stderr has none, since progress bars move the cursor."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(escape(text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def continue_with() -> str:
    """How to continue a run that has ended before its last step, as the end of a sentence."""
    return f"continue with the same launch and: {_resume_command(sys.argv)}"


def _resume_command(words: Sequence[str]) -> str:
    """A command that continues where the one of these words stopped."""
    option = "--resume_from_checkpoint"
    kept = [word for before, word in pairwise(["", *words]) if not word.startswith(option) and before != option]
    return shlex.join([*kept, option, "latest"])
