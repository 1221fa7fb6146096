import math
import random

import numpy as np
import pytest
import torch

from sapiens_accel.config.schema import AugmentConfig
from sapiens_accel.data import augment
from sapiens_accel.data.augment import Augmenter, change_pixels
from sapiens_accel.pose.geometry import Crop, apply, apply_batch, invert, strong_from_weak
from sapiens_accel.pose.skeleton import COCO17

INPUT_HW = (256, 192)
BASE = Crop(center_xy=(300.0, 200.0), size_wh=(150.0, 200.0))
UPPER, LOWER = range(11), range(11, 17)
NUM = 2000


def _augmenter(**changes: float) -> Augmenter:
    return Augmenter(
        config=AugmentConfig(**{name: float(p) for name, p in changes.items()}), skeleton=COCO17, input_hw=INPUT_HW
    )


def _person(labeled: list[int]) -> np.ndarray:
    """Keypoints spread over a body; those without a label lie far away, where they would show."""
    keypoints = np.zeros((17, 3))
    keypoints[:, :2] = np.random.default_rng(9).uniform([250, 100], [350, 300], (17, 2))
    keypoints[:, 2] = np.where(np.isin(np.arange(17), labeled), 2, 0)
    keypoints[keypoints[:, 2] == 0, :2] = -5000.0
    return keypoints


WHOLE = _person(list(range(17)))
TOO_FEW = _person([0, 1, 2, 3, 4, 5, 11, 12])


def _is_share(happened: np.ndarray, p: float) -> bool:
    """Within 4 standard deviations of the probability."""
    return abs(happened.mean() - p) < 4 * math.sqrt(p * (1 - p) / len(happened))


def _scales(crops: list[Crop], base: Crop = BASE) -> np.ndarray:
    ratios = np.array([crop.size_wh for crop in crops]) / base.size_wh
    np.testing.assert_allclose(ratios[:, 0], ratios[:, 1], rtol=1e-12)
    return ratios[:, 0]


def _shifts(crops: list[Crop], base: Crop = BASE) -> np.ndarray:
    return (np.array([crop.center_xy for crop in crops]) - base.center_xy) / base.size_wh


def _spread(values: np.ndarray, limit: float) -> bool:
    """Inside the limits, and close to both of them."""
    return bool(np.abs(values).max() <= limit + 1e-12 and values.max() > 0.93 * limit and values.min() < -0.93 * limit)


def test_the_same_generator_gives_the_same_crops() -> None:
    augmenter = _augmenter()

    def crops(seed: int) -> list[Crop]:
        rng = np.random.default_rng(seed)
        weak = augmenter.weak_crop(BASE, rng)
        return [augmenter.train_crop(BASE, WHOLE, rng), weak, augmenter.strong_crop(weak, rng)]

    assert all(crops(seed) == crops(seed) for seed in range(50))
    assert len({crop for seed in range(50) for crop in crops(seed)}) == 150


# ---- Crops of the supervised stages


def test_train_crops_stay_inside_the_published_ranges_with_the_published_probabilities() -> None:
    rng, augmenter = np.random.default_rng(0), _augmenter()
    crops = [augmenter.train_crop(BASE, TOO_FEW, rng) for _ in range(NUM)]
    degrees, shifts, scales = np.array([crop.degrees for crop in crops]), _shifts(crops), _scales(crops)
    assert _spread(scales - 1, 0.5)
    assert _spread(degrees, 80.0) and _is_share(degrees != 0, 0.6)
    assert _spread(shifts[:, 0], 0.16) and _spread(shifts[:, 1], 0.16)
    assert _is_share((shifts != 0).all(axis=1), 0.3) and _is_share((shifts != 0).any(axis=1), 0.3)
    assert _is_share(np.array([crop.flip for crop in crops]), 0.5)


def test_draws_are_truncated_normal_not_clipped_and_not_uniform() -> None:
    """Standard normal within [-1, 1]: variance 1 - 2 phi(1) / (2 Phi(1) - 1) = 0.291; clipped 0.516, uniform 0.333."""
    rng, augmenter = np.random.default_rng(1), _augmenter()
    t = (_scales([augmenter.train_crop(BASE, TOO_FEW, rng) for _ in range(NUM)]) - 1) / 0.5
    assert t.var() == pytest.approx(0.291, abs=4 * 0.27 / math.sqrt(NUM))
    assert abs(t.mean()) < 4 * 0.54 / math.sqrt(NUM)
    assert len(np.unique(t)) == NUM


