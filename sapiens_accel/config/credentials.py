"""Credentials in addresses (https://USER:PASSWORD@host/...): held by the process alone, and put back to open a file.

Options, run directories, caches and messages have the address without them.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, TypeVar

Tree = TypeVar("Tree")
ADDRESS = re.compile(r"(\w[\w+.-]*://)([^/\s@]+)@([^/\s]*)(.*)", re.DOTALL)
_known: dict[tuple[str, str], str] = {}  # (scheme, host) to user and password


def take(text: str) -> str:
    """An address without its credentials, which are remembered; any other text as it is."""
    if not (match := ADDRESS.fullmatch(text)):
        return text
    scheme, user, host, rest = match.groups()
    _known[scheme, host] = user
    return f"{scheme}{host}{rest}"


def put_back(address: str) -> str:
    """An address with the credentials that were taken from it, or from another one of its host."""
    scheme, separator, rest = address.partition("://")
    user = _known.get((scheme + separator, rest.partition("/")[0]))
    return f"{scheme}{separator}{user}@{rest}" if user else address


def take_all(tree: Tree) -> Tree:
    """A tree of dataclasses, mappings and lists with all addresses as `take` leaves them."""
    taken: Any = tree
    if isinstance(tree, str):
        taken = take(tree)
    elif dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        changes = {field.name: take_all(getattr(tree, field.name)) for field in dataclasses.fields(tree)}
        taken = dataclasses.replace(tree, **changes)
    elif isinstance(tree, Mapping):
        taken = {key: take_all(value) for key, value in tree.items()}
    elif isinstance(tree, list | tuple):
        taken = type(tree)(map(take_all, tree))
    return taken
