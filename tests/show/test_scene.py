"""Colours, display sizes, and what a viewer is given."""

import math
import socket
from dataclasses import replace

import numpy as np
import pytest
import torch

from l2m_viz.encoders import FeaturePCA
from l2m_viz.errors import L2MError, MissingError
from l2m_viz.gaussians import Gaussians
from l2m_viz.geometry import (
    Camera,
    pose_from_rotation,
    project,
    rotation_from_axis_angle,
    transform_points,
)
from l2m_viz.geometry.scenes import sphere_on_plane
from l2m_viz.show import scene as scenes
from l2m_viz.show.viewer_camera import SIGMA_MAX, SIGMA_MIN, ViewerUnits

HW = (48, 64)
ONE = ViewerUnits(1.0)


def _scaled(gaussians: Gaussians, factor: float) -> Gaussians:
    log_scales = gaussians.log_scales + math.log(factor)
    return replace(gaussians, means=gaussians.means * factor, log_scales=log_scales)


# --- sizes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1.0, 1e-3, 1e3])
def test_covariances_keep_their_size_in_float16_in_any_unit_of_length(camera, gaussians, factor):
    scene = _scaled(gaussians, factor)
    units = ViewerUnits.fit(scene, camera)
    assert np.percentile(scene.means[:, 2] * units.per_scene_unit, 2) == pytest.approx(4, rel=1e-3)
    covariances = scenes.display_covariances(scene, units, size=1.0).double()
    rounded = covariances.numpy().astype(np.float16).astype(np.float64)
    wide = torch.linalg.eigvalsh(covariances)[:, 1:].sqrt()  # the thin axis may be rounded up
    np.testing.assert_allclose(np.sqrt(np.linalg.eigvalsh(rounded)[:, 1:]), wide, rtol=0.01)
    true = scene.scales.sort(dim=1).values[:, 1:] * (units.per_scene_unit * units.storage)
    enlarged = (wide / true - 1).abs() > 0.01
    assert enlarged.float().mean() < 0.02
    same = scenes.display_covariances(gaussians, ViewerUnits.fit(gaussians, camera))
    torch.testing.assert_close(covariances.float(), same, rtol=1e-3, atol=1e-9)


def test_display_sizes_stay_where_float16_is_precise(gaussians):
    sizes = torch.tensor([1e-9, 1e-3, 1.0, 1e6]).repeat(len(gaussians))[: len(gaussians)]
    odd = replace(gaussians, log_scales=sizes.log()[:, None].expand(-1, 3))
    covariances = scenes.display_covariances(odd, ONE).numpy().astype(np.float16)
    assert np.isfinite(covariances).all()
    sigmas = np.sqrt(np.linalg.eigvalsh(covariances.astype(np.float64)))
    assert sigmas.min() >= 0.98 * SIGMA_MIN
    assert sigmas.max() <= 1.02 * SIGMA_MAX


def test_size_changes_the_display_only(gaussians, camera):
    units = ViewerUnits.fit(gaussians, camera)
    before = gaussians.log_scales.clone()
    once, twice = (scenes.display_covariances(gaussians, units, size) for size in (1.5, 3.0))
    largest = [torch.linalg.eigvalsh(covariances)[:, -1] for covariances in (once, twice)]
    torch.testing.assert_close(largest[1], 4 * largest[0], rtol=1e-3, atol=0)
    assert torch.equal(gaussians.log_scales, before)


@pytest.mark.parametrize("num", [1, 7, 300, 1000, 3072])
def test_thinning_keeps_the_number_and_covers_the_picture(camera, gaussians, num):
    kept = scenes.thin_evenly(gaussians.means, camera, num)
    assert 0.7 * num <= len(kept) <= num
    assert len(kept.unique()) == len(kept)
    if num == 300:  # about one in ten: each block of 8 x 8 px has some
        points_px, _ = project(gaussians.means[kept], camera.K)
        block = (points_px / 8).long()
        assert len(torch.unique(block[:, 1] * 8 + block[:, 0])) == 48


# --- where to start -------------------------------------------------------------------------------------------------


