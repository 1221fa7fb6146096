"""What convert writes, to those who know nothing of it: plain `datasets`; and eval.py's numbers from it."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from networks import untrained

from sapiens_accel.evaluation.coco_metrics import METRICS
from sapiens_accel.sources import convert, synthetic

REPOSITORY = Path(__file__).resolve().parents[2]
VAL = "annotations/person_keypoints_val2017.json"
# Rows to COCO's JSON with plain `datasets`: this package cannot be imported.
PLAIN = """
import glob, io, json, sys
sys.modules["sapiens_accel"] = None
import datasets
folder, cache = sys.argv[1:]
files = {split: sorted(glob.glob(f"{folder}/data/{split}-*.parquet")) for split in ("train", "validation")}
loaded = datasets.load_dataset("parquet", data_files=files, cache_dir=cache)
names = datasets.load_dataset("parquet", data_files=f"{folder}/categories.parquet", cache_dir=cache)["train"]
images, annotations, pixels = [], [], {}
for row in loaded["validation"]:
    image = row["image"].convert("RGB")
    pixels[row["image_id"]] = [image.size, sum(image.resize((1, 1)).getpixel((0, 0)))]
    sizes = {key: row[key] for key in ("file_name", "width", "height")}
    images.append({"id": row["image_id"], **sizes})
    for person in row["people"]:
        lists = {key: person[key] or [] for key in ("bbox", "keypoints")}
        annotations.append({**person, **lists, "image_id": row["image_id"]})
annotations.sort(key=lambda one: one["place"])
kinds = [kind for kind in names if kind["split"] == "validation"]
assert not any(name.startswith("sapiens_accel.") for name in sys.modules)
print(json.dumps([images, annotations, pixels, kinds, {split: len(rows) for split, rows in loaded.items()}]))
"""


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Drawn people, one of them a crowd and one without an area; and their shards."""
    base = tmp_path_factory.mktemp("plain")
    root = synthetic.write(base / "drawn", num_train=4, num_unlabelled=1, num_val=9)
    tree = json.loads((root / VAL).read_text())
    tree["annotations"] = tree["annotations"][::-1]
    tree["annotations"][0]["iscrowd"] = 1
    del tree["annotations"][1]["area"]
    (root / VAL).write_text(json.dumps(tree))
    convert.main(["convert", "coco", str(root), str(base / "out"), "--shard_mb", "0.1", "--group_rows", "2"])
    return root, base / "out"


def test_plain_datasets_have_all_that_ap_needs(roots: tuple[Path, Path], tmp_path: Path) -> None:
    root, out = roots
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, str(out), str(tmp_path / "cache")],
        cwd=tmp_path, env=environment | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    images, annotations, pixels, kinds, counts = json.loads(done.stdout.splitlines()[-1])
    tree = json.loads((root / VAL).read_text())
    kept = ("id", "file_name", "width", "height")
    assert images == [{key: image[key] for key in kept} for image in tree["images"]] and counts["train"] >= 1
    assert [a["place"] for a in annotations] == list(range(len(tree["annotations"])))
    for ours, theirs in zip(annotations, tree["annotations"], strict=True):
        for key in ("id", "image_id", "category_id", "bbox", "keypoints"):
            assert ours[key] == theirs[key], key
        assert (ours["iscrowd"], ours["area"]) == (theirs.get("iscrowd", 0), theirs.get("area"))
    assert {len(images), 2} == {len(pixels), 2}
    for image in tree["images"]:
        (width, height), gray = pixels[str(image["id"])]
        assert (width, height) == (image["width"], image["height"]) and gray > 0
    assert kinds[0]["keypoints"] == tree["categories"][0]["keypoints"] and kinds[0]["id"] == 1


def test_eval_has_the_numbers_of_the_folder_to_the_last_digit(
    roots: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAPIENS_ACCEL_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(REPOSITORY))
    program, weights = importlib.import_module("sapiens_accel.eval").main, untrained(tmp_path / "first", 0)
    found = []
    for name, root in zip(("folder", "parquet"), roots, strict=True):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        program([str(weights), "--data.root", str(root), "--data.num_workers", "0", "--pictures", "0",
                 "--save_predictions", "results.json"])  # fmt: skip
        row = json.loads(next(Path().glob("evaluations/*/eval.json")).read_text())["first"]
        found.append(({key: value for key, value in row.items() if key != "seconds"}, Path("results.json").read_text()))
    assert found[0] == found[1] and set(METRICS) <= found[0][0].keys()
    assert found[0][0]["joints"]["PCK@0.2"] > 0 and len(json.loads(found[0][1])) == 8
