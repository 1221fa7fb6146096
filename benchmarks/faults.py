"""Faults in training runs: what each leaves behind, and whether the run that is resumed is the one without faults.

    python benchmarks/faults.py [--faults 60] [--seed 0] [--minutes 60] [--out benchmarks/results/faults_DATE.json]

A fault strikes a tiny run after a random step: signals and a killed launcher by `accelerate launch`, the others in
forks of this process (`fault_runs.py`). A full disk is one of a few MiB where this user may mount (root),
and otherwise, as a read-only or a broken one, errors of the calls that write. Then the run is resumed. Counted are
hangs (a process that is still there 30 s after the fault; 300 s after a disk fault, since the run may train to its
end), steps lost beyond the last save, and wrong records: losses other than those of a run without faults, other final
weights, missing or doubled steps, files that cannot be read, exit code 0 of a run whose last step is not saved, a
traceback of ours. Of a broken disk nothing can be expected to be saved: steps that were trained and not saved are
counted by themselves. Faults that the file has already are not run again, so that a campaign can be continued, on the
same commit; several processes share it by `--runs`, each with a file of its own, which `--join` puts together.
"""

import argparse
import datetime
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from errno import EIO, EROFS
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # as a launcher sets it: losses are compared by their bits
sys.path.insert(0, str(Path(__file__).parents[1]))  # not the package of another checkout that is installed

import record
import yaml
from fault_runs import (
    LIMIT,
    ROOT,
    START,
    STOPS,
    Run,
    Started,
    fail_writes,
    launch,
    saved_step,
    seconds_to_end,
    start,
    wait_for_step,
)
from safetensors import safe_open

from sapiens_accel.training import checkpoint

LAUNCHED = (*STOPS, "killed launcher")
# After these the step that was under way can still be saved; after the others, what was saved before counts.
SAVING = (*STOPS, "killed launcher", "killed loader")
ERRORS = {"read-only": EROFS, "broken disk": EIO}
DISKS = ("full disk", *ERRORS)
FAULTS = (*LAUNCHED, "killed loader", "killed rank", *DISKS, "cut link", "torn file")
RUNS = [
    Run(stage=stage, processes=processes, zero2=zero2, save_every=2)
    for stage in ("phase2", "ssl")
    for processes, zero2 in ((1, False), (2, False), (2, True))
]
LAST_STEP = 12  # of a run with a broken disk
OUR_TRACEBACK = re.compile(r'File "[^"]*(/train\.py|/sapiens_accel/[^"]*)", line')
DISK_MIB = 512


@dataclass(kw_only=True)
class Outcome:
    """A fault, and what became of the run.

    Attributes:
        index: its number in the campaign, which decides all that is drawn.
        target: what it struck.
        step: after this one.
        seconds: from the fault to the end of the last process; None for a hang.
        logged: the last step before it, or, after a fault of the disk, the last one of the run.
        saved: the step of the last whole checkpoint after it.
        lost: steps that were logged and that the checkpoint lacks, beyond what the run could still save; None after a
            fault of the disk.
        unsaved: after a fault of the disk, the steps that were trained and that the checkpoint lacks.
        resumed_to: the last step of the run that was resumed.
        weights_equal: whether the final weights are those of a run without faults, each tensor; None: not compared.
        wrong: what is wrong with the records, if anything.
    """

    index: int
    fault: str
    run: Run
    target: str = ""
    step: int = 0
    codes: list[int] = field(default_factory=list)
    seconds: float | None = None
    logged: int = 0
    saved: int = 0
    lost: int | None = 0
    unsaved: int = 0
    resumed_to: int = 0
    weights_equal: bool | None = None
    wrong: str = ""

    def note(self, problem: str) -> None:
        """Record the first thing that is wrong."""
        self.wrong = self.wrong or problem


