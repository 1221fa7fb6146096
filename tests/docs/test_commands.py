"""Every command that the project prints is run as printed: what a user types is what is tested.

`printed_commands.py` finds the commands. Each runs in a folder that holds what the command names (DIR is a folder of
that name, RUN_DIR a run directory, ORG/NAME a repository of a Hub on loopback), so that not a word of it is replaced.
Only a tail is appended that makes it small.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import cv2
import detectors
import foreign
import hub_server
import native
import printed_commands
import pytest
import torch
from printed_commands import REPOSITORY, Printed
from safetensors.torch import save_file

from sapiens_accel.sources import synthetic

pytestmark = [pytest.mark.launch, pytest.mark.slow]

SECONDS = 400
# What cannot run here, and why. Each must still be printed somewhere.
NOT_RUN = {
    "pytest": "is this",
    "bash .ci/run": "runs this, in an environment of its own",
    "mkdocs serve": "does not end; .ci/run builds the same site",
    "tensorboard --logdir {}/tensorboard": "does not end",
    "tensorboard --logdir runs/demo/tensorboard": "does not end",
    "accelerate launch --config_file accelerate_configs/multi_node.yaml --machine_rank 0 --main_process_ip HOST "
    "--main_process_port 29500 train.py --recipe sapiens_1b_coco --data.root DIR": "16 processes on two machines",
    "accelerate launch --config_file accelerate_configs/zero2.yaml -m sapiens_accel.selftest.training_step TASK "
    "RESULT": ("is started by selftest and the benchmarks, with a task that they write: tests/test_benchmarks.py"),
    "accelerate launch --config_file accelerate_configs/zero2.yaml benchmarks/throughput.py --models sapiens_0.3b": (
        "measures for minutes: tests/test_benchmarks.py runs it small"
    ),
    # With parts that are known only when they are printed.
    "accelerate launch --config_file accelerate_configs/{}.yaml --num_processes {} train.py": (
        "test_what_the_memory_plan_prints"
    ),
    "sapiens-accel train --launch {} --num_processes {}": "test_what_the_memory_plan_prints",
    "accelerate launch {}": "what selftest runs: tests/selftest",
    "accelerate launch --config_file {}": "a launch that the user gave to the doctor",
    "python -m sapiens_accel.hub {}": "tests/publish/test_hub.py runs it",
    "sapiens-accel convert {} {} OUT": "tests/formats runs what is suggested for each file of another tool",
    "python docs/list_recipes.py": "plans every recipe, for minutes: tests/docs/test_recipes_page.py",
    "pip install {}": "the name of a backend: test_what_pip_installs knows both",
}
# They measure for minutes, or with a task that another process writes: tests/test_benchmarks.py and tests/selftest. The
# page of `sapiens-accel app` does not end: tests/app.
NOT_RUN_PREFIX = ("python benchmarks/", "python -m sapiens_accel.selftest.", "sapiens-accel app ")
NOT_RUN_FILES = ("docs/laboratory_animal.md",)  # tests/docs/test_laboratory_animal.py runs it from top to bottom
NAMES = ("accelerate launch", "python eval.py")  # of a program, in a sentence

COUNTS = {"num_train": 12, "num_unlabelled": 8, "num_val": 6}
SMALL = "--data.input_hw [64,48] --data.sigma 1 --data.num_workers 0"
DRAWN = " ".join(f"--data.synthetic.{name} {number}" for name, number in COUNTS.items())
BATCH = " ".join(f"--{stage}.global_batch 4" for stage in ("phase1", "phase2", "ssl"))
TRAIN = f"--max_steps 2 {BATCH} {SMALL} {DRAWN} --eval.num_pictures 2 --eval.num_worst 2"


def _parts() -> list[Printed]:
    """A case for each command: those that && joins are several."""
    whole = printed_commands.collect()
    return [Printed(one.file, one.line, part.strip()) for one in whole for part in one.text.split("&&")]


PARTS = _parts()
PIP = [one for one in PARTS if one.text.startswith("pip install")]
RUN = [
    one
    for one in PARTS
    if one not in PIP
    and one.file not in NOT_RUN_FILES
    and one.text not in {*NOT_RUN, *NAMES}
    and not one.text.startswith(NOT_RUN_PREFIX)
]


def tail(command: str) -> str:
    """What makes a command small. It never changes what is printed: it comes after it."""
    family = "sapiens2_tiny" if "sapiens2" in command else "sapiens_tiny"
    words = command.split()
    if "sapiens_accel.selftest" in words:
        return "--only fp16"
    if words[0] == "sapiens-accel" and len(words) == 2:
        return "--help"
    if command.startswith("python -m") and len(words) <= 3 + (words[2] in ("sapiens_accel.data", "sapiens_accel.hub")):
        return "--help"
    trains = {"train.py", "sapiens_accel.train"} & set(words) or words[:2] == ["sapiens-accel", "train"]
    if trains and "--help" not in words:
        return f"--model.name {family} {TRAIN}"
    if {"sapiens_accel.doctor", "doctor"} & set(words):
        return f"--model.name {family} {SMALL}"
    if "sapiens_accel.hub" in words and "--hub_model_id" not in words:
        return "--hub_model_id ORG/NAME"
    if {"sapiens_accel.boxes", "detect"} & set(words):
        return "--num_workers 0"
    if "eval.py" in words:
        return "--data.num_workers 0" if {"RUN_DIR", "DIR"} & set(words) else f"--data.num_workers 0 {DRAWN}"
    return ""


# ---- What the commands name


@pytest.fixture(scope="session")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of everything that a command may name, by that name. Made once; read only."""
    folder = tmp_path_factory.mktemp("commands")
    coco = synthetic.write(folder / "DIR", **COUNTS)
    (folder / "COCO").symlink_to(coco)
    validation = coco / "annotations" / "person_keypoints_val2017.json"
    (folder / "hands").mkdir()
    for split in ("train", "val"):
        (folder / "hands" / split).symlink_to(coco / f"{split}2017")
        shutil.copy(coco / "annotations" / f"person_keypoints_{split}2017.json", folder / "hands" / f"{split}.json")
    for name in ("FOLDER", "PICTURES", "PICTURE", "IMAGES", "IMAGE"):
        (folder / name).symlink_to(coco / "val2017")
    images = sorted((coco / "val2017").iterdir())
    shutil.copy(images[0], folder / "IMAGE.jpg")
    for name in ("boxes.json", "all.json"):
        shutil.copy(validation, folder / name)
    people = json.loads(validation.read_text())["annotations"]
    boxes = [{key: one[key] for key in ("image_id", "category_id", "bbox")} | {"score": 0.9} for one in people]
    (folder / "DETECTIONS.json").write_text(json.dumps(boxes))
    film = cv2.VideoWriter(str(folder / "clip.mp4"), cv2.VideoWriter.fourcc(*"mp4v"), 10, (240, 240))
    for _ in range(12):
        film.write(cv2.imread(str(images[0])))
    film.release()
    (folder / "DATA" / "annotations").mkdir(parents=True)
    _other_tools(folder)
    _published(folder)
    return folder


