"""Numba kernels of the CPU splatter's backward pass: through the compositing, then through the projection.

Compositing is undone back to front: T before a Gaussian is T behind it over (1 - alpha), and the sum over everything
behind a Gaussian is carried as one number a pixel, already multiplied with the pixel's gradient, so that no channel is
stored. Several tiles add to one Gaussian; tiles are therefore dealt to the threads in contiguous blocks, and only the
Gaussians that reach into more than one block get private rows for each, which are summed afterwards.
"""

import math
from typing import no_type_check

import numba
import numpy as np

from l2m_viz.gaussians._splat import (
    _FAST,
    _MAX_ALPHA,
    CONIC_XX,
    CONIC_XY,
    CONIC_YY,
    DEPTH,
    EXTENT_X,
    EXTENT_Y,
    MAX_POWER,
    MEAN_X,
    MEAN_Y,
    OPACITY,
    TILE,
    _clamp_limits,
    _exp,
)

# Columns of the gradient by a projected Gaussian, in the order of `_splat`'s columns, then its colour.
GRAD_X, GRAD_Y, GRAD_XX, GRAD_XY, GRAD_YY, GRAD_OPACITY, GRAD_DEPTH, GRAD_RED, GRAD_GREEN, GRAD_BLUE = range(
    10
)
NUM_GRADS = 10


@numba.njit(cache=True)
@no_type_check
def split_tiles(start, blocks):
    """First tile of each block, (blocks + 1): contiguous blocks of about equal numbers of (tile, Gaussian) pairs."""
    tiles, total = start.shape[0] - 1, start[-1]
    first = np.zeros(blocks + 1, np.int64)
    tile = 0
    for block in range(1, blocks):
        while tile < tiles and start[tile] * blocks < total * block:
            tile += 1
        first[block] = tile
    first[blocks] = tiles
    return first


@numba.njit(cache=True)
@no_type_check
def private_rows(start, indices, first, n):
    """Row of each Gaussian in the blocks' private buffers, -1 for those of one block only; and the number of rows."""
    owner, rows = np.full(n, -1, np.int32), np.full(n, -1, np.int32)
    count = 0
    for block in range(first.shape[0] - 1):
        for k in range(start[first[block]], start[first[block + 1]]):
            i = indices[k]
            if owner[i] == -1:
                owner[i] = block
            elif owner[i] != block and rows[i] == -1:
                rows[i] = count
                count += 1
    return rows, count


