"""Lifting one photo to 3D: depth, mesh, novel views, and exact correspondences between them."""

from l2m_viz.lifting.depth import (
    Depth as Depth,
    as_depth as as_depth,
    depth_from_disparity as depth_from_disparity,
    estimate_depth as estimate_depth,
    read_depth as read_depth,
)
from l2m_viz.lifting.ground_truth import warp_from_depth as warp_from_depth
from l2m_viz.lifting.inpainting import FILL_METHODS as FILL_METHODS, fill_holes as fill_holes
from l2m_viz.lifting.relighting import (
    Lighting as Lighting,
    RelightCfg as RelightCfg,
    ShadeCfg as ShadeCfg,
    sample_lighting as sample_lighting,
    shade as shade,
    shade_batch as shade_batch,
)
from l2m_viz.lifting.scene import (
    NEAR as NEAR,
    LiftedScene as LiftedScene,
    MeshCfg as MeshCfg,
    View as View,
    lift as lift,
)
from l2m_viz.lifting.sky import mask_sky as mask_sky, sky_mask as sky_mask
from l2m_viz.lifting.synthesis import SynthesisCfg as SynthesisCfg, synthesise_views as synthesise_views
from l2m_viz.lifting.views import (
    ViewSamplerCfg as ViewSamplerCfg,
    orbit_cameras as orbit_cameras,
    sample_cameras as sample_cameras,
    sample_intrinsics as sample_intrinsics,
)
