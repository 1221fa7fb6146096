"""Draw docs/predictions.jpg: people drawn by the package, and the keypoints that a trained network predicts on them.

    accelerate launch train.py
    python docs/draw_predictions.py runs/demo/phase2/weights

The people are new ones: the demo draws with seed 0, this image with seed 7.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import cv2
import numpy as np

from sapiens_accel.sources import synthetic

REPOSITORY = Path(__file__).resolve().parents[1]
OUT = REPOSITORY / "docs" / "predictions.jpg"
COLUMNS, NUM_ROWS, SIZE, QUALITY = 4, 2, 300, 82


def main(weights: str) -> None:
    """Predict on new people with their own boxes, and write a grid of the images (at most 200 kB)."""
    with tempfile.TemporaryDirectory() as scratch:
        root, output = Path(scratch) / "people", Path(scratch) / "out"
        hw = (SIZE, SIZE)
        synthetic.write(root, num_train=60, num_unlabelled=1, num_val=1, image_hw=hw, seed=7)
        annotations = root / "annotations" / "person_keypoints_train2017.json"
        words = ["--images", root / "train2017", "--boxes", annotations, "--output_dir", output]
        subprocess.run([sys.executable, "eval.py", weights, *map(str, words)], cwd=REPOSITORY, check=True)
        grid = _grid([cv2.imread(str(path)) for path in _most_labeled(annotations, output)])
    cv2.imwrite(str(OUT), grid, [cv2.IMWRITE_JPEG_QUALITY, QUALITY, cv2.IMWRITE_JPEG_OPTIMIZE, 1])
    print(f"{OUT}: {OUT.stat().st_size / 1000:.0f} kB")


def _most_labeled(annotations: Path, output: Path) -> list[Path]:
    """The drawn images in which most keypoints are labeled, by file name: chosen by the labels, not by the result."""
    tree = json.loads(annotations.read_text())
    count = {image["id"]: 0 for image in tree["images"]}
    for person in tree["annotations"]:
        count[person["image_id"]] += person["num_keypoints"]
    images = sorted(tree["images"], key=lambda image: -count[image["id"]])[: COLUMNS * NUM_ROWS]
    return [
        next(output.rglob(f"drawn/{image['file_name']}")) for image in sorted(images, key=lambda image: image["id"])
    ]


def _grid(images: list[np.ndarray]) -> np.ndarray:
    rows = [np.hstack(images[row * COLUMNS : (row + 1) * COLUMNS]) for row in range(NUM_ROWS)]
    return np.vstack(rows)


if __name__ == "__main__":
    main(sys.argv[1])
