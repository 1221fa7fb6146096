"""Low-rank adapters (LoRA, DoRA) in the blocks of a network, by peft: added, merged, and kept as a folder for peft.

An adapted network learns its adapters, norms and head. All else is its base, which no step changes. The matrix X.weight
of an adapted layer X becomes X.base_layer.weight, beside X.lora_A.default.weight [rank, in], X.lora_B.default.weight
[out, rank] and, with DoRA, X.lora_magnitude_vector.default.weight [out].
"""

import importlib.util
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sapiens_accel.config.schema import LoraConfig
from sapiens_accel.errors import UserError
from sapiens_accel.models import quantized
from sapiens_accel.models.export import published_key
from sapiens_accel.models.quantized import QuantizedLinear
from sapiens_accel.models.sapiens import SapiensPose
from sapiens_accel.runtime import files

FOLDER, FILE = "adapter", "adapter_model.safetensors"  # in a weights folder; its names are peft's
CONFIG = "adapter_config.json"
PREFIX = "base_model.model."  # of peft's keys
A, B, MAGNITUDE = (f"lora_{part}.default.weight" for part in ("A", "B", "magnitude_vector"))


def find_targets(model: SapiensPose, lora: LoraConfig) -> list[str]:
    """Names of the matrices that get adapters: those of the blocks that learn. Empty: the network gets none."""
    if lora.rank is None:
        return []
    return [
        name
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear)
        and ".layer." in name
        and (layer.gets_adapters if isinstance(layer, QuantizedLinear) else layer.weight.requires_grad)
        and (lora.target == "all" or ".attention." in name)
    ]


