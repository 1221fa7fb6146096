"""An annotation file and its images, read on past the first fault: what the run's own reader would refuse, all of it.

The rules are the run's own (`annotation_rules`), so nothing passes here that a run would not take.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sapiens_accel.data import annotation_rules
from sapiens_accel.data import people as coco
from sapiens_accel.doctor.labels import Finding, Labels, Level
from sapiens_accel.errors import UserError
from sapiens_accel.sources import coco as coco_json
from sapiens_accel.sources import images as photo
from sapiens_accel.sources import shards
from sapiens_accel.sources.schema import FARTHEST, PLAIN, Fault, Reading

EIGHTH = 8  # `photo.looks` tells sizes to this many px


@dataclass(frozen=True, kw_only=True)
class Read:
    """What could be read of an annotation file.

    Attributes:
        labels: the people that a run would take, those without labeled keypoints included.
        images: the names of their images, below the root, with their ids.
        sizes_wh: of those of them whose size the JSON tells.
        most_looked_at: as `coco.most_looked_at`.
        findings: what could not be read, and what is left out.
    """

    labels: Labels
    pictures: Mapping[str, int] = field(default_factory=dict)
    sizes_wh: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    most_looked_at: int = coco.LOOK_AT_ALL
    findings: Sequence[Finding] = ()


def read(root: Path, annotations: str, images: str, num_keypoints: int, reading: Reading | None = PLAIN) -> Read:
    """Read what can be read, by the rules of a run.

    Args:
        annotations, images: the JSON (or manifest of shards) and the folder of its images, relative to `root`.
        reading: how its annotations become the run's keypoints; None: that is not known, and another number of them is
            no fault of each annotation.
    """
    path = root / annotations
    faults: list[Fault] = []
    try:
        if not path.is_file():
            raise UserError(f"{path}: no such annotation file; see --data.root and --data.*_annotations")
        listed = coco_json.parsed(path)
        tree = coco_json.read_json(path, faults)
    except (UserError, OSError) as error:
        return Read(labels=_labels([], {}, num_keypoints), findings=[_error("json", str(error), str(path))])
    rows = list(annotation_rules.rows_of(tree, path, images, num_keypoints, reading, faults))
    sizes = _told_sizes(tree["images"], images)
    pictures = {row["file_name"]: row["image_id"] for row in rows}
    return Read(
        labels=_labels(rows, sizes, num_keypoints),
        pictures=pictures,
        sizes_wh=sizes,
        most_looked_at=coco.most_looked_at(path),
        findings=[*_findings(faults, listed), *_unknown_sizes(pictures, sizes)],
    )


def _told_sizes(listed: Sequence[dict[str, Any]], folder: str) -> dict[str, tuple[float, float]]:
    """Width and height by name below the root, of those of the JSON's images that tell them."""
    sizes: dict[str, tuple[float, float]] = {}
    for image in listed:
        size = tuple(s for key in ("width", "height") if isinstance(s := image.get(key), int | float))
        if len(size) == 2 and min(size) > 0 and max(size) < FARTHEST:
            sizes[f"{folder}/{image['file_name']}"] = size
    return sizes


def _findings(faults: Sequence[Fault], tree: dict[str, Any]) -> Iterator[Finding]:
    """The faults by their kind, each with all whom it is about."""
    texts: dict[str, tuple[Level, str]] = {
        "images": ("error", f"of {len(tree['images'])} images in the JSON cannot be taken"),
        "ids": ("error", "image ids that are of two images"),
        "annotations": ("error", f"of {len(tree['annotations'])} annotations cannot be read"),
        "boxes": ("warning", "annotations are left out: their boxes have no width or no height"),
        "num_keypoints": ("warning", "annotations whose num_keypoints is not the number of their labeled keypoints"),
        "crowd": ("note", "annotations are crowds: left out"),
        "kind": ("note", "annotations are of other categories: left out"),
    }
    yield from (_error("categories", fault.text) for fault in faults if fault.check == "categories")
    for check, (level, text) in texts.items():
        if culprits := tuple(fault.text for fault in faults if fault.check == check):
            yield Finding(level=level, check=check, text=f"{len(culprits)} {text}", culprits=culprits)


