"""The peak of one case, as the allocator saw it. On a GPU each case has a process of its own:

accelerate launch --config_file accelerate_configs/zero2.yaml benchmarks/measure.py TASK.json RESULT.json
"""

import gc
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sapiens_accel  # isort: skip  # noqa: F401  (before torch: it sets how threads wait)
import torch
from accelerate import Accelerator
from subject import Case, case_of, network, num_unlabelled, people, stepping
from torch.profiler import ProfilerActivity, profile

from sapiens_accel.errors import UserError, run_main
from sapiens_accel.runtime import distributed

OUT_OF_MEMORY = "out of memory"
STEPS = {"cuda": 3, "cpu": 2}  # the first one makes the optimizer's state

Found = dict[str, Any]


def main(words: list[str]) -> None:
    """Run the case of TASK.json and write what was found; without arguments, say what the device is."""
    if not words:
        return print(json.dumps(device()))
    task = json.loads(Path(words[0]).read_text())
    case, limit = case_of(task["case"]), task["limit"]
    try:
        accelerator = distributed.start()
        found = on_gpu(accelerator, case, limit) if accelerator.device.type == "cuda" else on_cpu(accelerator, case)
    except torch.OutOfMemoryError:
        found = {"measured": None, "outcome": OUT_OF_MEMORY}
    except UserError as error:
        found = {"measured": None, "outcome": f"cannot run here: {error}"}
    Path(words[1]).write_text(json.dumps(found))


def device() -> Found:
    """Name and bytes of the GPU; asked in a process of its own, whose context goes with it."""
    free, total = torch.cuda.mem_get_info()
    return {"name": torch.cuda.get_device_name(), "bytes": total, "free_bytes": free}


def on_gpu(accelerator: Accelerator, case: Case, limit: float) -> Found:
    """Build the case and take its steps with `limit` bytes for torch's allocator.

    Returns:
        Bytes: `measured` is the most that the steps allocated, `building` the most before them, `reserved` what the
        allocator took for it, `device_used` all that was in use of the device at the end, CUDA's context with it.

    Raises:
        torch.OutOfMemoryError
    """
    gpu = accelerator.device
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit / torch.cuda.mem_get_info(gpu)[1]))
    plan, num = case.run.of(case.stage), STEPS["cuda"] * case.accumulation
    unlabelled = num_unlabelled(plan, case.micro_batch)
    batches = (people(case.micro_batch, unlabelled, case.input_hw, gpu) for _ in range(num))
    stream = stepping(accelerator, case, network(case.run, case.stage), batches)
    building = torch.cuda.max_memory_allocated(gpu)
    torch.cuda.reset_peak_memory_stats(gpu)
    times = []
    for _ in stream:
        torch.cuda.synchronize(gpu)
        times.append(time.perf_counter())
    free, total = torch.cuda.mem_get_info(gpu)
    return {
        "measured": torch.cuda.max_memory_allocated(gpu),
        "outcome": "measured",
        "building": building,
        "reserved": torch.cuda.max_memory_reserved(gpu),
        "device_used": total - free,
        "seconds_per_step": round((times[-1] - times[0]) / (len(times) - 1), 4),
    }


def on_cpu(accelerator: Accelerator, case: Case) -> Found:
    """Build the case and take its steps; the batches are made before, and are not part of what is measured."""
    plan, num = case.run.of(case.stage), STEPS["cpu"] * case.accumulation
    unlabelled = num_unlabelled(plan, case.micro_batch)
    batches = [people(case.micro_batch, unlabelled, case.input_hw, accelerator.device) for _ in range(num)]

    def work() -> None:
        for _ in stepping(accelerator, case, network(case.run, case.stage), iter(batches)):
            pass

    return {"measured": peak_of(work), "outcome": "measured"}


def made_outside(case: Case) -> int:
    """Bytes of the pictures that `on_cpu` makes before it measures: one step's, of what the plan calls data."""
    unlabelled = num_unlabelled(case.run.of(case.stage), case.micro_batch)
    views = case.micro_batch + 2 * unlabelled  # what the teacher's labels add, the cut-out pictures, is made inside
    return case.accumulation * views * 3 * case.input_hw[0] * case.input_hw[1]


def peak_of(work: Callable[[], None]) -> int:
    """The most bytes that torch's CPU allocator had given out at a time, beyond those of before."""
    gc.collect()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # two lines of the profiler's own for each case
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    assert seen.profiler is not None and seen.profiler.kineto_results is not None
    events: list[Any] = seen.profiler.kineto_results.events()  # its stub lacks `nbytes`
    now = peak = 0
    for _, num in sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"):
        now += num
        peak = max(peak, now)
    return peak


if __name__ == "__main__":
    run_main(lambda words: main(list(words)))
    distributed.stop()
