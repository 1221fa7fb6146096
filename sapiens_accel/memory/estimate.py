"""What one way to run a stage needs, part by part, and the largest micro-batch that fits. All of it is predicted.

The state (weights, gradients, masters, Adam, teacher, buckets) is counted from the parameters and from what DeepSpeed
allocates; the activations are measured on fake tensors (`footprint`).
"""

import json
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from sapiens_accel.config.schema import Config, MemoryConfig, Place, StageConfig, StageName
from sapiens_accel.data.sampling import Share
from sapiens_accel.errors import UserError
from sapiens_accel.memory.activations import Footprint, footprint
from sapiens_accel.models.attention import padded_dim
from sapiens_accel.models.sapiens import Layout, SapiensPose
from sapiens_accel.runtime import distributed
from sapiens_accel.runtime.distributed import Strategy
from sapiens_accel.runtime.files import GIB
from sapiens_accel.training import optim

# Not measured yet: allowances, to be calibrated on a GPU.
CONTEXT = 1.0 * GIB  # of a card's memory: CUDA, its libraries, the display
WORKSPACE = 0.125 * GIB  # of cuBLAS and cuDNN
NCCL = 0.25 * GIB  # of the ranks' communication
FRAGMENTATION = 0.04  # of what comes and goes in a step
PROCESS = 3.0 * GIB  # of host memory: Python, torch and CUDA's side of it
WORKER = 0.6 * GIB  # of host memory: a decoding process
IN_FLIGHT = 3  # block inputs that are on the GPU at a time when they are offloaded
FLATTENED_SUMS, FLATTENED = 500_000_000, 50_000_000  # elements that DeepSpeed copies into one tensor, in fp32
MOST_CHUNK, FEW = 16, 4  # people of a head chunk: more gain nothing, fewer leave the GPU waiting

# Blocks are kept whole, to save time, only up to this part of the memory: the rest is for what the prediction misses.
SPENT = 0.5

# To rank strategies only: rates of a 16 GB card and its host.
FLOPS, BUS, HOST = 4e13, 1.2e10, 2e10  # 16-bit arithmetic, bytes of PCIe, bytes of host memory, each per second


@dataclass(frozen=True, kw_only=True)
class Way:
    """A way to run a stage: a launch, and the options that go with it; `fit` chooses where a teacher is kept."""

    name: str
    launch: str
    strategy: Strategy
    offload_activations: bool = False
    adam_8bit: bool = False
    teacher: Place = "device"

    def options(self) -> list[str]:
        """What train.py has to be told beside the launch."""
        flags = {"offload_activations": self.offload_activations, "adam_8bit": self.adam_8bit}
        return [f"--memory.{name}" for name, wanted in flags.items() if wanted]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One way, planned for one stage.

    Attributes:
        share: this rank's micro-batches.
        gpu: bytes on a device by part, at the moment when they are most.
        later: bytes by part that come and go at other moments.
        host: bytes of host memory by part, all ranks of this machine together.
        allowance: bytes of a device beyond what torch allocates: workspaces, fragmentation.
        seconds: of one optimizer step, to compare ways with each other and for nothing else.
        room: bytes of a device that may be used; None where memory does not limit.
        host_room: likewise of the host.
        otherwise: the options to try if memory runs out all the same.
    """

    way: Way
    share: Share
    layout: Layout
    gpu: Mapping[str, float] = field(default_factory=dict)
    later: Mapping[str, float] = field(default_factory=dict)
    host: Mapping[str, float] = field(default_factory=dict)
    allowance: float = 0.0
    seconds: float = 0.0
    room: float | None = None
    host_room: float | None = None
    otherwise: str = ""

    @property
    def gpu_peak(self) -> float:
        """What torch.cuda.max_memory_allocated() is predicted to say."""
        return sum(self.gpu.values())

    @property
    def host_peak(self) -> float:
        return sum(self.host.values())

    @property
    def fits(self) -> bool:
        fits_device = self.room is None or self.gpu_peak + self.allowance <= self.room
        return fits_device and (self.host_room is None or self.host_peak <= self.host_room)

    def __str__(self) -> str:
        blocks = f"{self.layout.checkpointed_blocks} blocks checkpointed"
        chunk = f", head in chunks of {self.layout.head_chunk}" if self.layout.head_chunk else ""
        kept = {"device": "", "sharded": ", teacher shared among the ranks", "host": ", teacher kept on the host"}
        limit = "" if self.room is None else f"; {self.gpu_peak / GIB:.1f} of {self.room / GIB:.1f} GiB (predicted)"
        return f"{self.share}, {blocks}{chunk}{kept[self.way.teacher]}{limit}"


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What of a stage decides its memory: the network's parameters as they are frozen, and the footprint of a step."""

    plan: StageConfig
    memory: MemoryConfig
    num_parameters: int
    num_learning: int
    head_learning: int
    block_learning: int
    stem_learning: int  # of the embeddings and the first block
    groups: tuple[int, ...]
    largest: int
    depth: int
    image_bytes: int
    queries: int  # elements of all heads' queries of a person, as attention gets them
    map_bytes: int
    num_workers: int
    prints: Callable[[bool], Footprint]  # of whether the arithmetic is cast from fp32 weights

    @property
    def ratio(self) -> int:
        return self.plan.ratio


