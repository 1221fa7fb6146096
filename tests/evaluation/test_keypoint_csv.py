"""The CSV of predictions: what pandas reads of it is what was predicted, in both shapes."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from sapiens_accel.errors import UserError
from sapiens_accel.evaluation import keypoint_csv
from sapiens_accel.evaluation.keypoint_csv import ImageRow, PersonRow

NAMES = ("nose", 'tail, "tip"', "paw\nleft")  # a name may hold whatever a CSV must quote


def _person(seed: int, category: str = "mouse", annotation_id: int | str = "") -> PersonRow:
    rng = np.random.default_rng(seed)
    return PersonRow(rng.uniform(0, 500, (3, 2)), rng.uniform(0, 1, 3), float(rng.uniform()), category, annotation_id)


def _read_wide(file: Path, header: Sequence[int]) -> pd.DataFrame:
    return pd.read_csv(file, header=list(header), index_col=0)


def test_long_has_a_line_for_each_keypoint(tmp_path: Path) -> None:
    rows = [
        ImageRow("a,b/c.jpg", [_person(0, annotation_id=7), _person(1, "rat", "x1")], "0012"),
        ImageRow("empty.jpg", [], 3),
        ImageRow("film.mp4", [_person(2)], 4, frame=9),
    ]
    table = pd.read_csv(keypoint_csv.write_csv(tmp_path / "k.csv", NAMES, "long", rows), dtype={"image_id": str})
    assert tuple(table.columns) == keypoint_csv.COLUMNS and len(table) == 9
    assert table.image.tolist() == ["a,b/c.jpg"] * 6 + ["film.mp4"] * 3
    assert table.image_id.tolist() == ["0012"] * 6 + ["4"] * 3
    assert table.frame.isna().tolist() == [True] * 6 + [False] * 3 and set(table.frame.dropna()) == {9}
    assert table.person.tolist() == [1] * 3 + [2] * 3 + [1] * 3
    assert table.keypoint.tolist() == list(NAMES) * 3
    assert table.category.tolist() == ["mouse"] * 3 + ["rat"] * 3 + ["mouse"] * 3
    assert table.annotation_id.fillna("").tolist() == ["7"] * 3 + ["x1"] * 3 + [""] * 3
    people = [person for row in rows for person in row.people]
    assert table[["x", "y"]].to_numpy() == pytest.approx(np.concatenate([one.points_xy for one in people]), abs=6e-4)
    assert table.score.to_numpy() == pytest.approx(np.concatenate([one.scores for one in people]), abs=6e-6)
    assert table.person_score.to_numpy() == pytest.approx(np.repeat([one.score for one in people], 3), abs=6e-6)


def test_deeplabcuts_table_has_three_header_rows(tmp_path: Path) -> None:
    people = {0: None, 1: _person(0), 2: _person(2)}  # a first line without values is a frame as well
    rows = [ImageRow("film.mp4", [one] if one else [], index, frame=index) for index, one in people.items()]
    table = _read_wide(keypoint_csv.write_csv(tmp_path / "k.csv", NAMES, "deeplabcut", rows), (0, 1, 2))
    assert list(table.columns.names) == ["scorer", "bodyparts", "coords"]
    assert list(table.columns) == [("sapiens_accel", name, part) for name in NAMES for part in ("x", "y", "likelihood")]
    assert table.index.tolist() == [0, 1, 2], "frames"
    assert table.loc[0].isna().all(), "nobody was found"
    for frame in (1, 2):
        person = people[frame]
        assert person is not None
        expected = np.column_stack([person.points_xy, person.scores])
        assert table.loc[frame].to_numpy().reshape(3, 3) == pytest.approx(expected, abs=6e-4)


def test_several_animals_have_a_fourth_as_deeplabcuts_own(tmp_path: Path) -> None:
    rows = [ImageRow("a.png", [_person(0), _person(1)]), ImageRow("b.png", [_person(2)])]
    table = _read_wide(keypoint_csv.write_csv(tmp_path / "k.csv", NAMES, "deeplabcut", rows), (0, 1, 2, 3))
    assert list(table.columns.names) == ["scorer", "individuals", "bodyparts", "coords"]
    assert table.index.tolist() == ["a.png", "b.png"]
    second = table.xs("individual2", axis=1, level="individuals")
    assert second.loc["a.png"].to_numpy().reshape(3, 3)[:, :2] == pytest.approx(_person(1).points_xy, abs=6e-4)
    assert second.loc["b.png"].isna().all()


def test_nobody_at_all_is_a_table_without_values(tmp_path: Path) -> None:
    file = keypoint_csv.write_csv(tmp_path / "k.csv", NAMES, "deeplabcut", [ImageRow("a.png", [])])
    table = _read_wide(file, (0, 1, 2))
    assert table.shape == (1, 9) and table.isna().all().all()
    assert (
        keypoint_csv.write_csv(tmp_path / "l.csv", NAMES, "long", []).read_text()
        == ",".join(keypoint_csv.COLUMNS) + "\n"
    )


def test_a_file_appears_when_it_is_whole(tmp_path: Path) -> None:
    table = keypoint_csv.KeypointCsv(tmp_path / "new" / "k.csv", NAMES, "long")
    table.add(ImageRow("a.png", [_person(0)]))
    assert not table.file.exists()
    table.close()
    assert [path.name for path in table.file.parent.iterdir()] == ["k.csv"]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^--eval\.csv: .*k\.csv: not written: "):
        keypoint_csv.KeypointCsv(tmp_path / "file" / "k.csv", NAMES, "long")


def test_an_error_leaves_nothing_behind(tmp_path: Path) -> None:
    def rows() -> Iterator[ImageRow]:
        yield ImageRow("a.png", [_person(0)])
        raise ValueError("an image")

    with pytest.raises(ValueError, match="an image"):
        keypoint_csv.write_csv(tmp_path / "k.csv", NAMES, "long", rows())
    assert not list(tmp_path.iterdir())
    (tmp_path / "k.csv").mkdir()  # what is not a file cannot be replaced
    with pytest.raises(UserError, match=r"^--eval\.csv: .*k\.csv: not written: "):
        keypoint_csv.write_csv(tmp_path / "k.csv", NAMES, "long", [])
    assert [path.name for path in tmp_path.iterdir()] == ["k.csv"]
