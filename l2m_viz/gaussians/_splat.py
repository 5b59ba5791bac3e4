"""Numba kernels of the CPU splatter: project, bin into tiles, order each tile by depth, composite.

The functions have no annotations: `no_type_check` keeps jaxtyping's test hook from wrapping what numba compiles.

Same rules and constants as `l2m_viz.gaussians.reference`, where they are explained. What is different is the order of
work: a Gaussian touches only the pixels of its own ellipse inside each tile, and each tile belongs to one thread, which
writes straight into the output images. Nothing depends on the number of threads.
"""

import math
from typing import no_type_check

import numba
import numpy as np

import l2m_viz.parallel  # noqa: F401 (says where compiled kernels are cached)
from l2m_viz.gaussians.reference import FRUSTUM_MARGIN, MAX_ALPHA, MIN_ALPHA, MIN_TRANSMITTANCE

TILE = 16
# Columns of the projected Gaussians; MAX_POWER is the largest power with alpha >= MIN_ALPHA.
MEAN_X, MEAN_Y, CONIC_XX, CONIC_XY, CONIC_YY, OPACITY, MAX_POWER, EXTENT_X, EXTENT_Y, DEPTH = range(10)
NUM_COLUMNS = 10
_FAST = {"contract", "nsz", "arcp"}  # fused multiply-add and reciprocals; NaN and infinity keep their meaning
_ROW = _FAST | {"nnan"}  # in a row's arithmetic NaN cannot occur, and min and max become single instructions
_RADIX_BITS, _RADIX = 8, 256
_CHUNKS = 8  # of the Gaussians, for counting in parallel; more than cores is harmless
_LANES = 8  # pixels of a row that are blended at once when a Gaussian is narrow
_CHECK_EVERY = 64  # Gaussians after which a tile looks whether all of its pixels have ended
# A tile's working memory: planes of TILE * TILE floats.
_PLANES = 7
_RED, _GREEN, _BLUE, _DEPTH, _WEIGHT, _LAST = (np.uint64(plane * TILE * TILE) for plane in range(1, _PLANES))
_MAX_ALPHA, _MIN_ALPHA = np.float32(MAX_ALPHA), np.float32(MIN_ALPHA)
_MIN_TRANSMITTANCE, _ZERO = np.float32(MIN_TRANSMITTANCE), np.float32(0)
_EXP_LIMIT = np.float32(40)  # scales beyond e^40 or below e^-40 are drawn as that
_LOG2E, _LN2_HI, _LN2_LO = np.float32(1.44269504), np.float32(0.693359375), np.float32(-2.12194440e-4)


@numba.njit(inline="always", fastmath=_FAST)
@no_type_check
def _exp(x):
    """exp(x) for |x| < 80 to about 2e-7 relative: 2^n times a polynomial (Cephes' expf)."""
    n = np.floor(
        x * _LOG2E + np.float32(0.5)
    )  # np.floor keeps float32; math.floor would make an int64, and doubles of all
    x = x - n * _LN2_HI - n * _LN2_LO
    y = np.float32(1.9875691500e-4)
    y = y * x + np.float32(1.3981999507e-3)
    y = y * x + np.float32(8.3334519073e-3)
    y = y * x + np.float32(4.1665795894e-2)
    y = y * x + np.float32(1.6666665459e-1)
    y = y * x + np.float32(5.0000001201e-1)
    y = y * x * x + x + np.float32(1)
    return y * np.int32((np.int32(n) + 127) << 23).view(np.float32)


@numba.njit(inline="always")
@no_type_check
def _clamp_limits(K, hw):
    """Range of x/z and of y/z in which the projection's Jacobian is evaluated."""
    height, width = hw
    fx, fy, cx, cy = K[0, 0], K[1, 1], K[0, 2], K[1, 2]
    margin_x, margin_y = FRUSTUM_MARGIN * width / (2 * fx), FRUSTUM_MARGIN * height / (2 * fy)
    low_x, high_x = np.float32(-cx / fx - margin_x), np.float32((width - cx) / fx + margin_x)
    low_y, high_y = np.float32(-cy / fy - margin_y), np.float32((height - cy) / fy + margin_y)
    return low_x, high_x, low_y, high_y


