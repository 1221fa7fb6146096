"""A user's own images: what an image, a folder or a video holds, in a fixed order, and videos out again."""

import os
import queue
import threading
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import cv2
import numpy as np
from jaxtyping import Float, UInt8
from numpy import ndarray as Array
from tqdm import tqdm

from sapiens_accel.errors import UserError
from sapiens_accel.sources import images as photo
from sapiens_accel.sources.images import IMAGE_SUFFIXES

VIDEOS = (
    ".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".mts", ".m2ts", ".ts", ".3gp", ".flv",
    ".ogv", ".asf", ".h264",
)  # fmt: skip
JPEG_QUALITY = 95
USUAL_RATE = 25.0  # frames a second of a video that does not say it
BYTES_AHEAD, MOST_AHEAD = 256 << 20, 64  # of frames that are decoded before they are needed
Item = TypeVar("Item")

# A loading process that is forked while another thread is inside of OpenCV would inherit its locks, and hang.
# The thread holds this lock while it works on a frame, and a fork waits for it: milliseconds.
_NOT_WHILE_FORKING = threading.Lock()
os.register_at_fork(
    before=_NOT_WHILE_FORKING.acquire,
    after_in_parent=_NOT_WHILE_FORKING.release,
    after_in_child=_NOT_WHILE_FORKING.release,
)


@dataclass(frozen=True, kw_only=True)
class ImageFiles:
    """Images on disk: `names`, sorted, relative to `root`; `note` is what was left out, in a line, or empty."""

    root: Path
    names: list[str]
    note: str = ""


def is_video(path: Path) -> bool:
    """Whether it is a file with a video's ending."""
    return path.is_file() and path.suffix.lower() in VIDEOS


def find_images(path: Path) -> ImageFiles:
    """An image alone, or all images in and below a folder.

    Raises:
        UserError: no such path, no image or video by its ending, a folder without images.
    """
    if path.is_file():
        if path.suffix.lower() not in IMAGE_SUFFIXES:
            raise UserError(f"{path}: neither an image ({', '.join(IMAGE_SUFFIXES)}) nor a video ({', '.join(VIDEOS)})")
        return ImageFiles(root=path.parent, names=[path.name])
    if not path.is_dir():
        raise UserError(f"{path}: no such file or folder; expected an image, a folder of images or a video")
    files = [file.relative_to(path) for file in path.rglob("*") if file.is_file()]
    # A file that begins with a dot is no image of the user's (another system's notes of ._NAME.jpg are not).
    files = [file for file in files if not any(part.startswith(".") for part in file.parts)]
    # Nor is what an earlier run drew into the same folder.
    drawn = {file.parent / "drawn" for file in files if file.name == "keypoints.json"}
    shown = sorted(file.as_posix() for file in files if not drawn & set(file.parents))
    names = [name for name in shown if Path(name).suffix.lower() in IMAGE_SUFFIXES]
    videos = [name for name in shown if Path(name).suffix.lower() in VIDEOS]
    if not names:
        hint = f"; it has videos, give one of them: {path / videos[0]}" if videos else ""
        raise UserError(f"{path}: no images ({', '.join(IMAGE_SUFFIXES)}) in or below it{hint}")
    note = f"{path}: left out: {', '.join(videos[:3])}{', ...' * (len(videos) > 3)}; give a video by itself"
    return ImageFiles(root=path, names=names, note=note if videos else "")


def read_sizes(root: Path, names: Sequence[str]) -> list[tuple[int, int] | None]:
    """Height and width (px) of every image, turned as its EXIF data says; None for one that does not decode."""

    def size(name: str) -> tuple[int, int] | None:
        image = photo.whole_image(root / name)
        return None if image is None else image.shape[:2]

    with ThreadPoolExecutor(4) as pool:
        read = pool.map(size, names)
        return list(tqdm(read, total=len(names), desc="reading images", disable=None, leave=False))


# ---- Videos


