"""Evaluate: a run's weights and people to the COCO table, and pictures.

python eval.py RUN_DIR [--stage ssl] [--data.root DIR] [--eval.flip false] [any other option of the run]
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

# Ours first: sapiens_accel sets how threads wait, which torch reads when it is loaded.
from sapiens_accel import config, data, distributed, draw, evaluate, report, weights
from sapiens_accel.config import UserError
from sapiens_accel.heatmap import Codec
from sapiens_accel.model import SapiensPose
from sapiens_accel.skeleton import COCO17 as SKELETON


def main(argv: Sequence[str]) -> None:
    if not argv or argv[0].startswith("-"):
        raise UserError("expected the run folder first: python eval.py RUN_DIR [--stage ssl] [--data.root DIR]")
    folder = Path(argv[0])
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder}: no config.yaml in it; expected a run folder of train.py")
    # All stages that have weights, unless one is asked for; whatever the last training was asked for.
    run = config.load(["--stage=all", *argv[1:]], prog="eval.py", base=folder / "config.yaml")
    stages = [stage for stage in run.stages if (folder / stage / "weights" / weights.FILE).is_file()]
    if not stages:
        raise UserError(f"{folder}: no weights of {run.stage} in it; expected STAGE/weights/{weights.FILE}")
    accelerator = distributed.start()
    with accelerator.main_process_first():
        people = data.open_people(run.data, SKELETON, unlabelled=False).split(run.eval.split)
    table, pictures = {}, []
    for stage in stages:
        network = weights.description(folder / stage / "weights")
        model = SapiensPose(network["name"], network["num_keypoints"], tuple(network["input_hw"]))
        weights.load(model, str(folder / stage / "weights"))
        codec = Codec(input_hw=model.input_hw, heatmap_hw=model.heatmap_hw, sigma=network["sigma"])
        model.to(accelerator.device)
        seen = dataclasses.replace(run.data, input_hw=model.input_hw)  # what these weights were trained on
        table[stage], found = evaluate.score(accelerator, model, people, codec, SKELETON, seen, run.eval)
        picture = report.prediction_picture(found, people, SKELETON, run.eval.num_pictures)
        pictures.append((picture, folder / "pictures" / f"{stage}_{run.eval.split}_predictions.jpg"))
    if accelerator.is_main_process:
        file = folder / "eval.json"
        rows = json.loads(file.read_text()) if file.is_file() else {}
        rows |= {stage: {**metrics, **evaluate.how(run.eval)} for stage, metrics in table.items()}
        file.write_text(json.dumps(rows, indent=2))
        saved = [str(draw.save(*picture)) for picture in pictures]
        print(f"\n{evaluate.table(table, evaluate.protocol(run.eval))}\n\npictures:", *saved, sep="\n  ")


if __name__ == "__main__":
    config.guarded(main)
    distributed.stop()
