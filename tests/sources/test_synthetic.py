import json
import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO

from sapiens_accel.pose.skeleton import COCO17
from sapiens_accel.sources import cartoon, synthetic

COUNTS = {"train2017": 60, "unlabeled2017": 12, "val2017": 20}
LABELED = ("train2017", "val2017")
INDEX = {name: k for k, name in enumerate(COCO17.names)}


def _write(root: Path, seed: int = 0, num_train: int = COUNTS["train2017"]) -> Path:
    num_unlabelled, num_val = COUNTS["unlabeled2017"], COUNTS["val2017"]
    return synthetic.write(root, num_train=num_train, num_unlabelled=num_unlabelled, num_val=num_val, seed=seed)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _write(tmp_path_factory.mktemp("synthetic") / "data")


def _json(root: Path, split: str) -> dict:
    kind = "person_boxes" if split == "unlabeled2017" else "person_keypoints"
    return json.loads((root / "annotations" / f"{kind}_{split}.json").read_text())


def _keypoints(root: Path) -> np.ndarray:
    people = [a["keypoints"] for split in LABELED for a in _json(root, split)["annotations"]]
    return np.array(people, float).reshape(-1, 17, 3)


def _contents(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(root: Path, tmp_path: Path) -> None:
    first = _contents(root)
    assert _contents(_write(tmp_path / "again")) == first
    other = _contents(_write(tmp_path / "other", seed=1))
    pictures = [name for name in first if name.endswith(".jpg")]
    assert all(first[name] != other.get(name) for name in pictures)
    assert len({first[name] for name in pictures}) == len(pictures), "no image occurs twice, within or across splits"


def test_a_image_does_not_depend_on_how_many_are_drawn(root: Path, tmp_path: Path) -> None:
    fewer = _contents(_write(tmp_path / "fewer", num_train=20))
    shared = sorted(name for name in fewer if name.startswith("train2017"))[:-1]  # the last may be cut to fit the count
    assert len(shared) >= 5
    assert all(fewer[name] == _contents(root)[name] for name in shared)


def test_counts_are_people_and_every_annotated_image_is_there(root: Path) -> None:
    for split, num in COUNTS.items():
        data = _json(root, split)
        assert len(data["annotations"]) == num
        per_picture = np.unique([a["image_id"] for a in data["annotations"]], return_counts=True)[1]
        assert set(per_picture) <= {1, 2, 3}
        assert len(per_picture) == len(data["images"])
        assert {i["file_name"] for i in data["images"]} == {p.name for p in (root / split).iterdir()}


def test_it_loads_as_official_coco(root: Path) -> None:
    for split in LABELED:
        coco = COCO(str(root / "annotations" / f"person_keypoints_{split}.json"))
        category: Any = coco.loadCats(coco.getCatIds(["person"]))[0]
        assert tuple(category["keypoints"]) == COCO17.names
        assert [tuple(edge) for edge in category["skeleton"]] == [(a + 1, b + 1) for a, b in COCO17.edges]
        people: Any = coco.loadAnns(coco.getAnnIds(catIds=[1], iscrowd=False))
        for a in people:
            assert len(a["keypoints"]) == 51
            assert a["num_keypoints"] == sum(v > 0 for v in a["keypoints"][2::3]) >= synthetic.NUM_MIN_KEYPOINTS


def test_no_id_is_in_two_splits(root: Path) -> None:
    for kind in ("images", "annotations"):
        ids = [entry["id"] for split in COUNTS for entry in _json(root, split)[kind]]
        assert len(set(ids)) == len(ids)


def test_the_unlabeled_split_holds_boxes_but_no_keypoint_anywhere(root: Path) -> None:
    data = _json(root, "unlabeled2017")
    assert "keypoint" not in json.dumps(data)
    assert all(a["bbox"][2] > 0 and a["bbox"][3] > 0 for a in data["annotations"])


def test_points_outside_the_image_are_zero_and_all_others_inside(root: Path) -> None:
    points = _keypoints(root)
    outside = points[..., 2] == 0
    assert set(np.unique(points[..., 2])) == {0, 1, 2}
    assert (points[outside] == 0).all()
    assert (points[~outside][:, :2] > 0).all() and (points[~outside][:, :2] <= 239).all()
    assert 0.03 < outside.any(1).mean() < 0.3, "some people are cut by the border, most are not"


def test_boxes_and_areas_are_those_of_the_drawn_people(root: Path) -> None:
    for split in LABELED:
        for a in _json(root, split)["annotations"]:
            x, y, w, h = a["bbox"]
            assert x >= 0 and y >= 0 and x + w <= 240 and y + h <= 240
            assert 0.1 * w * h < a["area"] <= w * h
            points = np.array(a["keypoints"]).reshape(17, 3)
            inside = points[points[:, 2] > 0, :2]
            low, high = np.array([x, y]) - 1, np.array([x + w, y + h])
            assert ((inside >= low) & (inside <= high)).all(1).mean() > 0.9


def _person(arm: tuple[float, float], forearm: tuple[float, float], turn: float = 0.0) -> np.ndarray:
    """COCO keypoints of someone upright, 200 px tall, with both arms at these (abduction, flexion) angles, rad."""
    rng = np.random.default_rng(0)
    legs = np.full((2, 2, 2), (0.1, 0.0))
    pose = cartoon.Pose(arms=np.array([[arm, forearm]] * 2), legs=legs, view=(turn, 0.0, 0.0))
    xy, parts = cartoon.figure(pose, cartoon.random_look(rng))
    origin_xy = np.array([120.0, 120.0])
    top = cartoon.draw(np.zeros((240, 240, 3), np.uint8), parts, 200.0, origin_xy)
    return cartoon.label(xy * 200.0 + origin_xy, top, parts, np.ones((240, 240), bool))


WRISTS = [INDEX["left_wrist"], INDEX["right_wrist"]]
FACE = [INDEX[name] for name in ("nose", "left_eye", "right_eye")]
LEFT = [k for k, name in enumerate(COCO17.names) if name.startswith("left")]
RIGHT = [k for k, name in enumerate(COCO17.names) if name.startswith("right")]


def test_hands_behind_the_trunk_are_occluded_from_the_front_and_visible_from_the_back() -> None:
    behind = ((0.3, -0.5), (-0.9, -0.6))
    assert (_person(*behind)[WRISTS, 2] == 1).all()
    assert (_person(*behind, turn=np.pi)[WRISTS, 2] == 2).all()
    before = ((0.3, 0.5), (-0.9, 0.8))
    assert (_person(*before)[WRISTS, 2] == 2).all()
    assert (_person(*before, turn=np.pi)[WRISTS, 2] == 1).all()


def test_the_face_is_seen_from_the_front_only_and_the_far_side_hides_in_profile() -> None:
    hanging = ((0.15, 0.0), (0.1, 0.1))
    assert (_person(*hanging)[FACE, 2] == 2).all()
    assert (_person(*hanging, turn=np.pi)[FACE, 2] == 1).all()
    facing_right = _person(*hanging, turn=np.pi / 2)  # the person's right side is towards the camera
    for name, seen in (("right_eye", 2), ("left_eye", 1), ("right_shoulder", 2), ("left_shoulder", 1), ("left_hip", 1)):
        assert facing_right[INDEX[name], 2] == seen, name
    assert facing_right[INDEX["nose"], 0] > facing_right[INDEX["left_ear"], 0]


def test_left_is_the_persons_left() -> None:
    hanging = ((0.15, 0.0), (0.1, 0.1))
    front, back = _person(*hanging), _person(*hanging, turn=np.pi)
    assert (front[LEFT, 0] > front[RIGHT, 0]).all()
    assert (back[LEFT, 0] < back[RIGHT, 0]).all()


def test_people_whose_face_is_visible_have_their_left_at_larger_x(root: Path) -> None:
    points = _keypoints(root)
    across = points[:, INDEX["left_shoulder"], 0] - points[:, INDEX["right_shoulder"], 0]
    inside = (points[:, [INDEX["left_shoulder"], INDEX["right_shoulder"]], 2] > 0).all(1)
    front = inside & (points[:, FACE, 2] == 2).all(1)
    back = inside & (points[:, FACE, 2] == 1).all(1)
    assert front.sum() > 10 and across[front].mean() > 5
    assert back.sum() > 2 and across[back].mean() < -5


def test_what_covers_a_person_occludes_the_keypoints_below() -> None:
    pose = cartoon.Pose(arms=np.full((2, 2, 2), (0.3, 0.0)), legs=np.full((2, 2, 2), (0.1, 0.0)))
    xy, parts = cartoon.figure(pose, cartoon.random_look(np.random.default_rng(0)))
    top = cartoon.draw(np.zeros((240, 240, 3), np.uint8), parts, 200.0, np.array([120.0, 120.0]))
    unhidden = np.ones((240, 240), bool)
    unhidden[140:] = False
    points = cartoon.label(xy * 200.0 + 120.0, top, parts, unhidden)
    low = points[:, 1] > 141
    assert low.sum() >= 4 and (points[low, 2] == 1).all()
    assert (points[points[:, 1] < 139, 2] == 2).sum() >= 9


def test_two_writers_leave_one_whole_folder(root: Path, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_write, args=(shared,)) for _ in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert _contents(shared) == _contents(root)
    assert [p.name for p in tmp_path.iterdir()] == ["shared"], "no temporary folder is left"


def test_the_slower_writer_uses_the_folder_of_the_faster_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow_draw = synthetic._write_split

    def overtaken(part: Path, *rest: object) -> None:
        monkeypatch.setattr(synthetic, "_write_split", slow_draw)
        _write(tmp_path / "data", seed=5, num_train=3)
        slow_draw(part, *rest)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(synthetic, "_write_split", overtaken)
    _write(tmp_path / "data", seed=6, num_train=3)
    assert _json(tmp_path / "data", "train2017")["info"]["seed"] == 5
    assert [p.name for p in tmp_path.iterdir()] == ["data"]


def test_a_complete_folder_is_not_drawn_again(root: Path) -> None:
    times = {p: p.stat().st_mtime_ns for p in root.rglob("*")}
    assert _write(root, seed=9, num_train=3) == root
    assert {p: p.stat().st_mtime_ns for p in root.rglob("*")} == times


def test_a_folder_of_something_else_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="mine"):
        _write(tmp_path / "mine")
    assert _contents(tmp_path) == {"mine/thesis.txt": b"precious"}


def test_a_failed_drawing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(synthetic.cv2, "imencode", fail)
    with pytest.raises(OSError, match="No space left"):
        _write(tmp_path / "data")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("hw", [(96, 320), (320, 160)])
def test_people_fit_into_images_of_any_shape(tmp_path: Path, hw: tuple[int, int]) -> None:
    synthetic.write(tmp_path / "data", num_train=60, num_unlabelled=1, num_val=1, image_hw=hw)
    data = _json(tmp_path / "data", "train2017")
    assert {(i["height"], i["width"]) for i in data["images"]} == {hw}
    boxes = np.array([a["bbox"] for a in data["annotations"]])
    assert (boxes[:, :2] + boxes[:, 2:] <= hw[::-1]).all()
    assert (boxes[:, 2:].max(1) > 0.2 * min(hw)).mean() > 0.9
