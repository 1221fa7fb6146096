"""Images of files and of shards: their bytes, their pixels (whole, or smaller where that decodes sooner), their faults.

An image in shards has a path below the manifest, as if that were a folder: SPLIT.shards/RECORD/FILE_NAME."""

import io
import os
import re
import unicodedata
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

import cv2
import numpy as np
import PIL.Image
from jaxtyping import UInt8
from numpy import ndarray as Array
from tqdm import tqdm

from sapiens_accel.errors import UserError
from sapiens_accel.sources import jpeg_region, shards
from sapiens_accel.sources.jpeg_region import Region

JPEG_END = b"\xff\xd9"
JPEG_START_OF_SCAN = 0xDA
JPEG_START_OF_FRAME = (0xC0, 0xC1, 0xC2)  # baseline, extended, progressive: those that are decoded at other sizes
JPEG_APP1 = 0xE1
EXIF_ORIENTATION = 0x112
DEEP_STARTS = (b"II*\0", b"MM\0*", b"\x89PNG")  # TIFF and PNG may have 16 bits
# OpenCV from 4.11 on decodes to RGB; a reduction is named with the flag of gray, which the one of color overrules.
RGB = getattr(cv2, "IMREAD_COLOR_RGB", None)
REDUCED = {
    1: 0,
    2: cv2.IMREAD_REDUCED_GRAYSCALE_2,
    4: cv2.IMREAD_REDUCED_GRAYSCALE_4,
    8: cv2.IMREAD_REDUCED_GRAYSCALE_8,
}
UNDECODABLE = "does not decode"
LISTED = 50_000  # files, in the search for an image that is not where it should be: a second on a disk
IMAGE_SUFFIXES = shards.SUFFIXES
# OpenCV keeps to this limit as well, but not for what it decodes at an eighth of the size.
MAX_PIXELS = int(os.environ["OPENCV_IO_MAX_IMAGE_PIXELS"])
TOO_LARGE = f"has more than {MAX_PIXELS:,} px (OPENCV_IO_MAX_IMAGE_PIXELS)"
PIL.Image.MAX_IMAGE_PIXELS = None  # only headers are read with Pillow, and `check_size` compares them with our limit
IMAGE_BITS = "SAPIENS_ACCEL_IMAGE_BITS"  # in the environment, so that every process decodes alike
BITS_AT_START = os.environ.get(IMAGE_BITS)
BITS = (8, 10, 12, 14, 16)  # that cameras and microscopes write into 16
LOOKED_AT = 32  # images whose values are looked at
HEADS = (1 << 12, 1 << 16)  # bytes that usually hold the header: of an image off the web, and of a camera's with EXIF
TAIL = 64  # bytes
LARGEST_PART = 0.9  # of an image's pixels: more are decoded no sooner than all


class DecodedImage(NamedTuple):
    """A decoded image, or a part of it. One of its pixels stands for reduction x reduction of the file's, and lies amid
    them; the first of its pixels is that at `corner_xy` of the whole (px after the reduction)."""

    pixels: UInt8[Array, "h w 3"]
    reduction: int
    corner_xy: tuple[int, int] = (0, 0)


class BadImageError(ValueError):
    """Why an image cannot be had, in a few words."""


def read_bytes(path: Path) -> shards.Bytes:
    """An image file's bytes, wherever it is."""
    record = shards.find_record(path)
    return path.read_bytes() if record is None else shards.read_record(*record)


def size_of(path: Path) -> int:
    return path.stat().st_size if shards.find_record(path) is None else len(read_bytes(path))


def read_head(path: Path, count: int) -> bytes:
    """The first so many bytes of an image file."""
    if shards.find_record(path) is not None:
        return bytes(read_bytes(path)[:count])
    with path.open("rb") as file:
        return file.read(count)


def read_image(path: Path) -> UInt8[Array, "h w 3"]:
    """An RGB image, turned as its EXIF data says.

    Raises:
        UserError: the file does not decode, or has more than MAX_PIXELS.
    """
    return read_reduced_image(path).pixels


