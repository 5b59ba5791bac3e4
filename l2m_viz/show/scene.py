"""Gaussians, cameras and pictures as a viser scene: what notebooks, the viewer and the app show in 3D.

The browser's splats are for looking around, never for measuring: `display_covariances` makes them larger than they are.
`novel_view` draws what they really are, with this package's own rasterizer.
"""

import math
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from l2m_viz.data import fit_long_side, to_uint8
from l2m_viz.encoders import FeaturePCA
from l2m_viz.errors import L2MError, MissingError
from l2m_viz.gaussians import HOLE_ALPHA, Gaussians, rasterize
from l2m_viz.gaussians.reference import project_gaussians
from l2m_viz.geometry import Camera, look_at, project, transform_points
from l2m_viz.show.colors import colorize, value_limits
from l2m_viz.show.viewer_camera import (
    NEAREST,
    SIGMA_MAX,
    SIGMA_MIN,
    ViewerUnits,
    percentile,
    standpoint,
    viewer_from_camera,
)

if TYPE_CHECKING:
    import viser

ColorMode = Literal["rgb", "features", "depth", "similarity"]
Pictures = Mapping[str, tuple[Camera, Float[Tensor, "h w 3"]]]
"""Name of a camera, the camera, and what it sees."""

DISPLAY_SIZE = (
    2.0  # times the true scales: closes the gaps that pixel-sized splats show at twice the photo's size
)
_FRUSTUM_DEPTH = 0.1  # of the distance to the nearest things
_POINT_SIZE = 1e-6  # viewer units; the browser draws no point smaller than one pixel
_MAX_DROPPED = 0.2  # of the splats, before points stand in for them
_NUM_PROBES = 2000
_FRUSTUM_COLORS = ((230, 120, 20), (40, 110, 220), (40, 160, 80), (170, 60, 170))
_MARK_COLOR = (255, 0, 200)
_THUMBNAIL_PX = 400
_HATCH_PX = 6
_HATCH_COLORS = (
    (0.85, 0.0, 0.75),
    (0.35, 0.35, 0.35),
)  # magenta and grey: hardly any photo has them in stripes


def gaussian_colors(
    gaussians: Gaussians,
    mode: ColorMode,
    pca: FeaturePCA | None = None,
    camera: Camera | None = None,
    similarity: Float[Tensor, " n"] | None = None,
) -> Float[Tensor, "n 3"]:
    """Colour of each Gaussian: its own RGB, its features in a PCA basis, its depth (near is red), its similarity.

    Args:
        gaussians: What to colour.
        mode: "rgb", "features", "depth" or "similarity".
        pca: Basis of the features, which are descriptors or already coordinates in it; fitted on them if None.
        camera: Whose depth; the world's z if None.
        similarity: To a picked feature, from `feature_similarity`: -1 is blue, 1 is red.

    Raises:
        MissingError: features asked of Gaussians that have none, or similarity where none is given.
        L2MError: an unknown mode.
    """
    if mode == "rgb":
        return gaussians.colors.clamp(0, 1)
    if mode == "depth":
        depth = (
            gaussians.means[:, 2] if camera is None else transform_points(camera.w2c, gaussians.means)[:, 2]
        )
        return colorize(depth[:, None], "depth")[:, 0]
    if mode == "similarity":
        return colorize(_given(similarity)[:, None], "similarity")[:, 0]
    if mode != "features":
        raise L2MError("colours", expected="'rgb', 'features', 'depth' or 'similarity'", got=repr(mode))
    if gaussians.features is None:
        raise MissingError("these Gaussians carry no features", todo="show 'rgb' or 'depth'")
    return _feature_colors(gaussians.features, pca)


def display_covariances(
    gaussians: Gaussians, units: ViewerUnits, size: float = 1.0
) -> Float[Tensor, "n 3 3"]:
    """Covariances for the browser, in stored units: enlarged by ``size`` and kept where float16 is precise."""
    sigmas = gaussians.scales * (size * units.per_scene_unit * units.storage)
    return replace(gaussians, log_scales=sigmas.clamp(SIGMA_MIN, SIGMA_MAX).log()).covars


