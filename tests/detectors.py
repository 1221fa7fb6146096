"""Tiny detectors of transformers with random weights, saved as those on the Hub are."""

import re
from pathlib import Path
from typing import Any

import torch
import transformers

LABELS = ("dog", "Person", "cup")
COMMON: dict[str, Any] = {
    "encoder_in_channels": [16, 16, 16], "encoder_hidden_dim": 16, "encoder_ffn_dim": 16, "d_model": 16,
    "encoder_attention_heads": 2, "decoder_in_channels": [16, 16, 16], "decoder_ffn_dim": 16, "decoder_layers": 2,
    "decoder_attention_heads": 2, "num_queries": 40, "num_denoising": 0,
}  # fmt: skip


def tiny(folder: Path, kind: str = "rt_detr_v2", labels: tuple[str, ...] = LABELS, seed: int = 0) -> Path:
    """config.json, preprocessor_config.json, model.safetensors: the three files of PekingU/rtdetr_v2_r50vd."""
    torch.manual_seed(seed)
    names = {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    if kind == "d_fine":
        stages = {"stage_in_channels": [8, 16, 16, 16], "stage_mid_channels": [8, 8, 8, 8]}
        stages |= {"stage_out_channels": [16, 16, 16, 16], "stage_num_blocks": [1, 1, 1, 1]}
        backbone: Any = transformers.HGNetV2Config(
            stem_channels=[3, 8, 8], hidden_sizes=[16, 16, 16, 16], depths=[1, 1, 1, 1],
            out_features=["stage2", "stage3", "stage4"], **stages,
        )  # fmt: skip
        config: Any = transformers.DFineConfig(backbone_config=backbone, **COMMON, **names)
    else:
        backbone = transformers.RTDetrResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16, 16, 16], depths=[1, 1, 1, 1], layer_type="basic",
            out_features=["stage2", "stage3", "stage4"],
        )  # fmt: skip
        kinds = {"rt_detr": transformers.RTDetrConfig, "rt_detr_v2": transformers.RTDetrV2Config}
        config = kinds[kind](backbone_config=backbone, **COMMON, **names)
    model = transformers.AutoModelForObjectDetection.from_config(config)
    with torch.no_grad():  # as they are made, all images look the same to them, and full of tiny things
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "backbone" not in name:
                parameter.add_(
                    (0.5 if re.search("class_embed|score_head", name) else 0.1) * torch.randn_like(parameter)
                )
            elif "enc_bbox_head.layers.2" in name:
                parameter.copy_(torch.tensor([0.0, 0.0, 2.0, 2.0]))
    model.save_pretrained(folder)
    processor: Any = transformers.RTDetrImageProcessorPil
    processor(size={"height": 96, "width": 96}).save_pretrained(folder)
    return folder
