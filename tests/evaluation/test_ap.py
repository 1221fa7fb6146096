"""AP by part and by detector's boxes: the truth given back, the definition in plain loops, pycocotools by hand."""

import contextlib
import io
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from coco_ap import coco_ap
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from sapiens_accel.config.schema import DataConfig, EvalConfig
from sapiens_accel.data import people as coco
from sapiens_accel.data.people import People
from sapiens_accel.errors import UserError
from sapiens_accel.evaluation import boxes as detections
from sapiens_accel.evaluation import coco_metrics, evaluate, tables
from sapiens_accel.evaluation.boxes import Boxes
from sapiens_accel.evaluation.coco_metrics import METRICS
from sapiens_accel.evaluation.evaluate import Predictions
from sapiens_accel.pose import oks as score
from sapiens_accel.pose.skeleton import COCO17, WHOLEBODY133, Skeleton

Array = np.ndarray
REPOSITORY = Path(__file__).resolve().parents[2]
REAL = REPOSITORY / os.environ.get("SAPIENS_ACCEL_TEST_DATA", "../shared/data") / "coco_wholebody_mini"
pytestmark = pytest.mark.skipif(not REAL.is_dir(), reason=f"no real images: {REAL} (SAPIENS_ACCEL_TEST_DATA)")
OF_17 = "annotations/person_keypoints_val2017.json"
OF_133 = "annotations/coco_wholebody_val_v1.0.json"
DETECTED = REAL / "person_detection_results" / "COCO_val2017_detections_AP_H_56_person.json"
DATA = DataConfig(input_hw=(256, 192), num_workers=0)
CONFIG = EvalConfig()
PARTS = ("body", "feet", "face", "left_hand", "right_hand", "hands")


def _people(annotations: str, tmp_path: Path) -> People:
    return coco.labeled_people(REAL, annotations, "val2017", 133 if annotations == OF_133 else 17, tmp_path)


def _labels(people: People) -> Array:
    return coco.keypoints_of(people.rows)


def _overlap(a: Array, b: Array) -> float:
    width, height = np.minimum(a[:2] + a[2:], b[:2] + b[2:]) - np.maximum(a[:2], b[:2])
    both = max(width, 0) * max(height, 0)
    return both / (a[2] * a[3] + b[2] * b[3] - both)


def _given_back(people: People, boxes: Boxes) -> Predictions:
    """In each person's own box its labels, with 0.9; in boxes of nobody anything, with 0.3.

    Unlabeled points are somewhere in the box. A detector's box of a person is the free one that overlaps most.
    """
    rng, labels, own = np.random.default_rng(0), _labels(people), coco.boxes_of(people.rows)
    k, image_ids = labels.shape[1], people.rows["image_id"][:]
    points_xy = boxes.boxes_xywh[:, None, :2] + rng.uniform(0, 1, (len(boxes), k, 2)) * boxes.boxes_xywh[:, None, 2:]
    scores = np.full((len(boxes), k), 0.3)
    free = set(range(len(boxes)))
    for i in range(len(people)):
        here = [j for j in free if boxes.image_ids[j] == image_ids[i]]
        best = i if boxes.labeled else max(here, key=lambda j: _overlap(boxes.boxes_xywh[j], own[i]))
        free.remove(best)
        points_xy[best] = np.where(labels[i, :, 2:] > 0, labels[i, :, :2], points_xy[best])
        # The best box of a person need not be a sure one.
        scores[best] = 0.9 / (boxes.scores[best] + 1e-3)
    return Predictions(points_xy=points_xy, scores=scores)


def _measure(people: People, predictions: Predictions, boxes: Boxes, skeleton: Skeleton) -> dict[str, float]:
    return coco_ap(predictions, people, skeleton, DATA, CONFIG, boxes)


# ---- The truth given back


