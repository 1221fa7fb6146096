"""Look a run over before it starts: its labels and images, what the network would see, and the machine.

    python -m sapiens_accel.doctor --recipe sapiens_1b_coco --data.root DIR [--launch accelerate_configs/zero2.yaml]
        [--json FILE|-] [--out FOLDER] [any option of train.py]

Every fault is named at once. Exit code 0 with warnings alone, 1 with errors.
"""

import contextlib
import dataclasses
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from sapiens_accel.config import parse as config
from sapiens_accel.config.commands import doctor_parser
from sapiens_accel.config.schema import ALL, Config, DataConfig, EvalConfig, MoreData
from sapiens_accel.data import augment, build, leakage, streaming
from sapiens_accel.data.dataset import Sets
from sapiens_accel.data.people import (
    People,
    boxes_of,
    column_of,
    features_of,
    keypoints_of,
    read_given_ids,
    spread_rows,
)
from sapiens_accel.data.unlabeled import NoUnlabeledPeople, unlabeled_images
from sapiens_accel.doctor import annotations as annotation_checks
from sapiens_accel.doctor import environment, preview
from sapiens_accel.doctor import labels as label_checks
from sapiens_accel.doctor.annotations import ReadAnnotations
from sapiens_accel.doctor.labels import LEVELS, Finding, Labels, Level
from sapiens_accel.errors import UserError, count
from sapiens_accel.evaluation.boxes import load_boxes
from sapiens_accel.evaluation.evaluate import describe_crowding
from sapiens_accel.evaluation.ground_truth import read_ground_truth
from sapiens_accel.evaluation.networks import read_people_sizes
from sapiens_accel.models import sapiens as model
from sapiens_accel.pose import draw
from sapiens_accel.pose.oks import AREA_OF_BOX
from sapiens_accel.pose.person_boxes import PeopleSizes, measure_sizes
from sapiens_accel.pose.skeleton import COCO17, Skeleton
from sapiens_accel.sources import images
from sapiens_accel.sources.coco import HASHED_BIT, show_value

SHOWN = 4  # culprits of a check in the text; the JSON has all
BRIEF_PEOPLE = 10_000  # spread over the set: shares are known to a percent, in a fraction of a second
BRIEF_LINES = 4
LEAST_AREA = 0.02  # of the box: a person's is about a half, the thinnest animal's a tenth
STREAMED_PEOPLE = 100  # of a stream: more would be fetched
SIZES_TOLD = ("box_width", "box_height", "area")


@dataclass(kw_only=True)
class DoctorReport:
    """What the doctor found.

    Attributes:
        people: of each set: how many, their keypoints, sizes (of which PERCENTILES are given).
        grid: the image of augmented crops.
    """

    recipe: str
    root: str
    findings: list[Finding] = field(default_factory=list)
    people: dict[str, dict[str, Any]] = field(default_factory=dict)
    grid: str | None = None

    def count(self, level: Level) -> int:
        return sum(finding.level == level for finding in self.findings)

    def as_json(self) -> dict[str, Any]:
        counts = {f"{level}s": self.count(level) for level in LEVELS}
        return {"ok": not self.count("error"), **counts, **dataclasses.asdict(self)}


def main(words: Sequence[str]) -> None:
    asked, rest = doctor_parser().parse_known_args(words)
    run = config.load(rest, prog="python -m sapiens_accel.doctor")
    config.warn_of_harmful_options(run)
    try:
        report = examine(run, environment.read_launch(asked.launch), asked.out or Path(run.output_dir) / "doctor")
        as_json = json.dumps(report.as_json(), indent=2)
        if asked.json and asked.json != "-":
            Path(asked.json).write_text(as_json + "\n")
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be written: {error.strerror}") from None
    print(as_json if asked.json == "-" else text_of(report))
    if report.count("error"):
        sys.exit(1)


