"""YOLO pose: a data.yaml, images/*.jpg, and labels/*.txt with one instance a line, in shares of width and height.

class x_center y_center width height, then x y (v) of each keypoint.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jaxtyping import Float
from numpy import ndarray as Array

from sapiens_accel.errors import UserError, count, read_tree
from sapiens_accel.formats.dataset import PoseCategory, PoseDataset, PoseImage, PoseInstance, find_edges, read_size
from sapiens_accel.pose.skeleton import COCO17
from sapiens_accel.sources import images as photo

SPLITS = {"train": ("train",), "val": ("val", "valid", "validation")}
NOT_USED = "test"
NUM_BOX = 5  # the numbers of a line before the keypoints


@dataclass(frozen=True, kw_only=True)
class YoloLayout:
    """What data.yaml says.

    Attributes:
        dims: numbers of a keypoint: 2 or, with v, 3.
    """

    file: Path
    root: Path
    tree: dict[str, Any]
    num_keypoints: int
    dims: int
    classes: list[str]


def read(path: Path, images: Path | None = None) -> PoseDataset:
    """The images and labels of a data.yaml, or of the folder that it is in.

    Args:
        images: the folder that the paths in data.yaml are relative to, where it is another than data.yaml says.

    Raises:
        UserError: no such file, or one without kpt_shape; a broken line; a folder that is not there.
    """
    layout = _layout(path, images)
    names, note = _keypoint_names(layout)
    mirror = _mirror(layout, names)
    edges = layout.tree.get("skeleton") or []
    is_by_index = all(isinstance(end, int) for edge in edges for end in edge)
    pairs = [[names[end] for end in edge] for edge in edges] if is_by_index else edges
    if not edges and names == list(COCO17.names):
        pairs = [[names[a], names[b]] for a, b in COCO17.edges]
    categories = [
        PoseCategory(name=name, keypoints=tuple(names), edges=find_edges(pairs, names), mirror=mirror)
        for name in layout.classes
    ]
    left_out: Counter[str] = Counter()
    pose_images = []
    for split, keys in SPLITS.items():
        key = next((key for key in keys if key in layout.tree), None)
        for file in _images(layout, key) if key else ():
            instances = list(_instances(layout, file, left_out))
            pose_images.append(PoseImage(name=file.name, source=file, instances=instances, split=split))
    if NOT_USED in layout.tree:
        left_out["images of the split test"] += sum(1 for _ in _images(layout, NOT_USED, optional=True))
    used = {one.category for image in pose_images for one in image.instances}
    left_out["classes without an instance"] += len(categories) - len(used)
    notes = [note, *_describe_shared(pose_images)]
    return PoseDataset(categories=categories, images=pose_images, left_out=left_out, notes=notes)


def _describe_shared(images: Sequence[PoseImage]) -> list[str]:
    """Files that are in both splits, in a line: `val: images/train` stands in many a first data.yaml."""
    files = {split: {Path(str(one.source)).resolve() for one in images if one.split == split} for split in SPLITS}
    num, total = len(files["train"] & files["val"]), len(files["val"])
    return [
        f"warning: {num} of {count(total, 'image')} of val are images of train too, so validation would be on what was "
        "trained. Give val images of its own, or remove `val:` from data.yaml: then --val draws some of train"
    ] * bool(num)


def _layout(path: Path, images: Path | None) -> YoloLayout:
    file = path
    if path.is_dir():
        files = [one for one in sorted(path.glob("*.y*ml")) if "kpt_shape" in one.read_text(errors="replace")]
        if not files:
            raise UserError(f"{path}: no data.yaml of a pose dataset in it (expected one with kpt_shape)")
        file = files[0]
    tree = read_tree(file, yaml.safe_load, "YAML")
    shape, classes = tree.get("kpt_shape"), tree.get("names")
    if not isinstance(shape, list) or len(shape) != 2 or shape[1] not in (2, 3):
        raise UserError(f"{file}: 'kpt_shape': expected [keypoints, 2 or 3], found {shape!r}")
    classes = list(classes.values()) if isinstance(classes, dict) else classes
    if not isinstance(classes, list) or not classes:
        raise UserError(f"{file}: 'names': expected the names of classes, found {classes!r}")
    base = images or file.parent
    # `path` is often of another machine, or relative to where training is started.
    stated = base / str(tree.get("path") or ".")
    root = stated if stated.is_dir() and not images else base
    return YoloLayout(
        file=file, root=root, tree=tree, num_keypoints=int(shape[0]), dims=shape[1], classes=list(map(str, classes))
    )


def _keypoint_names(layout: YoloLayout) -> tuple[list[str], str]:
    """The keypoints' names, and where they are from."""
    given = layout.tree.get("kpt_names") or layout.tree.get("node_names")
    if isinstance(given, dict):  # of each class; all have as many keypoints, and mostly the same
        given = next(iter(given.values()))
    if isinstance(given, list) and len(given) == layout.num_keypoints:
        return list(map(str, given)), "keypoints are named as in data.yaml"
    if layout.num_keypoints == len(COCO17.names) and layout.tree.get("flip_idx") == list(COCO17.mirror):
        return list(COCO17.names), "keypoints are named as COCO's: 17, with the flip_idx of COCO"
    names = [str(number + 1) for number in range(layout.num_keypoints)]
    return (
        names,
        "keypoints have no names in data.yaml (kpt_names): 1, 2, ...; name them with `names:` of --data.skeleton",
    )


