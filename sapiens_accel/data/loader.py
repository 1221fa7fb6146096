"""Samples to batches on the device: a batch is a function of (seed, stage, step).

order (seed, stage, step) -> keys of one global batch -> this rank's micro-batches -> workers: decode, crop, augment
"""

import atexit
import re
import shutil
import signal
import threading
import time
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeVar

import cv2
import psutil
import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from sapiens_accel.config import credentials
from sapiens_accel.data.dataset import Batch, Key, Labeled, Pair, TrainingPeople
from sapiens_accel.data.sampling import Share
from sapiens_accel.errors import UserError
from sapiens_accel.runtime import host, signals

SHARED = Path("/dev/shm")
CHECK_SECONDS = 5.0  # between two checks of the loading processes
PAUSED_SECONDS = 300.0  # without a batch, after which a loading process that was suspended counts as lost
Loaded = TypeVar("Loaded")


def batches(
    people: TrainingPeople, share: Share, steps: range, num_workers: int, device: torch.device
) -> Iterator[Batch]:
    """This rank's micro-batches of the steps, `share.accumulation` for each, on the device.

    Pinned memory and non-blocking copies on CUDA; workers stay alive between batches.
    """
    loader = DataLoader(
        people,
        batch_sampler=_Keys(people, share, steps),  # pyright: ignore[reportArgumentType]  (a sampler of keys, not of ints)
        collate_fn=collate,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        prefetch_factor=4 if num_workers else None,
        pin_memory=device.type == "cuda",
        worker_init_fn=begin_worker,
    )
    for batch in unwrap_errors(loader):
        yield to_device(batch, device)


def unwrap_errors(loader: Iterable[Loaded]) -> Iterator[Loaded]:
    """Yield a loader's batches; errors of its loading processes become one line, and none of them outlives this one.

    Raises:
        UserError: a loading process raised one, has died, or is suspended.
    """
    batches = iter(loader)
    workers: Sequence[BaseProcess] = getattr(batches, "_workers", ())
    if workers:
        LOADING.update(workers)
        # With pinned memory torch has just registered its own, which waits for each of them: this has to run before.
        atexit.unregister(kill_loading_processes)
        atexit.register(kill_loading_processes)
        if threading.current_thread() is threading.main_thread():
            # torch raises the death of a worker from a signal handler, at any moment: in the middle of an optimizer
            # step, say. Without it, the next batch that is waited for brings the same error, within 5 s.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    watch = _Watch(workers)
    try:
        with watch:
            yield from watch.batches(batches)
    except UserError as error:
        # torch gives an error of a loading process this process's traceback as its text. What follows the last name of
        # the error in it is the line itself, in which each end of a line was escaped when it was raised.
        _, name, line = error.original.rpartition(f"\n{type(error).__module__}.{type(error).__qualname__}: ")
        if not (workers and name):
            raise
        raise UserError(line.partition("\n")[0]) from None
    except (RuntimeError, OSError, EOFError) as error:
        if reason := watch.reason or _why_loading_failed(error, workers):
            raise UserError(f"--data.num_workers {len(workers)}: {reason}") from None
        raise


class _Watch:
    """Kills a loading process that is suspended (SIGSTOP) while the training waits for a batch for `PAUSED_SECONDS`.

    torch waits for it without a limit, even in a loader with a timeout: its process hands over a batch's shared memory.
    Checks are counted, not seconds: while the whole job is suspended (Ctrl-Z, `scontrol suspend`), there are none.

    Attributes:
        reason: why a process was killed, if one was.
    """

    def __init__(self, workers: Sequence[BaseProcess]) -> None:
        self.workers, self.reason, self._ended = workers, "", threading.Event()
        self._waits, self._awaited = False, 0  # whether a batch is waited for, and its number

    def __enter__(self) -> "_Watch":
        if self.workers:
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()

    def batches(self, batches: Iterator[Loaded]) -> Iterator[Loaded]:
        """The same batches; those that are waited for are numbered."""
        self._waits = True
        for batch in batches:
            self._waits = False
            self._awaited += 1
            yield batch
            self._waits = True

    def _watch(self) -> None:
        awaited, suspended = 0, Counter[int | None]()  # checks in a row that saw a process suspended, by its id
        while not self._ended.wait(CHECK_SECONDS):
            if not self._waits or self._awaited != awaited:
                awaited = self._awaited
                suspended.clear()
                continue
            for worker in self.workers:
                suspended[worker.pid] = suspended[worker.pid] + 1 if _is_suspended(worker.pid) else 0
                if (seconds := suspended[worker.pid] * CHECK_SECONDS) >= PAUSED_SECONDS:
                    self.reason = (
                        f"no batch for {seconds:.0f} s: loading process {worker.pid} is suspended (SIGSTOP, or a "
                        "debugger). Find out what suspends it, or use --data.num_workers 0"
                    )
                    worker.kill()