@pytest.mark.parametrize("given", ["gt", str(DETECTED)], ids=["own boxes", "detector"])
@pytest.mark.parametrize(("annotations", "skeleton"), [(OF_17, COCO17), (OF_133, WHOLEBODY133)], ids=["17", "133"])
def test_the_truth_scores_one_in_any_boxes(tmp_path: Path, given: str, annotations: str, skeleton: Skeleton) -> None:
    people = _people(annotations, tmp_path)
    boxes = detections.load_boxes(given, people)
    metrics = _measure(people, _given_back(people, boxes), boxes, skeleton)
    assert [metrics[name] for name in METRICS] == pytest.approx([1.0] * len(METRICS), abs=1e-9)
    parts = PARTS if skeleton is WHOLEBODY133 else ()
    assert set(metrics) == {*METRICS, *(f"{part}/{name}" for part in parts for name in METRICS)}
    for part in parts:
        # Everybody is found. Who has no labeled hand is to be ignored, but COCO lets the hand that is predicted for
        # them take the place of another such person, whose own one is then a false positive.
        assert metrics[f"{part}/AR"] == pytest.approx(1.0, abs=1e-9)
        assert metrics[f"{part}/AP"] == pytest.approx(1.0, abs=0.15 if "hand" in part or part == "face" else 1e-9)


def test_a_part_is_scored_by_its_own_keypoints_alone(tmp_path: Path) -> None:
    people = _people(OF_133, tmp_path)
    boxes = detections.ground_truth_boxes(people)
    perfect = _given_back(people, boxes)
    whole = {part: _measure(people, perfect, boxes, WHOLEBODY133)[f"{part}/AP"] for part in PARTS}
    places = coco_metrics.body_parts(WHOLEBODY133)
    assert [places[part].stop - places[part].start for part in PARTS[:-1]] == [17, 6, 68, 21, 21]
    for part, place in places.items():
        moved = perfect.points_xy.copy()
        moved[:, place] += 500.0
        found = _measure(people, replace(perfect, points_xy=moved), boxes, WHOLEBODY133)
        assert found[f"{part}/AP"] == 0.0
        assert found["AP"] < 1
        others = {name for name in PARTS if name != part and not (name == "hands" and "hand" in part)}
        assert {name: found[f"{name}/AP"] for name in others} == {name: whole[name] for name in others}
        if "hand" in part:
            assert found["hands/AP"] == pytest.approx((whole["left_hand"] + whole["right_hand"] - whole[part]) / 2)


def test_whole_body_labels_are_the_five_lists_in_the_skeletons_order(tmp_path: Path) -> None:
    people = _people(OF_133, tmp_path)
    tree = json.loads((REAL / OF_133).read_text())
    person = next(one for one in tree["annotations"] if one["id"] == people.rows["ann_id"][0])
    label = _labels(people)[0]
    at = WHOLEBODY133.names.index
    assert label[at("left_big_toe")].tolist() == person["foot_kpts"][:3]
    assert label[at("face-0")].tolist() == person["face_kpts"][:3]
    assert label[at("left_hand_root")].tolist() == person["lefthand_kpts"][:3]
    assert label[at("right_pinky_finger4")].tolist() == person["righthand_kpts"][-3:]


# ---- A detector's boxes, against the rules in plain loops


def _noisy(people: People, boxes: Boxes, skeleton: Skeleton, seed: int) -> Predictions:
    """Predictions of every box around the person it overlaps most, so that people are found many times over."""
    rng, labels, own = np.random.default_rng(seed), _labels(people), coco.boxes_of(people.rows)
    image_ids, areas = people.rows["image_id"][:], people.rows["area"][:]
    points = np.zeros((len(boxes), skeleton.num_keypoints, 2))
    for j in range(len(boxes)):
        here = [i for i in range(len(people)) if image_ids[i] == boxes.image_ids[j]]
        i = max(here, key=lambda i: _overlap(boxes.boxes_xywh[j], own[i]))
        label = np.where(labels[i, :, 2:] > 0, labels[i, :, :2], own[i, :2] + own[i, 2:] / 2)
        size = rng.uniform(0.05, 1.2) * np.sqrt(areas[i]) * 2 * np.array(skeleton.sigmas)[:, None]
        points[j] = label + size * rng.normal(size=label.shape)
    scores = rng.uniform(0, 1, points.shape[:2])
    scores[:3] = 0.15  # nothing above the threshold: a person's score of 0
    return Predictions(points_xy=points, scores=scores)


