"""A weights folder as the file of a graph, ONNX or torch.export's, held against PyTorch once it is written.

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
# ONNX's least and what is written by default: torch writes none below 18, which most runtimes know; bf16 convolutions
# came with 22.
OPSET = {torch.float32: 18, torch.bfloat16: 22}
# Of the largest difference, where heatmaps reach 1 or less; of their largest value where they reach more.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
EXTERNAL_BEYOND = 1_500_000_000  # bytes; protobuf ends at 2 GiB, the graph itself needs some
NOTES = ("skeleton.json", "preprocessor_config.json")


class Network(nn.Module):
    """A weights folder's network as transformers builds it: normalized images to float32 heatmaps."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        """
        Raises:
            UserError: not a weights folder of ours, or one that lacks tensors.
        """
        super().__init__()
        about = weights.description(folder)
        if not (folder / weights.FILE).is_file():
            raise UserError(f"{folder}: no {weights.FILE}; expected a weights folder")
        family: Any = SapiensForPoseEstimation if about["size"]["family"] == "sapiens" else Sapiens2ForPoseEstimation
        try:
            self.network, info = family.from_pretrained(folder, dtype=dtype, output_loading_info=True)
        except Exception as error:
            raise UserError(f"{folder}: does not load: {' '.join(str(error).split())[:300]}") from None
        lost = sorted(info["missing_keys"] | info["unexpected_keys"])
        if lost:
            raise UserError(f"{folder / weights.FILE}: {lost[0]!r} is not as config.json says ({len(lost)} tensors)")
        self.input_hw: tuple[int, int] = tuple(about["input_hw"])
        self.notes = {name: (folder / name).read_text() for name in NOTES if (folder / name).is_file()}
        self.eval().requires_grad_(False)

    @property
    def dtype(self) -> torch.dtype:
        return self.network.dtype

    def forward(self, pixel_values: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b k h w"]:
        return self.network(pixel_values=pixel_values).heatmaps.float()

    def pictures(self, num: int) -> Float[Tensor, "b 3 H W"]:
        """Noise that is as large as normalized images are; always the same."""
        return torch.randn(num, 3, *self.input_hw, generator=torch.Generator().manual_seed(num))


def write(network: Network, file: Path, to: Format, *, dynamic_batch: bool = True, opset: int | None = None) -> None:
    """Write the graph.

    Args:
        dynamic_batch: any number of people at a time; else one.
        opset: ONNX's; `OPSET` by default.

    Raises:
        UserError: a suffix or an opset that cannot be; a package that is not installed.
    """
    if file.suffix != SUFFIX[to]:
        raise UserError(f"{file}: expected a file that ends in {SUFFIX[to]}")
    file.parent.mkdir(parents=True, exist_ok=True)
    # An example of one would make the batch a constant.
    example = network.pictures(2 if dynamic_batch else 1)
    shapes = {"pixel_values": {0: torch.export.Dim("batch")} if dynamic_batch else None}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch about itself
        if to == "onnx":
            _write_onnx(network, file, example, shapes, opset)
        else:
            if opset is not None:
                raise UserError(f"--opset {opset}: is ONNX's; leave it out with --to torch_export")
            program = torch.export.export(network, (example,), dynamic_shapes=shapes)
            torch.export.save(program, file, extra_files=dict(network.notes))


def _write_onnx(network: Network, file: Path, example: Tensor, shapes: dict[str, Any], opset: int | None) -> None:
    require("onnx", "onnxscript")
    from onnx.defs import onnx_opset_version

    least, last = OPSET[network.dtype], onnx_opset_version()
    opset = least if opset is None else opset
    if not least <= opset <= last:
        raise UserError(f"--opset {opset}: expected {least} to {last} for weights in {network.dtype}")
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)  # torchvision is absent
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
    if written != opset:  # torch keeps its own where it cannot convert
        raise UserError(f"--opset {opset}: torch could only write {written}; leave it out or give {written}")
    program.model.metadata_props.update(network.notes)
    size = sum(p.numel() * p.element_size() for p in network.parameters())
    _remove(file)  # an older one's data, too
    program.save(str(file), external_data=size > EXTERNAL_BEYOND)


def check(network: Network, file: Path, batches: tuple[int, ...]) -> str:
    """Run a written graph on batches of these sizes, and say how far it is from PyTorch.

    Raises:
        UserError: further than `TOLERANCE`; the file is removed.
    """
    run = _onnx_runner(file) if file.suffix == SUFFIX["onnx"] else torch.export.load(file).module()
    if isinstance(run, str):
        return run
    worst, largest = 0.0, 0.0
    with torch.no_grad():
        for num in batches:
            pixels = network.pictures(num)
            expected, found = network(pixels), run(pixels)
            worst = max(worst, float((found - expected).abs().max().nan_to_num(float("inf"))))
            largest = max(largest, float(expected.abs().max()))
    said = f"differs from PyTorch by {worst:.1e} at most, of heatmaps up to {largest:.2g}"
    if worst > TOLERANCE[network.dtype] * max(1.0, largest):
        _remove(file)
        raise UserError(f"{file}: {said}, more than {TOLERANCE[network.dtype]:.0e}; it was removed")
    return f"{said} (batches of {', '.join(map(str, batches))})"


def _onnx_runner(file: Path) -> Callable[[Tensor], Tensor] | str:
    """A function that runs the graph; or, where nothing here can, words that say so.

    Raises:
        UserError: it is no valid graph, or onnxruntime does not take it; the file is removed.
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
        raise UserError(f"{file}: was removed, nothing runs it: {' '.join(str(error).split())[:300]}") from None
    return lambda pixels: torch.from_numpy(session.run(None, {"pixel_values": pixels.numpy()})[0])


def files(file: Path) -> list[Path]:
    """A graph, and its weights where they lie beside it."""
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
