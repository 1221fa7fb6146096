"""Data sets of the Hub: what an address means, at which commit, and their shards downloaded once."""

import re
import sys
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, TypeVar
from urllib.parse import unquote

from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import disable_progress_bars

from sapiens_accel.errors import UserError
from sapiens_accel.hub.errors import why, without_token

if not sys.stderr.isatty():
    disable_progress_bars()

# A revision may hold a slash: refs/convert/parquet is where the Hub keeps any data set as parquet.
ADDRESS = re.compile(r"hf://(?:datasets/)?(?!buckets/)([^/@]+/[^/@]+)(?:@(refs/[^/]+/[^/]+|[^/]+))?(?:/(.*))?")
OF_MANY = re.compile(r"(.*)-(\d{5})-of-(\d{5})(\.\w+)")  # the Hub's names of shards
LISTING_SECONDS = 30
Result = TypeVar("Result")


class Place(NamedTuple):
    """A data set of the Hub, of a branch, tag or commit, or a folder in it."""

    repo: str
    revision: str | None
    folder: str


def place(root: str) -> Place | None:
    """hf://[datasets/]ORG/NAME[@REVISION][/FOLDER]; None for any other address."""
    told = ADDRESS.fullmatch(root.rstrip("/"))
    return Place(told[1], unquote(told[2]) if told[2] else None, told[3] or "") if told else None


def pinned(root: str, where: Place) -> str:
    """The address of the commit that it is now: what is pushed during a run does not change what the run reads.

    Raises:
        UserError: why it cannot be found.
    """
    commit = _asked(root, where, lambda: _commit(HfApi().endpoint, where.repo, where.revision))
    return f"hf://datasets/{where.repo}@{commit}" + (f"/{where.folder}" if where.folder else "")


@lru_cache(maxsize=64)
def _commit(endpoint: str, repo: str, revision: str | None) -> str:
    # Asked once a process: skeleton, training and validation are then of one commit.
    told = HfApi(endpoint=endpoint).dataset_info(repo, revision=revision, timeout=LISTING_SECONDS)
    return str(told.sha)


def downloaded(root: str, where: Place, endings: Sequence[str]) -> Path:
    """Its shards in the Hub's own cache; without a network, what is there.

    Raises:
        UserError: why it cannot be had; a download that was cut off, and cannot go on without a network.
    """
    inside = f"{where.folder}/" if where.folder else ""
    patterns = [f"{inside}*{ending}" for ending in endings]
    folder = _asked(
        root,
        where,
        lambda: Path(
            snapshot_download(where.repo, repo_type="dataset", revision=where.revision, allow_patterns=patterns)
        ),
    )
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    if gone := _gone(names):
        raise UserError(
            f"--data.root {root}: {gone} is not in the cache {constants.HF_HUB_CACHE}: its download was cut off; "
            f"start again with a network and without HF_HUB_OFFLINE, it goes on where it stopped"
        )
    return folder / where.folder


def local(name: str) -> str:
    """A file of the Hub in its cache, by address; any other name as it is.

    Raises:
        UserError: as `downloaded`.
    """
    where = place(name)
    if not where:
        return name
    return _asked(
        name, where, lambda: hf_hub_download(where.repo, where.folder, repo_type="dataset", revision=where.revision)
    )


def _gone(names: Sequence[str]) -> str | None:
    """The first shard that others say there is: train-00000-of-00003 comes with two others."""
    for name in sorted(names):
        if told := OF_MANY.fullmatch(name):
            every = (f"{told[1]}-{number:05d}-of-{told[3]}{told[4]}" for number in range(int(told[3])))
            if lost := next((one for one in every if one not in names), None):
                return lost
    return None


def _asked(root: str, where: Place, action: Callable[[], Result]) -> Result:
    try:
        return action()
    except Exception as error:
        raise UserError(f"--data.root {root}: {without_token(_why(error, where))}") from None


def _why(error: Exception, where: Place) -> str:
    cached = f"it is not in the cache {constants.HF_HUB_CACHE}"
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, and streaming reads from the Hub; without --data.streaming its cache is read"
    if isinstance(error, LocalEntryNotFoundError):
        offline = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the Hub could not be reached"
        return f"{offline}, and {cached}; download it once with a network"
    if isinstance(error, RepositoryNotFoundError) and not isinstance(error, GatedRepoError):
        return (
            f"no data set {where.repo} on the Hub that you may see; correct the name or, if it is private, log in "
            f"with `hf auth login`"
        )
    if isinstance(error, RevisionNotFoundError):
        return f"{where.repo} has no revision {where.revision!r}; expected a branch, a tag or a commit of it"
    return why(error, f"datasets/{where.repo}")
