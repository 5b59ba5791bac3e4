"""Pixel-aligned Gaussians project back to their pixels, however the surface is slanted."""

import pytest
import torch
from torch.nn.functional import max_pool2d

from l2m_viz.data import load_sample
from l2m_viz.errors import ShapeError
from l2m_viz.evaluation import psnr
from l2m_viz.gaussians import PixelGaussiansCfg, gaussians_from_depth, rasterize
from l2m_viz.gaussians.reference import project_gaussians
from l2m_viz.geometry import Camera, intrinsics, pixel_grid
from l2m_viz.geometry.scenes import slanted_plane, two_planes
from l2m_viz.lifting import Depth, lift

HW = (40, 56)


def _lifted(scene):
    camera = Camera(intrinsics(50.0, HW), torch.eye(4), width=HW[1], height=HW[0])
    depth, valid = scene.depth(camera)
    image = scene.image(camera, period=8.0)
    return camera, image, depth, gaussians_from_depth(image, Depth(depth, valid, "metric", "exact"), camera.K)


def test_on_a_slanted_plane_every_footprint_is_the_same_circle_on_the_screen():
    camera, _, depth, gaussians = _lifted(slanted_plane())
    screen = project_gaussians(gaussians, camera, 0.01, 1e10, eps2d=0.0)
    torch.testing.assert_close(screen.means2d.reshape(*HW, 2), pixel_grid(HW), atol=1e-3, rtol=0)
    torch.testing.assert_close(screen.depths.reshape(HW), depth)
    sigma = PixelGaussiansCfg().footprint
    xx, xy, yy = screen.conics.unbind(-1)
    expected = torch.full_like(xx, 1 / sigma**2)
    torch.testing.assert_close(xx, expected, rtol=0.05, atol=0)
    torch.testing.assert_close(yy, expected, rtol=0.05, atol=0)
    assert (xy.abs() < 0.05 * expected).all()


def test_no_holes_and_the_same_picture_at_the_source_camera():
    camera, image, depth, gaussians = _lifted(two_planes())
    render = rasterize(gaussians, camera)
    assert render.alpha.min() > 0.9
    assert psnr(render.color / render.alpha[..., None], image, render.alpha > 0) > 30
    nearest, farthest = (sign * max_pool2d(sign * depth[None], 5, 1, 2)[0] for sign in (-1, 1))
    away_from_edges = nearest == farthest
    assert away_from_edges.float().mean() > 0.8
    torch.testing.assert_close(render.depth[away_from_edges], depth[away_from_edges], rtol=1e-3, atol=0)


def test_no_needles_at_depth_edges_or_noise():
    depth = torch.full(HW, 2.0)
    depth[:, 28:] = 40.0
    depth[5, 7] = 0.1
    gaussians = gaussians_from_depth(torch.zeros(*HW, 3), depth, intrinsics(50.0, HW))
    cfg = PixelGaussiansCfg()
    footprint = cfg.footprint * depth.flatten() / 50.0
    assert (gaussians.scales.amax(dim=1) <= footprint * (1 + cfg.max_slope) * 1.5).all()


def test_invalid_pixels_have_no_gaussian_and_features_follow():
    depth = torch.full(HW, 2.0)
    depth[:10] = float("nan")
    features = pixel_grid(HW)
    gaussians = gaussians_from_depth(torch.rand(*HW, 3), depth, intrinsics(50.0, HW), features)
    assert len(gaussians) == 30 * 56
    assert gaussians.features[0].tolist() == [0.5, 10.5]


def _opacity_map(depth, cfg=None):
    """Opacities in their pixels, 0 where there is no Gaussian."""
    gaussians = gaussians_from_depth(torch.zeros(*HW, 3), depth, intrinsics(50.0, HW), cfg=cfg)
    opacity = torch.zeros(HW)
    opacity[torch.isfinite(depth)] = gaussians.opacities
    return opacity


