"""Numba kernels of the CPU splatter: project, bin into tiles, order each tile by depth, composite.

The functions have no annotations: `no_type_check` keeps jaxtyping's test hook from wrapping what numba compiles.

Same rules and constants as `l2m_viz.gaussians.reference`, where they are explained. What is different is the order of
work: a Gaussian touches only the pixels of its own ellipse inside each tile, eight of a row at once (`_simd`), and each
tile belongs to one thread, which writes straight into the output images. Nothing depends on the number of threads.
"""

import math
from typing import no_type_check

import numba
import numpy as np

import l2m_viz.parallel  # noqa: F401 (says where compiled kernels are cached)
from l2m_viz._simd import (
    LANES,
    exp2,
    floor,
    greater,
    highest_bit,
    load,
    load_column,
    log2,
    lowest_bit,
    maximum,
    minimum,
    negative_magnitude,
    next_of,
    prefetch,
    ramp,
    splat,
    sqrt,
    store,
    store_column,
    where_greater,
)
from l2m_viz.gaussians.reference import FRUSTUM_MARGIN, MAX_ALPHA, MIN_ALPHA, MIN_TRANSMITTANCE

# Pixels. With 32 a pixel-aligned Gaussian is listed 1.13 times on average, with 16 it is 1.41 times, each time at full
# cost; with 64 a tile's working memory outgrows the nearest caches, and 24 and 64 measured slower.
TILE = 32
# Columns of the projected Gaussians; a row is one cache line of 64 bytes, with three floats to spare. Alpha is
# 2^(log2 of opacity - log2(e) * power); up to EXTENT from the mean it is at least MIN_ALPHA.
MEAN_X, MEAN_Y, CONIC_XX, CONIC_XY, CONIC_YY, OPACITY, LOG2_OPACITY, EXTENT_X, EXTENT_Y, DEPTH = range(10)
RED, GREEN, BLUE = range(10, 13)
NUM_COLUMNS = 16
_FAST = {"contract", "nsz", "arcp"}  # fused multiply-add and reciprocals; NaN and infinity keep their meaning
_RADIX_BITS, _RADIX = 8, 256
_CHUNKS = 8  # of the Gaussians, for counting in parallel; more than cores is harmless
_CHECK_EVERY = 64  # Gaussians after which a tile looks whether all of its pixels have ended
_AHEAD = 8  # Gaussians; how early their rows are asked for
_LINE = 16  # floats in a cache line
# A tile's working memory, row by row: TILE floats of each plane. (Planes one after another would lie multiples of 1024
# bytes apart, and a load that follows a store 4096 bytes away waits for it.)
_RED, _GREEN, _BLUE, _DEPTH, _WEIGHT, _LAST = (np.uint64(plane * TILE) for plane in range(1, 7))
_ROW = 7 * TILE
_BLOCK = 4 * LANES  # channels that are blended in registers
_MAX_ALPHA, _MIN_TRANSMITTANCE = np.float32(MAX_ALPHA), np.float32(MIN_TRANSMITTANCE)
_ZERO, _HALF, _ONE, _TWO = np.float32(0), np.float32(0.5), np.float32(1), np.float32(2)
_LOG2E, _LN2 = np.float32(math.log2(math.e)), np.float32(math.log(2))
_LOG2_MIN_ALPHA, _LOG2_NOTHING = np.float32(math.log2(MIN_ALPHA)), np.float32(-20)
_EXP_LIMIT = np.float32(40)  # scales and logits beyond +-40 are drawn as that


@numba.njit(forceinline=True, fastmath=_FAST)
@no_type_check
def _clamp_limits(K, hw):
    """Range of x/z and of y/z in which the projection's Jacobian is evaluated."""
    height, width = np.float32(hw[0]), np.float32(hw[1])
    fx, fy, cx, cy = K[0, 0], K[1, 1], K[0, 2], K[1, 2]
    margin_x, margin_y = (
        np.float32(FRUSTUM_MARGIN / 2) * width / fx,
        np.float32(FRUSTUM_MARGIN / 2) * height / fy,
    )
    return (
        -cx / fx - margin_x,
        (width - cx) / fx + margin_x,
        -cy / fy - margin_y,
        (height - cy) / fy + margin_y,
    )


