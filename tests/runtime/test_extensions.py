"""Stale locks of C++ builds, and the threads of a rank whose optimizer is on the host."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from torch.utils.file_baton import FileBaton

from sapiens_accel.errors import UserError
from sapiens_accel.runtime import extensions, host

ROOT = Path(__file__).parents[2]


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the lock of a build of cpu_adam would be; the extension is built."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / "cpu_adam").mkdir()
    (tmp_path / "cpu_adam" / "cpu_adam.so").touch()
    return tmp_path / "cpu_adam" / "lock"


def test_a_lock_is_stale_only_if_no_process_holds_it(lock: Path) -> None:
    baton = FileBaton(str(lock))
    assert baton.try_acquire()
    assert extensions.find_stale_locks() == {}
    descriptor = baton.fd
    assert descriptor is not None
    os.close(descriptor)  # as when its process is killed
    assert list(extensions.find_stale_locks()) == [lock]
    assert extensions.find_stale_locks(["async_io"]) == {}


def test_a_build_may_end_while_its_lock_is_looked_at(lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another launch was building: this one ended with a traceback."""
    lock.touch()
    monkeypatch.setattr(extensions, "_open_files", lambda: lock.unlink() or set())
    assert extensions.find_stale_locks() == {}


def test_an_old_stale_lock_is_removed_and_a_new_one_is_named(
    lock: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a file system that other machines may share, as they hold locks that no process here has open."""
    monkeypatch.setattr(extensions, "LOCAL_FILE_SYSTEMS", set())
    lock.touch()
    extensions.prepare_builds(["cpu_adam"])
    assert lock.exists() and str(lock) in capsys.readouterr().out
    old = time.time() - extensions.STALE_SECONDS["network"] - 60
    os.utime(lock, (old, old))
    extensions.prepare_builds(["cpu_adam"])
    said = capsys.readouterr().out
    assert not lock.exists() and f"{lock}: left by a build" in said and said.count("\n") == 1
    assert FileBaton(str(lock)).try_acquire(), "the next build gets it"


def test_a_build_is_announced_and_refused_without_a_compiler(
    lock: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lock.with_name("cpu_adam.so").unlink()
    with monkeypatch.context() as complete:
        complete.setattr(extensions, "missing_tools", lambda: iter(()))
        extensions.prepare_builds(["cpu_adam"])
    assert f"DeepSpeed compiles cpu_adam into {lock.parents[1]}, once" in capsys.readouterr().out
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=r"must compile cpu_adam.*C\+\+ compiler"):
        extensions.check_builds(["cpu_adam"])


def test_on_a_disk_of_this_machine_a_lock_that_nobody_holds_is_removed_at_once(
    lock: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A first build that is stopped with Ctrl-C and started again: the next one would wait for ever."""
    monkeypatch.setattr(extensions, "_is_local", lambda path: True)
    lock.touch()
    old = time.time() - 16
    os.utime(lock, (old, old))
    with monkeypatch.context() as another:
        another.setattr(os, "getuid", lambda: lock.stat().st_uid + 1)  # its processes' open files cannot be seen
        extensions.prepare_builds(["cpu_adam"])
    assert lock.exists() and "removed" not in capsys.readouterr().out
    extensions.prepare_builds(["cpu_adam"])
    assert not lock.exists() and "removed" in capsys.readouterr().out


THREADS = """
import os, torch
from sapiens_accel.runtime import launch
print("before", os.environ["OMP_NUM_THREADS"], torch.get_num_threads())
print("after", launch.use_all_cores(), os.environ["OMP_NUM_THREADS"])
"""


@pytest.mark.slow
@pytest.mark.launch
@pytest.mark.parametrize("users", [None, "1"])
def test_a_rank_works_on_its_share_of_the_cores_unless_the_user_says_how_many(
    users: str | None, tmp_path: Path
) -> None:
    script = tmp_path / "threads.py"
    script.write_text(THREADS)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path)}
    env.pop("OMP_NUM_THREADS", None)
    if users:
        env["OMP_NUM_THREADS"] = users
    config = ROOT / "accelerate_configs" / "single_gpu.yaml"
    words = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config), str(script)]
    said = subprocess.run(words, env=env, capture_output=True, text=True, check=True, timeout=300).stdout
    cores = min(psutil.cpu_count(logical=False) or 1, host.usable_cores())
    expected = int(users) if users else cores
    assert "before 1 1" in said, "the launcher's own choice"
    assert f"after {expected} {expected}" in said
