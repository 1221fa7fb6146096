"""Images of the worst people of an evaluation: as labeled, as predicted, what went wrong, and the heatmaps."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8
from numpy import ndarray as Array

from sapiens_accel.data.people import People, boxes_of, keypoints_of
from sapiens_accel.evaluation import predict, tables
from sapiens_accel.evaluation.boxes import Boxes
from sapiens_accel.evaluation.error_analysis import Diagnosis, Kind, Reason, diagnose
from sapiens_accel.evaluation.evaluate import EvaluationResult
from sapiens_accel.evaluation.ground_truth import read_ground_truth, read_images
from sapiens_accel.evaluation.predict import PoseNetwork, Predictions, PredictionSetup
from sapiens_accel.pose import draw, geometry
from sapiens_accel.pose.draw import Color
from sapiens_accel.pose.geometry import Crop
from sapiens_accel.pose.skeleton import Skeleton
from sapiens_accel.pose.visibility import is_labeled
from sapiens_accel.sources.coco import given_id
from sapiens_accel.sources.images import read_image

PERSON_HW = (384, 384)
PANEL_HW = (384, 320)
DENSE_PANEL_HW = (576, 480)  # of more keypoints than `draw.MANY`, whose hands and faces would be blots
AROUND = 1.25  # of the box, so that what is next to a person is seen too
SHOWN_SCORE = 0.2  # below it a predicted keypoint is drawn hollow, and one that nobody labeled not at all
# To be distinguished without red and green, on bright and on dark paper.
ERROR_COLORS: dict[Kind, Color] = {
    Kind.GOOD: (46, 160, 110),
    Kind.IMPRECISE: (230, 180, 20),
    Kind.SWAPPED: (190, 100, 220),
    Kind.WRONG_PERSON: (50, 140, 235),
    Kind.MISSED: (235, 70, 50),
}
ImageArray = UInt8[Array, "h w 3"]
# Of a few people, by their indices: maps of each, and heatmap_from_image of them.
Heatmaps = Callable[[list[int]], tuple[Float[Array, "m k h w"], Float[Array, "m 2 3"]]]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One person.

    Attributes:
        panels: images of one size: labeled, predicted, the errors and, where there is a network, its heatmaps.
    """

    ann_id: int | str
    image_id: int | str
    file_name: str
    oks: float
    reason: Reason
    panels: tuple[ImageArray, ...]

    @property
    def title(self) -> str:
        return f"OKS {self.oks:.2f}, annotation {self.ann_id} of image {self.image_id}: {self.reason.text}"

    @property
    def image(self) -> ImageArray:
        return draw.add_header(np.concatenate(self.panels, axis=1), self.title)


@dataclass(frozen=True, kw_only=True)
class ErrorAnalysis:
    """What went wrong with everybody, and images of the worst."""

    diagnosis: Diagnosis
    cases: tuple[Case, ...]


class LabeledPerson(NamedTuple):
    """A person to draw: the panel's image, panel_from_image, the label, and the kind of error of each keypoint."""

    image: ImageArray
    panel: Float[Array, "2 3"]
    label: Float[Array, "k 3"]
    kinds: Int[Array, "k"]


class PersonKeypoints(NamedTuple):
    """What a network predicted of one person, in image px."""

    points_xy: Float[Array, "k 2"]
    scores: Float[Array, "k"]


def format_worst_people(findings: dict[str, ErrorAnalysis]) -> list[str]:
    """The worst people of each row in words: a paragraph each, a line for a person."""
    return [
        "\n".join([f"{name}: people of the lowest OKS", *(f"  {case.title}" for case in analysis.cases)])
        for name, analysis in findings.items()
        if analysis.cases
    ]


def analyze_networks(
    result: EvaluationResult, people: People, networks: Sequence[PoseNetwork], setup: PredictionSetup
) -> ErrorAnalysis:
    """The worst `config.num_worst` of an evaluation, with heatmaps, which are computed again. On one rank.

    Raises:
        UserError: as `predict.predict`.
    """
    boxes = Boxes(
        root=people.root,
        file_names=list(people.rows["file_name"][:]),
        image_ids=np.asarray(people.rows["image_id"][:]),
        boxes_xywh=result.boxes_xywh,
        scores=np.ones(len(people)),
        source=tables.describe_boxes(setup.config),
        labeled=False,
    )

    def heatmaps(chosen: list[int]) -> tuple[Float[Array, "m k h w"], Float[Array, "m 2 3"]]:
        few = _few(boxes, chosen)
        maps, padding = predict.predict_heatmaps(networks, few, setup), setup.data.box_padding
        crops = [geometry.crop_around_box(box, padding, networks[0].codec.input_hw) for box in few.boxes_xywh]
        # The corners of a heatmap are those of the crop.
        return maps, np.stack([crop.matrix((maps.shape[2], maps.shape[3])) for crop in crops])

    return analyze_predictions(
        result.predictions, people, setup.skeleton, setup.config.num_worst, result.boxes_xywh, heatmaps
    )


