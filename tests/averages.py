"""Run by test_ema.py in two processes: a real engine trains a small network, and its averages are kept in all ways.

    torchrun ... tests/averages.py FOLDER DECAY CONFIG.json STEPS [CONFIG.json STEPS ...]      ZeRO configs, one a run

Each rank writes FOLDER/CONFIG-RANK.pt: what the networks of the averages hold, what the averages are (whole on rank 0),
what they began as, and what the student was after each step.
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from sapiens_accel.config.schema import TeacherPlacement
from sapiens_accel.runtime import distributed, engine
from sapiens_accel.training import ema

PLACES: tuple[TeacherPlacement, ...] = ("device", "sharded", "host")
ema.PIECE = 100  # several pieces in a tensor, as in a large one


class Network(nn.Sequential):
    """Sizes that neither ranks nor alignment divide. ZeRO-3 takes its last layer for the head."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(13, 37), nn.GELU(), nn.Linear(37, 5))

    @property
    def head(self) -> nn.Module:
        return self[-1]


def run(accelerator: Accelerator, num_steps: int, decay: float) -> dict[str, Any]:
    torch.manual_seed(0)
    network: Any = Network()
    first = {name: value.clone() for name, value in network.state_dict().items()}
    means = {place: ema.moving_average(accelerator, _copy(network), place) for place in PLACES}
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    trained, optimizer = engine.prepare(accelerator, network, optimizer, micro_batch=4, accumulation=1, clip_norm=1.0)
    generator = torch.Generator().manual_seed(accelerator.process_index)
    history = []
    for _ in range(num_steps):
        given = torch.randn(4, 13, generator=generator).bfloat16()
        loss = (trained(given).float() - given[:, :5].float().sin()).square().mean()
        accelerator.backward(loss)
        for mean in means.values():
            mean.update((value for _, value in engine.full_parameters(accelerator, trained)), decay)
        values = [value.flatten().clone() for _, value in engine.full_parameters(accelerator, trained)]
        history.append(torch.cat(values))
    states = {place: mean.state_dict() for place, mean in means.items()}
    engine.release(accelerator, trained, optimizer)
    networks = {place: _values(mean.network) for place, mean in means.items()}
    return {"networks": networks, "states": states, "first": first, "history": torch.stack(history)}


def _copy(network: nn.Module) -> nn.Module:
    other = Network()
    other.load_state_dict(network.state_dict())
    return other


def _values(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, decay, *runs = sys.argv[1:]
    for config, steps in zip(runs[::2], runs[1::2], strict=True):
        os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = config
        launched = distributed.start()
        assert distributed.is_deepspeed(launched) and launched.num_processes == 2
        found = run(launched, int(steps), float(decay))
        torch.save(found, Path(folder) / f"{Path(config).stem}-{launched.process_index}.pt")
        AcceleratorState._reset_state(reset_partial_state=False)
        GradientState._reset_state()
    distributed.stop()
