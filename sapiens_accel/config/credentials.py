"""Credentials in addresses (https://USER:PASSWORD@host/...): held by the process alone, and put back to open a file.

Options, run directories, caches and messages have the address without them.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, TypeVar

from sapiens_accel.errors import NO_USER, SECRET_KEYS, UserError, is_secret

Tree = TypeVar("Tree")
# Of a chain, as simplecache::https://host/file, each address: its scheme, and what stands before its first / or the
# next one of the chain.
ADDRESS = re.compile(r"(?<![\w+.-])([\w+.-]{1,30}://)((?:(?!::[\w+.-]+:[/:])[^/?#\s'\"])*)")
Known = dict[tuple[str, str], str]  # (scheme, host) to user and password
known: Known = {}


def take(text: str) -> str:
    """An address without its credentials, which are remembered; any other text as it is.

    A user that is no secret stays, and so does what is none: the container of abfs://CONTAINER@ACCOUNT/...

    Raises:
        UserError: credentials that cannot be taken; those of a second user of a host.
    """
    taken = ADDRESS.sub(_take_one, text)
    if ADDRESS.search(text) and (found := SECRET_KEYS.search(taken)):
        raise UserError(
            f"{taken.partition('?')[0]}: a secret in the address ({found[1][1:-1]}=), which would be written to files. "
            "Give it to the file system by its environment variables, or as USER:PASSWORD@ before the host"
        )
    return taken


def _take_one(match: re.Match[str]) -> str:
    scheme, authority = match.groups()
    user, at, host = authority.rpartition("@")
    name, _, port = host.rpartition(":")
    rest = match.string[match.end() :].partition("::")[0]
    odd_port = name and not port.isdigit() and not host.startswith("[")
    if odd_port and "@" in rest and scheme.removesuffix("://") not in NO_USER:
        raise UserError(
            f"{scheme}***@{rest.rpartition('@')[2]}: the password ends at its first / ? # or quote (expected "
            "USER:PASSWORD@ before the host). Write these as %2F %3F %23 %22 %27"
        )
    if not at or not is_secret(scheme, user):
        return match[0]
    if known.setdefault((scheme, host), user).partition(":")[0] != user.partition(":")[0]:
        raise UserError(f"{scheme}{host}: addresses with two users (expected one for a host). Copy the data of one")
    known[scheme, host] = user
    return scheme + host


def put_back(address: str) -> str:
    """An address with the credentials that were taken from it, or from another one of its host."""

    def put(match: re.Match[str]) -> str:
        scheme, host = match.groups()
        return f"{scheme}{user}@{host}" if (user := known.get((scheme, host))) else match[0]

    return ADDRESS.sub(put, address)


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
