"""predict -> gather -> OKS-NMS -> COCO AP, and what single keypoints are worth.

Boxes are the ground truth's, whose score is 1, or a detector's. The first give higher numbers, and wherever a number is
shown it says which they were.
"""

import json
import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from jaxtyping import Float, Int
from numpy import ndarray as Array
from torch import nn

from sapiens_accel.config.schema import DataConfig, EvalConfig
from sapiens_accel.data.people import People, boxes_of, keypoints_of
from sapiens_accel.errors import UserError, read_tree
from sapiens_accel.evaluation import coco_metrics, tables
from sapiens_accel.evaluation.boxes import Boxes, describe_misfit, load_boxes
from sapiens_accel.evaluation.coco_metrics import METRICS, CountingRules, MatchedPeople, Metrics
from sapiens_accel.evaluation.ground_truth import evaluated_categories, read_ground_truth, read_images
from sapiens_accel.evaluation.keypoint_csv import ImageRow, PersonRow
from sapiens_accel.evaluation.predict import Diverged, PoseNetwork, Predictions, PredictionSetup, Processes, predict
from sapiens_accel.evaluation.tables import format_protocol, format_table, protocol_settings
from sapiens_accel.models.sapiens import SapiensPose
from sapiens_accel.pose.heatmap import Codec
from sapiens_accel.pose.oks import AREA_OF_BOX, KeypointQuality, is_predicted, measure_points, oks
from sapiens_accel.pose.person_boxes import BoxRule
from sapiens_accel.pose.skeleton import Skeleton
from sapiens_accel.pose.visibility import is_labeled, is_visible
from sapiens_accel.runtime import distributed, engine
from sapiens_accel.sources.coco import given_id
from sapiens_accel.visibility.output import NUM_SHAPE, OUTPUTS, VisibilityOutput, describe
from sapiens_accel.visibility.quality import format_quality, measure_output
from sapiens_accel.visibility.regression import DescribedPeople, learn

__all__ = ["METRICS", "Metrics", "Predictions", "format_protocol", "format_table", "oks", "protocol_settings"]

MAX_SHOWN_KEYPOINTS = 40
MAX_DESCRIBED_PEOPLE, DESCRIBED_BYTES = 2048, 128 * 2**20  # of the fit of visibility; in float32 twice this, twice
NO_NUMBER = "nothing to measure: '-' in tables, and, as by pycocotools, -1 in files"


@dataclass(frozen=True, kw_only=True)
class EvaluationResult:
    """The outcome of an evaluation.

    Attributes:
        metrics: METRICS, 0..1, and those of parts as PART/METRIC; KEYPOINT_METRICS; the same on all ranks.
        predictions: of the labeled people, in their order; with a detector's boxes, of the box nearest by OKS (all
            scores 0 where the image has none).
        boxes_xywh: those that the people's predictions were made in; 0 where the image has none.
        keypoints: the quality of each keypoint; the same on all ranks.
        curves: precision by recall at each OKS; the same on all ranks.
        area: which area OKS was measured by, in words.
        people_boxes: `--data.boxes`, by which the people were read.
        notes: what was left out, and why a number is 0 or not there.
        seconds: what predicting took on this rank.
        image_rows: predictions as `--eval.csv` writes them; on rank 0 alone, and only where that is asked for.
        visibility: how good the network's second output is (`visibility.quality.measure_output`); None without it.
    """

    metrics: Metrics
    predictions: Predictions
    boxes_xywh: Float[Array, "n 4"]
    keypoints: KeypointQuality
    curves: coco_metrics.Curves
    notes: tuple[str, ...]
    seconds: float
    area: str = ""
    people_boxes: BoxRule = "annotation"
    image_rows: tuple[ImageRow, ...] = ()
    visibility: dict[str, Any] | None = None


def wrap_network(accelerator: Accelerator, model: nn.Module, codec: Codec) -> PoseNetwork:
    """A model in training as a network to evaluate, in the precision that it is trained in."""
    # An engine sets the precision of its forward itself.
    autocast = None if engine.is_engine(model) else distributed.autocast_dtype(accelerator)
    return PoseNetwork(model=model, codec=codec, autocast=autocast)


def processes_of(accelerator: Accelerator) -> Processes:
    """The processes of a launch, which share the boxes."""
    return Processes(
        rank=accelerator.process_index,
        num=accelerator.num_processes,
        gather=partial(distributed.gather, accelerator),
    )


