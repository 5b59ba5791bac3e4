"""Numba kernel of the correspondence between two posed depth maps; `ground_truth.warp_from_depth` says what it means.

`no_type_check` keeps the tests' jaxtyping hook from wrapping what numba compiles.

One pass over the pixels of A. With the rows of ``ray`` (3, 3) and ``offset`` (3,) made of K_B, R, t and K_A^-1 the
point of pixel p at depth z is seen at ray p z + offset: two pixels times depth, and depth.
"""

from typing import no_type_check

import numba
import numpy as np

import l2m_viz.parallel  # noqa: F401 (says where compiled kernels are cached)

_ZERO, _HALF, _ONE, _TWO = np.float32(0), np.float32(0.5), np.float32(1), np.float32(2)
_SMALLEST = np.float32(1e-12)  # as in `geometry.project`
_ALL = np.float32(1 - 1e-4)  # weight of known corners from which on a bilinear sample is known


@numba.njit(parallel=True, cache=True, fastmath={"contract", "nsz", "arcp"})
@no_type_check
def warp_rows(depth_A, valid_A, ray, offset, depth_B, valid_B, tol, warp, seen):
    """Fill warp (H, W, 2) and seen (H, W)."""
    height, width = depth_A.shape
    height_B, width_B = depth_B.shape
    to_x, to_y = _TWO / np.float32(width_B), _TWO / np.float32(height_B)
    own_x, own_y = _TWO / np.float32(width), _TWO / np.float32(height)
    for y in numba.prange(height):
        v = np.float32(y) + _HALF
        for x in range(width):
            u, z = np.float32(x) + _HALF, depth_A[y, x]
            z_B = z * (ray[2, 0] * u + ray[2, 1] * v + ray[2, 2]) + offset[2]
            seen[y, x] = False
            if not (valid_A[y, x] and z_B > _ZERO):
                warp[y, x, 0], warp[y, x, 1] = u * own_x - _ONE, v * own_y - _ONE
                continue
            inverse = _ONE / max(z_B, _SMALLEST)
            px = (z * (ray[0, 0] * u + ray[0, 1] * v + ray[0, 2]) + offset[0]) * inverse
            py = (z * (ray[1, 0] * u + ray[1, 1] * v + ray[1, 2]) + offset[1]) * inverse
            nx, ny = px * to_x - _ONE, py * to_y - _ONE
            warp[y, x, 0], warp[y, x, 1] = nx, ny
            if abs(nx) <= _ONE and abs(ny) <= _ONE:  # NaN is not
                seen[y, x] = _agrees(z_B, px - _HALF, py - _HALF, depth_B, valid_B, tol)


@numba.njit(forceinline=True)
@no_type_check
def _agrees(z, column, row, depth_B, valid_B, tol):
    """Whether B's depth at (column, row), counted from the first pixel's centre, is z: nearest or bilinear."""
    last_row, last_column = depth_B.shape[0] - 1, depth_B.shape[1] - 1
    column = min(max(column, _ZERO), np.float32(last_column))
    row = min(max(row, _ZERO), np.float32(last_row))
    y, x = int(np.rint(row)), int(np.rint(column))
    if valid_B[y, x] and abs(z / depth_B[y, x] - _ONE) < tol:
        return True
    top, left = int(row), int(column)
    bottom, right = min(top + 1, last_row), min(left + 1, last_column)
    down, across = row - np.float32(top), column - np.float32(left)
    known, inverse = _ZERO, _ZERO
    for y, x, weight in (
        (top, left, (_ONE - down) * (_ONE - across)),
        (top, right, (_ONE - down) * across),
        (bottom, left, down * (_ONE - across)),
        (bottom, right, down * across),
    ):
        if valid_B[y, x]:
            known += weight
            inverse += weight / depth_B[y, x]
    return known > _ALL and abs(z * inverse - _ONE) < tol
