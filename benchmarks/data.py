"""People a second that one CPU core decodes, crops and changes into batches, and mmpose's as Sapiens trains.

    python benchmarks/data.py [--peer_python PATH] [--root FOLDER] [--megapixels 12] [--input_hw 512 384]

PATH is the Python of an environment with mmpose and albumentations 1.x (README.md tells how to make one); without it
only ours is timed. Both get the same images and people and take turns, each in a process of its own on one core. Time
is what a process spent on the core, so that its neighbors count little; the wall's is written beside it.
"""

import argparse
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

os.environ["OMP_NUM_THREADS"] = "1"
import sapiens_accel  # isort: skip  # noqa: F401  (before torch: it sets how threads wait)
import cv2
import numpy as np
import record
from codec import one_core
from codec_peer import seconds
from elsewhere import Elsewhere
from torch.utils.data import default_collate

from sapiens_accel.config.schema import AugmentConfig, DataConfig, StageConfig, TeacherConfig
from sapiens_accel.data import build, loader
from sapiens_accel.data import dataset as data
from sapiens_accel.data.augment import Augmenter
from sapiens_accel.data.dataset import Key, Sets, TrainingPeople
from sapiens_accel.data.people import People
from sapiens_accel.errors import UserError, run_main
from sapiens_accel.pose.skeleton import COCO17
from sapiens_accel.runtime import host
from sapiens_accel.selftest.throughput import spread, spread_of_ratios
from sapiens_accel.sources import jpeg_region

Row = dict[str, Any]
Pass = Callable[
    [int], tuple[float, float]
]  # the round -> seconds of one pass over all people: on the core, by the wall
BARS = {"ratio_mmpose": 3.3}
PUBLISHED = AugmentConfig(coarse_dropout_p=1.0)  # as the peer's recipe; the rest of ours is the same
PARTS = ("read_reduced_image", "geometry.warp", "change_pixels", "_channels_first", "collate")
LIBRARIES = ("numpy", "opencv-python-headless", "nvidia-nvimgcodec-cu12", "albumentations", "datasets")
# Of enlarged images, which would be smaller files than a camera's: what the eye takes for noise, in levels.
NOISE = 11.0
GPUS = (5.0, 10.0, 25.0, 50.0, 100.0, 200.0, 400.0)


def main(words: Sequence[str]) -> None:
    asked = options(words)
    one_core()
    cv2.setNumThreads(0)
    host.keep_freed_memory()  # as every loading process does
    with tempfile.TemporaryDirectory() as folder:
        root = enlarge(Path(asked.root), asked.megapixels, Path(folder)) if asked.megapixels else asked.root
        measure(asked, DataConfig(root=str(root), input_hw=asked.input_hw, check_images="ends"))


def measure(asked: argparse.Namespace, settings: DataConfig) -> None:
    sets = build.open_people(settings, COCO17, unlabeled=False)
    path = record.place("data", "cpu", record.cpu_name(), asked.out)
    names = ("input_hw", "batch", "rounds")
    heading = record.heading("data", "cpu", record.cpu_name(), **{name: getattr(asked, name) for name in names})
    larger = f" --megapixels {asked.megapixels:g}" if asked.megapixels else ""
    heading["command"] = f"python benchmarks/data.py{' --peer_python PATH' if asked.peer_python else ''}{larger}"
    heading["versions"] |= record.versions(*LIBRARIES)
    heading |= {"pinned": hasattr(os, "sched_setaffinity"), "unit": "people a second of one core", "bars": BARS}
    heading |= pictures(sets.train)
    passes: dict[str, Pass] = {name: ours(sets, settings, asked, **what) for name, what in OURS.items()}
    with tempfile.TemporaryDirectory() as folder:
        if asked.peer_python:
            passes |= peers(asked, sets.train, Path(folder), heading)
        rows = measured(passes, asked.rounds, len(sets.train))
        found = heading | told(rows) | {"parts_ms": parts(sets, settings, asked)}
        record.write(path, found, cases=list(rows.values()))
    print(text(found, rows))
    print(f"\n{path}")


def options(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="data.py", description="People a second of one core.", allow_abbrev=False)
    parser.add_argument("--peer_python", help="the Python of an environment with mmpose and albumentations 1.x")
    shared = os.environ.get("SAPIENS_ACCEL_TEST_DATA")
    default = f"{shared}/coco_mini" if shared else None
    parser.add_argument("--root", default=default, help="a folder in COCO's form (drawn people)")
    parser.add_argument("--megapixels", type=float, default=0.0, help="enlarge the images of --root to so many (no)")
    parser.add_argument("--input_hw", nargs=2, type=int, default=(512, 384), help="(512 384)")
    parser.add_argument("--batch", type=int, default=32, help="people of a batch (32)")
    parser.add_argument("--rounds", type=int, default=9, help="timed passes of each over all people (9)")
    parser.add_argument("--out", help="the JSON (benchmarks/results/data_cpu_DATE.json)")
    asked = parser.parse_args(words)
    if min(asked.batch, asked.rounds, *asked.input_hw) < 1 or any(side % 4 for side in asked.input_hw):
        raise UserError("--batch, --rounds: expected 1 or more; --input_hw: multiples of 4, like 512 384")
    if asked.megapixels < 0 or (asked.megapixels and not asked.root):
        raise UserError("--megapixels: expected a number above 0, and a folder in COCO's form in --root")
    asked.input_hw = tuple(asked.input_hw)
    return asked


