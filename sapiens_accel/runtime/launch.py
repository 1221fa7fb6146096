"""The launcher's settings for this process, checked before anything starts.

`accelerate launch` and torchrun pass them as environment variables. Those that this package sets from its own options
are refused in one line, so that no setting of a config file is silently ignored.
"""

import contextlib
import difflib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import psutil
import torch
import yaml
from accelerate.commands.config.config_args import default_config_file

from sapiens_accel.errors import UserError, program_words
from sapiens_accel.runtime import extensions, host

CHECKOUT = Path(__file__).parents[2]
JSON_VARIABLE = "ACCELERATE_DEEPSPEED_CONFIG_FILE"
FIELDS_VARIABLE = "ACCELERATE_CONFIG_DS_FIELDS"
LAUNCH_VARIABLE = "SAPIENS_ACCEL_LAUNCH"
Precision = Literal["no", "bf16", "fp16"]
PRECISIONS = {"no": "fp32", "bf16": "bf16", "fp16": "fp16"}
# Settings that change the training are options of this package: one recipe means the same under every launch.
OLD = 'is of an older DeepSpeed. Write "offload_optimizer": {"device": "cpu"}'
REFUSED = {  # keys of zero_optimization
    "cpu_offload": OLD,
    "cpu_offload_params": OLD,
    "zenflow": "cannot train convolutions, which these networks have (docs/one_gpu.md). Take it out",
}
OURS = {
    "gradient_clipping": "--STAGE.optim.clip_norm",
    "gradient_accumulation_steps": "--STAGE.global_batch and --memory.micro_batch",
    "train_batch_size": "--STAGE.global_batch",
    "train_micro_batch_size_per_gpu": "--memory.micro_batch",
    "optimizer": "--STAGE.optim",
    "scheduler": "--STAGE.optim",
    "torch_autocast": "mixed_precision of the accelerate config",
    "amp": "mixed_precision of the accelerate config",
    "data_types": "mixed_precision of the accelerate config",
    "communication_data_type": "mixed_precision of the accelerate config",
    "prescale_gradients": "--STAGE.optim",
    "gradient_predivide_factor": "--STAGE.optim",
    "sparse_gradients": "--STAGE.optim",
}
OFFLOADS = ("offload_optimizer", "offload_param")
SCRIPTS = ("accelerate", "accelerate-launch", "torchrun")
FILES = ("accelerate/commands/launch.py", "torch/distributed/run.py")
MODULES = ("accelerate.commands.launch", "torch.distributed.run", "torch.distributed.launch")
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
    """Return whether this process will run on a GPU."""
    return torch.cuda.is_available() and not is_set("ACCELERATE_USE_CPU")


def precision_asked() -> str:
    """Return the launch's `mixed_precision`: no, bf16 or fp16."""
    # accelerate's notebook_launcher sets the second variable, which Accelerator does not read.
    return os.environ.get("ACCELERATE_MIXED_PRECISION") or os.environ.get("MIXED_PRECISION") or "no"


def use_all_cores() -> int:
    """Use this process's share of the physical cores, unless the user has set OMP_NUM_THREADS; returns the threads.

    Launchers set it to 1. torch's threads change at once, and DeepSpeed's Adam with them (its extension uses torch's
    OpenMP); the variable is for libraries that are loaded later.
    """
    if not _user_set_threads():
        cores = min(psutil.cpu_count(logical=False) or os.cpu_count() or 1, host.usable_cores())
        num = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        os.environ["OMP_NUM_THREADS"] = str(num)
        torch.set_num_threads(num)
    return torch.get_num_threads()


class OwnLaunch(NamedTuple):
    """A launch by `--launch` of our own commands.

    Attributes:
        launcher: its process.
        command: the words that started it, without the options of the run.
        config: the accelerate config.
        sets_threads: OMP_NUM_THREADS was set by the user.
    """

    launcher: int
    command: list[str]
    config: str
    sets_threads: bool


def announce(command: Sequence[str], config: Path) -> None:
    """Let the processes that this one will launch know how they were launched."""
    ours = OwnLaunch(os.getpid(), list(command), str(config), "OMP_NUM_THREADS" in os.environ)
    os.environ[LAUNCH_VARIABLE] = json.dumps(ours)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch's launcher would set it with a warning of 5 lines


