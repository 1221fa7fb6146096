"""Networks and boxes to keypoints in image px: crops, test-time augmentation, any number of processes.

A person is predicted once, or several times: mirrored, at other sizes of the crop, by other networks. The heatmaps of
all views are brought into one frame, the first network's own crop, and averaged there; one decoding follows.

Shape letters: n boxes, b of them at a time, k keypoints, H W the input, h w the heatmap.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from numpy import ndarray as Array
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, default_collate
from tqdm import tqdm

from sapiens_accel.config.schema import DataConfig, EvalConfig
from sapiens_accel.data.loader import begin_worker, unwrap_errors
from sapiens_accel.errors import UserError
from sapiens_accel.evaluation.boxes import Boxes
from sapiens_accel.models.sapiens import SapiensPose, use_input_size
from sapiens_accel.pose import geometry
from sapiens_accel.pose.averaging import View, average_flip, average_views, resize_matrices, scale_sizes
from sapiens_accel.pose.heatmap import Codec
from sapiens_accel.pose.skeleton import Skeleton
from sapiens_accel.visibility.output import watch_head

PATCH = 16
VisibilityReader = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """Keypoints of all people, in the order of their rows: image px, and scores.

    Attributes:
        visibility: float32; what `PoseNetwork.visibility` gives, the mean of the networks that have it; None if none
            has.
    """

    points_xy: Float[Array, "n k 2"]
    scores: Float[Array, "n k"]
    visibility: Float[Array, "n k m"] | None = None


@dataclass(frozen=True, kw_only=True)
class PoseNetwork:
    """uint8 crops [b, 3, H, W] to heatmaps [b, k, h, w], which `codec` decodes.

    Attributes:
        autocast: the dtype of mixed precision; None where the module sees to its own.
        name: what messages call it.
        visibility: the features and heatmaps [b, k, h, w] of a crop to numbers of each keypoint [b, k, m], usually a
            `VisibilityOutput`; None: nothing.
    """

    model: nn.Module
    codec: Codec
    autocast: torch.dtype | None = None
    name: str = "the network"
    visibility: VisibilityReader | None = None


@dataclass(frozen=True, kw_only=True)
class PredictionSetup:
    """How networks predict the people in boxes.

    Attributes:
        skeleton: the keypoints that the networks predict.
        data: the padding of boxes, and the loading processes.
        config: batch size, flip test and scales.
    """

    skeleton: Skeleton
    data: DataConfig
    config: EvalConfig
    device: torch.device


@dataclass(frozen=True, kw_only=True)
class Processes:
    """The processes that share the work.

    Attributes:
        rank: this one.
        num: all of them.
        gather: concatenates a tensor of equal shape on all ranks along its first dimension.
    """

    rank: int = 0
    num: int = 1
    gather: Callable[[Tensor], Tensor] = lambda tensor: tensor


class Diverged(UserError):  # noqa: N818  (a state of the network)
    """A network whose heatmaps are not numbers."""


class NetworkInput(NamedTuple):
    """What a network is shown of a box, and the matrix input_from_image that made it."""

    image: UInt8[Tensor, "*b 3 H W"]
    matrix: Float[Tensor, "*b 2 3"]  # float64: offsets of thousands of pixels are inverted and composed


@dataclass(frozen=True)
class ScaledNetwork:
    """A network at one size of its crop."""

    network: PoseNetwork
    input_hw: tuple[int, int]


def list_views(networks: Sequence[PoseNetwork], scales: Sequence[float]) -> list[ScaledNetwork]:
    """Every network at every scale of its own input, in multiples of the patch.

    Raises:
        UserError: two scales that are the same size.
    """
    views = []
    for network in networks:
        sizes = scale_sizes(network.codec.input_hw, scales, PATCH)
        for index, size in enumerate(sizes):
            if size in sizes[:index]:
                same = f"{scales[sizes.index(size)]:g} and {scales[index]:g}"
                raise UserError(
                    f"--eval.scales: {same} are both {size[0]}x{size[1]} px of {PATCH}-px patches; drop one"
                )
            views.append(ScaledNetwork(network, size))
    return views


class Crops(Dataset[tuple[NetworkInput, ...]]):
    """Index -> the upright crop of a box for every view; its image is read once."""

    def __init__(self, boxes: Boxes, views: Sequence[ScaledNetwork], padding: float) -> None:
        self.boxes, self.padding = boxes, padding
        self.sizes = [(view.network.codec.input_hw, view.input_hw) for view in views]

    def __len__(self) -> int:
        return len(self.boxes)

    def __getitem__(self, index: int) -> tuple[NetworkInput, ...]:
        image = self.boxes.read_image(index)
        return tuple(self._crop(image, index, own_hw, input_hw) for own_hw, input_hw in self.sizes)

    def _crop(
        self, image: UInt8[Array, "h w 3"], index: int, own_hw: tuple[int, int], input_hw: tuple[int, int]
    ) -> NetworkInput:
        # The same part of the image at every scale: the rectangle has the aspect of the network's own input.
        matrix = geometry.crop_around_box(self.boxes.boxes_xywh[index], self.padding, own_hw).matrix(input_hw)
        crop = geometry.warp(image, matrix, input_hw)
        return NetworkInput(torch.from_numpy(np.ascontiguousarray(crop.transpose(2, 0, 1))), torch.from_numpy(matrix))


ALONE = Processes()


@torch.no_grad()
def predict(
    networks: Sequence[PoseNetwork], boxes: Boxes, setup: PredictionSetup, processes: Processes = ALONE
) -> Predictions:
    """Predict each box once; all ranks return all predictions.

    Raises:
        Diverged: on all ranks: heatmaps that are not numbers. Nothing that follows could use them: no metric, and no
            drawing, which writes beyond its memory when it is given such points.
        UserError: an image that does not decode; scales that are the same; another scale of a sharded network.
    """
    # Every rank takes as many boxes as the others (a sharded model's forward is a collective); the last ones again.
    rank, num_ranks, device = processes.rank, processes.num, setup.device
    mine = [index % len(boxes) for index in range(rank, -(-len(boxes) // num_ranks) * num_ranks, num_ranks)]
    views = list_views(networks, setup.config.scales)
    loader = DataLoader(
        Subset(Crops(boxes, views, setup.data.box_padding), mine),
        batch_size=setup.config.batch_size,
        num_workers=setup.data.num_workers,
        collate_fn=default_collate,
        pin_memory=device.type == "cuda",
        worker_init_fn=begin_worker,
    )
    decoded = []
    with _evaluating([network.model for network in networks]), _progress(len(mine), rank) as progress:
        for batch in unwrap_errors(loader):
            crops = [NetworkInput(*crop) for crop in batch]
            maps, visibility = _mean_maps(views, crops, setup)
            points_xy, scores = networks[0].codec.decode(maps)
            decoded.append((points_xy.cpu().double(), scores.cpu().double(), crops[0].matrix, visibility.cpu()))
            progress.update(len(points_xy))
    points_xy, scores, matrices, visibility = (torch.cat(parts) for parts in zip(*decoded, strict=True))
    # The frame of the maps is the first network's own crop, whatever its first view was.
    frames = resize_matrices(matrices, views[0].input_hw, networks[0].codec.input_hw)
    image_xy = torch.stack([_to_image(m, p) for m, p in zip(frames, points_xy, strict=True)])
    rows = torch.cat([image_xy, scores[..., None]], dim=-1).to(device)
    index = torch.tensor(mine, device=device)
    gather = processes.gather
    order = gather(index).cpu().numpy()
    predictions = _assemble(order, gather(rows).cpu().numpy(), len(boxes))
    if visibility.shape[-1]:
        values = gather(visibility.to(device)).cpu().numpy()
        predictions = replace(predictions, visibility=_in_order(order, values, len(boxes)))
    _check_finite(predictions, boxes, networks)
    return predictions


@torch.no_grad()
def predict_heatmaps(networks: Sequence[PoseNetwork], boxes: Boxes, setup: PredictionSetup) -> Float[Array, "n k h w"]:
    """What `predict` decodes, of a few boxes: the average of all views, in the first network's own crop. On one rank.

    Raises:
        UserError: as `predict`.
    """
    views, batch_size = list_views(networks, setup.config.scales), setup.config.batch_size
    crops, maps = Crops(boxes, views, setup.data.box_padding), []
    with _evaluating([network.model for network in networks]):
        for first in range(0, len(boxes), batch_size):
            several = [crops[index] for index in range(first, min(first + batch_size, len(boxes)))]
            batch = [NetworkInput(*crop) for crop in default_collate(several)]
            maps.append(_mean_maps(views, batch, setup)[0].cpu().numpy())
    return np.concatenate(maps)


def _mean_maps(
    views: Sequence[ScaledNetwork], crops: Sequence[NetworkInput], setup: PredictionSetup
) -> tuple[Float[Tensor, "b k h w"], Float[Tensor, "b k m"]]:
    """The average of all views, in the frame of the first network's own crop; and of their visibility (m 0: none)."""
    judged: list[Tensor] = []

    def predict_views() -> Iterator[View]:
        for index, (view, crop) in enumerate(zip(views, crops, strict=True)):
            image, network = crop.image.to(setup.device, non_blocking=True), partial(_maps, view)
            with _watch_visibility(views, index) as passes:
                maps = average_flip(network, image, setup.skeleton.mirror) if setup.config.flip else network(image)
            if passes:  # those of the mirror image come last
                judged.append(torch.cat(passes)[: len(image)])
            yield View(maps, crop.matrix, view.input_hw)

    codec = views[0].network.codec
    maps = average_views(predict_views(), codec.input_hw, codec.heatmap_hw)
    return maps, torch.stack(judged).mean(dim=0) if judged else maps.new_zeros(*maps.shape[:2], 0)


