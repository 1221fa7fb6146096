"""The rules of annotations: which of them a run learns from, and what is wrong with the others.

Each rule stands here twice: for one annotation of a JSON, whose values may be of any type, and for columns, which are
read at a million people a second. `tests/data/test_annotation_rules.py` proves both equal. The rules of single
annotations either raise at the first fault, or collect every fault for the doctor.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute
from jaxtyping import Bool, Float, Int
from numpy import ndarray as Array

from sapiens_accel.errors import UserError
from sapiens_accel.pose import person_boxes, visibility
from sapiens_accel.pose.oks import AREA_OF_BOX
from sapiens_accel.pose.person_boxes import ANNOTATED, FROM_KEYPOINTS, NO_BOX, PeopleBoxes
from sapiens_accel.pose.visibility import is_labeled
from sapiens_accel.sources.coco import BROKEN, NO_ANNOTATION, given_id, image_names, number_of_id, reason, show_value
from sapiens_accel.sources.discover import open_source
from sapiens_accel.sources.schema import COLUMNS, FARTHEST, PLAIN, WHOLE_BODY, Fault, Reading, Source, count_people, pc

NUMBERS = {int, float, bool}
NUM_WHOLE_BODY = sum(WHOLE_BODY.values())
UNKNOWN_WH = (float("nan"), float("nan"))
UNKNOWN_SIZE = "its box is the whole image, of which the file says no width and height; add them to 'images'"
# Why annotations are left out; a category is followed by its id.
CROWD, NO_SIZE, NO_LABEL, CATEGORY = "crowd", "no size", "no label", "category "


@dataclass(frozen=True, kw_only=True)
class PeopleColumns:
    """n people, no crowds, each with a box, in the order of their images.

    Attributes:
        box_origins: where the box of each is from, see `person_boxes`.
        size_wh: of each person's image; not a number where it is not known.
        position: which annotation of the whole file it was.
        left_out: how many annotations were not taken, by cause (see `describe_left_out`).
        labeled: whether a keypoint has a label.
        box_area: px^2 of the annotated box, else of the one made from keypoints, whatever `box_xywh` is.
    """

    file_name: pa.Array
    image_id: Int[Array, "n"]
    ann_id: Int[Array, "n"]
    box_xywh: Float[Array, "n 4"]
    area: Float[Array, "n"]
    box_area: Float[Array, "n"]
    keypoints: Float[Array, "n k 3"]
    position: Int[Array, "n"]
    box_origins: Int[Array, "n"]
    size_wh: Float[Array, "n 2"]
    left_out: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of_rows(cls, rows: Sequence[dict[str, Any]], num_keypoints: int) -> "PeopleColumns":
        """Rows of `people`."""
        num = len(rows)
        return cls(
            file_name=pa.array([row["file_name"] for row in rows], pa.string()),
            image_id=np.array([row["image_id"] for row in rows], np.int64),
            ann_id=np.array([row["ann_id"] for row in rows], np.int64),
            box_xywh=np.array([row["box_xywh"] for row in rows], np.float64).reshape(num, 4),
            area=np.array([row["area"] for row in rows], np.float64),
            box_area=np.array([row["box_area"] for row in rows], np.float64),
            keypoints=np.array([row["keypoints"] for row in rows], np.float64).reshape(num, num_keypoints, 3),
            position=np.arange(num),
            box_origins=np.array([row.get("box_origin", ANNOTATED) for row in rows], np.int64),
            size_wh=np.array([row.get("size_wh", UNKNOWN_WH) for row in rows], np.float64).reshape(num, 2),
        )

    def __len__(self) -> int:
        return len(self.image_id)

    @property
    def labeled(self) -> Bool[Array, "n"]:
        return np.asarray(is_labeled(self.keypoints).any(axis=-1))

    def row(self, index: int) -> dict[str, Any]:
        """As a row of `people`."""
        names = ("image_id", "ann_id", "box_xywh", "area", "box_area", "keypoints")
        values = {name: getattr(self, name)[index].tolist() for name in names}
        size_wh = np.nan_to_num(self.size_wh[index]).tolist()
        return {"file_name": self.file_name[index].as_py(), **values, "size_wh": size_wh}

    def table(self, schema: pa.Schema) -> pa.Table:
        """As a table of the schema of `people`."""
        num_keypoints = self.keypoints.shape[1]
        triples = _to_lists(_to_lists(pa.array(self.keypoints.reshape(-1)), 3), num_keypoints)
        columns = {
            "file_name": self.file_name,
            "image_id": pa.array(self.image_id),
            "ann_id": pa.array(self.ann_id),
            "box_xywh": pa.FixedSizeListArray.from_arrays(pa.array(self.box_xywh.reshape(-1)), 4),
            "area": pa.array(self.area),
            "box_area": pa.array(self.box_area),
            "size_wh": pa.FixedSizeListArray.from_arrays(pa.array(np.nan_to_num(self.size_wh).reshape(-1)), 2),
            "keypoints": pa.ExtensionArray.from_storage(schema.field("keypoints").type, triples),
        }
        return pa.Table.from_arrays([columns[name].cast(schema.field(name).type) if name != "keypoints" else
                                     columns[name] for name in schema.names], schema=schema)  # fmt: skip


def _to_lists(values: pa.Array, length: int) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array(np.arange(0, len(values) + 1, length, dtype=np.int32)), values)


def category_ids(categories: Sequence[dict[str, Any]], reading: Reading) -> list[Any]:
    """The ids of the categories that count; empty: all annotations do."""
    names = reading.categories or ("person",)
    return [category.get("id") for category in categories if category.get("name") in names]


def person_category(annotations: Path, reading: Reading = PLAIN) -> Any:
    """The category_id of people in a file: that of the name, else the first one; 1 where it does not say."""
    categories = open_source(annotations).categories
    return next(iter(category_ids(categories, reading) or [category.get("id") for category in categories]), 1)


@dataclass(frozen=True, kw_only=True)
class PeopleReader:
    """Reads the people of a source.

    An annotation is taken if it is of a category that counts, no crowd, and has a box with a width and a height or a
    labeled keypoint, from which its box is then made (`person_boxes.choose_boxes`). It must then have: a box of four
    numbers or none, an image, as many keypoints as the reading says or none, an area from 0 up, no number above
    FARTHEST, and as v of a keypoint one that says something (see `visibility`; in COCO-WholeBody's five lists anything
    does, and so it does where the reading has a threshold). x and y that are both NaN are those of a
    keypoint without label, as DeepLabCut and SLEAP write them: 0.

    Attributes:
        prefix: what the names of its images begin with.
        reading: None (for `rows` alone): it is not known how its keypoints become the run's; another number of them is
            then no fault of each annotation.
    """

    source: Source
    prefix: str
    num_keypoints: int
    reading: Reading | None = PLAIN

    @property
    def known_reading(self) -> Reading:
        return self.reading or PLAIN

    @property
    def num_in_file(self) -> int:
        """Keypoints of an annotation."""
        return self.known_reading.count or self.num_keypoints

    def chunks(self, *, needs_keypoints: bool) -> Iterator[PeopleColumns]:
        """The people, in columns.

        Of shards in which nobody is annotated, each image is one unlabeled person whose box is the image.

        Args:
            needs_keypoints: whether a JSON without any keypoints is refused.

        Raises:
            UserError: the annotation against the rules.
        """
        if (tables := self.source.tables(COLUMNS)) is None:
            yield self._columns_of_rows(needs_keypoints=needs_keypoints)
            return
        self.refuse_without_boxes()
        is_annotated = any(count_people(table) for table in self.source.tables(("people",)) or ())
        num_images = num_people = 0
        for table in tables:
            first = num_images, num_people
            yield self.columns(table, *first) if is_annotated else self.whole_images(table, num_images)
            num_images, num_people = num_images + table.num_rows, num_people + count_people(table)

    def refuse_without_boxes(self, tree: dict[str, Any] | None = None) -> None:
        """
        Args:
            tree: what `source.read` gave.

        Raises:
            UserError: boxes are to be the annotated ones, and no annotation has any; or the whole images, and a JSON
                says the size of none.
        """
        if self.known_reading.boxes == "image" and self.source.tables(("people",)) is None:
            images = (tree or self.source.read())["images"]
            if images and not any(size_of(one) != UNKNOWN_WH for one in images):
                raise UserError(
                    f"{self.source.file}: none of its {len(images)} images has a 'width' and a 'height' (px), which "
                    f"--data.boxes image needs. Add them, or make boxes from the keypoints, --data.boxes keypoints"
                )
        if self.known_reading.boxes == "annotation" and (num := self._count_without_boxes(tree)):
            raise UserError(
                f"{self.source.file}: none of its {num} annotations has a box ('bbox'). Make boxes from the keypoints, "
                f"--data.boxes keypoints, or take whole images, --data.boxes image"
            )

    def _count_without_boxes(self, tree: dict[str, Any] | None) -> int:
        """How many annotations there are, if none of them has a `bbox`; else 0."""
        if (tables := self.source.tables(("people",))) is None:
            annotations = [one for one in (tree or self.source.read())["annotations"] if isinstance(one, dict)]
            return 0 if any(one.get("bbox") for one in annotations) else len(annotations)
        num = 0
        for table in tables:
            if _has_boxes(table):
                return 0
            num += count_people(table)
        return num

    @cached_property
    def typical_wh(self) -> Float[Array, "2"]:
        """The median width and height of the boxes of people with labeled keypoints: annotated, or of keypoints that
        extend in both directions; not a number where nobody has one. One pass over the source, if it is asked for."""
        tables = self.source.tables(("people",))
        if tables is None:
            sides = [self._measure_rows(self.source.read([]))]
        else:
            sides = [self._measure_columns(table) for table in tables]
        measured = np.concatenate([np.zeros((0, 2)), *sides])
        return np.median(measured, axis=0) if len(measured) else np.full(2, np.nan)

    def _measure(self, boxes: Float[Array, "n 4"], keypoints: Float[Array, "n k 3"]) -> Float[Array, "m 2"]:
        """The sides of those who have both."""
        reading, unknown = self.known_reading, np.full((len(boxes), 2), np.nan)
        rule = (reading.boxes if reading.boxes == "keypoints" else "annotation", reading.box_margin)
        chosen = person_boxes.choose_boxes(
            boxes, keypoints[..., :2], is_labeled(keypoints), unknown, rule, lambda: np.full(2, np.nan)
        )
        is_measured = is_labeled(keypoints).any(axis=1) & (chosen.origins <= FROM_KEYPOINTS)
        return chosen.boxes_xywh[is_measured, 2:]

    def _choose_boxes(
        self, boxes: Float[Array, "n 4"], keypoints: Float[Array, "n k 3"], size_wh: Float[Array, "n 2"]
    ) -> PeopleBoxes:
        reading = self.known_reading
        rule = (reading.boxes, reading.box_margin)
        chosen = person_boxes.choose_boxes(
            boxes, keypoints[..., :2], is_labeled(keypoints), size_wh, rule, lambda: self.typical_wh
        )
        if not reading.clips_boxes:
            return chosen
        return replace(chosen, boxes_xywh=person_boxes.clip_boxes(chosen.boxes_xywh, size_wh))

    # ---- One annotation of a JSON

    def _columns_of_rows(self, *, needs_keypoints: bool) -> PeopleColumns:
        tree = self.source.read()
        annotations = tree["annotations"]  # that there is none at all is for who needs somebody
        if needs_keypoints and annotations and not any("keypoints" in annotation for annotation in annotations):
            raise UserError(f"{self.source.file}: no annotation has 'keypoints'; expected a COCO person_keypoints file")
        self.refuse_without_boxes()
        left_out: list[Fault] = []
        rows = list(self.rows(left_out=left_out))
        columns = PeopleColumns.of_rows(rows, self.num_keypoints)
        return replace(columns, left_out=Counter(fault.check for fault in left_out))

    def rows(
        self,
        collect: list[Fault] | None = None,
        tree: dict[str, Any] | None = None,
        left_out: list[Fault] | None = None,
    ) -> Iterator[dict[str, Any]]:
        """The people, one by one, as rows of `people`, and where the box of each is from (`box_origin`).

        Args:
            collect: gets every fault; None: the first one is raised.
            tree: what `source.read` gave.
            left_out: gets every annotation that is left out, and why.

        Raises:
            UserError: the first annotation against the rules.
        """
        tree = tree or self.source.read()
        images = _ImageList(image_names(tree, self.source.file), {one["id"]: size_of(one) for one in tree["images"]})
        ids = category_ids(tree.get("categories") or (), self.known_reading)
        for index, annotation in enumerate(tree["annotations"]):
            try:
                if not isinstance(annotation, dict):
                    raise ValueError(NO_ANNOTATION)
                if ids and (category := category_of(annotation, ids[0])) not in ids:
                    row, check = None, f"{CATEGORY}{show_value(annotation.get('given_category_id', category))}"
                else:
                    is_other = self.reading is None and _is_other_number(annotation, self.num_keypoints)
                    row = self._row(annotation | {"keypoints": []} if is_other else annotation, images)
                    check = CROWD if annotation.get("iscrowd") else NO_SIZE
            except BROKEN as error:
                text = f"{_name_of(annotation, index)}: {reason(error)}"
                if collect is None:
                    raise UserError(f"{self.source.file}: {text}") from None
                collect.append(Fault("annotations", text))
                continue
            if row is None:
                if left_out is not None:
                    left_out.append(Fault(check, _name_of(annotation, index)))
                continue
            if collect is not None:
                collect += _wrong_count(annotation, index, self.known_reading)
                is_made = self.known_reading.boxes == "annotation" and row["box_origin"] != ANNOTATED
                collect += [Fault("made_boxes", _name_of(annotation, index))] * is_made
            yield row

    def _row(self, annotation: dict[str, Any], images: "_ImageList") -> dict[str, Any] | None:
        """The row of one COCO annotation; None for a crowd, or without a box and a keypoint to make one from.

        Raises:
            one of BROKEN: it is against the rules.
        """
        if annotation.get("iscrowd", 0) not in (0, 1, None):
            raise ValueError(f"expected 'iscrowd' of 0 or 1, found {show_value(annotation['iscrowd'])}")
        if annotation.get("iscrowd"):
            return None
        box, points = _box_if_any(annotation), self._points(annotation)
        size_wh = images.sizes_wh.get(annotation.get("image_id"), UNKNOWN_WH)
        chosen = self._choose_boxes(box[None], points[None], np.array([size_wh]))
        if chosen.origins[0] == NO_BOX:
            return None
        if annotation.get("image_id") not in images.names:
            image = show_value(annotation.get("given_image_id", annotation.get("image_id")))
            raise ValueError(f"its image {image} is not among 'images'")
        if not np.isfinite(chosen.boxes_xywh).all():
            raise ValueError(UNKNOWN_SIZE)
        from_box = AREA_OF_BOX * float(chosen.areas[0])
        area = from_box if annotation.get("area") is None else annotation["area"]
        if type(area) not in (int, float) or not 0 <= area <= FARTHEST**2:
            raise ValueError(f"expected 'area' of a number from 0 up, found {show_value(area)}")
        return {
            "file_name": f"{self.prefix}/{images.names[annotation['image_id']]}",
            "image_id": id_of(annotation["image_id"]),
            "ann_id": id_of(annotation["id"]),
            "given_id": given_id(annotation),
            "box_xywh": chosen.boxes_xywh[0].tolist(),
            "area": float(area if area or (box[2:] > 0).all() else from_box),
            "box_area": float(chosen.areas[0]),
            "keypoints": points,
            "box_origin": int(chosen.origins[0]),
            "size_wh": size_wh,
        }

    def _points(self, annotation: dict[str, Any]) -> Float[Array, "k 3"]:
        """The run's keypoints of an annotation; zeros where it has none."""
        numbers = keypoint_numbers(annotation, self.num_keypoints, self.known_reading)
        points = _numbers([0] * 3 * self.num_keypoints if numbers in (None, []) else numbers, "keypoints")
        if points.shape != (3 * self.num_keypoints,):
            raise ValueError(_describe_count(points.size, self.num_keypoints))
        points = clear_unlabeled(points.reshape(-1, 3))
        if not (finite := np.isfinite(points).all(axis=1)).all():
            index = int(np.argmin(finite))
            raise ValueError(
                f"expected {points.size} finite numbers in 'keypoints', found NaN or infinity in keypoint {index + 1}, "
                f"{points[index].tolist()}; write 0, 0, 0 for a keypoint without label"
            )
        if np.abs(points).max() > FARTHEST:
            raise ValueError(f"expected pixels of an image, found numbers above {FARTHEST:g}")
        v = points[:, 2]
        if (odd := visibility.is_odd(v)).any() and not self._is_in_lists(annotation):
            raise ValueError(visibility.describe_odd(v[odd][0]))
        return points

    def _measure_rows(self, tree: dict[str, Any]) -> Float[Array, "m 2"]:
        """As `_measure`; an annotation against the rules is passed over here, and named where it is read."""
        ids = category_ids(tree.get("categories") or (), self.known_reading)
        boxes, points = [np.zeros((0, 4))], [np.zeros((0, self.num_keypoints, 3))]
        for annotation in tree["annotations"]:
            try:
                if not annotation.get("iscrowd") and (not ids or category_of(annotation, ids[0]) in ids):
                    box, keypoints = _box_if_any(annotation), self._points(annotation)
                    boxes.append(box[None])
                    points.append(keypoints[None])
            except BROKEN:
                continue
        return self._measure(np.concatenate(boxes), np.concatenate(points))

    def _is_in_lists(self, annotation: dict[str, Any]) -> bool:
        return self.num_in_file == NUM_WHOLE_BODY and all(key in annotation for key in WHOLE_BODY)

    # ---- The same rules for columns

    def columns(self, table: pa.Table, first_image: int, first_person: int) -> PeopleColumns:
        """The people of some images.

        Args:
            first_image, first_person: how many images and people of the source lie before them.

        Raises:
            UserError: the annotation against the rules.
        """
        table = table.combine_chunks()
        lists = _column(table, "people")
        image = np.repeat(np.arange(table.num_rows), _lengths(lists))
        check = self._check_columns(lists.flatten(), first_person)
        people, numbers = check.people, first_person + np.arange(len(check.people))
        boxes, _ = check.vectors("bbox", 4)
        sides = boxes[:, 2:]
        is_near = (np.abs(boxes) <= FARTHEST).all(axis=1) & ((sides <= 0) | (sides >= 1 / FARTHEST)).all(axis=1)
        check.expect(
            np.asarray(is_near), boxes, f"pixels of an image in 'bbox' (sides of {1 / FARTHEST:g} to {FARTHEST:g})"
        )
        points, size_wh = self._keypoints(check), _sizes_of(table)[image]
        made = self._choose_boxes(boxes, points, size_wh)
        check.keep(made.origins != NO_BOX, NO_SIZE)
        if (odd := check.taken & ~np.isfinite(made.boxes_xywh).all(axis=1)).any():
            raise check.error(odd, UNKNOWN_SIZE)
        area = _field(people, "area", AREA_OF_BOX * made.areas)
        check.expect((area >= 0) & (area <= FARTHEST**2), area, "'area' of a number from 0 up")
        area = np.where((area == 0) & ~(sides > 0).all(axis=1), AREA_OF_BOX * made.areas, area)
        chosen = np.flatnonzero(check.taken)
        return PeopleColumns(
            file_name=_names(table, self.prefix, first_image).take(pa.array(image[chosen])),
            image_id=_image_ids(table, first_image)[image[chosen]],
            ann_id=check.ann_id[chosen],
            box_xywh=made.boxes_xywh[chosen],
            area=area[chosen],
            box_area=made.areas[chosen],
            keypoints=points[chosen],
            position=_field(people, "place", numbers)[chosen],
            box_origins=made.origins[chosen],
            size_wh=size_wh[chosen],
            left_out=check.left_out,
        )

    def _check_columns(self, people: pa.StructArray, first_person: int) -> "_ColumnCheck":
        """The annotations that are of categories that count, and no crowds."""
        check = _ColumnCheck(people, _field(people, "id", first_person + np.arange(len(people))), self.source.file)
        if ids := category_ids(self.source.categories, self.known_reading):
            category = _field(people, "category_id", np.full(len(people), ids[0]))
            check.keep(np.isin(category, np.array(ids)), CATEGORY, category)
        crowd = _field(people, "iscrowd", np.zeros(len(people), np.int64))
        check.expect((crowd == 0) | (crowd == 1), crowd, "'iscrowd' of 0 or 1")
        check.keep(crowd == 0, CROWD)
        return check

    def _measure_columns(self, table: pa.Table) -> Float[Array, "m 2"]:
        """As `_measure_rows`, but here a fault is raised as where the annotation is read."""
        if not count_people(table):
            return np.zeros((0, 2))
        check = self._check_columns(_column(table.combine_chunks(), "people").flatten(), 0)
        boxes, points = check.vectors("bbox", 4)[0], self._keypoints(check)
        return self._measure(boxes[check.taken], points[check.taken])

    def _keypoints(self, check: "_ColumnCheck") -> Float[Array, "n k 3"]:
        """The run's keypoints of all that there are; zeros for who has none, and for those that are not there."""
        count, source = self.num_in_file, self.known_reading.source
        in_lists = np.zeros(len(check.ann_id), bool)
        if count == NUM_WHOLE_BODY:
            in_lists = np.all([check.lengths(name) > 0 for name in WHOLE_BODY], axis=0)
        points, _ = check.vectors("keypoints", 3 * count, ~in_lists)
        if in_lists.any():
            parts = [check.vectors(name, 3 * number, in_lists)[0] for name, number in WHOLE_BODY.items()]
            points = np.where(in_lists[:, None], np.concatenate(parts, axis=1), points)
        points = points.reshape(-1, count, 3)
        if self.known_reading.threshold is not None:
            points = visibility.apply_threshold(points, self.known_reading.threshold)
        points = clear_unlabeled(points)
        if source is not None:
            points = np.where((np.array(source) >= 0)[:, None], points[:, list(source)], 0.0)
        is_near = np.asarray((np.abs(points) <= FARTHEST).all(axis=(1, 2)))
        check.expect(is_near, points, f"numbers of at most {FARTHEST:g} in 'keypoints'")
        is_odd = visibility.is_odd(points[..., 2]) & ~in_lists[:, None]
        if (odd := check.taken & is_odd.any(axis=1)).any():
            raise check.error(odd, visibility.describe_odd(points[odd][0, is_odd[odd][0], 2][0]))
        return points

    def whole_images(self, table: pa.Table, first_image: int) -> PeopleColumns:
        """Each of some images as one unlabeled person."""
        table = table.combine_chunks()
        if not {"width", "height"} <= set(table.column_names):
            raise UserError(f"{self.source.file}: images without people in them need columns 'width' and 'height' (px)")
        sizes = np.stack([_fill(_column(table, name), 0) for name in ("width", "height")], axis=1).astype(np.float64)
        numbers = first_image + np.arange(table.num_rows)
        return PeopleColumns(
            file_name=_names(table, self.prefix, first_image),
            image_id=_image_ids(table, first_image),
            ann_id=numbers,
            box_xywh=np.concatenate([np.zeros_like(sizes), sizes], axis=1),
            area=sizes.prod(axis=1),
            box_area=sizes.prod(axis=1),
            keypoints=np.zeros((table.num_rows, self.num_keypoints, 3)),
            position=numbers,
            box_origins=np.full(table.num_rows, ANNOTATED),
            size_wh=sizes,
        )


