"""defaults <- recipe (YAML) <- command line; `--help`, `--print_config`, and the nearest name of one that is not there.

A recipe in `recipes/` says only what differs from the defaults of `schema.py`.
"""

import dataclasses
import difflib
import glob
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from sapiens_accel.config.schema import (  # noqa: F401  (some are imported from here until their files are merged)
    STAGES,
    AugmentConfig,
    Config,
    DataConfig,
    EvalConfig,
    MemoryConfig,
    ModelConfig,
    MoreData,
    OptimConfig,
    Place,
    StageConfig,
    StageName,
    SyntheticConfig,
    TeacherConfig,
)
from sapiens_accel.errors import Interrupted, UserError  # noqa: F401
from sapiens_accel.errors import run_main as guarded  # noqa: F401

# benchmarks/results/ssl_cpu_2026-11-23_weight_1.json: means of 3 seeds.
LITERAL_WARNING = (
    "softmaxes of raw heatmaps with the teacher's alone sharpened; measured on drawn people, 30 labels: AP 4.9 where "
    "supervised training gives 16.1 and kl 28.8, with peaks of 7.9 where targets end at 1"
)

set_parsing_settings(docstring_parse_attribute_docstrings=True)


def load(argv: Sequence[str], prog: str = "train.py", base: Path | None = None) -> Config:
    """Defaults, then the recipe (`--recipe`, or the file `base`), then the other arguments.

    Raises:
        UserError: no such recipe, a key that does not exist (with the nearest one that does), a value of another type.
    """
    show = "--print_config" in argv
    words = _spell_out_switches([word for word in argv if word != "--print_config"])
    recipe = _value_of(words, "recipe") or Config.recipe
    path = base or recipe_path(recipe)
    _check_keys(words, path)
    parser = ArgumentParser(
        prog=prog, default_config_files=[glob.escape(str(path))], exit_on_error=False, description=Config.__doc__
    )
    parser.add_class_arguments(Config)
    try:
        config = Config(**vars(parser.instantiate(parser.parse_args(words))))
    except ArgumentError as error:
        raise UserError(" ".join(str(error).split())) from None
    config = dataclasses.replace(config, output_dir=config.output_dir.replace("{recipe}", _recipe_name(config.recipe)))
    _check_values(config)
    _warn(config)
    if show:
        print(_as_yaml(config), end="")
        sys.exit(0)
    return config


def _warn(config: Config) -> None:
    """Say once what is known to make a model worse."""
    losing = [name for name in config.stages if (teacher := config.of(name).teacher) and teacher.loss == "literal"]
    if losing and os.environ.get("RANK", "0") == "0":
        print(f"warning: --{losing[0]}.teacher.loss literal: {LITERAL_WARNING}", file=sys.stderr, flush=True)


def recipe_path(recipe: str) -> Path:
    """The YAML file of a recipe's name, or the file itself.

    Raises:
        UserError: there is neither.
    """
    if recipe.endswith((".yaml", ".yml")):
        if not Path(recipe).is_file():
            raise UserError(f"--recipe {recipe}: no such file")
        return Path(recipe)
    folder = Path(str(resources.files("sapiens_accel.recipes")))
    names = sorted(path.stem for path in folder.glob("*.yaml"))
    if recipe not in names:
        raise UserError(f"--recipe {recipe}: no such recipe{_nearest(recipe, names)}. There are: {', '.join(names)}")
    return folder / f"{recipe}.yaml"


def _check_values(config: Config) -> None:
    """Refuse numbers that no run can have."""
    positive = {"log_every": config.log_every, "save_every": config.save_every, "eval_every": config.eval_every}
    positive |= {"keep_checkpoints": config.keep_checkpoints, "max_steps": config.max_steps}
    positive |= {"data.stream_parts": config.data.stream_parts, "data.stream_window": config.data.stream_window}
    positive |= {"data.sigma": config.data.sigma, "memory.micro_batch": config.memory.micro_batch}
    positive |= {"memory.head_chunk": config.memory.head_chunk}
    for stage in STAGES:
        plan = config.of(stage)
        positive |= {f"{stage}.{knob}": getattr(plan, knob) for knob in ("steps", "epochs", "global_batch")}
        if plan.teacher:
            _check_teacher(stage, plan.teacher)
    for knob, value in positive.items():
        if value is not None and value <= 0:
            raise UserError(f"--{knob} {value}: expected a number above 0")
    if config.data.weight is not None and not config.data.more:
        raise UserError(f"--data.weight {config.data.weight:g}: of one data set alone; name the others by --data.more")
    if config.push_to_hub and config.hub_model_id is None:
        raise UserError("--push_to_hub: to which repository? Name it by --hub_model_id ORG/NAME")
    check_model_id(config.hub_model_id)
    _check_eval(config.eval)


