"""Left and right in the names of keypoints, in many languages and in the abbreviations used for animals' legs.

left_eye  eye_left  L_Eye  leftEye  eye.L  leftear  lshoulder      a side as a word, or inside one
linkes_auge  oeil_gauche  ojo_izquierdo  olho_esquerdo  occhio_sx  левый_глаз  左眼  왼눈  lewe_oko  vänster_öga
FL FR RL RR  LF RF LH RH                                           front, fore, hind, back, rear, middle legs
"""

import itertools
import re
from collections import Counter
from collections.abc import Sequence
from unicodedata import normalize

# Inflected forms are one side: "oeil_gauche" and "oeil_droit", "linke_hand" and "rechte_hand" are pairs.
_WORDS = {
    "left": (
        "l", "left", "links", "linke", "linker", "linkes", "linken", "linkem", "gauche", "izquierdo", "izquierda",
        "izq", "esquerdo", "esquerda", "esq", "sinistro", "sinistra", "sx", "sinister", "lewy", "lewa", "lewe",
        "левый", "левая", "левое", "лев", "ліве", "ліва", "лівий", "vänster", "vänstra", "venstre", "hidari", "ひだり",
        "levý", "levá", "levé", "左", "왼", "왼쪽", "좌", "좌측",
    ),
    "right": (
        "r", "right", "rechts", "rechte", "rechter", "rechtes", "rechten", "rechtem", "droit", "droite", "derecho",
        "derecha", "direito", "direita", "destro", "destra", "dx", "dexter", "prawy", "prawa", "prawe", "правый",
        "правая", "правое", "прав", "праве", "права", "правий", "höger", "högra", "højre", "høyre", "migi", "みぎ",
        "pravý", "pravá", "pravé", "右", "오른",
        "오른쪽", "우", "우측",
    ),
}  # fmt: skip
_SIDE_OF = {word: side for side, forms in _WORDS.items() for word in forms}
# Words that mean a side only beside their partner: "der" is an article too, "sol" the sun, and d a letter of a list.
_ONLY_TOGETHER = (
    ("g", "d"), ("izq", "der"), ("i", "d"), ("e", "d"), ("esq", "dir"), ("s", "d"), ("sin", "des"), ("sin", "dex"),
    ("li", "re"), ("sol", "sağ"), ("sol", "sag"), ("vanster", "hoger"), ("venstre", "hojre"),
    ("vä", "hö"), ("lew", "praw"),
)  # fmt: skip
# As `words` has them: one of a pair may be a side by itself, as izq beside der.
_TOGETHER = [(_SIDE_OF.get(left, left), _SIDE_OF.get(right, right)) for left, right in _ONLY_TOGETHER]
_SIDES = ("left", "right")
# Within a word only long ones are sides, at its beginning or its end: linkerschouder, linksohr.
_LONG = re.compile(
    "|".join(
        rf"(?<![^\W\d_]){word}|{word}(?![^\W\d_])"
        for word in sorted(_SIDE_OF, key=len, reverse=True)
        if len(word) > 4 and word not in ("left", "right")
    )
)
_OTHER = {"left": "right", "right": "left", "l": "r", "r": "l"}
# Scripts without spaces between words: the side is the beginning or the end of one.
_UNSPACED = ("오른쪽", "오른", "왼쪽", "왼", "좌측", "우측", "ひだり", "みぎ", "左", "右", "좌", "우")
_BOTH = ("左右", "좌우")  # both sides: none


def words(name: str) -> tuple[str, ...]:
    """The words of a name in lower case, sides in English: equal for left_eye, L_Eye, leftEye and 'Left eye'."""
    parts = [
        word
        for run in re.findall(r"[0-9]+|[^\W\d_]+", _spaced(normalize("NFKC", name)))
        for word in _split_camel_case(run)
    ]
    return tuple(_SIDE_OF.get(word.lower(), word.lower()) for word in parts) or (name,)


def mirror_by_name(names: Sequence[str]) -> tuple[int, ...]:
    """The mirror order that the sides in the names imply; see `mirror_of`.

    Raises:
        ValueError: a left keypoint has no right partner of the same name.
    """
    mirror, lonely = mirror_of(names)
    if lonely:
        partner = re.sub(r"left|right|(?<![a-zA-Z0-9])[lr](?![a-zA-Z0-9])", lambda side: _OTHER[side[0]], lonely[0])
        raise ValueError(f"keypoint {lonely[0]!r} has no mirror partner {partner!r}")
    return mirror


