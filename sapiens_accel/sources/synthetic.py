"""A built-in demo dataset: cartoon people (`cartoon`) in COCO's folder form, drawn by seed, with no download."""

import json
import shutil
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from sapiens_accel.pose.skeleton import COCO17
from sapiens_accel.sources import cartoon
from sapiens_accel.sources.cartoon import Part

VERSION = 4  # of the drawing: other images for the same seed need another number
NUM_MIN_KEYPOINTS = 8  # a labeled person has at least so many keypoints inside the image
_SPLITS = {"train2017": "person_keypoints", "unlabeled2017": "person_boxes", "val2017": "person_keypoints"}
_OBJECT = 255  # owner of a pixel that a foreground object covers


def _background(rng: np.random.Generator, hw: tuple[int, int]) -> np.ndarray:
    """Cloudy colors, a floor, stripes or checks, and clutter that is shaped and colored like limbs."""
    h, w = hw
    cells = rng.integers(2, 14, 2)
    clouds = rng.uniform(-25, 25, (*cells, 3)) + rng.uniform(50, 205, 3)
    image = np.asarray(cv2.resize(clouds.astype(np.float32), (w, h), interpolation=cv2.INTER_LINEAR))
    image[int(rng.uniform(0.45, 1.2) * h) :] += rng.uniform(-30, 30, 3).astype(np.float32)
    periods = rng.uniform(6, 40, 2)
    across, down = (np.sign(np.sin(np.arange(n) * 2 * np.pi / p)) for n, p in zip((w, h), periods, strict=True))
    rows, columns = [(down, across), (np.ones(h), across), (down, np.ones(w)), (down * 0, across)][rng.integers(4)]
    pattern = (np.outer(rows, columns) * rng.uniform(2, 8)).astype(np.float32)
    out = cv2.add(image, cv2.merge([pattern] * 3), dtype=cv2.CV_8U)
    for _ in range(rng.integers(0, 4)):
        bar, color = _bar(rng, hw, 0.03, 0.3), _bar_color(rng)
        bars = [bar, _bar(rng, hw, 0.05, 0.25, start=bar[1])] if rng.random() < 0.5 else [bar]
        cartoon.shade(out, bars, [color] * len(bars))
    return out


def _bar(
    rng: np.random.Generator, hw: tuple[int, int], low: float, high: float, start: np.ndarray | None = None
) -> np.ndarray:
    """A random tapered bar, `low`..`high` image sides long, as two circles in px; `start` may give the first."""
    side, angle = min(hw), rng.uniform(0, 2 * np.pi)
    length, thick = side * rng.uniform(low, high), side * rng.uniform(0.01, 0.045)
    first = np.array([*rng.uniform(0, 1, 2) * hw[::-1], thick]) if start is None else start
    step_xy = length * np.array([np.cos(angle), np.sin(angle)])
    return np.array([first, [*(first[:2] + step_xy), first[2] * rng.uniform(0.5, 1.1)]])


def _bar_color(rng: np.random.Generator) -> np.ndarray:
    return cartoon.SKINS[rng.integers(len(cartoon.SKINS))] if rng.random() < 0.3 else rng.uniform(20, 235, 3)


def _position_person(
    rng: np.random.Generator, parts: Sequence[Part], keypoints: np.ndarray, height: float, hw: tuple[int, int]
) -> tuple[float, np.ndarray, np.ndarray]:
    """A height (px), a pelvis position (px) and the box (x1, y1, x2, y2 px); one in eight is cut by the border."""
    circles = np.vstack([p.circles for p in parts])
    low = (circles[:, :2] - circles[:, 2:]).min(0)
    high = (circles[:, :2] + circles[:, 2:]).max(0)
    size_xy = np.array(hw[::-1], float)
    height = min(height, float(((size_xy - 5) / (high - low)).min()))
    first, last = 1.5 - low * height, size_xy - 2.5 - high * height
    origin = rng.uniform(first, last)
    if rng.random() < 0.12:
        sign_xy = np.array([(-1, 0), (1, 0), (0, 1)][rng.integers(3)])  # beyond the left, right or lower border
        border = np.where(sign_xy < 0, first, np.where(sign_xy > 0, last, origin))
        moved = border + sign_xy * rng.uniform(0.1, 0.4) * height * (high - low)
        xy = keypoints * height + moved
        if ((xy > 0.5) & (xy < size_xy - 1.5)).all(1).sum() >= NUM_MIN_KEYPOINTS:
            origin = moved
    return height, origin, np.concatenate([low, high]) * height + np.tile(origin, 2)


def _covers(boxes: Sequence[np.ndarray], box: np.ndarray) -> bool:
    """Whether `box` overlaps one of `boxes` by more than 30 % of the smaller one (boxes: x1, y1, x2, y2)."""
    for other in boxes:
        inner = np.minimum(box[2:], other[2:]) - np.maximum(box[:2], other[:2])
        smaller = min(np.prod(b[2:] - b[:2]) for b in (box, other))
        if inner.min() > 0 and inner.prod() > 0.3 * smaller:
            return True
    return False


