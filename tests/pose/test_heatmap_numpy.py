"""The NumPy codec against torch's, which is tested against mmpose's."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_heatmap import SIZES, _codec, _drawn, _points

from sapiens_accel.pose import heatmap, heatmap_numpy
from sapiens_accel.pose.heatmap import Codec
from sapiens_accel.pose.heatmap_numpy import NumpyCodec
from sapiens_accel.pose.skeleton import COCO17

EXACT = 1e-6  # of a map's value; of the input's size
every_size = pytest.mark.parametrize(("heatmap_hw", "sigma"), SIZES)


def _numpy(codec: Codec) -> NumpyCodec:
    return NumpyCodec(input_hw=codec.input_hw, heatmap_hw=codec.heatmap_hw, sigma=codec.sigma)


def _assert_decoded_alike(codec: Codec, maps: np.ndarray) -> None:
    theirs_xy, their_scores = codec.decode(torch.from_numpy(maps))
    ours_xy, our_scores = _numpy(codec).decode(maps)
    assert isinstance(ours_xy, np.ndarray) and isinstance(our_scores, np.ndarray)
    assert (our_scores == their_scores.numpy()).all()
    size_xy = np.array(codec.input_hw[::-1])
    assert np.abs((ours_xy - theirs_xy.numpy()) / size_xy).max() < EXACT


@every_size
def test_encode_is_that_of_torch(heatmap_hw: tuple[int, int], sigma: int) -> None:
    """Points in and far out of the map, weights of every kind."""
    codec, rng = _codec(heatmap_hw, sigma), np.random.default_rng(0)
    points_xy = rng.uniform(-0.3, 1.3, (6, 17, 2)) * codec.input_hw[::-1]
    weights = rng.choice([0.0, 1.0, 0.5, -1.0], (6, 17))
    theirs, their_weights = codec.encode(torch.from_numpy(points_xy), torch.from_numpy(weights))
    ours, our_weights = _numpy(codec).encode(points_xy, weights)
    assert ours.dtype == np.float32 and ours.shape == (6, 17, *heatmap_hw)
    assert np.abs(ours - theirs.numpy()).max() < EXACT and (our_weights == their_weights.numpy()).all()


@every_size
@pytest.mark.parametrize("scale", [0.02, 1.0, 90.0])
def test_decode_is_that_of_torch(heatmap_hw: tuple[int, int], sigma: int, scale: float) -> None:
    """In the middle and at the borders, clean and with noise, low maps and high ones, where the clamp acts."""
    codec, rng = _codec(heatmap_hw, sigma), np.random.default_rng(1)
    last = np.array(heatmap_hw[::-1]) - 1
    points_xy = np.concatenate([rng.uniform(12, last - 12, (20, 2)), _points(rng, heatmap_hw, 20, -1.0, 6.0)])
    for noise in (0.0, 0.02):
        _assert_decoded_alike(codec, (scale * _drawn(codec, points_xy, noise)).numpy())


def test_decode_of_odd_maps_is_that_of_torch() -> None:
    """Nothing above 0, one pixel, nobody."""
    codec = _codec((64, 48), 2)
    maps = np.zeros((1, 5, 64, 48), np.float32)
    maps[0, 1] = -1.0
    maps[0, 2, 30, 20] = maps[0, 3, 0, 0] = maps[0, 4, 63, 25] = 0.7
    _assert_decoded_alike(codec, maps)
    points_xy, scores = _numpy(codec).decode(np.zeros((0, 17, 64, 48)))
    assert points_xy.shape == (0, 17, 2) and scores.shape == (0, 17)


def test_flip_is_that_of_torch() -> None:
    maps = np.random.default_rng(2).random((2, 17, 8, 6))
    theirs = heatmap.flip(torch.from_numpy(maps), COCO17.mirror).numpy()
    assert (heatmap_numpy.flip(maps, COCO17.mirror) == theirs).all()


def test_it_needs_numpy_alone() -> None:
    script = (
        "import sys; sys.modules['torch'] = None\n"
        "from sapiens_accel.pose.heatmap_numpy import NumpyCodec\n"
        "import numpy as np\n"
        "codec = NumpyCodec(input_hw=(64, 48), heatmap_hw=(16, 12), sigma=1.0)\n"
        "points = np.array([[[20.0, 30.0]]])\n"
        "print(np.abs(codec.decode(codec.encode(points, np.ones((1, 1)))[0])[0] - points).max())\n"
        "print({'torch', 'jaxtyping', 'cv2', 'scipy'} & {name for name, module in sys.modules.items() if module})"
    )
    root = Path(heatmap_numpy.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True)
    error, loaded = done.stdout.splitlines()
    assert float(error) < 0.5 and loaded == "set()"
