"""The table of `gain.py` as an image: for each data set and arm what it gains over `supervised`, seed by seed."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from sapiens_accel.pose import draw

COLORS = [
    (90, 140, 200),
    (60, 160, 90),
    (200, 90, 80),
    (230, 170, 60),
    (150, 100, 190),
    (90, 180, 190),
    (120, 120, 120),
]
HEIGHT, COLUMN, GAP, LEFT, TOP, BELOW = 420, 46, 60, 60, 50, 110
ENTRY = 160  # px of a name in the legend
FONT = cv2.FONT_HERSHEY_SIMPLEX


def save(cells: Sequence[dict[str, Any]], path: Path) -> Path:
    """Draw a dot for each seed's difference in AP, a line at their mean and a bar over its 95 % interval.

    Args:
        cells: of `gain.summary`; arms without a difference are left out.
    """
    shown = [cell for cell in cells if cell["arm"] != "supervised" and cell.get("ap_gains")]
    cases = list(dict.fromkeys((cell["data"], cell["labels"]) for cell in shown))
    arms = list(dict.fromkeys(cell["arm"] for cell in shown))
    width = max(LEFT + GAP + len(shown) * COLUMN + len(cases) * GAP, 640)
    canvas = np.full((TOP + HEIGHT + BELOW, width, 3), 255, np.uint8)
    drawn = [value for cell in shown for value in (*cell["ap_gains"], *(cell["ap_interval"] or ()))]
    low, high = math.floor(min([0.0, *drawn])) - 1, math.ceil(max([0.0, *drawn])) + 1

    def height(value: float) -> int:
        return TOP + round(HEIGHT * (high - value) / (high - low))

    for value in range(low, high + 1, max(1, (high - low) // 10)):
        cv2.line(canvas, (LEFT, height(value)), (width - 20, height(value)), (230, 230, 230), 1)
        _text(canvas, f"{value:+d}", (14, height(value) + 5))
    cv2.line(canvas, (LEFT, height(0)), (width - 20, height(0)), (60, 60, 60), 1)
    x = LEFT + GAP // 2
    for case in cases:
        _text(canvas, f"{case[0]}, {case[1]} labels", (x, TOP + HEIGHT + 22))
        for cell in (cell for cell in shown if (cell["data"], cell["labels"]) == case):
            _draw_cell(canvas, cell, x + COLUMN // 2, height, COLORS[arms.index(cell["arm"]) % len(COLORS)])
            x += COLUMN
        x += GAP
    in_a_row = max(1, (width - LEFT) // ENTRY)
    for index, arm in enumerate(arms):
        x, y = LEFT + index % in_a_row * ENTRY, TOP + HEIGHT + 50 + 22 * (index // in_a_row)
        cv2.rectangle(canvas, (x, y - 11), (x + 12, y + 1), COLORS[index % len(COLORS)], -1)
        _text(canvas, arm, (x + 18, y))
    _text(canvas, "AP of the teacher minus AP of `supervised`: each seed, mean and 95 % interval", (LEFT, 24))
    return draw.save_image(canvas, path)


def _draw_cell(canvas: np.ndarray, cell: dict[str, Any], x: int, height: Any, color: tuple[int, int, int]) -> None:
    if cell["ap_interval"] is not None:
        low, high = cell["ap_interval"]
        cv2.rectangle(canvas, (x - 9, height(high)), (x + 9, height(low)), tuple(128 + c // 2 for c in color), -1)
    mean = height(sum(cell["ap_gains"]) / len(cell["ap_gains"]))
    cv2.line(canvas, (x - 14, mean), (x + 14, mean), color, 3)
    for gain in cell["ap_gains"]:
        cv2.circle(canvas, (x, height(gain)), 4, (0, 0, 0), -1, cv2.LINE_AA)


def _text(canvas: np.ndarray, text: str, at: tuple[int, int], color: tuple[int, int, int] = (40, 40, 40)) -> None:
    cv2.putText(canvas, text, at, FONT, 0.45, color, 1, cv2.LINE_AA)
