"""python -m sapiens_accel.export: the command of that name."""

from sapiens_accel.errors import run_main
from sapiens_accel.models import export

if __name__ == "__main__":
    run_main(export.main)
