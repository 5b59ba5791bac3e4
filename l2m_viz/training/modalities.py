"""A photo as another sensor or a draughtsman might show it: false colours, edges, a pencil sketch.

From the brightness (1, H, W) alone, values in [0, 1]; nothing moves. These stand in for infrared, depth, event and
drawn pictures, of which single photos have no pairs: a matcher has to find the same shapes under other values.
"""

import math
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from l2m_viz.training.degradations import correlate, gaussian_blur

Modality = Literal["color", "grey", "false-color", "edges", "sketch"]

_SOBEL = np.outer([1.0, 2.0, 1.0], [-1.0, 0.0, 1.0]) / 8  # of a ramp: its slope per pixel
_TYPICAL = 4.0  # an edge that many times as strong as the average slope is white
_FLAT = 2e-3  # average slope of a picture without edges, which stays black
_PAPER = 0.03  # values as close as this are not told apart by the pencil


def false_colors(
    luma: Float[Tensor, "1 h w"],
    frequencies: tuple[float, float, float],
    phases: tuple[float, float, float],
) -> Float[Tensor, "3 h w"]:
    """Map brightness to colour smoothly: each channel is a cosine with so many periods between black and white.

    Args:
        luma: Brightness.
        frequencies: Periods of red, green and blue.
        phases: Where in their period they start, 0 to 1.
    """
    frequency, phase = (2 * math.pi * luma.new_tensor(each)[:, None, None] for each in (frequencies, phases))
    return torch.addcmul(phase, frequency, luma).cos_().mul_(0.5).add_(0.5)


def edges(luma: Float[Tensor, "1 h w"]) -> Float[Tensor, "1 h w"]:
    """Length of the gradient (Sobel), bright on black, in units of what is typical of the picture."""
    slope_x, slope_y = correlate(luma, _SOBEL), correlate(luma, _SOBEL.T)
    length = torch.hypot(slope_x, slope_y)
    return (length / (_TYPICAL * length.mean().clamp(min=_FLAT))).clamp_(max=1)


def sketch(luma: Float[Tensor, "1 h w"], sigma: float) -> Float[Tensor, "1 h w"]:
    """Pencil on paper: dark where a pixel is darker than its surroundings of ``sigma`` pixels, white elsewhere."""
    paper = gaussian_blur(luma, sigma).add_(_PAPER)
    return ((luma + _PAPER) / paper).clamp_(max=1) ** 3
