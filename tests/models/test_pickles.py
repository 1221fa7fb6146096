"""Programs planted in files of weights: none runs, wherever it stands and in whatever a file is called."""

import builtins
import contextlib
import functools
import io
import os
import pickle
import subprocess
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import untrained
from safetensors.torch import load_file

from sapiens_accel.errors import UserError
from sapiens_accel.models import load
from sapiens_accel.models.sapiens import SapiensPose


class Planted:
    """Pickled as a call of a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def _calls(trap: Path) -> dict[str, Planted]:
    """Each makes the file `trap` if it is called."""
    touch, code = f"touch {trap}", f"open({str(trap)!r}, 'w').close()"
    inner = pickle.dumps(Planted(os.system, touch))
    nested = io.BytesIO()
    torch.save({"a": Planted(os.system, touch)}, nested)
    return {
        "os.system": Planted(os.system, touch),
        "exec": Planted(builtins.exec, code),
        "eval": Planted(builtins.eval, code),
        "subprocess": Planted(subprocess.check_call, ["touch", str(trap)]),
        "partial": Planted(functools.partial(os.system, touch)),
        "pickle in a pickle": Planted(pickle.loads, inner),
        "torch's storage": Planted(torch.storage._load_from_bytes, nested.getvalue()),
        "numpy's core": Planted(np.frombuffer, Planted(os.system, touch)),
        "getattr": Planted(builtins.getattr, Planted(os.system, touch), "real"),
        "open": Planted(builtins.open, str(trap), "w"),
    }


def _holders(planted: Planted, state: dict[str, Any]) -> dict[str, Any]:
    """Where in a file's tree it may stand."""
    objects = np.empty(1, dtype=object)
    objects[0] = planted
    first = next(iter(state))
    return {
        "alone": planted,
        "beside tensors": {**state, "planted": planted},
        "as a tensor": {**state, first: planted},
        "in the state": {"state_dict": {**state, "planted": planted}},
        "in meta": {"state_dict": state, "meta": {"dataset_meta": {"keypoint_id2name": {0: planted}}}},
        "in an array of objects": {"state_dict": state, "meta": objects},
        "in an ordered dict": OrderedDict({**state, "planted": planted}),
        "in a list": [state, planted],
    }


@pytest.mark.parametrize("name", sorted(_calls(Path("x"))))
@pytest.mark.parametrize("holder", sorted(_holders(Planted(print), {"a": 1})))
def test_a_planted_program_does_not_run(tmp_path: Path, name: str, holder: str) -> None:
    trap = tmp_path / "trap"
    state = load_file(untrained(tmp_path / "whole") / "model.safetensors")
    tree = _holders(_calls(trap)[name], state)[holder]
    zipped, legacy = io.BytesIO(), io.BytesIO()
    torch.save(tree, zipped)
    torch.save(tree, legacy, _use_new_zipfile_serialization=False)
    contents = {"zip.pth": zipped, "legacy.pth": legacy, "plain.pth": io.BytesIO(pickle.dumps(tree))}
    contents |= {"named.safetensors": zipped, "named.pt2": zipped}
    model = SapiensPose("sapiens_tiny", 17, (64, 48))
    for file, content in contents.items():
        folder = tmp_path / file.replace(".", "_")
        folder.mkdir()
        (folder / file).write_bytes(content.getvalue())
        with pytest.raises(UserError) as caught:
            load.load(model, str(folder / file))
        assert file in str(caught.value)
        assert not trap.exists()


def test_the_traps_work(tmp_path: Path) -> None:
    """What does not run above would run if it were unpickled as it is."""
    for name, planted in _calls(tmp_path / "trap").items():
        (tmp_path / "trap").unlink(missing_ok=True)
        with contextlib.suppress(TypeError, ValueError, AttributeError):  # after the trap
            pickle.loads(pickle.dumps(planted))
        assert (tmp_path / "trap").exists(), name


def test_a_planted_archive_beside_tensors_does_not_run(tmp_path: Path) -> None:
    """Other members of the zip than data.pkl are not unpickled."""
    trap = tmp_path / "trap"
    state = load_file(untrained(tmp_path / "w") / "model.safetensors")
    torch.save(state, tmp_path / "x.pth")
    with zipfile.ZipFile(tmp_path / "x.pth", "a") as archive:
        for member in ("x/extra.pkl", "data.pkl", "x/code/a.py"):
            archive.writestr(member, pickle.dumps(Planted(os.system, f"touch {trap}")))
    try:
        assert not load.load(SapiensPose("sapiens_tiny", 17, (64, 48)), str(tmp_path / "x.pth")).missing
    except UserError as error:
        assert "x.pth" in str(error)
    assert not trap.exists()
