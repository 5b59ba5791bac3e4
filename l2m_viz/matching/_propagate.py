"""Numba kernel of propagation; `l2m_viz.matching.propagation` says what it means. Maps are channels last."""

# ruff: noqa: ANN001, ANN202 (numba infers the types of each call)
import math
from typing import no_type_check

import numba
import numpy as np

from l2m_viz._simd import LANES, load, splat, total

_FAST = {"contract", "nsz", "arcp", "reassoc"}  # sums in any order; NaN and infinity keep their meaning
_ROWS = 16  # of a task: its maps of places and scores stay in the cache
_ZERO, _INFINITE = np.float32(0), np.float32(np.inf)


@numba.njit(parallel=True, cache=True, fastmath=_FAST)
@no_type_check
def propagate(units_A, units_B, targets, asks, reaches, half, margin, min_move, out):
    """Fill ``out`` (b, h, w, 2) with each cell's own target or the best of its neighbours'.

    ``units_A`` (b, h, w, c) and ``units_B`` (b, h2 + 2, w2 + 2, c), in a frame of zeros, are vectors of length 1, c a
    multiple of 8; targets are (x, y) in integer-centre cells of B; ``asks`` (b, h, w) says which cells may change.
    """
    batch, height, width = targets.shape[:3]
    tiles = (height + _ROWS - 1) // _ROWS
    for task in numba.prange(batch * tiles):
        b, first = task // tiles, task % tiles * _ROWS
        last = min(height, first + _ROWS)
        top, bottom = max(0, first - half), min(height, last + half)
        places = np.empty((bottom - top, width, 2), np.float32)
        scores = np.empty((bottom - top, width), np.float32)
        needed = np.ones((bottom - top, width), np.bool_)
        best = np.empty((last - first, width), np.float32)
        _score(units_A[b, top:bottom], units_B[b], targets[b, top:bottom], needed, scores)
        for row in range(first, last):
            for column in range(width):
                best[row - first, column] = margin + _mean_around(scores, row - top, column, half)
        out[b, first:last] = targets[b, first:last]
        for reach in reaches:
            for dy, dx in ((-reach, 0), (0, -reach), (0, reach), (reach, 0)):
                _continue_from(targets[b], units_B.shape, dy, dx, top, places)
                if _mark_needed(places, targets[b], asks[b], first, last, half, min_move, needed):
                    _score(units_A[b, top:bottom], units_B[b], places, needed, scores)
                    _keep_better(
                        places, targets[b], asks[b], first, half, min_move, scores, best, out[b, first:last]
                    )


@numba.njit(fastmath=_FAST)
@no_type_check
def _keep_better(places, targets, asks, first, half, min_move, scores, best, out):
    """Take over the places that are far enough and agree better than the best so far."""
    skipped = first - max(0, first - half)  # rows that are there for the windows only
    for row in range(best.shape[0]):
        for column in range(best.shape[1]):
            place = places[skipped + row, column]
            if asks[first + row, column] and _is_far(place, targets[first + row, column], min_move):
                score = _mean_around(scores, skipped + row, column, half)
                if score > best[row, column]:
                    best[row, column] = score
                    out[row, column] = place


@numba.njit(fastmath=_FAST)
@no_type_check
def _continue_from(targets, shape_B, dy, dx, top, places):
    """Fill ``places``, of the rows from ``top`` on, with what two neighbours say."""
    height, width = targets.shape[:2]
    scale_x, scale_y = np.float32((shape_B[2] - 2) / width), np.float32((shape_B[1] - 2) / height)
    for row in range(places.shape[0]):
        one, two = _clamp(top + row + dy, height), _clamp(top + row + 2 * dy, height)
        # displacements are continued, not places: at the border, where both neighbours are one, it stays constant
        step_y = scale_y * np.float32(top + row - 2 * one + two)
        for column in range(width):
            near, far = _clamp(column + dx, width), _clamp(column + 2 * dx, width)
            step_x = scale_x * np.float32(column - 2 * near + far)
            x, y = targets[one, near, 0], targets[one, near, 1]
            places[row, column, 0] = x + x - targets[two, far, 0] + step_x
            places[row, column, 1] = y + y - targets[two, far, 1] + step_y


@numba.njit
@no_type_check
def _mark_needed(places, targets, asks, first, last, half, least, needed):
    """Mark the cells whose score counts: those in the window of a cell of the task that would move far enough.

    Return whether there is any.
    """
    any_far, top = False, max(0, first - half)
    rows, columns = needed.shape
    for row in range(first - top, last - top):
        for column in range(columns):
            if asks[top + row, column] and _is_far(places[row, column], targets[top + row, column], least):
                any_far = True
                for v in range(max(0, row - half), min(rows, row + half + 1)):
                    for u in range(max(0, column - half), min(columns, column + half + 1)):
                        needed[v, u] = True
    return any_far


@numba.njit(fastmath=_FAST)
@no_type_check
def _score(units_A, units_B, places, needed, scores):
    """Fill ``scores``, where ``needed``, with dot products of A's vectors with B's at the places.

    B is bilinear, and zero outside. Afterwards none is needed any more.
    """
    rows_B, columns_B, channels = units_B.shape
    flat_A, flat_B = units_A.reshape(-1), units_B.reshape(-1)
    one, line = np.float32(1), columns_B * channels
    for row in range(scores.shape[0]):
        for column in range(scores.shape[1]):
            if not needed[row, column]:
                continue
            needed[row, column] = False
            x, y = places[row, column, 0] + one, places[row, column, 1] + one  # of the framed map
            if not ((x > 0) and (x < columns_B - 1) and (y > 0) and (y < rows_B - 1)):
                scores[row, column] = _ZERO  # NaN, too
                continue
            left, above = math.floor(x), math.floor(y)
            u, v = splat(np.float32(x - left)), splat(np.float32(y - above))
            here = (row * scores.shape[1] + column) * channels
            there = (int(above) * columns_B + int(left)) * channels
            sums = splat(_ZERO)
            for c in range(0, channels, LANES):
                a = load(flat_A, np.uint64(here + c))
                upper = load(flat_B, np.uint64(there + c))
                lower = load(flat_B, np.uint64(there + line + c))
                upper = upper + u * (load(flat_B, np.uint64(there + channels + c)) - upper)
                lower = lower + u * (load(flat_B, np.uint64(there + line + channels + c)) - lower)
                sums = sums + a * (upper + v * (lower - upper))
            scores[row, column] = total(sums)


@numba.njit(forceinline=True)
@no_type_check
def _is_far(place, target, least):
    x, y = place[0] - target[0], place[1] - target[1]
    return least * least < x * x + y * y < _INFINITE  # false for NaN, too


@numba.njit(forceinline=True)
@no_type_check
def _clamp(index, count):
    return min(max(index, 0), count - 1)


@numba.njit(forceinline=True, fastmath=_FAST)
@no_type_check
def _mean_around(scores, row, column, half):
    """Mean of a window, of as much of it as there is."""
    sum_, count = _ZERO, 0
    for v in range(max(0, row - half), min(scores.shape[0], row + half + 1)):
        for u in range(max(0, column - half), min(scores.shape[1], column + half + 1)):
            sum_ += scores[v, u]
            count += 1
    return sum_ / np.float32(count)
