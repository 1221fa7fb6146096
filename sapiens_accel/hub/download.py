"""Weights and datasets by their name on the Hugging Face Hub: downloaded once, and read from the cache from then on."""

import fnmatch
import glob
import json
import re
import sys
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, TypeVar
from urllib.parse import unquote

from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import disable_progress_bars

from sapiens_accel.errors import UserError, read_tree
from sapiens_accel.hub.errors import is_final, why, without_token

if not sys.stderr.isatty():
    disable_progress_bars()

FILE = "model.safetensors"
INDEX = f"{FILE}.index.json"
BESIDE = ("config.json", "preprocessor_config.json", "skeleton.json", "README.md", "LICENSE*", "*.py")
FOREIGN = ("torchscript", "bfloat16")  # programs, and copies of less precision
LISTING_SECONDS = 30
LICENSE_FILES = ("LICENSE.md", "LICENSE", "LICENSE.txt")
WEIGHTS_ENDINGS = (".safetensors", ".pth", ".pt", ".bin")
# A revision may hold a slash: refs/convert/parquet is where the Hub keeps any dataset as parquet.
ADDRESS = re.compile(r"hf://(?:datasets/)?(?!buckets/)([^/@]+/[^/@]+)(?:@(refs/[^/]+/[^/]+|[^/]+))?(?:/(.*))?")
OF_MANY = re.compile(r"(.*)-(\d{5})-of-(\d{5})(\.\w+)")  # the Hub's names of shards
Result = TypeVar("Result")


# ---- Weights


class Reference(NamedTuple):
    """Something on the Hub: ORG/NAME[@REVISION][:PATH/IN/REPO]."""

    repo: str
    revision: str | None
    path: str | None


def parse_reference(text: str) -> Reference | None:
    """What a text names on the Hub; None for one that can only be a local path."""
    found = re.fullmatch(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:@([^:@\s]+))?(?::([^:]*[^:/]))?", text, re.ASCII)
    if not found or (found[3] is None and found[1].endswith(WEIGHTS_ENDINGS)):
        return None
    return Reference(*found.groups())


def fetch(reference: str) -> str:
    """A local file or folder as it is; a Hub repository's weights as a local file or snapshot folder.

    One process downloads; several that call at once wait for each other's files.

    Args:
        reference: a path, or ORG/NAME[@REVISION][:PATH/IN/REPO].

    Raises:
        UserError: neither is there, there is no access or no network, or it does not tell which weights are meant.
    """
    local = Path(reference).expanduser()
    if local.exists():
        return str(local)
    wanted = parse_reference(reference)
    if wanted is None:
        parts = reference.split("/")
        is_written_as_path = len(parts) > 2 and reference.endswith(WEIGHTS_ENDINGS) and ":" not in reference
        hint = f", as in {'/'.join(parts[:2])}:{'/'.join(parts[2:])}" if is_written_as_path and parts[0] else ""
        raise UserError(
            f"--weights {reference}: no such file or folder here, and no name of a Hub repository "
            f"(ORG/NAME[@REVISION][:PATH/IN/REPO]{hint})"
        )
    try:
        return str(_download(wanted))
    except UserError as error:
        raise UserError(f"--weights {reference}: {error}") from None
    except Exception as error:
        raise UserError(f"--weights {reference}: {_why(error, wanted)}") from None


def _download(wanted: Reference) -> Path:
    api = HfApi()
    try:
        info = api.model_info(wanted.repo, revision=wanted.revision, timeout=LISTING_SECONDS)
    except Exception as error:
        if is_final(error) and not isinstance(error, OfflineModeIsEnabled):
            raise
        return _cached(api, wanted, error)
    names, returned = choose([file.rfilename for file in info.siblings or ()], wanted)
    folder = Path(
        api.snapshot_download(
            wanted.repo, revision=wanted.revision, allow_patterns=[glob.escape(name) for name in names]
        )
    )
    _check_shards(folder / returned)
    return folder / returned


