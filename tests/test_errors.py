"""What reaches a terminal: names from files show their control codes, and errors stay one line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from sapiens_accel.errors import UserError, escape, read_tree

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