def enlarge(root: Path, megapixels: float, folder: Path) -> Path:
    """The training images of a COCO folder as a camera has them: each of so many pixels, with noise."""
    file = "annotations/person_keypoints_{}2017.json"
    (folder / "annotations").mkdir()
    (folder / file.format("val")).symlink_to((root / file.format("val")).resolve())
    (folder / "val2017").symlink_to((root / "val2017").resolve())
    labels = json.loads((root / file.format("train")).read_text())
    scales = {image["id"]: math.sqrt(megapixels * 1e6 / image["width"] / image["height"]) for image in labels["images"]}
    for image in labels["images"]:
        image |= {side: round(image[side] * scales[image["id"]]) for side in ("width", "height")}
    for person in labels["annotations"]:
        scale = scales[person["image_id"]]
        person["bbox"] = [scale * value for value in person["bbox"]]
        person["area"] *= scale**2
        person["keypoints"] = (np.reshape(person["keypoints"], (-1, 3)) * (scale, scale, 1)).ravel().tolist()
        person.pop("segmentation", None)
    (folder / file.format("train")).write_text(json.dumps(labels))
    cv2.setRNGSeed(0)
    (folder / "train2017").mkdir()
    for image in labels["images"]:
        path = root / "train2017" / image["file_name"]
        if path.exists():
            larger = cv2.resize(cv2.imread(str(path)), (image["width"], image["height"]), interpolation=cv2.INTER_CUBIC)
            noise = cv2.randn(np.empty(larger.shape, np.int16), 0, NOISE)
            cv2.imwrite(str(folder / "train2017" / path.name), cv2.add(larger, noise, dtype=cv2.CV_8U))
    return folder


# ---- Whose passes are timed


OURS: dict[str, dict[str, Any]] = {
    "ours": {},
    "ours_whole_decode": {"reduced_decode": False},
    "ours_default_changes": {"augment": AugmentConfig()},
    "ours_pairs": {"pairs": True},
}


def ours(
    sets: Sets,
    settings: DataConfig,
    asked: argparse.Namespace,
    *,
    augment: AugmentConfig = PUBLISHED,
    reduced_decode: bool = True,
    pairs: bool = False,
) -> Pass:
    """All training people once, in batches; with `pairs` each as an unlabeled person, in two views."""
    people = training_people(sets, replace(settings, reduced_decode=reduced_decode), augment, pairs)
    num = len(sets.train)

    def batches(step: int) -> None:
        for start in range(0, num, asked.batch):
            keys = [Key(step, position, pairs) for position in range(start, min(start + asked.batch, num))]
            found = [people[key] for key in keys]
            default_collate(found) if pairs else loader.collate(found)

    def run(step: int) -> tuple[float, float]:
        whole: Any = {"find_package": lambda: None, "cut_below": lambda *_: None}
        with nullcontext() if reduced_decode else mock.patch.multiple(jpeg_region, **whole):
            return seconds(lambda: batches(step))

    return run


def training_people(sets: Sets, settings: DataConfig, augment: AugmentConfig, pairs: bool = False) -> TrainingPeople:
    augmenter = Augmenter(config=augment, skeleton=COCO17, input_hw=settings.input_hw)
    plan = StageConfig(global_batch=len(sets.train), teacher=TeacherConfig() if pairs else None)
    sets = sets._replace(unlabeled=sets.train) if pairs else sets
    return TrainingPeople(sets, augmenter, settings, plan, seed=0, stage="benchmark")


def peers(asked: argparse.Namespace, people: People, folder: Path, heading: Row) -> dict[str, Pass]:
    """mmpose's passes, with and without the targets that we draw on the device; `heading` is told its versions.

    Raises:
        UserError: that Python does not start, or cannot import it.
    """
    known = [
        {"path": str((people.root / row["file_name"]).resolve()), "id": row["ann_id"]}
        | {name: row[name] for name in ("box_xywh", "keypoints")}
        for row in people.rows
    ]
    meta = {"flip_indices": COCO17.mirror, "upper_body_ids": COCO17.upper, "lower_body_ids": COCO17.lower}
    settings = {"people": known, "meta": meta | {"dataset_name": "coco"}, "batch": asked.batch, "sigma": 3}
    process = Elsewhere(asked.peer_python, "data_peer.py", folder, settings | {"input_hw": asked.input_hw})
    if reason := process.told["missing"]:
        raise UserError(f"--peer_python {asked.peer_python}: mmpose cannot be imported there ({reason}); see README.md")
    heading["peer_versions"] = process.told["versions"]

    def run(with_targets: bool) -> Pass:
        return lambda _: tuple(process.ask("pass", with_targets))

    return {"mmpose": run(True), "mmpose_without_targets": run(False)}


