"""Whether a run learns from images that it is validated on."""

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
from jaxtyping import UInt8
from numpy import ndarray as Array

from sapiens_accel.data.people import People, spread_rows
from sapiens_accel.errors import UserError
from sapiens_accel.sources import images
from sapiens_accel.sources.shards import find_record

COMPARE_ALL = 1_000_000  # people; of more, COMPARED are
COMPARED = 20_000
HEAD_BYTES = 1 << 14
LOOKED_AT = 200
ALIKE_GRAY_LEVELS = 6.0
# Of images under any name: 32 x 32 gray levels, and how they may differ in the mean. Of 173 COCO photographs none
# differs from itself at quality 30 by 0.7, or at 0.3 of its size by 2.1; no two differ by less than 17.
# Frames of a fixed camera differ where the animal is: its third largest difference is 74 and more, a copy's at most 23.
LOOK_SIDE, COPY_LEVELS, COPY_CELL = 32, 3.0, 40
# Small figures before one plain background differ by no more than that: 2.9 and 37. Images that seem to be one are read
# again at 64 x 64: the third largest difference is then 94 and more of such figures, at most 47 of 58 COCO photographs
# at 0.3 of their size and quality 30.
FINE_SIDE, FINE_CELL, NEAREST = 64, 70, 5
LOOKS_VERSION = 1


