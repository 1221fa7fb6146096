"""RUN_DIR/config.yaml, the record of a run's options: read, compared with the options of a resumed run, and written."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from sapiens_accel.config.parse import as_tree
from sapiens_accel.config.schema import STAGES, Config, DistillConfig, LoraConfig
from sapiens_accel.errors import UserError, read_tree

FILE = "config.yaml"
# Options of the command, not of the training; and `recipe`, since its values are compared one by one.
NOT_COMPARED = (
    "recipe", "stage", "output_dir", "resume_from_checkpoint", "dry_run", "trust_checkpoint", "data.allow_other",
)  # fmt: skip
CHANGED = "# changed: "


class Difference(NamedTuple):
    """An option whose value differs from the record."""

    key: str
    old: Any
    new: Any

    @property
    def stage(self) -> str | None:
        """The stage that the option belongs to, if any."""
        first = self.key.split(".")[0]
        return first if first in STAGES else None

    def __str__(self) -> str:
        return f"{self.key} was {_show(self.old)}, is {_show(self.new)}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Continuation:
    """How a run continues its run directory, or that of the checkpoint that it resumes.

    Attributes:
        file: the record to compare with.
        trained: the stages that will be trained.
        resumed: the first of them, if it is resumed from a checkpoint.
        step: the step of that checkpoint.
        finished: the stages that were asked for and are finished already.
        begun: the stages with any files in the directory.
        from_earlier: the first trained stage starts from the weights of an earlier stage in the directory.
        freezes_blocks: the resumed stage freezes all blocks, so that it has no adapters.
    """

    file: Path
    trained: Sequence[str]
    resumed: str | None = None
    step: int = 0
    finished: Sequence[str] = ()
    begun: Sequence[str] = ()
    from_earlier: bool = False
    freezes_blocks: bool = False


def read_record(file: Path) -> Mapping[str, Any] | None:
    """The tree of a config.yaml; None if there is none.

    Raises:
        UserError: it cannot be read, or is not YAML of keys and values.
    """
    return dict(read_tree(file, yaml.safe_load, "YAML")) if file.is_file() else None


def find_differences(record: Mapping[str, Any], config: Config) -> list[Difference]:
    """The options whose value differs from the record; options that the record lacks are not compared.

    Except `lora`, `distill`, `model.base_dtype`, `model.visibility`, `memory.bf16_weights` and a teacher's
    `labeled_end` and `learned`: a run without them in its record had no adapters, no fixed teacher, no rounded base, no
    second output, weights in fp32, and unlabeled people to the end with the whole limit, which a resumed stage keeps
    where `learned` is not given.
    """
    absent = {"lora": dataclasses.asdict(LoraConfig()), "distill": dataclasses.asdict(DistillConfig())}
    record = {**absent, **record}
    later = {"model": {"base_dtype": None, "visibility": False}, "memory": {"bf16_weights": False}}
    for name, values in later.items():
        if isinstance(recorded := record.get(name), Mapping):
            record[name] = {**values, **recorded}
    for name in STAGES:
        stage = record.get(name)
        if isinstance(stage, Mapping) and isinstance(teacher := stage.get("teacher"), Mapping):
            # By default a stage that has begun keeps the 1 of then.
            by_default = (asked := config.get_stage(name).teacher) is None or asked.learned is None
            before = {"labeled_end": 0.0} if by_default else {"labeled_end": 0.0, "learned": 1.0}
            record[name] = {**stage, "teacher": {**before, **teacher}}
    return [one for one in _walk(record, as_tree(config), "") if one.key not in NOT_COMPARED]


def _walk(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str) -> Iterator[Difference]:
    for name, value in new.items():
        if name not in old:
            continue
        if isinstance(value, Mapping) and isinstance(old[name], Mapping):
            yield from _walk(old[name], value, f"{prefix}{name}.")
        elif old[name] != value:
            yield Difference(prefix + name, old[name], value)


def check_differences(differences: Sequence[Difference], context: Continuation) -> list[str]:
    """A line for each difference: whether it applies, and from where on.

    Raises:
        UserError: all differences with which a checkpoint, or the weights of an earlier stage, cannot be continued.
    """
    lines, refused = [], []
    first = context.trained[0] if context.trained else None
    since = f"from step {context.step + 1} of {context.resumed} on" if context.resumed else f"in {first}"
    for one in differences:
        if one.stage in context.finished:
            lines.append(f"{one}: not applied, {one.stage} is finished")
        elif first is None and one.stage is None:
            lines.append(f"{one}: not applied, nothing is trained")
        elif one.stage and one.stage not in set(context.trained) & set(context.begun):
            continue  # the stage has not begun or is not trained now: its record stays as it is
        elif one.key == "weights" and (context.resumed or context.from_earlier):
            if one.new is not None:
                lines.append(f"{one}: not applied, {context.resumed or first} starts from weights of its own")
        elif _is_fixed(one, context):
            refused.append(one)
        else:
            lines.append(f"{one}: applied {since}")
    if refused:
        what = (
            f"step {context.step} of {context.resumed} is resumed"
            if context.resumed
            else f"{first} starts from its weights"
        )
        raise UserError(
            f"{context.file}: {what}, with values that differ from its training: {'; '.join(map(str, refused))}. "
            "Restore these values, or start a new run with another --output_dir and without --resume_from_checkpoint"
        )
    return [f"{context.file}: {line}" for line in lines]


def _is_fixed(one: Difference, context: Continuation) -> bool:
    """Whether the state to continue depends on the option: on its parameters, parameter groups or Adam moments."""
    if one.key == "model.name":
        return bool(context.resumed or context.from_earlier)
    fixed = (
        "data.input_hw",
        "memory.adam_8bit",
        "memory.bf16_weights",
        f"{context.resumed}.frozen",
        f"{context.resumed}.teacher",
    )
    if not context.freezes_blocks:
        fixed += ("lora.rank", "lora.alpha", "lora.target", "lora.dora", "model.base_dtype")
    return context.resumed is not None and one.key in fixed


def write_record(
    file: Path, config: Config, recorded: Mapping[str, Any], *, made_by: str, changes: Sequence[str]
) -> None:
    """Replace the record in one step.

    Args:
        recorded: values that stay as recorded, by their top-level key: the options of stages that are not trained.
        made_by: the comment on the first line: versions.
        changes: lines to add to the comments below it.
    """
    earlier = file.read_text(errors="replace").splitlines() if file.is_file() else []
    lines = [f"# {made_by}", *(line for line in earlier if line.startswith(CHANGED))]
    lines += [CHANGED + line for line in changes]
    tree = {**as_tree(config), **recorded}
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(file.name + ".tmp")
    temporary.write_text("\n".join([*lines, yaml.safe_dump(tree, sort_keys=False)]))
    temporary.replace(file)


def _show(value: Any) -> str:
    return "null" if value is None else str(value).replace("'", "")
