"""defaults <- recipe (YAML) <- command line; `--help`, `--print_config`, and "did you mean" for unknown names.

A recipe in `recipes/` holds only what differs from the defaults of `schema.py`.
"""

import dataclasses
import difflib
import glob
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib import resources
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, get_args, get_origin

import yaml
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from sapiens_accel.config import credentials, help
from sapiens_accel.config.options import describe, is_group, options, range_faults, switches
from sapiens_accel.config.schema import ALL, STAGES, TRACKERS, Config, DistillConfig, LoraConfig, Preset
from sapiens_accel.errors import UserError, end_on_interrupt, read_tree, run_main

# benchmarks/results/ssl_cpu_2026-11-23_weight_1.json: means of 3 seeds.
LITERAL_WARNING = (
    "softmaxes of raw heatmaps with the teacher's alone sharpened; measured on drawn people, 30 labels: AP 4.9 where "
    "supervised training gives 16.1, with peaks of 7.9 where targets end at 1"
)

# What other programs call an option.
BATCHES = "{stage}.global_batch (people in a step) or --memory.micro_batch (people on a GPU at a time)"
OTHER_NAMES = {
    "batch_size": BATCHES, "batch": BATCHES, "global_batch": "{stage}.global_batch",
    "per_device_train_batch_size": "memory.micro_batch", "micro_batch": "memory.micro_batch",
    "epochs": "{stage}.epochs", "num_epochs": "{stage}.epochs", "num_train_epochs": "{stage}.epochs",
    "lr": "{stage}.optim.lr", "lr0": "{stage}.optim.lr", "learning_rate": "{stage}.optim.lr",
    "weight_decay": "{stage}.optim.weight_decay", "warmup_steps": "{stage}.optim.warmup_steps",
    "workers": "data.num_workers", "num_workers": "data.num_workers", "imgsz": "data.input_hw",
}  # fmt: skip

set_parsing_settings(docstring_parse_attribute_docstrings=True)


def load(argv: Sequence[str], prog: str = "train.py", base: Path | Config | None = None) -> Config:
    """Combine the defaults, the recipe (`--recipe`, or the options `base`, a file of them or a Config) and `argv`.

    `--help` and `--print_config` print and exit.

    Raises:
        UserError: an unknown recipe, an unknown key (with the most similar known one), a value of the wrong type or out
            of its range.
    """
    if isinstance(base, Config):
        with TemporaryDirectory() as folder:
            save(base, Path(folder) / "config.yaml")
            return load(argv, prog, Path(folder) / "config.yaml")
    show = "--print_config" in argv
    words = _spell_out(_name_resume([word for word in argv if word != "--print_config"]))
    recipe = _value_of(words, "recipe") or Config.recipe
    path = base or recipe_path(recipe)
    tree = _read_recipe(path)
    _check_keys(words, path, tree)
    _check_groups(path, tree)
    words = [*_read_preset(words, path, tree), *words]
    parser = _parser()
    parser.prog, parser.default_config_files = prog, [glob.escape(str(path))]
    if asked := next((word for word in words if word in ("-h", "--help")), None):
        defaults = Config(**vars(parser.instantiate(parser.get_defaults())))
        form = help.format_all if "all" in words[words.index(asked) + 1 :] else help.format_everyday
        print(form(prog, _recipe_name(recipe), defaults))
        sys.exit(0)
    try:
        config = Config(**vars(parser.instantiate(parser.parse_args(words))))
    except ArgumentError as error:
        raise UserError(_describe_type_error(" ".join(str(error).split()), words, path, tree)) from None
    except (TypeError, ValueError, AttributeError, KeyError, RecursionError, OverflowError) as error:
        for key, value in _values(words):
            _read_yaml(f"--{key}", value)
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{path}, or the command line: an option of the wrong type: {reason}") from None
    # No shell replaces the ~ of --output_dir=~/run.
    output_dir = os.path.expanduser(config.output_dir.replace("{recipe}", _recipe_name(config.recipe)))  # noqa: PTH111
    transforms = read_transforms(config.augment.albumentations)
    augment = dataclasses.replace(config.augment, albumentations=transforms)
    # Its options are recorded one by one; laid over a record again, it would undo what the command line changed.
    config = dataclasses.replace(config, output_dir=output_dir, augment=augment, preset=None)
    config = credentials.take_all(config)
    for key, limits, value in range_faults(config, Config):
        where = _locate(key, words, path, tree)
        raise UserError(f"{where}: out of its range (expected {limits}, found {value:.12g})")
    _check_stages(config, _locate("stage", words, path, tree))
    _check_values(config)
    if show:
        print(_as_yaml(config), end="")
        sys.exit(0)
    return config


