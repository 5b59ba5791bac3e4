"""Numba kernels of the CPU splatter's backward pass: through the compositing, then through the projection.

Compositing is undone back to front: T before a Gaussian is T behind it over (1 - alpha), and the sum over everything
behind a Gaussian is carried as one number a pixel, already multiplied with the pixel's gradient, so that no channel is
stored. Several tiles add to one Gaussian; tiles are therefore dealt to the threads in contiguous blocks, and only the
Gaussians that reach into more than one block get private rows for each, which are summed afterwards.
"""

from typing import no_type_check

import numba
import numpy as np

from l2m_viz._simd import (
    LANES,
    greater,
    highest_bit,
    load,
    load_column,
    lowest_bit,
    maximum,
    minimum,
    prefetch,
    ramp,
    splat,
    sqrt,
    store,
    store_column,
    total,
    where_greater,
)
from l2m_viz.gaussians._splat import (
    _AHEAD,
    _BLOCK,
    _FAST,
    _HALF,
    _MAX_ALPHA,
    _ONE,
    _TWO,
    _ZERO,
    BLUE,
    CONIC_XX,
    CONIC_XY,
    CONIC_YY,
    DEPTH,
    GREEN,
    LOG2_OPACITY,
    NUM_COLUMNS,
    OPACITY,
    RED,
    TILE,
    _alpha,
    _clamp_limits,
    _copy,
    _exp,
    _log2_falloff,
    _prefetch_row,
    _reach,
    _rotation,
)

# Columns of the gradient by a projected Gaussian: centre, conic, logit of the opacity, depth, colour.
GRAD_X, GRAD_Y, GRAD_XX, GRAD_XY, GRAD_YY, GRAD_LOGIT, GRAD_DEPTH, GRAD_RED, GRAD_GREEN, GRAD_BLUE = range(10)
NUM_GRADS = 10
# A tile's working memory, as in `_splat`: T behind, the sum behind, and the pixels' gradients.
_BEHIND, _LAST, _V_RED, _V_GREEN, _V_BLUE, _V_DEPTH, _VALUE, _ALPHA, _WEIGHT = (
    np.uint64(plane * TILE) for plane in range(1, 10)
)
_ROW = 10 * TILE


@numba.njit(cache=True)
@no_type_check
def split_tiles(start, blocks):
    """First tile of each block, (blocks + 1): contiguous blocks of about equal numbers of (tile, Gaussian) pairs."""
    tiles, pairs = start.shape[0] - 1, start[-1]
    first = np.zeros(blocks + 1, np.int64)
    tile = 0
    for block in range(1, blocks):
        while tile < tiles and start[tile] * blocks < pairs * block:
            tile += 1
        first[block] = tile
    first[blocks] = tiles
    return first


@numba.njit(cache=True)
@no_type_check
def private_rows(tiles, columns, first):
    """Row of each Gaussian in the blocks' private buffers, -1 for those of one block only; and the number of rows.

    Blocks are runs of tiles: whose first and last tile are of one block reaches into no other.
    """
    owner, rows = np.empty(first[-1], np.int32), np.full(tiles.shape[0], -1, np.int32)
    for block in range(first.shape[0] - 1):
        owner[first[block] : first[block + 1]] = block
    count = 0
    for i in range(tiles.shape[0]):
        x0, y0, x1, y1 = (
            np.int64(tiles[i, 0]),
            np.int64(tiles[i, 1]),
            np.int64(tiles[i, 2]),
            np.int64(tiles[i, 3]),
        )
        if x0 < x1 and owner[y0 * columns + x0] != owner[(y1 - 1) * columns + x1 - 1]:
            rows[i] = count
            count += 1
    return rows, count


@numba.njit(forceinline=True, fastmath=_FAST)
@no_type_check
def _add(target, place, source, count):
    """Add ``count`` floats of source to target."""
    whole = count - count % LANES
    for c in range(0, whole, LANES):
        p = place + np.uint64(c)
        store(target, p, load(target, p) + load(source, np.uint64(c)))
    for c in range(whole, count):
        target[place + np.uint64(c)] += source[np.uint64(c)]


