"""Distances in px, PCK, areas, people of an image and levels of crowding, against plain loops and pycocotools."""

import contextlib
import io
import json
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
from sapiens_accel.evaluation import boxes as detections
from sapiens_accel.evaluation import coco_metrics, evaluate, tables
from sapiens_accel.evaluation.coco_metrics import (
    KEYPOINT_METRICS,
    METRICS,
    UNITS,
    CountingRules,
    MatchedPeople,
    Metrics,
)
from sapiens_accel.evaluation.predict import Predictions
from sapiens_accel.pose.oks import measure_points
from sapiens_accel.pose.skeleton import COCO17
from sapiens_accel.training.logger import shown_value

Array = np.ndarray
DATA = DataConfig(input_hw=(256, 192), num_workers=0)


# ---- Distances


def test_distances_are_those_of_plain_loops() -> None:
    rng = np.random.default_rng(0)
    labels = np.concatenate([rng.uniform(0, 200, (40, 5, 2)), rng.integers(0, 3, (40, 5, 1))], axis=-1)
    labels[:, 4, 2] = 0  # a keypoint that nobody has
    found = labels[..., :2] + rng.normal(0, 9, (40, 5, 2))
    scores = rng.uniform(0.1, 1, (40, 5))
    found[7], scores[7] = 0, 0  # somebody without a prediction
    sizes = np.concatenate([rng.uniform(0, 9, (40, 2)), rng.uniform(40, 120, (40, 2))], axis=1)
    quality = measure_points(found, scores, labels, np.full(40, 900.0), sizes, (0.05,) * 5)
    everywhere: list[float] = []
    near_everywhere: dict[float, list[bool]] = {0.1: [], 0.05: []}
    for k in range(4):
        pixels: list[float] = []
        near: dict[float, list[bool]] = {0.1: [], 0.05: []}
        for i in range(40):
            if labels[i, k, 2] == 0:
                continue
            away = float(np.hypot(*(found[i, k] - labels[i, k, :2])))
            pixels += [away] if i != 7 else []
            for share, ones in near.items():
                ones.append(i != 7 and away <= share * max(sizes[i, 2], sizes[i, 3]))
        ours = [float(column[k]) for column in quality.distances]
        expected = [np.mean(pixels), np.median(pixels), np.mean(near[0.1]), np.mean(near[0.05])]
        assert ours == pytest.approx(expected, abs=1e-12)
        everywhere += pixels
        near_everywhere = {share: near_everywhere[share] + ones for share, ones in near.items()}
    total = [float(value) for value in quality.all_distances]
    shares = [np.mean(ones) for ones in near_everywhere.values()]
    assert total == pytest.approx([np.mean(everywhere), np.median(everywhere), *shares], abs=1e-12)
    assert 0.1 < total[3] < total[2] < 0.9
    assert np.isnan([column[4] for column in quality.distances]).all()
    nobody = measure_points(found, scores, labels * [1, 1, 0], np.full(40, 900.0), sizes, (0.05,) * 5)
    assert np.isnan(nobody.all_distances).all()
    five = replace(COCO17, names=tuple("abcde"), mirror=(0, 1, 2, 3, 4), sigmas=(0.05,) * 5, upper=(), edges=())
    people = MatchedPeople(
        predicted_xy=found, scores=scores, labels=labels, boxes_xywh=sizes, skeleton=five, quality=quality
    )
    values = coco_metrics.measure_keypoint_metrics(people)
    columns = ("mean_px", "median_px", "PCK@0.1", "PCK@0.05")
    assert [values[name] for name in columns] == pytest.approx(total, abs=1e-12)
    assert people.has_distance.sum() == len(everywhere)
    assert people.distance_px[people.has_distance].mean() == pytest.approx(np.mean(everywhere), abs=1e-12)
    unlabeled = replace(people, labels=labels * [1, 1, 0], quality=nobody)
    assert set(coco_metrics.measure_keypoint_metrics(unlabeled).values()) == {-1.0}
    assert "-" in tables.format_metric(-1.0, "mean_px")
    each = tables.keypoint_statistics(quality, five)["keypoints"]
    assert each["b"]["mean_px"] == quality.distances.mean_px[1] and each["e"]["mean_px"] is None


