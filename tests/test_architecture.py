"""Who may import whom, read from the source."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import sapiens_accel

PACKAGE = Path(sapiens_accel.__file__).parent
ROOT = PACKAGE.parent
# A line imports only from lines below it.
LAYERS = (
    ("train", "eval"),
    ("report", "own", "doctor"),
    ("holdout", "hub", "boxes", "environment", "preview"),
    ("push", "page", "boxes_json"),
    ("card", "cases", "detector", "gallery"),
    ("loop", "evaluate", "checkpoint", "memory", "export", "curve", "fetch", "candidates"),
    ("tables",),
    ("plan", "graph", "ap"),
    ("footprint", "predict"),
    ("objective", "optim", "weights", "distributed"),
    ("model", "data", "draw", "origin", "keypoints_json"),
    ("pool", "detections", "pictures", "custom", "convert", "stream", "lenient"),
    ("category",),
    (
        "augment",
        "coco",
        "synthetic",
        "heatmap",
        "chunked",
        "offload",
        "average",
        "alarms",
        "published",
        "worst",
        "sources",
        "examine",
    ),
    ("tars", "coco_json", "photo"),
    ("roster", "remote"),
    ("shards",),
    ("layout", "refused"),
    ("geometry", "skeleton", "config", "mixture", "interrupt", "modeling_sapiens_pose", "score", "markup"),
)
LAYER_OF = {module: depth for depth, layer in enumerate(LAYERS) for module in layer}


def _sources() -> dict[str, Path]:
    paths = [*PACKAGE.rglob("*.py"), ROOT / "train.py", ROOT / "eval.py"]
    return {path.stem: path for path in paths if path.name != "__init__.py"}


def _imports(path: Path) -> Iterator[str]:
    """Full names of what a file imports anywhere in it, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = ".".join(part for part in ("sapiens_accel" if node.level else "", node.module or "") if part)
            yield from (f"{module}.{alias.name}" for alias in node.names)


def _ours(path: Path) -> set[str]:
    return {name.split(".")[1] for name in _imports(path) if name.startswith("sapiens_accel.")}


def test_every_module_has_a_layer_and_every_layer_its_modules() -> None:
    assert set(_sources()) == set(LAYER_OF)


def test_the_package_files_import_the_standard_library_alone() -> None:
    """`import sapiens_accel` is cheap, and no cycle can hide in it."""
    imported = {name.split(".")[0] for path in PACKAGE.rglob("__init__.py") for name in _imports(path)}
    assert imported <= sys.stdlib_module_names


def test_modules_import_only_from_lower_layers() -> None:
    upward = {
        f"{module} -> {other}"
        for module, path in _sources().items()
        for other in _ours(path)
        if LAYER_OF[other] <= LAYER_OF[module]
    }
    assert not upward


def test_the_imports_are_seen() -> None:
    """Of each kind: the module, its names, a relative one, one inside a function."""
    sources = _sources()
    assert {"config", "distributed", "loop", "objective"} <= _ours(sources["train"])
    assert "skeleton" in _ours(sources["synthetic"])
    assert any(name.startswith("deepspeed") for name in _imports(sources["distributed"]))


def test_only_distributed_imports_deepspeed() -> None:
    importers = {
        module
        for module, path in _sources().items()
        if any(name.split(".")[0] == "deepspeed" for name in _imports(path))
    }
    assert importers == {"distributed"}


def test_nothing_loads_deepspeed_or_torchvision_until_it_is_needed() -> None:
    """In a fresh process, with every module of ours and both entry points."""
    modules = ["train", "eval", *(f"sapiens_accel.{name}" for name in sorted(set(LAYER_OF) - {"train", "eval"}))]
    script = (
        "import importlib, sys\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        "print(sorted({'deepspeed', 'torchvision', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # transformers is there: the test sees what is loaded.
    assert done.stdout.strip().splitlines()[-1] == "['transformers']"
