"""Predict the memory of a stage for one way to launch it, part by part.

The state (weights, gradients, master weights, Adam, teacher, buckets) is counted from the parameters and from what
DeepSpeed allocates; activations are measured on fake tensors (`footprint`).
"""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from sapiens_accel.data.sampling import Share
from sapiens_accel.memory.activations import Footprint
from sapiens_accel.memory.duration import step_seconds
from sapiens_accel.memory.gpus import ASSUMED, Rates
from sapiens_accel.memory.stages import Stage
from sapiens_accel.memory.strategies import Way
from sapiens_accel.models.load import goes_to_device
from sapiens_accel.models.sapiens import Layout
from sapiens_accel.runtime.files import GIB

# Allowances, not measured yet: to be calibrated on a GPU.
CONTEXT = 1.0 * GIB  # GPU memory of CUDA, its libraries and the display
CUBLAS = 0.03 * GIB  # workspaces of cuBLAS
CUDNN = 0.25 * GIB  # the largest workspace of cuDNN for a convolution of the head
NCCL, NCCL_ALONE = 0.3 * GIB, 0.15 * GIB  # buffers of communication; DeepSpeed creates them for a single rank too
FRAGMENTATION = 0.04  # as a fraction of what a step allocates and frees
PROCESS = 3.0 * GIB  # host memory of Python, torch and CUDA in a process
WORKER = 0.6 * GIB  # host memory of a data loading process
EXACT_PINNED = "pinned_max_round_threshold_mb"  # of PYTORCH_ALLOC_CONF, which sapiens_accel/__init__.py sets
IN_FLIGHT = 3  # offloaded block inputs that are on the GPU at a time


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The plan of a stage for one way to launch it.

    Attributes:
        share: this rank's micro-batches.
        gpu: bytes on a device by part, at the peak.
        later: bytes on a device by part, of parts that exist only at other times.
        host: bytes of host memory by part, summed over all ranks of this machine.
        allowance: bytes on a device beyond what torch allocates: workspaces, fragmentation.
        seconds: predicted time of an optimizer step at the rates of `Room`.
        steps: optimizer steps of the stage.
        room: usable bytes of a device; None if memory is not a limit.
        host_room: the same for the host.
        otherwise: options to try if memory runs out in spite of the plan.
    """

    way: Way
    share: Share
    layout: Layout
    gpu: Mapping[str, float] = field(default_factory=dict)
    later: Mapping[str, float] = field(default_factory=dict)
    host: Mapping[str, float] = field(default_factory=dict)
    allowance: float = 0.0
    seconds: float = 0.0
    steps: int = 0
    room: float | None = None
    host_room: float | None = None
    otherwise: str = ""

    @property
    def gpu_peak(self) -> float:
        """The prediction of torch.cuda.max_memory_allocated()."""
        return sum(self.gpu.values())

    @property
    def hours(self) -> float:
        """The predicted time of all steps of the stage, without evaluations and checkpoints."""
        return self.seconds * self.steps / 3600

    @property
    def people_per_second(self) -> float:
        """Labeled people of the global batch over the predicted time of its step; 0 if that is unknown."""
        return self.share.global_batch / self.seconds if self.seconds else 0.0

    @property
    def fits_device(self) -> bool:
        return self.room is None or self.gpu_peak + self.allowance <= self.room

    @property
    def fits_host(self) -> bool:
        return self.host_room is None or self.host_peak <= self.host_room

    @property
    def host_peak(self) -> float:
        return sum(self.host.values())

    @property
    def fits(self) -> bool:
        return self.fits_device and self.fits_host

    def __str__(self) -> str:
        blocks = f"{self.layout.checkpointed_blocks} blocks checkpointed"
        blocks += f", {self.layout.selective_blocks} selectively" if self.layout.selective_blocks else ""
        chunk = f", head in chunks of {self.layout.head_chunk}" if self.layout.head_chunk else ""
        teacher = {"device": "", "sharded": ", teacher sharded across ranks", "host": ", teacher in host memory"}
        limit = "" if self.room is None else f"; {self.gpu_peak / GIB:.1f} of {self.room / GIB:.1f} GiB (predicted)"
        return f"{self.share}, {blocks}{chunk}{teacher[self.way.teacher]}{limit}"


@dataclass(frozen=True, kw_only=True)
class Room:
    """The memory that a plan may use.

    Attributes:
        device: bytes of a GPU; None if its memory is not a limit.
        host: bytes of host memory of this machine; None likewise.
        cuda: the device is a GPU: count the memory of CUDA's kernels too.
        rates: how fast the machine is.
    """

    device: float | None = None
    host: float | None = None
    cuda: bool = True
    rates: Rates = ASSUMED


UNLIMITED = Room()


@dataclass(frozen=True, kw_only=True)
class _Step:
    """The sizes from which the phases of a step are counted, in bytes on a device.

    The first `checkpointed` blocks store only their input, the `selective` ones after them their products too, and the
    `whole` last ones everything.

    Attributes:
        people: labeled and unlabeled people of the micro-batch; `chunk` of them go through the head at a time.
        on_device: number of checkpointed blocks whose input is on the device at a time.
        entry, stem, neck, kept, selected, saved: see `Footprint`; for all people.
        attention: gradient of the queries, which both fused kernels sum in fp32.
        gradients: gradients of all trained parameters.
        head_gradient, block_gradient, stem_gradient: those of the head, of one block, and of the embeddings and the
            first block, as a process alone has them.
        gradients_forward: the part of them that exists during a forward.
        gradients_early: the part of them that exists during the backward of the last blocks.
        buckets: DeepSpeed's gradient buffers, from the first gradient of a backward to its end.
        end: what the end of a backward and the optimizer allocate: copies of gradients in another dtype or place.
        alone: one process without DeepSpeed or accumulation, in which gradients appear block by block.
    """

    people: int
    chunk: int
    footprint: Footprint
    checkpointed: int
    selective: int
    whole: int
    on_device: int
    entry: float
    stem: float
    neck: float
    kept: float
    selected: float
    saved: float
    attention: float
    gradients: float
    head_gradient: float
    block_gradient: float
    stem_gradient: float
    gradients_forward: float
    gradients_early: float
    buckets: float
    end: float
    alone: bool


def predict(stage: Stage, way: Way, share: Share, layout: Layout, room: Room = UNLIMITED) -> Plan:
    """Predict the memory of one way with a micro-batch and a layout."""
    strategy, accumulates = way.strategy, share.accumulation > 1
    footprint = stage.footprint_of(strategy.zero == 0 and strategy.half, way.bf16_weights)
    state = state_bytes(stage, way, accumulates)
    gradients, buckets = state.pop("gradients"), state.pop("backward_buckets")
    state["data"] = share.accumulation * (share.micro_batch + 3 * stage.num_unlabeled(share)) * stage.image_bytes
    if strategy.zero == 0 and strategy.num_ranks > 1:
        in_bf16 = stage.matrices if way.bf16_weights else 0
        state["zero_buckets"] = 4.0 * stage.num_learning - 2.0 * in_bf16  # DistributedDataParallel's
    step = _describe_step(stage, way, share, layout, (gradients, buckets), cuda=room.cuda)
    phases = _phases(stage, share, step)
    name = max(phases, key=lambda phase: sum(phases[phase].values()))
    moving = {part: size for part, size in phases[name].items() if part != "gradients"}
    gpu = {part: state.get(part, 0.0) + phases[name].get(part, 0.0) for part in {**state, **phases[name]}}
    later = {
        "head_chunk": footprint.head(step.people, step.chunk),
        "block_working_set": phases.get("first", {}).get("block_working_set", 0.0),
    }
    communication = NCCL if strategy.num_ranks > 1 else NCCL_ALONE if strategy.zero else 0.0
    allowance = CUBLAS + CUDNN + FRAGMENTATION * sum(moving.values()) + communication if room.cuda else 0.0
    offloaded = _pinned([step.kept]) * step.checkpointed if way.offload_activations else 0.0
    return Plan(
        way=way,
        share=share,
        layout=layout,
        gpu={part: size for part, size in gpu.items() if size},
        later={part: size for part, size in later.items() if size and not gpu.get(part)},
        host=_host(stage, way, accumulates, offloaded),
        allowance=allowance,
        seconds=step_seconds(stage, way, share, layout, room.rates),
        steps=stage.steps,
        room=room.device,
        host_room=room.host,
    )


def _describe_step(
    stage: Stage, way: Way, share: Share, layout: Layout, sizes: tuple[float, float], *, cuda: bool
) -> _Step:
    """Args: `sizes` are those of all gradients and of the buckets of a backward."""
    gradients, buckets = sizes
    plain, accumulates = way.strategy.zero == 0, share.accumulation > 1
    footprint = stage.footprint_of(plain and way.strategy.half, way.bf16_weights)
    people, checkpointed = stage.people(share), layout.checkpointed_blocks
    selective = layout.selective_blocks
    saved = 2.0 if way.bf16_weights else 0.0  # bytes of a gradient of a matrix
    fills_late = stage.num_learning <= way.strategy.bucket or way.strategy.zero == 1
    return _Step(
        people=people,
        chunk=min(people, layout.head_chunk or people),
        footprint=footprint,
        checkpointed=checkpointed,
        selective=selective,
        whole=stage.depth - checkpointed - selective,
        on_device=min(checkpointed, IN_FLIGHT) if way.offload_activations else checkpointed,
        entry=footprint.entry(people),
        stem=footprint.stem(people),
        neck=footprint.neck(people),
        kept=footprint.kept(people),
        selected=footprint.selected(people),
        saved=footprint.saved(people),
        attention=4.0 * people * stage.queries if cuda else 0.0,
        gradients=gradients,
        # The head sums its own in fp32, until the backward of the blocks begins.
        head_gradient=float(footprint.gradient[0]) - saved * stage.head_matrices,
        block_gradient=4.0 * stage.block_learning - saved * stage.block_matrices,
        stem_gradient=4.0 * stage.stem_learning - saved * stage.stem_matrices,
        # A gradient exists from its backward to the optimizer's step. ZeRO-3 holds its gradient buffer all the time;
        # ZeRO-1 and 2 allocate theirs for all gradients when the first bucket is full: early in the backward, or at its
        # end where one bucket holds them all.
        gradients_forward=gradients if accumulates or way.strategy.zero == 3 else 0.0,
        gradients_early=gradients if accumulates or way.strategy.zero == 3 or (not plain and not fills_late) else 0.0,
        buckets=buckets,
        end=_end_bytes(stage, way, accumulates),
        alone=plain and not accumulates,
    )


def _phases(stage: Stage, share: Share, step: _Step) -> dict[str, dict[str, float]]:
    """Bytes by part in each phase of a step that can be its peak, in the order of forward and backward."""
    phases = {"head": _head_phase(step), "entry": _entry_phase(step)}
    if stage.fixed:  # its forward of a chunk, whose loss compares with its heatmaps
        phases["head"]["fixed_teacher_forward"] = stage.fixed.forward(step.chunk)
    if step.whole and step.saved:
        phases["whole"] = _whole_blocks_phase(step)
    if step.selective and step.selected:
        phases |= _selective_phases(step)
    if step.checkpointed and step.kept:
        phases["first"] = _first_recomputed_phase(step)
        phases["last"] = _last_recomputed_phase(step)
    if not step.saved:
        phases["forward"] = _forward_phase(step)
        phases["backward"] = _head_backward_phase(step)
    phases["update"] = {"gradients": step.gradients, "zero_buckets": step.buckets, "optimizer_step": step.end}
    if stage.ratio:
        phases["teacher"] = _teacher_phase(stage, share, step)
    return phases


def _entry_phase(step: _Step) -> dict[str, float]:
    """The begin of the forward: images become the first block's input."""
    return {"features": step.entry, "gradients": step.gradients_forward}


