"""labelme's JSON files, one for each image: shapes that are points and rectangles, grouped by group_id."""

import base64
import binascii
from collections import Counter
from pathlib import Path
from typing import Any

from sapiens_accel.errors import UserError
from sapiens_accel.formats.dataset import (
    OCCLUDED,
    ODD,
    VISIBLE,
    ImageFinder,
    LooseBox,
    LooseInstance,
    LoosePoint,
    PoseDataset,
    PoseImage,
    gather_categories,
    group_points,
    name_below,
)  # fmt: skip
from sapiens_accel.sources import images as photo
from sapiens_accel.sources.coco import load_json, reason

CATEGORY = "person"  # of points in no rectangle


def read(path: Path, images: Path | None = None) -> PoseDataset:
    """The points of all files in and below a folder, or of one file.

    Points and rectangles of one group_id are one instance; without one, a point belongs to the rectangle around it.

    Raises:
        UserError: no such files, a broken or ambiguous one, an image that is not there.
    """
    files = [path] if path.is_file() else sorted(path.rglob("*.json"))
    left_out: Counter[str] = Counter()
    with_json: set[Path] = set()
    read_files: list[tuple[str, Path | bytes, list[LooseInstance]]] = []
    missing = ImageFinder([])
    for file in files:
        tree = load_json(file)
        if not isinstance(tree, dict) or not isinstance(tree.get("shapes"), list):
            left_out["JSON files that are not of labelme"] += 1
            continue
        try:
            instances = group_points(*_shapes(tree, left_out), str(file))
            name, source = _image_of(tree, file, images, missing)
        except ODD as error:
            raise UserError(f"{file}: {reason(error)}") from None
        left_out["images without a point or rectangle"] += not instances
        if isinstance(source, Path):
            with_json.add(source.resolve())
        if instances and source is not None:
            read_files.append((name, source, instances))
    missing.check(path)
    if folder := images or (path if path.is_dir() else None):
        every = {file.resolve() for file in folder.rglob("*") if file.suffix.lower() in photo.IMAGE_SUFFIXES}
        left_out["images without labels (no JSON of theirs)"] = len(every - with_json)
    if not read_files:
        raise UserError(
            f"{path}: no labels of labelme (expected JSON files with 'shapes', found {len(files)} JSON files)"
        )
    categories, gathered = gather_categories([instances for _, _, instances in read_files], CATEGORY)
    pose_images = [
        PoseImage(name=name, source=source, instances=many)
        for (name, source, _), many in zip(read_files, gathered, strict=True)
    ]
    return PoseDataset(categories=categories, images=pose_images, left_out=left_out)


def _image_of(
    tree: dict[str, Any], file: Path, images: Path | None, missing: ImageFinder
) -> tuple[str, Path | bytes | None]:
    """Name and source of the image: a file, or what labelme keeps of it in the JSON."""
    folders = [images] if images else [file.parent]
    finder = ImageFinder(folders)
    if source := finder.find(str(tree["imagePath"])):
        return name_below(source, folders), source
    name = str(tree["imagePath"]).replace("\\", "/").rsplit("/", 1)[-1]
    if tree.get("imageData"):
        try:
            return name, base64.b64decode(tree["imageData"], validate=True)
        except binascii.Error as error:
            raise ValueError(f"'imageData' is no base64: {error}") from None
    missing.folders = folders
    missing.missing.append(name)
    return name, None


def _shapes(tree: dict[str, Any], left_out: Counter[str]) -> tuple[list[LoosePoint], list[LooseBox]]:
    points, boxes = [], []
    for shape in tree["shapes"]:
        kind, label, corners = shape.get("shape_type", "polygon"), str(shape["label"]), shape["points"]
        if kind == "point":
            x, y = map(float, corners[0])
            is_occluded = bool((shape.get("flags") or {}).get("occluded"))
            v = OCCLUDED if is_occluded else VISIBLE
            points.append(LoosePoint(label=label, xy=(x, y), v=v, key=shape.get("group_id")))
        elif kind == "rectangle":
            (x0, y0), (x1, y1) = corners[0], corners[-1] if len(corners) == 2 else corners[2]
            box = float(min(x0, x1)), float(min(y0, y1)), float(abs(x1 - x0)), float(abs(y1 - y0))
            boxes.append(LooseBox(label=label, xywh=box, key=shape.get("group_id")))
        else:
            left_out[f"shapes of type {kind}"] += 1
    return points, boxes