def examine(run: Config, launch: environment.Launch, out: Path) -> DoctorReport:
    """Everything that the doctor looks at; the grid of crops goes into `out`.

    Raises:
        UserError: there is no data root.
    """
    report, train, skeleton = check_data(run)
    if not skeleton.mirror_known:
        run = run.without_mirroring()
        report.findings += _under("keypoints", [*label_checks.propose_pairs(train, skeleton)])
    if report.count("error"):
        text = "not looked at: what training would make of these data; mend the errors first"
        report.findings.append(Finding(level="note", check="crops/grid", text=text))
    else:
        report.findings += _crops(run, train, skeleton, report, out)
    report.findings += _under("machine", environment.check_machine(run, launch, skeleton))
    report.findings = _drop_repeated(report.findings)
    return report


def check_data(run: Config) -> tuple[DoctorReport, Labels, Skeleton]:
    """What is wrong with labels and images; the training people with keypoints; and what the keypoints are.

    Raises:
        UserError: there is no data root.
    """
    config = build.locate_files(run.data)
    root, cache = build.prepare_root(config)
    report = DoctorReport(recipe=run.recipe, root=str(root))
    skeleton, report.findings = _skeleton(config)
    read_of = {}
    known = not report.count("error")
    for name, one in _sets(config).items():
        read = read_of[name] = _read_set(one, config, skeleton if known else None, root, cache)
        labels = _with_keypoints(read.labels)
        report.people[name] = label_checks.describe_people(labels, skeleton)
        of_set = [*read.findings, *label_checks.find_faults(labels, skeleton, scored=name == "val", run=run)]
        if not config.streaming:
            of_set += annotation_checks.check_images(root, read, config.check_images, config.on_bad_image)
        report.findings += _under(name, of_set)
    val = read_of.pop("val")
    report.findings += _compare_sizes(run, [_with_keypoints(train.labels) for train in read_of.values()], val)
    if config.streaming:
        text = "--data.streaming: images of training were neither looked at nor compared with those of validation"
        report.findings.append(Finding(level="note", check="train/pictures", text=text))
    else:
        for name, train in read_of.items():
            of_set = _leaks(root, train, val, None if name == "train" else cache)
            skips = name != "train" and config.on_leak == "skip"
            report.findings += _under(f"{name} and val", _skip_leaks(of_set) if skips else of_set)
        if any(run.get_stage(stage).ratio for stage in run.stages):
            report.findings += _under("unlabelled", _unlabeled(config, skeleton, root, cache, val))
    report.findings = _drop_repeated(report.findings)
    return report, label_checks.join_labels([_with_keypoints(train.labels) for train in read_of.values()]), skeleton


def _compare_sizes(run: Config, train: Sequence[Labels], val: ReadAnnotations) -> list[Finding]:
    """Whether people of validation, and of what the weights were trained with, are as large in their images as here."""
    sizes, of_val = (_measure(labels) for labels in (label_checks.join_labels(train), _with_keypoints(val.labels)))
    if sizes is None:
        return []
    findings = []
    if of_val and (misfit := of_val.describe_misfit(sizes)):
        text = f"people of validation are of another size than those of training: their {misfit}"
        findings.append(Finding(level="warning", check="val/sizes", text=text))
    trained = read_people_sizes(Path(run.weights)) if run.weights and Path(run.weights).exists() else None
    if trained and (misfit := sizes.describe_misfit(trained)):
        text = f"people are of another size than those that {run.weights} was trained with: their {misfit}"
        findings.append(Finding(level="warning", check="train/sizes", text=text))
    return findings


def _measure(labels: Labels) -> PeopleSizes | None:
    return measure_sizes(labels.boxes_xywh, labels.size_wh)


