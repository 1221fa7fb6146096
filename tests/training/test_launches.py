"""Every launch that is shipped, as a user types it: each accelerate config, each stage, saved, resumed and evaluated.

The launcher's words are never altered; a tail makes the run small. A new YAML or stage is in the table by itself.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest
import yaml
from accelerate.commands import launch as accelerate_launch
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_simple_launcher_cmd_env
from safetensors.torch import load_file

from sapiens_accel.config.schema import STAGES
from sapiens_accel.errors import UserError, count
from sapiens_accel.models.sapiens import SapiensPose
from sapiens_accel.runtime import launch as launch_checks

pytestmark = pytest.mark.launch

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "accelerate_configs").glob("*.yaml"))
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch"]
SMALL = [
    "--model.name=sapiens_tiny", "--data.input_hw=[64,48]", "--data.synthetic.num_train=8",
    "--data.synthetic.num_unlabelled=8", "--data.synthetic.num_val=4", "--data.num_workers=0", "--report_to=none",
    "--eval.num_pictures=0", "--eval.num_worst=0", "--log_every=1",
    *(f"--{stage}.{option}" for stage in STAGES for option in ("steps=8", "global_batch=4")),
]  # fmt: skip
ON_CPU = {"no": "fp32", "bf16": "bf16", "fp16": "bf16 (fp16 was asked for; a CPU has none)"}


def launch(
    words: Sequence[str], cache: Path, folder: Path = ROOT, **environment: str
) -> subprocess.CompletedProcess[str]:
    """A launch from the checkout, or from another folder; where its process group needs a port, one that is free."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = {**os.environ, "SAPIENS_ACCEL_CACHE": str(cache), "MASTER_PORT": port, **environment}
    env.pop("OMP_NUM_THREADS", None)
    return subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, check=False, timeout=600)


def assert_done(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-6000:]
    return done.stdout


def assert_refused(done: subprocess.CompletedProcess[str], *named: str) -> None:
    """One line, once, that names all of this; not a step was taken."""
    lines = [line for line in (done.stdout + done.stderr).splitlines() if ": error: " in line]
    assert done.returncode and len(lines) == 1, done.stdout[-3000:] + done.stderr[-5000:]
    assert [word for word in named if word not in lines[0]] == [], lines[0]
    assert "steps 1 to" not in done.stdout and "Error:" not in done.stdout


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("launches")


def steps_of(folder: Path, stage: str) -> list[int]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if line["stage"] == stage and "loss" in line]


def described(config: Path) -> str:
    """What the first line says of a launch on a machine without a GPU."""
    tree = yaml.safe_load(config.read_text())
    zero = ""
    if tree["distributed_type"] == "DEEPSPEED":
        ds = json.loads((ROOT / tree["deepspeed_config"]["deepspeed_config_file"]).read_text())
        zero = f", ZeRO-{ds['zero_optimization']['stage']}"
    return f"{count(tree['num_processes'], 'process')} on CPU{zero}, {ON_CPU[tree['mixed_precision']]}"


SINGLE_MACHINE = [path for path in CONFIGS if yaml.safe_load(path.read_text())["num_machines"] == 1]


@pytest.mark.parametrize(
    "config",
    [pytest.param(path, marks=() if path.stem == "zero2" else pytest.mark.slow) for path in SINGLE_MACHINE],
    ids=lambda path: path.stem,
)
def test_a_shipped_launch_trains_saves_resumes_and_evaluates(config: Path, cache: Path) -> None:
    folder = cache / config.stem
    printed = [*ACCELERATE, "--config_file", f"accelerate_configs/{config.name}", "train.py"]
    tail = [*SMALL, f"--output_dir={folder}", "--save_every=1"]
    said = assert_done(launch([*printed, "--stage=all", *tail, "--max_steps=2"], cache))
    first = next(line for line in said.splitlines() if " on CPU" in line)
    assert first.endswith(described(config)), first
    names = SapiensPose("sapiens_tiny", 17, (64, 48)).state_dict().keys()
    for stage in STAGES:
        assert steps_of(folder, stage) == [1, 2]
        assert load_file(folder / stage / "weights" / "model.safetensors").keys() == names
        assert 0 <= json.loads((folder / stage / "eval.json").read_text())["AP"] <= 1
    # A launch takes seconds: each config resumes another stage.
    stage = STAGES[CONFIGS.index(config) % len(STAGES)]
    resumed = [*printed, f"--stage={stage}", *tail, "--max_steps=3", "--resume_from_checkpoint=latest"]
    assert f"resumes from {folder / stage}" in assert_done(launch(resumed, cache))
    assert steps_of(folder, stage) == [1, 2, 3]
    evaluated = [*printed[:-1], "eval.py", str(folder), "--eval.num_pictures=0", "--eval.num_worst=0"]
    assert "AP50" in assert_done(launch(evaluated, cache))


# ---- Other ways to start the same


