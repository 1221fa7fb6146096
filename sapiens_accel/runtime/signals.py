"""A stop that is asked for from outside (preemption, Ctrl-C, a closed terminal): noted, so that the step is saved."""

import ctypes
import os
import signal
import sys
import threading
import time
from types import FrameType

import psutil

from sapiens_accel.runtime import launch

# SIGHUP: the terminal or the ssh connection was closed. SIGUSR1, SIGUSR2: what batch systems warn with before the end.
NAMES = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2")
SIGNALS = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))  # Windows has two of them
# A launcher that gets a signal passes it, or another one, on: that is one request, not a second one.
ECHO_SECONDS = 5.0
PR_SET_PDEATHSIG = 1  # prctl(2)


class StopRequest:
    """While entered, the first signal of `SIGNALS` is noted; the same one again, a while later, stops the process.

    A signal that is ignored stays ignored: SIGHUP under nohup, SIGINT of a background job.
    """

    def __init__(self) -> None:
        self.number = 0
        self._since = 0.0
        self._before: dict[int, object] = {}
        self._parent = os.getppid()

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():  # no other one may
            heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._note) for number in heard}
        return self

    @property
    def asked(self) -> bool:
        return self.number != 0

    @property
    def launcher_is_gone(self) -> bool:
        """Whether this process of several machines' lost its launcher: the others' launchers would wait for it."""
        return int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1 and os.getppid() != self._parent

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]  (what signal() returned)
        self._before = {}

    def _note(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if not self.number:
            self.number, self._since = number, now
            if os.environ.get("RANK", "0") == "0":  # not by print: it may be what was interrupted
                name = signal.Signals(number).name
                os.write(2, f"\n{name}: stopping after this step, and saving; again: stopping at once\n".encode())
        elif number == self.number and now - self._since > ECHO_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def follow_launcher() -> None:
    """Get a SIGTERM when the launcher ends (Linux): one that dies of a signal does not pass it on."""
    parent = psutil.Process().parent()
    try:
        launched = parent is not None and launch.is_launcher(parent.cmdline())
    except psutil.Error:
        return
    if launched:
        _ask_for_signal(signal.SIGTERM)


def _ask_for_signal(number: int) -> None:
    """Get this signal when the parent process ends; on Linux alone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


def leave_to_parent() -> None:
    """For loading processes: ignore what reaches the whole group, such as Ctrl-C, and end when the parent does.

    The step that is being finished needs its images.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    _ask_for_signal(signal.SIGKILL)