@numba.njit(parallel=True, cache=True, fastmath=_FAST)
@no_type_check
def composite_backward(
    start, indices, screen, colors, features, columns, first, rows, last, transmittance,
    v_color, v_feature, v_depth, v_alpha, grad, grad_features, private, private_features,
):  # fmt: skip
    """Fill grad (N, 10) and grad_features (N, D), zero at entry, with the gradient by every projected Gaussian.

    ``private`` (blocks, rows, 10) and ``private_features`` (blocks, rows, D), zero at entry, are the blocks' own rows.
    """
    height, width = transmittance.shape
    channels = features.shape[1]
    for block in numba.prange(first.shape[0] - 1):
        behind = np.empty((TILE, TILE), np.float32)  # sum of w_j (value_j . v) over everything behind
        t_behind = np.empty((TILE, TILE), np.float32)
        for tile in range(first[block], first[block + 1]):
            x_first, y_first = (tile % columns) * TILE, (tile // columns) * TILE
            x_last, y_last = min(x_first + TILE, width), min(y_first + TILE, height)
            deepest = -1
            for y in range(y_first, y_last):
                for x in range(x_first, x_last):
                    deepest = max(deepest, last[y, x])
                    behind[y - y_first, x - x_first] = -v_alpha[y, x] * transmittance[y, x]
                    t_behind[y - y_first, x - x_first] = transmittance[y, x]
            for k in range(deepest, start[tile] - 1, -1):
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
                row = rows[i]
                if row >= 0:
                    g, g_features = private[block, row], private_features[block, row]
                else:
                    g, g_features = grad[i], grad_features[i]
                g_x = g_y = g_xx = g_xy = g_yy = g_opacity = g_z = np.float32(0)
                g_red = g_green = g_blue = np.float32(0)
                for y in range(top, bottom + 1):
                    dy = np.float32(y) + np.float32(0.5) - my
                    for x in range(left, right + 1):
                        if k > last[y, x]:
                            continue
                        dx = np.float32(x) + np.float32(0.5) - mx
                        power = np.float32(0.5) * (xx * dx * dx + yy * dy * dy) + xy * dx * dy
                        if power > max_power or power < 0:
                            continue
                        falloff = _exp(-power)
                        raw_alpha = opacity * falloff
                        alpha = min(_MAX_ALPHA, raw_alpha)
                        remaining = np.float32(1) - alpha
                        before = t_behind[y - y_first, x - x_first] / remaining
                        weight = alpha * before
                        vr, vg, vb = v_color[y, x, 0], v_color[y, x, 1], v_color[y, x, 2]
                        value = red * vr + green * vg + blue * vb + z * v_depth[y, x]
                        g_red += weight * vr
                        g_green += weight * vg
                        g_blue += weight * vb
                        g_z += weight * v_depth[y, x]
                        dot = np.float32(0)
                        for c in range(channels):
                            dot += features[i, c] * v_feature[y, x, c]
                            g_features[c] += weight * v_feature[y, x, c]
                        value += dot
                        g_alpha = before * value - behind[y - y_first, x - x_first] / remaining
                        behind[y - y_first, x - x_first] += weight * value
                        t_behind[y - y_first, x - x_first] = before
                        if raw_alpha >= _MAX_ALPHA:
                            continue  # capped: nothing reaches opacity or shape
                        g_opacity += falloff * g_alpha
                        g_power = -alpha * g_alpha
                        g_x -= g_power * (xx * dx + xy * dy)
                        g_y -= g_power * (xy * dx + yy * dy)
                        g_xx += np.float32(0.5) * g_power * dx * dx
                        g_xy += g_power * dx * dy
                        g_yy += np.float32(0.5) * g_power * dy * dy
                g[GRAD_X] += g_x
                g[GRAD_Y] += g_y
                g[GRAD_XX] += g_xx
                g[GRAD_XY] += g_xy
                g[GRAD_YY] += g_yy
                g[GRAD_OPACITY] += g_opacity
                g[GRAD_DEPTH] += g_z
                g[GRAD_RED] += g_red
                g[GRAD_GREEN] += g_green
                g[GRAD_BLUE] += g_blue


@numba.njit(parallel=True, cache=True)
@no_type_check
def add_private(rows, private, private_features, grad, grad_features):
    """Add the blocks' private rows to the gradients, in the order of the blocks."""
    for i in numba.prange(rows.shape[0]):
        row = rows[i]
        if row < 0:
            continue
        for block in range(private.shape[0]):
            for c in range(grad.shape[1]):
                grad[i, c] += private[block, row, c]
            for c in range(grad_features.shape[1]):
                grad_features[i, c] += private_features[block, row, c]


@numba.njit(parallel=True, cache=True, fastmath=_FAST)
@no_type_check
def project_backward(
    means, quats, log_scales, w2c, K, hw, tiles, screen, grad, g_means, g_quats, g_log_scales, g_logits
):
    """Chain rule from the screen to the stored parameters; the outputs, (N, .), are filled for every Gaussian."""
    fx, fy = K[0, 0], K[1, 1]
    low_x, high_x, low_y, high_y = _clamp_limits(K, hw)
    two = np.float32(2)
    for i in numba.prange(means.shape[0]):
        if tiles[i, 2] <= tiles[i, 0]:
            g_means[i, 0] = g_means[i, 1] = g_means[i, 2] = 0
            g_quats[i, 0] = g_quats[i, 1] = g_quats[i, 2] = g_quats[i, 3] = 0
            g_log_scales[i, 0] = g_log_scales[i, 1] = g_log_scales[i, 2] = 0
            g_logits[i] = 0
            continue
        opacity = screen[i, OPACITY]
        g_logits[i] = grad[i, GRAD_OPACITY] * opacity * (np.float32(1) - opacity)
        mx, my, mz = means[i, 0], means[i, 1], means[i, 2]
        inv_z = np.float32(1) / screen[i, DEPTH]
        raw_x = (w2c[0, 0] * mx + w2c[0, 1] * my + w2c[0, 2] * mz + w2c[0, 3]) * inv_z
        raw_y = (w2c[1, 0] * mx + w2c[1, 1] * my + w2c[1, 2] * mz + w2c[1, 3]) * inv_z
        x, y = min(max(raw_x, low_x), high_x), min(max(raw_y, low_y), high_y)
        jx, jy = fx * inv_z, fy * inv_z
        # a = jx (W_0 - x W_2), b = jy (W_1 - y W_2): rows of JW
        h0, h1, h2 = w2c[0, 0] - x * w2c[2, 0], w2c[0, 1] - x * w2c[2, 1], w2c[0, 2] - x * w2c[2, 2]
        k0, k1, k2 = w2c[1, 0] - y * w2c[2, 0], w2c[1, 1] - y * w2c[2, 1], w2c[1, 2] - y * w2c[2, 2]
        a0, a1, a2, b0, b1, b2 = jx * h0, jx * h1, jx * h2, jy * k0, jy * k1, jy * k2
        qw, qx, qy, qz = quats[i, 0], quats[i, 1], quats[i, 2], quats[i, 3]
        inv_norm = np.float32(1) / math.sqrt(qw * qw + qx * qx + qy * qy + qz * qz)
        qw, qx, qy, qz = qw * inv_norm, qx * inv_norm, qy * inv_norm, qz * inv_norm
        s0, s1, s2 = math.exp(log_scales[i, 0]), math.exp(log_scales[i, 1]), math.exp(log_scales[i, 2])
        one = np.float32(1)
        r00, r01, r02 = one - two * (qy * qy + qz * qz), two * (qx * qy - qw * qz), two * (qx * qz + qw * qy)
        r10, r11, r12 = two * (qx * qy + qw * qz), one - two * (qx * qx + qz * qz), two * (qy * qz - qw * qx)
        r20, r21, r22 = two * (qx * qz - qw * qy), two * (qy * qz + qw * qx), one - two * (qx * qx + qy * qy)
        p0, q0 = (a0 * r00 + a1 * r10 + a2 * r20) * s0, (b0 * r00 + b1 * r10 + b2 * r20) * s0
        p1, q1 = (a0 * r01 + a1 * r11 + a2 * r21) * s1, (b0 * r01 + b1 * r11 + b2 * r21) * s1
        p2, q2 = (a0 * r02 + a1 * r12 + a2 * r22) * s2, (b0 * r02 + b1 * r12 + b2 * r22) * s2
        # Sigma' from its inverse C: dL/dSigma' = -C G C, G symmetric with half of the off-diagonal's gradient
        c0, c1, c2 = screen[i, CONIC_XX], screen[i, CONIC_XY], screen[i, CONIC_YY]
        g0, g1, g2 = grad[i, GRAD_XX], grad[i, GRAD_XY] / two, grad[i, GRAD_YY]
        m00, m01, m10, m11 = c0 * g0 + c1 * g1, c0 * g1 + c1 * g2, c1 * g0 + c2 * g1, c1 * g1 + c2 * g2
        d_xx, d_xy, d_yy = -(m00 * c0 + m01 * c1), -two * (m00 * c1 + m01 * c2), -(m10 * c1 + m11 * c2)
        # xx = p.p, xy = p.q, yy = q.q with p = M^T a, q = M^T b, M = R S
        dp0, dq0 = two * d_xx * p0 + d_xy * q0, two * d_yy * q0 + d_xy * p0
        dp1, dq1 = two * d_xx * p1 + d_xy * q1, two * d_yy * q1 + d_xy * p1
        dp2, dq2 = two * d_xx * p2 + d_xy * q2, two * d_yy * q2 + d_xy * p2
        g_log_scales[i, 0] = p0 * dp0 + q0 * dq0
        g_log_scales[i, 1] = p1 * dp1 + q1 * dq1
        g_log_scales[i, 2] = p2 * dp2 + q2 * dq2
        # dL/dR = (a dp^T + b dq^T) S
        e00, e01, e02 = (a0 * dp0 + b0 * dq0) * s0, (a0 * dp1 + b0 * dq1) * s1, (a0 * dp2 + b0 * dq2) * s2
        e10, e11, e12 = (a1 * dp0 + b1 * dq0) * s0, (a1 * dp1 + b1 * dq1) * s1, (a1 * dp2 + b1 * dq2) * s2
        e20, e21, e22 = (a2 * dp0 + b2 * dq0) * s0, (a2 * dp1 + b2 * dq1) * s1, (a2 * dp2 + b2 * dq2) * s2
        n_w = two * (qx * (e21 - e12) + qy * (e02 - e20) + qz * (e10 - e01))
        n_x = two * (qw * (e21 - e12) + qy * (e01 + e10) + qz * (e02 + e20) - two * qx * (e11 + e22))
        n_y = two * (qw * (e02 - e20) + qx * (e01 + e10) + qz * (e12 + e21) - two * qy * (e00 + e22))
        n_z = two * (qw * (e10 - e01) + qx * (e02 + e20) + qy * (e12 + e21) - two * qz * (e00 + e11))
        along = qw * n_w + qx * n_x + qy * n_y + qz * n_z  # the length of the quaternion changes nothing
        g_quats[i, 0], g_quats[i, 1] = (n_w - along * qw) * inv_norm, (n_x - along * qx) * inv_norm
        g_quats[i, 2], g_quats[i, 3] = (n_y - along * qy) * inv_norm, (n_z - along * qz) * inv_norm
        # a and b: M dp, M dq with M = R S
        da0 = r00 * s0 * dp0 + r01 * s1 * dp1 + r02 * s2 * dp2
        da1 = r10 * s0 * dp0 + r11 * s1 * dp1 + r12 * s2 * dp2
        da2 = r20 * s0 * dp0 + r21 * s1 * dp1 + r22 * s2 * dp2
        db0 = r00 * s0 * dq0 + r01 * s1 * dq1 + r02 * s2 * dq2
        db1 = r10 * s0 * dq0 + r11 * s1 * dq1 + r12 * s2 * dq2
        db2 = r20 * s0 * dq0 + r21 * s1 * dq1 + r22 * s2 * dq2
        d_jx, d_jy = da0 * h0 + da1 * h1 + da2 * h2, db0 * k0 + db1 * k1 + db2 * k2
        d_x = -jx * (da0 * w2c[2, 0] + da1 * w2c[2, 1] + da2 * w2c[2, 2])
        d_y = -jy * (db0 * w2c[2, 0] + db1 * w2c[2, 1] + db2 * w2c[2, 2])
        if x != raw_x:  # held at the margin
            d_x = np.float32(0)
        if y != raw_y:
            d_y = np.float32(0)
        d_x += grad[i, GRAD_X] * fx  # the centre moves with the true x / z
        d_y += grad[i, GRAD_Y] * fy
        px, py = d_x * inv_z, d_y * inv_z
        pz = grad[i, GRAD_DEPTH] - (d_jx * jx + d_jy * jy + d_x * raw_x + d_y * raw_y) * inv_z
        for c in range(3):
            g_means[i, c] = w2c[0, c] * px + w2c[1, c] * py + w2c[2, c] * pz
