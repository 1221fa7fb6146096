"""What the official recipes take from the published pipelines, and the four data sets of the published numbers."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from sapiens_accel.config import parse as config
from sapiens_accel.config.schema import AugmentConfig, DataConfig, MoreData, StageConfig
from sapiens_accel.data import build, leakage
from sapiens_accel.data import people as people_tables
from sapiens_accel.data.augment import Augmenter
from sapiens_accel.data.dataset import Key, Labeled, TrainingPeople
from sapiens_accel.errors import UserError
from sapiens_accel.formats.tools.coco_datasets import CROWDPOSE_NAMES
from sapiens_accel.formats.tools.mpii import NAMES as MPII_NAMES
from sapiens_accel.pose import geometry, person_boxes
from sapiens_accel.pose.skeleton import COCO17
from sapiens_accel.sources import synthetic

REPOSITORY = Path(__file__).resolve().parents[2]
REAL = REPOSITORY / os.environ.get("SAPIENS_ACCEL_TEST_DATA", "../shared/data") / "coco_mini"
INPUT_HW = (256, 192)
# AI Challenger's order, as mmpose's aic_train.json names it.
AIC_NAMES = (
    *(f"{side}_{joint}" for joints in (("shoulder", "elbow", "wrist"), ("hip", "knee", "ankle"))
      for side in ("right", "left") for joint in joints), "head_top", "neck",
)  # fmt: skip


# ---- The shift


def _published_center(box: np.ndarray, rng: np.random.Generator, config: AugmentConfig) -> np.ndarray:
    """The published order with our draws: the padded box is shifted by a share of itself, the aspect comes after."""
    scale = box[2:] * 1.25
    rng.random(2)  # mirrored, half body
    draws: list[float] = []
    while len(draws) < 2:
        draws.append(rng.standard_normal())
    outside = [k for k in range(2) if abs(draws[k]) > 1]
    while outside:
        for k in outside:
            draws[k] = rng.standard_normal()
        outside = [k for k in outside if abs(draws[k]) > 1]
    offset = np.array(draws) * config.shift * (rng.random() < config.shift_p)
    return box[:2] + box[2:] / 2 + offset * scale


def test_the_shift_is_a_share_of_the_padded_box() -> None:
    """Of somebody narrow, 40 x 300 px: at most 8 px aside, where a share of the crop is up to 45 px."""
    published = AugmentConfig(shift_p=1.0, half_body_p=0.0, shift_of="box")
    box, keypoints = np.array([100.0, 50.0, 40.0, 300.0]), np.full((17, 3), 2.0)
    base = geometry.crop_around_box(box, 1.25, INPUT_HW)
    away = {}
    for of in ("box", "crop"):
        augmenter = Augmenter(config=replace(published, shift_of=of), skeleton=COCO17, input_hw=INPUT_HW)
        crops = [augmenter.train_crop(base, keypoints, np.random.default_rng(seed)) for seed in range(300)]
        centers = np.array([crop.center_xy for crop in crops])
        away[of] = np.abs(centers - base.center_xy).max(axis=0)
        if of == "box":
            expected = [_published_center(box, np.random.default_rng(seed), published) for seed in range(300)]
            assert centers == pytest.approx(np.array(expected), abs=1e-9)
    assert away["box"] == pytest.approx([0.16 * 50, 0.16 * 375], rel=0.05)
    assert away["crop"] == pytest.approx([0.16 * 375 * 192 / 256, 0.16 * 375], rel=0.05)


def test_a_half_body_shifts_by_its_own_box() -> None:
    keypoints = np.full((17, 3), 2.0)
    keypoints[:, :2] = np.random.default_rng(0).uniform((100, 0), (130, 300), (17, 2))
    base = geometry.crop_around_box(np.array([90.0, 0.0, 50.0, 300.0]), 1.25, INPUT_HW)
    config = AugmentConfig(half_body_p=1.0, shift_p=1.0, shift=1.0, shift_of="box", scale=0.0, rotation_p=0.0)
    augmenter = Augmenter(config=config, skeleton=COCO17, input_hw=INPUT_HW)
    crops = [augmenter.train_crop(base, keypoints, np.random.default_rng(seed)) for seed in range(200)]
    for crop in crops:
        chosen = next(part for part in (keypoints[:11, :2], keypoints[11:, :2])
                      if crop.box_wh == pytest.approx(np.ptp(part, axis=0) * 1.5))  # fmt: skip
        assert (np.abs(crop.center_xy - chosen.mean(axis=0)) <= np.ptp(chosen, axis=0) * 1.5).all()


# ---- Boxes that end at the border


def test_boxes_end_at_the_border_as_published() -> None:
    boxes = np.array([[-10, -5, 60, 50], [80, 20, 40, 100], [10, 10, 20, 20], [200, 0, 30, 30], [-5, 0, 20, 20.0]])
    sizes = np.array([[100, 80]] * 4 + [[np.nan, np.nan]], float)
    expected = [[0, 0, 50, 45], [80, 20, 19, 59], [10, 10, 20, 20], [200, 0, 30, 30], [-5, 0, 20, 20]]
    assert person_boxes.clip_boxes(boxes, sizes).tolist() == expected


def test_the_option_clips_training_and_validation(tmp_path: Path) -> None:
    root = synthetic.write(tmp_path / "drawn", num_train=4, num_unlabelled=1, num_val=3)
    for split in ("train", "val"):
        file = root / f"annotations/person_keypoints_{split}2017.json"
        tree = json.loads(file.read_text())
        for person in tree["annotations"]:
            x, y, w, h = person["bbox"]
            person["bbox"] = [x - 500, y, w + 500, h]
        file.write_text(json.dumps(tree))
    data = DataConfig(root=str(root), cache_dir=str(tmp_path / "cache"), num_workers=0, box_padding=3.0)
    for clips in (False, True):
        sets = build.open_people(replace(data, clip_boxes=clips), COCO17, unlabeled=False)
        for people in (sets.train, sets.val):
            assert (people_tables.boxes_of(people.rows)[:, 0] == 0).all() == clips


# ---- Keypoints outside of the crop


def test_keypoints_outside_of_the_crop_are_learned_or_not(tmp_path: Path) -> None:
    root = synthetic.write(tmp_path / "drawn", num_train=12, num_unlabelled=1, num_val=2)
    data = DataConfig(root=str(root), cache_dir=str(tmp_path / "cache"), input_hw=INPUT_HW, num_workers=0)
    sets = build.open_people(data, COCO17, unlabeled=False)
    augmenter = Augmenter(config=AugmentConfig(scale=0.5, shift_p=1.0), skeleton=COCO17, input_hw=INPUT_HW)
    samples: dict[str, list[Labeled]] = {}
    for rule in ("near", "ignored"):
        people = TrainingPeople(
            sets, augmenter, replace(data, outside_keypoints=rule), StageConfig(global_batch=12), seed=0, stage="phase2"
        )
        found = [people[Key(step, place, False)] for step in range(4) for place in range(12)]
        samples[rule] = [one for one in found if isinstance(one, Labeled)]
    num_outside = 0
    for near, ignored in zip(samples["near"], samples["ignored"], strict=True):
        assert torch.equal(near.view.image, ignored.view.image) and torch.equal(near.points_xy, ignored.points_xy)
        for k, (x, y) in enumerate(near.points_xy.tolist()):
            is_outside = not (0 <= x < 192 and 0 <= y < 256)
            assert ignored.weights[k] == (0 if is_outside else near.weights[k])
            num_outside += is_outside and bool(near.weights[k] > 0)
    assert num_outside > 50


# ---- The four data sets


def _set(root: Path, file: str, folder: str, names: tuple[str, ...], images: list[Path], first: int) -> None:
    """A JSON with all keypoints of its own names, one person in each image; images under names of its own."""
    rng = np.random.default_rng(first)
    (root / folder).mkdir(parents=True)
    tree: dict[str, Any] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": 1, "name": "person", "keypoints": names}],
    }
    for index, image in enumerate(images):
        number = first + index
        pixels = cv2.imread(str(image))
        assert pixels is not None
        height, width = pixels.shape[:2]
        cv2.imwrite(str(root / folder / f"{number}.jpg"), pixels, [cv2.IMWRITE_JPEG_QUALITY, 80])
        tree["images"].append({"id": number, "file_name": f"{number}.jpg", "width": width, "height": height})
        box = [10.0, 10.0, width - 20.0, height - 20.0]
        points = np.column_stack([rng.uniform((20, 20), (width - 20, height - 20), (len(names), 2)), [2] * len(names)])
        person = {"id": number, "image_id": number, "category_id": 1, "iscrowd": 0, "bbox": box}
        tree["annotations"].append({**person, "keypoints": points.ravel().tolist(), "num_keypoints": len(names)})
    (root / "annotations").mkdir(exist_ok=True)
    (root / "annotations" / file).write_text(json.dumps(tree))


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ROOT of the recipe: photographs of COCO, of which CrowdPose has two of validation, encoded anew."""
    if not REAL.is_dir():
        pytest.skip(f"no real images: {REAL} (SAPIENS_ACCEL_TEST_DATA)")
    root = tmp_path_factory.mktemp("four")
    photos = sorted({path.name: path for path in REAL.rglob("*.jpg")}.values())
    split, file = "train2017", "person_keypoints_train2017.json"
    _set(root / "coco", file, split, COCO17.names, photos[:5], 100)
    _set(root / "coco", "person_keypoints_val2017.json", "val2017", COCO17.names, photos[5:10], 200)
    _set(root / "mpii", file, split, MPII_NAMES, photos[10:13], 300)
    _set(root / "crowdpose", file, split, CROWDPOSE_NAMES, [*photos[13:16], *photos[6:8]], 400)
    _set(root / "aic", "aic_train.json", "images", AIC_NAMES, photos[16:20], 500)
    return root


