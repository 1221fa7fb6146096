"""Labels of other annotation tools, recognized by their first bytes: what to convert them with."""

import os
import re
import shlex
from pathlib import Path

HEAD = 4096  # bytes that are looked at
MOST_FILES = 50  # of a folder
JSON_SIGNS = (
    ("labelme", re.compile(r'"shapes"\s*:\s*\[')),
    ("label_studio", re.compile(r'^\s*\[\s*\{.*"(annotations|completions|keypointlabels)"\s*:\s*\[', re.DOTALL)),
    ("animalpose", re.compile(r'"images"\s*:\s*\{\s*"[^"]*"\s*:\s*"')),  # a name for each id
)
TOOLS = {
    "deeplabcut": "a project of DeepLabCut",
    "lightning_pose": "labels of DeepLabCut or lightning-pose",
    "sleap": "labels of SLEAP",
    "label_studio": "an export of Label Studio",
    "cvat": "an export of CVAT",
    "yolo": "a YOLO dataset",
    "labelme": "labels of labelme",
    "mpii": "annotations of MPII",
    "animalpose": "annotations of AnimalPose",
}
SEVERAL_FILES = ("labelme", "yolo", "cvat", "lightning_pose")  # of which the folder is converted
ENDINGS = (".slp", ".csv", ".h5", ".xml", ".yaml", ".yml", ".mat", ".json")


def suggest_conversion(path: Path) -> str:
    """What a file or folder is of, and the command that converts it, as the end of a message; empty: of no known tool.

    It is for what was refused already: a folder in COCO's form may hold a tool's files too.
    """
    try:
        tool, path = _tool_of_folder(path) if path.is_dir() else (_tool_of_file(path), path)
        path = path.parent if tool == "labelme" and path.is_file() else path  # it has a file for each image
    except OSError:
        return ""
    if tool is None:
        return ""
    command = f"sapiens-accel convert {tool} {shlex.quote(str(path))} OUT"
    return f". It is {TOOLS[tool]}: `{command}` makes it a folder for --data.root"


def _tool_of_folder(folder: Path) -> tuple[str | None, Path]:
    if (folder / "labeled-data").is_dir():
        return "deeplabcut", folder
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if entry.name.lower().endswith(ENDINGS))[:MOST_FILES]
    for file in (folder / name for name in names):
        if tool := _tool_of_file(file):
            return tool, folder if tool in SEVERAL_FILES else file
    return None, folder


def _tool_of_file(file: Path) -> str | None:
    """The tool that wrote a file, by its ending and first bytes."""
    ending = file.suffix.lower()
    if ending not in ENDINGS or not file.is_file():
        return None
    with file.open("rb") as stream:
        head = stream.read(HEAD).decode(errors="replace")
    is_table = all(re.search(rf"^{word},", head, re.MULTILINE) for word in ("bodyparts", "coords"))
    by_ending = {
        ".slp": "sleap",
        ".csv": "lightning_pose" if is_table else None,
        ".h5": "deeplabcut" if file.name.startswith("CollectedData") else None,
        ".xml": "cvat" if "<annotations>" in head and ("<meta>" in head or "<image " in head) else None,
        ".mat": "mpii" if file.name.startswith("mpii") else None,
        ".json": next((name for name, sign in JSON_SIGNS if sign.search(head)), None),
    }
    is_yolo = ending in (".yaml", ".yml") and re.search(r"^kpt_shape:", head, re.MULTILINE)
    return "yolo" if is_yolo else by_ending.get(ending)
