from functools import partial

from sapiens_accel.cli import start
from sapiens_accel.errors import run_main

run_main(partial(start, "convert"))