def _head_phase(step: _Step) -> dict[str, float]:
    """The end of the forward: all blocks have stored their activations, and one chunk of people is in the head.

    The chunked head computes its gradient in the forward, so the loss adds nothing later.
    """
    return {
        "features": step.stem + step.neck,
        "block_checkpoints": step.on_device * step.kept,
        "selective_blocks": step.selective * step.selected,
        "whole_blocks": step.whole * step.saved,
        "head_chunk": step.footprint.head(step.people, step.chunk),
        "gradients": step.gradients_forward,
    }


def _whole_blocks_phase(step: _Step) -> dict[str, float]:
    """The backward of the last block, if it is not checkpointed: only the head's chunk has been freed so far."""
    return {
        "features": step.stem + step.neck + step.footprint.gradient(step.people),
        "block_checkpoints": step.on_device * step.kept,
        "selective_blocks": step.selective * step.selected,
        "whole_blocks": step.whole * step.saved,
        "block_working_set": step.footprint.whole(step.people) + step.attention,
        "gradients": step.gradients_early,
        "zero_buckets": step.buckets,
    }


def _selective_phases(step: _Step) -> dict[str, dict[str, float]]:
    """The backward of the last selectively checkpointed block, and of the first one if that begins the network."""
    features, working = {"features": step.stem}, step.footprint.partly(step.people) + step.attention
    last = {
        **features,
        "block_checkpoints": step.on_device * step.kept,
        "selective_blocks": step.selective * step.selected,
        "block_working_set": working,
        "gradients": _gradients_after(step, step.whole),
        "zero_buckets": step.buckets,
    }
    if step.checkpointed:
        return {"selective": last}
    first = {
        **features,
        "selective_blocks": step.selected,
        "block_working_set": working,
        "gradients": step.gradients - step.stem_gradient if step.alone else step.gradients_early,
        "zero_buckets": step.buckets,
    }
    return {"selective": last, "selective_first": first}


