"""Write docs/recipes.md: every recipe, with the memory and hours that `sapiens-accel memory` predicts for one GPU.

python docs/list_recipes.py
"""

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import torch

from sapiens_accel.config.parse import list_recipes, load
from sapiens_accel.config.schema import Config
from sapiens_accel.models.sapiens import SapiensPose

OUT = Path(__file__).parent / "recipes.md"
GPU, HOST = "4080", "64GiB"
STAGES = ("phase1", "phase2", "ssl")
# AP on COCO val2017 of the checkpoints that facebookresearch/sapiens published: 1024x768, detected boxes, flip test.
PUBLISHED = {"sapiens_0.3b": 79.6, "sapiens_0.6b": 81.2, "sapiens_1b": 82.1, "sapiens_2b": 82.2}

ABOVE = f"""# Recipes

A recipe is a YAML file with the options of a run; `--recipe NAME` takes one. For a first run on one 16 GB GPU take
`sapiens_0.3b_coco`, also for your own keypoints. `_coco` trains on COCO at 512x384, `_lora` by
[adapters](lora.md), `_official` at the published 1024x768.

The files are in `sapiens_accel/recipes/`; `--print_config` shows all values of one, and `--preset fast` or
`limited_memory` shortens or shrinks any of them ([Memory plan](memory_plan.md#presets)). `docs/list_recipes.py`
writes this page.

Memory (of the GPU with 1.6 GiB for CUDA and fragmentation; of the host) and hours are **predicted** for one
RTX {GPU} (16 GB), {HOST[:-3]} GiB of host memory, COCO's 149,813 labeled people and the launch that the plan
recommends; the speeds behind the hours are assumed.
Nothing of it was measured on a GPU. For other GPUs: `sapiens-accel memory --recipe sapiens_0.3b_coco --gpu T4`.

| recipe | parameters | input | stages (epochs) | launch of phase2 | GPU GiB | host GiB | hours of phase2 |
|---|---|---|---|---|---|---|---|
"""
BELOW = """
## Published accuracy

| network | COCO val2017 AP | conditions |
|---|---|---|
{published}
| Sapiens2 | none published | |

These are checkpoints of the authors, trained on COCO, MPII, CrowdPose and AI Challenger (the authors' table names them
`coco_mpii_crowdpose_aic`); the table is in their
[POSE_README.md](https://github.com/facebookresearch/sapiens/blob/main/docs/evaluate/POSE_README.md).
The recipes without `_official` train on COCO alone at 512x384, of which no result is published, and nothing in this
project has been trained on all of COCO: expect less, and no more than these.
"""


def main() -> None:
    rows = [row(name) for name in list_recipes() if name != "demo"]
    published = "\n".join(
        f"| {name} | {ap} | 1024x768, a detector's boxes, flip test |" for name, ap in PUBLISHED.items()
    )
    OUT.write_text(ABOVE + "\n".join(rows) + "\n" + BELOW.format(published=published))


def row(name: str) -> str:
    """A line of the table, by a process of its own for each plan."""
    recipe = load(["--recipe", name, "--data.root", "DIR"])
    height, width = recipe.data.input_hw
    with torch.device("meta"):
        network = SapiensPose(recipe.model.name, 17, recipe.data.input_hw)
    size = sum(parameter.numel() for parameter in network.parameters()) / 1e9
    words = ["--recipe", name, "--stage", "phase2", "--gpu", GPU, "--host_memory", HOST, "--people", "149813", "--json"]
    done = subprocess.run([sys.executable, "-m", "sapiens_accel.memory", *words], capture_output=True, text=True)
    head = f"| `{name}` | {size:.2f}B | {height}x{width} | {stages(recipe)} |"
    best = json.loads(done.stdout)["recommended"] if done.returncode == 0 else None
    if best is None:
        return f"{head} none fits: take adapters, or a larger host | | | |"
    peak = best["gpu_peak_gib"] + best["gpu_allowance_gib"]
    return f"{head} {best['strategy']} | {peak:.1f} | {best['host_gib']:.0f} | {best['hours']:,.0f} |"


def stages(recipe: Config) -> str:
    known = [name for name in STAGES if name in {field.name for field in fields(recipe)}]
    lengths = {name: getattr(recipe, name) for name in known}
    wanted = known if recipe.stage == "all" else recipe.stage.split(",")
    return ", ".join(f"{name} ({lengths[name].epochs:g})" for name in wanted if lengths[name].epochs)


if __name__ == "__main__":
    main()
