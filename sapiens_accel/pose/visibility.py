"""What the v of a keypoint says. All that asks whether a keypoint has a label asks here.

0 absent    no label: what its x and y are means nothing
1 hidden    a label of what is covered
2 visible   a label

Other numbers are no v: `describe_odd` says what they seem to be. COCO-WholeBody's feet, face and hands have confidences
between 0 and 1 in places, which are labels.
"""

import numpy as np
from jaxtyping import Bool, Float
from numpy import ndarray as Array

ABSENT, HIDDEN, VISIBLE = 0, 1, 2


def is_labeled(keypoints: Float[Array, "*n 3"]) -> Bool[Array, "*n"]:
    """Whether each keypoint (x, y, v) has a label: v > 0."""
    return np.asarray(keypoints[..., 2] > ABSENT)


def is_visible(keypoints: Float[Array, "*n 3"]) -> Bool[Array, "*n"]:
    """Whether each keypoint has a label, and is not hidden."""
    return np.asarray(keypoints[..., 2] >= VISIBLE)


def has_unused_position(keypoints: Float[Array, "*n 3"]) -> Bool[Array, "*n"]:
    """Whether each keypoint has coordinates although it has no label: nothing is learned of it."""
    return ~is_labeled(keypoints) & np.asarray((keypoints[..., :2] != 0).any(axis=-1))


def is_odd(v: Float[Array, "*n"]) -> Bool[Array, "*n"]:
    """Whether each v says nothing: neither 1 nor 2, and above 0."""
    return np.asarray((v > ABSENT) & (v != HIDDEN) & (v != VISIBLE))


def describe_odd(v: float) -> str:
    """What is wrong with a v that `is_odd`, and what to do."""
    if v == 3:
        kind = "AI Challenger writes 1 (visible), 2 (hidden), 3 (not labeled): write 2, 1, 0"
    elif v < 1:
        kind = "a detector's scores look so: give --data.visibility_threshold, the score from which a keypoint counts"
    else:
        kind = "write 2 where a keypoint counts and 0 where not, or give --data.visibility_threshold"
    return f"expected v of 0 (not labeled), 1 (hidden) or 2 (visible) for each keypoint, found {v:g}; {kind}"


def apply_threshold(keypoints: Float[Array, "*n 3"], threshold: float) -> Float[Array, "*n 3"]:
    """Keypoints whose v is a score, as labels: v is 2 from the threshold on, else 0; infinity stays, to be refused."""
    labels, score = keypoints.copy(), keypoints[..., 2]
    labels[..., 2] = np.where(np.isposinf(score), score, np.where(score >= threshold, VISIBLE, ABSENT))
    return labels


def target_weights(v: Float[Array, "k"], hidden: float) -> Float[Array, "k"]:
    """The float32 weights of targets: 1 for a visible keypoint, `hidden` for any other with a label, else 0."""
    return np.where(v >= VISIBLE, 1.0, np.where(v > ABSENT, hidden, 0.0)).astype(np.float32)
