"""People, detector's boxes and keypoints drawn from a seed; and what mmpose's metrics make of them.

    PEER_PYTHON tests/coco_metric_peer.py > tests/golden/coco_metric.json

regenerates the numbers with an interpreter that has mmpose 1.3.2 and xtcocotools (beside mmengine, mmcv-lite, numpy<2,
munkres, matplotlib). Nothing of sapiens_accel is imported: that environment need not have what it needs.
"""

import contextlib
import io
import json
import platform
import sys
import tempfile
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

NUM_IMAGES, WIDTH, HEIGHT = 12, 640, 480
INPUT_HW = (256, 192)
CUTS = (0, 17, 23, 91, 112, 133)
LISTS = ("keypoints", "foot_kpts", "face_kpts", "lefthand_kpts", "righthand_kpts")
STATS = ("AP", "AP50", "AP75", "AP_M", "AP_L", "AR", "AR50", "AR75", "AR_M", "AR_L")


def drawn(num_keypoints: int, sigmas: np.ndarray) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """A COCO tree, and detections: image_ids, boxes_xywh, scores [n], points_xy [n, k, 2], keypoint_scores [n, k].

    Each person is found up to three times, so closely that suppression has something to decide, with errors from none
    to several of OKS's own widths; an image has more detections than count; some keypoints score below 0.2.
    """
    rng = np.random.default_rng(num_keypoints)
    images = [{"id": i + 1, "width": WIDTH, "height": HEIGHT, "file_name": f"{i}.jpg"} for i in range(NUM_IMAGES)]
    annotations, found = [], []
    for image in images:
        for _ in range(9 if image["id"] == 1 else 3):
            size = rng.uniform((30, 60), (160, 300))
            box = np.concatenate([rng.uniform((0, 0), (WIDTH, HEIGHT) - size), size])
            points = box[:2] + rng.uniform(0, 1, (num_keypoints, 2)) * size
            visible = rng.integers(0, 3, num_keypoints)
            area = float(size.prod() * rng.uniform(0.4, 0.7))
            labels = np.concatenate([points, visible[:, None]], axis=1) * (visible > 0)[:, None]
            lists = {key: labels[a:b].ravel().tolist() for key, a, b in zip(LISTS, CUTS, CUTS[1:], strict=False)}
            lists = {key: numbers for key, numbers in lists.items() if numbers}
            valid = {key.replace("kpts", "valid"): True for key in LISTS[1:]} if num_keypoints == CUTS[-1] else {}
            annotations.append(
                {"id": len(annotations) + 1, "image_id": image["id"], "category_id": 1, "iscrowd": 0, "area": area,
                 "bbox": box.tolist(), "num_keypoints": int((visible[:17] > 0).sum()), **lists, **valid}
            )  # fmt: skip
            error = rng.uniform(0, 1.8)
            for _ in range(3 if image["id"] == 1 else rng.integers(0, 4)):
                noise = rng.standard_normal((num_keypoints, 2)) * (2 * sigmas * area**0.5)[:, None]
                found.append(
                    (image["id"], box + rng.normal(0, 4, 4), rng.uniform(0.05, 1), points + error * noise * 0.5,
                     rng.uniform(0, 1, num_keypoints))
                )  # fmt: skip
    keys = ("image_ids", "boxes_xywh", "scores", "points_xy", "keypoint_scores")
    detections = {key: np.array(column) for key, column in zip(keys, zip(*found, strict=True), strict=True)}
    detections["points_xy"] = detections["points_xy"].round(3)  # as results are written
    tree = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "person"}]}
    return tree, detections


def _measured(num_keypoints: int) -> dict[str, float]:
    # Not where the tests run.
    parse_pose_metainfo = import_module("mmpose.datasets.datasets.utils").parse_pose_metainfo
    transforms, metrics = import_module("mmpose.datasets.transforms"), import_module("mmpose.evaluation.metrics")
    whole = num_keypoints == CUTS[-1]
    name = "coco_wholebody" if whole else "coco"
    meta = parse_pose_metainfo({"from_file": f"configs/_base_/datasets/{name}.py"})
    tree, found = drawn(num_keypoints, np.array(meta["sigmas"]))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "truth.json"
        file.write_text(json.dumps({**tree, "info": {}, "licenses": []}))
        metric = (metrics.CocoWholeBodyMetric if whole else metrics.CocoMetric)(ann_file=str(file))
        metric.dataset_meta = meta
        resized = transforms.TopdownAffine(input_size=INPUT_HW[::-1], use_udp=True)
        for index in range(len(found["scores"])):
            x, y, w, h = found["boxes_xywh"][index]
            person = {"bbox": np.array([[x, y, x + w, y + h]]), "img": np.zeros((8, 8, 3), np.uint8)}
            person = resized(transforms.GetBBoxCenterScale(padding=1.25)(person))
            sample = {
                "id": index,
                "img_id": int(found["image_ids"][index]),
                "pred_instances": {
                    "keypoints": found["points_xy"][index][None],
                    "keypoint_scores": found["keypoint_scores"][index][None],
                },
                "gt_instances": {
                    "bbox_scores": found["scores"][index : index + 1],
                    "bbox_scales": person["bbox_scale"],
                },
            }
            metric.process([], [sample])
        values = metric.evaluate(len(found["scores"]))
    return dict(zip(STATS, (float(value) for value in values.values()), strict=True))


if __name__ == "__main__":
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        numbers = {str(num): _measured(num) for num in (17, 133)}
    packages = ("mmpose", "mmengine", "mmcv-lite", "xtcocotools", "numpy")
    versions = {"python": platform.python_version(), **{name: version(name) for name in packages}}
    command = "PEER_PYTHON tests/coco_metric_peer.py > tests/golden/coco_metric.json"
    json.dump({"command": command, "versions": versions, "metrics": numbers}, sys.stdout, indent=2)
    print()
