"""Evaluate: a run's weights and validation people to the COCO table, and pictures.

python eval.py RUN_DIR [--stage ssl] [--data.root DIR] [--eval.flip false] [any other option of the run]
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from sapiens_accel import config, data, draw, evaluate, report, weights
from sapiens_accel.config import STAGES, UserError
from sapiens_accel.heatmap import Codec
from sapiens_accel.model import SapiensPose
from sapiens_accel.skeleton import COCO17 as SKELETON


def main(argv: Sequence[str]) -> None:
    if not argv or argv[0].startswith("-"):
        raise UserError("expected the run folder first: python eval.py RUN_DIR [--stage ssl] [--data.root DIR]")
    folder, device = Path(argv[0]), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder}: no config.yaml in it; expected a run folder of train.py")
    run = config.load(argv[1:], prog="eval.py", base=folder / "config.yaml")
    people = data.open_people(run.data, SKELETON, unlabelled=False).split(run.eval.split)
    table = {}
    for stage in STAGES if run.stage == "all" else (run.stage,):
        weights_dir = folder / stage / "weights"
        if not (weights_dir / weights.FILE).is_file():
            continue
        network = weights.description(weights_dir)
        model = SapiensPose(network["name"], network["num_keypoints"], tuple(network["input_hw"])).to(device)
        weights.load(model, str(weights_dir))
        codec = Codec(input_hw=model.input_hw, heatmap_hw=model.heatmap_hw, sigma=network["sigma"])
        predictions = evaluate.predict(model, people, codec, SKELETON, run.data, run.eval, device=device)
        table[stage] = evaluate.coco_ap(predictions, people, SKELETON, run.data, run.eval)
        (folder / stage / "eval.json").write_text(json.dumps({**table[stage], **evaluate.how(run.eval)}, indent=2))
        picture = report.prediction_picture(predictions, people, SKELETON, run.eval.num_pictures)
        print(f"picture: {draw.save(picture, folder / 'pictures' / f'{stage}_{run.eval.split}_predictions.jpg')}")
    if not table:
        raise UserError(f"{folder}: no weights of {run.stage} in it; expected STAGE/weights/{weights.FILE}")
    print(f"\n{evaluate.table(table, evaluate.protocol(run.eval))}")


if __name__ == "__main__":
    config.guarded(main)
