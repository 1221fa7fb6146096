"""The launch of this process: Accelerator, device, precision, ZeRO stage, and collectives."""

import io
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import AutocastKwargs, DistributedType, InitProcessGroupKwargs, patch_environment
from torch import Tensor

from sapiens_accel.errors import UserError, count, remember_launch
from sapiens_accel.runtime import launch, signals
from sapiens_accel.runtime.device import check_device

BF16_CAPABILITY = (8, 0)
# Messages of Gloo and NCCL for a lost process. ncclSystemError (for example a small /dev/shm) is none.
LOST = re.compile(r"connection (closed|reset|refused)|ncclRemoteError", re.IGNORECASE)
LOST_SECONDS = 10
PATIENCE = timedelta(hours=3)  # the other ranks wait while rank 0 reads and checks data or converts a checkpoint
PARTS = ("optimizer", "param")  # of a training state that DeepSpeed can offload
CHECK_SECONDS = 0.5  # between two questions of rank 0 whether a stop was asked for
RUNNING, DONE, STOPPED = 0.0, 1.0, 2.0
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """How a launch distributes a training state.

    Attributes:
        zero: DeepSpeed's ZeRO stage; 0 without ZeRO.
        num_ranks: processes, one for each device.
        num_local: those on this machine.
        half: 16-bit arithmetic.
        bf16: bf16 arithmetic, whose gradients are accumulated in fp32.
        offload: the optimizer's state is in host memory; gradients are copied there during the backward.
        offload_weights: the weights are in host memory, and are copied to the device when they are used.
        bucket: elements of the gradient buffers, all buffers of one device.
        live: ZeRO-3: gathered weights that may be on a device at a time, elements.
    """

    zero: int = 0
    num_ranks: int = 1
    num_local: int = 1
    half: bool = True
    bf16: bool = True
    offload: bool = False
    offload_weights: bool = False
    bucket: int = 0
    live: int = 0


def start() -> Accelerator:
    """Create the Accelerator of this launch, in the precision that was asked for if the device has it.

    Raises:
        UserError: the launch asks for something that this package cannot run.
    """
    signals.follow_launcher()
    ours = launch.own_launch()
    if ours:
        remember_launch(ours.command, [])
    else:
        remember_launch(launch.words_before_script())
    launch.check()
    cuda, with_deepspeed = launch.uses_cuda(), launch.uses_deepspeed()
    if cuda:
        check_device(int(os.environ.get("LOCAL_RANK") or torch.cuda.current_device()))
    precision = precision_of_device(launch.precision_asked(), cuda)
    launch.check_enabled(precision)
    # Without a backend, DeepSpeed on a CPU counts one process; with cpu=True, ZeRO would silently be dropped.
    # The others wait while rank 0 reads and checks the data, which takes minutes for COCO on a slow disk.
    backend = "gloo" if not cuda and "LOCAL_RANK" in os.environ else None
    if cuda and not {"LOCAL_RANK", "ACCELERATE_TORCH_DEVICE"} & set(os.environ):
        # Accelerate's device for a single process has no index, which several functions of torch.cuda need.
        os.environ["ACCELERATE_TORCH_DEVICE"] = f"cuda:{torch.cuda.current_device()}"
    # Each weight is used once in a forward: autocast's cache of 16-bit copies would only take memory.
    handlers = [
        InitProcessGroupKwargs(backend=backend, timeout=PATIENCE),
        AutocastKwargs(cache_enabled=False),
    ]
    with redirect_stdout(io.StringIO()) if with_deepspeed else nullcontext():  # each process: "... built successfully"
        accelerator = Accelerator(
            mixed_precision=precision,
            cpu=not cuda and not with_deepspeed,
            kwargs_handlers=handlers,  # pyright: ignore[reportArgumentType]
        )
    expected = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != expected:
        raise UserError(f"{expected} processes were launched, but Accelerate sees {accelerator.num_processes}")
    return accelerator


@contextmanager
def use_in_process(mixed_precision: launch.Precision | None) -> Iterator[None]:
    """Run in a Python session: in the precision given, or in that of the launch; the next call may have another one.

    accelerate keeps its state for the whole process, and with it notebook_launcher starts no others.
    """
    given = {} if mixed_precision is None else {"accelerate_mixed_precision": mixed_precision}
    try:
        with patch_environment(**given):
            yield
    finally:
        if not torch.distributed.is_initialized():
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()


