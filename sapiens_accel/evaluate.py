"""predict (with flip) -> gather -> OKS-NMS -> COCO AP.

Scores and suppression as published (sapiens, pose/mmpose/evaluation/metrics/coco_metric.py): a person's score is the
box score times the mean of the keypoint scores above 0.2, people with an OKS above 0.9 are one. Boxes here are the
ground truth's, whose score is 1: an easier number than with a detector's boxes, and labelled so wherever it is shown.
"""

import contextlib
import io
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from jaxtyping import Bool, Float, Int
from numpy import ndarray as Array
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate
from tqdm import tqdm

from sapiens_accel import distributed, geometry, heatmap
from sapiens_accel.coco import People, boxes_of
from sapiens_accel.config import DataConfig, EvalConfig
from sapiens_accel.data import EvaluationPeople, begin_worker, plainly, to_device
from sapiens_accel.heatmap import Codec
from sapiens_accel.skeleton import Skeleton

Metrics = dict[str, float]
METRICS = ("AP", "AP50", "AP75", "AP_M", "AP_L", "AR", "AR50", "AR75", "AR_M", "AR_L")


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """Keypoints of all people, in the order of their rows: image px, and scores."""

    points_xy: Float[Array, "n k 2"]
    scores: Float[Array, "n k"]


