"""What a forward saves waits on the host: the same gradients to the last bit, and only what is meant to wait does."""

import gc
import weakref
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sapiens_accel.models.sapiens import Layout, SapiensPose
from sapiens_accel.training import activation_offload as offload
from sapiens_accel.training.activation_offload import offloaded

CPU = torch.device("cpu")
NUM = 5  # people
IMAGE = torch.randint(0, 256, (NUM, 3, 64, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
ALL = Layout(checkpointed_blocks=4, head_chunk=2)


@pytest.fixture
def everything_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny network saves no tensor of the size from which a copy is worth it."""
    monkeypatch.setattr(offload, "MIN_BYTES", 1)


def _criterion(heatmaps: Tensor, people: slice) -> Tensor:
    wanted = torch.arange(people.start, people.stop, device=heatmaps.device)[:, None, None, None] / 10
    return (heatmaps - wanted).square().mean(dim=(1, 2, 3)).sum().reshape(1)


def _context() -> Any:
    return offloaded(CPU, wanted=True)


def _loss(model: SapiensPose, context: AbstractContextManager, image: Tensor = IMAGE) -> Tensor:
    with context:
        loss, _ = model(image, _criterion)
    return loss


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradients, which are then forgotten."""
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def _assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    different = [name for name, gradient in expected.items() if not torch.equal(found[name], gradient)]
    assert not different and any(gradient.any() for gradient in expected.values())


# ---- The same gradients


@pytest.mark.usefixtures("everything_moves")
@pytest.mark.parametrize("chunk", [2, None])
@pytest.mark.parametrize("checkpointed", [0, 2, 4])
def test_gradients_are_equal_to_the_last_bit(tiny: SapiensPose, checkpointed: int, chunk: int | None) -> None:
    tiny.lay_out(Layout(checkpointed_blocks=checkpointed, head_chunk=chunk))
    tiny(IMAGE, _criterion)[0].backward()
    expected, context = _gradients(tiny), _context()
    loss = _loss(tiny, context)
    num = len(context.tensors)
    loss.backward()
    _assert_equal(_gradients(tiny), expected)
    assert num > 4 and len(context.tensors) == num, "what the backward computes again stays where it is"


@pytest.mark.usefixtures("everything_moves")
def test_a_frozen_bottom_changes_nothing(tiny: SapiensPose) -> None:
    tiny.freeze(("embeddings", "block_0"))
    tiny.lay_out(ALL)
    tiny(IMAGE, _criterion)[0].backward()
    expected = _gradients(tiny)
    _loss(tiny, _context()).backward()
    _assert_equal(_gradients(tiny), expected)


@pytest.mark.usefixtures("everything_moves")
def test_step_follows_step_and_two_forwards_may_come_before_their_backwards(tiny: SapiensPose) -> None:
    tiny.lay_out(ALL)
    images = [IMAGE, IMAGE.flip(0), 255 - IMAGE]
    expected = []
    for image in images:
        tiny(image, _criterion)[0].backward()
        expected.append(_gradients(tiny))
    for image, gradients in zip(images, expected, strict=True):
        _loss(tiny, _context(), image).backward()
        _assert_equal(_gradients(tiny), gradients)
    first, second = (_loss(tiny, _context(), image) for image in images[:2])
    for loss, gradients in ((first, expected[0]), (second, expected[1])):
        loss.backward()
        _assert_equal(_gradients(tiny), gradients)


# ---- What waits


def test_block_inputs_wait_and_hardly_anything_else(tiny: SapiensPose, monkeypatch: pytest.MonkeyPatch) -> None:
    """With them, the image for the patches' weights and the last block's output for the norm after it."""
    inputs: list[Tensor] = []
    for block in tiny.blocks:
        block.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach().clone()))
    tiny.lay_out(ALL)
    tiny(IMAGE, _criterion)
    monkeypatch.setattr(offload, "MIN_BYTES", inputs[0].nbytes)
    inputs.clear()
    context = _context()
    loss = _loss(tiny, context)
    assert len(inputs) == 4
    hosts = [item.host for item in context.tensors]
    for tokens in inputs:
        assert sum(host.shape == tokens.shape and torch.equal(host, tokens) for host in hosts) == 1
    others = [host.shape for host in hosts if not any(torch.equal(host, tokens) for tokens in inputs)]
    assert others.count(torch.Size((NUM, 3, 64, 48))) == 1
    # Sapiens2's final norm saves its input twice, and its output before the scale.
    assert len(others) <= (2 if tiny.size.family == "sapiens" else 4)
    assert all(shape in (IMAGE.shape, inputs[0].shape) for shape in others)
    loss.backward()
    assert len(inputs) == 4, "a recomputed block takes the input that had waited, not another one"


@pytest.mark.usefixtures("everything_moves")
def test_what_waits_on_the_host_is_not_held_on_the_device_as_well(tiny: SapiensPose) -> None:
    refs: list[weakref.ref] = []
    for block in tiny.blocks:
        block.register_forward_pre_hook(lambda _, args: refs.append(weakref.ref(args[0])))
    tiny.lay_out(ALL)
    loss, _ = tiny(IMAGE, _criterion)
    assert [ref() is not None for ref in refs] == [True] * 4, "without offloading the graph holds them"
    del loss
    refs.clear()
    loss = _loss(tiny, _context())
    assert [ref() is not None for ref in refs] == [False] * 4 and loss.requires_grad


