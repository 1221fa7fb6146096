"""sapiens-accel: every command by its name, and nothing imported that it does not need."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import forks
import pytest

from sapiens_accel import cli
from sapiens_accel.config.commands import (
    DETECTOR,
    DETECTOR_MAX_IOU,
    DETECTOR_THRESHOLD,
    EXPORT_DTYPES,
    EXPORT_FORMATS,
    split_launch_options,
)  # fmt: skip
from sapiens_accel.errors import UserError
from sapiens_accel.inference import detector
from sapiens_accel.models import export, export_graph


def test_help_lists_each_command_on_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    cli.run(["--help"])
    lines = capsys.readouterr().out.splitlines()
    for name, command in cli.COMMANDS.items():
        assert [line.split(maxsplit=1) for line in lines].count([name, command.help]) == 1


def test_an_unknown_command_is_one_line() -> None:
    with pytest.raises(
        UserError,
        match=r"^docter: no such command \(expected one of train, eval, doctor, .*\)\. Did you mean doctor\?$",
    ):
        cli.run(["docter"])


def test_options_of_the_launcher_are_told_from_those_of_the_run() -> None:
    words = ["RUN_DIR", "--launch", "zero2", "--seed=1", "--num_processes=2", "--data.root", "--launchpad"]
    options, rest = split_launch_options(words)
    assert options == {"launch": "zero2", "num_processes": "2"}
    assert rest == ["RUN_DIR", "--seed=1", "--data.root", "--launchpad"]
    with pytest.raises(UserError, match="--launch: no value"):
        split_launch_options(["--launch", "--seed"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--launch", "zero4"], r"--launch zero4: no such launch \(expected one of cpu, .*\); did you mean zero3\?"),
        (["--launch", "mine.yaml"], r"--launch mine\.yaml: no such file"),
        (["--launch", "cpu", "--num_processes", "2"], r"--num_processes 2: --launch cpu starts one \(distributed_type"),
        (["--num_processes", "2", "--stage", "phase9"], r"--stage: no such value .*found phase9"),
    ],
)
def test_what_is_wrong_is_said_before_a_launch_starts(words: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        cli.run(["train", *words])


@pytest.mark.slow
def test_nothing_follows_the_line_of_a_launched_run_that_fails(tmp_path: Path) -> None:
    """accelerate's launcher alone: 10 lines for one process, 33 for two (2026-11-29)."""
    words = ["--launch", "zero2", "--num_processes", "2", "--data.root", "/no/such", "--output_dir", str(tmp_path)]
    root = Path(cli.__file__).parents[1]
    for program in (["-m", "sapiens_accel.cli", "train"], ["train.py"]):
        done = subprocess.run([sys.executable, *program, *words], cwd=root, capture_output=True, text=True)
        assert done.returncode == 2
        # Both ranks say it where the machine is so busy that the first does not end in time.
        assert set(done.stderr.splitlines()) == {"train.py: error: --data.root /no/such: no such folder"}
        assert done.stdout.splitlines()[0] == "demo: 2 processes on CPU, ZeRO-2, bf16"


def test_an_error_names_the_command_that_was_called() -> None:
    done = forks.run(["-m", "sapiens_accel.doctor", "--nope"])
    assert done.returncode == 2 and done.stderr == "python -m sapiens_accel.doctor: error: no such option --nope\n"


