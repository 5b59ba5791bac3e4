"""Numba kernels of the mesh renderer: cut the mesh, project it, fill a z-buffer with triangle numbers, interpolate.

`no_type_check` keeps the tests' jaxtyping hook from wrapping what numba compiles.

The mesh has one vertex a pixel. Quad (y, x) has the corners a = (y, x), b = (y, x+1), c = (y+1, x), d = (y+1, x+1) and
the triangles 2 q = (a, b, c) and 2 q + 1 = (b, d, c), q = 2^k y + x with 2^k >= W (shifts, not divisions, find a
triangle's corners again). Inverse depth is affine in screen space: the
z-buffer holds 1/z (0 = empty) and attributes are interpolated perspective-correctly, after the visible triangle of each
pixel is known: their number does not slow the rasterization down. Most triangles cover a pixel or none: eight of them
are tested against the few pixels around each at once, and only those that grew large are filled one by one.
"""

import math
from typing import no_type_check

import numba
import numpy as np

import l2m_viz.parallel  # noqa: F401 (says where compiled kernels are cached)
from l2m_viz._simd import (
    LANES,
    floor,
    greater,
    load,
    load_column,
    lowest_bit,
    maximum,
    minimum,
    ramp,
    splat,
    store,
    where_greater,
)

# Two triangles that share an edge must both claim a pixel on it, and the photo's border pixels lie on the outline:
# rounding must open neither. In px for the bounds, in px^2 (distance times edge length) for the edge functions.
_TOL = np.float32(1e-3)
PADDING = (
    2 * LANES
)  # columns beyond the last vertex of each row, of depth infinity: whole vectors can be read
_MAX_SPAN = 3  # px; triangles that reach over more pixels than this plus one are filled one by one
_FAST = {"contract", "nsz", "arcp"}
_ZERO, _HALF, _ONE, _INFINITY = np.float32(0), np.float32(0.5), np.float32(1), np.float32(np.inf)


@numba.njit(parallel=True, cache=True, fastmath=_FAST)
@no_type_check
def cut_mesh(depth, valid, max_ratio, keep, across, cut):
    """Fill keep (H-1, W-1, 2), the triangles that lie on one surface, and cut (H, W), the corners of those that do not.

    A triangle with an unknown corner is neither. ``across`` (2, H+1, W+1) is working memory, zeros all around.
    """
    height, width = depth.shape
    for y in numba.prange(height - 1):
        for x in range(width - 1):
            b, c = depth[y, x + 1], depth[y + 1, x]
            near, far, known = (
                min(b, c),
                max(b, c),
                valid[y, x + 1] & valid[y + 1, x],
            )  # of the shared diagonal
            z, exists = depth[y, x], known & valid[y, x]
            one_surface = max(far, z) <= min(near, z) * max_ratio
            keep[y, x, 0], across[0, y + 1, x + 1] = exists & one_surface, exists & (not one_surface)
            z, exists = depth[y + 1, x + 1], known & valid[y + 1, x + 1]
            one_surface = max(far, z) <= min(near, z) * max_ratio
            keep[y, x, 1], across[1, y + 1, x + 1] = exists & one_surface, exists & (not one_surface)
    # A pixel is a, b or c of the upper triangles of the quads at its lower right, lower left and upper right, and b, c
    # or d of the lower ones of those at its lower left, upper right and upper left.
    for y in numba.prange(height):
        for x in range(width):
            upper = across[0, y + 1, x + 1] | across[0, y + 1, x] | across[0, y, x + 1]
            cut[y, x] = upper | across[1, y + 1, x] | across[1, y, x + 1] | across[1, y, x]


