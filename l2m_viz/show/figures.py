"""Figures as pure functions: arrays in, a matplotlib `Figure` out. No pyplot, so that any thread may draw.

In a notebook, `%matplotlib inline` makes a figure that ends a cell visible.
"""

import io
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from torch import Tensor

from l2m_viz.errors import ShapeError
from l2m_viz.geometry import to_integer_centers
from l2m_viz.matching import Matches
from l2m_viz.show.colors import COLOR_MAPS, NOTHING, ScalarKind, value_limits

_LABELS_PER_INCH = 3.5  # under the bars of a compositing table; more would overlap
_EXTEND = {(False, False): "neither", (True, False): "min", (False, True): "max", (True, True): "both"}
_PANEL_INCHES, _BAR_INCHES, _TITLE_INCHES, _MIN_INCHES = 4.2, 0.75, 0.35, 0.6
_MAX_ASPECT = 2.0  # of a picture's frame: a taller one is drawn narrower in it


@dataclass(frozen=True)
class Panel:
    """One picture of a figure: an image (H, W, 3), a bool mask (H, W), or a scalar map (H, W) with its colour bar.

    ``mask`` is True where there is something to show; the rest is grey. ``label`` names the value and its unit.
    ``points`` (pixels) get a ring.
    """

    title: str
    values: Float[Tensor, "h w *rgb"] | Bool[Tensor, "h w"]
    kind: Literal["image", "mask"] | ScalarKind = "image"
    mask: Bool[Tensor, "h w"] | None = None
    label: str = ""
    limits: tuple[float, float] | None = None
    points: Float[Tensor, "n 2"] | None = None


