import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fuzz_seconds", type=float, default=None, help="pytest tests/fuzz: how long; else 1,000 mutants, slow: 3,000"
    )
