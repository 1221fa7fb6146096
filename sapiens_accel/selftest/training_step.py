"""Take training steps as train.py does, on random people, and measure their peak memory and time.

accelerate launch --config_file accelerate_configs/zero2.yaml -m sapiens_accel.selftest.training_step TASK RESULT
"""

import gc
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import sapiens_accel  # isort: skip  # noqa: F401  (before torch: it sets how threads wait)
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import set_seed
from torch.profiler import ProfilerActivity, profile

from sapiens_accel.config import parse as config
from sapiens_accel.config.schema import Config, StageName, TeacherPlacement
from sapiens_accel.data.dataset import Batch, Labeled, Pair, View
from sapiens_accel.data.sampling import Share
from sapiens_accel.errors import UserError, run_main
from sapiens_accel.models.sapiens import SIZES, Layout, SapiensPose
from sapiens_accel.pose.heatmap import Codec
from sapiens_accel.pose.skeleton import COCO17 as SKELETON
from sapiens_accel.runtime import distributed, engine
from sapiens_accel.training import ema, optim
from sapiens_accel.training.loop import Step, StepConfig, steps
from sapiens_accel.training.mean_teacher import TeacherSetup, build_objective

SCHEDULE = 1000  # length of the schedule; only its first steps are measured
OUT_OF_MEMORY = "out of memory"
STEPS = {"cuda": 3, "cpu": 2}  # the first one creates the optimizer's state

Measurement = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class TrainingCase:
    """A stage and a way to run it on one device.

    Attributes:
        model: a key of `SIZES`.
        way: its name in `memory.strategies.list_ways`.
        launch: its file in accelerate_configs/.
        precision: "no", "bf16" or "fp16", as in the launch files.
        input_hw: of the crop, px.
        micro_batch: labeled people in a forward and backward pass.
        checkpointed_blocks, selective_blocks, head_chunk: see `Layout`.
        teacher: where the fp32 average of the teacher is in stage ssl.
    """

    model: str
    stage: StageName
    way: str
    launch: str
    precision: str
    input_hw: tuple[int, int]
    micro_batch: int
    accumulation: int
    checkpointed_blocks: int
    head_chunk: int | None
    selective_blocks: int = 0
    offload_activations: bool = False
    adam_8bit: bool = False
    bf16_weights: bool = False
    teacher: TeacherPlacement = "device"

    @property
    def share(self) -> Share:
        return Share(rank=0, num_ranks=1, micro_batch=self.micro_batch, accumulation=self.accumulation)

    @property
    def layout(self) -> Layout:
        return Layout(
            checkpointed_blocks=self.checkpointed_blocks,
            selective_blocks=self.selective_blocks,
            head_chunk=self.head_chunk,
        )

    @property
    def run(self) -> Config:
        return run_of(self.model, self.stage, self.input_hw, self.share.global_batch)

    @property
    def num_unlabeled(self) -> int:
        """Unlabeled people in a micro-batch."""
        return self.run.get_stage(self.stage).num_unlabeled(self.micro_batch)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def case_of(tree: dict[str, Any]) -> TrainingCase:
    """The inverse of `TrainingCase.as_json`; JSON has turned its tuple into a list."""
    return TrainingCase(**{**tree, "input_hw": tuple(tree["input_hw"])})


def run_of(model: str, stage: StageName, input_hw: tuple[int, int], batch: int, *options: str) -> Config:
    """The recipe of a model (demo for a tiny one) with this input size and global batch.

    Raises:
        UserError: no such model or option.
    """
    if model not in SIZES:
        raise UserError(f"no such model {model!r} (expected one of {', '.join(SIZES)})")
    recipe = "demo" if model.endswith("tiny") else f"{model}_coco"
    size = [f"--data.input_hw=[{input_hw[0]},{input_hw[1]}]", f"--{stage}.global_batch={batch}"]
    return config.load([f"--recipe={recipe}", f"--model.name={model}", *size, *options])


def random_batch(num: int, unlabeled: int, input_hw: tuple[int, int], device: torch.device) -> Batch:
    """A micro-batch of noise: `num` labeled people and `unlabeled` pairs of views."""

    def view(num: int) -> View:
        image = torch.randint(0, 256, (num, 3, *input_hw), dtype=torch.uint8, device=device)
        matrix = torch.eye(3, device=device)[:2].expand(num, 2, 3).contiguous()
        return View(image, matrix, torch.zeros(num, dtype=torch.bool, device=device))

    k, (height, width) = SKELETON.num_keypoints, input_hw
    points_xy = torch.rand(num, k, 2, device=device) * torch.tensor([width - 1.0, height - 1.0], device=device)
    labeled = Labeled(view(num), points_xy, torch.ones(num, k, device=device), torch.arange(num, device=device))
    pair = Pair(view(unlabeled), view(unlabeled), torch.rand(unlabeled, 5, 4, device=device)) if unlabeled else None
    return Batch(labeled, pair)


def build_network(run: Config, stage: StageName, device: str = "cpu") -> SapiensPose:
    """The initial network of a stage; built on the CPU, as in train.py, or faster on the device."""
    set_seed(run.seed)
    with torch.device(device):
        model = SapiensPose(run.model.name, SKELETON.num_keypoints, run.data.input_hw)
    model.freeze(run.get_stage(stage).frozen)
    return model


