"""Test-time augmentation: every look comes back to where it was taken, and none is without effect."""

import json
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sapiens_accel.config.schema import DataConfig, EvalConfig
from sapiens_accel.data import people as coco
from sapiens_accel.errors import UserError
from sapiens_accel.evaluation import boxes as detections
from sapiens_accel.evaluation import predict
from sapiens_accel.evaluation.boxes import Boxes
from sapiens_accel.evaluation.predict import PoseNetwork, Predictions, PredictionSetup, ScaledNetwork
from sapiens_accel.models import load as weights
from sapiens_accel.models.sapiens import SapiensPose, use_input_size
from sapiens_accel.pose import geometry, heatmap
from sapiens_accel.pose.heatmap import Codec
from sapiens_accel.pose.skeleton import COCO17, WHOLEBODY133, Skeleton
from sapiens_accel.sources import images as photo
from sapiens_accel.visibility.output import NUM_SHAPE, describe, watch_head

Array = np.ndarray
K = 17
NUM = 5
DATA = DataConfig(num_workers=0)
CONFIG = EvalConfig(batch_size=2, flip=False)
VAL = "annotations/person_keypoints_val2017.json"


@pytest.fixture(scope="module")
def boxes(tmp_path_factory: pytest.TempPathFactory) -> Boxes:
    """Five people of unlike sizes in one image each; its red says which it is, its noise is for real networks."""
    root, rng = tmp_path_factory.mktemp("predict"), np.random.default_rng(3)
    (root / "val2017").mkdir()
    (root / "annotations").mkdir()
    images, annotations = [], []
    for i in range(NUM):
        box = [12.5 + 3 * i, 20.25 + i, 60.0 + 15 * i, 150.0 - 11 * i]
        picture = rng.integers(0, 255, (220, 230, 3), dtype=np.uint8)
        picture[..., 0] = 20 + 30 * i
        cv2.imwrite(str(root / "val2017" / f"{i}.png"), picture[..., ::-1])
        points = np.column_stack([rng.uniform(box[:2], np.add(box[:2], box[2:]), (K, 2)), np.full(K, 2)])
        images.append({"id": 100 + i, "file_name": f"{i}.png", "width": 230, "height": 220})
        person = {"id": 50 - i, "image_id": 100 + i, "area": box[2] * box[3], "bbox": box}
        annotations.append({**person, "keypoints": points.ravel().tolist()})
    (root / VAL).write_text(json.dumps({"images": images, "annotations": annotations}))
    return detections.ground_truth_boxes(coco.labeled_people(root, VAL, "val2017", K, root / "cache"))


@pytest.fixture(scope="module")
def truth(boxes: Boxes) -> Array:
    tree = json.loads((boxes.root / VAL).read_text())
    return np.array([one["keypoints"] for one in tree["annotations"]]).reshape(NUM, K, 3)[..., :2]


