"""One run in a directory: processes that live are respected, those that have ended are not, wherever they ran."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sapiens_accel.errors import UserError
from sapiens_accel.runtime import lock
from sapiens_accel.runtime.lock import LOCK, lock_directory

HOLD = (
    "import sys, time; from pathlib import Path; from sapiens_accel.runtime.lock import lock_directory\n"
    "with lock_directory(Path(sys.argv[1])):\n"
    "    print('held', flush=True); sys.stdin.readline()\n"
)


def hold(folder: Path) -> subprocess.Popen[str]:
    """Another process that has the lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert process.stdout and process.stdout.readline() == "held\n"
    return process


def test_a_second_run_is_refused_until_the_first_has_ended(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "run"
    first = hold(folder)
    named = f"{folder}.*another run.*process {first.pid} on .*--output_dir"
    with pytest.raises(UserError, match=named), lock_directory(folder):
        pass
    assert [path.name for path in folder.iterdir()] == [LOCK], "nothing else is written"
    first.communicate("\n", timeout=60)
    assert not folder.exists(), "an empty directory that it made goes with it"
    with lock_directory(folder):
        (folder / "config.yaml").touch()
    assert [path.name for path in folder.iterdir()] == ["config.yaml"]


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = hold(tmp_path / "run")
    first.send_signal(signal.SIGKILL)
    first.wait()
    with lock_directory(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / LOCK).read_text())["pid"] == os.getpid()
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "taken over" in said and str(first.pid) in said
    assert list((tmp_path / "run").iterdir()) == []


