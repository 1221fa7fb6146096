"""The benchmarks as a user starts them, at their smallest: what they promise to write, and that the plan is right."""

import importlib
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import forks
import pytest

from sapiens_accel.errors import UserError
from sapiens_accel.runtime.files import GIB
from sapiens_accel.selftest.peak_memory import way_of
from sapiens_accel.selftest.training_step import case_of
from sapiens_accel.sources import synthetic

ROOT = Path(__file__).parents[1]
# What these tests measure is the CPU's, wherever they run; the code is this checkout's, whichever is installed.
ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}

pytestmark = pytest.mark.launch


def benchmark(name: str, out: Path, *words: str, code: int = 0, option: str = "--out", **env: str) -> dict[str, Any]:
    """Run it and read what it wrote."""
    done = forks.run([f"benchmarks/{name}.py", option, out, *words], env={**os.environ, **ENVIRONMENT, **env})
    assert done.returncode == code, done.stdout[-4000:] + done.stderr[-4000:]
    return json.loads(out.read_text())


@pytest.mark.slow
def test_the_predicted_peak_is_the_measured_one(tmp_path: Path) -> None:
    words = ["--models", "sapiens_tiny", "--stages", "phase2", "--precisions", "no", "--measured_only", "--batch", "4"]
    found = benchmark("memory", tmp_path / "memory.json", *words, "--ways", "plain", "8bit+activations")
    assert found["benchmark"] == "memory" and found["device"]["kind"] == "cpu" and found["unit"] == "bytes"
    assert {"python", "torch", "transformers", "accelerate", "deepspeed"} <= set(found["versions"])
    assert {"date", "command", "cpus", "idle", "limit", "batch"} <= set(found)
    measured = [case for case in found["cases"] if case["way"] == "plain"]
    layouts = {(case["checkpointed_blocks"], case["head_chunk"], case["accumulation"]) for case in measured}
    assert layouts == {(4, 2, 1), (4, 2, 2), (2, None, 1), (0, 2, 1)}
    for case in measured:
        assert case["outcome"] == "measured"
        assert case["predicted"] == pytest.approx(case["measured"], rel=0.03), case
        assert sum(case["parts"].values()) == pytest.approx(case["predicted"], abs=len(case["parts"]))
    elsewhere = [case for case in found["cases"] if case["way"] != "plain"]
    assert {(case["measured"], case["outcome"]) for case in elsewhere} == {(None, "needs a GPU")}


def test_the_peer_starts_with_the_same_loss(tmp_path: Path) -> None:
    words = ["--input_hw", "64", "48", "--batch", "2", "--steps", "1", "--repetitions", "2", "--warm_up", "1"]
    words += ["--peak_tflops", "0.1", "--min_ratio", "1e6"]
    found = benchmark("throughput", tmp_path / "throughput.json", *words, code=1)  # nothing is a million times faster
    assert found["benchmark"] == "throughput" and found["peak_tflops"] == 0.1
    assert {"date", "command", "versions", "cpus", "idle", "repetitions", "steps"} <= set(found)
    assert [case["model"] for case in found["cases"]] == ["sapiens_tiny", "sapiens2_tiny"]
    for case in found["cases"]:
        assert case["losses"]["ours"] == pytest.approx(case["losses"]["peer"], rel=1e-5)
        runners = {"ours", "ours_checkpointed", "ours_chunked"}
        assert set(case["people_per_second"]) == {*runners, "peer"} == set(case["mfu"])
        assert set(case["ratio"]) == runners
        for spread in (*case["people_per_second"].values(), *case["ratio"].values(), case["chunks_cost"]):
            assert 0 < spread["lowest"] <= spread["median"] <= spread["highest"]


@pytest.mark.slow
def test_a_step_with_unlabeled_people_needs_a_teacher_more_and_little_else(tmp_path: Path) -> None:
    """The project's bar: 10 % above a supervised step with as many student people. The time is only looked at."""
    words = [
        "--models",
        "sapiens_tiny",
        "sapiens2_tiny",
        "--batch",
        "4",
        "--input_hw",
        "128",
        "96",
        "--repetitions",
        "1",
    ]
    found = benchmark("cost", tmp_path / "cost.json", *words)
    assert [case["model"] for case in found["cases"]] == ["sapiens_tiny", "sapiens2_tiny"]
    for case in found["cases"]:
        peaks = case["peak_bytes"]
        assert case["checkpointed_blocks"] == 4 and case["teacher_bytes"] > 4e6
        assert case["memory_ratio"] == pytest.approx(
            (peaks["ssl"] - case["teacher_bytes"]) / peaks["phase2_twice_the_people"], abs=1e-4
        )
        assert 0.8 < case["memory_ratio"] < found["bars"]["memory_ratio"]
        assert case["time_ratio"] > 1.3


