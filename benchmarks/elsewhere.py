"""A process of another environment's Python that measures when told: a JSON line in, a JSON line out."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from sapiens_accel.errors import UserError


class Elsewhere:
    """The process of one of the *_peer.py.

    Attributes:
        told: its first line.

    Raises:
        UserError: that Python does not start, or ends.
    """

    def __init__(self, python: str, script: str, folder: Path, settings: dict[str, Any]) -> None:
        self.python, self.folder = python, folder
        (folder / "settings.json").write_text(json.dumps(settings))
        # Our packages are not theirs.
        env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
        command = [python, str(Path(__file__).with_name(script)), str(folder)]
        try:
            self.process = subprocess.Popen(
                command, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
        except OSError as error:
            raise UserError(f"--peer_python {python}: expected a Python interpreter ({error.strerror})") from error
        self.told = self._answer()

    def ask(self, *order: Any) -> Any:
        assert self.process.stdin
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self.process.stdout
        if line := self.process.stdout.readline():
            return json.loads(line)
        raise UserError(f"--peer_python {self.python}: ended with {self.process.wait()}; run it by hand to see why")
