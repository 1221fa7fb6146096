"""What a run is made by: versions of the libraries, and the commit of this package."""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

LIBRARIES = (
    "sapiens_accel", "torch", "accelerate", "deepspeed", "transformers", "datasets", "albumentations",
    "opencv-python-headless", "nvidia-nvimgcodec-cu12", "numpy", "pycocotools", "torchao", "peft", "bitsandbytes",
    "liger-kernel",
)  # fmt: skip


def describe_versions() -> str:
    """One line: Python, the libraries that are installed, and the commit."""
    installed = [f"{name} {number}" for name in LIBRARIES if (number := package_version(name))]
    commit = package_commit()
    return ", ".join([f"python {platform.python_version()}", *installed, *([f"commit {commit}"] if commit else [])])


def package_version(name: str) -> str | None:
    """The version of an installed package; None for others."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def package_commit() -> str | None:
    """The git commit that this package is of, with "-dirty" if files differ from it; None where it is not in git."""
    package = Path(__file__).parents[1]

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(package), *words], capture_output=True, text=True, check=False, timeout=10
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # Installed into an environment inside of somebody's repository, it is no file of that one.
    if git("ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
