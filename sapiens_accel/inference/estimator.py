"""Keypoints of people in images and videos, from Python: the predictions of `eval.py --images`, as arrays.

from sapiens_accel import PoseEstimator
pose = PoseEstimator.from_pretrained("RUN_DIR")
people = pose("IMAGE.jpg", boxes="detector")
"""

import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, overload

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from jaxtyping import Float, Int, UInt8
from numpy import ndarray as Array

from sapiens_accel.config import parse as config
from sapiens_accel.data.detections import NOBODY, PersonBoxes
from sapiens_accel.errors import UserError, count
from sapiens_accel.evaluation import keypoint_csv, networks
from sapiens_accel.evaluation.keypoint_csv import CsvShape, ImageRow
from sapiens_accel.inference import media
from sapiens_accel.inference.detector import DEFAULT, Detector, prepare_batch
from sapiens_accel.inference.keypoints import KeypointFinder, collect_boxes, find_whole
from sapiens_accel.inference.outputs import Person, Piece, category_name, to_annotation, to_categories, to_image
from sapiens_accel.inference.predict_media import BY_DETECTOR, DETECTED_AT_ONCE, FRAMES, WHOLE
from sapiens_accel.inference.tracking import Tracker
from sapiens_accel.pose import draw
from sapiens_accel.pose.skeleton import Skeleton
from sapiens_accel.runtime.device import choose_device
from sapiens_accel.runtime.distributed import BF16_CAPABILITY
from sapiens_accel.sources.images import BadImageError, decode_image, describe_fault, set_image_bits, whole_image
from sapiens_accel.visibility.output import OUTPUTS

Image = str | Path | bytes | PIL.Image.Image | UInt8[Array, "h w 3"]
GivenBoxes = str | Sequence[Any] | Array | None
IMAGE_FORMS = "a path, the bytes of a file, a PIL image, or an array of uint8 [h, w, 3] in RGB order"
OPTIONS = (
    "flip", "scales", "batch_size", "score_threshold", "nms_threshold", "min_box_score", "detector_class", "smooth",
    "smooth_cutoff", "smooth_beta",
)  # fmt: skip
DTYPES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
PIL_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB")  # of 8 bits


