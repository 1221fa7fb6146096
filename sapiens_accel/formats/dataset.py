"""What an annotation tool's files hold, before it is written in COCO's form, and how loose points become instances."""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from jaxtyping import Float, UInt8
from numpy import ndarray as Array

from sapiens_accel.errors import UserError, count
from sapiens_accel.sources import images as photo
from sapiens_accel.sources.coco import BROKEN

ODD = (*BROKEN, IndexError)  # what a file with other values than the tool's raises
VISIBLE, OCCLUDED, ABSENT = 2, 1, 0  # v of COCO
DEFAULT_CATEGORY = "animal"  # of tools that name none: DeepLabCut, lightning-pose, SLEAP
EXIF_ORIENTATION, TURNED = 274, (5, 6, 7, 8)  # the tag, and the values that exchange width and height
UPLOAD_PREFIX = re.compile(r"^[0-9a-f]{8}-")  # that Label Studio puts before the name of an uploaded file


@dataclass(frozen=True, kw_only=True)
class PoseCategory:
    """A kind of animal or thing and its keypoints.

    Attributes:
        edges: pairs of indices of keypoints, from 0.
        mirror: pairs of names that are swapped in a mirrored image; None: the tool does not say.
    """

    name: str
    keypoints: tuple[str, ...]
    edges: tuple[tuple[int, int], ...] = ()
    mirror: tuple[tuple[str, str], ...] | None = None


@dataclass(frozen=True, kw_only=True)
class PoseInstance:
    """One annotated animal or person.

    Attributes:
        category: an index into `PoseDataset.categories`.
        keypoints: x, y in image px as the tool has them, and v; x and y are 0 where v is.
        box_xywh: image px; None: the tool has none.
        fields: of COCO's annotation, as the tool has them: id, area, iscrowd, ...
    """

    category: int
    keypoints: Float[Array, "k 3"]
    box_xywh: tuple[float, float, float, float] | None = None
    fields: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class PoseImage:
    """An image and what is annotated in it.

    Attributes:
        name: of the image in the folder that is written, with / between folders.
        source: its file, its bytes, or what reads its pixels (RGB).
        group: the video or session whose images are alike, so that they come into one split; None: not known.
        split: train or val, where the tool says so.
        fields: of COCO's image, as the tool has them: id, crowdIndex, ...
    """

    name: str
    source: "Path | bytes | Callable[[], UInt8[Array, 'h w 3']]"
    instances: list[PoseInstance]
    group: str | None = None
    split: str | None = None
    fields: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class PoseDataset:
    """All that was read.

    Attributes:
        left_out: how many of what was left out.
        notes: what else should be said, a line each.
    """

    categories: list[PoseCategory]
    images: list[PoseImage]
    left_out: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)


def order_names(sequences: Iterable[Sequence[str]]) -> list[str]:
    """The names of several lists, each once, in the order in which they come."""
    return list(dict.fromkeys(name for names in sequences for name in names))


def find_edges(pairs: Iterable[Any], names: Sequence[str]) -> tuple[tuple[int, int], ...]:
    """Pairs of names as pairs of indices; those of names that are not there are left out."""
    known = [tuple(map(str, pair)) for pair in pairs if isinstance(pair, list | tuple) and len(pair) == 2]
    return tuple((names.index(a), names.index(b)) for a, b in known if a in names and b in names)


# ---- Where the images are


class ImageFinder:
    """Finds an image by the path that an annotation file gives, which is often of another machine.

    The whole path is looked for in each folder, then the path without its first folder, and so on.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        self.folders = list(dict.fromkeys(folders))
        self.missing: list[str] = []

    def find(self, path: str) -> Path | None:
        """The file; None and a note in `missing` where there is none."""
        parts = [part for part in re.split(r"[\\/]+", path) if part not in ("", ".", "..")]
        names = [parts[first:] for first in range(len(parts))]
        if parts and UPLOAD_PREFIX.match(parts[-1]):
            names.append([UPLOAD_PREFIX.sub("", parts[-1])])
        for folder in self.folders:
            for name in names:
                if (file := folder.joinpath(*name)).is_file():
                    return file
        self.missing.append(path)
        return None

    def check(self, where: Path) -> None:
        """
        Raises:
            UserError: images that were not found.
        """
        if self.missing:
            some = ", ".join(self.missing[:3]) + ", ..." * (len(self.missing) > 3)
            folders = ", ".join(map(str, self.folders))
            raise UserError(
                f"{where}: {count(len(self.missing), 'image')} not found (expected in {folders}, found none named "
                f"{some}). Name their folder: --images FOLDER"
            )


def name_below(file: Path, folders: Sequence[Path]) -> str:
    """An image's name relative to the first of the folders that it is in, else its own name."""
    for folder in folders:
        if file.is_relative_to(folder):
            return file.relative_to(folder).as_posix()
    return file.name


