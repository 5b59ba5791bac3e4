"""Numba kernels of Winograd's convolution; `l2m_viz.encoders.winograd` says what they are for.

Maps are channels last.
"""

# ruff: noqa: ANN001, ANN202 (numba infers the types of each call)
from typing import no_type_check

import numba
import numpy as np

from l2m_viz._simd import LANES, load, maximum, splat, store

IN, OUT = 6, 4  # sides of a tile of the input, and of the output that it gives
_FAST = {"contract", "nsz", "arcp"}
_ZERO, _TWO, _FOUR, _FIVE, _EIGHT = (np.float32(value) for value in (0, 2, 4, 5, 8))


@numba.njit(parallel=True, cache=True, fastmath=_FAST)
@no_type_check
def transform_input(source, first, count, plane, out):
    """Write B^T d B of ``count`` tiles, from tile ``first`` on, of ``source`` (b, h, w, c), which is zero outside.

    Value (i, j) of tile t and channel k goes to out[(6 i + j) plane + t c + k].
    """
    _, height, width, channels = source.shape
    rows, columns = (height + OUT - 1) // OUT, (width + OUT - 1) // OUT
    flat = source.reshape(-1)
    line = width * channels
    for t in numba.prange(count):
        tile = first + t
        b, y, x = tile // (rows * columns), tile // columns % rows * OUT - 1, tile % columns * OUT - 1
        at = (b * height + y) * line + x * channels
        half = np.empty(IN * IN * LANES, np.float32)
        top, bottom = max(0, -y), min(IN, height - y)
        left, right = max(0, -x), min(IN, width - x)
        inside = top == 0 and bottom == IN and left == 0 and right == IN
        part = np.zeros(IN * IN * LANES, np.float32)
        for c in range(0, channels, LANES):
            if not inside:
                for i in range(top, bottom):
                    for j in range(left, right):
                        value = load(flat, np.uint64(at + i * line + j * channels + c))
                        store(part, np.uint64((i * IN + j) * LANES), value)
            for j in range(IN):
                if inside:
                    _input_column(flat, at + j * channels + c, line, half, j * LANES, IN * LANES)
                else:
                    _input_column(part, j * LANES, IN * LANES, half, j * LANES, IN * LANES)
            for i in range(IN):
                _input_column(half, i * IN * LANES, LANES, out, i * IN * plane + t * channels + c, plane)


@numba.njit(forceinline=True, fastmath=_FAST)
@no_type_check
def _input_column(source, at, step, out, to, out_step):
    """B^T of six values, ``step`` apart."""
    p, n, q, m = np.uint64(at), np.uint64(step), np.uint64(to), np.uint64(out_step)
    d0, d1, d2 = load(source, p), load(source, p + n), load(source, p + n + n)
    p = p + n + n + n
    d3, d4, d5 = load(source, p), load(source, p + n), load(source, p + n + n)
    store(out, q, _FOUR * d0 - _FIVE * d2 + d4)
    even, odd = d4 - _FOUR * d2, d3 - _FOUR * d1
    q += m
    store(out, q, even + odd)
    q += m
    store(out, q, even - odd)
    even, odd = d4 - d2, _TWO * (d3 - d1)
    q += m
    store(out, q, even + odd)
    q += m
    store(out, q, even - odd)
    q += m
    store(out, q, _FOUR * d1 - _FIVE * d3 + d5)


@numba.njit(parallel=True, cache=True, fastmath=_FAST)
@no_type_check
def transform_output(products, first, count, plane, bias, relu, out):
    """Write A^T m A and the bias, of ``count`` tiles from tile ``first`` on, to ``out`` (b, h, w, c); see above."""
    _, height, width, channels = out.shape
    rows, columns = (height + OUT - 1) // OUT, (width + OUT - 1) // OUT
    flat = out.reshape(-1)
    line = width * channels
    least = _ZERO if relu else np.float32(-np.inf)
    for t in numba.prange(count):
        tile = first + t
        b, y, x = tile // (rows * columns), tile // columns % rows * OUT, tile % columns * OUT
        at = (b * height + y) * line + x * channels
        half = np.empty(OUT * IN * LANES, np.float32)
        whole = np.empty(OUT * OUT * LANES, np.float32)
        bottom, right = min(OUT, height - y), min(OUT, width - x)
        for c in range(0, channels, LANES):
            shift = load(bias, np.uint64(c))
            for j in range(IN):
                place = j * plane + t * channels + c
                _output_column(products, place, IN * plane, half, j * LANES, IN * LANES)
            for i in range(OUT):
                _output_column(half, i * IN * LANES, LANES, whole, i * OUT * LANES, LANES)
            for i in range(bottom):
                for j in range(right):
                    value = load(whole, np.uint64((i * OUT + j) * LANES)) + shift
                    store(flat, np.uint64(at + i * line + j * channels + c), maximum(splat(least), value))


@numba.njit(forceinline=True, fastmath=_FAST)
@no_type_check
def _output_column(source, at, step, out, to, out_step):
    """A^T of six values, ``step`` apart."""
    p, n, q, m = np.uint64(at), np.uint64(step), np.uint64(to), np.uint64(out_step)
    m0, m1, m2 = load(source, p), load(source, p + n), load(source, p + n + n)
    p = p + n + n + n
    m3, m4, m5 = load(source, p), load(source, p + n), load(source, p + n + n)
    even, odd, even2, odd2 = m1 + m2, m1 - m2, m3 + m4, m3 - m4
    store(out, q, m0 + even + even2)
    q += m
    store(out, q, odd + _TWO * odd2)
    q += m
    store(out, q, even + _FOUR * even2)
    q += m
    store(out, q, odd + _EIGHT * odd2 + m5)
