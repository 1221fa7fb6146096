"""Frames of a video without labels, for stage ssl: evenly, every so many seconds, or frames that differ.

They are added to a folder in COCO's form, with the boxes of what moves against a fixed background, or of whole images.
"""

import json
import math
import shlex
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from jaxtyping import Float, UInt8
from numpy import ndarray as Array

from sapiens_accel.config.commands import FRAMES
from sapiens_accel.config.schema import DataConfig
from sapiens_accel.errors import UserError, count
from sapiens_accel.formats.dataset import DEFAULT_CATEGORY
from sapiens_accel.inference.media import (
    VIDEOS,
    describe_missing_frames,
    frame_name,
    frame_times,
    is_video,
    read_frames,
    save_image,
    video_length,
)  # fmt: skip
from sapiens_accel.runtime.files import write_text
from sapiens_accel.sources.coco import load_json

THUMBNAIL = 32  # px, of the images that are compared
MOST_COMPARED = 2_000  # frames; of a longer video they are spread evenly
NUM_BACKGROUND = 51  # frames whose median is the background: what moves is elsewhere in most of them
LEAST_CHANGE = 20  # gray levels that count as motion: noise of a camera is below
MARGIN = 0.1  # of a box, on each side, as a share of its longer side
SMALLEST_SHARE = 0.001  # of the image; a smaller area that moves is noise
MOVING_CAMERA = 0.5  # share of the image that moves in the median frame where the camera does

Box = tuple[float, float, float, float]


def main(asked: Namespace) -> None:
    """`convert video FILM OUT`.

    Raises:
        UserError: it is no video, options exclude each other, nothing moves in it.
    """
    _check(asked)
    film: Path = asked.source
    category = _category(asked)
    indices = choose_frames(film, asked)
    finder = MotionBoxes(film, asked.animals or 1) if asked.boxes == "motion" else None
    folder = asked.out / asked.folder
    images, boxes = [], []
    decoded = num_still = num_replaced = 0
    for index, _, frame in read_frames(film):
        decoded += 1
        if index not in indices:
            continue
        boxes_of_frame = finder.find(frame) if finder else [(0.0, 0.0, float(frame.shape[1]), float(frame.shape[0]))]
        num_still += not boxes_of_frame
        if boxes_of_frame:
            name = f"{film.stem}/{frame_name(film, index)}"
            num_replaced += (folder / name).is_file()
            save_image(frame, folder / name)
            images.append({"file_name": name, "width": frame.shape[1], "height": frame.shape[0]})
            boxes.append(boxes_of_frame)
    if not images:
        raise UserError(
            f"{film}: nothing moves in {count(num_still, 'frame')} (expected a fixed camera and something that "
            f"moves). Use --boxes image"
        )
    file = asked.out / "annotations" / f"person_boxes_{asked.folder}.json"
    total = _add(file, images, boxes, category)
    print(f"{folder}: {count(len(images), 'frame')} of {film}, {sum(map(len, boxes))} box(es)")
    if num_still:
        print(f"left out: {count(num_still, 'frame')} in which nothing moves")
    if missing := len(indices) - len(images) - num_still:
        print(f"left out: {count(missing, 'frame')} that do not decode")
    if line := describe_missing_frames(film, decoded):
        print(line)
    if num_replaced:
        print(f"replaced: {count(num_replaced, 'frame')} of the same names in {folder / film.stem}")
    if finder and finder.share_moving > MOVING_CAMERA:
        print(f"warning: {finder.share_moving:.0%} of the image moves in the median frame; is the camera fixed?")
    print(f"{file}: {count(total, 'frame')} in all; {_describe_use(asked, file)}")


