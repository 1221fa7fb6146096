"""Whole runs with adapters: what learns, what is written, resumed and merged; phase1 is what it was without them."""

import importlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from sapiens_accel.errors import UserError
from sapiens_accel.models import adapters
from sapiens_accel.models.modeling_sapiens_pose import SapiensForPoseEstimation
from sapiens_accel.training.ema import MovingAverage
from sapiens_accel.training.stage import TrainingStage

pytestmark = pytest.mark.slow
Main = Callable[..., None]
STEPS = 6
WORDS = [
    "--data.synthetic.num_train=16", "--data.synthetic.num_unlabelled=8", "--data.synthetic.num_val=4",
    "--data.num_workers=0", "--data.input_hw=[64,48]", "--log_every=1", "--report_to=none", "--eval.num_pictures=0",
    "--eval.num_worst=0", "--save_every=3", "--keep_checkpoints=3", "--memory.micro_batch=4",
    *(f"--{stage}.{knob}" for stage in ("phase1", "phase2", "ssl")
      for knob in (f"steps={STEPS}", "global_batch=8", "optim.warmup_steps=2", "loss_weight=100")),
    "--ssl.teacher.threshold=0.1", "--ssl.hand_over=last", "--ssl.teacher.on_alarm=warn",
]  # fmt: skip
RANK = ["--lora.rank=4", "--lora.dropout=0.1"]


@pytest.fixture(scope="module")
def stages() -> dict[str, TrainingStage]:
    """The stages of the fixture `run`, as their last step left them."""
    return {}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, train_here: Main, stages: dict[str, TrainingStage]) -> Path:
    """All three stages with adapters."""
    folder, train = tmp_path_factory.mktemp("lora") / "run", importlib.import_module("sapiens_accel.train")
    build = train.build_stage

    def keep(context, given):
        stages[context.name] = build(context, given)
        if teacher := getattr(stages[context.name].objective, "average", None):
            shared = {name: p.data_ptr() for name, p in stages[context.name].model.named_parameters()}
            _check_sharing(teacher, shared)
        return stages[context.name]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "build_stage", keep)
        train_here([*WORDS, *RANK], folder)
    return folder


def _check_sharing(teacher: MovingAverage, student: dict[str, int]) -> None:
    """The teacher's base is the student's own; what is averaged is not."""
    for name, parameter in teacher.network.named_parameters():
        learns = adapters.is_adapter(name) or "norm" in name or name.startswith("head.")
        assert (parameter.data_ptr() == student[name]) != learns, name


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def test_phase1_is_the_same_with_and_without_adapters(run: Path, train_here: Main, tmp_path: Path) -> None:
    train_here([*WORDS, "--stage=phase1"], tmp_path / "plain")
    with_rank, without = (tensors(folder / "phase1" / "weights") for folder in (run, tmp_path / "plain"))
    assert all(torch.equal(value, with_rank[key]) for key, value in without.items())
    assert not (run / "phase1" / "base").exists() and not (run / "phase1" / "weights" / "adapter").exists()


@pytest.mark.parametrize(("stage", "before"), [("phase2", "phase1"), ("ssl", "phase2")])
def test_the_base_is_what_the_stage_began_with_and_no_step_changes_it(
    run: Path, stages: dict[str, TrainingStage], stage: str, before: str
) -> None:
    base, started, final = (tensors(run / path) for path in (f"{stage}/base", f"{before}/weights", f"{stage}/weights"))
    assert all(torch.equal(value, started[key]) for key, value in base.items())
    model, count = stages[stage].model, 0
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert torch.equal(parameter, base[name.replace(".base_layer", "")]), name
            count += 1
        elif not adapters.is_adapter(name):
            assert not torch.equal(parameter, base[name]), name
    assert count > 40
    # In the exported weights matrices and norms have moved; biases, positions and patches have not.
    moved = {key for key, value in base.items() if not torch.equal(value, final[key])}
    frozen = ("position", "patch", "query.bias", "key.bias", "value.bias", "dense.bias", "fc1.bias", "fc2.bias")
    assert moved == {key for key in base if not any(word in key for word in frozen)}


