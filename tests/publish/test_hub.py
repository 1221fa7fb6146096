"""The real client against a Hub on loopback: what is pushed is what is pulled, and what goes wrong is told."""

import dataclasses
import functools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import yaml
from hub_server import TOKEN, Server, serve
from huggingface_hub import ModelCard, constants
from safetensors.torch import load_file, save_file

from sapiens_accel import __version__
from sapiens_accel.config import parse as config
from sapiens_accel.config.schema import STAGES, Config, ModelConfig
from sapiens_accel.errors import UserError, run_main
from sapiens_accel.evaluation.evaluate import METRICS
from sapiens_accel.models import export
from sapiens_accel.models import load as weights
from sapiens_accel.models.sapiens import SapiensPose
from sapiens_accel.pose.skeleton import COCO17
from sapiens_accel.publish import license as origin
from sapiens_accel.publish import model_card as card
from sapiens_accel.publish import uploader as hub
from sapiens_accel.visibility import output as visibility

ROOT = Path(__file__).parents[2]
REPO = "me/pose"
SOON = (0.01, 0.01, 0.01)
SAPIENS2_TERMS = b"Sapiens2 License\n\nterms of the test"


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    return _run_folder(tmp_path / "run")


LAST = STAGES[-1]


@functools.cache
def _demo() -> Config:
    return config.load(["--push_to_hub", "--hub_model_id", REPO])


def _run_folder(folder: Path, model: str = "sapiens_tiny", stages: tuple[str, ...] = STAGES, **knobs: Any) -> Path:
    """What train.py leaves behind, with weights of a few numbers."""
    run = dataclasses.replace(_demo(), model=ModelConfig(name=model), output_dir=str(folder), **knobs)
    config.save(dataclasses.replace(run, push_to_hub=False, hub_model_id=None), folder / "config.yaml")
    generator, lines = np.random.default_rng(0), []
    for number, stage in enumerate(stages, start=1):
        _write_weights(folder / stage / "weights", number)
        numbers = {name: 0.1 * number + 0.01 * index for index, name in enumerate(METRICS)} | {"AP_L": -1.0}
        lines += [{"stage": stage, "step": step, "loss": 1 / step, "lr": 1e-3} for step in (5, 10)]
        lines += [{"stage": stage, "step": 5, "AP": 0.05}, {"stage": stage, "step": 10, **numbers}]
        how = {"step": 10, "weights_step": 10, "split": "val", "boxes": "ground truth", "flip": True}
        how["area_used"] = "as annotated"
        (folder / stage / "eval.json").write_text(json.dumps(numbers | how))
        picture = generator.integers(0, 255, (40, 60, 3)).astype(np.uint8)
        (folder / "pictures").mkdir(exist_ok=True)
        cv2.imwrite(str(folder / "pictures" / f"{stage}_predictions.jpg"), picture)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "labelled_ann_ids.json").write_text(json.dumps({"ann_ids": list(range(23))}))
    return folder