def evaluate_networks(
    accelerator: Accelerator,
    networks: Sequence[PoseNetwork],
    people: People,
    skeleton: Skeleton,
    data: DataConfig,
    config: EvalConfig,
) -> EvaluationResult:
    """Evaluate a network, or several as an ensemble; each rank predicts its part of the people.

    All ranks must call it; the metrics are computed on rank 0 while the others wait.

    Raises:
        UserError: on all ranks: what is wrong with the boxes, the scales or the backend; a file that is not written.
        EvaluationStopped: on all ranks: a stop was asked for while the metrics were computed.
    """
    boxes = load_boxes(config.boxes, people)
    started = time.perf_counter()
    setup = PredictionSetup(skeleton=skeleton, data=data, config=config, device=accelerator.device)
    predictions = predict(networks, boxes, setup, processes_of(accelerator))
    seconds = time.perf_counter() - started
    matches = None if boxes.labeled else match_boxes(predictions, boxes, people, skeleton)
    matched = predictions if matches is None else _select(predictions, matches)
    data, rules = replace(data, input_hw=networks[0].codec.input_hw), CountingRules(config.area, config.max_people)

    def compute(check: Callable[[], None]) -> tuple[Any, tuple[ImageRow, ...]]:
        named = with_categories(boxes, people, skeleton)
        results, chosen = coco_metrics.coco_results(predictions, named, skeleton, data, config, check)
        rows = tuple(list_image_rows(results, chosen, named, people)) if config.csv else ()
        if config.save_predictions:
            coco_metrics.save_results(results, Path(config.save_predictions), people, skeleton)
        metrics, curves = coco_metrics.compute_metrics(results, people, skeleton, config.backend, rules, check)
        quality = measure_keypoints(matched, people, skeleton)
        notes = _collect_notes(metrics, matched, named, people, skeleton, config)
        area = describe_area(people, skeleton, config)
        metrics |= coco_metrics.measure_keypoint_metrics(match_people(matched, people, skeleton, quality))
        return (metrics, curves, quality, notes, area), rows

    (metrics, curves, quality, notes, area), image_rows = _compute_on_main(accelerator, compute)
    return EvaluationResult(
        metrics=metrics,
        predictions=matched,
        boxes_xywh=boxes.boxes_xywh if matches is None else boxes.boxes_xywh[matches] * (matches >= 0)[:, None],
        keypoints=quality,
        curves=curves,
        notes=notes,
        seconds=seconds,
        area=area,
        people_boxes=people.reading.boxes,
        image_rows=image_rows,
        visibility=measure_visibility(matched, people),
    )


def fit_visibility(
    accelerator: Accelerator, network: PoseNetwork, people: People, others: People, setup: PredictionSetup
) -> VisibilityOutput | None:
    """The second output of a network that is trained: fitted on some people, calibrated on others.

    The others' labels choose among four fits of each probability, and give it a slope and an intercept. All ranks must
    call it.

    Returns:
        The output on rank 0, None on the others and for a network that diverged.

    Raises:
        UserError: as `predict`.
        EvaluationStopped: on all ranks: a stop was asked for.
    """
    try:
        first, second = (describe_people(accelerator, network, some, setup) for some in (people, others))
    except Diverged as error:
        accelerator.print(f"warning: visibility is not fitted: {error}")
        return None
    return distributed.run_on_main(accelerator, lambda check: learn(first, second, setup.skeleton.names, check))


def describe_people(
    accelerator: Accelerator, network: PoseNetwork, people: People, setup: PredictionSetup
) -> DescribedPeople:
    """The keypoints of at most `MAX_DESCRIBED_PEOPLE` people, evenly spread, in plain crops. All ranks must call it.

    Raises:
        UserError: as `predict`.
    """
    setup = replace(setup, config=replace(setup.config, flip=False, scales=(1.0,)))
    reader = replace(network, visibility=lambda features, maps: describe(features, maps).half())
    some = spread_people(people, network, setup.skeleton.num_keypoints)
    boxes = Boxes(
        root=some.root, file_names=list(some.rows["file_name"][:]), image_ids=np.arange(len(some)),
        boxes_xywh=boxes_of(some.rows), scores=np.ones(len(some)), source="labeled people", labeled=True,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):  # a loader draws from the generator, whose state checkpoints have
        predictions = predict([reader], boxes, setup, processes_of(accelerator))
    return DescribedPeople.of(predictions.visibility, predictions.scores, keypoints_of(some.rows))


