"""Training pairs to look at: whether the truth is true shows when B, warped into A by it, looks like A."""

import math
from collections.abc import Sequence

import matplotlib
import numpy as np
import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, hsv_to_rgb
from matplotlib.figure import Figure
from torch import Tensor

from l2m_viz.errors import ShapeError
from l2m_viz.geometry import HW, from_integer_centers, sample_image, to_pixel
from l2m_viz.matching import Matches
from l2m_viz.show.colors import COLOR_MAPS, NOTHING, colorize
from l2m_viz.training.pairs import Pair

# One scale for all pairs, or they could not be compared: a quarter of the range of colours is plainly another colour.
ERROR_LIMITS = (0.0, 0.25)

_COLUMNS = ("A", "B", "B warped into A", "covisible in A", "error")
_CELL_INCHES, _LABEL_INCHES, _HEAD_INCHES, _FOOT_INCHES, _GAP_INCHES = 2.3, 0.75, 0.3, 0.55, 0.06


def sample_correspondences(pair: Pair, num: int, generator: torch.Generator | None = None) -> Matches:
    """Draw at most ``num`` covisible pixels of A, evenly spread over what is covisible, with their places in B."""
    y, x = torch.nonzero(pair.covisibility_A_to_B, as_tuple=True)
    side = max(1.0, math.sqrt(len(x) / max(num, 1)))  # one point in each cell of this size makes about num
    order = torch.randperm(len(x), generator=generator)
    y, x = y[order], x[order]
    cells = torch.stack([y, x], dim=-1).div(side, rounding_mode="floor").numpy()
    _, first = np.unique(cells, axis=0, return_index=True)
    chosen = torch.from_numpy(
        np.sort(first)[:num]
    )  # in random order, so that no part of the picture is cut off
    y, x = y[chosen], x[chosen]
    hw_B = pair.depth_B.shape[0], pair.depth_B.shape[1]
    points_A = from_integer_centers(torch.stack([x, y], dim=-1).float())
    points_B = to_pixel(pair.warp_A_to_B[y, x], hw_B)
    return Matches(points_A, points_B, torch.ones(len(x)))


def position_colors(points_px: Float[Tensor, "n 2"], hw: HW) -> Float[Tensor, "n 3"]:
    """A colour for every place of an image: the hue goes around its centre, which is white."""
    x, y = (points_px / points_px.new_tensor([hw[1], hw[0]]) * 2 - 1).unbind(-1)
    hue = torch.atan2(y, x) / (2 * math.pi) % 1
    saturation = torch.hypot(x, y).clamp(0, 1)
    hsv = torch.stack([hue, saturation, torch.ones_like(hue)], dim=-1)
    return torch.from_numpy(hsv_to_rgb(hsv.numpy()).astype(np.float32))


def warp_error(pair: Pair) -> tuple[Float[Tensor, "h w 3"], Float[Tensor, "h w"]]:
    """Return B warped into A by the truth, and the mean absolute difference of its colours from A's.

    Both mean something where A is covisible.
    """
    warped = sample_image(pair.image_B, pair.warp_A_to_B)
    return warped, (warped - pair.image_A).abs().mean(dim=-1)


def contact_sheet(
    pairs: Sequence[Pair], titles: Sequence[str] = (), *, num_points: int = 40, side_by_side: int = 1
) -> Figure:
    """Draw each pair in a row: A, B, B warped into A, what is covisible, and the error.

    Dots of one colour in A and B are one point of the scene. What is not covisible is grey.

    Args:
        pairs: Pairs of one size.
        titles: What is written beside each, if anything.
        num_points: Corresponding points drawn in A and B.
        side_by_side: Pairs in a row of the sheet.

    Raises:
        ShapeError: there is nothing to draw, or not one title for each pair.
    """
    if not pairs or len(titles) not in (0, len(pairs)):
        expected, got = "at least one pair, and a title for each or none", f"{len(pairs)} and {len(titles)}"
        raise ShapeError("contact_sheet", expected=expected, got=got)
    aspect = max(pair.depth_A.shape[0] / pair.depth_A.shape[1] for pair in pairs)
    cell_wh = _CELL_INCHES, _CELL_INCHES * aspect
    side_by_side = min(side_by_side, len(pairs))
    rows = -(-len(pairs) // side_by_side)
    label = _LABEL_INCHES * bool(titles)
    block = label + len(_COLUMNS) * (cell_wh[0] + _GAP_INCHES)
    size = side_by_side * block, _HEAD_INCHES + rows * (cell_wh[1] + _GAP_INCHES) + _FOOT_INCHES
    figure = Figure(figsize=size)
    for number, pair in enumerate(pairs):
        row, place = divmod(number, side_by_side)
        left = place * block + label
        bottom = size[1] - _HEAD_INCHES - row * (cell_wh[1] + _GAP_INCHES) - cell_wh[1]
        axes = [
            _axes(figure, (left + column * (cell_wh[0] + _GAP_INCHES), bottom), cell_wh)
            for column in range(len(_COLUMNS))
        ]
        _draw_pair(axes, pair, num_points)
        if titles:
            axes[0].set_ylabel(titles[number], rotation=0, ha="right", va="center", fontsize=9)
        if row == 0:
            for axis, name in zip(axes, _COLUMNS, strict=True):
                axis.set_title(name, fontsize=10)
    _draw_bar(figure, (size[0] - cell_wh[0] - _GAP_INCHES, 0.7 * _FOOT_INCHES), cell_wh[0])
    return figure


def _axes(figure: Figure, corner: tuple[float, float], wh: tuple[float, float]) -> Axes:
    """Axes without a frame at a place in inches."""
    width, height = figure.get_size_inches()
    axis = figure.add_axes((corner[0] / width, corner[1] / height, wh[0] / width, wh[1] / height))
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set_visible(False)
    return axis


def _draw_pair(axes: Sequence[Axes], pair: Pair, num_points: int) -> None:
    warped, error = warp_error(pair)
    seen = pair.covisibility_A_to_B
    pictures = (
        pair.image_A,
        pair.image_B,
        torch.where(seen[..., None], warped, NOTHING),
        seen[..., None].float().expand(-1, -1, 3),
        colorize(error, "error", seen, ERROR_LIMITS),
    )
    for axis, picture in zip(axes, pictures, strict=True):
        height, width = picture.shape[:2]
        # continuous pixel coordinates: [0, W] x [0, H]
        axis.imshow(picture.clamp(0, 1).numpy(), extent=(0, width, height, 0), interpolation="nearest")
    points = sample_correspondences(pair, num_points, torch.Generator().manual_seed(0))
    hw = pair.depth_A.shape[0], pair.depth_A.shape[1]
    colors = position_colors(points.points_A, hw).numpy()
    for axis, (x, y) in zip(axes, (points.points_A.T.numpy(), points.points_B.T.numpy()), strict=False):
        axis.scatter(x, y, s=26, c=colors, edgecolors="black", linewidths=0.8)


def _draw_bar(figure: Figure, corner: tuple[float, float], width: float) -> None:
    axis = _axes(figure, corner, (width, 0.12))
    scale = ScalarMappable(Normalize(*ERROR_LIMITS), matplotlib.colormaps[COLOR_MAPS["error"]])
    bar = figure.colorbar(scale, cax=axis, orientation="horizontal", extend="max")
    bar.ax.tick_params(labelsize=8)
    bar.set_label("|warped B − A|, mean of RGB", fontsize=8)