def test_other_settings_are_obeyed() -> None:
    rng = np.random.default_rng(2)
    augmenter = _augmenter(scale=0.1, rotation=20.0, rotation_p=0.9, shift=0.3, shift_p=0.8, flip_p=0.1)
    crops = [augmenter.train_crop(BASE, TOO_FEW, rng) for _ in range(NUM)]
    degrees, shifts = np.array([crop.degrees for crop in crops]), _shifts(crops)
    assert _spread(_scales(crops) - 1, 0.1) and _spread(degrees, 20.0) and _spread(shifts[:, 0], 0.3)
    assert _is_share(degrees != 0, 0.9) and _is_share(shifts[:, 0] != 0, 0.8)
    assert _is_share(np.array([crop.flip for crop in crops]), 0.1)


def test_nothing_to_draw_leaves_the_crop() -> None:
    augmenter = _augmenter(scale=0, rotation_p=0, shift_p=0, flip_p=0, half_body_p=0)
    assert augmenter.train_crop(BASE, WHOLE, np.random.default_rng(3)) == BASE


# ---- Half body


def _half_crops(keypoints: np.ndarray, num: int, half_body_p: float = 1.0) -> list[Crop]:
    augmenter = _augmenter(half_body_p=half_body_p, scale=0, rotation_p=0, shift_p=0, flip_p=0)
    rng = np.random.default_rng(4)
    return [augmenter.train_crop(BASE, keypoints, rng) for _ in range(num)]


def _expected_half(keypoints: np.ndarray, members: range) -> Crop:
    """The labeled keypoints' mean, and 1.5 x their extent with the short side grown to 3:4."""
    points_xy = np.array([keypoints[k, :2] for k in members if keypoints[k, 2] > 0])
    width, height = 1.5 * (points_xy.max(axis=0) - points_xy.min(axis=0))
    width, height = max(width, height * 3 / 4), max(height, width * 4 / 3)
    return Crop(center_xy=tuple(points_xy.mean(axis=0)), size_wh=(width, height))


def _is(crop: Crop, expected: Crop) -> bool:
    return bool(np.allclose([*crop.center_xy, *crop.size_wh], [*expected.center_xy, *expected.size_wh], rtol=1e-12))


@pytest.mark.parametrize("labeled", [list(range(17)), [0, 1, 5, 6, 7, 8, 9, 11, 12, 13]])
def test_half_body_is_the_upper_or_lower_keypoints_box(labeled: list[int]) -> None:
    keypoints = _person(labeled)
    upper, lower = _expected_half(keypoints, UPPER), _expected_half(keypoints, LOWER)
    crops = _half_crops(keypoints, 1000)
    is_upper = np.array([_is(crop, upper) for crop in crops])
    assert all(up or _is(crop, lower) for up, crop in zip(is_upper, crops, strict=True))
    assert _is_share(is_upper, 0.7)


def test_half_body_happens_with_its_probability() -> None:
    crops = _half_crops(WHOLE, NUM, half_body_p=0.3)
    assert _is_share(np.array([crop != BASE for crop in crops]), 0.3)


def test_a_half_with_too_few_keypoints_is_never_taken() -> None:
    """Two labeled legs' keypoints are no lower body, one of the head is no upper one; 9 in all are needed."""
    no_legs = _person([*range(8), 11, 12])
    assert all(_is(crop, _expected_half(no_legs, UPPER)) for crop in _half_crops(no_legs, 100))
    assert all(crop == BASE for crop in _half_crops(TOO_FEW, 100))
    assert all(crop == BASE for crop in _half_crops(_person([*range(2), *LOWER]), 100)), "8 labeled"
    nine = _person([*range(3), *LOWER])
    assert all(crop != BASE for crop in _half_crops(nine, 100)), "9 labeled"


# ---- Views of the semi-supervised stage


def test_weak_crops_turn_and_scale_a_little_and_never_shift() -> None:
    rng, augmenter = np.random.default_rng(5), _augmenter()
    crops = [augmenter.weak_crop(BASE, rng) for _ in range(NUM)]
    degrees = np.array([crop.degrees for crop in crops])
    assert _spread(degrees, 20.0) and (degrees != 0).all()
    assert _spread(_scales(crops) - 1, 0.15) and not _shifts(crops).any()
    assert _is_share(np.array([crop.flip for crop in crops]), 0.5)


