"""A stage of training: network, optimizer, objective, batches and logger, and how far it has come."""

import shutil
from collections import ChainMap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from signal import Signals
from typing import Any, NamedTuple

import torch
from accelerate.utils import set_seed
from torch import Tensor, nn

from sapiens_accel.config.schema import RANDOM, STAGES, Config
from sapiens_accel.data import loader, sampling
from sapiens_accel.data.augment import Augmenter
from sapiens_accel.data.dataset import TrainingPeople
from sapiens_accel.errors import Interrupted, UserError
from sapiens_accel.evaluation import evaluate
from sapiens_accel.evaluation.predict import PredictionSetup
from sapiens_accel.hub import download
from sapiens_accel.models import adapters, checkpoint_formats, export, quantized
from sapiens_accel.models import load as weights
from sapiens_accel.models.sapiens import SapiensPose
from sapiens_accel.pose.heatmap import Codec
from sapiens_accel.runtime import distributed, engine, files
from sapiens_accel.runtime.signals import EvaluationStopped, StopRequest
from sapiens_accel.training import checkpoint, ema, optim
from sapiens_accel.training.checkpoint import Resume, Saver, SaveSchedule
from sapiens_accel.training.logger import SCALE_SEARCH, StageContext, StageLogger
from sapiens_accel.training.loop import Step, StepConfig, steps, stop_between_batches
from sapiens_accel.training.mean_teacher import MeanTeacher, TeacherSetup, build_objective
from sapiens_accel.training.objectives import FixedTeacher, Objective
from sapiens_accel.visibility import output as visibility
from sapiens_accel.visibility.quality import format_quality

BASE = "base"  # in a stage's folder: the network that its adapters are added to
AGAIN = "Restart all machines with --resume_from_checkpoint latest"


