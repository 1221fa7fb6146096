"""The Accelerator, DeepSpeed's values, and whole fp32 parameters: the only file that knows of several devices.

One recipe means the same training on 1 or on 8 devices: `share_of` derives micro-batch and accumulation from the global
batch, and `prepare` writes them, with the clipping, into DeepSpeed's config anew for each stage (its "auto" values are
filled once only: a second stage would silently keep the first one's).
"""

import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs, DistributedType, InitProcessGroupKwargs
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Optimizer

from sapiens_accel.config.parse import Place, UserError
from sapiens_accel.data.dataset import Share
from sapiens_accel.models.sapiens import SapiensPose
from sapiens_accel.training.ema import MovingAverage, Ranks

BF16_CAPABILITY = (8, 0)


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """How a launch lays out a training state.

    Attributes:
        zero: DeepSpeed's ZeRO stage; 0 is none.
        num_ranks: processes, one a device.
        num_local: of them, those on this machine.
        half: 16-bit arithmetic ...
        bf16: ... in bf16, whose gradients are accumulated in fp32.
        offload: the optimizer's state lives on the host, and the gradients go there during the backward.
        offload_weights: the weights live there too, and come by when they are needed.
        bucket: elements of the buffers in which gradients are put together, all buffers of one device.
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
    """The Accelerator of this launch, at the best precision that was asked for and that the device really has."""
    cuda = torch.cuda.is_available()
    with_deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    if with_deepspeed and "LOCAL_RANK" not in os.environ:
        raise UserError("DeepSpeed needs its launcher: accelerate launch --config_file accelerate_configs/zero2.yaml")
    # Without a backend named, DeepSpeed on a CPU counts one process; with cpu=True, ZeRO would silently be dropped.
    # The others wait while rank 0 reads and checks the data, which takes COCO minutes on a slow disk.
    backend = "gloo" if not cuda and "LOCAL_RANK" in os.environ else None
    # Each weight is used once in a forward: autocast's cache would keep all of their 16-bit copies for nothing.
    handlers = [
        InitProcessGroupKwargs(backend=backend, timeout=timedelta(hours=3)),
        AutocastKwargs(cache_enabled=False),
    ]
    precision = _precision(os.environ.get("ACCELERATE_MIXED_PRECISION", "no"), cuda)
    accelerator = Accelerator(
        mixed_precision=precision,
        cpu=not cuda and not with_deepspeed,
        kwargs_handlers=handlers,  # pyright: ignore[reportArgumentType]
    )
    expected = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != expected:
        raise UserError(f"{expected} processes were launched, but Accelerate sees {accelerator.num_processes}")
    return accelerator


def _precision(asked: str, cuda: bool) -> str:
    """bf16 only where the hardware has it (compute capability 8.0): torch emulates it on older cards, slowly."""
    if asked == "bf16" and cuda and torch.cuda.get_device_capability() < BF16_CAPABILITY:
        return "fp16"
    return asked


def stop() -> None:
    """Leave the process group, if there is one, so that the launcher sees a clean end."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def description(accelerator: Accelerator) -> str:
    """One line: processes, device, ZeRO stage, precision and why."""
    device = torch.cuda.get_device_name() if accelerator.device.type == "cuda" else "CPU"
    zero = f", ZeRO-{zero_stage(accelerator)}" if is_deepspeed(accelerator) else ""
    precision = {"no": "fp32"}.get(accelerator.mixed_precision, accelerator.mixed_precision)
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    why = ""
    if asked == "bf16" and precision == "fp16":
        why = " with loss scaling (bf16 was asked for; this GPU's compute capability is below 8.0)"
    elif precision == "fp32" and accelerator.device.type == "cuda":
        why = " (mixed_precision is 'no'; an accelerate config with bf16 or fp16 halves time and memory)"
    return f"{accelerator.num_processes} process(es) on {device}{zero}, {precision}{why}"


def is_deepspeed(accelerator: Accelerator) -> bool:
    return accelerator.distributed_type == DistributedType.DEEPSPEED


