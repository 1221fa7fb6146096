"""The run directory: which stages are finished in it, what a new run renames there, and what it records.

RUN_DIR/config.yaml holds the options, data.json and labelled_ann_ids.json the people of training, STAGE/ what a stage
writes. A stage that has no files there yet is added to the run; a stage that is trained again starts a new run, and the
whole old one is moved to RUN_DIR.1; `--resume_from_checkpoint` continues the run.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from sapiens_accel.config import record
from sapiens_accel.config.record import Continuation
from sapiens_accel.config.schema import STAGES, Config, DataConfig, StageName
from sapiens_accel.data.dataset import Sets
from sapiens_accel.data.people import (
    People,
    boxes_of,
    column_of,
    keypoints_of,
    read_given_ids,
    read_given_image_ids,
    spread_rows,
)
from sapiens_accel.errors import UserError, read_tree
from sapiens_accel.models.load import FILE, starting_point
from sapiens_accel.runtime import failures, files
from sapiens_accel.runtime.files import UNFINISHED, first_free_name, read_json, set_aside, write_json, write_text
from sapiens_accel.runtime.lock import LOCK, lock_directory
from sapiens_accel.runtime.versions import describe_versions
from sapiens_accel.sources.coco import number_of_id
from sapiens_accel.training.checkpoint import list_checkpoints, read_position, step_of

MAX_RECORDED_PEOPLE = 1_000_000  # with more, no ids of labeled people are recorded, and the digest takes a sample
METRICS, DATA, LABELED_IDS = "metrics.jsonl", "data.json", "labelled_ann_ids.json"


@contextlib.contextmanager
def lock_run(accelerator: Accelerator, run: Config) -> Iterator[None]:
    """Let rank 0 hold the lock of the run directory while entered; not in a dry run. All ranks must call it.

    Raises:
        UserError: on all ranks: another run is writing in the directory.
    """
    with contextlib.ExitStack() as held:
        if not run.dry_run:
            _on_main(accelerator, lambda: held.enter_context(lock_directory(Path(run.output_dir))))
        yield


def check_place(run: Config) -> None:
    """Refuse a run directory that is none of its own: a later run moves the whole of it aside.

    Raises:
        UserError: it is a URL; it is or contains the data, this package, the home directory or another run; it is the
            folder of a stage of another run.
    """
    if "://" in run.output_dir:
        raise UserError(
            f"--output_dir {run.output_dir}: a URL (expected a folder of this machine, or one that is mounted on it)"
        )
    folder, data = Path(run.output_dir).resolve(), run.data
    roots = [Path(root).expanduser() for root in (data.root, *(more.root for more in data.more)) if root]
    parts = (data.train_images, data.val_images, data.unlabelled_images, data.train_annotations, data.val_annotations)
    theirs = {path: "the data" for root in roots for path in (root, *(root / part for part in parts))}
    theirs |= {Path(__file__).parents[1]: "this package", Path(os.path.expanduser("~")): "the home directory"}  # noqa: PTH111  (it never raises)
    theirs |= {path.parent: "another run" for path in folder.glob("*/config.yaml")}
    if folder.name in STAGES and (folder.parent / record.FILE).is_file():
        theirs[folder] = f"stage {folder.name} of the run {folder.parent}"
    for path, what in {path.resolve(): what for path, what in theirs.items()}.items():
        if folder in (path, *path.parents):
            raise UserError(
                f"--output_dir {run.output_dir}: holds {what} (expected a folder for a run alone, found {path}): a "
                "later run would move all of it to another name. Use another folder, beside it or in it"
            )


def refuse_unwritten(run_folder: Path, unwritten: Sequence[Path]) -> None:
    """End a run that has trained all steps with an error if some of its results could not be written.

    Raises:
        UserError: there are such files.
    """
    if unwritten:
        names = ", ".join(str(path.relative_to(run_folder)) for path in unwritten)
        raise UserError(
            f"{run_folder}: all steps are trained and the weights are written, but not {names} (see the warnings "
            "above). Make room; --resume_from_checkpoint latest continues from the last complete checkpoint"
        )


def _on_main(accelerator: Accelerator, action: Callable[[], Any]) -> Any:
    """Run an action on rank 0 and return its result on all ranks.

    Raises:
        UserError: as the action, on all ranks. Any other exception is raised on rank 0, and a UserError on the others.
    """
    outcome: list[Any] = [None, None]
    failure = None
    if accelerator.is_main_process:
        try:
            outcome[0] = action()
        except Exception as error:  # of any kind: the other ranks would wait for hours
            failure, outcome[1] = error, failures.describe(error)
    result, problem = broadcast_object_list(outcome)
    if failure is not None:
        raise failure
    if problem is not None:
        raise UserError(problem)
    return result


@dataclass(kw_only=True)
class RunPlan:
    """What a run does with its directory; decided before anything is written there.

    Attributes:
        run: the options.
        data: the contents of data.json.
        resumed: the stage that is resumed, if any.
        checkpoint: the checkpoint that it is resumed from, if one was named.
        replaces: the directory holds a run, which is moved to RUN_DIR.1.
        retrained: later stages of a run that is continued, which are trained from their start.
        changes: options that differ from the record and are applied.
        sections: entries of the record that are kept: the options of stages that are not trained; the initial weights
            of a run that is resumed, or to which a stage is added.
    """

    run: Config
    data: dict[str, Any]
    resumed: str | None = None
    checkpoint: Path | None = None
    replaces: bool = False
    retrained: Sequence[str] = ()
    changes: Sequence[str] = ()
    sections: dict[str, Any] = field(default_factory=dict)
    has_begun: bool = False

    def begin(self, accelerator: Accelerator, sets: Sets, first: int) -> None:
        """Rename what is replaced and write the records, once, when the run is known to start. Not in a dry run.

        All ranks must call it.

        Args:
            first: steps of the first stage that are done.

        Raises:
            UserError: the directory cannot be written.
        """
        if self.has_begun or self.run.dry_run:
            return
        self.has_begun = True
        _on_main(accelerator, lambda: self._write(sets, first))
        accelerator.wait_for_everyone()

    def _write(self, sets: Sets, first: int) -> None:
        folder = Path(self.run.output_dir)
        try:
            if self.replaces:
                _move_run_aside(folder, STAGES[: STAGES.index(self.run.stages[0])])
            for stage in self.retrained:
                _set_stage_aside(folder, stage)
            if self.checkpoint and self.resumed:
                _forget_after(folder / self.resumed, first)
            where = f"{self.resumed or self.run.stages[0]} from step {first + 1} on"
            changes = [f"{where}: {change}" for change in self.changes]
            record.write_record(
                folder / record.FILE, self.run, self.sections, made_by=describe_versions(), changes=changes
            )
            write_json(folder / DATA, self.data)
            write_labeled_ids(folder / LABELED_IDS, sets.train, self.run.data)
        except OSError as error:
            raise UserError(
                f"--output_dir {folder}: cannot be written ({error}). Make room, or use another --output_dir"
            ) from None


def plan_run(accelerator: Accelerator, run: Config, sets: Sets, done: Iterable[str]) -> RunPlan:
    """Decide what a run does with its directory, and print how its options differ from the record there.

    All ranks must call it. Nothing is written.

    Args:
        done: the stages that are finished, and not trained again.

    Raises:
        UserError: the recorded run cannot be continued with these options or on these data; the initial weights are in
            a folder that is moved.
    """
    return _on_main(accelerator, lambda: _plan(run, sets, list(done)))


def _plan(run: Config, sets: Sets, done: Sequence[str]) -> RunPlan:
    folder, asked = Path(run.output_dir), run.resume_from_checkpoint
    trained: list[StageName] = [stage for stage in run.stages if stage not in done]
    plan = RunPlan(run=run, data=describe_data(sets))
    begun = find_begun(folder)
    starts_there = bool(trained) and starting_point(folder, trained[0]) is not None
    checkpoints = [path for stage in trained[:1] for path in list_checkpoints(folder / stage / "checkpoints")]
    source, step = folder, 0
    if asked == "latest":
        if checkpoints:
            plan.resumed, step = trained[0], step_of(checkpoints[-1])
        elif not done:
            print(f"warning: --resume_from_checkpoint latest: no checkpoint in {folder}. Training starts at step 1")
    elif asked:
        there = read_position(Path(asked))
        plan.resumed, step, source = there.stage, there.step, Path(asked).resolve().parents[2]
    is_continued = asked == "latest" or (asked is not None and source == folder.resolve())
    if is_continued:
        plan.retrained = [stage for stage in trained[1:] if stage in begun]
        plan.checkpoint = Path(str(asked)) if asked != "latest" else None
    else:
        plan.replaces = any(stage in begun for stage in trained)
    _refuse_weights_that_move(run, plan)
    if not trained:
        print(f"nothing is trained: {', '.join(done)} reached the last step in {folder}. Set more steps, or another "
              "--output_dir")  # fmt: skip
    context = Continuation(
        file=source / record.FILE,
        trained=trained,
        resumed=plan.resumed,
        step=step,
        finished=done,
        begun=find_begun(source) if plan.resumed else () if plan.replaces else begun,
        from_earlier=starts_there and not (run.weights or plan.resumed),
        freezes_blocks=bool(trained) and "block_*" in run.get_stage(trained[0]).frozen,
    )
    _compare(plan, context)
    return plan


def _compare(plan: RunPlan, context: Continuation) -> None:
    """Compare the options and the data with the record, and print each difference."""
    stay = [stage for stage in find_begun(context.file.parent) if stage not in context.trained]
    if plan.replaces:  # the stages after the first one that is trained move to RUN_DIR.1, with their record
        stay = [stage for stage in stay if STAGES.index(stage) < STAGES.index(plan.run.stages[0])]
    # Stages of other commands that stay in the record share its common options, such as `weights`.
    is_continued = bool(context.resumed or context.from_earlier or context.finished or stay)
    tree = record.read_record(context.file) if is_continued else None
    plan.sections = {stage: tree[stage] for stage in stay if tree and stage in tree}
    if context.resumed or context.from_earlier:
        plan.sections["weights"] = tree.get("weights") if tree else None
    if not is_continued:
        return
    lines = record.check_differences(record.find_differences(tree, plan.run), context) if tree else []
    if earlier := read_json(context.file.with_name(DATA)):
        lines += _compare_data(earlier, plan, context)
    for line in lines:
        print(line, flush=True)
    plan.changes = [line.rpartition(": applied")[0].partition(": ")[2] for line in lines if ": applied" in line]


def _compare_data(earlier: Mapping[str, Any], plan: RunPlan, context: Continuation) -> list[str]:
    """Lines about datasets that differ from the record.

    Raises:
        UserError: a stage is resumed, and `--data.allow_other` is not set.
    """
    if not context.trained:
        return []
    file, names, lines = context.file.with_name(DATA), plan.data["keypoints"], []
    if context.resumed and earlier.get("keypoints", names) != names:
        raise UserError(
            f"{file}: {context.resumed} is resumed with other keypoints (expected {', '.join(earlier['keypoints'])}, "
            f"found {', '.join(names)}). Start a new run: another --output_dir, and no --resume_from_checkpoint"
        )
    for split in ("train", "val", "unlabelled"):
        before, now = earlier.get(split), plan.data.get(split)
        if not (isinstance(before, dict) and now) or before.get("digest") == now["digest"]:
            continue
        what = f"{file}: other people of {split} (expected {_count(before)}, found {_count(now)})"
        if context.resumed and not plan.run.data.allow_other:
            raise UserError(
                f"{what}, and {context.resumed} is resumed. Use the data that it was trained on, add "
                "--data.allow_other, or start a new run: another --output_dir"
            )
        lines.append(f"{what}: applied in {context.trained[0]}")
    return lines


def _count(people: Mapping[str, Any]) -> str:
    return f"{people.get('num_people')} of {people.get('annotations')}, digest {str(people.get('digest'))[:8]}"


def describe_data(sets: Sets) -> dict[str, Any]:
    """Return the contents of data.json: file, number of people and digest of each split; the keypoints."""
    splits = {"train": sets.train, "val": sets.val, "unlabelled": sets.unlabeled}
    described = {
        name: {"annotations": people.annotations.name, "num_people": len(people), "digest": digest_people(people)}
        for name, people in splits.items()
        if people is not None
    }
    return {**described, "keypoints": list(sets.skeleton.names)}


def digest_people(people: People) -> str:
    """Return a digest of ids, boxes and keypoints, not of paths; of a stream, of the number of people in each part."""
    digest = hashlib.sha256(str(len(people)).encode())
    counts = getattr(people.rows, "counts", None)
    if counts is not None:
        digest.update(np.ascontiguousarray(counts).tobytes())
        return digest.hexdigest()
    rows = spread_rows(people.rows, MAX_RECORDED_PEOPLE)
    for values in (boxes_of(rows), keypoints_of(rows), *(column_of(rows, name) for name in ("ann_id", "image_id"))):
        numbers = values if values.dtype.kind in "fiu" else values.astype(str)
        digest.update(np.ascontiguousarray(numbers).tobytes())
    return digest.hexdigest()


def find_begun(folder: Path) -> list[str]:
    """List the stages that have files or log lines in a run directory."""
    logged = set()
    with contextlib.suppress(OSError):
        logged = {stage for stage in STAGES for line in _lines(folder / METRICS) if _stage_of(line) == stage}
    return [stage for stage in STAGES if (folder / stage).exists() or stage in logged]


def _lines(file: Path) -> list[str]:
    return file.read_text(errors="replace").splitlines() if file.is_file() else []


def _stage_of(line: str) -> str | None:
    """Return the stage of a line of metrics.jsonl; None for an incomplete line of a run that was killed."""
    try:
        tree = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return tree.get("stage") if isinstance(tree, dict) else None


def _refuse_weights_that_move(run: Config, plan: RunPlan) -> None:
    start, folder = run.weights and Path(run.weights).expanduser().resolve(), Path(run.output_dir).resolve()
    moved = STAGES[STAGES.index(run.stages[0]) :] if plan.replaces else plan.retrained
    for stage in moved:
        if start and folder / stage in start.parents:
            raise UserError(
                f"--weights {run.weights}: in {folder / stage}, which this run moves to another name. Use another "
                "--output_dir"
            )


def _move_run_aside(folder: Path, carried: Sequence[str]) -> None:
    """Rename RUN_DIR to the first free of RUN_DIR.1, ..., and create a new one with these stages' results and the lock.

    The results are hard links (copies where the file system has none), without checkpoints. If that fails, the old run
    is renamed back.

    Raises:
        UserError: the directory cannot be renamed.
        OSError: something could not be carried over.
    """
    folder = folder.resolve()
    fresh, aside = folder.with_name(folder.name + UNFINISHED), first_free_name(folder)
    carried = [stage for stage in carried if stage in find_begun(folder)]
    try:
        folder.rename(aside)
    except OSError as error:
        raise UserError(
            f"--output_dir {folder}: contains an earlier run and cannot be renamed to {aside} ({error.strerror}); "
            f"a mount point never can. Use a folder in it: --output_dir {folder / 'run'}"
        ) from None
    try:
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir()
        if (aside / LOCK).is_file():
            shutil.copyfile(aside / LOCK, fresh / LOCK)
        _carry_over(aside, fresh, carried)
        fresh.rename(folder)
    except OSError:
        shutil.rmtree(fresh, ignore_errors=True)
        aside.rename(folder)
        raise
    (aside / LOCK).unlink(missing_ok=True)
    more = f"; {', '.join(carried)} carried over without checkpoints" if carried else ""
    print(f"{folder}: contained an earlier run, which is now {aside}{more}", flush=True)


def _carry_over(old: Path, new: Path, stages: Sequence[str]) -> None:
    """Link the stages' results and images into a new run; copy their log lines and the records of labeled people."""
    for stage in stages:
        for part in (stage, f"tensorboard/{stage}"):
            if (old / part).is_dir():
                shutil.copytree(
                    old / part, new / part, copy_function=files.link, ignore=shutil.ignore_patterns("checkpoints")
                )
        for image in old.glob(f"pictures/{stage}_*"):
            (new / "pictures").mkdir(exist_ok=True)
            files.link(image, new / "pictures" / image.name)
    if stages:
        kept = [line + "\n" for line in _lines(old / METRICS) if _stage_of(line) in stages]
        (new / METRICS).write_text("".join(kept))
        for file in old.glob(f"{Path(LABELED_IDS).stem}*.json"):
            shutil.copyfile(file, new / file.name)


