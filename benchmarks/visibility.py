"""What the second output (--model.visibility) is worth beside the peak of the heatmap as a score.

    python benchmarks/visibility.py --seeds 0 1 2

The tiny network, trained on drawn people, whose occlusion is known, and then on 80 images of COCO, whose v people gave
(--coco FOLDER). Of present (v > 0) and visible (v 2): average precision, that of the others by 1 - score, and expected
calibration error, x 100, of the output; of the peak; and of the best use of the peak alone that we know: a logistic
regression with an offset for each keypoint. Output and regression are fitted on the people that were trained on; both
are calibrated on one half of the validation people and measured on the other half, and the other way round.

The network's own AP is the same with and without the output, which it does not learn from
(tests/training/test_visibility.py).
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from train_stage import finish_stage, list_options

from sapiens_accel.config import parse as config
from sapiens_accel.data import build
from sapiens_accel.evaluation import evaluate, networks
from sapiens_accel.evaluation.predict import PredictionSetup
from sapiens_accel.visibility import quality, regression
from sapiens_accel.visibility.output import OUTPUTS
from sapiens_accel.visibility.regression import DescribedPeople

HERE = Path(__file__).parent
COMMON = [
    "--recipe", str(HERE / "ssl.yaml"), "--log_every=100", "--save_every=100000", "--data.synthetic.num_unlabelled=20",
    "--data.input_hw=[96,64]", "--augment.rotation=25", "--augment.scale=0.25", "--augment.shift=0.1",
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=800, help="on drawn people (%(default)s)")
    parser.add_argument("--coco", help="COCO images to train on after the drawn people; default: none")
    parser.add_argument("--coco_steps", type=int, default=300, help="%(default)s")
    parser.add_argument("--work", help="folder of runs; what is finished there is not repeated (a temporary one)")
    parser.add_argument("--out", default=str(HERE / "results" / "visibility_cpu.json"), help="%(default)s")
    asked = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(asked.work or temporary).resolve()
        for seed in asked.seeds:
            drawn = [f"--seed={seed}", f"--phase2.steps={asked.steps}"]
            cases = {"drawn": drawn}
            if asked.coco:
                start = f"--weights={work / f'drawn_{seed}' / 'phase2' / 'weights'}"
                root = f"--data.root={Path(asked.coco).resolve()}"
                cases["coco"] = [f"--seed={seed}", start, root, f"--phase2.steps={asked.coco_steps}"]
            for case, words in cases.items():
                folder = work / f"{case}_{seed}"
                rows.append(
                    {
                        "people": case,
                        "seed": seed,
                        "AP": finish_stage(folder, "phase2", [*COMMON, *words]),
                        "scores": measure(folder),
                    }
                )
                print("RESULT", json.dumps(rows[-1]), flush=True)
                Path(asked.out).write_text(json.dumps({"options": list_options(asked), "rows": rows}, indent=1))
    print(format_rows(rows))


def measure(folder: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Of each output and each score `quality.COLUMNS`, of a run's weights on its validation people."""
    accelerator = Accelerator(cpu=True)
    run = config.load([], base=folder / "config.yaml")
    (candidate,) = networks.list_weights(folder, run, None)
    skeleton, _ = build.open_skeleton(run.data)
    sets = build.open_people(run.data, skeleton, unlabeled=False)
    network, _ = networks.build_network(candidate, run, skeleton, accelerator.device)
    setup = PredictionSetup(skeleton=skeleton, data=run.data, config=run.eval, device=accelerator.device)
    people, others = (evaluate.describe_people(accelerator, network, some, setup) for some in (sets.train, sets.val))
    about = regression.learn(people, others, skeleton.names).about["quality"]
    by_peak = calibrate_peak(people, others)
    return {
        name: {"output": about[name]["output"], "peak": about[name]["peak"], "peak, calibrated": by_peak[name]}
        | {"share": {"share": about[name]["share"]}}
        for name in OUTPUTS
    }


def calibrate_peak(people: DescribedPeople, others: DescribedPeople) -> dict[str, dict[str, float]]:
    """The peak's logistic regression with an offset for each keypoint, calibrated as the output is."""
    halves = [others.take(slice(start, None, 2)) for start in (0, 1)]
    measured = {}
    for name in OUTPUTS:
        fitted = regression.fit_calibration(
            people.peaks, getattr(people, name).numpy(), np.ones(people.peaks.shape, bool)
        )
        scores, labels = [], []
        for half, calibrating in zip(halves, halves[::-1], strict=True):
            logits, mine = (
                torch.from_numpy(one.peaks) * fitted[0] + fitted[1] + fitted[2:] for one in (half, calibrating)
            )
            right = getattr(calibrating, name).numpy().reshape(-1, 1)
            slope, intercept, offset = regression.fit_calibration(
                mine.numpy().reshape(-1, 1), right, np.ones_like(right)
            )
            scores.append((slope * logits + intercept + offset).sigmoid().numpy())
            labels.append(getattr(half, name).numpy())
        measured[name] = quality.measure_score(np.concatenate(scores), np.concatenate(labels))
    return measured


def format_rows(rows: Sequence[dict[str, Any]]) -> str:
    """The table in docs/visibility.md: means over seeds."""
    lines = [
        "| people | | share | score | " + " | ".join(quality.COLUMNS) + " |",
        "|---" * (4 + len(quality.COLUMNS)) + "|",
    ]
    for case in dict.fromkeys(row["people"] for row in rows):
        for name in OUTPUTS:
            several = [row["scores"][name] for row in rows if row["people"] == case]
            share = statistics.mean(one["share"]["share"] for one in several)
            for score in ("output", "peak", "peak, calibrated"):
                cells = [100 * statistics.mean(one[score][column] for one in several) for column in quality.COLUMNS]
                lines.append(
                    f"| {case} | {name} | {100 * share:.1f} | {score} | " + " | ".join(f"{c:.1f}" for c in cells) + " |"
                )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
