"""A Skeleton for any keypoints: what COCO categories name, what is known by name, and what a YAML says otherwise.

--data.skeleton hand.yaml             every key may be left out:
names: [wrist, thumb_tip, ...]        the run's keypoints, in its order; of a JSON that names none: what they are
mirror: [[left_eye, right_eye], ...]  all pairs; a keypoint of no pair is its own mirror image
sigmas: {wrist: 0.03, ...}            OKS sigmas of some, or a list of all
upper: [wrist, ...]                   the upper half of the body, for the half-body crop; none or all: no such crop
edges: [[wrist, thumb_tip], ...]      lines in images
"""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import yaml

from sapiens_accel.errors import UserError, count, escape, read_tree
from sapiens_accel.pose.sides import mirror_of, words
from sapiens_accel.pose.skeleton import (
    BUILT_IN,
    COCO17,
    PUBLISHED,
    SAPIENS308,
    WHOLEBODY133,
    Skeleton,
)

KEYS = ("names", "mirror", "sigmas", "upper", "edges")
# A guess for a keypoint of which nothing is known: the geometric mean of COCO's extremes, 0.025 (eye) and 0.107 (hip).
# A sigma of 1 / K, which others take, makes AP of few keypoints all but certain (ultralytics/ultralytics#4135).
GUESSED_SIGMA = 0.05
# Words for the part of a body: a keypoint of another name gets the median of COCO-WholeBody's with that word.
PARTS = ("eye", "ear", "nose", "shoulder", "elbow", "wrist", "hip", "knee", "ankle", "toe", "heel", "thumb",
         "forefinger", "middle", "ring", "pinky")  # fmt: skip
SAME = {"index": "forefinger", "little": "pinky"}
HAND = {"hand", "palm", "finger", "wrist", "thumb", "forefinger", "middle", "ring", "pinky"}
FINGER_WORDS = {"finger", "mcp", "pip", "dip", "tip", *"1234"}  # only beside one of them is a middle or a ring a finger
LOWER = {"hip", "pelvis", "thigh", "knee", "calf", "shin", "ankle", "foot", "feet", "toe", "heel", "leg", "hind",
         "tail"}  # fmt: skip
FRONT = {"front", "fore"}
# Of parts along the middle of a body, and of fingers, two numbers follow one another.
IN_A_ROW = {"tail", "spine", "back", "neck", "nose", "head", "body", "trunk", "torso", "chest", "belly", "root", "mid",
            "center", "snout", "thumb", "finger", "forefinger", "middle", "ring", "pinky"}  # fmt: skip
# A body has halves if its keypoints name limbs of both: a tail, a fin or a snout makes none.
LOWER_LIMBS = LOWER - {"tail"}
UPPER_LIMBS = {"shoulder", "elbow", "wrist", "arm", "forearm", "hand", "chest", "neck", "withers", *FRONT}
BODY = {*PARTS, *LOWER, *UPPER_LIMBS, "head", "face", "mouth", "chin", "paw", "hoof", "snout", "back", "throat"}
# Categories whose nameless 17, 133 or 308 keypoints are taken for those of people, as they are where a JSON has none.
PEOPLE = {"person", "people", "persons", "human", "humans", "pedestrian"}
SHOWN = 6
NO_HALVES = "no halves of a body known (no half-body crops; upper: [NAME, ...] in --data.skeleton FILE gives them)"


@dataclass(frozen=True, kw_only=True)
class Category:
    """What a JSON says of its keypoints.

    Attributes:
        categories: as in annotation_rules.Reading.
        kind: what they are called.
        chosen: the names of all categories whose keypoints they are; empty if the JSON has no categories.
        names: one name for each keypoint; None if it names none.
        edges: pairs of names.
        count: keypoints of its annotations; None if none has any.
        whole: whether annotations have COCO-WholeBody's five lists; then `names` are its 133.
        warnings: what is odd in it, in lines.
    """

    file: Path
    categories: tuple[str, ...]
    kind: str
    names: tuple[str, ...] | None
    edges: tuple[tuple[str, str], ...] = ()
    count: int | None = None
    whole: bool = False
    warnings: tuple[str, ...] = ()
    chosen: tuple[str, ...] = ()

    def called(self, names: tuple[str, ...]) -> "Category":
        """The same, its keypoints called so in this order if a tool has only numbered them ("1", "2", "point_3")."""
        if not self.names or len(self.names) != len(names) or not is_numbered(self.names):
            return self
        if {*map(words, self.names)} & {*map(words, names)}:
            return self
        new = dict(zip(self.names, names, strict=True))
        return replace(self, names=names, edges=tuple((new[a], new[b]) for a, b in self.edges))