@pytest.mark.parametrize("flip", [False, True])
def test_strong_crops_go_further_from_the_weak_one(flip: bool) -> None:
    rng, augmenter = np.random.default_rng(6), _augmenter(strong_half_body_p=0)
    weak = Crop(center_xy=(100.0, 120.0), size_wh=(90.0, 120.0), degrees=12.0, flip=flip)
    crops = [augmenter.strong_crop(weak, rng) for _ in range(NUM)]
    degrees, shifts = np.array([crop.degrees for crop in crops]) - 12.0, _shifts(crops, weak)
    assert _spread(degrees, 60.0) and _is_share(degrees != 0, 0.8)
    assert _spread(_scales(crops, weak) - 1, 0.35)
    assert _spread(shifts[:, 0], 0.06) and _spread(shifts[:, 1], 0.06)
    assert _is_share(np.array([crop.flip != flip for crop in crops]), 0.5)


def test_a_mirrored_view_is_turned_as_an_unmirrored_one() -> None:
    """What the same draws do to the image that is seen does not depend on whether it was mirrored before."""
    augmenter = _augmenter(flip_p=0.0)
    for seed in range(20):
        changes = []
        for flip in (False, True):
            weak = Crop(center_xy=(100.0, 120.0), size_wh=(90.0, 120.0), degrees=12.0, flip=flip)
            strong = augmenter.strong_crop(weak, np.random.default_rng(seed))
            moved = strong.matrix(INPUT_HW)[:, :2] @ invert(weak.matrix(INPUT_HW))[:, :2]
            changes.append(moved)
        np.testing.assert_allclose(changes[0], changes[1], atol=1e-9)


STILL = {"strong_rotation": 0, "strong_scale": 0, "strong_shift": 0, "flip_p": 0}


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("degrees", [0.0, 17.0, -140.0])
def test_a_half_of_the_weak_view_fills_the_strong_one(degrees: float, flip: bool) -> None:
    """Seen in the weak view's own frame: one edge stays, the middle 50-60 % of the width, 50-60 % of the height."""
    height, width = INPUT_HW
    augmenter, rng = _augmenter(strong_half_body_p=1, **STILL), np.random.default_rng(13)
    weak = Crop(center_xy=(100.0, 120.0), size_wh=(90.0, 120.0), degrees=degrees, flip=flip)
    corners = np.array([[0.0, 0.0], [width - 1, 0], [width - 1, height - 1], [0, height - 1]])
    is_upper, factors = [], []
    for _ in range(400):
        strong = augmenter.strong_crop(weak, rng)
        assert strong.size_wh[0] / strong.size_wh[1] == pytest.approx(weak.size_wh[0] / weak.size_wh[1], rel=1e-12)
        weak_from_strong = strong_from_weak(*(torch.from_numpy(c.matrix(INPUT_HW))[None] for c in (weak, strong)))[0]
        seen = apply(weak_from_strong.numpy(), corners) / [width - 1, height - 1]
        factor = strong.size_wh[1] / weak.size_wh[1]
        top = 0.0 if strong_is_above(strong, weak) else 1 - factor
        left = (1 - factor) / 2
        expected = [[left, top], [1 - left, top], [1 - left, top + factor], [left, top + factor]]
        np.testing.assert_allclose(seen, expected, atol=1e-9)
        is_upper.append(top == 0.0)
        factors.append(factor)
    assert _is_share(np.array(is_upper), 0.7)
    assert 0.5 <= min(factors) < 0.505 and 0.595 < max(factors) <= 0.6


def strong_is_above(strong: Crop, weak: Crop) -> bool:
    """Whether the strong crop's center is in the upper half of the weak view's image."""
    return bool(apply(weak.matrix(INPUT_HW), np.array(strong.center_xy))[1] < (INPUT_HW[0] - 1) / 2)


def test_half_bodies_come_with_their_probability_and_change_no_other_draw() -> None:
    weak = Crop(center_xy=(100.0, 120.0), size_wh=(90.0, 120.0), degrees=12.0, flip=True)
    views = {p: [_after(_augmenter(strong_half_body_p=p), weak, seed) for seed in range(NUM)] for p in (0, 0.3, 1)}
    ratios = {
        p: np.array([v[0].size_wh[0] / o[0].size_wh[0] for v, o in zip(views[p], views[0], strict=True)]) for p in views
    }
    assert _is_share(ratios[0.3] != 1, 0.3)
    assert ratios[1].min() >= 0.5 - 1e-12 and ratios[1].max() <= 0.6 + 1e-12
    for p in (0.3, 1):
        assert [(v.degrees, v.flip, draw) for v, draw in views[p]] == [
            (v.degrees, v.flip, draw) for v, draw in views[0]
        ]


