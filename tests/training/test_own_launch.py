"""Runs started by `train.py --launch` and by the submit script: what a signal to them saves, and what resumes."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from test_launches import ROOT, SMALL, steps_of

pytestmark = [pytest.mark.launch, pytest.mark.slow]
SCRIPT = "accelerate_configs/slurm.sbatch"
# One task a node, both on this machine; a signal to the job step reaches every process of it, as SLURM's does.
SRUN = """#!/bin/bash
for node in 0 1; do SLURM_NODEID=$node SLURM_PROCID=$node "$@" & tasks+=($!); done
status=0
for task in "${tasks[@]}"; do wait "$task"; code=$?; [ $code -le $status ] || status=$code; done
exit $status
"""
SCONTROL = """#!/bin/bash
[ "$1" = show ] && echo 127.0.0.1 && exit
echo "$@" > requeued
"""


def wait_for_a_step(folder: Path, run: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 300
    while run.poll() is None and time.monotonic() < deadline:
        if (folder / "metrics.jsonl").is_file() and steps_of(folder, "phase1"):
            return
        time.sleep(0.5)
    run.kill()
    pytest.fail(run.communicate()[0])


def start(words: list[str], cache: Path, folder: Path = ROOT, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        words,
        cwd=folder,
        env={**os.environ, "SAPIENS_ACCEL_CACHE": str(cache), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


SAVES_SLOWLY = """
import os, pathlib, signal, sys, time

def save(number, _):
    time.sleep(4)
    pathlib.Path("saved" + os.environ["RANK"]).touch()
    sys.exit(128 + number)

signal.signal(signal.SIGTERM, save)
pathlib.Path("started" + os.environ["RANK"]).touch()
time.sleep(100)
"""
LAUNCHER = f"""
import sys
from sapiens_accel import cli

config = {str(ROOT / "accelerate_configs" / "zero2.yaml")!r}
cli._pass_signals_on()
sys.exit(cli._launch(["--config_file", config, "--num_processes=2", "slow.py"]))
"""


def test_processes_may_save_for_longer_than_torchs_launcher_waits(tmp_path: Path) -> None:
    """It waits 30 seconds by default, here one."""
    (tmp_path / "slow.py").write_text(SAVES_SLOWLY)
    run = start([sys.executable, "-c", LAUNCHER], tmp_path, tmp_path, PET_SHUTDOWN_TIMEOUT="1", PYTHONPATH=str(ROOT))
    deadline = time.monotonic() + 100
    while len(list(tmp_path.glob("started*"))) < 2 and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    os.kill(run.pid, signal.SIGTERM)
    said = run.communicate(timeout=60)[0]
    assert sorted(path.name for path in tmp_path.glob("saved*")) == ["saved0", "saved1"], said
    assert run.returncode == 128 + signal.SIGTERM


def test_a_signal_to_the_launcher_saves_and_its_line_resumes(tmp_path: Path) -> None:
    number = signal.SIGTERM
    tail = [*SMALL, "--stage=phase1", f"--output_dir={tmp_path / 'run'}", "--phase1.steps=100000"]
    ways = ["--launch", "zero2", "--num_processes", "2"]
    run = start([sys.executable, "train.py", *ways, *tail], tmp_path / "cache")
    wait_for_a_step(tmp_path / "run", run)
    os.kill(run.pid, number)
    said = run.communicate(timeout=120)[0]
    last = steps_of(tmp_path / "run", "phase1")[-1]
    assert run.returncode == 128 + number and "Traceback" not in said, said
    assert f"stopped by {number.name}; step {last} is in " in said
    (command,) = re.findall(r"continue with: (.*)", said)
    words = shlex.split(command)
    assert Path(words[0]).name.startswith("python") and words[1:6] == ["train.py", *ways]
    again = start([*words, f"--max_steps={last + 1}"], tmp_path / "cache")
    said = again.communicate(timeout=300)[0]
    assert again.returncode == 0, said
    assert steps_of(tmp_path / "run", "phase1") == list(range(1, last + 2))


def test_the_submit_script_is_queued_again_and_resumes(tmp_path: Path) -> None:
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}", "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "1", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_ID": str(os.getpid()),
    }  # fmt: skip
    for name in ("train.py", "accelerate_configs", "ds_configs", "sapiens_accel"):
        (tmp_path / name).symlink_to(ROOT / name)
    tail = [*SMALL, "--stage=phase1", f"--output_dir={tmp_path / 'a run'}", "--phase1.steps=100000"]
    job = start(["bash", SCRIPT, *tail], tmp_path / "cache", tmp_path, **environment)
    wait_for_a_step(tmp_path / "a run", job)
    (srun,) = psutil.Process(job.pid).children()
    for process in srun.children(recursive=True):
        if process.name() != "bash":
            process.send_signal(signal.SIGUSR1)
    said = job.communicate(timeout=120)[0]
    last = steps_of(tmp_path / "a run", "phase1")[-1]
    assert job.returncode == 138 and f"stopped by SIGUSR1; step {last} is in " in said, said
    assert (tmp_path / "requeued").read_text() == f"requeue {os.getpid()}\n"
    (tmp_path / "requeued").unlink()
    job = start(["bash", SCRIPT, *tail, f"--max_steps={last + 1}"], tmp_path / "cache", tmp_path, **environment)
    said = job.communicate(timeout=300)[0]
    assert job.returncode == 0 and not (tmp_path / "requeued").exists(), said
    assert steps_of(tmp_path / "a run", "phase1") == list(range(1, last + 2))