@torch.no_grad()
def predict(
    model: nn.Module,
    people: People,
    codec: Codec,
    skeleton: Skeleton,
    data: DataConfig,
    config: EvalConfig,
    *,
    device: torch.device,
    rank: int = 0,
    num_ranks: int = 1,
    gather: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    autocast: torch.dtype | None = None,
) -> Predictions:
    """Predict each person once; all ranks return all predictions.

    Args:
        gather: concatenates a tensor of equal shape on all ranks along its first dimension.
    """
    # Every rank takes as many people as the others (a sharded model's forward is a collective); the last ones again.
    mine = [index % len(people) for index in range(rank, -(-len(people) // num_ranks) * num_ranks, num_ranks)]
    loader = DataLoader(
        torch.utils.data.Subset(EvaluationPeople(people, data, skeleton), mine),
        batch_size=config.batch_size,
        num_workers=data.num_workers,
        collate_fn=default_collate,
        pin_memory=device.type == "cuda",
        worker_init_fn=begin_worker,
    )
    training, found = model.training, []
    model.eval()
    for batch in tqdm(
        plainly(loader), total=len(loader), desc="evaluating", disable=None if rank == 0 else True, leave=False
    ):
        image = to_device(batch.view.image, device)
        with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            maps = model(image).float()
            if config.flip:
                maps = (maps + heatmap.flip(model(image.flip(-1)).float(), skeleton.mirror)) / 2
        points_xy, scores = codec.decode(maps)
        found.append((points_xy.cpu().double(), scores.cpu().double(), batch.view.matrix.double()))
    model.train(training)
    points_xy, scores, matrices = (torch.cat(parts) for parts in zip(*found, strict=True))
    image_xy = torch.stack([_to_image(m, p) for m, p in zip(matrices, points_xy, strict=True)])
    rows = torch.cat([image_xy, scores[..., None]], dim=-1).to(device)
    index = torch.tensor(mine, device=device)
    return _assemble(gather(index).cpu().numpy(), gather(rows).cpu().numpy(), len(people))


def _to_image(matrix: Float[Tensor, "2 3"], points_xy: Float[Tensor, "k 2"]) -> Float[Tensor, "k 2"]:
    return torch.from_numpy(geometry.apply(geometry.invert(matrix.numpy()), points_xy.numpy()))


def _assemble(index: Int[Array, "m"], rows: Float[Array, "m k 3"], num_people: int) -> Predictions:
    """By each person's own index: what was predicted twice to fill a rank's share counts once."""
    assert set(index.tolist()) == set(range(num_people)), "a person was lost between the ranks"
    whole = np.zeros((num_people, *rows.shape[1:]))
    whole[index] = rows
    return Predictions(points_xy=whole[..., :2], scores=whole[..., 2])


def score(
    accelerator: Accelerator,
    model: nn.Module,
    people: People,
    codec: Codec,
    skeleton: Skeleton,
    data: DataConfig,
    config: EvalConfig,
) -> tuple[dict[str, float], Predictions]:
    """Metrics and predictions of all people, each rank predicting its part. All ranks must call it."""
    predictions = predict(
        model,
        people,
        codec,
        skeleton,
        data,
        config,
        device=accelerator.device,
        rank=accelerator.process_index,
        num_ranks=accelerator.num_processes,
        gather=partial(distributed.gather, accelerator),
        autocast=None if distributed.is_engine(model) else distributed.autocast_dtype(accelerator),
    )
    metrics = [coco_ap(predictions, people, skeleton, data, config) if accelerator.is_main_process else {}]
    return broadcast_object_list(metrics)[0], predictions


def coco_ap(
    predictions: Predictions, people: People, skeleton: Skeleton, data: DataConfig, config: EvalConfig
) -> dict[str, float]:
    """COCO's keypoint metrics (METRICS, 0..1) of predictions over the JSON that the people came from."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = _truth(people)  # pyright: ignore[reportAttributeAccessIssue]
        truth.createIndex()
        results: Any = _results(predictions, people, skeleton, data, config)
        evaluation = COCOeval(truth, truth.loadRes(results), "keypoints")
        evaluation.params.kpt_oks_sigmas = np.array(skeleton.sigmas)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return dict(zip(METRICS, (float(value) for value in evaluation.stats), strict=True))


def _truth(people: People) -> dict[str, Any]:
    """The JSON as pycocotools wants it, whatever it leaves out: a single category, areas and counts.

    Labelled people who are not among the rows (their picture does not decode, their box is empty) are to be ignored, as
    crowds and people without keypoints are: nobody could have predicted them.
    """
    tree = json.loads(people.annotations.read_text())
    known = set(people.rows["ann_id"][:])
    zeros = [0.0] * (3 * people.rows.features["keypoints"].shape[0])
    annotations = []
    for person in tree["annotations"]:
        box = person.get("bbox") or [0, 0, 0, 0]
        keypoints = person.get("keypoints") if person.get("id") in known else None
        annotations.append(
            {
                "id": len(annotations) + 1,  # pycocotools takes an id of 0 for no match
                "image_id": person["image_id"],
                "category_id": 1,
                "iscrowd": int(bool(person.get("iscrowd"))),
                "area": float(person.get("area", box[2] * box[3])),
                "bbox": box,
                "keypoints": keypoints or zeros,
                "num_keypoints": sum(v > 0 for v in keypoints[2::3]) if keypoints else 0,
            }
        )
    images = [{"id": image["id"]} for image in tree["images"]]
    return {"info": {}, "images": images, "annotations": annotations, "categories": [{"id": 1, "name": "person"}]}


def _results(
    predictions: Predictions, people: People, skeleton: Skeleton, data: DataConfig, config: EvalConfig
) -> list[dict[str, Any]]:
    boxes = boxes_of(people.rows)
    crops = [geometry.box_crop(box, data.box_padding, data.input_hw) for box in boxes]
    areas = np.array([crop.size_wh[0] * crop.size_wh[1] for crop in crops])  # of the padded box, as published
    scores = person_scores(predictions.scores, config.score_threshold)
    by_image: dict[int, list[int]] = defaultdict(list)
    image_ids = people.rows["image_id"]
    for index, image_id in enumerate(image_ids):
        by_image[image_id].append(index)
    results = []
    for image_id, members in by_image.items():
        chosen = np.array(members)
        kept = oks_nms(
            predictions.points_xy[chosen], scores[chosen], areas[chosen], skeleton.sigmas, config.nms_threshold
        )
        for index in chosen[kept]:
            points = np.concatenate([predictions.points_xy[index], predictions.scores[index, :, None]], axis=1)
            person = {"keypoints": points.ravel().tolist(), "score": float(scores[index])}
            results.append({"image_id": image_id, "category_id": 1, **person})
    return results


def person_scores(scores: Float[Array, "n k"], threshold: float) -> Float[Array, "n"]:
    """Mean of each person's keypoint scores above the threshold; 0 where there is none."""
    counted = scores > threshold
    return (scores * counted).sum(axis=1) / np.maximum(counted.sum(axis=1), 1)


def oks(
    points_xy: Float[Array, "k 2"],
    others_xy: Float[Array, "n k 2"],
    areas: Float[Array, "n"],
    sigmas: Sequence[float],
    counted: Bool[Array, "k"] | None = None,
) -> Float[Array, "n"]:
    """Object keypoint similarity, https://cocodataset.org/#keypoints-eval: mean exp(-d^2 / (2 area (2 sigma)^2)).

    Args:
        areas: px^2, one for each comparison.
        counted: the keypoints that count; all of them by default.
    """
    variances = (2 * np.array(sigmas)) ** 2
    squared = ((others_xy - points_xy) ** 2).sum(axis=-1)
    similarity = np.exp(-squared / (2 * variances * (areas[:, None] + np.spacing(1))))
    return similarity.mean(axis=-1) if counted is None else similarity[:, counted].mean(axis=-1)


def oks_nms(
    points_xy: Float[Array, "n k 2"],
    scores: Float[Array, "n"],
    areas: Float[Array, "n"],
    sigmas: Sequence[float],
    threshold: float,
) -> Int[Array, "m"]:
    """Indices of the people that stay, best first: of two whose OKS is above the threshold, the better one."""
    left, kept = np.argsort(-scores, kind="stable"), []
    while len(left):
        best, rest = left[0], left[1:]
        kept.append(best)
        # The mean of both areas, as the reference takes it.
        similarity = oks(points_xy[best], points_xy[rest], (areas[best] + areas[rest]) / 2, sigmas)
        left = rest[similarity <= threshold]
    return np.array(kept, dtype=int)


def how(config: EvalConfig) -> dict[str, str | bool]:
    """What a number must be read with."""
    return {"split": config.split, "boxes": "ground truth", "flip": config.flip}


def protocol(config: EvalConfig) -> str:
    """The same as a title."""
    flip = "flip test" if config.flip else "no flip test"
    return f"COCO keypoint metrics x 100, {config.split} people, ground-truth boxes, {flip}"


def table(rows: dict[str, dict[str, float]], title: str) -> str:
    """Metrics of several models as text, one line each, in percent."""
    width = max(len(name) for name in rows)
    head = f"{'':<{width}}" + "".join(f"{metric:>7}" for metric in METRICS)
    # pycocotools says -1 where there is nobody to measure, as for AP_L without a large person.
    cells = {n: [f"{100 * row[m]:.1f}" if row[m] >= 0 else "-" for m in METRICS] for n, row in rows.items()}
    lines = [f"{name:<{width}}" + "".join(f"{cell:>7}" for cell in row) for name, row in cells.items()]
    return "\n".join([title, head, *lines])
