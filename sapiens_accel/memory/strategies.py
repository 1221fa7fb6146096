"""The ways to launch a stage: the launches of `accelerate_configs/`, combined with memory options."""

import importlib.util
import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sapiens_accel.config.schema import Config, TeacherPlacement
from sapiens_accel.models.sapiens import get_size
from sapiens_accel.runtime import distributed
from sapiens_accel.runtime.distributed import Strategy
from sapiens_accel.runtime.launch import configs_folder


@dataclass(frozen=True, kw_only=True)
class Way:
    """A way to run a stage: a launch and memory options. `fit` chooses the placement of the teacher."""

    name: str
    launch: str
    strategy: Strategy
    offload_activations: bool = False
    adam_8bit: bool = False
    bf16_weights: bool = False
    teacher: TeacherPlacement = "device"

    def options(self) -> list[str]:
        """The options of train.py of this way."""
        flags = {name: getattr(self, name) for name in ("offload_activations", "adam_8bit", "bf16_weights")}
        return [f"--memory.{name}" for name, wanted in flags.items() if wanted]


def list_ways(num_ranks: int, precision: str = "bf16") -> list[Way]:
    """All ways of `accelerate_configs/` for a number of GPUs in one machine, in a precision."""
    folder = configs_folder()
    ways = []

    def add(name: str, launch: str, **options: Any) -> None:
        file = folder / "ds_configs" / f"{launch}.json"
        zero = json.loads(file.read_text())["zero_optimization"] if launch.startswith("zero") else {}
        strategy = distributed.strategy_of(zero, num_ranks=num_ranks, num_local=num_ranks, precision=precision)
        ways.append(Way(name=name, launch=launch, strategy=strategy, **options))

    plain = "single_gpu" if num_ranks == 1 else "multi_gpu"
    add("plain", plain)
    add("8bit", plain, adam_8bit=True)
    add("8bit+activations", plain, adam_8bit=True, offload_activations=True)
    if precision == "bf16":
        add("8bit+bf16", plain, adam_8bit=True, bf16_weights=True)
    for launch in ("zero1", "zero2", "zero2_offload", "zero3", "zero3_offload"):
        if launch != "zero1" or num_ranks > 1:
            add(launch, launch)
        if launch.endswith("offload"):
            add(f"{launch}+activations", launch, offload_activations=True)
    return ways


def find_refusal(run: Config, strategy: Strategy) -> str | None:
    """Why a run's options cannot be trained by a launch; None if they can."""
    if run.memory.adam_8bit and strategy.zero:
        return "--memory.adam_8bit: only without DeepSpeed (expected a launch such as single_gpu.yaml)"
    if run.memory.bf16_weights:
        if not run.memory.adam_8bit:
            return "--memory.bf16_weights: only with 8-bit moments. Add --memory.adam_8bit"
        if not strategy.bf16:
            found = "fp16" if strategy.half else "fp32"
            return (
                f"--memory.bf16_weights: only with a launch in bf16 (expected bf16, found {found}; GPUs before "
                "Ampere do not have it). Remove it, or launch with --mixed_precision bf16"
            )
        if run.lora.rank:
            return "--memory.bf16_weights: not with --lora.rank, whose few parameters stay in fp32. Remove one of them"
    if run.memory.selective_blocks and (other := _find_other(run, strategy)):
        return f"--memory.selective_blocks: not with {other}"
    if run.memory.fused_kernels and (reason := _why_not_fused(run, strategy)):
        return f"--memory.fused_kernels: {reason}"
    if strategy.zero < 3:
        return None
    if run.lora.dora:
        return "--lora.dora: not with ZeRO-3, which shards the matrices whose norms it needs. Use ZeRO-2"
    if run.model.base_dtype:
        return f"--model.base_dtype {run.model.base_dtype}: not with ZeRO-3, which would shard the matrices. Use ZeRO-2"
    if run.memory.compile_blocks:
        return "--memory.compile_blocks: not with ZeRO-3, which gathers the weights of a block while it runs"
    return None


def _why_not_fused(run: Config, strategy: Strategy) -> str | None:
    """Why a run cannot have fused kernels; None if it can."""
    if get_size(run.model.name).family != "sapiens2":
        return f"only for Sapiens2, whose norms and gated MLP they are (found {run.model.name}). Remove it"
    if run.memory.compile_blocks:
        return "not with --memory.compile_blocks, which fuses the same operations. Remove one of them"
    if strategy.zero == 3:
        return "not with ZeRO-3, where they have not been tried. Use ZeRO-2, or remove it"
    return None


def _find_other(run: Config, strategy: Strategy) -> str | None:
    """What selectively checkpointed blocks do not go with."""
    if strategy.zero == 3:
        return "ZeRO-3, which gathers the weights of a block while it runs. Use --memory.checkpointed_blocks"
    if run.memory.compile_blocks:
        return "--memory.compile_blocks, whose compiler chooses what it recomputes. Remove one of them"
    if run.memory.offload_activations:
        return "--memory.offload_activations, which moves block inputs alone. Remove one of them"
    return None


def command(way: Way, words: Sequence[str]) -> str:
    """The command that trains in this way with these arguments: by train.py in a checkout, else by the installation."""
    ranks = way.strategy.num_ranks
    launch = f"accelerate launch --config_file accelerate_configs/{way.launch}.yaml --num_processes {ranks} train.py"
    if not Path("train.py").is_file():
        launch = f"sapiens-accel train --launch {way.launch} --num_processes {ranks}"
    return " ".join([launch, shlex.join(words), *way.options()])


def missing_package(way: Way) -> str | None:
    """How to install the package that a way needs beyond the dependencies; None if it needs none, or has it."""
    return "pip install torchao" if way.adam_8bit and importlib.util.find_spec("torchao") is None else None


def without(words: Sequence[str], *options: str) -> list[str]:
    """Remove the options that begin like one of `options`, and their values, from a command line."""
    remaining, value_follows = [], False
    for word in words:
        is_removed = word.startswith(options) or (value_follows and not word.startswith("--"))
        if not is_removed:
            remaining.append(word)
        value_follows = is_removed and word.startswith("--") and "=" not in word
    return remaining