def _other_tools(folder: Path) -> None:
    """Labels of other tools, by the names in docs/own_data.md."""
    foreign.deeplabcut(folder / "PROJECT")
    rows = foreign.collected_data(foreign.shots(1), 1, 1)
    (folder / "CollectedData.csv").write_text("\n".join(",".join(map(str, row)) for row in rows))
    (folder / "labeled-data").symlink_to("PROJECT/labeled-data")
    foreign.sleap(folder / "FRAMES").rename(folder / "labels.slp")
    exported = foreign.label_studio(folder / "EXPORT")
    shown = sorted((folder / "PICTURES").iterdir())
    tasks = json.loads(exported.read_text())[: len(shown)]
    for task, image in zip(tasks, shown, strict=False):
        task["data"]["image"] = f"/data/upload/1/{image.name}"
    (folder / "export.json").write_text(json.dumps(tasks))
    foreign.cvat_images(folder / "TASK")
    foreign.yolo(folder / "YOLO")
    foreign.labelme(folder / "LABELME")
    foreign.mpii(folder / "MPII")
    (folder / "CROWDPOSE").mkdir()
    tree = json.loads(foreign.crowdpose(folder / "CROWDPOSE").read_text())
    for split, images in (("train", tree["images"][::2]), ("val", tree["images"][1::2])):
        ids = {image["id"] for image in images}
        people = [one for one in tree["annotations"] if one["image_id"] in ids]
        part = tree | {"images": images, "annotations": people}
        (folder / "CROWDPOSE" / f"crowdpose_{split}.json").write_text(json.dumps(part))


def _published(folder: Path) -> None:
    """Files of weights as they are published, of the tiny networks, by the names in the headers of the recipes."""
    first = native.v1_backbone(128, 4, 12) | native.v1_head(128, (64, 32), (32, 32), 17)
    second = native.v2_backbone(128, 4, 4) | native.v2_head(128, (64, 64), (64, 64, 32), 17)
    for name in {word for one in RUN for word in one.text.split() if re.fullmatch(r"[\w.]+\.(pth|safetensors)", word)}:
        if name.startswith("sapiens2"):
            save_file(native.random(second, 1), folder / name, metadata={"format": "pt"})
        else:
            torch.save(native.random(first, 1), folder / name)