@numba.njit(parallel=True, cache=True, fastmath=_FAST)
@no_type_check
def project_gaussians(means, quats, log_scales, logit_opacities, w2c, K, hw, near, far, eps2d, screen, tiles):
    """Fill screen (N, 10) and tiles (N, 4), the tile range x0, y0, x1, y1 of each Gaussian (empty when not drawn)."""
    height, width = hw
    fx, fy, cx, cy = K[0, 0], K[1, 1], K[0, 2], K[1, 2]
    low_x, high_x, low_y, high_y = _clamp_limits(K, hw)
    columns, rows = (width + TILE - 1) // TILE, (height + TILE - 1) // TILE
    for i in numba.prange(means.shape[0]):
        tiles[i, 0], tiles[i, 1], tiles[i, 2], tiles[i, 3] = 0, 0, 0, 0
        mx, my, mz = means[i, 0], means[i, 1], means[i, 2]
        z = w2c[2, 0] * mx + w2c[2, 1] * my + w2c[2, 2] * mz + w2c[2, 3]
        if z < near or z > far:
            continue
        opacity = np.float32(1) / (
            np.float32(1) + _exp(min(max(-logit_opacities[i], -_EXP_LIMIT), _EXP_LIMIT))
        )
        if opacity < _MIN_ALPHA:
            continue
        inv_z = np.float32(1) / z
        x = (w2c[0, 0] * mx + w2c[0, 1] * my + w2c[0, 2] * mz + w2c[0, 3]) * inv_z
        y = (w2c[1, 0] * mx + w2c[1, 1] * my + w2c[1, 2] * mz + w2c[1, 3]) * inv_z
        u, v = fx * x + cx, fy * y + cy
        x, y = min(max(x, low_x), high_x), min(max(y, low_y), high_y)
        # JW (2, 3) = projection Jacobian times world-to-camera rotation
        jx, jy = fx * inv_z, fy * inv_z
        a0 = jx * (w2c[0, 0] - x * w2c[2, 0])
        a1 = jx * (w2c[0, 1] - x * w2c[2, 1])
        a2 = jx * (w2c[0, 2] - x * w2c[2, 2])
        b0 = jy * (w2c[1, 0] - y * w2c[2, 0])
        b1 = jy * (w2c[1, 1] - y * w2c[2, 1])
        b2 = jy * (w2c[1, 2] - y * w2c[2, 2])
        qw, qx, qy, qz = quats[i, 0], quats[i, 1], quats[i, 2], quats[i, 3]
        two = np.float32(2) / (qw * qw + qx * qx + qy * qy + qz * qz)
        s0 = _exp(min(max(log_scales[i, 0], -_EXP_LIMIT), _EXP_LIMIT))
        s1 = _exp(min(max(log_scales[i, 1], -_EXP_LIMIT), _EXP_LIMIT))
        s2 = _exp(min(max(log_scales[i, 2], -_EXP_LIMIT), _EXP_LIMIT))
        # columns of JW R S, one scaled axis each; their outer products sum to the screen covariance
        one = np.float32(1)
        r00, r01, r02 = one - two * (qy * qy + qz * qz), two * (qx * qy - qw * qz), two * (qx * qz + qw * qy)
        r10, r11, r12 = two * (qx * qy + qw * qz), one - two * (qx * qx + qz * qz), two * (qy * qz - qw * qx)
        r20, r21, r22 = two * (qx * qz - qw * qy), two * (qy * qz + qw * qx), one - two * (qx * qx + qy * qy)
        p0, q0 = (a0 * r00 + a1 * r10 + a2 * r20) * s0, (b0 * r00 + b1 * r10 + b2 * r20) * s0
        p1, q1 = (a0 * r01 + a1 * r11 + a2 * r21) * s1, (b0 * r01 + b1 * r11 + b2 * r21) * s1
        p2, q2 = (a0 * r02 + a1 * r12 + a2 * r22) * s2, (b0 * r02 + b1 * r12 + b2 * r22) * s2
        xx = p0 * p0 + p1 * p1 + p2 * p2 + eps2d
        xy = p0 * q0 + p1 * q1 + p2 * q2
        yy = q0 * q0 + q1 * q1 + q2 * q2 + eps2d
        determinant = xx * yy - xy * xy
        if not determinant > 0:
            continue
        inverse = one / determinant
        max_power = math.log(opacity / _MIN_ALPHA)
        two_powers = np.float32(2) * max_power
        extent_x, extent_y = math.sqrt(two_powers * xx), math.sqrt(two_powers * yy)
        # pixel centres sit at +0.5; clip in float before converting, a huge Gaussian would overflow an int
        left, right = max(u - extent_x, np.float32(0)), min(u + extent_x, np.float32(width))
        top, bottom = max(v - extent_y, np.float32(0)), min(v + extent_y, np.float32(height))
        if not (left < right and top < bottom):
            continue
        screen[i, MEAN_X], screen[i, MEAN_Y] = u, v
        screen[i, CONIC_XX], screen[i, CONIC_XY], screen[i, CONIC_YY] = (
            yy * inverse,
            -xy * inverse,
            xx * inverse,
        )
        screen[i, OPACITY], screen[i, MAX_POWER] = opacity, max_power
        screen[i, EXTENT_X], screen[i, EXTENT_Y], screen[i, DEPTH] = extent_x, extent_y, z
        tiles[i, 0], tiles[i, 1] = int(left) // TILE, int(top) // TILE
        tiles[i, 2] = min(int(right) // TILE + 1, columns)
        tiles[i, 3] = min(int(bottom) // TILE + 1, rows)


@numba.njit(parallel=True, cache=True)
@no_type_check
def bin_into_tiles(tiles, columns, rows):
    """Lists of Gaussians for each tile, in the order of the input: return (start (tiles + 1), indices).

    The Gaussians are dealt to the threads in chunks; each counts, then fills its own part of every list.
    """
    n, num_tiles = tiles.shape[0], columns * rows
    cursor = np.zeros((_CHUNKS, num_tiles), np.int64)
    for chunk in numba.prange(_CHUNKS):
        for i in range(chunk * n // _CHUNKS, (chunk + 1) * n // _CHUNKS):
            for ty in range(tiles[i, 1], tiles[i, 3]):
                for tx in range(tiles[i, 0], tiles[i, 2]):
                    cursor[chunk, ty * columns + tx] += 1
    start = np.zeros(num_tiles + 1, np.int64)
    total = 0
    for tile in range(num_tiles):
        for chunk in range(_CHUNKS):
            count = cursor[chunk, tile]
            cursor[chunk, tile] = total
            total += count
        start[tile + 1] = total
    indices = np.empty(total, np.int32)
    for chunk in numba.prange(_CHUNKS):
        for i in range(chunk * n // _CHUNKS, (chunk + 1) * n // _CHUNKS):
            for ty in range(tiles[i, 1], tiles[i, 3]):
                for tx in range(tiles[i, 0], tiles[i, 2]):
                    tile = ty * columns + tx
                    indices[cursor[chunk, tile]] = i
                    cursor[chunk, tile] += 1
    return start, indices


@numba.njit(parallel=True, cache=True)
@no_type_check
def sort_tiles(start, indices, screen):
    """Order each tile's list by depth, ties by index, in place.

    A stable radix sort of the floats' bits (all positive, so they order like integers), counted from the tile's nearest
    depth: digits that no depth of the tile reaches need no pass.
    """
    for tile in numba.prange(start.shape[0] - 1):
        first, n = start[tile], start[tile + 1] - start[tile]
        if n < 2:
            continue
        keys, ids = np.empty((2, n), np.uint32), np.empty((2, n), np.int32)
        histogram = np.empty(_RADIX + 1, np.int32)
        nearest, farthest = np.uint32(0xFFFFFFFF), np.uint32(0)
        for k in range(n):
            i = indices[first + k]
            key = np.float32(screen[i, DEPTH]).view(np.uint32)
            keys[0, k], ids[0, k] = key, i
            nearest, farthest = min(nearest, key), max(farthest, key)
        span, shift, source = farthest - nearest, np.uint32(0), 0
        while shift < np.uint32(32) and (span >> shift) > np.uint32(0):
            histogram[:] = 0
            for k in range(n):
                digit = ((keys[source, k] - nearest) >> shift) & np.uint32(_RADIX - 1)
                histogram[digit + np.uint32(1)] += 1
            for digit in range(_RADIX):
                histogram[digit + 1] += histogram[digit]
            for k in range(n):
                digit = ((keys[source, k] - nearest) >> shift) & np.uint32(_RADIX - 1)
                place = histogram[digit]
                histogram[digit] = place + 1
                keys[1 - source, place], ids[1 - source, place] = keys[source, k], ids[source, k]
            source = 1 - source
            shift += np.uint32(_RADIX_BITS)
        for k in range(n):
            indices[first + k] = ids[source, k]


@numba.njit(inline="always", fastmath=_ROW)
@no_type_check
def _blend_row(planes, base, lanes, dx, half_xx, xy_dy, half_yy_dy2, gaussian, step):
    """Blend one Gaussian into ``lanes`` neighbouring pixels of a tile's row: no branches, so that it can be vectorised.

    A pixel that has ended holds its transmittance negated, which no Gaussian can pass.
    """
    opacity, max_power, z, red, green, blue = gaussian
    for x in range(lanes):
        p = base + np.uint64(x)
        offset = np.float32(x) + dx
        power = (half_xx * offset + xy_dy) * offset + half_yy_dy2
        alpha = min(_MAX_ALPHA, opacity * _exp(-min(max(power, _ZERO), np.float32(30))))
        alpha = alpha if (power <= max_power) & (power >= _ZERO) else _ZERO
        before = planes[p]
        after = before * (np.float32(1) - alpha)
        drawn = after > _MIN_TRANSMITTANCE
        weight = alpha * before if drawn else _ZERO
        planes[p] = after if drawn else -abs(before)
        planes[p + _RED] += weight * red
        planes[p + _GREEN] += weight * green
        planes[p + _BLUE] += weight * blue
        planes[p + _DEPTH] += weight * z
        planes[p + _WEIGHT] = weight
        planes[p + _LAST] = step if weight > _ZERO else planes[p + _LAST]


@numba.njit(parallel=True, cache=True, fastmath=_FAST)
@no_type_check
def composite_tiles(
    start, indices, screen, colors, features, columns, color, feature, depth, transmittance, last
):
    """Blend front to back; fill color (H, W, 3), feature (H, W, D), depth, transmittance and last (H, W).

    ``depth`` is the sum of weight times z; the caller divides by alpha. ``last`` is the position in ``indices`` of the
    last Gaussian drawn in each pixel, where the backward pass begins, or -1.
    """
    height, width = transmittance.shape
    channels = features.shape[1]
    for tile in numba.prange(start.shape[0] - 1):
        x_first, y_first = (tile % columns) * TILE, (tile // columns) * TILE
        wide, high = min(TILE, width - x_first), min(TILE, height - y_first)
        planes = np.zeros(_PLANES * TILE * TILE, np.float32)
        blended = np.zeros((TILE * TILE, channels), np.float32)
        planes[: TILE * TILE] = np.float32(-1)  # pixels outside the image have ended
        for y in range(high):
            planes[y * TILE : y * TILE + wide] = np.float32(1)
        first, n = start[tile], start[tile + 1] - start[tile]
        # Gather first: independent loads overlap their cache misses, those between branches would not.
        local = np.empty((n, NUM_COLUMNS + 3), np.float32)
        for k in range(n):
            i = np.uint64(indices[first + k])
            for c in range(NUM_COLUMNS):
                local[k, c] = screen[i, c]
            for c in range(3):
                local[k, NUM_COLUMNS + c] = colors[i, c]
        for k in range(n):
            if k % _CHECK_EVERY == _CHECK_EVERY - 1 and planes[: TILE * TILE].max() < 0:
                break
            g = local[k]
            # centre in coordinates of the tile in which pixel x has its centre at x
            mx = g[MEAN_X] - (np.float32(x_first) + np.float32(0.5))
            my = g[MEAN_Y] - (np.float32(y_first) + np.float32(0.5))
            top = max(0, int(np.ceil(max(my - g[EXTENT_Y], np.float32(-1)))))
            bottom = min(high - 1, int(np.floor(min(my + g[EXTENT_Y], np.float32(TILE)))))
            left = max(0, int(np.ceil(max(mx - g[EXTENT_X], np.float32(-1)))))
            right = min(wide - 1, int(np.floor(min(mx + g[EXTENT_X], np.float32(TILE)))))
            half_xx, xy, half_yy = np.float32(0.5) * g[CONIC_XX], g[CONIC_XY], np.float32(0.5) * g[CONIC_YY]
            gaussian = (
                g[OPACITY],
                g[MAX_POWER],
                g[DEPTH],
                g[NUM_COLUMNS],
                g[NUM_COLUMNS + 1],
                g[NUM_COLUMNS + 2],
            )
            step = np.float32(k + 1)
            i = np.uint64(indices[first + k])
            narrow = right - left < _LANES
            offset = min(left, TILE - _LANES) if narrow else 0
            dx = np.float32(offset) - mx
            for y in range(top, bottom + 1):
                dy = np.float32(y) - my
                base = np.uint64(y * TILE + offset)
                if narrow:
                    _blend_row(planes, base, _LANES, dx, half_xx, xy * dy, half_yy * dy * dy, gaussian, step)
                else:
                    _blend_row(planes, base, TILE, dx, half_xx, xy * dy, half_yy * dy * dy, gaussian, step)
                if channels > 0:
                    for x in range(left, right + 1):
                        p = np.uint64(y * TILE + x)
                        weight = planes[p + _WEIGHT]
                        for c in range(channels):
                            blended[p, c] += weight * features[i, c]
        for y in range(high):
            for x in range(wide):
                p, row, column = np.uint64(y * TILE + x), y_first + y, x_first + x
                transmittance[row, column] = abs(planes[p])
                depth[row, column] = planes[p + _DEPTH]
                color[row, column, 0] = planes[p + _RED]
                color[row, column, 1] = planes[p + _GREEN]
                color[row, column, 2] = planes[p + _BLUE]
                last[row, column] = first + np.int64(planes[p + _LAST]) - 1 if planes[p + _LAST] > 0 else -1
                for c in range(channels):
                    feature[row, column, c] = blended[p, c]
