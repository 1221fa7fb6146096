"""What was found in a user's own images: keypoints.json, and everybody drawn, image by image or as a video."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
from jaxtyping import Float, UInt8
from numpy import ndarray as Array

from sapiens_accel.config.schema import EvalConfig
from sapiens_accel.errors import count
from sapiens_accel.evaluation.keypoint_csv import ImageRow, KeypointCsv, PersonRow
from sapiens_accel.inference import media
from sapiens_accel.inference.media import Film
from sapiens_accel.pose import draw
from sapiens_accel.pose.skeleton import Skeleton
from sapiens_accel.sources.images import read_image
from sapiens_accel.visibility.output import name_columns

LABELED = 2  # COCO's v of a keypoint that is there
HAS_VISIBILITY = "visibility"  # in the JSON's info


def choose_folder(folder: Path, path: Path) -> Path:
    """The folder for the results of these images: NAME, or the first of NAME.1, ... that is free or of the same images.

    Of which images a folder is, is in the first line of its keypoints.json; without one it counts as of others.
    """
    number, free = 0, folder
    while free.exists() and _read_origin(free / "keypoints.json") != str(path.resolve()):
        number += 1
        free = folder.with_name(f"{folder.name}.{number}")
    return free


def _read_origin(file: Path) -> str | None:
    """What was predicted in the file; None where there is no such file, or it does not say."""
    try:
        with file.open(encoding="utf-8") as stream:
            return json.loads(stream.readline().rstrip(",\n") + "}")["info"]["pictures"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


class Person(NamedTuple):
    """A person of an image, in px of the image; `score` is the box's times the mean of keypoint scores.

    Attributes:
        track_id: of a video: the same number in all frames of a person, from 1.
        visibility: the probabilities that each keypoint is present and that it is visible; None where the weights have
            no such output.
    """

    points_xy: Float[Array, "k 2"]
    scores: Float[Array, "k"]
    score: float
    box_xywh: Float[Array, "4"]
    box_score: float
    category_id: Any = 1
    track_id: int | None = None
    visibility: Float[Array, "k 2"] | None = None

    def to_row(self, category: str) -> PersonRow:
        """The person for a CSV."""
        return PersonRow(
            self.points_xy, self.scores, self.score, category, track_id=self.track_id, visibility=self.visibility
        )


def category_name(skeleton: Skeleton) -> str:
    """What the weights were trained on: the name of their category, `person` by default, or several names as one."""
    return " or ".join(skeleton.categories) or "person"


def to_categories(skeleton: Skeleton, categories: Mapping[Any, str]) -> list[dict[str, Any]]:
    """COCO's `categories`, from names by their ids."""
    edges = [[a + 1, b + 1] for a, b in skeleton.edges]  # COCO counts keypoints from 1
    return [
        {"id": key, "name": name, "keypoints": list(skeleton.names), "skeleton": edges}
        | ({"supercategory": "person"} if name == "person" else {})
        for key, name in categories.items()
    ]


def to_image(name: str, size_hw: tuple[int, int], time: float | None = None) -> dict[str, Any]:
    """An entry of COCO's `images` without its id; of a video with `time`, when the frame is shown (s)."""
    height, width = size_hw
    shown = {} if time is None else {"time": round(time, 6)}
    return {"file_name": name, "width": width, "height": height, **shown}


def to_annotation(person: Person, threshold: float) -> dict[str, Any]:
    """A COCO annotation without its ids: v of a keypoint is 2 where its score is above the threshold, else 0."""
    shown = np.where(person.scores > threshold, LABELED, 0)
    points = [
        number
        for (x, y), v in zip(person.points_xy.round(4).tolist(), shown.tolist(), strict=True)
        for number in (x, y, v)
    ]
    track = {} if person.track_id is None else {"track_id": person.track_id}
    return {
        **track,
        "category_id": person.category_id,
        "iscrowd": 0,
        "bbox": person.box_xywh.round(2).tolist(),
        "area": round(float(person.box_xywh[2:].prod()), 2),
        "num_keypoints": int((shown > 0).sum()),
        "keypoints": points,
        "keypoint_scores": person.scores.round(4).tolist(),
        **name_columns(person.visibility),
        "score": round(person.score, 5),
        "box_score": round(person.box_score, 5),
    }


