"""eval.py as a user starts it: what it takes, what it says, and that processes and batches change no number."""

import contextlib
import importlib
import io
import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import forks
import numpy as np
import pandas as pd
import pytest
import yaml
from networks import untrained
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from safetensors.torch import load_file, save_file

from sapiens_accel.config import commands
from sapiens_accel.config import parse as config
from sapiens_accel.config.options import options
from sapiens_accel.config.schema import EvalConfig
from sapiens_accel.errors import UserError
from sapiens_accel.evaluation import networks
from sapiens_accel.evaluation.coco_metrics import METRICS
from sapiens_accel.pose.skeleton import COCO17, SAPIENS308, WHOLEBODY133, Skeleton
from sapiens_accel.sources import synthetic

REPOSITORY = Path(__file__).resolve().parents[2]
VAL = "annotations/person_keypoints_val2017.json"
Main = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven people to judge by, and a detector's file of them."""
    root = synthetic.write(tmp_path_factory.mktemp("eval") / "drawn", num_train=1, num_unlabelled=1, num_val=7)
    people = json.loads((root / VAL).read_text())["annotations"]
    found = [{"image_id": p["image_id"], "category_id": 1, "bbox": p["bbox"], "score": 0.3} for p in people]
    (root / "detector.json").write_text(json.dumps([*found, *found[:2]]))
    return root


@pytest.fixture(scope="module")
def weights(root: Path) -> Path:
    return untrained(root.parent / "first", 0)


@pytest.fixture
def main(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Main:
    """eval.py's main in this process; what it printed, and eval.json of the first weights."""
    monkeypatch.setenv("SAPIENS_ACCEL_CACHE", str(root.parent / "cache"))
    monkeypatch.syspath_prepend(str(REPOSITORY))
    monkeypatch.chdir(tmp_path)
    program = importlib.import_module("sapiens_accel.eval").main
    data = ["--data.root", str(root), "--data.num_workers", "0"]

    def run(*words: object) -> dict[str, Any]:
        program([*map(str, words), *data])
        file = next(tmp_path.glob("evaluations/*/eval.json"))
        return {"said": capsys.readouterr().out, **json.loads(file.read_text())}

    return run


def test_weights_alone_are_evaluated(main: Main, weights: Path, tmp_path: Path) -> None:
    found = main(weights)
    said, row = found["said"], found["first"]
    assert "COCO keypoint metrics x 100, val people, ground-truth boxes, flip test, area: as annotated\n" in said
    assert {name for name in METRICS if name in row} == set(METRICS)
    assert (row["boxes"], row["flip"], row["scales"], row["split"]) == ("ground truth", True, [1.0], "val")
    joints = row["joints"]["keypoints"]
    assert list(joints) == list(COCO17.names)
    assert row["joints"]["PCK@0.2"] > 0 and all(0 <= joint["PCK@0.2"] <= 1 for joint in joints.values())
    assert re.search(r"left_wrist +\d+( +\d+\.\d){4}( +\d+\.\d\d){2}\n", said)
    # Distances stand beside AP, in the table, the JSON and for each keypoint; and by which area OKS is.
    assert re.search(
        r"AR_L +mean_px +median_px +PCK@0\.1 +PCK@0\.05\nfirst .* \d+\.\d\d +\d+\.\d\d +\d+\.\d +\d+\.\d\n", said
    )
    assert 0 < row["median_px"] < row["mean_px"] and 0 <= row["PCK@0.05"] <= row["PCK@0.1"] <= row["joints"]["PCK@0.2"]
    assert joints["nose"]["mean_px"] > 0 and row["joints"]["median_px"] == row["median_px"]
    assert (row["area"], row["area_used"], row["max_people"]) == ("annotation", "as annotated", 20)
    assert "expected calibration error" in said
    assert len(list(tmp_path.glob("evaluations/first/pictures/*.jpg"))) == 1
    # An untrained network: a 0 is explained.
    assert row["AP"] > 0 or "AP 0: of 7 people none counts" in said


def test_a_run_of_somebody_else_names_no_file_to_write(main: Main, weights: Path, tmp_path: Path) -> None:
    """Its config.yaml had any file of this user overwritten."""
    run, precious = tmp_path / "theirs", tmp_path / "precious"
    precious.write_text("mine")
    shutil.copytree(weights, run / "phase2" / "weights")
    options = {"save_predictions": str(precious), "html": str(precious), "csv": "long", "images": str(tmp_path)}
    (run / "config.yaml").write_text(yaml.safe_dump({"eval": {**options, "num_pictures": 0}}))
    said = main(run / "phase2" / "weights")["said"]
    assert precious.read_text() == "mine" and not list(tmp_path.rglob("*.csv"))
    assert (
        "note: --eval.save_predictions, --eval.csv, --eval.html, --eval.images of the run's config.yaml: not taken"
        in said
    )
    main(run / "phase2" / "weights", "--save_predictions", precious)
    assert json.loads(precious.read_text())


def test_the_page_has_what_training_said_of_each_stage(main: Main, weights: Path, tmp_path: Path) -> None:
    runs = [tmp_path / "one" / "ssl", tmp_path / "other" / "ssl"]
    for run in runs:
        shutil.copytree(weights, run / "weights")
        (run.parent / "config.yaml").write_text(yaml.safe_dump({"eval": {"num_pictures": 0}}))
        (run / "eval.json").write_text(json.dumps({"AP": 0.5, "summary": f"hands over <b>{run.parent.name}"}))
    main(runs[0].parent, runs[1].parent, "--html", tmp_path / "page.html", "--output_dir", tmp_path / "evaluations/x")
    page = (tmp_path / "page.html").read_text()
    for number, run in enumerate(runs, start=1):
        assert f"ssl ({number}), at the end of its training: hands over &lt;b&gt;{run.parent.name}" in page


def test_short_options_are_the_long_ones(main: Main, weights: Path, root: Path, tmp_path: Path) -> None:
    short = main(weights, "--flip", "false", "--scales", "1.0", "1.5", "--boxes", "detector.json",
                 "--save_predictions", tmp_path / "a.json", "--pictures", "0")  # fmt: skip
    long = main(weights, "--eval.flip=false", "--eval.scales=[1.0,1.5]", "--eval.boxes", root / "detector.json",
                "--eval.save_predictions", tmp_path / "b.json", "--eval.num_pictures", "2")  # fmt: skip
    assert "detector's boxes (detector.json), no flip test, scales 1 1.5" in short["said"]
    assert {**short["first"], "seconds": 0} == {**long["first"], "seconds": 0}
    assert (tmp_path / "a.json").read_text() == (tmp_path / "b.json").read_text()
    assert short["first"]["boxes"] == "detector (detector.json)"
    assert "images:\n  evaluations" in long["said"] and ".jpg" not in short["said"]


def test_saved_predictions_score_the_same_by_hand(main: Main, weights: Path, root: Path, tmp_path: Path) -> None:
    row = main(weights, "--boxes", "detector.json", "--save_predictions", tmp_path / "results.json")["first"]
    saved = json.loads((tmp_path / "results.json").read_text())
    assert len(saved) == 7, "two boxes of the nine are of the same people"
    assert all(person["score"] <= 0.3 for person in saved), "times the box score"
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(root / VAL))
        evaluation = COCOeval(truth, truth.loadRes(str(tmp_path / "results.json")), "keypoints")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    assert [row[name] for name in METRICS] == pytest.approx(list(evaluation.stats), abs=1e-12)


