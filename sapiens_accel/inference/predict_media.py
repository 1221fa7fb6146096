"""Weights and a user's own images or video to keypoints, drawn and as COCO JSON: eval.py WEIGHTS --images PATH.

    images -> where people are (a file, a detector, the whole image) -> predict -> OKS-NMS -> keypoints.json, drawn

A video goes through in pieces of some frames, so that its length takes no memory; a thread decodes the next ones. Its
people keep their identities from frame to frame (`tracking`).
"""

import shutil
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from sapiens_accel.config.schema import Config, EvalConfig
from sapiens_accel.data.detections import NOBODY, BoxesFile, PersonBoxes
from sapiens_accel.errors import UserError
from sapiens_accel.evaluation import networks as candidates
from sapiens_accel.evaluation.boxes import GROUND_TRUTH
from sapiens_accel.evaluation.evaluate import processes_of
from sapiens_accel.evaluation.networks import Candidate
from sapiens_accel.inference import media
from sapiens_accel.inference.detector import DEFAULT, Detector
from sapiens_accel.inference.keypoints import KeypointFinder, collect_boxes, find_whole
from sapiens_accel.inference.outputs import HAS_VISIBILITY, MediaWriter, Piece, category_name, choose_folder
from sapiens_accel.inference.tracking import Tracker
from sapiens_accel.pose.skeleton import Skeleton
from sapiens_accel.runtime import failures
from sapiens_accel.sources.images import describe_bits, describe_fault, set_image_bits

FRAMES = 64  # of a video, at a time
WHOLE, BY_DETECTOR = "whole", "detector"
DETECTED_AT_ONCE = 8
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class PeopleFinder:
    """Where people are in images.

    Attributes:
        find: the people of each image of a piece.
        about: who finds them, in words.
        categories: of those who are found, names by their ids.
        is_file: whether they are the boxes of a file, so that nobody is an error.
    """

    find: Callable[[Piece], list[PersonBoxes]]
    about: str
    categories: Mapping[Any, str]
    is_file: bool = False


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is the same for all pieces: who finds people, and their keypoints."""

    path: Path
    finder: PeopleFinder
    keypoints: KeypointFinder


def predict_media(accelerator: Accelerator, weights_list: Sequence[Candidate], run: Config) -> None:
    """Find everybody's keypoints in `run.eval.images` with each run's last stage, each weights, or all as one.

    All ranks must call it; rank 0 writes FOLDER/images/NAME/keypoints.json and, beside it, drawn/ or drawn.mp4.

    Raises:
        UserError: what is wrong with the images, the boxes, the detector or the weights.
    """
    evaluation, path = run.eval, Path(str(run.eval.images)).expanduser()
    if evaluation.compare:
        raise UserError("--eval.compare: with --images nothing is measured; drop one of them")
    if evaluation.smooth and path.exists() and not media.is_video(path):
        raise UserError(f"--eval.smooth: {path} is no video (expected one, whose keypoints are smoothed over time)")
    if evaluation.save_predictions:
        raise UserError("--eval.save_predictions: --images writes keypoints.json beside the images; drop one of them")
    groups = _groups(weights_list, evaluation)
    # Read before weights are, which may take minutes.
    set_image_bits(run.data.image_bits)
    names, note = _names(path)
    root = path.parent if path.is_file() else path
    for line in filter(None, (note, "" if media.is_video(path) else describe_bits(root, names))):
        accelerator.print(line)
    skeleton = candidates.infer_weights_skeleton(weights_list)
    run = run if skeleton.mirror_known else run.without_mirroring()
    finder = _choose_finder(accelerator, run, names, skeleton)
    for group in groups:
        networks = candidates.build_networks(accelerator, group, run, skeleton)
        keypoints = KeypointFinder(
            networks=networks, skeleton=skeleton, run=run, device=accelerator.device,
            processes=processes_of(accelerator),
        )  # fmt: skip
        task = Task(path=path, finder=finder, keypoints=keypoints)
        folder = group[0].folder / "images" / (path.stem if path.is_file() else path.resolve().name)
        free = broadcast_object_list([choose_folder(folder, path)])[0]
        if free != folder:
            accelerator.print(f"{folder}: has results of other images than {path}; these are written to {free}")
        _predict_pieces(accelerator, task, free, " and ".join(str(one.weights) for one in group))


def _groups(weights_list: Sequence[Candidate], evaluation: EvalConfig) -> list[list[Candidate]]:
    """All weights as one, or each by itself; of the stages of a run, the last."""
    if evaluation.ensemble:
        return [list(weights_list)]
    # Of a run folder they are RUN_DIR/STAGE/weights, each named by its stage; weights that were named stay.
    last = {
        one.weights.parent.parent if one.weights.parent.name == one.name else one.weights: one for one in weights_list
    }
    folders = [one.folder for one in last.values()]
    if len(set(folders)) < len(folders):
        raise UserError(f"--images: results of several weights would all be in {folders[0]}; give one, or --ensemble")
    return [[one] for one in last.values()]


def _names(path: Path) -> tuple[list[str], str]:
    """The names of all images, of a video's frames as many as it says to have; and what is left out, in a line."""
    if not media.is_video(path):
        images = media.find_images(path)
        return images.names, images.note
    return [media.frame_name(path, index) for index in range(media.video_length(path)[0])], ""


