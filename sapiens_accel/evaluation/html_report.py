"""An evaluation as one HTML file: tables, curves, bars and the worst people. It fetches nothing and runs nothing."""

import base64
import math
from collections import Counter
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int, UInt8
from numpy import ndarray as Array

from sapiens_accel.config.schema import EvalConfig
from sapiens_accel.errors import UserError
from sapiens_accel.evaluation import coco_metrics as ap
from sapiens_accel.evaluation import figures as cases
from sapiens_accel.evaluation import markup, tables
from sapiens_accel.evaluation.coco_metrics import METRICS, Curves
from sapiens_accel.evaluation.error_analysis import GOOD_FROM, NEAR_FROM, Diagnosis, Kind, reliability
from sapiens_accel.evaluation.evaluate import SHOWN_JOINTS, Judgement
from sapiens_accel.evaluation.figures import Case, Findings
from sapiens_accel.pose import draw
from sapiens_accel.pose.skeleton import Skeleton

AUTO = "auto"
PANEL_BYTES = 24_000  # a panel's JPEG: four of each of 20 people are 2.6 MB in base64
LOW = 0.5  # OKS below which a person counts for no AP
# Of the curves, by OKS: in order, each told from the next one, on bright and on dark paper.
LINES = ["#6a4de0", "#3f6ff0", "#1f97e0", "#12adb8", "#17a673", "#6ba82a", "#b3a012", "#e08a0c", "#e2602a", "#d93a5e"]
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def write(
    given: str,
    folder: Path,
    rows: dict[str, Judgement],
    hows: dict[str, EvalConfig],
    findings: dict[str, Findings],
    skeleton: Skeleton,
    about: Sequence[str] = (),
) -> Path:
    """Write the page of an evaluation.

    Args:
        given: the file; `auto` is eval.html in `folder`.
        rows, hows: what was judged, by its name in the tables, and how each was measured.
        findings: what went wrong, of some of the rows.
        about: which weights and which people, a line each.

    Raises:
        UserError: the file cannot be written.
    """
    file = folder / "eval.html" if given == AUTO else Path(given)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(whole(rows, hows, findings, skeleton, about), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--eval.html {file}: not written: {error.strerror}; name another file") from None
    return file


def whole(
    rows: dict[str, Judgement],
    hows: dict[str, EvalConfig],
    findings: dict[str, Findings],
    skeleton: Skeleton,
    about: Sequence[str] = (),
) -> str:
    """The page itself."""
    title = f"Evaluation of {'; '.join(rows)}"
    last = list(rows)[-1]
    sections = []
    for name, judged in rows.items():
        inner = _section(judged, findings.get(name), skeleton)
        opened = " open" if name == last else ""
        folded = f"<details{opened}><summary>curves, keypoints, people</summary>{inner}</details>"
        sections.append(f"<h2>{escape(name)}</h2>{inner if len(rows) == 1 else folded}")
    costs = tables.costs({n: one.metrics for n, one in rows.items()}, {n: one.seconds for n, one in rows.items()})
    notes = [f"{name}: {note}" for name, judged in rows.items() for note in judged.notes]
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
            f'<link rel="icon" href="data:,">\n<title>{escape(title)}</title>',
            f"<style>{markup.STYLE}</style>\n</head>\n<body>",
            f"<h1>{escape(title)}</h1>",
            *(f'<p class="faint">{escape(line)}</p>' for line in about),
            _metrics(rows, hows),
            *(f"<p>{escape(line)}</p>" for line in [*costs, *notes]),
            *sections,
            _meanings(),
            "</body>\n</html>\n",
        ]
    )


def _metrics(rows: dict[str, Judgement], hows: dict[str, EvalConfig]) -> str:
    """The table, and how each row of it was measured."""
    lines = tables.lines({name: judged.metrics for name, judged in rows.items()})
    body = [[name, *(tables.metric(value) for value in values)] for name, values in lines.items()]
    measured = []
    for name, how in hows.items():
        scales = " ".join(f"{scale:g}" for scale in how.scales)
        used = [name, str(len(rows[name].predictions.scores)), how.split, tables.boxes_in_words(how)]
        measured.append([*used, "yes" if how.flip else "no", scales, f"{how.nms_threshold:g}", how.backend])
    head = ["", "people", "split", "boxes", "flip test", "scales", "NMS above OKS", "computed by"]
    return (
        "<p>COCO keypoint metrics in percent; - where there is nobody to measure.</p>"
        f"{markup.table(['', *METRICS], body)}"
        f"<h3>How it was measured</h3>{markup.table(head, measured)}"
    )


