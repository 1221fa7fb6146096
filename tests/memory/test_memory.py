"""The memory plan: against real allocators, against closed counts, and what it says."""

import json
import os
import re
import resource
import subprocess
import sys
from dataclasses import replace
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path

import forks
import pytest
import torch

import sapiens_accel
from sapiens_accel.config import parse as config
from sapiens_accel.config.schema import Config, MemoryConfig, StageName, TeacherPlacement
from sapiens_accel.data.sampling import Share
from sapiens_accel.errors import UserError
from sapiens_accel.memory import choice, duration, fitting, planner, stages, strategies
from sapiens_accel.memory import estimate as plan
from sapiens_accel.memory import report as memory
from sapiens_accel.memory.estimate import Plan, Room
from sapiens_accel.memory.planner import LaunchInfo
from sapiens_accel.memory.strategies import Way
from sapiens_accel.models import kernels
from sapiens_accel.models.sapiens import Layout, SapiensPose
from sapiens_accel.runtime.distributed import Strategy
from sapiens_accel.runtime.files import GIB

ROOT = Path(__file__).parents[2]
ROOM, HOST = 15 * GIB, 64 * GIB  # a 16 GB card less CUDA's own


@lru_cache
def recipe(name: str, *words: str) -> Config:
    return config.load(["--recipe", name, *words])


@lru_cache
def counted(name: str, stage: StageName, *words: str) -> stages.Stage:
    return stages.measure_stage(recipe(name, *words), stage)


def way(name: str, ranks: int = 1) -> Way:
    return next(one for one in strategies.list_ways(ranks) if one.name == name)


@lru_cache
def fitted(name: str, stage: StageName, by: str, room: float = ROOM, ranks: int = 1) -> Plan:
    return fitting.fit(counted(name, stage), stage, way(by, ranks), Room(device=room, host=1000 * GIB))


# ---- Against real steps

CASES = [
    {"stage": "phase2", "micro_batch": 6, "accumulation": 1, "checkpointed": 4, "chunk": 2},
    {"stage": "phase2", "micro_batch": 4, "accumulation": 2, "checkpointed": 2, "chunk": 4},
    {"stage": "phase2", "micro_batch": 6, "accumulation": 1, "checkpointed": 0, "chunk": 6},
    {"stage": "phase1", "micro_batch": 8, "accumulation": 1, "checkpointed": 4, "chunk": 4},
    {"stage": "ssl", "micro_batch": 4, "accumulation": 1, "checkpointed": 4, "chunk": 2},
]
SELECTIVE = [
    {**CASES[0], "checkpointed": 0, "selective": 4},
    {**CASES[0], "checkpointed": 1, "selective": 2},
    {**CASES[1], "selective": 2},
]
ADAPTED = [{**CASES[0], "rank": 8}, {**CASES[1], "rank": 8}]
ROUNDED = [{**ADAPTED[0], "base_dtype": "int8"}, {**ADAPTED[1], "base_dtype": "nf4"}]


def peaks(cases: list[dict], folder: Path, processes: int = 0, **env: str) -> list[dict[str, float]]:
    """tests/peaks.py in a process of its own: what the allocator holds there is of these steps alone."""
    listing = folder / "cases.json"
    listing.write_text(json.dumps(cases))
    grouped = {"processes": processes, "grouped": True} if processes else {}
    done = forks.run(["tests/peaks.py", listing], env={**os.environ, **env}, **grouped)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.launch
@pytest.mark.parametrize("precision", [pytest.param("no", marks=pytest.mark.slow), "bf16"])
def test_the_predicted_peak_is_the_allocators_within_three_percent(precision: str, tmp_path: Path) -> None:
    cases = [{"name": "sapiens_tiny", **case} for case in [*CASES, *ADAPTED, *SELECTIVE]]
    cases += [{"name": "sapiens2_tiny", **case} for case in (CASES[1], SELECTIVE[0], {**SELECTIVE[1], "rank": 8})]
    cases += [{"name": "sapiens2_tiny", **CASES[4], "micro_batch": 6, "ratio": 0.5}]
    cases += [{"name": "sapiens2_tiny", **case} for case in (ROUNDED if find_spec("bitsandbytes") else ROUNDED[:1])]
    if precision == "bf16":  # the CPU takes its time for it
        cases = [{"name": "sapiens_tiny", **case} for case in (CASES[0], ADAPTED[0], SELECTIVE[1])]
    found = peaks(cases, tmp_path, ACCELERATE_MIXED_PRECISION=precision)
    for case, result in zip(cases, found, strict=True):
        assert result["predicted"] == pytest.approx(result["measured"], rel=0.03), case


@pytest.mark.launch
@pytest.mark.slow
def test_the_predicted_peak_of_bf16_weights_with_moments_of_8_bits_is_the_allocators(tmp_path: Path) -> None:
    pytest.importorskip("torchao", reason="an extra: pip install sapiens_accel[8bit]")
    cases = [{"name": "sapiens_tiny", **case, "in_bf16": True} for case in (CASES[0], SELECTIVE[2])]
    for case, result in zip(cases, peaks(cases, tmp_path, ACCELERATE_MIXED_PRECISION="bf16"), strict=True):
        assert result["predicted"] == pytest.approx(result["measured"], rel=0.03), case


