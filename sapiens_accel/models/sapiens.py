"""SapiensPose: a transformers backbone (Sapiens v1 or Sapiens2) and its published heatmap head. Single-device code.

transformers' `VitPoseBackbone` is the Sapiens v1 backbone (with LayerNorm eps 1e-6, no class position), and Sapiens2 is
part of transformers: this module implements no transformer.

Shape letters: b people, k keypoints, c channels, H W the input image, h w the heatmap.
"""

import fnmatch
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import Sapiens2Config, Sapiens2ForPoseEstimation, VitPoseBackbone, VitPoseBackboneConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.sapiens2.modeling_sapiens2 import Sapiens2Head

from sapiens_accel.errors import UserError
from sapiens_accel.models import kernels
from sapiens_accel.models.chunked_head import ChunkedHead, Criterion

# Of ImageNet, as in the training of Sapiens (RGB, 0..255).
PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)

# torch's fused kernels of attention.
ATTENTION = (
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
)


@dataclass(frozen=True, kw_only=True)
class Size:
    """The shape of a network. `upsample` and `convs` are the head's channels; both families upsample by 4."""

    family: Literal["sapiens", "sapiens2"]
    width: int
    depth: int
    heads: int
    upsample: tuple[int, ...] = (768, 768)
    convs: tuple[int, ...] = (768, 768)
    patch: int = 16

    @property
    def kv_heads(self) -> int:
        """Number of heads of keys and values: in Sapiens2 two query heads share one."""
        return self.heads // 2 if self.family == "sapiens2" else self.heads

    def heatmap_hw(self, input_hw: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the heatmap: each upsampling layer doubles the patch grid."""
        up = 2 ** len(self.upsample)
        return input_hw[0] // self.patch * up, input_hw[1] // self.patch * up


# Published: facebookresearch/sapiens and sapiens2. The 0.1b has no published pose head; it has that of the 0.4b here.
SIZES = {
    "sapiens_tiny": Size(family="sapiens", width=128, depth=4, heads=4, upsample=(64, 32), convs=(32, 32)),
    "sapiens_0.3b": Size(family="sapiens", width=1024, depth=24, heads=16),
    "sapiens_0.6b": Size(family="sapiens", width=1280, depth=32, heads=16),
    "sapiens_1b": Size(family="sapiens", width=1536, depth=40, heads=24),
    "sapiens_2b": Size(family="sapiens", width=1920, depth=48, heads=32),
    "sapiens2_tiny": Size(family="sapiens2", width=128, depth=4, heads=4, upsample=(64, 64), convs=(64, 64, 32)),
    "sapiens2_0.1b": Size(
        family="sapiens2", width=768, depth=12, heads=12, upsample=(1024, 768), convs=(512, 512, 256)
    ),
    "sapiens2_0.4b": Size(
        family="sapiens2", width=1024, depth=24, heads=16, upsample=(1024, 768), convs=(512, 512, 256)
    ),
    "sapiens2_0.8b": Size(
        family="sapiens2", width=1280, depth=32, heads=16, upsample=(1024, 768), convs=(512, 512, 256)
    ),
    "sapiens2_1b": Size(
        family="sapiens2", width=1536, depth=40, heads=24, upsample=(1536, 1024), convs=(768, 512, 256)
    ),
    "sapiens2_5b": Size(family="sapiens2", width=2432, depth=56, heads=32, upsample=(1024, 768), convs=(512, 512, 256)),
}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Which activations of a step are stored and which are recomputed. Changes memory and time, not the losses.

    Attributes:
        checkpointed_blocks: number of blocks, from the first on, that store only their input. The last blocks are the
            ones to store whole: the backward pass frees them before it recomputes the others.
        selective_blocks: number of blocks after these that store their matrix products and attention too, and
            recompute norms and activations.
        head_chunk: people whose heatmaps and loss are computed at a time; None is all of them.
        compiled: the blocks are compiled.
        fused: norms and gated MLPs of Sapiens2 run by fused kernels (`models.kernels`), on GPUs.
    """

    checkpointed_blocks: int = 0
    selective_blocks: int = 0
    head_chunk: int | None = None
    compiled: bool = False
    fused: bool = False


BuildHead = Callable[[], ChunkedHead]


class HeatmapHead(ChunkedHead):
    """Sapiens v1's head: 4x4 deconvolutions without bias, 1x1 convolutions, InstanceNorm without parameters, SiLU.

    The layers are numbered as in the published checkpoints (deconv_layers.{0,3}, conv_layers.{0,3}, final_layer).
    """

    def __init__(self, size: Size, num_keypoints: int) -> None:
        super().__init__()
        channels = [size.width, *size.upsample]
        self.deconv_layers = nn.Sequential(*(layer for a, b in pairwise(channels) for layer in _deconv(a, b)))
        channels = [size.upsample[-1], *size.convs]
        self.conv_layers = nn.Sequential(*(layer for a, b in pairwise(channels) for layer in _conv(a, b)))
        self.final_layer = nn.Conv2d(channels[-1], num_keypoints, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                nn.init.normal_(module.weight, std=0.001)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def maps(self, features: Float[Tensor, "b c grid_h grid_w"]) -> Float[Tensor, "b k h w"]:
        return self.final_layer(self.conv_layers(self.deconv_layers(features)))


class Sapiens2PoseHead(ChunkedHead, Sapiens2Head):  # pyright: ignore[reportIncompatibleMethodOverride]
    """transformers' head."""

    def maps(self, features: Float[Tensor, "b c grid_h grid_w"]) -> Float[Tensor, "b k h w"]:
        return Sapiens2Head.forward(self, features)


def _deconv(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
    return nn.ConvTranspose2d(inputs, outputs, 4, 2, 1, bias=False), nn.InstanceNorm2d(outputs), nn.SiLU()


def _conv(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(inputs, outputs, 1), nn.InstanceNorm2d(outputs), nn.SiLU()


def get_size(name: str) -> Size:
    """The size of this name.

    Raises:
        UserError: there is none.
    """
    if name not in SIZES:
        raise UserError(f"--model.name {name!r}: no such model (expected one of {', '.join(SIZES)})")
    return SIZES[name]


class SapiensPose(nn.Module):
    """uint8 crops to heatmaps.

    Args:
        name: a key of `SIZES`.
        num_keypoints: K.
        input_hw: the crop's height and width in pixels, multiples of the patch.
        depth: number of blocks in place of the published one, to measure single blocks.
        empty: the parameters of the backbone have no values and take no memory (meta), until `load.load` puts them in.
            The head has its random values.

    Raises:
        UserError: no such size, or an input size that is no multiple of the patch.
    """

    def __init__(
        self, name: str, num_keypoints: int, input_hw: tuple[int, int], *, depth: int | None = None, empty: bool = False
    ) -> None:
        super().__init__()
        size = get_size(name)
        size = replace(size, depth=depth or size.depth)
        if any(pixels % size.patch for pixels in input_hw):
            raise UserError(
                f"--data.input_hw {input_hw[0]}x{input_hw[1]}: {name} needs multiples of its {size.patch}-px patch"
            )
        self.name, self.size = name, size
        self.num_keypoints, self.input_hw = num_keypoints, input_hw
        build = _build_sapiens if size.family == "sapiens" else _build_sapiens2
        self.backbone: Any
        self.head: ChunkedHead
        with init_empty_weights(include_buffers=False) if empty else nullcontext():
            self.backbone, build_head = build(size, num_keypoints, input_hw)
        self.head = build_head()
        self.keep_first_slot_empty()

    @property
    def heatmap_hw(self) -> tuple[int, int]:
        return self.size.heatmap_hw(self.input_hw)

    @property
    def blocks(self) -> list[GradientCheckpointingLayer]:
        """The transformer blocks, from input to output."""
        return [module for module in self.backbone.modules() if isinstance(module, GradientCheckpointingLayer)]

    def lay_out(self, layout: Layout) -> None:
        """Apply a layout, from the next forward on."""
        # Non-reentrant: reentrant checkpoints give no gradients if their input needs none. Without dropout (of
        # adapters) blocks draw no random numbers, so the generators need not be restored for the recomputation.
        draws = any(isinstance(module, nn.Dropout) and module.p > 0 for module in self.backbone.modules())
        settings = {"use_reentrant": False, "preserve_rng_state": draws}
        self.backbone.activation_checkpointing_enable(settings)
        adapted = any(".lora_" in name for name, _ in self.backbone.named_parameters())
        contexts = partial(create_selective_checkpoint_contexts, partial(_choose_stored, adapted=adapted))
        for index, block in enumerate(self.blocks):
            block.gradient_checkpointing = index < layout.checkpointed_blocks + layout.selective_blocks
            if index >= layout.checkpointed_blocks:
                func: Any = partial(checkpoint, **settings, context_fn=contexts)
                block._gradient_checkpointing_func = func
            if layout.compiled:
                block.compile()
        kernels.use_fused(self.backbone, layout.fused)
        self.head.chunk = layout.head_chunk

    def forward(
        self, image: UInt8[Tensor, "b 3 H W"], criterion: Criterion | None = None
    ) -> Float[Tensor, "b k h w"] | tuple[Float[Tensor, ""], Float[Tensor, "t"]]:
        """Heatmaps; with a criterion, their loss and its terms, in chunks of people."""
        # A frozen backbone stores no activations, whether its blocks are checkpointed or not.
        learns = any(p.requires_grad for p in self.backbone.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and learns):
            features = self._features(_normalize(image).to(next(self.parameters()).dtype))
        return self.head(features, criterion)

    def _features(self, pixels: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b c grid_h grid_w"]:
        grid_hw = [pixels.shape[-2] // self.size.patch, pixels.shape[-1] // self.size.patch]
        if self.size.family == "sapiens":
            # By its parts: the backbone's own forward returns the output of every block, which would stay in memory.
            tokens = self.backbone.embeddings(pixels)
            del pixels  # the variable would keep them in memory through the whole forward
            tokens = self.backbone.layernorm(self.backbone.encoder(tokens).last_hidden_state)
        else:
            tokens = self.backbone(pixels).last_hidden_state[:, -grid_hw[0] * grid_hw[1] :]
        return tokens.transpose(1, 2).unflatten(2, grid_hw)

    def layer_groups(self) -> dict[str, list[tuple[str, nn.Parameter]]]:
        """The ordered, complete partition of the parameters, from input to output.

        embeddings, block_0 ... block_{depth - 1}, norm, head. The one definition of a layer, for freezing and for
        layer-wise learning rate decay.
        """
        groups: dict[str, list[tuple[str, nn.Parameter]]] = {
            name: [] for name in ("embeddings", *(f"block_{i}" for i in range(self.size.depth)), "norm", "head")
        }
        for name, parameter in self.named_parameters():
            groups[_group_of(name)].append((name, parameter))
        return groups

    def freeze(self, patterns: Sequence[str]) -> None:
        """Freeze the layer groups that match a shell pattern, and unfreeze all others.

        Raises:
            UserError: a pattern that matches no group, or patterns that freeze everything.
        """
        groups = self.layer_groups()
        for pattern in patterns:
            if not fnmatch.filter(groups, pattern):
                raise UserError(f"frozen: {pattern!r} matches no layer group (expected one of {', '.join(groups)})")
        for group, members in groups.items():
            frozen = any(fnmatch.fnmatch(group, pattern) for pattern in patterns)
            for _, parameter in members:
                parameter.requires_grad_(not frozen)
        self.keep_first_slot_empty()
        if not any(p.requires_grad for p in self.parameters()):
            raise UserError(f"frozen: {', '.join(patterns)} leaves nothing to learn. Freeze fewer layer groups")

    def keep_first_slot_empty(self) -> None:
        """Let slot 0 of the positions have no gradient, so that it stays zero.

        VitPose adds it to every position; Sapiens has no such slot.
        """
        positions = getattr(self.backbone.embeddings, "position_embeddings", None)
        if self.size.family != "sapiens" or positions is None:
            return
        if positions.requires_grad and not positions._backward_hooks:  # a frozen one takes no hook, and needs none
            positions.register_hook(_without_first_slot)

    def description(self) -> dict[str, Any]:
        """The description of this network for config.json, from which it can be rebuilt."""
        shape = {"num_keypoints": self.num_keypoints, "input_hw": list(self.input_hw), "size": asdict(self.size)}
        return {"name": self.name, **shape}


def _choose_stored(_context: Any, operation: Any, *args: Any, adapted: bool, **_: Any) -> CheckpointPolicy:
    """Whether a selectively checkpointed block stores the result of an operation.

    Not of products that cost little for their size (those of adapters, whose rank is small), nor of the MLP's last
    matrix: nothing needs it, so that its recomputation is never reached; with adapters, whose products follow it, it
    is. Maps of attention (bmm, of the MATH kernel) are too large.
    """
    if operation in ATTENTION:
        return CheckpointPolicy.MUST_SAVE
    if operation in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
        inputs, outputs = args[-1].shape
        if outputs <= 4 * inputs and inputs <= (4 if adapted else 2) * outputs:
            return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def _group_of(parameter_name: str) -> str:
    """The layer group of a parameter, by its name in either family."""
    parts = parameter_name.split(".")
    if parts[0] == "head":
        return "head"
    if "layer" in parts:
        return f"block_{parts[parts.index('layer') + 1]}"
    return "norm" if parts[1] in ("layernorm", "norm") else "embeddings"


def _normalize(image: UInt8[Tensor, "b 3 H W"]) -> Float[Tensor, "b 3 H W"]:
    # Per channel with Python numbers: a tensor of constants would be copied to the device, with a synchronization, in
    # every step; a buffer would be rounded by an engine that casts the module. In place: one copy, not three.
    pixels = image.to(torch.float32, copy=True)
    for channel, mean, std in zip(pixels.unbind(1), PIXEL_MEAN, PIXEL_STD, strict=True):
        channel.sub_(mean).div_(std)
    return pixels


def _build_sapiens(size: Size, num_keypoints: int, input_hw: tuple[int, int]) -> tuple[nn.Module, BuildHead]:
    config = VitPoseBackboneConfig(
        image_size=input_hw,
        patch_size=(size.patch, size.patch),
        hidden_size=size.width,
        num_hidden_layers=size.depth,
        num_attention_heads=size.heads,
        layer_norm_eps=1e-6,
    )
    config._attn_implementation = kernels.BY_DEVICE
    backbone = VitPoseBackbone(config)
    positions = backbone.embeddings.position_embeddings
    grid_hw = (input_hw[0] // size.patch, input_hw[1] // size.patch)
    with torch.no_grad():
        positions[:, 0] = 0.0
        positions[:, 1:] = sine_cosine_positions(grid_hw, size.width)
    return backbone, partial(HeatmapHead, size, num_keypoints)


def sine_cosine_positions(grid_hw: tuple[int, int], width: int) -> Float[Tensor, "n c"]:
    """The initial position embedding of Sapiens: half of the channels for the column, half for the row.

    As in its MAE pre-training (He et al. 2021, https://arxiv.org/abs/2111.06377, official code's `pos_embed.py`).
    """
    frequencies = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float32) / (width // 4))
    rows, columns = torch.meshgrid(torch.arange(grid_hw[0]), torch.arange(grid_hw[1]), indexing="ij")
    angles = [axis.flatten()[:, None] * frequencies for axis in (columns, rows)]
    return torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], dim=1)


def _without_first_slot(gradient: Float[Tensor, "1 n c"]) -> Float[Tensor, "1 n c"]:
    return torch.cat([torch.zeros_like(gradient[:, :1]), gradient[:, 1:]], dim=1)


def _build_sapiens2(size: Size, num_keypoints: int, input_hw: tuple[int, int]) -> tuple[nn.Module, BuildHead]:
    config = sapiens2_config(size, num_keypoints, input_hw)
    config._attn_implementation = kernels.BY_DEVICE
    pose = Sapiens2ForPoseEstimation(config)
    return pose.model, partial(_build_sapiens2_head, config, pose)


def _build_sapiens2_head(config: Sapiens2Config, pose: Sapiens2ForPoseEstimation) -> ChunkedHead:
    """The head of `pose`, or a new one with initial values as transformers gives them, if that has none."""
    head = Sapiens2PoseHead(config)
    if any(p.is_meta for p in pose.decode_head.parameters()) and not any(p.is_meta for p in head.parameters()):
        for module in reversed(list(head.modules())):  # the head itself last: it overwrites what its layers do
            pose._init_weights(module)
    else:
        head.load_state_dict(pose.decode_head.state_dict(keep_vars=True), assign=True)
    # Published: kaiming. With few keypoints, maps then have an initial standard deviation of 3.3, and the loss is 10.
    nn.init.normal_(head.predictor.weight, std=0.001)
    return head


def sapiens2_config(size: Size, num_keypoints: int, input_hw: tuple[int, int]) -> Sapiens2Config:
    """The transformers config of a Sapiens2 pose network."""
    return Sapiens2Config(
        image_size=list(input_hw),
        patch_size=size.patch,
        hidden_size=size.width,
        intermediate_size=4 * size.width,
        num_hidden_layers=size.depth,
        num_attention_heads=size.heads,
        num_key_value_attention_heads=size.kv_heads,
        layerscale_value=1e-4,  # as published; transformers starts at 1
        pos_embed_rescale=None,  # transformers rescales positions at random in training; Sapiens2 does not
        num_labels=num_keypoints,  # pyright: ignore[reportCallIssue]  (a key of every transformers config)
        head_config={  # pyright: ignore[reportArgumentType]  (transformers takes the dict)
            "upsample_out_channels": list(size.upsample),
            "upsample_kernel_sizes": [4] * len(size.upsample),
            "conv_out_channels": list(size.convs),
            "conv_kernel_sizes": [1] * len(size.convs),
        },
    )


@contextmanager
def use_input_size(model: nn.Module, input_hw: tuple[int, int]) -> Iterator[None]:
    """Run a network on crops of another size: the position embedding of Sapiens v1 is resized to their patch grid.

    Sapiens2 computes its positions from the image. Other modules are left unchanged.

    Raises:
        UserError: the embedding is sharded across ranks (ZeRO-3).
    """
    network = getattr(model, "module", model)
    if not isinstance(network, SapiensPose) or network.size.family != "sapiens" or input_hw == network.input_hw:
        yield
        return
    embeddings, patch = network.backbone.embeddings, network.size.patch
    own = embeddings.position_embeddings
    if hasattr(own, "ds_id"):
        raise UserError("--eval.scales: not under ZeRO-3, which shards the positions. Use eval.py after training")
    grid_hw, target_hw = ((hw[0] // patch, hw[1] // patch) for hw in (network.input_hw, input_hw))
    resized = torch.cat([own[:, :1], resize_positions(own[:, 1:], grid_hw, target_hw).to(own.dtype)], dim=1)
    try:
        embeddings.position_embeddings = nn.Parameter(resized, requires_grad=False)
        embeddings.patch_embeddings.image_size = input_hw
        yield
    finally:
        embeddings.position_embeddings = own
        embeddings.patch_embeddings.image_size = network.input_hw


def resize_positions(
    positions: Float[Tensor, "1 n c"], grid_hw: tuple[int, int], target_hw: tuple[int, int]
) -> Float[Tensor, "1 m c"]:
    """Resize position embeddings to another patch grid: bicubic, in fp32, without antialiasing.

    As published (pretrain/mmpretrain/models/utils/embed.py).
    """
    grid = positions.float().transpose(1, 2).unflatten(2, grid_hw)
    return F.interpolate(grid, size=target_hw, mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