def _is_parameter(host: Tensor, model: nn.Module) -> bool:
    shapes = [(p, p.T) for p in model.parameters() if p.ndim == 2]
    shapes += [(p,) for p in model.parameters() if p.ndim != 2]  # pyright: ignore[reportArgumentType]
    return any(host.shape == same.shape and torch.equal(host, same) for views in shapes for same in views)


@pytest.mark.usefixtures("everything_moves")
@pytest.mark.parametrize(
    "checkpointed",
    [
        4,
        2,
        0,
    ],
)
def test_no_parameter_waits(tiny: SapiensPose, checkpointed: int) -> None:
    tiny.lay_out(Layout(checkpointed_blocks=checkpointed, head_chunk=2))
    context = _context()
    loss = _loss(tiny, context)
    moved = [item.host.shape for item in context.tensors if _is_parameter(item.host, tiny)]
    assert loss.requires_grad and moved == []


@pytest.mark.usefixtures("everything_moves")
def test_the_heads_chunks_are_not_touched(tiny: SapiensPose) -> None:
    """Their backward is over before the forward is: what they save would go to the host and come back at once."""
    features, context, plain = torch.randn(NUM, 128, 4, 3, requires_grad=True), _context(), _context()
    tiny.head.chunk = 2
    with context:
        loss, _ = tiny.head(features, _criterion)
    assert loss.requires_grad and not context.tensors
    with plain:
        maps = tiny.head(features)
    assert maps.requires_grad and len(plain.tensors) > 5, "without a criterion they are"


def test_a_mebibyte_waits_and_a_byte_less_does_not() -> None:
    for num, waiting in ((2**20, 1), (2**20 - 1, 0)):
        x = torch.zeros(num, dtype=torch.int8)
        y = torch.ones((), requires_grad=True)
        context = _context()
        with context:
            product = x * y
        assert product.requires_grad and len(context.tensors) == waiting


@pytest.mark.usefixtures("everything_moves")
def test_tensors_of_another_device_stay_where_they_are() -> None:
    context: Any = offloaded(torch.device("meta"), wanted=True)
    x = torch.tensor([2.0, 3.0], requires_grad=True)
    with context:
        y = (2 * x).square().sum()
    y.backward()
    assert not context.tensors and x.grad is not None and x.grad.tolist() == [16.0, 24.0]


@pytest.mark.usefixtures("everything_moves")
@pytest.mark.parametrize("wanted", [True, False])
def test_nothing_waits_that_is_not_wanted(wanted: bool) -> None:
    x = torch.tensor([2.0, 3.0], requires_grad=True)
    z = 2 * x
    with offloaded(CPU, wanted=wanted):
        y = z.square().sum()
    saved = y.grad_fn.next_functions[0][0]._saved_self  # pyright: ignore[reportOptionalMemberAccess]
    assert saved.tolist() == [4.0, 6.0]
    assert (saved.data_ptr() != z.data_ptr()) == wanted
    later = z.square().grad_fn._saved_self  # pyright: ignore[reportOptionalMemberAccess]
    assert later.data_ptr() == z.data_ptr(), "outside the context nothing moves"


@pytest.mark.usefixtures("everything_moves")
def test_host_memory_is_free_after_the_backward(tiny: SapiensPose) -> None:
    """At once, not when Python next looks for cycles: a step's copies are gigabytes of pinned memory."""
    tiny.lay_out(ALL)
    context = _context()
    loss = _loss(tiny, context)
    hosts = [weakref.ref(item.host) for item in context.tensors]
    gc.collect()
    gc.disable()
    try:
        loss.backward()
        del loss, context
        assert hosts and not any(ref() is not None for ref in hosts)
    finally:
        gc.enable()


# ---- On a GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["sapiens_tiny", "sapiens2_tiny"])
def test_on_cuda_gradients_are_equal_to_the_last_bit_and_the_inputs_of_most_blocks_are_gone(name: str) -> None:
    torch.manual_seed(0)
    device, depth, num = torch.device("cuda", torch.cuda.current_device()), 24, 32
    model = SapiensPose(name, 17, (256, 192), depth=depth).to(device)
    model.lay_out(Layout(checkpointed_blocks=depth, head_chunk=1))
    image = torch.randint(0, 256, (num, 3, 256, 192), dtype=torch.uint8, device=device)
    gradients: dict[bool, dict[str, Tensor]] = {}
    peaks: dict[bool, int] = {}
    # Algorithms whose sums have an order.
    with torch.backends.cudnn.flags(deterministic=True, benchmark=False), sdpa_kernel(SDPBackend.MATH):
        for wanted in (False, True, False, True):  # the first two allocate what the libraries keep
            torch.cuda.reset_peak_memory_stats(device)
            _loss(model, offloaded(device, wanted=wanted), image).backward()
            torch.cuda.synchronize(device)
            peaks[wanted] = torch.cuda.max_memory_allocated(device)
            gradients[wanted] = {name: gradient.cpu() for name, gradient in _gradients(model).items()}
    _assert_equal(gradients[True], gradients[False])
    block_input = num * 192 * 128 * 4
    assert block_input > offload.SMALLEST
    assert peaks[False] - peaks[True] > depth / 2 * block_input