def test_each_command_is_a_main_that_takes_words() -> None:
    for name, command in cli.COMMANDS.items():
        assert callable(importlib.import_module(command.module).main), name


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_names_the_command_that_was_called(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["sapiens-accel"])
    with pytest.raises(SystemExit):
        cli.run([command, "--help"])
    assert capsys.readouterr().out.startswith(f"usage: sapiens-accel {command} ")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "--recipe", "sapiens_1b_coco"], "--data.root: no data"),
        (["train", "--lr", "1"], "no such option --lr; did you mean --phase2.optim.lr"),
        (["eval"], r"nothing to evaluate .* Example: sapiens-accel eval RUN_DIR"),
    ],
)
def test_wrong_options_are_said_before_torch_is_imported(words: list[str], said: str) -> None:
    script = (
        "import sys; from sapiens_accel import cli; from sapiens_accel.errors import UserError\n"
        f"try: cli.run({words!r})\n"
        "except UserError as error: print(error)\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    message, imported = done.stdout.splitlines()
    assert re.search(said, message) and imported == "False"


def test_ctrl_c_during_the_imports_after_the_options_is_one_line() -> None:
    script = (
        "import os, signal, sys; from sapiens_accel import cli; sys.argv = ['eval.py', 'RUN_DIR']\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it\n"
        "cli.prepare_program('eval'); os.kill(os.getpid(), signal.SIGINT); print('went on')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "eval.py: stopped by Ctrl-C\n")


def test_what_the_help_says_of_defaults_and_choices_is_so() -> None:
    """commands.py does not import what it describes."""
    assert (DETECTOR, DETECTOR_THRESHOLD) == (detector.DEFAULT, detector.THRESHOLD)
    assert detector.MAX_IOU == DETECTOR_MAX_IOU
    assert set(EXPORT_FORMATS) == set(export_graph.SUFFIX) and set(EXPORT_DTYPES) == set(export.DTYPES)


@pytest.mark.parametrize("module", ["doctor", "memory", "boxes", "export", "hub"])
def test_help_imports_no_torch(module: str) -> None:
    script = (
        "import atexit, runpy, sys\n"
        "sys.argv = ['x', '--help']\n"
        "atexit.register(lambda: print(sorted({'torch', 'numpy'} & set(sys.modules))))\n"
        f"runpy.run_module('sapiens_accel.{module}', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: python -m sapiens_accel.")
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("program", ["train.py", "eval.py"])
def test_help_of_the_programs_imports_no_torch(program: str) -> None:
    script = (
        "import atexit, runpy, sys\n"
        f"sys.argv = [{program!r}, '--help', 'all']\n"
        "atexit.register(lambda: print(sorted({'torch', 'numpy'} & set(sys.modules))))\n"
        f"runpy.run_path({program!r}, run_name='__main__')"
    )
    root = Path(cli.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=root)
    assert "--ssl.teacher.threshold" in done.stdout and done.stdout.splitlines()[-1] == "[]"


def test_the_list_of_commands_imports_none_of_them() -> None:
    script = (
        "import sys; from sapiens_accel import cli; cli.run([]); print({'torch', 'numpy', 'yaml'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"


def test_a_first_step_imports_what_it_needs_and_collects_no_garbage_among_it(tmp_path: Path) -> None:
    """In a fresh process, to the end of a dry run; augmentations, ZeRO, adapters and trackers have libraries alone."""
    script = (
        "import atexit, gc, runpy, sys\n"
        "sys.argv[0] = 'train.py'\n"
        "libraries = {'transformers', 'albumentations', 'deepspeed', 'peft', 'torchvision', 'tensorboard', 'onnx',\n"
        "             'matplotlib', 'sklearn', 'torchao', 'bitsandbytes', 'gradio'}\n"
        "runpy.run_path('train.py', run_name='__main__')\n"
        "print(gc.isenabled(), gc.get_freeze_count() > 300_000, sorted(libraries & set(sys.modules)))"
    )
    words = (
        "--dry_run --stage phase1 --phase1.global_batch 2 --data.input_hw [64,48] --data.num_workers 0 "
        f"--output_dir {tmp_path / 'run'} --data.cache_dir {tmp_path / 'cache'} --data.synthetic.num_train 2"
    )
    root = Path(cli.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", script, *words.split()], capture_output=True, text=True, check=True, cwd=root
    )
    assert done.stdout.splitlines()[-1] == "True True ['transformers']"
