"""A drawn film of three people who walk to and fro and cross, with their true keypoints and who is who.

`detect` makes of the truth what a detector and a pose network would give: noisy keypoints, people who are missed, more
of both where somebody nearer hides them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from jaxtyping import Float, UInt8
from numpy import ndarray as Array

from sapiens_accel.config.schema import EvalConfig
from sapiens_accel.inference.outputs import Person
from sapiens_accel.inference.tracking import Tracker
from sapiens_accel.pose.skeleton import COCO17
from sapiens_accel.sources import cartoon

RATE = 25.0  # frames a second
NOISE, OUTLIER = 0.012, 0.08  # of a person's height: a keypoint's noise, and that of one in 100
MISSED, MISSED_HIDDEN = 0.04, 0.8  # share of the detections, of people in view and of those who are hidden
HIDDEN = 0.5  # share of a box that nearer people's boxes cover


@dataclass(frozen=True, kw_only=True)
class Walker:
    """Who walks between the borders of the image, and turns there.

    Attributes:
        height: px, standing; the taller, the nearer.
        speed: of walking, heights a second.
        start: of the way there and back, 0..1.
    """

    height: float
    speed: float
    start: float
    look: cartoon.Look


@dataclass(frozen=True, kw_only=True)
class Truth:
    """One frame: the keypoints [people, 17, 2] and boxes (x y width height) of everybody, px, and when it is shown, s.

    Attributes:
        covered: the share of each box that the boxes of nearer people cover.
    """

    points_xy: Float[Array, "p 17 2"]
    boxes_xywh: Float[Array, "p 4"]
    covered: Float[Array, "p"]
    time: float
    image: UInt8[Array, "h w 3"] | None = None


def cast(seed: int, image_hw: tuple[int, int]) -> list[Walker]:
    """Three people of different heights and speeds."""
    rng = np.random.default_rng([seed, 0])
    shares = (0.5, 0.57, 0.65)
    return [
        Walker(height=share * image_hw[0] * rng.uniform(0.95, 1.05), speed=rng.uniform(0.35, 0.9),
               start=rng.uniform(0, 1), look=cartoon.random_look(rng))
        for share in shares
    ]  # fmt: skip


def play(seed: int, num_frames: int, image_hw: tuple[int, int] = (240, 320), draw: bool = False) -> Iterator[Truth]:
    """The frames of a film; the people, their speeds and ways are those of the seed."""
    walkers = cast(seed, image_hw)
    for index in range(num_frames):
        time = index / RATE
        image = np.full((*image_hw, 3), (150, 160, 165), np.uint8) if draw else None
        people, boxes = [], []
        for walker in walkers:
            points_xy, parts, origin_xy = _stand(walker, time, image_hw)
            circles = np.concatenate([part.circles for part in parts]) * walker.height
            low = (circles[:, :2] - circles[:, 2:]).min(axis=0) + origin_xy
            high = (circles[:, :2] + circles[:, 2:]).max(axis=0) + origin_xy
            people.append(points_xy)
            boxes.append([*low, *(high - low)])
            if image is not None:
                cartoon.draw(image, parts, walker.height, origin_xy)
        boxes_xywh = np.array(boxes)
        covered = np.array([_cover(boxes_xywh, person) for person in range(len(boxes))])
        shown = None if image is None else cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
        yield Truth(points_xy=np.stack(people), boxes_xywh=boxes_xywh, covered=covered, time=time, image=shown)


def _stand(walker: Walker, time: float, image_hw: tuple[int, int]) -> tuple[Array, list[cartoon.Part], Array]:
    """Keypoints (px), parts and the place of the pelvis (px) of a walker at this time."""
    margin = 0.25 * walker.height
    way = image_hw[1] - 2 * margin
    phase = (walker.start + time * walker.speed * walker.height / (2 * way)) % 1
    there = phase < 0.5
    x = margin + way * (2 * phase if there else 2 - 2 * phase)
    swing = np.sin(2 * np.pi * 1.8 * walker.speed * time + 7 * walker.start)
    arms = np.array([[[0.15, side * 0.6 * swing], [0.1, side * 0.6 * swing + 0.3]] for side in (1, -1)])
    legs = np.array([[[0.05, -side * 0.5 * swing], [0.05, -side * 0.5 * swing - 0.25]] for side in (1, -1)])
    turn = (1 if there else -1) * np.pi / 3
    points, parts = cartoon.figure(cartoon.Pose(arms=arms, legs=legs, view=(turn, 0.1, 0.0)), walker.look)
    bob = 0.01 * walker.height * abs(swing)
    origin_xy = np.array([x, image_hw[0] * 0.95 - 0.52 * walker.height - bob])
    return points * walker.height + origin_xy, parts, origin_xy


def _cover(boxes_xywh: Float[Array, "p 4"], person: int) -> float:
    """The share of a person's box that is covered by the box of a nearer one, the largest."""
    mine, nearer = boxes_xywh[person], boxes_xywh[person + 1 :]
    low = np.maximum(mine[:2], nearer[:, :2])
    high = np.minimum(mine[:2] + mine[2:], nearer[:, :2] + nearer[:, 2:])
    return float(((high - low).clip(0).prod(axis=1) / mine[2:].prod()).max(initial=0.0))


