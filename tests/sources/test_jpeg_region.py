"""A region of a JPEG, or all above its bottom, is the bytes that the whole image has there, or all of it is decoded."""

import os
import re
import struct
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sapiens_accel.errors import UserError
from sapiens_accel.sources import images, jpeg_region
from sapiens_accel.sources.jpeg_region import Region

needs_package = pytest.mark.skipif(jpeg_region.find_package() is None, reason='pip install "sapiens_accel[jpeg]"')
SUBSAMPLINGS = {
    "4:4:4": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444,
    "4:2:2": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_422,
    "4:4:0": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_440,
    "4:2:0": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420,
    "4:1:1": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_411,
}


def jpeg(size_wh: tuple[int, int], *options: int, seed: int = 0) -> bytes:
    """Colors that change from pixel to pixel, so that a shift or another upsampling of them would show."""
    rng = np.random.default_rng(seed)
    smooth = cv2.resize(rng.uniform(0, 255, (9, 7, 3)).astype(np.float32), size_wh, interpolation=cv2.INTER_CUBIC)
    image = np.clip(smooth + rng.normal(0, 20, smooth.shape), 0, 255).astype(np.uint8)
    return cv2.imencode(".jpg", image, options)[1].tobytes()


def exif(content: bytes, tags: bytes) -> bytes:
    """A JPEG with EXIF data."""
    return content[:2] + b"\xff\xe1" + struct.pack(">H", len(tags) + 8) + b"Exif\0\0" + tags + content[2:]


def oriented(orientation: int) -> bytes:
    return struct.pack("<2sHIHHHIHHI", b"II", 42, 8, 1, 0x112, 3, 1, orientation, 0, 0)


@needs_package
@settings(max_examples=200, deadline=None)
@given(
    st.tuples(st.integers(17, 231), st.integers(17, 131)), st.sampled_from([*SUBSAMPLINGS]), st.booleans(),
    st.integers(30, 100), st.tuples(*[st.floats(0, 1)] * 4),
)  # fmt: skip
def test_a_region_has_the_bytes_of_the_whole_image(
    size_wh: tuple[int, int], subsampling: str, progressive: bool, quality: int, corners: tuple[float, ...]
) -> None:
    options = [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, SUBSAMPLINGS[subsampling], cv2.IMWRITE_JPEG_QUALITY, quality]
    content = jpeg(size_wh, *options, cv2.IMWRITE_JPEG_PROGRESSIVE, int(progressive))
    whole = images._decode_rgb(content, 0)
    (left, right), (top, bottom) = (
        sorted(int(corners[i] * (size_wh[axis] - 1)) for i in (axis, axis + 2)) for axis in (0, 1)
    )
    part = jpeg_region.decode(content, Region(left, top, right + 1, bottom + 1), size_wh[0])
    assert part is not None and np.array_equal(part, whole[top : bottom + 1, left : right + 1])


