"""Train the stages of a run: build, step, log, save and evaluate each, and pass its weights to the next one.

accelerate launch train.py                                                          the demo: no data, no GPU needed
accelerate launch --config_file accelerate_configs/zero2.yaml train.py --recipe sapiens_1b_coco --data.root DIR
accelerate launch -m sapiens_accel.train                                            without a checkout

In Python the module itself is the function `train`: `from sapiens_accel import train`, then `train("demo")`.
"""

import importlib
import shlex
import sys
from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from functools import partial, update_wrapper
from pathlib import Path
from signal import Signals
from types import ModuleType
from typing import Any

from sapiens_accel import cli
from sapiens_accel.config import parse as config
from sapiens_accel.errors import Interrupted, resume_command, run_main

if __name__ == "__main__":
    config.answer_help(sys.argv[1:], "train.py")  # before imports that take seconds
    cli.prepare_program("train")

from accelerate import Accelerator

from sapiens_accel.config.schema import ALL, RANDOM, TENSORBOARD, Config, StageName
from sapiens_accel.data import augment, build, sampling
from sapiens_accel.data.dataset import Sets
from sapiens_accel.data.unlabeled import NoUnlabeledPeople
from sapiens_accel.doctor import report as doctor
from sapiens_accel.evaluation import evaluate, tables
from sapiens_accel.evaluation.evaluate import Metrics
from sapiens_accel.memory import planner
from sapiens_accel.memory.estimate import Plan
from sapiens_accel.publish import uploader
from sapiens_accel.publish.uploader import NoUploads, Uploads
from sapiens_accel.runtime import distributed, failures, files, trackers
from sapiens_accel.runtime.launch import Precision
from sapiens_accel.runtime.signals import StopRequest
from sapiens_accel.training import run_folder
from sapiens_accel.training.logger import StageContext
from sapiens_accel.training.stage import Progress, TrainingStage, build_stage, find_fixed_teacher
from sapiens_accel.visibility import output as visibility


def train(
    recipe: str | Path | Config = Config.recipe,
    overrides: Mapping[str, Any] | None = None,
    mixed_precision: Precision | None = None,
) -> dict[str, Metrics]:
    """Train the stages of a run in this process, as `train.py --recipe RECIPE` does; for scripts and notebooks.

    Several processes: `accelerate.notebook_launcher(train, (RECIPE, OVERRIDES), num_processes=2)`.

    Args:
        recipe: the name of a recipe, a YAML file, or all options as a Config.
        overrides: options that differ from it, by their names on the command line: {"data.root": "DIR"}.
        mixed_precision: no, bf16 or fp16. Default: that of the launch, which is no (fp32) without a launcher.

    Returns:
        The metrics of each stage that has weights now: AP and others of `evaluation.evaluate.METRICS`, 0..1.

    Raises:
        UserError: what the user can fix, in one line.
        Interrupted: a signal asked the run to stop, and its state is saved.
    """
    words = config.to_words(overrides or {})
    if not isinstance(recipe, Config):
        words = [f"--recipe={recipe}", *words]
    run = config.load(words, base=recipe if isinstance(recipe, Config) else None)
    with distributed.use_in_process(mixed_precision):
        return run_stages(run, words)


def main(argv: Sequence[str]) -> None:
    run_stages(config.load(argv), argv)


def run_stages(run: Config, argv: Sequence[str]) -> dict[str, Metrics]:
    """Start this launch's Accelerator, lock the run directory and train.

    Args:
        argv: the options on a command line, for messages that suggest another launch.
    """
    config.refuse_drawn_people(run, argv)
    config.warn_of_harmful_options(run)
    accelerator = distributed.start()
    accelerator.print(f"{run.recipe}: {distributed.description(accelerator)}")
    if run.recipe == Config.recipe and run.data.root:
        accelerator.print(
            f"--recipe {run.recipe} trains a toy network ({run.model.name}) with the demo's few steps; for a network "
            f"of use on {run.data.root} give --recipe sapiens_0.3b_coco --weights facebook/sapiens-pretrain-0.3b"
        )
    if run.eval.csv:
        accelerator.print("note: --eval.csv: training writes no CSV; give it to eval.py")
    with distributed.explain_lost_ranks(accelerator):
        failures.on_each_rank(lambda: trackers.check_installed(run.trackers))
        failures.on_each_rank(lambda: check_folders(run))
        failures.on_each_rank(lambda: augment.open_transforms(run.augment.albumentations or ()))
        with run_folder.lock_run(accelerator, run):
            return train_stages(accelerator, run, argv)


