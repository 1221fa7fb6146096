"""How far the resident set of this process rises while weights are loaded and exported.

    python tests/host_peaks.py FOLDER [pth]      prints the bytes of the file, of the peaks, and what is exported

Linux only: /proc/self/clear_refs resets the peak.
"""

import json
import re
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1]))

from sapiens_accel.models import export, load
from sapiens_accel.models.sapiens import SapiensPose
from sapiens_accel.pose.skeleton import COCO17

DEPTH, HW = 3, (128, 96)  # of the 0.3b: a file of 250 MB


def status(key: str) -> int:
    """A line of /proc/self/status, in bytes."""
    match = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert match
    return 1024 * int(match[1])


class Peak:
    """The rise of the resident set between two moments, at its highest."""

    def __enter__(self) -> "Peak":
        Path("/proc/self/clear_refs").write_text("5")
        self.before = status("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        self.bytes = status("VmHWM") - self.before


def main(folder: Path, kind: str) -> dict[str, float | bool]:
    model = SapiensPose("sapiens_0.3b", 17, HW, depth=DEPTH)
    with Peak() as exporting:
        export.export(folder / "weights", model.state_dict(), model, COCO17, 2.0)
    file = folder / "weights" / "model.safetensors"
    if kind == "pth":
        torch.save(load_file(file), folder / "weights.pth")
        file = folder / "weights.pth"
    del model
    with Peak() as building:
        again = SapiensPose("sapiens_0.3b", 17, HW, depth=DEPTH, empty=True)
    with Peak() as loading:
        load.load(again, str(file), COCO17.names)
    return {
        "file": file.stat().st_size,
        "exporting": exporting.bytes,
        "building": building.bytes,
        "loading": loading.bytes,
        "filled": not any(p.is_meta for p in again.parameters()),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(main(Path(sys.argv[1]), (sys.argv[2:] or ["safetensors"])[0])))
