"""Predictions as a CSV: a line for each keypoint, or the table that DeepLabCut writes, a line for each image.

`long` has a header and the columns COLUMNS. `deeplabcut` has three header rows (scorer, bodyparts, coords), for
`pandas.read_csv(FILE, header=[0, 1, 2], index_col=0)`, or four (individuals after scorer) where an image has several
people, as DeepLabCut's projects of several animals have; its rows are frames of a video, counted from 0, or images.

`long` also has OUTPUTS at its end where the weights have a visibility output.

Of a video, `long` has TRACK_COLUMNS too, and in `deeplabcut` a person keeps the same columns in all frames. Those of a
person who does not appear again are reused for the next new one.

x and y are px of the image, with the center of its first pixel at (0, 0).
"""

import contextlib
import csv
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float
from numpy import ndarray as Array

from sapiens_accel.errors import UserError
from sapiens_accel.visibility.output import OUTPUTS

CsvShape = Literal["long", "deeplabcut"]
COLUMNS = (
    "image", "frame", "image_id", "person", "annotation_id", "category", "person_score", "keypoint", "x", "y", "score",
)  # fmt: skip
TRACK_COLUMNS = ("time", "track_id")  # after COLUMNS, of a video
SCORER = "sapiens_accel"
ABSENT = "nan"  # pandas takes a first line of empty cells for the name of the index, and would lose a frame
Cell = str | int | float


class PersonRow(NamedTuple):
    """One predicted person.

    Attributes:
        score: of the person.
        annotation_id: of the labeled person whose box it is; "" for a detector's.
        track_id: of a video: the same number in all frames of a person.
        visibility: probabilities of OUTPUTS; None where the weights have none.
    """

    points_xy: Float[Array, "k 2"]
    scores: Float[Array, "k"]
    score: float
    category: str = ""
    annotation_id: Cell = ""
    track_id: int | None = None
    visibility: Float[Array, "k 2"] | None = None


class ImageRow(NamedTuple):
    """One image and its people, the surest first; of a video `frame`, from 0, and `time` when it is shown (s)."""

    image: str
    people: Sequence[PersonRow]
    image_id: Cell = ""
    frame: int | None = None
    time: float | None = None


class _WideRow(NamedTuple):
    """An image or frame, and of each person the identity and [K, 3] x, y, score."""

    name: Cell
    track_ids: list[int | None]
    people: list[Float[Array, "k 3"]]


class KeypointCsv:
    """A CSV that is written image by image, and appears under its name when it is closed.

    Args:
        is_video: rows have a time, and people a track_id.
        has_visibility: people have it.
    """

    def __init__(
        self,
        file: Path,
        keypoints: Sequence[str],
        shape: CsvShape,
        is_video: bool = False,
        has_visibility: bool = False,
    ) -> None:
        self.file, self.keypoints, self.shape = file, keypoints, shape
        self._part = file.with_name(f".{file.name}.part")
        self._wide: list[_WideRow] = []
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._stream = self._part.open("w", newline="", encoding="utf-8")
        except OSError as error:
            raise UserError(f"--eval.csv: {file}: not written: {error.strerror}") from None
        self._write = csv.writer(self._stream, lineterminator="\n").writerow
        if shape == "long":
            self._write(_long_header(is_video, has_visibility))

    def add(self, row: ImageRow) -> None:
        """Add an image and its people.

        Raises:
            UserError: it cannot be written; what was written is removed.
        """
        if self.shape == "long":
            with self._naming_errors():
                for line in _long_lines(row, self.keypoints):
                    self._write(line)
            return
        # How many people there are at most is known at the end alone, and it is the width of the table.
        self._wide.append(_wide_row(row))

    def close(self) -> Path:
        """Write the rest, and give the file its name.

        Raises:
            UserError: it cannot be written; what was written is removed.
        """
        with self._naming_errors():
            for line in _wide_lines(self._wide, self.keypoints) if self.shape == "deeplabcut" else ():
                self._write(line)
            self._stream.close()
            self._part.replace(self.file)
        return self.file

    def discard(self) -> None:
        """Remove what was written: there will be no file."""
        with contextlib.suppress(OSError):  # of a full disk, on which closing fails as well
            self._stream.close()
        with contextlib.suppress(OSError):
            self._part.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _naming_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.discard()
            raise UserError(f"--eval.csv: {self.file}: not written: {error.strerror}") from None


