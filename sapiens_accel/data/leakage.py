"""Whether a run learns from images that it is validated on."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path

import cv2
import numpy as np

from sapiens_accel.data.people import People, spread_rows
from sapiens_accel.errors import UserError
from sapiens_accel.sources import images

COMPARE_ALL = 1_000_000  # people; of more, COMPARED are
COMPARED = 20_000
HEAD_BYTES = 1 << 14
LOOKED_AT = 200
ALIKE_GRAY_LEVELS = 6.0


def refuse_leaks(val: People, train: People, unlabeled: People) -> tuple[str, ...]:
    """Refuse a validation image among those that a run learns from: equal bytes, or id, name and look.

    Of more than a million people some are looked at, which finds a set that holds the other, and that is told.

    Raises:
        UserError: with the first such image and the validation image that it is.
    """
    warnings = []
    for people, kind in ((unlabeled, "unlabeled"), (train, "training")):
        some = spread_rows(people.rows, COMPARED if len(people) > COMPARE_ALL else len(people))
        if len(some) < len(people):
            warnings.append(
                f"warning: {len(some)} of {len(people)} {kind} people were compared with those of validation"
            )
        found = find_leaks(_image_ids_of(replace(people, rows=some)), _image_ids_of(val))
        if found:
            ours, theirs = next(iter(found.items()))
            raise UserError(
                f"{ours}: this {kind} image is the validation image {theirs} ({len(found)} such in "
                f"all): scores would be of what was learned; take them out, or validate on others (--data.val_images)"
            )
    return tuple(warnings)


def find_leaks(ours: Mapping[Path, int], theirs: Mapping[Path, int]) -> dict[Path, Path]:
    """Images that are learned from to the validation image that each one is; both with their ids."""
    same = find_same_files(ours, theirs)
    known = {(image_id, path.name): path for path, image_id in theirs.items()}
    named = ((path, known[key]) for path, image_id in ours.items() if (key := (image_id, path.name)) in known)
    # Id and name alone say nothing: each of two sets may be numbered from 1. A set encoded anew shows it at once, so
    # a few are looked at.
    others = ((path, other) for path, other in named if path not in same)
    return same | {path: other for path, other in islice(others, LOOKED_AT) if _look_alike(path, other)}


def _look_alike(path: Path, other: Path) -> bool:
    """Whether two images are one, encoded anew: 16 x 16 gray levels hardly differ in the mean.

    Of 169 COCO photographs none differs from itself at JPEG quality 30 by 0.5, and no two differ by less than 17.
    """
    small = []
    for file in (path, other):
        image = images.read_unchecked_image(file, cv2.IMREAD_REDUCED_GRAYSCALE_8)
        if image is None:
            return False
        small.append(cv2.resize(image, (16, 16), interpolation=cv2.INTER_AREA).astype(np.float64))
    return bool(np.abs(small[0] - small[1]).mean() < ALIKE_GRAY_LEVELS)


def _image_ids_of(people: People) -> dict[Path, int]:
    names, ids = people.rows["file_name"][:], people.rows["image_id"][:]
    return {people.root / name: image_id for name, image_id in dict(zip(names, ids, strict=True)).items()}


def find_same_files(files: Iterable[Path], others: Iterable[Path]) -> dict[Path, Path]:
    """Those of `files` whose bytes are also in `others`, each with its equal.

    Sizes first, then how the files begin, then all bytes: of 120,000 photographs against 5,000 few are read.
    """
    ours, theirs = list(files), list(others)
    for look in (images.size_of, _head):
        seen = [{path: look(path) for path in paths} for paths in (ours, theirs)]
        common = set(seen[0].values()) & set(seen[1].values())
        ours, theirs = ([path for path, value in of.items() if value in common] for of in seen)
    equal = {_content(path): path for path in reversed(theirs)}
    return {path: equal[content] for path in ours if (content := _content(path)) in equal}


def _head(path: Path) -> bytes:
    return images.read_head(path, HEAD_BYTES)


def _content(path: Path) -> bytes:
    return hashlib.blake2b(images.read_bytes(path)).digest()