class _ImageList(NamedTuple):
    """A JSON's images by their ids: names, and sizes as far as they are known."""

    names: dict[Any, str]
    sizes_wh: dict[Any, tuple[float, float]]


class _ColumnCheck:
    """Annotations as columns, and which of them are still taken: of the others nothing is asked."""

    def __init__(self, people: pa.StructArray, ann_id: Int[Array, "n"], file: Path) -> None:
        self.people, self.ann_id, self.file = people, ann_id, file
        self.taken = np.ones(len(people), bool)
        self.left_out: Counter[str] = Counter()

    def keep(self, kept: Bool[Array, "n"], cause: str, values: Array | None = None) -> None:
        """Leave out the others, for a cause, to which each one's value is added."""
        gone = self.taken & ~kept
        if values is None:
            self.left_out[cause] += int(gone.sum())
        else:
            self.left_out.update(f"{cause}{value}" for value in values[gone].tolist())
        self.taken &= kept

    def error(self, odd: Bool[Array, "n"], text: str) -> UserError:
        return UserError(f"{self.file}: annotation {self.ann_id[odd][0]}: {text}")

    def expect(self, is_fine: Bool[Array, "n"], values: Array, expected: str) -> None:
        if (odd := self.taken & ~is_fine).any():
            raise self.error(odd, f"expected {expected}, found {str(values[odd][0].tolist())[:60]}")

    def lengths(self, name: str) -> Int[Array, "n"]:
        """Of each person's list of this name."""
        has_field = self.people.type.get_field_index(name) >= 0
        return _lengths(self.people.field(name)) if has_field else np.zeros(len(self.people), np.int64)

    def vectors(
        self, name: str, length: int, asked: Bool[Array, "n"] | None = None
    ) -> tuple[Float[Array, "n length"], Bool[Array, "n"]]:
        """A list of `length` numbers for each person who is taken, and who has one; zeros for the others.

        Args:
            asked: whose lists these are; None: everybody's.
        """
        lengths = self.lengths(name)
        odd = self.taken & (lengths != 0) & (lengths != length) & (True if asked is None else asked)
        if odd.any():
            raise self.error(odd, f"expected {length} numbers in '{name}', found {lengths[odd][0]}")
        values, has = np.zeros((len(lengths), length)), lengths == length
        if has.any():
            flat = _variable_lists(self.people.field(name)).flatten().to_numpy(zero_copy_only=False)
            values[has] = np.asarray(flat, dtype=np.float64)[np.repeat(has, lengths)].reshape(-1, length)
        return values, has


