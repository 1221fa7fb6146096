"""Users' own transforms of pixels: what is refused, what is recorded, and that images follow from the seed alone."""

import dataclasses
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import albumentations
import numpy as np
import pytest
import torch
import yaml
from numpy.random import default_rng

from sapiens_accel.config import parse as config
from sapiens_accel.config import record
from sapiens_accel.config.schema import AugmentConfig, DataConfig, StageConfig, TeacherConfig
from sapiens_accel.data import augment, build, loader
from sapiens_accel.data.augment import Augmenter, change_pixels
from sapiens_accel.data.dataset import Batch, Sets, TrainingPeople
from sapiens_accel.data.sampling import Share
from sapiens_accel.doctor import preview
from sapiens_accel.errors import UserError
from sapiens_accel.pose.skeleton import COCO17
from sapiens_accel.sources import synthetic

OWN = "[{GaussNoise: {p: 0.7}}, {RandomGamma: {gamma_limit: [40, 180], p: 0.8}}, {CoarseDropout: {p: 0.5}}]"
INPUT_HW = (64, 48)


def _config(listed: str) -> AugmentConfig:
    return config.load(["--augment.albumentations", listed]).augment


def _augmenter(listed: str) -> Augmenter:
    return Augmenter(config=_config(listed), skeleton=COCO17, input_hw=INPUT_HW)


# ---- What is refused, in one line


@pytest.mark.parametrize(
    ("listed", "said"),
    [
        ("[GausNoise]", r"GausNoise: no transform of albumentations 2\.0\.8; did you mean GaussNoise\?"),
        *((f"[{name}]", rf"{name}: no transform of albumentations 2\.0\.8 but a group of them\. List them, ") for
          name in ("Compose", "OneOf", "SomeOf", "Sequential")),
        ("[ToTensorV2]", r"ToTensorV2: makes no image of an image"),
        # Without what they need they leave the image as it is.
        ("[XYMasking]", r"XYMasking: changes no pixel .* Set others of its arguments \(num_masks_x, "),
        ("[ConstrainedCoarseDropout]", r"ConstrainedCoarseDropout: changes no pixel of an image, .* no masks or boxes"),
        ("[{ColorJitter: {brightness: 0, contrast: 0, saturation: 0, hue: 0}}]", r"ColorJitter: changes no pixel"),
        # 2.0.8 only warns, and then takes the defaults.
        ("[{CoarseDropout: {max_holes: 1}}]", r"CoarseDropout: no argument 'max_holes' \(expected num_holes_range"),
        ("[{GaussNoise: {var_limit: [10, 50]}}]", r"GaussNoise: no argument 'var_limit' \(expected std_range"),
        ("[{Blur: {blur_limit: 3, always_apply: true}}]", r"Blur: no argument 'always_apply'"),
        ("[{GaussNoise: {std_range: [0.5, 9]}}]", r"GaussNoise: std_range: .*, found \[0.5, 9\]"),
        ("[{GaussNoise: {p: 1.5}}]", r"GaussNoise: p: .*less than or equal to 1.*, found 1\.5"),
        *((f"[{name}]", rf"{name}: moves pixels, and keypoints would not follow.*--augment\.rotation") for name in
          ("HorizontalFlip", "Rotate", "Affine", "ElasticTransform", "RandomCrop", "Transpose", "RandomScale")),
        ("[{ToFloat: {p: 1}}]", r"ToFloat: makes float32 of 96x72x3 of an image"),
        ("[Normalize]", r"Normalize: makes float32"),
        ("[{FDA: {}}]", r"FDA: "),
        ("[{MaskDropout: {}}]", r"MaskDropout: "),
        ("[{built_in: {photometric_p: 0.9}}]", r"built_in: .*'photometric_p'\. Use --augment\.photometric_p$"),
        ("[{built_in: {nonsense: 3}}]", r"built_in: .*'nonsense'\. Use --augment\.photometric_p, --augment\.blur_p, "),
        ("[{Blur: {blur_limit: [4, 6]}}]", r"Blur: .*Non-zero kernel sizes must be odd"),
        ("[{FrequencyMasking: {freq_mask_param: 0}}]", r"FrequencyMasking: freq_mask_param"),
        ("[{GaussNoise: [0.3]}]", r"entry 1: expected NAME or \{NAME: \{ARGUMENT: VALUE\}\}, found"),
        ("[ToGray, {A: {}, B: {}}]", r"entry 2: expected NAME"),
        ("absent.yaml", r"absent\.yaml: no such file \(expected a YAML file, or a list"),
    ],
)  # fmt: skip
def test_what_would_do_something_else_is_refused(listed: str, said: str) -> None:
    with pytest.raises(UserError, match=f"^--augment.albumentations:? ?{said}") as refusal:
        augment.open_transforms(_config(listed).albumentations or ())
    assert "\n" not in str(refusal.value)


