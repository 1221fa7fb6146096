"""Plain fp16 launches leave out the steps whose gradients overflowed, with AdamW fused and torch's own GradScaler."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from sapiens_accel import train
from sapiens_accel.config.schema import OptimConfig
from sapiens_accel.errors import UserError
from sapiens_accel.runtime import distributed
from sapiens_accel.runtime.engine import take_step
from sapiens_accel.training import optim
from sapiens_accel.training.checkpoint import list_checkpoints, step_of
from sapiens_accel.training.objectives import Supervised

SCALE = 2.0**10


@pytest.fixture
def accelerator() -> Accelerator:
    """As on a T4 without DeepSpeed: fp16 and a GradScaler, which Accelerate itself only gives to GPUs."""
    accelerator = Accelerator(cpu=True)
    accelerator.state._mixed_precision = "fp16"
    accelerator.native_amp = True
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    return accelerator


def copy_of(model: nn.Module, optimizer: Any) -> list[Any]:
    """Weights, moments and step counts."""
    states = [optimizer.state[p] for p in model.parameters()]
    moments = [state[name].clone() for state in states for name in sorted(state)]
    return [*(p.detach().clone() for p in model.parameters()), *moments]


@pytest.mark.parametrize("clip_norm", [1.0, 0.0])
def test_a_step_that_overflows_is_left_out_and_lowers_the_scale(accelerator: Accelerator, clip_norm: float) -> None:
    torch.manual_seed(0)
    model: Any = nn.Linear(4, 3)
    config = OptimConfig(lr=1e-2)
    groups = [{"params": list(model.parameters()), "lr_scale": 1.0, "weight_decay": 0.1}]
    optimizer: Any = optim.adamw(groups, config, torch.device("cpu"))
    assert optimizer.defaults["fused"], "on the CPU too: there this shows without a GPU"
    optimizer = accelerator.prepare_optimizer(optimizer, device_placement=False)
    taken, scales = [], []
    for factor in (1.0, float("inf"), 1.0, float("nan"), 1e30, 1.0):  # 1e30: each gradient is a number, the norm is not
        before = copy_of(model, optimizer)
        accelerator.backward(model(torch.full((2, 4), factor)).square().mean())
        norm, was_taken = take_step(accelerator, model, optimizer, clip_norm)
        optimizer.zero_grad()
        same = [torch.equal(a, b) for a, b in zip(before, copy_of(model, optimizer), strict=False)]
        assert all(same) != was_taken
        assert torch.as_tensor(norm).isfinite() == was_taken
        taken.append(was_taken)
        scales.append(accelerator.scaler.get_scale())  # pyright: ignore[reportOptionalMemberAccess]
    assert taken == [True, False, True, False, False, True]
    assert scales[1] == SCALE / 2 and scales[3] == SCALE / 4


def small_run(
    accelerator: Accelerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overflows: Callable[[int], bool]
) -> list[str]:
    """Words for train.py, fused AdamW and all; the gradients of the steps (from 1 on) that `overflows` names do."""
    calls: list[int] = []
    supervised = Supervised.loss

    def loss(self: Supervised, *rest: Any) -> Any:
        value, logs = supervised(self, *rest)
        calls.append(1)
        return value * (float("inf") if overflows(len(calls)) else 1.0), logs

    monkeypatch.setattr(Supervised, "loss", loss)
    monkeypatch.setattr(distributed, "start", lambda: accelerator)
    monkeypatch.setenv("SAPIENS_ACCEL_CACHE", str(tmp_path))
    words = ["--stage=phase2", "--data.synthetic.num_train=8", "--data.synthetic.num_unlabelled=1"]
    words += ["--data.synthetic.num_val=2", "--data.num_workers=0", "--data.input_hw=[64,48]", "--log_every=1"]
    words += ["--phase2.global_batch=2", "--report_to=none", "--eval.num_pictures=0", "--eval.num_worst=0"]
    return [*words, f"--output_dir={tmp_path / 'run'}"]


@pytest.mark.parametrize(
    ("skipped", "saved"), [([], [2, 4, 6]), ([4], [2, 5, 6]), ([4, 5], [2, 6]), ([3, 4, 6], [2, 5])]
)
def test_a_save_that_is_due_on_a_skipped_step_comes_with_the_next_one_that_is_taken(
    skipped: list[int], saved: list[int], accelerator: Accelerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = small_run(accelerator, tmp_path, monkeypatch, skipped.__contains__)
    train.main([*words, "--max_steps=6", "--save_every=2", "--keep_checkpoints=9"])
    assert sorted(map(step_of, list_checkpoints(tmp_path / "run" / "phase2" / "checkpoints"))) == saved


def test_a_run_in_which_fp16_never_recovers_is_stopped(
    accelerator: Accelerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """train.py itself, gradients that overflow from the third step on."""
    words = small_run(accelerator, tmp_path, monkeypatch, lambda step: step > 2)
    with pytest.raises(UserError, match=r"phase2: .* 20 steps in a row up to (step )?22"):
        train.main([*words, "--max_steps=40"])
    lines = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert lines.count("skipped_in_a_row") == 20