def _skeleton(config: DataConfig) -> tuple[Skeleton, list[Finding]]:
    """What the keypoints are; COCO's 17 where the files do not tell, so that the rest can be looked at."""
    try:
        skeleton, lines = build.open_skeleton(config)
    except UserError as error:
        return COCO17, [Finding(level="error", check="keypoints/names", text=str(error))]
    return skeleton, _under("keypoints", _findings_of_lines("names", lines))


def _findings_of_lines(check: str, lines: Sequence[str]) -> list[Finding]:
    """What the run would print, as findings."""
    mark = "warning: "
    levels: list[tuple[Level, str]] = [
        ("warning" if line.startswith(mark) else "note", line.removeprefix(mark)) for line in lines
    ]
    return [Finding(level=level, check=check, text=text) for level, text in levels]


def _sets(config: DataConfig) -> dict[str, MoreData]:
    """The sets of people with labels, by what they are called here."""
    first, *others = build.list_train_sets(config)
    more = {f"train {number}": one for number, one in enumerate(others, start=2)}
    return {"train": first, **more, "val": build.get_val_set(config)}


def _read_set(one: MoreData, config: DataConfig, skeleton: Skeleton | None, root: Path, cache: Path) -> ReadAnnotations:
    """A set, its keypoints taken by name where they can be; None: it is not known what they are."""
    reading, wrong = None, []
    try:
        files = build.files_of(one, root, cache)
        build.read_category(one, config, root, cache)
        if skeleton:
            reading, _ = build.choose_reading(one, config, skeleton, root, cache)
    except UserError as error:
        files = one.train_annotations, one.train_images
        wrong = [Finding(level="error", check="keypoints", text=str(error))]
    read = annotation_checks.read_annotations(root, *files, (skeleton or COCO17).num_keypoints, reading)
    of_file = [finding for finding in read.findings if finding.check in ("json", "categories")]
    return read if of_file else dataclasses.replace(read, findings=[*wrong, *read.findings])


def _unlabeled(config: DataConfig, skeleton: Skeleton, root: Path, cache: Path, val: ReadAnnotations) -> list[Finding]:
    """What is wrong with the images without labels that stage ssl learns from."""
    try:
        people = unlabeled_images(root, config, skeleton.num_keypoints, cache)
    except UserError as error:
        return [Finding(level="error", check="reader", text=str(error))]
    if people is None:
        return []
    read = annotation_checks.read_unlabeled(people)
    leaks = [finding for finding in _leaks(root, read, val) if finding.check == "leaks"]
    return [*annotation_checks.check_images(root, read, config.check_images, config.on_bad_image), *leaks]


def _crops(run: Config, labels: Labels, skeleton: Skeleton, report: DoctorReport, out: Path) -> list[Finding]:
    """What the run's own reader says, and what the network would see."""
    sets, findings = _open_sets(run, skeleton)
    if sets is None:
        return findings
    named = {finding.check for finding in report.findings}
    notes = {of.box_note for name, of in _opened(sets).items() if f"{name}/made_boxes" in named}
    report.grid = str(
        draw.save_image(preview.draw_grid(preview.first_stage_people(run, sets, skeleton), skeleton), out / "crops.png")
    )
    text = f"{preview.NUM_CROPS} augmented crops with their keypoints: {report.grid}"
    seen = [
        *_findings_of_lines("reader", [line for line in sets.warnings if line not in notes]),
        *_evaluation_faults(sets.split(run.eval.split), skeleton, run.eval),
        *preview.check_crops(run, labels, skeleton),
        Finding(level="note", check="grid", text=text),
    ]
    return [*findings, *_under("crops", seen)]


