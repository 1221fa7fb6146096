"""Which training people keep their labels, the pool of people without, and what must never be in it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
from jaxtyping import Int
from numpy import ndarray as Array
from numpy.random import default_rng

from sapiens_accel.config.schema import DataConfig
from sapiens_accel.data import detections
from sapiens_accel.data import people as people_tables
from sapiens_accel.data.people import People, PeopleFiles, boxes_of
from sapiens_accel.errors import UserError
from sapiens_accel.sources.coco import is_detections

SIZE_FACTOR, ASPECT_FACTOR = 1.5, 2.0  # above them the network is shown other people than it learned from
COMPARED = 20_000


class NoUnlabeledPeople(UserError):  # noqa: N818  (a run may do without)
    """Stage ssl has nobody to learn from.

    Attributes:
        reason: what was expected, for a run that can do without.
    """

    def __init__(self, reason: str, left_out: str = "") -> None:
        self.reason = f"no unlabeled people: {reason}"
        fix = "or leave stage ssl out: --stage phase2 (the whole network; --stage phase1 before it: the head)"
        super().__init__(f"stage ssl has {self.reason}; {fix}{left_out}")


def choose_labeled(config: DataConfig, people: People) -> Int[Array, "n"]:
    """Which of the people (indices, ascending) keep their labels: `config.labels` of them, the first or at random.

    "First" is the published rule of Xie et al. 2021 (https://arxiv.org/abs/2011.12498): the people with keypoints of
    each image, images in the order of the JSON's `images`, cut after N people. COCO's annotations are in another
    order. Source: xierc/Semi_Human_Pose, lib/dataset/coco.py.

    Raises:
        UserError: `labels` is no count and no share, or is of nobody or of more people than there are.
    """
    num = _num_labels(config.labels, people)
    if num == len(people):
        return np.arange(num)
    if config.labels_by == "first":
        return np.sort(people_tables.order_by_image(people, config.train_images)[:num])
    return np.sort(default_rng(config.labels_seed).choice(len(people), num, replace=False))


def _num_labels(labels: int | str | None, people: People) -> int:
    if labels is None:
        return len(people)
    text = str(labels).strip()
    try:
        share = float(text[:-1]) / 100 if text.endswith("%") else int(text) / len(people)
    except ValueError:
        raise UserError(f"--data.labels {labels}: expected a count of people like 1000, or a share like 5%") from None
    if not 0 < share <= 1 or not (num := round(share * len(people))):
        raise UserError(
            f"--data.labels {labels}: expected 1 to {len(people)} people, or a share of them up to 100%; there are "
            f"{len(people)} people with keypoints in {people.annotations}"
        )
    return num


def gather_unlabeled(
    root: Path, config: DataConfig, num_keypoints: int, cache: Path, train: People, labeled: Int[Array, "n"]
) -> tuple[People, tuple[str, ...]]:
    """The unlabeled people of a run, and what should be said about them.

    Images without labels, by box where there are boxes; the training people whose labels are withheld; those that
    have no keypoints.

    Args:
        train: all training people with keypoints; `labeled` holds the indices of those that keep them.

    Raises:
        NoUnlabeledPeople: there is nobody.
        UserError: what was asked for is missing or broken.
    """
    sources = [unlabeled_images(root, config, num_keypoints, cache)]
    withheld = np.setdiff1d(np.arange(len(train)), labeled) if len(labeled) < len(train) else labeled[:0]
    if len(withheld):
        min_side = config.unlabelled_min_side
        sources.append(people_tables.withheld_people(train, config.train_images, withheld, min_side, cache))
    if config.unlabelled_train_people:
        min_side = config.unlabelled_min_side
        files = people_tables.files_of(train, config.train_images, cache)
        people = people_tables.unlabeled_people(files, min_side)
        sources.append(replace(people, annotations=train.annotations))
    people_of_parts = [people for people in sources if people]
    left_out = [people.left_out for people in sources if people is not None]
    if not people_of_parts:
        raise NoUnlabeledPeople(
            f"expected images in {root / config.unlabelled_images} (--data.unlabelled_images), or people "
            f"without keypoints and of at least {config.unlabelled_min_side:g} px in "
            f"{root / config.train_annotations}; or withhold labels, such as --data.labels 10%",
            "".join(f"; {one}" for one in left_out if one),
        )
    notes = [*left_out, *(people.box_note for people in people_of_parts)]
    # The other parts have their boxes from the file of the labeled people.
    warnings = [*notes, _warn_of_other_boxes(sources[0], train) if sources[0] else None]
    return people_tables.join_people(people_of_parts), tuple(line for line in warnings if line)


def unlabeled_images(root: Path, config: DataConfig, num_keypoints: int, cache: Path) -> People | None:
    """The people of the folder of images without labels; None where there is no such folder.

    Raises:
        UserError: what was asked for is missing or broken.
    """
    folder, annotations, min_side = config.unlabelled_images, config.unlabelled_annotations, config.unlabelled_min_side
    if not (root / folder).exists() and (annotations or folder != DataConfig.unlabelled_images):
        raise UserError(f"--data.unlabelled_images {root / folder}: no such folder")
    boxes = annotations or f"annotations/person_boxes_{folder}.json"
    if is_detections(root / boxes):
        min_score = config.unlabelled_min_score
        files = PeopleFiles(root, boxes, folder, num_keypoints, cache)
        people = detections.detected_people(files, min_side, min_score)
    elif annotations or (root / boxes).is_file():
        people = people_tables.unlabeled_people(PeopleFiles(root, boxes, folder, num_keypoints, cache), min_side)
    else:
        return people_tables.whole_images(root, folder, num_keypoints, cache) if (root / folder).is_dir() else None
    if annotations and not len(people):
        raise UserError(
            f"{people.annotations}: no unlabeled person in it has a box of at least {min_side:g} px (a detection: and "
            f"category 1 and a score of at least {config.unlabelled_min_score:g}); see --data.unlabelled_min_side"
        )
    return people


def _warn_of_other_boxes(people: People, labeled: People) -> str | None:
    """A line about boxes of another size or shape than the labeled people's; whole images are allowed, so no error."""
    what, advice = _compare_boxes(people, labeled)
    if not what:
        return None
    if people.annotations.is_dir():
        return (
            f"warning: {people.annotations}: unlabeled people are whole images: {what}. Boxes of single people "
            f"(--data.unlabelled_annotations) teach more"
        )
    return f"warning: {people.annotations}: unlabeled boxes are not as the labeled ones: {what}. {advice}"


def _compare_boxes(people: People, labeled: People) -> tuple[str, str]:
    """How the unlabeled boxes differ, in their size or else in their shape, and what to do; empty: they do not."""
    theirs, ours = people_tables.measure_people([people]), people_tables.measure_people([labeled])
    if theirs and ours:
        sides = theirs.share[1] ** 0.5, ours.share[1] ** 0.5
        if max(sides[0] / sides[1], sides[1] / sides[0]) > SIZE_FACTOR:
            what = f"they are {sides[0]:.0%} of their image's side in the median, labeled people {sides[1]:.0%}"
            if sides[0] > sides[1]:
                return what, "Make them as tight as the labeled ones"
            return what, "Make them as large as the labeled ones, or leave small ones out by --data.unlabelled_min_side"
    aspects = [
        float(np.median(boxes[:, 2] / boxes[:, 3]))
        for boxes in (boxes_of(people_tables.spread_rows(of.rows, COMPARED)) for of in (people, labeled))
    ]
    if max(aspects[0] / aspects[1], aspects[1] / aspects[0]) <= ASPECT_FACTOR:
        return "", ""
    what = f"their median width / height is {aspects[0]:.2f}, labeled people's {aspects[1]:.2f}"
    return what, "Make them around whole people, as the labeled ones"
