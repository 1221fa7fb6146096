"""Download weights and datasets from the Hugging Face Hub, once; later calls read the cache."""

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
from sapiens_accel.hub.errors import explain, hide_token, is_final

if not sys.stderr.isatty():
    disable_progress_bars()

FILE = "model.safetensors"
INDEX = f"{FILE}.index.json"
BESIDE = ("config.json", "preprocessor_config.json", "skeleton.json", "README.md", "LICENSE*", "*.py",
          "visibility.safetensors")  # fmt: skip
NOT_TRAINABLE = ("torchscript", "bfloat16")  # programs, and copies of lower precision
LISTING_SECONDS = 30
LICENSE_FILES = ("LICENSE.md", "LICENSE", "LICENSE.txt")
WEIGHTS_ENDINGS = (".safetensors", ".pth", ".pt", ".bin")
# A revision may hold a slash: refs/convert/parquet is where the Hub keeps any dataset as parquet.
ADDRESS = re.compile(r"hf://(?:datasets/)?(?!buckets/)([^/@]+/[^/@]+)(?:@(refs/[^/]+/[^/]+|[^/]+))?(?:/(.*))?")
SHARD_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})(\.\w+)")  # as the Hub names shards
Result = TypeVar("Result")


# ---- Weights


class Reference(NamedTuple):
    """Something on the Hub: ORG/NAME[@REVISION][:PATH/IN/REPO]."""

    repo: str
    revision: str | None
    path: str | None


def parse_reference(text: str) -> Reference | None:
    """The Hub reference in a text; None for a text that can only be a local path."""
    match = re.fullmatch(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:@([^:@\s]+))?(?::([^:]*[^:/]))?", text, re.ASCII)
    if not match or (match[3] is None and match[1].endswith(WEIGHTS_ENDINGS)):
        return None
    return Reference(*match.groups())


def fetch(reference: str) -> str:
    """Return a local path unchanged; download the weights of a Hub repository and return their file or snapshot folder.

    Processes that call at the same time wait for each other's downloads.

    Args:
        reference: a path, or ORG/NAME[@REVISION][:PATH/IN/REPO].

    Raises:
        UserError: there is neither, no access or no network, or the reference is ambiguous.
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
            f"--weights {reference}: no such file or folder here, and not the name of a Hub repository "
            f"(expected ORG/NAME[@REVISION][:PATH/IN/REPO]{hint})"
        )
    try:
        return str(_download(wanted))
    except UserError as error:
        raise UserError(f"--weights {reference}: {error}") from None
    except Exception as error:
        raise UserError(f"--weights {reference}: {_explain_weights(error, wanted)}") from None


def _download(wanted: Reference) -> Path:
    api = HfApi()
    try:
        info = api.model_info(wanted.repo, revision=wanted.revision, timeout=LISTING_SECONDS)
    except Exception as error:
        if is_final(error) and not isinstance(error, OfflineModeIsEnabled):
            raise
        return _find_cached(api, wanted, error)
    names, returned = choose([file.rfilename for file in info.siblings or ()], wanted)
    folder = Path(
        api.snapshot_download(
            wanted.repo, revision=wanted.revision, allow_patterns=[glob.escape(name) for name in names]
        )
    )
    _check_shards(folder / returned)
    return folder / returned


def _find_cached(api: HfApi, wanted: Reference, error: Exception) -> Path:
    """The weights in the cache, when the Hub cannot be reached; raises `error` if they are not complete there."""
    try:
        # Without patterns: an earlier download of other files of this repository does not count as incomplete.
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
    """The files of a repository to download, and the file or folder ("" for its root) that holds the weights.

    Raises:
        UserError: there are no weights, or several.
    """
    inside = f"{wanted.path}/" if wanted.path else ""
    if wanted.path is not None and wanted.path in files:
        return [wanted.path, *_license_files(files)], wanted.path
    present = [name.removeprefix(inside) for name in files if name.startswith(inside)]
    if not present:
        raise UserError(f"{wanted.repo} has no {wanted.path!r}{_list_weights(files, wanted)}")
    present = [name for name in present if "/" not in name]
    weights = _find_weights(present)
    if len({name for name in weights if name != INDEX}) == 0 or (len(weights) > 1 and INDEX not in weights):
        raise UserError(f"{wanted.repo} has {'no' if not weights else 'several'} weights{_list_weights(files, wanted)}")
    beside = [name for name in present if any(fnmatch.fnmatch(name, pattern) for pattern in BESIDE)]
    names = [inside + name for name in (*weights, *beside)]
    # A folder is read by its model.safetensors; a file of any other name is returned itself.
    returned = wanted.path or "" if {FILE, INDEX} & set(weights) else inside + weights[0]
    return [*names, *(name for name in _license_files(files) if name not in names)], returned


def _find_weights(names: Sequence[str]) -> list[str]:
    """The weights among the files of a folder. Several that are not shards are for the user to choose from."""
    if FILE in names:
        return [FILE]
    if INDEX in names:
        return [INDEX, *(name for name in names if fnmatch.fnmatch(name, "model-*-of-*.safetensors"))]
    trainable = [name for name in names if not any(word in name.lower() for word in NOT_TRAINABLE)]
    kinds = ("*.safetensors", "*_clean.pth", "*.pth")
    return next((matching for kind in kinds if (matching := fnmatch.filter(trainable, kind))), [])


def _list_weights(files: Sequence[str], wanted: Reference) -> str:
    present = [name for name in files if name.endswith((".safetensors", ".pth")) and name != INDEX]
    if not present:
        return "; there are no weights in it"
    shown = ", ".join(f"{wanted.repo}:{name}" for name in present[:4])
    return f"; name the file: {shown}{f' and {len(present) - 4} more' if len(present) > 4 else ''}"


def _license_files(files: Sequence[str]) -> list[str]:
    return [name for name in files if fnmatch.fnmatch(name, "LICENSE*") and "/" not in name]


def _check_shards(path: Path) -> None:
    if (path / INDEX).is_file() and not (path / FILE).is_file():
        shards = read_tree(path / INDEX, json.loads, "JSON").get("weight_map")
        if not isinstance(shards, dict):
            raise UserError(f"{path / INDEX}: no 'weight_map' in it; expected an index of shards")
        if missing := sorted({str(name) for name in shards.values() if not (path / str(name)).is_file()}):
            raise UserError(f"{INDEX} names {missing[0]}, which is missing")


def _explain_weights(error: BaseException, wanted: Reference) -> str:
    """Why weights could not be downloaded, and how to fix it."""
    if isinstance(error, OfflineModeIsEnabled):
        return (
            f"HF_HUB_OFFLINE is set, and {wanted.repo} is not complete in the cache {constants.HF_HUB_CACHE}; "
            f"download it once without HF_HUB_OFFLINE"
        )
    if isinstance(error, RepositoryNotFoundError) and not isinstance(error, GatedRepoError):
        return (
            f"no such file or folder here, and no Hub repository {wanted.repo} that you can access; correct the name "
            f"or, if it is private, log in with `hf auth login`"
        )
    if isinstance(error, RevisionNotFoundError):
        return f"{wanted.repo} has no revision {wanted.revision!r}; expected a branch, a tag or a commit of it"
    if is_final(error):
        return explain(error, wanted.repo)
    return f"{explain(error, wanted.repo)}; and it is not complete in the cache {constants.HF_HUB_CACHE}"


# ---- Datasets


class DatasetAddress(NamedTuple):
    """A dataset on the Hub at a branch, tag or commit, or a folder of it."""

    repo: str
    revision: str | None
    folder: str


def parse_address(root: str) -> DatasetAddress | None:
    """Parse hf://[datasets/]ORG/NAME[@REVISION][/FOLDER]; None for any other address."""
    match = ADDRESS.fullmatch(root.rstrip("/"))
    return DatasetAddress(match[1], unquote(match[2]) if match[2] else None, match[3] or "") if match else None


