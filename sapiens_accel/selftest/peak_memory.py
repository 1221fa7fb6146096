"""Compare the predicted and the measured peak memory of a training step, each case in a separate process.

python -m sapiens_accel.selftest.peak_memory RESULT.json MODEL STAGE WAY [--capability 7.5] [--limit 15GiB] ...
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sapiens_accel  # isort: skip  # noqa: F401  (before torch: it sets how threads wait)
import torch
import yaml

from sapiens_accel.config.schema import Config, StageName
from sapiens_accel.data.sampling import Share
from sapiens_accel.errors import UserError, run_main
from sapiens_accel.memory import report
from sapiens_accel.memory.estimate import Plan, Room, predict
from sapiens_accel.memory.fitting import fit
from sapiens_accel.memory.stages import Stage, measure_stage
from sapiens_accel.memory.strategies import Way, list_ways
from sapiens_accel.models import kernels
from sapiens_accel.models.sapiens import Layout
from sapiens_accel.runtime import distributed, host
from sapiens_accel.runtime.files import GIB
from sapiens_accel.selftest.checks import REPOSITORY, Result, Row, Skipped, environment, inspect_machine
from sapiens_accel.selftest.training_step import (
    Measurement,
    TrainingCase,
    bytes_made_before,
    measure_on_cpu,
    run_of,
    start_accelerator,
)

TOLERANCE = 0.10  # relative error; the allowance of the plan is larger


def way_of(name: str, precision: str = "bf16") -> Way:
    """A way on one device, by its name, in precision "bf16", "fp16" or "no" (fp32).

    Raises:
        UserError: there is none.
    """
    known = {way.name: way for way in list_ways(1, precision)}
    if name not in known:
        raise UserError(f"--ways {name}: no such way (expected one of {', '.join(known)})")
    return known[name]


def half_precision(capability: tuple[int, int]) -> str:
    """The 16-bit precision for GPUs of a compute capability."""
    return "bf16" if capability >= distributed.BF16_CAPABILITY else "fp16"


def plan_for_gpu(run: Config, name: StageName, way: str, limit: float, capability: tuple[int, int]) -> Plan:
    """Plan a stage for `limit` bytes of a GPU of this compute capability, as train.py would."""
    stage = measure_stage(run, name, padded=kernels.needs_padding(capability))
    return fit(stage, name, way_of(way, half_precision(capability)), Room(device=limit, host=host.free_bytes()))


def case_of_plan(model: str, stage: StageName, hw: tuple[int, int], plan: Plan) -> TrainingCase:
    """The case of a plan, with all that a separate process needs to run it."""
    way, layout, share = plan.way, plan.layout, plan.share
    return TrainingCase(
        model=model,
        stage=stage,
        way=way.name,
        launch=way.launch,
        precision="bf16" if way.strategy.bf16 else "fp16" if way.strategy.half else "no",
        input_hw=hw,
        micro_batch=share.micro_batch,
        accumulation=share.accumulation,
        checkpointed_blocks=layout.checkpointed_blocks,
        selective_blocks=layout.selective_blocks,
        head_chunk=layout.head_chunk,
        offload_activations=way.offload_activations,
        adam_8bit=way.adam_8bit,
        bf16_weights=way.bf16_weights,
        teacher=way.teacher,
    )


def launch_case(case: TrainingCase, limit: int) -> Measurement:
    """Run a case by `accelerate launch`, as in training, with a memory limit (bytes) for torch."""
    file = f"accelerate_configs/{case.launch}.yaml"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", file]
    launch += ["--num_processes", "1", "--main_process_port", "0"]
    if str(yaml.safe_load((REPOSITORY / file).read_text())["mixed_precision"]) != case.precision:
        launch += ["--mixed_precision", case.precision]
    with tempfile.TemporaryDirectory() as folder:
        task, result = Path(folder) / "task.json", Path(folder) / "result.json"
        task.write_text(json.dumps({"case": case.as_json(), "limit": limit}))
        command = [*launch, "-m", "sapiens_accel.selftest.training_step", str(task), str(result)]
        done = subprocess.run(command, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, check=False)
        print(done.stdout[-20_000:], done.stderr[-20_000:], sep="\n", file=sys.stderr)
        if result.is_file():
            return json.loads(result.read_text())
    errors = [line.strip() for line in done.stderr.splitlines() if "Error" in line]
    return {"measured": None, "outcome": f"failed: {errors[-1] if errors else f'exit code {done.returncode}'}"[:300]}


def compare_on_gpu(case: TrainingCase, plan: Plan, limit: int) -> Row:
    """A row with predicted and measured peak memory of a planned case, and people a second.

    Raises:
        Skipped: the case is predicted not to fit.
    """
    if not plan.fits:
        needs = (
            f"{(plan.gpu_peak + plan.allowance) / GIB:.1f} GiB of the GPU, {plan.host_peak / GIB:.0f} GiB of the host"
        )
        raise Skipped(f"predicted not to fit ({needs})")
    measurement = launch_case(case, limit)
    row = compare(f"{case.model} {case.stage} {case.way}", plan.gpu_peak, measurement)
    if measurement["measured"] is not None:
        rate = case.share.global_batch / measurement["seconds_per_step"]
        context = measurement["device_used"] - measurement["reserved"]
        row["text"] += f", CUDA's context {context / GIB:.2f} GiB, {rate:.1f} people/s"
        row |= {"people_per_second": round(rate, 3), "context_bytes": context}
        if case.stage == "phase2":  # for the hours of an epoch, where the plain launch does not fit
            row |= {"phase2_rate": row["people_per_second"], "model": case.model, "input_hw": list(case.input_hw)}
    return row | {"case": case.as_json()}


def compare_on_cpu(stage: Stage, case: TrainingCase) -> Row:
    """As `compare_on_gpu` for a tiny network on the CPU, measured by torch's profiler."""
    plan = predict(stage, way_of(case.way, "no"), case.share, case.layout, Room(cuda=False))
    measurement = measure_on_cpu(start_accelerator("no"), case)
    return compare(f"{case.model} {case.stage}, fp32 on the CPU", plan.gpu_peak - bytes_made_before(case), measurement)


