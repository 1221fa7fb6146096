"""Whoever stops a run: its last whole step is saved, one line says what happened, and every process ends in time.

Each run is tiny, and forked from this process (`benchmarks/fault_runs.py`).
"""

import itertools
import os
import pkgutil
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from errno import EIO, ENOSPC, EPERM, EROFS
from functools import partial
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import fault_runs as faults
from fault_runs import Run, Started

from sapiens_accel.training import checkpoint

pytestmark = pytest.mark.launch
TWO = Run(processes=2)


@pytest.fixture(autouse=True)
def surroundings(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """One cache for all: the people are drawn once."""
    monkeypatch.setenv("SAPIENS_ACCEL_CACHE", str(tmp_path_factory.getbasetemp() / "faults_cache"))


@pytest.fixture
def begin(tmp_path: Path) -> Iterator[Callable[..., Started]]:
    """Starts a run, and waits until a step of it is logged."""
    runs: list[Started] = []

    def start(run: Run, *more: str, before: Callable[[int], object] = lambda rank: None, step: int = 2) -> Started:
        runs.append(faults.start(run, tmp_path / f"run{len(runs)}", more, before))
        if not step:  # it is waited for from its start
            runs[-1].limit = faults.START
        else:
            assert faults.wait_for_step(runs[-1], step), runs[-1].log.read_text()
        return runs[-1]

    yield start
    for run in runs:
        run.kill()


def stopped(run: Started, *codes: int) -> str:
    """What a run has printed, after it has ended in time with one of these exit codes on every rank."""
    seconds = faults.seconds_to_end(run, run.limit)
    text = run.log.read_text()
    assert seconds is not None, f"a process still runs after {run.limit} s: {text}"
    assert set(run.codes.values()) <= set(codes), (run.codes, text)
    return text


def is_saved(run: Started) -> int:
    """The last step, which is the one that was logged last, and is whole."""
    step = faults.saved_step(run.folder, run.run.stage)
    assert step == max(run.losses) and step >= 2, run.log.read_text()
    assert checkpoint._broken(run.folder / run.run.stage / "checkpoints" / f"step_{step}") is None
    return step


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name == "SIGTERM" else [pytest.mark.slow]) for name in faults.STOPS],
)
def test_a_signal_to_the_group_saves_the_step(begin: Callable[..., Started], name: str) -> None:
    """With loading processes in it, as a closed terminal and batch systems send it."""
    run = begin(Run(workers=2))
    number = getattr(signal, name)
    os.killpg(run.ranks[0], number)
    text = stopped(run, 128 + number)
    step = is_saved(run)
    assert f"phase2: stopped by {name}; step {step} is in " in text and "Traceback" not in text
    assert text.count("continue with: python train.py ") == 1 and "--resume_from_checkpoint latest" in text


def test_a_signal_to_one_of_two_ranks_saves_the_step_of_both(begin: Callable[..., Started]) -> None:
    run = begin(TWO)
    os.kill(run.ranks[1], signal.SIGUSR2)
    text = stopped(run, 128 + signal.SIGUSR2)
    assert f"stopped by SIGUSR2; step {is_saved(run)} is in " in text and "Traceback" not in text


@pytest.mark.slow
def test_under_nohup_a_closed_terminal_stops_nothing(begin: Callable[..., Started]) -> None:
    run = begin(Run(), before=lambda _: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    os.kill(run.ranks[0], signal.SIGHUP)
    at = max(run.losses)
    assert faults.wait_for_step(run, at + 2)
    os.kill(run.ranks[0], signal.SIGTERM)
    assert "SIGHUP" not in stopped(run, 128 + signal.SIGTERM)


def test_a_step_that_was_saved_already_is_named_too(begin: Callable[..., Started]) -> None:
    """Nothing said where it was, nor how to continue."""
    started = begin(Run(workers=1, save_every=1), step=3)
    os.kill(started.loaders(0)[0], signal.SIGKILL)
    text = stopped(started, 2)
    assert (
        f"the last complete step is in {started.folder}/phase2/checkpoints/step_{is_saved(started)}; continue" in text
    )


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGBUS, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "run", [Run(workers=2), pytest.param(Run(processes=2, workers=1), marks=pytest.mark.slow)], ids=["one", "two"]
)
def test_a_loading_process_that_dies(begin: Callable[..., Started], run: Run, number: signal.Signals) -> None:
    started = begin(run)
    os.kill(started.loaders(0)[0], number)
    text = stopped(started, 2)
    step, said = is_saved(started), {signal.SIGKILL: "was killed (SIGKILL)", signal.SIGBUS: "/dev/shm is full"}[number]
    assert f"train.py: error: --data.num_workers {run.workers}: " in text and said in text
    assert f"the last complete step is in {started.folder}/phase2/checkpoints/step_{step}; continue with" in text
    assert "Traceback" not in text


