"""Test a machine after installation: launches, kernels, precision, memory and speed, in one command.

python -m sapiens_accel.selftest [--only launches,memory] [--minutes 9] [--out selftest]
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from sapiens_accel.config.commands import program_name
from sapiens_accel.errors import UserError, run_main
from sapiens_accel.selftest import checks, launches
from sapiens_accel.selftest.checks import Check, Machine

GROUPS = {
    "launches": "the launches of the README start, save and resume",
    "attention": "the attention kernel of each head dimension",
    "fp16": "a step that overflows is detected and skipped",
    "waits": "where the host waits for the GPU",
    "offload": "copies of offloaded activations overlap with computation",
    "memory": "predicted and measured peak memory",
    "speed": "people/s compared with a plain transformers loop, with and without compiled blocks",
    "epochs": "time of an epoch of COCO (predicted)",
}
MINUTES = {"cuda": 9.0, "cpu": 3.0}
LIMIT = "15GiB"  # memory limit of torch in the checks of memory, as on a 16 GB card
LARGE = 40 * 2**30  # bytes of a GPU that holds a 1B and the plain loop's copy with 32 people


def checks_for(machine: Machine, out: Path, scratch: Path) -> list[Check]:
    """All checks, the most important ones first; those that cannot run on this machine have a reason to skip."""
    return [
        *launches.checks(machine, out, scratch),
        *(_probe(name, machine, out) for name in ("attention", "fp16", "waits", "offload")),
        *_memory(machine, out),
        *_speed(machine, out),
        _run_module("epochs", "epochs", ["epochs", str(out)], 60, out, None if machine.gpu else NO_GPU),
    ]


NO_GPU = "needs a GPU"


def _run_module(name: str, group: str, words: Sequence[str], limit: float, out: Path, skip: str | None = None) -> Check:
    """A check by a module of this package in a separate process: `words` are the module and its arguments."""
    module, *arguments = words
    result = str(checks.folder_of(out, name) / "result.json")
    command = [sys.executable, "-m", f"sapiens_accel.selftest.{module}", result, *arguments]
    return Check(name=name, group=group, commands=[command], limit=limit, read=checks.read_result, skip=skip)


def _probe(name: str, machine: Machine, out: Path) -> Check:
    skip = NO_GPU if not machine.gpu and name in ("waits", "offload") else None
    return _run_module(name, name, ["probes", name], 60, out, skip)


def _memory(machine: Machine, out: Path) -> list[Check]:
    """1B and 2B in 15 GiB; on a CPU a tiny network, by torch's profiler."""
    if not machine.gpu:
        words = ["peak_memory", "sapiens_tiny", "phase2", "plain", "--hw", "256", "192", "--batch", "4"]
        return [_run_module("memory sapiens_tiny phase2", "memory", words, 60, out)]
    cases = [
        ("sapiens_1b", "phase2", "zero2_offload"),
        ("sapiens_1b", "ssl", "zero2_offload+activations"),
        ("sapiens_2b", "phase2", "zero2_offload"),
    ]
    skip = None if machine.has_repository else "needs accelerate_configs/: run it in a clone of the repository"
    card = ["--limit", LIMIT]
    if machine.capability:
        card += ["--capability", ".".join(map(str, machine.capability))]
    return [
        _run_module(f"memory {' '.join(case[:2])}", "memory", ["peak_memory", *case, *card], limit, out, skip)
        for case, limit in zip(cases, (90, 100, 150), strict=True)
    ]


def _speed(machine: Machine, out: Path) -> list[Check]:
    if not machine.gpu:
        words = ["throughput", "sapiens_tiny", "--hw", "128", "96", "--batch", "4"]
        return [_run_module("speed sapiens_tiny", "speed", words, 60, out)]
    words = ["--batch", "32" if machine.gpu_bytes >= LARGE else "8", "--compile"]
    skip = None if machine.gpu_bytes >= LARGE else "16 bytes a parameter, for two networks, need a GPU of 40 GiB"
    return [
        _run_module("speed sapiens_0.3b", "speed", ["throughput", "sapiens_0.3b", *words], 110, out),
        _run_module("speed sapiens_1b", "speed", ["throughput", "sapiens_1b", *words], 150, out, skip),
    ]


def main(words: Sequence[str]) -> None:
    names = "".join(f"\n  {name:11}{text}" for name, text in GROUPS.items())
    parser = argparse.ArgumentParser(
        prog=program_name("selftest", "selftest"),
        description=f"Test that training works on this machine. Nothing is downloaded.\n{names}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--only", help="groups of checks to run: launches,attention,...")
    parser.add_argument("--minutes", type=float, help="time limit (9 on a GPU, 3 on a CPU)")
    parser.add_argument("--out", default="selftest", help="folder of selftest.json and the logs (selftest)")
    asked = parser.parse_args(words)
    wanted = asked.only.split(",") if asked.only else list(GROUPS)
    if unknown := [name for name in wanted if name not in GROUPS]:
        raise UserError(f"--only {asked.only}: no such check {unknown[0]!r} (expected some of {', '.join(GROUPS)})")
    if asked.minutes is not None and not asked.minutes > 0:
        raise UserError(f"--minutes {asked.minutes:g}: expected more than 0")
    out = Path(asked.out).absolute()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {asked.out}: {error.strerror}") from None
    machine = checks.inspect_machine(out)
    minutes = asked.minutes or MINUTES["cuda" if machine.gpu else "cpu"]
    head = checks.heading(machine)
    print(
        f"{machine.gpu or checks.cpu_name()}, at most {minutes:g} minutes; logs and selftest.json in {out}", flush=True
    )
    if machine.problem:
        print(f"warning: the GPU is not used: {machine.problem}", flush=True)
    with tempfile.TemporaryDirectory(prefix="selftest") as scratch:
        chosen = [check for check in checks_for(machine, out, Path(scratch)) if check.group in wanted]
        outcomes = checks.run_checks(chosen, out, 60 * minutes, head)
    print(f"\n{checks.table(outcomes)}\n{out / 'selftest.json'}")
    if machine.problem or any(outcome.status == "failed" for outcome in outcomes):
        sys.exit(1)


if __name__ == "__main__":
    run_main(main)
