"""A part of a JPEG, decoded sooner than all of it: what is below it is not read, and no pixel beside it is made.

What is below is left out by a header that ends the image there, for any decoder. A region is decoded by libjpeg-turbo
in nvImageCodec, on the CPU; an extra: pip install "sapiens_accel[jpeg]".
"""

import math
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
# Colors at a side of what is decoded are not mixed with those beyond: so much more is decoded, and left out. Where two
# pixels share a color, each takes a quarter of the next one's (libjpeg's "fancy upsampling"); where four do, none.
MARGIN = 2  # px
# Below there is time for more: a reduced pixel stands for up to 8, and a crop's matrix mixes it with the next.
MARGIN_BELOW = 32  # px
LARGEST_CUT = 0.9  # of an image's rows: more are decoded no sooner than all
SEQUENTIAL = (0xC0, 0xC1)  # rows lie one after the other; a progressive file has all of them in each of its scans
START_OF_SCAN, RESTART_INTERVAL = 0xDA, 0xDD
SEVERAL = b"MPF\0"  # another image follows: a smaller one, or what makes it brighter
START, END = b"\xff\xd8", b"\xff\xd9"


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


def cut_below(content: bytes, frame_at: int, bottom: int) -> bytearray | None:
    """A JPEG of three colors without its rows below `bottom` (px of the image) and a margin: its decoder ends there.

    The rows above are the same to the byte. The end marker goes too: OpenCV's decoder would look for it and print that
    there are bytes too many before it.

    Args:
        frame_at: position of the start of frame, whose header has the height.

    Returns:
        None if that saves too little, or the file is not one scan of rows of blocks of all colors, in one piece. It may
        still not decode: a decoder reads up to 8 bytes ahead.
    """
    height = int.from_bytes(content[frame_at + 5 : frame_at + 7], "big")
    block_h = 8 * max((sampling & 15 for sampling in content[frame_at + 11 : frame_at + 18 : 3]), default=0)
    kept = block_h * math.ceil((bottom + MARGIN_BELOW) / block_h) if block_h else 0
    if content[frame_at + 1] not in SEQUENTIAL or not 0 < kept <= LARGEST_CUT * height:
        return None
    at = len(START)
    while at + 6 <= len(content) and content[at] == 0xFF and content[at + 1] != START_OF_SCAN:
        if content[at + 1] == RESTART_INTERVAL and content[at + 4 : at + 6] != b"\0\0":
            return None
        at += 2 + int.from_bytes(content[at + 2 : at + 4], "big")
    if content[at + 1 : at + 5 : 3] != bytes((START_OF_SCAN, 3)):
        return None
    if SEVERAL in content[:at]:  # to look for the first end takes 3 ms of 3 MB, so only here
        end = content.find(END, at)
        if content[end + 2 : end + 4] not in (b"", START):  # of damaged data
            return None
    else:
        end = content.rfind(END)
        while content[end - 2 : end] == END:
            end -= 2
    upper = bytearray(memoryview(content)[:end])
    upper[frame_at + 5 : frame_at + 7] = kept.to_bytes(2, "big")
    return upper


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
