"""The selftest's harness: time limits, what is killed, what a row says, which checks a machine gets."""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from sapiens_accel.errors import UserError
from sapiens_accel.selftest import __main__ as selftest
from sapiens_accel.selftest import checks, launches
from sapiens_accel.selftest.checks import Check, Machine, Outcome, Result, Skipped

# A child in a session of its own, as a launcher's workers are, with a child of its own: neither ends by itself.
FAMILY = """
import subprocess, sys, time
child = "import subprocess, sys, time; g = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); "
child += "print(g.pid, flush=True); time.sleep(600)"
worker = subprocess.Popen([sys.executable, "-c", child], start_new_session=True, stdout=subprocess.PIPE, text=True)
print("family", worker.pid, worker.stdout.readline(), flush=True)
"""
T4 = Machine(gpu="Tesla T4", num_gpus=1, gpu_bytes=15109 * 2**20, capability=(7, 5), driver="550.54")
H100 = Machine(gpu="NVIDIA H100 80GB HBM3", num_gpus=1, gpu_bytes=79 * 2**30, capability=(9, 0), driver="570.1")
TWO = replace(H100, num_gpus=2)
CPU = Machine()


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def check_of(*codes: str, limit: float = 30.0, **more: object) -> Check:
    commands = [python(code) for code in codes]
    fields = {"name": "one", "group": "g", "commands": commands, "limit": limit, "read": checks.read_result} | more
    return Check(**fields)  # pyright: ignore[reportArgumentType]


def writes(tmp_path: Path, *rows: dict[str, object]) -> str:
    file = str(tmp_path / "one" / "result.json")
    return f"import pathlib; pathlib.Path({file!r}).write_text({json.dumps(rows)!r})"