@pytest.mark.parametrize("stage", ["phase2", "ssl"])
def test_exported_weights_are_the_base_and_the_adapter_folder_in_peft(run: Path, stage: str) -> None:
    base = SapiensForPoseEstimation.from_pretrained(run / stage / "base")
    merged = SapiensForPoseEstimation.from_pretrained(run / stage / "weights").eval()
    read = PeftModel.from_pretrained(base, str(run / stage / "weights" / "adapter")).eval()
    pixels = torch.randn(2, 3, 64, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = read(pixels).heatmaps
        assert (merged(pixels).heatmaps - expected).abs().max() < 1e-5 * expected.abs().max()
    config = json.loads((run / stage / "weights" / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == 4 and config["base_model_name_or_path"] is None


def test_checkpoints_hold_what_learns_alone(run: Path, stages: dict[str, TrainingStage]) -> None:
    names = set(adapters.list_learning(stages["ssl"].model))
    folder = run / "ssl" / "checkpoints" / "step_3"
    assert set(load_file(folder / "state" / "model.safetensors")) == names
    averaged = {n.removeprefix("teacher.") for n in load_file(folder / "objective.safetensors") if n.startswith("t")}
    assert averaged == names
    assert (folder / "student" / "adapter").is_dir() and (folder / "weights" / "adapter").is_dir()


def assert_same_files(stage: Path, expected: Path) -> None:
    """Weights, adapters and base of two stages, bit by bit."""
    for part in ("weights", "weights/adapter", "base"):
        file = next((expected / part).glob("*.safetensors")).name
        found, wanted = (load_file(folder / part / file) for folder in (stage, expected))
        assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted), part


@pytest.mark.parametrize("stage", ["phase2", "ssl"])
def test_a_stage_that_is_resumed_ends_with_the_same_bits(
    run: Path, train_here: Main, tmp_path: Path, stage: str
) -> None:
    """In another run directory, whose base is linked to that of the checkpoint's; dropout is drawn again."""
    asked = run / stage / "checkpoints" / "step_3"
    train_here([*WORDS, *RANK, f"--stage={stage}"], tmp_path / "run", f"--resume_from_checkpoint={asked}")
    assert_same_files(tmp_path / "run" / stage, run / stage)
    losses = [_losses(folder, stage)[-3:] for folder in (tmp_path / "run", run)]
    assert losses[0] == losses[1]


def _losses(folder: Path, stage: str) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["stage"] == stage and "loss" in line]


def test_in_16_bits_the_base_is_16_bits_on_the_device_and_fp32_on_disk(
    run: Path, train_here: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stages: dict[str, TrainingStage]
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    start, train = f"--weights={run / 'phase2' / 'weights'}", importlib.import_module("sapiens_accel.train")
    built: list[TrainingStage] = []
    build = train.build_stage
    monkeypatch.setattr(train, "build_stage", lambda *words: built.append(build(*words)) or built[0])
    train_here([*WORDS, *RANK, "--stage=ssl", start], tmp_path / "run")
    (stage,) = built
    teacher = getattr(stage.objective, "average", None)
    assert isinstance(teacher, MovingAverage)
    for network in (stage.model, teacher.network):
        for name, parameter in network.named_parameters():
            is_matrix = ".layer." in name and not (adapters.is_adapter(name) or "norm" in name)
            assert parameter.dtype == (torch.bfloat16 if is_matrix else torch.float32), name
    _check_sharing(teacher, {name: p.data_ptr() for name, p in stage.model.named_parameters()})
    base, before = (tensors(folder) for folder in (tmp_path / "run" / "ssl" / "base", run / "phase2" / "weights"))
    assert all(torch.equal(value, before[key]) for key, value in base.items())
    assert _losses(tmp_path / "run", "ssl") == pytest.approx(_losses(run, "ssl"), rel=0.05)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--lora.rank=8"], "lora.rank was 4, is 8"),
        (["--lora.rank=4", "--lora.target=attention"], "lora.target was all, is attention"),
        ([], "lora.rank was 4, is null"),
    ],
)
def test_a_resume_with_other_adapters_is_refused_before_anything_is_written(
    run: Path, train_here: Main, words: list[str], said: str
) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    with pytest.raises(UserError, match=said) as error:
        train_here([*WORDS, *words, "--stage=ssl", "--ssl.steps=9"], run, "--resume_from_checkpoint=latest")
    assert "\n" not in str(error.value)
    after = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert {path for path in after if after[path] != before.get(path)} <= {run, run / ".lock"}