def own_launch() -> OwnLaunch | None:
    """Return how our own launcher started this process; None if another one has, or none."""
    text = os.environ.get(LAUNCH_VARIABLE)
    ours = OwnLaunch(*json.loads(text)) if text else None
    return ours if ours and ours.launcher == os.getppid() else None


def configs_folder() -> Path:
    """Return the folder of accelerate_configs/ and ds_configs/: the checkout, or the package once it is installed."""
    return CHECKOUT if (CHECKOUT / "accelerate_configs").is_dir() else CHECKOUT / "sapiens_accel"


def find_launch(name: str) -> Path:
    """Return the accelerate config that `--launch` names: one of accelerate_configs/, or a file.

    Raises:
        UserError: there is none.
    """
    if name.endswith((".yaml", ".yml", ".json")):
        if not Path(name).is_file():
            raise UserError(f"--launch {name}: no such file (expected an accelerate config, or a name such as zero2)")
        return Path(name).resolve()
    folder = configs_folder() / "accelerate_configs"
    names = sorted(path.stem for path in folder.glob("*.yaml"))
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"--launch {name}: no such launch (expected one of {', '.join(names)}, or a file){hint}")
    return folder / f"{name}.yaml"


def is_of_one_process(config: Path) -> bool:
    """Whether accelerate starts one process by this file, whatever `--num_processes` says."""
    try:
        tree = yaml.safe_load(config.read_text())
    except (yaml.YAMLError, OSError, UnicodeDecodeError):
        return False  # accelerate says what is wrong with it
    return isinstance(tree, dict) and tree.get("distributed_type") in ("NO", False)  # NO without quotes is False


def _user_set_threads() -> bool:
    """Return whether OMP_NUM_THREADS was set before the launcher started, by the launcher's environment."""
    if ours := own_launch():
        return ours.sets_threads
    launcher = _launcher()
    if launcher is None:
        return "OMP_NUM_THREADS" in os.environ
    try:
        return "OMP_NUM_THREADS" in launcher.environ() or any(
            "num_cpu_threads" in word.replace("-", "_") for word in launcher.cmdline()
        )
    except psutil.Error:
        return False


def _launcher() -> psutil.Process | None:
    """Return the process that launched this one, if it is accelerate or torchrun."""
    for process in psutil.Process().parents()[:3]:
        try:
            if is_launcher(process.cmdline()):
                return process
        except psutil.Error:
            return None
    return None


def words_before_script() -> list[str] | None:
    """Return the words of this launch before the script: of accelerate's launcher, torchrun or the interpreter.

    None where several processes run and neither has launched them, or on several machines, whose words differ.
    """
    launcher = _launcher()
    if int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1:
        return None
    if sys.argv[0].startswith("sapiens-accel "):
        return []
    if launcher is None:
        several = int(os.environ.get("WORLD_SIZE", "1")) > 1
        return None if several else _before_arguments(sys.orig_argv) or ["python"]
    try:
        return _before_arguments(launcher.cmdline())
    except psutil.Error:
        return None


def _before_arguments(words: Sequence[str]) -> list[str] | None:
    """The words before the script and its arguments, programs by their names where PATH finds them by these."""
    program = [*program_words(), *sys.argv[1:]]
    if len(words) <= len(program) or list(words[-len(program) :]) != program:
        return None
    before = list(words[: -len(program)])
    if Path(before[0]).name.startswith("python") and len(before) > 1 and Path(before[1]).name in SCRIPTS:
        del before[0]  # the interpreter of a script that is started by its name
    name = Path(before[0]).name
    return [name if shutil.which(name) == before[0] else before[0], *before[1:]]  # links to another environment differ


def is_launcher(words: Sequence[str]) -> bool:
    """Return whether a command line is that of accelerate's launcher or torchrun.

    By the program only: its folder and arguments may contain the word accelerate too.
    """
    words = list(words)
    if words and re.fullmatch(r"python[\d.]*", Path(words[0]).name):
        del words[0]
        while words and words[0].startswith("-") and words[0] != "-m":  # the interpreter's own options
            del words[: 2 if words[0] in ("-X", "-W") else 1]
    if words[:1] == ["-m"]:
        return any(word in MODULES for word in words[1:2])
    return any(Path(word).name in SCRIPTS or word.endswith(FILES) for word in words[:1])