def _section(judged: Judgement, found: Findings | None, skeleton: Skeleton) -> str:
    parts = [
        "<h3>Precision by recall, at each OKS from which a person counts as found</h3>",
        _curves(judged.curves),
        "<h3>Keypoints</h3>",
        _joints(judged, skeleton),
    ]
    if found:
        parts += [
            "<h3>Kinds of error by keypoint</h3>",
            _kinds(found.diagnosis, skeleton),
            "<h3>Are the scores to be believed?</h3>",
            _calibration(judged, found.diagnosis),
            f"<h3>The worst people</h3><p>{escape(_reasons(found.diagnosis, skeleton))}</p>",
            _colours() if found.cases else "",
            *(_case(case, number) for number, case in enumerate(found.cases, start=1)),
        ]
    return "\n".join(parts)


# ---- Curves


def _curves(curves: Curves) -> str:
    if (curves < 0).all():
        return "<p>Nobody to measure.</p>"
    lines, names = [], []
    for index, precision in enumerate(curves):
        threshold, colour = 0.5 + 0.05 * index, LINES[index]
        # What is never recalled has a precision of 0: the curve ends there.
        reached = np.flatnonzero(precision > 0).max(initial=-1) + 2
        recalled = np.linspace(0, 100, len(precision))[:reached]
        points = " ".join(f"{x:g},{100 * y:.3f}" for x, y in zip(recalled, precision, strict=False))
        label = f"OKS {threshold:.2f}: AP {100 * precision.mean():.1f}"
        lines.append(f'<polyline stroke="{colour}" points="{points}"><title>{label}</title></polyline>')
        names.append((label, colour))
    chart = markup.chart("recall, %", "precision, %", "\n".join(lines))
    return f'<div class="row">{chart}{markup.key(names)}</div>'


def _calibration(judged: Judgement, found: Diagnosis) -> str:
    """What share of the keypoints of a score is right: bars; a believable score's are on the line."""
    bins = reliability(found, judged.predictions.scores)
    width = 100 / len(bins.num)
    bars = "".join(
        f'<rect x="{i * width + 1:g}" y="0" width="{width - 2:g}" height="{100 * right:.2f}" fill="var(--bar)">'
        f"<title>{count} keypoints of score {score:.2f}: {100 * right:.1f} % right</title></rect>"
        for i, (count, score, right) in enumerate(zip(bins.num, bins.score, bins.right, strict=True))
        if count
    )
    line = '<polyline stroke="currentColor" points="0,0 100,100"/>'
    error = "-" if math.isnan(judged.joints.ece) else f"{100 * judged.joints.ece:.1f}"
    return (
        f"<p>Expected calibration error, %: <b>{error}</b> (right: a keypoint's OKS above {NEAR_FROM:g}).</p>"
        f"{markup.chart('score, %', 'right, %', bars + line)}"
    )


# ---- Bars


def _joints(judged: Judgement, skeleton: Skeleton) -> str:
    values = judged.joints
    top = [_joint("all keypoints", values.count.sum(), values.mean_oks, values.mean_pck)]
    for part, at in ap.parts_of(skeleton).items():
        counts = values.count[at]
        top.append(_joint(part, counts.sum(), _mean(values.oks[at], counts), _mean(values.pck[at], counts)))
    body = [_joint(name, values.count[k], values.oks[k], values.pck[k]) for k, name in enumerate(skeleton.names)]
    return markup.folded("bars two", ("keypoint", "labelled", "OKS, %", "PCK@0.2, %"), top, body, SHOWN_JOINTS)


def _joint(name: str, count: int, *values: float) -> str:
    shown = (("-", "") if math.isnan(v) else (f"{100 * v:.1f}", markup.bar([(v, "var(--bar)", "")])) for v in values)
    cells = "".join(f"<td>{number}{bar}</td>" for number, bar in shown)
    return f"<tr><td>{escape(name.replace('_', ' '))}</td><td>{count}</td>{cells}</tr>"


