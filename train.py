"""Run sapiens_accel/train.py, from a checkout."""

import runpy

if __name__ == "__main__":
    runpy.run_module("sapiens_accel.train", run_name="__main__")