@dataclass(frozen=True, kw_only=True)
class TrainingStage:
    """The parts of one stage of a run; `train.py` uses them.

    Attributes:
        model: the Sapiens network; `network` is its wrapper of the launch (DeepSpeed, DistributedDataParallel).
        frozen: fp32 values of the frozen parameters, on rank 0, if the engine rounds them.
        base: the weights folder that the adapters are added to; None without adapters. Checkpoints then leave frozen
            parameters out, and exported weights are merged from this folder.
        num_steps: length of the schedule; the stage may end earlier (`--max_steps`).
    """

    context: StageContext
    model: SapiensPose
    network: nn.Module
    optimizer: Any
    objective: Objective
    frozen: dict[str, Tensor]
    base: Path | None
    people: TrainingPeople
    logger: StageLogger
    num_steps: int
    schedule: SaveSchedule

    def steps(self) -> Iterator[Step]:
        """Train the steps that are left; yields after each optimizer step."""
        context = self.context
        accelerator, share, run = context.accelerator, context.plan.share, context.run
        numbers = range(context.first, context.last)
        batches = loader.batches(self.people, share, numbers, run.data.num_workers, accelerator.device)
        config = StepConfig(
            accumulation=share.accumulation,
            optim=context.config.optim,
            first=context.first,
            num_steps=self.num_steps,
            offload=run.memory.offload_activations,
            rounding_key=(run.seed, STAGES.index(context.name)) if run.memory.bf16_weights else None,
            dropout_key=(run.seed, STAGES.index(context.name)) if self.base and run.lora.dropout else None,
        )
        return steps(accelerator, self.network, self.optimizer, self.objective, batches, config)

    def save_if_due(self, step: int) -> Path | None:
        """Write a checkpoint if one is due after this step, and return it. All ranks must call it.

        Without `--save_every` time decides, which rank 0 measures for all.
        """
        is_due, accelerator = self.schedule.is_due(step), self.context.accelerator
        if self.schedule.every is None:
            is_due = distributed.any_rank(accelerator, is_due and accelerator.is_main_process)
        return self.save(step) if is_due else None

    def save(self, step: int) -> Path | None:
        """Write a checkpoint and return it, None if that failed. All ranks must call it."""
        saver = Saver(
            accelerator=self.context.accelerator,
            folder=self.context.folder,
            keep=self.context.run.keep_checkpoints,
            objective=self.objective,
            collect=self._collect,
            write=self._write,
            without_frozen=self.base is not None,
        )
        saved = self.schedule.measure(step, partial(checkpoint.save, saver, step))
        self.logger.restart_clock(step)
        return saved

    def begin(self) -> None:
        """Evaluate the weights that the stage begins with, where they are compared with later ones.

        With `hand_over` best they are exported too: a stage that is stopped, or that learns nothing, leaves them. A
        stage that was stopped in an evaluation makes that again. All ranks must call it.

        Raises:
            EvaluationStopped: a stop was asked for.
        """
        context, is_best = self.context, self.context.config.hand_over == "best"
        if self.logger.is_interrupted:
            self.evaluate(context.first)
        else:  # an evaluation does that too, after it has measured with the fit before
            self.logger.calibrate(context.first, self.objective)
        # A resumed stage has begun earlier; without a record of its best weights it compares with the resumed ones.
        is_due = (is_best or context.config.teacher) if not context.first else is_best and self.logger.kept is None
        if not is_due or context.run.dry_run or context.first == context.last:
            return
        self.logger.begin(context.first, self.network, self.objective)
        if is_best:
            self._export(needed=False)
        self.logger.report()

    def evaluate(self, step: int) -> None:
        """Evaluate the weights of this step, and export them if they are the best so far. All ranks must call it."""
        self.logger.evaluate(step, self.network, self.objective)
        if self._keeps_best(step):
            self._export(needed=step == self.context.last)
        self.logger.report()

    def _keeps_best(self, step: int) -> bool:
        """Return whether the weights that were just evaluated replace the exported ones.

        With `hand_over` last they do at the last step only, and with a teacher also before, while no alarm is raised:
        a stage that is stopped leaves good weights.
        """
        if self.context.config.hand_over == "best":
            return self.logger.kept is None or (not self.logger.alarms.unhealthy and self.logger.is_better())
        if step == self.context.last:
            return self.logger.alarms.healthy or self.logger.kept is None
        return self.logger.alarms.healthy and self.context.config.teacher is not None

    def _export(self, *, needed: bool) -> None:
        """Write the weights that were just evaluated to STAGE/weights. All ranks must call it."""
        folder, dtype = self.context.folder, getattr(torch, self.context.run.weights_dtype)
        output, collected = self._fit_visibility(), self._collect()

        def write() -> None:
            with visibility.replacing_weights(folder / "weights"):
                self._write(folder, collected, dtype)
            visibility.save(folder / "weights", output)

        if files.write_on_main(self.context.accelerator, write, folder / "weights", needed=needed):
            self.logger.mark_kept(folder / "weights")

    def _fit_visibility(self) -> visibility.VisibilityOutput | None:
        """Return the second output of the weights that were just evaluated, on rank 0. All ranks must call it."""
        context, run = self.context, self.context.run
        if not run.model.visibility:
            return None
        network = evaluate.wrap_network(context.accelerator, self.objective.result(self.network), self.objective.codec)
        sets, device = context.sets, context.accelerator.device
        setup = PredictionSetup(skeleton=sets.skeleton, data=run.data, config=run.eval, device=device)
        with stop_between_batches(context.accelerator, network.model):
            output = evaluate.fit_visibility(context.accelerator, network, sets.train, sets.val, setup)
        if output is not None:
            table = format_quality(output.about["quality"])
            print(f"{context.name}: {output.description}\n{table}", flush=True)
        return output

    def _collect(self) -> checkpoint.Weights:
        """Return the weights to export, by folder, on rank 0. All ranks must call it."""
        only_learning = self.base is not None
        state = engine.full_state(self.context.accelerator, self.network, only_learning=only_learning)
        whole = ChainMap(self.frozen, state)  # pyright: ignore[reportArgumentType]  (it is only read)
        return self.objective.results(whole if self.frozen else state)

    def _write(self, folder: Path, collected: checkpoint.Weights, dtype: torch.dtype = torch.float32) -> None:
        sets, sigma, lora = self.context.sets, self.context.run.data.sigma, self.context.run.lora
        if self.base:
            base = checkpoint_formats.read(str(self.base)).state
            for name, learned in collected.items():
                adapters.write_folder(folder / name / adapters.FOLDER, learned, self.model, lora)
            collected = {name: adapters.Merged(base, learned, lora.scale) for name, learned in collected.items()}
        export.write(folder, collected, dtype=dtype, model=self.model, skeleton=sets.skeleton, sigma=sigma)

    def drop_gradients(self) -> None:
        """Free the gradients of an unfinished step."""
        engine.drop_gradients(self.network)

    def release(self) -> None:
        """Free the memory of the stage before the next one is built."""
        engine.release(self.context.accelerator, self.network, self.optimizer)