@contextmanager
def _watch_visibility(views: Sequence[ScaledNetwork], index: int) -> Iterator[list[Tensor]]:
    """Collect the visibility of one view: of each network that has it, at its own size or else its first one."""
    network = views[index].network
    sizes = {place: view.input_hw for place, view in enumerate(views) if view.network is network}
    best = next((place for place, size in sizes.items() if size == network.codec.input_hw), min(sizes))
    if network.visibility is None or index != best:
        yield []
        return
    head = next(module for module in network.model.modules() if isinstance(module, SapiensPose)).head
    with watch_head(head, partial(_in_float32, network.visibility)) as passes:
        yield passes


def _in_float32(visibility: VisibilityReader, features: Tensor, heatmaps: Tensor) -> Tensor:
    with torch.autocast(features.device.type, enabled=False):
        return visibility(features, heatmaps)


def _maps(view: ScaledNetwork, image: UInt8[Tensor, "b 3 H W"]) -> Float[Tensor, "b k h w"]:
    """A network's maps, in float32; of a larger crop, fewer people at a time."""
    network, own_hw = view.network, view.network.codec.input_hw
    pixels = view.input_hw[0] * view.input_hw[1] / (own_hw[0] * own_hw[1])
    at_a_time = max(1, int(len(image) / max(1.0, pixels)))
    casts = torch.autocast(image.device.type, dtype=network.autocast, enabled=network.autocast is not None)
    with use_input_size(network.model, view.input_hw), casts:
        return torch.cat([network.model(part).float() for part in image.split(at_a_time)])


