"""Person boxes in a folder of images or a video, by a detector of transformers, as a JSON of detections.

python -m sapiens_accel.boxes IMAGES|VIDEO --out boxes.json [--detector NAME|FOLDER] [--threshold 0.05]

Stage ssl reads the JSON as --data.unlabelled_annotations, eval.py as --boxes. Killed, the same command goes on: whole
batches are kept in OUT.partial.
"""

import hashlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from sapiens_accel.config.commands import detect_parser
from sapiens_accel.data import annotation_rules
from sapiens_accel.data import detections as boxes_json
from sapiens_accel.data.detections import PersonBoxes
from sapiens_accel.errors import UserError
from sapiens_accel.inference import media
from sapiens_accel.inference.detector import Detector
from sapiens_accel.inference.media import ImageFiles
from sapiens_accel.runtime.device import choose_device
from sapiens_accel.sources.images import describe_fault
from sapiens_accel.sources.schema import Reading

LEAST = {"batch_size": 1, "num_workers": 0, "every": 1, "threshold": 0, "max_iou": 0}


class Partial:
    """Batches that are done, a line each, beside the JSON to come; a line that was cut short does not count.

    Raises:
        UserError: those that are there are of other images or settings.
    """

    def __init__(self, out: Path, about: dict[str, Any]) -> None:
        self.file = out.with_name(f"{out.name}.partial")
        self.done: list[list[PersonBoxes | None]] = []
        lines = self.file.read_bytes().splitlines(keepends=True) if self.file.is_file() else []
        whole = [line for line in lines if line.endswith(b"\n")]
        was, *batches = self._read(whole) or [about]
        if was != about:
            other = ", ".join(
                f"{key} {was.get(key)} is now {about[key]}" for key in about if was.get(key) != about[key]
            )
            raise UserError(f"{self.file}: begun with other settings: {other}; delete it to start again")
        self.done = [[_people_from_json(people) for people in batch] for batch in batches]
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self._stream = self.file.open("r+b" if whole else "wb")
        self._stream.seek(sum(map(len, whole)))
        self._stream.truncate()
        if not whole:
            self._write(about)

    def _read(self, lines: Sequence[bytes]) -> list[Any]:
        """The settings and the batches.

        Raises:
            UserError: they are something else.
        """
        try:
            settings, *batches = things = [json.loads(line) for line in lines] or [{}]
            for batch in batches:
                for boxes, scores in filter(None, batch):
                    values = np.array([*scores, *(side for box in boxes for side in box)], dtype=np.float64)
                    if {len(box) for box in boxes} - {4} or len(boxes) != len(scores) or not np.isfinite(values).all():
                        raise ValueError("expected four numbers and a score of each person")
            settings.get("detector")
        except (ValueError, TypeError, AttributeError, RecursionError, OverflowError) as error:
            raise UserError(
                f"{self.file}: not what a detector that was stopped left: {error}; delete it to start again"
            ) from None
        return things[: len(lines)]

    def add(self, batch: list[PersonBoxes | None]) -> None:
        """Note a batch; it counts once it is on the disk."""
        self._write(
            [None if people is None else [people.boxes_xywh.tolist(), people.scores.tolist()] for people in batch]
        )
        self.done.append(batch)

    def _write(self, thing: Any) -> None:
        self._stream.write(json.dumps(thing).encode() + b"\n")
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def close(self) -> None:
        self._stream.close()


def _people_from_json(people: Any) -> PersonBoxes | None:
    return None if people is None else PersonBoxes(np.array(people[0]).reshape(-1, 4), np.array(people[1]).reshape(-1))


# ---- python -m sapiens_accel.boxes


@dataclass(frozen=True, kw_only=True)
class DetectionJob:
    """Images to search, and the file to write.

    Attributes:
        ids: of the images.
        category: the category_id of a person.
        batch_size: images of one forward.
        num_workers: reading processes.
        classes: of the detector, which count as people.
    """

    images: ImageFiles
    ids: Sequence[Any]
    category: Any
    out: Path
    batch_size: int
    num_workers: int
    classes: str = "person"


