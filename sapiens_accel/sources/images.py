"""Images of files and of shards as pixels: whole, smaller where that decodes sooner, or told to be broken."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import UInt8
from numpy import ndarray as Array
from tqdm import tqdm

from sapiens_accel.errors import UserError
from sapiens_accel.sources import shards

JPEG_END = b"\xff\xd9"
JPEG_START_OF_SCAN = 0xDA
JPEG_START_OF_FRAME = (0xC0, 0xC1, 0xC2)  # baseline, extended, progressive: those that are decoded at other sizes
JPEG_APP1 = 0xE1
# OpenCV from 4.11 on decodes to RGB; a reduction is named with the flag of gray, which the one of color overrules.
RGB = getattr(cv2, "IMREAD_COLOR_RGB", None)
REDUCED = {
    1: 0,
    2: cv2.IMREAD_REDUCED_GRAYSCALE_2,
    4: cv2.IMREAD_REDUCED_GRAYSCALE_4,
    8: cv2.IMREAD_REDUCED_GRAYSCALE_8,
}
PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")


class Picture(NamedTuple):
    """A decoded image. One of its pixels stands for reduction x reduction of the file's, and lies amid them."""

    pixels: UInt8[Array, "h w 3"]
    reduction: int


def read_image(path: Path) -> UInt8[Array, "h w 3"]:
    """An RGB image, turned as its EXIF data says.

    Raises:
        UserError: the file does not decode.
    """
    return read_picture(path).pixels


def read_picture(path: Path, at_most: int = 1) -> Picture:
    """`read_image`, smaller where that decodes sooner.

    Args:
        at_most: the largest reduction that may be made, 1, 2, 4 or 8.

    Raises:
        UserError: the file does not decode.
    """
    try:
        content = shards.content(path)
    except OSError:
        content = b""
    reduction = at_most if at_most > 1 and _reducible(content, at_most) else 1
    pixels = _decoded(content, REDUCED[reduction])
    if pixels is None:
        raise UserError(f"{path}: does not decode; mend it, or run with --data.check_images decode")
    return Picture(pixels, reduction)


def _decoded(content: shards.Bytes, size: int) -> UInt8[Array, "h w 3"] | None:
    image = _imdecode(content, size | (RGB or cv2.IMREAD_COLOR))
    return image if image is None or RGB is not None else cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def _imdecode(content: shards.Bytes, how: int) -> Array | None:
    try:
        return cv2.imdecode(np.frombuffer(content, np.uint8), how) if content else None
    except cv2.error:  # of more pixels than OpenCV may read; before 5.0 it returned None
        return None


def _reducible(content: shards.Bytes, reduction: int) -> bool:
    """Whether the decoder itself reduces the image, and its pixels then lie amid those that they stand for.

    That holds for JPEG, counted from the corner where the file begins. EXIF may have the image turned round
    afterwards: if the sides are no multiples of the reduction, that corner's opposite would be taken for it.
    """
    at, may_turn = 2, False
    while content[:2] == b"\xff\xd8" and at + 9 <= len(content) and content[at] == 0xFF:
        marker = content[at + 1]
        if marker in JPEG_START_OF_FRAME:
            sides = int.from_bytes(content[at + 5 : at + 7], "big"), int.from_bytes(content[at + 7 : at + 9], "big")
            return not may_turn or all(side % reduction == 0 for side in sides)
        may_turn |= marker == JPEG_APP1 and content[at + 4 : at + 8] == b"Exif"
        at += 2 + int.from_bytes(content[at + 2 : at + 4], "big")
    return False


def whole_image(path: Path) -> Array | None:
    """The image as `read_image` has it; None if it is cut short or does not decode."""
    return _decoded(_content(path), REDUCED[1]) if _whole(path) else None


def decoded(path: Path, how: int) -> Array | None:
    """What OpenCV makes of an image, BGR; None if it does not decode, is larger than OpenCV may read, or is no file.

    Args:
        how: cv2.IMREAD_COLOR (gray, 16 bits, alpha and CMYK become 8-bit colors) or one of its reduced sizes.
    """
    return _imdecode(_content(path), how)


def _content(path: Path) -> shards.Bytes:
    """An image's bytes; none of what cannot be read."""
    try:
        return shards.content(path) if shards.inside(path) or is_file(path) else b""
    except OSError:
        return b""


def is_file(path: Path) -> bool:
    """Whether it can be opened as a file: no folder, no named pipe (opening it would wait for whoever writes into it),
    no link to nothing or to itself, no name that no file can have."""
    try:
        return path.is_file()
    except OSError:
        return False


def listing(folder: Path) -> set[str]:
    """What is in a folder, by name; nothing in one that is not there."""
    try:
        return {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    except OSError:  # of a name that no folder can have, or of one that may not be read: nothing is there
        return set()


def looks(root: Path, names: Sequence[str], decode: bool) -> dict[str, tuple[int, int] | None]:
    """Each image's height and width in eighths, rounded either way; 0, 0 if not decoded; None if it is corrupt."""

    def look(name: str) -> tuple[int, int] | None:
        path = root / name
        if not _whole(path):
            return None
        image = decoded(path, cv2.IMREAD_REDUCED_COLOR_8) if decode else np.empty((0, 0))
        return None if image is None else image.shape[:2]

    with ThreadPoolExecutor(8) as pool:
        progress = tqdm(pool.map(look, names), total=len(names), desc="checking images", disable=None, leave=False)
        return dict(zip(names, progress, strict=True))


def _whole(path: Path) -> bool:
    """Whether a JPEG or PNG begins and ends as it must. OpenCV fills what a cut JPEG lacks with gray, silently."""
    try:
        if not shards.inside(path) and not is_file(path):
            return False
        with shards.opened(path) as file:
            head = file.read(8)
            file.seek(max(0, file.seek(0, os.SEEK_END) - 64))
            tail = file.read()
    except OSError:
        return False
    if head[:2] == b"\xff\xd8":
        # Cameras append data of their own, so the end need not be the last thing in the file.
        return JPEG_END in tail or JPEG_END in _jpeg_scan(bytes(shards.content(path)))
    return b"IEND" in tail if head == b"\x89PNG\r\n\x1a\n" else len(head) == 8


def _jpeg_scan(content: bytes) -> bytes:
    """What follows the headers: they may hold a thumbnail with an end of its own. Segments are marker, length, data."""
    at = 2
    while at + 4 <= len(content) and content[at] == 0xFF and content[at + 1] != JPEG_START_OF_SCAN:
        at += 2 + int.from_bytes(content[at + 2 : at + 4], "big")
    return content[at:]
