"""Programs of the checkout, run as `subprocess.run` would, in forks of one warm process.

Of the 6.4 CPU seconds of a run of two steps, 5.4 are imports. What a launcher does is not seen here: tests of launches
use subprocesses.
"""

import atexit
import contextlib
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Read when a library is loaded, so that a child cannot change them.
FIXED = ("OMP_", "HF_HOME", "HF_HUB_", "HF_ENDPOINT", "HF_DATASETS_", "PYTORCH_", "OPENCV_", "TORCH_EXTENSIONS_DIR")
SERVER = {"OMP_NUM_THREADS": "1"}
CONTEXT = multiprocessing.get_context("forkserver")


class Fork:
    """A running program: pid, poll, wait, returncode and communicate, as of subprocess.Popen; a session of its own."""

    def __init__(self, words: Sequence[str], cwd: Path, env: Mapping[str, str]) -> None:
        _start_server(env)
        self.args = list(words)
        self._outputs = [Path(tempfile.mkstemp(prefix="fork-")[1]) for _ in range(2)]
        self._process = CONTEXT.Process(target=_run, args=(self.args, str(cwd), dict(env), *map(str, self._outputs)))
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """To it and its children; nothing where it has ended."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def communicate(self, timeout: float) -> tuple[str, str]:
        """Wait for its end; stdout and stderr.

        Raises:
            TimeoutExpired: it has not ended in time; it is killed, with its children.
        """
        self._process.join(timeout)
        ended = self._process.exitcode is not None
        if not ended:
            self.send_signal(signal.SIGKILL)
            self._process.join()
        stdout, stderr = (path.read_text(errors="replace") for path in self._outputs)
        for path in self._outputs:
            path.unlink()
        if not ended:
            raise subprocess.TimeoutExpired(self.args, timeout, stdout, stderr)
        return stdout, stderr


def run(
    words: Sequence[object],
    *,
    cwd: Path = ROOT,
    env: Mapping[str, str] | None = None,
    processes: int = 1,
    grouped: bool = False,
    timeout: float = 600,
) -> subprocess.CompletedProcess[str]:
    """Run `python WORDS` (PROGRAM.py ..., -m MODULE ... or -c CODE ...), and return its exit code and output.

    Several processes, or one that is `grouped`, find each other as those of torchrun do; the exit code is then that of
    the first that failed, and the output theirs one after the other.
    """
    environment, command = dict(os.environ if env is None else env), [str(word) for word in words]
    if processes == 1 and not grouped:
        forks = [Fork(command, cwd, environment)]
    else:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1"}
        ranks = [{**shared, "MASTER_PORT": port, "RANK": rank, "LOCAL_RANK": rank} for rank in range(processes)]
        forks = [Fork(command, cwd, environment | {name: str(v) for name, v in rank.items()}) for rank in ranks]
    _end_together(forks)
    outputs = [fork.communicate(timeout) for fork in forks]
    failed = next((fork.returncode for fork in forks if fork.returncode), 0)
    stdout, stderr = ("".join(texts) for texts in zip(*outputs, strict=True))
    return subprocess.CompletedProcess(command, failed, stdout, stderr)


def _end_together(forks: Sequence[Fork]) -> None:
    """As a launcher does: where one process of several fails, the others are stopped."""
    while len(forks) > 1 and any(fork.poll() is None for fork in forks):
        if any(fork.poll() for fork in forks):
            for fork in forks:
                if fork.poll() is None:
                    fork.send_signal(signal.SIGTERM)
            return
        time.sleep(0.02)


def _start_server(env: Mapping[str, str]) -> None:
    """Load the libraries once, in a process of which the others are forks."""
    loaded_with = {**os.environ, **SERVER}
    fixed = {name for name in {*env, *loaded_with} if name.startswith(FIXED)}
    # Without OMP_NUM_THREADS it has the server's one thread all the same: nothing of what is tested depends on it.
    changed = {name for name in fixed if env.get(name, SERVER.get(name)) != loaded_with.get(name)}
    assert not changed, f"read when libraries are loaded, so launch a subprocess: {changed}"
    kept = {name: os.environ.get(name) for name in ("PYTHONPATH", *SERVER)}
    # Python 3.11's server does not take over sys.path.
    os.environ |= SERVER | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), kept["PYTHONPATH"] or ""])}
    try:
        CONTEXT.set_forkserver_preload(["warm"])
        forkserver.ensure_running()
    finally:
        for name, value in kept.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _run(words: list[str], cwd: str, env: dict[str, str], stdout: str, stderr: str) -> None:
    """In the child: become that program."""
    import warm  # noqa: F401  (the server does not say why it could not)

    multiprocessing.set_start_method(None, force=True)  # for its children the platform's, not this server's
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite that a shell runs behind `&` ignores it
    for number, path in ((1, stdout), (2, stderr)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    try:
        if words[0] == "-c":
            sys.argv = ["-c", *words[2:]]
            sys.path.insert(0, cwd)
            exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
        elif words[0] == "-m":
            sys.argv = words[1:]
            sys.path.insert(0, cwd)
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words
            sys.path.insert(0, str(Path(words[0]).resolve().parent))
            runpy.run_path(words[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