def test_the_codec_is_timed_alone_where_there_is_no_peer(tmp_path: Path) -> None:
    words = ["--input_hw", "160", "120", "--batch", "2", "--joints", "5", "3", "--rounds", "2", "--sigma", "2"]
    found = benchmark("codec", tmp_path / "codec.json", *words)
    assert found["benchmark"] == "codec" and found["heatmap_hw"] == [40, 30] and found["threads"] == 1
    assert [case["joints"] for case in found["cases"]] == [5, 3]
    for case in found["cases"]:
        assert set(case["encode"]) == set(case["decode"]) == {"ours"} and case["agreement"] == {}
        assert 0 < case["decode"]["ours"]["lowest"] <= case["decode"]["ours"]["median"]
    assert not [key for key in found if "ratio" in key]


def test_the_codecs_peer_runs_in_another_python_and_gives_the_same_maps_and_points(tmp_path: Path) -> None:
    """mmpose is not installed: a package of its name, called and answering as it does, holds our own codec."""
    package = tmp_path / "mmpose" / "codecs"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").touch()
    (package / "__init__.py").write_text("raise ImportError('what every codec needs')")
    (package / "udp_heatmap.py").write_text(STAND_IN.format(root=str(ROOT)))
    words = ["--input_hw", "160", "120", "--batch", "4", "--joints", "40", "--rounds", "2", "--sigma", "2"]
    found = benchmark("codec", tmp_path / "codec.json", *words, "--peer_python", shell(tmp_path, tmp_path))
    assert str(tmp_path) not in (tmp_path / "codec.json").read_text()
    (case,) = found["cases"]
    for step in ("encode", "decode"):
        assert found[f"{step}_ratio_mmpose"] == case[f"{step}_ratio"]["mmpose"]["median"] > 0
    agreement = case["agreement"]["mmpose"]
    assert agreement["map_values"] == 0.0 and agreement["points_inside"] == pytest.approx(0.25, abs=1e-3)
    assert 0 < agreement["num_inside"] < 160
    assert agreement["error_at_border_theirs"] != agreement["error_at_border_ours"]


# Points 0.25 input px to the right of ours, and in mmpose's frame, where W / (W - 1) px are one.
STAND_IN = """
import sys
sys.path.insert(0, "{root}")
import numpy as np, torch
from sapiens_accel.pose.heatmap import Codec
class UDPHeatmap:
    def __init__(self, input_size, heatmap_size, sigma):
        self.size = np.array(input_size)
        self.codec = Codec(input_hw=tuple(input_size[::-1]), heatmap_hw=tuple(heatmap_size[::-1]), sigma=float(sigma))
    def encode(self, points_xy, visible):
        maps, weights = self.codec.encode(torch.from_numpy(points_xy), torch.from_numpy(visible))
        return dict(heatmaps=maps[0].numpy(), keypoint_weights=weights.numpy())
    def decode(self, maps):
        points_xy, scores = self.codec.decode(torch.from_numpy(maps)[None])
        return (points_xy.numpy() + [0.25, 0]) * self.size / (self.size - 1), scores.numpy()
"""


def test_a_python_without_the_codecs_is_reported_in_one_line(tmp_path: Path) -> None:
    for name in ("mmpose", "transformers"):
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('half of {name} is missing')")
    broken = shell(tmp_path, tmp_path)
    expected = (
        "mmpose: ImportError: half of mmpose is missing; transformers: ImportError: half of transformers is missing"
    )
    for python, reason in ((str(tmp_path / "no"), "No such file"), (broken, expected)):
        command = ["benchmarks/codec.py", "--peer_python", python, "--out", tmp_path / "codec.json"]
        done = forks.run(command, env=os.environ | ENVIRONMENT)
        last = done.stderr.splitlines()[-1]
        assert done.returncode == 2 and last.startswith(f"codec.py: error: --peer_python {python}: ") and reason in last
        assert "Traceback" not in done.stderr


