"""Numbers to colours.

One colour map for each kind of map, everywhere: turbo for depth, viridis for certainty, magma for error, blue over
light grey to red for similarity, the HSV wheel for flow; middle grey where there is nothing to show.
"""

import math
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

ScalarKind = Literal["depth", "certainty", "error", "similarity"]
Kind = Literal["depth", "certainty", "error", "similarity", "flow"]

COLOR_MAPS = {"depth": "turbo_r", "certainty": "viridis", "error": "magma", "similarity": "coolwarm"}
_FIXED_LIMITS = {"certainty": (0.0, 1.0), "similarity": (-1.0, 1.0)}
NOTHING = 0.5  # grey


def colorize(
    values: Float[Tensor, "h w"],
    kind: ScalarKind,
    mask: Bool[Tensor, "h w"] | None = None,
    limits: tuple[float, float] | None = None,
) -> Float[Tensor, "h w 3"]:
    """Colours of a scalar map; ``mask`` is True where there is something to show."""
    import matplotlib

    low, high = limits or value_limits(values, kind, mask)
    normalized = ((values - low) / max(high - low, 1e-12)).clamp(0, 1)
    colors = matplotlib.colormaps[COLOR_MAPS[kind]](normalized.numpy())[..., :3]
    out = torch.from_numpy(np.ascontiguousarray(colors, np.float32))
    return out if mask is None else torch.where(mask[..., None], out, NOTHING)


def value_limits(
    values: Float[Tensor, "h w"],
    kind: ScalarKind,
    mask: Bool[Tensor, "h w"] | None = None,
) -> tuple[float, float]:
    """Range of a colour map.

    [0, 1] for certainty, [-1, 1] for similarity, [0, 95th percentile] for error, 1st to 99th percentile for depth.
    """
    if kind in _FIXED_LIMITS:
        return _FIXED_LIMITS[kind]
    shown = values if mask is None else values[mask]
    if shown.numel() == 0:
        return 0.0, 1.0
    low, middle, high = np.percentile(shown.numpy(), (1, 95, 99)).tolist()
    return (0.0, max(middle, 1e-6)) if kind == "error" else (low, high)


def flow_colors(flow: Float[Tensor, "h w 2"], max_px: float | None = None) -> Float[Tensor, "h w 3"]:
    """Hue is the direction of the displacement, saturation its length over ``max_px`` (99th percentile if None)."""
    from matplotlib.colors import hsv_to_rgb

    length = flow.norm(dim=-1)
    scale = max_px or max(float(np.percentile(length.numpy(), 99)), 1e-6)
    hue = torch.atan2(flow[..., 1], flow[..., 0]) / (2 * math.pi) % 1
    hsv = torch.stack([hue, (length / scale).clamp(0, 1), torch.ones_like(hue)], dim=-1)
    return torch.from_numpy(hsv_to_rgb(hsv.numpy()).astype(np.float32))
