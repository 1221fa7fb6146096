"""The whole optimizer step of each stage at the sizes of real networks, where waiting and mixing devices raise."""

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from gpu.rehearsal import META, OneDevice, rehearse
from torch import nn
from torch.optim import optimizer

from sapiens_accel.config import parse as config
from sapiens_accel.config.schema import StageConfig, StageName
from sapiens_accel.models.sapiens import Layout
from sapiens_accel.training import objectives


@pytest.fixture(autouse=True)
def meta_as_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch has no autocast for the meta device, and its fused AdamW has a kernel there that it does not list."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    monkeypatch.setattr(optimizer, "_get_fused_kernels_supported_devices", lambda: ["meta"])


def stage_of(stage: StageName, **teacher: Any) -> StageConfig:
    found = config.load(["--recipe", "sapiens_1b_coco"]).get_stage(stage)
    return replace(found, teacher=replace(found.teacher, **teacher)) if found.teacher else found


def take_steps(stage: StageConfig, name: str, layout: Layout, **options: Any) -> None:
    rehearsal = rehearse(name, stage, layout, **options)
    learning = [p for p in rehearsal.model.parameters() if p.requires_grad]
    with OneDevice():
        for number in (1, 2):
            done = next(rehearsal.stepping)
            health = rehearsal.objective.health()
            assert (done.number, done.skipped) == (number, False)
            assert done.logs["loss"].device == META  # pyright: ignore[reportAttributeAccessIssue]
            assert all(value.device == META for value in health.values())
    assert rehearsal.engine.waits == 2, "one number a step"
    assert rehearsal.engine.micro_steps == 2 * options.get("accumulation", 2)
    assert learning and all(p.device == META and p.grad is None for p in learning)


@pytest.mark.parametrize("stage", ["phase1", "phase2", "ssl"])
@pytest.mark.parametrize("name", ["sapiens_1b", "sapiens_2b", "sapiens2_0.4b"])
def test_a_step_waits_for_one_number_and_mixes_no_devices(name: str, stage: StageName) -> None:
    """Blocks checkpointed and whole, the head in chunks, two accumulated micro-batches, weights in 16 bits.

    Of the real width, heads and image; four blocks of 24 to 48, which are all alike.
    """
    take_steps(stage_of(stage), name, Layout(checkpointed_blocks=2, head_chunk=3), depth=4)


@pytest.mark.parametrize("stage", ["phase2", "ssl"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_in_fp32_and_fp16_too(stage: StageName, dtype: torch.dtype) -> None:
    take_steps(stage_of(stage), "sapiens_1b", Layout(), dtype=dtype, depth=1, accumulation=1)


@pytest.mark.parametrize(
    ("loss", "target", "confidence"),
    [
        ("kl", "heatmap", "keypoint"),
        ("mse", "rendered", "raw"),
        ("mse", "heatmap", "keypoint"),
        ("literal", "heatmap", "raw"),
    ],
)
def test_every_loss_of_ssl(loss: Any, target: Any, confidence: Any) -> None:
    stage = stage_of("ssl", loss=loss, target=target, confidence=confidence)
    take_steps(stage, "sapiens2_0.4b", Layout(checkpointed_blocks=1, head_chunk=3), depth=1)


def test_ssl_without_unlabeled_people() -> None:
    take_steps(stage_of("ssl", ratio=0), "sapiens_1b", Layout(checkpointed_blocks=1, head_chunk=3), depth=1)


@pytest.mark.parametrize(
    "fault",
    [
        lambda loss: loss * loss.item(),
        lambda loss: loss if loss > 0 else -loss,
        lambda loss: loss + torch.ones(3).sum(),
        lambda loss: loss * torch.tensor(2.0).to(loss.device),
        lambda loss: loss.cpu(),
        lambda loss: loss + loss.reshape(1)[loss.reshape(1) > 0].sum(),
    ],
)
def test_what_would_wait_is_seen(fault: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rehearsal can fail: each of these in a loss makes a GPU wait, or copies from the host in every step."""
    supervised = objectives.Supervised.loss

    def loss(self: Any, model: nn.Module, *rest: Any) -> Any:
        value, logs = supervised(self, model, *rest)
        return fault(value), logs

    monkeypatch.setattr(objectives.Supervised, "loss", loss)
    with pytest.raises((RuntimeError, NotImplementedError, AssertionError)):
        take_steps(stage_of("phase2"), "sapiens_1b", Layout(head_chunk=3), depth=1)