def _column(table: pa.Table, name: str) -> pa.Array:
    column = table.column(name)
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    return array.chunk(0) if isinstance(array, pa.ChunkedArray) else array


def _variable_lists(column: pa.Array) -> pa.Array:
    is_fixed = pa.types.is_fixed_size_list(column.type)
    return column.cast(pa.list_(column.type.value_type)) if is_fixed else column


def _lengths(column: pa.Array) -> Int[Array, "n"]:
    return _fill(pc.list_value_length(_variable_lists(column)), 0).astype(np.int64)


def _fill(array: pa.Array, default: int) -> Array:
    return pc.fill_null(array, default).to_numpy(zero_copy_only=False)


def _has_boxes(table: pa.Table) -> bool:
    """Whether any annotation of a table has a list as its `bbox`."""
    if not count_people(table):
        return False
    people = _column(table, "people").flatten()
    return people.type.get_field_index("bbox") >= 0 and bool(_lengths(people.field("bbox")).any())


def _sizes_of(table: pa.Table) -> Float[Array, "images 2"]:
    """Each image's width and height; not a number where they are not known."""
    names = [name for name in ("width", "height") if name in table.column_names]
    if len(names) < 2:
        return np.full((table.num_rows, 2), np.nan)
    sizes = np.stack([_fill(_column(table, name), 0) for name in names], axis=1).astype(np.float64)
    return np.where(((sizes > 0) & (sizes <= FARTHEST)).all(axis=1, keepdims=True), sizes, np.nan)


