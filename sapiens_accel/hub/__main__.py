from sapiens_accel.errors import run_main
from sapiens_accel.publish import uploader

run_main(uploader.main)