def read_reduced_image(path: Path, at_most: int = 1, region: Region | None = None) -> DecodedImage:
    """`read_image`, smaller or a part of it where that decodes sooner.

    Args:
        at_most: the largest reduction that may be made, 1, 2, 4 or 8.
        region: the part that is needed (image px; it may reach beyond the image). Default: all. What is returned has
            that part at least.

    Raises:
        UserError: the file does not decode, or has more than MAX_PIXELS.
    """
    content = _read_if_file(path)
    frame = _find_jpeg_frame(content)
    reduction = at_most if at_most > 1 and frame and frame.is_reducible(at_most) else 1
    try:
        if frame is None:
            check_size(content)
        else:
            _refuse_too_large(frame.height, frame.width)
        part = _decode_part(content, frame, region, reduction) if region and frame else None
        if part is not None:
            return part
        pixels = _decode_rgb(content, REDUCED[reduction])
    except BadImageError as error:
        raise UserError(f"{path}: {error}; mend it, or run with --data.check_images decode") from None
    return DecodedImage(pixels, reduction)


def _decode_part(content: shards.Bytes, frame: "JpegFrame", region: Region, reduction: int) -> DecodedImage | None:
    """Decode a region of a JPEG, or all above its bottom where the image is reduced or no package decodes regions.

    None where all of it is decoded as soon, or must be (one cut short is refused).
    """
    if frame.channels != 3 or JPEG_END not in bytes(content[-TAIL:]):
        return None
    left, top, right, bottom = region
    seen = Region(max(0, left), max(0, top), min(frame.width, right), min(frame.height, bottom))
    width, height = seen.right - seen.left, seen.bottom - seen.top
    if width < 1 or height < 1 or width * height > LARGEST_PART * frame.width * frame.height:
        return None
    if frame.may_turn and not _is_upright(content):
        return None
    if reduction == 1 and jpeg_region.find_package() is not None:
        pixels = jpeg_region.decode(bytes(content), seen, frame.width)
        return None if pixels is None else DecodedImage(pixels, 1, (seen.left, seen.top))
    upper = jpeg_region.cut_below(bytes(content), frame.at, seen.bottom)
    if upper is None:
        return None
    try:
        return DecodedImage(_decode_rgb(upper, REDUCED[reduction]), reduction)
    except BadImageError:  # the decoder reads 8 bytes ahead, which a narrow plain image or a damaged one does not have
        return None


def _is_upright(content: shards.Bytes) -> bool:
    """Whether EXIF data surely do not turn this JPEG: cameras write them into every image."""
    try:
        exif = PIL.Image.open(io.BytesIO(content)).getexif()
    except Exception:  # Pillow documents no complete list of what broken data raise
        return False
    return exif.get(EXIF_ORIENTATION) == 1


def _decode_rgb(content: shards.Bytes | bytearray, size: int) -> UInt8[Array, "h w 3"]:
    image = _decode(content, size | (RGB or cv2.IMREAD_COLOR))
    return image if RGB is not None else cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def set_image_bits(bits: int | None) -> None:
    """How many bits hold the values of 16-bit images, `data.image_bits`; None: as this process was started with.

    Raises:
        UserError: the environment has no such number.
    """
    value = BITS_AT_START if bits is None else str(bits)
    if value is None:
        os.environ.pop(IMAGE_BITS, None)
        return
    if not value.isdecimal() or not 8 <= int(value) <= 16:
        raise UserError(f"{IMAGE_BITS}: expected a number of bits from 8 to 16, found {value!r}")
    os.environ[IMAGE_BITS] = value


