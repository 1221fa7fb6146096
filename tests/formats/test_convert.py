"""Labels of other tools as a COCO folder: every number, none dropped without a count; splits; refusals."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import foreign
import numpy as np
import pytest
from foreign import EDGES, HEIGHT, NAMES, WIDTH

from sapiens_accel.config.commands import CONVERT_FORMATS
from sapiens_accel.errors import UserError
from sapiens_accel.formats import convert
from sapiens_accel.formats.coco_folder import WriteOptions, split_images
from sapiens_accel.formats.dataset import PoseImage
from sapiens_accel.inference.media import Film

SPLITS = {"train": "train2017", "val": "val2017"}


def run(*words: object) -> None:
    convert.main([str(word) for word in words])


def read_tree(out: Path, split: str) -> dict[str, Any]:
    return json.loads((out / "annotations" / f"person_keypoints_{split}2017.json").read_text())


def read_back(out: Path) -> tuple[dict[str, list[dict[str, Any]]], list[dict[str, Any]], dict[str, str]]:
    """Annotations by the image's name (their order kept), the categories, and the split of each image."""
    by_name: dict[str, list[dict[str, Any]]] = {}
    split_of, categories = {}, []
    for split, folder in SPLITS.items():
        tree = read_tree(out, split)
        categories = tree["categories"]
        for image in tree["images"]:
            name = image["file_name"]
            assert (image["width"], image["height"]) == (WIDTH, HEIGHT)
            assert np.asarray(cv2.imread(str(out / folder / name))).shape == (HEIGHT, WIDTH, 3)
            key = Path(name).stem
            by_name[key] = [one for one in tree["annotations"] if one["image_id"] == image["id"]]
            split_of[key] = split
    return by_name, categories, split_of


def box_of_keypoints(points: np.ndarray) -> np.ndarray:
    """x, y, w, h: 0.15 of each side more on each side, cut off at the image's border."""
    low, high = points.min(axis=0), points.max(axis=0)
    low, high = low - 0.15 * (high - low), high + 0.15 * (high - low)
    low, high = np.maximum(low, 0), np.minimum(high, (WIDTH, HEIGHT))
    return np.concatenate([low, high - low])


def check_mice(
    out: Path, *, animals: int = 2, boxes: bool, tolerance: float = 5e-3, names: tuple[str, ...] = NAMES
) -> dict[str, str]:
    """Everything that was labeled is there, and nothing else; the split of each image."""
    by_name, categories, split_of = read_back(out)
    places = [categories[0]["keypoints"].index(name) for name in names]
    assert len(by_name) == 6
    for shot in foreign.shots(animals):
        people = by_name[Path(shot.name).stem]
        assert len(people) == len(shot.mice)
        for one, mouse in zip(people, shot.mice, strict=True):
            points = np.array(one["keypoints"]).reshape(-1, 3)
            np.testing.assert_allclose(points[places][:, :2], mouse.points[:, :2], atol=tolerance)
            np.testing.assert_array_equal(points[places][:, 2] > 0, mouse.points[:, 2] > 0)
            assert one["num_keypoints"] == (mouse.points[:, 2] > 0).sum() == (points[:, 2] > 0).sum()
            labeled = mouse.points[mouse.points[:, 2] > 0, :2]
            expected = mouse.box if boxes else box_of_keypoints(labeled)
            np.testing.assert_allclose(one["bbox"], expected, atol=0.02)
    return split_of


def test_every_format_has_a_reader_a_name_and_a_line_in_the_docs() -> None:
    page = Path(convert.__file__).parents[2] / "docs" / "own_data.md"
    table = page.read_text().split("| format |")[1].split("\n\n")[0]
    cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    described = {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}
    assert set(convert.READERS) == described, "the table of docs/own_data.md"
    assert set(CONVERT_FORMATS) == {*described, "coco_json", "video"}, "config/commands.py"


# ---- Each tool


