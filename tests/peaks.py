"""Real training steps and what the allocator gave them at most, beside what the plan predicts.

    python tests/peaks.py CASES.json        CASES: a list of the fields of `Case`; prints a list of results

How it is launched (accelerate launch, ACCELERATE_*) is the strategy that is measured.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parents[1]))

from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

from sapiens_accel.config import parse as config
from sapiens_accel.config.schema import BaseDtype, Config, OptimConfig, StageConfig, StageName
from sapiens_accel.data.dataset import Batch, Labeled, Pair, View
from sapiens_accel.data.sampling import Share
from sapiens_accel.memory.estimate import Room, predict
from sapiens_accel.memory.stages import measure_stage
from sapiens_accel.memory.strategies import Way
from sapiens_accel.models import adapters, quantized
from sapiens_accel.models.sapiens import Layout, SapiensPose
from sapiens_accel.pose.heatmap import Codec
from sapiens_accel.pose.skeleton import COCO17
from sapiens_accel.runtime import distributed, engine
from sapiens_accel.training import optim
from sapiens_accel.training.ema import MovingAverage
from sapiens_accel.training.loop import StepConfig, steps
from sapiens_accel.training.mean_teacher import MeanTeacher, TeacherSetup
from sapiens_accel.training.objectives import Objective, Supervised

INPUT_HW = (256, 192)


def batch(num: int, num_unlabelled: int) -> Batch:
    def view(n: int) -> View:
        image = torch.randint(0, 256, (n, 3, *INPUT_HW), dtype=torch.uint8)
        return View(image, torch.eye(3)[:2].repeat(n, 1, 1), torch.zeros(n, dtype=torch.bool))

    points_xy = torch.rand(num, 17, 2) * torch.tensor([191.0, 255.0])
    labeled = Labeled(view(num), points_xy, torch.ones(num, 17), torch.arange(num))
    if not num_unlabelled:
        return Batch(labeled, None)
    return Batch(labeled, Pair(view(num_unlabelled), view(num_unlabelled), torch.rand(num_unlabelled, 5, 4)))


@dataclass(frozen=True, kw_only=True)
class Case:
    """A stage of a network, and how its step is taken."""

    name: str
    stage: StageName
    micro_batch: int
    accumulation: int
    checkpointed: int
    chunk: int
    selective: int = 0
    rank: int | None = None  # of adapters
    base_dtype: BaseDtype | None = None
    in_bf16: bool = False  # matrices, with moments in 8 bits
    ratio: float = 1.0  # of unlabeled people in stage ssl


def measure(accelerator: Accelerator, case: Case) -> dict[str, float]:
    """Bytes that two steps of a run take at most, everything but the batches counted, and what was predicted."""
    words = [f"--model.name={case.name}", f"--data.input_hw=[{INPUT_HW[0]},{INPUT_HW[1]}]"]
    words += [f"--lora.rank={case.rank}"] if case.rank else []
    words += [f"--model.base_dtype={case.base_dtype}"] if case.base_dtype else []
    words += ["--memory.adam_8bit", "--memory.bf16_weights"] if case.in_bf16 else []
    words += [f"--ssl.teacher.ratio={case.ratio}"] if case.stage == "ssl" else []
    ranks = accelerator.num_processes
    people = case.micro_batch * case.accumulation * ranks
    run = config.load([*words, f"--{case.stage}.global_batch={people}"])
    counted = measure_stage(run, case.stage, accelerator.mixed_precision != "no")
    way = Way(
        name="here",
        launch="",
        strategy=distributed.strategy(accelerator),
        adam_8bit=case.in_bf16,
        bf16_weights=case.in_bf16,
    )
    share = Share(rank=0, num_ranks=ranks, micro_batch=case.micro_batch, accumulation=case.accumulation)
    layout = Layout(checkpointed_blocks=case.checkpointed, selective_blocks=case.selective, head_chunk=case.chunk)
    predicted = predict(counted, way, share, layout, Room(cuda=False))
    batches = [batch(case.micro_batch, counted.num_unlabeled(share)) for _ in range(2 * case.accumulation)]
    # The images with cutouts are made in a step: one in three of an unlabeled person's.
    outside = predicted.gpu["data"] * (1 + 2 * counted.ratio) / (1 + 3 * counted.ratio)
    most = peak(accelerator, run, case.stage, share, layout, batches)
    return {"predicted": predicted.gpu_peak - outside, "measured": most}


def peak(
    accelerator: Accelerator, run: Config, name: StageName, share: Share, layout: Layout, batches: list[Batch]
) -> float:
    """What the allocator had given out at most, from before the network is built to the end of two steps.

    The profiler sees only what its own thread frees. Of gloo's threads and this one, the last to let go of a collective
    frees its buffers: gloo's on a busy machine, so that buffers long gone were counted to the end (14 % of a peak
    under ZeRO-3 in the worst run). Waiting therefore lasts until gloo's thread is done too.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        stage = run.get_stage(name)
        model = SapiensPose(run.model.name, 17, INPUT_HW)
        model.freeze(stage.frozen)
        if run.model.base_dtype:
            quantized.replace_all(model, run.model.base_dtype)
        adapters.add(model, run.lora)
        half = distributed.autocast_dtype(accelerator)
        if run.lora.rank and half and not distributed.is_deepspeed(accelerator):
            adapters.keep_base_in(model, half)
        model.lay_out(layout)
        teacher = MovingAverage(deepcopy(model)) if stage.teacher else None
        if run.memory.bf16_weights:
            optim.keep_in_bf16(optim.list_matrices(model.layer_groups()))
        groups = optim.param_groups(model.layer_groups(), stage.optim)
        in_bf16 = run.memory.bf16_weights
        optimizer = optim.adamw(groups, stage.optim, torch.device("cpu"), eight_bit=in_bf16, stochastic=in_bf16)
        network, optimizer = engine.prepare(
            accelerator, model, optimizer, micro_batch=share.micro_batch, accumulation=share.accumulation, clip_norm=1.0
        )
        objective = _objective(accelerator, model, teacher, network, stage)
        config = StepConfig(accumulation=share.accumulation, optim=OptimConfig(), num_steps=100)
        for _ in steps(accelerator, network, optimizer, objective, _fresh(batches), config):
            pass
    engine.release(accelerator, network, optimizer)
    events = profiler.profiler.kineto_results.events()  # pyright: ignore[reportOptionalMemberAccess]
    now = most = 0
    for _, size in sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"):
        now += size
        most = max(most, now)
    return most


