"""Numba kernels of the mesh renderer: project the vertices, fill a z-buffer with triangle numbers, interpolate.

`no_type_check` keeps the tests' jaxtyping hook from wrapping what numba compiles.

The mesh has one vertex a pixel. Quad (y, x) has the corners a = (y, x), b = (y, x+1), c = (y+1, x), d = (y+1, x+1) and
the triangles 2 q = (a, b, c) and 2 q + 1 = (b, d, c), q = y (W - 1) + x. Inverse depth is affine in screen space: the
z-buffer holds 1/z (0 = empty) and attributes are interpolated perspective-correctly, after the visible triangle of each
pixel is known: their number does not slow the rasterization down.
"""

import math
from typing import no_type_check

import numba
import numpy as np

import l2m_viz.parallel  # noqa: F401 (says where compiled kernels are cached)

# Two triangles that share an edge must both claim a pixel on it, and the photo's border pixels lie on the outline:
# rounding must open neither. In px for the bounds, in px^2 (distance times edge length) for the edge functions.
_TOL = 1e-3


@numba.njit(parallel=True, cache=True)
@no_type_check
def project_vertices(points, valid, pose, K, near, screen, row_span):
    """Fill screen (H, W, 3) with (x px, y px, 1/z), 1/z = 0 where unusable, and row_span (H, 2) with min/max y px."""
    height, width = valid.shape
    for y in numba.prange(height):
        low, high = np.float32(np.inf), np.float32(-np.inf)
        for x in range(width):
            screen[y, x, 2] = 0.0
            if not valid[y, x]:
                continue
            px, py, pz = points[y, x, 0], points[y, x, 1], points[y, x, 2]
            z = pose[2, 0] * px + pose[2, 1] * py + pose[2, 2] * pz + pose[2, 3]
            if z < near:
                continue
            inverse = 1.0 / z
            cx = (pose[0, 0] * px + pose[0, 1] * py + pose[0, 2] * pz + pose[0, 3]) * inverse
            cy = (pose[1, 0] * px + pose[1, 1] * py + pose[1, 2] * pz + pose[1, 3]) * inverse
            v = K[1, 0] * cx + K[1, 1] * cy + K[1, 2]
            screen[y, x, 0] = K[0, 0] * cx + K[0, 1] * cy + K[0, 2]
            screen[y, x, 1] = v
            screen[y, x, 2] = inverse
            low, high = min(low, v), max(high, v)
        row_span[y, 0], row_span[y, 1] = low, high


@numba.njit(inline="always")
@no_type_check
def _corners(triangle, width):
    quad = triangle >> 1
    y, x = quad // (width - 1), quad % (width - 1)
    if triangle & 1:
        return y, x + 1, y + 1, x + 1, y + 1, x
    return y, x, y, x + 1, y + 1, x


