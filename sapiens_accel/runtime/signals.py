"""A stop that is asked for from outside (pre-emption, Ctrl-C): it is noted, so that the step can end and be saved."""

import ctypes
import os
import signal
import sys
import threading
import time
from types import FrameType

import psutil

from sapiens_accel.runtime import launch

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# A launcher that gets a signal passes it, or another one, on: that is one request, not a second one.
ECHO_SECONDS = 2.0
PR_SET_PDEATHSIG = 1  # prctl(2)


class StopRequest:
    """While entered, the first SIGTERM or SIGINT is noted, and another one, not at once, stops the process as usual."""

    def __init__(self) -> None:
        self.name: str | None = None
        self._since = 0.0
        self._before: dict[int, object] = {}
        self._parent = os.getppid()

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():  # no other one may
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
            _hear_of_launcher()
        return self

    @property
    def asked(self) -> bool:
        return self.name is not None

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
        if self.name is None:
            self.name, self._since = signal.Signals(number).name, now
            if os.environ.get("RANK", "0") == "0":  # not by print: it may be what was interrupted
                os.write(2, f"\n{self.name}: stopping after this step, and saving; again: stopping at once\n".encode())
        elif now - self._since > ECHO_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def _hear_of_launcher() -> None:
    """A launcher of one process dies of a signal and tells nobody: let its end be a SIGTERM here (Linux)."""
    parent = psutil.Process().parent()
    if parent and launch.is_launcher(parent.cmdline()) and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def leave_to_parent() -> None:
    """For loading processes: Ctrl-C reaches the whole group, and the step that is being finished needs its images."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
