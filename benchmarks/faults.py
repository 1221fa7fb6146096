"""Faults in training runs, drawn by a seed: what each run leaves behind, as a table.

    python benchmarks/faults.py [--faults 60] [--seed 0] [--out benchmarks/results/faults.json]

Each run is a fork of this process, which has everything imported: one process, or two that talk over gloo, plain or by
ZeRO-2. A fault strikes after a random step. Counted are hangs (a process that is still there 30 s after the fault),
steps that are lost beyond the last save, and wrong records: a resumed run whose losses are not those of a run without
faults.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from errno import EIO, ENOSPC, EROFS
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import psutil
from accelerate.state import AcceleratorState, GradientState

import train
from sapiens_accel.errors import run_main
from sapiens_accel.training import checkpoint

ROOT = Path(__file__).parents[1]
LIMIT = 30.0  # seconds from a fault to the end of the last process
START = 240.0  # seconds to the step after which the fault strikes
STOPS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2")
ERRORS = {"full disk": ENOSPC, "read-only": EROFS, "broken disk": EIO}
STAGES = ("phase2", "ssl")
WORDS = [
    "--data.synthetic.num_train=8", "--data.synthetic.num_unlabelled=8", "--data.synthetic.num_val=2",
    "--data.input_hw=[64,48]", "--log_every=1", "--ssl.teacher.on_alarm=warn",
    *(f"--{stage}.{knob}" for stage in STAGES
      for knob in ("steps=2000", "global_batch=4", "optim.warmup_steps=2", "loss_weight=100")),
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run: its stage, processes, ZeRO-2 or not, loading processes, and when it saves by itself."""

    stage: str = "phase2"
    processes: int = 1
    zero2: bool = False
    workers: int = 0
    save_every: int = 100_000
    words: tuple[str, ...] = ()

    def arguments(self, folder: Path) -> list[str]:
        return [
            *WORDS, f"--stage={self.stage}", f"--data.num_workers={self.workers}", f"--save_every={self.save_every}",
            f"--output_dir={folder}", *self.words,
        ]  # fmt: skip


@dataclass(kw_only=True)
class Started:
    """Processes of a run that is under way, by rank; what they print is in `log`."""

    run: Run
    folder: Path
    log: Path
    ranks: list[int] = field(default_factory=list)
    codes: dict[int, int] = field(default_factory=dict)
    family: set[int] = field(default_factory=set)

    @property
    def losses(self) -> dict[int, float]:
        return losses_of(self.folder)

    def loaders(self, rank: int) -> list[int]:
        return [child.pid for child in psutil.Process(self.ranks[rank]).children(recursive=True)]

    def note_family(self) -> None:
        for pid in self.ranks:
            with suppress(psutil.Error):
                self.family |= {pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))}

    def ended(self) -> bool:
        for pid in self.ranks:
            if pid not in self.codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    self.codes[pid] = os.waitstatus_to_exitcode(status)
        return len(self.codes) == len(self.ranks)

    def alive(self) -> list[int]:
        self.ended()
        return [pid for pid in self.family if _is_alive(pid)]

    def kill(self) -> None:
        self.note_family()
        for pid in self.family:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        while not self.ended():
            time.sleep(0.05)


def _is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def losses_of(folder: Path) -> dict[int, float]:
    """Loss by step, of the lines of metrics.jsonl that are whole."""
    losses: dict[int, float] = {}
    with suppress(OSError):
        for line in (folder / "metrics.jsonl").read_text().splitlines():
            with suppress(ValueError):
                tree = json.loads(line)
                if "loss" in tree:
                    losses[tree["step"]] = tree["loss"]
    return losses


def saved_step(folder: Path, stage: str) -> int:
    """The step of the last whole checkpoint, 0 without one."""
    whole = checkpoint.list_checkpoints(folder / stage / "checkpoints")
    return checkpoint.step_of(whole[-1]) if whole else 0


