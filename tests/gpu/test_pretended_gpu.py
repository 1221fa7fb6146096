"""Every branch of the package that only a GPU reaches, driven by a pretended driver for cards of each kind."""

import ast
import os
import sys
import types
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType
from gpu.pretended_driver import (
    A100,
    A4000,
    GTX1080TI,
    H100,
    MIB,
    RTX4080,
    RTX5090,
    T4,
    V100,
    Card,
    Driver,
    pretend,
)
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode

import sapiens_accel
from sapiens_accel.config import parse as config
from sapiens_accel.config.schema import Config, OptimConfig
from sapiens_accel.data import loader as loading
from sapiens_accel.data.sampling import Share
from sapiens_accel.doctor import environment
from sapiens_accel.doctor.environment import Launch
from sapiens_accel.errors import UserError
from sapiens_accel.evaluation import predict
from sapiens_accel.inference import estimator
from sapiens_accel.memory import gpus, planner
from sapiens_accel.memory.estimate import Room
from sapiens_accel.memory.planner import LaunchInfo
from sapiens_accel.models import export_graph, export_runtimes, kernels
from sapiens_accel.runtime import device, distributed, engine
from sapiens_accel.training import activation_offload, optim, stage

PACKAGE = Path(sapiens_accel.__file__).parent
CARDS = [T4, V100, A4000, RTX4080, A100, H100, RTX5090]
CUDA, CUDA_0 = torch.device("cuda"), torch.device("cuda", 0)


# ---- Nothing is forgotten

# What of the package speaks to CUDA, and the test below that drives it.
COVERED = {
    "data/loader.py::batches": "test_batches_are_pinned_for_a_gpu",
    "doctor/environment.py::_devices": "test_the_doctor_says_what_the_cards_are",
    "doctor/environment.py::_precision": "test_the_doctor_says_which_precision_a_launch_gets",
    "doctor/environment.py::_attention": "test_the_doctor_says_which_kernel_attention_gets",
    "doctor/environment.py::_operations": "test_the_doctor_knows_what_a_gpu_compiles",
    "evaluation/predict.py::predict": "test_crops_to_predict_are_pinned_for_a_gpu",
    "inference/estimator.py::_choose_autocast": "test_the_estimator_has_the_precisions_of_the_card",
    "memory/planner.py::_rates": "test_hours_are_those_of_the_card",
    "memory/planner.py::explain_out_of_memory": "test_running_out_of_memory_frees_what_torch_keeps",
    "models/kernels.py::capability_on": "test_heads_are_padded_only_where_the_card_needs_it",
    "models/kernels.py::_capability": "test_heads_are_padded_only_where_the_card_needs_it",
    "models/kernels.py::kernel_on": "test_the_kernel_is_what_torch_says_of_what_it_will_get",
    "models/export_graph.py::problem_of_format": "test_an_engine_is_built_where_the_card_and_the_package_are",
    "models/export_runtimes.py::": "test_exports_are_measured_on_the_card",  # PROVIDERS
    "models/export_runtimes.py::_device": "test_exports_are_measured_on_the_card",
    "models/export_runtimes.py::format_table": "test_exports_are_measured_on_the_card",
    "models/export_runtimes.py::_open_engine": "test_an_engine_gets_its_images_before_it_runs",
    "models/export_runtimes.py::_open_engine.run": "test_an_engine_gets_its_images_before_it_runs",
    "runtime/device.py::choose_device": "test_people_are_looked_for_on_the_gpu",
    "runtime/device.py::problem_of_device": "test_a_card_that_cannot_be_trained_on_is_refused_before_anything_is_built",
    "runtime/device.py::peak_bytes": "test_the_peak_is_the_allocators",
    "runtime/device.py::reset_peak": "test_the_peak_is_the_allocators",
    "runtime/launch.py::uses_cuda": "test_a_launch_asked_to_use_the_cpu_asks_no_card",
    "runtime/distributed.py::start": "test_a_launch_on_one_card_gets_its_index_and_precision",
    "runtime/distributed.py::precision_of_device": "test_a_launch_on_one_card_gets_its_index_and_precision",
    "runtime/distributed.py::description": "test_a_launch_on_one_card_gets_its_index_and_precision",
    "runtime/distributed.py::free_bytes": "test_free_memory_of_real_cards",
    "training/activation_offload.py::_Copies.__init__": "test_offloaded_activations_wait_in_the_right_order",
    "training/activation_offload.py::_Copies.pack": "test_offloaded_activations_wait_in_the_right_order",
    "training/activation_offload.py::_Copies.unpack": "test_offloaded_activations_wait_in_the_right_order",
    "training/activation_offload.py::_Copies._fetch": "test_offloaded_activations_wait_in_the_right_order",
    "training/activation_offload.py::_stream": "test_offloaded_activations_wait_in_the_right_order",
    "training/optim.py::adamw": "test_adamw_is_fused_on_a_gpu",
    "training/stage.py::_home": "test_weights_are_loaded_straight_onto_the_gpu",
}


