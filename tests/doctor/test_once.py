"""The doctor says each fault once, and with the ids that the file has."""

import dataclasses
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_broken_inputs import TRAIN, drawn, root, run

from sapiens_accel.config.schema import Config
from sapiens_accel.data import build
from sapiens_accel.doctor import environment, report
from sapiens_accel.doctor.labels import Finding

__all__ = ["drawn", "root", "run"]
Tree = dict[str, Any]
VAL = TRAIN.replace("train", "val")


def _spoil(file: Path, change: Callable[[Tree], Any]) -> None:
    tree = json.loads(file.read_text())
    change(tree)
    file.write_text(json.dumps(tree))


def _without_file(run: Config, text: str) -> str:
    for name in (TRAIN, VAL):
        text = text.replace(f"{run.data.root}/{name}: ", "")
    return text


def _said(run: Config, tmp_path: Path) -> list[Finding]:
    return report.examine(run, environment.Launch(), tmp_path / "doctor").findings


FAULTS: dict[str, tuple[str, Callable[[Tree], Any], str]] = {
    "an image's id is null": (TRAIN, lambda t: t["images"][0].update(id=None), "expected an id that is a whole number"),
    "an image has no name": (VAL, lambda t: t["images"][0].pop("file_name"), "expected id and file_name"),
    "an annotation is null": (TRAIN, lambda t: t["annotations"].append(None), "expected an object"),
    "a name is there twice": (
        TRAIN, lambda t: t["categories"][0]["keypoints"].__setitem__(1, "nose"), "'nose' is there twice",
    ),
    "no boxes": (TRAIN, lambda t: [one.pop("bbox") for one in t["annotations"]], "has a box ('bbox')"),
    "a box of no width": (TRAIN, lambda t: t["annotations"][0]["bbox"].__setitem__(2, 0), "no box with a width and"),
    "v of -1": (TRAIN, lambda t: t["annotations"][0]["keypoints"].__setitem__(2, -1), "v of 0 or less"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_said_once(run: Config, root: Path, tmp_path: Path, fault: str) -> None:
    """Some were said by each reader that met them: up to three times."""
    file, change, text = FAULTS[fault]
    _spoil(root / file, change)
    about = [one for one in _said(run, tmp_path) if text in " ".join([one.text, *one.culprits])]
    assert len(about) == 1, about
    texts = Counter(_without_file(run, finding.text) for finding in _said(run, tmp_path))
    assert max(texts.values()) == 1 or fault == "no boxes", texts


def test_a_file_that_is_no_json_is_said_once(run: Config, root: Path, tmp_path: Path) -> None:
    (root / TRAIN).write_text("{")
    about = [one for one in _said(run, tmp_path) if "not JSON" in one.text]
    assert [one.check for one in about] == ["train/json"]


def test_text_ids_stand_in_findings_and_errors_as_the_file_has_them(run: Config, root: Path, tmp_path: Path) -> None:
    """They were 62-bit numbers that are in no file."""

    def spoil(tree: Tree) -> None:
        for place, one in enumerate(tree["annotations"]):
            one["id"] = f"ann-{max(place, 1)}"
        one = tree["annotations"][0]
        one["keypoints"][:3] = [900, 900, 2]

    _spoil(root / VAL, spoil)
    found = {finding.check: finding for finding in _said(run, tmp_path)}
    assert found["val/ids"].culprits[0].startswith("annotation 'ann-1' (")
    assert found["val/keypoints"].culprits[0].startswith("annotation 'ann-")
    said: list[object] = []
    skeleton, _ = build.open_skeleton(run.data)
    with pytest.raises(report.UserError, match=r"annotation 'ann-1' \("):
        report.summarize(said.append, build.open_people(run.data, skeleton, unlabeled=False), run)
    assert [word for line in said for word in str(line).split() if len(word) > 18 and word.isdigit()] == []


def test_num_keypoints_counts_scores_from_the_threshold_on(run: Config, root: Path) -> None:
    def as_scores(tree: Tree) -> None:
        for one in tree["annotations"]:
            one["keypoints"][2::3] = [0.3 if k % 2 else 0.8 for k in range(17)]
            one["num_keypoints"] = 9

    _spoil(root / TRAIN, as_scores)
    for threshold, is_wrong in ((0.5, False), (0.2, True)):
        at = dataclasses.replace(run, data=dataclasses.replace(run.data, visibility_threshold=threshold))
        checks = {finding.check for finding in report.check_data(at)[0].findings}
        assert ("train/num_keypoints" in checks) == is_wrong
