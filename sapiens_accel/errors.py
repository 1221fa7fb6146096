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
import unicodedata
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from itertools import pairwise
from pathlib import Path
from typing import Any, TextIO, cast

LONGEST = 2_000
NOT_PERMITTED = (errno.EACCES, errno.EPERM)
# A disk that is full, over quota, broken or read-only.
OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)
OF_THE_DISK += (errno.EBUSY, errno.EXDEV)  # a folder that a volume is mounted on, which cannot be renamed
SECONDS_FOR_RANK_0 = 12
SECONDS_TO_END = 15.0  # from the end of a program that failed to that of its process
# What stands before the @ of an address: up to the last @ before the first /, or further if that / is of a password.
USER = re.compile(r"(?<![\w+.-])([\w+.-]{1,30}://)([^/\s'\"]+|[^/\s:'\"]*:(?!:|\d*/)[^\s'\"]{0,300})@")
SECRET_KEYS = re.compile(r"(?i)([?&][\w-]*(?:token|sig|signature|secret|password|credential|key)=)[^&\s'\"]+")
NO_USER = ("abfs", "abfss", "wasb", "wasbs", "github", "git", "hf")  # a container, repository or name before the @
USER_ALONE = ("sftp", "ssh", "scp", "hdfs", "webhdfs", "smb")  # of others a user alone may be a token


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
    # Spaces of other widths (category Zs) are no marks: a path of them, in a command to be pasted, stays as it is.
    return "".join(
        letter
        if letter.isprintable() or letter in keep or unicodedata.category(letter) == "Zs"
        else letter.encode("unicode_escape").decode()
        for letter in text
    )


def count(number: int, noun: str) -> str:
    """`1 image`, `2 images`, `2 processes`."""
    return f"{number} {noun}" + ("" if number == 1 else "es" if noun.endswith("s") else "s")


def is_secret(scheme: str, user: str) -> bool:
    """Whether what stands before the @ of an address is no one's to read: user and password, or a token."""
    name = scheme.removesuffix("://").lower()
    return name not in NO_USER and (":" in user or name not in USER_ALONE)


def hide_credentials(text: str) -> str:
    """Text with *** for user and password of the addresses in it (scheme://USER:PASSWORD@host), and for their keys."""
    return SECRET_KEYS.sub(r"\1***", _replace_users(text, "***@")) if "://" in text else text


def _replace_users(text: str, by: str) -> str:
    return USER.sub(lambda found: found[1] + by if is_secret(found[1], found[2]) else found[0], text)


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
            # Rank 0 mostly says the same, and its exit ends this process before the line is said again. On a busy
            # machine that exit took 5 s and more (three processes on two cores).
            time.sleep(SECONDS_FOR_RANK_0)
        print(f"{_program()}: error: {error}", file=sys.stderr, flush=True)
        _end_soon(2)
        sys.exit(2)
    except OSError as error:
        if error.errno not in (*OF_THE_DISK, *NOT_PERMITTED):
            _end_soon(1)
            raise
        print(escape(f"{_program()}: error: {_describe(error)}"), file=sys.stderr, flush=True)
        _end_soon(2)
        sys.exit(2)
    except Exception:
        _end_soon(1)
        raise


def _describe(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename else ""
    if error.errno in NOT_PERMITTED:
        return f"{where}{error.strerror}: it may not be read or written. Change its permissions, or give another one"
    return f"{where}{error.strerror}. Make room there, or give another folder (--output_dir, --data.cache_dir)"


def _end_soon(code: int) -> None:
    """Let nothing hold up the end of this process: a thread, a process or a device that no longer answers."""
    ending = threading.Event()

    def end() -> None:
        ending.wait()
        time.sleep(SECONDS_TO_END)
        os._exit(code)

    # Started now: from Python 3.12 on a process that ends starts no thread. The last registered one runs first.
    threading.Thread(target=end, daemon=True).start()
    atexit.register(ending.set)


def _program() -> str:
    """The running program as it was called: a script, the console command or a module."""
    file = Path(sys.argv[0])
    module = ("python", "-m", f"sapiens_accel.{file.parent.name}")
    return " ".join(module) if file.name == "__main__.py" else file.name


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
    """A command that continues where the one of these words stopped.

    Of addresses with credentials it has the rest, and says which options need them.
    """
    option = "--resume_from_checkpoint"
    kept, secret = [], []
    for before, word in pairwise(["", *words]):
        if word.startswith(option) or before == option:
            continue
        kept.append(_replace_users(word, ""))
        if kept[-1] != word:
            secret.append(word.partition("=")[0] if word.startswith("--") else before)
    needs = f" (with user and password in {', '.join(secret)})" if secret else ""
    return shlex.join([*kept, option, "latest"]) + needs
