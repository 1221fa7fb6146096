"""Tiny training runs to be broken: by `accelerate launch`, or as forks of this process, which has everything imported.

One process, or two that talk over gloo, plain or with ZeRO-2. Each wait has a limit, so that a run that hangs is a
result.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from accelerate.state import AcceleratorState, GradientState

sys.path.insert(0, str(Path(__file__).parents[1]))

from sapiens_accel import train
from sapiens_accel.errors import run_main
from sapiens_accel.training import checkpoint

ROOT = Path(__file__).parents[1]
LIMIT = 30.0  # seconds from a fault to the end of the last process
START = 300.0  # seconds to the step after which the fault strikes
STOPS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2")
STAGES = ("phase2", "ssl")
WORDS = [
    "--data.synthetic.num_train=8", "--data.synthetic.num_unlabelled=8", "--data.synthetic.num_val=2",
    "--data.input_hw=[64,48]", "--log_every=1", "--ssl.teacher.on_alarm=warn", "--weights=random",
    *(f"--{stage}.{option}" for stage in STAGES
      for option in ("steps=2000", "global_batch=4", "optim.warmup_steps=2", "loss_weight=100")),
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

    def __str__(self) -> str:
        return f"{self.stage}, {self.processes} process{'es' * (self.processes > 1)}{', ZeRO-2' * self.zero2}"

    def arguments(self, folder: Path) -> list[str]:
        return [
            *WORDS, f"--stage={self.stage}", f"--data.num_workers={self.workers}", f"--save_every={self.save_every}",
            f"--output_dir={folder}", *self.words,
        ]  # fmt: skip

    def launcher(self, port: int) -> list[str]:
        """The command before train.py: a config that is shipped, in fp32, so that losses are comparable to the bit."""
        config = "zero2" if self.zero2 else "cpu" if self.processes == 1 else "multi_gpu"
        words = ["--config_file", f"accelerate_configs/{config}.yaml", "--mixed_precision=no"]
        if self.processes > 1 or self.zero2:
            words += [f"--num_processes={self.processes}", f"--main_process_port={port}"]
        return [sys.executable, "-m", "accelerate.commands.launch", *words]


@dataclass(kw_only=True)
class Started:
    """A run that is under way; what it prints is in `log`.

    Attributes:
        children: the processes that this one has started: the ranks, or their launcher.
        launched: whether that is a launcher.
        ranks: the training processes, by rank; of a launch known once a step is logged.
        codes: exit codes of the children that have ended.
        family: every process of the run that was seen.
        limit: seconds until its end, from the moment when it is waited for.
    """

    run: Run
    folder: Path
    log: Path
    launched: bool = False
    children: list[int] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)
    codes: dict[int, int] = field(default_factory=dict)
    family: set[int] = field(default_factory=set)
    limit: float = LIMIT

    @property
    def losses(self) -> dict[int, float]:
        return losses_of(self.folder)

    def loaders(self, rank: int) -> list[int]:
        return [child.pid for child in psutil.Process(self.ranks[rank]).children(recursive=True)]

    def note_family(self) -> None:
        for pid in (*self.children, *self.ranks):
            with suppress(psutil.Error):
                self.family |= {pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))}

    def note_ranks(self) -> None:
        """Of a launch: the children of the launcher that run train.py, by their rank."""
        if not self.launched:
            return
        found = {}
        with suppress(psutil.Error):
            for child in psutil.Process(self.children[0]).children():
                with suppress(psutil.Error):
                    if "train.py" in child.cmdline():
                        found[int(child.environ().get("RANK", "0"))] = child.pid
        self.ranks = [found[rank] for rank in sorted(found)]

    def ended(self) -> bool:
        for pid in self.children:
            if pid not in self.codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    self.codes[pid] = os.waitstatus_to_exitcode(status)
        return len(self.codes) == len(self.children)

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


def launch(run: Run, folder: Path, more: Sequence[str] = ()) -> Started:
    """Start a run by `accelerate launch`, in a session of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    started = Started(run=run, folder=folder, log=folder.with_name(f"{folder.name}.log"), launched=True)
    words = [*run.launcher(_free_port()), "train.py", *run.arguments(folder), *more]
    with started.log.open("a") as log:
        process = subprocess.Popen(
            words, cwd=ROOT, stdout=log, stderr=log, start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    process.returncode = 0  # `Started.ended` waits for it
    started.children.append(process.pid)
    return started


def start(
    run: Run, folder: Path, more: Sequence[str] = (), before: Callable[[int], object] = lambda rank: None
) -> Started:
    """Fork the processes of a run; `before` is called in each of them, with its rank."""
    folder.mkdir(parents=True, exist_ok=True)
    started = Started(run=run, folder=folder, log=folder.with_name(f"{folder.name}.log"))
    port = _free_port()
    for rank in range(run.processes):
        pid = os.fork()
        if not pid:
            _run_rank(run, rank, port, started.log, [*run.arguments(folder), *more], before)
        started.children.append(pid)
    started.ranks = started.children
    return started


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _run_rank(run: Run, rank: int, port: int, log: Path, words: list[str], before: Callable[[int], object]) -> None:
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
    """Do what the interpreter does at its end, in a fork, which must not return into its parent's code."""
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
    """Wait until a step is logged; returns whether that was so before the run ended and within `START` seconds."""
    deadline = time.monotonic() + START
    while time.monotonic() < deadline and not started.ended():
        if max(started.losses, default=0) >= step:
            started.note_ranks()
            started.note_family()
            return True
        time.sleep(0.05)
    return False


def seconds_to_end(started: Started, limit: float = LIMIT) -> float | None:
    """Seconds until the last process of a run has ended; None if one is still there after the limit (it is killed)."""
    began, noted = time.monotonic(), 0.0
    while time.monotonic() - began < limit:
        if started.ended() and not started.alive():
            return time.monotonic() - began
        if time.monotonic() - noted > 1:  # it takes milliseconds
            started.note_family()
            noted = time.monotonic()
        time.sleep(0.1)
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
