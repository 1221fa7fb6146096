"""A benchmark's JSON: what was run, with what and where, one case a line."""

import datetime
import json
import os
import platform
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import psutil

from sapiens_accel.errors import UserError
from sapiens_accel.selftest.checks import PACKAGES, cpu_name, versions

__all__ = ["cpu_name", "heading", "place", "versions", "write"]

RESULTS = Path(__file__).parent / "results"
IDLE = 10.0  # percent of all cores: what an idle machine may use


def heading(benchmark: str, kind: str, device: str, **settings: Any) -> dict[str, Any]:
    """What stands above the cases.

    Args:
        kind: "cpu" or "cuda".
        device: its name.
    """
    load = psutil.cpu_percent(interval=1.0)
    return {
        "benchmark": benchmark,
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "versions": {"python": platform.python_version(), **versions(*PACKAGES)},
        "device": {"kind": kind, "name": device},
        "cpus": os.cpu_count(),
        "threads": int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)),
        "cpu_percent_before": load,
        "idle": load < IDLE,
        **settings,
    }


def place(benchmark: str, kind: str, device: str, asked: str | None) -> Path:
    """The file to write: what was asked for, or one named after the device and the day, in results/.

    Raises:
        UserError: its folder is not there.
    """
    name = "cpu" if kind == "cpu" else re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    path = Path(asked) if asked else RESULTS / f"{benchmark}_{name}_{datetime.date.today().isoformat()}.json"
    if asked and not path.parent.is_dir():
        raise UserError(f"--out {asked}: no such folder")
    path.parent.mkdir(exist_ok=True)
    return path


def write(path: Path, heading: dict[str, Any], **tables: list[dict[str, Any]]) -> None:
    """The heading's keys and the tables', one line for each value or case."""
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in heading.items()]
    for name, rows in tables.items():
        body = ",\n".join(f"  {json.dumps(row)}" for row in rows)
        lines.append(f'"{name}": [\n{body}\n ]')
    path.write_text("{\n " + ",\n ".join(lines) + "\n}\n")