SMALL = ["--input_hw", "64", "48", "--batch", "3", "--rounds", "2"]


@pytest.fixture
def few_people(tmp_path: Path) -> Path:
    return synthetic.write(tmp_path / "drawn", num_train=5, num_unlabelled=1, num_val=1)


def test_the_data_is_timed_alone_where_there_is_no_peer(tmp_path: Path, few_people: Path) -> None:
    cache = {"SAPIENS_ACCEL_CACHE": str(tmp_path / "cache")}
    found = benchmark("data", tmp_path / "data.json", *SMALL, "--root", str(few_people), **cache)
    assert found["benchmark"] == "data" and found["people"] == 5 and found["median_megapixels"] == 0.058
    assert str(tmp_path) not in (tmp_path / "data.json").read_text()
    names = [case["name"] for case in found["cases"]]
    assert names == ["ours", "ours_whole_decode", "ours_default_changes", "ours_pairs"]
    for case in found["cases"]:
        rate = case["people_per_second"]
        assert 0 < rate["lowest"] <= rate["median"] <= rate["highest"]
    rate, parts = found["cases"][0]["people_per_second"]["median"], found["parts_ms"]
    assert found["cores_for_gpu_people_per_second"]["400"] == math.ceil(400 / rate)
    assert 0 < parts["decode"] < parts["all"] and parts["rest"] > 0
    assert not [key for key in found if "ratio" in key]


def test_the_data_is_timed_on_enlarged_images(tmp_path: Path, few_people: Path) -> None:
    cache = {"SAPIENS_ACCEL_CACHE": str(tmp_path / "cache")}
    words = [*SMALL, "--root", str(few_people), "--megapixels", "0.5"]
    found = benchmark("data", tmp_path / "data.json", *words, **cache)
    assert found["people"] == 5 and found["median_megapixels"] == 0.5
    assert found["command"] == "python benchmarks/data.py --megapixels 0.5"


def test_the_datas_peer_runs_in_another_python_on_the_same_people(tmp_path: Path, few_people: Path) -> None:
    """mmpose is not installed: packages of those names hold steps that note what they get."""
    for module, content in STEPS.items():
        path = tmp_path / "packages" / module
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content.replace("NOTES", str(tmp_path / "notes.txt")))
    cache = {"SAPIENS_ACCEL_CACHE": str(tmp_path / "cache")}
    words = [*SMALL, "--root", str(few_people), "--peer_python", shell(tmp_path, tmp_path / "packages")]
    found = benchmark("data", tmp_path / "data.json", *words, **cache)
    cases = {case["name"]: case for case in found["cases"]}
    assert list(cases)[4:] == ["mmpose", "mmpose_without_targets"]
    for name in ("mmpose", "mmpose_without_targets"):
        assert found[f"ratio_{name}"] == cases[name]["ratio"]["median"] > 0
    passes = [line.split() for line in (tmp_path / "notes.txt").read_text().splitlines()]
    plain = ["LoadImage", "GetBBoxCenterScale", "RandomFlip", "RandomHalfBody", "RandomBBoxTransform", "TopdownAffine"]
    plain += ["PhotometricDistortion", "Albumentation"]
    whole, without = [*plain, "GenerateTarget", "PackPoseInputs"], [*plain, "PackPoseInputs"]
    # An untimed pass and two timed ones of 5 people, in batches of 3 and 2.
    once = [[*steps, "17", str(batch)] for steps in (whole, without) for batch in (3, 3, 3, 2, 2)]
    assert passes == once * 3


STEP = """
class {name}:
    def __init__(self, **settings): pass
    def __call__(self, person): return person | {{"steps": person.get("steps", ()) + (type(self).__name__,)}}
"""
COMMON = ("GetBBoxCenterScale", "RandomFlip", "RandomHalfBody", "RandomBBoxTransform", "PhotometricDistortion")
STEPS = {
    "mmpose/__init__.py": "",
    "mmpose/datasets/__init__.py": "raise ImportError('what every data set needs')",
    "mmpose/codecs/udp_heatmap.py": "",
    "mmpose/datasets/transforms/common_transforms.py": "".join(
        STEP.format(name=name) for name in (*COMMON, "Albumentation", "GenerateTarget")
    ),
    "mmpose/datasets/transforms/formatting.py": STEP.format(name="PackPoseInputs"),
    "mmpose/datasets/transforms/loading.py": STEP.format(name="LoadImage"),
    "mmpose/datasets/transforms/topdown_transforms.py": STEP.format(name="TopdownAffine"),
    "mmengine/__init__.py": "",
    "mmengine/dataset.py": """
def pseudo_collate(people):
    with open("NOTES", "a") as file:
        for person in people:
            print(*person["steps"], person["keypoints"].shape[1], len(people), file=file)
""",
}


