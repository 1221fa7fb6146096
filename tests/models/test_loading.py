"""Loading and exporting without a copy of the file in memory."""

import json
import sys
from pathlib import Path

import forks
import pytest
import torch
from safetensors.torch import save_file

from sapiens_accel.models import checkpoint_formats, load
from sapiens_accel.models.checkpoint_formats import Entry
from sapiens_accel.models.sapiens import SapiensPose

HW = (64, 48)


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is that of /proc")
@pytest.mark.parametrize("kind", ["safetensors", pytest.param("pth", marks=pytest.mark.slow)])
def test_loading_and_exporting_hold_no_copy_of_the_file(kind: str, tmp_path: Path) -> None:
    """Resident sets of a process of its own, for a file of 250 MB: the network, and one tensor of the file.

    The largest tensor is a fifth of this small network. With the file's pages, or a random network, it is twice.
    """
    done = forks.run(["tests/host_peaks.py", tmp_path, kind])
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found["filled"]
    largest = 4 * 1024 * 768 * 16
    peak = found["building"] + found["loading"]
    assert peak == pytest.approx(found["file"] + largest, rel=0.1)
    assert peak <= 1.25 * found["file"]
    assert found["exporting"] < 0.1 * found["file"]


@pytest.mark.parametrize("name", ["sapiens_tiny", "sapiens2_tiny"])
def test_an_empty_network_is_filled_bit_by_bit(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    original = SapiensPose(name, 17, HW)
    save_file(original.state_dict(), tmp_path / "model.safetensors")
    filled = SapiensPose(name, 17, HW, empty=True)
    assert all(p.is_meta for p in filled.backbone.parameters()) and not any(b.is_meta for b in filled.buffers())
    report = load.load(filled, str(tmp_path))
    assert not report.missing and len(report.loaded) == len(original.state_dict())
    pairs = zip(original.state_dict().values(), filled.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    image = torch.randint(0, 256, (2, 3, *HW), dtype=torch.uint8)
    maps = filled(image)
    assert torch.equal(maps, original(image))
    maps.sum().backward()  # pyright: ignore[reportAttributeAccessIssue]
    if name == "sapiens_tiny":
        positions = filled.backbone.embeddings.position_embeddings
        assert not positions.grad[:, 0].any() and positions.grad[:, 1:].any()
    # In the engine's dtype it is what the engine would cast to, and buffers stay in fp32.
    half = SapiensPose(name, 17, HW, empty=True)
    load.load(half, str(tmp_path), home=load.Home(dtype=torch.bfloat16))
    for own, expected in zip(half.parameters(), original.to(torch.bfloat16).parameters(), strict=True):
        assert own.dtype == torch.bfloat16 and torch.equal(own, expected)
    assert all(b.dtype == torch.float32 for b in half.buffers())


@pytest.mark.parametrize("name", ["sapiens_tiny", "sapiens2_tiny"])
def test_the_head_of_an_empty_network_starts_as_any(name: str) -> None:
    torch.manual_seed(0)
    whole, empty = SapiensPose(name, 17, HW), SapiensPose(name, 17, HW, empty=True)
    for own, expected in zip(empty.head.parameters(), whole.head.parameters(), strict=True):
        assert float(own.detach().std()) == pytest.approx(float(expected.detach().std()), rel=0.2)
        assert float(own.detach().mean()) == pytest.approx(0.0, abs=0.05 + float(own.detach().std()))


def test_a_file_written_tensor_by_tensor_is_that_of_safetensors(tmp_path: Path) -> None:
    tensors = {
        "b.x": torch.randn(3, 4),
        "a": torch.randn(5).half(),
        "é": torch.randn(()),
        "h": torch.randn(2, 3).bfloat16(),
        "z": torch.randn(1, dtype=torch.float64),
        "empty": torch.zeros(0, 3),
    }
    metadata = {"format": "pt"}
    save_file(tensors, tmp_path / "theirs", metadata=metadata)
    entries = {key: Entry(tuple(value.shape), value.dtype) for key, value in tensors.items()}
    checkpoint_formats.save_one_by_one(tmp_path / "ours", entries, reversed(tensors.items()), metadata)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    with pytest.raises(ValueError, match="no tensor for a"):
        checkpoint_formats.save_one_by_one(tmp_path / "ours", entries, [], metadata)
    with pytest.raises(ValueError, match="is not an entry that is still to be written"):
        checkpoint_formats.save_one_by_one(tmp_path / "ours", entries, [("a", torch.zeros(4))], metadata)
