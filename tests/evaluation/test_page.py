"""The page of an evaluation and the images of its worst people: read back, and held against pycocotools."""

import base64
import contextlib
import importlib
import io
import json
import os
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import cv2
import forks
import numpy as np
import pytest
import torch
from networks import INPUT_HW as SIZE
from networks import untrained
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from sapiens_accel.config import commands
from sapiens_accel.config import parse as config
from sapiens_accel.config.schema import DataConfig, EvalConfig
from sapiens_accel.data import people as coco
from sapiens_accel.data.people import People
from sapiens_accel.errors import UserError
from sapiens_accel.evaluation import boxes as detections
from sapiens_accel.evaluation import (
    coco_metrics,
    error_analysis,
    evaluate,
    figures,
    html_report,
    networks,
    predict,
)
from sapiens_accel.evaluation.error_analysis import NOBODY, Kind
from sapiens_accel.evaluation.evaluate import EvaluationResult
from sapiens_accel.evaluation.figures import ErrorAnalysis
from sapiens_accel.evaluation.predict import PoseNetwork, Predictions
from sapiens_accel.models.sapiens import SapiensPose
from sapiens_accel.pose import draw, geometry
from sapiens_accel.pose.heatmap import Codec
from sapiens_accel.pose.skeleton import COCO17, WHOLEBODY133, Skeleton
from sapiens_accel.sources import synthetic

Array = np.ndarray
REPOSITORY = Path(__file__).resolve().parents[2]
VAL = "annotations/person_keypoints_val2017.json"
DATA = DataConfig(input_hw=(64, 48), num_workers=0)
HOW = EvalConfig(num_worst=20)
VOID = {"meta", "link", "img", "br", "path", "rect"}


class Read(HTMLParser):
    """A page as a browser takes it: balanced tags, its addresses, words and curves."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert tag in VOID or self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def pictures(self) -> list[Array]:
        """All of the page, decoded."""
        found = []
        for one in self.all("img"):
            head, content = one["src"].split(",", 1)
            assert head == "data:image/jpeg;base64"
            picture = cv2.imdecode(np.frombuffer(base64.b64decode(content, validate=True), np.uint8), cv2.IMREAD_COLOR)
            assert picture is not None
            found.append(picture)
        return found

    @property
    def curves(self) -> list[Array]:
        """Points in percent: recall, precision."""
        lines = [one["points"] for one in self.all("polyline") if one["stroke"] in html_report.LINES]
        return [np.array([[float(n) for n in point.split(",")] for point in line.split()]) for line in lines]


def _fetches_nothing(text: str) -> Read:
    """No address outside of the page, no program, and a policy that says so."""
    read = Read(text)
    for tag, attributes in read.tags:
        assert tag not in {"script", "iframe", "object", "embed", "base", "form"}
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "srcset", "xlink:href", "action"):
            assert attributes.get(name, "data:").startswith("data:")
    assert "url(" not in text and "@import" not in text
    assert any("default-src 'none'" in one.get("content", "") for one in read.all("meta"))
    return read


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> People:
    """24 drawn people, up to three in an image."""
    root = synthetic.write(tmp_path_factory.mktemp("page") / "drawn", num_train=1, num_unlabelled=1, num_val=24)
    return coco.labeled_people(root, VAL, "val2017", 17, root.parent / "cache")


def _judged(people: People, skeleton: Skeleton = COCO17, noise: float = 10.0) -> EvaluationResult:
    """Predictions beside the labels, by as much for each person as makes AP neither 0 nor 1."""
    rng, labels = np.random.default_rng(0), coco.keypoints_of(people.rows)
    shape = labels[..., :2].shape
    points = labels[..., :2] + rng.normal(0, 1, shape) * rng.uniform(0, noise, (len(labels), 1, 1))
    predictions = Predictions(points_xy=points, scores=rng.uniform(0.3, 1, shape[:2]))
    boxes = detections.ground_truth_boxes(people)
    found, _ = coco_metrics.coco_results(predictions, boxes, skeleton, DATA, HOW)
    metrics, curves = coco_metrics.compute_metrics(found, people, skeleton, "pycocotools")
    return EvaluationResult(
        metrics=metrics,
        predictions=predictions,
        boxes_xywh=boxes.boxes_xywh,
        keypoints=evaluate.measure_keypoints(predictions, people, skeleton),
        curves=curves,
        notes=("a note of <this> & that",),
        seconds=1.0,
    )


@pytest.fixture(scope="module")
def judged(people: People) -> EvaluationResult:
    return _judged(people)


@pytest.fixture(scope="module")
def found(judged: EvaluationResult, people: People) -> ErrorAnalysis:
    return figures.analyze_predictions(judged.predictions, people, COCO17, 20)


# ---- What is in it


def _by_hand(judged: EvaluationResult, people: People, folder: Path) -> tuple[Array, list[float]]:
    """pycocotools' precision at each OKS and recall, and its ten numbers, from a file of results."""
    results, _ = coco_metrics.coco_results(judged.predictions, detections.ground_truth_boxes(people), COCO17, DATA, HOW)
    coco_metrics.save_results(results, folder / "results.json", people, COCO17)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(people.annotations))
        evaluation = COCOeval(truth, truth.loadRes(str(folder / "results.json")), "keypoints")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    everybody = evaluation.params.areaRngLbl.index("all")
    return evaluation.eval["precision"][:, :, 0, everybody, 0], list(evaluation.stats)


