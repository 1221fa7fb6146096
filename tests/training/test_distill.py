"""Distillation: the loss by its formula, whole runs with a fixed teacher of the other family, what is refused."""

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor, nn

from sapiens_accel.config.schema import TeacherConfig
from sapiens_accel.data.dataset import Batch, Labeled, Pair, View
from sapiens_accel.errors import UserError
from sapiens_accel.models import export
from sapiens_accel.models.sapiens import SapiensPose
from sapiens_accel.pose.heatmap import Codec
from sapiens_accel.pose.skeleton import COCO17
from sapiens_accel.training.ema import MovingAverage
from sapiens_accel.training.mean_teacher import MeanTeacher, TeacherSetup
from sapiens_accel.training.objectives import FixedTeacher, Supervised

Main = Callable[..., None]
CODEC = Codec(input_hw=(64, 48), heatmap_hw=(16, 12), sigma=1.0)
STEPS = 4
WORDS = [
    "--data.synthetic.num_train=12", "--data.synthetic.num_unlabelled=8", "--data.synthetic.num_val=4",
    "--data.num_workers=0", "--data.input_hw=[64,48]", "--log_every=1", "--report_to=none", "--eval.num_pictures=0",
    "--eval.num_worst=0", "--save_every=2", "--keep_checkpoints=3", "--weights=random",
    *(f"--{stage}.{knob}" for stage in ("phase1", "phase2", "ssl")
      for knob in (f"steps={STEPS}", "global_batch=4", "optim.warmup_steps=2", "loss_weight=100")),
    "--ssl.teacher.threshold=-1", "--ssl.hand_over=last", "--ssl.teacher.on_alarm=warn", "--stage=phase2",
]  # fmt: skip


# ---- The loss


def _labeled(num: int, seed: int = 0) -> Labeled:
    rng = np.random.default_rng(seed)
    image = torch.tensor(rng.integers(0, 256, (num, 3, 64, 48)), dtype=torch.uint8)
    points_xy = torch.tensor(rng.uniform(5, 40, (num, 17, 2)), dtype=torch.float32)
    weights = torch.tensor(rng.choice([0.0, 0.5, 1.0], (num, 17)), dtype=torch.float32)
    return Labeled(_view(image), points_xy, weights, torch.arange(num))


def _view(image: Tensor) -> View:
    return View(image, torch.eye(2, 3).repeat(len(image), 1, 1), torch.zeros(len(image), dtype=torch.bool))


def _network(name: str, seed: int) -> SapiensPose:
    """Its heatmaps depend on the image."""
    torch.manual_seed(seed)
    model = SapiensPose(name, 17, CODEC.input_hw, depth=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.05)
    return model