def check_model_id(name: str | None) -> None:
    """Refuse a name that no repository of the Hub can have."""
    part = r"[A-Za-z0-9_]([\w.-]{0,94}[A-Za-z0-9_])?"
    if name is not None and (not re.fullmatch(f"{part}/{part}", name, re.ASCII) or re.search(r"--|\.\.|\.git$", name)):
        raise UserError(f"--hub_model_id {name}: expected ORG/NAME: letters, digits, and single '-', '_' or '.' within")


def _check_eval(evaluation: EvalConfig) -> None:
    scales = evaluation.scales
    if not scales or not all(0.1 <= scale <= 4 for scale in scales) or len(set(scales)) < len(scales):
        shown = " ".join(f"{scale:g}" for scale in scales) or "(none)"
        raise UserError(f"--eval.scales {shown}: expected different factors of 0.1 to 4, as 0.5 1.0 1.5 2.0")
    for knob in ("score_threshold", "nms_threshold", "min_box_score"):
        if not 0 <= (value := getattr(evaluation, knob)) <= 1:
            raise UserError(f"--eval.{knob} {value:g}: expected 0 to 1")
    for knob, least in {"batch_size": 1, "num_pictures": 0, "num_worst": 0}.items():
        if getattr(evaluation, knob) < least:
            raise UserError(f"--eval.{knob} {getattr(evaluation, knob)}: expected at least {least}")
    if evaluation.html is not None and (not evaluation.html or Path(evaluation.html).is_dir()):
        raise UserError(f"--eval.html {evaluation.html or '(empty)'}: expected a file to write, as eval.html")


def _check_teacher(stage: str, teacher: TeacherConfig) -> None:
    ranges = {"ema_decay": (0, 1), "threshold": (-1, 1), "temperature": (1e-3, 10), "ramp": (0, 1), "weight": (0, 1e6)}
    for knob, (low, high) in {**ranges, "ratio": (0, 64), "cutout": (0, 64)}.items():
        value = getattr(teacher, knob)
        if value is not None and not low <= value <= high:
            raise UserError(f"--{stage}.teacher.{knob} {value}: expected {low:g} to {high:g}")


def _recipe_name(recipe: str) -> str:
    # Only a file has a stem: in sapiens_0.3b_coco the dot is part of the name.
    return Path(recipe).stem if recipe.endswith((".yaml", ".yml")) else recipe


def save(config: Config, path: Path) -> None:
    """Write the whole tree as YAML; `load` with this file as `base` gives an equal one back."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_as_yaml(config))


def _as_yaml(config: Config) -> str:
    return yaml.safe_dump(_plain(dataclasses.asdict(config)), sort_keys=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value


def _keys(kind: type, prefix: str = "") -> Iterator[str]:
    for spec in dataclasses.fields(kind):
        yield prefix + spec.name
        inner = TeacherConfig if spec.name == "teacher" else spec.type
        if isinstance(inner, type) and dataclasses.is_dataclass(inner):
            yield from _keys(inner, f"{prefix}{spec.name}.")


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        yield f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")


def _check_keys(words: Sequence[str], path: Path) -> None:
    known = list(_keys(Config))
    try:
        tree = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, Mapping):
        raise UserError(f"{path}: expected keys and values, found {type(tree).__name__}")
    for key in _flatten(tree):
        if key not in known:
            raise UserError(f"{path}: no such key {key!r}{_nearest(key, known)}")
    for word in words:
        key = word[2:].split("=")[0]
        if word.startswith("--") and key not in (*known, "help"):
            raise UserError(f"no such option --{key}{_nearest(key, known, '--')}")


def _nearest(word: str, names: Sequence[str], dashes: str = "") -> str:
    # A forgotten or wrong group (--lr for --phase2.optim.lr) is as common as a slip of the finger.
    close = difflib.get_close_matches(word, names, n=1) or [n for n in names if n.split(".")[-1] == word.split(".")[-1]]
    return f"; did you mean {dashes}{close[0]}?" if close else ""


def _value_of(words: Sequence[str], name: str) -> str | None:
    for word, following in pairwise([*words, ""]):
        if word == f"--{name}":
            return following
        if word.startswith(f"--{name}="):
            return word.split("=", 1)[1]
    return None


def _spell_out_switches(argv: Sequence[str]) -> list[str]:
    """`--dry_run` alone means `--dry_run=true`, as everywhere else on a command line."""
    options = (f"memory.{name}" for name in ("offload_activations", "adam_8bit", "compile_blocks", "force"))
    evaluation = (f"eval.{name}" for name in ("flip", "compare", "ensemble"))
    names = ("dry_run", "push_to_hub", "hub_private", "data.streaming", *options, *evaluation)
    values = {f"--{name}": "true" for name in names} | {"--eval.html": "auto"}
    bare = [following.startswith("--") or not following for _, following in pairwise([*argv, ""])]
    return [
        f"{word}={values[word]}" if word in values and last else word for word, last in zip(argv, bare, strict=True)
    ]
