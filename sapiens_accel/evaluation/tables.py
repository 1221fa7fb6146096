"""What an evaluation measured, as text and for JSON: in percent, and always with how it was measured."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sapiens_accel.config.schema import EvalConfig
from sapiens_accel.errors import escape
from sapiens_accel.evaluation.boxes import GROUND_TRUTH
from sapiens_accel.evaluation.coco_metrics import KEYPOINT_METRICS, METRICS, UNITS, Metrics
from sapiens_accel.pose.oks import AREA_OF_BOX, KeypointQuality
from sapiens_accel.pose.person_boxes import BoxRule
from sapiens_accel.pose.skeleton import Skeleton

NOT_SHOWN = ("left_hand", "right_hand")  # but "hands", the mean of both
PIXELS = " and ".join(name for name, unit in UNITS.items() if unit == "px")
# Settings that an eval.json of version 0.1 does not have.
ADDED_SETTINGS = {"area": EvalConfig.area, "max_people": EvalConfig.max_people, "people_boxes": "annotation"}
PEOPLE_BOXES = {"keypoints": "people's boxes made from keypoints", "image": "whole images as people's boxes"}
AREAS = {"annotation": "as annotated", "box": f"{AREA_OF_BOX:g} of the box"}


def describe_boxes(config: EvalConfig) -> str:
    return "ground truth" if config.boxes == GROUND_TRUTH else f"detector ({Path(config.boxes).name})"


def protocol_settings(config: EvalConfig, people_boxes: BoxRule = "annotation") -> dict[str, Any]:
    """How metrics were measured, as eval.json has it.

    Args:
        people_boxes: `--data.boxes`: of the labeled people, which PCK is measured by and ground-truth crops are of.
    """
    return {
        "split": config.split,
        "boxes": describe_boxes(config),
        "flip": config.flip,
        "scales": list(config.scales),
        "score_threshold": config.score_threshold,
        "nms_threshold": config.nms_threshold,
        "area": config.area,
        "max_people": config.max_people,
        "people_boxes": people_boxes,
    }


def list_differences(evaluation: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of an eval.json that are other than these; what an older one does not name has its default."""
    measured = {name: evaluation.get(name, ADDED_SETTINGS.get(name)) for name in settings}
    return {name: value for name, value in measured.items() if value != settings[name]}


def describe_other_protocols(rows: Mapping[str, Mapping[str, Any]], settings: Mapping[str, Any]) -> list[str]:
    """A line for each eval.json that was measured otherwise than a table's title says."""
    differences = {name: list_differences(row, settings) for name, row in rows.items()}
    return [
        f"{name} was measured with {', '.join(f'{key} {one}' for key, one in others.items())}, not as the title says"
        for name, others in differences.items()
        if others
    ]


def describe_area(config: EvalConfig, without_area: int, num_people: int) -> str:
    """Which area OKS is measured by.

    Args:
        without_area: of the people, those that have none in their JSON.
    """
    if config.area == "box" or not without_area:
        return AREAS[config.area]
    if without_area == num_people:
        return f"{AREAS['box']} (the JSON has no 'area')"
    return f"{AREAS['annotation']}, {AREAS['box']} for {without_area} of {num_people} people, who have none"


def format_protocol(config: EvalConfig, area: str = "", people_boxes: BoxRule = "annotation") -> str:
    """The title of a table: how its metrics were measured.

    Args:
        area: as `describe_area` has it.
        people_boxes: as `protocol_settings`.
    """
    given = config.boxes == GROUND_TRUTH
    boxes = "ground-truth boxes" if given else f"detector's boxes ({Path(config.boxes).name})"
    counted = "" if config.max_people == EvalConfig.max_people else f", {config.max_people} people an image"
    measured = f"{format_augmentation(config)}, area: {area or AREAS[config.area]}"
    made = describe_people_boxes(people_boxes)
    return f"COCO keypoint metrics x 100, {config.split} people, {boxes}, {measured}{counted}{made}"


def describe_people_boxes(people_boxes: str | None) -> str:
    """What `--data.boxes` makes of labeled people's boxes, to be added to a protocol; empty for annotated ones."""
    words = PEOPLE_BOXES.get(str(people_boxes))
    return f", {words}" if words else ""


def format_augmentation(config: EvalConfig) -> str:
    """Test-time augmentation in words."""
    if config.compare:
        return "augmentation by row"
    flip = "flip test" if config.flip else "no flip test"
    scales = " ".join(f"{scale:g}" for scale in config.scales)
    return flip if config.scales == (1.0,) else f"{flip}, scales {scales}"


def format_table(rows: dict[str, Metrics], title: str) -> str:
    """Metrics of several models as text, one line each and one for each part of the body, in percent and px."""
    lines, names = table_rows(rows), table_columns(rows)
    width = max(len(name) for name in lines)
    head = f"{'':<{width}}" + "".join(f"{name:>{_width(name)}}" for name in names)
    shown = [
        f"{name:<{width}}"
        + "".join(f"{format_metric(v, column):>{_width(column)}}" for column, v in zip(names, values, strict=True))
        for name, values in lines.items()
    ]
    return "\n".join([title, head, *shown])


