"""Numba kernels of relighting: slopes of inverse depth, light with cast shadows, tone; eight pixels of a row at once.

`no_type_check` keeps the tests' jaxtyping hook from wrapping what numba compiles.

The rules are those of `l2m_viz.lifting.relighting`, whose `shade_batch` is the readable twin. The planes have a margin
of zeros on all sides: what a filter reads there counts as unknown, so no loop asks for the picture's border.
"""

from typing import no_type_check

import numba
import numpy as np

import l2m_viz.parallel  # noqa: F401 (says where compiled kernels are cached)
from l2m_viz._simd import (
    LANES,
    exp2,
    greater,
    load,
    load_at,
    load_column,
    log2,
    maximum,
    minimum,
    ramp,
    splat,
    sqrt,
    store,
    store_column,
    where_greater,
)

EDGE = 0.01  # px; rays end this far inside the picture, so that every place on them has a pixel
FAR = 1e30  # depth of what is unknown: finite, so that nothing becomes NaN
TINY, TINY_WEIGHT = 1e-30, 1e-12
SHARPEST = 1e6  # per relative depth: a point light
BACK_SLOPE = 5.0  # a shadow ends within a fifth of the thickness, not at once
# Planes: inverse depth; links to the right and to the lower neighbour; red, green and blue light without, and with
# shadows; sums over the row, first of the slopes and their weights (4), then of both kinds of light (6).
_W, _LINK_X, _LINK_Y, _LIT, _SEEN, _SUMS, _NUM_PLANES = 0, 1, 2, 3, 6, 9, 15
_FAST = {"contract", "nsz", "arcp"}  # NaN and infinity keep their meaning
_ZERO, _HALF, _ONE = np.float32(0), np.float32(0.5), np.float32(1)
_EDGE, _FAR = np.float32(EDGE), np.float32(FAR)
_TINY, _TINY_WEIGHT = np.float32(TINY), np.float32(TINY_WEIGHT)
_BLURRIEST, _BACK_SLOPE = np.float32(0.5 / SHARPEST), np.float32(BACK_SLOPE)
_DARKEST = np.float32(1e-9)  # of light and of colour in the logarithm; what is 0 stays 0