def config_file() -> Path | None:
    """Return the accelerate config that this process's launcher has read, if any."""
    if ours := own_launch():
        return Path(ours.config)
    launcher = _launcher()
    try:
        words = launcher.cmdline() if launcher else []
        if launcher is None or not any("accelerate" in word for word in words[:3]):
            return None
        for index, word in enumerate(words):
            name, _, value = word.partition("=")
            if name.replace("-", "_") == "__config_file":  # both spellings are accelerate's
                return Path(launcher.cwd(), value or words[index + 1])
    except psutil.Error:
        return None
    return Path(default_config_file) if Path(default_config_file).is_file() else None


def check() -> None:
    """Refuse settings that this package cannot run, and find the DeepSpeed JSON of the launch.

    Environment variables are changed: the path of the JSON becomes absolute, and accelerate's list of keys beside it
    is cleared once their values are known to agree (accelerate would refuse them, even `mixed_precision`, which it
    passes itself).

    Raises:
        UserError: with the file and the key.
    """
    where = config_file() or "the launch"
    _check_environment(where)
    _check_processes(where)
    if not uses_deepspeed():
        return
    if not uses_cuda():
        # DeepSpeed would find that itself, with a warning of each process.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if "LOCAL_RANK" not in os.environ:
        raise UserError(
            "DeepSpeed needs its launcher: accelerate launch --config_file accelerate_configs/zero2.yaml train.py"
        )
    if is_set("ACCELERATE_USE_CPU"):
        raise UserError(
            f"{where}: ACCELERATE_USE_CPU would drop ZeRO (expected unset). Without a GPU it runs on the CPU"
        )
    if name := os.environ.get(JSON_VARIABLE):
        file = find_json(name, where)
        _check_json(file, where)
        os.environ[JSON_VARIABLE], os.environ[FIELDS_VARIABLE] = str(file), ""
    _prepare_host()


def zero_config() -> Mapping[str, Any]:
    """Return `zero_optimization` of the launch's DeepSpeed config; without a JSON, from accelerate's own keys."""
    if name := os.environ.get(JSON_VARIABLE):
        return json.loads(Path(name).read_text())["zero_optimization"]
    parts = ("offload_optimizer", "offload_param")
    devices = {part: os.environ.get(f"ACCELERATE_DEEPSPEED_{part.upper()}_DEVICE", "none") for part in parts}
    stage = int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))
    return {"stage": stage, **{part: {"device": device} for part, device in devices.items()}}


def _prepare_host() -> None:
    """Prepare what DeepSpeed compiles, and the cores for its optimizer step on the host."""
    zero = zero_config()
    needed = extensions.needed_operations(zero, cuda=uses_cuda())
    extensions.check_builds(needed)
    if os.environ["LOCAL_RANK"] == "0":
        extensions.prepare_builds(needed)
    if "cpu_adam" in needed:
        use_all_cores()


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
                f"{where}: {key}: {value} has no effect here (expected no such key). Take it out, and use {OURS[key]}"
            )


def _check_processes(where: Path | str) -> None:
    """Refuse several processes of a configuration file by which accelerate has started one, without a word."""
    asked = re.search(r"--num[_-]processes[ =](\d+)", " ".join(words_before_script() or []))
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1  # else flags such as --multi_gpu had the last word
    if asked and int(asked[1]) > 1 and alone and isinstance(where, Path) and is_of_one_process(where):
        raise UserError(
            f"{where}: --num_processes {asked[1]} has started one process, as distributed_type NO does (expected "
            f"{asked[1]}, found 1). Take another file, such as accelerate_configs/zero2.yaml, which runs on CPUs too"
        )


def find_json(name: str, where: Path | str) -> Path:
    """Find a DeepSpeed JSON: in the working folder, beside or above the accelerate config `where`, or in this checkout.

    Raises:
        UserError: it is in none of these folders.
    """
    beside = [where.parent, where.parent.parent] if isinstance(where, Path) else []
    searched = (Path.cwd(), *beside, configs_folder())
    for folder in searched:
        with contextlib.suppress(OSError):  # a name that is too long to be one
            if (folder / name).is_file():
                return (folder / name).resolve()
    folders = ", ".join(str(folder) for folder in dict.fromkeys(searched))
    raise UserError(f"{where}: deepspeed_config_file: {name} is not there (looked in {folders}). Give its whole path")


