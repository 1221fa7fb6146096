"""Logs of a stage, on rank 0: metrics.jsonl, TensorBoard, images, the progress line; and its evaluations."""

import json
import math
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TextIO, cast

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from jaxtyping import UInt8
from numpy import ndarray as Array
from torch import Tensor, nn
from tqdm import tqdm

from sapiens_accel.config.help import leaves, value_of
from sapiens_accel.config.schema import TENSORBOARD, Config, StageConfig, StageName, TeacherPlacement
from sapiens_accel.data import sampling
from sapiens_accel.data.augment import Augmenter
from sapiens_accel.data.dataset import Key, Labeled, Sets, TrainingPeople
from sapiens_accel.data.people import read_given_ids
from sapiens_accel.data.sampling import Share
from sapiens_accel.errors import UserError
from sapiens_accel.evaluation import evaluate, figures, paired, tables
from sapiens_accel.evaluation.coco_metrics import UNITS
from sapiens_accel.evaluation.error_analysis import Reliability, write_reliability
from sapiens_accel.evaluation.evaluate import Metrics, Predictions
from sapiens_accel.evaluation.paired import PairedDifference
from sapiens_accel.evaluation.predict import Diverged
from sapiens_accel.models.sapiens import Layout
from sapiens_accel.pose import draw
from sapiens_accel.pose.heatmap import Codec
from sapiens_accel.pose.skeleton import Skeleton
from sapiens_accel.runtime import device as gpu
from sapiens_accel.runtime import distributed, files
from sapiens_accel.runtime.files import GIB
from sapiens_accel.runtime.trackers import Trackers
from sapiens_accel.training import checkpoint
from sapiens_accel.training import pseudo_label_quality as holdout
from sapiens_accel.training.loop import Step, stop_between_batches
from sapiens_accel.training.mean_teacher import MeanTeacher
from sapiens_accel.training.objectives import Objective
from sapiens_accel.training.pseudo_label_quality import Holdout, Judged, ProbeResult
from sapiens_accel.training.run_folder import digest_people
from sapiens_accel.training.ssl_monitor import KEEP_RANGE, Alarms, StageResult, Stopped, describe_result
from sapiens_accel.visibility.regression import fit_calibration

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

NUM_CROPS = 8
MAX_SKIPPED = 20  # steps in a row: a network that diverged that far does not recover
SCALE_SEARCH = 5  # steps in a row that fp16 may skip without a warning, while the loss scale is searched
NOTHING_KEPT = 0.005  # shown as 0.00
HARDLY_OPEN = 0.05
MAX_SHOWN_IDS = 40
BEGIN, KEPT = "begin.json", "kept.json"
PRINT_SECONDS = 30
MEASURED_STEPS = 50  # before each line says how much time is left
# The values of a step that every stage has; of a stage with a teacher, the others belong to the teacher.
OF_EVERY_STAGE = ("loss", "lr", "grad_norm", "skipped", "people_per_second")
OF_EVERY_STAGE += ("host_peak_gib", "gpu_peak_gib", "gpu_peak_predicted_gib")
PANEL_TEXT = (
    "validation people as if they were unlabeled: the teacher's keypoints (hollow: below the threshold); the student's "
    "view; what is learned, with a line to the label (red: more than 5 % of the diagonal away)"
)
PICTURE_GROUPS = {"crops": "train", "predictions": "eval", "worst": "eval", "panel": "ssl", "calibration": "ssl"}
PEAK_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes, of getrusage(2): Linux counts in KiB


class Placement(Protocol):
    """Where a stage keeps its teacher (`memory.strategies.Way` is one)."""

    @property
    def teacher(self) -> TeacherPlacement: ...


class StagePlan(Protocol):
    """The memory plan of a stage (`memory.estimate.Plan` is one); printed as one line."""

    @property
    def share(self) -> Share: ...
    @property
    def layout(self) -> Layout: ...
    @property
    def way(self) -> Placement: ...
    @property
    def gpu_peak(self) -> float: ...


@dataclass(frozen=True, kw_only=True)
class StageContext:
    """The description of a stage before it is built.

    Attributes:
        start: the weights that the stage starts from; None for random ones.
        first: steps that are done already.
        last: the stage's last step.
        later: steps of the stages that this run trains after this one, as many of this one as take their planned time.
        begin: called by all ranks with `first` when the stage is built, before anything is written.
    """

    accelerator: Accelerator
    run: Config
    name: StageName
    sets: Sets
    plan: StagePlan
    last: int
    start: str | None = None
    first: int = 0
    later: float = 0.0
    begin: Callable[[int], None] = lambda first: None

    @property
    def config(self) -> StageConfig:
        return self.run.get_stage(self.name)

    @property
    def folder(self) -> Path:
        return Path(self.run.output_dir) / self.name