def _cached(api: HfApi, wanted: Reference, error: Exception) -> Path:
    """The same out of the cache, where the Hub cannot be asked."""
    try:
        # No file is asked for: of those that others left out, none is missed.
        folder = Path(
            api.snapshot_download(wanted.repo, revision=wanted.revision, allow_patterns=[], local_files_only=True)
        )
        present = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        _, returned = choose(present, wanted)
        _check_shards(folder / returned)
    except (EntryNotFoundError, UserError):
        raise error from None
    return folder / returned


def choose(files: Sequence[str], wanted: Reference) -> tuple[list[str], str]:
    """Which of a repository's files are needed, and the one, or the folder ("" for the whole), that holds the weights.

    Raises:
        UserError: no weights among them, or several.
    """
    inside = f"{wanted.path}/" if wanted.path else ""
    if wanted.path is not None and wanted.path in files:
        return [wanted.path, *_license_files(files)], wanted.path
    here = [name.removeprefix(inside) for name in files if name.startswith(inside)]
    if not here:
        raise UserError(f"{wanted.repo} has no {wanted.path!r}{_where(files, wanted)}")
    here = [name for name in here if "/" not in name]
    weights = _weights(here)
    if len({name for name in weights if name != INDEX}) == 0 or (len(weights) > 1 and INDEX not in weights):
        raise UserError(f"{wanted.repo} has {'no' if not weights else 'several'} weights{_where(files, wanted)}")
    beside = [name for name in here if any(fnmatch.fnmatch(name, pattern) for pattern in BESIDE)]
    names = [inside + name for name in (*weights, *beside)]
    # A folder is read by its model.safetensors; any other name has to be told.
    returned = wanted.path or "" if {FILE, INDEX} & set(weights) else inside + weights[0]
    return [*names, *(name for name in _license_files(files) if name not in names)], returned


def _weights(names: Sequence[str]) -> list[str]:
    """The weights among a folder's files; more than one (but shards) are a choice that is not ours."""
    if FILE in names:
        return [FILE]
    if INDEX in names:
        return [INDEX, *(name for name in names if fnmatch.fnmatch(name, "model-*-of-*.safetensors"))]
    mine = [name for name in names if not any(word in name.lower() for word in FOREIGN)]
    kinds = ("*.safetensors", "*_clean.pth", "*.pth")
    return next((found for kind in kinds if (found := fnmatch.filter(mine, kind))), [])


def _where(files: Sequence[str], wanted: Reference) -> str:
    found = [name for name in files if name.endswith((".safetensors", ".pth")) and name != INDEX]
    if not found:
        return "; there are no weights in it"
    shown = ", ".join(f"{wanted.repo}:{name}" for name in found[:4])
    return f"; name the file: {shown}{f' and {len(found) - 4} more' if len(found) > 4 else ''}"


def _license_files(files: Sequence[str]) -> list[str]:
    return [name for name in files if fnmatch.fnmatch(name, "LICENSE*") and "/" not in name]


def _check_shards(path: Path) -> None:
    if (path / INDEX).is_file() and not (path / FILE).is_file():
        shards = read_tree(path / INDEX, json.loads, "JSON").get("weight_map")
        if not isinstance(shards, dict):
            raise UserError(f"{path / INDEX}: no 'weight_map' in it; expected an index of shards")
        if missing := sorted({str(name) for name in shards.values() if not (path / str(name)).is_file()}):
            raise UserError(f"{INDEX} names {missing[0]}, which is not there")


def _why(error: BaseException, wanted: Reference) -> str:
    """What is in the way of a download, and what to do about it."""
    if isinstance(error, OfflineModeIsEnabled):
        return (
            f"HF_HUB_OFFLINE is set, and {wanted.repo} is not whole in the cache {constants.HF_HUB_CACHE}; "
            f"download it once without HF_HUB_OFFLINE"
        )
    if isinstance(error, RepositoryNotFoundError) and not isinstance(error, GatedRepoError):
        return (
            f"no such file or folder here, and no Hub repository {wanted.repo} that you may see; correct the name or, "
            f"if it is private, log in with `hf auth login`"
        )
    if isinstance(error, RevisionNotFoundError):
        return f"{wanted.repo} has no revision {wanted.revision!r}; expected a branch, a tag or a commit of it"
    if is_final(error):
        return why(error, wanted.repo)
    return f"{why(error, wanted.repo)}; and it is not whole in the cache {constants.HF_HUB_CACHE}"


