"""People a second of our training step, compared with a plain loop over transformers' network, and its utilization.

    python -m sapiens_accel.selftest.throughput RESULT.json MODEL [--hw 512 384] [--batch 32] [--compile]

The peer is a plain training loop: bf16 autocast over fp32 weights, AdamW, checkpointed blocks. It uses nothing of this
package but the head of Sapiens v1, which transformers does not have. Both take turns, on a GPU in one process.
"""

import argparse
import gc
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from itertools import repeat
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import sapiens_accel  # isort: skip  # noqa: F401  (before torch: it sets how threads wait)
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel, Sapiens2ForPoseEstimation

from sapiens_accel.config.schema import Config
from sapiens_accel.data.dataset import Batch
from sapiens_accel.errors import UserError, run_main
from sapiens_accel.memory.duration import part_flops
from sapiens_accel.memory.estimate import Plan, Room, predict
from sapiens_accel.memory.fitting import MIN_CHUNK, fit
from sapiens_accel.memory.stages import measure_stage
from sapiens_accel.memory.strategies import Way
from sapiens_accel.models import kernels
from sapiens_accel.models.sapiens import PIXEL_MEAN, PIXEL_STD, Layout, SapiensPose, sapiens2_config
from sapiens_accel.pose.heatmap import Codec
from sapiens_accel.pose.skeleton import COCO17 as SKELETON
from sapiens_accel.runtime import distributed
from sapiens_accel.runtime.files import GIB
from sapiens_accel.selftest.checks import Result, Row, Skipped
from sapiens_accel.selftest.peak_memory import case_of_plan
from sapiens_accel.selftest.training_step import build_network, codec_of, random_batch, run_of, take_steps

# Dense 16-bit products with fp32 sums, from NVIDIA's data sheets, by a part of the device's name; the first match is
# used.
PEAK_TFLOPS = {
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H200 NVL": 835.0,
    "H100": 989.0,
    "H200": 989.0,
    "A100": 312.0,
    "RTX 4090": 165.0,
    "RTX 4080": 97.5,
    "RTX 3090": 71.0,
    "L40S": 362.0,
    "A10G": 70.0,
    "NVIDIA A10": 125.0,
    "NVIDIA L4": 121.0,
    "V100-SXM2": 125.0,
    "Tesla T4": 65.0,
}
SETTINGS = (
    "model",
    "stage",
    "way",
    "precision",
    "micro_batch",
    "checkpointed_blocks",
    "selective_blocks",
    "head_chunk",
)
Runner = tuple[Callable[[], None], Iterator[Any]]  # a function that sets the layout, and the steps


# ---- The peer


class PlainViT(nn.Module):
    """transformers' ViTPose backbone with its own forward, and the head without chunks."""

    def __init__(self, model: SapiensPose) -> None:
        super().__init__()
        self.backbone, self.head = deepcopy(model.backbone), deepcopy(model.head)
        self.grid_hw = [pixels // model.size.patch for pixels in model.input_hw]

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalized pixels [b, 3, H, W] to heatmaps [b, k, h, w]."""
        tokens = self.backbone(pixels).feature_maps[-1]
        return self.head.maps(tokens.transpose(1, 2).unflatten(2, self.grid_hw))


class PlainSapiens2(nn.Module):
    """transformers' Sapiens2ForPoseEstimation."""

    def __init__(self, model: SapiensPose) -> None:
        super().__init__()
        self.network = Sapiens2ForPoseEstimation(sapiens2_config(model.size, model.num_keypoints, model.input_hw))
        self.network.model.load_state_dict(model.backbone.state_dict())
        self.network.decode_head.load_state_dict(model.head.state_dict())

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalized pixels [b, 3, H, W] to heatmaps [b, k, h, w]."""
        return self.network(pixels).heatmaps


def peer_of(model: SapiensPose, device: torch.device) -> nn.Module:
    """The peer, with a copy of the model's weights."""
    peer = (PlainViT if model.size.family == "sapiens" else PlainSapiens2)(model)
    for part in peer.children():
        if isinstance(part, PreTrainedModel):
            part.activation_checkpointing_enable()  # the new name of gradient_checkpointing_enable()
    return peer.to(device).train()


def plain_steps(
    peer: nn.Module, batch: Batch, codec: Codec, loss_weight: float, lr: float, autocast: torch.dtype | None
) -> Iterator[Tensor]:
    """A plain training loop over one batch; yields the loss of each step, on the device."""
    labeled, device = batch.labeled, batch.labeled.view.image.device
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (PIXEL_MEAN, PIXEL_STD))
    optimizer = torch.optim.AdamW(peer.parameters(), lr=lr)
    scaler = torch.amp.GradScaler(device.type, enabled=autocast == torch.float16)
    while True:
        target, weights = codec.encode(labeled.points_xy, labeled.weights)
        with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            heatmaps = peer((labeled.view.image.float() - mean) / std)
        loss = loss_weight * (weights[..., None, None] * (heatmaps.float() - target) ** 2).mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        yield loss.detach()


