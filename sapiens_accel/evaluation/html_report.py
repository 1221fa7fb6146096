"""An evaluation as one HTML file: tables, curves, bars and the worst people. It loads nothing and runs no script.

The page is eval.html.jinja; here are the values that it shows.
"""

import base64
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from numpy import ndarray as Array

from sapiens_accel.config.schema import EvalConfig
from sapiens_accel.errors import UserError, escape
from sapiens_accel.evaluation import coco_metrics, figures, tables
from sapiens_accel.evaluation.coco_metrics import Curves
from sapiens_accel.evaluation.error_analysis import GOOD_FROM, NEAR_FROM, Diagnosis, Kind, Reliability, reliability
from sapiens_accel.evaluation.evaluate import MAX_SHOWN_KEYPOINTS, EvaluationResult
from sapiens_accel.evaluation.figures import Case, ErrorAnalysis
from sapiens_accel.pose import draw
from sapiens_accel.pose.oks import Distances
from sapiens_accel.pose.skeleton import Skeleton

AUTO = "auto"
TEMPLATE = "eval.html.jinja"
PANEL_BYTES = 24_000  # a panel's JPEG: four of each of 20 people are 2.6 MB in base64
LOW = 0.5  # OKS below which a person counts for no AP
PANELS = ("as labeled", "as predicted", "errors", "heatmaps")
# One for each OKS threshold: neighbors differ, on light and on dark backgrounds.
LINES = ["#6a4de0", "#3f6ff0", "#1f97e0", "#12adb8", "#17a673", "#6ba82a", "#b3a012", "#e08a0c", "#e2602a", "#d93a5e"]


class BarPiece(NamedTuple):
    """A part of a bar: its width in percent, as text; `title` is shown under the pointer."""

    width: str
    color: str
    title: str = ""


class BarCell(NamedTuple):
    """A number and the bar under it, if any."""

    text: str
    pieces: Sequence[BarPiece] | None = None


class BarRow(NamedTuple):
    name: str
    num_people: int
    cells: Sequence[BarCell]


class BarTable(NamedTuple):
    """Rows of all keypoints and of parts of the body, and those of single keypoints."""

    totals: Sequence[BarRow]
    rows: Sequence[BarRow]


class About(NamedTuple):
    """What is evaluated.

    Attributes:
        lines: which weights and which people, a line each.
        pseudo_labels: by the name of the weights, the validation people's pseudo-labels by their confidence, at the end
            of the stage ssl that made the weights.
    """

    lines: Sequence[str] = ()
    pseudo_labels: Mapping[str, Reliability] = {}


NOTHING_KNOWN = About()


def report_path(name: str, folder: Path) -> Path:
    """The file that --eval.html names: `auto` is eval.html in the folder of the results."""
    return folder / "eval.html" if name == AUTO else Path(name)