def ground_truth_boxes(people: coco.People) -> Read:
    """The images of people without labels."""
    pictures = dict(zip(people.rows["file_name"][:], people.rows["image_id"][:], strict=True))
    labels = _labels([], {}, people.rows.features["keypoints"].shape[0])
    return Read(labels=labels, pictures=pictures, most_looked_at=coco.most_looked_at(people.annotations))


def _unknown_sizes(pictures: Mapping[str, int], sizes: Mapping[str, tuple[float, float]]) -> Iterator[Finding]:
    unknown = tuple(name for name in pictures if name not in sizes)
    if unknown:
        text = f"{len(unknown)} of {len(pictures)} images have no width and height in the JSON: whether boxes and "
        text += "keypoints lie outside of them was not looked at"
        yield Finding(level="note", check="size", text=text, culprits=unknown)


def _labels(rows: Sequence[dict[str, Any]], sizes: Mapping[str, tuple[float, float]], k: int) -> Labels:
    num = len(rows)
    unknown = (np.nan, np.nan)
    return Labels(
        ann_ids=np.array([row["ann_id"] for row in rows], np.int64),
        file_names=np.array([row["file_name"] for row in rows], object),
        boxes_xywh=np.array([row["box_xywh"] for row in rows]).reshape(num, 4),
        areas=np.array([row["area"] for row in rows], np.float64),
        keypoints=np.array([row["keypoints"] for row in rows]).reshape(num, k, 3),
        size_wh=np.array([sizes.get(row["file_name"], unknown) for row in rows], np.float64).reshape(num, 2),
    )


def pictures(
    root: Path, found: Read, check: Literal["auto", "ends", "decode"], on_bad_image: Literal["stop", "skip"]
) -> list[Finding]:
    """Images that are not there, that do not decode, or that have another size than the JSON says."""
    outside = [name for name in found.pictures if not shards.inside(root / name)]
    there = {folder: photo.listing(folder) for folder in {(root / name).parent for name in outside}}
    missing = [name for name in outside if (root / name).name not in there[(root / name).parent]]
    names = sorted(set(found.pictures) - set(missing))
    findings = []
    if check == "auto" and len(names) > found.most_looked_at:
        text = f"{coco.DECODE_AT_MOST} of {len(names)} images were looked at; all by --data.check_images ends"
        findings.append(Finding(level="note", check="unreadable", text=text))
        names = [names[place] for place in np.linspace(0, len(names) - 1, coco.DECODE_AT_MOST).astype(int)]
    looks = photo.looks(root, names, coco.decodes(check, len(names)))
    corrupt = [name for name, hw in looks.items() if hw is None]
    if missing:
        findings.append(_error("missing", f"{len(missing)} of {len(found.pictures)} images are not there", *missing))
    if corrupt:
        level: Level = "error" if on_bad_image == "stop" else "warning"
        text = f"{len(corrupt)} images do not decode; mend them, or --data.on_bad_image skip"
        findings.append(Finding(level=level, check="unreadable", text=text, culprits=tuple(corrupt)))
    return [*findings, *_sizes(found.sizes_wh, looks)]


def _sizes(told: Mapping[str, tuple[float, float]], looks: Mapping[str, tuple[int, int] | None]) -> Iterator[Finding]:
    turned, other = [], []
    for name, hw in looks.items():
        if not hw or not any(hw) or name not in told:
            continue
        (width, height), (seen_h, seen_w) = told[name], (EIGHTH * side for side in hw)
        if abs(seen_w - width) >= EIGHTH or abs(seen_h - height) >= EIGHTH:
            is_turned = abs(seen_w - height) < EIGHTH and abs(seen_h - width) < EIGHTH
            shown = f"{name}: {width:g} x {height:g} in the JSON, about {seen_w} x {seen_h} as read"
            (turned if is_turned else other).append(shown)
    if turned:
        text = f"{len(turned)} images lie on their side when read: by their EXIF data (were they labeled so?), or "
        text += "width and height are exchanged in the JSON"
        yield _error("size", text, *turned)
    if other:
        yield _error("size", f"{len(other)} images have another size than the JSON says", *other)


def _error(check: str, text: str, *culprits: str) -> Finding:
    return Finding(level="error", check=check, text=text, culprits=culprits)
