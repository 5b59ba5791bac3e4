"""Numba kernel of the density of matches: each point adds a Gaussian to those near it.

Points are sorted into square cells of one of their two planes, row by row, so that the neighbours of a cell are a few
runs of memory. Coordinates are four arrays, which lets the compiler work on several neighbours at once.
"""

# ruff: noqa: ANN001, ANN202, PLR0913, PLR0917 (numba infers the types of each call, and takes plain arrays)
from typing import no_type_check

import numba
import numpy as np

_FAST = {"contract", "nsz", "arcp", "reassoc"}  # sums in any order
_ZERO, _ONE = np.float32(0), np.float32(1)
_SIXTEENTH, _HALF, _SIXTH, _TWENTY_FOURTH = (np.float32(1 / n) for n in (16, 2, 6, 24))


@numba.njit(parallel=True, cache=True, fastmath=_FAST)
@no_type_check
def sum_gaussians(x_A, y_A, x_B, y_B, starts, cells, reach, precision, max_exponent, density):
    """Fill ``density`` (n): the sum of exp(-precision d^2) over all points nearer than the exponent's limit.

    Points are sorted by cell; cell i holds those from ``starts[i]`` to ``starts[i + 1]``; there are
    ``cells`` x ``cells``, and a point's neighbours are at most ``reach`` cells away.
    """
    for cell in numba.prange(cells * cells):
        row, column = cell // cells, cell % cells
        first, last = max(column - reach, 0), min(column + reach, cells - 1)
        for i in range(starts[cell], starts[cell + 1]):
            total = np.float32(0)
            for other in range(max(row - reach, 0), min(row + reach, cells - 1) + 1):
                begin, end = starts[other * cells + first], starts[other * cells + last + 1]
                total += _sum_run(
                    x_A[begin:end], y_A[begin:end], x_B[begin:end], y_B[begin:end],
                    x_A[i], y_A[i], x_B[i], y_B[i], precision, max_exponent,
                )  # fmt: skip
            density[i] = total


@numba.njit(forceinline=True, fastmath=_FAST)
@no_type_check
def _sum_run(x_A, y_A, x_B, y_B, x_A0, y_A0, x_B0, y_B0, precision, max_exponent):
    total = np.float32(0)
    for j in range(len(x_A)):
        dx_A, dy_A, dx_B, dy_B = x_A[j] - x_A0, y_A[j] - y_A0, x_B[j] - x_B0, y_B[j] - y_B0
        exponent = precision * (dx_A * dx_A + dy_A * dy_A + dx_B * dx_B + dy_B * dy_B)
        # exp(-e) = exp(-e / 16)^16, and four terms of the series do for the root: no branches, so many at once
        x = -_SIXTEENTH * exponent
        root = _ONE + x * (_ONE + x * (_HALF + x * (_SIXTH + x * _TWENTY_FOURTH)))
        root *= root
        root *= root
        root *= root
        root *= root
        total += root if exponent < max_exponent else _ZERO
    return total
