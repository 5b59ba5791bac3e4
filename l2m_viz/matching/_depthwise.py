"""Numba kernel of the one gradient that torch is slow at on a CPU: that of a 5x5 depth-wise convolution's weights."""

# ruff: noqa: ANN001, ANN202 (numba infers the types of each call)
from typing import no_type_check

import numba
import numpy as np

from l2m_viz._simd import load, splat, store

KERNEL = 5
_LANES = 8
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
