"""Identities in videos, smoothing over time, and the thread that decodes frames ahead."""

import csv
import importlib
import itertools
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Generator
from pathlib import Path

import numpy as np
import pytest
from networks import untrained

from benchmarks import film
from sapiens_accel import PoseEstimator, UserError
from sapiens_accel.config.schema import EvalConfig
from sapiens_accel.evaluation import keypoint_csv
from sapiens_accel.evaluation.keypoint_csv import ImageRow, PersonRow
from sapiens_accel.inference import estimator, media, predict_media
from sapiens_accel.inference.outputs import Person
from sapiens_accel.inference.tracking import MAX_GAP, OneEuroFilter, Tracker
from sapiens_accel.pose import draw
from sapiens_accel.pose.skeleton import COCO17

ALL = np.ones(17, bool)


def _person(x: float, y: float = 100.0, scores: float = 0.9, category: int = 1) -> Person:
    """A person of 40 x 100 px whose box is around (x, y)."""
    points = np.random.default_rng(3).uniform(-0.5, 0.5, (17, 2)) * (40, 100) + (x, y)
    return Person(points, np.full(17, scores), 0.8, np.array([x - 20, y - 50, 40, 100]), 0.9, category)


def _ids(tracker: Tracker, people: list[Person], time: float) -> list[int | None]:
    return [person.track_id for person in tracker.update(people, time)]


# ---- Identities


def test_people_who_cross_keep_their_numbers_and_are_nearer_to_the_truth_smoothed() -> None:
    """As benchmarks/video.py measures, on four short films; people are missed while somebody nearer hides them."""
    films = [list(film.detected(seed, 300)) for seed in range(4)]
    crossings = sum(map(film.num_crossings, films))
    plain, smooth = (film.add_up(films, EvalConfig(smooth=on)) for on in (False, True))
    assert crossings == 55 and plain["switches"] <= 0.2 * crossings
    assert smooth["switches"] == plain["switches"] and plain["numbers"] <= 3 * len(films) + 1
    assert smooth["error_px"] < 0.95 * plain["error_px"] and smooth["jitter_px"] < 0.7 * plain["jitter_px"]


def test_numbers_are_in_order_and_nobody_is_added_or_left_out() -> None:
    tracker = Tracker(COCO17.sigmas, EvalConfig())
    assert _ids(tracker, [_person(50), _person(200)], 0.0) == [1, 2]
    assert _ids(tracker, [_person(201), _person(400), _person(51)], 0.04) == [2, 3, 1]
    assert _ids(tracker, [], 0.08) == []
    people = [_person(52), _person(399)]
    tracked = tracker.update(people, 0.12)
    assert [one.track_id for one in tracked] == [1, 3] and tracker.num_people == 3
    for person, before in zip(tracked, people, strict=True):
        assert all((a == b) if np.isscalar(a) else (a is b) for a, b in zip(person[:6], before[:6], strict=True))


def test_who_is_away_for_long_is_a_new_person() -> None:
    for gap, number in ((MAX_GAP - 0.01, 1), (MAX_GAP + 0.01, 2)):
        tracker = Tracker(COCO17.sigmas, EvalConfig())
        tracker.update([_person(50)], 0.0)
        assert _ids(tracker, [_person(50)], gap) == [number]


def test_a_person_who_moves_is_found_where_the_velocity_leads() -> None:
    """Unseen for half a second while another, standing, is where the first was: 80 px on, two widths."""
    tracker = Tracker(COCO17.sigmas, EvalConfig())
    for frame in range(10):
        tracker.update([_person(50 + 8 * frame)], frame / 20)
    assert _ids(tracker, [_person(202)], 19 / 20) == [1]
    still = Tracker(COCO17.sigmas, EvalConfig())
    still.update([_person(122)], 9 / 20)
    assert _ids(still, [_person(202)], 19 / 20) == [2]


def test_boxes_decide_where_keypoints_are_unsure_and_categories_never_mix() -> None:
    tracker = Tracker(COCO17.sigmas, EvalConfig())
    tracker.update([_person(50, scores=0.1), _person(200, scores=0.1)], 0.0)
    assert _ids(tracker, [_person(205, scores=0.1), _person(45, scores=0.9)], 0.1) == [2, 1]
    assert _ids(tracker, [_person(50, category=2)], 0.2) == [3]


def test_memory_of_the_tracker_is_that_of_the_people_in_view() -> None:
    tracker = Tracker(COCO17.sigmas, EvalConfig(smooth=True))
    for index in range(300):  # everybody is somewhere else, and new
        tracker.update([_person(1000.0 * index)], index * 0.1)
    assert tracker.num_people == 300 and len(tracker._tracks) <= MAX_GAP / 0.1 + 1


# ---- Smoothing