def thin_evenly(means: Float[Tensor, "n 3"], camera: Camera, num: int) -> Int[Tensor, " m"]:
    """Indices of at most ``num`` points that still cover what the camera sees: one in each cell of a grid.

    Cells are squares of the camera's picture, and 5 % of depth deep, so that what lies behind an edge is kept.
    """
    if len(means) <= num:
        return torch.arange(len(means))
    points_px, depth = project(transform_points(camera.w2c, means), camera.K)
    layer = (depth.abs().clamp(min=1e-9).log() / math.log(1.05)).floor().long() * 2 + (depth > 0)
    step = math.sqrt(len(means) / num)  # px
    cell, off_center = _cells(points_px, layer, step)
    for _ in range(8):  # two or three do, unless ``num`` is less than there are layers
        if (count := int(cell.max()) + 1) <= num:
            break
        step *= 1.01 * math.sqrt(count / num)
        cell, off_center = _cells(points_px, layer, step)
    order = off_center.argsort()
    order = order[cell[order].argsort(stable=True)]  # cell by cell, the most central point first
    first = torch.ones(len(order), dtype=torch.bool)
    first[1:] = cell[order].diff() > 0
    kept = order[first].sort().values
    return kept if len(kept) <= num else kept[torch.linspace(0, len(kept) - 1, num).long()]


def _cells(
    points_px: Float[Tensor, "n 2"], layer: Int[Tensor, " n"], step: float
) -> tuple[Int[Tensor, " n"], Float[Tensor, " n"]]:
    """Number each point's cell, 0 to cells - 1; return it with the squared distance from the cell's centre."""
    scaled = (points_px / step).clamp(-1e5, 1e5)
    square = scaled.floor()
    column, row = square.long().unbind(dim=1)
    _, cell = torch.unique((column << 42) + (row << 21) + layer, return_inverse=True)
    return cell, (scaled - square - 0.5).square().sum(dim=1)


@dataclass(frozen=True)
class NovelView:
    """What this package's rasterizer sees from a camera.

    Attributes:
        image: RGB for the screen: colours of the mode that was asked for; stripes where there is a hole.
        depth: z in scene units, meaningful outside the holes.
        hole_mask: True where the accumulated opacity is under `HOLE_ALPHA`.
        depth_limits: Depths (scene units) of the ends of the colour map.
    """

    image: Float[Tensor, "h w 3"]
    depth: Float[Tensor, "h w"]
    hole_mask: Bool[Tensor, "h w"]
    depth_limits: tuple[float, float]

    @property
    def hole_share(self) -> float:
        """Holes over all pixels, 0 to 1."""
        return self.hole_mask.float().mean().item()


def novel_view(
    gaussians: Gaussians,
    camera: Camera,
    mode: ColorMode = "rgb",
    pca: FeaturePCA | None = None,
    near: float = 0.01,
    similarity: Float[Tensor, " n"] | None = None,
) -> NovelView:
    """Rasterize Gaussians, colour the result by mode, and draw its holes as magenta and grey stripes.

    Features and similarity are the means in each pixel, see `Render.mean_features`.

    ``near`` is the nearest drawn depth in world units; give `NEAR` times the scene's unit where it is known. For the
    other arguments see `gaussian_colors`.

    Raises:
        MissingError: features asked of Gaussians that have none, or similarity where none is given.
    """
    features = None
    if mode == "features":
        features = gaussians.features
        if features is None:
            raise MissingError("these Gaussians carry no features", todo="show 'rgb' or 'depth'")
        if not _is_raw(features, pca):
            features = features[:, :3].contiguous()  # the others have no colour
    elif mode == "similarity":
        features = _given(similarity)[:, None]
    render = rasterize(replace(gaussians, features=features), camera, near=near)
    hole = render.alpha < HOLE_ALPHA
    limits = value_limits(render.depth, "depth", ~hole)
    if mode == "depth":
        image = colorize(render.depth, "depth", ~hole, limits)
    elif render.features is None:
        image = render.color.clamp(0, 1)
    else:
        mean = render.mean_features
        image = colorize(mean[..., 0], "similarity") if mode == "similarity" else _feature_colors(mean, pca)
    return NovelView(torch.where(hole[..., None], hatch(*camera.hw), image), render.depth, hole, limits)


def hatch(height: int, width: int) -> Float[Tensor, "{height} {width} 3"]:
    """Diagonal stripes that mean "nothing is known here"."""
    diagonal = (torch.arange(height)[:, None] + torch.arange(width)) // _HATCH_PX % 2
    return torch.tensor(_HATCH_COLORS)[diagonal]