def _set_stage_aside(folder: Path, stage: str) -> None:
    """Move all files of a stage of a run that is continued to STAGE.1, ..., its log lines and images too."""
    (folder / stage).mkdir(exist_ok=True)
    aside = first_free_name(folder / stage)
    set_aside(folder / stage)
    (aside / METRICS).write_text("".join(line + "\n" for line in _lines(folder / METRICS) if _stage_of(line) == stage))
    for image in folder.glob(f"pictures/{stage}_*"):
        (aside / "pictures").mkdir(exist_ok=True)
        image.rename(aside / "pictures" / image.name)
    if (folder / "tensorboard" / stage).is_dir():
        (folder / "tensorboard" / stage).rename(aside / "tensorboard")


def find_finished(accelerator: Accelerator, run: Config, lasts: Mapping[str, int]) -> dict[str, dict[str, float]]:
    """Return rank 0's `read_finished`: other machines may see another state of the disk. All ranks must call it."""
    return _on_main(accelerator, lambda: read_finished(Path(run.output_dir), lasts, run.resume_from_checkpoint))


def read_finished(run_folder: Path, lasts: Mapping[str, int], asked: str | None) -> dict[str, dict[str, float]]:
    """Return the metrics of the stages that a resumed run does not train again.

    Args:
        lasts: the last step of each stage of the run, in order.
        asked: `--resume_from_checkpoint`. With `latest`, the stages that reached their last step are finished; with a
            checkpoint, the stages before the checkpoint's own.

    Raises:
        UserError: the folder is not a checkpoint, or it is a checkpoint of a stage that is not trained.
    """
    stages = list(lasts)
    if asked is None:
        return {}
    if asked != "latest":
        stage = read_position(Path(asked)).stage
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
            break  # later stages started from other weights than those that this stage will produce
        done[stage] = metrics
    return done