def _describe_use(asked: Namespace, file: Path) -> str:
    """The options by which stage ssl reads the frames; those of another folder where OUT has no labels."""
    if (asked.out / DataConfig.train_annotations).is_file():
        words = ["--data.root", str(asked.out)]
        words += ["--data.unlabelled_images", asked.folder] * (asked.folder != DataConfig.unlabelled_images)
        beside = ""
    else:
        words = ["--data.unlabelled_images", str((asked.out / asked.folder).absolute())]
        words += ["--data.unlabelled_annotations", str(file.absolute())]
        beside = f" {asked.out} has no labels ({DataConfig.train_annotations}): beside --data.root of labeled data"
    small = "" if asked.boxes != "motion" else "; boxes with a side below --data.unlabelled_min_side are left out there"
    return f"stage ssl reads them:{beside} {shlex.join(words)}{small}"


def _check(asked: Namespace) -> None:
    if asked.source.is_dir():
        raise UserError(f"{asked.source}: a folder (expected a video). Give its videos one by one, with the same OUT")
    if not is_video(asked.source):
        raise UserError(f"{asked.source}: no video by its ending (expected one of {', '.join(VIDEOS)})")
    if asked.boxes not in (None, "image", "motion"):
        raise UserError(f"--boxes {asked.boxes}: a video has no labels (expected image or motion)")
    if asked.seconds is not None and (asked.frames is not None or asked.different):
        raise UserError("--seconds: not together with --frames or --different (expected one of them)")
    ignored = {"--images": asked.images, "--link": asked.link, "--val": asked.val is not None}
    if of_labels := [name for name, value in ignored.items() if value]:
        raise UserError(f"{of_labels[0]}: not of a video. Leave it out")
    for name in ("frames", "seconds", "animals"):
        value = getattr(asked, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--{name} {value:g}: expected more than 0")
    if asked.animals is not None and asked.boxes != "motion":
        raise UserError(
            f"--animals {asked.animals}: without --boxes motion each frame has one box. Give both, or neither"
        )


def _category(asked: Namespace) -> dict[str, Any]:
    """The category of the boxes: that of the labels in OUT where there are some.

    Raises:
        UserError: another one was asked for.
    """
    file = asked.out / DataConfig.train_annotations
    known = load_json(file).get("categories") if file.is_file() else None
    names = [str(one.get("name")) for one in known or []]
    if names and asked.category not in (None, names[0]):
        raise UserError(f"--category {asked.category}: the labels in {file} have {', '.join(names)}. Leave it out")
    first = known[0] if known else {"id": 1, "name": asked.category or DEFAULT_CATEGORY}
    return {key: value for key, value in first.items() if key in ("id", "name", "supercategory")}


def _add(file: Path, images: list[dict[str, Any]], boxes: Sequence[Sequence[Box]], category: dict[str, Any]) -> int:
    """Add images and their boxes to a JSON; those of the same names are replaced. How many images it has then."""
    tree = load_json(file) if file.is_file() else {"images": [], "annotations": []}
    if not isinstance(tree, dict):
        raise UserError(f"{file}: a list of detections (expected a COCO file, to add frames to). Name another --folder")
    new = {image["file_name"] for image in images}
    kept = [image for image in tree["images"] if image["file_name"] not in new]
    entries = [
        (image, [one["bbox"] for one in tree["annotations"] if one["image_id"] == image["id"]]) for image in kept
    ]
    entries += list(zip(images, boxes, strict=True))
    tree = {"images": [], "annotations": [], "categories": [category]}
    for number, (image, several) in enumerate(sorted(entries, key=lambda entry: entry[0]["file_name"]), 1):
        tree["images"].append(image | {"id": number})
        for box in several:
            ann_id = len(tree["annotations"]) + 1
            xywh = [round(float(value), 2) for value in box]
            one = {"id": ann_id, "image_id": number, "category_id": category["id"], "iscrowd": 0, "bbox": xywh}
            tree["annotations"].append(one | {"area": xywh[2] * xywh[3]})
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(tree))
    return len(tree["images"])


# ---- Which frames


