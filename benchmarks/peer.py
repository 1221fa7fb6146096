"""What a user would write instead: transformers' network, bf16 autocast over fp32 weights, AdamW, checkpointed blocks.

Nothing of this project is in it but Sapiens v1's head, which transformers does not have.
"""

from collections.abc import Iterator
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel, Sapiens2ForPoseEstimation

from sapiens_accel.data.dataset import Batch
from sapiens_accel.models.sapiens import PIXEL_MEAN, PIXEL_STD, SapiensPose, sapiens2_config
from sapiens_accel.pose.heatmap import Codec

# Dense bf16 (T4: fp16) of NVIDIA's data sheets, by a part of the device's name; the first that is in it counts.
PEAK_TFLOPS = {
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H200 NVL": 835.0,
    "H100": 989.0,
    "H200": 989.0,
    "A100": 312.0,
    "RTX 4090": 165.0,
    "Tesla T4": 65.0,
}


class PlainViT(nn.Module):
    """transformers' ViTPose backbone, run by its own forward, and the head on all people at once."""

    def __init__(self, model: SapiensPose) -> None:
        super().__init__()
        self.backbone, self.head = deepcopy(model.backbone), deepcopy(model.head)
        self.grid_hw = [pixels // model.size.patch for pixels in model.input_hw]

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalised pixels [b, 3, H, W] to heatmaps [b, k, h, w]."""
        tokens = self.backbone(pixels).feature_maps[-1]
        return self.head.maps(tokens.transpose(1, 2).unflatten(2, self.grid_hw))


class PlainSapiens2(nn.Module):
    """transformers' own."""

    def __init__(self, model: SapiensPose) -> None:
        super().__init__()
        self.network = Sapiens2ForPoseEstimation(sapiens2_config(model.size, model.num_keypoints, model.input_hw))
        self.network.model.load_state_dict(model.backbone.state_dict())
        self.network.decode_head.load_state_dict(model.head.state_dict())

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalised pixels [b, 3, H, W] to heatmaps [b, k, h, w]."""
        return self.network(pixels).heatmaps


def peer_of(model: SapiensPose, device: torch.device) -> nn.Module:
    """The peer, with the weights that the model has now."""
    peer = (PlainViT if model.size.family == "sapiens" else PlainSapiens2)(model)
    for part in peer.children():
        if isinstance(part, PreTrainedModel):
            part.activation_checkpointing_enable()  # what gradient_checkpointing_enable() is called now
    return peer.to(device).train()


def plain_steps(
    peer: nn.Module, batch: Batch, codec: Codec, loss_weight: float, lr: float, autocast: torch.dtype | None
) -> Iterator[Tensor]:
    """A plain loop over the same batch; yields the loss of each step, on the device."""
    labelled, device = batch.labelled, batch.labelled.view.image.device
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (PIXEL_MEAN, PIXEL_STD))
    optimizer = torch.optim.AdamW(peer.parameters(), lr=lr)
    scaler = torch.amp.GradScaler(device.type, enabled=autocast == torch.float16)
    while True:
        target, weights = codec.encode(labelled.points_xy, labelled.weights)
        with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            heatmaps = peer((labelled.view.image.float() - mean) / std)
        loss = loss_weight * (weights[..., None, None] * (heatmaps.float() - target) ** 2).mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        yield loss.detach()


def forward_flops(name: str, num_keypoints: int, input_hw: tuple[int, int]) -> int:
    """Of one person's forward, counted on the meta device: matrix products, convolutions and attention."""
    with torch.device("meta"):
        model = SapiensPose(name, num_keypoints, input_hw)
        image = torch.zeros(1, 3, *input_hw, dtype=torch.uint8)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(image)
    return counter.get_total_flops()


def peak_tflops(device: str) -> float | None:
    """What the device could do at most; None where the table does not have it."""
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in device), None)