def test_an_error_of_our_own_saves_the_step_before_its_traceback(begin: Callable[..., Started]) -> None:
    def fail_at_step_4(_: int) -> None:
        from sapiens_accel.training import objectives

        known, calls = objectives.Supervised.loss, []

        def loss(*args: Any) -> Any:
            calls.append(1)
            if len(calls) == 4:
                raise ValueError("a bug")
            return known(*args)

        objectives.Supervised.loss = loss  # pyright: ignore[reportAttributeAccessIssue]

    run = begin(Run(workers=2), before=fail_at_step_4, step=0)
    faults.wait_for_step(run, 3)
    text = stopped(run, 1)
    assert is_saved(run) == 3
    assert "phase2: failed; the last complete step is in " in text and "ValueError: a bug" in text


def test_a_collapsed_state_replaces_no_checkpoint(begin: Callable[..., Started]) -> None:
    def collapse(_: int) -> None:
        from sapiens_accel.training.ssl_monitor import Alarms

        Alarms.unhealthy = property(lambda self: True)  # pyright: ignore[reportAttributeAccessIssue]

    run = begin(Run(), before=collapse)
    os.killpg(run.ranks[0], signal.SIGTERM)
    text = stopped(run, 128 + signal.SIGTERM)
    assert (
        "is not saved: the stage is unhealthy" in text
        and "the last good state is none: the initial weights are random" in text
    )
    assert faults.saved_step(run.folder, "phase2") == 0


def test_the_last_step_is_saved_before_its_evaluation(begin: Callable[..., Started]) -> None:
    """It takes minutes, and launchers kill what a signal does not end in 30 s."""

    def die(_: int) -> None:
        from sapiens_accel.training.logger import StageLogger

        StageLogger.evaluate = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # pyright: ignore[reportAttributeAccessIssue]

    run = begin(Run(), "--max_steps=3", before=die, step=0)
    stopped(run, -signal.SIGKILL)
    assert faults.saved_step(run.folder, "phase2") == 3


def evaluate_for_minutes(_: int, first: int = 0) -> None:
    """Let each batch of an evaluation take a second, and say so, after the `first` ones."""
    from sapiens_accel.evaluation import predict

    known, batches = predict._mean_maps, itertools.count()

    def slow(*args: Any) -> Any:
        if next(batches) >= first:
            print("evaluates", flush=True)
            time.sleep(1)
        return known(*args)

    predict._mean_maps = slow


LONG = ("--data.synthetic.num_val=80", "--eval.batch_size=1", "--eval.flip=false")