class SceneHandle:
    """What `build_scene` put into a viewer, to recolour, resize and hide it."""

    def __init__(
        self,
        scene: "viser.SceneApi",
        gaussians: Gaussians,
        units: ViewerUnits,
        colors: Float[Tensor, "n 3"],
        size: float,
        kept: Int[Tensor, " m"],
    ) -> None:
        self._turn = threading.RLock()  # callbacks and the painter come from several threads
        self.units = units
        self.frusta: dict[str, viser.FrameHandle] = {}
        self.pictures: dict[str, viser.ImageHandle] = {}
        self._scene, self._kept, self._gaussians = scene, kept, gaussians.select(kept)
        self._rgb, self._shown, self._points = _uint8(colors[kept]), True, None
        # Fewer Gaussians fill the same surface, and less evenly.
        self._spread = 1.2 * math.sqrt(len(gaussians) / len(kept)) if len(kept) < len(gaussians) else 1.0
        self._size = size * self._spread
        self._splats = scene.add_gaussian_splats(
            "/gaussians/splats",
            centers=_float32(self._gaussians.means * (units.per_scene_unit * units.storage)),
            covariances=_float32(display_covariances(self._gaussians, units, self._size)),
            rgbs=self._rgb,
            opacities=_float32(self._gaussians.opacities[:, None]),
            scale=1 / units.storage,
        )

    def set_colors(self, rgb: Float[Tensor, "n 3"]) -> None:
        """Recolour the scene: one RGB for each Gaussian that `build_scene` was given."""
        with self._turn:
            self._splats.rgbs = self._rgb = _uint8(rgb[self._kept])
            if self._points is not None:
                self._points.colors = self._rgb

    def set_size(self, size: float) -> None:
        """Set the display size of the splats, times their true scale."""
        with self._turn:
            self._size = size * self._spread
            self._splats.covariances = _float32(display_covariances(self._gaussians, self.units, self._size))

    def mark(self, point: Float[Tensor, " 3"], radius: float) -> None:
        """Put a magenta ball at a point, both in scene units; there is one, which moves."""
        with self._turn:
            self._scene.add_icosphere(
                "/pick",
                radius=radius * self.units.per_scene_unit,
                color=_MARK_COLOR,
                position=_float32(point * self.units.per_scene_unit),
                cast_shadow=False,
                receive_shadow=False,
            )

    def show_gaussians(self, visible: bool) -> None:
        """Show or hide the splats."""
        with self._turn:
            self._shown = self._splats.visible = visible
            if self._points is not None:
                self._points.visible = False

    def show_frusta(self, visible: bool) -> None:
        """Show or hide the cameras."""
        for frustum in self.frusta.values():
            frustum.visible = visible

    def see_from(self, camera: Camera) -> None:
        """Keep the scene visible from a far camera, whose pixels are the browser's.

        viser drops a splat once it is smaller than about half a pixel: the scene would fade away as one steps back. A
        point is never smaller than one pixel, so from there on each splat gets a point of its colour.
        """
        with self._turn:
            needed = self._shown and self.dropped_share(camera) > _MAX_DROPPED
            if needed and self._points is None:
                self._points = self._scene.add_point_cloud(
                    "/gaussians/points",
                    points=_float32(self._gaussians.means * self.units.per_scene_unit),
                    colors=self._rgb,
                    point_size=_POINT_SIZE,
                    point_shading="flat",
                    precision="float32",
                )
            if self._points is not None and self._points.visible != needed:
                self._points.visible = needed

    def dropped_share(self, camera: Camera) -> float:
        """Share of the splats before the camera that the browser drops: opacity * det(Sigma' + 0.3 I) < 0.25 px^4."""
        probe = self._gaussians.select(torch.linspace(0, len(self._kept) - 1, _NUM_PROBES).long())
        probe = replace(probe, log_scales=probe.log_scales + math.log(self._size))
        screen = project_gaussians(probe, camera, near=0.0, far=math.inf, eps2d=0.3)
        xx, xy, yy = screen.conics.unbind(dim=1)
        determinant = 1 / (xx * yy - xy * xy)
        dropped = screen.visible & (probe.opacities * determinant < 0.25)
        return (dropped.sum() / screen.visible.sum().clamp(min=1)).item()


