"""sapiens-accel COMMAND: the commands beside train.py and eval.py. Only the modules of the chosen one are imported."""

import difflib
import importlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

from sapiens_accel.config.commands import PARSERS
from sapiens_accel.errors import UserError, run_main


class Command(NamedTuple):
    module: str  # its `main(argv)` parses the arguments
    words: tuple[str, ...]  # arguments to insert before those of the user
    help: str


COMMANDS = {
    "doctor": Command("sapiens_accel.doctor.report", (), "check data, labels and the machine before training"),
    "memory": Command("sapiens_accel.memory.report", (), "predict how a recipe fits a GPU, and its hours"),
    "detect": Command("sapiens_accel.inference.detect_people", (), "detect people in images or a video, as boxes"),
    "convert": Command(
        "sapiens_accel.formats.convert", (), "labels of another tool as a COCO folder, or such a folder as shards"
    ),
    "export": Command("sapiens_accel.models.export", (), "write weights for transformers, ONNX or torch.export"),
    "push": Command("sapiens_accel.publish.uploader", ("push",), "push a run or weights to the Hugging Face Hub"),
    "selftest": Command("sapiens_accel.selftest.__main__", (), "test on this machine what training relies on"),
}


def main() -> None:
    run_main(run)


def run(argv: Sequence[str]) -> None:
    """Run the command that the first argument names.

    Raises:
        UserError: there is no such command.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: sapiens-accel COMMAND ...  (COMMAND --help: its options)\n")
        print("\n".join(f"  {name:9} {command.help}" for name, command in COMMANDS.items()))
        return
    name, *words = argv
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise UserError(f"{name}: no such command (expected one of {', '.join(COMMANDS)}).{hint}")
    sys.argv[0] = f"sapiens-accel {name}"
    start(name, [*COMMANDS[name].words, *words])


def start(name: str, words: Sequence[str]) -> None:
    """Run the main of a command. `--help` is answered before its imports, which take seconds."""
    if name in PARSERS and any(word in ("-h", "--help") for word in words):
        PARSERS[name]().parse_args(words)
    importlib.import_module(COMMANDS[name].module).main(words)


if __name__ == "__main__":
    main()
