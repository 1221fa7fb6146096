"""What is damaged and who reads it: each kind of file with the functions by which train.py, eval.py and the doctor do.

A reader gets a folder in which one file is a mutant. What it does with the mutant beyond reading is what the programs
do next with it, as far as that is cheap: crops are cut, networks run, people drawn, reports rendered.
"""

import dataclasses
import json
import random
import shutil
import tarfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import yaml
from accelerate import Accelerator
from networks import untrained
from PIL import Image
from safetensors.torch import load_file, save_file

from fuzz import mutants
from fuzz.mutants import Mutate
from sapiens_accel.config import parse
from sapiens_accel.config.schema import Config, DataConfig, EvalConfig
from sapiens_accel.data import annotation_rules, build, detections, unlabeled
from sapiens_accel.data.augment import Augmenter
from sapiens_accel.data.dataset import Key, TrainingPeople
from sapiens_accel.data.people import People
from sapiens_accel.doctor import environment, report
from sapiens_accel.evaluation import boxes as eval_boxes
from sapiens_accel.evaluation import evaluate, figures, networks
from sapiens_accel.evaluation.predict import Crops, list_views
from sapiens_accel.inference import detect_people, keypoints, media, predict_media
from sapiens_accel.models import load
from sapiens_accel.models.sapiens import SapiensPose
from sapiens_accel.pose.skeleton import COCO17
from sapiens_accel.publish import model_card
from sapiens_accel.runtime import launch
from sapiens_accel.sources import convert, synthetic
from sapiens_accel.training import checkpoint, logger, run_folder

ROOT = Path(__file__).parents[2]
TRAIN, VAL = (f"annotations/person_keypoints_{split}2017.json" for split in ("train", "val"))
BOXES = "annotations/person_boxes_unlabeled2017.json"
CHECKPOINT = "ssl/checkpoints/step_2"
INPUT_HW = (64, 48)


@dataclasses.dataclass(frozen=True)
class Target:
    """A kind of file.

    Attributes:
        seed: the folder that is copied for each mutant.
        files: of them one is damaged, relative to it.
        read: called with the copy.
        share: how many of the mutants, relative to other targets; slow readers get less.
    """

    name: str
    seed: Path
    files: Sequence[str]
    mutate: Mutate
    read: Callable[[Path], object]
    share: float = 1.0


# ---- Data


def config_of(root: Path, folder: Path, **options: Any) -> Config:
    """Of a tiny network on the data of a folder."""
    data = DataConfig(
        root=str(root), cache_dir=str(folder / ".cache"), num_workers=0, input_hw=INPUT_HW, sigma=1.0, **options
    )
    run = Config(data=data, output_dir=str(folder / ".run"))
    evaluation = dataclasses.replace(run.eval, flip=False, batch_size=4, num_pictures=0, num_worst=0)
    return dataclasses.replace(run, eval=evaluation, model=dataclasses.replace(run.model, name="sapiens_tiny"))


def begin_training(folder: Path) -> None:
    """Open people, say what is odd, and cut the crops of a batch, as train.py does."""
    run = config_of(folder, folder)
    skeleton, _ = build.open_skeleton(run.data)
    sets = build.open_people(run.data, skeleton, unlabeled=True)
    report.summarize(lambda _: None, sets, run)
    augmenter = Augmenter(config=run.augment, skeleton=skeleton, input_hw=run.data.input_hw)
    people = TrainingPeople(sets, augmenter, run.data, run.ssl, seed=0, stage="ssl")
    for position in range(4):
        people[Key(step=0, position=position, unlabeled=position > 1)]
    run_folder.write_labeled_ids(folder / "ids.json", sets.train, run.data)


def examine_data(folder: Path) -> None:
    """The doctor's report of labels and images."""
    found, _, _ = report.check_data(config_of(folder, folder))
    json.dumps(found.as_json())
    report.text_of(found)