@dataclass(frozen=True, kw_only=True)
class SkeletonFile:
    """What a YAML says of a skeleton; None where it says nothing. Its names are checked when they are used."""

    file: str
    names: tuple[str, ...] | None = None
    mirror: tuple[tuple[str, str], ...] | None = None
    sigmas: Mapping[str, float] | tuple[float, ...] | None = None
    upper: tuple[str, ...] | None = None
    edges: tuple[tuple[str, str], ...] | None = None


# ---- From a YAML


def load_skeleton(text: str, root: Path) -> Skeleton | SkeletonFile:
    """What `--data.skeleton` means: a built-in skeleton, or a YAML, relative to here or to the root.

    Raises:
        UserError: neither; a key that there is not, or a value of another kind.
    """
    if text in BUILT_IN:
        return BUILT_IN[text]
    file = next((path for path in (Path(text), root / text) if path.is_file()), None)
    if file is None:
        there = ", ".join(BUILT_IN)
        raise UserError(f"--data.skeleton {text}: no such file{nearest(text, BUILT_IN)}; expected a YAML, or {there}")
    tree = read_tree(file, lambda text: yaml.safe_load(text) or {}, f"a YAML of {', '.join(KEYS)}")
    for key in tree:
        if key not in KEYS:
            raise UserError(f"{file}: no such key {key!r}{nearest(str(key), KEYS)}; there are: {', '.join(KEYS)}")
    where = {key: f"{file}: {key}" for key in KEYS}
    return SkeletonFile(
        file=str(file),
        names=check_names(tree.get("names"), where["names"]),
        mirror=_pairs(tree.get("mirror"), where["mirror"]),
        sigmas=_sigmas(tree.get("sigmas"), where["sigmas"]),
        upper=check_names(tree.get("upper"), where["upper"]),
        edges=_pairs(tree.get("edges"), where["edges"]),
    )


def _pairs(value: Any, where: str) -> tuple[tuple[str, str], ...] | None:
    if value is None:
        return None
    for pair in value if isinstance(value, list) else [value]:
        # A name that is a number need not be in quotes.
        if not (isinstance(pair, list) and len(pair) == 2 and all(type(name) in (str, int) for name in pair)):
            raise UserError(f"{where}: expected pairs of names, [[left_eye, right_eye], ...], found {str(pair)[:80]}")
    return tuple((str(a), str(b)) for a, b in value)


def _sigmas(values: Any, where: str) -> Mapping[str, float] | tuple[float, ...] | None:
    if values is None:
        return None
    items = list(values.items() if isinstance(values, dict) else enumerate(values if isinstance(values, list) else ()))
    if not items:
        raise UserError(f"{where}: expected a number for each name, or a list of numbers, found {str(values)[:80]}")
    for key, value in items:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not 0 < value <= 1:
            raise UserError(f"{where}: {key}: expected a number above 0 and up to 1 (a nose: 0.026), found {value!r}")
    return {str(k): float(v) for k, v in items} if isinstance(values, dict) else tuple(float(v) for _, v in items)


# ---- The skeleton


def infer_skeleton(
    categories: Sequence[Category], asked: Skeleton | SkeletonFile | None
) -> tuple[Skeleton, tuple[str, ...]]:
    """The run's skeleton, and what to say about it.

    The keypoints of the first data set, and then those of the others that it lacks; in the order of a built-in skeleton
    where they are its own. What is known by name (sigmas, halves, edges) is taken from the built-in skeletons.

    Args:
        asked: what `--data.skeleton` says.

    Raises:
        UserError: nothing names the keypoints; a name in the YAML that is none of them.
    """
    warnings = tuple(dict.fromkeys(line for one in categories for line in one.warnings))
    kinds = tuple(categories[0].chosen) if categories and categories[0].chosen != ("person",) else ()
    if asked and asked.names:
        renamed = [one.called(asked.names) for one in categories]
        warnings += tuple(
            f"{one.file}: its keypoints {short(one.names or (), 3)} are {short(other.names or (), 3)}, in this order"
            for one, other in zip(categories, renamed, strict=True)
            if one is not other
        )
        categories = renamed
    if isinstance(asked, Skeleton):
        return _of_kinds(asked, kinds), (*warnings, f"keypoints: {asked.num_keypoints}, built in")
    names = _wanted(asked, categories) if asked and asked.names else _together(categories)
    built_in = next((one for one in BUILT_IN.values() if [*map(words, one.names)] == [*map(words, names)]), None)
    if built_in and asked is None:
        other = "" if built_in.names == names else f" (here spelled differently: {short(names, 3)})"
        return _of_kinds(built_in, kinds), (*warnings, f"keypoints: {len(names)}, {_name_of(built_in)}{other}")
    skeleton, lines = _build_skeleton(names, categories, asked or SkeletonFile(file=""), built_in)
    return _of_kinds(skeleton, kinds), (*warnings, *lines)