@pytest.fixture(scope="session")
def trained(assets: Path, environment: dict[str, str]) -> Path:
    """The run directory of `sapiens_1b_coco`, small, with a checkpoint of each step but the last."""
    words = "--recipe sapiens_1b_coco --data.root DIR --stage all --save_every 1 --output_dir RUN_DIR"
    command = f"{sys.executable} {REPOSITORY / 'train.py'} {words} {tail('train.py')}"
    done = subprocess.run(command, shell=True, cwd=assets, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    shutil.copytree(assets / "RUN_DIR" / "ssl" / "weights", assets / "WEIGHTS")
    (assets / "RUN_DIR" / "STAGE").symlink_to("phase2")
    return assets / "RUN_DIR"


@pytest.fixture(scope="session")
def server() -> Iterator[hub_server.Server]:
    with hub_server.serve() as server:
        server.tokens = {hub_server.TOKEN: {"name": "ORG", "role": "write"}}
        yield server


@pytest.fixture(scope="session")
def environment(assets: Path, server: hub_server.Server, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What a command runs with: its own cache, no accelerate config of the user, the Hub on loopback."""
    scratch = tmp_path_factory.mktemp("home")
    for name in {word for one in RUN for word in one.text.split() if word.startswith("facebook/sapiens-pretrain-")}:
        server.add(name, {"sapiens_clean.pth": (assets / "sapiens_1b_epoch_173_clean.pth").read_bytes()})
    detector = detectors.tiny(scratch / "detector")
    server.add("PekingU/rtdetr_v2_r50vd", {path.name: path.read_bytes() for path in detector.iterdir()})
    own = {"SAPIENS_ACCEL_CACHE": str(scratch / "cache"), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    beside = os.pathsep.join([str(Path(sys.executable).parent), str(_scripts(scratch / "bin")), os.environ["PATH"]])
    return {**os.environ, **server.environment(scratch / "hf"), **own, "PATH": beside}


def _scripts(folder: Path) -> Path:
    """The console scripts of pyproject.toml as pip writes them, for where the package is not installed."""
    folder.mkdir()
    scripts = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["scripts"]
    for name, entry in scripts.items():
        module, function = entry.split(":")
        lines = f"#!{sys.executable}\nimport sys\nfrom {module} import {function}\nsys.exit({function}())\n"
        (folder / name).write_text(lines)
        (folder / name).chmod(0o755)
    return folder


@pytest.fixture
def workspace(assets: Path, trained: Path, tmp_path: Path) -> Path:
    """The current folder of a command: a clone of the repository, and what the commands name."""
    for path in (
        *(REPOSITORY / name for name in ("train.py", "eval.py", "accelerate_configs", "ds_configs")),
        *assets.iterdir(),
    ):
        if path != trained:
            (tmp_path / path.name).symlink_to(path)
    shutil.copytree(trained, tmp_path / "RUN_DIR", symlinks=True)
    (tmp_path / "docs").mkdir()  # a copy: the script writes its image beside itself
    shutil.copy(REPOSITORY / "docs" / "draw_predictions.py", tmp_path / "docs")
    return tmp_path


def _prepare(workspace: Path, command: str, environment: dict[str, str]) -> None:
    """What earlier commands on the same page would have left behind."""
    recipe = re.search(r"--recipe (\S+)", command)
    if "--stage ssl" in command or "--resume_from_checkpoint" in command or "runs/demo" in command:
        run = workspace / "runs" / (recipe[1] if recipe else "demo")
        shutil.copytree(workspace / "RUN_DIR", run, symlinks=True)
        if "--resume_from_checkpoint" in command:  # as if it was cut after the first step of phase1
            for stage in ("phase2", "ssl"):
                shutil.rmtree(run / stage)
            (run / "phase1" / "eval.json").unlink()
            shutil.rmtree(run / "phase1" / "weights")
    if "--data.root ROOT" in command:  # the four data sets of the published weights, of drawn people
        for name in ("coco", "mpii", "crowdpose"):
            (workspace / "ROOT").mkdir(exist_ok=True)
            (workspace / "ROOT" / name).symlink_to(workspace / "DIR")
        (workspace / "ROOT" / "aic" / "annotations").mkdir(parents=True)
        (workspace / "ROOT" / "aic" / "images").symlink_to(workspace / "DIR" / "train2017")
        people = workspace / "DIR" / "annotations" / "person_keypoints_train2017.json"
        (workspace / "ROOT" / "aic" / "annotations" / "aic_train.json").symlink_to(people)
    if "--data.root OUT" in command:
        _bash("python -m sapiens_accel.data convert coco COCO OUT --to parquet", workspace, environment)


def _bash(command: str, folder: Path, environment: dict[str, str], seconds: float = SECONDS) -> str:
    done = subprocess.run(
        ["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True, timeout=seconds
    )
    said = f"$ {command}\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
    assert done.returncode == 0, said
    assert "Traceback" not in done.stderr, said
    return done.stdout


# ---- The commands


PLACES: dict[str, list[str]] = {}  # of each command, which is run once: two workers would each run it
for one in RUN:
    PLACES.setdefault(one.text, []).append(one.name)


@pytest.mark.parametrize("command", PLACES, ids=lambda command: PLACES[command][0])
def test_a_printed_command_runs(command: str, workspace: Path, environment: dict[str, str]) -> None:
    _prepare(workspace, command, environment)
    try:
        _bash(f"{command} {tail(command)}", workspace, environment)
    except AssertionError as error:
        raise AssertionError(f"printed in {', '.join(PLACES[command])}: {error}") from None


WAYS = [
    "plain",
    "8bit",
    "8bit+activations",
    "8bit+bf16",
    "zero2",
    "zero2_offload",
    "zero2_offload+activations",
    "zero3",
]
WAYS += ["zero3_offload", "zero3_offload+activations"]


@pytest.fixture(scope="session")
def planned(assets: Path, environment: dict[str, str]) -> dict[int, dict[str, str]]:
    """The command of every way to launch that the memory plan knows, by number of GPUs."""
    plan = "python -m sapiens_accel.memory --recipe sapiens_0.3b_coco --stage phase2 --data.root DIR --json"
    said = {gpus: json.loads(_bash(f"{plan} --gpus {gpus}", assets, environment)) for gpus in (1, 2)}
    return {gpus: {way["strategy"]: way["command"] for way in tree["strategies"]} for gpus, tree in said.items()}


def test_the_memory_plan_knows_no_other_way(planned: dict[int, dict[str, str]]) -> None:
    assert {gpus: set(commands) for gpus, commands in planned.items()} == {1: set(WAYS), 2: {*WAYS, "zero1"}}


@pytest.mark.parametrize(
    ("gpus", "way"), [*((1, way) for way in WAYS), *((2, way) for way in ("plain", "zero1", "zero3"))]
)
def test_what_the_memory_plan_prints(
    planned: dict[int, dict[str, str]], workspace: Path, environment: dict[str, str], gpus: int, way: str
) -> None:
    if "8bit" in way:
        pytest.importorskip("torchao", reason="an extra: pip install sapiens_accel[8bit]")
    _bash(f"{planned[gpus][way]} {tail('train.py')}", workspace, environment)


@pytest.mark.parametrize("printed", PIP, ids=lambda printed: printed.name)
def test_what_pip_installs(printed: Printed) -> None:
    """Each name is this package, with extras that it has, or one of its requirements (so CI installs it)."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    required = [*project["dependencies"], *(word for words in extras.values() for word in words)]
    known = {re.match(r"[\w-]+", word)[0] for word in required}  # type: ignore[index]
    words = [word.strip("\"'") for word in printed.text.split()[2:] if word != "-e"]
    assert words
    for word in words:
        name, extra = re.fullmatch(r"(\.|sapiens_accel|[\w-]+|\{\})(?:\[([\w,-]+)\])?", word).groups()  # type: ignore[union-attr]
        assert name in (".", "sapiens_accel", "{}") or name in known, f"{printed.name}: {word}"
        assert not extra or set(extra.split(",")) <= set(extras), f"{printed.name}: {word}"


def test_what_is_not_run_is_still_printed() -> None:
    texts = {one.text for one in PARTS}
    assert set(NOT_RUN) - texts == set(), "no longer printed: take it off the list"
    assert any(text.startswith(NOT_RUN_PREFIX) for text in texts)


def test_every_kind_of_place_is_read() -> None:
    """So that a collector that finds nothing does not pass."""
    files = {one.file for one in PARTS}
    recipes = {path.relative_to(REPOSITORY).as_posix() for path in REPOSITORY.glob("sapiens_accel/recipes/*.yaml")}
    assert {"README.md", "CONTRIBUTING.md", "docs/quick_start.md", "sapiens_accel/train.py", *recipes} <= files
    assert any("--config_file accelerate_configs/zero2.yaml" in one.text for one in RUN)


def test_commands_in_documents_stand_in_bash_blocks() -> None:
    """A block of another kind would be printed and not run."""
    for path in [REPOSITORY / "README.md", *(REPOSITORY / "docs").glob("*.md")]:
        for kind, body in re.findall(r"^```(\w*)\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL):
            if kind != "bash":
                assert not re.search(rf"^\s*(\$ )?{printed_commands.PROGRAM}", body, re.MULTILINE), f"{path}: {body}"
            else:
                assert " [" not in body, f"{path}: an optional part in a command; write a table or a text block"
