"""Errors that a user can act on, requests to stop, and how a program ends with them. Standard library only."""

import atexit
import errno
import gc
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
NO_NAME = (errno.ENAMETOOLONG, errno.ELOOP)
# The disk is full, over quota, broken or read-only.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)
DISK_ERRORS += (errno.EBUSY, errno.EXDEV)  # a folder that a volume is mounted on, which cannot be renamed
SECONDS_FOR_RANK_0 = 12
SECONDS_TO_END = 15.0  # after a program has failed, until its process is killed
# User and password in a URL: up to the last @, since a password may contain / and @; a user or token alone: up to
# the last @ before the first /.
USER = re.compile(r"(?<![\w+.-])([\w+.-]{1,30}://)([^/\s:'\"]*:(?!:|\d*/)[^\s'\"]{0,300}|[^/\s'\"]+)@")
SECRET_KEYS = re.compile(r"(?i)([?&][\w-]*(?:token|sig|signature|secret|password|credential|key)=)[^&\s'\"]+")
# In these schemes a container, a repository or a name precedes the @.
SCHEMES_WITHOUT_USER = ("abfs", "abfss", "wasb", "wasbs", "github", "git", "hf")
# In these a user without a password is no secret; in all others it may be a token.
SCHEMES_WITH_PUBLIC_USER = ("sftp", "ssh", "scp", "hdfs", "webhdfs", "smb")


def escape(text: str, keep: str = "\n\t") -> str:
    """Replace control codes, invisible characters and lone surrogates by their escapes, and hide credentials in URLs.

    Names in files may hold codes that recolor, move or retitle a terminal, reverse the order of letters, or that no
    encoding can print. Escaping escaped text changes nothing.

    Args:
        keep: characters that are not escaped.
    """
    text = hide_credentials(text)
    if text.isprintable():
        return text
    # Spaces of other widths (category Zs) stay: a path that holds them must survive in a command to be pasted.
    return "".join(
        character
        if character.isprintable() or character in keep or unicodedata.category(character) == "Zs"
        else character.encode("unicode_escape").decode()
        for character in text
    )


def count(number: int, noun: str) -> str:
    """`1 image`, `2 images`, `2 processes`, `2 boxes`."""
    return f"{number} {noun}" + ("" if number == 1 else "es" if noun.endswith(("s", "x")) else "s")


def is_secret(scheme: str, user: str) -> bool:
    """Whether the part before the @ of a URL is a secret: user and password, or a token."""
    name = scheme.removesuffix("://").lower()
    return name not in SCHEMES_WITHOUT_USER and (":" in user or name not in SCHEMES_WITH_PUBLIC_USER)


def hide_credentials(text: str) -> str:
    """Replace user and password in URLs (scheme://USER:PASSWORD@host), and secret query values, by ***."""
    return SECRET_KEYS.sub(r"\1***", _replace_users(text, "***@")) if "://" in text else text


def _replace_users(text: str, by: str) -> str:
    return USER.sub(lambda match: match[1] + by if is_secret(match[1], match[2]) else match[0], text)


class UserError(Exception):
    """An error that the user can fix. Its text is one line: `WHERE: WHAT is wrong (expected X, found Y). FIX`.

    A value quoted in it may be of any length: beyond LONGEST characters the middle of the text is left out.

    Attributes:
        original: the text before it was escaped and shortened. Not to be printed.
    """

    def __init__(self, text: str) -> None:
        self.original = text
        text = escape(text, keep="")
        super().__init__(text if len(text) <= LONGEST else f"{text[: LONGEST - 500]} [...] {text[-500:]}")


class Interrupted(Exception):  # noqa: N818  (not an error)
    """A signal asked the run to stop, and its state is saved. The text says where.

    Attributes:
        signal: the number of that signal.
    """

    def __init__(self, text: str, signal: int) -> None:
        super().__init__(text)
        self.signal = signal


