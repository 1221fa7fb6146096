"""FORMAT coco_json of the command convert: one COCO JSON, split into training and validation.

Tools export one file of all images. Annotations, categories and all other fields stay as they are; what is odd in them
is named by what reads the folder afterwards.
"""

import json
import shutil
from argparse import Namespace
from pathlib import Path, PurePosixPath
from typing import Any

from tqdm import tqdm

from sapiens_accel.errors import UserError, count
from sapiens_accel.formats.coco_folder import FILES, WriteOptions, check_new, split_images, whole_folder
from sapiens_accel.formats.dataset import ODD, ImageFinder, PoseImage
from sapiens_accel.formats.tools.coco_datasets import IMAGE_FOLDERS
from sapiens_accel.sources.coco import load_json, number_of_id, reason

LISTS = ("images", "annotations", "categories")


def refuse_options(asked: Namespace) -> None:
    """
    Raises:
        UserError: an option that would be ignored.
    """
    given = {"--category": asked.category, "--boxes": asked.boxes}
    if unused := [name for name, value in given.items() if value is not None]:
        raise UserError(
            f"{unused[0]}: not of coco_json, whose annotations and categories stay as they are. Leave it out"
        )


def write(file: Path, out: Path, images: Path | None, options: WriteOptions) -> list[str]:
    """Write the folder, whole or not at all, and say what is in it, a line each.

    Labeled images are split by folders of theirs where there are several (videos, sessions), as those of other formats;
    an image without an annotation is for training.

    Raises:
        UserError: no COCO JSON, an annotation without its image, an image that is not there, an `out` that exists.
    """
    check_new(out)
    file = _find_json(file)
    tree = _load(file)
    folders = [images] if images else [file.parent / folder for folder in IMAGE_FOLDERS]
    finder = ImageFinder([folder.resolve() for folder in folders])
    try:
        split_of, rule = _choose(file, tree, options)
        sources = [finder.find(str(image["file_name"])) for image in tree["images"]]
        finder.check(file)
        parts = {split: _part(tree, split_of, split) for split in FILES}
    except ODD as error:
        raise UserError(f"{file}: not as COCO has it: {reason(error)}") from None
    with whole_folder(out) as temporary:
        pairs = zip(tree["images"], sources, strict=True)
        for image, source in tqdm(pairs, desc="images", total=len(sources), unit="image", disable=None, leave=False):
            folder = temporary / FILES[split_of[number_of_id(image["id"])]][1]
            if source:
                _place(source, folder / _name(image["file_name"]), link=options.link)
        for split, (annotations, folder) in FILES.items():
            (temporary / annotations).parent.mkdir(parents=True, exist_ok=True)
            (temporary / folder).mkdir(exist_ok=True)
            (temporary / annotations).write_text(json.dumps(parts[split]))
    lines = [
        f"{split}: {count(len(part['images']), 'image')}, {count(len(part['annotations']), 'annotation')}"
        for split, part in parts.items()
    ]
    return [*lines, f"split: {rule}"]


def _find_json(path: Path) -> Path:
    """
    Raises:
        UserError: a folder with none or several.
    """
    if not path.is_dir():
        return path
    files = sorted(path.glob("*.json")) or sorted(path.glob("annotations/*.json"))
    if len(files) != 1:
        raise UserError(f"{path}: holds {count(len(files), 'JSON file')} (expected one). Name the file to split")
    return files[0]


def _load(file: Path) -> dict[str, Any]:
    tree = load_json(file)  # with ids as they are written
    if not isinstance(tree, dict) or not all(isinstance(tree.get(key), list) for key in LISTS):
        raise UserError(f"{file}: no COCO JSON (expected lists of {', '.join(LISTS)}). Export the labels as COCO")
    return tree


def _choose(file: Path, tree: dict[str, Any], options: WriteOptions) -> tuple[dict[int, str], str]:
    """The split of each image, by the number of its id, and the rule.

    Ids are compared as training compares them: 1 is "1". What has one file name is one image, whatever its ids.
    """
    names: dict[int, str] = {}
    for image in tree["images"]:
        name = _name(image["file_name"])
        if names.setdefault(number_of_id(image["id"]), name) != name:
            raise ValueError(f"two images have the id {image['id']}")
    labeled = set()
    for annotation in tree["annotations"]:
        number = number_of_id(annotation["image_id"])
        if number not in names:
            where = f"annotation {annotation.get('id')}"
            raise ValueError(f"{where}: its image {annotation['image_id']} is not among 'images'")
        if any((annotation.get("keypoints") or [])[2::3]):
            labeled.add(names[number])
    if not labeled:
        raise ValueError("none of its annotations has a labeled keypoint")
    folders = {name: str(PurePosixPath(name).parent) for name in dict.fromkeys(names.values()) if name in labeled}
    several = len(set(folders.values())) > 1
    shots = [
        PoseImage(name=name, source=b"", instances=[], group=folder if several else None)
        for name, folder in folders.items()
    ]
    try:
        chosen = split_images(shots, options)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    split_of_name = dict(zip(folders, chosen.splits, strict=True))
    rule = chosen.rule
    if num := len(set(names.values())) - len(labeled):
        rule += f"; {count(num, 'image')} without a labeled keypoint for training"
    return {number: split_of_name.get(name, "train") for number, name in names.items()}, rule


def _part(tree: dict[str, Any], split_of: dict[int, str], split: str) -> dict[str, Any]:
    images = [
        {**image, "file_name": _name(image["file_name"])}
        for image in tree["images"]
        if split_of[number_of_id(image["id"])] == split
    ]
    annotations = [one for one in tree["annotations"] if split_of[number_of_id(one["image_id"])] == split]
    return {**tree, "images": images, "annotations": annotations}


def _name(file_name: str) -> str:
    """The path without what leads out of a folder, as `ImageFinder` reads it."""
    parts = str(file_name).replace("\\", "/").split("/")
    return "/".join(part for part in parts if part not in ("", ".", ".."))


def _place(source: Path, target: Path, *, link: bool) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():  # two images of one file
        return
    if link:
        target.symlink_to(source.resolve())
    else:
        shutil.copyfile(source, target)
