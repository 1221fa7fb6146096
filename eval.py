"""Run sapiens_accel/eval.py, from a checkout."""

import runpy

if __name__ == "__main__":
    runpy.run_module("sapiens_accel.eval", run_name="__main__")
