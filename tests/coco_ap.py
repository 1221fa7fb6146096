"""COCO's keypoint metrics of predictions, in the labeled people's boxes or in others."""

from sapiens_accel.config.schema import DataConfig, EvalConfig
from sapiens_accel.data.people import People
from sapiens_accel.evaluation.boxes import Boxes, ground_truth_boxes
from sapiens_accel.evaluation.coco_metrics import Metrics, coco_results, compute_metrics
from sapiens_accel.evaluation.predict import Predictions
from sapiens_accel.pose.skeleton import Skeleton


def coco_ap(
    predictions: Predictions,
    people: People,
    skeleton: Skeleton,
    data: DataConfig,
    config: EvalConfig,
    boxes: Boxes | None = None,
) -> Metrics:
    results, _ = coco_results(predictions, boxes or ground_truth_boxes(people), skeleton, data, config)
    return compute_metrics(results, people, skeleton, config.backend)[0]
