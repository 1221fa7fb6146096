"""Export a weights folder as a graph, ONNX or torch.export, and compare the written file with PyTorch.

In: `pixel_values`, float32 [b, 3, H, W], RGB, normalized as preprocessor_config.json says. Out: `heatmaps`, float32
[b, K, h, w]. Both carry skeleton.json and preprocessor_config.json: ONNX as metadata, torch.export as extra files.
"""

import logging
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import Sapiens2ForPoseEstimation

from sapiens_accel.errors import UserError
from sapiens_accel.models import load as weights
from sapiens_accel.models.modeling_sapiens_pose import SapiensForPoseEstimation

Format = Literal["onnx", "torch_export"]
SUFFIX: dict[Format, str] = {"onnx": ".onnx", "torch_export": ".pt2"}
# The lowest and default operator sets of ONNX: torch writes none below 18, which most runtimes support; convolutions in
# bf16 need 22.
OPSET = {torch.float32: 18, torch.bfloat16: 22}
# Maximum absolute difference; relative to the largest value where heatmaps exceed 1.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
EXTERNAL_BEYOND = 1_500_000_000  # bytes of weights; protobuf is limited to 2 GiB, graph included
ATTACHED_FILES = ("skeleton.json", "preprocessor_config.json")


class Network(nn.Module):
    """The network of a weights folder as transformers builds it: normalized images to float32 heatmaps."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        """
        Raises:
            UserError: it is no weights folder of this package, or tensors are missing.
        """
        super().__init__()
        about = weights.description(folder)
        if not (folder / weights.FILE).is_file():
            raise UserError(f"{folder}: no {weights.FILE} in it (expected a weights folder)")
        family: Any = SapiensForPoseEstimation if about["size"]["family"] == "sapiens" else Sapiens2ForPoseEstimation
        try:
            self.network, info = family.from_pretrained(folder, dtype=dtype, output_loading_info=True)
        except Exception as error:
            raise UserError(f"{folder}: cannot be loaded: {' '.join(str(error).split())[:300]}") from None
        lost = sorted(info["missing_keys"] | info["unexpected_keys"])
        if lost:
            raise UserError(f"{folder / weights.FILE}: {lost[0]!r} does not match config.json ({len(lost)} tensors)")
        self.input_hw: tuple[int, int] = tuple(about["input_hw"])
        self.notes = {name: (folder / name).read_text() for name in ATTACHED_FILES if (folder / name).is_file()}
        self.eval().requires_grad_(False)

    @property
    def dtype(self) -> torch.dtype:
        return self.network.dtype

    def forward(self, pixel_values: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b k h w"]:
        return self.network(pixel_values=pixel_values).heatmaps.float()

    def example_images(self, num: int) -> Float[Tensor, "b 3 H W"]:
        """Noise in the range of normalized images, the same in every call."""
        return torch.randn(num, 3, *self.input_hw, generator=torch.Generator().manual_seed(num))


def write(network: Network, file: Path, to: Format, *, dynamic_batch: bool = True, opset: int | None = None) -> None:
    """Write the graph.

    Args:
        dynamic_batch: allow any batch size; else 1.
        opset: ONNX operator set. Default: `OPSET`.

    Raises:
        UserError: a wrong suffix, an unsupported opset, or a package that is not installed.
    """
    if file.suffix != SUFFIX[to]:
        raise UserError(f"{file}: expected a file name that ends in {SUFFIX[to]}")
    file.parent.mkdir(parents=True, exist_ok=True)
    # With one example image the batch size would become a constant.
    example = network.example_images(2 if dynamic_batch else 1)
    shapes = {"pixel_values": {0: torch.export.Dim("batch")} if dynamic_batch else None}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's about its own calls
        if to == "onnx":
            _write_onnx(network, file, example, shapes, opset)
        else:
            if opset is not None:
                raise UserError(f"--opset {opset}: only for --to onnx. Leave it out with --to torch_export")
            program = torch.export.export(network, (example,), dynamic_shapes=shapes)
            torch.export.save(program, file, extra_files=dict(network.notes))


def _write_onnx(network: Network, file: Path, example: Tensor, shapes: dict[str, Any], opset: int | None) -> None:
    require("onnx", "onnxscript")
    from onnx.defs import onnx_opset_version

    least, last = OPSET[network.dtype], onnx_opset_version()
    opset = least if opset is None else opset
    if not least <= opset <= last:
        raise UserError(f"--opset {opset}: expected {least} to {last} for weights in {network.dtype}")
    # It warns if torchvision is not installed.
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
    program = torch.onnx.export(
        network,
        (example,),
        input_names=["pixel_values"],
        output_names=["heatmaps"],
        opset_version=opset,
        dynamic_shapes=shapes,
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    written = program.model.opset_imports[""]
    if written != opset:  # torch keeps its own opset where it cannot convert
        raise UserError(f"--opset {opset}: torch could only write {written}. Leave it out or give {written}")
    program.model.metadata_props.update(network.notes)
    size = sum(p.numel() * p.element_size() for p in network.parameters())
    _remove(file)  # and the external data of an older graph
    program.save(str(file), external_data=size > EXTERNAL_BEYOND)


def check(network: Network, file: Path, batches: tuple[int, ...]) -> str:
    """Run a written graph on batches of these sizes, and describe its difference from PyTorch.

    Raises:
        UserError: the difference exceeds `TOLERANCE`; the file is removed.
    """
    run = _onnx_runner(file) if file.suffix == SUFFIX["onnx"] else torch.export.load(file).module()
    if isinstance(run, str):
        return run
    worst, largest = 0.0, 0.0
    with torch.no_grad():
        for num in batches:
            pixels = network.example_images(num)
            expected, actual = network(pixels), run(pixels)
            worst = max(worst, float((actual - expected).abs().max().nan_to_num(float("inf"))))
            largest = max(largest, float(expected.abs().max()))
    difference = f"differs from PyTorch by {worst:.1e} at most, of heatmaps up to {largest:.2g}"
    if worst > TOLERANCE[network.dtype] * max(1.0, largest):
        _remove(file)
        raise UserError(f"{file}: {difference}, more than {TOLERANCE[network.dtype]:.0e}; it was removed")
    return f"{difference} (batches of {', '.join(map(str, batches))})"


def _onnx_runner(file: Path) -> Callable[[Tensor], Tensor] | str:
    """A function that runs the graph; or, if it cannot be run on this machine, a text that says so.

    Raises:
        UserError: the graph is not valid, or onnxruntime refuses it; the file is removed.
    """
    if find_spec("onnxruntime") is None:
        return "NOT CHECKED: onnxruntime is not installed; pip install sapiens_accel[onnx]"
    import onnx
    import onnxruntime
    from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as Missing

    try:
        onnx.checker.check_model(str(file), full_check=True)
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    except Missing as error:
        return f"a valid graph, but its numbers are NOT CHECKED: onnxruntime on the CPU: {' '.join(str(error).split())}"
    except Exception as error:
        _remove(file)
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{file}: onnxruntime cannot run it, and it was removed: {reason}") from None
    return lambda pixels: torch.from_numpy(session.run(None, {"pixel_values": pixels.numpy()})[0])


def files(file: Path) -> list[Path]:
    """The file of a graph, and that of its external weights if there is one."""
    return [path for path in (file, file.with_name(f"{file.name}.data")) if path.is_file()]


def _remove(file: Path) -> None:
    for path in files(file):
        path.unlink()


def require(*packages: str) -> None:
    """
    Raises:
        UserError: one of the packages is not installed.
    """
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise UserError(f"--to onnx: needs {' and '.join(missing)}; pip install sapiens_accel[onnx]")
