"""State on disk: whole or not at all, checked before it is read, pruned but for the best; killed, stopped, full."""

import dataclasses
import json
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forks
import pytest
import torch
from accelerate import Accelerator
from planted import Planted, redescribe
from safetensors.torch import load_file
from torch import nn

from sapiens_accel.config.schema import Config, DataConfig, OptimConfig, SyntheticConfig
from sapiens_accel.data import build
from sapiens_accel.data.dataset import Sets
from sapiens_accel.errors import UserError
from sapiens_accel.models.sapiens import SapiensPose
from sapiens_accel.pose.heatmap import Codec
from sapiens_accel.pose.skeleton import COCO17
from sapiens_accel.training import checkpoint, optim, run_folder
from sapiens_accel.training.objectives import Supervised

ROOT = Path(__file__).parents[2]
STAGE = "phase2"
WORDS = [
    "--data.synthetic.num_train=8", "--data.synthetic.num_unlabelled=8", "--data.synthetic.num_val=2",
    "--data.num_workers=0", "--data.input_hw=[64,48]", "--log_every=1", "--report_to=none", "--save_every=1",
    *(f"--{stage}.{knob}" for stage in ("phase2", "ssl")
      for knob in ("steps=2000", "global_batch=4", "optim.warmup_steps=2", "loss_weight=100")),
]  # fmt: skip


class Run:
    """A tiny network under a real Accelerator, saved by the real functions."""

    def __init__(self, folder: Path, *, eight_bit: bool = False) -> None:
        self.accelerator = Accelerator(cpu=True)
        self.network, self.folder = nn.Linear(64, 64), folder  # of 4096 values on, moments are in 8 bits
        groups = [{"params": [*self.network.parameters()], "lr_scale": 1.0}]
        optimizer = optim.adamw(groups, OptimConfig(lr=0.1), torch.device("cpu"), eight_bit=eight_bit)
        self.engine, self.optimizer = self.accelerator.prepare(self.network, optimizer)
        self.objective = Supervised(codec=Codec(input_hw=(64, 48), heatmap_hw=(16, 12), sigma=1))

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.engine(torch.ones(2, 64)).square().mean().backward()
        self.optimizer.step()

    def save(self, step: int, keep: int = 2) -> Path | None:
        def write(where: Path, results: checkpoint.Weights) -> None:
            (where / "weights").mkdir()
            torch.save(dict(results["weights"]), where / "weights" / "weights.pt")

        saver = checkpoint.Saver(
            accelerator=self.accelerator,
            folder=self.folder / STAGE,
            keep=keep,
            objective=self.objective,
            collect=lambda: {"weights": self.network.state_dict()},
            write=write,
        )
        return checkpoint.save(saver, step)

    def resume(self, asked: str = "latest") -> checkpoint.Resume | None:
        return checkpoint.find_checkpoint(self.accelerator, self.folder, asked, STAGE)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Sets:
    drawn = SyntheticConfig(num_train=8, num_unlabelled=0, num_val=2)
    config = DataConfig(cache_dir=str(tmp_path_factory.mktemp("people")), synthetic=drawn, input_hw=(64, 48))
    return build.open_people(config, COCO17, unlabeled=False)


def _options(folder: Path, **changes: Any) -> Config:
    return dataclasses.replace(Config(output_dir=str(folder)), **changes)


