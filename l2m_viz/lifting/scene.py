"""A photo with depth as a mesh in 3D, and its renders from new cameras.

One vertex a pixel, at the pixel's centre; two triangles a quad; no triangle across a depth discontinuity, where the
photo says nothing about what lies between. World coordinates are those of the photo's own camera.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from l2m_viz.data.files import Saved
from l2m_viz.data.images import require_image
from l2m_viz.errors import ShapeError, require_tensor
from l2m_viz.geometry import HW, Camera
from l2m_viz.lifting import _zbuffer
from l2m_viz.lifting.depth import Depth, as_depth
from l2m_viz.parallel import run_kernel

NEAR = 0.01  # of the scene's unit; nearer vertices are not drawn, as in the official renderer
# Bands of rows that are drawn apart, a few for each of a handful of cores, as rows are unevenly filled. Not a number of
# the machine: where a band begins decides the last bit of what is interpolated, and a pair must be the same everywhere.
_BANDS = 16


@dataclass(frozen=True)
class MeshCfg:
    """How a depth map becomes triangles."""

    # A triangle whose farthest corner is this much farther than its nearest spans a discontinuity. 5 % is the tolerance
    # at which the field calls two depths the same surface (RoMa, DKM).
    max_depth_ratio: float = 1.05


@dataclass(frozen=True)
class View:
    """What one camera sees of a lifted scene.

    ``depth`` means something only outside ``hole_mask``. Where ``inpainted_mask`` is True the colour was invented;
    such pixels stay holes.
    """

    camera: Camera
    image: Float[Tensor, "h w 3"]
    depth: Float[Tensor, "h w"]
    hole_mask: Bool[Tensor, "h w"]
    inpainted_mask: Bool[Tensor, "h w"]


@dataclass(frozen=True)
class LiftedScene(Saved):
    """A photo lifted to 3D: image, depth, intrinsics, and which triangles of the pixel mesh exist.

    ``triangle_mask`` (H-1, W-1, 2) is True for the triangles that are drawn: (a, b, c) and (b, d, c) of each quad with
    corners a b / c d. ``cut_mask`` is True at pixels beside a depth discontinuity.
    """

    image: Float[Tensor, "h w 3"]
    depth: Float[Tensor, "h w"]
    valid_mask: Bool[Tensor, "h w"]
    K: Float[Tensor, "3 3"]
    triangle_mask: Bool[Tensor, "quads_y quads_x 2"]
    cut_mask: Bool[Tensor, "h w"]

    @property
    def hw(self) -> HW:
        """Size (H, W) of the photo in pixels."""
        return self.depth.shape[0], self.depth.shape[1]

    @cached_property
    def unit(self) -> float:
        """The scene's own length: the 2nd percentile of its valid depth. Camera moves are multiples of it."""
        return _percentile(self.depth.numpy()[self.valid_mask.numpy()], 2)

    @property
    def camera(self) -> Camera:
        """The photo's own camera, at the origin of the world."""
        return Camera(self.K, torch.eye(4), width=self.hw[1], height=self.hw[0])

    @property
    def own_view(self) -> View:
        """The photo itself, as the view from its own camera; unknown depth counts as a hole, with its colour kept."""
        return View(
            self.camera,
            self.image,
            self.depth,
            hole_mask=~self.valid_mask,
            inpainted_mask=torch.zeros_like(self.valid_mask),
        )

    def crop(self, top: int, left: int, hw: HW) -> "LiftedScene":
        """Return the part of the photo that a window of it shows, in the same world and, but for its border, mesh.

        Raises:
            ShapeError: the window is smaller than 2x2 or leaves the photo.
        """
        bottom, right = top + hw[0], left + hw[1]
        if min(hw) < 2 or min(top, left) < 0 or bottom > self.hw[0] or right > self.hw[1]:
            expected = f"at least 2x2 px inside {self.hw[0]}x{self.hw[1]}"
            got = f"rows {top} to {bottom}, columns {left} to {right}"
            raise ShapeError("LiftedScene.crop", expected=expected, got=got)
        window = slice(top, bottom), slice(left, right)
        K = self.K.clone()
        K[:2, 2] -= torch.tensor([left, top], dtype=K.dtype)
        quads = slice(top, bottom - 1), slice(left, right - 1)
        image, depth, valid, cut = (
            value[window].contiguous() for value in (self.image, self.depth, self.valid_mask, self.cut_mask)
        )
        return LiftedScene(image, depth, valid, K, self.triangle_mask[quads].contiguous(), cut)

    def render(self, camera: Camera) -> View:
        """Render colour, depth and holes with a z-buffer, perspective-correct.

        A pixel is a hole where no triangle covers its centre, or where the nearest surface shows its back: the photo
        never saw that side, and it hides what is behind.
        """
        image, depth, covered = self.render_attributes(camera, self.image)
        empty = torch.zeros_like(covered)
        return View(camera, image, depth, hole_mask=~covered, inpainted_mask=empty)

    def render_attributes(
        self, camera: Camera, attributes: Float[Tensor, "h w c"]
    ) -> tuple[Float[Tensor, "rows cols c"], Float[Tensor, "rows cols"], Bool[Tensor, "rows cols"]]:
        """Render any per-pixel attribute: return (attributes, depth, covered), zeros where nothing covers the pixel.

        Raises:
            ShapeError: the attributes are not of the photo's size.
        """
        if tuple(attributes.shape[:2]) != self.hw:
            raise ShapeError(
                "render_attributes", expected=f"{self.hw} + (C,)", got=str(tuple(attributes.shape))
            )
        height, width = self.hw
        screen = np.empty((3, height, width + _zbuffer.PADDING), np.float32)
        row_span = np.empty((height, 2), np.float32)
        K_from, pose, K_to = (_array(value) for value in (self.K, camera.w2c, camera.K))
        near = np.float32(NEAR * self.unit)
        valid = self.valid_mask.numpy()
        run_kernel(
            _zbuffer.project_vertices, _array(self.depth), valid, K_from, pose, K_to, near, screen, row_span
        )
        inverse_depth = np.zeros(camera.hw, np.float32)
        owner = np.full(camera.hw, -1, np.int32)
        bands = min(camera.height, _BANDS)
        keep = self.triangle_mask.numpy()
        run_kernel(_zbuffer.rasterize_triangles, screen, row_span, keep, bands, inverse_depth, owner)
        out = np.empty((*camera.hw, attributes.shape[2]), np.float32)
        depth = np.empty(camera.hw, np.float32)
        run_kernel(_zbuffer.interpolate, screen, _array(attributes), inverse_depth, owner, out, depth)
        return torch.from_numpy(out), torch.from_numpy(depth), torch.from_numpy(owner >= 0)


