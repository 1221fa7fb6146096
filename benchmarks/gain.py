"""What unlabeled images are worth: train.py's stage ssl against the strongest supervised training that was found.

    python benchmarks/ssl.py --data drawn mouse --seeds 0 1 2

For each data set and number of labels, first the opponent: supervised training with several strengths of augmentation,
then, with the best of them, several learning rates of its continuation, on a seed of its own; the best by AP is taken.
Then, for each seed, that supervised stage from random weights, trained until more steps bring little, and from it all
arms: `supervised` continues for as many steps as stage ssl has, `supervised_long` for as many as take the time of stage
ssl, and the others see unlabeled images, all with one set of settings. A difference is that of an arm and `supervised`
of the same seed. The weights of the last step are compared: choosing among steps by the people that are tested on would
flatter an arm.

Drawn people, a real laboratory mouse (`mirror_mouse`) and 80 images of COCO (`coco_mini`), both in the folder that
--real or SAPIENS_ACCEL_TEST_DATA names, with a tiny network from random weights: this ranks methods and finds harm, and
predicts no accuracy on COCO. Of 40 people of COCO such a network learns next to nothing: there only harm can show.
"""

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import chart
import record
import yaml
from scipy import stats
from tqdm import tqdm

from sapiens_accel.config.parse import load
from sapiens_accel.config.schema import TeacherConfig
from sapiens_accel.errors import UserError

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests"))
import forks  # noqa: E402  (of a run of two minutes, a quarter are imports)

BASELINE, LONG = "supervised", "supervised_long"
CHOICE_SEED = 100  # of the choice of the opponent; no arm is compared on it
LONGER = 2.0  # steps of supervised training in the time of one of stage ssl: CPU seconds, drawn people, see docs
# Options of the labeled images' augmentation; the student's view is as strong (its t reaches twice as far, hence half).
STRENGTHS = {
    "weak": {"rotation": 13, "scale": 0.14, "shift": 0.08, "photometric_p": 0, "coarse_dropout_p": 0},
    "mid": {"rotation": 25, "scale": 0.25, "shift": 0.1, "photometric_p": 0.5, "coarse_dropout_p": 0.3},
    "strong": {"rotation": 45, "scale": 0.4, "shift": 0.16, "photometric_p": 0.5, "coarse_dropout_p": 0.5},
}
RATES = (1.0, 0.3)  # of the supervised continuation, as shares of the start's
# Where unlabeled people are few, `learned` is 1.5 in all arms but learned_1 and version_0.1; until 2026-11-30 it was 1.
ARMS: dict[str, tuple[str, ...]] = {
    BASELINE: ("--ssl.teacher.ratio=0",),
    LONG: ("--ssl.teacher.ratio=0",),
    "defaults": (),  # what a user gets who gives no --ssl.teacher option
    "version_0.1": ("--ssl.teacher.max_grad_ratio=null", "--ssl.teacher.ramp_down=0"),
    "limit_0.5": ("--ssl.teacher.max_grad_ratio=0.5",),
    "constant_weight": ("--ssl.teacher.ramp_down=0",),
    "labeled_end": ("--ssl.teacher.labeled_end=0.2", "--ssl.teacher.ramp_down=0.625"),
    "three_views": ("--ssl.teacher.views=3",),
    "calibrated": ("--ssl.teacher.confidence=calibrated",),
    "no_cutout": ("--ssl.teacher.cutout=0",),
    "ratio_2": ("--ssl.teacher.ratio=2",),
    "ratio_0.5": ("--ssl.teacher.ratio=0.5",),
    "learned_1": ("--ssl.teacher.learned=1",),
    "learned_1.5": ("--ssl.teacher.learned=1.5",),
    "soft": ("--ssl.teacher.target=heatmap",),
    "mse": ("--ssl.teacher.loss=mse", "--ssl.teacher.target=heatmap"),
    "literal": ("--ssl.teacher.loss=literal", "--ssl.teacher.max_grad_ratio=null", "--ssl.teacher.ramp_down=0"),
}
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Data:
    """A data set: its recipe, how many labels are tried, and the options that give it to train.py.

    Attributes:
        options: of (folder to write into, labels, seed, the data set's folder).
        folder: name of that folder; None: the data are made.
        start_steps: of the supervised start by number of labels, where they differ from the recipe's: more labels
            take more steps until further ones bring little.
    """

    recipe: Path
    labels: tuple[int, ...]
    options: Callable[[Path, int, int, Path], list[str]]
    folder: str | None = None
    start_steps: Mapping[int, int] = field(default_factory=dict)


