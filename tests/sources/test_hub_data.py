"""Data sets of the Hub: the real client against a server on loopback; what is pushed is what is trained on."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hub_server import TOKEN, Server, serve
from huggingface_hub import HfApi, HfFileSystem, constants

from sapiens_accel import errors
from sapiens_accel.config.schema import AugmentConfig, DataConfig, StageConfig, TeacherConfig
from sapiens_accel.data import build, loader
from sapiens_accel.data import streaming as stream
from sapiens_accel.data.annotation_rules import PeopleReader
from sapiens_accel.data.augment import Augmenter
from sapiens_accel.data.dataset import TrainingPeople
from sapiens_accel.data.sampling import Share
from sapiens_accel.errors import UserError
from sapiens_accel.hub import download
from sapiens_accel.pose.skeleton import COCO17
from sapiens_accel.sources import convert, shards, synthetic
from sapiens_accel.sources import images as photo
from sapiens_accel.sources.discover import open_source

ROOT = Path(__file__).parents[2]
NAME, REPO = "me/people", "datasets/me/people"
PEOPLE, BATCH, STEPS = 48, 8, 7


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic.write(tmp_path_factory.mktemp("d") / "drawn", num_train=PEOPLE, num_unlabelled=9, num_val=4)


@pytest.fixture(scope="module")
def parquet(drawn: Path) -> Path:
    """The same in shards of row groups of two images."""
    convert.main(_words(drawn, drawn.parent / "parquet"))
    return drawn.parent / "parquet"


def _words(root: Path, out: Path, *more: str) -> list[str]:
    return ["convert", "coco", str(root), str(out), "--shard_mb", "0.2", "--group_rows", "2", *more]


@pytest.fixture
def filled(server: Server, parquet: Path) -> Server:
    server.add(REPO, _files(parquet))
    return server


def _files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _config(root: str | Path, cache: Path, **changes: Any) -> DataConfig:
    options: dict[str, Any] = {"unlabelled_min_side": 0.0, "input_hw": (64, 48)} | changes
    return DataConfig(root=str(root), cache_dir=str(cache), **options)


def _batches(found: DataConfig, steps: range, workers: int = 0) -> list[bytes]:
    sets = build.open_people(found, COCO17, unlabeled=True)
    augmenter = Augmenter(config=AugmentConfig(), skeleton=COCO17, input_hw=(64, 48))
    plan = StageConfig(global_batch=BATCH, teacher=TeacherConfig(ratio=1, cutout=2))
    people = TrainingPeople(sets, augmenter, found, plan, seed=3, stage="ssl")
    share = Share(rank=0, num_ranks=1, micro_batch=BATCH, accumulation=1)
    return [_bytes(batch) for batch in loader.batches(people, share, steps, workers, torch.device("cpu"))]


def _bytes(tree: Any) -> bytes:
    if isinstance(tree, torch.Tensor):
        return tree.numpy().tobytes()
    return b"".join(map(_bytes, tree))


# ---- There and back


def test_what_is_pushed_is_what_is_read(drawn: Path, parquet: Path, tmp_path: Path, server: Server) -> None:
    """The command of the README; then the repository's rows, streamed and not, at its newest and at a first commit."""
    environment = os.environ | server.environment(tmp_path / "home")
    command = [sys.executable, "-m", "sapiens_accel.data", *_words(drawn, tmp_path / "out", "--push_to_hub", NAME)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"pushed: {server.url}/{REPO}"
    assert server.repos[REPO].files == _files(tmp_path / "out") and len(server.repos[REPO].files) > 5
    commit = server.repos[REPO].commits[0][0]
    steps, folder, cache = range(3), _batches(_config(drawn, tmp_path / "a"), range(3)), tmp_path / "b"
    assert _batches(_config(f"hf://{NAME}", cache), steps) == folder and len(folder[0]) > 100_000
    streamed = _batches(_config(parquet, tmp_path / "c", streaming=True), steps)
    assert _batches(_config(f"hf://{NAME}", cache, streaming=True), steps) == streamed
    # Another push does not change what a commit is.
    server.repos[REPO].commit({path: b"?" for path in server.repos[REPO].files if "/train-" in path})
    HfFileSystem.clear_instance_cache()
    for address in (f"hf://{NAME}@{commit}", f"hf://datasets/{NAME}@{commit}/data"):
        assert _batches(_config(address, tmp_path / "d"), steps) == folder
    assert _batches(_config(f"hf://{NAME}@{commit}", cache, streaming=True), steps, workers=2) == streamed
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or TOKEN.encode() not in file.read_bytes(), file
    assert TOKEN not in done.stdout + done.stderr


def test_a_run_reads_the_commit_that_it_began_with(filled: Server, tmp_path: Path) -> None:
    found = _config(f"hf://{NAME}", tmp_path, streaming=True)
    sets = build.open_people(found, COCO17, unlabeled=False)
    filled.repos[REPO].commit({path: b"?" for path in filled.repos[REPO].files if path.startswith("data/")})
    HfFileSystem.clear_instance_cache()
    shards._open_parquet.cache_clear()
    shards._cached.clear()
    names = [sets.train.rows[index]["file_name"] for index in range(PEOPLE)]
    assert all(bytes(photo.read_bytes(sets.train.root / name))[:2] == b"\xff\xd8" for name in names)


# ---- What goes wrong


def _told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], main: Any) -> str:
    """The line of a program that ends with exit code 2."""
    monkeypatch.setattr(sys, "argv", ["program"])
    with pytest.raises(SystemExit) as caught:
        errors.run_main(lambda _: main())
    said = capsys.readouterr().err
    assert caught.value.code == 2 and said.count("\n") == 1 and TOKEN not in said
    return said