def test_a_file_that_is_no_list_is_refused(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("transform: GaussNoise\n")
    with pytest.raises(
        UserError, match=r"own\.yaml: expected a list of transforms, found keys and values\. Write a line "
    ):
        _config(str(tmp_path / "own.yaml"))


def test_of_all_transforms_those_that_move_pixels_are_refused() -> None:
    """Those that albumentations runs on keypoints as well; but what only lies over an image moves none of them."""
    kinds = {name: kind for name, kind in vars(albumentations).items() if isinstance(kind, type)}
    moving = [name for name, kind in kinds.items() if issubclass(kind, albumentations.DualTransform)]
    over = re.compile("Dropout|Masking|Erasing|^DualTransform$")
    moving = [name for name in moving if not over.search(name)]
    assert len(moving) > 40 and {"Affine", "D4", "GridDistortion", "Mosaic", "Pad"} <= set(moving)
    for name in moving:
        with pytest.raises(UserError, match=f"{name}: moves pixels"):
            augment.open_transforms([{name: {}}])
    taken = [name for name in augment._pixel_transforms() if _is_taken(name)]
    assert {
        "GaussNoise",
        "CLAHE",
        "RandomBrightnessContrast",
        "MotionBlur",
        "CoarseDropout",
        "ToGray",
        "FancyPCA",
    } <= set(taken)
    assert len(taken) > 40 and not set(taken) & set(moving)
    assert {"FrequencyMasking", "TimeMasking"} <= set(taken), "albumentations advises against them, whatever they get"


def _is_taken(name: str) -> bool:
    try:
        return bool(augment.open_transforms([{name: {}}]))
    except UserError:
        return False


# ---- What an image follows from


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[Sets, DataConfig]:
    root = synthetic.write(tmp_path_factory.mktemp("own") / "drawn", num_train=12, num_unlabelled=8, num_val=3)
    data = DataConfig(root=str(root), cache_dir=str(root.parent / "cache"), input_hw=INPUT_HW, unlabelled_min_side=0.0)
    return build.open_people(data, COCO17, unlabeled=True), data


def _people(sets: tuple[Sets, DataConfig], listed: str = OWN, seed: int = 0) -> TrainingPeople:
    plan = StageConfig(global_batch=4, teacher=TeacherConfig(ratio=1))
    return TrainingPeople(sets[0], _augmenter(listed), sets[1], plan, seed=seed, stage="ssl")


def _batches(people: TrainingPeople, workers: int = 0, first: int = 0, micro_batch: int = 4) -> list[Batch]:
    share = Share(rank=0, num_ranks=1, micro_batch=micro_batch, accumulation=4 // micro_batch)
    return list(loader.batches(people, share, range(first, 4), workers, torch.device("cpu")))


def _images(batches: list[Batch]) -> bytes:
    def tensors() -> Iterator[torch.Tensor]:
        for batch in batches:
            assert batch.pair is not None
            yield from (batch.labeled.view.image, batch.pair.weak.image, batch.pair.strong.image)

    return b"".join(tensor.numpy().tobytes() for tensor in tensors())


def test_images_follow_from_seed_step_and_person(sets: tuple[Sets, DataConfig]) -> None:
    whole = _batches(_people(sets))
    assert _images(_batches(_people(sets), workers=2)) == _images(whole)
    # A run that is resumed, with transforms that have drawn something else before.
    used = _people(sets)
    _batches(used)
    assert _images(_batches(used, first=2)) == _images(whole[2:])
    assert _images(_batches(pickle.loads(pickle.dumps(used)))) == _images(whole)
    np.random.seed(5)
    assert _images(_batches(_people(sets))) == _images(whole)
    assert _images(_batches(_people(sets, seed=1))) != _images(whole)
    halves = _batches(_people(sets), micro_batch=2)
    labeled = torch.cat([half.labeled.view.image for half in halves[:2]])
    assert torch.equal(labeled, whole[0].labeled.view.image)


def test_the_teachers_view_keeps_its_pixels(sets: tuple[Sets, DataConfig]) -> None:
    own, built_in = _batches(_people(sets)), _batches(_people(sets, "[built_in]"))
    for one, other in zip(own, built_in, strict=True):
        assert one.pair is not None and other.pair is not None
        assert torch.equal(one.pair.weak.image, other.pair.weak.image)
        assert not torch.equal(one.pair.strong.image, other.pair.strong.image)
        assert torch.equal(one.labeled.points_xy, other.labeled.points_xy)


def test_the_built_in_changes_are_the_default_and_stay_what_they_were() -> None:
    often: dict[str, Any] = {"photometric_p": 0.5, "blur_p": 0.5, "coarse_dropout_p": 0.5}
    plain = Augmenter(config=AugmentConfig(**often), skeleton=COCO17, input_hw=INPUT_HW)
    own = [_augmenter(listed) for listed in ("[built_in]", f"[built_in, {OWN[1:]}")]
    own = [dataclasses.replace(one, config=dataclasses.replace(one.config, **often)) for one in own]
    image = default_rng(1).integers(0, 256, (*INPUT_HW, 3), dtype=np.uint8)
    none, named, first = (one.pixel_changes() for one in (plain, *own))
    assert len(none) == len(named) == 4 and len(first) == 7
    for seed in range(20):
        expected = change_pixels(none, image.copy(), default_rng(seed))
        assert np.array_equal(change_pixels(named, image.copy(), default_rng(seed)), expected)
        assert np.array_equal(change_pixels(first[:4], image.copy(), default_rng(seed)), expected)
    assert config.load([]).augment.albumentations is None
    assert _augmenter("[]").pixel_changes() == (), "no change at all"


def test_transforms_happen_with_their_probability() -> None:
    changes = _augmenter("[{InvertImg: {p: 0.3}}]").pixel_changes()
    image = np.full((*INPUT_HW, 3), 200, np.uint8)
    happened = np.mean(
        [change_pixels(changes, image.copy(), default_rng(seed))[0, 0, 0] != 200 for seed in range(2000)]
    )
    assert abs(happened - 0.3) < 4 * np.sqrt(0.3 * 0.7 / 2000)


# ---- What is recorded and shown


def test_a_run_records_the_list_and_not_the_file(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(yaml.safe_load(OWN)))
    run = config.load(["--augment.albumentations", str(tmp_path / "own.yaml"), "--output_dir", str(tmp_path / "run")])
    assert run.augment == _config(OWN)
    config.save(run, tmp_path / "config.yaml")
    written = yaml.safe_load((tmp_path / "config.yaml").read_text())["augment"]["albumentations"]
    assert written == yaml.safe_load(OWN)
    (tmp_path / "own.yaml").unlink()
    assert config.load([], base=tmp_path / "config.yaml") == dataclasses.replace(run, recipe=run.recipe)
    differences = record.find_differences(record.read_record(tmp_path / "config.yaml") or {}, config.load([]))
    assert [one.key for one in differences if one.key.startswith("augment")] == ["augment.albumentations"]


def test_a_recipe_may_have_them(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(f"augment: {{albumentations: {OWN}}}\n")
    assert config.load(["--recipe", str(tmp_path / "recipe.yaml")]).augment.albumentations == tuple(yaml.safe_load(OWN))


def test_the_doctors_preview_shows_them(sets: tuple[Sets, DataConfig]) -> None:
    grids = [preview.draw_grid(_people(sets, listed), COCO17).astype(int) for listed in ("[]", "[{InvertImg: {p: 1}}]")]
    crop = np.s_[150:400, 100:300]
    assert np.corrcoef(grids[0][crop].ravel(), grids[1][crop].ravel())[0, 1] < -0.5


def test_the_first_lines_of_a_run_say_so() -> None:
    (line,) = augment.describe_transforms(_config(OWN))
    assert line.startswith(
        "changes of pixels: GaussNoise, RandomGamma, CoarseDropout (albumentations 2.0.8), in place of"
    )
    (line,) = augment.describe_transforms(_config("[built_in, ToGray]"))
    assert "built_in, ToGray" in line and "in place of" not in line
    assert augment.describe_transforms(AugmentConfig()) == []