class Progress:
    """How far a stage has come, and how much of it is saved.

    Attributes:
        done: the last complete step.
    """

    def __init__(self, stage: TrainingStage) -> None:
        self.stage, self.done, self._saved = stage, stage.context.first, stage.context.first
        self._checkpoint: Path | None = None  # of step `_saved`, if this process has written it

    def save(self) -> Path | None:
        """Save the last step unless the state is unhealthy, and return its checkpoint. All ranks must call it."""
        if self.done <= self._saved:
            return self._checkpoint
        if self.stage.logger.unhealthy or self.stage.context.run.dry_run:
            return None
        self._saved = self.done
        self._checkpoint = self.stage.save(self.done)
        return self._checkpoint

    @property
    def unwritten(self) -> list[Path]:
        """The checkpoint of the last step, if it was to be saved and could not be written."""
        failed = self.done > self.stage.context.first and self._saved == self.done and self._checkpoint is None
        return [self.stage.context.folder / "checkpoints" / f"step_{self.done}"] if failed else []

    def save_if_due(self) -> Path | None:
        """Save if a checkpoint is due; in an unhealthy state it stays due. All ranks must call it."""
        if self.stage.context.run.dry_run or self.stage.logger.unhealthy:
            return None
        if saved := self.stage.save_if_due(self.done):
            self._saved, self._checkpoint = self.done, saved
        return saved

    @contextmanager
    def evaluating(self, stop: StopRequest) -> Iterator[None]:
        """Save the step and end the stage if a signal ends the evaluation inside. All ranks must call it.

        Raises:
            Interrupted, UserError: as `stop_if_asked`.
        """
        try:
            yield
        except EvaluationStopped:
            self.stop_if_asked(stop)
            raise

    def stop_if_asked(self, stop: StopRequest) -> None:
        """End the stage after this step if a signal came on any rank. All ranks must call it.

        Raises:
            Interrupted: the state is saved.
            UserError: likewise; the launcher of another machine was killed.
        """
        context = self.stage.context
        number = int(distributed.most(context.accelerator, stop.number))
        if not number:
            return
        self.stage.logger.close()
        where = "there was no step to save"
        if self.done > context.first and not context.run.dry_run:
            where = self._save_for_stop()
        self._saved = self.done
        if distributed.any_rank(context.accelerator, stop.launcher_is_gone):
            raise UserError(f"{context.name}: the launcher of another machine has ended; {where}. {AGAIN}")
        raise Interrupted(f"{context.name}: stopped by {Signals(number).name}; {where}", number)

    def _save_for_stop(self) -> str:
        """Save this step unless the stage is unhealthy; a few skipped steps do no harm. Returns where the state is."""
        log = self.stage.logger
        if not (log.alarms.unhealthy or log.skipped > SCALE_SEARCH):
            written = self._checkpoint if self._saved == self.done else None
            return f"step {self.done} is in {written or self.stage.save(self.done) or 'NO checkpoint'}"
        earlier = checkpoint.list_checkpoints(self.stage.context.folder / "checkpoints")
        good = earlier[-1] if earlier else log.alarms.good
        return (
            f"step {self.done} is not saved: the stage is unhealthy (see its warnings); the last good state is {good}"
        )


def find_fixed_teacher(run: Config, names: Sequence[str] | None = None) -> Path | None:
    """The weights folder of `--distill.teacher`, downloaded if it is a Hub repository; None without the option.

    Args:
        names: the run's keypoints; None: whatever they are.

    Raises:
        UserError: it is no weights folder, or a network of other keypoints, input size or sigma.
    """
    if run.distill.teacher is None:
        return None
    where = f"--distill.teacher {run.distill.teacher}"
    try:
        folder = Path(download.fetch(run.distill.teacher))
        about = weights.description(folder)
    except UserError as error:
        reason = str(error).removeprefix(f"--weights {run.distill.teacher}: ").removeprefix(f"{run.distill.teacher}: ")
        raise UserError(f"{where}: {reason}") from None
    expected = {"input_hw": list(run.data.input_hw), "sigma": run.data.sigma}
    if names is not None:
        expected["keypoints"] = list(names)
    for name, value in expected.items():
        if about.get(name) != value:
            shown, found = (_shorten(one) for one in (value, about.get(name)))
            raise UserError(
                f"{where}: not of the run's {name} (expected {shown}, found {found}). Give a teacher "
                "that was trained with it"
            )
    return folder


