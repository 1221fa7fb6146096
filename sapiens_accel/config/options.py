"""The typed tree of options as a flat table: types, ranges, and descriptions of valid values."""

import dataclasses
import types
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from sapiens_accel.config.schema import Config, Range


@cache
def options() -> Mapping[str, Any]:
    """Dotted key to type for every option and group, including the items of a list of groups (`data.more.root`)."""
    return dict(_walk(Config, ""))


def is_group(key: str) -> bool:
    """Whether a key is a group of options."""
    return group_of(options()[key]) is not None


def switches() -> tuple[str, ...]:
    """Keys of the bool options, for which `--key` alone means true."""
    return tuple(key for key, kind in options().items() if kind is bool)


def range_faults(value: Any, kind: Any, key: str = "") -> Iterator[tuple[str, Range, float]]:
    """Key, range and value of each number in `value` (of type `kind`) that is out of its range."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        for name, inner in get_type_hints(type(value), include_extras=True).items():
            yield from range_faults(getattr(value, name), inner, f"{key}.{name}".removeprefix("."))
    elif isinstance(value, tuple):
        inner = [item for item in get_args(kind) if item is not Ellipsis] or [Any]
        for i, item in enumerate(value):
            yield from range_faults(item, inner[min(i, len(inner) - 1)], key)
    elif get_origin(kind) is Annotated and isinstance(value, int | float):
        yield from ((key, limits, value) for limits in kind.__metadata__ if value not in limits)
    elif get_origin(kind) in (Union, types.UnionType):
        for inner in get_args(kind):
            yield from range_faults(value, inner, key)


def describe(kind: Any) -> str:
    """The valid values of a type, in words."""
    if get_origin(kind) is Annotated:
        whole = "a whole number" if get_args(kind)[0] is int else "a number"
        return whole + str(kind.__metadata__[0]).removeprefix("a number")
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join(describe(inner) for inner in get_args(kind))
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, get_args(kind)))
    if get_origin(kind) is tuple:
        first, *others = get_args(kind)
        number = "" if others == [Ellipsis] else f"{1 + len(others)} of "
        return f"a list [...], {number}each {describe(first)}"
    names = {bool: "true or false", str: "text", type(None): "null"}
    return names.get(kind, "keys and values, as {KEY: VALUE}")


def _walk(kind: type, prefix: str) -> Iterator[tuple[str, Any]]:
    for name, inner in get_type_hints(kind, include_extras=True).items():
        yield prefix + name, inner
        if group := group_of(inner):
            yield from _walk(group, f"{prefix}{name}.")


def group_of(kind: Any) -> type | None:
    """The dataclass in a type that is one, is optionally one, or is a list of them."""
    return next(
        (one for one in (kind, *get_args(kind)) if isinstance(one, type) and dataclasses.is_dataclass(one)), None
    )