def test_without_pictures_the_view_starts_where_everything_is_in_sight(gaussians):
    for moved in (gaussians, replace(gaussians, means=gaussians.means - torch.tensor([0.0, 0.0, 4.0]))):
        camera = scenes.first_camera(moved, {})
        points_px, depth = project(transform_points(camera.w2c, moved.means), camera.K)
        inside = (points_px > 0).all(1) & (points_px < torch.tensor([640.0, 480.0])).all(1) & (depth > 0)
        assert inside.float().mean() > 0.9


# --- colours ----------------------------------------------------------------------------------------------------------


def test_rgb_mode_is_the_gaussians_own_colour(gaussians):
    assert torch.equal(scenes.gaussian_colors(gaussians, "rgb"), gaussians.colors.clamp(0, 1))


def test_depth_mode_is_red_near_and_blue_far_from_the_given_camera(camera, gaussians):
    colors = scenes.gaussian_colors(gaussians, "depth", camera=camera)
    near, far = gaussians.means[:, 2].argmin(), gaussians.means[:, 2].argmax()
    assert colors[near, 0] > colors[near, 2] + 0.2
    assert colors[far, 2] > colors[far, 0]
    behind = replace(camera, w2c=torch.diag(torch.tensor([-1.0, 1.0, -1.0, 1.0])))  # looks the other way
    turned = scenes.gaussian_colors(gaussians, "depth", camera=behind)
    assert turned[near, 2] > turned[near, 0]


def test_feature_mode_takes_descriptors_or_coordinates_in_the_basis(gaussians):
    assert gaussians.features is not None
    pca = FeaturePCA.fit(gaussians.features, 3)
    raw = scenes.gaussian_colors(gaussians, "features", pca)
    projected = replace(gaussians, features=pca.project(gaussians.features))
    torch.testing.assert_close(scenes.gaussian_colors(projected, "features", pca), raw)
    torch.testing.assert_close(scenes.gaussian_colors(gaussians, "features"), raw)  # no basis: fitted on them
    assert raw.std(dim=0).min() > 0.05