def _after(augmenter: Augmenter, weak: Crop, seed: int) -> tuple[Crop, float]:
    """The strong crop, and the draw that follows it."""
    rng = np.random.default_rng(seed)
    return augmenter.strong_crop(weak, rng), rng.random()


def test_keypoints_of_the_weak_view_moved_to_the_strong_one_are_its_own() -> None:
    """Labels in the image, to the weak view, by `strong_from_weak`: where the strong view has them itself."""
    augmenter, rng, seen = _augmenter(), np.random.default_rng(14), set()
    for _ in range(300):
        weak = augmenter.weak_crop(BASE, rng)
        strong = augmenter.strong_crop(weak, rng)
        matrices = [torch.from_numpy(crop.matrix(INPUT_HW))[None] for crop in (strong, weak)]
        moved = apply_batch(
            strong_from_weak(*matrices), torch.from_numpy(apply(weak.matrix(INPUT_HW), WHOLE[:, :2]))[None]
        )
        np.testing.assert_allclose(moved[0], apply(strong.matrix(INPUT_HW), WHOLE[:, :2]), atol=1e-8)
        seen.add((weak.flip, strong.flip))
    assert len(seen) == 4


# ---- Pixels


def _image(seed: int = 7) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (64, 48, 3), dtype=np.uint8)


def test_pixel_changes_depend_on_the_generator_alone() -> None:
    """Whatever ran before in the process, with this pipeline or with any other generator."""
    used = _augmenter(blur_p=0.5).pixel_changes()
    for seed in range(10):
        first = change_pixels(_augmenter(blur_p=0.5).pixel_changes(), _image(), np.random.default_rng(seed))
        random.seed(seed + 1)
        np.random.seed(seed + 2)
        change_pixels(used, _image(8), np.random.default_rng(99))
        again = change_pixels(used, _image(), np.random.default_rng(seed))
        assert again.dtype == np.uint8 and again.shape == _image().shape
        np.testing.assert_array_equal(again, first)
    outcomes = {change_pixels(used, _image(), np.random.default_rng(seed)).tobytes() for seed in range(20)}
    assert len(outcomes) > 15


def test_pixel_changes_happen_independently_of_each_other() -> None:
    """One seed for all of them would make the hole come exactly with the new colors, and neither in half of cases."""
    changes = _augmenter(blur_p=0).pixel_changes()
    flat, rng = np.empty((40, 30, 3), np.uint8), np.random.default_rng(12)
    flat[:] = (200, 120, 60)
    pictures = [change_pixels(changes, flat.copy(), rng) for _ in range(NUM)]
    has_hole = np.array([(picture == 0).all(axis=2).any() for picture in pictures])
    colors = np.array([picture.max(axis=(0, 1)) for picture in pictures])
    recolored = (np.sort(colors, axis=1) != (60, 120, 200)).any(axis=1)
    reordered = ~recolored & (colors != (200, 120, 60)).any(axis=1)
    # Brightness and contrast with half the probability, saturation and hue with half: one of them in three of four.
    assert _is_share(has_hole, 0.5) and _is_share(recolored, 0.75)
    assert _is_share(has_hole[recolored], 0.5) and _is_share(has_hole[~recolored], 0.5)
    # The channels' order is drawn with half the probability, and one in six orders is the old one.
    assert _is_share(reordered[~recolored], 0.5 * 5 / 6)
    assert _is_share(has_hole[reordered], 0.5)