def test_pixels_on_both_sides_of_a_depth_step_are_less_opaque_and_no_others():
    depth = torch.full(HW, 2.0)
    depth[:, 20:] = 2.2  # columns 19 and 20 meet over a jump of 10 %
    depth[30:, :20] = 2.08  # 4 % from above is no jump, 6 % at the side is
    depth[:5, 20] = float("nan")  # neither the unknown pixels nor what they hide is beside a jump
    depth[12, 40] = 5.0  # a stray one, with its four neighbours
    expected = torch.full(HW, 0.98)
    expected[:, 19:21] = 0.8
    expected[:5, 19], expected[:5, 20] = 0.98, 0.0
    expected[12, 39:42], expected[11:14, 40] = 0.8, 0.8
    torch.testing.assert_close(_opacity_map(depth), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(_opacity_map(500 * depth), expected, atol=1e-6, rtol=0)


def test_the_threshold_and_the_opacity_of_edges_are_options():
    depth = torch.full(HW, 2.0)
    depth[7:] = 2.2
    expected = torch.full(HW, 0.9)
    torch.testing.assert_close(
        _opacity_map(depth, PixelGaussiansCfg(opacity=0.9, max_depth_ratio=1.11)), expected
    )
    expected[6:8] = 0.25
    torch.testing.assert_close(
        _opacity_map(depth, PixelGaussiansCfg(opacity=0.9, edge_opacity=0.25)), expected
    )


def test_a_slanted_plane_has_no_edges():
    *_, depth, gaussians = _lifted(slanted_plane())
    assert depth.max() > 1.3 * depth.min()  # far more than the threshold, but in small steps
    torch.testing.assert_close(gaussians.opacities, torch.full_like(gaussians.opacities, 0.98))


def test_the_unit_of_length_is_that_of_the_depth():
    *_, metric = _lifted(slanted_plane())
    assert metric.length_unit == "m"
    ones, K = torch.ones(HW), intrinsics(50.0, HW)
    relative = Depth(ones, ones > 0, "relative", "guess")
    for depth in (relative, ones):
        assert gaussians_from_depth(torch.zeros(*HW, 3), depth, K).length_unit == "relative"


def test_units_scale_everything_together():
    depth = 2 + torch.rand(HW, generator=torch.Generator().manual_seed(0))
    image = torch.rand(*HW, 3)
    metres, millimetres = (
        gaussians_from_depth(image, depth * unit, intrinsics(50.0, HW)) for unit in (1, 1000)
    )
    torch.testing.assert_close(metres.means * 1000, millimetres.means)
    torch.testing.assert_close(metres.scales * 1000, millimetres.scales, rtol=1e-3, atol=0)


def test_the_real_right_photo_is_as_good_as_the_mesh():
    sample = load_sample("motorcycle")
    depth = Depth(sample.depth_A, sample.valid_A, "metric", "measured")
    height, width = sample.image_B.shape[:2]
    camera = Camera(sample.K_B, sample.T_A_to_B, width=width, height=height)
    mesh = lift(sample.image_A, depth, sample.K_A).render(camera)
    splat = rasterize(gaussians_from_depth(sample.image_A, depth, sample.K_A), camera)
    covered = ~mesh.hole_mask
    assert psnr(splat.color, sample.image_B, covered) > psnr(mesh.image, sample.image_B, covered) - 0.5


def test_softer_edges_leave_less_afloat_and_open_no_holes_in_the_source_view():
    sample = load_sample("motorcycle")
    depth = Depth(sample.depth_A, sample.valid_A, "metric", "measured")
    height, width = sample.image_B.shape[:2]
    scene = lift(sample.image_A, depth, sample.K_A)
    camera = Camera(sample.K_B, sample.T_A_to_B, width=width, height=height)
    covered = ~scene.render(camera).hole_mask
    beyond = ~(max_pool2d(covered.float()[None], 3, 1, 1)[0] > 0)  # holes of the mesh, without a rim of 1 px
    afloat, quality = [], []
    for cfg in (PixelGaussiansCfg(), PixelGaussiansCfg(edge_opacity=PixelGaussiansCfg.opacity)):
        gaussians = gaussians_from_depth(sample.image_A, depth, sample.K_A, cfg=cfg)
        seen = rasterize(gaussians, camera)
        afloat.append((seen.alpha > 0.5)[beyond].float().mean())
        quality.append(psnr(seen.color, sample.image_B, covered))
        alpha = rasterize(gaussians, scene.camera).alpha[sample.valid_A]
        assert (alpha > 0.9).float().mean() > 0.999
        assert alpha.min() > 0.8
    assert afloat[0] < 0.95 * afloat[1]
    assert quality[0] > quality[1] - 0.05


def test_sizes_must_agree(unchecked):
    with pytest.raises(ShapeError, match="features"):
        gaussians_from_depth(torch.zeros(*HW, 3), torch.ones(HW), intrinsics(50.0, HW), torch.zeros(4, 5, 2))
