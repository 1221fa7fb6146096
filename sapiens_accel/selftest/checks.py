"""Run checks as processes with a time limit, and report their rows as a table and as selftest.json.

python -m sapiens_accel.selftest.checks RESULT.json     describes this machine
"""

import datetime
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import psutil

from sapiens_accel.runtime.versions import package_version

REPOSITORY = Path(__file__).parents[2]  # the checkout with train.py, accelerate_configs/ and ds_configs/
DRIVER = Path("/proc/driver/nvidia/version")
PACKAGES = ("torch", "accelerate", "deepspeed", "transformers", "torchao")
MIN_TIME = 1 / 3  # of its limit: a check with less time left is skipped

Status = Literal["passed", "warning", "failed", "skipped"]
WORST_FIRST: tuple[Status, ...] = ("failed", "warning", "passed", "skipped")
Row = dict[str, Any]  # name, status, text, and numbers of the check


class Skipped(Exception):  # noqa: N818  (not an error)
    """A check cannot run on this machine. The text is the reason."""


class Result:
    """The rows of a check, written to a file after each row, so that a killed process loses none."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[Row] = []

    def add(self, row: Row) -> None:
        self.rows.append(row)
        print(f"{row['name']}: {row['status']}: {row['text']}", flush=True)
        _write_json(self.path, self.rows)

    @contextmanager
    def guard(self, name: str) -> Iterator[None]:
        """Turn an error of one probe into a row, so that the other probes still run."""
        try:
            yield
        except Skipped as reason:
            self.add({"name": name, "status": "skipped", "text": str(reason)})
        except Exception as error:  # any: code that was never run on this kind of GPU may raise anything
            import traceback

            traceback.print_exc()
            self.add({"name": name, "status": "failed", "text": one_line(error)})


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


# ---- One check


@dataclass(frozen=True, kw_only=True)
class Check:
    """Commands that run one after the other, and a function that reads their results.

    Attributes:
        name: shown in the table.
        group: selected by --only.
        commands: the commands; none if results of other checks are read.
        limit: seconds for all commands together.
        read: returns the rows from the check's folder; its exceptions become a row (`Result.guard`).
        needs: name of a check that must have passed.
        skip: reason why the check cannot run on this machine.
    """

    name: str
    group: str
    commands: Sequence[Sequence[str]]
    limit: float
    read: Callable[[Path], list[Row]]
    needs: str | None = None
    skip: str | None = None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The outcome of a check; `text` explains a status without rows."""

    name: str
    group: str
    status: Status
    seconds: float
    limit: float
    text: str
    rows: list[Row]


def folder_of(out: Path, name: str) -> Path:
    return out / re.sub(r"[^A-Za-z0-9_.+]+", "_", name)


def read_result(folder: Path) -> list[Row]:
    """The rows that a process wrote with `Result`."""
    return json.loads((folder / "result.json").read_text())


def run_check(check: Check, out: Path, seconds_left: float, before: Sequence[Outcome]) -> Outcome:
    """Run a check, or skip it: if it cannot run here, if a check that it needs has not passed, or for lack of time."""
    limit = min(check.limit, seconds_left)

    def outcome(status: Status, text: str, rows: Sequence[Row] = (), seconds: float = 0.0) -> Outcome:
        rows, name, group = list(rows), check.name, check.group
        return Outcome(
            name=name, group=group, status=status, seconds=round(seconds, 1), limit=limit, text=text, rows=rows
        )

    if check.skip:
        return outcome("skipped", check.skip)
    passed = {earlier.name for earlier in before if earlier.status in ("passed", "warning")}
    if check.needs and check.needs not in passed:
        return outcome("skipped", f"{check.needs} has not passed")
    if limit < MIN_TIME * check.limit:
        return outcome(
            "skipped", f"{max(seconds_left, 0):.0f} s left, it may take {check.limit:.0f} s; raise --minutes"
        )
    folder = folder_of(out, check.name)
    shutil.rmtree(folder, ignore_errors=True)  # left by an earlier selftest
    folder.mkdir(parents=True)
    since, failure = time.monotonic(), ""
    for index, command in enumerate(check.commands):
        log = folder / f"log_{index}.txt"
        code = run_process(command, log, limit - (time.monotonic() - since))
        if code is None:
            failure = f"stopped after its limit of {limit:.0f} s; see {log}"
        elif code:
            failure = f"{error_line(log)} (exit code {code}; see {log})"
        if failure:
            break
    seconds = time.monotonic() - since
    result = Result(folder / "read.json")
    if failure:
        rows = read_result(folder) if (folder / "result.json").is_file() else []
        return outcome("failed", failure, rows, seconds)
    with result.guard(check.name):
        result.rows = check.read(folder)
    worst: Any = min((row["status"] for row in result.rows), key=WORST_FIRST.index, default=WORST_FIRST[0])
    return outcome(worst, "" if result.rows else "the check wrote no result", result.rows, seconds)


