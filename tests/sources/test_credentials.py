"""User and password in the address of data: used to read it, and in no file, name or message."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import yaml
from fsspec.implementations.local import LocalFileSystem
from torch.utils.data import DataLoader, Dataset

from sapiens_accel.config import credentials, parse
from sapiens_accel.data import build, loader
from sapiens_accel.errors import UserError
from sapiens_accel.pose.skeleton import COCO17
from sapiens_accel.sources import convert, synthetic

SECRET = "PASS-word1"


class _Locked(fsspec.AbstractFileSystem):
    """Another machine's files under /, for whoever has the password, which its addresses repeat as HTTP's do."""

    protocol = "locked"
    folder = Path()

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return [cls._strip_protocol(one) for one in path] if isinstance(path, list) else str(path)

    def unstrip_protocol(self, name: str) -> str:
        return name

    def _local(self, path: str) -> str:
        if not path.startswith(f"locked://user:{SECRET}@host"):
            raise PermissionError(f"no access to {path}")
        return f"{self.folder}/{path.split('@host', 1)[1].strip('/')}"

    def ls(self, path: str, detail: bool = True, **_: Any) -> Any:
        base = path.split("@host")[0] + "@host"
        names = LocalFileSystem().ls(self._local(path), detail=True)
        found = [one | {"name": base + one["name"].removeprefix(str(self.folder))} for one in names]
        return found if detail else [one["name"] for one in found]

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        return LocalFileSystem().info(self._local(path)) | {"name": path}

    def _open(self, path: str, mode: str = "rb", **_: Any) -> Any:
        return Path(self._local(path)).open(mode)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    base = tmp_path_factory.mktemp("served")
    root = synthetic.write(base / "drawn", num_train=6, num_unlabelled=1, num_val=3)
    convert.main(["convert", "coco", str(root), str(base / "shards")])
    _Locked.folder = base / "shards"
    fsspec.register_implementation("locked", _Locked, clobber=True)
    yield "host"


@pytest.mark.parametrize("streaming", [False, True])
def test_a_password_opens_the_data_and_is_written_nowhere(address: str, tmp_path: Path, streaming: bool) -> None:
    words = ["--recipe", "demo", "--data.root", f"locked://user:{SECRET}@{address}/data/"]
    words += ["--data.cache_dir", str(tmp_path / "cache"), "--data.streaming", str(streaming).lower()]
    run = parse.load([*words, "--data.input_hw", "[64,48]"])
    assert run.data.root == f"locked://{address}/data/"
    sets = build.open_people(run.data, COCO17, unlabeled=False)
    assert len(sets.train) and sets.train.rows[0]["ann_id"] is not None
    parse.save(run, tmp_path / "config.yaml")
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["data"]["root"] == f"locked://{address}/data/"
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 2
    assert [path for path in files if SECRET in str(path) or SECRET.encode() in path.read_bytes()] == []


def test_no_message_has_a_password(address: str, tmp_path: Path) -> None:
    for root in (f"locked://user:{SECRET}@{address}/nothing", f"s3://user:{SECRET}@bucket/data", f"odd://{SECRET}@x"):
        run = parse.load(["--data.root", root, "--data.cache_dir", str(tmp_path)])
        with pytest.raises(UserError, match=r"--data\.root") as caught:
            build.open_people(run.data, COCO17, unlabeled=False)
        assert SECRET not in str(caught.value)
    shown = str(UserError(f"https://u:{SECRET}@host/a?X-Amz-Signature={SECRET}&b=1: gone; hf://me/data@{'0' * 40}"))
    assert shown == f"https://***@host/a?X-Amz-Signature=***&b=1: gone; hf://me/data@{'0' * 40}"
    more = parse.load(["--data.root", "x", "--data.more", f'[{{root: "https://u:{SECRET}@host/d"}}]'])
    assert more.data.more[0].root == "https://host/d"


@pytest.fixture(autouse=True)  # tests of other files know users too
def _nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in list(credentials.known):
        monkeypatch.delitem(credentials.known, key)


@pytest.mark.parametrize(
    ("address", "left"),
    [
        ("https://u:p@ss@host/d", "https://host/d"),
        ("https://token@host:80/d@v1", "https://host:80/d@v1"),
        ("https://u:p@[2001:db8::1]:80/d", "https://[2001:db8::1]:80/d"),
        ("simplecache::https://u:p@host/x", "simplecache::https://host/x"),
        ("zip://a.zip::https://u:p@host/x", "zip://a.zip::https://host/x"),
        ("zip://a.zip::simplecache::s3://k:p@host/x", "zip://a.zip::simplecache::s3://host/x"),
        ("sftp://me:p@host/d", "sftp://host/d"),
        *[(same, same) for same in ("abfs://box@account.net/d", "sftp://me@host/d", "github://me:repo@main/d")],
        *[(same, same) for same in ("hf://data@v1/d", "s3://arn:aws:s3:::x/d", "https://host:80/a?b=c@d", "a@b", "")],
    ],
)
def test_secrets_are_taken_and_put_back_and_nothing_else(address: str, left: str) -> None:
    assert credentials.take(address) == left
    assert credentials.put_back(left) == address
    assert credentials.take(left) == left


@pytest.mark.parametrize(
    "address",
    [f"https://u:{SECRET}{mark}q@host/d" for mark in "/?#'"]
    + [f"https://host/d{query}={SECRET}" for query in ("?token", "?a=1&X-Amz-Signature")]
    + [f"https://u:p@{mark}{SECRET}@host/d" for mark in ("ss/", "ss?", "/", "ss/@", "ss:80/")],
)
def test_a_secret_that_cannot_be_taken_is_refused(address: str) -> None:
    with pytest.raises(UserError, match="USER:PASSWORD@ before the host") as caught:
        parse.load(["--data.root", address])
    assert SECRET not in str(caught.value) and "host/d" in str(caught.value)


def test_a_second_user_of_a_host_is_refused() -> None:
    credentials.take(f"https://u:{SECRET}@host/a")
    assert credentials.take("https://u:other@host/b") == "https://host/b"
    with pytest.raises(UserError, match=r"https://host: addresses with two users"):
        credentials.take(f"https://v:{SECRET}@host/b")


class _PutBack(Dataset[str]):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, _: int) -> str:
        return credentials.put_back("https://host/d")


@pytest.mark.slow
def test_loading_processes_that_are_no_forks_have_the_passwords() -> None:
    credentials.take("https://u:p@host/d")
    batches = DataLoader(_PutBack(), num_workers=1, worker_init_fn=loader.begin_worker, multiprocessing_context="spawn")
    assert list(batches) == [["https://u:p@host/d"]]