def test_a_python_without_mmpose_is_reported_in_one_line(tmp_path: Path, few_people: Path) -> None:
    (tmp_path / "mmpose.py").write_text("raise ImportError('half of mmpose is missing')")
    python = shell(tmp_path, tmp_path)
    command = ["benchmarks/data.py", "--peer_python", python, "--root", str(few_people), *SMALL]
    env = os.environ | ENVIRONMENT | {"SAPIENS_ACCEL_CACHE": str(tmp_path / "cache")}
    command += ["--out", str(tmp_path / "data.json")]
    done = forks.run(command, env=env)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert last.startswith(
        f"data.py: error: --peer_python {python}: mmpose cannot be imported there (ImportError: half of"
    )


def shell(folder: Path, packages: Path) -> str:
    """This Python, which imports from `packages` first."""
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={packages} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return str(python)


@pytest.mark.slow  # nine trainings
def test_arms_are_held_against_the_strongest_supervised_one(tmp_path: Path) -> None:
    words = ["--data", "drawn", "--labels", "6", "--seeds", "3", "4", "--jobs", "2"]
    words += ["--arms", "supervised", "defaults"]
    small = [f"--data.synthetic.num_{name}={num}" for name, num in (("train", 8), ("unlabelled", 4), ("val", 4))]
    short = [f"--{stage}.{knob}" for stage in ("phase2", "ssl") for knob in ("steps=2", "global_batch=2")]
    words += [*small, *short, "--data.input_hw=[64,48]"]
    out, cache = tmp_path / "ssl.json", {"SAPIENS_ACCEL_CACHE": str(tmp_path)}
    found = benchmark("ssl", out, *words, option="--json", **cache)
    choices = {(row["strength"], row["rate"]): row["ap"] for row in found["choices"]}
    assert {strength for strength, _ in choices} == {"weak", "mid", "strong"} and len(choices) == 4
    assert {row["seed"] for row in found["choices"]} == {100}  # none of the seeds that are compared
    rows = {(row["arm"], row["seed"]): row for row in found["rows"]}
    assert set(rows) == {(arm, seed) for arm in ("supervised", "defaults") for seed in (3, 4)}
    best = max(choices, key=lambda case: choices[case])
    assert all((rows["supervised", seed]["strength"], rows["supervised", seed]["rate"]) == best for seed in (3, 4))
    assert rows["supervised", 3]["keep"] is None and rows["defaults", 3]["keep"] is not None
    assert rows["supervised", 3]["start_ap"] == rows["defaults", 3]["start_ap"]
    cells = {cell["arm"]: cell for cell in found["summary"]}
    gains = [round(rows["defaults", seed]["px"] - rows["supervised", seed]["px"], 2) for seed in (3, 4)]
    assert cells["defaults"]["px_gains"] == gains
    picture = cv2.imread(str(out.with_suffix(".png")))
    assert picture is not None and picture.std() > 5
    # What a file of the same settings holds is not run again: made-up rows stay.
    out.write_text(out.read_text().replace('"px": ', '"px": 5'))
    again = benchmark("ssl", out, *words, option="--json", **cache)
    assert again["rows"] == json.loads(json.dumps(found["rows"]).replace('"px": ', '"px": 5'))
    # An opponent that is carried over is not chosen, and the file says so.
    given = ["--opponent", "drawn:6=weak:0.3", "--seeds", "3", "--arms", "supervised", "supervised_long"]
    given += ["--work", str(tmp_path / "work")]
    carried = benchmark("ssl", tmp_path / "given.json", *words, *given, option="--json", **cache)
    assert carried["choices"] == [] and carried["opponents_given"] == [["drawn", 6, "weak", 0.3]]
    assert [(row["strength"], row["rate"]) for row in carried["rows"]] == [("weak", 0.3)] * 2
    # The arm of equal time takes twice the steps that the command line gives the stage.
    lengths = [
        json.loads((tmp_path / "work" / "drawn_6_3" / f"weak_{arm}_0.3" / "ssl" / "eval.json").read_text())["step"]
        for arm in ("supervised", "supervised_long")
    ]
    assert lengths == [2, 4]