@pytest.mark.parametrize(
    ("run", "last"),
    [
        pytest.param(run, last, id=f"{run}, {'last' if last else 'between'}", marks=marks)
        for run, last, marks in (
            (Run(), False, ()),
            (Run(), True, ()),
            (Run(stage="ssl", processes=2, zero2=True), False, ()),
            (TWO, False, pytest.mark.slow),
            (TWO, True, pytest.mark.slow),
            (Run(stage="ssl"), False, pytest.mark.slow),
        )
    ],
)
def test_a_signal_during_an_evaluation_ends_it_and_saves_the_step(
    begin: Callable[..., Started], run: Run, last: bool
) -> None:
    """It went on for minutes, and launchers kill what a signal does not end in 30 s."""
    words = ("--max_steps=3",) if last else ("--eval_every=3", "--max_steps=6")
    evaluated = 3
    # Stage ssl also evaluates what it begins with: 80 people, one in a batch.
    slow = partial(evaluate_for_minutes, first=80 // run.processes if run.stage == "ssl" else 0)
    started = begin(run, *LONG, *words, before=slow, step=evaluated)
    wait_for_text(started, "evaluates")
    os.kill(started.ranks[-1], signal.SIGTERM)
    text = stopped(started, 128 + signal.SIGTERM)
    step = max(started.losses)
    assert step == evaluated and f"step {step} is in " in text and "Traceback" not in text
    assert [path.name for path in (started.folder / run.stage / "checkpoints").glob("step_*")] == [f"step_{step}"]
    assert not (started.folder / run.stage / "eval.json").exists()


def measure_for_minutes(_: int, after_steps: bool = False) -> None:
    """Let the metrics of each image take a second, and say so; `after_steps`: once a teacher has followed a step."""
    from pycocotools.cocoeval import COCOeval

    from sapiens_accel.training.mean_teacher import MeanTeacher

    known, follow, followed = COCOeval.evaluateImg, MeanTeacher.after_step, []

    def slow(*args: Any) -> Any:
        if followed or not after_steps:
            os.write(1, b"measures\n")  # what is printed meanwhile is not shown
            time.sleep(1)
        return known(*args)

    def after_step(teacher: MeanTeacher) -> None:
        followed.append(1)
        follow(teacher)

    COCOeval.evaluateImg = slow  # pyright: ignore[reportAttributeAccessIssue]
    MeanTeacher.after_step = after_step  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("run", "last"),
    [
        pytest.param(run, last, id=f"{run}, {'last' if last else 'between'}", marks=marks)
        for run, last, marks in ((Run(), True, ()), (TWO, False, ()), (Run(stage="ssl"), False, pytest.mark.slow))
    ],
)
def test_a_signal_while_metrics_are_computed_ends_that_and_saves_the_step(
    begin: Callable[..., Started], run: Run, last: bool
) -> None:
    """Rank 0 computed them to the end, 51 s for COCO-WholeBody; of two ranks the other one gets the signal."""
    words = ("--max_steps=3",) if last else ("--eval_every=3", "--max_steps=6")
    evaluated = 3
    words = ("--data.synthetic.num_val=80", "--eval.flip=false", *words)
    # Stage ssl measures before its first step too: that 80 people take 80 times a second there would show nothing.
    slow = partial(measure_for_minutes, after_steps=run.stage == "ssl")
    started = begin(run, *words, before=slow, step=evaluated)
    wait_for_text(started, "measures")
    os.kill(started.ranks[-1], signal.SIGTERM)
    text = stopped(started, 128 + signal.SIGTERM)
    assert max(started.losses) == faults.saved_step(started.folder, run.stage) == evaluated
    assert f"step {evaluated} is in " in text and "Traceback" not in text
    assert not (started.folder / run.stage / "eval.json").exists()


def wait_for_text(started: Started, text: str) -> None:
    deadline = time.monotonic() + faults.START
    while text not in started.log.read_text() and time.monotonic() < deadline and not started.ended():
        time.sleep(0.05)
    assert text in started.log.read_text(), started.log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("error", ["UserError", "ValueError"])
def test_an_error_of_rank_0_with_the_data_ends_the_others(begin: Callable[..., Started], error: str) -> None:
    """They waited for rank 0 to finish, for three hours."""

    def fail_on_rank_0(rank: int) -> None:
        from sapiens_accel.data import build
        from sapiens_accel.errors import UserError

        def open_people(*_: object, **__: object) -> None:
            raise UserError("person.json: broken") if error == "UserError" else ValueError("a bug")

        if rank == 0:
            build.open_people = open_people

    started = begin(TWO, before=fail_on_rank_0, step=0)
    text = stopped(started, 2, *([1] if error == "ValueError" else []))
    if error == "UserError":
        assert text.count("train.py: error: person.json: broken") == 2 and "Traceback" not in text
    else:
        assert text.count("Traceback") == 1
        assert "train.py: error: another process of this launch has failed: ValueError: a bug; see its output" in text


