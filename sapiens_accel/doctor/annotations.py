"""An annotation file and its images, read on past the first fault: what the run's own reader would refuse, all of it.

The rules are the run's own (`annotation_rules`), so nothing passes here that a run would not take.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sapiens_accel.data.annotation_rules import CATEGORY, CROWD, NO_SIZE, UNKNOWN_SIZE, PeopleReader
from sapiens_accel.data.people import DECODE_AT_MOST, People, annotation_file, decodes, find_other_sizes
from sapiens_accel.doctor.labels import Finding, Labels, Level
from sapiens_accel.errors import UserError
from sapiens_accel.pose.person_boxes import ANNOTATED
from sapiens_accel.sources import images
from sapiens_accel.sources.discover import open_source
from sapiens_accel.sources.schema import FARTHEST, PLAIN, Fault, Reading


@dataclass(frozen=True, kw_only=True)
class ReadAnnotations:
    """What could be read of an annotation file.

    Attributes:
        labels: the people that a run would take, those without labeled keypoints included.
        image_ids: the names of their images, below the root, with their ids.
        sizes_wh: of those of them whose size the file gives.
        max_looked_at: as `Source.max_looked_at`.
        findings: what could not be read, and what is left out.
    """

    labels: Labels
    image_ids: Mapping[str, int] = field(default_factory=dict)
    sizes_wh: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    max_looked_at: int = 0
    findings: Sequence[Finding] = ()


def read_annotations(
    root: Path, annotations: str, folder: str, num_keypoints: int, reading: Reading | None = PLAIN
) -> ReadAnnotations:
    """Read what can be read, by the rules of a run.

    Args:
        annotations, folder: the file of annotations and the folder of its images, relative to `root`.
        reading: how its annotations become the run's keypoints; None: that is not known, and another number of them is
            no fault of each annotation.
    """
    faults: list[Fault] = []
    try:
        source = open_source(annotation_file(root, annotations))
        tree = source.read(faults)
    except (UserError, OSError) as error:
        finding = _error("json", str(error), str(root / annotations))
        return ReadAnnotations(labels=_labels([], {}, num_keypoints), findings=[finding])
    reader = PeopleReader(source=source, prefix=folder, num_keypoints=num_keypoints, reading=reading)
    try:
        reader.refuse_without_boxes(tree)
    except UserError as error:
        labels = _labels(list(reader.rows(faults, tree)), {}, num_keypoints)
        # That one line says it of all; any other fault is named beside it.
        others = [fault for fault in faults if fault.check != "made_boxes" and not fault.text.endswith(UNKNOWN_SIZE)]
        findings = [
            _error("boxes", str(error)),
            *_findings(others, source.file, len(tree["images"]), len(tree["annotations"])),
        ]
        return ReadAnnotations(labels=labels, findings=findings)
    num_images = len(tree["images"]) + sum(fault.check in ("images", "ids") for fault in faults)
    left_out: list[Fault] = []
    rows = list(reader.rows(faults, tree, left_out))
    faults += [Fault("kind", fault.text) if fault.check.startswith(CATEGORY) else fault for fault in left_out]
    sizes = _sizes_in_file(tree["images"], folder)
    image_ids = {row["file_name"]: row["image_id"] for row in rows}
    return ReadAnnotations(
        labels=_labels(rows, sizes, num_keypoints),
        image_ids=image_ids,
        sizes_wh=sizes,
        max_looked_at=source.max_looked_at,
        findings=[
            *_findings(faults, source.file, num_images, len(tree["annotations"])),
            *_note_unknown_sizes(image_ids, sizes),
        ],
    )


def _sizes_in_file(listed: Sequence[dict[str, Any]], folder: str) -> dict[str, tuple[float, float]]:
    """Width and height by name below the root, of those of the file's images that have them."""
    sizes: dict[str, tuple[float, float]] = {}
    for image in listed:
        size = tuple(s for key in ("width", "height") if isinstance(s := image.get(key), int | float))
        if len(size) == 2 and min(size) > 0 and max(size) < FARTHEST:
            sizes[f"{folder}/{image['file_name']}"] = size
    return sizes