def write_report(
    file: Path,
    rows: dict[str, EvaluationResult],
    configs: dict[str, EvalConfig],
    findings: dict[str, ErrorAnalysis],
    skeleton: Skeleton,
    about: About = NOTHING_KNOWN,
) -> Path:
    """Write the page of an evaluation.

    Args:
        rows, configs: the evaluations by their names in the tables, and the options of each.
        findings: the error analyses of some of them.
        about: which weights and which people, and what is known of the weights' training.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(render_report(rows, configs, findings, skeleton, about), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--eval.html {file}: not written: {error.strerror}; name another file") from None
    return file


def render_report(
    rows: dict[str, EvaluationResult],
    configs: dict[str, EvalConfig],
    findings: dict[str, ErrorAnalysis],
    skeleton: Skeleton,
    about: About = NOTHING_KNOWN,
) -> str:
    """The page as text."""
    loader = PackageLoader("sapiens_accel.evaluation", package_path="")
    template = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, finalize=_visible).get_template(
        TEMPLATE
    )
    measured = {name: result.metrics for name, result in rows.items()}
    lines, columns = tables.table_rows(measured), tables.table_columns(measured)
    costs = tables.format_costs(measured, {name: result.seconds for name, result in rows.items()})
    notes = [f"{name}: {note}" for name, result in rows.items() for note in result.notes]
    return template.render(
        title=f"Evaluation of {'; '.join(rows)}",
        about=about.lines,
        metric_names=columns,
        pixels=tables.PIXELS,
        metrics=[[name, *map(tables.format_metric, values, columns)] for name, values in lines.items()],
        settings=[_settings(name, rows[name], config) for name, config in configs.items()],
        lines=[*costs, *notes],
        pseudo_labels={name: _calibration(bins, "confidence") for name, bins in about.pseudo_labels.items()},
        sections=[_section(name, result, findings.get(name), skeleton) for name, result in rows.items()],
        most_rows=MAX_SHOWN_KEYPOINTS,
        good_from=f"{GOOD_FROM:g}",
        near_from=f"{NEAR_FROM:g}",
    )


def _visible(value: Any) -> Any:
    """Text with its control codes shown; what is markup already stays so."""
    return escape(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _settings(name: str, result: EvaluationResult, config: EvalConfig) -> list[str]:
    """How a row of the table was measured."""
    scales = " ".join(f"{scale:g}" for scale in config.scales)
    used = [name, str(len(result.predictions.scores)), config.split]
    used.append(tables.describe_boxes(config) + tables.describe_people_boxes(result.people_boxes))
    used += ["yes" if config.flip else "no", scales, f"{config.nms_threshold:g}", config.backend]
    return [*used, result.area or tables.AREAS[config.area], str(config.max_people)]


def _section(name: str, result: EvaluationResult, analysis: ErrorAnalysis | None, skeleton: Skeleton) -> dict[str, Any]:
    curves = _curves(result.curves)
    section = {
        "name": name,
        "curves": curves,
        "curve_key": [(curve["label"], curve["color"]) for curve in curves],
        "keypoints": _keypoint_table(result, skeleton),
        "errors": None,
    }
    if analysis:
        error = result.keypoints.ece
        section |= {
            "errors": _error_table(analysis.diagnosis, skeleton),
            "kinds": _kinds(),
            "calibration_error": "-" if math.isnan(error) else f"{100 * error:.1f}",
            "bins": _calibration(reliability(analysis.diagnosis, result.predictions.scores), "score"),
            "summary": _summary(analysis.diagnosis, skeleton),
            "case_key": _case_key(),
            "cases": [_case(case) for case in analysis.cases],
        }
    return section


# ---- Curves


def _curves(curves: Curves) -> list[dict[str, str]]:
    """A curve for each OKS threshold; none where there is nobody to measure."""
    lines = []
    for index, precision in enumerate(curves if (curves >= 0).any() else ()):
        # A recall that is never reached has a precision of 0: the curve ends there.
        num = np.flatnonzero(precision > 0).max(initial=-1) + 2
        recall = np.linspace(0, 100, len(precision))[:num]
        points = " ".join(f"{x:g},{100 * y:.3f}" for x, y in zip(recall, precision, strict=False))
        label = f"OKS {0.5 + 0.05 * index:.2f}: AP {100 * precision.mean():.1f}"
        lines.append({"label": label, "color": LINES[index], "points": points})
    return lines


def _calibration(bins: Reliability, what: str) -> list[dict[str, str]]:
    """For each bin of scores the share of its keypoints that is right; of calibrated scores they lie on the line."""
    width = 100 / len(bins.num)
    return [
        {
            "x": f"{i * width + 1:g}",
            "width": f"{width - 2:g}",
            "height": f"{100 * right:.2f}",
            "title": f"{count} keypoints of {what} {score:.2f}: {100 * right:.1f} % right",
        }
        for i, (count, score, right) in enumerate(zip(bins.num, bins.score, bins.right, strict=True))
        if count
    ]


# ---- Bars


def _keypoint_table(result: EvaluationResult, skeleton: Skeleton) -> BarTable:
    values = result.keypoints
    distances, all_distances = values.distances, values.all_distances
    totals = [_keypoint_row("all keypoints", values.count.sum(), (values.mean_oks, values.mean_pck), all_distances)]
    for part, part_slice in coco_metrics.body_parts(skeleton).items():
        counts = values.count[part_slice]
        means = [
            _mean(column[part_slice], counts) for column in (values.oks, values.pck, distances.pck_10, distances.pck_5)
        ]
        pixels = [np.asarray(value) for value in (math.nan, math.nan, *means[2:])]
        totals.append(_keypoint_row(part, counts.sum(), means[:2], Distances(*pixels)))
    rows = [
        _keypoint_row(name, values.count[k], (values.oks[k], values.pck[k]), Distances(*(one[k] for one in distances)))
        for k, name in enumerate(skeleton.names)
    ]
    return BarTable(totals, rows)


def _keypoint_row(name: str, count: int, shares: Sequence[float], distances: Distances) -> BarRow:
    def cell(value: float) -> BarCell:
        if math.isnan(value):
            return BarCell("-")
        return BarCell(f"{100 * value:.1f}", [BarPiece(f"{100 * value:.2f}", "var(--bar)")] if value > 0 else [])

    pck = ["-" if math.isnan(value) else f"{100 * value:.1f}" for value in (distances.pck_10, distances.pck_5)]
    pixels = ["-" if math.isnan(value) else f"{value:.2f}" for value in (distances.mean_px, distances.median_px)]
    return BarRow(name, int(count), [*map(cell, shares), *map(BarCell, [*pck, *pixels])])


def _error_table(diagnosis: Diagnosis, skeleton: Skeleton) -> BarTable:
    """For each keypoint the shares of the kinds of error as one bar."""
    counts = diagnosis.counts()
    parts = {"all keypoints": slice(None), **coco_metrics.body_parts(skeleton)}
    totals = [_error_row(name, counts[:, part_slice].sum(axis=1)) for name, part_slice in parts.items()]
    return BarTable(totals, [_error_row(name, counts[:, k]) for k, name in enumerate(skeleton.names)])


def _error_row(name: str, counts: Int[Array, "kinds"]) -> BarRow:
    num = int(counts.sum())
    shares = counts / max(num, 1)
    pieces = [
        BarPiece(f"{100 * shares[kind]:.2f}", _css(kind), f"{kind.words}: {counts[kind]} of {num}")
        for kind in Kind
        if shares[kind] > 0
    ]
    wrong = f"{100 * (1 - shares[Kind.GOOD]):.1f}" if num else "-"
    return BarRow(name, num, [BarCell(wrong), BarCell("", pieces)])


def _mean(values: Float[Array, "k"], counts: Int[Array, "k"]) -> float:
    measured = counts > 0
    return float(np.average(values[measured], weights=counts[measured])) if measured.any() else math.nan


# ---- People


def _summary(diagnosis: Diagnosis, skeleton: Skeleton) -> str:
    low = np.flatnonzero(diagnosis.oks < LOW).tolist()
    counted = f"Of {len(diagnosis.oks)} people {len(low)} have an OKS below {LOW:g}"
    most = Counter(diagnosis.reason(person, skeleton).kind.words for person in low).most_common()
    causes = ", ".join(f"{words} {num}" for words, num in most)
    return f"{counted}; what costs them most: {causes}." if low else f"{counted}."


def _kinds() -> list[tuple[str, str]]:
    return [(kind.words, _css(kind)) for kind in Kind]


def _case_key() -> list[tuple[str, str]]:
    """The colors of the images of people, as text too: on a narrow page the key inside an image is small."""
    sides = [("left", draw.LEFT), ("right", draw.RIGHT), ("score 0", draw.UNSURE), ("0.5", draw.HALF_SURE)]
    return [*((text, _hex(color)) for text, color in [*sides, ("score 1", draw.SURE)]), *_kinds()]


def _case(case: Case) -> dict[str, Any]:
    return {
        "oks": f"{case.oks:.2f}",
        "color": _css(case.reason.kind),
        "kind": case.reason.kind.words,
        "reason": case.reason.text,
        "source": f"annotation {case.ann_id} of image {case.image_id}, {case.file_name}",
        "panels": [_panel(name, panel) for name, panel in zip(PANELS, case.panels, strict=False)],
    }


def _panel(name: str, image: UInt8[Array, "h w 3"]) -> dict[str, Any]:
    content = base64.b64encode(draw.encode_jpeg(image, PANEL_BYTES)).decode()
    return {"name": name, "width": image.shape[1], "height": image.shape[0], "base64": content}


def _css(kind: Kind) -> str:
    return _hex(figures.ERROR_COLORS[kind])


def _hex(color: draw.Color) -> str:
    return "#" + "".join(f"{part:02x}" for part in color)
