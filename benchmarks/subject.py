"""What is measured: a stage of training, built as train.py builds it, on random people."""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from sapiens_accel.config import parse as config
from sapiens_accel.config.schema import Config, StageConfig, StageName
from sapiens_accel.data.dataset import Batch, Labelled, Pair, View
from sapiens_accel.data.sampling import Share
from sapiens_accel.errors import UserError
from sapiens_accel.models.sapiens import SIZES, Layout, SapiensPose
from sapiens_accel.pose.heatmap import Codec
from sapiens_accel.pose.skeleton import COCO17 as SKELETON
from sapiens_accel.runtime import distributed, engine
from sapiens_accel.training import ema, optim
from sapiens_accel.training.loop import Step, steps
from sapiens_accel.training.mean_teacher import build_objective

SCHEDULE = 1000  # steps of the schedule that the few measured ones are taken from


@dataclass(frozen=True, kw_only=True)
class Case:
    """A stage, and one way to run it on one device.

    Attributes:
        model: a key of `SIZES`.
        way: its name in `plan.ways`.
        launch: its file in accelerate_configs/.
        precision: "no", "bf16" or "fp16", as the launch files say it.
        input_hw: of the crop, px.
        micro_batch: labelled people of one forward and backward.
        checkpointed_blocks, head_chunk: see `Layout`.
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
    offload_activations: bool = False
    adam_8bit: bool = False

    @property
    def share(self) -> Share:
        return Share(rank=0, num_ranks=1, micro_batch=self.micro_batch, accumulation=self.accumulation)

    @property
    def layout(self) -> Layout:
        return Layout(checkpointed_blocks=self.checkpointed_blocks, head_chunk=self.head_chunk)

    @property
    def run(self) -> Config:
        return run_of(self.model, self.stage, self.input_hw, self.share.global_batch)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def case_of(tree: dict[str, Any]) -> Case:
    """What `Case.as_json` made, after JSON has turned its tuple into a list."""
    return Case(**{**tree, "input_hw": tuple(tree["input_hw"])})


def run_of(model: str, stage: StageName, input_hw: tuple[int, int], batch: int, *more: str) -> Config:
    """The model's own recipe (the demo's for a tiny one) at this input size and global batch.

    Raises:
        UserError: no such model, an option that does not exist.
    """
    if model not in SIZES:
        raise UserError(f"no such model {model!r}; there are: {', '.join(SIZES)}")
    recipe = "demo" if model.endswith("tiny") else f"{model}_coco"
    size = [f"--data.input_hw=[{input_hw[0]},{input_hw[1]}]", f"--{stage}.global_batch={batch}"]
    return config.load([f"--recipe={recipe}", f"--model.name={model}", *size, *more])


def people(num: int, unlabelled: int, input_hw: tuple[int, int], device: torch.device) -> Batch:
    """A micro-batch of noise: `num` labelled people and `unlabelled` pairs of views."""

    def view(num: int) -> View:
        image = torch.randint(0, 256, (num, 3, *input_hw), dtype=torch.uint8, device=device)
        matrix = torch.eye(3, device=device)[:2].expand(num, 2, 3).contiguous()
        return View(image, matrix, torch.zeros(num, dtype=torch.bool, device=device))

    k, (height, width) = SKELETON.num_keypoints, input_hw
    points_xy = torch.rand(num, k, 2, device=device) * torch.tensor([width - 1.0, height - 1.0], device=device)
    labelled = Labelled(view(num), points_xy, torch.ones(num, k, device=device), torch.arange(num, device=device))
    pair = Pair(view(unlabelled), view(unlabelled), torch.rand(unlabelled, 5, 4, device=device)) if unlabelled else None
    return Batch(labelled, pair)


def num_unlabelled(plan: StageConfig, num: int) -> int:
    """Unlabelled people that come with so many labelled ones."""
    return num * plan.ratio


def network(run: Config, stage: StageName) -> SapiensPose:
    """The stage's network with its first weights, on the CPU."""
    set_seed(run.seed)
    model = SapiensPose(run.model.name, SKELETON.num_keypoints, run.data.input_hw)
    model.freeze(run.of(stage).frozen)
    return model


def stepping(accelerator: Accelerator, case: Case, model: SapiensPose, batches: Iterator[Batch]) -> Iterator[Step]:
    """Build the stage; what is returned takes one optimizer step each time it is asked, until the batches end."""
    plan = case.run.of(case.stage)
    model.lay_out(case.layout)
    teacher = ema.moving_average(accelerator, deepcopy(model), "device") if plan.teacher else None
    groups = optim.param_groups(model.layer_groups(), plan.optim)
    optimizer: Any = optim.adamw(groups, plan.optim, accelerator.device, eight_bit=case.adam_8bit)
    network, optimizer = engine.prepare(
        accelerator,
        model,
        optimizer,
        micro_batch=case.share.micro_batch,
        accumulation=case.share.accumulation,
        clip_norm=plan.optim.clip_norm,
    )
    objective = build_objective(
        plan,
        codec_of(case.run),
        SKELETON,
        teacher,
        partial(engine.full_values, accelerator, network),
        num_steps=SCHEDULE,
        gather=lambda tensor: tensor,
        autocast=distributed.autocast_dtype(accelerator),
    )
    rest = (case.share, plan.optim, 0, SCHEDULE, case.offload_activations)
    return steps(accelerator, network, optimizer, objective, batches, *rest)


def codec_of(run: Config) -> Codec:
    heatmap_hw = SIZES[run.model.name].heatmap_hw(run.data.input_hw)
    return Codec(input_hw=run.data.input_hw, heatmap_hw=heatmap_hw, sigma=run.data.sigma)
