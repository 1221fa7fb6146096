"""Fine-tune Sapiens and Sapiens2 for 2-D human pose on the GPUs people have."""

import os
import sys

__version__ = "0.1.0"

if "torch" not in sys.modules:
    # Read once, when torch loads OpenMP. By default its threads spin while they wait for each other: with 2 threads on
    # 2 cores, of which another process used one, a step of the demo took 2.7 s; with threads that sleep, 0.4 s.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if not os.environ.keys() & {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}:
    # Read once, when torch starts CUDA: blocks that can grow leave less memory in gaps that nothing fits in.
    os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"

# Read once, when OpenCV is loaded. 134 megapixels are 0.4 GB once decoded, in each loading process; OpenCV's own limit
# is 8 times as many, which a file of a few MB can ask for.
_limit = os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(1 << 27))
if not (_limit.isascii() and _limit.isdigit() and len(_limit) < 19 and int(_limit)):
    # To import OpenCV with it would abort the process, before any handler of errors.
    sys.exit(
        f"OPENCV_IO_MAX_IMAGE_PIXELS: not a number of pixels (expected a whole number such as {1 << 27}, found "
        f"{_limit!r}). Correct or unset that environment variable."
    )