def _write_weights(folder: Path, seed: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / ".tmp"
    save_file({"w": torch.full((3000,), float(seed))}, temporary)
    ours = {"num_keypoints": 17, "input_hw": [128, 96], "keypoints": COCO17.names}
    (folder / "config.json").write_text(json.dumps({"sapiens_accel": ours}))
    (folder / "preprocessor_config.json").write_text("{}")
    (folder / "modeling_pose.py").write_text(f"# {seed}\n")
    temporary.replace(folder / "model.safetensors")


def _uploads(run_folder: Path, **how: Any) -> hub.Uploads:
    waits = how.pop("waits", SOON)
    found = hub.Uploads(REPO, run_folder, **{"last_stage": "ssl", **how})
    found.retry_seconds = waits
    return found


# ---- Weights come


SHARDS = {f"model-0000{i}-of-00002.safetensors": b"shard %d" % i for i in (1, 2)}
INDEX = {"model.safetensors.index.json": json.dumps({"weight_map": dict(zip("ab", SHARDS, strict=True))}).encode()}
V1 = {
    "README.md": b"card",
    "config.json": b"{}",
    "sapiens_1b_epoch_173_clean.pth": b"clean",
    "sapiens_1b_epoch_173.pth": b"with optimizer",
    "sapiens_1b_epoch_173_torchscript.pt2": b"program",
    ".gitattributes": b"",
}
V2 = {"sapiens2_0.4b_pretrain.safetensors": b"native", "LICENSE.md": SAPIENS2_TERMS, "README.md": b"card"}
DEEP = "sapiens_host/pose/checkpoints/sapiens_1b/sapiens_1b_coco_best_coco_AP_821.pth"
POSE = {DEEP: b"pose", DEEP.replace("1b", "2b"): b"other", "README.md": b"card", "LICENSE": b"terms"}
OURS = {
    "model.safetensors": b"ssl",
    "config.json": b"{}",
    "skeleton.json": b"{}",
    "modeling_sapiens_pose.py": b"code",
    "visibility.safetensors": b"visibility",
    "training.png": b"picture",
    "phase1/model.safetensors": b"phase1",
    "phase1/config.json": b"{1}",
}


@pytest.mark.parametrize(
    ("files", "reference", "returned", "downloaded"),
    [
        (V1, "a/b", "sapiens_1b_epoch_173_clean.pth", {"README.md", "config.json", "sapiens_1b_epoch_173_clean.pth"}),
        (V2, "a/b", "sapiens2_0.4b_pretrain.safetensors", set(V2)),
        (V2 | {"model.safetensors": b"new"}, "a/b", "", {"model.safetensors", "LICENSE.md", "README.md"}),
        (POSE, f"a/b:{DEEP}", DEEP, {DEEP, "LICENSE"}),
        (SHARDS | INDEX, "a/b", "", {*SHARDS, *INDEX}),
        (OURS, "a/b", "", {name for name in OURS if "/" not in name} - {"training.png"}),
        (OURS, "a/b:phase1", "phase1", {"phase1/model.safetensors", "phase1/config.json"}),
        ({"x.pth": b"one", "x_bfloat16.pth": b"two"}, "a/b", "x.pth", {"x.pth"}),
    ],
)
def test_only_what_is_needed_is_downloaded(
    server: Server, files: dict[str, bytes], reference: str, returned: str, downloaded: set[str]
) -> None:
    commit = server.add("a/b", files).commits[-1][0]
    path = Path(hub.fetch(reference))
    snapshot = Path(constants.HF_HUB_CACHE) / "models--a--b" / "snapshots" / commit
    assert path == (snapshot / returned if returned else snapshot)
    found = {file.relative_to(snapshot).as_posix(): file.read_bytes() for file in snapshot.rglob("*") if file.is_file()}
    assert found == {name: files[name] for name in downloaded}


@pytest.mark.parametrize("reference", ["a/b", "a/b@main", "a/b:sapiens2_0.4b_pretrain.safetensors"])
def test_what_is_in_the_cache_is_not_downloaded_again_and_needs_no_network(
    server: Server, monkeypatch: pytest.MonkeyPatch, reference: str
) -> None:
    server.add("a/b", V2)
    first = hub.fetch(reference)
    assert server.count("GET", "/resolve/.*safetensors") == 1
    assert hub.fetch(reference) == first
    assert server.count("GET", "/resolve/") == len(V2) - (1 if ":" in reference else 0), "each file once"
    # The Hub has a bad day, then there is no Hub.
    server.fail(times=100, status=503)
    assert hub.fetch(reference) == first
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(server.requests)
    assert hub.fetch(reference) == first
    assert len(server.requests) == asked


def test_a_cache_that_lacks_a_shard_is_not_whole(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.add("a/b", SHARDS | INDEX)
    folder = Path(hub.fetch("a/b"))
    (folder / min(SHARDS)).unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set, and a/b is not complete"):
        hub.fetch("a/b")


def test_a_revision_is_taken(server: Server) -> None:
    repo = server.add("a/b", {"model.safetensors": b"old"})
    repo.tags["v1"] = repo.commits[-1][0]
    repo.commit({"model.safetensors": b"new"})
    read = [
        (Path(hub.fetch(f"a/b{at}")) / "model.safetensors").read_bytes() for at in ("", "@v1", f"@{repo.tags['v1']}")
    ]
    assert read == [b"new", b"old", b"old"]


def test_a_local_path_is_returned_as_it_is(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "me").mkdir()
    (tmp_path / "me" / "pose").write_bytes(b"here")
    monkeypatch.chdir(tmp_path)
    assert hub.fetch("me/pose") == "me/pose"
    assert hub.fetch(str(tmp_path)) == str(tmp_path)
    assert server.requests == []


def _gated(server: Server) -> str:
    server.add("a/b", V2, gated=True)
    return "a/b"


def _private(server: Server) -> str:
    server.add("a/b", V2, private=True)
    server.tokens.clear()
    return "a/b"


def _half(server: Server) -> str:
    server.add("a/b", INDEX | {"model-00001-of-00002.safetensors": b"1"})
    return "a/b"


def _offline(server: Server) -> str:
    server.add("a/b", V2)
    constants.HF_HUB_OFFLINE = True  # the fixture's monkeypatch restores it
    return "a/b"


def _with(files: dict[str, bytes], reference: str) -> Any:
    def add(server: Server) -> str:
        server.add("a/b", files)
        return reference

    return add


def _down(server: Server) -> str:
    server.add("a/b", V2)
    server.fail(times=1000, status=503)
    return "a/b"


def _gone(server: Server) -> str:
    server.http.socket.close()
    constants.ENDPOINT = "http://127.0.0.1:1"
    return "a/b"


@pytest.mark.parametrize(
    ("prepare", "named"),
    [
        (lambda server: "runs/demo/ssl/weights", ["no such file or folder here", "ORG/NAME"]),
        (lambda server: "weights/model.safetensors", ["no such file or folder here"]),
        (lambda server: "/no/such/file.pth", ["no such file or folder here"]),
        (lambda server: "facebook/sapiens2-pose-1b/x.safetensors", ["facebook/sapiens2-pose-1b:x.safetensors"]),
        (lambda server: "a/nothing", ["no such file or folder here", "no Hub repository a/nothing", "hf auth login"]),
        (_with(V2, "a/b:lost.pth"), ["a/b has no 'lost.pth'", "a/b:sapiens2_0.4b_pretrain.safetensors"]),
        (_with(V2, "a/b@v9"), ["a/b has no revision 'v9'"]),
        (_with(POSE, "a/b"), ["a/b has no weights", f"a/b:{DEEP}"]),
        (_with({"x.pth": b"1", "y.pth": b"2"}, "a/b"), ["several weights", "a/b:x.pth, a/b:y.pth"]),
        (_with({"README.md": b"card", "x.pt2": b"2"}, "a/b"), ["no weights"]),
        (_half, ["model-00002-of-00002.safetensors", "missing"]),
        (_gated, ["a/b is gated", "/a/b", "hf auth login"]),
        (_private, ["the Hub does not know the token", "hf auth login"]),
        (_offline, ["HF_HUB_OFFLINE is set", "cache"]),
        (_down, ["503", "cache"]),
        (_gone, ["could not be reached", "cache"]),
    ],
)
def test_what_cannot_be_fetched_is_reported_in_one_line(
    server: Server, monkeypatch: pytest.MonkeyPatch, prepare: Any, named: list[str]
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    reference = prepare(server)
    with pytest.raises(UserError) as caught:
        hub.fetch(reference)
    text = str(caught.value)
    assert text.startswith(f"--weights {reference}: ") and "\n" not in text and TOKEN not in text
    assert [word for word in named if word not in text] == [], text


# ---- Weights go


@pytest.mark.parametrize("name", ["sapiens_tiny", "sapiens2_tiny"])
def test_what_is_pushed_is_what_is_pulled(server: Server, tmp_path: Path, name: str) -> None:
    folder = _run_folder(tmp_path / "run", name)
    model = SapiensPose(name, 17, (64, 48))
    export.export(folder / "ssl" / "weights", model.state_dict(), model, COCO17, 1.0)
    with _uploads(folder) as uploads:
        uploads.saved("ssl", last=True, score=0.3)
    sent = {path.name: path.read_bytes() for path in (folder / "ssl" / "weights").iterdir()}
    repo = server.repos[REPO]
    assert sent.items() <= repo.files.items()
    assert set(repo.files) - set(sent) == {"README.md", "training.png", "predictions.jpg"}
    assert repo.messages == ["ssl: final weights"] and not repo.private
    assert not (folder / ".hub").exists()
    again = SapiensPose(name, 17, (64, 48))
    weights.load(again, hub.fetch(REPO))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def test_a_visibility_output_goes_with_its_weights_and_leaves_with_them(server: Server, run_folder: Path) -> None:
    """A push of weights without it, those of a checkpoint, removes that of the weights before."""
    weights = run_folder / "ssl" / "weights"
    output = visibility.VisibilityOutput(COCO17.names, torch.rand(2, 17, 9), torch.rand(2, 17), {"people": 300})
    visibility.save(weights, output)
    uploads = _uploads(run_folder)
    with uploads:
        uploads.saved("ssl", last=True)
    pulled = visibility.read(Path(hub.fetch(REPO)))
    assert pulled is not None
    assert torch.equal(pulled.weight, output.weight)
    assert "Fitted on 300 training people" in server.repos[REPO].files["README.md"].decode()
    visibility.save(weights, None)
    uploads = _uploads(run_folder)
    with uploads:
        uploads.saved("ssl", last=True)
    assert visibility.FILE not in server.repos[REPO].files
    assert "model.safetensors" in server.repos[REPO].files
    assert "visibility" not in server.repos[REPO].files["README.md"].decode()


def test_adapters_of_earlier_weights_are_removed(server: Server, run_folder: Path) -> None:
    """They would be read as those of the merged weights beside them; what others have added stays."""
    adapter = run_folder / "ssl" / "weights" / "adapter"
    adapter.mkdir()
    for name in ("adapter_model.safetensors", "notes.txt"):
        (adapter / name).write_text("of rank 4")
    with _uploads(run_folder) as uploads:
        uploads.saved("ssl", last=True)
    server.repos[REPO].files["adapters_of_mine.txt"] = b"mine"
    assert {"adapter/adapter_model.safetensors", "adapter/notes.txt"} <= set(server.repos[REPO].files)
    shutil.rmtree(adapter)
    with _uploads(run_folder) as uploads:
        uploads.saved("ssl", last=True)
    left = [name for name in server.repos[REPO].files if name.startswith("adapter")]
    assert left == ["adapters_of_mine.txt"]


@pytest.mark.parametrize(
    ("strategy", "messages", "folders"),
    [
        ("end", [f"{LAST}: final weights"], {"": len(STAGES)}),
        ("best", ["phase1: step 5", "phase2: final weights"], {"": 2}),
        (
            "every_save",
            [f"{stage}: {when}" for stage in STAGES for when in ("step 5", "final weights")],
            {"": len(STAGES)},
        ),
        (
            "all",
            [f"{stage}: final weights" for stage in (*STAGES, LAST)],
            {f"{stage}/": number for number, stage in enumerate(STAGES, start=1)} | {"": len(STAGES)},
        ),
    ],
)
def test_when_what_is_pushed(
    server: Server, run_folder: Path, strategy: str, messages: list[str], folders: dict[str, int]
) -> None:
    uploads = _uploads(run_folder, strategy=strategy, last_stage=LAST)
    scores = {"phase1": (0.1, 0.1), "phase2": (float("nan"), 0.3)}
    for stage in STAGES:
        for last, score in zip((False, True), scores.get(stage, (0.2, 0.3)), strict=True):
            uploads.saved(stage, step=10 if last else 5, score=score, last=last)
            with uploads.changed:  # so that no push takes the place of another
                uploads.changed.wait_for(lambda: not uploads.running and not uploads.waiting, 30)
    uploads.finish(30)
    repo = server.repos[REPO]
    assert repo.messages == messages
    assert {name for name in repo.files if name.endswith("model.safetensors")} == {
        f"{at}model.safetensors" for at in folders
    }
    for at, number in folders.items():
        assert repo.files[f"{at}modeling_pose.py"] == b"# %d\n" % number
        assert (
            repo.files[f"{at}model.safetensors"]
            == (run_folder / STAGES[number - 1] / "weights" / "model.safetensors").read_bytes()
        )
    assert server.count("PUT", "/lfs/") == len(
        {content for _, _, files in repo.commits for content in files.values() if content in server.blobs.values()}
    )


def test_a_push_returns_at_once_and_takes_the_files_as_they_are(server: Server, run_folder: Path) -> None:
    """Nothing is answered until all pushes were made: one that waited for the server would never come back."""
    folder, uploads = run_folder / "ssl" / "weights", _uploads(run_folder, strategy="every_save")
    as_it_was = (folder / "model.safetensors").read_bytes()
    server.gate.clear()
    uploads.saved("ssl", step=1)
    with uploads.changed:
        assert uploads.changed.wait_for(lambda: uploads.running, 30)
    _write_weights(folder, 7)
    uploads.saved("ssl", step=2)
    _write_weights(folder, 8)
    uploads.saved("ssl", step=3)
    _write_weights(run_folder / "phase2" / "weights", 9)
    uploads.strategy = "all"
    uploads.saved("phase2", last=True)
    assert server.repos == {}
    uploads.finish(0.01)
    server.gate.set()
    uploads.finish(60)
    commits = server.repos[REPO].commits
    messages = [message for _, message, _ in commits]
    assert messages == ["ssl: step 1", "ssl: step 3", "phase2: final weights"], "the second was superseded"
    assert commits[0][2]["model.safetensors"] == as_it_was and commits[0][2]["modeling_pose.py"] == b"# 3\n"
    assert commits[1][2]["modeling_pose.py"] == b"# 8\n"
    assert commits[2][2]["phase2/modeling_pose.py"] == b"# 9\n"


@pytest.mark.parametrize(
    "faults",
    [
        [{"path": "/repos/create", "times": 2}],
        [{"path": "/commit/", "status": None}, {"path": "/commit/", "status": 502}],
        [{"path": "/repos/create", "status": 429}, {"path": "/commit/", "status": 409}, {"path": "/validate-yaml"}],
        [{"path": "/lfs/", "method": "PUT", "status": None}],
        [{"path": "/preupload/", "status": 503}],
    ],
)
def test_what_passes_is_tried_again(
    server: Server, run_folder: Path, faults: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    for fault in faults:
        server.fail(**fault)
    with _uploads(run_folder) as uploads:
        uploads.saved("ssl", last=True)
    assert all(fault.times == 0 for fault in server.faults), "they happened"
    assert server.repos[REPO].messages == ["ssl: final weights"]
    said = capsys.readouterr()
    assert f"pushed: {server.url}/{REPO}" in said.out and said.err == ""


@pytest.mark.parametrize(
    ("fault", "reason", "tries"),
    [
        ({"path": "/repos/create", "status": 401}, "does not know the token", 1),
        ({"path": "/repos/create", "status": 403}, f"may not do this to {REPO}", 1),
        ({"path": "/commit/", "status": 413, "body": "too large"}, "too large", 1),
        ({"path": "/repos/create", "status": 500}, "500", 4),
        ({"path": "/repos/create", "status": None}, "could not be reached", 4),
    ],
)
def test_what_does_not_pass_is_reported_once_with_the_command_to_push_by_hand(
    server: Server,
    run_folder: Path,
    fault: dict[str, Any],
    reason: str,
    tries: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server.fail(**fault, times=1000)
    uploads = _uploads(run_folder, strategy="every_save")
    for step in (5, 6, 7):
        uploads.saved("ssl", step=step)
        with uploads.changed:
            uploads.changed.wait_for(lambda: not uploads.running and not uploads.waiting, 30)
        if step == 5:
            assert server.count("POST", fault["path"]) == tries
    uploads.finish(30)
    said = capsys.readouterr()
    assert "pushed: http" not in said.out
    failures = [line for line in said.err.splitlines() if "warning" in line]
    assert len(failures) == 1 and reason in failures[0] and "the training continues" in failures[0], said.err
    by_hand = re.search(r"by hand: python -m sapiens_accel\.hub (push .*)", said.err)
    assert by_hand and said.err.count("by hand") == 1
    assert list((run_folder / ".hub").glob("*")) == [] if (run_folder / ".hub").exists() else True
    # The command is as good as its word.
    server.faults.clear()
    hub.main(by_hand[1].split())
    assert server.repos[REPO].files["modeling_pose.py"] == b"# 3\n"


def test_a_failed_push_is_forgotten_when_a_later_one_goes_through(
    server: Server, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.fail("/repos/create", status=403)
    uploads = _uploads(run_folder, strategy="every_save")
    uploads.saved("ssl", step=5)
    with uploads.changed:
        uploads.changed.wait_for(lambda: not uploads.running and not uploads.waiting, 30)
    uploads.saved("ssl", last=True)
    uploads.finish(30)
    said = capsys.readouterr()
    assert f"pushed: {server.url}/{REPO}" in said.out and "by hand" not in said.err


def test_what_is_broken_here_does_not_reach_the_training(
    server: Server, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run_folder / "ssl" / "eval.json").write_text("{")
    uploads = _uploads(run_folder)
    uploads.saved("ssl", last=True)
    uploads.saved("ssl", last=True, weights=run_folder / "nowhere")
    (run_folder / "config.yaml").unlink()
    uploads.saved("ssl", last=True)
    uploads.finish(30)
    assert "by hand" in capsys.readouterr().err


def test_a_private_repository_is_private_and_a_public_one_is_left_alone(
    server: Server, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with _uploads(run_folder, private=True) as uploads:
        uploads.saved("ssl", last=True)
    assert server.repos[REPO].private and "model.safetensors" in server.repos[REPO].files
    server.repos[REPO] = type(server.repos[REPO])(private=False)
    with _uploads(run_folder, private=True) as uploads:
        uploads.saved("ssl", last=True)
    assert server.repos[REPO].files == {}
    said = capsys.readouterr().err
    assert "is public" in said and "--hub_private" in said


def test_the_token_is_nowhere(server: Server, run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    uploads = _uploads(run_folder, strategy="every_save")
    uploads.saved("ssl", step=5)
    server.fail("/repos/create", status=400, body=f"Bearer {TOKEN} is bad")
    uploads.saved("phase2", step=5)
    uploads.finish(30)
    said = capsys.readouterr()
    assert "is bad" in said.err, "the server said it"
    kept = [path.read_bytes() for path in run_folder.rglob("*") if path.is_file()]
    kept += [content for _, _, files in server.repos[REPO].commits for content in files.values()]
    assert kept and not any(TOKEN.encode() in content for content in (*kept, said.out.encode(), said.err.encode()))


# ---- Before the training


def _run(folder: Path, **knobs: Any) -> Config:
    return dataclasses.replace(_demo(), output_dir=str(folder), **knobs)


def test_only_the_first_rank_of_a_real_run_pushes(server: Server, tmp_path: Path) -> None:
    run = _run(tmp_path / "run", hub_strategy="all", hub_private=True)
    uploads = hub.uploads(run, True)
    assert isinstance(uploads, hub.Uploads)
    assert (uploads.repo_id, uploads.private, uploads.strategy, uploads.last_stage) == (REPO, True, "all", LAST)
    asked = len(server.requests)
    for other in (hub.uploads(run, False), hub.uploads(dataclasses.replace(run, push_to_hub=False), True)):
        with other:
            other.saved("ssl", last=True)
        assert isinstance(other, hub.NoUploads)
    assert len(server.requests) == asked
    assert isinstance(hub.uploads(dataclasses.replace(run, dry_run=True), True), hub.NoUploads)
    assert len(server.requests) > asked and server.repos == {}, "a dry run asks, and makes nothing"


def test_a_resumed_run_knows_what_was_best(server: Server, run_folder: Path) -> None:
    run = _run(run_folder, resume_from_checkpoint="latest")
    uploads = hub.uploads(run, True)
    assert isinstance(uploads, hub.Uploads) and uploads.best == pytest.approx(0.1 * len(STAGES))
    fresh = hub.uploads(_run(run_folder), True)
    assert isinstance(fresh, hub.Uploads) and fresh.best == float("-inf")


@pytest.mark.parametrize(
    ("case", "named"),
    [
        ("no token", ["no token", "hf auth login"]),
        ("unknown token", ["does not know the token", "hf auth login"]),
        ("read only", ["may only read"]),
        ("public", [REPO, "public", "--hub_private"]),
    ],
)
def test_a_push_that_cannot_work_is_refused_at_the_start(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, named: list[str]
) -> None:
    if case == "no token":
        monkeypatch.delenv("HF_TOKEN")
    elif case == "unknown token":
        server.tokens.clear()
    elif case == "read only":
        server.tokens[TOKEN]["role"] = "read"
    else:
        server.add(REPO, {})
    with pytest.raises(UserError) as caught:
        hub.uploads(_run(tmp_path, hub_private=True), True)
    text = str(caught.value)
    assert [word for word in ("--push_to_hub", *named) if word not in text] == [] and "\n" not in text, text


@pytest.mark.parametrize("case", ["reset", "503", "429", "offline", "silent"])
def test_a_hub_that_is_away_at_the_start_is_a_warning(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    if case == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    elif case == "silent":
        monkeypatch.setattr(hub, "CHECK_SECONDS", 0.1)
        server.gate.clear()
    else:
        server.fail("whoami", status=None if case == "reset" else int(case), times=9)
    assert isinstance(hub.uploads(_run(tmp_path), True), hub.Uploads)
    server.gate.set()
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and "warning: --push_to_hub" in said[0] and "the training starts" in said[0]


def test_the_switches_stand_alone_and_a_repository_must_be_named() -> None:
    run = config.load(["--push_to_hub", "--hub_private", "--hub_model_id", "my-org/pose.v1_b"])
    assert (run.push_to_hub, run.hub_private, run.hub_strategy) == (True, True, "end")
    with pytest.raises(UserError, match=r"--push_to_hub.*--hub_model_id ORG/NAME"):
        config.load(["--push_to_hub"])
    with pytest.raises(UserError, match="--hub_model_id pose: expected ORG/NAME"):
        config.load(["--hub_model_id", "pose"])
    for wrong in ("me/", "me/a b", "a/b/c", "me/-x", "me/a--b", "me/x.git", "me/é"):
        with pytest.raises(UserError, match=f"--hub_model_id {re.escape(wrong)}: expected ORG/NAME"):
            config.check_model_id(wrong)


# ---- The card


def _card(folder: Path, stage: str = "ssl", step: int | None = None, license: Path | None = None) -> ModelCard:
    card.write(folder / "card", card.collect(folder, stage, step), REPO, license)
    return ModelCard.load(folder / "card" / "README.md")


def test_the_card_says_what_was_measured_and_how(server: Server, run_folder: Path) -> None:
    made = _card(run_folder)
    made.validate()
    assert server.count("POST", "validate-yaml") == 1
    data = made.data
    assert (data.library_name, data.pipeline_tag, data.license) == ("transformers", "keypoint-detection", "apache-2.0")
    assert {"sapiens_accel", "sapiens"} <= set(data.tags)
    results = {result.metric_type: result for result in data.eval_results}
    assert set(results) == set(METRICS) - {"AP_L"}, "nobody was large"
    assert results["AP"].metric_value == 30.0 and results["AR"].metric_value == 35.0
    assert all(
        "ground truth boxes, flip test, area: as annotated, 20 people an image)" in result.metric_name
        for result in results.values()
    )
    assert all(result.dataset_split == "val" for result in results.values())
    assert "160 drawn people" in results["AP"].dataset_name
    rows = [line.strip("| ").split(" | ") for line in made.text.splitlines() if line.startswith("| `")]
    assert rows[2] == [
        "`ssl`",
        "val",
        "ground truth",
        "yes",
        "as annotated",
        "20",
        "30.0",
        "31.0",
        "32.0",
        "33.0",
        "-",
        *(f"{35 + i:.1f}" for i in range(5)),
    ]
    assert [row[6] for row in rows] == ["10.0", "20.0", "30.0"]
    assert "23 labeled people" in made.text and "It has only seen drawn people" in made.text
    assert "| learning rate | 0.0025, constant | 0.0025, cosine | 0.002, cosine |" in made.text
    assert "| steps | 10 | 10 | 10 |" in made.text and "By keypoint" not in made.text
    for name in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", made.text):
        assert cv2.imread(str(run_folder / "card" / name)).std() > 5
    assert made.text.count("![") == 2


def test_the_card_says_which_stages_have_trained_adapters(run_folder: Path) -> None:
    assert "adapter" not in _card(run_folder).text
    tree = yaml.safe_load((run_folder / "config.yaml").read_text())
    tree["lora"] = {"rank": 16}
    (run_folder / "config.yaml").write_text(yaml.safe_dump(tree))
    folder = run_folder / "ssl" / "weights" / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"r": 16}))
    text = _card(run_folder).text
    assert (
        "Stage `ssl` trained low-rank adapters (LoRA) of rank 16, the norms and the head on the frozen weights" in text
    )
    own = "all but adapters (rank 16), norms and head"
    assert f"| frozen | `embeddings`, `block_*`, `norm` | {own} | {own} |" in text
    tree["model"]["base_dtype"] = "nf4"
    (run_folder / "config.yaml").write_text(yaml.safe_dump(tree))
    own += "; matrices of the blocks in nf4"
    assert f"| frozen | `embeddings`, `block_*`, `norm` | {own} | {own} |" in _card(run_folder).text
    (folder / "adapter_config.json").write_text(json.dumps({"r": "<b>"}))
    with pytest.raises(UserError, match=r"adapter_config\.json: r: expected the rank of the adapters, found '<b>'"):
        _card(run_folder)


def test_the_card_names_a_fixed_teacher_by_its_repository_alone(run_folder: Path) -> None:
    assert "fixed teacher" not in _card(run_folder).text
    tree = yaml.safe_load((run_folder / "config.yaml").read_text())
    for reference, named in (("someone/pose-2b", "someone/pose-2b"), ("runs/secret/phase2/weights", "a local network")):
        tree["distill"] = {"teacher": reference, "weight": 0.5}
        (run_folder / "config.yaml").write_text(yaml.safe_dump(tree))
        text = _card(run_folder).text
        assert f"heatmaps of a fixed teacher, {named} (distillation, weight 0.5)" in text and "secret" not in text


def test_numbers_of_keypoints_have_a_table_of_their_own(run_folder: Path) -> None:
    file = run_folder / "ssl" / "eval.json"
    each = {name: k / 100 for k, name in enumerate(COCO17.names)}
    found = json.loads(file.read_text())
    file.write_text(json.dumps(found | {"PCK": each} | {f"OKS/{name}": 0.5 for name in COCO17.names}))
    text = _card(run_folder).text
    assert "| keypoint | PCK | OKS |" in text and "| left_ankle | 0.150 | 0.500 |" in text


def test_the_card_has_distances_categories_and_how_boxes_were_made(run_folder: Path) -> None:
    file = run_folder / "ssl" / "eval.json"
    found = json.loads(file.read_text()) | {
        "mean_px": 4.567,
        "PCK@0.1": 0.75,
        "max_people": 30,
        "people_boxes": "image",
    }
    file.write_text(json.dumps(found | {f"category/dog/{name}": 0.125 for name in METRICS}))
    made = _card(run_folder)
    text = made.text.replace("\\", "")
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| `ssl`")]
    how = ["val", "ground truth, whole images as people's boxes", "yes", "as annotated", "30"]
    assert [row[0] for row in rows[:2]] == ["`ssl`", "`ssl` category/dog"] and [row[1:6] for row in rows[:2]] == [
        how
    ] * 2
    assert rows[0][-2:] == ["4.57", "75.0"] and rows[1][6] == "12.5" and rows[1][-2:] == ["-", "-"]
    assert any("whole images as people's boxes, flip test" in one.metric_name for one in made.data.eval_results)


def test_the_card_has_the_keypoints_of_eval_json(run_folder: Path) -> None:
    """As stages write them, and as those of version 0.1 did: a value for each keypoint under the metric's name."""
    file = run_folder / "ssl" / "eval.json"
    numbers = json.loads(file.read_text())
    each = {name: {"people": 2, "OKS": k / 100, "mean_px": None} for k, name in enumerate(COCO17.names)}
    now = {"joints": {"OKS": 0.08, "keypoints": each}}
    before = {"OKS": {name: k / 100 for k, name in enumerate(COCO17.names)}}
    for table, row in ((now, "| left_ankle | 0.150 | - |"), (before, "| left_ankle | 0.150 |")):
        file.write_text(json.dumps(numbers | table))
        assert row in _card(run_folder).text.split("### By keypoint")[1]


def test_a_card_promises_nothing_that_was_not_measured(run_folder: Path) -> None:
    facts = card.collect(run_folder, "ssl", step=5)
    assert facts.scores["ssl"]["AP"] == 0.05 and facts.image is None, "step 5's, not those of eval.json"
    assert ["`ssl`", "not recorded"] in [[row[0], row[4]] for row in card._results(facts)], "metrics.jsonl has no area"
    facts = card.collect(run_folder, "ssl", step=7)
    assert "ssl" not in facts.scores and facts.image is None
    file = run_folder / "config.yaml"
    file.write_text(file.read_text().replace("stage: all", "stage: ssl"))
    made = _card(run_folder, step=7)
    assert "These weights were not evaluated." in made.text
    assert not made.data.eval_results and "model-index" not in made.content


def test_settings_that_a_later_run_wrote_over_are_not_reported(run_folder: Path) -> None:
    file = run_folder / "config.yaml"
    file.write_text(file.read_text().replace("stage: all", "stage: ssl"))
    text = _card(run_folder, "phase2").text
    assert "learning rate" not in text and "overwritten the settings of this" in text and "| `phase2` |" in text


def test_the_curve_shows_every_stage(run_folder: Path) -> None:
    lines = card.read_lines(run_folder)
    picture = card.draw_curve(lines, STAGES)
    assert picture is not None
    for stage in STAGES:
        assert (picture == card.STAGE_COLORS[stage]).all(axis=-1).sum() > 50
        alone = card.draw_curve([line for line in lines if line["stage"] == stage], STAGES)
        assert alone is not None and not np.array_equal(alone, picture)
    assert card.draw_curve([{"stage": "ssl", "step": 1, "loss": None}], STAGES) is None
    assert card.draw_curve([{"stage": "ssl", "step": 1, "loss": 0.5}], STAGES) is not None


# ---- Licenses

V1_TERMS, V2_TERMS = ("cc-by-nc-4.0", None), ("other", "sapiens2-license")


@pytest.mark.parametrize(
    ("name", "knobs", "terms", "base"),
    [
        ("sapiens_tiny", {}, ("apache-2.0", None), None),
        ("sapiens_1b", {}, ("apache-2.0", None), None),
        ("sapiens_1b", {"weights": "facebook/sapiens-pretrain-1b"}, V1_TERMS, "facebook/sapiens-pretrain-1b"),
        ("sapiens_1b", {"weights": f"noahcao/sapiens-pose-coco:{DEEP}"}, V1_TERMS, "noahcao/sapiens-pose-coco"),
        ("sapiens_1b", {"weights": "w/sapiens_1b_epoch_173_clean.pth"}, V1_TERMS, "facebook/sapiens-pretrain-1b"),
        ("sapiens_1b", {"weights": "/somewhere/mine.pth"}, V1_TERMS, None),
        ("sapiens_1b", {"stage": "ssl"}, V1_TERMS, None),
        ("sapiens_1b", {"weights": "someone/else"}, V1_TERMS, "someone/else"),
        ("sapiens2_0.4b", {"weights": "facebook/sapiens2-pose-0.4b"}, V2_TERMS, "facebook/sapiens2-pose-0.4b"),
        (
            "sapiens2_0.4b",
            {"weights": "d/sapiens2_0.4b_pretrain.safetensors"},
            V2_TERMS,
            "facebook/sapiens2-pretrain-0.4b",
        ),
        ("sapiens2_0.4b", {"stage": "phase2"}, V2_TERMS, None),
    ],
)
def test_the_license_follows_the_weights(
    server: Server, tmp_path: Path, name: str, knobs: dict[str, str], terms: tuple[str, str | None], base: str | None
) -> None:
    folder = _run_folder(tmp_path / "run", name, **knobs)
    stage = knobs.get("stage", "ssl")
    made = _card(folder, stage)
    made.validate()
    assert (made.data.license, made.data.get("license_name"), made.data.get("base_model")) == (*terms, base)
    assert ("Non-commercial" in made.text) == (terms == V1_TERMS)


def test_the_license_follows_through_runs_and_own_repositories(server: Server, tmp_path: Path) -> None:
    """v1 -> a run -> a second run that starts from it -> the Hub -> a third run: non-commercial all the way."""
    first = _run_folder(tmp_path / "a", "sapiens_1b", weights="facebook/sapiens-pretrain-1b")
    second = _run_folder(tmp_path / "b", "sapiens_1b", weights=str(first / "phase2" / "weights"), stage="ssl")
    found = _card(second).data
    assert (found.license, found.base_model) == ("cc-by-nc-4.0", "facebook/sapiens-pretrain-1b")
    with _uploads(second) as uploads:
        uploads.saved("ssl", last=True)
    path = hub.fetch(REPO)
    for reference in (REPO, path, f"{path}/model.safetensors"):
        third = _card(_run_folder(tmp_path / "c", "sapiens_1b", weights=reference)).data
        assert (third.license, third.base_model) == ("cc-by-nc-4.0", REPO)


def test_another_ones_card_is_no_proof_of_a_license(server: Server, tmp_path: Path) -> None:
    for tags, expected in (("[sapiens_accel]", "apache-2.0"), ("[free]", "cc-by-nc-4.0")):
        text = f"---\nlicense: apache-2.0\ntags: {tags}\n---\n"
        server.add("a/free", {"model.safetensors": b"w", "README.md": text.encode()})
        hub.fetch("a/free")
        folder = _run_folder(tmp_path / "run", "sapiens_1b", weights="a/free")
        assert _card(folder).data.license == expected


def test_a_run_that_started_from_itself_has_no_beginning(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    _run_folder(folder, "sapiens_1b", weights=str(folder / "ssl" / "weights"))
    assert card.collect(folder, "ssl").origin.license is origin.CC_BY_NC


def test_what_a_later_run_began_with_is_not_the_origin_of_earlier_weights(tmp_path: Path) -> None:
    folder = _run_folder(tmp_path / "run", "sapiens_1b", stage="ssl", weights="facebook/sapiens-pretrain-1b")
    assert card.collect(folder, "ssl").origin.base == "facebook/sapiens-pretrain-1b"
    earlier = card.collect(folder, "phase2").origin
    assert (earlier.base, earlier.license) == (None, origin.CC_BY_NC)


@pytest.mark.parametrize("where", ["fetched", "beside", "downloaded", "nowhere"])
def test_sapiens2s_license_goes_along(
    server: Server, tmp_path: Path, where: str, capsys: pytest.CaptureFixture[str]
) -> None:
    base, reference = "facebook/sapiens2-pretrain-0.4b", "facebook/sapiens2-pretrain-0.4b"
    if where in ("fetched", "downloaded"):
        server.add(base, V2)
    if where == "fetched":
        hub.fetch(base)
        server.repos.clear()
        capsys.readouterr()
    if where in ("beside", "nowhere"):
        (tmp_path / "w").mkdir()
        reference = str(tmp_path / "w" / "mine.safetensors")
        Path(reference).write_bytes(b"w")
        # Another project's license may lie there as well.
        (tmp_path / "w" / "LICENSE").write_bytes(SAPIENS2_TERMS if where == "beside" else b"Apache License")
    folder = _run_folder(tmp_path / "run", "sapiens2_0.4b", weights=reference)
    with _uploads(folder) as uploads:
        uploads.saved("ssl", last=True)
    files, said = server.repos[REPO].files, capsys.readouterr().err
    data = ModelCard(files["README.md"].decode()).data
    assert data.license_name == "sapiens2-license"
    if where == "nowhere":
        assert "LICENSE.md" not in files and data.license_link.startswith("https://") and "License is missing" in said
        assert "has to be added" in files["README.md"].decode()
    else:
        assert files["LICENSE.md"] == SAPIENS2_TERMS and data.license_link == "LICENSE.md" and said == ""


# ---- By hand


@pytest.mark.launch
def test_a_run_is_pushed_by_hand(server: Server, run_folder: Path, tmp_path: Path) -> None:
    environment = os.environ | server.environment(tmp_path) | {"OMP_NUM_THREADS": "1"}
    words = ["push", str(run_folder), "--hub_model_id", REPO, "--hub_private"]
    command = [sys.executable, "-m", "sapiens_accel.hub", *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"pushed: {server.url}/{REPO}"
    repo = server.repos[REPO]
    assert repo.private and repo.files["modeling_pose.py"] == b"# 3\n" and "README.md" in repo.files
    assert load_file(run_folder / "ssl" / "weights" / "model.safetensors")["w"][0] == 3
    assert not list(run_folder.glob(".hub*"))


def test_a_space_of_the_page_is_pushed_beside_the_weights(
    server: Server, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Twice, which is the same; its program shows the weights that were pushed."""
    for _ in range(2):
        hub.main(["push", str(run_folder), "--hub_model_id", REPO, "--space"])
        assert capsys.readouterr().out == f"pushed: {server.url}/{REPO}\npushed: {server.url}/spaces/{REPO}\n"
    space = server.repos[f"spaces/{REPO}"]
    assert set(space.files) == {"README.md", "app.py", "requirements.txt"} and not space.private
    front = yaml.safe_load(space.files["README.md"].decode().split("---\n")[1])
    assert front["sdk"] == "gradio" and front["app_file"] == "app.py" and front["models"] == [REPO]
    assert space.files["requirements.txt"].decode() == f"sapiens_accel[app]=={__version__}\n"
    called = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sapiens_accel.app.server.serve", lambda *words, **options: called.append((words, options)))
        patch.setenv("GRADIO_SERVER_PORT", "7999")
        exec(space.files["app.py"].decode(), {})
    assert called == [((REPO,), {"host": "0.0.0.0", "port": 7999})]
    hub.main(["push", str(run_folder), "--hub_model_id", "me/hidden", "--space", "--hub_private"])
    assert server.repos["spaces/me/hidden"].private and "secret HF_TOKEN" in capsys.readouterr().out
    with pytest.raises(UserError, match="--space: shows the weights at the root"):
        hub.main(["push", str(run_folder), "--hub_model_id", REPO, "--space", "--into", "ssl"])


def test_a_push_by_hand_that_fails_is_one_line_and_an_exit_code(
    server: Server, run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server.tokens.clear()
    monkeypatch.setattr(sys, "argv", ["hub.py", "push", str(run_folder), "--hub_model_id", REPO])
    with pytest.raises(SystemExit) as caught:
        run_main(hub.main)
    said = capsys.readouterr()
    assert caught.value.code == 2 and said.out == ""
    assert re.fullmatch(f"hub.py: error: the push to {REPO} failed: .*does not know the token.*\n", said.err)
    assert not list(run_folder.glob(".hub*"))


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["push", "{run}"], ["--hub_model_id ORG/NAME"]),
        (["push", "{run}", "--hub_model_id", "pose"], ["--hub_model_id pose"]),
        (["push", "{run}/phase1", "--hub_model_id", REPO], ["phase1: no config.yaml", "run directory"]),
        (["push", "{run}", "--stage", "phase3", "--hub_model_id", REPO], ["phase3"]),
        (["push"], ["RUN_DIR"]),
        ([], ["push"]),
        (["push", "{run}", "--hub_modelid", REPO], ["--hub_modelid"]),
    ],
)
def test_wrong_words_are_refused_in_one_line(run_folder: Path, words: list[str], named: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        hub.main([word.replace("{run}", str(run_folder)) for word in words])
    assert [word for word in named if word not in str(caught.value)] == [] and "\n" not in str(caught.value)


def test_a_stage_without_weights_is_named(tmp_path: Path) -> None:
    folder = _run_folder(tmp_path / "run", stages=("phase1",))
    with pytest.raises(UserError, match="no ssl/weights"):
        hub.main(["push", str(folder), "--stage", "ssl", "--hub_model_id", REPO])


# ---- Whole runs


@pytest.mark.slow
@pytest.mark.launch
def test_a_run_pushes_while_it_trains_and_another_starts_from_there(tmp_path: Path) -> None:
    """Each save and the end, past a Hub that is down for a moment; the token is in no file and nothing that is said."""
    words = [
        "--data.synthetic.num_train=8", "--data.synthetic.num_unlabelled=8", "--data.synthetic.num_val=2",
        "--data.num_workers=0", "--data.input_hw=[64,48]", "--log_every=1", "--stage=phase2", "--phase2.steps=4",
        "--phase2.global_batch=4",
    ]  # fmt: skip
    pushing = ["--push_to_hub", f"--hub_model_id={REPO}", "--hub_strategy=every_save", "--save_every=2"]
    with serve() as server:
        env = os.environ | server.environment(tmp_path / "home") | {"OMP_NUM_THREADS": "1"}
        env |= {"SAPIENS_ACCEL_CACHE": str(tmp_path / "cache"), "ACCELERATE_MIXED_PRECISION": "no"}
        server.fail("/commit/", status=503)
        said = ""
        for name, more in (("first", pushing), ("second", [f"--weights={REPO}", "--max_steps=1"])):
            done = subprocess.run(
                [sys.executable, "train.py", *words, *more, f"--output_dir={tmp_path / name}"],
                cwd=ROOT, env=env, capture_output=True, text=True, check=False,
            )  # fmt: skip
            assert done.returncode == 0, done.stdout + done.stderr
            said += done.stdout + done.stderr
        repo = server.repos[REPO]
        assert f"pushed: {server.url}/{REPO}" in said
        kept = (tmp_path / "first" / "phase2" / "weights" / "model.safetensors").read_bytes()
        assert repo.files["model.safetensors"] == kept
        assert {"README.md", "config.json", "modeling_sapiens_pose.py", "skeleton.json"} <= repo.files.keys()
        assert repo.messages[-1] == "phase2: final weights"
        assert "hub: warning" not in said, "what a checkpoint holds can be pushed before the stage has ended"
        assert "### By keypoint" in repo.files["README.md"].decode()
        assert "left_ankle" in repo.files["README.md"].decode().split("### By keypoint")[1]
        # The second run began with what was pushed.
        assert "weights from" in said and "re-initialised" not in said.split("weights from")[1].split("steps 1 to")[0]
    assert TOKEN not in said
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or TOKEN.encode() not in file.read_bytes(), file
