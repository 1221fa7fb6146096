"""The probes on a CPU, and as far as they go there what only a GPU reaches: on stubs of torch.cuda's queries."""

import contextlib
import json
import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gpu.pretended_driver import A100, T4, Card, pretend

from sapiens_accel.memory import planner
from sapiens_accel.memory.estimate import Room
from sapiens_accel.memory.planner import LaunchInfo
from sapiens_accel.models import kernels
from sapiens_accel.models.sapiens import SIZES, Layout
from sapiens_accel.runtime import distributed, host
from sapiens_accel.runtime.files import GIB
from sapiens_accel.selftest import __main__ as selftest
from sapiens_accel.selftest import checks, epochs, launches, peak_memory, probes, throughput, training_step
from sapiens_accel.selftest.checks import Skipped
from sapiens_accel.selftest.training_step import TrainingCase

CPU = torch.device("cpu")


def small(**changes: Any) -> TrainingCase:
    settings = {"stage": "phase2", "precision": "no", "input_hw": (64, 48), "micro_batch": 2, "accumulation": 1}
    settings |= {"model": "sapiens_tiny", "way": "plain", "launch": "single_gpu"}
    return TrainingCase(**{**settings, "checkpointed_blocks": 4, "head_chunk": 2, **changes})


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """torch.cuda's queries of a card of 16 GB, on which nothing is computed; what was set stands in the dict."""
    said: dict[str, Any] = {"used": 5 * GIB}
    answers = {
        "mem_get_info": lambda *_: (10 * GIB, 16 * GIB),
        "set_per_process_memory_fraction": lambda fraction, *_: said.update(fraction=fraction),
        "max_memory_allocated": lambda *_: said["used"],
        "max_memory_reserved": lambda *_: said["used"] + GIB // 2,
        "memory_allocated": lambda *_: 0,
        "reset_peak_memory_stats": lambda *_: said.update(reset=True),
        "synchronize": lambda *_: None,
        "empty_cache": lambda *_: None,
        "set_sync_debug_mode": lambda mode: said.setdefault("modes", []).append(mode),
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    return said


def test_a_peak_is_measured_with_the_limit_that_was_asked_for(driver: dict[str, Any]) -> None:
    """On the CPU's arithmetic, with a card's answers."""
    found = training_step.measure_on_gpu(training_step.start_accelerator("no"), small(stage="ssl"), 12 * GIB)
    assert driver["fraction"] == 0.75 and driver["reset"]
    assert found["measured"] == 5 * GIB and found["reserved"] == 5.5 * GIB and found["device_used"] == 6 * GIB
    assert found["seconds_per_step"] > 0


def test_a_prediction_is_off_by_per_cent_of_what_was_measured() -> None:
    row = peak_memory.compare("1b", 10.9 * GIB, {"measured": 10 * GIB, "outcome": "measured"})
    assert (row["status"], row["error_percent"]) == ("passed", 9.0)
    assert row["text"] == "predicted 10.90 GiB, measured 10.00 GiB: +9.0 %"
    assert peak_memory.compare("1b", 8.9 * GIB, {"measured": 10 * GIB})["status"] == "warning"
    row = peak_memory.compare("1b", 11 * GIB, {"measured": None, "outcome": "out of memory"})
    assert (row["status"], row["text"]) == ("failed", "out of memory")


def test_a_planned_case_is_launched_as_its_plan_says(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"measured": 7 * GIB, "seconds_per_step": 4.0, "device_used": 9 * GIB, "reserved": 8 * GIB}
    monkeypatch.setattr(peak_memory, "launch_case", lambda case, limit: found)
    run = training_step.run_of("sapiens_tiny", "phase2", (64, 48), 8)
    stage = peak_memory.measure_stage(run, "phase2")
    plan = peak_memory.fit(stage, "phase2", peak_memory.way_of("zero2"), Room(device=15 * GIB, host=64 * GIB))
    case = peak_memory.case_of_plan("sapiens_tiny", "phase2", (64, 48), plan)
    row = peak_memory.compare_on_gpu(case, plan, 15 * GIB)
    assert row["phase2_rate"] == row["people_per_second"] == 2.0 and row["context_bytes"] == GIB
    assert "CUDA's context 1.00 GiB, 2.0 people/s" in row["text"] and row["input_hw"] == [64, 48]
    plan = peak_memory.fit(stage, "phase2", peak_memory.way_of("zero2"), Room(device=0.01 * GIB, host=64 * GIB))
    with pytest.raises(Skipped, match="predicted not to fit"):
        peak_memory.compare_on_gpu(case, plan, 15 * GIB)


@pytest.mark.parametrize(("card", "precision"), [(T4, "fp16"), (A100, "bf16")], ids=["T4", "A100"])
def test_a_peak_is_planned_for_the_precision_and_the_attention_of_the_card(
    card: Card, precision: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As train.py plans it there. With accumulation and offload, only bf16 has sums on the card."""
    pretend(monkeypatch, card)
    launched: list[TrainingCase] = []
    monkeypatch.setattr(
        peak_memory, "launch_case", lambda case, _: launched.append(case) or {"measured": None, "outcome": ""}
    )
    monkeypatch.setattr(host, "free_bytes", lambda: 500.0 * GIB)
    hw, limit = (64, 48), 15 * GIB
    run = training_step.run_of("sapiens_2b", "phase2", hw, 4, "--stage=phase2", "--memory.micro_batch=2")
    monkeypatch.setattr(peak_memory, "run_of", lambda *_: run)
    capability = ["--capability", "{}.{}".format(*card.capability)]
    words = ["sapiens_2b", "phase2", "zero2_offload", "--limit", f"{limit}B", *capability]
    peak_memory.main([str(tmp_path / "result.json"), *words, "--hw", *map(str, hw), "--batch", "4"])

    zero = json.loads((checks.REPOSITORY / "ds_configs/zero2_offload.json").read_text())["zero_optimization"]
    strategy = distributed.strategy_of(zero, num_ranks=1, num_local=1, precision=precision)
    room = Room(device=limit, host=500 * GIB)
    launch = LaunchInfo(strategy=strategy, room=room, words=[], capability=card.capability)
    plan = planner.plan_stages(run, launch)["phase2"]
    (row,) = json.loads((tmp_path / "result.json").read_text())
    assert plan.share.accumulation == 2 and ("gradients" in plan.gpu) == (precision == "bf16")
    assert row["predicted_bytes"] == round(plan.gpu_peak)
    assert row["case"]["precision"] == launched[0].precision == precision


def test_the_selftest_names_the_card_of_its_memory_rows(tmp_path: Path) -> None:
    machine = checks.Machine(gpu="Tesla T4", num_gpus=1, gpu_bytes=15 * GIB, capability=(7, 5))
    for check in selftest._memory(machine, tmp_path):
        (command,) = check.commands
        assert command[command.index("--capability") + 1] == "7.5"


# ---- Kernels, skipped steps, waits


@pytest.mark.slow
def test_the_attention_that_really_runs_is_named() -> None:
    rows = list(probes.attention(CPU))
    assert [row["name"].split(",")[0] for row in rows] == list(probes.ATTENTION_MODELS)
    assert ["grouped" in row["name"] for row in rows] == [False, False, True, True]
    assert {row["kernel"] for row in rows} == {"flash"}


def test_math_is_recognized() -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    model = training_step.build_network(small().run, "phase2")
    with sdpa_kernel([SDPBackend.MATH]):
        assert probes.attention_kernel(model, torch.zeros(1, 3, 64, 48, dtype=torch.uint8)) == "MATH"


def test_a_step_of_infinite_loss_is_seen() -> None:
    (row,) = probes.fp16(CPU)
    assert row["status"] == "passed" and row["skipped"] == [False, True, False]


def test_waits_are_counted_by_the_line_of_ours(driver: dict[str, Any]) -> None:
    def work() -> None:
        for _ in range(3):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)

    places = probes.synchronizations(work)
    (place,) = places
    assert places.total() == 3 and place.startswith("test_probes.py:")
    assert driver["modes"] == ["warn", "default"]
    with contextlib.suppress(ZeroDivisionError):
        probes.synchronizations(lambda: 1 / 0)
    assert driver["modes"][-1] == "default"


# ---- Overlap


def event(name: str, start: int, end: int, device: str = "DeviceType.CUDA") -> SimpleNamespace:
    answers = {"name": name, "start_ns": start, "duration_ns": end - start, "device_type": device}
    return SimpleNamespace(**{key: (lambda value=value: value) for key, value in answers.items()})


def test_overlap_is_the_part_of_the_copies_beside_kernels() -> None:
    events = [
        event("Memcpy DtoH (Device -> Pinned)", 0, 100),
        event("Memcpy HtoD (Pinned -> Device)", 200, 300),
        event("Memcpy DtoD (Device -> Device)", 0, 500),
        event("Memset (Device)", 0, 500),
        event("gemm", 50, 120),
        event("gemm", 90, 150),
        event("flash_fwd", 250, 260),
        event("aten::mm", 0, 500, device="DeviceType.CPU"),
    ]
    copies, kernels = probes.intervals(events)
    assert copies == [(0, 100), (200, 300)] and len(kernels) == 3
    assert probes.overlap(copies, kernels) == 0.3  # 50 and 10 of 200


@pytest.mark.slow
def test_offloading_is_compared_on_a_cards_answers(driver: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole probe, on the CPU's arithmetic."""
    monkeypatch.setattr(probes, "traced_events", lambda work: [work() and event("Memcpy DtoH", 0, 9), event("k", 0, 9)])
    monkeypatch.setattr(probes, "OFFLOAD_HW", (64, 48))
    compared, overlapped = probes.offload(CPU, "sapiens_tiny", 2)
    assert compared["status"] == "passed" and compared["loss"] == compared["plain"]["loss"]
    assert overlapped["overlap"] == 1.0 and driver["reset"]
    monkeypatch.setattr(probes, "traced_events", lambda work: [])
    stream = probes.offload(CPU, "sapiens_tiny", 2)
    next(stream)
    with pytest.raises(Skipped, match="CUPTI"):
        next(stream)


# ---- Epochs


def test_the_hours_of_an_epoch_follow_from_a_measured_rate(recipes: dict[str, Any]) -> None:
    few = {name: recipes[name] for name in ("sapiens_0.3b_coco", "sapiens_0.3b_coco_official", "sapiens_0.6b_coco")}
    rows = {row["name"]: row for row in epochs.epoch_rows({"sapiens_0.3b": 40.0}, (512, 384), few)}
    hours = rows["epoch of sapiens_0.3b_coco"]["hours"]
    assert hours["phase2"] == round(149_813 / 40 / 3600, 2)  # the very case that was measured
    assert hours["ssl"] == pytest.approx(7 / 3 * hours["phase2"], abs=0.01)
    assert hours["phase1"] < hours["phase2"] / 2
    official = rows["epoch of sapiens_0.3b_coco_official"]["hours"]
    assert official["phase2"] > 4 * hours["phase2"]  # 4 times the tokens, and attention's 16
    assert all("predicted from sapiens_0.3b: phase1 " in row["text"] for row in rows.values())


def test_rates_come_from_the_checks_before(tmp_path: Path) -> None:
    with pytest.raises(Skipped, match="no rate was measured"):
        epochs.measured_rates(tmp_path)
    for name, row in {
        "a": {"text": "no rate"},
        "b": {"phase2_rate": 3.0, "model": "m", "input_hw": [512, 384]},
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_text(json.dumps([row]))
    assert epochs.measured_rates(tmp_path) == ({"m": 3.0}, (512, 384))


@pytest.mark.slow
@pytest.mark.launch
def test_the_selftest_of_a_cpu(tmp_path: Path) -> None:
    """As a user starts it, with more time than it takes on an idle machine."""
    import os
    import subprocess
    import sys

    command = [sys.executable, "-m", "sapiens_accel.selftest", "--minutes", "15", "--out", str(tmp_path / "out")]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "SAPIENS_ACCEL_CACHE": str(tmp_path)}
    since = time.monotonic()
    done = subprocess.run(command, cwd=peak_memory.REPOSITORY, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    tree = json.loads((tmp_path / "out" / "selftest.json").read_text())
    assert {"date", "commit", "versions", "machine", "cpu"} <= set(tree)
    by_status = {check["name"]: check["status"] for check in tree["checks"]}
    ran = {f"{does} {name}" for does in ("launch", "resume") for name in launches.ON_CPU}
    ran |= {"attention", "fp16", "memory sapiens_tiny phase2", "speed sapiens_tiny"}
    assert {name for name, status in by_status.items() if status == "passed"} == ran
    assert {status for name, status in by_status.items() if name not in ran} == {"skipped"}
    assert all(check["text"] for check in tree["checks"] if check["status"] == "skipped")
    assert sum(check["seconds"] for check in tree["checks"]) <= time.monotonic() - since
    assert f"{len(by_status) - len(ran)} skipped" in done.stdout.splitlines()[-2]


def test_kernels_are_timed_where_they_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused ones on a GPU, of Sapiens2, and before blocks are compiled, which stay so."""
    plan: Any = SimpleNamespace(layout=Layout(checkpointed_blocks=1, selective_blocks=2))
    timing = throughput.Timing(input_hw=(64, 48), batch=2, compiled=True)
    fused = Layout(checkpointed_blocks=1, selective_blocks=2, fused=True)
    compiled = Layout(checkpointed_blocks=3, compiled=True)
    for installed, device, name, expected in (
        (True, "cuda", "sapiens2_tiny", {"ours_fused": fused, "ours_compiled": compiled}),
        (True, "cpu", "sapiens2_tiny", {"ours_compiled": compiled}),
        (True, "cuda", "sapiens_tiny", {"ours_compiled": compiled}),
        (False, "cuda", "sapiens2_tiny", {"ours_compiled": compiled}),
    ):
        monkeypatch.setattr(kernels, "missing_package", lambda installed=installed: None if installed else "pip")
        model: Any = SimpleNamespace(size=SIZES[name])
        found = throughput.layouts_of_kernels(timing, plan, torch.device(device), model)
        assert list(found.items()) == list(expected.items())


def test_rows_are_in_the_order_in_which_kernels_are_timed() -> None:
    """Each result of a comparison repeats the rows before: the selftest adds what is new at their end."""
    settings = {"model": "m", "micro_batch": 2, "checkpointed_blocks": 0, "precision": "bf16", "tflops_per_person": 1.0}
    keys, before = ("ours", "ours_fused", "ours_compiled"), []
    for num in (1, 2, 3):
        rates = {key: {"median": 1.0} for key in keys[:num]}
        row = {**settings, "people_per_second": rates, "ratio": None, "mfu": None}
        names = [found["name"] for found in throughput.rows_of(row, (64, 48))]
        assert names[:-1] == before
        before = names
    assert before == ["m", "m, fused kernels", "m, compiled blocks"]