@pytest.mark.slow
def test_torchrun_and_plain_python_from_another_folder_with_a_blank(cache: Path, tmp_path: Path) -> None:
    folder = tmp_path / "my runs"
    folder.mkdir()
    tail = [*SMALL, "--stage=phase1", "--max_steps=1"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    said = assert_done(launch([*torchrun, str(ROOT / "train.py"), *tail, "--output_dir=a b"], cache, folder))
    assert "2 processes on CPU, fp32" in said and (folder / "a b" / "phase1" / "weights").is_dir()
    said = assert_done(launch([sys.executable, str(ROOT / "train.py"), *tail, "--output_dir=c"], cache, folder))
    assert "1 process on CPU, fp32" in said


@pytest.mark.slow
def test_the_deepspeed_json_is_found_from_another_folder(cache: Path, tmp_path: Path) -> None:
    config = ROOT / "accelerate_configs" / "zero2.yaml"
    words = [*ACCELERATE, "--config_file", str(config), str(ROOT / "train.py"), *SMALL, "--stage=phase1"]
    said = assert_done(launch([*words, "--max_steps=1", "--output_dir=run"], cache, tmp_path))
    assert "ZeRO-2" in said
    # Beside its own accelerate config, in a folder with a blank.
    mine = tmp_path / "my configs"
    shutil.copytree(ROOT / "ds_configs", mine / "ds_configs")
    shutil.copy(config, mine / "mine.yaml")
    tree = json.loads((mine / "ds_configs" / "zero2.json").read_text())
    tree["zero_optimization"]["stage"] = 1
    (mine / "ds_configs" / "zero2.json").write_text(json.dumps(tree))
    words[len(ACCELERATE) + 1] = "my configs/mine.yaml"
    assert "ZeRO-1" in assert_done(launch([*words, "--max_steps=1", "--output_dir=run2"], cache, tmp_path))


# ---- What an accelerate config may say beside


def config_of(folder: Path, **changes: object) -> Path:
    """The shipped zero2.yaml, or a config of another type, with changes; `deepspeed_...` in its own part."""
    tree = yaml.safe_load((ROOT / "accelerate_configs" / "zero2.yaml").read_text())
    if changes.get("distributed_type", "DEEPSPEED") != "DEEPSPEED":
        del tree["deepspeed_config"]
    for key, value in changes.items():
        part = tree["deepspeed_config"] if key in BESIDE else tree
        part[key] = value
    path = folder / "launch.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


BESIDE = ("deepspeed_config_file", "zero_stage", "gradient_clipping", "gradient_accumulation_steps")
REFUSED = {
    "no json": ({"deepspeed_config_file": "nowhere.json"}, ["launch.yaml", "nowhere.json", "whole path"]),
    "other stage": ({"zero_stage": 3}, ["launch.yaml", "zero_stage is 3, and 2 in", "zero2.json"]),
    "clipping": ({"gradient_clipping": 1.0}, ["launch.yaml", "gradient_clipping", "--STAGE.optim.clip_norm"]),
    "accumulation": ({"gradient_accumulation_steps": 4}, ["launch.yaml", "accumulation_steps", "--STAGE.global_batch"]),
    "dynamo": (
        {"distributed_type": "NO", "dynamo_config": {"dynamo_backend": "INDUCTOR"}},
        ["launch.yaml", "dynamo_backend", "INDUCTOR", "--memory.compile_blocks"],
    ),
    "fsdp": ({"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 2}}, ["launch.yaml", "FSDP", "zero3.yaml"]),
}


# A launch takes 11 s: one of DeepSpeed's part and one of the rest, which the launcher hands on in different ways. What
# it hands on in the other cases is checked below without a launch.
LAUNCHED = ("clipping", "fsdp")


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [pytest.param(one, marks=() if one in LAUNCHED else pytest.mark.slow) for one in REFUSED]
)
def test_what_a_launch_cannot_be_is_one_line(case: str, cache: Path, tmp_path: Path) -> None:
    changes, named = REFUSED[case]
    config = config_of(tmp_path, **changes)
    words = [*ACCELERATE, "--config_file", str(config), "train.py", *SMALL, f"--output_dir={tmp_path / 'run'}"]
    assert_refused(launch(words, cache), *named)


@pytest.mark.parametrize("case", [one for one in REFUSED if one != "fsdp"])
def test_what_a_launcher_hands_on_is_refused(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the environment that accelerate's own functions make of the config."""
    changes, named = REFUSED[case]
    config = config_of(tmp_path, **changes)
    made: dict[str, str] = {"LOCAL_RANK": "0"}
    for name, prepare in (
        ("deepspeed_launcher", prepare_deepspeed_cmd_env),
        ("simple_launcher", prepare_simple_launcher_cmd_env),
    ):
        monkeypatch.setattr(accelerate_launch, name, lambda asked, prepare=prepare: made.update(prepare(asked)[1]))
    parser = accelerate_launch.launch_command_parser()
    accelerate_launch.launch_command(parser.parse_args(["--config_file", str(config), "train.py"]))
    assert len(made) > 1
    for name, value in made.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(launch_checks, "config_file", lambda: config)
    with pytest.raises(UserError) as error:
        launch_checks.check()
    assert [word for word in named if word not in str(error.value)] == [], error.value


@pytest.mark.slow
def test_a_default_accelerate_config_is_honored_or_refused(cache: Path, tmp_path: Path) -> None:
    """In the user's cache it decides what the command leaves open."""
    home = tmp_path / "home"
    (home / "accelerate").mkdir(parents=True)
    words = [*ACCELERATE, "train.py", *SMALL, "--stage=phase1", "--max_steps=1", f"--output_dir={tmp_path / 'run'}"]
    shutil.copy(config_of(tmp_path, downcast_bf16="no"), home / "accelerate" / "default_config.yaml")
    assert "ZeRO-2, bf16" in assert_done(launch(words, cache, HF_HOME=str(home)))
    changed = config_of(tmp_path, distributed_type="NO", dynamo_config={"dynamo_backend": "INDUCTOR"})
    shutil.copy(changed, home / "accelerate" / "default_config.yaml")
    assert_refused(launch(words, cache, HF_HOME=str(home)), str(home / "accelerate" / "default_config.yaml"), "dynamo")


@pytest.mark.slow
def test_three_processes_cannot_share_a_batch_of_32(cache: Path, tmp_path: Path) -> None:
    printed = [*ACCELERATE, "--config_file", "accelerate_configs/multi_gpu.yaml", "--num_processes=3", "train.py"]
    words = [*SMALL, "--stage=phase1", "--phase1.global_batch=32", f"--output_dir={tmp_path / 'run'}"]
    assert_refused(launch([*printed, *words], cache), "--phase1.global_batch 32", "3 process")


@pytest.mark.slow
def test_offload_without_a_compiler_is_one_line(cache: Path, tmp_path: Path) -> None:
    printed = [*ACCELERATE, "--config_file", "accelerate_configs/zero2_offload.yaml", "train.py", *SMALL]
    gone = {"CXX": "no-such-compiler", "CC": "no-such-compiler", "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions")}
    done = launch([*printed, f"--output_dir={tmp_path / 'run'}"], cache, **gone)
    assert_refused(done, "cpu_adam", "C++ compiler", "accelerate_configs/zero2.yaml")


# ---- Several machines


@pytest.mark.slow
def test_two_launchers_train_save_and_resume_as_two_machines(cache: Path) -> None:
    folder = cache / "machines"
    tail = [*SMALL, "--stage=phase1", f"--output_dir={folder}", "--save_every=1"]
    for steps, more in ((2, []), (3, ["--resume_from_checkpoint=latest"])):
        both = [machine(rank, cache, [*tail, f"--max_steps={steps}", *more]) for rank in (0, 1)]
        said = [process.communicate(timeout=600)[0] for process in both]
        assert [process.returncode for process in both] == [0, 0], "\n".join(text[-3000:] for text in said)
        assert "2 processes on CPU, ZeRO-2, bf16" in said[0]
    assert steps_of(folder, "phase1") == [1, 2, 3]


@pytest.mark.slow
@pytest.mark.parametrize("dies", ["launcher", "machine"])
def test_a_launcher_that_is_killed_ends_the_other(dies: str, cache: Path) -> None:
    """Of its process, which lives on, the launch saves; where that is killed too, it can only say so."""
    folder = cache / f"killed {dies}"
    tail = [*SMALL, "--stage=phase1", f"--output_dir={folder}", "--phase1.steps=100000", "--save_every=100000"]
    both = [machine(rank, cache, tail) for rank in (0, 1)]
    deadline = time.monotonic() + 300
    while not (folder / "metrics.jsonl").is_file() and time.monotonic() < deadline:
        time.sleep(0.5)
    assert (folder / "metrics.jsonl").is_file()
    victims = [psutil.Process(both[1].pid)]
    victims += victims[0].children(recursive=True) if dies == "machine" else []
    for process in victims:
        process.kill()
    said, _ = both[0].communicate(timeout=200)
    both[1].communicate(timeout=200)
    assert both[0].returncode not in (0, None)
    (line,) = [line for line in said.splitlines() if ": error: " in line]
    assert "has ended" in line and "--resume_from_checkpoint latest" in line
    assert any((folder / "phase1").glob("checkpoints/step_*")) == (dies == "launcher")


PORTS: list[str] = []


def machine(rank: int, cache: Path, words: Sequence[str]) -> subprocess.Popen[str]:
    """One of two launchers of multi_node.yaml, with one process each, in a process group of its own."""
    if rank == 0:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            PORTS[:] = [str(free.getsockname()[1])]
    printed = ["--config_file", "accelerate_configs/multi_node.yaml", f"--machine_rank={rank}", "--num_processes=2"]
    where = ["--main_process_ip=127.0.0.1", f"--main_process_port={PORTS[0]}"]
    return subprocess.Popen(
        [*ACCELERATE, *printed, *where, "train.py", *words],
        cwd=ROOT,
        env={**os.environ, "SAPIENS_ACCEL_CACHE": str(cache)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
