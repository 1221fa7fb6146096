"""CVAT's XML 1.1, for images and for video: skeletons, points and boxes.

A point of a skeleton that is `outside` is not labeled, one that is `occluded` has v = 1. Points at 0.00, 0.00 are not
labeled either: Datumaro's export to CVAT writes those of v = 0 so, without a mark. Of tracks, key frames count: what
CVAT interpolates between them is left out.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import unescape
from pathlib import Path
from xml.etree import ElementTree as ET

import numpy as np

from sapiens_accel.errors import UserError
from sapiens_accel.formats.dataset import (
    ABSENT,
    OCCLUDED,
    ODD,
    VISIBLE,
    ImageFinder,
    LooseBox,
    LooseInstance,
    LoosePoint,
    PoseCategory,
    PoseDataset,
    PoseImage,
    PoseInstance,
    gather_categories,
    group_points,
    order_names,
)  # fmt: skip
from sapiens_accel.sources.coco import reason

CATEGORY = "person"  # of points in no box
SHAPES = ("skeleton", "points", "box")
AT_ORIGIN = "points at 0.00, 0.00, taken as not labeled, as Datumaro writes v = 0"


@dataclass(frozen=True, kw_only=True)
class Frame:
    """An image of the XML and its shapes."""

    name: str
    group: str | None
    shapes: list[ET.Element]


def read(path: Path, images: Path | None = None) -> PoseDataset:
    """The annotations of annotations.xml, or of the folder that CVAT's ZIP unpacks to.

    Raises:
        UserError: no such file, a broken or ambiguous one, an image that is not there.
    """
    file = _find_file(path) if path.is_dir() else path
    root = _parse(file)
    left_out: Counter[str] = Counter()
    frames = [*_image_frames(root), *_track_frames(root, left_out)]
    left_out[AT_ORIGIN] = sum(_count_at_origin(shape) for frame in frames for shape in frame.shapes)
    folders = [images] if images else [file.parent, file.parent / "images"]
    finder = ImageFinder(folders)
    kept: list[tuple[Frame, Path]] = []
    for frame in frames:
        for shape in frame.shapes:
            left_out[f"shapes of type {shape.tag}"] += shape.tag not in SHAPES
        has_any = any(shape.tag in SHAPES for shape in frame.shapes)
        left_out["images without a skeleton, point or box"] += not has_any
        if has_any and (source := _find_frame(finder, frame)):
            kept.append((frame, source))
    finder.check(file)
    try:
        categories, gathered = _gather([frame for frame, _ in kept], _skeletons(root), file)
    except ODD as error:
        raise UserError(f"{file}: {reason(error)}") from None
    pose_images = [
        PoseImage(name=_short(frame.name), source=source, instances=many, group=frame.group)
        for (frame, source), many in zip(kept, gathered, strict=True)
    ]
    return PoseDataset(categories=categories, images=pose_images, left_out=left_out)


def _find_file(folder: Path) -> Path:
    """annotations.xml, as CVAT calls it, or the only XML of the folder, as Datumaro and users call it."""
    file, others = folder / "annotations.xml", sorted(folder.glob("*.xml"))
    if file.is_file() or len(others) == 1:
        return file if file.is_file() else others[0]
    found = ", ".join(one.name for one in others[:3]) or "no XML"
    raise UserError(f"{folder}: no annotations.xml in it (found {found}). Name the file")


def _parse(file: Path) -> ET.Element:
    try:
        root = ET.parse(file).getroot()
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    except ET.ParseError as error:
        raise UserError(f"{file}: not XML: {error}") from None
    if root.tag != "annotations" or root.find("meta") is None:
        raise UserError(f"{file}: no XML of CVAT (expected <annotations> with <meta>, found <{root.tag}>)")
    return root


def _find_frame(finder: ImageFinder, frame: Frame) -> Path | None:
    """The image of a frame; those of a video are called frame_000012, with an ending that CVAT chooses."""
    if Path(frame.name).suffix:
        return finder.find(frame.name)
    files = [file for folder in finder.folders for file in sorted(folder.glob(f"{frame.name}.*"))]
    return files[0] if files else finder.find(frame.name)


def _short(name: str) -> str:
    return "/".join(part for part in re.split(r"[\\/]+", name) if part not in ("", ".", ".."))


def _image_frames(root: ET.Element) -> Iterator[Frame]:
    for image in root.iter("image"):
        yield Frame(name=image.attrib.get("name", ""), group=None, shapes=[one for one in image if one.tag != "tag"])


def _track_frames(root: ET.Element, left_out: Counter[str]) -> Iterator[Frame]:
    """The frames of a video, from the key frames of its tracks."""
    shapes: dict[int, list[ET.Element]] = {}
    for track in root.iter("track"):
        for shape in track:
            if shape.attrib.get("outside") == "1":
                continue
            points = list(shape.iter("points")) if shape.tag == "skeleton" else []
            if not any(one.attrib.get("keyframe", "1") == "1" for one in [shape, *points]):
                left_out["interpolated shapes"] += 1
                continue
            shape.attrib.setdefault("label", track.attrib.get("label", ""))
            shape.attrib.setdefault("group_id", f"track {track.attrib.get('id')}")
            shapes.setdefault(int(shape.attrib["frame"]), []).append(shape)
    name = root.findtext("meta/source") or root.findtext("meta/task/name") or "video"
    for frame, several in sorted(shapes.items()):
        yield Frame(name=f"frame_{frame:06d}", group=Path(name).stem, shapes=several)


# ---- Skeletons


def _skeletons(root: ET.Element) -> dict[str, PoseCategory]:
    """The categories of skeletons that the XML declares, by label."""
    labels = list(root.iter("label"))
    categories = {}
    for label in labels:
        name, svg = label.findtext("name") or "", unescape(label.findtext("svg") or "")
        parts = [one.findtext("name") or "" for one in labels if one.findtext("parent") == name]
        if label.findtext("type") == "skeleton" and parts:
            categories[name] = PoseCategory(name=name, keypoints=tuple(parts), edges=_edges(svg, parts))
    return categories


def _edges(svg: str, names: Sequence[str]) -> tuple[tuple[int, int], ...]:
    """Edges between keypoints, from the drawing that CVAT keeps of a skeleton."""
    nodes = {}
    for number, circle in enumerate(re.findall(r"<circle[^>]*>", svg)):
        words = dict(re.findall(r'data-([\w-]+)="([^"]*)"', circle))
        name = words.get("label-name", names[number] if number < len(names) else None)
        nodes[words.get("node-id")] = name
    edges = []
    for line in re.findall(r"<line[^>]*>", svg):
        words = dict(re.findall(r'data-([\w-]+)="([^"]*)"', line))
        ends = nodes.get(words.get("node-from")), nodes.get(words.get("node-to"))
        if ends[0] in names and ends[1] in names:
            edges.append((names.index(ends[0]), names.index(ends[1])))
    return tuple(edges)


def _gather(
    frames: Sequence[Frame], declared: dict[str, PoseCategory], file: Path
) -> tuple[list[PoseCategory], list[list[PoseInstance]]]:
    """Skeletons as they are, and what loose points and boxes make."""
    shapes = [shape for frame in frames for shape in frame.shapes if shape.tag == "skeleton"]
    labels = order_names([[shape.attrib["label"] for shape in shapes]])
    categories = []
    for label in labels:
        points = [
            [one.attrib["label"] for one in shape.iter("points")] for shape in shapes if shape.attrib["label"] == label
        ]
        plain = PoseCategory(name=label, keypoints=tuple(order_names(points)))
        categories.append(declared.get(label, plain))
    loose: list[list[LooseInstance]] = []
    gathered: list[list[PoseInstance]] = []
    for frame in frames:
        boxes = [_box(shape) for shape in frame.shapes if shape.tag == "box"]
        skeletons = [shape for shape in frame.shapes if shape.tag == "skeleton"]
        points = [point for shape in frame.shapes if shape.tag == "points" for point in _points(shape)]
        box_of = {box.key: box.xywh for box in boxes if box.key is not None}
        gathered.append([_skeleton(shape, categories, box_of) for shape in skeletons])
        used = {_key(shape) for shape in skeletons}
        boxes = [box for box in boxes if box.key is None or box.key not in used]
        loose.append(group_points(points, boxes, f"{file}: image {frame.name}"))
    if any(loose):
        others, instances = gather_categories(loose, CATEGORY)
        first = len(categories)
        categories += others
        for many, more in zip(gathered, instances, strict=True):
            many += [
                PoseInstance(category=first + one.category, keypoints=one.keypoints, box_xywh=one.box_xywh)
                for one in more
            ]
    return categories, gathered


def _skeleton(
    shape: ET.Element, categories: Sequence[PoseCategory], box_of: dict[str, tuple[float, float, float, float]]
) -> PoseInstance:
    number = next(index for index, one in enumerate(categories) if one.name == shape.attrib["label"])
    names = categories[number].keypoints
    keypoints = np.zeros((len(names), 3))
    for point in shape.iter("points"):
        v = _visibility(point)
        if v:
            ((x, y),) = _coordinates(point)
            if x or y:
                keypoints[names.index(point.attrib["label"])] = x, y, v
    return PoseInstance(category=number, keypoints=keypoints, box_xywh=box_of.get(_key(shape) or ""))


def _visibility(shape: ET.Element) -> int:
    if shape.attrib.get("outside") == "1":
        return ABSENT
    return OCCLUDED if shape.attrib.get("occluded") == "1" else VISIBLE


def _coordinates(shape: ET.Element) -> list[tuple[float, float]]:
    """x and y (px) of each of the shape's points."""
    pairs = [pair.split(",") for pair in shape.attrib["points"].split(";") if pair]
    return [(float(x), float(y)) for x, y in pairs]


