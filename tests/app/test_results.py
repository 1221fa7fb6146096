"""What the page answers, without the page: the files of eval.py --images, boxes by hand, one line for what is wrong."""

import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from detectors import tiny
from networks import untrained

from benchmarks import film
from sapiens_accel import PoseEstimator, UserError, cli
from sapiens_accel.app import results, server
from sapiens_accel.app.results import BY_HAND, DETECTOR, WHOLE, Answer, Request
from sapiens_accel.sources import synthetic

Program = Callable[..., Path]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image, a video, weights and a detector."""
    folder = tmp_path_factory.mktemp("app")
    drawn = synthetic.write(folder / "drawn", num_train=1, num_unlabelled=1, num_val=1)
    shutil.copy(next((drawn / "val2017").iterdir()), folder / "image.jpg")
    film.write(folder / "clip.mp4", 0, 12, (96, 128))
    untrained(folder / "weights")
    tiny(folder / "detector")
    return folder


@pytest.fixture(scope="module")
def pose(folder: Path) -> PoseEstimator:
    return PoseEstimator.from_pretrained(folder / "weights", device="cpu")


@pytest.fixture
def program(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Program:
    """eval.py --images in this process: the folder of its results."""
    monkeypatch.chdir(tmp_path)
    main = importlib.import_module("sapiens_accel.eval").main

    def run(name: str, *words: str) -> Path:
        main([str(folder / "weights"), "--images", str(folder / name), "--data.num_workers=0", "--csv=long", *words])
        return next(tmp_path.glob("evaluations/*/images/*"))

    return run


def _answer(pose: PoseEstimator, request: Request, folder: Path) -> Answer:
    folder.mkdir()
    *lines, answer = results.predict(pose, request, folder)
    assert isinstance(answer, Answer) and all(isinstance(line, str) for line in lines)
    return answer


@pytest.mark.parametrize(("name", "boxes"), [("image.jpg", DETECTOR), ("image.jpg", WHOLE), ("clip.mp4", WHOLE)])
def test_files_are_those_of_eval(
    program: Program, pose: PoseEstimator, folder: Path, tmp_path: Path, name: str, boxes: str
) -> None:
    """Of a video smoothed, with identities and times."""
    detector, smooth = str(folder / "detector"), name == "clip.mp4"
    request = Request(path=folder / name, boxes=boxes, detector=detector, smooth=smooth)
    answer = _answer(pose, request, tmp_path / "ours")
    theirs = program(name, "--boxes", detector if boxes == DETECTOR else "whole", *["--smooth"] * smooth)
    assert answer.csv.read_text() == (theirs / "keypoints.csv").read_text()
    ours, expected = (json.loads(file.read_text()) for file in (answer.json, theirs / "keypoints.json"))
    assert ours["annotations"] and {**ours, "info": 0} == {**expected, "info": 0}
    assert str(folder) not in answer.json.read_text()
    if smooth:
        assert isinstance(answer.drawn, Path) and answer.drawn.stat().st_size > 1000 and answer.rows == []
        assert answer.line.startswith("1 person in 12 frames; ")
    else:
        assert not isinstance(answer.drawn, Path) and answer.drawn.shape == (240, 240, 3)
        assert len(answer.rows) == 17 * len(ours["annotations"]) and answer.rows[0][:2] == [1, "nose"]


def test_boxes_by_hand_are_the_people_in_their_order(pose: PoseEstimator, folder: Path, tmp_path: Path) -> None:
    text = "\n".join([results.box_line((120, 200), (20, 30)), "", "40, 10.5, 90, 180"])
    assert text.splitlines()[0] == "20 30 100 170"
    request = Request(path=folder / "image.jpg", boxes=BY_HAND, detector="", box_text=text)
    answer = _answer(pose, request, tmp_path / "ours")
    boxes = [one["bbox"] for one in json.loads(answer.json.read_text())["annotations"]]
    assert boxes == [[20, 30, 100, 170], [40, 10.5, 90, 180]]
    image = results.read_preview(folder / "image.jpg")
    drawn = results.draw_boxes(image, text + "\nno box", corner=(5, 5))
    changed = (drawn != image).any(axis=-1)
    assert changed[30, 60] and changed[5, 5] and not changed[100, 70] and 1500 < changed.sum() < 4000


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "boxes: none"),
        ("1 2 3 4\n1 2 3", r"boxes, line 2: '1 2 3' \(expected x y width height"),
        ("a b c d", "boxes, line 1: 'a b c d'"),
        ("500 500 10 10", "is outside of the image"),
        ("5 5 0 10", "has no area"),
        ("nan 5 5 10", "has no area"),
    ],
)
def test_wrong_boxes_are_one_line(pose: PoseEstimator, folder: Path, tmp_path: Path, text: str, said: str) -> None:
    request = Request(path=folder / "image.jpg", boxes=BY_HAND, detector="", box_text=text)
    with pytest.raises(UserError, match=said):
        list(results.predict(pose, request, tmp_path))
    results.draw_boxes(np.zeros((9, 9, 3), np.uint8), text)


def test_a_video_that_was_cut_off_is_shown_as_far_as_it_goes(
    pose: PoseEstimator, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sapiens_accel.inference.media.video_length", lambda path: (100, 25.0))
    answer = _answer(pose, Request(path=folder / "clip.mp4", boxes=WHOLE, detector=""), tmp_path / "ours")
    assert "1 person in 12 frames" in answer.line and "of 100 frames that it says to have, 12 decode" in answer.line


def test_boxes_by_hand_of_a_video_are_refused(pose: PoseEstimator, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="boxes of mine: of a video"):
        request = Request(path=folder / "clip.mp4", boxes=BY_HAND, detector="", box_text="1 2 3 4")
        list(results.predict(pose, request, tmp_path))


def test_without_gradio_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'gradio is not installed\. Run pip install "sapiens_accel\[app\]"$'):
        cli.run(["app", "WEIGHTS"])