@numba.njit(parallel=True, cache=True, fastmath=_FAST)
@no_type_check
def project_vertices(depth, valid, K_from, pose, K_to, near, screen, row_span):
    """Lift pixels to vertices and project them.

    Fill screen (3, H, W + PADDING) with x px, y px and 1/z (0 where unusable), row_span (H, 2) with min and max y px.
    """
    height, width = depth.shape
    flat_depth, flat_valid, flat_screen = depth.reshape(-1, 1), valid.reshape(-1, 1), screen.reshape(-1)
    stride, plane = screen.shape[2], screen.shape[1] * screen.shape[2]
    last, column = np.uint64(height * width - 1), np.uint64(0)
    inv_fx, inv_fy, cx, cy = _ONE / K_from[0, 0], _ONE / K_from[1, 1], K_from[0, 2], K_from[1, 2]
    infinity, zero = splat(_INFINITY), splat(_ZERO)
    for y in numba.prange(height):
        ray_y = (np.float32(y) + _HALF - cy) * inv_fy
        low, high = infinity, zero - infinity
        for x in range(0, stride - LANES + 1, LANES):
            place = ramp() + np.float32(x)
            i = np.uint64(y * width + min(x, width - 1))
            z = load_column(flat_depth, i, last, column)
            ray_x = (place + (_HALF - cx)) * inv_fx
            px, py = ray_x * z, z * ray_y
            seen = where_greater(
                splat(np.float32(width) - _HALF), place, load_column(flat_valid, i, last, column), zero
            )
            z_to = pose[2, 0] * px + pose[2, 1] * py + pose[2, 2] * z + pose[2, 3]
            seen = where_greater(splat(near), z_to, zero, seen)
            inverse = where_greater(seen, zero, _ONE / z_to, zero)
            x_to = (pose[0, 0] * px + pose[0, 1] * py + pose[0, 2] * z + pose[0, 3]) * inverse
            y_to = (pose[1, 0] * px + pose[1, 1] * py + pose[1, 2] * z + pose[1, 3]) * inverse
            v = K_to[1, 1] * y_to + K_to[1, 2]
            p = np.uint64(y * stride + x)
            store(flat_screen, p, K_to[0, 0] * x_to + K_to[0, 2])
            store(flat_screen, p + np.uint64(plane), v)
            store(flat_screen, p + np.uint64(2 * plane), inverse)
            low = minimum(low, where_greater(seen, zero, v, infinity))
            high = maximum(high, where_greater(seen, zero, v, zero - infinity))
        ends = np.empty(2 * LANES, np.float32)
        store(ends, np.uint64(0), low)
        store(ends, np.uint64(LANES), high)
        row_span[y, 0], row_span[y, 1] = ends[:LANES].min(), ends[LANES:].max()


@numba.njit(forceinline=True)
@no_type_check
def _row_bits(width):
    """K of the triangles' numbers."""
    bits = 0
    while (1 << bits) < width:
        bits += 1
    return bits


@numba.njit(forceinline=True)
@no_type_check
def _corners(triangle, row_bits):
    quad = triangle >> 1
    y, x = quad >> row_bits, quad & ((1 << row_bits) - 1)
    if triangle & 1:
        return y, x + 1, y + 1, x + 1, y + 1, x
    return y, x, y, x + 1, y + 1, x


@numba.njit(error_model="numpy")
@no_type_check
def _fill(screen, triangle, row_bits, first, last, inverse_depth, owner):
    """Rasterize one triangle into rows [first, last) of the z-buffer. Back faces write their depth, too."""
    y0, x0, y1, x1, y2, x2 = _corners(triangle, row_bits)
    ax, ay, w0 = screen[0, y0, x0], screen[1, y0, x0], screen[2, y0, x0]
    bx, by, w1 = screen[0, y1, x1], screen[1, y1, x1], screen[2, y1, x1]
    cx, cy, w2 = screen[0, y2, x2], screen[1, y2, x2], screen[2, y2, x2]
    # a pixel's centre is at +0.5: rows whose centre lies in [min, max]
    top = max(first, math.ceil(max(min(ay, by, cy), -1e6) - 0.5 - _TOL))
    bottom = min(last - 1, math.floor(min(max(ay, by, cy), 1e6) - 0.5 + _TOL))
    left = max(0, math.ceil(max(min(ax, bx, cx), -1e6) - 0.5 - _TOL))
    right = min(owner.shape[1] - 1, math.floor(min(max(ax, bx, cx), 1e6) - 0.5 + _TOL))
    area = (bx - ax) * (cy - ay) - (by - ay) * (cx - ax)
    sign = 1.0 if area > 0 else -1.0
    for y in range(top, bottom + 1):
        py = y + 0.5
        for x in range(left, right + 1):
            px = x + 0.5
            e0 = sign * ((cx - bx) * (py - by) - (cy - by) * (px - bx))
            e1 = sign * ((ax - cx) * (py - cy) - (ay - cy) * (px - cx))
            e2 = sign * ((bx - ax) * (py - ay) - (by - ay) * (px - ax))
            if e0 >= -_TOL and e1 >= -_TOL and e2 >= -_TOL:
                # no extrapolation: slivers would fling depth
                e0, e1, e2 = max(0.0, e0), max(0.0, e1), max(0.0, e2)
                inverse = (e0 * w0 + e1 * w1 + e2 * w2) / (e0 + e1 + e2)
                if inverse > inverse_depth[y, x]:
                    inverse_depth[y, x] = inverse
                    # a back face hides, but shows nothing
                    owner[y, x] = triangle if area > 0 else -2 - triangle


