"""docs/laboratory_animal.md on the data that it is about, to the letter: its YAML and its commands, one by one.

CollectedData.csv and the film are written from the test data's annotations and frames, in lightning-pose's layout.
"""

import csv
import json
import os
import re
import shutil
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import test_commands
from printed_commands import REPOSITORY, of_markdown

from sapiens_accel.inference.media import Film

pytestmark = [pytest.mark.launch, pytest.mark.slow]

DATA = Path(os.environ.get("SAPIENS_ACCEL_TEST_DATA", REPOSITORY.parent / "shared" / "data")) / "mirror_mouse"
PAGE = REPOSITORY / "docs" / "laboratory_animal.md"
FOUR_PX = 4.0  # of images of 250 x 256


def lay_out(folder: Path) -> None:
    """What a user of lightning-pose has: CollectedData.csv, labeled-data and a film."""
    (folder / "labeled-data").mkdir()
    rows, names = [], []
    for split in ("train", "val"):
        tree = json.loads((DATA / "annotations" / f"{split}.json").read_text())
        names = tree["categories"][0]["keypoints"]
        files = {image["id"]: image["file_name"] for image in tree["images"]}
        for one in tree["annotations"]:
            name = files[one["image_id"]]
            shutil.copy(DATA / split / name, folder / "labeled-data")
            points = np.array(one["keypoints"]).reshape(-1, 3).tolist()
            rows.append([f"labeled-data/{name}", *(value if v else "" for x, y, v in points for value in (x, y))])
    header = [
        ["scorer", *["rick"] * 2 * len(names)],
        ["bodyparts", *(name for name in names for _ in "xy")],
        ["coords", *["x", "y"] * len(names)],
    ]
    with (folder / "CollectedData.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows(header + sorted(rows))
    film = Film(folder / "session.mp4", 25)
    for path in sorted((DATA / "unlabelled").iterdir()):
        film.add(cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB))
    film.close()


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no {DATA}")
def test_the_page_as_printed(tmp_path: Path) -> None:
    lay_out(tmp_path)
    (tmp_path / "mouse.yaml").write_text(re.search(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL)[1])  # type: ignore[index]
    for name in ("train.py", "eval.py"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    commands = [printed.text for printed in of_markdown(PAGE)]
    assert len(commands) == 6
    scripts = test_commands._scripts(tmp_path / "bin")
    path = os.pathsep.join([str(Path(sys.executable).parent), str(scripts), os.environ["PATH"]])
    # One thread: other tests run beside this one.
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    environment["SAPIENS_ACCEL_CACHE"] = str(tmp_path / "cache")
    said = [test_commands._bash(command, tmp_path, environment, seconds=3000) for command in commands]
    assert "60 annotations (60 mouse)" in said[0] and "100 frames" in said[1]
    assert "mirrors no image" in said[3]
    print(said[4])
    assert _column(said[4], "ssl", "median_px") < FOUR_PX
    drawn = cv2.VideoCapture(str(tmp_path / "runs" / "mouse" / "images" / "session" / "drawn.mp4"))
    frame = drawn.read()[1].astype(int)
    assert drawn.get(cv2.CAP_PROP_FRAME_COUNT) == 140
    # The film is gray: colors are keypoints.
    assert (np.ptp(frame, axis=2) > 60).sum() > 100


def _column(table: str, row: str, column: str) -> float:
    """A number of a printed table: the first line with that column names it, then the line of that row."""
    lines = table.splitlines()
    first = next(number for number, line in enumerate(lines) if column in line.split())
    values = next(line.split() for line in lines[first:] if line.split()[:1] == [row])
    return float(values[1 + lines[first].split().index(column)])
