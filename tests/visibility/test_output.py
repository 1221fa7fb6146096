"""The second output by itself: descriptions, regressions, calibration, its measures and its file."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from sapiens_accel.errors import UserError
from sapiens_accel.visibility import output, quality, regression
from sapiens_accel.visibility.output import VisibilityOutput
from sapiens_accel.visibility.regression import DescribedPeople


def test_a_description_is_what_plain_loops_give() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 5, 4, 3, generator=generator)
    heatmaps = torch.randn(2, 6, 16, 12, generator=generator)
    heatmaps[1, 2] = -1.0  # nowhere above 0
    described = output.describe(features, heatmaps)
    assert described.shape == (2, 6, 5 + output.NUM_SHAPE)
    for person in range(2):
        for k in range(6):
            cells = heatmaps[person, k].clamp_min(0).reshape(4, 4, 3, 4).mean(dim=(1, 3)) ** 2
            weights = cells / (cells.sum() + 1e-12)
            pooled = sum(weights[r, c] * features[person, :, r, c] for r in range(4) for c in range(3))
            x = sum(weights[r, c] * (c - 1.0) for r in range(4) for c in range(3))
            y = sum(weights[r, c] * (2 * r / 3 - 1) for r in range(4) for c in range(3))
            xx = sum(weights[r, c] * (c - 1.0) ** 2 for r in range(4) for c in range(3))
            yy = sum(weights[r, c] * (2 * r / 3 - 1) ** 2 for r in range(4) for c in range(3))
            peaks = heatmaps[person].amax(dim=(1, 2))
            shape = [
                peaks[k],
                peaks[k].clamp_min(0.01).log(),
                peaks.mean(),
                x,
                y,
                x * x + y * y,
                xx + yy - x * x - y * y,
            ]
            expected = torch.cat([torch.as_tensor(pooled), torch.tensor([float(value) for value in shape])])
            torch.testing.assert_close(described[person, k], expected, rtol=1e-5, atol=1e-6)


def test_half_precision_changes_descriptions_by_its_rounding_alone() -> None:
    generator = torch.Generator().manual_seed(1)
    features, heatmaps = torch.randn(2, 5, 4, 3, generator=generator), torch.rand(2, 6, 16, 12, generator=generator)
    features, heatmaps = features.bfloat16(), heatmaps.bfloat16()
    described = output.describe(features, heatmaps)
    assert described.dtype == torch.float32
    torch.testing.assert_close(described, output.describe(features.float(), heatmaps.float()), rtol=0, atol=0)


def test_huge_numbers_are_cut_to_what_half_precision_holds() -> None:
    """People's descriptions are gathered in fp16, where they would be infinite, and the regressions not a number."""
    described = output.describe(torch.full((1, 5, 4, 3), -1e6), torch.full((1, 6, 16, 12), 1e6))
    assert described.half().isfinite().all()
    assert (described[0, 0, 0], described[0, 0, 5]) == (-65504, 65504)


