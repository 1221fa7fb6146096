"""docs/recipes.md is what docs/list_recipes.py writes."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from sapiens_accel.config.parse import list_recipes

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("list_recipes", DOCS / "list_recipes.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _rows() -> dict[str, str]:
    lines = (DOCS / "recipes.md").read_text().splitlines()
    return {line.split("`")[1]: line for line in lines if line.startswith("| `")}


def test_every_recipe_is_in_the_table(script: ModuleType) -> None:
    assert set(_rows()) == {*list_recipes()} - {"demo"}
    text = (DOCS / "recipes.md").read_text()
    assert all(
        part in text for part in (script.ABOVE, *(f"| {name} | {ap} |" for name, ap in script.PUBLISHED.items()))
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sapiens_0.3b_coco", "sapiens_1b_coco_lora"])
def test_a_row_is_what_the_plan_predicts(script: ModuleType, name: str) -> None:
    assert _rows()[name] == script.row(name)