@lru_cache(maxsize=1 << 16)
def read_size(file: Path) -> tuple[int, int]:
    """Width and height (px) of an image, turned as its EXIF data says: of the header where that is enough.

    Raises:
        UserError: it is no image that can be read.
    """
    try:
        with PIL.Image.open(file) as image:
            if image.getexif().get(EXIF_ORIENTATION) not in TURNED:
                return image.size
    except Exception:  # Pillow documents no complete list of what a broken header raises
        pass
    height, width = photo.read_image(file).shape[:2]
    return width, height


# ---- Loose points


@dataclass(frozen=True, kw_only=True)
class LoosePoint:
    """A labeled point that belongs to no skeleton; `key` is what the tool groups shapes by, where it does."""

    label: str
    xy: tuple[float, float]
    v: int = VISIBLE
    key: Any = None


@dataclass(frozen=True, kw_only=True)
class LooseBox:
    """A labeled rectangle; `key` as of LoosePoint."""

    label: str
    xywh: tuple[float, float, float, float]
    key: Any = None


@dataclass(frozen=True, kw_only=True)
class LooseInstance:
    """The points of one animal or person by their labels, and its box."""

    label: str | None
    points: dict[str, LoosePoint]
    box_xywh: tuple[float, float, float, float] | None


def group_points(points: Sequence[LoosePoint], boxes: Sequence[LooseBox], where: str) -> list[LooseInstance]:
    """Instances of the points and boxes of one image.

    Points and boxes of the same key are one. A point without a key belongs to the only box that contains it. Where
    there are no boxes, all points without a key are one.

    Args:
        where: names the image in an error.

    Raises:
        UserError: a label stands twice in an instance, or a point is in several boxes or in none.
    """
    members: dict[Any, list[LoosePoint]] = defaultdict(list)
    box_of: dict[Any, LooseBox] = {}
    for number, box in enumerate(boxes):
        key = ("key", box.key) if box.key is not None else ("box", number)
        if key in box_of:
            raise UserError(f"{where}: two boxes in group {box.key} (expected one). Give each its own group")
        box_of[key] = box
    for point in points:
        members[_key_of(point, box_of, where)].append(point)
    instances = []
    for key in dict.fromkeys([*box_of, *members]):
        labels = Counter(point.label for point in members[key])
        if twice := next((label for label, times in labels.items() if times > 1), None):
            raise UserError(
                f"{where}: {twice!r} is labeled {labels[twice]} times in one instance (expected once). Group the "
                f"points of each instance (group, relation or parent box) in the annotation tool"
            )
        box = box_of.get(key)
        by_label = {point.label: point for point in members[key]}
        instances.append(LooseInstance(label=box and box.label, points=by_label, box_xywh=box and box.xywh))
    return instances


def _key_of(point: LoosePoint, boxes: dict[Any, LooseBox], where: str) -> Any:
    if point.key is not None:
        return "key", point.key
    if not boxes:
        return "all", None
    x, y = point.xy
    around = [
        key
        for key, box in boxes.items()
        if box.xywh[0] <= x <= box.xywh[0] + box.xywh[2] and box.xywh[1] <= y <= box.xywh[1] + box.xywh[3]
    ]
    if len(around) != 1:
        raise UserError(
            f"{where}: the point {point.label!r} at {x:.1f}, {y:.1f} is in {len(around)} boxes (expected one). Group "
            f"the points of each instance (group, relation or parent box) in the annotation tool"
        )
    return around[0]


def gather_categories(
    instances: Sequence[Sequence[LooseInstance]], default: str
) -> tuple[list[PoseCategory], list[list[PoseInstance]]]:
    """Categories of instances by the labels of their boxes, all with the same keypoints: those that are labeled.

    Args:
        instances: of each image.
        default: the name of the category of instances without a box.
    """
    keypoints = tuple(order_names([list(one.points) for several in instances for one in several]))
    names = order_names([[one.label or default] for several in instances for one in several])
    categories = [PoseCategory(name=name, keypoints=keypoints) for name in names]
    gathered = [[_instance(one, keypoints, names.index(one.label or default)) for one in many] for many in instances]
    return categories, gathered


def _instance(one: LooseInstance, keypoints: Sequence[str], category: int) -> PoseInstance:
    rows = [(*one.points[name].xy, one.points[name].v) if name in one.points else (0, 0, 0) for name in keypoints]
    return PoseInstance(category=category, keypoints=np.array(rows, float), box_xywh=one.box_xywh)