def environment() -> dict[str, str]:
    """The environment of the processes: they import this package from any folder, and use no network."""
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    return {
        **os.environ,
        "PYTHONPATH": path,
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }


def run_process(command: Sequence[str], log: Path, limit: float) -> int | None:
    """Run a command with its output in a file, and return its exit code; None if it was killed at its time limit.

    All its descendants are killed when it ends.
    """
    with log.open("w") as file:
        file.write(f"$ {' '.join(command)}\n")
        file.flush()
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
            cwd=REPOSITORY, env=environment(), start_new_session=True,
        )  # fmt: skip
        family = psutil.Process(process.pid)
        descendants: set[psutil.Process] = set()
        deadline = time.monotonic() + limit
        try:
            while True:
                # Launchers start workers in new sessions, so a signal to the process group does not reach them.
                with _ignore_ended_processes():
                    descendants |= set(family.children(recursive=True))
                try:
                    return process.wait(min(0.25, max(deadline - time.monotonic(), 0)))
                except subprocess.TimeoutExpired:
                    if time.monotonic() >= deadline:
                        return None
        finally:
            kill(process, descendants)


def kill(process: subprocess.Popen, descendants: set[psutil.Process]) -> None:
    """Kill the process, its group and all remaining descendants, and wait for their end."""
    with _ignore_ended_processes():
        if process.poll() is None:
            descendants = descendants | set(psutil.Process(process.pid).children(recursive=True))
    with _ignore_ended_processes():
        os.killpg(process.pid, signal.SIGKILL)
    for descendant in descendants:
        with _ignore_ended_processes():
            descendant.kill()  # psutil checks that the id still means the same process
    process.wait()
    psutil.wait_procs(list(descendants), timeout=5)


@contextmanager
def _ignore_ended_processes() -> Iterator[None]:
    with suppress(ProcessLookupError, PermissionError, psutil.Error):
        yield


def error_line(log: Path) -> str:
    """The line of a log that explains a failure best: the last one that names an error."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    # The last error is the launcher's report about the worker, without the reason.
    errors = [
        line for line in lines[1:] if re.search(r"\b\w*(Error|error)\b: ", line) and "ChildFailedError" not in line
    ]
    return (errors or lines)[-1][:300]


# ---- The machine


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The machine. `gpu` is None without a GPU; `problem` is the reason if there is one that cannot be used."""

    gpu: str | None = None
    num_gpus: int = 0
    gpu_bytes: int = 0
    capability: tuple[int, int] | None = None
    driver: str | None = None
    problem: str | None = None
    has_repository: bool = True


def inspect_machine(out: Path) -> Machine:
    """Describe the machine in another process, since a CUDA context here would take memory from the checks."""
    log, result = out / "machine.txt", out / "machine.json"
    code = run_process([sys.executable, "-m", __name__, str(result)], log, 120)
    if code != 0:
        problem = "no answer in 120 s" if code is None else error_line(log)
        return Machine(driver=driver(), problem=problem, has_repository=has_repository())
    tree = json.loads(result.read_text())
    return Machine(**{**tree, "capability": tree["capability"] and tuple(tree["capability"])})