@pytest.mark.launch
@pytest.mark.parametrize(
    ("zero", "cases", "processes"),
    [
        (2, CASES[:1], 1),
        pytest.param(2, [*CASES[1:], *ADAPTED, SELECTIVE[1]], 1, marks=pytest.mark.slow),
        pytest.param(1, [CASES[1], ADAPTED[1]], 1, marks=pytest.mark.slow),
        pytest.param(3, [CASES[1]], 1, marks=pytest.mark.slow),
        pytest.param(1, ADAPTED[1:], 2, marks=pytest.mark.slow),
        pytest.param(2, ADAPTED[:1], 2, marks=pytest.mark.slow),
        pytest.param(3, [CASES[0], ADAPTED[0]], 2, marks=pytest.mark.slow),
    ],
)
def test_the_predicted_peak_under_zero_is_the_allocators(
    zero: int, cases: list[dict], processes: int, tmp_path: Path
) -> None:
    """bf16 weights, fp32 masters, moments, sums and DeepSpeed's buckets, as it really allocates them."""
    tree = json.loads((ROOT / "ds_configs" / f"zero{zero}.json").read_text())
    options = tree["zero_optimization"]
    options["reduce_bucket_size"] = 200_000  # a part of the network, as for large ones
    if zero == 3:
        options |= {"stage3_max_live_parameters": 300_000, "stage3_max_reuse_distance": 300_000}
        options |= {"stage3_prefetch_bucket_size": 100_000, "stage3_param_persistence_threshold": 1_000}
    (tmp_path / "zero.json").write_text(json.dumps(tree))
    env = {
        "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_MIXED_PRECISION": "bf16",
        "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(tmp_path / "zero.json"),
    }  # fmt: skip
    for case in cases:  # each in its own process: later ones of one process measured half as much, not explained
        (result,) = peaks([{"name": "sapiens_tiny", **case}], tmp_path, processes, **env)
        assert result["predicted"] == pytest.approx(result["measured"], rel=0.03), case


# ---- Against counts that need no network


@pytest.mark.parametrize(
    ("strategy", "options", "accumulation", "per_parameter"),
    [
        (Strategy(), {}, 1, 4 + 4 + 8),
        (Strategy(half=False), {}, 1, 4 + 4 + 8),
        (Strategy(), {"adam_8bit": True}, 1, 4 + 4 + 2 * (1 + 4 / 256)),
        (Strategy(zero=1, num_ranks=4), {}, 1, 2 + 2 + (4 + 8) / 4),
        (Strategy(zero=1, num_ranks=4), {}, 2, 2 + 6 + (4 + 8) / 4),  # summed in fp32 beside those of a backward
        (Strategy(zero=1, num_ranks=4, bf16=False), {}, 2, 2 + 2 + (4 + 8) / 4),
        (Strategy(zero=2), {}, 1, 2 + 2 + 4 + 8),
        (Strategy(zero=2, num_ranks=4), {}, 1, 2 + (2 + 4 + 8) / 4),
        (Strategy(zero=2, num_ranks=4), {}, 2, 2 + (4 + 4 + 8) / 4),  # accumulated in fp32
        (Strategy(zero=2, half=False), {}, 1, 4 + 4 + 4 + 8),
        (Strategy(zero=2, offload=True), {}, 1, 2),
        (Strategy(zero=2, offload=True), {}, 2, 2 + 4),  # DeepSpeed keeps an fp32 sum on the device
        (Strategy(zero=2, offload=True, bf16=False), {}, 2, 2),  # in fp16 the sum is on the host
        (Strategy(zero=3, num_ranks=4), {}, 1, (2 + 2 + 4 + 8) / 4),
        (Strategy(zero=3, offload=True, offload_weights=True), {}, 1, 0),
    ],
)
def test_bytes_of_a_parameter(strategy: Strategy, options: dict, accumulation: int, per_parameter: float) -> None:
    stage = counted("sapiens_0.3b_coco", "phase2")
    found = plan.state_bytes(stage, Way(name="", launch="", strategy=strategy, **options), accumulation > 1)
    everything = sum(found[part] for part in ("weights", "gradients", "masters", "adam"))
    assert everything == pytest.approx(per_parameter * stage.num_parameters, rel=1e-9)


def test_bytes_of_bf16_weights_with_moments_of_8_bits() -> None:
    """6 bytes of a learning matrix of blocks and head, 10 of all else: norms, biases, embeddings."""
    stage = counted("sapiens_0.3b_coco", "phase2")
    assert 0.99 * stage.num_learning < stage.matrices < stage.num_learning
    (by,) = (one for one in strategies.list_ways(1) if one.name == "8bit+bf16")
    assert by.bf16_weights and not [one for one in strategies.list_ways(1, "fp16") if one.bf16_weights]
    found = plan.state_bytes(stage, by, False)
    rest = stage.num_learning - stage.matrices
    assert found["weights"] == found["gradients"] == 2 * stage.matrices + 4 * rest
    assert found["adam"] == 2 * (1 + 4 / 256) * stage.num_learning
    share = Share(rank=0, num_ranks=1, micro_batch=1, accumulation=1)
    with torch.device("meta"):
        layers = SapiensPose("sapiens_0.3b", 17, (512, 384)).layer_groups()
    late = sum(4 * p.numel() for _, p in layers["embeddings"])
    late += sum((2 if p.ndim > 1 else 4) * p.numel() for _, p in layers["block_0"])
    for checkpointed in (12, 24):  # the peak of one person is the backward of the first block, the last of all
        layout = Layout(checkpointed_blocks=checkpointed, selective_blocks=24 - checkpointed, head_chunk=1)
        assert plan.predict(stage, by, share, layout).gpu["gradients"] == found["gradients"] - late
    (by,) = (one for one in strategies.list_ways(2) if one.name == "8bit+bf16")
    peak = plan.predict(stage, by, replace(share, num_ranks=2), Layout(head_chunk=1))
    assert peak.gpu["zero_buckets"] == found["gradients"]  # of DistributedDataParallel, in the gradients' types


def test_options_that_no_launch_allows_are_one_line() -> None:
    run = recipe("sapiens_0.3b_coco", "--memory.selective_blocks=2", "--memory.compile_blocks")
    with pytest.raises(UserError, match=r"selective_blocks: not with --memory\.compile_blocks"):
        choice.Setting(run=run, gpus=1, room=Room(device=ROOM), capability=(8, 0)).table()


