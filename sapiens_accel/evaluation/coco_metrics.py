"""Keypoints to COCO's results and its AP and AR, whole and by part of the body, by pycocotools or a drop-in for it;
KEYPOINT_METRICS are the other numbers.

Scores and suppression as published (sapiens, pose/mmpose/evaluation/metrics/coco_metric.py): a person's score is the
box score times the mean of the keypoint scores above 0.2, people with an OKS above 0.9 are one, 20 of an image count
(`--eval.max_people`).
"""

import contextlib
import importlib
import io
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray as Array
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from sapiens_accel.config.schema import DataConfig, EvalConfig
from sapiens_accel.data.people import People
from sapiens_accel.errors import UserError
from sapiens_accel.evaluation.boxes import Boxes
from sapiens_accel.evaluation.ground_truth import evaluated_categories, read_ground_truth, read_images
from sapiens_accel.evaluation.predict import Predictions
from sapiens_accel.pose import geometry
from sapiens_accel.pose.oks import AREA_OF_BOX, KeypointQuality, is_predicted, oks_nms, person_scores
from sapiens_accel.pose.skeleton import WHOLEBODY133, Skeleton
from sapiens_accel.pose.visibility import is_labeled
from sapiens_accel.sources.coco import given_id
from sapiens_accel.sources.schema import WHOLE_BODY, Reading
from sapiens_accel.visibility.output import name_columns

Metrics = dict[str, float]
# Precision (0..1, -1 where nobody is measured) at OKS of 0.50, 0.55, ... 0.95 and recalls of 0.00, 0.01, ... 1.00.
Curves = Float[Array, "10 101"]
Backend = Literal["pycocotools", "faster_coco_eval"]
METRICS = ("AP", "AP50", "AP75", "AP_M", "AP_L", "AR", "AR50", "AR75", "AR_M", "AR_L")
# CrowdPose's levels by the crowd index of an image, from and below: the thresholds of its published evaluation
# (crowdposetools/cocoeval.py, get_type_result(0.2, 0.8)). Its paper (https://arxiv.org/abs/1812.00324) writes 0 to 0.1,
# 0.1 to 0.8 and 0.8 to 1; published numbers are those of the code.
CROWD_LEVELS = {"easy": (-np.inf, 0.2), "medium": (0.2, 0.8), "hard": (0.8, np.inf)}
# COCO-WholeBody's parts, each with its list in the JSON; its own evaluation scores them one by one.
BODY = slice(0, 17)
PARTS = {
    "body": (BODY, "keypoints"),
    "feet": (slice(17, 23), "foot_kpts"),
    "face": (slice(23, 91), "face_kpts"),
    "left_hand": (slice(91, 112), "lefthand_kpts"),
    "right_hand": (slice(112, 133), "righthand_kpts"),
}


@dataclass(frozen=True, kw_only=True)
class MatchedPeople:
    """Labeled people and the prediction that belongs to each of them; px of the image.

    Attributes:
        predicted_xy, scores: all 0 of a person without a prediction.
        labels: x, y and v.
        boxes_xywh: the people's own, as labeled.
        quality: of each keypoint, over all people, and over all keypoints.
    """

    predicted_xy: Float[Array, "n k 2"]
    scores: Float[Array, "n k"]
    labels: Float[Array, "n k 3"]
    boxes_xywh: Float[Array, "n 4"]
    skeleton: Skeleton
    quality: KeypointQuality

    @property
    def distance_px(self) -> Float[Array, "n k"]:
        return np.linalg.norm(self.predicted_xy - self.labels[..., :2], axis=-1)

    @property
    def has_distance(self) -> Bool[Array, "n k"]:
        """The labeled keypoints of people who have a prediction."""
        return is_labeled(self.labels) & is_predicted(self.predicted_xy, self.scores)[:, None]


class KeypointMetric(NamedTuple):
    """A number over all labeled keypoints, beside COCO's.

    Attributes:
        measure: gives a number of at least 0, or nan if there is nobody to measure.
        unit: %, of a share, which is shown x 100; or px of the image.
    """

    measure: Callable[[MatchedPeople], float]
    unit: Literal["%", "px"]


# Each is a column of the table, the page and the model card, and a value in eval.json, metrics.jsonl and TensorBoard.
KEYPOINT_METRICS = {
    "mean_px": KeypointMetric(attrgetter("quality.all_distances.mean_px"), "px"),
    "median_px": KeypointMetric(attrgetter("quality.all_distances.median_px"), "px"),
    "PCK@0.1": KeypointMetric(attrgetter("quality.all_distances.pck_10"), "%"),
    "PCK@0.05": KeypointMetric(attrgetter("quality.all_distances.pck_5"), "%"),
}
UNITS = {**dict.fromkeys(METRICS, "%"), **{name: metric.unit for name, metric in KEYPOINT_METRICS.items()}}


