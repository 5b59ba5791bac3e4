"""Numba kernels of the 5x5 depth-wise convolution, at which torch is slow on a CPU; maps are channels last.

The map itself, which is also the gradient of the input if the kernel is turned, and the gradient of the weights.
"""

from typing import no_type_check

import numba
import numpy as np

from l2m_viz._simd import LANES as _LANES, load, maximum, prefetch, splat, store

KERNEL = 5
_RIM = KERNEL // 2
_BLOCK = 64  # channels of a task: their weights, and the columns that a few outputs need, stay in the nearest cache
_AHEAD = 8  # columns that are asked for before they are needed
_LINE = 16  # floats of a cache line
_ROWS = 8  # rows of a task: four more are read than written
_ZERO = np.float32(0)
_FAST = {"contract", "nsz", "arcp", "reassoc"}  # sums in any order; NaN and infinity keep their meaning


@numba.njit(parallel=True, cache=True, fastmath=_FAST)
@no_type_check
def weight_gradient(padded, grad, height, width, shares):
    """Fill ``shares`` (tasks, 25, c), whose sum is sum_p padded[p + tap] grad[p] for every tap and channel.

    ``padded`` (b, h + 4, w + 4, c) and ``grad`` (b, h, w, c) are flat, channels last.
    """
    tasks, _, channels = shares.shape
    lines = grad.size // (width * channels)
    for task in numba.prange(tasks):
        mine = shares[task].reshape(-1)
        mine[:] = 0
        for line in range(task, lines, tasks):
            b, row = line // height, line % height
            g = line * width * channels
            for dy in range(KERNEL):
                x = ((b * (height + KERNEL - 1) + row + dy) * (width + KERNEL - 1)) * channels
                _row(padded, x, grad, g, width, channels, mine, dy * KERNEL * channels)


@numba.njit(forceinline=True, fastmath=_FAST)
@no_type_check
def _row(padded, x, grad, g, width, channels, sums, s):
    """Add one row's part of the five taps of one kernel row; x, g and s are where the rows begin."""
    whole = channels - channels % _LANES
    for c in range(0, whole, _LANES):
        t0 = t1 = t2 = t3 = t4 = splat(_ZERO)
        x0 = load(padded, np.uint64(x + c))
        x1 = load(padded, np.uint64(x + c + channels))
        x2 = load(padded, np.uint64(x + c + 2 * channels))
        x3 = load(padded, np.uint64(x + c + 3 * channels))
        for column in range(width):
            at = c + column * channels
            gradient, x4 = load(grad, np.uint64(g + at)), load(padded, np.uint64(x + at + 4 * channels))
            t0 = t0 + x0 * gradient
            t1 = t1 + x1 * gradient
            t2 = t2 + x2 * gradient
            t3 = t3 + x3 * gradient
            t4 = t4 + x4 * gradient
            x0, x1, x2, x3 = x1, x2, x3, x4
        p = np.uint64(s + c)
        store(sums, p, load(sums, p) + t0)
        store(sums, p + np.uint64(channels), load(sums, p + np.uint64(channels)) + t1)
        store(sums, p + np.uint64(2 * channels), load(sums, p + np.uint64(2 * channels)) + t2)
        store(sums, p + np.uint64(3 * channels), load(sums, p + np.uint64(3 * channels)) + t3)
        store(sums, p + np.uint64(4 * channels), load(sums, p + np.uint64(4 * channels)) + t4)
    for c in range(whole, channels):
        for dx in range(KERNEL):
            total = _ZERO
            for column in range(width):
                total += padded[x + (column + dx) * channels + c] * grad[g + column * channels + c]
            sums[s + dx * channels + c] += total


@numba.njit(parallel=True, cache=True, fastmath=_FAST)
@no_type_check
def convolve(source, shape, first, rows, weight, bias, relu, out):
    """Fill ``out`` (b, rows, w, c) with the convolution at rows ``first`` on of ``source`` (b, h, w, c), its shape.

    The source is zero outside. ``weight`` is (25, c), row by row; with ``relu`` nothing negative is left. All is flat.
    """
    batch, height, _, channels = shape
    blocks, bands = (channels + _BLOCK - 1) // _BLOCK, (rows + _ROWS - 1) // _ROWS
    least = _ZERO if relu else np.float32(-np.inf)
    for task in numba.prange(batch * bands * blocks):
        block, band, b = task % blocks, task // blocks % bands, task // (blocks * bands)
        c0, c1 = block * _BLOCK, min(channels, (block + 1) * _BLOCK)
        for row in range(band * _ROWS, min(rows, (band + 1) * _ROWS)):
            place = b * height, first + row, b * rows + row
            _convolve_row(source, place, shape, weight, bias, least, c0, c1, out)