def build_scene(
    target: "viser.ViserServer | viser.ClientHandle",
    gaussians: Gaussians,
    *,
    colors: ColorMode | Float[Tensor, "n 3"] = "rgb",
    pictures: Pictures | None = None,
    pca: FeaturePCA | None = None,
    size: float = DISPLAY_SIZE,
    max_gaussians: int = 1_000_000,
) -> SceneHandle:
    """Put Gaussians and camera frusta with their pictures into a viewer.

    Args:
        target: A server (all visitors see the scene, and start at the first camera) or one visitor.
        gaussians: What to show.
        colors: A colour mode, or one RGB in [0, 1] a Gaussian.
        pictures: Cameras to draw, with what they see; the first is where visitors start.
        pca: Basis of the features for the colour mode "features".
        size: Display size of the splats, times their true scale.
        max_gaussians: More than this are thinned evenly, and then drawn larger so that no gaps open.
    """
    pictures = pictures or {}
    camera = first_camera(gaussians, pictures)
    units = ViewerUnits.fit(gaussians, camera)
    if (start := getattr(target, "initial_camera", None)) is not None:
        start_at(start, camera, gaussians, units)
        target.scene.set_up_direction("-y")
    rgb = gaussian_colors(gaussians, colors, pca, camera) if isinstance(colors, str) else colors
    kept = thin_evenly(gaussians.means, camera, max_gaussians)
    handle = SceneHandle(target.scene, gaussians, units, rgb, size, kept)
    depth = _FRUSTUM_DEPTH * NEAREST
    for index, (name, (view, image)) in enumerate(pictures.items()):
        color = _FRUSTUM_COLORS[index % len(_FRUSTUM_COLORS)]
        handle.frusta[name], handle.pictures[name] = _add_frustum(
            target.scene, name, view, image, units, depth, color
        )
    return handle


def start_at(
    initial_camera: "viser.InitialCameraConfig",
    camera: Camera,
    gaussians: Gaussians,
    units: ViewerUnits,
    aspect: float = 1.4,
) -> None:
    """Let every visitor begin, and begin again with "Reset View", at a camera.

    ``aspect`` is width over height of windows like theirs; narrower ones do not show the whole image at first.
    """
    stand = standpoint(camera, gaussians, units, aspect)
    initial_camera.position, initial_camera.look_at = stand.position, stand.look_at
    initial_camera.up, initial_camera.fov = stand.up, stand.fov
    # Who stands in a camera must see past its frustum: the near plane cuts it away. (It must stay under 1 unit, where
    # viser puts its background image.)
    initial_camera.near, initial_camera.far = 1.2 * _FRUSTUM_DEPTH * NEAREST, 1000 * NEAREST


def first_camera(gaussians: Gaussians, pictures: Pictures) -> Camera:
    """The first picture's camera; without pictures, one at the origin if all lies before it, else one outside."""
    if pictures:
        return next(iter(pictures.values()))[0]
    z = gaussians.means[:, 2]
    w2c = torch.eye(4)
    if percentile(z, 2) <= 0:
        center = gaussians.means.median(dim=0).values
        radius = max(percentile((gaussians.means - center).norm(dim=1), 95), 1e-6)
        w2c = look_at(center - torch.tensor([0.0, 0.0, 3 * radius]), center)
    points = transform_points(w2c, gaussians.means)
    slopes = (points[:, :2] / points[:, 2:]).abs()[points[:, 2] > 0]
    tan_x, tan_y = (min(max(percentile(slope, 99), 0.05), 2.0) for slope in slopes.unbind(dim=1))
    K = torch.tensor([[320 / tan_x, 0.0, 320.0], [0.0, 240 / tan_y, 240.0], [0.0, 0.0, 1.0]])
    return Camera(K, w2c, width=640, height=480)


def show_scene(
    gaussians: Gaussians,
    *,
    pictures: Pictures | None = None,
    colors: ColorMode | Float[Tensor, "n 3"] = "rgb",
    pca: FeaturePCA | None = None,
    height: int = 400,
    max_gaussians: int = 40_000,
) -> None:
    """Show a scene inside the notebook, to turn with the mouse; it stays in the saved notebook and needs no server.

    At most ``max_gaussians`` are shown, evenly thinned, and then drawn larger so that no gaps open: the notebook grows
    by 0.8 MB and about 35 bytes a Gaussian. Outside a notebook a web browser opens instead.

    Args:
        gaussians: What to show.
        pictures: {name: (camera, image)}: cameras to draw; the view starts at the first.
        colors: "rgb", "features", "depth", or one RGB in [0, 1] a Gaussian.
        pca: Basis of the features for the colour mode "features".
        height: Height of the frame in pixels.
        max_gaussians: Largest number of Gaussians to show.
    """
    with _still_scene(gaussians, pictures, colors, pca, max_gaussians) as server:
        server.scene.show(height=height)


