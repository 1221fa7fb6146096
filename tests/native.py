"""The published networks by their papers and key names alone: shapes of every tensor, and what they compute.

Written from the descriptions, in plain torch, for a handful of tests; nothing of the package is used.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]
Shapes = dict[str, tuple[int, ...]]

# width, depth, heads
V1 = {
    "sapiens_0.3b": (1024, 24, 16),
    "sapiens_0.6b": (1280, 32, 16),
    "sapiens_1b": (1536, 40, 24),
    "sapiens_2b": (1920, 48, 32),
}
# width, depth, heads, upsampling channels, 1x1 channels of the pose head
V2 = {
    "sapiens2_0.1b": (768, 12, 12, (), ()),
    "sapiens2_0.4b": (1024, 24, 16, (1024, 768), (512, 512, 256)),
    "sapiens2_0.8b": (1280, 32, 16, (1024, 768), (512, 512, 256)),
    "sapiens2_1b": (1536, 40, 24, (1536, 1024), (768, 512, 256)),
    "sapiens2_5b": (2432, 56, 32, (1024, 768), (512, 512, 256)),
}


def v1_backbone(width: int, depth: int, positions: int) -> Shapes:
    """Every linear layer and every norm has a bias; query, key and value are one layer."""
    shapes: Shapes = {"pos_embed": (1, positions, width), "patch_embed.projection.weight": (width, 3, 16, 16)}
    shapes |= {"patch_embed.projection.bias": (width,), "ln1.weight": (width,), "ln1.bias": (width,)}
    for i in range(depth):
        for name, outputs, inputs in (
            ("attn.qkv", 3 * width, width),
            ("attn.proj", width, width),
            ("ffn.layers.0.0", 4 * width, width),
            ("ffn.layers.1", width, 4 * width),
        ):
            shapes |= {f"layers.{i}.{name}.weight": (outputs, inputs), f"layers.{i}.{name}.bias": (outputs,)}
        for norm in ("ln1", "ln2"):
            shapes |= {f"layers.{i}.{norm}.{part}": (width,) for part in ("weight", "bias")}
    return shapes


def v1_head(width: int, up: tuple[int, ...], convs: tuple[int, ...], num_keypoints: int) -> Shapes:
    shapes: Shapes = {}
    for number, (inputs, outputs) in zip((0, 3), ((width, up[0]), (up[0], up[1])), strict=True):
        shapes[f"head.deconv_layers.{number}.weight"] = (inputs, outputs, 4, 4)
    for number, (inputs, outputs) in zip((0, 3), ((up[1], convs[0]), (convs[0], convs[1])), strict=True):
        shapes[f"head.conv_layers.{number}.weight"] = (outputs, inputs, 1, 1)
        shapes[f"head.conv_layers.{number}.bias"] = (outputs,)
    shapes["head.final_layer.weight"] = (num_keypoints, convs[1], 1, 1)
    shapes["head.final_layer.bias"] = (num_keypoints,)
    return shapes


def kv_heads(heads: int, block: int, depth: int) -> int:
    """Grouped queries in all but the first and last eight blocks."""
    return heads if block < 8 or block >= depth - 8 else heads // 2


def v2_backbone(width: int, depth: int, heads: int) -> Shapes:
    """RMS norms have no bias, all linear layers have one."""
    head = width // heads
    shapes: Shapes = {"cls_token": (1, 1, width), "storage_tokens": (1, 8, width), "ln1.weight": (width,)}
    shapes |= {"patch_embed.projection.weight": (width, 3, 16, 16), "patch_embed.projection.bias": (width,)}
    shapes["rope_embed.periods"] = (head // 4,)
    for i in range(depth):
        kv = kv_heads(heads, i, depth) * head
        for name, outputs, inputs in (
            ("attn.wq", width, width),
            ("attn.wk", kv, width),
            ("attn.wv", kv, width),
            ("attn.proj", width, width),
            ("ffn.w12", 8 * width, width),
            ("ffn.w3", width, 4 * width),
        ):
            shapes |= {f"blocks.{i}.{name}.weight": (outputs, inputs), f"blocks.{i}.{name}.bias": (outputs,)}
        shapes |= {f"blocks.{i}.{name}.weight": (width,) for name in ("ln1", "ln2", "attn.gamma")}
        shapes |= {f"blocks.{i}.attn.{name}.weight": (head,) for name in ("q_norm", "k_norm")}
    return shapes


def v2_head(width: int, up: tuple[int, ...], convs: tuple[int, ...], num_keypoints: int) -> Shapes:
    shapes: Shapes = {}
    for number, inputs, outputs in ((0, width, up[0]), (3, up[0], up[1])):
        shapes[f"decode_head.deconv_layers.{number}.weight"] = (inputs, outputs, 4, 4)
    for number, inputs, outputs in ((0, up[1], convs[0]), (3, convs[0], convs[1]), (6, convs[1], convs[2])):
        shapes[f"decode_head.conv_layers.{number}.weight"] = (outputs, inputs, 1, 1)
        shapes[f"decode_head.conv_layers.{number}.bias"] = (outputs,)
    shapes["decode_head.conv_pose.weight"] = (num_keypoints, convs[2], 1, 1)
    shapes["decode_head.conv_pose.bias"] = (num_keypoints,)
    return shapes


def random(shapes: Shapes, seed: int) -> State:
    """Scales at which every tensor shows in the output, and no two are alike."""
    generator, state = torch.Generator().manual_seed(seed), {}
    for key, shape in shapes.items():
        value = torch.randn(shape, generator=generator)
        is_scale = len(shape) == 1 and key.endswith("weight")  # of a norm, or a layer scale
        fan_in = math.prod(shape[1:]) if len(shape) > 1 and shape[0] > 1 else 25
        state[key] = 1 + 0.3 * value if is_scale else value / math.sqrt(fan_in)
    return state


# ---- What they compute


def _normalised(image: Tensor) -> Tensor:
    mean = torch.tensor([123.675, 116.28, 103.53]).reshape(3, 1, 1)
    return (image.float() - mean) / torch.tensor([58.395, 57.12, 57.375]).reshape(3, 1, 1)


def _linear(state: State, name: str, x: Tensor) -> Tensor:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def _layer_norm(state: State, name: str, x: Tensor) -> Tensor:
    centered = x - x.mean(-1, keepdim=True)
    scaled = centered / (centered.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]


def _rms_norm(state: State, name: str, x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * state[f"{name}.weight"]


def _attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[b, heads, tokens, channels] each; to [b, tokens, heads * channels]."""
    weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)


