"""The training curve of a run as a picture: loss above, AP below, stage after stage."""

import math
from collections.abc import Mapping, Sequence
from itertools import cycle, pairwise
from typing import Any

import cv2
import numpy as np
from jaxtyping import UInt8
from numpy import ndarray as Array

from sapiens_accel.config.schema import STAGES

COLOURS = dict(zip(STAGES, cycle([(120, 120, 120), (90, 140, 200), (200, 90, 80), (90, 170, 110)]), strict=False))
WIDTH, HEIGHT, LEFT, RIGHT, TOP, GAP = 900, 220, 80, 24, 36, 44
FONT = cv2.FONT_HERSHEY_SIMPLEX
GREY, INK = (225, 225, 225), (40, 40, 40)
Points = list[tuple[float, float]]


def draw(lines: Sequence[Mapping[str, Any]], stages: Sequence[str]) -> UInt8[Array, "h w 3"] | None:
    """The loss (logarithmic) and AP x 100 over the steps of the stages, one after the other. None: nothing to draw.

    Args:
        lines: of metrics.jsonl, in any order of stages.
    """
    losses, scores, first = {}, {}, 0.0
    for stage in stages:
        mine = [line for line in lines if line.get("stage") == stage and "step" in line]
        losses[stage] = [
            (first + line["step"], math.log10(line["loss"])) for line in mine if (line.get("loss") or 0) > 0
        ]
        scores[stage] = [(first + line["step"], 100 * max(line["AP"], 0.0)) for line in mine if _is_number(line, "AP")]
        first += max((line["step"] for line in mine), default=0)
    if not any(losses.values()):
        return None
    canvas = np.full((2 * (TOP + HEIGHT) + GAP + 20, WIDTH, 3), 255, np.uint8)
    values = [value for points in losses.values() for _, value in points]
    low, high = min(values), max(max(values), min(values) + 0.1)
    ticks = [low + (high - low) * i / 4 for i in range(5)]
    _panel(canvas, TOP, "loss", [(tick, f"{10**tick:.2g}") for tick in ticks], first, losses, dots=False)
    most = 10.0 * math.ceil(max([value for points in scores.values() for _, value in points], default=0.0) / 10 + 1e-9)
    ticks = [(most * i / 5, f"{most * i / 5:g}") for i in range(6)]
    _panel(canvas, TOP + HEIGHT + GAP + TOP, "AP x 100", ticks, first, scores, dots=True)
    for index, stage in enumerate(stage for stage in reversed(stages) if losses[stage]):
        _text(canvas, stage, (WIDTH - RIGHT - 90 * (index + 1), 22), COLOURS[stage])
    return canvas


def _panel(
    canvas: UInt8[Array, "h w 3"],
    top: int,
    title: str,
    ticks: Sequence[tuple[float, str]],
    last: float,
    curves: Mapping[str, Points],
    *,
    dots: bool,
) -> None:
    low, high = ticks[0][0], ticks[-1][0]

    def place(step: float, value: float) -> tuple[int, int]:
        x = LEFT + (WIDTH - LEFT - RIGHT) * step / max(last, 1)
        return round(x), round(top + HEIGHT * (1 - (value - low) / (high - low)))

    for value, label in ticks:
        cv2.line(canvas, place(0, value), place(last, value), GREY, 1)
        _text(canvas, label, (14, place(0, value)[1] + 5))
    _text(canvas, title, (LEFT, top - 12))
    for step in (0, last / 2, last):
        _text(canvas, f"{step:.0f}", (place(step, low)[0] - 12, top + HEIGHT + 20))
    for stage, points in curves.items():
        where = [place(*point) for point in points]
        for a, b in pairwise(where):
            cv2.line(canvas, a, b, COLOURS[stage], 2, cv2.LINE_AA)
        if dots or len(where) == 1:
            for point in where:
                cv2.circle(canvas, point, 4, COLOURS[stage], -1, cv2.LINE_AA)


def _is_number(line: Mapping[str, Any], name: str) -> bool:
    return isinstance(line.get(name), float | int) and math.isfinite(line[name])


def _text(canvas: np.ndarray, text: str, at: tuple[int, int], colour: tuple[int, int, int] = INK) -> None:
    cv2.putText(canvas, text, at, FONT, 0.45, colour, 1, cv2.LINE_AA)