def _mirror(layout: YoloLayout, names: Sequence[str]) -> tuple[tuple[str, str], ...] | None:
    """The pairs of flip_idx; None where it is missing or, as converters write it, each keypoint itself."""
    flip = layout.tree.get("flip_idx")
    if not isinstance(flip, list) or flip == list(range(len(names))):
        return None
    is_order = all(isinstance(other, int) for other in flip) and sorted(flip) == list(range(len(names)))
    if not is_order or any(flip[other] != number for number, other in enumerate(flip)):
        raise UserError(f"{layout.file}: 'flip_idx': expected pairs of {len(names)} indices, found {flip}")
    return tuple((str(names[number]), str(names[other])) for number, other in enumerate(flip) if number < other)


def _images(layout: YoloLayout, key: str, optional: bool = False) -> Iterator[Path]:
    """The images of a split: of a folder, of a list in a text file, or of several of them."""
    values = layout.tree[key]
    for value in values if isinstance(values, list) else [values]:
        # Roboflow writes ../train/images for a data.yaml that lies beside train.
        paths = [layout.root / str(value), layout.file.parent / str(value).removeprefix("../")]
        path = next((path for path in paths if path.exists()), None)
        if path is None and not optional:
            raise UserError(f"{layout.file}: '{key}': no such folder or file: {paths[0]}")
        if path is not None and path.is_file():
            for line in filter(None, map(str.strip, path.read_text().splitlines())):
                yield path.parent / line
        elif path is not None:
            yield from sorted(file for file in path.rglob("*") if file.suffix.lower() in photo.IMAGE_SUFFIXES)


def _instances(layout: YoloLayout, image: Path, left_out: Counter[str]) -> Iterator[PoseInstance]:
    """The instances of an image; one without a file of labels has none."""
    parts = list(image.parts)
    positions = [number for number, part in enumerate(parts) if part == "images"]
    if positions:
        parts[positions[-1]] = "labels"
    file = Path(*parts).with_suffix(".txt")
    if not file.is_file():
        left_out["files of labels that are missing (their images have no instance)"] += 1
        return
    size_wh = np.array(read_size(image), float)
    for number, line in enumerate(file.read_text().splitlines(), 1):
        if line.strip():
            yield _instance(layout, line.split(), size_wh, f"{file}: line {number}")


def _instance(layout: YoloLayout, words: list[str], size_wh: Float[Array, "2"], where: str) -> PoseInstance:
    expected = NUM_BOX + layout.num_keypoints * layout.dims
    try:
        numbers = np.array(list(map(float, words)))
        category = int(numbers[0])
    except (ValueError, IndexError, OverflowError):
        raise UserError(f"{where}: expected {expected} numbers, found {' '.join(words)[:60]!r}") from None
    if len(numbers) != expected:
        raise UserError(f"{where}: expected {expected} numbers (a class, a box, keypoints), found {len(numbers)}")
    if not 0 <= category < len(layout.classes):
        raise UserError(f"{where}: expected a class of 0 to {len(layout.classes) - 1}, found {words[0]}")
    center, sides = numbers[1:3] * size_wh, numbers[3:5] * size_wh
    points = numbers[NUM_BOX:].reshape(layout.num_keypoints, layout.dims)
    # Without v, a keypoint that is not there is at 0, 0 or at negative numbers.
    v = points[:, 2] if layout.dims == 3 else np.where((points <= 0).all(axis=1), 0.0, 2.0)
    if not np.isin(v, (0, 1, 2)).all():
        raise UserError(f"{where}: expected v of 0, 1 or 2, found {v[~np.isin(v, (0, 1, 2))][0]:g}")
    keypoints = np.column_stack([points[:, :2] * size_wh, v]) * (v > 0)[:, None]
    box = (*(center - sides / 2).tolist(), *sides.tolist())
    return PoseInstance(category=category, keypoints=keypoints, box_xywh=box)