# ---- Where people are


def _choose_finder(accelerator: Accelerator, run: Config, names: Sequence[str], skeleton: Skeleton) -> PeopleFinder:
    given, min_score, kind = run.eval.boxes, run.eval.min_box_score, category_name(skeleton)
    if given in (GROUND_TRUTH, WHOLE):
        return PeopleFinder(find=find_whole, about="whole images", categories={1: kind})
    if given.endswith(".json") or Path(given).is_file():
        file = BoxesFile(Path(given), names, min_score, skeleton, (run.data.boxes, run.data.box_margin))
        if file.note:
            accelerator.print(file.note)
        return PeopleFinder(
            find=lambda piece: [file.of(name) for name in piece.names], about=f"of {given}", categories=file.categories,
            is_file=True,
        )  # fmt: skip
    name, classes = DEFAULT if given == BY_DETECTOR else given, run.eval.detector_class
    detector = failures.on_main_first(
        accelerator, lambda: Detector(name, accelerator.device, min_score, knob="--eval.boxes", classes=classes)
    )
    find = partial(_detected, accelerator, detector, run.data.num_workers)
    kind = kind if skeleton.categories else classes
    return PeopleFinder(find=find, about=f"of the detector {name}", categories={1: kind})


def _detected(accelerator: Accelerator, detector: Detector, num_workers: int, piece: Piece) -> list[PersonBoxes]:
    def scan(files: Sequence[str]) -> list[PersonBoxes]:
        batches = detector.scan(piece.root, files, DETECTED_AT_ONCE, num_workers)
        return [people or NOBODY for batch in batches for people in batch]

    return _shared_out(accelerator, piece.files, scan)


def _shared_out(
    accelerator: Accelerator, items: Sequence[Item], process: Callable[[Sequence[Item]], list[Result]]
) -> list[Result]:
    """Each rank processes its part of the items; all return the results of all, in order."""
    mine = range(accelerator.process_index, len(items), accelerator.num_processes)
    pairs = list(zip(mine, process([items[index] for index in mine]), strict=True))
    return [result for _, result in sorted(gather_object(pairs), key=lambda pair: pair[0])]


# ---- Pieces


class _SavedFrame(NamedTuple):
    """A frame that is an image in the scratch folder."""

    number: int
    time: float
    size_hw: tuple[int, int]


def _pieces(accelerator: Accelerator, path: Path, scratch: Path) -> Iterator[Piece]:
    """All images of a folder at once, a video's frames some at a time, as images in `scratch`."""
    if not media.is_video(path):
        images = media.find_images(path)
        yield _piece_of_images(accelerator, images.root, images.names)
        return
    # Every rank reads them from there: rank 0 alone decodes, and an image without loss is the frame.
    frames: Iterator[_SavedFrame] = iter(())
    if accelerator.is_main_process:
        frames = media.read_ahead(_save_frames(path, scratch), FRAMES)
    try:
        while piece_frames := broadcast_object_list([list(islice(frames, FRAMES))])[0]:
            piece = _piece_of_frames(path, scratch, piece_frames)
            yield piece
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                for file in piece.files:
                    (scratch / file).unlink()
    finally:
        if isinstance(frames, Generator):
            frames.close()  # ends the thread, which writes into the folder
        if accelerator.is_main_process:
            shutil.rmtree(scratch, ignore_errors=True)


