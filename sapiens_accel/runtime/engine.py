"""Model and optimizer under the launch's engine, and full fp32 parameters: the only file that imports deepspeed.

One recipe means the same training on 1 or on 8 devices: micro-batch and accumulation are derived from the global batch,
and `prepare` writes them, with the clipping, into DeepSpeed's config for each stage (its "auto" values are filled only
once: a second stage would silently keep those of the first).
"""

import math
import os
import random
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import MODEL_NAME, RNG_STATE_NAME, broadcast_object_list
from accelerate.utils.other import TORCH_SAFE_GLOBALS, load
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Optimizer

from sapiens_accel.errors import UserError, count
from sapiens_accel.runtime import failures
from sapiens_accel.runtime.distributed import any_rank, deepspeed_config, is_deepspeed, least, overlaps, zero_stage


def prepare(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Optimizer,
    *,
    micro_batch: int,
    accumulation: int,
    clip_norm: float,
) -> tuple[nn.Module, Any]:
    """Wrap the model (a backbone and a `head`) and its optimizer for this launch."""
    accelerator.gradient_accumulation_steps = accumulation
    if is_deepspeed(accelerator):
        read_visible_devices()
        # torch 2.13's, in each process, about the names of DeepSpeed's calls.
        warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
        config = deepspeed_config(accelerator)
        config.pop("train_batch_size", None)
        config["train_micro_batch_size_per_gpu"] = micro_batch
        config["gradient_accumulation_steps"] = accumulation
        config["gradient_clipping"] = clip_norm  # missing would mean 1.0
        zero = config["zero_optimization"]
        zero["overlap_comm"] = overlaps(zero, accelerator.num_processes)
        config.setdefault("timers", {"throughput": {"enabled": False}})  # it waits for the device in every forward
        config.pop("data_types", None)
        if accumulation > 1 and accelerator.mixed_precision == "bf16":
            # Sums of bf16 gradients lose their small terms.
            config["data_types"] = {"grad_accum_dtype": "fp32"}
        if accelerator.mixed_precision == "bf16":
            # In fp32 and fp16 it skips steps with non-finite gradients by default.
            config["bf16"] = {**config.get("bf16", {}), "check_grad_overflow": True}
    if zero_stage(accelerator) == 3:
        _gather_head_at_once(model.get_submodule("head"))
    names = [name for name, _ in model.named_parameters()]
    prepared_model, prepared_optimizer = accelerator.prepare(model, optimizer)
    if accelerator.num_processes > 1 and prepared_model is model:
        raise RuntimeError("several processes, but the model is not wrapped: the ranks would diverge")
    if [name for name, _ in _module(prepared_model).named_parameters()] != names:
        raise RuntimeError("the launch renames the model's parameters: its exported weights could not be loaded")
    keep_least_scale(prepared_optimizer)
    if is_engine(prepared_model):  # `accelerator.backward` calls its step: an error in it can be marked only here
        prepared_model.step = failures.changing_weights()(prepared_model.step)
    return prepared_model, prepared_optimizer


def keep_least_scale(optimizer: Any) -> None:
    """Let DeepSpeed's fp16 loss scale stay at its minimum, so that skipped steps are counted as on other launches.

    By default it raises a bare Exception at about the 18th overflow in a row, without step and annotation ids.
    """
    scaler: Any = getattr(getattr(optimizer, "optimizer", optimizer), "loss_scaler", None)
    if hasattr(scaler, "raise_error_at_min_scale"):
        scaler.raise_error_at_min_scale = False


def read_visible_devices() -> None:
    """Let DeepSpeed ask torch, not NVML, for free memory where cards are visible by UUID (SLURM, MIG).

    DeepSpeed expects numbers in CUDA_VISIBLE_DEVICES.
    """
    from deepspeed.accelerator import cuda_accelerator

    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")
    if not all(name.strip().isdigit() for name in visible):
        cuda_accelerator.pynvml = None


def _gather_head_at_once(head: nn.Module) -> None:
    """Let ZeRO-3 gather the head's weights once for all of its chunks, not for each chunk.

    DeepSpeed reduces the gradients of such a module when the gradients of its inputs are computed. If no input requires
    one (the backbone is frozen), torch runs that hook too early: so the features always require gradients.
    """
    from deepspeed.utils import set_z3_leaf_module

    set_z3_leaf_module(head, True)
    head.register_forward_pre_hook(_with_gradient)