def detect(truth: Truth, rng: np.random.Generator) -> tuple[list[Person], list[int]]:
    """The people of a frame as they would be found, the surest first, and who each of them is."""
    found: list[tuple[Person, int]] = []
    for number, (points_xy, box_xywh, covered) in enumerate(
        zip(truth.points_xy, truth.boxes_xywh, truth.covered, strict=True)
    ):
        height, num = box_xywh[3], len(points_xy)
        missed, noise = rng.uniform(), rng.normal(size=(num, 2)) * height * NOISE * (1 + 2 * covered)
        far = rng.normal(size=(num, 2)) * height * OUTLIER * (rng.uniform(size=(num, 1)) < 0.01)
        scores = (rng.uniform(0.6, 0.95, num) - 0.6 * covered * rng.uniform(size=num)).clip(0)
        moved = box_xywh + rng.normal(size=4) * height * NOISE
        if missed >= (MISSED_HIDDEN if covered > HIDDEN else MISSED):
            found.append((Person(points_xy + noise + far, scores, float(scores.mean()), moved, 0.9), number))
    found.sort(key=lambda one: -one[0].score)
    return [person for person, _ in found], [number for _, number in found]


def write(path: Path, seed: int, num_frames: int, image_hw: tuple[int, int] = (240, 320)) -> None:
    """Write the film as a video."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), RATE, image_hw[::-1])
    for truth in play(seed, num_frames, image_hw, draw=True):
        assert truth.image is not None
        writer.write(cv2.cvtColor(truth.image, cv2.COLOR_RGB2BGR))
    writer.release()


# ---- How well they are followed


class Frame(NamedTuple):
    """A frame, the people who would be found in it, and who each of them is."""

    truth: Truth
    people: list[Person]
    who: list[int]


def detected(seed: int, num_frames: int) -> Iterator[Frame]:
    """The frames of a film as they would be detected."""
    rng = np.random.default_rng([seed, 1])
    for truth in play(seed, num_frames):
        yield Frame(truth, *detect(truth, rng))


def num_crossings(frames: Sequence[Frame]) -> int:
    """How often two people pass each other."""
    orders = [np.argsort(frame.truth.points_xy[:, :, 0].mean(axis=1)) for frame in frames]
    return sum(bool((a != b).any()) for a, b in pairwise(orders))


def add_up(films: Sequence[Sequence[Frame]], options: EvalConfig) -> dict[str, Any]:
    rows = [follow(frames, options) for frames in films]
    return {
        "switches": sum(row["switches"] for row in rows),
        "numbers": sum(row["numbers"] for row in rows),
        "error_px": round(float(np.mean([row["error_px"] for row in rows])), 3),
        "jitter_px": round(float(np.mean([row["jitter_px"] for row in rows])), 3),
    }


def follow(frames: Sequence[Frame], options: EvalConfig) -> dict[str, Any]:
    """One film through the tracker.

    Returns:
        identity switches; how many numbers were given; mean distance from the true keypoints (px); jitter: the mean
        change of that distance vector from one frame to the next (px).
    """
    tracker = Tracker(COCO17.sigmas, options)
    number_of: dict[int, int] = {}
    before: dict[int, np.ndarray] = {}
    switches, errors, jumps = 0, [], []
    for frame in frames:
        now = {}
        for person, true in zip(tracker.update(frame.people, frame.truth.time), frame.who, strict=True):
            assert person.track_id is not None
            switches += number_of.get(true, person.track_id) != person.track_id
            number_of[true] = person.track_id
            now[true] = person.points_xy - frame.truth.points_xy[true]
            errors.append(np.linalg.norm(now[true], axis=1).mean())
            if true in before:
                jumps.append(np.linalg.norm(now[true] - before[true], axis=1).mean())
        before = now
    error, jitter = float(np.mean(errors)), float(np.mean(jumps))
    return {"switches": switches, "numbers": tracker.num_people, "error_px": error, "jitter_px": jitter}