class Seer(nn.Module):
    """Knows whose crop it is by its red, and draws what a perfect network would, at any size of its crop.

    Args:
        off: px of the image that it errs to the right.
    """

    def __init__(self, boxes: Boxes, truth: Array, own_hw: tuple[int, int], off: float = 0.0) -> None:
        super().__init__()
        self.boxes, self.own_hw, self.seen_hw = boxes, own_hw, []
        self.truth = truth + np.array([off, 0.0])

    def forward(self, image: Tensor) -> Tensor:
        size = (image.shape[-2], image.shape[-1])
        self.seen_hw.append(size)
        who = ((image[:, 0, size[0] // 2, size[1] // 2].float() - 20) / 30).round().long().tolist()
        crops = [geometry.crop_around_box(self.boxes.boxes_xywh[i], 1.25, self.own_hw) for i in who]
        found = [geometry.apply(crop.matrix(size), self.truth[i]) for crop, i in zip(crops, who, strict=True)]
        points_xy = torch.from_numpy(np.stack(found)).float()
        codec = Codec(input_hw=size, heatmap_hw=(size[0] // 4, size[1] // 4), sigma=3)
        return codec.encode(points_xy, torch.ones(points_xy.shape[:2]))[0]


def _seer(boxes: Boxes, truth: Array, own_hw: tuple[int, int] = (256, 192), off: float = 0.0) -> PoseNetwork:
    codec = Codec(input_hw=own_hw, heatmap_hw=(own_hw[0] // 4, own_hw[1] // 4), sigma=3)
    return PoseNetwork(model=Seer(boxes, truth, own_hw, off), codec=codec)


def _tiny(name: str, seed: int, input_hw: tuple[int, int] = (64, 48)) -> PoseNetwork:
    """A network with weights that make every part of it matter."""
    torch.manual_seed(seed)
    model = SapiensPose(name, K, input_hw)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.startswith("head.") and parameter.ndim > 1:
                parameter.normal_(std=0.1)
            elif "lambda" in key:
                parameter.fill_(0.5)
        if model.size.family == "sapiens":
            model.backbone.embeddings.position_embeddings[:, 1:].normal_(std=0.5)
    return PoseNetwork(model=model, codec=Codec(input_hw=input_hw, heatmap_hw=model.heatmap_hw, sigma=2))


def _predict(networks: list[PoseNetwork], boxes: Boxes, config: EvalConfig = CONFIG) -> Predictions:
    return predict.predict(networks, boxes, _setup(COCO17, config))


def _setup(skeleton: Skeleton, config: EvalConfig) -> PredictionSetup:
    return PredictionSetup(skeleton=skeleton, data=DATA, config=config, device=torch.device("cpu"))


# ---- Where it was taken


@pytest.mark.parametrize("scales", [(0.5,), (1.5,), (2.0,), (0.5, 1.0, 1.5, 2.0), (0.7, 1.3)])
def test_every_scale_comes_back_to_where_it_was_taken(boxes: Boxes, truth: Array, scales: tuple[float, ...]) -> None:
    network = _seer(boxes, truth)
    predictions = _predict([network], boxes, replace(CONFIG, scales=scales))
    # A wrong corner or half a pixel of the smallest map would be over 1 px here.
    assert np.abs(predictions.points_xy - truth).max() < 0.25
    assert (predictions.scores > 0.8).all() and (predictions.scores <= 1 + 1e-5).all()
    expected = {(round(256 * s / 16) * 16, round(192 * s / 16) * 16) for s in scales}
    assert isinstance(network.model, Seer)
    assert set(network.model.seen_hw) == expected


@pytest.mark.parametrize("other_hw", [(512, 384), (128, 96), (256, 256), (384, 160)])
def test_networks_of_other_sizes_and_aspects_meet_in_one_frame(
    boxes: Boxes, truth: Array, other_hw: tuple[int, int]
) -> None:
    for pair in ([(256, 192), other_hw], [other_hw, (256, 192)]):
        predictions = _predict([_seer(boxes, truth, hw) for hw in pair], boxes)
        assert np.abs(predictions.points_xy - truth).max() < 0.3
        assert (predictions.scores > 0.75).all()


def test_maps_are_averaged_not_points_chosen(boxes: Boxes, truth: Array) -> None:
    # 3 px apart in the image, the sum of two equal Gaussians peaks in the middle.
    near = _predict([_seer(boxes, truth), _seer(boxes, truth, off=3.0)], boxes)
    assert np.abs(near.points_xy - truth - [1.5, 0]).max() < 0.3
    # Far apart (and all in the middle of the crop), of three two prevail.
    center = (boxes.boxes_xywh[:, :2] + boxes.boxes_xywh[:, 2:] / 2)[:, None]
    inner = center + 0.2 * (truth - center)
    far = _predict([_seer(boxes, inner, off=off) for off in (0.0, 40.0, 40.0)], boxes)
    assert np.abs(far.points_xy - inner - [40, 0]).max() < 0.3
    assert far.scores == pytest.approx(2 / 3, abs=0.07)


def test_the_order_of_scales_and_the_batch_size_do_not_matter(boxes: Boxes, truth: Array) -> None:
    for network in (_seer(boxes, truth), _tiny("sapiens_tiny", 0)):
        once = _predict([network], boxes, replace(CONFIG, scales=(0.5, 1.0, 2.0), flip=True))
        again = _predict([network], boxes, replace(CONFIG, scales=(2.0, 0.5, 1.0), flip=True, batch_size=5))
        assert np.median(np.abs(once.points_xy - again.points_xy)) < 1e-5
        assert np.abs(once.scores - again.scores).max() < 1e-5


# ---- Networks at another size


@pytest.mark.parametrize("name", ["sapiens_tiny", "sapiens2_tiny"])
def test_a_network_at_another_size_is_the_one_that_its_weights_make_there(name: str) -> None:
    model = _tiny(name, 0).model.eval()
    assert isinstance(model, SapiensPose)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    image = torch.randint(0, 256, (2, 3, 96, 80), dtype=torch.uint8)
    larger = SapiensPose(name, K, (96, 80)).eval()
    state = dict(model.state_dict())
    if name == "sapiens_tiny":
        positions = state[weights.POSITIONS]
        grid = positions[:, 1:].transpose(1, 2).reshape(1, -1, 4, 3)
        resized = F.interpolate(grid, size=(6, 5), mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
        state[weights.POSITIONS] = torch.cat([torch.zeros_like(positions[:, :1]), resized], dim=1)
    larger.load_state_dict(state)
    with torch.no_grad():
        expected, own = larger(image), model(image[:, :, :64, :48])
        with use_input_size(model, (96, 80)):
            assert torch.equal(model(image), expected)
        assert torch.equal(model(image[:, :, :64, :48]), own), "what it was before"
    assert expected.std() > 1e-3
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[key], before[key]) for key in before)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_failure_at_another_size_leaves_the_network_as_it_was() -> None:
    model = _tiny("sapiens_tiny", 0).model
    assert isinstance(model, SapiensPose)
    own = model.backbone.embeddings.position_embeddings
    with pytest.raises(RuntimeError, match="memory"), use_input_size(model, (96, 80)):
        raise RuntimeError("out of memory")
    assert model.backbone.embeddings.position_embeddings is own
    assert tuple(model.backbone.embeddings.patch_embeddings.image_size) == (64, 48)


def test_positions_that_are_shared_out_are_not_resized() -> None:
    model = _tiny("sapiens_tiny", 0).model
    assert isinstance(model, SapiensPose)
    model.backbone.embeddings.position_embeddings.ds_id = 0  # as DeepSpeed marks it in ZeRO-3
    with pytest.raises(UserError, match=r"--eval\.scales: not under ZeRO-3"), use_input_size(model, (96, 80)):
        pass
    with use_input_size(model, (64, 48)):
        pass


# ---- What it is, and that it does something


def _looked_at(network: PoseNetwork, boxes: Boxes, index: int, scale: float, mirrored: bool) -> Tensor:
    """One look by hand, on the grid of the network's own map: align_corners, as the map's corners are the crop's."""
    height, width = network.codec.input_hw
    input_hw = (int(height * scale), int(width * scale))
    matrix = geometry.crop_around_box(boxes.boxes_xywh[index], 1.25, network.codec.input_hw).matrix(input_hw)
    image = geometry.warp(photo.read_image(boxes.root / boxes.file_names[index]), matrix, input_hw)
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None]
    with torch.no_grad(), use_input_size(network.model, input_hw):
        maps = network.model(pixels.flip(-1) if mirrored else pixels)
    maps = heatmap.flip(maps, COCO17.mirror) if mirrored else maps
    return F.interpolate(maps, size=network.codec.heatmap_hw, mode="bilinear", align_corners=True)


@pytest.mark.parametrize("name", ["sapiens_tiny", "sapiens2_tiny"])
def test_the_average_is_that_of_all_looks(boxes: Boxes, name: str) -> None:
    networks = [_tiny(name, seed, (128, 96)) for seed in (0, 1)]
    for network in networks:
        network.model.eval()
    scales = (0.5, 1.0, 2.0)
    found = _predict(networks, boxes, replace(CONFIG, flip=True, scales=scales))
    for index in range(NUM):
        several = [
            _looked_at(network, boxes, index, scale, mirrored)
            for network in networks for scale in scales for mirrored in (False, True)
        ]  # fmt: skip
        points_xy, scores = networks[0].codec.decode(torch.stack(several).mean(dim=0))
        matrix = geometry.crop_around_box(boxes.boxes_xywh[index], 1.25, (128, 96)).matrix((128, 96))
        expected = geometry.apply(geometry.invert(matrix), points_xy[0].double().numpy())
        assert np.abs(scores[0].numpy() - found.scores[index]).max() < 1e-5
        assert np.median(np.abs(expected - found.points_xy[index])) < 1e-2


@pytest.mark.parametrize("name", ["sapiens_tiny", "sapiens2_tiny"])
def test_none_is_without_effect(boxes: Boxes, name: str) -> None:
    network, other = _tiny(name, 0), _tiny(name, 1)
    plain = _predict([network], boxes)
    several = {
        "flip": _predict([network], boxes, replace(CONFIG, flip=True)),
        "scales": _predict([network], boxes, replace(CONFIG, scales=(0.5, 1.0))),
        "both": _predict([network], boxes, replace(CONFIG, flip=True, scales=(0.5, 1.0))),
        "ensemble": _predict([network, other], boxes),
    }
    for name, found in several.items():
        assert np.abs(found.scores - plain.scores).max() > 1e-3, name
    assert np.abs(several["both"].scores - several["flip"].scores).max() > 1e-3
    assert np.abs(several["both"].scores - several["scales"].scores).max() > 1e-3
    # A scale of 1 is no augmentation, and neither is a network beside itself.
    for same in (_predict([network], boxes, replace(CONFIG, scales=(1.0,))), _predict([network, network], boxes)):
        assert np.array_equal(same.points_xy, plain.points_xy) and np.array_equal(same.scores, plain.scores)


def _visibility(networks: list[PoseNetwork], boxes: Boxes, config: EvalConfig = CONFIG) -> Array:
    values = _predict(networks, boxes, config).visibility
    assert values is not None
    return values


@pytest.mark.parametrize("name", ["sapiens_tiny", "sapiens2_tiny"])
def test_visibility_is_of_the_plain_crop_whatever_the_views_are(boxes: Boxes, name: str) -> None:
    """Of the person's own row, not of the mirror image or another scale; of two networks it is the mean."""
    first, second = (replace(_tiny(name, seed), visibility=describe) for seed in (0, 1))
    plain, other = (_visibility([network], boxes) for network in (first, second))
    assert plain.shape == (NUM, K, 128 + NUM_SHAPE)
    for index in range(NUM):
        matrix = geometry.crop_around_box(boxes.boxes_xywh[index], 1.25, (64, 48)).matrix((64, 48))
        image = geometry.warp(photo.read_image(boxes.root / boxes.file_names[index]), matrix, (64, 48))
        model = first.model.eval()
        assert isinstance(model, SapiensPose)
        with torch.no_grad(), watch_head(model.head, describe) as passes:
            model(torch.from_numpy(image).permute(2, 0, 1)[None])
        np.testing.assert_allclose(plain[index], passes[0][0].numpy(), rtol=1e-4, atol=1e-4)
    for changes in ({"flip": True}, {"scales": (2.0, 1.0)}, {"flip": True, "scales": (1.5, 1.0, 2.0), "batch_size": 3}):
        found = _visibility([first], boxes, replace(CONFIG, **changes))
        np.testing.assert_allclose(found, plain, rtol=1e-4, atol=1e-4)
    scaled = _visibility([first], boxes, replace(CONFIG, scales=(2.0, 1.5)))
    assert np.abs(scaled - plain).max() > 0.01
    both = _visibility([first, replace(second, visibility=None), second], boxes, replace(CONFIG, flip=True))
    np.testing.assert_allclose(both, (plain + other) / 2, rtol=1e-4, atol=1e-4)
    assert _predict([replace(first, visibility=None)], boxes).visibility is None


def test_scales_of_one_size_are_refused() -> None:
    network = _tiny("sapiens_tiny", 0)
    with pytest.raises(UserError, match=r"--eval\.scales: 1 and 1\.1 are both 64x48 px"):
        predict.list_views([network], (1.0, 1.1))
    assert predict.list_views([network, network], (1.0, 2.0)) == [
        *(ScaledNetwork(network, size) for _ in range(2) for size in ((64, 48), (128, 96)))
    ]  # fmt: skip


def test_more_keypoints_than_a_person_has_joints(boxes: Boxes, truth: Array) -> None:
    rng = np.random.default_rng(0)
    many = boxes.boxes_xywh[:, None, :2] + rng.uniform(0, 1, (NUM, 133, 2)) * boxes.boxes_xywh[:, None, 2:]
    network = _seer(boxes, many)
    config = replace(CONFIG, scales=(1.0, 1.5))
    found = predict.predict([network], boxes, _setup(WHOLEBODY133, config))
    assert np.abs(found.points_xy - many).max() < 0.25