def test_curves_and_table_are_those_of_pycocotools(
    judged: EvaluationResult, people: People, found: ErrorAnalysis, tmp_path: Path
) -> None:
    precision, stats = _by_hand(judged, people, tmp_path)
    assert 0.2 < stats[0] < 0.9, "a curve that shows something"
    text = html_report.render_report({"net": judged}, {"net": HOW}, {"net": found}, COCO17)
    read = _fetches_nothing(text)
    assert len(read.curves) == 10
    for curve, expected in zip(read.curves, precision, strict=True):
        # A curve ends where its precision has come down to 0, and is drawn as far as that.
        shown = min(int((expected > 0).sum()) + 1, 101)
        assert len(curve) == shown and not expected[shown:].any()
        assert curve[:, 0] == pytest.approx(np.arange(shown))
        assert curve[:, 1] == pytest.approx(100 * expected[:shown], abs=6e-4)
    for threshold, expected in zip(np.arange(0.5, 1.0, 0.05), precision, strict=True):
        assert f"OKS {threshold:.2f}: AP {100 * expected.mean():.1f}" in read.text
    shown = " ".join("-" if value < 0 else f"{100 * value:.1f}" for value in stats)
    assert f"AR_M AR_L net {shown}" in read.text
    assert "net 24 val ground truth yes 1 0.9 pycocotools" in read.text
    # On a narrow page each cell stands under its own heading, the first of a row over all of them.
    headings = [one.get("data-head") for one in read.all("td")][: 1 + len(coco_metrics.METRICS)]
    assert headings == [None, *coco_metrics.METRICS] and "content:attr(data-head)" in text


def test_the_other_backend_draws_the_same_curves(judged: EvaluationResult, people: People) -> None:
    pytest.importorskip("faster_coco_eval")
    results, _ = coco_metrics.coco_results(judged.predictions, detections.ground_truth_boxes(people), COCO17, DATA, HOW)
    metrics, curves = coco_metrics.compute_metrics(results, people, COCO17, "faster_coco_eval")
    assert curves == pytest.approx(judged.curves, abs=1e-6)
    assert metrics["AP"] == pytest.approx(float(curves.mean()), abs=1e-6)


