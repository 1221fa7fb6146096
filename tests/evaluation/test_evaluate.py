"""AP against an implementation of its own, and predictions that come back where they were, on any number of ranks."""

import json
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from coco_ap import coco_ap
from torch import Tensor, nn
from upright import UprightPeople

from sapiens_accel.config.schema import DataConfig, EvalConfig
from sapiens_accel.data import people as coco
from sapiens_accel.data.people import People
from sapiens_accel.evaluation import boxes as detections
from sapiens_accel.evaluation import evaluate
from sapiens_accel.evaluation.evaluate import METRICS, Predictions
from sapiens_accel.evaluation.predict import PoseNetwork, PredictionSetup, Processes, predict
from sapiens_accel.pose import heatmap
from sapiens_accel.pose import oks as score
from sapiens_accel.pose.heatmap import Codec
from sapiens_accel.pose.skeleton import COCO17
from sapiens_accel.sources import synthetic

Array = np.ndarray
K = COCO17.num_keypoints
SIGMAS = np.array([26, 25, 25, 35, 35, 79, 79, 72, 72, 62, 62, 107, 107, 87, 87, 89, 89]) / 1000
TRAIN = ("annotations/person_keypoints_train2017.json", "train2017")
VAL = ("annotations/person_keypoints_val2017.json", "val2017")
REPOSITORY = Path(__file__).resolve().parents[2]
REAL = REPOSITORY / os.environ.get("SAPIENS_ACCEL_TEST_DATA", "../shared/data") / "coco_mini"
with_real_data = pytest.mark.skipif(not REAL.is_dir(), reason=f"no real images: {REAL} (SAPIENS_ACCEL_TEST_DATA)")
DATA = DataConfig(input_hw=(256, 192), num_workers=0)
CONFIG = EvalConfig(batch_size=4)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def crowd(tmp_path_factory: pytest.TempPathFactory) -> People:
    """48 drawn people, up to three in an image."""
    root = synthetic.write(tmp_path_factory.mktemp("evaluate") / "drawn", num_train=1, num_unlabelled=1, num_val=48)
    people = coco.labeled_people(root, *VAL, K, root.parent / "cache")
    assert len(set(people.rows["image_id"])) <= 40
    return people


def _truth(people: People) -> Array:
    return np.array([row["keypoints"] for row in people.rows], float)


def _perfect(people: People) -> Array:
    """The labels, and a place in the person's box where there is none: all people at (0, 0) would be one to the NMS."""
    rng, truth, boxes = np.random.default_rng(0), _truth(people), coco.boxes_of(people.rows)
    anywhere = boxes[:, None, :2] + rng.uniform(0, 1, (len(people), K, 2)) * boxes[:, None, 2:]
    return np.where(truth[..., 2:] > 0, truth[..., :2], anywhere)


def _predictions(points_xy: Array, scores: Array | None = None) -> Predictions:
    return Predictions(points_xy=points_xy, scores=np.full(points_xy.shape[:2], 0.9) if scores is None else scores)


def _ap(people: People, points_xy: Array, scores: Array | None = None, config: EvalConfig = CONFIG) -> dict[str, float]:
    return coco_ap(_predictions(points_xy, scores), people, COCO17, DATA, config)


# ---- COCO AP


def _assert_perfect(people: People) -> None:
    areas = np.array(people.rows["area"][:])
    # COCO's sizes; without anybody of a size, its metrics are -1.
    there = {"M": ((areas > 32**2) & (areas < 96**2)).any(), "L": (areas > 96**2).any()}
    expected = {name: 1.0 if there.get(name.split("_")[-1], True) else -1.0 for name in METRICS}
    assert expected["AP"] == 1.0
    assert _ap(people, _perfect(people)) == pytest.approx(expected, abs=1e-9)


def test_the_truth_scores_one(crowd: People) -> None:
    _assert_perfect(crowd)