@pytest.mark.parametrize("streaming", [False, True])
def test_a_data_set_that_cannot_be_had_is_one_line(
    filled: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], streaming: bool
) -> None:
    def told(root: str) -> str:
        download._commit.cache_clear()  # another process
        found = _config(root, tmp_path / "cache", streaming=streaming)
        said = _told(monkeypatch, capsys, lambda: build.open_people(found, COCO17, unlabeled=False))
        assert f"--data.root {root}: " in said
        return said

    assert "no dataset me/nobody on the Hub that you can access" in told("hf://me/nobody")
    assert f"{NAME} has no revision 'v9'" in told(f"hf://{NAME}@v9")
    filled.add("datasets/me/private", {"a": b""}, private=True)
    assert "no parquet, Arrow or tar shards in it" in told("hf://me/private")
    monkeypatch.setenv("HF_TOKEN", "")
    assert "`hf auth login`" in told("hf://me/private")
    monkeypatch.setenv("HF_TOKEN", f"{TOKEN}x")
    assert "does not know the token" in told(f"hf://{NAME}")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    HfFileSystem.clear_instance_cache()
    assert "could not be reached" in told(f"hf://{NAME}")


def test_a_download_that_was_cut_off_is_never_taken_for_whole(
    filled: Server, parquet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = _config(f"hf://{NAME}@{filled.repos[REPO].commits[0][0]}", tmp_path / "cache")
    lost = "data/train-00001-of-"
    filled.fail(f"/resolve/.*{lost}", method="GET", status=403)
    with pytest.raises(UserError, match=r"--data\.root hf://me/people@\w+: .*may not"):
        build.open_people(found, COCO17, unlabeled=False)
    with monkeypatch.context() as offline:
        offline.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(UserError, match="it is not in the cache"):
            build.open_people(found, COCO17, unlabeled=False)
    gets = filled.count("GET", "/resolve/")
    assert len(build.open_people(found, COCO17, unlabeled=False).train) == PEOPLE
    missing = filled.count("GET", "/resolve/") - gets
    assert 1 <= missing <= sum(path.endswith(".parquet") for path in filled.repos[REPO].files)
    # Clients that keep no list of files take what is there for all.
    snapshot = tmp_path / "hub" / "datasets--me--half" / "snapshots" / ("0" * 40)
    shutil.copytree(parquet, snapshot, ignore=shutil.ignore_patterns("train-00001-*"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=f"{lost}.* is not in the cache .* interrupted"):
        build.open_people(replace(found, root=f"hf://me/half@{'0' * 40}"), COCO17, unlabeled=False)


def test_a_push_that_fails_leaves_the_shards_and_changes_nothing(
    server: Server, drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(out: str, *more: str) -> str:
        words = _words(drawn, tmp_path / out, "--push_to_hub", NAME, *more)
        return _told(monkeypatch, capsys, lambda: convert.main(words))

    server.fail("/commit/", status=None)
    out = tmp_path / "cut"
    assert f"`hf upload {NAME} {out} --repo-type dataset`" in told("cut")
    assert server.repos[REPO].files == {}
    puts = server.count("PUT", "/lfs/")
    HfApi().upload_folder(repo_id=NAME, folder_path=out, repo_type="dataset")  # what that command does
    assert server.repos[REPO].files == _files(out) and server.count("PUT", "/lfs/") == puts > 3
    assert "public, and --private was asked for" in told("public", "--private")
    server.tokens[TOKEN]["role"] = "read"
    assert "the token may not do this" in told("read")
    server.tokens.clear()
    assert "does not know the token" in told("unknown")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "could not be reached" in told("alone")
    monkeypatch.setenv("HF_TOKEN", "")
    assert "no token" in told("none") and not (tmp_path / "none").exists(), "before hours of writing"
    assert "--push_to_hub people: expected ORG/NAME" in _told(
        monkeypatch, capsys, lambda: convert.main([*_words(drawn, tmp_path / "name"), "--push_to_hub", "people"])
    )


def test_a_push_that_is_killed_changes_nothing(server: Server, drawn: Path, tmp_path: Path) -> None:
    server.fail("/lfs/", method="PUT", status=0, seconds=60)
    environment = os.environ | server.environment(tmp_path / "home")
    command = [sys.executable, "-m", "sapiens_accel.data", *_words(drawn, tmp_path / "out", "--push_to_hub", NAME)]
    pushing = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not server.count("PUT", "/lfs/") and time.monotonic() < deadline and pushing.poll() is None:
        time.sleep(0.01)
    pushing.send_signal(signal.SIGKILL)
    pushing.communicate()
    assert pushing.returncode == -signal.SIGKILL and server.count("PUT", "/lfs/")
    assert server.repos[REPO].files == {}
    assert sum(pq.ParquetFile(f).metadata.num_rows for f in (tmp_path / "out").glob("data/train-*")) > 10


# ---- Streaming


def _records(folder: Path, name: str) -> list[list[int]]:
    """The ids of each step: those of the ranks one after the other."""
    ranks = [[json.loads(line) for line in path.read_text().splitlines()] for path in sorted(folder.glob(f"{name}-*"))]
    joined: dict[int, list[int]] = {}
    for step, ids in itertools.chain.from_iterable(ranks):
        joined.setdefault(step, []).extend(ids)
    assert list(joined) == sorted(joined)
    return list(joined.values())


def _reference(parquet: Path, cache: Path, steps: range, **changes: Any) -> list[list[int]]:
    """The ids of each step by one process that reads the folder."""
    found = _config(parquet, cache, streaming=True, **changes)
    sets = build.open_people(found, COCO17, unlabeled=False)
    rows: Any = sets.train.rows
    orders = [
        rows.order(stream.OrderKey(0, "phase2", BATCH, found.stream_parts, found.stream_window), step) for step in steps
    ]
    return [[rows[int(index)]["ann_id"] for index in order] for order in orders]


@pytest.fixture(scope="module")
def streamed(parquet: Path) -> Path:
    """Where tests/streamed.py, a client of a Hub that once breaks off, has left its records, caches and a run."""
    folder = parquet.parent / "streamed"
    (folder / "records").mkdir(parents=True)
    words = ["--recipe=demo", "--stage=phase2", f"--phase2.steps={STEPS}", f"--phase2.global_batch={BATCH}"]
    words += ["--save_every=1", "--keep_checkpoints=2", "--model.name=sapiens_tiny", "--data.input_hw=[64,48]"]
    words += ["--eval.num_pictures=0", "--report_to=none", "--data.streaming=true", "--data.num_workers=1"]
    with serve() as server:
        server.add(REPO, _files(parquet))
        server.fail("/resolve/.*/train-", method="GET", status=None)
        environment = os.environ | server.environment(folder / "home") | {"OMP_NUM_THREADS": "1"}
        environment |= {"SAPIENS_ACCEL_CACHE": str(folder / "cache"), "ACCELERATE_MIXED_PRECISION": "no"}
        command = [sys.executable, "tests/streamed.py", folder / "records", f"hf://{NAME}", folder / "cache"]
        command += [folder / "run", *words, f"--data.root=hf://{NAME}"]
        done = subprocess.run(
            [str(word) for word in command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder


@pytest.mark.slow
@pytest.mark.launch
def test_everybody_once_over_real_processes(streamed: Path, parquet: Path, tmp_path: Path) -> None:
    """1 and 2 processes of gloo, 0, 1 and 3 workers: each epoch is the one of a single process that reads a folder."""
    expected = _reference(parquet, tmp_path, range(PEOPLE // BATCH))
    assert len({one for ids in expected for one in ids}) == PEOPLE
    for size, workers in itertools.product((1, 2), (0, 1, 3)):
        assert _records(streamed / "records", f"{size}x{workers}") == expected, (size, workers)


@pytest.mark.slow
@pytest.mark.launch
def test_a_killed_run_goes_on_with_the_same_people(streamed: Path, parquet: Path, tmp_path: Path) -> None:
    """train.py with two processes, SIGKILL, and again, over the end of an epoch."""
    expected = _reference(parquet, tmp_path, range(STEPS))
    first, second = (_records(streamed / "records", name) for name in ("first", "second"))
    assert len(first) >= 3 and 0 < len(second) <= STEPS - 3
    assert first[:3] == expected[:3] and first[: STEPS - len(second)] + second == expected


@pytest.mark.slow
@pytest.mark.launch
def test_no_training_image_lies_in_a_file(streamed: Path, parquet: Path) -> None:
    """Neither in the caches (with the validation images) nor in the run."""
    kept = [path.read_bytes() for path in streamed.rglob("*") if path.is_file()]
    for split, is_there in (("validation", True), ("train", False)):
        rows = pq.read_table(min((parquet / "data").glob(f"{split}-*"))).column("image").to_pylist()
        for row in rows:
            assert any(row["bytes"] in content for content in kept) == is_there
    assert not any(TOKEN.encode() in content for content in kept)


def _covered(parts: list[tuple[int, int]]) -> int:
    """Bytes of a file that were sent at least once."""
    total = reached = 0
    for start, end in sorted(parts):
        total += max(0, end - max(start, reached))
        reached = max(reached, end)
    return total


def test_people_are_counted_without_their_images(server: Server, drawn: Path, tmp_path: Path) -> None:
    convert.main(["convert", "coco", str(drawn), str(tmp_path / "out"), "--group_rows", "2"])
    server.add(REPO, _files(tmp_path / "out"))
    found = _config(f"hf://{NAME}", tmp_path / "cache", streaming=True)
    root = build.prepare_root(found)[0]
    reader = PeopleReader(source=open_source(root / "train.shards"), prefix="train.shards", num_keypoints=17)
    people = stream.open_streams(root, [stream.StreamSource(reader, stream.labeled)], tmp_path)
    assert len(people) == PEOPLE
    name = next(path for path in server.repos[REPO].files if "/train-" in path)
    size = len(server.repos[REPO].files[name])
    opened = server.sent[f"{REPO}/{name}"]
    read = len(opened)
    assert size > 400_000 and _covered(opened) < 0.25 * size, "64 kB of its end, and the columns of people"
    photo.read_bytes(root / people.rows[0]["file_name"])
    one = [part for part in server.sent[f"{REPO}/{name}"][read:] if part[1] < size]
    assert 0 < _covered(one) < 0.2 * size, "one row group"


def test_memory_does_not_grow_with_the_data_set(parquet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An epoch of the images, and one of four times as many, by address: Arrow holds no more at its peak."""
    monkeypatch.setattr(shards, "CACHED_BYTES", 400_000)
    train, peaks = sorted((parquet / "data").glob("train-*")), []
    for times in (1, 4):
        folder = Path(shutil.copytree(parquet, tmp_path / f"times{times}"))
        for number in range(1, times):
            for path in train:
                shutil.copy(path, folder / "data" / path.name.replace("train-", f"train-copy{number}-"))
        found = replace(_config(f"file://{folder}", tmp_path / "cache", streaming=True), check_images="ends")
        people = build.open_people(found, COCO17, unlabeled=False).train
        rows: Any = people.rows
        assert len(rows) == times * PEOPLE
        shards._cached.clear()
        before, held = pa.total_allocated_bytes(), []
        for step in range(len(rows) // BATCH):
            for index in rows.order(stream.OrderKey(0, "x", BATCH, 1, 2), step):
                photo.read_bytes(people.root / rows[int(index)]["file_name"])
                held.append(pa.total_allocated_bytes() - before)
        peaks.append(max(held))
    assert 200_000 < peaks[0] < 600_000 and peaks[1] < 1.2 * peaks[0], peaks
    assert sum(path.stat().st_size for path in train) > peaks[1], "less than the smaller one has"
