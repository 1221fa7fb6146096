"""What a set of keypoints means: names, mirror order, OKS sigmas, body halves, drawing edges."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from sapiens_accel.pose.person_boxes import PeopleSizes
from sapiens_accel.pose.sides import mirror_by_name, side_of, words


@dataclass(frozen=True, kw_only=True)
class Skeleton:
    """One set of K keypoints.

    Attributes:
        names: the K keypoint names, in the order of every array in this project.
        mirror: `mirror[k]` is the keypoint that k becomes in a mirrored image (itself on the body's midline).
        sigmas: the K per-keypoint constants of object keypoint similarity (OKS), as fractions of sqrt(area).
        upper: indices of the upper body, for the half-body crop.
        edges: pairs of indices to join with a line in images.
        mirror_known: False where nothing says which keypoints are left and right. Then `mirror` is a guess (each
            keypoint its own), and no image may be mirrored: on 68-point faces that cost 17.4 px of error for 6.5.
        categories: the names of the categories that have these keypoints; empty: person.
        people: how large people are in the training images, where that is known.
        image_bits: `data.image_bits` of the training, where it was given.
        box_padding: `data.box_padding` of the training, where that is known.

    Raises:
        ValueError: names that are not text or not unique, indices out of range, sigmas outside of (0, 1].
    """

    names: tuple[str, ...]
    mirror: tuple[int, ...]
    sigmas: tuple[float, ...]
    upper: tuple[int, ...]
    edges: tuple[tuple[int, int], ...]
    mirror_known: bool = True
    categories: tuple[str, ...] = field(default=(), compare=False)
    people: PeopleSizes | None = field(default=None, compare=False)
    image_bits: int | None = field(default=None, compare=False)
    box_padding: float | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        k = len(self.names)
        if not all(isinstance(name, str) for name in self.names) or len(set(self.names)) != k:
            raise ValueError("names: expected different names")
        indices = (*self.mirror, *self.upper, *(index for edge in self.edges for index in edge))
        if not all(type(index) is int and 0 <= index < k for index in indices):
            raise ValueError(f"mirror, upper and edges: expected whole numbers from 0 to {k - 1}")
        if len(self.mirror) != k or not all(self.mirror[self.mirror[i]] == i for i in range(k)):
            raise ValueError("mirror: mirroring twice must change nothing")
        # NaN is in no interval. A sigma of 0 divides by zero, a negative one makes AP of a useless network 50.
        wrong = [sigma for sigma in self.sigmas if type(sigma) not in (int, float) or not 0 < sigma <= 1]
        if len(self.sigmas) != k or wrong:
            raise ValueError(f"sigmas: expected {k} numbers above 0 and up to 1, found {(wrong or self.sigmas)[:3]}")

    @property
    def num_keypoints(self) -> int:
        return len(self.names)

    @cached_property  # drawing reads it at each keypoint, and there may be 10,000 names
    def sides(self) -> tuple[str | None, ...]:
        """left or right for each keypoint whose name says so; None on the midline and without a mirror partner."""
        return tuple(side_of(name, self.names[self.mirror[k]]) for k, name in enumerate(self.names))

    @property
    def lower(self) -> tuple[int, ...]:
        return tuple(k for k in range(self.num_keypoints) if k not in self.upper)

    def select(self, names: Sequence[str]) -> "Skeleton":
        """The skeleton of the named keypoints alone, in this order; names are compared by their words.

        A keypoint whose mirror partner is not among them becomes its own partner.
        """
        index_of = {words(name): k for k, name in enumerate(self.names)}
        chosen = [index_of[words(name)] for name in names]
        new = {k: index for index, k in enumerate(chosen)}
        return Skeleton(
            names=tuple(self.names[k] for k in chosen),
            mirror=tuple(new.get(self.mirror[k], index) for index, k in enumerate(chosen)),
            sigmas=tuple(self.sigmas[k] for k in chosen),
            upper=tuple(sorted(new[k] for k in self.upper if k in new)),
            edges=tuple((new[a], new[b]) for a, b in self.edges if a in new and b in new),
            mirror_known=self.mirror_known,
            categories=self.categories,
            people=self.people,
            image_bits=self.image_bits,
            box_padding=self.box_padding,
        )


def skeleton_from_tree(tree: Mapping[str, Any]) -> Skeleton:
    """The skeleton that a skeleton.json holds.

    Raises:
        KeyError, TypeError, ValueError: a key is missing, or its value is no part of a skeleton.
    """
    lists = {key: tuple(tree[key]) for key in ("names", "mirror", "sigmas", "upper")}
    sizes = tree.get("people")  # like the categories, it is missing in files of earlier versions
    bits = tree.get("image_bits")
    if bits is not None and (type(bits) is not int or not 8 <= bits <= 16):
        raise ValueError(f"image_bits: expected a number from 8 to 16, found {bits!r}")
    padding = tree.get("box_padding")
    if padding is not None and (type(padding) not in (int, float) or not 0 < padding <= sys.float_info.max):
        raise ValueError(f"box_padding: expected a number above 0, found {str(padding)[:20]}")
    return Skeleton(
        **lists,
        edges=tuple((a, b) for a, b in tree["edges"]),
        mirror_known=bool(tree.get("mirror_known", True)),
        categories=tuple(map(str, tree.get("categories") or ())),
        people=PeopleSizes(share=tuple(sizes["share"]), aspect=tuple(sizes["aspect"])) if sizes else None,
        image_bits=bits,
        box_padding=padding,
    )


def _read_built_in(name: str) -> Skeleton:
    return skeleton_from_tree(json.loads(Path(__file__).with_name(f"{name}.json").read_text(encoding="utf-8")))


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


# The same in files: keys and form are those of the skeleton.json beside exported weights.
# COCO-WholeBody (Jin et al. 2020, https://github.com/jin-s13/COCO-WholeBody): body, feet, face and hands; sigmas of its
# evaluation/myeval_wholebody.py. All but legs and feet belong to the upper half.
WHOLEBODY133 = _read_built_in("wholebody133")
# Sapiens' own ("Goliath"; facebookresearch/sapiens, pose/configs/_base_/datasets/goliath.py without its teeth). Sigmas
# as published: COCO-WholeBody's of the same name, else a neighbor's, 0.010 in the face. The names of the lips'
# midpoints have no side, so these have no mirror partner, as published. (There the eyebrows have none either.)
SAPIENS308 = _read_built_in("sapiens308")

# The skeletons of published weights, by their number of keypoints.
PUBLISHED = {skeleton.num_keypoints: skeleton for skeleton in (COCO17, WHOLEBODY133, SAPIENS308)}
BUILT_IN = {"coco17": COCO17, "wholebody133": WHOLEBODY133, "sapiens308": SAPIENS308}
