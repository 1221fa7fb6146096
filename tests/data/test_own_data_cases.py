"""What annotation tools export and what users write: each case has the outcome written beside it.

The cases are folders of `own_data_cases` in the folder of test data, which is not part of the repository.
"""

import contextlib
import io
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from upright import UprightPeople

from sapiens_accel.config.schema import Config, DataConfig, EvalConfig
from sapiens_accel.data import build
from sapiens_accel.data import people as people_tables
from sapiens_accel.data.dataset import Labeled, Sets, View
from sapiens_accel.data.people import People, boxes_of, keypoints_of
from sapiens_accel.doctor import report as doctor
from sapiens_accel.errors import UserError
from sapiens_accel.evaluation import coco_metrics, evaluate
from sapiens_accel.evaluation.boxes import Boxes, load_boxes
from sapiens_accel.evaluation.ground_truth import evaluated_categories
from sapiens_accel.evaluation.predict import Predictions
from sapiens_accel.inference import media
from sapiens_accel.pose.heatmap import Codec
from sapiens_accel.pose.skeleton import Skeleton
from sapiens_accel.sources import convert, images
from sapiens_accel.training.objectives import Supervised

REPOSITORY = Path(__file__).resolve().parents[2]
CASES = REPOSITORY / os.environ.get("SAPIENS_ACCEL_TEST_DATA", "../shared/data") / "own_data_cases"
pytestmark = pytest.mark.skipif(not CASES.is_dir(), reason=f"no cases: {CASES} (SAPIENS_ACCEL_TEST_DATA)")
MORE_IMAGES = ("bbox_xyxy", "v0_with_xy")
PLAIN = ("train.json", "train", "val.json", "val")
CVAT = (
    "annotations/person_keypoints_train.json",
    "images/train",
    "annotations/person_keypoints_val.json",
    "images/val",
)
ROBOFLOW = ("train/_annotations.coco.json", "train", "val/_annotations.coco.json", "val")
COCO_LAYOUT = (
    "annotations/person_keypoints_train2017.json", "train2017", "annotations/person_keypoints_val2017.json", "val2017",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Works:
    """A case that can be trained on.

    Attributes:
        people: labeled ones of training and of validation.
        pairs: of left and right; None: they are not known, and nothing is mirrored.
        lines: parts of the lines that a run prints.
        doctor: parts of what the doctor finds.
        ap: of perfect predictions, by pycocotools on the saved file; over all categories and in each.
    """

    people: tuple[int, int] = (6, 4)
    keypoints: int = 17
    pairs: int | None = 8
    files: tuple[str, str, str, str] = PLAIN
    options: Mapping[str, Any] = field(default_factory=dict)
    lines: tuple[str, ...] = ()
    doctor: tuple[str, ...] = ()
    ap: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Refused:
    """A case with a line that says what is wrong, and what to do."""

    text: str
    files: tuple[str, str, str, str] = PLAIN
    options: Mapping[str, Any] = field(default_factory=dict)


OUTCOMES: dict[str, Works | Refused] = {
    "animalpose_raw": Refused(text="no list 'images' in it"),
    "ann_id_missing": Works(),
    "ap10k": Works(people=(12, 8), pairs=7, lines=("3 categories, evaluated together and each: antelope 3, bison 3",)),
    "bbox_missing": Refused(text="--data.boxes keypoints"),
    "bbox_missing_half": Works(lines=("3 of 6 people have no box with a width and a height",)),
    "bbox_xyxy": Works(people=(12, 6), lines=("12 boxes look like corners, x1, y1, x2, y2",), doctor=("corners",)),
    "categories_absent": Works(lines=("keypoints: 17, coco17",)),
    "category_id_string": Works(),
    "category_text_both": Works(),
    "coco_annotator": Works(lines=("1 of 6 people have no box with a width and a height",)),
    "conv_nan": Works(files=COCO_LAYOUT),
    "conv_noarea": Works(files=COCO_LAYOUT, lines=("4 of 4 people to evaluate have no 'area'",)),
    "crowdpose": Works(people=(18, 12), keypoints=14, pairs=6),
    "cvat_numbers": Works(pairs=None, files=CVAT, lines=("left and right of the keypoints are not known",)),
    "cvat_sublabels": Works(keypoints=4, pairs=1, files=CVAT),
    "dlc_names": Works(pairs=6),
    "dlc_nan": Works(),
    "folder_in_name": Works(files=("train.json", ".", "val.json", ".")),
    "ids_float": Works(),
    "image_id_padded_text": Works(),
    "image_id_string": Works(),
    "k1_tight_box": Works(keypoints=1, pairs=0, lines=("6 of 6 people have no box with a width and a height",)),
    "k2_half_horizontal": Works(
        keypoints=2, pairs=None, lines=("3 of 6 people have no box with a width and a height", "not known"),
    ),
    "kp_null_half": Works(people=(3, 2), lines=("3 of its 6 annotations are left out", "3 without a labeled keypoint")),
    "kp_short_lists": Refused(text="expected 51 numbers in 'keypoints' (x, y, v of 17), found 45: 15 keypoints"),
    "kp_xy_only": Refused(text="expected 51 numbers in 'keypoints' (x, y, v of 17), found 34: x and y without v?"),
    "label_studio": Works(
        keypoints=5, pairs=2, files=("train/result_ui.json", "train", "val/result_ui.json", "val"),
        lines=("6 of other categories (category_id 0 Person; expected 1 default)",),
    ),
    "labelme": Refused(text="no list 'images' in it", files=("train_0000.json", ".", "train_0000.json", ".")),
    "lang_french": Works(keypoints=5, pairs=2),
    "lang_german": Works(keypoints=9, pairs=4),
    "leading_slash": Refused(text="'/train_0000.jpg' leads out of the folder of images"),
    "names_absent_14": Refused(text="no category names its 14 keypoints"),
    "names_absent_17_dog": Refused(text="(coco17 if this dog has a person's, in that order)"),
    "normalised": Refused(text="boxes are less than 2 px wide or high"),
    "readme_hands": Works(keypoints=3, pairs=0),
    "rle_crowd": Works(people=(4, 2), lines=("2 of its 6 annotations are left out", "2 crowds")),
    "roboflow": Works(keypoints=5, pairs=None, files=ROBOFLOW),
    "roboflow_named": Works(keypoints=5, pairs=1, files=ROBOFLOW),
    "sides_fl_fr": Works(keypoints=5, pairs=2),
    "sides_suffix": Works(keypoints=11, pairs=5),
    "sleap_export": Works(keypoints=5, pairs=1, lines=("1 of 6 people have no box with a width and a height",)),
    "tiff_12in16": Works(
        keypoints=5, pairs=1, lines=("16-bit images have no value above", "--data.image_bits 12"),
        doctor=("--data.image_bits 12",),
    ),
    "v0_with_xy": Works(people=(12, 6), doctor=("have v=0 and coordinates",)),
    "v_aic3": Refused(text="found 3; AI Challenger writes 1 (visible), 2 (hidden), 3 (not labeled): write 2, 1, 0"),
    "v_is_score": Refused(text="--data.visibility_threshold, the score from which a keypoint counts"),
    "val_category_id_other": Works(),
    "val_other_order": Works(),
}  # fmt: skip


def lay(name: str, folder: Path) -> Path:
    """The case with the images where it expects them, as its own `lay.py` does."""
    root = Path(shutil.copytree(CASES / name, folder / "root"))
    places = (root / "PICTURES").read_text().split()
    (root / "PICTURES").unlink()
    for place in places:
        for split in ("train", "val"):
            if split in place or place == ".":
                (root / place).mkdir(parents=True, exist_ok=True)
                for image in (CASES / "pictures" / split).iterdir():
                    if not (root / place / image.name).exists():
                        shutil.copy(image, root / place)
                if name in MORE_IMAGES:  # than there are: any will do
                    for number in range(4, 12):
                        if not (root / place / f"{split}_{number:04d}.jpg").exists():
                            shutil.copy(
                                root / place / f"{split}_{0:04d}.jpg", root / place / f"{split}_{number:04d}.jpg"
                            )
    return root


def config_of(root: Path, outcome: Works | Refused, **options: Any) -> DataConfig:
    names = ("train_annotations", "train_images", "val_annotations", "val_images")
    files = dict(zip(names, outcome.files, strict=True))
    given: dict[str, Any] = {**files, **outcome.options, **options}
    return DataConfig(root=str(root), cache_dir=str(root.parent / "cache"), num_workers=0, input_hw=(64, 48), **given)


def open_case(config: DataConfig) -> tuple[Sets, str]:
    """As a run begins: the people, and the lines that it prints."""
    said: list[object] = []
    skeleton, note = build.open_skeleton(config)
    sets = build.open_people(config, skeleton, unlabeled=False)
    doctor.summarize(said.append, sets, Config(data=config), note)
    doctor.check_evaluation(said.append, sets, Config(data=config))
    return sets, "\n".join(map(str, said))


def perfect(people: People, skeleton: Skeleton) -> tuple[Boxes, Predictions]:
    labels = keypoints_of(people.rows)
    scores = np.ones(labels.shape[:2])
    return load_boxes("gt", people), Predictions(points_xy=labels[..., :2], scores=scores)


def saved_ap(
    people: People, skeleton: Skeleton, file: Path, changed: Callable[[dict], Any] = lambda tree: None
) -> float:
    """AP of perfect predictions, saved, by pycocotools, of the annotation file as it is but for what it lacks."""
    boxes, found = perfect(people, skeleton)
    boxes = evaluate.with_categories(boxes, people, skeleton)
    results, _ = coco_metrics.coco_results(found, boxes, skeleton, DataConfig(input_hw=(64, 48)), EvalConfig())
    coco_metrics.save_results(results, file, people, skeleton)
    own, _ = coco_metrics.compute_metrics(results, people, skeleton, "pycocotools")
    assert own["AP"] == pytest.approx(1.0, abs=1e-9)
    assert all(value in (-1.0, pytest.approx(1.0)) for name, value in own.items() if name.endswith("/AP"))
    tree = json.loads(people.annotations.read_text())
    changed(tree)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = tree
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(str(file)), "keypoints")
        sigmas = np.array(skeleton.sigmas)
        if (source := people.reading.source) is not None:
            in_file = np.full(people.reading.count or 0, 0.05)
            in_file[[k for k in source if k >= 0]] = sigmas[[k >= 0 for k in source]]
            sigmas = in_file
        evaluation.params.kpt_oks_sigmas = sigmas
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return float(evaluation.stats[0])


