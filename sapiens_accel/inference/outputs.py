"""What was found in a user's own pictures: keypoints.json, and everybody drawn, picture by picture or as a video."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sapiens_accel.config.parse import EvalConfig
from sapiens_accel.inference import media as pictures
from sapiens_accel.inference.keypoints_json import KeypointsFile, Person
from sapiens_accel.inference.media import Film
from sapiens_accel.pose import draw
from sapiens_accel.pose.skeleton import Skeleton
from sapiens_accel.sources.images import read_image


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Pictures that decode: `files` in `root`, the names they go by, (height, width); `bad` are those that do not."""

    root: Path
    files: list[str]
    names: list[str]
    sizes: list[tuple[int, int]]
    bad: list[str]


class Gallery:
    """FOLDER/keypoints.json, and drawn/ (the pictures by their names) or, of a video, drawn.mp4. Of one process alone.

    Args:
        path: what was asked for.
        about: noted in the JSON: how people were looked for.
    """

    def __init__(
        self, path: Path, folder: Path, skeleton: Skeleton, evaluation: EvalConfig, about: dict[str, Any]
    ) -> None:
        self.path, self.folder, self.skeleton, self.about = path, folder, skeleton, about
        self.draws, self.threshold = evaluation.num_pictures > 0, evaluation.score_threshold
        is_video = pictures.is_video(path)
        self.film = Film(folder / "drawn.mp4", pictures.length(path)[1]) if is_video else None
        self.file = KeypointsFile(
            folder / "keypoints.json", skeleton, self.threshold, {**about, "pictures": str(path.resolve())}
        )
        self.num_pictures, self.num_people, self.num_bad = 0, 0, 0

    def add(self, piece: Piece, everybody: Sequence[Sequence[Person]]) -> None:
        """The people of each picture of a piece."""
        self.num_pictures += len(piece.files)
        self.num_people += sum(map(len, everybody))
        self.num_bad += len(piece.bad)
        for file, name, size, people in zip(piece.files, piece.names, piece.sizes, everybody, strict=True):
            self.file.add(name, size, people)
            if self.draws:
                self._draw(piece.root / file, name, people)

    def _draw(self, file: Path, name: str, people: Sequence[Person]) -> None:
        picture = read_image(file)
        if people:
            points_xy = np.stack([person.points_xy for person in people])
            shown = np.stack([person.scores for person in people]) > self.threshold
            picture = draw.people_on(picture, points_xy, shown, self.skeleton)
        if self.film is not None:
            self.film.add(picture)
        else:
            pictures.save(picture, self.folder / "drawn" / name)

    def close(self) -> str:
        """Finish the files; what was found and where it is."""
        self.file.close()
        files = [str(self.file.file)]
        if self.draws and self.film is not None:
            self.film.close()
            files.append(str(self.film.path))
        elif self.draws:
            files.append(str(self.folder / "drawn"))
        bad = f", {self.num_bad} skipped" if self.num_bad else ""
        kind = "frames" if self.film is not None else "pictures"
        found = f"{self.num_people} people in {self.num_pictures} {kind} of {self.path}{bad}"
        return "\n  ".join([f"\n{found}; boxes: {self.about['boxes']}", *files])
