"""The command line of each command, apart from its implementation: `--help` is answered without importing torch."""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NoReturn, get_origin

from sapiens_accel.config.options import options
from sapiens_accel.config.schema import STAGES
from sapiens_accel.errors import UserError

EXPORT_FORMATS = ("onnx", "torch_export", "tensorrt")
EXPORT_DTYPES = ("fp32", "fp16", "bf16")
DETECTOR, DETECTOR_THRESHOLD, DETECTOR_MAX_IOU = "PekingU/rtdetr_v2_r50vd", 0.05, 0.7


def program_name(module: str, command: str) -> str:
    """The program as it was called, for its usage: `sapiens-accel` COMMAND, or `python -m` MODULE."""
    installed = sys.argv[0].startswith("sapiens-accel ")
    return " ".join(("sapiens-accel", command) if installed else ("python", "-m", f"sapiens_accel.{module}"))


def doctor_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program_name("doctor", "doctor"),
        description="Check a run before it starts. All options of train may follow: --recipe NAME --data.root DIR ...",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--launch", help="how the run will be launched: zero2, zero2_offload, ..., or an accelerate YAML"
    )
    parser.add_argument("--json", metavar="FILE", help="write all findings as JSON; - prints them instead of text")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="folder of crops.png (OUTPUT_DIR/doctor)")
    return parser


def memory_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program_name("memory", "memory"),
        description="Predict the memory and the hours of a run for each way to launch it. All options of train may "
        "follow: --recipe NAME --stage phase2 ...",
        allow_abbrev=False,
    )
    parser.add_argument("--gpus", type=int, default=1, help="GPUs of one machine (1)")
    parser.add_argument(
        "--gpu", metavar="NAME",
        help="T4, V100, A4000, L4, 4060Ti-16, 4080, 3090, 4090, A100 or H100: memory, compute capability and speed",
    )  # fmt: skip
    parser.add_argument("--gpu_memory", help="memory of each GPU: 16GiB, 24GB, 15360MiB, ... (that of --gpu, or 16GiB)")
    parser.add_argument("--capability", help="compute capability of each GPU: 7.5, ... (that of --gpu, or 8.0)")
    parser.add_argument("--host_memory", help="memory of the machine (that of this machine)")
    parser.add_argument("--people", type=int, help="labeled people of training, for the hours (of the data; COCO's)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def export_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program_name("export", "export"),
        description="Export a weights folder as a graph, pixel_values (float32, normalized) to heatmaps, and check it.",
        allow_abbrev=False,
    )
    parser.add_argument("weights", type=Path, help="a weights folder: RUN_DIR/STAGE/weights")
    parser.add_argument("--to", choices=EXPORT_FORMATS, help="the format")
    parser.add_argument(
        "out", type=Path, nargs="?", metavar="OUT", help="the file to write: OUT.onnx, OUT.pt2 or OUT.engine"
    )
    parser.add_argument(
        "--benchmark", action="store_true",
        help="write no file; time PyTorch, ONNX Runtime and TensorRT on this machine, as people a second",
    )  # fmt: skip
    parser.add_argument(
        "--dynamic_batch", nargs="?", const="true", default="true", choices=("true", "false"),
        help="any number of people at a time (true), or one",
    )  # fmt: skip
    parser.add_argument("--opset", type=int, help="ONNX's operator set (18; bf16: 22)")
    parser.add_argument(
        "--dtype", choices=EXPORT_DTYPES, default="fp32", help="precision of weights and arithmetic (fp32)"
    )
    return parser


