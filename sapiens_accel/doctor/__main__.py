from sapiens_accel.doctor import report
from sapiens_accel.errors import run_main

run_main(report.main)
