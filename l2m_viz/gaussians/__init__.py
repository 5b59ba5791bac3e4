"""3D Gaussians with features: made from depth, rendered, given features, picked, read from and written to files."""

from l2m_viz.gaussians.container import Gaussians as Gaussians
from l2m_viz.gaussians.from_depth import (
    PixelGaussiansCfg as PixelGaussiansCfg,
    gaussians_from_depth as gaussians_from_depth,
)
from l2m_viz.gaussians.lift_features import (
    FeatureView as FeatureView,
    FitCfg as FitCfg,
    FitStep as FitStep,
    LiftedFeatures as LiftedFeatures,
    lift_features as lift_features,
    lift_features_steps as lift_features_steps,
)
from l2m_viz.gaussians.picking import (
    Picked as Picked,
    feature_similarity as feature_similarity,
    pick as pick,
    pick_ray as pick_ray,
)
from l2m_viz.gaussians.ply import read_ply as read_ply, write_ply as write_ply
from l2m_viz.gaussians.rasterize import HOLE_ALPHA as HOLE_ALPHA, Render as Render, rasterize as rasterize