def _one_euro(values: np.ndarray, times: np.ndarray, min_cutoff: float, beta: float) -> np.ndarray:
    """Algorithm 1 of the paper, one coordinate, value by value; derivative cutoff 1 Hz."""

    def alpha(elapsed: float, cutoff: float) -> float:
        return 1 / (1 + 1 / (2 * np.pi * cutoff) / elapsed)

    out, speed = [values[0]], 0.0
    for index in range(1, len(values)):
        elapsed = times[index] - times[index - 1]
        slope = (values[index] - out[-1]) / elapsed
        speed = alpha(elapsed, 1.0) * slope + (1 - alpha(elapsed, 1.0)) * speed
        weight = alpha(elapsed, min_cutoff + beta * abs(speed))
        out.append(weight * values[index] + (1 - weight) * out[-1])
    return np.array(out)


def test_the_filter_is_that_of_the_paper_at_uneven_times() -> None:
    """Each keypoint moves along one axis, in persons of size 50 px: the paper's filter with beta / 50."""
    rng = np.random.default_rng(0)
    times = np.cumsum(rng.uniform(0.01, 0.2, 40))
    values = np.cumsum(rng.normal(size=(40, 17)) * 5, axis=0)
    ours = OneEuroFilter(1.3, 7.0)
    smoothed = np.stack(
        [ours.smooth(np.stack([v, 0 * v], axis=1), ALL, t, 50.0) for v, t in zip(values, times, strict=True)]
    )
    expected = np.stack([_one_euro(column, times, 1.3, 7.0 / 50) for column in values.T], axis=1)
    assert smoothed[..., 0] == pytest.approx(expected, abs=1e-9) and (smoothed[..., 1] == 0).all()
    assert abs(smoothed[..., 0] - values).max() > 1


def test_a_guess_stays_as_it_is_and_does_not_change_what_follows() -> None:
    rng = np.random.default_rng(1)
    points = rng.uniform(0, 50, (4, 17, 2))
    shown = ALL.copy()
    shown[3] = False
    with_guess, without = OneEuroFilter(1.0, 1.0), OneEuroFilter(1.0, 1.0)
    for index, (now, mask) in enumerate(zip(points, (ALL, ALL, shown, ALL), strict=True)):
        result = with_guess.smooth(now, mask, index / 10, 50.0)
        if index == 2:
            assert (result[3] == now[3]).all() and (result[2] != now[2]).any()
            continue
        other = without.smooth(now, ALL, index / 10, 50.0)
        assert (result[3] == other[3]).all()


def test_a_person_who_walks_evenly_is_not_behind() -> None:
    """The filter moves with the person: after a second no keypoint lags, at a cutoff that alone would hold it back."""
    tracker = Tracker(COCO17.sigmas, EvalConfig(smooth=True, smooth_cutoff=0.2, smooth_beta=0))
    people = [_person(50 + 3 * index) for index in range(50)]
    smoothed, person = [tracker.update([one], index / 25)[0] for index, one in enumerate(people)][-1], people[-1]
    assert smoothed.points_xy == pytest.approx(person.points_xy, abs=1.0)
    assert smoothed.points_xy != pytest.approx(person.points_xy, abs=1e-6)
    assert (smoothed.box_xywh == person.box_xywh).all() and (smoothed.scores == person.scores).all()


# ---- Frames


def test_frames_are_read_ahead_in_order_and_none_is_lost() -> None:
    made: list[int] = []

    def items() -> Generator[int]:
        for number in range(500):
            made.append(number)
            yield number

    ahead = media.read_ahead(items(), 7)
    assert [next(ahead) for _ in range(3)] == [0, 1, 2]
    deadline = time.monotonic() + 20
    while len(made) < 11 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(made) == 11  # three that were taken, seven that wait, one in the hand of the thread
    assert list(ahead) == list(range(3, 500))


def test_an_error_comes_where_its_frame_would_and_the_thread_ends() -> None:
    def items() -> Generator[int]:
        yield 1
        raise UserError("broken here")

    ahead = media.read_ahead(items(), 7)
    assert next(ahead) == 1
    with pytest.raises(UserError, match="broken here"):
        next(ahead)
    endless = media.read_ahead((number for number in itertools.count()), 2)
    next(endless)
    endless.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread.name == "frames"]


def test_a_process_is_forked_between_frames_alone() -> None:
    """A loading process that inherits a lock which the thread holds inside of OpenCV would wait for ever."""
    entered, made = threading.Event(), []

    def items() -> Generator[int]:
        entered.set()
        time.sleep(0.5)
        made.append(1)
        yield 1

    ahead = media.read_ahead(items(), 1)
    starting = threading.Thread(target=lambda: list(ahead))
    starting.start()
    assert entered.wait(20)
    child = os.fork()
    if child == 0:
        os._exit(0 if made else 1)
    assert os.waitpid(child, 0)[1] == 0
    starting.join()


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("film") / "clip.mp4"
    film.write(path, 0, 20, (96, 128))
    return path


def test_times_are_those_of_the_frames_and_rise(clip: Path) -> None:
    frames = list(media.decode_ahead(clip))
    assert [frame.number for frame in frames] == list(range(20))
    assert [frame.time for frame in frames] == pytest.approx(np.arange(20) / film.RATE, abs=1e-6)
    assert [frame.time for frame in frames] == pytest.approx(media.frame_times(clip), abs=1e-6)
    plain = [frame.pixels for frame in media.read_frames(clip)]
    assert all((ours.pixels == theirs).all() for ours, theirs in zip(frames, plain, strict=True))