def _few(boxes: Boxes, chosen: list[int]) -> Boxes:
    return replace(
        boxes,
        file_names=[boxes.file_names[index] for index in chosen],
        image_ids=boxes.image_ids[chosen],
        boxes_xywh=boxes.boxes_xywh[chosen],
        scores=boxes.scores[chosen],
    )


def analyze_predictions(
    predictions: Predictions,
    people: People,
    skeleton: Skeleton,
    num: int,
    boxes_xywh: Float[Array, "n 4"] | None = None,
    heatmaps: Heatmaps | None = None,
) -> ErrorAnalysis:
    """Diagnose everybody, and draw the `num` people of the lowest OKS.

    Args:
        predictions: of the people, in their order.
        boxes_xywh: the boxes that they were predicted in, if not their labeled boxes; of no size: none.
    """
    labels, labeled_boxes = keypoints_of(people.rows), boxes_of(people.rows)
    areas, image_ids = np.asarray(people.rows["area"][:], dtype=np.float64), people.rows["image_id"][:]
    diagnosis = diagnose(predictions.points_xy, predictions.scores, labels, areas, image_ids, skeleton)
    chosen = diagnosis.worst(num).tolist()
    predicted_boxes = labeled_boxes if boxes_xywh is None else boxes_xywh
    with_box = [index for index in chosen if predicted_boxes[index, 2:].all()]
    maps = dict(zip(with_box, zip(*heatmaps(with_box), strict=True), strict=True)) if heatmaps and with_box else {}
    panel_hw = DENSE_PANEL_HW if skeleton.num_keypoints > draw.MANY else PANEL_HW
    cases, truth, listed = [], read_ground_truth(people, skeleton.num_keypoints), read_images(people)
    for index in chosen:
        row = people.rows[index]
        panel = _frame(labeled_boxes[index], predicted_boxes[index], labels[index], panel_hw)
        image = geometry.warp(read_image(people.root / row["file_name"]), panel, panel_hw)
        predicted = PersonKeypoints(predictions.points_xy[index], predictions.scores[index])
        person = LabeledPerson(image=image, panel=panel, label=labels[index], kinds=diagnosis.kinds[index])
        panels = _panels(person, predicted, bool(diagnosis.is_predicted[index]), skeleton)
        if heatmaps:
            panels.append(_heat(image, panel, maps.get(index)))
        cases.append(
            Case(
                ann_id=truth.given_ids.get(row["ann_id"], row["ann_id"]),
                image_id=given_id(listed[row["image_id"]]),
                file_name=row["file_name"],
                oks=float(diagnosis.oks[index]),
                reason=diagnosis.reason(index, skeleton),
                panels=tuple(panels),
            )
        )
    return ErrorAnalysis(diagnosis=diagnosis, cases=tuple(cases))


def _frame(
    box_xywh: Float[Array, "4"], other_xywh: Float[Array, "4"], label: Float[Array, "k 3"], panel_hw: tuple[int, int]
) -> Float[Array, "2 3"]:
    """panel_from_image: what shows both boxes, if the second has a size, and the labeled keypoints beside them."""
    several = np.stack([box_xywh, other_xywh] if other_xywh[2:].all() else [box_xywh])
    corners = np.concatenate([several[:, :2], several[:, :2] + several[:, 2:], label[is_labeled(label), :2]])
    low, high = corners.min(axis=0), corners.max(axis=0)
    size_wh = geometry.fit_aspect((AROUND * float(high[0] - low[0]), AROUND * float(high[1] - low[1])), panel_hw)
    return Crop(center_xy=tuple((low + high) / 2), size_wh=size_wh).matrix(panel_hw)