def peak_tflops(device: str) -> float | None:
    """The peak rate of a device; None if it is not in the table."""
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in device), None)


# ---- One model


@dataclass(frozen=True, kw_only=True)
class Timing:
    """The settings of a comparison.

    Attributes:
        input_hw: of the crop, px.
        batch: people of a step, one micro-batch.
        limit: bytes that torch may allocate on a GPU.
        repetitions: turns of each runner.
        steps: steps of a turn.
        warm_up: steps of each runner before the first turn.
        compiled: also time compiled blocks.
        layouts: keys of `layouts_to_time`; None is all.
    """

    input_hw: tuple[int, int]
    batch: int
    limit: float = float("inf")
    repetitions: int = 3
    steps: int = 3
    warm_up: int = 2
    compiled: bool = False
    layouts: Sequence[str] | None = None


def compare(accelerator: Accelerator, name: str, timing: Timing, peak: float | None) -> Iterator[Row]:
    """Build ours and the peer with equal weights and time them in turns: a row, and one more for each kind of kernels.

    Raises:
        UserError: ours does not fit into the memory that the peer leaves.
    """
    device = accelerator.device
    if device.type == "cuda":
        total = torch.cuda.mem_get_info(device)[1]
        torch.cuda.set_per_process_memory_fraction(min(1.0, timing.limit / total))
    run = run_of(name, "phase2", timing.input_hw, timing.batch, f"--memory.micro_batch={timing.batch}")
    model, batch = build_network(run, "phase2"), random_batch(timing.batch, 0, timing.input_hw, device)
    peer_steps, loss_of_peer = start_peer(accelerator, run, model, batch)
    plan = plan_ours(accelerator, run)
    case = replace(case_of_plan(name, "phase2", timing.input_hw, plan), precision=accelerator.mixed_precision)
    ours = take_steps(accelerator, case, model, repeat(batch))
    loss = float(next(ours).logs["loss"])

    layouts = {key: layout for key, layout in layouts_to_time(run, plan).items() if key in (timing.layouts or [key])}
    runners: dict[str, Runner] = {key: (partial(model.lay_out, layout), ours) for key, layout in layouts.items()}
    others: dict[str, Runner] = {} if peer_steps is None else {"peer": (lambda: None, peer_steps)}
    flops = 3 * part_flops(name, SKELETON.num_keypoints, timing.input_hw).whole
    losses = {"ours": loss, "peer": loss_of_peer}
    settings = {key: value for key, value in case.as_json().items() if key in SETTINGS}
    taken = seconds_of({**runners, **others}, timing, device)
    yield {**settings, "losses": losses, **summarize(taken, timing.batch, flops, peak)}
    for key, layout in layouts_of_kernels(timing, plan, device, model).items():
        again = seconds_of({key: (partial(model.lay_out, layout), ours), **others}, timing, device)
        taken |= {key: again[key], f"peer_of_{key.removeprefix('ours_')}": again.get("peer", [])}
        yield {**settings, "losses": losses, **summarize(taken, timing.batch, flops, peak)}


def layouts_of_kernels(timing: Timing, plan: Plan, device: torch.device, model: SapiensPose) -> dict[str, Layout]:
    """The planned layout with other kernels: fused ones where they run and are installed, and compiled blocks.

    Those come last: a block stays compiled.
    """
    layouts = {}
    if device.type == "cuda" and model.size.family == "sapiens2" and not kernels.missing_package():
        layouts["ours_fused"] = replace(plan.layout, fused=True)
    if timing.compiled:
        # The compiler chooses itself what it recomputes.
        recomputed = {"checkpointed_blocks": plan.layout.checkpointed_blocks + plan.layout.selective_blocks}
        layouts["ours_compiled"] = replace(plan.layout, **recomputed, selective_blocks=0, compiled=True)
    return layouts


