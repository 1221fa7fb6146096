"""What unlabeled people are worth: train.py's own stages on drawn people, few of them labeled, arm by arm.

    python benchmarks/ssl.py --labels 30 100 --seeds 0 1 2 --arms supervised mse literal recommended

For each number of labels and seed, phase2 from random weights; from there every arm with the same steps, learning rate,
labeled people, augmentation and average of weights. `supervised` sees no unlabeled people; it is what the others are
held against. Drawn people and a tiny network: this ranks losses and finds mistakes, and predicts no accuracy on COCO.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import chart
import record
import yaml
from tqdm import tqdm

from sapiens_accel.config import parse as config
from sapiens_accel.data import build
from sapiens_accel.errors import UserError

ROOT = Path(__file__).parents[1]
RECIPE = Path(__file__).with_name("ssl.yaml")
BASELINE = "supervised"
ARMS: dict[str, tuple[str, ...]] = {
    BASELINE: ("--ssl.teacher.ratio=0",),
    "mse": ("--ssl.teacher.loss=mse", "--ssl.teacher.target=heatmap"),
    "literal": ("--ssl.teacher.loss=literal",),
    "recommended": (),
    "no_cutout": ("--ssl.teacher.cutout=0",),
    "no_mask": ("--ssl.teacher.threshold=0",),
    "no_ema": ("--ssl.teacher.ema_decay=0",),
}
Row = dict[str, Any]


def main(words: Sequence[str]) -> None:
    asked = parse(words)
    everyone = yaml.safe_load(RECIPE.read_text())["data"]["synthetic"]["num_train"]
    labels = [everyone if text == "all" else int(text) for text in asked.labels]
    if max(labels) > everyone or min(labels) < 1:
        raise UserError(f"--labels {' '.join(asked.labels)}: expected 1 to {everyone}, or all")
    path = record.place("ssl", "cpu", "", asked.json)
    settings = {"recipe": yaml.safe_load(RECIPE.read_text()), "options": asked.options}
    heading = record.heading("ssl", "cpu", record.cpu_name(), jobs=asked.jobs, **settings, all_labels=everyone)
    rows = done_before(path, settings)
    wanted = [(num, seed, arm) for num in labels for seed in asked.seeds for arm in asked.arms]
    missing = [case for case in wanted if case not in {(row["labels"], row["seed"], row["arm"]) for row in rows}]
    print(f"{len(missing)} runs on drawn people, {asked.jobs} at a time, one thread each", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        work, starts = Path(folder), sorted({case[:2] for case in missing})
        draw(asked.options)
        with ThreadPoolExecutor(asked.jobs) as pool:
            list(pool.map(lambda start: begin(work, *start, asked.options), starts))
            runs = pool.map(lambda case: go_on(work, *case, asked.options), missing)
            for row in tqdm(runs, total=len(missing), unit="run", disable=None):
                rows.append(row)
                record.write(path, heading, rows=sorted(rows, key=order), summary=summary(rows))
    record.write(path, heading, rows=sorted(rows, key=order), summary=summary(rows))
    picture = chart.save(summary(rows), rows, path.with_suffix(".png"))
    print(f"{table(summary(rows))}\n{path}\n{picture}")


def parse(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--labels", nargs="+", default=["30", "100"], help="labeled people, or all (30 100)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="(0 1 2)")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="(all of them)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time (one for each core)")
    parser.add_argument("--json", help="file to write; runs that it holds already are kept (results/ssl_cpu_DATE.json)")
    asked, asked.options = parser.parse_known_args(words)  # what is left is for train.py
    return asked


def done_before(path: Path, settings: dict[str, Any]) -> list[Row]:
    """The rows of the file, if it was made with the same settings."""
    if not path.is_file():
        return []
    found = json.loads(path.read_text())
    return found["rows"] if all(found.get(name) == value for name, value in settings.items()) else []


def draw(options: Sequence[str]) -> None:
    """The people, once for all runs, and a look at the options before hours are spent on them."""
    from sapiens_accel.pose.skeleton import COCO17

    run = config.load([f"--recipe={RECIPE}", *options])
    build.open_people(run.data, COCO17, unlabeled=True)


def begin(work: Path, labels: int, seed: int, options: Sequence[str]) -> None:
    """The supervised stage that all arms start from."""
    train(work / f"{labels}_{seed}" / "start", "phase2", labels, seed, options)


def go_on(work: Path, labels: int, seed: int, arm: str, options: Sequence[str]) -> Row:
    """One arm's row: what its stage ssl has come to, and what was seen on the way."""
    folder = work / f"{labels}_{seed}"
    since = time.perf_counter()
    start = folder / "start" / "phase2"
    # An arm that inflates is to be seen doing it.
    more = [f"--weights={start / 'weights'}", "--ssl.teacher.on_alarm=warn", *ARMS[arm]]
    train(folder / arm, "ssl", labels, seed, [*more, *options])
    found = json.loads((folder / arm / "ssl" / "eval.json").read_text())
    logs = [json.loads(line) for line in (folder / arm / "metrics.jsonl").read_text().splitlines()]
    seen = {name: [line[name] for line in logs if line.get(name) is not None] for name in ("keep", "teacher_peak_p99")}
    return {
        "arm": arm,
        "labels": labels,
        "seed": seed,
        "ap": round(100 * found["AP"], 2),
        "ar": round(100 * found["AR"], 2),
        "start_ap": round(100 * json.loads((start / "eval.json").read_text())["AP"], 2),
        "student_ap": round(100 * found["student_AP"], 2) if "student_AP" in found else None,
        "keep": round(mean(seen["keep"]), 3) if seen["keep"] else None,
        "peak_p99": round(max(seen["teacher_peak_p99"]), 3) if seen["teacher_peak_p99"] else None,
        "seconds": round(time.perf_counter() - since),
    }


