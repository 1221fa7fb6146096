"""Upload weights to the Hugging Face Hub in the background of the training, with a model card.

python -m sapiens_accel.hub push RUN_DIR [--stage ssl] [--hub_model_id ORG/NAME] [--hub_private] [--space]
"""

import contextlib
import logging
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from huggingface_hub import HfApi
from huggingface_hub.errors import LocalTokenNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from sapiens_accel.config import parse as config
from sapiens_accel.config.commands import push_parser
from sapiens_accel.config.schema import STAGES, Config
from sapiens_accel.errors import Interrupted, UserError
from sapiens_accel.hub.download import FILE, fetch
from sapiens_accel.hub.errors import explain, hide_token, is_final, status_of
from sapiens_accel.publish import model_card as card
from sapiens_accel.publish.push import Push, prepare_push, publish, refuse_public, say
from sapiens_accel.publish.space import publish_space

__all__ = ["NoUploads", "Uploads", "fetch", "uploads"]  # fetch: one module for both directions

RETRY_SECONDS = (5, 15, 45, 120)  # before each retry; the client itself retries a request for some 25 s
FINISH_SECONDS = 3600
CHECK_SECONDS = 20
STAGING = ".hub"
T = TypeVar("T")


class Uploads:
    """Pushes to one repository, one after the other, on a background thread; no method blocks (but `finish`) or raises.

    Args:
        run_folder: run directory of train.py.
        strategy: see `Config.hub_strategy`.
        last_stage: the run's last one.
        best: the AP that weights must exceed to be the best.

    Attributes:
        retry_seconds: before each retry.
    """

    retry_seconds: Sequence[float] = RETRY_SECONDS

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
        # By the first folder of a push: why the last one failed, and its number. A later success removes the entry.
        self.failed: dict[str, str] = {}
        self.failed_at: dict[str, int] = {}
        self.url: str | None = None
        self.stage, self.count, self.thread = last_stage, 0, None
        shutil.rmtree(run_folder / STAGING, ignore_errors=True)  # left behind by a run that was killed

    def saved(
        self,
        stage: str,
        *,
        step: int | None = None,
        weights: Path | None = None,
        score: float | None = None,
        last: bool = False,
    ) -> None:
        """Push the weights that a stage has just written, if the strategy includes them.

        A newer push replaces one of the same folder that waits.

        Args:
            weights: their folder. Default: RUN_DIR/STAGE/weights.
            step: their training step. Default: that of eval.json.
            score: their AP, if they were evaluated.
            last: these are the final weights of the stage.
        """
        is_best = score is not None and score > self.best
        self.best = max(self.best, score) if score is not None else self.best
        is_end = last and stage == self.last_stage
        if not {"end": is_end, "every_save": True, "best": is_best, "all": last}[self.strategy]:
            return
        into = ("",) if self.strategy != "all" else (stage, "") if is_end else (stage,)
        when = "final weights" if last else f"step {step}" if step is not None else "weights"
        self.stage = stage
        self.count += 1
        try:
            facts = card.collect(self.run_folder, stage, step, weights)
            folder = weights or self.run_folder / stage / "weights"
            copy = self.run_folder / STAGING / str(self.count)
            self._enqueue(prepare_push(copy, folder, f"{stage}: {when}", into, facts))
        except Exception as error:
            self._record_failure(into[0], error)

    def finish(self, timeout: float = FINISH_SECONDS) -> None:
        """Wait for the pushes, and print the repository's URL, or the command that pushes what has not arrived."""
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

    def _enqueue(self, push: Push) -> None:
        with self.changed:
            for old in [other for other in self.waiting if other.into[0] == push.into[0]]:
                self.waiting.remove(old)
                shutil.rmtree(old.folder, ignore_errors=True)
            self.waiting.append(push)
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
                self._push_with_retries(push)
            except BaseException as error:  # a bug of ours must not end the thread that `finish` waits for
                self._record_failure(push.into[0], error)
            shutil.rmtree(push.folder, ignore_errors=True)
            with self.changed:
                self.running = None
                self.changed.notify_all()

    def _push_with_retries(self, push: Push) -> None:
        name, number = push.into[0], int(push.folder.name)
        for wait in (*self.retry_seconds, None):
            try:
                with _silence_client():
                    self.url = publish(push, self.repo_id, self.private)
                if self.failed_at.get(name, 0) < number:  # else a newer one has failed before it was queued
                    self.failed.pop(name, None)
                return
            except Exception as error:
                if wait is None or is_final(error):
                    return self._record_failure(name, error, number)
            with self.changed:  # a newer push of the same folder makes further retries of this one needless
                if self.changed.wait_for(lambda: any(other.into[0] == name for other in self.waiting), wait):
                    return

    def _record_failure(self, name: str, error: BaseException, number: int | None = None) -> None:
        reason = hide_token(explain(error, self.repo_id))
        if reason not in self.failed.values():
            say(f"warning: the push to {self.repo_id} failed: {reason}; the training continues", error=True)
        self.failed[name] = reason
        self.failed_at[name] = self.count if number is None else number


