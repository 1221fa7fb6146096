"""python -m sapiens_accel.export: the command of that name."""

from sapiens_accel.config.parse import guarded
from sapiens_accel.models import export

if __name__ == "__main__":
    guarded(export.main)
