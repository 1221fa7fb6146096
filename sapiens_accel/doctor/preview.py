"""What the network would see of labeled people: crops as an image, keypoints that they leave out, the codec's error."""

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from numpy import ndarray as Array

from sapiens_accel.config.schema import Config, DataConfig
from sapiens_accel.data import dataset as data
from sapiens_accel.data.augment import Augmenter
from sapiens_accel.data.dataset import Key, Labeled, Sets, TrainingPeople
from sapiens_accel.doctor import labels as label_checks
from sapiens_accel.doctor.labels import PERCENTILES, Finding, Labels
from sapiens_accel.models import sapiens as model
from sapiens_accel.pose import draw, geometry
from sapiens_accel.pose.heatmap import Codec
from sapiens_accel.pose.skeleton import Skeleton
from sapiens_accel.pose.visibility import is_labeled

NUM_CROPS, COLUMNS, CROP_HEIGHT, EDGE = 16, 4, 512, 2
NUM_CROPPED, NUM_ENCODED = 1000, 128
ENCODED_AT_ONCE = 16  # their maps of 256 x 192 are 54 MB
MOST_CODEC_ERROR = 0.5  # input px in the mean
MOST_ENLARGED = 4.0


def check_crops(run: Config, labels: Labels, skeleton: Skeleton) -> list[Finding]:
    """Keypoints lost, resolution, sigma and codec, for the run's crops."""
    config = run.data
    heatmap_hw = model.get_size(run.model.name).heatmap_hw(config.input_hw)
    codec = Codec(input_hw=config.input_hw, heatmap_hw=heatmap_hw, sigma=config.sigma)
    augmenter = Augmenter(config=run.augment, skeleton=skeleton, input_hw=config.input_hw)
    return [
        label_checks.check_lost_by_crop(labels, config.box_padding, config.input_hw),
        check_lost_by_augmentation(labels, augmenter, config, run.seed),
        check_enlargement(labels, config),
        label_checks.check_sigma(config.sigma, heatmap_hw),
        check_codec(labels, codec, config.box_padding),
    ]


def first_stage_people(run: Config, sets: Sets, skeleton: Skeleton) -> TrainingPeople:
    """The people of the run's first stage, as it will learn from them."""
    # Where there are no unlabeled people, the crops of stage ssl's labeled people are those of phase2.
    stage = run.stages[0] if sets.unlabeled or not run.get_stage(run.stages[0]).ratio else "phase2"
    augmenter = Augmenter(config=run.augment, skeleton=skeleton, input_hw=run.data.input_hw)
    return TrainingPeople(sets, augmenter, run.data, run.get_stage(stage), seed=run.seed, stage=stage)


def draw_grid(people: TrainingPeople, skeleton: Skeleton) -> UInt8[Array, "h w 3"]:
    """The first 16 crops of a stage, 4 in a row, each 512 px high, with the keypoints that are learned from them."""
    crops = []
    for number in range(NUM_CROPS):
        step, position = divmod(number, people.global_batch)
        sample = people[Key(step, position, False)]
        assert isinstance(sample, Labeled)
        image, points = sample.view.image.permute(1, 2, 0).numpy(), sample.points_xy.numpy()
        labeled = sample.weights.numpy() > 0
        seen = _inside(points, people.config.input_hw) & labeled
        mirrored = ", mirrored" if sample.view.flipped else ""
        text = f"annotation {int(sample.ann_id)}: {seen.sum()} of {labeled.sum()} keypoints{mirrored}"
        person = draw.draw_person(image, points, sample.weights.numpy(), skeleton)
        titled = draw.add_title(person, text, CROP_HEIGHT)
        crops.append(np.pad(titled, ((EDGE, EDGE), (EDGE, EDGE), (0, 0)), constant_values=128))
    return draw.arrange_grid(crops, columns=COLUMNS)