def test_people_are_shown_worst_first_with_their_reason(
    judged: EvaluationResult, people: People, found: ErrorAnalysis
) -> None:
    read = _fetches_nothing(html_report.render_report({"net": judged}, {"net": HOW}, {"net": found}, COCO17))
    assert len(found.cases) == 20 and len(read.all("figure")) == 20
    assert len(read.pictures) == 60 and all(picture.std() > 5 for picture in read.pictures)
    shown = [float(oks) for oks in re.findall(r"\d+\. OKS (\d\.\d\d)", read.text)]
    assert shown == [round(float(oks), 2) for oks in np.sort(found.diagnosis.oks)[:20]]
    for case in found.cases:
        assert case.reason.text in read.text and f"annotation {case.ann_id} of image" in read.text
        index = people.rows["ann_id"][:].index(case.ann_id)
        assert case.oks == pytest.approx(found.diagnosis.oks[index])
    low = int((found.diagnosis.oks < 0.5).sum())
    assert f"Of 24 people {low} have an OKS below 0.5" in read.text


def test_bars_are_the_numbers(judged: EvaluationResult, found: ErrorAnalysis) -> None:
    text = html_report.render_report({"net": judged}, {"net": HOW}, {"net": found}, COCO17)
    read = _fetches_nothing(text)
    counts = found.diagnosis.counts()
    for k, name in enumerate(COCO17.names):
        words, people = name, judged.keypoints.count[k]
        oks, pck = 100 * judged.keypoints.oks[k], 100 * judged.keypoints.pck[k]
        assert f"{words} {people} {oks:.1f} {pck:.1f}" in read.text
        wrong = 100 * counts[1:, k].sum() / counts[:, k].sum()
        assert f"{words} {people} {wrong:.1f}" in read.text
        row = next(row for row in text.split("<tr>") if f">{words}<" in row and "title=" in row)
        widths = [float(width) for width in re.findall(r"width:([\d.]+)%", row)]
        assert sum(widths) == pytest.approx(100, abs=0.05)
        shares = [100 * count / counts[:, k].sum() for count in counts[:, k] if count]
        assert widths == pytest.approx(shares, abs=0.006)
    assert f"Expected calibration error, %: {100 * judged.keypoints.ece:.1f}" in read.text


def test_pseudo_labels_are_drawn_as_stage_ssl_left_them(judged: EvaluationResult, tmp_path: Path) -> None:
    """As high as the share that is right; weights of another stage have none."""
    bins = error_analysis.bin_scores(np.array([0.65] * 3 + [0.95] * 5), np.arange(8) % 4 > 0)
    candidates = []
    for stage, more in (("phase2", {}), ("ssl", {"pseudo_labels": error_analysis.write_reliability(bins)})):
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "eval.json").write_text(json.dumps({"AP": 0.5} | more))
        candidates.append(networks.Candidate(name=stage, weights=tmp_path / stage / "weights", folder=tmp_path))
    about = html_report.About(["weights of a run"], networks.read_pseudo_labels(candidates))
    read = _fetches_nothing(html_report.render_report({"net": judged}, {"net": HOW}, {}, COCO17, about))
    assert "weights of a run" in read.text and "Pseudo-labels of ssl" in read.text
    bars = [(float(bar["x"]), float(bar["height"])) for bar in read.all("rect")]
    assert bars == [(61, 66.67), (91, 80)]
    titles = ["3 keypoints of confidence 0.65: 66.7 % right", "5 keypoints of confidence 0.95: 80.0 % right"]
    assert all(title in read.text for title in titles)


def test_whatever_a_name_is_it_stays_a_name(judged: EvaluationResult, found: ErrorAnalysis) -> None:
    name = "<script>alert(\"1\")</script> & 'net'"
    odd = "<b onclick=x>\x1b[2J\u202eeye</b>"
    skeleton = replace(COCO17, names=(odd, *COCO17.names[1:]))
    bad = replace(found.cases[0], file_name='val/"><img src=http://a.b/c.jpg>.jpg')
    text = html_report.render_report({name: judged}, {name: HOW}, {name: replace(found, cases=(bad,))}, skeleton)
    read = _fetches_nothing(text)
    assert r"<b onclick=x>\x1b[2J\u202eeye</b>" in read.text and "\x1b" not in text and "\u202e" not in text
    assert name in read.text and bad.file_name in read.text
    assert "a note of <this> & that" in read.text


