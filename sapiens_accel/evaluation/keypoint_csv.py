"""Predictions as a CSV: a line for each keypoint, or the table that DeepLabCut writes, a line for each image.

`long` has a header and the columns COLUMNS. `deeplabcut` has three header rows (scorer, bodyparts, coords), for
`pandas.read_csv(FILE, header=[0, 1, 2], index_col=0)`, or four (individuals after scorer) where an image has several
people, as DeepLabCut's projects of several animals have; its rows are frames of a video, counted from 0, or images.

x and y are px of the image, with the center of its first pixel at (0, 0).
"""

import contextlib
import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float
from numpy import ndarray as Array

from sapiens_accel.errors import UserError

CsvShape = Literal["long", "deeplabcut"]
COLUMNS = (
    "image", "frame", "image_id", "person", "annotation_id", "category", "person_score", "keypoint", "x", "y", "score",
)  # fmt: skip
SCORER = "sapiens_accel"
ABSENT = "nan"  # pandas takes a first line of empty cells for the name of the index, and would lose a frame
Cell = str | int | float
WideRow = tuple[Cell, list[list[Cell]]]  # an image or frame, and x, y, score of each person's keypoints


class PersonRow(NamedTuple):
    """One predicted person.

    Attributes:
        score: of the person.
        annotation_id: of the labeled person whose box it is; "" for a detector's.
    """

    points_xy: Float[Array, "k 2"]
    scores: Float[Array, "k"]
    score: float
    category: str = ""
    annotation_id: Cell = ""


class ImageRow(NamedTuple):
    """One image and its people, the surest first; `frame` is that of a video, from 0."""

    image: str
    people: Sequence[PersonRow]
    image_id: Cell = ""
    frame: int | None = None


class KeypointCsv:
    """A CSV that is written image by image, and appears under its name when it is closed."""

    def __init__(self, file: Path, keypoints: Sequence[str], shape: CsvShape) -> None:
        self.file, self.keypoints, self.shape = file, keypoints, shape
        self._part = file.with_name(f".{file.name}.part")
        self._wide: list[WideRow] = []
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._stream = self._part.open("w", newline="", encoding="utf-8")
        except OSError as error:
            raise UserError(f"--eval.csv: {file}: not written: {error.strerror}") from None
        self._write = csv.writer(self._stream, lineterminator="\n").writerow
        if shape == "long":
            self._write(COLUMNS)

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
    table = KeypointCsv(file, keypoints, shape)
    try:
        for row in rows:
            table.add(row)
        return table.close()
    except BaseException:
        table.discard()
        raise


def format_csv(keypoints: Sequence[str], shape: CsvShape, rows: Sequence[ImageRow]) -> str:
    """The text of a whole CSV."""
    text = io.StringIO()
    write = csv.writer(text, lineterminator="\n").writerows
    if shape == "long":
        write([COLUMNS, *(line for row in rows for line in _long_lines(row, keypoints))])
    else:
        write(_wide_lines([_wide_row(row) for row in rows], keypoints))
    return text.getvalue()


def _wide_row(row: ImageRow) -> WideRow:
    return row.image if row.frame is None else row.frame, [_coordinates(person) for person in row.people]


def _wide_lines(rows: Sequence[WideRow], keypoints: Sequence[str]) -> Iterator[list[Cell]]:
    most = max((len(people) for _, people in rows), default=1) or 1
    individuals = [f"individual{number}" for number in range(1, most + 1)]
    cells = [(one, keypoint, part) for one in individuals for keypoint in keypoints for part in "xyp"]
    yield ["scorer", *[SCORER] * len(cells)]
    if most > 1:
        yield ["individuals", *(one for one, _, _ in cells)]
    yield ["bodyparts", *(keypoint for _, keypoint, _ in cells)]
    yield ["coords", *({"p": "likelihood"}.get(part, part) for _, _, part in cells)]
    for name, people in rows:
        absent: list[Cell] = [ABSENT] * (len(cells) - sum(map(len, people)))
        yield [name, *(cell for person in people for cell in person), *absent]


def _long_lines(row: ImageRow, keypoints: Sequence[str]) -> Iterable[list[Cell]]:
    frame: Cell = "" if row.frame is None else row.frame
    for number, person in enumerate(row.people, start=1):
        cells = _coordinates(person)
        about: list[Cell] = [number, person.annotation_id, person.category, round(person.score, 5)]
        for k, keypoint in enumerate(keypoints):
            yield [row.image, frame, row.image_id, *about, keypoint, *cells[3 * k : 3 * k + 3]]


def _coordinates(person: PersonRow) -> list[Cell]:
    """x, y and score of each keypoint."""
    rounded = np.column_stack([person.points_xy.round(3), person.scores.round(5)])
    return rounded.ravel().tolist()
