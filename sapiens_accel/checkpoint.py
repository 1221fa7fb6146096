"""Resumable state on disk: saved atomically, found again, pruned.

STAGE/checkpoints/step_N holds Accelerate's state (model, optimizer, random states; DeepSpeed's shards), the objective's
(the teacher) and the step. A folder of that name is whole: it is written under another name and renamed.
"""

import json
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from sapiens_accel.config import UserError
from sapiens_accel.distributed import description, zero_stage
from sapiens_accel.objective import Objective
from sapiens_accel.weights import FILE


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where a checkpoint stands, and the world that wrote it."""

    stage: str
    step: int
    num_processes: int
    zero_stage: int


def save(
    stage_folder: Path, accelerator: Accelerator, objective: Objective, stage: str, step: int, *, keep: int
) -> Path:
    """Write stage_folder/checkpoints/step_N and prune the oldest beyond `keep`. All ranks must call it."""
    folder = stage_folder / "checkpoints"
    target = folder / f"step_{step}"
    temporary = folder / f"step_{step}.tmp"
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(temporary))
    state = objective.state_dict()  # gathered from all ranks, where each keeps a part of the teacher
    if accelerator.is_main_process:
        save_file({n: v.contiguous() for n, v in state.items()}, temporary / "objective.safetensors")
        world = {"num_processes": accelerator.num_processes, "zero_stage": zero_stage(accelerator)}
        position = Position(stage=stage, step=step, **world)
        (temporary / "position.json").write_text(json.dumps(asdict(position)))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
        for old in found(folder)[:-keep]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return target


def load(folder: Path, accelerator: Accelerator, objective: Objective) -> Position:
    """Restore everything that `save` wrote; all ranks must call it.

    Raises:
        UserError: another number of processes or ZeRO stage wrote it.
    """
    saved = position(folder)
    now = {"num_processes": accelerator.num_processes, "zero_stage": zero_stage(accelerator)}
    then = {"num_processes": saved.num_processes, "zero_stage": saved.zero_stage}
    if now != then:
        raise UserError(
            f"{folder}: written by {saved.num_processes} process(es) under ZeRO-{saved.zero_stage}, this is "
            f"{description(accelerator)}; launch it as it was, or start a new run from weights with --weights"
        )
    accelerator.load_state(str(folder))
    # It restores the micro-steps of the run that saved; a checkpoint stands between two optimizer steps.
    accelerator.step = 0
    objective.load_state_dict(load_file(folder / "objective.safetensors"))
    return saved


def position(folder: Path) -> Position:
    """Where a checkpoint folder stands.

    Raises:
        UserError: it is not one.
    """
    file = folder / "position.json"
    if not file.is_file():
        raise UserError(
            f"--resume_from_checkpoint {folder}: not a checkpoint; expected latest or STAGE/checkpoints/step_N"
        )
    return Position(**json.loads(file.read_text()))


def to_resume(run_folder: Path, asked: str | None, stage: str) -> Path | None:
    """The checkpoint that a stage goes on from, if any: its last whole one, or the folder asked for if its own."""
    if asked is None:
        return None
    if asked == "latest":
        return next(reversed(found(run_folder / stage / "checkpoints")), None)
    return Path(asked) if position(Path(asked)).stage == stage else None


def finished(run_folder: Path, lasts: Mapping[str, int], asked: str | None) -> dict[str, dict[str, float]]:
    """The metrics of the stages that a resumed run need not train again.

    Args:
        lasts: the run's stages, in order, and the step that each ends with.
        asked: `--resume_from_checkpoint`. latest leaves alone all stages that reached their end; a folder, those before
            its stage: that one and what follows it are trained from there.

    Raises:
        UserError: a folder that is no checkpoint, or one of a stage that is not trained.
    """
    stages = list(lasts)
    if asked is None:
        return {}
    if asked != "latest":
        stage = position(Path(asked)).stage
        if stage not in stages:
            raise UserError(
                f"--resume_from_checkpoint {asked}: of stage {stage}, but --stage trains {', '.join(stages)}"
            )
        stages = stages[: stages.index(stage)]
    found_metrics = {stage: _metrics(run_folder / stage, lasts[stage]) for stage in stages}
    return {stage: metrics for stage, metrics in found_metrics.items() if metrics}


def _metrics(stage_folder: Path, last: int) -> dict[str, float] | None:
    file = stage_folder / "eval.json"
    if not (file.is_file() and (stage_folder / "weights" / FILE).is_file()):
        return None
    metrics = json.loads(file.read_text())
    return metrics if metrics.get("step", -1) >= last else None


def set_aside(run_folder: Path, stages: Iterable[str], start: str | None) -> None:
    """Make way for stages that start anew: what they trained before is kept as STAGE.1, STAGE.2, ...

    Raises:
        UserError: the weights to start from are among it.
    """
    for old in (run_folder / stage for stage in stages):
        if not old.exists():
            continue
        if start and old.resolve() in Path(start).resolve().parents:
            raise UserError(f"--weights {start}: in {old}, which this run writes anew; give another --output_dir")
        number = 1
        while (kept := old.with_name(f"{old.name}.{number}")).exists():
            number += 1
        old.rename(kept)
        print(f"{old} was there already; it is kept as {kept}", flush=True)


def found(folder: Path) -> list[Path]:
    """The whole checkpoints in a folder, oldest first."""
    steps = [path for path in folder.glob("step_*") if re.fullmatch(r"step_\d+", path.name)]
    return sorted(steps, key=lambda path: int(path.name.removeprefix("step_")))