def strike(fault: str, started: Started, draw: random.Random) -> str:
    """Let a fault happen to a run that is under way, and return what it struck."""
    rank = draw.randrange(len(started.ranks))
    if fault in STOPS:
        targets = {"launcher": started.children, f"rank {rank}": [started.ranks[rank]]}
        targets["every process"] = [*started.children, *started.ranks]
        name = draw.choice(sorted(targets))
        number, pids = getattr(signal, fault), targets[name]
    elif fault == "killed launcher":
        name, number, pids = "launcher", signal.SIGKILL, started.children
    elif fault == "killed rank":
        name, number, pids = f"rank {rank}", signal.SIGKILL, [started.ranks[rank]]
    elif fault == "killed loader":
        name, number, pids = f"a loader of rank {rank}", signal.SIGKILL, [draw.choice(started.loaders(rank))]
    else:  # the machine goes down
        name, number, pids = "every process", signal.SIGKILL, started.ranks
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)
    return name


def damage(fault: str, started: Started, draw: random.Random) -> str:
    """Leave a link that leads nowhere, or a torn file in the last checkpoint; returns which."""
    checkpoints = started.folder / started.run.stage / "checkpoints"
    if fault == "cut link":
        for name in ("latest", "best"):
            (checkpoints / name).unlink(missing_ok=True)
            (checkpoints / name).symlink_to("step_0")
        return "latest and best"
    whole = checkpoint.list_checkpoints(checkpoints)
    if not whole:
        return "no checkpoint"
    file = draw.choice(sorted(path for path in whole[-1].rglob("*") if path.is_file() and path.stat().st_size))
    file.write_bytes(file.read_bytes()[:-1])
    return str(file.relative_to(started.folder))


@contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """Mount a disk of a few MiB on a folder while entered; gives whether that is possible."""
    folder.mkdir()
    size = f"size={DISK_MIB}m"
    mounted = not subprocess.run(
        ["mount", "-t", "tmpfs", "-o", size, "tmpfs", folder], check=False, capture_output=True
    ).returncode
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", folder], check=False)


def fill(disk: Path) -> Path:
    """Write a file until a disk is full; returns it."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(1 << 12)):
            pass
    return filler


def break_run(outcome: Outcome, folder: Path, draw: random.Random) -> Started:
    """Run, let the fault happen, and note how the run ended."""
    fault, run = outcome.fault, outcome.run
    kind, pattern = ERRORS.get(fault), draw.choice((r"/checkpoints/", r"metrics\.jsonl", "/tensorboard/", "."))
    words = [f"--max_steps={LAST_STEP if fault in DISKS else 2000}"]
    if fault in LAUNCHED:
        started = launch(run, folder, words)
    elif kind:
        outcome.target, after = f"writes of {pattern}", draw.uniform(0, 4)
        started = start(run, folder, words, lambda _: fail_writes(kind, folder, pattern, after=after))
    else:
        started = start(run, folder, words)
    if not kind:
        if not wait_for_step(started, outcome.step):
            outcome.note("it ended before the fault")
        if fault != "full disk":  # of its few steps none may be missed
            time.sleep(draw.uniform(0, 0.5))
        if not started.ended():
            if fault == "full disk":
                outcome.target = fill(folder.parent).name
            else:
                outcome.target = strike(fault, started, draw)
    outcome.seconds = seconds_to_end(started, START if fault in DISKS else LIMIT)
    (folder.parent / "filler").unlink(missing_ok=True)
    outcome.codes = [started.codes[pid] for pid in started.children]
    outcome.saved, outcome.logged = saved_step(folder, run.stage), max(started.losses, default=0)
    if fault in DISKS:  # which may have metrics.jsonl on it
        said = re.findall(r": step (\d+) of \d+, ", started.log.read_text())
        outcome.logged = max(outcome.logged, *map(int, said), 0)
    return started


def missing_steps(row: dict) -> tuple[int | None, int]:
    """`lost` and `unsaved` of a row of the table."""
    missing = max(0, row["logged"] - row["saved"])
    if row["fault"] in DISKS:
        return None, missing
    return max(0, missing - (0 if row["fault"] in SAVING else row["run"]["save_every"])), 0


def check_end(outcome: Outcome, log: str) -> None:
    """Note lost steps, and what is wrong with the way in which a run has ended."""
    if OUR_TRACEBACK.search(log):
        outcome.note("a traceback of ours")
    outcome.lost, outcome.unsaved = missing_steps(asdict(outcome))
    if outcome.fault in DISKS:
        if not set(outcome.codes) <= {0, 2}:
            outcome.note(f"exit codes {outcome.codes}")
        if outcome.unsaved and 0 in outcome.codes:
            outcome.note(f"exit codes {outcome.codes} although {outcome.unsaved} steps are not saved")
        return
    if 0 in outcome.codes:
        outcome.note(f"exit codes {outcome.codes}")
    if outcome.fault in SAVING and "--resume_from_checkpoint latest" not in log:
        outcome.note("no line says how to continue")


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What a run without faults gives.

    Attributes:
        losses: by step.
        weights: a digest of each exported tensor after the last step.
    """

    losses: dict[int, float]
    weights: dict[str, str]