def _is_suspended(pid: int | None) -> bool:
    try:
        return psutil.Process(pid).status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
    except psutil.Error:
        return False


LOADING: weakref.WeakSet[BaseProcess] = weakref.WeakSet()


@atexit.register  # after multiprocessing has registered its own, which waits for them: so it runs before that
def kill_loading_processes() -> None:
    """End the loading processes: they ignore the SIGTERM with which multiprocessing would."""
    for worker in list(LOADING):
        with suppress(ValueError):  # closed
            worker.kill()


def _why_loading_failed(error: Exception, workers: Sequence[BaseProcess]) -> str | None:
    """What ended a loading process or its messages, and what to do; None for errors of other kinds."""
    text, deadline = str(error), time.monotonic() + 2
    # Its pipe is closed a moment before its exit code is known.
    while not (codes := {worker.exitcode for worker in workers if worker.exitcode}) and time.monotonic() < deadline:
        time.sleep(0.02)
    if -signal.SIGBUS in codes or "bus error" in text or re.search(r"shared memory|torch_\d+_\d+", text):
        free = f" ({shutil.disk_usage(SHARED).free / 2**20:.0f} MiB are free)" if SHARED.is_dir() else ""
        return (
            f"{SHARED} is full, through which loading processes hand over images{free}. Give the container more "
            "(docker run --shm-size 8g), or lower --data.num_workers; with 0 none is needed"
        )
    if "Too many open files" in text or "ancdata" in text:
        return "too many open files. Raise the limit (ulimit -n 65536), or lower --data.num_workers"
    if -signal.SIGKILL in codes:
        return (
            "a loading process was killed (SIGKILL), as Linux does where memory runs out (dmesg shows it). Lower "
            "--data.num_workers, or give this machine more memory"
        )
    if codes:
        names = [signal.Signals(-code).name if code < 0 else f"exit code {code}" for code in sorted(codes)]
        return f"a loading process has ended ({', '.join(names)}); its output is above"
    return None


class _Keys:
    """One list of keys for each micro-batch of this rank."""

    def __init__(self, people: TrainingPeople, share: Share, steps: range) -> None:
        self.people, self.share, self.steps = people, share, steps

    def __len__(self) -> int:
        return len(self.steps) * self.share.accumulation

    def __iter__(self) -> Iterator[list[Key]]:
        for step in self.steps:
            each = self.people.plan.num_unlabeled(self.share.micro_batch) if step < self.people.unlabeled_steps else 0
            for micro_step in range(self.share.accumulation):
                positions = self.share.positions(micro_step)
                first = positions.start // self.share.micro_batch * each
                pairs = range(first, first + each)
                yield [Key(step, p, False) for p in positions] + [Key(step, p, True) for p in pairs]


def collate(samples: Sequence[Labeled | Pair]) -> Batch:
    """Stack labeled people and pairs, each among themselves."""
    labeled = [sample for sample in samples if isinstance(sample, Labeled)]
    pairs = [sample for sample in samples if isinstance(sample, Pair)]
    return Batch(default_collate(labeled), default_collate(pairs) if pairs else None)


def to_device(tree: Any, device: torch.device) -> Any:
    """Any tree of NamedTuples and tensors on the device."""
    if isinstance(tree, Tensor):
        return tree.to(device, non_blocking=True)
    if isinstance(tree, tuple):
        return type(tree)(*(to_device(item, device) for item in tree))
    return tree


def _begin_worker(known: credentials.Known, _: int) -> None:
    """Start a worker with one decoding thread: the workers are the parallelism. Signals are the training's to hear."""
    credentials.known.update(known)
    cv2.setNumThreads(0)
    host.keep_freed_memory()
    signals.leave_to_parent()


# The dictionary itself: a worker that is no fork gets what it holds when the worker is started.
begin_worker = partial(_begin_worker, credentials.known)
