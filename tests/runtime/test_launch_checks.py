"""What a launch is refused for before anything is built, and what DeepSpeed's fp16 scale does at its minimum."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
from gpu.pretended_driver import T4, pretend

from sapiens_accel.errors import UserError
from sapiens_accel.runtime import device, distributed, engine, extensions, launch


@pytest.fixture
def deepspeed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A DeepSpeed JSON that the launcher's environment names."""
    file = tmp_path / "zero.json"
    for name, value in (("LOCAL_RANK", "0"), ("ACCELERATE_USE_DEEPSPEED", "true"), (launch.JSON_VARIABLE, str(file))):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv(launch.FIELDS_VARIABLE, "")
    return file


@pytest.mark.parametrize(
    ("tree", "named"),
    [
        ({"zero_optimization": {"stage": 0}}, "ZeRO stage 0 in bf16"),
        ({"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}}, "zero_optimization.reduce_bucket_size"),
        ({"zero_optimization": {"stage": 3, "stage3_prefetch_bucket_size": "auto"}}, "stage3_prefetch_bucket_size"),
        ({"zero_optimization": {"stage": 2, "cpu_offload": True}}, "cpu_offload is of an older DeepSpeed"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": "cpu"}}, 'offload_optimizer is "cpu"'),
        ({"zero_optimization": {"stage": 2, "zenflow": {"topk_ratio": 0.1}}}, "zero_optimization.zenflow cannot"),
        ({"zero_optimization": {"stage": 2}, "bf16": True}, "bf16 is true"),
        ({"zero_optimization": {"stage": 2}, "torch_autocast": {"enabled": True}}, "torch_autocast is not for this"),
        ({"zero_optimization": {"stage": 2}, "communication_data_type": "bf16"}, "communication_data_type is not"),
    ],
)
def test_a_json_that_could_not_be_trained_or_saved_is_one_line(tree: object, named: str, deepspeed: Path) -> None:
    deepspeed.write_text(json.dumps(tree))
    with pytest.raises(UserError, match=named) as error:
        launch.check()
    assert str(error.value).startswith(f"{deepspeed}: ") and "\n" not in str(error.value)


def test_stage_0_in_fp32_is_fine(deepspeed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    deepspeed.write_text('{"zero_optimization": {"stage": 0, "overlap_comm": "auto", "offload_optimizer": null}}')
    launch.check()


def test_a_precision_that_the_json_enables_must_be_the_devices(deepspeed: Path) -> None:
    """bf16 on a T4 becomes fp16, which accelerate would refuse beside `bf16.enabled: true` with a traceback."""
    deepspeed.write_text('{"bf16": {"enabled": true}, "fp16": {"enabled": false}}')
    launch.check_enabled("bf16")
    with pytest.raises(UserError, match=r"bf16.enabled is true, and this device runs in fp16"):
        launch.check_enabled("fp16")


def test_a_process_without_a_card_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """zero3.yaml as printed has 2 processes; this machine has one card."""
    pretend(monkeypatch, T4)
    assert device.problem_of_device(0) is None
    with pytest.raises(UserError, match=r"process 1 of this machine has no GPU \(found 1\). Launch with --num_proc"):
        device.check_device(1)


def test_only_a_remote_end_is_a_lost_process() -> None:
    assert distributed.LOST.search("Connection closed by peer [127.0.0.1]:1234")
    assert distributed.LOST.search("ncclRemoteError: A call failed possibly due to a network error or a remote process")
    assert not distributed.LOST.search("ncclSystemError: System call (e.g. socket, malloc) or external library failed")
    assert not distributed.LOST.search("CUDA error: peer access is not supported between these two devices")


def test_deepspeeds_scale_stays_at_its_minimum(monkeypatch: pytest.MonkeyPatch) -> None:
    """40 overflows in a row: our own count of skipped steps ends the run at 20, with the people and the last state."""
    loss_scaler = pytest.importorskip("deepspeed.runtime.fp16.loss_scaler")
    monkeypatch.setattr(loss_scaler.dist, "get_rank", lambda: 0)  # it asks before it logs; here is no process group
    scaler = loss_scaler.DynamicLossScaler(2**16, 1000, min_scale=1, delayed_shift=1, consecutive_hysteresis=False)
    engine.keep_least_scale(types.SimpleNamespace(optimizer=types.SimpleNamespace(loss_scaler=scaler)))
    for _ in range(40):
        scaler.update_scale(overflow=True)
    assert scaler.cur_scale == 1
    engine.keep_least_scale(types.SimpleNamespace())  # an optimizer without a scale


def test_extensions_are_where_torch_builds_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpp_extension = pytest.importorskip("torch.utils.cpp_extension")
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    for cache in (None, tmp_path / "cache"):
        if cache:
            monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
        else:
            monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        assert str(extensions.folder().parent) == cpp_extension.get_default_build_root()


@pytest.mark.parametrize(
    ("command", "launches"),
    [
        ("/usr/bin/python3 /usr/local/bin/accelerate launch train.py", True),
        ("/v/bin/python3.11 -u -X dev -m accelerate.commands.launch train.py", True),
        ("/v/bin/python /v/bin/torchrun --nproc_per_node 2 train.py", True),
        ("python /v/lib/site-packages/accelerate/commands/launch.py train.py", True),
        ("python -m torch.distributed.run train.py", True),
        ("bash -c accelerate launch train.py", False),
        ("vim accelerate", False),
        ("python train.py --output_dir accelerate", False),
        ("/opt/accelerate/bin/python train.py", False),
        ("python -m pytest accelerate", False),
        ("tmux new -s torchrun", False),
        ("", False),
    ],
)
def test_a_launcher_is_known_by_its_program_alone(command: str, launches: bool) -> None:
    assert launch.is_launcher(command.split()) == launches


@pytest.mark.parametrize(
    ("command", "before"),
    [
        (
            "/v/bin/python3 BIN/accelerate launch --config_file a.yaml train.py --seed 1",
            "accelerate launch --config_file a.yaml",
        ),
        ("/v/bin/python3 /other/accelerate launch train.py --seed 1", "/other/accelerate launch"),
        ("python -m accelerate.commands.launch train.py --seed 1", "python -m accelerate.commands.launch"),
        ("/v/bin/python3 BIN/torchrun --nproc_per_node 2 train.py --seed 1", "torchrun --nproc_per_node 2"),
        ("BIN/python -u train.py --seed 1", "python -u"),
        ("train.py --seed 1", None),
        ("accelerate launch other.py", None),
    ],
)
def test_the_words_before_the_script_start_it_again(
    command: str, before: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("accelerate", "torchrun", "python"):
        (tmp_path / name).touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["train.py", "--seed", "1"])
    found = launch._before_arguments(command.replace("BIN", str(tmp_path)).split())
    assert found == (before.split() if before else None)


def test_a_launch_by_an_option_is_repeated_with_its_interpreter(tmp_path: Path) -> None:
    """`python train.py --launch ...` tells its processes that command, not one that begins with train.py."""
    (tmp_path / "train.py").write_text(
        "import os, sys\n"
        "from sapiens_accel import cli\n"
        "from sapiens_accel.runtime import launch\n"
        "cli._launch = lambda words: print(os.environ[launch.LAUNCH_VARIABLE]) or 0\n"
        'cli.launch_if_asked("train", sys.argv[1:])\n'
    )
    words = ["train.py", "--launch", "single_gpu", "--num_processes", "1", "--recipe", "demo"]
    environment = {**os.environ, "PYTHONPATH": str(Path(launch.__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    command = launch.OwnLaunch(*json.loads(done.stdout)).command
    assert Path(command[0]).name.startswith("python") and command[1:] == words[:5]


def test_processes_that_accelerate_does_not_start_are_refused(tmp_path: Path) -> None:
    root = Path(launch.__file__).parents[2]
    words = ["--config_file", "accelerate_configs/cpu.yaml", "--num_processes", "2", "train.py", "--dry_run"]
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *words, f"--output_dir={tmp_path}"],
        cwd=root, capture_output=True, text=True, check=False,
    )  # fmt: skip
    said = "accelerate_configs/cpu.yaml: --num_processes 2 has started one process"
    assert done.returncode and said in done.stderr and "demo: 1 process" not in done.stdout
