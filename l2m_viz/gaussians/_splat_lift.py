"""Numba kernel of closed-form feature lifting: every pixel's feature goes to the Gaussians that made the pixel.

The adjoint of compositing features: each tile is walked front to back as in `_splat`, and the sums of a Gaussian that
reaches into the tiles of several threads are kept apart as in `_splat_grad`. The map of features is coarser than the
image; a tile's pixels are interpolated from it in the cache, never written out.
"""

from typing import no_type_check

import numba
import numpy as np

from l2m_viz._simd import (
    LANES,
    greater,
    highest_bit,
    load,
    lowest_bit,
    prefetch,
    ramp,
    splat,
    store,
    total,
)
from l2m_viz.gaussians._splat import (
    _AHEAD,
    _BLOCK,
    _CHECK_EVERY,
    _FAST,
    _HALF,
    _ZERO,
    LOG2_OPACITY,
    NUM_COLUMNS,
    TILE,
    _alpha,
    _has_ended,
    _log2_falloff,
    _open_tile,
    _prefetch_row,
    _reach,
    _take_light,
    sort_by_depth,
)
from l2m_viz.gaussians._splat_grad import _add

# A tile's working memory, as in `_splat`: T, whether the pixel's feature is known, and the weight.
_KNOWN, _WEIGHT = np.uint64(TILE), np.uint64(2 * TILE)
_ROW = 3 * TILE


@numba.njit(forceinline=True, fastmath=_FAST)
@no_type_check
def _neighbours(position, scale, count):
    """The cells on both sides of a pixel's centre along one axis, and the second's share; the border is repeated."""
    where = min(max((np.float32(position) + _HALF) * scale - _HALF, _ZERO), np.float32(count - 1))
    first = int(where)
    share = where - np.float32(first)
    return first, first + int(share > _ZERO), share


@numba.njit(forceinline=True, fastmath=_FAST)
@no_type_check
def _interpolate(cells, known, x_first, y_first, wide, high, hw, pixels, planes, padded):
    """Fill pixels (TILE * TILE * padded) bilinearly from cells (h, w, padded); known where all four cells are."""
    rows, columns = known.shape
    flat = cells.reshape(-1)
    scale_y, scale_x = np.float32(rows) / np.float32(hw[0]), np.float32(columns) / np.float32(hw[1])
    for y in range(high):
        top, bottom, down = _neighbours(y_first + y, scale_y, rows)
        for x in range(wide):
            left, right, across = _neighbours(x_first + x, scale_x, columns)
            is_known = known[top, left] & known[top, right] & known[bottom, left] & known[bottom, right]
            planes[np.uint64(y * _ROW + x) + _KNOWN] = np.float32(is_known)
            if not is_known:
                continue
            a, b = np.uint64((top * columns + left) * padded), np.uint64((top * columns + right) * padded)
            c, d = (
                np.uint64((bottom * columns + left) * padded),
                np.uint64((bottom * columns + right) * padded),
            )
            p = np.uint64((y * TILE + x) * padded)
            for v in range(0, padded, LANES):
                q = np.uint64(v)
                upper = load(flat, a + q) + across * (load(flat, b + q) - load(flat, a + q))
                lower = load(flat, c + q) + across * (load(flat, d + q) - load(flat, c + q))
                store(pixels, p + q, upper + down * (lower - upper))


@numba.njit(forceinline=True, fastmath=_FAST)
@no_type_check
def _weighted_sums(planes, pixels, sums, padded, top, bottom, row_first, row_last):
    """Fill sums (padded) with weight times the pixels' features."""
    for v in range(0, padded - padded % _BLOCK, _BLOCK):
        c0 = np.uint64(v)
        c1, c2, c3 = c0 + np.uint64(LANES), c0 + np.uint64(2 * LANES), c0 + np.uint64(3 * LANES)
        s0 = s1 = s2 = s3 = splat(_ZERO)
        for y in range(top, bottom + 1):
            for x in range(row_first[y], row_last[y] + 1):
                weight = splat(planes[np.uint64(y * _ROW + x) + _WEIGHT])
                p = np.uint64(y * TILE + x) * np.uint64(padded)
                s0, s1 = s0 + weight * load(pixels, p + c0), s1 + weight * load(pixels, p + c1)
                s2, s3 = s2 + weight * load(pixels, p + c2), s3 + weight * load(pixels, p + c3)
        store(sums, c0, s0)
        store(sums, c1, s1)
        store(sums, c2, s2)
        store(sums, c3, s3)
    for v in range(padded - padded % _BLOCK, padded, LANES):
        c0 = np.uint64(v)
        s0 = splat(_ZERO)
        for y in range(top, bottom + 1):
            for x in range(row_first[y], row_last[y] + 1):
                weight = splat(planes[np.uint64(y * _ROW + x) + _WEIGHT])
                s0 = s0 + weight * load(pixels, np.uint64(y * TILE + x) * np.uint64(padded) + c0)
        store(sums, c0, s0)