def _of_kinds(skeleton: Skeleton, kinds: tuple[str, ...]) -> Skeleton:
    return replace(skeleton, categories=kinds) if kinds else skeleton


def _name_of(built_in: Skeleton) -> str:
    return next(name for name, one in BUILT_IN.items() if one is built_in)


def _wanted(asked: SkeletonFile, categories: Sequence[Category]) -> tuple[str, ...]:
    """The names in the YAML, which the data know if they name any."""
    assert asked.names
    there = [name for one in categories for name in one.names or ()]
    alike = set(map(words, there))
    for name in asked.names if all(one.names for one in categories) else ():
        if words(name) not in alike:
            raise UserError(f"{asked.file}: names: no such keypoint {name!r} in the data{nearest(name, there)}")
    return asked.names


def _together(categories: Sequence[Category]) -> tuple[str, ...]:
    """All keypoints by name, in the order of a built-in skeleton where they are just its own."""
    lists = []
    for one in categories:
        known = PUBLISHED.get(17 if one.count is None else one.count)  # without any the reader says what is missing
        are_people = all(PEOPLE & set(words(name)) for name in one.chosen)
        if one.names is None and (known is None or not are_people):
            a_person = f" ({_name_of(known)} if this {one.kind} has a person's, in that order)" if known else ""
            raise UserError(
                f"{one.file}: no category names its {one.count} keypoints: expected 'keypoints' in it, or names in a "
                f"YAML (--data.skeleton FILE){a_person}"
            )
        lists.append(one.names or (known.names if known else ()))
    if len(lists) == 1:
        return lists[0]
    union: dict[tuple[str, ...], str] = {}
    for name in (name for names in lists for name in names):
        union.setdefault(words(name), name)
    alike = (one.names for one in PUBLISHED.values() if {*map(words, one.names)} == set(union))
    return next(alike, tuple(union.values()))


def _build_skeleton(
    names: tuple[str, ...], categories: Sequence[Category], asked: SkeletonFile, built_in: Skeleton | None
) -> tuple[Skeleton, list[str]]:
    mirror, lonely = (built_in.mirror, ()) if built_in else _mirror(names)
    index_of = {name: k for k, name in enumerate(names)}
    if asked.mirror is not None:
        pairs = [[_index(index_of, name, asked, "mirror") for name in pair] for pair in asked.mirror]
        mirror, lonely = _from_pairs(pairs, names, asked), ()
    twins = () if built_in or asked.mirror is not None else _unpaired_twins(names, mirror)
    sigmas = _all_sigmas(names, mirror, asked, index_of)
    upper = built_in.upper if built_in else _upper(names)
    if asked.upper is not None:
        upper = tuple(sorted(_index(index_of, name, asked, "upper") for name in asked.upper))
    drawn = built_in or next((one for one in PUBLISHED.values() if set(names) <= set(one.names)), None)
    pairs = [pair for one in categories for pair in one.edges] or (edge_names(drawn) if drawn else ())
    alike = {words(name): k for k, name in reversed(list(enumerate(names)))}
    indices = [[index_of.get(name, alike.get(words(name))) for name in pair] for pair in pairs]
    edges = [(a, b) for a, b in indices if a is not None and b is not None]
    if asked.edges is not None:
        edges = [(_index(index_of, a, asked, "edges"), _index(index_of, b, asked, "edges")) for a, b in asked.edges]
    skeleton = Skeleton(
        names=names, mirror=mirror, sigmas=sigmas.values, upper=upper, edges=tuple(dict.fromkeys(edges)),
        mirror_known=bool(asked.mirror is not None or built_in or _names_imply_mirror(names, mirror, lonely + twins)),
    )  # fmt: skip
    return skeleton, _describe(skeleton, categories[0].kind if categories else "a YAML", lonely + twins, sigmas)


def _mirror(names: tuple[str, ...]) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """By the sides in the names; of COCO-WholeBody's face, whose names have none, as it is known."""
    mirror, lonely = mirror_of(names)
    face = {name: WHOLEBODY133.names[k] for name, k in zip(WHOLEBODY133.names, WHOLEBODY133.mirror, strict=True)}
    index_of = {name: k for k, name in enumerate(names)}
    order = [index_of.get(face.get(name, name), k) if mirror[k] == k else mirror[k] for name, k in index_of.items()]
    return tuple(order), tuple(name for name in lonely if order[index_of[name]] == index_of[name])