def _planted(num: int, seed: int, num_keypoints: int = 3) -> tuple[DescribedPeople, Tensor]:
    """People whose labels are drawn from known regressions, and the probabilities of these."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num, num_keypoints, 4 + output.NUM_SHAPE, generator=generator) * 3 + 1
    weight = torch.tensor([[1.0, -0.5, 0.0, 0.3], [0.0, 0.8, -0.4, 0.0]])
    weight = weight[:, None] + 0.2 * torch.randn(2, num_keypoints, 4, generator=torch.Generator().manual_seed(7))
    weight = torch.nn.functional.pad(weight, (0, output.NUM_SHAPE))
    truth = VisibilityOutput(
        ["a", "b", "c"][:num_keypoints], weight, torch.tensor([[1.0], [0.5]]).repeat(1, num_keypoints)
    )
    probabilities = truth.judge(x)
    present = torch.rand(num, num_keypoints, generator=generator) < probabilities[..., 0]
    given = probabilities[..., 1] / probabilities[..., 0]
    visible = present & (torch.rand(num, num_keypoints, generator=generator) < given)
    return DescribedPeople(x, np.zeros((num, num_keypoints)), present, visible), probabilities


def test_planted_probabilities_are_found() -> None:
    """Of people that were not fitted, with labels of as many others; and the fit is where its loss is least."""
    people, _ = _planted(6000, seed=0)
    others, probabilities = _planted(4000, seed=1)
    fitted = regression.learn(people, others, ["a", "b", "c"])
    judged = fitted.judge(others.descriptions)
    assert (judged - probabilities).abs().mean() < 0.02
    assert (judged[..., 1] <= judged[..., 0]).all()
    assert fitted.about["people"] == 6000
    for name, ece in (("present", 0.02), ("visible", 0.02)):
        assert fitted.about["quality"][name]["output"]["ECE"] < ece


def test_a_fit_is_the_minimum_of_its_loss() -> None:
    """Its gradient, written out for one kind of keypoint: there, weights of its own and of all share one ridge."""
    people, _ = _planted(500, seed=2, num_keypoints=1)
    ridge = 0.05
    weight, bias = regression.fit_output(people, ridge)
    x = people.descriptions[:, 0].double()
    scale = x.std(dim=0, correction=0)
    for index, (target, counted) in enumerate(
        ((people.present, torch.ones_like(people.present)), (people.visible, people.present))
    ):
        error = (x @ weight[index, 0].double() + bias[index, 0]).sigmoid() - target[:, 0].double()
        error = error * counted[:, 0] / counted.sum()
        centered = (x - x.mean(dim=0)) / scale
        gradient = centered.T @ error + ridge / 2 * weight[index, 0].double() * scale
        assert gradient.abs().max() < 1e-4
        assert abs(error.sum()) < 1e-4


def test_a_keypoint_that_is_always_there_is_probable_and_not_certain() -> None:
    people, _ = _planted(200, seed=3)
    everywhere = people._replace(present=torch.ones_like(people.present), visible=torch.ones_like(people.visible))
    judged = regression.learn(everywhere, everywhere, ["a", "b", "c"]).judge(people.descriptions)
    assert (judged > 0.98).all()
    assert torch.isfinite(judged).all()
    nowhere = people._replace(present=torch.zeros_like(people.present), visible=torch.zeros_like(people.visible))
    judged = regression.learn(nowhere, nowhere, ["a", "b", "c"]).judge(people.descriptions)
    assert (judged < 0.02).all()
    assert torch.isfinite(judged).all()


def test_calibration_makes_the_mean_probability_the_share() -> None:
    """Of the people that it is calibrated on, whatever the regressions' level and slope were."""
    people, _ = _planted(3000, seed=4)
    weight, bias = regression.fit_output(people, 0.01)
    weight, bias = regression.calibrate_best([(3 * weight, bias - 4)], people)
    judged = VisibilityOutput(["a", "b", "c"], weight, bias).judge(people.descriptions)
    assert float(judged[..., 0].mean()) == pytest.approx(float(people.present.float().mean()), abs=1e-3)
    assert float(judged[..., 1].mean()) == pytest.approx(float(people.visible.float().mean()), abs=1e-2)


def test_the_peak_alone_is_chosen_where_nothing_else_carries_over() -> None:
    """Of people whose other numbers mean the opposite."""
    people, _ = _planted(2000, seed=5)
    people.descriptions[..., -output.NUM_SHAPE] += people.present * 3.0
    others, _ = _planted(2000, seed=6)
    others.descriptions[..., :4] *= -1
    others.descriptions[..., -output.NUM_SHAPE] += others.present * 3.0
    weight = regression.learn(people, others, ["a", "b", "c"]).weight[0]
    is_peak = torch.arange(weight.shape[-1]) == 4
    assert (weight[:, is_peak] > 0).all()
    assert not weight[:, ~is_peak].any()
    weight = regression.learn(people, people, ["a", "b", "c"]).weight[0]
    assert weight[:, ~is_peak].any()