@pytest.mark.parametrize(
    "run",
    [Run(workers=2), pytest.param(Run(processes=2, workers=1), marks=pytest.mark.slow)],
    ids=["one", "two"],
)
def test_a_suspended_loading_process_is_not_waited_for_for_ever(begin: Callable[..., Started], run: Run) -> None:
    def be_impatient(_: int) -> None:
        from sapiens_accel.data import loader

        loader.CHECK_SECONDS, loader.PAUSED_SECONDS = 1, 3

    started = begin(run, before=be_impatient)
    os.kill(started.loaders(0)[0], signal.SIGSTOP)
    text = stopped(started, 2)
    assert (
        f"train.py: error: --data.num_workers {run.workers}: no batch for " in text and "is suspended (SIGSTOP" in text
    )
    assert f"the last complete step is in {started.folder}/phase2/checkpoints/step_{is_saved(started)}" in text


@pytest.mark.slow
def test_a_loading_process_that_is_suspended_for_a_while_loses_nothing(begin: Callable[..., Started]) -> None:
    def check_often(_: int) -> None:
        from sapiens_accel.data import loader

        loader.CHECK_SECONDS = 1

    run = begin(Run(workers=1), before=check_often)
    (worker,) = run.loaders(0)
    os.kill(worker, signal.SIGSTOP)
    time.sleep(3)
    at = max(run.losses)
    time.sleep(1)
    assert max(run.losses) == at, "nothing comes of it"
    os.kill(worker, signal.SIGCONT)
    assert faults.wait_for_step(run, at + 5)
    os.kill(run.ranks[0], signal.SIGTERM)
    stopped(run, 128 + signal.SIGTERM)
    assert sorted(run.losses) == list(range(1, is_saved(run) + 1))


@pytest.mark.slow
def test_a_job_that_is_suspended_as_a_whole_trains_on(begin: Callable[..., Started]) -> None:
    """As Ctrl-Z and `scontrol suspend` do, for longer than a single loading process may be suspended."""

    def be_impatient(_: int) -> None:
        from sapiens_accel.data import loader

        loader.CHECK_SECONDS, loader.PAUSED_SECONDS = 0.25, 4

    run = begin(Run(workers=1), before=be_impatient)
    (rank,), (worker,) = run.ranks, run.loaders(0)
    os.kill(worker, signal.SIGSTOP)
    time.sleep(1)  # the training waits for a batch now
    os.killpg(rank, signal.SIGSTOP)
    at = max(run.losses)
    time.sleep(5)
    os.kill(rank, signal.SIGCONT)  # one after the other, with looks at the loading process between
    time.sleep(1)
    os.kill(worker, signal.SIGCONT)
    assert faults.wait_for_step(run, at + 5), run.log.read_text()
    os.kill(rank, signal.SIGTERM)
    stopped(run, 128 + signal.SIGTERM)
    assert sorted(run.losses) == list(range(1, is_saved(run) + 1))


@pytest.mark.slow
def test_all_ranks_say_what_one_could_not_load(begin: Callable[..., Started]) -> None:
    def fail_on_rank_1(rank: int) -> None:
        from sapiens_accel.data import loader
        from sapiens_accel.errors import UserError

        def to_device(*_: object) -> None:
            raise UserError("image.png: is damaged")

        if rank == 1:
            loader.to_device = to_device

    run = begin(TWO, before=fail_on_rank_1, step=0)
    assert stopped(run, 2).count("error: image.png: is damaged") == 2


def fail_at_call_3(owner: str, name: str, error: Exception) -> Callable[[int], None]:
    """Lets a method of a class ("module:Class") raise after its third call has done its work."""

    def before(_: int) -> None:
        known, calls = getattr(pkgutil.resolve_name(owner), name), []

        def call(*args: object) -> object:
            calls.append(1)
            result = known(*args)
            if len(calls) == 3:
                raise error
            return result

        setattr(pkgutil.resolve_name(owner), name, call)

    return before