def test_host_memory_of_an_offloaded_parameter() -> None:
    """fp32 master, fp32 gradient, two moments and 16-bit weights; the pinned ones in powers of two."""
    stage = counted("sapiens_1b_coco", "phase2")
    found = fitted("sapiens_1b_coco", "phase2", "zero2_offload").host
    exact = 18 * stage.num_parameters
    state = sum(found[part] for part in ("masters", "gradients", "adam", "weights"))
    assert exact <= state <= 2 * exact
    assert found["adam"] == 8 * stage.num_parameters


@pytest.mark.skipif(not sapiens_accel._has_exact_pinned_memory(), reason="this torch rounds pinned memory up")
def test_torch_reads_the_setting_of_pinned_memory() -> None:
    """A name that it does not know it would ignore on a CPU, and refuse when CUDA starts."""
    torch._C._accelerator_setAllocatorSettings(f"{plan.EXACT_PINNED}:1")
    with pytest.raises(ValueError, match="sto"):
        torch._C._accelerator_setAllocatorSettings(f"{plan.EXACT_PINNED}:x")
    code = "import os, sapiens_accel; print(os.environ['PYTORCH_ALLOC_CONF'])"
    environment = {name: value for name, value in os.environ.items() if not name.endswith("ALLOC_CONF")}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout == f"expandable_segments:True,{plan.EXACT_PINNED}:1\n"