def _panels(
    person: LabeledPerson, predicted: PersonKeypoints, is_predicted: bool, skeleton: Skeleton
) -> list[ImageArray]:
    image, label, scores = person.image, person.label, predicted.scores
    true_xy, predicted_xy = (
        geometry.apply(person.panel, label[:, :2]),
        geometry.apply(person.panel, predicted.points_xy),
    )
    width, labeled = image.shape[1], is_labeled(label)
    shown = np.where(scores > SHOWN_SCORE, 1.0, np.where(labeled, 0.5, 0.0)) * is_predicted
    colors = [ERROR_COLORS.get(Kind(kind), (0, 0, 0)) if kind >= 0 else (0, 0, 0) for kind in person.kinds]
    missed = predicted_xy if is_predicted else true_xy  # of nobody: a dot where each keypoint is
    kind_of = [(kind.name.lower().replace("_", " "), color) for kind, color in ERROR_COLORS.items()]
    strips = [draw.draw_side_key(width, skeleton), draw.draw_score_ramp(width), draw.draw_key(width, kind_of)]
    drawn = [
        draw.draw_person(image, true_xy, label[:, 2] / 2, skeleton),
        draw.draw_person(image, predicted_xy, shown, skeleton, scores),
        draw.draw_displacements(image, missed, true_xy, labeled, colors),
    ]
    return [np.concatenate(both) for both in zip(strips, drawn, strict=True)]


def _heat(
    image: ImageArray,
    panel: Float[Array, "2 3"],
    heatmaps: tuple[Float[Array, "k h w"], Float[Array, "2 3"]] | None,
) -> ImageArray:
    """Heatmaps where they are in the image."""
    width = image.shape[1]
    if heatmaps is None:
        return np.concatenate([draw.draw_key(width, [("heatmaps: none, without a box", (0, 0, 0))]), image])
    maps, heatmap_from_image = heatmaps
    panel_from_heatmap = np.vstack([panel, [0, 0, 1]]) @ np.vstack([geometry.invert(heatmap_from_image), [0, 0, 1]])
    top = geometry.warp(np.ascontiguousarray(maps.max(axis=0)), panel_from_heatmap[:2], (image.shape[0], width))
    strip = draw.draw_key(width, [(f"heatmaps, the highest at each pixel; peak {maps.max():.2f}", (0, 0, 0))])
    return np.concatenate([strip, draw.overlay_heatmaps(image, top[None], np.ones(1))])


def save_figures(findings: ErrorAnalysis, folder: Path, name: str) -> list[Path]:
    """Write FOLDER/NAME_01.png and so on, instead of those that an earlier evaluation wrote."""
    for stale in folder.glob(f"{_literal(name)}_[0-9][0-9]*.png"):
        stale.unlink()
    return [
        draw.save_image(case.image, folder / f"{name}_{i:02d}.png") for i, case in enumerate(findings.cases, start=1)
    ]


def _literal(name: str) -> str:
    return "".join(f"[{letter}]" if letter in "[]*?" else letter for letter in name)


def draw_sheet(findings: ErrorAnalysis) -> ImageArray:
    """All cases as one image, two in a row."""
    drawn = [case.image for case in findings.cases]
    height = max(len(image) for image in drawn)
    padded = [np.pad(image, ((0, height - len(image)), (0, 0), (0, 0))) for image in drawn]
    return draw.arrange_grid(padded, columns=min(2, len(padded)))


def draw_predictions(predictions: Predictions, people: People, skeleton: Skeleton, num: int) -> ImageArray:
    """People spread over the set: above as labeled, below as predicted (keypoints scored above 0.2), by confidence."""
    chosen = np.linspace(0, len(people) - 1, min(num, len(people))).astype(int)
    boxes, keypoints = boxes_of(people.rows), keypoints_of(people.rows)
    above, below = [], []
    for index in chosen:
        x, y, w, h = boxes[index]
        side = 1.25 * max(w, h)
        matrix = Crop(center_xy=(x + w / 2, y + h / 2), size_wh=(side, side)).matrix(PERSON_HW)
        image = geometry.warp(read_image(people.root / people.rows[int(index)]["file_name"]), matrix, PERSON_HW)
        labels, predicted_xy = keypoints[index], geometry.apply(matrix, predictions.points_xy[index])
        above.append(draw.draw_person(image, geometry.apply(matrix, labels[:, :2]), labels[:, 2] / 2, skeleton))
        scores = predictions.scores[index]
        below.append(draw.draw_person(image, predicted_xy, (scores > SHOWN_SCORE).astype(float), skeleton, scores))
    # What the colors mean, over each person.
    rows = [(draw.draw_side_key(PERSON_HW[1], skeleton), above), (draw.draw_score_ramp(PERSON_HW[1]), below)]
    strips = [(np.tile(strip, (1, len(chosen), 1)), draw.arrange_grid(row, columns=len(chosen))) for strip, row in rows]
    return np.concatenate([part for pair in strips for part in pair])