def complete(tree: dict[str, Any]) -> None:
    """What pycocotools cannot do without, and what other tools would not write."""
    tree["categories"] = tree.get("categories") or [{"id": 1, "name": "person"}]
    ids, kinds = ({_key(one["id"]): one["id"] for one in tree[name]} for name in ("images", "categories"))
    labeled = [one for one in tree["annotations"] if one.get("keypoints")]
    for number, one in enumerate(labeled, start=1):
        box = one.get("bbox", [0, 0, 0, 0])
        area = one.get("area") or box[2] * box[3] or 1000
        one |= {"id": number, "iscrowd": int(one.get("iscrowd", 0)), "area": area, "bbox": box}
        one |= {"image_id": ids[_key(one["image_id"])], "category_id": kinds[_key(one["category_id"])]}
        one["keypoints"] = np.nan_to_num(one["keypoints"]).tolist()
        one["num_keypoints"] = sum(v > 0 for v in one["keypoints"][2::3])
    tree["annotations"] = labeled


def _key(value: str | float) -> str:
    """Of an id that one list writes as a number, and another as a text."""
    return str(int(value)) if isinstance(value, float) else str(value)


def test_each_case_has_its_outcome() -> None:
    assert {path.name for path in CASES.iterdir() if path.is_dir()} - {"pictures"} == set(OUTCOMES)