def start_peer(
    accelerator: Accelerator, run: Config, model: SapiensPose, batch: Batch
) -> tuple[Iterator[Any] | None, float | None]:
    """The peer after its first step, and the loss of that step; None if it runs out of memory.

    On a CPU it has a process of its own: how a process's memory is allocated is a setting of ours that a plain loop
    does not have. On a GPU both share the memory of one.
    """
    if accelerator.device.type == "cpu":
        stream = _steps_of_another_process(run, len(batch.labeled.ann_id), distributed.autocast_dtype(accelerator))
        return stream, next(stream)
    try:
        return _started(accelerator, run, model, batch)
    except torch.OutOfMemoryError:
        pass  # only after the except block the frames of the error are freed
    free_memory()
    return None, None


def _started(accelerator: Accelerator, run: Config, model: SapiensPose, batch: Batch) -> tuple[Iterator[Tensor], float]:
    stream = _plain_stream(run, model, batch, distributed.autocast_dtype(accelerator))
    return stream, float(next(stream))


def _plain_stream(run: Config, model: SapiensPose, batch: Batch, autocast: torch.dtype | None) -> Iterator[Tensor]:
    plan, network = run.get_stage("phase2"), peer_of(model, batch.labeled.ann_id.device)
    return plain_steps(network, batch, codec_of(run), plan.loss_weight, plan.optim.lr, autocast)


def _steps_of_another_process(run: Config, num: int, autocast: torch.dtype | None) -> Iterator[float]:
    """The losses of a plain loop, which takes a step for each that is asked for."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    settings = (run, num, autocast, torch.get_num_threads())
    context.Process(target=_take_plain_steps, args=(there, *settings), daemon=True).start()
    there.close()  # so that an end of that process is an EOFError here
    while True:
        here.send(None)
        yield here.recv()


def _take_plain_steps(asked: Connection, run: Config, num: int, autocast: torch.dtype | None, num_threads: int) -> None:
    torch.set_num_threads(num_threads)
    # From the same seed and in the same order as ours: the same weights and people.
    model, batch = build_network(run, "phase2"), random_batch(num, 0, run.data.input_hw, torch.device("cpu"))
    stream = _plain_stream(run, model, batch, autocast)
    del model
    with suppress(EOFError):  # the end of the process that asks
        while True:
            asked.recv()
            asked.send(float(next(stream)))


def plan_ours(accelerator: Accelerator, run: Config) -> Plan:
    """Plan ours for the memory that the peer leaves; on a CPU without recomputation.

    Raises:
        UserError: it does not fit.
    """
    strategy, room = distributed.strategy(accelerator), distributed.free_bytes(accelerator)
    name = "plain" if strategy.zero == 0 else f"zero{strategy.zero}" + "_offload" * strategy.offload
    padded = kernels.needs_padding(kernels.capability_on(accelerator.device), half=strategy.half)
    stage = measure_stage(run, "phase2", strategy.half, padded=padded)
    plan = fit(stage, "phase2", Way(name=name, launch="", strategy=strategy), Room(device=room))
    if not plan.fits:
        needs = f"{(plan.gpu_peak + plan.allowance) / GIB:.1f} GiB beside the peer's state"
        raise UserError(
            f"{run.model.name}: {plan.share.micro_batch} people need {needs}. Use a smaller --batch or model"
        )
    return plan


def layouts_to_time(run: Config, plan: Plan) -> dict[str, Layout]:
    """Our layout as planned, with all blocks checkpointed (as the peer), and with or without head chunks."""
    stage = measure_stage(run, "phase2", plan.way.strategy.half)
    num, chunk = plan.share.micro_batch, plan.layout.head_chunk
    chunked = chunk is not None and chunk < num
    other = {"ours_one_chunk": None} if chunked else {"ours_chunked": MIN_CHUNK if num > MIN_CHUNK else 1}
    wanted = {
        "ours": plan.layout,
        "ours_checkpointed": replace(plan.layout, checkpointed_blocks=stage.depth, selective_blocks=0),
        **{key: replace(plan.layout, head_chunk=chunk) for key, chunk in other.items()},
    }
    if plan.room is None:
        return wanted
    needs = partial(predict, stage, plan.way, plan.share, room=Room(device=plan.room))
    return {key: layout for key, layout in wanted.items() if key == "ours" or needs(layout).fits}


# ---- Timing


def seconds_of(runners: Mapping[str, Runner], timing: Timing, device: torch.device) -> dict[str, list[float]]:
    """Seconds of a step by runner and repetition. Runners take turns, so that disturbances affect all of them."""
    for arrange, stream in runners.values():
        arrange()
        for _ in range(timing.warm_up):
            next(stream)
    taken: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(timing.repetitions):
        for name, (arrange, stream) in runners.items():
            arrange()
            next(stream)
            wait_for(device)
            start = time.perf_counter()
            for _ in range(timing.steps):
                next(stream)
            wait_for(device)
            taken[name].append((time.perf_counter() - start) / timing.steps)
    return taken


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def summarize(taken: Mapping[str, list[float]], batch: int, flops: int, peak: float | None) -> Row:
    """People a second, their ratios to the peer's (repetition by repetition) and the utilization."""
    rates = {name: spread([batch / t for t in times]) for name, times in taken.items() if times}
    beside = {name: f"peer_of_{name.removeprefix('ours_')}" for name in taken if name.startswith("ours")}
    pairs = {name: peer if peer in taken else "peer" for name, peer in beside.items()}
    ratios = {key: spread_of_ratios(taken[peer], taken[key]) for key, peer in pairs.items() if taken.get(peer)}
    chunked = taken.get("ours_chunked", taken["ours"])
    whole = taken["ours"] if "ours_chunked" in taken else taken.get("ours_one_chunk")
    return {
        "people_per_second": rates,
        "ratio": ratios or None,
        "chunks_cost": spread_of_ratios(chunked, whole) if whole else None,
        "tflops_per_person": round(flops / 1e12, 6),
        "mfu": {name: round(rate["median"] * flops / peak / 1e12, 4) for name, rate in rates.items()} if peak else None,
        "outcome": "measured" if "peer" in taken else "ours measured; the peer ran out of memory",
    }