@dataclass(frozen=True, kw_only=True, eq=False)
class PoseResult:
    """The people of one image. Pixels are those of the image: x to the right, y down, the first one's center is (0, 0).

    Attributes:
        keypoints: [N, K, 2], x and y in px.
        scores: [N, K], of each keypoint: the maximum of its heatmap, about 0..1.
        boxes: [N, 4], x y width height in px: those that the people were predicted in.
        names: of the K keypoints.
        category: what the boxes hold: person, or what the weights were trained on.
        person_scores: [N], the box's score times the mean score of its keypoints above `threshold`.
        box_scores: [N], a detector's; else 1.
        image_name: the file's name; of a frame VIDEO_000012.jpg (frame 12, counted from 0); else image_0 and so on.
        image_hw: height and width of the image in px.
        threshold: keypoints with a score above it are drawn, and labeled (v is 2) in `to_coco`.
        track_ids: [N], of a video: identities, the same number in all frames of a person, from 1.
        time: of a video: when the frame is shown, in seconds.
        present, visible: [N, K], the probabilities that a keypoint is there (v > 0 in labels) and that it is not hidden
            either (v 2); None where the weights were trained without `--model.visibility`.
    """

    keypoints: Float[Array, "n k 2"]
    scores: Float[Array, "n k"]
    boxes: Float[Array, "n 4"]
    names: tuple[str, ...]
    category: str
    person_scores: Float[Array, "n"]
    box_scores: Float[Array, "n"]
    image_name: str
    image_hw: tuple[int, int]
    threshold: float
    skeleton: Skeleton
    track_ids: Int[Array, "n"] | None = None
    time: float | None = None
    present: Float[Array, "n k"] | None = None
    visible: Float[Array, "n k"] | None = None

    def __len__(self) -> int:
        return len(self.keypoints)

    def __repr__(self) -> str:
        """One line, as a notebook shows it; the arrays are attributes."""
        num, size = len(self.names), _size(self.image_hw)
        return f"PoseResult({self.image_name}, {size} px: {count(len(self), 'box')}, {num} keypoints each)"

    def draw(self, image: Image) -> UInt8[Array, "h w 3"]:
        """A copy of the image, RGB, with everybody's keypoints and bones; left in orange, right in blue.

        Of a video, bones have the color of the person's identity, and its number is above the person.

        Raises:
            UserError: no image, or one of another size than these people are of.
        """
        pixels = read_pixels(image)
        if pixels.shape[:2] != self.image_hw:
            raise UserError(
                f"draw: the image is not that of these people (expected {_size(self.image_hw)} px, found "
                f"{_size(pixels.shape)})"
            )
        tracks = None if self.track_ids is None else self.track_ids.tolist()
        return draw.draw_people(pixels, self.keypoints, self.scores > self.threshold, self.skeleton, tracks)

    def to_coco(self, image_id: int = 1, annotation_id: int = 1) -> dict[str, Any]:
        """The image as COCO's `images`, `annotations` and `categories`, as in keypoints.json of `eval.py --images`.

        Args:
            image_id: id of the image.
            annotation_id: id of the first person; the next ones follow it.
        """
        annotations = [
            {"id": number, "image_id": image_id, **to_annotation(person, self.threshold)}
            for number, person in enumerate(self.to_people(), start=annotation_id)
        ]
        return {
            "images": [{"id": image_id, **to_image(self.image_name, self.image_hw, self.time)}],
            "annotations": annotations,
            "categories": to_categories(self.skeleton, {1: self.category}),
        }

    def to_csv(self, file: str | Path | None = None, shape: CsvShape = "long") -> str:
        """The people as a CSV, as `eval.py --csv` writes it: its text, which is also written to `file` if one is given.

        Args:
            shape: long, a line for each keypoint of each person; deeplabcut, one line under DeepLabCut's header rows.

        Raises:
            UserError: the file cannot be written.
        """
        rows = [one.to_row(self.category) for one in self.to_people()]
        image = ImageRow(self.image_name, rows, 1, time=self.time)
        text = keypoint_csv.format_csv(self.names, shape, [image], has_visibility=self.present is not None)
        if file is not None:
            try:
                Path(file).write_text(text, encoding="utf-8", newline="")
            except OSError as error:
                raise UserError(f"to_csv: {file}: not written: {error.strerror}") from None
        return text

    def to_people(self) -> list[Person]:
        """The people one by one."""
        tracks = [None] * len(self) if self.track_ids is None else self.track_ids.tolist()
        parts = (self.keypoints, self.scores, self.person_scores.tolist(), self.boxes, self.box_scores.tolist())
        people = [Person(*row, track_id=track) for *row, track in zip(*parts, tracks, strict=True)]
        if self.present is None or self.visible is None:
            return people
        visibility = np.stack([self.present, self.visible], axis=-1)
        return [one._replace(visibility=values) for one, values in zip(people, visibility, strict=True)]