def test_average_precision_is_that_of_a_plain_loop() -> None:
    rng = np.random.default_rng(0)
    scores, positive = rng.integers(0, 20, 200) / 20, rng.random(200) < 0.3
    expected, before = 0.0, 0
    for threshold in sorted(set(scores.tolist()), reverse=True):
        above = scores >= threshold
        found = int((positive & above).sum())
        expected += (found - before) / positive.sum() * found / above.sum()
        before = found
    assert quality.average_precision(scores, positive) == pytest.approx(expected, abs=1e-12)
    assert quality.average_precision(np.array([0.1, 0.9, 0.8]), np.array([True, False, True])) == pytest.approx(7 / 12)
    assert math.isnan(quality.average_precision(scores, np.zeros(200, bool)))


def test_measures_are_of_the_right_columns() -> None:
    labels = {"present": np.array([[True, True], [True, False]]), "visible": np.array([[True, False], [False, False]])}
    sure = np.stack([labels["present"], labels["visible"]], axis=-1).astype(np.float32)
    measured = quality.measure_output(sure, np.full((2, 2), 0.5), labels)
    assert measured["present"]["output"] == {"AP": 1.0, "AP_of_others": 1.0, "ECE": 0.0}
    assert measured["visible"]["peak"] == {"AP": 0.25, "AP_of_others": 0.75, "ECE": 0.25}
    assert measured["visible"]["share"] == 0.25
    assert quality.format_quality(measured).splitlines()[3].split() == ["visible", "25.0", "100.0", "100.0", "0.0"]


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    torch.manual_seed(0)
    written = VisibilityOutput(["a", "b", "c"], torch.randn(2, 3, 4), torch.randn(2, 3), {"people": 5})
    assert output.read(tmp_path) is None
    output.save(tmp_path, written)
    whole, some = output.read(tmp_path), output.read(tmp_path, ["c", "a"])
    assert whole is not None
    assert some is not None
    assert (whole.names, whole.about) == (("a", "b", "c"), {"people": 5})
    assert torch.equal(whole.weight, written.weight)
    x = torch.randn(6, 3, 4)
    assert torch.equal(some.judge(x[:, [2, 0]]), written.judge(x)[:, [2, 0]])
    assert (tmp_path / output.FILE).stat().st_mode & 0o044
    with pytest.raises(UserError, match=r"lacks the keypoint 'd' \(found 3 of other names\)\. Remove it"):
        output.read(tmp_path, ["a", "d"])
    (tmp_path / output.FILE).write_bytes((tmp_path / output.FILE).read_bytes()[:-8])
    with pytest.raises(UserError, match=r"not the visibility output of weights .*Remove it") as caught:
        output.read(tmp_path)
    assert "\n" not in str(caught.value)
    output.save(tmp_path, None)
    assert not list(tmp_path.iterdir())


def test_the_output_of_weights_that_could_not_be_replaced_stays(tmp_path: Path) -> None:
    """A full disk while others are written; and it is removed once they are, also where what follows them fails."""
    model, file = tmp_path / output.WEIGHTS, tmp_path / output.FILE
    model.write_bytes(b"a" * 100_000)
    output.save(tmp_path, VisibilityOutput(["a"], torch.ones(2, 1, 4), torch.ones(2, 1)))
    with pytest.raises(OSError, match="full"), output.replacing_weights(tmp_path):
        assert not file.exists()
        raise OSError("full")
    assert output.read(tmp_path) is not None
    with pytest.raises(OSError, match="full"), output.replacing_weights(tmp_path):
        model.write_bytes(b"b" * 100_000)
        raise OSError("full")
    assert [path.name for path in tmp_path.iterdir()] == [output.WEIGHTS]
    with output.replacing_weights(tmp_path / "new"):
        pass


def test_a_file_of_other_weights_is_refused(tmp_path: Path) -> None:
    """One changed byte, in a file that the pieces of the fingerprint cover."""
    model = tmp_path / output.WEIGHTS
    model.write_bytes(bytes(100_000))
    output.save(tmp_path, VisibilityOutput(["a"], torch.ones(2, 1, 4), torch.ones(2, 1)))
    assert output.read(tmp_path) is not None
    model.write_bytes(bytes(50_000) + b"x" + bytes(49_999))
    with pytest.raises(UserError, match=r"beside it \(expected size and checksum 100000-\w+, found 100000-\w+\)\. "):
        output.read(tmp_path)
