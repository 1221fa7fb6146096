"""Checkpoints: written completely or not at all, verified before they are loaded, and pruned.

STAGE/checkpoints/step_N holds Accelerate's state (model, optimizer, random states of every rank; DeepSpeed's shards),
the objective's state (the teacher), the weights for export, and position.json: the step, the launch that saved it, and
the size and checksum of every file. It is written under another name and renamed. `latest` and `best` beside the
checkpoints are links for users; this module does not read them.
"""

import hashlib
import json
import re
import shutil
import time
import zlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from stat import S_ISREG
from typing import Any, Literal

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sapiens_accel.config.schema import STAGES
from sapiens_accel.errors import UserError, count, read_tree
from sapiens_accel.models.quantized import num_values
from sapiens_accel.runtime import distributed, engine
from sapiens_accel.runtime.files import (
    CORRUPT,
    GIB,
    NOT_WRITTEN,
    UNFINISHED,
    error_of,
    follow_umask,
    read_json,
    set_aside,
    write_json,
)
from sapiens_accel.training.objectives import Objective

CHECKSUM = "checksum"
POSITION, OBJECTIVE, SCORE = "position.json", "objective.safetensors", "score.json"
STATE = "state"
# What torch and DeepSpeed say of a state whose shapes or groups differ from the network's and the optimizer's.
OTHER_STATE = re.compile(r"parameter group|size mismatch|Error\(s\) in loading state_dict")
SAVE_SECONDS, SAVE_SHARE = 1800, 20  # between two checkpoints: seconds, and at least this many times the time of a save
SPARE = 1.02  # space that the next checkpoint needs, as a multiple of the last one's size
Weights = Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Position:
    """What position.json says: stage and step, the launch that saved it, and of each file size in bytes and CRC-32."""

    stage: str
    step: int
    num_processes: int
    zero_stage: int
    precision: str
    files: dict[str, tuple[int, int]]


@dataclass(frozen=True, kw_only=True)
class Saver:
    """What a checkpoint of a stage contains, and where it is written.

    Attributes:
        folder: the stage's folder in the run directory.
        keep: the number of last checkpoints that are kept; the best one is kept too.
        collect: returns the full weights by folder, on rank 0; all ranks call it.
        write: writes them into a folder; rank 0 calls it.
        without_frozen: the state is of what learns alone: the stage's folder holds the frozen base.
    """

    accelerator: Accelerator
    folder: Path
    keep: int
    objective: Objective
    collect: Callable[[], Weights]
    write: Callable[[Path, Weights], None]
    without_frozen: bool = False


@dataclass(kw_only=True)
class SaveSchedule:
    """When a checkpoint is due: after every so many steps, or by default by epochs and time.

    By default: at the end of each epoch and half an hour after the last checkpoint, but only so often that saving takes
    at most a twentieth of the time (small datasets have epochs of a second, large states take minutes); and at the end.

    Attributes:
        every: steps between two checkpoints, from `--save_every`.
        epoch: steps of an epoch.
        last: the stage's last step.
        saved_at: the step of the last checkpoint.
        since, cost: when it was written, and how long that took (seconds). A save that failed, perhaps at once,
            does not lower the cost.
    """

    every: int | None
    epoch: float
    last: int
    saved_at: int = 0
    since: float = field(default_factory=time.monotonic)
    cost: float = 0.0

    def is_due(self, step: int) -> bool:
        """Return whether the state after this step should be saved, by this process's clock."""
        if self.every is not None:
            return step // self.every > self.saved_at // self.every
        passed = time.monotonic() - self.since
        is_time = passed >= SAVE_SECONDS or step // self.epoch > self.saved_at // self.epoch
        is_due = step == self.last or (is_time and passed >= SAVE_SHARE * self.cost)
        return step > self.saved_at and is_due

    def measure(self, step: int, write: Callable[[], Path | None]) -> Path | None:
        """Call `write`, record the step and the time it takes, and return the checkpoint (None if it failed)."""
        begun = time.monotonic()
        saved = write()
        self.saved_at, self.since = step, time.monotonic()
        took = self.since - begun
        self.cost = took if saved else max(took, self.cost)
        return saved


