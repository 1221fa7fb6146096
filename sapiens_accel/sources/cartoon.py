"""One articulated cartoon person: its pose and look, its parts from back to front, and what of it is seen."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import cv2
import numpy as np

# The body frame: x to the person's left, y down, z forward; unit: the standing height. The view frame: x right in the
# image, y down, z towards the camera. Someone who faces the camera has both frames equal, so left is at larger x.
_SHOULDERS, _ELBOWS, _WRISTS, _HIPS, _KNEES, _ANKLES = (5, 6), (7, 8), (9, 10), (11, 12), (13, 14), (15, 16)
SHIFT = 4  # cv2's fractional bits of a drawn coordinate
_CIRCLE_XY = np.stack([f(np.linspace(0, 2 * np.pi, 14, endpoint=False)) for f in (np.cos, np.sin)], axis=-1)
_LIGHT_XY = np.array([-0.25, -0.3])  # where highlights move, in radii: the light comes from the upper left

# (low, high) of: abduction and flexion of the upper segment (0 hangs down), then what the lower one adds to each, rad.
_ARMS = np.array([
    [(.05, .3), (-.25, .3), (-.1, .15), (.05, .6)],  # hanging
    [(.05, .3), (-.7, .8), (-.1, .1), (.3, 1.2)],  # swinging
    [(2.2, 2.9), (0, .3), (-.4, .5), (0, .2)],  # up
    [(1., 1.8), (0, .3), (.8, 1.5), (0, .3)],  # waving
    [(.6, .9), (-.4, -.1), (-1.6, -1.2), (.1, .5)],  # hand on the hip
    [(.25, .45), (-.5, -.3), (-1.2, -.9), (-.3, 0)],  # behind the back
    [(.1, .35), (.2, .5), (-1.6, -1.1), (.6, 1.1)],  # crossed
    [(0, .5), (.9, 1.8), (-.4, .1), (0, .7)],  # reaching forward
    [(.2, .5), (.3, .8), (-.3, .1), (1.6, 2.2)],  # hand to the head
    [(1.2, 1.7), (-.1, .3), (-.5, .3), (0, .4)],  # stretched sideways
])  # fmt: skip
_ARM_SHARES = np.array([0.4, 0.2, 0.08, 0.06, 0.07, 0.03, 0.04, 0.05, 0.04, 0.03])
_FACE = np.array(
    [(0, 0.013, 0.068), (0.025, -0.006, 0.054), (-0.025, -0.006, 0.054), (0.06, 0.004, -0.004), (-0.06, 0.004, -0.004)]
)
# Two rows a stance (one leg, the other leg), and the forward lean of the trunk that goes with it.
_LEGS = np.array([
    [[(.02, .18), (-.05, .1), (-.06, .03), (-.2, 0)], [(.02, .18), (-.05, .1), (-.06, .03), (-.2, 0)]],  # standing
    [[(.02, .1), (.25, .75), (-.05, .05), (-.7, -.1)], [(.02, .1), (-.6, -.2), (-.05, .05), (-.9, -.1)]],  # walking
    [[(.05, .35), (1.1, 1.6), (-.3, 0), (-1.7, -1.1)], [(.05, .35), (1.1, 1.6), (-.3, 0), (-1.7, -1.1)]],  # sitting
    [[(.1, .5), (1.3, 1.9), (-.2, 0), (-2.3, -1.8)], [(.1, .5), (1.0, 1.9), (-.2, 0), (-2.3, -1.6)]],  # crouching
    [[(.2, .6), (-.1, .3), (-.5, 0), (-.5, 0)], [(.2, .6), (-.1, .3), (-.5, 0), (-.5, 0)]],  # legs apart
    [[(.05, .3), (.8, 1.5), (-.1, .1), (-1.6, -.2)], [(.02, .2), (-.5, 0), (-.1, .1), (-.7, 0)]],  # lunge or kick
])  # fmt: skip
_LEG_SHARES = np.array([0.45, 0.27, 0.08, 0.06, 0.08, 0.06])
_LEANS = np.array([(-0.08, 0.12), (-0.05, 0.2), (-0.1, 0.3), (0.3, 0.8), (-0.1, 0.3), (-0.2, 0.4)])

SKINS = np.array([(180, 205, 240), (150, 180, 225), (120, 155, 205), (90, 120, 170), (60, 85, 130), (45, 62, 95)])
_HAIRS = np.array([(30, 28, 30), (35, 55, 85), (60, 105, 150), (110, 180, 220), (40, 70, 150), (150, 150, 155)])


@dataclass(frozen=True, kw_only=True)
class Pose:
    """How one person stands and is seen; all angles in rad.

    Attributes:
        arms: (2 sides left/right, 2 segments, 2) absolute abduction and flexion of each segment; 0, 0 hangs down.
        legs: the same for thighs and shins.
        lean: forward lean and sideways bend of the trunk.
        head: turn and nod of the head against the trunk.
        view: turn about the vertical (0 faces the camera, pi shows the back), camera elevation, roll in the image.
    """

    arms: np.ndarray
    legs: np.ndarray
    lean: tuple[float, float] = (0.0, 0.0)
    head: tuple[float, float] = (0.0, 0.0)
    view: tuple[float, float, float] = (0.0, 0.1, 0.0)


@dataclass(frozen=True, kw_only=True)
class Look:
    """Build and clothes: colors are BGR in 0..255, lengths in standing heights, covers in limb segments (0..2)."""

    skin: np.ndarray
    hair: np.ndarray
    shirt: np.ndarray
    trousers: np.ndarray
    shoes: np.ndarray
    sleeve: float = 2.0
    trouser_leg: float = 2.0
    shoulder: float = 0.12
    hip: float = 0.065
    girth: float = 1.0
    head: float = 1.0
    long_hair: bool = False
    num_stripes: int = 0


@dataclass(frozen=True)
class Part:
    """The convex hull of circles (M, 3: x, y, radius) at a depth; `shows` are the keypoints seen where it is on top."""

    circles: np.ndarray
    depth: float
    color: np.ndarray
    shows: tuple[int, ...] = ()


def _part(points: Sequence[np.ndarray], radii: Sequence[float], depth: float, color: np.ndarray, *shows: int) -> Part:
    circles = np.column_stack([np.asarray(points)[:, :2], radii])
    return Part(circles, depth, color, shows)


def _rotation(turn: float, nod: float, roll: float) -> np.ndarray:
    """Turn about y, then nod about x (positive brings what is in front down), then roll in the image."""
    (ct, cn, cr), (st, sn, sr) = np.cos([turn, nod, roll]), np.sin([turn, nod, roll])
    about_y = np.array([[ct, 0, st], [0, 1, 0], [-st, 0, ct]])
    about_x = np.array([[1, 0, 0], [0, cn, sn], [0, -sn, cn]])
    return np.array([[cr, -sr, 0], [sr, cr, 0], [0, 0, 1]]) @ about_x @ about_y


def _chain(start: np.ndarray, angles: np.ndarray, lengths: Sequence[float], side: int, frame: np.ndarray) -> np.ndarray:
    """The three keypoints of a limb from two (abduction, flexion) pairs; `side` is 1 for left, -1 for right."""
    a, f = angles.T
    steps = np.stack([side * np.sin(a), np.cos(a) * np.cos(f), np.cos(a) * np.sin(f)], axis=-1)
    return np.vstack([start, start + np.cumsum(steps * np.asarray(lengths)[:, None], axis=0) @ frame.T])


def _limb(
    points: np.ndarray, radii: Sequence[float], cover: float, skin: np.ndarray, cloth: np.ndarray, ids: Sequence[int]
) -> Iterator[Part]:
    for i, (a, b) in enumerate(pairwise(points)):
        covered, depth = float(np.clip(cover - i, 0, 1)), float(a[2] + b[2]) / 2
        if covered < 1:
            yield _part([a, b], radii[i : i + 2], depth, skin, *ids[i : i + 2])
        if covered > 0:
            end, end_radius = a + covered * (b - a), radii[i] + covered * (radii[i + 1] - radii[i])
            yield _part([a, end], [radii[i] * 1.1, end_radius * 1.18], depth + 1e-3, cloth, *ids[i : i + 2])


def _arm(points: np.ndarray, look: Look, side: int) -> list[Part]:
    g, ids = look.girth, (_SHOULDERS[side], _ELBOWS[side], _WRISTS[side])
    hand = points[2] + 0.27 * (points[2] - points[1])
    depth = float(points[1:, 2].mean()) + 0.002
    palm = _part([points[2], hand], [0.02 * g, 0.026 * g], depth - 0.003, look.skin * 0.95, ids[2])
    parts = [*_limb(points, (0.037 * g, 0.03 * g, 0.021 * g), look.sleeve, look.skin, look.shirt, ids), palm]
    # In front of the trunk's middle plane by its own thickness: an arm at the side is drawn over the shirt.
    return [Part(p.circles, p.depth + 0.035, p.color, p.shows) for p in parts]


def _leg(points: np.ndarray, look: Look, side: int, frame: np.ndarray) -> list[Part]:
    g, ids = look.girth, (_HIPS[side], _KNEES[side], _ANKLES[side])
    shin = (points[2] - points[1]) / np.linalg.norm(points[2] - points[1])
    thigh = (points[1] - points[0]) / np.linalg.norm(points[1] - points[0])
    forward = frame[:, 2] + 0.8 * (thigh - shin * (thigh @ shin))  # the foot stays about square to the shin
    forward = forward - shin * (forward @ shin)
    heel = points[2] + 0.03 * shin
    toe = heel + 0.085 * forward / max(float(np.linalg.norm(forward)), 1e-6) + 0.004 * shin
    depth = float(points[1:, 2].mean()) + 0.002
    shoe = _part([points[2], heel, toe], [0.025 * g, 0.03, 0.023], depth, look.shoes, ids[2])
    return [*_limb(points, (0.06 * g, 0.043 * g, 0.026 * g), look.trouser_leg, look.skin, look.trousers, ids), shoe]


def _trunk(hips: np.ndarray, shoulders: np.ndarray, frame: np.ndarray, look: Look) -> list[Part]:
    g, low, high, forward = look.girth, hips.mean(0), shoulders.mean(0), frame[:, 2]
    waist, chest = low + 0.3 * (high - low), low + 0.72 * (high - low) + 0.01 * forward
    inner = high + 0.86 * (shoulders - high) + 0.01 * (low - high) / 0.3
    sides = waist + 0.75 * (hips - low)
    # A shoulder or hip turned far behind the trunk is hidden by it, though the trunk is the part it belongs to.
    seen = [k for j, mid, ids, half in ((shoulders, high, _SHOULDERS, look.shoulder), (hips, low, _HIPS, look.hip))
            for k, p in zip(ids, j, strict=True) if p[2] - mid[2] > -0.8 * half]  # fmt: skip
    depth = float(low[2] + high[2]) / 2
    pelvis = _part([*hips, *sides], [0.062 * g] * 2 + [0.055 * g] * 2, float(low[2]) + 0.01, look.trousers, *seen)
    hem = waist + 0.5 * (hips - waist)
    radii = [0.04, 0.04, 0.075 * g, *[0.057 * g] * 4]
    shirt = _part([*inner, chest, *sides, *hem], radii, depth + 0.02, look.shirt, *seen)
    lines = np.linspace(0.15, 0.85, look.num_stripes)
    bands = [_part((1 - t) * sides + t * inner, [0.012] * 2, depth + 0.021, 255 - look.shirt, *seen) for t in lines]
    front = [p + 0.07 * g * forward for p in (chest, waist)]
    buttons = [_part(front, [0.006] * 2, depth + 0.022, look.shirt * 0.45, *seen)] if forward[2] > 0.4 else []
    return [pelvis, shirt, *bands, *buttons]


def _head(neck: np.ndarray, frame: np.ndarray, trunk: np.ndarray, look: Look) -> tuple[np.ndarray, list[Part]]:
    """The five face keypoints (view frame) and the parts of head and neck; `neck` is midway between the shoulders."""
    s, center = look.head, neck - trunk[:, 1] * 0.03 - frame[:, 1] * 0.075 * look.head
    offsets, up, forward = s * _FACE @ frame.T, -frame[:, 1] * s, frame[:, 2] * s
    keypoints, skin = center + offsets, look.skin

    def at(points: list[np.ndarray], radii: list[float], color: np.ndarray, *shows: int, lift: float = 0.0) -> Part:
        inside = 0.1 * float(np.mean(points, axis=0)[2] - center[2])  # keep the head's parts together in depth
        return _part(points, [r * s for r in radii], float(center[2]) + 0.03 + inside + lift, color, *shows)

    shows = [k for k in (3, 4) if offsets[k][2] > -0.012 * s and not look.long_hair]
    face = at([center + 0.015 * forward, center - 0.036 * up + 0.018 * forward], [0.056, 0.04], skin, lift=2e-3)
    skull = at([center + 0.018 * up - 0.014 * forward, center + 0.006 * up - 0.02 * forward], [0.066, 0.06], look.hair)
    parts = [face, skull, *(at([keypoints[k]], [0.015], skin * 0.88, k, lift=2e-3) for k in shows)]
    for k in (1, 2):
        if offsets[k][2] > 0.004 * s:
            white, dark = np.full(3, 235.0), np.full(3, 35.0)
            parts += [at([keypoints[k]], [0.015], white, k, lift=4e-3), at([keypoints[k]], [0.007], dark, k, lift=5e-3)]
    if offsets[0][2] > -0.015 * s:
        bridge = keypoints[0] + 0.022 * up - 0.012 * forward
        parts.append(at([bridge, keypoints[0]], [0.006, 0.012], skin * 0.78, 0, lift=6e-3))
        corners = [center - 0.042 * up + 0.05 * forward + side * frame[:, 0] * s for side in (-0.016, 0.016)]
        parts.append(at(corners, [0.006] * 2, np.array([60.0, 50.0, 150.0]), lift=4e-3))
    if look.long_hair:
        tips = [center + x * frame[:, 0] - 0.03 * forward + 0.09 * trunk[:, 1] for x in (-0.05, 0.05)]
        depth = float(center[2]) - 0.05 * float(forward[2]) + 0.01
        parts.append(_part([center, *tips], [0.066 * s, 0.03, 0.03], depth, look.hair * 0.9))
    throat = [neck + 0.02 * trunk[:, 2], center - 0.03 * up]
    parts.append(_part(throat, [0.032, 0.03], float(neck[2]) + 0.03 * float(trunk[2, 2]) + 0.01, skin * 0.85))
    return keypoints, parts


def figure(pose: Pose, look: Look) -> tuple[np.ndarray, list[Part]]:
    """One person in the view frame, pelvis at the origin, unit: the standing height.

    Returns:
        the (17, 2) keypoints in COCO's order, and the parts from back to front.
    """
    frame = _rotation(*pose.view)
    trunk = frame @ _rotation(0.0, pose.lean[0], pose.lean[1])
    head = trunk @ _rotation(pose.head[0], pose.head[1], 0.0)
    sides = np.array([1, -1])
    hips = sides[:, None] * look.hip * frame[:, 0]
    neck = -0.3 * trunk[:, 1]
    shoulders = neck + sides[:, None] * look.shoulder * trunk[:, 0]
    arms = [_chain(shoulders[i], pose.arms[i], (0.168, 0.15), sides[i], trunk) for i in (0, 1)]
    legs = [_chain(hips[i], pose.legs[i], (0.238, 0.235), sides[i], frame) for i in (0, 1)]
    face, parts = _head(neck, head, trunk, look)
    parts += _trunk(hips, shoulders, trunk, look)
    for i in (0, 1):
        parts += _arm(arms[i], look, i) + _leg(legs[i], look, i, frame)
    limbs = [chain[j] for pair in (arms, legs) for j in range(3) for chain in pair]
    return np.vstack([face, limbs])[:, :2], sorted(parts, key=lambda p: p.depth)


def random_pose(rng: np.random.Generator) -> Pose:
    """Nine of ten face the camera, the rest show a side or the back; one in twenty is tilted strongly.

    The shares decide how hard the data are: with as many backs as faces, a small model needs several times the steps.
    """
    arm = _ARMS[rng.choice(len(_ARMS), 2, p=_ARM_SHARES)]
    if rng.random() < 0.5:  # both arms often do the same
        arm[1] = arm[0]
    stance = rng.choice(len(_LEGS), p=_LEG_SHARES)
    leg = _LEGS[stance][:: rng.choice([-1, 1])]
    angles = rng.uniform(*np.moveaxis(np.stack([arm, leg]), -1, 0)).reshape(2, 2, 2, 2)
    arms, legs = np.cumsum(angles, axis=2)
    facing = rng.choice([0.0, np.pi / 2, -np.pi / 2, np.pi], p=[0.9, 0.03, 0.03, 0.04])
    roll = rng.normal(0, 0.06) if rng.random() < 0.95 else rng.uniform(-1.2, 1.2)
    return Pose(
        arms=arms,
        legs=legs,
        lean=(rng.uniform(*_LEANS[stance]), rng.normal(0, 0.09)),
        head=(rng.normal(0, 0.35), rng.normal(0, 0.15)),
        view=(facing + rng.normal(0, 0.22), rng.uniform(-0.05, 0.35), roll),
    )


def random_look(rng: np.random.Generator) -> Look:
    """Any clothes on any skin and hair; the build varies by about a fifth."""
    shirt, trousers, shoes = rng.uniform(25, 235, (3, 3))
    skin, hair = SKINS[rng.integers(len(SKINS))], _HAIRS[rng.integers(len(_HAIRS))]
    return Look(
        skin=skin * rng.uniform(0.9, 1.08),
        hair=hair * rng.uniform(0.8, 1.1),
        shirt=shirt,
        trousers=trousers,
        shoes=shoes * 0.7,
        sleeve=rng.choice([0.25, 0.55, 1.3, 1.92], p=[0.1, 0.4, 0.1, 0.4]),
        trouser_leg=rng.choice([0.5, 0.85, 1.5, 1.92], p=[0.1, 0.25, 0.1, 0.55]),
        shoulder=rng.uniform(0.1, 0.128),
        hip=rng.uniform(0.055, 0.072),
        girth=rng.uniform(0.85, 1.2),
        head=rng.uniform(0.95, 1.2),
        long_hair=bool(rng.random() < 0.3),
        num_stripes=int(rng.choice([0, 2, 3, 4], p=[0.7, 0.1, 0.1, 0.1])),
    )


def shade(image: np.ndarray, shapes: Sequence[np.ndarray], colors: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Draw rounded parts, each the hull of circles (M, 3: x, y, radius in px), the first one at the back.

    Each has a dark rim, its color, and a lighter core on the side of the light.

    Returns:
        the parts' outlines, as polygons with `SHIFT` fractional bits.
    """
    flat = np.concatenate(shapes)
    core = np.column_stack([flat[:, :2] + _LIGHT_XY * flat[:, 2:], 0.5 * flat[:, 2]])
    layers = np.stack([flat + np.array([0, 0, 0.4]), flat - np.array([0, 0, 0.4]), core])
    layers[..., 2] = np.maximum(layers[..., 2], 0.3)
    points = layers[:, :, None, :2] + layers[:, :, None, 2:] * _CIRCLE_XY
    fixed = np.rint(points * (1 << SHIFT)).astype(np.int32)
    base = np.stack(colors)
    tones = np.clip(np.stack([0.68 * base, base, 1.02 * base + 9]), 0, 255).tolist()
    outlines, start = [], 0
    for i, shape in enumerate(shapes):
        stop = start + len(shape)
        hulls = [cv2.convexHull(layer[start:stop].reshape(-1, 2)) for layer in fixed]
        for hull, tone in zip(hulls, tones, strict=True):
            cv2.fillConvexPoly(image, hull, tone[i], cv2.LINE_AA, SHIFT)
        outlines.append(hulls[1])
        start = stop
    return outlines