def _names_imply_mirror(names: Sequence[str], mirror: Sequence[int], lonely: Sequence[str]) -> bool:
    """Whether the names say what a mirrored image swaps: a pair, or a single hand, which becomes the other hand.

    A side without a partner (`left_eye` beside `rigth_eye`) says that they do not, and so do `paw1` and `paw2`.
    """
    if all(HAND & {SAME.get(word, word) for word in words(name)} for name in names):
        return True
    return not lonely and (len(names) == 1 or any(k != other for k, other in enumerate(mirror)))


def _unpaired_twins(names: Sequence[str], mirror: Sequence[int]) -> tuple[str, ...]:
    """Names without a partner of which exactly two differ in their number alone: `paw1` and `paw2` may be two sides.

    Not those of IN_A_ROW: `tail1` and `tail2`.
    """
    alike: dict[tuple[str, ...], list[str]] = {}
    for name, other in zip(names, mirror, strict=True):
        rest = tuple(word for word in words(name) if not word.isdecimal())
        if (
            names[other] == name
            and rest
            and len(rest) < len(words(name))
            and not IN_A_ROW & {SAME.get(word, word) for word in rest}
        ):
            alike.setdefault(rest, []).append(name)
    return tuple(name for same in alike.values() if len(same) == 2 for name in same)


def _from_pairs(pairs: Sequence[Sequence[int]], names: Sequence[str], asked: SkeletonFile) -> tuple[int, ...]:
    mirror = list(range(len(names)))
    for a, b in pairs:
        if mirror[a] != a or mirror[b] != b or a == b:
            raise UserError(f"{asked.file}: mirror: {names[a]!r} and {names[b]!r}: expected each name in one pair")
        mirror[a], mirror[b] = b, a
    return tuple(mirror)


def _index(index_of: Mapping[str, int], name: str, asked: SkeletonFile, key: str) -> int:
    if name not in index_of:
        raise UserError(f"{asked.file}: {key}: no such keypoint {name!r}{nearest(name, index_of)}")
    return index_of[name]


# ---- What is known by name


def _known_sigmas() -> dict[tuple[str, ...], float]:
    """By the words of a name, and by those without its side where both sides have the same."""
    known: dict[tuple[str, ...], float] = {}
    for one in (SAPIENS308, WHOLEBODY133, COCO17):
        for name, sigma in zip(one.names, one.sigmas, strict=True):
            known[words(name)] = sigma
    for key in list(known):
        bare = tuple(word for word in key if word not in ("left", "right"))
        known.setdefault(bare, known[key])
    return known


class Sigmas(NamedTuple):
    """The OKS sigmas, the names whose are estimates and those whose are guesses, and how many were given."""

    values: tuple[float, ...]
    estimated: list[str]
    guessed: list[str]
    num_given: int


def _all_sigmas(
    names: tuple[str, ...], mirror: tuple[int, ...], asked: SkeletonFile, index_of: Mapping[str, int]
) -> Sigmas:
    if isinstance(asked.sigmas, tuple):
        if len(asked.sigmas) != len(names):
            raise UserError(f"{asked.file}: sigmas: expected {len(names)} numbers, found {len(asked.sigmas)}")
        return Sigmas(asked.sigmas, [], [], len(names))
    own = {_index(index_of, name, asked, "sigmas"): sigma for name, sigma in (asked.sigmas or {}).items()}
    known, values, estimated, guessed = _known_sigmas(), [], [], []
    for k, name in enumerate(names):
        sigma = own.get(k, own.get(mirror[k], known.get(words(name))))
        if sigma is None:
            sigma = _of_part(name)
            estimated += [name] * (sigma is not None)
            guessed += [name] * (sigma is None)
        values.append(GUESSED_SIGMA if sigma is None else sigma)
    num_given = sum(k in own or mirror[k] in own for k in range(len(names)))
    return Sigmas(tuple(values), estimated, guessed, num_given)


def _of_part(name: str) -> float | None:
    """The median of COCO-WholeBody's keypoints that share the word for a part of the body."""
    name_words = words(name)
    part = next((one for word in name_words if (one := SAME.get(word, word)) in PARTS), None)
    if part is None or (part in ("middle", "ring") and not FINGER_WORDS & set(name_words)):
        return None
    pairs = zip(WHOLEBODY133.names, WHOLEBODY133.sigmas, strict=True)
    return round(median(sigma for other, sigma in pairs if part in words(other)), 4)


