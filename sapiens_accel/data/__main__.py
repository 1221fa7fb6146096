from sapiens_accel.config.parse import guarded
from sapiens_accel.sources import convert

guarded(convert.main)