def compare(name: str, predicted: float, measurement: Measurement) -> Row:
    """A row with the error of a prediction in percent of the measurement."""
    if measurement["measured"] is None:
        return {"name": name, "status": "failed", "text": measurement["outcome"], "predicted_bytes": round(predicted)}
    error = predicted / measurement["measured"] - 1
    return {
        "name": name,
        "status": "passed" if abs(error) <= TOLERANCE else "warning",
        "text": f"predicted {_size(predicted)}, measured {_size(measurement['measured'])}: {100 * error:+.1f} %",
        "predicted_bytes": round(predicted),
        "error_percent": round(100 * error, 2),
        **measurement,
    }


def _size(num: float) -> str:
    return f"{num / GIB:.2f} GiB" if num >= GIB else f"{num / 2**20:.1f} MiB"


def _capability(asked: str | None) -> tuple[int, int]:
    """The compute capability of the command line, or that of the GPU, as found by another process."""
    if asked:
        return report.parse_capability(asked)
    with tempfile.TemporaryDirectory() as folder:
        machine = inspect_machine(Path(folder))
    if machine.capability is None:
        raise UserError(f"no GPU can be used: {machine.problem}")
    return machine.capability


def main(words: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="selftest.peak_memory", allow_abbrev=False)
    parser.add_argument("result")
    parser.add_argument("model")
    parser.add_argument("stage")
    parser.add_argument("way")
    parser.add_argument("--capability", help="compute capability of the GPU: 7.5 of a T4, ... (the GPU is asked)")
    parser.add_argument("--limit", default="15GiB", help="what torch may allocate on a GPU")
    parser.add_argument("--hw", nargs=2, type=int, default=[512, 384])
    parser.add_argument("--batch", type=int, default=32)
    asked: Any = parser.parse_args(words)
    result, hw, limit = Result(Path(asked.result)), tuple(asked.hw), int(report.parse_bytes("limit", asked.limit))
    # No further call of torch.cuda: a CUDA context of this process would take memory from the case.
    cuda = torch.cuda.is_available()
    with result.guard(f"{asked.model} {asked.stage} {asked.way}"):
        run = run_of(asked.model, asked.stage, hw, asked.batch)
        if cuda:
            plan = plan_for_gpu(run, asked.stage, asked.way, limit, _capability(asked.capability))
            result.add(compare_on_gpu(case_of_plan(asked.model, asked.stage, hw, plan), plan, limit))
        else:
            stage, way = measure_stage(run, asked.stage, half=False), way_of(asked.way, "no")
            share = Share(rank=0, num_ranks=1, micro_batch=asked.batch, accumulation=1)
            plan = Plan(way=way, share=share, layout=Layout(checkpointed_blocks=stage.depth, head_chunk=2))
            result.add(compare_on_cpu(stage, case_of_plan(asked.model, asked.stage, hw, plan)))


if __name__ == "__main__":
    run_main(main)
    distributed.stop()
    sys.exit(os.EX_OK)
