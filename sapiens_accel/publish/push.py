"""One push to the Hugging Face Hub: a stage's weights as they are now, their card and their licence."""

import contextlib
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi
from tqdm import tqdm

from sapiens_accel.errors import UserError
from sapiens_accel.publish import license as origin
from sapiens_accel.publish import model_card as card
from sapiens_accel.publish.model_card import Facts


@dataclass(frozen=True, kw_only=True)
class Push:
    """One commit that waits for its turn.

    Attributes:
        folder: a private copy of the files.
        into: folders of the repository to put them in, "" for its top; the first one names the push.
        facts: what the card is made of; it goes to the top. None: no card.
    """

    folder: Path
    into: tuple[str, ...]
    message: str
    facts: Facts | None


def publish(push: Push, repo_id: str, private: bool) -> str:
    """Make the card and the repository, and commit; the repository's address.

    Raises:
        UserError: the repository is public and a private one is wanted.
        Exception: whatever the client raises.
    """
    licence = None
    if push.facts:
        licence = origin.licence_text(push.facts.origin)
        if push.facts.origin.licence is origin.SAPIENS2 and licence is None:
            say("warning: the Sapiens2 License was found nowhere; add its text to the repository by hand", error=True)
        card.write(push.folder / "card", push.facts, repo_id, licence)
    api = HfApi()
    api.create_repo(repo_id, private=private or None, exist_ok=True)
    if private:
        refuse_public(api.model_info(repo_id), repo_id)
    for into in push.into:  # one by one: of files that are there already, the Hub takes the name alone
        adds = {f"{into}/{name}".lstrip("/"): path for name, path in _files(push.folder / "files").items()}
        if into == push.into[-1]:
            adds |= _files(push.folder / "card")
        operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(path)) for name, path in adds.items()]
        api.create_commit(repo_id, operations=operations, commit_message=push.message)
    return f"{api.endpoint}/{repo_id}"


def snapshot(folder: Path, copy: Path) -> None:
    """A copy that later writes do not change. Weights are linked: they are never written over, but replaced."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    copy.mkdir(parents=True)
    for name, path in _files(folder).items():
        target = copy / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix in origin.WEIGHTS_ENDINGS:
            with contextlib.suppress(OSError):  # a file system without links
                os.link(path, target)
                continue
        shutil.copyfile(path, target)


def _files(folder: Path) -> dict[str, Path]:
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith(".")]
    return {path.relative_to(folder).as_posix(): path for path in paths}


def refuse_public(info: Any, repo_id: str) -> None:
    if not info.private:
        raise UserError(f"{repo_id} is there and public, and --hub_private was asked for; make it private on the Hub")


def say(text: str, error: bool = False) -> None:
    """Print a line on stdout or stderr."""
    # Between the lines of a progress bar, not across it.
    tqdm.write(f"hub: {text}", file=sys.stderr if error else sys.stdout)
    (sys.stderr if error else sys.stdout).flush()
