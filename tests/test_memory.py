"""The plan of a device's memory: bytes that can be counted by hand, and a refusal of what cannot fit."""

import pytest
import torch

from sapiens_accel.config import UserError
from sapiens_accel.distributed import Strategy
from sapiens_accel.memory import largest_micro_batch, person_bytes, state_bytes
from sapiens_accel.model import SapiensPose

GIB = 2**30
INPUT_HW = (512, 384)


def strategy(zero: int = 0, num_ranks: int = 1, half: bool = True, **offloads: bool) -> Strategy:
    return Strategy(zero=zero, num_ranks=num_ranks, half=half, **{"offload": False, **offloads})


def network(name: str) -> SapiensPose:
    with torch.device("meta"):
        return SapiensPose(name, 17, INPUT_HW)


@pytest.mark.parametrize(
    ("plan", "bytes_per_parameter"),
    [
        # Weights, gradients, masters and two Adam moments.
        (strategy(), 4 + 4 + 8),
        (strategy(half=False), 4 + 4 + 8),
        (strategy(zero=1, num_ranks=4), 2 + 2 + (4 + 8) / 4),
        (strategy(zero=2), 2 + 2 + 4 + 8),
        (strategy(zero=2, num_ranks=4), 2 + (2 + 4 + 8) / 4),
        (strategy(zero=2, offload=True), 2),
        (strategy(zero=3, offload=True, offload_weights=True), 0),
        (strategy(zero=3, num_ranks=4), (2 + 2 + 4 + 8) / 4),
    ],
)
def test_state_bytes_by_hand(plan: Strategy, bytes_per_parameter: float) -> None:
    assert state_bytes(1000, 1000, plan) == 1000 * bytes_per_parameter


def test_frozen_parameters_are_weights_alone() -> None:
    assert state_bytes(1000, 0, strategy(zero=2)) == 2000


def test_one_billion_under_adamw_does_not_fit_16_gib_and_is_refused() -> None:
    with pytest.raises(UserError, match=r"sapiens_1b: .* need 1\d\.\d GiB \(predicted\).*zero2_offload\.yaml"):
        largest_micro_batch(network("sapiens_1b"), 15 * GIB, strategy(zero=2), checkpointed=True, teacher=False)


@pytest.mark.parametrize(
    ("name", "plan"),
    [
        ("sapiens_1b", strategy(zero=2, offload=True)),
        ("sapiens_2b", strategy(zero=2, offload=True)),
        ("sapiens2_5b", strategy(zero=3, offload=True, offload_weights=True)),
    ],
)
def test_what_the_recipes_recommend_is_not_refused(name: str, plan: Strategy) -> None:
    assert largest_micro_batch(network(name), 15 * GIB, plan, checkpointed=True, teacher=False) >= 1


def test_more_people_fit_with_more_memory_and_with_checkpointing() -> None:
    model = network("sapiens_0.3b")

    def people(gib: int, checkpointed: bool = True, teacher: bool = False) -> int:
        return largest_micro_batch(model, gib * GIB, strategy(), checkpointed=checkpointed, teacher=teacher)

    assert 1 < people(15) < people(24) < people(80)
    assert people(15, checkpointed=False) < people(15)
    assert people(15, teacher=True) < people(15) / 2
    assert person_bytes(model, half=True, checkpointed=True) * people(80) < 80 * GIB


def test_a_cpu_does_not_limit() -> None:
    assert largest_micro_batch(network("sapiens_2b"), None, strategy(), checkpointed=True, teacher=True) >= 2**20