def test_an_interval_of_paired_gains_is_students(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: mean 2, standard deviation 1, and of 2 degrees of freedom t is 4.3027."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    gain = importlib.import_module("gain")
    assert gain.interval([1.0, 2.0, 3.0]) == (round(2 - 4.3027 / 3**0.5, 2), round(2 + 4.3027 / 3**0.5, 2))
    assert gain.interval([1.0]) is None


def test_the_folder_of_benchmarks_does_not_hide_the_standard_librarys_ssl() -> None:
    code = "import sys; sys.path.insert(0, 'benchmarks'); import asyncio, ssl; ssl.create_default_context()"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_a_case_for_a_gpu_is_planned_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    cases = importlib.import_module("cases")
    wanted = cases.Wanted(models=["sapiens_0.3b"], stages=["phase2"], ways=["zero2"], input_hw=(512, 384), batch=32)
    (planned,) = cases.on_gpu(wanted, 15 * GIB, (8, 0))
    case, plan = planned.case, planned.plan
    assert (case.launch, case.precision, case.micro_batch, case.accumulation) == ("zero2", "bf16", 32, 1)
    assert planned.bar == 8 * GIB > plan.gpu_peak  # the project's goal, by its own prediction
    # By hand: weights in bf16, and of 24 blocks the inputs, 32 people of 32 x 24 tokens of 1024 channels in bf16.
    least = 2 * planned.stage.num_parameters + 24 * 32 * 768 * 1024 * 2
    assert least < planned.floor < least + 3 * GIB
    assert case_of(json.loads(json.dumps(case.as_json()))) == case
    with pytest.raises(UserError, match="--ways zero9: no such way \\(expected one of plain, "):
        way_of("zero9")


def test_the_numbers_of_a_campaign_of_faults_follow_from_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of disk faults too: their steps that no checkpoint has are counted, and not as 0 lost steps."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.setenv("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))  # the module sets it
    faults: Any = importlib.import_module("faults")
    import torch
    from safetensors.torch import save_file

    for file in sorted((ROOT / "benchmarks" / "results").glob("faults_*.json")):
        tree = json.loads(file.read_text())
        for row in tree["outcomes"]:
            assert (row["lost"], row["unsaved"]) == faults.missing_steps(row)
        summary = json.loads(json.dumps(faults.summarize(tree["outcomes"])))
        assert {key: tree[key] for key in summary} == summary
    row = {"fault": "full disk", "logged": 12, "saved": 2, "run": {"save_every": 2}}
    assert faults.missing_steps(row) == (None, 10)
    assert faults.missing_steps(row | {"fault": "killed rank"}) == (8, 0)
    assert faults.missing_steps(row | {"fault": "SIGTERM"}) == (10, 0)
    digests = []
    for last in (1.0, 1.0 + 2**-23):
        save_file({"head": torch.tensor([1.0]), "norm": torch.tensor([0.5, last])}, tmp_path / "weights")
        digests.append(faults.digest_weights(tmp_path / "weights"))
    assert [name for name in digests[0] if digests[0][name] != digests[1][name]] == ["norm"]


@pytest.mark.slow
def test_the_output_of_visibility_is_measured_beside_the_peak(tmp_path: Path) -> None:
    found = benchmark("visibility", tmp_path / "visibility.json", "--steps", "2")
    (row,) = found["rows"]
    assert set(row["scores"]) == {"present", "visible"}
    for scores in row["scores"].values():
        assert scores["output"]["ECE"] < scores["peak"]["ECE"]  # an untrained network's peaks say nothing
        assert scores["peak, calibrated"]["ECE"] < 0.1


def test_results_name_no_folder_of_the_machine_that_made_them() -> None:
    for file in sorted((ROOT / "benchmarks" / "results").glob("*.json")):
        assert not re.search(r"/(work|tmp|home|root|mnt|Users)/", file.read_text()), file.name
