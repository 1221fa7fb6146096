"""The head and its loss in chunks of people, each with its backward pass immediately after its forward pass.

With checkpointed blocks the heatmap head takes most of the memory of a step: at 512x384 it saves 0.18 GiB of
activations a person. None of its layers mixes people (InstanceNorm is per person), so the loss is a sum over people:
the backward pass of a chunk follows its forward pass, and its activations are freed before the next chunk. Nothing is
computed twice. (The idea is that of fused linear cross-entropy losses, https://arxiv.org/abs/2410.10989.)

Shape letters: b people, n people of one chunk, c channels, k keypoints, h w the heatmap, t terms of the loss.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

# Heatmaps of the people `slice` of a micro-batch -> their contribution to each term of the loss.
Criterion = Callable[[Float[Tensor, "n k h w"], slice], Float[Tensor, "t"]]

# fp16 holds 6e-8 to 65504: the gradient of a chunk is scaled so that the largest absolute sum of a map is this.
HALF_SUM = 4096.0


class ChunkedHead(nn.Module):
    """A head whose loss is computed chunk by chunk. Subclasses implement `maps`."""

    chunk: int | None = None  # people at a time; None: all

    def maps(self, features: Float[Tensor, "b c grid_h grid_w"]) -> Float[Tensor, "b k h w"]:
        raise NotImplementedError

    def forward(
        self, features: Float[Tensor, "b c grid_h grid_w"], criterion: Criterion | None = None
    ) -> Float[Tensor, "b k h w"] | tuple[Float[Tensor, ""], Float[Tensor, "t"]]:
        """Heatmaps; with a criterion, the loss and its terms instead (the loss is their sum, the terms are detached).

        Call backward on the loss exactly once, and without restricting it to inputs other than the head's parameters.
        """
        if criterion is None:
            if torch.is_grad_enabled():
                return self.maps(features)
            return torch.cat([self.maps(features[people]) for people in _chunks(len(features), self.chunk)])
        learning = [p for p in self.parameters() if p.requires_grad]
        if torch.is_grad_enabled() and (learning or features.requires_grad):
            return _ChunkedLoss.apply(self.maps, criterion, self.chunk or len(features), features, *learning)
        terms = sum(criterion(self.maps(features[people]), people) for people in _chunks(len(features), self.chunk))
        assert isinstance(terms, Tensor)
        return terms.sum(), terms


def _chunks(num: int, size: int | None) -> list[slice]:
    size = size or num
    return [slice(start, min(start + size, num)) for start in range(0, num, size)]


class _ChunkedLoss(torch.autograd.Function):
    """Computes the gradients in its forward; its backward multiplies them by the gradient of the loss."""

    @staticmethod
    def forward(
        ctx: Any, maps: Callable, criterion: Criterion, chunk: int, features: Tensor, *parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        wanted = ctx.needs_input_grad[3]
        # A loss scaler applies only in backward, too late for these sums: in fp16 they would underflow to zero.
        wide = torch.float32 if features.dtype == torch.float16 else features.dtype
        gradient = torch.empty_like(features, dtype=wide) if wanted else None
        ctx.parameters, total = None, None
        # The activations of a chunk are freed with it: hooks that offload saved tensors must not see them.
        with torch.enable_grad(), saved_tensors_hooks(_identity, _identity):
            for people in _chunks(len(features), chunk):
                part = features[people].detach().requires_grad_(wanted)
                heatmaps = maps(part)
                terms, outer, scale = _differentiate_by_maps(heatmaps, criterion, people)
                inputs = [part, *parameters] if wanted else list(parameters)
                grads = list(torch.autograd.grad(heatmaps, inputs, outer))
                del heatmaps, outer, inputs, part
                if gradient is not None:
                    gradient[people] = _unscale(grads.pop(0), scale)
                ctx.parameters = _add_gradients(ctx.parameters, grads, scale)
                total = terms if total is None else total + terms
                del grads
        assert total is not None
        ctx.features, ctx.dtypes = gradient, [features.dtype, *(p.dtype for p in parameters)]
        ctx.mark_non_differentiable(total)
        return total.sum(), total

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        factor = grad_loss.float()
        features = None if ctx.features is None else (ctx.features.float() * factor).to(ctx.dtypes[0])
        parameters = [g.mul_(factor).to(dtype) for g, dtype in zip(ctx.parameters, ctx.dtypes[1:], strict=True)]
        ctx.features = ctx.parameters = None
        return None, None, None, features, *parameters


def _differentiate_by_maps(
    heatmaps: Float[Tensor, "n k h w"], criterion: Criterion, people: slice
) -> tuple[Float[Tensor, "t"], Float[Tensor, "n k h w"], Float[Tensor, ""] | None]:
    """The terms of the loss, its gradient by the maps in their dtype, and the factor in that gradient (None: 1)."""
    leaf = heatmaps.detach().float().requires_grad_()
    terms = criterion(leaf, people)
    (outer,) = torch.autograd.grad(terms.sum(), leaf)
    scale = None
    if heatmaps.dtype == torch.float16:
        most = outer.abs().sum(dim=(0, 2, 3)).amax()
        scale = torch.where(most > 0, HALF_SUM / most.clamp_min(1e-30), 1.0)  # 0 if no person of the chunk is labeled
        outer = outer * scale
    return terms.detach(), outer.to(heatmaps.dtype), scale


def _unscale(gradient: Tensor, scale: Tensor | None) -> Tensor:
    return gradient if scale is None else gradient.float() / scale


def _add_gradients(sums: list[Tensor] | None, grads: Sequence[Tensor], scale: Tensor | None) -> list[Tensor]:
    """Sum in fp32: 16-bit sums lose small terms."""
    grads = [_unscale(grad, scale) for grad in grads]
    if sums is None:
        return [grad.float() for grad in grads]
    return [total.add_(grad) for total, grad in zip(sums, grads, strict=True)]


def _identity(tensor: Tensor) -> Tensor:
    return tensor