def test_the_csv_beside_the_json_has_its_people(main: Main, weights: Path, root: Path, tmp_path: Path) -> None:
    tree = json.loads((root / VAL).read_text())
    names, owners = (
        {one["id"]: one["file_name"] for one in tree["images"]},
        {one["id"]: one for one in tree["annotations"]},
    )
    said = main(weights, "--csv", "long", "--save_predictions", tmp_path / "results.json", "--worst", 0)["said"]
    saved = json.loads((tmp_path / "results.json").read_text())
    assert f"predictions:\n  {tmp_path / 'results.json'}\n  {tmp_path / 'results.csv'}" in said
    table = pd.read_csv(tmp_path / "results.csv")
    assert len(table) == 17 * len(saved) and set(table.category) == {"person"} and table.frame.isna().all()
    by_person = {key: part for key, part in table.groupby(["image", "person_score"])}
    for person in saved:
        part = by_person[names[person["image_id"]], round(person["score"], 5)]
        assert part[["x", "y"]].to_numpy() == pytest.approx(np.reshape(person["keypoints"], (17, 3))[:, :2], abs=1e-9)
        assert part.keypoint.tolist() == list(COCO17.names)
        assert owners[part.annotation_id.iloc[0]]["image_id"] == person["image_id"] == part.image_id.iloc[0]
    assert table.groupby("image").person.max().sum() == len(saved)
    with pytest.raises(UserError, match=r"^--eval\.save_predictions .*out\.csv: .*Name it \.json"):
        main(weights, "--csv", "long", "--save_predictions", tmp_path / "out.csv")
    main(weights, "--csv", "deeplabcut", "--boxes", "detector.json", "--worst", 0)
    (file,) = tmp_path.glob("evaluations/*/keypoints_*.csv")
    wide = pd.read_csv(file, header=[0, 1, 2, 3], index_col=0)
    assert wide.index.tolist() == [one["file_name"] for one in tree["images"]]


