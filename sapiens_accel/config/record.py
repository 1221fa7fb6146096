"""RUN_DIR/config.yaml: what a run is. Read back, compared with a run's options, and written whole."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from sapiens_accel.config.parse import as_tree
from sapiens_accel.config.schema import STAGES, Config
from sapiens_accel.errors import UserError, read_tree

FILE = "config.yaml"
# What says how a command is run, not what its training is; `recipe` is a name, whose values are compared themselves.
NOT_COMPARED = (
    "recipe", "stage", "output_dir", "resume_from_checkpoint", "dry_run", "trust_checkpoint", "data.allow_other",
)  # fmt: skip
CHANGED = "# changed: "


class Difference(NamedTuple):
    """An option whose value is another one than in the record."""

    key: str
    old: Any
    new: Any

    @property
    def stage(self) -> str | None:
        """The stage that it belongs to, if to one."""
        first = self.key.split(".")[0]
        return first if first in STAGES else None

    def __str__(self) -> str:
        return f"{self.key} was {_show(self.old)}, is {_show(self.new)}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Continuation:
    """How a run continues what its directory, or its checkpoint's, holds.

    Attributes:
        file: the record that it is compared with.
        trained: the stages that it trains.
        resumed: the first of them, if from a checkpoint in the middle; and after which step.
        finished: the stages that it was asked for and does not train again.
        begun: the stages that have left anything in the directory.
        from_earlier: the first stage that is trained starts from the weights of an earlier stage in the directory.
    """

    file: Path
    trained: Sequence[str]
    resumed: str | None = None
    step: int = 0
    finished: Sequence[str] = ()
    begun: Sequence[str] = ()
    from_earlier: bool = False


def read_record(file: Path) -> Mapping[str, Any] | None:
    """The tree of a config.yaml; None if there is none.

    Raises:
        UserError: it cannot be read, or is not YAML of keys and values.
    """
    return dict(read_tree(file, yaml.safe_load, "YAML")) if file.is_file() else None


def find_differences(record: Mapping[str, Any], config: Config) -> list[Difference]:
    """The options whose value differs; those that the record does not know are not compared."""
    return [one for one in _walk(record, as_tree(config), "") if one.key not in NOT_COMPARED]


def _walk(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str) -> Iterator[Difference]:
    for name, value in new.items():
        if name not in old:
            continue
        if isinstance(value, Mapping) and isinstance(old[name], Mapping):
            yield from _walk(old[name], value, f"{prefix}{name}.")
        elif old[name] != value:
            yield Difference(prefix + name, old[name], value)


def judge_differences(differences: Sequence[Difference], how: Continuation) -> list[str]:
    """A line for each difference, which says what becomes of it.

    Raises:
        UserError: what a checkpoint, or the weights of an earlier stage, cannot be continued with; all of it in a line.
    """
    lines, refused = [], []
    first = how.trained[0] if how.trained else None
    since = f"from step {how.step + 1} of {how.resumed} on" if how.resumed else f"in {first}"
    for one in differences:
        if one.stage in how.finished:
            lines.append(f"{one}: not applied, {one.stage} is finished")
        elif first is None and one.stage is None:
            lines.append(f"{one}: not applied, nothing is trained")
        elif one.stage and one.stage not in set(how.trained) & set(how.begun):
            continue  # a stage of which nothing is recorded, or that is not asked for: its record stays
        elif one.key == "weights" and (how.resumed or how.from_earlier):
            if one.new is not None:
                lines.append(f"{one}: not applied, {how.resumed or first} has weights of its own to start from")
        elif _is_fixed(one, how):
            refused.append(one)
        else:
            lines.append(f"{one}: applied {since}")
    if refused:
        what = f"step {how.step} of {how.resumed} is resumed" if how.resumed else f"{first} starts from its weights"
        raise UserError(
            f"{how.file}: {what}, with other values than it was trained with: {'; '.join(map(str, refused))}. Give the "
            "values of before, or begin a new run: another --output_dir, and no --resume_from_checkpoint"
        )
    return [f"{how.file}: {line}" for line in lines]


def _is_fixed(one: Difference, how: Continuation) -> bool:
    """Whether the state that is continued cannot be that of another value: other parameters, groups or moments."""
    if one.key == "model.name":
        return bool(how.resumed or how.from_earlier)
    fixed = ("data.input_hw", "memory.adam_8bit", f"{how.resumed}.frozen", f"{how.resumed}.teacher")
    return how.resumed is not None and one.key in fixed


def write_record(
    file: Path, config: Config, recorded: Mapping[str, Any], *, made_by: str, changes: Sequence[str]
) -> None:
    """Write the record whole, or leave what is there.

    Args:
        recorded: values of the record that stay, by their first key: the options of stages that are not trained.
        made_by: a comment for its top: versions.
        changes: comments below it, added to those that are there.
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
