"""The image table: one row an image, with the annotations in it as a list of structs; COCO's names and units.

A COCO annotation is `PERSON`: id, place (its index in the JSON), category_id, iscrowd, area (px^2), bbox (x, y, width,
height) and keypoints (x, y, v, ...) in px of the image.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute

pc: Any = pyarrow.compute  # its functions are made at run time
COLUMNS = ("image_id", "file_name", "width", "height", "people")
FARTHEST = 1e7  # px: more than any image has, and its square is still a number in float32
# COCO-WholeBody's 133 keypoints in five lists, as its JSON has them.
WHOLE_BODY = {"keypoints": 17, "foot_kpts": 6, "face_kpts": 68, "lefthand_kpts": 21, "righthand_kpts": 21}
# One annotation as it stands in a row's list of people; `place` is its place in the whole JSON.
PERSON = pa.struct(
    [
        *((name, pa.int64()) for name in ("id", "place", "category_id")),
        ("iscrowd", pa.int8()),
        ("area", pa.float64()),
        *((name, pa.list_(pa.float64())) for name in ("bbox", *WHOLE_BODY)),
    ]
)


class Fault(NamedTuple):
    """What is wrong with one image or annotation of a file, or why it is left out; `check` is the kind of fault."""

    check: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Which annotations of a JSON count, and which of their keypoints are the run's; see `category.reading`.

    Attributes:
        categories: the names of those that count; empty: person where there is one, else all.
        count: keypoints of an annotation.
        source: for each of the run's keypoints its place in an annotation, -1 for one that is not there (v=0); None:
            they are the run's own, in its order.
    """

    categories: tuple[str, ...] = ()
    count: int | None = None
    source: tuple[int, ...] | None = None


PLAIN = Reading()


def person(annotation: dict[str, Any], place: int | None) -> dict[str, Any]:
    """A COCO annotation as PERSON; what it does not say is None.

    Raises:
        ValueError: an id that is no whole number.
    """
    told = {key: annotation.get(key) for key in ("id", "category_id")}
    for key, value in told.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise ValueError(f"expected a whole number as {key!r}, found {value!r}")
    area, lists = annotation.get("area"), {name: annotation.get(name) for name in ("bbox", *WHOLE_BODY)}
    numbers = {name: [float(number) for number in value] if value else None for name, value in lists.items()}
    crowd, size = int(bool(annotation.get("iscrowd"))), None if area is None else float(area)
    return {**told, "place": place, "iscrowd": crowd, "area": size, **numbers}


def count(table: pa.Table) -> int:
    if "people" not in table.column_names:
        return 0
    return int(pc.sum(pc.list_value_length(table.column("people"))).as_py() or 0)