def digest_weights(file: Path) -> dict[str, str]:
    """A digest of each tensor by its name."""
    with safe_open(file, "np") as weights:
        tensors = {name: weights.get_tensor(name) for name in weights.keys()}  # noqa: SIM118  (no dictionary)
    return {
        name: hashlib.sha256(f"{one.dtype} {one.shape}".encode() + one.tobytes()).hexdigest()
        for name, one in tensors.items()
    }


def check_records(outcome: Outcome, folder: Path, expected: Expected) -> None:
    """Note what is wrong with the files of a run that was resumed and went to its end."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    steps, last = [step for step, _ in losses], outcome.resumed_to
    # A disk fault may cost lines: those that are there must be right.
    if steps != sorted(set(steps)) or (outcome.fault not in DISKS and steps != list(range(1, last + 1))):
        outcome.note(f"steps {steps}")
    if different := [step for step, loss in losses if loss != expected.losses[step]]:
        outcome.note(f"other losses at steps {different}")
    stage = folder / outcome.run.stage
    metrics = json.loads((stage / "eval.json").read_text())
    if metrics["step"] != last or saved_step(folder, outcome.run.stage) != last:
        outcome.note(f"eval.json of step {metrics['step']}, checkpoint {saved_step(folder, outcome.run.stage)}")
    for whole in checkpoint.list_checkpoints(stage / "checkpoints"):
        if broken := checkpoint._broken(whole):
            outcome.note(f"{whole.name}: {broken}")
    weights = digest_weights(stage / "weights" / "model.safetensors")
    other = sorted(dict(weights.items() ^ expected.weights.items()))
    outcome.weights_equal = not other
    if other:
        outcome.note(f"other final weights: {len(other)} tensors, the first is {other[0]}")
    yaml.safe_load((folder / "config.yaml").read_text())
    if left := [path.name for path in folder.rglob("*") if path.name == "run.lock" or path.suffix == ".tmp"]:
        outcome.note(f"left behind: {left}")


def try_fault(outcome: Outcome, folder: Path, draw: random.Random, expected: Callable[[int], Expected]) -> None:
    """Run, strike, resume, and compare with the losses and the final weights of a run without faults."""
    if outcome.fault == "killed loader":
        outcome.run = replace(outcome.run, workers=1)
    outcome.step = draw.randrange(3, 8)
    started = break_run(outcome, folder, draw)
    if outcome.seconds is None:
        return
    check_end(outcome, started.log.read_text())
    if outcome.fault in ("cut link", "torn file"):
        outcome.target = damage(outcome.fault, started, draw)
    outcome.resumed_to = max(LAST_STEP, outcome.logged) + 8
    more = [f"--max_steps={outcome.resumed_to}", "--resume_from_checkpoint=latest"]
    again = start(outcome.run, folder, more)
    if seconds_to_end(again, START) is None or set(again.codes.values()) != {0}:
        outcome.note(f"resuming ended with {sorted(again.codes.values())}")
        return
    try:
        check_records(outcome, folder, expected(outcome.resumed_to))
    except Exception as error:  # whatever a wrong file makes of its reader
        outcome.note(f"{type(error).__name__}: {error}")


class Campaign:
    """The faults of a seed, and what became of those that were tried."""

    def __init__(self, seed: int, count: int, out: Path, scratch: Path) -> None:
        self.seed, self.out, self.scratch = seed, out, scratch
        # Each kind meets run after run.
        kinds = [
            (FAULTS[i % len(FAULTS)], RUNS[(i // len(FAULTS) + i % len(FAULTS)) % len(RUNS)]) for i in range(count)
        ]
        self.outcomes = [Outcome(index=index, fault=fault, run=run) for index, (fault, run) in enumerate(kinds)]
        self.tree = json.loads(out.read_text()) if out.is_file() else {}
        self.rows: list[dict] = [] if self.tree.get("seed") != seed else self.tree["outcomes"]
        self.commit = _commit()
        if others := {row["commit"] for row in self.rows} - {self.commit}:
            raise SystemExit(
                f"{out}: has rows of commit {', '.join(others)}, and this is {self.commit}: give another --out"
            )
        self.seconds = self.tree.get("seconds", 0) if self.rows else 0
        self.expected: dict[tuple[Run, int], Expected] = {}

    def left(self) -> list[Outcome]:
        """Those that were not tried yet, in the order of a shuffled campaign."""
        tried = {row["index"] for row in self.rows}
        left = [outcome for outcome in self.outcomes if outcome.index not in tried]
        random.Random(self.seed).shuffle(left)
        return left

    def run_without_faults(self, run: Run, last: int) -> Expected:
        """Losses and final weights of a run of `last` steps, which is not struck; each kind is run once."""
        if (run, last) not in self.expected:
            folder = self.scratch / f"whole{len(self.expected)}"
            whole = start(run, folder, [f"--max_steps={last}", f"--save_every={last}"])
            seconds_to_end(whole, START)
            weights = digest_weights(folder / run.stage / "weights" / "model.safetensors")
            self.expected[run, last] = Expected(losses=whole.losses, weights=weights)
            shutil.rmtree(folder, ignore_errors=True)
        return self.expected[run, last]

    def try_one(self, outcome: Outcome) -> None:
        """Try a fault, print a line and write the table."""
        began, disk, run = time.monotonic(), self.scratch / f"disk{outcome.index}", outcome.run
        draw = random.Random(f"{self.seed} {outcome.index}")
        with small_disk(disk) if outcome.fault == "full disk" else _plain_folder(disk):
            try_fault(outcome, disk / "run", draw, partial(self.run_without_faults, run))
            if (outcome.seconds is None or outcome.wrong or outcome.lost) and (disk / "run.log").is_file():
                print((disk / "run.log").read_text()[-3000:], file=sys.stderr, flush=True)
        shutil.rmtree(disk, ignore_errors=True)
        ended = "HANGS" if outcome.seconds is None else f"{outcome.seconds:.1f} s"
        where = f"{outcome.index:>3} {outcome.fault:16}{outcome.run!s:30}{outcome.target:32}"
        print(
            f"{where}{ended:>8}, lost {outcome.lost}, unsaved {outcome.unsaved}, {outcome.wrong or 'right'}", flush=True
        )
        self.rows.append({**asdict(outcome), "launched": outcome.fault in LAUNCHED, "commit": self.commit})
        self.seconds += time.monotonic() - began
        self.write()

    def write(self) -> None:
        rows = sorted(self.rows, key=lambda row: row["index"])
        record.write(self.out, describe(self.seed, rows, self.seconds), outcomes=rows)


def describe(seed: int, rows: Sequence[dict], seconds: float) -> dict[str, Any]:
    """The heading of a table."""
    versions = record.versions("torch", "accelerate", "deepspeed", "transformers", "torchao")
    about = {"date": datetime.date.today().isoformat(), "seed": seed, **summarize(rows)}
    return {**about, "seconds": round(seconds), "cpus": os.cpu_count(), "versions": versions}


def summarize(rows: Sequence[dict]) -> dict[str, Any]:
    """What the table says of all of its rows."""
    disks = [row for row in rows if row["fault"] in DISKS]
    return {
        "faults": len(rows),
        "hangs": sum(row["seconds"] is None for row in rows),
        "limit_seconds": {"disk": START, "others": LIMIT},
        "lost_steps": sum(row["lost"] or 0 for row in rows),
        "lost_steps_of_faults": len(rows) - len(disks),
        "steps_not_saved_after_disk_faults": {
            "disk_faults": len(disks),
            "with_unsaved_steps": sum(row["unsaved"] > 0 for row in disks),
            "steps": sum(row["unsaved"] for row in disks),
            "most_of_one": max((row["unsaved"] for row in disks), default=0),
        },
        "wrong_records": sum(bool(row["wrong"]) for row in rows),
        "final_weights": {
            "equal": sum(row["weights_equal"] is True for row in rows),
            "other": sum(row["weights_equal"] is False for row in rows),
            "not_compared": sum(row["weights_equal"] is None for row in rows),
        },
        "commits": sorted({row["commit"] for row in rows}),
        "by_launch": sum(row["launched"] for row in rows),
        "by_kind": {fault: sum(row["fault"] == fault for row in rows) for fault in FAULTS},
    }


@contextmanager
def _plain_folder(folder: Path) -> Iterator[None]:
    folder.mkdir()
    yield


def _commit() -> str:
    """The commit of this checkout; one with changes has another name each time."""
    words = ["git", "describe", "--always", f"--dirty=-{time.time():.0f}"]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


def join(parts: Sequence[Path], out: Path) -> None:
    """Put the tables of processes that shared a campaign together."""
    trees = [json.loads(part.read_text()) for part in parts]
    rows = sorted((row for tree in trees for row in tree["outcomes"]), key=lambda row: row["index"])
    if len({row["index"] for row in rows}) < len(rows) or len({tree["seed"] for tree in trees}) > 1:
        raise SystemExit(f"{', '.join(map(str, parts))}: not the parts of one campaign")
    record.write(out, describe(trees[0]["seed"], rows, sum(tree["seconds"] for tree in trees)), outcomes=rows)


def main(words: Sequence[str]) -> None:
    out = ROOT / f"benchmarks/results/faults_{datetime.date.today().isoformat()}.json"
    parser = argparse.ArgumentParser(prog="benchmarks/faults.py", allow_abbrev=False)
    parser.add_argument("--faults", type=int, default=60, help="how many (60)")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (0)")
    parser.add_argument("--minutes", type=float, default=60, help="no fault is begun after these (60)")
    parser.add_argument("--only", type=int, nargs="*", help="the faults of these numbers, again")
    parser.add_argument(
        "--runs", type=int, nargs="*", default=range(len(RUNS)), help="those of these kinds of run (0-5)"
    )
    parser.add_argument("--out", type=Path, default=out, help=f"the table to write or to continue ({out.name})")
    parser.add_argument("--join", type=Path, nargs="+", help="put these tables together, and run nothing")
    asked = parser.parse_args(words)
    if asked.join:
        return join(asked.join, asked.out)
    # Ignored under nohup and in the background, which the runs would inherit, and rightly go on.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    began = time.monotonic()
    # Not a TemporaryDirectory, which every fork would delete at its end.
    scratch = Path(tempfile.mkdtemp(prefix="faults"))
    try:
        os.environ["SAPIENS_ACCEL_CACHE"] = str(scratch / "cache")
        campaign = Campaign(asked.seed, asked.faults, asked.out, scratch)
        if asked.only is not None:
            campaign.rows = [row for row in campaign.rows if row["index"] not in asked.only]
        for outcome in campaign.left():
            is_asked = asked.only is None or outcome.index in asked.only
            if not is_asked or RUNS.index(outcome.run) not in asked.runs:
                continue
            if time.monotonic() - began > 60 * asked.minutes:
                break
            campaign.try_one(outcome)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    main(sys.argv[1:])