def drawn(folder: Path, labels: int, seed: int, real: Path) -> list[str]:
    return [f"--data.labels={labels}", "--data.labels_by=random", f"--data.labels_seed={seed}"]


def coco(folder: Path, labels: int, seed: int, real: Path) -> list[str]:
    """Labels of some people; the others of the training images are unlabeled, and those of `unlabeled2017`."""
    return [f"--data.root={real}", *drawn(folder, labels, seed, real)]


def mouse_frames(folder: Path, labels: int, seed: int, mouse: Path) -> list[str]:
    """All 90 labeled frames, shuffled by the seed: the first `labels` to train on, the others to test; and the film.

    Thirty frames of validation alone would make one seed's AP worth about +-2.
    """
    whole: dict[str, list[Any]] = {"images": [], "annotations": []}
    for split in ("train", "val"):
        tree = json.loads((mouse / "annotations" / f"{split}.json").read_text())
        whole["categories"], shift = tree["categories"], len(whole["images"])
        for image in tree["images"]:
            source = mouse / split / image["file_name"]
            whole["images"].append({**image, "id": image["id"] + shift, "file_name": str(source.resolve())})
        for annotation in tree["annotations"]:
            moved = {"id": annotation["id"] + shift, "image_id": annotation["image_id"] + shift}
            whole["annotations"].append({**annotation, **moved})
    order = sorted(image["id"] for image in whole["images"])
    random.Random(seed).shuffle(order)
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    for split, ids in (("train", set(order[:labels])), ("val", set(order[labels:]))):
        tree = {**whole, "images": [image for image in whole["images"] if image["id"] in ids]}
        tree["annotations"] = [one for one in whole["annotations"] if one["image_id"] in ids]
        (folder / split).mkdir(exist_ok=True)
        for image in tree["images"]:
            source = Path(image["file_name"])
            link = folder / split / f"{source.parent.name}_{source.name}"
            if not link.exists():
                link.symlink_to(source)
        named = [{**i, "file_name": "_".join(Path(i["file_name"]).parts[-2:])} for i in tree["images"]]
        (folder / "annotations" / f"{split}.json").write_text(json.dumps({**tree, "images": named}))
    files = [f"--data.{split}_annotations=annotations/{split}.json" for split in ("train", "val")]
    images = [f"--data.{split}_images={split}" for split in ("train", "val")]
    return [f"--data.root={folder}", *files, *images, f"--data.unlabelled_images={(mouse / 'unlabelled').resolve()}"]


HERE = Path(__file__).parent
DATA = {
    "drawn": Data(recipe=HERE / "ssl.yaml", labels=(30, 100, 300), options=drawn, start_steps={100: 4000, 300: 6000}),
    "mouse": Data(recipe=HERE / "ssl_mouse.yaml", labels=(10, 30, 60), options=mouse_frames, folder="mirror_mouse"),
    "coco": Data(recipe=HERE / "ssl_coco.yaml", labels=(40,), options=coco, folder="coco_mini"),
}