def save(saver: Saver, step: int) -> Path | None:
    """Write STAGE/checkpoints/step_N, and delete older ones but the last `keep` and the best. All ranks must call it.

    Returns:
        The checkpoint; None if it could not be written: the earlier ones are complete, and the reason was printed.
    """
    accelerator, objective, stage = saver.accelerator, saver.objective, saver.folder.name
    folder = saver.folder / "checkpoints"
    target, temporary = folder / f"step_{step}", folder / f"step_{step}{UNFINISHED}"
    main = accelerator.is_main_process
    problem = _make_room(folder, temporary) if main else None
    problem = broadcast_object_list([problem])[0]
    if problem is None:
        collected = saver.collect()
        failed = [error_of(lambda: saver.write(temporary, collected)) if main else None]
        del collected
        without_frozen = saver.without_frozen
        failed.append(engine.save_state(accelerator, temporary / STATE, NOT_WRITTEN, without_frozen=without_frozen))
        state = objective.state_dict()  # gathered from all ranks, where each keeps a part of the teacher
        failed.append(error_of(lambda: save_file(state, temporary / OBJECTIVE)) if main else None)
        accelerator.wait_for_everyone()
        failed.append(error_of(lambda: _describe(accelerator, temporary, stage, step)))
        problem = _first(gather_object([_first(failed)]))
    if main and problem is None:
        problem = error_of(lambda: _publish_folder(temporary, target))
        if problem is None and list_checkpoints(folder) == [target]:
            _print_size(saver, target)
        if problem is None and (left := error_of(lambda: _prune(folder, saver.keep))):
            print(f"{stage}: warning: an old checkpoint could not be deleted: {left}", flush=True)
    problem = broadcast_object_list([problem])[0]
    if problem is None:
        return target
    if main:
        shutil.rmtree(temporary, ignore_errors=True)
        earlier = list_checkpoints(folder)
        whole = f"; {earlier[-1]} is complete" if earlier else ""
        print(f"{stage}: warning: step {step} could not be saved: {problem}{whole}; training continues", flush=True)
    accelerator.wait_for_everyone()
    return None


def estimate_size(
    accelerator: Accelerator, model: nn.Module, *, teacher: bool, adam_8bit: bool, without_frozen: bool = False
) -> int:
    """Bytes that a checkpoint of a network takes that is not prepared yet.

    For each parameter: its value as the launch keeps it (none under ZeRO-3), the two moments of AdamW and DeepSpeed's
    fp32 copy if it is trained, 4 bytes in each folder of weights, and 4 in the teacher's state. Without the frozen ones
    these have no value in the state and none in the teacher's.
    """
    num = num_values(model)
    learning = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    is_deepspeed, half = distributed.is_deepspeed(accelerator), accelerator.mixed_precision != "no"
    value = 0 if distributed.zero_stage(accelerator) == 3 else 2 if is_deepspeed and half else 4
    optimizer = (2 if adam_8bit else 8) + 4 * is_deepspeed
    saved = learning if without_frozen else num
    return num * 4 * (1 + teacher) + saved * (value + 4 * teacher) + learning * optimizer


def warn_of_little_room(stage_folder: Path, needed: int, first_weights: int = 0) -> None:
    """Print a line where the disk has not room for the first checkpoint of a stage. Rank 0 calls it.

    Args:
        needed: bytes of that checkpoint.
        first_weights: bytes of the weights that are exported before it.
    """
    if list_checkpoints(stage_folder / "checkpoints"):  # `save` takes the size of the last one
        return
    free = shutil.disk_usage(stage_folder.parent).free
    if free < needed + first_weights:
        sizes = f"expected about {needed / GIB:.2f} GiB, "
        sizes += f"and {first_weights / GIB:.2f} GiB for the initial weights, " if first_weights else ""
        print(
            f"{stage_folder.name}: warning: --output_dir {stage_folder.parent}: too little room for the first "
            f"checkpoint ({sizes}found {free / GIB:.2f} GiB free). Make room: what cannot be saved is lost when the "
            "run stops",
            flush=True,
        )


def _print_size(saver: Saver, target: Path) -> None:
    with suppress(UserError, OSError):  # it is written, and the other ranks wait
        size = sum(size for size, _ in read_position(target).files.values()) / GIB
        kept = f"the last {saver.keep} and the best are kept"
        print(f"{saver.folder.name}: a checkpoint takes {size:.2f} GiB; {kept}", flush=True)


def _first(problems: Iterable[str | None]) -> str | None:
    return next((problem for problem in problems if problem), None)


