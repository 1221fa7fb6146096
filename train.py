"""Train: for each stage build, step, log, save, evaluate, and hand the weights to the next one.

accelerate launch train.py                                                          the demo: no data, no GPU needed
accelerate launch --config_file accelerate_configs/zero2.yaml train.py --recipe sapiens_1b_coco --data.root DIR
"""

from collections.abc import Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path

import sapiens_accel  # isort: skip  # noqa: F401  (before torch: it sets how threads wait)
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn

from sapiens_accel import checkpoint, config, data, distributed, evaluate, export, memory, optim, pool, weights
from sapiens_accel.augment import Augmenter
from sapiens_accel.average import MovingAverage
from sapiens_accel.config import Config, StageName
from sapiens_accel.data import Sets, TrainingPeople
from sapiens_accel.evaluate import Metrics
from sapiens_accel.heatmap import Codec
from sapiens_accel.loop import steps
from sapiens_accel.model import SIZES, SapiensPose
from sapiens_accel.objective import MeanTeacher, Objective, Supervised
from sapiens_accel.plan import Plan
from sapiens_accel.report import Report
from sapiens_accel.skeleton import COCO17 as SKELETON


def main(argv: Sequence[str]) -> None:
    run = config.load(argv)
    accelerator = distributed.start()
    accelerator.print(f"{run.recipe}: {distributed.description(accelerator)}")
    with accelerator.main_process_first():
        sets = data.open_people(run.data, SKELETON, unlabelled=any(run.of(stage).ratio for stage in run.stages))
    accelerator.print(sets)
    folder, table = Path(run.output_dir), {}
    lasts = {stage: data.num_steps(run.of(stage), len(sets.train), run.max_steps) for stage in run.stages}
    plans = memory.plans(accelerator, run, argv)
    done = checkpoint.finished(folder, lasts, run.resume_from_checkpoint)
    if accelerator.is_main_process and not run.dry_run:
        if run.resume_from_checkpoint is None:
            checkpoint.set_aside(folder, run.stages, run.weights)
        config.save(run, folder / "config.yaml")
        pool.write_labelled_ids(folder / "labelled_ann_ids.json", sets.train, run.data)
    accelerator.wait_for_everyone()
    for stage in run.stages:
        with memory.out_of_memory_told(accelerator, stage, plans[stage]):
            table[stage] = done.get(stage) or train(accelerator, run, stage, sets, plans[stage], lasts[stage])
        accelerator.free_memory()  # what the stage held is unreachable only now
        if run.dry_run:
            return accelerator.print(f"dry run: {stage} could be built, and one step was taken; nothing was written")
    accelerator.print(f"\n{evaluate.table(table, evaluate.protocol(run.eval))}\n\npictures:")
    accelerator.print(*(f"  {path}" for path in sorted(folder.glob("pictures/*.jpg"))), sep="\n")


def train(accelerator: Accelerator, run: Config, stage: StageName, sets: Sets, planned: Plan, last: int) -> Metrics:
    """Run one stage up to step `last`, write its weights and return its metrics."""
    plan, share, folder = run.of(stage), planned.share, Path(run.output_dir)
    schedule = data.num_steps(plan, len(sets.train))

    # ---- Build
    set_seed(run.seed)
    model = SapiensPose(run.model.name, SKELETON.num_keypoints, run.data.input_hw)
    start = (run.weights if stage == run.stages[0] else None) or weights.starting_point(folder, stage)
    accelerator.print(f"\n{stage}: {weights.load(model, start, SKELETON.names) if start else weights.FROM_RANDOM}")
    model.freeze(plan.frozen)
    model.lay_out(planned.layout)
    teacher = distributed.moving_average(accelerator, deepcopy(model), planned.way.teacher) if plan.teacher else None
    frozen = distributed.frozen_masters(accelerator, model)
    groups = optim.param_groups(model.layer_groups(), plan.optim)
    optimizer = optim.adamw(groups, plan.optim, accelerator.device, eight_bit=run.memory.adam_8bit)
    engine, optimizer = distributed.prepare(accelerator, model, optimizer, share, plan.optim.clip_norm)
    objective = build_objective(accelerator, run, stage, engine, teacher, schedule)

    # ---- Where to begin
    resume = checkpoint.to_resume(folder, run.resume_from_checkpoint, stage)
    first = checkpoint.load(resume, accelerator, objective).step if resume else 0
    last = first + 1 if run.dry_run else last
    accelerator.print(f"{stage}: steps {first + 1} to {last}, {planned}")

    # ---- Step
    augmenter = Augmenter(config=run.augment, skeleton=SKELETON, input_hw=run.data.input_hw)
    people = TrainingPeople(sets, augmenter, run.data, plan, seed=run.seed, stage=stage)
    stream = data.batches(people, share, range(first, last), run.data.num_workers, accelerator.device)
    report = Report(accelerator, run, stage, planned, sets, augmenter, start=start, first=first, last=last)
    report.crops(people, objective.codec)

    def write_weights() -> None:
        """Write the weights that were judged last; all ranks must call it."""
        results = objective.results({**distributed.full_state(accelerator, engine), **frozen})
        for name, state in results.items() if accelerator.is_main_process else ():
            export.export(folder / stage / name, state, model, SKELETON, run.data.sigma)
        report.keeps(folder / stage / "weights")

    save = partial(checkpoint.save, folder / stage, accelerator, objective, stage, keep=run.keep_checkpoints)
    drop, step, offload = partial(distributed.drop_gradients, engine), first, run.memory.offload_activations
    stepping = steps(accelerator, engine, optimizer, objective, stream, share, plan.optim, first, schedule, offload)
    with memory.out_of_memory_told(accelerator, stage, planned, drop, lambda: save(step) if step > first else None):
        for step, logs in stepping:
            report.step()
            if step % run.log_every == 0 or step == last:
                report.scalars(step, {**logs, **objective.health()})
            if run.save_every and step % run.save_every == 0 and not (run.dry_run or report.alarms.sick):
                save(step)
                report.restart_clock(step)
            if run.eval_every and step % run.eval_every == 0 and step < last:
                if report.judge(step, engine, objective):
                    write_weights()  # a stage that is stopped leaves its last good ones
            elif step == 1 < last:
                report.begin(step, engine, objective)

    # ---- Hand over
    if not run.dry_run and report.judge(last, engine, objective):
        write_weights()
    metrics = report.finish()
    report.close()
    distributed.release(accelerator, engine, optimizer)
    return metrics


def build_objective(
    accelerator: Accelerator, run: Config, stage: StageName, engine: nn.Module, ema: MovingAverage | None, schedule: int
) -> Objective:
    """What the stage minimises."""
    plan = run.of(stage)
    heatmap_hw = SIZES[run.model.name].heatmap_hw(run.data.input_hw)
    codec = Codec(input_hw=run.data.input_hw, heatmap_hw=heatmap_hw, sigma=run.data.sigma)
    supervised = Supervised(codec=codec, loss_weight=plan.loss_weight)
    if plan.teacher is None or ema is None:
        return supervised
    return MeanTeacher(
        supervised,
        ema,
        lambda: (value for _, value in distributed.full_parameters(accelerator, engine)),
        plan.teacher,
        SKELETON.mirror,
        names=SKELETON.names,
        num_steps=schedule,
        gather=partial(distributed.gather, accelerator),
        autocast=distributed.autocast_dtype(accelerator),
    )


if __name__ == "__main__":
    config.guarded(main)
    distributed.stop()