def describe_machine() -> Machine:
    """Describe this machine, and test its GPU by a small matrix product."""
    import torch

    known = {"driver": driver(), "has_repository": has_repository()}
    if not torch.cuda.is_available():
        problem = f"driver {known['driver']} is installed, but torch {torch.__version__} finds no GPU"
        return Machine(**known, problem=problem if known["driver"] else None)
    device = torch.cuda.get_device_properties(0)
    product = torch.ones(64, 64, device="cuda:0") @ torch.ones(64, 64, device="cuda:0")
    if float(product[0, 0]) != 64:
        raise RuntimeError(f"{device.name} computes wrong products (expected 64, found {float(product[0, 0])})")
    return Machine(
        **known,
        gpu=device.name,
        num_gpus=torch.cuda.device_count(),
        gpu_bytes=device.total_memory,
        capability=(device.major, device.minor),
    )


def driver() -> str | None:
    """Version of NVIDIA's driver, if there is one."""
    match = re.search(r"Kernel Module\D*([\d.]+)", DRIVER.read_text()) if DRIVER.is_file() else None
    return match[1] if match else None


def has_repository() -> bool:
    return all((REPOSITORY / name).exists() for name in ("train.py", "accelerate_configs", "ds_configs"))


def cpu_name() -> str:
    """The model name of the processor."""
    info = Path("/proc/cpuinfo")
    match = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.is_file() else None
    return match[1] if match else platform.processor() or platform.machine()


def versions(*packages: str) -> dict[str, str | None]:
    """Versions of installed packages; None for others."""
    return {name: package_version(name) for name in packages}


def commit() -> str | None:
    """The commit of the checkout, followed by "+" if files were changed."""
    command = ["git", "-C", str(REPOSITORY), "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def heading(machine: Machine) -> dict[str, Any]:
    """The head of selftest.json: date, versions, machine."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "versions": {"python": platform.python_version(), **versions(*PACKAGES)},
        "machine": asdict(machine),
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "host_bytes": psutil.virtual_memory().total,
    }


# ---- All checks


def run_checks(checks: Sequence[Check], out: Path, seconds: float, head: dict[str, Any]) -> list[Outcome]:
    """Run the checks in order within a time limit; selftest.json is written after each."""
    begun, outcomes = time.monotonic(), []
    for index, check in enumerate(checks, start=1):
        elapsed = time.monotonic() - begun
        print(f"[{elapsed:4.0f} s] {index}/{len(checks)} {check.name} ...", flush=True)
        outcomes.append(run_check(check, out, seconds - elapsed, outcomes))
        for line in _lines(outcomes[-1]):
            print(f"         {line}", flush=True)
        _write_json(out / "selftest.json", {**head, "checks": [asdict(outcome) for outcome in outcomes]})
    return outcomes


def table(outcomes: Sequence[Outcome]) -> str:
    """The outcomes and their rows as text."""
    lines = []
    for outcome in outcomes:
        lines.append(f"{outcome.status:8}{outcome.seconds:6.0f} s  {outcome.name}")
        lines += [f"{'':18}{line}" for line in _lines(outcome)]
    counts = {status: sum(outcome.status == status for outcome in outcomes) for status in WORST_FIRST}
    return "\n".join([*lines, ", ".join(f"{num} {status}" for status, num in counts.items() if num)])


def _lines(outcome: Outcome) -> list[str]:
    rows = [f"{row['status']}: {row['name']}: {row['text']}" for row in outcome.rows]
    return [*rows, f"{outcome.status}: {outcome.text}"] if outcome.text else rows


def _write_json(path: Path, tree: Any) -> None:
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(tree, indent=1))
    unfinished.replace(path)


if __name__ == "__main__":
    _write_json(Path(sys.argv[1]), asdict(describe_machine()))
