"""python -m sapiens_accel.boxes: the command of that name."""

from sapiens_accel.errors import run_main
from sapiens_accel.inference import detect_people

if __name__ == "__main__":
    run_main(detect_people.main)