def take_steps(
    accelerator: Accelerator, case: TrainingCase, model: SapiensPose, batches: Iterator[Batch]
) -> Iterator[Step]:
    """Build the stage, and return an iterator that takes an optimizer step for each item, until the batches end."""
    plan = case.run.get_stage(case.stage)
    model.lay_out(case.layout)
    teacher = ema.moving_average(accelerator, model, case.teacher) if plan.teacher else None
    if case.bf16_weights:
        optim.keep_in_bf16(optim.list_matrices(model.layer_groups()))
    groups = optim.param_groups(model.layer_groups(), plan.optim)
    options = {"eight_bit": case.adam_8bit, "stochastic": case.bf16_weights}
    optimizer: Any = optim.adamw(groups, plan.optim, accelerator.device, **options)
    network, optimizer = engine.prepare(
        accelerator,
        model,
        optimizer,
        micro_batch=case.micro_batch,
        accumulation=case.accumulation,
        clip_norm=plan.optim.clip_norm,
    )
    setup = teacher and TeacherSetup(
        average=teacher,
        student_parameters=partial(engine.full_values, accelerator, network),
        num_steps=SCHEDULE,
        gather=lambda tensor: tensor,
        unlabeled_each=1.0,
        autocast=distributed.autocast_dtype(accelerator),
    )
    objective = build_objective(plan, codec_of(case.run), SKELETON, setup)
    config = StepConfig(
        accumulation=case.accumulation, optim=plan.optim, num_steps=SCHEDULE, offload=case.offload_activations
    )
    return steps(accelerator, network, optimizer, objective, batches, config)


def codec_of(run: Config) -> Codec:
    heatmap_hw = SIZES[run.model.name].heatmap_hw(run.data.input_hw)
    return Codec(input_hw=run.data.input_hw, heatmap_hw=heatmap_hw, sigma=run.data.sigma)


def start_accelerator(precision: str) -> Accelerator:
    """A new Accelerator with a precision ("no", "bf16", "fp16"), in place of the previous one."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    os.environ["ACCELERATE_MIXED_PRECISION"] = precision
    return distributed.start()


# ---- Peak memory of a case, by the allocator


def measure_on_gpu(accelerator: Accelerator, case: TrainingCase, limit: float) -> Measurement:
    """Build the case and take its steps with a memory limit (bytes) for torch's allocator.

    Returns:
        Bytes: `measured` is the peak of the steps, `building` the peak before them, `reserved` the memory reserved by
        the allocator, `device_used` all used memory of the device at the end, CUDA's context included.

    Raises:
        torch.OutOfMemoryError
    """
    gpu = accelerator.device
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit / torch.cuda.mem_get_info(gpu)[1]))
    num = STEPS["cuda"] * case.accumulation
    batches = (random_batch(case.micro_batch, case.num_unlabeled, case.input_hw, gpu) for _ in range(num))
    stream = take_steps(accelerator, case, build_network(case.run, case.stage), batches)
    building = torch.cuda.max_memory_allocated(gpu)
    torch.cuda.reset_peak_memory_stats(gpu)
    times = []
    for _ in stream:
        torch.cuda.synchronize(gpu)
        times.append(time.perf_counter())
    free, total = torch.cuda.mem_get_info(gpu)
    return {
        "measured": torch.cuda.max_memory_allocated(gpu),
        "outcome": "measured",
        "building": building,
        "reserved": torch.cuda.max_memory_reserved(gpu),
        "device_used": total - free,
        "seconds_per_step": round((times[-1] - times[0]) / (len(times) - 1), 4),
    }


def measure_on_cpu(accelerator: Accelerator, case: TrainingCase) -> Measurement:
    """Build the case and take its steps; batches are created before and not measured."""
    num = STEPS["cpu"] * case.accumulation
    people = (case.micro_batch, case.num_unlabeled, case.input_hw, accelerator.device)
    batches = [random_batch(*people) for _ in range(num)]

    def work() -> None:
        for _ in take_steps(accelerator, case, build_network(case.run, case.stage), iter(batches)):
            pass

    return {"measured": peak_of(work), "outcome": "measured"}


def bytes_made_before(case: TrainingCase) -> int:
    """Bytes of the images of a step that `measure_on_cpu` creates before; the plan counts them as data."""
    views = case.micro_batch + 2 * case.num_unlabeled  # images with cutout are created in the step, and measured
    return case.accumulation * views * 3 * case.input_hw[0] * case.input_hw[1]


def peak_of(work: Callable[[], None]) -> int:
    """The peak bytes of torch's CPU allocator during a call, above the bytes before it."""
    gc.collect()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler prints two lines for each case
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiling:
        work()
    assert profiling.profiler is not None and profiling.profiler.kineto_results is not None
    events: list[Any] = profiling.profiler.kineto_results.events()  # its stub lacks `nbytes`
    now = peak = 0
    for _, num in sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"):
        now += num
        peak = max(peak, now)
    return peak


def main(words: list[str]) -> None:
    """Run the case of TASK.json, and write its measurement to RESULT.json."""
    task = json.loads(Path(words[0]).read_text())
    case, limit = case_of(task["case"]), task["limit"]
    try:
        accelerator = distributed.start()
        cuda = accelerator.device.type == "cuda"
        result = measure_on_gpu(accelerator, case, limit) if cuda else measure_on_cpu(accelerator, case)
    except torch.OutOfMemoryError:
        result = {"measured": None, "outcome": OUT_OF_MEMORY}
    except UserError as error:
        result = {"measured": None, "outcome": f"cannot run here: {error}"}
    Path(words[1]).write_text(json.dumps(result))


if __name__ == "__main__":
    run_main(lambda words: main(list(words)))
    distributed.stop()
