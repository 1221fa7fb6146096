"""What a set of keypoints means: names, mirror order, OKS sigmas, body halves, drawing edges."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

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

    Raises:
        ValueError: names that are none or stand twice, indices of other keypoints, sigmas outside of (0, 1].
    """

    names: tuple[str, ...]
    mirror: tuple[int, ...]
    sigmas: tuple[float, ...]
    upper: tuple[int, ...]
    edges: tuple[tuple[int, int], ...]
    mirror_known: bool = True
    categories: tuple[str, ...] = field(default=(), compare=False)
    people: PeopleSizes | None = field(default=None, compare=False)

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

    @cached_property  # of 10,000 names; it is asked for at each keypoint that is drawn
    def sides(self) -> tuple[str | None, ...]:
        """Left or right of each keypoint whose name tells; None on the midline, and of what has no partner."""
        return tuple(side_of(name, self.names[self.mirror[k]]) for k, name in enumerate(self.names))

    @property
    def lower(self) -> tuple[int, ...]:
        return tuple(k for k in range(self.num_keypoints) if k not in self.upper)

    def of(self, names: Sequence[str]) -> "Skeleton":
        """Those of the keypoints that are named, in this order and by these words; a partner that is not stays away."""
        place = {words(name): k for k, name in enumerate(self.names)}
        chosen = [place[words(name)] for name in names]
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
        )


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


# ---- COCO-WholeBody (Jin et al. 2020, https://github.com/jin-s13/COCO-WholeBody): body, feet, face, hands

_FEET = tuple(f"{side}_{part}" for side in ("left", "right") for part in ("big_toe", "small_toe", "heel"))
_FINGERS = ("thumb", "forefinger", "middle_finger", "ring_finger", "pinky_finger")


def _whole_body_names() -> tuple[str, ...]:
    hands = []
    for side in ("left", "right"):
        hands += [f"{side}_hand_root", *(f"{side}_{finger}{joint}" for finger in _FINGERS for joint in range(1, 5))]
    return *_COCO17_NAMES, *_FEET, *(f"face-{i}" for i in range(68)), *hands


def _whole_body_mirror(names: tuple[str, ...]) -> tuple[int, ...]:
    """Face points have no side in their names: within each range (first, last), i becomes total - i."""
    mirror, face = list(mirror_by_name(names)), names.index("face-0")
    ranges = (  # jaw, brows, tip of the nose, eyes' upper and lower lids, lips
        (0, 16, 16), (17, 26, 43), (31, 35, 66), (36, 39, 81), (40, 41, 87), (42, 45, 81), (46, 47, 87), (48, 54, 102),
        (55, 59, 114), (60, 64, 124), (65, 67, 132),
    )  # fmt: skip
    for first, last, total in ranges:
        for i in range(first, last + 1):
            mirror[face + i] = face + total - i
    return tuple(mirror)


def _whole_body_edges(names: tuple[str, ...], knuckle: str) -> tuple[tuple[int, int], ...]:
    """COCO's, the feet's, and every finger's from the wrist by its knuckle (the end of its name) to the tip."""
    pairs = [(_COCO17_NAMES[a], _COCO17_NAMES[b]) for a, b in COCO17.edges]
    pairs += [(f"{point.split('_')[0]}_ankle", point) for point in _FEET]
    for side in ("left", "right"):
        for finger in _FINGERS:
            joints = [f"{side}_{finger}{joint}" for joint in (knuckle, 2, 3, 4)]
            pairs += pairwise([f"{side}_wrist", *joints])
    return tuple((names.index(a), names.index(b)) for a, b in pairs)


_WHOLEBODY133_NAMES = _whole_body_names()
_WHOLEBODY133_HAND_SIGMAS = (
    .029, .022, .035, .037, .047, .026, .025, .024, .035, .018, .024, .022, .026, .017, .021, .021, .032, .020, .019,
    .022, .031,
)  # fmt: skip

WHOLEBODY133 = Skeleton(
    names=_WHOLEBODY133_NAMES,
    mirror=_whole_body_mirror(_WHOLEBODY133_NAMES),
    # evaluation/myeval_wholebody.py of the data set
    sigmas=(
        *COCO17.sigmas,
        .068, .066, .066, .092, .094, .094,
        .042, .043, .044, .043, .040, .035, .031, .025, .020, .023, .029, .032, .037, .038, .043, .041, .045,
        .013, .012, .011, .011, .012, .012, .011, .011, .013, .015, .009, .007, .007, .007, .012, .009, .008, .016,
        .010, .017, .011, .009, .011, .009, .007, .013, .008, .011, .012, .010,
        .034, .008, .008, .009, .008, .008, .007, .010, .008, .009, .009, .009, .007, .007, .008, .011, .008, .008,
        .008, .010, .008,
        *_WHOLEBODY133_HAND_SIGMAS, *_WHOLEBODY133_HAND_SIGMAS,
    ),
    # All but legs and feet: the face and the hands belong to the upper half.
    upper=tuple(k for k in range(133) if not 11 <= k < 23),
    edges=_whole_body_edges(_WHOLEBODY133_NAMES, "1"),
)  # fmt: skip


# ---- Sapiens' own 308 ("Goliath"; facebookresearch/sapiens, pose/configs/_base_/datasets/goliath.py without its teeth)


def _named(pattern: str, words: str) -> list[str]:
    """The pattern with each of the words in place of its star."""
    return [pattern.replace("*", word) for word in words.split()]