def test_each_column_has_its_unit_in_tables_and_on_boards() -> None:
    assert set(UNITS) == {*METRICS, *KEYPOINT_METRICS}
    for name, unit in UNITS.items():
        assert tables.format_metric(0.5, name) == {"%": "50.0", "px": "0.50"}[unit]
        for key in (name, f"student_{name}", f"body/{name}"):
            assert shown_value(key, 0.5) == {"%": 50, "px": 0.5}[unit] and shown_value(key, -1.0) == -1
    assert shown_value("oks_gain", 0.5) == shown_value("loss", 0.5) == 0.5


def test_a_person_without_a_prediction_has_no_keypoint_right() -> None:
    labels = np.array([[[1.0, 1, 2], [40, 40, 2]]])  # the first one is near (0, 0), where nothing was predicted
    quality = measure_points(
        np.zeros((1, 2, 2)), np.zeros((1, 2)), labels, np.array([900.0]), np.array([[0, 0, 30.0, 60]]), (0.1, 0.1)
    )
    assert quality.pck.tolist() == quality.oks.tolist() == [0, 0] and quality.mean_oks == quality.mean_pck == 0


def test_an_older_evaluation_has_the_defaults_of_what_it_does_not_name() -> None:
    settings = tables.protocol_settings(EvalConfig())
    older = {name: value for name, value in settings.items() if name not in tables.ADDED_SETTINGS}
    assert len(older) < len(settings) and not tables.list_differences(older, settings)
    assert tables.list_differences(older, tables.protocol_settings(EvalConfig(max_people=30))) == {"max_people": 20}
    rows = {"phase1": {**older, "flip": False, "area": "box"}, "phase2": older}
    (line,) = tables.describe_other_protocols(rows, settings)
    assert line == "phase1 was measured with flip False, area box, not as the title says"


def test_boxes_that_are_not_annotated_stand_in_the_title() -> None:
    assert tables.format_protocol(EvalConfig(), "", "image").endswith(", whole images as people's boxes")
    assert "people's boxes" not in tables.format_protocol(EvalConfig())
    assert tables.protocol_settings(EvalConfig(), "keypoints")["people_boxes"] == "keypoints"


def test_tables_show_pixels_as_pixels() -> None:
    row: Metrics = {
        **dict.fromkeys(METRICS, 0.5),
        "mean_px": 12.345,
        "median_px": 3.0,
        "PCK@0.1": 0.25,
        "PCK@0.05": -1.0,
    }
    older: Metrics = {**dict.fromkeys(METRICS, 0.5)}
    _, head, first, second = tables.format_table({"new": row, "old": older}, "title").splitlines()
    assert head.split() == [*METRICS, "mean_px", "median_px", "PCK@0.1", "PCK@0.05"]
    assert first.split()[-4:] == ["12.35", "3.00", "25.0", "-"]
    assert second.split()[-4:] == ["-"] * 4
    assert len(head) == len(first) == len(second)


# ---- People of a crowded data set


def _write(file: Path, num_images: int, rng: np.random.Generator, most: int = 5, **rules: Any) -> None:
    """People side by side: `crowd` gives images a crowd index, `area` says which people have one."""
    images, people = [], []
    for number in range(num_images):
        image = {"id": number + 1, "file_name": f"{number}.jpg", "width": 14000, "height": 400}
        images.append(image | ({"crowdIndex": float(rng.uniform(0, 1))} if rules.get("crowd") else {}))
        for place in range(most if rules.get("full") else int(rng.integers(1, most + 1))):
            x, y, w, h = 10.0 + 130 * place, 20.0, float(rng.uniform(40, 110)), float(rng.uniform(90, 300))
            points = np.column_stack([rng.uniform((x, y), (x + w, y + h), (17, 2)), rng.integers(0, 3, 17)])
            points[points[:, 2] == 0] = 0
            points[0, 2] = 2
            person: dict[str, Any] = {
                "id": len(people) + 1, "image_id": number + 1, "category_id": 1, "iscrowd": 0, "bbox": [x, y, w, h],
                "keypoints": points.ravel().tolist(), "num_keypoints": int((points[:, 2] > 0).sum()),
            }  # fmt: skip
            if rules.get("area", lambda _: True)(len(people)):
                person["area"] = float(w * h * rng.uniform(0.3, 0.9))
            people.append(person)
    crowd = {**people[0], "id": len(people) + 1, "iscrowd": 1, "keypoints": [0] * 51, "num_keypoints": 0}
    categories = [{"id": 1, "name": "person", "keypoints": list(COCO17.names)}]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"images": images, "annotations": [*people, crowd], "categories": categories}))