def _change(file: Path, **changes: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize("changes", [{"start": "1"}, {"boot": "another boot of this machine"}])
def test_a_number_that_another_process_has_now_is_not_taken_for_the_holder(tmp_path: Path, changes: dict) -> None:
    process = hold(tmp_path)
    _change(tmp_path / LOCK, **changes)
    with lock_directory(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    process.communicate("\n", timeout=60)


@pytest.mark.parametrize("elsewhere", [{"host": "node7"}, {"namespace": "pid:[1]"}])
def test_another_machine_is_respected_while_it_touches_its_lock(tmp_path: Path, elsewhere: dict) -> None:
    """As a duplicate by srun on another node; its process cannot be looked at, and its clock may be another."""
    file = tmp_path / LOCK
    file.write_text(json.dumps(lock._describe_process() | {"pid": 1, "start": "1"} | elsewhere))
    with pytest.raises(UserError, match="another run"), lock_directory(tmp_path):
        pass
    os.utime(file, (time.time() - lock.SILENT_SECONDS + 60,) * 2)
    with pytest.raises(UserError, match=f"delete {file}"), lock_directory(tmp_path):
        pass
    os.utime(file, (time.time() - lock.SILENT_SECONDS - 60,) * 2)
    with lock_directory(tmp_path):
        pass


def test_the_holder_touches_its_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "TOUCH_SECONDS", 0.01)
    with lock_directory(tmp_path):
        os.utime(tmp_path / LOCK, (0, 0))
        deadline = time.monotonic() + 60
        while (tmp_path / LOCK).stat().st_mtime == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert (tmp_path / LOCK).stat().st_mtime > 0


def test_a_disk_without_hard_links_has_locks_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    with lock_directory(tmp_path), pytest.raises(UserError, match="another run"), lock_directory(tmp_path):
        pass


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": "x"}'])
def test_a_lock_that_says_nothing_is_respected(tmp_path: Path, text: str) -> None:
    (tmp_path / LOCK).write_text(text)
    with pytest.raises(UserError, match="delete"), lock_directory(tmp_path):
        pass


def test_of_many_that_take_a_stale_lock_over_one_has_it(tmp_path: Path) -> None:
    for _ in range(5):
        (tmp_path / LOCK).write_text(json.dumps(lock._describe_process() | {"start": "1"}))
        children, (reader, writer) = [], os.pipe()
        for _ in range(8):
            if not (child := os.fork()):
                os.close(writer)
                try:
                    lock._acquire(tmp_path / LOCK)
                except UserError:
                    os._exit(1)
                except BaseException:
                    os._exit(2)
                os.read(reader, 1)  # it holds the lock until the others have tried
                os._exit(0)
            children.append(child)
        deadline, codes = time.monotonic() + 60, []
        while len(codes) < 7 and time.monotonic() < deadline:
            child, status = os.waitpid(-1, os.WNOHANG)
            codes += [os.waitstatus_to_exitcode(status)] if child in children else []
            children = [other for other in children if other != child]
            time.sleep(0.01)
        os.close(writer)
        codes += [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        os.close(reader)
        assert codes == [1] * 7 + [0]


def test_a_directory_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--output_dir .*file.* cannot be written"), lock_directory(tmp_path / "file"):
        pass


def test_a_lock_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    """As that of another user: it was tried again for ever. (Permissions do not hold for root, who runs tests too.)"""
    (tmp_path / LOCK).mkdir()
    with pytest.raises(UserError, match=f"cannot be read .*delete {tmp_path / LOCK}"), lock_directory(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]


def test_a_process_that_proc_hides_is_respected_while_it_touches_its_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As under hidepid=2: another user's process is not in /proc, and to signal it is not permitted."""

    def kill(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    file, start_of = tmp_path / LOCK, lock._start_of
    file.write_text(json.dumps(lock._describe_process() | {"pid": 1, "start": "1"}))
    monkeypatch.setattr(lock, "_start_of", lambda pid: start_of(pid) if pid == os.getpid() else None)
    monkeypatch.setattr(os, "kill", kill)
    with pytest.raises(UserError, match="another run"), lock_directory(tmp_path):
        pass
    os.utime(file, (time.time() - lock.SILENT_SECONDS - 60,) * 2)
    with lock_directory(tmp_path):
        pass


def test_a_lock_that_was_taken_over_is_not_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By a process that was suspended for longer than its lock holds: the new holder may have ended since."""
    monkeypatch.setattr(lock, "TOUCH_SECONDS", 0.01)
    with pytest.raises(UserError, match="was taken over by process 1"), lock_directory(tmp_path):
        (tmp_path / "other").write_text(json.dumps(lock._describe_process() | {"pid": 1}))
        os.utime(tmp_path / "other", (0, 0))
        (tmp_path / "other").replace(tmp_path / LOCK)
        deadline, said = time.monotonic() + 60, ""
        while "taken over by process 1" not in said and time.monotonic() < deadline:
            time.sleep(0.01)
            said += capsys.readouterr().out
        assert "taken over by process 1" in said
        assert (tmp_path / LOCK).stat().st_mtime == 0
    assert (tmp_path / LOCK).exists(), "it is another one's"


@pytest.mark.parametrize("change", ["rename", "delete"])
def test_a_directory_that_is_moved_while_a_run_writes_in_it_is_no_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], change: str
) -> None:
    """Its files were in two places, config.yaml in one and the weights in the other, and the exit code was 0."""
    monkeypatch.setattr(lock, "TOUCH_SECONDS", 0.01)
    run, printed = tmp_path / "run", ""
    with pytest.raises(UserError, match="was renamed or deleted while the run wrote in it"), lock_directory(run):
        run.rename(tmp_path / "renamed") if change == "rename" else shutil.rmtree(run)
        deadline = time.monotonic() + 20
        while "warning: " not in printed and time.monotonic() < deadline:
            time.sleep(0.01)
            printed += capsys.readouterr().out
        assert f"{run / LOCK}: is gone: its directory was renamed or deleted" in printed
    with pytest.raises(ZeroDivisionError), lock_directory(tmp_path / "other"):
        (tmp_path / "other").rename(tmp_path / "moved")
        raise ZeroDivisionError  # an error of the run itself is what is raised
