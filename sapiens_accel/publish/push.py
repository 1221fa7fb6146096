"""A push to the Hub: the weights of a stage, their model card and their license."""

import contextlib
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from tqdm import tqdm

from sapiens_accel.errors import UserError, escape
from sapiens_accel.hub.download import WEIGHTS_ENDINGS
from sapiens_accel.models import adapters
from sapiens_accel.publish import license as origin
from sapiens_accel.publish import model_card as card
from sapiens_accel.publish.model_card import Facts
from sapiens_accel.visibility import output as visibility


@dataclass(frozen=True, kw_only=True)
class Push:
    """One commit that waits for its turn.

    Attributes:
        folder: a copy of the files that later saves do not change.
        into: folders of the repository to write them to, "" for its root; the first one identifies the push.
        facts: the content of the model card, which is written to the last of these folders. None: no card.
    """

    folder: Path
    into: tuple[str, ...]
    message: str
    facts: Facts | None


def prepare_push(
    copy: Path, weights: Path, message: str, into: tuple[str, ...] = ("",), facts: Facts | None = None
) -> Push:
    """Copy a weights folder as it is now into the empty or missing folder `copy`.

    Raises:
        UserError: there is no such weights folder.
    """
    snapshot(weights, copy / "files")
    return Push(folder=copy, into=into, message=message, facts=facts)


def publish(push: Push, repo_id: str, private: bool) -> str:
    """Write the card, create the repository if it does not exist, and commit. Return the repository's URL.

    Raises:
        UserError: the repository is public, and `private` asks for a private one.
        Exception: any that the client raises.
    """
    license = None
    if push.facts:
        license = origin.license_text(push.facts.origin)
        if push.facts.origin.license is origin.SAPIENS2 and license is None:
            say("warning: the text of the Sapiens2 License is missing; add it to the repository by hand", error=True)
        card.write(push.folder / "card", push.facts, repo_id, license)
    api = HfApi()
    api.create_repo(repo_id, private=private or None, exist_ok=True)
    info = api.model_info(repo_id)
    if private:
        refuse_public(info, repo_id)
    present = {file.rfilename for file in info.siblings or ()}
    for into in push.into:  # one commit each: the Hub takes a file that it has already without a second upload
        adds = {f"{into}/{name}".lstrip("/"): path for name, path in _files(push.folder / "files").items()}
        if into == push.into[-1]:
            adds |= _files(push.folder / "card")
        operations: list[Any] = [CommitOperationAdd(name, str(path)) for name, path in adds.items()]
        optional = tuple(f"{into}/{name}".lstrip("/") for name in (visibility.FILE, f"{adapters.FOLDER}/"))
        stale = sorted(name for name in present - adds.keys() if name.startswith(optional))  # of earlier weights
        operations += [CommitOperationDelete(name) for name in stale]
        api.create_commit(repo_id, operations=operations, commit_message=push.message)
    return f"{api.endpoint}/{repo_id}"


def snapshot(folder: Path, copy: Path) -> None:
    """Copy a folder. Weights are hard-linked: a save replaces their file and never writes into it."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such weights folder")
    copy.mkdir(parents=True)
    for name, path in _files(folder).items():
        target = copy / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix in WEIGHTS_ENDINGS:
            with contextlib.suppress(OSError):  # the file system has no hard links
                os.link(path, target)
                continue
        shutil.copyfile(path, target)


def _files(folder: Path) -> dict[str, Path]:
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith(".")]
    return {path.relative_to(folder).as_posix(): path for path in paths}


def refuse_public(info: Any, repo_id: str) -> None:
    if not info.private:
        raise UserError(
            f"--hub_private: {repo_id} is public (expected a private repository). Make it private on the Hub"
        )


def say(text: str, error: bool = False) -> None:
    """Print a line on stdout or stderr."""
    # tqdm.write does not break a progress bar.
    tqdm.write(f"hub: {escape(text)}", file=sys.stderr if error else sys.stdout)
    (sys.stderr if error else sys.stdout).flush()
