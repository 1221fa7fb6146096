"""A GPU as its driver describes it: whether it can be trained on at all, and the peak of what torch allocates there."""

import torch

from sapiens_accel.errors import UserError

LEAST_CAPABILITY = (7, 0)  # the first with tensor cores, and the least that DeepSpeed does fp16 on


def check_device(index: int) -> None:
    """Refuse a GPU that this package or this build of torch cannot run on, before anything is built.

    Raises:
        UserError: with the card and what to do.
    """
    if problem := problem_of_device(index):
        raise UserError(problem)


def choose_device(name: str | torch.device | None, option: str) -> torch.device:
    """The device of this name; by default the GPU, if there is one.

    Args:
        option: what named it, for messages.

    Raises:
        UserError: there is no such device.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError):
        raise UserError(
            f"{option} {name}: not on this machine, or not for this PyTorch (expected cpu or, with a GPU, cuda)"
        ) from None


def problem_of_device(index: int) -> str | None:
    """What is wrong with a GPU, in one line; None where nothing is."""
    if index >= (count := torch.cuda.device_count()):
        return f"process {index} of this machine has no GPU (found {count}). Launch with --num_processes {count}"
    if torch.version.hip:
        return None  # an AMD GPU: its names and numbers are other ones
    properties = torch.cuda.get_device_properties(index)
    capability, built_for = (properties.major, properties.minor), torch.cuda.get_arch_list()
    card = f"GPU {index}, {properties.name}, compute capability {properties.major}.{properties.minor}"
    elsewhere = "Take another card (CUDA_VISIBLE_DEVICES), or the CPU (CUDA_VISIBLE_DEVICES= with nothing after it)"
    if capability < LEAST_CAPABILITY:
        least = ".".join(str(part) for part in LEAST_CAPABILITY)
        return f"{card}: too old (expected {least} or newer). {elsewhere}"
    if built_for and not _has_code(capability, built_for):
        version = f"torch {torch.__version__}, built for {', '.join(built_for)}"
        return f"{card}: this torch has no code for it ({version}). Install a build that has (pytorch.org). {elsewhere}"
    return None


def _has_code(capability: tuple[int, int], built_for: list[str]) -> bool:
    """Whether compiled code (sm_XY: same X, Y at most the card's) or PTX (compute_XY: any later card) runs there."""
    for name in built_for:
        kind, _, number = name.partition("_")
        digits = number.rstrip("af")  # for one architecture or its family alone
        code = int(digits[:-1]), int(digits[-1])
        if kind == "sm" and code[0] == capability[0] and code[1] <= capability[1]:
            return True
        if kind == "compute" and digits == number and code <= capability:
            return True
    return False


def reset_peak(device: torch.device) -> None:
    """Count the peak of allocated memory from now on; on a CPU there is none."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int | None:
    """The most that torch has had allocated on a GPU since `reset_peak`; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
