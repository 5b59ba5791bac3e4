"""Numba kernels for what comes after a matrix product: `l2m_viz.encoders.linear` says what they are for."""

# ruff: noqa: ANN001, ANN202 (numba infers the types of each call)
from typing import no_type_check

import numba
import numpy as np

from l2m_viz._simd import LANES, exp2, load, maximum, negative_magnitude, splat, store, where_greater

_FAST = {"contract", "nsz", "arcp"}
_ZERO, _ONE = np.float32(0), np.float32(1)
# erf(z) = 1 - P(1 / (1 + p z)) e^(-z^2) for z >= 0, to 1.5e-7 (Abramowitz and Stegun, 7.1.26); here z = |x| / sqrt(2),
# and the coefficients of P are halved.
_P = np.float32(0.3275911 / np.sqrt(2))
_C1, _C2, _C3, _C4, _C5 = (
    np.float32(c / 2) for c in (0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429)
)
_POWER = np.float32(-0.5 * np.log2(np.e))
_LOWEST = np.float32(-126)  # of a power of two


@numba.njit(parallel=True, cache=True, fastmath=_FAST)
@no_type_check
def add_to_rows(values, row, gelu):
    """Add ``row`` (c,) to each row of ``values`` (n, c), c a multiple of eight; with ``gelu`` then take x Phi(x)."""
    n, channels = values.shape
    flat = values.reshape(-1)
    for i in numba.prange(n):
        for c in range(0, channels, LANES):
            place = np.uint64(i * channels + c)
            x = load(flat, place) + load(row, np.uint64(c))
            store(flat, place, _gelu(x) if gelu else x)


@numba.njit(forceinline=True, fastmath=_FAST)
@no_type_check
def _gelu(x):
    t = _ONE / (_ONE - _P * negative_magnitude(x))
    tail = t * (_C1 + t * (_C2 + t * (_C3 + t * (_C4 + t * _C5))))
    tail = tail * exp2(maximum(_POWER * x * x, splat(_LOWEST)))
    return x * where_greater(x, splat(_ZERO), _ONE - tail, tail)
