"""Weights go to the Hugging Face Hub while the training goes on: in the background, with a model card.

python -m sapiens_accel.hub push RUN_DIR [--stage ssl] [--hub_model_id ORG/NAME] [--hub_private]
"""

import contextlib
import logging
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import LocalTokenNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from tqdm import tqdm

from sapiens_accel.config import parse as config
from sapiens_accel.config.commands import push_parser
from sapiens_accel.config.schema import STAGES, Config
from sapiens_accel.errors import Interrupted, UserError, escape
from sapiens_accel.hub.download import FILE, WEIGHTS_ENDINGS, fetch
from sapiens_accel.hub.errors import is_final, status_of, why, without_token
from sapiens_accel.publish import license as origin
from sapiens_accel.publish import model_card as card
from sapiens_accel.publish.model_card import Facts

__all__ = ["NoUploads", "Uploads", "fetch", "uploads"]  # fetch: one module for both directions

WAITS = (5, 15, 45, 120)  # seconds before each further try; the client itself tries a request again for some 25 s
FINISH_SECONDS = 3600
CHECK_SECONDS = 20
STAGING = ".hub"
T = TypeVar("T")


# ---- One push: a stage's weights as they are now, their card and their license


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
    license = None
    if push.facts:
        license = origin.license_text(push.facts.origin)
        if push.facts.origin.license is origin.SAPIENS2 and license is None:
            say("warning: the Sapiens2 License was found nowhere; add its text to the repository by hand", error=True)
        card.write(push.folder / "card", push.facts, repo_id, license)
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
        if path.suffix in WEIGHTS_ENDINGS:
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
    tqdm.write(f"hub: {escape(text)}", file=sys.stderr if error else sys.stdout)
    (sys.stderr if error else sys.stdout).flush()


# ---- Pushes in the background


