"""Keypoints that nobody has thought of: a JSON and a YAML are enough to train, to judge and to hand on weights."""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import yaml

from sapiens_accel import category, custom, data, synthetic
from sapiens_accel.augment import Augmenter
from sapiens_accel.config import AugmentConfig, DataConfig, MoreData, StageConfig, UserError
from sapiens_accel.data import Share, TrainingPeople
from sapiens_accel.mixture import Mixture
from sapiens_accel.skeleton import COCO17, WHOLEBODY133

REPOSITORY = Path(__file__).resolve().parents[1]
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
    """Five fingers of different colours that spread from a palm; its 21 joints [21, 2], px."""
    root = np.array([48.0, 74.0]) + rng.uniform(-4, 4, 2)
    points = [root]
    for finger in range(5):
        angle = np.deg2rad(-150 + 30 * finger + rng.uniform(-5, 5))
        points += [root + reach * np.array([np.cos(angle), np.sin(angle)]) for reach in (18, 30, 40, 50)]
        colour = [(255, 60, 60), (60, 255, 60), (60, 60, 255), (255, 255, 60), (60, 255, 255)][finger]
        cv2.polylines(picture, [np.round([root, *points[-4:]]).astype(int)], False, colour, 3)
    return np.array(points)


def _animal(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A body, a head and two ears of different colours; its 5 joints [5, 2], px."""
    x, y = np.array([48.0, 48.0]) + rng.uniform(-5, 5, 2)
    points = np.array([[x - 38, y + 4], [x - 26, y - 18], [x - 14, y - 18], [x - 12, y], [x + 32, y]])
    cv2.line(picture, (int(x - 12), int(y)), (int(x + 32), int(y)), (200, 200, 200), 9)
    cv2.line(picture, (int(x - 38), int(y + 4)), (int(x - 12), int(y)), (120, 200, 120), 6)
    for ear, colour in zip(points[1:3], ((255, 80, 80), (80, 80, 255)), strict=True):
        cv2.line(picture, tuple(np.round(ear).astype(int)), (int(x - 20), int(y)), colour, 3)
    return points


def _write(root: Path, draw: Draw, kind: dict[str, Any], seed: int = 0) -> Path:
    """Forty pictures to train on and eight to validate on, in COCO's form."""
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


def _words(root: Path, output: Path, steps: int) -> list[str]:
    words = f"--recipe demo --stage phase2 --phase2.steps {steps} --phase2.global_batch 8 --phase2.optim.warmup_steps 5"
    words += f" --data.input_hw [96,96] --data.num_workers 0 --data.root {root} --output_dir {output} --log_every 5"
    return [*words.split(), "--report_to", "none", "--augment.flip_p", "0.5"]


def _python(*words: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {"SAPIENS_ACCEL_CACHE": str(cwd / "cache"), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=300)


def _train(root: Path, output: Path, steps: int, *more: object) -> tuple[str, list[float], dict[str, Any]]:
    """What it said, its losses, and the eval.json of the stage."""
    done = _python(REPOSITORY / "train.py", *_words(root, output, steps), *more, cwd=output.parent)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    found = json.loads((output / "phase2" / "eval.json").read_text())
    return done.stdout, [line["loss"] for line in lines if "loss" in line], found


@pytest.fixture
def judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """eval.py's main in this process; what it printed."""
    monkeypatch.setenv("SAPIENS_ACCEL_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(REPOSITORY))
    monkeypatch.chdir(tmp_path)
    program = importlib.import_module("eval").main

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
    said, losses, found = _train(root, tmp_path / "run", 120, "--data.skeleton", "sigmas.yaml")
    assert "keypoints: 21 of hand (palm, thumb_mcp, thumb_pip, ...); left and right: 0 pairs; no halves" in said
    assert "OKS sigmas: 21 given" in said and "warning" not in said
    assert losses[-1] < 0.5 * losses[0]
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


def test_an_animal_trains_and_its_weights_alone_are_judged(tmp_path: Path, judge: Callable[..., Any]) -> None:
    root = _write(tmp_path / "animal", _animal, {"id": 1, "name": "goat", "keypoints": list(ANIMAL), "skeleton": []})
    (tmp_path / "goat.yaml").write_text("sigmas: {snout: 0.15, L_Ear: 0.15, withers: 0.15, tail base: 0.15}")
    said, losses, found = _train(root, tmp_path / "run", 80, "--data.skeleton", "goat.yaml")
    assert "left and right: 1 pairs (L_Ear - R_Ear); 4 upper, 1 lower; 0 edges; OKS sigmas: 5 given" in said
    assert losses[-1] < 0.5 * losses[0] and found["AP"] > 0
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