def to_words(overrides: Mapping[str, Any]) -> list[str]:
    """Options by their names ({"data.root": "DIR", "eval.scales": [0.7, 1]}) as words of a command line.

    Raises:
        UserError: a name or value that no option can have.
    """
    words = []
    for name, value in overrides.items():
        plain = dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value
        try:
            text = str(plain) if isinstance(plain, str | Path) else json.dumps(plain)
        except (TypeError, ValueError):
            raise UserError(f"{name}: not the value of an option (found {type(value).__name__})") from None
        words.append(f"--{name}={text}")
    return words


def answer_help(argv: Sequence[str], prog: str, usage: str = "") -> None:
    """Print the help and exit if `argv` asks for it. Programs call this before imports that take seconds.

    Ctrl-C during those ends the program with one line.
    """
    end_on_interrupt()
    if any(word in ("-h", "--help") or word.endswith(".help") for word in argv):
        if usage:
            print(usage)
        options_only = argv[next((i for i, word in enumerate(argv) if word.startswith("-")), 0) :]

        def answer(_: Sequence[str]) -> None:
            load(options_only, prog)

        run_main(answer)


@cache
def _parser() -> ArgumentParser:
    """The parser, cached: building it takes nearly all the time of a call, mostly for reading docstrings."""
    parser = ArgumentParser(exit_on_error=False, description=Config.__doc__)
    parser.add_class_arguments(Config)
    return parser


def _describe_type_error(reason: str, words: Sequence[str], path: Path, tree: Mapping[str, Any]) -> str:
    """The parser's message about a value of the wrong type, in our own form if it names an option."""
    keys = re.findall(r'Parser key "([\w.]+)"', reason)
    key = next((key for key in (".".join(keys[:2]), *keys[:1]) if key in options()), None)
    match = re.search(
        r"(?:Got value|Given value): (?:NestedArg\(key='\w+', val='(.*?)'\)|(.*?))(?: - Expected.*)?$", reason
    )
    if key is None or match is None:
        return reason
    value = match.group(1) or match.group(2)
    choices = [str(choice) for choice in get_args(options()[key])] if get_origin(options()[key]) is Literal else []
    wrong = "no such value" if choices else "wrong type"
    where = _locate(key, words, path, tree)
    return f"{where}: {wrong} (expected {describe(options()[key])}, found {value}){_nearest(value, choices)}"


def _locate(key: str, words: Sequence[str], path: Path, tree: Mapping[str, Any]) -> str:
    """Where a value comes from: the option, or the recipe file and the key in it."""
    on_command_line = [word[2:].split("=")[0] for word in words if word.startswith("--")]
    if any(f"{key}.".startswith(f"{one}.") for one in on_command_line):
        return f"--{key}"
    return f"{path}: {key}" if key in _flatten(tree) else f"--{key}"


def warn_of_harmful_options(config: Config) -> None:
    """Warn about options that are known to make a model worse."""
    teachers = {name: config.get_stage(name).teacher for name in config.stages}
    literal = [name for name, teacher in teachers.items() if teacher and teacher.loss == "literal"]
    if literal and os.environ.get("RANK", "0") == "0":
        print(f"warning: --{literal[0]}.teacher.loss literal: {LITERAL_WARNING}", file=sys.stderr, flush=True)


def recipe_path(recipe: str) -> Path:
    """The YAML file of a recipe, which is given by its name or its path.

    Raises:
        UserError: there is no such recipe or file.
    """
    if recipe.endswith((".yaml", ".yml")):
        if not _is_file(recipe):
            raise UserError(f"--recipe {recipe}: no such file")
        return Path(recipe)
    names = list_recipes()
    if recipe not in names:
        expected = f"expected one of {', '.join(names)}"
        raise UserError(f"--recipe {recipe}: no such recipe ({expected}){_nearest(recipe, names)}")
    return _recipes() / f"{recipe}.yaml"


def _read_preset(words: Sequence[str], path: Path, tree: Mapping[str, Any]) -> list[str]:
    """The options of `--preset` as words, to be put before those of the user.

    Raises:
        UserError: there is no such preset; a file names one.
    """
    if tree.get("preset") is not None:
        raise UserError(f"{path}: preset: only on the command line. Run with --preset {tree['preset']}")
    name, names = _value_of(words, "preset"), [str(one) for one in get_args(Preset)]
    if name in (None, "null"):
        return []
    if name not in names:
        raise UserError(f"--preset {name}: no such preset (expected one of {', '.join(names)}){_nearest(name, names)}")
    overlay = read_tree(_recipes() / "presets" / f"{name}.yaml", yaml.safe_load, "YAML")
    return to_words({f"{group}.{key}": value for group, values in overlay.items() for key, value in values.items()})