def choose_frames(film: Path, asked: Namespace) -> set[int]:
    """Numbers of frames, from 0."""
    times = frame_times(film)  # what a video says to have may be far from what decodes
    if asked.seconds is not None:
        wanted_times = np.arange(times[0], times[-1] + 1e-3, max(asked.seconds, 1e-3))
        # The frame that is shown at a time, for rates that vary; half a millisecond is how exactly films tell it.
        return set((np.searchsorted(times, wanted_times + 5e-4, side="right") - 1).tolist())
    wanted = min(asked.frames or FRAMES, len(times))
    evenly = np.linspace(0, len(times) - 1, wanted).round().astype(int)
    return frames_that_differ(film, wanted, asked.seed) if asked.different else set(evenly.tolist())


def frames_that_differ(film: Path, wanted: int, seed: int) -> set[int]:
    """One frame of each of so many clusters: k-means of gray thumbnails, the frame nearest to each center."""
    every = max(video_length(film)[0] // MOST_COMPARED, 1)
    indices, rows = [], []
    for index, _, frame in read_frames(film, every):
        small = cv2.resize(_gray(frame), (THUMBNAIL, THUMBNAIL), interpolation=cv2.INTER_AREA)
        indices.append(index)
        rows.append(small.reshape(-1).astype(np.float32))
    if len(rows) <= wanted:
        return set(indices)
    thumbnails = np.array(rows)
    cv2.setRNGSeed(seed)
    stop = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_MAX_ITER, 50, 0.1)
    labels = np.zeros((len(rows), 1), np.int32)
    _, labels, centers = cv2.kmeans(thumbnails, wanted, labels, stop, 3, cv2.KMEANS_PP_CENTERS)
    chosen = set()
    for number, center in enumerate(centers):
        members = np.flatnonzero(labels[:, 0] == number)
        if len(members):
            distance = ((thumbnails[members] - center) ** 2).sum(axis=1)
            chosen.add(indices[int(members[distance.argmin()])])
    return chosen


def _gray(frame: UInt8[Array, "h w 3"]) -> UInt8[Array, "h w"]:
    return cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)


# ---- What moves


class MotionBoxes:
    """Boxes of what differs from the background, the median of frames of the whole video.

    Args:
        most: boxes of a frame: the largest areas that move.
    """

    def __init__(self, film: Path, most: int) -> None:
        num, _ = video_length(film)
        frames = [_gray(frame) for _, _, frame in read_frames(film, max(num // NUM_BACKGROUND, 1))]
        self.background = np.median(np.stack(frames), axis=0).astype(np.uint8)
        self.most = most
        self.share_moving = float(np.median([(self._mask(gray) > 0).mean() for gray in frames]))

    def _mask(self, gray: UInt8[Array, "h w"]) -> UInt8[Array, "h w"]:
        """255 where the image moves; specks are removed and gaps of a body closed."""
        change = cv2.GaussianBlur(cv2.absdiff(gray, self.background), (5, 5), 0)
        mask = np.where(change > LEAST_CHANGE, 255, 0).astype(np.uint8)
        side = max(round(0.02 * max(gray.shape)), 3) | 1
        return cv2.morphologyEx(mask, cv2.MORPH_CLOSE, np.ones((side, side), np.uint8))

    def find(self, frame: UInt8[Array, "h w 3"]) -> list[Box]:
        """x, y, width, height (px) of the largest areas that move, with a margin; none where nothing does."""
        mask = self._mask(_gray(frame))
        _, _, stats, _ = cv2.connectedComponentsWithStats(mask)
        areas: Float[Array, "n 5"] = stats[1:]
        large = areas[areas[:, cv2.CC_STAT_AREA] >= SMALLEST_SHARE * mask.size]
        order = np.argsort(-large[:, cv2.CC_STAT_AREA], kind="stable")[: self.most]
        return [_with_margin(large[index, :4], mask.shape) for index in order]


def _with_margin(xywh: Array, size_hw: tuple[int, ...]) -> Box:
    x, y, w, h = (float(value) for value in xywh)
    margin = MARGIN * max(w, h)
    left, top = max(x - margin, 0.0), max(y - margin, 0.0)
    right, bottom = min(x + w + margin, float(size_hw[1])), min(y + h + margin, float(size_hw[0]))
    return left, top, right - left, bottom - top
