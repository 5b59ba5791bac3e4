"""A matched pair to look at: B warped into A, blended without smearing holes, lines, marks, legends, numbers.

Pictures here have a size fit for a screen; points and numbers stay in pixels of the original images. A pixel whose
certainty is below ``min_certainty`` is hatched, because the warped colour there would be an invention.
"""

import math
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from jaxtyping import Bool, Float
from matplotlib.figure import Figure
from torch import Tensor

from l2m_viz.data import fit_long_side, resize_image, to_uint8
from l2m_viz.errors import L2MError
from l2m_viz.geometry import (
    HW,
    normalized_grid,
    pixel_grid,
    sample_image,
    sample_warp,
    to_integer_centers,
    to_normalized,
    to_pixel,
)
from l2m_viz.matching import Match, Matches
from l2m_viz.show import figures
from l2m_viz.show.colors import COLOR_MAPS, Kind
from l2m_viz.show.report import Number

_STRIPE_PX = 6
_STRIPES = (0.45, 0.55)  # two greys: visible on a dark and on a bright picture, calm at a distance


@dataclass(frozen=True)
class PairView:
    """Two matched images at screen size, with B resampled onto the pixels of A."""

    image_A: Float[Tensor, "ha wa 3"]
    image_B: Float[Tensor, "hb wb 3"]
    warped_B: Float[Tensor, "ha wa 3"]
    certainty: Float[Tensor, "ha wa"]


def view_pair(image_A: Tensor, image_B: Tensor, match: Match, long_side: int = 900) -> PairView:
    """Reduce both images to the screen and sample B at the match of every pixel of A."""
    small_A, small_B = fit_long_side(image_A, long_side), fit_long_side(image_B, long_side)
    grid = normalized_grid(_hw(small_A))
    warp = sample_warp(match.warp_A_to_B, grid)
    certainty = sample_image(match.certainty_A_to_B, grid)
    return PairView(small_A, small_B, sample_image(small_B, warp), certainty)


def blend(view: PairView, share: float, min_certainty: float) -> Float[Tensor, "h w 3"]:
    """Mix A with B warped into A: ``share`` 0 is A, 1 is B; uncertain pixels go from A to hatching.

    Raises:
        L2MError: ``share`` is not in [0, 1].
    """
    if not 0 <= share <= 1:
        raise L2MError("blend", expected="a share in [0, 1]", got=f"{share}")
    certain = view.certainty >= min_certainty
    return torch.lerp(view.image_A, hatch_uncertain(view.warped_B, certain), share)


def hatch_uncertain(image: Float[Tensor, "h w 3"], certain: Bool[Tensor, "h w"]) -> Float[Tensor, "h w 3"]:
    """Cover the pixels that are not ``certain`` with grey diagonal stripes."""
    x, y = pixel_grid(_hw(image)).unbind(-1)
    odd = ((x + y) / _STRIPE_PX).floor() % 2 == 1
    stripes = torch.where(odd, *(torch.tensor(grey) for grey in _STRIPES))
    return torch.where(certain[..., None], image, stripes[..., None])


def mark_point(
    image: Float[Tensor, "h w 3"],
    point_px: Float[Tensor, "2"],
    hw: HW,
    color: tuple[float, float, float] = (0.0, 0.9, 1.0),
) -> Float[Tensor, "h w 3"]:
    """Draw a ring with a dot around a point given in pixels of the original of size ``hw``; returns a copy."""
    drawn = to_uint8(image)  # OpenCV smooths lines in 8 bits only
    center = to_integer_centers(to_pixel(to_normalized(point_px, hw), _hw(image)))
    x, y = (round(value * 16) for value in center.tolist())  # OpenCV's fixed point, 4 bits of fraction
    pen = max(2, round(max(drawn.shape) / 300))
    bright = tuple(255 * channel for channel in color)
    for thickness, ink in ((2 * pen, (0.0, 0.0, 0.0)), (pen, bright)):  # the dark rim shows on any background
        cv2.circle(drawn, (x, y), 7 * pen * 16, ink, thickness, cv2.LINE_AA, shift=4)
        cv2.circle(drawn, (x, y), thickness * 16, ink, -1, cv2.LINE_AA, shift=4)
    return torch.from_numpy(drawn).float() / 255


def match_lines(view: PairView, match: Match, matches: Matches) -> Figure:
    """Draw both images at one height with a line for every match, coloured by certainty, and nothing around."""
    height = min(view.image_A.shape[0], view.image_B.shape[0])
    image_A, image_B = _with_height(view.image_A, height), _with_height(view.image_B, height)
    scaled = Matches(
        to_pixel(to_normalized(matches.points_A, match.hw_A), _hw(image_A)),
        to_pixel(to_normalized(matches.points_B, match.hw_B), _hw(image_B)),
        matches.certainty,
    )
    figure = figures.matches(image_A, image_B, scaled, num=len(matches))
    axis, *color_bars = figure.axes
    axis.set_title("")  # text in one colour would vanish in one of the themes; see `legend_html`
    for color_bar in color_bars:
        color_bar.remove()
    figure.patch.set_alpha(0)
    figure.set_figheight(figure.get_figwidth() * height / (image_A.shape[1] + image_B.shape[1]))
    return figure


def legend_html(kind: Kind, low: str, high: str, label: str) -> str:
    """Colour bar of a map as a line of HTML that takes text colour and font from its page."""
    import matplotlib
    from matplotlib.colors import to_hex

    color_map = matplotlib.colormaps[COLOR_MAPS[kind]]
    colors = ", ".join(to_hex(color) for color in color_map(np.linspace(0, 1, 12)))
    return (
        f"<div style='display:flex;align-items:center;gap:.5em'><span>{low}</span>"
        f"<span style='flex:1;height:.8em;border-radius:2px;background:linear-gradient(to right, {colors})'></span>"
        f"<span>{high}</span><span>{label}</span></div>"
    )


def match_numbers(match: Match, num_matches: int, min_certainty: float) -> list[Number]:
    """What a match says about itself, without any truth."""
    certain = match.certainty_A_to_B >= min_certainty
    cycle_px = match.cycle_error()[certain]
    share = 100 * certain.float().mean().item()
    cycle = cycle_px.median().item() if len(cycle_px) else math.nan
    return [
        Number("overlap", match.overlap, "", "mean certainty, both directions"),
        Number("certain pixels of A", share, "%", f"certainty of at least {min_certainty:g}"),
        Number("cycle error", cycle, "px", "median of A to B to A, where certain"),
        Number("matches", num_matches, "", "sampled, or the matcher's own keypoints"),
    ]


def _with_height(image: Float[Tensor, "h w 3"], height: int) -> Float[Tensor, "h2 w2 3"]:
    width = max(1, round(image.shape[1] * height / image.shape[0]))
    return resize_image(image, (height, width))


def _hw(image: Tensor) -> HW:
    return image.shape[0], image.shape[1]