def detect_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program_name("boxes", "detect"),
        description="Detect people or animals in images, and write their boxes for stage ssl and eval.py.",
        allow_abbrev=False,
    )
    add: Callable[..., Any] = parser.add_argument
    add("images", type=Path, help="an image, a folder (with all below it) or a video")
    add("--out", type=Path, required=True, help="the JSON to write: a list of image_id, category_id, bbox, score")
    add("--detector", default=DETECTOR, help=f"a folder, or a repository on the Hub ({DETECTOR})")
    add("--detector.class", dest="detector_class", default="person", metavar="NAME",
        help="which of the detector's classes to look for, or several, separated by commas (person)")  # fmt: skip
    least, overlap = DETECTOR_THRESHOLD, DETECTOR_MAX_IOU
    add("--threshold", type=float, default=least, help=f"minimum score ({least}; ssl uses boxes of 0.5 or more)")
    add("--max_iou", type=float, default=overlap, help=f"keep one of two boxes that overlap by more ({overlap})")
    add("--batch_size", type=int, default=8, help="images in a forward pass (8)")
    add("--num_workers", type=int, default=4, help="processes that read images (4)")
    add("--device", help="cuda or cpu (cuda if there is a GPU)")
    add("--annotations", type=Path, help="COCO JSON to take image ids from, for eval.py on labeled images")
    add("--every", type=int, help="video: use every n-th frame (1)")
    add("--frames", type=Path, help="video: folder to write its frames to (beside OUT, with the name of the video)")
    return parser


# The FORMATs of sapiens-accel convert, and what messages call their files. coco, the way out of that form, has options
# of its own (sources/convert.py).
CONVERT_FORMATS = {
    "deeplabcut": "a project of DeepLabCut",
    "lightning_pose": "labels of DeepLabCut or lightning-pose",
    "sleap": "labels of SLEAP",
    "label_studio": "an export of Label Studio",
    "cvat": "an export of CVAT",
    "yolo": "a YOLO dataset",
    "labelme": "labels of labelme",
    "mpii": "annotations of MPII",
    "crowdpose": "annotations of CrowdPose",
    "ap10k": "annotations of AP-10K",
    "animalpose": "annotations of AnimalPose",
    "coco_json": "one COCO JSON",
    "video": "a video",
}
FRAMES = 200  # of a video


def convert_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sapiens-accel convert",
        description="Labels of another tool as a folder in COCO's form, which --data.root reads; or frames of a video, "
        "without labels, into such a folder. FORMAT coco_json splits one COCO JSON into training and validation; "
        "FORMAT coco writes shards: sapiens-accel convert coco --help",
        allow_abbrev=False,
    )
    add: Callable[..., Any] = parser.add_argument
    add("format", metavar="FORMAT", choices=tuple(CONVERT_FORMATS), help=", ".join(CONVERT_FORMATS))
    add("source", metavar="IN", type=Path, help="what the tool wrote: a file, or the folder of a project; a video")
    add("out", metavar="OUT", type=Path, help="a new folder; of a video: one that may be there")
    add("--images", type=Path, help="the folder of the images, where they are not where the labels say")
    add("--category", help="what is annotated: mouse, hand, ... (default: the tool's name, else animal or person)")
    add("--val", type=float, help="share of the images for validation, where the tool has no split (0.2)")
    add("--seed", type=int, default=0, help="of what is drawn at random (0)")
    add(
        "--boxes", choices=("annotation", "keypoints", "image", "motion"), default=None,
        help="annotation: the tool's, else from the keypoints; keypoints; image: whole images. Of a video: image, or "
        "motion: what moves against a fixed background (annotation; of a video: image)",
    )  # fmt: skip
    add("--link", action="store_true", help="link the images, in place of copies")
    video = parser.add_argument_group("of a video")
    every: Callable[..., Any] = video.add_argument
    every("--frames", type=int, help=f"how many frames, evenly ({FRAMES})")
    every("--seconds", type=float, help="a frame every so many seconds, in place of --frames")
    every("--different", action="store_true", help="frames that differ: one of each of --frames clusters (k-means)")
    every("--animals", type=int, help="most boxes of a frame by motion (1)")
    every("--folder", default="unlabeled2017", help="of OUT, for the frames: --data.unlabelled_images (unlabeled2017)")
    return parser


def app_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sapiens-accel app",
        description="A page on this machine to try a network on images and videos, on a CPU too.",
        allow_abbrev=False,
    )
    add: Callable[..., Any] = parser.add_argument
    add("weights", help="a run directory, a weights folder or file, or ORG/NAME on the Hub")
    add("--port", type=int, default=7860, help="port to listen on (7860)")
    add("--host", default="127.0.0.1", help="address to listen on (127.0.0.1: this machine alone; 0.0.0.0: all)")
    add("--detector", default=DETECTOR, help=f"a folder, or a repository on the Hub ({DETECTOR})")
    add("--device", help="cuda, cuda:1 or cpu (cuda if there is a GPU)")
    return parser


