"""SLEAP's labels, .slp and .pkg.slp, through sleap-io."""

import importlib
import math
from collections import Counter
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from jaxtyping import UInt8
from numpy import ndarray as Array

from sapiens_accel.errors import UserError
from sapiens_accel.formats.dataset import (
    DEFAULT_CATEGORY,
    VISIBLE,
    ImageFinder,
    PoseCategory,
    PoseDataset,
    PoseImage,
    PoseInstance,
)  # fmt: skip


def read(path: Path, images: Path | None = None) -> PoseDataset:
    """The labels of a .slp file. Frames of videos are decoded, images that it embeds are taken out.

    Raises:
        UserError: sleap-io is not installed, the file is broken, a video or an image is not there.
    """
    labels = _load(path)
    skeletons = list(labels.skeletons)
    categories = [_category(skeleton) for skeleton in skeletons]
    left_out: Counter[str] = Counter()
    finder = ImageFinder([images] if images else [path.parent])
    videos = [_Footage(number, video, finder) for number, video in enumerate(labels.videos)]
    finder.check(path)
    pose_images = []
    for frame in labels.labeled_frames:
        video = videos[next(number for number, one in enumerate(labels.videos) if one is frame.video)]
        user = list(frame.user_instances)
        left_out["predicted instances"] += len(frame.instances) - len(user)
        instances = [_instance(one, skeletons) for one in user]
        instances = [one for one in instances if one.keypoints[:, 2].any()]
        left_out["instances without a visible point"] += len(user) - len(instances)
        left_out["frames without a labeled instance"] += not instances
        if instances:
            pose_images.append(video.image(int(frame.frame_idx), instances))
    return PoseDataset(categories=categories, images=pose_images, left_out=left_out)


def _load(path: Path) -> Any:
    try:
        sleap_io = importlib.import_module("sleap_io")
    except ImportError:
        raise UserError(
            f"{path}: SLEAP's files are read by sleap-io, which is not installed. Install it with "
            f"`pip install sapiens_accel[formats]`"
        ) from None
    if not path.is_file() or path.suffix.lower() != ".slp":
        found = path.suffix or "a folder" if path.exists() else "no such file"
        raise UserError(
            f"{path}: expected SLEAP's labels, NAME.slp or NAME.pkg.slp, found {found}. Analysis files have no "
            f"images: name the project that they were made from"
        )
    try:
        return sleap_io.load_slp(str(path), open_videos=False)
    except Exception as error:  # h5py, JSON and attrs have many
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{path}: no SLEAP file that can be read: {reason}") from None


def _category(skeleton: Any) -> PoseCategory:
    names = tuple(skeleton.node_names)
    pairs = tuple(sorted(tuple(sorted(node.name for node in one.nodes)) for one in skeleton.symmetries))
    # SLEAP numbers the skeletons that have no name of their own.
    is_named = skeleton.name and not skeleton.name.lower().startswith("skeleton")
    return PoseCategory(
        name=skeleton.name if is_named else DEFAULT_CATEGORY,
        keypoints=names,
        edges=tuple((int(a), int(b)) for a, b in skeleton.edge_inds),
        mirror=pairs or None,
    )


def _instance(one: Any, skeletons: list[Any]) -> PoseInstance:
    # Points that are not visible have coordinates that SLEAP put there.
    points = np.asarray(one.numpy(), float)[:, :2]
    rows = [(0.0, 0.0, 0.0) if math.isnan(x + y) else (x, y, VISIBLE) for x, y in points.tolist()]
    keypoints = np.array(rows, float)
    category = next(number for number, skeleton in enumerate(skeletons) if skeleton is one.skeleton)
    return PoseInstance(category=category, keypoints=keypoints)


def _label(filename: str | list[str]) -> str:
    """The name of a film without its ending, or of the folder of a list of images."""
    path = PurePosixPath((filename if isinstance(filename, str) else filename[0]).replace("\\", "/"))
    return path.stem.removesuffix(".pkg") if isinstance(filename, str) else path.parent.name


class _Footage:
    """A video of the labels: a film, a list of images, or images that the file embeds."""

    def __init__(self, number: int, video: Any, finder: ImageFinder) -> None:
        self.video = video
        names = video.filename if isinstance(video.filename, list) else None
        embedded = not names and str(video.filename).lower().endswith(".slp")
        self.files = [finder.find(name) for name in names] if names else None
        origin = video.source_video if embedded and video.source_video is not None else video
        self.group = f"{number:02d}_{_label(origin.filename)}"
        if not names and (file := finder.find(str(video.filename))):
            video.replace_filename(str(file), open=True)

    def image(self, index: int, instances: list[PoseInstance]) -> PoseImage:
        """A frame with these instances."""
        if self.files:
            file = self.files[index]
            assert file is not None  # missing ones were named before
            return PoseImage(name=f"{self.group}/{file.name}", source=file, instances=instances, group=self.group)
        name = f"{self.group}/{index:06d}.jpg"
        return PoseImage(name=name, source=partial(self._frame, index), instances=instances, group=self.group)

    def _frame(self, index: int) -> UInt8[Array, "h w 3"]:
        """
        Raises:
            UserError: it does not decode.
        """
        try:
            pixels = np.asarray(self.video[index])
        except Exception as error:  # of the backend that sleap-io has chosen
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise UserError(f"{self.video.filename}: frame {index} does not decode: {reason}") from None
        return np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels[..., :3]
