"""Numba kernel of the correspondence between two posed depth maps; `ground_truth.warp_from_depth` says what it means.

`no_type_check` keeps the tests' jaxtyping hook from wrapping what numba compiles.

One pass over the pixels of A. With the rows of ``ray`` (3, 3) and ``offset`` (3,) made of K_B, R, t and K_A^-1 the
point of pixel p at depth z is seen at ray p z + offset: two pixels times depth, and depth. Eight neighbours are
one value, as in `l2m_viz._simd`; B is read as inverse depth, 0 where it is unknown.
"""

from typing import no_type_check

import numba
import numpy as np

import l2m_viz.parallel  # noqa: F401 (says where compiled kernels are cached)
from l2m_viz._simd import (
    LANES,
    floor,
    greater,
    load_at,
    load_column,
    maximum,
    minimum,
    ramp,
    splat,
    store_column,
    where_greater,
)

_FAST = {"contract", "nsz", "arcp"}
_ZERO, _HALF, _ONE, _TWO = np.float32(0), np.float32(0.5), np.float32(1), np.float32(2)
_SMALLEST = np.float32(1e-12)  # as in `geometry.project`
_ALL = np.float32(1 - 1e-4)  # weight of known corners from which on a bilinear sample is known
_BEYOND = np.nextafter(_ONE, _TWO)  # |x| < this is |x| <= 1, and false for NaN
_TO_WHOLE = np.float32(
    1.5 * 2**23
)  # a float32 of this size has no room for fractions: they are rounded to even


@numba.njit(parallel=True, cache=True, fastmath=_FAST, error_model="numpy")
@no_type_check
def warp_rows(depth_A, valid_A, ray, offset, depth_B, valid_B, tol, inverse_B, warp, seen):
    """Fill warp (H, W, 2) and seen (H, W); inverse_B, of B's size, is working memory."""
    height, width = depth_A.shape
    hw_B = depth_B.shape
    flat_depth, flat_valid = depth_A.reshape(-1, 1), valid_A.reshape(-1, 1)
    flat_inverse, flat_warp = inverse_B.reshape(-1), warp.reshape(-1, 2)
    to_x, to_y = _TWO / np.float32(hw_B[1]), _TWO / np.float32(hw_B[0])
    own_x, own_y = _TWO / np.float32(width), _TWO / np.float32(height)
    zero, one, column = splat(_ZERO), splat(_ONE), np.uint64(0)
    for y in numba.prange(hw_B[0]):
        for x in range(hw_B[1]):
            inverse_B[y, x] = _ONE / depth_B[y, x] if valid_B[y, x] else _ZERO
    for y in numba.prange(height):
        v, end = np.float32(y) + _HALF, np.uint64(y * width + width - 1)
        for x in range(0, width, LANES):
            i, u = np.uint64(y * width + x), ramp() + (np.float32(x) + _HALF)
            z, known = load_column(flat_depth, i, end, column), load_column(flat_valid, i, end, column)
            z_B = z * (ray[2, 0] * u + (ray[2, 1] * v + ray[2, 2])) + offset[2]
            front = where_greater(z_B, zero, known, zero)
            inverse = one / maximum(z_B, splat(_SMALLEST))
            px = (z * (ray[0, 0] * u + (ray[0, 1] * v + ray[0, 2])) + offset[0]) * inverse
            py = (z * (ray[1, 0] * u + (ray[1, 1] * v + ray[1, 2])) + offset[1]) * inverse
            nx, ny = px * to_x - _ONE, py * to_y - _ONE
            inside = where_greater(splat(_BEYOND), _magnitude(nx), front, zero)
            inside = where_greater(splat(_BEYOND), _magnitude(ny), inside, zero)
            nx = where_greater(front, zero, nx, u * own_x - _ONE)
            ny = where_greater(front, zero, ny, splat(v * own_y - _ONE))
            store_column(flat_warp, i, end, column, nx)
            store_column(flat_warp, i, end, np.uint64(1), ny)
            agree = _agrees(inside, z_B, px - _HALF, py - _HALF, flat_inverse, hw_B, tol)
            for lane in range(min(LANES, width - x)):
                seen[y, x + lane] = (agree >> lane) & 1 != 0


@numba.njit(forceinline=True, fastmath=_FAST)
@no_type_check
def _magnitude(a):
    return maximum(a, splat(_ZERO) - a)


@numba.njit(forceinline=True, fastmath=_FAST)
@no_type_check
def _agrees(inside, z, column, row, inverse_B, hw, tol):
    """Bits of the lanes where B's depth at (column, row), counted from the first pixel's centre, is z.

    Nearest or bilinear.
    """
    candidates = greater(inside, splat(_ZERO))
    if candidates == 0:
        return candidates
    zero, one, to_whole = splat(_ZERO), splat(_ONE), splat(_TO_WHOLE)
    width, last = hw[1], hw[0] * hw[1] - 1
    last_column, last_row = splat(np.float32(hw[1] - 1)), splat(np.float32(hw[0] - 1))
    column, row = minimum(maximum(column, zero), last_column), minimum(maximum(row, zero), last_row)
    nearest = load_at(inverse_B, (column + to_whole) - to_whole, (row + to_whole) - to_whole, width, last)
    off = where_greater(nearest, zero, _magnitude(z * nearest - one), one + tol)
    agree = candidates & greater(splat(tol), off)
    if agree == candidates:
        return agree
    left, top = floor(column), floor(row)
    right, bottom = minimum(left + _ONE, last_column), minimum(top + _ONE, last_row)
    across, down = column - left, row - top
    known, inverse = zero, zero
    for x, y, weight in (
        (left, top, (one - down) * (one - across)),
        (right, top, (one - down) * across),
        (left, bottom, down * (one - across)),
        (right, bottom, down * across),
    ):
        corner = load_at(inverse_B, x, y, width, last)
        known = known + where_greater(corner, zero, weight, zero)
        inverse = inverse + weight * corner
    off = where_greater(known, splat(_ALL), _magnitude(z * inverse - one), one + tol)
    return agree | (candidates & greater(splat(tol), off))
