from sapiens_accel.errors import run_main
from sapiens_accel.sources import convert

run_main(convert.main)
