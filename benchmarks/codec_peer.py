"""The codecs of mmpose and transformers, timed when codec.py asks; started by it with the interpreter that has them.

    PEER_PYTHON benchmarks/codec_peer.py FOLDER < orders > answers

FOLDER holds settings.json. First a line tells what can be imported, why the rest cannot, and versions. Then each line
in, a JSON list, gets a line out: ["load"] reads points.npy and maps.npy; ["encode" or "decode", whose] runs once on all
people and tells the seconds; ["save", whose] writes what it gives, points in input px as heatmap.py has them.
Nothing of sapiens_accel is imported: that environment need not have what it needs.
"""

import sys

if __name__ == "__main__":
    sys.path.pop(0)  # this folder's ssl.py would hide the standard library's

import json
import platform
import time
import types
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import numpy as np

PACKAGES = (
    "mmpose",
    "mmcv-lite",
    "mmengine",
    "numpy",
    "opencv-python-headless",
    "torch",
    "transformers",
    "torchvision",
)


class Mmpose:
    """mmpose's UDPHeatmap, person by person, as its data pipeline and its head call it."""

    def __init__(self, settings):
        import cv2
        import mmpose

        cv2.setNumThreads(0)
        # The package's own __init__ imports every codec, and what they need.
        package = types.ModuleType("mmpose.codecs")
        package.__path__ = [str(Path(mmpose.__file__).with_name("codecs"))]
        sys.modules["mmpose.codecs"] = package
        from mmpose.codecs.udp_heatmap import UDPHeatmap

        self.input_wh = settings["input_hw"][::-1]
        self.codec = UDPHeatmap(self.input_wh, settings["heatmap_hw"][::-1], sigma=settings["sigma"])

    def load(self, points_xy, maps):
        self.points_xy, self.maps = [person[None] for person in points_xy], list(maps)
        self.visible = np.ones((1, points_xy.shape[1]), np.float32)

    def encode(self):
        return [self.codec.encode(person, self.visible) for person in self.points_xy]

    def decode(self):
        return [self.codec.decode(person) for person in self.maps]

    def results(self, encoded, decoded):
        # Its px are W / (W - 1) of input px: the step back to the image undoes that.
        size = np.array(self.input_wh)
        points_xy = np.concatenate([keypoints for keypoints, _ in decoded]) * (size - 1) / size
        return np.stack([person["heatmaps"] for person in encoded]), points_xy


class Transformers:
    """The codec inside Sapiens2's image processor, on an image of which the whole crop is the network's input."""

    def __init__(self, settings):
        from transformers.models.sapiens2 import image_processing_sapiens2 as module

        (self.height, self.width), sigma = settings["input_hw"], settings["sigma"]
        downscale = self.height // settings["heatmap_hw"][0]
        self.processor = module.Sapiens2ImageProcessor(size={"height": self.height, "width": self.width})
        self.options = {"output_size": (self.height, self.width), "downscale_factor": downscale, "sigma": sigma}
        self.generate = module.generate_udp_gaussian_heatmaps

    def load(self, points_xy, maps):
        import torch

        # Padded by 1.25 this box is the crop, of W image px for the W - 1 between the input's first and last pixel.
        size = np.array([self.width, self.height])
        self.boxes = [[[0.1 * self.width, 0.1 * self.height, 0.8 * self.width, 0.8 * self.height]]] * len(points_xy)
        self.keypoints = [[person.tolist()] for person in points_xy * (size / (size - 1))]
        self.outputs = types.SimpleNamespace(heatmaps=torch.from_numpy(maps))

    def encode(self):
        return self.generate(self.boxes, self.keypoints, **self.options)[0]

    def decode(self):
        return self.processor.post_process_pose_estimation(self.outputs, self.boxes)

    def results(self, encoded, decoded):
        size = np.array([self.width, self.height])
        points_xy = np.stack([person["keypoints"].numpy() for (person,) in decoded]) * (size - 1) / size
        return np.stack([person.numpy() for person in encoded]), points_xy


def main(folder):
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer
    settings = json.loads((folder / "settings.json").read_text())
    peers, missing = {}, {}
    for name, build in (("mmpose", Mmpose), ("transformers", Transformers)):
        try:
            import torch

            torch.set_num_threads(1)
            peers[name] = build(settings)
        except Exception as error:  # whatever stands in the way there, codec.py tells it
            missing[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    told = {"peers": list(peers), "missing": missing, "versions": versions()}
    print(json.dumps(told), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(obey(json.loads(line), peers, folder)), file=answers, flush=True)


def obey(order, peers, folder):
    if order[0] == "load":
        points_xy, maps = np.load(folder / "points.npy"), np.load(folder / "maps.npy")
        for peer in peers.values():
            peer.load(points_xy, maps)
        return None
    what, name = order
    if what == "save":
        encoded, points_xy = peers[name].results(peers[name].encode(), peers[name].decode())
        np.save(folder / f"{name}_maps.npy", encoded)
        np.save(folder / f"{name}_points.npy", points_xy)
        return None
    return seconds(getattr(peers[name], what))


def seconds(run):
    """Of this process on the core, and by the clock. What the run gives is there until both have stopped."""
    start, start_wall = time.process_time(), time.perf_counter()
    given = run()
    taken = time.process_time() - start, time.perf_counter() - start_wall
    del given
    return taken


def versions(packages=PACKAGES):
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


if __name__ == "__main__":
    if find_spec("torch") is None:
        sys.exit("torch: not installed")
    main(Path(sys.argv[1]))