def test_what_each_augmentation_adds_and_costs(main: Main, weights: Path, tmp_path: Path) -> None:
    found = main(weights, "--scales", "0.7", "1.0", "--compare", "--flip", "--save_predictions", tmp_path / "r.json")
    names = ["first, plain", "first, flip", "first, scales", "first, flip + scales"]
    assert [name for name in found if name != "said"] == names
    assert "augmentation by row" in found["said"]
    for name in names[1:]:
        assert re.search(rf"^{re.escape(name)}: AP [+-]\d+\.\d\d for \d+\.\d\d x the time", found["said"], re.M)
    assert [(found[name]["flip"], found[name]["scales"]) for name in names] == [
        (False, [1.0]), (True, [1.0]), (False, [0.7, 1.0]), (True, [0.7, 1.0])
    ]  # fmt: skip
    files = sorted(path.name for path in tmp_path.glob("r*.json"))
    assert files == ["r_first_flip.json", "r_first_flip_scales.json", "r_first_plain.json", "r_first_scales.json"]
    assert len({(tmp_path / name).read_text() for name in files}) == 4, "none is without effect"


def test_results_of_two_runs_do_not_mix(tmp_path: Path) -> None:
    run, folders = config.load([]), []
    for name in ("one/ssl/weights", "two/ssl/weights", "two/phase2/weights/model.safetensors", "given", "x/model.pt"):
        path = tmp_path / name
        (path.parent if path.suffix else path).mkdir(parents=True)
        if path.suffix:
            path.touch()
        if len(parts := name.split("/")) > 2:
            (tmp_path / parts[0] / "config.yaml").touch()
        folders.append(networks.list_weights(path, run, None)[0].folder.as_posix())
    assert folders == [f"evaluations/{name}" for name in ("one_ssl", "two_ssl", "two_phase2", "given", "x")]


def test_comparing_without_sides_says_why() -> None:
    run = EvalConfig(compare=True, flip=False)
    with pytest.raises(UserError, match=r"left and right of the keypoints are not known, .* --eval.scales 0\.5"):
        list(networks.list_variants(run, mirror_known=False))


def test_several_weights_and_their_ensemble(main: Main, weights: Path, tmp_path: Path) -> None:
    other = untrained(tmp_path / "second", 1, name="sapiens2_tiny")
    words = ("--ensemble", "--save_predictions", tmp_path / "r.json", "--pictures", "0", "--flip", "false")
    found = main(weights, other, *words)
    assert [name for name in found if name != "said"] == ["first", "second", "ensemble"]
    points = {}
    for name in ("first", "second", "ensemble"):
        saved = json.loads((tmp_path / f"r_{name}.json").read_text())
        points[name] = {one["image_id"]: np.array(one["keypoints"]) for one in saved}
    for name in ("first", "second"):
        assert any(np.abs(points[name][i] - points["ensemble"][i]).max() > 1 for i in points["ensemble"])


def test_weights_of_more_keypoints_are_evaluated_by_those_of_the_data(main: Main, tmp_path: Path) -> None:
    for skeleton in (WHOLEBODY133, SAPIENS308):
        folder = untrained(tmp_path / f"of{skeleton.num_keypoints}", 0, skeleton)
        assert "by name" in main(folder)["said"]


# ---- Bad input


def _refused(main: Main, *words: object) -> str:
    with pytest.raises(UserError) as caught:
        main(*words)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_wrong_options_are_refused(main: Main, weights: Path) -> None:
    assert "nothing to evaluate" in _refused(main)
    for name in ("/no/such/folder", "runs/nope"):
        said = _refused(main, name)
        assert said.startswith(f"{name}: no such run directory or weights here") and "--weights" not in said
    assert "several networks" in _refused(main, weights, "--ensemble")
    assert "nothing to compare" in _refused(main, weights, "--compare", "--flip", "false")
    assert "--eval.scales 1 1" in _refused(main, weights, "--scales", "1", "1")
    assert "--eval.scales: out of its range" in _refused(main, weights, "--scales", "0")
    assert "--eval.scales" in _refused(main, weights, "--scales")
    assert "both 64x48" in _refused(main, weights, "--scales", "1.0", "1.05")
    assert "--eval.boxes nothing.json" in _refused(main, weights, "--boxes", "nothing.json")
    assert "--eval.flp; did you mean --eval.flip?" in _refused(main, weights, "--eval.flp", "1")
    assert "backend" in _refused(main, weights, "--backend", "mine")


