"""The run directory: which stages are finished in it, what a new run moves out of its way, and what it records.

RUN_DIR/config.yaml is what the run is, data.json and labelled_ann_ids.json which people it learns from, STAGE/ what a
stage writes. One rule: a stage that left nothing there is added to the run; a stage that is trained again begins a new
run, and the whole old one is moved to RUN_DIR.1; with `--resume_from_checkpoint` the run that is there is continued.
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
from sapiens_accel.data.people import People, boxes_of, column_of, keypoints_of, spread_rows
from sapiens_accel.errors import UserError, read_tree
from sapiens_accel.models.load import FILE, starting_point
from sapiens_accel.runtime import failures
from sapiens_accel.runtime.files import UNFINISHED, read_json, set_aside, write_json, write_text
from sapiens_accel.runtime.lock import LOCK, lock_directory
from sapiens_accel.runtime.versions import describe_versions
from sapiens_accel.training.checkpoint import list_checkpoints, position, step_of

MAX_RECORDED_PEOPLE = 1_000_000  # of more, the ids of labeled people are not recorded, and so many make the digest
METRICS, DATA, LABELED_IDS = "metrics.jsonl", "data.json", "labelled_ann_ids.json"


@contextlib.contextmanager
def lock_run(accelerator: Accelerator, run: Config) -> Iterator[None]:
    """Hold the lock of the run directory, by rank 0, while entered; a dry run takes none. All ranks must call it.

    Raises:
        UserError: on all ranks: another run is writing in it.
    """
    with contextlib.ExitStack() as held:
        if not run.dry_run:
            _on_main(accelerator, lambda: held.enter_context(lock_directory(Path(run.output_dir))))
        yield


def _on_main(accelerator: Accelerator, action: Callable[[], Any]) -> Any:
    """What rank 0's action returns, on all ranks.

    Raises:
        UserError: as the action, on all ranks; what else it raises is raised on rank 0, and named by the others.
    """
    outcome: list[Any] = [None, None]
    failure = None
    if accelerator.is_main_process:
        try:
            outcome[0] = action()
        except Exception as error:  # whatever it is: the others would wait for hours
            failure, outcome[1] = error, failures.describe(error)
    result, problem = broadcast_object_list(outcome)
    if failure is not None:
        raise failure
    if problem is not None:
        raise UserError(problem)
    return result


@dataclass(kw_only=True)
class RunPlan:
    """What a run does with its directory; decided before anything is written in it.

    Attributes:
        run: the options.
        data: what data.json is going to say.
        resumed: the stage that is resumed, if one, ...
        checkpoint: ... from this checkpoint, if one was named.
        replaces: the directory holds a run that is moved aside as a whole.
        retrained: stages of a run that is continued, which begin again.
        changes: the differences from the record that apply.
        sections: what stays of the record, by its first key: the options of stages that are not trained, and the
            weights that a run began with which is resumed, or which a stage is added to.
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
        """Make room in the directory and write the records, once, when it is known that the run can start.

        A dry run writes nothing. All ranks must call it.

        Args:
            first: the step that the first stage starts after.

        Raises:
            UserError: it cannot be written.
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
                f"--output_dir {folder}: cannot be written ({error}). Make room, or give another one"
            ) from None


def plan_run(accelerator: Accelerator, run: Config, sets: Sets, done: Iterable[str]) -> RunPlan:
    """Decide what a run does with its directory, and print how it differs from what is recorded there.

    All ranks must call it. Nothing is written.

    Args:
        done: the stages that are finished, and not trained again.

    Raises:
        UserError: what is recorded cannot be continued by these options or on these data; the weights to start from
            are in a folder that is moved.
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
            print(f"warning: --resume_from_checkpoint latest: no checkpoint in {folder}; training starts at step 1")
    elif asked:
        there = position(Path(asked))
        plan.resumed, step, source = there.stage, there.step, Path(asked).resolve().parents[2]
    is_continued = asked == "latest" or (asked is not None and source == folder.resolve())
    if is_continued:
        plan.retrained = [stage for stage in trained[1:] if stage in begun]
        plan.checkpoint = Path(str(asked)) if asked != "latest" else None
    else:
        plan.replaces = any(stage in begun for stage in trained)
    _refuse_weights_that_move(run, plan)
    if not trained:
        print(f"nothing is trained: {', '.join(done)} reached the last step in {folder}; give more steps, or another "
              "--output_dir")  # fmt: skip
    how = Continuation(
        file=source / record.FILE,
        trained=trained,
        resumed=plan.resumed,
        step=step,
        finished=done,
        begun=find_begun(source) if plan.resumed else () if plan.replaces else begun,
        from_earlier=starts_there and not (run.weights or plan.resumed),
    )
    _compare(plan, how)
    return plan