def list_recipes() -> list[str]:
    """The names of the recipes that are built in."""
    return sorted(path.stem for path in _recipes().glob("*.yaml"))


def _recipes() -> Path:
    return Path(str(resources.files("sapiens_accel.recipes")))


def refuse_drawn_people(config: Config, argv: Sequence[str]) -> None:
    """Refuse to train on drawn people unless the recipe or the command line asks for them by `data.synthetic`.

    Raises:
        UserError: `data.root` is missing.
    """
    asked = any(word.startswith("--data.synthetic") for word in argv)
    if (
        config.data.root is None
        and not asked
        and "data.synthetic" not in _flatten(_read_recipe(recipe_path(config.recipe)))
    ):
        raise UserError(
            f"--data.root: no data (expected a folder or dataset for recipe {config.recipe}). Add --data.root DIR; "
            "--data.synthetic trains on drawn people"
        )


def _check_stages(config: Config, where: str) -> None:
    """Refuse `stage` if it is neither a stage, nor several in their order, nor all."""
    names, choices = config.stage.split(","), [*STAGES, ALL]
    for name in names:
        if name not in choices or (name == ALL and len(names) > 1):
            wrong = f"no such value (expected one of {', '.join(choices)}, found {name}){_nearest(name, choices)}"
            raise UserError(f"{where}: {wrong}")
    if config.stage != ALL and names != [stage for stage in STAGES if stage in names]:
        in_order = ",".join(stage for stage in STAGES if stage in names)
        raise UserError(f"{where}: each stage once and in order (expected {in_order}, found {config.stage})")


def _check_values(config: Config) -> None:
    """Refuse options that contradict each other."""
    if config.data.weight is not None and not config.data.more:
        raise UserError(f"--data.weight {config.data.weight:g}: there is only one dataset. Add others by --data.more")
    if config.push_to_hub and config.hub_model_id is None:
        raise UserError("--push_to_hub: no repository is named (expected --hub_model_id ORG/NAME)")
    check_model_id(config.hub_model_id)
    for name in config.trackers:
        if name not in TRACKERS or config.trackers.count(name) > 1:
            choices = [*TRACKERS, "none"]
            expected = f"expected some of {', '.join(choices)}, found {name or '(empty)'}"
            raise UserError(f"--report_to: no such value ({expected}){_nearest(name, choices)}")
    if config.lora.rank is None and config.lora != LoraConfig():
        given = next(f.name for f in dataclasses.fields(LoraConfig) if getattr(config.lora, f.name) != f.default)
        raise UserError(
            f"--lora.{given} {getattr(config.lora, given)}: there are no adapters (expected --lora.rank with it, such "
            "as --lora.rank 16)"
        )
    _check_base_dtype(config)
    _check_learned(config)
    if config.distill.teacher is None and config.distill != DistillConfig():
        raise UserError(
            f"--distill.weight {config.distill.weight:g}: there is no teacher (expected --distill.teacher too, such "
            "as --distill.teacher RUN_DIR/phase2/weights)"
        )
    scales, html = config.eval.scales, config.eval.html
    if not scales or len(set(scales)) < len(scales):
        shown = " ".join(f"{scale:g}" for scale in scales) or "(none)"
        raise UserError(f"--eval.scales {shown}: expected different factors of 0.1 to 4, such as 0.5 1.0 1.5 2.0")
    if html is not None and (not html or Path(html).is_dir()):
        raise UserError(f"--eval.html {html or '(empty)'}: expected a file to write, such as eval.html")


def _check_base_dtype(config: Config) -> None:
    """Refuse a rounded base without adapters, or with options that need its matrices."""
    if config.model.base_dtype is None:
        return
    given = f"--model.base_dtype {config.model.base_dtype}"
    if config.lora.rank is None:
        raise UserError(f"{given}: there are no adapters (expected --lora.rank with it, such as --lora.rank 16)")
    if config.lora.dora:
        raise UserError(f"{given}: not with --lora.dora, which needs the norms of the matrices. Leave one of them out")
    if config.memory.compile_blocks:
        raise UserError(f"{given}: not with --memory.compile_blocks. Leave one of them out")