class KeypointsWriter:
    """A COCO annotation file that is written image by image, and appears under its name when it is whole.

    `keypoints` are COCO's x, y, v: v is 2 where a keypoint's score is above the threshold, else 0, and then x and
    y are a guess. The scores themselves are `keypoint_scores`, one each.
    """

    def __init__(
        self,
        file: Path,
        skeleton: Skeleton,
        threshold: float,
        info: dict[str, Any],
        categories: Mapping[Any, str] | None = None,
    ) -> None:
        self.file, self.threshold = file, threshold
        self._part = file.with_name(f".{file.name}.part")
        self._images: list[str] = []  # as JSON: of a long video, dictionaries would take several times the memory
        self._num = 0
        self._stream: TextIO | None = None  # nothing is written before there is something
        kinds = to_categories(skeleton, categories or {1: category_name(skeleton)})
        third = f"v: 2 where the score is above {threshold:g}, else 0"
        about = {**info, "keypoints": f"x, y (px), {third}; keypoint_scores: of each keypoint"}
        if info.get(HAS_VISIBILITY):
            about[HAS_VISIBILITY] = "keypoint_present, keypoint_visible: probabilities of v > 0 and of v = 2"
        self._head = f'{{"info": {json.dumps(about)},\n"categories": {json.dumps(kinds)},\n"annotations": ['

    def add(self, name: str, size_hw: tuple[int, int], people: Sequence[Person], time: float | None = None) -> None:
        """An image and its people; of a video, a frame and when it is shown (s)."""
        number = len(self._images) + 1
        self._images.append(json.dumps({"id": number, **to_image(name, size_hw, time)}))
        for person in people:
            self._written.write(",\n" if self._num else "\n")
            self._num += 1
            annotation = to_annotation(person, self.threshold)
            self._written.write(json.dumps({"id": self._num, "image_id": number, **annotation}))

    @property
    def num_images(self) -> int:
        """How many images were added; the id of the last one."""
        return len(self._images)

    @property
    def _written(self) -> TextIO:
        if self._stream is None:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self._stream = self._part.open("w")
            self._stream.write(self._head)
        return self._stream

    def close(self) -> None:
        """Write the rest, and give the file its name."""
        self._written.write('],\n"images": [')
        for index, image in enumerate(self._images):
            self._written.write(f", {image}" if index else image)
        self._written.write("]}\n")
        self._written.close()
        self._part.replace(self.file)

    def discard(self) -> None:
        """Leave nothing of a file that is not whole."""
        if self._stream is not None:
            self._stream.close()
            self._part.unlink(missing_ok=True)


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Images that decode.

    Attributes:
        root: the folder of `files`.
        names: what they are called in results.
        sizes: (height, width), px.
        bad: names of images that do not decode.
        pixels: the image of an index, RGB, where images are not files.
        times: of frames of a video, when each is shown (s).
    """

    root: Path
    files: list[str]
    names: list[str]
    sizes: list[tuple[int, int]]
    bad: list[str]
    pixels: Callable[[int], UInt8[Array, "h w 3"]] | None = None
    times: Sequence[float] | None = None


class MediaWriter:
    """FOLDER/keypoints.json, and drawn/ (the images by their names) or, of a video, drawn.mp4. Of one process alone.

    Args:
        path: what was asked for.
        about: noted in the JSON: how people were detected.
        categories: of people, names by their ids; default: 1, that of the weights.
    """

    def __init__(
        self,
        path: Path,
        folder: Path,
        skeleton: Skeleton,
        evaluation: EvalConfig,
        about: dict[str, Any],
        categories: Mapping[Any, str] | None = None,
    ) -> None:
        self.categories = categories or {1: category_name(skeleton)}
        self.path, self.folder, self.skeleton, self.about = path, folder, skeleton, about
        self.draws, self.threshold = evaluation.num_pictures > 0, evaluation.score_threshold
        is_video = media.is_video(path)
        self.film = Film(folder / "drawn.mp4", media.video_length(path)[1]) if is_video else None
        self.file = KeypointsWriter(
            folder / "keypoints.json",
            skeleton,
            self.threshold,
            {**about, "pictures": str(path.resolve())},
            self.categories,
        )
        self.table = self._open_table(evaluation) if evaluation.csv else None
        self.num_images, self.num_people, self.num_bad = 0, 0, 0
        self.num_keypoints, self.num_drawn = 0, 0
        self.track_ids: set[int] = set()

    def _open_table(self, evaluation: EvalConfig) -> KeypointCsv:
        assert evaluation.csv is not None
        is_video = self.film is not None
        file, names = self.folder / "keypoints.csv", self.skeleton.names
        return KeypointCsv(file, names, evaluation.csv, is_video, HAS_VISIBILITY in self.about)

    def add(self, piece: Piece, everybody: Sequence[Sequence[Person]]) -> None:
        """The people of each image of a piece."""
        self.num_images += len(piece.files)
        self.num_people += sum(map(len, everybody))
        self.track_ids |= {one.track_id for people in everybody for one in people if one.track_id is not None}
        self.num_bad += len(piece.bad)
        for index, (name, people) in enumerate(zip(piece.names, everybody, strict=True)):
            time = piece.times[index] if piece.times is not None else None
            self.file.add(name, piece.sizes[index], people, time)
            if self.table is not None:
                self.table.add(self._table_row(name, people, time))
            if self.draws:
                read = piece.pixels
                self._draw(read_image(piece.root / piece.files[index]) if read is None else read(index), name, people)

    def _table_row(self, name: str, people: Sequence[Person], time: float | None) -> ImageRow:
        rows = [one.to_row(self.categories[one.category_id]) for one in people]
        if self.film is None:
            return ImageRow(name, rows, self.file.num_images)
        return ImageRow(self.path.name, rows, self.file.num_images, frame=media.frame_index(name), time=time)

    def _draw(self, image: UInt8[Array, "h w 3"], name: str, people: Sequence[Person]) -> None:
        if people:
            points_xy = np.stack([person.points_xy for person in people])
            shown = np.stack([person.scores for person in people]) > self.threshold
            self.num_keypoints += shown.size
            self.num_drawn += int(shown.sum())
            tracks = [person.track_id for person in people if person.track_id is not None]
            image = draw.draw_people(image, points_xy, shown, self.skeleton, tracks or None)
        if self.film is not None:
            self.film.add(image)
        else:
            media.save_image(image, self.folder / "drawn" / name)

    def discard(self) -> None:
        """Leave no file that is not whole; drawn images stay."""
        for part in (self.file, self.table, self.film):
            if part is not None:
                part.discard()

    def close(self) -> str:
        """Finish the files, and return a line of what was found and the files' paths."""
        self.file.close()
        files = [str(self.file.file)]
        if self.table is not None:
            files.append(str(self.table.close()))
        if self.draws and self.film is not None:
            self.film.close()
            files.append(str(self.film.path))
        elif self.draws:
            files.append(str(self.folder / "drawn"))
        bad = f", {self.num_bad} skipped" if self.num_bad else ""
        images = count(self.num_images, "frame" if self.film is not None else "image")
        counted = f"{self.num_people} {'person' if self.num_people == 1 else 'people'} in {images} of {self.path}{bad}"
        if self.film is not None:  # the same person in two frames is two people of one identity
            num = len(self.track_ids)
            counted += f", {num} {'identity' if num == 1 else 'identities'}"
        if self.draws:
            files.append(
                f"of {self.num_keypoints} keypoints {self.num_drawn} are drawn (score above {self.threshold:g}, "
                f"--eval.score_threshold)"
            )
        return "\n  ".join([f"\n{counted}; boxes: {self.about['boxes']}", *files])
