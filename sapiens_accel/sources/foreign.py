"""Labels of other annotation tools, recognized by their first bytes: what to convert them with."""

import os
import re
import shlex
from fnmatch import fnmatchcase
from pathlib import Path

from sapiens_accel.config.commands import CONVERT_FORMATS

HEAD = 4096  # bytes that are looked at
MOST_FILES = 50  # of a folder
# Tools by the name of a file and what is in its first bytes; the first line that fits counts.
SIGNS = tuple(
    (tool, name, re.compile(sign, re.MULTILINE | re.DOTALL))
    for tool, name, sign in (
        ("sleap", "*.slp", ""),
        ("nwb", "*.nwb", ""),
        ("deeplabcut", "CollectedData*.h5", ""),
        ("mpii", "mpii*.mat", ""),
        ("lightning_pose", "*.csv", r"^bodyparts,.*^coords,"),
        ("cvat", "*.xml", r"<annotations>.*(<meta>|<image )"),
        ("yolo", "*.yaml", r"^kpt_shape:"),
        ("yolo", "*.yml", r"^kpt_shape:"),
        ("labelme", "*.json", r'"shapes"\s*:\s*\['),
        ("label_studio", "*.json", r'\A\s*\[\s*\{.*"(annotations|completions|keypointlabels)"\s*:\s*\['),
        ("animalpose", "*.json", r'"images"\s*:\s*\{\s*"[^"]*"\s*:\s*"'),  # a name for each id
        ("v7", "*.json", r'"schema_ref"\s*:\s*"[^"]*darwin'),
        ("datumaro", "*.json", r'"dm_format_version"'),
        ("supervisely", "*.json", r'"objects"\s*:\s*\[.*"(geometryType|classTitle)"\s*:'),
        ("via", "*.json", r'"_via_img_metadata"\s*:|"shape_attributes"\s*:'),
        ("coco", "*.json", r'\A\s*\{.*"(images|annotations|categories)"\s*:\s*\['),
    )
)
NOT_CONVERTED = {
    "zip": "It is a ZIP: unpack it, and name the folder or the file in it",
    "v7": "It is of V7 (darwin): export it there in COCO's form",
    "datumaro": "It is of Datumaro, whose own conversion to coco_person_keypoints writes COCO's form",
    "supervisely": "It is of Supervisely: export it there as COCO keypoints",
    "via": "It is of VIA (VGG Image Annotator): export it there in COCO's form",
    "nwb": "It is NWB: in SLEAP's or DeepLabCut's own form it can be converted",
}
SEVERAL_FILES = ("labelme", "yolo", "cvat", "lightning_pose")  # of which the folder is converted
ENDINGS = tuple({Path(name).suffix for _, name, _ in SIGNS})
ZIP = b"PK\x03\x04"


def suggest_conversion(path: Path) -> str:
    """What a file or folder is of, and the command that converts it, as the end of a message; empty: of no known tool.

    It is for what was refused already: a folder in COCO's form may hold a tool's files too.
    """
    try:
        is_folder = path.is_dir()
        tool, path = find_tool(path)
    except OSError:
        return ""
    if tool == "coco" and not is_folder:  # what is wrong with it is no matter of its form
        return ""
    if tool == "coco":
        folder = path.parent
        return (
            f". COCO JSONs are named by --data.train_annotations and --data.val_annotations, their images by "
            f"--data.train_images and --data.val_images (found {_list_coco(folder)} in {folder})"
        )
    if tool in NOT_CONVERTED:
        return f". {NOT_CONVERTED[tool]}"
    if tool is None:
        return ""
    command = f"sapiens-accel convert {tool} {shlex.quote(str(path))} OUT"
    return f". Found {CONVERT_FORMATS[tool]}: `{command}` writes a folder for --data.root"


def find_tool(path: Path) -> tuple[str | None, Path]:
    """The tool that wrote a file or what is in a folder or one level below it, and what to convert.

    Raises:
        OSError: it cannot be read.
    """
    tool, found = _tool_of_folder(path) if path.is_dir() else (_tool_of_file(path), path)
    return tool, found.parent if tool == "labelme" and found.is_file() else found  # it has a file for each image


def _list_coco(folder: Path) -> str:
    files = [file.name for file in _files_of_tools(folder) if _tool_of_file(file) == "coco"]
    return ", ".join(files[:4]) + ", ..." * (len(files) > 4)


def _files_of_tools(folder: Path) -> list[Path]:
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if entry.name.lower().endswith(ENDINGS))[:MOST_FILES]
    return [folder / name for name in names]


def _tool_of_folder(folder: Path) -> tuple[str | None, Path]:
    with os.scandir(folder) as entries:
        below = sorted(entry.name for entry in entries if entry.is_dir())[:MOST_FILES]
    if "labeled-data" in below:
        return "deeplabcut", folder
    coco = None
    for place in (folder, *(folder / name for name in below)):
        for file in _files_of_tools(place):
            tool = _tool_of_file(file)
            coco = coco or (file if tool == "coco" else None)
            if tool not in (None, "coco"):
                # labelme's files of several folders are converted together.
                return tool, (folder if tool == "labelme" else place) if tool in SEVERAL_FILES else file
    return ("coco", coco) if coco else (None, folder)


def _tool_of_file(file: Path) -> str | None:
    """The tool that wrote a file, by its ending and first bytes."""
    if not file.is_file():
        return None
    with file.open("rb") as stream:
        start = stream.read(HEAD)
    ending = file.suffix.lower()
    if start.startswith(ZIP):
        return "zip" if ending in (".zip", *ENDINGS) and ending != ".json" else None  # JSON: sources/coco names it
    if ending not in ENDINGS:
        return None
    head, name = start.decode(errors="replace"), file.stem + ending
    return next((tool for tool, names, sign in SIGNS if fnmatchcase(name, names) and sign.search(head)), None)