def _recipe(root: Path, cache: Path, *words: str) -> DataConfig:
    recipe = ["--recipe", "sapiens_0.3b_coco_mpii_crowdpose_aic", "--data.root", str(root)]
    return config.load([*recipe, "--data.cache_dir", str(cache), *words]).data


def test_the_recipe_mixes_the_four_by_name_and_leaves_out_who_is_validated_on(four: Path, tmp_path: Path) -> None:
    data = _recipe(four, tmp_path)
    skeleton, _ = build.open_skeleton(data)
    assert skeleton.names == COCO17.names
    sets = build.open_people(data, skeleton, unlabeled=False)
    assert [len(part) for part in sets.train.parts] == [5, 3, 3, 4] and len(sets.val) == 5
    said = str(sets)
    crowdpose = four / "crowdpose/annotations/person_keypoints_train2017.json"
    assert f"{crowdpose}: 2 of its 5 images are images of validation: 2 of its 5 people are left out" in said
    assert said.count("images of validation") == 1
    for part, names in zip(sets.train.parts, (COCO17.names, MPII_NAMES, CROWDPOSE_NAMES, AIC_NAMES), strict=True):
        labels = people_tables.keypoints_of(part.rows)
        labeled = np.asarray((labels[..., 2] > 0).all(axis=0))
        assert [name for name, there in zip(COCO17.names, labeled, strict=True) if there] == [
            name for name in COCO17.names if name in names
        ]
        own = json.loads(part.annotations.read_text())["annotations"][0]["keypoints"]
        k, at = COCO17.names.index("left_wrist"), names.index("left_wrist")
        assert labels[0, k].tolist() == own[3 * at : 3 * at + 3]
    assert sets.train.parts[2].rows["ann_id"][:] == [400, 401, 402]