def detect(detector: Detector, job: DetectionJob) -> tuple[int, list[str]]:
    """Write the detections of all images; how many there are, and the images that cannot be used.

    What a killed run had done is used, batch by batch, so that the file is the same byte for byte.

    Raises:
        UserError: as `Partial`; no image can be used.
    """
    images, out = job.images, job.out
    listing = "\n".join(f"{name} {(images.root / name).stat().st_size}" for name in images.names)
    settings = {"detector": detector.name, "threshold": detector.threshold, "max_iou": detector.max_iou}
    settings |= {} if job.classes == "person" else {"class": job.classes}
    about = {**settings, "batch_size": job.batch_size, "pictures": hashlib.sha256(listing.encode()).hexdigest()[:16]}
    kept = Partial(out, about)
    done = sum(map(len, kept.done))
    if done:
        print(f"{kept.file}: resumes after {done} of {len(images.names)} images", flush=True)
    progress = tqdm(total=len(images.names), initial=done, desc="boxes", unit="image", disable=None, leave=False)
    with progress:
        for batch in detector.scan(images.root, images.names[done:], job.batch_size, job.num_workers):
            kept.add(batch)
            progress.update(len(batch))
    kept.close()
    detected = [people for batch in kept.done for people in batch]
    bad = [name for name, people in zip(images.names, detected, strict=True) if people is None]
    if len(bad) == len(detected):
        fault = describe_fault(images.root / bad[0])
        raise UserError(f"{images.root}: none of its {len(bad)} images can be used ({bad[0]} {fault}, ...)")
    written = boxes_json.to_coco(images.names, job.ids, job.category, detected)
    temporary = out.with_name(f"{out.name}.tmp")
    temporary.write_text(json.dumps(written))
    temporary.replace(out)
    kept.file.unlink()
    return len(written), bad


def main(words: Sequence[str]) -> None:
    asked = detect_parser().parse_args(words)
    for knob, least in LEAST.items():
        value = getattr(asked, knob)
        if value is not None and (value < least or (isinstance(value, float) and value > 1)):
            raise UserError(
                f"--{knob} {value:g}: expected {'0 to 1' if isinstance(value, float) else f'{least} or more'}"
            )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("several processes: expected one, `python -m sapiens_accel.boxes` without a launcher")
    images = _find_images(asked)
    ids = (
        boxes_json.read_ids(asked.annotations, images.names) if asked.annotations else boxes_json.make_ids(images.names)
    )
    category = 1
    if asked.annotations:
        category = annotation_rules.person_category(asked.annotations, Reading(categories=(asked.detector_class,)))
    classes = asked.detector_class
    detector = Detector(
        asked.detector, choose_device(asked.device, "--device"), asked.threshold, asked.max_iou, classes=classes
    )
    job = DetectionJob(
        images=images, ids=ids, category=category, out=asked.out,
        batch_size=asked.batch_size, num_workers=asked.num_workers, classes=classes,
    )  # fmt: skip
    try:
        num, bad = detect(detector, job)
    except KeyboardInterrupt:
        print(f"stopped; {asked.out}.partial keeps what is done, the same command resumes there", file=sys.stderr)
        sys.exit(130)
    notes = [images.note, *(f"skipped: {images.root / name} {describe_fault(images.root / name)}" for name in bad)]
    searched = f"{len(images.names) - len(bad)} images of {images.root}" + f", {len(bad)} skipped" * bool(bad)
    what = "people" if classes == "person" else f"boxes of {classes}"
    print(*filter(None, notes), f"{asked.out}: {num} {what} in {searched}", sep="\n")
    folder, file = images.root.resolve(), asked.out.resolve()
    print(f"stage ssl: --data.unlabelled_images {folder} --data.unlabelled_annotations {file}")
    print(f"eval.py: --boxes {file}")


def _find_images(asked: Any) -> ImageFiles:
    if not media.is_video(asked.images):
        if asked.frames or asked.every:
            raise UserError(f"{asked.images}: --every and --frames are of a video; this is none")
        return media.find_images(asked.images)
    folder = asked.frames or asked.out.parent / asked.images.stem
    return media.write_frames(asked.images, folder, asked.every or 1)
