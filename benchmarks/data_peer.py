"""mmpose's training pipeline as Sapiens' recipe for COCO composes it, timed when data.py asks.

    PEER_PYTHON benchmarks/data_peer.py FOLDER < orders > answers

FOLDER holds settings.json. First a line tells whether mmpose can be imported, why not, and versions. Then each line in,
["pass", whether targets are made too], gets a line out: the seconds of one pass over all people, batches and all.
The steps and their settings: facebookresearch/sapiens, pose/configs/sapiens_pose/coco/sapiens_1b-210e_coco-1024x768.py.
Nothing of sapiens_accel is imported: that environment need not have what it needs.
"""

import sys

if __name__ == "__main__":
    sys.path.append(sys.path.pop(0))  # this folder's ssl.py would hide the standard library's

import json
import pickle
import types
from copy import deepcopy
from pathlib import Path

import numpy as np
from codec_peer import seconds, versions

PACKAGES = ("mmpose", "mmcv-lite", "mmengine", "albumentations", "numpy", "opencv-python-headless", "scipy", "torch")
CHANGES = [
    {"type": "Blur", "p": 0.1},
    {"type": "MedianBlur", "p": 0.1},
    {
        "type": "CoarseDropout",
        "max_holes": 1,
        "max_height": 0.4,
        "max_width": 0.4,
        "min_holes": 1,
        "min_height": 0.2,
        "min_width": 0.2,
        "p": 1.0,
    },
]


class Mmpose:
    """Its transforms, one after the other, and what its data set gives them."""

    def __init__(self, settings):
        import cv2
        import torch

        cv2.setNumThreads(0)
        torch.set_num_threads(1)
        _without_what_others_need("mmpose.codecs", "mmpose.datasets", "mmpose.datasets.transforms")
        import mmpose.codecs.udp_heatmap  # noqa: F401  (it registers itself)
        from mmengine.dataset import pseudo_collate
        from mmpose.datasets.transforms import common_transforms as common
        from mmpose.datasets.transforms.formatting import PackPoseInputs
        from mmpose.datasets.transforms.loading import LoadImage
        from mmpose.datasets.transforms.topdown_transforms import TopdownAffine

        size = settings["input_hw"][::-1]
        codec = {"type": "UDPHeatmap", "input_size": size, "sigma": settings["sigma"]}
        targets = common.GenerateTarget(encoder=codec | {"heatmap_size": [side // 4 for side in size]})
        steps = [
            LoadImage(),
            common.GetBBoxCenterScale(),
            common.RandomFlip(direction="horizontal"),
            common.RandomHalfBody(),
            common.RandomBBoxTransform(),
            TopdownAffine(input_size=size, use_udp=True),
            common.PhotometricDistortion(),
            common.Albumentation(transforms=CHANGES),
        ]
        self.steps = {made: [*steps, *([targets] if made else []), PackPoseInputs()] for made in (True, False)}
        self.collate, self.batch = pseudo_collate, settings["batch"]
        # It keeps its people as pickles, since copies of lists cost memory in every worker.
        self.people = [pickle.dumps(_row(person)) for person in settings["people"]]
        self.meta = settings["meta"]

    def one_pass(self, with_targets):
        for start in range(0, len(self.people), self.batch):
            self.collate([self._person(row, with_targets) for row in self.people[start : start + self.batch]])

    def _person(self, row, with_targets):
        person = pickle.loads(row) | deepcopy(self.meta)
        for step in self.steps[with_targets]:
            person = step(person)
        return person


def _without_what_others_need(*packages):
    """The packages' own __init__ import all that is in them, and what that needs; a module at a time will do."""
    import mmpose

    for name in packages:
        package = types.ModuleType(name)
        package.__path__ = [str(Path(mmpose.__file__).parent.joinpath(*name.split(".")[1:]))]
        sys.modules[name] = package


def _row(person):
    """What mmpose's data set of COCO holds of a person."""
    keypoints = np.array(person["keypoints"], np.float32)[None]
    x, y, w, h = person["box_xywh"]
    return {
        "img_path": person["path"],
        "img_id": person["id"],
        "id": person["id"],
        "bbox": np.array([[x, y, x + w, y + h]], np.float32),
        "bbox_score": np.ones(1, np.float32),
        "keypoints": keypoints[..., :2],
        "keypoints_visible": np.minimum(1, keypoints[..., 2]),
        "category_id": np.array(1),
        "raw_ann_info": {"bbox": person["box_xywh"], "keypoints": np.ravel(person["keypoints"]).tolist()},
    }


def main(folder):
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer
    peer, missing = None, None
    try:
        peer = Mmpose(json.loads((folder / "settings.json").read_text()))
    except Exception as error:  # whatever stands in the way there, data.py tells it
        missing = f"{type(error).__name__}: {error}".splitlines()[0]
    print(json.dumps({"missing": missing, "versions": versions(PACKAGES)}), file=answers, flush=True)
    for line in sys.stdin:
        _, with_targets = json.loads(line)
        print(json.dumps(seconds(lambda made=with_targets: peer.one_pass(made))), file=answers, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
