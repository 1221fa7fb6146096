"""Export weights: a folder that plain transformers loads, a snippet for the model card, and graphs for other runtimes.

python -m sapiens_accel.export RUN_DIR/STAGE/weights --to onnx model.onnx
python -m sapiens_accel.export RUN_DIR/STAGE/weights --benchmark
"""

import argparse
import json
import re
from collections import ChainMap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sapiens_accel.config.commands import export_parser
from sapiens_accel.errors import UserError
from sapiens_accel.models import export_graph as graph
from sapiens_accel.models import export_runtimes as runtimes
from sapiens_accel.models import image_processing_sapiens_pose, modeling_sapiens_pose
from sapiens_accel.models.checkpoint_formats import SKELETON_FILE, Entry, MappedPages, save_one_by_one
from sapiens_accel.models.load import FILE
from sapiens_accel.models.modeling_sapiens_pose import SapiensPoseConfig
from sapiens_accel.models.sapiens import PIXEL_MEAN, PIXEL_STD, SapiensPose, sapiens2_config
from sapiens_accel.pose import heatmap_numpy
from sapiens_accel.pose.skeleton import Skeleton
from sapiens_accel.runtime import files

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

_SNIPPET = """\
import torch
from PIL import Image
from transformers import AutoImageProcessor, {auto}

processor = AutoImageProcessor.from_pretrained("{repo_id}", trust_remote_code=True)
model = {auto}.from_pretrained("{repo_id}"{trust}).eval()
image = Image.open("people.jpg")
boxes = [[[120, 80, 160, 400]]]  # of each image its people's boxes: left, top, width, height in pixels
inputs = processor(image, boxes=boxes, return_tensors="pt")
with torch.no_grad():
    outputs = model(**inputs)
(people,) = processor.post_process_pose_estimation(outputs, boxes=boxes)  # of each image
for person in people:
    for k, ((x, y), score) in enumerate(zip(person["keypoints"], person["scores"])):  # x, y in pixels of the image
        print(f"{{model.config.id2label[k]:>16}} {{x:7.1f}} {{y:7.1f}}  score {{score:.2f}}")
"""


def write(
    folder: Path,
    states: Mapping[str, Mapping[str, Tensor]],
    *,
    model: SapiensPose,
    skeleton: Skeleton,
    sigma: float,
    dtype: torch.dtype = torch.float32,
) -> None:
    """`export` each state into the folder of its name."""
    for name, state in states.items():
        export(folder / name, state, model, skeleton, sigma, dtype)