@numba.njit(forceinline=True, fastmath=_FAST)
@no_type_check
def _feature_grads(planes, pixels, values, sums, padded, top, bottom, row_first, row_last):
    """Fill sums (padded) with weight times the pixels' gradients; add values times these to each pixel's value."""
    for v in range(0, padded - padded % _BLOCK, _BLOCK):
        c0 = np.uint64(v)
        c1, c2, c3 = c0 + np.uint64(LANES), c0 + np.uint64(2 * LANES), c0 + np.uint64(3 * LANES)
        f0, f1, f2, f3 = load(values, c0), load(values, c1), load(values, c2), load(values, c3)
        s0 = s1 = s2 = s3 = splat(_ZERO)
        for y in range(top, bottom + 1):
            for x in range(row_first[y], row_last[y] + 1):
                q = np.uint64(y * _ROW + x)
                weight = splat(planes[q + _WEIGHT])
                p = np.uint64(y * TILE + x) * np.uint64(padded)
                v0, v1, v2, v3 = (
                    load(pixels, p + c0),
                    load(pixels, p + c1),
                    load(pixels, p + c2),
                    load(pixels, p + c3),
                )
                s0, s1, s2, s3 = s0 + weight * v0, s1 + weight * v1, s2 + weight * v2, s3 + weight * v3
                planes[q + _VALUE] += total(f0 * v0 + f1 * v1 + f2 * v2 + f3 * v3)
        store(sums, c0, s0)
        store(sums, c1, s1)
        store(sums, c2, s2)
        store(sums, c3, s3)
    for v in range(padded - padded % _BLOCK, padded, LANES):
        c0 = np.uint64(v)
        f0, s0 = load(values, c0), splat(_ZERO)
        for y in range(top, bottom + 1):
            for x in range(row_first[y], row_last[y] + 1):
                q = np.uint64(y * _ROW + x)
                v0 = load(pixels, np.uint64(y * TILE + x) * np.uint64(padded) + c0)
                s0 = s0 + splat(planes[q + _WEIGHT]) * v0
                planes[q + _VALUE] += total(f0 * v0)
        store(sums, c0, s0)


