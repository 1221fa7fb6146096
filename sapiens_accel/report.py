"""What a run tells while it runs: metrics.jsonl, TensorBoard, pictures and the progress line, on rank 0."""

import json
import math
import resource
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from jaxtyping import UInt8
from numpy import ndarray as Array
from torch import Tensor
from tqdm import tqdm

from sapiens_accel import draw, evaluate
from sapiens_accel.coco import People, boxes_of, keypoints_of, read_image
from sapiens_accel.config import Config, StageName
from sapiens_accel.data import Key, Labelled, TrainingPeople
from sapiens_accel.evaluate import Predictions
from sapiens_accel.geometry import Crop, apply, warp
from sapiens_accel.heatmap import Codec
from sapiens_accel.plan import GIB, Plan
from sapiens_accel.skeleton import Skeleton

NUM_CROPS = 8
PERSON_HW = (384, 384)
SHOWN_SCORE = 0.2


class Report:
    """One stage's scalars and pictures.

    Args:
        planned: what the memory plan said.
        first: steps already done. Later lines of this stage in metrics.jsonl, of a run that was cut off, are dropped.
        last: the step that the stage ends with.
    """

    def __init__(
        self, accelerator: Accelerator, run: Config, stage: StageName, planned: Plan, *, first: int, last: int
    ) -> None:
        self.accelerator, self.run, self.planned = accelerator, run, planned
        self.stage: StageName = stage
        self.folder, self.first = Path(run.output_dir), first
        self.since, self.since_step = time.perf_counter(), first
        self.writes = accelerator.is_main_process and not run.dry_run
        self.file, self.board = None, None
        if accelerator.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(accelerator.device)
        shown = None if accelerator.is_main_process else True  # None: where there is a terminal
        self.progress = tqdm(initial=first, total=last, desc=stage, unit="step", disable=shown, dynamic_ncols=True)
        if self.writes:
            self.file = _without_later_lines(self.folder / "metrics.jsonl", stage, first).open("a")
        if self.writes and run.report_to == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(self.folder / "tensorboard" / stage), purge_step=first + 1)

    def step(self) -> None:
        self.progress.update()

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
        if device.type == "cuda":
            means["gpu_peak_gib"] = torch.cuda.max_memory_allocated(device) / GIB
            means["gpu_peak_predicted_gib"] = self.planned.gpu_peak / GIB
        self.write(step, means)
        if device.type == "cuda" and step - self.first <= self.run.log_every:
            measured, predicted = means["gpu_peak_gib"], means["gpu_peak_predicted_gib"]
            self.accelerator.print(
                f"{self.stage}: GPU memory {measured:.2f} GiB measured, {predicted:.2f} GiB predicted"
            )
        self.progress.set_postfix({"loss": f"{means['loss']:.2e}", "people/s": f"{means['people_per_second']:.0f}"})

    def restart_clock(self, step: int) -> None:
        """Leave what was just done (evaluating, saving) out of the speed."""
        self.since, self.since_step = time.perf_counter(), step

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write values as they are; what is no number (an fp16 overflow's gradient norm) as null."""
        if self.file:
            finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
            self.file.write(json.dumps({"stage": self.stage, "step": step, **finite}) + "\n")
            self.file.flush()
        for name, value in values.items():
            if self.board:
                self.board.add_scalar(name, value, step)

    def crops(self, people: TrainingPeople, codec: Codec, skeleton: Skeleton) -> None:
        """Show what the network is going to see."""
        if self.writes:
            self._picture("crops", crop_picture(people, self.first, codec, skeleton), self.first)

    def finish(
        self, step: int, metrics: dict[str, float], predictions: Predictions, people: People, skeleton: Skeleton
    ) -> None:
        """Write the stage's metrics, eval.json and predictions."""
        self.write(step, metrics)
        if self.writes:
            how = evaluate.how(self.run.eval)
            (self.folder / self.stage / "eval.json").write_text(json.dumps({**metrics, "step": step, **how}, indent=2))
            picture = prediction_picture(predictions, people, skeleton, self.run.eval.num_pictures)
            self._picture("predictions", picture, step)

    def close(self) -> None:
        self.progress.close()
        if self.file:
            self.file.close()
        if self.board:
            self.board.close()

    def _picture(self, name: str, picture: UInt8[Array, "h w 3"], step: int) -> None:
        draw.save(picture, self.folder / "pictures" / f"{self.stage}_{name}.jpg")
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


def prediction_picture(predictions: Predictions, people: People, skeleton: Skeleton, num: int) -> UInt8[Array, "h w 3"]:
    """People spread over the set: above as labelled, below as predicted (keypoints scored above 0.2)."""
    chosen = np.linspace(0, len(people) - 1, min(num, len(people))).astype(int)
    boxes, keypoints = boxes_of(people.rows), keypoints_of(people.rows)
    above, below = [], []
    for index in chosen:
        x, y, w, h = boxes[index]
        side = 1.25 * max(w, h)
        matrix = Crop(center_xy=(x + w / 2, y + h / 2), size_wh=(side, side)).matrix(PERSON_HW)
        image = warp(read_image(people.root / people.rows[int(index)]["file_name"]), matrix, PERSON_HW)
        labels, found = keypoints[index], apply(matrix, predictions.points_xy[index])
        above.append(draw.person(image, apply(matrix, labels[:, :2]), labels[:, 2] / 2, skeleton))
        below.append(draw.person(image, found, (predictions.scores[index] > SHOWN_SCORE).astype(float), skeleton))
    return draw.grid([*above, *below], columns=len(chosen))


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
