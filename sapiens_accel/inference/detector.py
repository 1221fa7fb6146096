"""Where people are in images, by a detector of transformers (RT-DETR, RT-DETRv2, D-FINE, DETR, ...)."""

import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from jaxtyping import Float, Int, UInt8
from numpy import ndarray as Array
from torch.utils.data import DataLoader, Dataset

from sapiens_accel.data.detections import PersonBoxes
from sapiens_accel.data.loader import begin_worker, unwrap_errors
from sapiens_accel.errors import UserError
from sapiens_accel.hub import download as fetch
from sapiens_accel.sources import images as photo

# Learned on COCO, 43 million weights; Apache-2.0, as its code in transformers is.
# https://huggingface.co/PekingU/rtdetr_v2_r50vd
DEFAULT = "PekingU/rtdetr_v2_r50vd"
THRESHOLD, MAX_IOU = 0.05, 0.7
SHOWN_CLASSES = 90  # of a refusal: COCO's, all of them
SMALLEST = 1.0  # px: a thinner box holds nobody


class Prepared(NamedTuple):
    """A batch as the network wants it, and the (height, width) of each of its images; None does not decode."""

    inputs: dict[str, torch.Tensor]
    sizes: list[tuple[int, int] | None]


class Detector:
    """A detector of transformers, asked for people or other classes; one image's boxes depend on no other image.

    Args:
        name: a folder, or a repository on the Hub.
        threshold: boxes with a score up to this are left out.
        max_iou: of two boxes that overlap by more, the surer one stays.
        knob: the option that named it, for what is said about it.
        classes: names of its classes that are asked for, separated by commas.

    Raises:
        UserError: nothing there, no detector of transformers, weights that are not whole, no such class.
    """

    def __init__(
        self,
        name: str,
        device: torch.device,
        threshold: float = THRESHOLD,
        max_iou: float = MAX_IOU,
        knob: str = "--detector",
        classes: str = "person",
    ) -> None:
        self.name, self.device, self.threshold, self.max_iou = name, device, threshold, max_iou
        folder = _local(name, knob)
        if not sys.stderr.isatty():
            transformers.utils.logging.disable_progress_bar()
        try:
            model, note = transformers.AutoModelForObjectDetection.from_pretrained(folder, output_loading_info=True)
            # Without torchvision; the arithmetic on images is the one that these networks were trained with.
            self.processor: Any = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
        except Exception as error:  # whatever transformers makes of files that are not its own
            said = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            raise UserError(
                f"{knob} {name}: not a detector that transformers loads ({said}); expected RT-DETR, D-FINE, ..."
            ) from None
        if note["missing_keys"]:
            missing = sorted(note["missing_keys"])
            raise UserError(f"{knob} {name}: incomplete: no {missing[0]!r} ({len(missing)} such) in its weights")
        labels = {int(key): str(label) for key, label in model.config.id2label.items()}
        wanted = [one.strip() for one in classes.split(",")]
        known = {label.lower() for label in labels.values()}
        for one in wanted:
            if one.lower() not in known:
                shown = ", ".join(list(labels.values())[:SHOWN_CLASSES]) + ", ..." * (len(labels) > SHOWN_CLASSES)
                raise UserError(
                    f"{knob} {name}: no class {one!r} among its {len(labels)} ({shown}); name one by --detector.class"
                )
        self.people = [key for key, label in labels.items() if label.lower() in {one.lower() for one in wanted}]
        self.model: Any = model.to(device).eval()

    def scan(
        self, root: Path, names: Sequence[str], batch_size: int, num_workers: int
    ) -> Iterator[list[PersonBoxes | None]]:
        """The people of each image, batch by batch; None for an image that does not decode."""
        loader = DataLoader(
            _Files(root, names),
            batch_size=batch_size,
            num_workers=num_workers,
            collate_fn=partial(prepare_batch, self.processor),
            worker_init_fn=begin_worker,
        )
        for batch in unwrap_errors(loader):
            yield self.find(batch)

    @torch.inference_mode()
    def find(self, batch: Prepared) -> list[PersonBoxes | None]:
        """The people of each image of a batch."""
        sizes_hw = [size for size in batch.sizes if size is not None]
        if not sizes_hw:
            return [None for _ in batch.sizes]
        outputs = self.model(**{key: value.to(self.device) for key, value in batch.inputs.items()})
        read = self.processor.post_process_object_detection
        results = iter(zip(read(outputs, threshold=self.threshold, target_sizes=sizes_hw), sizes_hw, strict=True))
        return [None if size is None else self._people(*next(results)) for size in batch.sizes]

    def _people(self, result: dict[str, torch.Tensor], size_hw: tuple[int, int]) -> PersonBoxes:
        boxes, scores, labels = (result[key].cpu().double().numpy() for key in ("boxes", "scores", "labels"))
        height, width = size_hw
        corners = boxes.reshape(-1, 2, 2).clip(0, (width, height))
        sides = corners[:, 1] - corners[:, 0]
        kept = np.flatnonzero(np.isin(labels, self.people) & (sides >= SMALLEST).all(axis=1))
        boxes_xywh = np.concatenate([corners[:, 0], sides], axis=1)[kept]
        chosen = non_maximum_suppression(boxes_xywh, scores[kept], self.max_iou)
        return PersonBoxes(boxes_xywh[chosen], scores[kept][chosen])


def _local(name: str, knob: str) -> str:
    try:
        return fetch.fetch(name)
    except UserError as error:
        raise UserError(f"{knob} {str(error).removeprefix('--weights ')}") from None


class _Files(Dataset[UInt8[Array, "h w 3"] | None]):
    """Index -> image, None if it does not decode."""

    def __init__(self, root: Path, names: Sequence[str]) -> None:
        self.root, self.names = root, names

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> UInt8[Array, "h w 3"] | None:
        return photo.whole_image(self.root / self.names[index])


def prepare_batch(processor: Any, images: Sequence[UInt8[Array, "h w 3"] | None]) -> Prepared:
    """A batch of images for the network; in the reading processes, so that the device does not wait."""
    seen = [image for image in images if image is not None]
    inputs = processor(images=seen, input_data_format="channels_last", return_tensors="pt") if seen else {}
    return Prepared(dict(inputs), [None if image is None else image.shape[:2] for image in images])


def non_maximum_suppression(
    boxes_xywh: Float[Array, "n 4"], scores: Float[Array, "n"], max_iou: float
) -> Int[Array, "m"]:
    """Indices of the boxes that stay, best first: of two whose intersection over union is above `max_iou`, one."""
    left, kept = np.argsort(-scores, kind="stable"), []
    low, high = boxes_xywh[:, :2], boxes_xywh[:, :2] + boxes_xywh[:, 2:]
    areas = boxes_xywh[:, 2] * boxes_xywh[:, 3]
    while len(left):
        best, rest = left[0], left[1:]
        kept.append(best)
        common = (np.minimum(high[best], high[rest]) - np.maximum(low[best], low[rest])).clip(0).prod(axis=1)
        left = rest[common <= max_iou * (areas[best] + areas[rest] - common)]
    return np.array(kept, dtype=int)