@settings(max_examples=200, deadline=None)
@given(
    st.tuples(st.integers(17, 131), st.integers(40, 391)), st.sampled_from([*SUBSAMPLINGS]), st.integers(30, 100),
    st.sampled_from([1, 2, 4, 8]), st.floats(0, 1),
)  # fmt: skip
def test_the_rows_above_a_cut_have_the_bytes_of_the_whole_image(
    size_wh: tuple[int, int], subsampling: str, quality: int, reduction: int, height: float
) -> None:
    options = [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, SUBSAMPLINGS[subsampling], cv2.IMWRITE_JPEG_QUALITY, quality]
    content = jpeg(size_wh, *options)
    whole, bottom = images._decode_rgb(content, images.REDUCED[reduction]), 1 + int(height * (size_wh[1] - 1))
    upper = jpeg_region.cut_below(content, frame_at(content), bottom)
    if upper is None:
        assert bottom + jpeg_region.MARGIN_BELOW > 0.9 * size_wh[1] - 16
        return
    part = images._decode_rgb(upper, images.REDUCED[reduction])
    # A row beyond, and one more, which a bilinear warp mixes with it.
    rows = min(len(whole), -(-bottom // reduction) + 2)
    assert rows <= len(part) < len(whole) and np.array_equal(part[:rows], whole[:rows])


def frame_at(content: bytes) -> int:
    frame = images._find_jpeg_frame(content)
    assert frame is not None
    return frame.at


def test_what_cannot_be_cut() -> None:
    content = jpeg((120, 300))
    with_several = content[:2] + b"\xff\xe2\x00\x06MPF\0" + content[2:]
    assert jpeg_region.cut_below(content, frame_at(content), 224) is not None
    for whole in (with_several, with_several + content, content + b"from the camera"):
        upper = jpeg_region.cut_below(whole, frame_at(whole), 100)
        assert upper is not None and len(upper) == len(whole) - len(whole[whole.index(b"\xff\xd9") :])
    damaged, at = bytearray(with_several + content), content.index(b"\xff\xda") + 100
    damaged[at : at + 2] = b"\xff\xd9"
    refused = [
        jpeg((120, 300), cv2.IMWRITE_JPEG_PROGRESSIVE, 1),
        jpeg((120, 300), cv2.IMWRITE_JPEG_RST_INTERVAL, 4),
        bytes(damaged),
        *(content[:length] for length in range(frame_at(content) + 10, content.index(b"\xff\xda") + 4)),
    ]
    for whole in refused:
        assert jpeg_region.cut_below(whole, frame_at(whole), 100) is None
    assert jpeg_region.cut_below(content, frame_at(content), 225) is None, (
        "more than nine tenths of its rows are needed"
    )


@needs_package
def test_where_all_of_an_image_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, plain = tmp_path / "image", jpeg((120, 100))
    gray = cv2.imencode(".jpg", cv2.imdecode(np.frombuffer(plain, np.uint8), cv2.IMREAD_GRAYSCALE))[1].tobytes()
    some, most, beyond = Region(30, -20, 60, 40), Region(-5, 0, 119, 99), Region(120, 0, 150, 50)
    png = cv2.imencode(".png", cv2.imdecode(np.frombuffer(plain, np.uint8), 1))[1].tobytes()
    cases = [
        (exif(plain, b"\0\0"), some),
        (exif(plain, oriented(3)), some),
        (gray, some),
        (png, some),
        (plain, most),
        (plain, beyond),
    ]
    for content, region in cases:
        path.write_bytes(content)
        found = images.read_reduced_image(path, 1, region)
        assert (found.corner_xy, found.pixels.shape) == ((0, 0), (100, 120, 3))
    for content in (plain, exif(plain, oriented(1))):
        path.write_bytes(content)
        part = images.read_reduced_image(path, 1, some)
        assert part.corner_xy == (30, 0) and np.array_equal(part.pixels, images.read_image(path)[:40, 30:60])
    assert images.read_reduced_image(path, 2, some).pixels.shape == (40, 60, 3)
    assert images.read_reduced_image(path, 2, some._replace(bottom=65)).pixels.shape == (50, 60, 3)
    monkeypatch.setattr(jpeg_region, "find_package", lambda: None)
    assert np.array_equal(images.read_reduced_image(path, 1, some).pixels[:72], images.read_image(path)[:72])
    path.write_bytes(exif(plain, oriented(3)))
    for reduction in (1, 2):
        assert images.read_reduced_image(path, reduction, some).pixels.shape == (100 // reduction, 120 // reduction, 3)


@needs_package
@pytest.mark.parametrize("progressive", [False, True])
def test_damaged_images_give_what_they_gave(tmp_path: Path, progressive: bool) -> None:
    """Cut short, or with bytes changed: the same pixels as by OpenCV, gray where it has gray."""
    content, rng = jpeg((120, 100), cv2.IMWRITE_JPEG_PROGRESSIVE, int(progressive)), np.random.default_rng(1)
    region, path, num_parts = Region(20, 30, 100, 90), tmp_path / "image.jpg", 0
    for trial in range(40):
        damaged = bytearray(content[: rng.integers(700, len(content))] if trial % 2 else content)
        for at in rng.integers(700, len(damaged), 3 * (trial % 4 > 1)):
            damaged[at] = rng.integers(0, 256)
        path.write_bytes(damaged)
        try:
            whole = images.read_image(path)
        except UserError as error:
            with pytest.raises(UserError, match=re.escape(str(error))):
                images.read_reduced_image(path, 1, region)
            continue
        found = images.read_reduced_image(path, 1, region)
        left, top = found.corner_xy
        num_parts += found.pixels.size < whole.size
        assert np.array_equal(found.pixels, whole[top : top + len(found.pixels), left : left + found.pixels.shape[1]])
    assert num_parts > 4


@pytest.mark.parametrize("reduction", [1, 2, 4])
def test_damaged_images_give_above_a_cut_what_they_gave(
    tmp_path: Path, reduction: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(jpeg_region, "find_package", lambda: None)
    content, rng = jpeg((120, 300)), np.random.default_rng(1)
    path, num_parts, rows = tmp_path / "image.jpg", 0, 100 // reduction + 2
    path.write_bytes(content)
    assert len(images.read_reduced_image(path, reduction, Region(20, 30, 100, 100)).pixels) == 144 // reduction
    assert capfd.readouterr().err == "", "no decoder warns of what has been cut"
    for trial in range(60):
        damaged = bytearray(content[: rng.integers(700, len(content))] if trial % 4 == 1 else content)
        for at in rng.integers(700, len(damaged), 3 * (trial % 4 > 1)):
            damaged[at] = rng.integers(0, 256)
        if trial % 4 == 2:  # a marker amid the data
            at = rng.integers(700, len(damaged) // 2)
            damaged[at : at + 2] = bytes((0xFF, [0xD9, 0xD0, 0xDA, 0xFE][trial // 4 % 4]))
        path.write_bytes(damaged)
        try:
            whole = images.read_reduced_image(path, reduction).pixels
        except UserError:  # an image whose fault lies below decodes
            continue
        found = images.read_reduced_image(path, reduction, Region(20, 30, 100, 100)).pixels
        num_parts += len(found) < len(whole)
        assert np.array_equal(found[:rows], whole[:rows]), trial
    assert num_parts > 40


@pytest.mark.parametrize("reduction", [1, 2, 4])
def test_what_does_not_decode_without_its_end_is_decoded_whole(
    tmp_path: Path, reduction: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The decoder reads 8 bytes ahead, which a narrow plain image and one that was cut short do not have."""
    monkeypatch.setattr(jpeg_region, "find_package", lambda: None)
    black, long = np.zeros((96, 48, 3), np.uint8), jpeg((120, 300))
    plain = cv2.imencode(".jpg", black, [cv2.IMWRITE_JPEG_QUALITY, 30, cv2.IMWRITE_JPEG_OPTIMIZE, 1])[1].tobytes()
    for name, content in (("plain.jpg", plain), ("short.jpg", long[: len(long) // 4] + b"\xff\xd9")):
        path, num_whole = tmp_path / name, 0
        path.write_bytes(content)
        whole = images.read_reduced_image(path, reduction).pixels
        for bottom in range(8, 200, 4):
            found = images.read_reduced_image(path, reduction, Region(0, 0, 16, bottom)).pixels
            is_cut = jpeg_region.cut_below(content, images._find_jpeg_frame(content).at, min(bottom, 300)) is not None
            num_whole += is_cut and found.shape == whole.shape
            rows = bottom // reduction + 2
            assert np.array_equal(found[:rows], whole[:rows]), bottom
        assert num_whole, name


@pytest.mark.parametrize("reduction", [1, 2])
def test_segments_between_the_header_and_the_scan_count(
    tmp_path: Path, reduction: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """EXIF data that turn the image, restart intervals before the header, and an end that is there twice."""
    monkeypatch.setattr(jpeg_region, "find_package", lambda: None)
    plain, path, region = jpeg((144, 400)), tmp_path / "image.jpg", Region(10, 20, 90, 100)
    scan, turned = plain.index(b"\xff\xda"), exif(b"\xff\xd8", oriented(6))[2:]
    restarts = jpeg((144, 400), cv2.IMWRITE_JPEG_RST_INTERVAL, 4)
    interval = restarts.index(b"\xff\xdd")
    moved = restarts[:2] + restarts[interval : interval + 6] + restarts[2:interval] + restarts[interval + 6 :]
    for content, cut in (
        (plain[:scan] + turned + plain[scan:], False),
        (moved, False),
        (plain + b"\xff\xd9", True),
    ):
        path.write_bytes(content)
        whole = images.read_reduced_image(path, reduction).pixels
        found = images.read_reduced_image(path, reduction, region).pixels
        assert (len(found) < len(whole)) == cut
        assert np.array_equal(found[: 100 // reduction], whole[: 100 // reduction])
        assert capfd.readouterr().err == ""


@needs_package
def test_a_forked_process_has_a_decoder_of_its_own() -> None:
    content, region = jpeg((120, 100)), Region(20, 30, 100, 90)
    expected = jpeg_region.decode(content, region, 120)
    assert expected is not None
    child = os.fork()
    if child == 0:
        found = jpeg_region.decode(content, region, 120)
        os._exit(0 if found is not None and np.array_equal(found, expected) else 1)
    assert os.waitpid(child, 0)[1] == 0
