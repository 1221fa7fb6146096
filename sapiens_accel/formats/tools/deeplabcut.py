"""Labels of DeepLabCut and lightning-pose: CollectedData*.csv and .h5.

The layout is DeepLabCut's: header rows scorer, (individuals,) bodyparts, coords; a row for each image, whose name
stands in one column (labeled-data/SESSION/img01.png) or in three. An empty coordinate is a keypoint without a label.
In a project of several animals the individual `single` has the body parts that are there once: a category of its own.
"""

import csv
import importlib
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from sapiens_accel.errors import UserError, read_tree
from sapiens_accel.formats.dataset import (
    DEFAULT_CATEGORY,
    VISIBLE,
    ImageFinder,
    PoseCategory,
    PoseDataset,
    PoseImage,
    PoseInstance,
    find_edges,
    order_names,
)  # fmt: skip

PATTERN = "CollectedData*"
FOLDER = "labeled-data"
SINGLE = "single"  # DeepLabCut's individual of unique body parts
LEVELS_ABOVE = 3  # a project's config.yaml lies at most so far above its CSV files

Column = tuple[str, str, str]  # individual ("" where there is one animal), body part, coordinate


@dataclass(frozen=True, kw_only=True)
class LabelTable:
    """A CollectedData file: each column's individual, body part and coordinate, and each image's values."""

    file: Path
    columns: list[Column]
    rows: list[tuple[str, list[float]]]


def read(path: Path, images: Path | None = None) -> PoseDataset:
    """The labels of a project, a folder of CollectedData files, or such a file.

    Raises:
        UserError: no such files, or broken ones; predictions; images that are not there.
    """
    tables = [_read_table(file) for file in _find_files(path)]
    config = _find_config(path)
    categories, individuals = _categories(tables, config)
    left_out: Counter[str] = Counter()
    pose_images = []
    for table in tables:
        above = [table.file.parent, *table.file.parent.parents[:LEVELS_ABOVE]]
        finder = ImageFinder([images] if images else above)
        for name, values in table.rows:
            file = finder.find(name)
            instances = list(_instances(dict(zip(table.columns, values, strict=True)), categories, individuals))
            left_out["images without a label"] += not instances
            if file and instances:
                pose_images.append(PoseImage(name=_short(name), source=file, instances=instances, group=_session(name)))
        finder.check(table.file)
    return PoseDataset(categories=categories, images=pose_images, left_out=left_out)


def _find_files(path: Path) -> list[Path]:
    """One file of each table: the CSV where there is one, since DeepLabCut writes both."""
    if path.is_file() and path.name != "config.yaml":
        return [path]
    folder = path.parent if path.is_file() else path
    files = [file for depth in ("", "*/", f"{FOLDER}/*/") for file in sorted(folder.glob(f"{depth}{PATTERN}"))]
    tables = {file.with_suffix(""): file for file in files if file.suffix == ".h5"}
    tables |= {file.with_suffix(""): file for file in files if file.suffix == ".csv"}
    if not tables:
        raise UserError(f"{path}: no {PATTERN}.csv or .h5 in it (expected in the folder, or in {FOLDER}/VIDEO)")
    return list(tables.values())


def _find_config(path: Path) -> dict[str, Any]:
    for folder in [path, *path.resolve().parents[: LEVELS_ABOVE + 1]]:
        if (file := folder if folder.name == "config.yaml" else folder / "config.yaml").is_file():
            tree = read_tree(file, yaml.safe_load, "YAML")
            if "bodyparts" in tree or "multianimalbodyparts" in tree:
                return tree
    return {}


# ---- Tables


def _read_table(file: Path) -> LabelTable:
    if file.suffix == ".h5":
        return _read_hdf(file)
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            rows = list(csv.reader(stream))
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    except (ValueError, csv.Error) as error:
        raise UserError(f"{file}: not CSV: {error}") from None
    header = {row[0].strip().lower(): row for row in rows[:4] if row}
    last = next((number for number, row in enumerate(rows[:4]) if row and row[0].strip().lower() == "coords"), None)
    if last is None or "bodyparts" not in header:
        raise UserError(
            f"{file}: no table of DeepLabCut or lightning-pose (expected header rows scorer, bodyparts, coords, found "
            f"{', '.join(row[0] for row in rows[:3] if row) or 'nothing'})"
        )
    coords = header["coords"]
    # The name of an image is one column, or three of which the header names the first.
    first = next((number for number, word in enumerate(coords) if number and word.strip()), len(coords))
    individuals = header.get("individuals", [""] * len(coords))
    columns = list(zip(individuals[first:], header["bodyparts"][first:], coords[first:], strict=True))
    _check_columns(file, columns)
    labeled = []
    for number, row in enumerate(rows[last + 1 :], last + 2):
        if not any(cell.strip() for cell in row):
            continue
        if len(row) != len(coords):
            raise UserError(f"{file}: line {number}: expected {len(coords)} columns, found {len(row)}")
        labeled.append(("/".join(row[:first]), [_number(cell, file, number) for cell in row[first:]]))
    return LabelTable(file=file, columns=columns, rows=labeled)


