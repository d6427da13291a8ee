"""Head pose estimated from the five landmarks that alignment uses."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

# The landmarks on the mean adult head of the rendered faces (MakeHuman data, CC0), in centimetres: x to the
# right and y down in the image, z away from the camera; order as in the ArcFace template. The head is tilted
# by 15.1 degrees, at which the ArcFace template, an average photograph, looks straight ahead.
HEAD: NDArray[np.float64] = np.array(
    [
        [-3.11, -0.43, -1.59],
        [3.11, -0.43, -1.59],
        [0.0, 2.99, -5.45],
        [-2.41, 6.48, -3.99],
        [2.41, 6.48, -3.99],
    ]
)
_CENTRED = HEAD - HEAD.mean(axis=0)


class Pose(NamedTuple):
    """Estimated angles in degrees, `(...)` float64: where the face looks, and how the head is tilted.

    All are zero for the ArcFace template. `yaw` > 0 looks to the right of the image, `pitch` > 0 up,
    `roll` > 0 has the eye on the right of the image lower (clockwise). NaN where landmarks are not finite or
    lie on one line.
    """

    yaw: NDArray[np.float64]
    pitch: NDArray[np.float64]
    roll: NDArray[np.float64]


def head_pose(landmarks: NDArray[np.floating]) -> Pose:
    """Estimate the pose of faces from landmarks `(..., 5, 2)` in pixels, x right and y down.

    Scaled orthographic projection (DeMenthon and Davis, IJCV 15, 1995, its first step): with centred points q
    of the image and Q of the mean head, the matrix A = argmin |q - A Q|^2 is s R[:2]; the rows of R nearest
    to those of A are u v^T of its singular value decomposition u s v^T. The looking direction is -R[:, 2].

    These are estimates: perspective, expression and noses unlike the mean head shift them. On rendered faces,
    whose eye points lie in the middle of the eyeballs, yaw correlates with the truth by .98 and is a third
    too large; pitch and roll correlate by .72 and .75.
    """
    points = np.asarray(landmarks, np.float64)
    centred = points - points.mean(axis=-2, keepdims=True)
    usable = np.isfinite(centred).all(axis=(-2, -1))
    fitted = np.swapaxes(np.where(usable[..., None, None], centred, 0.0), -2, -1) @ np.linalg.pinv(_CENTRED).T
    left, scales, right = np.linalg.svd(fitted, full_matrices=False)
    # One singular value at zero leaves the turn open: all points on one line.
    usable &= scales[..., 1] > 1e-6 * np.maximum(scales[..., 0], 1e-12)
    rows = left @ right
    forward = -np.cross(rows[..., 0, :], rows[..., 1, :])
    depth = forward[..., 2]
    angles = (
        np.arctan2(-rows[..., 0, 2], -depth),
        np.arcsin(np.clip(rows[..., 1, 2], -1.0, 1.0)),
        np.arctan2(rows[..., 1, 0], rows[..., 0, 0]),
    )
    return Pose(*(np.where(usable, np.degrees(angle), np.nan) for angle in angles))
