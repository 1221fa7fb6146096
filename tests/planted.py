"""A pickle that runs code when it is loaded, and how whoever plants it makes the checkpoint look whole."""

import json
import os
from pathlib import Path

from sapiens_accel.training import checkpoint


class Planted:
    """Pickled, it is a call; loaded, it leaves a folder."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.trace),)


def redescribe(folder: Path) -> None:
    """Give the files of a checkpoint the sizes and checksums that they have now."""
    tree = json.loads((folder / "position.json").read_text())
    tree.pop("checksum")
    tree["files"] = {name: checkpoint._fingerprint(folder / name) for name in tree["files"]}
    (folder / "position.json").write_text(json.dumps(tree))
