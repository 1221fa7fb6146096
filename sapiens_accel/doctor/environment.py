"""The machine that a run would have: devices, precision, what DeepSpeed would compile, room on disk and host, the Hub.

Nothing is started, compiled or asked of a network, and DeepSpeed is looked at without being imported.
"""

import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import get_token

from sapiens_accel.config.schema import Config
from sapiens_accel.doctor.labels import Finding
from sapiens_accel.errors import UserError
from sapiens_accel.models import adapters, kernels
from sapiens_accel.models.sapiens import SIZES, SapiensPose
from sapiens_accel.pose.skeleton import Skeleton
from sapiens_accel.runtime import extensions, host
from sapiens_accel.runtime.device import problem_of_device
from sapiens_accel.runtime.distributed import BF16_CAPABILITY
from sapiens_accel.runtime.files import GIB
from sapiens_accel.runtime.launch import find_json, find_launch
from sapiens_accel.runtime.versions import package_version
from sapiens_accel.sources.coco import parse_json, show_value

PACKAGES = ("torch", "accelerate", "deepspeed", "transformers", "peft", "datasets", "opencv-python-headless", "numpy")
DRIVER = Path("/proc/driver/nvidia/version")
# Keys of accelerate's deepspeed_config, and the variables that pass them to the processes of a launch.
VARIABLES = {
    "deepspeed_config_file": "ACCELERATE_DEEPSPEED_CONFIG_FILE",
    "offload_optimizer_device": "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE",
    "offload_param_device": "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE",
}
SHARED = Path("/dev/shm")
SHARED_FOR_EACH = 256 * 2**20  # bytes of shared memory a loading process can fill with batches that wait


@dataclass(frozen=True, kw_only=True)
class Launch:
    """What an accelerate config says of a launch."""

    name: str = "python train.py"
    precision: str = "no"
    num_processes: int = 1
    deepspeed: bool = False
    zero: Mapping[str, Any] = field(default_factory=dict)