def add(model: SapiensPose, lora: LoraConfig) -> int:
    """Add adapters to the blocks that learn, and freeze everything else but norms and head. Returns their number.

    B starts at zero, so that the network's output does not change. A network whose blocks are all frozen is unchanged.

    Raises:
        UserError: peft is not installed.
    """
    targets = find_targets(model, lora)
    if not targets:
        return 0
    modules = [model.head, *(module for module in model.modules() if "Norm" in type(module).__name__)]
    learning = {id(p) for module in modules for p in module.parameters() if p.requires_grad}
    peft = _import_peft()
    peft.inject_adapter_in_model(_config(peft, lora, target_modules=targets, lora_dropout=lora.dropout), model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(id(parameter) in learning or is_adapter(name))
    layer: Any
    for layer in model.modules():
        # peft would copy each input to the adapters' fp32; autocast, or an engine of 16 bits, decides that here.
        if hasattr(layer, "cast_input_dtype_enabled"):
            layer.cast_input_dtype_enabled = False
    return len(targets)


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name belongs to an adapter."""
    return ".lora_" in name


def list_learning(model: nn.Module) -> list[str]:
    """Names of the parameters that learn, in the network's order."""
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def keep_base_in(model: SapiensPose, dtype: torch.dtype) -> None:
    """Keep the frozen matrices of an adapted network in the dtype in which autocast would multiply them anyway.

    Results stay the same to the bit. Patches and positions, which are small, stay in fp32: Sapiens2 computes its
    positions in the dtype of the patches' matrix.
    """
    for parameter in frozen_matrices(model):
        parameter.data = parameter.data.to(dtype)


def frozen_matrices(model: SapiensPose) -> list[nn.Parameter]:
    """The parameters of the frozen linear layers of an adapted network, but rounded matrices."""
    return [
        parameter
        for module in model.backbone.modules()
        if isinstance(module, nn.Linear) and not module.weight.requires_grad
        for parameter in module.parameters()
        if parameter.is_floating_point()
    ]


def _import_peft() -> Any:
    # Here: it takes seconds, and most runs have no adapters.
    if importlib.util.find_spec("peft") is None:
        raise UserError("--lora.rank: peft is not installed. Run pip install peft")
    quantized.silence()  # peft imports bitsandbytes wherever it is installed
    import peft

    return peft


def _config(peft: Any, lora: LoraConfig, **more: Any) -> Any:
    assert lora.rank is not None
    return peft.LoraConfig(r=lora.rank, lora_alpha=lora.scale * lora.rank, use_dora=lora.dora, **more)


# ---- Weights


class Merged(Mapping[str, Tensor]):
    """The weights of an adapted network without adapters, by the network's usual keys, each computed when it is read.

    Args:
        base: the whole network that the stage started from, fp32.
        learned: the parameters that learn, fp32.
        scale: factor of the adapters' product.
    """

    def __init__(self, base: Mapping[str, Tensor], learned: Mapping[str, Tensor], scale: float) -> None:
        self.base, self.learned, self.scale = base, learned, scale

    def __getitem__(self, key: str) -> Tensor:
        if key in self.learned:
            return self.learned[key]
        layer = key.removesuffix("weight")
        if f"{layer}{A}" not in self.learned:
            return self.base[key]
        return self._merge(self.base[key], layer)

    def _merge(self, weight: Float[Tensor, "out in"], layer: str) -> Float[Tensor, "out in"]:
        """W + scale B A; with DoRA, each row scaled to its learned norm."""
        merged = weight.float() + self.scale * (self.learned[f"{layer}{B}"] @ self.learned[f"{layer}{A}"])
        norm = self.learned.get(f"{layer}{MAGNITUDE}")
        return merged if norm is None else merged * (norm / torch.linalg.norm(merged, dim=1))[:, None]

    def __iter__(self) -> Iterator[str]:
        return iter(self.base)

    def __len__(self) -> int:
        return len(self.base)


def write_folder(folder: Path, learned: Mapping[str, Tensor], model: SapiensPose, lora: LoraConfig) -> None:
    """Write what an adapted network has learned; `peft.PeftModel.from_pretrained(base, folder)` reads it.

    `base` is the weights folder that the stage started from, as transformers loads it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    layers = {name.split(".lora_")[0] for name in learned if is_adapter(name)}
    blocks, matrices = (sorted({match[group] for match in map(_BLOCK.search, layers) if match}) for group in (1, 2))
    # Norms by their modules; the head as one, since it learns as a whole.
    whole = {name.rsplit(".", 1)[0] for name in learned if not (is_adapter(name) or name.startswith("head."))}
    whole |= {"head"} if any(name.startswith("head.") for name in learned) else set()
    config = _config(
        _import_peft(),
        lora,
        target_modules=rf".*\.layer\.({'|'.join(sorted(blocks, key=int))})\..*\.({'|'.join(matrices)})",
        modules_to_save=sorted(published_key(f"{name}.", model).removesuffix(".") for name in whole),
        inference_mode=True,
    )
    config.save_pretrained(str(folder))
    tensors = {_key_in_folder(name, model): value.contiguous() for name, value in learned.items()}
    temporary = folder / f".{FILE}.tmp"
    save_file(tensors, temporary, metadata={"format": "pt"})
    files.follow_umask(temporary)
    temporary.replace(folder / FILE)


_BLOCK = re.compile(r"\.layer\.(\d+)\..*\.(\w+)$")


def _key_in_folder(name: str, model: SapiensPose) -> str:
    name = name.replace("lora_magnitude_vector.default.weight", "lora_magnitude_vector").replace(".default.", ".")
    return PREFIX + published_key(name, model)


def load_folder(model: SapiensPose, folder: Path) -> None:
    """Load what `write_folder` wrote into a network with the same adapters and the same base.

    Raises:
        UserError: it holds other adapters.
    """
    file = folder / FILE
    tensors = load_file(file) if file.is_file() else {}
    own = {_key_in_folder(name, model): p for name, p in model.named_parameters() if p.requires_grad}
    if {key: value.shape for key, value in tensors.items()} != {key: p.shape for key, p in own.items()}:
        raise UserError(
            f"{file}: not what this stage learns (expected {len(own)} tensors of its adapters, norms and head, found "
            f"{len(tensors)}). Use the options of the run that wrote it (lora, frozen)"
        )
    with torch.no_grad():
        for key, parameter in own.items():
            parameter.copy_(tensors[key])
