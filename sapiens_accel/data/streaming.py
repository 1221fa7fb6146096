"""People of shards in an order that reads whole row groups: training without a copy of the images.

An epoch goes through its row groups in an order of its own; people are shuffled within windows of a few row groups.
That sequence is cut into lanes, PHASES x parts of them, each read from beginning to end: a place in a global batch
belongs to a part, and a step to a phase. A process reads the lanes of its parts, a worker those of its phases, so no
image travels twice where processes divide the parts and workers the phases; where they do not, images are read more
than once and the batches stay the same. Who is where is a function of (seed, stage, step, position): a run goes on at
any step, with any number of processes and workers, and no state of the stream is saved.
"""

import bisect
import os
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Int
from numpy import ndarray as Array
from numpy.random import default_rng
from tqdm import tqdm

from sapiens_accel.data.annotation_rules import PeopleColumns, PeopleReader
from sapiens_accel.data.people import SCHEMA_VERSION, People, describe_boxes
from sapiens_accel.errors import UserError
from sapiens_accel.pose.person_boxes import ANNOTATED, GUESSED_SIDE, NO_BOX, WHOLE_IMAGE, PeopleSizes, measure_sizes
from sapiens_accel.sources import schema
from sapiens_accel.sources.schema import PLAIN

PHASES = 4
READERS = 16  # files of which people are counted at a time
CACHED_GROUPS = 256  # of people, without images: some 0.1 MB each

Chosen = Callable[[PeopleColumns], Bool[Array, "n"]]


def labeled(people: PeopleColumns) -> Bool[Array, "n"]:
    return people.labeled


@dataclass(frozen=True)
class Unlabeled:
    """People without keypoints whose boxes have sides of at least so many px."""

    min_side: float

    def __call__(self, people: PeopleColumns) -> Bool[Array, "n"]:
        return ~people.labeled & (people.box_xywh[:, 2:].min(axis=1, initial=np.inf) >= self.min_side)


class StreamSource(NamedTuple):
    """A reader of people, and which of them are taken."""

    reader: PeopleReader
    chosen: Chosen

    @property
    def file(self) -> Path:
        return self.reader.source.file


class Group(NamedTuple):
    """Images that are read together; `is_annotated`: whether anybody is, in the whole source."""

    source: StreamSource
    first: int
    num: int
    first_person: int
    is_annotated: bool

    def read_people(self, table: pa.Table) -> PeopleColumns:
        reader = self.source.reader
        if not self.is_annotated:
            return reader.whole_images(table, self.first)
        return reader.columns(table, self.first, self.first_person)


class StreamRows:
    """Rows of people by number, as of a `datasets` table; a row group is read when one of its people is asked for."""

    def __init__(self, groups: Sequence[Group], counts: Sequence[int]) -> None:
        self.groups = list(groups)
        self.counts = np.asarray(counts, dtype=np.int64)
        self.starts = np.concatenate([[0], np.cumsum(self.counts)])
        self._cached: OrderedDict[int, list[dict[str, Any]]] = OrderedDict()

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not isinstance(index, int):
            raise UserError(f"--data.streaming true: {index!r} of all people is not known; use --eval.split val")
        group = bisect.bisect_right(self.starts, index) - 1
        return self._people(group)[index - int(self.starts[group])]

    def _people(self, number: int) -> list[dict[str, Any]]:
        if number not in self._cached:
            group = self.groups[number]
            people = group.read_people(group.source.reader.source.read_group(group.first, group.num))
            rows = [people.row(i) for i in np.flatnonzero(group.source.chosen(people)).tolist()]
            if len(rows) != self.counts[number]:
                raise UserError(
                    f"{group.source.file}: images from {group.first} on: {len(rows)} people where there were "
                    f"{self.counts[number]}: the shards have changed while they were read; start again"
                )
            self._cached[number] = rows
            while len(self._cached) > CACHED_GROUPS:
                self._cached.popitem(last=False)
        self._cached.move_to_end(number)
        return self._cached[number]

    def order(self, key: "OrderKey", step: int) -> Int[Array, "global_batch"]:
        """Which people the global batch of a step holds."""
        return _order(_Counts(self.counts), key, step)


