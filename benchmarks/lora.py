"""What adapters learn, against all weights and against the head alone, at equal steps and from the same weights.

    python benchmarks/lora.py --seeds 0 1 2 --real DIR      DIR: the folder of mirror_mouse

The tiny network, trained on drawn people, is fine-tuned to a real laboratory mouse, and to other drawn people. Runs of
train.py in this process; AP x 100 on people or frames that were not trained on, by arm, seed by seed.
"""

import argparse
import json
import shutil
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

from gain import mouse_frames
from train_stage import train_stage

HERE = Path(__file__).parent
STEPS, FIRST = 200, 500  # of an arm, and of the training before it
COMMON = [
    "--recipe", str(HERE / "ssl_mouse.yaml"), "--log_every=100", "--report_to=none", "--eval.num_pictures=0",
    "--eval.num_worst=0", "--save_every=100000", "--data.num_workers=0",
]  # fmt: skip
DRAWN = ["--data.synthetic.num_train=300", "--data.synthetic.num_val=200", "--data.synthetic.num_unlabelled=0"]
ARMS = {
    "phase1": ["--stage=phase1"],
    "full": ["--stage=phase2"],
    "lora_4": ["--stage=phase2", "--lora.rank=4"],
    "lora_16": ["--stage=phase2", "--lora.rank=16"],
    "lora_16_attention": ["--stage=phase2", "--lora.rank=16", "--lora.target=attention"],
    "dora_16": ["--stage=phase2", "--lora.rank=16", "--lora.dora"],
}
SAME = {"loss_weight": "100", "optim.lr": "2.5e-3", "optim.layer_decay": "1", "optim.warmup_steps": "20"}


def run(folder: Path, steps: int, words: Sequence[str]) -> float:
    """AP of a stage; its weights are in the folder."""
    stage = next(word.split("=")[1] for word in words if word.startswith("--stage="))
    plan = {**SAME, "steps": str(steps), "global_batch": "8", "optim.schedule": "cosine"}
    options = (f"--{stage}.{key}={value}" for key, value in plan.items())
    return train_stage(folder, stage, [*COMMON, *words, *options])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    shared = str(HERE.parent.parent / "shared" / "data")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--targets", nargs="+", default=["mouse", "drawn"], help="%(default)s")
    parser.add_argument("--real", default=shared, help="the folder of mirror_mouse (%(default)s)")
    parser.add_argument("--out", default=str(HERE / "results" / "lora_cpu.json"), help="%(default)s")
    asked = parser.parse_args()
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as work:
        for seed in asked.seeds:
            folder = Path(work) / str(seed)
            mouse = mouse_frames(folder / "frames", 60, seed, Path(asked.real) / "mirror_mouse")
            data = {"drawn": [*DRAWN, f"--data.synthetic.seed={seed}"], "mouse": mouse}
            before = run(
                folder / "base",
                FIRST,
                [f"--seed={seed}", *DRAWN, f"--data.synthetic.seed={100 + seed}", "--stage=phase2"],
            )
            start = f"--weights={folder / 'base' / 'phase2' / 'weights'}"
            for target in asked.targets:
                for arm, options in ARMS.items():
                    ap = run(folder / f"{target}-{arm}", STEPS, [f"--seed={seed}", *data[target], start, *options])
                    rows.append({"seed": seed, "target": target, "arm": arm, "AP": ap, "AP_base": before})
                    print(f"RESULT {target} {arm} seed {seed}: AP {ap:.1f}", flush=True)
                    Path(asked.out).write_text(json.dumps({"steps": STEPS, "first": FIRST, "rows": rows}, indent=1))
            shutil.rmtree(folder)
    for target in asked.targets:
        for arm in ARMS:
            values = [float(str(row["AP"])) for row in rows if (row["target"], row["arm"]) == (target, arm)]
            print(f"{target:>6} {arm:<18} {statistics.mean(values):5.1f}  ({', '.join(f'{v:.1f}' for v in values)})")


if __name__ == "__main__":
    main()
