"""Fine-tune Sapiens and Sapiens2 for 2-D human pose on the GPUs people have."""

import importlib
import os
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sapiens_accel.errors import UserError as UserError
    from sapiens_accel.eval import evaluate as evaluate
    from sapiens_accel.inference.estimator import PoseEstimator as PoseEstimator
    from sapiens_accel.inference.estimator import PoseResult as PoseResult
    from sapiens_accel.train import train as train

__version__ = "0.1.0"

if "torch" not in sys.modules:
    # Read once, when torch loads OpenMP. By default its threads spin while they wait for each other: with 2 threads on
    # 2 cores, of which another process used one, a step of the demo took 2.7 s; with threads that sleep, 0.4 s.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _has_exact_pinned_memory() -> bool:
    """Whether torch's allocator has `pinned_max_round_threshold_mb`: 2.13 has, and an older one may refuse it."""
    try:
        major, minor = version("torch").split(".")[:2]
    except PackageNotFoundError:
        return False
    return (int(major), int(minor)) >= (2, 13)


if not os.environ.keys() & {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}:
    # Read once, when torch starts CUDA: blocks that can grow leave less memory in gaps that nothing fits in.
    os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    if _has_exact_pinned_memory():
        # Pinned memory of over 1 MiB is not rounded up to a power of two: 2 GiB of the host for an offloaded 1B.
        os.environ["PYTORCH_ALLOC_CONF"] += ",pinned_max_round_threshold_mb:1"

# Read once, when OpenCV is loaded. 134 megapixels are 0.4 GB once decoded, in each loading process; OpenCV's own limit
# is 8 times as many, which a file of a few MB can ask for.
_limit = os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(1 << 27))
if not (_limit.isascii() and _limit.isdigit() and len(_limit) < 19 and int(_limit)):
    # To import OpenCV with it would abort the process, before any handler of errors.
    sys.exit(
        f"OPENCV_IO_MAX_IMAGE_PIXELS: not a number of pixels (expected a whole number such as {1 << 27}, found "
        f"{_limit!r}). Correct or unset that environment variable."
    )

# What `from sapiens_accel import NAME` gives, by its module, which is imported then: importing torch takes seconds.
# `train` is that module itself, which can be called (sapiens_accel/train.py says why).
_API = {
    "PoseEstimator": "sapiens_accel.inference.estimator",
    "PoseResult": "sapiens_accel.inference.estimator",
    "UserError": "sapiens_accel.errors",
    "evaluate": "sapiens_accel.eval",
    "train": "sapiens_accel.train",
}
__all__ = ["PoseEstimator", "PoseResult", "UserError", "__version__", "evaluate", "train"]


def __getattr__(name: str) -> Any:
    if name not in _API:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(_API[name])
    return module if module.__name__ == f"{__name__}.{name}" else getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_API})