def evaluate_boxes(folder: Path) -> None:
    """Ground truth and a detector's boxes, as eval.py reads them; crops of all; AP of made-up predictions."""
    run = config_of(folder, folder)
    skeleton, _ = build.open_skeleton(run.data)
    people = build.open_split(run.data, skeleton, "val")
    for given in ("gt", "boxes.json"):
        run = dataclasses.replace(run, eval=dataclasses.replace(run.eval, boxes=given))
        evaluate.evaluate_networks(accelerator(), [pose_network()], people, skeleton, run.data, run.eval)


def boxes_of_images(folder: Path) -> None:
    """Boxes of a user's own images (--images --boxes FILE), crops of all of them."""
    run, images = config_of(folder, folder), folder / "val2017"
    found = media.find_images(images)
    file = detections.BoxesFile(folder / "boxes.json", found.names, 0.3, COCO17)
    piece = predict_media._piece_of_images(accelerator(), images, found.names)
    boxes, _ = keypoints.collect_boxes([file.of(name) for name in piece.names], piece, "x", next(iter(file.categories)))
    finder = keypoints.KeypointFinder(networks=[pose_network()], skeleton=COCO17, run=run, device=torch.device("cpu"))
    everybody = finder.find_people(boxes, len(piece.files))
    made = predict_media.MediaWriter(images, folder / "out", COCO17, run.eval, {"boxes": "x"})
    made.add(piece, everybody)
    made.close()


def unlabeled_boxes(folder: Path) -> None:
    """Detections and boxes of unlabeled people, as stage ssl reads them."""
    run = config_of(folder, folder)
    skeleton, _ = build.open_skeleton(run.data)
    root, cache = build.prepare_root(run.data)
    people = unlabeled.unlabeled_images(root, run.data, skeleton.num_keypoints, cache)
    assert people is not None
    crop_all(people, run)


def crop_all(people: People, run: Config) -> None:
    crops = Crops(_boxes(people), list_views([pose_network()], (1.0,)), 1.25)
    for index in range(min(4, len(crops))):
        crops[index]


def _boxes(people: People) -> eval_boxes.Boxes:
    boxes = build.boxes_of(people.rows)
    return eval_boxes.Boxes(
        root=people.root, file_names=list(people.rows["file_name"][:]), image_ids=np.arange(len(boxes)),
        boxes_xywh=boxes, scores=np.ones(len(boxes)), source="", labeled=False,
    )  # fmt: skip


def convert_data(folder: Path, to: str = "webdataset") -> None:
    """sapiens-accel convert."""
    words = ["convert", "coco", str(folder), str(folder / "out"), "--to", to]
    convert.main(words)


def partial_detections(folder: Path) -> None:
    """The half-finished file of sapiens-accel detect that the same command goes on with."""
    detect_people.Partial(folder / "boxes.json", {"detector": "x"})


def read_images(folder: Path) -> None:
    """Images with labels: checked, then cropped; and as a user's own."""
    run = config_of(folder, folder)
    skeleton, _ = build.open_skeleton(run.data)
    sets = build.open_split(run.data, skeleton, "val")
    crop_all(sets, run)
    found = media.find_images(folder / "val2017")
    media.read_sizes(found.root, found.names)


def ids_of_annotations(folder: Path) -> None:
    """sapiens-accel detect --annotations."""
    detections.read_ids(folder / VAL, [sorted(path.name for path in (DATA[0] / "val2017").iterdir())[0]])
    annotation_rules.person_category(folder / VAL)


# ---- Skeletons and options


def read_skeleton(folder: Path) -> None:
    """--data.skeleton."""
    run = config_of(folder, folder, skeleton="skeleton.yaml")
    build.open_skeleton(run.data)


def read_recipe(folder: Path) -> None:
    """--recipe FILE."""
    run = parse.load(["--recipe", str(folder / "recipe.yaml")])
    parse._as_yaml(run)


def read_launch(folder: Path) -> None:
    """The doctor's --launch, with its DeepSpeed JSON."""
    environment.read_launch(str(folder / "launch.yaml"))


