"""--preset: options over any recipe, under those of the command line, and not in the record of a run."""

from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import yaml

from sapiens_accel.config import parse
from sapiens_accel.config.schema import STAGES, Config, Preset
from sapiens_accel.errors import UserError
from sapiens_accel.memory import fitting, stages, strategies
from sapiens_accel.memory.estimate import Room
from sapiens_accel.runtime.files import GIB

RECIPES = ("demo", "sapiens_0.3b_coco", "sapiens2_1b_coco")


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_preset_changes_its_options_alone(recipe: str) -> None:
    plain, fast, small = (
        parse.load(["--recipe", recipe, *words])
        for words in ([], ["--preset", "fast"], ["--preset=limited_memory", "--memory.micro_batch", "3"])
    )
    stage = {"phase1": 3, "phase2": 20, "ssl": 10}
    changed = {name: replace(getattr(plain, name), epochs=epochs, steps=None) for name, epochs in stage.items()}
    assert fast == replace(plain, **changed)  # type: ignore[arg-type]
    assert small.memory.micro_batch == 3 and small.memory.teacher == "host"  # the command line is above the preset
    assert {small.get_stage(name).global_batch for name in STAGES} == {32}
    rest = replace(small, memory=plain.memory, eval=plain.eval, **{name: getattr(plain, name) for name in STAGES})  # type: ignore[arg-type]
    assert rest == plain


def test_print_config_has_it_in_full(capsys: pytest.CaptureFixture[str]) -> None:
    for preset in get_args(Preset):
        with pytest.raises(SystemExit):
            parse.load(["--recipe", "sapiens_0.3b_coco", "--preset", preset, "--print_config"])
        tree = yaml.safe_load(capsys.readouterr().out)
        overlay = yaml.safe_load(
            (Path(parse.__file__).parents[1] / "recipes" / "presets" / f"{preset}.yaml").read_text()
        )
        assert overlay
        for group, values in overlay.items():
            assert {key: tree[group][key] for key in values} == values


def test_a_record_is_not_laid_over_again(tmp_path: Path) -> None:
    run = parse.load(["--preset", "fast", "--phase2.epochs", "7"])
    parse.save(run, tmp_path / "config.yaml")
    assert parse.load([], base=tmp_path / "config.yaml") == run and run.phase2.epochs == 7 and run.preset is None
    (tmp_path / "mine.yaml").write_text("preset: fast\n")
    with pytest.raises(UserError, match=r"mine\.yaml: preset: only on the command line\. Run with --preset fast"):
        parse.load(["--recipe", str(tmp_path / "mine.yaml")])
    with pytest.raises(UserError, match=r"--preset fats: no such preset \(expected one of fast, .*did you mean fast"):
        parse.load(["--preset", "fats"])
    assert parse.load(["--preset", "null"]) == parse.load([]) and Config().preset is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("gib", "recipe", "way"), [(8, "sapiens_0.3b_coco", "plain"), (8, "sapiens_0.6b_coco", "zero2_offload+activations")]
)
def test_limited_memory_fits(gib: int, recipe: str, way: str) -> None:
    """By the memory plan, with CUDA's own GiB and 32 GiB of host memory; docs/memory_plan.md says it."""
    run = parse.load(["--recipe", recipe, "--preset", "limited_memory"])
    launch = replace(next(one for one in strategies.list_ways(1) if one.name == way), offload_activations=True)
    for stage in ("phase2", "ssl"):
        plan = fitting.fit(stages.measure_stage(run, stage), stage, launch, Room(device=(gib - 1) * GIB, host=30 * GIB))
        assert plan.fits and plan.share.micro_batch == 2 and plan.share.accumulation == 16
