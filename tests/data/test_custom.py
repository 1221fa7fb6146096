"""Keypoints that nobody has thought of: a JSON and a YAML are enough to train, to judge and to hand on weights."""

import importlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import forks
import numpy as np
import pytest
import torch
import yaml

from sapiens_accel.config.parse import load
from sapiens_accel.config.schema import AugmentConfig, DataConfig, MoreData, StageConfig
from sapiens_accel.data import build, loader, sampling
from sapiens_accel.data import dataset as data
from sapiens_accel.data import keypoint_mapping as category
from sapiens_accel.data.augment import Augmenter
from sapiens_accel.data.dataset import TrainingPeople
from sapiens_accel.data.sampling import Mixture, Share
from sapiens_accel.errors import UserError
from sapiens_accel.pose import infer_skeleton
from sapiens_accel.pose.infer_skeleton import Category
from sapiens_accel.pose.skeleton import COCO17, WHOLEBODY133
from sapiens_accel.sources import synthetic

REPOSITORY = Path(__file__).resolve().parents[2]
WHOLE = REPOSITORY / os.environ.get("SAPIENS_ACCEL_TEST_DATA", "../shared/data") / "coco_wholebody_mini"
with_whole_body = pytest.mark.skipif(not WHOLE.is_dir(), reason=f"no {WHOLE} (SAPIENS_ACCEL_TEST_DATA)")
WHOLE_JSON = "annotations/coco_wholebody_val_v1.0.json"
TRAIN = "annotations/person_keypoints_train2017.json"
FINGERS = ("thumb", "index", "middle", "ring", "little")
HAND = ("palm", *(f"{finger}_{joint}" for finger in FINGERS for joint in ("mcp", "pip", "dip", "tip")))
ANIMAL = ("snout", "L_Ear", "R_Ear", "withers", "tail base")
CPU = torch.device("cpu")
Draw = Callable[[np.ndarray, np.random.Generator], np.ndarray]


# ---- Drawn data sets