def spread_people(people: People, network: PoseNetwork, num_keypoints: int) -> People:
    """At most `MAX_DESCRIBED_PEOPLE`, and so many that their descriptions fit into `DESCRIBED_BYTES`; evenly spread."""
    model = next(module for module in network.model.modules() if isinstance(module, SapiensPose))
    most = DESCRIBED_BYTES // (2 * num_keypoints * (model.size.width + NUM_SHAPE))
    num = min(len(people), MAX_DESCRIBED_PEOPLE, max(1, most))
    chosen = np.linspace(0, len(people) - 1, num).round().astype(int)
    return replace(people, rows=people.rows.select(chosen))


def _compute_on_main(
    accelerator: Accelerator, compute: Callable[[Callable[[], None]], tuple[Any, tuple[ImageRow, ...]]]
) -> tuple[Any, tuple[ImageRow, ...]]:
    """Return rank 0's metrics on all ranks, and its rows on rank 0 alone; its UserError is raised on all ranks."""

    def compute_or_explain(check: Callable[[], None]) -> tuple[Any, tuple[ImageRow, ...]]:
        try:
            return compute(check)
        except (UserError, OSError) as error:  # the other ranks wait for the metrics
            return str(error), ()

    computed, image_rows = distributed.run_on_main(accelerator, compute_or_explain) or (None, ())
    computed: Any = broadcast_object_list([computed])[0]
    if isinstance(computed, str):
        raise UserError(computed)
    return computed, image_rows


def _collect_notes(
    metrics: Metrics, matched: Predictions, boxes: Boxes, people: People, skeleton: Skeleton, config: EvalConfig
) -> tuple[str, ...]:
    """What was left out of an evaluation, and why a number is 0 or missing, a line each."""
    return (
        *(line for line in (boxes.note, people.size_note, describe_misfit(boxes, people, skeleton)) if line),
        *describe_unmeasured(people, skeleton),
        *describe_crowding(people, config),
        *describe_unmatched(matched),
        *explain_metrics(metrics, matched, people, skeleton),
    )


def with_categories(boxes: Boxes, people: People, skeleton: Skeleton) -> Boxes:
    """The boxes of labeled people with their categories, where there are several."""
    if boxes.category_ids is not None or not boxes.labeled or len(evaluated_categories(people)) == 1:
        return boxes
    category_of = read_ground_truth(people, skeleton.num_keypoints).category_of
    return replace(boxes, category_ids=[category_of[ann_id] for ann_id in people.rows["ann_id"][:]])


def list_image_rows(
    results: Sequence[dict[str, Any]], chosen: Int[Array, "m"], boxes: Boxes, people: People
) -> Iterator[ImageRow]:
    """Every image of the people's file with its results, by their ids and names in the file; the surest person first.

    Args:
        results, chosen: as `coco_metrics.coco_results` has them.
    """
    categories, ann_ids = evaluated_categories(people), people.rows["ann_id"][:]
    persons_of: dict[Any, list[PersonRow]] = defaultdict(list)
    annotations = people.source.read()["annotations"] if boxes.labeled else ()
    given_ids = {one.get("id"): given_id(one) for one in annotations}
    for result, index in zip(results, chosen.tolist(), strict=True):
        points = np.array(result["keypoints"]).reshape(-1, 3)
        is_known = result["category_id"] is not None
        _, category = categories.get(result["category_id"], next(iter(categories.values()))) if is_known else ("", "")
        ann_id = ann_ids[index] if boxes.labeled else ""
        person = PersonRow(points[:, :2], points[:, 2], result["score"], category, given_ids.get(ann_id, ann_id))
        if "keypoint_present" in result:
            outputs = [result[f"keypoint_{name}"] for name in OUTPUTS]
            person = person._replace(visibility=np.array(outputs).T)
        persons_of[result["image_id"]].append(person)
    for image_id, image in read_images(people).items():
        persons = sorted(persons_of[image_id], key=lambda person: -person.score)
        yield ImageRow(image["file_name"], persons, given_id(image))


def measure_keypoints(predictions: Predictions, people: People, skeleton: Skeleton) -> KeypointQuality:
    """What each keypoint is worth, of predictions in the order of the people's rows."""
    areas = np.asarray(people.rows["area"][:], dtype=np.float64)
    labels, sizes = keypoints_of(people.rows), boxes_of(people.rows)
    return measure_points(predictions.points_xy, predictions.scores, labels, areas, sizes, skeleton.sigmas)