def _count_at_origin(shape: ET.Element) -> int:
    """Points that are marked as labeled at 0, 0, of a skeleton or of a shape of points."""
    shown = [one for one in shape.iter("points") if _visibility(one)]
    return sum(not any(xy) for one in shown for xy in _coordinates(one))


def _key(shape: ET.Element) -> str | None:
    key = shape.attrib.get("group_id")
    return key if key not in (None, "", "0") else None


def _points(shape: ET.Element) -> Iterator[LoosePoint]:
    """The points of a shape: one by its label, several as LABEL_1, LABEL_2, ..."""
    points, label = _coordinates(shape), shape.attrib["label"]
    for number, xy in enumerate(points, 1):
        if any(xy):
            name = label if len(points) == 1 else f"{label}_{number}"
            yield LoosePoint(label=name, xy=xy, v=_visibility(shape), key=_key(shape))


def _box(shape: ET.Element) -> LooseBox:
    """A rectangle; the upright one around it where it is rotated (degrees, clockwise about its center)."""
    left, top, right, bottom = (float(shape.attrib[name]) for name in ("xtl", "ytl", "xbr", "ybr"))
    angle = math.radians(float(shape.attrib.get("rotation", 0)))
    cosine, sine = abs(math.cos(angle)), abs(math.sin(angle))
    width = (right - left) * cosine + (bottom - top) * sine
    height = (right - left) * sine + (bottom - top) * cosine
    xywh = ((left + right - width) / 2, (top + bottom - height) / 2, width, height)
    return LooseBox(label=shape.attrib["label"], xywh=xywh, key=_key(shape))
