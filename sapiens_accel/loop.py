"""steps(): the generator that every stage runs."""

from collections.abc import Iterator, Mapping
from itertools import islice

from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from sapiens_accel import distributed
from sapiens_accel.config import OptimConfig
from sapiens_accel.data import Batch, Share
from sapiens_accel.objective import Objective
from sapiens_accel.offload import offloaded
from sapiens_accel.optim import lr_at, set_lr

Logs = Mapping[str, Tensor | float]


def steps(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Optimizer,
    objective: Objective,
    batches: Iterator[Batch],
    share: Share,
    config: OptimConfig,
    first: int,
    num_steps: int,
    offload: bool = False,
) -> Iterator[tuple[int, Logs]]:
    """Train, and yield (steps done, logs) after each optimizer step.

    Args:
        batches: this rank's micro-batches from step `first` on; the stage ends with them.
        num_steps: length of the whole schedule.
        offload: what a forward saves waits for its backward in host memory.

    The logs are this rank's, on the device: nothing here waits for it.
    """
    step = first
    while micro_batches := list(islice(batches, share.accumulation)):
        model.train()
        rate = lr_at(step, num_steps, config)
        # Before the backward: under DeepSpeed, `accelerator.backward` also takes the optimizer's step.
        set_lr(optimizer, rate)
        logs: dict[str, Tensor | float] = {}
        grad_norm = None
        for batch, prepared in zip(micro_batches, objective.prepare(micro_batches, step), strict=True):
            with accelerator.accumulate(model):
                with offloaded(accelerator.device, wanted=offload):
                    loss, parts = objective.loss(model, batch, prepared)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    grad_norm = distributed.clip(accelerator, model, config.clip_norm)
                optimizer.step()
                optimizer.zero_grad()
            for name, value in {"loss": loss.detach(), **parts}.items():
                logs[name] = logs.get(name, 0.0) + value / share.accumulation
        objective.after_step()
        step += 1
        yield step, {**logs, "lr": rate, **({} if grad_norm is None else {"grad_norm": grad_norm})}
