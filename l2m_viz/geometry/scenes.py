"""Analytic scenes: depth, warp and covisibility known in closed form. They are the oracle of the tests.

A scene is a set of surfaces. A surface answers one question, where does a ray hit it first; everything else follows:
a depth map casts one ray a pixel, and a point is covisible when the ray from camera B to it meets nothing earlier.
Covisibility here never reads a depth map, so it can judge code that does.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from l2m_viz.geometry.cameras import (
    Camera,
    project,
    ray_directions,
    transform_points,
)
from l2m_viz.geometry.pixels import inside_image, pixel_grid, to_normalized

_HIT_TOL = 1e-4  # relative; a ray that ends on a surface point must not count that point as its own occluder


@runtime_checkable
class Surface(Protocol):
    """Anything that a ray can hit."""

    def hit(self, origin: Float[Tensor, " 3"], direction: Float[Tensor, "*b 3"]) -> Float[Tensor, "*b"]:
        """Smallest t > 0 with origin + t * direction on the surface; +inf where there is none."""
        ...


@dataclass(frozen=True)
class Plane:
    """The plane normal . X = distance in world coordinates, cut to a square of ``half_size`` about ``center``."""

    normal: tuple[float, float, float]
    distance: float
    center: tuple[float, float, float] = (0.0, 0.0, 0.0)
    half_size: float = float("inf")

    def hit(self, origin: Float[Tensor, " 3"], direction: Float[Tensor, "*b 3"]) -> Float[Tensor, "*b"]:
        """Smallest positive ray parameter on the plane."""
        normal = origin.new_tensor(self.normal)
        slope = direction @ normal
        t = (self.distance - origin @ normal) / torch.where(slope == 0, torch.full_like(slope, 1e-30), slope)
        offset = origin + t[..., None] * direction - origin.new_tensor(self.center)
        on_square = (offset.abs() <= self.half_size).all(dim=-1)
        return torch.where((t > 0) & on_square, t, torch.full_like(t, float("inf")))


@dataclass(frozen=True)
class Sphere:
    """A sphere in world coordinates."""

    center: tuple[float, float, float]
    radius: float

    def hit(self, origin: Float[Tensor, " 3"], direction: Float[Tensor, "*b 3"]) -> Float[Tensor, "*b"]:
        """Smallest positive root of |origin + t direction - center|^2 = radius^2."""
        offset = origin - origin.new_tensor(self.center)
        a = (direction * direction).sum(-1)
        half_b = direction @ offset
        discriminant = half_b**2 - a * (offset @ offset - self.radius**2)
        root = discriminant.clamp(min=0).sqrt()
        near, far = (-half_b - root) / a, (-half_b + root) / a
        t = torch.where(near > 0, near, far)
        return torch.where((discriminant >= 0) & (t > 0), t, torch.full_like(t, float("inf")))


@dataclass(frozen=True)
class AnalyticScene:
    """A union of surfaces with a smooth texture painted in world coordinates."""

    surfaces: tuple[Surface, ...]

    def hit(self, origin: Float[Tensor, " 3"], direction: Float[Tensor, "*b 3"]) -> Float[Tensor, "*b"]:
        """First hit over all surfaces."""
        return torch.stack([surface.hit(origin, direction) for surface in self.surfaces]).amin(dim=0)

    def depth(self, camera: Camera) -> tuple[Float[Tensor, "h w"], Bool[Tensor, "h w"]]:
        """Exact depth at every pixel's centre, and where there is any."""
        depth = self.hit(camera.center, self._rays(camera))
        valid = torch.isfinite(depth)
        return torch.where(valid, depth, torch.ones_like(depth)), valid

    def points(self, camera: Camera) -> tuple[Float[Tensor, "h w 3"], Bool[Tensor, "h w"]]:
        """World points seen at every pixel's centre."""
        depth, valid = self.depth(camera)
        return camera.center + depth[..., None] * self._rays(camera), valid

    def image(self, camera: Camera, period: float = 1.0) -> Float[Tensor, "h w 3"]:
        """Picture of the texture: three phase-shifted sines of the world position; black where nothing is hit."""
        points, valid = self.points(camera)
        phase = points @ points.new_tensor([[1.0, 0.3, 0.5], [0.4, 1.0, 0.2], [-0.5, 0.6, 1.0]]).T
        return (0.5 + 0.45 * torch.sin(phase * (2 * torch.pi / period))) * valid[..., None]

    def warp(self, camera_A: Camera, camera_B: Camera) -> tuple[Float[Tensor, "h w 2"], Bool[Tensor, "h w"]]:
        """Exact ``warp_A_to_B`` (normalised) and ``covisibility_A_to_B``."""
        points, valid = self.points(camera_A)
        points_px, depth_in_B = project(transform_points(camera_B.w2c, points), camera_B.K)
        warp = to_normalized(points_px, camera_B.hw)
        first_hit = self.hit(camera_B.center, points - camera_B.center)  # 1 at the point itself
        unoccluded = first_hit > 1 - _HIT_TOL
        return warp, valid & (depth_in_B > 0) & inside_image(warp) & unoccluded

    def _rays(self, camera: Camera) -> Float[Tensor, "h w 3"]:
        grid = pixel_grid(camera.hw, dtype=camera.K.dtype)
        # R^T d: camera to world, z = 1 in the camera
        return ray_directions(grid, camera.K) @ camera.w2c[:3, :3]


def fronto_parallel_plane(depth: float = 2.0) -> AnalyticScene:
    """One plane z = depth."""
    return AnalyticScene((Plane((0.0, 0.0, 1.0), depth),))


def slanted_plane() -> AnalyticScene:
    """One plane turned about both image axes."""
    return AnalyticScene((Plane((0.35, -0.25, 1.0), 3.0),))


def two_planes() -> AnalyticScene:
    """A square at z = 2 in front of a plane at z = 4: occlusion with known edges."""
    return AnalyticScene(
        (Plane((0.0, 0.0, 1.0), 2.0, center=(0.1, -0.05, 2.0), half_size=0.45), Plane((0.0, 0.0, 1.0), 4.0))
    )


def sphere_on_plane() -> AnalyticScene:
    """A sphere in front of a plane: curved surface, self-occlusion."""
    return AnalyticScene((Sphere((0.1, 0.0, 3.0), 0.7), Plane((0.0, 0.0, 1.0), 5.0)))
