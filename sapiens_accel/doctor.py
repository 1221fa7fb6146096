"""Look a run over before it starts: its labels and pictures, what the network would see, and the machine.

    python -m sapiens_accel.doctor --recipe sapiens_1b_coco --data.root DIR [--launch accelerate_configs/zero2.yaml]
        [--json FILE|-] [--out FOLDER] [any option of train.py]

Every fault is named at once. Exit code 0 with warnings alone, 1 with errors.
"""

import argparse
import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sapiens_accel import config, data, draw, environment, examine, lenient, pool, preview
from sapiens_accel.coco import People, boxes_of, column_of, is_file, keypoints_of
from sapiens_accel.config import Config, UserError
from sapiens_accel.data import Sets
from sapiens_accel.examine import LEVELS, Finding, Labels
from sapiens_accel.model import SIZES
from sapiens_accel.skeleton import COCO17 as SKELETON
from sapiens_accel.skeleton import Skeleton

SHOWN = 4  # culprits of a check in the text; the JSON has all
BRIEF_PEOPLE = 10_000  # spread over the set: shares are known to a percent, in a fraction of a second
BRIEF_LINES = 4
SIZES_TOLD = ("box_width", "box_height", "area")


@dataclass(kw_only=True)
class Report:
    """What the doctor found.

    Attributes:
        people: of each set: how many, their joints, sizes (of which PERCENTILES are given).
        grid: the picture of augmented crops.
    """

    recipe: str
    root: str
    findings: list[Finding] = field(default_factory=list)
    people: dict[str, dict[str, Any]] = field(default_factory=dict)
    grid: str | None = None

    def count(self, level: examine.Level) -> int:
        return sum(finding.level == level for finding in self.findings)

    def as_json(self) -> dict[str, Any]:
        counts = {f"{level}s": self.count(level) for level in LEVELS}
        return {"ok": not self.count("error"), **counts, **dataclasses.asdict(self)}


def main(words: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m sapiens_accel.doctor",
        description="Look a run over before it starts. Options of train.py may follow: --recipe, --data.root, ...",
        allow_abbrev=False,
    )
    parser.add_argument("--launch", help="the accelerate config that the run will be launched with")
    parser.add_argument("--json", metavar="FILE", help="write all that was found as JSON; - prints it instead of text")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where crops.png goes (OUTPUT_DIR/doctor)")
    asked, rest = parser.parse_known_args(words)
    run = config.load(rest, prog="python -m sapiens_accel.doctor")
    try:
        report = examined(run, environment.launch_of(asked.launch), asked.out or Path(run.output_dir) / "doctor")
        as_json = json.dumps(report.as_json(), indent=2)
        if asked.json and asked.json != "-":
            Path(asked.json).write_text(as_json + "\n")
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be written: {error.strerror}") from None
    print(as_json if asked.json == "-" else text_of(report))
    if report.count("error"):
        sys.exit(1)


def examined(run: Config, launch: environment.Launch, out: Path) -> Report:
    """Everything that the doctor looks at; the grid of crops goes into `out`.

    Raises:
        UserError: there is no data root.
    """
    report, train = looked_over(run)
    if report.count("error"):
        text = "not looked at: what training would make of these data; mend the errors first"
        report.findings.append(Finding(level="note", check="crops/grid", text=text))
    else:
        report.findings += _under("crops", _crops(run, train, report, out))
    report.findings += _under("machine", environment.examine(run, launch, SKELETON))
    return report


def looked_over(run: Config) -> tuple[Report, Labels]:
    """What is wrong with labels and pictures; and the training people with joints.

    Raises:
        UserError: there is no data root.
    """
    root, _ = data.places(run.data)
    report = Report(recipe=run.recipe, root=str(root))
    found = {
        "train": lenient.read(root, run.data.train_annotations, run.data.train_images, SKELETON),
        "val": lenient.read(root, run.data.val_annotations, run.data.val_images, SKELETON),
    }
    for name, read in found.items():
        labels = _with_joints(read.labels)
        report.people[name] = examine.portrait(labels, SKELETON)
        of_set = [*read.findings, *examine.faults(labels, SKELETON, scored=name == "val")]
        of_set += lenient.pictures(root, read, run.data.check_images, run.data.on_bad_image)
        report.findings += _under(name, of_set)
    report.findings += _under("train and val", _leaks(root, found["train"], found["val"]))
    return report, _with_joints(found["train"].labels)


def _crops(run: Config, labels: Labels, report: Report, out: Path) -> list[Finding]:
    """What the run's own reader says, and what the network would see."""
    try:
        with contextlib.redirect_stdout(sys.stderr):  # what it skips has been told, and stdout may be JSON
            sets = data.open_people(run.data, SKELETON, unlabelled=any(run.of(stage).ratio for stage in run.stages))
    except UserError as error:
        return [Finding(level="error", check="reader", text=str(error))]
    report.grid = str(draw.save(preview.grid(preview.first_stage(run, sets, SKELETON), SKELETON), out / "crops.png"))
    told = f"{preview.NUM_CROPS} augmented crops with their joints: {report.grid}"
    return [
        *(Finding(level="warning", check="reader", text=line.removeprefix("warning: ")) for line in sets.warnings),
        *preview.findings(run, labels, SKELETON),
        Finding(level="note", check="grid", text=told),
    ]