@dataclass(frozen=True, kw_only=True)
class Runner:
    """Runs of train.py for one case of a benchmark: data set, labels, seed."""

    data: str
    labels: int
    seed: int
    work: Path
    real: Path
    options: Sequence[str]

    @property
    def folder(self) -> Path:
        return self.work / f"{self.data}_{self.labels}_{self.seed}"

    @property
    def recipe(self) -> dict[str, Any]:
        return yaml.safe_load(DATA[self.data].recipe.read_text())

    def start(self, strength: str) -> Path:
        """The supervised stage that all arms begin with."""
        folder = self.folder / strength
        if not (folder / "phase2" / "eval.json").is_file():
            steps = DATA[self.data].start_steps.get(self.labels, self.recipe["phase2"]["steps"])
            self.train(folder, "phase2", strength, [f"--phase2.steps={steps}"])
        return folder / "phase2"

    def arm(self, arm: str, strength: str, rate: float) -> Row:
        """One arm's result; the supervised ones at `rate` times the start's."""
        start, since = self.start(strength), time.perf_counter()
        more = [f"--weights={start / 'weights'}", "--ssl.teacher.on_alarm=warn", *ARMS[arm]]
        if arm in (BASELINE, LONG):
            more.append(f"--ssl.optim.lr={rate * self.recipe['phase2']['optim']['lr']}")
        last = [f"--ssl.steps={round(LONGER * self.stage_steps)}"] if arm == LONG else []
        name = f"{strength}_{arm}_{rate}"
        if not (self.folder / name / "ssl" / "eval.json").is_file():
            self.train(self.folder / name, "ssl", strength, more, last)
        logs = [json.loads(line) for line in (self.folder / name / "metrics.jsonl").read_text().splitlines()]
        names = ("keep", "limit_open", "error_ratio", "teacher_peak_p99")
        seen = {name: [line[name] for line in logs if line.get(name) is not None] for name in names}
        return {
            "data": self.data, "labels": self.labels, "seed": self.seed, "arm": arm, "strength": strength,
            "rate": rate if arm in (BASELINE, LONG) else None,
            **scores(self.folder / name / "ssl" / "eval.json"), **scores(start / "eval.json", "start_"),
            **{name: round(mean(seen[name]), 3) if seen[name] else None for name in names[:3]},
            "peak_p99": round(max(seen["teacher_peak_p99"]), 3) if seen["teacher_peak_p99"] else None,
            "seconds": round(time.perf_counter() - since),
        }  # fmt: skip

    @property
    def stage_steps(self) -> int:
        """Steps of stage ssl, of the recipe or of an option."""
        steps = load([f"--recipe={DATA[self.data].recipe}", *self.options]).ssl.steps
        assert steps is not None
        return steps

    def train(self, folder: Path, stage: str, strength: str, more: Sequence[str], last: Sequence[str] = ()) -> None:
        """One run of train.py.

        Args:
            more: options before those of the command line, which so have the last word.
            last: options that have it.

        Raises:
            UserError: it failed; with the end of its output.
        """
        changes = STRENGTHS[strength]
        view = {
            "strong_rotation": changes["rotation"] / 2,
            "strong_scale": changes["scale"],
            "strong_shift": changes["shift"] / 2,
        }
        augment = [f"--augment.{name}={value}" for name, value in (changes | view).items()]
        data = DATA[self.data]
        people = data.options(self.folder / "data", self.labels, self.seed, self.real / (data.folder or ""))
        run = [f"--recipe={data.recipe}", f"--stage={stage}", f"--seed={self.seed}", f"--output_dir={folder}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        environment |= {"ACCELERATE_MIXED_PRECISION": "no"}
        words = ["train.py", *run, *augment, *people, *more, *self.options, *last]
        done = forks.run(words, cwd=ROOT, env=environment, timeout=7200)
        if done.returncode:
            raise UserError(f"{folder}: {(done.stderr or done.stdout).strip()[-2000:]}")


def scores(file: Path, prefix: str = "") -> Row:
    found = json.loads(file.read_text())
    pixels = {"px": round(found["mean_px"], 3)} if found.get("mean_px") is not None else {}
    return {f"{prefix}{name}": value for name, value in {"ap": round(100 * found["AP"], 2), **pixels}.items()}


def main(words: Sequence[str]) -> None:
    asked = parse(words)
    path = record.place("ssl", "cpu", "", asked.json)
    settings = {
        "recipes": {name: yaml.safe_load(data.recipe.read_text()) for name, data in DATA.items()},
        "strengths": STRENGTHS,
        "start_steps": {name: {str(k): v for k, v in data.start_steps.items()} for name, data in DATA.items()},
        "options": asked.options,
        "arms": {name: list(words) for name, words in ARMS.items()},
        "longer": LONGER,
        "teacher": asdict(TeacherConfig()),  # the defaults of the arms
    }
    # Choices that were not made for a case, but carried over from another.
    given = [[*case, *opponent] for case, opponent in asked.opponents.items()]
    heading = record.heading("ssl", "cpu", record.cpu_name(), jobs=asked.jobs, opponents_given=given, **settings)
    rows, choices = done_before(path, settings)
    cases = [(data, labels) for data in asked.data for labels in asked.labels or DATA[data].labels]
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(asked.work or folder).resolve(), path, heading, asked, rows, choices)
        with ThreadPoolExecutor(asked.jobs) as pool:
            bench.choose(pool, cases)
            bench.compare(pool, cases)
    picture = chart.save(summary(rows), path.with_suffix(".png"))
    print(f"{table(summary(rows))}\n{path}\n{picture}")


