# SPDX-License-Identifier: Apache-2.0
"""Sapiens v1 pose networks for transformers: an image of one person to heatmaps of keypoints.

This file is copied into weights folders and imports only torch and transformers:

    AutoModel.from_pretrained(FOLDER, trust_remote_code=True)

The code is Apache-2.0. Weights fine-tuned from Sapiens v1 are not: they follow its CC BY-NC 4.0, non-commercial.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn
from transformers import VitPoseBackbone, VitPoseBackboneConfig
from transformers import initialization as init
from transformers.models.vitpose.modeling_vitpose import VitPoseEstimatorOutput
from transformers.models.vitpose_backbone.modeling_vitpose_backbone import VitPoseBackbonePreTrainedModel
from transformers.utils.generic import can_return_tuple


class SapiensPoseConfig(VitPoseBackboneConfig):
    """The backbone's config, with Sapiens' LayerNorm, and the head's channels. `num_labels` is K.

    `flip_pairs` are the pairs of keypoints that a mirrored image swaps, as in transformers' Sapiens2Config.
    """

    model_type = "sapiens_pose"

    layer_norm_eps: float = 1e-6
    upsample_out_channels: list[int] | tuple[int, ...] = (768, 768)
    conv_out_channels: list[int] | tuple[int, ...] = (768, 768)
    flip_pairs: list[list[int]] | None = None


class SapiensPoseHead(nn.Module):
    """4x4 deconvolutions without bias, then 1x1 convolutions, each with InstanceNorm and SiLU, numbered as published.

    The same as models.sapiens.HeatmapHead, since this file must not import it. A test compares both.
    """

    def __init__(self, config: SapiensPoseConfig) -> None:
        super().__init__()
        deconvs, convs = [], []
        for inputs, outputs in pairwise([config.hidden_size, *config.upsample_out_channels]):
            deconvs += [nn.ConvTranspose2d(inputs, outputs, 4, 2, 1, bias=False), nn.InstanceNorm2d(outputs), nn.SiLU()]
        channels = [config.upsample_out_channels[-1], *config.conv_out_channels]
        for inputs, outputs in pairwise(channels):
            convs += [nn.Conv2d(inputs, outputs, 1), nn.InstanceNorm2d(outputs), nn.SiLU()]
        self.deconv_layers = nn.Sequential(*deconvs)
        self.conv_layers = nn.Sequential(*convs)
        self.final_layer = nn.Conv2d(channels[-1], config.num_labels, 1)  # pyright: ignore[reportArgumentType]

    def forward(self, features: Tensor) -> Tensor:
        """Features of the patches [b, c, H / 16, W / 16] to heatmaps [b, K, h, w]."""
        return self.final_layer(self.conv_layers(self.deconv_layers(features)))


class SapiensForPoseEstimation(VitPoseBackbonePreTrainedModel):
    """Sapiens v1 with its heatmap head; same call as transformers' Sapiens2ForPoseEstimation."""

    config_class = SapiensPoseConfig
    base_model_prefix = "backbone"

    def __init__(self, config: SapiensPoseConfig) -> None:
        super().__init__(config)
        self.backbone = VitPoseBackbone(config)
        # VitPose adds slot 0 to every position; Sapiens has no such slot.
        with torch.no_grad():
            self.backbone.embeddings.position_embeddings[:, 0] = 0.0
        self.head = SapiensPoseHead(config)
        self.post_init()

    def _init_weights(self, module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            init.normal_(module.weight, std=0.001)

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        flip_pairs: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> VitPoseEstimatorOutput:
        """Heatmaps of people.

        Args:
            pixel_values: [b, 3, H, W], RGB, normalized as in preprocessor_config.json; H and W are config.image_size.
            flip_pairs: [n, 2], config.flip_pairs, where pixel_values are mirrored: heatmaps are mirrored back.

        Returns:
            heatmaps [b, K, h, w] and, if asked for, hidden_states and attentions. Corners of maps and image coincide
            (UDP): image px = heatmap px * (W - 1) / (w - 1).
        """
        options = {"output_hidden_states": output_hidden_states, "output_attentions": output_attentions}
        asked = {name: value for name, value in options.items() if value is not None}
        backbone = self.backbone
        pixel_values = pixel_values.to(backbone.embeddings.position_embeddings.dtype)
        outputs = backbone.encoder(backbone.embeddings(pixel_values), **asked)
        patch_h, patch_w = backbone.embeddings.patch_embeddings.patch_size
        grid_hw = (pixel_values.shape[-2] // patch_h, pixel_values.shape[-1] // patch_w)
        features = backbone.layernorm(outputs.last_hidden_state).transpose(1, 2).unflatten(2, grid_hw)
        heatmaps = self.head(features)
        if flip_pairs is not None:
            mirror = torch.arange(heatmaps.shape[1], device=heatmaps.device)
            left, right = flip_pairs.to(mirror.device).long().reshape(-1, 2).unbind(-1)
            mirror[left], mirror[right] = right, left
            heatmaps = heatmaps[:, mirror].flip(-1)
        return VitPoseEstimatorOutput(
            heatmaps=heatmaps, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )
