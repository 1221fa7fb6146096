import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from hub_server import TOKEN, Server, serve
from huggingface_hub import HfFileSystem, constants
from messages import Recorder

from sapiens_accel.config import parse as config
from sapiens_accel.config.schema import Config
from sapiens_accel.models.sapiens import SapiensPose
from sapiens_accel.sources import shards

# One thread: the tests share the machine, and tiny tensors gain nothing from more.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def own_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """`sapiens-accel COMMAND` replaces sys.argv, from which later messages take the name of the program."""
    monkeypatch.setattr(sys, "argv", [*sys.argv])


@pytest.fixture(autouse=True)
def own_accelerator() -> Iterator[None]:
    """Accelerate keeps one state a process: a test that makes an Accelerator would give the next its precision."""
    yield
    _forget_accelerator()


def _forget_accelerator() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(params=["sapiens_tiny", "sapiens2_tiny"])
def tiny(request: pytest.FixtureRequest) -> SapiensPose:
    """A tiny network of each family for 64x48 images, with weights that make every layer matter."""
    torch.manual_seed(0)
    model = SapiensPose(request.param, 17, (64, 48))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # The heads start at 1e-3 and the layer scales at 1e-4: a wrong block would not show in the output.
            if parameter.ndim == 1:
                parameter.copy_(0.2 * torch.randn_like(parameter) + (0.0 if name.endswith("bias") else 1.0))
            elif name.startswith("head."):
                parameter.normal_(std=0.1)
        if model.size.family == "sapiens":
            model.backbone.embeddings.position_embeddings[:, 1:].normal_(std=0.5)
    return model


@pytest.fixture
def picture() -> torch.Tensor:
    """Two uint8 images of 64x48."""
    return torch.randint(0, 256, (2, 3, 64, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def recipes() -> dict[str, Config]:
    """Every recipe in sapiens_accel/recipes, loaded by its name (once: each takes a third of a second)."""
    folder = Path(config.__file__).parents[1] / "recipes"
    return {path.stem: config.load(["--recipe", path.stem]) for path in sorted(folder.glob("*.yaml"))}


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A Hub that the client of this process talks to, logged in and with an empty cache, `tmp_path / "hub"`."""
    with serve() as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        template = running.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        HfFileSystem.clear_instance_cache()  # it remembers the listings of another server
        shards.read_manifest.cache_clear()
        shards._cached.clear()
        yield running


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Recorder())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, by their times on two idle cores: both workers then end at about the same time.

    A file runs in one worker. In alphabetical order test_launches.py came last, and one worker was idle for 4 minutes.
    Of the slow tests (`--dist load`) each runs where there is time: those that take minutes must not be the last ones.
    """
    longest = (
        "test_laboratory_animal.py", "test_real_people.py", "test_stops.py", "test_probes.py", "test_zero.py",
        "test_launches.py", "test_checkpoint.py", "test_run_directory.py", "test_cli.py", "test_fuzz.py", "test_hub.py",
        "test_memory.py", "test_custom.py", "test_data.py", "test_holdout.py", "test_hub_data.py", "test_export.py",
        "test_checks.py", "test_benchmarks.py",
    )  # fmt: skip
    order = {name: index for index, name in enumerate(longest)}
    items.sort(key=lambda item: order.get(item.path.name, len(longest)))


@pytest.fixture(scope="module")
def train_here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., None]]:
    """train.main in this process: (words, run directory, *more words)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAPIENS_ACCEL_CACHE", str(tmp_path_factory.mktemp("cache")))
        train, threads = importlib.import_module("sapiens_accel.train").main, torch.get_num_threads()

        def run(words: Sequence[str], folder: Path, *more: str) -> None:
            try:
                train([*words, f"--output_dir={folder}", *more])
            finally:
                _forget_accelerator()

        yield run
        torch.set_num_threads(threads)
