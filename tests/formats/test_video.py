"""Frames of a film without labels: how many, which, their boxes against what was drawn, and how ssl reads them."""

import json
import shlex
import subprocess
from pathlib import Path
from typing import Any

import cv2
import foreign
import numpy as np
import pytest

from sapiens_accel.config import parse
from sapiens_accel.data import build
from sapiens_accel.errors import UserError
from sapiens_accel.formats import convert
from sapiens_accel.inference.media import Film, read_frames

NUM, RATE = 60, 10
WIDTH, HEIGHT, SIDE = 320, 240, 60


def corner(index: int) -> tuple[int, int]:
    """Where the square is: it stands for 20 frames at a time, then jumps."""
    return 20 + 100 * (index // 20), 30 + 50 * (index // 20)


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dark square in front of a bright, noisy wall."""
    path = tmp_path_factory.mktemp("film") / "arena.mp4"
    wall = np.random.default_rng(0).integers(150, 220, (HEIGHT, WIDTH, 3), np.uint8)
    wall = cv2.GaussianBlur(wall, (9, 9), 0)
    film = Film(path, RATE)
    for index in range(NUM):
        frame = wall.copy()
        x, y = corner(index)
        frame[y : y + SIDE, x : x + SIDE] = 20
        film.add(frame)
    film.close()
    return path


def run(*words: object) -> None:
    convert.main(["video", *(str(word) for word in words)])


def read_boxes(out: Path, folder: str = "unlabeled2017") -> dict[str, list[list[float]]]:
    tree: dict[str, Any] = json.loads((out / "annotations" / f"person_boxes_{folder}.json").read_text())
    boxes = {image["file_name"]: [] for image in tree["images"]}
    names = {image["id"]: image["file_name"] for image in tree["images"]}
    for one in tree["annotations"]:
        boxes[names[one["image_id"]]].append(one["bbox"])
    assert set(boxes) == {path.relative_to(out / folder).as_posix() for path in (out / folder).rglob("*.jpg")}
    return boxes


def numbers(boxes: dict[str, Any]) -> list[int]:
    return sorted(int(name[-10:-4]) for name in boxes)


def test_evenly(film: Path, tmp_path: Path) -> None:
    run(film, tmp_path / "out", "--frames", "4")
    boxes = read_boxes(tmp_path / "out")
    assert numbers(boxes) == [0, 20, 39, 59]
    assert list(boxes.values()) == [[[0, 0, WIDTH, HEIGHT]]] * 4


def test_by_seconds(film: Path, tmp_path: Path) -> None:
    run(film, tmp_path / "out", "--seconds", "1.5")
    assert numbers(read_boxes(tmp_path / "out")) == [0, 15, 30, 45]


def test_frames_that_differ(film: Path, tmp_path: Path) -> None:
    """Three of 60 frames: one of each place where the square stands; the same for the same seed."""
    for out in ("out", "again"):
        run(film, tmp_path / out, "--frames", "3", "--different")
    chosen = numbers(read_boxes(tmp_path / "out"))
    assert [index // 20 for index in chosen] == [0, 1, 2]
    assert chosen == numbers(read_boxes(tmp_path / "again"))


def test_boxes_of_what_moves(film: Path, tmp_path: Path) -> None:
    """The square and a margin of a tenth of it, to a few px of the codec's and the smoothing's."""
    run(film, tmp_path / "out", "--frames", "6", "--boxes", "motion")
    boxes = read_boxes(tmp_path / "out")
    assert len(boxes) == 6
    for name, several in boxes.items():
        x, y = corner(int(name[-10:-4]))
        margin = 0.1 * SIDE
        expected = np.array([x - margin, y - margin, SIDE + 2 * margin, SIDE + 2 * margin])
        assert len(several) == 1
        np.testing.assert_allclose(several[0], expected, atol=6)


def test_a_film_in_which_nothing_moves_is_refused(tmp_path: Path) -> None:
    still = Film(tmp_path / "still.mp4", RATE)
    for _ in range(10):
        still.add(np.full((HEIGHT, WIDTH, 3), 90, np.uint8))
    still.close()
    with pytest.raises(UserError, match=r"still\.mp4: nothing moves in 10 frames .*Use --boxes image$"):
        run(tmp_path / "still.mp4", tmp_path / "out", "--boxes", "motion")


def test_stage_ssl_reads_the_frames_of_two_films_beside_converted_labels(
    film: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert.main(["deeplabcut", str(foreign.deeplabcut(tmp_path / "project")), str(tmp_path / "out")])
    other = tmp_path / "cage.mp4"
    other.write_bytes(film.read_bytes())
    for path, num in ((film, 5), (other, 3), (other, 4)):  # again: its frames are replaced
        run(path, tmp_path / "out", "--frames", num, "--boxes", "motion")
    assert len(read_boxes(tmp_path / "out")) == 5 + len({*numbers_of(3), *numbers_of(4)})
    words = ["--data.cache_dir", str(tmp_path / "cache"), "--data.root", str(tmp_path / "out")]
    config = parse.load(["--recipe", "demo", *words])
    skeleton, _ = build.open_skeleton(config.data)
    people = build.open_people(config.data, skeleton, unlabeled=True)
    assert people.unlabeled is not None and len(people.unlabeled) == len(read_boxes(tmp_path / "out"))


def test_frames_in_a_folder_without_labels_are_read_by_the_options_that_are_printed(
    film: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And those whose boxes are too small are counted, by the option's name."""
    convert.main(["deeplabcut", str(foreign.deeplabcut(tmp_path / "project")), str(tmp_path / "labels")])
    run(film, tmp_path / "my frames", "--frames", "6", "--boxes", "motion")
    said = capsys.readouterr().out
    assert "my frames has no labels" in said and "a side below --data.unlabelled_min_side" in said
    options = shlex.split(said[said.index("--data.unlabelled_images") :].split(";")[0])
    file = tmp_path / "my frames" / "annotations" / "person_boxes_unlabeled2017.json"
    tree = json.loads(file.read_text())
    tree["annotations"][0]["bbox"][3] = 23.0
    file.write_text(json.dumps(tree))
    words = ["--data.cache_dir", str(tmp_path / "cache"), "--data.root", str(tmp_path / "labels"), *options]
    config = parse.load(["--recipe", "demo", *words])
    skeleton, _ = build.open_skeleton(config.data)
    sets = build.open_people(config.data, skeleton, unlabeled=True)
    assert sets.unlabeled is not None and len(sets.unlabeled) == 5
    small = "people without labels are left out: with a side below 24 px (--data.unlabelled_min_side)"
    assert f"{file}: 1 of its 6 {small}" in str(sets).splitlines()


def numbers_of(num: int) -> list[int]:
    return np.linspace(0, NUM - 1, num).round().astype(int).tolist()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--seconds", "1", "--frames", "5"], r"^--seconds: not together with --frames"),
        (["--frames", "0"], r"^--frames 0: expected more than 0$"),
        (["--boxes", "keypoints"], r"^--boxes keypoints: a video has no labels"),
        (["--link"], r"^--link: not of a video"),
        (["--val", "0.3"], r"^--val: not of a video"),
        (["--seconds", "nan"], r"^--seconds nan: expected more than 0$"),
        (["--animals", "2"], r"^--animals 2: without --boxes motion each frame has one box"),
    ],
)
def test_options_that_make_no_sense_are_refused(film: Path, tmp_path: Path, words: list[str], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        run(film, tmp_path / "out", *words)


# ---- Odd videos


def _ffmpeg(*words: object) -> None:
    exe = pytest.importorskip("imageio_ffmpeg").get_ffmpeg_exe()
    subprocess.run([exe, "-y", "-loglevel", "error", *map(str, words)], check=True)


def test_a_video_that_is_cut_off_gives_the_frames_that_decode(
    film: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, cut = tmp_path / "whole.mkv", tmp_path / "cut.mkv"
    _ffmpeg("-i", film, "-c", "copy", whole)
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size * 2 // 3])
    num = sum(1 for _ in read_frames(cut))
    assert 5 < num < NUM - 5
    run(cut, tmp_path / "out", "--frames", "5")
    assert numbers(read_boxes(tmp_path / "out")) == np.linspace(0, num - 1, 5).round().astype(int).tolist()
    said = capsys.readouterr().out
    assert f"cut.mkv: of {NUM} frames that it says to have, {num} decode. Is it cut off?\n" in said
    assert "nothing moves" not in said


def test_seconds_are_of_the_clock_where_the_rate_varies(film: Path, tmp_path: Path) -> None:
    """10 frames a second for three seconds, then two."""
    varies = tmp_path / "varies.mkv"
    _ffmpeg("-i", film, "-vf", "select='lt(t,2.95)+gte(t,2.95)*not(mod(n,5))'", "-fps_mode", "vfr", varies)
    run(varies, tmp_path / "out", "--seconds", "1")
    assert numbers(read_boxes(tmp_path / "out")) == [0, 10, 20, 30, 32, 34]


def test_a_video_that_a_phone_turned_is_upright(film: Path, tmp_path: Path) -> None:
    _ffmpeg("-display_rotation", "90", "-i", film, "-c", "copy", tmp_path / "turned.mp4")
    run(tmp_path / "turned.mp4", tmp_path / "out", "--frames", "1")
    assert list(read_boxes(tmp_path / "out").values()) == [[[0, 0, HEIGHT, WIDTH]]]
    (image,) = (tmp_path / "out").rglob("*.jpg")
    dark = np.argwhere(np.asarray(cv2.imread(str(image), 0)) < 80)
    x, y = corner(0)
    # Turned by 90 degrees against the clock: (x, y) is at (y, WIDTH - x).
    np.testing.assert_allclose(dark.min(0)[::-1], (y, WIDTH - x - SIDE), atol=4)


@pytest.mark.parametrize("words", [["--different"], ["--seconds", "1"], ["--frames", "9"]])
def test_one_frame_is_enough(film: Path, tmp_path: Path, words: list[str]) -> None:
    one = Film(tmp_path / "one.mp4", RATE)
    one.add(np.full((HEIGHT, WIDTH, 3), 90, np.uint8))
    one.close()
    run(tmp_path / "one.mp4", tmp_path / "out", *words)
    assert numbers(read_boxes(tmp_path / "out")) == [0]


def test_what_is_no_video_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("a text")
    (tmp_path / "folder.mp4").mkdir()
    _ffmpeg("-f", "lavfi", "-i", "sine=duration=1", "-c:a", "aac", tmp_path / "sound.mp4")
    for name in ("empty", "text", "sound"):
        with pytest.raises(UserError, match=rf"{name}\.mp4: does not open as a video; expected one that OpenCV"):
            run(tmp_path / f"{name}.mp4", tmp_path / "out")
    with pytest.raises(UserError, match=r"folder\.mp4: a folder \(expected a video\)\. Give its videos one by one"):
        run(tmp_path / "folder.mp4", tmp_path / "out")


def test_another_video_of_the_same_name_is_said_to_replace_frames(
    film: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for day in ("day1", "day2"):
        (tmp_path / day).mkdir()
        (tmp_path / day / "cam.mp4").write_bytes(film.read_bytes())
        run(tmp_path / day / "cam.mp4", tmp_path / "out", "--frames", "3")
    assert f"replaced: 3 frames of the same names in {tmp_path / 'out' / 'unlabeled2017' / 'cam'}\n" in (
        capsys.readouterr().out
    )


def test_the_category_is_that_of_the_labels(film: Path, tmp_path: Path) -> None:
    convert.main(["yolo", str(foreign.yolo(tmp_path / "mice")), str(tmp_path / "out")])
    with pytest.raises(UserError, match=r"^--category rat: the labels in .* have mouse\. Leave it out$"):
        run(film, tmp_path / "out", "--category", "rat")
    run(film, tmp_path / "out", "--frames", "1", "--category", "mouse")