def describe_bits(root: Path, names: Sequence[str]) -> str:
    """A line where the values of 16-bit images need fewer bits than they are read with, or more; else empty.

    The bits are those of all images: by each image's own values, frames of one film would differ in brightness.
    """
    indices = {int(index) for index in np.linspace(0, len(names) - 1, LOOKED_AT)} if names else set()
    some: list[str] = [names[index] for index in sorted(indices)]
    largest = max((value for name in some if (value := _largest_deep_value(root / name))), default=0)
    needed, bits = next(one for one in BITS if largest >> one == 0), int(os.environ.get(IMAGE_BITS, 16))
    if not largest or needed == bits or bits not in BITS:
        return ""
    if needed > bits:
        return (
            f"warning: {root}: 16-bit images have values up to {largest}: those above {(1 << bits) - 1} are read as "
            f"white (--data.image_bits {bits}); --data.image_bits {needed} reads all"
        )
    return (
        f"warning: {root}: 16-bit images have no value above {largest}, and are read as nearly black; "
        f"--data.image_bits {needed} reads them at their range"
    )


def _largest_deep_value(path: Path) -> int:
    """The largest value of a 16-bit image; 0 of any other."""
    content = _read_if_file(path)
    try:
        check_size(content)
        deep = _decode_by_opencv(content, cv2.IMREAD_UNCHANGED) if bytes(content[:4]) in DEEP_STARTS else None
    except BadImageError:
        return 0
    # Of four channels the last is alpha, which is not read.
    return int(deep[..., :3].max(initial=0)) if deep is not None and deep.dtype == np.uint16 else 0


def _decode(content: shards.Bytes | bytearray, flags: int) -> Array:
    """The 8-bit image. OpenCV divides 16 bits by 256, which makes the 12 bits of a microscope or a camera black."""
    bits = int(os.environ.get(IMAGE_BITS, 16))
    if bits < 16 and bytes(content[:4]) in DEEP_STARTS:
        deep = _decode_by_opencv(content, flags | cv2.IMREAD_ANYDEPTH)
        if deep.dtype == np.uint16:
            return np.minimum(deep >> bits - 8, 255).astype(np.uint8)
    return _decode_by_opencv(content, flags)


def _decode_by_opencv(content: shards.Bytes | bytearray, flags: int) -> Array:
    try:
        image = cv2.imdecode(np.frombuffer(content, np.uint8), flags) if content else None
    except cv2.error:  # of more pixels than OpenCV may read; before 5.0 it returned None
        image = None
    if image is None:
        raise BadImageError(UNDECODABLE)
    return image


class JpegFrame(NamedTuple):
    """What the header of a JPEG says; `at`: its start of frame; `may_turn`: EXIF data may turn the image round."""

    height: int
    width: int
    channels: int
    may_turn: bool
    at: int

    def is_reducible(self, reduction: int) -> bool:
        """Whether the pixels of an image that the decoder itself reduces lie amid those that they stand for.

        They are counted from the corner where the file begins. If the image is turned afterwards and its sides are no
        multiples of the reduction, that corner's opposite would be taken for it.
        """
        return not self.may_turn or (self.height % reduction == 0 and self.width % reduction == 0)


def _find_jpeg_frame(content: shards.Bytes) -> JpegFrame | None:
    at, may_turn, start = 2, False, None
    while content[:2] == b"\xff\xd8" and at + 10 <= len(content) and content[at] == 0xFF:
        marker = content[at + 1]
        if marker == JPEG_START_OF_SCAN:
            break
        if marker in JPEG_START_OF_FRAME and start is None:
            start = at
        may_turn |= marker == JPEG_APP1 and content[at + 4 : at + 8] == b"Exif"  # after the start of frame too
        at += 2 + int.from_bytes(content[at + 2 : at + 4], "big")
    if start is None:
        return None
    height, width = (int.from_bytes(content[start + shift : start + shift + 2], "big") for shift in (5, 7))
    return JpegFrame(height, width, content[start + 9], may_turn, start)


