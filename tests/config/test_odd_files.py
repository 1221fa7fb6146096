"""Recipes of odd content: one line that names the file, whatever the YAML reader or the parser makes of it."""

from pathlib import Path

import pytest

from sapiens_accel.config import parse
from sapiens_accel.errors import UserError


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"seed: \xff", "not YAML: 'utf-8' codec"),
        (b"seed: !!timestamp x", "not YAML"),
        (b"seed: !!bool x", "not YAML"),
        (b"seed: 2020-13-45", "not YAML: month must be in 1..12"),
        (b"seed: " + b"[" * 3_000 + b"]" * 3_000, "not YAML: maximum recursion"),
        (b"[1, 2]", "expected keys and values (YAML), found list"),
        (b"data: 5", "data: expected keys and values, found 5"),
        (b"phase2:\n  optim: 0.5", "phase2.optim: expected keys and values, found 0.5"),
        (b"data: [1]", "data: expected keys and values, found [1]"),
        (b"phase1: null", "phase1: expected keys and values, found None"),
        (b"data:\n  sigma: 1" + b"0" * 400, "int too large to convert to float"),
        (b"phase1: " + b"a" * 10_000, "phase1"),
    ],
)
def test_an_odd_recipe_is_one_line(tmp_path: Path, content: bytes, named: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_bytes(content)
    with pytest.raises(UserError) as caught:
        parse.load(["--recipe", str(file)])
    text = str(caught.value)
    assert str(file) in text and named in text and len(text) <= 2_100, text


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--augment.albumentations", "[{GaussNoise: "], "--augment.albumentations: not YAML: while parsing"),
        (["--augment.albumentations", "[]x"], "--augment.albumentations: not YAML: expected '<document start>'"),
        (["--augment.albumentations", "[{? [1] : 2}]"], "--augment.albumentations: not YAML: while constructing"),
        (["--augment.albumentations", "[!!int x]"], "--augment.albumentations: not YAML: invalid literal"),
        (["--augment.albumentations", "[!!timestamp x]"], "--augment.albumentations: not YAML"),
        (["--augment.albumentations", "[" * 3_000], "--augment.albumentations: not YAML: maximum recursion"),
        (["--augment.albumentations", "a" * 5_000], "no such file"),
        (["--recipe", "a" * 5_000 + ".yaml"], "no such file"),
        (["--phase2.optim", "{lr: !!timestamp x}"], "--phase2.optim: not YAML"),
        (["--phase2.optim={lr: !!timestamp x}"], "--phase2.optim: not YAML"),
        (["--phase2.optim", "[" * 3_000], "--phase2.optim: not YAML: maximum recursion"),
        (["--ssl.teacher", "{ratio: !!float x}"], "--ssl.teacher: not YAML: could not convert"),
        (["--data.more", "[!!timestamp x]"], "--data.more: not YAML"),
        (["--seed", "3", "--phase2.optim.lr", "!!timestamp x"], "--phase2.optim.lr: not YAML"),
        (["--eval.scales", "[!!timestamp x]"], "--eval.scales: not YAML"),
    ],
)
def test_an_odd_value_is_one_line_that_names_its_option(words: list[str], named: str) -> None:
    with pytest.raises(UserError) as caught:
        parse.load(words)
    text = str(caught.value)
    assert named in text and "demo.yaml" not in text and "\n" not in text and "\\n" not in text, text


def test_a_folder_may_be_named_as_what_is_no_yaml() -> None:
    config = parse.load(["--output_dir", "2020-13-45", "--data.root", "[x"])
    assert (config.output_dir, config.data.root) == ("2020-13-45", "[x")