def speaks_to_cuda() -> Iterator[str]:
    """Functions that compare with "cuda" or ask torch.cuda, as file::Class.function."""

    def visit(node: ast.AST, owner: tuple[str, ...]) -> Iterator[str]:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            owner = (*owner, node.name)
        is_name = isinstance(node, ast.Constant) and node.value == "cuda"
        if is_name or (isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.cuda", "torch.backends.cuda")):
            yield ".".join(owner)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, owner)

    for path in PACKAGE.rglob("*.py"):
        if path.is_relative_to(PACKAGE / "selftest"):  # the command that is to be run on a GPU, to measure there
            continue
        for function in visit(ast.parse(path.read_text()), ()):
            yield f"{path.relative_to(PACKAGE).as_posix()}::{function}"


def test_every_branch_for_gpus_has_a_test_here() -> None:
    assert set(speaks_to_cuda()) == set(COVERED)
    assert all(callable(globals().get(test)) for test in COVERED.values())


# ---- Launches


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Room for an Accelerator of its own, and an environment that is put back."""
    for name in [name for name in os.environ if name.startswith("ACCELERATE_") or name == "LOCAL_RANK"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "cuda")  # so that it is put back
    monkeypatch.delenv("ACCELERATE_TORCH_DEVICE")
    _forget_accelerator()
    yield monkeypatch
    _forget_accelerator()


def _forget_accelerator() -> None:
    AcceleratorState._reset_state(reset_partial_state=False)
    GradientState._reset_state()
    PartialState._reset_state()


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
@pytest.mark.parametrize("asked", ["bf16", "fp16", "no"])
def test_a_launch_on_one_card_gets_its_index_and_precision(
    card: Card, asked: str, launched: pytest.MonkeyPatch
) -> None:
    pretend(launched, card)
    launched.setenv("ACCELERATE_MIXED_PRECISION", asked)
    accelerator = distributed.start()
    expected = "fp16" if asked == "bf16" and card.capability < (8, 0) else asked
    assert accelerator.device == CUDA_0, "torch.cuda's functions need the index"
    assert accelerator.mixed_precision == expected
    assert (accelerator.scaler is not None) == (expected == "fp16")
    said = distributed.description(accelerator)
    assert said.startswith(f"1 process on {card.name}, {expected.replace('no', 'fp32')}")
    assert ("bf16 was asked for" in said) == (expected != asked)


def test_a_launch_asked_to_use_the_cpu_asks_no_card(launched: pytest.MonkeyPatch) -> None:
    pretend(launched, GTX1080TI)
    launched.setenv("ACCELERATE_USE_CPU", "true")
    assert distributed.start().device.type == "cpu"


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_free_memory_of_real_cards(card: Card, launched: pytest.MonkeyPatch) -> None:
    driver = pretend(launched, card)
    accelerator = distributed.start()
    assert distributed.free_bytes(accelerator) == (card.total - card.context) * MIB
    driver.reserved, driver.allocated = 900 * MIB, 700 * MIB  # 200 MiB of what torch keeps can be used again
    assert distributed.free_bytes(accelerator) == (card.total - card.context - 700) * MIB
    driver.fraction = 0.5
    assert distributed.free_bytes(accelerator) == card.total * MIB // 2 - 700 * MIB


def test_the_second_of_two_cards_is_asked(launched: pytest.MonkeyPatch) -> None:
    """As rank 1 of a launch, whose device has an index; the first card is larger."""
    pretend(launched, A100, T4)
    accelerator: Any = types.SimpleNamespace(device=torch.device("cuda", 1), num_processes=1)
    assert distributed.free_bytes(accelerator) == (T4.total - T4.context) * MIB


@pytest.mark.parametrize(
    ("card", "architectures", "said"),
    [
        (GTX1080TI, "sm_60 sm_70", r"GTX 1080 Ti, compute capability 6\.1: too old \(expected 7\.0 or newer\)"),
        (V100, "sm_75 sm_80 sm_90", r"V100-SXM2-16GB, .* 7\.0: this torch has no code for it .*sm_75, sm_80"),
        (RTX5090, "sm_80 sm_90", r"12\.0: this torch has no code for it"),
        (RTX5090, "sm_80 sm_90a compute_90a", r"12\.0: this torch has no code for it"),
        (T4, "sm_70 sm_80", None),
        (RTX4080, "sm_80 sm_86", None),
        (RTX5090, "sm_80 sm_90 compute_90", None),
        (H100, "sm_90a", None),
        (T4, "", None),
    ],
)  # fmt: skip
def test_a_card_that_cannot_be_trained_on_is_refused_before_anything_is_built(
    card: Card, architectures: str, said: str | None, launched: pytest.MonkeyPatch
) -> None:
    """By a launch, and by the doctor."""
    pretend(launched, card, architectures=architectures)
    if said is None:
        assert distributed.start().device == CUDA_0
    else:
        with pytest.raises(UserError, match=said) as error:
            distributed.start()
        assert "\n" not in str(error.value) and "CUDA_VISIBLE_DEVICES" in str(error.value)
    found = [finding.text for finding in environment._devices() if finding.level == "error"]
    assert found == ([device.problem_of_device(0)] if said else [])


def test_a_rank_looks_at_its_own_card(launched: pytest.MonkeyPatch) -> None:
    pretend(launched, T4, GTX1080TI)
    device.check_device(0)
    with pytest.raises(UserError, match=r"GPU 1, NVIDIA GeForce GTX 1080 Ti"):
        device.check_device(1)


@pytest.mark.parametrize("visible", ["GPU-8932f937-d72c-4106-c12f-20bd9faed9f6", "MIG-1b2c,GPU-8932f937"])
def test_deepspeed_takes_cards_that_are_visible_by_uuid(visible: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As SLURM and MIG give them. Its accelerator reads them as numbers to ask NVML, where pynvml is installed."""
    cuda_accelerator = pytest.importorskip("deepspeed.accelerator.cuda_accelerator")
    pretend(monkeypatch, T4)
    nvml = types.SimpleNamespace(nvmlDeviceGetHandleByIndex=int)
    monkeypatch.setattr(cuda_accelerator, "pynvml", nvml)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    theirs = cuda_accelerator.CUDA_Accelerator()
    with pytest.raises(ValueError, match="invalid literal for int"):
        theirs.available_memory(0)
    engine.read_visible_devices()
    assert theirs.available_memory(0) == T4.total * MIB