def check_size(content: shards.Bytes) -> None:
    """Look at an image's header before it is decoded: a few kB may claim billions of pixels.

    Raises:
        BadImageError: it has more than MAX_PIXELS.
    """
    size = _find_size(content)
    if size:  # else it is no format that Pillow knows, or broken: decoding it shows that
        _refuse_too_large(*size)


def _refuse_too_large(height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise BadImageError(f"{TOO_LARGE}: {width} x {height}")


def _find_size(content: shards.Bytes) -> tuple[int, int] | None:
    """Height and width (px) by the header; None if it is not among these first bytes of a file."""
    if frame := _find_jpeg_frame(content):
        return frame.height, frame.width
    try:
        width, height = PIL.Image.open(io.BytesIO(content)).size
    except Exception:  # Pillow documents no complete list of what a broken header raises
        return None
    return height, width


def whole_image(path: Path) -> Array | None:
    """The image as `read_image` has it; None if it is cut short, does not decode, or has more than MAX_PIXELS."""
    try:
        return decode_image(_read_if_file(path))
    except BadImageError:
        return None


def decode_image(content: shards.Bytes) -> UInt8[Array, "h w 3"]:
    """The RGB image of a file's bytes, turned as its EXIF data says.

    Raises:
        BadImageError: they are cut short, do not decode, or have more than MAX_PIXELS.
    """
    _check_whole(content)
    check_size(content)
    return _decode_rgb(content, REDUCED[1])


def describe_fault(path: Path) -> str:
    """Why `whole_image` gives None for this image, without decoding it again."""
    try:
        _check_ends(path)
    except BadImageError as error:
        return str(error)
    return UNDECODABLE


def read_unchecked_image(path: Path, flags: int) -> Array | None:
    """What OpenCV makes of an image, BGR; None if it does not decode, has more than MAX_PIXELS, or is no file.

    Args:
        how: cv2.IMREAD_COLOR (gray, 16 bits, alpha and CMYK become 8-bit colors) or one of its reduced sizes.
    """
    try:
        content = _read_if_file(path)
        check_size(content)
        return _decode(content, flags)
    except BadImageError:
        return None


def _read_if_file(path: Path) -> shards.Bytes:
    """An image's bytes; none of what cannot be read."""
    try:
        return read_bytes(path) if exists(path) else b""
    except OSError:
        return b""


def exists(path: Path) -> bool:
    """Whether an image can be opened: it is in shards, or a file; no folder, no named pipe (opening it would wait for
    something that writes into it), no link to nothing or to itself, no name that no file can have."""
    try:
        return shards.find_record(path) is not None or path.is_file()
    except OSError:
        return False


def find_missing(root: Path, names: Sequence[str]) -> list[str]:
    """The images that are not there. Whole folders are listed: asking for each file costs more."""
    outside = [name for name in names if shards.find_record(root / name) is None]
    present = {folder: list_names(folder) for folder in {(root / name).parent for name in outside}}
    return [name for name in outside if (root / name).name not in present[(root / name).parent]]


def suggest_image(root: Path, name: str) -> str:
    """A hint about an image that is not there: the file below the root whose name is the same but for its folder, upper
    and lower case, an image's suffix, %20, a query, backslashes, spaces at its ends or composed letters; else
    that its folder is not there; else empty.

    Annotation tools write names of Windows, of addresses and of other folders. At most LISTED files are looked at.
    """
    wanted = _plain_name(name)
    files = (Path(folder) / file for folder, _, there in os.walk(root) for file in sorted(there))
    stem = None
    for file in islice(files, LISTED):
        plain = _plain_name(file.name)
        if wanted == plain:
            return _looks_like(file)
        if stem is None and file.suffix.lower() in IMAGE_SUFFIXES and _stem(wanted) == _stem(plain):
            stem = file
    if stem is not None:
        return _looks_like(stem)
    folder = (root / name).parent
    try:
        is_there = folder.is_dir()
    except OSError:  # of a name that no folder can have
        return ""
    return "" if is_there else f": there is no folder {folder} (see --data.train_images, --data.val_images)"


def _looks_like(file: Path) -> str:
    return f"; {file} looks like it: write its name and folder in 'images', or give the folder of the images"


def _plain_name(name: str) -> str:
    last = re.split(r"[/\\]", name.split("?")[0])[-1]
    return unicodedata.normalize("NFC", unquote(last)).casefold().strip()


def _stem(plain: str) -> str:
    """The name without an image's suffix."""
    stem, dot, suffix = plain.rpartition(".")
    return stem if dot and f".{suffix}" in IMAGE_SUFFIXES else plain


def list_names(folder: Path) -> set[str]:
    """What is in a folder, by name; nothing in one that is not there."""
    try:
        return {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    except OSError:  # of a name that no folder can have, or of one that may not be read: nothing is there
        return set()


def check_images(root: Path, names: Sequence[str], decode: bool) -> dict[str, tuple[int, int] | str]:
    """Each image's height and width in eighths, rounded either way (0, 0 if not decoded), or what is wrong with it."""

    def check(name: str) -> tuple[int, int] | str:
        try:
            if not decode:
                _check_ends(root / name)
                return 0, 0
            content = _read_whole_file(root / name)
            check_size(content)
            height, width = _decode(content, cv2.IMREAD_REDUCED_COLOR_8).shape[:2]
        except BadImageError as error:
            return str(error)
        return height, width

    with ThreadPoolExecutor(8) as pool:
        progress = tqdm(pool.map(check, names), total=len(names), desc="checking images", disable=None, leave=False)
        return dict(zip(names, progress, strict=True))


def _check_ends(path: Path) -> None:
    """Refuse an image by its first and last bytes: to read all of COCO's 19 GB at each start takes minutes.

    Raises:
        BadImageError: it does not begin and end as it must, or has more than MAX_PIXELS.
    """
    if shards.find_record(path) is None:
        for count in HEADS:
            head, tail = _read_ends(path, count)
            if _ends_as_it_must(head, tail) and (size := _find_size(head)):
                return _refuse_too_large(*size)
    check_size(_read_whole_file(path))


def _read_ends(path: Path, count: int) -> tuple[bytes, bytes]:
    """The first `count` and the last TAIL bytes of a file; none of what cannot be read."""
    try:
        if not exists(path):
            return b"", b""
        with path.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            return os.pread(file.fileno(), count, 0), os.pread(file.fileno(), TAIL, max(0, size - TAIL))
    except OSError:
        return b"", b""


def _ends_as_it_must(head: shards.Bytes, tail: bytes) -> bool:
    if head[:2] == b"\xff\xd8":
        return JPEG_END in tail
    return b"IEND" in tail if head[:8] == b"\x89PNG\r\n\x1a\n" else len(head) >= 8


def _read_whole_file(path: Path) -> shards.Bytes:
    """The bytes of an image file.

    Raises:
        BadImageError: as `_check_whole`.
    """
    content = _read_if_file(path)
    _check_whole(content)
    return content


def _check_whole(content: shards.Bytes) -> None:
    """Refuse a JPEG or PNG that does not begin and end as it must: OpenCV fills what a cut JPEG lacks with gray,
    silently.

    Raises:
        BadImageError: it does not.
    """
    is_whole = _ends_as_it_must(content, bytes(content[-TAIL:]))
    if not is_whole and content[:2] == b"\xff\xd8":
        # Cameras append data of their own, so the end need not be the last thing in the file.
        is_whole = JPEG_END in _jpeg_scan(bytes(content))
    if not is_whole:
        raise BadImageError(UNDECODABLE)


def _jpeg_scan(content: bytes) -> bytes:
    """What follows the headers: they may hold a thumbnail with an end of its own. Segments are marker, length, data."""
    at = 2
    while at + 4 <= len(content) and content[at] == 0xFF and content[at + 1] != JPEG_START_OF_SCAN:
        at += 2 + int.from_bytes(content[at + 2 : at + 4], "big")
    return content[at:]
