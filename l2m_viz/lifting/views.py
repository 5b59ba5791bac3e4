"""Where to look from: camera sampling in units of the scene, and a smooth orbit for looking around.

The ranges are those of the paper's released script (L2M get_data.py): every magnitude is drawn from the upper half of
its range, so no sampled camera stands still.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from l2m_viz.errors import L2MError
from l2m_viz.geometry import (
    HW,
    Camera,
    intrinsics,
    look_at,
    pose_from_rotation,
    rotation_from_axis_angle,
)
from l2m_viz.lifting.scene import LiftedScene

Range = tuple[float, float]


@dataclass(frozen=True)
class ViewSamplerCfg:
    """Ranges of random cameras; lengths are multiples of `LiftedScene.unit`, the sign of every term is random."""

    # Focal length over image width, 96 to 67 degrees of horizontal field of view; for photos without known intrinsics.
    focal_over_width: Range = (0.45, 0.75)
    # |x| and |y| of the translation.
    shift: Range = (0.2, 0.4)
    # |z| of the translation; the nearest surface is about one unit away, so -0.8 leaves it at 0.2.
    dolly: Range = (0.4, 0.8)
    # Each component of the axis-angle rotation vector.
    rotation_deg: Range = (5.0, 10.0)
    # In-plane rotation after the others, up to 180; photos held upright, as the paper's, have none.
    roll_deg: Range = (0.0, 0.0)
    # Turn about a point on the first camera's axis, before the others: the second camera walks round the scene and
    # still looks at it, so that surfaces are seen from another side. The paper's cameras do not.
    orbit_deg: Range = (0.0, 0.0)
    # Distance of that point.
    pivot: Range = (1.5, 4.0)


def sample_intrinsics(
    hw: HW, cfg: ViewSamplerCfg | None = None, generator: torch.Generator | None = None
) -> Float[Tensor, "3 3"]:
    """Draw intrinsics for a photo of unknown focal length, principal point at the centre."""
    low, high = (cfg or ViewSamplerCfg()).focal_over_width
    return intrinsics(hw[1] * (low + (high - low) * torch.rand((), generator=generator).item()), hw)


def sample_cameras(
    scene: LiftedScene, n: int, cfg: ViewSamplerCfg | None = None, generator: torch.Generator | None = None
) -> list[Camera]:
    """Draw n cameras around the photo's own, with its intrinsics and size.

    A point moves as X' = R X + t, with R and t drawn term by term from the ranges of ``cfg``; before that, if there is
    an orbit, about the pivot p as X' = R_o (X - p) + p; after it, if there is a roll, the camera turns about its own
    axis.
    """
    cfg = cfg or ViewSamplerCfg()
    if n < 0:
        raise L2MError("sample_cameras", expected="n >= 0", got=str(n))

    def draw(span: Range, count: int) -> Tensor:
        magnitude = span[0] + (span[1] - span[0]) * torch.rand(count, generator=generator)
        return magnitude * (2 * torch.randint(0, 2, (count,), generator=generator) - 1)

    cameras = []
    for _ in range(n):
        rotation = rotation_from_axis_angle(draw(cfg.rotation_deg, 3) * math.pi / 180)
        translation = torch.cat([draw(cfg.shift, 2), draw(cfg.dolly, 1)]) * scene.unit
        if cfg.orbit_deg[1] > 0:
            orbit, pivot = _draw_orbit(cfg, generator)
            rotation, translation = (
                rotation @ orbit,
                rotation @ (pivot - orbit @ pivot) * scene.unit + translation,
            )
        if cfg.roll_deg[1] > 0:
            roll = torch.cat([torch.zeros(2), draw(cfg.roll_deg, 1) * math.pi / 180])
            turn = rotation_from_axis_angle(roll)
            rotation, translation = turn @ rotation, turn @ translation
        pose = pose_from_rotation(rotation, translation)
        cameras.append(Camera(scene.K, pose, width=scene.hw[1], height=scene.hw[0]))
    return cameras


def _draw_orbit(
    cfg: ViewSamplerCfg, generator: torch.Generator | None
) -> tuple[Float[Tensor, "3 3"], Float[Tensor, " 3"]]:
    """Rotation about any axis across the line of sight, and the pivot in units of the scene."""
    share, direction, distance = torch.rand(3, generator=generator).tolist()
    angle = math.radians(cfg.orbit_deg[0] + (cfg.orbit_deg[1] - cfg.orbit_deg[0]) * share)
    axis = torch.tensor([math.cos(2 * math.pi * direction), math.sin(2 * math.pi * direction), 0.0])
    pivot = torch.tensor([0.0, 0.0, cfg.pivot[0] + (cfg.pivot[1] - cfg.pivot[0]) * distance])
    return rotation_from_axis_angle(angle * axis), pivot


def orbit_cameras(scene: LiftedScene, n: int, radius: float = 0.1) -> list[Camera]:
    """Return n cameras on a closed ellipse around the photo's own, all looking at the middle of the scene.

    Args:
        scene: The lifted photo.
        n: Number of cameras; the path closes, so the last is one step before the first.
        radius: Horizontal half axis in units of the scene; the vertical one is half of it.
    """
    if n < 1:
        raise L2MError("orbit_cameras", expected="n >= 1 frames", got=str(n))
    median = scene.depth[scene.valid_mask].median()
    target = torch.stack([torch.zeros_like(median), torch.zeros_like(median), median])
    cameras = []
    for angle in torch.arange(n) * (2 * math.pi / n):
        eye = scene.unit * radius * torch.stack([torch.sin(angle), 0.5 * torch.cos(angle) - 0.5, 0 * angle])
        cameras.append(Camera(scene.K, look_at(eye, target), width=scene.hw[1], height=scene.hw[0]))
    return cameras