def open_data(run: Config) -> tuple[str | None, Config, Sets, tuple[str, ...]]:
    """Return the path of `--weights`, the options, the datasets, and notes.

    The options are without mirroring if sides are unknown; with `--stage all`, without ssl if nobody is unlabeled.
    """
    given = uploader.fetch(run.weights) if run.weights and run.weights != RANDOM else None
    skeleton, notes = build.open_skeleton(run.data)
    find_fixed_teacher(run, skeleton.names)  # or refused, before the data are read
    run = run if skeleton.mirror_known else run.without_mirroring()
    try:
        sets = build.open_people(run.data, skeleton, unlabeled=learns_from_unlabeled(run))
    except NoUnlabeledPeople as error:
        shorter = replace(run, stage=",".join(stage for stage in run.stages if stage != "ssl"))
        if run.stage != ALL or learns_from_unlabeled(shorter):
            raise
        run, notes = shorter, (*notes, f"--stage {ALL}: ssl is left out: {error.reason}")
        sets = build.open_people(run.data, skeleton, unlabeled=False)
    if run.data.root is None:
        notes = (*notes, "people: DRAWN by this program (--data.synthetic), to show how training works")
    return given, run, sets, notes


def learns_from_unlabeled(run: Config) -> bool:
    """Whether any stage of the run does."""
    return any(run.get_stage(stage).ratio for stage in run.stages)


def train_stages(accelerator: Accelerator, run: Config, argv: Sequence[str]) -> dict[str, Metrics]:
    """Open the data, compare the run with its directory, and train the stages that are not finished.

    Returns:
        The metrics of each stage.

    Raises:
        UserError: after the last stage: a last checkpoint or final metrics could not be written, so that a batch system
            sees it.
    """
    uploads = failures.on_each_rank(lambda: uploader.uploads(run, accelerator.is_main_process))
    given, run, sets, note = failures.on_main_first(accelerator, lambda: open_data(run))
    uploads.last_stage = run.stages[-1]
    doctor.summarize(accelerator.print, sets, run, note)
    # Rank 0 alone computes metrics.
    failures.on_each_rank(lambda: accelerator.is_main_process and doctor.check_evaluation(accelerator.print, sets, run))
    lasts = {stage: sampling.num_steps(run.get_stage(stage), len(sets.train), run.max_steps) for stage in run.stages}
    plans = planner.plan_run(accelerator, run, argv, sets.skeleton.num_keypoints, len(sets.train))
    done = run_folder.find_finished(accelerator, run, lasts)
    record = run_folder.plan_run(accelerator, run, sets, done)
    table: dict[str, Metrics] = {}
    images_before = list_images(Path(run.output_dir)) if accelerator.is_main_process else {}
    unwritten: list[Path] = []
    with uploads, StopRequest() as stop:
        for index, name in enumerate(run.stages):
            later = count_later_steps(plans, lasts, run.stages[index:], done)
            context = StageContext(
                accelerator=accelerator, run=run, name=name, sets=sets, plan=plans[name], last=lasts[name], later=later,
                begin=partial(record.begin, accelerator, sets),
            )  # fmt: skip
            with planner.explain_out_of_memory(accelerator, name, plans[name]):
                if name in done:
                    table[name] = done[name]
                else:
                    stage = build_stage(context, given if name == run.stages[0] else None)
                    table[name], lost = train_stage(stage, plans[name], uploads, stop)
                    unwritten += lost
                    del stage
            accelerator.free_memory()  # only now the objects of the stage are unreachable
            if run.dry_run:
                accelerator.print(f"dry run: {name} could be built, and one step was taken; nothing was written")
                return table
            if name != run.stages[-1] and (number := int(distributed.most(accelerator, stop.number))):
                raise Interrupted(f"{name} is finished; stopped by {Signals(number).name}", number)
    if accelerator.is_main_process:
        print(f"\n{format_results(run, sets, table, done)}")
        if images := sorted(list_images(Path(run.output_dir)).items() - images_before.items()):
            print("\nimages:", *(path for path, _ in images), sep="\n  ")
        for folder in list_without_visibility(run):
            print(
                f"\nwarning: {folder}: no {visibility.FILE} (expected one by --model.visibility): these weights were "
                "exported without the option, or a warning above says why. Train the stage in a new --output_dir"
            )
        print(f"\n{format_next_steps(run, argv)}")
    run_folder.refuse_unwritten(Path(run.output_dir), unwritten)
    return table


def count_later_steps(
    plans: Mapping[StageName, Plan], lasts: Mapping[str, int], stages: Sequence[StageName], done: Container[str]
) -> float:
    """Steps of the unfinished stages after the first of these, as many of that one as take their planned time."""
    own, *later = stages
    return sum(lasts[stage] * plans[stage].seconds / plans[own].seconds for stage in later if stage not in done)


def list_images(folder: Path) -> dict[str, int]:
    """The images of a run directory with the times (ns) of their files: those that a program wrote have another one."""
    return {str(path): path.stat().st_mtime_ns for path in folder.glob("pictures/*.*")}


