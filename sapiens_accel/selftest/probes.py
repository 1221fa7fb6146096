"""Probes of a training step that need the device itself, one probe per process.

python -m sapiens_accel.selftest.probes RESULT.json attention|fp16|waits|offload
"""

import itertools
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import sapiens_accel  # isort: skip  # noqa: F401  (before torch: it sets how threads wait)
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from sapiens_accel.config.schema import STAGES, StageName
from sapiens_accel.errors import UserError, run_main
from sapiens_accel.models.sapiens import SIZES, SapiensPose
from sapiens_accel.runtime import distributed
from sapiens_accel.selftest.checks import Result, Row, Skipped
from sapiens_accel.selftest.training_step import (
    TrainingCase,
    build_network,
    random_batch,
    start_accelerator,
    take_steps,
)

# All head dimensions of the published sizes, with and without grouped queries (in every Sapiens2).
ATTENTION_MODELS = ("sapiens_0.3b", "sapiens_2b", "sapiens2_0.4b", "sapiens2_5b")
BACKENDS = (
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.MATH,
)
KERNELS = {
    "flash": "flash",
    "efficient": "memory-efficient",
    "cudnn": "cuDNN",
    "overrideable": "the device's own",
    "_softmax": "MATH",
}
EXPECTED_WAITS = 2  # in a step: whether the norm is finite, and in fp16 the check of the loss scaler
OFFLOAD_HW = (512, 384)
OVERLAP = 0.5  # fraction of the copy time under computation; below it offloading costs its full copy time


# ---- Attention kernels