def start(
    run: Run, folder: Path, more: Sequence[str] = (), before: Callable[[int], object] = lambda rank: None
) -> Started:
    """Fork the processes of a run; `before` is called in each of them, with its rank."""
    folder.mkdir(parents=True, exist_ok=True)
    started = Started(run=run, folder=folder, log=folder.with_name(f"{folder.name}.log"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for rank in range(run.processes):
        pid = os.fork()
        if not pid:
            _be_rank(run, rank, port, started.log, [*run.arguments(folder), *more], before)
        started.ranks.append(pid)
    return started


def _be_rank(run: Run, rank: int, port: int, log: Path, words: list[str], before: Callable[[int], object]) -> None:
    os.setpgid(0, 0)
    output = os.open(log, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    if run.processes > 1 or run.zero2:
        world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": run.processes, "LOCAL_WORLD_SIZE": run.processes}
        os.environ |= {name: str(value) for name, value in world.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if run.zero2:
        os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_CONFIG_DS_FIELDS": ""}
        os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(ROOT / "ds_configs" / "zero2.json")
    else:  # with ZeRO it is refused
        os.environ["ACCELERATE_USE_CPU"] = "true"
    os.environ |= {"ACCELERATE_MIXED_PRECISION": "no", "OMP_NUM_THREADS": "1"}
    sys.argv = ["train.py", *words]
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    for name in (*STOPS, "SIGCHLD"):
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    code = 0
    try:
        before(rank)
        run_main(train.main)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    _end_as_python(code)


def _end_as_python(code: int) -> None:
    """What the interpreter does at its end, for a fork: it must not return into its parent's code."""
    import atexit
    import threading

    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def wait_for_step(started: Started, step: int) -> bool:
    """Wait until a step is logged; whether that was so before the run ended."""
    deadline = time.monotonic() + START
    while time.monotonic() < deadline and not started.ended():
        if max(started.losses, default=0) >= step:
            started.note_family()
            return True
        time.sleep(0.02)
    return False


def seconds_to_end(started: Started, limit: float = LIMIT) -> float | None:
    """Seconds until the last process of a run has ended; None if one is still there after the limit (it is killed)."""
    began = time.monotonic()
    while time.monotonic() - began < limit:
        if started.ended() and not started.alive():
            return time.monotonic() - began
        started.note_family()
        time.sleep(0.05)
    started.kill()
    return None


def fail_writes(kind: int, folder: Path, pattern: str, *, after: float = 0.0) -> None:
    """Let every file below `folder` whose path matches `pattern` fail to be opened for writing, made or renamed.

    The errors of C++ and Rust writers, which Python does not see, are made where they are called.
    """
    import cv2
    import safetensors.torch
    import torch

    fails = re.compile(pattern)
    begins = time.monotonic() + after

    def refuse(path: object) -> None:
        if time.monotonic() < begins or not isinstance(path, str | bytes | os.PathLike):
            return
        text = os.fsdecode(path)
        if text.startswith(str(folder)) and fails.search(text):
            raise OSError(kind, os.strerror(kind), text)

    def hook(event: str, arguments: tuple) -> None:
        if event == "open" and arguments and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            refuse(arguments[0])
        elif event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            refuse(arguments[0])
            if event == "os.rename":
                refuse(arguments[1])

    sys.addaudithook(hook)

    def guard(known: Callable, place: int) -> Callable:
        def call(*arguments: object, **options: object) -> object:
            refuse(arguments[place])
            return known(*arguments, **options)

        return call

    cv2.imwrite = guard(cv2.imwrite, 0)
    torch.save = guard(torch.save, 1)
    for name, module in list(sys.modules.items()):
        if name.startswith(("sapiens_accel", "accelerate", "safetensors")) and hasattr(module, "save_file"):
            module.save_file = guard(safetensors.torch.save_file, 1)  # pyright: ignore[reportAttributeAccessIssue]


# ---- The campaign


@dataclass(kw_only=True)
class Outcome:
    """A fault, and what became of the run.

    Attributes:
        seconds: from the fault to the end of the last process; None for a hang.
        lost: steps that were logged and that the checkpoint lacks, beyond what the run could still save.
        wrong: what is wrong with the records, if anything.
    """

    fault: str
    run: Run
    step: int = 0
    codes: list[int] = field(default_factory=list)
    seconds: float | None = None
    saved: int = 0
    lost: int = 0
    wrong: str = ""


# After which faults the step that was under way can still be saved; after the others, what was saved before counts.
SAVING = (*STOPS, "killed launcher", "killed loader")
FAULTS = (*STOPS, "killed launcher", "killed loader", "killed rank", *ERRORS, "cut link", "torn file")
RUNS = [
    Run(stage=stage, processes=processes, zero2=zero2)
    for stage in STAGES
    for processes, zero2 in ((1, False), (2, False), (2, True))
]
SAVED_EVERY, LAST_STEP = 2, 12


def strike(fault: str, started: Started, draw: random.Random) -> None:
    """Let a fault happen to a run that is under way; faults of the disk are there from its start."""
    victim = draw.choice(started.ranks)
    if fault in STOPS:
        os.kill(victim, getattr(signal, fault))
    elif fault == "killed launcher":  # its processes hear of it as a SIGTERM each (`signals.follow_launcher`)
        for pid in started.ranks:
            os.kill(pid, signal.SIGTERM)
    elif fault == "killed loader":
        os.kill(draw.choice(started.loaders(started.ranks.index(victim))), signal.SIGKILL)
    else:  # the whole run at once where only one process would leave the others waiting
        for pid in started.ranks if fault != "killed rank" else [victim]:
            os.kill(pid, signal.SIGKILL)


def damage(fault: str, started: Started, draw: random.Random) -> None:
    """What a run finds when it is resumed: a link that leads nowhere, or a checkpoint with a torn file."""
    checkpoints = started.folder / started.run.stage / "checkpoints"
    if fault == "cut link":
        for name in ("latest", "best"):
            (checkpoints / name).unlink(missing_ok=True)
            (checkpoints / name).symlink_to("step_0")
    elif fault == "torn file" and (whole := checkpoint.list_checkpoints(checkpoints)):
        file = draw.choice(sorted(path for path in whole[-1].rglob("*") if path.is_file()))
        file.write_bytes(file.read_bytes()[:-1])


def try_fault(fault: str, run: Run, folder: Path, draw: random.Random, expected: dict[int, float]) -> Outcome:
    """Run, strike, resume to the last step, and compare with the losses of a run without faults."""
    workers = 1 if fault == "killed loader" else 0
    run = replace(run, workers=workers, save_every=SAVED_EVERY)
    outcome = Outcome(fault=fault, run=run, step=draw.randrange(3, 8))
    kind, pattern = ERRORS.get(fault), draw.choice((r"/checkpoints/", r"metrics\.jsonl", "/tensorboard/", "."))
    disk = (lambda _: fail_writes(kind, folder, pattern, after=draw.uniform(0, 4))) if kind else (lambda _: None)
    words = [f"--max_steps={LAST_STEP if kind else 2000}"]
    started = start(run, folder, words, disk)
    if not kind:
        if not wait_for_step(started, outcome.step):
            outcome.wrong = "it ended before the fault"
        time.sleep(draw.uniform(0, 0.3))
        if not started.ended():
            strike(fault, started, draw)
    outcome.seconds = seconds_to_end(started, START if kind else LIMIT)
    outcome.codes = [started.codes[pid] for pid in started.ranks]
    outcome.saved = saved_step(folder, run.stage)
    logged = max(started.losses, default=0)
    if not kind:
        outcome.lost = max(0, logged - outcome.saved - (0 if fault in SAVING else SAVED_EVERY))
    if "Traceback" in started.log.read_text():
        outcome.wrong = outcome.wrong or "a traceback"
    damage(fault, started, draw)
    again = start(run, folder, [f"--max_steps={LAST_STEP + 8}", "--resume_from_checkpoint=latest"])
    wait_for_step(again, LAST_STEP + 8)
    if seconds_to_end(again, START) is None or set(again.codes.values()) != {0}:
        outcome.wrong = outcome.wrong or f"resuming ended with {sorted(again.codes.values())}"
    # A disk fault may cost lines of metrics.jsonl: those that are there must be right.
    losses = again.losses
    if not kind and sorted(losses) != list(range(1, LAST_STEP + 9)):
        outcome.wrong = outcome.wrong or f"steps {sorted(losses)}"
    if different := [step for step, loss in losses.items() if loss != expected.get(step)]:
        outcome.wrong = outcome.wrong or f"other losses at steps {different}"
    return outcome


def main(words: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks/faults.py", allow_abbrev=False)
    parser.add_argument("--faults", type=int, default=60, help="how many (60)")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (0)")
    parser.add_argument("--minutes", type=float, default=20, help="none is begun after these (20)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/faults.json", help="the table to write")
    asked = parser.parse_args(words)
    draw, began, outcomes = random.Random(asked.seed), time.monotonic(), []
    faults, expected = [FAULTS[index % len(FAULTS)] for index in range(asked.faults)], {}
    draw.shuffle(faults)
    with tempfile.TemporaryDirectory(prefix="faults") as name:
        os.environ["SAPIENS_ACCEL_CACHE"] = str(Path(name, "cache"))
        for index, fault in enumerate(faults):
            run = draw.choice(RUNS)
            if time.monotonic() - began > 60 * asked.minutes:
                break
            if run not in expected:
                whole = start(run, Path(name, f"whole{len(expected)}"), [f"--max_steps={LAST_STEP + 8}"])
                seconds_to_end(whole, START)
                expected[run] = whole.losses
            outcome = try_fault(fault, run, Path(name, f"run{index}"), draw, expected[run])
            outcomes.append(outcome)
            where = f"{run.stage}, {run.processes} process(es){', ZeRO-2' * run.zero2}"
            ended = "HANGS" if outcome.seconds is None else f"{outcome.seconds:.1f} s"
            print(f"{fault:16}{where:32}{ended:>8}, lost {outcome.lost}, {outcome.wrong or 'right'}", flush=True)
            shutil.rmtree(Path(name, f"run{index}"), ignore_errors=True)
            _write(asked, outcomes, time.monotonic() - began)


def _write(asked: argparse.Namespace, outcomes: Sequence[Outcome], seconds: float) -> None:
    """The table so far."""
    table = {
        "seed": asked.seed,
        "faults": len(outcomes),
        "hangs": sum(one.seconds is None for one in outcomes),
        "lost_steps": sum(one.lost for one in outcomes),
        "wrong_records": sum(bool(one.wrong) for one in outcomes),
        "seconds": round(seconds),
        "limit_seconds": LIMIT,
        "outcomes": [asdict(one) for one in outcomes],
    }
    asked.out.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
