"""The same losses on 1 and 2 processes, plain and under ZeRO 0 to 3, with and without accumulation; really sharded."""

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import forks
import pytest
import torch
from planted import Planted, redescribe
from safetensors.torch import load_file

from sapiens_accel.runtime import engine

ROOT = Path(__file__).parents[2]
REAL = (ROOT / os.environ.get("SAPIENS_ACCEL_TEST_DATA", "../shared/data") / "coco_mini").resolve()
RELATIVE = 1e-5
STEPS = 20
GLOBAL_BATCH = 8

pytestmark = pytest.mark.launch

COMMON = [
    "--data.synthetic.num_train=24", "--data.synthetic.num_unlabelled=16", "--data.synthetic.num_val=6",
    "--data.num_workers=0", "--data.input_hw=[64,48]", "--log_every=1", "--report_to=none",
    "--eval.num_pictures=0", "--eval.num_worst=0",
    *(f"--{stage}.{knob}" for stage in ("phase1", "phase2", "ssl")
      for knob in (f"steps={STEPS}", f"global_batch={GLOBAL_BATCH}", "optim.warmup_steps=2", "loss_weight=100")),
    "--phase2.optim.layer_decay=0.8", "--phase2.optim.clip_norm=0.05", "--ssl.teacher.threshold=0.2",
    "--ssl.hand_over=last",
]  # fmt: skip

# What the memory plan may choose, from nothing to everything; the reference runs without any of it.
SPARING = (
    [],
    ["--memory.head_chunk=1", "--memory.checkpointed_blocks=4"],
    ["--memory.head_chunk=3", "--memory.checkpointed_blocks=2", "--memory.offload_activations=true"],
)


def job(folder: Path, *, stage: str, micro_batch: int, zero: int | None = None, extra: Iterable[str] = ()) -> dict:
    """One call of train.main; its run folder is `folder`."""
    argv = [*COMMON, f"--stage={stage}", f"--output_dir={folder}", f"--memory.micro_batch={micro_batch}", *extra]
    env = {} if zero is None else {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(deepspeed_config(folder.parent, zero))}
    return {"argv": argv, "env": env}


def deepspeed_config(folder: Path, zero: int) -> Path:
    """The shipped JSON of a ZeRO stage; stage 0 is stage 1's with the number changed."""
    if zero:
        return ROOT / "ds_configs" / f"zero{zero}.json"
    tree = json.loads((ROOT / "ds_configs" / "zero1.json").read_text())
    path = folder / "zero0.json"
    path.write_text(json.dumps({**tree, "zero_optimization": {"stage": 0}}))
    return path


def launch(jobs: list[dict], cache: Path, *, processes: int, deepspeed: bool) -> str:
    """All jobs in one launch: building the process group costs more than the training. Returns what it said."""
    listing = cache / f"jobs_{processes}_{deepspeed}.json"
    listing.write_text(json.dumps(jobs))
    env = {
        **os.environ,
        "SAPIENS_ACCEL_CACHE": str(cache),
        "ACCELERATE_MIXED_PRECISION": "no",
        "ACCELERATE_USE_DEEPSPEED": str(deepspeed).lower(),
    }
    done = forks.run(["tests/parity.py", listing], env=env, processes=processes, grouped=deepspeed)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def losses(folder: Path, stage: str) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["stage"] == stage and "loss" in line]


def assert_same(folder: Path, reference: Path, stage: str) -> None:
    found, expected = losses(folder, stage), losses(reference, stage)
    assert len(found) == len(expected) == STEPS
    assert found == pytest.approx(expected, rel=RELATIVE), folder.name


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def reference(cache) -> Path:
    """Plain, one process, whole batches, all three stages."""
    folder = cache / "reference"
    extra = ["--save_every=8", "--keep_checkpoints=3"]
    launch([job(folder, stage="all", micro_batch=GLOBAL_BATCH, extra=extra)], cache, processes=1, deepspeed=False)
    # It learns, and the teacher has something to say: equal losses of a dead network would prove nothing.
    assert losses(folder, "phase2")[-1] < 0.95 * losses(folder, "phase2")[0]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert max(line.get("keep", 0) for line in lines) > 0.05
    return folder


def after(reference: Path) -> list[str]:
    return [f"--weights={reference / 'phase2' / 'weights'}"]