def read_zero(folder: Path) -> None:
    """The DeepSpeed JSON of a launch."""
    launch._check_json(folder / "zero2.json", "launch.yaml")


# ---- Weights


def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


NETWORK: list[Any] = []


def pose_network() -> Any:
    """An untrained network, built once."""
    return NETWORK[0]


def run_weights(folder: Path) -> None:
    """Weights as eval.py takes them: the network is built, run on images and its people are drawn."""
    run = config_of(DATA[0], folder)
    paths = [folder / "w"]
    candidates = [one for path in paths for one in networks.list_weights(path, run, folder / "out")]
    skeleton, _ = networks.choose_skeleton(candidates, DATA[0] / VAL, None, folder / ".cache")
    people = PEOPLE[0]
    loaded = networks.build_networks(accelerator(), candidates, run, skeleton)
    if skeleton.num_keypoints != 17:
        people = build.open_split(run.data, skeleton, "val")
    result = evaluate.evaluate_networks(accelerator(), loaded, people, skeleton, run.data, run.eval)
    if loaded[0].codec.input_hw[0] <= 512:
        figures.draw_predictions(result.predictions, people, skeleton, 4)
    evaluate.save_metrics(folder / "out" / "eval.json", {"x": result}, {"x": run.eval}, skeleton)


def draw_own_images(folder: Path) -> None:
    """Weights with --images."""
    run = config_of(DATA[0], folder)
    images = EvalConfig(images=str(DATA[0] / "val2017"), boxes="whole", flip=False, batch_size=2)
    run = dataclasses.replace(run, eval=images)
    predict_media.predict_media(accelerator(), networks.list_weights(folder / "w", run, folder / "out"), run)


def start_from_weights(folder: Path, size: str = "sapiens_tiny") -> None:
    """--weights of a training."""
    file = next((folder / "w").iterdir()) if len(list((folder / "w").iterdir())) == 1 else folder / "w"
    load.load(SapiensPose(size, 17, INPUT_HW), str(file), COCO17.names)


# ---- Run directories


def resume_run(folder: Path) -> None:
    """--resume_from_checkpoint latest, up to the start of training."""
    run, target = RUN[0], folder
    run = dataclasses.replace(run, output_dir=str(target), resume_from_checkpoint="latest")
    lasts = {"ssl": 4}
    done = run_folder.read_finished(target, lasts, "latest")
    run_folder.plan_run(accelerator(), run, SETS[0], done).begin(accelerator(), SETS[0], 2)
    found = checkpoint.find_checkpoint(accelerator(), target, "latest", "ssl")
    if found and found.way == "whole":
        load_file(found.folder / checkpoint.OBJECTIVE)
    checkpoint.find_best(target / "ssl/checkpoints")
    logger._without_later_lines(target / "metrics.jsonl", "ssl", 2)
    logger._first_values(target / "metrics.jsonl", "ssl")
    load.starting_point(target, "ssl")


def judge_run(folder: Path) -> None:
    """eval.py RUN_DIR, up to the evaluation."""
    run = parse.load(["--stage=all"], prog="eval.py", base=networks.find_run_config(folder))
    networks.list_weights(folder, run, None)


def card_of_run(folder: Path) -> None:
    """sapiens-accel push, up to the push."""
    facts = model_card.collect(folder, "ssl")
    model_card.write(folder / "card", facts, "org/name", None)


# ---- Seeds


DATA: list[Path] = []
PEOPLE: list[People] = []
SETS: list[Any] = []
RUN: list[Config] = []