@numba.njit(fastmath=_FAST)
@no_type_check
def _convolve_row(source, place, shape, weight, bias, least, c0, c1, out):
    """One row of outputs, channels c0 to c1; four columns at a time where all taps are inside.

    ``place``: first row of this image in the source, the row in the image, and the row of ``out``.
    """
    _, height, width, channels = shape
    above, below = max(0, _RIM - place[1]), min(KERNEL, height + _RIM - place[1])  # kernel rows inside
    line, top, to = width * channels, (place[0] + place[1] - _RIM) * width, place[2] * width
    whole = c1 - (c1 - c0) % _LANES
    column = 0
    while column < width:
        for ahead in range(column + _AHEAD, column + _AHEAD + 4):  # no hardware sees such strides coming
            newest = (top + (KERNEL - 1) * width + ahead) * channels
            for c in range(c0, c1, _LINE):
                prefetch(source, np.uint64(max(0, min(source.size - 1, newest + c))))
                prefetch(out, np.uint64(min(out.size - 1, (to + ahead) * channels + c)))
        left, right = max(0, _RIM - column), min(KERNEL, width + _RIM - column)  # kernel columns inside
        step, at, o = 1, (top + column - _RIM) * channels, (to + column) * channels
        if left == 0 and column + 3 + _RIM < width:
            step = 4
            _four(source, at, line, channels, weight, above, below, bias, least, c0, whole, out, o)
        else:
            _one(
                source, at, line, channels, weight, above, below, left, right, bias, least, c0, whole, out, o
            )
        for x in range(column, column + step):
            at, left, right = (top + x - _RIM) * channels, max(0, _RIM - x), min(KERNEL, width + _RIM - x)
            for c in range(whole, c1):
                sum_ = bias[c]
                for dy in range(above, below):
                    for dx in range(left, right):
                        tap = weight[(dy * KERNEL + dx) * channels + c]
                        sum_ += source[at + dy * line + dx * channels + c] * tap
                out[(to + x) * channels + c] = least if sum_ < least else sum_
        column += step


@numba.njit(forceinline=True, fastmath=_FAST)
@no_type_check
def _one(source, at, line, channels, weight, above, below, left, right, bias, least, c0, c1, out, o):
    """One output of some of the taps; the first of all of them is at ``at``."""
    for c in range(c0, c1, _LANES):
        a = load(bias, np.uint64(c))
        for dy in range(above, below):
            for dx in range(left, right):
                x = load(source, np.uint64(at + dy * line + dx * channels + c))
                a = a + x * load(weight, np.uint64((dy * KERNEL + dx) * channels + c))
        store(out, np.uint64(o + c), maximum(splat(least), a))  # NaN stays NaN


@numba.njit(forceinline=True, fastmath=_FAST)
@no_type_check
def _four(source, at, line, channels, weight, above, below, bias, least, c0, c1, out, o):
    """Four outputs side by side, which share eight columns of the source."""
    n = np.uint64(channels)
    for c in range(c0, c1, _LANES):
        a0 = a1 = a2 = a3 = load(bias, np.uint64(c))
        for dy in range(above, below):
            w, x = np.uint64(dy * KERNEL * channels + c), np.uint64(at + dy * line + c)
            w0, w1, w2 = load(weight, w), load(weight, w + n), load(weight, w + n + n)
            w3, w4 = load(weight, w + n + n + n), load(weight, w + n + n + n + n)
            value = load(source, x)
            a0 = a0 + value * w0
            x += n
            value = load(source, x)
            a0, a1 = a0 + value * w1, a1 + value * w0
            x += n
            value = load(source, x)
            a0, a1, a2 = a0 + value * w2, a1 + value * w1, a2 + value * w0
            x += n
            value = load(source, x)
            a0, a1, a2, a3 = a0 + value * w3, a1 + value * w2, a2 + value * w1, a3 + value * w0
            x += n
            value = load(source, x)
            a0, a1, a2, a3 = a0 + value * w4, a1 + value * w3, a2 + value * w2, a3 + value * w1
            x += n
            value = load(source, x)
            a1, a2, a3 = a1 + value * w4, a2 + value * w3, a3 + value * w2
            x += n
            value = load(source, x)
            a2, a3 = a2 + value * w4, a3 + value * w3
            x += n
            a3 = a3 + load(source, x) * w4
        low, o_c = splat(least), np.uint64(o + c)
        store(out, o_c, maximum(low, a0))
        store(out, o_c + n, maximum(low, a1))
        store(out, o_c + n + n, maximum(low, a2))
        store(out, o_c + n + n + n, maximum(low, a3))