def _open_sets(run: Config, skeleton: Skeleton) -> tuple[Sets | None, list[Finding]]:
    """The run's people, those with labels alone where those without are the error; and the errors."""
    uses_unlabeled = any(run.get_stage(stage).ratio for stage in run.stages)
    errors: list[Finding] = []
    for unlabeled in dict.fromkeys((uses_unlabeled, False)):
        try:
            with contextlib.redirect_stdout(sys.stderr):  # what it skips has been said, and stdout may be JSON
                sets = build.open_people(run.data, skeleton, unlabeled=unlabeled)
        except NoUnlabeledPeople as error:
            level, text = (
                ("note", f"--stage {ALL} leaves ssl out: {error.reason}") if run.stage == ALL else ("error", str(error))
            )
            errors.append(Finding(level=level, check="unlabelled/reader", text=text))
        except UserError as error:
            errors.append(Finding(level="error", check="unlabelled/reader", text=str(error)))
        else:
            return sets, errors
    of_reader = [dataclasses.replace(one, check="crops/reader") for one in errors if one.level == "error"]
    return None, list(dict.fromkeys(of_reader))


def _under(group: str, findings: Sequence[Finding]) -> list[Finding]:
    return [dataclasses.replace(finding, check=f"{group}/{finding.check}") for finding in findings]


def _drop_repeated(findings: Sequence[Finding]) -> list[Finding]:
    """Each fault once: what a reader raised first is often among what was then collected from the same file."""
    named = {culprit for finding in findings for culprit in finding.culprits}
    with_culprits = {finding.text for finding in findings if finding.culprits}
    kept: dict[str, Finding] = {}
    for finding in findings:
        key = finding.text if not finding.culprits else f"{finding.check} {finding.text}"
        is_named = finding.level == "error" and any(finding.text.endswith(f": {one}") for one in named)
        if finding.culprits or not (is_named or finding.text in with_culprits):
            kept.setdefault(key, finding)
    return list(kept.values())


def _with_keypoints(labels: Labels) -> Labels:
    """Those with at least one labeled keypoint."""
    return labels.at(np.flatnonzero(labels.labeled.any(axis=1)))


def _leaks(root: Path, train: ReadAnnotations, val: ReadAnnotations, cache: Path | None = None) -> list[Finding]:
    """Validation images that are learned from; and ids that are in both files, which harms nobody here.

    Args:
        cache: of `leakage.find_copies`, which finds images in any encoding; None: it is not asked.
    """
    ours, theirs = (
        {path: image_id for name, image_id in read.image_ids.items() if images.exists(path := root / name)}
        for read in (train, val)
    )
    leaks = leakage.find_leaks(ours, theirs)
    if cache is not None and ours and theirs:
        leaks |= leakage.find_copies(list(ours), list(theirs), cache)
    findings = []
    if leaks:
        pairs = tuple(f"{_below(root, a)} is {_below(root, b)}" for a, b in leaks.items())
        text = f"{len(leaks)} images to learn from are validation images: scores would be of what was learned"
        findings.append(Finding(level="error", check="leaks", text=text, culprits=pairs))
    names = {image_id: path.name for path, image_id in ours.items()}
    common = sorted(names.keys() & set(theirs.values()))
    if common:
        text = f"{len(common)} image ids are in both files, which does not matter: the images are others"
        # The number of an id that is a text is in no file.
        culprits = tuple(names[number] if number >> HASHED_BIT == 1 else str(number) for number in common)
        findings.append(Finding(level="note", check="ids", text=text, culprits=culprits))
    return findings


def _skip_leaks(findings: Sequence[Finding]) -> list[Finding]:
    """The same where the run leaves the people of such images out."""
    text = "; their people are left out (--data.on_leak skip)"
    return [
        dataclasses.replace(one, level="note", text=one.text + text) if one.check == "leaks" else one
        for one in findings
    ]


def _below(root: Path, path: Path) -> Path:
    return path.relative_to(root) if path.is_relative_to(root) else path


# ---- Before every training