def empty_planes(hw, margin):
    """Working memory of one view, zeros; rows are whole vectors, with one to spare."""
    height, width = hw
    return np.zeros(
        (_NUM_PLANES, height + 2 * margin, 2 * margin + -(-width // LANES) * LANES + LANES), np.float32
    )


@numba.njit(forceinline=True, fastmath=_FAST)
@no_type_check
def _magnitude(a):
    return maximum(a, splat(_ZERO) - a)


@numba.njit(parallel=True, cache=True, fastmath=_FAST, error_model="numpy")
@no_type_check
def invert_depth(depth, valid, margin, far, planes):
    """Fill the plane of inverse depth, 0 where unknown, and far, which is depth or very far where unknown."""
    height, width = depth.shape
    for y in numba.prange(height):
        for x in range(width):
            known = valid[y, x]
            far[y, x] = depth[y, x] if known else _FAR
            planes[_W, y + margin, x + margin] = _ONE / depth[y, x] if known else _ZERO


@numba.njit(parallel=True, cache=True, fastmath=_FAST)
@no_type_check
def sum_rows(planes, margin, max_ratio, half, whole):
    """Fill the links, and the sums over each row of slopes along x, their weights, slopes along y, their weights."""
    rows, stride = planes.shape[1], planes.shape[2]
    zero, one = splat(_ZERO), splat(_ONE)
    for y in numba.prange(margin, rows - margin):
        w, below = planes[_W, y], planes[_W, y + 1]
        link_x, link_y = planes[_LINK_X, y], planes[_LINK_Y, y]
        for x in range(0, stride - LANES, LANES):
            i = np.uint64(x)
            here, right, down = load(w, i), load(w, np.uint64(x + 1)), load(below, i)
            low, high = minimum(here, right), maximum(here, right)
            store(link_x, i, where_greater(high, low * max_ratio, zero, where_greater(low, zero, one, zero)))
            low, high = minimum(here, down), maximum(here, down)
            store(link_y, i, where_greater(high, low * max_ratio, zero, where_greater(low, zero, one, zero)))
        for x in range(margin, stride - margin - LANES + 1, LANES):
            i = np.uint64(x)
            here, joined = load(w, i), load(link_y, i)
            sx, weight_x = zero, zero
            sy, weight_y = whole[0] * joined * (load(below, i) - here), whole[0] * joined
            to_right, to_left, right, left = one, one, here, here
            for k in range(1, len(whole)):
                r, l = np.uint64(x + k), np.uint64(x - k)
                to_right = to_right * load(link_x, np.uint64(x + k - 1))
                to_left = to_left * load(link_x, l)
                next_right, next_left = load(w, r), load(w, l)
                sx = sx + half[k - 1] * (to_right * (next_right - right) + to_left * (left - next_left))
                weight_x = weight_x + half[k - 1] * (to_right + to_left)
                right, left = next_right, next_left
                by_right, by_left = to_right * load(link_y, r), to_left * load(link_y, l)
                sy = sy + whole[k] * (by_right * (load(below, r) - right) + by_left * (load(below, l) - left))
                weight_y = weight_y + whole[k] * (by_right + by_left)
            store(planes[_SUMS, y], i, sx)
            store(planes[_SUMS + 1, y], i, weight_x)
            store(planes[_SUMS + 2, y], i, sy)
            store(planes[_SUMS + 3, y], i, weight_y)


@numba.njit(forceinline=True, fastmath=_FAST)
@no_type_check
def _slopes(flat, p, stride, plane, half, whole):
    """Slopes (sx, sy) of inverse depth at place ``p``, from the sums of the rows about it."""
    zero, one = splat(_ZERO), splat(_ONE)
    link, next_ = p + np.uint64(_LINK_Y * plane), np.uint64(plane)
    x = p + np.uint64(_SUMS * plane)
    y = x + np.uint64(2 * plane)
    sx, weight_x = whole[0] * load(flat, x), whole[0] * load(flat, x + next_)
    sy, weight_y = zero, zero
    down, up = one, one
    for k in range(1, len(whole)):
        step, last = np.uint64(k * stride), np.uint64((k - 1) * stride)
        down, up = down * load(flat, link + last), up * load(flat, link - step)
        sx = sx + whole[k] * (down * load(flat, x + step) + up * load(flat, x - step))
        weight_x = weight_x + whole[k] * (
            down * load(flat, x + next_ + step) + up * load(flat, x + next_ - step)
        )
        sy = sy + half[k - 1] * (down * load(flat, y + last) + up * load(flat, y - step))
        weight_y = weight_y + half[k - 1] * (
            down * load(flat, y + next_ + last) + up * load(flat, y + next_ - step)
        )
    tiny = splat(_TINY_WEIGHT)
    return sx / maximum(weight_x, tiny), sy / maximum(weight_y, tiny)


@numba.njit(forceinline=True, fastmath=_FAST)
@no_type_check
def _visible(far, hw, pinhole, pixel, w, point, to_light, light_z, radius, bias, limits, stagger, growth):
    """Share of a light that reaches eight pixels."""
    (fx, fy, cx, cy), (u, v), (px, py, z), (dx, dy, dz) = pinhole, pixel, point, to_light
    height, width = hw
    thickness, near_ratio = limits[1], limits[2]
    zero, one = splat(_ZERO), splat(_ONE)
    near = near_ratio * z
    part = where_greater(near, splat(light_z), (near - z) / dz, one)
    w_end = one / (z + part * dz)
    du = fx * ((px + part * dx) * w_end) + cx - u
    dv = fy * ((py + part * dy) * w_end) + cy - v
    right, bottom, tiny = np.float32(width) - _EDGE, np.float32(height) - _EDGE, splat(_TINY)
    inside_u = where_greater(du, zero, right - u, u - _EDGE) / maximum(_magnitude(du), tiny)
    inside_v = where_greater(dv, zero, bottom - v, v - _EDGE) / maximum(_magnitude(dv), tiny)
    length = minimum(minimum(inside_u, inside_v), one)
    sharpness = _HALF / maximum(radius * part * w_end * length, splat(_BLURRIEST))
    step = length / np.float32(len(growth))
    du, dv, dw = du * step, dv * step, (w_end - w) * step
    u, v, w = u + stagger * du, v + stagger * dv, w + stagger * dw
    # The surface is behind the ray by `clearance` less 1 and the bias; both ends of the shadow are linear in it.
    end = _BACK_SLOPE / thickness
    less, rear = bias - _ONE, (thickness - bias) * end
    deep = _magnitude(dw)
    dark, last = zero, height * width - 1
    for k in range(len(growth)):
        depth = load_at(far, u + np.float32(k) * du, v + np.float32(k) * dv, width, last)
        clearance = depth * (w + np.float32(k) * dw) + less
        front = _HALF - clearance * (sharpness * growth[k])
        dark = maximum(dark, minimum(front, (clearance + depth * deep) * end + rear))
    return maximum(one - dark, zero)


@numba.njit(parallel=True, cache=True, fastmath=_FAST)
@no_type_check
def light_rows(far, planes, margin, half, whole, pinhole, lamps, shadows, limits, stagger, growth):
    """Fill the planes of direct light. A row of the first of ``lamps`` is x, y, z, red, green, blue of a light."""
    lights, radius, min_distance = lamps
    height, width = far.shape
    stride, plane = planes.shape[2], planes.shape[1] * planes.shape[2]
    flat, flat_far = planes.reshape(-1), far.reshape(-1)
    fx, fy, cx, cy = pinhole
    zero, one = splat(_ZERO), splat(_ONE)
    closest = splat(min_distance * min_distance)
    starts = np.concatenate((stagger, stagger), axis=1)
    for y in numba.prange(height):
        v = splat(np.float32(y) + _HALF)
        start = load(starts[y % 4], np.uint64(0))
        for x in range(0, width, LANES):
            u = minimum(ramp() + (np.float32(x) + _HALF), splat(np.float32(width) - _HALF))
            p = np.uint64((y + margin) * stride + x + margin)
            w = load(flat, p)
            known, w = where_greater(w, zero, one, zero), where_greater(w, zero, w, one)
            sx, sy = _slopes(flat, p, stride, plane, half, whole)
            # Away from the camera, and not of length 1.
            nx, ny, nz = fx * sx, fy * sy, w - sx * (u - cx) - sy * (v - cy)
            known = known / sqrt(nx * nx + ny * ny + nz * nz)
            z = one / w
            px, py = (u - cx) / fx * z, (v - cy) / fy * z
            bias = limits[0] + _HALF * (_magnitude(sx) + _magnitude(sy)) * z
            red, green, blue = zero, zero, zero
            red_seen, green_seen, blue_seen = zero, zero, zero
            for i in range(len(lights)):
                dx, dy, dz = lights[i, 0] - px, lights[i, 1] - py, lights[i, 2] - z
                facing = (zero - known) * (nx * dx + ny * dy + nz * dz)
                if greater(facing, zero) == 0:
                    continue
                square = maximum(dx * dx + dy * dy + dz * dz, splat(_TINY))
                light = maximum(facing, zero) / (sqrt(square) * maximum(square, closest))
                r, g, b = light * lights[i, 3], light * lights[i, 4], light * lights[i, 5]
                red, green, blue = red + r, green + g, blue + b
                if shadows:
                    seen = _visible(
                        flat_far, (height, width), pinhole, (u, v), w, (px, py, z), (dx, dy, dz), lights[i, 2],
                        radius, bias, limits, start, growth,
                    )  # fmt: skip
                    red_seen, green_seen = red_seen + seen * r, green_seen + seen * g
                    blue_seen = blue_seen + seen * b
            q, next_ = p + np.uint64(_LIT * plane), np.uint64(plane)
            store(flat, q, red)
            store(flat, q + next_, green)
            store(flat, q + next_ + next_, blue)
            q = p + np.uint64(_SEEN * plane)
            store(flat, q, red_seen)
            store(flat, q + next_, green_seen)
            store(flat, q + next_ + next_, blue_seen)


@numba.njit(forceinline=True, fastmath=_FAST)
@no_type_check
def _paths(flat, link, step, weights):
    """Weights of the neighbours at -2, -1, 1 and 2 steps: 0 where no unbroken links lead there."""
    before, after = load(flat, link - step), load(flat, link)
    beyond, ahead = before * load(flat, link - step - step), after * load(flat, link + step)
    return weights[2] * beyond, weights[1] * before, weights[1] * after, weights[2] * ahead


@numba.njit(forceinline=True, fastmath=_FAST)
@no_type_check
def _sum(flat, p, step, weight, paths):
    """Weighted sum of five neighbours."""
    near = paths[1] * load(flat, p - step) + paths[2] * load(flat, p + step)
    far = paths[0] * load(flat, p - step - step) + paths[3] * load(flat, p + step + step)
    return weight * load(flat, p) + near + far


@numba.njit(parallel=True, cache=True, fastmath=_FAST)
@no_type_check
def blur_rows(planes, margin, weights):
    """Fill the sums over each row of the six planes of light."""
    rows, stride = planes.shape[1], planes.shape[2]
    plane = rows * stride
    flat, one = planes.reshape(-1), np.uint64(1)
    for y in numba.prange(margin, rows - margin):
        for x in range(margin, stride - margin - LANES + 1, LANES):
            p = np.uint64(y * stride + x)
            paths = _paths(flat, p + np.uint64(_LINK_X * plane), one, weights)
            for channel in range(6):
                light = _sum(flat, p + np.uint64((_LIT + channel) * plane), one, weights[0], paths)
                store(flat, p + np.uint64((_SUMS + channel) * plane), light)


@numba.njit(forceinline=True, fastmath=_FAST)
@no_type_check
def _tone(color, light, powers):
    """min(1, color light^power)^gamma, in the logarithm."""
    zero, darkest = splat(_ZERO), splat(_DARKEST)
    exponent = powers[1] * (log2(maximum(color, darkest)) + powers[0] * log2(maximum(light, darkest)))
    value = minimum(exp2(maximum(minimum(exponent, zero), splat(np.float32(-120)))), splat(_ONE))
    return where_greater(minimum(color, light), zero, value, zero)


@numba.njit(parallel=True, cache=True, fastmath=_FAST)
@no_type_check
def tone_rows(image, planes, margin, shadows, weights, response, powers, out):
    """Fill out (H, W, 3): sum over columns for the shadows, add ambient light, apply the camera's response."""
    height, width = image.shape[0], image.shape[1]
    stride, plane = planes.shape[2], planes.shape[1] * planes.shape[2]
    ambient, gain = response
    flat, flat_image, flat_out = planes.reshape(-1), image.reshape(-1, 3), out.reshape(-1, 3)
    row, tiny = np.uint64(stride), splat(_TINY)
    for y in numba.prange(height):
        end = np.uint64(y * width + width - 1)
        for x in range(0, width, LANES):
            i, p = np.uint64(y * width + x), np.uint64((y + margin) * stride + x + margin)
            paths = _paths(flat, p + np.uint64(_LINK_Y * plane), row, weights)
            for channel in range(3):
                light = load(flat, p + np.uint64((_LIT + channel) * plane))
                if shadows:
                    sums = p + np.uint64((_SUMS + channel) * plane)
                    lit = maximum(_sum(flat, sums, row, weights[0], paths), tiny)
                    light = light * (_sum(flat, sums + np.uint64(3 * plane), row, weights[0], paths) / lit)
                light = (light + ambient[channel]) * gain[channel]
                color = load_column(flat_image, i, end, np.uint64(channel))
                store_column(flat_out, i, end, np.uint64(channel), _tone(color, light, powers))
