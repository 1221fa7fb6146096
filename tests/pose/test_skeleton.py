"""Skeletons against the facts of their data sets."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import pytest

from sapiens_accel.pose import draw
from sapiens_accel.pose import infer_skeleton as custom
from sapiens_accel.pose.infer_skeleton import Category
from sapiens_accel.pose.sides import mirror_by_name, mirror_of, words
from sapiens_accel.pose.skeleton import (
    COCO17,
    PUBLISHED,
    SAPIENS308,
    WHOLEBODY133,
    Skeleton,
)

ALL = pytest.mark.parametrize("skeleton", [COCO17, WHOLEBODY133, SAPIENS308], ids=lambda one: str(one.num_keypoints))


@ALL
def test_names_are_many_and_each_once(skeleton: Skeleton) -> None:
    assert PUBLISHED[len(set(skeleton.names))] is skeleton


@ALL
def test_edges_join_parts_of_one_side_or_the_two_sides_of_one_part(skeleton: Skeleton) -> None:
    assert len(set(map(frozenset, skeleton.edges))) == len(skeleton.edges) == (19 if skeleton is COCO17 else 65)
    mirrored = {frozenset(skeleton.mirror[k] for k in edge) for edge in skeleton.edges}
    assert mirrored == set(map(frozenset, skeleton.edges))


@ALL
def test_a_partner_is_on_the_same_half(skeleton: Skeleton) -> None:
    assert all((k in skeleton.upper) == (other in skeleton.upper) for k, other in enumerate(skeleton.mirror))
    names = {skeleton.names[k] for k in skeleton.lower}
    assert all(any(part in name for part in ("hip", "knee", "ankle", "toe", "heel")) for name in names)
    assert len(names) == (6 if skeleton is COCO17 else 12)


def test_the_308_names_are_the_published_ones_in_their_order() -> None:
    """The digest of the list in lite/demo/classes_and_palettes.py, typed off; and some places by hand."""
    digest = hashlib.sha256("\n".join(SAPIENS308.names).encode()).hexdigest()
    assert digest == "2b2ecc79ad3e32cb5808f37c805ae0dcc1a4a0c6672d09b9b03f071d0590d6a7"
    places = {
        41: "right_wrist", 62: "left_wrist", 69: "neck", 77: "tip_of_chin", 80: "end_of_r_eyebrow",
        97: "l_outer_end_of_upper_lash_line", 133: "r_centerpoint_of_upper_eyelid_line", 178: "tip_of_nose",
        190: "center_of_cupid_bow", 207: "center_of_lower_inner_lip", 241: "l_tip_of_ear_lobe",
        255: "r_point_8_of_inner_helix", 271: "r_point_2_of_inner_helix", 272: "l_center_of_iris",
        307: "r_border_of_pupil_midpoint_2",
    }  # fmt: skip
    assert {k: SAPIENS308.names[k] for k in places} == places


@pytest.mark.parametrize(
    ("skeleton", "digest"),
    [
        (WHOLEBODY133, "fe75c189a870946e293cd04399c93a7863a35073a3e5d05787e0256a3db29996"),
        (SAPIENS308, "bad46bacc7c1817bf911d2e900884efdb540454ffa1424a30279ebad59fa192f"),
    ],
)
def test_the_files_hold_what_was_once_built_from_the_rules_of_the_names(skeleton: Skeleton, digest: str) -> None:
    tree = asdict(skeleton)
    assert tree.pop("mirror_known") and not tree.pop("categories")
    assert tree.pop("people") is None and tree.pop("image_bits") is None and tree.pop("box_padding") is None
    assert hashlib.sha256(json.dumps(tree).encode()).hexdigest() == digest


def test_the_133_are_body_feet_face_and_hands() -> None:
    names = WHOLEBODY133.names
    assert names[:17] == COCO17.names and WHOLEBODY133.sigmas[:17] == COCO17.sigmas
    places = {
        17: "left_big_toe", 19: "left_heel", 22: "right_heel", 23: "face-0", 90: "face-67", 91: "left_hand_root",
        92: "left_thumb1", 99: "left_forefinger4", 111: "left_pinky_finger4", 112: "right_hand_root",
        132: "right_pinky_finger4",
    }  # fmt: skip
    assert {k: names[k] for k in places} == places
    assert [WHOLEBODY133.sigmas[k] for k in (17, 23, 39, 40, 53, 70, 90, 91, 95, 112, 132)] == [
        0.068, 0.042, 0.045, 0.013, 0.007, 0.034, 0.008, 0.029, 0.047, 0.029, 0.031,
    ]  # fmt: skip
    assert sum(WHOLEBODY133.sigmas) == pytest.approx(3.861, abs=1e-9)


@pytest.mark.parametrize(
    ("point", "partner"),
    [(0, 16), (8, 8), (17, 26), (21, 22), (27, 27), (30, 30), (31, 35), (33, 33), (36, 45), (39, 42), (40, 47),
     (41, 46), (48, 54), (51, 51), (55, 59), (57, 57), (60, 64), (62, 62), (65, 67), (66, 66)],
)  # fmt: skip
def test_the_face_of_the_133_mirrors_as_published(point: int, partner: int) -> None:
    names = WHOLEBODY133.names
    assert WHOLEBODY133.mirror[names.index(f"face-{point}")] == names.index(f"face-{partner}")


def test_the_308_mirror_by_their_names() -> None:
    names, mirror = SAPIENS308.names, SAPIENS308.mirror
    for left, right in (
        ("l_point_2_of_inner_helix", "r_point_2_of_inner_helix"),
        ("inner_corner_of_l_nostril", "inner_corner_of_r_nostril"),
        ("end_of_l_eyebrow", "end_of_r_eyebrow"),
        ("left_olecranon", "right_olecranon"),
        ("neck", "neck"),
        ("midpoint_1_of_upper_outer_lip", "midpoint_1_of_upper_outer_lip"),
    ):
        assert mirror[names.index(left)] == names.index(right)
    assert sum(mirror[k] == k for k in range(308)) == 1 + 8 + 1 + 2 + 28  # nose, midline, neck, nose's, lips'


def test_the_308_have_sigmas_by_name() -> None:
    sigma = dict(zip(SAPIENS308.names, SAPIENS308.sigmas, strict=True))
    known = dict(zip(WHOLEBODY133.names, WHOLEBODY133.sigmas, strict=True))
    assert all(sigma[name] == known[name] for name in sigma if name in known)
    assert (sigma["neck"], sigma["left_cubital_fossa"], sigma["right_ring_finger_third_joint"]) == (0.079, 0.072, 0.017)
    assert sigma["l_center_of_iris"] == 0.010


def test_a_side_is_a_word() -> None:
    assert mirror_by_name(("left_eye", "right_eye", "nose")) == (1, 0, 2)
    assert mirror_by_name(("eye_r", "l_ear_1", "r_ear_1", "eye_l", "tail", "collar")) == (3, 2, 1, 0, 4, 5)
    with pytest.raises(ValueError, match="'l_eye' has no mirror partner 'r_eye'"):
        mirror_by_name(("l_eye", "nose"))


# ---- Names in many styles


@pytest.mark.parametrize(
    ("left", "right"),
    [("left_eye", "right_eye"), ("eye_left", "eye_right"), ("L_Eye", "R_Eye"), ("l-eye", "r-eye"), ("LEye", "REye"),
     ("leftEye", "rightEye"), ("LeftEye", "RightEye"), ("eyeL", "eyeR"), ("Left Eye", "Right Eye"), ("LEFT_EYE",
     "RIGHT_EYE"), ("L1", "R1"), ("hand_lThumb", "hand_rThumb"), ("eye.l.inner", "eye.r.inner"),
     ("leftear", "rightear"), ("lshoulder", "rshoulder"), ("upperleftarm", "upperrightarm"), ("L_Eye", "right eye")],
)  # fmt: skip
def test_sides_in_many_styles(left: str, right: str) -> None:
    names = ("nose", right, "tail", left)
    assert mirror_of(names) == ((0, 3, 2, 1), ())
    one = Skeleton(names=names, mirror=mirror_of(names)[0], sigmas=(0.1,) * 4, upper=(), edges=())
    assert one.sides == (None, "right", None, "left")


def test_what_only_looks_like_a_side_is_none() -> None:
    names = ("lip", "rump", "bright_spot", "collar", "mirror", "copyright", "leg", "relative")
    assert mirror_of(names) == (tuple(range(8)), ())


def test_a_side_without_a_partner_is_reported_and_stays() -> None:
    mirror, lonely = mirror_of(("l_eye", "r_ear", "left_ear", "L_Foot", "left foot", "right_foot"))
    assert (mirror, lonely) == ((0, 2, 1, 5, 4, 3), ("l_eye", "left foot"))
    found, told = custom.infer_skeleton([_category("l_eye", "nose", "r_ear")], None)
    assert found.mirror == (0, 1, 2)
    assert not found.mirror_known and "warning: left and right of the keypoints are not known" in told[1]
    assert "warning: 2 keypoints with a side or a number in the name and no partner (l_eye, r_ear)" in told[2]


@pytest.mark.parametrize(
    ("names", "known"),
    [
        (("leftear", "rightear", "paw1", "paw2"), False),
        (("leftear", "rightear", "paw 1", "paw 2", "paw 3", "paw 4"), True),  # four say nothing of pairs
        (("leftear", "rightear", "tail1", "tail2", "spine_1", "spine_2"), True),
        (("left_eye", "rigth_eye", "left_ear", "right_ear"), False),
        (("left_ear", "right_ear", "nose"), True),
    ],
)
def test_mirroring_waits_until_the_pairs_are_named(names: tuple[str, ...], known: bool) -> None:
    found, lines = custom.infer_skeleton([_category(*names)], None)
    assert found.mirror_known is known
    assert any("and no partner" in line for line in lines) is not known


def test_words_of_a_name() -> None:
    assert words("L_Eye") == words("leftEye") == words("Left eye") == ("left", "eye")
    assert words("face-12") == ("face", "12") and words("forefinger1") == ("forefinger", "1")
    assert words("***") == ("***",)
    for skeleton in PUBLISHED.values():
        assert len(set(map(words, skeleton.names))) == skeleton.num_keypoints


# ---- Skeletons of any names


def _category(*names: str) -> Category:
    edges = tuple((names[0], name) for name in names[1:])
    return Category(file=Path("some.json"), categories=(), kind="thing", names=names, edges=edges, count=len(names))


def test_what_is_known_by_name_is_taken() -> None:
    names = (
        "tail",
        "R_Hip",
        "leftWrist",
        "L Hip",
        "thumb_tip",
        "left_thumb4",
        "front left knee",
        "rightWrist",
        "forefinger2",
    )
    found, told = custom.infer_skeleton([_category(*names)], None)
    assert found.mirror == (0, 3, 7, 1, 4, 5, 6, 2, 8)
    # 0.05 is a guess, of a thumb's tip the median of COCO-WholeBody's four thumb keypoints.
    assert found.sigmas == (0.05, 0.107, 0.062, 0.107, 0.036, 0.047, 0.087, 0.062, 0.025)
    assert [names[k] for k in found.lower] == ["tail", "R_Hip", "L Hip"]
    assert found.edges == tuple((0, k) for k in range(1, 9))
    assert "OKS sigmas: 6 known by name, 2 estimated by part of the body, 1 guessed" in told[0]
    assert "guesses" in told[-1] and "sigmas: {tail: 0.05, thumb_tip: 0.036, front left knee: 0.087}" in told[-1]


def test_a_yaml_goes_before_what_is_known(tmp_path: Path) -> None:
    (tmp_path / "y.yaml").write_text(
        "names: [b, left_a, right_a]\nmirror: [[b, right_a]]\nsigmas: {b: 0.3}\nupper: [left_a]\nedges: [[left_a, b]]"
    )
    found, _ = custom.infer_skeleton(
        [_category("left_a", "b", "right_a", "c")], custom.load_skeleton("y.yaml", tmp_path)
    )
    assert (found.names, found.mirror, found.upper) == (("b", "left_a", "right_a"), (2, 1, 0), (1,))
    assert (found.sigmas, found.edges) == ((0.3, 0.05, 0.3), ((1, 0),))
    (tmp_path / "z.yaml").write_text("sigmas: {nose: 0.5}")
    found, _ = custom.infer_skeleton([_category(*COCO17.names)], custom.load_skeleton("z.yaml", tmp_path))
    assert found.sigmas == (0.5, *COCO17.sigmas[1:]) and found.mirror == COCO17.mirror and found.upper == COCO17.upper


@pytest.mark.parametrize(
    ("names", "known"),
    [
        (COCO17.names[:5], True),
        (("nez", "oeil_gauche", "oeil_droit"), True),
        (("wrist", "thumb_tip", "index_tip"), True),  # a mirrored hand is the other hand
        (("center",), True),
        (("base", "tip"), False),
        (tuple("123456"), False),
        (("paw1LH_top", "paw4RH_top", "nose_top"), False),
    ],
)
def test_whether_left_and_right_are_known(names: tuple[str, ...], known: bool) -> None:
    one = Category(file=Path("a.json"), categories=("mouse",), kind="mouse", names=names)
    skeleton, lines = custom.infer_skeleton([one], None)
    assert skeleton.mirror_known is known and skeleton.select(names[:1]).mirror_known is known
    assert any("left and right of the keypoints are not known" in line for line in lines) is not known


@pytest.mark.parametrize(
    ("names", "lower"),
    [
        (("nose", "left_ear", "right_ear", "neck", "spine1", "spine2", "tail_base", "tail_tip"), ()),  # a mouse
        (("snout", "left_ear", "left_hip", "tail_base", "probe", "a", "b", "c", "d", "e"), ()),
        (("snout", "dorsal_fin", "tail_top", "tail_bottom"), ()),
        (("nose", "l_shoulder", "r_shoulder", "l_hip", "r_hip"), (3, 4)),
        (("nose", "neck", "left_front_paw", "left_hind_paw", "tail_base"), (3, 4)),
    ],
)
def test_halves_are_those_of_a_body_with_limbs(names: tuple[str, ...], lower: tuple[int, ...]) -> None:
    one = Category(file=Path("a.json"), categories=("mouse",), kind="mouse", names=names)
    skeleton, lines = custom.infer_skeleton([one], None)
    assert (skeleton.lower if skeleton.upper else ()) == lower
    assert any("no half-body crops" in line for line in lines) == (not lower)


def test_some_of_a_skeleton() -> None:
    assert COCO17.select(COCO17.names) == COCO17
    some = COCO17.select(["right_hip", "left_hip", "left_knee", "nose"])
    assert (some.mirror, some.upper, some.sigmas) == ((1, 0, 2, 3), (3,), (0.107, 0.107, 0.087, 0.026))
    assert set(map(frozenset, some.edges)) == {frozenset((0, 1)), frozenset((1, 2))}


def test_the_union_of_two_sets() -> None:
    body, whole = (
        Category(file=Path("a.json"), categories=(), kind="person", names=one.names, count=one.num_keypoints)
        for one in (COCO17, WHOLEBODY133)
    )
    assert (
        custom.infer_skeleton([body, whole], None)[0] is custom.infer_skeleton([whole, body], None)[0] is WHOLEBODY133
    )
    found, _ = custom.infer_skeleton([_category("tail", "L_Ear"), _category("l_ear", "snout", "r_ear")], None)
    assert found.names == ("tail", "L_Ear", "snout", "r_ear") and found.mirror == (0, 3, 2, 1)
    assert found.edges == ((0, 1), (1, 2), (1, 3))


def test_the_color_key_has_the_sides_that_there_are() -> None:
    def has(names: tuple[str, ...], color: draw.Color) -> bool:
        one = Category(file=Path("a.json"), categories=("x",), kind="x", names=names)
        skeleton, _ = custom.infer_skeleton([one], None)
        return bool((draw.draw_side_key(400, skeleton) == color).all(axis=-1).any())

    assert all(has(COCO17.names, color) for color in (draw.LEFT, draw.RIGHT, draw.MIDDLE))
    assert [has(("base", "tip"), color) for color in (draw.LEFT, draw.RIGHT, draw.MIDDLE)] == [False, False, True]
    assert not has(("left_eye", "right_eye"), draw.MIDDLE)
