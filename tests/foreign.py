"""Small inputs in the layouts of other tools, all of the same six images with the same labels.

Two sessions of three images, one or two mice in each, four keypoints; some are not labeled. By a tool's own writer:
SLEAP's .slp, and YOLO and Label Studio as sleap-io writes them. The others by the tools' documentation: DeepLabCut and
lightning-pose (CollectedData), CVAT's XML 1.1, labelme, MPII's README, and Label Studio's and YOLO's for what sleap-io
leaves out of them. `formats/written/` has the same of DeepLabCut, labelme and ultralytics by the tools' own writers.
"""

import csv
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import scipy.io
import yaml

NAMES = ("nose", "left_ear", "right_ear", "tail")
EDGES = ((0, 1), (0, 2), (0, 3))
WIDTH, HEIGHT = 320, 240
SESSIONS = ("day1", "day2")


@dataclass
class Mouse:
    """Its keypoints as x, y, v, and its box."""

    points: np.ndarray
    box: tuple[float, float, float, float]


@dataclass
class Shot:
    """An image and the mice in it."""

    session: str
    name: str
    mice: list[Mouse] = field(default_factory=list)

    @property
    def path(self) -> str:
        return f"{self.session}/{self.name}"


def shots(animals: int = 2) -> list[Shot]:
    """Six images; of two mice, the second is in every other one."""
    random = np.random.default_rng(5)
    made = []
    for number in range(6):
        shot = Shot(SESSIONS[number // 3], f"img{number:03d}.png")
        for animal in range(animals if number % 2 else 1):
            left, top = 20 + 150 * animal, 30
            points = np.column_stack([random.uniform((left, top), (left + 110, top + 160), (4, 2)).round(2), [2] * 4])
            if number == 2:
                points[3] = 0
            shot.mice.append(Mouse(points, (left - 10.0, top - 10.0, 130.0, 180.0)))
        made.append(shot)
    return made


def write_images(folder: Path, every: list[Shot]) -> None:
    for number, shot in enumerate(every):
        pixels = np.full((HEIGHT, WIDTH, 3), 40 * number, np.uint8)
        for mouse in shot.mice:
            for x, y, v in mouse.points:
                if v:
                    cv2.circle(pixels, (round(x), round(y)), 3, (0, 255, 255), -1)
        (folder / shot.session).mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(folder / shot.path), pixels)


# ---- DeepLabCut and lightning-pose, by their documentation


def deeplabcut(folder: Path, animals: int = 1, index_columns: int = 3, unique: bool = False) -> Path:
    """A project with config.yaml and a CollectedData file for each video."""
    every = shots(animals)
    write_images(folder / "labeled-data", every)
    config = {"Task": "open field", "scorer": "Ann", "skeleton": [[NAMES[a], NAMES[b]] for a, b in EDGES]}
    key = "multianimalbodyparts" if animals > 1 else "bodyparts"
    (folder / "config.yaml").write_text(yaml.safe_dump({**config, key: list(NAMES)}))
    for session in SESSIONS:
        rows = collected_data([one for one in every if one.session == session], animals, index_columns, unique)
        with (folder / "labeled-data" / session / "CollectedData_Ann.csv").open("w", newline="") as stream:
            csv.writer(stream).writerows(rows)
    return folder


def collected_data(every: list[Shot], animals: int, index_columns: int, unique: bool = False) -> list[list[Any]]:
    individuals = [f"mouse{number + 1}" for number in range(animals)] if animals > 1 else [""]
    columns = [(one, name, xy) for one in individuals for name in NAMES for xy in "xy"]
    columns += [("single", "corner", xy) for xy in "xy"] if unique else []
    blank = [""] * (index_columns - 1)
    rows: list[list[Any]] = [["scorer", *blank, *["Ann"] * len(columns)]]
    rows += [["individuals", *blank, *(one for one, _, _ in columns)]] if animals > 1 else []
    rows += [["bodyparts", *blank, *(name for _, name, _ in columns)]]
    rows += [["coords", *blank, *(xy for _, _, xy in columns)]]
    for shot in every:
        path = ["labeled-data", shot.session, shot.name]
        row: list[Any] = path if index_columns == 3 else ["/".join(path)]
        for animal in range(animals):
            points = shot.mice[animal].points if animal < len(shot.mice) else np.zeros((4, 3))
            row += [value if v else "" for x, y, v in points.tolist() for value in (x, y)]
        rows.append([*row, *([5.0, 7.0] if unique else [])])
    return rows


# ---- SLEAP, by sleap-io


def sleap(folder: Path, embed: bool = False) -> Path:
    """labels.slp of two image sequences, or with its images in it."""
    labels = sleap_labels(folder)
    file = folder / ("labels.pkg.slp" if embed else "labels.slp")
    labels.save(str(file), embed="user" if embed else False)
    return file


def sleap_labels(folder: Path) -> Any:
    import sleap_io as sio

    every = shots()
    write_images(folder, every)
    skeleton = sio.Skeleton(list(NAMES), edges=[(NAMES[a], NAMES[b]) for a, b in EDGES], name="mouse")
    skeleton.add_symmetry("left_ear", "right_ear")
    frames = []
    for session in SESSIONS:
        mine = [shot for shot in every if shot.session == session]
        video = sio.Video.from_filename([str(folder / shot.path) for shot in mine])
        for index, shot in enumerate(mine):
            instances = [sio.Instance.from_numpy(_nan(mouse.points), skeleton=skeleton) for mouse in shot.mice]
            frames.append(sio.LabeledFrame(video=video, frame_idx=index, instances=instances))
    return sio.Labels(frames)


def _nan(points: np.ndarray) -> np.ndarray:
    return np.where(points[:, 2:] > 0, points[:, :2], np.nan)


# ---- The others, by their documentation


def label_studio(folder: Path, link: str = "parent") -> Path:
    """An export with a rectangle for each mouse and its points by parent, relation or place."""
    every = shots()
    write_images(folder / "scratch", every)
    (folder / "images").mkdir(parents=True)
    for shot in every:
        (folder / "scratch" / shot.path).rename(folder / "images" / shot.name)
    tasks = []
    for number, shot in enumerate(every):
        result: list[dict[str, Any]] = []
        size = {"original_width": WIDTH, "original_height": HEIGHT, "image_rotation": 0}
        for animal, mouse in enumerate(shot.mice):
            x, y, w, h = mouse.box
            owner = f"box{animal}"
            value = {"x": x / WIDTH * 100, "y": y / HEIGHT * 100, "width": w / WIDTH * 100, "height": h / HEIGHT * 100}
            value |= {"rotation": 0, "rectanglelabels": ["mouse"]}
            result.append({**size, "id": owner, "type": "rectanglelabels", "value": value})
            for name, (px, py, v) in zip(NAMES, mouse.points.tolist(), strict=True):
                if v:
                    region = f"{owner}{name}"
                    at = {"x": px / WIDTH * 100, "y": py / HEIGHT * 100, "width": 0.5, "keypointlabels": [name]}
                    item = {**size, "id": region, "type": "keypointlabels", "value": at}
                    result.append(item | ({"parentID": owner} if link == "parent" else {}))
                    if link == "relation":
                        result.append({"type": "relation", "from_id": region, "to_id": owner, "direction": "right"})
        image = f"/data/upload/1/abcd1234-{shot.name}"
        task = {"id": number + 1, "data": {"image": image}, "annotations": [{"id": 1, "result": result}]}
        tasks.append(task)
    file = folder / "export.json"
    file.write_text(json.dumps(tasks))
    return file


def cvat_images(folder: Path) -> Path:
    """CVAT for images 1.1: skeletons, of which one point is occluded, and a shape that is none of ours."""
    every = shots()
    write_images(folder / "images", every)
    images = []
    for number, shot in enumerate(every):
        shapes = "".join(_cvat_skeleton(mouse, number == 0) for mouse in shot.mice)
        shapes += '<polygon label="mouse" points="1,1;2,2;3,1"/>' * (number == 5)
        size = f'width="{WIDTH}" height="{HEIGHT}"'
        images.append(f'<image id="{number}" name="{shot.path}" {size}>{shapes}</image>')
    file = folder / "annotations.xml"
    file.write_text(f"<annotations><version>1.1</version>{_cvat_meta()}{''.join(images)}</annotations>")
    return folder


def _cvat_skeleton(mouse: Mouse, occluded: bool) -> str:
    points = []
    for name, (x, y, v) in zip(NAMES, mouse.points.tolist(), strict=True):
        state = f'outside="{int(not v)}" occluded="{int(occluded and name == "tail")}"'
        points.append(f'<points label="{name}" {state} points="{x:.2f},{y:.2f}"/>')
    return f'<skeleton label="mouse" source="manual" z_order="0">{"".join(points)}</skeleton>'


def _cvat_meta() -> str:
    lines = "".join(f'&lt;line data-type="edge" data-node-from="{a + 1}" data-node-to="{b + 1}"&gt;' for a, b in EDGES)
    circles = "".join(
        f'&lt;circle data-element-id="{number}" data-node-id="{number}" data-label-name="{name}"&gt;'
        for number, name in enumerate(NAMES, 1)
    )
    labels = f"<label><name>mouse</name><type>skeleton</type><svg>{lines}{circles}</svg></label>"
    labels += "".join(f"<label><name>{name}</name><type>points</type><parent>mouse</parent></label>" for name in NAMES)
    return f"<meta><task><labels>{labels}</labels></task></meta>"


def cvat_video(folder: Path) -> Path:
    """CVAT for video 1.1: a track with two key frames, one that is interpolated, and its end."""
    every = [shot for shot in shots(1) if shot.session == "day1"]
    (folder / "images").mkdir(parents=True)
    frames = []
    for number, shot in enumerate(every):
        cv2.imwrite(str(folder / "images" / f"frame_{number:06d}.PNG"), np.full((HEIGHT, WIDTH, 3), 9, np.uint8))
        is_key = int(number != 1)
        points = "".join(
            f'<points label="{name}" keyframe="{is_key}" outside="{int(not v)}" occluded="0" points="{x:.2f},{y:.2f}"/>'
            for name, (x, y, v) in zip(NAMES, shot.mice[0].points.tolist(), strict=True)
        )
        frames.append(f'<skeleton frame="{number}" keyframe="{is_key}">{points}</skeleton>')
    track = f'<track id="0" label="mouse" source="manual">{"".join(frames)}</track>'
    (folder / "annotations.xml").write_text(f"<annotations>{_cvat_meta()}{track}</annotations>")
    return folder


def yolo(folder: Path, dims: int = 3) -> Path:
    """data.yaml with kpt_names, images/{train,val} and labels/{train,val}."""
    every = shots()
    for number, shot in enumerate(every):
        split = "val" if number >= 4 else "train"
        write_images(folder / "scratch", [shot])
        image = folder / "images" / split / shot.name
        image.parent.mkdir(parents=True, exist_ok=True)
        (folder / "scratch" / shot.path).rename(image)
        lines = []
        for mouse in shot.mice:
            x, y, w, h = mouse.box
            box = [(x + w / 2) / WIDTH, (y + h / 2) / HEIGHT, w / WIDTH, h / HEIGHT]
            points = [(px / WIDTH, py / HEIGHT, v)[:dims] for px, py, v in mouse.points.tolist()]
            lines.append(
                " ".join(["0", *(f"{value:.7g}" for value in [*box, *(n for point in points for n in point)])])
            )
        label = folder / "labels" / split / f"{image.stem}.txt"
        label.parent.mkdir(parents=True, exist_ok=True)
        label.write_text("\n".join(lines))
    tree = {"path": "/elsewhere/mice", "train": "images/train", "val": "images/val", "names": {0: "mouse"}}
    tree |= {"kpt_shape": [4, dims], "flip_idx": [0, 2, 1, 3], "kpt_names": {0: list(NAMES)}}
    (folder / "data.yaml").write_text(yaml.safe_dump(tree))
    return folder


def labelme(folder: Path) -> Path:
    """A JSON beside each image: a rectangle and points for each mouse, of one group_id."""
    every = shots()
    write_images(folder, every)
    for shot in every:
        shapes = []
        for group, mouse in enumerate(shot.mice):
            x, y, w, h = mouse.box
            shapes.append(_shape("mouse", [[x, y], [x + w, y + h]], "rectangle", group))
            for name, (px, py, v) in zip(NAMES, mouse.points.tolist(), strict=True):
                if v:
                    shapes.append(_shape(name, [[px, py]], "point", group))
        tree = {"version": "5.5.0", "flags": {}, "shapes": shapes, "imagePath": shot.name, "imageData": None}
        file = (folder / shot.path).with_suffix(".json")
        file.write_text(json.dumps(tree | {"imageHeight": HEIGHT, "imageWidth": WIDTH}))
    return folder


def _shape(label: str, points: list[list[float]], kind: str, group: int) -> dict[str, Any]:
    return {"label": label, "points": points, "group_id": group, "shape_type": kind, "flags": {}, "description": ""}


def mpii(folder: Path) -> Path:
    """The .mat of MPII's README: 16 joints from 1, an image of the test set, one person alone and several."""
    every = shots()
    write_images(folder / "images", every)
    images = []
    for number, shot in enumerate(every):
        people = []
        for mouse in shot.mice:
            points = [
                {"x": x + 1, "y": y + 1, "id": joint, "is_visible": number % 2}
                for joint, (x, y, v) in zip((9, 15, 10, 0), mouse.points.tolist(), strict=True)
                if v
            ]
            people.append({"annopoints": {"point": _structs(points)}, "objpos": {"x": 1.0, "y": 1.0}, "scale": 1.0})
        images.append({"image": {"name": shot.path}, "annorect": _structs(people), "vididx": number // 3 + 1})
    images.append(
        {"image": {"name": "test.jpg"}, "annorect": _structs([{"objpos": {"x": 1.0, "y": 1.0}}]), "vididx": 9}
    )
    release = {"annolist": _structs(images), "img_train": np.array([1] * 6 + [0])}
    scipy.io.savemat(str(folder / "mpii_human_pose_v1_u12_1.mat"), {"RELEASE": release})
    return folder


def _structs(rows: list[dict[str, Any]]) -> np.ndarray:
    """A MATLAB struct array."""
    array = np.empty((1, len(rows)), [(name, object) for name in rows[0]])
    for number, row in enumerate(rows):
        array[0, number] = tuple(row.values())
    return array


# ---- Datasets that are nearly COCO's, by what their authors publish


def crowdpose(folder: Path, edges_from: int = 0) -> Path:
    """A JSON without areas, with crowdIndex, and edges that count from 0."""
    every = shots()
    write_images(folder / "images", every)
    images, annotations = [], []
    for number, shot in enumerate(every):
        size = {"width": WIDTH, "height": HEIGHT}
        images.append({"id": 100 + number, "file_name": shot.path, "crowdIndex": 0.5, **size})
        for mouse in shot.mice:
            points = [value for point in mouse.points.tolist() for value in point]
            ids = {"id": 7000 + len(annotations), "image_id": 100 + number, "category_id": 3}
            annotations.append({**ids, "keypoints": points, "bbox": list(mouse.box), "iscrowd": 0})
    edges = [[a + edges_from, b + edges_from] for a, b in EDGES]
    category = {"id": 3, "name": "mouse", "supercategory": "mouse", "keypoints": list(NAMES), "skeleton": edges}
    file = folder / "crowdpose.json"
    file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": [category]}))
    return file
