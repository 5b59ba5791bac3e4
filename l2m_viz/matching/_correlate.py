"""Numba kernels of local correlation: dot products at whole pixels, then interpolated.

Every place of a pixel's window lies at the same fraction between whole pixels, so (2r+2)^2 dot products of neighbouring
pixels give the (2r+1)^2 of the window: a bilinear mean of dot products is the dot product with the bilinear mean.
Maps are channels last, so that a dot product reads two runs of memory.
"""

# ruff: noqa: ANN001, ANN202 (numba infers the types of each call)
import math
from typing import no_type_check

import numba
import numpy as np

_FAST = {"contract", "nsz", "arcp", "reassoc"}  # sums in any order; NaN and infinity keep their meaning


@numba.njit(parallel=True, cache=True, fastmath=_FAST)
@no_type_check
def correlate(features_A, features_B, targets, radius, out):
    """Fill ``out`` (b, h, w, (2r+1)^2); ``targets`` (b, h, w, 2) are (x, y) in integer-centre pixels of B."""
    batch, height, width, channels = features_A.shape
    height_B, width_B = features_B.shape[1], features_B.shape[2]
    side = 2 * radius + 2
    scale = np.float32(1 / math.sqrt(channels))
    for task in numba.prange(batch * height):
        b, row = task // height, task % height
        dots = np.empty((side, side), np.float32)
        for column in range(width):
            x, y = targets[b, row, column]
            if not _is_reached(x, y, radius, height_B, width_B):
                out[b, row, column] = 0
                continue
            left, top = math.floor(x), math.floor(y)
            for v in range(side):
                row_B = int(top) - radius + v
                first, last = _span(int(left) - radius, side, width_B)
                dots[v] = 0
                if 0 <= row_B < height_B:
                    start = int(left) - radius
                    for u in range(first, last):
                        dots[v, u] = scale * _dot(features_A[b, row, column], features_B[b, row_B, start + u])
            _interpolate(dots, np.float32(x - left), np.float32(y - top), out[b, row, column])


@numba.njit(parallel=True, cache=True, fastmath=_FAST)
@no_type_check
def correlate_backward(grad_out, features_B, targets, radius, grad_A):
    """Fill the gradient of `correlate` in ``features_A``; B is a constant, as in RoMa."""
    batch, height, width, channels = grad_A.shape
    height_B, width_B = features_B.shape[1], features_B.shape[2]
    side = 2 * radius + 2
    scale = np.float32(1 / math.sqrt(channels))
    for task in numba.prange(batch * height):
        b, row = task // height, task % height
        dots = np.empty((side, side), np.float32)
        for column in range(width):
            grad_A[b, row, column] = 0
            x, y = targets[b, row, column]
            if not _is_reached(x, y, radius, height_B, width_B):
                continue
            left, top = math.floor(x), math.floor(y)
            _spread(grad_out[b, row, column], np.float32(x - left), np.float32(y - top), dots)
            start = int(left) - radius
            first, last = _span(start, side, width_B)
            for v in range(side):
                row_B = int(top) - radius + v
                if 0 <= row_B < height_B:
                    for u in range(first, last):
                        weight = scale * dots[v, u]
                        for c in range(channels):
                            grad_A[b, row, column, c] += weight * features_B[b, row_B, start + u, c]


@numba.njit(forceinline=True)
@no_type_check
def _is_reached(x, y, radius, height, width):
    """Whether a pixel of the window lies on the map; false for NaN, and afterwards whole numbers fit an int."""
    return (x > -radius - 1) and (x < width + radius) and (y > -radius - 1) and (y < height + radius)


@numba.njit(forceinline=True)
@no_type_check
def _span(start, count, width):
    return max(0, -start), min(count, width - start)


@numba.njit(forceinline=True, fastmath=_FAST)
@no_type_check
def _dot(a, b):
    total = np.float32(0)
    for c in range(a.shape[0]):
        total += a[c] * b[c]
    return total


@numba.njit(forceinline=True, fastmath=_FAST)
@no_type_check
def _interpolate(dots, x, y, out):
    count = dots.shape[0] - 1
    for v in range(count):
        for u in range(count):
            upper = (np.float32(1) - x) * dots[v, u] + x * dots[v, u + 1]
            lower = (np.float32(1) - x) * dots[v + 1, u] + x * dots[v + 1, u + 1]
            out[v * count + u] = (np.float32(1) - y) * upper + y * lower


@numba.njit(forceinline=True, fastmath=_FAST)
@no_type_check
def _spread(grad, x, y, dots):
    """The transpose of `_interpolate`."""
    count = dots.shape[0] - 1
    dots[:] = 0
    for v in range(count):
        for u in range(count):
            upper, lower = (np.float32(1) - y) * grad[v * count + u], y * grad[v * count + u]
            dots[v, u] += (np.float32(1) - x) * upper
            dots[v, u + 1] += x * upper
            dots[v + 1, u] += (np.float32(1) - x) * lower
            dots[v + 1, u + 1] += x * lower
