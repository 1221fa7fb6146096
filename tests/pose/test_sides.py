"""Left and right in names: ten languages, animals' legs, and what only looks like a side."""

import unicodedata

import pytest

from sapiens_accel.pose.sides import mirror_of, side_of, words


def _pairs(names: list[str]) -> set[frozenset[str]]:
    mirror, _ = mirror_of(names)
    return {frozenset((names[a], names[b])) for a, b in enumerate(mirror) if a != b}


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("linkes_auge", "rechtes_auge"),
        ("linke Schulter", "rechte Schulter"),
        ("Auge_li", "Auge_re"),
        ("oeil_gauche", "oeil_droit"),
        ("epaule_gauche", "epaule_droite"),
        ("ojo_izquierdo", "ojo_derecho"),
        ("rodilla_izquierda", "rodilla_derecha"),
        ("rodilla izq", "rodilla der"),
        ("olho_esquerdo", "olho_direito"),
        ("joelho_esq", "joelho_dir"),
        ("occhio_sinistro", "occhio_destro"),
        ("ginocchio_sx", "ginocchio_dx"),
        ("linkeroog links", "linkeroog rechts"),
        ("lewe_oko", "prawe_oko"),
        ("лівий_лікоть", "правий_лікоть"),
        ("vänstra_handen", "högra_handen"),
        ("linkerschouder", "rechterschouder"),
        ("linksohr", "rechtsohr"),
        (unicodedata.normalize("NFD", "vänster_öga"), unicodedata.normalize("NFD", "höger_öga")),
        ("좌측_좌골", "우측_좌골"),
        ("левый_глаз", "правый_глаз"),
        ("левое колено", "правое колено"),
        ("sol_diz", "sağ_diz"),
        ("vänster_öga", "höger_öga"),
        ("左眼", "右眼"),
        ("眼_左", "眼_右"),
        ("왼눈", "오른눈"),
        ("왼쪽 무릎", "오른쪽 무릎"),
        ("FL", "FR"),
        ("RL", "RR"),
        ("VL", "VR"),
        ("paw_HL", "paw_HR"),
        ("LF", "RF"),
        ("LH_paw", "RH_paw"),
        ("pawFL_top", "pawFR_top"),
        ("eyeL", "eyeR"),
        ("shoulder.L", "shoulder.R"),
    ],
)
def test_a_pair_is_one_beside_other_keypoints(left: str, right: str) -> None:
    others = ["nose", "tail_base", "dorsal"]
    assert _pairs([left, *others, right]) == {frozenset((left, right))}
    assert (side_of(left, right), side_of(right, left)) == ("left", "right")


def test_all_legs_of_an_animal() -> None:
    assert _pairs(["FL", "FR", "RL", "RR", "nose"]) == {frozenset(("FL", "FR")), frozenset(("RL", "RR"))}
    assert _pairs(["LF", "RF", "LR", "RR"]) == {frozenset(("LF", "RF")), frozenset(("LR", "RR"))}
    assert _pairs(["LH", "LF", "RF", "RH"]) == {frozenset(("LF", "RF")), frozenset(("LH", "RH"))}


def test_single_letters_are_sides_where_two_pairs_agree() -> None:
    names = ["genou_g", "genou_d", "cheville_g", "cheville_d", "nez"]
    assert _pairs(names) == {frozenset(names[:2]), frozenset(names[2:4])}
    assert side_of("genou_g", "genou_d") == "left"


def test_gender_and_case_of_a_language_do_not_part_a_pair() -> None:
    assert words("hanche_droite") == words("hanche_droit") == ("hanche", "right")


@pytest.mark.parametrize(
    "names",
    [
        [f"point_{letter}" for letter in "abcdefghi"],  # d, e, g and i are letters of a list
        [str(k) for k in range(1, 18)],
        ["wrist", "thumb_tip", "index_tip", "middle_tip"],
        ["antenna_d", "sun", "sol", "der"],
        ["line_v1", "line_h1", "line_v2", "line_h2"],  # vertical and horizontal
        ["pfote_v", "pfote_h"],  # front and hind
        ["tail_e", "tail_d"],
        ["edge_s", "edge_d"],
        ["d1", "e1", "d2", "e2"],
        ["左右の目", "鼻"],
        ["tail", "tair", "heal", "hear"],  # l and r that end longer words
        ["nose", "snout", "tail_v", "tail_h", "tail_m"],
        # The paws of one camera: what differs is more than the side, so no pair is made up.
        ["paw1LH_top", "paw2LF_top", "paw3RF_top", "paw4RH_top", "nose_top"],
    ],
)
def test_no_side_is_made_up(names: list[str]) -> None:
    assert _pairs(names) == set()


def test_a_side_without_its_partner_is_lonely() -> None:
    assert mirror_of(["linksohr", "nase"]) == ((0, 1), ("linksohr",))
    assert mirror_of(["linkes_auge", "nase"]) == ((0, 1), ("linkes_auge",))
    assert mirror_of(["rodilla_izq", "nariz"]) == ((0, 1), ("rodilla_izq",))
    assert mirror_of(["rodilla_izq", "rodilla_der"]) == ((1, 0), ())