def _width(column: str) -> int:
    return max(7, len(column) + 2)


def table_columns(rows: dict[str, Metrics]) -> list[str]:
    """The table's columns: METRICS, and KEYPOINT_METRICS where they were measured."""
    return [*METRICS, *(name for name in KEYPOINT_METRICS if any(name in row for row in rows.values()))]


def table_rows(rows: dict[str, Metrics]) -> dict[str, list[float]]:
    """The table's lines by their names: each part of the body, level of crowding and category, and the whole."""
    columns = table_columns(rows)
    return {
        f"{name} {part}".rstrip(): [_known(row.get(f"{part}/{column}" if part else column)) for column in columns]
        for name, row in rows.items()
        for part in (*list_parts(row), "")
    }


def list_parts(row: Mapping[str, Any]) -> list[str]:
    """The parts of the body, levels of crowding and categories that a table has a line for."""
    parts = [key.rsplit("/", 1)[0] for key in row if key.endswith("/AP")]
    return [part for part in parts if part not in NOT_SHOWN]


def _known(value: float | None) -> float:
    return -1.0 if value is None else value  # eval.json has null for what is no number


def format_metric(value: float, name: str = "AP") -> str:
    """In percent, or px; pycocotools says -1 where there is nobody to measure, as for AP_L without a large person."""
    if value < 0:
        return "-"
    return f"{value:.2f}" if UNITS.get(name) == "px" else f"{100 * value:.1f}"


def format_costs(metrics: dict[str, Metrics], seconds: dict[str, float]) -> list[str]:
    """What each row of NAME, VARIANT adds to the first of its name, and costs, a line each."""
    lines, plain = [], {row.split(", ")[0]: row for row in reversed(metrics)}
    for row in metrics:
        first = plain[row.split(", ")[0]]
        if row != first:
            more = 100 * (metrics[row]["AP"] - metrics[first]["AP"])
            lines.append(f"{row}: AP {more:+.2f} for {seconds[row] / seconds[first]:.2f} x the time of {first}")
    return lines


def format_keypoints(values: KeypointQuality, skeleton: Skeleton) -> str:
    """What each keypoint is worth as text, and how sure the network is of them."""
    names = [escape(name, keep="") for name in skeleton.names]
    width = max(len(name) for name in ("all keypoints", *names))
    head = f"{'':<{width}}{'labeled':>10}{'OKS':>7}{'PCK@0.2':>9}{'PCK@0.1':>9}{'PCK@0.05':>10}"
    head += f"{'mean_px':>9}{'median_px':>11}"
    rows = [(name, [column[k] for column in _columns(values)]) for k, name in enumerate(names)]
    rows.append(("all keypoints", _totals(values)))
    lines = [
        f"{name:<{width}}{count:>10}{_percent(oks, 7)}{_percent(pck, 9)}{_percent(pck_10, 9)}{_percent(pck_5, 10)}"
        f"{_pixels(mean, 9)}{_pixels(median, 11)}"
        for name, (count, oks, pck, pck_10, pck_5, mean, median) in rows
    ]
    calibration = (
        f"expected calibration error (ECE) of the scores: {_percent(values.ece, 0)} points, by which on average a "
        "score differs from the share of keypoints with about that score whose OKS is above 0.5"
    )
    return "\n".join([head, *lines, calibration])


def _columns(values: KeypointQuality) -> list[Any]:
    far = values.distances
    return [values.count, values.oks, values.pck, far.pck_10, far.pck_5, far.mean_px, far.median_px]


def _totals(values: KeypointQuality) -> list[Any]:
    far = values.all_distances
    return [values.count.sum(), values.mean_oks, values.mean_pck, far.pck_10, far.pck_5, far.mean_px, far.median_px]


def _percent(value: float, width: int) -> str:
    return f"{'-':>{width}}" if math.isnan(value) else f"{100 * value:>{width}.1f}"


def _pixels(value: float, width: int) -> str:
    return f"{'-':>{width}}" if math.isnan(value) else f"{value:>{width}.2f}"


OF_KEYPOINTS = ("OKS", "PCK@0.2", "PCK@0.1", "PCK@0.05", "mean_px", "median_px")


def keypoint_statistics(values: KeypointQuality, skeleton: Skeleton) -> dict[str, Any]:
    """What the keypoints are worth, all and each by its name, for a JSON: what nobody has is null."""
    rows = [[_number(column[k].item()) for column in _columns(values)] for k in range(len(skeleton.names))]
    of_keypoints = {
        name: dict(zip(("people", *OF_KEYPOINTS), row, strict=True))
        for name, row in zip(skeleton.names, rows, strict=True)
    }
    means = dict(zip(OF_KEYPOINTS, map(float, _totals(values)[1:]), strict=True)) | {"ECE": values.ece}
    return {**{name: _number(value) for name, value in means.items()}, "keypoints": of_keypoints}


def without_nan(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A tree of numbers for a JSON: what is no number is null."""
    return {key: without_nan(one) if isinstance(one, Mapping) else _number(one) for key, one in tree.items()}


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value