def write_csv(file: Path, keypoints: Sequence[str], shape: CsvShape, rows: Iterable[ImageRow]) -> Path:
    """Write a whole CSV at once.

    Raises:
        UserError: it cannot be written.
    """
    rows = list(rows)
    table = KeypointCsv(file, keypoints, shape, has_visibility=_have_visibility(rows))
    try:
        for row in rows:
            table.add(row)
        return table.close()
    except BaseException:
        table.discard()
        raise


def format_csv(
    keypoints: Sequence[str], shape: CsvShape, rows: Sequence[ImageRow], has_visibility: bool = False
) -> str:
    """The text of a whole CSV."""
    text = io.StringIO()
    write = csv.writer(text, lineterminator="\n").writerows
    if shape == "long":
        header = _long_header(any(row.time is not None for row in rows), has_visibility)
        write([header, *(line for row in rows for line in _long_lines(row, keypoints))])
    else:
        write(_wide_lines([_wide_row(row) for row in rows], keypoints))
    return text.getvalue()


def _wide_row(row: ImageRow) -> _WideRow:
    name = row.image if row.frame is None else row.frame
    return _WideRow(name, [person.track_id for person in row.people], [_coordinates(person) for person in row.people])


def _wide_lines(rows: Sequence[_WideRow], keypoints: Sequence[str]) -> Iterator[list[Cell]]:
    place_of = _assign_places(rows)
    most = max((_place(row, number, place_of) + 1 for row in rows for number in range(len(row.people))), default=1)
    individuals = [f"individual{number}" for number in range(1, most + 1)]
    cells = [(one, keypoint, part) for one in individuals for keypoint in keypoints for part in "xyp"]
    yield ["scorer", *[SCORER] * len(cells)]
    if most > 1:
        yield ["individuals", *(one for one, _, _ in cells)]
    yield ["bodyparts", *(keypoint for _, keypoint, _ in cells)]
    yield ["coords", *({"p": "likelihood"}.get(part, part) for _, _, part in cells)]
    for row in rows:
        at_place = {_place(row, number, place_of): person for number, person in enumerate(row.people)}
        absent: list[Cell] = [ABSENT] * (3 * len(keypoints))
        people = (at_place[place].ravel().tolist() if place in at_place else absent for place in range(most))
        yield [row.name, *(cell for person in people for cell in person)]


def _place(row: _WideRow, number: int, place_of: Mapping[int, int]) -> int:
    """Which individual a person of a row is; without identities the first person is the first individual."""
    track_id = row.track_ids[number]
    return number if track_id is None else place_of[track_id]


def _assign_places(rows: Sequence[_WideRow]) -> dict[int, int]:
    """The individual of each track: the first one whose track before has ended."""
    last_row = {key: index for index, row in enumerate(rows) for key in row.track_ids if key is not None}
    place_of: dict[int, int] = {}
    busy_until: list[int] = []  # the last row of each individual's track
    for index, row in enumerate(rows):
        for key in sorted(one for one in row.track_ids if one is not None and one not in place_of):
            place = next((place for place, last in enumerate(busy_until) if last < index), len(busy_until))
            busy_until[place : place + 1] = [last_row[key]]
            place_of[key] = place
    return place_of


def _have_visibility(rows: Sequence[ImageRow]) -> bool:
    return any(person.visibility is not None for row in rows for person in row.people)


def _long_header(is_video: bool, has_visibility: bool) -> tuple[str, ...]:
    return COLUMNS + TRACK_COLUMNS * is_video + OUTPUTS * has_visibility


def _long_lines(row: ImageRow, keypoints: Sequence[str]) -> Iterable[list[Cell]]:
    frame: Cell = "" if row.frame is None else row.frame
    for number, person in enumerate(row.people, start=1):
        about: list[Cell] = [number, person.annotation_id, person.category, round(person.score, 5)]
        end: list[Cell] = []
        if row.time is not None:
            end = [round(row.time, 6), "" if person.track_id is None else person.track_id]
        outputs: list[list[float]] = [[]] * len(keypoints)
        if person.visibility is not None:
            outputs = person.visibility.astype(np.float64).round(5).tolist()
        for keypoint, cells, last in zip(keypoints, _coordinates(person).tolist(), outputs, strict=True):
            yield [row.image, frame, row.image_id, *about, keypoint, *cells, *end, *last]


def _coordinates(person: PersonRow) -> Float[Array, "k 3"]:
    """x, y and score of each keypoint."""
    return np.column_stack([person.points_xy.round(3), person.scores.round(5)])
