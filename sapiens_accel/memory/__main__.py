from sapiens_accel.config.parse import guarded
from sapiens_accel.memory import planner

guarded(planner.main)