def _upper(names: Sequence[str]) -> tuple[int, ...]:
    """The upper half of the body; none unless limbs of both halves and most keypoints are known by their names."""
    words_of = [{part for word in words(name) for part in (word, word.removesuffix("s"))} for name in names]
    lower = [bool(LOWER & name_words) and not FRONT & name_words for name_words in words_of]
    has_both = any(UPPER_LIMBS & name_words for name_words in words_of) and any(
        is_lower and LOWER_LIMBS & name_words for is_lower, name_words in zip(lower, words_of, strict=True)
    )
    if not has_both or 2 * sum(bool(BODY & name_words) for name_words in words_of) <= len(names):
        return ()
    return tuple(k for k, is_lower in enumerate(lower) if not is_lower)


def _describe(skeleton: Skeleton, kind: str, lonely: Sequence[str], sigmas: Sigmas) -> list[str]:
    """What a run says of its keypoints; `lonely` have a side in their name and no partner."""
    estimated, guessed = sigmas.estimated, sigmas.guessed
    k, pairs = skeleton.num_keypoints, [(a, b) for a, b in enumerate(skeleton.mirror) if a < b]
    sources = {"given": sigmas.num_given, "estimated by part of the body": len(estimated), "guessed": len(guessed)}
    sources = {"known by name": k - sum(sources.values()), **sources}
    shown = f" ({short([f'{skeleton.names[a]} - {skeleton.names[b]}' for a, b in pairs], 3)})" if pairs else ""
    halves = (
        f"{len(skeleton.upper)} upper, {len(skeleton.lower)} lower" if skeleton.upper and skeleton.lower else NO_HALVES
    )
    lines = [
        f"keypoints: {k} of {kind} ({short(skeleton.names, 3)}); left and right: "
        f"{len(pairs)} pairs{shown}; {halves}; {len(skeleton.edges)} edges; OKS sigmas: "
        + ", ".join(f"{count} {source}" for source, count in sources.items() if count)
    ]
    if not skeleton.mirror_known:
        lines.append(
            f"warning: left and right of the keypoints are not known ({short(skeleton.names)}): training mirrors no "
            f"image (augment.flip_p is 0) and evaluation has no flip test (eval.flip is false). Give the pairs that a "
            f"mirror swaps as mirror: [[NAME, NAME], ...] in --data.skeleton FILE; mirror: [] if it swaps none"
        )
    if lonely:
        then = "a mirrored image leaves them what they are; say otherwise" if skeleton.mirror_known else "name it"
        lines.append(
            f"warning: {count(len(lonely), 'keypoint')} with a side or a number in the name and no partner "
            f"({short(lonely)}): {then} by mirror: [[{lonely[0]}, NAME]] in --data.skeleton FILE"
        )
    unsure = [*guessed, *estimated]
    if unsure:
        sigma = dict(zip(skeleton.names, skeleton.sigmas, strict=True))
        values = ", ".join(f"{name}: {sigma[name]:g}" for name in unsure[:SHOWN]) + ", ..." * (len(unsure) > SHOWN)
        lines.append(
            f"warning: the OKS sigmas of {len(unsure)} keypoints are {'guesses' if guessed else 'estimates'}, and AP "
            f"is worth no more than they are: label some images twice, and give the standard deviations over "
            f"sqrt(area) in --data.skeleton FILE as sigmas: {{{values}}}"
        )
    return lines


# ---- Names


def check_names(value: Any, where: str) -> tuple[str, ...] | None:
    """A list of names, each once, as a tuple; None for None.

    Raises:
        UserError: it is something else.
    """
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(name, str) and name.strip() for name in value):
        raise UserError(f"{where}: expected a list of names, found {str(value)[:80]}")
    twice = [name for name in value if value.count(name) > 1]
    if twice:
        raise UserError(f"{where}: {twice[0]!r} is there twice; expected each name once")
    return tuple(value)


def is_numbered(names: Sequence[str]) -> bool:
    """Whether the names are one word with different numbers, or numbers alone, as tools write by themselves."""
    return all(re.search(r"\d", name) for name in names) and len({re.sub(r"\d+", "", name) for name in names}) == 1


def short(names: Sequence[str], at_most: int = SHOWN) -> str:
    """The first of the names, for a line."""
    return escape(", ".join(names[:at_most]), keep="") + (", ..." if len(names) > at_most else "")


def nearest(word: str, names: Iterable[str]) -> str:
    """A half sentence with the name that was meant, or with the first of those that there are."""
    close = difflib.get_close_matches(word, list(names), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; there are: {short(list(names))}"


def edge_names(one: Skeleton) -> tuple[tuple[str, str], ...]:
    """The edges by name."""
    return tuple((one.names[a], one.names[b]) for a, b in one.edges)
