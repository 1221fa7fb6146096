"""Train: for each stage build, step, log, save, evaluate, and hand the weights to the next one.

accelerate launch train.py                                                          the demo: no data, no GPU needed
accelerate launch --config_file accelerate_configs/zero2.yaml train.py --recipe sapiens_1b_coco --data.root DIR
"""

from collections.abc import Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path

import sapiens_accel  # isort: skip  # noqa: F401  (before torch: it sets how threads wait)
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from sapiens_accel.config import parse as config
from sapiens_accel.config.schema import Config, StageName
from sapiens_accel.data import build, loader, sampling
from sapiens_accel.data.augment import Augmenter
from sapiens_accel.data.dataset import Sets, TrainingPeople
from sapiens_accel.doctor import report as doctor
from sapiens_accel.errors import Interrupted, run_main
from sapiens_accel.evaluation import evaluate
from sapiens_accel.evaluation.evaluate import Metrics
from sapiens_accel.memory import planner as memory
from sapiens_accel.memory.estimate import Plan
from sapiens_accel.models import export
from sapiens_accel.models import load as weights
from sapiens_accel.models.sapiens import SapiensPose
from sapiens_accel.pose.heatmap import Codec
from sapiens_accel.publish import uploader as hub
from sapiens_accel.runtime import distributed, engine, files
from sapiens_accel.runtime.signals import StopRequest
from sapiens_accel.training import checkpoint, ema, optim
from sapiens_accel.training.logger import Report, begin_folder
from sapiens_accel.training.loop import steps
from sapiens_accel.training.mean_teacher import build as build_objective


def main(argv: Sequence[str]) -> None:
    run = config.load(argv)
    accelerator = distributed.start()
    accelerator.print(f"{run.recipe}: {distributed.description(accelerator)}")
    uploads = hub.uploads(run, accelerator.is_main_process)
    with accelerator.main_process_first():
        given = hub.fetch(run.weights) if run.weights else None
        skeleton, told = build.open_skeleton(run.data)
        sets = build.open_people(run.data, skeleton, unlabelled=any(run.of(stage).ratio for stage in run.stages))
    doctor.briefly(accelerator.print, sets, run, told)
    folder, table = Path(run.output_dir), {}
    lasts = {stage: sampling.num_steps(run.of(stage), len(sets.train), run.max_steps) for stage in run.stages}
    plans = memory.plans(accelerator, run, argv, skeleton.num_keypoints)
    done = checkpoint.finished(folder, lasts, run.resume_from_checkpoint)
    begin_folder(accelerator, run, sets, done)
    with uploads:
        for stage in run.stages:
            with StopRequest() as stop, memory.out_of_memory_told(accelerator, stage, plans[stage]):
                rest = (plans[stage], lasts[stage], given if stage == run.stages[0] else None, uploads, stop)
                table[stage] = done.get(stage) or train(accelerator, run, stage, sets, *rest)
            accelerator.free_memory()  # what the stage held is unreachable only now
            if run.dry_run:
                return accelerator.print(
                    f"dry run: {stage} could be built, and one step was taken; nothing was written"
                )
            if stage != run.stages[-1] and distributed.any_rank(accelerator, stop.asked):
                raise Interrupted(f"asked to stop; {stage} is finished")
    pictures = sorted(str(path) for path in folder.glob("pictures/*.*"))
    accelerator.print(f"\n{evaluate.table(table, evaluate.protocol(run.eval))}\n\npictures:", *pictures, sep="\n  ")


