"""Published datasets whose JSON is nearly COCO's: CrowdPose, AP-10K and AnimalPose.

What they lack or write otherwise is put right: names of keypoints (CrowdPose), lists for maps of images and
x1, y1, x2, y2 for x, y, width, height (AnimalPose). Their ids, crowdIndex and areas stay as they are.
"""

from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from sapiens_accel.errors import UserError
from sapiens_accel.formats.dataset import ODD, ImageFinder, PoseCategory, PoseDataset, PoseImage, PoseInstance
from sapiens_accel.sources.coco import load_json, reason, show_value

CROWDPOSE_NAMES = (
    "left_shoulder", "right_shoulder", "left_elbow", "right_elbow", "left_wrist", "right_wrist", "left_hip",
    "right_hip", "left_knee", "right_knee", "left_ankle", "right_ankle", "head", "neck",
)  # fmt: skip
IMAGE_FOLDERS = ("", "images", "data", "../images", "../data")  # from the folder of the JSON
KEPT_OF_IMAGES = ("id", "crowdIndex")
KEPT_OF_ANNOTATIONS = ("id", "area", "iscrowd")


def read_crowdpose(path: Path, images: Path | None = None) -> PoseDataset:
    """crowdpose_train.json and crowdpose_val.json, or one JSON of CrowdPose."""
    return _read_splits(path, images, ("crowdpose_train", "crowdpose_val"))


def read_ap10k(path: Path, images: Path | None = None) -> PoseDataset:
    """ap10k-train-split1.json and ap10k-val-split1.json, or one JSON of AP-10K. Its species stay categories."""
    return _read_splits(path, images, ("ap10k-train-split1", "ap10k-val-split1"))


def read_animalpose(path: Path, images: Path | None = None) -> PoseDataset:
    """keypoints.json of AnimalPose."""
    file = path / "keypoints.json" if path.is_dir() else path
    tree = _load(file)
    if isinstance(tree["images"], dict):
        tree["images"] = [{"id": int(number), "file_name": name} for number, name in tree["images"].items()]
    return _read_trees({None: (file, tree)}, images, has_corners=True)


def _read_splits(path: Path, images: Path | None, stems: Sequence[str]) -> PoseDataset:
    if path.is_file():
        return _read_trees({None: (path, _load(path))}, images)
    files = {
        split: next(iter(sorted(path.rglob(f"{stem}.json"))), None)
        for split, stem in zip(("train", "val"), stems, strict=True)
    }
    if missing := [stem for stem, file in zip(stems, files.values(), strict=True) if file is None]:
        raise UserError(f"{path}: no {missing[0]}.json in or below it. Name one JSON to split it by --val")
    return _read_trees({split: (file, _load(file)) for split, file in files.items() if file}, images)


def _load(file: Path) -> dict[str, Any]:
    tree = load_json(file)
    kinds = [tree.get(key) if isinstance(tree, dict) else None for key in ("images", "annotations", "categories")]
    if not isinstance(kinds[0], list | dict) or not all(isinstance(kind, list) for kind in kinds[1:]):
        raise UserError(f"{file}: expected 'images', 'annotations' and 'categories' as COCO has them")
    return tree


def _read_trees(
    trees: dict[str | None, tuple[Path, dict[str, Any]]], images: Path | None, has_corners: bool = False
) -> PoseDataset:
    """The images and annotations of one JSON for each split.

    Args:
        has_corners: boxes are x1, y1, x2, y2.

    Raises:
        UserError: a broken annotation, images that are not there, categories that differ.
    """
    left_out: Counter[str] = Counter()
    pose_images: list[PoseImage] = []
    categories: list[PoseCategory] = []
    for split, (file, tree) in trees.items():
        folders = [images] if images else [file.parent / folder for folder in IMAGE_FOLDERS]
        finder = ImageFinder([folder.resolve() for folder in folders])
        try:
            kinds = [_category(one, left_out) for one in tree["categories"]]
            if categories and kinds != categories:
                raise ValueError("its categories are not those of the first JSON")
            categories = kinds
            pose_images += _images(
                tree, split, finder, partial(_instance, has_corners=has_corners, most_v=_most_v(tree)), left_out
            )
        except ODD as error:
            raise UserError(f"{file}: {reason(error)}") from None
        finder.check(file)
    return PoseDataset(categories=categories, images=pose_images, left_out=left_out)


def _category(tree: dict[str, Any], left_out: Counter[str]) -> PoseCategory:
    names = tuple(tree.get("keypoints") or CROWDPOSE_NAMES)
    edges = [(int(a) - 1, int(b) - 1) for a, b in tree.get("skeleton") or []]
    if any(-1 in edge for edge in edges):  # some are published with edges that count from 0
        edges = [(a + 1, b + 1) for a, b in edges]
    valid = tuple(edge for edge in edges if max(edge) < len(names))
    left_out["edges of keypoints that are not there"] += len(edges) - len(valid)
    return PoseCategory(name=str(tree["name"]), keypoints=names, edges=valid)


def _most_v(tree: dict[str, Any]) -> float:
    """The largest v of a JSON: where it is 1, that is what others write as 2."""
    return max(
        (np.asarray(one["keypoints"], float).reshape(-1, 3)[:, 2].max() for one in tree["annotations"]), default=2
    )


def _images(
    tree: dict[str, Any], split: str | None, finder: ImageFinder, convert: Any, left_out: Counter[str]
) -> list[PoseImage]:
    numbers = {kind["id"]: number for number, kind in enumerate(tree["categories"])}
    by_image: dict[Any, list[PoseInstance]] = {image["id"]: [] for image in tree["images"]}
    for annotation in tree["annotations"]:
        if annotation["image_id"] not in by_image:
            raise ValueError(
                f"annotation {annotation.get('id')}: its image {annotation['image_id']} is not among 'images'"
            )
        by_image[annotation["image_id"]].append(convert(annotation, numbers))
    pose_images = []
    for image in tree["images"]:
        if file := finder.find(str(image["file_name"])):
            fields = {key: image[key] for key in KEPT_OF_IMAGES if key in image}
            name = str(image["file_name"])
            pose_images.append(
                PoseImage(name=name, source=file, instances=by_image[image["id"]], split=split, fields=fields)
            )
    return pose_images


def _instance(annotation: dict[str, Any], numbers: dict[Any, int], has_corners: bool, most_v: float) -> PoseInstance:
    keypoints = np.asarray(annotation["keypoints"], float).reshape(-1, 3)
    if most_v == 1:
        keypoints = keypoints * (1, 1, 2)
    fields = {key: annotation[key] for key in KEPT_OF_ANNOTATIONS if key in annotation}
    number = numbers[annotation["category_id"]]
    if annotation.get("bbox") is None:
        return PoseInstance(category=number, keypoints=keypoints, fields=fields)
    if len(box := [float(value) for value in annotation["bbox"]]) != 4:
        raise ValueError(f"annotation {annotation.get('id')}: expected a box of 4 numbers, found {show_value(box)}")
    x, y, w, h = box
    box_xywh = (x, y, w - x, h - y) if has_corners else (x, y, w, h)
    return PoseInstance(category=number, keypoints=keypoints, box_xywh=box_xywh, fields=fields)