@pytest.mark.parametrize("ends", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_nothing_outlives_a_check(tmp_path: Path, ends: bool) -> None:
    """Killed at its limit or ended by itself: neither its children nor theirs, in whichever session, stay."""
    code = FAMILY + ("time.sleep(1)" if ends else "time.sleep(600)")
    since = time.monotonic()
    returned = checks.run_process(python(code), tmp_path / "log.txt", 60 if ends else 8)
    assert returned == (0 if ends else None) and time.monotonic() - since < 45
    said = (tmp_path / "log.txt").read_text().split("family")[-1].split()
    assert len(said) == 2
    assert not [int(pid) for pid in said if psutil.pid_exists(int(pid))]


def test_a_check_that_hangs_keeps_what_it_found(tmp_path: Path) -> None:
    row = {"name": "first", "status": "passed", "text": "was fast"}
    hangs = check_of(writes(tmp_path, row) + "; import time; time.sleep(600)", limit=5)
    found = checks.run_check(hangs, tmp_path, 60, [])
    assert found.status == "failed" and found.text.startswith("stopped after its limit of 5 s; see ")
    assert found.rows == [row] and 5 <= found.seconds < 30


def test_a_check_is_as_good_as_its_worst_row(tmp_path: Path) -> None:
    rows = [{"name": status, "status": status, "text": ""} for status in ("skipped", "passed", "warning")]
    assert checks.run_check(check_of(writes(tmp_path, *rows)), tmp_path, 60, []).status == "warning"
    assert checks.run_check(check_of(writes(tmp_path, *rows[:2])), tmp_path, 60, []).status == "passed"
    assert checks.run_check(check_of(writes(tmp_path, rows[0])), tmp_path, 60, []).status == "skipped"
    none = checks.run_check(check_of(writes(tmp_path)), tmp_path, 60, [])
    assert (none.status, none.text) == ("failed", "the check wrote no result")


def test_a_failed_command_is_one_line_of_its_log(tmp_path: Path) -> None:
    code = "print('busy'); raise ValueError('the culprit\\nand more')"
    found = checks.run_check(check_of(code, "print('never')"), tmp_path, 60, [])
    assert found.status == "failed" and found.text.startswith("ValueError: the culprit (exit code 1; see ")
    assert not (tmp_path / "one" / "log_1.txt").exists()
    # What an earlier selftest left in the folder is not taken for this one's.
    checks.run_check(check_of(writes(tmp_path, {"name": "old", "status": "passed", "text": ""})), tmp_path, 60, [])
    found = checks.run_check(check_of("print(1)"), tmp_path, 60, [])
    assert found.status == "failed" and "FileNotFoundError" in found.rows[0]["text"]


def test_the_launchers_report_is_not_taken_for_the_reason(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    log.write_text(
        "$ accelerate launch --error: x\ntrain.py: error: --data.root x: no such folder\n"
        "Traceback (most recent call last):\ntorch.distributed.elastic.multiprocessing.errors.ChildFailedError: \n"
        "Root Cause (first observed failure):\nexitcode : 2\n"
    )
    assert checks.error_line(log) == "train.py: error: --data.root x: no such folder"
    log.write_text("$ x\nKilled\n")
    assert checks.error_line(log) == "Killed"


def test_what_is_not_begun_says_why(tmp_path: Path) -> None:
    passed = Outcome(name="a", group="g", status="passed", seconds=1, limit=1, text="", rows=[])
    failed = replace(passed, name="b", status="failed")

    def text(check: Check, left: float = 60) -> str:
        found = checks.run_check(check, tmp_path, left, [passed, failed])
        assert found.status == "skipped" and not (tmp_path / "one").exists()
        return found.text

    assert text(check_of("", skip="needs a GPU")) == "needs a GPU"
    assert text(check_of("", needs="b")) == "b has not passed"
    assert text(check_of("", needs="c")) == "c has not passed"
    assert text(check_of("", limit=100), 33) == "33 s left, it may take 100 s; raise --minutes"
    assert checks.run_check(check_of("pass", needs="a", limit=100), tmp_path, 34, [passed]).limit == 34


def test_a_probe_that_fails_is_a_row_and_the_rest_goes_on(tmp_path: Path) -> None:
    result = Result(tmp_path / "result.json")
    with result.guard("broken"):
        result.add({"name": "before", "status": "passed", "text": ""})
        raise RuntimeError("CUDA error:\n  an illegal memory access")
    with result.guard("left out"):
        raise Skipped("no CUPTI")
    result.add({"name": "after", "status": "passed", "text": ""})
    rows = json.loads((tmp_path / "result.json").read_text())
    assert [(row["name"], row["status"]) for row in rows] == [
        ("before", "passed"), ("broken", "failed"), ("left out", "skipped"), ("after", "passed"),
    ]  # fmt: skip
    assert rows[1]["text"] == "RuntimeError: CUDA error: an illegal memory access"


def test_the_json_is_there_after_each_check(tmp_path: Path) -> None:
    file = tmp_path / "selftest.json"
    looks = check_of(f"import json; assert len(json.load(open({str(file)!r}))['checks']) == 1", name="two")
    looks = replace(looks, read=lambda _: [{"name": "x", "status": "passed", "text": "saw it"}])
    fails = check_of("raise SystemExit(3)")
    outcomes = checks.run_checks([fails, looks], tmp_path, 60, {"commit": "abc"})
    assert [outcome.status for outcome in outcomes] == ["failed", "passed"]
    tree = json.loads(file.read_text())
    assert tree["commit"] == "abc" and [check["name"] for check in tree["checks"]] == ["one", "two"]
    assert checks.table(outcomes).endswith("1 failed, 1 passed")


# ---- Which checks


def plan(machine: Machine, tmp_path: Path) -> dict[str, Check]:
    found = selftest.checks_for(machine, tmp_path, tmp_path / "scratch")
    assert len({check.name for check in found}) == len(found)
    assert {check.group for check in found} == set(selftest.GROUPS)
    return {check.name: check for check in found}


def test_a_gpu_gets_every_launch_as_the_readme_prints_it(tmp_path: Path) -> None:
    found = plan(T4, tmp_path)
    assert [check.group for check in list(found.values())[:12]] == ["launches"] * 12  # the most valuable first
    pages = [checks.REPOSITORY / "README.md", *(checks.REPOSITORY / "docs").glob("*.md")]
    printed_commands = "".join(page.read_text() for page in pages)
    for name, (file, *options) in launches.LAUNCHES.items():
        (start,), (resume,) = found[f"launch {name}"].commands, found[f"resume {name}"].commands
        assert file in printed_commands and found[f"launch {name}"].skip is None
        printed = ["-m", "accelerate.commands.launch", "--config_file", f"accelerate_configs/{file}"]
        one = ["--num_processes", "1"] if name == "zero3" else []
        assert start[1 : start.index("train.py") + 1] == [*printed, *one, *options, "train.py"]
        assert resume[: resume.index("train.py")] == start[: start.index("train.py")]
        assert "--resume_from_checkpoint=latest" in resume and found[f"resume {name}"].needs == f"launch {name}"
    assert "--num_processes" not in plan(TWO, tmp_path)["launch zero3"].commands[0]
    assert [name for name, check in found.items() if check.skip] == ["speed sapiens_1b"]
    assert not [name for name, check in plan(H100, tmp_path).items() if check.skip]


def test_a_cpu_gets_what_makes_sense_there_and_reasons_for_the_rest(tmp_path: Path) -> None:
    skipped = {name: check.skip for name, check in plan(CPU, tmp_path).items() if check.skip}
    few = {
        f"{does} {name}" for does in ("launch", "resume") for name in launches.LAUNCHES if name not in launches.ON_CPU
    }
    assert set(skipped) == {*few, "waits", "offload", "epochs"}
    assert all("GPU" in reason for reason in skipped.values())
    without = plan(replace(H100, has_repository=False), tmp_path)
    for name, check in without.items():
        assert (check.group == "memory") == bool(check.skip and "clone of the repository" in check.skip), name
    (installed,) = without["launch zero2"].commands
    assert installed[installed.index("-m", 3) :][:2] == ["-m", "sapiens_accel.train"]
    assert Path(installed[installed.index("--config_file") + 1]).is_absolute()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--only", "launches,speeed"], "--only launches,speeed: no such check 'speeed' (expected some of launches, "),
        (["--minutes", "0"], "--minutes 0: expected more than 0"),
        (["--out", "{file}/x"], "--out {file}/x: Not a directory"),
    ],
)
def test_wrong_options_are_one_line(tmp_path: Path, words: list[str], said: str) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(UserError) as caught:
        selftest.main([word.format(file=file) for word in words])
    assert str(caught.value).startswith(said.format(file=file))


# ---- What a launch has left


def run_folder(tmp_path: Path, *lines: dict[str, object]) -> tuple[Path, Path]:
    """A run's folder with these lines of metrics.jsonl, and the check's with the log of its launch."""
    run, folder = tmp_path / "single_gpu", tmp_path / "check"
    (run / "phase2" / "checkpoints" / "step_2").mkdir(parents=True, exist_ok=True)
    (run / "phase2" / "weights").mkdir(exist_ok=True)
    (run / "phase2" / "weights" / "model.safetensors").touch()
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    folder.mkdir(exist_ok=True)
    (folder / "log_0.txt").write_text("$ x\ndemo: 1 process on CPU, ZeRO-2, fp32\n")
    return run, folder


def metric(step: int, loss: float, seconds: float = 1.0) -> dict[str, object]:
    return {"stage": "phase2", "step": step, "loss": loss, "seconds": seconds}


def test_a_launch_is_checked_by_what_it_left(tmp_path: Path) -> None:
    lines = [metric(1, 2.0), metric(2, 1.5), {"stage": "phase2", "step": 2, "AP": 0.0}]
    run, folder = run_folder(tmp_path, *lines)
    (row,) = launches.read_start(run, "accelerate launch ...", folder)
    assert row["text"] == "1 process on CPU, ZeRO-2, fp32; loss 2 to 1.5, saved"
    more = [*lines[:2], metric(3, 1.4), metric(4, 1.3)]
    run_folder(tmp_path, *more)
    (row,) = launches.read_resumed(run, folder, folder)
    assert row["text"] == "resumed at step 3; loss 1.4 to 1.3"
    run_folder(tmp_path, metric(1, 2.0, seconds=7.0), metric(2, 1.5, seconds=7.0), *more[2:])
    with pytest.raises(RuntimeError, match="not resumed at step 3"):  # it began anew
        launches.read_resumed(run, folder, folder)
    run_folder(tmp_path, *lines)
    with pytest.raises(RuntimeError, match=r"not resumed at step 3 \(found losses of steps \[1, 2\]"):
        launches.read_resumed(run, folder, folder)
    run_folder(tmp_path, metric(1, 2.0), metric(2, float("nan")))
    with pytest.raises(RuntimeError, match="the loss of step 2 is nan"):
        launches.read_start(run, "", folder)
    run_folder(tmp_path, *lines)
    (run / "phase2" / "weights" / "model.safetensors").unlink()
    with pytest.raises(RuntimeError, match=r"phase2/weights/model.* is missing"):
        launches.read_start(run, "", folder)