def _people(root: Path) -> People:
    return coco.labeled_people(root, "people.json", "images", 17, root / "cache")


def _noisy(people: People, size: float, seed: int = 1) -> Predictions:
    rng, labels = np.random.default_rng(seed), coco.keypoints_of(people.rows)
    off = rng.normal(0, 1, labels[..., :2].shape) * rng.uniform(0, size, (len(labels), 1, 1))
    return Predictions(points_xy=labels[..., :2] + off, scores=rng.uniform(0.3, 1, labels.shape[:2]))


def _results(people: People, found: Predictions, config: EvalConfig) -> list[dict[str, Any]]:
    return coco_metrics.coco_results(found, detections.ground_truth_boxes(people), COCO17, DATA, config)[0]


def _coco_eval(tree: dict[str, Any], results: list[dict[str, Any]], max_people: int = 20) -> COCOeval:
    with contextlib.redirect_stdout(io.StringIO()):
        truth: Any = COCO()
        truth.dataset = tree
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), "keypoints")
        evaluation.params.kpt_oks_sigmas = np.array(COCO17.sigmas)
        evaluation.params.maxDets = [max_people]
    return evaluation


def _of_box(tree: dict[str, Any]) -> dict[str, Any]:
    """CrowdPose's area: 0.53 of the box, for whoever is measured and for whoever is ignored."""
    people = [{**one, "area": 0.53 * one["bbox"][2] * one["bbox"][3]} for one in tree["annotations"]]
    return {**tree, "annotations": people}


def _levels_by_hand(evaluation: COCOeval, images: list[dict[str, Any]]) -> list[float]:
    """As CrowdPose's own evaluation has it: all precisions of the images of each level."""
    found = []
    for low, high in ((-1.0, 0.2), (0.2, 0.8), (0.8, 2.0)):
        evaluation.params.imgIds = [image["id"] for image in images if low <= image["crowdIndex"] < high]
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation.evaluate()
            evaluation.accumulate()
        found.append(float(np.mean(evaluation.eval["precision"][:, :, :, 0, :])))
    return found


@pytest.mark.parametrize("backend", ["pycocotools", "faster_coco_eval"])
def test_crowdpose_is_measured_as_its_own_evaluation_does(tmp_path: Path, backend: Any) -> None:
    if backend == "faster_coco_eval":
        pytest.importorskip("faster_coco_eval", reason="not installed: faster-coco-eval")
    _write(tmp_path / "people.json", 30, np.random.default_rng(0), crowd=True, area=lambda _: False)
    people, tree = _people(tmp_path), json.loads((tmp_path / "people.json").read_text())
    results = _results(people, _noisy(people, 12), EvalConfig())
    metrics, _ = coco_metrics.compute_metrics(results, people, COCO17, backend)
    evaluation = _coco_eval(_of_box(tree), results)
    ours = [metrics[f"crowd_{level}/AP"] for level in ("easy", "medium", "hard")]
    assert ours == pytest.approx(_levels_by_hand(evaluation, tree["images"]), abs=5e-7)
    assert len({round(one, 3) for one in ours}) == 3 and all(0.1 < one < 0.95 for one in ours)
    evaluation.params.imgIds = [image["id"] for image in tree["images"]]
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    assert [metrics[name] for name in METRICS] == pytest.approx([float(value) for value in evaluation.stats], abs=5e-7)
    assert "net crowd_hard" in tables.table_rows({"net": metrics})
    assert evaluate.describe_area(people, COCO17, EvalConfig()) == "0.53 of the box (the JSON has no 'area')"


