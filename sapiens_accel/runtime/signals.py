"""Signals that ask a run to stop (preemption, Ctrl-C, a closed terminal): recorded, so that the step can be saved."""

import ctypes
import os
import signal
import sys
import threading
import time
from types import FrameType

import psutil

from sapiens_accel.runtime import launch

# SIGHUP: the terminal or the ssh connection was closed. SIGUSR1, SIGUSR2: warnings of batch systems before the end.
NAMES = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2")
SIGNALS = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))  # Windows has two of them
# A launcher passes a signal, or another one, on to its processes: within these seconds it is the same request.
ECHO_SECONDS = 5.0
PR_SET_PDEATHSIG = 1  # prctl(2)
_entered: list["StopRequest"] = []


class EvaluationStopped(Exception):  # noqa: N818  (nothing went wrong)
    """A stop was asked for during an evaluation, on any rank."""


def is_stop_asked() -> bool:
    """Return whether a signal asked this process to stop, while a `StopRequest` is entered."""
    return any(request.asked for request in _entered)


class StopRequest:
    """Records the first signal of `SIGNALS` while entered; the same one again, seconds later, ends the process.

    Ignored signals stay ignored: SIGHUP under nohup, SIGINT of a background job.
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
        _entered.append(self)
        return self

    @property
    def asked(self) -> bool:
        return self.number != 0

    @property
    def launcher_is_gone(self) -> bool:
        """Whether the launcher of this machine, one of several, has ended: the other launchers would wait for it."""
        return int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1 and os.getppid() != self._parent

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]  (what signal() returned)
        self._before = {}
        _entered.remove(self)

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
    """Receive SIGTERM when the launcher ends (Linux): a launcher that is killed does not pass a signal on."""
    parent = psutil.Process().parent()
    try:
        launched = parent is not None and (launch.own_launch() or launch.is_launcher(parent.cmdline()))
    except psutil.Error:
        return
    if launched:
        _ask_for_signal(signal.SIGTERM)


def _ask_for_signal(number: int) -> None:
    """Receive this signal when the parent process ends; on Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


def leave_to_parent() -> None:
    """In a loading process, ignore signals to the process group, such as Ctrl-C, and end with the parent.

    The parent still needs images to finish its step.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    _ask_for_signal(signal.SIGKILL)