def test_several_rows_are_all_there(judged: EvaluationResult, found: ErrorAnalysis) -> None:
    names = ("a, plain", "a, flip", "b")
    hows = {name: replace(HOW, flip="plain" not in name) for name in names}
    read = _fetches_nothing(
        html_report.render_report(dict.fromkeys(names, judged), hows, {"a, flip": found, "b": found}, COCO17)
    )
    assert len(read.curves) == 30 and len(read.pictures) == 120
    assert [("open" in one) for one in read.all("details")] == [False, False, True]
    assert "a, plain 24 val ground truth no 1" in read.text and "a, flip: AP +0.00 for 1.00 x the time" in read.text


def test_twenty_people_of_noise_stay_below_3_mb(judged: EvaluationResult, found: ErrorAnalysis) -> None:
    rng = np.random.default_rng(0)
    noise = tuple(rng.integers(0, 256, (404, 320, 3), dtype=np.uint8) for _ in range(4))
    worst = replace(found, cases=tuple(replace(case, panels=noise) for case in found.cases))
    text = html_report.render_report({"net": judged}, {"net": HOW}, {"net": worst}, COCO17)
    assert len(Read(text).pictures) == 80 and len(text.encode()) < 3e6
    assert len(draw.encode_jpeg(noise[0], 5000)) <= 5000