@dataclass
class Bench:
    """All runs of one call; rows are written as they come."""

    work: Path
    path: Path
    heading: dict[str, Any]
    asked: argparse.Namespace
    rows: list[Row]
    choices: list[Row]

    def runner(self, data: str, labels: int, seed: int) -> Runner:
        real, options = Path(self.asked.real).resolve(), self.asked.options
        return Runner(data=data, labels=labels, seed=seed, work=self.work, real=real, options=options)

    def choose(self, pool: ThreadPoolExecutor, cases: Sequence[tuple[str, int]]) -> None:
        """Run what chooses the opponent: each strength, then with the best of them each rate."""
        cases = [case for case in cases if case not in self.asked.opponents]
        self.run_choices(pool, [(*case, strength, RATES[0]) for case in cases for strength in STRENGTHS])
        self.run_choices(pool, [(*case, self.best(*case)[0], rate) for case in cases for rate in RATES[1:]])

    def run_choices(self, pool: ThreadPoolExecutor, wanted: Sequence[tuple[str, int, str, float]]) -> None:
        known = {tuple(row[key] for key in ("data", "labels", "strength", "rate")) for row in self.choices}
        missing = [case for case in wanted if case not in known]

        def run(case: tuple[str, int, str, float]) -> Row:
            data, labels, strength, rate = case
            return self.runner(data, labels, CHOICE_SEED).arm(BASELINE, strength, rate)

        for row in tqdm(pool.map(run, missing), total=len(missing), unit="choice", disable=None):
            self.choices.append(row)
            self.write()

    def best(self, data: str, labels: int) -> tuple[str, float]:
        """The strength and rate of the opponent: those asked for, or of the best AP on the seed of the choice."""
        if (data, labels) in self.asked.opponents:
            return self.asked.opponents[data, labels]
        mine = [row for row in self.choices if (row["data"], row["labels"]) == (data, labels)]
        best = max(mine, key=lambda row: row["ap"])
        return best["strength"], best["rate"]

    def compare(self, pool: ThreadPoolExecutor, cases: Sequence[tuple[str, int]]) -> None:
        known = {
            (row["data"], row["labels"], row["seed"], row["arm"])
            for row in self.rows
            if row["strength"] == self.best(row["data"], row["labels"])[0]
        }
        wanted = [(data, labels, seed) for data, labels in cases for seed in self.asked.seeds]
        missing = [case for case in wanted if any((*case, arm) not in known for arm in self.asked.arms)]

        def run(case: tuple[str, int, int]) -> None:
            strength, rate = self.best(*case[:2])
            for arm in self.asked.arms:
                if (*case, arm) not in known:
                    self.rows.append(self.runner(*case).arm(arm, strength, rate))
                    self.write()

        for _ in tqdm(pool.map(run, missing), total=len(missing), unit="seed", disable=None):
            pass

    def write(self) -> None:
        rows = sorted(self.rows, key=order)
        record.write(self.path, self.heading, choices=self.choices, rows=rows, summary=summary(rows))


