"""Credentials in URLs (https://USER:PASSWORD@host/...): kept in this process only, and restored to open a file.

Options, run directories, caches and messages hold the URL without them.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, TypeVar

from sapiens_accel.errors import SCHEMES_WITHOUT_USER, SECRET_KEYS, UserError, is_secret

Tree = TypeVar("Tree")
# Each URL of a chain such as simplecache::https://host/file: its scheme, and the part before its first / or before the
# next URL of the chain.
ADDRESS = re.compile(r"(?<![\w+.-])([\w+.-]{1,30}://)((?:(?!::[\w+.-]+:[/:])[^/?#\s'\"])*)")
Known = dict[tuple[str, str], str]  # (scheme, host) to user and password
known: Known = {}


def take(text: str) -> str:
    """Remove the credentials from a URL and remember them; any other text is returned unchanged.

    A user that is no secret stays, and so does the container of abfs://CONTAINER@ACCOUNT/...

    Raises:
        UserError: a secret that cannot be removed; credentials of a second user of the same host.
    """
    taken = ADDRESS.sub(_take_one, text)
    if ADDRESS.search(text) and (secret := SECRET_KEYS.search(taken)):
        raise UserError(
            f"{taken.partition('?')[0]}: a secret in the address ({secret[1][1:-1]}=) would be written to files. "
            "Set it by the environment variables of the file system, or as USER:PASSWORD@ before the host"
        )
    return taken


def _take_one(match: re.Match[str]) -> str:
    scheme, authority = match.groups()
    user, at, host = authority.rpartition("@")
    name, _, port = host.rpartition(":")
    rest = match.string[match.end() :].partition("::")[0]
    odd_port = name and not port.isdigit() and not host.startswith("[")
    # Before the last @ is a password with these characters in it; a part of it would be taken for the host.
    if (odd_port or ":" in user) and "@" in rest and scheme.removesuffix("://") not in SCHEMES_WITHOUT_USER:
        raise UserError(
            f"{scheme}***@{rest.rpartition('@')[2]}: an @ after the first / ? # or quote, where the password ends "
            "(expected USER:PASSWORD@ before the host). Write these characters of the password as %2F %3F %23 %22 %27, "
            "and @ of the path as %40"
        )
    if not at or not is_secret(scheme, user):
        return match[0]
    if known.setdefault((scheme, host), user).partition(":")[0] != user.partition(":")[0]:
        raise UserError(f"{scheme}{host}: addresses with two users (expected one per host). Copy the data of one")
    known[scheme, host] = user
    return scheme + host


def put_back(address: str) -> str:
    """Insert the credentials that `take` removed from this URL or from another one of the same host."""

    def put(match: re.Match[str]) -> str:
        scheme, host = match.groups()
        return f"{scheme}{user}@{host}" if (user := known.get((scheme, host))) else match[0]

    return ADDRESS.sub(put, address)


def take_all(tree: Tree) -> Tree:
    """Apply `take` to every text in a tree of dataclasses, mappings and lists."""
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