def measure_keypoint_metrics(people: MatchedPeople) -> Metrics:
    """KEYPOINT_METRICS; -1 where there is nobody to measure."""
    values = {name: metric.measure(people) for name, metric in KEYPOINT_METRICS.items()}
    return {name: float(value) if value >= 0 else -1.0 for name, value in values.items()}


class CountingRules(NamedTuple):
    """`--eval.area` and `--eval.max_people`; see `EvalConfig`."""

    area: Literal["annotation", "box"] = "annotation"
    max_people: int = 20


COCO_RULES = CountingRules()


def body_parts(skeleton: Skeleton) -> dict[str, slice]:
    """The keypoints that are also scored by themselves; none but of COCO-WholeBody."""
    return {part: keypoints for part, (keypoints, _) in PARTS.items()} if skeleton.names == WHOLEBODY133.names else {}


def no_check() -> None:
    """Let an evaluation run to its end."""


def coco_results(
    predictions: Predictions,
    boxes: Boxes,
    skeleton: Skeleton,
    data: DataConfig,
    config: EvalConfig,
    check: Callable[[], None] = no_check,
) -> tuple[list[dict[str, Any]], Int[Array, "m"]]:
    """COCO's results, at most `config.max_people` of a category in an image, and which prediction each of them is.

    A result: image_id, category_id (1 where the boxes have none), keypoints [x, y, score, ...] in image px (to 0.001)
    and score. People of different categories are never one.

    Args:
        check: called for each image; what it raises ends the work.
    """
    crops = [geometry.crop_around_box(box, data.box_padding, data.input_hw) for box in boxes.boxes_xywh]
    areas = np.array([crop.size_wh[0] * crop.size_wh[1] for crop in crops])  # of the padded box, as published
    scores = boxes.scores * person_scores(predictions.scores, config.score_threshold)
    by_image: dict[tuple[int, Any], list[int]] = defaultdict(list)
    categories = boxes.category_ids or [1] * len(boxes)
    for index, key in enumerate(zip(boxes.image_ids.tolist(), categories, strict=True)):
        by_image[key].append(index)
    results, chosen = [], []
    for (image_id, category), members in by_image.items():
        check()
        indices = np.array(members)
        kept = oks_nms(
            predictions.points_xy[indices], scores[indices], areas[indices], skeleton.sigmas, config.nms_threshold
        )
        for index in indices[kept][: config.max_people].tolist():
            points = np.concatenate([predictions.points_xy[index], predictions.scores[index, :, None]], axis=1)
            person = {"keypoints": points.round(3).ravel().tolist(), "score": float(scores[index])}
            if predictions.visibility is not None:
                person |= name_columns(predictions.visibility[index])
            results.append({"image_id": image_id, "category_id": category, **person})
            chosen.append(index)
    return results, np.array(chosen, dtype=int)