def _field(people: pa.StructArray, name: str, default: Array) -> Array:
    return _fill_from(people.field(name), default) if people.type.get_field_index(name) >= 0 else default


def _fill_from(array: pa.Array, default: Array) -> Array:
    """Values, and the default where there are none."""
    values = _fill(array, 0).astype(default.dtype)
    return np.where(pc.is_null(array).to_numpy(zero_copy_only=False), default, values)


def _image_ids(table: pa.Table, first: int) -> Int[Array, "n"]:
    numbers = first + np.arange(table.num_rows)
    return _fill_from(_column(table, "image_id"), numbers) if "image_id" in table.column_names else numbers


def _names(table: pa.Table, prefix: str, first: int) -> pa.Array:
    numbers = pa.array(np.arange(first, first + table.num_rows)).cast(pa.string())
    has_names = "file_name" in table.column_names
    names = pc.coalesce(_column(table, "file_name").cast(pa.string()), numbers) if has_names else numbers
    return pc.binary_join_element_wise(prefix, numbers, names, "/")


# ---- What is left out


def describe_left_out(counts: Mapping[str, int], source: Source, reading: Reading) -> str:
    """How many annotations are not learned from, by cause, in the order in which they are left out."""
    ids = category_ids(source.categories, reading)
    names = {str(one.get("id")): one.get("name") for one in source.categories}
    given = {str(one.get("id")): show_value(given_id(one)) for one in source.categories}
    names |= {given[one]: name for one, name in names.items()}
    kinds = [cause.removeprefix(CATEGORY) for cause in counts if cause.startswith(CATEGORY)]
    others = sum(counts[f"{CATEGORY}{kind}"] for kind in kinds)
    shown = ", ".join(_describe_kind(given.get(kind, kind), names) for kind in sorted(kinds)[:4])
    wanted = "expected " + ", ".join(_describe_kind(given[str(one)], names) for one in ids[:4])
    if None in ids:
        wanted = f"category {names.get('None')!r} has no id: give it one, that of its annotations"
    label = "v > 0"
    if reading.threshold is not None:
        label = f"v from --data.visibility_threshold {reading.threshold:g} up"
    texts = {
        f"of other categories (category_id {shown}; {wanted})": others,
        "crowds": counts.get(CROWD, 0),
        "without a box of a width and a height, or a labeled keypoint": counts.get(NO_SIZE, 0),
        f"without a labeled keypoint ({label})": counts.get(NO_LABEL, 0),
    }
    return ", ".join(f"{count} {text}" for text, count in texts.items() if count)