def _array(value: Tensor) -> np.ndarray:
    return np.ascontiguousarray(value.detach().numpy(), np.float32)


def lift(
    image: Float[Tensor, "h w 3"],
    depth: Depth | Float[Tensor, "h w"],
    K: Float[Tensor, "3 3"],
    cfg: MeshCfg | None = None,
) -> LiftedScene:
    """Lift a photo with depth to a mesh.

    Args:
        image: The photo, RGB in [0, 1].
        depth: Its z-depth, in any unit; in a bare tensor, values that are not finite and positive count as unknown.
        K: Its intrinsics in pixels.
        cfg: How triangles are made.

    Raises:
        ShapeError: image and depth differ in size, or are smaller than 2x2.
        ImageError: the image is not float with values in [0, 1].
        L2MError: ``K`` is not a calibration matrix.
    """
    require_tensor("lift: the image", image)
    require_tensor("lift: K", K)
    depth = as_depth(depth)
    if image.ndim != 3 or image.shape[-1] != 3 or image.shape[:2] != depth.depth.shape:
        got = f"image {tuple(image.shape)}, depth {tuple(depth.depth.shape)}"
        raise ShapeError("lift", expected="image (H, W, 3) and depth (H, W) of one size", got=got)
    require_image("lift", image)
    K = K.to(torch.float32)
    Camera(K, torch.eye(4), width=image.shape[1], height=image.shape[0])  # refuses a K that is none
    if min(depth.depth.shape) < 2:
        raise ShapeError("lift", expected="at least 2x2 px", got=str(tuple(depth.depth.shape)))
    triangle_mask, cut_mask = _triangles(depth.depth, depth.valid_mask, cfg or MeshCfg())
    return LiftedScene(image, depth.depth, depth.valid_mask, K, triangle_mask, cut_mask)


def _triangles(
    depth: Float[Tensor, "h w"], valid: Bool[Tensor, "h w"], cfg: MeshCfg
) -> tuple[Bool[Tensor, "quads_y quads_x 2"], Bool[Tensor, "h w"]]:
    height, width = depth.shape
    keep, cut_mask = np.empty((height - 1, width - 1, 2), np.bool_), np.empty((height, width), np.bool_)
    across = np.zeros((2, height + 1, width + 1), np.bool_)
    max_ratio, known = np.float32(cfg.max_depth_ratio), np.ascontiguousarray(valid.numpy())
    run_kernel(_zbuffer.cut_mesh, _array(depth), known, max_ratio, keep, across, cut_mask)
    return torch.from_numpy(keep), torch.from_numpy(cut_mask)


def _percentile(values: np.ndarray, percent: float) -> float:
    """Do what `np.percentile` does, which sorts more than it has to: many times as fast."""
    place = percent / 100 * (len(values) - 1)
    below, above = math.floor(place), math.ceil(place)
    parted = np.partition(values, above)  # one place only: NumPy has fast code for that, and none for two
    high = parted[above].item()
    low = parted[:above].max().item() if below < above else high
    return low + (high - low) * (place - below)
