"""The command convert, with FORMAT, IN and OUT: labels of another tool as a folder in COCO's form.

FORMAT coco_json splits one COCO JSON into training and validation (split.py). FORMAT coco is the way out of that form:
a folder as parquet or tar shards (sources/convert.py). FORMAT video takes frames without labels for stage ssl.
"""

import shlex
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from sapiens_accel.config.commands import convert_parser
from sapiens_accel.config.schema import DataConfig
from sapiens_accel.errors import UserError
from sapiens_accel.formats import coco_folder, split, video
from sapiens_accel.formats.coco_folder import WriteOptions
from sapiens_accel.formats.dataset import ODD, PoseDataset
from sapiens_accel.formats.tools import (
    coco_datasets,
    cvat,
    deeplabcut,
    label_studio,
    labelme,
    mpii,
    sleap,
    yolo,
)  # fmt: skip
from sapiens_accel.sources import convert as shards
from sapiens_accel.sources.coco import load_json, reason
from sapiens_accel.sources.foreign import find_tool, suggest_conversion

Reader = Callable[[Path, Path | None], PoseDataset]

READERS: dict[str, Reader] = {
    "deeplabcut": deeplabcut.read,
    "lightning_pose": deeplabcut.read,
    "sleap": sleap.read,
    "label_studio": label_studio.read,
    "cvat": cvat.read,
    "yolo": yolo.read,
    "labelme": labelme.read,
    "mpii": mpii.read,
    "crowdpose": coco_datasets.read_crowdpose,
    "ap10k": coco_datasets.read_ap10k,
    "animalpose": coco_datasets.read_animalpose,
}
COCO_FORMS = ("crowdpose", "ap10k", "animalpose")  # whose files are COCO JSONs themselves


def main(argv: Sequence[str]) -> None:
    """`FORMAT IN OUT`; `python -m sapiens_accel.data` has the word `convert` before it.

    Raises:
        UserError: what is missing, broken or ambiguous; an OUT that is there.
    """
    words = list(argv[1:] if argv[:1] == ["convert"] else argv)
    if words[:1] == ["coco"]:
        shards.main(["convert", *words])
        return
    asked = convert_parser().parse_args(words)
    if not asked.source.exists():
        raise UserError(f"{asked.source}: no such file or folder")
    if asked.format == "video":
        video.main(asked)
        return
    _refuse_options_of_video(asked)
    val = WriteOptions.val if asked.val is None else asked.val
    if not 0 < val < 1:
        raise UserError(f"--val {val:g}: expected a share between 0 and 1, such as 0.2")
    options = WriteOptions(val=val, seed=asked.seed, boxes=asked.boxes or "annotation", link=asked.link)
    if asked.format == "coco_json":
        split.refuse_options(asked)
        if hint := _suggest_other_format(asked.format, asked.source):
            raise UserError(f"{asked.source}: no COCO JSON{hint}")
        summary = split.write(asked.source, asked.out, asked.images, options)
    else:
        dataset = read(asked.format, asked.source, asked.images)
        if asked.category:
            dataset = rename(dataset, asked.category)
        summary = coco_folder.write(dataset, asked.out, options)
    print(*summary, f"written: {asked.out}; train with", describe_training(asked.out, options), sep="\n")


def describe_training(folder: Path, options: WriteOptions) -> str:
    """The command that trains published weights on a folder that was written, with the options that it needs."""
    words = ["accelerate", "launch", "train.py", "--recipe", "sapiens_0.3b_coco", "--stage", "phase2"]
    words += ["--weights", "facebook/sapiens-pretrain-0.3b", "--data.root", str(folder)]
    words += ["--data.skeleton", coco_folder.SKELETON] * (folder / coco_folder.SKELETON).is_file()
    words += ["--data.box_padding", "1"] * (options.boxes == "image")
    return shlex.join(words)


def read(form: str, source: Path, images: Path | None = None) -> PoseDataset:
    """What the files of a tool hold.

    Raises:
        UserError: what is missing, broken or ambiguous; a value of another type than the tool writes.
    """
    try:
        return READERS[form](source, images)
    except ODD as error:
        if form not in COCO_FORMS:
            _refuse_coco(source)
        raise UserError(f"{source}: not as {form} writes it: {reason(error)}") from None
    except UserError as error:
        if form not in COCO_FORMS:
            _refuse_coco(source)
        hint = _suggest_other_format(form, source)
        if hint and hint not in str(error):
            raise UserError(f"{error}{hint}") from None
        raise


def _suggest_other_format(form: str, source: Path) -> str:
    """What the files are of, where that is not the format that was named; else empty."""
    try:
        tool, _ = find_tool(source)
    except OSError:
        return ""
    same = (form, form.replace("lightning_pose", "deeplabcut"), form.replace("deeplabcut", "lightning_pose"))
    return "" if tool in (None, "coco", *same) else suggest_conversion(source)


def _refuse_coco(source: Path) -> None:
    """
    Raises:
        UserError: it is the COCO export of a tool, or the folder of one, which needs no conversion.
    """
    files = [source] if source.is_file() else [*source.glob("*.json"), *source.glob("annotations/*.json")]
    for file in sorted(file for file in files if file.suffix.lower() == ".json"):
        try:
            tree = load_json(file)
        except UserError:
            continue
        if isinstance(tree, dict) and all(isinstance(tree.get(key), list) for key in ("images", "annotations")):
            root = source if source.is_dir() else file.parent
            raise UserError(
                f"{file}: this is a COCO JSON, which is read as it is: train with --data.root {root} "
                f"--data.train_annotations {file.relative_to(root)} --data.train_images FOLDER, and the same of "
                f"validation by --data.val_annotations and --data.val_images. One file of all images is split by "
                f"{shlex.join(['sapiens-accel', 'convert', 'coco_json', str(file), 'OUT'])}"
            )


def _refuse_options_of_video(asked: Namespace) -> None:
    """
    Raises:
        UserError: an option that would be ignored.
    """
    given = {"--frames": asked.frames, "--seconds": asked.seconds, "--different": asked.different}
    given |= {"--folder": asked.folder != DataConfig.unlabelled_images}
    given |= {"--boxes motion": asked.boxes == "motion", "--animals": asked.animals is not None}
    if of_video := [name for name, value in given.items() if value]:
        raise UserError(f"{of_video[0]}: of a video (expected FORMAT video, found {asked.format}). Leave it out")


def rename(dataset: PoseDataset, name: str) -> PoseDataset:
    """The dataset with another name of its category.

    Raises:
        UserError: it has several.
    """
    if len(dataset.categories) > 1:
        names = ", ".join(category.name for category in dataset.categories)
        raise UserError(f"--category {name}: expected one category to rename, found {names}")
    return replace(dataset, categories=[replace(dataset.categories[0], name=name)])
