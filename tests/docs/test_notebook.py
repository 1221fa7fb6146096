"""The notebook from top to bottom, with other parameters alone; and that it is kept without outputs."""

import os
import re
import sys
from pathlib import Path

import hub_server
import native
import nbformat
import pytest
import test_commands
import torch
from nbclient import NotebookClient
from printed_commands import REPOSITORY

NOTEBOOK = REPOSITORY / "notebooks" / "train_on_a_16gb_gpu.ipynb"
ADDRESS = "ORG/sapiens_accel/blob/main/notebooks/train_on_a_16gb_gpu.ipynb"
PARAMETERS = """
NUM_DRAWN = (12, 6)
OPTIONS = (
    "--model.name sapiens_tiny --max_steps 3 --phase2.global_batch 4 --data.input_hw [64,48] --data.sigma 1 "
    "--data.num_workers 0 --eval.num_pictures 2 --eval.num_worst 2"
)
HUB_MODEL_ID = "ORG/NAME"
"""


@pytest.fixture
def notebook() -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


def test_it_is_kept_without_outputs(notebook: nbformat.NotebookNode) -> None:
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(cells) > 8
    assert [(cell.outputs, cell.execution_count) for cell in cells] == [([], None)] * len(cells)
    assert set(notebook.metadata) == {"accelerator", "colab", "kernelspec", "language_info"}  # no names of a machine


def test_a_command_that_fails_stops_it(notebook: nbformat.NotebookNode) -> None:
    for cell in notebook.cells:
        if cell.cell_type == "code":
            commands = re.findall(r"^ *!", cell.source, re.MULTILINE)
            assert len(commands) == cell.source.count("assert _exit_code == 0"), cell.source


def test_badges_open_this_file(notebook: nbformat.NotebookNode) -> None:
    badges = [
        f"https://colab.research.google.com/github/{ADDRESS}",
        f"https://kaggle.com/kernels/welcome?src=https://github.com/{ADDRESS}",
    ]
    pages = [(REPOSITORY / name).read_text() for name in ("README.md", "docs/one_gpu.md")]
    for text in (notebook.cells[0].source, *pages):
        assert re.findall(r"\]\((https://(?:colab|kaggle)[^)]*ipynb)\)", text) == badges
    assert (REPOSITORY / ADDRESS.split("/main/")[1]).is_file()


@pytest.mark.slow
@pytest.mark.launch
def test_it_runs_from_top_to_bottom(notebook: nbformat.NotebookNode, tmp_path: Path) -> None:
    """A cell with other parameters comes after the one tagged "parameters", as papermill adds it."""
    (place,) = (i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", []))
    weights = re.search(r"--weights (\S+)\"", notebook.cells[place].source)[1]  # type: ignore[index]
    notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(PARAMETERS))
    folder = tmp_path / "clone"
    folder.mkdir()
    for name in ("train.py", "eval.py", "accelerate_configs", "ds_configs"):
        (folder / name).symlink_to(REPOSITORY / name)
    path = os.pathsep.join(
        [str(Path(sys.executable).parent), str(test_commands._scripts(tmp_path / "bin")), os.environ["PATH"]]
    )
    own = {"PATH": path, "PYTHONPATH": str(REPOSITORY), "SAPIENS_ACCEL_CACHE": str(tmp_path / "cache")}
    torch.save(native.random(native.v1_backbone(128, 4, 12), 1), tmp_path / "sapiens_clean.pth")
    with hub_server.serve() as server:
        server.tokens = {hub_server.TOKEN: {"name": "ORG", "role": "write"}}
        server.add(weights, {"sapiens_clean.pth": (tmp_path / "sapiens_clean.pth").read_bytes()})
        environment = {**os.environ, **server.environment(tmp_path / "hf"), **own}
        client = NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": str(folder)}})
        client.execute(env=environment)
        pushed = set(server.repos["ORG/NAME"].files)
    printed = {cell.id: "".join(one.get("text", "") for one in cell.get("outputs", [])) for cell in notebook.cells}
    shown = {
        cell.id: sum("image/png" in one.get("data", {}) or "image/jpeg" in one.get("data", {}) for one in cell.outputs)
        for cell in notebook.cells
        if cell.cell_type == "code"
    }
    assert "keypoints: 5 of person (nose, left_wrist" in printed["train"]
    assert re.search(r"^phase2 +\d", printed["evaluate"], re.MULTILINE), printed["evaluate"]
    assert shown["crops"] == 1 and shown["images"] == 3 and shown["predict"] == 4
    assert {"README.md", "model.safetensors", "skeleton.json"} <= pushed
