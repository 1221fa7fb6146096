"""What reaches a terminal: names from files show their control codes, and errors stay one line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from sapiens_accel import errors
from sapiens_accel.errors import UserError, _resume_command, continue_with, escape, read_tree

HOSTILE = "left\x1b]0;title\x07_eye\x1b[2J\r\u202e\ud800\x9b31m\u2028é"
SHOWN = r"left\x1b]0;title\x07_eye\x1b[2J\r\u202e\ud800\x9b31m\u2028é"


def test_control_codes_are_shown_as_their_escapes() -> None:
    assert escape(HOSTILE) == SHOWN
    assert escape(escape(HOSTILE)) == SHOWN
    assert escape("a\tb\nc") == "a\tb\nc"
    assert escape("a\u00a0b\u3000c") == "a\u00a0b\u3000c", "spaces of a path, in a command to be pasted"
    assert escape(r"C:\new names\ü 目.jpg") == r"C:\new names\ü 目.jpg"


@pytest.mark.parametrize("code", [*range(0x20), *range(0x7F, 0xA0)])
def test_no_control_code_is_left(code: int) -> None:
    assert all(letter.isprintable() for letter in escape(f"a{chr(code)}b", keep=""))


def test_a_user_error_is_one_line() -> None:
    assert str(UserError(f"a\nb\n{HOSTILE}")) == rf"a\nb\n{SHOWN}"


def test_a_quoted_value_does_not_drown_what_is_said_of_it() -> None:
    text = str(UserError(f"skeleton.yaml: names: {'a' * 100_000} is no keypoint"))
    assert len(text) < 2_100 and text.startswith("skeleton.yaml: names: aaa") and text.endswith("aaa is no keypoint")
    assert str(UserError("a" * 2_000)) == "a" * 2_000


def test_a_program_prints_no_control_code(tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    script.write_text(
        "from sapiens_accel.errors import UserError, run_main\n"
        "def main(words):\n"
        f"    print({HOSTILE!r}, 'and', {HOSTILE!r}, flush=True)\n"
        f"    raise UserError({HOSTILE!r})\n"
        "run_main(main)\n"
    )
    done = subprocess.run(
        [sys.executable, script], capture_output=True, timeout=60, env={"PYTHONPATH": ".", "PYTHONUTF8": "1"}
    )
    assert done.returncode == 2
    assert done.stdout.decode() == f"{SHOWN} and {SHOWN}\n"
    assert done.stderr.decode() == f"program.py: error: {SHOWN}\n"


def _run(tmp_path: Path, body: str, before: str = "") -> subprocess.CompletedProcess[str]:
    """A program whose main has this body, in a process of its own."""
    script = tmp_path / "program.py"
    script.write_text(
        "import atexit, sys, threading, time\nfrom sapiens_accel import errors\n"
        f"{before}\ndef main(words):\n    {body}\nerrors.run_main(main)\n"
    )
    environment = {"PYTHONPATH": ".", "PYTHONUTF8": "1"}
    return subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60, env=environment)


def test_a_program_that_failed_ends_though_no_thread_can_be_started_any_more(tmp_path: Path) -> None:
    # As Python does from 3.12 on: a process that ends starts no thread.
    before = (
        "errors.SECONDS_TO_END = 0.2\n"
        "def refuse(*_):\n    raise RuntimeError('can not start new thread at interpreter shutdown')\n"
        "def refuse_threads():\n    threading._start_new_thread = refuse\n"
        "atexit.register(time.sleep, 50)\n"
    )
    body = "atexit.register = lambda f, g=atexit.register: (g(f), g(refuse_threads)); raise errors.UserError('gone')"
    done = _run(tmp_path, body, before)
    assert (done.returncode, done.stderr) == (2, "program.py: error: gone\n")


@pytest.mark.parametrize(
    ("number", "said"),
    [("EACCES", "x.json: gone: no permission to read or write it"), ("ENOSPC", "x.json: gone. Free space there")],
)
def test_what_may_not_be_opened_needs_no_room(tmp_path: Path, number: str, said: str) -> None:
    done = _run(tmp_path, f"import errno; raise OSError(errno.{number}, 'gone', 'x.json')")
    assert done.returncode == 2 and done.stderr.startswith(f"program.py: error: {said}")
    assert ("Free space" in done.stderr) == (number == "ENOSPC")


def test_a_command_to_continue_can_run_and_has_no_password() -> None:
    words = ["train.py", "--data.root", "https://u:p@ss@host/d", "--seed=1", "--resume_from_checkpoint", "old"]
    command = "train.py --data.root https://host/d --seed=1 --resume_from_checkpoint latest"
    assert _resume_command(words) == (command, ["--data.root"])
    words[1:3] = ["--data.root=sftp://me@host/d"]
    assert _resume_command(words) == (command.replace("root https://", "root=sftp://me@"), [])


def test_how_to_continue_ends_with_a_command_to_paste(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "--data.root=https://u:p@host/d"])
    monkeypatch.setattr(errors, "_launch", None)
    command = "train.py --data.root=https://host/d --resume_from_checkpoint latest"
    needs = "(add user and password to --data.root)"
    assert continue_with() == f"continue with this after what launched it (srun, mpirun or such) {needs}: {command}"
    monkeypatch.setattr(errors, "_launch", ["accelerate", "launch"])
    assert continue_with() == f"continue with {needs}: accelerate launch {command}"
    monkeypatch.setattr(sys, "argv", ["train.py"])
    assert continue_with() == "continue with: accelerate launch train.py --resume_from_checkpoint latest"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://u:p@ss@host/d", "https://***@host/d"),
        ("https://u:p/q@host/d", "https://***@host/d"),
        ("simplecache::https://u:p@host/x", "simplecache::https://***@host/x"),
        ("https://host:80/a@b", "https://host:80/a@b"),
        ("abfs://box@account.net/d", "abfs://box@account.net/d"),
        ("github://me:repo@main/d", "github://me:repo@main/d"),
        ("sftp://me@host/d", "sftp://me@host/d"),
        ("sftp://me:p@host/d", "sftp://***@host/d"),
    ],
)
def test_of_an_address_what_is_secret_is_hidden(text: str, shown: str) -> None:
    assert escape(text) == escape(shown) == shown


@pytest.mark.parametrize(
    ("content", "parse", "named"),
    [
        (b'{"a": 1', json.loads, "not JSON: Expecting"),
        (b"[" * 100_000, json.loads, "not JSON: maximum recursion depth"),
        (b'{"a": "\xff"}', json.loads, "not JSON: 'utf-8' codec"),
        (b"[1, 2]", json.loads, "expected keys and values (JSON), found list"),
        (b"a: 2020-13-45", yaml.safe_load, "not JSON: month must be in 1..12"),
        (b"a: !!timestamp x", yaml.safe_load, "not JSON: 'NoneType' object"),
        (b"a: !!bool x", yaml.safe_load, "not JSON: 'x'"),
        (b"a: !!python/name:os.system x", yaml.safe_load, "not JSON: could not determine a constructor"),
        (b"", yaml.safe_load, "found NoneType"),
    ],
)
def test_a_file_of_another_form_is_named(tmp_path: Path, content: bytes, parse: object, named: str) -> None:
    file = tmp_path / "odd"
    file.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_tree(file, parse, "JSON")  # pyright: ignore[reportArgumentType]
    assert str(caught.value).startswith(f"{file}: ") and named in str(caught.value)
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read_tree(tmp_path / "none", json.loads, "JSON")


def test_keys_and_values_are_read(tmp_path: Path) -> None:
    (tmp_path / "x").write_text('{"a": [1, "\u00e9"]}', encoding="utf-8")
    assert read_tree(tmp_path / "x", json.loads, "JSON") == read_tree(tmp_path / "x", yaml.safe_load, "YAML")


@pytest.mark.parametrize("when", ["import", "main"])
def test_ctrl_c_is_one_line(when: str) -> None:
    """Also while a program imports its libraries, which takes seconds: it was a traceback."""
    body = {"import": "interrupt()", "main": "errors.run_main(lambda _: interrupt())"}[when]
    # Below a suite that a shell runs behind `&` it would be ignored, as under nohup.
    code = (
        "import os, signal, time\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from sapiens_accel import errors\nerrors.end_on_interrupt()\n"
        f"def interrupt():\n    os.kill(os.getpid(), signal.SIGINT)\n    time.sleep(60)\n{body}\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50, check=False)
    assert found.returncode == 130 and found.stderr == "-c: stopped by Ctrl-C\n" and not found.stdout