def _eye(side: str, lid: str) -> list[str]:
    """One lid: its lash line, its own line, the crease above the upper one; each side has an order of its own."""
    lash, line = {
        "l": ("2 1 6 5 4 3", ("midpoint_6 midpoint_2 midpoint_5 centerpoint midpoint_4 midpoint_1 midpoint_3")),
        "r": ("1 2 3 4 5 6", ("midpoint_3 midpoint_1 midpoint_4 centerpoint midpoint_5 midpoint_2 midpoint_6")),
    }[side]
    names = _named(f"{side}_*_of_{lid}_lash_line", "inner_end outer_end centerpoint")
    names += _named(f"{side}_midpoint_*_of_{lid}_lash_line", lash)
    names += _named(f"{side}_*_of_{lid}_eyelid_line", f"outer_end {line}")
    return names + (_named(f"{side}_*_of_upper_crease_line", line) if lid == "upper" else [])


def _lips(which: str) -> list[str]:
    sides = [f"{side}_{which}_corner_of_mouth" for side in "rl"]
    top = "center_of_cupid_bow" if which == "outer" else "center_of_upper_inner_lip"
    halves = [_named(f"midpoint_*_of_{half}_{which}_lip", "1 2 3 4 5 6") for half in ("upper", "lower")]
    first, rest = [half[:2] for half in halves], [half[2:] for half in halves]
    return [*sides, top, f"center_of_lower_{which}_lip", *first[0], *first[1], *rest[0], *rest[1]]


def _ear(side: str) -> list[str]:
    second, last = ("2", "8") if side == "l" else ("8", "2")
    return [
        *_named(f"{side}_top_end_of_*_crus", "inferior superior"),
        *_named(f"{side}_*", "start_of_antihelix end_of_antihelix midpoint_1_of_antihelix midpoint_1_of_inferior_crus"),
        *_named(f"{side}_midpoint_*_of_antihelix", "2 3"),
        *_named(f"{side}_point_*_of_inner_helix", f"1 {second} 3 4 5 6 7"),
        *_named(f"{side}_*", "highest_point_of_antitragus bottom_point_of_tragus protruding_point_of_tragus"),
        *_named(
            f"{side}_*", "top_point_of_tragus start_point_of_crus_of_helix deepest_point_of_concha tip_of_ear_lobe"
        ),
        *_named(
            f"{side}_*", "midpoint_between_22_15 bottom_connecting_point_of_ear_lobe top_connecting_point_of_helix"
        ),
        f"{side}_point_{last}_of_inner_helix",
    ]


def _sapiens_names() -> tuple[str, ...]:
    names = [name for name in _COCO17_NAMES if "wrist" not in name] + list(_FEET)
    for side in ("right", "left"):
        names += [f"{side}_{finger}{joint}" for finger in _FINGERS for joint in ("4", "3", "2", "_third_joint")]
        names.append(f"{side}_wrist")
    names += [f"{side}_{part}" for part in ("olecranon", "cubital_fossa", "acromion") for side in ("left", "right")]
    names += ["neck", "center_of_glabella", "center_of_nose_root", "tip_of_nose_bridge"]
    names += [*_named("midpoint_*_of_nose_bridge", "1 2 3"), "center_of_labiomental_groove", "tip_of_chin"]
    brow = "upper_startpoint lower_startpoint end upper_midpoint_1 lower_midpoint_1 upper_midpoint_2 upper_midpoint_3"
    for side in "rl":
        names += _named(f"*_of_{side}_eyebrow", f"{brow} lower_midpoint_2 lower_midpoint_3")
    names += [name for lid in ("upper", "lower") for side in "lr" for name in _eye(side, lid)]
    names += ["tip_of_nose", "bottom_center_of_nose", "r_outer_corner_of_nose", "l_outer_corner_of_nose"]
    names += [f"{corner}_corner_of_{side}_nostril" for side in "rl" for corner in ("inner", "outer", "upper")]
    names += [*_lips("outer"), *_lips("inner"), *_ear("l"), *_ear("r")]
    rim = "3 midpoint_1 12 midpoint_4 9 midpoint_3 6 midpoint_2"
    for part in ("iris", "pupil"):
        for side in "lr":
            names += [f"{side}_center_of_{part}", *_named(f"{side}_border_of_{part}_*", rim)]
    return tuple(names)


def _sapiens_sigmas(names: tuple[str, ...]) -> tuple[float, ...]:
    """As published: COCO-WholeBody's of the same name; of those that it lacks, a neighbor's; of the face, 0.010."""
    known = dict(zip(WHOLEBODY133.names, WHOLEBODY133.sigmas, strict=True))
    known |= {"neck": 0.079}
    for side in ("left", "right"):
        known |= {f"{side}_{part}": 0.072 for part in ("olecranon", "cubital_fossa")} | {f"{side}_acromion": 0.079}
        knuckles = zip(_FINGERS, (0.022, 0.026, 0.018, 0.017, 0.020), strict=True)
        known |= {f"{side}_{finger}_third_joint": sigma for finger, sigma in knuckles}
    return tuple(known.get(name, 0.010) for name in names)


_SAPIENS308_NAMES = _sapiens_names()

SAPIENS308 = Skeleton(
    names=_SAPIENS308_NAMES,
    # The names of the lips' midpoints tell no side: they stay, as published. (There the eyebrows stay too.)
    mirror=mirror_by_name(_SAPIENS308_NAMES),
    sigmas=_sapiens_sigmas(_SAPIENS308_NAMES),
    upper=tuple(k for k in range(308) if not 9 <= k < 21),
    edges=_whole_body_edges(_SAPIENS308_NAMES, "_third_joint"),
)

# The skeletons of published weights, by their number of keypoints.
PUBLISHED = {skeleton.num_keypoints: skeleton for skeleton in (COCO17, WHOLEBODY133, SAPIENS308)}
BUILT_IN = {"coco17": COCO17, "wholebody133": WHOLEBODY133, "sapiens308": SAPIENS308}
