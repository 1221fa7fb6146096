"""GPUs by name: what they can use of their memory, their compute capability, and the rates that are assumed of them."""

from dataclasses import dataclass, replace

from sapiens_accel.errors import UserError

MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Sustained rates of a machine, per second.

    Attributes:
        flops: 16-bit operations in a training step, all of its parts included.
        bus: bytes between a GPU and the host.
        host: bytes of host memory that the optimizer on the host reads and writes.
        measured: `flops` was measured by the selftest; else all are assumed.
    """

    flops: float = 4e13
    bus: float = 1.2e10
    host: float = 2e10
    measured: bool = False


ASSUMED = Rates()  # of a 16 GB card of compute capability 8


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A card.

    Attributes:
        device: a part of the name that the driver gives it.
        memory: bytes that the driver leaves to programs, CUDA's own included. Of the data sheets and drivers of these
            cards, not measured by this package.
    """

    device: str
    memory: int
    capability: tuple[int, int]
    rates: Rates


def _gpu(device: str, mib: int, capability: tuple[int, int], tflops: float, gb_per_second: float) -> Gpu:
    # A card for PCIe 4 or 5 is in a host with faster memory, too.
    rates = Rates(flops=1e12 * tflops, bus=1e9 * gb_per_second, host=2e10 if gb_per_second < 20 else 3e10)
    return Gpu(device=device, memory=mib * MIB, capability=capability, rates=rates)


# The rates are a third to a half of the peaks of the data sheets (65 TFLOP/s of a T4, 312 of an A100) of cards for data
# centers, and three quarters of those of GeForce cards with sums in fp32; the bus reaches three quarters of PCIe's.
GPUS = {
    "T4": _gpu("T4", 15109, (7, 5), 22, 12),
    "V100": _gpu("V100", 16151, (7, 0), 55, 12),
    "A4000": _gpu("RTX A4000", 16376, (8, 6), 40, 24),
    "L4": _gpu("L4", 22700, (8, 9), 50, 24),
    "4060Ti-16": _gpu("RTX 4060 Ti", 16380, (8, 9), 33, 12),
    "4080": _gpu("RTX 4080", 16376, (8, 9), 75, 24),
    "3090": _gpu("RTX 3090", 24268, (8, 6), 53, 24),
    "4090": _gpu("RTX 4090", 24564, (8, 9), 120, 24),
    "A100": _gpu("A100", 40536, (8, 0), 165, 24),
    "H100": _gpu("H100", 81079, (9, 0), 360, 48),
}


def get_gpu(name: str) -> Gpu:
    """The card of this name; upper and lower case are the same.

    Raises:
        UserError: it is not in the table.
    """
    for known, gpu in GPUS.items():
        if known.lower() == name.lower():
            return gpu
    raise UserError(
        f"--gpu {name}: not in the table (expected one of {', '.join(GPUS)}). For another card give --gpu_memory and "
        "--capability"
    )


def rates_of_device(device: str) -> Rates:
    """The rates that are assumed of a card, by the name that its driver gives it."""
    # "L4" is also a part of "L40": the longest name that is contained decides, as whole words.
    words = device.replace("-", " ").split()
    known = [gpu for gpu in GPUS.values() if set(gpu.device.split()) <= set(words)]
    return max(known, key=lambda gpu: len(gpu.device)).rates if known else ASSUMED


def with_measured(rates: Rates, flops: float | None) -> Rates:
    """These rates with the operations that the selftest has measured, if it has."""
    return rates if flops is None else replace(rates, flops=flops, measured=True)
