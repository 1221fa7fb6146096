"""Evaluate: a run's stages, weights of any layout or a name on the Hub to the COCO table, and pictures.

python eval.py WEIGHTS|RUN_DIR|HUB_REPO [more of them] [--data.root DIR] [--boxes gt|FILE] [--flip false]
    [--scales 0.5 1.0 1.5 2.0] [--ensemble] [--compare] [--save_predictions FILE] [--pictures N] [any option of a run]
"""

from collections.abc import Sequence
from pathlib import Path

# Ours first: sapiens_accel sets how threads wait, which torch reads when it is loaded.
from sapiens_accel import candidates, config, data, distributed, draw, evaluate, report
from sapiens_accel.config import UserError
from sapiens_accel.evaluate import Judgement


def main(argv: Sequence[str]) -> None:
    references, words = candidates.split_words(argv)
    accelerator = distributed.start()
    with accelerator.main_process_first():
        paths = [candidates.local(reference) for reference in references]
    # All stages that have weights, unless one is asked for; whatever the last training was asked for.
    base = candidates.run_config(paths[0])
    run = config.load(["--stage=all", *words], prog="eval.py", base=base)
    output = Path(run.output_dir) if any(word.startswith("--output_dir") for word in words) else None
    several = [one for path in paths for one in candidates.candidates(path, run, output)]
    if run.eval.ensemble and len(several) < 2:
        raise UserError(f"--eval.ensemble: of {several[0].weights} alone; give the weights of several networks")
    with accelerator.main_process_first():
        files = data.located(run.data)
        annotations = files.val_annotations if run.eval.split == "val" else files.train_annotations
        skeleton = candidates.skeleton_of(several, data.places(files)[0] / annotations)
        people = data.open_split(run.data, skeleton, run.eval.split)
    autocast = distributed.autocast_dtype(accelerator)
    rows: dict[str, Judgement] = {}
    hows, pictures = {}, []
    for group in [*([one] for one in several), *([several] if run.eval.ensemble else [])]:
        name = candidates.name_of(group, several)
        built = [candidates.network(one, run, skeleton, accelerator.device, autocast) for one in group]
        accelerator.print(*(told for _, told in built), sep="\n")
        for variant, how in candidates.variants(run.eval):
            row = ", ".join(filter(None, [name, variant]))
            file_name = row if variant or len(several) > 1 else ""
            networks = [network for network, _ in built]
            rows[row] = evaluate.judge(accelerator, networks, people, skeleton, run.data, how, file_name)
            hows[row] = how
        if accelerator.is_main_process and run.eval.num_pictures:
            found = list(rows.values())[-1].predictions
            picture = report.prediction_picture(found, people, skeleton, run.eval.num_pictures)
            pictures.append((picture, group[0].folder / "pictures" / f"{name}_{run.eval.split}_predictions.jpg"))
    if accelerator.is_main_process:
        evaluate.record(several[0].folder / "eval.json", rows, hows, skeleton)
        saved = [str(draw.save(*picture)) for picture in pictures]
        print(f"\n{evaluate.summary(rows, run.eval, skeleton)}\n\npictures:", *saved, sep="\n  ")


if __name__ == "__main__":
    config.guarded(main)
    distributed.stop()