OUT_OF_MEMORY = RuntimeError("CUDA out of memory")


@pytest.mark.parametrize(
    "error",
    [ValueError("half of it"), pytest.param(OUT_OF_MEMORY, marks=pytest.mark.slow)],
    ids=["bug", "memory"],
)
@pytest.mark.parametrize(
    ("run", "owner", "name"),
    [
        (Run(), "torch.optim:AdamW", "step"),
        (Run(zero2=True), "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer", "step"),
        (Run(stage="ssl"), "sapiens_accel.training.mean_teacher:MeanTeacher", "after_step"),
    ],
    ids=["plain", "zero2", "teacher"],
)
def test_weights_that_are_of_no_whole_step_are_not_saved(
    begin: Callable[..., Started], run: Run, owner: str, name: str, error: Exception
) -> None:
    """An error between the parameters of an optimizer step, or before the teacher has followed."""
    started = begin(run, before=fail_at_call_3(owner, name, error), step=0)
    text = stopped(started, 2 if error is OUT_OF_MEMORY else 1)
    assert str(error) in text and max(started.losses) == 2, text
    assert faults.saved_step(started.folder, run.stage) == 0


def test_a_killed_rank_ends_the_other(begin: Callable[..., Started]) -> None:
    run = begin(TWO, "--save_every=2", step=3)
    os.kill(run.ranks[1], signal.SIGKILL)
    text = stopped(run, 2, -signal.SIGKILL)
    assert "another process of this launch has ended" in text and "Traceback" not in text
    assert faults.saved_step(run.folder, "phase2") >= 2


@pytest.mark.slow
def test_a_loading_process_that_does_not_end_holds_nothing_up(begin: Callable[..., Started]) -> None:
    """It ignored SIGTERM, and the end of the run waited for it for ever: with a small /dev/shm, say."""
    run = begin(Run(workers=2))
    os.kill(run.ranks[0], signal.SIGTERM)
    os.kill(run.loaders(0)[1], signal.SIGSTOP)
    stopped(run, 128 + signal.SIGTERM)
    is_saved(run)


@pytest.mark.slow
def test_loading_processes_end_with_a_killed_run(begin: Callable[..., Started]) -> None:
    run = begin(Run(workers=2))
    os.kill(run.ranks[0], signal.SIGKILL)
    time.sleep(0.2)
    stopped(run, -signal.SIGKILL)


# ---- Disks

# Path in a run directory to what a fault there is said to cost; every writer stands here.
WRITERS = {
    "metrics.jsonl": r"/metrics\.jsonl",
    "TensorBoard": "/tensorboard/",
    "images": "/pictures/",
    "checkpoints": "/checkpoints/",
    "weights": "/phase2/weights/",
    "eval.json": r"/phase2/eval\.json",
    "the rest of a stage": r"/phase2/(kept|score)\.json",
}
# Those without which a run does not end with exit code 0, and what the error names.
NEEDED = {"weights": "", "checkpoints": "phase2/checkpoints/step_4 (see", "eval.json": "phase2/eval.json (see"}


