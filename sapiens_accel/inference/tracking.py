"""Identities of people in a video, and their keypoints smoothed over time; frame by frame, in order.

people of a frame -> pairs with the people of earlier frames (OKS, then IoU of boxes) -> track_id -> one-euro filter
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from numpy import ndarray as Array
from scipy.optimize import linear_sum_assignment

from sapiens_accel.config.schema import EvalConfig
from sapiens_accel.inference.outputs import Person
from sapiens_accel.pose.oks import similarities

# benchmarks/video.py measured them on drawn people who cross.
MIN_OKS, MIN_IOU = 0.1, 0.3  # of a pair
SLACK = 2.0  # how much farther apart keypoints of two frames may be than a label and its prediction, in sigmas
MIN_COMMON = 3  # keypoints above the threshold in both frames, for an OKS
MAX_GAP = 1.0  # s: a person who was not detected for longer gets a new number
SPEED_WEIGHT = 0.5  # of the newest frame in the velocity of a person
DERIVATIVE_CUTOFF = 1.0  # Hz, of the speed of a keypoint: that of the paper


class OneEuroFilter:
    """The one-euro filter of Casiez, Roussel and Vogel (CHI 2012, https://doi.org/10.1145/2207676.2208639, algorithm 1)
    of K keypoints: a low-pass filter whose cutoff frequency rises with the speed of a keypoint.

    The speed is that of the point in the plane, relative to the size of the person, so that people of any size in any
    image are smoothed alike. A keypoint with a score below the threshold is a guess: it stays as it is, and the filter
    continues with the next one above it.

    Args:
        min_cutoff: Hz, of a keypoint that does not move.
        beta: by how many Hz the cutoff rises when a keypoint moves by the size of the person in a second.
    """

    def __init__(self, min_cutoff: float, beta: float) -> None:
        self.min_cutoff, self.beta = min_cutoff, beta
        self._points_xy: Float[Array, "k 2"] | None = None  # filtered
        self._velocities: Float[Array, "k 2"] | None = None
        self._times: Float[Array, " k"] | None = None  # nan: never seen

    def move(self, step_xy: Float[Array, "2"]) -> None:
        """Move the state with the whole person, px: what follows is the motion relative to that, without its lag."""
        if self._points_xy is not None:
            self._points_xy = self._points_xy + step_xy

    def smooth(
        self, points_xy: Float[Array, "k 2"], shown: Bool[Array, "k"], time: float, size: float
    ) -> Float[Array, "k 2"]:
        """The keypoints of the next frame, smoothed.

        Args:
            points_xy: px of the image.
            shown: keypoints above the threshold.
            time: s, later than that of the frame before.
            size: of the person, px.
        """
        if self._points_xy is None or self._velocities is None or self._times is None:
            self._points_xy, self._velocities = points_xy.copy(), np.zeros_like(points_xy)
            self._times = np.where(shown, time, np.nan)
            return points_xy
        again = shown & np.isfinite(self._times)
        elapsed = np.where(again, time - self._times, 1.0)[:, None]
        velocities = (points_xy - self._points_xy) / elapsed
        blend = _alpha(elapsed, DERIVATIVE_CUTOFF)
        velocities = self._velocities + blend * (velocities - self._velocities)
        speeds = np.linalg.norm(velocities, axis=1, keepdims=True) / max(size, 1.0)
        blend = _alpha(elapsed, self.min_cutoff + self.beta * speeds)
        filtered = self._points_xy + blend * (points_xy - self._points_xy)
        smoothed = np.where(again[:, None], filtered, points_xy)
        self._points_xy = np.where(shown[:, None], smoothed, self._points_xy)
        self._velocities = np.where(again[:, None], velocities, self._velocities)
        self._times = np.where(shown, time, self._times)
        return smoothed


def _alpha(elapsed: Float[Array, "k 1"], cutoff: Any) -> Float[Array, "k 1"]:
    """The weight of a new value after so many seconds, of a first-order low-pass filter with this cutoff (Hz)."""
    return 1 / (1 + 1 / (2 * np.pi * cutoff * elapsed))


@dataclass(kw_only=True)
class _Track:
    """A person of earlier frames, as last seen; `velocity` is that of the whole person, px/s."""

    number: int
    person: Person
    time: float
    velocity: Float[Array, "2"]
    filter: OneEuroFilter | None


class Tracker:
    """Gives each person of a video a number from 1 that stays the same from frame to frame.

    The people of a frame are paired with those of earlier ones, moved on by their velocity, so that the sum of OKS is
    largest (Hungarian method); those who remain, by the IoU of their boxes. Only people of one category are paired.
    A person without a pair gets a new number, as does one who was not detected for more than MAX_GAP. Each person of a
    frame is returned.

    Args:
        sigmas: of the keypoints.
        options: `score_threshold`, and of the smoothing `smooth`, `smooth_cutoff` and `smooth_beta`.
    """

    def __init__(self, sigmas: Sequence[float], options: EvalConfig) -> None:
        self.sigmas, self.options = sigmas, options
        self.num_people = 0
        self._tracks: list[_Track] = []

    def update(self, people: Sequence[Person], time: float) -> list[Person]:
        """The people of the next frame, in their order, with `track_id`, and smoothed if that is asked for.

        Args:
            time: of the frame, s; later than that of the frame before.
        """
        self._tracks = [track for track in self._tracks if time - track.time <= MAX_GAP]
        of_person = self._match(people, time)
        tracked = []
        for index, person in enumerate(people):
            if (track := of_person.get(index)) is None:
                track = self._begin(person, time)
            else:
                self._move(track, person, time)
            points_xy = person.points_xy
            if track.filter is not None:
                size = float(np.sqrt(person.box_xywh[2:].prod()))
                points_xy = track.filter.smooth(points_xy, self._shown(person), time, size)
            tracked.append(person._replace(points_xy=points_xy, track_id=track.number))
        return tracked

    def _begin(self, person: Person, time: float) -> _Track:
        self.num_people += 1
        smoothing = OneEuroFilter(self.options.smooth_cutoff, self.options.smooth_beta) if self.options.smooth else None
        track = _Track(number=self.num_people, person=person, time=time, velocity=np.zeros(2), filter=smoothing)
        self._tracks.append(track)
        return track

    def _move(self, track: _Track, person: Person, time: float) -> None:
        before, elapsed = track.person, time - track.time
        if track.filter is not None:
            track.filter.move(track.velocity * elapsed)
        common = self._shown(before) & self._shown(person)
        if common.any():
            step_xy = np.median((person.points_xy - before.points_xy)[common], axis=0)
        else:
            step_xy = _center(person.box_xywh) - _center(before.box_xywh)
        track.velocity = track.velocity + SPEED_WEIGHT * (step_xy / elapsed - track.velocity)
        track.person, track.time = person, time

    def _match(self, people: Sequence[Person], time: float) -> dict[int, _Track]:
        """The track of each person who has one, by the index of the person."""
        of_person: dict[int, _Track] = {}
        for similarity, least in ((self._oks, MIN_OKS), (self._iou, MIN_IOU)):
            matched = {track.number for track in of_person.values()}
            tracks = [track for track in self._tracks if track.number not in matched]
            left = [index for index in range(len(people)) if index not in of_person]
            if not tracks or not left:
                break
            table = np.array([similarity(track, [people[index] for index in left], time) for track in tracks])
            kinds = np.array([[track.person.category_id == people[index].category_id for index in left]
                              for track in tracks])  # fmt: skip
            table = np.where(kinds & (table >= least), table, 0.0)
            for row, column in zip(*linear_sum_assignment(table, maximize=True), strict=True):
                if table[row, column] > 0:
                    of_person[left[column]] = tracks[row]
        return of_person

    def _oks(self, track: _Track, people: Sequence[Person], time: float) -> Float[Array, "n"]:
        """The larger of two: where the person was, as of those who stand or turn, and where their velocity leads."""
        points_xy = np.stack([person.points_xy for person in people])
        areas = np.array([(track.person.box_xywh[2:].prod() + one.box_xywh[2:].prod()) / 2 for one in people])
        common = self._shown(track.person) & np.stack([self._shown(person) for person in people])
        num = common.sum(axis=1)
        means = []
        for moved in (track.person.points_xy, track.person.points_xy + track.velocity * (time - track.time)):
            terms = similarities(moved, points_xy, SLACK**2 * areas, self.sigmas) * common
            means.append(terms.sum(axis=1) / np.maximum(num, 1))
        return np.where(num >= min(MIN_COMMON, len(self.sigmas)), np.maximum(*means), 0.0)

    def _iou(self, track: _Track, people: Sequence[Person], time: float) -> Float[Array, "n"]:
        box = track.person.box_xywh.copy()
        box[:2] += track.velocity * (time - track.time)
        others = np.stack([person.box_xywh for person in people])
        low, high = np.maximum(box[:2], others[:, :2]), np.minimum(box[:2] + box[2:], others[:, :2] + others[:, 2:])
        common = (high - low).clip(0).prod(axis=1)
        return common / np.maximum(box[2:].prod() + others[:, 2:].prod(axis=1) - common, 1e-9)

    def _shown(self, person: Person) -> Bool[Array, "k"]:
        return person.scores > self.options.score_threshold


def _center(box_xywh: Float[Array, "4"]) -> Float[Array, "2"]:
    return box_xywh[:2] + box_xywh[2:] / 2