def _rules_by_hand(predictions: Predictions, boxes: Boxes, skeleton: Skeleton) -> list[tuple[int, int, float]]:
    """Image, box and score of what stays: the published rules, person by person and keypoint by keypoint."""
    found = []
    for j in range(len(boxes)):
        good = [s for s in predictions.scores[j] if s > 0.2]
        _, _, w, h = boxes.boxes_xywh[j] * 1.25
        w, h = max(w, h * 192 / 256), max(h, w * 256 / 192)
        found.append((boxes.scores[j] * sum(good) / len(good) if good else 0.0, j, w * h))
    stay: list[tuple[int, int, float]] = []
    areas = {j: area for _, j, area in found}
    for value, j, area in sorted(found, key=lambda one: -one[0]):
        kept = [other for image, other, _ in stay if image == boxes.image_ids[j]]
        alike = False
        for other in kept:
            terms = []
            for k, sigma in enumerate(skeleton.sigmas):
                dx, dy = predictions.points_xy[j, k] - predictions.points_xy[other, k]
                mean_area = (area + areas[other]) / 2 + np.spacing(1)
                terms.append(np.exp(-(dx**2 + dy**2) / ((2 * sigma) ** 2 * mean_area * 2)))
            alike = alike or sum(terms) / len(terms) > 0.9
        if not alike:
            stay.append((int(boxes.image_ids[j]), j, value))
    best = {image: [one for one in stay if one[0] == image][:20] for image in set(boxes.image_ids.tolist())}
    return sorted(one for several in best.values() for one in several)


@pytest.mark.parametrize("seed", [0, 1])
def test_what_stays_of_a_detectors_boxes_is_what_the_published_rules_say(tmp_path: Path, seed: int) -> None:
    people = _people(OF_17, tmp_path)
    boxes = detections.detector_boxes(DETECTED, people)
    predictions = _noisy(people, boxes, COCO17, seed)
    found, chosen = coco_metrics.coco_results(predictions, boxes, COCO17, DATA, CONFIG)
    ours = sorted((r["image_id"], int(j), r["score"]) for r, j in zip(found, chosen, strict=True))
    expected = _rules_by_hand(predictions, boxes, COCO17)
    assert [one[:2] for one in ours] == [one[:2] for one in expected]
    assert [one[2] for one in ours] == pytest.approx([one[2] for one in expected], abs=1e-12)
    counts = [sum(one[0] == image for one in ours) for image in set(boxes.image_ids.tolist())]
    assert max(counts) == 20 and len(ours) < len(boxes), "both suppression and the limit of 20 have cut"
    assert any(one[2] == 0 for one in ours) or len(ours) < len(boxes) - 3


