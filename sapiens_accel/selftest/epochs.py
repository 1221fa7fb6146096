"""Predict the time of an epoch of COCO for each recipe, from the rates that the other checks have measured.

python -m sapiens_accel.selftest.epochs RESULT.json OUT      OUT: folder of the checks
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from sapiens_accel.config import parse as config
from sapiens_accel.config.schema import Config
from sapiens_accel.errors import run_main
from sapiens_accel.memory.duration import part_flops
from sapiens_accel.pose.skeleton import COCO17 as SKELETON
from sapiens_accel.selftest.checks import Result, Row, Skipped

COCO_PEOPLE = 149_813  # with labeled keypoints in train2017


def epoch_rows(rates: Mapping[str, float], hw: tuple[int, int], recipes: Mapping[str, Config]) -> Iterator[Row]:
    """Predict the hours of an epoch over the labeled people of COCO, by recipe and stage.

    From the measured phase2 rate of the most similar size, assuming equal FLOP/s. With F and H operations in a forward
    of backbone and head, an epoch takes F + 3 H a person in phase1, 3 (F + H) in phase2, and in ssl 3 (F + H) for each
    labeled and unlabeled person and F + H for the teacher, in the mean of its steps. Recomputation is assumed to be
    proportional.

    Args:
        rates: people a second in phase2 by model, measured with crops of `hw` px.
    """
    k = SKELETON.num_keypoints
    flops = {model: part_flops(model, k, hw).whole for model in rates}
    for recipe, run in recipes.items():
        parts = part_flops(run.model.name, k, run.data.input_hw)
        whole = parts.whole
        # The most similar in FLOPs, since larger networks reach a higher utilization.
        nearest = min(rates, key=lambda model: abs(flops[model] / whole - 1) + abs(whole / flops[model] - 1))
        per_second = rates[nearest] * 3 * flops[nearest]
        work = {
            "phase1": parts.backbone + 3 * parts.head,
            "phase2": 3 * whole,
            "ssl": (3 + 4 * run.ssl.mean_ratio) * whole,
        }
        hours = {stage: round(COCO_PEOPLE * flop / per_second / 3600, 2) for stage, flop in work.items()}
        text = ", ".join(f"{stage} {value:g} h" for stage, value in hours.items())
        yield {
            "name": f"epoch of {recipe}",
            "status": "passed",
            "text": f"predicted from {nearest}: {text}",
            "predicted": True,
            "hours": hours,
            "from": nearest,
        }


def measured_rates(out: Path) -> tuple[dict[str, float], tuple[int, int]]:
    """People a second in phase2 by model, as measured by the checks in this folder, and the size of their crops.

    Raises:
        Skipped: no rate was measured.
    """
    rows = [row for path in sorted(out.glob("*/result.json")) for row in json.loads(path.read_text())]
    measured = [row for row in rows if row.get("phase2_rate")]
    if not measured:
        raise Skipped("no rate was measured")
    return {row["model"]: row["phase2_rate"] for row in measured}, tuple(measured[-1]["input_hw"])


def main(words: Sequence[str]) -> None:
    path, out = words
    result = Result(Path(path))
    with result.guard("epochs"):
        rates, measured_hw = measured_rates(Path(out))
        folder = Path(config.__file__).parents[1] / "recipes"
        names = [path.stem for path in sorted(folder.glob("*_coco*.yaml"))]
        recipes = {name: config.load(["--recipe", name]) for name in names}
        for row in epoch_rows(rates, measured_hw, recipes):
            result.add(row)


if __name__ == "__main__":
    run_main(main)