def train(
    accelerator: Accelerator, run: Config, stage: StageName, sets: Sets, planned: Plan, last: int,
    given: str | None, uploads: hub.Uploads | hub.NoUploads, stop: StopRequest,
) -> Metrics:  # fmt: skip
    """Run one stage up to step `last`, from the weights given, and return the metrics of those that it hands over.

    Raises Interrupted if a stop was asked for; then all is saved.
    """
    plan, share, folder, skeleton = run.of(stage), planned.share, Path(run.output_dir), sets.skeleton
    schedule = sampling.num_steps(plan, len(sets.train))

    # ---- Build
    set_seed(run.seed)
    model = SapiensPose(run.model.name, skeleton.num_keypoints, run.data.input_hw)
    resume = checkpoint.to_resume(accelerator, folder, run.resume_from_checkpoint, stage)
    start = (resume and resume.weights) or given or weights.starting_point(folder, stage)
    loaded = weights.load(model, start, skeleton.names) if start else weights.FROM_RANDOM
    accelerator.print(f"\n{stage}: {resume or loaded}")
    model.freeze(plan.frozen)
    model.lay_out(planned.layout)
    teacher = ema.moving_average(accelerator, deepcopy(model), planned.way.teacher) if plan.teacher else None
    frozen = engine.frozen_masters(accelerator, model)
    groups = optim.param_groups(model.layer_groups(), plan.optim)
    optimizer = optim.adamw(groups, plan.optim, accelerator.device, eight_bit=run.memory.adam_8bit)
    network, optimizer = engine.prepare(
        accelerator,
        model,
        optimizer,
        micro_batch=share.micro_batch,
        accumulation=share.accumulation,
        clip_norm=plan.optim.clip_norm,
    )
    codec = Codec(input_hw=run.data.input_hw, heatmap_hw=model.heatmap_hw, sigma=run.data.sigma)
    parameters = partial(engine.full_values, accelerator, network)
    gather, autocast = partial(distributed.gather, accelerator), distributed.autocast_dtype(accelerator)
    objective = build_objective(plan, codec, skeleton, teacher, parameters, schedule, gather, autocast)
    first = resume.load(accelerator, objective) if resume else 0
    last = first + 1 if run.dry_run else last
    accelerator.print(f"{stage}: steps {first + 1} to {last}, {planned}")

    # ---- Step
    augmenter = Augmenter(config=run.augment, skeleton=skeleton, input_hw=run.data.input_hw)
    people = TrainingPeople(sets, augmenter, run.data, plan, seed=run.seed, stage=stage)
    stream = loader.batches(people, share, range(first, last), run.data.num_workers, accelerator.device)
    report = Report(accelerator, run, stage, planned.gpu_peak, sets, augmenter, start=start, first=first, last=last)
    report.crops(people, objective.codec)

    def collect() -> checkpoint.Weights:
        """What the stage would hand over, by folder, on rank 0; all ranks must call it."""
        return objective.results({**engine.full_state(accelerator, network), **frozen})

    def keep_weights(step: int) -> None:
        """Hand over the weights that were judged last; all ranks must call it."""
        action = partial(write, folder / stage, collect(), dtype=getattr(torch, run.weights_dtype))
        if files.write_on_main(accelerator, action, folder / stage / "weights", needed=step == last):
            report.keeps(folder / stage / "weights")

    write = partial(export.write, model=model, skeleton=skeleton, sigma=run.data.sigma)
    save = partial(checkpoint.save, folder / stage, accelerator, objective, stage, run.keep_checkpoints, collect, write)
    drop, step, offload = partial(engine.drop_gradients, network), first, run.memory.offload_activations
    stepping = steps(accelerator, network, optimizer, objective, stream, share, plan.optim, first, schedule, offload)
    rescue = memory.out_of_memory_told(accelerator, stage, planned, drop, lambda: save(step) if step > first else None)
    with rescue:
        for done in stepping:
            step = done.number
            report.step(done)
            if step % run.log_every == 0 or step == last:
                report.scalars(step, {**done.logs, **objective.health(), "skipped": float(done.skipped)})
            saved = None
            if run.save_every and step % run.save_every == 0 and not (run.dry_run or report.sick):
                saved = save(step)
                report.restart_clock(step)
            if step < last and distributed.any_rank(accelerator, stop.asked):
                report.close()
                raise Interrupted(f"{stage}: asked to stop; step {step} is in {saved or save(step) or 'NO checkpoint'}")
            if run.eval_every and step % run.eval_every == 0 and step < last:
                if report.judge(step, network, objective):
                    keep_weights(step)  # a stage that is stopped leaves its last good ones
            elif step == 1 < last:
                report.begin(step, network, objective)
            if saved:
                uploads.saved(stage, step=step, weights=saved / "weights", score=report.ap(step))

    # ---- Hand over
    if not run.dry_run and report.judge(last, network, objective):
        keep_weights(last)
    metrics = report.finish()
    uploads.saved(stage, score=metrics.get("AP"), last=True)
    engine.release(accelerator, network, optimizer)
    return metrics


if __name__ == "__main__":
    run_main(main)
    distributed.stop()