@numba.njit(forceinline=True, fastmath=_FAST)
@no_type_check
def _fill_eight(screen, triangle, row_bits, a, b, c, kept, first, last, inverse_depth, owner, scratch):
    """Rasterize the triangles ``triangle``, + 2, ..., + 14 with the corners a, b, c, each (x, y, 1/z) of eight."""
    (ax, ay, w0), (bx, by, w1), (cx, cy, w2) = a, b, c
    zero, one = splat(_ZERO), splat(_ONE)
    kept = where_greater(minimum(w0, minimum(w1, w2)), zero, kept, zero)
    # a pixel's centre is at +0.5: rows whose centre lies in [min, max]
    low, high = _HALF + _TOL, _HALF - _TOL
    left = zero - floor(low - minimum(ax, minimum(bx, cx)))
    right = floor(maximum(ax, maximum(bx, cx)) - high)
    top = zero - floor(low - minimum(ay, minimum(by, cy)))
    bottom = floor(maximum(ay, maximum(by, cy)) - high)
    left, right = maximum(left, zero), minimum(right, splat(np.float32(owner.shape[1] - 1)))
    top, bottom = maximum(top, splat(np.float32(first))), minimum(bottom, splat(np.float32(last - 1)))
    area = (bx - ax) * (cy - ay) - (by - ay) * (cx - ax)
    size = maximum(area, zero - area)
    kept = where_greater(size, zero, kept, zero)
    wide, high_ = right - left, bottom - top
    kept = where_greater(zero, wide, zero, where_greater(zero, high_, zero, kept))
    bits = greater(kept, zero)
    if bits == 0:
        return
    big = greater(kept, zero) & (
        greater(wide, splat(np.float32(_MAX_SPAN))) | greater(high_, splat(np.float32(_MAX_SPAN)))
    )
    bits &= ~big
    while big != 0:
        lane = lowest_bit(big)
        big &= big - 1
        _fill(screen, triangle + 2 * lane, row_bits, first, last, inverse_depth, owner)
    if bits == 0:
        return
    sign = where_greater(area, zero, one, zero - one)
    store(scratch, np.uint64(LANES), left)
    store(scratch, np.uint64(2 * LANES), top)
    store(scratch, np.uint64(3 * LANES), area)
    # Edge functions at the first pixel, and their steps to the right and down.
    x, y = left + _HALF, top + _HALF
    e0 = sign * ((cx - bx) * (y - by) - (cy - by) * (x - bx))
    e1 = sign * ((ax - cx) * (y - cy) - (ay - cy) * (x - cx))
    e2 = sign * ((bx - ax) * (y - ay) - (by - ay) * (x - ax))
    r0, r1, r2 = sign * (by - cy), sign * (cy - ay), sign * (ay - by)
    d0, d1, d2 = sign * (cx - bx), sign * (ax - cx), sign * (bx - ax)
    faintest = splat(-_TOL)
    for j in range(_MAX_SPAN + 1):
        step_y = np.float32(j)
        row_bits = bits & ~greater(splat(step_y), high_)
        if row_bits == 0:
            break
        f0, f1, f2 = e0 + d0 * step_y, e1 + d1 * step_y, e2 + d2 * step_y
        for i in range(_MAX_SPAN + 1):
            step_x = np.float32(i)
            left_bits = row_bits & ~greater(splat(step_x), wide)
            if left_bits == 0:
                break
            g0, g1, g2 = f0 + r0 * step_x, f1 + r1 * step_x, f2 + r2 * step_x
            hits = left_bits & ~greater(faintest, minimum(g0, minimum(g1, g2)))
            if hits == 0:
                continue
            # no extrapolation: slivers would fling depth
            g0, g1, g2 = maximum(g0, zero), maximum(g1, zero), maximum(g2, zero)
            store(scratch, np.uint64(0), (g0 * w0 + g1 * w1 + g2 * w2) / (g0 + g1 + g2))
            while hits != 0:
                lane = lowest_bit(hits)
                hits &= hits - 1
                column, row = int(scratch[LANES + lane]) + i, int(scratch[2 * LANES + lane]) + j
                inverse = scratch[lane]
                if inverse > inverse_depth[row, column]:
                    inverse_depth[row, column] = inverse
                    number = triangle + 2 * lane
                    # a back face hides, but shows nothing
                    owner[row, column] = number if scratch[3 * LANES + lane] > _ZERO else -2 - number


