"""Packages of the wheel: those of sapiens_accel/, and the launch files, which stay at the top of the repository.

All else is in pyproject.toml, which can either find packages or map them.
"""

from setuptools import find_packages, setup

LAUNCH_FILES = ("accelerate_configs", "ds_configs")

setup(
    packages=[*find_packages(include=["sapiens_accel*"]), *(f"sapiens_accel.{name}" for name in LAUNCH_FILES)],
    package_dir={f"sapiens_accel.{name}": name for name in LAUNCH_FILES},
)