def refuse_leaks(val: People, train: People, unlabeled: People) -> tuple[str, ...]:
    """Refuse a validation image among those that a run learns from: equal bytes, or id, name and look.

    Of more than a million people some are looked at, which finds a set that holds the other, and that is reported.

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
        leaks = find_leaks(_image_ids_of(replace(people, rows=some)), _image_ids_of(val))
        if leaks:
            ours, theirs = next(iter(leaks.items()))
            raise UserError(
                f"{ours}: this {kind} image is the validation image {theirs} ({len(leaks)} such in "
                f"all): scores would be of what was learned; take them out, or validate on others (--data.val_images)"
            )
    return tuple(warnings)


def describe_leaks(train: People, val: People) -> str:
    """A line about validation images among those of training, by their bytes, whatever their names.

    20,000 files against 1,000 take 0.14 s, as the sizes of most are their own. In shards a size is read with the image:
    there only those of the same name are compared. Of more than a million people some are.
    """
    some = spread_rows(train.rows, COMPARED if len(train) > COMPARE_ALL else len(train))
    theirs = _image_ids_of(val)
    names = {path.name for path in theirs}
    ours = (path for path in _image_ids_of(replace(train, rows=some)) if not find_record(path) or path.name in names)
    leaks = find_same_files(ours, theirs)
    if not leaks:
        return ""
    return (
        f"warning: {len(leaks)} of {len(theirs)} validation images are training images "
        f"(the first {next(iter(leaks))}): scores would be of what was learned"
    )


def find_leaks(ours: Mapping[Path, int], theirs: Mapping[Path, int]) -> dict[Path, Path]:
    """Images that are learned from to the validation image that each one is; both with their ids."""
    same = find_same_files(ours, theirs)
    known = {(image_id, path.name): path for path, image_id in theirs.items()}
    named = ((path, known[key]) for path, image_id in ours.items() if (key := (image_id, path.name)) in known)
    # Id and name alone say nothing: each of two sets may be numbered from 1. A set encoded again shows it at once, so
    # a few are looked at.
    others = ((path, other) for path, other in named if path not in same)
    return same | {path: other for path, other in islice(others, LOOKED_AT) if _are_alike(path, other)}


def leave_out_copies(train: People, val: People, on_leak: Literal["stop", "skip"], cache: Path) -> tuple[People, str]:
    """A further training set without images of validation, whatever their names and encoding, and a line about them.

    CrowdPose is made of images of COCO, MPII and AI Challenger under names of its own.

    Args:
        cache: where the looks of images are kept: to read those of 200,000 takes minutes.

    Raises:
        UserError: with the first such image, unless they are to be left out.
    """
    names = train.rows["file_name"][:]
    ours, theirs = (list(_image_ids_of(people)) for people in (train, val))
    copies = find_same_files(ours, theirs) | find_copies(ours, theirs, cache)
    if not copies:
        return train, ""
    if on_leak == "stop":
        first, other = next(iter(copies.items()))
        raise UserError(
            f"{first}: this training image is the validation image {other} ({len(copies)} such of {len(ours)} of "
            f"{train.annotations}): scores would be of what was learned; --data.on_leak skip leaves their people out"
        )
    kept = np.array([train.root / name not in copies for name in names])
    if not kept.any():
        raise UserError(f"{train.annotations}: nobody is left: all of its {len(ours)} images are those of validation")
    line = (
        f"{train.annotations}: {len(copies)} of its {len(ours)} images are images of validation: "
        f"{int((~kept).sum())} of its {len(kept)} people are left out"
    )
    return replace(train, rows=train.rows.select(np.flatnonzero(kept))), line


def find_copies(ours: Sequence[Path], theirs: Sequence[Path], cache: Path) -> dict[Path, Path]:
    """Images that look like one of the others, as the same image encoded again does; each with that one."""
    thumbnails, others = (_read_thumbnails(files, cache) for files in (ours, theirs))
    # Two images differ in their mean by no more than in the mean of their pixels: few of the others are candidates.
    means, other_means = (several.mean(axis=(1, 2)) for several in (thumbnails, others))
    order = np.argsort(other_means, kind="stable")
    low, high = (np.searchsorted(other_means[order], means + margin) for margin in (-COPY_LEVELS, COPY_LEVELS))
    copies = {}
    for index, file in enumerate(ours):
        candidates = order[low[index] : high[index]]
        cells = np.abs(thumbnails[index].astype(np.int16) - others[candidates]).reshape(-1, LOOK_SIDE**2)
        away = np.where(np.partition(cells, -3, axis=1)[:, -3] <= COPY_CELL, cells.mean(axis=1), np.inf)
        nearest = np.argsort(away, kind="stable")[:NEAREST]
        alike = (theirs[int(candidates[one])] for one in nearest.tolist() if away[one] < COPY_LEVELS)
        if other := next((other for other in alike if _are_same(file, other)), None):
            copies[file] = other
    return copies


def _are_same(file: Path, other: Path) -> bool:
    """Whether two images that hardly differ in few gray levels are alike in more of them, too."""
    small = [_read_thumbnail(one, FINE_SIDE).astype(np.int16) for one in (file, other)]
    return bool(np.partition(np.abs(small[0] - small[1]).reshape(-1), -3)[-3] <= FINE_CELL)


def _read_thumbnails(files: Sequence[Path], cache: Path) -> UInt8[Array, "n side side"]:
    """Each image as few gray levels; kept in the cache by the files' names and sizes."""
    content = "\n".join(f"{file} {images.size_of(file)}" for file in files)
    kept = cache / "people" / f"{hashlib.sha256(content.encode()).hexdigest()[:32]}-looks-v{LOOKS_VERSION}.npy"
    if kept.is_file():
        return np.load(kept)
    with ThreadPoolExecutor() as threads:
        thumbnails = np.stack(list(threads.map(_read_thumbnail, files)))
    kept.parent.mkdir(parents=True, exist_ok=True)
    temporary = kept.with_name(f"{kept.stem}.{os.getpid()}.tmp.npy")
    np.save(temporary, thumbnails)
    temporary.replace(kept)
    return thumbnails


def _read_thumbnail(file: Path, side: int = LOOK_SIDE) -> UInt8[Array, "side side"]:
    image = images.read_unchecked_image(file, cv2.IMREAD_GRAYSCALE)
    if image is None:  # the check of images has reported it; noise is like no image
        seed = int.from_bytes(hashlib.blake2b(str(file).encode(), digest_size=4).digest())
        return np.random.default_rng(seed).integers(0, 256, (side, side), dtype=np.uint8)
    return cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA)


def _are_alike(path: Path, other: Path) -> bool:
    """Whether two images are one, encoded again: 16 x 16 gray levels hardly differ in the mean.

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
    for digest in (images.size_of, _head):
        seen = [{path: digest(path) for path in paths} for paths in (ours, theirs)]
        common = set(seen[0].values()) & set(seen[1].values())
        ours, theirs = ([path for path, value in of.items() if value in common] for of in seen)
    equal = {_content(path): path for path in reversed(theirs)}
    return {path: equal[content] for path in ours if (content := _content(path)) in equal}


def _head(path: Path) -> bytes:
    return images.read_head(path, HEAD_BYTES)


def _content(path: Path) -> bytes:
    return hashlib.blake2b(images.read_bytes(path)).digest()
