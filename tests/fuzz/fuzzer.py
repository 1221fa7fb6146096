"""Damaged files of every kind that is read: each is read, or refused in one line.

    python -m fuzz.fuzzer [--seconds 3600] [--mutants N] [--seed S] [--only TARGET] [--jobs 2] [--one NUMBER]
    (in tests/; pytest tests/fuzz --fuzz_seconds 3600 does the same)

Mutants are numbered; a number and a seed are a mutant, for ever. They are read in forks of one warm process, some in
each. A traceback, a signal, more than HANG seconds or more than MEMORY bytes is a failure.
"""

import argparse
import contextlib
import json
import os
import random
import resource
import selectors
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fuzz.targets import Target, all_targets
from sapiens_accel.errors import UserError

HANG, MEMORY = 30.0, 2 << 30
BATCH = 25
WHOLE = -1


@dataclass(frozen=True, order=True)
class Failure:
    """What a mutant did: `where` groups those of one cause."""

    target: str
    where: str
    number: int
    text: str


@dataclass
class Outcomes:
    """How many mutants of each target did what, and all that failed."""

    counts: dict[str, Counter[str]] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)

    def add(self, target: str, number: int, outcome: str, text: str) -> None:
        kind = outcome if outcome in ("works", "refused") else "failed"
        self.counts.setdefault(target, Counter())[kind] += 1
        if kind == "failed":
            self.failures.append(Failure(target, outcome, number, text))

    @property
    def total(self) -> int:
        return sum(sum(counts.values()) for counts in self.counts.values())

    def __str__(self) -> str:
        lines = [f"{'':36}{'works':>8}{'refused':>9}{'failed':>8}"]
        for name, counts in sorted(self.counts.items()):
            lines.append(f"{name:36}{counts['works']:8}{counts['refused']:9}{counts['failed']:8}")
        lines.append(f"{self.total} mutants, {len(self.failures)} failed")
        groups: dict[str, list[Failure]] = {}
        for failure in self.failures:
            groups.setdefault(failure.where, []).append(failure)
        for where, alike in sorted(groups.items()):
            first = {one.target: one.number for one in reversed(alike)}
            again = ", ".join(f"--only '{target}' --one {number}" for target, number in first.items())
            lines += ["", f"### {where}: {len(alike)} mutants ({again})", "", alike[0].text[-1500:]]
        return "\n".join(lines)


def mutant(target: Target, number: int, seed: int, folder: Path) -> Path:
    """Write a mutant's folder; returns the damaged file. The mutant WHOLE is the seed itself."""
    rng = random.Random(f"{seed}/{target.name}/{number}")
    shutil.copytree(target.seed, folder, symlinks=True)
    file = folder / rng.choice(list(target.files))
    if number != WHOLE:
        file.write_bytes(target.mutate(rng, file.read_bytes()))
    return file


def read(target: Target, folder: Path) -> tuple[str, str]:
    """What a reader makes of a mutant: works, refused, or the place of an exception; and the text."""
    started = time.monotonic()
    try:
        target.read(folder)
    except UserError as error:
        text = str(error)
        whole = text.strip() and "\n" not in text and "Traceback" not in text and len(text) < 5_000
        outcome = ("refused", text) if whole else ("no line", repr(text)[:3_000])
    except SystemExit as error:
        outcome = ("refused" if error.code else "works", str(error))
    except BaseException as error:
        frames = traceback.extract_tb(error.__traceback__)
        ours = [frame for frame in frames if "/sapiens_accel/" in frame.filename] or frames
        at = f"{ours[-1].filename.split('/sapiens_accel/')[-1]}:{ours[-1].name}"
        outcome = (f"{type(error).__name__} in {at}", "".join(traceback.format_exception(error))[-3_000:])
    else:
        outcome = ("works", "")
    return outcome if time.monotonic() - started < HANG else ("hang", outcome[1])


@dataclass
class Child:
    """A fork that reads some mutants, and tells of each through a pipe before and after."""

    pid: int
    pipe: int
    jobs: list[tuple[Target, int]]
    done: int = 0
    since: float = field(default_factory=time.monotonic)
    rest: bytes = b""


def start(jobs: list[tuple[Target, int]], seed: int, work: Path) -> Child:
    read_end, write_end = os.pipe()
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        os.close(write_end)
        return Child(pid, read_end, jobs)
    try:
        os.close(read_end)
        _quiet(work / f"stderr.{os.getpid()}")
        folder = work / f"child.{os.getpid()}"
        before = _resident()
        for index, (target, number) in enumerate(jobs):
            shutil.rmtree(folder, ignore_errors=True)
            # Readers cache by path: no two mutants have one.
            place = folder / str(index)
            folder.mkdir()
            mutant(target, number, seed, place)
            outcome, text = read(target, place)
            if number == WHOLE and outcome == "refused":
                outcome = "a whole file is refused"
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
            if grown > MEMORY:
                outcome, text = "memory", f"{grown / 2**30:.1f} GiB; {outcome}: {text}"
            os.write(write_end, json.dumps([outcome, text]).encode() + b"\n")
            if grown > MEMORY:
                break
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os._exit(0)