def _fresh(batches: list[Batch]) -> Iterator[Batch]:
    yield from batches


def _objective(
    accelerator: Accelerator,
    model: SapiensPose,
    teacher: MovingAverage | None,
    network: nn.Module,
    stage: StageConfig,
) -> Objective:
    codec = Codec(input_hw=INPUT_HW, heatmap_hw=model.heatmap_hw, sigma=2)
    supervised = Supervised(codec=codec)
    if teacher is None or stage.teacher is None:
        return supervised
    setup = TeacherSetup(
        average=teacher,
        student_parameters=lambda: (value for _, value in engine.full_parameters(accelerator, network)),
        num_steps=100,
        gather=lambda tensor: tensor,
        autocast=distributed.autocast_dtype(accelerator),
    )
    return MeanTeacher(supervised, setup, stage.teacher, COCO17.mirror, COCO17.names)


def _wait_for_gloo(wait: Callable[..., bool]) -> Callable[..., bool]:
    def longer(*args: object, **kwargs: object) -> bool:
        done = wait(*args, **kwargs)
        time.sleep(0.005)
        return done

    return longer


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.distributed.Work.wait = _wait_for_gloo(torch.distributed.Work.wait)
    results = []
    for case in json.loads(Path(sys.argv[1]).read_text()):
        AcceleratorState._reset_state()
        GradientState._reset_state()
        results.append(measure(distributed.start(), Case(**case)))
    print(json.dumps(results))
    distributed.stop()