def measure_visibility(predictions: Predictions, people: People) -> dict[str, Any] | None:
    """How good the second output is, of predictions in the order of the people's rows; None where there is none."""
    if predictions.visibility is None:
        return None
    labels = keypoints_of(people.rows)
    masks = {"present": is_labeled(labels), "visible": is_visible(labels)}
    return measure_output(predictions.visibility, predictions.scores, masks)


def match_people(
    predictions: Predictions, people: People, skeleton: Skeleton, quality: KeypointQuality
) -> MatchedPeople:
    """The people with predictions in the order of their rows."""
    return MatchedPeople(
        predicted_xy=predictions.points_xy,
        scores=predictions.scores,
        labels=keypoints_of(people.rows),
        boxes_xywh=boxes_of(people.rows),
        skeleton=skeleton,
        quality=quality,
    )


def use_areas(people: People, config: EvalConfig) -> People:
    """The people with the areas that `--eval.area` says, for whatever compares predictions with them."""
    if config.area == "annotation":
        return people
    # Of the box as annotated or around keypoints: with --data.boxes image the row's box is the whole image.
    areas = AREA_OF_BOX * np.asarray(people.rows["box_area"][:], dtype=np.float64)
    features = people.rows.features
    rows = people.rows.remove_columns("area").add_column("area", areas, feature=features["area"])
    return replace(people, rows=rows)


def describe_area(people: People, skeleton: Skeleton, config: EvalConfig) -> str:
    """Which area OKS is measured by, in words."""
    without_area = read_ground_truth(people, skeleton.num_keypoints).num_without_area
    return tables.describe_area(config, without_area, len(people))


def describe_crowding(people: People, config: EvalConfig) -> list[str]:
    """What `--eval.max_people` costs where an image has more labeled people, in a line."""
    counts = list(Counter(people.rows["image_id"][:]).values())
    if max(counts) <= config.max_people:
        return []
    crowded = [count for count in counts if count > config.max_people]
    best = coco_metrics.best_possible_ap(counts, config.max_people)
    return [
        f"{len(crowded)} of {len(counts)} images have more than {config.max_people} labeled people (up to "
        f"{max(crowded)}), and {config.max_people} predictions of an image count: the best possible AP is "
        f"{100 * best:.1f}. --eval.max_people {max(crowded)} counts all of them"
    ]


def describe_unmatched(predictions: Predictions) -> list[str]:
    """Labeled people without a prediction, whom errors in px cannot count, in a line."""
    num = int((~is_predicted(predictions.points_xy, predictions.scores)).sum())
    total = len(predictions.scores)
    what = "errors in px are over the others; PCK counts their keypoints as wrong"
    return [f"{num} of {total} labeled people have no prediction in their image: {what}"] if num else []


def match_boxes(predictions: Predictions, boxes: Boxes, people: People, skeleton: Skeleton) -> Int[Array, "n"]:
    """For each labeled person the box in the image whose prediction has the highest OKS; -1 where there is none."""
    by_image: dict[int, list[int]] = defaultdict(list)
    for index, image_id in enumerate(boxes.image_ids.tolist()):
        by_image[image_id].append(index)
    labels, areas = keypoints_of(people.rows), np.asarray(people.rows["area"][:], dtype=np.float64)
    chosen = np.full(len(people), -1)
    for person, image_id in enumerate(people.rows["image_id"][:]):
        indices = by_image[image_id]
        if indices:
            similarities = _oks_of(labels[person], predictions.points_xy[indices], areas[person], skeleton)
            chosen[person] = indices[int(np.argmax(similarities))]
    return chosen


def _select(predictions: Predictions, chosen: Int[Array, "n"]) -> Predictions:
    is_predicted_box = chosen >= 0
    visibility = predictions.visibility
    return Predictions(
        points_xy=predictions.points_xy[chosen] * is_predicted_box[:, None, None],
        scores=predictions.scores[chosen] * is_predicted_box[:, None],
        visibility=None if visibility is None else visibility[chosen] * is_predicted_box[:, None, None],
    )


def _oks_of(label: Array, others_xy: Array, area: float, skeleton: Skeleton) -> Array:
    return oks(label[:, :2], others_xy, np.full(len(others_xy), area), skeleton.sigmas, is_labeled(label))


