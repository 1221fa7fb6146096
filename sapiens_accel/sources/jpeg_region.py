"""A part of a JPEG, decoded sooner than all of it: no pixel beside it is made, and what is below it is not read.

By libjpeg-turbo in nvImageCodec, on the CPU; an extra: pip install "sapiens_accel[jpeg]".
"""

import os
import sys
import tempfile
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from numpy import ndarray as Array

CPU_ONLY = -99999  # nvImageCodec's number of no device
# Colors at a side of what is decoded are not mixed with those beyond: so much more is decoded, and left out.
MARGIN = 32  # px, the widest block


class Region(NamedTuple):
    """A rectangle of image px; right and bottom are one past the last."""

    left: int
    top: int
    right: int
    bottom: int


@cache
def find_package() -> Path | None:
    """Return the folder of nvImageCodec, if it is installed."""
    if sys.platform != "linux" or find_spec("nvidia") is None:
        return None
    spec = find_spec("nvidia.nvimgcodec")
    return Path(spec.origin).parent if spec and spec.origin else None


def decode(content: bytes, region: Region, image_width: int) -> UInt8[Array, "h w 3"] | None:
    """Decode a region of a JPEG to RGB; EXIF data do not turn it.

    The same bytes as of the whole image by OpenCV, which has libjpeg-turbo as well (tests/sources/test_jpeg_region.py).

    Returns:
        None if it does not decode, or nothing decodes parts on this machine.
    """
    opened = _open_decoder(os.getpid())  # a process that was forked has not the threads of the other
    if opened is None:
        return None
    codec, decoder, settings = opened
    first, end = max(0, region.left - MARGIN), min(image_width, region.right + MARGIN)
    wider = codec.Region(region.top, first, region.bottom, end)
    try:
        stream = codec.CodeStream(content).get_sub_code_stream(region=wider)
        image = decoder.decode(stream, params=settings)
    except RuntimeError:  # the header is damaged
        return None
    return None if image is None else np.asarray(image.cpu())[:, region.left - first : region.right - first]


@cache
def _open_decoder(_: int) -> tuple[Any, Any, Any] | None:
    try:
        codec = _import_codec()
    except (ImportError, OSError):  # a temporary folder that is full or has no links: whole images have the same pixels
        return None
    backends = [codec.Backend(codec.BackendKind.CPU_ONLY)]
    decoder = codec.Decoder(device_id=CPU_ONLY, max_num_cpu_threads=1, backends=backends)
    return codec, decoder, codec.DecodeParams(apply_exif_orientation=False, color_spec=codec.ColorSpec.SRGB)


@cache
def _import_codec() -> Any:
    """Import nvImageCodec in silence: the extensions other than libjpeg-turbo print that they find no CUDA."""
    package, before = find_package(), dict(os.environ)
    assert package is not None
    with tempfile.TemporaryDirectory() as folder:
        for file in (package / "extensions").glob("*jpeg_turbo*"):
            (Path(folder) / file.name).symlink_to(file)
        os.environ.update(NVIMGCODEC_EXTENSIONS_PATH=folder, PYNVIMGCODEC_VERBOSITY="0")
        try:
            from nvidia import nvimgcodec  # pyright: ignore[reportMissingImports]
        finally:
            for name in ("NVIMGCODEC_EXTENSIONS_PATH", "PYNVIMGCODEC_VERBOSITY"):
                os.environ.pop(name)
            os.environ.update(before)
    return nvimgcodec
