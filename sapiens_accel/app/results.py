"""What the page shows of a file: a preview, boxes drawn by hand, and keypoints as `eval.py --images` writes them."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from jaxtyping import Float, UInt8
from numpy import ndarray as Array

from sapiens_accel.errors import UserError, count
from sapiens_accel.evaluation.keypoint_csv import ImageRow, KeypointCsv
from sapiens_accel.inference import media
from sapiens_accel.inference.estimator import PoseEstimator, PoseResult, read_pixels
from sapiens_accel.inference.media import Film
from sapiens_accel.inference.outputs import HAS_VISIBILITY, KeypointsWriter

DETECTOR, WHOLE, BY_HAND = "detector", "image", "hand"  # where people are
COLUMNS = ("person", "keypoint", "x", "y", "score")  # of the rows of an answer
BOX_COLOR = (255, 64, 160)


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a visitor asks for.

    Attributes:
        path: the file.
        boxes: DETECTOR, WHOLE or BY_HAND.
        detector: a folder or Hub name.
        box_text: BY_HAND: x y width height of each person in px, a line each.
        smooth: of a video, its keypoints.
    """

    path: Path
    boxes: str
    detector: str
    box_text: str = ""
    smooth: bool = False


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Files and a line for the page.

    Attributes:
        rows: COLUMNS, of each keypoint of an image.
        drawn: an image as an array, or the file of a video.
    """

    line: str
    json: Path
    csv: Path
    drawn: UInt8[Array, "h w 3"] | Path
    rows: list[list[Any]]


def read_preview(path: Path) -> UInt8[Array, "h w 3"]:
    """The image, or the first frame of a video.

    Raises:
        UserError: the file is neither, or does not decode.
    """
    if not media.is_video(path):
        return read_pixels(path)
    frames = media.read_frames(path)
    try:
        return next(frames).pixels
    finally:
        frames.close()


def parse_boxes(text: str) -> Float[Array, "n 4"]:
    """The boxes of a text.

    Raises:
        UserError: a line is not four numbers, or there is no line.
    """
    boxes = []
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.replace(",", " ").split()
        try:
            values = [float(word) for word in words]
        except ValueError:
            values = []
        if words and len(values) != 4:
            raise UserError(f"boxes, line {number}: {line.strip()!r} (expected x y width height, four numbers in px)")
        boxes += [values] if words else []
    if not boxes:
        raise UserError("boxes: none (expected two corners clicked in the image, or x y width height in a line)")
    return np.array(boxes)


def box_line(first_xy: Sequence[int], second_xy: Sequence[int]) -> str:
    """The line of a box between two corners, px."""
    (left, right), (top, bottom) = (sorted(pair) for pair in zip(first_xy, second_xy, strict=True))
    return f"{left} {top} {right - left} {bottom - top}"


def draw_boxes(image: UInt8[Array, "h w 3"], text: str, corner: Sequence[int] | None = None) -> UInt8[Array, "h w 3"]:
    """A copy with the boxes of the lines that are boxes, and a corner of which the other one is to come."""
    canvas = image.copy()
    thickness = max(2, max(image.shape[:2]) // 300)
    for line in text.splitlines():
        try:
            ((x, y, w, h),) = np.nan_to_num(parse_boxes(line)).clip(-(2**20), 2**20).round().astype(int).tolist()
        except UserError:
            continue
        cv2.rectangle(canvas, (x, y), (x + w, y + h), BOX_COLOR, thickness)
    if corner is not None:
        cv2.drawMarker(canvas, (int(corner[0]), int(corner[1])), BOX_COLOR, cv2.MARKER_CROSS, 12 * thickness, thickness)
    return canvas


def predict(pose: PoseEstimator, request: Request, folder: Path) -> Iterator[str | Answer]:
    """Lines about the progress, and at last the answer, whose files are in `folder`.

    Raises:
        UserError: what is wrong with the file or the boxes.
    """
    is_video = media.is_video(request.path)
    boxes: Any = request.detector if request.boxes == DETECTOR else request.boxes
    if request.boxes == BY_HAND:
        boxes = parse_boxes(request.box_text)
    if is_video and request.boxes == BY_HAND:
        raise UserError("boxes of mine: of a video (expected the detector or the whole image, as people move)")
    if not is_video:
        result = pose(request.path, boxes)
        yield _answer_image(result, request, folder)
        return
    if request.smooth:
        pose = copy.copy(pose)  # the same networks and detector
        run = pose.finder.run
        pose.finder = replace(pose.finder, run=replace(run, eval=replace(run.eval, smooth=True)))
    yield from _answer_video(pose(request.path, boxes), request, folder)


def _answer_image(result: PoseResult, request: Request, folder: Path) -> Answer:
    files = _Files(result, request, folder, is_video=False)
    files.add(result)
    rows = [
        [number, name, round(float(x), 1), round(float(y), 1), round(float(score), 3)]
        for number, person in enumerate(result.to_people(), start=1)
        for name, (x, y), score in zip(result.names, person.points_xy, person.scores, strict=True)
    ]
    json, csv = files.close()
    line = f"{_people(files.num_people, result.category)}; {_drawn(files)}"
    return Answer(line=line, json=json, csv=csv, drawn=result.draw(request.path), rows=rows)


def _answer_video(results: Iterator[PoseResult], request: Request, folder: Path) -> Iterator[str | Answer]:
    num, rate = media.video_length(request.path)
    # VP8: what OpenCV's own build can write and a browser can show.
    film = Film(folder / "drawn.webm", rate, "VP80")
    files: _Files | None = None
    tracks: set[int] = set()
    cut_off = ""
    try:
        for frame, result in zip(media.read_frames(request.path), results, strict=True):
            files = files or _Files(result, request, folder, is_video=True)
            files.add(result)
            film.add(result.draw(frame.pixels))
            tracks |= set(result.track_ids.tolist() if result.track_ids is not None else ())
            if (frame.number + 1) % 10 == 0:
                yield f"{frame.number + 1} of {max(num, frame.number + 1)} frames"
    except UserError as error:
        if files is None:
            raise
        cut_off = f"; {error}"  # at the end of a video that has fewer frames than it says
    assert files is not None, "a video without a frame raises"
    film.close()
    json, csv = files.close()
    line = f"{_people(len(tracks), files.category)} in {count(files.num_images, 'frame')}; {_drawn(files)}{cut_off}"
    yield Answer(line=line, json=json, csv=csv, drawn=film.path, rows=[])


def _people(num: int, category: str) -> str:
    if category == "person":
        return "1 person" if num == 1 else f"{num} people"
    return f"{num} of {category}"


def _drawn(files: "_Files") -> str:
    return f"{files.num_shown} of {files.num_keypoints} keypoints have a score above {files.threshold:g} and are drawn"


class _Files:
    """keypoints.json and keypoints.csv, with what `eval.py --images` writes."""

    def __init__(self, first: PoseResult, request: Request, folder: Path, is_video: bool) -> None:
        self.name, self.category, self.threshold = request.path.name, first.category, first.threshold
        about: dict[str, Any] = {"boxes": request.boxes, "pictures": self.name}
        if first.present is not None:
            about[HAS_VISIBILITY] = True
        kinds = {1: first.category}
        self.writer = KeypointsWriter(folder / "keypoints.json", first.skeleton, first.threshold, about, kinds)
        has_visibility = first.present is not None
        self.table = KeypointCsv(folder / "keypoints.csv", first.names, "long", is_video, has_visibility)
        self.is_video = is_video
        self.num_people = self.num_images = self.num_keypoints = self.num_shown = 0

    def add(self, result: PoseResult) -> None:
        people = result.to_people()
        self.num_people += len(people)
        self.num_images += 1
        self.num_keypoints += result.scores.size
        self.num_shown += int((result.scores > result.threshold).sum())
        self.writer.add(result.image_name, result.image_hw, people, result.time)
        rows = [one.to_row(self.category) for one in people]
        frame = media.frame_index(result.image_name) if self.is_video else None
        self.table.add(ImageRow(self.name, rows, self.num_images, frame, result.time))

    def close(self) -> tuple[Path, Path]:
        self.writer.close()
        return self.writer.file, self.table.close()