def zero_stage(accelerator: Accelerator) -> int:
    return int(_deepspeed_config(accelerator).get("zero_optimization", {}).get("stage", 0))


def _deepspeed_config(accelerator: Accelerator) -> dict[str, Any]:
    """The live config of DeepSpeed's plugin; an empty one without DeepSpeed."""
    plugin = accelerator.state.deepspeed_plugin if is_deepspeed(accelerator) else None
    return plugin.deepspeed_config if plugin else {}


def autocast_dtype(accelerator: Accelerator) -> torch.dtype | None:
    """The dtype of mixed-precision arithmetic, None for fp32."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)


def gather(accelerator: Accelerator, tensor: Tensor) -> Tensor:
    """The tensors of all ranks, of one shape, concatenated along their first dimension."""
    return torch.as_tensor(accelerator.gather(tensor))


def share_parts(whole: Tensor) -> None:
    """Fill a flat tensor of one equal part for each rank, of which each has written its own, on all of them.

    In place: neither side allocates anything. All ranks must call it.
    """
    rank, num = torch.distributed.get_rank(), torch.distributed.get_world_size()
    part = len(whole) // num
    as_bytes = whole.view(torch.uint8)  # gloo does not know every dtype
    width = whole.element_size() * part
    torch.distributed.all_gather_into_tensor(as_bytes, as_bytes[rank * width : (rank + 1) * width])


def moving_average(accelerator: Accelerator, network: nn.Module, place: Place) -> MovingAverage:
    """The average of what `network` begins with, shared among the ranks where it is not kept whole on the device."""
    several = accelerator.num_processes > 1
    ranks = Ranks(accelerator.process_index, accelerator.num_processes, share_parts) if several else Ranks()
    dtype = autocast_dtype(accelerator) or torch.float32
    return MovingAverage(network, place, device=accelerator.device, dtype=dtype, ranks=ranks)


def strategy(accelerator: Accelerator) -> Strategy:
    """How this launch lays out a training state, for the memory plan."""
    ranks, precision = accelerator.num_processes, accelerator.mixed_precision
    local = int(os.environ.get("LOCAL_WORLD_SIZE") or ranks)
    zero_config = _deepspeed_config(accelerator).get("zero_optimization", {})
    return strategy_of(zero_config, num_ranks=ranks, num_local=local, precision=precision)


def strategy_of(zero_config: Mapping[str, Any], *, num_ranks: int, num_local: int, precision: str) -> Strategy:
    """What the `zero_optimization` of a DeepSpeed config means; an empty one is no DeepSpeed."""
    offload, offload_weights = (
        zero_config.get(f"offload_{part}", {}).get("device", "none") != "none" for part in ("optimizer", "param")
    )
    zero = int(zero_config.get("stage", 0))
    buffers = 2 if zero in (1, 2) and zero_config.get("overlap_comm") else 1
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


def free_bytes(accelerator: Accelerator) -> int | None:
    """Memory of a GPU that a stage can have: the least of all ranks, so that they plan alike. None on a CPU."""
    device = accelerator.device
    if device.type != "cuda":
        return None
    reserved, allocated = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
    free, total = torch.cuda.mem_get_info(device)
    allowed = torch.cuda.get_per_process_memory_fraction(device) * total
    return int(least(accelerator, min(free + reserved, allowed) - allocated))


def least(accelerator: Accelerator, value: float) -> float:
    """The smallest of all ranks' values, so that they decide alike."""
    own = torch.tensor([value], dtype=torch.float64, device=accelerator.device)
    return float(gather(accelerator, own).min())


def any_rank(accelerator: Accelerator, flag: bool) -> bool:
    """Whether it holds on any rank: all of them act alike. Over the hosts, so that no device is waited for."""
    if accelerator.num_processes == 1:
        return flag
    told = torch.tensor(int(flag))
    torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MAX, group=_host_group())
    return bool(told)


@lru_cache(maxsize=1)
def _host_group() -> Any:
    """A group that talks over the hosts' network; all ranks must ask for it at the same time, once."""
    is_gloo = torch.distributed.get_backend() == "gloo"
    return torch.distributed.group.WORLD if is_gloo else torch.distributed.new_group(backend="gloo")