def panels(*contents: Panel, columns: int = 3) -> Figure:
    """Draw pictures and maps in rows of ``columns``.

    Raises:
        ShapeError: there is nothing to draw.
    """
    if not contents:
        raise ShapeError("panels", expected="at least one Panel", got="none")
    columns = min(columns, len(contents))
    rows = -(-len(contents) // columns)
    aspect = max(panel.values.shape[0] / panel.values.shape[1] for panel in contents)
    bars = any(panel.kind in COLOR_MAPS for panel in contents[: columns * rows])
    picture_width = _PANEL_INCHES - _BAR_INCHES * bars
    height = max(picture_width * min(aspect, _MAX_ASPECT), _MIN_INCHES) + _TITLE_INCHES
    figure = Figure(figsize=(_PANEL_INCHES * columns, height * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis, panel in zip(axes, contents, strict=False):
        _draw_panel(figure, axis, panel)
    for axis in axes[len(contents) :]:
        axis.set_axis_off()
    return figure


def matches(
    image_A: Float[Tensor, "ha wa 3"],
    image_B: Float[Tensor, "hb wb 3"],
    matches: Matches,
    *,
    num: int = 150,
    title: str = "",
) -> Figure:
    """Draw two images side by side with lines between matched points.

    At most ``num`` lines, evenly spread over the list; the colour is the certainty.
    """
    gap = image_A.shape[1] // 40
    height = max(image_A.shape[0], image_B.shape[0])
    width = image_A.shape[1] + gap + image_B.shape[1]
    canvas = torch.ones(height, width, 3)
    canvas[: image_A.shape[0], : image_A.shape[1]] = image_A
    canvas[: image_B.shape[0], image_A.shape[1] + gap :] = image_B
    widest = 2.4 * _PANEL_INCHES - _BAR_INCHES
    axis_height = max(widest * min(height / width, 1.0), _MIN_INCHES)
    axis_width = max(
        min(widest, axis_height * width / height), 4 * _MIN_INCHES
    )  # two strips need no more paper
    figsize = axis_width + _BAR_INCHES, axis_height + _TITLE_INCHES
    figure = Figure(figsize=figsize, layout="constrained")
    axis = figure.subplots()
    axis.imshow(canvas.numpy(), extent=(0, width, height, 0))  # continuous pixel coordinates: [0, W] x [0, H]
    _hide_frame(axis)
    if len(matches):
        shown = torch.linspace(0, len(matches) - 1, min(num, len(matches))).long()
        ends_A = matches.points_A[shown]
        ends_B = matches.points_B[shown] + torch.tensor([float(image_A.shape[1] + gap), 0.0])
        lines = LineCollection(
            list(torch.stack([ends_A, ends_B], dim=1).numpy()),
            array=matches.certainty[shown].numpy(),
            cmap=COLOR_MAPS["certainty"],
            linewidths=0.8,
            alpha=0.8,
        )
        lines.set_clim(0, 1)
        axis.add_collection(lines)
        figure.colorbar(lines, ax=axis, label="certainty", fraction=0.02)
    drawn = min(num, len(matches))
    lines_drawn = f"{drawn} matches" if drawn == len(matches) else f"{drawn} of {len(matches)} matches"
    axis.set_title(f"{title}: {lines_drawn}" if title else lines_drawn, fontsize=10)
    return figure


def compositing_table(
    weights: Float[Tensor, " n"],
    depths: Float[Tensor, " n"],
    colors: Float[Tensor, "n 3"] | None = None,
    *,
    unit: str = "",
    size: tuple[float, float] = (6, 3),
) -> Figure:
    """Bars of what each Gaussian contributes to one pixel, front to back, in the Gaussian's colour if given.

    Where there are many, only some have their depth (in ``unit``) written under them; ``size`` is in inches.
    """
    figure = Figure(figsize=size, layout="constrained")
    axis = figure.subplots()
    bar_colors = "tab:blue" if colors is None else colors.clamp(0, 1).numpy()
    axis.bar(range(len(weights)), weights.numpy(), color=bar_colors, edgecolor="black", linewidth=0.5)
    labelled = range(0, len(weights), 1 + int(len(weights) / (_LABELS_PER_INCH * size[0])))
    axis.set_xticks(labelled, [f"{depths[i]:.2f}" for i in labelled], rotation=90)
    axis.set_xlabel(f"depth of the Gaussian{f' ({unit})' if unit else ''}, front to back")
    axis.set_ylabel("weight")
    return figure


def to_png(figure: Figure, dpi: int = 110) -> bytes:
    """Encode a figure as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def _draw_panel(figure: Figure, axis: Axes, panel: Panel) -> None:
    axis.set_title(panel.title, fontsize=10)
    _hide_frame(axis)
    if panel.points is not None:
        x, y = to_integer_centers(panel.points).T.numpy()  # imshow's pixel centres
        axis.plot(x, y, "o", markersize=9, fillstyle="none", color="white", markeredgewidth=3)
        axis.plot(x, y, "o", markersize=9, fillstyle="none", color="black", markeredgewidth=1)
    if panel.kind == "image":
        values = panel.values.clamp(0, 1)
        shown = values if panel.mask is None else torch.where(panel.mask[..., None], values, NOTHING)
        axis.imshow(shown.numpy())
        return
    if panel.kind == "mask":
        axis.imshow(panel.values.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        return
    low, high = panel.limits or value_limits(panel.values, panel.kind, panel.mask)
    values = panel.values.numpy().copy()
    axis.set_facecolor(str(NOTHING))
    if panel.mask is not None:
        values[~panel.mask.numpy()] = float("nan")
    picture = axis.imshow(values, cmap=COLOR_MAPS[panel.kind], vmin=low, vmax=high, interpolation="nearest")
    _color_bar(figure, axis, picture, panel.label)


def _hide_frame(axis: Axes) -> None:
    """No ticks, no lines."""
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set_visible(False)


def _color_bar(figure: Figure, axis: Axes, picture: ScalarMappable, label: str) -> None:
    """A bar beside the picture, exactly as high, with a point at each end that some values lie beyond."""
    (low, high), shown = picture.get_clim(), picture.get_array()
    assert shown is not None  # an image has its values
    values = np.ma.compressed(shown)
    margin = 1e-3 * (high - low)  # less is rounding, and nothing that one could see
    extend = _EXTEND[bool((values < low - margin).any()), bool((values > high + margin).any())]
    figure.colorbar(picture, cax=axis.inset_axes((1.02, 0, 0.035, 1)), label=label, extend=extend)
