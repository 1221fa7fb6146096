"""sapiens-accel: every command by its name, and nothing imported that it does not need."""

import importlib
import subprocess
import sys

import pytest

from sapiens_accel import cli
from sapiens_accel.errors import UserError


def test_help_lists_each_command_on_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    cli.run(["--help"])
    lines = capsys.readouterr().out.splitlines()
    for name, command in cli.COMMANDS.items():
        assert [line.split(maxsplit=1) for line in lines].count([name, command.help]) == 1


def test_an_unknown_command_is_one_line() -> None:
    with pytest.raises(
        UserError, match=r"^docter: no such command \(expected one of doctor, .*\)\. Did you mean doctor\?$"
    ):
        cli.run(["docter"])


def test_each_command_is_a_main_that_takes_words() -> None:
    for name, command in cli.COMMANDS.items():
        assert callable(importlib.import_module(command.module).main), name


def test_the_list_of_commands_imports_none_of_them() -> None:
    script = (
        "import sys; from sapiens_accel import cli; cli.run([]); print({'torch', 'numpy', 'yaml'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"