class OperationNames(TorchDispatchMode):
    """Counts the operations that reach the device's kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[str(func.overloadpacket)] += 1
        return func(*args, **(kwargs or {}))


def attention_kernel(model: SapiensPose, image: Tensor) -> str:
    """The attention kernel that a forward of the network with gradients runs on this device."""
    with OperationNames() as operations:
        model(image)
    names = [name.removeprefix("aten.") for name in operations.names]
    scaled = [name for name in names if name.startswith("_scaled_dot_product")]
    for part, kernel in KERNELS.items():
        if any(part in name for name in (scaled or names)):
            return kernel
    return "MATH" if any("attention_math" in name for name in scaled) else f"unknown: {scaled}"


def attention(device: torch.device) -> Iterator[Row]:
    """A row for each head dimension and precision: the kernel of the network, and time and memory of every kernel."""
    cuda = device.type == "cuda"
    hw = (512, 384) if cuda else (64, 48)
    precisions = [torch.float16, torch.bfloat16] if cuda else [torch.float32]
    if cuda and torch.cuda.get_device_capability(device) < distributed.BF16_CAPABILITY:
        precisions.remove(torch.bfloat16)
    for name in ATTENTION_MODELS:
        size = SIZES[name]
        grouped = size.family == "sapiens2"
        with torch.device(device):
            model = SapiensPose(name, 17, hw, depth=1).train()
            image = torch.zeros(2, 3, *hw, dtype=torch.uint8)
        for dtype in precisions:
            kernel = attention_kernel(model.to(dtype), image)
            case = f"head dim {size.width // size.heads}{', grouped queries' * grouped}, {str(dtype)[6:]}"
            times = {backend.name: time_attention(name, dtype, backend, device) for backend in BACKENDS} if cuda else {}
            timings = "; ".join(f"{key.split('_')[0].lower()} {value}" for key, value in times.items())
            status = "warning" if cuda and kernel == "MATH" else "passed"
            text = f"{kernel}{f' ({timings})' if timings else ''}"
            yield {"name": f"{name}, {case}", "status": status, "text": text, "kernel": kernel, "backends": times}
        del model


def time_attention(name: str, dtype: torch.dtype, backend: SDPBackend, device: torch.device) -> str:
    """Milliseconds and MiB of forward and backward of an attention for 16 people with one backend; or why it failed."""
    size, tokens = SIZES[name], 768
    shape = (16, size.heads, tokens, size.width // size.heads)
    groups = 2 if size.family == "sapiens2" else 1
    query = torch.randn(shape, device=device, dtype=dtype, requires_grad=True)
    few = (16, size.heads // groups, *shape[2:])
    key, value = (torch.randn(few, device=device, dtype=dtype, requires_grad=True) for _ in range(2))
    since = 0.0
    try:
        torch.cuda.reset_peak_memory_stats(device)
        base = torch.cuda.memory_allocated(device)
        with sdpa_kernel([backend]), warnings.catch_warnings(action="ignore"):  # with torch's reasons
            for index in range(4):
                if index == 1:
                    torch.cuda.synchronize(device)
                    since = time.perf_counter()
                F.scaled_dot_product_attention(query, key, value, enable_gqa=groups > 1).sum().backward()
            torch.cuda.synchronize(device)
    except RuntimeError as error:
        return "out of memory" if isinstance(error, torch.OutOfMemoryError) else "none"
    milliseconds = 1e3 * (time.perf_counter() - since) / 3
    return f"{milliseconds:.2f} ms, {(torch.cuda.max_memory_allocated(device) - base) / 2**20:.0f} MiB"


# ---- Steps of the training loop


def tiny_case(stage: StageName, precision: str, model: str = "sapiens_tiny") -> TrainingCase:
    """A stage of a tiny network with head chunks, checkpointed blocks and accumulation."""
    return TrainingCase(
        model=model,
        stage=stage,
        way="plain",
        launch="single_gpu",
        precision=precision,
        input_hw=(128, 96),
        micro_batch=4,
        accumulation=2,
        checkpointed_blocks=2,
        head_chunk=2,
    )


def best_precision(device: torch.device) -> str:
    if device.type != "cuda":
        return "no"
    return "bf16" if torch.cuda.get_device_capability(device) >= distributed.BF16_CAPABILITY else "fp16"


def fp16(device: torch.device) -> Iterator[Row]:
    """Whether a step with infinite gradients is skipped and changes no weight; on a GPU with loss scaling."""
    precision = "fp16" if device.type == "cuda" else "no"
    accelerator = start_accelerator(precision)
    case = replace(tiny_case("phase2", precision), accumulation=1)
    good = random_batch(case.micro_batch, 0, case.input_hw, accelerator.device)
    weights = torch.full_like(good.labeled.weights, float("inf"))
    bad = good._replace(labeled=good.labeled._replace(weights=weights))
    model = build_network(case.run, "phase2")
    stream = take_steps(accelerator, case, model, iter([good, bad, good]))
    skipped, weight, changed = [], next(iter(model.head.parameters())), []
    for step in stream:
        skipped.append(step.skipped)
        changed.append(float(weight.detach().double().sum()))
    name = {"fp16": "fp16 with loss scaling", "no": "fp32"}[precision]
    # The first steps of loss scaling may overflow because of the scale: only the bad step must be skipped.
    detected, unchanged = skipped[1], changed[1] == changed[0]
    status = "passed" if detected and unchanged else "failed"
    text = f"a step of infinite loss was {'skipped' if detected else 'NOT REPORTED as skipped'}"
    text += f", and the weights {'did not change' if unchanged else 'CHANGED'}"
    yield {"name": f"skipped step, {name}", "status": status, "text": text, "skipped": skipped}


def waits(device: torch.device) -> Iterator[Row]:
    """How often and where the host waits for the device in an optimizer step of each stage, by torch's warnings."""
    precision = best_precision(device)
    for model, stage in itertools.product(("sapiens_tiny", "sapiens2_tiny"), STAGES):
        accelerator = start_accelerator(precision)
        case = tiny_case(stage, precision, model)
        batch = random_batch(case.micro_batch, case.num_unlabeled, case.input_hw, accelerator.device)
        stream = take_steps(accelerator, case, build_network(case.run, stage), itertools.repeat(batch))
        next(stream)
        next(stream)  # the first steps create the optimizer's state
        lines = synchronizations(lambda stream=stream: next(stream))
        count = lines.total()
        text = f"{count} wait{'s' * (count != 1)} in a step of {case.accumulation} micro-batches"
        text += "".join(f"; {num} at {line}" for line, num in lines.most_common(6))
        status = "passed" if count <= EXPECTED_WAITS else "warning"
        yield {"name": f"host waits, {model} {stage}", "status": status, "text": text, "places": dict(lines)}
        accelerator.free_memory()


def synchronizations(work: Callable[[], Any]) -> Counter[str]:
    """The lines of this package (else of torch) at which torch warns of a synchronization, with their counts."""
    counts: Counter[str] = Counter()

    def note(message: Any, category: Any, filename: str, lineno: int, *_: Any) -> None:
        if "synchroniz" not in str(message):
            return
        frames = [frame for frame in traceback.extract_stack() if "/sapiens_accel/" in frame.filename]
        ours = [frame for frame in frames if "/selftest/" not in frame.filename][-1:]
        line = f"{Path(ours[0].filename).name}:{ours[0].lineno}" if ours else f"{Path(filename).name}:{lineno}"
        counts[line] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return counts


# ---- Overlap of the copies of offloaded activations with computation