def _number(cell: str, file: Path, line: int) -> float:
    try:
        return float(cell) if cell.strip() else math.nan
    except ValueError:
        raise UserError(f"{file}: line {line}: expected a coordinate or nothing, found {cell[:60]!r}") from None


def _read_hdf(file: Path) -> LabelTable:
    try:
        importlib.import_module("tables")
    except ImportError:
        raise UserError(
            f"{file}: an HDF5 table, which needs PyTables; or convert the CSV that DeepLabCut writes beside it. "
            f"Install it with `pip install sapiens_accel[formats]`"
        ) from None
    import pandas as pd

    try:
        frame = pd.DataFrame(pd.read_hdf(file))
        names = list(frame.columns.names)
        levels = [names.index(level) if level in names else None for level in ("individuals", "bodyparts", "coords")]
        if None in levels[1:]:
            raise ValueError(f"levels {names}, expected bodyparts and coords")
    except Exception as error:  # PyTables, h5py and pickled indices have many
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{file}: no table of DeepLabCut that can be read: {reason}") from None
    of_levels = [
        [""] * frame.shape[1] if level is None else frame.columns.get_level_values(level).astype(str)
        for level in levels
    ]
    columns = list(zip(*of_levels, strict=True))
    _check_columns(file, columns)
    rows = [
        ("/".join(map(str, index)) if isinstance(index, tuple) else str(index), [float(value) for value in values])
        for index, values in zip(frame.index, frame.to_numpy(), strict=True)
    ]
    return LabelTable(file=file, columns=columns, rows=rows)


def _check_columns(file: Path, columns: Sequence[Column]) -> None:
    kinds = {coordinate for _, _, coordinate in columns}
    if "likelihood" in kinds:
        raise UserError(
            f"{file}: predictions of a network (a column likelihood), expected labels: {PATTERN}.csv. To use them as "
            f"labels, remove that column and the rows that are wrong"
        )
    if kinds != {"x", "y"}:
        raise UserError(f"{file}: expected coordinates x and y, found {', '.join(sorted(kinds)) or 'none'}")


# ---- What they mean


def _categories(tables: Sequence[LabelTable], config: dict[str, Any]) -> tuple[list[PoseCategory], list[str]]:
    """The categories, and the individuals in their order."""
    columns = [column for table in tables for column in table.columns]
    individuals = order_names([[individual for individual, _, _ in columns]])
    parts = order_names([[part for individual, part, _ in columns if individual != SINGLE]])
    unique = order_names([[part for individual, part, _ in columns if individual == SINGLE]])
    edges = config.get("skeleton") or []
    kinds = [(DEFAULT_CATEGORY, parts)] * bool(parts) + [(SINGLE, unique)] * bool(unique)
    return [
        PoseCategory(name=name, keypoints=tuple(points), edges=find_edges(edges, points)) for name, points in kinds
    ], individuals


def _instances(
    values: dict[Column, float], categories: Sequence[PoseCategory], individuals: Sequence[str]
) -> Iterator[PoseInstance]:
    """Each individual that has a label in an image."""
    for individual in individuals:
        category = len(categories) - 1 if individual == SINGLE else 0
        points = [
            [values.get((individual, name, coordinate), math.nan) for coordinate in ("x", "y")]
            for name in categories[category].keypoints
        ]
        keypoints = np.array([(0, 0, 0) if math.isnan(x + y) else (x, y, VISIBLE) for x, y in points], float)
        if keypoints[:, 2].any():
            yield PoseInstance(category=category, keypoints=keypoints)


def _short(name: str) -> str:
    """SESSION/img01.png of labeled-data/SESSION/img01.png."""
    parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".", "..")]
    return "/".join(parts[parts.index(FOLDER) + 1 :] if FOLDER in parts[:-1] else parts[-2:])


def _session(name: str) -> str | None:
    """The folder of an image, which DeepLabCut makes for each video."""
    folders = _short(name).rsplit("/", 1)[:-1]
    return folders[0] if folders else None
