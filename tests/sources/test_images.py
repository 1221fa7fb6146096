"""What is refused by an image's header and its ends, how much of it is read for that, and the limit on pixels."""

import os
import struct
import subprocess
import sys
import unicodedata
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest

from sapiens_accel.doctor import annotations
from sapiens_accel.doctor.annotations import ReadAnnotations
from sapiens_accel.doctor.labels import Labels
from sapiens_accel.sources import images

NOISE = np.random.default_rng(0).integers(0, 256, (1200, 1600, 3), dtype=np.uint8)
SEGMENT = b"\xff\xe2" + struct.pack(">H", 60_000) + bytes(60_000 - 2)  # of 60 kB, such as parts of a color profile


def _encode(suffix: str) -> bytes:
    return cv2.imencode(suffix, NOISE)[1].tobytes()


def _jpeg_of(side: int, num_segments: int) -> bytes:
    """A JPEG whose header comes after `num_segments` segments and claims side x side px."""
    content = _encode(".jpg")
    at = content.index(b"\xff\xc0") + 5
    content = content[:at] + struct.pack(">HH", side, side) + content[at + 4 :]
    return content[:2] + SEGMENT * num_segments + content[2:]


def _png_of(side: int) -> bytes:
    content = bytearray(cv2.imencode(".png", NOISE[:16, :16])[1].tobytes())
    content[16:24] = struct.pack(">II", side, side)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    return bytes(content)


def _bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])  # rchar


@pytest.mark.skipif(not Path("/proc/self/io").is_file(), reason="Linux counts the bytes that a process reads")
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".bmp"])
def test_the_ends_of_a_large_file_are_read_and_no_more(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"a{suffix}").write_bytes(_encode(suffix))
    images.check_images(tmp_path, [f"a{suffix}"], decode=False)  # the first time Pillow imports its formats
    before = _bytes_read()
    assert images.check_images(tmp_path, [f"a{suffix}"], decode=False) == {f"a{suffix}": (0, 0)}
    assert _bytes_read() - before < 20_000 < (tmp_path / f"a{suffix}").stat().st_size


@pytest.mark.parametrize("decode", [False, True])
def test_ends_tell_what_decoding_tells(tmp_path: Path, decode: bool) -> None:
    whole = _encode(".jpg")
    contents = {
        "large.jpg": (_jpeg_of(65_500, 0), "has more"), "large_after_60_kB.jpg": (_jpeg_of(65_500, 1), "has more"),
        "large_after_240_kB.jpg": (_jpeg_of(65_500, 4), "has more"), "large.png": (_png_of(60_000), "has more"),
        "cut.jpg": (whole[:-100], "does not decode"), "cut.png": (_encode(".png")[:-100], "does not decode"),
        "empty.jpg": (b"", "does not decode"), "whole.jpg": (whole, ""), "appended.jpg": (whole + bytes(9_999), ""),
        "after_240_kB.jpg": (whole[:2] + SEGMENT * 4 + whole[2:], ""), "whole.png": (_encode(".png"), ""),
        "whole.webp": (_encode(".webp"), ""), "whole.bmp": (_encode(".bmp"), ""),
    }  # fmt: skip
    for name, (content, _) in contents.items():
        (tmp_path / name).write_bytes(content)
    looks = images.check_images(tmp_path, [*contents, "missing.jpg"], decode)
    for name, (_, fault) in (contents | {"missing.jpg": (b"", "does not decode")}).items():
        assert isinstance(looks[name], str) == bool(fault) and fault in str(looks[name]), (name, looks[name])


def test_what_cannot_be_used_is_reported_with_its_reason(tmp_path: Path) -> None:
    """An image above the limit may decode well: the user would look for damage that is not there."""
    (tmp_path / "large.png").write_bytes(_png_of(60_000))
    (tmp_path / "cut.jpg").write_bytes(_encode(".jpg")[:-100])
    assert images.describe_fault(tmp_path / "large.png").startswith("has more than")
    assert images.describe_fault(tmp_path / "cut.jpg") == "does not decode"
    labels = Labels(
        ann_ids=np.zeros(0, np.int64), given_ids=np.zeros(0, object), file_names=np.zeros(0, object),
        boxes_xywh=np.zeros((0, 4)), areas=np.zeros(0), keypoints=np.zeros((0, 17, 3)),
        size_wh=np.zeros((0, 2)), box_made=np.zeros(0, bool),
    )  # fmt: skip
    read = ReadAnnotations(labels=labels, image_ids={"large.png": 1}, max_looked_at=9)
    (finding,) = annotations.check_images(tmp_path, read, "ends", "stop")
    assert "1 images cannot be used: the first has more than" in finding.text


def test_a_raised_limit_holds_for_every_format(monkeypatch: pytest.MonkeyPatch) -> None:
    """Above Pillow's own limit of 179 million px."""
    monkeypatch.setattr(images, "MAX_PIXELS", 1 << 30)
    for side in (16_000, 32_768):
        images.check_size(_png_of(side))
    with pytest.raises(images.BadImageError, match="32769 x 32769"):
        images.check_size(_png_of(32_769))


@pytest.mark.parametrize("limit", ["1GB", "", "0", "-5", "1_000", "9" * 30, "9" * 9_999])
def test_a_limit_that_is_no_number_is_one_line(limit: str) -> None:
    """OpenCV would abort the process."""
    words = [sys.executable, "-c", "import sapiens_accel, cv2"]
    environment = os.environ | {"OPENCV_IO_MAX_IMAGE_PIXELS": limit}
    end = subprocess.run(words, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert end.returncode == 1 and end.stderr.count("\n") == 1, end.stderr
    assert "OPENCV_IO_MAX_IMAGE_PIXELS" in end.stderr and "found '" + limit in end.stderr


@pytest.mark.parametrize(
    "name",
    ["train/a b.jpg", "train/sub\\A B.JPG", "train/train/a%20b.jpg", "https://x.org/a%20b.jpg?X-Amz=1", "train/a b"],
)
def test_an_image_that_lies_elsewhere_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / "images" / "train").mkdir(parents=True)
    (tmp_path / "images" / "train" / "A b.jpg").touch()
    assert f"; {tmp_path}/images/train/A b.jpg looks like it" in images.suggest_image(tmp_path, name)
    assert images.suggest_image(tmp_path, "images/train/other.jpg") == ""
    assert images.suggest_image(tmp_path, "train/other.jpg").startswith(f": there is no folder {tmp_path}/train (")


def test_composed_and_decomposed_letters_are_one_name(tmp_path: Path) -> None:
    (tmp_path / unicodedata.normalize("NFD", "é.jpg")).touch()
    assert "looks like it" in images.suggest_image(tmp_path, unicodedata.normalize("NFC", "é.jpg"))
