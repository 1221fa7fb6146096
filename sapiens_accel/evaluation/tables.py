"""What an evaluation found, as text and for JSON: in percent, and always with how it was measured."""

import math
from pathlib import Path
from typing import Any

from sapiens_accel.config.schema import EvalConfig
from sapiens_accel.errors import escape
from sapiens_accel.evaluation.boxes import GROUND_TRUTH
from sapiens_accel.evaluation.coco_metrics import METRICS, PARTS, Metrics
from sapiens_accel.pose.oks import KeypointQuality
from sapiens_accel.pose.skeleton import Skeleton

ROWS = (*(part for part in PARTS if "hand" not in part), "hands")  # shown beside the whole


def describe_boxes(config: EvalConfig) -> str:
    return "ground truth" if config.boxes == GROUND_TRUTH else f"detector ({Path(config.boxes).name})"


def protocol_settings(config: EvalConfig) -> dict[str, Any]:
    """What a number must be read with."""
    return {
        "split": config.split,
        "boxes": describe_boxes(config),
        "flip": config.flip,
        "scales": list(config.scales),
        "score_threshold": config.score_threshold,
        "nms_threshold": config.nms_threshold,
    }


def format_protocol(config: EvalConfig) -> str:
    """The same as a title."""
    given = config.boxes == GROUND_TRUTH
    boxes = "ground-truth boxes" if given else f"detector's boxes ({Path(config.boxes).name})"
    return f"COCO keypoint metrics x 100, {config.split} people, {boxes}, {format_augmentation(config)}"


def format_augmentation(config: EvalConfig) -> str:
    """Test-time augmentation in words."""
    if config.compare:
        return "augmentation by row"
    flip = "flip test" if config.flip else "no flip test"
    scales = " ".join(f"{scale:g}" for scale in config.scales)
    return flip if config.scales == (1.0,) else f"{flip}, scales {scales}"


def format_table(rows: dict[str, Metrics], title: str) -> str:
    """Metrics of several models as text, one line each and one for each part of the body, in percent."""
    found = table_rows(rows)
    width = max(len(name) for name in found)
    head = f"{'':<{width}}" + "".join(f"{name:>7}" for name in METRICS)
    shown = [f"{name:<{width}}" + "".join(f"{format_metric(v):>7}" for v in values) for name, values in found.items()]
    return "\n".join([title, head, *shown])


def table_rows(rows: dict[str, Metrics]) -> dict[str, list[float]]:
    """The table's lines by their names: METRICS of each part of the body, and of the whole."""
    return {
        f"{name} {part}".rstrip(): [row[f"{part}/{m}" if part else m] for m in METRICS]
        for name, row in rows.items()
        for part in (*(part for part in ROWS if f"{part}/AP" in row), "")
    }


def format_metric(value: float) -> str:
    """In percent; pycocotools says -1 where there is nobody to measure, as for AP_L without a large person."""
    return f"{100 * value:.1f}" if value >= 0 else "-"


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
    """OKS and PCK of each keypoint as text, and how sure the network is of them."""
    names = [escape(name, keep="") for name in skeleton.names]
    width = max(len(name) for name in ("all keypoints", *names))
    head = f"{'':<{width}}{'labeled':>10}{'OKS':>7}{'PCK@0.2':>9}"
    rows = [(name, values.count[k], values.oks[k], values.pck[k]) for k, name in enumerate(names)]
    rows.append(("all keypoints", values.count.sum(), values.mean_oks, values.mean_pck))
    lines = [f"{name:<{width}}{count:>10}{_percent(oks, 7)}{_percent(pck, 9)}" for name, count, oks, pck in rows]
    calibration = (
        f"expected calibration error (ECE) of the scores: {_percent(values.ece, 0)} points, by which on average a "
        "score differs from the share of keypoints with about that score whose OKS is above 0.5"
    )
    return "\n".join([head, *lines, calibration])


def _percent(value: float, width: int) -> str:
    return f"{'-':>{width}}" if math.isnan(value) else f"{100 * value:>{width}.1f}"


def keypoint_scalars(values: KeypointQuality, skeleton: Skeleton) -> dict[str, dict[str, float | None]]:
    """OKS and PCK of each keypoint by its name; what nobody has is null."""
    columns = {"OKS": values.oks.tolist(), "PCK@0.2": values.pck.tolist()}
    return {k: dict(zip(skeleton.names, map(_number, column), strict=True)) for k, column in columns.items()}


def keypoint_statistics(values: KeypointQuality, skeleton: Skeleton) -> dict[str, Any]:
    """The same for a JSON: what nobody has is null."""
    rows = zip(skeleton.names, values.count.tolist(), values.oks.tolist(), values.pck.tolist(), strict=True)
    of_joints = {n: {"people": count, "OKS": _number(oks), "PCK@0.2": _number(pck)} for n, count, oks, pck in rows}
    means = {"OKS": values.mean_oks, "PCK@0.2": values.mean_pck, "ECE": values.ece}
    return {**{name: _number(value) for name, value in means.items()}, "keypoints": of_joints}


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value