@numba.njit(parallel=True, cache=True, fastmath=_FAST)
@no_type_check
def accumulate_tiles(
    start, indices, screen, cells, known, hw, columns, first, rows, sums, weights, private_sums, private_weights
):  # fmt: skip
    """Add to sums (N, D) weight times feature, and to weights (N, 1) the weight, of every known pixel.

    ``cells`` (h, w, D rounded up to whole vectors) with ``known`` (h, w) tile the image of size ``hw``. The private
    arrays (blocks, rows, D and 1), zero at entry, are the blocks' own rows.
    """
    height, width = hw
    channels, padded, num_private = sums.shape[1], cells.shape[2], private_sums.shape[1]
    flat_screen, flat_sums, flat_private = screen.reshape(-1), sums.reshape(-1), private_sums.reshape(-1)
    for block in numba.prange(first.shape[0] - 1):
        planes, pixels = np.zeros(_ROW * TILE, np.float32), np.zeros(TILE * TILE * padded, np.float32)
        own = np.zeros(padded, np.float32)
        row_first, row_last = np.empty(TILE, np.int64), np.empty(TILE, np.int64)
        for tile in range(first[block], first[block + 1]):
            x_first, y_first = (tile % columns) * TILE, (tile // columns) * TILE
            wide, high = min(TILE, width - x_first), min(TILE, height - y_first)
            _open_tile(planes, _ROW, wide, high)
            _interpolate(cells, known, x_first, y_first, wide, high, hw, pixels, planes, padded)
            listed = indices[start[tile] : start[tile + 1]]
            sort_by_depth(listed, screen)
            n = listed.shape[0]
            for k in range(n):
                if k % _CHECK_EVERY == _CHECK_EVERY - 1 and _has_ended(planes, _ROW):
                    break
                ahead = np.uint64(listed[min(k + _AHEAD, n - 1)])
                prefetch(flat_screen, ahead * np.uint64(NUM_COLUMNS))
                prefetch(rows, ahead)
                _prefetch_row(flat_sums, ahead, channels)
                i = np.uint64(listed[k])
                row = screen[i]
                mx, my, top, bottom, offset, right = _reach(row, x_first, y_first, wide, high)
                xx, xy, yy = _log2_falloff(row)
                log2_opacity, total_weight = row[LOG2_OPACITY], splat(_ZERO)
                for y in range(top, bottom + 1):
                    dy = np.float32(y) - my
                    linear, constant = xy * dy, yy * dy * dy + log2_opacity
                    bits = np.int64(0)
                    for x in range(offset, right + 1, LANES):
                        p = np.uint64(y * _ROW + x)
                        dx = ramp() + (np.float32(x) - mx)
                        alpha = _alpha((dx * xx + linear) * dx + constant, log2_opacity)
                        weight = _take_light(planes, p, alpha) * load(planes, p + _KNOWN)
                        store(planes, p + _WEIGHT, weight)
                        total_weight = total_weight + weight
                        bits |= greater(weight, splat(_ZERO)) << x
                    row_first[y], row_last[y] = lowest_bit(bits), highest_bit(bits)
                gained = total(total_weight)
                if gained == _ZERO:
                    continue
                _weighted_sums(planes, pixels, own, padded, top, bottom, row_first, row_last)
                shared = rows[i]
                if shared >= 0:
                    private_weights[block, shared, 0] += gained
                    _add(flat_private, np.uint64((block * num_private + shared) * channels), own, channels)
                else:
                    weights[i, 0] += gained
                    _add(flat_sums, i * np.uint64(channels), own, channels)
