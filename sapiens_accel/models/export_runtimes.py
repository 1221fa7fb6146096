"""The runtimes of a written graph, ONNX Runtime, torch.export and TensorRT: differences from PyTorch, and times."""

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sapiens_accel.errors import UserError
from sapiens_accel.models import export_graph as graph
from sapiens_accel.models.export_graph import SUFFIX, Network
from sapiens_accel.pose.heatmap_numpy import NumpyCodec
from sapiens_accel.runtime.versions import package_version

# pixel_values to heatmaps, or to a tuple of heatmaps and visibility, all in host memory
Runner = Callable[[Tensor], Tensor | tuple[Tensor, ...]]
# Maximum absolute difference of heatmaps; relative to the largest value where heatmaps exceed 1.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}
# Of probabilities, whose logits have slopes of some units.
TOLERANCE_VISIBILITY = {torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 1e-1}
TOLERANCE_PX = {torch.float32: 0.1, torch.float16: 0.1}  # of keypoints, px of the network's input
# Of heatmaps whose keypoints are compared: peak, and cosine to the Gaussian that is encoded at the decoded keypoint.
MIN_PEAK, MIN_LIKENESS = 0.2, 0.8
BATCHES = (1, 8)  # of the benchmark
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
MIN_ROUNDS, MAX_ROUNDS, SECONDS = 3, 50, 30.0


class _Missing(NamedTuple):
    """Why a runtime cannot run a graph on this machine."""

    reason: str


# ---- Differences from PyTorch


def check(reference: Network, file: Path, batches: tuple[int, ...], dtype: torch.dtype = torch.float32) -> str:
    """Run a written graph on batches of these sizes, and describe its difference from PyTorch.

    Args:
        reference: what it is compared with.
        dtype: precision of the graph.

    Raises:
        UserError: the difference exceeds `TOLERANCE` or `TOLERANCE_PX`, or the graph is not valid; the file is removed.
    """
    run = _open(file)
    if isinstance(run, _Missing):
        return run.reason
    worst, largest, far, differences = 0.0, 0.0, np.zeros(0), [0.0]
    with torch.no_grad():
        for num in batches:
            pixels = reference.example_images(num)
            (expected, *others), (actual, *their_others) = _as_tuple(reference(pixels)), _as_tuple(run(pixels))
            worst = max(worst, _largest_difference(actual, expected))
            largest = max(largest, float(expected.abs().max()))
            far = np.append(far, distances(reference, expected, actual))
            differences += [_largest_difference(*pair) for pair in zip(their_others, others, strict=True)]
    compared = f"differs from PyTorch by {worst:.1e} at most, of heatmaps up to {largest:.2g}"
    if worst > TOLERANCE[dtype] * max(1.0, largest):
        graph.remove(file)
        raise UserError(f"{file}: {compared}, more than {TOLERANCE[dtype]:.0e}; it was removed")
    points = f"{len(far)} clear keypoints by {far.max(initial=0.0):.2g} px at most"
    if far.max(initial=0.0) > TOLERANCE_PX.get(dtype, float("inf")):
        graph.remove(file)
        raise UserError(f"{file}: {points} from PyTorch's, more than {TOLERANCE_PX[dtype]}; it was removed")
    visible = f"probabilities of visibility by {max(differences):.1e}"
    if max(differences) > TOLERANCE_VISIBILITY[dtype]:
        graph.remove(file)
        raise UserError(f"{file}: {visible}, more than {TOLERANCE_VISIBILITY[dtype]:.0e}; it was removed")
    parts = [compared, points, visible][: 1 + len(reference.outputs)]
    return f"{'; '.join(parts)} (batches of {', '.join(map(str, batches))})"


def _as_tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else outputs


def _largest_difference(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max().nan_to_num(float("inf")))


def distances(network: Network, expected: Tensor, actual: Tensor) -> np.ndarray:
    """How far apart the clear keypoints of two heatmaps [b, k, h, w] are, px of the network's input.

    Clear ones have an expected map with a high peak, and of the shape that is trained: on others, such as those of an
    image without people, a difference of the last bit may move the highest pixel anywhere.
    """
    heatmap_hw = (expected.shape[2], expected.shape[3])
    codec = NumpyCodec(input_hw=network.input_hw, heatmap_hw=heatmap_hw, sigma=network.sigma)
    expected_xy, scores = codec.decode(expected.numpy())
    actual_xy, _ = codec.decode(actual.numpy())
    target, _ = codec.encode(expected_xy, np.ones(scores.shape))
    likeness = torch.cosine_similarity(expected.flatten(2), torch.from_numpy(target).flatten(2), dim=-1).numpy()
    clear = (scores > MIN_PEAK) & (likeness > MIN_LIKENESS)
    return np.linalg.norm(actual_xy - expected_xy, axis=-1)[clear]


# ---- Runtimes


def _open(file: Path, device: str = "cpu") -> Runner | _Missing:
    """
    Raises:
        UserError: the graph is not valid, or its runtime refuses it; the file is removed.
    """
    if file.suffix == SUFFIX["onnx"]:
        return _open_onnx(file, device)
    if file.suffix == SUFFIX["tensorrt"]:
        return _open_engine(file)
    return torch.export.load(file).module()


def _open_onnx(file: Path, device: str) -> Runner | _Missing:
    if find_spec("onnxruntime") is None:
        return _Missing("NOT CHECKED: onnxruntime is not installed; pip install sapiens_accel[onnx]")
    import onnx
    import onnxruntime
    from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as Unsupported

    try:
        onnx.checker.check_model(str(file), full_check=True)
        session = onnxruntime.InferenceSession(file, providers=[PROVIDERS[device]])
    except Unsupported as error:
        reason = f"onnxruntime on the CPU: {' '.join(str(error).split())}"
        return _Missing(f"a valid graph, but its numbers are NOT CHECKED: {reason}")
    except Exception as error:
        graph.remove(file)
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{file}: onnxruntime cannot run it, and it was removed: {reason}") from None
    if PROVIDERS[device] not in session.get_providers():  # it has fallen back to the CPU
        return _Missing("onnxruntime could not start CUDA; its own message stands above")

    def run(pixels: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.from_numpy(values) for values in session.run(None, {"pixel_values": pixels.numpy()}))

    return run