def pin_to_commit(root: str, where: DatasetAddress) -> str:
    """The address with the current commit as revision, so that a push during a run does not change what the run reads.

    Raises:
        UserError: the dataset or the Hub cannot be reached.
    """
    commit = _call_hub(root, where, lambda: _commit(HfApi().endpoint, where.repo, where.revision))
    return f"hf://datasets/{where.repo}@{commit}" + (f"/{where.folder}" if where.folder else "")


@lru_cache(maxsize=64)
def _commit(endpoint: str, repo: str, revision: str | None) -> str:
    # Once per process, so that skeleton, training and validation are of one commit.
    info = HfApi(endpoint=endpoint).dataset_info(repo, revision=revision, timeout=LISTING_SECONDS)
    return str(info.sha)


def download_dataset(root: str, where: DatasetAddress, endings: Sequence[str]) -> Path:
    """Download the shards of a dataset into the Hub's cache and return their folder; offline, use the cache alone.

    Raises:
        UserError: the dataset cannot be downloaded, or an interrupted download cannot be resumed offline.
    """
    inside = f"{where.folder}/" if where.folder else ""
    patterns = [f"{inside}*{ending}" for ending in endings]
    folder = _call_hub(
        root,
        where,
        lambda: Path(
            snapshot_download(where.repo, repo_type="dataset", revision=where.revision, allow_patterns=patterns)
        ),
    )
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    if missing := _first_missing_shard(names):
        raise UserError(
            f"--data.root {root}: {missing} is not in the cache {constants.HF_HUB_CACHE}: its download was "
            "interrupted. Start again with a network and without HF_HUB_OFFLINE to resume the download"
        )
    return folder / where.folder


def download_file(name: str) -> str:
    """Download a file of a dataset on the Hub and return its path in the cache; any other name is returned unchanged.

    Raises:
        UserError: as `download_dataset`.
    """
    where = parse_address(name)
    if not where:
        return name
    return _call_hub(
        name, where, lambda: hf_hub_download(where.repo, where.folder, repo_type="dataset", revision=where.revision)
    )


def _first_missing_shard(names: Sequence[str]) -> str | None:
    """The first missing shard, by the names of the others: train-00000-of-00003 is one of three."""
    for name in sorted(names):
        if match := SHARD_NAME.fullmatch(name):
            every = (f"{match[1]}-{number:05d}-of-{match[3]}{match[4]}" for number in range(int(match[3])))
            if missing := next((one for one in every if one not in names), None):
                return missing
    return None


def _call_hub(root: str, where: DatasetAddress, action: Callable[[], Result]) -> Result:
    try:
        return action()
    except Exception as error:
        raise UserError(f"--data.root {root}: {hide_token(_explain_dataset(error, where))}") from None


def _explain_dataset(error: Exception, where: DatasetAddress) -> str:
    cached = f"it is not in the cache {constants.HF_HUB_CACHE}"
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, and streaming needs the Hub; without --data.streaming the cache is used"
    if isinstance(error, LocalEntryNotFoundError):
        offline = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the Hub could not be reached"
        return f"{offline}, and {cached}; download it once with a network"
    if isinstance(error, RepositoryNotFoundError) and not isinstance(error, GatedRepoError):
        return (
            f"no dataset {where.repo} on the Hub that you can access; correct the name or, if it is private, log in "
            f"with `hf auth login`"
        )
    if isinstance(error, RevisionNotFoundError):
        return f"{where.repo} has no revision {where.revision!r}; expected a branch, a tag or a commit of it"
    return explain(error, f"datasets/{where.repo}")
