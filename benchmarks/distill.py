"""What a fixed teacher is worth to a small student: the same steps with and without its heatmaps.

    python benchmarks/distill.py --seeds 0 1 2

Drawn people and random weights. The teacher has 4 times the width of the tiny student and is trained once, on the
labels of all --people, of which the student has --labels: without pretraining that is what a large network can know
more by. Arms of phase2: `labels`, and `teacher` (--distill.teacher). Arms of stage ssl, from the weights of `labels`:
`ssl_mean` (the mean teacher) and `ssl_teacher` (the fixed one makes the pseudo-labels). Runs of train.py in this
process; AP x 100 on people that were not trained on.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from train_stage import finish_stage, list_options

from sapiens_accel.models.sapiens import SIZES, Size

HERE = Path(__file__).parent
WIDE = "sapiens_tiny_wide"
SIZES[WIDE] = Size(family="sapiens", width=512, depth=4, heads=16, upsample=(128, 64), convs=(64, 64))
COMMON = [
    "--recipe", str(HERE / "ssl.yaml"), "--data.input_hw=[96,64]", "--log_every=100", "--save_every=100000",
    "--augment.rotation=25", "--augment.scale=0.25", "--augment.shift=0.1", "--augment.coarse_dropout_p=0.3",
    "--augment.strong_rotation=12.5", "--augment.strong_scale=0.25", "--augment.strong_shift=0.05",
]  # fmt: skip
ARMS = {"labels": "phase2", "teacher": "phase2", "ssl_mean": "ssl", "ssl_teacher": "ssl"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(0 1 2)")
    parser.add_argument("--arms", nargs="+", default=["labels", "teacher"], choices=ARMS, help="(labels teacher)")
    parser.add_argument("--labels", type=int, default=300, help="labeled people (%(default)s)")
    parser.add_argument("--people", type=int, default=1300, help="that the teacher learns from (%(default)s)")
    parser.add_argument("--steps", type=int, default=1000, help="of each arm (%(default)s)")
    parser.add_argument("--teacher_steps", type=int, default=2000, help="%(default)s")
    parser.add_argument("--weight", type=float, default=1.0, help="--distill.weight (%(default)s)")
    parser.add_argument("--work", help="folder of runs; what is finished there is not repeated (a temporary one)")
    parser.add_argument("--out", default=str(HERE / "results" / "distill_cpu.json"), help="%(default)s")
    asked = parser.parse_args()
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(asked.work or temporary).resolve()
        drawn = [f"--data.synthetic.num_train={asked.people}", "--data.synthetic.num_unlabelled=0"]
        people = [*drawn, f"--data.labels={asked.labels}"]
        wide = [f"--model.name={WIDE}", f"--phase2.steps={asked.teacher_steps}", "--phase2.optim.lr=1e-3"]
        of_teacher = finish_stage(work / "wide", "phase2", [*COMMON, *drawn, *wide, "--seed=100"])
        distill = [f"--distill.teacher={work / 'wide' / 'phase2' / 'weights'}", f"--distill.weight={asked.weight}"]
        for seed in asked.seeds:
            start = f"--weights={work / f'labels_{seed}' / 'phase2' / 'weights'}"
            for arm in asked.arms:
                stage = ARMS[arm]
                words = [*people, f"--seed={seed}", f"--{stage}.steps={asked.steps}", "--ssl.teacher.on_alarm=warn"]
                words += distill if arm.endswith("teacher") else []
                words += [start] if stage == "ssl" else []
                ap = finish_stage(work / f"{arm}_{seed}", stage, [*COMMON, *words])
                rows.append({"seed": seed, "arm": arm, "AP": ap})
                print(f"RESULT {arm} seed {seed}: AP {ap:.1f} (of the teacher {of_teacher:.1f})", flush=True)
                tree = {"options": list_options(asked), "AP_of_teacher": of_teacher, "rows": rows}
                Path(asked.out).write_text(json.dumps(tree, indent=1))
    for arm in asked.arms:
        values = [float(str(row["AP"])) for row in rows if row["arm"] == arm]
        print(f"{arm:<12} {statistics.mean(values):5.1f}  ({', '.join(f'{value:.1f}' for value in values)})")


if __name__ == "__main__":
    main()