def compute_metrics(
    results: Sequence[dict[str, Any]],
    people: People,
    skeleton: Skeleton,
    backend: Backend,
    rules: CountingRules = COCO_RULES,
    check: Callable[[], None] = no_check,
) -> tuple[Metrics, Curves]:
    """METRICS (0..1, -1 where there is nobody to measure) of COCO results, and the curves of all keypoints.

    AP is the mean of the curves. Of COCO-WholeBody also PART/METRIC: body, feet, face, left_hand, right_hand, and
    hands, the mean of both hands. The metrics without a part are those of all 133 keypoints. Where the images have
    CrowdPose's `crowdIndex`, also crowd_easy/METRIC, crowd_medium and crowd_hard. Categories count as one; where there
    are several, also category/NAME/METRIC, of those that share a name category/NAME (ID)/METRIC.

    Args:
        check: called for each image, as in `coco_results`: of COCO's 5,000, 17 keypoints take 7 s and 133 take 51 s.
    """
    truth = read_ground_truth(people, skeleton.num_keypoints)
    tree = truth.dataset
    if rules.area == "box":
        measured = [{**person, "area": AREA_OF_BOX * person["box_area"]} for person in tree["annotations"]]
        tree = {**tree, "annotations": measured}
    parts = body_parts(skeleton)
    # As COCO-WholeBody's own evaluation: a result is as large as its body, whichever part is scored.
    areas = [_extent(result["keypoints"], BODY) for result in results] if parts else None
    scoring = _Scoring(skeleton, backend, rules.max_people, check)
    whole = slice(0, skeleton.num_keypoints)
    metrics, curves = _measured(tree, results, whole, scoring, areas)
    for level, image_ids in crowd_levels(tree["images"]).items():
        some, some_results = _of_images(tree, image_ids), [one for one in results if one["image_id"] in image_ids]
        of_level, _ = _measured(some, some_results, whole, scoring, None)
        metrics |= {f"crowd_{level}/{name}": value for name, value in of_level.items()}
    for part, keypoints in parts.items():
        of_part, _ = _measured(tree, results, keypoints, scoring, areas)
        metrics |= {f"{part}/{name}": value for name, value in of_part.items()}
    several = len(truth.categories) > 1 and not any(result["category_id"] is None for result in results)
    names = Counter(name for _, name in truth.categories.values())
    for category, (given, name) in truth.categories.items() if several else ():
        kind = name if names[name] == 1 else f"{name} ({given})"
        some = [result for result in results if result["category_id"] == category]
        others = [person for person in tree["annotations"] if person["category"] == category]
        of_kind, _ = _measured({**tree, "annotations": others}, some, whole, scoring, None)
        metrics |= {f"category/{kind}/{name}": value for name, value in of_kind.items()}
    for name in METRICS if parts else ():
        hands = [value for side in ("left", "right") if (value := metrics[f"{side}_hand/{name}"]) >= 0]
        metrics[f"hands/{name}"] = float(np.mean(hands)) if hands else -1.0
    return metrics, curves


def save_results(results: Sequence[dict[str, Any]], file: Path, people: People, skeleton: Skeleton) -> None:
    """Write results as COCO's server takes them, of the keypoints of the annotation file, in its order.

    Those that the run does not have are 0, 0, 0. In COCO-WholeBody's five lists where the file has them. Ids of images
    and categories are those of the annotation file, as it writes them.
    """
    categories, images = evaluated_categories(people), read_images(people)
    first = next(iter(categories.values()))
    in_lists = _has_five_lists(people, skeleton)
    written = []
    for result in results:
        points = _in_order_of_file(result["keypoints"], people.reading)
        lists = (
            {key: _part(points, keypoints) for keypoints, key in PARTS.values()} if in_lists else {"keypoints": points}
        )
        category, _ = categories.get(result["category_id"], first)
        ids = {"image_id": given_id(images[result["image_id"]]), "category_id": category}
        written.append({**result, **ids, **lists})
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(written))


def _in_order_of_file(points: list[float], reading: Reading) -> list[float]:
    """The inverse of `annotation_rules.keypoint_numbers`."""
    if reading.source is None or reading.count is None:
        return points
    written = [0.0] * (3 * reading.count)
    for k, index in enumerate(reading.source):
        if index >= 0:
            written[3 * index : 3 * index + 3] = points[3 * k : 3 * k + 3]
    return written


def _has_five_lists(people: People, skeleton: Skeleton) -> bool:
    if (people.reading.count or skeleton.num_keypoints) != WHOLEBODY133.num_keypoints:
        return False
    annotations = (one for one in people.source.some_annotations() if isinstance(one, dict))
    return any(all(one.get(key) is not None for key in WHOLE_BODY) for one in annotations)


def crowd_levels(images: Sequence[Mapping[str, Any]]) -> dict[str, set[Any]]:
    """The ids of the images of each of CROWD_LEVELS; none where an image has no `crowdIndex`."""
    indices = {one["id"]: one["crowdIndex"] for one in images if isinstance(one.get("crowdIndex"), int | float)}
    if len(indices) < len(images):
        return {}
    return {
        level: {image_id for image_id, index in indices.items() if low <= index < high}
        for level, (low, high) in CROWD_LEVELS.items()
    }


def best_possible_ap(counts: Sequence[int], max_people: int) -> float:
    """The AP of perfect predictions where only so many of an image count.

    Precision is 1 up to the recall that can be reached, and 0 at the recalls of 0.00, 0.01, ... 1.00 beyond it.

    Args:
        counts: labeled people of each image.
    """
    recall = sum(min(count, max_people) for count in counts) / max(sum(counts), 1)
    return float((np.linspace(0, 1, 101) <= recall).mean())


class _Scoring(NamedTuple):
    skeleton: Skeleton
    backend: Backend
    max_people: int
    check: Callable[[], None]


