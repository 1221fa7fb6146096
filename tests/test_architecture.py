"""Who may import whom, read from the source: the table of CONTRIBUTING.md as data."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import sapiens_accel

PACKAGE = Path(sapiens_accel.__file__).parent
ROOT = PACKAGE.parent
MAX_MODULES = 12
API = ("train", "eval", "errors", "inference")  # where the names are that `from sapiens_accel import NAME` gives
# A package imports only packages of lower rows; two packages of one row do not import each other.
ROWS = (
    ("errors",),
    ("config", "pose"),
    ("hub", "runtime", "visibility"),
    ("sources", "models"),
    ("data",),
    ("evaluation",),
    ("training", "inference"),
    ("memory", "publish", "formats", "app"),
    ("doctor",),
    ("selftest",),
    ("cli",),
    ("train", "eval", "boxes", "export", "__main__"),
)
ROW_OF = {package: row for row, packages in enumerate(ROWS) for package in packages}
# What still imports upward, to be emptied: (file, package that it imports).
KNOWN: set[tuple[str, str]] = set()


def _sources() -> dict[str, Path]:
    """Path below the package to file."""
    return {path.relative_to(PACKAGE).as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}


def _package(name: str) -> str:
    """The package of a file: `__main__` for the modules that only start a command, which may use everything."""
    parts = name.split("/")
    return Path(name).stem if len(parts) == 1 or parts[-1] == "__main__.py" else parts[0]


def _imports(path: Path) -> Iterator[str]:
    """Full names of what a file imports anywhere in it: inside functions and by importlib.import_module too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "import_module"):
            yield from (str(argument.value) for argument in node.args[:1] if isinstance(argument, ast.Constant))


def _ours(path: Path) -> set[str]:
    return {name.split(".")[1] for name in _imports(path) if name.startswith("sapiens_accel.")} - {"__version__"}


def test_every_module_stands_in_a_row() -> None:
    assert {_package(name) for name in _sources()} - {"__init__", "recipes"} <= set(ROW_OF)


def test_packages_import_only_packages_of_lower_rows() -> None:
    upward = {
        (name, other)
        for name, path in _sources().items()
        if not name.endswith("__init__.py")
        for other in _ours(path) - {_package(name)}
        if ROW_OF[other] >= ROW_OF[_package(name)]
    }
    assert upward == KNOWN


def test_no_package_has_an_import_cycle() -> None:
    """Module by module, so inside of the packages too."""
    modules = {
        "sapiens_accel." + name.removesuffix(".py").replace("/", "."): path
        for name, path in _sources().items()
        if not name.endswith("__init__.py") and path.is_relative_to(PACKAGE)
    }
    imports = {name: [f"{full}." for full in _imports(path)] for name, path in modules.items()}
    edges = {
        name: {other for other in modules for full in imports[name] if full.startswith(f"{other}.")} - {name}
        for name in modules
    }
    while leaves := {name for name, others in edges.items() if not others & set(edges)}:
        edges = {name: others for name, others in edges.items() if name not in leaves}
    assert not edges


def test_no_package_has_too_many_modules() -> None:
    for folder in {path.parent for path in PACKAGE.glob("*/**/*.py")}:
        num = len([path for path in folder.glob("*.py") if path.name not in ("__init__.py", "__main__.py")])
        assert num <= MAX_MODULES, f"{folder}: {num} modules. CONTRIBUTING.md: Where a package is full"


def test_the_package_files_import_the_standard_library_alone() -> None:
    """`import sapiens_accel` is cheap, and no cycle can hide in it. Types alone import the functions that it offers."""
    own = {f"sapiens_accel.{module}" for module in API}
    imported = {name for path in PACKAGE.rglob("__init__.py") for name in _imports(path)}
    imported = {name.split(".")[0] for name in imported if not name.startswith(tuple(own))}
    assert imported <= sys.stdlib_module_names


def test_the_imports_are_seen() -> None:
    """Of each kind: the module, its names, one inside a function."""
    sources = _sources()
    assert {"config", "runtime", "training"} <= _ours(sources["train.py"])
    assert "pose" in _ours(sources["sources/synthetic.py"])
    assert any(name.startswith("deepspeed") for name in _imports(sources["runtime/engine.py"]))


def test_only_the_engine_imports_deepspeed() -> None:
    importers = {
        name
        for name, path in _sources().items()
        if any(imported.split(".")[0] == "deepspeed" for imported in _imports(path))
    }
    assert importers == {"runtime/engine.py"}


def test_poses_are_arrays_alone() -> None:
    imported = {name.split(".")[0] for path in (PACKAGE / "pose").glob("*.py") for name in _imports(path)}
    assert "accelerate" not in imported


def test_nothing_loads_deepspeed_or_torchvision_until_it_is_needed() -> None:
    """In a fresh process, with every module of ours but app/page.py, which the command imports where gradio is."""
    files = (name for name in _sources() if not name.endswith("__.py") and name != "app/page.py")
    names = [name.removesuffix(".py").replace("/", ".") for name in files]
    modules = [f"sapiens_accel.{name}" for name in names]
    script = (
        "import importlib, sys\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        "print(sorted({'deepspeed', 'torchvision', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # transformers is there: the test sees what is loaded.
    assert done.stdout.strip().splitlines()[-1] == "['transformers']"
