"""docs/python_api.md as printed: every Python block, from top to bottom, in one session; and the API reference."""

import re
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from networks import untrained
from printed_commands import REPOSITORY

import sapiens_accel
from sapiens_accel.config.schema import STAGES
from sapiens_accel.evaluation.evaluate import METRICS
from sapiens_accel.inference.media import Film
from sapiens_accel.sources import synthetic

PAGE, REFERENCE = (REPOSITORY / "docs" / name for name in ("python_api.md", "api_reference.md"))


def test_the_reference_has_every_public_name() -> None:
    listed = [name.split(".")[-1] for name in re.findall(r"^::: (\S+)$", REFERENCE.read_text(), re.MULTILINE)]
    assert set(sapiens_accel.__all__) - {"__version__"} <= set(listed)


@pytest.mark.slow
def test_every_block_of_the_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = synthetic.write(tmp_path / "drawn", num_train=1, num_unlabelled=1, num_val=2)
    untrained(tmp_path / "WEIGHTS")
    shutil.copy(next((root / "val2017").iterdir()), tmp_path / "IMAGE.jpg")
    film = Film(tmp_path / "clip.mp4", 10)
    for _ in range(4):
        film.add(cv2.cvtColor(cv2.imread(str(tmp_path / "IMAGE.jpg")), cv2.COLOR_BGR2RGB))
    film.close()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SAPIENS_ACCEL_CACHE", str(tmp_path / "cache"))
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 5
    space: dict = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), space)
    said = capsys.readouterr().out
    assert "left_shoulder" in said and "2 0\n" in said and "clip_000002.jpg 0.2 [1]\nclip_000003.jpg" in said
    assert list(space["metrics"]) == list(STAGES) and space["metrics"]["ssl"].keys() >= set(METRICS)
    assert (tmp_path / "keypoints.csv").is_file() and space["drawn"].shape == (240, 240, 3)
    # Both crops are of one person, so their mean is near each.
    assert np.isfinite(space["image_xy"]).all() and space["image_xy"].shape == (17, 2)