@numba.njit(forceinline=True, fastmath=_FAST)
@no_type_check
def _exp(x):
    """exp(x), x held at +-40."""
    return exp2(maximum(minimum(x, splat(_EXP_LIMIT)), splat(-_EXP_LIMIT)) * _LOG2E)


@numba.njit(forceinline=True, fastmath=_FAST)
@no_type_check
def _rotation(w, x, y, z):
    """Rotation matrix of a quaternion of any length, row by row."""
    s = _TWO / (w * w + x * x + y * y + z * z)
    r00, r01, r02 = _ONE - s * (y * y + z * z), s * (x * y - w * z), s * (x * z + w * y)
    r10, r11, r12 = s * (x * y + w * z), _ONE - s * (x * x + z * z), s * (y * z - w * x)
    r20, r21, r22 = s * (x * z - w * y), s * (y * z + w * x), _ONE - s * (x * x + y * y)
    return r00, r01, r02, r10, r11, r12, r20, r21, r22


@numba.njit(parallel=True, cache=True, fastmath=_FAST)
@no_type_check
def project_gaussians(
    means, quats, log_scales, logit_opacities, colors, w2c, K, hw, near, far, eps2d, screen, tiles
):
    """Fill screen (N, 16) and tiles (N, 4), the tile range x0, y0, x1, y1 of each Gaussian (empty when not drawn)."""
    fx, fy, cx, cy = K[0, 0], K[1, 1], K[0, 2], K[1, 2]
    low_x, high_x, low_y, high_y = _clamp_limits(K, hw)
    width, height = np.float32(hw[1]), np.float32(hw[0])
    columns, rows = np.float32((hw[1] + TILE - 1) // TILE), np.float32((hw[0] + TILE - 1) // TILE)
    zero, one, per_tile = splat(_ZERO), splat(_ONE), np.float32(1 / TILE)
    c0, c1, c2, c3 = np.uint64(0), np.uint64(1), np.uint64(2), np.uint64(3)
    logits = logit_opacities.reshape(-1, 1)
    n = np.uint64(means.shape[0] - 1)
    for block in numba.prange((means.shape[0] + LANES - 1) // LANES):
        i = np.uint64(block * LANES)
        mx, my, mz = load_column(means, i, n, c0), load_column(means, i, n, c1), load_column(means, i, n, c2)
        x = w2c[0, 0] * mx + w2c[0, 1] * my + w2c[0, 2] * mz + w2c[0, 3]
        y = w2c[1, 0] * mx + w2c[1, 1] * my + w2c[1, 2] * mz + w2c[1, 3]
        z = w2c[2, 0] * mx + w2c[2, 1] * my + w2c[2, 2] * mz + w2c[2, 3]
        visible = where_greater(splat(near), z, zero, one)
        visible = where_greater(z, splat(far), zero, visible)
        dilution = one + _exp(_ZERO - load_column(logits, i, n, c0))
        opacity, log2_opacity = one / dilution, _ZERO - log2(dilution)
        log2_range = log2_opacity - _LOG2_MIN_ALPHA
        visible = where_greater(zero, log2_range, zero, visible)
        inv_z = one / z
        x, y = x * inv_z, y * inv_z
        u, v = fx * x + cx, fy * y + cy
        x = minimum(maximum(x, splat(low_x)), splat(high_x))
        y = minimum(maximum(y, splat(low_y)), splat(high_y))
        # JW (2, 3) = projection Jacobian times world-to-camera rotation
        jx, jy = fx * inv_z, fy * inv_z
        a0, a1, a2 = (
            jx * (w2c[0, 0] - x * w2c[2, 0]),
            jx * (w2c[0, 1] - x * w2c[2, 1]),
            jx * (w2c[0, 2] - x * w2c[2, 2]),
        )
        b0, b1, b2 = (
            jy * (w2c[1, 0] - y * w2c[2, 0]),
            jy * (w2c[1, 1] - y * w2c[2, 1]),
            jy * (w2c[1, 2] - y * w2c[2, 2]),
        )
        qw, qx = load_column(quats, i, n, c0), load_column(quats, i, n, c1)
        qy, qz = load_column(quats, i, n, c2), load_column(quats, i, n, c3)
        r00, r01, r02, r10, r11, r12, r20, r21, r22 = _rotation(qw, qx, qy, qz)
        s0, s1 = _exp(load_column(log_scales, i, n, c0)), _exp(load_column(log_scales, i, n, c1))
        s2 = _exp(load_column(log_scales, i, n, c2))
        # columns of JW R S, one scaled axis each; their outer products sum to the screen covariance
        p0, q0 = (a0 * r00 + a1 * r10 + a2 * r20) * s0, (b0 * r00 + b1 * r10 + b2 * r20) * s0
        p1, q1 = (a0 * r01 + a1 * r11 + a2 * r21) * s1, (b0 * r01 + b1 * r11 + b2 * r21) * s1
        p2, q2 = (a0 * r02 + a1 * r12 + a2 * r22) * s2, (b0 * r02 + b1 * r12 + b2 * r22) * s2
        xx = p0 * p0 + p1 * p1 + p2 * p2 + eps2d
        xy = p0 * q0 + p1 * q1 + p2 * q2
        yy = q0 * q0 + q1 * q1 + q2 * q2 + eps2d
        determinant = xx * yy - xy * xy
        visible = where_greater(determinant, zero, visible, zero)
        inverse = one / determinant
        two_powers = _TWO * _LN2 * log2_range
        extent_x, extent_y = sqrt(two_powers * xx), sqrt(two_powers * yy)
        # pixel centres sit at +0.5; clipped as floats, a huge Gaussian would overflow an integer
        left, right = maximum(u - extent_x, zero), minimum(u + extent_x, splat(width))
        top, bottom = maximum(v - extent_y, zero), minimum(v + extent_y, splat(height))
        visible = where_greater(right, left, visible, zero)
        visible = where_greater(bottom, top, visible, zero)
        right, bottom = floor(right * per_tile) + _ONE, floor(bottom * per_tile) + _ONE
        store_column(tiles, i, n, c0, where_greater(visible, zero, floor(left * per_tile), zero))
        store_column(tiles, i, n, c1, where_greater(visible, zero, floor(top * per_tile), zero))
        store_column(tiles, i, n, c2, where_greater(visible, zero, minimum(right, splat(columns)), zero))
        store_column(tiles, i, n, c3, where_greater(visible, zero, minimum(bottom, splat(rows)), zero))
        store_column(screen, i, n, np.uint64(MEAN_X), u)
        store_column(screen, i, n, np.uint64(MEAN_Y), v)
        store_column(screen, i, n, np.uint64(CONIC_XX), yy * inverse)
        store_column(screen, i, n, np.uint64(CONIC_XY), (_ZERO - xy) * inverse)
        store_column(screen, i, n, np.uint64(CONIC_YY), xx * inverse)
        store_column(screen, i, n, np.uint64(OPACITY), opacity)
        store_column(screen, i, n, np.uint64(LOG2_OPACITY), log2_opacity)
        store_column(screen, i, n, np.uint64(EXTENT_X), extent_x)
        store_column(screen, i, n, np.uint64(EXTENT_Y), extent_y)
        store_column(screen, i, n, np.uint64(DEPTH), z)
        store_column(screen, i, n, np.uint64(RED), load_column(colors, i, n, c0))
        store_column(screen, i, n, np.uint64(GREEN), load_column(colors, i, n, c1))
        store_column(screen, i, n, np.uint64(BLUE), load_column(colors, i, n, c2))


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
            for ty in range(np.int64(tiles[i, 1]), np.int64(tiles[i, 3])):
                for tx in range(np.int64(tiles[i, 0]), np.int64(tiles[i, 2])):
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
            for ty in range(np.int64(tiles[i, 1]), np.int64(tiles[i, 3])):
                for tx in range(np.int64(tiles[i, 0]), np.int64(tiles[i, 2])):
                    tile = ty * columns + tx
                    indices[cursor[chunk, tile]] = i
                    cursor[chunk, tile] += 1
    return start, indices


@numba.njit(forceinline=True, fastmath=_FAST)
@no_type_check
def sort_by_depth(indices, screen):
    """Order one tile's list by depth, ties by index, in place.

    A stable radix sort of the floats' bits (all positive, so they order like integers), counted from the tile's nearest
    depth: digits that no depth of the tile reaches need no pass. It also brings the tile's rows into the cache.
    """
    n = indices.shape[0]
    keys, ids = np.empty((2, n), np.uint32), np.empty((2, n), np.int32)
    histogram = np.empty(_RADIX + 1, np.int32)
    nearest, farthest = np.uint32(0xFFFFFFFF), np.uint32(0)
    for k in range(n):
        i = indices[k]
        key = np.float32(screen[np.uint64(i), DEPTH]).view(np.uint32)
        keys[0, k], ids[0, k] = key, i
        nearest, farthest = min(nearest, key), max(farthest, key)
    if n < 2:
        return
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
        indices[k] = ids[source, k]


@numba.njit(forceinline=True, fastmath=_FAST)
@no_type_check
def _reach(row, x_first, y_first, wide, high):
    """Where a Gaussian lies in a tile: its centre, first and last row, first column (of a whole vector), last column.

    In the tile's coordinates pixel x has its centre at x.
    """
    mx, my = row[MEAN_X] - (np.float32(x_first) + _HALF), row[MEAN_Y] - (np.float32(y_first) + _HALF)
    top = max(0, int(np.ceil(max(my - row[EXTENT_Y], -_ONE))))
    bottom = min(high - 1, int(np.floor(min(my + row[EXTENT_Y], np.float32(TILE)))))
    left = max(0, int(np.ceil(max(mx - row[EXTENT_X], -_ONE))))
    right = min(wide - 1, int(np.floor(min(mx + row[EXTENT_X], np.float32(TILE)))))
    offset = min(left, TILE - LANES) if right - left < LANES else 0
    return mx, my, top, bottom, offset, right


@numba.njit(forceinline=True, fastmath=_FAST)
@no_type_check
def _log2_falloff(row):
    """Coefficients of dx^2, dx dy and dy^2 in log2 of alpha."""
    return -_HALF * _LOG2E * row[CONIC_XX], -_LOG2E * row[CONIC_XY], -_HALF * _LOG2E * row[CONIC_YY]


@numba.njit(forceinline=True, fastmath=_FAST)
@no_type_check
def _alpha(log2_alpha, log2_opacity):
    """Alpha: capped, and zero where it is too faint (or where rounding makes the power negative)."""
    alpha = minimum(exp2(maximum(log2_alpha, splat(_LOG2_NOTHING))), splat(_MAX_ALPHA))
    alpha = where_greater(splat(_LOG2_MIN_ALPHA), log2_alpha, splat(_ZERO), alpha)
    return where_greater(log2_alpha, splat(log2_opacity), splat(_ZERO), alpha)


@numba.njit(forceinline=True, fastmath=_FAST)
@no_type_check
def _take_light(planes, p, alpha):
    """Take a Gaussian's share of the light that reaches eight pixels: return its weights, and lower T.

    A pixel that has ended holds its transmittance negated, which no Gaussian can pass.
    """
    before = load(planes, p)
    after = before - before * alpha
    drawn = after - _MIN_TRANSMITTANCE
    store(planes, p, where_greater(drawn, splat(_ZERO), after, negative_magnitude(before)))
    return where_greater(drawn, splat(_ZERO), alpha * before, splat(_ZERO))


@numba.njit(forceinline=True, fastmath=_FAST)
@no_type_check
def _open_tile(planes, stride, wide, high):
    """Set T = 1 inside the image, and -1 outside: ended."""
    for y in range(TILE):
        for x in range(TILE):
            planes[y * stride + x] = _ONE if y < high and x < wide else -_ONE


@numba.njit(forceinline=True, fastmath=_FAST)
@no_type_check
def _has_ended(planes, stride):
    """No pixel of the tile is open."""
    highest = splat(-_ONE)
    for y in range(TILE):
        for x in range(0, TILE, LANES):
            highest = maximum(highest, load(planes, np.uint64(y * stride + x)))
    return greater(highest, splat(_ZERO)) == 0


@numba.njit(forceinline=True, fastmath=_FAST)
@no_type_check
def _copy(source, start, target, place, count):
    """Copy ``count`` floats."""
    whole = count - count % LANES
    for c in range(0, whole, LANES):
        store(target, place + np.uint64(c), load(source, start + np.uint64(c)))
    for c in range(whole, count):
        target[place + np.uint64(c)] = source[start + np.uint64(c)]


@numba.njit(forceinline=True, fastmath=_FAST)
@no_type_check
def _prefetch_row(array, row, width):
    """Ask for a row of a flat (N, width) array."""
    for c in range(0, width, _LINE):
        prefetch(array, row * np.uint64(width) + np.uint64(c))


@numba.njit(forceinline=True, fastmath=_FAST)
@no_type_check
def _blend_features(planes, values, blended, padded, top, bottom, row_first, row_last):
    """Add weight times values (padded) to blended (TILE * TILE * padded) in each row's pixels."""
    for v in range(0, padded - padded % _BLOCK, _BLOCK):
        c0 = np.uint64(v)
        c1, c2, c3 = c0 + np.uint64(LANES), c0 + np.uint64(2 * LANES), c0 + np.uint64(3 * LANES)
        f0, f1, f2, f3 = load(values, c0), load(values, c1), load(values, c2), load(values, c3)
        for y in range(top, bottom + 1):
            for x in range(row_first[y], row_last[y] + 1):
                weight = splat(planes[np.uint64(y * _ROW + x) + _WEIGHT])
                p = np.uint64(y * TILE + x) * np.uint64(padded)
                store(blended, p + c0, load(blended, p + c0) + weight * f0)
                store(blended, p + c1, load(blended, p + c1) + weight * f1)
                store(blended, p + c2, load(blended, p + c2) + weight * f2)
                store(blended, p + c3, load(blended, p + c3) + weight * f3)
    for v in range(padded - padded % _BLOCK, padded, LANES):
        c0 = np.uint64(v)
        f0 = load(values, c0)
        for y in range(top, bottom + 1):
            for x in range(row_first[y], row_last[y] + 1):
                weight = splat(planes[np.uint64(y * _ROW + x) + _WEIGHT])
                p = np.uint64(y * TILE + x) * np.uint64(padded) + c0
                store(blended, p, load(blended, p) + weight * f0)


@numba.njit(parallel=True, cache=True, fastmath=_FAST)
@no_type_check
def composite_tiles(
    start, indices, screen, features, columns, workers, color, feature, depth, transmittance, last
):
    """Order each tile's list and blend it; fill color (H, W, 3), feature (H, W, D), depth, transmittance, last (H, W).

    ``depth`` is the sum of weight times z; the caller divides by alpha. ``last`` is the number of Gaussians of the
    tile's list up to the last one drawn in each pixel, where the backward pass begins.
    """
    height, width = transmittance.shape
    channels = features.shape[1]
    padded = (channels + LANES - 1) // LANES * LANES
    flat_features, flat_feature, flat_screen = features.reshape(-1), feature.reshape(-1), screen.reshape(-1)
    counter = np.zeros(1, np.int64)
    for _ in numba.prange(workers):
        planes, blended = np.empty(_ROW * TILE, np.float32), np.empty(TILE * TILE * padded, np.float32)
        values = np.zeros(padded, np.float32)
        row_first, row_last = np.empty(TILE, np.int64), np.empty(TILE, np.int64)
        while True:
            tile = next_of(counter)  # tiles differ in cost, and other programs hold up a core
            if tile >= start.shape[0] - 1:
                break
            x_first, y_first = (tile % columns) * TILE, (tile // columns) * TILE
            wide, high = min(TILE, width - x_first), min(TILE, height - y_first)
            planes[:] = 0
            blended[:] = 0
            _open_tile(planes, _ROW, wide, high)
            listed = indices[start[tile] : start[tile + 1]]
            sort_by_depth(listed, screen)
            n = listed.shape[0]
            for k in range(n):
                if k % _CHECK_EVERY == _CHECK_EVERY - 1 and _has_ended(planes, _ROW):
                    break
                ahead = np.uint64(listed[min(k + _AHEAD, n - 1)])
                prefetch(flat_screen, ahead * np.uint64(NUM_COLUMNS))
                _prefetch_row(flat_features, ahead, channels)
                i = np.uint64(listed[k])
                row = screen[i]
                mx, my, top, bottom, offset, right = _reach(row, x_first, y_first, wide, high)
                xx, xy, yy = _log2_falloff(row)
                log2_opacity, step = row[LOG2_OPACITY], splat(np.float32(k + 1))
                red, green, blue, z = splat(row[RED]), splat(row[GREEN]), splat(row[BLUE]), splat(row[DEPTH])
                for y in range(top, bottom + 1):
                    dy = np.float32(y) - my
                    linear, constant = xy * dy, yy * dy * dy + log2_opacity
                    bits = np.int64(0)
                    for x in range(offset, right + 1, LANES):
                        p = np.uint64(y * _ROW + x)
                        dx = ramp() + (np.float32(x) - mx)
                        alpha = _alpha((dx * xx + linear) * dx + constant, log2_opacity)
                        weight = _take_light(planes, p, alpha)
                        store(planes, p + _RED, load(planes, p + _RED) + weight * red)
                        store(planes, p + _GREEN, load(planes, p + _GREEN) + weight * green)
                        store(planes, p + _BLUE, load(planes, p + _BLUE) + weight * blue)
                        store(planes, p + _DEPTH, load(planes, p + _DEPTH) + weight * z)
                        store(
                            planes,
                            p + _LAST,
                            where_greater(weight, splat(_ZERO), step, load(planes, p + _LAST)),
                        )
                        store(planes, p + _WEIGHT, weight)
                        bits |= greater(weight, splat(_ZERO)) << x
                    row_first[y], row_last[y] = lowest_bit(bits), highest_bit(bits)
                if channels > 0:
                    _copy(flat_features, i * np.uint64(channels), values, np.uint64(0), channels)
                    _blend_features(planes, values, blended, padded, top, bottom, row_first, row_last)
            for y in range(high):
                for x in range(wide):
                    p, row, column = np.uint64(y * _ROW + x), y_first + y, x_first + x
                    transmittance[row, column] = abs(planes[p])
                    depth[row, column] = planes[p + _DEPTH]
                    color[row, column, 0] = planes[p + _RED]
                    color[row, column, 1] = planes[p + _GREEN]
                    color[row, column, 2] = planes[p + _BLUE]
                    last[row, column] = np.int32(planes[p + _LAST])
                    q = np.uint64(row * width + column) * np.uint64(channels)
                    _copy(blended, np.uint64(y * TILE + x) * np.uint64(padded), flat_feature, q, channels)
