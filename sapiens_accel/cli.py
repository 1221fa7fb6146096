"""sapiens-accel COMMAND: training, evaluation and the other commands. Only the modules of the chosen one are imported.

`sapiens-accel train` runs in this process. With `--launch` or `--num_processes` this process becomes accelerate's
launcher, and prints nothing after the one line of a run that ends by an error.
"""

import difflib
import importlib
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

from sapiens_accel.config.commands import PARSERS, split_launch_options
from sapiens_accel.errors import (
    UserError,
    end_on_interrupt,
    pause_garbage_collection,
    program_words,
    resume_garbage_collection,
    run_main,
)


class Command(NamedTuple):
    module: str  # its `main(argv)` parses the arguments
    words: tuple[str, ...]  # arguments to insert before those of the user
    help: str


COMMANDS = {
    "train": Command("sapiens_accel.train", (), "train; with --launch zero2 --num_processes 2 by DeepSpeed on 2 GPUs"),
    "eval": Command("sapiens_accel.eval", (), "evaluate a run or weights, or predict on your own images"),
    "doctor": Command("sapiens_accel.doctor.report", (), "check data, labels and the machine before training"),
    "memory": Command("sapiens_accel.memory.report", (), "predict the GPU memory and the hours of a recipe"),
    "detect": Command("sapiens_accel.inference.detect_people", (), "detect people in images or a video, as boxes"),
    "convert": Command(
        "sapiens_accel.formats.convert", (), "write labels of another tool as a COCO folder, or such a folder as shards"
    ),
    "export": Command("sapiens_accel.models.export", (), "write weights as ONNX, torch.export or TensorRT"),
    "app": Command("sapiens_accel.app.server", (), "open a page in the browser to try weights on images and videos"),
    "push": Command("sapiens_accel.publish.uploader", ("push",), "push a run or weights to the Hugging Face Hub"),
    "selftest": Command("sapiens_accel.selftest.__main__", (), "test that training works on this machine"),
}
LAUNCHED = ("train", "eval")  # with the launcher's options; they answer --help themselves


def main() -> None:
    run_main(run)


def run(argv: Sequence[str]) -> None:
    """Run the command that the first argument names.

    Raises:
        UserError: there is no such command.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: sapiens-accel COMMAND ...  (sapiens-accel COMMAND --help: its options)\n")
        print("\n".join(f"  {name:9} {command.help}" for name, command in COMMANDS.items()))
        return
    name, *words = argv
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise UserError(f"{name}: no such command (expected one of {', '.join(COMMANDS)}).{hint}")
    sys.argv = [f"sapiens-accel {name}", *words]
    start(name, [*COMMANDS[name].words, *words])


def start(name: str, words: Sequence[str]) -> None:
    """Run the main of a command. `--help` is answered before its imports, which take seconds."""
    if name in LAUNCHED:
        parse = importlib.import_module("sapiens_accel.config.parse")
        parse.answer_help(words, f"sapiens-accel {name}")
        launch_if_asked(name, words)
        check_options(name, words)
    elif name in PARSERS and any(word in ("-h", "--help") for word in words):
        PARSERS[name]().parse_args(words)
    pause_garbage_collection()
    try:
        module = importlib.import_module(COMMANDS[name].module)
    finally:
        resume_garbage_collection()
    module.main(words)
    if name in LAUNCHED:
        importlib.import_module("sapiens_accel.runtime.distributed").stop()


# ---- sapiens-accel train --launch zero2 --num_processes 2


def prepare_program(name: str) -> None:
    """`launch_if_asked` and `check_options` for `python train.py` and `eval.py`: before their imports."""

    def prepare(words: Sequence[str]) -> None:
        launch_if_asked(name, words)
        check_options(name, words)

    run_main(prepare)
    end_on_interrupt()  # which `run_main` has undone, and the imports are still to come
    pause_garbage_collection()  # until the program's own `run_main`


def check_options(name: str, words: Sequence[str]) -> None:
    """Check the options of `train` or `eval` before torch is imported, which takes 40 s on a busy machine.

    Raises:
        UserError: an option that does not exist, or a value that it cannot have.
    """
    from sapiens_accel.config import commands, parse

    if name == "train":
        parse.refuse_drawn_people(parse.load(words), words)
    else:
        commands.parse_evaluation(words)


def launch_if_asked(name: str, words: Sequence[str]) -> None:
    """If the launcher's options are among the words: run `train` or `eval` by it, and exit with the code of the run.

    Raises:
        UserError: there is no such launch, or an option of training that cannot be.
    """
    options, rest = split_launch_options(words)
    if not options:
        return
    given = [word for key, value in options.items() for word in (f"--{key}", value)]
    from sapiens_accel.runtime import launch

    one = options.get("num_processes", "1") == "1"
    config = launch.find_launch(options.pop("launch", "single_gpu" if one else "multi_gpu"))
    if not one and launch.is_of_one_process(config):  # accelerate would start one without a word
        raise UserError(
            f"--num_processes {options['num_processes']}: --launch {config.stem} starts one (distributed_type NO). "
            "Take another, such as --launch multi_gpu or zero2, which runs on CPUs too"
        )
    check_options(name, rest)
    launch.announce([*(launch.words_before_script() or []), *program_words(), *given], config)
    logging.disable(logging.CRITICAL)  # of the launcher: its processes have said what happened
    _pass_signals_on()
    flags = ["--config_file", str(config), *(f"--{key}={value}" for key, value in options.items())]
    sys.exit(_launch([*flags, "-m", COMMANDS[name].module, *rest]))


def _pass_signals_on() -> None:
    """Let signals that stop a run reach its processes, which save their step, and wait for them as long as that takes.

    torch's launcher would kill them 30 seconds later, and SIGUSR1 and SIGUSR2 would end the launcher alone.
    """
    import psutil

    from sapiens_accel.runtime.signals import SIGNALS

    def pass_on(number: int, _: object) -> None:
        started = psutil.Process().children()
        for process in started:
            with suppress(psutil.Error):
                process.send_signal(number)
        if not started:
            sys.exit(128 + number)

    os.environ["PET_SIGNALS_TO_HANDLE"] = "SIGQUIT"  # torchrun's --signals-to-handle, from torch 2.10 on: all but those
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, pass_on)


def _launch(words: Sequence[str]) -> int:
    """Run accelerate's launcher; the exit code of the first process that failed, 128 + N for signal N."""
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        launch_command(launch_command_parser().parse_args(list(words)))
    except subprocess.CalledProcessError as error:
        code, rank = error.returncode, 0
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = failure.exitcode
    except SignalException as stopped:
        return 128 + stopped.sigval
    else:
        return 0
    if code < 0:
        name = signal.Signals(-code).name
        reason = "; the machine may have run out of memory" if name == "SIGKILL" else ""
        print(f"{sys.argv[0]}: error: the process of rank {rank} was ended by {name}{reason}", file=sys.stderr)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    main()