def parse(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--data", nargs="+", choices=DATA, default=list(DATA), help="(all of them)")
    parser.add_argument("--labels", nargs="+", type=int, help="labeled images (each data set's own three numbers)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="(0 1 2)")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=[BASELINE, LONG, "defaults"], help="(three)")
    parser.add_argument(
        "--opponent",
        nargs="+",
        type=opponent,
        default=[],
        metavar="DATA:LABELS=STRENGTH:RATE",
        help="the opponent of a case, carried over from another: it is not chosen again, and the file says so",
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time (one for each core)")
    parser.add_argument("--json", help="file to write; runs that it holds already are kept (results/ssl_cpu_DATE.json)")
    shared = os.environ.get("SAPIENS_ACCEL_TEST_DATA", str(ROOT.parent / "shared" / "data"))
    parser.add_argument("--work", help="folder for the runs, which is not removed; runs that it holds are used again")
    parser.add_argument("--real", default=shared, help="the folder of mirror_mouse and coco_mini (%(default)s)")
    asked, asked.options = parser.parse_known_args(words)  # what is left is for train.py
    asked.opponents = dict(asked.opponent)
    for folder in (DATA[name].folder for name in asked.data):
        if folder and not (Path(asked.real) / folder).is_dir():
            raise UserError(f"--real {asked.real}: has no folder {folder}. Leave it out with --data drawn")
    return asked


def opponent(text: str) -> tuple[tuple[str, int], tuple[str, float]]:
    """(data, labels), (strength, rate) of DATA:LABELS=STRENGTH:RATE."""
    case, _, given = text.partition("=")
    data, _, labels = case.partition(":")
    strength, _, rate = given.partition(":")
    if data not in DATA or strength not in STRENGTHS:
        raise argparse.ArgumentTypeError(f"{text}: expected e.g. drawn:100=mid:1")
    return (data, int(labels)), (strength, float(rate))


def done_before(path: Path, settings: dict[str, Any]) -> tuple[list[Row], list[Row]]:
    """The rows of the file, if it was made with the same settings."""
    if not path.is_file():
        return [], []
    found = json.loads(path.read_text())
    same = all(found.get(name) == value for name, value in settings.items())
    return (found["rows"], found["choices"]) if same else ([], [])


def order(row: Row) -> tuple[str, int, int, int]:
    return row["data"], row["labels"], list(ARMS).index(row["arm"]), row["seed"]


def summary(rows: Sequence[Row]) -> list[Row]:
    """For each case and arm: mean AP, and the paired difference from `supervised` with its 95 % interval (t)."""
    cells: dict[tuple[str, int, str], dict[int, Row]] = {}
    for row in sorted(rows, key=order):
        cells.setdefault((row["data"], row["labels"], row["arm"]), {})[row["seed"]] = row
    found = []
    for (data, labels, arm), by_seed in cells.items():
        base = cells.get((data, labels, BASELINE), {})
        cell: Row = {"data": data, "labels": labels, "arm": arm}
        for name in ("ap", "px"):
            if all(name in row for row in by_seed.values()):
                gains = [by_seed[seed][name] - base[seed][name] for seed in by_seed if name in base.get(seed, {})]
                cell[name] = round(mean(row[name] for row in by_seed.values()), 2)
                cell |= {f"{name}_gains": [round(gain, 2) for gain in gains], f"{name}_interval": interval(gains)}
        found.append(cell)
    return found


def interval(gains: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % confidence interval of a mean of paired differences, by Student's t."""
    if len(gains) < 2:
        return None
    half = stats.t.ppf(0.975, len(gains) - 1) * stdev(gains) / len(gains) ** 0.5
    return round(mean(gains) - half, 2), round(mean(gains) + half, 2)


def table(cells: Sequence[Row]) -> str:
    lines = [f"{'data':<6}{'labels':>7}  {'arm':<16}{'AP':>7}{'gain':>7}  by seed (95 % of the mean)"]
    for cell in cells:
        gains = cell.get("ap_gains") or []
        gain = f"{mean(gains):+.1f}" if gains else ""
        low_high = "" if cell.get("ap_interval") is None else "({:+.1f} to {:+.1f})".format(*cell["ap_interval"])
        pixels = f"  {cell['px']:.2f} px" if "px" in cell else ""
        seeds = " ".join(f"{value:+.1f}" for value in gains)
        lines.append(
            f"{cell['data']:<6}{cell['labels']:>7}  {cell['arm']:<16}{cell['ap']:>7.1f}{gain:>7}  "
            f"{seeds} {low_high}{pixels}"
        )
    return "\n".join(lines)