def world(accelerator: Accelerator) -> dict[str, Any]:
    """What decides whether one launch can read another's state."""
    return {
        "num_processes": accelerator.num_processes,
        "zero_stage": zero_stage(accelerator),
        "precision": accelerator.mixed_precision,
    }


def prepare(
    accelerator: Accelerator, model: SapiensPose, optimizer: Optimizer, share: Share, clip_norm: float
) -> tuple[nn.Module, Any]:
    """The model and optimizer as this launch runs them."""
    accelerator.gradient_accumulation_steps = share.accumulation
    if is_deepspeed(accelerator):
        config = _deepspeed_config(accelerator)
        config.pop("train_batch_size", None)
        config["train_micro_batch_size_per_gpu"] = share.micro_batch
        config["gradient_accumulation_steps"] = share.accumulation
        config["gradient_clipping"] = clip_norm  # missing would mean 1.0
        config.pop("data_types", None)
        if share.accumulation > 1 and accelerator.mixed_precision == "bf16":
            # Sums of bf16 gradients lose their small terms.
            config["data_types"] = {"grad_accum_dtype": "fp32"}
        if accelerator.mixed_precision == "bf16":
            # In fp32 and fp16 it leaves out a step whose gradients are no numbers by itself.
            config["bf16"] = {**config.get("bf16", {}), "check_grad_overflow": True}
    if zero_stage(accelerator) == 3:
        from deepspeed.utils import set_z3_leaf_module

        set_z3_leaf_module(model.head, True)  # its weights are gathered once for all chunks, not for each
    prepared_model, prepared_optimizer = accelerator.prepare(model, optimizer)
    if accelerator.num_processes > 1 and prepared_model is model:
        raise RuntimeError("several processes, but the model is not wrapped: the ranks would diverge")
    return prepared_model, prepared_optimizer


def take_step(
    accelerator: Accelerator, model: nn.Module, optimizer: Any, clip_norm: float
) -> tuple[Tensor | float | None, bool]:
    """Clip the gradients to the global norm (0: not at all) and step, unless they are no numbers.

    Under DeepSpeed `accelerator.backward` has done both. The wait for one number here costs a kernel launch in a step
    of seconds, and saves the run.

    Returns:
        The norm as it was, and whether the step was taken.
    """
    if is_engine(model):
        engine: Any = model
        # Without ZeRO there is no such check; no launch that is shipped here runs so.
        return engine.get_global_grad_norm(), not getattr(engine.optimizer, "overflow", False)
    norm = accelerator.clip_grad_norm_(model.parameters(), clip_norm or float("inf"))
    if accelerator.scaler is None and norm is not None and not math.isfinite(norm):
        return norm, False
    optimizer.step()
    return norm, not optimizer.step_was_skipped


def is_engine(model: Any) -> bool:
    """Whether DeepSpeed runs this module: then it also sets the precision of its forward."""
    return hasattr(model, "get_global_grad_norm")


def drop_gradients(model: Any) -> None:
    """Free the gradients of a step that was cut off, and count it as not begun."""
    for parameter in model.parameters():
        parameter.grad = None
    if is_engine(model):
        model.micro_steps -= model.micro_steps % model.gradient_accumulation_steps()
        model.optimizer.zero_grad(set_to_none=True)


def save_state(accelerator: Accelerator, folder: Path, not_written: tuple[type[Exception], ...]) -> str | None:
    """Accelerate's state of this launch into a folder; what went wrong on this rank, if anything. For all ranks.

    DeepSpeed's ranks wait for each other inside: one whose disk is full must come to that point too.
    """
    problems: list[Exception] = []
    writer: Any = _engine(accelerator).checkpoint_engine if is_deepspeed(accelerator) else None
    if writer:

        def write(*args: Any, **kwargs: Any) -> None:
            try:
                type(writer).save(writer, *args, **kwargs)
            except not_written as error:
                problems.append(error)

        writer.save = write
    try:
        accelerator.save_state(str(folder))
    except not_written as error:
        problems.append(error)
    finally:
        if writer:
            del writer.save
    return " ".join(str(problems[0]).split())[:200] if problems else None