@contextmanager
def _evaluating(models: Sequence[nn.Module]) -> Iterator[None]:
    training = [model.training for model in models]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for model, was in zip(models, training, strict=True):
            model.train(was)


def _progress(total: int, rank: int) -> tqdm:
    hidden = None if rank == 0 else True  # None: where there is no terminal
    return tqdm(total=total, desc="evaluating", unit="person", disable=hidden, leave=False)


def _to_image(matrix: Float[Tensor, "2 3"], points_xy: Float[Tensor, "k 2"]) -> Float[Tensor, "k 2"]:
    return torch.from_numpy(geometry.apply(geometry.invert(matrix.numpy()), points_xy.numpy()))


def _check_finite(predictions: Predictions, boxes: Boxes, networks: Sequence[PoseNetwork]) -> None:
    finite = np.isfinite(predictions.points_xy).all(axis=(1, 2)) & np.isfinite(predictions.scores).all(axis=1)
    bad = np.flatnonzero(~finite)
    if len(bad):
        names = " and ".join(dict.fromkeys(network.name for network in networks))
        raise Diverged(
            f"{names}: heatmaps are not numbers (nan or inf) for {len(bad)} of {len(boxes)} people, the first in "
            f"{boxes.file_names[bad[0]]}; the training diverged (take weights of an earlier step, train with a lower "
            f"learning rate), or the weights are damaged"
        )


def _assemble(index: Int[Array, "m"], rows: Float[Array, "m k 3"], num_boxes: int) -> Predictions:
    """By each box's own index: what was predicted twice to fill a rank's share counts once."""
    assert set(index.tolist()) == set(range(num_boxes)), "a person was lost between the ranks"
    whole = _in_order(index, rows, num_boxes)
    return Predictions(points_xy=whole[..., :2], scores=whole[..., 2])


def _in_order(index: Int[Array, "m"], rows: Float[Array, "m k c"], num_boxes: int) -> Float[Array, "n k c"]:
    whole = np.zeros((num_boxes, *rows.shape[1:]), rows.dtype)
    whole[index] = rows
    return whole
