"""Figures that the notebooks need beyond pictures and matches: a scene from above, splats on the pixel grid, curves."""

import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.collections import EllipseCollection
from matplotlib.figure import Figure
from torch import Tensor

from l2m_viz.errors import L2MError
from l2m_viz.gaussians.reference import ScreenGaussians
from l2m_viz.geometry import Camera, normalized_grid, sample_image, unproject

_MAX_POINTS = 60_000  # drawn at random; more do not look different in a figure of this size
_DIMMED = 0.5  # a photo that is only there to say where things are
_LIGHT = torch.tensor([1.0, 0.9, 0.1])
Window = tuple[int, int, int, int]
"""Part of an image: left, top, right, bottom in pixels; right and bottom are outside."""


def top_view(
    points: Float[Tensor, "n 3"],
    colors: Float[Tensor, "n 3"],
    cameras: dict[str, Camera] | None = None,
    *,
    unit: str = "m",
) -> Figure:
    """Draw points from above, x to the right and z (forward) upwards, with the frustum of each named camera."""
    some = torch.randperm(len(points), generator=torch.Generator().manual_seed(0))[:_MAX_POINTS]
    figure = Figure(figsize=(7, 6), layout="constrained")
    axis = figure.subplots()
    # Lowest first (+y is down), so that what is above hides what is below, as it does from above.
    order = some[points[some, 1].argsort(descending=True)]
    x, _, z = points[order].unbind(-1)
    axis.scatter(x.numpy(), z.numpy(), c=colors[order].clamp(0, 1).numpy(), s=2, linewidths=0)
    depth = points[:, 2].median()
    for number, (name, camera) in enumerate((cameras or {}).items()):
        _draw_frustum(axis, name, camera, depth, f"C{number}")
    axis.set_aspect("equal")
    axis.set_xlabel(f"x ({unit}), right")
    axis.set_ylabel(f"z ({unit}), forward")
    if cameras:
        axis.legend(loc="lower right")
    return figure


def _draw_frustum(axis: Axes, name: str, camera: Camera, depth: Tensor, color: str) -> None:
    """Centre, and the two rays through the middle of the left and right border, up to ``depth`` of the camera."""
    middle = camera.height / 2
    borders = torch.tensor([[0.0, middle], [float(camera.width), middle]])
    ends = unproject(borders, depth.expand(2), camera.K) @ camera.w2c[:3, :3] + camera.center  # R^T X + c
    for end in ends:
        x, _, z = torch.stack([camera.center, end]).unbind(-1)
        axis.plot(x.numpy(), z.numpy(), color=color, linewidth=1)
    axis.plot(*camera.center[[0, 2]].tolist(), "o", color=color, label=f"camera {name}")


def discs(image: Float[Tensor, "h w 3"], screen: ScreenGaussians, window: Window) -> Figure:
    """Draw projected Gaussians over a part of an image: an ellipse at one standard deviation, a dot at the centre.

    Raises:
        L2MError: the window is empty or reaches outside the image.
    """
    left, top, right, bottom = window
    height, width = image.shape[:2]
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):
        raise L2MError("discs", expected=f"a window inside {width}x{height} px", got=str(window))
    low, high = torch.tensor([left, top]) - 3, torch.tensor([right, bottom]) + 3  # px; ellipses that reach in
    near = screen.visible & ((screen.means2d > low) & (screen.means2d < high)).all(dim=-1)
    means, diameters, angles = screen.means2d[near], *_ellipses(screen.conics[near])
    figure = Figure(figsize=(5, 5 * (bottom - top) / (right - left)), layout="constrained")
    axis = figure.subplots()
    axis.imshow(image[top:bottom, left:right].numpy(), extent=(left, right, bottom, top), alpha=0.6)
    ellipses = EllipseCollection(
        diameters[:, 0].tolist(), diameters[:, 1].tolist(), angles.tolist(), units="xy",
        offsets=means.numpy(), offset_transform=axis.transData, facecolors="none", edgecolors="black",
    )  # fmt: skip
    axis.add_collection(ellipses)
    axis.plot(*means.T.numpy(), ".", color="black", markersize=3)
    axis.set_xlim(left, right)
    axis.set_ylim(bottom, top)
    axis.set_xlabel("x (px)")
    axis.set_ylabel("y (px)")
    return figure


def _ellipses(conics: Float[Tensor, "n 3"]) -> tuple[Float[Tensor, "n 2"], Float[Tensor, " n"]]:
    """Diameters (px) and angle of the first axis (degrees) of the ellipses at one standard deviation."""
    xx, xy, yy = conics.unbind(-1)
    precision, axes = torch.linalg.eigh(torch.stack([xx, xy, xy, yy], dim=-1).unflatten(-1, (2, 2)))
    angles = torch.rad2deg(torch.atan2(axes[:, 1, 0], axes[:, 0, 0]))
    return 2 * precision.rsqrt(), angles


def spotlight(image: Float[Tensor, "h w 3"], weights: Float[Tensor, "rows cols"]) -> Float[Tensor, "h w 3"]:
    """Dim an image and cast yellow light on it where coarse ``weights`` >= 0 are large; the largest is full light.

    Raises:
        L2MError: no weight is above 0.
    """
    largest = weights.max()
    if not largest > 0:
        raise L2MError("spotlight", expected="a weight above 0", got=f"at most {largest:g}")
    share = sample_image(weights / largest, normalized_grid((image.shape[0], image.shape[1])))
    return torch.lerp(_DIMMED * image, _LIGHT.to(image), share[..., None])


def curves(
    x: Float[Tensor, " n"],
    series: dict[str, Float[Tensor, " n"]],
    *,
    x_label: str,
    y_label: str,
    log_x: bool = False,
) -> Figure:
    """Draw named series over one x axis; what each is called stands above, where it covers none."""
    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axis = figure.subplots()
    for name, values in series.items():
        axis.plot(x.numpy(), values.numpy(), "o-", label=name)
    if log_x:
        axis.set_xscale("log")
        axis.set_xticks(x.numpy(), [f"{value:.3g}" for value in x.tolist()])
        axis.minorticks_off()
    axis.set_xlabel(x_label)
    axis.set_ylabel(y_label)
    axis.grid(alpha=0.3)
    if len(series) > 1:
        figure.legend(loc="outside upper center", ncols=len(series), frameon=False)
    return figure