def read_tree(file: Path, parse: Callable[[str], Any], form: str) -> dict[str, Any]:
    """Read the keys and values of a small text file.

    Args:
        parse: `json.loads` or `yaml.safe_load`. Any exception of it means that the file is malformed (malformed files
            raise ValueError, RecursionError, KeyError, AttributeError and more).
        form: name of the format, for messages.

    Raises:
        UserError: the file cannot be read, is malformed, or holds something other than keys and values.
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


def end_on_interrupt() -> None:
    """Let Ctrl-C end the process with one line until `run_main` begins: imports before it take seconds."""

    def end(number: int, _: object) -> None:
        os.write(2, f"{_program()}: stopped by Ctrl-C\n".encode())
        os._exit(128 + number)

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, end)


def pause_garbage_collection() -> None:
    """Collect no garbage until `resume_garbage_collection`: while modules are imported.

    What they define stays, and collections that look for garbage among it took 1.5 of the 8 CPU seconds of a start.
    """
    gc.disable()


def resume_garbage_collection() -> None:
    """Collect garbage again, but never among what was imported: a full collection takes 0.4 s less.

    Loading processes, which are forks, share that memory then, since no collection writes to it.
    """
    if not gc.isenabled():
        gc.freeze()
        gc.enable()


def run_main(main: Callable[[Sequence[str]], None]) -> None:
    """Run a program: a UserError is one line on stderr and exit code 2; any other exception is our bug.

    A run that a signal stopped exits with 128 + the signal's number, as in a shell, and prints how to continue. All
    output is escaped. However a program fails, its process ends within `SECONDS_TO_END`.
    """
    if getattr(signal.getsignal(signal.SIGINT), "__module__", None) == __name__:  # of `end_on_interrupt`
        signal.signal(signal.SIGINT, signal.default_int_handler)
    resume_garbage_collection()
    try:
        with redirect_stdout(cast(TextIO, _EscapedOutput(sys.stdout))):
            main(sys.argv[1:])
    except Interrupted as interrupted:
        if os.environ.get("RANK", "0") == "0":
            print(escape(f"{interrupted}; {continue_with()}"), flush=True)
        _limit_exit_time(128 + interrupted.signal)
        sys.exit(128 + interrupted.signal)
    except KeyboardInterrupt:
        print(f"{_program()}: stopped by Ctrl-C", file=sys.stderr, flush=True)
        _limit_exit_time(128 + signal.SIGINT)
        sys.exit(128 + signal.SIGINT)
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        if rank != "0":
            # Rank 0 mostly fails alike, and its exit ends this process before the line is repeated. On a busy machine
            # that exit took 5 s and more (three processes on two cores).
            time.sleep(SECONDS_FOR_RANK_0)
        print(f"{_program()}: error: {error}", file=sys.stderr, flush=True)
        _limit_exit_time(2)
        sys.exit(2)
    except OSError as error:
        if error.errno not in (*DISK_ERRORS, *NOT_PERMITTED, *NO_NAME):
            _limit_exit_time(1)
            raise
        print(escape(f"{_program()}: error: {_describe_os_error(error)}"), file=sys.stderr, flush=True)
        _limit_exit_time(2)
        sys.exit(2)
    except Exception:
        _limit_exit_time(1)
        raise


def _describe_os_error(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename else ""
    if error.errno in NO_NAME:
        return f"{where}{error.strerror}. Give another path"
    if error.errno in NOT_PERMITTED:
        fix = "Correct its permissions, or choose another path"
        return f"{where}{error.strerror}: no permission to read or write it. {fix}"
    return f"{where}{error.strerror}. Free space there, or choose another folder (--output_dir, --data.cache_dir)"


def _limit_exit_time(code: int) -> None:
    """Exit after `SECONDS_TO_END` even if a thread, a child process or a device no longer answers."""
    ending = threading.Event()

    def end() -> None:
        ending.wait()
        time.sleep(SECONDS_TO_END)
        os._exit(code)

    # Started now, since Python 3.12 starts no thread at exit. Functions registered last run first.
    threading.Thread(target=end, daemon=True).start()
    atexit.register(ending.set)


def _program() -> str:
    """The running program as it was called: a script, the console command or a module."""
    file = Path(sys.argv[0])
    module = ("python", "-m", f"sapiens_accel.{file.parent.name}")
    return " ".join(module) if file.name == "__main__.py" else file.name


class _EscapedOutput:
    """A text stream that escapes what is written. Not for stderr, where progress bars move the cursor."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(escape(text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


_launch: list[str] | None = None
_launched_program: list[str] | None = None


def remember_launch(words: Sequence[str] | None, program: Sequence[str] | None = None) -> None:
    """Keep the words before the program in this process's launch; None where they are not known.

    They are kept from the start, since a launcher may end before the process that it launched.

    Args:
        program: the words of the program, where they are others than this process's own.
    """
    global _launch, _launched_program
    _launch = None if words is None else list(words)
    _launched_program = None if program is None else list(program)


def program_words() -> list[str]:
    """The program of this process as words of a command: a script, `-m` MODULE, or `sapiens-accel` COMMAND."""
    if _launched_program is not None:
        return _launched_program
    if sys.argv[0].startswith("sapiens-accel "):
        return sys.argv[0].split()
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    is_module = spec is not None and spec.origin == sys.argv[0]
    return ["-m", spec.name.removesuffix(".__main__")] if spec and is_module else sys.argv[:1]


def resume_command() -> str:
    """This process's command with `--resume_from_checkpoint latest`, without credentials in URLs."""
    return _resume_command([*(_launch or ()), *program_words(), *sys.argv[1:]])[0]


def continue_with() -> str:
    """The end of a sentence: how to continue a run that has ended before its last step."""
    command, secret = _resume_command([*(_launch or ()), *program_words(), *sys.argv[1:]])
    needs = f" (add user and password to {', '.join(secret)})" if secret else ""
    if _launch is None:
        return f"continue with this after what launched it (srun, mpirun or such){needs}: {command}"
    return f"continue with{needs}: {command}"


def _resume_command(words: Sequence[str]) -> tuple[str, list[str]]:
    """The command that resumes a run, without credentials in URLs, and the options that need these."""
    option = "--resume_from_checkpoint"
    shown, secret = [], []
    for before, word in pairwise(["", *words]):
        if word.startswith(option) or before == option:
            continue
        shown.append(_replace_users(word, ""))
        if shown[-1] != word:
            secret.append(word.partition("=")[0] if word.startswith("--") else before)
    return shlex.join([*shown, option, "latest"]), secret
