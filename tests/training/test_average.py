"""The moving average against its closed formula in float64, kept in every place, alone and among ranks."""

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path

import forks
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sapiens_accel.config.schema import TeacherPlacement
from sapiens_accel.training import ema as average
from sapiens_accel.training.ema import MovingAverage, Ranks

ROOT = Path(__file__).parents[2]
STEPS, DECAY = 3000, 0.999
ROUNDING = 3e-6  # of fp32, over so many steps, for values of about 1
PLACES: tuple[TeacherPlacement, ...] = ("device", "sharded", "host")
DEVICES = [torch.device("cpu"), *([torch.device("cuda", 0)] if torch.cuda.is_available() else [])]


class Network(nn.Module):
    """Parameters of all shapes, of sizes that nothing divides, and a buffer."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        shapes = ((), (7,), (5, 13), (3, 1, 2), (211,))
        self.values = nn.ParameterList([torch.rand(shape, generator=generator) - 0.5 for shape in shapes])
        self.register_buffer("offset", torch.randn(3, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :5] @ self.values[2] + self.values[0]


def walk(num: int, dtype: torch.dtype = torch.float32) -> list[list[Tensor]]:
    """Students: a random walk away from the first network, as rounded in `dtype`."""
    generator = torch.Generator().manual_seed(1)
    values = [parameter.detach().clone() for parameter in Network().parameters()]
    found = []
    for _ in range(num):
        values = [value + 0.01 * torch.randn(value.shape, generator=generator) + 3e-4 for value in values]
        found.append([value.to(dtype) for value in values])
    return found


def formula(first: Tensor, students: Tensor, decay: float) -> Tensor:
    """d^n m_0 + (1 - d) sum over i of d^(n - i) s_i, in float64. students: [n, *shape]."""
    num = len(students)
    powers = decay ** torch.arange(num - 1, -1, -1, dtype=torch.float64)
    return decay**num * first.double() + (1 - decay) * torch.tensordot(powers, students.double(), dims=1)


def among(num: int, job: Callable[[Ranks], dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """What a job gives on each of so many ranks: threads that hand each other their parts."""
    barrier, wholes = threading.Barrier(num), {}

    def ranks(rank: int) -> Ranks:
        def share(whole: Tensor) -> None:
            wholes[rank] = whole.view(num, -1)
            barrier.wait()
            for other in set(range(num)) - {rank}:
                wholes[rank][other] = wholes[other][other]
            barrier.wait()

        return Ranks(rank, num, share)

    with ThreadPoolExecutor(num) as pool:
        return list(pool.map(lambda rank: job(ranks(rank)), range(num)))


def averaged(
    place: TeacherPlacement, students: list[list[Tensor]], device: torch.device, ranks: Ranks | None, dtype: torch.dtype
) -> tuple[MovingAverage, dict[str, Tensor]]:
    mean = MovingAverage(Network(), place, device=device, dtype=dtype, ranks=ranks)
    for values in students:
        mean.update([value.to(device) for value in values], DECAY)
    return mean, mean.state_dict()


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several pieces in a tensor, as in a large one."""
    monkeypatch.setattr(average, "PIECE", 50)


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_way_gives_the_formula_and_the_same_bits(dtype: torch.dtype, device: torch.device) -> None:
    students = walk(STEPS, dtype)
    _, reference = averaged("device", students, torch.device("cpu"), None, dtype)
    rounded = [parameter.detach().bfloat16() for parameter in Network().parameters()]
    for index, (name, first) in enumerate(Network().named_parameters()):
        path = torch.stack([values[index] for values in students])
        expected = formula(first.detach(), path, DECAY)
        assert reference[name].dtype == torch.float32
        torch.testing.assert_close(reference[name].double(), expected, rtol=0, atol=ROUNDING)
        moved = (expected - first.detach().double()).norm()
        assert moved > 0.3
        # An average in bf16 loses most of the way: nobody could take it for the formula.
        for value in path:
            rounded[index] = rounded[index] + (value.bfloat16() - rounded[index]) * (1 - DECAY)
        assert (rounded[index].double() - expected).norm() > max(0.1 * moved, 1000 * ROUNDING)
    for place in PLACES:
        mean, state = averaged(place, students, device, None, dtype)
        assert all(value.device.type == "cpu" and torch.equal(value, reference[n]) for n, value in state.items())
        assert set(state) == set(reference) == set(Network().state_dict())
        kept = torch.float32 if place == "device" else dtype
        for name, parameter in mean.network.named_parameters():
            assert parameter.dtype == kept and parameter.device == device and not parameter.requires_grad
            assert torch.equal(parameter.cpu(), reference[name].to(kept))