@numba.njit(parallel=True, cache=True, fastmath=_FAST, error_model="numpy")
@no_type_check
def rasterize_triangles(screen, row_span, keep, bands, inverse_depth, owner):
    """Fill inverse_depth (h, w) and owner (h, w): the front triangle's number, -1 empty, <= -2 seen from behind.

    Each band of target rows belongs to one thread and skips the source rows that cannot reach it: no two threads write
    the same pixel, so there are no atomics and the result does not depend on the number of threads.
    """
    height, stride = screen.shape[1], screen.shape[2]
    width, plane = stride - PADDING, screen.shape[1] * screen.shape[2]
    rows, row_bits = owner.shape[0], _row_bits(width)
    flat, flat_keep = screen.reshape(-1), keep.reshape(-1, 2)
    quads = np.uint64((height - 1) * (width - 1) - 1)
    for band in numba.prange(bands):
        first, last = band * rows // bands, (band + 1) * rows // bands
        scratch = np.empty(4 * LANES, np.float32)
        for y in range(height - 1):
            if (
                max(row_span[y, 1], row_span[y + 1, 1]) < first - 1
                or min(row_span[y, 0], row_span[y + 1, 0]) > last + 1
            ):
                continue
            for x in range(0, width - 1, LANES):
                p = np.uint64(y * stride + x)
                q, u = p + np.uint64(plane), p + np.uint64(2 * plane)
                right, down = np.uint64(1), np.uint64(stride)
                a = load(flat, p), load(flat, q), load(flat, u)
                b = load(flat, p + right), load(flat, q + right), load(flat, u + right)
                c = load(flat, p + down), load(flat, q + down), load(flat, u + down)
                d = load(flat, p + down + right), load(flat, q + down + right), load(flat, u + down + right)
                quad, triangle = y * (width - 1) + x, ((y << row_bits) | x) << 1
                # lanes beyond the last quad of the row hold vertices of depth infinity
                upper = load_column(flat_keep, np.uint64(quad), quads, np.uint64(0))
                _fill_eight(
                    screen, triangle, row_bits, a, b, c, upper, first, last, inverse_depth, owner, scratch
                )
                lower = load_column(flat_keep, np.uint64(quad), quads, np.uint64(1))
                _fill_eight(
                    screen, triangle + 1, row_bits, b, d, c, lower, first, last, inverse_depth, owner, scratch
                )


@numba.njit(parallel=True, cache=True, fastmath=_FAST, error_model="numpy")
@no_type_check
def interpolate(screen, attributes, inverse_depth, owner, out, depth):
    """Fill out (h, w, C) with the attributes (H, W, C) of the visible front faces, perspective-correct; and depth."""
    rows, columns = owner.shape
    channels, row_bits = attributes.shape[2], _row_bits(attributes.shape[1])
    for y in numba.prange(rows):
        py = np.float32(y) + _HALF
        for x in range(columns):
            triangle = owner[y, x]
            if triangle < 0:
                depth[y, x] = _ZERO
                for c in range(channels):
                    out[y, x, c] = _ZERO
                continue
            depth[y, x] = _ONE / inverse_depth[y, x]
            y0, x0, y1, x1, y2, x2 = _corners(np.int64(triangle), row_bits)
            ax, ay, bx, by = screen[0, y0, x0], screen[1, y0, x0], screen[0, y1, x1], screen[1, y1, x1]
            cx, cy = screen[0, y2, x2], screen[1, y2, x2]
            px = np.float32(x) + _HALF
            w0 = max(_ZERO, (cx - bx) * (py - by) - (cy - by) * (px - bx)) * screen[2, y0, x0]
            w1 = max(_ZERO, (ax - cx) * (py - cy) - (ay - cy) * (px - cx)) * screen[2, y1, x1]
            w2 = max(_ZERO, (bx - ax) * (py - ay) - (by - ay) * (px - ax)) * screen[2, y2, x2]
            scale = _ONE / (w0 + w1 + w2)
            w0, w1, w2 = w0 * scale, w1 * scale, w2 * scale
            for c in range(channels):
                out[y, x, c] = (
                    w0 * attributes[y0, x0, c] + w1 * attributes[y1, x1, c] + w2 * attributes[y2, x2, c]
                )