def test_colors_are_the_published_changes_one_after_the_other() -> None:
    """All in one pass over the pixels; here each by itself in float, from the same draws."""
    changes = _augmenter(photometric_p=0.5, blur_p=0, coarse_dropout_p=0).pixel_changes()
    seen = set()
    for seed in range(60):
        image = np.random.default_rng(seed).integers(96, 160, (31, 45, 3), dtype=np.uint8)
        rng, expected, happened = np.random.default_rng(seed), image.astype(float), []
        rng.random()  # whether there is a change of colors at all
        if rng.random() < 0.5:
            contrast = rng.uniform(0.5, 1.5)
            expected = contrast * expected + rng.uniform(-32, 32)
            happened.append("contrast")
        if rng.random() < 0.5:
            turns, factor = rng.uniform(-0.1, 0.1), rng.uniform(0.5, 1.5)
            gray = expected @ [0.299, 0.587, 0.114]
            expected = gray[..., None] + factor * (expected - gray[..., None])
            # Where the plane across the axis of greys is the complex one, a turn is a product.
            mean = expected.mean(axis=2)
            thirds = np.exp(2j * np.pi * np.arange(3) / 3)
            turned = (expected @ thirds) * np.exp(2j * np.pi * turns)
            expected = mean[..., None] + 2 / 3 * (turned[..., None] * thirds.conj()).real
            happened.append("hue")
        if rng.random() < 0.5:
            expected = expected[..., rng.permutation(3)]
            happened.append("order")
        found = change_pixels(changes, image.copy(), np.random.default_rng(seed))
        assert np.abs(found - expected.clip(0, 255)).max() < 1.01, (seed, happened)
        seen.add(tuple(happened))
    assert len(seen) == 8


def test_hue_turns_red_to_green_and_leaves_grays_alone() -> None:
    np.testing.assert_allclose(augment._turn(1 / 3) @ [200.0, 0.0, 0.0], [0.0, 200.0, 0.0], atol=1e-9)
    for matrix in (augment._turn(0.07), augment._saturation(0.6), augment._saturation(1.4)):
        np.testing.assert_allclose(matrix @ np.ones(3), np.ones(3), atol=1e-12)
    np.testing.assert_allclose(augment._saturation(0.0) @ [255, 0, 0], [76.245] * 3)


def test_blurs_reach_three_pixels_at_most_and_at_least_one() -> None:
    """Kernels of 3, 5 and 7 px, each as often: what lies farther off than their half changes nothing."""
    for name, change in (("box", augment._box_blur), ("median", augment._median_blur)):
        reaches = []
        for seed in range(300):
            image = np.random.default_rng(0).integers(0, 256, (31, 31, 3), dtype=np.uint8)
            other = image.copy()
            other[:, 15:] = 255 - other[:, 15:]
            one, two = (change(picture, np.random.default_rng(seed)) for picture in (image, other))
            reaches.append(int((one[:, :15] != two[:, :15]).any(axis=(0, 2)).sum()))
        counts = np.bincount(reaches, minlength=4)
        assert len(counts) == 4 and counts[0] == 0, (name, counts)
        assert all(_is_share(np.repeat([1, 0], [n, 300 - n]), 1 / 3) for n in counts[1:]), (name, counts)


def test_no_change_without_probability() -> None:
    none = _augmenter(photometric_p=0, blur_p=0, coarse_dropout_p=0).pixel_changes()
    for seed in range(10):
        np.testing.assert_array_equal(change_pixels(none, _image(), np.random.default_rng(seed)), _image())


def test_coarse_dropout_is_one_black_rectangle_of_20_to_40_percent_of_each_side() -> None:
    only_holes = _augmenter(photometric_p=0, blur_p=0, coarse_dropout_p=1).pixel_changes()
    white, rng, sides, places = np.full((200, 150, 3), 255, np.uint8), np.random.default_rng(10), [], []
    for _ in range(200):
        picture = change_pixels(only_holes, white.copy(), rng)
        black = (picture == 0).all(axis=2)
        assert ((picture == 255).all(axis=2) | black).all()
        rows, columns = np.flatnonzero(black.any(axis=1)), np.flatnonzero(black.any(axis=0))
        sides.append((len(rows) / 200, len(columns) / 150))
        places.append((rows[0], columns[0]))
        assert black[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all(), "no gap"
        assert black.sum() == len(rows) * len(columns), "and nothing else: a single rectangle"
    sides = np.array(sides)
    # Whole pixels: one pixel of 150 is 0.7 %.
    assert sides.min() >= 0.2 - 0.007 and sides.max() <= 0.4 + 0.007
    assert (sides.min(axis=0) < 0.22).all() and (sides.max(axis=0) > 0.38).all()
    assert len(set(places)) > 150


def test_coarse_dropout_happens_with_its_probability() -> None:
    holes = _augmenter(photometric_p=0, blur_p=0, coarse_dropout_p=0.5).pixel_changes()
    white, rng = np.full((40, 30, 3), 255, np.uint8), np.random.default_rng(11)
    assert _is_share(np.array([(change_pixels(holes, white.copy(), rng) == 0).any() for _ in range(400)]), 0.5)
