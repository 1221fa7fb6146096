"""Damaged files of every kind that is read: each is read, or refused in one line; none is a traceback or a crash."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SEED = 0
TESTS = Path(__file__).parents[1]


# 3,000 mutants take 4 CPU minutes. Any number of them is shared out among all targets.
@pytest.mark.parametrize("num", [300, pytest.param(3_000, marks=pytest.mark.slow)])
def test_no_damaged_file_is_a_traceback(num: int, request: pytest.FixtureRequest) -> None:
    """In a separate process: its forks must not have pytest's threads and files."""
    seconds = request.config.getoption("--fuzz_seconds", None)
    words = ["--seconds", f"{seconds}"] if seconds else ["--mutants", f"{num}"]
    # With a time limit, every run has other mutants.
    words += ["--seed", f"{os.getpid() if seconds else SEED}"]
    done = subprocess.run(
        [sys.executable, "-m", "fuzz.fuzzer", *words], cwd=TESTS, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}"},
    )  # fmt: skip
    print(done.stdout[-20_000:], done.stderr[-5_000:], sep="\n")
    assert done.returncode == 0, done.stdout[-20_000:]