@pytest.mark.parametrize("index_columns", [1, 3])
def test_deeplabcut(tmp_path: Path, capsys: pytest.CaptureFixture[str], index_columns: int) -> None:
    project = foreign.deeplabcut(tmp_path / "project", index_columns=index_columns)
    run("deeplabcut", project, tmp_path / "out", "--category", "mouse")
    split_of = check_mice(tmp_path / "out", animals=1, boxes=False)
    # A whole session validates: neighboring frames are in one split.
    assert {split_of[f"img{n:03d}"] for n in range(3)} != {split_of[f"img{n:03d}"] for n in range(3, 6)}
    assert len(set(split_of.values())) == 2
    categories = read_tree(tmp_path / "out", "val")["categories"]
    assert categories[0]["name"] == "mouse" and categories[0]["keypoints"] == list(NAMES)
    assert categories[0]["skeleton"] == [[a + 1, b + 1] for a, b in EDGES]
    assert "left out" not in capsys.readouterr().out


def test_deeplabcut_with_several_animals_and_parts_that_are_there_once(tmp_path: Path) -> None:
    project = foreign.deeplabcut(tmp_path / "project", animals=2, unique=True)
    run("deeplabcut", project, tmp_path / "out")
    by_name, categories, _ = read_back(tmp_path / "out")
    assert [(one["name"], one["keypoints"]) for one in categories] == [("animal", list(NAMES)), ("single", ["corner"])]
    for shot in foreign.shots(2):
        *mice, corner = by_name[Path(shot.name).stem]
        assert [one["category_id"] for one in mice] == [1] * len(shot.mice) and corner["category_id"] == 2
        assert corner["keypoints"] == [5, 7, 2]


def test_deeplabcut_by_its_hdf5(tmp_path: Path) -> None:
    """Written by pandas as DeepLabCut does: to_hdf of a frame with a MultiIndex, key df_with_missing."""
    pytest.importorskip("tables")
    import pandas as pd

    project = foreign.deeplabcut(tmp_path / "project")
    for file in project.rglob("*.csv"):
        frame = pd.read_csv(file, header=[0, 1, 2], index_col=[0, 1, 2])
        frame.columns.names = ["scorer", "bodyparts", "coords"]
        frame.to_hdf(file.with_suffix(".h5"), key="df_with_missing", mode="w")
        file.unlink()
    run("deeplabcut", project, tmp_path / "out")
    check_mice(tmp_path / "out", animals=1, boxes=False)