def offload(device: torch.device, model: str = "sapiens_0.3b", batch: int = 16) -> Iterator[Row]:
    """Time and peak memory of a step with block inputs on the device and on the host, and the overlap of the copies."""
    precision = best_precision(device)
    measured: dict[bool, dict[str, Any]] = {}
    for offloads in (False, True):
        accelerator = start_accelerator(precision)
        case = replace(
            tiny_case("phase2", precision, model),
            input_hw=OFFLOAD_HW,
            micro_batch=batch,
            accumulation=1,
            checkpointed_blocks=SIZES[model].depth,
            head_chunk=4,
            offload_activations=offloads,
        )
        network = build_network(case.run, "phase2", str(accelerator.device))
        # After the seed of the network, so that both cases have the same people.
        people = random_batch(batch, 0, case.input_hw, accelerator.device)
        stream = take_steps(accelerator, case, network, itertools.repeat(people))
        measured[offloads] = {"loss": float(next(stream).logs["loss"])} | timed_steps(stream, accelerator.device)
        events = traced_events(lambda stream=stream: next(stream)) if offloads else ()
        accelerator.free_memory()
        del stream, network
        torch.cuda.empty_cache()
    plain, offloaded = measured[False], measured[True]
    slower = offloaded["seconds"] / plain["seconds"]
    same = abs(offloaded["loss"] - plain["loss"]) <= 1e-5 * abs(plain["loss"])
    text = f"a step takes {slower:.2f} x the time, its peak {offloaded['peak'] / 2**30:.2f} instead of "
    text += f"{plain['peak'] / 2**30:.2f} GiB; losses {'equal' if same else 'DIFFER'}"
    yield {
        "name": "offloaded activations",
        "status": "passed" if same else "failed",
        "text": text,
        **offloaded,
        "plain": plain,
    }
    copies, kernels = intervals(events)
    if not copies or not kernels:
        raise Skipped("the profiler recorded no copies or kernels on this device (it needs CUPTI)")
    fraction, seconds = overlap(copies, kernels), sum(end - start for start, end in copies) / 1e9
    text = f"{fraction:.0%} of {seconds * 1e3:.0f} ms of copies run beside kernels"
    status = "passed" if fraction >= OVERLAP else "warning"
    yield {"name": "overlap of the copies", "status": status, "text": text, "overlap": round(fraction, 4)}


def timed_steps(stream: Iterator[Any], device: torch.device, num: int = 3) -> dict[str, float]:
    """Seconds and peak bytes of a step, after one step of warm-up."""
    next(stream)
    torch.cuda.reset_peak_memory_stats(device)
    torch.cuda.synchronize(device)
    since = time.perf_counter()
    for _ in range(num):
        next(stream)
    torch.cuda.synchronize(device)
    return {"seconds": (time.perf_counter() - since) / num, "peak": torch.cuda.max_memory_allocated(device)}


def traced_events(work: Callable[[], Any]) -> Sequence[Any]:
    """The profiler's events of a call."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiling:
        work()
        torch.cuda.synchronize()
    assert profiling.profiler is not None and profiling.profiler.kineto_results is not None
    return profiling.profiler.kineto_results.events()


Interval = tuple[int, int]  # begin and end, ns


def intervals(events: Sequence[Any]) -> tuple[list[Interval], list[Interval]]:
    """The intervals of copies between device and host, and those of kernels."""
    copies, kernels = [], []
    for event in events:
        if not str(event.device_type()).endswith("CUDA") or not event.duration_ns():
            continue
        span, name = (event.start_ns(), event.start_ns() + event.duration_ns()), event.name()
        if "Memcpy" in name:
            if "HtoD" in name or "DtoH" in name:
                copies.append(span)
        elif "Memset" not in name and not name.startswith(("ProfilerStep", "gpu_")):
            kernels.append(span)
    return copies, kernels


def overlap(copies: Sequence[Interval], kernels: Sequence[Interval]) -> float:
    """The fraction of the copy time during which a kernel runs too, 0 to 1."""
    busy: list[list[int]] = []
    for start, end in sorted(kernels):
        if busy and start <= busy[-1][1]:
            busy[-1][1] = max(busy[-1][1], end)
        else:
            busy.append([start, end])
    total = sum(end - start for start, end in copies)
    both = sum(max(0, min(end, stop) - max(start, begin)) for start, end in copies for begin, stop in busy)
    return both / total


PROBES: dict[str, Callable[[torch.device], Iterator[Row]]] = {
    "attention": attention,
    "fp16": fp16,
    "waits": waits,
    "offload": offload,
}


def main(words: Sequence[str]) -> None:
    path, name = words
    if name not in PROBES:
        raise UserError(f"{name}: no such probe (expected one of {', '.join(PROBES)})")
    result = Result(Path(path))
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    with result.guard(name), torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        for row in PROBES[name](device):
            result.add(row)


if __name__ == "__main__":
    run_main(main)
    distributed.stop()
    sys.exit()