def _compare(plan: RunPlan, how: Continuation) -> None:
    """Compare the options and the data with what is recorded, and print each difference."""
    stay = [stage for stage in find_begun(how.file.parent) if stage not in how.trained]
    if plan.replaces:  # the stages after the first one that is trained are moved aside, with their record
        stay = [stage for stage in stay if STAGES.index(stage) < STAGES.index(plan.run.stages[0])]
    is_continued = bool(how.resumed or how.from_earlier or how.finished)
    tree = record.read_record(how.file) if is_continued or stay else None
    plan.sections = {stage: tree[stage] for stage in stay if tree and stage in tree}
    if how.resumed or how.from_earlier:
        plan.sections["weights"] = tree.get("weights") if tree else None
    if not is_continued:
        return
    lines = record.judge_differences(record.find_differences(tree, plan.run), how) if tree else []
    if earlier := read_json(how.file.with_name(DATA)):
        lines += _judge_data(earlier, plan, how)
    for line in lines:
        print(line, flush=True)
    plan.changes = [line.rpartition(": applied")[0].partition(": ")[2] for line in lines if ": applied" in line]


def _judge_data(earlier: Mapping[str, Any], plan: RunPlan, how: Continuation) -> list[str]:
    """Lines about people who are others than those that are recorded.

    Raises:
        UserError: so it is in a stage that is resumed, and that was not allowed.
    """
    if not how.trained:
        return []
    file, names, lines = how.file.with_name(DATA), plan.data["keypoints"], []
    if how.resumed and earlier.get("keypoints", names) != names:
        raise UserError(
            f"{file}: {how.resumed} is resumed with other keypoints (expected {', '.join(earlier['keypoints'])}, found "
            f"{', '.join(names)}). Begin a new run: another --output_dir, and no --resume_from_checkpoint"
        )
    for split in ("train", "val", "unlabelled"):
        before, now = earlier.get(split), plan.data.get(split)
        if not (isinstance(before, dict) and now) or before.get("digest") == now["digest"]:
            continue
        what = f"{file}: other people of {split} (expected {_count(before)}, found {_count(now)})"
        if how.resumed and not plan.run.data.allow_other:
            raise UserError(
                f"{what}, and {how.resumed} is resumed. Give the data of before, add --data.allow_other, or begin a "
                "new run: another --output_dir"
            )
        lines.append(f"{what}: applied in {how.trained[0]}")
    return lines


def _count(people: Mapping[str, Any]) -> str:
    return f"{people.get('num_people')} of {people.get('annotations')}, digest {str(people.get('digest'))[:8]}"


def describe_data(sets: Sets) -> dict[str, Any]:
    """What data.json says: of each split the file, the number of people and a digest of them; the keypoints."""
    splits = {"train": sets.train, "val": sets.val, "unlabelled": sets.unlabeled}
    described = {
        name: {"annotations": people.annotations.name, "num_people": len(people), "digest": digest_people(people)}
        for name, people in splits.items()
        if people is not None
    }
    return {**described, "keypoints": list(sets.skeleton.names)}


def digest_people(people: People) -> str:
    """A digest of ids, boxes and keypoints, wherever the files lie; of a stream, of how many people its parts have."""
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
    """The stages that have left anything in a run directory."""
    logged = set()
    with contextlib.suppress(OSError):
        logged = {stage for stage in STAGES for line in _lines(folder / METRICS) if _stage_of(line) == stage}
    return [stage for stage in STAGES if (folder / stage).exists() or stage in logged]