def _save_frames(path: Path, scratch: Path) -> Generator[_SavedFrame]:
    for frame in media.read_frames(path):
        media.save_image(frame.pixels, scratch / media.frame_name(path, frame.number, ".png"))
        height, width, _ = frame.pixels.shape
        yield _SavedFrame(frame.number, frame.time, (height, width))


def _piece_of_frames(path: Path, scratch: Path, frames: Sequence[_SavedFrame]) -> Piece:
    return Piece(
        root=scratch,
        files=[media.frame_name(path, frame.number, ".png") for frame in frames],
        names=[media.frame_name(path, frame.number) for frame in frames],
        sizes=[frame.size_hw for frame in frames],
        bad=[],
        times=[frame.time for frame in frames],
    )


def _piece_of_images(accelerator: Accelerator, root: Path, names: Sequence[str]) -> Piece:
    sizes = _shared_out(accelerator, names, partial(media.read_sizes, root))
    rows = list(zip(names, sizes, strict=True))
    read = [name for name, size in rows if size is not None]
    return Piece(
        root=root,
        files=read,
        names=read,
        sizes=[size for size in sizes if size is not None],
        bad=[name for name, size in rows if size is None],
    )


def _predict_pieces(accelerator: Accelerator, task: Task, folder: Path, weights: str) -> None:
    evaluation = task.keypoints.run.eval
    about: dict[str, Any] = {
        "weights": weights,
        "boxes": task.finder.about,
        "flip": evaluation.flip,
        "scales": list(evaluation.scales),
    }
    if any(network.visibility is not None for network in task.keypoints.networks):
        about[HAS_VISIBILITY] = True
    writer = None
    if accelerator.is_main_process:
        writer = MediaWriter(task.path, folder, task.keypoints.skeleton, evaluation, about, task.finder.categories)
    try:
        _add_pieces(accelerator, task, folder, writer)
        if writer is not None:
            print(writer.close())
    except BaseException:
        if writer is not None:
            writer.discard()
        raise


def _add_pieces(accelerator: Accelerator, task: Task, folder: Path, writer: MediaWriter | None) -> None:
    """Give the writer, which rank 0 has, the people of all pieces; report what is left out.

    Raises:
        UserError: no image can be used, or all boxes of a file are left out.
    """
    finder, keypoints = task.finder, task.keypoints
    num_images = num_outside = num_boxes = num_people = 0
    misfit = ""
    tracker = Tracker(keypoints.skeleton.sigmas, keypoints.run.eval) if media.is_video(task.path) else None
    for piece in _pieces(accelerator, task.path, folder / ".frames"):
        num_images += len(piece.files)
        for name in piece.bad:
            accelerator.print(f"skipped: {task.path / name} {describe_fault(task.path / name)}")
        boxes, outside = collect_boxes(finder.find(piece), piece, finder.about, next(iter(finder.categories)))
        num_outside += outside
        if not misfit and (misfit := keypoints.describe_misfit(boxes, piece)):
            fix = "Give boxes as in training: --boxes detector, or a JSON of boxes"
            accelerator.print(f"warning: {misfit}. {fix}")
        people = keypoints.find_people(boxes, len(piece.files))
        if tracker is not None and piece.times is not None:
            people = [tracker.update(*row) for row in zip(people, piece.times, strict=True)]
        num_boxes += len(boxes) if boxes is not None else 0
        num_people += sum(map(len, people))
        if writer is not None:
            writer.add(piece, people)
    if not num_images:
        raise UserError(f"{task.path}: none of its images can be used")
    if media.is_video(task.path) and (line := media.describe_missing_frames(task.path, num_images)):
        accelerator.print(line)
    if num_outside:
        accelerator.print(f"{num_outside} boxes {finder.about} are left out: nothing of them is in their image")
    if num_boxes > num_people:
        accelerator.print(
            f"{num_boxes - num_people} of {num_boxes} boxes are left out: their people are those of others "
            f"(OKS above --eval.nms_threshold {keypoints.run.eval.nms_threshold:g})"
        )
    if finder.is_file and not num_people:
        raise UserError(
            f"--eval.boxes {keypoints.run.eval.boxes}: none of its boxes is in one of the {num_images} images of "
            f"{task.path} that can be read. To take each image as one person, --eval.boxes whole"
        )