@pytest.mark.parametrize(
    ("writer", "kind", "run"),
    [
        pytest.param(
            writer,
            kind,
            run,
            marks=[pytest.mark.slow] if (kind, run) != (ENOSPC, Run()) or writer not in NEEDED else [],
        )
        for writer in WRITERS
        for kind in (ENOSPC, EROFS, EIO)
        for run in (Run(), TWO)
        if (kind == ENOSPC and run is not TWO) or writer in ("metrics.jsonl", "checkpoints", "weights")
    ],
)
def test_a_disk_fault_loses_no_run(begin: Callable[..., Started], writer: str, kind: int, run: Run) -> None:
    """Training goes to its end; the exit code says whether weights, metrics and the last step were written."""
    words = ("--max_steps=4", "--eval_every=2", "--save_every=2")
    started = begin(run, *words, before=lambda _: faults.fail_writes(kind, Path("/tmp"), WRITERS[writer]), step=0)
    text = stopped(started, 2 if writer in NEEDED else 0)
    assert "Traceback" not in text
    assert sorted(started.losses) == ([] if writer == "metrics.jsonl" else [1, 2, 3, 4])
    assert os.strerror(kind) in text
    if writer == "weights":
        assert "phase2/weights could not be written: " in text and "--resume_from_checkpoint latest" in text
        assert faults.saved_step(started.folder, "phase2") == 4
    else:
        assert "warning: " in text and (started.folder / "phase2" / "weights" / "model.safetensors").is_file()
        said = f"train.py: error: {started.folder}: all steps are trained and the weights are written, but not "
        assert text.count(said + NEEDED.get(writer, "")) == (run.processes if writer in NEEDED else 0)
        assert faults.saved_step(started.folder, "phase2") == (0 if writer == "checkpoints" else 4)


def test_what_rank_0_alone_cannot_write_of_a_zero_checkpoint_hangs_no_other(begin: Callable[..., Started]) -> None:
    """A full disk met DeepSpeed's copy of a script, on rank 0: it left the save, and the others waited in it."""

    def fail(_: int) -> None:
        faults.fail_writes(ENOSPC, Path("/tmp"), "/state/(zero_to_|latest)")

    started = begin(Run(processes=2, zero2=True), "--max_steps=4", "--save_every=2", before=fail, step=0)
    text = stopped(started, 2)
    assert text.count("step 4 could not be saved") == 2 and "but not phase2/checkpoints/step_4 (see" in text
    assert (started.folder / "phase2" / "weights" / "model.safetensors").is_file() and "Traceback" not in text


@pytest.mark.parametrize(
    "run",
    [
        Run(),
        Run(stage="ssl"),
        Run(zero2=True),
        pytest.param(Run(stage="ssl", processes=2, zero2=True), marks=pytest.mark.slow),
        pytest.param(Run(words=("--phase2.frozen=[embeddings]",)), marks=pytest.mark.slow),
    ],
    ids=["plain", "ssl", "zero2", "ssl zero2", "frozen"],
)
def test_the_first_checkpoint_has_the_size_that_was_estimated(begin: Callable[..., Started], run: Run) -> None:
    """And where the disk has less, a line says so before the first step."""

    def fill_the_disk(_: int) -> None:
        known = shutil.disk_usage

        def usage(path: object) -> tuple[int, int, int]:
            is_asked = sys._getframe(1).f_code.co_name == "warn_of_little_room"
            return known("/")._replace(free=0) if is_asked else known("/")

        shutil.disk_usage = usage  # pyright: ignore[reportAttributeAccessIssue]
        checkpoint.GIB = 1

    started = begin(run, "--max_steps=1", before=fill_the_disk, step=0)
    text = stopped(started, 0)
    pattern = (
        r"first checkpoint \(expected about (\d+)\.00 GiB(?:, and (\d+)\.00 GiB for the initial weights)?, found 0\."
    )
    said = re.search(pattern, text)
    assert said, text
    files = checkpoint.read_position(started.folder / run.stage / "checkpoints" / "step_1").files
    assert float(said[1]) == pytest.approx(sum(size for size, _ in files.values()), rel=0.03)
    exported = [started.folder / run.stage / name / "model.safetensors" for name in ("weights", "student")]
    size = sum(file.stat().st_size for file in exported if file.is_file())
    assert float(said[2] or 0) == pytest.approx(size if run.stage == "ssl" else 0, rel=0.03)