def _gradients_after(step: _Step, blocks: int) -> float:
    """Gradients once the backward of the head and of so many blocks is done."""
    if not step.alone:
        return step.gradients_early
    return step.head_gradient + blocks * step.block_gradient


def _first_recomputed_phase(step: _Step) -> dict[str, float]:
    """The first recomputed block: blocks without checkpoints are freed, most inputs of checkpointed ones are not.

    A process alone has the gradients of the head and of the blocks without checkpoints by now.
    """
    return {
        "features": step.stem,
        "block_working_set": step.footprint.again(step.people) + step.attention,
        "block_checkpoints": max(0, step.on_device - 1) * step.kept,
        "gradients": _gradients_after(step, step.selective + step.whole),
        "zero_buckets": step.buckets,
    }


def _last_recomputed_phase(step: _Step) -> dict[str, float]:
    """The last recomputed block, the first of the network: no other block input is stored, and gradients are complete.

    A process alone lacks the gradients of this block and of the embeddings.
    """
    return {
        "features": step.stem,
        "block_working_set": step.footprint.again(step.people) + step.attention,
        "gradients": step.gradients - step.stem_gradient if step.alone else step.gradients_early,
        "zero_buckets": step.buckets,
    }


def _forward_phase(step: _Step) -> dict[str, float]:
    """A frozen backbone stores no activations, so the forward of one block can be the peak."""
    return {"features": step.footprint.forward(step.people), "gradients": step.gradients_forward}


