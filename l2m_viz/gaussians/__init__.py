"""3D Gaussians with features: container, readable reference splatter, CPU backend, pixel-aligned initialisation."""

from l2m_viz.gaussians.container import Gaussians as Gaussians
from l2m_viz.gaussians.from_depth import (
    PixelGaussiansCfg as PixelGaussiansCfg,
    gaussians_from_depth as gaussians_from_depth,
)
from l2m_viz.gaussians.rasterize import HOLE_ALPHA as HOLE_ALPHA, Render as Render, rasterize as rasterize
