from sapiens_accel.errors import run_main
from sapiens_accel.memory import planner

run_main(planner.main)