class OrderKey(NamedTuple):
    """What the order of people depends on, beside the step.

    Attributes:
        stream: the name of the sequence (a stage, labeled or not), part of the seed.
        parts, window: see the module, and `DataConfig`.
    """

    seed: int
    stream: str
    global_batch: int
    parts: int
    window: int


def positions(step: int, num_steps: int, global_batch: int, parts: int) -> Int[Array, "global_batch"]:
    """The positions in an epoch's sequence that the global batch of one of its steps takes, each in its lane."""
    part = np.arange(global_batch) * parts // global_batch
    widths = np.bincount(part, minlength=parts)
    steps_of = np.array([len(range(phase, num_steps, PHASES)) for phase in range(PHASES)])
    starts = np.concatenate([[0], np.cumsum(np.outer(steps_of, widths).ravel())])
    phase, turn = step % PHASES, step // PHASES
    before = np.concatenate([[0], np.cumsum(widths)])[part]
    return starts[phase * parts + part] + turn * widths[part] + np.arange(global_batch) - before


class _Counts:
    """An array that a cache compares by its identity."""

    def __init__(self, values: Int[Array, "n"]) -> None:
        self.values = values

    def __hash__(self) -> int:
        return id(self.values)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Counts) and other.values is self.values


class _Sequence:
    """One pass over all people: row groups in an order of its own, people shuffled within windows."""

    def __init__(self, counts: Int[Array, "n"], window: int, key: Sequence[int]) -> None:
        self.key, self.window = list(key), window
        self.starts = np.concatenate([[0], np.cumsum(counts)])
        self.groups = default_rng(self.key).permutation(len(counts))
        ends = np.concatenate([[0], np.cumsum(counts[self.groups])])
        self.windows = np.append(ends[:-1:window], ends[-1])
        self.shuffled = lru_cache(maxsize=1024)(self._shuffled)

    def people(self, positions: Int[Array, "n"]) -> Int[Array, "n"]:
        windows = np.searchsorted(self.windows, positions, side="right") - 1
        people = [self.shuffled(int(w))[p - self.windows[w]] for w, p in zip(windows, positions, strict=True)]
        return np.array(people, dtype=np.int64)

    def _shuffled(self, number: int) -> Int[Array, "n"]:
        groups = self.groups[number * self.window : (number + 1) * self.window].tolist()
        people = np.concatenate([np.arange(int(self.starts[group]), int(self.starts[group + 1])) for group in groups])
        return default_rng([*self.key, number]).permutation(people)


@lru_cache(maxsize=4)
def _sequence(counts: _Counts, window: int, *key: int) -> _Sequence:
    # Kept for the epoch: every sample asks.
    return _Sequence(counts.values, window, key)