def _metrics(stage_folder: Path, last: int) -> dict[str, float] | None:
    metrics = read_json(stage_folder / "eval.json")
    if not (metrics and (stage_folder / "weights" / FILE).is_file()):
        return None
    step = metrics.get("step")
    return metrics if isinstance(step, int) and step >= last else None


def _forget_after(stage_folder: Path, step: int) -> None:
    """Rename checkpoints and results of a stage that are later than the step from which it is resumed."""
    folder = stage_folder / "checkpoints"
    later = [path for path in list_checkpoints(folder) if step_of(path) > step]
    for path in [*later, stage_folder / "eval.json", stage_folder / "kept.json"]:
        if path.exists():
            set_aside(path)
    for link in (folder / "latest", folder / "best"):
        if link.is_symlink() and not link.exists():
            link.unlink()


def write_labeled_ids(path: Path, people: People, config: DataConfig) -> None:
    """Write the ids of the labeled people, ascending, and the rule that selects them, as JSON.

    An earlier record of other people is renamed to NAME.1.json, NAME.2.json, ... with a warning: weights of that run
    were trained on labels that are withheld now.

    Args:
        people: the people of training, without images that cannot be decoded.

    Raises:
        UserError: the earlier record is not JSON.
    """
    rule = {"labels": config.labels, "labels_by": config.labels_by, "labels_seed": config.labels_seed}
    ids = {}
    if config.labels is not None or (not config.streaming and len(people) <= MAX_RECORDED_PEOPLE):
        numbers = {name: np.unique(column_of(people.rows, name)) for name in ("ann_id", "image_id")}
        ids = {
            "ann_ids": read_given_ids(people, numbers["ann_id"]).tolist(),
            "image_ids": read_given_image_ids(people, numbers["image_id"]).tolist(),
        }
    record = rule | {"annotations": people.annotations.name, "num_people": len(people)} | ids
    if path.is_file():
        _keep_record(path, record)
    write_text(path, json.dumps(record) + "\n")


