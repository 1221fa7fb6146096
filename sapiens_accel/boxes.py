"""python -m sapiens_accel.boxes: the command of that name."""

from sapiens_accel.config.parse import guarded
from sapiens_accel.inference import detect_people

if __name__ == "__main__":
    guarded(detect_people.main)
