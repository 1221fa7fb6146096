import math
import os
import sys
from itertools import pairwise
from statistics import median

import forks
import pytest
import torch

from sapiens_accel.config.schema import OptimConfig
from sapiens_accel.models.sapiens import SapiensPose
from sapiens_accel.training import optim

PLAN = OptimConfig(lr=3e-4, layer_decay=0.7, weight_decay=0.05, betas=(0.8, 0.95))


def _mmpose_scale(name: str, depth: int, decay: float) -> float:
    """sapiens, layer_decay_optim_wrapper.py: get_layer_id_for_vit with num_layers = depth + 2."""
    num_layers = depth + 2
    if name.startswith("backbone.embeddings."):
        layer = 0
    elif ".layer." in name:
        layer = int(name.split(".layer.")[1].split(".")[0]) + 1
    else:
        layer = num_layers - 1
    return decay ** (num_layers - 1 - layer)


def _by_parameter(groups: list[dict]) -> dict[int, dict]:
    return {id(parameter): group for group in groups for parameter in group["params"]}


@pytest.mark.parametrize("frozen", [(), ("embeddings", "block_*", "norm"), ("embeddings", "block_0", "block_2")])
def test_what_learns_is_in_exactly_one_group(tiny: SapiensPose, frozen: tuple[str, ...]) -> None:
    tiny.freeze(frozen)
    groups = optim.param_groups(tiny.layer_groups(), PLAN)
    members = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(members) == sorted(id(parameter) for parameter in tiny.parameters() if parameter.requires_grad)
    assert all(group["params"] for group in groups)
    assert len({group["name"] for group in groups}) == len(groups)


@pytest.mark.parametrize("frozen", [(), ("embeddings", "block_0")])
def test_layer_scales_are_mmposes_rule(tiny: SapiensPose, frozen: tuple[str, ...]) -> None:
    """Freezing changes no scale of what still learns."""
    tiny.freeze(frozen)
    group_of = _by_parameter(optim.param_groups(tiny.layer_groups(), PLAN))
    for name, parameter in tiny.named_parameters():
        if parameter.requires_grad:
            expected = _mmpose_scale(name, depth=4, decay=0.7)
            assert group_of[id(parameter)]["lr_scale"] == pytest.approx(expected, rel=1e-12), name


def test_scales_of_a_published_depth() -> None:
    with torch.device("meta"):
        model = SapiensPose("sapiens_0.3b", 17, (512, 384))
    groups = optim.param_groups(model.layer_groups(), OptimConfig(layer_decay=0.85))
    scales = {group["name"].split(".")[0]: group["lr_scale"] for group in groups}
    assert scales["head"] == scales["norm"] == 1.0
    assert scales["block_23"] == pytest.approx(0.85)
    assert scales["block_0"] == pytest.approx(0.85**24)
    assert scales["embeddings"] == pytest.approx(0.85**25)


def test_weight_decay_is_on_everything_but_biases_norms_and_positions(tiny: SapiensPose) -> None:
    group_of = _by_parameter(optim.param_groups(tiny.layer_groups(), PLAN))
    without = 0
    for name, parameter in tiny.named_parameters():
        spared = name.endswith("bias") or parameter.ndim == 1 or name == "backbone.embeddings.position_embeddings"
        assert group_of[id(parameter)]["weight_decay"] == (0.0 if spared else 0.05), name
        without += spared
    assert 0 < without < len(list(tiny.parameters()))


def test_set_lr_gives_each_group_its_share(tiny: SapiensPose) -> None:
    optimizer = optim.adamw(optim.param_groups(tiny.layer_groups(), PLAN), PLAN, torch.device("cpu"))
    assert all(group["betas"] == (0.8, 0.95) for group in optimizer.param_groups)
    for rate in (1e-3, 2e-5, 1e-3):  # a share of the rate, not of the last one
        optim.set_lr(optimizer, rate)
        group_of = _by_parameter(optimizer.param_groups)
        for name, parameter in tiny.named_parameters():
            assert group_of[id(parameter)]["lr"] == pytest.approx(rate * _mmpose_scale(name, 4, 0.7), rel=1e-12)


def test_the_optimizer_is_adamw_with_the_scaled_rate(tiny: SapiensPose) -> None:
    """One step from equal gradients: Adam's first update is the rate, after decoupled decay."""
    optimizer = optim.adamw(optim.param_groups(tiny.layer_groups(), PLAN), PLAN, torch.device("cpu"))
    optim.set_lr(optimizer, 1e-2)
    before = {name: parameter.detach().clone() for name, parameter in tiny.named_parameters()}
    for parameter in tiny.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for name, parameter in tiny.named_parameters():
        rate = 1e-2 * _mmpose_scale(name, 4, 0.7)
        spared = name.endswith("bias") or parameter.ndim == 1 or name.endswith("position_embeddings")
        expected = before[name] * (1 - rate * (0.0 if spared else 0.05)) - rate
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-5, atol=1e-6)