def test_without_the_option_the_first_copy_stops_the_run(four: Path, tmp_path: Path) -> None:
    data = _recipe(four, tmp_path, "--data.on_leak", "stop")
    with pytest.raises(
        UserError, match=r"403\.jpg: this training image is the validation image .*201\.jpg \(2 such"
    ) as said:
        build.open_people(data, COCO17, unlabeled=False)
    assert "--data.on_leak skip" in str(said.value) and "\n" not in str(said.value)


def test_copies_are_found_in_any_encoding_and_photographs_are_not_taken_for_one_another(tmp_path: Path) -> None:
    if not REAL.is_dir():
        pytest.skip(f"no real images: {REAL} (SAPIENS_ACCEL_TEST_DATA)")
    photos = sorted(REAL.rglob("*.jpg"))[:40]
    copies = []
    for index, photo in enumerate(photos[:12]):
        pixels = cv2.imread(str(photo))
        assert pixels is not None
        size = (0.4, 0.7, 1.0)[index % 3]
        small = cv2.resize(pixels, None, fx=size, fy=size, interpolation=cv2.INTER_AREA)
        copies.append(tmp_path / f"{index}{('.jpg', '.png', '.webp')[index // 3 % 3]}")
        cv2.imwrite(str(copies[-1]), small)
    assert leakage.find_copies(copies, photos, tmp_path) == dict(zip(copies, photos, strict=False))
    assert leakage.find_copies(photos[:20], photos[20:], tmp_path) == {}
    assert leakage.find_copies(photos[:20], photos[20:], tmp_path / "other") == {}, "from the cache or not"


