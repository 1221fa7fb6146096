"""Export a weights folder as a graph: ONNX, torch.export, or a TensorRT engine that is built from the ONNX graph.

In: `pixel_values`, float32 [b, 3, H, W], RGB, normalized as preprocessor_config.json says. Out: `heatmaps`, float32
[b, K, h, w], in any precision of the weights; and where the weights have it `visibility`, float32 [b, K, 2], the
probabilities that a keypoint is present and that it is visible. skeleton.json and preprocessor_config.json are in the
file: ONNX has them as metadata, torch.export as extra files; an engine has no place for them. `export_runtimes` runs
the written files.
"""

import logging
import tempfile
import warnings
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
from sapiens_accel.visibility import output as visibility

Format = Literal["onnx", "torch_export", "tensorrt"]
SUFFIX: dict[Format, str] = {"onnx": ".onnx", "torch_export": ".pt2", "tensorrt": ".engine"}
PACKAGES: dict[Format, tuple[str, ...]] = {
    "onnx": ("onnx", "onnxscript"),
    "torch_export": (),
    "tensorrt": ("onnx", "onnxscript", "tensorrt"),
}
# The lowest and default operator sets of ONNX: torch writes none below 18, which most runtimes support; convolutions in
# bf16 need 22.
OPSET = {torch.float32: 18, torch.float16: 18, torch.bfloat16: 22}
ENGINE_BATCHES = (1, 8, 32)  # of a TensorRT engine: the least, the one that it is tuned for, and the most
EXTERNAL_BEYOND = 1_500_000_000  # bytes of weights; protobuf is limited to 2 GiB, graph included
OUTPUTS = ("heatmaps", "visibility")
ATTACHED_FILES = ("skeleton.json", "preprocessor_config.json")


class Network(nn.Module):
    """The network of a weights folder as transformers builds it: normalized images to float32 heatmaps.

    Attributes:
        outputs: the names of what it returns: heatmaps, or a tuple of heatmaps and visibility.
    """

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
        self.sigma = float(about["sigma"])
        self.notes = {name: (folder / name).read_text() for name in ATTACHED_FILES if (folder / name).is_file()}
        self.visibility = visibility.read(folder)
        self.outputs = OUTPUTS if self.visibility is not None else OUTPUTS[:1]
        self.eval().requires_grad_(False)

    @property
    def dtype(self) -> torch.dtype:
        return self.network.dtype

    def forward(
        self, pixel_values: Float[Tensor, "b 3 H W"]
    ) -> Float[Tensor, "b k h w"] | tuple[Float[Tensor, "b k h w"], Float[Tensor, "b k 2"]]:
        if self.visibility is None:
            return self.network(pixel_values=pixel_values).heatmaps.float()
        head = self.network.get_submodule("head" if hasattr(self.network, "head") else "decode_head")
        with visibility.watch_head(head, self.visibility) as passes:
            heatmaps = self.network(pixel_values=pixel_values).heatmaps
        return heatmaps.float(), passes[0]

    def example_images(self, num: int) -> Float[Tensor, "b 3 H W"]:
        """Noise in the range of normalized images, the same in every call."""
        return torch.randn(num, 3, *self.input_hw, generator=torch.Generator().manual_seed(num))


def problem_of_format(to: Format) -> str | None:
    """Why a format cannot be written on this machine, and the remedy; None where it can."""
    if missing := [name for name in PACKAGES[to] if find_spec(name) is None]:
        install = dict.fromkeys(name if name == "tensorrt" else "sapiens_accel[onnx]" for name in missing)
        return f"needs {' and '.join(missing)}; pip install {' '.join(install)}"
    if to == "tensorrt" and not torch.cuda.is_available():
        return "no CUDA GPU here (an engine is built on the GPU that runs it). Export on the machine that has it"
    return None


