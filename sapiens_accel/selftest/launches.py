"""The launches of the README as checks: each starts, saves and resumes, with the shipped YAML."""

import json
import math
import re
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import yaml

from sapiens_accel.runtime.launch import configs_folder
from sapiens_accel.selftest.checks import Check, Machine, Row, folder_of

SAVED, LAST = 2, 4  # steps of the first launch, and of the one that resumes it
SMALL = (
    "--stage=phase2", "--phase2.global_batch=8", "--data.synthetic.num_train=32", "--data.synthetic.num_unlabelled=4",
    "--data.synthetic.num_val=8", "--data.num_workers=0", "--log_every=1", f"--save_every={SAVED}", "--report_to=none",
)  # fmt: skip
# The YAML and further options by name, the most important ones first.
LAUNCHES: dict[str, tuple[str, ...]] = {
    "single_gpu": ("single_gpu.yaml",),
    "zero2": ("zero2.yaml",),
    "zero2_offload": ("zero2_offload.yaml",),
    "zero2_fp16": ("zero2_fp16.yaml",),
    "fp16": ("single_gpu.yaml", "--mixed_precision", "fp16"),
    "zero3": ("zero3.yaml",),
}
ON_CPU = ("single_gpu", "zero2")  # the others need a GPU or too much time
SECONDS = {"cuda": 60.0, "cpu": 120.0}
BUILD_SECONDS = 120.0  # DeepSpeedCPUAdam is compiled on first use


def checks(machine: Machine, out: Path, scratch: Path) -> Iterator[Check]:
    """For each launch a check that starts and saves, and one that resumes."""
    for name, (file, *options) in LAUNCHES.items():
        in_clone = machine.has_repository
        config = f"accelerate_configs/{file}" if in_clone else str(configs_folder() / "accelerate_configs" / file)
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config]
        launch += [*fewer_processes(file, max(machine.num_gpus, 1)), *options]
        launch += ["train.py"] if in_clone else ["-m", "sapiens_accel.train"]
        tail = [f"--output_dir={scratch / name}", *SMALL]
        seconds = SECONDS["cuda" if machine.gpu else "cpu"]
        skip = None
        if not machine.gpu and name not in ON_CPU:
            skip = "needs a GPU: for its precision or its memory"
        shown = f"accelerate launch {' '.join(launch[3:])}"
        yield Check(
            name=f"launch {name}",
            group="launches",
            commands=[[*launch, *tail, f"--max_steps={SAVED}"]],
            limit=seconds + (BUILD_SECONDS if "offload" in name and machine.gpu else 0),
            read=partial(read_start, scratch / name, shown),
            skip=skip,
        )
        yield Check(
            name=f"resume {name}",
            group="launches",
            commands=[[*launch, *tail, f"--max_steps={LAST}", "--resume_from_checkpoint=latest"]],
            limit=seconds,
            read=partial(read_resumed, scratch / name, folder_of(out, f"launch {name}")),
            needs=f"launch {name}",
            skip=skip,
        )


def fewer_processes(file: str, num_gpus: int) -> list[str]:
    """The option for a launch that has more processes than there are GPUs, as in the README."""
    path = configs_folder() / "accelerate_configs" / file
    asked = yaml.safe_load(path.read_text())["num_processes"] if path.is_file() else 1
    return ["--num_processes", str(num_gpus)] if asked > num_gpus else []


def read_start(run: Path, shown: str, folder: Path) -> list[Row]:
    """A row for a launch that has ended: device and precision, losses, a checkpoint and weights.

    Raises:
        RuntimeError: any of these is missing, or a loss is not finite.
    """
    lines = metrics_lines(run)
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    losses = losses_of(lines)
    if list(losses) != list(range(1, SAVED + 1)):
        raise RuntimeError(f"{run.name}: wrong steps (expected losses of 1 to {SAVED}, found {list(losses)})")
    for needed in (f"phase2/checkpoints/step_{SAVED}", "phase2/weights/model.safetensors"):
        if not (run / needed).exists():
            raise RuntimeError(f"{run.name}: {needed} is missing")
    text = f"{first_line(folder)}; loss {losses[1]:.4g} to {losses[SAVED]:.4g}, saved"
    return [{"name": shown, "status": "passed", "text": text, "losses": losses}]


def read_resumed(run: Path, started: Path, folder: Path) -> list[Row]:
    """A row for a launch that has resumed, and so added its steps to those of the first launch.

    Raises:
        RuntimeError: it started from step 1, or a loss is not finite.
    """
    lines, before = metrics_lines(run), (started / "metrics.jsonl").read_text().splitlines()
    losses = losses_of(lines)
    # A run from step 1 would write the first steps again, with other times.
    first_lines = [line for line in before if "loss" in json.loads(line)]
    if not first_lines or any(line not in lines for line in first_lines) or list(losses) != list(range(1, LAST + 1)):
        raise RuntimeError(f"{run.name}: not resumed at step {SAVED + 1} (found losses of steps {list(losses)})")
    text = f"resumed at step {SAVED + 1}; loss {losses[SAVED + 1]:.4g} to {losses[LAST]:.4g}"
    return [{"name": f"{run.name}, resumed", "status": "passed", "text": text, "losses": losses}]


def metrics_lines(run: Path) -> list[str]:
    return (run / "metrics.jsonl").read_text().splitlines()


def losses_of(lines: Sequence[str]) -> dict[int, float]:
    """Loss by step.

    Raises:
        RuntimeError: a loss is not finite.
    """
    trees = [json.loads(line) for line in lines]
    losses = {tree["step"]: float(tree["loss"]) for tree in trees if "loss" in tree}
    for step, loss in losses.items():
        if not math.isfinite(loss):
            raise RuntimeError(f"the loss of step {step} is {loss}")
    return losses


def first_line(folder: Path) -> str:
    """The line of train.py about processes, device, ZeRO stage and precision."""
    match = re.search(r"^demo: (.+)$", (folder / "log_0.txt").read_text(errors="replace"), re.MULTILINE)
    return match[1] if match else "started"