def _keep_record(path: Path, record: dict[str, Any]) -> None:
    """Rename an earlier run's record if it names other people, and print what that means for this run."""
    try:
        old = read_tree(path, json.loads, "JSON")
        earlier, now = (set(map(number_of_id, one.get("ann_ids", ()))) for one in (old, record))
    except (UserError, TypeError) as error:
        raise UserError(
            f"{path}: not JSON of ids ({error}), although it records the labeled people of an earlier run. Move it away"
        ) from None
    has_ids = "ann_ids" in old, "ann_ids" in record
    if old.get("annotations") == record["annotations"] and earlier == now and has_ids[0] == has_ids[1]:
        return
    number = 1
    while (kept := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
        number += 1
    path.rename(kept)
    # Ids of another annotation file belong to other people. Without `labels` no label is withheld.
    comparable = record["labels"] is not None and old.get("annotations") == record["annotations"]
    lost = earlier - now if comparable else ()
    line = (
        f"warning: {path}: {old.get('num_people')} people were labeled in an earlier run in this folder, "
        f"{record['num_people']} are now; the earlier record is {kept.name}"
    )
    if lost:
        line += (
            f"; {len(lost)} people were labeled then and are not now: weights of an earlier stage in this folder were "
            f"trained on labels that this run withholds. For a fair comparison use another --output_dir (or --weights)"
        )
    print(line, flush=True)