# ---- eval.py --images and PoseEstimator


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """eval.py --images in this process: the folder of its results."""
    monkeypatch.chdir(tmp_path)
    main = importlib.import_module("sapiens_accel.eval").main

    def run(weights: Path, images: Path, *words: object) -> Path:
        shutil.rmtree(tmp_path / "evaluations", ignore_errors=True)
        main([str(weights), "--images", str(images), "--data.num_workers", "0", *map(str, words)])
        (folder,) = tmp_path.glob("evaluations/*/images/*")
        return folder

    return run


@pytest.fixture(scope="module")
def boxes(clip: Path) -> Path:
    """The true boxes of each frame, as a file of detections."""
    rows = []
    for index, truth in enumerate(film.play(0, 20, (96, 128))):
        name = media.frame_name(clip, index)
        rows += [{"image_id": name.removesuffix(".jpg"), "category_id": 1, "bbox": box.tolist(), "score": 0.9}
                 for box in truth.boxes_xywh]  # fmt: skip
    file = clip.parent / "boxes.json"
    file.write_text(json.dumps(rows))
    return file


def test_a_video_has_identities_and_times_in_all_files(
    program: Callable[..., Path], clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """JSON and CSV of eval.py, and PoseEstimator: the same, in pieces of 8 frames; smoothed and not."""
    monkeypatch.setattr(predict_media, "FRAMES", 8)
    monkeypatch.setattr(estimator, "FRAMES", 8)
    weights = untrained(tmp_path / "weights")
    points = {}
    for smooth in (False, True):
        folder = program(weights, clip, "--csv", "long", "--smooth", smooth)
        tree = json.loads((folder / "keypoints.json").read_text())
        assert [image["file_name"] for image in tree["images"]] == [f"clip_{index:06d}.jpg" for index in range(20)]
        assert [image["time"] for image in tree["images"]] == pytest.approx(np.arange(20) / 25, abs=1e-6)
        assert {one["track_id"] for one in tree["annotations"]} == {1} and len(tree["annotations"]) == 20
        rows = list(csv.DictReader((folder / "keypoints.csv").open()))
        assert [row["track_id"] for row in rows] == ["1"] * 20 * 17
        assert [float(row["time"]) for row in rows[::17]] == [image["time"] for image in tree["images"]]
        results = list(PoseEstimator.from_pretrained(weights, device="cpu", smooth=smooth)(clip))
        assert [one for r in results for one in r.to_coco()["annotations"]] == [
            {**one, "id": 1, "image_id": 1} for one in tree["annotations"]
        ]
        assert [result.time for result in results] == [frame.time for frame in media.read_frames(clip)]
        points[smooth] = np.array([one["keypoints"] for one in tree["annotations"]])
    assert (points[True] != points[False]).any()
    assert not (folder / ".frames").exists()


def test_smoothing_is_refused_for_images(program: Callable[..., Path], tmp_path: Path, clip: Path) -> None:
    frames = media.write_frames(clip, tmp_path / "frames", 10)
    with pytest.raises(UserError, match=r"--eval.smooth: .*frames is no video"):
        program(untrained(tmp_path / "weights"), frames.root, "--smooth")


def test_numbers_and_colors_of_people_are_drawn() -> None:
    image = np.zeros((200, 400, 3), np.uint8)
    people = [_person(100), _person(300)]
    points, shown = np.stack([one.points_xy for one in people]), np.ones((2, 17), bool)
    plain = draw.draw_people(image, points, shown, COCO17)
    drawn = draw.draw_people(image, points, shown, COCO17, [1, 12])
    for number, half in ((1, drawn[:, :200]), (12, drawn[:, 200:])):
        assert (half == draw.track_color(number)).all(axis=-1).sum() > 100
    assert draw.track_color(11) == draw.track_color(1) != draw.track_color(2)
    assert not (plain == draw.track_color(1)).all(axis=-1).any()


def test_an_animal_keeps_its_columns_in_deeplabcuts_table() -> None:
    """Rows are sorted by score; track 3 takes the columns of track 1, which has ended."""

    def row(frame: int, *tracks: int) -> ImageRow:
        people = [PersonRow(np.full((1, 2), float(track)), np.ones(1), 0.5, track_id=track) for track in tracks]
        return ImageRow("a.mp4", people, frame, frame=frame, time=frame / 25)

    rows = [row(0, 2, 1), row(1, 1, 2), row(2, 2), row(3, 3, 2)]
    lines = list(csv.reader(keypoint_csv.format_csv(["nose"], "deeplabcut", rows).splitlines()))
    assert [line[1::3] for line in lines[4:]] == [["1.0", "2.0"], ["1.0", "2.0"], ["nan", "2.0"], ["3.0", "2.0"]]