@lru_cache(maxsize=8)
def _order(counts: _Counts, key: OrderKey, step: int) -> Int[Array, "global_batch"]:
    seed, stream, global_batch, parts, window = key
    num_people = int(counts.values.sum())
    num_steps = max(1, num_people // global_batch)
    epoch, step = divmod(step, num_steps)
    position = positions(step, num_steps, global_batch, min(parts, global_batch))
    people = np.empty(global_batch, dtype=np.int64)
    # Fewer people than a batch: pass over them again and again.
    for again in np.unique(position // num_people):
        of_pass = position // num_people == again
        sequence = _sequence(counts, window, seed, zlib.crc32(stream.encode()), epoch, int(again))
        people[of_pass] = sequence.people(position[of_pass] % num_people)
    return people


# ---- Opening


def open_streams(root: Path, sources: Sequence[StreamSource], cache: Path) -> People:
    """The chosen people of several sources of one root; who is where is read once and kept in the cache.

    Raises:
        UserError: nobody is, a shard cannot be read, or an annotation in it is broken.
    """
    groups, counts, origins = [], [], []
    for source in sources:
        counted = _counted(source, cache)
        origins.append(counted[:, 2:].sum(axis=0))
        if not origins[-1][ANNOTATED]:
            source.reader.refuse_without_boxes()
        if origins[-1][[GUESSED_SIDE, WHOLE_IMAGE]].any():
            source.reader.typical_wh  # noqa: B018  (found here once, not in each process that reads people)
        starts = np.concatenate([[0], np.cumsum(counted[:, 1])])
        spans = source.reader.source.groups()
        for span, (chosen, *_), before in zip(spans, counted, starts[:-1], strict=True):
            groups.append(Group(source, span.first, span.num, int(before), bool(starts[-1])))
            counts.append(int(chosen))
    if not sum(counts):
        raise UserError(f"{sources[0].file}: none of its people is {_describe_choice(sources[0].chosen)}")
    rows: Any = StreamRows(groups, counts)
    reading = sources[0].reader.known_reading
    note = describe_boxes(origins[0], sources[0].file, reading)
    return People(
        rows=rows, root=root, annotations=sources[0].file, reading=reading, box_note=note,
        left_out=_describe_left_out(sources[0], cache),
    )  # fmt: skip


def _describe_left_out(source: StreamSource, cache: Path) -> str:
    """How many annotations are not learned from, in a line; empty if all are."""
    num_chosen, num = _counted(source, cache)[:, :2].sum(axis=0).tolist()
    if num_chosen >= num:  # also where nobody is annotated, and each image is somebody
        return ""
    causes = "crowds, other categories, no box, no label, too small; a stream does not count them by cause"
    return f"{source.file}: {num - num_chosen} of its {num} annotations are left out ({causes})"


def _describe_choice(chosen: Chosen) -> str:
    return "without keypoints and large enough" if isinstance(chosen, Unlabeled) else "labeled (v > 0)"


def _counted(source: StreamSource, cache: Path) -> Int[Array, "groups counts"]:
    """For each group its chosen people, all people, and the chosen ones by where their boxes are from; read from the
    columns beside the images."""
    reader = source.reader
    digest, reading = reader.source.digest, reader.known_reading
    chosen = repr(source.chosen) if isinstance(source.chosen, Unlabeled) else "labelled"
    options = "" if reading == PLAIN else f"-{reading!r}"
    name = f"{digest}-k{reader.num_keypoints}-{chosen}{options}-v{SCHEMA_VERSION}"
    file = cache / "streams" / f"{zlib.crc32(name.encode()):08x}-{digest}.npy"
    if not file.is_file():
        counted = _count(source, is_annotated=True)
        if not counted[:, 1].any():  # nobody is annotated: each image is somebody
            counted = _count(source, is_annotated=False)
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f"{file.stem}.{os.getpid()}.npy")
        np.save(temporary, counted)
        temporary.replace(file)
    return np.load(file)


def _count(source: StreamSource, *, is_annotated: bool) -> Int[Array, "groups counts"]:
    """Several files at a time, each read by one thread: from another machine the time is latency."""

    def count_file(spans: Sequence[schema.Span]) -> list[tuple[int, ...]]:
        return [_count_group(Group(source, span.first, span.num, 0, is_annotated)) for span in spans]

    by_file = [list(spans) for _, spans in groupby(source.reader.source.groups(), key=lambda span: span.file)]
    with ThreadPoolExecutor(READERS) as pool:
        counts = tqdm(pool.map(count_file, by_file), total=len(by_file), desc="counting", disable=None, leave=False)
        counted = [of_group for of_file in counts for of_group in of_file]
    return np.array(counted, dtype=np.int64).reshape(-1, 2 + NO_BOX)


def _count_group(group: Group) -> tuple[int, ...]:
    """How many of the group's people are chosen, how many there are, and how many chosen boxes are of each origin."""
    table = group.source.reader.source.read_group(group.first, group.num, columns=schema.COLUMNS)
    everybody = schema.count_people(table)
    if group.is_annotated and not everybody:
        return (0,) * (2 + NO_BOX)
    people = group.read_people(table)
    chosen = group.source.chosen(people)
    return int(chosen.sum()), everybody, *np.bincount(people.box_origins[chosen], minlength=NO_BOX).tolist()


def measure_stream(people: People) -> PeopleSizes | None:
    """How large the people of the first row group that has any are in their images; None: that is not known."""
    rows: Any = people.rows
    group = rows.groups[int(np.flatnonzero(rows.counts)[0])]
    table = group.source.reader.source.read_group(group.first, group.num, columns=schema.COLUMNS)
    here = group.read_people(table)
    chosen = group.source.chosen(here)
    return measure_sizes(here.box_xywh[chosen], here.size_wh[chosen])


def sample(people: People, number: int) -> Iterator[dict[str, Any]]:
    """The first people of an opened stream, for checks."""
    yield from (people.rows[index] for index in range(min(number, len(people))))