def scene_html(
    gaussians: Gaussians,
    *,
    pictures: Pictures | None = None,
    colors: ColorMode | Float[Tensor, "n 3"] = "rgb",
    pca: FeaturePCA | None = None,
    max_gaussians: int = 40_000,
) -> str:
    """The scene of `show_scene` as one self-contained HTML page."""
    with _still_scene(gaussians, pictures, colors, pca, max_gaussians) as server:
        return server.scene.as_html()


@contextmanager
def viser_server(host: str = "127.0.0.1", port: int = 0) -> Iterator["viser.ViserServer"]:
    """A viser server that prints nothing, offers no share link, and is stopped at the end; port 0 is any free one.

    Raises:
        MissingError: viser is not installed.
    """
    try:
        import rich
        import viser
    except ImportError as error:
        raise MissingError("3D scenes need viser", todo='run `pip install "l2m-viz[app]"`') from error
    console = rich.get_console()  # viser greets and says goodbye through it, whatever `verbose` says
    was_quiet = console.quiet
    console.quiet = True
    try:
        server = viser.ViserServer(host=host, port=port, verbose=False)
    finally:
        console.quiet = was_quiet
    try:
        server.gui.configure_theme(show_share_button=False, show_logo=False, control_width="large")
        yield server
    finally:
        console.quiet = True
        server.stop()
        console.quiet = was_quiet


@contextmanager
def _still_scene(
    gaussians: Gaussians,
    pictures: Pictures | None,
    colors: ColorMode | Float[Tensor, "n 3"],
    pca: FeaturePCA | None,
    max_gaussians: int,
) -> Iterator["viser.ViserServer"]:
    """A server that holds a thinned scene, for as long as it takes to write it down."""
    with viser_server() as server:
        build_scene(server, gaussians, colors=colors, pictures=pictures, pca=pca, max_gaussians=max_gaussians)
        yield server


def _add_frustum(
    scene: "viser.SceneApi",
    name: str,
    camera: Camera,
    image: Float[Tensor, "h w 3"],
    units: ViewerUnits,
    depth: float,
    color: tuple[int, int, int],
) -> "tuple[viser.FrameHandle, viser.ImageHandle]":
    """Edges, picture and name of a camera at ``depth`` viewer units before it.

    viser's own frustum has its axis in the middle, a real camera's need not be: the motorcycle's is 59 px beside it.
    """
    pose = viewer_from_camera(camera, units)
    (fx, _, cx), (_, fy, cy), _ = camera.K.tolist()
    width, height = camera.width * depth / fx, camera.height * depth / fy
    left, top = -cx * depth / fx, -cy * depth / fy
    corners = np.array(
        [[left + i * width, top + j * height, depth] for i, j in ((0, 0), (1, 0), (1, 1), (0, 1))]
    )
    rim = np.stack([corners, np.roll(corners, -1, axis=0)], axis=1)  # [4 2 3]
    spokes = np.stack([np.zeros_like(corners), corners], axis=1)
    frame = scene.add_frame(f"/cameras/{name}", show_axes=False, wxyz=pose.wxyz, position=pose.position)
    scene.add_line_segments(
        f"/cameras/{name}/edges",
        np.concatenate([rim, spokes]).astype(np.float32),
        color,
        thickness=depth / 60,
    )
    picture = scene.add_image(
        f"/cameras/{name}/picture",
        to_uint8(fit_long_side(image, _THUMBNAIL_PX)),
        width,
        height,
        position=(left + width / 2, top + height / 2, depth),
        cast_shadow=False,
        receive_shadow=False,
    )
    scene.add_label(
        f"/cameras/{name}/name", name, position=(left + width / 2, top, depth), anchor="bottom-center"
    )
    return frame, picture


def _given(similarity: Tensor | None) -> Tensor:
    if similarity is None:
        raise MissingError("no similarity is given", todo="pick a feature and call `feature_similarity`")
    return similarity


def _is_raw(features: Tensor, pca: FeaturePCA | None) -> bool:
    """Whether features are descriptors, not yet coordinates in the basis."""
    return pca is None or (features.shape[-1] == len(pca.mean) != len(pca.components))


def _feature_colors(features: Float[Tensor, "*n d"], pca: FeaturePCA | None) -> Float[Tensor, "*n 3"]:
    basis = pca or FeaturePCA.fit(features, 3)
    return basis.colors(basis.project(features) if _is_raw(features, pca) else features)


def _uint8(rgb: Float[Tensor, "n 3"]) -> np.ndarray:
    return (rgb.clamp(0, 1) * 255).round().byte().numpy()


def _float32(values: Tensor) -> np.ndarray:
    return values.detach().numpy().astype(np.float32)