def describe_unmeasured(people: People, skeleton: Skeleton) -> list[str]:
    """Labeled people whom the numbers do not count, in a line, if there are any."""
    ids = read_ground_truth(people, skeleton.num_keypoints).unmeasured_ids
    named = ", ".join(map(str, ids[:5])) + ", ..." * (len(ids) > 5)
    why = "a box without area, or an image that does not decode"
    return [f"{len(ids)} labeled people of {people.annotations.name} are not measured: {why}: {named}"] if ids else []


def explain_metrics(metrics: Metrics, predictions: Predictions, people: People, skeleton: Skeleton) -> list[str]:
    """Why metrics are -1 (nobody to measure) or 0, a line each."""
    lines = []
    for name, sizes in (("AP_M", "32^2 to 96^2"), ("AP_L", "above 96^2")):
        if metrics[name] < 0 <= metrics["AP"]:
            lines.append(f"{name}: no labeled person has an area of {sizes} px, so there is {NO_NUMBER}")
    for part in (*coco_metrics.body_parts(skeleton), "whole"):
        if metrics.get(f"{part}/AP", metrics["AP"]) < 0:
            which = "keypoint" if part == "whole" else f"keypoint of part {part}"
            where = f"nobody in {people.annotations.name} has a labeled {which} in range"
            lines.append(f"{part} AP: {where}, so there is {NO_NUMBER}")
    if metrics["AP"] == 0:
        lines.append(f"AP 0: {_why_nothing_fits(predictions, people, skeleton)}")
    return lines


def _why_nothing_fits(predictions: Predictions, people: People, skeleton: Skeleton) -> str:
    if not predictions.scores.any():
        return "no box in any image with labeled people, or no keypoint with a score: untrained weights?"
    labels, areas = keypoints_of(people.rows), np.asarray(people.rows["area"][:], dtype=np.float64)
    similarities = [
        _oks_of(label, points_xy[None], area, skeleton)[0]
        for label, points_xy, area in zip(labels, predictions.points_xy, areas, strict=True)
    ]
    return (
        f"of {len(similarities)} people none counts: their OKS is {np.median(similarities):.2f} in the median and "
        f"{max(similarities):.2f} at best, 0.5 is the least that does: untrained weights, or other keypoints?"
    )


def predictions_path(given: str | Path, name: str) -> Path:
    """The file of predictions of one of several: results.json becomes results_NAME.json."""
    file, plain = Path(given), re.sub(r"[^\w.]+", "_", name).strip("_")
    return file.with_name(f"{file.stem}_{plain}{file.suffix}") if plain else file


def format_summary(rows: dict[str, EvaluationResult], config: EvalConfig, skeleton: Skeleton) -> str:
    """The table of what was evaluated, what augmentation adds and costs, keypoints of one row, and the notes."""
    metrics = {name: result.metrics for name, result in rows.items()}
    areas = dict.fromkeys(result.area for result in rows.values())
    people_boxes = next(iter(rows.values())).people_boxes
    parts = [format_table(metrics, format_protocol(config, "; ".join(filter(None, areas)), people_boxes))]
    parts.append("\n".join(tables.format_costs(metrics, {name: result.seconds for name, result in rows.items()})))
    if skeleton.num_keypoints <= MAX_SHOWN_KEYPOINTS:
        name, result = list(rows.items())[-1]
        parts.append(f"{name}: {tables.format_keypoints(result.keypoints, skeleton)}")
    for name, result in rows.items():
        if result.visibility:
            parts.append(f"{name}: present (v > 0) and visible (v 2) keypoints\n{format_quality(result.visibility)}")
    notes = [f"{name}: {note}" for name, result in rows.items() for note in result.notes]
    return "\n\n".join(part for part in [*parts, "\n".join(notes)] if part)


def save_metrics(
    file: Path, rows: dict[str, EvaluationResult], configs: dict[str, EvalConfig], skeleton: Skeleton
) -> None:
    """Add rows, and how each was measured, to a JSON.

    Raises:
        UserError: the file is there and is no JSON.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        tree = read_tree(file, json.loads, "JSON") if file.is_file() else {}
    except UserError as error:
        raise UserError(f"{error}; move it away") from None
    for name, result in rows.items():
        more = {"seconds": result.seconds, "joints": tables.keypoint_statistics(result.keypoints, skeleton)}
        if result.visibility:
            more["visibility"] = tables.without_nan(result.visibility)
        settings = protocol_settings(configs[name], result.people_boxes)
        tree[name] = {**result.metrics, **settings, "area_used": result.area, **more}
    file.write_text(json.dumps(tree, indent=2))