# ---- Training


def test_adamw_is_fused_on_a_gpu() -> None:
    groups = [{"params": [torch.nn.Parameter(torch.zeros(3))], "lr_scale": 1.0}]
    assert optim.adamw(groups, OptimConfig(), CUDA_0).defaults["fused"]


class LoaderAskedError(Exception):
    """Carries what a DataLoader was asked for."""


@pytest.mark.parametrize("where", [CUDA_0, torch.device("cpu")])
def test_batches_are_pinned_for_a_gpu(where: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    def loader(*_: Any, **options: Any) -> None:
        raise LoaderAskedError(options["pin_memory"])

    monkeypatch.setattr(loading, "DataLoader", loader)
    people: Any = types.SimpleNamespace(ratio=0)
    share = Share(rank=0, num_ranks=1, micro_batch=1, accumulation=1)
    with pytest.raises(LoaderAskedError, match=str(where.type == "cuda")):
        next(loading.batches(people, share, range(1), 0, where))


def test_the_peak_is_the_allocators(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = pretend(monkeypatch, T4)
    driver.allocated = 123
    for where in (CUDA, CUDA_0):
        driver.done.clear()
        device.reset_peak(where)
        assert driver.done == ["peak of 0 reset"]
        assert device.peak_bytes(where) == 123
    device.reset_peak(torch.device("cpu"))
    assert driver.done == ["peak of 0 reset"] and device.peak_bytes(torch.device("cpu")) is None


def test_running_out_of_memory_frees_what_torch_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    driver, order = pretend(monkeypatch, T4), []
    accelerator: Any = types.SimpleNamespace(num_processes=1)
    plan: Any = types.SimpleNamespace(share=types.SimpleNamespace(micro_batch=8), gpu={}, otherwise="--memory.x 1")
    drop = lambda: order.append(("gradients", list(driver.done)))  # noqa: E731
    with (
        pytest.raises(UserError, match=r"phase2: out of memory with micro-batch 8. Try --memory.x 1"),
        planner.explain_out_of_memory(accelerator, "phase2", plan, drop),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    assert order == [("gradients", ["cache emptied"])]


class CopiesNoted(TorchFunctionMode):
    """Copies on a pretended card are noted in place of being made."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.empty_like:
            assert kwargs["pin_memory"] == (torch.device(kwargs["device"]).type == "cpu")
        if func is not torch.Tensor.copy_:
            return func(*args, **(kwargs or {}))
        target, source = args
        assert target.shape == source.shape and kwargs == {"non_blocking": True}
        self.driver.done.append(f"copy to {target.device.type}")
        return target


@pytest.mark.parametrize("where", [CUDA, CUDA_0])
def test_offloaded_activations_wait_in_the_right_order(where: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Out: at most two at a time, each after what computes it. In: one ahead, and used once it has arrived."""
    driver = pretend(monkeypatch, T4)
    activation_offload._stream.cache_clear()
    out = ["copies waits for compute", "in copies", "copy to cpu", "copies records"]
    back = ["copies waits for compute", "in copies", "copy to cuda", "copies records"]
    wait = ["compute waits for event of copies"]
    with FakeTensorMode(), CopiesNoted(driver):
        copies = activation_offload._Copies(where)
        small = torch.empty(3, device=CUDA_0)
        assert copies.pack(small) is small and not driver.done
        items: list[Any] = [copies.pack(torch.empty(2**20, device=CUDA_0)) for _ in range(3)]
        assert driver.done == [*out, *out, *out, *wait], "the third waits until the first has left"
        assert all(item.host.device.type == "cpu" for item in items)
        driver.done.clear()
        assert copies.unpack(items[2]).device == CUDA_0
        assert driver.done == [*wait, *wait, *back, *wait, *back], "the next one is on its way"
        driver.done.clear()
        copies.unpack(items[1])
        assert driver.done == [*wait, *back]
        driver.done.clear()
        copies.unpack(items[0])
        assert driver.done == wait
    activation_offload._stream.cache_clear()


# ---- Attention


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
@pytest.mark.parametrize("where", [CUDA, CUDA_0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cast", [False, True])
def test_heads_are_padded_only_where_the_card_needs_it(
    card: Card, where: torch.device, dtype: torch.dtype, cast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flash attention needs capability 8.0 and 16 bits, which autocast makes of queries in fp32 as well."""
    pretend(monkeypatch, card)
    kernels._capability.cache_clear()
    taken: list[str] = []
    monkeypatch.setattr(kernels, "padded_attention", lambda *_, **__: taken.append("padded"))
    monkeypatch.setattr(kernels, "sdpa_attention_forward", lambda *_, **__: taken.append("plain"))
    states: Any = types.SimpleNamespace(device=where, dtype=dtype)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: cast and kind == "cuda")
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda kind: torch.float16)
    kernels.attention_by_device(torch.nn.Identity(), states, states, states, None)
    kernels._capability.cache_clear()
    flash = card.capability >= (8, 0) and (cast or dtype == torch.bfloat16)
    assert taken == ["plain" if flash else "padded"]


@pytest.mark.parametrize(
    ("card", "flash", "efficient", "dtype", "kernel"),
    [
        (A100, True, True, torch.bfloat16, "flash"),
        (A100, False, True, torch.float32, "memory-efficient"),
        (T4, False, True, torch.float16, "memory-efficient"),
        (T4, False, False, torch.float16, "math"),
    ],
)
def test_the_kernel_is_what_torch_says_of_what_it_will_get(
    card: Card, flash: bool, efficient: bool, dtype: torch.dtype, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Heads of 60 channels in pairs of queries: as they are, or padded and repeated."""
    pretend(monkeypatch, card)
    asked: list[Any] = []
    dim, kv_heads = (60, 16) if flash else (64, 32)

    def params(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any) -> None:
        shapes = (query.shape[1], key.shape[1], value.shape[1], query.shape[3], key.shape[3])
        asked.append((query.device, *shapes, query.dtype, rest[-1]))

    monkeypatch.setattr(torch.backends.cuda, "SDPAParams", params)
    monkeypatch.setattr(torch.backends.cuda, "can_use_flash_attention", lambda _: flash)
    monkeypatch.setattr(torch.backends.cuda, "can_use_efficient_attention", lambda _: efficient)
    with FakeTensorMode():
        assert kernels.kernel_on(CUDA_0, heads=32, kv_heads=16, dim=60, dtype=dtype) == kernel
    assert asked == [(CUDA_0, 32, kv_heads, kv_heads, dim, dim, dtype, kv_heads == 16)]


# ---- Evaluation, detection


@pytest.mark.parametrize("where", [CUDA_0, torch.device("cpu")])
def test_crops_to_predict_are_pinned_for_a_gpu(where: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    def loader(*_: Any, **options: Any) -> None:
        raise LoaderAskedError(options["pin_memory"])

    monkeypatch.setattr(predict, "DataLoader", loader)
    config: Any = types.SimpleNamespace(box_padding=1.0, num_workers=0, scales=(1.0,), batch_size=1)
    nobody: Any = [None]
    setup = predict.PredictionSetup(skeleton=nobody, data=config, config=config, device=where)
    with pytest.raises(LoaderAskedError, match=str(where.type == "cuda")):
        predict.predict([], nobody, setup)


def test_people_are_looked_for_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert device.choose_device(None, "--device").type == "cpu"
    pretend(monkeypatch, T4)
    assert device.choose_device(None, "--device").type == "cuda"


def test_the_estimator_has_the_precisions_of_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, T4)
    assert estimator._choose_autocast("float16", CUDA_0) == torch.float16
    assert estimator._choose_autocast(None, CUDA_0) is None
    with pytest.raises(UserError, match=r"dtype bfloat16: Tesla T4 has none \(expected float16 or float32\)"):
        estimator._choose_autocast(torch.bfloat16, CUDA_0)
    pretend(monkeypatch, A100)
    assert estimator._choose_autocast("bfloat16", CUDA_0) == torch.bfloat16


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_hours_are_those_of_the_card(card: Card, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Assumed rates, by the name that the driver gives; the selftest has measured nothing in this folder."""
    monkeypatch.chdir(tmp_path)
    pretend(monkeypatch, card)
    accelerator: Any = types.SimpleNamespace(device=CUDA_0)
    found = planner._rates(accelerator)
    expected = {T4: "T4", V100: "V100", A4000: "A4000", RTX4080: "4080", A100: "A100", H100: "H100"}.get(card)
    assert found == (gpus.GPUS[expected].rates if expected else gpus.ASSUMED) and not found.measured


@pytest.mark.parametrize(
    ("precision", "zero", "options", "expected"),
    [
        ("bf16", 2, {}, (CUDA_0, torch.bfloat16)),
        ("fp16", 1, {}, (CUDA_0, torch.float16)),
        ("bf16", None, {}, (CUDA_0, None)),  # without DeepSpeed, autocast keeps the weights in fp32
        ("bf16", 3, {}, (torch.device("cpu"), None)),  # ZeRO-3 shards them from the host
        ("bf16", 2, {"teacher": True}, (torch.device("cpu"), None)),  # the average begins with fp32
        ("bf16", 2, {"frozen": True}, (torch.device("cpu"), None)),  # exported as they were
        ("bf16", 2, {"frozen": True, "adapted": True}, (CUDA_0, torch.bfloat16)),
    ],
)
def test_weights_are_loaded_straight_onto_the_gpu(
    precision: str, zero: int | None, options: dict[str, bool], expected: tuple[torch.device, torch.dtype | None]
) -> None:
    kind = DistributedType.NO if zero is None else DistributedType.DEEPSPEED
    plugin = types.SimpleNamespace(deepspeed_config={"zero_optimization": {"stage": zero}})
    accelerator = types.SimpleNamespace(
        device=CUDA_0,
        mixed_precision=precision,
        distributed_type=kind,
        state=types.SimpleNamespace(deepspeed_plugin=plugin),
    )
    teacher = object() if options.get("teacher") else None
    context: Any = types.SimpleNamespace(
        accelerator=accelerator, config=types.SimpleNamespace(teacher=teacher), run=Config()
    )
    model: Any = torch.nn.Linear(2, 2).requires_grad_(not options.get("frozen", False))
    home = stage._home(context, model, adapted=options.get("adapted", False))
    assert (torch.device(home.device), home.dtype) == expected


# ---- Exports


def test_exports_are_measured_on_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    assert export_runtimes._device() == "cpu"
    timing = export_runtimes.Timing("PyTorch", (0.01, 0.04))
    pretend(monkeypatch, T4)
    assert export_runtimes._device() == "cuda"
    assert export_runtimes.PROVIDERS[export_runtimes._device()] == "CUDAExecutionProvider"
    head, _, row = export_runtimes.format_table([timing], "fp16").splitlines()
    assert head.startswith("Tesla T4; fp16;") and row.split() == ["PyTorch", "10.0", "100.0", "40.0", "200.0"]


def test_an_engine_is_built_where_the_card_and_the_package_are(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "pip install tensorrt" in str(export_graph.problem_of_format("tensorrt"))
    monkeypatch.setitem(sys.modules, "tensorrt", _pretend_tensorrt([]))
    assert "no CUDA GPU here" in str(export_graph.problem_of_format("tensorrt"))
    pretend(monkeypatch, T4)
    assert export_graph.problem_of_format("tensorrt") is None


def test_an_engine_gets_its_images_before_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The output's shape is asked for when the input's is set; both have an address in the stream that computes."""
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setitem(sys.modules, "tensorrt", _pretend_tensorrt(calls))
    driver = pretend(monkeypatch, T4)
    (tmp_path / "x.engine").write_bytes(b"engine")
    run = export_runtimes._open_engine(tmp_path / "x.engine")
    with FakeTensorMode():
        monkeypatch.setattr(FakeTensor, "data_ptr", lambda tensor: (str(tensor.device), tuple(tensor.shape)))
        outputs = run(torch.empty(2, 3, 64, 48))
    assert [(one.device.type, tuple(one.shape)) for one in outputs] == [("cpu", (2, 17, 16, 12)), ("cpu", (2, 17, 2))]
    assert calls == [
        ("deserialize", b"engine"),
        ("shape", "pixel_values", (2, 3, 64, 48)),
        ("address", "pixel_values", ("cuda:0", (2, 3, 64, 48))),
        ("address", "heatmaps", ("cuda:0", (2, 17, 16, 12))),
        ("address", "visibility", ("cuda:0", (2, 17, 2))),
        ("execute", 7),
    ]
    assert driver.done == ["in copies"]


def _pretend_tensorrt(calls: list[tuple[Any, ...]]) -> Any:
    """A package that notes what is asked of an engine; its outputs have 17 maps of a quarter of the input."""
    shapes: dict[str, tuple[int, ...]] = {}

    def set_input_shape(name: str, shape: tuple[int, ...]) -> None:
        calls.append(("shape", name, shape))
        shapes["heatmaps"] = (shape[0], 17, shape[2] // 4, shape[3] // 4)
        shapes["visibility"] = (shape[0], 17, 2)

    context = types.SimpleNamespace(
        set_input_shape=set_input_shape,
        get_tensor_shape=shapes.__getitem__,
        set_tensor_address=lambda name, address: calls.append(("address", name, address)),
        execute_async_v3=lambda stream: calls.append(("execute", stream)),
    )

    def deserialize(data: bytes) -> Any:
        calls.append(("deserialize", data))
        names = ["visibility", "pixel_values", "heatmaps"]  # in any order
        return types.SimpleNamespace(
            create_execution_context=lambda: context, num_io_tensors=len(names), get_tensor_name=names.__getitem__
        )

    module: Any = types.ModuleType("tensorrt")
    module.__spec__ = ModuleSpec("tensorrt", None)
    module.Logger = type("Logger", (), {"ERROR": 1, "__init__": lambda self, level: None})
    module.Runtime = lambda logger: types.SimpleNamespace(deserialize_cuda_engine=deserialize)
    return module


# ---- The doctor


def test_the_doctor_says_what_the_cards_are(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "none" in next(environment._devices()).text
    pretend(monkeypatch, T4, RTX5090)
    found = [finding.text for finding in environment._devices() if finding.check == "gpu"]
    assert found[0].startswith("0: Tesla T4, 14.8 GiB, compute capability 7.5")
    assert found[1].startswith("1: NVIDIA GeForce RTX 5090, 31.8 GiB, compute capability 12.0")


@pytest.mark.parametrize(
    ("card", "asked", "level", "said"),
    [
        (T4, "bf16", "note", "fp16 with loss scaling"),
        (A100, "bf16", "note", "bf16"),
        (T4, "fp16", "note", "fp16"),
        (A100, "no", "warning", "fp32 on a GPU"),
    ],
)
def test_the_doctor_says_which_precision_a_launch_gets(
    card: Card, asked: str, level: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, card)
    (found,) = environment._precision(Launch(precision=asked))
    assert found.level == level and said in found.text


@pytest.mark.parametrize(
    ("card", "kernel", "level", "said"),
    [
        (A100, "flash", "note", "sapiens_2b on NVIDIA A100-SXM4-40GB: torch's flash kernel"),
        (T4, "memory-efficient", "note", "memory-efficient kernel, heads of 60 channels padded to 64"),
        (T4, "math", "warning", "the memory plan does not know"),
    ],
)
def test_the_doctor_says_which_kernel_attention_gets(
    card: Card, kernel: str, level: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run: Any = types.SimpleNamespace(model=types.SimpleNamespace(name="sapiens_2b"))
    assert not list(environment._attention(run, Launch(precision="bf16")))
    pretend(monkeypatch, card, card)
    kernels._capability.cache_clear()
    asked: list[Any] = []
    monkeypatch.setattr(kernels, "kernel_on", lambda *arguments: asked.append(arguments) or kernel)
    (found,) = environment._attention(run, Launch(precision="bf16"))
    kernels._capability.cache_clear()
    assert asked == [(CUDA_0, 32, 32, 60, torch.float16 if card is T4 else torch.bfloat16)]
    assert found.level == level and said in found.text


@pytest.mark.parametrize(
    ("asked", "dtype", "repeated"),
    [("no", torch.float32, True), ("fp16", torch.float16, False), ("bf16", torch.bfloat16, False)],
)
def test_the_doctor_asks_for_attention_as_the_launch_calls_it(
    asked: str, dtype: torch.dtype, repeated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    run: Any = types.SimpleNamespace(model=types.SimpleNamespace(name="sapiens2_0.4b"))
    pretend(monkeypatch, A100)
    kernels._capability.cache_clear()
    calls: list[Any] = []
    monkeypatch.setattr(kernels, "kernel_on", lambda *arguments: calls.append(arguments) or "memory-efficient")
    (found,) = environment._attention(run, Launch(precision=asked))
    kernels._capability.cache_clear()
    assert calls == [(CUDA_0, 16, 8, 64, dtype)]
    assert ("keys and values repeated" in found.text) == repeated


@pytest.mark.parametrize(("precision", "padded"), [("no", True), ("bf16", False)])
def test_a_run_in_fp32_is_planned_with_padded_attention(
    precision: str, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = config.load(["--model.name=sapiens2_tiny", "--data.input_hw=[64,48]", "--stage=phase2"])
    asked: list[bool] = []
    known = planner.measure_stage

    def measure(*words: Any, padded: bool, **more: Any) -> Any:
        asked.append(padded)
        return known(*words, padded=padded, **more)

    monkeypatch.setattr(planner, "measure_stage", measure)
    strategy = distributed.strategy_of({}, num_ranks=1, num_local=1, precision=precision)
    room = Room(device=40e9, host=500e9)
    launch = LaunchInfo(strategy=strategy, room=room, words=[], capability=A100.capability)
    planner.plan_stages(run, launch)
    assert asked == [padded]
    asked.clear()
    planner.plan_stages(run, LaunchInfo(strategy=strategy, room=Room(), words=[]))
    assert asked == [False], "a CPU"


def test_the_doctor_knows_what_a_gpu_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes on CPUs talk through DeepSpeed's own C++; on GPUs they do not."""
    launch = Launch(num_processes=2, deepspeed=True, zero={"stage": 2})
    assert any("deepspeed_shm_comm" in found.text for found in environment._operations(launch))
    pretend(monkeypatch, T4, T4)
    assert not any("deepspeed_shm_comm" in found.text for found in environment._operations(launch))
