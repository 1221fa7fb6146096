"""Weights by their name on the Hugging Face Hub: downloaded once, and found in the cache from then on."""

import fnmatch
import glob
import json
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from sapiens_accel.errors import UserError
from sapiens_accel.hub.errors import is_final, why
from sapiens_accel.publish import license as origin
from sapiens_accel.publish.license import WEIGHTS_ENDINGS, Reference

FILE = "model.safetensors"
INDEX = f"{FILE}.index.json"
BESIDE = ("config.json", "preprocessor_config.json", "skeleton.json", "README.md", "LICENSE*", "*.py")
FOREIGN = ("torchscript", "bfloat16")  # programs, and copies of less precision
LISTING_SECONDS = 30


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
    wanted = origin.reference(reference)
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
        return [wanted.path, *_licences(files)], wanted.path
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
    return [*names, *(name for name in _licences(files) if name not in names)], returned


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


def _licences(files: Sequence[str]) -> list[str]:
    return [name for name in files if fnmatch.fnmatch(name, "LICENSE*") and "/" not in name]


def _check_shards(path: Path) -> None:
    if (path / INDEX).is_file() and not (path / FILE).is_file():
        shards = set(json.loads((path / INDEX).read_text())["weight_map"].values())
        if missing := sorted(name for name in shards if not (path / name).is_file()):
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