@numba.njit(inline="always")
@no_type_check
def _fill(screen, triangle, first, last, inverse_depth, owner):
    """Rasterize one triangle into rows [first, last) of the z-buffer. Back faces write their depth, too."""
    y0, x0, y1, x1, y2, x2 = _corners(triangle, screen.shape[1])
    w0, w1, w2 = screen[y0, x0, 2], screen[y1, x1, 2], screen[y2, x2, 2]
    if w0 == 0.0 or w1 == 0.0 or w2 == 0.0:
        return
    ax, ay = screen[y0, x0, 0], screen[y0, x0, 1]
    bx, by = screen[y1, x1, 0], screen[y1, x1, 1]
    cx, cy = screen[y2, x2, 0], screen[y2, x2, 1]
    # a pixel's centre is at +0.5: rows whose centre lies in [min, max]
    top = max(first, math.ceil(min(ay, by, cy) - 0.5 - _TOL))
    bottom = min(last - 1, math.floor(max(ay, by, cy) - 0.5 + _TOL))
    left = max(0, math.ceil(min(ax, bx, cx) - 0.5 - _TOL))
    right = min(owner.shape[1] - 1, math.floor(max(ax, bx, cx) - 0.5 + _TOL))
    if top > bottom or left > right:
        return
    area = (bx - ax) * (cy - ay) - (by - ay) * (cx - ax)
    if area == 0.0:
        return
    sign = 1.0 if area > 0 else -1.0
    for y in range(top, bottom + 1):
        py = y + 0.5
        for x in range(left, right + 1):
            px = x + 0.5
            e0 = sign * ((cx - bx) * (py - by) - (cy - by) * (px - bx))
            e1 = sign * ((ax - cx) * (py - cy) - (ay - cy) * (px - cx))
            e2 = sign * ((bx - ax) * (py - ay) - (by - ay) * (px - ax))
            if e0 >= -_TOL and e1 >= -_TOL and e2 >= -_TOL:
                e0, e1, e2 = (
                    max(0.0, e0),
                    max(0.0, e1),
                    max(0.0, e2),
                )  # no extrapolation: slivers would fling depth
                inverse = (e0 * w0 + e1 * w1 + e2 * w2) / (e0 + e1 + e2)
                if inverse > inverse_depth[y, x]:
                    inverse_depth[y, x] = inverse
                    owner[y, x] = (
                        triangle if area > 0 else -2 - triangle
                    )  # a back face hides, but shows nothing


@numba.njit(parallel=True, cache=True)
@no_type_check
def rasterize_triangles(screen, row_span, keep, bands, inverse_depth, owner):
    """Fill inverse_depth (h, w) and owner (h, w): the front triangle's number, -1 empty, <= -2 seen from behind.

    Each band of target rows belongs to one thread and skips the source rows that cannot reach it: no two threads write
    the same pixel, so there are no atomics and the result does not depend on the number of threads.
    """
    height, width = screen.shape[0], screen.shape[1]
    rows = owner.shape[0]
    for band in numba.prange(bands):
        first, last = band * rows // bands, (band + 1) * rows // bands
        for y in range(height - 1):
            if (
                max(row_span[y, 1], row_span[y + 1, 1]) < first - 1
                or min(row_span[y, 0], row_span[y + 1, 0]) > last + 1
            ):
                continue
            for x in range(width - 1):
                quad = y * (width - 1) + x
                if keep[y, x, 0]:
                    _fill(screen, 2 * quad, first, last, inverse_depth, owner)
                if keep[y, x, 1]:
                    _fill(screen, 2 * quad + 1, first, last, inverse_depth, owner)


@numba.njit(parallel=True, cache=True)
@no_type_check
def interpolate(screen, attributes, owner, out):
    """Fill out (h, w, C) with the attributes (H, W, C) of the visible front faces, perspective-correct."""
    rows, columns = owner.shape
    channels = attributes.shape[2]
    for y in numba.prange(rows):
        for x in range(columns):
            triangle = owner[y, x]
            if triangle < 0:
                continue
            y0, x0, y1, x1, y2, x2 = _corners(triangle, screen.shape[1])
            ax, ay, bx, by = screen[y0, x0, 0], screen[y0, x0, 1], screen[y1, x1, 0], screen[y1, x1, 1]
            cx, cy = screen[y2, x2, 0], screen[y2, x2, 1]
            px, py = x + 0.5, y + 0.5
            w0 = max(0.0, (cx - bx) * (py - by) - (cy - by) * (px - bx)) * screen[y0, x0, 2]
            w1 = max(0.0, (ax - cx) * (py - cy) - (ay - cy) * (px - cx)) * screen[y1, x1, 2]
            w2 = max(0.0, (bx - ax) * (py - ay) - (by - ay) * (px - ax)) * screen[y2, x2, 2]
            scale = 1.0 / (w0 + w1 + w2)
            w0, w1, w2 = w0 * scale, w1 * scale, w2 * scale
            for c in range(channels):
                out[y, x, c] = (
                    w0 * attributes[y0, x0, c] + w1 * attributes[y1, x1, c] + w2 * attributes[y2, x2, c]
                )