def precision_of_device(asked: str, cuda: bool) -> str:
    """Return the precision that was asked for, or the other 16-bit one if the device lacks it.

    bf16 needs compute capability 8.0: torch emulates it on older GPUs, slowly. On a CPU neither DeepSpeed nor
    accelerate train in fp16.
    """
    if asked == "bf16" and cuda and torch.cuda.get_device_capability() < BF16_CAPABILITY:
        return "fp16"
    return "bf16" if asked == "fp16" and not cuda else asked


def stop() -> None:
    """Destroy the process group, if there is one, so that the launcher sees a clean end."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def description(accelerator: Accelerator) -> str:
    """Describe processes, device, ZeRO stage and precision in one line."""
    device = torch.cuda.get_device_name(accelerator.device) if accelerator.device.type == "cuda" else "CPU"
    zero = f", ZeRO-{zero_stage(accelerator)}" if is_deepspeed(accelerator) else ""
    precision, asked = accelerator.mixed_precision, launch.precision_asked()
    why = ""
    if asked == "bf16" and precision == "fp16":
        why = " with loss scaling (bf16 was asked for; this GPU's compute capability is below 8.0)"
    elif asked == "fp16" and precision == "bf16":
        why = " (fp16 was asked for; a CPU has none)"
    elif precision == "no" and accelerator.device.type == "cuda":
        why = " (mixed_precision is 'no'; an accelerate config with bf16 or fp16 halves time and memory)"
    processes = count(accelerator.num_processes, "process")
    return f"{processes} on {device}{zero}, {launch.PRECISIONS[precision]}{why}"


def is_deepspeed(accelerator: Accelerator) -> bool:
    return accelerator.distributed_type == DistributedType.DEEPSPEED


def zero_stage(accelerator: Accelerator) -> int:
    return int(deepspeed_config(accelerator).get("zero_optimization", {}).get("stage", 0))


def deepspeed_config(accelerator: Accelerator) -> dict[str, Any]:
    """Return the config object of DeepSpeed's plugin; an empty one without DeepSpeed."""
    plugin = accelerator.state.deepspeed_plugin if is_deepspeed(accelerator) else None
    return plugin.deepspeed_config if plugin else {}


def autocast_dtype(accelerator: Accelerator) -> torch.dtype | None:
    """Return the dtype of mixed-precision arithmetic, None for fp32."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)


@contextmanager
def explain_lost_ranks(accelerator: Accelerator) -> Iterator[None]:
    """Replace the traceback of a collective that fails because another process has ended by one line.

    Raises:
        UserError: after LOST_SECONDS. On one machine the launcher ends this process before that, so that only the
            process that failed prints its line.
    """
    try:
        yield
    except RuntimeError as error:
        if accelerator.num_processes == 1 or not LOST.search(str(error)):
            raise
        time.sleep(LOST_SECONDS)
        text = " ".join(str(error).split())[-400:]
        raise UserError(
            f"rank {accelerator.process_index}: another process of this launch has ended: {text}. See its output, "
            "and restart all machines with --resume_from_checkpoint latest"
        ) from None


def gather(accelerator: Accelerator, tensor: Tensor) -> Tensor:
    """Concatenate the tensors of all ranks, of equal shape, along their first dimension."""
    return torch.as_tensor(accelerator.gather(tensor))


def gather_parts(whole: Tensor) -> None:
    """All-gather in place a flat tensor of equal parts, of which each rank has written its own.

    Nothing is allocated. All ranks must call it.
    """
    rank, num = torch.distributed.get_rank(), torch.distributed.get_world_size()
    part = len(whole) // num
    as_bytes = whole.view(torch.uint8)  # gloo does not know every dtype
    width = whole.element_size() * part
    torch.distributed.all_gather_into_tensor(as_bytes, as_bytes[rank * width : (rank + 1) * width])


def strategy(accelerator: Accelerator) -> Strategy:
    """Return how this launch distributes a training state, for the memory plan."""
    ranks, precision = accelerator.num_processes, accelerator.mixed_precision
    local = int(os.environ.get("LOCAL_WORLD_SIZE") or ranks)
    zero_config = deepspeed_config(accelerator).get("zero_optimization", {})
    return strategy_of(zero_config, num_ranks=ranks, num_local=local, precision=precision)


def strategy_of(zero_config: Mapping[str, Any], *, num_ranks: int, num_local: int, precision: str) -> Strategy:
    """Interpret the `zero_optimization` of a DeepSpeed config; an empty one means no DeepSpeed."""
    offload, offload_weights = (
        (zero_config.get(f"offload_{part}") or {}).get("device", "none") != "none" for part in PARTS
    )
    zero = int(zero_config.get("stage", 0))
    buffers = 2 if zero in (1, 2) and overlaps(zero_config, num_ranks) else 1
    prefetched = zero_config.get("stage3_prefetch_bucket_size", 50_000_000)
    return Strategy(
        zero=zero,
        num_ranks=num_ranks,
        num_local=num_local,
        half=precision != "no",
        bf16=precision == "bf16",
        offload=offload,
        offload_weights=offload_weights,
        bucket=buffers * zero_config.get("reduce_bucket_size", 500_000_000) if zero else 0,
        live=zero_config.get("stage3_max_live_parameters", 1_000_000_000) + prefetched if zero == 3 else 0,
    )


def overlaps(zero_config: Mapping[str, Any], num_ranks: int) -> bool:
    """Return whether DeepSpeed overlaps communication with computation.

    With other ranks or with the host. A single rank without offload would only pay for it: a second bucket and a wait.
    """
    offloads = any((zero_config.get(f"offload_{part}") or {}).get("device", "none") != "none" for part in PARTS)
    return bool(zero_config.get("overlap_comm", zero_config.get("stage") == 3)) and (num_ranks > 1 or offloads)


def free_bytes(accelerator: Accelerator) -> int | None:
    """Return the GPU memory available to a stage: the least of all ranks, so that plans agree. None on a CPU."""
    device = accelerator.device
    if device.type != "cuda":
        return None
    reserved, allocated = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
    free, total = torch.cuda.mem_get_info(device)
    allowed = torch.cuda.get_per_process_memory_fraction(device) * total
    return int(least(accelerator, min(free + reserved, allowed) - allocated))


def least(accelerator: Accelerator, value: float) -> float:
    """Return the smallest of all ranks' values, so that they decide alike; through host memory, as `any_rank`."""
    if accelerator.num_processes == 1:
        return value
    own = torch.tensor(value, dtype=torch.float64)
    torch.distributed.all_reduce(own, torch.distributed.ReduceOp.MIN, group=_host_group())
    return float(own)


