"""The optimizer steps of a stage, and how an evaluation between them ends when a stop is asked for."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.optim import Optimizer

from sapiens_accel.config.schema import OptimConfig
from sapiens_accel.data.dataset import Batch
from sapiens_accel.errors import UserError
from sapiens_accel.runtime import distributed, engine, failures, host
from sapiens_accel.runtime.signals import EvaluationStopped, is_stop_asked
from sapiens_accel.training.activation_offload import offloaded
from sapiens_accel.training.objectives import Objective
from sapiens_accel.training.optim import lr_at, set_lr

Logs = Mapping[str, Tensor | float]


class Step(NamedTuple):
    """The result of an optimizer step.

    Attributes:
        number: steps done, including this one.
        logs: this rank's values, on the device: reading them waits for it.
        skipped: the gradients were not finite, and nothing was changed.
        ann_ids: for a skipped step, this rank's labeled people, and whether the loss of their micro-batch was finite.
    """

    number: int
    logs: Logs
    skipped: bool
    ann_ids: Sequence[tuple[int, bool]]


@dataclass(frozen=True, kw_only=True)
class StepConfig:
    """How the steps of a stage are taken.

    Attributes:
        accumulation: micro-batches of one rank in an optimizer step.
        optim: learning rate, schedule and clipping.
        first: steps that are done already.
        num_steps: length of the schedule.
        offload: activations are kept in host memory until the backward.
        dropout_key: numbers from which, with step, rank and micro-batch, the dropout of adapters is drawn; None: there
            is none, and the generators are left alone.
        rounding_key: likewise for the stochastic rounding of weights, which must be equal on all ranks.
    """

    accumulation: int
    optim: OptimConfig
    first: int = 0
    num_steps: int
    offload: bool = False
    dropout_key: tuple[int, ...] | None = None
    rounding_key: tuple[int, ...] | None = None


def steps(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Optimizer,
    objective: Objective,
    batches: Iterator[Batch],
    config: StepConfig,
) -> Iterator[Step]:
    """Train, and yield after each optimizer step.

    Args:
        batches: this rank's micro-batches from step `config.first` on; training ends with them.
    """
    if accelerator.device.type == "cpu":
        host.keep_freed_memory()
    step = config.first
    while micro_batches := _fetch(accelerator, batches, config.accumulation):
        model.train()
        rate = lr_at(step, config.num_steps, config.optim)
        # Before the backward: under DeepSpeed, `accelerator.backward` also takes the optimizer's step.
        set_lr(optimizer, rate)
        logs: dict[str, Tensor | float] = {}
        losses: list[Tensor] = []
        every = zip(micro_batches, objective.prepare(micro_batches, step), strict=True)
        for index, (batch, prepared) in enumerate(every):
            if config.dropout_key:
                torch.manual_seed(_seed(*config.dropout_key, step, accelerator.process_index, index))
            with accelerator.accumulate(model):
                with offloaded(accelerator.device, wanted=config.offload):
                    loss, parts = objective.loss(model, batch, prepared)
                losses.append(loss.detach())
                for name, value in {"loss": loss.detach(), **parts}.items():
                    logs[name] = logs.get(name, 0.0) + value / config.accumulation
                accelerator.backward(loss)
        if config.rounding_key:
            torch.manual_seed(_seed(*config.rounding_key, step))
        with failures.changing_weights():
            grad_norm, taken = engine.take_step(accelerator, model, optimizer, config.optim.clip_norm)
            optimizer.zero_grad()
            if taken:
                objective.after_step()
        step += 1
        logs |= {"lr": rate, **({} if grad_norm is None else {"grad_norm": grad_norm})}
        yield Step(step, logs, not taken, () if taken else _people(micro_batches, losses))


@contextmanager
def stop_between_batches(accelerator: Accelerator, model: nn.Module) -> Iterator[None]:
    """End an evaluation before the next forward of the model once a stop is asked for on any rank.

    All ranks must call it, and the model equally often: an evaluation takes minutes, and launchers kill what a signal
    does not end in 30 s.

    Raises:
        EvaluationStopped: on all ranks.
    """

    def check(*_: object) -> None:
        if distributed.any_rank(accelerator, is_stop_asked()):
            raise EvaluationStopped

    hook = model.register_forward_pre_hook(check)
    try:
        yield
    finally:
        hook.remove()


def _fetch(accelerator: Accelerator, batches: Iterator[Batch], num: int) -> list[Batch]:
    """Return the next micro-batches; none after the last step.

    Raises:
        SharedError: they could not be loaded on this rank or another one.
    """
    fetched, problem = [], None
    try:
        fetched = list(islice(batches, num))
    except Exception as error:
        problem = error
    if distributed.any_rank(accelerator, problem is not None):
        # All ranks report the error: the launcher may kill the rank that had it before it prints.
        text = next(filter(None, gather_object([problem and failures.describe(problem)])))
        raise failures.SharedError(text, None if isinstance(problem, UserError) else problem)
    return fetched


def _seed(*key: int) -> int:
    return int(np.random.SeedSequence(key).generate_state(1)[0])


def _people(batches: Sequence[Batch], losses: Sequence[Tensor]) -> list[tuple[int, bool]]:
    """List annotation ids of the labeled people, and whether the loss of their micro-batch is finite."""
    each = zip(batches, losses, strict=True)
    return [(ann_id, bool(loss.isfinite())) for batch, loss in each for ann_id in batch.labeled.ann_id.tolist()]
