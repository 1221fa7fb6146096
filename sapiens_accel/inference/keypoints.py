"""From boxes in images to everybody's keypoints: the one way of `eval.py --images` and of `PoseEstimator`.

boxes of each image -> those that have a part in their image -> predict -> OKS-NMS -> the people of each image
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch

from sapiens_accel.config.schema import Config
from sapiens_accel.data.detections import PersonBoxes
from sapiens_accel.evaluation.boxes import Boxes
from sapiens_accel.evaluation.predict import ALONE, PoseNetwork, PredictionSetup, Processes, predict
from sapiens_accel.inference.outputs import Person, Piece
from sapiens_accel.pose import geometry
from sapiens_accel.pose.oks import oks_nms, person_scores
from sapiens_accel.pose.person_boxes import measure_sizes
from sapiens_accel.pose.skeleton import Skeleton


@dataclass(frozen=True, kw_only=True)
class KeypointFinder:
    """Finds the keypoints of people whose boxes are known.

    Attributes:
        networks: count as one: their heatmaps are averaged.
        run: options: `data.box_padding`, and those of `eval`.
    """

    networks: Sequence[PoseNetwork]
    skeleton: Skeleton
    run: Config
    device: torch.device
    processes: Processes = ALONE

    def find_each(self, boxes: Boxes) -> list[Person]:
        """The person of each box, in the order of the boxes.

        Raises:
            UserError: as `predict`.
        """
        setup = PredictionSetup(skeleton=self.skeleton, data=self.run.data, config=self.run.eval, device=self.device)
        predictions = predict(self.networks, boxes, setup, self.processes)
        scores = boxes.scores * person_scores(predictions.scores, self.run.eval.score_threshold)
        parts = (predictions.points_xy, predictions.scores, scores.tolist(), boxes.boxes_xywh, boxes.scores.tolist())
        people = [Person(*row) for row in zip(*parts, boxes.category_ids or [1] * len(boxes), strict=True)]
        if predictions.visibility is None:
            return people
        return [one._replace(visibility=values) for one, values in zip(people, predictions.visibility, strict=True)]

    def find_people(self, boxes: Boxes | None, num_images: int) -> list[list[Person]]:
        """The people of each image, each person once, the surest first. `image_ids` are indices of the images."""
        if boxes is None:
            return [[] for _ in range(num_images)]
        everybody = self.find_each(boxes)
        of_image: list[list[Person]] = []
        for index in range(num_images):
            people = [everybody[number] for number in np.flatnonzero(boxes.image_ids == index)]
            kinds = dict.fromkeys(person.category_id for person in people)
            kept = [self._drop_repeated([one for one in people if one.category_id == kind]) for kind in kinds]
            by_score = sorted(chain(*kept), key=lambda person: -person.score) if len(kinds) > 1 else [*chain(*kept)]
            of_image.append(by_score)
        return of_image

    def _drop_repeated(self, people: list[Person]) -> list[Person]:
        """Each person once, as evaluation counts them: areas are those of the padded boxes."""
        if not people:
            return []
        input_hw, padding = self.networks[0].codec.input_hw, self.run.data.box_padding
        sizes = [geometry.crop_around_box(person.box_xywh, padding, input_hw).size_wh for person in people]
        areas = np.array([width * height for width, height in sizes])
        points_xy = np.stack([person.points_xy for person in people])
        scores = np.array([person.score for person in people])
        kept = oks_nms(points_xy, scores, areas, self.skeleton.sigmas, self.run.eval.nms_threshold)
        return [people[index] for index in kept]

    def describe_misfit(self, boxes: Boxes | None, piece: Piece) -> str:
        """How people's boxes differ in size from those in the weights' training images; empty if they do not."""
        trained = self.skeleton.people
        if boxes is None or trained is None:
            return ""
        sizes = measure_sizes(boxes.boxes_xywh, np.array(piece.sizes, dtype=np.float64)[boxes.image_ids, ::-1])
        misfit = sizes.describe_misfit(trained) if sizes else ""
        return f"{boxes.source}: {misfit}: keypoints will be far less accurate" if misfit else ""


def find_whole(piece: Piece) -> list[PersonBoxes]:
    """Each image as one person."""
    return [PersonBoxes(np.array([[0.0, 0.0, width, height]]), np.ones(1)) for height, width in piece.sizes]


def collect_boxes(
    people_of_images: Sequence[PersonBoxes], piece: Piece, source: str, category: Any = 1
) -> tuple[Boxes | None, int]:
    """The boxes in a piece's images, by the indices of the images, and how many lie outside of their image.

    Args:
        source: where they are from, in words.
        category: of those that have none.

    Returns:
        None if there are no boxes.
    """
    image_indices = np.array(
        [index for index, people in enumerate(people_of_images) for _ in people.scores], dtype=np.int64
    )
    if not len(image_indices):
        return None, 0
    boxes_xywh = np.concatenate([people.boxes_xywh for people in people_of_images])
    sizes_wh = np.array(piece.sizes, dtype=np.float64)[image_indices, ::-1]
    low, high = boxes_xywh[:, :2], boxes_xywh[:, :2] + boxes_xywh[:, 2:]
    kept = np.flatnonzero(((high > 0) & (low < sizes_wh)).all(axis=1))
    categories = [key for people in people_of_images for key in people.category_ids or [category] * len(people.scores)]
    if not len(kept):
        return None, len(image_indices)
    boxes = Boxes(
        root=piece.root, file_names=[piece.files[index] for index in image_indices[kept]],
        image_ids=image_indices[kept], boxes_xywh=boxes_xywh[kept],
        scores=np.concatenate([people.scores for people in people_of_images])[kept], source=source, labeled=False,
        category_ids=[categories[index] for index in kept], pixels=piece.pixels,
    )  # fmt: skip
    return boxes, len(image_indices) - len(kept)