def _check_learned(config: Config) -> None:
    """Refuse a part of a limit that there is not, or by errors of different units."""
    for name in config.stages:
        teacher = config.get_stage(name).teacher
        if teacher is None or teacher.learned in (None, 1):
            continue
        given = f"--{name}.teacher.learned {teacher.learned:g}"
        if teacher.max_grad_ratio is None:
            raise UserError(f"{given}: not with max_grad_ratio null, which is no limit. Leave one of them out")
        if teacher.loss == "literal":
            raise UserError(f"{given}: not with loss literal, whose errors have another unit. Leave one of them out")


def read_transforms(value: Any) -> tuple[dict[str, Any], ...] | None:
    """`augment.albumentations` as a list of {NAME: {ARGUMENT: VALUE}}, from a list or the file that has one.

    A run records the list, so that it is the same run whatever becomes of the file.

    Raises:
        UserError: no such file, or no such list.
    """
    where = "--augment.albumentations"
    if value is None:
        return None
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = _read_yaml(where, value)
        except yaml.YAMLError as error:
            raise UserError(f"{where}: not YAML: {' '.join(str(error).split())}") from None
    if isinstance(value, str):
        if not _is_file(value):
            raise UserError(
                f"{where} {value}: no such file (expected a YAML file, or a list: [{{GaussNoise: {{p: 0.3}}}}])"
            )
        where, value = f"{where} {value}", _read_list(Path(value))
    listed = []
    for number, one in enumerate(value, start=1):
        pair = {one: None} if isinstance(one, str) else one
        name, arguments = next(iter(pair.items())) if isinstance(pair, Mapping) and len(pair) == 1 else (None, None)
        if not isinstance(name, str) or not isinstance(arguments, Mapping | None):
            raise UserError(
                f"{where}: entry {number}: expected NAME or {{NAME: {{ARGUMENT: VALUE}}}}, found {str(one)[:100]}"
            )
        listed.append({name: dict(arguments or {})})
    return tuple(listed)


def _read_list(file: Path) -> list[Any]:
    """The list that a YAML file holds."""
    value = read_tree(file, lambda text: {"": yaml.safe_load(text)}, "YAML")[""]
    if not isinstance(value, list):
        kind = "keys and values" if isinstance(value, Mapping) else type(value).__name__
        raise UserError(
            f"{file}: expected a list of transforms, found {kind}. Write a line '- NAME: {{ARGUMENT: VALUE}}' for "
            f"each, without keys around them"
        )
    return value


def check_model_id(name: str | None) -> None:
    """Refuse what cannot be the name of a repository on the Hub."""
    part = r"[A-Za-z0-9_]([\w.-]{0,94}[A-Za-z0-9_])?"
    if name is not None and (not re.fullmatch(f"{part}/{part}", name, re.ASCII) or re.search(r"--|\.\.|\.git$", name)):
        raise UserError(f"--hub_model_id {name}: expected ORG/NAME: letters, digits, and single '-', '_' or '.' within")


def _recipe_name(recipe: str) -> str:
    # Only a file has a stem: in sapiens_0.3b_coco the dot is part of the name.
    return Path(recipe).stem if recipe.endswith((".yaml", ".yml")) else recipe