def _quiet(stderr: Path) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT), 2)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # What is not caught in time is refused by the kernel before it hurts the machine.
    limit = MEMORY * 2 + _data_size()
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def _data_size() -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmData"))


def _resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run(
    targets: Sequence[Target], work: Path, *, seed: int, num: int, seconds: float | None = None, jobs: int = 2
) -> Outcomes:
    """Read so many mutants of all targets together, or as many as a time allows.

    Args:
        num: all together; shared out by the targets' shares.
    """
    outcomes, queue = Outcomes(), _queue(targets, num, endless=seconds is not None)
    until = time.monotonic() + seconds if seconds is not None else None
    children: list[Child] = []
    with selectors.DefaultSelector() as selector:
        while True:
            while len(children) < jobs and (until is None or time.monotonic() < until):
                batch = next(queue, None)
                if batch is None:
                    break
                children.append(child := start(batch, seed, work))
                selector.register(child.pipe, selectors.EVENT_READ, child)
            if not children:
                return outcomes
            for key, _ in selector.select(timeout=1.0):
                child = key.data
                if _told(child, outcomes):
                    continue
                selector.unregister(child.pipe)
                children.remove(child)
                rest = _ended(child, outcomes, work)
                if rest:
                    children.append(again := start(rest, seed, work))
                    selector.register(again.pipe, selectors.EVENT_READ, again)
            for child in children:
                if time.monotonic() - child.since > HANG + 5:
                    os.kill(child.pid, signal.SIGKILL)


def _queue(targets: Sequence[Target], num: int, *, endless: bool) -> Iterator[list[tuple[Target, int]]]:
    """Batches of mutants of one target, all targets in turn."""
    whole = sum(target.share for target in targets)
    counts = [max(1, round(num * target.share / whole)) for target in targets]
    first = [0] * len(targets)
    # What cannot read a whole file finds no fault with a broken one.
    yield from ([(target, WHOLE)] for target in targets)
    while True:
        batches = []
        for index, target in enumerate(targets):
            numbers = range(first[index], first[index] + counts[index])
            first[index] += counts[index]
            batches += [[(target, n) for n in numbers[at : at + BATCH]] for at in range(0, len(numbers), BATCH)]
        yield from batches
        if not endless:
            return


def _told(child: Child, outcomes: Outcomes) -> bool:
    """Take down what a child says; False once it has ended."""
    data = os.read(child.pipe, 1 << 16)
    *lines, child.rest = (child.rest + data).split(b"\n")
    for line in lines:
        target, number = child.jobs[child.done]
        outcomes.add(target.name, number, *json.loads(line))
        child.done, child.since = child.done + 1, time.monotonic()
    return bool(data)


def _ended(child: Child, outcomes: Outcomes, work: Path) -> list[tuple[Target, int]]:
    """The mutants that a child has left; the one that it died of failed."""
    os.close(child.pipe)
    _, status = os.waitpid(child.pid, 0)
    stderr = work / f"stderr.{child.pid}"
    said = stderr.read_text(errors="replace")[-2_000:]
    stderr.unlink()
    shutil.rmtree(work / f"child.{child.pid}", ignore_errors=True)
    rest = child.jobs[child.done :]
    if not rest or not os.WIFSIGNALED(status):
        return rest
    target, number = rest[0]
    name = signal.Signals(os.WTERMSIG(status)).name
    hung = time.monotonic() - child.since > HANG
    outcomes.add(target.name, number, "hang" if hung else f"died of {name}", said)
    return rest[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--mutants", type=int, default=3_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="targets whose names begin so")
    parser.add_argument("--one", type=int, help="this mutant of --only, in this process, with its traceback")
    parser.add_argument("--jobs", type=int, default=2)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        with contextlib.redirect_stdout(sys.stderr):
            targets = [target for target in all_targets(work) if target.name.startswith(asked.only)]
        if asked.one is not None:
            file = mutant(targets[0], asked.one, asked.seed, work / "one")
            Path("mutant").write_bytes(file.read_bytes())
            print(f"{file.relative_to(work / 'one')}, kept as ./mutant: {file.read_bytes()[:500]!r}", flush=True)
            print(*read(targets[0], work / "one"), sep="\n")
            return
        began = time.monotonic()
        outcomes = run(targets, work, seed=asked.seed, num=asked.mutants, seconds=asked.seconds, jobs=asked.jobs)
        print(f"{outcomes}\nseed {asked.seed}, {time.monotonic() - began:.0f} s")
        sys.exit(bool(outcomes.failures))


if __name__ == "__main__":
    main()