@pytest.mark.parametrize("chunk", [None, 2])
def test_the_loss_adds_the_error_to_the_heatmaps_of_all_keypoints(chunk: int | None) -> None:
    """Of keypoints without a label too; the same in chunks of the head; no gradient reaches the teacher."""
    labeled, weight = _labeled(3), 0.7
    student, network = _network("sapiens_tiny", 1), _network("sapiens2_tiny", 2).eval().requires_grad_(False)
    student.head.chunk = chunk
    teacher = FixedTeacher(network=network, weight=weight)
    loss, logs = Supervised(codec=CODEC, loss_weight=10.0, teacher=teacher).loss(student, Batch(labeled, None), None)
    loss.backward()
    with torch.no_grad():
        ours, theirs = student(labeled.view.image).double(), network(labeled.view.image).double()
    assert theirs.std() > 1e-2
    target, _ = CODEC.encode(labeled.points_xy, labeled.weights)
    labels = (labeled.weights.double() * (ours - target).square().mean(dim=(2, 3))).mean()
    expected = 10 * (labels + weight * (ours - theirs).square().mean())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert logs["loss_labelled"].item() == pytest.approx(10 * labels.item(), rel=1e-5)
    assert logs["loss_distill"].item() == pytest.approx(10 * weight * (ours - theirs).square().mean().item(), rel=1e-5)
    assert all(parameter.grad is None for parameter in network.parameters())
    gradient = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()
    maps = student(labeled.view.image)
    whole = (labeled.weights[..., None, None] * (maps - target).square()).mean()
    (10 * (whole + weight * (maps - theirs.float()).square().mean())).backward()
    for name, parameter in student.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradient[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_pseudo_labels_are_those_of_the_fixed_teacher_and_the_average_is_the_result() -> None:
    fixed, average = _network("sapiens2_tiny", 2).eval().requires_grad_(False), _network("sapiens_tiny", 3)
    view = _labeled(4).view
    pair = Pair(view, view, torch.zeros(4, 0, 4))
    setup = TeacherSetup(
        average=MovingAverage(average), student_parameters=list, num_steps=10, gather=lambda tensor: tensor,
        unlabeled_each=0.1,
    )  # fmt: skip
    supervised = Supervised(codec=CODEC, teacher=FixedTeacher(network=fixed))
    objective = MeanTeacher(supervised, setup, TeacherConfig(), COCO17.mirror, COCO17.names)
    labels = objective.pseudo_labels(pair)
    with torch.no_grad():
        points_xy, scores = CODEC.decode(fixed(view.image))
        others_xy, _ = CODEC.decode(average(view.image))
    assert torch.equal(labels.weak_xy, points_xy) and torch.equal(labels.scores, scores)
    assert (others_xy - points_xy).abs().max() > 1
    assert not objective.limit.measures_errors, "what it knows does not come from the labels"
    assert objective.result(nn.Identity()) is average
    assert set(objective.results({})["weights"]) == set(average.state_dict())


# ---- Whole runs


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights folder of a network of the other family."""
    torch.manual_seed(5)
    folder, model = tmp_path_factory.mktemp("teacher"), SapiensPose("sapiens2_tiny", 17, (64, 48))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.05)
    export.export(folder, model.state_dict(), model, COCO17, 1.0)
    return folder


def _logged(folder: Path, stage: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["stage"] == stage and "loss" in line]


def _losses(folder: Path, stage: str) -> list[float]:
    return [line["loss"] for line in _logged(folder, stage)]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["phase2", "ssl"])
def test_a_run_learns_from_a_fixed_teacher_and_resumes_with_the_same_bits(
    stage: str, teacher: Path, train_here: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*WORDS, f"--stage={stage}", f"--distill.teacher={teacher}"]
    before = load_file(teacher / "model.safetensors")
    train_here(words, tmp_path / "run")
    assert f"{stage}: learns the heatmaps of sapiens2_tiny, {teacher}, too" in capsys.readouterr().out
    recorded = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["distill"]
    assert recorded == {"teacher": str(teacher), "weight": 1.0}
    train_here([*WORDS, f"--stage={stage}"], tmp_path / "alone")
    assert _losses(tmp_path / "run", stage)[0] > 1.01 * _losses(tmp_path / "alone", stage)[0]
    for line in _logged(tmp_path / "run", stage):
        parts = (line[name] for name in ("loss_labelled", "loss_distill", "loss_unlabelled") if name in line)
        assert line["loss_distill"] > 0 and line["loss"] == pytest.approx(sum(parts), rel=1e-4)
    asked = tmp_path / "run" / stage / "checkpoints" / "step_2"
    train_here(words, tmp_path / "resumed", f"--resume_from_checkpoint={asked}")
    assert _losses(tmp_path / "resumed", stage)[-2:] == _losses(tmp_path / "run", stage)[-2:]
    expected, found = (
        load_file(tmp_path / run / stage / "weights" / "model.safetensors") for run in ("run", "resumed")
    )
    assert all(torch.equal(value, found[key]) for key, value in expected.items())
    assert all(torch.equal(value, before[key]) for key, value in load_file(teacher / "model.safetensors").items())


@pytest.mark.slow
def test_in_16_bits_the_teacher_has_16_bits(
    teacher: Path, train_here: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built, train = [], importlib.import_module("sapiens_accel.train")
    build = train.build_stage
    monkeypatch.setattr(train, "build_stage", lambda *words: built.append(build(*words)) or built[0])
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    train_here([*WORDS, f"--distill.teacher={teacher}"], tmp_path / "run")
    network = built[0].objective.teacher.network
    assert {parameter.dtype for parameter in network.parameters()} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in network.parameters()) and not network.training
    assert np.isfinite(_losses(tmp_path / "run", "phase2")).all()


# ---- Refusals


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--data.input_hw=[96,64]"], r"not of the run's input_hw \(expected \[96, 64\], found \[64, 48\]\)"),
        (["--data.sigma=2"], r"not of the run's sigma \(expected 2\.0, found 1\.0\)"),
        (
            ["--distill.teacher=others"],
            r"not of the run's keypoints \(expected 17: nose, left_eye, .*found 17: a, b, c,",
        ),
        (["--distill.teacher=/no/such"], r"^--distill\.teacher /no/such: no such file or folder here"),
        (["--distill.teacher=."], r"^--distill\.teacher \.: no config\.json in it \(expected a weights folder\)"),
        (["--distill.weight=0"], r"--distill\.weight"),
    ],
)
def test_another_kind_of_teacher_is_refused_in_one_line(
    words: list[str], said: str, teacher: Path, train_here: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tree = json.loads((teacher / "config.json").read_text())
    tree["sapiens_accel"]["keypoints"] = [*"abcdefghijklmnopq"]
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "config.json").write_text(json.dumps(tree))
    with pytest.raises(UserError, match=said) as error:
        train_here([*WORDS, f"--distill.teacher={teacher}"], tmp_path / "run", *words)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run" / "phase2").exists()


def test_a_weight_without_a_teacher_is_refused(train_here: Main, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--distill\.weight 2: there is no teacher \(expected --distill\.teacher too"):
        train_here([*WORDS, "--distill.weight=2"], tmp_path / "run")