def most(accelerator: Accelerator, value: float) -> float:
    """Return the largest of all ranks' values."""
    return -least(accelerator, -value)


def any_rank(accelerator: Accelerator, flag: bool) -> bool:
    """Return whether a flag is set on any rank; through host memory, so that no device is synchronized."""
    if accelerator.num_processes == 1:
        return flag
    flags = torch.tensor(int(flag))
    torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX, group=_host_group())
    return bool(flags)


def run_on_main(accelerator: Accelerator, action: Callable[[Callable[[], None]], Result]) -> Result | None:
    """Run an action of minutes on rank 0; a stop that is asked for on any rank ends it. All ranks must call it.

    Args:
        action: gets a function to call often, which raises if a stop was asked for.

    Returns:
        The action's result on rank 0, None on the others.

    Raises:
        EvaluationStopped: on all ranks: a stop was asked for (`signals.StopRequest`).
    """
    last = time.monotonic()

    def share(own: float) -> float:
        state = most(accelerator, STOPPED if signals.is_stop_asked() else own)
        if state == STOPPED:
            raise signals.EvaluationStopped
        return state

    def check() -> None:
        nonlocal last
        if time.monotonic() - last > CHECK_SECONDS:
            share(RUNNING)
            last = time.monotonic()

    if not accelerator.is_main_process:
        while share(RUNNING) == RUNNING:
            pass  # rank 0 decides when
        return None
    result = action(check)
    share(DONE)
    return result


@lru_cache(maxsize=1)
def _host_group() -> Any:
    """Create a process group of gloo, once. All ranks must call it together."""
    if torch.distributed.get_backend() == "gloo":
        return torch.distributed.group.WORLD
    if name := os.environ.get("NCCL_SOCKET_IFNAME"):  # other machines cannot reach a host name of 127.0.1.1 (Debian)
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name.lstrip("=^").split(",")[0])
    try:
        return torch.distributed.new_group(backend="gloo", timeout=PATIENCE)
    except RuntimeError as error:
        raise UserError(
            f"this launch: the machines cannot reach each other by host name ({' '.join(str(error).split())[-200:]}). "
            "Set GLOO_SOCKET_IFNAME to the network interface between them (ip addr shows them)"
        ) from None


def world(accelerator: Accelerator) -> dict[str, Any]:
    """Return what decides whether this launch can load another one's state."""
    return {
        "num_processes": accelerator.num_processes,
        "zero_stage": zero_stage(accelerator),
        "precision": accelerator.mixed_precision,
    }
