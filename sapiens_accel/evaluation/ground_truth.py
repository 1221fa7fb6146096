"""What evaluated people are compared with: the annotation file that they came from, read once for all networks."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from sapiens_accel.data import annotation_rules
from sapiens_accel.data.people import People


@dataclass(frozen=True, kw_only=True)
class GroundTruth:
    """The annotations as pycocotools takes them, whatever the file leaves out.

    Attributes:
        dataset: a single category; areas and counts of every annotation. Labeled people who are not among the rows
            (their image does not decode, their box is empty) have no keypoints, and so are ignored as crowds and people
            without keypoints are: no network could have predicted them.
        category_id: of people, in the file.
        unmeasured_ids: of the people with labeled keypoints, no crowds, who are not among the rows.
    """

    dataset: dict[str, Any]
    category_id: Any
    unmeasured_ids: tuple[Any, ...]


# One set of people is evaluated many times: by each network and variant of eval.py, and again and again in a training.
@lru_cache(maxsize=1)
def read_ground_truth(people: People, num_keypoints: int) -> GroundTruth:
    """Read the annotation file of the people; once, as long as it is asked for the same ones."""
    tree, rows = people.source.read(), set(people.rows["ann_id"][:])
    zeros = [0.0] * (3 * num_keypoints)
    categories = people.source.categories if people.reading.categories else ()
    category_ids = annotation_rules.category_ids(categories, people.reading)
    annotations, unmeasured = [], []
    for person in tree["annotations"]:
        if category_ids and person.get("category_id", category_ids[0]) not in category_ids:
            continue
        box, is_crowd = person.get("bbox") or [0, 0, 0, 0], bool(person.get("iscrowd"))
        is_row = person.get("id") in rows
        keypoints = None
        if is_row or not is_crowd:
            keypoints = annotation_rules.keypoint_numbers(person, num_keypoints, people.reading)
        if not is_row and any(v > 0 for v in (keypoints or ())[2::3]):
            unmeasured.append(person.get("id", -1))
        annotations.append(
            {
                "id": len(annotations) + 1,  # pycocotools takes an id of 0 for no match
                "image_id": person["image_id"],
                "category_id": 1,
                "iscrowd": int(is_crowd),
                "area": float(person.get("area", box[2] * box[3])),
                "bbox": box,
                "keypoints": (keypoints if is_row else None) or zeros,
            }
        )
    images = [{"id": image["id"]} for image in tree["images"]]
    return GroundTruth(
        dataset={"info": {}, "images": images, "annotations": annotations, "categories": [{"id": 1, "name": "person"}]},
        category_id=annotation_rules.person_category(people.annotations, people.reading),
        unmeasured_ids=tuple(unmeasured),
    )


@lru_cache(maxsize=1)
def read_images(people: People) -> dict[Any, dict[str, Any]]:
    """The `images` of the annotation file by their ids; the people after them are not parsed, on any rank."""
    return {image["id"]: image for image in people.source.images()}