class PoseEstimator:
    """Predicts the keypoints of people in images, as `eval.py WEIGHTS --images` does and equal to it.

    Attributes:
        finder: the networks, their skeleton and options.
    """

    def __init__(self, finder: KeypointFinder) -> None:
        self.finder = finder
        self._detector = cache(self._open_detector)
        self._warned = False

    @classmethod
    def from_pretrained(
        cls,
        weights: str | Path | Sequence[str | Path],
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        **options: Any,
    ) -> "PoseEstimator":
        """Load the networks of a run's last stage, of weights, or of a repository on the Hub.

        Args:
            weights: a run directory, a weights folder or file, ORG/NAME; of several the heatmaps are averaged.
            device: cpu, cuda, cuda:1, ... Default: the GPU, if there is one.
            dtype: bfloat16 or float16: the arithmetic of the networks on a GPU; less memory.
                Default: float32, as `eval.py` without a launcher.
            options: OPTIONS, as of eval.py: flip=False, scales=(0.7, 1.0), batch_size=8 (crops in a forward pass),
                score_threshold=0.2, nms_threshold=0.9, min_box_score=0.5, detector_class="mouse"; of videos
                smooth=True, smooth_cutoff=2.0, smooth_beta=10.0. Default: those of the run.

        Raises:
            UserError: no such weights, weights of unknown keypoints, no such device or option.
        """
        for name in options:
            if name not in OPTIONS:
                raise UserError(f"PoseEstimator: no such option {name} (expected one of {', '.join(OPTIONS)})")
        where = choose_device(device, "device")
        autocast = _choose_autocast(dtype, where)
        several = [weights] if isinstance(weights, str | Path) else weights
        paths = [networks.resolve_path(str(one)) for one in several]
        words = config.to_words({f"eval.{name}": value for name, value in options.items()})
        words = ["--stage=all", "--data.num_workers=0", *words]
        run = config.load(words, prog="PoseEstimator", base=networks.find_run_config(paths[0]))
        candidates = [networks.list_weights(path, run, None)[-1] for path in paths]
        run, bits = networks.adopt_image_bits(candidates, run)
        run, padding = networks.adopt_box_padding(candidates, run, given=False)
        for line in (bits, padding):
            if line.startswith("warning: "):
                warnings.warn(line.removeprefix("warning: "), stacklevel=2)
        skeleton = networks.infer_weights_skeleton(candidates)
        run = run if skeleton.mirror_known else run.without_mirroring()
        built = [networks.build_network(one, run, skeleton, where, autocast)[0] for one in candidates]
        return cls(KeypointFinder(networks=built, skeleton=skeleton, run=run, device=where))

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the K keypoints."""
        return self.finder.skeleton.names

    @overload
    def __call__(self, image: list[Any] | tuple[Any, ...], boxes: GivenBoxes = None) -> list[PoseResult]: ...

    @overload
    def __call__(self, image: bytes | PIL.Image.Image | Array, boxes: GivenBoxes = None) -> PoseResult: ...

    @overload
    def __call__(self, image: str | Path, boxes: GivenBoxes = None) -> Any: ...

    def __call__(self, image: Any, boxes: GivenBoxes = None) -> PoseResult | list[PoseResult] | Iterator[PoseResult]:
        """The people of an image; of a list of images, a list; of a video, an iterator over its frames.

        Arrays are RGB. An array in OpenCV's BGR order cannot be told from one in RGB: convert it before
        (`image[..., ::-1]`), or its keypoints are less accurate without a message.

        Args:
            image: a path, the bytes of a file, a PIL image, an array of uint8 [h, w, 3] in RGB order; a list of these;
                or the path of a video, which is read in pieces of 64 frames.
            boxes: image, each image is one person (the default); detector, or the folder or Hub name of a detector
                of transformers: people are detected; or an array [N, 4] of x y width height in px of the image, of
                whom each is predicted, in this order. Of several images, a list of arrays.

        Returns:
            A `PoseResult` for each image. People of a detector are sorted by their scores, each person once. Those of
            a video have `track_ids`, and are smoothed over time with the option `smooth`.

        Raises:
            UserError: no such file, an image that does not decode or is of another type, boxes of another shape,
                without area or outside of their image; of a video also while it is read: it does not open, no frame
                of it decodes, or it ends before its last frame.
        """
        if isinstance(image, str | Path) and media.is_video(Path(image).expanduser()):
            if not isinstance(boxes, str | None):
                raise UserError("boxes: an array, for a video (expected 'image', 'detector' or the name of a detector)")
            return self._predict_video(Path(image).expanduser(), boxes)
        if not isinstance(image, list | tuple):
            of_images = boxes if isinstance(boxes, str | None) else [boxes]
            return self._predict([read_pixels(image)], [_name(image, 0)], of_images)[0]
        return self._predict(image, [_name(one, index) for index, one in enumerate(image)], boxes)

    def _predict_video(self, video: Path, boxes: str | None) -> Iterator[PoseResult]:
        num_frames, decoded = 0, media.decode_ahead(video)
        tracker = Tracker(self.finder.skeleton.sigmas, self.finder.run.eval)
        while frames := list(islice(decoded, FRAMES)):
            names = [media.frame_name(video, frame.number) for frame in frames]
            results = self._predict([frame.pixels for frame in frames], names, boxes)
            for frame, result in zip(frames, results, strict=True):
                yield self._track(tracker, result, frame.time)
            num_frames += len(frames)
        if line := media.describe_missing_frames(video, num_frames):
            raise UserError(line.removeprefix("warning: "))

    def _track(self, tracker: Tracker, result: PoseResult, time: float) -> PoseResult:
        people = tracker.update(result.to_people(), time)
        points_xy = np.array([person.points_xy for person in people]).reshape(result.keypoints.shape)
        track_ids = np.array([person.track_id for person in people], dtype=np.int64)
        return replace(result, keypoints=points_xy, track_ids=track_ids, time=time)

    def _predict(self, images: Sequence[Image], names: list[str], boxes: Any) -> list[PoseResult]:
        set_image_bits(self.finder.run.data.image_bits)
        sizes = [read_pixels(one, index).shape[:2] for index, one in enumerate(images)]
        piece = Piece(
            root=Path(), files=names, names=names, sizes=sizes, bad=[], pixels=lambda index: read_pixels(images[index]),
        )  # fmt: skip
        is_whole = isinstance(boxes, str | None) and boxes in (None, "image", WHOLE)
        if isinstance(boxes, str | None):
            people = self._find_people(piece, WHOLE if is_whole else str(boxes))
        else:
            people = self._find_each(piece, boxes)
        skeleton, detected = self.finder.skeleton, isinstance(boxes, str) and not is_whole
        category = category_name(skeleton)
        if detected and not skeleton.categories:
            category = self.finder.run.eval.detector_class
        return [self._to_result(*row, category) for row in zip(people, names, sizes, strict=True)]

    def _find_people(self, piece: Piece, boxes: str) -> list[list[Person]]:
        source = "whole images" if boxes == WHOLE else f"the detector {boxes}"
        detected = find_whole(piece) if boxes == WHOLE else self._detect(piece, boxes)
        collected, _ = collect_boxes(detected, piece, source)
        if not self._warned and (misfit := self.finder.describe_misfit(collected, piece)):
            self._warned = True
            warnings.warn(f"{misfit}. Give boxes as in training, or boxes='detector'", stacklevel=4)
        return self.finder.find_people(collected, len(piece.files))

    def _find_each(self, piece: Piece, boxes: Any) -> list[list[Person]]:
        """The people of boxes that are given, in their order."""
        if len(boxes) != len(piece.files):
            raise UserError(
                f"boxes: expected an array [N, 4] for each of {len(piece.files)} images, found {len(boxes)}"
            )
        rows = [_check_boxes(*row) for row in zip(boxes, piece.names, piece.sizes, strict=True)]
        collected, _ = collect_boxes([PersonBoxes(one, np.ones(len(one))) for one in rows], piece, "given boxes")
        people = self.finder.find_each(collected) if collected else []
        ends = np.cumsum([len(one) for one in rows]).tolist()
        return [people[end - len(one) : end] for one, end in zip(rows, ends, strict=True)]

    def _detect(self, piece: Piece, name: str) -> list[PersonBoxes]:
        detector, read = self._detector(DEFAULT if name == BY_DETECTOR else name), piece.pixels
        assert read is not None
        found: list[PersonBoxes] = []
        for first in range(0, len(piece.files), DETECTED_AT_ONCE):
            part = range(first, min(first + DETECTED_AT_ONCE, len(piece.files)))
            people = detector.find(prepare_batch(detector.processor, [read(index) for index in part]))
            found += [one or NOBODY for one in people]
        return found

    def _open_detector(self, name: str) -> Detector:
        if name != DEFAULT and "/" not in name and not Path(name).exists():
            raise UserError(
                f"boxes {name}: no such folder (expected 'image', 'detector', the folder or ORG/NAME of a detector, or "
                "an array [N, 4] of x y width height)"
            )
        options = self.finder.run.eval
        return Detector(name, self.finder.device, options.min_box_score, knob="boxes", classes=options.detector_class)

    def _to_result(self, people: list[Person], name: str, image_hw: tuple[int, int], category: str) -> PoseResult:
        num = self.finder.skeleton.num_keypoints
        outputs: dict[str, Any] = {}
        if any(network.visibility is not None for network in self.finder.networks):
            values = np.array([one.visibility for one in people]).reshape(-1, num, len(OUTPUTS))
            outputs = {name: values[..., index] for index, name in enumerate(OUTPUTS)}
        return PoseResult(
            keypoints=np.array([one.points_xy for one in people]).reshape(-1, num, 2),
            scores=np.array([one.scores for one in people]).reshape(-1, num),
            boxes=np.array([one.box_xywh for one in people]).reshape(-1, 4),
            names=self.names, category=category, person_scores=np.array([one.score for one in people]),
            box_scores=np.array([one.box_score for one in people]), image_name=name, image_hw=image_hw,
            threshold=self.finder.run.eval.score_threshold, skeleton=self.finder.skeleton, **outputs,
        )  # fmt: skip


# ---- What is given


def read_pixels(image: Any, index: int = 0) -> UInt8[Array, "h w 3"]:
    """The RGB pixels of an image in any of the forms that `PoseEstimator` takes.

    Args:
        index: of the image in a list, for messages.

    Raises:
        UserError: no such file, one that does not decode, or what is no image.
    """
    if isinstance(image, str | Path):
        return _read_file(Path(image).expanduser())
    if isinstance(image, bytes | bytearray | memoryview):
        try:
            return decode_image(bytes(image))
        except BadImageError as error:
            raise UserError(f"image {index}: its {len(image)} bytes are no image: it {error}") from None
    if isinstance(image, PIL.Image.Image):
        if image.mode not in PIL_MODES:
            raise UserError(
                f"image {index}: a PIL image of mode {image.mode} (expected one of 8 bits: {', '.join(PIL_MODES)}). "
                "Give its path, or convert it"
            )
        return np.asarray(PIL.ImageOps.exif_transpose(image).convert("RGB"))
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise UserError(
                f"image {index}: expected an array of uint8 [height, width, 3] in RGB order, found {image.dtype} "
                f"{list(image.shape)}{_fix_of_array(image)}"
            )
        return image
    raise UserError(f"image {index}: expected {IMAGE_FORMS}, found {type(image).__name__}")


def _fix_of_array(image: Array) -> str:
    if np.issubdtype(image.dtype, np.floating) and image.ndim == 3 and image.shape[2] == 3:
        return ". Convert values of 0 to 1 by (255 * image).round().astype('uint8')"
    return ". Give the images of a batch as a list" if image.ndim == 4 else ""


def _read_file(path: Path) -> UInt8[Array, "h w 3"]:
    if re.match(r"\w{2,}:/", str(path)):
        raise UserError(f"{path}: an address (expected {IMAGE_FORMS}). Download it, and give its path or its bytes")
    if media.is_video(path):
        raise UserError(f"{path}: a video in a list (expected images). Give a video alone")
    if path.is_dir():
        raise UserError(f"{path}: a folder (expected an image or a video). Give a list of its images")
    media.find_images(path)  # refuses what is not there, or no image by its name
    pixels = whole_image(path)
    if pixels is None:
        raise UserError(f"{path}: {describe_fault(path)}")
    return pixels


def _name(image: Any, index: int) -> str:
    return Path(image).name if isinstance(image, str | Path) else f"image_{index}"


def _check_boxes(boxes: Any, name: str, image_hw: tuple[int, int]) -> Float[Array, "n 4"]:
    """Boxes of an image as float64.

    Raises:
        UserError: they are not [N, 4] of numbers, or one is without area or outside of the image.
    """
    try:
        array = np.asarray(boxes, dtype=np.float64)
    except (TypeError, ValueError):
        raise UserError(f"boxes of {name}: expected an array [N, 4] of numbers, found {type(boxes).__name__}") from None
    if array.size == 0:
        return np.zeros((0, 4))
    if array.ndim != 2 or array.shape[1] != 4:
        hint = ". Write one box as [[x, y, width, height]]" if array.shape == (4,) else ""
        raise UserError(
            f"boxes of {name}: expected an array [N, 4] of x y width height, found {list(array.shape)}{hint}"
        )
    height, width = image_hw
    for number, (x, y, w, h) in enumerate(array.tolist()):
        shown = f"boxes of {name}: box {number}, {x:g} {y:g} {w:g} {h:g}"
        if not (np.isfinite(array[number]).all() and w > 0 and h > 0):
            raise UserError(f"{shown}, has no area (expected x y width height in px)")
        if x >= width or y >= height or x + w <= 0 or y + h <= 0:
            raise UserError(f"{shown}, is outside of the image of {_size(image_hw)} px (expected x y width height)")
    return array


def _size(shape: Sequence[int]) -> str:
    return f"{shape[1]}x{shape[0]}"


def _choose_autocast(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype | None:
    """The dtype of mixed precision; None is fp32.

    Raises:
        UserError: no such dtype, or not on this device.
    """
    name = "float32" if dtype is None else str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise UserError(f"dtype {name}: expected one of {', '.join(DTYPES)}")
    if name == "float16" and device.type == "cpu":
        raise UserError("dtype float16: not on a CPU (expected float32 or bfloat16)")
    if name == "bfloat16" and device.type == "cuda" and torch.cuda.get_device_capability(device) < BF16_CAPABILITY:
        raise UserError(f"dtype bfloat16: {torch.cuda.get_device_name(device)} has none (expected float16 or float32)")
    return DTYPES[name]