def _head_backward_phase(step: _Step) -> dict[str, float]:
    """The gradients of the head, if nothing else learns: as they were summed over chunks, and those of parameters."""
    gradients = {"gradients": step.gradients_early, "zero_buckets": step.buckets}
    return {"features": step.stem + step.neck + step.footprint.gradient(step.people), **gradients}


def _end_bytes(stage: Stage, way: Way, accumulates: bool) -> float:
    """Bytes at the end of a backward and in the optimizer: gradients of a group, flat and in fp32; ZeRO-1's copy."""
    strategy, part = way.strategy, stage.num_learning / way.strategy.num_ranks
    if strategy.zero == 0 or strategy.offload:
        return 0.0
    word = 2 if strategy.half else 4
    group = max(stage.groups) / strategy.num_ranks
    upcast = (word + 4) * group if strategy.half else word * group
    second = word * part if strategy.zero == 1 and not accumulates else 0.0
    return max(upcast, second)


def _teacher_phase(stage: Stage, share: Share, step: _Step) -> dict[str, float]:
    """The teacher's forward on unlabeled people and the decoding of its heatmaps, before the student's step."""
    unlabeled = stage.num_unlabeled(share)
    maps = unlabeled * stage.map_bytes
    forward = (stage.fixed.forward if stage.fixed else step.footprint.forward)(unlabeled)
    # fp32 copies of the maps: cast, blurred along each axis, padded, and their logarithm.
    decoding = 5 * unlabeled * stage.map_bytes
    return {"features": max(forward, maps + decoding), "gradients": step.gradients_forward}


