"""The run directory: which stages are finished in it, what a new run moves out of its way, and what it records.

RUN_DIR/config.yaml is what the run is, labelled_ann_ids.json which people it learns from, STAGE/ what a stage writes.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator

from sapiens_accel.config import parse as config
from sapiens_accel.config.schema import Config, DataConfig
from sapiens_accel.data.dataset import Sets
from sapiens_accel.data.people import People
from sapiens_accel.errors import UserError
from sapiens_accel.models.load import FILE
from sapiens_accel.runtime.files import read_json, set_aside
from sapiens_accel.training.checkpoint import list_checkpoints, position, step_of

MAX_RECORDED_PEOPLE = 1_000_000  # of more, the ids of labeled people are not recorded


def begin_run(accelerator: Accelerator, run: Config, sets: Sets, done: Iterable[str]) -> None:
    """Make the run directory ready for a run and write its records; a dry run writes nothing. All ranks must call it.

    Args:
        done: the stages that are not trained again.
    """
    if accelerator.is_main_process and not run.dry_run:
        folder = Path(run.output_dir)
        checkpoints = [list_checkpoints(folder / stage / "checkpoints") for stage in run.stages]
        if run.resume_from_checkpoint == "latest" and not done and not any(checkpoints):
            print(f"warning: --resume_from_checkpoint latest: no checkpoint in {folder}; training starts at step 1")
        make_way(folder, run.stages, run.weights, run.resume_from_checkpoint, done)
        if run.resume_from_checkpoint and not run.weights and (folder / "config.yaml").is_file():
            # The license of what is pushed follows from the weights that the run began with.
            earlier = yaml.safe_load((folder / "config.yaml").read_text()).get("weights")
            run = dataclasses.replace(run, weights=earlier)
        config.save(run, folder / "config.yaml")
        write_labeled_ids(folder / "labelled_ann_ids.json", sets.train, run.data)
    accelerator.wait_for_everyone()


def finished(run_folder: Path, lasts: Mapping[str, int], asked: str | None) -> dict[str, dict[str, float]]:
    """The metrics of the stages that a resumed run does not train again.

    Args:
        lasts: the run's stages, in order, and the step that each ends with.
        asked: `--resume_from_checkpoint`. With `latest`, the stages that reached their last step are finished. With a
            checkpoint, the stages before its own: that one and those after it are trained from there.

    Raises:
        UserError: the folder is not a checkpoint, or it is a checkpoint of a stage that is not trained.
    """
    stages = list(lasts)
    if asked is None:
        return {}
    if asked != "latest":
        stage = position(Path(asked)).stage
        if stage not in stages:
            raise UserError(
                f"--resume_from_checkpoint {asked}: a checkpoint of stage {stage} (expected one of "
                f"{', '.join(stages)}, the stages that --stage trains)"
            )
        stages = stages[: stages.index(stage)]
    done = {}
    for stage in stages:
        metrics = _metrics(run_folder / stage, lasts[stage])
        if not metrics:
            break  # later stages began with other weights than this stage is going to hand over
        done[stage] = metrics
    return done


def _metrics(stage_folder: Path, last: int) -> dict[str, float] | None:
    metrics = read_json(stage_folder / "eval.json")
    if not (metrics and (stage_folder / "weights" / FILE).is_file()):
        return None
    return metrics if metrics.get("step", -1) >= last else None


def make_way(
    run_folder: Path, stages: Sequence[str], start: str | None, asked: str | None, done: Iterable[str] = ()
) -> None:
    """Rename what an earlier run left where this run writes: a stage that starts at step 0 becomes STAGE.1, ...

    One stage may be resumed: the first that is not finished, or the stage of the checkpoint that was asked for. Of that
    stage, only what is later than the checkpoint is renamed.

    Args:
        stages: the run's, in order.
        start: the weights that the first of them begins with.
        asked: `--resume_from_checkpoint`.
        done: the stages that are not trained again.

    Raises:
        UserError: the weights to start from are in a folder that would be renamed.
    """
    anew = [stage for stage in stages if stage not in done]
    if asked == "latest":
        anew = anew[1:]
    elif asked:
        there = position(Path(asked))
        anew.remove(there.stage)
        _forget_after(run_folder / there.stage, there.step)
    for old in (run_folder / stage for stage in anew):
        if not old.exists():
            continue
        if start and old.resolve() in Path(start).expanduser().resolve().parents:
            raise UserError(f"--weights {start}: in {old}, which this run writes again. Give another --output_dir")
        set_aside(old)


def _forget_after(stage_folder: Path, step: int) -> None:
    """Rename what a stage left after a step: resuming from that step makes another history."""
    folder = stage_folder / "checkpoints"
    later = [path for path in list_checkpoints(folder) if step_of(path) > step]
    for path in [*later, stage_folder / "eval.json", stage_folder / "kept.json"]:
        if path.exists():
            set_aside(path)
    for link in (folder / "latest", folder / "best"):
        if link.is_symlink() and not link.exists():
            link.unlink()


def write_labeled_ids(path: Path, people: People, config: DataConfig) -> None:
    """Write which people are labeled, and by which rule, as JSON; ids in ascending order.

    An earlier record of other people is renamed to NAME.1.json, NAME.2.json, ... with a warning: weights trained by it
    have learned from labels that are withheld now.

    Args:
        people: those that a run learns from, without images that cannot be decoded.

    Raises:
        UserError: the earlier record is not JSON.
    """
    rule = {"labels": config.labels, "labels_by": config.labels_by, "labels_seed": config.labels_seed}
    ids = {}
    if config.labels is not None or (not config.streaming and len(people) <= MAX_RECORDED_PEOPLE):
        ids = {f"{name}s": sorted(set(people.rows[name][:])) for name in ("ann_id", "image_id")}
    record = rule | {"annotations": people.annotations.name, "num_people": len(people)} | ids
    if path.is_file():
        _keep_record(path, record)
    path.write_text(json.dumps(record) + "\n")


def _keep_record(path: Path, record: dict[str, Any]) -> None:
    """Rename an earlier run's record if it names other people, and print what that means for this run."""
    try:
        old = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(
            f"{path}: not JSON ({error}); it records the labeled people of an earlier run. Move it away"
        ) from None
    if all(old.get(key) == record.get(key) for key in ("annotations", "ann_ids")):
        return
    number = 1
    while (kept := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
        number += 1
    path.rename(kept)
    # Ids of another JSON are those of other people. Without `labels` no label is withheld; images may be left out.
    comparable = record["labels"] is not None and old.get("annotations") == record["annotations"]
    lost = set(old.get("ann_ids", ())) - set(record.get("ann_ids", ())) if comparable else ()
    line = (
        f"warning: {path}: {old.get('num_people')} people had labels in an earlier run in this folder, "
        f"{record['num_people']} have now; the earlier record is kept as {kept.name}"
    )
    if lost:
        line += (
            f"; {len(lost)} people had labels then and not now: weights of an earlier stage in this folder have "
            f"learned from labels that this run withholds; for a fair comparison give "
            f"another --output_dir (or --weights)"
        )
    print(line, flush=True)