def test_frames_of_a_fixed_camera_are_no_copies_of_one_another(tmp_path: Path) -> None:
    """A small dark animal on one background, elsewhere in each frame; the same frame in another encoding is a copy."""
    rng = np.random.default_rng(0)
    background = cv2.resize(
        rng.integers(80, 220, (12, 16, 3), dtype=np.uint8), (320, 240), interpolation=cv2.INTER_CUBIC
    )
    frames = []
    for index in range(12):
        frame = cv2.ellipse(
            background.copy(), (30 + 22 * index, 60 + 10 * index), (22, 14), 0, 0, 360, (20, 20, 20), -1
        )
        frames.append(tmp_path / f"{index}.png")
        cv2.imwrite(str(frames[-1]), frame)
    assert leakage.find_copies(frames[:6], frames[6:], tmp_path) == {}
    copy = tmp_path / "copy.jpg"
    cv2.imwrite(str(copy), cv2.resize(np.asarray(cv2.imread(str(frames[8]))), (160, 120), interpolation=cv2.INTER_AREA))
    assert leakage.find_copies([*frames[:6], copy], frames[6:], tmp_path) == {copy: frames[8]}


def test_figures_before_a_plain_background_are_no_copies_of_one_another(tmp_path: Path) -> None:
    """Thin ones, whose 32 x 32 gray levels hardly differ; each image at half its size is a copy."""
    files, copies = [], []
    for index in range(4):
        image = np.full((240, 320, 3), 200, np.uint8)
        cv2.line(image, (60 + 61 * index, 40), (90 + 55 * index, 200), (88, 88, 88), 2, cv2.LINE_AA)
        files.append(tmp_path / f"{index}.png")
        cv2.imwrite(str(files[-1]), image)
        copies.append(tmp_path / f"copy_{index}.jpg")
        cv2.imwrite(str(copies[-1]), cv2.resize(image, (160, 120), interpolation=cv2.INTER_AREA))
    assert leakage.find_copies(files[:2], files[2:], tmp_path) == {}
    assert leakage.find_copies(copies, files, tmp_path) == dict(zip(copies, files, strict=True))


def test_a_set_of_validations_images_alone_is_refused(four: Path, tmp_path: Path) -> None:
    one = MoreData(train_annotations="coco/annotations/person_keypoints_val2017.json", train_images="coco/val2017")
    data = replace(_recipe(four, tmp_path), more=(one,))
    with pytest.raises(UserError, match="nobody is left: all of its 5 images are those of validation"):
        build.open_people(data, COCO17, unlabeled=False)
