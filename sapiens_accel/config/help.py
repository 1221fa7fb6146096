"""`--help`: the everyday options on one screen; `--help all`: every option, its values, its default and its text."""

import ast
import dataclasses
import json
import textwrap
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

from sapiens_accel.config import schema
from sapiens_accel.config.options import describe, group_of, is_group, options
from sapiens_accel.config.schema import STAGES, Config

WIDTH = 110
LONG = 24  # characters of a default that stays out of a line
# What most runs need, in the order of the questions of a first one. `--help all` has the whole text of each.
TRAINING = {
    "recipe": "a recipe (demo, sapiens_0.3b_coco, sapiens2_1b_coco, ...) or your own YAML",
    "preset": "laid over the recipe: fast (3 + 20 epochs, ssl 10) or limited_memory (GPUs of 8 and 12 GB)",
    "data.root": "the data: a folder in COCO's format, shards, or hf://ORG/NAME",
    "data.train_annotations": "COCO JSON of the training people, under the root; data.val_annotations: validation",
    "data.train_images": "folder of its images, under the root; data.val_images: validation",
    "data.labels": "use only so many labels (1000, 10%); stage ssl learns from the other people",
    "data.input_hw": "height and width of the network's input: 512 384",
    "data.num_workers": "processes that load images, for each GPU",
    "weights": "weights to start from: a file, a folder or ORG/NAME on the Hub",
    "stage": "phase1 (the head), phase2 (everything), ssl, several (phase1,phase2) or all",
    "phase2.epochs": "length of a stage; so --phase1.epochs, --ssl.epochs; or --phase2.steps",
    "phase2.global_batch": "people in an optimizer step, over all GPUs",
    "phase2.optim.lr": "peak learning rate",
    "memory.micro_batch": "people on a GPU at a time (default: as many as fit)",
    "max_steps": "stop each stage after so many steps",
    "output_dir": "the run directory",
    "resume_from_checkpoint": "latest (or --resume alone), or a checkpoint folder",
    "eval_every": "steps between evaluations (default: at the end of each stage)",
    "save_every": "steps between checkpoints (default: each epoch, and at least every half hour)",
    "report_to": "where curves and images go",
    "push_to_hub": "upload weights and a model card, to --hub_model_id ORG/NAME",
    "seed": "of weights, batches and augmentation",
    "dry_run": "check data and memory, take one step, write nothing",
}
EVALUATION = {
    "data.root": "the data; default: those of the run",
    "eval.split": "people to evaluate on: val or train",
    "eval.boxes": "gt (labeled boxes), or a detector's JSON; with --images also detector, or the name of one",
    "eval.images": "predict on your own images in place of an evaluation: an image, a folder or a video",
    "eval.flip": "average with the mirrored image (true)",
    "eval.scales": "average over scales: 0.5 1.0 1.5 2.0",
    "eval.ensemble": "also evaluate the mean of all given weights",
    "eval.compare": "also without flip and scales, to see what each is worth",
    "eval.batch_size": "crops in a forward pass",
    "eval.area": "area of OKS: annotation, or box as CrowdPose has it",
    "eval.backend": "pycocotools, or faster_coco_eval (the same numbers)",
    "eval.save_predictions": "JSON to write the predictions to, in COCO's form",
    "eval.csv": "also as a CSV: long, or deeplabcut",
    "eval.html": "also a page of results: a file name, or auto",
    "eval.smooth": "with a video: smooth keypoints over time",
    "eval.num_pictures": "people to draw",
    "eval.num_worst": "people of the lowest OKS to draw with their errors",
    "stage": "evaluate this stage of a run (default: every stage that has weights)",
    "output_dir": "where results are written",
}
SHORT = {"eval.num_pictures": "pictures", "eval.num_worst": "worst"}