def summarize(say: Callable[[object], object], sets: Sets, run: Config, lines: Sequence[str] = ()) -> None:
    """Say who a run learns from and what is wrong with their labels, in a few lines; no image is opened.

    Args:
        lines: what there is to say about their keypoints.

    Raises:
        UserError: labels that spoil the run.
    """
    for line in (*lines, sets, *augment.describe_transforms(run.augment)):
        say(line)
    findings = []
    for name, people in _opened(sets).items():
        findings += _under(name, _brief_faults(people, sets.skeleton, run, scored=name == "val"))
    heatmap_hw = model.get_size(run.model.name).heatmap_hw(run.data.input_hw)
    findings.append(label_checks.check_sigma(run.data.sigma, heatmap_hw))
    worst = [finding for level in LEVELS[:2] for finding in findings if finding.level == level]
    for finding in worst[:BRIEF_LINES]:
        say(f"{finding.level}: {_line(finding, shown=1)}")
    if worst:
        more = f"{len(worst) - BRIEF_LINES} more; " if len(worst) > BRIEF_LINES else ""
        say(f"{more}all of it, by name: `python -m sapiens_accel.doctor` with the options of this run")
    # That left and right look exchanged is no proof: whose people are so must be able to train.
    certain = [finding for finding in worst if finding.level == "error" and not finding.check.endswith("/mirror")]
    if certain:
        raise UserError(_line(certain[0], shown=1))


def check_evaluation(say: Callable[[object], object], sets: Sets, run: Config) -> None:
    """Go through all that evaluation needs of the data, before hours of training end with what could have been said.

    Raises:
        UserError: what evaluation would raise.
    """
    for finding in _evaluation_faults(sets.split(run.eval.split), sets.skeleton, run.eval):
        if finding.level == "error":
            raise UserError(finding.text)
        say(f"{finding.level}: {_line(finding, shown=1)}")


def _evaluation_faults(people: People, skeleton: Skeleton, config: EvalConfig) -> list[Finding]:
    """What is wrong, and what is to be known, with the annotations and boxes that people are evaluated by."""
    try:
        truth = read_ground_truth(people, skeleton.num_keypoints)
        boxes = load_boxes(config.boxes, people)
    except UserError as error:
        return [Finding(level="error", check="evaluation", text=str(error))]
    findings = []
    if truth.num_without_area and config.area == "annotation":
        text = (
            f"{truth.num_without_area} of {len(people)} people to evaluate have no 'area': OKS, and so AP, is measured "
            f"by {AREA_OF_BOX:g} of their box's"
        )
        findings.append(Finding(level="warning", check="area", text=text))
    if config.area == "annotation" and (line := _describe_small_areas(people)):
        findings.append(Finding(level="warning", check="area", text=line))
    findings += [Finding(level="warning", check="crowding", text=line) for line in describe_crowding(people, config)]
    if len(truth.categories) > 1:
        counts = Counter(truth.category_of.values())
        named = ", ".join(f"{name} {counts[one]}" for one, (_, name) in truth.categories.items())
        text = f"{len(truth.categories)} categories, evaluated together and each: {named}"
        findings.append(Finding(level="note", check="categories", text=text))
    lines = _describe_odd_categories(truth.categories, skeleton)
    findings += [Finding(level="warning", check="categories", text=line) for line in lines]
    if boxes.note and not boxes.labeled:
        findings.append(Finding(level="warning", check="boxes", text=boxes.note))
    return findings


def _describe_odd_categories(categories: Mapping[Any, tuple[Any, str]], skeleton: Skeleton) -> Iterator[str]:
    """Lines about evaluated categories that may be one, and those that training does not have."""
    names = Counter(name.casefold() for _, name in categories.values())
    twins = [f"{name} (id {show_value(given)})" for given, name in categories.values() if names[name.casefold()] > 1]
    if twins:
        yield (
            f"categories {', '.join(twins)} have one name, but for upper and lower case: AP is of each. Give them one "
            "id if they are one"
        )
    trained = {name.casefold() for name in skeleton.categories}
    others = [name for _, name in categories.values() if name.casefold() not in trained]
    if trained and others:
        yield (
            f"categories {', '.join(others[:SHOWN])}{', ...' * (len(others) > SHOWN)} are not among those of training "
            f"({', '.join(skeleton.categories[:SHOWN])}{', ...' * (len(skeleton.categories) > SHOWN)})"
        )