def _under(group: str, findings: Sequence[Finding]) -> list[Finding]:
    return [dataclasses.replace(finding, check=f"{group}/{finding.check}") for finding in findings]


def _with_joints(labels: Labels) -> Labels:
    """Those with at least one labelled keypoint."""
    return labels.at(np.flatnonzero(labels.labelled.any(axis=1)))


def _leaks(root: Path, train: lenient.Read, val: lenient.Read) -> list[Finding]:
    """Validation pictures that are learnt from; and ids that are in both files, which harms nobody here."""
    ours, theirs = ({root / n: i for n, i in r.pictures.items() if is_file(root / n)} for r in (train, val))
    leaks = pool.leaks(ours, theirs)
    findings = []
    if leaks:
        pairs = tuple(f"{a.relative_to(root)} is {b.relative_to(root)}" for a, b in leaks.items())
        text = f"{len(leaks)} training pictures are validation pictures: scores would be of what was learnt"
        findings.append(Finding(level="error", check="leaks", text=text, culprits=pairs))
    common = sorted(set(ours.values()) & set(theirs.values()))
    if common:
        text = f"{len(common)} picture ids are in both files"
        findings.append(Finding(level="note", check="ids", text=text, culprits=tuple(map(str, common))))
    return findings


# ---- Before every training


def briefly(say: Callable[[object], object], sets: Sets, run: Config, skeleton: Skeleton) -> None:
    """Say who a run learns from and what is wrong with their labels, in a few lines; no picture is opened.

    Raises:
        UserError: labels that spoil the run.
    """
    say(sets)
    found = []
    for name, people in (("train", sets.train), ("val", sets.val)):
        found += _under(name, _brief_faults(people, skeleton, scored=name == "val"))
    found.append(examine.sigma_of(run.data.sigma, SIZES[run.model.name].heatmap_hw(run.data.input_hw)))
    worst = [finding for level in LEVELS[:2] for finding in found if finding.level == level]
    for finding in worst[:BRIEF_LINES]:
        say(f"{finding.level}: {_line(finding, shown=1)}")
    if worst:
        more = f"{len(worst) - BRIEF_LINES} more; " if len(worst) > BRIEF_LINES else ""
        say(f"{more}all of it, by name: python -m sapiens_accel.doctor with the options of this run")
    if worst and worst[0].level == "error":
        raise UserError(_line(worst[0], shown=1))


def _brief_faults(people: People, skeleton: Skeleton, *, scored: bool) -> list[Finding]:
    """Repeated ids among all, and what else is wrong with a sample of the people."""
    ids, names = column_of(people.rows, "ann_id"), column_of(people.rows, "file_name")
    places = np.linspace(0, len(people) - 1, min(BRIEF_PEOPLE, len(people))).astype(int)
    rows = people.rows.select(places)
    labels = Labels(
        ann_ids=ids[places],
        file_names=names[places],
        boxes_xywh=boxes_of(rows),
        areas=column_of(rows, "area"),
        keypoints=keypoints_of(rows),
        size_wh=np.full((len(rows), 2), np.nan),
    )
    found = [finding for finding in examine.faults(labels, skeleton, scored=scored) if finding.check != "ids"]
    return [*examine.repeated_ids(ids, names, scored=scored), *found]


# ---- As text


def text_of(report: Report) -> str:
    """Grouped by what was looked at, the worst first."""
    lines = [f"{report.recipe}, {report.root}", "", *_people_lines(report.people)]
    groups = dict.fromkeys(finding.check.split("/")[0] for finding in report.findings)
    for group in groups:
        lines += ["", group]
        of_group = [finding for finding in report.findings if finding.check.split("/")[0] == group]
        for finding in sorted(of_group, key=lambda finding: LEVELS.index(finding.level)):
            shown = 0 if finding.level == "note" else SHOWN
            lines.append(f"  {finding.level:8}{_line(finding, shown).removeprefix(f'{group}/')}")
    counts = [f"{report.count(level)} {level}{'' if report.count(level) == 1 else 's'}" for level in LEVELS[:2]]
    return "\n".join([*lines, "", ", ".join(counts)])


def _line(finding: Finding, shown: int) -> str:
    named = ", ".join(finding.culprits[:shown])
    more = len(finding.culprits) - shown
    rest = f" and {more} more" if more > 0 and named else ""
    return f"{finding.check}: {finding.text}{f': {named}' if named else ''}{rest}"


def _people_lines(people: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Sizes, and a table of joints: in how many of the people they are visible and occluded."""
    lines = []
    for name, of in people.items():
        each = f"{of['joints_labelled']:.1f} joints each"
        lines.append(f"{name}: {of['people']} people in {of['pictures']} pictures, {each}")
        if of["people"]:
            sizes = (f"{key.replace('_', ' ')} {' | '.join(f'{size:.0f}' for size in of[key])}" for key in SIZES_TOLD)
            lines.append(f"  px, 5 % | median | 95 %: {'; '.join(sizes)}")
    lines += ["", f"{'joint':26}" + "".join(f"{f'{name} visible':>16}{'occluded':>10}" for name in people)]
    for joint in next(iter(people.values()))["visible"]:
        shares = "".join(f"{of['visible'][joint]:16.0%}{of['occluded'][joint]:10.0%}" for of in people.values())
        lines.append(f"{joint:26}{shares}")
    return lines


if __name__ == "__main__":
    config.guarded(main)
