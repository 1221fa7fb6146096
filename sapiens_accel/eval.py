"""Evaluate the stages of a run, weights of any layout or weights on the Hub by COCO metrics, or predict on images.

python eval.py WEIGHTS|RUN_DIR|HUB_REPO [more of them] [--data.root DIR] [--boxes gt|FILE] [--flip false]
    [--scales 0.5 1.0 1.5 2.0] [--ensemble] [--compare] [--save_predictions FILE] [--csv long|deeplabcut]
    [--pictures N] [--worst N] [--html [FILE]] [any option of a run]
python eval.py WEIGHTS|RUN_DIR|HUB_REPO --images IMAGE|FOLDER|VIDEO [--boxes FILE|detector|NAME] [any of the above]
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sapiens_accel import cli
from sapiens_accel.config import commands
from sapiens_accel.config import parse as config
from sapiens_accel.errors import UserError, run_main

if __name__ == "__main__":
    config.answer_help(sys.argv[1:], "eval.py", __doc__ or "")  # before imports that take seconds
    cli.prepare_program("eval")

from sapiens_accel.config.schema import Config, EvalConfig
from sapiens_accel.data import build
from sapiens_accel.data.people import People
from sapiens_accel.evaluation import evaluate as evaluation
from sapiens_accel.evaluation import figures, html_report, keypoint_csv, networks
from sapiens_accel.evaluation.evaluate import EvaluationResult, Metrics
from sapiens_accel.evaluation.figures import ErrorAnalysis
from sapiens_accel.evaluation.networks import Candidate
from sapiens_accel.evaluation.predict import PoseNetwork, PredictionSetup
from sapiens_accel.inference import predict_media
from sapiens_accel.pose import draw
from sapiens_accel.pose.skeleton import Skeleton
from sapiens_accel.runtime import distributed, failures
from sapiens_accel.runtime.launch import Precision

if TYPE_CHECKING:
    from accelerate import Accelerator


def evaluate(
    weights: str | Path | Config | Sequence[str | Path],
    overrides: Mapping[str, Any] | None = None,
    mixed_precision: Precision | None = None,
) -> dict[str, Metrics]:
    """Evaluate weights on labeled people in this process, as `eval.py WEIGHTS` does; for scripts and notebooks.

    Several processes: `accelerate.notebook_launcher(evaluate, (WEIGHTS, OVERRIDES), num_processes=2)`.

    Args:
        weights: a run directory, weights or a repository on the Hub, or several of these; the name of a recipe: its
            run directory; or a Config: its run directory, evaluated with these options.
        overrides: options by their names on eval.py's command line: {"data.root": "DIR", "flip": False}.
        mixed_precision: no, bf16 or fp16. Default: that of the launch, which is no (fp32) without a launcher.

    Returns:
        The metrics of each row of the table: a stage of a run, or weights by their name, ", flip" and such with
        `compare`. AP and others of `evaluation.evaluate.METRICS`, 0..1; distances in px of the image.

    Raises:
        UserError: what the user can fix, in one line.
    """
    short = commands.evaluation_options()
    words = config.to_words({short.get(name, name): value for name, value in (overrides or {}).items()})
    with distributed.use_in_process(mixed_precision):
        if isinstance(weights, Config):
            return run_evaluation([weights.output_dir], words, base=weights)
        several = [weights] if isinstance(weights, str | Path) else weights
        return run_evaluation([_find_run(str(one)) for one in several], words)


def _find_run(reference: str) -> str:
    """The run directory of a recipe that is given by its name; any other reference as it is."""
    if Path(reference).exists() or reference not in config.list_recipes():
        return reference
    return config.load(["--recipe", reference]).output_dir


def main(argv: Sequence[str]) -> None:
    run_evaluation(*commands.parse_evaluation(argv))


def run_evaluation(references: Sequence[str], words: Sequence[str], base: Config | None = None) -> dict[str, Metrics]:
    """Start this launch's Accelerator, and evaluate or predict.

    Args:
        words: options on a command line.
        base: the options that they change. Default: those of the run that the first weights are of.
    """
    accelerator = distributed.start()
    paths = failures.on_main_first(accelerator, lambda: [networks.resolve_path(reference) for reference in references])
    # Every stage that has weights, unless one is named; not the stage of the run's config.yaml.
    run = config.load(["--stage=all", *words], prog="eval.py", base=base or networks.find_run_config(paths[0]))
    run, dropped = (run, []) if base else networks.drop_outputs(run, words)
    if dropped:
        accelerator.print(f"note: {', '.join(dropped)} of the run's config.yaml: not taken; give it to eval.py itself")
    output = Path(run.output_dir) if any(word.startswith("--output_dir") for word in words) else None
    candidates = [one for path in paths for one in networks.list_weights(path, run, output)]
    if run.eval.ensemble and len(candidates) < 2:
        raise UserError(
            f"--eval.ensemble: only one network, {candidates[0].weights}. Give the weights of several networks"
        )
    run, bits = networks.adopt_image_bits(candidates, run)
    given = any(word.partition("=")[0] == "--data.box_padding" for word in words)
    run, padding = networks.adopt_box_padding(candidates, run, given=given)
    for line in filter(None, [bits, padding]):
        accelerator.print(line)
    if run.eval.images:
        predict_media.predict_media(accelerator, candidates, run)
        return {}
    return evaluate_people(accelerator, candidates, run)


def evaluate_people(accelerator: "Accelerator", candidates: Sequence[Candidate], run: Config) -> dict[str, Metrics]:
    """Evaluate each network, and the ensemble of all with --eval.ensemble, on the same people."""
    if run.eval.smooth:
        raise UserError("--eval.smooth: labeled images are no video (expected --images VIDEO)")
    if run.eval.csv and Path(run.eval.save_predictions or "").suffix.lower() == ".csv":
        raise UserError(
            f"--eval.save_predictions {run.eval.save_predictions}: --eval.csv writes its table there (expected the "
            "name of a JSON). Name it .json"
        )
    people, skeleton = open_people(accelerator, candidates, run)
    run = run if skeleton.mirror_known else run.without_mirroring()
    results: dict[str, EvaluationResult] = {}
    configs: dict[str, EvalConfig] = {}
    analyses: dict[str, ErrorAnalysis] = {}
    images: list[Path] = []
    tables: list[Path] = []
    for group in [*([one] for one in candidates), *([candidates] if run.eval.ensemble else [])]:
        name = networks.choose_name(group, candidates)
        loaded = networks.build_networks(accelerator, group, run, skeleton)
        for variant, config_of_row in networks.list_variants(run.eval, skeleton.mirror_known):
            row = ", ".join(filter(None, [name, variant]))
            if run.eval.save_predictions and (variant or len(candidates) > 1):
                file = evaluation.predictions_path(run.eval.save_predictions, row)
                config_of_row = replace(config_of_row, save_predictions=str(file))
            results[row] = evaluation.evaluate_networks(accelerator, loaded, people, skeleton, run.data, config_of_row)
            configs[row] = config_of_row
            if config_of_row.save_predictions:
                tables.append(Path(config_of_row.save_predictions))
            if run.eval.csv and accelerator.is_main_process:
                tables.append(write_predictions(results[row], config_of_row, candidates[0].folder, row, skeleton))
        if accelerator.is_main_process:
            row = list(results)[-1]  # the variant with all augmentation
            setup = PredictionSetup(skeleton=skeleton, data=run.data, config=configs[row], device=accelerator.device)
            folder, stem = group[0].folder / "pictures", f"{name}_{run.eval.split}"
            analyses[row], files = draw_images(results[row], people, loaded, setup, folder, stem)
            images += files
    if accelerator.is_main_process:
        folder = candidates[0].folder
        evaluation.save_metrics(folder / "eval.json", results, configs, skeleton)
        summary = evaluation.format_summary(results, run.eval, skeleton)
        print(f"\n{summary}", *figures.format_worst_people(analyses), sep="\n\n")
        print("\nimages:", *images, sep="\n  ")
        if tables:
            print("\npredictions:", *tables, sep="\n  ")
        if run.eval.html:
            weights = [f"{one.name}: weights of {one.weights}" for one in candidates]
            lines = [f"people of {people.annotations}", *weights, *networks.read_summaries(candidates)]
            about = html_report.About(lines, networks.read_pseudo_labels(candidates))
            file = html_report.report_path(run.eval.html, folder)
            print(f"\npage: {html_report.write_report(file, results, configs, analyses, skeleton, about)}")
    return {row: result.metrics for row, result in results.items()}


def draw_images(
    result: EvaluationResult,
    people: People,
    loaded: Sequence[PoseNetwork],
    setup: PredictionSetup,
    folder: Path,
    stem: str,
) -> tuple[ErrorAnalysis, list[Path]]:
    """The analysis of one row of the table, and the images of it that are saved: predictions and the worst people."""
    files: list[Path] = []
    if num := setup.config.num_pictures:
        grid = figures.draw_predictions(result.predictions, people, setup.skeleton, num)
        files.append(draw.save_image(grid, folder / f"{stem}_predictions.jpg"))
    analysis = figures.analyze_networks(result, people, loaded, setup)
    return analysis, files + figures.save_figures(analysis, folder, f"{stem}_worst")


def write_predictions(result: EvaluationResult, config: EvalConfig, folder: Path, row: str, skeleton: Skeleton) -> Path:
    """The CSV of one row of the table: beside the JSON of --save_predictions, else in the folder of the results."""
    json_file = config.save_predictions
    file = (
        Path(json_file).with_suffix(".csv") if json_file else evaluation.predictions_path(folder / "keypoints.csv", row)
    )
    return keypoint_csv.write_csv(file, skeleton.names, config.csv or "long", result.image_rows)


def open_people(accelerator: "Accelerator", candidates: Sequence[Candidate], run: Config) -> tuple[People, Skeleton]:
    """The labeled people, and the keypoints of theirs that all weights have."""

    def open_split() -> tuple[People, Skeleton, str]:
        files = build.locate_files(run.data)
        annotations = files.val_annotations if run.eval.split == "val" else files.train_annotations
        root, cache = build.prepare_root(files)
        skeleton, note = networks.choose_skeleton(candidates, root / annotations, files.category, cache)
        people = evaluation.use_areas(build.open_split(run.data, skeleton, run.eval.split), run.eval)
        return people, skeleton, note

    people, skeleton, note = failures.on_main_first(accelerator, open_split)
    if note:
        accelerator.print(note)
    return people, skeleton


if __name__ == "__main__":
    run_main(main)
    distributed.stop()