def test_pinned_memory_is_of_the_size_asked_for_where_torch_is_set_so(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [5 * 2**20, 2**20 - 1, 3.0]
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    assert plan._pinned(sizes) == 8 * 2**20 + 2**20 + 4
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True,pinned_max_round_threshold_mb:1")
    assert plan._pinned(sizes) == 5 * 2**20 + 2**20 + 4


@pytest.mark.parametrize(
    ("place", "strategy", "gpu", "host"),
    [
        ("device", Strategy(zero=2, num_ranks=4, num_local=4), 4, 0),
        ("device", Strategy(), 4, 0),
        ("sharded", Strategy(zero=2, num_ranks=4, num_local=4), 4 / 4 + 2, 0),
        ("sharded", Strategy(num_ranks=2, num_local=2, half=False), 4 / 2 + 4, 0),
        ("host", Strategy(zero=2), 2, 4),
        ("host", Strategy(zero=2, num_ranks=4, num_local=4), 2, 4),  # the ranks of a machine share it
        ("host", Strategy(zero=2, num_ranks=8, num_local=4), 2, 4 / 2),
    ],
)
def test_bytes_of_a_teacher(place: TeacherPlacement, strategy: Strategy, gpu: float, host: float) -> None:
    stage = counted("sapiens_0.3b_coco", "ssl")
    share = Share(rank=0, num_ranks=strategy.num_ranks, micro_batch=1, accumulation=1)
    by = Way(name="", launch="", strategy=strategy, teacher=place)
    found = plan.predict(stage, by, share, Layout(checkpointed_blocks=stage.depth))
    assert found.gpu["ema_teacher"] == pytest.approx(gpu * stage.num_parameters, rel=1e-9)
    assert found.host.get("ema_teacher", 0.0) == pytest.approx(host * stage.num_parameters, rel=1e-9)
    without = plan.predict(counted("sapiens_0.3b_coco", "phase2"), by, share, Layout())
    assert "ema_teacher" not in without.gpu and "ema_teacher" not in without.host


@pytest.mark.slow
@pytest.mark.parametrize(("half", "word"), [(True, 2), (False, 4)])
def test_a_fixed_teacher_is_whole_on_each_device_and_takes_a_forward(half: bool, word: int, tmp_path: Path) -> None:
    """--distill.teacher, of another size and family: its weights, and time; config.json alone tells its size."""
    about = {"name": "sapiens2_tiny", "num_keypoints": 17, "input_hw": [64, 48], "sigma": 1.0}
    (tmp_path / "config.json").write_text(json.dumps({"sapiens_accel": about}))
    with torch.device("meta"):
        size = sum(p.numel() for p in SapiensPose("sapiens2_tiny", 17, (64, 48)).parameters())
    share = Share(rank=0, num_ranks=2, micro_batch=4, accumulation=1)
    by = Way(name="", launch="", strategy=Strategy(zero=2, num_ranks=2, num_local=2, half=half))
    small = ["--data.input_hw=[64,48]", "--data.sigma=1"]
    alone, taught = (
        stages.measure_stage(recipe("demo", *small, *words), "phase2", half)
        for words in ((), (f"--distill.teacher={tmp_path}",))
    )
    without, found = (plan.predict(stage, by, share, Layout(head_chunk=2)) for stage in (alone, taught))
    assert found.gpu["fixed_teacher"] == word * size and "fixed_teacher" not in without.gpu
    assert found.gpu_peak - without.gpu_peak >= word * size
    forward, step = (duration.part_flops(name, 17, (64, 48)) for name in ("sapiens2_tiny", "sapiens_tiny"))
    added = duration.flops_of_step(taught, 4, 0) - duration.flops_of_step(alone, 4, 0)
    assert added == 4 * forward.whole and 0.1 < forward.whole / step.whole < 10
    assert found.seconds > without.seconds


@pytest.mark.parametrize(("name", "chunked", "whole"), [("0.3b", 2.88, 9.06), ("1b", 6.47, 12.36), ("2b", 10.09, None)])
def test_the_chunked_head_saves_what_an_independent_prediction_says(
    name: str, chunked: float, whole: float | None
) -> None:
    """torch's MemTracker over a network with a checkpointed head: bf16, batch 32, no state but the weights, GiB.

    Taking the gradient in the forward needs no fp32 map of the whole batch, so ours may be lower by that.
    """
    stage = counted(f"sapiens_{name}_coco", "phase2")
    share = Share(rank=0, num_ranks=1, micro_batch=32, accumulation=1)
    for chunk, expected in ((4, chunked), (32, whole)):
        layout = Layout(checkpointed_blocks=stage.depth, head_chunk=chunk)
        found = plan.predict(stage, way("zero2_offload"), share, layout, Room(cuda=False))
        taken = (found.gpu_peak - found.gpu["zero_buckets"]) / GIB
        if expected:
            assert expected * 0.87 < taken < expected * 1.02, chunk


# ---- GPUs without a flash kernel


@pytest.mark.parametrize(("name", "math"), [("sapiens_2b_coco", 7.45), ("sapiens2_0.4b_coco", 4.26)])
def test_padded_attention_needs_little_more_and_the_math_kernel_far_more(name: str, math: float) -> None:
    """A checkpointed block at 32 people, GiB; `math` was measured on fake tensors with torch's MATH kernel."""
    plain, padded = (
        stages.measure_stage(recipe(name), "phase2", padded=padded).footprint_of(False).again(32) / GIB
        for padded in (False, True)
    )
    assert plain <= padded < 1.25 * plain and padded < 0.6 * math


def test_a_t4_is_planned_in_fp16_for_the_kernel_that_it_gets(capsys: pytest.CaptureFixture) -> None:
    words = ["--recipe", "sapiens_2b_coco", "--stage", "phase2", "--host_memory=64GiB", "--data.root=DIR", "--json"]
    peak = {}
    for capability, precision in (("7.5", "fp16"), ("8.0", "bf16")):
        memory.main([*words, "--gpu_memory", "15109MiB", "--capability", capability])
        found = json.loads(capsys.readouterr().out)
        assert {one["precision"] for one in found["strategies"]} == {precision}
        best = found["recommended"]
        assert best["micro_batch"] == 32 and best["gpu_peak_gib"] + best["gpu_allowance_gib"] < 15109 / 1024
        peak[capability] = best["gpu_peak_gib"]
    assert 0 < peak["7.5"] - peak["8.0"] < 0.5


# ---- What it chooses


@pytest.mark.parametrize(
    ("name", "by", "most"),
    [
        ("sapiens_0.3b_coco", "zero2", 8.0),
        ("sapiens_0.3b_coco", "plain", 8.0),
        ("sapiens_1b_coco", "zero2_offload", 9.5),
        ("sapiens_2b_coco", "zero2_offload", 13.5),
    ],
)
def test_batch_32_fits_a_16_gb_card_as_one_micro_batch(name: str, by: str, most: float) -> None:
    found = fitted(name, "phase2", by)
    assert found.fits and found.share.micro_batch == 32 and found.share.accumulation == 1
    assert found.gpu_peak / GIB <= most
    parts = {**found.later, **found.gpu}
    kept = found.layout.checkpointed_blocks * counted(name, "phase2").footprint_of(by == "plain").kept(32)
    working = parts.get("block_working_set", 0.0) + parts["head_chunk"]
    state = sum(found.gpu.get(part, 0.0) for part in ("weights", "masters", "adam", "gradients"))
    assert found.gpu_peak <= 1.15 * (state + kept + working)


@pytest.mark.parametrize(
    ("name", "stage", "device", "host"),
    [
        ("sapiens_1b_coco_lora", "phase2", 6.5, 8),
        ("sapiens_2b_coco_lora", "phase2", 10, 10),
        pytest.param("sapiens_2b_coco_lora", "ssl", 13, 11, marks=pytest.mark.slow),
    ],
)
def test_adapters_of_the_recipes_fit_a_notebook(name: str, stage: StageName, device: float, host: float) -> None:
    """On a T4 in fp16 with 12.7 GB of host memory; GiB. The 5B's bounds: `test_the_5b_with_a_rounded_base...`."""
    run = recipe(name, f"--stage={stage}")
    setting = choice.Setting(run=run, gpus=1, room=Room(device=13.75 * GIB, host=12.7e9), capability=(7, 5))
    (by,) = (one for one in strategies.list_ways(1, setting.precision) if one.name == "zero2")
    found = fitting.fit(setting.stage(stage), stage, by, setting.room)
    assert found.fits and found.share.global_batch == 32 and found.share.micro_batch == 16
    assert found.gpu_peak <= device * GIB and found.host_peak <= host * GIB


def test_the_1b_in_full_fits_a_desktop() -> None:
    found = fitted("sapiens_1b_coco", "phase2", "zero2_offload")
    assert found.gpu_peak <= 9.5 * GIB and found.host_peak <= 26 * GIB


@pytest.mark.parametrize(("ranks", "asked", "micro_batch"), [(1, 16, 16), (1, 12, 8), (4, 16, 8), (2, 1, 1)])
def test_a_largest_micro_batch_suits_any_number_of_gpus(ranks: int, asked: int, micro_batch: int) -> None:
    """Of 32 people: unlike a micro-batch it need not divide what a process has of them."""
    stage = counted("sapiens_0.3b_coco", "phase2", f"--memory.max_micro_batch={asked}")
    found = fitting.fit(stage, "phase2", way("plain", ranks))
    assert found.share.micro_batch == micro_batch and found.share.global_batch == 32


def test_ssl_of_the_1b_fits_a_16_gb_card() -> None:
    found = fitted("sapiens_1b_coco", "ssl", "zero2_offload+activations")
    assert found.fits and found.share.global_batch == 32


def test_a_teacher_makes_way_for_a_larger_micro_batch_only() -> None:
    """From room for everything to room for little: whole on the device wherever that costs no people."""
    stage, seen = counted("sapiens_0.3b_coco", "ssl"), []
    for tenths in (160, 120, 100, 90, 80, 75, 70):
        room = tenths / 10 * GIB
        alone, together = (fitting.fit(stage, "ssl", way("zero2", ranks), Room(device=room)) for ranks in (1, 4))
        assert alone.way.teacher != "sharded"
        for found in (alone, together):
            held = {
                place: fitting.fit(_keeping(stage, place), "ssl", found.way, Room(device=room))
                for place in ("device", "sharded", "host")
                if place != "sharded" or found is together
            }
            sizes = {place: one.share.micro_batch for place, one in held.items() if one.fits}
            if sizes:
                best = next(place for place, size in sizes.items() if size == max(sizes.values()))
                assert (found.fits, found.way.teacher) == (True, best)
                assert found == held[best]
            else:
                assert not found.fits
            seen.append(found.way.teacher)
    assert seen[0] == "device" and "host" in seen


def _keeping(stage: stages.Stage, place: str) -> stages.Stage:
    return replace(stage, memory=MemoryConfig(teacher=place))  # pyright: ignore[reportArgumentType]


def test_where_a_whole_teacher_does_not_fit_the_host_keeps_it() -> None:
    stage, by = counted("sapiens_1b_coco", "ssl"), way("zero2_offload+activations")
    least = fitting.fit(_keeping(stage, "device"), "ssl", by, Room(device=0.1 * GIB))
    room = least.gpu_peak + least.allowance - 0.1 * GIB
    assert not fitting.fit(_keeping(stage, "device"), "ssl", by, Room(device=room, host=1000 * GIB)).fits
    found = fitting.fit(stage, "ssl", by, Room(device=room, host=1000 * GIB))
    assert found.fits and found.way.teacher == "host" and "teacher in host memory" in str(found)
    assert found.host["ema_teacher"] == 4 * stage.num_parameters
    rest = found.host_peak - 0.1 * GIB
    assert not plan.predict(stage, found.way, found.share, found.layout, Room(device=room, host=rest)).fits
    assert fitting.fit(stage, "ssl", by, Room(device=139 * GIB, host=1000 * GIB)).way.teacher == "device"
    assert found.seconds > plan.predict(stage, by, found.share, found.layout).seconds


def test_a_teacher_cannot_be_shared_among_one() -> None:
    with pytest.raises(UserError, match=r"--memory.teacher sharded: there is only one .*expected device or host"):
        planned("demo", 15, "--stage", "ssl", "--memory.teacher", "sharded")
    assert planned("demo", 15, "--stage", "ssl", "--memory.teacher", "host")["ssl"].way.teacher == "host"
    assert planned("demo", 15, "--stage", "phase2", "--memory.teacher", "sharded")["phase2"].way.teacher == "device"
    stage = counted("demo", "ssl", "--memory.teacher=sharded")
    assert fitting.fit(stage, "ssl", way("zero2", 2)).way.teacher == "sharded"


def test_a_large_gpu_computes_nothing_twice() -> None:
    found = fitted("sapiens_0.3b_coco", "phase2", "zero2", room=139 * GIB)
    assert found.layout.checkpointed_blocks == 0 and found.share.micro_batch == 32
    # ... and on any, blocks are kept whole only while half of the memory stays free.
    for room in (8, 12, 24, 48):
        found = fitted("sapiens_0.3b_coco", "phase2", "zero2", room=room * GIB)
        assert found.fits
        assert found.layout.checkpointed_blocks == 24 or found.gpu_peak + found.allowance <= room * GIB / 2
        # No block stores everything where another is recomputed in full.
        layout = found.layout
        assert layout.checkpointed_blocks == 0 or layout.checkpointed_blocks + layout.selective_blocks == 24
    assert fitted("sapiens_0.3b_coco", "phase2", "zero2", room=24 * GIB).layout.selective_blocks > 0


def test_the_share_of_memory_for_what_could_be_recomputed_is_an_option() -> None:
    found = {}
    for share in (0.0, 0.5, 0.9):
        stage = counted("sapiens_0.3b_coco", "phase2", f"--memory.kept_share={share}")
        found[share] = fitting.fit(stage, "phase2", way("zero2"), Room(device=24 * GIB))
        assert found[share].gpu_peak + found[share].allowance <= max(share, 0.35) * 24 * GIB
    assert found[0.0].layout.checkpointed_blocks == 24
    assert found[0.9].seconds < found[0.5].seconds < found[0.0].seconds


def test_more_room_is_never_worse() -> None:
    found = [fitted("sapiens_1b_coco", "phase2", "zero2_offload", room=gib * GIB) for gib in range(4, 40, 2)]
    fitting = [one for one in found if one.fits]
    sizes = [one.share.micro_batch for one in fitting]
    assert len(fitting) >= 16 and sizes == sorted(sizes) and sizes[-1] == 32
    largest = [one.layout.checkpointed_blocks for one in fitting if one.share.micro_batch == 32]
    assert largest == sorted(largest, reverse=True)


def test_what_is_asked_for_is_not_chosen() -> None:
    words = ("--memory.micro_batch=4", "--memory.checkpointed_blocks=7", "--memory.head_chunk=3")
    stage = counted("sapiens_0.3b_coco", "phase2", *words)
    found = fitting.fit(stage, "phase2", way("zero2"), Room(device=ROOM))
    assert (found.share.micro_batch, found.share.accumulation) == (4, 8)
    assert found.layout == Layout(checkpointed_blocks=7, head_chunk=3)


def test_where_memory_does_not_limit_nothing_is_spared() -> None:
    found = fitting.fit(counted("demo", "phase2"), "phase2", way("plain"))
    assert found.layout == Layout() and found.share.micro_batch == 32 and found.fits


# ---- In a run


def planned(name: str, room_gib: float, *words: str, strategy: Strategy | None = None) -> dict:
    words = ("--recipe", name, *words)
    strategy = strategy or way("zero2").strategy
    launch = LaunchInfo(strategy=strategy, room=Room(device=room_gib * GIB, host=HOST), words=words)
    return planner.plan_stages(config.load(words), launch)


def test_a_run_that_cannot_fit_is_refused_with_the_nearest_that_can() -> None:
    with pytest.raises(UserError) as refused:
        planned("sapiens_1b_coco", 15, "--stage", "phase2", "--memory.micro_batch", "8", "--data.root", "DIR")
    text = str(refused.value)
    assert "\n" not in text and text.startswith("phase2: needs 2") and "15.0 GiB can be used" in text
    launch = "accelerate launch --config_file accelerate_configs/zero2_offload.yaml --num_processes 1 train.py "
    assert f"{launch}--recipe sapiens_1b_coco --stage phase2 --data.root DIR," in text
    assert "--memory.force" in text


def test_force_goes_on() -> None:
    found = planned("sapiens_1b_coco", 15, "--stage", "phase2", "--memory.force")["phase2"]
    assert not found.fits and found.share.micro_batch == 1


def test_a_gpu_too_small_for_anything_is_said() -> None:
    with pytest.raises(
        UserError,
        match=r"phase2: needs .*; phase2: no launch fits: GPU memory is the limit: .* What would fit: .*GPU memory",
    ):
        planned("sapiens_2b_coco", 0.5, "--stage", "phase2")


def test_host_memory_short_for_offload_is_said() -> None:
    words = ("--recipe", "sapiens_2b_coco", "--stage", "phase2")
    with pytest.raises(UserError, match=r"phase2: needs \d+\.\d GiB of host memory \(predicted\), 16\.0 GiB are free"):
        room = Room(device=ROOM, host=16 * GIB)
        launch = LaunchInfo(strategy=way("zero2_offload").strategy, room=room, words=words)
        planner.plan_stages(config.load(words), launch)


def test_what_to_try_next_takes_less() -> None:
    """Accumulating brings fp32 sums onto the device: for the 1B, offloading activations saves and 16 people do not."""
    chosen = planned("sapiens_1b_coco", 15, "--stage=phase2", strategy=way("zero2_offload").strategy)["phase2"]
    assert chosen.share.micro_batch == 32 and chosen.otherwise == "--memory.offload_activations"
    chosen = planned("sapiens_0.3b_coco", 15, "--stage=phase2")["phase2"]
    stage = counted("sapiens_0.3b_coco", "phase2", *chosen.otherwise.split())
    smaller = fitting.fit(stage, "phase2", way("zero2"), Room(device=ROOM))
    assert smaller.share.micro_batch < 32 and smaller.gpu_peak < 0.95 * chosen.gpu_peak


def test_a_chunk_holds_no_more_people_than_there_are() -> None:
    stage = counted("sapiens_0.3b_coco", "phase2")
    share = Share(rank=0, num_ranks=1, micro_batch=4, accumulation=8)
    peaks = [
        plan.predict(stage, way("zero2"), share, Layout(checkpointed_blocks=24, head_chunk=chunk)).gpu_peak
        for chunk in (4, 64)
    ]
    assert peaks[0] == peaks[1]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_the_5b_with_a_rounded_base_fits_a_notebook_as_two_micro_batches(kind: str) -> None:
    """A T4 in fp16 with 12.7 GB of host memory; ways that the options do not go with are not in the table."""
    if kind == "nf4":
        pytest.importorskip("bitsandbytes")
    run = recipe("sapiens2_5b_coco_lora", "--stage=phase2", f"--model.base_dtype={kind}")
    room = Room(device=13.75 * GIB, host=12.7e9)
    table = choice.Setting(run=run, gpus=1, room=room, capability=(7, 5)).table()
    assert not [found for found in table["phase2"] if found.way.strategy.zero == 3]
    best = choice.choose(table)
    assert best is not None and best[0].share.micro_batch == 16
    assert best[0].gpu_peak < 13.5 * GIB and best[0].host_peak < 12 * GIB
    stage = counted("sapiens2_5b_coco_lora", "phase2", f"--model.base_dtype={kind}")
    values = stage.num_parameters - stage.rounded
    each = {"nf4": 0.5 + 4 / 64, "int8": 1 + 4 / 2432}[kind]
    assert stage.rounded > 0.97 * 5.0e9
    assert best[0].gpu["weights"] == pytest.approx(2 * values + each * stage.rounded, rel=1e-3)


def test_the_command_is_what_a_shell_takes() -> None:
    words = ["--stage", "phase2", "--memory.adam_8bit", "true", "--output_dir", "a b", "--memory.offload_activations"]
    kept = strategies.without(words, "--memory.offload_activations", "--memory.adam_8bit")
    assert kept == ["--stage", "phase2", "--output_dir", "a b"]
    assert strategies.command(way("8bit"), kept).endswith(
        "train.py --stage phase2 --output_dir 'a b' --memory.adam_8bit"
    )


@pytest.mark.parametrize(
    ("strategy", "option", "said"),
    [
        (Strategy(zero=2), "--memory.adam_8bit", "without DeepSpeed"),
        (Strategy(zero=3), "--memory.compile_blocks", "ZeRO-3"),
        (Strategy(), "--memory.bf16_weights", "Add --memory.adam_8bit"),
        (Strategy(bf16=False), "--memory.adam_8bit --memory.bf16_weights", "expected bf16, found fp16"),
        (Strategy(), "--memory.adam_8bit --memory.bf16_weights --lora.rank=4", "not with --lora.rank"),
        (Strategy(zero=3), "--lora.rank=4 --lora.dora", "--lora.dora: not with ZeRO-3"),
        (Strategy(zero=3), "--lora.rank=4 --model.base_dtype=int8", "base_dtype int8: not with ZeRO-3"),
        (Strategy(), "--memory.checkpointed_blocks=99", "expected at most 4"),
        (Strategy(), "--memory.checkpointed_blocks=3 --memory.selective_blocks=2", "expected at most 4"),
        (Strategy(zero=3), "--memory.selective_blocks=2", "not with ZeRO-3"),
        (Strategy(), "--memory.selective_blocks=2 --memory.compile_blocks", "not with --memory.compile_blocks"),
        (Strategy(), "--memory.selective_blocks=2 --memory.offload_activations", "offload_activations, which moves"),
    ],
)
def test_options_that_do_not_go_together(strategy: Strategy, option: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        planned("demo", 15, "--stage", "phase2", *option.split(), strategy=strategy)


@pytest.mark.parametrize(
    ("words", "capability", "installed", "said"),
    [
        ("--recipe sapiens_0.3b_coco", (8, 0), True, "only for Sapiens2, .*found sapiens_0.3b"),
        ("--recipe sapiens2_0.4b_coco --memory.compile_blocks", (8, 0), True, "not with --memory.compile_blocks"),
        ("--recipe sapiens2_0.4b_coco", None, True, "only on GPUs"),
        ("--recipe sapiens2_0.4b_coco", (6, 1), True, r"expected compute capability 7\.0, found 6\.1"),
        ("--recipe sapiens2_0.4b_coco", (8, 0), False, "pip install liger-kernel"),
    ],
)
def test_fused_kernels_are_refused_where_there_are_none(
    words: str, capability: tuple[int, int] | None, installed: bool, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = config.load([*words.split(), "--stage=phase2", "--data.root=/", "--memory.fused_kernels"])
    launch = LaunchInfo(strategy=Strategy(), room=Room(device=int(40 * GIB)), words=[], capability=capability)
    monkeypatch.setattr(kernels, "missing_package", lambda: None if installed else "pip install liger-kernel")
    with pytest.raises(UserError, match=f"^--memory.fused_kernels: .*{said}") as refused:
        planner.plan_stages(run, launch)
    assert "\n" not in str(refused.value)
    with pytest.raises(UserError, match="not with ZeRO-3"):
        planner.plan_stages(
            config.load(["--recipe=sapiens2_0.4b_coco", "--stage=phase2", "--data.root=/", "--memory.fused_kernels"]),
            replace(launch, strategy=Strategy(zero=3)),
        )


def test_a_recommended_command_says_that_fused_kernels_are_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "missing_package", lambda: "pip install the_kernels")
    words = ["--recipe=sapiens2_0.4b_coco", "--stage=phase2", "--gpu=4090"]
    for more, missing in (([], []), (["--memory.fused_kernels"], ["  pip install the_kernels"])):
        memory.main([*words, *more])
        lines = capsys.readouterr().out.splitlines()
        recommended = lines[lines.index("Recommended:") + 1 :]
        assert recommended[:-1] == missing and "train.py" in recommended[-1]


def test_fused_kernels_are_in_the_layout_of_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    run = config.load(["--recipe=sapiens2_0.4b_coco", "--data.root=/", "--memory.fused_kernels"])
    monkeypatch.setattr(kernels, "missing_package", lambda: None)
    launch = LaunchInfo(strategy=Strategy(), room=Room(device=int(40 * GIB)), words=[], capability=(8, 0))
    chosen = planner.plan_stages(run, launch)
    assert {plan.layout.fused for plan in chosen.values()} == {True}
    without = planner.plan_stages(replace(run, memory=replace(run.memory, fused_kernels=False)), launch)
    assert {name: replace(plan.layout, fused=False) for name, plan in chosen.items()} == {
        name: plan.layout for name, plan in without.items()
    }


@pytest.mark.slow
def test_running_out_of_memory_in_a_run_saves_the_last_step(tmp_path: Path) -> None:
    """A CPU run in a process that may not grow: evaluating after 2 steps asks for far more than is left."""
    script = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from sapiens_accel.errors import run_main\n"
        "from sapiens_accel.train import main\n"
        "size = int(Path('/proc/self/status').read_text().split('VmSize:')[1].split()[0]) * 1024\n"
        "resource.setrlimit(resource.RLIMIT_AS, (size + 1500 * 2**20,) * 2)\n"
        "run_main(main)\n"
    )
    words = [
        "--stage=phase2", "--data.synthetic.num_train=8", "--data.synthetic.num_unlabelled=1",
        "--data.synthetic.num_val=260", "--data.num_workers=0", "--data.input_hw=[512,384]",
        "--phase2.global_batch=2", "--max_steps=4", "--eval_every=2", "--eval.batch_size=260", "--eval.flip=false",
        "--report_to=none", f"--output_dir={tmp_path / 'run'}",
    ]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": "1", "SAPIENS_ACCEL_CACHE": str(tmp_path)}
    run = partial(subprocess.run, cwd=ROOT, capture_output=True, text=True, check=False, env=env)
    done = run([sys.executable, "-c", script, *words])
    assert done.returncode == 2, done.stdout + done.stderr
    checkpoint = tmp_path / "run" / "phase2" / "checkpoints" / "step_2"
    said = f"phase2: out of memory with micro-batch 2. The state is saved in {checkpoint}: resume with "
    assert f"{said}--resume_from_checkpoint latest and --memory.micro_batch 1" in done.stderr
    assert "Traceback" not in done.stderr
    again = [*words, "--resume_from_checkpoint=latest", "--memory.micro_batch=1", "--eval.split=train"]
    done = run([sys.executable, "train.py", *again])
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert "phase2: steps 3 to 4, 2 people a step = 1 process x 1 x 2 accumulated" in done.stdout
    assert lines[-1]["step"] == 4


# ---- python -m sapiens_accel.memory


def said(*words: str) -> subprocess.CompletedProcess:
    return forks.run(["-m", "sapiens_accel.memory", *words])


def test_the_command_prints_every_way_and_the_launch() -> None:
    words = "--recipe sapiens_0.3b_coco --stage phase2 --data.root DIR"
    done = said(*words.split(), "--host_memory", "64GiB", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    best = found["recommended"]
    assert {"strategy", "micro_batch", "gpu_peak_gib", "host_gib", "command", "parts"} <= set(best)
    assert best in found["strategies"] and best["fits"]
    assert [one["strategy"] for one in found["strategies"]] == [one.name for one in strategies.list_ways(1)]
    for one in found["strategies"]:
        assert sum(one["parts"]["gpu"].values()) == pytest.approx(one["gpu_peak_gib"], abs=2e-3)
        assert sum(one["parts"]["host"].values()) == pytest.approx(one["host_gib"], abs=2e-3)
        total = one["gpu_peak_gib"] + one["gpu_allowance_gib"]
        assert one["fits"] == (total <= 16 and one["host_gib"] <= 64)
        assert (one["not_recommended"] is None) == (one == best)
        assert one["hours"] == pytest.approx(100 * 149_813 / one["people_per_second"] / 3600, rel=0.01)
    launch = f"accelerate_configs/{best['strategy']}.yaml"
    launched = f"accelerate launch --config_file {launch} --num_processes 1 train.py"
    assert best["command"] == f"{launched} {words} --weights WEIGHTS"
    assert (ROOT / launch).is_file()


def test_the_table_is_explained_and_the_command_names_what_it_still_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    host = ["--host_memory", "64GiB"]
    memory.main(["--recipe", "sapiens_0.3b_coco", "--stage", "phase2", *host])
    printed = capsys.readouterr().out
    for column in ("way", "micro-batch", "checkpointed", "head chunk", "GPU peak", "host", "people/s", "hours"):
        assert re.search(rf"(^|; ){column}: ", memory.COLUMNS.replace("\n", " ").strip()), column
    assert memory.COLUMNS in printed
    assert printed.endswith("--stage phase2 --data.root DIR --weights WEIGHTS\n")
    # What phase1 left in the run directory is what phase2 begins with.
    weights = tmp_path / "runs" / "sapiens_0.3b_coco" / "phase1" / "weights"
    weights.mkdir(parents=True)
    (weights / "model.safetensors").touch()
    memory.main(["--recipe", "sapiens_0.3b_coco", "--stage", "phase2", *host])
    assert capsys.readouterr().out.endswith("--stage phase2 --data.root DIR\n")
    memory.main(["--recipe", "demo"])
    assert capsys.readouterr().out.endswith("sapiens-accel train --launch zero2 --num_processes 1 --recipe demo\n")


def test_several_gpus_share_the_state() -> None:
    by_ranks = [fitted("sapiens_1b_coco", "phase2", "zero2", ranks=ranks) for ranks in (1, 2, 4)]
    assert [found.fits for found in by_ranks] == [False, True, True]
    assert [one.launch for one in strategies.list_ways(4) if one.name in ("plain", "zero1")] == ["multi_gpu", "zero1"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--gpu_memory", "16potatoes"], "--gpu_memory 16potatoes: expected a size with its unit"),
        (["--gpu_memory", "16"], "expected a size with its unit"),
        (["--host_memory", "0GiB"], "--host_memory 0GiB"),
        (["--gpus", "0"], "--gpus 0: expected 1 or more"),
        (["--capability", "6.1"], "--capability 6.1: expected the compute capability of a GPU, 7.0 or newer"),
        (["--gpu", "3070"], "--gpu 3070: not in the table (expected one of T4, V100, "),
        (["--people", "0"], "--people 0: expected 1 or more"),
        (["--capability", "new"], "--capability new: expected"),
        (["--gpus", "3", "--recipe", "demo"], "--phase1.global_batch 32 is not divisible by 3 processes"),
        (["--gpus", "1", "--recepie", "demo"], "--recepie"),
    ],
)
def test_bad_input_is_one_line(words: list[str], expected: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(UserError) as error:
        memory.main(words)
    assert expected in str(error.value) and "\n" not in str(error.value)
    assert not capsys.readouterr().out


def test_a_micro_batch_has_a_whole_number_of_unlabeled_people() -> None:
    """Of 12 labeled people with half as many unlabeled ones: micro-batches of 12, 6, 4 and 2, not of 3 and 1."""
    half = counted("demo", "ssl", "--ssl.teacher.ratio=0.5", "--ssl.global_batch=12")
    assert fitting.divide(half.plan, 12, 12) == [12, 6, 4, 2] and fitting.divide(half.plan, 12, 5) == [4, 2]
    for rooms in (None, 1.0):  # too little for any: the smallest
        room = Room(device=rooms, host=1000 * GIB)
        assert fitting.fit(half, "ssl", way("plain"), room).share.micro_batch == (2 if rooms else 12)
    assert [half.plan.num_unlabeled(n) for n in (0, 2, 12)] == [0, 1, 6]
    words = ["--ssl.teacher.ratio=0.5", "--ssl.global_batch=12"]
    with pytest.raises(UserError, match=r"max_micro_batch 1: no whole number of .* at least 2, for --ssl"):
        fitting.fit(counted("demo", "ssl", *words, "--memory.max_micro_batch=1"), "ssl", way("plain"))
    with pytest.raises(UserError, match=r"teacher.ratio 1e-07: no whole .* Use 0\.5, 0\.25 or a whole number$"):
        fitting.fit(counted("demo", "ssl", "--ssl.teacher.ratio=1e-7"), "ssl", way("plain"))
    third = counted("demo", "ssl", "--ssl.teacher.ratio=0.33333").plan
    assert [n for n in (1, 2, 3, 48, 50) if third.pairs_with(n)] == [3, 48] and third.num_unlabeled(48) == 16
    for more, ranks, expected in (
        (
            ["--memory.micro_batch=3"],
            1,
            "with 3 labeled ones in micro-batches (--memory.micro_batch). Make that number",
        ),
        ([], 4, "with 3 labeled ones in --ssl.global_batch on 4 processes. Make that number a multiple of 2"),
    ):
        with pytest.raises(UserError) as error:
            fitting.fit(counted("demo", "ssl", *words, *more), "ssl", way("zero2", ranks))
        assert f"--ssl.teacher.ratio 0.5: no whole number of unlabeled people comes {expected}" in str(error.value)


@pytest.mark.parametrize(
    ("text", "num"), [("16GiB", 2**34), ("16 gib", 2**34), ("24GB", 24e9), ("15360MiB", 15 * 2**30)]
)
def test_sizes(text: str, num: float) -> None:
    assert memory.parse_bytes("gpu_memory", text) == num


def test_the_5b_is_planned_without_its_20_gb() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = fitted("sapiens2_5b_coco", "phase2", "zero3_offload")
    assert found.fits and found.share.global_batch == 32
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 0.5 * GIB