def spread_of_ratios(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """The spread of quotients of pairs."""
    return spread([a / b for a, b in zip(above, below, strict=True)])


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, lowest and highest."""
    summary = {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}
    return {name: round(value, 4) for name, value in summary.items()}


# ---- Rows of the selftest


def rows_of(row: Row, hw: tuple[int, int]) -> Iterator[Row]:
    """The result of `compare`: a row for ours as planned, one for each kind of kernels, in its order."""
    for key, added in (("ours", ""), ("ours_fused", ", fused kernels"), ("ours_compiled", ", compiled blocks")):
        name = row["model"] + added
        if key not in row["people_per_second"]:
            continue
        rate, ratio, mfu = row["people_per_second"][key]["median"], (row["ratio"] or {}).get(key), row["mfu"]
        versus = f"{ratio['median']:.2f} x the plain transformers loop" if ratio else "the plain loop ran out of memory"
        used = f"MFU {mfu[key]:.1%}" if mfu else f"{rate * row['tflops_per_person']:.2f} TFLOP/s (no peak known)"
        planned = f"{row['micro_batch']} people, {row['checkpointed_blocks']} blocks checkpointed, {row['precision']}"
        more = {"phase2_rate": rate, "input_hw": list(hw), "comparison": row} if key == "ours" else {}
        text = f"{rate:.2f} people/s, {versus}, {used} ({planned})"
        yield {"name": name, "model": row["model"], "status": "passed", "text": text, **more}


def main(words: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="selftest.throughput", allow_abbrev=False)
    parser.add_argument("result")
    parser.add_argument("model")
    parser.add_argument("--hw", nargs=2, type=int, default=[512, 384])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--compile", action="store_true")
    asked: Any = parser.parse_args(words)
    result, hw = Result(Path(asked.result)), tuple(asked.hw)
    cuda = torch.cuda.is_available()
    os.environ.setdefault("ACCELERATE_MIXED_PRECISION", "bf16" if cuda else "no")
    peak = peak_tflops(torch.cuda.get_device_name()) if cuda else None
    names = ["ours"] if cuda else ["ours", "ours_checkpointed"]
    timing = Timing(input_hw=hw, batch=asked.batch, compiled=asked.compile, layouts=names)
    for_row, done = f"{asked.model}, {asked.batch} people", 0
    with result.guard(for_row):
        try:
            for row in compare(distributed.start(), asked.model, timing, peak):
                rows = list(rows_of(row, hw))
                for row in rows[done:]:
                    result.add(row)
                done = len(rows)
        except UserError as error:  # it does not fit
            raise Skipped(str(error)) from error


if __name__ == "__main__":
    run_main(main)
    distributed.stop()