def _describe_kind(kind: str, names: Mapping[str, Any]) -> str:
    """A category_id as it is written, and the name of its category; or that it is itself the name of one."""
    if (name := names.get(kind)) is not None:
        return f"{kind} {name}"
    own = next((one for one, name in names.items() if kind == show_value(name)), None)
    return kind if own is None else f"{kind} is a category's name: write its id, {own}"


# ---- Values of one annotation


def clear_unlabeled(keypoints: Float[Array, "*n 3"]) -> Float[Array, "*n 3"]:
    """Keypoints of which x and y are NaN, and v is 0 or NaN as well, as 0, 0, 0: they have no label."""
    gone = np.isnan(keypoints[..., :2]).all(axis=-1) & ~is_labeled(keypoints)
    return np.where(gone[..., None], 0.0, keypoints) if gone.any() else keypoints


def labeled_points(annotation: dict[str, Any]) -> Float[Array, "k 2"]:
    """x and y (image px) of the labeled keypoints of an annotation; none where its list is none."""
    numbers = annotation.get("keypoints")
    if not isinstance(numbers, list) or len(numbers) % 3 or not set(map(type, numbers)) <= NUMBERS:
        return np.zeros((0, 2))
    # An integer of a JSON may be too large for a float.
    points = np.array([number if abs(number) <= FARTHEST else math.inf for number in numbers]).reshape(-1, 3)
    is_good = is_labeled(points) & np.isfinite(points).all(axis=1)
    return points[is_good, :2]