def test_weights_of_another_skeleton_are_refused(main: Main, weights: Path, tmp_path: Path) -> None:
    names = tuple("abcde")
    five = Skeleton(names=names, mirror=(0, 1, 2, 3, 4), sigmas=(0.1,) * 5, upper=(), edges=())
    text = _refused(main, untrained(tmp_path / "five", 0, five))
    assert "another skeleton: 5 keypoints (a, b, c, ...)" in text and "has 17 keypoints" in text
    headless = tmp_path / "headless"
    headless.mkdir()
    state = {key: value for key, value in load_file(weights / "model.safetensors").items() if "head." not in key}
    save_file(state, headless / "model.safetensors")
    assert "no heatmap head" in _refused(main, headless)


def test_words() -> None:
    split: Callable[[Sequence[str]], Any] = commands.parse_evaluation
    assert split(["a", "b/c", "--flip"]) == (["a", "b/c"], ["--eval.flip"])
    assert split(["a", "--scales", "0.5", "1.0", "--boxes", "x"])[1] == ["--eval.scales=[0.5,1.0]", "--eval.boxes", "x"]
    assert split(["a", "--eval.scales", "2"])[1] == ["--eval.scales=[2]"]
    assert split(["a", "--scales=[0.5,1.0]"])[1] == ["--eval.scales=[0.5,1.0]"]
    assert split(["a", "--scales", "[0.5,1.0]", "--seed", "1"])[1] == ["--eval.scales=[0.5,1.0]", "--seed", "1"]
    assert split(["a", "--pictures=3"])[1] == ["--eval.num_pictures=3"]


def test_every_option_of_evaluation_has_a_short_name_that_is_no_other_option() -> None:
    short = commands.evaluation_options()
    assert set(short.values()) == {key for key in options() if key.startswith("eval.")}
    assert not short.keys() & options().keys()
    expected = {"boxes": "eval.boxes", "pictures": "eval.num_pictures", "worst": "eval.num_worst"}
    assert {name: short[name] for name in expected} == expected


# ---- Processes and batches


def _launch(
    folder: Path, weights: Path, root: Path, num: int, batch_size: int
) -> tuple[str, dict[str, Any], list[Any]]:
    folder.mkdir()
    words = ["--data.root", root, "--data.num_workers", 0, "--batch_size", batch_size, "--boxes", "detector.json"]
    words += ["--scales", "1.0", "1.5", "--save_predictions", folder / "results.json", "--pictures", 0]
    environment = os.environ | {"SAPIENS_ACCEL_CACHE": str(root.parent / "cache")}
    done = forks.run([REPOSITORY / "eval.py", weights, *words], cwd=folder, env=environment, processes=num)
    assert done.returncode == 0, done.stderr
    row = json.loads((folder / "evaluations" / "first" / "eval.json").read_text())["first"]
    row.pop("seconds")
    return done.stdout, row, json.loads((folder / "results.json").read_text())


@pytest.mark.launch
def test_processes_and_batches_change_no_number(weights: Path, root: Path, tmp_path: Path) -> None:
    # Nine boxes: the last batch of 4 has one, and of two processes one predicts a box twice.
    alone_said, alone, alone_saved = _launch(tmp_path / "one", weights, root, 1, 4)
    said, row, saved = _launch(tmp_path / "two", weights, root, 2, 2)
    assert said.count("COCO keypoint metrics") == 1
    table = alone_said[alone_said.index("COCO keypoint metrics") :]
    assert said[said.index("COCO keypoint metrics") :].replace(str(tmp_path / "two"), str(tmp_path / "one")) == table
    assert _close(row, alone)
    assert [one["image_id"] for one in saved] == [one["image_id"] for one in alone_saved] and len(saved) == 7
    for one, other in zip(saved, alone_saved, strict=True):
        assert one["keypoints"] == pytest.approx(other["keypoints"], abs=2e-3)
    assert alone["joints"]["OKS"] > 0.001


def _close(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_close(a[key], b[key]) for key in a)
    return a == pytest.approx(b, abs=1e-5) if isinstance(a, float) else a == b