def _kinds(found: Diagnosis, skeleton: Skeleton) -> str:
    """For each keypoint the shares of its kinds as one bar."""
    counts = found.counts()
    parts = {part.replace("_", " "): counts[:, at].sum(axis=1) for part, at in ap.parts_of(skeleton).items()}
    top = [_kind(name, of) for name, of in {"all keypoints": counts.sum(axis=1), **parts}.items()]
    body = [_kind(name, counts[:, k]) for k, name in enumerate(skeleton.names)]
    key = markup.key((kind.words, _css(kind)) for kind in Kind)
    return key + markup.folded("bars", ("keypoint", "labelled", "errors, %", "kinds"), top, body, SHOWN_JOINTS)


def _kind(name: str, counts: Int[Array, "kinds"]) -> str:
    num = int(counts.sum())
    shares = counts / max(num, 1)
    bar = markup.bar([(shares[kind], _css(kind), f"{kind.words}: {counts[kind]} of {num}") for kind in Kind])
    wrong = f"{100 * (1 - shares[Kind.GOOD]):.1f}" if num else "-"
    return f"<tr><td>{escape(name.replace('_', ' '))}</td><td>{num}</td><td>{wrong}</td><td>{bar}</td></tr>"


def _mean(values: Float[Array, "k"], counts: Int[Array, "k"]) -> float:
    there = counts > 0
    return float(np.average(values[there], weights=counts[there])) if there.any() else math.nan


# ---- People


def _reasons(found: Diagnosis, skeleton: Skeleton) -> str:
    low = np.flatnonzero(found.oks < LOW).tolist()
    told = f"Of {len(found.oks)} people {len(low)} have an OKS below {LOW:g}"
    most = Counter(found.reason(person, skeleton).kind.words for person in low).most_common()
    return f"{told}; what costs them most: {', '.join(f'{words} {num}' for words, num in most)}." if low else f"{told}."


def _colours() -> str:
    """What colours mean in the pictures of people, as text: on a narrow page that in the pictures is small."""
    sides = [("left", draw.LEFT), ("right", draw.RIGHT), ("score 0", draw.UNSURE), ("0.5", draw.HALF_SURE)]
    named = [(text, _hex(colour)) for text, colour in [*sides, ("score 1", draw.SURE)]]
    return markup.key([*named, *((kind.words, _css(kind)) for kind in Kind)])


def _case(case: Case, number: int) -> str:
    badge = f'<span class="kind"><i style="background:{_css(case.reason.kind)}"></i>{case.reason.kind.words}</span>'
    names = ("as labelled", "as predicted", "errors", "heatmaps")
    several = zip(names, case.panels, strict=False)
    panels = "\n".join(
        f"<div>{_image(p, f'{name}: {case.reason.text}')}<small>{name}</small></div>" for name, p in several
    )
    place = f"annotation {case.ann_id} of picture {case.image_id}, {case.file_name}"
    return (
        f"<figure><figcaption><b>{number}. OKS {case.oks:.2f}</b> {badge}: {escape(case.reason.text)}<br>"
        f'<small>{escape(place)}</small></figcaption><div class="panels">\n{panels}\n</div></figure>'
    )


def _image(picture: UInt8[Array, "h w 3"], alt: str) -> str:
    data = base64.b64encode(draw.jpeg(picture, PANEL_BYTES)).decode()
    size = f'width="{picture.shape[1]}" height="{picture.shape[0]}"'
    return f'<img loading="lazy" alt="{escape(alt)}" {size} src="data:image/jpeg;base64,{data}">'


def _css(kind: Kind) -> str:
    return _hex(cases.COLOURS[kind])


def _hex(colour: draw.Colour) -> str:
    return "#" + "".join(f"{part:02x}" for part in colour)


def _meanings() -> str:
    words = (
        f"A keypoint is good if its similarity exp(-d² / (2 area (2 sigma)²)) to the labelled one is at least "
        f"{GOOD_FROM:g}, imprecise from {NEAR_FROM:g}; a left/right swap if it is nearer to the mirrored joint of the "
        "same person, a wrong person if it is at a joint of another labelled one, else a missed joint: after Ronchi "
        "and Perona, Benchmarking and Error Diagnosis in Multi-Instance Pose Estimation, 2017 (arXiv 1707.05388). "
        "Unlabelled keypoints do not count. In the pictures of errors a dot is where a joint is labelled, and a line "
        "leads to it from where it was found. PCK@0.2: within 0.2 of the longer side of the person's box."
    )
    return f"<h2>What the words mean</h2><p><small>{escape(words)}</small></p>"