def _shorten(value: Any) -> str:
    names = value if isinstance(value, list) and len(value) > 3 else None
    return f"{len(names)}: {', '.join(map(str, names[:3]))}, ..." if names else str(value)


def _load_fixed_teacher(context: StageContext) -> FixedTeacher | None:
    """The teacher of `--distill.teacher`, whole on each device, in the precision of the launch."""
    accelerator, run = context.accelerator, context.run
    folder = find_fixed_teacher(run, context.sets.skeleton.names)
    if folder is None:
        return None
    home = weights.Home(device=accelerator.device, dtype=distributed.autocast_dtype(accelerator) or torch.float32)
    network = weights.load_fixed(folder, home)
    accelerator.print(f"{context.name}: learns the heatmaps of {network.name}, {run.distill.teacher}, too")
    return FixedTeacher(network=network, weight=run.distill.weight)


def _estimate_sizes(context: StageContext, model: SapiensPose, *, adapted: bool) -> tuple[int, int]:
    """The bytes of a checkpoint, and of the weights that the stage writes before its first step."""
    run, has_teacher = context.run, context.config.teacher is not None
    size = checkpoint.estimate_size(
        context.accelerator, model, teacher=has_teacher, adam_8bit=run.memory.adam_8bit, without_frozen=adapted
    )
    num = quantized.num_values(model)
    base = 4 * num if adapted else 0
    if context.config.hand_over != "best":
        return size, base
    return size, base + num * getattr(torch, run.weights_dtype).itemsize * (1 + has_teacher)


def _prepare(context: StageContext, model: SapiensPose) -> tuple[nn.Module, Any]:
    """Create the optimizer, and wrap both for the launch."""
    config, accelerator, share = context.config.optim, context.accelerator, context.plan.share
    memory = context.run.memory
    if memory.bf16_weights:
        optim.keep_in_bf16(optim.list_matrices(model.layer_groups()))
    groups = optim.param_groups(model.layer_groups(), config)
    optimizer = optim.adamw(
        groups, config, accelerator.device, eight_bit=memory.adam_8bit, stochastic=memory.bf16_weights
    )
    return engine.prepare(
        accelerator,
        model,
        optimizer,
        micro_batch=share.micro_batch,
        accumulation=share.accumulation,
        clip_norm=config.clip_norm,
    )


def _set_up_teacher(
    context: StageContext, average: ema.MovingAverage, network: nn.Module, *, num_steps: int, adapted: bool
) -> TeacherSetup:
    accelerator = context.accelerator
    return TeacherSetup(
        average=average,
        student_parameters=partial(engine.full_values, accelerator, network, only_learning=adapted),
        num_steps=num_steps,
        gather=partial(distributed.gather, accelerator),
        autocast=distributed.autocast_dtype(accelerator),
        mirrors=context.run.augment.flip_p > 0,
        unlabeled_each=len(context.sets.unlabeled or ()) / len(context.sets.train),
    )


def _describe_few_unlabeled(context: StageContext, objective: Objective) -> str:
    """That labels come first in a stage that begins, since there are few unlabeled people; else empty."""
    teacher, unlabeled = context.config.teacher, context.sets.unlabeled
    if context.first or not (isinstance(objective, MeanTeacher) and teacher and teacher.ratio and unlabeled):
        return ""
    learned = objective.limit.learned
    if teacher.learned is not None or learned == 1:
        return ""
    return (
        f"{len(unlabeled)} unlabeled people for {len(context.sets.train)} labeled ones are few: they count once the "
        f"labels are learned (--{context.name}.teacher.learned {learned:g}; 1: from the first step on)"
    )


class _Start(NamedTuple):
    """The network that a stage starts with.

    Attributes:
        weights: where its weights come from; None for random ones.
        adapted: it has adapters.
        base: the weights that they are added to, where these are not in STAGE/base yet: a folder, or values on rank 0.
    """

    model: SapiensPose
    resume: Resume | None
    weights: str | None
    adapted: bool
    base: Path | Mapping[str, Tensor] | None