def _coco(folder: Path) -> Path:
    """A folder in COCO's form, with files that are optional and images of all kinds."""
    synthetic.write(folder, num_train=3, num_unlabelled=2, num_val=3, image_hw=(80, 100))
    rows = json.loads((folder / VAL).read_text())["annotations"]
    found = [{"image_id": row["image_id"], "category_id": 1, "bbox": row["bbox"], "score": 0.9} for row in rows]
    (folder / "boxes.json").write_text(json.dumps(found))
    names = sorted(path.name for path in (folder / "unlabeled2017").iterdir())
    tree = json.loads((folder / VAL).read_text())
    tree["images"] = [{**tree["images"][0], "id": index, "file_name": name} for index, name in enumerate(names)]
    about = {"category_id": 1, "bbox": [5.0, 6.0, 80.0, 70.0], "area": 5600.0, "iscrowd": 0}
    tree["annotations"] = [{"id": index + 1, "image_id": index, **about} for index in range(len(names))]
    (folder / BOXES).write_text(json.dumps(tree))
    found = [
        {"image_id": int(Path(name).stem), "category_id": 1, "bbox": [5, 6, 80, 70], "score": 0.9} for name in names
    ]
    (folder / "found.json").write_text(json.dumps(found))
    return folder


def _detected(coco: Path, folder: Path) -> Path:
    shutil.copytree(coco, folder)
    shutil.copy(folder / "found.json", folder / BOXES)
    return folder


def _images(coco: Path, folder: Path) -> Path:
    """The same validation people in images of other formats."""
    shutil.copytree(coco, folder)
    tree = json.loads((folder / VAL).read_text())
    for image, ending in zip(tree["images"], (".png", ".webp", ".bmp"), strict=False):
        file = folder / "val2017" / image["file_name"]
        exif = Image.Exif()
        exif[274] = 6
        Image.open(file).save(file.with_suffix(ending), exif=exif)
        image["file_name"] = file.with_suffix(ending).name
        if ending != ".bmp":  # turned by their EXIF data, which BMP has not
            image["width"], image["height"] = image["height"], image["width"]
    (folder / VAL).write_text(json.dumps(tree))
    return folder


def _run(folder: Path) -> Path:
    """A run directory, as training leaves it."""
    with tarfile.open(ROOT / "tests/golden/run_of_0.1.tar.xz") as archive:
        archive.extractall(folder.parent, filter="data")
    (folder.parent / "run").rename(folder)
    shutil.copytree(folder / CHECKPOINT / "weights", folder / "ssl/weights")
    scores = {name: 0.25 for name in model_card.METRICS}
    scores |= {"step": 2, "weights_step": 2, "PCK/nose": 0.5, **evaluate.protocol_settings(EvalConfig())}
    (folder / "ssl/eval.json").write_text(json.dumps(scores))
    (folder / CHECKPOINT / "score.json").write_text('{"AP": 0.25}')
    (folder / "ssl/kept.json").write_text('{"step": 2, "AP": 0.25}')
    return folder


def _weights(folder: Path) -> dict[str, Path]:
    """Weights folders of each layout, each in a folder w."""
    seeds = {}
    for family in ("sapiens_tiny", "sapiens2_tiny"):
        seeds[family] = folder / family
        untrained(folder / family / "w", name=family)
    state = load_file(seeds["sapiens_tiny"] / "w" / "model.safetensors")
    pth = folder / "pth" / "w"
    pth.mkdir(parents=True)
    meta = {"dataset_meta": {"keypoint_id2name": dict(enumerate(COCO17.names))}, "epoch": 3, "time": "now"}
    torch.save({"meta": meta, "state_dict": state}, pth / "model.pth")
    sharded = folder / "sharded" / "w"
    sharded.mkdir(parents=True)
    keys = list(state)
    parts = {"a.safetensors": keys[:5], "b.safetensors": keys[5:]}
    for name, some in parts.items():
        save_file({key: state[key] for key in some}, sharded / name)
    index = {"metadata": {"total_size": 1}, "weight_map": {key: name for name, some in parts.items() for key in some}}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in ("config.json", "skeleton.json"):
        shutil.copy(seeds["sapiens_tiny"] / "w" / name, sharded)
    return {**seeds, "pth": folder / "pth", "sharded": folder / "sharded"}