@numba.njit(parallel=True, cache=True, fastmath=_FAST)
@no_type_check
def composite_backward(
    start, indices, screen, features, columns, first, rows, last, transmittance,
    v_color, v_feature, v_depth, v_alpha, grad, grad_features, private, private_features,
):  # fmt: skip
    """Fill grad (N, 10) and grad_features (N, D), zero at entry, with the gradient by every projected Gaussian.

    ``private`` (blocks, rows, 10) and ``private_features`` (blocks, rows, D), zero at entry, are the blocks' own rows.
    """
    height, width = transmittance.shape
    channels, num_private = features.shape[1], private.shape[1]
    padded = (channels + LANES - 1) // LANES * LANES
    flat_features, flat_screen, flat_v = features.reshape(-1), screen.reshape(-1), v_feature.reshape(-1)
    flat_grad, flat_private = grad.reshape(-1), private.reshape(-1)
    flat_grad_features, flat_private_features = grad_features.reshape(-1), private_features.reshape(-1)
    for block in numba.prange(first.shape[0] - 1):
        planes, pixels = np.zeros(_ROW * TILE, np.float32), np.zeros(TILE * TILE * padded, np.float32)
        values, sums = np.zeros(padded, np.float32), np.zeros(padded, np.float32)
        row_first, row_last = np.empty(TILE, np.int64), np.empty(TILE, np.int64)
        for tile in range(first[block], first[block + 1]):
            x_first, y_first = (tile % columns) * TILE, (tile // columns) * TILE
            wide, high = min(TILE, width - x_first), min(TILE, height - y_first)
            listed = indices[start[tile] : start[tile + 1]]
            planes[:] = 0  # outside the image nothing is last
            deepest = 0
            for y in range(high):
                for x in range(wide):
                    p, row, column = np.uint64(y * _ROW + x), y_first + y, x_first + x
                    deepest = max(deepest, last[row, column])
                    planes[p] = transmittance[row, column]
                    planes[p + _BEHIND] = -v_alpha[row, column] * transmittance[row, column]
                    planes[p + _LAST] = np.float32(last[row, column])
                    planes[p + _V_RED] = v_color[row, column, 0]
                    planes[p + _V_GREEN] = v_color[row, column, 1]
                    planes[p + _V_BLUE] = v_color[row, column, 2]
                    planes[p + _V_DEPTH] = v_depth[row, column]
                    q = np.uint64(row * width + column) * np.uint64(channels)
                    _copy(flat_v, q, pixels, np.uint64(y * TILE + x) * np.uint64(padded), channels)
            for k in range(deepest - 1, -1, -1):
                ahead = np.uint64(listed[max(k - _AHEAD, 0)])
                prefetch(flat_screen, ahead * np.uint64(NUM_COLUMNS))
                prefetch(flat_grad, ahead * np.uint64(NUM_GRADS))
                prefetch(rows, ahead)
                _prefetch_row(flat_features, ahead, channels)
                _prefetch_row(flat_grad_features, ahead, channels)
                i = np.uint64(listed[k])
                row = screen[i]
                mx, my, top, bottom, offset, right = _reach(row, x_first, y_first, wide, high)
                xx, xy, yy = _log2_falloff(row)
                log2_opacity, step = row[LOG2_OPACITY], splat(np.float32(k + 1))
                red, green, blue, z = splat(row[RED]), splat(row[GREEN]), splat(row[BLUE]), splat(row[DEPTH])
                g_red = g_green = g_blue = g_z = splat(_ZERO)
                for y in range(top, bottom + 1):
                    dy = np.float32(y) - my
                    linear, constant = xy * dy, yy * dy * dy + log2_opacity
                    bits = np.int64(0)
                    for x in range(offset, right + 1, LANES):
                        p = np.uint64(y * _ROW + x)
                        dx = ramp() + (np.float32(x) - mx)
                        alpha = _alpha((dx * xx + linear) * dx + constant, log2_opacity)
                        alpha = where_greater(step, load(planes, p + _LAST), splat(_ZERO), alpha)
                        before = load(planes, p) / (_ONE - alpha)
                        weight = alpha * before
                        v_red, v_green = load(planes, p + _V_RED), load(planes, p + _V_GREEN)
                        v_blue, v_z = load(planes, p + _V_BLUE), load(planes, p + _V_DEPTH)
                        g_red, g_green = g_red + weight * v_red, g_green + weight * v_green
                        g_blue, g_z = g_blue + weight * v_blue, g_z + weight * v_z
                        store(planes, p, before)
                        store(planes, p + _ALPHA, alpha)
                        store(planes, p + _WEIGHT, weight)
                        store(planes, p + _VALUE, red * v_red + green * v_green + blue * v_blue + z * v_z)
                        bits |= greater(weight, splat(_ZERO)) << x
                    row_first[y], row_last[y] = lowest_bit(bits), highest_bit(bits)
                if channels > 0:
                    _copy(flat_features, i * np.uint64(channels), values, np.uint64(0), channels)
                    _feature_grads(planes, pixels, values, sums, padded, top, bottom, row_first, row_last)
                # Moments of dL/dlog(alpha) over the pixels: they give centre, conic and opacity.
                m0 = m_x = m_y = m_xx = m_xy = m_yy = splat(_ZERO)
                for y in range(top, bottom + 1):
                    dy = np.float32(y) - my
                    for x in range(offset, right + 1, LANES):
                        p = np.uint64(y * _ROW + x)
                        dx = ramp() + (np.float32(x) - mx)
                        alpha, value, behind = (
                            load(planes, p + _ALPHA),
                            load(planes, p + _VALUE),
                            load(planes, p + _BEHIND),
                        )
                        g_alpha = load(planes, p) * value - behind / (_ONE - alpha)
                        store(planes, p + _BEHIND, behind + load(planes, p + _WEIGHT) * value)
                        # where alpha is capped nothing reaches opacity or shape
                        g = where_greater(splat(_MAX_ALPHA), alpha, alpha * g_alpha, splat(_ZERO))
                        g_x, g_y = g * dx, g * dy
                        m0, m_x, m_y = m0 + g, m_x + g_x, m_y + g_y
                        m_xx, m_xy, m_yy = m_xx + g_x * dx, m_xy + g_x * dy, m_yy + g_y * dy
                sum_x, sum_y = total(m_x), total(m_y)
                shared = rows[i]
                target, place = flat_grad, i * np.uint64(NUM_GRADS)
                if shared >= 0:
                    target, place = flat_private, np.uint64((block * num_private + shared) * NUM_GRADS)
                target[place + np.uint64(GRAD_X)] += row[CONIC_XX] * sum_x + row[CONIC_XY] * sum_y
                target[place + np.uint64(GRAD_Y)] += row[CONIC_XY] * sum_x + row[CONIC_YY] * sum_y
                target[place + np.uint64(GRAD_XX)] -= _HALF * total(m_xx)
                target[place + np.uint64(GRAD_XY)] -= total(m_xy)
                target[place + np.uint64(GRAD_YY)] -= _HALF * total(m_yy)
                target[place + np.uint64(GRAD_LOGIT)] += total(m0) * (_ONE - row[OPACITY])
                target[place + np.uint64(GRAD_DEPTH)] += total(g_z)
                target[place + np.uint64(GRAD_RED)] += total(g_red)
                target[place + np.uint64(GRAD_GREEN)] += total(g_green)
                target[place + np.uint64(GRAD_BLUE)] += total(g_blue)
                if shared >= 0:
                    q = np.uint64((block * num_private + shared) * channels)
                    _add(flat_private_features, q, sums, channels)
                else:
                    _add(flat_grad_features, i * np.uint64(channels), sums, channels)


@numba.njit(parallel=True, cache=True)
@no_type_check
def add_private(rows, private, target):
    """Add the blocks' private rows (blocks, rows, C) to target (N, C), in the order of the blocks."""
    for i in numba.prange(rows.shape[0]):
        row = rows[i]
        if row >= 0:
            for block in range(private.shape[0]):
                for c in range(target.shape[1]):
                    target[i, c] += private[block, row, c]


@numba.njit(parallel=True, cache=True, fastmath=_FAST)
@no_type_check
def project_backward(
    means, quats, log_scales, w2c, K, hw, tiles, screen, grad, g_means, g_quats, g_log_scales, g_logits
):
    """Chain rule from the screen to the stored parameters; the outputs, (N, .), are filled for every Gaussian."""
    fx, fy = K[0, 0], K[1, 1]
    low_x, high_x, low_y, high_y = _clamp_limits(K, hw)
    zero, one = splat(_ZERO), splat(_ONE)
    c0, c1, c2, c3 = np.uint64(0), np.uint64(1), np.uint64(2), np.uint64(3)
    n = np.uint64(means.shape[0] - 1)
    drawn = np.empty(tiles.shape[0], np.float32)
    for i in range(tiles.shape[0]):
        drawn[i] = np.float32(tiles[i, 2] > tiles[i, 0])
    drawn = drawn.reshape(-1, 1)
    for block in numba.prange((means.shape[0] + LANES - 1) // LANES):
        i = np.uint64(block * LANES)
        seen = load_column(drawn, i, n, c0)
        mx, my, mz = load_column(means, i, n, c0), load_column(means, i, n, c1), load_column(means, i, n, c2)
        inv_z = one / load_column(screen, i, n, np.uint64(DEPTH))
        raw_x = (w2c[0, 0] * mx + w2c[0, 1] * my + w2c[0, 2] * mz + w2c[0, 3]) * inv_z
        raw_y = (w2c[1, 0] * mx + w2c[1, 1] * my + w2c[1, 2] * mz + w2c[1, 3]) * inv_z
        x = minimum(maximum(raw_x, splat(low_x)), splat(high_x))
        y = minimum(maximum(raw_y, splat(low_y)), splat(high_y))
        jx, jy = fx * inv_z, fy * inv_z
        # a = jx (W_0 - x W_2), b = jy (W_1 - y W_2): rows of JW
        h0, h1, h2 = w2c[0, 0] - x * w2c[2, 0], w2c[0, 1] - x * w2c[2, 1], w2c[0, 2] - x * w2c[2, 2]
        k0, k1, k2 = w2c[1, 0] - y * w2c[2, 0], w2c[1, 1] - y * w2c[2, 1], w2c[1, 2] - y * w2c[2, 2]
        a0, a1, a2, b0, b1, b2 = jx * h0, jx * h1, jx * h2, jy * k0, jy * k1, jy * k2
        qw, qx = load_column(quats, i, n, c0), load_column(quats, i, n, c1)
        qy, qz = load_column(quats, i, n, c2), load_column(quats, i, n, c3)
        inv_norm = one / sqrt(qw * qw + qx * qx + qy * qy + qz * qz)
        qw, qx, qy, qz = qw * inv_norm, qx * inv_norm, qy * inv_norm, qz * inv_norm
        s0, s1 = _exp(load_column(log_scales, i, n, c0)), _exp(load_column(log_scales, i, n, c1))
        s2 = _exp(load_column(log_scales, i, n, c2))
        r00, r01, r02, r10, r11, r12, r20, r21, r22 = _rotation(qw, qx, qy, qz)
        p0, q0 = (a0 * r00 + a1 * r10 + a2 * r20) * s0, (b0 * r00 + b1 * r10 + b2 * r20) * s0
        p1, q1 = (a0 * r01 + a1 * r11 + a2 * r21) * s1, (b0 * r01 + b1 * r11 + b2 * r21) * s1
        p2, q2 = (a0 * r02 + a1 * r12 + a2 * r22) * s2, (b0 * r02 + b1 * r12 + b2 * r22) * s2
        # Sigma' from its inverse C: dL/dSigma' = -C G C, G symmetric with half of the off-diagonal's gradient
        xx, xy = (
            load_column(screen, i, n, np.uint64(CONIC_XX)),
            load_column(screen, i, n, np.uint64(CONIC_XY)),
        )
        yy = load_column(screen, i, n, np.uint64(CONIC_YY))
        g0 = load_column(grad, i, n, np.uint64(GRAD_XX))
        g1 = load_column(grad, i, n, np.uint64(GRAD_XY)) * _HALF
        g2 = load_column(grad, i, n, np.uint64(GRAD_YY))
        m00, m01, m10, m11 = xx * g0 + xy * g1, xx * g1 + xy * g2, xy * g0 + yy * g1, xy * g1 + yy * g2
        d_xx, d_yy = _ZERO - (m00 * xx + m01 * xy), _ZERO - (m10 * xy + m11 * yy)
        d_xy = _ZERO - _TWO * (m00 * xy + m01 * yy)
        # xx = p.p, xy = p.q, yy = q.q with p = M^T a, q = M^T b, M = R S
        dp0, dq0 = _TWO * d_xx * p0 + d_xy * q0, _TWO * d_yy * q0 + d_xy * p0
        dp1, dq1 = _TWO * d_xx * p1 + d_xy * q1, _TWO * d_yy * q1 + d_xy * p1
        dp2, dq2 = _TWO * d_xx * p2 + d_xy * q2, _TWO * d_yy * q2 + d_xy * p2
        # dL/dR = (a dp^T + b dq^T) S
        e00, e01, e02 = (a0 * dp0 + b0 * dq0) * s0, (a0 * dp1 + b0 * dq1) * s1, (a0 * dp2 + b0 * dq2) * s2
        e10, e11, e12 = (a1 * dp0 + b1 * dq0) * s0, (a1 * dp1 + b1 * dq1) * s1, (a1 * dp2 + b1 * dq2) * s2
        e20, e21, e22 = (a2 * dp0 + b2 * dq0) * s0, (a2 * dp1 + b2 * dq1) * s1, (a2 * dp2 + b2 * dq2) * s2
        n_w = _TWO * (qx * (e21 - e12) + qy * (e02 - e20) + qz * (e10 - e01))
        n_x = _TWO * (qw * (e21 - e12) + qy * (e01 + e10) + qz * (e02 + e20) - _TWO * qx * (e11 + e22))
        n_y = _TWO * (qw * (e02 - e20) + qx * (e01 + e10) + qz * (e12 + e21) - _TWO * qy * (e00 + e22))
        n_z = _TWO * (qw * (e10 - e01) + qx * (e02 + e20) + qy * (e12 + e21) - _TWO * qz * (e00 + e11))
        along = qw * n_w + qx * n_x + qy * n_y + qz * n_z  # the length of the quaternion changes nothing
        # a and b: M dp, M dq with M = R S
        t0, t1, t2, u0, u1, u2 = s0 * dp0, s1 * dp1, s2 * dp2, s0 * dq0, s1 * dq1, s2 * dq2
        da0, db0 = r00 * t0 + r01 * t1 + r02 * t2, r00 * u0 + r01 * u1 + r02 * u2
        da1, db1 = r10 * t0 + r11 * t1 + r12 * t2, r10 * u0 + r11 * u1 + r12 * u2
        da2, db2 = r20 * t0 + r21 * t1 + r22 * t2, r20 * u0 + r21 * u1 + r22 * u2
        d_jx, d_jy = da0 * h0 + da1 * h1 + da2 * h2, db0 * k0 + db1 * k1 + db2 * k2
        d_x = _ZERO - jx * (da0 * w2c[2, 0] + da1 * w2c[2, 1] + da2 * w2c[2, 2])
        d_y = _ZERO - jy * (db0 * w2c[2, 0] + db1 * w2c[2, 1] + db2 * w2c[2, 2])
        # held at the margin: nothing moves
        d_x = where_greater(splat(low_x), raw_x, zero, where_greater(raw_x, splat(high_x), zero, d_x))
        d_y = where_greater(splat(low_y), raw_y, zero, where_greater(raw_y, splat(high_y), zero, d_y))
        d_x = d_x + fx * load_column(grad, i, n, np.uint64(GRAD_X))  # the centre moves with the true x / z
        d_y = d_y + fy * load_column(grad, i, n, np.uint64(GRAD_Y))
        px, py = d_x * inv_z, d_y * inv_z
        pz = load_column(grad, i, n, np.uint64(GRAD_DEPTH))
        pz = pz - (d_jx * jx + d_jy * jy + d_x * raw_x + d_y * raw_y) * inv_z
        gx = w2c[0, 0] * px + w2c[1, 0] * py + w2c[2, 0] * pz
        gy = w2c[0, 1] * px + w2c[1, 1] * py + w2c[2, 1] * pz
        gz = w2c[0, 2] * px + w2c[1, 2] * py + w2c[2, 2] * pz
        store_column(g_means, i, n, c0, where_greater(seen, zero, gx, zero))
        store_column(g_means, i, n, c1, where_greater(seen, zero, gy, zero))
        store_column(g_means, i, n, c2, where_greater(seen, zero, gz, zero))
        store_column(g_log_scales, i, n, c0, where_greater(seen, zero, p0 * dp0 + q0 * dq0, zero))
        store_column(g_log_scales, i, n, c1, where_greater(seen, zero, p1 * dp1 + q1 * dq1, zero))
        store_column(g_log_scales, i, n, c2, where_greater(seen, zero, p2 * dp2 + q2 * dq2, zero))
        store_column(g_quats, i, n, c0, where_greater(seen, zero, (n_w - along * qw) * inv_norm, zero))
        store_column(g_quats, i, n, c1, where_greater(seen, zero, (n_x - along * qx) * inv_norm, zero))
        store_column(g_quats, i, n, c2, where_greater(seen, zero, (n_y - along * qy) * inv_norm, zero))
        store_column(g_quats, i, n, c3, where_greater(seen, zero, (n_z - along * qz) * inv_norm, zero))
        g_logit = load_column(grad, i, n, np.uint64(GRAD_LOGIT))
        store_column(g_logits, i, n, c0, where_greater(seen, zero, g_logit, zero))