class Uploads:
    """Pushes to one repository, one after the other, on a thread of its own; nothing here blocks or raises.

    Args:
        run_folder: of train.py.
        strategy: see `Config.hub_strategy`.
        last_stage: the run's last one.
        best: the AP that weights must exceed to be the best.

    Attributes:
        waits: seconds before each further try.
    """

    waits: Sequence[float] = WAITS

    def __init__(
        self,
        repo_id: str,
        run_folder: Path,
        *,
        private: bool = False,
        strategy: str = "end",
        last_stage: str = STAGES[-1],
        best: float = float("-inf"),
    ) -> None:
        self.repo_id, self.run_folder, self.private = repo_id, run_folder, private
        self.strategy, self.last_stage, self.best = strategy, last_stage, best
        self.changed = threading.Condition()
        self.waiting: list[Push] = []
        self.running: Push | None = None
        self.failed: dict[str, str] = {}  # by its first folder: what a push that failed, and none since, failed of
        self.failed_at: dict[str, int] = {}
        self.url: str | None = None
        self.stage, self.count, self.thread = last_stage, 0, None
        shutil.rmtree(run_folder / STAGING, ignore_errors=True)  # of a run that was killed

    def saved(
        self,
        stage: str,
        *,
        step: int | None = None,
        weights: Path | None = None,
        score: float | None = None,
        last: bool = False,
    ) -> None:
        """A stage has written weights: push them if the strategy asks for these.

        Args:
            weights: the folder. Default: RUN/STAGE/weights.
            step: the one whose weights these are. Default: what eval.json speaks of.
            score: their AP, if they were evaluated.
            last: whether these are what the stage hands over.
        """
        is_best = score is not None and score > self.best
        self.best = max(self.best, score) if score is not None else self.best
        is_end = last and stage == self.last_stage
        if not {"end": is_end, "every_save": True, "best": is_best, "all": last}[self.strategy]:
            return
        into = ("",) if self.strategy != "all" else (stage, "") if is_end else (stage,)
        when = "final weights" if last else f"step {step}" if step is not None else "weights"
        try:
            self.stage = stage
            self._put(weights or self.run_folder / stage / "weights", f"{stage}: {when}", into, stage, step)
        except Exception as error:
            self._fail(into[0], error)

    def push(self, folder: Path, message: str, into: str = "") -> None:
        """Commit a folder's files as they are now, without a card; a newer push takes the place of one that waits."""
        try:
            self._put(folder, message, (into,))
        except Exception as error:
            self._fail(into, error)

    def finish(self, timeout: float = FINISH_SECONDS) -> None:
        """Wait for what is under way, and tell where it is or how to push it by hand."""
        with self.changed:
            if (self.running or self.waiting) and timeout:
                say(f"waiting for the push to {self.repo_id} (Ctrl-C leaves it)")
            try:
                done = self.changed.wait_for(lambda: not self.running and not self.waiting, timeout)
            except KeyboardInterrupt:
                done = False
        if done:
            shutil.rmtree(self.run_folder / STAGING, ignore_errors=True)
        if done and not self.failed:
            say(f"pushed: {self.url}" if self.url else f"nothing was pushed to {self.repo_id}: nothing was due")
        else:
            stage = next((name for name in self.failed if name), self.stage)
            more = (f" --into {stage}" if stage in self.failed else "") + (" --hub_private" if self.private else "")
            command = f"push {self.run_folder} --stage {stage} --hub_model_id {self.repo_id}{more}"
            say(f"not pushed; by hand: python -m sapiens_accel.hub {command}", error=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is None or self.url or self.failed or self.running or self.waiting:
            hurry = kind and (kind is Interrupted or not issubclass(kind, Exception))
            self.finish(0 if hurry else FINISH_SECONDS)

    def _put(
        self, folder: Path, message: str, into: tuple[str, ...], stage: str | None = None, step: int | None = None
    ) -> None:
        self.count += 1
        copy = self.run_folder / STAGING / str(self.count)
        snapshot(folder, copy / "files")
        facts = card.collect(self.run_folder, stage, step, folder) if stage else None
        with self.changed:
            for old in [push for push in self.waiting if push.into[0] == into[0]]:
                self.waiting.remove(old)
                shutil.rmtree(old.folder, ignore_errors=True)
            self.waiting.append(Push(folder=copy, into=into, message=message, facts=facts))
            self.changed.notify_all()
        if self.thread is None:
            self.thread = threading.Thread(target=self._work, name="hub", daemon=True)
            self.thread.start()

    def _work(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.waiting)
                push = self.running = self.waiting.pop(0)
            try:
                self._try(push)
            except BaseException as error:  # a bug of ours must not end the thread that `finish` waits for
                self._fail(push.into[0], error)
            shutil.rmtree(push.folder, ignore_errors=True)
            with self.changed:
                self.running = None
                self.changed.notify_all()

    def _try(self, push: Push) -> None:
        name, number = push.into[0], int(push.folder.name)
        for wait in (*self.waits, None):
            try:
                with _quiet():
                    self.url = publish(push, self.repo_id, self.private)
                if self.failed_at.get(name, 0) < number:  # else a newer one could not even be begun
                    self.failed.pop(name, None)
                return
            except Exception as error:
                if wait is None or is_final(error):
                    return self._fail(name, error, number)
            with self.changed:  # what is newer need not wait for this one
                if self.changed.wait_for(lambda: any(other.into[0] == name for other in self.waiting), wait):
                    return

    def _fail(self, name: str, error: BaseException, number: int | None = None) -> None:
        reason = without_token(why(error, self.repo_id))
        if reason not in self.failed.values():
            say(f"warning: the push to {self.repo_id} failed: {reason}; the training goes on", error=True)
        self.failed[name] = reason
        self.failed_at[name] = self.count if number is None else number


class NoUploads:
    """What all ranks but the first have, and a run that pushes nothing."""

    def saved(
        self,
        stage: str,
        *,
        step: int | None = None,
        weights: Path | None = None,
        score: float | None = None,
        last: bool = False,
    ) -> None:
        pass

    def finish(self, timeout: float = FINISH_SECONDS) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def uploads(run: Config, is_main: bool) -> Uploads | NoUploads:
    """What a run pushes with, after a look at whether it may.

    Raises:
        UserError: no token, one that the Hub does not know or that may only read, or a public repository where a
            private one is wanted. A Hub that cannot be reached is a warning.
    """
    if not run.push_to_hub or not is_main:
        return NoUploads()
    assert run.hub_model_id, "config.load asks for it"
    check(run.hub_model_id, run.hub_private)
    if run.dry_run:
        return NoUploads()
    folder, best = Path(run.output_dir), float("-inf")
    if run.resume_from_checkpoint:
        best = max((line["AP"] for line in card.lines_of(folder) if (line.get("AP")) is not None), default=best)
    return Uploads(
        run.hub_model_id,
        folder,
        private=run.hub_private,
        strategy=run.hub_strategy,
        last_stage=run.stages[-1],
        best=best,
    )


def check(repo_id: str, private: bool) -> None:
    """Ask the Hub whether a push can work; see `uploads`."""
    try:
        who = _within(CHECK_SECONDS, HfApi().whoami)
        if who.get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise UserError(
                "this token may only read; make one that may write at https://huggingface.co/settings/tokens"
            )
        owners = [str(owner.get("name")) for owner in (who, *who.get("orgs", ()))]
        if repo_id.split("/")[0] not in owners:
            say(f"warning: --hub_model_id {repo_id}: your token is of {', '.join(owners)}", error=True)
        if private:
            with contextlib.suppress(RepositoryNotFoundError):
                refuse_public(_within(CHECK_SECONDS, lambda: HfApi().model_info(repo_id)), repo_id)
    except Exception as error:
        reason = without_token(why(error, repo_id))
        if isinstance(error, UserError | LocalTokenNotFoundError) or status_of(error) in (401, 403):
            raise UserError(f"--push_to_hub: {reason}") from None
        say(f"warning: --push_to_hub: {reason}; the training starts, pushes are tried all the same", error=True)


def _within(seconds: float, call: Callable[[], T]) -> T:
    """What a call returns or raises; ConnectionError if it takes longer (the client itself waits for ever)."""
    found: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            found.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not found:
        raise ConnectionError(f"no answer within {seconds:g} s")
    return found[0]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the client's progress bars and notes on every try: the run has a progress line of its own."""
    logger, shown = logging.getLogger("huggingface_hub"), not are_progress_bars_disabled()
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    if shown:
        disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if shown:
            enable_progress_bars()


def main(words: Sequence[str]) -> None:
    asked = push_parser().parse_args(words)
    trained = [stage for stage in STAGES if (asked.run_folder / stage / "weights" / FILE).is_file()]
    facts = card.collect(asked.run_folder, asked.stage or (trained or STAGES)[-1])
    repo_id = asked.hub_model_id or facts.run.get("hub_model_id")
    if not repo_id:
        raise UserError("to which repository? Name it by --hub_model_id ORG/NAME")
    config.check_model_id(repo_id)
    with tempfile.TemporaryDirectory(prefix=".hub_", dir=asked.run_folder) as copy:
        snapshot(asked.run_folder / facts.stage / "weights", Path(copy) / "files")
        on_top = None if asked.into else facts
        mine = Push(folder=Path(copy), into=(asked.into,), message=f"{facts.stage}: final weights", facts=on_top)
        try:
            url = publish(mine, repo_id, asked.hub_private or bool(facts.run.get("hub_private")))
        except Exception as error:
            raise UserError(f"the push to {repo_id} failed: {without_token(why(error, repo_id))}") from None
    print(f"pushed: {url}")