SLOW = pytest.mark.slow
ALL_RUNS = tuple((zero, accumulation) for zero in (0, 1, 2, 3) for accumulation in (1, 2))


# By default 4 of the 12 runs, in two processes: ZeRO-2 and ZeRO-3, each in two stages.
@pytest.mark.parametrize(
    ("processes", "runs"),
    [
        pytest.param(1, ALL_RUNS, marks=SLOW, id="1"),
        pytest.param(2, ALL_RUNS, marks=SLOW, id="2"),
        pytest.param(2, ((2, 1), (3, 2)), id="2-some"),
    ],
)
def test_deepspeed_equals_plain(processes, runs, cache, reference):
    start = [f"--weights={reference / 'phase1' / 'weights'}"]
    jobs, expected, name = [], [], f"p{processes}-{len(runs)}"
    for index, (zero, accumulation) in enumerate(runs):
        folder = cache / f"{name}-z{zero}-a{accumulation}"
        micro_batch = GLOBAL_BATCH // processes // accumulation
        extra = [*start, *SPARING[index % len(SPARING)]]
        jobs.append(job(folder, stage="phase2", micro_batch=micro_batch, zero=zero, extra=extra))
        expected.append((folder, "phase2"))
    others = [
        (3, "phase1", SPARING[1]),  # the head is all that learns, and ZeRO-3 gathers it as a whole
        (2, "ssl", [*after(reference), *SPARING[2]]),
        (2, "phase1", SPARING[1]),
        (3, "ssl", [*after(reference), *SPARING[1]]),
    ]
    for zero, stage, extra in others if runs == ALL_RUNS else others[:2]:
        folder = cache / f"{name}-z{zero}-{stage}"
        jobs.append(job(folder, stage=stage, micro_batch=GLOBAL_BATCH // processes // 2, zero=zero, extra=extra))
        expected.append((folder, stage))
    launch(jobs, cache, processes=processes, deepspeed=True)
    for folder, stage in expected:
        assert_same(folder, reference, stage)


@pytest.mark.parametrize(
    ("zero", "stage", "precision"),
    [
        pytest.param(1, "phase1", "bf16", marks=SLOW), (2, "phase2", "no"),
        pytest.param(3, "phase2", "bf16", marks=SLOW),
        pytest.param(2, "ssl", "no", marks=SLOW),
    ],
)  # fmt: skip
def test_a_resumed_run_continues_bit_for_bit(zero, stage, precision, cache, reference):
    """Cut after 8 of 20 steps and continued, in two processes: the same 20 losses, to the last digit.

    In ssl also with what evaluations decide: a fitted confidence, and which weights are handed over.
    """
    start = after(reference) if stage == "ssl" else [f"--weights={reference / 'phase1' / 'weights'}"]
    if stage == "ssl":
        start += ["--eval_every=4", "--ssl.hand_over=best", "--ssl.teacher.confidence=calibrated"]
    resumed, whole = cache / f"resumed-z{zero}-{stage}", cache / f"whole-z{zero}-{stage}"
    run = {"stage": stage, "micro_batch": 2, "zero": zero}
    cut = job(resumed, **run, extra=[*start, "--max_steps=8", "--save_every=4"])
    # Other processes load the images then, and another number of them.
    more = ["--resume_from_checkpoint=latest", "--save_every=100", f"--data.num_workers={zero % 2}"]
    again = job(resumed, **run, extra=[*start, *more])
    jobs = [cut, again, job(whole, **run, extra=start)]
    for one in jobs:
        one["env"]["ACCELERATE_MIXED_PRECISION"] = precision
    launch(jobs, cache, processes=2, deepspeed=True)
    assert len(losses(resumed, stage)) == STEPS
    assert losses(resumed, stage) == losses(whole, stage)
    assert sorted(path.name for path in (resumed / stage / "checkpoints").glob("step_*")) == ["step_20", "step_8"]
    if stage == "ssl":
        files = ("begin.json", "kept.json", "eval.json", "weights/model.safetensors", "student/model.safetensors")
        assert all((resumed / stage / name).read_bytes() == (whole / stage / name).read_bytes() for name in files)


@pytest.mark.slow
def test_adapters_train_alike_under_every_stage_of_zero_and_are_resumed(cache, reference):
    """phase2 and ssl with adapters, on 2 processes under ZeRO 1 to 3, against a plain run; ZeRO-2 and 3 cut in two.

    Then on another number of processes, and from plain to ZeRO-2: the base and the checkpoint's adapters.
    """
    lora = ["--lora.rank=4", "--data.synthetic.num_val=2"]
    starts = {"phase2": [f"--weights={reference / 'phase1' / 'weights'}", *lora], "ssl": [*after(reference), *lora]}
    cut, again = ["--max_steps=8", "--save_every=8"], ["--resume_from_checkpoint=latest"]
    plain = {stage: cache / f"lora-{stage}" for stage in starts}
    jobs = [
        job(
            plain[stage],
            stage=stage,
            micro_batch=GLOBAL_BATCH,
            extra=[*start, "--save_every=8", "--keep_checkpoints=3"],
        )
        for stage, start in starts.items()
    ]
    launch(jobs, cache, processes=1, deepspeed=False)
    jobs, expected = [], []
    for zero in (1, 2, 3):
        for stage, start in starts.items():
            folder = cache / f"lora-{stage}-z{zero}"
            for extra in ([],) if zero == 1 else (cut, again):
                run = {"stage": stage, "micro_batch": 2, "zero": zero}
                jobs.append(job(folder, **run, extra=[*start, *SPARING[zero - 1], *extra]))
            expected.append((folder, stage))
    launch(jobs, cache, processes=2, deepspeed=True)
    for folder, stage in expected:
        assert_same(folder, plain[stage], stage)
    moved, fresh = cache / "lora-moved", cache / "lora-fresh"
    run = {"stage": "ssl", "micro_batch": 2, "zero": 2}
    steps = [(moved, cache / "lora-ssl-z2" / "ssl"), (fresh, plain["ssl"] / "ssl")]
    jobs = [
        job(folder, **run, extra=[*starts["ssl"], f"--resume_from_checkpoint={there / 'checkpoints' / 'step_8'}"])
        for folder, there in steps
    ]
    said = launch(jobs, cache, processes=1, deepspeed=True)
    assert "converted by DeepSpeed's universal checkpoint" in said and "the optimizer's state is NOT" in said
    expected = losses(plain["ssl"], "ssl")[8:]
    assert losses(moved, "ssl") == pytest.approx(expected, rel=RELATIVE)
    assert losses(fresh, "ssl")[0] == pytest.approx(expected[0], rel=RELATIVE)


@pytest.mark.slow
def test_adapters_on_a_rounded_base_train_alike_under_zero_1_and_2(cache, reference):
    """2 processes against a plain one; ZeRO-2 cut in two. ZeRO-3 is refused."""
    pytest.importorskip("bitsandbytes")
    start = [f"--weights={reference / 'phase1' / 'weights'}", "--lora.rank=4", "--model.base_dtype=nf4"]
    start += ["--data.synthetic.num_val=2"]
    plain = cache / "nf4"
    launch([job(plain, stage="phase2", micro_batch=GLOBAL_BATCH, extra=start)], cache, processes=1, deepspeed=False)
    folders = [cache / f"nf4-z{zero}" for zero in (1, 2)]
    cut, again = ["--max_steps=8", "--save_every=8"], ["--resume_from_checkpoint=latest"]
    jobs = [
        job(folder, stage="phase2", micro_batch=2, zero=zero, extra=[*start, *extra])
        for zero, folder in zip((1, 2), folders, strict=True)
        for extra in (([],) if zero == 1 else (cut, again))
    ]
    launch(jobs, cache, processes=2, deepspeed=True)
    for folder in folders:
        assert_same(folder, plain, "phase2")


@pytest.mark.slow
def test_a_run_is_resumed_with_another_micro_batch(cache, reference):
    """A checkpoint stands between two optimizer steps of any accumulation."""
    folder, start = cache / "regrouped", [f"--weights={reference / 'phase1' / 'weights'}"]
    run = {"stage": "phase2", "zero": 2}
    two = [job(folder, **run, micro_batch=2, extra=[*start, "--max_steps=7", "--save_every=7"])]
    two += [job(folder, **run, micro_batch=1, extra=[*start, "--resume_from_checkpoint=latest"])]
    launch(two, cache, processes=2, deepspeed=True)
    assert_same(folder, reference, "phase2")


@pytest.mark.slow
def test_a_run_goes_on_in_another_world(cache, reference):
    """Cut after 8 of 20 steps: ZeRO-2 from 2 processes to 1 and back, with the optimizer; from plain, without it."""
    # A decay so strong that a group with another one's settings would be seen.
    heavy = [f"--weights={reference / 'phase1' / 'weights'}", "--phase2.optim.weight_decay=20"]
    cut, again = ["--max_steps=8", "--save_every=8"], ["--resume_from_checkpoint=latest"]
    run = {"stage": "phase2", "micro_batch": 2, "zero": 2}
    whole, down, up = cache / "heavy-whole", cache / "heavy-down", cache / "heavy-up"
    ssl = {"stage": "ssl", "micro_batch": 2, "zero": 2}
    ssl_down = cache / "ssl-down"
    jobs = [job(whole, **run, extra=heavy), job(down, **run, extra=[*heavy, *cut])]
    launch([*jobs, job(ssl_down, **ssl, extra=[*after(reference), *cut])], cache, processes=2, deepspeed=True)
    plain, fresh = reference / "ssl" / "checkpoints" / "step_8", cache / "ssl-from-plain"
    jobs = [job(down, **run, extra=[*heavy, *again]), job(up, **run, extra=[*heavy, *cut])]
    jobs += [job(ssl_down, **ssl, extra=[*after(reference), *again])]
    jobs += [job(fresh, **ssl, extra=[*after(reference), f"--resume_from_checkpoint={plain}"])]
    said = launch(jobs, cache, processes=1, deepspeed=True)
    assert said.count("saved by 2 processes, ZeRO-2, fp32: converted by DeepSpeed's universal checkpoint") == 2
    assert "saved by 1 process, no ZeRO, fp32: weights, step and teacher are restored, the optimizer" in said
    said = launch([job(up, **run, extra=[*heavy, *again])], cache, processes=2, deepspeed=True)
    assert "saved by 1 process, ZeRO-2, fp32: converted by DeepSpeed's universal checkpoint" in said
    for folder in (down, up):
        assert_same(folder, whole, "phase2")
    assert_same(ssl_down, reference, "ssl")
    # The next loss is the uninterrupted run's; what follows is not, without its moments.
    found, expected = losses(fresh, "ssl"), losses(reference, "ssl")[8:]
    assert len(found) == STEPS - 8 and found[0] == pytest.approx(expected[0], rel=RELATIVE)
    assert not list(cache.glob("*/*/checkpoints/*/universal.tmp"))


@pytest.mark.slow
def test_other_settings_of_the_optimizer_apply_on_every_path(cache, reference):
    """Resumed with other betas, decays and clipping: ZeRO 1 to 3 and a universal checkpoint do as a plain run does."""
    start = [f"--weights={reference / 'phase1' / 'weights'}"]
    cut, again = [*start, "--max_steps=8", "--save_every=8"], [*start, "--resume_from_checkpoint=latest"]
    other = {"optim.betas": "[0.5,0.9]", "optim.weight_decay": 20, "optim.layer_decay": 0.4, "optim.clip_norm": 0.02}
    again += [f"--phase2.{name}={value}" for name, value in other.items()]
    plain = cache / "other-plain"
    run = {"stage": "phase2", "micro_batch": 2}
    whole = {"stage": "phase2", "micro_batch": GLOBAL_BATCH}
    jobs = [job(plain, **whole, extra=cut), job(plain, **whole, extra=again)]
    there = reference / "phase2" / "checkpoints" / "step_8"
    for name, value in other.items():
        alone = [*start, f"--resume_from_checkpoint={there}", f"--phase2.{name}={value}"]
        jobs.append(job(cache / f"other-{name}", **whole, extra=alone))
    launch(jobs, cache, processes=1, deepspeed=False)
    folders = {zero: cache / f"other-z{zero}" for zero in (1, 2, 3)}
    jobs = [job(folder, **run, zero=zero, extra=extra) for zero, folder in folders.items() for extra in (cut, again)]
    down = cache / "other-down"
    launch([*jobs, job(down, **run, zero=2, extra=cut)], cache, processes=2, deepspeed=True)
    launch([job(down, **run, zero=2, extra=again)], cache, processes=1, deepspeed=True)
    for folder in (*folders.values(), down):
        assert_same(folder, plain, "phase2")
    for name in other:  # each of them is seen in the losses
        assert losses(cache / f"other-{name}", "phase2")[-1] != losses(reference, "phase2")[-1], name


@pytest.mark.slow
def test_a_planted_pickle_of_deepspeed_is_not_executed(cache, reference, tmp_path):
    """Each file of a ZeRO-2 checkpoint in turn, by the scan; one of them, by a whole launch."""
    folder, trace = cache / "planted", tmp_path / "trace"
    run = {"stage": "phase2", "micro_batch": 2, "zero": 2}
    start = [f"--weights={reference / 'phase1' / 'weights'}"]
    cut = job(folder, **run, extra=[*start, "--max_steps=2", "--save_every=2"])
    launch([cut], cache, processes=2, deepspeed=True)
    saved = folder / "phase2" / "checkpoints" / "step_2"
    files = [path for path in (saved / "state").rglob("*") if path.suffix in engine.PICKLES]
    assert len(files) == 5
    with torch.serialization.safe_globals(engine.safe_classes(True)):
        assert engine._find_unsafe(saved / "state") is None
        for file in files:
            whole = file.read_bytes()
            torch.save({"optimizer_state_dict": Planted(trace)}, file)
            assert f"{file}: " in str(engine._find_unsafe(saved / "state"))
            file.write_bytes(pickle.dumps(Planted(trace)))  # not a file of torch.save
            assert f"{file}: " in str(engine._find_unsafe(saved / "state"))
            file.write_bytes(whole)
    torch.save(
        {"optimizer_state_dict": Planted(trace)}, saved / "state" / "pytorch_model" / "mp_rank_00_model_states.pt"
    )
    redescribe(saved)
    for processes in (1, 2):  # by the universal checkpoint's converter, and as it is
        again = job(folder, **run, extra=[*start, "--resume_from_checkpoint=latest"])
        with pytest.raises(AssertionError, match=r"mp_rank_00_model_states.pt: .*mkdir.*--trust_checkpoint"):
            launch([again], cache, processes=processes, deepspeed=True)
        assert not trace.exists()


@pytest.mark.slow
def test_a_step_without_numbers_changes_nothing(cache, reference):
    """One rank's loss is NaN in 2 of 20 steps: all leave them out, name the people, and go on as a plain run does."""
    start, broken = [f"--weights={reference / 'phase1' / 'weights'}"], [3, 7]
    plain, zero2, bf16 = cache / "nan-plain", cache / "nan-zero2", cache / "nan-bf16"
    jobs = [job(folder, stage="phase2", micro_batch=2, zero=2, extra=start) for folder in (zero2, bf16)]
    jobs[1]["env"]["ACCELERATE_MIXED_PRECISION"] = "bf16"
    launch([one | {"without_number": broken} for one in jobs], cache, processes=2, deepspeed=True)
    one = job(plain, stage="phase2", micro_batch=GLOBAL_BATCH, extra=start) | {"without_number": broken}
    launch([one], cache, processes=1, deepspeed=False)
    kept = [step for step in range(STEPS) if step + 1 not in broken]
    found, expected, unbroken = (losses(folder, "phase2") for folder in (zero2, plain, reference))
    assert [step + 1 for step in range(STEPS) if found[step] is None] == broken
    assert [found[step] for step in kept] == pytest.approx([expected[step] for step in kept], rel=RELATIVE)
    assert found[:2] == pytest.approx(unbroken[:2], rel=RELATIVE) and abs(found[3] / unbroken[3] - 1) > RELATIVE
    assert [losses(bf16, "phase2")[step] for step in kept] == pytest.approx([found[step] for step in kept], rel=2e-2)
    for folder, people in ((zero2, 4), (bf16, 4), (plain, 8)):  # of the rank whose loss was no number
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        left_out = [line for line in lines if "ann_ids" in line]
        assert [(line["step"], line["skipped_in_a_row"]) for line in left_out] == [(step, 1) for step in broken]
        assert all(len(line["ann_ids"]) == people for line in left_out)
        weights = load_file(folder / "phase2" / "weights" / "model.safetensors")
        assert all(value.isfinite().all() for value in weights.values())


@pytest.mark.slow
def test_a_teacher_kept_elsewhere_goes_on_bit_for_bit(cache, reference):
    """Cut after 8 of 20 steps of ssl in two processes, its average in parts on each or on their host.

    In fp32 that changes no bit of the run that keeps it whole and is not cut; in bf16, none of the run that is not cut.
    """
    jobs: list[dict] = []

    def add(name: str, place: str, *, cut: bool, precision: str) -> Path:
        folder = cache / f"teacher-{precision}-{name}"
        words = [*after(reference), f"--memory.teacher={place}"]
        steps = [["--max_steps=8", "--save_every=8"], ["--resume_from_checkpoint=latest"]] if cut else [[]]
        for extra in steps:
            one = job(folder, stage="ssl", micro_batch=2, zero=2, extra=[*words, *extra])
            one["env"]["ACCELERATE_MIXED_PRECISION"] = precision
            jobs.append(one)
        return folder

    whole = {precision: add("whole", place, cut=False, precision=precision)
             for precision, place in (("no", "device"), ("bf16", "sharded"))}  # fmt: skip
    resumed = [(add(place, place, cut=True, precision=precision), precision)
               for place, precision in (("sharded", "no"), ("host", "no"), ("host", "bf16"))]  # fmt: skip
    launch(jobs, cache, processes=2, deepspeed=True)
    assert_same(whole["no"], reference, "ssl")
    assert losses(whole["bf16"], "ssl") == pytest.approx(losses(reference, "ssl"), rel=2e-2)
    for folder, precision in resumed:
        assert len(losses(folder, "ssl")) == STEPS
        assert losses(folder, "ssl") == losses(whole[precision], "ssl")
        for written in ("weights", "student"):
            found, expected = (
                load_file(run / "ssl" / written / "model.safetensors") for run in (folder, whole[precision])
            )
            assert found.keys() == expected.keys()
            assert all(torch.equal(value, expected[name]) for name, value in found.items())
            # In 16 bits there is the copy for the forward; what is written is the average.
            assert any(not torch.equal(value, value.bfloat16().float()) for value in found.values())


def test_plain_processes_and_accumulation_equal_one_batch(cache, reference):
    folder = cache / "ddp"
    launch([job(folder, stage="all", micro_batch=2)], cache, processes=2, deepspeed=False)
    for stage in ("phase1", "phase2", "ssl"):
        assert_same(folder, reference, stage)


@pytest.mark.slow
def test_bf16_follows_fp32(cache, reference):
    """A bf16 engine with fp32 masters, accumulated, in a supervised stage and in ssl: within 2 % of fp32's losses."""
    start = {"phase2": [f"--weights={reference / 'phase1' / 'weights'}"], "ssl": after(reference)}
    jobs = [
        job(cache / f"bf16-{stage}", stage=stage, micro_batch=4, zero=2, extra=[*extra, *SPARING[2]])
        for stage, extra in start.items()
    ]
    for one in jobs:
        one["env"]["ACCELERATE_MIXED_PRECISION"] = "bf16"
    launch(jobs, cache, processes=1, deepspeed=True)
    for stage in start:
        assert losses(cache / f"bf16-{stage}", stage) == pytest.approx(losses(reference, stage), rel=2e-2)
    # The weights that are handed on are the masters, not what bf16 rounds them to.
    weights = load_file(cache / "bf16-phase2" / "phase2" / "weights" / "model.safetensors")
    head = weights["head.final_layer.weight"]
    assert head.dtype == torch.float32 and not torch.equal(head, head.bfloat16().float())


@pytest.mark.slow
@pytest.mark.skipif(not (REAL / "train2017").is_dir(), reason=f"no real images: {REAL} (SAPIENS_ACCEL_TEST_DATA)")
def test_the_shipped_launch_trains_real_people_on_a_cpu(cache):
    """The README's command for machines without a GPU, unchanged: ZeRO-2, two processes, gloo chosen by itself."""
    folder = cache / "launched"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "accelerate_configs/zero2.yaml"]
    command += ["--num_processes", "2", "--mixed_precision", "no", "train.py", f"--data.root={REAL}"]
    command += [word for word in COMMON if not word.startswith("--data.synthetic")]
    env = {**os.environ, "SAPIENS_ACCEL_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, f"--output_dir={folder}", "--max_steps=2"],
        cwd=ROOT, env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "2 processes on CPU, ZeRO-2, fp32" in done.stdout
    assert "people: 86 train, 68 val, " in done.stdout
    for stage in ("phase1", "phase2", "ssl"):
        assert len(losses(folder, stage)) == 2
        assert 0 <= json.loads((folder / stage / "eval.json").read_text())["AP"] <= 1
