"""Identities and smoothing on drawn films of three people who cross, and the memory of a long video.

    python benchmarks/video.py [--films 10] [--frames 500] [--long 10000]

True keypoints get noise, and people are missed (benchmarks/film.py); the tracker itself gets what would be predicted.
An identity switch is a person whose number changes between two frames. The long video is predicted by eval.py with a
tiny untrained network; its resident memory is compared after a fifth of the frames and at its peak.
"""

import argparse
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import film
import psutil
import record
import torch

from sapiens_accel.config.schema import EvalConfig
from sapiens_accel.errors import UserError, run_main
from sapiens_accel.inference import tracking
from sapiens_accel.models import export
from sapiens_accel.models.sapiens import SapiensPose
from sapiens_accel.pose.skeleton import COCO17

BARS = {"switches_per_crossing": 0.15, "error_ratio": 0.95, "jitter_ratio": 0.7, "growth_mib": 60.0}


def main(words: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--films", type=int, default=10, help="films (10)")
    parser.add_argument("--frames", type=int, default=500, help="frames of each (500)")
    parser.add_argument("--long", type=int, default=10_000, help="frames of the long video; 0 leaves it out (10000)")
    parser.add_argument("--out", help="the JSON to write (results/video_cpu_DATE.json)")
    asked = parser.parse_args(words)
    films = [list(film.detected(seed, asked.frames)) for seed in range(asked.films)]
    found: dict[str, Any] = {
        "films": asked.films,
        "frames": asked.frames,
        "crossings": sum(map(film.num_crossings, films)),
    }
    found["plain"] = film.add_up(films, EvalConfig())
    found["smooth"] = film.add_up(films, EvalConfig(smooth=True))
    least, tracking.MIN_OKS = tracking.MIN_OKS, 2.0
    found["iou_alone"] = film.add_up(films, EvalConfig())
    tracking.MIN_OKS = least
    if asked.long:
        found["memory"] = measure_memory(asked.long)
    print(describe(found))
    missed = missed_bars(found)
    out = record.place("video", "cpu", record.cpu_name(), asked.out)
    ways = [{"way": way, **found.pop(way)} for way in ("plain", "smooth", "iou_alone")]
    record.write(out, record.heading("video", "cpu", record.cpu_name(), **found), cases=ways)
    if missed:
        raise UserError(f"benchmarks/video.py: below its bars: {', '.join(missed)}")


def missed_bars(found: dict[str, Any]) -> list[str]:
    """What is worse than its bar."""
    values = {
        "switches_per_crossing": found["plain"]["switches"] / max(found["crossings"], 1),
        "error_ratio": found["smooth"]["error_px"] / found["plain"]["error_px"],
        "jitter_ratio": found["smooth"]["jitter_px"] / found["plain"]["jitter_px"],
        "growth_mib": found["memory"]["growth_mib"] if "memory" in found else 0.0,
    }
    return [f"{name} {value:.3g} (bar {BARS[name]:g})" for name, value in values.items() if value > BARS[name]]


# ---- The memory of a long video


def measure_memory(num_frames: int) -> dict[str, Any]:
    """`eval.py --images` on a film of so many small frames, each a person, drawn; its resident memory over time."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        film.write(folder / "long.mp4", 0, num_frames, (96, 128))
        torch.manual_seed(0)
        model = SapiensPose("sapiens_tiny", 17, (64, 48))
        export.export(folder / "weights", model.state_dict(), model, COCO17, 2.0)
        program = Path(__file__).resolve().parents[1] / "eval.py"
        words = [program, folder / "weights", "--images", folder / "long.mp4", "--data.num_workers=0", "--flip=false"]
        began = time.monotonic()
        command = [sys.executable, *map(str, words), "--csv", "long", f"--output_dir={folder / 'out'}"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        samples: list[tuple[int, float]] = []
        watcher = threading.Thread(target=watch, args=(process, folder / "out", samples), daemon=True)
        watcher.start()
        if process.wait():
            raise UserError(f"benchmarks/video.py: {' '.join(command)} ended by {process.returncode}")
        watcher.join()
        lines = sum(1 for _ in (folder / "out").rglob("keypoints.csv").__next__().open()) - 1
    early = max(mib for size, mib in samples if size <= samples[-1][0] / 5)
    return {
        "frames": num_frames,
        "frames_in_csv": lines // COCO17.num_keypoints,
        "early_mib": round(early),
        "peak_mib": round(max(mib for _, mib in samples)),
        "growth_mib": round(max(mib for _, mib in samples) - early, 1),
        "frames_per_second": round(num_frames / (time.monotonic() - began), 1),
    }


def watch(process: "subprocess.Popen[bytes]", out: Path, samples: list[tuple[int, float]]) -> None:
    """Resident memory (MiB) every 0.2 s, with the bytes of the CSV so far, which say how many frames are done."""
    own = psutil.Process(process.pid)
    while process.poll() is None:
        parts = [path for path in out.rglob("*keypoints.csv*") if path.is_file()]
        size = sum(path.stat().st_size for path in parts)
        if size:
            samples.append((size, own.memory_info().rss / 2**20))
        time.sleep(0.2)


def describe(found: dict[str, Any]) -> str:
    plain, smooth, other = found["plain"], found["smooth"], found["iou_alone"]
    lines = [
        f"{found['films']} films of {found['frames']} frames, {found['crossings']} crossings",
        f"  switches {plain['switches']}, by the IoU of boxes alone {other['switches']}; "
        f"numbers given to {3 * found['films']} people: {plain['numbers']}, alone {other['numbers']}",
        f"  error {plain['error_px']:.2f} px, smoothed {smooth['error_px']:.2f}; "
        f"jitter {plain['jitter_px']:.2f} px, smoothed {smooth['jitter_px']:.2f}",
    ]
    if memory := found.get("memory"):
        lines.append(
            f"  {memory['frames']} frames: {memory['early_mib']} MiB after a fifth of them, at most "
            f"{memory['peak_mib']} MiB; {memory['frames_per_second']} frames/s"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    run_main(main)
