"""Evaluate: a run's stages, weights of any layout or a name on the Hub to the COCO table, and pictures.

python eval.py WEIGHTS|RUN_DIR|HUB_REPO [more of them] [--data.root DIR] [--boxes gt|FILE] [--flip false]
    [--scales 0.5 1.0 1.5 2.0] [--ensemble] [--compare] [--save_predictions FILE] [--pictures N] [--worst N]
    [--html [FILE]] [any option of a run]
python eval.py WEIGHTS|RUN_DIR|HUB_REPO --images PICTURE|FOLDER|VIDEO [--boxes FILE|detector|NAME] [any of the above]
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from sapiens_accel.config import parse as config

if __name__ == "__main__":
    config.answer_help(sys.argv[1:], "eval.py", __doc__)  # before imports that take seconds

from sapiens_accel.data import build
from sapiens_accel.errors import UserError, run_main
from sapiens_accel.evaluation import evaluate
from sapiens_accel.evaluation import figures as cases
from sapiens_accel.evaluation import html_report as page

# Ours first: sapiens_accel sets how threads wait, which torch reads when it is loaded.
from sapiens_accel.evaluation import networks as candidates
from sapiens_accel.evaluation.evaluate import Judgement
from sapiens_accel.inference import predict_media as own
from sapiens_accel.pose import draw
from sapiens_accel.runtime import distributed


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
    if run.eval.images:
        return own.look(accelerator, several, run)
    with accelerator.main_process_first():
        files = build.located(run.data)
        annotations = files.val_annotations if run.eval.split == "val" else files.train_annotations
        root, cache = build.places(files)
        skeleton, told = candidates.skeleton_of(several, root / annotations, files.category, cache)
        people = build.open_split(run.data, skeleton, run.eval.split)
    if told:
        accelerator.print(told)
    autocast = distributed.autocast_dtype(accelerator)
    rows: dict[str, Judgement] = {}
    hows, findings, pictures = {}, {}, []
    for group in [*([one] for one in several), *([several] if run.eval.ensemble else [])]:
        name = candidates.name_of(group, several)
        built = [candidates.network(one, run, skeleton, accelerator.device, autocast) for one in group]
        accelerator.print(*(told for _, told in built), sep="\n")
        networks = [network for network, _ in built]
        for variant, how in candidates.variants(run.eval):
            row = ", ".join(filter(None, [name, variant]))
            file_name = row if variant or len(several) > 1 else ""
            rows[row] = evaluate.judge(accelerator, networks, people, skeleton, run.data, how, file_name)
            hows[row] = how
        if not accelerator.is_main_process:
            continue
        row = list(rows)[-1]  # with all augmentation that is asked for
        folder, stem = group[0].folder / "pictures", f"{name}_{run.eval.split}"
        if run.eval.num_pictures:
            picture = cases.prediction_picture(rows[row].predictions, people, skeleton, run.eval.num_pictures)
            pictures.append(draw.save(picture, folder / f"{stem}_predictions.jpg"))
        findings[row] = cases.of_networks(
            rows[row], people, skeleton, networks, run.data, hows[row], device=accelerator.device
        )
        pictures += cases.save(findings[row], folder, f"{stem}_worst")
    if accelerator.is_main_process:
        evaluate.record(several[0].folder / "eval.json", rows, hows, skeleton)
        print(f"\n{evaluate.summary(rows, run.eval, skeleton)}", *cases.told(findings), sep="\n\n")
        print("\npictures:", *pictures, sep="\n  ")
        if run.eval.html:
            about = [f"people of {people.annotations}", *(f"{one.name}: weights of {one.weights}" for one in several)]
            print(f"\npage: {page.write(run.eval.html, several[0].folder, rows, hows, findings, skeleton, about)}")


if __name__ == "__main__":
    run_main(main)
    distributed.stop()