def _make_room(folder: Path, temporary: Path) -> str | None:
    """Delete unfinished checkpoints and create the new folder; returns the error, if any.

    Where the disk has too little space, all checkpoints but the last and the best are deleted.
    """

    def make() -> None:
        for left in folder.glob(f"*{UNFINISHED}"):
            left.unlink() if left.is_symlink() else shutil.rmtree(left)
        temporary.mkdir(parents=True)
        checkpoints = list_checkpoints(folder)
        try:
            files = read_position(checkpoints[-1]).files if checkpoints else {}
        except UserError:  # it is damaged: the size of the next one is unknown
            files = {}
        needed = SPARE * sum(size for size, _ in files.values())
        free = shutil.disk_usage(folder).free
        if free < needed and {*checkpoints} - {checkpoints[-1], find_best(folder)} and _is_whole(checkpoints[-1]):
            print(f"warning: {folder}: {free / GIB:.1f} GiB are free: all checkpoints but the last and the best are "
                  "deleted to make room for the next", flush=True)  # fmt: skip
            _prune(folder, 1)
            free = shutil.disk_usage(folder).free
        if free < needed:
            raise OSError(f"too little space in {folder} (expected {needed / GIB:.1f} GiB, found {free / GIB:.1f} GiB)")

    return error_of(make)


def _describe(accelerator: Accelerator, folder: Path, stage: str, step: int) -> None:
    """Write position.json, last; each rank reads a share of the files that rank 0 lists.

    On a network file system, another machine may not list yet what was just written.
    """
    names, problem, own = [], None, []
    try:
        if accelerator.is_main_process:
            names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    except OSError as error:
        problem = error
    names = broadcast_object_list([names])[0]
    mine = names[accelerator.process_index :: accelerator.num_processes]
    try:
        for name in mine:
            follow_umask(folder / name)
        own = [(name, _fingerprint(folder / name)) for name in mine]
    except OSError as error:
        problem = error
    every = gather_object(own)  # before anything is raised: the other ranks wait in it
    if problem:
        raise problem
    if accelerator.is_main_process:
        world = distributed.world(accelerator)
        whole = asdict(Position(stage=stage, step=step, files=dict(sorted(every)), **world))
        (folder / POSITION).write_text(json.dumps(whole | {CHECKSUM: _checksum(whole)}))


def _checksum(tree: Mapping[str, Any]) -> str:
    """SHA-256 of the entries of position.json but this one."""
    rest = {name: value for name, value in tree.items() if name != CHECKSUM}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _fingerprint(path: Path) -> tuple[int, int]:
    checksum = 0
    with path.open("rb") as file:
        while piece := file.read(1 << 24):
            checksum = zlib.crc32(piece, checksum)
    return path.stat().st_size, checksum


def _publish_folder(temporary: Path, target: Path) -> None:
    if target.exists():
        set_aside(target)  # of another run from an earlier checkpoint
    temporary.rename(target)
    _point("latest", target)


def _prune(folder: Path, keep: int) -> None:
    whole = list_checkpoints(folder)
    kept = {*whole[-keep:], find_best(folder)}
    for old in whole:
        if old not in kept:
            # Renamed first: if this process is killed meanwhile, no incomplete folder has a checkpoint's name.
            shutil.rmtree(old.rename(old.with_name(old.name + UNFINISHED)))


def _point(name: str, target: Path) -> None:
    """Point the link `name` beside a checkpoint to it, unless the file system has no links.

    In a run directory that was copied with its links followed, `name` is a copy of a checkpoint: it is deleted.
    """
    link = target.with_name(name)
    temporary = link.with_name(name + UNFINISHED)
    with suppress(OSError):  # links are for users: nothing here reads them
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(target.name)
        if link.is_dir() and not link.is_symlink():
            shutil.rmtree(link)
        temporary.replace(link)


def record_score(stage_folder: Path, step: int, ap: float) -> bool:
    """Record the AP of a step if it was saved; returns whether it is the highest of those. Rank 0 calls it."""
    checkpoint = stage_folder / "checkpoints" / f"step_{step}"
    if not checkpoint.is_dir():
        return False
    write_json(checkpoint / SCORE, {"AP": ap})
    is_best = find_best(checkpoint.parent) == checkpoint
    if is_best:
        _point("best", checkpoint)
    return is_best


def find_best(folder: Path) -> Path | None:
    """Return the evaluated checkpoint of the highest AP (of several, the last), None if there is none."""
    scored = [((read_json(path / SCORE) or {}).get("AP"), path) for path in list_checkpoints(folder)]
    scores = [(score, path) for score, path in scored if isinstance(score, int | float)]  # the file may be damaged
    highest = max((score for score, _ in scores), default=None)
    return next((path for score, path in reversed(scores) if score == highest), None)