def export(
    folder: Path,
    state: Mapping[str, Tensor],
    model: SapiensPose,
    skeleton: Skeleton,
    sigma: float,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write weights and the files that describe the network and its input; plain transformers loads the folder.

    Sapiens2: `AutoModelForPoseEstimation.from_pretrained(folder)`. Sapiens v1: `AutoModel.from_pretrained(folder,
    trust_remote_code=True)`, by the modeling file in the folder. Both: `AutoImageProcessor.from_pretrained(folder,
    trust_remote_code=True)`, by image_processing_sapiens_pose.py; without trust_remote_code it is transformers' own
    for Sapiens2, which needs torchvision and enlarges small people otherwise (bicubic).

    Args:
        state: whole tensors by the model's keys: the fp32 master weights.
        dtype: data type of the tensors in the file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{FILE}.tmp"
    entries = {published_key(key, model): Entry(tuple(_source(state, key).shape), dtype) for key in state}
    save_one_by_one(temporary, entries, _tensors(state, model), {"format": "pt"})
    files.follow_umask(temporary)
    meaning = {**asdict(skeleton), "flip_pairs": _flip_pairs(skeleton)}
    for name in ("image_bits", "box_padding"):
        if meaning[name] is None:
            del meaning[name]
    _write(folder / "config.json", _config(model, skeleton, sigma, dtype))
    _write(folder / "preprocessor_config.json", _preprocessor(model, skeleton, sigma))
    _write(folder / SKELETON_FILE, meaning)
    modules = [image_processing_sapiens_pose, heatmap_numpy]
    for module in [modeling_sapiens_pose, *modules] if model.size.family == "sapiens" else modules:
        source = Path(str(module.__file__))
        # In the folder they are beside each other.
        text = source.read_text().replace(f"from {heatmap_numpy.__name__} import", "from .heatmap_numpy import")
        (folder / source.name).write_text(text)
    # Last and in one step: a folder that holds this file is complete.
    temporary.replace(folder / FILE)


def _source(state: Mapping[str, Tensor], key: str) -> Tensor:
    """A tensor of the shape of `state[key]`, which may be computed or copied when it is read."""
    if isinstance(state, ChainMap):
        return _source(next(part for part in state.maps if key in part), key)
    for name in ("base", "parameters"):  # of merged adapters, of a network's state
        if hasattr(state, name):
            return getattr(state, name)[key]
    return state[key]


def _tensors(state: Mapping[str, Tensor], model: SapiensPose) -> Iterator[tuple[str, Tensor]]:
    """The tensors by published keys, one after another; the pages of a mapped file are given back."""
    pages = MappedPages()
    for key in state:
        yield published_key(key, model), state[key]
        pages.give_back(_source(state, key))


def _write(file: Path, tree: dict[str, Any]) -> None:
    file.write_text(json.dumps(tree, indent=2) + "\n")


def published_key(key: str, model: SapiensPose) -> str:
    """The key of one of the model's parameters in a weights folder."""
    if model.size.family == "sapiens":
        return key
    return re.sub(r"^head\.", "decode_head.", re.sub(r"^backbone\.", "model.", key))


def _config(model: SapiensPose, skeleton: Skeleton, sigma: float, dtype: torch.dtype) -> dict[str, Any]:
    ours = {**model.description(), "heatmap_hw": list(model.heatmap_hw), "sigma": sigma, "keypoints": skeleton.names}
    if model.size.family == "sapiens":
        tree, name = sapiens_config(model), "SapiensForPoseEstimation"
        module = Path(modeling_sapiens_pose.__file__).stem
        autos = dict.fromkeys(("AutoModel", "AutoModelForPoseEstimation"), f"{module}.{name}")
        tree.auto_map = {"AutoConfig": f"{module}.SapiensPoseConfig", **autos}
    else:
        tree, name = sapiens2_config(model.size, model.num_keypoints, model.input_hw), "Sapiens2ForPoseEstimation"
    tree.id2label = dict(enumerate(skeleton.names))
    tree.label2id = {keypoint: index for index, keypoint in enumerate(skeleton.names)}
    tree.flip_pairs = _flip_pairs(skeleton)
    return {**tree.to_dict(), "architectures": [name], "dtype": str(dtype).split(".")[-1], "sapiens_accel": ours}


def sapiens_config(model: SapiensPose) -> SapiensPoseConfig:
    """The config of a Sapiens v1 pose network in modeling_sapiens_pose.py."""
    size = model.size
    return SapiensPoseConfig(
        image_size=list(model.input_hw),
        patch_size=[size.patch, size.patch],
        hidden_size=size.width,
        num_hidden_layers=size.depth,
        num_attention_heads=size.heads,
        upsample_out_channels=list(size.upsample),
        conv_out_channels=list(size.convs),
        num_labels=model.num_keypoints,  # pyright: ignore[reportCallIssue]  (a key of every transformers config)
    )


def _flip_pairs(skeleton: Skeleton) -> list[list[int]]:
    return [[k, other] for k, other in enumerate(skeleton.mirror) if k < other]


def _preprocessor(model: SapiensPose, skeleton: Skeleton, sigma: float) -> dict[str, Any]:
    """For our image processor, and for transformers' Sapiens2ImageProcessor, which needs torchvision."""
    height, width = model.input_hw
    processor = image_processing_sapiens_pose.SapiensPoseImageProcessor
    padding = {} if skeleton.box_padding is None else {"box_padding": skeleton.box_padding}
    return {
        "image_processor_type": "Sapiens2ImageProcessor",
        "auto_map": {"AutoImageProcessor": f"{Path(image_processing_sapiens_pose.__file__).stem}.{processor.__name__}"},
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": 2,  # bilinear
        "do_center_crop": False,
        "do_pad": False,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [mean / 255 for mean in PIXEL_MEAN],
        "image_std": [std / 255 for std in PIXEL_STD],
        "keypoint_heatmap_downscale_factor": height // model.heatmap_hw[0],
        "keypoint_heatmap_sigma": sigma,
        **padding,
    }


def snippet(repo_id: str, family: str) -> str:
    """Python code for the model card, from an image and a person's box to keypoints, without this package.

    Args:
        repo_id: the argument of `from_pretrained`: a Hub repository or a folder.
        family: sapiens or sapiens2.
    """
    v1 = family == "sapiens"
    return _SNIPPET.format(
        repo_id=repo_id,
        auto="AutoModel" if v1 else "AutoModelForPoseEstimation",
        trust=", trust_remote_code=True" if v1 else "",
    )


# ---- python -m sapiens_accel.export


def main(words: Sequence[str]) -> None:
    asked = export_parser().parse_intermixed_args(words)
    _check_words(asked)
    dtype = DTYPES[asked.dtype]
    if asked.benchmark:
        print(runtimes.format_table(runtimes.benchmark(asked.weights, dtype), asked.dtype))
        return
    network = graph.Network(asked.weights, dtype)
    dynamic = asked.dynamic_batch == "true"
    graph.write(network, asked.out, asked.to, dynamic_batch=dynamic, opset=asked.opset)
    # fp16 is held against fp32: what is deployed against what was evaluated.
    reference = graph.Network(asked.weights) if asked.dtype == "fp16" else network
    result = runtimes.check(reference, asked.out, (1, 3) if dynamic else (1,), dtype)
    for file in graph.files(asked.out):
        print(f"{file}: {file.stat().st_size / 2**20:.1f} MiB")
    print(result)


def _check_words(asked: argparse.Namespace) -> None:
    """
    Raises:
        UserError: options that exclude each other, or that need each other; what cannot be written here.
    """
    if asked.benchmark:
        extra = {"--to": asked.to, "OUT": asked.out, "--opset": asked.opset, "--dynamic_batch": asked.dynamic_batch}
        if given := [name for name, value in extra.items() if value not in (None, "true")]:
            raise UserError(f"--benchmark: writes no file (found {given[0]}). Leave out {' and '.join(given)}")
        return
    if asked.to is None or asked.out is None:
        lacking = "--to" if asked.to is None else "OUT"
        raise UserError(f"export: {lacking} is missing (expected WEIGHTS --to FORMAT OUT, or WEIGHTS --benchmark)")
    graph.check_request(asked.to, asked.out, asked.opset)