def list_without_visibility(run: Config) -> list[Path]:
    """The weights folders of the stages that have no second output although it is asked for."""
    folders = [Path(run.output_dir) / stage / "weights" for stage in run.stages if run.model.visibility]
    return [folder for folder in folders if folder.is_dir() and not (folder / visibility.FILE).is_file()]


def format_results(run: Config, sets: Sets, table: dict[str, Metrics], done: Mapping[str, Metrics]) -> str:
    """The table of all stages, and which of those that were finished before were measured otherwise."""
    people = sets.split(run.eval.split)
    area, boxes = evaluate.describe_area(people, sets.skeleton, run.eval), people.reading.boxes
    lines = tables.describe_other_protocols(done, evaluate.protocol_settings(run.eval, boxes))
    return "\n".join([evaluate.format_table(table, evaluate.format_protocol(run.eval, area, boxes)), *lines])


def format_next_steps(run: Config, argv: Sequence[str]) -> str:
    """Where the weights of each stage are, and the commands that look at them, use them and resume."""
    folder = shlex.quote(run.output_dir)
    evaluate = "python eval.py" if Path("eval.py").is_file() else "sapiens-accel eval"
    weights = [f"  {path}" for stage in run.stages if (path := Path(run.output_dir) / stage / "weights").is_dir()]
    steps = [f"  evaluate again      {evaluate} {folder}", f"  your own images     {evaluate} {folder} --images FOLDER"]
    if TENSORBOARD in run.trackers:
        steps.insert(0, f"  curves and images   tensorboard --logdir {folder}/tensorboard")
    if list(argv) == sys.argv[1:]:  # not a call from Python
        steps.append(f"  resume, train on    {resume_command()}")
    return "\n".join(["weights:", *weights, "", "next:", *steps])


def check_folders(run: Config) -> None:
    """Refuse folders that cannot be written or that hold something else, before the data are read and checked.

    Raises:
        UserError: a folder cannot be written; the run directory holds the data, say.
    """
    run_folder.check_place(run)
    if not run.dry_run:
        files.check_writable(Path(run.output_dir), "--output_dir")
    cache = build.cache_folder(run.data)
    if not (cache / "people").is_dir():  # a filled cache may be shared and read-only
        files.check_writable(cache, "--data.cache_dir")


def train_stage(
    stage: TrainingStage, plan: Plan, uploads: Uploads | NoUploads, stop: StopRequest
) -> tuple[Metrics, list[Path]]:
    """Train one stage to its last step.

    Returns:
        The metrics of its final weights, and what of its end could not be written (the weights are).

    Raises:
        Interrupted: a signal asked to stop; the state is saved.
        UserError: the launcher was killed, and the state is saved; or a step failed, and it is saved if possible.
    """
    run, name, last, log = stage.context.run, stage.context.name, stage.context.last, stage.logger
    accelerator, progress = stage.context.accelerator, Progress(stage)
    progress.stop_if_asked(stop)
    # ---- Train
    with (
        failures.save_on_failure(accelerator, name, progress.save),
        planner.explain_out_of_memory(accelerator, name, plan, stage.drop_gradients, progress.save),
    ):
        with progress.evaluating(stop):
            stage.begin()
        for step in stage.steps():
            done = progress.done = step.number
            log.step(step)
            if done % run.log_every == 0 or done in (stage.people.unlabeled_steps, last):
                log.scalars(done, {**step.logs, **stage.objective.health(), "skipped": float(step.skipped)})
            saved = progress.save_if_due()
            progress.stop_if_asked(stop)
            with progress.evaluating(stop):
                if run.eval_every and done % run.eval_every == 0 and done < last:
                    stage.evaluate(done)
                elif done == 1 < last:
                    log.probe_first(done, stage.objective)
            if saved:
                uploads.saved(name, step=done, weights=saved / "weights", score=log.ap(done))

        # ---- Evaluate and export
        if not run.dry_run:
            progress.save()  # it must not be lost to what happens during an evaluation of minutes
            with progress.evaluating(stop):
                stage.evaluate(last)
        metrics = log.finish()
    uploads.saved(name, score=metrics.get("AP"), last=True)
    stage.release()
    return metrics, [*progress.unwritten, *log.unwritten]


class _Function(ModuleType):
    """A module that can be called.

    `sapiens_accel.train` has to be a function (in Python) and a module (for `-m`), and an import of the module would
    replace a function of that name. So they are one object, whichever is imported first.
    """

    __call__ = staticmethod(train)

    def __reduce__(self) -> tuple[Any, ...]:  # for launchers that start processes by pickling a function
        return importlib.import_module, (self.__name__,)


if __name__ == "__main__":
    run_main(main)
    distributed.stop()
else:
    sys.modules[__name__].__class__ = _Function
    # Its signature and help, and __qualname__, which torch's launcher asks for.
    update_wrapper(sys.modules[__name__], train, assigned=("__qualname__", "__doc__"), updated=())  # pyright: ignore
