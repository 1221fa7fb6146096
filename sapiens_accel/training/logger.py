"""What a run tells while it runs: metrics.jsonl, TensorBoard, pictures and the progress line, on rank 0."""

import dataclasses
import json
import math
import resource
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from jaxtyping import UInt8
from numpy import ndarray as Array
from torch import Tensor, nn
from tqdm import tqdm

from sapiens_accel.config import parse as config
from sapiens_accel.config.schema import Config, StageName
from sapiens_accel.data import unlabeled as pool
from sapiens_accel.data.augment import Augmenter
from sapiens_accel.data.dataset import Key, Labelled, Sets, TrainingPeople
from sapiens_accel.evaluation import evaluate, tables
from sapiens_accel.evaluation import figures as cases
from sapiens_accel.evaluation.evaluate import Metrics, Predictions
from sapiens_accel.pose import draw
from sapiens_accel.pose.heatmap import Codec
from sapiens_accel.pose.skeleton import Skeleton
from sapiens_accel.runtime import device as gpu
from sapiens_accel.runtime import distributed, files
from sapiens_accel.runtime.files import GIB
from sapiens_accel.training import checkpoint
from sapiens_accel.training import pseudo_label_quality as holdout
from sapiens_accel.training.loop import Step
from sapiens_accel.training.mean_teacher import MeanTeacher, Objective
from sapiens_accel.training.pseudo_label_quality import Holdout
from sapiens_accel.training.ssl_monitor import Alarms, Stopped

NUM_CROPS = 8
MOST_SKIPPED = 20  # steps in a row: what has diverged does not come back
SEARCHED = 5  # that fp16 may skip in a row while it looks for its loss scale, and nothing is said
SHOWN_IDS = 40
KEPT = "kept.json"


def begin_folder(accelerator: Accelerator, run: Config, sets: Sets, done: Iterable[str]) -> None:
    """Make way in the run folder, and write what the run is; nothing of a dry run. All ranks must call it."""
    if accelerator.is_main_process and not run.dry_run:
        folder = Path(run.output_dir)
        checkpoint.make_way(folder, run.stages, run.weights, run.resume_from_checkpoint, done)
        if run.resume_from_checkpoint and not run.weights and (folder / "config.yaml").is_file():
            # What the weights came from decides under which licence they may be passed on.
            earlier = yaml.safe_load((folder / "config.yaml").read_text()).get("weights")
            run = dataclasses.replace(run, weights=earlier)
        config.save(run, folder / "config.yaml")
        pool.write_labelled_ids(folder / "labelled_ann_ids.json", sets.train, run.data)
    accelerator.wait_for_everyone()


class Judged(NamedTuple):
    """What an evaluation found, and at which step."""

    step: int
    metrics: Metrics
    predictions: Predictions | None = None