def test_similarity_mode_is_red_where_alike_and_blue_where_opposite(gaussians):
    similarity = torch.linspace(-1, 1, len(gaussians))
    colors = scenes.gaussian_colors(gaussians, "similarity", similarity=similarity)
    assert colors[-1, 0] > colors[-1, 2] + 0.4
    assert colors[0, 2] > colors[0, 0] + 0.4
    assert colors[len(gaussians) // 2].std() < 0.02


def test_modes_that_cannot_be_shown_say_so(gaussians, camera, unchecked):
    bare = replace(gaussians, features=None)
    with pytest.raises(MissingError, match=r"carry no features\. Show 'rgb' or 'depth'"):
        scenes.gaussian_colors(bare, "features")
    with pytest.raises(MissingError, match="carry no features"):
        scenes.novel_view(bare, camera, "features")
    with pytest.raises(MissingError, match=r"no similarity is given\. Pick a feature"):
        scenes.gaussian_colors(gaussians, "similarity")
    with pytest.raises(MissingError, match="no similarity is given"):
        scenes.novel_view(gaussians, camera, "similarity")
    with pytest.raises(L2MError, match="expected 'rgb', 'features', 'depth' or 'similarity', got 'normal'"):
        scenes.gaussian_colors(gaussians, "normal")  # pyright: ignore[reportArgumentType]


# --- our own view -----------------------------------------------------------------------------------------------------


def test_novel_view_draws_holes_as_stripes_and_nothing_else(camera, gaussians):
    left = replace(gaussians, means=gaussians.means - torch.tensor([1.5, 0.0, 0.0]))
    view = scenes.novel_view(left, camera)
    assert 0.2 < view.hole_share < 0.8
    assert view.hole_mask[:, -5:].all()
    stripes = scenes.hatch(*HW)
    assert torch.equal(view.image[view.hole_mask], stripes[view.hole_mask])
    assert len(stripes.reshape(-1, 3).unique(dim=0)) == 2
    whole = scenes.novel_view(gaussians, camera)
    assert whole.hole_share < 0.01
    original = sphere_on_plane().image(camera)
    assert (whole.image - original).abs()[~whole.hole_mask].mean() < 0.05
    shrunk = replace(
        gaussians, means=gaussians.means * 1e-3, log_scales=gaussians.log_scales + math.log(1e-3)
    )
    assert scenes.novel_view(shrunk, camera, near=1e-5).hole_share < 0.01  # another unit, the same picture


def test_novel_view_shows_features_and_depth_with_its_range(camera, gaussians):
    assert gaussians.features is not None
    depth = scenes.novel_view(gaussians, camera, "depth")
    near, far = depth.depth_limits
    assert gaussians.means[:, 2].min() - 0.05 <= near < far <= gaussians.means[:, 2].max() + 0.05
    assert depth.image[24, 33, 0] > depth.image[2, 2, 0]  # the sphere is nearer: redder
    pca = FeaturePCA.fit(gaussians.features, 3)
    raw = scenes.novel_view(gaussians, camera, "features", pca)
    coordinates = replace(gaussians, features=pca.project(gaussians.features))
    projected = scenes.novel_view(coordinates, camera, "features", pca)
    drawn = ~raw.hole_mask
    torch.testing.assert_close(raw.image[drawn], projected.image[drawn], atol=1e-4, rtol=0)


def test_novel_view_shows_the_mean_feature_also_where_it_is_half_transparent(camera, gaussians):
    """As the browser does, which blends colours; half a feature would have another colour."""
    assert gaussians.features is not None
    pca = FeaturePCA.fit(gaussians.features, 3)
    feature = pca.project(gaussians.features[5])
    everywhere = replace(gaussians, features=feature.expand(len(gaussians), -1).contiguous())
    thin = replace(everywhere, logit_opacities=gaussians.logit_opacities - 3.5)
    view = scenes.novel_view(thin, camera, "features", pca)
    drawn = ~view.hole_mask
    assert drawn.float().mean() > 0.5
    expected = scenes.gaussian_colors(gaussians, "features", pca)[5]
    torch.testing.assert_close(view.image[drawn], expected.expand(int(drawn.sum()), 3), atol=1e-3, rtol=0)


def test_novel_view_shows_the_mean_similarity_also_where_it_is_half_transparent(camera, gaussians):
    thin = replace(gaussians, logit_opacities=gaussians.logit_opacities - 3.5)
    view = scenes.novel_view(thin, camera, "similarity", similarity=torch.full((len(thin),), 0.5))
    drawn = ~view.hole_mask
    assert drawn.float().mean() > 0.5
    expected = scenes.gaussian_colors(
        thin.select(torch.tensor([0])), "similarity", similarity=torch.tensor([0.5])
    )
    torch.testing.assert_close(view.image[drawn], expected.expand(int(drawn.sum()), 3), atol=0.02, rtol=0)


# --- viser ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def server():
    pytest.importorskip("viser")
    with scenes.viser_server() as server:
        yield server


def test_server_is_on_this_machine_only_silent_and_gone_afterwards(capsys):
    pytest.importorskip("viser")
    with scenes.viser_server() as server:
        address = (server.get_host(), server.get_port())
        assert address[0] == "127.0.0.1"
        socket.create_connection(address, timeout=5).close()
    with pytest.raises(OSError):
        socket.create_connection(address, timeout=5)
    assert capsys.readouterr().out == ""


def test_scene_has_splats_frusta_and_the_photos_own_view(server, camera, gaussians):
    picture = torch.rand(*HW, 3)
    handle = scenes.build_scene(server, gaussians, pictures={"A": (camera, picture), "B": (camera, picture)})
    assert list(handle.frusta) == list(handle.pictures) == ["A", "B"]
    assert handle._splats.centers.shape == (len(gaussians), 3)
    np.testing.assert_allclose(server.initial_camera.position, 0, atol=1e-6)
    assert server.initial_camera.up == pytest.approx([0, -1, 0])
    assert server.initial_camera.fov > camera.fov_y
    before = np.array(handle._splats.rgbs)
    handle.set_colors(1 - gaussians.colors)
    np.testing.assert_allclose(handle._splats.rgbs, 255 - before.astype(int), atol=1)
    handle.set_size(3.0)
    expected = scenes.display_covariances(gaussians, handle.units, 3.0)
    np.testing.assert_allclose(handle._splats.covariances, expected, rtol=2e-3, atol=1e-4)
    handle.show_frusta(False)
    handle.show_gaussians(False)
    assert not handle.frusta["B"].visible
    assert not handle._splats.visible


def test_the_mark_is_one_ball_that_moves_and_grows_with_the_units(server, camera, gaussians):
    handle = scenes.build_scene(server, gaussians, pictures={"A": (camera, torch.rand(*HW, 3))})
    balls = []
    for point in ((0.5, -0.25, 2.0), (0.0, 0.0, 1.0)):
        handle.mark(torch.tensor(point), radius=0.01)
        balls += [node for name, node in server.scene._handle_from_node_name.items() if name == "/pick"]
        np.testing.assert_allclose(
            balls[-1].position, np.array(point) * handle.units.per_scene_unit, rtol=1e-5
        )
        assert balls[-1].radius == pytest.approx(0.01 * handle.units.per_scene_unit)
    assert len(balls) == 2  # one at a time


def test_frustum_picture_lies_where_an_off_centre_camera_sees_it(server, camera, gaussians):
    K = torch.tensor([[500.0, 0.0, 250.0], [0.0, 520.0, 300.0], [0.0, 0.0, 1.0]])
    rotation = rotation_from_axis_angle(torch.tensor([0.4, -1.2, 0.7]))
    off = Camera(K, pose_from_rotation(rotation, torch.tensor([0.3, -0.8, 1.1])), width=640, height=480)
    handle = scenes.build_scene(
        server, gaussians, pictures={"A": (camera, torch.rand(6, 8, 3)), "B": (off, torch.rand(6, 8, 3))}
    )
    picture = handle.pictures["B"]
    half = torch.tensor([picture.render_width / 2, picture.render_height / 2, 0.0])
    center = torch.tensor(np.asarray(picture.position), dtype=torch.float32)
    corners_px, _ = project(torch.stack([center - half, center + half]), off.K)
    torch.testing.assert_close(corners_px, torch.tensor([[0.0, 0.0], [640.0, 480.0]]), atol=1e-2, rtol=0)


def test_points_stand_in_for_splats_that_the_browser_drops(server, camera, gaussians):
    handle = scenes.build_scene(server, gaussians, pictures={"A": (camera, torch.rand(*HW, 3))})
    near = camera.resized((4 * HW[0], 4 * HW[1]))
    far = replace(near, w2c=pose_from_rotation(torch.eye(3), torch.tensor([0.0, 0.0, 60.0])))
    assert handle.dropped_share(near) < 0.05
    handle.see_from(near)
    assert handle._points is None
    assert handle.dropped_share(far) > 0.95
    handle.see_from(far)
    assert handle._points is not None
    assert handle._points.visible
    handle.see_from(near)
    assert not handle._points.visible


def test_thinned_scene_draws_fewer_and_larger_splats(server, camera, gaussians):
    full = scenes.build_scene(server, gaussians)
    thin = scenes.build_scene(server, gaussians, colors=gaussians.colors, max_gaussians=400)
    assert len(thin._splats.centers) <= 400
    size = [np.trace(h._splats.covariances, axis1=1, axis2=2).mean() for h in (full, thin)]
    assert size[1] > 5 * size[0]
    thin.set_colors(torch.zeros(len(gaussians), 3))  # colours are given for all, also when fewer are drawn
    assert not thin._splats.rgbs.any()


def test_show_scene_embeds_a_page_that_fetches_nothing(gaussians, camera, monkeypatch):
    pytest.importorskip("viser")
    shell, display = pytest.importorskip("IPython.core.getipython"), pytest.importorskip("IPython.display")
    shown = []
    monkeypatch.setattr(shell, "get_ipython", object)
    monkeypatch.setattr(display, "display", shown.append)
    scenes.show_scene(
        gaussians, pictures={"A": (camera, torch.rand(*HW, 3))}, colors="depth", height=321, max_gaussians=500
    )
    (page,) = (item.data for item in shown)
    assert 'height="321"' in page
    assert "__VISER_EMBED_DATA__" in page
    html = scenes.scene_html(gaussians, colors="features", max_gaussians=500)
    assert 'src="http' not in html
    assert len(html) < 2e6
