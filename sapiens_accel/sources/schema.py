"""What a source of annotated images is, and its image table: one row an image, with a list of its annotations.

A COCO annotation is `PERSON`: id, place (its index in the JSON), category_id, iscrowd, area (px^2), bbox (x, y, width,
height) and keypoints (x, y, v, ...) in px of the image.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import pyarrow as pa
import pyarrow.compute

from sapiens_accel.pose.person_boxes import BOX_MARGIN, BoxRule

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
    """Which annotations of a JSON count, and which of their keypoints are the run's; see `keypoint_mapping`.

    Attributes:
        categories: the names of those that count; empty: person where there is one, else all.
        count: keypoints of an annotation.
        source: for each of the run's keypoints its place in an annotation, -1 for one that is not there (v=0); None:
            they are the run's own, in its order.
        threshold: v is a score, from which on a keypoint has a label; None: v is COCO's.
        boxes: where people's boxes are from; see `person_boxes.choose_boxes`.
        box_margin: of boxes from keypoints, on each side, as a share of that side of the keypoints' own box.
        clips_boxes: whether boxes end at the border of the image, where its size is known.
    """

    categories: tuple[str, ...] = ()
    count: int | None = None
    source: tuple[int, ...] | None = None
    threshold: float | None = None
    boxes: BoxRule = "annotation"
    box_margin: float = BOX_MARGIN
    clips_boxes: bool = False


PLAIN = Reading()


class Span(NamedTuple):
    """Images that lie one after another in one file (its number)."""

    first: int
    num: int
    file: int


class Source(Protocol):
    """One split of annotated images: a COCO JSON (`coco.CocoFile`), also of drawn people, or shards
    (`shards.ShardedSource`) from a folder, an address or the Hub. `discover.open_source` tells which.

    Attributes:
        file: what messages name.
        max_looked_at: of more people the check `auto` looks at some of the images.
    """

    @property
    def file(self) -> Path: ...

    @property
    def max_looked_at(self) -> int: ...

    @property
    def digest(self) -> str:
        """Changes with the content; caches are named by it."""
        ...

    @property
    def categories(self) -> list[dict[str, Any]]:
        """COCO's, as far as they are objects."""
        ...

    def images(self) -> list[dict[str, Any]]:
        """COCO's `images`, of a file that `read` has accepted, without the annotations where that is quicker."""
        ...

    def read(self, collect: list[Fault] | None = None) -> dict[str, Any]:
        """COCO's three lists: images and categories checked, annotations not, in the order of the file.

        Args:
            collect: gets every fault of images and categories, which are then left out; None: the first one is raised.
        """
        ...

    def some_annotations(self) -> Sequence[Any]:
        """Enough annotations, not checked, to see what keypoints each category has."""
        ...

    def tables(self, columns: Sequence[str]) -> Iterator[pa.Table] | None:
        """The image table, some thousand images at a time: these of its COLUMNS that there are. None where values are
        kept without types, as in JSON: then annotations are checked one by one."""
        ...

    def groups(self) -> list[Span]:
        """What is read together while streaming, in order; empty: this source cannot be streamed."""
        ...

    def read_group(self, first: int, count: int, columns: Sequence[str] | None = None) -> pa.Table:
        """One of `groups`: these COLUMNS of the image table, or all that the file has."""
        ...


def annotation_to_person(annotation: dict[str, Any], position: int | None) -> dict[str, Any]:
    """A COCO annotation as PERSON; what it does not say is None.

    Raises:
        ValueError: an id that is no whole number.
    """
    ids = {key: annotation.get(key) for key in ("id", "category_id")}
    for key, value in ids.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise ValueError(f"expected a whole number as {key!r}, found {value!r}")
    area, lists = annotation.get("area"), {name: annotation.get(name) for name in ("bbox", *WHOLE_BODY)}
    numbers = {name: [float(number) for number in value] if value else None for name, value in lists.items()}
    is_crowd, size = int(bool(annotation.get("iscrowd"))), None if area is None else float(area)
    return {**ids, "place": position, "iscrowd": is_crowd, "area": size, **numbers}


def person_to_annotation(person: dict[str, Any], index: int) -> dict[str, Any]:
    """A PERSON as a COCO annotation: what it does not say is left out, but the id, which is then the index."""
    lists = ("bbox", *WHOLE_BODY)
    present = {key: value for key, value in person.items() if value is not None and not (key in lists and not value)}
    return {"id": index, **present}


def count_people(table: pa.Table) -> int:
    if "people" not in table.column_names:
        return 0
    return int(pc.sum(pc.list_value_length(table.column("people"))).as_py() or 0)
