"""The way between viser's cameras and ours: units of length, poses, fields of view."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from l2m_viz.gaussians import Gaussians
from l2m_viz.geometry import (
    Camera,
    invert_pose,
    pose_from_rotation,
    project,
    quat_from_rotation,
    rotation_from_quat,
    transform_points,
)

if TYPE_CHECKING:
    import viser

# viser keeps covariances as float16: below this standard deviation they lose precision, at 1e-4 they are zero.
SIGMA_MIN, SIGMA_MAX = 0.008, 250.0
NEAREST = 4.0  # viewer units from the camera to the nearest things: keyboard steps and clipping planes fit this size
_MARGIN = 1.03  # of the window, around the image of the camera that one stands at


@dataclass(frozen=True)
class ViewerUnits:
    """The one transform between the scene's units and the viewer's: lengths grow, axes and origin stay.

    Attributes:
        per_scene_unit: Viewer units in one unit of the scene; puts the nearest things at a handy distance.
        storage: Further factor of the splats' own node, undone by the node's scale; keeps float16 covariances precise.
    """

    per_scene_unit: float
    storage: float = 1.0

    @classmethod
    def fit(cls, gaussians: Gaussians, camera: Camera) -> Self:
        """Choose both factors for what a camera sees."""
        depth = transform_points(camera.w2c, gaussians.means)[:, 2]
        per_scene_unit = NEAREST / percentile(depth[depth > 0], 2) if (depth > 0).any() else 1.0
        sigmas = gaussians.scales.sort(dim=1).values * per_scene_unit
        # The thin axis may be rounded up (it is seen edge-on at most), the two others must not be.
        storage = max(1.0, 1.25 * SIGMA_MIN / percentile(sigmas[:, 1], 1))
        return cls(per_scene_unit, min(storage, SIGMA_MAX / percentile(sigmas[:, 2], 99.9)))


@dataclass(frozen=True)
class ViewerCamera:
    """A camera in viser's words: camera-to-world pose in viewer units, principal point at the frame's centre.

    Attributes:
        wxyz: Rotation from camera to world, OpenCV axes.
        position: Optical centre.
        fov: Vertical field of view in radians.
        aspect: Width over height of the frame.
    """

    wxyz: tuple[float, float, float, float]
    position: tuple[float, float, float]
    fov: float
    aspect: float

    @classmethod
    def of(cls, camera: "viser.CameraHandle") -> Self:
        """What a visitor's camera says now."""
        w, i, j, k = map(float, camera.wxyz)
        x, y, z = map(float, camera.position)
        return cls((w, i, j, k), (x, y, z), float(camera.fov), float(camera.aspect))


def viewer_from_camera(camera: Camera, units: ViewerUnits) -> ViewerCamera:
    """Describe a camera in viser's words; a principal point off the centre is lost (see `fov_covering`)."""
    c2w = invert_pose(camera.w2c.double())
    w, i, j, k = quat_from_rotation(c2w[:3, :3]).tolist()
    x, y, z = (c2w[:3, 3] * units.per_scene_unit).tolist()
    aspect = (camera.width / camera.K[0, 0]) / (camera.height / camera.K[1, 1])
    return ViewerCamera((w, i, j, k), (x, y, z), camera.fov_y, aspect.item())


def camera_from_viewer(view: ViewerCamera, units: ViewerUnits, long_side: int = 640) -> Camera:
    """Camera that sees exactly the visitor's frame, ``long_side`` px along its longer side.

    Where the aspect is not a ratio of whole pixels, fx differs from fy by the rounding: the frame stays the same.
    """
    width = long_side if view.aspect >= 1 else max(1, round(long_side * view.aspect))
    height = long_side if view.aspect < 1 else max(1, round(long_side / view.aspect))
    tangent = math.tan(view.fov / 2)
    fx, fy = width / (2 * tangent * view.aspect), height / (2 * tangent)
    K = torch.tensor([[fx, 0.0, width / 2], [0.0, fy, height / 2], [0.0, 0.0, 1.0]])
    center = torch.tensor(view.position, dtype=torch.float64) / units.per_scene_unit
    c2w = pose_from_rotation(rotation_from_quat(torch.tensor(view.wxyz, dtype=torch.float64)), center)
    return Camera(K, invert_pose(c2w).float(), width=width, height=height)


def point_of_ray(camera: Camera, direction: tuple[float, float, float]) -> Float[Tensor, " 2"]:
    """Pixel through which a camera looks in a direction of the world, as viser says it of a click."""
    towards = camera.w2c[:3, :3] @ torch.tensor(direction)
    return project(towards, camera.K)[0]


def fov_covering(camera: Camera, aspect: float) -> float:
    """Vertical field of view (rad) with which a centred frame of this aspect shows the camera's whole image."""
    (fx, _, cx), (_, fy, cy), _ = camera.K.tolist()
    tan_x, tan_y = max(cx, camera.width - cx) / fx, max(cy, camera.height - cy) / fy
    return 2 * math.atan(max(tan_y, tan_x / aspect))


@dataclass(frozen=True)
class Standpoint:
    """Where a visitor stands to look through a camera: vectors in viewer units, ``fov`` in radians."""

    position: np.ndarray
    look_at: np.ndarray
    up: np.ndarray
    fov: float


def standpoint(camera: Camera, gaussians: Gaussians, units: ViewerUnits, aspect: float) -> Standpoint:
    """Stand at a camera, see its whole image, and turn about what is in the middle of the depth it sees."""
    c2w = camera.c2w
    depth = transform_points(camera.w2c, gaussians.means)[:, 2]
    distance = percentile(depth[depth > 0], 50) if (depth > 0).any() else 1.0
    fov = 2 * math.atan(_MARGIN * math.tan(fov_covering(camera, aspect) / 2))
    position, target = (units.per_scene_unit * v for v in (c2w[:3, 3], c2w[:3, 3] + distance * c2w[:3, 2]))
    return Standpoint(_float64(position), _float64(target), _float64(-c2w[:3, 1]), fov)


def percentile(values: Float[Tensor, " n"], percent: float) -> float:
    """Value below which ``percent`` of the values lie."""
    return float(np.percentile(values.detach().numpy(), percent))


def _float64(values: Tensor) -> np.ndarray:
    return values.detach().numpy().astype(np.float64)
