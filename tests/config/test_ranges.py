"""Each number of the tree has a range, and outside of it nothing runs: from the command line and from a file."""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from sapiens_accel.config.options import options, switches
from sapiens_accel.config.parse import load
from sapiens_accel.config.schema import STAGES, Range
from sapiens_accel.errors import UserError


def _numbers(kind: Any) -> Iterator[tuple[type, Range | None]]:
    if get_origin(kind) is Annotated:
        yield get_args(kind)[0], kind.__metadata__[0]
    elif kind in (int, float):
        yield kind, None
    else:
        for inner in get_args(kind):
            yield from _numbers(inner)


NUMERIC = {key: found[0] for key, kind in options().items() if (found := list(_numbers(kind))) and key[:5] != "phase"}
NUMERIC |= {f"phase2{key[3:]}": number for key, number in NUMERIC.items() if key.startswith("ssl")}


def _outside(key: str) -> list[float]:
    number, limits = NUMERIC[key]
    assert limits is not None, f"{key} has no range"
    step = 1 if number is int else 1e-3
    values = [limits.low if limits.open_low else limits.low - step]
    if not math.isinf(limits.high):
        values.append(limits.high if limits.open_high else limits.high + step)
    return values + ([math.nan, math.inf, -math.inf] if number is float else [])


def _text(key: str, value: float) -> str:
    """A value in the form of its option: alone, in a pair, in a list."""
    one = yaml.safe_dump(value).split("\n")[0]
    kind = str(options()[key])
    if key.startswith("data.more."):
        return one
    return f"[{one}, {one}]" if "tuple" in kind else one


def test_there_is_a_range_for_every_number() -> None:
    assert len(NUMERIC) > 60
    assert all(limits is not None for _, limits in NUMERIC.values())


@pytest.mark.parametrize("key", NUMERIC)
def test_a_number_outside_of_its_range_is_one_line(key: str) -> None:
    for value in _outside(key):
        text = _text(key, value)
        words = [f"--{key}={text}"]
        if key.startswith("data.more."):
            words = ["--data.more", f"[{{root: x, {key.split('.')[-1]}: {text}}}]"]
        with pytest.raises(UserError) as caught:
            load(words)
        said = str(caught.value)
        assert said == f"--{key}: out of its range (expected {NUMERIC[key][1]}, found {value:.12g})"


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "NaN", "1e999"])
def test_what_is_no_finite_number_is_refused_however_it_is_spelt(value: str) -> None:
    with pytest.raises(UserError, match=r"^--phase2\.optim\.lr: .*expected a number >= 0, found"):
        load([f"--phase2.optim.lr={value}"])


def test_a_file_is_named_where_it_gives_the_value(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("phase2: {optim: {clip_norm: -1}}")
    with pytest.raises(UserError) as caught:
        load(["--recipe", str(path)])
    assert str(caught.value) == f"{path}: phase2.optim.clip_norm: out of its range (expected a number >= 0, found -1)"
    assert load(["--recipe", str(path), "--phase2.optim.clip_norm=2"]).phase2.optim.clip_norm == 2


@given(
    low=st.integers(-5, 5),
    size=st.integers(0, 5),
    value=st.integers(-12, 12),
    ends=st.tuples(st.booleans(), st.booleans()),
)
def test_a_range_holds_what_is_between_its_ends(low: int, size: int, value: int, ends: tuple[bool, bool]) -> None:
    limits = Range(low, low + size, open_low=ends[0], open_high=ends[1])
    assert (value in limits) == (value in range(low + ends[0], low + size + 1 - ends[1]))


@pytest.mark.parametrize("value", [10**400, -(10**400), float("inf"), float("-inf"), float("nan")])
def test_a_number_that_no_float_holds_is_in_no_range(value: float) -> None:
    assert value not in Range(float("-inf"))
    assert value not in Range(0)


@pytest.mark.parametrize("key", [key for key in switches() if not key.startswith("data.more")])
def test_every_true_or_false_is_a_switch(key: str) -> None:
    def value(words: list[str]) -> object:
        found: Any = load([*words, "--hub_model_id=a/b", "--lora.rank=2"])  # which some switches need
        for name in key.split("."):
            found = getattr(found, name)
        return found

    assert [value([f"--{key}"]), value([f"--{key}", "false"]), value([f"--{key}=true"])] == [True, False, True]


def test_every_option_is_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load(["--help", "all"])
    text = capsys.readouterr().out
    assert not re.search(r"Annotated|Optional|Literal|Union|tuple|\(type:|\bdict\[", text), "Python, not words"
    inner = ("data.more.", *(f"{stage}.teacher." for stage in STAGES if stage != "ssl"))  # as those of ssl
    shown = [key for key in options() if not key.startswith(inner)]
    assert [key for key in shown if f"--{key}" not in text] == []


def test_the_help_of_an_optional_group_is_an_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load(["--ssl.teacher.help"])
    assert "--ssl.teacher.threshold" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--data.more=[{rot: a}]"], "--data.more: no such key 'data.more.rot'; did you mean data.more.root?"),
        (
            ["--phase2.optim", "{lrr: 1}"],
            "--phase2.optim: no such key 'phase2.optim.lrr'; did you mean phase2.optim.lr?",
        ),
    ],
)
def test_a_misspelled_key_inside_a_value_names_the_nearest(words: list[str], said: str) -> None:
    with pytest.raises(UserError) as caught:
        load(words)
    assert str(caught.value) == said


def test_names_of_columns_in_a_recipe_are_free(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("data: {columns: {people: whom, bbox: xywh}}")
    assert load(["--recipe", str(tmp_path / "mine.yaml")]).data.columns == {"people": "whom", "bbox": "xywh"}