class Report:
    """One stage's scalars, scores, pictures and alarms.

    Args:
        predicted_peak: bytes of GPU memory that the memory plan predicts.
        start: the weights that the stage began with.
        first: steps already done. Later lines of this stage in metrics.jsonl, of a run that was cut off, are dropped.
        last: the step that the stage ends with.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        run: Config,
        stage: StageName,
        predicted_peak: float,
        sets: Sets,
        augmenter: Augmenter,
        *,
        start: str | None,
        first: int,
        last: int,
    ) -> None:
        self.accelerator, self.run, self.predicted_peak = accelerator, run, predicted_peak
        self.stage: StageName = stage
        self.folder, self.first, self.last = Path(run.output_dir), first, last
        self.people, self.skeleton, self.holdout = sets.split(run.eval.split), augmenter.skeleton, None
        teacher = run.of(stage).teacher
        if teacher and teacher.ratio:
            self.holdout = Holdout(sets.val, augmenter, run.data, num_cutouts=teacher.cutout, seed=run.seed)
        self.judged: Judged | None = None
        self.kept: Judged | None = None
        self.skipped, self.disk_failed = 0, False
        self.since, self.since_step = time.perf_counter(), first
        self.writes = accelerator.is_main_process and not run.dry_run
        self.file, self.board = None, None
        gpu.reset_peak(accelerator.device)
        shown = None if accelerator.is_main_process else True  # None: where there is a terminal
        self.progress = tqdm(initial=first, total=last, desc=stage, unit="step", disable=shown, dynamic_ncols=True)
        if self.writes:
            self.file = _without_later_lines(self.folder / "metrics.jsonl", stage, first).open("a")
        if self.writes and run.report_to == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(self.folder / "tensorboard" / stage), purge_step=first + 1)
        # What a resumed stage is held against is what it was when it began.
        earlier = _first_values(self.folder / "metrics.jsonl", stage) if first and accelerator.is_main_process else {}
        good = f"those that it began with, {start}" if start else "none: it began with random ones"
        if first and (written := self.folder / stage / "weights").is_dir():
            good = f"in {written}"
        stops = teacher is None or teacher.on_alarm == "stop"
        self.alarms = Alarms(good=good, stops=stops, first=broadcast_object_list([earlier])[0])
        kept = files.read_json(self.folder / stage / KEPT) if first and accelerator.is_main_process else None
        if (kept := broadcast_object_list([kept])[0]) and kept["step"] <= first:
            self.kept = Judged(**kept)

    @property
    def sick(self) -> bool:
        """Whether what there is now must not take the place of a saved state."""
        return self.alarms.sick or self.skipped > 0

    def step(self, done: Step) -> None:
        """Count a step, and name the people of one that was left out. All ranks must call it.

        Raises:
            Stopped: too many in a row.
        """
        self.progress.update()
        self.skipped = self.skipped + 1 if done.skipped else 0
        if not done.skipped:
            return
        people = gather_object(list(done.ann_ids))
        # Of those whose loss was no number; where it was one for all, of all of them.
        ann_ids = sorted([number for number, fine in people if not fine] or [number for number, _ in people])
        self._line(done.number, {"skipped_in_a_row": self.skipped, "ann_ids": ann_ids})
        if self.skipped >= MOST_SKIPPED:
            saved = checkpoint.found(self.folder / self.stage / "checkpoints")
            good = f"{saved[-1]} (--resume_from_checkpoint latest)" if saved else self.alarms.good
            self.close()
            raise Stopped(
                f"{self.stage}: gradients that are no numbers, {self.skipped} steps in a row up to {done.number}; "
                f"lower --{self.stage}.optim.lr; the last good state is {good}; annotations: {_shortened(ann_ids)}"
            )
        if self.accelerator.mixed_precision != "fp16" or self.skipped > SEARCHED:
            self._warn(done.number, f"gradients that are no numbers: left out; annotations: {_shortened(ann_ids)}")

    def scalars(self, step: int, logs: Mapping[str, Tensor | float]) -> None:
        """Average the logs over the ranks and write them, with speed and memory. All ranks must call it.

        This waits for the device, so it is called once in a while.
        """
        device = self.accelerator.device
        values = torch.stack([torch.as_tensor(value, device=device).float() for value in logs.values()])
        means = dict(zip(logs, torch.as_tensor(self.accelerator.reduce(values, "mean")).tolist(), strict=True))
        now = time.perf_counter()
        people = (step - self.since_step) * self.run.of(self.stage).global_batch
        means["people_per_second"] = people / max(now - self.since, 1e-9)
        self.restart_clock(step)
        means["host_peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB
        if peak := gpu.peak_bytes(device):
            means["gpu_peak_gib"] = peak / GIB
            means["gpu_peak_predicted_gib"] = self.predicted_peak / GIB
        self.write(step, means)
        if peak and step - self.first <= self.run.log_every:
            measured, predicted = means["gpu_peak_gib"], means["gpu_peak_predicted_gib"]
            self.accelerator.print(
                f"{self.stage}: GPU memory {measured:.2f} GiB measured, {predicted:.2f} GiB predicted"
            )
        shown = {"loss": "loss", "keep": "keep", "peak": "teacher_peak", "people/s": "people_per_second"}
        self.progress.set_postfix({short: f"{means[name]:.3g}" for short, name in shown.items() if name in means})

    def keeps(self, weights: Path) -> None:
        """The weights that were judged last are written now: what a stop points at, and what is handed on."""
        assert self.judged
        self.kept = self.judged
        self.alarms.good = f"in {weights}"
        if self.writes:
            (weights.parent / "eval.json").unlink(missing_ok=True)  # it spoke of other weights
            told = {"step": self.kept.step, "metrics": self.kept.metrics}
            self._on_disk(lambda: files.write_json(weights.parent / KEPT, told))
        self.restart_clock(self.judged.step)

    def restart_clock(self, step: int) -> None:
        """Leave what was just done (evaluating, saving) out of the speed."""
        self.since, self.since_step = time.perf_counter(), step

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write values as they are, and what is wrong with them. All ranks must call it, with values that are equal.

        Raises:
            Stopped: they are so wrong that the stage must not go on.
        """
        # What is no number (an fp16 overflow's gradient norm) is null.
        self._line(step, {name: value if math.isfinite(value) else None for name, value in values.items()})
        for name, value in values.items():
            if self.board:
                self.board.add_scalar(name, value, step)
        try:
            warnings = self.alarms.check(step, values)
        except Stopped as stopped:
            self._line(step, {"stopped": str(stopped)})
            self.close()
            raise
        for warning in warnings:
            self._warn(step, warning)

    def _warn(self, step: int, warning: str) -> None:
        self._line(step, {"warning": warning})
        if self.accelerator.is_main_process:
            self.progress.write(f"{self.stage}, step {step}: warning: {warning}")

    def _line(self, step: int, entries: Mapping[str, float | str | list[int] | None]) -> None:
        if file := self.file:
            line = json.dumps({"stage": self.stage, "step": step, **entries}) + "\n"
            self._on_disk(lambda: file.write(line) and file.flush())

    def _on_disk(self, action: Callable[[], object]) -> None:
        """Write something that the training does not depend on: a full disk is told of once, and it goes on."""
        try:
            action()
        except OSError as error:
            if not self.disk_failed:
                self.progress.write(f"{self.stage}: warning: {error}; lines or pictures are lost, training goes on")
            self.disk_failed = True

    def begin(self, step: int, engine: nn.Module, objective: Objective) -> None:
        """Write what the stage begins with, if it has a teacher: later values are held against it. For all ranks.

        After the first step: before it, no teacher knows how sure it can be of a keypoint.
        """
        if not self.holdout or self.run.dry_run:
            return
        metrics = self._score(objective.result(engine), objective.codec)[0]
        self.write(step, metrics | self._probe(step, objective))
        self.restart_clock(step)

    def judge(self, step: int, engine: nn.Module, objective: Objective) -> bool:
        """Score what the stage would hand over now; with a teacher, also its student and its labels. For all ranks.

        Returns:
            Whether these weights are to be written: with a teacher as long as all is well, else at the end.
        """
        metrics, predictions = self._score(objective.result(engine), objective.codec)
        if self.run.of(self.stage).teacher:
            metrics |= {"student_AP": self._score(engine, objective.codec)[0]["AP"]}
        if self.holdout:
            metrics |= self._probe(step, objective)
        if self.writes:
            self._on_disk(lambda: checkpoint.judged(self.folder / self.stage, step, metrics["AP"]))
        self.judged = Judged(step, metrics, predictions)
        if self.writes:
            self._worst(step, predictions)
        self.write(step, metrics)
        self.restart_clock(step)
        if step == self.last:
            return self.alarms.healthy or self.kept is None  # never over better ones
        return self.alarms.healthy and self.run.of(self.stage).teacher is not None

    def ap(self, step: int) -> float | None:
        """The AP of a step's weights, if they were judged."""
        return self.judged.metrics["AP"] if self.judged and self.judged.step == step else None

    def _score(self, model: nn.Module, codec: Codec) -> tuple[Metrics, Predictions]:
        return evaluate.score(self.accelerator, model, self.people, codec, self.skeleton, self.run.data, self.run.eval)

    def _probe(self, step: int, objective: Objective) -> dict[str, float]:
        assert isinstance(objective, MeanTeacher) and self.holdout
        values, seen = holdout.probe(
            objective,
            self.holdout,
            batch_size=self.run.eval.batch_size,
            rank=self.accelerator.process_index,
            num_ranks=self.accelerator.num_processes,
            gather=partial(distributed.gather, self.accelerator),
        )
        if self.writes:
            self._picture("panel", holdout.panel(seen, self.skeleton), step, numbered=f"_{step}")
        return values

    def crops(self, people: TrainingPeople, codec: Codec) -> None:
        """Show what the network is going to see."""
        if self.writes:
            self._picture("crops", crop_picture(people, self.first, codec, self.skeleton), self.first)

    def finish(self) -> Metrics:
        """Write eval.json and predictions of the weights that the stage hands over, nothing of a dry run; and close."""
        if self.kept is None or self.judged is None:
            self.close()
            return {}
        step, metrics, predictions = self.kept
        if step < self.last:
            worse = f"AP {self.judged.metrics['AP']:.3f}, after {metrics['AP']:.3f}"
            self.accelerator.print(
                f"{self.stage}: the weights of step {step} are kept; the last ones are worse ({worse})"
            )
        if self.writes:
            numbers = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
            whole = {**numbers, "step": self.last, "weights_step": step, **evaluate.how(self.run.eval)}
            if predictions:
                whole |= tables.by_keypoint(evaluate.joints_of(predictions, self.people, self.skeleton), self.skeleton)
            files.write_json(self.folder / self.stage / "eval.json", whole)
            if predictions:  # not of weights that were kept before this run went on
                if num := self.run.eval.num_pictures:
                    picture = cases.prediction_picture(predictions, self.people, self.skeleton, num)
                    self._picture("predictions", picture, step)
                if self.kept is not self.judged:  # what there is was drawn of worse weights
                    self._worst(step, predictions)
        self.close()
        return metrics

    def close(self) -> None:
        self.progress.close()
        if self.file:
            self._on_disk(self.file.close)
        if self.board:
            self.board.close()

    def _worst(self, step: int, predictions: Predictions) -> None:
        """The people of the lowest OKS; without their heatmaps, which would take another forward of all ranks."""
        if num := self.run.eval.num_worst:
            found = cases.find(predictions, self.people, self.skeleton, num)
            self._picture("worst", cases.sheet(found), step, ending="png")

    def _picture(
        self, name: str, picture: UInt8[Array, "h w 3"], step: int, numbered: str = "", ending: str = "jpg"
    ) -> None:
        path = self.folder / "pictures" / f"{self.stage}_{name}{numbered}.{ending}"
        self._on_disk(lambda: draw.save(picture, path))
        if self.board:
            self.board.add_image(name, picture, step, dataformats="HWC")


