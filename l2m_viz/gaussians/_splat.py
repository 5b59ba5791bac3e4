"""Numba kernels of the CPU splatter: project, order by depth, bin into tiles, composite.

The functions have no annotations: `no_type_check` keeps jaxtyping's test hook from wrapping what numba compiles.

Same rules and constants as `l2m_viz.gaussians.reference`, where they are explained. What is different is the order of
work: a Gaussian touches only the pixels of its own ellipse inside each tile, and each tile belongs to one thread, which
writes straight into the output images. Nothing depends on the number of threads.
"""

import math
from typing import no_type_check

import numba
import numpy as np

from l2m_viz.gaussians.reference import FRUSTUM_MARGIN, MAX_ALPHA, MIN_ALPHA, MIN_TRANSMITTANCE

TILE = 16
# Columns of the projected Gaussians; MAX_POWER is the largest power with alpha >= MIN_ALPHA.
MEAN_X, MEAN_Y, CONIC_XX, CONIC_XY, CONIC_YY, OPACITY, MAX_POWER, EXTENT_X, EXTENT_Y, DEPTH = range(10)
NUM_COLUMNS = 10
_FAST = {"contract", "nsz", "arcp"}  # fused multiply-add and reciprocals; NaN and infinity keep their meaning
_RADIX_BITS = 11
_MAX_ALPHA, _MIN_ALPHA = np.float32(MAX_ALPHA), np.float32(MIN_ALPHA)
_MIN_TRANSMITTANCE = np.float32(MIN_TRANSMITTANCE)
_LOG2E, _LN2_HI, _LN2_LO = np.float32(1.44269504), np.float32(0.693359375), np.float32(-2.12194440e-4)


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
        opacity = np.float32(1) / (np.float32(1) + math.exp(-logit_opacities[i]))
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
        s0, s1, s2 = math.exp(log_scales[i, 0]), math.exp(log_scales[i, 1]), math.exp(log_scales[i, 2])
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
        extent_x, extent_y = math.sqrt(2 * max_power * xx), math.sqrt(2 * max_power * yy)
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


@numba.njit(cache=True)
@no_type_check
def order_by_depth(screen, tiles):
    """Indices of the drawn Gaussians by depth, ties by index: stable radix sort of the floats' bits (all positive)."""
    n = screen.shape[0]
    count = 0
    for i in range(n):
        count += tiles[i, 2] > tiles[i, 0]
    keys, order = np.empty(count, np.uint32), np.empty(count, np.int32)
    keys2, order2 = np.empty(count, np.uint32), np.empty(count, np.int32)
    count = 0
    for i in range(n):
        if tiles[i, 2] > tiles[i, 0]:
            keys[count], order[count] = np.float32(screen[i, DEPTH]).view(np.uint32), i
            count += 1
    size = 1 << _RADIX_BITS
    for shift in (0, _RADIX_BITS, 2 * _RADIX_BITS):
        start = np.zeros(size + 1, np.int64)
        for k in range(count):
            start[((keys[k] >> np.uint32(shift)) & np.uint32(size - 1)) + 1] += 1
        for b in range(size):
            start[b + 1] += start[b]
        for k in range(count):
            digit = (keys[k] >> np.uint32(shift)) & np.uint32(size - 1)
            keys2[start[digit]], order2[start[digit]] = keys[k], order[k]
            start[digit] += 1
        keys, keys2, order, order2 = keys2, keys, order2, order
    return order


@numba.njit(cache=True)
@no_type_check
def bin_into_tiles(order, tiles, columns, rows):
    """Lists of Gaussians for each tile, nearest first: return (start (tiles + 1), indices)."""
    start = np.zeros(columns * rows + 1, np.int64)
    for i in order:
        for ty in range(tiles[i, 1], tiles[i, 3]):
            for tx in range(tiles[i, 0], tiles[i, 2]):
                start[ty * columns + tx + 1] += 1
    for t in range(columns * rows):
        start[t + 1] += start[t]
    indices, cursor = np.empty(start[-1], np.int32), start[:-1].copy()
    for i in order:
        for ty in range(tiles[i, 1], tiles[i, 3]):
            for tx in range(tiles[i, 0], tiles[i, 2]):
                t = ty * columns + tx
                indices[cursor[t]] = i
                cursor[t] += 1
    return start, indices


@numba.njit(inline="always", fastmath=_FAST)
@no_type_check
def _exp_negative(power):
    """exp(-power) for 0 <= power < 80 to about 2e-7 relative: 2^n times a polynomial (Cephes' expf)."""
    x = -power
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


@numba.njit(parallel=True, cache=True, fastmath=_FAST)
@no_type_check
def composite_tiles(
    start, indices, screen, colors, features, columns, rows, color, feature, depth, transmittance, last
):
    """Blend front to back into color (H, W, 3), feature (H, W, D), depth (H, W); all zero, transmittance one, at entry.

    ``depth`` becomes the sum of weight times z; the caller divides by alpha. ``last`` (H, W), -1 at entry, becomes the
    position in ``indices`` of the last Gaussian drawn in each pixel, where the backward pass begins.
    """
    height, width = transmittance.shape
    channels = features.shape[1]
    for tile in numba.prange(columns * rows):
        x_first, y_first = (tile % columns) * TILE, (tile // columns) * TILE
        x_last, y_last = min(x_first + TILE, width), min(y_first + TILE, height)
        alive = (x_last - x_first) * (y_last - y_first)
        for k in range(start[tile], start[tile + 1]):
            if alive == 0:
                break
            i = indices[k]
            mx, my = screen[i, MEAN_X], screen[i, MEAN_Y]
            xx, xy, yy = screen[i, CONIC_XX], screen[i, CONIC_XY], screen[i, CONIC_YY]
            opacity, max_power, z = screen[i, OPACITY], screen[i, MAX_POWER], screen[i, DEPTH]
            ex, ey = screen[i, EXTENT_X], screen[i, EXTENT_Y]
            top = max(y_first, int(math.ceil(max(my - ey, np.float32(-1)) - np.float32(0.5))))
            bottom = min(y_last - 1, int(math.floor(min(my + ey, np.float32(height)) - np.float32(0.5))))
            left = max(x_first, int(math.ceil(max(mx - ex, np.float32(-1)) - np.float32(0.5))))
            right = min(x_last - 1, int(math.floor(min(mx + ex, np.float32(width)) - np.float32(0.5))))
            red, green, blue = colors[i, 0], colors[i, 1], colors[i, 2]
            for y in range(top, bottom + 1):
                dy = np.float32(y) + np.float32(0.5) - my
                for x in range(left, right + 1):
                    before = transmittance[y, x]
                    if before < 0:  # ended; the sign bit marks it
                        continue
                    dx = np.float32(x) + np.float32(0.5) - mx
                    power = np.float32(0.5) * (xx * dx * dx + yy * dy * dy) + xy * dx * dy
                    if power > max_power or power < 0:
                        continue
                    alpha = min(_MAX_ALPHA, opacity * _exp_negative(power))
                    after = before * (np.float32(1) - alpha)
                    if after <= _MIN_TRANSMITTANCE:
                        transmittance[y, x] = -before
                        alive -= 1
                        continue
                    transmittance[y, x] = after
                    last[y, x] = k
                    weight = alpha * before
                    color[y, x, 0] += weight * red
                    color[y, x, 1] += weight * green
                    color[y, x, 2] += weight * blue
                    depth[y, x] += weight * z
                    for c in range(channels):
                        feature[y, x, c] += weight * features[i, c]
        for y in range(y_first, y_last):
            for x in range(x_first, x_last):
                transmittance[y, x] = abs(transmittance[y, x])