def test_areas_are_those_that_were_asked_for_and_the_table_says_which(tmp_path: Path) -> None:
    _write(tmp_path / "people.json", 12, np.random.default_rng(3), area=lambda number: number % 3 > 0)
    people, tree = _people(tmp_path), json.loads((tmp_path / "people.json").read_text())
    results = _results(people, _noisy(people, 25), EvalConfig())
    values = {}
    for rule in ("annotation", "box"):
        mixed = [{"area": 0.53 * one["bbox"][2] * one["bbox"][3], **one} for one in tree["annotations"]]
        truth = _of_box(tree) if rule == "box" else {**tree, "annotations": mixed}
        evaluation = _coco_eval(truth, results)
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        metrics, _ = coco_metrics.compute_metrics(results, people, COCO17, "pycocotools", CountingRules(area=rule))
        assert [metrics[name] for name in METRICS] == [float(value) for value in evaluation.stats]
        config = EvalConfig(area=rule)
        # The keypoints' own OKS is by the same areas.
        truth_of = {one["id"]: one["area"] for one in truth["annotations"]}
        rows = evaluate.use_areas(people, config).rows
        assert list(rows["area"][:]) == pytest.approx([truth_of[ann_id] for ann_id in rows["ann_id"][:]], rel=1e-12)
        values[rule] = metrics["AP"]
    assert abs(values["annotation"] - values["box"]) > 0.01
    without = sum("area" not in one for one in tree["annotations"][:-1])
    said = f"as annotated, 0.53 of the box for {without} of {len(people)} people, who have none"
    assert evaluate.describe_area(people, COCO17, EvalConfig()) == said
    assert evaluate.describe_area(people, COCO17, EvalConfig(area="box")) == "0.53 of the box"
    assert tables.format_protocol(EvalConfig(), said).endswith(f", area: {said}")
    asked = EvalConfig(area="box", max_people=30)
    assert ", area: 0.53 of the box, 30 people an image" in tables.format_protocol(asked)
    settings = tables.protocol_settings(asked)
    assert (settings["area"], settings["max_people"]) == ("box", 30)


@pytest.mark.parametrize("rule", ["image", "keypoints"])
def test_areas_of_boxes_are_those_of_the_annotated_ones_whatever_is_cropped(rule: Any, tmp_path: Path) -> None:
    _write(tmp_path / "people.json", 9, np.random.default_rng(5), area=lambda number: number % 2)
    annotated = _people(tmp_path)
    reading = replace(annotated.reading, boxes=rule)
    people = coco.labeled_people(tmp_path, "people.json", "images", 17, tmp_path / "cache", reading)
    assert (coco.boxes_of(people.rows) != coco.boxes_of(annotated.rows)).any()
    assert people.rows["ann_id"][:] == annotated.rows["ann_id"][:]
    predictions, rules = _noisy(annotated, 25), CountingRules(area="box")
    results = _results(annotated, predictions, EvalConfig())
    metrics = [
        coco_metrics.compute_metrics(results, one, COCO17, "pycocotools", rules)[0] for one in (annotated, people)
    ]
    assert metrics[0] == metrics[1] and 0.05 < metrics[0]["AP"] < 0.9
    areas = [evaluate.use_areas(one, EvalConfig(area="box")).rows["area"][:] for one in (annotated, people)]
    assert list(areas[0]) == list(areas[1])


@pytest.mark.parametrize(("most", "num_images"), [(100, 1), (25, 7)])
def test_more_people_than_count_is_said_with_the_best_possible_ap(tmp_path: Path, most: int, num_images: int) -> None:
    _write(tmp_path / "people.json", num_images, np.random.default_rng(2), most, full=True)
    people, config = _people(tmp_path), EvalConfig()
    perfect = Predictions(points_xy=coco.keypoints_of(people.rows)[..., :2], scores=np.full((len(people), 17), 0.9))
    metrics = coco_ap(perfect, people, COCO17, DATA, config)
    best = coco_metrics.best_possible_ap([most] * num_images, 20)
    assert metrics["AP"] == pytest.approx(best, abs=1e-12)
    assert best == pytest.approx({100: 21 / 101, 25: 81 / 101}[most])
    (line,) = evaluate.describe_crowding(people, config)
    assert f"more than 20 labeled people (up to {most})" in line
    assert f"the best possible AP is {100 * best:.1f}. --eval.max_people {most} counts" in line
    everybody = EvalConfig(max_people=most)
    assert evaluate.describe_crowding(people, everybody) == []
    results = _results(people, perfect, everybody)
    assert len(results) == len(people)
    whole, _ = coco_metrics.compute_metrics(results, people, COCO17, "pycocotools", CountingRules(max_people=most))
    assert (whole["AP"], whole["AR"]) == pytest.approx((1.0, 1.0), abs=1e-9)