def mirror_of(names: Sequence[str]) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """The mirror order that the sides in the names imply, and the names that have a side and no partner.

    A side is a word for left or right anywhere in a name. Where a name has no such word, a left or right within a word
    (leftear), an l or r that a word begins with (lshoulder, LF) or that ends an abbreviation of a leg (FL, RR), or a
    word that means a side only beside its partner (ojo_i, ojo_d), is a side if the partner is there.
    """
    by_words = {words(name): k for k, name in reversed(list(enumerate(names)))}
    by_letters = {_letters(name): k for k, name in reversed(list(enumerate(names)))}
    together = _partners_together(names)
    mirror, lonely = list(range(len(names))), []
    for k, name in enumerate(names):
        parts = words(name)
        if any(word in _SIDES for word in parts):
            other = by_words.get(tuple(_OTHER.get(word, word) if word in _SIDES else word for word in parts))
            other = together.get(k) if other is None else other
            lonely += [name] * (other is None)
        else:
            candidates = (by_letters[one] for one in _hidden_sides(_letters(name)) if one in by_letters)
            other = next(candidates, together.get(k))
            lonely += [name] * (other is None and _LONG.search(_letters(name)) is not None)
        mirror[k] = k if other is None else other
    # Of two names that mean the same only one has a partner.
    lonely += [names[k] for k in range(len(names)) if mirror[mirror[k]] != k]
    return tuple(o if mirror[o] == k else k for k, o in enumerate(mirror)), tuple(lonely)


def side_of(name: str, partner: str) -> str | None:
    """Left or right, of a keypoint with the mirror partner `partner`; None on the midline, or if no name says it."""
    if name == partner:
        return None
    sides = {word for word in words(name) if word in _SIDES} or set(re.findall("left|right", name.lower()))
    if not sides and _letters(partner) in _hidden_sides(_letters(name)):  # lshoulder and rshoulder; FL and FR
        compound = _LONG.search(_letters(name))
        changed = [a for a, b in zip(_letters(name), _letters(partner), strict=False) if a != b]
        sides = {_SIDE_OF[compound[0]]} if compound else {side for side in _SIDES if changed[0] == side[0]}
    if not sides:
        pair = _difference(words(name), words(partner))
        sides = {
            side
            for left_right in _TOGETHER
            for side, one in zip(_SIDES, (left_right, left_right[::-1]), strict=True)
            if pair == one
        }
    return sides.pop() if len(sides) == 1 else None


def _split_camel_case(run: str) -> list[str]:
    """leftEye: left Eye; LEye: L Eye; eyeL: eye L; in any alphabet that has two cases."""
    starts = [
        i
        for i in range(1, len(run))
        if run[i].isupper() and (run[i - 1].islower() or (run[i - 1].isupper() and run[i + 1 : i + 2].islower()))
    ]
    return [run[a:b] for a, b in itertools.pairwise([0, *starts, len(run)])]


def _spaced(name: str) -> str:
    """The first side of a script without spaces becomes a word of its own: 左眼 is 左 眼."""
    for word in re.findall(r"[^\W\d_]+", name):
        side = next((one for one in _UNSPACED if word.startswith(one) or word.endswith(one)), None)
        if side and not word.startswith(_BOTH):
            apart = word.replace(side, f"{side} ", 1) if word.startswith(side) else f"{word.removesuffix(side)} {side}"
            return name.replace(word, apart, 1)
    return name


def _letters(name: str) -> str:
    return "_".join(words(name))


def _hidden_sides(name: str) -> list[str]:
    """What a name of lower case may become if left or right within its words, or a letter of one, is a side."""
    changed = [
        re.sub(r"left|right", lambda side: _OTHER[side[0]], name, count=1),
        re.sub(r"(?<![a-z])[lr](?=[a-z])", lambda side: _OTHER[side[0]], name, count=1),
        re.sub(r"(?<![a-z])([fhbrmtv])([lr])(?![a-z])", lambda leg: leg[1] + _OTHER[leg[2]], name, count=1),
    ]
    compound = _LONG.search(name)
    if compound:  # linkerschouder: any word for the other side may stand there
        others = _WORDS[_OTHER[_SIDE_OF[compound[0]]]]
        changed += [name[: compound.start()] + other + name[compound.end() :] for other in others]
    return [other for other in changed if other != name]


def _partners_together(names: Sequence[str]) -> dict[int, int]:
    """Keypoints whose names differ in one word alone, which together with the other one means a side.

    Only where these two are all that there is in this position of the name (of finger_a, finger_d, finger_e, ... none),
    and single letters only where two pairs of names agree on them.
    """
    variants: dict[tuple[str, ...], dict[str, int]] = {}
    for k, name in enumerate(names):
        parts = words(name)
        for at, word in enumerate(parts):
            rest = (*parts[:at], "*", *parts[at + 1 :])
            if not {"left", "right"} & set(rest) and any(len(one) > 2 for one in rest):
                variants.setdefault(rest, {})[word] = k
    pairs = {frozenset(pair) for pair in _TOGETHER}
    pairs_by_place = [pair for pair in variants.values() if len(pair) == 2 and frozenset(pair) in pairs]
    count = Counter(frozenset(pair) for pair in pairs_by_place)
    partners: dict[int, int] = {}
    for pair in pairs_by_place:
        if max(map(len, pair)) > 1 or count[frozenset(pair)] > 1:
            a, b = pair.values()
            partners |= {a: b, b: a}
    return partners


def _difference(a: Sequence[str], b: Sequence[str]) -> tuple[str, str] | None:
    """The only word in which two names differ."""
    different = [pair for pair in zip(a, b, strict=False) if pair[0] != pair[1]]
    return different[0] if len(a) == len(b) and len(different) == 1 else None
