from sapiens_accel.config.parse import guarded
from sapiens_accel.doctor import report

guarded(report.main)