def state_bytes(stage: Stage, way: Way, accumulates: bool) -> dict[str, float]:
    """Bytes on a device that persist through a step.

    But `gradients` is their size once all exist, and `backward_buckets` exist from the first gradient of a backward to
    its end.
    """
    strategy, ranks = way.strategy, way.strategy.num_ranks
    everything, learning = stage.num_parameters, stage.num_learning
    sixteen = strategy.half and strategy.zero > 0
    word = 2 if sixteen else 4
    # Accumulation is in fp32 (`engine.prepare`); DeepSpeed then keeps the sums on the device, even with offload.
    in_fp32 = accumulates and strategy.bf16
    # Under ZeRO-1 DeepSpeed's BF16_Optimizer does it, which holds 16-bit gradients of a backward beside the sums.
    beside = in_fp32 and strategy.zero == 1 and not strategy.offload
    summed = 6 if beside else 4 if in_fp32 else word
    part = learning / ranks
    weights = word * (everything - stage.rounded) / (ranks if strategy.zero == 3 else 1) + stage.rounded_bytes
    if strategy.zero == 0 and strategy.half:
        weights -= 2 * (stage.base - stage.rounded)  # `adapters.keep_base_in`
    in_bf16 = stage.matrices if way.bf16_weights else 0
    weights -= 2 * in_bf16
    state = {
        "weights": 0.0 if strategy.offload_weights else weights,
        "gradients": summed * (part if strategy.zero >= 2 else learning) - 2 * in_bf16,
        "masters": 4 * part if strategy.zero else 0.0,
        "adam": 2 * (1 + 4 / 256) * learning if way.adam_8bit else 8 * (part if strategy.zero else learning),
        "ema_teacher": _teacher_bytes(stage, way),
        "fixed_teacher": (2.0 if strategy.half else 4.0) * stage.fixed.num_parameters if stage.fixed else 0.0,
        "zero_buckets": 0.0,
        # ZeRO-1 puts fp32 sums into it.
        "backward_buckets": float(strategy.bucket * (4 if beside else word)),
    }
    if strategy.zero == 3:
        # A single rank that has all weights on the device uses them where they are.
        gathered = min(strategy.live, everything) if ranks > 1 or strategy.offload_weights else 0
        state["zero_buckets"] = state.pop("backward_buckets") + word * gathered
        state["backward_buckets"] = 0.0
    if strategy.offload:
        state |= {"masters": 0.0, "adam": 0.0}
        # A buffer for the largest parameter, and its gradient in fp32 twice: for the copy to the host and for its norm.
        state["zero_buckets"] += (word + 8) * stage.largest
        if not in_fp32 or strategy.zero == 3:
            state["gradients"] = 0.0
    return state