def frame_name(video: Path, index: int, suffix: str = ".jpg") -> str:
    """The name of a frame's image: VIDEO_000012.jpg is frame 12, counted from 0."""
    return f"{video.stem}_{index:06d}{suffix}"


def frame_index(name: str) -> int:
    """The frame that `frame_name` has named."""
    return int(Path(name).stem.rsplit("_", 1)[1])


class Frame(NamedTuple):
    """A frame of a video: its number from 0, when it is shown (s), and its pixels, RGB."""

    number: int
    time: float
    pixels: UInt8[Array, "h w 3"]


def read_frames(video: Path, every: int = 1) -> Generator[Frame]:
    """Every n-th frame; one at a time is in memory.

    Times are those of the video, and rise: where they do not, or it has none, a frame is 1/rate after the one before.

    Raises:
        UserError: nothing of it decodes.
    """
    capture = _opened(video)
    index, time, rate = -1, -float("inf"), _usable_rate(capture)
    try:
        while capture.grab():
            index += 1
            own = capture.get(cv2.CAP_PROP_POS_MSEC) / 1000
            time = own if np.isfinite(own) and own > time and own >= 0 else max(time, -1 / rate) + 1 / rate
            if index % every == 0:
                read, frame = capture.retrieve()
                if read:
                    yield Frame(index, time, cv2.cvtColor(frame, cv2.COLOR_BGR2RGB))
    finally:
        capture.release()
    if index < 0:
        raise UserError(f"{video}: no frame of it decodes; expected a video that OpenCV (FFmpeg) reads")