# ---- Datasets


class DatasetAddress(NamedTuple):
    """A dataset of the Hub, of a branch, tag or commit, or a folder in it."""

    repo: str
    revision: str | None
    folder: str


def parse_address(root: str) -> DatasetAddress | None:
    """hf://[datasets/]ORG/NAME[@REVISION][/FOLDER]; None for any other address."""
    told = ADDRESS.fullmatch(root.rstrip("/"))
    return DatasetAddress(told[1], unquote(told[2]) if told[2] else None, told[3] or "") if told else None


def pin_to_commit(root: str, where: DatasetAddress) -> str:
    """The address of the commit that it is now: what is pushed during a run does not change what the run reads.

    Raises:
        UserError: why it cannot be found.
    """
    commit = _explain(root, where, lambda: _commit(HfApi().endpoint, where.repo, where.revision))
    return f"hf://datasets/{where.repo}@{commit}" + (f"/{where.folder}" if where.folder else "")


@lru_cache(maxsize=64)
def _commit(endpoint: str, repo: str, revision: str | None) -> str:
    # Asked once a process: skeleton, training and validation are then of one commit.
    told = HfApi(endpoint=endpoint).dataset_info(repo, revision=revision, timeout=LISTING_SECONDS)
    return str(told.sha)


def download_dataset(root: str, where: DatasetAddress, endings: Sequence[str]) -> Path:
    """Its shards in the Hub's own cache; without a network, what is there.

    Raises:
        UserError: why it cannot be had; a download that was cut off, and cannot go on without a network.
    """
    inside = f"{where.folder}/" if where.folder else ""
    patterns = [f"{inside}*{ending}" for ending in endings]
    folder = _explain(
        root,
        where,
        lambda: Path(
            snapshot_download(where.repo, repo_type="dataset", revision=where.revision, allow_patterns=patterns)
        ),
    )
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    if gone := _first_missing_shard(names):
        raise UserError(
            f"--data.root {root}: {gone} is not in the cache {constants.HF_HUB_CACHE}: its download was cut off; "
            f"start again with a network and without HF_HUB_OFFLINE, it goes on where it stopped"
        )
    return folder / where.folder


def download_file(name: str) -> str:
    """A file of the Hub in its cache, by address; any other name as it is.

    Raises:
        UserError: as `download_dataset`.
    """
    where = parse_address(name)
    if not where:
        return name
    return _explain(
        name, where, lambda: hf_hub_download(where.repo, where.folder, repo_type="dataset", revision=where.revision)
    )


def _first_missing_shard(names: Sequence[str]) -> str | None:
    """The first shard that others say there is: train-00000-of-00003 comes with two others."""
    for name in sorted(names):
        if told := OF_MANY.fullmatch(name):
            every = (f"{told[1]}-{number:05d}-of-{told[3]}{told[4]}" for number in range(int(told[3])))
            if lost := next((one for one in every if one not in names), None):
                return lost
    return None


def _explain(root: str, where: DatasetAddress, action: Callable[[], Result]) -> Result:
    try:
        return action()
    except Exception as error:
        raise UserError(f"--data.root {root}: {without_token(_why_no_dataset(error, where))}") from None


def _why_no_dataset(error: Exception, where: DatasetAddress) -> str:
    cached = f"it is not in the cache {constants.HF_HUB_CACHE}"
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, and streaming reads from the Hub; without --data.streaming its cache is read"
    if isinstance(error, LocalEntryNotFoundError):
        offline = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the Hub could not be reached"
        return f"{offline}, and {cached}; download it once with a network"
    if isinstance(error, RepositoryNotFoundError) and not isinstance(error, GatedRepoError):
        return (
            f"no dataset {where.repo} on the Hub that you may see; correct the name or, if it is private, log in "
            f"with `hf auth login`"
        )
    if isinstance(error, RevisionNotFoundError):
        return f"{where.repo} has no revision {where.revision!r}; expected a branch, a tag or a commit of it"
    return why(error, f"datasets/{where.repo}")