def category_of(annotation: dict[str, Any], default: Any) -> Any:
    """Its `category_id`; the default where there is none, or null."""
    category = annotation.get("category_id")
    return default if category is None else category


def size_of(image: dict[str, Any]) -> tuple[float, float]:
    """An image's width and height; not a number where the file does not say both."""
    width: Any
    height: Any
    width, height = (image.get(name) for name in ("width", "height"))
    if not {type(width), type(height)} <= {int, float} or not 0 < min(width, height) <= max(width, height) <= FARTHEST:
        return UNKNOWN_WH
    return float(width), float(height)


def _box_if_any(annotation: dict[str, Any]) -> Float[Array, "4"]:
    """Its `bbox`; zeros where it has none."""
    return np.zeros(4) if annotation.get("bbox") in (None, []) else box_of(annotation)


def _describe_count(number: int, num_keypoints: int) -> str:
    text = f"expected {3 * num_keypoints} numbers in 'keypoints' (x, y, v of {num_keypoints}), found {number}"
    if number == 2 * num_keypoints:
        return f"{text}: x and y without v? Write a 2 after each pair, or 0 where there is no label"
    return text + (f": {number // 3} keypoints" if number % 3 == 0 else "")


def _name_of(annotation: Any, index: int) -> str:
    is_object = isinstance(annotation, dict)
    return f"annotation {show_value(given_id(annotation))}" if is_object else f"entry {index}, {show_value(annotation)}"


