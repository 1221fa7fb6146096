import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fuzz_seconds", type=float, default=None, help="pytest tests/fuzz: how long; default 1,000 mutants, and 3,000 with -m slow"
    )
