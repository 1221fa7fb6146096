"""What evaluated people are compared with: the annotation file that they came from, read once for all networks."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from sapiens_accel.data import annotation_rules
from sapiens_accel.data import people as people_tables
from sapiens_accel.data.people import People
from sapiens_accel.pose.oks import AREA_OF_BOX
from sapiens_accel.sources.coco import given_id


@dataclass(frozen=True, kw_only=True)
class GroundTruth:
    """The annotations as pycocotools takes them, whatever the file leaves out.

    Attributes:
        dataset: a single category; areas and counts of every annotation. Labeled people who are not among the rows
            (their image does not decode, their box is empty) have no keypoints, and so are ignored as crowds and people
            without keypoints are: no network could have predicted them. The `category` of an annotation is one of
            `categories`.
        categories: those that are evaluated, by their id: the id as the file has it, and the name.
        category_of: the category of each of the rows, by the id of its annotation.
        given_ids: of annotations whose id is a text, by the number that it stands for.
        unmeasured_ids: of the people with labeled keypoints, no crowds, who are not among the rows.
        num_without_area: of the people who are, those without `area`, which is then a share of their box.
    """

    dataset: dict[str, Any]
    categories: Mapping[Any, tuple[Any, str]]
    category_of: Mapping[Any, Any]
    given_ids: Mapping[Any, Any]
    unmeasured_ids: tuple[Any, ...]
    num_without_area: int = 0


def _measure_rows(people: People) -> dict[Any, dict[str, Any]]:
    """Each person's area, area of its box and box by the annotation's id; `data.boxes` says how they are made."""
    rows = people.rows
    columns = (rows["ann_id"][:], rows["area"][:], rows["box_area"][:], people_tables.boxes_of(rows).tolist())
    names = ("area", "box_area", "bbox")
    return {ann_id: dict(zip(names, values, strict=True)) for ann_id, *values in zip(*columns, strict=True)}


# One set of people is evaluated many times: by each network and variant of eval.py, and again and again in a training.
@lru_cache(maxsize=1)
def read_ground_truth(people: People, num_keypoints: int) -> GroundTruth:
    """Read the annotation file of the people; once, as long as it is asked for the same ones."""
    tree, rows = people.source.read(), _measure_rows(people)
    zeros = [0.0] * (3 * num_keypoints)
    categories = evaluated_categories(people)
    first = next(iter(categories))
    only = list(categories) if annotation_rules.category_ids(people.source.categories, people.reading) else None
    annotations, unmeasured, category_of, num_without_area = [], [], {}, 0
    for person in tree["annotations"]:
        category = annotation_rules.category_of(person, first)
        category = category if isinstance(category, int | float | str) else first
        if only and category not in only:
            continue
        box, is_crowd = list(person.get("bbox") or [0.0] * 4), bool(person.get("iscrowd"))
        is_row, area = person.get("id") in rows, person.get("area")
        keypoints = None
        if is_row or not is_crowd:
            keypoints = annotation_rules.keypoint_numbers(person, num_keypoints, people.reading)
        if not is_row and any(v > 0 for v in (keypoints or ())[2::3]):
            unmeasured.append(given_id(person))
        if is_row:
            category_of[person["id"]] = category
            num_without_area += area is None
            # Rows hold the same numbers; NaN is there only where there is no label.
            keypoints = [0.0 if number != number else number for number in keypoints or ()]
        annotations.append(
            {
                "id": len(annotations) + 1,  # pycocotools takes an id of 0 for no match
                "image_id": person["image_id"],
                "category_id": 1,
                "category": category,
                "iscrowd": int(is_crowd),
                **(rows[person["id"]] if is_row else _measure_other(box, area)),
                "keypoints": (keypoints if is_row else None) or zeros,
            }
        )
    images = [{key: image[key] for key in ("id", "crowdIndex") if key in image} for image in tree["images"]]
    return GroundTruth(
        dataset={"info": {}, "images": images, "annotations": annotations, "categories": [{"id": 1, "name": "person"}]},
        categories=categories,
        category_of=category_of,
        given_ids={person["id"]: person["given_id"] for person in tree["annotations"] if "given_id" in person},
        unmeasured_ids=tuple(unmeasured),
        num_without_area=num_without_area,
    )


def _measure_other(box: list[float], area: float | None) -> dict[str, Any]:
    """The same of an annotation that is not among the rows."""
    box_area = float(box[2] * box[3])
    return {"area": AREA_OF_BOX * box_area if area is None else float(area), "box_area": box_area, "bbox": box}


def evaluated_categories(people: People) -> dict[Any, tuple[Any, str]]:
    """The categories whose annotations count, by their id: the id as the file has it, and the name.

    Where none is named as the people are, all of them count; without any there is 1, person.
    """
    listed = [one for one in people.source.categories if isinstance(one.get("id"), int | float | str | None)]
    counted = annotation_rules.category_ids(listed, people.reading) or [one.get("id") for one in listed]
    categories = {one.get("id"): (given_id(one), str(one.get("name"))) for one in listed if one.get("id") in counted}
    return categories or {1: (1, "person")}


@lru_cache(maxsize=1)
def read_images(people: People) -> dict[Any, dict[str, Any]]:
    """The `images` of the annotation file by their ids; the people after them are not parsed, on any rank."""
    return {image["id"]: image for image in people.source.images()}