def _describe_small_areas(people: People) -> str:
    """A line about areas of another unit than px^2, by their median share of the box; empty where they are none."""
    areas, boxes = column_of(people.rows, "area"), column_of(people.rows, "box_area")
    chosen = (areas > 0) & (boxes > 0)
    share = float(np.median(areas[chosen] / boxes[chosen])) if chosen.any() else 1.0
    if share >= LEAST_AREA:
        return ""
    return (
        f"areas are {share:.1g} of the person's box in the median: fractions of the image, or another unit than px^2? "
        f"OKS is measured by them, and AP is far too low; --eval.area box takes {AREA_OF_BOX:g} of the box"
    )


def _opened(sets: Sets) -> dict[str, People]:
    """The sets of `_sets` as they were opened. Ids of one may be ids of another."""
    first, *others = sets.train.parts if sets.mixture else (sets.train,)
    return {"train": first, **{f"train {number}": one for number, one in enumerate(others, start=2)}, "val": sets.val}


def _brief_faults(people: People, skeleton: Skeleton, run: Config, *, scored: bool) -> list[Finding]:
    """Repeated ids among all, and what else is wrong with a sample of the people."""
    if isinstance(people.rows, streaming.StreamRows):
        some, features = list(streaming.sample(people, STREAMED_PEOPLE)), features_of(skeleton.num_keypoints)
        rows, again = datasets.Dataset.from_list(some, features=features), []
    else:
        rows = spread_rows(people.rows, BRIEF_PEOPLE)
        ids = column_of(people.rows, "ann_id")
        twice = np.flatnonzero(
            label_checks.is_repeated(ids)
        )  # names are read of these alone: all may be more than memory holds
        names = column_of(people.rows.select(twice), "file_name")
        given = read_given_ids(people, ids[twice])
        again = list(label_checks.find_repeated_ids(ids[twice], given, names, scored=scored))
    labels = Labels(
        ann_ids=column_of(rows, "ann_id"),
        given_ids=read_given_ids(people, column_of(rows, "ann_id")),
        file_names=column_of(rows, "file_name"),
        boxes_xywh=boxes_of(rows),
        areas=column_of(rows, "area"),
        keypoints=keypoints_of(rows),
        size_wh=np.full((len(rows), 2), np.nan),
        # A table does not say where a box is from; a box that the rule makes is not the annotated one's size.
        box_made=np.full(len(rows), run.data.boxes != "annotation"),
    )
    faults = label_checks.find_faults(labels, skeleton, scored=scored, run=run)
    return [*again, *(finding for finding in faults if finding.check != "ids")]


# ---- As text


def text_of(report: DoctorReport) -> str:
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
    """Sizes, and a table of keypoints: in how many of the people they are visible and occluded."""
    lines = []
    for name, of in people.items():
        noun = "person" if of["people"] == 1 else "people"
        each = f"{of['joints_labelled']:.1f} keypoints each"
        lines.append(f"{name}: {of['people']} {noun} in {count(of['pictures'], 'image')}, {each}")
        if of["people"]:
            sizes = (f"{key.replace('_', ' ')} {' | '.join(f'{size:.0f}' for size in of[key])}" for key in SIZES_TOLD)
            lines.append(f"  px, 5 % | median | 95 %: {'; '.join(sizes)}")
    lines += ["", f"{'keypoint':26}" + "".join(f"{f'{name} visible':>16}{'occluded':>10}" for name in people)]
    for name in next(iter(people.values()))["visible"]:
        shares = "".join(f"{of['visible'][name]:16.0%}{of['occluded'][name]:10.0%}" for of in people.values())
        lines.append(f"{name:26}{shares}")
    return lines