# ---- Numbers


def pictures(people: People) -> Row:
    """How many, and how large those of the people are, which is what decoding costs."""
    names = sorted(set(people.rows["file_name"][:]))
    sides = [cv2.imread(str(people.root / name)).shape for name in names]
    megapixels = statistics.median(height * width / 1e6 for height, width, _ in sides)
    size = statistics.median((people.root / name).stat().st_size for name in names)
    median = {
        "pictures": len(names),
        "median_megapixels": round(megapixels, 3),
        "median_kilobytes": round(size / 1e3, 1),
    }
    return {"people": len(people)} | median


def measured(passes: dict[str, Pass], rounds: int, num_people: int) -> dict[str, Row]:
    """In turns, after an untimed pass of each."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in passes}
    for number in range(rounds + 1):
        for name, run in passes.items():
            found = run(number)
            if number:
                taken[name].append(found)
    rows = {}
    for name, times in taken.items():
        rates = [spread([num_people / time[clock] for time in times]) for clock in (0, 1)]
        rows[name] = {"name": name, "people_per_second": rates[0], "by_the_wall": rates[1]["median"]}
    for peer in (name for name in taken if not name.startswith("ours")):
        rows[peer]["ratio"] = spread_of_ratios(*([time for time, _ in taken[name]] for name in (peer, "ours")))
    return rows


def told(rows: dict[str, Row]) -> Row:
    """Above the cases: medians of the ratios, and the cores that feed a GPU of so many people a second."""
    ratios = {f"ratio_{name}": row["ratio"]["median"] for name, row in rows.items() if "ratio" in row}
    rate = rows["ours"]["people_per_second"]["median"]
    return ratios | {"cores_for_gpu_people_per_second": {f"{gpu:g}": math.ceil(gpu / rate) for gpu in GPUS}}


def parts(sets: Sets, settings: DataConfig, asked: argparse.Namespace) -> Row:
    """Milliseconds of a core a person for each step, medians; `rest` is rows, draws, points, tensors."""
    spent: dict[str, float] = {}
    originals = {part: _owner(part) for part in PARTS}
    try:
        for part, (owner, name) in originals.items():
            setattr(owner, name, _timed(getattr(owner, name), part, spent))
        run, rounds = ours(sets, settings, asked), []
        for step in range(asked.rounds + 1):
            spent.clear()
            total, _ = run(step)
            rounds.append(spent | {"rest": total - sum(spent.values()), "all": total})
    finally:
        for owner, name in originals.values():
            setattr(owner, name, getattr(owner, name).__wrapped__)
    names = {"read_reduced_image": "decode", "geometry.warp": "warp", "_channels_first": "channels_first"}
    timed = [*PARTS, "rest", "all"]
    ms = {part: [1000 * row.get(part, 0.0) / len(sets.train) for row in rounds[1:]] for part in timed}
    return {names.get(part, part): round(statistics.median(values), 4) for part, values in ms.items()}


def _owner(part: str) -> tuple[Any, str]:
    """Where what is timed is looked up: collate in the loader, the others where a sample is made."""
    module, _, name = part.rpartition(".")
    return loader if name == "collate" else getattr(data, module) if module else data, name


def _timed(function: Callable[..., Any], part: str, spent: dict[str, float]) -> Callable[..., Any]:
    def timed(*args: Any, **options: Any) -> Any:
        start = time.process_time()
        try:
            return function(*args, **options)
        finally:
            spent[part] = spent.get(part, 0.0) + time.process_time() - start

    timed.__wrapped__ = function  # pyright: ignore[reportFunctionMemberAccess]
    return timed


def text(found: Row, rows: dict[str, Row]) -> str:
    lines = ["people a second of one core, median (lowest to highest); x: ours / theirs"]
    for name, row in rows.items():
        rate, ratio = row["people_per_second"], row.get("ratio")
        times = f"   x {ratio['median']:.2f} ({ratio['lowest']:.2f} to {ratio['highest']:.2f})" if ratio else ""
        lines.append(f"  {name:24}{rate['median']:8.1f} ({rate['lowest']:.1f} to {rate['highest']:.1f}){times}")
    spent = ", ".join(f"{name} {ms:.2f}" for name, ms in found["parts_ms"].items())
    needed = ", ".join(f"{n} for {gpu}" for gpu, n in found["cores_for_gpu_people_per_second"].items())
    return "\n".join([*lines, f"  ms a person: {spent}", f"  cores for a GPU of so many people a second: {needed}"])


if __name__ == "__main__":
    run_main(main)