def check_lost_by_augmentation(labels: Labels, augmenter: Augmenter, config: DataConfig, seed: int) -> Finding:
    """The share of labeled keypoints that training crops leave out, of a sample of people."""
    rng = np.random.default_rng(seed)
    lost = total = 0
    for index in _spread(len(labels), NUM_CROPPED):
        keypoints = labels.keypoints[index]
        base = geometry.crop_around_box(labels.boxes_xywh[index], config.box_padding, config.input_hw)
        crop = augmenter.train_crop(base, keypoints, rng)
        seen = data.transform_keypoints(crop, keypoints, config.input_hw, augmenter.skeleton)
        labeled = is_labeled(seen)
        lost += int((labeled & ~_inside(seen[:, :2], config.input_hw)).sum())
        total += int(labeled.sum())
    share = lost / max(total, 1)
    text = (
        f"{share:.1%} of labeled keypoints lie outside of augmented crops (of half bodies the other half, on purpose)"
    )
    return Finding(level="note", check="augmentation", text=text)


def check_enlargement(labels: Labels, config: DataConfig) -> Finding:
    """How much larger the network sees people than the images show them."""
    height, width = config.input_hw
    sides = labels.boxes_xywh[:, 2:] * config.box_padding
    low, middle, high = np.percentile(np.minimum(width / sides[:, 0], height / sides[:, 1]), PERCENTILES)
    scaling = f"enlarged {middle:.2g} times" if middle >= 1 else f"reduced to {middle:.2g} of their size"
    text = f"to {height} x {width} people are {scaling} in the median ({low:.2g} to {high:.2g})"
    if middle <= MOST_ENLARGED:
        return Finding(level="note", check="resolution", text=text)
    return Finding(level="warning", check="resolution", text=f"{text}; a smaller --data.input_hw would show as much")


def check_codec(labels: Labels, codec: Codec, padding: float) -> Finding:
    """What encoding keypoints as heatmaps and decoding them again loses, in a sample of upright crops."""
    some = labels.at(_spread(len(labels), NUM_ENCODED))
    inside = geometry.in_crop(some.boxes_xywh, some.keypoints, padding, codec.input_hw)
    crops = [geometry.crop_around_box(box, padding, codec.input_hw) for box in some.boxes_xywh]
    points = [
        geometry.apply(crop.matrix(codec.input_hw), keypoints[:, :2])
        for crop, keypoints in zip(crops, some.keypoints, strict=True)
    ]
    of_input = _codec_errors(codec, np.stack(points), inside)
    of_image = of_input * np.array([crop.size_wh[0] / codec.input_hw[1] for crop in crops])[:, None]
    if not inside.any():
        return Finding(level="warning", check="codec", text="no labeled keypoint lies in a crop")
    of_input, of_image = of_input[inside], of_image[inside]
    text = (
        f"to heatmaps and back, keypoints are off by {of_input.mean():.3f} px of the input in the mean and "
        f"{of_input.max():.3f} at most ({of_image.mean():.3f} and {of_image.max():.3f} px of the image; "
        f"{len(of_input)} keypoints)"
    )
    return Finding(level="warning" if of_input.mean() > MOST_CODEC_ERROR else "note", check="codec", text=text)


def _codec_errors(codec: Codec, points: Float[Array, "n k 2"], inside: Bool[Array, "n k"]) -> Float[Array, "n k"]:
    """How far from each point (input px) the decoded one is."""
    points_xy, weights = torch.from_numpy(points).float(), torch.from_numpy(inside).float()
    parts = zip(points_xy.split(ENCODED_AT_ONCE), weights.split(ENCODED_AT_ONCE), strict=True)
    return torch.cat([(codec.decode(codec.encode(p, w)[0])[0] - p).norm(dim=-1) for p, w in parts]).numpy()


def _inside(points_xy: Float[Array, "k 2"], input_hw: tuple[int, int]) -> Bool[Array, "k"]:
    height, width = input_hw
    return np.asarray(((points_xy >= 0) & (points_xy <= (width - 1, height - 1))).all(axis=-1))


def _spread(num: int, at_most: int) -> Int[Array, "n"]:
    """Indices evenly spread over so many people."""
    return np.linspace(0, num - 1, min(at_most, num)).astype(int)