def load_universal(accelerator: Accelerator, folder: Path) -> None:
    """Restore what another number of processes saved under the same ZeRO stage (1 or 2). All ranks must call it.

    DeepSpeed's own converter writes the state parameter by parameter; each rank reads its part; the copy is removed.

    Raises:
        UserError: the conversion failed.
    """
    converted = folder.parent.with_name("universal.tmp")  # beside the checkpoints: the next save clears what is left
    failed = 0.0
    if accelerator.is_main_process:
        shutil.rmtree(converted, ignore_errors=True)
        words = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
        words += ["--input_folder", str(folder / "pytorch_model"), "--output_folder", str(converted / "pytorch_model")]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        failed = float(done.returncode != 0)
        if failed:
            print(done.stderr[-2000:], file=sys.stderr, flush=True)
        for extra in folder.glob("random_states_*.pkl") if not failed else ():
            (converted / extra.name).symlink_to(extra.resolve())
    if least(accelerator, -failed) < 0:
        raise UserError(f"{folder}: DeepSpeed could not convert it for {accelerator.num_processes} process(es)")
    engine = _engine(accelerator)
    groups = [{k: v for k, v in group.items() if k != "params"} for group in engine.optimizer.param_groups]
    engine._config.load_universal_checkpoint = True
    try:
        accelerator.load_state(str(converted))
    finally:
        engine._config.load_universal_checkpoint = False
    for group, settings in zip(engine.optimizer.param_groups, groups, strict=True):
        group.update(settings)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(converted)


def _engine(accelerator: Accelerator) -> Any:
    wrapped: Any = accelerator.deepspeed_engine_wrapped
    return wrapped.engine


def release(accelerator: Accelerator, *prepared: Any) -> None:
    """Give back the memory of a stage before the next one is built."""
    for item in prepared:
        if is_deepspeed(accelerator) and hasattr(item, "destroy"):
            item.destroy()
    accelerator.free_memory(*prepared)


def full_parameters(accelerator: Accelerator, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name and whole value of each parameter, as the forward sees it. Under ZeRO-3 all ranks iterate to the end."""
    for name, parameter in _module(model).named_parameters():
        if hasattr(parameter, "ds_id"):
            import deepspeed

            with deepspeed.zero.GatheredParameters([parameter]):
                yield name, parameter.data
        else:
            yield name, parameter.data


def full_values(accelerator: Accelerator, model: nn.Module) -> Iterator[Tensor]:
    """The values of `full_parameters`."""
    return (value for _, value in full_parameters(accelerator, model))


def frozen_masters(accelerator: Accelerator, model: nn.Module) -> dict[str, Float[Tensor, "..."]]:
    """Copies of the frozen parameters before `prepare`, on rank 0, where the engine is going to round them.

    A 16-bit DeepSpeed engine casts every parameter and keeps fp32 masters of those that learn only.
    """
    rounds = is_deepspeed(accelerator) and accelerator.mixed_precision != "no" and accelerator.is_main_process
    return {n: p.detach().clone() for n, p in model.named_parameters() if rounds and not p.requires_grad}


def _module(model: nn.Module) -> nn.Module:
    """What an engine or DistributedDataParallel wraps. Accelerate's own way there imports deepspeed in any run."""
    return getattr(model, "module", model)


def full_state(accelerator: Accelerator, model: nn.Module) -> dict[str, Float[Tensor, "..."]]:
    """All weights in fp32 on the CPU of rank 0 (empty elsewhere): the optimizer's masters where there are any.

    All ranks must call it.
    """
    state = {}
    masters = is_deepspeed(accelerator) and accelerator.mixed_precision != "no"
    for (name, value), parameter in zip(full_parameters(accelerator, model), _module(model).parameters(), strict=True):
        if masters and parameter.requires_grad:
            from deepspeed.utils import safe_get_full_fp32_param

            value = torch.as_tensor(safe_get_full_fp32_param(parameter))
        if accelerator.is_main_process:
            state[name] = value.detach().float().cpu().clone()
    return state