def stages_of(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


def names(run: Run) -> list[str]:
    return sorted(path.name for path in (run.folder / STAGE / "checkpoints").iterdir())


def test_weights_moments_and_random_numbers_come_back(run: Run) -> None:
    run.step()
    assert run.save(7) == run.folder / STAGE / "checkpoints" / "step_7"
    drawn = torch.rand(4)
    for _ in range(3):
        run.step()
    expected = [value.clone() for value in run.network.state_dict().values()]
    for _ in range(2):
        run.step()
    found = run.resume()
    assert found is not None and found.way == "whole" and found.weights is None
    assert found.load(run.accelerator, run.objective) == 7
    assert torch.equal(torch.rand(4), drawn)
    for _ in range(3):
        run.step()
    for value, before in zip(run.network.state_dict().values(), expected, strict=True):
        assert torch.equal(value, before)


def test_a_resumed_optimizer_has_the_settings_that_are_asked_for(run: Run) -> None:
    """Its state dict holds the old ones; the moments alone come from it."""
    run.step()
    run.save(1)
    moments = run.optimizer.state_dict()["state"][0]["exp_avg"].clone()
    asked = {"betas": (0.5, 0.6), "weight_decay": 0.3, "lr": 0.01, "eps": 1e-3}
    run.optimizer.param_groups[0].update(asked)
    run.step()
    found = run.resume()
    assert found and found.load(run.accelerator, run.objective) == 1
    assert torch.equal(run.optimizer.state_dict()["state"][0]["exp_avg"], moments)
    (group,) = run.optimizer.param_groups
    assert {name: group[name] for name in asked} == asked


@pytest.fixture
def eight_bit(tmp_path: Path) -> Run:
    pytest.importorskip("torchao", reason="an extra: pip install sapiens_accel[8bit]")
    return Run(tmp_path, eight_bit=True)


@pytest.mark.slow
def test_moments_of_8_bits_come_back_with_the_settings_that_are_asked_for(eight_bit: Run) -> None:
    """To the bit, in the middle of a stage; then with other settings, as a new optimizer with those moments steps."""
    run = eight_bit
    for _ in range(2):
        run.step()
    assert run.save(2)
    moments = run.optimizer.state_dict()["state"][0]
    assert moments["exp_avg"].codes.dtype == moments["exp_avg_sq"].codes.dtype == torch.uint8
    before = [moments[name].dequantize().clone() for name in ("exp_avg", "exp_avg_sq")]
    for rate in (0.05, 0.02):
        optim.set_lr(run.optimizer, rate)
        run.step()
    expected = [value.clone() for value in run.network.state_dict().values()]
    run.step()
    found = run.resume()
    assert found and found.load(run.accelerator, run.objective) == 2
    state = run.optimizer.state_dict()["state"][0]
    for name, value in zip(("exp_avg", "exp_avg_sq"), before, strict=True):
        assert torch.equal(state[name].dequantize(), value)
    for rate in (0.05, 0.02):
        optim.set_lr(run.optimizer, rate)
        run.step()
    for value, whole in zip(run.network.state_dict().values(), expected, strict=True):
        assert torch.equal(value, whole)
    # AdamW by its formula from the saved moments, with the betas and the weight decay that are asked for now.
    (group,) = run.optimizer.param_groups
    group.update(betas=(0.5, 0.6), weight_decay=0.3)
    assert run.resume() and found.load(run.accelerator, run.objective) == 2
    (group,) = run.optimizer.param_groups
    assert group["betas"] == (0.5, 0.6) and group["weight_decay"] == 0.3 and isinstance(group["lr"], torch.Tensor)
    weight = run.network.weight.detach().clone()
    optim.set_lr(run.optimizer, 0.04)
    run.step()
    assert run.network.weight.grad is not None
    grad, step = run.network.weight.grad, 3
    mean = before[0] * 0.5 + grad * 0.5
    square = before[1] * 0.6 + grad.square() * 0.4
    change = (mean / (1 - 0.5**step)) / ((square / (1 - 0.6**step)).sqrt() + 1e-8)
    torch.testing.assert_close(run.network.weight.detach(), weight * (1 - 0.04 * 0.3) - 0.04 * change)


@pytest.mark.slow
def test_weights_of_bf16_with_moments_of_8_bits_move_as_fp32_ones_do_on_average() -> None:
    """5 steps of a constant gradient, each change far less than half the distance of two bf16 numbers."""
    pytest.importorskip("torchao", reason="an extra: pip install sapiens_accel[8bit]")
    step, rate, num = 2.0**-7, 2.0**-12, 2**16  # of bf16 numbers from 1 on; of AdamW's steps; of weights
    found = {}
    for stochastic in (True, False):
        weight = nn.Parameter(torch.ones(256, num // 256, dtype=torch.bfloat16))
        groups = [{"params": [weight], "lr_scale": 1.0, "weight_decay": 0.0}]
        config = OptimConfig(lr=rate)
        optimizer = optim.adamw(groups, config, torch.device("cpu"), eight_bit=True, stochastic=stochastic)
        torch.manual_seed(0)
        for _ in range(5):
            weight.grad = torch.full_like(weight, -0.01)
            optimizer.step()
        assert weight.dtype == optimizer.state[weight]["exp_avg"].dtype == torch.bfloat16
        found[stochastic] = weight.detach().float()
    assert (found[False] == 1).all()  # to the nearest, every change is lost
    moved = (found[True] - 1) / step
    assert set(moved.unique().tolist()) <= {0.0, 1.0, 2.0, 3.0}
    expected = 5 * rate / step
    standard_error = (expected * (1 - rate / step) / num) ** 0.5
    assert abs(moved.mean() - expected) < 4 * standard_error + 0.01 * expected  # moments of 8 bits: within 1 %


@pytest.mark.slow
def test_a_network_of_bf16_with_moments_of_8_bits_learns_as_in_fp32() -> None:
    """60 steps; rounded to the nearest its loss is 0.0014 higher, stochastically it differs by 0.0001."""
    pytest.importorskip("torchao", reason="an extra: pip install sapiens_accel[8bit]")
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (8, 3, 64, 48), generator=generator, dtype=torch.uint8)
    target = torch.rand(8, 17, 16, 12, generator=generator)
    config, losses = OptimConfig(lr=2e-4, layer_decay=1.0), {}
    for kind in ("fp32", "stochastic", "nearest"):
        torch.manual_seed(0)
        model, exact, stochastic = (
            SapiensPose("sapiens_tiny", 17, (64, 48)).train(),
            kind == "fp32",
            kind == "stochastic",
        )
        if not exact:
            optim.keep_in_bf16(optim.list_matrices(model.layer_groups()))
        groups = optim.param_groups(model.layer_groups(), config)
        options = {"eight_bit": not exact, "stochastic": stochastic}
        optimizer = optim.adamw(groups, config, torch.device("cpu"), **options)
        for step in range(60):
            torch.manual_seed(step)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                maps = model(image)
                assert isinstance(maps, torch.Tensor)
                loss = (maps.float() - target).square().mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        losses[kind] = loss.item()
    assert abs(losses["stochastic"] - losses["fp32"]) < 0.3 * abs(losses["nearest"] - losses["fp32"])


@pytest.mark.parametrize("file", ["optimizer.bin", "random_states_0.pkl"])
def test_a_planted_pickle_is_not_executed(run: Run, tmp_path: Path, file: str) -> None:
    saved, trace = run.save(1), tmp_path / "trace"
    assert saved
    torch.save({"state": Planted(trace)}, saved / "state" / file)
    redescribe(saved)
    found = run.resume()
    assert found
    with pytest.raises(UserError, match=rf"{file}: .*mkdir.*--trust_checkpoint"):
        found.load(run.accelerator, run.objective)
    assert not trace.exists()
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


@pytest.mark.parametrize("states", [{}, {"random_state": (3, (1, 2), None)}], ids=["none", "damaged"])
def test_random_states_that_cannot_be_restored_are_refused(run: Run, states: dict) -> None:
    """Accelerate trains on without a word."""
    saved = run.save(1)
    assert saved
    torch.save(states, saved / "state" / "random_states_0.pkl")
    redescribe(saved)
    found = run.resume()
    assert found
    with pytest.raises(
        UserError, match=r"random_states_0\.pkl: random states cannot be restored .*--resume_from_checkp"
    ):
        found.load(run.accelerator, run.objective)


def test_the_last_ones_and_the_best_are_kept(run: Run) -> None:
    folder = run.folder / STAGE
    for step, ap in ((1, 0.2), (2, 0.5), (3, None), (4, 0.3), (5, 0.5)):
        run.save(step)
        if ap is not None:
            assert checkpoint.record_score(folder, step, ap) == (step in (1, 2, 5))
        assert (folder / "checkpoints" / "latest").resolve().name == f"step_{step}"
        if step == 4:
            assert names(run) == ["best", "latest", "step_2", "step_3", "step_4"]
            assert (folder / "checkpoints" / "best").resolve().name == "step_2"
    run.save(6)
    run.save(7)
    assert names(run) == ["best", "latest", "step_5", "step_6", "step_7"]
    assert (folder / "checkpoints" / "best").resolve().name == "step_5"
    assert not checkpoint.record_score(folder, 99, 1.0), "a step that was not saved is no checkpoint"


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("file", ["state/model.safetensors", "state/optimizer.bin", "objective.safetensors"])
@pytest.mark.parametrize("damage", [_truncate, _flip_a_bit, Path.unlink])
def test_a_damaged_one_is_named_and_the_one_before_it_is_taken(run: Run, damage, file, capsys) -> None:
    for step in (3, 4):
        run.save(step)
    damage(run.folder / STAGE / "checkpoints" / "step_4" / file)
    with pytest.raises(UserError, match=rf"step_4: {file} .*Use another one") as raised:
        run.resume(str(run.folder / STAGE / "checkpoints" / "step_4"))
    assert "\n" not in str(raised.value)
    found = run.resume()
    assert found is not None and found.position.step == 3
    said = capsys.readouterr().out
    assert "step_4 is incomplete" in said and file in said
    assert "step_4.corrupt" in names(run)
    assert run.save(4), "the step can be written again"


@pytest.mark.parametrize("file", ["state/model.safetensors", "position.json"])
def test_one_that_cannot_be_read_is_not_taken_for_a_damaged_one(run: Run, file: str) -> None:
    """A file server that is away, or another user's file; links that lead to themselves cannot be read by root either.

    It was set aside, and training went on from the one before it.
    """
    for step in (3, 4):
        run.save(step)
    path = run.folder / STAGE / "checkpoints" / "step_4" / file
    path.unlink()
    path.symlink_to(path.name)
    with pytest.raises(UserError, match=rf"step_4/{file}: cannot be read .*--resume_from_checkpoint"):
        run.resume()
    assert names(run) == ["latest", "step_3", "step_4"]


def test_a_dry_run_renames_no_damaged_checkpoint(run: Run, capsys) -> None:
    for step in (3, 4):
        run.save(step)
    _truncate(run.folder / STAGE / "checkpoints" / "step_4" / "objective.safetensors")
    found = checkpoint.find_checkpoint(run.accelerator, run.folder, "latest", STAGE, dry_run=True)
    assert found and found.position.step == 3 and "step_4 is incomplete" in capsys.readouterr().out
    assert names(run) == ["latest", "step_3", "step_4"]


@pytest.mark.parametrize(
    ("old", "new"),
    [('"step": 4', '"step": 5'), ('"precision": "no"', '"precision": "n0"'), ('"stage": "phase2"', '"stage": "ssl"'),
     ("objective.safetensors", "objective.safetensorz"), ('"checksum": "', '"checksum": "0')],
)  # fmt: skip
def test_a_changed_description_is_named(run: Run, old: str, new: str) -> None:
    saved = run.save(4)
    assert saved
    file = saved / "position.json"
    assert file.read_text().count(old) == 1
    file.write_text(file.read_text().replace(old, new))
    with pytest.raises(UserError, match=r"step_4/position\.json: has changed"):
        checkpoint.read_position(saved)


@pytest.mark.parametrize(
    "change",
    [{"step": "4"}, {"step": -1}, {"stage": "../x"}, {"files": {"../../x": [1, 2]}}, {"files": {"x": ["1", 2]}},
     {"files": [1]}, {"files": {"x": [1]}}, {"num_processes": 1.5}],
)  # fmt: skip
def test_a_description_of_version_0_1_is_checked_by_its_types(run: Run, change: dict) -> None:
    saved = run.save(4)
    assert saved
    tree = json.loads((saved / "position.json").read_text())
    del tree["checksum"]
    (saved / "position.json").write_text(json.dumps(tree))
    assert checkpoint.read_position(saved).step == 4
    (saved / "position.json").write_text(json.dumps(tree | change))
    with pytest.raises(UserError, match=r"not the description of a checkpoint"):
        checkpoint.read_position(saved)


class Clock:
    now = 0.0

    def monotonic(self) -> float:
        return self.now


def test_a_checkpoint_is_due_by_epochs_and_by_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """One step takes a minute, a save as many seconds as are given; epochs of 100 and of 2.5 steps."""

    def saves(epoch: float, last: int, cost: float, every: int | None = None, refused: int = 0) -> list[int]:
        clock, saved = Clock(), []

        def write(step: int) -> Path | None:
            if step == refused:  # at once, as for want of room
                return None
            clock.now += cost
            return Path("step")

        monkeypatch.setattr(checkpoint, "time", clock)
        schedule = checkpoint.SaveSchedule(every=every, epoch=epoch, last=last, since=0.0)
        for step in range(1, last + 1):
            clock.now += 60
            if schedule.is_due(step):
                saved.append(step)
                schedule.measure(step, lambda now=step: write(now))
        return saved

    assert saves(epoch=100, last=130, cost=1) == [30, 60, 90, 100, 130], "half an hour, an epoch, the end"
    assert saves(epoch=2.5, last=10, cost=1) == [3, 5, 8, 10], "the steps that end an epoch of 2.5"
    # A save of a minute: 20 minutes at least from one to the next.
    assert saves(epoch=2.5, last=60, cost=60) == [3, 23, 43, 60], "the last step whatever it costs"
    assert saves(epoch=2.5, last=60, cost=60, refused=23) == [3, 23, 43, 60], "one that is refused is not free"
    assert saves(epoch=1000, last=201, cost=240) == [30, 110, 190, 201], "of four minutes: 80 minutes at least"
    assert saves(epoch=2.5, last=60, cost=60, every=25) == [25, 50]


@pytest.mark.parametrize("text", ["", "{", '{"step": 4}'])
def test_a_checkpoint_without_its_description_is_passed_over(run: Run, text: str) -> None:
    for step in (3, 4):
        run.save(step)
    (run.folder / STAGE / "checkpoints" / "step_4" / "position.json").write_text(text)
    found = run.resume()
    assert found is not None and found.position.step == 3


def test_a_disk_that_fills_up_leaves_the_one_before_it(run: Run, capsys) -> None:
    """No file may grow beyond 8 kB: what the kernel does when a quota or a disk is full in the middle of a file."""
    run.save(1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        assert run.save(2) is None
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    said = capsys.readouterr().out
    assert "step 2 could not be saved" in said and "step_1 is complete; training continues" in said
    assert names(run) == ["latest", "step_1"]
    found = run.resume()
    assert found is not None and found.position.step == 1
    assert run.save(3), "when there is room again, it goes on saving"


def test_what_does_not_fit_is_not_begun(run: Run, capsys) -> None:
    first = run.save(1)
    assert first
    tree = json.loads((first / "position.json").read_text())
    tree["files"]["state/optimizer.bin"][0] = 10**18
    del tree["checksum"]
    (first / "position.json").write_text(json.dumps(tree))
    assert run.save(2) is None
    assert "too little space in " in capsys.readouterr().out


def test_a_disk_with_room_for_two_is_saved_to_for_ever(run: Run, monkeypatch, capsys) -> None:
    """The next one is written beside those that are kept: with two kept, and no room for a third, no more were."""
    first = run.save(1)
    assert first
    assert "phase2: a checkpoint takes 0.00 GiB; the last 2 and the best are kept" in capsys.readouterr().out
    size = sum(size for size, _ in checkpoint.read_position(first).files.values())

    def disk_usage(folder: Path) -> Any:
        used = sum(path.stat().st_size for path in folder.glob("step_*/**/*") if path.is_file())
        return shutil._ntuple_diskusage(0, used, int(2.6 * size) - used)  # pyright: ignore[reportAttributeAccessIssue]

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    for step in (2, 3, 4):
        assert run.save(step)
    assert names(run) == ["latest", "step_3", "step_4"]
    # The only ones that are whole are not deleted for one that is still to be written.
    _truncate(run.folder / STAGE / "checkpoints" / "step_4" / "objective.safetensors")
    assert run.save(5) is None
    assert names(run) == ["latest", "step_3", "step_4"]


@pytest.mark.parametrize("text", ["{}", '{"AP": null}', '{"AP": "x"}', "[", "[1]"])
def test_a_damaged_score_is_none(run: Run, text: str) -> None:
    for step in (1, 2):
        run.save(step)
        checkpoint.record_score(run.folder / STAGE, step, 0.5)
    (run.folder / STAGE / "checkpoints" / "step_2" / "score.json").write_text(text)
    assert checkpoint.find_best(run.folder / STAGE / "checkpoints") == run.folder / STAGE / "checkpoints" / "step_1"


def test_what_a_killed_run_left_unfinished_is_no_checkpoint(run: Run) -> None:
    whole = run.save(1)
    assert whole
    shutil.copytree(whole, whole.with_name("step_2.tmp"))
    found = run.resume()
    assert found is not None and found.position.step == 1
    run.save(3)
    assert names(run) == ["latest", "step_1", "step_3"]


def test_a_kill_between_link_and_name_does_no_harm(run: Run) -> None:
    whole = run.save(1)
    assert whole
    whole.with_name("latest.tmp").symlink_to("step_1")
    whole.with_name("best.tmp").symlink_to("step_0")
    assert run.save(2) and names(run) == ["latest", "step_1", "step_2"]


def test_a_torn_note_is_no_note(run: Run) -> None:
    for step in (1, 2):
        run.save(step)
        checkpoint.record_score(run.folder / STAGE, step, 0.1)
    (run.folder / STAGE / "checkpoints" / "step_2" / "score.json").write_text("")
    assert run.save(3)
    found = checkpoint.find_best(run.folder / STAGE / "checkpoints")
    assert found is not None and found.name == "step_1"
    (run.folder / STAGE / "eval.json").write_text('{"step": 1')
    (run.folder / STAGE / "weights").mkdir()
    (run.folder / STAGE / "weights" / "model.safetensors").touch()
    assert run_folder.read_finished(run.folder, {STAGE: 1}, "latest") == {}


def test_what_an_unfinished_stage_comes_before_is_trained_anew(run: Run, sets: Sets) -> None:
    """phase1 is to be longer than it was: what phase2 and ssl made of it then is not what they would make now."""
    lasts = {"phase1": 4, "phase2": 4, "ssl": 4}
    for stage, step in (("phase1", 2), ("phase2", 4), ("ssl", 4)):
        (run.folder / stage / "weights").mkdir(parents=True)
        (run.folder / stage / "weights" / "model.safetensors").touch()
        (run.folder / stage / "eval.json").write_text(json.dumps({"step": step, "AP": 0.5}))
    done = run_folder.read_finished(run.folder, lasts, "latest")
    assert done == {}
    (run.folder / "phase1" / "checkpoints" / "step_2").mkdir(parents=True)
    plan = run_folder._plan(_options(run.folder, stage="all", resume_from_checkpoint="latest"), sets, list(done))
    assert plan.resumed == "phase1" and not plan.replaces
    plan.begin(run.accelerator, sets, 2)
    assert stages_of(run.folder) == ["phase1", "phase2.1", "ssl.1"]
    (run.folder / "phase1" / "eval.json").write_text(json.dumps({"step": 4, "AP": 0.5}))
    assert list(run_folder.read_finished(run.folder, lasts, "latest")) == ["phase1"]


def test_going_on_from_an_earlier_one_sets_aside_what_came_after_it(run: Run, sets: Sets) -> None:
    for step in (2, 4, 6):
        run.save(step, keep=9)
    stage = run.folder / STAGE
    (stage / "eval.json").write_text("{}")
    (run.folder / "ssl").mkdir()
    (run.folder / "phase1").mkdir()
    asked = str(stage / "checkpoints" / "step_2")
    finished = _options(run.folder, stage="all", resume_from_checkpoint="latest")
    run_folder._plan(finished, sets, ["phase1", STAGE, "ssl"])
    assert (run.folder / "ssl").is_dir() and names(run) == ["latest", "step_2", "step_4", "step_6"]
    plan = run_folder._plan(_options(run.folder, stage="all", resume_from_checkpoint=asked), sets, ["phase1"])
    plan.begin(run.accelerator, sets, 2)
    assert names(run) == ["step_2", "step_4.1", "step_6.1"]
    assert stages_of(run.folder) == ["phase1", STAGE, "ssl.1"]
    assert not (stage / "eval.json").exists(), "it must not look finished"
    found = run.resume()
    assert found is not None and found.position.step == 2
    run.step()
    assert run.save(4), "the same step of the new history"
    assert checkpoint.find_best(stage / "checkpoints") is None


@pytest.mark.parametrize(
    ("then", "now", "way"),
    [
        ((1, 0, "no"), (1, 0, "no"), "whole"),
        ((2, 0, "no"), (1, 0, "no"), "whole"),
        ((2, 2, "no"), (1, 2, "no"), "universal"),
        ((1, 1, "bf16"), (4, 1, "bf16"), "universal"),
        ((2, 3, "no"), (1, 3, "no"), "weights"),
        ((1, 0, "no"), (1, 2, "no"), "weights"),
        ((2, 2, "no"), (2, 3, "no"), "weights"),
        ((2, 2, "bf16"), (2, 2, "no"), "weights"),
    ],
)
def test_what_another_launch_can_read(then, now, way) -> None:
    keys = ("num_processes", "zero_stage", "precision")
    position = checkpoint.Position(stage=STAGE, step=1, files={}, **dict(zip(keys, then, strict=True)))
    assert checkpoint._way(position, dict(zip(keys, now, strict=True))) == way


# ---- Whole runs


def _environment(cache: Path) -> dict[str, str]:
    return {**os.environ, "SAPIENS_ACCEL_CACHE": str(cache), "OMP_NUM_THREADS": "1", "ACCELERATE_MIXED_PRECISION": "no"}


def _losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.slow
@pytest.mark.launch
def test_killed_at_random_moments(tmp_path: Path) -> None:
    """SIGKILL, during saves too: `latest` always loads, and the losses are those of a run that was never killed."""
    kills = os.environ.get("SAPIENS_ACCEL_TEST_KILLS", "6")
    words = [*WORDS, "--stage=ssl", "--weights=random", "--keep_checkpoints=1", "--ssl.teacher.on_alarm=warn"]
    folder = tmp_path / "killed"
    program = ["tests/killed.py", kills, "0", folder, *words, f"--output_dir={folder}"]
    done = forks.run(program, env=_environment(tmp_path))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    moments = done.stdout.splitlines()[-int(kills) :]
    assert all(moment.startswith("after step ") for moment in moments)
    print(*moments, sep="\n")
    assert "is incomplete" not in done.stdout
    assert done.stdout.count("resumes from") == int(kills) - 1
    found = _losses(folder)
    whole = tmp_path / "whole"
    again = [*words, f"--output_dir={whole}", f"--max_steps={len(found)}"]
    assert forks.run(["train.py", *again], env=_environment(tmp_path)).returncode == 0
    assert len(found) >= int(kills) and found == _losses(whole)


@pytest.mark.launch
@pytest.mark.parametrize("name", ["SIGTERM", pytest.param("SIGINT", marks=pytest.mark.slow)])
def test_the_command_that_a_signal_leaves_resumes_the_run(name: str, tmp_path: Path) -> None:
    """Sent to the whole process group, as Ctrl-C and batch systems do, with loading processes in it."""
    words = [word for word in WORDS if word not in ("--data.num_workers=0", "--save_every=1")]
    words += ["--stage=phase2", "--save_every=100000", "--data.num_workers=2", f"--output_dir={tmp_path}/run"]
    process = forks.Fork(["train.py", *words], ROOT, _environment(tmp_path))
    metrics, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 200
    while process.poll() is None and not (metrics.is_file() and metrics.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(getattr(signal, name))
    said = "".join(process.communicate(timeout=200))
    assert process.returncode == 128 + getattr(signal, name), said
    assert f"{name}: stopping after this step" in said and "Traceback" not in said
    assert "--resume_from_checkpoint latest" in said
    (whole,) = checkpoint.list_checkpoints(tmp_path / "run" / "phase2" / "checkpoints")
    step = checkpoint.read_position(whole).step
    assert len(_losses(tmp_path / "run")) == step, "the last whole step is what was saved"
    assert checkpoint._broken(whole) is None
    # The command that was printed is taken at its word.
    python, *again = shlex.split(said.split("; continue with: ")[1].splitlines()[0])
    assert python == "python"
    done = forks.run([*again, f"--max_steps={step + 2}"], env=_environment(tmp_path))
    assert done.returncode == 0, done.stderr
    assert len(_losses(tmp_path / "run")) == step + 2


@pytest.mark.slow
@pytest.mark.launch
def test_a_run_on_a_full_disk_trains_on_and_says_what_is_missing(tmp_path: Path) -> None:
    """Files may not grow beyond 8 kB: no checkpoint, few lines; without room for the end's weights it is one line."""
    words = [*WORDS, "--stage=phase2", f"--output_dir={tmp_path}/run", "--max_steps=40", "--eval_every=100"]
    assert forks.run(["train.py", *words, "--dry_run"], env=_environment(tmp_path)).returncode == 0
    runner = (
        "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (8192, resource.RLIM_INFINITY));"
        "sys.argv[0] = 'train.py'; runpy.run_path('train.py', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", runner, *words],
        cwd=ROOT, env=_environment(tmp_path), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert "step 1 could not be saved" in done.stdout and "step 40 could not be saved" in done.stdout
    assert "log lines or images are lost, training continues" in done.stdout + done.stderr
    assert done.stderr.splitlines()[-1].startswith("train.py: error: ") and "Make room" in done.stderr


@pytest.mark.slow
@pytest.mark.launch
def test_a_second_signal_stops_at_once(tmp_path: Path) -> None:
    """While the step is held up (here: by an image that never comes), the second one, a while later, is not noted."""
    script = (
        "import os, signal, time\n"
        "from sapiens_accel.runtime.signals import ECHO_SECONDS, StopRequest\n"
        "with StopRequest() as stop:\n"
        "    os.kill(os.getpid(), signal.SIGTERM); os.kill(os.getpid(), signal.SIGINT)\n"
        "    assert stop.number == signal.SIGTERM, stop.number\n"
        "    time.sleep(ECHO_SECONDS + 0.1)\n"
        "    print('still here', flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    time.sleep(60)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGTERM and done.stdout == "still here\n", done.stderr


@pytest.mark.launch
def test_weights_in_a_checkpoint_start_another_run(tmp_path: Path) -> None:
    words = [*WORDS, "--stage=phase2"]
    for more in (
        [f"--output_dir={tmp_path}/one", "--max_steps=2"],
        [f"--output_dir={tmp_path}/two", "--max_steps=1", f"--weights={tmp_path}/one/phase2/checkpoints/latest/weights",
         "--weights_dtype=bfloat16"],
    ):  # fmt: skip
        done = forks.run(["train.py", *words, *more], env=_environment(tmp_path))
        assert done.returncode == 0, done.stderr
    saved = load_file(tmp_path / "one" / "phase2" / "checkpoints" / "step_2" / "weights" / "model.safetensors")
    kept = load_file(tmp_path / "one" / "phase2" / "weights" / "model.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in kept.items())
    rounded = load_file(tmp_path / "two" / "phase2" / "weights" / "model.safetensors")
    assert {value.dtype for value in rounded.values()} == {torch.bfloat16}


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["phase2", "ssl"])
def test_a_run_of_bf16_weights_with_moments_of_8_bits_resumes_with_the_same_bits(
    stage: str, train_here: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its random rounding too; a run without bf16 weights is another."""
    pytest.importorskip("torchao", reason="an extra: pip install sapiens_accel[8bit]")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    words = [
        "--data.synthetic.num_train=12", "--data.synthetic.num_unlabelled=8", "--data.synthetic.num_val=4",
        "--data.num_workers=0", "--data.input_hw=[64,48]", "--report_to=none", "--eval.num_pictures=0",
        "--eval.num_worst=0", "--save_every=2", "--keep_checkpoints=3", "--weights=random", f"--stage={stage}",
        f"--{stage}.steps=4", f"--{stage}.global_batch=4", "--ssl.teacher.threshold=-1", "--ssl.hand_over=last",
        "--ssl.teacher.on_alarm=warn", "--memory.adam_8bit=true",
    ]  # fmt: skip
    bf16 = "--memory.bf16_weights=true"
    train_here(words, tmp_path / "whole", bf16)
    asked = tmp_path / "whole" / stage / "checkpoints" / "step_2"
    train_here(words, tmp_path / "resumed", bf16, f"--resume_from_checkpoint={asked}")
    train_here(words, tmp_path / "fp32")
    whole, resumed, fp32 = (
        load_file(tmp_path / run / stage / "weights" / "model.safetensors") for run in ("whole", "resumed", "fp32")
    )
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    assert any(not torch.equal(value, fp32[name]) for name, value in whole.items())
    with pytest.raises(UserError, match=r"memory\.bf16_weights was True, is False"):
        train_here(words, tmp_path / "other", f"--resume_from_checkpoint={asked}")