def _instance_silu(x: Tensor) -> Tensor:
    centered = x - x.mean((2, 3), keepdim=True)
    x = centered / (centered.square().mean((2, 3), keepdim=True) + 1e-5).sqrt()
    return x * x.sigmoid()


def _head(state: State, x: Tensor, name: str, convs: tuple[int, ...], last: str) -> Tensor:
    for number in (0, 3):
        x = F.conv_transpose2d(x, state[f"{name}.deconv_layers.{number}.weight"], stride=2, padding=1)
        x = _instance_silu(x)
    for number in convs:
        layer = f"{name}.conv_layers.{number}"
        x = _instance_silu(F.conv2d(x, state[f"{layer}.weight"], state[f"{layer}.bias"]))
    return F.conv2d(x, state[f"{name}.{last}.weight"], state[f"{name}.{last}.bias"])


def v1_heatmaps(state: State, image: Tensor, depth: int, heads: int) -> Tensor:
    """Sapiens v1, from an image of uint8 to heatmaps; `state` by the backbone's bare names and `head.*`."""
    patch = "patch_embed.projection"
    grid = F.conv2d(_normalised(image), state[f"{patch}.weight"], state[f"{patch}.bias"], stride=16, padding=2)
    x = grid.flatten(2).transpose(1, 2) + state["pos_embed"]
    for i in range(depth):
        block = f"layers.{i}"
        fused = _linear(state, f"{block}.attn.qkv", _layer_norm(state, f"{block}.ln1", x))
        q, k, v = fused.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + _linear(state, f"{block}.attn.proj", _attended(q, k, v))
        inner = F.gelu(_linear(state, f"{block}.ffn.layers.0.0", _layer_norm(state, f"{block}.ln2", x)))
        x = x + _linear(state, f"{block}.ffn.layers.1", inner)
    features = _layer_norm(state, "ln1", x).transpose(1, 2).reshape(grid.shape)
    return _head(state, features, "head", (0, 3), "final_layer")


def _rotation(grid_hw: tuple[int, int], channels: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine [patches, channels]: patch centers from -1 to 1 on either axis, and periods of 1 to 100."""
    periods = [100 ** (k / (channels // 4)) for k in range(channels // 4)]
    centers = [[2 * (i + 0.5) / n - 1 for i in range(n)] for n in grid_hw]
    rows = [
        [2 * math.pi * at / period for at in (y, x) for period in periods] * 2 for y in centers[0] for x in centers[1]
    ]
    angles = torch.tensor(rows, dtype=torch.float64)
    return angles.cos().float(), angles.sin().float()


def _rotated(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Patch tokens alone, which come last."""
    prefix, patches = x[:, :, : -len(cosine)], x[:, :, -len(cosine) :]
    first, second = patches.chunk(2, dim=-1)
    return torch.cat([prefix, patches * cosine + torch.cat([-second, first], dim=-1) * sine], dim=2)


def v2_heatmaps(state: State, image: Tensor, depth: int, heads: int) -> Tensor:
    """Sapiens2, from an image of uint8 to heatmaps; `state` by the backbone's bare names and `decode_head.*`."""
    patch = "patch_embed.projection"
    grid = F.conv2d(_normalised(image), state[f"{patch}.weight"], state[f"{patch}.bias"], stride=16)
    patches = grid.flatten(2).transpose(1, 2)
    prefix = [state[name].expand(len(image), -1, -1) for name in ("cls_token", "storage_tokens")]
    x, channels = torch.cat([*prefix, patches], dim=1), grid.shape[1] // heads
    turn = _rotation((grid.shape[2], grid.shape[3]), channels)
    for i in range(depth):
        block, y = f"blocks.{i}", _rms_norm(state, f"blocks.{i}.ln1", x)
        q, k, v = (
            _linear(state, f"{block}.attn.{name}", y).unflatten(-1, (-1, channels)) for name in ("wq", "wk", "wv")
        )
        q, k = (
            _rotated(_rms_norm(state, f"{block}.attn.{name}_norm", one).transpose(1, 2), *turn)
            for name, one in (("q", q), ("k", k))
        )
        shared = heads // k.shape[1]
        k, v = k.repeat_interleave(shared, dim=1), v.transpose(1, 2).repeat_interleave(shared, dim=1)
        x = x + _linear(state, f"{block}.attn.proj", _attended(q, k, v)) * state[f"{block}.attn.gamma.weight"]
        gate, up = _linear(state, f"{block}.ffn.w12", _rms_norm(state, f"{block}.ln2", x)).chunk(2, dim=-1)
        x = x + _linear(state, f"{block}.ffn.w3", gate * gate.sigmoid() * up)
    features = _rms_norm(state, "ln1", x)[:, 9:].transpose(1, 2).reshape(grid.shape)
    return _head(state, features, "decode_head", (0, 3, 6), "conv_pose")
