"""Figures as pure functions: arrays in, a matplotlib `Figure` out. No pyplot, so that any thread may draw.

In a notebook, `%matplotlib inline` makes a figure that ends a cell visible.
"""

import io
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from torch import Tensor

from l2m_viz.errors import ShapeError
from l2m_viz.matching import Matches
from l2m_viz.show.colors import COLOR_MAPS, NOTHING, value_limits

_PANEL_INCHES = 4.2


@dataclass(frozen=True)
class Panel:
    """One picture of a figure: an image (H, W, 3), or a scalar map (H, W) with its colour bar.

    ``mask`` is True where there is something to show; the rest is grey. ``label`` names the value and its unit.
    """

    title: str
    values: Float[Tensor, "h w *rgb"]
    kind: Literal["image", "depth", "certainty", "error"] = "image"
    mask: Bool[Tensor, "h w"] | None = None
    label: str = ""
    limits: tuple[float, float] | None = None


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
    height = _PANEL_INCHES * min(aspect, 2.0) + 0.45
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
    errors_px: Float[Tensor, " n"] | None = None,
    title: str = "",
) -> Figure:
    """Draw two images side by side with lines between matched points.

    At most ``num`` lines, evenly spread over the list; the colour is the error in pixels if given, else the certainty.
    """
    gap = image_A.shape[1] // 40
    height = max(image_A.shape[0], image_B.shape[0])
    width = image_A.shape[1] + gap + image_B.shape[1]
    canvas = torch.ones(height, width, 3)
    canvas[: image_A.shape[0], : image_A.shape[1]] = image_A
    canvas[: image_B.shape[0], image_A.shape[1] + gap :] = image_B
    figure = Figure(
        figsize=(2.4 * _PANEL_INCHES, 2.4 * _PANEL_INCHES * height / width + 0.4), layout="constrained"
    )
    axis = figure.subplots()
    axis.imshow(canvas.numpy(), extent=(0, width, height, 0))  # continuous pixel coordinates: [0, W] x [0, H]
    axis.set_axis_off()
    if len(matches):
        shown = torch.linspace(0, len(matches) - 1, min(num, len(matches))).long()
        ends_A = matches.points_A[shown]
        ends_B = matches.points_B[shown] + torch.tensor([float(image_A.shape[1] + gap), 0.0])
        values = matches.certainty[shown] if errors_px is None else errors_px[shown]
        kind = "certainty" if errors_px is None else "error"
        lines = LineCollection(
            list(torch.stack([ends_A, ends_B], dim=1).numpy()),
            array=values.numpy(),
            cmap=COLOR_MAPS[kind] if kind == "certainty" else "turbo",
            linewidths=0.8,
            alpha=0.8,
        )
        lines.set_clim(*((0, 1) if errors_px is None else (0, 5)))
        axis.add_collection(lines)
        figure.colorbar(
            lines, ax=axis, label="certainty" if errors_px is None else "error (px)", fraction=0.02
        )
    axis.set_title(title or f"{len(matches)} matches", fontsize=10)
    return figure


def compositing_table(weights: Float[Tensor, " n"], depths: Float[Tensor, " n"]) -> Figure:
    """Bars of what each Gaussian contributes to one pixel, front to back."""
    figure = Figure(figsize=(6, 3), layout="constrained")
    axis = figure.subplots()
    axis.bar(range(len(weights)), weights.numpy(), color="tab:blue")
    axis.set_xticks(range(len(weights)), [f"{depth:.2f}" for depth in depths.tolist()], rotation=90)
    axis.set_xlabel("depth of the Gaussian, front to back")
    axis.set_ylabel("weight")
    return figure


def to_png(figure: Figure, dpi: int = 110) -> bytes:
    """Encode a figure as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def _draw_panel(figure: Figure, axis, panel: Panel) -> None:  # noqa: ANN001 (matplotlib's Axes is not generic)
    axis.set_title(panel.title, fontsize=10)
    axis.set_xticks([])
    axis.set_yticks([])
    if panel.kind == "image":
        values = panel.values.clamp(0, 1)
        shown = values if panel.mask is None else torch.where(panel.mask[..., None], values, NOTHING)
        axis.imshow(shown.numpy())
        return
    low, high = panel.limits or value_limits(panel.values, panel.kind, panel.mask)
    values = panel.values.numpy().copy()
    axis.set_facecolor(str(NOTHING))
    if panel.mask is not None:
        values[~panel.mask.numpy()] = float("nan")
    picture = axis.imshow(values, cmap=COLOR_MAPS[panel.kind], vmin=low, vmax=high, interpolation="nearest")
    figure.colorbar(
        picture, ax=axis, label=panel.label, fraction=0.046 * panel.values.shape[0] / panel.values.shape[1]
    )