def test_lightning_pose(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One CSV for all sessions, in the folder of labeled-data."""
    every = foreign.shots(1)
    foreign.write_images(tmp_path / "labeled-data", every)
    file = tmp_path / "CollectedData.csv"
    file.write_text("\n".join(",".join(map(str, row)) for row in foreign.collected_data(every, 1, 1)))
    run("lightning_pose", file, tmp_path / "out", "--category", "mouse", "--boxes", "image")
    by_name, _, _ = read_back(tmp_path / "out")
    assert {tuple(one["bbox"]) for people in by_name.values() for one in people} == {(0, 0, WIDTH, HEIGHT)}
    assert (
        "6 of whole images, 6 with an area of 0.53 of the tool's box or of the one from keyp" in capsys.readouterr().out
    )
    # The areas by which OKS is measured are those of the animals, not of the image: as with boxes of keypoints.
    for shot in every:
        (one,) = by_name[Path(shot.name).stem]
        labeled = shot.mice[0].points[shot.mice[0].points[:, 2] > 0, :2]
        assert one["area"] == pytest.approx(0.53 * (1.3 * np.ptp(labeled, axis=0)).prod(), abs=0.01)


@pytest.mark.parametrize("rule", ["annotation", "keypoints", "image"])
def test_areas_do_not_depend_on_the_written_box(tmp_path: Path, rule: str) -> None:
    """Where the tool has boxes and no areas; an evaluation takes 0.53 of the written box where there is no `area`."""
    run("yolo", foreign.yolo(tmp_path / "mice", 3), tmp_path / "out", "--boxes", rule)
    by_name, _, _ = read_back(tmp_path / "out")
    for shot in foreign.shots():
        for one, mouse in zip(by_name[Path(shot.name).stem], shot.mice, strict=True):
            assert ("area" in one) == (rule != "annotation")
            area = one.get("area", 0.53 * np.prod(one["bbox"][2:]))
            assert area == pytest.approx(0.53 * np.prod(mouse.box[2:]), rel=2e-3)


@pytest.mark.parametrize("embed", [False, True], ids=["images", "package"])
def test_sleap(tmp_path: Path, embed: bool) -> None:
    """A file that sleap-io wrote, which is SLEAP's own reader and writer."""
    pytest.importorskip("sleap_io")
    (tmp_path / "labels").mkdir()
    file = foreign.sleap(tmp_path / "labels", embed=embed)
    run("sleap", file, tmp_path / "out")
    if not embed:
        check_mice(tmp_path / "out", boxes=False, tolerance=0.01)
    trees = [read_tree(tmp_path / "out", split) for split in SPLITS]
    categories, every = trees[0]["categories"], foreign.shots()
    numbers = sorted(x for tree in trees for one in tree["annotations"] for x in one["keypoints"][::3])
    expected = sorted(x for shot in every for mouse in shot.mice for x in mouse.points[:, 0].tolist())
    np.testing.assert_allclose(numbers, expected, atol=0.01)
    # Each image is the session's own: image n has a background of 40 n.
    colors = sorted(int(np.median(np.asarray(cv2.imread(str(path))))) for path in (tmp_path / "out").rglob("0*/*.*g"))
    np.testing.assert_allclose(colors, [40 * number for number in range(6)], atol=2)
    assert categories[0]["name"] == "mouse" and categories[0]["skeleton"] == [[a + 1, b + 1] for a, b in EDGES]
    assert (tmp_path / "out" / "skeleton.yaml").read_text() == "mirror:\n- [left_ear, right_ear]\n"


def test_sleap_with_a_film(tmp_path: Path) -> None:
    """Its frames are decoded: frame n has a gray of 30 n."""
    sio = pytest.importorskip("sleap_io")
    film = Film(tmp_path / "cage.mp4", 10)
    for number in range(8):
        film.add(np.full((HEIGHT, WIDTH, 3), 30 * number, np.uint8))
    film.close()
    skeleton, points = sio.Skeleton(list(NAMES)), np.arange(8.0).reshape(4, 2) * 20
    video = sio.Video.from_filename(str(tmp_path / "cage.mp4"))
    frames = [
        sio.LabeledFrame(video=video, frame_idx=index, instances=[sio.Instance.from_numpy(points, skeleton=skeleton)])
        for index in (0, 3, 4, 7)
    ]
    sio.Labels(frames).save(str(tmp_path / "labels.slp"), embed=False)
    run("sleap", tmp_path / "labels.slp", tmp_path / "out")
    by_name, categories, split_of = read_back(tmp_path / "out")
    assert split_of == {"000000": "train", "000003": "train", "000004": "train", "000007": "val"}  # the last frames
    assert categories[0]["name"] == "animal"
    for path in (tmp_path / "out").rglob("*.jpg"):
        assert abs(int(np.median(np.asarray(cv2.imread(str(path))))) - 30 * int(path.stem)) <= 4
    np.testing.assert_allclose(np.array(by_name["000003"][0]["keypoints"]).reshape(4, 3)[:, :2], points, atol=0.01)


def test_sleap_counts_what_a_model_has_predicted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sio = pytest.importorskip("sleap_io")
    labels = foreign.sleap_labels(tmp_path)
    points = np.ones((4, 2))
    predicted = sio.PredictedInstance.from_numpy(points, skeleton=labels.skeletons[0], point_scores=np.ones(4), score=1)
    labels.labeled_frames[0].instances.append(predicted)
    labels.save(str(tmp_path / "labels.slp"), embed=False)
    run("sleap", tmp_path / "labels.slp", tmp_path / "out")
    check_mice(tmp_path / "out", boxes=False, tolerance=0.01)
    assert "left out: predicted instances (1)\n" in capsys.readouterr().out


@pytest.mark.parametrize("link", ["parent", "relation", "place"])
def test_label_studio(tmp_path: Path, link: str) -> None:
    run("label_studio", foreign.label_studio(tmp_path, link), tmp_path / "out")
    check_mice(tmp_path / "out", boxes=True)
    assert read_tree(tmp_path / "out", "train")["categories"][0]["name"] == "mouse"


def test_label_studio_as_sleap_io_writes_it(tmp_path: Path) -> None:
    sio = pytest.importorskip("sleap_io")
    labels = foreign.sleap_labels(tmp_path / "images")
    file = tmp_path / "tasks.json"
    sio.save_labelstudio(labels, str(file))
    tasks = json.loads(file.read_text())
    for number, task in enumerate(tasks):  # sleap-io names the video, where Label Studio itself names the image
        task["data"]["image"] = f"{foreign.shots()[number].path}"
    file.write_text(json.dumps(tasks))
    run("label_studio", file, tmp_path / "out", "--images", tmp_path / "images", "--boxes", "keypoints")
    by_name, _, _ = read_back(tmp_path / "out")
    for shot in foreign.shots():
        people = by_name[Path(shot.name).stem]
        assert [one["num_keypoints"] for one in people] == [int((m.points[:, 2] > 0).sum()) for m in shot.mice]


def test_cvat_for_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("cvat", foreign.cvat_images(tmp_path / "task"), tmp_path / "out")
    check_mice(tmp_path / "out", boxes=False)
    by_name, categories, _ = read_back(tmp_path / "out")
    assert by_name["img000"][0]["keypoints"][2::3] == [2, 2, 2, 1]  # occluded
    assert categories[0]["skeleton"] == [[a + 1, b + 1] for a, b in EDGES]
    assert "left out: shapes of type polygon (1)\n" in capsys.readouterr().out


def test_points_at_the_origin_of_cvat_are_not_labeled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Datumaro writes v = 0 as a point at 0.00, 0.00 like any other: in skeletons and in shapes of points."""
    task = foreign.cvat_images(tmp_path / "task")
    file, mice = task / "annotations.xml", [mouse for shot in foreign.shots() for mouse in shot.mice]
    hidden = sum(int((mouse.points[:, 2] == 0).sum()) for mouse in mice)
    text, num = re.subn('outside="1"', 'outside="0"', file.read_text())
    assert num == hidden == 1
    file.write_text(text)
    run("cvat", task, tmp_path / "out")
    check_mice(tmp_path / "out", boxes=False)
    said = "points at 0.00, 0.00, taken as not labeled, as Datumaro writes v = 0"
    assert f"left out: {said} (1), shapes of type polygon (1)\n" in capsys.readouterr().out
    points = '<points label="mouse" occluded="0" points="30.00,40.00;0.00,0.00;0.00,60.00"/>'
    file.write_text(re.sub("<skeleton.*?</skeleton>", points, text))
    for image in ("img001", "img003", "img005"):  # where they had two
        file.write_text(re.sub(f"({image}.png[^>]*>{points}){points}", r"\1", file.read_text()))
    run("cvat", task, tmp_path / "loose")
    by_name, categories, _ = read_back(tmp_path / "loose")
    assert categories[0]["keypoints"] == ["mouse_1", "mouse_3"]
    assert all(one["keypoints"] == [30, 40, 2, 0, 60, 2] for people in by_name.values() for one in people)
    assert f"left out: {said} (6)" in capsys.readouterr().out


def test_cvat_for_video(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("cvat", foreign.cvat_video(tmp_path / "task"), tmp_path / "out")
    by_name, _, split_of = read_back(tmp_path / "out")
    assert split_of == {"frame_000000": "train", "frame_000002": "val"}
    points = np.array(by_name["frame_000002"][0]["keypoints"]).reshape(4, 3)
    np.testing.assert_allclose(points, foreign.shots(1)[2].mice[0].points, atol=0.01)
    assert "left out: interpolated shapes (1)\n" in capsys.readouterr().out


@pytest.mark.parametrize("dims", [2, 3])
def test_yolo(tmp_path: Path, dims: int, capsys: pytest.CaptureFixture[str]) -> None:
    run("yolo", foreign.yolo(tmp_path / "mice", dims), tmp_path / "out")
    split_of = check_mice(tmp_path / "out", boxes=True)
    assert [split_of[f"img{n:03d}"] for n in range(6)] == ["train"] * 4 + ["val"] * 2
    assert "split: as the tool has it\n" in capsys.readouterr().out
    assert (tmp_path / "out" / "skeleton.yaml").read_text() == "mirror:\n- [left_ear, right_ear]\n"


def test_images_of_both_splits_of_yolo_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = foreign.yolo(tmp_path / "mice")
    file = folder / "data.yaml"
    written = file.read_text()
    for number, (val, said) in enumerate([("images/train", "4 of 4 images"), ("images", "4 of 6 images")]):
        file.write_text(written.replace("val: images/val", f"val: {val}"))
        run("yolo", folder, tmp_path / f"out{number}")
        assert f"warning: {said} of val are images of train too, " in capsys.readouterr().out
    # The remedy that is named.
    file.write_text(written.replace("val: images/val\n", ""))
    run("yolo", folder, tmp_path / "drawn")
    said = capsys.readouterr().out
    assert "warning" not in said and "split: 1 image for validation, drawn with seed 0\n" in said


def test_yolo_as_sleap_io_writes_it(tmp_path: Path) -> None:
    """node_names for kpt_names, train/images, and a flip_idx that says nothing."""
    sio = pytest.importorskip("sleap_io")
    labels = foreign.sleap_labels(tmp_path / "images")
    sio.save_ultralytics(labels, str(tmp_path / "yolo"), split_ratios={"train": 0.5, "val": 0.5}, verbose=False)
    run("yolo", tmp_path / "yolo", tmp_path / "out")
    trees = [read_tree(tmp_path / "out", split) for split in SPLITS]
    numbers = sorted(round(x, 1) for tree in trees for one in tree["annotations"] for x in one["keypoints"][::3])
    expected = [x for shot in foreign.shots() for mouse in shot.mice for x in mouse.points[:, 0].tolist()]
    np.testing.assert_allclose(numbers, sorted(expected), atol=0.06)
    assert trees[0]["categories"][0]["keypoints"] == list(NAMES)
    assert not (tmp_path / "out" / "skeleton.yaml").exists()


def test_yolo_without_names_but_with_cocos_pairs_has_cocos(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = foreign.yolo(tmp_path / "people")
    flip = [0, 2, 1, 4, 3, 6, 5, 8, 7, 10, 9, 12, 11, 14, 13, 16, 15]
    (folder / "data.yaml").write_text(
        f"train: images/train\nval: images/val\nnames: [person]\nkpt_shape: [17, 3]\nflip_idx: {flip}\n"
    )
    for file in folder.rglob("*.txt"):
        file.write_text("0 .5 .5 .5 .5 " + " ".join(["0.5 0.25 2"] * 17))
    run("yolo", folder, tmp_path / "out")
    assert read_tree(tmp_path / "out", "val")["categories"][0]["keypoints"][:3] == ["nose", "left_eye", "right_eye"]
    assert "keypoints are named as COCO's" in capsys.readouterr().out


def test_labelme(tmp_path: Path) -> None:
    run("labelme", foreign.labelme(tmp_path / "labels"), tmp_path / "out")
    check_mice(tmp_path / "out", boxes=True)


def test_images_without_a_json_of_labelme_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = foreign.labelme(tmp_path / "labels")
    first = sorted(folder.rglob("*.json"))[0]
    image = first.parent / json.loads(first.read_text())["imagePath"]
    first.unlink()
    image.with_name(f"another{image.suffix}").write_bytes(image.read_bytes())
    run("labelme", folder, tmp_path / "out")
    assert "left out: images without labels (no JSON of theirs) (2)\n" in capsys.readouterr().out


def test_labelme_with_the_image_in_the_json(tmp_path: Path) -> None:
    import base64

    folder = foreign.labelme(tmp_path / "labels")
    for file in folder.rglob("*.json"):
        tree = json.loads(file.read_text())
        image = file.parent / tree["imagePath"]
        tree["imageData"] = base64.b64encode(image.read_bytes()).decode()
        image.unlink()
        file.write_text(json.dumps(tree))
    run("labelme", folder, tmp_path / "out")
    check_mice(tmp_path / "out", boxes=True)


def test_mpii(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Coordinates of MATLAB begin at 1; the images of a video come into one split."""
    run("mpii", foreign.mpii(tmp_path / "mpii"), tmp_path / "out")
    split_of = check_mice(tmp_path / "out", boxes=False, names=("head_top", "left_wrist", "right_wrist", "right_ankle"))
    assert len({split_of[f"img{n:03d}"] for n in range(3)}) == 1
    by_name, categories, _ = read_back(tmp_path / "out")
    assert {v for v in by_name["img000"][0]["keypoints"][2::3]} == {0, 1} and categories[0]["name"] == "person"
    assert "left out: images of the test set (1)\n" in capsys.readouterr().out


# ---- Splits, boxes, names


def _images(groups: str) -> list[PoseImage]:
    source = Path("x.png")
    return [
        PoseImage(name=f"{n:03d}.png", source=source, instances=[], group=None if g == "-" else g)
        for n, g in enumerate(groups)
    ]


def test_a_split_never_cuts_a_session() -> None:
    images = _images("aaabbbbccddddddeef")
    for seed in range(20):
        splits = split_images(images, WriteOptions(val=0.25, seed=seed)).splits
        sides = {(image.group, split) for image, split in zip(images, splits, strict=True)}
        assert len(sides) == 6 and {"train", "val"} == set(splits)
        assert abs(splits.count("val") - 4.5) <= 3.5
    assert split_images(images, WriteOptions(seed=3)) == split_images(images, WriteOptions(seed=3))


def test_of_one_video_the_last_frames_validate() -> None:
    assert split_images(_images("a" * 10), WriteOptions(val=0.3)).splits == ["train"] * 7 + ["val"] * 3


def test_images_of_no_session_are_drawn() -> None:
    chosen = [split_images(_images("-" * 40), WriteOptions(seed=seed)).splits for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2] and chosen[0].count("val") == 8


def test_a_single_keypoint_has_the_box_of_the_others_and_a_zero_sized_one_is_made_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Label Studio and SLEAP write boxes without width or height for one keypoint, and two in a line."""
    folder = foreign.yolo(tmp_path / "mice")
    train, val = folder / "labels" / "train", folder / "labels" / "val"
    (train / "img000.txt").write_text("0 0.5 0.5 0 0 0.5 0.5 2" + " 0 0 0" * 3)
    (val / "img004.txt").write_text("0 0.5 0.5 0.25 0 0.25 0.25 2 0.5 0.5 2" + " 0 0 0" * 2)
    run("yolo", folder, tmp_path / "out")
    by_name, _, _ = read_back(tmp_path / "out")
    others = [one["bbox"] for name in ("img001", "img002", "img003") for one in by_name[name]]
    width, height = np.median(others, axis=0)[2:]
    np.testing.assert_allclose(by_name["img000"][0]["bbox"], [160 - width / 2, 120 - height / 2, width, height])
    np.testing.assert_allclose(by_name["img004"][0]["bbox"], [80 - 12, 60 - 9, 80 + 24, 60 + 18])
    said = capsys.readouterr().out
    assert "1 from keypoints in a line or a single one" in said and "1 from the keypoints, with a margin" in said


def test_two_images_of_one_name_both_stay(tmp_path: Path) -> None:
    folder = foreign.label_studio(tmp_path).parent
    tasks = json.loads((folder / "export.json").read_text())
    for number, task in enumerate(tasks):
        old = folder / "images" / foreign.shots()[number].name
        new = folder / "images" / str(number) / "a.png"
        new.parent.mkdir()
        old.rename(new)
        task["data"]["image"] = f"/data/local-files/?d=images/{number}/a.png"
    (folder / "export.json").write_text(json.dumps(tasks))
    run("label_studio", folder / "export.json", tmp_path / "out")
    trees = [read_tree(tmp_path / "out", split) for split in SPLITS]
    assert [len({image["file_name"] for image in tree["images"]}) for tree in trees] == [5, 1]


def test_links_are_links(tmp_path: Path) -> None:
    run("deeplabcut", foreign.deeplabcut(tmp_path / "project"), tmp_path / "out", "--link")
    assert all(path.is_symlink() for path in (tmp_path / "out").rglob("*.png"))
    check_mice(tmp_path / "out", animals=1, boxes=False)


# ---- What is refused


def _without_images(folder: Path) -> Path:
    foreign.deeplabcut(folder)
    for image in folder.rglob("*.png"):
        image.unlink()
    return folder


def _predictions(folder: Path) -> Path:
    folder.mkdir()
    file = folder / "videoDLC.csv"
    file.write_text("scorer,m,m,m\nbodyparts,a,a,a\ncoords,x,y,likelihood\n0,1,2,0.5\n")
    return file


def _twice(folder: Path) -> Path:
    folder = foreign.labelme(folder)
    file = folder / "day1" / "img001.json"
    file.write_text(re.sub(r'"group_id": \d', '"group_id": 0', file.read_text()))
    return folder


def _short_line(folder: Path) -> Path:
    foreign.yolo(folder)
    (folder / "labels" / "train" / "img000.txt").write_text("0 0.5 0.5 0.1 0.1 0.5")
    return folder


REFUSED: dict[str, tuple[str, Callable[[Path], Path], str]] = {
    "no images": ("deeplabcut", _without_images, r"CollectedData_Ann\.csv: 3 images not found .*--images FOLDER$"),
    "predictions": ("deeplabcut", _predictions, r"videoDLC\.csv: predictions of a network"),
    "two of one name": ("labelme", _twice, r"img001\.json: two boxes in group 0"),
    "a short line": ("yolo", _short_line, r"img000\.txt: line 1: expected 17 numbers \(.*found 6$"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_converted_is_one_line(tmp_path: Path, case: str) -> None:
    name, make, expected = REFUSED[case]
    with pytest.raises(UserError, match=expected) as error:
        run(name, make(tmp_path / "in"), tmp_path / "out")
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_options_that_would_be_ignored_are_refused(tmp_path: Path) -> None:
    project = foreign.deeplabcut(tmp_path / "project")
    with pytest.raises(UserError, match=r"^--seconds: of a video"):
        run("deeplabcut", project, tmp_path / "out", "--seconds", "2")
    with pytest.raises(UserError, match=r"^--val 1\.5: expected a share"):
        run("deeplabcut", project, tmp_path / "out", "--val", "1.5")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(UserError, match=r"out: exists already"):
        run("deeplabcut", project, tmp_path / "out")


@pytest.mark.parametrize("form", ["cvat", "label_studio", "labelme"])
@pytest.mark.parametrize("name", ["result.json", "annotations/person_keypoints_default.json"])
def test_a_coco_export_needs_no_conversion(form: str, name: str, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(json.dumps({"images": [], "annotations": [], "categories": []}))
    for source in (tmp_path, tmp_path / name):
        with pytest.raises(UserError, match=r"this is a COCO JSON, .* --data\.train_annotations [\w/]+\.json "):
            convert.read(form, source)