@pytest.mark.parametrize("name", [name for name, outcome in OUTCOMES.items() if isinstance(outcome, Works)])
def test_a_case_works(name: str, tmp_path: Path) -> None:
    outcome = OUTCOMES[name]
    assert isinstance(outcome, Works)
    root = lay(name, tmp_path)
    sets, said = open_case(config_of(root, outcome))
    skeleton = sets.skeleton
    assert (len(sets.train), len(sets.val)) == outcome.people
    pairs = sum(a < b for a, b in enumerate(skeleton.mirror)) if skeleton.mirror_known else None
    assert (skeleton.num_keypoints, pairs) == (outcome.keypoints, outcome.pairs)
    assert [line for line in outcome.lines if line not in said] == [], said
    report, _, _ = doctor.check_data(Config(data=config_of(root, outcome)))
    findings = [" ".join([finding.text, *finding.culprits]) for finding in report.findings]
    assert report.count("error") == 0, findings
    assert [text for text in outcome.doctor if not any(text in finding for finding in findings)] == [], findings
    assert saved_ap(sets.val, skeleton, tmp_path / "saved.json", complete) == pytest.approx(outcome.ap, abs=1e-9)


def test_saved_predictions_are_of_the_keypoints_of_the_file(tmp_path: Path) -> None:
    """A YAML of three of 17 keypoints: pycocotools refused the saved file, or compared one keypoint with another."""
    case = OUTCOMES["val_other_order"]
    root = lay("val_other_order", tmp_path)
    (root / "three.yaml").write_text("names: [left_wrist, nose, right_wrist]")
    sets, _ = open_case(config_of(root, case, skeleton="three.yaml"))
    tree = json.loads(sets.val.annotations.read_text())
    names = tree["categories"][0]["keypoints"]
    chosen = [names.index(name) for name in sets.skeleton.names]

    def of_three(tree: dict[str, Any]) -> None:
        complete(tree)
        for one in tree["annotations"]:
            one["keypoints"] = [n if k // 3 in chosen else 0 for k, n in enumerate(one["keypoints"])]
            one["num_keypoints"] = sum(v > 0 for v in one["keypoints"][2::3])

    assert saved_ap(sets.val, sets.skeleton, tmp_path / "saved.json", of_three) == pytest.approx(1.0, abs=1e-9)
    saved = json.loads((tmp_path / "saved.json").read_text())[0]["keypoints"]
    assert {k for k in range(len(names)) if any(saved[3 * k : 3 * k + 3])} == set(chosen)


def test_nameless_keypoints_of_several_kinds_of_animal_are_refused(tmp_path: Path) -> None:
    """They were taken for COCO's person, and mirrored as one."""
    root = lay("names_absent_17_dog", tmp_path)
    for split in ("train", "val"):
        tree = json.loads((root / f"{split}.json").read_text())
        tree["categories"] += [{"id": 90, "name": "cat"}, {"id": 91, "name": "cow"}]
        for one, key in zip(tree["annotations"], (90, 91), strict=False):
            one["category_id"] = key
        (root / f"{split}.json").write_text(json.dumps(tree))
    with pytest.raises(UserError, match=r"no category names its 17 keypoints.*if this cat, cow, \.\.\. has a person's"):
        open_case(config_of(root, OUTCOMES["names_absent_17_dog"]))
    (root / "mine.yaml").write_text(f"names: {json.dumps([f'point {k}' for k in range(17)])}\nmirror: []\n")
    sets, _ = open_case(config_of(root, OUTCOMES["names_absent_17_dog"], skeleton="mine.yaml"))
    assert sets.skeleton.categories == ("cat", "cow", "dog")


def _detected(file: Path, sets: Sets) -> tuple[Boxes, coco_metrics.Metrics, list[dict[str, Any]]]:
    """A detector's boxes, in which everybody's keypoints are found: the metrics, and what is saved."""
    boxes, labels = load_boxes(str(file), sets.val), keypoints_of(sets.val.rows)
    centers = boxes_of(sets.val.rows)[:, :2] + boxes_of(sets.val.rows)[:, 2:] / 2
    images = np.array(sets.val.rows["image_id"][:])
    points = []
    for image_id, box in zip(boxes.image_ids, boxes.boxes_xywh, strict=True):
        here = np.flatnonzero(images == image_id)
        nearest = here[np.linalg.norm(centers[here] - box[:2] - box[2:] / 2, axis=1).argmin()]
        points.append(labels[nearest, :, :2])
    found = Predictions(points_xy=np.stack(points), scores=np.ones((len(boxes), labels.shape[1])))
    results, _ = coco_metrics.coco_results(found, boxes, sets.skeleton, DataConfig(input_hw=(64, 48)), EvalConfig())
    saved = file.with_name("saved.json")
    coco_metrics.save_results(results, saved, sets.val, sets.skeleton)
    metrics, _ = coco_metrics.compute_metrics(results, sets.val, sets.skeleton, "pycocotools")
    return boxes, metrics, json.loads(saved.read_text())


def test_boxes_of_several_categories_and_of_a_detector_of_one_class(tmp_path: Path) -> None:
    """Boxes of all categories but the first were dropped, and all was saved under the first."""
    root = lay("ap10k", tmp_path)
    sets, _ = open_case(config_of(root, OUTCOMES["ap10k"]))
    boxes, metrics, saved = _detected(root / "det_species.json", sets)
    assert len(boxes) == 8 and metrics["AP"] == pytest.approx(1.0)
    assert [metrics[f"category/{kind}/AP"] for kind in ("antelope", "bison", "dog")] == pytest.approx([1.0] * 3)
    assert Counter(one["category_id"] for one in saved) == {1: 3, 4: 3, 8: 2}
    assert evaluated_categories(sets.val) == {1: (1, "antelope"), 4: (4, "bison"), 8: (8, "dog")}
    for name in ("det0", "det1", "det17"):
        boxes, metrics, _ = _detected(root / f"{name}.json", sets)
        assert len(boxes) == 8 and metrics["AP"] == pytest.approx(1.0) and "category/dog/AP" not in metrics
        assert "boxes of any of 3 categories, and no AP of each; --eval.save_predictions saves them under" in boxes.note
    bisons = [one for one in json.loads((root / "det_species.json").read_text()) if one["category_id"] == 4]
    (root / "bisons.json").write_text(json.dumps(bisons))
    boxes, metrics, saved = _detected(root / "bisons.json", sets)
    assert [one["category_id"] for one in saved] == [4] * 3
    assert metrics["category/bison/AP"] == pytest.approx(1.0) and metrics["category/dog/AP"] == 0
    assert boxes.note.endswith("all of category bison; other categories have no detection")


def test_categories_of_one_name_have_rows_of_their_own(tmp_path: Path) -> None:
    root = lay("ap10k", tmp_path)
    for split in ("train", "val"):
        tree = json.loads((root / f"{split}.json").read_text())
        for one in tree["categories"]:
            one["name"] = "bison" if one["name"] == "dog" else one["name"]
        (root / f"{split}.json").write_text(json.dumps(tree))
    sets, _ = open_case(config_of(root, OUTCOMES["ap10k"]))
    _, metrics, _ = _detected(root / "det_species.json", sets)
    rows = {name.split("/")[1] for name in metrics if name.startswith("category/")}
    assert rows == {"antelope", "bison (4)", "bison (8)"}


@pytest.mark.parametrize("given", [0, "animal", "Dog"])
def test_boxes_of_a_detector_of_one_class_for_one_category(tmp_path: Path, given: int | str) -> None:
    """They were refused where a single category is evaluated, and taken where there are several."""
    root = lay("dlc_names", tmp_path)
    for split in ("train", "val"):
        tree = json.loads((root / f"{split}.json").read_text())
        (kind,) = tree["categories"]
        kind |= {"id": 5, "name": "dog"}
        for one in tree["annotations"]:
            one["category_id"] = 5
        (root / f"{split}.json").write_text(json.dumps(tree))
    sets, _ = open_case(config_of(root, OUTCOMES["dlc_names"]))
    rows = zip(sets.val.rows["image_id"][:], boxes_of(sets.val.rows).tolist(), strict=True)
    found = [{"image_id": key, "category_id": given, "bbox": box, "score": 0.9} for key, box in rows]
    (root / "det.json").write_text(json.dumps(found))
    boxes, metrics, saved = _detected(root / "det.json", sets)
    assert len(boxes) == 4 and metrics["AP"] == pytest.approx(1.0) and {one["category_id"] for one in saved} == {5}
    assert (f"all of category {given}: taken for 5 (dog)" in boxes.note) == (given != "Dog")


def test_a_category_without_id_is_named(tmp_path: Path) -> None:
    root = lay("dlc_names", tmp_path)
    tree = json.loads((root / "train.json").read_text())
    del tree["categories"][0]["id"]
    name = tree["categories"][0]["name"] = "person"
    (root / "train.json").write_text(json.dumps(tree))
    with pytest.raises(UserError, match=f"category '{name}' has no id"):
        open_case(config_of(root, OUTCOMES["dlc_names"]))


def _change(root: Path, change: Callable[[dict], Any]) -> None:
    for split in ("train", "val"):
        tree = json.loads((root / f"{split}.json").read_text())
        change(tree)
        (root / f"{split}.json").write_text(json.dumps(tree))


def test_a_box_outside_its_image_is_refused(tmp_path: Path) -> None:
    root = lay("dlc_names", tmp_path)
    _change(root, lambda tree: tree["annotations"][1].update(id="ann 1", bbox=[1000, 20, 50, 50]))
    said = r"train\.json: 1 of 6 people have a box outside their image: annotation 'ann 1' has .* 320 x 240"
    with pytest.raises(UserError, match=said):
        open_case(config_of(root, OUTCOMES["dlc_names"]))
    open_case(config_of(root, OUTCOMES["dlc_names"], boxes="keypoints"))


def test_sizes_of_images_may_be_text(tmp_path: Path) -> None:
    root = lay("dlc_names", tmp_path)
    _change(root, lambda tree: [one.update(width="320", height="240") for one in tree["images"]])
    sets, _ = open_case(config_of(root, OUTCOMES["dlc_names"], boxes="image"))
    assert sets.train.rows["size_wh"][0] == [320, 240] and sets.train.rows["box_xywh"][0] == [0, 0, 320, 240]


def test_an_area_that_is_no_number_and_edges_that_are_no_list_are_named(tmp_path: Path) -> None:
    root = lay("dlc_names", tmp_path)
    _change(root, lambda tree: tree["categories"][0].update(skeleton="none"))
    _, said = open_case(config_of(root, OUTCOMES["dlc_names"]))
    assert "skeleton: expected a list of pairs, found 'none'; it is left out" in said
    _change(root, lambda tree: tree["annotations"][0].update(area=True))
    with pytest.raises(UserError, match="expected 'area' of a number from 0 up, found True"):
        open_case(config_of(root, OUTCOMES["dlc_names"]))


def test_images_of_all_formats_that_are_read_are_found(tmp_path: Path) -> None:
    """Images that training reads were left out of folders in silence."""
    for suffix in (".jpg", ".tif", ".tiff", ".gif", ".jp2", ".ppm"):
        cv2.imwrite(str(tmp_path / f"image{suffix}"), np.full((64, 64, 3), 90, np.uint8))
    assert len(media.find_images(tmp_path).names) == len(people_tables.list_image_names(tmp_path)) == 6
    assert all(images.read_image(tmp_path / name).shape == (64, 64, 3) for name in media.find_images(tmp_path).names)


def test_several_categories_and_text_ids_from_parquet(tmp_path: Path) -> None:
    root = lay("ap10k", tmp_path)
    for split in ("train", "val"):
        tree = json.loads((root / f"{split}.json").read_text())
        for image in tree["images"]:
            image["id"] = f"img-{image['id']}"
        tree["annotations"] = [
            one | {"image_id": f"img-{one['image_id']}", "id": f"a{one['id']}"} for one in tree["annotations"]
        ]
        (root / f"{split}.json").write_text(json.dumps(tree))
    names = dict(zip(("train_annotations", "train_images", "val_annotations", "val_images"), PLAIN, strict=True))
    convert.main(
        ["convert", "coco", str(root), str(tmp_path / "shards"), *(f"--{key}={name}" for key, name in names.items())]
    )
    cache = str(tmp_path / "cache")
    sets, said = open_case(DataConfig(root=str(tmp_path / "shards"), cache_dir=cache, num_workers=0, input_hw=(64, 48)))
    assert (len(sets.train), len(sets.val)) == (12, 8) and "3 categories, evaluated together and each" in said
    boxes, found = perfect(sets.val, sets.skeleton)
    boxes = evaluate.with_categories(boxes, sets.val, sets.skeleton)
    results, _ = coco_metrics.coco_results(found, boxes, sets.skeleton, DataConfig(input_hw=(64, 48)), EvalConfig())
    metrics, _ = coco_metrics.compute_metrics(results, sets.val, sets.skeleton, "pycocotools")
    kinds = ("antelope", "bison", "dog")
    assert [metrics["AP"], *(metrics[f"category/{kind}/AP"] for kind in kinds)] == pytest.approx([1.0] * 4)
    assert Counter(one["category_id"] for one in results) == {1: 3, 4: 3, 8: 2}


@pytest.mark.parametrize(
    ("skeleton", "pairs", "first"),
    [("coco17", 8, "nose"), ("names.yaml", 8, "nose"), ("mirror_int.yaml", 8, "1"), ("mirror_str.yaml", 8, "1"),
     ("mirror_empty.yaml", 0, "1")],
)  # fmt: skip
def test_names_that_a_tool_wrote_can_be_replaced(tmp_path: Path, skeleton: str, pairs: int, first: str) -> None:
    case = OUTCOMES["cvat_numbers"]
    sets, said = open_case(config_of(lay("cvat_numbers", tmp_path), case, skeleton=skeleton))
    assert sets.skeleton.mirror_known and sum(a < b for a, b in enumerate(sets.skeleton.mirror)) == pairs
    assert sets.skeleton.names[0] == first and (len(sets.train), len(sets.val)) == (6, 4)
    assert ("its keypoints 1, 2, 3, ... are nose, left_eye, right_eye, ..., in this order" in said) == (first == "nose")
    assert saved_ap(sets.val, sets.skeleton, tmp_path / "saved.json", complete) == pytest.approx(1.0)


@pytest.mark.parametrize("name", ["names_absent_14", "names_absent_17_dog", "roboflow"])
def test_keypoints_without_names_are_named_by_a_yaml(tmp_path: Path, name: str) -> None:
    root = lay(name, tmp_path)
    count = {"names_absent_14": 14, "names_absent_17_dog": 17, "roboflow": 5}[name]
    names = ["nose", *(f"{side}_{part}" for part in range(count // 2) for side in ("left", "right"))][:count]
    (root / "mine.yaml").write_text(f"names: {json.dumps(names)}\nmirror: []\n")
    sets, _ = open_case(config_of(root, OUTCOMES[name], skeleton="mine.yaml"))
    assert sets.skeleton.names == tuple(names) and sets.skeleton.mirror_known
    assert sets.skeleton.categories == {"names_absent_17_dog": ("dog",), "roboflow": ("cow",)}.get(name, ())
    if name == "roboflow":
        (root / "mine.yaml").write_text(f"names: {json.dumps(names[:4])}")
        with pytest.raises(UserError, match=r"names: no such keypoint 'nose' in the data"):
            open_case(config_of(root, OUTCOMES[name], skeleton="mine.yaml"))


def test_scores_are_labels_from_a_threshold_on(tmp_path: Path) -> None:
    config = config_of(lay("v_is_score", tmp_path), OUTCOMES["v_is_score"], visibility_threshold=0.6)
    sets, _ = open_case(config)
    tree = json.loads(sets.val.annotations.read_text())
    scores = np.array([one["keypoints"][2::3] for one in tree["annotations"]])
    assert np.array_equal(keypoints_of(sets.val.rows)[..., 2], np.where(scores >= 0.6, 2, 0))
    report, _, _ = doctor.check_data(Config(data=config))
    assert report.count("error") == 0

    def as_labels(tree: dict[str, Any]) -> None:
        for one in tree["annotations"]:
            one["keypoints"][2::3] = [2 if v >= 0.6 else 0 for v in one["keypoints"][2::3]]
        complete(tree)

    assert saved_ap(sets.val, sets.skeleton, tmp_path / "saved.json", as_labels) == pytest.approx(1.0)


def test_absent_is_background_learns_empty_maps_of_what_has_no_label(tmp_path: Path) -> None:
    config = config_of(lay("v0_with_xy", tmp_path), OUTCOMES["v0_with_xy"])
    sets, _ = open_case(config)
    codec = Codec(input_hw=(64, 48), heatmap_hw=(16, 12), sigma=1.0)
    samples = [
        UprightPeople(sets.train, one, sets.skeleton)[0] for one in (config, replace(config, absent_is_background=True))
    ]
    (plain, plain_weights), (empty, weights) = (codec.encode(one.points_xy[None], one.weights[None]) for one in samples)
    labeled = torch.from_numpy(keypoints_of(sets.train.rows)[0, :, 2] > 0)
    assert torch.equal(plain, empty) and not empty[0, ~labeled].any() and labeled.sum() not in (0, 17)
    assert torch.equal(plain_weights[0] > 0, labeled) and torch.equal(weights[0], torch.ones(17))
    loss = Supervised(codec=codec).heatmap_loss(torch.ones_like(plain), batched(samples[1]), slice(0, 1))
    expected = (torch.ones_like(plain) - plain).square().mean(dim=(2, 3)).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_a_hidden_keypoint_of_no_weight_is_not_absent(tmp_path: Path) -> None:
    root = lay("v0_with_xy", tmp_path)
    tree = json.loads((root / "train.json").read_text())
    tree["annotations"][0]["keypoints"][2:9:3] = [2, 1, 0]
    (root / "train.json").write_text(json.dumps(tree))
    config = replace(config_of(root, OUTCOMES["v0_with_xy"]), absent_is_background=True, occluded_weight=0.0)
    sets, _ = open_case(config)
    assert UprightPeople(sets.train, config, sets.skeleton)[0].weights[:3].tolist() == [1, 0, -1]


def batched(sample: Labeled) -> Labeled:
    view = View(*(part[None] for part in sample.view))
    return Labeled(view, sample.points_xy[None], sample.weights[None], sample.ann_id[None])


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda one: {"category_id": 7}, "6 of other categories (category_id 7; expected 1 person)"),
        (lambda one: {"category_id": "dog"}, "6 of other categories (category_id 'dog'; expected 1 person)"),
        (
            lambda one: {"category_id": "person"},
            "6 of other categories (category_id 'person' is a category's name: write its id, 1; expected 1 person)",
        ),
        (lambda one: {"iscrowd": 1}, "6 crowds"),
        (lambda one: {"keypoints": [0] * 51}, "6 without a labeled keypoint (v > 0)"),
        (
            lambda one: (
                {"category_id": 7} if one["id"] < 3 else {"iscrowd": 1} if one["id"] < 5 else {"keypoints": None}
            ),
            "2 of other categories (category_id 7; expected 1 person), 2 crowds, 2 without a labeled keypoint",
        ),
    ],
)
def test_nobody_is_left_for_each_cause_by_name(tmp_path: Path, change: Callable[[dict], dict], text: str) -> None:
    root = lay("dlc_names", tmp_path)
    tree = json.loads((root / "train.json").read_text())
    tree["annotations"] = [one | change(one) for one in tree["annotations"]]
    (root / "train.json").write_text(json.dumps(tree))
    with pytest.raises(UserError) as caught:
        open_case(config_of(root, OUTCOMES["dlc_names"]))
    assert f"6 of its 6 annotations are left out of the labeled people: {text}" in str(caught.value)
    assert str(caught.value).endswith("; nobody is left")


@pytest.mark.parametrize("bits", [10, 12, 14, 16])
def test_bits_of_sixteen_are_those_of_all_images(tmp_path: Path, bits: int) -> None:
    """Decided by each image's own values, 4095 became 255 and 4100 became 16: frames of one film differed."""
    root = lay("tiff_12in16", tmp_path)
    file = root / "train" / "train_0000.tif"
    deep = np.linspace(0, (1 << bits) - 1, 240 * 320).astype(np.uint16).reshape(240, 320)
    for one in (*(root / "train").iterdir(), *(root / "val").iterdir()):
        cv2.imwrite(str(one), deep)
    _, said = open_case(config_of(root, OUTCOMES["tiff_12in16"]))
    assert (f"--data.image_bits {bits} reads them at their range" in said) == (bits < 16)
    _, said = open_case(config_of(root, OUTCOMES["tiff_12in16"], image_bits=bits))
    assert "16-bit images" not in said
    assert np.array_equal(images.read_image(file)[..., 0], deep >> bits - 8)
    darker = deep // 5
    cv2.imwrite(str(file), darker)
    assert np.array_equal(images.read_image(file)[..., 0], darker >> bits - 8)
    deep[0, 0] = min((1 << bits) + 5, 65535)
    cv2.imwrite(str(file), deep)
    assert np.array_equal(images.read_image(file)[..., 0], np.minimum(deep >> bits - 8, 255))
    images.set_image_bits(None)


@pytest.mark.parametrize("name", [name for name, outcome in OUTCOMES.items() if isinstance(outcome, Refused)])
def test_a_case_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    outcome = OUTCOMES[name]
    assert isinstance(outcome, Refused)
    config = config_of(lay(name, tmp_path), outcome)
    with pytest.raises(UserError) as caught:
        open_case(config)
    assert outcome.text in str(caught.value) and "\n" not in str(caught.value)
    report, _, _ = doctor.check_data(Config(data=config))
    if name != "normalised":  # said by the run's own reader, which the doctor asks last
        assert report.count("error") > 0