class NoUploads:
    """Stands for `Uploads` on all ranks but the first, and in a run that pushes nothing."""

    last_stage = ""

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
    """The uploads of a run, after a check of its access to the Hub.

    Raises:
        UserError: no token, one that the Hub does not know or that is read-only, or a public repository where a
            private one is required. A Hub that cannot be reached is a warning.
    """
    if not run.push_to_hub or not is_main:
        return NoUploads()
    assert run.hub_model_id, "config.load requires it"
    check(run.hub_model_id, run.hub_private)
    if run.dry_run:
        return NoUploads()
    folder, best = Path(run.output_dir), float("-inf")
    if run.resume_from_checkpoint:
        best = max((line["AP"] for line in card.read_lines(folder) if (line.get("AP")) is not None), default=best)
    return Uploads(
        run.hub_model_id,
        folder,
        private=run.hub_private,
        strategy=run.hub_strategy,
        last_stage=run.stages[-1],
        best=best,
    )


def check(repo_id: str, private: bool) -> None:
    """Ask the Hub whether a push would be allowed; raises as `uploads`."""
    try:
        user = _call_within(CHECK_SECONDS, HfApi().whoami)
        if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise UserError(
                "this token may only read (expected write access). Create one at https://huggingface.co/settings/tokens"
            )
        owners = [str(owner.get("name")) for owner in (user, *user.get("orgs", ()))]
        if repo_id.split("/")[0] not in owners:
            say(f"warning: --hub_model_id {repo_id}: the token belongs to {', '.join(owners)}", error=True)
        if private:
            with contextlib.suppress(RepositoryNotFoundError):
                refuse_public(_call_within(CHECK_SECONDS, lambda: HfApi().model_info(repo_id)), repo_id)
    except Exception as error:
        reason = hide_token(explain(error, repo_id))
        if isinstance(error, UserError | LocalTokenNotFoundError) or status_of(error) in (401, 403):
            raise UserError(f"--push_to_hub: {reason}") from None
        say(f"warning: --push_to_hub: {reason}; the training starts, and pushes will be tried", error=True)


def _call_within(seconds: float, call: Callable[[], T]) -> T:
    """Return or raise as `call` does; ConnectionError after so many seconds (the client itself has no limit)."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise ConnectionError(f"no answer within {seconds:g} s")
    return results[0]


@contextlib.contextmanager
def _silence_client() -> Iterator[None]:
    """Turn off the client's progress bars and its log line for each retry: the run has its own progress bar."""
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
        raise UserError(f"{asked.run_folder}: no repository to push to (expected --hub_model_id ORG/NAME)")
    config.check_model_id(repo_id)
    if asked.space and asked.into:
        raise UserError(f"--space: shows the weights at the root of {repo_id}, not those of --into {asked.into}")
    private = asked.hub_private or bool(facts.run.get("hub_private"))
    with tempfile.TemporaryDirectory(prefix=".hub_", dir=asked.run_folder) as copy:
        folder, message = asked.run_folder / facts.stage / "weights", f"{facts.stage}: final weights"
        push = prepare_push(Path(copy), folder, message, (asked.into,), None if asked.into else facts)
        try:
            urls = [publish(push, repo_id, private)]
            if asked.space:
                urls.append(publish_space(repo_id, private))
        except Exception as error:
            raise UserError(f"the push to {repo_id} failed: {hide_token(explain(error, repo_id))}") from None
    for url in urls:
        print(f"pushed: {url}")
    if asked.space and private:
        print("The Space reads a private repository: give it a secret HF_TOKEN in its settings")