def _open_engine(file: Path) -> Runner:
    import tensorrt as trt  # pyright: ignore[reportMissingImports]

    runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
    engine = runtime.deserialize_cuda_engine(file.read_bytes())
    context, stream = engine.create_execution_context(), torch.cuda.Stream()
    device = torch.device("cuda", torch.cuda.current_device())

    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]

    def run(pixels: Tensor) -> tuple[Tensor, ...]:
        with torch.cuda.stream(stream):
            images = pixels.to(device).contiguous()
            context.set_input_shape("pixel_values", tuple(images.shape))
            outputs = {
                name: torch.empty(tuple(context.get_tensor_shape(name)), device=device)
                for name in graph.OUTPUTS
                if name in names
            }
            for name, tensor in {"pixel_values": images, **outputs}.items():
                context.set_tensor_address(name, tensor.data_ptr())
            context.execute_async_v3(stream.cuda_stream)
            return tuple(output.cpu() for output in outputs.values())

    return run


# ---- Times


class Timing(NamedTuple):
    """Median times of a runtime.

    Attributes:
        runtime: its name and version.
        seconds: of a batch, for each number of people; empty where it cannot run.
        reason: why it cannot.
    """

    runtime: str
    seconds: tuple[float, ...] = ()
    reason: str = ""


def benchmark(folder: Path, dtype: torch.dtype, batches: Sequence[int] = BATCHES) -> list[Timing]:
    """Measure PyTorch, ONNX Runtime and TensorRT on this machine: on its GPU if there is one, else on the CPU.

    From pixels in host memory to heatmaps there. Each round takes one batch of each size with each runtime, so that a
    machine that slows down does so for all of them; medians of `MIN_ROUNDS` to `MAX_ROUNDS` rounds, about `SECONDS`.

    Raises:
        UserError: it is no weights folder.
    """
    network = Network(folder, dtype)
    images = [network.example_images(num) for num in batches]
    with tempfile.TemporaryDirectory(prefix="sapiens_accel-") as temporary, torch.inference_mode():
        onnx = _write_and_open(network, Path(temporary), "onnx")
        engine = _write_and_open(network, Path(temporary), "tensorrt")
        device = _device()
        on_device = network.to(device)
        runners: dict[str, Runner | _Missing] = {
            f"PyTorch {torch.__version__}": lambda pixels: _to_host(on_device(pixels.to(device))),
            f"ONNX Runtime {package_version('onnxruntime') or ''}".rstrip(): onnx,
            f"TensorRT {package_version('tensorrt') or ''}".rstrip(): engine,
        }
        seconds = _measure({name: run for name, run in runners.items() if not isinstance(run, _Missing)}, images)
    return [
        Timing(name, reason=run.reason)
        if isinstance(run, _Missing)
        else Timing(name, tuple(map(median, seconds[name])))
        for name, run in runners.items()
    ]


def _to_host(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(output.cpu() for output in _as_tuple(outputs))


def _measure(runners: Mapping[str, Runner], images: Sequence[Tensor]) -> dict[str, list[list[float]]]:
    """Seconds of each runner, for each batch, in each round."""
    seconds: dict[str, list[list[float]]] = {name: [[] for _ in images] for name in runners}
    for run in runners.values():  # what the first call of each size prepares is not measured
        for pixels in images:
            run(pixels)
    end = time.perf_counter() + SECONDS
    for done in range(MAX_ROUNDS):
        if done >= MIN_ROUNDS and time.perf_counter() > end:
            break
        for name, run in runners.items():
            for times, pixels in zip(seconds[name], images, strict=True):
                start = time.perf_counter()
                run(pixels)
                times.append(time.perf_counter() - start)
    return seconds


def _write_and_open(network: Network, folder: Path, to: graph.Format) -> Runner | _Missing:
    file = folder / f"graph{SUFFIX[to]}"
    problem = graph.problem_of_format(to)
    if to == "onnx" and not problem:
        problem = _problem_of_onnxruntime()
    if problem:
        return _Missing(problem)
    graph.write(network, file, to)
    return _open(file, _device())


def _problem_of_onnxruntime() -> str | None:
    if find_spec("onnxruntime") is None:
        return "needs onnxruntime; pip install sapiens_accel[onnx]"
    import onnxruntime

    if PROVIDERS[_device()] not in onnxruntime.get_available_providers():
        return "this onnxruntime has no CUDA; pip install onnxruntime-gpu"
    return None


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def format_table(timings: Sequence[Timing], dtype: str, batches: Sequence[int] = BATCHES) -> str:
    """Times and people a second of each runtime, for each batch."""
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    width = max(len(one.runtime) for one in timings)
    heads = [f"batch {num}" for num in batches]
    lines = [
        f"{where}; {dtype}; medians of interleaved repetitions, from pixels to heatmaps in host memory",
        f"{'':{width}}" + "".join(f"  {head + ' ms':>12}  {'people/s':>9}" for head in heads),
    ]
    for one in timings:
        values = [f"  {1000 * s:12.1f}  {n / s:9.1f}" for s, n in zip(one.seconds, batches, strict=False)]
        lines.append(f"{one.runtime:{width}}" + ("".join(values) or f"  not measured: {one.reason}"))
    return "\n".join(lines)
