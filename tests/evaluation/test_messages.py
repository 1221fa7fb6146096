"""The record of what error messages name, which every test of this suite is held against: see messages.py."""

import re
from pathlib import Path

from messages import load_golden, names

ROOT = Path(__file__).resolve().parents[2]


def test_names_are_options_quotes_numbers_and_files() -> None:
    message = "run/b.json: box 3: expected 'bbox' of 4 numbers (--eval.boxes), found [1, -2.5] of left_eye"
    assert names(message) == {"b.json", "3", "'bbox'", "4", "--eval.boxes", "1", "2.5", "left_eye"}


def test_every_recorded_test_is_still_there() -> None:
    for test in load_golden():
        file, name = re.fullmatch(r"(.+)::(\w+)\[.*\]", test).groups()  # pyright: ignore[reportOptionalMemberAccess]
        assert f"def {name}(" in (ROOT / file).read_text(), test