# ---- Resuming

Way = Literal["whole", "universal", "weights"]


@dataclass(frozen=True, kw_only=True)
class Resume:
    """A checkpoint to resume from.

    Attributes:
        way: whole: everything is restored. universal: likewise, on another number of processes, through DeepSpeed's
            universal checkpoint. weights: weights, step and teacher are restored, the optimizer's state is not.
    """

    folder: Path
    position: Position
    way: Way

    @property
    def weights(self) -> str | None:
        """The weights to start from if this launch cannot load the state: the student's, if there is one."""
        student = self.folder / "student"
        return None if self.way != "weights" else str(student if student.is_dir() else self.folder / "weights")

    def find_base(self, name: str) -> Path:
        """The folder `name` of its stage, which holds what its adapters are added to.

        Raises:
            UserError: there is none.
        """
        base = self.folder.absolute().parents[1] / name
        if not base.is_dir():
            raise UserError(
                f"{self.folder}: what its adapters are added to is missing (expected {base}). Copy the whole folder of "
                "the stage, or use another checkpoint"
            )
        return base

    def __str__(self) -> str:
        processes = count(self.position.num_processes, "process")
        then = f"{processes}, {_kind(self.position.zero_stage, self.position.precision)}"
        said = {
            "whole": "",
            "universal": f"; saved by {then}: converted by DeepSpeed's universal checkpoint",
            "weights": f"; saved by {then}: weights, step and teacher are restored, the optimizer's state is NOT",
        }
        return f"resumes from {self.folder}{said[self.way]}"

    def load(
        self, accelerator: Accelerator, objective: Objective, *, trusted: bool = False, without_frozen: bool = False
    ) -> int:
        """Load the checkpoint into network, optimizer and objective; returns the step. All ranks must call it.

        Raises:
            UserError: as `engine.load_state`.
        """
        if self.way != "weights":
            universal = self.way == "universal"
            try:
                engine.load_state(
                    accelerator,
                    self.folder / STATE,
                    universal=universal,
                    trusted=trusted,
                    without_frozen=without_frozen,
                )
            except (ValueError, RuntimeError) as error:
                if not OTHER_STATE.search(str(error)):
                    raise
                said = " ".join(str(error).split())[:300]
                raise UserError(
                    f"{self.folder}: the state of another network or optimizer ({said}). Use the options of the run "
                    "that saved it (model, lora, frozen, crop), or start a new run"
                ) from None
        # Accelerate restores its count of micro-steps; a checkpoint is saved between two optimizer steps.
        accelerator.step = 0
        objective.load_state_dict(load_file(self.folder / OBJECTIVE))
        return self.position.step


def find_checkpoint(
    accelerator: Accelerator, run_folder: Path, asked: str | None, stage: str, *, dry_run: bool = False
) -> Resume | None:
    """Return the checkpoint that a stage resumes from: its last complete one, or the folder asked for if it is its own.

    Of `latest`, truncated or corrupt ones are named and renamed (not in a dry run), and the one before is used. All
    ranks must call it.

    Raises:
        UserError: on all ranks: the folder asked for is incomplete; a file cannot be read, so that this is not known.
    """
    if asked is None:
        return None
    chosen, problem = None, None
    if accelerator.is_main_process:
        try:
            chosen = _choose(run_folder, asked, stage, dry_run=dry_run)
        except UserError as error:
            problem = str(error)
    chosen, problem = broadcast_object_list([chosen, problem])
    if problem:
        raise UserError(problem)
    if chosen is None:
        return None
    there = read_position(chosen)
    return Resume(folder=chosen, position=there, way=_way(there, distributed.world(accelerator)))


def _choose(run_folder: Path, asked: str, stage: str, *, dry_run: bool) -> Path | None:
    if asked == "latest":
        return _last_whole(run_folder / stage / "checkpoints", dry_run=dry_run)
    chosen = Path(asked)
    if read_position(chosen).stage != stage:
        return None
    if broken := _broken(chosen):
        raise UserError(f"--resume_from_checkpoint {asked}: {broken}. Use another one, or latest")
    return chosen


def _last_whole(folder: Path, *, dry_run: bool) -> Path | None:
    for checkpoint in reversed(list_checkpoints(folder)):
        broken = _broken(checkpoint)
        if broken is None:
            return checkpoint
        aside, done = checkpoint.with_name(checkpoint.name + CORRUPT), "skipped"
        if not dry_run:
            shutil.rmtree(aside, ignore_errors=True)
            checkpoint.rename(aside)
            done = f"renamed to {aside.name}"
        print(f"warning: {checkpoint} is incomplete: {broken}; {done}, trying the one before it")
    return None


