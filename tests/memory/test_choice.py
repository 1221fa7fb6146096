"""What the plan recommends and why, what would fit where nothing does, and how long it takes."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from sapiens_accel.config import parse as config
from sapiens_accel.errors import UserError
from sapiens_accel.memory import choice, duration, gpus, report
from sapiens_accel.memory.choice import Setting
from sapiens_accel.memory.estimate import Room
from sapiens_accel.memory.stages import measure_stage
from sapiens_accel.models.sapiens import SIZES
from sapiens_accel.runtime.files import GIB


def setting(recipe: str, host: float, device: float = 15.0, *words: str) -> Setting:
    run = config.load(["--recipe", recipe, *words])
    return Setting(run=run, gpus=1, room=Room(device=device * GIB, host=host * GIB), capability=(8, 0))


# ---- What is recommended


def test_what_nearly_fills_the_host_gives_way_to_8_bits_and_every_other_way_has_a_reason() -> None:
    """zero2_offload of the 1B takes 25.0 GiB of host memory, 8bit 5.4; with more of it the exact way is taken."""
    table = setting("sapiens_1b_coco", 26, 15, "--stage", "phase2").table()
    best = choice.choose(table)
    assert best is not None and best[0].way.name == "8bit"
    by_name = {plan.way.name: plan for plan in table["phase2"]}
    assert by_name["zero2_offload"].fits and by_name["zero2_offload"].seconds > best[0].seconds
    why = dict(zip(by_name, choice.reasons(table, best), strict=True))
    assert why.pop("8bit") is None and all(why.values())
    reason = r"takes 1\.\d\d times as long and 25\.\d of 26\.0 GiB of host memory"
    assert re.fullmatch(reason, str(why["zero2_offload"]))
    assert re.fullmatch(r"needs \S+ GiB of GPU memory \(predicted\), 15\.0 GiB can be used", str(why["plain"]))
    ample = {"phase2": [replace(plan, host_room=64 * GIB) for plan in table["phase2"]]}
    exact = choice.choose(ample)
    assert exact is not None and exact[0].way.name == "zero2_offload"
    why = dict(zip(by_name, choice.reasons(ample, exact), strict=True))
    assert str(why["8bit"]).endswith("8-bit moments change the losses a little")


# ---- Where nothing fits


@pytest.mark.slow
def test_the_limit_that_binds_is_named_with_changes_that_fit() -> None:
    """The 2B in full: what fits the GPU keeps its state on the host. With 15 GiB its bf16 weights would fit."""
    tight = setting("sapiens_2b_coco", 12, 13, "--stage", "phase2")
    table = tight.table()
    assert choice.choose(table) is None
    text = choice.describe_nothing_fits(tight, table)
    start = r"phase2: no launch fits: host memory is the limit: zero\d_offload\S* needs \S+ GiB of host memory"
    assert re.match(start, text)
    changes = dict(re.findall(r"(--[a-z_.]+) (\S+) \(by [\w+]+\)", text))
    assert list(changes) == ["--lora.rank", "--model.name"]
    for option, value in changes.items():
        found = choice.choose(setting("sapiens_2b_coco", 12, 13, "--stage=phase2", f"{option}={value}").table())
        assert found is not None, option
    needed = re.search(r"(\S+) GiB of free host memory", text)
    assert needed and choice.choose(setting("sapiens_2b_coco", float(needed[1]) + 0.06, 13, "--stage=phase2").table())


def test_the_most_loading_processes_that_fit_are_proposed() -> None:
    tight = setting("sapiens_0.3b_coco", 4.4, 15, "--stage", "phase2")
    assert choice.choose(tight.table()) is None
    (change,) = choice._fewer_workers(tight)
    assert change == "--data.num_workers 2 (by zero2)"  # 3 GiB for the process, 0.6 for each
    assert (
        choice.choose(setting("sapiens_0.3b_coco", 4.4, 15, "--stage=phase2", "--data.num_workers=3").table()) is None
    )


@pytest.mark.slow
def test_a_gpu_that_is_too_small_is_the_limit() -> None:
    small = setting("sapiens_0.3b_coco", 64, 1.0, "--stage", "phase2")
    text = choice.describe_nothing_fits(small, small.table())
    assert "GPU memory is the limit: the way of least, " in text
    needed = re.search(r"(\S+) GiB of usable GPU memory \(by (\w+)", text)
    assert needed
    larger = setting("sapiens_0.3b_coco", 64, float(needed[1]) + 0.06, "--stage=phase2").table()
    assert next(plan for plan in larger["phase2"] if plan.way.name.startswith(needed[2])).fits


# ---- Time


@pytest.mark.parametrize("name", ["sapiens_0.3b", "sapiens_1b"])
def test_operations_of_a_block_by_hand(name: str) -> None:
    """Four projections and an MLP of 4 x: 12 w^2 weights, a product of 2 operations for each token and weight.

    Attention: queries by keys and maps by values, 2 operations for each pair of tokens and channel.
    """
    parts, width, tokens = duration.part_flops(name, 17, (512, 384)), SIZES[name].width, 32 * 24
    assert parts.block == 24 * tokens * width**2 + 4 * tokens**2 * width
    assert parts.stem == 2 * tokens * width * 3 * 16**2
    upsampled = 2 * 16 * (tokens * width * 768 + 4 * tokens * 768 * 768)
    convolved = 2 * 16 * tokens * (2 * 768 * 768 + 768 * 17)
    assert parts.head == upsampled + convolved


def test_operations_of_a_step_by_stage() -> None:
    run = config.load(["--recipe", "sapiens_0.3b_coco"])
    parts = duration.part_flops("sapiens_0.3b", 17, run.data.input_hw)
    stages = {name: measure_stage(run, name) for name in ("phase1", "phase2", "ssl")}
    flops = {name: duration.flops_of_step(stage, 1, 5) for name, stage in stages.items()}
    assert flops["phase1"] == parts.backbone + 3 * parts.head
    assert flops["phase2"] == 3 * parts.whole + 5 * parts.block
    assert flops["ssl"] == 2 * flops["phase2"] + parts.whole
    short = measure_stage(config.load(["--recipe", "sapiens_0.3b_coco", "--ssl.teacher.labeled_end=0.2"]), "ssl")
    expected = 1.8 * flops["phase2"] + 0.8 * parts.whole
    assert duration.flops_of_step(short, 1, 5) == pytest.approx(expected, rel=1e-12), "the mean of its steps"
    adapted = replace(stages["phase2"], adapted=True)
    assert duration.flops_of_step(adapted, 1, 5) == 2 * parts.backbone + 3 * parts.head + 5 * parts.block


def test_hours_are_of_the_people_and_the_rate(
    capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--recipe", "sapiens_0.3b_coco", "--stage", "phase2", "--host_memory", "64GiB", "--gpu", "A100", "--json"]

    def planned(*more: str) -> dict:
        report.main([*words, *more])
        return json.loads(capsys.readouterr().out)["recommended"]

    whole, tenth = planned(), planned("--people", "14981")
    assert tenth["hours"] == pytest.approx(whole["hours"] / 10, rel=0.01)
    # What the selftest measured on this card takes the place of the assumed rate.
    parts = duration.part_flops("sapiens_0.3b", 17, (512, 384))
    row = {"phase2_rate": 2e14 / (3 * parts.whole + 24 * parts.block), "model": "sapiens_0.3b", "input_hw": [512, 384]}
    row["comparison"] = {"checkpointed_blocks": 24}
    (tmp_path / "selftest").mkdir()
    tree = {"machine": {"gpu": "NVIDIA A100-SXM4-40GB"}, "checks": [{"rows": [row]}]}
    (tmp_path / "selftest" / "selftest.json").write_text(json.dumps(tree))
    measured = planned()
    assert duration.measured_flops("A100") == pytest.approx(2e14)
    assert duration.measured_flops("T4") is None
    assert measured["people_per_second"] == pytest.approx(whole["people_per_second"] * 200 / 165, rel=0.02)


# ---- Cards


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("Tesla T4", "T4"),
        ("Tesla V100-SXM2-16GB", "V100"),
        ("NVIDIA RTX A4000", "A4000"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA GeForce RTX 4060 Ti", "4060Ti-16"),
        ("NVIDIA GeForce RTX 4080 SUPER", "4080"),
        ("NVIDIA A100-SXM4-40GB", "A100"),
        ("NVIDIA H100 80GB HBM3", "H100"),
    ],
)
def test_a_card_is_known_by_the_name_of_its_driver(device: str, name: str) -> None:
    assert gpus.rates_of_device(device) == gpus.get_gpu(name.lower()).rates


@pytest.mark.parametrize("device", ["NVIDIA L40S", "NVIDIA A10G", "NVIDIA GeForce RTX 5090"])
def test_other_cards_have_the_assumed_rates(device: str) -> None:
    assert gpus.rates_of_device(device) == gpus.ASSUMED


def test_a_card_brings_its_memory_and_precision(capsys: pytest.CaptureFixture) -> None:
    report.main(["--recipe", "sapiens_0.3b_coco", "--stage=phase2", "--gpu", "T4", "--host_memory", "64GiB"])
    printed = capsys.readouterr().out
    assert "1 T4 with 14.8 GiB, of which CUDA takes 1 GiB; fp16, memory-efficient attention; host 64GiB" in printed
    assert "22 TFLOP/s sustained (ASSUMED; measured by `python -m sapiens_accel.selftest`)" in printed


def test_an_unknown_card_is_refused() -> None:
    with pytest.raises(UserError, match=r"--gpu K80: not in the table \(expected one of T4, .*H100\)"):
        gpus.get_gpu("K80")


@pytest.mark.slow
def test_a_rounded_base_is_proposed_where_adapters_need_too_much_of_the_gpu() -> None:
    words = ("--stage=phase2", "--lora.target=attention")
    tight = setting("sapiens_1b_coco_lora", 9, 2.6, *words)
    table = tight.table()
    assert choice.choose(table) is None
    (change,) = choice._rounded_base(tight)
    option, value = change.split()[:2]
    assert option == "--model.base_dtype" and value in ("nf4", "int8")
    assert choice.choose(setting("sapiens_1b_coco_lora", 9, 2.6, *words, f"{option}={value}").table()) is not None
    assert change in choice.describe_nothing_fits(tight, table)
