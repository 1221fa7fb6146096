"""Mutants of every tool's files are read or refused in one line: no other exception leaves a reader."""

import random
import re
from collections.abc import Callable
from pathlib import Path

import foreign
import pytest

from sapiens_accel.errors import UserError
from sapiens_accel.formats import convert

NUM_MUTANTS = 40
# The file that is changed, of what is written below a folder, and what is read.
FORMS: dict[str, tuple[str, Callable[[Path], Path], str]] = {
    "deeplabcut": ("deeplabcut", foreign.deeplabcut, "labeled-data/day1/CollectedData_Ann.csv"),
    "deeplabcut's config": ("deeplabcut", foreign.deeplabcut, "config.yaml"),
    "label_studio": ("label_studio", foreign.label_studio, "export.json"),
    "cvat": ("cvat", foreign.cvat_images, "annotations.xml"),
    "cvat's video": ("cvat", foreign.cvat_video, "annotations.xml"),
    "yolo": ("yolo", foreign.yolo, "data.yaml"),
    "yolo's labels": ("yolo", foreign.yolo, "labels/train/img001.txt"),
    "labelme": ("labelme", foreign.labelme, "day1/img001.json"),
    "mpii": ("mpii", foreign.mpii, "mpii_human_pose_v1_u12_1.mat"),
    "crowdpose": ("crowdpose", foreign.crowdpose, "crowdpose.json"),
}
ODD = ["null", "-1", '"x"', "[]", "{}", "1e999", "NaN", "", "0", '""', "true"]


def mutate(content: bytes, seed: int) -> bytes:
    """Cut it, remove or repeat a part, or put something odd in the place of a value."""
    chance = random.Random(seed)
    kind, size = chance.randrange(4), len(content)
    first = chance.randrange(size)
    last = min(first + chance.randrange(1, 40), size)
    if kind == 0:
        return content[:first]
    if kind == 1:
        return content[:first] + content[last:]
    if kind == 2:
        return content[:last] + content[first:last] + content[last:]
    text = content.decode("latin-1")
    values = list(re.finditer(r'(?<=[:,=\s\[])("[^"]*"|-?\d[\d.]*|\[[^\[\]]*\])', text))
    if not values:
        return content[:first] + b"\xff\x00" + content[last:]
    value = chance.choice(values)
    return (text[: value.start()] + chance.choice(ODD) + text[value.end() :]).encode("latin-1")


@pytest.mark.parametrize("form", FORMS)
def test_mutants_are_read_or_refused(tmp_path: Path, form: str) -> None:
    name, make, changed = FORMS[form]
    (tmp_path / "in").mkdir() if name in ("label_studio", "crowdpose") else None
    source = make(tmp_path / "in")
    file = tmp_path / "in" / changed
    content, refused = file.read_bytes(), 0
    for seed in range(NUM_MUTANTS):
        # scipy's compiled reader of .mat files does not survive every change of their bytes: those are cut only.
        mutant = content[: seed * len(content) // NUM_MUTANTS] if name == "mpii" else mutate(content, seed)
        file.write_bytes(mutant)
        out = tmp_path / f"out{seed}"
        try:
            convert.main([name, str(source), str(out), "--link"])
        except UserError as error:
            refused += 1
            assert "\n" not in str(error) and not out.exists(), seed
        except Exception as error:
            raise AssertionError(f"mutant {seed} of {form}") from error
    assert refused > 0