class _CheckedEvaluation(COCOeval):
    """COCO's evaluation, which calls a function for each image."""

    check: Callable[[], None]

    def computeOks(self, imgId: Any, catId: Any) -> Any:  # noqa: N802, N803  (its names)
        self.check()
        return super().computeOks(imgId, catId)

    def evaluateImg(self, imgId: Any, catId: Any, aRng: Any, maxDet: Any) -> Any:  # noqa: N802, N803
        self.check()
        return super().evaluateImg(imgId, catId, aRng, maxDet)


def _of_images(tree: dict[str, Any], image_ids: set[Any]) -> dict[str, Any]:
    images = [image for image in tree["images"] if image["id"] in image_ids]
    return {
        **tree,
        "images": images,
        "annotations": [person for person in tree["annotations"] if person["image_id"] in image_ids],
    }


def _measured(
    tree: dict[str, Any],
    results: Sequence[dict[str, Any]],
    keypoints: slice,
    scoring: _Scoring,
    areas: Sequence[float] | None,
) -> tuple[Metrics, Curves]:
    """METRICS of some of the keypoints; a person without one of them labeled is to be ignored."""
    scoring.check()
    people = [{**person, "keypoints": _part(person["keypoints"], keypoints)} for person in tree["annotations"]]
    people = [{**person, "num_keypoints": sum(v > 0 for v in person["keypoints"][2::3])} for person in people]
    if not results:  # loadRes takes no empty list
        return dict.fromkeys(METRICS, 0.0 if any(one["num_keypoints"] for one in people) else -1.0), np.zeros((10, 101))
    predicted: Any = [
        {**result, "category_id": 1, "keypoints": _part(result["keypoints"], keypoints)} for result in results
    ]
    sigmas, backend = np.array(scoring.skeleton.sigmas[keypoints]), scoring.backend
    with contextlib.redirect_stdout(io.StringIO()):
        whole: Any = _tools(backend).COCO() if backend == "faster_coco_eval" else COCO()
        whole.dataset = {**tree, "annotations": people}
        whole.createIndex()
        predictions = whole.loadRes(predicted)
        for annotation, area in zip(predictions.dataset["annotations"], areas or (), strict=bool(areas)):
            annotation["area"] = area
        if backend == "faster_coco_eval":
            # It writes its numbers by a logger, and takes the sigmas as a list.
            quiet: Any = lambda *_: None  # noqa: E731
            make = _tools(backend).COCOeval_faster
            evaluation = make(whole, predictions, "keypoints", kpt_oks_sigmas=sigmas.tolist(), print_function=quiet)
        else:
            evaluation = _CheckedEvaluation(whole, predictions, "keypoints")
            evaluation.check = scoring.check
            evaluation.params.kpt_oks_sigmas = sigmas
        evaluation.params.maxDets = [scoring.max_people]
        evaluation.evaluate()
        evaluation.accumulate()
    return _summarize(evaluation)


def _summarize(evaluation: Any) -> tuple[Metrics, Curves]:
    """METRICS and curves of COCOeval's arrays, as its own `summarize`, which knows 20 people of an image alone."""
    # precision: [OKS, recall, category, area, results of an image]; recall without the second.
    precision, recall = (np.asarray(evaluation.eval[name], dtype=np.float64) for name in ("precision", "recall"))

    def mean(values: Float[Array, "*n"]) -> float:
        return float(values[values > -1].mean()) if (values > -1).any() else -1.0

    metrics: Metrics = {}
    for name, values in (("AP", precision), ("AR", recall)):
        metrics |= {
            name: mean(values[..., 0, 0]),
            f"{name}50": mean(values[:1, ..., 0, 0]),
            f"{name}75": mean(values[5:6, ..., 0, 0]),
            f"{name}_M": mean(values[..., 1, 0]),
            f"{name}_L": mean(values[..., 2, 0]),
        }
    return {name: metrics[name] for name in METRICS}, precision[:, :, 0, 0, 0]


def _tools(backend: Backend) -> Any:
    try:
        return importlib.import_module(backend)
    except ImportError:
        raise UserError(f"--eval.backend {backend}: not installed; pip install {backend.replace('_', '-')}") from None


def _part(numbers: Sequence[float], keypoints: slice) -> list[float]:
    return list(numbers[3 * keypoints.start : 3 * keypoints.stop])


def _extent(numbers: Sequence[float], keypoints: slice) -> float:
    """Width times height of what some of the keypoints span."""
    points = np.array(_part(numbers, keypoints)).reshape(-1, 3)[:, :2]
    return float((points.max(axis=0) - points.min(axis=0)).prod())
