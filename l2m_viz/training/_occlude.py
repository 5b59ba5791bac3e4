"""Numba kernel of `occluders.put_into`: one view of a pair, with one more flat thing in it.

`no_type_check` keeps the tests' jaxtyping hook from wrapping what numba compiles.

One pass over the pixels, in place. Most of them neither show the thing nor lose sight of what it hides in the other
view, and are left after two looks at its coverage.
"""

import math
from typing import no_type_check

import numba
import numpy as np

import l2m_viz.parallel  # noqa: F401 (says where compiled kernels are cached)

_ZERO, _HALF, _ONE, _TWO = np.float32(0), np.float32(0.5), np.float32(1), np.float32(2)
_SMALLEST = np.float32(1e-6)
_NOWHERE = np.float32(-1e4)  # px: finite, as truth has to be where nothing is covisible


@numba.njit(parallel=True, cache=True, error_model="numpy")
@no_type_check
def occlude(
    image, depth, valid, warp, seen, other_depth, other_valid, alpha, color, to_A, to_other, other_to_A, plane,
    other_plane, behind, box, other_box, front,
):  # fmt: skip
    """Change image (H, W, 3), depth, valid, warp (H, W, 2) and seen of one view in place; front (H, W) is filled.

    The maps of the other view are those before the change. Homographies (3, 3) lead from this view's pixels to A's and
    to the other's, and from the other's to A's. ``plane`` (4,) holds the linear form of z's inverse times the plane's
    distance, and that distance; ``behind`` (4,) the form that gives z in the other camera of a point at depth 1, and
    what is added. ``box`` (4,) is left, top, right and bottom of where the thing may be, in pixels of this view,
    ``other_box`` of the other one.
    """
    height, width = depth.shape
    half_w, half_h = np.float32(width) / _TWO, np.float32(height) / _TWO
    for y in numba.prange(height):
        v = np.float32(y) + _HALF
        for x in range(width):
            u = np.float32(x) + _HALF
            old_x, old_y = (warp[y, x, 0] + _ONE) * half_w, (warp[y, x, 1] + _ONE) * half_h
            if seen[y, x] and _inside(other_box, old_x, old_y):
                in_x, in_y = _mapped(other_to_A, old_x, old_y)
                if _covered(alpha, in_x, in_y) >= _HALF:
                    z_plane = _depth(other_plane, old_x, old_y)
                    z_scene = depth[y, x] * (behind[0] * u + behind[1] * v + behind[2]) + behind[3]
                    if z_plane > _ZERO and z_plane < z_scene:
                        seen[y, x] = False
            front[y, x] = False
            if not _inside(box, u, v):
                continue
            in_x, in_y = _mapped(to_A, u, v)
            share = _covered(alpha, in_x, in_y)
            if share == _ZERO:
                continue
            z = _depth(plane, u, v)
            if not (z > _ZERO and (not valid[y, x] or z < depth[y, x])):
                continue
            for c in range(3):
                image[y, x, c] += share * (_color(color, in_x, in_y, c) - image[y, x, c])
            if share < _HALF:
                continue
            target_x, target_y = _mapped(to_other, u, v)
            z_there = _depth(other_plane, target_x, target_y)
            n_x, n_y = target_x / half_w - _ONE, target_y / half_h - _ONE
            inside = abs(n_x) <= _ONE and abs(n_y) <= _ONE
            shown = inside and z_there > _ZERO
            if shown:
                row = min(max(int(np.rint(target_y - _HALF)), 0), height - 1)
                column = min(max(int(np.rint(target_x - _HALF)), 0), width - 1)
                shown = not other_valid[row, column] or z_there < other_depth[row, column]
            depth[y, x], valid[y, x], front[y, x], seen[y, x] = z, True, True, shown
            warp[y, x, 0], warp[y, x, 1] = n_x, n_y


@numba.njit(inline="always")
@no_type_check
def _inside(box, x, y):
    """Whether a pixel lies in a box."""
    return x >= box[0] and y >= box[1] and x <= box[2] and y <= box[3]


@numba.njit(inline="always")
@no_type_check
def _mapped(homography, x, y):
    """A pixel through a homography; what goes behind the camera is far outside every image."""
    w = homography[2, 0] * x + homography[2, 1] * y + homography[2, 2]
    if not w > _SMALLEST:
        return _NOWHERE, _NOWHERE
    return (
        (homography[0, 0] * x + homography[0, 1] * y + homography[0, 2]) / w,
        (homography[1, 0] * x + homography[1, 1] * y + homography[1, 2]) / w,
    )


@numba.njit(inline="always")
@no_type_check
def _depth(plane, x, y):
    """Z of the plane at a pixel; not positive where it lies behind the camera."""
    slope = plane[0] * x + plane[1] * y + plane[2]
    return plane[3] / (slope if abs(slope) >= _SMALLEST else -_SMALLEST)


@numba.njit(inline="always")
@no_type_check
def _covered(alpha, x, y):
    """Coverage at a place, bilinear, nothing outside."""
    height, width = alpha.shape
    if not (x > -_HALF and y > -_HALF and x < width + _HALF and y < height + _HALF):
        return _ZERO
    left, top = math.floor(x - _HALF), math.floor(y - _HALF)
    across, down = x - _HALF - np.float32(left), y - _HALF - np.float32(top)
    total = _ZERO
    for row, high in ((top, _ONE - down), (top + 1, down)):
        for column, wide in ((left, _ONE - across), (left + 1, across)):
            if 0 <= row < height and 0 <= column < width:
                total += high * wide * alpha[row, column]
    return total


@numba.njit(inline="always")
@no_type_check
def _color(color, x, y, c):
    """A channel of the colour at a place, bilinear, borders repeated."""
    height, width = color.shape[:2]
    x, y = (
        min(max(x - _HALF, _ZERO), np.float32(width - 1)),
        min(max(y - _HALF, _ZERO), np.float32(height - 1)),
    )
    left, top = min(math.floor(x), width - 2), min(math.floor(y), height - 2)
    across, down = x - np.float32(left), y - np.float32(top)
    upper = color[top, left, c] * (_ONE - across) + color[top, left + 1, c] * across
    lower = color[top + 1, left, c] * (_ONE - across) + color[top + 1, left + 1, c] * across
    return upper * (_ONE - down) + lower * down
