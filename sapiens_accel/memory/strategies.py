"""The ways to launch a stage: the launches of `accelerate_configs/` and the options that go with them."""

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sapiens_accel.config.schema import Place
from sapiens_accel.errors import UserError
from sapiens_accel.runtime import distributed
from sapiens_accel.runtime.distributed import Strategy


@dataclass(frozen=True, kw_only=True)
class Way:
    """A way to run a stage: a launch, and the options that go with it; `fit` chooses where a teacher is kept."""

    name: str
    launch: str
    strategy: Strategy
    offload_activations: bool = False
    adam_8bit: bool = False
    teacher: Place = "device"

    def options(self) -> list[str]:
        """The options of train.py that this way needs beside the launch."""
        flags = {"offload_activations": self.offload_activations, "adam_8bit": self.adam_8bit}
        return [f"--memory.{name}" for name, wanted in flags.items() if wanted]


def list_ways(num_ranks: int, precision: str = "bf16") -> list[Way]:
    """Every way that `accelerate_configs/` launches, for this many GPUs of one machine, in the precision they have."""
    folder = Path(__file__).parent.parent.parent
    known = []

    def add(name: str, launch: str, **options: Any) -> None:
        file = folder / "ds_configs" / f"{launch}.json"
        zero = json.loads(file.read_text())["zero_optimization"] if launch.startswith("zero") else {}
        strategy = distributed.strategy_of(zero, num_ranks=num_ranks, num_local=num_ranks, precision=precision)
        known.append(Way(name=name, launch=launch, strategy=strategy, **options))

    plain = "single_gpu" if num_ranks == 1 else "multi_gpu"
    add("plain", plain)
    add("8bit", plain, adam_8bit=True)
    add("8bit+activations", plain, adam_8bit=True, offload_activations=True)
    if not (folder / "ds_configs").is_dir():
        raise UserError(f"no ds_configs in {folder}: the plan needs a checkout of the repository, as train.py does")
    for launch in ("zero1", "zero2", "zero2_offload", "zero3", "zero3_offload"):
        if launch != "zero1" or num_ranks > 1:
            add(launch, launch)
        if launch.endswith("offload"):
            add(f"{launch}+activations", launch, offload_activations=True)
    return known


def command(way: Way, words: Sequence[str]) -> str:
    """The launch of train.py in this way, with these arguments."""
    ranks = way.strategy.num_ranks
    launch = f"accelerate launch --config_file accelerate_configs/{way.launch}.yaml --num_processes {ranks} train.py"
    return " ".join([launch, shlex.join(words), *way.options()])