def read_ahead(items: Generator[Item], num: int) -> Iterator[Item]:
    """The same items in the same order, made by a thread up to `num` ahead of those that are asked for.

    Raises:
        Exception: what making an item raises, in its place.
    """
    waiting: queue.Queue[tuple[Item | None, BaseException | None]] = queue.Queue(maxsize=num)
    stopped = threading.Event()

    def put(item: Item | None, error: BaseException | None) -> None:
        while not stopped.is_set():
            try:
                return waiting.put((item, error), timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            while not stopped.is_set():
                with _NOT_WHILE_FORKING:
                    item = next(items)
                put(item, None)
            items.close()
        except BaseException as error:
            put(None, error)

    thread = threading.Thread(target=work, name="frames", daemon=True)
    thread.start()
    try:
        while True:
            item, error = waiting.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item  # type: ignore[misc]
    finally:
        stopped.set()
        thread.join()


def decode_ahead(video: Path) -> Iterator[Frame]:
    """`read_frames` by a thread, as many frames ahead as BYTES_AHEAD hold, so that the network does not wait."""
    capture = _opened(video)
    num_bytes = 3 * capture.get(cv2.CAP_PROP_FRAME_WIDTH) * capture.get(cv2.CAP_PROP_FRAME_HEIGHT)
    capture.release()
    return read_ahead(read_frames(video), int(np.clip(BYTES_AHEAD // max(num_bytes, 1), 1, MOST_AHEAD)))


def video_length(video: Path) -> tuple[int, float]:
    """How many frames it says to have, or, where it says nothing, has; and how many a second.

    Raises:
        UserError: it does not open; as `frames`.
    """
    capture = _opened(video)
    num, rate = capture.get(cv2.CAP_PROP_FRAME_COUNT), _usable_rate(capture)
    capture.release()
    known = np.isfinite(num) and num >= 1
    return int(num) if known else sum(1 for _ in read_frames(video)), rate


def _usable_rate(capture: cv2.VideoCapture) -> float:
    rate = capture.get(cv2.CAP_PROP_FPS)
    return float(rate) if np.isfinite(rate) and 0 < rate <= 1000 else USUAL_RATE


def frame_times(video: Path) -> Float[Array, " n"]:
    """When each frame is shown, in seconds; by the number of the frame where the video has no times.

    Raises:
        UserError: as `read_frames`.
    """
    capture, times = _opened(video), []
    rate = _usable_rate(capture)
    while capture.grab():
        times.append(capture.get(cv2.CAP_PROP_POS_MSEC) / 1000)
    capture.release()
    if not times:
        raise UserError(f"{video}: no frame of it decodes; expected a video that OpenCV (FFmpeg) reads")
    seconds = np.array(times)
    if (np.diff(seconds) <= 0).any():
        seconds = np.arange(len(times)) / rate
    return seconds


def describe_missing_frames(video: Path, num_decoded: int) -> str:
    """A warning where a video says to have more frames than decode, as one that was cut off; else empty.

    Some containers only estimate their number of frames: 2 % fewer are no fault.
    """
    num, _ = video_length(video)
    if num_decoded >= 0.98 * num - 1:
        return ""
    return f"warning: {video}: of {num} frames that it says to have, {num_decoded} decode. Is it cut off?"


def _opened(video: Path) -> cv2.VideoCapture:
    # FFmpeg's own words on a broken file come without its name; ours are the one line. Read when a video is opened.
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    capture = cv2.VideoCapture(str(video))
    if not capture.isOpened():
        raise UserError(f"{video}: does not open as a video; expected one that OpenCV (FFmpeg) reads")
    return capture


def write_frames(video: Path, folder: Path, every: int) -> ImageFiles:
    """Every n-th frame as an image in the folder; frames that are there already stay as they are.

    A frame appears whole or not at all, so that a run that was killed can be repeated.

    Raises:
        UserError: as `frames`; an image that cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    total = -(-video_length(video)[0] // every)
    shown = tqdm(read_frames(video, every), total=total, desc="frames", unit="frame", disable=None, leave=False)
    for frame in shown:
        names.append(frame_name(video, frame.number))
        if not (folder / names[-1]).is_file():
            temporary = folder / f".{names[-1]}"
            save_image(frame.pixels, temporary)
            temporary.replace(folder / names[-1])
    return ImageFiles(root=folder, names=names)


def save_image(image: UInt8[Array, "h w 3"], path: Path) -> None:
    """Write an image by its name's ending.

    Raises:
        UserError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    options = [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY] if path.suffix.lower() in (".jpg", ".jpeg") else []
    if not cv2.imwrite(str(path), cv2.cvtColor(image, cv2.COLOR_RGB2BGR), options):
        raise UserError(f"{path}: could not be written; is the disk full, or the folder protected?")


class Film:
    """A video that is written frame by frame, and appears under its name when it is whole.

    Args:
        codec: the four letters of one that OpenCV can write in a file with this ending.
    """

    def __init__(self, path: Path, rate: float, codec: str = "mp4v") -> None:
        self.path, self.rate, self.codec = path, rate, codec
        self._writer: cv2.VideoWriter | None = None
        self._size_wh = (0, 0)

    def add(self, frame: UInt8[Array, "h w 3"]) -> None:
        """The next frame; of another size than the first one's it is resized to that.

        Raises:
            UserError: this OpenCV writes no mp4.
        """
        if self._writer is None:
            self._size_wh = (frame.shape[1], frame.shape[0])
            self.path.parent.mkdir(parents=True, exist_ok=True)
            code = cv2.VideoWriter.fourcc(*self.codec)
            self._writer = cv2.VideoWriter(str(self._part), code, self.rate, self._size_wh)
            if not self._writer.isOpened():
                raise UserError(f"{self.path}: this OpenCV writes no {self.codec} video; --pictures 0 draws nothing")
        if (frame.shape[1], frame.shape[0]) != self._size_wh:
            frame = cv2.resize(frame, self._size_wh, interpolation=cv2.INTER_AREA)
        self._writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))

    def close(self) -> None:
        if self._writer is not None:
            self._writer.release()
            self._part.replace(self.path)

    def discard(self) -> None:
        """Leave nothing of a video that is not whole."""
        if self._writer is not None:
            self._writer.release()
            self._part.unlink(missing_ok=True)

    @property
    def _part(self) -> Path:
        return self.path.with_name(f".{self.path.name}.part{self.path.suffix}")