@pytest.mark.slow
def test_a_copied_run_directory_goes_on_saving_and_pruning(begin: Callable[..., Started], tmp_path: Path) -> None:
    """Links followed, as `cp -rL`, drives and zip do: `latest` and `best` are folders then."""
    words = ("--save_every=1", "--eval_every=2", "--keep_checkpoints=1")
    stopped(begin(Run(), *words, "--max_steps=4", step=0), 0)
    shutil.copytree(tmp_path / "run0", tmp_path / "run1")
    checkpoints = tmp_path / "run1" / "phase2" / "checkpoints"
    assert (checkpoints / "latest").is_dir() and not (checkpoints / "latest").is_symlink()
    text = stopped(begin(Run(), *words, "--max_steps=8", "--resume_from_checkpoint=latest", step=0), 0)
    assert "warning" not in text.split("phase2: ")[1] and sorted(faults.losses_of(tmp_path / "run1")) == list(
        range(1, 9)
    )
    assert (checkpoints / "latest").resolve().name == "step_8"
    assert len(checkpoint.list_checkpoints(checkpoints)) <= 2


def test_a_disk_without_links(begin: Callable[..., Started]) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(EPERM, "Operation not permitted")

    def no_links(_: int) -> None:
        os.symlink = os.link = refuse  # pyright: ignore[reportAttributeAccessIssue]

    words = ("--save_every=1", "--eval_every=2", "--keep_checkpoints=1")
    run = begin(Run(), *words, "--max_steps=4", before=no_links, step=0)
    text = stopped(run, 0)
    assert "could not" not in text and "Traceback" not in text
    assert faults.saved_step(run.folder, "phase2") == 4


def test_what_is_written_follows_the_umask(begin: Callable[..., Started]) -> None:
    run = begin(Run(), "--max_steps=2", "--save_every=1", before=lambda _: os.umask(0o002), step=0)
    stopped(run, 0)
    modes = {path.relative_to(run.folder): path.stat().st_mode & 0o777 for path in run.folder.rglob("*")}
    wrong = {str(path): oct(mode) for path, mode in modes.items() if mode not in (0o664, 0o775, 0o777)}
    assert not wrong


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--output_dir={file}"], "--output_dir {file}: no file can be written there (expected a folder"),
        (["--output_dir={file}/run"], "--output_dir {file}/run: no file can be written there"),
        (["--output_dir=/proc/run"], "--output_dir /proc/run: no file can be written there"),
        (["--data.cache_dir={file}"], "--data.cache_dir {file}: no file can be written there"),
    ],
)
def test_a_folder_that_cannot_be_written_is_said_before_the_data_are_read(
    begin: Callable[..., Started], tmp_path: Path, words: list[str], said: str
) -> None:
    (tmp_path / "file").touch()
    text = stopped(begin(Run(), *(word.format(file=tmp_path / "file") for word in words), step=0), 2)
    assert said.format(file=tmp_path / "file") in text and "Traceback" not in text and "people:" not in text


def test_a_filled_cache_may_be_read_only(begin: Callable[..., Started]) -> None:
    words, cache = ("--max_steps=1",), Path(os.environ["SAPIENS_ACCEL_CACHE"])
    stopped(begin(Run(), *words, step=0), 0)
    stopped(begin(Run(), *words, before=lambda _: faults.fail_writes(EROFS, cache, "."), step=0), 0)


@pytest.mark.slow
def test_all_ranks_end_where_the_folder_of_one_cannot_be_written(begin: Callable[..., Started]) -> None:
    """It waited for hours on another machine."""

    def refuse(rank: int) -> None:
        if rank == 1:
            faults.fail_writes(EROFS, Path("/tmp"), r"/\.check")

    text = stopped(begin(TWO, before=refuse, step=0), 2)
    assert text.count("no file can be written there") == 2 and "people:" not in text


def test_a_user_without_a_home_reads_what_to_set(
    begin: Callable[..., Started], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`docker run --user 1234`: no HOME, and no entry in /etc/passwd."""

    def nobody(_: int) -> None:
        for name in ("HOME", "SAPIENS_ACCEL_CACHE"):
            os.environ.pop(name, None)
        import pwd

        def unknown(_: int) -> None:
            raise KeyError("uid not found")

        pwd.getpwuid = unknown  # pyright: ignore[reportAttributeAccessIssue]

    text = stopped(begin(Run(), before=nobody, step=0), 2)
    assert "this user has no home directory" in text and "--data.cache_dir" in text and "Traceback" not in text