def test_options_without_a_rank_are_refused(train_here: Main, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--lora\.alpha 32.*no adapters \(expected --lora\.rank"):
        train_here([*WORDS, "--lora.alpha=32"], tmp_path / "run")


# ---- A base in 4 bits

NF4 = [*RANK, "--model.base_dtype=nf4"]


@pytest.fixture(scope="module")
def rounded(tmp_path_factory: pytest.TempPathFactory, train_here: Main, run: Path) -> Path:
    """phase2 and ssl on a base in nf4, from the head of `run`."""
    pytest.importorskip("bitsandbytes")
    folder = tmp_path_factory.mktemp("nf4") / "run"
    train_here([*WORDS, *NF4, "--stage=phase2,ssl", f"--weights={run / 'phase1' / 'weights'}"], folder)
    return folder


def test_a_rounded_base_is_written_as_it_was_trained_beside_and_ssl_continues_its_adapters(
    rounded: Path, run: Path
) -> None:
    start, base = tensors(run / "phase1" / "weights"), tensors(rounded / "phase2" / "base")
    changed = {key for key, value in base.items() if not torch.equal(value, start[key])}
    assert changed == {key for key in base if ".layer." in key and key.endswith("weight") and "norm" not in key}
    for key in changed:  # blocks of 64 values, each one of 16 times their largest
        values = base[key].view(-1, 64)
        assert (values / values.abs().amax(dim=1, keepdim=True)).round(decimals=5).unique().numel() <= 16, key
    again = tensors(rounded / "ssl" / "base")
    assert all(torch.equal(value, base[key]) for key, value in again.items() if key in changed)
    first, last = (load_file(rounded / stage / "weights/adapter/adapter_model.safetensors") for stage in STAGES)
    moved = torch.cat([(last[key] - value).flatten() for key, value in first.items() if "lora" in key])
    assert 0 < moved.abs().max() < 0.1 * max(value.abs().max() for value in first.values())
    losses = [_losses(folder, stage) for folder in (rounded, run) for stage in STAGES]
    assert losses[0] == pytest.approx(losses[2], rel=0.1) and losses[0] != losses[2]


STAGES = ("phase2", "ssl")


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_on_a_rounded_base_is_resumed_to_the_same_bits(
    rounded: Path, train_here: Main, tmp_path: Path, stage: str
) -> None:
    asked = rounded / stage / "checkpoints" / "step_3"
    train_here([*WORDS, *NF4, f"--stage={stage}"], tmp_path / "run", f"--resume_from_checkpoint={asked}")
    assert_same_files(tmp_path / "run" / stage, rounded / stage)
    assert _losses(tmp_path / "run", stage)[-3:] == _losses(rounded, stage)[-3:]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model.base_dtype=int8"], r"base_dtype int8: there are no adapters \(expected --lora\.rank"),
        ([*NF4, "--lora.dora=true"], r"base_dtype nf4: not with --lora\.dora"),
        ([*NF4, "--memory.compile_blocks=true"], r"base_dtype nf4: not with --memory\.compile_blocks"),
    ],
)
def test_what_a_rounded_base_does_not_go_with_is_refused(
    train_here: Main, tmp_path: Path, words: list[str], said: str
) -> None:
    with pytest.raises(UserError, match=said) as error:
        train_here([*WORDS, *words], tmp_path / "run")
    assert "\n" not in str(error.value)


def test_a_resume_with_another_base_is_refused(rounded: Path, train_here: Main) -> None:
    for words, now in (([*RANK], "null"), ([*RANK, "--model.base_dtype=int8"], "int8")):
        with pytest.raises(UserError, match=f"model.base_dtype was nf4, is {now}"):
            train_here([*WORDS, *words, "--stage=ssl", "--ssl.steps=9"], rounded, "--resume_from_checkpoint=latest")