def _find_weights(context: StageContext, given: str | None, resume: Resume | None) -> str | None:
    """The weights that a stage starts from; None: random ones, or a checkpoint holds them.

    Raises:
        UserError: a stage with a teacher has none, and random ones are not asked for.
    """
    run, folder = context.run, Path(context.run.output_dir)
    before = None if run.weights == RANDOM and context.name == run.stages[0] else context.name
    start = (resume and resume.weights) or given or (before and weights.starting_point(folder, before))
    if context.config.ratio and not (start or resume or run.weights == RANDOM):
        raise UserError(
            f"--stage {context.name}: no weights to start from, and a teacher of random weights makes random labels "
            f"(expected those of an earlier stage in {folder}). Add --weights WEIGHTS, train --stage phase2 before "
            f"it, or ask for random ones: --weights {RANDOM}"
        )
    return start


def _load_model(context: StageContext, given: str | None) -> _Start:
    """Load the network of a stage, freeze parameters, and add adapters. All ranks must call it."""
    accelerator, run, config = context.accelerator, context.run, context.config
    skeleton, asked = context.sets.skeleton, run.resume_from_checkpoint
    model = SapiensPose(run.model.name, skeleton.num_keypoints, run.data.input_hw, empty=True)
    resume = checkpoint.find_checkpoint(accelerator, Path(run.output_dir), asked, context.name, dry_run=run.dry_run)
    model.freeze(config.frozen)
    adapted = bool(adapters.find_targets(model, run.lora))
    base_dtype = run.model.base_dtype if adapted else None
    saved_base = resume.find_base(BASE) if resume and adapted else None
    start = str(saved_base) if saved_base else _find_weights(context, given, resume)
    earlier = _find_earlier_adapters(start) if start and base_dtype and not saved_base else None
    if start:
        source = str(earlier.base) if earlier else start
        loaded = weights.load(model, source, skeleton.names, _home(context, model, adapted=adapted))
    else:
        set_seed(run.seed)  # the empty network has drawn random numbers
        model, loaded = SapiensPose(run.model.name, skeleton.num_keypoints, run.data.input_hw), None
        model.freeze(config.frozen)
        if base_dtype:
            quantized.replace_all(model, base_dtype)
    accelerator.print(f"\n{context.name}: {resume or loaded or weights.FROM_RANDOM}")
    if not adapted:
        if run.lora.rank:
            accelerator.print(f"{context.name}: all blocks are frozen: no adapters (--lora.rank)")
        return _Start(model, resume, start, adapted=False, base=None)
    base = saved_base
    if base is None and accelerator.is_main_process:
        # Values of the file where it has them: the network's may be rounded.
        base = quantized.PlainState(model, loaded.values if loaded else {})
    num = adapters.add(model, run.lora)
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    accelerator.print(
        f"{context.name}: adapters of rank {run.lora.rank} on {num} matrices: with norms and head, {learning:,} "
        f"parameters learn; {quantized.num_values(model) - learning:,} are frozen"
        + (f", the matrices of the blocks in {base_dtype}" if base_dtype else "")
    )
    if earlier:
        adapters.load_folder(model, earlier.folder)
        accelerator.print(f"{context.name}: continues the adapters of {earlier.folder}")
    if resume and resume.weights:
        adapters.load_folder(model, Path(resume.weights) / adapters.FOLDER)
    half = distributed.autocast_dtype(accelerator)
    if half and not distributed.is_deepspeed(accelerator):  # which casts all parameters itself
        adapters.keep_base_in(model, half)
    return _Start(model, resume, start, adapted=True, base=base)


class _EarlierAdapters(NamedTuple):
    """The adapters of an earlier stage and the weights that they were added to, as folders."""

    folder: Path
    base: Path


def _find_earlier_adapters(start: str) -> _EarlierAdapters | None:
    """The adapters that are merged into these weights; None if there are none.

    A stage with a rounded base continues them: rounding the merged matrices would undo most of what they have learned,
    which is less than the steps between rounded values.
    """
    found = _EarlierAdapters(folder=Path(start) / adapters.FOLDER, base=Path(start).parent / BASE)
    return found if (found.folder / adapters.FILE).is_file() and found.base.is_dir() else None


