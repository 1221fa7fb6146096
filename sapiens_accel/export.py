"""python -m sapiens_accel.export: the same as sapiens-accel export."""

from functools import partial

from sapiens_accel.cli import start
from sapiens_accel.errors import run_main

if __name__ == "__main__":
    run_main(partial(start, "export"))