# ---- Schedule


def test_warm_up_is_linear_from_a_thousandth_to_the_peak() -> None:
    plan = OptimConfig(lr=2.0, warmup_steps=500, schedule="constant")
    assert optim.lr_at(0, 100_000, plan) == pytest.approx(0.002, rel=1e-12)
    assert optim.lr_at(250, 100_000, plan) == pytest.approx((0.002 + 2.0) / 2, rel=1e-12)
    assert optim.lr_at(499, 100_000, plan) == pytest.approx(2.0 - 1.998 / 500, rel=1e-12)
    assert optim.lr_at(500, 100_000, plan) == 2.0
    assert optim.lr_at(99_999, 100_000, plan) == 2.0


def test_warm_up_is_at_most_a_tenth_of_the_stage() -> None:
    plan = OptimConfig(lr=2.0, warmup_steps=500, schedule="constant")
    rates = [optim.lr_at(step, 1000, plan) for step in range(1000)]
    assert rates[99] < 2.0 and rates[100:] == [2.0] * 900
    assert optim.lr_at(0, 9, plan) == 2.0, "a stage of less than ten steps has none"
    assert optim.lr_at(0, 1000, OptimConfig(lr=2.0, warmup_steps=0, schedule="constant")) == 2.0


def test_multistep_falls_to_a_tenth_at_each_milestone_exactly() -> None:
    plan = OptimConfig(lr=1.0, warmup_steps=0, schedule="multistep")
    num = 2100
    rates = [optim.lr_at(step, num, plan) for step in range(num)]
    expected = [1.0] * 1700 + [0.1] * 300 + [0.01] * 100  # 170 and 200 of 210 epochs
    assert rates == pytest.approx(expected, rel=1e-9)


def test_multistep_counts_its_milestones_from_the_start_of_the_stage() -> None:
    plan = OptimConfig(lr=1.0, warmup_steps=500, schedule="multistep", milestones=(0.25, 0.5))
    assert [optim.lr_at(step, 10_000, plan) for step in (2499, 2500, 4999, 5000)] == pytest.approx([1, 0.1, 0.1, 0.01])


def test_cosine_and_linear_start_at_the_peak_and_end_near_0() -> None:
    cosine = OptimConfig(lr=2.0, warmup_steps=100, schedule="cosine")
    linear = OptimConfig(lr=2.0, warmup_steps=100, schedule="linear")
    assert optim.lr_at(100, 1100, cosine) == optim.lr_at(100, 1100, linear) == 2.0
    assert optim.lr_at(600, 1100, cosine) == pytest.approx(1.0)
    assert optim.lr_at(350, 1100, cosine) == pytest.approx(1.0 + math.cos(math.pi / 4))
    assert optim.lr_at(350, 1100, linear) == pytest.approx(1.5)
    assert 0 < optim.lr_at(1099, 1100, cosine) < 2.0 * 3e-6
    assert optim.lr_at(1099, 1100, linear) == pytest.approx(0.002)
    for plan in (cosine, linear):
        rates = [optim.lr_at(step, 1100, plan) for step in range(100, 1100)]
        assert all(later < earlier for earlier, later in pairwise(rates))


STEPS_OF_LARGE_ARRAYS = """
import resource, sys
from itertools import repeat
from types import SimpleNamespace
import torch
from sapiens_accel.config.schema import OptimConfig
from sapiens_accel.runtime import distributed
from sapiens_accel.selftest.training_step import random_batch
from sapiens_accel.training.loop import StepConfig, steps

def loss(model, batch, prepared):
    return (torch.ones(1 << 24) * model.weight).mean(), {}

accelerator, model = distributed.start(), torch.nn.Linear(1, 1)
objective = SimpleNamespace(prepare=lambda batches, step: [None], loss=loss, after_step=lambda: None)
optimizer = torch.optim.SGD([{"params": model.parameters(), "lr_scale": 1.0}], lr=1.0)
batches = repeat(random_batch(1, 0, (32, 32), accelerator.device))
faults = [resource.getrusage(resource.RUSAGE_SELF).ru_minflt]
config = StepConfig(accumulation=1, optim=OptimConfig(), num_steps=9)
for step in steps(accelerator, model, optimizer, objective, batches, config):
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
    if step.number == 9:
        break
print(*[after - before for before, after in zip(faults, faults[1:])])
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
def test_steps_on_a_cpu_keep_the_memory_of_their_activations() -> None:
    """Page faults of each step, which makes arrays of 64 MiB, each of 16,384 pages of 4 kB."""
    done = forks.run(["-c", STEPS_OF_LARGE_ARRAYS], env={**os.environ, "ACCELERATE_MIXED_PRECISION": "no"})
    assert done.returncode == 0, done.stderr
    faults = [int(word) for word in done.stdout.split()]
    # Each step makes three or four such arrays at once; where they lie settles within the first steps.
    assert faults[0] > 40_000 and median(faults[4:]) < 10_000, faults
