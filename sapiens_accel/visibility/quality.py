"""How good the second output is: average precision and calibration error, beside those of the peak as a score."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from numpy import ndarray as Array

from sapiens_accel.pose.oks import calibration_error
from sapiens_accel.visibility.output import OUTPUTS

COLUMNS = ("AP", "AP_of_others", "ECE")


def average_precision(scores: Float[Array, "m"], positive: Bool[Array, "m"]) -> float:
    """The mean over the positive ones of the precision at their score; those of equal score count at once.

    As scikit-learn's `average_precision_score`. nan without a positive one.
    """
    if not positive.any():
        return math.nan
    order = np.argsort(-scores, kind="stable")
    last_of_score = np.append(np.diff(scores[order]) != 0, True)
    found = np.cumsum(positive[order])[last_of_score]
    precision = found / (np.flatnonzero(last_of_score) + 1)
    return float((np.diff(found, prepend=0) * precision).sum() / positive.sum())


def measure_score(scores: Float[Array, "n k"], positive: Bool[Array, "n k"]) -> dict[str, float]:
    """`COLUMNS` of a score: of those that are positive, of the others (by 1 - score), and the calibration error."""
    flat, right = scores.ravel().astype(np.float64), positive.ravel()
    values = average_precision(flat, right), average_precision(-flat, ~right), calibration_error(flat, right)
    return dict(zip(COLUMNS, values, strict=True))


def measure_output(
    probabilities: Float[Array, "n k 2"], peaks: Float[Array, "n k"], labels: Mapping[str, Bool[Array, "n k"]]
) -> dict[str, Any]:
    """Of each of `OUTPUTS` the share of keypoints that are, and `COLUMNS` of the output and of the peak.

    Args:
        labels: by the names of `OUTPUTS`.
    """
    return {
        name: {
            "share": float(labels[name].mean()),
            "output": measure_score(probabilities[..., index], labels[name]),
            "peak": measure_score(peaks, labels[name]),
        }
        for index, name in enumerate(OUTPUTS)
    }


def format_quality(measured: Mapping[str, Any]) -> str:
    """What `measure_output` gives, as text, in percent."""
    lines = [f"{'':<16}{'share':>8}" + "".join(f"{name:>14}" for name in COLUMNS)]
    for name, values in measured.items():
        for by in ("output", "peak"):
            cells = [values["share"], *(values[by][column] for column in COLUMNS)]
            shown = ["-" if math.isnan(one) else f"{100 * one:.1f}" for one in cells]
            label = name if by == "output" else f"{name}, by peak"
            lines.append(f"{label:<16}{shown[0]:>8}" + "".join(f"{one:>14}" for one in shown[1:]))
    return "\n".join(lines)