class _PushParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def push_parser() -> argparse.ArgumentParser:
    text = "Push a stage's weights to the Hugging Face Hub."
    parser = _PushParser(prog=program_name("hub", "push").removesuffix(" push"), description=text)
    commands = parser.add_subparsers(dest="command", required=True, metavar="push")
    push = commands.add_parser("push", description=text, allow_abbrev=False)
    push.add_argument("run_folder", type=Path, metavar="RUN_DIR", help="run directory of train.py")
    push.add_argument("--stage", choices=STAGES, help="stage of the weights (the last one that has any)")
    push.add_argument("--hub_model_id", metavar="ORG/NAME", help="repository (that of the run's config.yaml)")
    push.add_argument(
        "--into", default="", metavar="FOLDER", help="folder of the repository, without a model card (its root)"
    )
    push.add_argument("--hub_private", action="store_true", help="make it private")
    push.add_argument("--space", action="store_true", help="also a Space of that name: the page of sapiens-accel app")
    return parser


PARSERS = {
    "doctor": doctor_parser,
    "memory": memory_parser,
    "detect": detect_parser,
    "export": export_parser,
    "app": app_parser,
    "push": push_parser,
}


# ---- sapiens-accel train and eval

LAUNCH_OPTIONS = (
    "launch", "num_processes", "num_machines", "machine_rank", "main_process_ip", "main_process_port", "gpu_ids",
    "mixed_precision",
)  # fmt: skip


def split_launch_options(argv: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The options of the launcher in a command line of train or eval, by name, and the other words.

    Raises:
        UserError: one without a value.
    """
    options: dict[str, str] = {}
    rest: list[str] = []
    words = iter(argv)
    for word in words:
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or name not in LAUNCH_OPTIONS:
            rest.append(word)
            continue
        options[name] = value if equals else next(words, "")
        if not options[name] or options[name].startswith("--"):
            raise UserError(f"--{name}: no value (expected such as --launch zero2 --num_processes 2)")
    return options, rest


# ---- eval.py


@cache
def evaluation_options() -> Mapping[str, str]:
    """The short names of the options of `EvalConfig`: `--flip` is `--eval.flip`, `--worst` is `--eval.num_worst`.

    `--detector.class` is what `python -m sapiens_accel.boxes` calls it.
    """
    keys = [key for key in options() if key.startswith("eval.")]
    short = {"detector.class": "eval.detector_class"}
    return short | {key.removeprefix("eval.").removeprefix("num_"): key for key in keys}


def parse_evaluation(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split the command line of eval.py into what to evaluate and the options, in their full names.

    The items of a list may follow as words of their own: `--scales 0.5 1.0` is `--eval.scales=[0.5,1.0]`.

    Raises:
        UserError: nothing to evaluate is named.
    """
    count = next((i for i, word in enumerate(argv) if word.startswith("-")), len(argv))
    if not count:
        raise UserError(
            "nothing to evaluate (expected first: a run directory, a weights folder or HUB_REPO, ORG/NAME). Example: "
            f"{'sapiens-accel eval' if sys.argv[0].startswith('sapiens-accel ') else 'python eval.py'} RUN_DIR "
            "[--data.root DIR] [--boxes gt|FILE]"
        )
    words: list[str] = []
    items: list[str] | None = None  # of the list option that is being read
    for word in argv[count:]:
        name, equals, value = word.removeprefix("--").partition("=")
        key = evaluation_options().get(name, name)
        if not word.startswith("--"):
            if items is None:
                words.append(word)
            else:
                items += filter(None, [word.strip("[]")])
                words[-1] = f"{words[-1].partition('=')[0]}=[{','.join(items)}]"
        elif key.startswith("eval.") and not equals and get_origin(options().get(key)) is tuple:
            items = []
            words.append(f"--{key}=[]")
        else:
            items = None
            words.append(f"--{key}{equals}{value}")
    return list(argv[:count]), words