def _teacher_bytes(stage: Stage, way: Way) -> float:
    """Bytes of the teacher on a device. The buffers of its update are small and exist only between two steps."""
    if stage.plan.teacher is None:
        return 0.0
    average, copy = 4.0 * stage.averaged, (2.0 if way.strategy.half else 4.0) * stage.averaged
    return {"device": average, "sharded": average / way.strategy.num_ranks + copy, "host": copy}[way.teacher]


def _host(stage: Stage, way: Way, accumulates: bool, offloaded: float) -> dict[str, float]:
    """Bytes of host memory at the peak: while all ranks load weights, or with the complete state."""
    strategy, ranks, num_local = way.strategy, way.strategy.num_ranks, way.strategy.num_local
    always = {"process": PROCESS * num_local, "workers": WORKER * stage.num_workers * num_local}
    state: dict[str, float] = {}
    if strategy.offload:
        groups = [size / ranks for size in stage.groups]
        state["masters"] = num_local * _pinned([4 * size for size in groups])
        state["gradients"] = num_local * _pinned([4 * size for size in groups])
        state["adam"] = num_local * sum(8 * size for size in groups)
        state["weights"] = num_local * _pinned([2 * size for size in groups])
        if accumulates and (strategy.zero == 3 or not strategy.bf16):
            state["gradients"] += 4.0 * stage.num_learning * num_local / ranks
    if strategy.offload_weights:
        state["weights"] = 2.0 * stage.num_parameters * num_local / ranks
    if stage.plan.teacher and way.teacher == "host":
        state["ema_teacher"] = 4.0 * stage.averaged * num_local / ranks
    if offloaded:
        state["block_checkpoints"] = num_local * offloaded
    frozen = stage.num_parameters - stage.num_learning
    if frozen and not stage.adapted and strategy.zero and strategy.half:
        state["frozen_weights"] = 4.0 * frozen  # rank 0 keeps them, for the export
    loading = _loading(stage, way) * num_local
    return {**always, **state, "loading_and_saving": max(_saving(stage, way), loading - sum(state.values()))}


def _loading(stage: Stage, way: Way) -> float:
    """Bytes of host memory of a rank while it loads weights; pages of the file are given back."""
    sixteen, frozen = way.strategy.zero > 0 and way.strategy.half, stage.num_parameters > stage.num_learning
    teacher = stage.plan.teacher is not None
    options = {"sixteen": sixteen, "adapted": stage.adapted, "teacher": teacher, "frozen": frozen}
    if goes_to_device(way.strategy.zero, **options):
        return 4.0 * stage.largest
    # In fp32 on the host; the average of a teacher begins as a copy.
    return 4.0 * stage.num_parameters * (2 if teacher and not stage.adapted else 1)


def _saving(stage: Stage, way: Way) -> float:
    """Bytes of host memory of rank 0 while it exports weights: one tensor at a time, but what has to be collected."""
    of_student = stage.num_learning if stage.adapted else stage.num_parameters
    collected = 4.0 * of_student if way.strategy.num_ranks > 1 else 4.0 * stage.largest
    return collected + (4.0 * stage.averaged if stage.plan.teacher else 0.0)


def _pinned(sizes: Sequence[float]) -> float:
    """Bytes of pinned memory: torch rounds each allocation up to a power of two, unless it is set not to."""
    least = 2**20 if EXACT_PINNED in os.environ.get("PYTORCH_ALLOC_CONF", "") else math.inf
    return float(sum(size if size > least else 2 ** math.ceil(math.log2(size)) for size in sizes if size > 0))
