"""The table of `gain.py` as an image: a bar for each arm's mean, a dot for each seed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from sapiens_accel.pose import draw

ERROR_COLORS = [
    (120, 120, 120),
    (90, 140, 200),
    (200, 90, 80),
    (60, 160, 90),
    (230, 170, 60),
    (150, 100, 190),
    (90, 180, 190),
]
HEIGHT, BAR, GAP, LEFT, TOP, BELOW = 420, 46, 60, 60, 40, 150
ENTRY = 130  # px of a name in the legend
FONT = cv2.FONT_HERSHEY_SIMPLEX


def save(cells: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]], path: Path) -> Path:
    """Draw AP by arm, in a group for each number of labels.

    Args:
        cells: of `gain.summary`.
        rows: with `labels`, `arm` and `ap`.
    """
    groups = sorted({cell["labels"] for cell in cells})
    arms = list(dict.fromkeys(cell["arm"] for cell in cells))
    width = LEFT + GAP + len(cells) * BAR + len(groups) * GAP
    canvas = np.full((TOP + HEIGHT + BELOW, width, 3), 255, np.uint8)
    most = 10 * (int(max(row["ap"] for row in rows)) // 10 + 1)
    for value in range(0, most + 1, 10):
        y = TOP + round(HEIGHT * (1 - value / most))
        cv2.line(canvas, (LEFT, y), (width - 20, y), (225, 225, 225), 1)
        _text(canvas, str(value), (18, y + 5))
    x = LEFT + GAP // 2
    for labels in groups:
        first = x
        for cell in (cell for cell in cells if cell["labels"] == labels):
            top = TOP + round(HEIGHT * (1 - cell["ap"] / most))
            color = ERROR_COLORS[arms.index(cell["arm"]) % len(ERROR_COLORS)]
            cv2.rectangle(canvas, (x + 4, top), (x + BAR - 4, TOP + HEIGHT), color, -1)
            _text(canvas, f"{cell['ap']:.1f}", (x + 6, TOP + HEIGHT - 8), (255, 255, 255))
            for row in (row for row in rows if (row["labels"], row["arm"]) == (labels, cell["arm"])):
                y = TOP + round(HEIGHT * (1 - row["ap"] / most))
                cv2.circle(canvas, (x + BAR // 2, y), 4, (0, 0, 0), -1, cv2.LINE_AA)
            x += BAR
        _text(canvas, f"{labels} labels", (first + 4, TOP + HEIGHT + 22))
        x += GAP
    in_a_row = max(1, (width - LEFT) // ENTRY)
    for index, arm in enumerate(arms):
        x, y = LEFT + index % in_a_row * ENTRY, TOP + HEIGHT + 50 + 22 * (index // in_a_row)
        cv2.rectangle(canvas, (x, y - 11), (x + 12, y + 1), ERROR_COLORS[index % len(ERROR_COLORS)], -1)
        _text(canvas, arm, (x + 18, y))
    _text(canvas, "AP of the teacher (drawn people, a tiny network)", (LEFT, 22))
    return draw.save_image(canvas, path)


def _text(canvas: np.ndarray, text: str, at: tuple[int, int], color: tuple[int, int, int] = (40, 40, 40)) -> None:
    cv2.putText(canvas, text, at, FONT, 0.45, color, 1, cv2.LINE_AA)