def _hand(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Five fingers of different colors that spread from a palm; its 21 keypoints [21, 2], px."""
    root = np.array([48.0, 74.0]) + rng.uniform(-4, 4, 2)
    points = [root]
    for finger in range(5):
        angle = np.deg2rad(-150 + 30 * finger + rng.uniform(-5, 5))
        points += [root + reach * np.array([np.cos(angle), np.sin(angle)]) for reach in (18, 30, 40, 50)]
        color = [(255, 60, 60), (60, 255, 60), (60, 60, 255), (255, 255, 60), (60, 255, 255)][finger]
        cv2.polylines(picture, [np.round([root, *points[-4:]]).astype(int)], False, color, 3)
    return np.array(points)


def _animal(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A body, a head and two ears of different colors; its 5 keypoints [5, 2], px."""
    x, y = np.array([48.0, 48.0]) + rng.uniform(-5, 5, 2)
    points = np.array([[x - 38, y + 4], [x - 26, y - 18], [x - 14, y - 18], [x - 12, y], [x + 32, y]])
    cv2.line(picture, (int(x - 12), int(y)), (int(x + 32), int(y)), (200, 200, 200), 9)
    cv2.line(picture, (int(x - 38), int(y + 4)), (int(x - 12), int(y)), (120, 200, 120), 6)
    for ear, color in zip(points[1:3], ((255, 80, 80), (80, 80, 255)), strict=True):
        cv2.line(picture, tuple(np.round(ear).astype(int)), (int(x - 20), int(y)), color, 3)
    return points


def _write(root: Path, draw: Draw, kind: dict[str, Any], seed: int = 0) -> Path:
    """Forty images to train on and eight to validate on, in COCO's form."""
    rng = np.random.default_rng(seed)
    (root / "annotations").mkdir(parents=True)
    for split, num, first in (("train", 40, 1), ("val", 8, 101)):
        (root / f"{split}2017").mkdir()
        images, annotations = [], []
        for number in range(first, first + num):
            picture = rng.integers(0, 40, (96, 96, 3), dtype=np.uint8)
            points = draw(picture, rng)
            cv2.imwrite(str(root / f"{split}2017" / f"{number}.png"), picture)
            box = [*(points.min(0) - 3).tolist(), *(np.ptp(points, axis=0) + 6).tolist()]
            keypoints = np.column_stack([points, np.full(len(points), 2)]).ravel().round(2).tolist()
            images.append({"id": number, "file_name": f"{number}.png", "width": 96, "height": 96})
            one = {"id": number, "image_id": number, "category_id": kind["id"], "bbox": box, "iscrowd": 0}
            annotations.append({**one, "area": box[2] * box[3], "keypoints": keypoints})
        tree = {"images": images, "annotations": annotations, "categories": [kind]}
        (root / f"annotations/person_keypoints_{split}2017.json").write_text(json.dumps(tree))
    return root


def _words(root: Path, output: Path, steps: int, recipe: str = "demo") -> list[str]:
    words = (
        f"--recipe {recipe} --stage phase2 --phase2.steps {steps} --phase2.global_batch 8 --phase2.optim.warmup_steps 5"
    )
    words += f" --data.input_hw [96,96] --data.num_workers 0 --data.root {root} --output_dir {output} --log_every 5"
    return [*words.split(), "--report_to", "none", "--augment.flip_p", "0.5"]


def _train(root: Path, output: Path, steps: int, *more: object) -> tuple[str, list[float], dict[str, Any]]:
    """Train in a process of its own; what it said, its losses, and the eval.json of the stage."""
    environment = os.environ | {"SAPIENS_ACCEL_CACHE": str(output.parent / "cache")}
    command = [REPOSITORY / "train.py", *_words(root, output, steps), *more]
    done = forks.run(command, cwd=output.parent, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout, *_results(output)


def _results(output: Path) -> tuple[list[float], dict[str, Any]]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    found = json.loads((output / "phase2" / "eval.json").read_text())
    return [line["loss"] for line in lines if "loss" in line], found


@pytest.fixture
def train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., Any]]:
    """As `_train`, in this process, which is sooner."""
    monkeypatch.setenv("SAPIENS_ACCEL_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(REPOSITORY))
    monkeypatch.chdir(tmp_path)
    program, num_threads = importlib.import_module("sapiens_accel.train").main, torch.get_num_threads()

    def run(root: Path, output: Path, steps: int, *more: object, recipe: str = "demo") -> Any:
        program([*_words(root, output, steps, recipe), *map(str, more)])
        return capsys.readouterr().out, *_results(output)

    yield run
    torch.set_num_threads(num_threads)


@pytest.fixture
def judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """eval.py's main in this process; what it printed."""
    monkeypatch.setenv("SAPIENS_ACCEL_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(REPOSITORY))
    monkeypatch.chdir(tmp_path)
    program = importlib.import_module("sapiens_accel.eval").main

    def run(*words: object) -> str:
        program([*map(str, words), "--data.num_workers=0"])
        return capsys.readouterr().out

    return run


# ---- Whole runs


def test_a_hand_trains_from_a_json_and_sigmas(tmp_path: Path, judge: Callable[..., Any]) -> None:
    edges = [[1, 4 * finger + 2] for finger in range(5)]
    root = _write(tmp_path / "hand", _hand, {"id": 7, "name": "hand", "keypoints": list(HAND), "skeleton": edges})
    sigmas = {name: 0.1 for name in HAND}
    (tmp_path / "sigmas.yaml").write_text(yaml.safe_dump({"sigmas": sigmas}))
    said, losses, found = _train(root, tmp_path / "run", 50, "--data.skeleton", "sigmas.yaml", "--augment.flip_p", 0)
    assert "keypoints: 21 of hand (palm, thumb_mcp, thumb_pip, ...); left and right: 0 pairs; no halves" in said
    assert "OKS sigmas: 21 given" in said and "warning" not in said
    assert (
        f"--recipe demo trains a toy network (sapiens_tiny) with the demo's few steps; for a network of use on {root}"
        in said
    )
    assert losses[-1] < 0.7 * losses[0]
    assert found["AP"] > 0
    stored = json.loads((tmp_path / "run/phase2/weights/skeleton.json").read_text())
    assert tuple(stored["names"]) == HAND and stored["sigmas"] == [0.1] * 21
    assert [[a + 1, b + 1] for a, b in stored["edges"]] == edges
    # The YAML is not asked for again: what the weights know is enough.
    (tmp_path / "sigmas.yaml").unlink()
    told = judge(tmp_path / "run")
    row = json.loads((tmp_path / "run/eval.json").read_text())["phase2"]
    assert row["AP"] == pytest.approx(found["AP"], abs=1e-6)
    assert list(row["joints"]["keypoints"]) == list(HAND) and "little_tip" in told


def test_an_animal_trains_and_its_weights_alone_are_evaluated(
    tmp_path: Path, train: Callable[..., Any], judge: Callable[..., Any]
) -> None:
    root = _write(tmp_path / "animal", _animal, {"id": 1, "name": "goat", "keypoints": list(ANIMAL), "skeleton": []})
    (tmp_path / "goat.yaml").write_text("sigmas: {snout: 0.1, L_Ear: 0.1, withers: 0.1, tail base: 0.1}")
    said, losses, found = train(root, tmp_path / "run", 40, "--data.skeleton", "goat.yaml")
    assert "left and right: 1 pairs (L_Ear - R_Ear); no halves of a body known (" in said
    assert "0 edges; OKS sigmas: 5 given" in said
    assert losses[-1] < 0.7 * losses[0] and found["AP"] > 0
    # Elsewhere, without the run's config.yaml: weights and people suffice. A JSON of another order is read by name.
    (tmp_path / "run/phase2/weights").rename(tmp_path / "given")
    file = root / "annotations/person_keypoints_val2017.json"
    tree = json.loads(file.read_text())
    tree["categories"][0]["keypoints"] = ["hoof", *reversed(ANIMAL)]
    for one in tree["annotations"]:
        triples = np.array(one["keypoints"]).reshape(5, 3)[::-1]
        one["keypoints"] = [1.0, 1.0, 2, *triples.ravel().tolist()]
    file.write_text(json.dumps(tree))
    told = judge("given", "--data.root", root, "--data.input_hw", "[96,96]", "--data.sigma", "1")
    row = json.loads((tmp_path / "evaluations/given/eval.json").read_text())["given"]
    assert row["AP"] == pytest.approx(found["AP"], abs=1e-6)
    assert "5 of its 6 keypoints are known to all of the weights" in told


def test_keypoints_without_sides_are_not_mirrored(
    tmp_path: Path, train: Callable[..., Any], judge: Callable[..., Any]
) -> None:
    """As CVAT numbers them: the run, its record, its weights and evaluation mirror nothing until pairs are given."""
    root = _write(tmp_path / "animal", _animal, {"id": 1, "name": "goat", "keypoints": [*"12345"], "skeleton": []})
    said, _, found = train(root, tmp_path / "run", 2)
    assert "warning: left and right of the keypoints are not known (1, 2, 3, 4, 5)" in said
    record = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert (record["augment"]["flip_p"], record["eval"]["flip"], found["flip"]) == (0.0, False, False)
    (tmp_path / "run/phase2/weights").rename(tmp_path / "given")
    judge("given", "--data.root", root, "--data.input_hw", "[96,96]", "--data.sigma", "1")
    assert json.loads((tmp_path / "evaluations/given/eval.json").read_text())["given"]["flip"] is False
    for pairs in ([["2", "3"]], []):
        (tmp_path / "goat.yaml").write_text(yaml.safe_dump({"mirror": pairs}))
        skeleton, lines = build.open_skeleton(DataConfig(root=str(root), skeleton=str(tmp_path / "goat.yaml")))
        assert skeleton.mirror_known and "left and right of the keypoints are not known" not in "".join(lines)


def test_nameless_keypoints_are_those_of_people_only(tmp_path: Path) -> None:
    def read(name: str) -> None:
        root = _write(tmp_path / name, lambda _, rng: rng.uniform(20, 80, (17, 2)), {"id": 1, "name": name})
        assert build.open_skeleton(DataConfig(root=str(root)))[0] is COCO17

    read("person")
    with pytest.raises(UserError, match=r"names its 17 keypoints: .*\(coco17 if this dog has a person's"):
        read("dog")


@with_whole_body
def test_whole_body_trains_and_is_evaluated_with_133(tmp_path: Path, train: Callable[..., Any]) -> None:
    # The images to train on are those to validate on: only the way is tried.
    root = tmp_path / "whole"
    root.mkdir()
    for name in ("annotations", "val2017"):
        (root / name).symlink_to(WHOLE / name)
    (root / "train2017").mkdir()
    for path in (WHOLE / "val2017").iterdir():  # the same image twice is a leak only in stage ssl
        (root / "train2017" / path.name).symlink_to(path)
    more = ["--data.train_annotations", WHOLE_JSON, "--data.val_annotations", WHOLE_JSON]
    said, losses, found = train(root, tmp_path / "run", 2, *more, "--log_every", 1)
    assert "keypoints: 133, wholebody133" in said and len(losses) == 2
    assert {"AP", "body/AP", "face/AP", "left_hand/AP", "hands/AP"} <= set(found)
    stored = json.loads((tmp_path / "run/phase2/weights/skeleton.json").read_text())
    assert tuple(stored["names"]) == WHOLEBODY133.names and tuple(stored["sigmas"]) == WHOLEBODY133.sigmas


# ---- Several data sets


def _body(root: Path) -> Path:
    return synthetic.write(root / "body", num_train=12, num_unlabelled=4, num_val=4)


def _whole_body(body: Path, root: Path, num: int) -> Path:
    """The drawn people again, with 133 keypoints in five lists: feet, face and hands at their ankles, noses, wrists."""
    tree = json.loads((body / TRAIN).read_text())
    tree["annotations"] = tree["annotations"][:num]
    for person in tree["annotations"]:
        joints = np.array(person["keypoints"]).reshape(17, 3)
        person["id"] += 5000
        for key, joint, count in (
            ("foot_kpts", 15, 6), ("face_kpts", 0, 68), ("lefthand_kpts", 9, 21), ("righthand_kpts", 10, 21),
        ):  # fmt: skip
            person[key] = np.tile(joints[joint], (count, 1)).ravel().tolist()
    (root / "annotations").mkdir(parents=True)
    (root / "annotations/whole.json").write_text(json.dumps(tree))
    (root / "pictures").symlink_to(body / "train2017")
    return root


def _config(tmp_path: Path, body: Path, *more: MoreData, **changes: Any) -> DataConfig:
    options: dict[str, Any] = {"input_hw": (64, 48), "num_workers": 0, "unlabelled_min_side": 0.0} | changes
    return DataConfig(root=str(body), cache_dir=str(tmp_path / "cache"), more=more, **options)


def _batches(config: DataConfig, first: int, last: int, global_batch: int = 6) -> list[data.Batch]:
    skeleton, _ = build.open_skeleton(config)
    sets = build.open_people(config, skeleton, unlabeled=False)
    augmenter = Augmenter(config=AugmentConfig(), skeleton=skeleton, input_hw=config.input_hw)
    plan = StageConfig(global_batch=global_batch)
    people = TrainingPeople(sets, augmenter, config, plan, seed=3, stage="phase2")
    share = Share(rank=0, num_ranks=1, micro_batch=global_batch, accumulation=1)
    return list(loader.batches(people, share, range(first, last), 0, CPU))


def test_a_mixture_of_17_and_133(tmp_path: Path) -> None:
    body = _body(tmp_path)
    whole = _whole_body(body, tmp_path / "whole", 5)
    more = MoreData(root=str(whole), train_annotations="annotations/whole.json", train_images="pictures", weight=1)
    config = _config(tmp_path, body, more, weight=3)
    skeleton, told = build.open_skeleton(config)
    assert skeleton is WHOLEBODY133 and told == ("keypoints: 133, wholebody133",)
    sets = build.open_people(config, skeleton, unlabeled=True)
    assert "mixture of 12 people (75.0% of an epoch) + 5 people (25.0% of an epoch)" in str(sets)
    assert str(sets).count("has 17 of the 133 keypoints, by name; the others have weight 0 there: left_big_toe") == 2
    assert sets.unlabeled and sets.unlabeled.rows.features["keypoints"].shape == (133, 3)
    assert len(sets.train) == 17 and len(sets.split("train")) == 12
    # An epoch has 2 steps of 6; four of them: 36 of 48 places are the first set's.
    batches = _batches(config, 0, 8)
    ids = torch.cat([batch.labeled.ann_id for batch in batches])
    weights = torch.cat([batch.labeled.weights for batch in batches])
    is_whole = ids > 5000
    assert int(is_whole.sum()) == 12
    assert weights[~is_whole, 17:].abs().sum() == 0 and (weights[~is_whole, :17] > 0).any(dim=1).all()
    assert (weights[is_whole, 17:] > 0).any(dim=1).all()
    # In the middle of an epoch, and after it: the same people.
    again = _batches(config, 3, 8)
    for ours, theirs in zip(again, batches[3:], strict=True):
        assert torch.equal(ours.labeled.ann_id, theirs.labeled.ann_id)
        assert torch.equal(ours.labeled.view.image, theirs.labeled.view.image)


def test_a_mixture_trains_and_resumes(tmp_path: Path, train: Callable[..., Any]) -> None:
    body = _body(tmp_path)
    whole = _whole_body(body, tmp_path / "whole", 5)
    one = {"root": str(whole), "train_annotations": "annotations/whole.json", "train_images": "pictures"}
    recipe = yaml.safe_load((REPOSITORY / "sapiens_accel/recipes/demo.yaml").read_text())
    recipe["data"]["more"] = [one]
    (tmp_path / "mixed.yaml").write_text(yaml.safe_dump(recipe))
    words = ["--log_every", 1, "--save_every", 2]
    said, whole_losses, _ = train(body, tmp_path / "whole_run", 4, *words, recipe="mixed.yaml")
    assert "mixture of 12 people (70.6% of an epoch) + 5 people (29.4% of an epoch)" in said
    stopped = train(body, tmp_path / "run", 4, *words, "--max_steps", 2, recipe="mixed.yaml")[1]
    words += ["--resume_from_checkpoint", "latest"]
    _, losses, found = train(body, tmp_path / "run", 4, *words, recipe="mixed.yaml")
    assert whole_losses == losses and losses[:2] == stopped
    assert found["hands/AP"] == -1 and found["body/AP"] >= 0, "the people to validate on have no hands"


def test_one_set_alone_is_as_it_was(tmp_path: Path) -> None:
    body = _body(tmp_path)
    batches = _batches(_config(tmp_path, body), 0, 3, 5)
    ids = json.loads((body / TRAIN).read_text())["annotations"]
    for step, batch in enumerate(batches):
        chosen = sampling.order(3, "phase2", step, 12, 5)
        assert batch.labeled.ann_id.tolist() == [ids[k]["id"] for k in chosen]


@pytest.mark.parametrize(("sizes", "weights"), [((12, 5), (3.0, 1.0)), ((7, 30, 4), (1, 1, 1)), ((3, 2), (0.9, 0.1))])
@pytest.mark.parametrize("global_batch", [1, 4, 8, 64])
def test_shares_of_a_mixture(sizes: tuple[int, ...], weights: tuple[float, ...], global_batch: int) -> None:
    mixture = Mixture(sizes=sizes, weights=weights)
    steps = max(1, sum(sizes) // global_batch)
    epochs = 30
    chosen = np.array([mixture.order(1, "phase2", step, global_batch) for step in range(epochs * steps)])
    assert chosen.min() >= 0 and chosen.max() < sum(sizes)
    starts = np.concatenate([[0], np.cumsum(sizes)])
    for which, weight in enumerate(weights):
        here = (chosen >= starts[which]) & (chosen < starts[which + 1])
        share = weight / sum(weights)
        places = here.reshape(epochs, -1).sum(axis=1)
        assert len(set(places)) == 1 and abs(places[0] - share * steps * global_batch) < 1, "of every epoch"
        times = np.bincount(chosen[here] - starts[which], minlength=sizes[which])
        assert times.max() - times.min() <= 1, "nobody a second time more than anybody else"
    assert not np.array_equal(chosen, [mixture.order(2, "phase2", step, global_batch) for step in range(len(chosen))])
    # Whatever was asked before: a step is what it is.
    order = np.random.default_rng(0).permutation(len(chosen))[:20]
    assert all(np.array_equal(mixture.order(1, "phase2", int(step), global_batch), chosen[step]) for step in order)


# ---- Bad input


def _refusal(action: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sigma: {palm: 0.1}", "no such key 'sigma'; did you mean sigmas?"),
        ("sigmas: {pam: 0.1}", "sigmas: no such keypoint 'pam'; did you mean palm?"),
        ("sigmas: {palm: big}", "sigmas: palm: expected a number above 0 and up to 1 (a nose: 0.026), found 'big'"),
        ("sigmas: {palm: -1}", "found -1"),
        ("sigmas: [0.1, 0.1]", "sigmas: expected 21 numbers, found 2"),
        ("sigmas: 0.1", "expected a number for each name, or a list of numbers, found 0.1"),
        ("mirror: [[palm, index_tp]]", "mirror: no such keypoint 'index_tp'; did you mean index_tip?"),
        ("mirror: [palm, index_tip]", "expected pairs of names"),
        ("mirror: [[palm, index_tip], [palm, thumb_tip]]", "'palm' and 'thumb_tip': expected each name in one pair"),
        ("upper: [plam]", "upper: no such keypoint 'plam'; did you mean palm?"),
        ("edges: [[palm, tumb_tip]]", "edges: no such keypoint 'tumb_tip'; did you mean thumb_tip?"),
        ("names: [palm, palm]", "names: 'palm' is there twice"),
        ("names: [palm, thum_tip]", "names: no such keypoint 'thum_tip' in the data; did you mean thumb_tip?"),
        ("names: 3", "expected a list of names"),
        ("[palm]", "expected keys and values (a YAML of names, mirror, sigmas, upper, edges), found list"),
        ("{", "not a YAML"),
    ],
)
def test_a_yaml_that_is_wrong_is_refused(tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "hand.yaml").write_text(text)
    hand = Category(file=Path("hand.json"), categories=(), kind="hand", names=HAND, count=21)
    said = _refusal(lambda: infer_skeleton.infer_skeleton([hand], infer_skeleton.load_skeleton("hand.yaml", tmp_path)))
    assert expected in said and "hand.yaml" in said


def test_a_sigma_that_no_float_holds_is_refused(tmp_path: Path) -> None:
    (tmp_path / "hand.yaml").write_text(f"sigmas: {{palm: 1{'0' * 400}}}")
    hand = Category(file=Path("hand.json"), categories=(), kind="hand", names=HAND, count=21)
    said = _refusal(lambda: infer_skeleton.infer_skeleton([hand], infer_skeleton.load_skeleton("hand.yaml", tmp_path)))
    assert "sigmas: palm: expected a number above 0 and up to 1" in said


def _described(tmp_path: Path, *kinds: dict[str, Any], wanted: str | None = None, **person: Any) -> Category:
    people = [{"id": 1, "image_id": 1, "category_id": kinds[0]["id"] if kinds else 1, **person}] if person else []
    file = tmp_path / "some.json"
    file.write_text(json.dumps({"images": [], "annotations": people, "categories": kinds}))
    return category.describe_keypoints(file, wanted, tmp_path / "cache")


def test_categories_are_chosen(tmp_path: Path) -> None:
    hand = {"id": 3, "name": "hand", "keypoints": ["a", "b"]}
    person, cat = {"id": 1, "name": "person"}, {"id": 2, "name": "cat", "keypoints": ["x"]}
    only = _described(tmp_path, person, hand)
    assert (only.names, only.categories) == (("a", "b"), ("hand",))
    both = _described(tmp_path, {**person, "keypoints": ["y"]}, hand)
    assert (both.names, both.categories, both.kind) == (("y",), (), "person")
    assert _described(tmp_path, cat, hand, wanted="hand").names == ("a", "b")
    kinds = _described(tmp_path, cat, {**cat, "id": 9, "name": "dog"}, {"id": 5, "name": "tree"})
    assert (kinds.names, kinds.categories, kinds.kind) == (("x",), ("cat", "dog"), "cat, dog")
    said = _refusal(lambda: _described(tmp_path, cat, hand))
    assert said.endswith("several categories with keypoints (cat, hand): name one by --data.category NAME")
    said = _refusal(lambda: _described(tmp_path, cat, hand, wanted="hnad"))
    assert said.endswith("no category 'hnad' (--data.category); did you mean hand?")
    said = _refusal(lambda: _described(tmp_path, {**hand, "keypoints": ["a", "a"]}))
    assert said.endswith("category 'hand': keypoints: 'a' is there twice; expected each name once")


def test_only_the_chosen_category_is_read(tmp_path: Path) -> None:
    root = _write(tmp_path / "hand", _hand, {"id": 7, "name": "hand", "keypoints": list(HAND)})
    file = root / TRAIN
    tree = json.loads(file.read_text())
    tree["categories"].insert(0, {"id": 1, "name": "person"})
    tree["annotations"] += [{**one, "id": one["id"] + 500, "category_id": 1} for one in tree["annotations"]]
    file.write_text(json.dumps(tree))
    config = _config(tmp_path, root)
    sets = build.open_people(config, build.open_skeleton(config)[0], unlabeled=False)
    assert len(sets.train) == 40 and max(sets.train.rows["ann_id"]) <= 40
    assert sets.train.rows.features["keypoints"].shape == (21, 3)


def test_data_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    root = _write(tmp_path / "hand", _hand, {"id": 7, "name": "hand", "keypoints": list(HAND)})
    config = _config(tmp_path, root)
    skeleton, told = build.open_skeleton(config)
    assert "warning: the OKS sigmas of 20 keypoints are guesses" not in told[1] and "palm: 0.05" in told[1]
    train, val = root / TRAIN, root / TRAIN.replace("train", "val")
    tree, tree_of_val = (json.loads(file.read_text()) for file in (train, val))

    def broken(file: Path, change: Callable[[dict[str, Any]], object], tree: dict[str, Any]) -> str:
        copy = json.loads(json.dumps(tree))
        change(copy)
        file.write_text(json.dumps(copy))
        try:
            return _refusal(lambda: build.open_people(config, build.open_skeleton(config)[0], unlabeled=False))
        finally:
            file.write_text(json.dumps(tree))

    said = broken(train, lambda tree: tree["annotations"][4]["keypoints"].pop(), tree)
    assert f"{train}: annotation 5: expected 63 numbers in 'keypoints' (x, y, v of 21), found 62" in said
    said = broken(val, lambda tree: tree["categories"][0].update(keypoints=[f"p{k}" for k in range(21)]), tree_of_val)
    assert f"{val}: none of the run's keypoints (palm, thumb_mcp, thumb_pip, ...) is among its own (p0, p1" in said
    said = broken(train, lambda tree: tree["categories"][0].pop("keypoints"), tree)
    assert f"{train}: no category names its 21 keypoints: expected 'keypoints' in it, or names in a YAML" in said
    more = MoreData(root=str(root), train_annotations=TRAIN, train_images="train2017", weight=1)
    config = replace(config, more=(more,))
    assert "expected a number above 0 for each set, or none for all" in _refusal(lambda: _batches(config, 0, 1))
    tiny = replace(config, more=(replace(more, weight=0.001),), weight=1)
    assert "the weight of set 2 gives it no place among 78 of an epoch" in _refusal(lambda: _batches(tiny, 0, 1))
    config = replace(config, more=(replace(more, root=str(tmp_path / "none")),))
    assert f"--data.more: root {tmp_path / 'none'}: no such folder" in _refusal(lambda: _batches(config, 0, 1))
    words = ["--recipe", "demo", "--data.weight", "2"]
    assert "--data.weight 2: there is only one dataset" in _refusal(lambda: load(words))
    words = ["--recipe", "demo", "--data.more", "[{train_annotation: a.json, train_images: b}]"]
    assert "no such key 'data.more.train_annotation'; did you mean data.more.train_annotations?" in _refusal(
        lambda: load(words)
    )
    config = replace(config, skeleton="coco16", more=())
    assert "--data.skeleton coco16: no such file; did you mean coco17?" in _refusal(lambda: build.open_skeleton(config))
    assert skeleton.num_keypoints == 21


def test_built_in_skeletons_by_their_names(tmp_path: Path) -> None:
    for built_in in (COCO17, WHOLEBODY133):
        kind = {"id": 1, "name": "person", "keypoints": list(built_in.names)}
        found, told = infer_skeleton.infer_skeleton([_described(tmp_path, kind)], None)
        assert found is built_in and len(told) == 1
    # Spelt otherwise; and the body alone of COCO-WholeBody's five lists.
    spelt = [name.title().replace("_", " ") for name in COCO17.names]
    assert (
        infer_skeleton.infer_skeleton([_described(tmp_path, {"id": 1, "name": "person", "keypoints": spelt})], None)[0]
        is COCO17
    )
    lists = {"keypoints": [0] * 51, "foot_kpts": [], "face_kpts": [], "lefthand_kpts": [], "righthand_kpts": []}
    whole = _described(tmp_path, {"id": 1, "name": "person", "keypoints": list(COCO17.names)}, **lists)
    assert infer_skeleton.infer_skeleton([whole], None)[0] is WHOLEBODY133
    assert category.choose_reading(whole, COCO17.names) == category.choose_reading(whole, WHOLEBODY133.names)
    assert infer_skeleton.infer_skeleton([whole], infer_skeleton.load_skeleton("coco17", tmp_path))[0] is COCO17
    some = category.choose_reading(whole, ("left_wrist", "left_hand_root", "tail"))
    assert some[0].source == (9, 91, -1) and "tail" in some[1]