def draw(image: np.ndarray, parts: Sequence[Part], height: float, origin_xy: np.ndarray) -> np.ndarray:
    """Draw one person into `image` (H, W, 3 uint8 BGR), its pelvis at `origin_xy` px, `height` px tall when upright.

    Returns:
        (H, W) uint8: 1 + the index in `parts` of the part on top at each pixel, 0 where the person is not.
    """
    top = np.zeros(image.shape[:2], np.uint8)
    shapes = [part.circles * height + [*origin_xy, 0.0] for part in parts]
    for i, outline in enumerate(shade(image, shapes, [part.color for part in parts]), start=1):
        cv2.fillConvexPoly(top, outline, i, cv2.LINE_8, SHIFT)
    return top


def label(keypoints_xy: np.ndarray, top: np.ndarray, parts: Sequence[Part], unhidden: np.ndarray) -> np.ndarray:
    """COCO's (17, 3) x, y, v of one person, px; `top` is from `draw`, `unhidden` (H, W bool) is False where
    something nearer covers the person."""
    h, w = top.shape
    out = np.zeros((len(keypoints_xy), 3))
    for k, (x, y) in enumerate(np.round(keypoints_xy, 1)):
        if 0 < x <= w - 1 and 0 < y <= h - 1:
            col, row = round(x), round(y)
            on_top = int(top[row, col])
            seen = on_top > 0 and k in parts[on_top - 1].shows and unhidden[row, col]
            out[k] = x, y, 2 if seen else 1
    return out