@with_real_data
@pytest.mark.parametrize("source", [TRAIN, VAL])
def test_the_truth_of_real_people_scores_one(source: tuple[str, str], tmp_path: Path) -> None:
    # Crowds and people without keypoints are in the JSON, and cost nothing.
    _assert_perfect(coco.labeled_people(REAL, *source, K, tmp_path))


def test_left_for_right_is_far_from_one(crowd: People) -> None:
    swapped = _ap(crowd, _perfect(crowd)[:, list(COCO17.mirror)])
    assert swapped["AP"] < 0.3


def _reference_oks(found_xy: Array, truth: Array, area: float) -> float:
    """https://cocodataset.org/#keypoints-eval, keypoint by keypoint."""
    terms = []
    for k in range(K):
        if truth[k, 2] > 0:
            distance = np.hypot(*(found_xy[k] - truth[k, :2]))
            terms.append(np.exp(-(distance**2) / (2 * area * (2 * SIGMAS[k]) ** 2)))
    return float(np.mean(terms))


def _reference_ap(people: People, found_xy: Array, scores: Array) -> dict[str, float]:
    """Average precision and recall as COCO defines them, in plain loops.

    In each image the best-scored person takes the most similar free one above the threshold; then precision, made
    monotone, is read at 101 recalls. The number of people in an image is below COCO's limit of 20.
    """
    rows, per_threshold, recalls = people.rows.to_list(), [], []
    thresholds = [0.5 + 0.05 * i for i in range(10)]
    for threshold in thresholds:
        verdicts = []
        for image_id in {row["image_id"] for row in rows}:
            members = [i for i, row in enumerate(rows) if row["image_id"] == image_id]
            free = set(members)
            for i in sorted(members, key=lambda i: -scores[i]):
                similar = {
                    j: _reference_oks(found_xy[i], np.array(rows[j]["keypoints"]), rows[j]["area"]) for j in free
                }
                best = max(similar, key=lambda j: similar[j], default=None)
                hit = best is not None and similar[best] >= threshold
                if hit:
                    free.remove(best)
                verdicts.append((scores[i], hit))
        hits = np.cumsum([hit for _, hit in sorted(verdicts, key=lambda verdict: -verdict[0])])
        recall, precision = hits / len(rows), hits / np.arange(1, len(rows) + 1)
        levels = [max(precision[recall >= level - 1e-12], default=0.0) for level in np.linspace(0, 1, 101)]
        per_threshold.append(np.mean(levels))
        recalls.append(recall[-1])
    ap = {"AP": np.mean(per_threshold), "AP50": per_threshold[0], "AP75": per_threshold[5]}
    return {**ap, "AR": np.mean(recalls), "AR50": recalls[0], "AR75": recalls[5]}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_noise_of_known_size_gives_the_ap_of_the_definition(crowd: People, seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth, areas = _truth(crowd), np.array(crowd.rows["area"][:])
    # Each keypoint off by s of its own tolerance: the person's OKS is exp(-s^2 / 2), from 1 to 0.2.
    size = rng.uniform(0.0, 1.8, len(crowd))
    angle = rng.uniform(0, 2 * np.pi, (len(crowd), K))
    distance = size[:, None] * np.sqrt(areas)[:, None] * 2 * SIGMAS
    found_xy = truth[..., :2] + distance[..., None] * np.stack([np.cos(angle), np.sin(angle)], axis=-1)
    for i in range(len(crowd)):
        assert _reference_oks(found_xy[i], truth[i], areas[i]) == pytest.approx(np.exp(-(size[i] ** 2) / 2), abs=1e-9)
    joint_scores = rng.uniform(0, 1, (len(crowd), K))
    person_scores = np.array([row[row > 0.2].mean() for row in joint_scores])
    ours, expected = _ap(crowd, found_xy, joint_scores), _reference_ap(crowd, found_xy, person_scores)
    assert 0.15 < expected["AP"] < 0.7 and expected["AP50"] > expected["AP75"] > 0
    for name, value in expected.items():
        assert ours[name] == pytest.approx(value, abs=1e-6), name


def test_the_order_of_scores_counts(crowd: People) -> None:
    # Half the people are nowhere near: they cost precision only if they are scored above the others.
    found_xy = _truth(crowd)[..., :2]
    found_xy[::2] += 1000.0
    for better in (0, 1):
        scores = np.where(np.arange(len(crowd)) % 2 == better, 0.8, 0.4)[:, None].repeat(K, axis=1)
        ours, expected = _ap(crowd, found_xy, scores), _reference_ap(crowd, found_xy, scores[:, 0])
        assert ours["AP"] == pytest.approx(expected["AP"], abs=1e-6)
        assert (ours["AP"] > 0.5) == (better == 1)


def _without(*keys: str) -> Callable[[dict], dict]:
    return lambda tree: tree | {"annotations": [_but(person, *keys) for person in tree["annotations"]]}


def _but(tree: dict, *keys: str) -> dict:
    return {key: value for key, value in tree.items() if key not in keys}


def _of_category(number: int) -> Callable[[dict], dict]:
    def changed(tree: dict) -> dict:
        people = [person | {"category_id": number} for person in tree["annotations"]]
        return tree | {"annotations": people, "categories": [tree["categories"][0] | {"id": number}]}

    return changed


FOREIGN = [
    pytest.param(_without("num_keypoints"), id="no num_keypoints"),
    pytest.param(_without("area"), id="no area"),
    pytest.param(_without("iscrowd"), id="no iscrowd"),
    pytest.param(_without("category_id"), id="no category_id"),
    pytest.param(lambda tree: _but(tree, "categories"), id="no categories"),
    pytest.param(_of_category(0), id="category 0"),
    pytest.param(_of_category(7), id="category 7"),
]


@pytest.mark.parametrize("change", FOREIGN)
def test_whatever_can_be_trained_on_can_be_evaluated(
    crowd: People, tmp_path: Path, change: Callable[[dict], dict]
) -> None:
    (tmp_path / "annotations").mkdir()
    (tmp_path / VAL[0]).write_text(json.dumps(change(json.loads(crowd.annotations.read_text()))))
    people = coco.labeled_people(tmp_path, *VAL, K, tmp_path / "cache")
    assert len(people) == len(crowd)
    assert _ap(people, _perfect(people))["AP"] == pytest.approx(1.0, abs=1e-9)


def test_people_who_were_left_out_are_not_missed(crowd: People) -> None:
    left = replace(crowd, rows=crowd.rows.select(range(5, len(crowd))), num_skipped=5)
    assert _ap(left, _perfect(left))["AP"] == pytest.approx(1.0, abs=1e-9)
    # But it is said who they are.
    first = ", ".join(str(ann_id) for ann_id in crowd.rows["ann_id"][:5])
    (line,) = evaluate.describe_unmeasured(left, COCO17)
    assert line.startswith("5 labeled people") and line.endswith(f": {first}")
    assert evaluate.describe_unmeasured(crowd, COCO17) == []


# ---- OKS, suppression, scores


def test_oks_by_hand() -> None:
    truth = np.array([[10.0, 20.0], [30.0, 40.0], [50.0, 60.0]])
    found = np.array([[13.0, 24.0], [30.0, 40.0], [50.0, 68.0]])  # off by 5, 0 and 8 px
    sigmas = (0.05, 0.1, 0.1)
    # Variances (2 sigma)^2: 0.01, 0.04, 0.04; area 2500: 25 / 50 = 0.5, 0, 64 / 200 = 0.32.
    terms = [np.exp(-0.5), 1.0, np.exp(-0.32)]
    assert score.oks(truth, found[None], np.array([2500.0]), sigmas) == pytest.approx(np.mean(terms), abs=1e-12)
    counted = np.array([True, False, True])
    both = score.oks(truth, np.stack([found, truth]), np.array([2500.0, 2500.0]), sigmas, counted)
    assert both == pytest.approx([(terms[0] + terms[2]) / 2, 1.0], abs=1e-12)
    # Half the area: twice the exponents.
    halved = score.oks(truth, found[None], np.array([1250.0]), sigmas)
    assert halved == pytest.approx((np.exp(-1) + 1 + np.exp(-0.64)) / 3, abs=1e-12)


def test_nms_drops_a_duplicate_and_keeps_the_others_best_first() -> None:
    rng = np.random.default_rng(0)
    one, other = rng.uniform(0, 100, (2, K, 2))
    area = 80.0 * 80.0
    # Off by s tolerances at every keypoint: OKS exp(-s^2 / 2) is 0.92 and 0.88.
    step = 80.0 * 2 * SIGMAS[:, None] * np.array([1.0, 0.0])
    near, apart = one + np.sqrt(-2 * np.log(0.92)) * step, one - np.sqrt(-2 * np.log(0.88)) * step
    points = np.stack([one, other, near, apart])
    kept = score.oks_nms(points, np.array([0.5, 0.9, 0.7, 0.6]), np.full(4, area), COCO17.sigmas, 0.9)
    # `one` falls to `near`, not to `apart`; `apart` and `near` are further from each other than either from `one`.
    assert kept.tolist() == [1, 2, 3]
    kept = score.oks_nms(points, np.array([0.8, 0.9, 0.7, 0.6]), np.full(4, area), COCO17.sigmas, 0.9)
    assert kept.tolist() == [1, 0, 3]
    assert score.oks_nms(points, np.arange(4.0), np.full(4, area), COCO17.sigmas, 1.0).tolist() == [3, 2, 1, 0]
    # Unequal areas: the mean of both counts.
    areas = np.array([area * 1.9, 1.0, area * 0.1, 1.0])
    assert len(score.oks_nms(points[[0, 2]], np.array([1.0, 0.5]), areas[[0, 2]], COCO17.sigmas, 0.919)) == 1
    assert len(score.oks_nms(points[[0, 2]], np.array([1.0, 0.5]), areas[[0, 2]], COCO17.sigmas, 0.921)) == 2
    assert score.oks_nms(points[:0], np.zeros(0), np.zeros(0), COCO17.sigmas, 0.9).tolist() == []


def test_a_person_predicted_twice_counts_once(crowd: People) -> None:
    # Everybody of an image is predicted as its first person: one is right, and the others are dropped as duplicates,
    # so precision stays 1 and recall is the share of images.
    truth, image_ids = _truth(crowd), list(crowd.rows["image_id"])
    first = [image_ids.index(image_id) for image_id in image_ids]
    metrics = _ap(crowd, truth[first, :, :2])
    share = len(set(image_ids)) / len(image_ids)
    assert metrics["AR"] == pytest.approx(share, abs=1e-9)
    assert metrics["AP"] == pytest.approx(sum(level <= share + 1e-12 for level in np.linspace(0, 1, 101)) / 101)
    apart = _ap(crowd, truth[first, :, :2], config=replace(CONFIG, nms_threshold=1.0))
    assert apart["AP"] < metrics["AP"]


def test_person_scores() -> None:
    scores = np.array([[0.1, 0.2, 0.3, 0.9], [0.2, 0.2, 0.0, -1.0], [0.5, 0.5, 0.5, 0.5]])
    assert score.person_scores(scores, 0.2) == pytest.approx([0.6, 0.0, 0.5], abs=1e-12)


# ---- predict


@dataclass(frozen=True)
class Stage:
    """People whose images say by their colors who it is and which side is left; red names the person."""

    people: People
    truth: Array  # [n, K, 2], image px
    input_xy: Tensor  # [n, K, 2], input px of the upright crop
    codec: Codec


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    """Seven people of known keypoints in one image each, of unlike sizes."""
    root, rng = tmp_path_factory.mktemp("stage"), np.random.default_rng(3)
    (root / "val2017").mkdir()
    (root / "annotations").mkdir()
    images, annotations = [], []
    for i in range(7):
        x, y, w, h = 12.5 + 3 * i, 20.25 + i, 60.0 + 15 * i, 150.0 - 11 * i
        picture = np.full((220, 230, 3), 255, np.uint8)
        picture[..., 0] = 20 + 30 * i
        picture[:, : round(x + w / 2), 1] = 0
        cv2.imwrite(str(root / "val2017" / f"{i}.png"), picture[..., ::-1])
        points = rng.uniform([x + 1, y + 1], [x + w - 1, y + h - 1], (K, 2))
        images.append({"id": 100 + i, "file_name": f"{i}.png", "width": 230, "height": 220})
        person = {"id": 50 - i, "image_id": 100 + i, "category_id": 1, "iscrowd": 0, "num_keypoints": K}
        keypoints = np.column_stack([points, np.full(K, 2.0)]).ravel().tolist()
        annotations.append({**person, "area": w * h, "bbox": [x, y, w, h], "keypoints": keypoints})
    categories = [{"id": 1, "name": "person", "keypoints": list(COCO17.names)}]
    tree = {"images": images, "annotations": annotations, "categories": categories}
    (root / VAL[0]).write_text(json.dumps(tree))
    people = coco.labeled_people(root, *VAL, K, root / "cache")
    samples = UprightPeople(people, DATA, COCO17)
    input_xy = torch.stack([samples[i].points_xy for i in range(7)])
    return Stage(people, _truth(people)[..., :2], input_xy, Codec(input_hw=(256, 192), heatmap_hw=(64, 48), sigma=2))


class Seer(nn.Module):
    """Looks at the picture's colors and answers with the Gaussians that a perfect network would give.

    In a mirrored image it sees a left wrist as a right one, as networks do.
    """

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.stage, self.num_seen, self.was_training = stage, [], []

    def forward(self, image: Tensor) -> Tensor:
        self.num_seen.append(len(image))
        self.was_training.append(self.training)
        height, width = image.shape[-2:]
        who = ((image[:, 0, height // 2, width // 2].float() - 20) / 30).round().long()
        left, right = (image[:, 1, height // 2, x].float() for x in (width // 3, 2 * width // 3))
        points = self.stage.input_xy[who]
        mirrored = points[:, list(COCO17.mirror)] * torch.tensor([-1.0, 1.0]) + torch.tensor([width - 1.0, 0.0])
        points = torch.where((left > right)[:, None, None], mirrored, points)
        scale = 0.5 + who.float() / 20  # a peak of its own for everybody
        return self.stage.codec.encode(points, torch.ones(points.shape[:2]))[0] * scale[:, None, None, None]


def _predict(model: nn.Module, stage: Stage, config: EvalConfig = CONFIG, **ranks: Any) -> Predictions:
    network, boxes = PoseNetwork(model=model, codec=stage.codec), detections.ground_truth_boxes(stage.people)
    setup = PredictionSetup(skeleton=COCO17, data=DATA, config=config, device=CPU)
    return predict([network], boxes, setup, Processes(**ranks))


@pytest.mark.parametrize("flip", [True, False])
def test_predictions_come_back_in_image_pixels_in_the_order_of_the_rows(stage: Stage, flip: bool) -> None:
    model = Seer(stage)
    predictions = _predict(model, stage, replace(CONFIG, flip=flip))
    assert predictions.points_xy.shape == (7, K, 2)
    assert np.abs(predictions.points_xy - stage.truth).max() < 0.2
    # The score is the raw peak: at most 1 of this person's scale, and lower where the point is between two pixels.
    scale = 0.5 + np.arange(7) / 20
    assert (predictions.scores <= scale[:, None] + 1e-6).all() and (predictions.scores > 0.9 * scale[:, None]).all()
    assert model.num_seen == ([4, 4, 3, 3] if flip else [4, 3])
    assert not any(model.was_training) and model.training
    assert _ap(stage.people, predictions.points_xy, predictions.scores)["AP"] == 1.0


def test_the_flip_test_averages_maps(stage: Stage) -> None:
    class Forgetful(Seer):
        """Says nothing of mirrored images."""

        def forward(self, image: Tensor) -> Tensor:
            mirrored = image[:, 1, 128, 64] > image[:, 1, 128, 128]
            return super().forward(image) * ~mirrored[:, None, None, None]

    once = _predict(Seer(stage), stage, replace(CONFIG, flip=False))
    half = _predict(Forgetful(stage), stage)
    assert half.scores == pytest.approx(once.scores / 2, abs=1e-6)
    assert np.abs(half.points_xy - once.points_xy).max() < 1e-3


def test_the_flip_test_of_a_symmetric_network_changes_nothing(stage: Stage) -> None:
    class Symmetric(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Conv2d(3, 8, 5, 4, 1), nn.SiLU(), nn.Conv2d(8, K, 3, padding=1))

        def forward(self, image: Tensor) -> Tensor:
            maps, other = (self.net(picture.float() / 255) for picture in (image, image.flip(-1)))
            return (maps + heatmap.flip(other, COCO17.mirror)) / 2

    once, twice = (_predict(Symmetric(), stage, replace(CONFIG, flip=flip)) for flip in (False, True))
    assert np.abs(twice.points_xy - once.points_xy).max() < 1e-5
    assert np.abs(twice.scores - once.scores).max() < 1e-5
    assert once.points_xy.std() > 1


class Ranks:
    """As many ranks as threads; `gather` concatenates as a collective does."""

    def __init__(self, num: int) -> None:
        self.num, self.barrier = num, threading.Barrier(num, timeout=60)
        self.slots: list[Tensor] = [torch.empty(0)] * num

    def gather(self, rank: int) -> Callable[[Tensor], Tensor]:
        def gathered(tensor: Tensor) -> Tensor:
            self.slots[rank] = tensor
            self.barrier.wait()
            assert len({slot.shape for slot in self.slots}) == 1, "a collective needs equal shapes"
            whole = torch.cat(self.slots)
            self.barrier.wait()
            return whole

        return gathered

    def run(self, work: Callable[[int], None]) -> None:
        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(self.num)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


@pytest.mark.parametrize("num_ranks", [2, 3, 4, 9])
def test_ranks_predict_everybody_once(stage: Stage, num_ranks: int) -> None:
    # 7 people on 2, 3 or 4 ranks are padded by 1 to 2, and 9 ranks have more places than people.
    alone = _predict(Seer(stage), stage)
    models, found = [Seer(stage) for _ in range(num_ranks)], {}
    ranks = Ranks(num_ranks)

    def work(rank: int) -> None:
        options = {"rank": rank, "num": num_ranks, "gather": ranks.gather(rank)}
        found[rank] = _predict(models[rank], stage, replace(CONFIG, batch_size=2), **options)

    ranks.run(work)
    assert sorted(found) == list(range(num_ranks))
    for predictions in found.values():
        # 1e-5: kernels sum in another order for another batch size.
        assert np.abs(predictions.points_xy - alone.points_xy).max() < 1e-5
        assert np.abs(predictions.scores - alone.scores).max() < 1e-6
    # Every rank works the same number of forwards, on about a share of the people, twice for the flip.
    assert len({tuple(model.num_seen) for model in models}) == 1
    assert sum(models[0].num_seen) == 2 * -(-7 // num_ranks)


def test_an_even_share_is_not_padded(stage: Stage) -> None:
    model = Seer(stage)
    with pytest.raises(AssertionError, match="a person was lost"):
        _predict(model, stage, rank=0, num=7)
    assert sum(model.num_seen) == 2


# ---- What is printed


def test_the_table_shows_percent_of_every_metric() -> None:
    rows = {"phase1": {name: 0.1 * i for i, name in enumerate(METRICS)}, "ssl": dict.fromkeys(METRICS, 0.70049)}
    title, head, first, second = evaluate.format_table(rows, evaluate.format_protocol(CONFIG)).splitlines()
    assert title == "COCO keypoint metrics x 100, val people, ground-truth boxes, flip test, area: as annotated"
    assert head.split() == list(METRICS)
    assert first.split() == ["phase1", *(f"{10.0 * i:.1f}" for i in range(len(METRICS)))]
    assert second.split() == ["ssl", *["70.0"] * len(METRICS)]
    assert "no flip test" in evaluate.format_protocol(replace(CONFIG, flip=False))
