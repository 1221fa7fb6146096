"""An annotation file and its pictures, read on past the first fault: what the run's own reader would refuse, all of it.

Each person is read by the reader itself (`coco_json.row_of`), so nothing passes here that a run would not take.
"""

from collections import defaultdict
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
from sapiens_accel.sources.schema import FARTHEST, PLAIN, Reading

EIGHTH = 8  # `photo.looks` tells sizes to this many px


@dataclass(frozen=True, kw_only=True)
class Read:
    """What could be read of an annotation file.

    Attributes:
        labels: the people that a run would take, those without labelled keypoints included.
        pictures: the names of their pictures, below the root, with their ids.
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
    """Read what can be read.

    Args:
        annotations, images: the JSON (or manifest of shards) and the folder of its pictures, relative to `root`.
        reading: how its annotations become the run's keypoints; None: that is not known, and another number of them is
            no fault of each annotation.
    """
    path = root / annotations
    nothing = _labels([], {}, num_keypoints)
    try:
        if not path.is_file():
            raise UserError(f"{path}: no such annotation file; see --data.root and --data.*_annotations")
        tree = coco_json.parsed(path)
    except (UserError, OSError) as error:
        return Read(labels=nothing, findings=[_error("json", str(error), str(path))])
    for key in ("images", "annotations"):
        if not isinstance(tree, dict) or not isinstance(tree.get(key), list):
            text = f"{path}: no list {key!r} in it; expected a COCO annotation file"
            return Read(labels=nothing, findings=[_error("json", text, str(path))])
    names, sizes, findings = _images(tree["images"], images)
    tree["categories"], of_kinds = _categories(tree.get("categories"))
    rows, of_people = _people(tree, names, images, num_keypoints, reading)
    pictures = {row["file_name"]: row["image_id"] for row in rows}
    return Read(
        labels=_labels(rows, sizes, num_keypoints),
        pictures=pictures,
        sizes_wh=sizes,
        most_looked_at=coco.most_looked_at(path),
        findings=[*findings, *of_kinds, *of_people, *_unknown_sizes(pictures, sizes)],
    )


def of_people(people: coco.People) -> Read:
    """The pictures of people without labels."""
    pictures = dict(zip(people.rows["file_name"][:], people.rows["image_id"][:], strict=True))
    labels = _labels([], {}, people.rows.features["keypoints"].shape[0])
    return Read(labels=labels, pictures=pictures, most_looked_at=coco.most_looked_at(people.annotations))


def _images(listed: Sequence[Any], folder: str) -> tuple[dict[Any, str], dict[str, tuple[float, float]], list[Finding]]:
    """Names by id, sizes by name below the root, and faults of the JSON's `images`."""
    names: dict[Any, str] = {}
    sizes: dict[str, tuple[float, float]] = {}
    bad, twice = [], []
    for index, image in enumerate(listed):
        if not isinstance(image, dict) or "id" not in image or "file_name" not in image:
            bad.append(f"images, entry {index}: expected id and file_name, found {coco_json.shown(image)}")
        elif reason := coco_json.fault_of(image):
            bad.append(f"images, entry {index}: {reason}")
        elif names.setdefault(image["id"], image["file_name"]) != image["file_name"]:
            twice.append(f"id {coco_json.shown(image['id'])} ({names[image['id']]}, {image['file_name']})")
        else:
            size = tuple(s for key in ("width", "height") if isinstance(s := image.get(key), int | float))
            if len(size) == 2 and min(size) > 0 and max(size) < FARTHEST:
                sizes[f"{folder}/{image['file_name']}"] = size
    findings = []
    if bad:
        findings.append(_error("images", f"{len(bad)} of {len(listed)} pictures in the JSON cannot be taken", *bad))
    if twice:
        findings.append(_error("ids", f"{len(twice)} picture ids that are of two pictures", *twice))
    return names, sizes, findings


def _unknown_sizes(pictures: Mapping[str, int], sizes: Mapping[str, tuple[float, float]]) -> Iterator[Finding]:
    unknown = tuple(name for name in pictures if name not in sizes)
    if unknown:
        text = f"{len(unknown)} of {len(pictures)} pictures have no width and height in the JSON: whether boxes and "
        text += "joints lie outside of them was not looked at"
        yield Finding(level="note", check="size", text=text, culprits=unknown)


