"""What reaches a terminal: names from files show their control codes, and errors stay one line."""

import subprocess
import sys
from pathlib import Path

import pytest

from sapiens_accel.errors import UserError, escape

HOSTILE = "left\x1b]0;title\x07_eye\x1b[2J\r\u202e\ud800\x9b31m\u2028é"
SHOWN = r"left\x1b]0;title\x07_eye\x1b[2J\r\u202e\ud800\x9b31m\u2028é"


def test_control_codes_are_shown_as_their_escapes() -> None:
    assert escape(HOSTILE) == SHOWN
    assert escape(escape(HOSTILE)) == SHOWN
    assert escape("a\tb\nc") == "a\tb\nc"
    assert escape(r"C:\new names\ü 目.jpg") == r"C:\new names\ü 目.jpg"


@pytest.mark.parametrize("code", [*range(0x20), *range(0x7F, 0xA0)])
def test_no_control_code_is_left(code: int) -> None:
    assert all(letter.isprintable() for letter in escape(f"a{chr(code)}b", keep=""))


def test_a_user_error_is_one_line() -> None:
    assert str(UserError(f"a\nb\n{HOSTILE}")) == rf"a\nb\n{SHOWN}"


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