def _by_hand(annotations: Path, file: Path, skeleton: Skeleton) -> list[float]:
    """pycocotools over the files as they are."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(annotations))
        evaluation = COCOeval(truth, truth.loadRes(str(file)), "keypoints")
        evaluation.params.kpt_oks_sigmas = np.array(skeleton.sigmas)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [float(value) for value in evaluation.stats]


def test_the_saved_file_scores_the_same_by_hand(tmp_path: Path) -> None:
    people = _people(OF_17, tmp_path)
    boxes = detections.detector_boxes(DETECTED, people)
    predictions = _noisy(people, boxes, COCO17, 0)
    found, _ = coco_metrics.coco_results(predictions, boxes, COCO17, DATA, CONFIG)
    file = tmp_path / "folder" / "results.json"
    coco_metrics.save_results(found, file, people, COCO17)
    ours = coco_metrics.compute_metrics(found, people, COCO17, "pycocotools")[0]
    assert _by_hand(REAL / OF_17, file, COCO17) == pytest.approx([ours[name] for name in METRICS], abs=1e-12)
    assert 0.1 < ours["AP"] < 0.9
    saved = json.loads(file.read_text())
    assert all(set(person) == {"image_id", "category_id", "keypoints", "score"} for person in saved)
    assert {person["category_id"] for person in saved} == {1} and len(saved[0]["keypoints"]) == 51


def _as_coco(tree: dict[str, Any], key: str) -> dict[str, Any]:
    """One list of COCO-WholeBody as plain COCO keypoints."""
    people = [{**one, "keypoints": one[key], "num_keypoints": sum(v > 0 for v in one[key][2::3])}
              for one in tree["annotations"]]  # fmt: skip
    return {**tree, "annotations": people}


def test_the_saved_file_of_133_has_the_five_lists_and_each_scores_the_same_by_hand(tmp_path: Path) -> None:
    people = _people(OF_133, tmp_path)
    boxes = detections.ground_truth_boxes(people)
    found, _ = coco_metrics.coco_results(_noisy(people, boxes, WHOLEBODY133, 3), boxes, WHOLEBODY133, DATA, CONFIG)
    ours = coco_metrics.compute_metrics(found, people, WHOLEBODY133, "pycocotools")[0]
    coco_metrics.save_results(found, tmp_path / "whole.json", people, WHOLEBODY133)
    saved, tree = (json.loads(path.read_text()) for path in (tmp_path / "whole.json", REAL / OF_133))
    keys = ("keypoints", "foot_kpts", "face_kpts", "lefthand_kpts", "righthand_kpts")
    assert [len(saved[0][key]) for key in keys] == [51, 18, 204, 63, 63]
    places = coco_metrics.body_parts(WHOLEBODY133)
    for part, key in zip(PARTS, keys, strict=False):
        (tmp_path / "truth.json").write_text(json.dumps(_as_coco(tree, key)))
        (tmp_path / "part.json").write_text(json.dumps([{**one, "keypoints": one[key]} for one in saved]))
        skeleton = replace_sigmas(WHOLEBODY133, places[part])
        by_hand = _by_hand(tmp_path / "truth.json", tmp_path / "part.json", skeleton)
        # Medium and large differ where a result's size is its body's: the rest is the same.
        same = [i for i, name in enumerate(METRICS) if name[-2:] not in ("_M", "_L")]
        assert [by_hand[i] for i in same] == pytest.approx([ours[f"{part}/{METRICS[i]}"] for i in same], abs=1e-12)
    assert len({round(ours[f"{part}/AP"], 6) for part in PARTS}) > 3


def replace_sigmas(skeleton: Skeleton, place: slice) -> Skeleton:
    sigmas = skeleton.sigmas[place]
    names = tuple(f"n{i}" for i in range(len(sigmas)))
    return Skeleton(names=names, mirror=tuple(range(len(names))), sigmas=sigmas, upper=(), edges=())


def test_any_number_of_keypoints_with_sigmas_of_its_own(tmp_path: Path) -> None:
    tree = json.loads((REAL / OF_17).read_text())
    keep = [0, 5, 6, 9, 16]
    for person in tree["annotations"]:
        points = np.array(person["keypoints"]).reshape(-1, 3)[keep]
        person |= {"keypoints": points.ravel().tolist(), "num_keypoints": int((points[:, 2] > 0).sum())}
    (tmp_path / "five.json").write_text(json.dumps(tree))
    people = coco.labeled_people(tmp_path, "five.json", "val2017", 5, tmp_path / "cache")
    people = replace(people, root=REAL)
    boxes = detections.ground_truth_boxes(people)
    widths = {}
    for sigma in (0.02, 0.1):
        names = tuple("abcde")
        five = Skeleton(names=names, mirror=(0, 1, 2, 3, 4), sigmas=(sigma,) * 5, upper=(), edges=())
        perfect = _given_back(people, boxes)
        assert _measure(people, perfect, boxes, five)["AP"] == pytest.approx(1.0, abs=1e-9)
        off = np.sqrt(np.array(people.rows["area"][:]))[:, None, None] * 0.04
        widths[sigma] = _measure(people, replace(perfect, points_xy=perfect.points_xy + off), boxes, five)
    # Off by 0.04 sqrt(2) sqrt(area): an OKS of exp(-0.0032 / 8 / sigma^2), 0.37 and 0.96.
    assert widths[0.02]["AP50"] == 0.0 and widths[0.1]["AP"] == pytest.approx(1.0, abs=1e-9)


def test_faster_coco_eval_gives_the_same_six_digits(tmp_path: Path) -> None:
    pytest.importorskip("faster_coco_eval", reason="not installed: faster-coco-eval")
    for annotations, skeleton in ((OF_17, COCO17), (OF_133, WHOLEBODY133)):
        people = _people(annotations, tmp_path)
        boxes = detections.detector_boxes(DETECTED, people)
        for seed in range(3):
            found, _ = coco_metrics.coco_results(_noisy(people, boxes, skeleton, seed), boxes, skeleton, DATA, CONFIG)
            plain, fast = (
                coco_metrics.compute_metrics(found, people, skeleton, b)[0] for b in ("pycocotools", "faster_coco_eval")
            )
            assert fast == pytest.approx(plain, abs=5e-7)
            assert 0.05 < plain["AP"] < 0.95


def test_a_backend_that_is_not_there_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    people = _people(OF_17, tmp_path)
    boxes = detections.ground_truth_boxes(people)
    monkeypatch.setitem(__import__("sys").modules, "faster_coco_eval", None)
    with pytest.raises(UserError, match="pip install faster-coco-eval"):
        coco_ap(_given_back(people, boxes), people, COCO17, DATA, EvalConfig(backend="faster_coco_eval"))


# ---- Single keypoints


def test_keypoints_by_hand() -> None:
    # Two people of 2 keypoints; the second person's first one is not labeled.
    labels = np.array([[[10.0, 10, 2], [50, 50, 1]], [[0, 0, 0], [20, 20, 2]]])
    found = np.array([[[10.0, 10], [50, 59]], [[7, 7], [20, 45]]])  # off by 0, 9, (any), 25
    areas, boxes = np.array([900.0, 400.0]), np.array([[0, 0, 30.0, 60], [0, 0, 100.0, 50]])
    scores = np.array([[0.95, 0.55], [0.1, 0.15]])
    values = score.measure_points(found, scores, labels, areas, boxes, (0.1, 0.2))
    terms = [1.0, np.exp(-81 / (2 * 900 * 0.16)), np.exp(-625 / (2 * 400 * 0.16))]
    assert values.count.tolist() == [1, 2]
    assert values.oks.tolist() == pytest.approx([1.0, (terms[1] + terms[2]) / 2], abs=1e-12)
    # 20 % of 60 px and of 100 px: 9 px are near, 25 px are not.
    assert values.pck.tolist() == [1.0, 0.5]
    assert (values.mean_oks, values.mean_pck) == pytest.approx((sum(terms) / 3, 2 / 3), abs=1e-12)
    # In bins of their own: 0.95 of a right one, 0.55 of a right one (OKS 0.75), 0.15 of a wrong one.
    assert terms[1] > 0.5 > terms[2]
    assert values.ece == pytest.approx((0.05 + 0.45 + 0.15) / 3, abs=1e-12)
    nobody = score.measure_points(found, scores, labels * [1, 1, 0], areas, boxes, (0.1, 0.2))
    assert np.isnan([*nobody.oks, *nobody.pck, nobody.mean_oks, nobody.ece]).all()
    assert tables.keypoint_statistics(nobody, replace_sigmas(COCO17, slice(0, 2)))["keypoints"]["n0"]["OKS"] is None


def test_the_calibration_error_is_that_of_the_definition() -> None:
    rng = np.random.default_rng(0)
    scores = np.concatenate([rng.uniform(-0.1, 1.1, 3000), np.linspace(0, 1, 11)])
    right = rng.uniform(0, 1, len(scores)) < scores**2
    expected, clipped = 0.0, scores.clip(0, 1)
    for low in range(10):
        inside = (clipped > low / 10) & (clipped <= (low + 1) / 10) | ((low == 0) & (clipped == 0))
        expected += inside.mean() * abs(right[inside].mean() - clipped[inside].mean())
    assert score.calibration_error(scores, right) == pytest.approx(expected, abs=1e-3)
    assert expected > 0.1
    honest = rng.uniform(0, 1, 100_000)
    assert score.calibration_error(honest, rng.uniform(0, 1, 100_000) < honest) < 0.01


def test_the_nearest_prediction_of_a_detectors_boxes_stands_for_a_person(tmp_path: Path) -> None:
    people = _people(OF_17, tmp_path)
    boxes = detections.detector_boxes(DETECTED, people)
    perfect = _given_back(people, boxes)
    own = evaluate._select(perfect, evaluate.match_boxes(perfect, boxes, people, COCO17))
    labels = _labels(people)
    seen = labels[..., 2] > 0
    assert np.abs((own.points_xy - labels[..., :2])[seen]).max() == 0
    assert own.scores.min() > 0.8
    gone = boxes.image_ids != 785
    names = [name for name, stays in zip(boxes.file_names, gone, strict=True) if stays]
    arrays = {name: getattr(boxes, name)[gone] for name in ("image_ids", "boxes_xywh", "scores")}
    fewer = replace(boxes, file_names=names, **arrays)
    left = Predictions(points_xy=perfect.points_xy[gone], scores=perfect.scores[gone])
    of_785 = np.array(people.rows["image_id"][:]) == 785
    lost = evaluate._select(left, evaluate.match_boxes(left, fewer, people, COCO17)).scores
    assert of_785.any() and (lost[of_785] == 0).all() and (lost[~of_785] > 0).all()


# ---- What it says


def test_zeros_and_minus_ones_are_explained(tmp_path: Path) -> None:
    people = _people(OF_133, tmp_path)
    boxes = detections.ground_truth_boxes(people)
    far = _given_back(people, boxes)
    far = replace(far, points_xy=far.points_xy + 3000)
    lines = evaluate.explain_metrics(_measure(people, far, boxes, WHOLEBODY133), far, people, WHOLEBODY133)
    assert len(lines) == 1 and "0.00 in the median" in lines[0] and "0.5 is the least" in lines[0]
    metrics = _measure(people, _given_back(people, boxes), boxes, WHOLEBODY133)
    assert evaluate.explain_metrics(metrics, far, people, WHOLEBODY133) == []
    few = metrics | {"AP_M": -1.0, "face/AP": -1.0}
    lines = evaluate.explain_metrics(few, far, people, WHOLEBODY133)
    assert len(lines) == 2 and "32^2 to 96^2" in lines[0] and "part face" in lines[1]
    nothing = Predictions(points_xy=far.points_xy, scores=far.scores * 0)
    assert (
        "no keypoint with a score" in evaluate.explain_metrics({**metrics, "AP": 0.0}, nothing, people, WHOLEBODY133)[0]
    )


def test_a_table_has_a_row_for_each_part() -> None:
    row = {f"{part}{name}": 0.5 for part in ("", *(f"{part}/" for part in PARTS)) for name in METRICS}
    lines = evaluate.format_table({"phase2": row | {"hands/AP": -1.0}}, "title").splitlines()
    assert [line.split("  ")[0] for line in lines[2:]] == [
        *(f"phase2 {p}" for p in ("body", "feet", "face", "hands")),
        "phase2",
    ]
    assert lines[5].split()[:4] == ["phase2", "hands", "-", "50.0"]
