from sapiens_accel.config.parse import guarded
from sapiens_accel.publish import uploader

guarded(uploader.main)
