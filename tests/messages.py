"""What the error messages of each test name: new wording must name no less than golden/messages_*.json recorded.

To record: RECORD_MESSAGES=FILE pytest -n 0 FOLDERS. A message's folders are left out, since they differ by run.
"""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from sapiens_accel.errors import UserError

GOLDEN = Path(__file__).parent / "golden"
# Options, quoted strings, and whatever word has a digit, an underscore or a dot in it: numbers, ids, names, files.
NAME = re.compile(r"--[\w.]*\w|'[^']+'|\w+(?:[._]\w+)*")


def names(message: str) -> set[str]:
    found = NAME.findall(re.sub(r"(?<![\w<])(?:[\w.~-]*/)+", "", message))
    return {name for name in found if name[0] in "-'" or re.search(r"[\d_.]", name)}


def load_golden() -> dict[str, list[str]]:
    return {
        test: said for file in GOLDEN.glob("messages_*.json") for test, said in json.loads(file.read_text()).items()
    }


def key_of(item: pytest.Item) -> str:
    """A test by its name and the places of its parameters, whose own words may change."""
    place = "-".join(str(index) for index in item.callspec.indices.values()) if hasattr(item, "callspec") else ""
    return f"{item.nodeid.split('[')[0]}[{place}]"


class Recorder:
    """A plugin of pytest: every UserError that a test makes, held against what is recorded of it."""

    def __init__(self) -> None:
        self.golden = load_golden()
        self.file = os.environ.get("RECORD_MESSAGES")
        self.recorded: dict[str, list[str]] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        said: list[str] = []
        before = UserError.__init__

        def note(error: UserError, *words: object) -> None:
            said.extend(map(str, words[:1]))
            before(error, *words)

        UserError.__init__ = note
        try:
            yield
        finally:
            UserError.__init__ = before
        if self.file and said:
            shown = [re.sub(r"(?<![\w<])/(?:[\w.~-]*/)*", "", message) for message in said]
            self.recorded[key_of(item)] = list(dict.fromkeys(shown))
        now = set().union(*map(names, said))
        for message in [] if self.file else self.golden.get(key_of(item), []):
            assert names(message) <= now, f"no longer named: {sorted(names(message) - now)} of {message!r}"

    def pytest_sessionfinish(self) -> None:
        if self.file:
            Path(self.file).write_text(json.dumps(self.recorded, indent=1, ensure_ascii=False) + "\n")