SKELETON = """names: [nose, left_eye, right_eye, left_hip, right_hip]
mirror: [[left_eye, right_eye], [left_hip, right_hip]]
sigmas: {nose: 0.03, left_eye: 0.02}
upper: [nose, left_eye, right_eye]
edges: [[nose, left_eye], [left_hip, right_hip]]
"""
LAUNCH = """compute_environment: LOCAL_MACHINE
distributed_type: DEEPSPEED
mixed_precision: fp16
num_machines: 1
num_processes: 2
deepspeed_config:
  deepspeed_config_file: zero2.json
  zero3_init_flag: false
"""


def _options(folder: Path) -> Path:
    folder.mkdir()
    (folder / "skeleton.yaml").write_text(SKELETON)
    recipe = (ROOT / "sapiens_accel/recipes/sapiens_0.3b_coco.yaml").read_text()
    (folder / "recipe.yaml").write_text(recipe)
    (folder / "launch.yaml").write_text(LAUNCH)
    shutil.copy(ROOT / "ds_configs/zero2.json", folder)
    return folder


def all_targets(work: Path) -> list[Target]:
    """Write the seeds into a folder, and open what all readers share."""
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    coco = _coco(work / "coco")
    weights = _weights(work / "weights")
    run = _run(work / "run")
    options = _options(work / "options")
    detected, images = _detected(coco, work / "detected"), _images(coco, work / "images")
    shutil.copy(options / "skeleton.yaml", coco)
    (work / "partial").mkdir()
    made = detect_people.Partial(work / "partial" / "boxes.json", {"detector": "x"})
    made.add([None, detections.PersonBoxes(np.ones((1, 4)), np.ones(1))])
    made.close()
    shards = {}
    for to in ("parquet", "webdataset"):
        shards[to] = work / to
        convert.main(["convert", "coco", str(coco), str(work / to), "--to", to])
    config = config_of(coco, work)
    DATA.append(coco)
    skeleton, _ = build.open_skeleton(config.data)
    SETS.append(build.open_people(config.data, skeleton, unlabeled=True))
    PEOPLE.append(SETS[0].val)
    RUN.append(config)
    candidate = networks.Candidate(name="x", weights=weights["sapiens_tiny"] / "w", folder=work)
    NETWORK.append(networks.build_network(candidate, config, COCO17, torch.device("cpu"))[0])
    m = mutants
    parquet = [str(path.relative_to(shards["parquet"])) for path in shards["parquet"].glob("data/*")]
    tars = [str(path.relative_to(shards["webdataset"])) for path in shards["webdataset"].glob("data/*.tar")]
    pictures = [str(path.relative_to(images)) for path in images.glob("val2017/*")]
    run_files = ["config.yaml", "metrics.jsonl", "labelled_ann_ids.json", "ssl/eval.json", "ssl/kept.json"]
    state = [
        f"{CHECKPOINT}/{name}"
        for name in ("position.json", "score.json", "objective.safetensors", "weights/model.safetensors")
    ]
    of_run = partial(by_name, fallback=m.of_bytes)
    return [
        Target("annotations: training", coco, [TRAIN, TRAIN, VAL], m.of_json, begin_training, 2),
        Target("annotations: doctor", coco, [TRAIN, VAL, BOXES], m.of_json, examine_data, 2),
        Target("annotations: evaluation", coco, [VAL], m.of_json, evaluate_boxes, 1),
        Target("annotations: convert", coco, [TRAIN, VAL], m.of_json, convert_data, 0.5),
        Target("annotations: ids", coco, [VAL], m.of_json, ids_of_annotations, 0.5),
        Target("boxes: evaluation", coco, ["boxes.json"], m.of_json, evaluate_boxes, 1),
        Target("boxes: own images", coco, ["boxes.json"], m.of_json, boxes_of_images, 1),
        Target(
            "boxes: annotations of own images",
            _as_boxes(coco, work / "as_boxes"),
            ["boxes.json"],
            m.of_json,
            boxes_of_images,
            0.5,
        ),
        Target("boxes: unlabeled", coco, [BOXES], m.of_json, unlabeled_boxes, 1),
        Target("boxes: unlabeled, detected", detected, [BOXES], m.of_json, unlabeled_boxes, 1),
        Target("boxes: half-finished", work / "partial", ["boxes.json.partial"], m.of_lines, partial_detections, 0.5),
        Target("skeleton YAML", coco, ["skeleton.yaml"], m.of_yaml, read_skeleton, 2),
        Target("recipe", options, ["recipe.yaml"], m.of_yaml, read_recipe, 2),
        Target("launch YAML", options, ["launch.yaml", "zero2.json"], by_name, read_launch, 1),
        Target("DeepSpeed JSON", options, ["zero2.json"], m.of_json, read_zero, 0.5),
        Target("images", images, pictures, m.of_image, read_images, 2),
        Target("images: doctor", images, pictures, m.of_image, examine_data, 0.5),
        Target(
            "weights: safetensors", weights["sapiens_tiny"], ["w/model.safetensors"], m.of_safetensors, run_weights, 1.5
        ),
        Target(
            "weights: sapiens2",
            weights["sapiens2_tiny"],
            ["w/model.safetensors"],
            m.of_safetensors,
            partial(start_from_weights, size="sapiens2_tiny"),
            0.5,
        ),
        Target(
            "weights: own images",
            weights["sapiens_tiny"],
            ["w/model.safetensors", "w/skeleton.json"],
            by_name,
            draw_own_images,
            1,
        ),
        Target("weights: pth", weights["pth"], ["w/model.pth"], m.of_pth, start_from_weights, 2),
        Target("weights: pth evaluated", weights["pth"], ["w/model.pth"], m.of_pth, run_weights, 0.5),
        Target(
            "weights: shards",
            weights["sharded"],
            ["w/model.safetensors.index.json"],
            m.of_json,
            start_from_weights,
            0.5,
        ),
        Target("weights: config.json", weights["sapiens_tiny"], ["w/config.json"], m.of_json, run_weights, 1),
        Target(
            "weights: config.json of sapiens2", weights["sapiens2_tiny"], ["w/config.json"], m.of_json, run_weights, 0.5
        ),
        Target("weights: skeleton.json", weights["sapiens_tiny"], ["w/skeleton.json"], m.of_json, run_weights, 1.5),
        Target("parquet: training", shards["parquet"], parquet, m.of_parquet, begin_training, 1),
        Target("parquet: doctor", shards["parquet"], parquet, m.of_parquet, examine_data, 0.5),
        Target("tar: training", shards["webdataset"], tars, m.of_tar, begin_training, 1),
        Target("tar: categories", shards["webdataset"], ["categories.json"], m.of_json, begin_training, 0.5),
        Target("tar: doctor", shards["webdataset"], tars, m.of_tar, examine_data, 0.5),
        Target("run directory: resumed", run, [*run_files, *state], of_run, resume_run, 2),
        Target("run directory: evaluated", run, ["config.yaml"], m.of_yaml, judge_run, 1),
        Target("run directory: model card", run, [*run_files, "ssl/weights/config.json"], of_run, card_of_run, 1),
    ]


def _as_boxes(coco: Path, folder: Path) -> Path:
    shutil.copytree(coco, folder)
    shutil.copy(folder / VAL, folder / "boxes.json")
    return folder


def by_name(rng: random.Random, data: bytes, fallback: Mutate = mutants.of_safetensors) -> bytes:
    """By what the bytes look like: JSON lines, JSON, YAML, else the fallback."""
    start = data.lstrip()[:1]
    if start == b"{" and data.count(b"\n{"):
        return mutants.of_lines(rng, data)
    if start in (b"{", b"["):
        return mutants.of_json(rng, data)
    try:
        is_tree = isinstance(yaml.safe_load(data.decode()), dict)
    except (UnicodeDecodeError, yaml.YAMLError):
        is_tree = False
    return mutants.of_yaml(rng, data) if is_tree else fallback(rng, data)
