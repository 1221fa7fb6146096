"""Labels of other annotation tools, recognized by their first bytes: what to convert them with."""

import re
import shlex
from pathlib import Path

HEAD = 4096  # bytes that are looked at
MOST_FILES = 50  # of a folder
JSON_SIGNS = (
    ("labelme", re.compile(r'"shapes"\s*:\s*\[')),
    ("label_studio", re.compile(r'^\s*\[\s*\{.*"data"\s*:\s*\{', re.DOTALL)),
    ("animalpose", re.compile(r'"images"\s*:\s*\{')),
)
NAMES = {
    "deeplabcut": "DeepLabCut's labels",
    "lightning_pose": "labels of DeepLabCut or lightning-pose",
    "sleap": "SLEAP's labels",
    "label_studio": "an export of Label Studio",
    "cvat": "an export of CVAT",
    "yolo": "a YOLO dataset",
    "labelme": "labels of labelme",
    "mpii": "MPII's annotations",
    "animalpose": "AnimalPose's annotations",
}


def suggest_conversion(path: Path) -> str | None:
    """What a file or folder is, and the command that converts it; None where it is of no known tool."""
    try:
        found = _format_of_folder(path) if path.is_dir() else (_format_of_file(path), path)
    except OSError:
        return None
    if not found or not found[0]:
        return None
    command = f"sapiens-accel convert {found[0]} {shlex.quote(str(found[1]))} OUT"
    return f"{NAMES[found[0]]}. Convert: `{command}`"


def _format_of_folder(folder: Path) -> tuple[str, Path] | None:
    if (folder / "labeled-data").is_dir():
        return "deeplabcut", folder
    for file in sorted(path for path in folder.iterdir() if path.is_file())[:MOST_FILES]:
        # A COCO JSON beside labels of a tool: the folder is what --data.root says it is.
        if file.suffix == ".json" and '"annotations"' in _head(file) and not _format_of_file(file):
            return None
        if found := _format_of_file(file):
            whole = found in ("labelme", "yolo", "cvat", "lightning_pose")
            return found, folder if whole else file
    return None


def _format_of_file(file: Path) -> str | None:
    """The format of a file by its ending and first bytes."""
    ending = file.suffix.lower()
    if ending == ".slp":
        return "sleap"
    head = _head(file)
    if (
        ending == ".csv"
        and re.search(r"^bodyparts,", head, re.MULTILINE)
        and re.search(r"^coords,", head, re.MULTILINE)
    ):
        return "lightning_pose"
    if ending == ".h5" and file.name.startswith("CollectedData"):
        return "deeplabcut"
    if ending == ".xml" and "<annotations>" in head and ("<meta>" in head or "<version>1.1" in head):
        return "cvat"
    if ending in (".yaml", ".yml"):
        return "yolo" if re.search(r"^kpt_shape:", head, re.MULTILINE) else None
    if ending == ".mat":
        return "mpii" if file.name.startswith("mpii") else None
    if ending == ".json":
        return next((name for name, sign in JSON_SIGNS if sign.search(head)), None)
    return None


def _head(file: Path) -> str:
    with file.open("rb") as stream:
        return stream.read(HEAD).decode(errors="replace")