class Evaluated(NamedTuple):
    """The metrics of a step's weights, each person's OKS, and the predictions, if this process made them."""

    step: int
    metrics: Metrics
    oks: Sequence[float] | None = None
    predictions: Predictions | None = None

    @property
    def rank(self) -> tuple[float, float]:
        """What weights are compared by: AP, and of equal AP (0, or few people) the mean OKS."""
        mean = paired.mean_oks(self.oks)
        return self.metrics["AP"], mean if math.isfinite(mean) else -1.0


class StageLogger:
    """The scalars, evaluations, images and alarms of one stage.

    When a run is resumed, lines of metrics.jsonl after the step it resumes from are removed.
    """

    def __init__(self, context: StageContext, augmenter: Augmenter) -> None:
        self.context, self.accelerator, self.run = context, context.accelerator, context.run
        self.stage: StageName = context.name
        self.run_folder, self.first, self.last = Path(self.run.output_dir), context.first, context.last
        self.people = evaluate.use_areas(context.sets.split(self.run.eval.split), self.run.eval)
        self.skeleton = augmenter.skeleton
        self.evaluated: Evaluated | None = None
        self.kept: Evaluated | None = None  # what is exported
        self.began: Evaluated | None = None  # the weights that the stage began with
        self.skipped, self.disk_failed = 0, False
        self.pseudo_label_bins: Reliability | None = None  # of the last evaluation
        self.unwritten: list[Path] = []  # files of the results, on all ranks
        self.file: TextIO | None = None
        self.board: SummaryWriter | None = None
        self.since, self.since_step, self.printed = time.perf_counter(), self.first, -math.inf
        self.opened = self.since
        self.scores: list[tuple[int, float]] = []  # step and AP of each evaluation of the stage
        self.writes = self.accelerator.is_main_process and not self.run.dry_run
        gpu.reset_peak(self.accelerator.device)
        self.holdout = self._open_holdout(augmenter)
        self._open_files()
        self._resume_state()

    def _open_holdout(self, augmenter: Augmenter) -> Holdout | None:
        """Return labeled people to measure pseudo-labels on, if the stage has any."""
        teacher = self.context.config.teacher
        if teacher is None or not teacher.ratio:
            return None
        people = self.context.sets.val
        num_cutouts = teacher.num_cutouts(augmenter.skeleton.num_keypoints)
        return Holdout(people, augmenter, self.run.data, num_cutouts=num_cutouts, seed=self.run.seed)

    def _open_files(self) -> None:
        disabled = None if self.accelerator.is_main_process else True  # None: shown where there is a terminal
        self.progress = tqdm(
            initial=self.first, total=self.last, desc=self.stage, unit="step", disable=disabled, dynamic_ncols=True
        )
        if self.writes:
            self._on_disk(self._open_metrics)
        if self.writes and TENSORBOARD in self.run.trackers:
            self._on_disk(self._open_board)
        others = tuple(name for name in self.run.trackers if name != TENSORBOARD and self.writes)
        settings = {key: value_of(self.run, key) for key in leaves()} if others else {}
        self.trackers = Trackers(
            others, self.run_folder, self.stage, settings, lambda text: self._warn(self.first, text)
        )

    def _open_metrics(self) -> None:
        path = _without_later_lines(self.run_folder / "metrics.jsonl", self.stage, self.first)
        entries = _entries(path, self.stage) if self.first else ()
        self.scores = [(one["step"], one["AP"]) for one in entries if isinstance(one.get("AP"), float)]
        self.file = path.open("a")

    def _open_board(self) -> None:
        from torch.utils.tensorboard import SummaryWriter

        report = threading.excepthook
        # The writer's thread raises its error at the next call, and would print its traceback as well.
        threading.excepthook = lambda args: None if _is_writer(args.thread) else report(args)
        self.board = SummaryWriter(
            str(self.run_folder / "tensorboard" / self.stage), purge_step=self.first and self.first + 1
        )

    def _resume_state(self) -> None:
        """Restore the alarms' first values, and which weights were exported. All ranks must call it."""
        folder, start, teacher = self.context.folder, self.context.start, self.context.config.teacher
        resumes = self.first and self.accelerator.is_main_process
        earlier = _first_values(self.run_folder / "metrics.jsonl", self.stage) if resumes else {}
        # With `best`, weights of a step after the checkpoint are the best until now all the same: the steps between are
        # taken again and come to them.
        latest = self.last if self.context.config.hand_over == "best" else self.first
        kept = self._read_evaluated(KEPT, latest) if resumes else None
        began = self._read_evaluated(BEGIN, self.first) if resumes else None
        earlier, self.kept, self.began = broadcast_object_list([earlier, kept, began])
        self.is_interrupted = broadcast_object_list([bool(resumes) and self._is_interrupted()])[0]
        good = f"the initial weights, {start}" if start else "none: the initial weights are random"
        if self.first and (folder / "weights").is_dir():
            good = f"in {folder / 'weights'}"
        self.alarms = Alarms(
            good=good,
            num_steps=self.last,
            stops=teacher is None or teacher.on_alarm == "stop",
            fixed_teacher=self.run.distill.teacher is not None,
            first=earlier,
        )

    def _read_evaluated(self, name: str, latest: int) -> Evaluated | None:
        """Return the content of kept.json or begin.json on rank 0.

        None if it is damaged, of a step after `latest`, or measured otherwise than this run does.
        """
        record = files.read_json(self.context.folder / name) or {}
        step, metrics, oks = (record.get(key) for key in ("step", "metrics", "oks"))
        if not (isinstance(step, int) and step <= latest and isinstance(metrics, dict)):
            return None
        if not isinstance(metrics.get("AP"), int | float):
            return None
        if tables.list_differences(record, self._protocol | {"people": digest_people(self.people)}):
            return None
        oks = [math.nan if value is None else value for value in oks] if isinstance(oks, list) else None
        return Evaluated(step, metrics, oks)

    def _is_interrupted(self) -> bool:
        """Whether the evaluation of the step that is resumed, or the export of its weights, was not finished.

        The checkpoint of a step is written before its evaluation.
        """
        every, is_best = self.run.eval_every, self.context.config.hand_over == "best"
        if not (every and self.first % every == 0 and self.first < self.last and is_best and self.kept):
            return False
        if self.run.dry_run or self.kept.step == self.first:
            return False
        entries = _entries(self.run_folder / "metrics.jsonl", self.stage)
        aps = [
            entry["AP"] for entry in entries if entry.get("step") == self.first and isinstance(entry.get("AP"), float)
        ]
        return not aps or aps[-1] > self.kept.metrics["AP"]

    @property
    def unhealthy(self) -> bool:
        """Whether the current state must not be saved: its checkpoint would replace a better one."""
        return self.alarms.unhealthy or self.skipped > 0

    def step(self, done: Step) -> None:
        """Count a step, and log the annotation ids of a skipped one. All ranks must call it.

        Raises:
            Stopped: too many steps in a row were skipped.
        """
        self.progress.update()
        self.skipped = self.skipped + 1 if done.skipped else 0
        if not done.skipped:
            return
        people = gather_object(list(done.ann_ids))
        # The people whose loss was not finite; all people if every loss was finite.
        numbers = sorted([number for number, finite in people if not finite] or [number for number, _ in people])
        ann_ids = self._as_written(numbers)
        self._line(done.number, {"skipped_in_a_row": self.skipped, "ann_ids": ann_ids})
        if self.skipped >= MAX_SKIPPED:
            saved = checkpoint.list_checkpoints(self.context.folder / "checkpoints")
            good = f"{saved[-1]} (--resume_from_checkpoint latest)" if saved else self.alarms.good
            self.close()
            raise Stopped(
                f"{self.stage}: gradients are not finite in {self.skipped} steps in a row up to step {done.number}; "
                f"the last good state is {good}; annotations: {_shortened(ann_ids)}. Lower --{self.stage}.optim.lr"
            )
        if self.accelerator.mixed_precision != "fp16" or self.skipped > SCALE_SEARCH:
            self._warn(done.number, f"gradients are not finite, step skipped; annotations: {_shortened(ann_ids)}")

    def _as_written(self, ann_ids: list[int]) -> list[int | str]:
        """Ids of annotations as their file writes them; their numbers where it is streamed, or is there no more."""
        if self.run.data.streaming:
            return [*ann_ids]
        try:
            return read_given_ids(self.context.sets.train, np.array(ann_ids, np.int64)).tolist()
        except (UserError, OSError):
            return [*ann_ids]

    def scalars(self, step: int, logs: Mapping[str, Tensor | float]) -> None:
        """Average the logs over the ranks and write them, with speed and memory. All ranks must call it.

        It waits for the device, so it is not called at every step.
        """
        device = self.accelerator.device
        values = torch.stack([torch.as_tensor(value, device=device).float() for value in logs.values()])
        means = dict(zip(logs, torch.as_tensor(self.accelerator.reduce(values, "mean")).tolist(), strict=True))
        now = time.perf_counter()
        people = (step - self.since_step) * self.context.config.global_batch
        means["people_per_second"] = people / max(now - self.since, 1e-9)
        self.restart_clock(step)
        means["host_peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * PEAK_UNIT / GIB
        if peak := gpu.peak_bytes(device):
            means["gpu_peak_gib"] = peak / GIB
            means["gpu_peak_predicted_gib"] = self.context.plan.gpu_peak / GIB
        self.write(step, means, "train")
        of_the_plan = "keep" in means or not self.context.config.ratio  # not a step of labeled people alone
        if peak and step - self.first <= self.run.log_every and of_the_plan:
            measured, predicted = means["gpu_peak_gib"], means["gpu_peak_predicted_gib"]
            self.accelerator.print(
                f"{self.stage}: GPU memory {measured:.2f} GiB measured, {predicted:.2f} GiB predicted"
            )
        shown = {"loss": "loss", "keep": "keep", "peak": "teacher_peak", "people/s": "people_per_second"}
        texts = {short: f"{means[name]:.3g}" for short, name in shown.items() if name in means}
        left = [text for text in [self._time_left(step)] if text and step - self.first >= MEASURED_STEPS]
        self.progress.set_postfix_str(", ".join([*(f"{short}={value}" for short, value in texts.items()), *left]))
        # Without a terminal there is no progress bar: a line is printed every PRINT_SECONDS.
        if self.progress.disable and (now - self.printed > PRINT_SECONDS or step == self.last):
            self.printed = now
            numbers = ", ".join([*(f"{short} {value}" for short, value in texts.items()), *left])
            self.accelerator.print(f"{self.stage}: step {step} of {self.last}, {numbers}", flush=True)

    def mark_kept(self, weights: Path) -> None:
        """Record that the weights that were just evaluated are exported."""
        assert self.evaluated
        self.kept = self.evaluated
        self.alarms.good = f"in {weights}"
        if self.writes:
            # It describes the weights that were exported before.
            self._on_disk(lambda: (weights.parent / "eval.json").unlink(missing_ok=True))
            self._record(KEPT, self.kept)
        self.restart_clock(self.evaluated.step)

    def _record(self, name: str, evaluated: Evaluated) -> None:
        """Write what a resumed stage compares with; a person without a labeled keypoint is null."""
        oks = evaluated.oks and [value if math.isfinite(value) else None for value in evaluated.oks]
        record = {"step": evaluated.step, "metrics": evaluated.metrics, "oks": oks, **self._protocol}
        record["people"] = digest_people(self.people)

        def write() -> None:
            self.context.folder.mkdir(parents=True, exist_ok=True)
            files.write_json(self.context.folder / name, record)

        self._on_disk(write)

    def is_better(self) -> bool:
        """Whether the weights that were just evaluated are better than the exported ones; equal ones are not.

        Where nobody can be measured, later ones are.
        """
        assert self.evaluated and self.kept
        return self.evaluated.metrics["AP"] < 0 or self.evaluated.rank > self.kept.rank

    def restart_clock(self, step: int) -> None:
        """Exclude the time of an evaluation or a save from the speed."""
        self.since, self.since_step = time.perf_counter(), step

    def write(self, step: int, values: Mapping[str, float], group: Literal["train", "eval", "ssl"]) -> None:
        """Write values, and the warnings that they cause. All ranks must call it, with equal values.

        Args:
            group: what precedes their names in TensorBoard; what only a teacher has is in ssl.

        Raises:
            Stopped: an alarm stops the stage.
        """
        # JSON has neither infinity (the gradient norm of an fp16 overflow) nor NaN: they become null.
        self._line(step, {name: value if math.isfinite(value) else None for name, value in values.items()})
        tagged = {self._tag(name, group): shown_value(name, value) for name, value in values.items()}
        self._on_board(lambda board: [board.add_scalar(tag, value, step) for tag, value in tagged.items()])
        self.trackers.log(tagged, step)
        try:
            warnings = self.alarms.check(step, values)
        except Stopped as stopped:
            self._line(step, {"stopped": str(stopped)})
            self.close()
            raise
        for warning in warnings:
            self._warn(step, warning)

    def _tag(self, name: str, group: str) -> str:
        """The name of a value in TensorBoard, where those of one group stand together."""
        of_teacher = name.startswith("pseudo_") or (group == "train" and name not in OF_EVERY_STAGE)
        return f"{'ssl' if of_teacher and self.context.config.teacher else group}/{name}"

    def report(self) -> None:
        """Print the last evaluation in a line: AP, its change, the best one, where the weights are, the time left."""
        if not (self.accelerator.is_main_process and self.evaluated):
            return
        step, ap = self.evaluated.step, self.evaluated.metrics["AP"]
        earlier = [one for one in self.scores if one[0] < step]
        before = earlier[-1][1] if earlier else self._first_ap() if step > self.first else None
        parts = [f"{self.stage}: step {step} of {self.last}: {format_score(ap, before)}"]
        if earlier:
            best = max(earlier, key=lambda one: one[1])
            parts.append("the best so far" if ap > best[1] else f"best {100 * best[1]:.1f} at step {best[0]}")
        parts.append(self._where_weights_are())
        if left := self._time_left(step):
            parts.append(left)
        self.progress.write(", ".join(parts))
        sys.stdout.flush()

    def _where_weights_are(self) -> str:
        weights = self.context.folder / "weights"
        if self.kept is self.evaluated:
            return f"weights in {weights}"
        if self.kept:
            return f"weights of step {self.kept.step} in {weights}"
        best = checkpoint.find_best(self.context.folder / "checkpoints")
        return f"weights of {best.name} in {best / 'weights'}" if best else "weights not saved yet"

    def _time_left(self, step: int) -> str:
        """The time until the end of the run, if the plan is as wrong about later stages as about this one until now."""
        done, left = self._work(self.first, step), self._work(step, self.last) + self.context.later
        if not (done and left):
            return ""
        return f"about {format_duration((time.perf_counter() - self.opened) / done * left)} left in the run"

    def _work(self, first: int, last: int) -> float:
        """The steps between, those of labeled people alone as the part that they have of the people of the others."""
        config = self.context.config
        mixed = config.unlabeled_steps(sampling.num_steps(config, len(self.context.sets.train)))
        alone = max(last - max(first, mixed), 0) if mixed else 0
        return last - first - alone * config.ratio / (1 + config.ratio)

    def _warn(self, step: int, warning: str) -> None:
        self._line(step, {"warning": warning})
        if self.accelerator.is_main_process:
            self.progress.write(f"{self.stage}, step {step}: warning: {warning}")

    def _line(self, step: int, entries: Mapping[str, float | str | Sequence[int | str] | None]) -> None:
        if file := self.file:
            line = json.dumps({"stage": self.stage, "step": step, **entries}) + "\n"
            self._on_disk(lambda: file.write(line) and file.flush())

    def _on_disk(self, action: Callable[[], object]) -> None:
        """Write something that training does not depend on: if the disk is full, warn once and continue."""
        try:
            action()
        except files.NOT_WRITTEN as error:
            if not self.disk_failed:
                self.progress.write(f"{self.stage}: warning: {error}; log lines or images are lost, training continues")
            self.disk_failed = True

    def _on_board(self, action: Callable[["SummaryWriter"], object]) -> None:
        """Write to TensorBoard; its thread ends at its first error, and nothing is written after that."""
        if not self.board:
            return
        failed = self.disk_failed
        self.disk_failed = False
        self._on_disk(lambda: action(cast("SummaryWriter", self.board)))
        if self.disk_failed:
            self.board = None
        self.disk_failed = self.disk_failed or failed

    def begin(self, step: int, engine: nn.Module, objective: Objective) -> None:
        """Evaluate the weights that a stage begins with, which later ones are compared with. All ranks must call it.

        Raises:
            EvaluationStopped: a stop was asked for.
        """
        metrics, predictions = self._score(objective.result(engine), objective.codec)
        self.evaluated = Evaluated(step, metrics, self._person_oks(predictions), predictions)
        if self.began is None:
            self.began = self.evaluated
            if self.writes:
                self._record(BEGIN, self.began)
        self.scores.append((step, metrics["AP"]))
        self.write(step, metrics, "eval")
        self.restart_clock(step)

    def probe_first(self, step: int, objective: Objective) -> None:
        """Write the first quality of the pseudo-labels, the reference of its alarms. All ranks must call it.

        It follows the first step: before that, the teacher has no reference for the confidence of a keypoint.
        """
        if self.holdout and not self.run.dry_run:
            self.write(step, self._probe(step, objective).values, "ssl")
            self.restart_clock(step)

    def calibrate(self, step: int, objective: Objective) -> None:
        """Fit the probability that a pseudo-label is right, where a step needs it first. All ranks must call it.

        A resumed stage fits it again if the step that it resumes was evaluated: its checkpoint was written before that.
        """
        if not (self.holdout and isinstance(objective, MeanTeacher) and objective.config.calibrates):
            return
        is_evaluated = bool(step and self.run.eval_every and step % self.run.eval_every == 0)
        if not self.run.dry_run and (is_evaluated or not objective.calibration.any()):
            _fit(objective, self._probe(step, objective, draws=False).judged)

    def evaluate(self, step: int, engine: nn.Module, objective: Objective) -> None:
        """Evaluate the weights that would be exported; with a teacher, also the student and the pseudo-labels.

        All ranks must call it.

        Raises:
            EvaluationStopped: a stop was asked for; nothing is written.
        """
        metrics, predictions = self._score(objective.result(engine), objective.codec)
        if self.context.config.teacher:
            metrics |= {"student_AP": self._score(engine, objective.codec)[0]["AP"]}
        if self.holdout:
            found = self._probe(step, objective)
            metrics |= found.values
            _fit(objective, found.judged)
        if self.writes:
            self._on_disk(lambda: checkpoint.record_score(self.context.folder, step, metrics["AP"]))
        oks = self._person_oks(predictions)
        if gain := self._gain(oks):
            metrics |= {"oks_gain": gain.mean, "oks_gain_stderr": gain.stderr}
        self.evaluated = Evaluated(step, metrics, oks, predictions)
        if self.writes and predictions:
            self._worst(step, predictions)
        self.scores.append((step, metrics["AP"]))
        self.write(step, metrics, "eval")
        self.restart_clock(step)

    def ap(self, step: int) -> float | None:
        """Return the AP of a step's weights, if they were evaluated."""
        return self.evaluated.metrics["AP"] if self.evaluated and self.evaluated.step == step else None

    def _score(self, model: nn.Module, codec: Codec) -> tuple[Metrics, Predictions | None]:
        """Return metrics and predictions; zeros and None for a network that diverged, so that the run continues."""
        network = evaluate.wrap_network(self.accelerator, model, codec)
        config = replace(self.run.eval, csv=None)  # eval.py alone writes it
        try:
            with stop_between_batches(self.accelerator, model):
                result = evaluate.evaluate_networks(
                    self.accelerator, [network], self.people, self.skeleton, self.run.data, config
                )
        except Diverged as error:
            self.accelerator.print(f"{self.stage}: warning: AP counts as 0: {error}")
            return dict.fromkeys(evaluate.METRICS, 0.0), None
        return result.metrics, result.predictions

    def _person_oks(self, predictions: Predictions | None) -> list[float] | None:
        """Return each person's OKS, equal on all ranks; None for a network that diverged."""
        values = None
        if predictions and self.accelerator.is_main_process:
            values = paired.person_oks(predictions, self.people, self.skeleton).tolist()
        return broadcast_object_list([values])[0]

    def _gain(self, oks: Sequence[float] | None) -> PairedDifference | None:
        """Return how much higher people's OKS is than by the weights that the stage began with."""
        before = self.began and self.began.oks
        return paired.paired_difference(before, oks) if before and oks and len(before) == len(oks) else None

    def _probe(self, step: int, objective: Objective, *, draws: bool = True) -> ProbeResult:
        assert isinstance(objective, MeanTeacher) and self.holdout
        found = holdout.probe(
            objective,
            self.holdout,
            batch_size=self.run.eval.batch_size,
            rank=self.accelerator.process_index,
            num_ranks=self.accelerator.num_processes,
            gather=partial(distributed.gather, self.accelerator),
        )
        if self.writes and draws:
            text = f"{self.stage}, step {step}: {PANEL_TEXT}"
            image = draw.add_header(holdout.panel(found.shown_people, self.skeleton), text)
            self._save_image("panel", image, step, numbered=f"_{step}")
            self._save_image("calibration", holdout.draw_calibration(found.bins), step)
        self.pseudo_label_bins = found.bins
        return found

    def draw_crops(self, people: TrainingPeople, codec: Codec) -> None:
        """Write an image of the first step's crops and target heatmaps."""
        if self.writes:
            image = crop_image(people, self.first, codec, self.skeleton)
            text = f"{self.stage}, step {self.first + 1}: augmented crops with their keypoints; below, target heatmaps"
            self._save_image("crops", draw.add_header(image, text), self.first)

    def finish(self) -> Metrics:
        """Write eval.json and predictions of the exported weights (not in a dry run), and close.

        Returns:
            Their metrics; empty in a dry run.
        """
        if self.kept is None or self.evaluated is None:
            self.close()
            return {}
        step, metrics, oks, predictions = self.kept
        if gain := self._gain(oks):
            metrics = metrics | {"oks_gain": gain.mean, "oks_gain_stderr": gain.stderr}
        summary = self._summarize(gain)
        if step < self.last and not summary:
            worse = f"AP {100 * self.evaluated.metrics['AP']:.1f}, after {100 * metrics['AP']:.1f}"
            self.accelerator.print(
                f"{self.stage}: the exported weights are those of step {step}; the last ones are worse ({worse})"
            )
        self._conclude(metrics)
        file = self.context.folder / "eval.json"
        write = partial(
            files.write_json,
            file,
            self._final_metrics(self.kept._replace(metrics=metrics), summary) if self.writes else {},
        )
        if not files.write_on_main(self.accelerator, write, file, needed=False):
            self.unwritten.append(file)
        if self.writes and predictions:  # there are none of weights that were exported before the run was resumed
            if num := self.run.eval.num_pictures:
                image = figures.draw_predictions(predictions, self.people, self.skeleton, num)
                self._save_image("predictions", image, step)
            if self.kept is not self.evaluated:  # the existing image is of other weights
                self._worst(step, predictions)
        self.close()
        if summary:
            self.accelerator.print(f"{self.stage}: {summary}", flush=True)
        return metrics

    def _final_metrics(self, kept: Evaluated, summary: str) -> dict[str, Any]:
        """Return what eval.json says of the exported weights."""
        numbers = {name: value if math.isfinite(value) else None for name, value in kept.metrics.items()}
        whole = {**numbers, "step": self.last, "weights_step": kept.step, **self._protocol}
        if summary:
            whole |= {"hand_over": self.context.config.hand_over, "summary": summary}
        whole["area_used"] = evaluate.describe_area(self.people, self.skeleton, self.run.eval)
        if self.pseudo_label_bins:
            whole["pseudo_labels"] = write_reliability(self.pseudo_label_bins)
        if kept.predictions:
            quality = evaluate.measure_keypoints(kept.predictions, self.people, self.skeleton)
            whole["joints"] = tables.keypoint_statistics(quality, self.skeleton)  # as eval.py has it
        return whole

    def _summarize(self, gain: PairedDifference | None) -> str:
        """Return what is handed over and what is known of it; empty for a stage that hands over its last weights."""
        config, began = self.context.config, self.began
        if self.kept is None or self.evaluated is None or (config.teacher is None and config.hand_over == "last"):
            return ""
        entries = list(_entries(self.run_folder / "metrics.jsonl", self.stage)) if self.holdout else []
        keep, limit_open = _mean_of(entries, "keep"), _mean_limit_open(entries)
        labels = self.kept.metrics if "pseudo_precision" in self.kept.metrics else self.alarms.first
        return describe_result(
            StageResult(
                step=self.kept.step,
                last=self.last,
                aps={one.step: one.metrics["AP"] for one in (began, self.kept, self.evaluated) if one},
                began=began.step if began else None,
                gain=gain,
                keep=keep,
                limit_open=limit_open,
                precision=labels.get("pseudo_precision", math.nan),
                precision_absent_wrong=labels.get("pseudo_precision_absent_wrong", math.nan),
            )
        )

    def _conclude(self, metrics: Metrics) -> None:
        """Warn if the stage did not raise the AP, or did not learn from unlabeled people."""
        if not self.writes:
            return
        first = self._first_ap()
        if first is not None and round(metrics["AP"], 3) < round(first, 3):
            print(
                f"{self.stage}: warning: AP {100 * metrics['AP']:.1f}, and {100 * first:.1f} for the initial weights: "
                f"the stage made them worse. Lower --{self.stage}.optim.lr, or leave this stage out",
                flush=True,
            )
        entries = list(_entries(self.run_folder / "metrics.jsonl", self.stage))
        limit_open, errors = _mean_limit_open(entries), _mean_of(entries, "error_ratio")
        if limit_open is not None and limit_open < HARDLY_OPEN:
            print(
                f"{self.stage}: warning: next to nothing was learned from unlabeled people, since the labels have more "
                f"to teach (mean error_ratio {errors:.2f}, limit_open {limit_open:.2f}). Train longer before this "
                f"stage, or set --{self.stage}.teacher.learned 1",
                flush=True,
            )
        keeps = [entry["keep"] for entry in entries if "keep" in entry]
        mean = sum(keep or 0.0 for keep in keeps) / max(len(keeps), 1)
        if keeps and mean < KEEP_RANGE[0]:
            how_much = "nothing" if max(keep or 0.0 for keep in keeps) < NOTHING_KEPT else "next to nothing"
            print(
                f"{self.stage}: warning: keep was {mean:.2f} in the whole stage: {how_much} was learned from unlabeled "
                f"people. Lower --{self.stage}.teacher.threshold, or start from better weights",
                flush=True,
            )

    def _first_ap(self) -> float | None:
        """Return the AP of the initial weights, if it is known for the same protocol."""
        if self.context.config.teacher:
            return self.alarms.first.get("AP")
        start = Path(self.context.start or "")
        if self.run_folder.resolve() not in start.resolve().parents:
            return None  # of another run, whose validation set may be another
        earlier = files.read_json(start.parent / "eval.json") or {}
        return None if tables.list_differences(earlier, self._protocol) else earlier.get("AP")

    @property
    def _protocol(self) -> dict[str, Any]:
        return evaluate.protocol_settings(self.run.eval, self.people.reading.boxes)

    def close(self) -> None:
        self.progress.close()
        if self.file:
            self._on_disk(self.file.close)
        self._on_board(lambda board: board.close())
        self.trackers.finish()

    def _worst(self, step: int, predictions: Predictions) -> None:
        """Draw the people of lowest OKS; without heatmaps, which would take another forward of all ranks."""
        if num := self.run.eval.num_worst:
            worst = figures.analyze_predictions(predictions, self.people, self.skeleton, num)
            self._save_image("worst", figures.draw_sheet(worst), step, ending="png")

    def _save_image(
        self, name: str, image: UInt8[Array, "h w 3"], step: int, numbered: str = "", ending: str = "jpg"
    ) -> None:
        path = self.run_folder / "pictures" / f"{self.stage}_{name}{numbered}.{ending}"
        self._on_disk(lambda: draw.save_image(image, path))
        tag = f"{PICTURE_GROUPS[name]}/{name}"
        self._on_board(lambda board: board.add_image(tag, image, step, dataformats="HWC"))
        self.trackers.log_image(tag, image, step)


def shown_value(name: str, value: float) -> float:
    """A value in the unit that tables have: shares x 100, -1 where nobody could be measured."""
    column = name.rsplit("/", 1)[-1].removeprefix("student_")
    return 100 * value if UNITS.get(column) == "%" and value > 0 else value


def format_score(ap: float, before: float | None) -> str:
    """AP x 100, and its change."""
    if ap < 0:
        return "AP unknown (nobody could be measured)"
    return f"AP {100 * ap:.1f}" + ("" if before is None or before < 0 else f" ({100 * (ap - before):+.1f})")


def format_duration(seconds: float) -> str:
    """`50 s`, `12 min`, `2 h 05 min`."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def _fit(objective: Objective, judged: Judged) -> None:
    if isinstance(objective, MeanTeacher) and objective.config.calibrates:
        objective.calibrate(fit_calibration(judged.scores, judged.right, judged.counted))


def _is_writer(thread: threading.Thread | None) -> bool:
    return type(thread).__module__ == "tensorboard.summary.writer.event_file_writer"


def crop_image(people: TrainingPeople, step: int, codec: Codec, skeleton: Skeleton) -> UInt8[Array, "h w 3"]:
    """Draw augmented crops of a step: above with their keypoints, below with their target heatmaps."""
    num = min(NUM_CROPS, people.global_batch)
    samples = [people[Key(step, position, False)] for position in range(num)]
    above, below = [], []
    for sample in samples:
        assert isinstance(sample, Labeled)
        image = sample.view.image.permute(1, 2, 0).numpy()
        maps, weights = codec.encode(sample.points_xy[None], sample.weights[None])
        above.append(draw.draw_person(image, sample.points_xy.numpy(), sample.weights.numpy(), skeleton))
        below.append(draw.overlay_heatmaps(image, maps[0].numpy(), weights[0].numpy()))
    return draw.arrange_grid([*above, *below], columns=num)


def _shortened(ann_ids: Sequence[int | str]) -> str:
    more = f" and {len(ann_ids) - MAX_SHOWN_IDS} more" if len(ann_ids) > MAX_SHOWN_IDS else ""
    return ", ".join(map(str, ann_ids[:MAX_SHOWN_IDS])) + more


def _without_later_lines(file: Path, stage: str, step: int) -> Path:
    if file.is_file():
        kept = []
        for line in file.read_text(errors="replace").splitlines():
            try:
                entry = json.loads(line)
                # Step 0 is of what a stage begins with: one that begins again writes it again.
                is_kept = entry["stage"] != stage or 0 < step >= entry["step"]
            except (ValueError, TypeError, KeyError, RecursionError):
                continue  # incomplete: the run was killed while it wrote this line
            if is_kept:
                kept.append(line + "\n")
        temporary = file.with_suffix(".tmp")
        temporary.write_text("".join(kept))
        temporary.replace(file)
    return file


def _first_values(file: Path, stage: str) -> dict[str, float]:
    """Return the first number of each name in a stage's lines."""
    values: dict[str, float] = {}
    for entry in _entries(file, stage):
        values = {name: value for name, value in entry.items() if isinstance(value, float)} | values
    return values


def _mean_of(entries: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """The mean of a logged value; None where no line has it."""
    values = [entry[name] for entry in entries if isinstance(entry.get(name), float)]
    return sum(values) / len(values) if values else None


def _mean_limit_open(entries: Sequence[Mapping[str, Any]]) -> float | None:
    """Of the lines with unlabeled people; None where it was whole in all of them.

    A line without it had the whole limit: it was logged before the stage was resumed with another `learned`.
    """
    values = [entry.get("limit_open", 1.0) for entry in entries if "keep" in entry]
    return sum(values) / len(values) if any("limit_open" in entry for entry in entries) else None


def _entries(file: Path, stage: str) -> Iterator[dict[str, Any]]:
    """Yield a stage's lines of metrics.jsonl."""
    for line in file.read_text(errors="replace").splitlines() if file.is_file() else ():
        try:
            entry = json.loads(line)
            is_its_own = entry["stage"] == stage
        except (ValueError, TypeError, KeyError, RecursionError):
            continue  # incomplete: the run was killed while it wrote this line
        if is_its_own:
            yield entry
