"""The head's loss in chunks of people against the plain computation: all heatmaps, the loss, one backward."""

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sapiens_accel.config.schema import TeacherConfig
from sapiens_accel.data.dataset import Batch, Labeled, Pair, View
from sapiens_accel.models.chunked_head import ChunkedHead, Criterion
from sapiens_accel.models.sapiens import SIZES, HeatmapHead, Layout, SapiensPose
from sapiens_accel.pose.heatmap import Codec
from sapiens_accel.pose.skeleton import COCO17
from sapiens_accel.training.ema import MovingAverage
from sapiens_accel.training.mean_teacher import MeanTeacher, PseudoLabels, TeacherPrediction, TeacherSetup
from sapiens_accel.training.objectives import Supervised, heatmap_kl

NUM = 7  # people
EVERYONE = slice(0, NUM)
PHASE1 = ("embeddings", "block_*", "norm")
PARTS = ("backbone.", "head.")
CODEC = Codec(input_hw=(64, 48), heatmap_hw=(16, 12), sigma=1.0)
GENERATOR = torch.Generator().manual_seed(5)
IMAGE = torch.randint(0, 256, (NUM, 3, 64, 48), dtype=torch.uint8, generator=GENERATOR)
TARGET = torch.rand(NUM, 17, 16, 12, generator=GENERATOR)
WEIGHTS = torch.rand(NUM, 17, generator=GENERATOR)


def _terms(heatmaps: Tensor, people: slice) -> Tensor:
    """Two terms, neither linear in the heatmaps, in which every person has targets and weights of their own."""
    heatmaps, weights = heatmaps.float(), WEIGHTS[people]
    error = (heatmaps - TARGET[people]).square().mean(dim=(2, 3))
    height = heatmaps.flatten(2).logsumexp(dim=-1)
    return torch.stack([(weights * error).sum(), -0.3 * (weights.flip(1) * height).sum()]) / WEIGHTS.numel()


def _times(factor: float) -> Criterion:
    return lambda heatmaps, people: factor * _terms(heatmaps, people)


def _gradients(model: nn.Module) -> dict[str, Tensor | None]:
    """The gradients, which are then forgotten."""
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    return found


def _plain(model: SapiensPose, criterion: Criterion = _terms, factor: float = 1.0) -> tuple[Tensor, dict]:
    """Terms and gradients: all heatmaps at once, their loss, its backward."""
    terms = criterion(model(IMAGE), EVERYONE)
    (terms.sum() * factor).backward()
    return terms.detach(), _gradients(model)


def _chunked(
    model: SapiensPose, layout: Layout, criterion: Criterion = _terms, factor: float = 1.0
) -> tuple[Tensor, Tensor, dict]:
    """Loss, terms and gradients."""
    model.lay_out(layout)
    loss, terms = model(IMAGE, criterion)
    (loss * factor).backward()
    return loss.detach(), terms, _gradients(model)


def _off(found: dict, expected: dict, factor: float = 1.0, part: str = "") -> float:
    """norm(found / factor - expected) / norm(expected), of a part of the network."""
    assert {name for name, g in found.items() if g is None} == {name for name, g in expected.items() if g is None}
    names = [name for name, g in expected.items() if g is not None and name.startswith(part)]
    if not names:
        return 0.0
    ours, theirs = (torch.cat([gradients[n].flatten().double() for n in names]) for gradients in (found, expected))
    return ((ours / factor - theirs).norm() / theirs.norm()).item()


def _assert_same(found: dict, expected: dict, factor: float = 1.0) -> None:
    """But for the rounding of fp32 (4e-7; 6e-7 of the backbone's gradient, which is what is left of larger terms)."""
    assert _off(found, expected, factor) < 1e-6
    assert all(_off(found, expected, factor, part) < 3e-6 for part in PARTS)


# ---- The same numbers