def _categories(kinds: Any) -> tuple[list[dict[str, Any]], list[Finding]]:
    if isinstance(kinds or [], list) and all(isinstance(kind, dict) for kind in kinds or ()):
        return kinds or [], []
    text = f"categories: expected a list of objects with 'id' and 'name', found {coco_json.shown(kinds)}"
    return [], [_error("categories", text)]


def _people(
    tree: dict[str, Any], names: dict[Any, str], folder: str, num_keypoints: int, reading: Reading | None
) -> tuple[list[dict[str, Any]], list[Finding]]:
    """The rows that a run would take, and findings about the others."""
    rows = []
    others: dict[str, list[str]] = defaultdict(list)
    known = reading or PLAIN
    kinds = annotation_rules.category_ids(tree, known)
    for index, person in enumerate(tree["annotations"]):
        who = (
            f"annotation {coco_json.shown(person.get('id'))}"
            if isinstance(person, dict)
            else f"entry {index}, {coco_json.shown(person)}"
        )
        try:
            if kinds and person.get("category_id", kinds[0]) not in kinds:
                others["kind"].append(who)
                continue
            without = reading is None and _is_other_number(person, num_keypoints)
            taken = person | {"keypoints": []} if without else person
            row = annotation_rules.row_of(taken, names, folder, num_keypoints, known)
        except coco_json.BROKEN as error:
            others["bad"].append(f"{who}: {coco_json.reason(error)}")
            continue
        if row:
            rows.append(row)
            told = person.get("num_keypoints")
            # Of five lists of a whole body the count is of the first.
            if told is not None and told != (labelled := sum(v > 0 for v in (person.get("keypoints") or ())[2::3])):
                others["count"].append(f"{who}: num_keypoints {coco_json.shown(told)}, labelled {labelled}")
        else:
            others["crowd" if person.get("iscrowd") else "empty"].append(who)
    return rows, list(_about(others, len(tree["annotations"])))


def _is_other_number(person: dict[str, Any], num_keypoints: int) -> bool:
    numbers = person.get("keypoints")
    return isinstance(numbers, list) and len(numbers) % 3 == 0 and len(numbers) != 3 * num_keypoints


def _about(others: Mapping[str, Sequence[str]], num: int) -> Iterator[Finding]:
    told: tuple[tuple[str, Level, str, str], ...] = (
        ("bad", "error", "annotations", f"of {num} annotations cannot be read"),
        ("empty", "warning", "boxes", "annotations are left out: their boxes have no width or no height"),
        (
            "count",
            "warning",
            "num_keypoints",
            "annotations whose num_keypoints is not the number of their labelled joints",
        ),
        ("crowd", "note", "crowd", "annotations are crowds: left out"),
        ("kind", "note", "kind", "annotations are of other categories: left out"),
    )
    for key, level, check, text in told:
        if culprits := others.get(key):
            yield Finding(level=level, check=check, text=f"{len(culprits)} {text}", culprits=tuple(culprits))


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
    """Pictures that are not there, that do not decode, or that have another size than the JSON says."""
    outside = [name for name in found.pictures if not shards.inside(root / name)]
    there = {folder: photo.listing(folder) for folder in {(root / name).parent for name in outside}}
    missing = [name for name in outside if (root / name).name not in there[(root / name).parent]]
    names = sorted(set(found.pictures) - set(missing))
    findings = []
    if check == "auto" and len(names) > found.most_looked_at:
        text = f"{coco.DECODE_AT_MOST} of {len(names)} pictures were looked at; all by --data.check_images ends"
        findings.append(Finding(level="note", check="unreadable", text=text))
        names = [names[place] for place in np.linspace(0, len(names) - 1, coco.DECODE_AT_MOST).astype(int)]
    looks = photo.looks(root, names, coco.decodes(check, len(names)))
    corrupt = [name for name, hw in looks.items() if hw is None]
    if missing:
        findings.append(_error("missing", f"{len(missing)} of {len(found.pictures)} pictures are not there", *missing))
    if corrupt:
        level: Level = "error" if on_bad_image == "stop" else "warning"
        text = f"{len(corrupt)} pictures do not decode; mend them, or --data.on_bad_image skip"
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
        text = f"{len(turned)} pictures lie on their side when read: by their EXIF data (were they labelled so?), or "
        text += "width and height are exchanged in the JSON"
        yield _error("size", text, *turned)
    if other:
        yield _error("size", f"{len(other)} pictures have another size than the JSON says", *other)


def _error(check: str, text: str, *culprits: str) -> Finding:
    return Finding(level="error", check=check, text=text, culprits=culprits)
