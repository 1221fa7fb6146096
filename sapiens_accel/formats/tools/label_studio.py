"""Label Studio's JSON export: a list of tasks with keypoints and rectangles in percent of the image."""

import math
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlparse

from sapiens_accel.errors import UserError
from sapiens_accel.formats.dataset import (
    ODD,
    ImageFinder,
    LooseBox,
    LooseInstance,
    LoosePoint,
    PoseDataset,
    PoseImage,
    gather_categories,
    group_points,
)  # fmt: skip
from sapiens_accel.sources.coco import load_json, reason

CATEGORY = "person"  # of keypoints in no rectangle
POINTS, RECTANGLES = "keypointlabels", "rectanglelabels"


def read(path: Path, images: Path | None = None) -> PoseDataset:
    """The keypoints of an export (JSON, not JSON-MIN), each with the rectangle that it belongs to.

    They belong together by parent, by relation, or by lying in it.

    Raises:
        UserError: it is no such export, a task is broken or ambiguous, an image is not there.
    """
    if path.is_dir():
        found = ", ".join(file.name for file in sorted(path.glob("*.json"))[:3]) or "none"
        raise UserError(
            f"{path}: a folder (expected the JSON that Label Studio exported, found {found}). Name the file"
        )
    tasks = load_json(path)
    if not isinstance(tasks, list) or not all(isinstance(task, dict) and "data" in task for task in tasks):
        raise UserError(f"{path}: no export of Label Studio (expected a list of tasks with 'data' and 'annotations')")
    left_out: Counter[str] = Counter()
    finder = ImageFinder([images] if images else [path.parent, path.parent / "images"])
    read_tasks: list[tuple[Path, list[LooseInstance]]] = []
    for number, task in enumerate(tasks):
        where = f"{path}: task {task.get('id', number)}"
        try:
            instances = _instances(task, where, left_out)
        except ODD as error:
            raise UserError(f"{where}: {reason(error)}") from None
        left_out["tasks without an annotation"] += not instances
        if instances and (file := finder.find(_image_of(task, where))):
            read_tasks.append((file, instances))
    finder.check(path)
    categories, gathered = gather_categories([instances for _, instances in read_tasks], CATEGORY)
    pose_images = [
        PoseImage(name=file.name, source=file, instances=many)
        for (file, _), many in zip(read_tasks, gathered, strict=True)
    ]
    return PoseDataset(categories=categories, images=pose_images, left_out=left_out)


def _image_of(task: dict[str, Any], where: str) -> str:
    """The path of a task's image: of an upload, of local files (?d=PATH), or the end of an address."""
    texts = [text for key, text in sorted(task["data"].items(), key=lambda item: item[0] != "image") if text]
    for text in texts:
        if isinstance(text, str):
            address = urlparse(text)
            return unquote(parse_qs(address.query).get("d", [address.path])[0])
    raise UserError(f"{where}: no image in its 'data' (expected a path or an address)")


def _instances(task: dict[str, Any], where: str, left_out: Counter[str]) -> list[LooseInstance]:
    """What is annotated in a task; only the first annotation that was not canceled counts."""
    every = task.get("annotations", task.get("completions")) or []
    valid = [one for one in every if not one.get("was_cancelled")]
    left_out["canceled annotations"] += len(every) - len(valid)
    left_out["further annotations of a task that has one"] += max(len(valid) - 1, 0)
    left_out["predictions of models"] += len(task.get("predictions") or []) if not valid else 0
    result = valid[0]["result"] if valid else []
    rectangles = {item["id"]: item for item in result if item.get("type") == RECTANGLES}
    owner = _owners(result, rectangles)
    points, boxes = [], []
    for item in result:
        kind = item.get("type")
        if kind not in (POINTS, RECTANGLES):
            left_out[f"regions of type {kind}"] += kind != "relation"
            continue
        if item.get("image_rotation"):
            raise UserError(f"{where}: the image was rotated by {item['image_rotation']} degrees there (expected 0)")
        value = item["value"]
        size_wh = float(item["original_width"]), float(item["original_height"])
        label = str(value[kind][0])
        if kind == RECTANGLES:
            boxes.append(LooseBox(label=label, xywh=_rectangle(value, size_wh), key=item["id"]))
            continue
        xy = value["x"] / 100 * size_wh[0], value["y"] / 100 * size_wh[1]
        points.append(LoosePoint(label=label, xy=xy, key=owner.get(item["id"])))
    # A key of a box alone is no group: points may be in it by place.
    used = {point.key for point in points}
    free = [LooseBox(label=box.label, xywh=box.xywh, key=box.key if box.key in used else None) for box in boxes]
    return group_points(points, free, where)


def _owners(result: list[dict[str, Any]], rectangles: dict[str, Any]) -> dict[str, str]:
    """The rectangle of each region that has one, by parent or relation in either direction."""
    owner = {item["id"]: item["parentID"] for item in result if item.get("parentID") in rectangles}
    for item in result:
        if item.get("type") == "relation":
            ends = item["from_id"], item["to_id"]
            for region, other in (ends, ends[::-1]):
                if other in rectangles and region not in rectangles:
                    owner[region] = other
    return owner


def _rectangle(value: dict[str, Any], size_wh: tuple[float, float]) -> tuple[float, float, float, float]:
    """x, y, w, h in px of the upright box around a rectangle, which may be rotated about its first corner."""
    x, w = (value[key] / 100 * size_wh[0] for key in ("x", "width"))
    y, h = (value[key] / 100 * size_wh[1] for key in ("y", "height"))
    angle = math.radians(value.get("rotation") or 0)
    corners = [(0.0, 0.0), (w, 0.0), (0.0, h), (w, h)]
    xs = [x + dx * math.cos(angle) - dy * math.sin(angle) for dx, dy in corners]
    ys = [y + dx * math.sin(angle) + dy * math.cos(angle) for dx, dy in corners]
    return min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)