def read_launch(file: str | None) -> Launch:
    """The launch of an accelerate config; without one, of the launch that this process is in.

    Args:
        file: its file, or as of `train --launch` the name of one of accelerate_configs/.

    Raises:
        UserError: there is no such file, it is none of accelerate's, or its DeepSpeed JSON is missing or none.
    """
    if file is None:
        precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        with_deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
        variables = {key: os.environ.get(variable) for key, variable in VARIABLES.items()}
        zero = _zero(variables, "the launch") if with_deepspeed else {}
        ranks = _processes(os.environ.get("WORLD_SIZE", "1"), "WORLD_SIZE")
        return Launch(precision=precision, num_processes=ranks, deepspeed=with_deepspeed, zero=zero)
    where, name = f"--launch {file}", f"accelerate launch --config_file {file}"
    if Path(file).name == file and not Path(file).suffix:
        name, file = " ".join(("sapiens-accel", "train", where)), str(find_launch(file))
    try:
        tree = yaml.safe_load(Path(file).read_text())
    except Exception as error:  # of an odd YAML also KeyError, AttributeError, RecursionError
        raise UserError(f"{where}: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(tree, dict) or "distributed_type" not in tree:
        raise UserError(f"{where}: expected one of accelerate's configs, such as accelerate_configs/zero2.yaml")
    of_deepspeed = tree.get("deepspeed_config") or {}
    if not isinstance(of_deepspeed, dict):
        raise UserError(f"{where}: deepspeed_config: expected keys as accelerate's, found {show_value(of_deepspeed)}")
    return Launch(
        name=name,
        precision=str(tree.get("mixed_precision") or "no"),  # an unquoted no is false to YAML
        num_processes=_processes(tree.get("num_processes", 1), f"{where}: num_processes"),
        deepspeed=tree["distributed_type"] == "DEEPSPEED",
        zero=_zero(of_deepspeed, Path(file).absolute()),
    )


def _processes(value: Any, where: str) -> int:
    try:
        return int(value)
    except (TypeError, ValueError):
        raise UserError(f"{where}: expected the number of processes, found {show_value(value)}") from None


def _zero(options: Mapping[str, Any], of: Path | str) -> Mapping[str, Any]:
    """What DeepSpeed's JSON says of ZeRO; without one, where accelerate's own keys put what is offloaded."""
    name = options.get("deepspeed_config_file")
    if not name:
        devices = {name: options.get(f"{name}_device") or "none" for name in ("offload_optimizer", "offload_param")}
        return {name: {"device": str(device)} for name, device in devices.items()}
    file = find_json(str(name), of)
    tree = parse_json(file)
    zero = (tree.get("zero_optimization") or {}) if isinstance(tree, dict) else tree
    parts = [zero.get(f"offload_{part}") or {} for part in ("optimizer", "param")] if isinstance(zero, dict) else [zero]
    if not all(isinstance(part, dict) for part in parts):
        raise UserError(
            f"--launch {of}: {file}: expected DeepSpeed's JSON, with objects for zero_optimization and what it offloads"
        )
    return zero


def check_machine(run: Config, launch: Launch, skeleton: Skeleton) -> list[Finding]:
    """What is there for this run, and what is missing."""
    return [
        _packages(),
        *_needed_packages(run),
        *_devices(),
        *_precision(launch),
        *_attention(run, launch),
        *_operations(launch),
        *_disk(run, skeleton),
        *_host(run),
        *_hub(run),
    ]


def _finding(level: Any, check: str, text: str, *culprits: str) -> Finding:
    return Finding(level=level, check=check, text=text, culprits=culprits)


def _packages() -> Finding:
    listed = ", ".join(f"{name} {package_version(name) or 'missing'}" for name in PACKAGES)
    return _finding("note", "packages", f"Python {sys.version.split()[0]}, {listed}")


def _needed_packages(run: Config) -> Iterator[Finding]:
    """What options need and is not installed."""
    needed = {
        "--lora.rank": ("peft", run.lora.rank),
        "--model.base_dtype nf4": ("bitsandbytes", run.model.base_dtype == "nf4"),
        "--memory.adam_8bit": ("torchao", run.memory.adam_8bit),
        "--memory.fused_kernels": ("liger-kernel", run.memory.fused_kernels),
    }
    for option, (package, wanted) in needed.items():
        if wanted and package_version(package) is None:
            text = f"{option}: {package} is not installed. Run pip install {package}"
            yield _finding("error", "packages", text)


def _devices() -> Iterator[Finding]:
    driver = re.search(r"Kernel Module\D*([\d.]+)", DRIVER.read_text()) if DRIVER.is_file() else None
    driver_text = f"NVIDIA driver {driver[1]}" if driver else "no NVIDIA driver"
    if not torch.cuda.is_available():
        yield _finding("note", "gpu", f"none; training would run on {os.cpu_count()} CPU cores")
        if driver:
            build = f"torch {torch.__version__}, built for CUDA {torch.version.cuda or '-'}"
            yield _finding(
                "warning", "gpu", f"{driver_text} is here, but {build}, sees no GPU; install a build that fits it"
            )
        return
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        memory = f"{device.total_memory / GIB:.1f} GiB, compute capability {device.major}.{device.minor}"
        yield _finding("note", "gpu", f"{index}: {device.name}, {memory}; {driver_text}, CUDA {torch.version.cuda}")
        if problem := problem_of_device(index):
            yield _finding("error", "gpu", problem)


def _precision(launch: Launch) -> Iterator[Finding]:
    asked, cuda = launch.precision, torch.cuda.is_available()
    if asked == "bf16" and cuda and torch.cuda.get_device_capability() < BF16_CAPABILITY:
        yield _finding("note", "precision", "bf16 is asked for; this GPU has none: fp16 with loss scaling")
    elif asked == "fp16" and not cuda:
        yield _finding("note", "precision", "fp16 is asked for; a CPU has none: bf16")
    elif asked == "no" and cuda:
        yield _finding("warning", "precision", "fp32 on a GPU: a launch with bf16 or fp16 halves time and memory")
    else:
        yield _finding("note", "precision", {"no": "fp32"}.get(asked, asked))


def _attention(run: Config, launch: Launch) -> Iterator[Finding]:
    """The kernel that torch takes for the network's attention, on each kind of card."""
    if not torch.cuda.is_available():
        return
    size = SIZES[run.model.name]
    dim, cards = size.width // size.heads, {}
    for index in range(torch.cuda.device_count()):
        cards.setdefault(torch.cuda.get_device_name(index), torch.device("cuda", index))
    for name, device in cards.items():
        dtype = _dtype(launch, torch.cuda.get_device_capability(device))
        padded = kernels.needs_padding(kernels.capability_on(device), half=dtype in kernels.HALF)
        kernel = kernels.kernel_on(device, size.heads, size.kv_heads, dim, dtype)
        filled = f", heads of {dim} channels padded to {kernels.padded_dim(dim)}" if padded and dim % 8 else ""
        repeated = ", keys and values repeated for every head" if padded and size.kv_heads < size.heads else ""
        text = f"{run.model.name} on {name}: torch's {kernel} kernel{filled}{repeated}"
        if kernel == "math":
            text += ": slow, and it keeps maps of tokens x tokens that the memory plan does not know"
        yield _finding("warning" if kernel == "math" else "note", "attention", text)


def _dtype(launch: Launch, capability: tuple[int, int]) -> torch.dtype:
    """Of the arithmetic on a GPU."""
    if launch.precision == "no":
        return torch.float32
    return torch.bfloat16 if launch.precision == "bf16" and capability >= BF16_CAPABILITY else torch.float16


# ---- What DeepSpeed compiles on first use


def needed_operations(launch: Launch, cuda: bool) -> list[str]:
    """DeepSpeed's own C++ that this launch uses: with optimizer offload its Adam, with NVMe its file access."""
    if not launch.deepspeed:
        return []
    return extensions.needed_operations(launch.zero, cuda=cuda)


def _operations(launch: Launch) -> Iterator[Finding]:
    if not launch.deepspeed:
        return
    if package_version("deepspeed") is None:
        yield _finding("error", "deepspeed", f"{launch.name} needs DeepSpeed: pip install deepspeed")
        return
    needed = needed_operations(launch, torch.cuda.is_available())
    for lock, age in extensions.find_stale_locks(needed).items():
        text = f"{lock}: {age:.0f} s old, and no process here holds it; a launch would wait for it. Delete it"
        yield _finding("warning", "deepspeed lock", text, str(lock))
    missing = [name for name in needed if not extensions.is_built(name)]
    if not missing:
        built = f"{', '.join(needed)}: built already" if needed else "nothing"
        yield _finding("note", "deepspeed", f"to compile for {launch.name}: {built}")
        return
    lacks = list(extensions.missing_tools())
    text = f"{launch.name}: compiles {', '.join(missing)} on first use ({extensions.BUILD_TIME})"
    if lacks:
        yield _finding("error", "deepspeed", f"{text}, and {', '.join(lacks)} missing", *missing)
    else:
        yield _finding(
            "note",
            "deepspeed",
            f"{text} with {extensions.compiler()}; CUDA_HOME {_cuda_home() or 'is not set'}",
            *missing,
        )


def _cuda_home() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc")
    return home or (str(Path(nvcc).resolve().parent.parent) if nvcc else None)


# ---- Room


def _disk(run: Config, skeleton: Skeleton) -> Iterator[Finding]:
    folder = Path(run.output_dir).absolute()
    while not folder.is_dir():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    needs = disk_bytes(run, skeleton)
    text = f"{free / GIB:.1f} GiB free in {folder}; the run writes about {needs / GIB:.1f} GiB"
    yield _finding("note" if free > 1.1 * needs else "error", "disk", text)
    if not os.access(folder, os.W_OK):
        yield _finding("error", "disk", f"{folder} may not be written to; give another --output_dir")


def disk_bytes(run: Config, skeleton: Skeleton) -> float:
    """What a run leaves: 4 bytes a parameter for each stage's weights (ssl: two), 16 and weights for a checkpoint.

    One checkpoint more is there while the next one is written, and one is the best. A stage with adapters also leaves
    its base, and its checkpoints hold the weights and the state of what learns alone.
    """
    total = 0.0
    for stage in run.stages:
        with torch.device("meta"):
            model = SapiensPose(run.model.name, skeleton.num_keypoints, run.data.input_hw)
            parameters = learning = sum(parameter.numel() for parameter in model.parameters())
            model.freeze(run.get_stage(stage).frozen)
            adapted = adapters.add(model, run.lora) > 0
        if adapted:
            learning = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        networks, checkpoints = 2 if run.get_stage(stage).teacher else 1, run.keep_checkpoints + 2
        total += (4 * networks + 4 * adapted + checkpoints * 4 * networks) * parameters
        total += checkpoints * (12 + 4 * networks) * learning
    return total


def _host(run: Config) -> Iterator[Finding]:
    workers = run.data.num_workers
    cores = host.usable_cores()
    text = f"{host.free_bytes() / GIB:.1f} GiB of memory free, {cores} CPU cores for {workers} loading processes"
    yield _finding("note" if workers <= cores else "warning", "host", text)
    if workers and SHARED.is_dir() and (free := shutil.disk_usage(SHARED).free) < workers * SHARED_FOR_EACH:
        text = f"{free / 2**20:.0f} MiB of shared memory for {workers} loading processes; docker run --shm-size 4g"
        yield _finding("warning", "host", text)


def _hub(run: Config) -> Iterator[Finding]:
    """Whether there is a token; never the token."""
    if get_token():
        yield _finding("note", "hub", "a token of the Hugging Face Hub is here (not shown)")
    elif run.push_to_hub:
        yield _finding("error", "hub", "--push_to_hub needs a token: hf auth login, or set HF_TOKEN")
    else:
        yield _finding("note", "hub", "no token of the Hugging Face Hub; only pushing and gated weights need one")