@pytest.mark.parametrize("num", [2, 3])
@pytest.mark.parametrize("place", ["sharded", "host"])
def test_ranks_that_keep_a_part_each_have_the_whole(place: TeacherPlacement, num: int) -> None:
    students, cpu = walk(300), torch.device("cpu")
    _, reference = averaged("device", students, cpu, None, torch.bfloat16)
    sizes = []

    def job(ranks: Ranks) -> dict[str, Tensor]:
        mean, state = averaged(place, students, cpu, ranks, torch.bfloat16)
        assert mean._own is not None
        sizes.append(len(mean._own))
        assert bool(state) == (ranks.rank == 0)
        if state:
            assert state.keys() == reference.keys()
            assert all(torch.equal(value, reference[name]) for name, value in state.items())
        return mean.network.state_dict()

    for found in among(num, job):
        for name, _ in Network().named_parameters():
            assert torch.equal(found[name], reference[name].bfloat16())
    total = sum(-(-parameter.numel() // 64) * 64 for parameter in Network().parameters())
    assert set(sizes) == {-(-total // (64 * num)) * 64}


@pytest.mark.parametrize("after", PLACES)
@pytest.mark.parametrize("before", PLACES)
def test_it_goes_on_bit_for_bit_in_any_place(before: TeacherPlacement, after: TeacherPlacement, tmp_path: Path) -> None:
    """Segment in the middle, written, read, and kept by another number of ranks."""
    students, cpu = walk(40), torch.device("cpu")
    _, reference = averaged("device", students, cpu, None, torch.float32)

    def first(ranks: Ranks) -> dict[str, Tensor]:
        return averaged(before, students[:25], cpu, ranks, torch.float32)[1]

    save_file({n: v.contiguous() for n, v in among(2, first)[0].items()}, tmp_path / "state.safetensors")

    def second(ranks: Ranks) -> dict[str, Tensor]:
        mean = MovingAverage(Network(seed=7), after, dtype=torch.bfloat16, ranks=ranks)
        mean.load_state_dict(load_file(tmp_path / "state.safetensors"))
        begun = {name: value.clone() for name, value in mean.network.state_dict().items()}
        for values in students[25:]:
            mean.update(values, DECAY)
        return mean.state_dict() or begun

    found = among(3, second)
    assert all(torch.equal(found[0][name], value) for name, value in reference.items())
    written = load_file(tmp_path / "state.safetensors")
    for begun in found[1:]:
        if after != "device":  # there all ranks have the whole; here the copy stands before the first update
            assert all(torch.equal(value, written[name].to(value.dtype)) for name, value in begun.items())


def test_another_network_is_refused() -> None:
    with pytest.raises(RuntimeError, match="Missing key"):
        MovingAverage(Network(), "host").load_state_dict({})
    with pytest.raises(ValueError, match="zip"):
        MovingAverage(Network(), "host").update([torch.zeros(())], DECAY)


def test_every_tensor_of_the_copy_begins_where_kernels_are_fast() -> None:
    network = MovingAverage(Network(), "host", dtype=torch.bfloat16).network
    assert all(parameter.data_ptr() % 64 == 0 for parameter in network.parameters())
    x = torch.randn(2, 9)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(network(x), deepcopy(Network()).bfloat16()(x))


@pytest.mark.slow
@pytest.mark.launch
@pytest.mark.parametrize("num_steps", [300, pytest.param(STEPS, marks=pytest.mark.slow)])
def test_under_zero_it_is_the_formula_of_the_students_own_values(num_steps: int, tmp_path: Path) -> None:
    """bf16 engines, two processes: many steps under ZeRO-2, and some under ZeRO-3, whose students are gathered."""
    configs = {"zero2": num_steps, "zero3": 60}
    runs = [word for name, num in configs.items() for word in (f"ds_configs/{name}.json", str(num))]
    env = {**os.environ, "ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_USE_DEEPSPEED": "true"}
    done = forks.run(["tests/averages.py", tmp_path, DECAY, *runs], env=env, processes=2)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    for name, num in configs.items():
        zero, one = (torch.load(tmp_path / f"{name}-{rank}.pt") for rank in (0, 1))
        assert zero["history"].dtype == torch.bfloat16 and len(zero["history"]) == num
        assert torch.equal(zero["history"], one["history"])
        first = torch.cat([value.flatten() for value in zero["first"].values()])
        expected = formula(first, zero["history"], DECAY)
        assert (expected - first.double()).norm() > {STEPS: 3.0, 300: 0.3, 60: 0.05}[num]
        for place in PLACES:
            found = torch.cat([value.flatten() for value in zero["states"][place].values()])
            assert found.dtype == torch.float32 and not one["states"][place]
            torch.testing.assert_close(found.double(), expected, rtol=0, atol=ROUNDING)
            for parameter, values in zero["networks"][place].items():
                state = zero["states"]["device"][parameter]
                assert torch.equal(values, one["networks"][place][parameter])
                assert torch.equal(values, state if place == "device" else state.bfloat16())
                assert torch.equal(zero["states"][place][parameter], state)


@pytest.mark.parametrize("num", [1, 3])
@pytest.mark.parametrize("place", PLACES)
def test_only_named_parameters_are_averaged_and_the_others_are_those_of_the_network_itself(place, num) -> None:
    names, students = ("values.2", "values.4"), walk(50)
    first = [parameter.detach().clone() for parameter in Network().parameters()]

    def job(ranks: Ranks) -> dict[str, Tensor]:
        network = Network()
        others = {n: (p.data_ptr(), p.detach().clone()) for n, p in network.named_parameters() if n not in names}
        mean = MovingAverage(network, place, dtype=torch.float32, ranks=ranks, names=names)
        for student in students:
            mean.update([student[2], student[4]], 0.9)
        for name, parameter in mean.network.named_parameters():
            if name in others:
                assert parameter.data_ptr() == others[name][0] and torch.equal(parameter, others[name][1])
        with pytest.raises(RuntimeError, match="other parameters"):
            mean.load_state_dict(network.state_dict())
        return mean.state_dict()

    state = among(num, job)[0]
    assert tuple(state) == names
    for index, name in ((2, "values.2"), (4, "values.4")):
        expected = formula(first[index], torch.stack([student[index] for student in students]), 0.9)
        assert (state[name].double() - expected).abs().max() < ROUNDING
