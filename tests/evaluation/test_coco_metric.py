"""The numbers that mmpose's metrics give for the same predictions: score rule, suppression, COCO and WholeBody AP."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from coco_ap import coco_ap
from coco_metric_peer import INPUT_HW, drawn

from sapiens_accel.config.schema import DataConfig, EvalConfig
from sapiens_accel.data import people as coco
from sapiens_accel.evaluation.boxes import Boxes
from sapiens_accel.evaluation.evaluate import METRICS, Predictions
from sapiens_accel.pose.skeleton import PUBLISHED

RECORDED = json.loads((Path(__file__).parents[1] / "golden" / "coco_metric.json").read_text())["metrics"]


@pytest.mark.parametrize("num_keypoints", [17, 133])
@pytest.mark.parametrize("config", [EvalConfig(), EvalConfig(nms_threshold=1.0), EvalConfig(score_threshold=0.0)])
def test_metrics_equal_those_that_mmpose_gives(tmp_path: Path, num_keypoints: int, config: EvalConfig) -> None:
    """Within 1e-6; and each of the two rules matters to the numbers, so that being equal says something."""
    skeleton, recorded = PUBLISHED[num_keypoints], RECORDED[str(num_keypoints)]
    tree, found = drawn(num_keypoints, np.array(skeleton.sigmas))
    (tmp_path / "truth.json").write_text(json.dumps(tree))
    (tmp_path / "images").mkdir()
    for image in tree["images"]:
        picture = np.zeros((image["height"], image["width"], 3), np.uint8)
        cv2.imwrite(str(tmp_path / "images" / image["file_name"]), picture)
    people = coco.labeled_people(tmp_path, "truth.json", "images", num_keypoints, tmp_path / "cache")
    boxes = Boxes(
        root=tmp_path,
        file_names=[f"images/{image_id - 1}.jpg" for image_id in found["image_ids"]],
        image_ids=found["image_ids"],
        boxes_xywh=found["boxes_xywh"],
        scores=found["scores"],
        source="drawn",
        labeled=False,
    )
    predictions = Predictions(points_xy=found["points_xy"], scores=found["keypoint_scores"])
    data = DataConfig(input_hw=INPUT_HW)

    metrics = coco_ap(predictions, people, skeleton, data, config, boxes)

    if config != EvalConfig():
        assert abs(metrics["AP"] - recorded["AP"]) > 1e-3
    else:
        assert {name: metrics[name] for name in METRICS} == pytest.approx(recorded, abs=1e-6)