def _home(context: StageContext, model: SapiensPose, *, adapted: bool) -> weights.Home:
    """Where the weights of a stage are loaded to."""
    accelerator = context.accelerator
    sixteen = distributed.autocast_dtype(accelerator) if distributed.is_deepspeed(accelerator) else None
    straight = weights.goes_to_device(
        distributed.zero_stage(accelerator),
        sixteen=sixteen is not None,
        adapted=adapted,
        teacher=context.config.teacher is not None,
        frozen=not all(p.requires_grad for p in model.parameters()),
    )
    base_dtype = context.run.model.base_dtype if adapted else None
    if accelerator.device.type != "cuda" or not straight:
        return weights.Home(base_dtype=base_dtype)
    return weights.Home(device=accelerator.device, dtype=sixteen, base_dtype=base_dtype)


def _write_base(context: StageContext, model: SapiensPose, base: Path | Mapping[str, Tensor] | None) -> None:
    """Write STAGE/base, or link it to that of the run whose checkpoint is resumed."""
    target, sets = context.folder / BASE, context.sets
    if isinstance(base, Mapping):
        export.export(target, base, model, sets.skeleton, context.run.data.sigma)
    elif base and base.resolve() != target.resolve():
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(base, target, copy_function=files.link)


def build_stage(context: StageContext, given: str | None) -> TrainingStage:
    """Build a stage from its checkpoint, the given weights, those of the stage before it, or random ones.

    All ranks must call it; rank 0 prints where the weights come from.

    Args:
        given: the weights of `--weights`, for the run's first stage.

    Raises:
        UserError: weights or a checkpoint cannot be read; a frozen pattern matches nothing; a teacher would start from
            random weights, which are not asked for.
    """
    accelerator, run, config, plan = context.accelerator, context.run, context.config, context.plan
    skeleton = context.sets.skeleton
    fixed = _load_fixed_teacher(context)
    set_seed(run.seed)
    model, resume, start, adapted, base = _load_model(context, given)
    model.lay_out(plan.layout)
    placement = plan.way.teacher
    teacher = ema.moving_average(accelerator, model, placement, shares_frozen=adapted) if config.teacher else None
    frozen = {} if adapted else engine.frozen_masters(accelerator, model)
    sizes = _estimate_sizes(context, model, adapted=adapted)
    network, optimizer = _prepare(context, model)
    codec = Codec(input_hw=run.data.input_hw, heatmap_hw=model.heatmap_hw, sigma=run.data.sigma)
    num_steps = sampling.num_steps(config, len(context.sets.train))
    setup = teacher and _set_up_teacher(context, teacher, network, num_steps=num_steps, adapted=adapted)
    objective = build_objective(config, codec, skeleton, setup, fixed)
    trusted = run.trust_checkpoint
    first = resume.load(accelerator, objective, trusted=trusted, without_frozen=adapted) if resume else 0
    context = replace(context, start=start, first=first, last=first + 1 if run.dry_run else context.last)
    context.begin(first)
    if accelerator.is_main_process and not run.dry_run:
        checkpoint.warn_of_little_room(context.folder, *sizes)
    if adapted and not run.dry_run:
        write = partial(_write_base, context, model, base)
        files.write_on_main(accelerator, write, context.folder / BASE, needed=True)
        accelerator.wait_for_everyone()
    del base
    mixed = config.unlabeled_steps(num_steps)
    alone = f"; from step {mixed + 1} on labeled people alone" if 0 < mixed < context.last else ""
    accelerator.print(f"{context.name}: steps {first + 1} to {context.last}, {plan}{alone}")
    if note := _describe_few_unlabeled(context, objective):
        accelerator.print(f"{context.name}: {note}")
    augmenter = Augmenter(config=run.augment, skeleton=skeleton, input_hw=run.data.input_hw)
    people = TrainingPeople(context.sets, augmenter, run.data, config, seed=run.seed, stage=context.name)
    logger = StageLogger(context, augmenter)
    epoch = len(context.sets.train) / config.global_batch
    schedule = SaveSchedule(every=run.save_every, epoch=epoch, last=context.last, saved_at=first)
    logger.draw_crops(people, codec)
    return TrainingStage(
        context=context, model=model, network=network, optimizer=optimizer, objective=objective, frozen=frozen,
        base=context.folder / BASE if adapted else None, people=people, logger=logger, num_steps=num_steps,
        schedule=schedule,
    )  # fmt: skip