@pytest.mark.parametrize("checkpointed", [0, 2, 4])
@pytest.mark.parametrize("chunk", [1, 3, NUM, NUM + 2, None])
def test_chunks_give_the_loss_the_terms_and_every_gradient_of_the_plain_computation(
    tiny: SapiensPose, chunk: int | None, checkpointed: int
) -> None:
    expected, gradients = _plain(tiny)
    loss, terms, found = _chunked(tiny, Layout(checkpointed_blocks=checkpointed, head_chunk=chunk))
    assert all(gradient is not None and gradient.any() for gradient in gradients.values())
    torch.testing.assert_close(terms, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(loss, expected.sum(), rtol=1e-6, atol=0)
    _assert_same(found, gradients)


@pytest.mark.parametrize("chunk", [3, None])
@pytest.mark.parametrize("frozen", [("head",), PHASE1, ("embeddings", "block_[01]"), ("block_*", "norm")])
def test_frozen_layers_get_no_gradient_and_the_others_the_same_one(
    tiny: SapiensPose, frozen: tuple[str, ...], chunk: int | None
) -> None:
    """Without the backbone the features need no gradient; without the head nothing but they do."""
    tiny.freeze(frozen)
    _, gradients = _plain(tiny)
    _, _, found = _chunked(tiny, Layout(checkpointed_blocks=2, head_chunk=chunk))
    learning = {name for name, parameter in tiny.named_parameters() if parameter.requires_grad}
    assert {name for name, gradient in found.items() if gradient is not None} == learning
    _assert_same(found, gradients)


def test_a_head_that_learns_in_part_gets_each_gradient_where_it_belongs(tiny: SapiensPose) -> None:
    for parameter in list(tiny.head.parameters())[::2]:
        parameter.requires_grad_(False)
    _, gradients = _plain(tiny)
    _, _, found = _chunked(tiny, Layout(head_chunk=3))
    assert any(gradient is None for gradient in found.values())
    _assert_same(found, gradients)


@pytest.mark.parametrize("factor", [3.0, -0.01])
def test_the_gradient_that_reaches_the_loss_is_honoured(tiny: SapiensPose, factor: float) -> None:
    _, gradients = _plain(tiny)
    _, _, found = _chunked(tiny, Layout(head_chunk=3), factor=factor)
    _assert_same(found, gradients, factor)


def test_gradients_come_with_the_backward_and_accumulate(tiny: SapiensPose) -> None:
    """As the loop does it: every micro-batch's loss is divided by their number."""
    _, gradients = _plain(tiny)
    tiny.lay_out(Layout(checkpointed_blocks=4, head_chunk=3))
    first, terms = tiny(IMAGE, _terms)
    assert all(parameter.grad is None for parameter in tiny.parameters())
    assert first.requires_grad and not terms.requires_grad
    second, _ = tiny(IMAGE, _terms)  # before the first one's backward
    (second / 2).backward()
    (first / 2).backward()
    _assert_same(_gradients(tiny), gradients)


@pytest.mark.parametrize("chunk", [1, 3, NUM + 2, None])
def test_without_gradients_chunks_change_nothing(tiny: SapiensPose, chunk: int | None) -> None:
    expected, terms = tiny(IMAGE).detach(), _plain(tiny)[0]
    tiny.eval().lay_out(Layout(checkpointed_blocks=4, head_chunk=chunk))
    with torch.no_grad():
        heatmaps = tiny(IMAGE)
        loss, found = tiny(IMAGE, _terms)
    assert not heatmaps.requires_grad and not loss.requires_grad
    torch.testing.assert_close(heatmaps, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(found, terms, rtol=1e-6, atol=0)
    torch.testing.assert_close(loss, terms.sum(), rtol=1e-6, atol=0)


def test_nothing_that_learns_is_a_loss_without_gradients(tiny: SapiensPose) -> None:
    expected, _ = _plain(tiny)
    tiny.requires_grad_(False).lay_out(Layout(head_chunk=3))
    loss, terms = tiny(IMAGE, _terms)
    assert not loss.requires_grad
    torch.testing.assert_close(terms, expected, rtol=1e-6, atol=0)


# ---- 16 bits, against fp32 with the same rounded weights


def test_bf16_gradients_are_no_worse_in_chunks(tiny: SapiensPose) -> None:
    _, plain = _plain(tiny.bfloat16())
    chunked = [_chunked(tiny, Layout(checkpointed_blocks=2, head_chunk=chunk))[2] for chunk in (1, 3)]
    _, gradients = _plain(tiny.float())
    for found in chunked:
        assert all(gradient is not None and gradient.dtype == torch.bfloat16 for gradient in found.values())
        assert _off(found, gradients) < 2e-2
        assert all(_off(found, gradients, 1, part) < 1.05 * _off(plain, gradients, 1, part) for part in PARTS)


@pytest.mark.parametrize("chunk", [3, None])
def test_autocast_gradients_are_no_worse_in_chunks(tiny: SapiensPose, chunk: int | None) -> None:
    _, gradients = _plain(tiny)
    tiny.lay_out(Layout(head_chunk=chunk))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = _terms(tiny(IMAGE), EVERYONE)
    terms.sum().backward()
    plain = _gradients(tiny)
    seen: list[torch.dtype] = []
    last = list(tiny.head.children())[-1]
    last.register_forward_hook(lambda _module, _inputs, maps: seen.append(maps.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, same = tiny(IMAGE, _terms)
    loss.backward()
    found = _gradients(tiny)
    assert set(seen) == {torch.bfloat16}, "the head is computed in 16 bits"
    assert all(gradient is not None and gradient.dtype == torch.float32 for gradient in found.values())
    torch.testing.assert_close(same, terms.detach(), rtol=1e-6, atol=0)
    assert _off(found, gradients) < 2e-2
    assert all(_off(found, gradients, 1, part) < 1.05 * _off(plain, gradients, 1, part) for part in PARTS)


@pytest.mark.parametrize("weight", [1.0, 1e-3])
def test_fp16_gradients_do_not_underflow(tiny: SapiensPose, weight: float) -> None:
    """A chunk's backward is over before the loss scaler has multiplied the loss, so it must take care of itself."""
    scale, criterion = 65536.0, _times(weight)
    tiny.half()
    plain = [(factor, _plain(tiny, criterion, factor)[1]) for factor in (1.0, scale) if weight < 1]
    chunked = [_chunked(tiny, Layout(head_chunk=chunk), criterion, scale)[2] for chunk in (1, 3)]
    _, gradients = _plain(tiny.float())
    if plain:
        unscaled, scaled = (_off(found, gradients, weight * factor) for factor, found in plain)
        assert scaled < 5e-3, "what a loss scaler is for"
        assert unscaled > 0.5, "a chunk that does no more than this loses its gradients"
    for found in chunked:
        assert all(gradient is not None and gradient.dtype == torch.float16 for gradient in found.values())
        assert _off(found, gradients, weight * scale) < 5e-3
        assert _off(found, gradients, weight * scale, "head.") < 2e-3


class _Bias(ChunkedHead):
    """Maps of ones: wrong by 1 everywhere, if they should be zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(1, 1, 1)
        nn.init.zeros_(self.layer.weight)
        nn.init.ones_(self.layer.bias)

    def maps(self, features: Tensor) -> Tensor:
        return self.layer(features)


def test_chunks_are_summed_in_fp32() -> None:
    """Each of 1000 people adds the same; a sum in bf16 would end at 256 of them."""
    head = _Bias().bfloat16()
    head.chunk = 1
    head(torch.zeros(1000, 1, 4, 3).bfloat16(), lambda maps, _: maps.float().square().sum().reshape(1))[0].backward()
    assert head.layer.bias.grad is not None
    assert head.layer.bias.grad.item() == pytest.approx(1000 * 2 * 12, rel=4e-3)


@pytest.mark.parametrize(
    ("num", "weight"),
    [
        (4, 1.0),
        (4, 10.0),
        (16, 1.0),
    ],
)
def test_fp16_sums_over_the_largest_maps_do_not_overflow(num: int, weight: float) -> None:
    """Maps of a 1024x768 input. A loss scaler cannot help: the factor within a chunk does not follow it."""
    head = _Bias().half()

    def criterion(heatmaps: Tensor, people: slice) -> Tensor:
        return weight * heatmaps.float().square().mean(dim=(1, 2, 3)).sum().reshape(1) / num

    head(torch.zeros(num, 1, 256, 192).half(), criterion)[0].backward()
    assert head.layer.bias.grad is not None
    assert head.layer.bias.grad.item() == pytest.approx(2 * weight, rel=1e-3)


def test_a_chunk_of_fp16_people_without_labels_adds_nothing() -> None:
    head = _Bias().half()
    head.chunk = 2
    weights = torch.tensor([0.0, 0.0, 1.0, 1.0])

    def criterion(heatmaps: Tensor, people: slice) -> Tensor:
        return (weights[people] * heatmaps.float().square().mean(dim=(1, 2, 3))).sum().reshape(1)

    head(torch.zeros(4, 1, 8, 6).half(), criterion)[0].backward()
    assert head.layer.bias.grad is not None
    assert head.layer.bias.grad.item() == pytest.approx(4.0, rel=1e-3)


# ---- The objectives, with people of whom some are labeled


def _view(num: int, seed: int) -> View:
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (num, 3, 64, 48), dtype=torch.uint8, generator=generator)
    return View(image, torch.eye(2, 3).repeat(num, 1, 1), torch.zeros(num, dtype=torch.bool))


def _batch() -> tuple[Batch, PseudoLabels]:
    """5 labeled and 6 unlabeled people, and the teacher's points for these."""
    generator = torch.Generator().manual_seed(7)
    points_xy = torch.rand(11, 17, 2, generator=generator) * torch.tensor([47.0, 63.0])
    weights = torch.rand(11, 17, generator=generator)
    weights *= torch.rand(11, 17, generator=generator) > 0.3
    strong = _view(6, 9)
    labeled = Labeled(_view(5, 8), points_xy[:5], weights[:5], torch.arange(5))
    ones = torch.ones_like(weights[5:])
    prediction = TeacherPrediction(points_xy[5:], ones, ones, ones > 0, points_xy[5:], None)
    prepared = PseudoLabels(prediction, weights[5:], strong.image, torch.tensor(0.02), {})
    return Batch(labeled, Pair(strong, strong, torch.zeros(6, 0, 4))), prepared


def _labeled_loss(heatmaps: Tensor, batch: Batch) -> Tensor:
    target, weights = CODEC.encode(batch.labeled.points_xy, batch.labeled.weights)
    return 2.0 * (weights[..., None, None] * (heatmaps - target).square()).mean()


@pytest.mark.parametrize("chunk", [1, 2, 5, 7, None])
def test_supervised_is_the_same_in_every_chunk_size(tiny: SapiensPose, chunk: int | None) -> None:
    batch, _ = _batch()
    expected = _labeled_loss(tiny(batch.labeled.view.image), batch)
    expected.backward()
    gradients = _gradients(tiny)
    tiny.lay_out(Layout(head_chunk=chunk))
    loss, logs = Supervised(codec=CODEC, loss_weight=2.0).loss(tiny, batch, None)
    loss.backward()
    assert logs == {} and expected > 0.01
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    _assert_same(_gradients(tiny), gradients)


@pytest.mark.parametrize("chunk", [1, 3, 5, 6, None])
def test_mean_teacher_is_the_same_in_every_chunk_size(tiny: SapiensPose, chunk: int | None) -> None:
    """The border between labeled and unlabeled people lies between two chunks (1, 5), or within one."""
    batch, prepared = _batch()
    heatmaps = tiny(torch.cat([batch.labeled.view.image, prepared.image]))
    target, _ = CODEC.encode(prepared.prediction.points_xy, prepared.weights)
    kl = prepared.weights * heatmap_kl(heatmaps[5:], target, 1.0, 0.5)
    labeled, unlabeled = _labeled_loss(heatmaps[:5], batch), 0.02 * kl.sum()
    (labeled + unlabeled).backward()
    gradients = _gradients(tiny)
    assert 0.1 < unlabeled / labeled < 10, "neither hides the other"
    tiny.lay_out(Layout(head_chunk=chunk))
    config = TeacherConfig(temperature=0.5)
    supervised = Supervised(codec=CODEC, loss_weight=2.0)
    setup = TeacherSetup(average=MovingAverage(nn.Linear(1, 1)), student_parameters=list, num_steps=1, gather=list)
    objective = MeanTeacher(supervised, setup, config, COCO17.mirror, COCO17.names)
    loss, logs = objective.loss(tiny, batch, prepared)
    loss.backward()
    torch.testing.assert_close(logs["loss_labelled"], labeled.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(logs["loss_unlabelled"], unlabeled.detach(), rtol=2e-6, atol=0)
    torch.testing.assert_close(loss.detach(), (labeled + unlabeled).detach(), rtol=2e-6, atol=0)
    _assert_same(_gradients(tiny), gradients)


# ---- Never all heatmaps


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize(("chunk", "sizes"), [(1, [1] * NUM), (3, [3, 3, 1]), (NUM + 2, [NUM]), (None, [NUM])])
def test_the_criterion_sees_everyone_once_when_the_chunk_before_is_gone(
    tiny: SapiensPose, chunk: int | None, sizes: list[int], gradients: bool
) -> None:
    people_seen: list[int] = []
    computed: list[weakref.ref] = []
    maps: list[weakref.ref] = []  # as the criterion gets them

    def none_is_left(*_: Any) -> None:
        assert not any(ref() is not None for ref in (*computed, *maps))

    def criterion(heatmaps: Tensor, people: slice) -> Tensor:
        maps.append(weakref.ref(heatmaps))
        assert len(heatmaps) == people.stop - people.start == sizes[len(maps) - 1]
        people_seen.extend(range(people.start, people.stop))
        return _terms(heatmaps, people)

    tiny.lay_out(Layout(head_chunk=chunk))
    layers = [module for module in tiny.head.modules() if not list(module.children())]
    layers[0].register_forward_pre_hook(none_is_left)
    layers[-1].register_forward_hook(lambda _module, _inputs, output: computed.append(weakref.ref(output)))
    with torch.set_grad_enabled(gradients):
        loss, _ = tiny(IMAGE, criterion)
    assert people_seen == list(range(NUM)) and len(computed) == len(maps) == len(sizes)
    none_is_left()  # what is kept for the backward are no heatmaps
    if gradients:
        loss.backward()
        assert len(computed) == len(sizes), "nothing is computed twice"


def _peak(work: Callable[[], Any]) -> int:
    """Bytes: the most that is allocated at a time."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    results = profile.profiler.kineto_results  # pyright: ignore[reportOptionalMemberAccess]
    events = [event for event in results.events() if event.name() == "[memory]"]
    live = torch.tensor([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]).cumsum(0)
    return int(live.max())


def _head_step(head: ChunkedHead, num: int, chunk: int | None, *, wanted: bool = True) -> int:
    """The peak of the head's forward and backward, without its input."""
    features = torch.randn(num, 128, 4, 3).requires_grad_(wanted)
    head.chunk = chunk
    # The loss has no tensors of its own that would count.
    return _peak(lambda: head(features, lambda maps, _: maps.square().sum().reshape(1))[0].backward())


def _saved(head: ChunkedHead) -> int:
    """Bytes a person that the head keeps for a backward."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        maps = head(torch.randn(16, 128, 4, 3, requires_grad=True))
    own = sum(kept.get(p.untyped_storage().data_ptr(), 0) for p in head.parameters())
    assert maps.requires_grad
    return (sum(kept.values()) - own) // 16


def test_memory_grows_with_the_chunk_and_not_with_the_people(tiny: SapiensPose) -> None:
    """12 more people add 12 gradients of their features, 6 KiB each; a person's heatmaps alone are 13 KiB.

    Nor does it grow with the number of chunks, once there are two: then one's gradients meet the sum of those before.
    """
    head, features = tiny.head, 128 * 4 * 3 * 4
    saved = _saved(head)
    assert saved > 20 * features
    _head_step(head, 4, 2)  # the first has the parameters' gradients to allocate
    few, many = (_head_step(head, num, 2) for num in (4, 16))
    assert many - few <= 12 * features + 1024
    # Without the backbone not even they are there.
    few, many = (_head_step(head, num, 2, wanted=False) for num in (4, 16))
    assert many - few <= 1024
    whole, half = (_head_step(head, 16, chunk) for chunk in (None, 8))
    assert whole - half > 0.5 * 8 * saved
    head.requires_grad_(False)
    few, many = (_head_step(head, num, 2) for num in (4, 16))
    assert many - few <= 12 * features + 1024


def test_without_gradients_only_the_heatmaps_of_all_people_are_held() -> None:
    torch.manual_seed(0)
    head = HeatmapHead(SIZES["sapiens_tiny"], 17).requires_grad_(False)
    maps, peaks = 17 * 16 * 12 * 4, {}
    for num in (32, 64):
        features = torch.randn(num, 128, 4, 3)
        for chunk in (2, None):
            head.chunk = chunk
            with torch.no_grad():
                peaks[num, chunk] = _peak(lambda features=features: head(features))
    assert peaks[64, 2] - peaks[32, 2] <= 2 * 32 * maps + 1024, "the parts, and all of them after one another"
    assert peaks[64, None] - peaks[32, None] > 3 * 32 * maps