def _check_json(file: Path, where: Path | str) -> None:
    try:
        tree = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{file}: not a DeepSpeed config: {' '.join(str(error).split())} (expected JSON, as ds_configs/zero2.json)"
        ) from None
    zero = tree.get("zero_optimization") if isinstance(tree, dict) else None
    if not isinstance(zero, dict) or zero.get("stage") not in (0, 1, 2, 3):
        raise UserError(
            f"{file}: no ZeRO stage (expected zero_optimization with a stage of 0 to 3, as ds_configs/zero2.json)"
        )
    for name in ("bf16", "fp16", "zero_optimization"):
        parts = {name: tree.get(name)} if name != "zero_optimization" else {key: zero.get(key) for key in OFFLOADS}
        for key, value in parts.items():
            if value is not None and not isinstance(value, dict):
                raise UserError(f"{file}: {key} is {json.dumps(value)} (expected an object, as in ds_configs)")
    if refused := [key for key in REFUSED if zero.get(key) is not None]:
        raise UserError(f"{file}: zero_optimization.{refused[0]} {REFUSED[refused[0]]}")
    if zero["stage"] == 0 and precision_asked() != "no":
        raise UserError(
            f"{file}: ZeRO stage 0 in {precision_asked()} cannot be saved whole (expected stage 1 to 3, or "
            "mixed_precision 'no'). Take accelerate_configs/multi_gpu.yaml for no ZeRO"
        )
    if sizes := [key for key, value in zero.items() if value == "auto" and key not in ("stage", "overlap_comm")]:
        raise UserError(
            f'{file}: zero_optimization.{sizes[0]} is "auto", which depends on a size that this model has not '
            "(expected a number). Take it out, or the number in ds_configs/zero2.json"
        )
    for key, option in OURS.items():
        if tree.get(key, "auto") != "auto":
            raise UserError(f"{file}: {key} is not for this file (expected no such key). Take it out, and use {option}")
    asked = precision_asked()
    for name in ("bf16", "fp16"):
        enabled = (tree.get(name) or {}).get("enabled", "auto")
        if enabled != "auto" and enabled != (asked == name):
            elsewhere = f"mixed_precision is {asked} in {where}"
            raise UserError(f'{file}: {name}.enabled is {json.dumps(enabled)}, and {elsewhere} (expected "auto")')
    for key, value, in_json in _options_in_both(where, zero):
        if value != in_json:
            raise UserError(f"{where}: {key} is {value}, and {in_json} in {file}. Change one of them")


def check_enabled(precision: str) -> None:
    """Refuse a DeepSpeed JSON that enables another precision than the one that this device runs in.

    Raises:
        UserError: with the file and the key.
    """
    if not uses_deepspeed() or not (name := os.environ.get(JSON_VARIABLE)):
        return
    tree = json.loads(Path(name).read_text())
    for kind in ("bf16", "fp16"):
        if (tree.get(kind) or {}).get("enabled", "auto") is True and kind != precision:
            raise UserError(
                f'{name}: {kind}.enabled is true, and this device runs in {PRECISIONS[precision]} (expected "auto"). '
                f'Set it to "auto"'
            )


def _options_in_both(where: Path | str, zero: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Options that an accelerate config sets beside a DeepSpeed JSON: key, value, and the JSON's value."""
    fields = os.environ.get(FIELDS_VARIABLE, "").split(",")
    variables = {"zero_stage": "DEEPSPEED_ZERO_STAGE"}
    variables |= {
        f"offload_{part}_device": f"DEEPSPEED_OFFLOAD_{part.upper()}_DEVICE" for part in ("optimizer", "param")
    }
    for key, variable in variables.items():
        if key in fields:
            part = zero.get(key.removesuffix("_device")) or {}
            in_json = zero["stage"] if key == "zero_stage" else part.get("device", "none")
            yield key, os.environ.get(f"ACCELERATE_{variable}", ""), str(in_json)
    if isinstance(where, Path) and (named := re.match(r"zero(\d)(?!\d)", where.stem)):
        yield "the ZeRO stage of its name", named[1], str(zero["stage"])