def train(folder: Path, stage: str, labels: int, seed: int, more: Sequence[str]) -> None:
    """One run of train.py.

    Raises:
        UserError: it failed; with the end of what it said.
    """
    people = [f"--data.labels={labels}", "--data.labels_by=random", f"--data.labels_seed={seed}"]
    run = [f"--recipe={RECIPE}", f"--stage={stage}", f"--seed={seed}", f"--output_dir={folder}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_MIXED_PRECISION": "no", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "train.py", *run, *people, *more],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise UserError(f"{folder.name}, {labels} labels, seed {seed}: {(done.stderr or done.stdout).strip()[-2000:]}")


def order(row: Row) -> tuple[int, int, int]:
    return row["labels"], list(ARMS).index(row["arm"]), row["seed"]


def summary(rows: Sequence[Row]) -> list[Row]:
    """For each number of labels and arm: mean and spread of AP, and what it gains over the supervised arm, by seed."""
    cells: dict[tuple[int, str], dict[int, float]] = {}
    for row in sorted(rows, key=order):
        cells.setdefault((row["labels"], row["arm"]), {})[row["seed"]] = row["ap"]
    found = []
    for (labels, arm), aps in cells.items():
        base = cells.get((labels, BASELINE), {})
        gains = [round(ap - base[seed], 2) for seed, ap in aps.items() if seed in base]
        values = list(aps.values())
        spread = round(stdev(values), 2) if len(values) > 1 else None
        gain = round(mean(gains), 2) if gains else None
        found.append(
            {"labels": labels, "arm": arm, "ap": round(mean(values), 2), "spread": spread, "gain": gain, "gains": gains}
        )
    return found


def table(cells: Sequence[Row]) -> str:
    lines = [f"{'labels':>6}  {'arm':<12}{'AP':>7}{'+-':>6}{'gain':>7}  by seed"]
    for cell in cells:
        spread = "" if cell["spread"] is None else f"{cell['spread']:.1f}"
        gain = "" if cell["gain"] is None else f"{cell['gain']:+.1f}"
        seeds = " ".join(f"{gain:+.1f}" for gain in cell["gains"])
        lines.append(f"{cell['labels']:>6}  {cell['arm']:<12}{cell['ap']:>7.1f}{spread:>6}{gain:>7}  {seeds}")
    return "\n".join(lines)