def format_everyday(program: str, recipe: str, defaults: Config) -> str:
    """The options of most runs, a line each."""
    evaluates = program in ("eval.py", "sapiens-accel eval")
    lines = []
    for key, text in (EVALUATION if evaluates else TRAINING).items():
        name = SHORT.get(key, key.removeprefix("eval.")) if evaluates else key
        value = "" if evaluates or "default:" in text else _shown(value_of(defaults, key))
        shows_default = value not in ("", "none", "false") and len(value) < LONG
        lines.append(f"  --{name:24} {text}" + (f" ({value})" if shows_default else ""))
    if not evaluates:
        lines.append(f"  --{'launch zero2':24} start the processes (zero2, zero2_offload, ...), with --num_processes N")
        lines.append(f"  --{'print_config':24} print the value of every option, and exit")
    head = f"usage: {program} {'WEIGHTS|RUN_DIR|HUB_REPO' if evaluates else ''} [--OPTION VALUE ...]".replace("  ", " ")
    more = f"--help all: all {len(list(leaves()))} options with their values, defaults and texts"
    scope = "" if evaluates else f" (with the default of recipe {recipe})"
    return "\n".join([head, "", f"The options of most runs{scope}:", *lines, "", more])


def format_all(program: str, recipe: str, defaults: Config) -> str:
    """Every option in groups: its values in words, its default under the recipe, and its text."""
    parts = [
        f"usage: {program} [--OPTION VALUE ...]",
        "",
        f"Defaults are those of recipe {recipe}. Lists: [1, 2], or 1 2.",
    ]
    texts, group = attribute_texts(), None
    for key in leaves():
        name = key.rpartition(".")[0]
        if name != group:
            group = name
            parts += ["", f"{name or 'general'}: {_title(name)}"]
        stage, _, rest = key.partition(".")
        repeats = stage in STAGES[1:] and (f"{STAGES[0]}.{rest}" in options()) and "teacher" not in rest
        line = f"  --{key}  {describe(options()[key])}; default {_shown(value_of(defaults, key))}"
        parts += textwrap.wrap(line, WIDTH, subsequent_indent="      ", break_on_hyphens=False)
        if not repeats and (stage == "ssl" or "teacher" not in rest):
            text = " ".join(texts[key].split())
            parts += textwrap.wrap(
                text, WIDTH, initial_indent="      ", subsequent_indent="      ", break_on_hyphens=False
            )
    return "\n".join(parts)


def leaves() -> Iterator[str]:
    """Every option in the order of groups: the general ones first. Other stages' teachers have ssl's options."""
    inner = ("data.more.", *(f"{stage}.teacher." for stage in STAGES if stage != "ssl"))
    wholes = [prefix.removesuffix(".") for prefix in inner]  # a list of groups; groups that are not there by default
    keys = [key for key in options() if (not is_group(key) or key in wholes) and not key.startswith(inner)]
    yield from (key for key in keys if "." not in key)
    groups = dict.fromkeys(key.rpartition(".")[0] for key in keys if "." in key)
    for group in groups:
        yield from (key for key in keys if "." in key and key.rpartition(".")[0] == group)


def _title(group: str) -> str:
    """The first line of the docstring of a group's class."""
    kind = group_of(options()[group]) if group else Config
    assert kind is not None
    text = (kind.__doc__ or "").strip().splitlines()[0]
    return text + (" Texts: as phase1." if group.partition(".")[0] in STAGES[1:] and "teacher" not in group else "")


def value_of(config: Config, key: str) -> Any:
    """The value of an option; None in a group that is not there."""
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name, None)
    return value


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    plain = dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value
    return plain if isinstance(plain, str) else json.dumps(plain)


@cache
def attribute_texts() -> Mapping[str, str]:
    """The docstring of each option by its key, read from the source of the schema."""
    tree = ast.parse(Path(schema.__file__).read_text(encoding="utf-8"))
    of_class: dict[str, dict[str, str]] = {}
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            of_class[node.name] = {
                field.target.id: following.value.value
                for field, following in zip(node.body, node.body[1:], strict=False)
                if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
                and isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
                and isinstance(following.value.value, str)
            }  # fmt: skip
    return dict(_walk(Config, "", of_class))


def _walk(kind: type, prefix: str, texts: Mapping[str, Mapping[str, str]]) -> Iterator[tuple[str, str]]:
    for name, inner in get_type_hints(kind, include_extras=True).items():
        yield prefix + name, texts.get(kind.__name__, {}).get(name, "")
        if group := group_of(inner):
            yield from _walk(group, f"{prefix}{name}.", texts)
