"""What a COCO JSON says of its keypoints, and how they are read, by name, as those of a run."""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sapiens_accel.errors import UserError
from sapiens_accel.pose.infer_skeleton import SHOWN, Category, check_names, edge_names, is_numbered, nearest, short
from sapiens_accel.pose.skeleton import COCO17, WHOLEBODY133, words
from sapiens_accel.sources.coco import show_value
from sapiens_accel.sources.discover import open_source
from sapiens_accel.sources.schema import WHOLE_BODY, Reading, Source

SUMMARY_VERSION = 3
NUMBERED = "; if they are numbers alone in the same order, give the names by --data.skeleton FILE"


def describe_keypoints(file: Path, wanted: str | None, cache: Path) -> Category:
    """What a COCO JSON says of its keypoints.

    Args:
        wanted: the name of the category to take; default: the one with keypoints, of several of them `person`, or all
            if their keypoints are the same (a kind of animal each).
        cache: where what was found is kept, by the content of the JSON: COCO's takes seconds to parse.

    Raises:
        UserError: no COCO JSON; no such category, or none to be preferred; names that are no names or not unique.
    """
    summary = _summary(open_source(file), cache)
    every = summary["categories"]
    kinds = _choose_categories(file, every, wanted)
    one = kinds[0] if kinds else {}
    names = check_names(one.get("keypoints") or None, f"{file}: category {one.get('name')!r}: keypoints")
    firsts = summary["first"]
    first = next((firsts[str(kind.get("id"))] for kind in kinds if str(kind.get("id")) in firsts), None)
    if not kinds or first is None:
        first = firsts.get("None") or (None if kinds else next(iter(firsts.values()), None))
    count, whole = first or (None, False)
    edges, warnings = _named_edges(file, one.get("skeleton") if names else None, names or ())
    if whole and (not names or len(names) != 133):
        names, edges = WHOLEBODY133.names, edge_names(WHOLEBODY133)
    listed = {str(kind.get("name")) for kind in every}
    # Where there is nothing to choose by, all that have keypoints count.
    in_use = kinds or [kind for kind in every if str(kind.get("id")) in firsts] or every
    chosen = {str(kind.get("name")) for kind in in_use}
    as_ever = chosen == ({"person"} if "person" in listed else listed)
    return Category(
        file=file,
        categories=() if as_ever or not kinds else tuple(sorted(chosen)),
        kind=short(sorted(chosen), 2) or "things",
        names=names,
        edges=edges,
        count=133 if whole else len(names) if names else count,
        whole=whole,
        warnings=warnings,
        chosen=tuple(sorted(chosen)),
    )


def _summary(source: Source, cache: Path) -> dict[str, Any]:
    """The categories, and of each the count of the first annotation with keypoints and whether it has five lists."""
    file = cache / "people" / f"{source.digest}-categories-v{SUMMARY_VERSION}.json"
    if file.is_file():
        return json.loads(file.read_text())
    summary = {"first": _first_counts(source.some_annotations()), "categories": source.categories}
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(summary))
    temporary.replace(file)
    return summary


def _first_counts(annotations: Iterable[Any]) -> dict[str, tuple[int, bool]]:
    first: dict[str, tuple[int, bool]] = {}
    for annotation in annotations:
        if isinstance(annotation, dict) and isinstance(annotation.get("keypoints"), list) and annotation["keypoints"]:
            kind, whole = str(annotation.get("category_id")), all(annotation.get(key) is not None for key in WHOLE_BODY)
            first.setdefault(kind, (len(annotation["keypoints"]) // 3, whole))
    return first


def _choose_categories(file: Path, kinds: list[dict[str, Any]], wanted: str | None) -> list[dict[str, Any]]:
    """The categories whose annotations count; none where there is nothing to choose by."""
    names = [str(kind.get("name")) for kind in kinds]
    if wanted is not None:
        if wanted not in names:
            raise UserError(f"{file}: no category {wanted!r} (--data.category){nearest(wanted, names)}")
        return [kinds[names.index(wanted)]]
    able = [kind for kind in kinds if kind.get("keypoints")]
    if len(able) > 1 and any(kind["keypoints"] != able[0]["keypoints"] for kind in able):
        people = [kind for kind in able if kind.get("name") == "person"]
        if not people:
            several = ", ".join(str(kind.get("name")) for kind in able[:SHOWN])
            raise UserError(f"{file}: several categories with keypoints ({several}): name one by --data.category NAME")
        return people
    return able or [kind for kind in kinds if kind.get("name") == "person"] or kinds[: len(kinds) == 1]


def _named_edges(file: Path, pairs: Any, names: Sequence[str]) -> tuple[tuple[tuple[str, str], ...], tuple[str, ...]]:
    """COCO's `skeleton`, pairs counted from 1, as pairs of names; and what is odd in it. Only images need it."""
    fine: list[list[int]] = []
    odd: list[Any] = []
    if pairs is not None and not isinstance(pairs, list):
        return (), (f"warning: {file}: skeleton: expected a list of pairs, found {show_value(pairs)}; it is left out",)
    for pair in pairs or ():
        is_pair = isinstance(pair, list) and len(pair) == 2 and all(type(k) is int for k in pair)
        (fine if is_pair and all(0 <= k <= len(names) for k in pair) else odd).append(pair)
    from_zero = any(0 in pair for pair in fine) and not any(len(names) in pair for pair in fine)
    if not from_zero:
        odd += [pair for pair in fine if 0 in pair]
        fine = [pair for pair in fine if 0 not in pair]
    warnings = [f"warning: {file}: skeleton: {len(odd)} edges left out, such as {odd[0]}"] if odd else []
    warnings += [f"warning: {file}: skeleton: its edges count from 0; COCO's count from 1"] if from_zero else []
    named = ["", *names] if not from_zero else list(names)
    return tuple((named[pair[0]], named[pair[1]]) for pair in fine), tuple(warnings)


def choose_reading(one: Category, names: tuple[str, ...]) -> tuple[Reading, str]:
    """How a JSON's annotations become the run's keypoints, by name, and a line about those that it lacks ("" if none).

    Raises:
        UserError: it has none of them, or names none and has another number.
    """
    plain = Reading(categories=one.categories)
    if one.whole and names == COCO17.names:
        return plain, ""
    if one.names is None:
        if one.count in (None, len(names)):
            return plain, ""
        raise UserError(
            f"{one.file}: its annotations have {one.count} keypoints and its category names none; the run has "
            f"{len(names)} ({short(names, 3)}): name them there, or in a YAML (--data.skeleton FILE)"
        )
    exact = {name: k for k, name in enumerate(one.names)}
    alike = {words(name): k for k, name in reversed(list(enumerate(one.names)))}
    source = tuple(exact.get(name, alike.get(words(name), -1)) for name in names)
    lacks = [name for name, k in zip(names, source, strict=True) if k < 0]
    if len(lacks) == len(names):
        raise UserError(
            f"{one.file}: none of the run's keypoints ({short(names, 3)}) is among its own ({short(one.names, 3)}); "
            f"expected names in common" + NUMBERED * is_numbered(one.names)
        )
    if source == tuple(range(one.count or 0)):
        return plain, ""
    line = f"{one.file}: has {len(names) - len(lacks)} of the {len(names)} keypoints, by name; "
    line += f"the others have weight 0 there: {short(lacks)}" if lacks else "all of them"
    unused = [name for k, name in enumerate(one.names) if k not in source]
    line += f"; nothing is learned of its own {short(unused)}: other names of the same?" if lacks and unused else ""
    return replace(plain, count=one.count, source=source), line if lacks else ""