def _lines(file: Path) -> list[str]:
    return file.read_text(errors="replace").splitlines() if file.is_file() else []


def _stage_of(line: str) -> str | None:
    """The stage of a line of metrics.jsonl; None of a line that a killed run left."""
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
                f"--weights {run.weights}: in {folder / stage}, which this run moves out of its way. Give another "
                "--output_dir"
            )


def _move_run_aside(folder: Path, carried: Sequence[str]) -> None:
    """RUN_DIR becomes the first free of RUN_DIR.1, ...; a new one has what these stages handed over, and the lock.

    What is carried over are hard links (copies where there are none), without checkpoints.
    """
    folder = folder.resolve()
    fresh, aside = folder.with_name(folder.name + UNFINISHED), _first_free(folder)
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    carried = [stage for stage in carried if stage in find_begun(folder)]
    for stage in carried:
        for part in (stage, f"tensorboard/{stage}"):
            if (folder / part).is_dir():
                shutil.copytree(
                    folder / part, fresh / part, copy_function=_link, ignore=shutil.ignore_patterns("checkpoints")
                )
        for picture in folder.glob(f"pictures/{stage}_*"):
            (fresh / "pictures").mkdir(exist_ok=True)
            _link(picture, fresh / "pictures" / picture.name)
    if carried:
        kept = [line + "\n" for line in _lines(folder / METRICS) if _stage_of(line) in carried]
        (fresh / METRICS).write_text("".join(kept))
        for file in folder.glob(f"{Path(LABELED_IDS).stem}*.json"):
            shutil.copyfile(file, fresh / file.name)
    if (folder / LOCK).is_file():
        shutil.copyfile(folder / LOCK, fresh / LOCK)
    try:
        folder.rename(aside)
    except OSError as error:
        shutil.rmtree(fresh, ignore_errors=True)
        raise UserError(
            f"--output_dir {folder}: holds an earlier run, and cannot be renamed to {aside} ({error.strerror}); "
            f"a folder that a volume is mounted on never can. Give a folder in it: --output_dir {folder / 'run'}"
        ) from None
    fresh.rename(folder)
    (aside / LOCK).unlink(missing_ok=True)
    more = f"; {', '.join(carried)} carried over without checkpoints" if carried else ""
    print(f"{folder}: holds an earlier run, which is now {aside}{more}", flush=True)


def _first_free(folder: Path) -> Path:
    number = 1
    while (aside := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    return aside


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # no hard links on this file system
        shutil.copyfile(source, target)


def _set_stage_aside(folder: Path, stage: str) -> None:
    """All that a stage left in a run that is continued goes to STAGE.1, ..., its log lines and images too."""
    (folder / stage).mkdir(exist_ok=True)
    aside = _first_free(folder / stage)
    set_aside(folder / stage)
    (aside / METRICS).write_text("".join(line + "\n" for line in _lines(folder / METRICS) if _stage_of(line) == stage))
    for picture in folder.glob(f"pictures/{stage}_*"):
        (aside / "pictures").mkdir(exist_ok=True)
        picture.rename(aside / "pictures" / picture.name)
    if (folder / "tensorboard" / stage).is_dir():
        (folder / "tensorboard" / stage).rename(aside / "tensorboard")


def find_finished(accelerator: Accelerator, run: Config, lasts: Mapping[str, int]) -> dict[str, dict[str, float]]:
    """What `finished` returns on rank 0: other machines may see another state of the disk. All ranks must call it."""
    return _on_main(accelerator, lambda: finished(Path(run.output_dir), lasts, run.resume_from_checkpoint))


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
    step = metrics.get("step")
    return metrics if isinstance(step, int) and step >= last else None


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
    write_text(path, json.dumps(record) + "\n")


def _keep_record(path: Path, record: dict[str, Any]) -> None:
    """Rename an earlier run's record if it names other people, and print what that means for this run."""
    try:
        old = read_tree(path, json.loads, "JSON")
        set(old.get("ann_ids", ()))
    except (UserError, TypeError) as error:
        raise UserError(
            f"{path}: not JSON of ids ({error}); it records the labeled people of an earlier run. Move it away"
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