def _findings(faults: Sequence[Fault], file: Path, num_images: int, num_annotations: int) -> Iterator[Finding]:
    """The faults by their kind, each with all whom it is about."""
    texts: dict[str, tuple[Level, str]] = {
        "images": ("error", f"of {num_images} images in {file} cannot be taken"),
        "ids": ("error", f"image ids that are of two images, in {file}"),
        "annotations": ("error", f"of {num_annotations} annotations in {file} cannot be read"),
        NO_SIZE: ("warning", "annotations are left out: no box with a width and a height, no labeled keypoint"),
        "made_boxes": (
            "warning",
            "annotations have no box with a width and a height: made from their keypoints (--data.box_margin)",
        ),
        "num_keypoints": ("warning", "annotations whose num_keypoints is not the number of their labeled keypoints"),
        CROWD: ("note", "annotations are crowds: left out"),
        "kind": ("note", "annotations are of other categories: left out"),
    }
    yield from (_error("categories", fault.text) for fault in faults if fault.check == "categories")
    for check, (level, text) in texts.items():
        if culprits := tuple(fault.text for fault in faults if fault.check == check):
            name = "boxes" if check == NO_SIZE else check
            yield Finding(level=level, check=name, text=f"{len(culprits)} {text}", culprits=culprits)


def read_unlabeled(people: People) -> ReadAnnotations:
    """The images of people without labels."""
    image_ids = dict(zip(people.rows["file_name"][:], people.rows["image_id"][:], strict=True))
    labels = _labels([], {}, people.rows.features["keypoints"].shape[0])
    return ReadAnnotations(labels=labels, image_ids=image_ids, max_looked_at=people.source.max_looked_at)


def _note_unknown_sizes(image_ids: Mapping[str, int], sizes: Mapping[str, tuple[float, float]]) -> Iterator[Finding]:
    unknown = tuple(name for name in image_ids if name not in sizes)
    if unknown:
        text = f"{len(unknown)} of {len(image_ids)} images have no width and height in the JSON: whether boxes and "
        text += "keypoints lie outside of them was not looked at"
        yield Finding(level="note", check="size", text=text, culprits=unknown)


def _labels(rows: Sequence[dict[str, Any]], sizes: Mapping[str, tuple[float, float]], k: int) -> Labels:
    num = len(rows)
    unknown = (np.nan, np.nan)
    return Labels(
        ann_ids=np.array([row["ann_id"] for row in rows], np.int64),
        given_ids=np.array([row["given_id"] for row in rows], object),
        file_names=np.array([row["file_name"] for row in rows], object),
        boxes_xywh=np.array([row["box_xywh"] for row in rows]).reshape(num, 4),
        areas=np.array([row["area"] for row in rows], np.float64),
        keypoints=np.array([row["keypoints"] for row in rows]).reshape(num, k, 3),
        size_wh=np.array([sizes.get(row["file_name"], unknown) for row in rows], np.float64).reshape(num, 2),
        box_made=np.array([row["box_origin"] != ANNOTATED for row in rows], bool),
    )


def check_images(
    root: Path, read: ReadAnnotations, check: Literal["auto", "ends", "decode"], on_bad_image: Literal["stop", "skip"]
) -> list[Finding]:
    """Images that are not there, that cannot be used, or that have another size than the file says."""
    missing = images.find_missing(root, list(read.image_ids))
    names = sorted(set(read.image_ids) - set(missing))
    findings = []
    if check == "auto" and len(names) > read.max_looked_at:
        text = f"{DECODE_AT_MOST} of {len(names)} images were looked at; all by --data.check_images ends"
        findings.append(Finding(level="note", check="unreadable", text=text))
        names = [names[index] for index in np.linspace(0, len(names) - 1, DECODE_AT_MOST).astype(int)]
    results = images.check_images(root, names, decodes(check, len(names)))
    reasons = {name: result for name, result in results.items() if isinstance(result, str)}
    corrupt = tuple(name if reason == images.UNDECODABLE else f"{name} {reason}" for name, reason in reasons.items())
    if missing:
        hint = images.suggest_image(root, missing[0])
        text = f"{len(missing)} of {len(read.image_ids)} images are not there{hint}"
        findings.append(_error("missing", text, *missing))
    if corrupt:
        level: Level = "error" if on_bad_image == "stop" else "warning"
        first = next(iter(reasons.values()))
        what = "mend them, or --data.on_bad_image skip"
        if level == "warning":
            what = "their people are left out (--data.on_bad_image skip)"
        text = f"{len(corrupt)} images cannot be used: the first {first}; {what}"
        findings.append(Finding(level=level, check="unreadable", text=text, culprits=corrupt))
    if line := images.describe_bits(root, [name for name in names if name not in reasons]):
        findings.append(Finding(level="warning", check="bits", text=line.removeprefix("warning: ")))
    wrong = find_other_sizes(read.sizes_wh, results)
    return [*findings, *(_error("size", text, *culprits) for text, culprits in wrong.items())]


def _error(check: str, text: str, *culprits: str) -> Finding:
    return Finding(level="error", check=check, text=text, culprits=culprits)