def check_request(to: Format, file: Path, opset: int | None = None) -> None:
    """Refuse at once what cannot be written.

    Raises:
        UserError: a wrong suffix, --opset without ONNX, or as `problem_of_format`.
    """
    if file.suffix != SUFFIX[to]:
        raise UserError(f"{file}: expected a file name that ends in {SUFFIX[to]}")
    if opset is not None and to != "onnx":
        raise UserError(f"--opset {opset}: only for --to onnx. Leave it out with --to {to}")
    if problem := problem_of_format(to):
        raise UserError(f"--to {to}: {problem}")


def write(network: Network, file: Path, to: Format, *, dynamic_batch: bool = True, opset: int | None = None) -> None:
    """Write the graph.

    Args:
        dynamic_batch: allow any batch size (TensorRT: those of `ENGINE_BATCHES`); else 1.
        opset: ONNX operator set. Default: `OPSET`.

    Raises:
        UserError: as `check_request`; an unsupported opset; TensorRT cannot build the engine.
    """
    check_request(to, file, opset)
    file.parent.mkdir(parents=True, exist_ok=True)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's about its own calls
        if to == "onnx":
            _write_onnx(network, file, opset, dynamic_batch=dynamic_batch)
        elif to == "tensorrt":
            _write_engine(network, file, dynamic_batch=dynamic_batch)
        else:
            example, shapes = _example(network, dynamic_batch=dynamic_batch)
            program = torch.export.export(network, (example,), dynamic_shapes=shapes)
            torch.export.save(program, file, extra_files=dict(network.notes))


def _example(network: Network, *, dynamic_batch: bool) -> tuple[Tensor, dict[str, Any]]:
    # With one example image the batch size would become a constant.
    example = network.example_images(2 if dynamic_batch else 1)
    return example, {"pixel_values": {0: torch.export.Dim("batch")} if dynamic_batch else None}


def _write_onnx(network: Network, file: Path, opset: int | None = None, *, dynamic_batch: bool) -> None:
    from onnx.defs import onnx_opset_version

    least, last = OPSET[network.dtype], onnx_opset_version()
    opset = least if opset is None else opset
    if not least <= opset <= last:
        raise UserError(f"--opset {opset}: expected {least} to {last} for weights in {network.dtype}")
    example, shapes = _example(network, dynamic_batch=dynamic_batch)
    # It warns if torchvision is not installed.
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
    program = torch.onnx.export(
        network,
        (example,),
        input_names=["pixel_values"],
        output_names=list(network.outputs),
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
    remove(file)  # and the external data of an older graph
    program.save(str(file), external_data=size > EXTERNAL_BEYOND)


def _write_engine(network: Network, file: Path, *, dynamic_batch: bool) -> None:
    """Build a TensorRT engine from an ONNX graph, in the precisions that the graph states (strongly typed)."""
    import tensorrt as trt  # pyright: ignore[reportMissingImports]

    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    definition = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(definition, logger)
    with tempfile.TemporaryDirectory(prefix=".onnx-", dir=file.parent) as folder:
        onnx = Path(folder) / "graph.onnx"
        _write_onnx(network, onnx, dynamic_batch=dynamic_batch)
        # By its file, beside which weights over 2 GB are.
        if not parser.parse_from_file(str(onnx)):
            raise UserError(f"{file}: TensorRT {trt.__version__} cannot read the graph: {parser.get_error(0).desc()}")
        config = builder.create_builder_config()
        if dynamic_batch:
            profile = builder.create_optimization_profile()
            profile.set_shape("pixel_values", *((num, 3, *network.input_hw) for num in ENGINE_BATCHES))
            config.add_optimization_profile(profile)
        engine = builder.build_serialized_network(definition, config)
    if engine is None:
        raise UserError(f"{file}: TensorRT {trt.__version__} cannot build the engine; the reason stands above")
    file.write_bytes(engine)


def files(file: Path) -> list[Path]:
    """The file of a graph, and that of its external weights if there is one."""
    return [path for path in (file, file.with_name(f"{file.name}.data")) if path.is_file()]


def remove(file: Path) -> None:
    """Remove the files of a graph."""
    for path in files(file):
        path.unlink()
