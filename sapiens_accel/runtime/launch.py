"""What the launcher asks of this process, by its environment: checked before anything starts.

`accelerate launch` and torchrun hand everything on as environment variables. What this package sets itself, from its
own options, is refused there in one line, so that nothing that a config file says is dropped in silence.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate.commands.config.config_args import default_config_file

from sapiens_accel.errors import UserError

CHECKOUT = Path(__file__).parents[2]
JSON_VARIABLE = "ACCELERATE_DEEPSPEED_CONFIG_FILE"
FIELDS_VARIABLE = "ACCELERATE_CONFIG_DS_FIELDS"
PRECISIONS = {"no": "fp32", "bf16": "bf16", "fp16": "fp16"}
# What decides the maths belongs to our options: one recipe means the same training under every launch.
OURS = {
    "gradient_clipping": "--STAGE.optim.clip_norm",
    "gradient_accumulation_steps": "--STAGE.global_batch and --memory.micro_batch",
    "train_batch_size": "--STAGE.global_batch",
    "train_micro_batch_size_per_gpu": "--memory.micro_batch",
    "optimizer": "--STAGE.optim",
    "scheduler": "--STAGE.optim",
}
NOT_SUPPORTED = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
}


def is_set(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("1", "true", "yes")


def uses_deepspeed() -> bool:
    return is_set("ACCELERATE_USE_DEEPSPEED")


def uses_cuda() -> bool:
    """Whether this process is going to run on a GPU."""
    return torch.cuda.is_available() and not is_set("ACCELERATE_USE_CPU")


def precision_asked() -> str:
    """`mixed_precision` as the launch asks for it: no, bf16 or fp16."""
    return os.environ.get("ACCELERATE_MIXED_PRECISION") or "no"


def config_file() -> Path | None:
    """The accelerate config that the launcher of this process has read, if any."""
    for process in psutil.Process().parents()[:3]:
        try:
            words = process.cmdline()
        except psutil.Error:
            return None
        if not any("accelerate" in word for word in words):
            continue
        for index, word in enumerate(words):
            name, _, value = word.partition("=")
            if name == "--config_file":
                return Path(process.cwd(), value or words[index + 1])
        return Path(default_config_file) if Path(default_config_file).is_file() else None
    return None


def check() -> None:
    """Refuse what this package cannot run, and find the DeepSpeed JSON of the launch.

    The launcher's environment is changed: the path of the JSON becomes absolute, and the note that the config file says
    something beside it is taken away once it is known to say the same (accelerate would refuse it, `mixed_precision`
    included, although it hands that on by itself).

    Raises:
        UserError: with the file and the key.
    """
    where = config_file() or "the launch"
    _check_environment(where)
    if not uses_deepspeed():
        return
    if "LOCAL_RANK" not in os.environ:
        raise UserError(
            "DeepSpeed needs its launcher: accelerate launch --config_file accelerate_configs/zero2.yaml train.py"
        )
    if is_set("ACCELERATE_USE_CPU"):
        raise UserError(
            f"{where}: ACCELERATE_USE_CPU would drop ZeRO (expected unset). Without a GPU it runs on the CPU"
        )
    if name := os.environ.get(JSON_VARIABLE):
        file = _find_json(name, where)
        _check_json(file, where)
        os.environ[JSON_VARIABLE], os.environ[FIELDS_VARIABLE] = str(file), ""


def _check_environment(where: Path | str) -> None:
    for variable, name in NOT_SUPPORTED.items():
        if is_set(variable):
            raise UserError(
                f"{where}: {name} is not supported (expected distributed_type NO, MULTI_GPU or DEEPSPEED). "
                "To share the state: accelerate launch --config_file accelerate_configs/zero3.yaml train.py"
            )
    if (asked := precision_asked()) not in PRECISIONS:
        raise UserError(
            f"{where}: mixed_precision is not supported (expected no, bf16 or fp16, found {asked}). "
            "Set mixed_precision: bf16"
        )
    if (backend := os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")).lower() != "no":
        raise UserError(
            f"{where}: dynamo_backend is not supported (expected 'no', found {backend}). Take it out, and compile the "
            "blocks with --memory.compile_blocks"
        )
    steps, clip = (os.environ.get(f"ACCELERATE_GRADIENT_{name}", "") for name in ("ACCUMULATION_STEPS", "CLIPPING"))
    for key, value, unset in (("gradient_accumulation_steps", steps, "1"), ("gradient_clipping", clip, "none")):
        if value not in ("", "auto", "none", unset):
            raise UserError(
                f"{where}: {key}: {value} has no effect here (expected none). Take it out, and use {OURS[key]}"
            )


def _find_json(name: str, where: Path | str) -> Path:
    """In the working folder, beside the accelerate config or the folder above it, or in this checkout."""
    beside = [where.parent, where.parent.parent] if isinstance(where, Path) else []
    for folder in (Path.cwd(), *beside, CHECKOUT):
        if (folder / name).is_file():
            return (folder / name).resolve()
    looked = ", ".join(str(folder) for folder in dict.fromkeys((Path.cwd(), *beside, CHECKOUT)))
    raise UserError(f"{where}: deepspeed_config_file: {name} is not there (looked in {looked}). Give its whole path")


def _check_json(file: Path, where: Path | str) -> None:
    try:
        tree = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: not a DeepSpeed config: {' '.join(str(error).split())}") from None
    zero = tree.get("zero_optimization") if isinstance(tree, dict) else None
    if not isinstance(zero, dict) or zero.get("stage") not in (0, 1, 2, 3):
        raise UserError(
            f"{file}: no ZeRO stage (expected zero_optimization with a stage of 0 to 3, as ds_configs/zero2.json)"
        )
    for key, option in OURS.items():
        if tree.get(key, "auto") != "auto":
            raise UserError(f"{file}: {key} has no effect here (expected none). Take it out, and use {option}")
    asked = precision_asked()
    for name in ("bf16", "fp16"):
        enabled = tree.get(name, {}).get("enabled", "auto")
        if enabled != "auto" and enabled != (asked == name):
            said = f"mixed_precision is {asked} in {where}"
            raise UserError(f'{file}: {name}.enabled is {json.dumps(enabled)}, and {said} (expected "auto")')
    for key, said, found in _said_twice(where, zero):
        if said != found:
            raise UserError(f"{where}: {key} is {said}, and {found} in {file}. Change one of them")


def _said_twice(where: Path | str, zero: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """What an accelerate config says beside a DeepSpeed JSON: key, value, and the JSON's value."""
    fields = os.environ.get(FIELDS_VARIABLE, "").split(",")
    variables = {"zero_stage": "DEEPSPEED_ZERO_STAGE"}
    variables |= {
        f"offload_{part}_device": f"DEEPSPEED_OFFLOAD_{part.upper()}_DEVICE" for part in ("optimizer", "param")
    }
    for key, variable in variables.items():
        if key in fields:
            part = zero.get(key.removesuffix("_device"), {})
            found = zero["stage"] if key == "zero_stage" else part.get("device", "none")
            yield key, os.environ.get(f"ACCELERATE_{variable}", ""), str(found)
    if isinstance(where, Path) and (named := re.match(r"zero(\d)(?!\d)", where.stem)):
        yield "the ZeRO stage of its name", named[1], str(zero["stage"])