def test_a_page_that_cannot_be_written_is_one_line(
    judged: EvaluationResult, found: ErrorAnalysis, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^--eval.html .*file/page.html: not written: .*; name another file$"):
        html_report.write_report(tmp_path / "file" / "page.html", {"net": judged}, {"net": HOW}, {"net": found}, COCO17)
    with pytest.raises(UserError, match=r"--eval.html .*: expected a file to write"):
        config.load(["--eval.html", str(tmp_path)])
    with pytest.raises(UserError, match=r"--eval.num_worst: .*expected a number >= 0, found -1"):
        config.load(["--eval.num_worst", "-1"])


# ---- Images


def test_panels_show_what_they_say(people: People) -> None:
    """Bones where the person is labeled, keypoints in the color of their score, lines in that of the error."""
    labels = coco.keypoints_of(people.rows)
    points = labels[..., :2].copy()
    points[:, 15:] += 4000  # ankles beyond the image
    predictions = Predictions(points_xy=points, scores=np.zeros(labels.shape[:2]) + 0.01)
    one = figures.analyze_predictions(predictions, people, COCO17, 3).cases[0]
    assert one.reason.kind == Kind.MISSED and "ankle" in one.reason.text
    labeled, predicted, errors = (panel[draw.STRIP :].astype(int) for panel in one.panels)

    def near(picture: Array, color: tuple[int, int, int]) -> int:
        return int((np.abs(picture - np.array(color)).max(axis=-1) < 12).sum())

    plain = min(near(labeled, draw.score_color(0.01)), near(errors, draw.score_color(0.01)))
    assert near(labeled, draw.LEFT) + near(labeled, draw.RIGHT) > 100
    assert near(predicted, draw.score_color(0.01)) > plain + 100
    missed = figures.ERROR_COLORS[Kind.MISSED]
    assert near(errors, missed) > near(labeled, missed) + 20
    assert draw.score_color(0.0) == draw.UNSURE and draw.score_color(0.5) == draw.HALF_SURE
    assert draw.score_color(1.0) == draw.score_color(7.0) == draw.SURE


def test_heatmaps_lie_where_they_were_seen(people: People, judged: EvaluationResult) -> None:
    """A map with a peak at the left shoulder in the crop's frame: in the panel too."""
    labels = coco.keypoints_of(people.rows)
    crops = [detections.ground_truth_boxes(people).boxes_xywh[i] for i in range(len(people))]

    def heatmaps(chosen: list[int]) -> tuple[Array, Array]:
        maps, matrices = np.zeros((len(chosen), 17, 64, 48), np.float32), []
        for i, index in enumerate(chosen):
            x, y, w, h = crops[index]
            # 64 x 48 px from corner center to corner center: a map of the box and 20 px around it.
            matrix = np.array(
                [[47 / (w + 40), 0, 47 * (20 - x) / (w + 40)], [0, 63 / (h + 40), 63 * (20 - y) / (h + 40)]]
            )
            at = matrix @ [*labels[index, 5, :2], 1]
            rows, columns = np.mgrid[:64, :48]
            maps[i, 5] = np.exp(-((columns - at[0]) ** 2 + (rows - at[1]) ** 2) / 8)
            matrices.append(matrix)
        return maps, np.stack(matrices)

    with_maps = figures.analyze_predictions(judged.predictions, people, COCO17, 20, heatmaps=heatmaps)
    flat = figures.analyze_predictions(
        judged.predictions, people, COCO17, 20, heatmaps=lambda chosen: (0 * heatmaps(chosen)[0], heatmaps(chosen)[1])
    )
    apart = []
    for case, plain in zip(with_maps.cases, flat.cases, strict=True):
        index = people.rows["ann_id"][:].index(case.ann_id)
        if not labels[index, 5, 2]:
            continue
        changed = np.abs(case.panels[3][draw.STRIP :].astype(int) - plain.panels[3][draw.STRIP :]).sum(axis=2)
        # The heat's center of mass is the shoulder, found by its own route: the frame is the box's, 1.25 of it.
        rows, columns = np.nonzero(changed > changed.max() / 3)
        x, y, w, h = crops[index]
        side = 1.25 * max(h, w * 384 / 320)
        expected_y = (labels[index, 5, 1] - y - h / 2) / side * 384 + 192
        expected_x = (labels[index, 5, 0] - x - w / 2) / (side * 320 / 384) * 320 + 160
        if 40 < expected_x < 280 and 40 < expected_y < 344:
            apart.append((columns.mean() - expected_x, rows.mean() - expected_y))
    # What is behind it moves the middle of what is seen by some px, to no side; half a pixel of a map is 3 px here.
    assert len(apart) > 5 and np.abs(apart).max() < 8
    assert np.abs(np.mean(apart, axis=0)).max() < 1.5, apart


def _setup(config: EvalConfig) -> predict.PredictionSetup:
    return predict.PredictionSetup(skeleton=COCO17, data=DATA, config=config, device=torch.device("cpu"))


@pytest.mark.parametrize(("flip", "scales"), [(False, (1.0,)), (True, (1.0, 1.5))], ids=["plain", "augmented"])
def test_heatmaps_of_a_few_are_those_that_were_decoded(people: People, flip: bool, scales: tuple[float, ...]) -> None:
    model = SapiensPose("sapiens_tiny", 17, SIZE)
    network = PoseNetwork(model=model.eval(), codec=Codec(input_hw=SIZE, heatmap_hw=model.heatmap_hw, sigma=2.0))
    setup = _setup(EvalConfig(flip=flip, scales=scales, batch_size=4))
    boxes = detections.ground_truth_boxes(people)
    predicted = predict.predict([network], boxes, setup)
    maps = predict.predict_heatmaps([network], boxes, setup)
    assert maps.shape == (24, 17, *model.heatmap_hw)
    points, scores = network.codec.decode(torch.from_numpy(maps))
    assert scores.numpy() == pytest.approx(predicted.scores, abs=1e-5)
    for person in range(24):
        matrix = geometry.crop_around_box(boxes.boxes_xywh[person], DATA.box_padding, SIZE).matrix(SIZE)
        there = geometry.apply(geometry.invert(matrix), points[person].double().numpy())
        assert there == pytest.approx(predicted.points_xy[person], abs=0.05)


def test_a_networks_heatmaps_are_drawn_in_their_own_frame(people: People, judged: EvaluationResult) -> None:
    """The corners of a heatmap are those of the crop that the network saw."""
    torch.manual_seed(0)
    model = SapiensPose("sapiens_tiny", 17, SIZE)
    network = PoseNetwork(model=model.eval(), codec=Codec(input_hw=SIZE, heatmap_hw=model.heatmap_hw, sigma=2.0))
    setup, boxes = _setup(replace(HOW, num_worst=3)), detections.ground_truth_boxes(people)
    assert model.heatmap_hw != SIZE
    shrunk = np.diag([(small - 1) / (large - 1) for small, large in zip(model.heatmap_hw, SIZE, strict=True)][::-1])

    def heatmaps(chosen: list[int]) -> tuple[Array, Array]:
        maps = predict.predict_heatmaps([network], boxes, setup)[chosen]
        crops = [geometry.crop_around_box(boxes.boxes_xywh[index], DATA.box_padding, SIZE) for index in chosen]
        return maps, np.stack([shrunk @ crop.matrix(SIZE) for crop in crops])

    drawn = figures.analyze_networks(judged, people, [network], setup)
    expected = figures.analyze_predictions(judged.predictions, people, COCO17, 3, heatmaps=heatmaps)
    assert len(drawn.cases) == 3
    for case, other in zip(drawn.cases, expected.cases, strict=True):
        assert np.abs(case.panels[3].astype(int) - other.panels[3]).max() <= 3
        assert (case.panels[3][draw.STRIP :] != case.panels[0][draw.STRIP :]).any()


def test_nobody_predicted_is_reported_and_drawn(people: People, judged: EvaluationResult, tmp_path: Path) -> None:
    nothing = Predictions(points_xy=np.zeros((24, 17, 2)), scores=np.zeros((24, 17)))
    asked: list[list[int]] = []
    alone = figures.analyze_predictions(
        nothing, people, COCO17, 2, np.zeros((24, 4)), lambda chosen: asked.append(chosen) or (np.zeros(0), np.zeros(0))
    )
    assert not asked, "no network is asked about people without a box"
    assert [case.reason for case in alone.cases] == [(Kind.MISSED, NOBODY)] * 2
    assert all(len(case.panels) == 4 for case in alone.cases)
    nobody = replace(judged, predictions=nothing, keypoints=evaluate.measure_keypoints(nothing, people, COCO17))
    read = _fetches_nothing(html_report.render_report({"net": nobody}, {"net": HOW}, {"net": alone}, COCO17))
    assert "Of 24 people 24 have an OKS below 0.5; what costs them most: missed keypoint 24." in read.text
    (tmp_path / "net_worst_07.png").write_bytes(b"of an earlier evaluation")
    saved = figures.save_figures(alone, tmp_path, "net_worst")
    assert sorted(tmp_path.iterdir()) == saved and len(saved) == 2
    assert cv2.imread(str(saved[0])).shape[1] == 4 * figures.PANEL_HW[1]


# ---- eval.py


def test_labeled_keypoints_beside_their_box_are_in_the_panel() -> None:
    box, label = np.array([100.0, 100.0, 50.0, 80.0]), np.zeros((17, 3))
    label[3], label[5] = (400, 120, 2), (1000, 1000, 0)
    panel = figures._frame(box, np.zeros(4), label, figures.PANEL_HW)
    (x, y), (far, _) = geometry.apply(panel, label[[3, 5], :2])
    height, width = figures.PANEL_HW
    assert 0.85 * width < x < width and 0 < y < height and far > width


def test_of_many_keypoints_none_hides_another() -> None:
    """133 keypoints, of which some are 4 px from one another: each one's own pixel has the color of its score."""
    points_xy = np.stack(np.meshgrid(np.arange(12) * 4.0 + 20, np.arange(12) * 4.0 + 20), axis=-1).reshape(-1, 2)[:133]
    points_xy[0] = 300, 300  # alone: as large as before, with a rim
    scores, plain = np.linspace(0, 1, 133), replace(WHOLEBODY133, edges=())
    drawn = draw.draw_person(np.full((384, 384, 3), 128, np.uint8), points_xy, np.ones(133), plain, scores)
    for (x, y), score in zip(points_xy.astype(int) + 1, scores, strict=True):  # a pixel's corner lies between centers
        near = drawn[y - 1 : y + 1, x - 1 : x + 1].reshape(-1, 3).astype(int)
        assert np.abs(near - draw.score_color(score)).max(axis=1).min() < 8
    assert (drawn[295:306, 295:306] == 0).all(axis=2).any() and not (drawn[:200] == 0).all(axis=2).any()


def _detector(people: People) -> None:
    """A detector that sees nobody in one of the images."""
    found = json.loads(people.annotations.read_text())["annotations"]
    seen = [p for p in found if p["image_id"] != found[0]["image_id"]]
    results = [{"image_id": p["image_id"], "category_id": 1, "bbox": p["bbox"], "score": 0.3} for p in seen]
    (people.root / "detector.json").write_text(json.dumps(results))


@pytest.mark.slow
@pytest.mark.launch
def test_eval_writes_page_and_images_from_two_processes(people: People, tmp_path: Path) -> None:
    """Detector's boxes, one image without any; rank 0 alone writes."""
    _detector(people)
    weights = untrained(tmp_path / "first", 0)
    words = ["--data.root", people.root, "--data.num_workers", 0, "--boxes", "detector.json", "--worst", 5]
    command = [REPOSITORY / "eval.py", weights, *words, "--pictures", 2, "--html"]
    environment = os.environ | {"SAPIENS_ACCEL_CACHE": str(people.root.parent / "cache")}
    done = forks.run(command, cwd=tmp_path, env=environment, processes=2)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "evaluations" / "first"
    assert done.stdout.count("people of the lowest OKS") == done.stdout.count("page: evaluations/first/eval.html") == 1
    names = [f"first_val_worst_0{i}.png" for i in range(1, 6)]
    assert sorted(path.name for path in (folder / "pictures").iterdir()) == ["first_val_predictions.jpg", *names]
    read = _fetches_nothing((folder / "eval.html").read_text())
    assert "first 24 val detector (detector.json) yes 1 0.9 pycocotools" in read.text
    assert f"people of {people.annotations} first: weights of {weights}" in read.text
    assert len(read.pictures) == 20 and len(read.curves) == 10
    # Who was not looked for comes first, and is told as well as those who were found badly.
    assert NOBODY in read.text and NOBODY in done.stdout
    assert all(cv2.imread(str(folder / "pictures" / name)).std() > 5 for name in names)


def test_133_keypoints_and_augmentation_by_row(
    people: People, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = json.loads(people.annotations.read_text())
    tree["annotations"], rng = tree["annotations"][:6], np.random.default_rng(0)
    for person in tree["annotations"]:
        x, y, w, h = person["bbox"]
        for key, num in (("foot", 6), ("face", 68), ("lefthand", 21), ("righthand", 21)):
            points = np.concatenate([rng.uniform((x, y), (x + w, y + h), (num, 2)), np.full((num, 1), 2)], axis=1)
            person[f"{key}_kpts"], person[f"{key}_valid"] = points.ravel().tolist(), True
    (people.root / "annotations" / "whole.json").write_text(json.dumps(tree))
    monkeypatch.setenv("SAPIENS_ACCEL_CACHE", str(people.root.parent / "cache"))
    monkeypatch.syspath_prepend(str(REPOSITORY))
    monkeypatch.chdir(tmp_path)
    data = [
        "--data.root",
        str(people.root),
        "--data.num_workers",
        "0",
        "--data.val_annotations",
        "annotations/whole.json",
    ]
    weights = untrained(tmp_path / "whole", 0, WHOLEBODY133)
    shown = ["--compare", "--worst", "3", "--pictures", "0", "--html", "my/page.html"]
    importlib.import_module("sapiens_accel.eval").main([str(weights), *shown, *data])
    assert "page: my/page.html" in capsys.readouterr().out
    read = _fetches_nothing(Path("my/page.html").read_text())
    assert len(read.curves) == 20, "of both rows"
    assert len(read.pictures) == 12, "of the one with all augmentation"
    assert "whole, flip body" in read.text and "all 133" in read.text
    assert re.search(r"left_hand 126 \d", read.text) and re.search(r"face-67 6 \d", read.text)


def test_short_options() -> None:
    split = commands.parse_evaluation
    assert split(["a", "--html", "--worst", "3"])[1] == ["--eval.html", "--eval.num_worst", "3"]
    assert config.load(split(["a", "--html"])[1]).eval.html == "auto"
    assert config.load(split(["a", "--html", "x.html"])[1]).eval.html == "x.html"
    assert config.load([]).eval.html is None
