"""MPII Human Pose: mpii_human_pose_v1_u12_1.mat, whose layout its README gives (annolist, img_train, video_list).

Coordinates of MATLAB begin at 1, so 1 is subtracted. Joints whose is_visible is 0 get v = 1. The images of one video
come into one split. There are no boxes of people (objpos and scale give a square): they are made from the keypoints.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import scipy.io

from sapiens_accel.errors import UserError
from sapiens_accel.formats.dataset import (
    OCCLUDED,
    VISIBLE,
    ImageFinder,
    PoseCategory,
    PoseDataset,
    PoseImage,
    PoseInstance,
)  # fmt: skip
from sapiens_accel.sources.coco import reason

# In the order of the ids 0 to 15.
NAMES = (
    "right_ankle", "right_knee", "right_hip", "left_hip", "left_knee", "left_ankle", "pelvis", "thorax", "upper_neck",
    "head_top", "right_wrist", "right_elbow", "right_shoulder", "left_shoulder", "left_elbow", "left_wrist",
)  # fmt: skip
EDGES = (
    (0, 1), (1, 2), (2, 6), (6, 3), (3, 4), (4, 5), (6, 7), (7, 8), (8, 9), (10, 11), (11, 12), (12, 7), (7, 13),
    (13, 14), (14, 15),
)  # fmt: skip


def read(path: Path, images: Path | None = None) -> PoseDataset:
    """The people of the training images (img_train = 1): the joints of the others are not published.

    Raises:
        UserError: no such file, another layout, images that are not there.
    """
    file = next(iter(sorted(path.rglob("mpii_human_pose*.mat"))), path) if path.is_dir() else path
    try:
        release = scipy.io.loadmat(str(file), struct_as_record=False, squeeze_me=True)["RELEASE"]
        entries, in_training = _list(release.annolist), np.atleast_1d(release.img_train)
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror or error}") from None
    except Exception as error:  # of scipy's reader
        raise UserError(
            f"{file}: no release of MPII (expected RELEASE with annolist and img_train): {reason(error)}"
        ) from None
    finder = ImageFinder([images] if images else [file.parent, file.parent / "images", file.parent.parent / "images"])
    left_out: Counter[str] = Counter()
    pose_images = []
    for number, (entry, is_training) in enumerate(zip(entries, in_training, strict=True)):
        try:
            name = str(entry.image.name)
            instances = list(_people(entry, left_out)) if is_training else []
            video = _list(getattr(entry, "vididx", None))
        except (AttributeError, TypeError, ValueError) as error:
            raise UserError(f"{file}: annolist({number + 1}): {reason(error)}") from None
        left_out["images of the test set"] += not is_training
        left_out["images without a labeled person"] += bool(is_training and not instances)
        if instances and (source := finder.find(name)):
            group = f"video {video[0]}" if video else None
            pose_images.append(PoseImage(name=name, source=source, instances=instances, group=group))
    finder.check(file)
    category = PoseCategory(name="person", keypoints=NAMES, edges=EDGES)
    return PoseDataset(categories=[category], images=pose_images, left_out=left_out)


def _list(value: Any) -> list[Any]:
    """A struct array as a list: one alone and none are squeezed by the reader."""
    if value is None:
        return []
    return list(np.atleast_1d(value)) if not isinstance(value, np.ndarray) or value.size else []


def _people(entry: Any, left_out: Counter[str]) -> Iterator[PoseInstance]:
    for person in _list(getattr(entry, "annorect", None)):
        points = _list(getattr(getattr(person, "annopoints", None), "point", None))
        if not points:
            left_out["people without joints"] += 1
            continue
        keypoints = np.zeros((len(NAMES), 3))
        for point in points:
            is_visible = _list(getattr(point, "is_visible", None))
            v = OCCLUDED if is_visible and int(is_visible[0]) == 0 else VISIBLE
            keypoints[int(point.id)] = float(point.x) - 1, float(point.y) - 1, v
        yield PoseInstance(category=0, keypoints=keypoints)