def _is_whole(checkpoint: Path) -> bool:
    with suppress(UserError):  # a file cannot be read
        return _broken(checkpoint) is None
    return False


def _broken(checkpoint: Path) -> str | None:
    """Return what is wrong with a checkpoint's files, None if nothing is.

    Raises:
        UserError: a file exists and cannot be read (file server, permissions): the checkpoint may be complete.
    """

    def differs(name: str) -> str | None:
        path, (size, checksum) = checkpoint / name, files[name]
        try:
            status = path.stat()
            if not S_ISREG(status.st_mode):
                return f"{name} is missing"
            if status.st_size != size:
                return f"{name} has {status.st_size} bytes of {size}"
            return None if _fingerprint(path)[1] == checksum else f"{name} has changed (checksum)"
        except (FileNotFoundError, NotADirectoryError):
            return f"{name} is missing"
        except OSError as error:
            raise _unreadable(path, error) from None

    try:
        with suppress(FileNotFoundError, NotADirectoryError, IsADirectoryError):
            (checkpoint / POSITION).read_bytes()
        files = read_position(checkpoint).files
    except OSError as error:
        raise _unreadable(checkpoint / POSITION, error) from None
    except UserError as error:
        return str(error)
    with ThreadPoolExecutor(4) as pool:
        return _first(pool.map(differs, files))


def _unreadable(file: Path, error: OSError) -> UserError:
    return UserError(
        f"{file}: cannot be read ({error.strerror or error}), so it is not known whether that checkpoint is complete. "
        "Make it readable, or use another one (--resume_from_checkpoint)"
    )


def _way(then: Position, now: Mapping[str, int | str]) -> Way:
    if (then.zero_stage, then.precision) != (now["zero_stage"], now["precision"]):
        return "weights"
    if then.num_processes == now["num_processes"] or then.zero_stage == 0:
        return "whole"  # without ZeRO, every process has the whole state
    # From ZeRO-3's universal checkpoint, deepspeed 0.19 gives every parameter group the settings of the first one.
    return "universal" if then.zero_stage in (1, 2) else "weights"


def _kind(zero: int, precision: str) -> str:
    return f"{f'ZeRO-{zero}' if zero else 'no ZeRO'}, {'fp32' if precision == 'no' else precision}"


def read_position(folder: Path) -> Position:
    """Read position.json of a checkpoint.

    Raises:
        UserError: there is none, or it is damaged.
    """
    file = folder / POSITION
    if not file.is_file():
        raise UserError(
            f"--resume_from_checkpoint {folder}: not a checkpoint (expected latest or STAGE/checkpoints/step_N, found "
            f"no {POSITION})"
        )
    tree = read_tree(file, json.loads, "JSON")
    if CHECKSUM in tree and tree[CHECKSUM] != _checksum(tree):
        raise UserError(f"{file}: has changed since it was written (checksum). Use another checkpoint")
    try:
        position = Position(**{name: value for name, value in tree.items() if name != CHECKSUM})
        _check_types(position)
    except (ValueError, TypeError) as error:
        raise UserError(f"{file}: not the description of a checkpoint: {error}. Use another checkpoint") from None
    return position


def _check_types(position: Position) -> None:
    """Raise ValueError or TypeError for values of wrong types: descriptions of version 0.1 have no checksum."""
    numbers = (position.step, position.num_processes, position.zero_stage)
    if position.stage not in STAGES or not isinstance(position.precision, str):
        raise ValueError(f"stage {position.stage!r}, precision {position.precision!r}")
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError(f"step, processes and ZeRO stage {numbers}")
    for name, (size, checksum) in (
        position.files.items() if isinstance(position.files, dict) else [("files", (None, None))]
    ):
        if type(size) is not int or type(checksum) is not int or ".." in Path(name).parts or Path(name).is_absolute():
            raise ValueError(f"file {name!r}")


def list_checkpoints(folder: Path) -> list[Path]:
    """List the checkpoints in a folder, oldest first."""
    steps = [path for path in folder.glob("step_*") if re.fullmatch(r"step_\d+", path.name)]
    return sorted(steps, key=step_of)


def step_of(checkpoint: Path) -> int:
    """Return the step in a checkpoint's name."""
    return int(checkpoint.name.removeprefix("step_"))