def scene(rng: np.random.Generator, hw: tuple[int, int], num_max: int) -> tuple[np.ndarray, list[dict]]:
    """One image (H, W, 3 uint8 BGR) of 1..`num_max` people, at most 3, and their COCO annotations without ids."""
    num = min(num_max, int(rng.choice([1, 2, 3], p=[0.6, 0.28, 0.12])))
    reach = {1: (0.42, 0.92), 2: (0.33, 0.8), 3: (0.31, 0.62)}[num]
    placed: list[tuple[float, np.ndarray, np.ndarray, list[Part]]] = []
    boxes: list[np.ndarray] = []
    for _ in range(4 * num):  # where no place is free, the image holds fewer people
        if len(placed) == num:
            break
        keypoints, parts = cartoon.figure(cartoon.random_pose(rng), cartoon.random_look(rng))
        height, origin, box = _position_person(rng, parts, keypoints, min(hw) * rng.uniform(*reach), hw)
        if not _covers(boxes, box):
            placed.append((height, origin, keypoints, parts))
            boxes.append(box)
    placed.sort(key=lambda person: person[0])  # the taller, the nearer
    image = _background(rng, hw)
    tops = [cartoon.draw(image, parts, height, origin) for height, origin, _, parts in placed]
    owner = np.zeros(hw, np.uint8)
    for i, top in enumerate(tops, start=1):
        owner[top > 0] = i
    if rng.random() < 0.12:
        outline = cartoon.shade(image, [_bar(rng, hw, 0.2, 0.7)], [_bar_color(rng)])[0]
        cv2.fillConvexPoly(owner, outline, _OBJECT, cv2.LINE_8, cartoon.SHIFT)
    people = [
        _annotation(cartoon.label(keypoints * height + origin, top, parts, owner == i), top)
        for i, (top, (height, origin, keypoints, parts)) in enumerate(zip(tops, placed, strict=True), start=1)
    ]
    return _finish(rng, image), people


def _annotation(keypoints: np.ndarray, top: np.ndarray) -> dict:
    mask = (top > 0).astype(np.uint8)
    return {
        "category_id": 1,
        "iscrowd": 0,
        "area": float(cv2.countNonZero(mask)),
        "bbox": [float(v) for v in cv2.boundingRect(mask)],
        "num_keypoints": int((keypoints[:, 2] > 0).sum()),
        "keypoints": [int(v) if j % 3 == 2 else round(float(v), 1) for j, v in enumerate(keypoints.ravel())],
    }


def _finish(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Uneven light and sensor noise."""
    h, w = image.shape[:2]
    light = cv2.resize(rng.uniform(0.75, 1.2, (3, 3)).astype(np.float32), (w, h), interpolation=cv2.INTER_LINEAR)
    noise = rng.standard_normal((h, w), np.float32) * np.float32(rng.uniform(1, 7))
    lit = cv2.multiply(image, cv2.merge([light] * 3), dtype=cv2.CV_32F)
    return cv2.add(lit, cv2.merge([noise] * 3), dtype=cv2.CV_8U)


def _write_split(root: Path, split: str, num: int, hw: tuple[int, int], seed: int) -> None:
    """Draw images until they hold `num` people, then write the split's JSON."""
    index = list(_SPLITS).index(split)
    (root / split).mkdir(parents=True)
    images, annotations = [], []
    with tqdm(total=num, desc=f"drawing {split}", unit="person", disable=not sys.stderr.isatty()) as bar:
        while len(annotations) < num:
            # Ids from disjoint ranges: no id is in two splits.
            image_id = index * 10_000_000 + len(images) + 1
            image, people = scene(np.random.default_rng([seed, index, len(images)]), hw, num - len(annotations))
            name = f"{image_id:012d}.jpg"
            (root / split / name).write_bytes(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 92])[1].tobytes())
            images.append({"id": image_id, "file_name": name, "width": hw[1], "height": hw[0]})
            for person in people:
                ids = {"id": index * 10_000_000 + len(annotations) + 1, "image_id": image_id}
                annotations.append(ids | person)
            bar.update(len(people))
    if _SPLITS[split] == "person_boxes":
        annotations = [{k: v for k, v in a.items() if "keypoints" not in k} for a in annotations]
    info = {"description": "sapiens_accel synthetic people", "split": split, "num_people": num, "seed": seed}
    edges = [[a + 1, b + 1] for a, b in COCO17.edges]
    person = {"id": 1, "name": "person", "supercategory": "person"}
    if _SPLITS[split] != "person_boxes":
        person |= {"keypoints": list(COCO17.names), "skeleton": edges}
    data = {"info": info, "images": images, "annotations": annotations, "categories": [person]}
    (root / "annotations").mkdir(exist_ok=True)
    _json_path(root, split).write_text(json.dumps(data))


def _json_path(root: Path, split: str) -> Path:
    return root / "annotations" / f"{_SPLITS[split]}_{split}.json"


def _is_complete(root: Path) -> bool:
    return all(_json_path(root, split).is_file() for split in _SPLITS)


def write(
    root: Path,
    *,
    num_train: int,
    num_unlabelled: int,
    num_val: int,
    image_hw: tuple[int, int] = (240, 240),
    seed: int = 0,
) -> Path:
    """Draw the dataset under `root` in COCO's own folder form and return `root`.

    The counts are people, 1 to 3 in an image. Coordinates are image px, x right, y down, pixel centers at integers.
    A `root` that is already complete is returned untouched, whatever counts and seed it was drawn with. The folder
    appears whole or not at all; of two processes that draw it at once, the later one uses the earlier one's.

    Raises:
        FileExistsError: `root` holds something else than a complete dataset.
    """
    root = Path(root)
    # Looked at before completeness: another process may put a complete folder there at any moment.
    occupied = root.exists() and not (root.is_dir() and not any(root.iterdir()))
    if _is_complete(root):
        return root
    if occupied:
        raise FileExistsError(f"{root} exists and is not a complete data set; remove it or name another folder")
    part = root.with_name(f".{root.name}.{uuid.uuid4().hex}.part")
    try:
        for split, num in zip(_SPLITS, (num_train, num_unlabelled, num_val), strict=True):
            _write_split(part, split, num, image_hw, seed)
        part.rename(root)
    except OSError:
        if not _is_complete(root):  # otherwise another process was faster
            raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return root
