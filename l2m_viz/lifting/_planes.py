"""Numba kernel of random geometry; `l2m_viz.lifting.random_planes` says what it means.

`no_type_check` keeps the tests' jaxtyping hook from wrapping what numba compiles.
"""

from typing import no_type_check

import numba
import numpy as np

import l2m_viz.parallel  # noqa: F401 (says where compiled kernels are cached)

_SHARE = np.float32(0.3)  # of the smooth surface in the planes before it


@numba.njit(parallel=True, cache=True)
@no_type_check
def raise_planes(labels, heights, slopes, x, y, smooth, disparity):
    """Fill disparity (H, W) with the nearer one of the smooth surface and each pixel's plane, which is bent like it."""
    height, width = labels.shape
    for row in numba.prange(height):
        for column in range(width):
            label, surface = labels[row, column], smooth[row, column]
            plane = slopes[0, label] * x[column] + slopes[1, label] * y[row] + heights[label]
            disparity[row, column] = max(plane + _SHARE * surface, surface)