def _is_other_number(annotation: dict[str, Any], num_keypoints: int) -> bool:
    numbers = annotation.get("keypoints")
    return isinstance(numbers, list) and len(numbers) % 3 == 0 and len(numbers) != 3 * num_keypoints


def _wrong_count(annotation: dict[str, Any], index: int, reading: Reading) -> Iterator[Fault]:
    """Of the five lists of a whole body the count is of the first; with a threshold, of the scores from it on."""
    count, v = annotation.get("num_keypoints"), (annotation.get("keypoints") or ())[2::3]
    labeled = sum(one > 0 if reading.threshold is None else one >= reading.threshold for one in v)
    if count is not None and count != labeled:
        text = f"{_name_of(annotation, index)}: num_keypoints {show_value(count)}, labeled {labeled}"
        yield Fault("num_keypoints", text)


def id_of(value: Any) -> int:
    """An id as a whole number that Arrow can keep, which has 64 bits."""
    number = number_of_id(value)
    if isinstance(number, bool) or not isinstance(number, int):
        raise ValueError(f"expected an id that is a whole number or a text, found {show_value(value)}")
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"expected an id of at most 64 bits, found {show_value(value)}")
    return number


def keypoint_numbers(annotation: dict[str, Any], num_keypoints: int, reading: Reading = PLAIN) -> list[Any] | None:
    """An annotation's x, y, v, x, y, v, ... for the run's keypoints; None where it has none.

    COCO-WholeBody's five lists are taken as one where 133 are asked for. With a threshold, v is 2 or 0.

    Raises:
        ValueError: those that the run's are to be taken from are more or fewer than they should be.
    """
    count, numbers = reading.count or num_keypoints, annotation.get("keypoints")
    if count == NUM_WHOLE_BODY and all(key in annotation for key in WHOLE_BODY):
        numbers = [number for key in WHOLE_BODY for number in annotation[key]]
    if numbers and reading.source is not None:
        if not isinstance(numbers, list):
            raise ValueError(f"expected {3 * count} numbers in 'keypoints', found {show_value(numbers)}")
        if len(numbers) != 3 * count:
            raise ValueError(_describe_count(len(numbers), count))
        numbers = [number for k in reading.source for number in (numbers[3 * k : 3 * k + 3] if k >= 0 else (0, 0, 0))]
    if not numbers or reading.threshold is None:
        return numbers
    points = _numbers(numbers[: len(numbers) // 3 * 3], "keypoints").reshape(-1, 3)
    labels = visibility.apply_threshold(points, reading.threshold)
    return [*labels.reshape(-1).tolist(), *numbers[len(numbers) // 3 * 3 :]]


def box_of(thing: dict[str, Any]) -> Float[Array, "4"]:
    """The `bbox` of an annotation or a detection.

    Raises:
        ValueError: there is none, or it is not four finite numbers, or of no pixels that an image can have: a crop of
            such a box has no matrix.
    """
    if "bbox" not in thing:
        raise ValueError("it has no 'bbox'; expected x, y, width, height in pixels of the image")
    box = _numbers(thing["bbox"], "bbox")
    if box.shape != (4,) or not np.isfinite(box).all():
        raise ValueError(f"expected 'bbox' of 4 numbers, found {thing['bbox']!r}")
    if np.abs(box).max() > FARTHEST or ((box[2:] > 0) & (box[2:] < 1 / FARTHEST)).any():
        raise ValueError(
            f"expected pixels of an image, found {thing['bbox']!r} (sides of {1 / FARTHEST:g} to {FARTHEST:g})"
        )
    return box


def _numbers(values: Any, name: str) -> Float[Array, "n"]:
    # numpy would read the numbers in a text, too.
    if not isinstance(values, list) or not set(map(type, values)) <= NUMBERS:
        raise ValueError(
            f"expected a list of numbers for '{name}', found {str(values)[:60]}{_explain_types(values, name)}"
        )
    return np.asarray(values, dtype=np.float64)


def _explain_types(values: Any, name: str) -> str:
    """What to do about a list of other things than numbers; empty where nothing can be said."""
    kinds = set(map(type, values)) if isinstance(values, list) else set()
    if list in kinds:
        return "; lists within the list: write all numbers in one"
    if str in kinds:
        return "; numbers as text: write them without quotes"
    if type(None) not in kinds:
        return ""
    of_box = "; null: leave 'bbox' out, and it is made from the keypoints"
    return of_box if name == "bbox" else "; null: write 0, 0, 0 for a keypoint without label"