def crop_picture(people: TrainingPeople, step: int, codec: Codec, skeleton: Skeleton) -> UInt8[Array, "h w 3"]:
    """Augmented crops of a step: above with their joints, below under their target heatmaps."""
    num = min(NUM_CROPS, people.global_batch)
    samples = [people[Key(step, position, False)] for position in range(num)]
    above, below = [], []
    for sample in samples:
        assert isinstance(sample, Labelled)
        image = sample.view.image.permute(1, 2, 0).numpy()
        maps, weights = codec.encode(sample.points_xy[None], sample.weights[None])
        above.append(draw.person(image, sample.points_xy.numpy(), sample.weights.numpy(), skeleton))
        below.append(draw.overlay(image, maps[0].numpy(), weights[0].numpy()))
    return draw.grid([*above, *below], columns=num)


def _shortened(ann_ids: Sequence[int]) -> str:
    more = f" and {len(ann_ids) - SHOWN_IDS} more" if len(ann_ids) > SHOWN_IDS else ""
    return ", ".join(map(str, ann_ids[:SHOWN_IDS])) + more


def _without_later_lines(file: Path, stage: str, step: int) -> Path:
    if file.is_file():
        kept = []
        for line in file.read_text().splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue  # the run was cut off while it wrote this one
            if entry["stage"] != stage or entry["step"] <= step:
                kept.append(line + "\n")
        temporary = file.with_suffix(".tmp")
        temporary.write_text("".join(kept))
        temporary.replace(file)
    return file


def _first_values(file: Path, stage: str) -> dict[str, float]:
    """The first number under each name that a stage's lines hold."""
    found: dict[str, float] = {}
    for line in file.read_text().splitlines() if file.is_file() else ():
        try:
            entry = json.loads(line)
        except ValueError:
            continue  # the run was cut off while it wrote this one
        if entry["stage"] == stage:
            found = {name: value for name, value in entry.items() if isinstance(value, float)} | found
    return found