def stage_of(
    run: Config, name: StageName, half: bool = True, num_keypoints: int = 17, *, padded: bool = False
) -> Stage:
    """Count a stage's parameters and measure its step.

    Args:
        padded: attention is padded (`models.attention.needs_padding`).

    Raises:
        UserError: a frozen pattern that matches nothing.
    """
    plan = run.of(name)
    with torch.device("meta"):
        model = SapiensPose(run.model.name, num_keypoints, run.data.input_hw)
    model.freeze(plan.frozen)
    sizes = [p.numel() for p in model.parameters()]
    layers = model.layer_groups()
    groups = optim.param_groups(layers, plan.optim)
    (height, width), size = run.data.input_hw, model.size
    dim = size.width // size.heads
    arguments = (run.model.name, num_keypoints, run.data.input_hw, run.data.sigma, plan, half)
    return Stage(
        plan=plan,
        memory=run.memory,
        num_parameters=sum(sizes),
        num_learning=sum(p.numel() for p in model.parameters() if p.requires_grad),
        head_learning=sum(p.numel() for p in model.head.parameters() if p.requires_grad),
        block_learning=sum(p.numel() for p in model.blocks[-1].parameters() if p.requires_grad),
        stem_learning=sum(p.numel() for part in ("embeddings", "block_0") for _, p in layers[part] if p.requires_grad),
        groups=tuple(sum(p.numel() for p in group["params"]) for group in groups),
        largest=max(sizes),
        depth=model.size.depth,
        image_bytes=3 * height * width,
        queries=(height // size.patch) * (width // size.patch) * size.heads * (padded_dim(dim) if padded else dim),
        map_bytes=4 * num_keypoints * math.prod(model.heatmap_hw),
        num_workers=run.data.num_workers,
        prints=partial(footprint, *arguments, padded=padded),
    )


def need(
    stage: Stage, way: Way, share: Share, layout: Layout, room: float | None, host_room: float | None, cuda: bool = True
) -> Plan:
    """Count everything for one way, micro-batch and layout.

    Args:
        room: bytes of a device that may be used.
        host_room: bytes of this machine's memory that may be used.
        cuda: with what only CUDA's kernels take.
    """
    strategy, accumulates = way.strategy, share.accumulation > 1
    plain = strategy.zero == 0
    prints = stage.prints(plain and strategy.half)
    p = share.micro_batch * (1 + stage.ratio)
    n = min(p, layout.head_chunk or p)
    state = state_bytes(stage, way, accumulates)
    gradients = state.pop("gradients")
    state["data"] = share.accumulation * share.micro_batch * (1 + 3 * stage.ratio) * stage.image_bytes
    # A gradient exists from its backward to the optimizer's step; ZeRO-3's buffer of them is there all the time, and
    # ZeRO-1 and 2 make theirs for all of them when the first bucket is full, early in the backward.
    forward = gradients if accumulates or strategy.zero == 3 else 0.0
    early = 0.0 if plain and not accumulates else gradients
    ranks, four = strategy.num_ranks, 4.0
    if plain and ranks > 1:
        state["zero_buckets"] = four * stage.num_learning  # DistributedDataParallel's

    checkpointed, whole = layout.checkpointed_blocks, stage.depth - layout.checkpointed_blocks
    on_device = min(checkpointed, IN_FLIGHT) if way.offload_activations else checkpointed
    attention = 4.0 * p * stage.queries if cuda else 0.0  # both fused kernels sum the queries' gradient in fp32
    stem, kept, saved = prints.stem(p), prints.kept(p), prints.saved(p)
    left = prints.gradient(p)
    phases: dict[str, dict[str, float]] = {
        "head": {
            "features": stem + prints.neck(p),
            "block_checkpoints": on_device * kept,
            "whole_blocks": whole * saved,
            "head_chunk": prints.head(p, n),
            "gradients": forward,
        }
    }
    if whole and saved:
        phases["whole"] = {
            "features": stem + prints.neck(p) + left,
            "block_checkpoints": on_device * kept,
            "whole_blocks": whole * saved,
            "block_working_set": prints.whole(p) + attention,
            "gradients": early,
        }
    if checkpointed and kept:
        block = {"features": stem, "block_working_set": prints.again(p) + attention}
        met = float(prints.gradient[0]) + four * whole * stage.block_learning if plain and not accumulates else early
        phases["first"] = {**block, "block_checkpoints": max(0, on_device - 1) * kept, "gradients": met}
        ending = gradients - four * stage.stem_learning if plain and not accumulates else gradients
        phases["last"] = {**block, "gradients": ending}
    if not saved:
        phases["forward"] = {"features": prints.forward(p), "gradients": forward}
    if stage.ratio:
        u = share.micro_batch * stage.ratio
        decoding = 5 * u * stage.map_bytes  # in fp32: the maps, blurred along each axis, padded, and their logarithm
        phases["teacher"] = {"features": max(prints.forward(u), u * stage.map_bytes + decoding), "gradients": forward}
    name = max(phases, key=lambda phase: sum(phases[phase].values()))
    moving = {part: size for part, size in phases[name].items() if part != "gradients"}
    gpu = {**state, **phases[name]}
    later = {
        "head_chunk": prints.head(p, n),
        "block_working_set": phases.get("first", {}).get("block_working_set", 0.0),
    }
    workspace = WORKSPACE + FRAGMENTATION * sum(moving.values()) + (NCCL if ranks > 1 else 0.0) if cuda else 0.0
    waiting = _pinned([kept]) * checkpointed if way.offload_activations else 0.0
    return Plan(
        way=way,
        share=share,
        layout=layout,
        gpu={part: size for part, size in gpu.items() if size},
        later={part: size for part, size in later.items() if size and not gpu.get(part)},
        host=_host(stage, way, accumulates, waiting),
        allowance=workspace,
        seconds=_seconds(stage, way, share, layout, prints),
        room=room,
        host_room=host_room,
    )


def state_bytes(stage: Stage, way: Way, accumulates: bool) -> dict[str, float]:
    """Bytes on a device that stay through a step; `gradients` when all of them are there."""
    strategy, ranks = way.strategy, way.strategy.num_ranks
    everything, learning = stage.num_parameters, stage.num_learning
    sixteen = strategy.half and strategy.zero > 0
    word = 2 if sixteen else 4
    # Accumulated in fp32 (`engine.prepare`); DeepSpeed then keeps the sum on the device, offloading or not.
    in_fp32 = accumulates and strategy.bf16
    # Under ZeRO-1 that is DeepSpeed's BF16_Optimizer, which keeps a backward's gradients in 16 bits beside the sums.
    beside = in_fp32 and strategy.zero == 1 and not strategy.offload
    summed = 6 if beside else 4 if in_fp32 else word
    part = learning / ranks
    weights = word * everything / (ranks if strategy.zero == 3 else 1)
    state = {
        "weights": 0.0 if strategy.offload_weights else weights,
        "gradients": summed * (part if strategy.zero >= 2 else learning),
        "masters": 4 * part if strategy.zero else 0.0,
        "adam": 2 * (1 + 4 / 256) * learning if way.adam_8bit else 8 * (part if strategy.zero else learning),
        "ema_teacher": _teacher_bytes(stage, way),
        "zero_buckets": float(strategy.bucket * word),
    }
    if strategy.zero == 3:
        state["zero_buckets"] += word * min(strategy.live, everything)
    if beside and ranks > 1:
        state["zero_buckets"] = 4.0 * min(FLATTENED_SUMS, learning)  # what the ranks add up at a time
    if strategy.offload:
        state |= {"masters": 0.0, "adam": 0.0}
        # A buffer of the largest parameter, and in fp32 its gradient on the way down, and again for its norm.
        state["zero_buckets"] += (word + 8) * stage.largest
        if not in_fp32 or strategy.zero == 3:
            state["gradients"] = 0.0
        else:
            state["zero_buckets"] += 4.0 * min(FLATTENED, part)
    return state


def _teacher_bytes(stage: Stage, way: Way) -> float:
    """Of the average on a device. What an update takes beside it is bounded and there between two steps only."""
    if stage.plan.teacher is None:
        return 0.0
    average, copy = 4.0 * stage.num_parameters, (2.0 if way.strategy.half else 4.0) * stage.num_parameters
    return {"device": average, "sharded": average / way.strategy.num_ranks + copy, "host": copy}[way.teacher]


def _host(stage: Stage, way: Way, accumulates: bool, waiting: float) -> dict[str, float]:
    """Bytes of the machine's memory at the worst moment: all ranks load, or the state has been built."""
    strategy, ranks, here = way.strategy, way.strategy.num_ranks, way.strategy.num_local
    always = {"process": PROCESS * here, "workers": WORKER * stage.num_workers * here}
    loading = 8.0 * stage.num_parameters * here  # the network and the file, in fp32, on every rank
    state: dict[str, float] = {}
    if strategy.offload:
        groups = [size / ranks for size in stage.groups]
        state["masters"] = here * _pinned([4 * size for size in groups])
        state["gradients"] = here * _pinned([4 * size for size in groups])
        state["adam"] = here * sum(8 * size for size in groups)
        state["weights"] = here * _pinned([2 * size for size in groups])
        if accumulates and (strategy.zero == 3 or not strategy.bf16):
            state["gradients"] += 4.0 * stage.num_learning * here / ranks
    if strategy.offload_weights:
        state["weights"] = 2.0 * stage.num_parameters * here / ranks
    if stage.plan.teacher and way.teacher == "host":
        state["ema_teacher"] = 4.0 * stage.num_parameters * here / ranks
    if waiting:
        state["block_checkpoints"] = here * waiting
    saving = 4.0 * stage.num_parameters * (2 if stage.plan.teacher else 1)  # rank 0 collects the weights
    return {**always, **state, "loading_and_saving": max(saving, loading - sum(state.values()))}


def _pinned(sizes: Sequence[float]) -> float:
    """torch rounds each piece of pinned memory up to a power of two."""
    return float(sum(2 ** math.ceil(math.log2(size)) for size in sizes if size > 0))


def _seconds(stage: Stage, way: Way, share: Share, layout: Layout, prints: Footprint) -> float:
    """A rough time of one optimizer step, which ranks the ways; nobody has measured it."""
    strategy, ranks = way.strategy, way.strategy.num_ranks
    p, steps = share.micro_batch * (1 + stage.ratio), share.accumulation
    learns = stage.num_learning > stage.head_learning
    passes = (3 if learns else 1) * stage.depth + (layout.checkpointed_blocks if learns else 0)
    flops = p * (passes * prints.block_flops + 3 * prints.head_flops)
    flops += share.micro_batch * stage.ratio * (stage.depth * prints.block_flops + prints.head_flops)
    # Casts between fp32 and 16 bits; hooks at every layer.
    overhead = {0: 1.1, 3: 1.05}.get(strategy.zero, 1.0)
    few = 1 + 1 / p  # launches and small matrices
    compute = steps * flops * overhead * few / FLOPS
    copies = 0.0
    if strategy.offload:  # the gradients' way down hides behind the backward, most of it
        copies += 28 * stage.num_learning / ranks / HOST + 2 * stage.num_learning / BUS * (0.3 * steps + 1)
    if strategy.zero == 3:
        copies += steps * 3 * 2 * stage.num_parameters / BUS * 0.5
    if way.offload_activations:
        copies += steps * 2 * layout.checkpointed_blocks * prints.kept(p) / BUS * 0.3
    if strategy.zero and ranks > 1:
        copies += 4 * stage.num_learning / BUS * 0.5
    if strategy.zero == 0 and ranks > 1:
        copies += 8 * stage.num_learning / BUS * 0.5
    if stage.plan.teacher and way.teacher == "host":
        copies += (2 * 2 / BUS + 12 / HOST) * stage.num_parameters / ranks
    if stage.plan.teacher and way.teacher != "device" and ranks > 1:
        copies += 2 * stage.num_parameters / BUS * 0.5
    return compute + copies + (0.002 if way.adam_8bit else 0.0)


def fit(
    stage: Stage, name: str, way: Way, room: float | None, host_room: float | None, rank: int = 0, cuda: bool = True
) -> Plan:
    """The largest micro-batch that fits, with the fewest checkpointed blocks; if none does, what needs the least.

    A larger micro-batch with the teacher's average elsewhere comes before a smaller one with it on the device.

    Raises:
        UserError: the global batch does not divide into processes x micro-batch; a number of blocks that there is not;
            an average shared among one process.
    """
    asked, ranks = stage.memory, way.strategy.num_ranks
    if asked.checkpointed_blocks is not None and not 0 <= asked.checkpointed_blocks <= stage.depth:
        raise UserError(f"--memory.checkpointed_blocks {asked.checkpointed_blocks}: the network has {stage.depth}")
    places = _places(stage, ranks)
    part = people_of_a_rank(name, stage.plan, ranks, asked.micro_batch)
    sizes = [asked.micro_batch] if asked.micro_batch else [n for n in range(part, 0, -1) if part % n == 0]
    # A whole block of ZeRO-3 would keep its gathered weights; and what is offloaded should be little.
    every = way.offload_activations or way.strategy.zero == 3
    all_blocks = [stage.depth] if every and room is not None else list(range(stage.depth + 1))
    blocks = all_blocks if asked.checkpointed_blocks is None else [asked.checkpointed_blocks]
    if room is None:  # memory does not limit: nothing is computed twice
        share = Share(rank=rank, num_ranks=ranks, micro_batch=sizes[0], accumulation=part // sizes[0])
        layout = Layout(checkpointed_blocks=blocks[0], head_chunk=asked.head_chunk, compiled=asked.compile_blocks)
        return Plan(way=replace(way, teacher=places[0]), share=share, layout=layout)
    tried = []
    for size, place in product(sizes, places):
        way = replace(way, teacher=place)
        share = Share(rank=rank, num_ranks=ranks, micro_batch=size, accumulation=part // size)
        for checkpointed in blocks:
            last = checkpointed == blocks[-1]
            for chunk in _chunks(stage, way, share, checkpointed, room, cuda, smallest=last):
                layout = Layout(checkpointed_blocks=checkpointed, head_chunk=chunk, compiled=asked.compile_blocks)
                plan = need(stage, way, share, layout, room, host_room, cuda)
                spends = not last and plan.gpu_peak + plan.allowance > SPENT * room
                if plan.fits and not spends:
                    return plan
                tried.append(plan)
    return min(tried, key=lambda plan: plan.gpu_peak + plan.allowance)


def _places(stage: Stage, ranks: int) -> list[Place]:
    """Where a teacher's average may be kept, fastest first."""
    asked = stage.memory.teacher
    if asked == "sharded" and ranks == 1 and stage.plan.teacher:
        raise UserError("--memory.teacher sharded: there is one process to share among; expected device or host")
    if stage.plan.teacher is None:
        return ["device"]
    return [asked] if asked else ["device", "sharded", "host"] if ranks > 1 else ["device", "host"]


def _chunks(
    stage: Stage, way: Way, share: Share, checkpointed: int, room: float, cuda: bool, *, smallest: bool
) -> Sequence[int]:
    """Chunks of the head to try: the largest that does not raise the peak, but not so few that the GPU waits.

    Args:
        smallest: try a single person too, when nothing else is left to save.
    """
    if stage.memory.head_chunk:
        return [stage.memory.head_chunk]
    p = share.micro_batch * (1 + stage.ratio)
    free = 1
    for n in range(1, min(p, MOST_CHUNK) + 1):
        plan = need(stage, way, share, Layout(checkpointed_blocks=checkpointed, head_chunk=n), room, None, cuda)
        if "head_chunk" in plan.gpu:
            break
        free = n
    few = max(free, min(p, FEW))
    return [few, 1] if smallest and few > 1 else [few]


def people_of_a_rank(name: str, plan: StageConfig, ranks: int, micro_batch: int | None) -> int:
    """Labeled people of one process in one optimizer step.

    Raises:
        UserError: the global batch is not a multiple of processes x micro-batch.
    """
    if plan.global_batch % (ranks * (micro_batch or 1)):
        raise UserError(
            f"--{name}.global_batch {plan.global_batch} is not divisible by {ranks} processes"
            + (f" x micro-batch {micro_batch} (--memory.micro_batch)" if micro_batch else "")
        )
    return plan.global_batch // ranks


# ---- The ways


def ways(num_ranks: int, precision: str = "bf16") -> list[Way]:
    """Every way that `accelerate_configs/` launches, for this many GPUs of one machine, in the precision they have."""
    folder = Path(__file__).parent.parent.parent
    found = []

    def add(name: str, launch: str, **options: Any) -> None:
        file = folder / "ds_configs" / f"{launch}.json"
        zero = json.loads(file.read_text())["zero_optimization"] if launch.startswith("zero") else {}
        strategy = distributed.strategy_of(zero, num_ranks=num_ranks, num_local=num_ranks, precision=precision)
        found.append(Way(name=name, launch=launch, strategy=strategy, **options))

    plain = "single_gpu" if num_ranks == 1 else "multi_gpu"
    add("plain", plain)
    add("8bit", plain, adam_8bit=True)
    add("8bit+activations", plain, adam_8bit=True, offload_activations=True)
    if not (folder / "ds_configs").is_dir():
        raise UserError(f"no ds_configs in {folder}: the plan needs a checkout of the repository, as train.py does")
    for launch in ("zero1", "zero2", "zero2_offload", "zero3", "zero3_offload"):
        if launch != "zero1" or num_ranks > 1:
            add(launch, launch)
        if launch.endswith("offload"):
            add(f"{launch}+activations", launch, offload_activations=True)
    return found


def command(way: Way, words: Sequence[str]) -> str:
    """The launch of train.py in this way, with these arguments."""
    ranks = way.strategy.num_ranks
    launch = f"accelerate launch --config_file accelerate_configs/{way.launch}.yaml --num_processes {ranks} train.py"
    return " ".join([launch, shlex.join(words), *way.options()])
