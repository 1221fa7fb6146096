"""A driver that answers torch.cuda's questions for cards that are not there, so that what only a GPU reaches runs here.

It stands below torch.cuda's own Python: torch checks indices and devices as on a real machine. Nothing is computed:
tensors on a pretended card are fake ones (torch._subclasses.FakeTensorMode).
"""

import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Card:
    """A card: what its driver says, and what CUDA's context takes of its memory."""

    name: str
    capability: tuple[int, int]
    total: int  # MiB
    context: int = 450  # MiB


T4 = Card(name="Tesla T4", capability=(7, 5), total=15109)
V100 = Card(name="Tesla V100-SXM2-16GB", capability=(7, 0), total=16151)
A4000 = Card(name="NVIDIA RTX A4000", capability=(8, 6), total=16376)
RTX4080 = Card(name="NVIDIA GeForce RTX 4080", capability=(8, 9), total=16376)
A100 = Card(name="NVIDIA A100-SXM4-40GB", capability=(8, 0), total=40339)
H100 = Card(name="NVIDIA H100 80GB HBM3", capability=(9, 0), total=81079)
RTX5090 = Card(name="NVIDIA GeForce RTX 5090", capability=(12, 0), total=32607)
GTX1080TI = Card(name="NVIDIA GeForce GTX 1080 Ti", capability=(6, 1), total=11172)

# What a wheel of torch 2.11 for CUDA 12.8 was built for.
ARCHITECTURES = "sm_70 sm_75 sm_80 sm_86 sm_90 sm_100 sm_120"


@dataclass(kw_only=True)
class Driver:
    """What the cards are, and what was done to them."""

    cards: list[Card]
    current: int = 0
    reserved: int = 0
    allocated: int = 0
    fraction: float = 1.0
    done: list[str] = field(default_factory=list)

    def properties(self, index: int) -> Any:
        card = self.cards[index]
        major, minor = card.capability
        return types.SimpleNamespace(name=card.name, major=major, minor=minor, total_memory=card.total * MIB)

    def memory(self, index: int) -> tuple[int, int]:
        card = self.cards[index]
        return (card.total - card.context) * MIB - self.reserved, card.total * MIB

    def stats(self, device: Any = None) -> dict[str, int]:
        return {
            "reserved_bytes.all.current": self.reserved,
            "allocated_bytes.all.current": self.allocated,
            "allocated_bytes.all.peak": self.allocated,
        }


class Stream:
    """A stream in which nothing is computed: what is put into it and waited for is noted."""

    cuda_stream = 7  # its handle

    def __init__(self, driver: Driver, name: str) -> None:
        self.driver, self.name = driver, name

    def wait_stream(self, other: "Stream") -> None:
        self.driver.done.append(f"{self.name} waits for {other.name}")

    def record_event(self) -> str:
        self.driver.done.append(f"{self.name} records")
        return f"event of {self.name}"

    def wait_event(self, event: str) -> None:
        self.driver.done.append(f"{self.name} waits for {event}")


def pretend(monkeypatch: pytest.MonkeyPatch, *cards: Card, architectures: str = ARCHITECTURES) -> Driver:
    """Until the test is over, this machine has these cards."""
    driver = Driver(cards=list(cards))

    def stub(owner: Any, name: str, function: Any) -> None:
        monkeypatch.setattr(owner, name, function, raising=False)

    def set_current(index: int) -> None:
        driver.current = index

    @contextmanager
    def within(stream: Stream) -> Iterator[None]:
        driver.done.append(f"in {stream.name}")
        yield

    below, cuda = torch._C, torch.cuda
    stub(cuda, "is_available", lambda: True)
    stub(cuda, "is_initialized", lambda: True)
    for module in (cuda, cuda.memory):
        stub(module, "_lazy_init", lambda: None)
    stub(cuda, "device_count", lambda: len(driver.cards))
    stub(cuda, "_get_device_properties", driver.properties)
    stub(cuda, "cudart", lambda: types.SimpleNamespace(cudaMemGetInfo=driver.memory))
    stub(below, "_cuda_getDevice", lambda: driver.current)
    stub(below, "_cuda_setDevice", set_current)
    stub(cuda, "get_arch_list", architectures.split)
    stub(below, "_cuda_getMemoryFraction", lambda index: driver.fraction)
    stub(below, "_cuda_resetPeakMemoryStats", lambda index: driver.done.append(f"peak of {index} reset"))
    stub(cuda.memory, "memory_stats", driver.stats)
    stub(cuda, "empty_cache", lambda: driver.done.append("cache emptied"))
    stub(cuda, "current_stream", lambda device=None: Stream(driver, "compute"))
    stub(cuda, "Stream", lambda device=None: Stream(driver, "copies"))
    stub(cuda, "stream", within)
    return driver