def _with_gradient(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    features, *rest = inputs
    if torch.is_grad_enabled() and not features.requires_grad:
        features = features.detach().requires_grad_()
    return features, *rest


def take_step(
    accelerator: Accelerator, model: nn.Module, optimizer: Any, clip_norm: float
) -> tuple[Tensor | float | None, bool]:
    """Clip the gradients to the global norm (0: no clipping) and step, unless they are not finite.

    Under DeepSpeed `accelerator.backward` has done both. Waiting for the norm costs one synchronization a step.

    Returns:
        The norm before clipping, and whether the step was taken.
    """
    if is_engine(model):
        engine: Any = model
        # DeepSpeed without ZeRO has no such check; no shipped config uses it.
        return engine.get_global_grad_norm(), not getattr(engine.optimizer, "overflow", False)
    norm = accelerator.clip_grad_norm_(model.parameters(), clip_norm or float("inf"))
    taken = norm is None or math.isfinite(norm)
    if taken:
        optimizer.step()
    elif accelerator.scaler is not None:
        # `optimizer.step_was_skipped` is never set: torch's scaler always calls a fused optimizer.
        accelerator.scaler.update()  # lowers the scale where a gradient overflowed
    return norm, taken


def is_engine(model: Any) -> bool:
    """Return whether this module is a DeepSpeed engine, which also sets the precision of its forward."""
    return hasattr(model, "get_global_grad_norm")


def drop_gradients(model: Any) -> None:
    """Free the gradients of a step that was interrupted, and reset DeepSpeed's count of its micro-steps."""
    for parameter in model.parameters():
        parameter.grad = None
    if is_engine(model):
        model.micro_steps -= model.micro_steps % model.gradient_accumulation_steps()
        model.optimizer.zero_grad(set_to_none=True)


def save_state(
    accelerator: Accelerator, folder: Path, not_written: tuple[type[Exception], ...], *, without_frozen: bool = False
) -> str | None:
    """Save Accelerate's state into a folder; returns this rank's error, if any. All ranks must call it.

    DeepSpeed's ranks wait for each other inside, so a rank whose disk is full must reach that point too.

    Args:
        without_frozen: leave the frozen parameters out.
    """
    problems: list[Exception] = []

    def guard(write: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> None:
            try:
                write(*args, **kwargs)
            except not_written as error:
                problems.append(error)

        return call

    guard(folder.mkdir)(parents=True, exist_ok=True)
    if any_rank(accelerator, bool(problems)):
        return _first_line(problems) or "another process could not create its folder"
    engine: Any = _engine(accelerator) if is_deepspeed(accelerator) else None
    if engine:
        engine.checkpoint_engine.save = guard(engine.checkpoint_engine.save)
        engine._copy_recovery_script = guard(engine._copy_recovery_script)  # on rank 0 alone, as its file `latest`
    options = {"save_latest": False, "exclude_frozen_parameters": without_frozen} if engine else {}
    hook = accelerator.register_save_state_pre_hook(_leave_frozen_out) if without_frozen and not engine else None
    try:
        guard(accelerator.save_state)(str(folder), **options)
    finally:
        if hook:
            hook.remove()
        if engine:
            del engine.checkpoint_engine.save, engine._copy_recovery_script
    if engine and accelerator.is_main_process:
        guard((folder / "latest").write_text)(MODEL_NAME)
    return _first_line(problems)


def _leave_frozen_out(models: list[nn.Module], states: list[dict[str, Tensor]], _: str) -> None:
    for model, state in zip(models, states, strict=True):
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                state.pop(name, None)


def _first_line(problems: list[Exception]) -> str | None:
    return " ".join(str(problems[0]).split())[:200] if problems else None


# DeepSpeed's converter in a separate process, in which pickles may create objects of `safe_classes` only.
CONVERT = """
import multiprocessing, torch
from deepspeed.checkpoint import ds_to_universal
from sapiens_accel.runtime.engine import safe_classes
multiprocessing.set_start_method("fork")
torch.serialization.add_safe_globals(safe_classes(True))
ds_to_universal.main(ds_to_universal.parse_arguments())
"""
FORCE_SAFE, FORCE_UNSAFE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
PICKLES = (".pt", ".bin", ".pkl")


def load_state(
    accelerator: Accelerator,
    folder: Path,
    *,
    universal: bool = False,
    trusted: bool = False,
    without_frozen: bool = False,
) -> None:
    """Restore what `save_state` wrote, except the optimizer's settings. All ranks must call it.

    A state dict contains the parameter groups of the run that saved it: betas, weight decay and layer-wise rates;
    DeepSpeed's also the gradient clipping. The options of this run decide those instead.

    Args:
        universal: it was saved by another number of processes, under the same ZeRO stage (1 or 2).
        trusted: unpickle any class. Otherwise only tensors, numbers and the classes that a checkpoint needs.
        without_frozen: as it was saved.

    Raises:
        UserError: a file holds other classes or functions; random states cannot be restored; DeepSpeed could not
            convert the checkpoint.
    """
    optimizers: list[Any] = accelerator._optimizers
    groups = [_settings(group) for optimizer in optimizers for group in optimizer.param_groups]
    zero: Any = _engine(accelerator).optimizer if is_deepspeed(accelerator) else None
    clip_norm = getattr(zero, "clip_grad", None)
    with _safe_unpickling(accelerator, folder, trusted):
        failures.on_each_rank(lambda: _check_random_states(folder, accelerator.process_index))
        strict = "load_module_strict" if is_deepspeed(accelerator) else "strict"
        options: dict[str, Any] = {strict: False} if without_frozen else {}
        if universal:
            _load_universal(accelerator, folder, trusted, options)
        else:
            accelerator.load_state(str(folder), **options)
    for group, settings in zip((g for o in optimizers for g in o.param_groups), groups, strict=True):
        group.update(settings)
    if clip_norm is not None:
        zero.clip_grad = clip_norm


def _check_random_states(folder: Path, rank: int) -> None:
    """Restore this rank's random states: accelerate ignores every error in that.

    A run of fewer processes has saved none for this rank, which is no error.

    Raises:
        UserError: the file cannot be read, or does not hold the states of Python, NumPy and torch.
    """
    file = folder / f"{RNG_STATE_NAME}_{rank}.pkl"
    if not file.is_file():
        return
    try:
        states = load(file)
        random.setstate(states["random_state"])
        np.random.set_state(states["numpy_random_seed"])
        torch.set_rng_state(states["torch_manual_seed"])
    except Exception as error:  # of any kind: the file may hold anything
        said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(
            f"{file}: random states cannot be restored (expected those of Python, NumPy and torch, found {said}). Use "
            "another checkpoint (--resume_from_checkpoint)"
        ) from None


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a parameter group; "step", which some of DeepSpeed's optimizers keep there, is state."""
    return {key: value for key, value in group.items() if key not in ("params", "step")}


def safe_classes(deepspeed: bool) -> list[Any]:
    """List the classes in the pickles of a checkpoint, beside tensors; none of them can run code from the file."""
    if not deepspeed:
        return list(TORCH_SAFE_GLOBALS)
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [*TORCH_SAFE_GLOBALS, LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]


@contextmanager
def _safe_unpickling(accelerator: Accelerator, folder: Path, trusted: bool) -> Iterator[None]:
    """Restrict every `torch.load`, DeepSpeed's too, to `safe_classes`."""
    if trusted:
        yield
        return
    before = {name: os.environ.pop(name, None) for name in (FORCE_SAFE, FORCE_UNSAFE)}
    try:
        with torch.serialization.safe_globals(safe_classes(is_deepspeed(accelerator))):
            unsafe = [_find_unsafe(folder) if accelerator.is_main_process else None]
            if fault := broadcast_object_list(unsafe)[0]:
                raise UserError(
                    f"{fault}, which no checkpoint needs: loading it may run any code. "
                    "If you trust its author, add --trust_checkpoint"
                )
            os.environ[FORCE_SAFE] = "1"
            yield
    finally:
        os.environ.pop(FORCE_SAFE, None)
        os.environ.update({name: value for name, value in before.items() if value is not None})


def _find_unsafe(folder: Path) -> str | None:
    """Name the first file with other classes or functions, without running any of it; None if there is none."""
    for file in sorted(path for path in folder.rglob("*") if path.suffix in PICKLES):
        try:
            names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        except Exception as error:  # of any kind: the pickle may be damaged or hostile
            names = [f"a file that is not one of torch.save ({type(error).__name__})"]
        if names:
            return f"{file}: contains classes or functions not known to be safe (found {', '.join(sorted(names)[:3])})"
    return None


def _load_universal(accelerator: Accelerator, folder: Path, trusted: bool, options: dict[str, Any]) -> None:
    """Convert the state with DeepSpeed's converter, parameter by parameter; load it; delete the converted copy.

    Raises:
        UserError: the conversion failed.
    """
    converted = folder.parent.with_name("universal.tmp")  # beside the checkpoints: the next save deletes leftovers
    failed = 0.0
    if accelerator.is_main_process:
        shutil.rmtree(converted, ignore_errors=True)
        converter = ["-m", "deepspeed.checkpoint.ds_to_universal"] if trusted else ["-c", CONVERT]
        words = [sys.executable, *converter, "--inject_missing_state"]
        words += ["--input_folder", str(folder / "pytorch_model"), "--output_folder", str(converted / "pytorch_model")]
        path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        done = subprocess.run(
            words, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": path}
        )
        failed = float(done.returncode != 0)
        if failed:
            print(done.stderr[-2000:], file=sys.stderr, flush=True)
        for extra in folder.glob("random_states_*.pkl") if not failed else ():
            shutil.copyfile(extra, converted / extra.name)
    if least(accelerator, -failed) < 0:
        processes = count(accelerator.num_processes, "process")
        raise UserError(
            f"{folder}: DeepSpeed could not convert it for {processes} (see above). Use as many as saved it"
        )
    engine = _engine(accelerator)
    engine._config.load_universal_checkpoint = True
    try:
        accelerator.load_state(str(converted), **options)
    finally:
        engine._config.load_universal_checkpoint = False
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(converted)


def _engine(accelerator: Accelerator) -> Any:
    wrapped: Any = accelerator.deepspeed_engine_wrapped
    return wrapped.engine


def release(accelerator: Accelerator, *prepared: Any) -> None:
    """Free the memory of a stage before the next one is built."""
    for item in prepared:
        if is_deepspeed(accelerator) and hasattr(item, "destroy"):
            item.destroy()
    accelerator.free_memory(*prepared)


def full_parameters(
    accelerator: Accelerator, model: nn.Module, *, only_learning: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """Yield name and full value of each parameter, as used in the forward. Under ZeRO-3 all ranks must iterate it."""
    for name, parameter in _module(model).named_parameters():
        if only_learning and not parameter.requires_grad:
            continue
        if hasattr(parameter, "ds_id"):
            import deepspeed

            with deepspeed.zero.GatheredParameters([parameter]):
                yield name, parameter.data
        else:
            yield name, parameter.data


def full_values(accelerator: Accelerator, model: nn.Module, *, only_learning: bool = False) -> Iterator[Tensor]:
    """Yield the values of `full_parameters`."""
    return (value for _, value in full_parameters(accelerator, model, only_learning=only_learning))


def frozen_masters(accelerator: Accelerator, model: nn.Module) -> dict[str, Float[Tensor, "..."]]:
    """Copy the frozen parameters on rank 0 before `prepare`, if the engine is going to round them.

    A 16-bit DeepSpeed engine casts every parameter, and keeps fp32 copies of the trained ones only.
    """
    rounds = is_deepspeed(accelerator) and accelerator.mixed_precision != "no" and accelerator.is_main_process
    # The engine's cast gives each parameter another tensor: these need no copies.
    return {n: p.detach() for n, p in model.named_parameters() if rounds and not p.requires_grad}


def _module(model: nn.Module) -> nn.Module:
    """Return the wrapped module. Accelerate's `unwrap_model` would import deepspeed in every run."""
    return getattr(model, "module", model)


class FullState(Mapping[str, Tensor]):
    """All weights of a process that is alone, in fp32 on the CPU: each is copied when it is read."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], *, masters: bool) -> None:
        self.parameters, self.masters = parameters, masters

    def __getitem__(self, key: str) -> Float[Tensor, "..."]:
        return _full_value(self.parameters[key], self.parameters[key].data, masters=self.masters)

    def __iter__(self) -> Iterator[str]:
        return iter(self.parameters)

    def __len__(self) -> int:
        return len(self.parameters)


def full_state(
    accelerator: Accelerator, model: nn.Module, *, only_learning: bool = False
) -> Mapping[str, Float[Tensor, "..."]]:
    """Gather all weights in fp32 on the CPU of rank 0 (empty on the others), from the optimizer's fp32 copies if any.

    All ranks must call it. Of a process that is alone they are not gathered but read, until the next step.
    """
    masters = is_deepspeed(accelerator) and accelerator.mixed_precision != "no"
    parameters = {n: p for n, p in _module(model).named_parameters() if p.requires_grad or not only_learning}
    if accelerator.num_processes == 1 and zero_stage(accelerator) < 3:
        return FullState(parameters, masters=masters)
    state = {}
    for name, value in full_parameters(accelerator, model, only_learning=only_learning):
        full = _full_value(parameters[name], value, masters=masters)
        if accelerator.is_main_process:
            state[name] = full
    return state


def _full_value(parameter: nn.Parameter, value: Tensor, *, masters: bool) -> Float[Tensor, "..."]:
    """Copy a parameter's fp32 value to the CPU: the optimizer's if it has one, else `value`."""
    if masters and parameter.requires_grad:
        from deepspeed.utils import safe_get_full_fp32_param

        value = torch.as_tensor(safe_get_full_fp32_param(parameter))
    return value.detach().float().cpu().clone()
