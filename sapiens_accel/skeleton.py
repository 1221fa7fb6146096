"""What a set of keypoints means: names, mirror order, OKS sigmas, body halves, drawing edges."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Skeleton:
    """One set of K keypoints.

    Attributes:
        names: the K keypoint names, in the order of every array in this project.
        mirror: `mirror[k]` is the keypoint that k becomes in a mirrored picture (itself on the body's midline).
        sigmas: the K per-keypoint constants of object keypoint similarity (OKS), as fractions of sqrt(area).
        upper: indices of the upper body, for the half-body crop.
        edges: pairs of indices to join with a line in pictures.
    """

    names: tuple[str, ...]
    mirror: tuple[int, ...]
    sigmas: tuple[float, ...]
    upper: tuple[int, ...]
    edges: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        k = len(self.names)
        assert len(self.mirror) == len(self.sigmas) == k
        assert all(self.mirror[self.mirror[i]] == i for i in range(k)), "mirroring twice must change nothing"

    @property
    def num_keypoints(self) -> int:
        return len(self.names)

    @property
    def lower(self) -> tuple[int, ...]:
        return tuple(k for k in range(self.num_keypoints) if k not in self.upper)


def mirror_by_name(names: Sequence[str]) -> tuple[int, ...]:
    """The mirror order that left/right in the names imply.

    Raises:
        ValueError: a left keypoint has no right partner of the same name.
    """
    index = {name: k for k, name in enumerate(names)}
    swapped = [_swap_side(name) for name in names]
    lonely = [name for name, other in zip(names, swapped, strict=True) if other not in index]
    if lonely:
        raise ValueError(f"keypoint {lonely[0]!r} has no mirror partner {_swap_side(lonely[0])!r}")
    return tuple(index[name] for name in swapped)


def _swap_side(name: str) -> str:
    if "left" in name:
        return name.replace("left", "right")
    return name.replace("right", "left")


_COCO17_NAMES = (
    "nose", "left_eye", "right_eye", "left_ear", "right_ear", "left_shoulder", "right_shoulder", "left_elbow",
    "right_elbow", "left_wrist", "right_wrist", "left_hip", "right_hip", "left_knee", "right_knee", "left_ankle",
    "right_ankle",
)  # fmt: skip

COCO17 = Skeleton(
    names=_COCO17_NAMES,
    mirror=mirror_by_name(_COCO17_NAMES),
    # pycocotools.cocoeval.Params.setKpParams, https://cocodataset.org/#keypoints-eval
    sigmas=(.026, .025, .025, .035, .035, .079, .079, .072, .072, .062, .062, .107, .107, .087, .087, .089, .089),
    upper=tuple(range(11)),
    edges=(
        (15, 13), (13, 11), (16, 14), (14, 12), (11, 12), (5, 11), (6, 12), (5, 6), (5, 7), (6, 8), (7, 9), (8, 10),
        (1, 2), (0, 1), (0, 2), (1, 3), (2, 4), (3, 5), (4, 6),
    ),
)  # fmt: skip