def save(config: Config, path: Path) -> None:
    """Write all options as YAML; `load` with this file as `base` returns an equal Config."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_as_yaml(config))


def _as_yaml(config: Config) -> str:
    return yaml.safe_dump(as_tree(config), sort_keys=False)


def as_tree(config: Config) -> dict[str, Any]:
    """All options as dictionaries, lists and plain values."""
    return _plain(dataclasses.asdict(config))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value


def _flatten(tree: Any, prefix: str = "") -> Iterator[str]:
    """Dotted keys of a tree, down to options and to unknown keys."""
    for item in tree if isinstance(tree, list) else [tree]:
        for name, value in item.items() if isinstance(item, Mapping) else ():
            yield (key := f"{prefix}{name}")
            if key in options() and is_group(key):
                yield from _flatten(value, f"{key}.")


def _read_recipe(path: Path) -> Mapping[str, Any]:
    return read_tree(path, lambda text: yaml.safe_load(text) or {}, "YAML")


def _check_groups(path: Path, tree: Mapping[str, Any]) -> None:
    """Refuse a plain value in place of a group: the parser ignores some of these and crashes at others."""
    for key, kind in options().items():
        value: Any = tree
        for name in key.split("."):
            value = value.get(name, {}) if isinstance(value, Mapping) else {}
        if dataclasses.is_dataclass(kind) and not isinstance(value, Mapping):
            raise UserError(f"{path}: {key}: expected keys and values, found {str(value)[:100]}")


def _check_keys(words: Sequence[str], path: Path, tree: Mapping[str, Any]) -> None:
    known = list(options())
    for key in _flatten(tree):
        if key not in known:
            raise UserError(f"{path}: no such key {key!r}{_nearest(key, known)}")
    for word, following in pairwise([*words, ""]):
        if not word.startswith("--"):
            continue
        key, equals, value = word[2:].partition("=")
        if key in OTHER_NAMES:
            stage = next((stage for stage in STAGES if _value_of(words, "stage") == stage), "phase2")
            raise UserError(f"no such option --{key}; did you mean --{OTHER_NAMES[key].format(stage=stage)}?")
        if key not in (*known, "help", *(f"{stage}.teacher.help" for stage in STAGES)):
            raise UserError(f"no such option --{key}{_nearest(key, known, '--')}")
        if key in known and is_group(key):
            _check_inner_keys(key, value if equals else following)


def _check_inner_keys(key: str, text: str) -> None:
    """Check the keys of a group that the command line sets as a whole: `--phase2.optim "{lr: 1e-4}"`."""
    try:
        tree = _read_yaml(f"--{key}", text)
    except yaml.YAMLError:
        return  # the parser reports it
    known = list(options())
    for inner in _flatten(tree, f"{key}."):
        if inner not in known:
            raise UserError(f"--{key}: no such key {inner!r}{_nearest(inner, known)}")


def _read_yaml(option: str, text: str) -> Any:
    """The value of an option as YAML.

    Raises:
        UserError: a value that its tag does not fit (`!!timestamp x`), or nested too deeply. PyYAML raises exceptions
            of any kind for these, and so does the parser, without the name of the option.
        yaml.YAMLError: it is not YAML, which the parser reports, or takes as plain text.
    """
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{option}: not YAML: {reason}") from None


def _is_file(name: str) -> bool:
    """Whether a file of this name exists; a list in the wrong form can be too long for a name."""
    try:
        return Path(name).is_file()
    except OSError:
        return False


def _values(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Name and text of each option of a command line."""
    for word, following in pairwise([*words, ""]):
        if word.startswith("--"):
            key, equals, value = word[2:].partition("=")
            yield key, value if equals else following


def _nearest(word: str, names: Sequence[str], dashes: str = "") -> str:
    # A missing or wrong group (--lr in place of --phase2.optim.lr) is as common as a typing error, and an option of
    # another group is nearer to a word without one than a name that only looks alike (--lora).
    close = difflib.get_close_matches(word, names, n=1)
    same = [name for name in names if name.split(".")[-1] == word.split(".")[-1]]
    close = same or close if "." not in word else close or same
    return f"; did you mean {dashes}{close[0]}?" if close else ""


def _value_of(words: Sequence[str], name: str) -> str | None:
    for word, following in pairwise([*words, ""]):
        if word == f"--{name}":
            return following
        if word.startswith(f"--{name}="):
            return word.split("=", 1)[1]
    return None


def _name_resume(argv: Sequence[str]) -> list[str]:
    """`--resume` as its whole name; alone it means the last checkpoint."""
    words = []
    for word, following in pairwise([*argv, ""]):
        alone = word == "--resume" and (not following or following.startswith("--"))
        words.append(re.sub(r"^--resume(?==|$)", "--resume_from_checkpoint", word) + ("=latest" if alone else ""))
    return words


def _spell_out(argv: Sequence[str]) -> list[str]:
    """Complete bool options without a value (`--dry_run` means `--dry_run=true`), and put lists in brackets.

    `--data.input_hw 512 384` means `--data.input_hw=[512,384]`.
    """
    words: list[str] = []
    items: list[str] | None = None  # of the list that is being read
    for word in _spell_out_switches(argv):
        name = word.removeprefix("--")
        if items is not None and not word.startswith("--"):
            items.append(word)
            is_whole = items == [word] and word.startswith(("[", "null"))
            value = word if is_whole else f"[{','.join(items)}]"
            words[-1] = f"{words[-1].partition('=')[0]}={value}"
        else:
            is_list = name != word and get_origin(options().get(name)) is tuple and not is_group(name)
            items = [] if is_list else None
            words.append(word)
    return words


def _spell_out_switches(argv: Sequence[str]) -> list[str]:
    """Complete bool options without a value."""
    values = {f"--{name}": "true" for name in switches()} | {"--eval.html": "auto", "--data.synthetic": "{}"}
    bare = [following.startswith("--") or not following for _, following in pairwise([*argv, ""])]
    return [
        f"{word}={values[word]}" if word in values and last else word for word, last in zip(argv, bare, strict=True)
    ]
