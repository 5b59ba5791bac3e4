"""What is picked at a point is what the rasterizers blend there: one-hot features, a textbook loop, closed forms."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from l2m_viz.errors import L2MError, MissingError, ShapeError
from l2m_viz.gaussians import Gaussians, Picked, feature_similarity, pick, pick_ray, rasterize
from l2m_viz.geometry import (
    Camera,
    ray_directions,
    rotation_from_axis_angle,
    rotation_from_quat,
)

HW = (37, 53)


def _pixels(num: int, seed: int = 0) -> list[tuple[int, int]]:
    """Some pixels (x, y), and the corners."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(num, 2, generator=generator) * torch.tensor([HW[1], HW[0]])
    corners = [(0, 0), (HW[1] - 1, 0), (0, HW[0] - 1), (HW[1] - 1, HW[0] - 1)]
    return corners + [(int(x), int(y)) for x, y in drawn.tolist()]


def _layers(depths, opacities, **fields) -> Gaussians:
    """Wide layers across the view, that have their full opacity everywhere."""
    n = len(depths)
    means = torch.zeros(n, 3)
    means[:, 2] = torch.tensor(depths)
    quats = torch.tensor([[1.0, 0.0, 0.0, 0.0]]).repeat(n, 1)
    opacities = torch.tensor(opacities)
    colors = torch.eye(3)[torch.arange(n) % 3]
    return replace(
        Gaussians.from_activated(means, quats, torch.full((n, 3), 1e4), opacities, colors), **fields
    )


def _scattered(picked: Picked, n: int) -> torch.Tensor:
    return torch.zeros(n).index_put((picked.indices,), picked.weights)


# --- the same as the rasterizers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_weights_are_those_that_one_hot_features_show(hard_scene, camera_at, seed):
    scene, camera = hard_scene(seed), camera_at(0.3 * seed, -0.1, -0.5)
    n = len(scene)
    shown = rasterize(replace(scene, features=torch.eye(n)), camera, backend="reference").features
    assert shown is not None
    agree = []
    for x, y in _pixels(120, seed):
        picked = pick(scene, camera, (x + 0.5, y + 0.5))
        # a pixel may end one Gaussian earlier when T meets its limit within rounding
        agree.append(torch.allclose(_scattered(picked, n), shown[y, x], atol=1e-5, rtol=1e-4))
    assert np.mean(agree) > 0.98


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_sums_are_the_pixels_values(hard_scene, camera_at, backend):
    scene, camera, options = hard_scene(7, num_rest=15), camera_at(0.2, 0.1, -0.3), {"near": 0.1, "far": 5.0}
    options["eps2d"] = 0.1
    render = rasterize(scene, camera, backend=backend, **options)
    assert render.features is not None
    agree = []
    for x, y in _pixels(120):
        picked = pick(scene, camera, (x + 0.5, y + 0.5), **options)
        ours = [picked.color, picked.feature, torch.tensor([picked.alpha, picked.depth])]
        theirs = [
            render.color[y, x],
            render.features[y, x],
            torch.stack([render.alpha[y, x], render.depth[y, x]]),
        ]
        agree.append(torch.allclose(torch.cat(ours), torch.cat(theirs), atol=1e-4, rtol=1e-4))
        assert torch.equal(picked.features, scene.features[picked.indices])
    assert np.mean(agree) > 0.98


def _textbook(scene: Gaussians, camera: Camera, x: float, y: float) -> list[tuple[int, float]]:
    """Kerbl et al. (2023), one Gaussian after the other in double precision: index and weight of what is drawn."""
    (fx, _, cx), (_, fy, cy), _ = camera.K.double().numpy()
    w2c, means = camera.w2c.double().numpy(), scene.means.double().numpy()
    rotations = rotation_from_quat(scene.quats.double()).numpy()
    scales, opacities = scene.scales.double().numpy(), scene.opacities.double().numpy()
    light, drawn = 1.0, []
    centers = means @ w2c[:3, :3].T + w2c[:3, 3]
    for i in np.argsort(centers[:, 2].astype(np.float32), kind="stable"):
        X, Y, z = centers[i]
        if z < 0.01:
            continue
        u = np.clip(X / z, -cx / fx - 0.15 * camera.width / fx, (1.15 * camera.width - cx) / fx)
        v = np.clip(Y / z, -cy / fy - 0.15 * camera.height / fy, (1.15 * camera.height - cy) / fy)
        J = np.array([[fx / z, 0, -fx * u / z], [0, fy / z, -fy * v / z]])
        M = J @ w2c[:3, :3] @ rotations[i] * scales[i]
        d = np.array([x - fx * X / z - cx, y - fy * Y / z - cy])
        alpha = min(0.999, opacities[i] * math.exp(-0.5 * d @ np.linalg.solve(M @ M.T + 0.3 * np.eye(2), d)))
        if alpha < 1 / 255:
            continue
        if light * (1 - alpha) <= 1e-4:
            break
        drawn.append((int(i), light * alpha))
        light *= 1 - alpha
    return drawn


@pytest.mark.parametrize("off_center", [False, True])
def test_any_point_is_what_the_textbook_says(hard_scene, camera_at, off_center):
    scene, camera = hard_scene(11), camera_at(-0.4, 0.3, -0.2)
    if off_center:  # a window of a larger picture: the principal point is outside
        camera = replace(
            camera, K=camera.K + torch.tensor([[0.0, 0.0, -60.0], [0.0, 0.0, 30.0], [0.0, 0.0, 0.0]])
        )
    generator = torch.Generator().manual_seed(1)
    agree = []
    for x, y in (torch.rand(60, 2, generator=generator) * torch.tensor([HW[1], HW[0]])).tolist():
        picked, expected = pick(scene, camera, (x, y)), _textbook(scene, camera, x, y)
        got = list(zip(picked.indices.tolist(), picked.weights.tolist(), strict=True))
        same = [i for i, _ in got] == [i for i, _ in expected]
        agree.append(
            same and np.allclose([w for _, w in got], [w for _, w in expected], atol=2e-5, rtol=1e-3)
        )
    assert np.mean(agree) > 0.95


# --- by hand ----------------------------------------------------------------------------------------------------------


def test_two_layers_front_to_back(camera_at):
    picked = pick(_layers([5.0, 2.0], [0.5, 0.25], features=torch.eye(2)), camera_at(), (10.2, 20.7))
    assert picked.indices.tolist() == [1, 0]
    assert picked.alphas.tolist() == pytest.approx([0.25, 0.5], abs=1e-3)
    assert picked.transmittances.tolist() == pytest.approx([1.0, 0.75], abs=1e-3)
    assert picked.depths.tolist() == [2.0, 5.0]
    assert picked.alpha == pytest.approx(0.625, abs=1e-3)
    assert picked.depth == pytest.approx((0.25 * 2 + 0.375 * 5) / 0.625, abs=1e-2)
    assert picked.color.tolist() == pytest.approx([0.375, 0.25, 0.0], abs=1e-3)
    assert picked.feature.tolist() == pytest.approx([0.375, 0.25], abs=1e-3)
    assert picked.strongest == 0  # what gives most is behind


def test_alpha_is_capped_and_the_one_that_ends_the_pixel_is_not_drawn(camera_at):
    picked = pick(_layers([4.0, 2.0, 3.0], [0.9, 1.0, 1.0]), camera_at(), (26.5, 18.5))
    assert picked.indices.tolist() == [1]
    assert picked.alphas.tolist() == pytest.approx([0.999], abs=1e-6)


def test_ties_in_depth_go_by_index_and_faint_ones_are_left_out(camera_at):
    picked = pick(_layers([3.0, 3.0, 2.0, 3.0], [0.2, 0.3, 0.0035, 0.4]), camera_at(), (26.5, 18.5))
    assert picked.indices.tolist() == [0, 1, 3]


def test_near_and_far_cut(camera_at):
    line = _layers([1.0, 2.0, 3.0], [0.5] * 3)
    assert pick(line, camera_at(), (26.5, 18.5), near=1.5, far=2.5).indices.tolist() == [1]


@pytest.mark.parametrize("factor", [1e-3, 1e3])
def test_millimetres_and_kilometres_give_the_same(hard_scene, camera_at, factor):
    scene, camera = hard_scene(2), camera_at()
    log_scales = scene.log_scales + math.log(factor)
    scaled = replace(scene, means=scene.means * factor, log_scales=log_scales)
    for x, y in _pixels(10):
        a = pick(scene, camera, (x + 0.5, y + 0.5))
        b = pick(scaled, camera, (x + 0.5, y + 0.5), near=0.01 * factor)
        assert torch.equal(a.indices, b.indices)
        torch.testing.assert_close(a.weights, b.weights, atol=1e-4, rtol=1e-3)


def test_nothing_there_is_an_empty_list(hard_scene, camera_at):
    scene, camera = hard_scene(0), camera_at()
    behind = scene.select(torch.arange(20, 30))
    outside = [(-0.1, 5.0), (53.1, 5.0), (5.0, 37.1), (5.0, -1e9)]
    empty = [pick(behind, camera, (20.0, 20.0))] + [pick(scene, camera, point) for point in outside]
    for picked in empty:
        assert len(picked) == 0
        assert picked.strongest is None
        assert (picked.alpha, picked.depth) == (0.0, 0.0)
        assert picked.color.tolist() == [0, 0, 0]
        assert picked.feature.tolist() == [0] * 7
    assert pick(replace(behind, features=None), camera, (20.0, 20.0)).feature is None
    assert len(pick(scene, camera, (53.0, 37.0))) > 0  # the image's very corner is inside


def test_double_precision_and_gradients_do_not_matter(hard_scene, camera_at):
    scene, camera = hard_scene(3), camera_at()
    moving = replace(scene, means=scene.means.double().requires_grad_())
    double = replace(moving, quats=scene.quats.double(), log_scales=scene.log_scales.double())
    double = replace(double, logit_opacities=scene.logit_opacities.double(), colors=scene.colors.double())
    double = replace(double, features=scene.features.double())
    a, b = (pick(some, camera, (30.3, 20.9)) for some in (scene, double))
    assert torch.equal(a.indices, b.indices)
    assert not b.weights.requires_grad
    torch.testing.assert_close(a.weights, b.weights.float(), atol=1e-5, rtol=1e-4)


def test_wrong_points_are_refused(unchecked, hard_scene, camera_at):
    scene, camera = hard_scene(0), camera_at()
    with pytest.raises(L2MError, match=r"pick point_px: expected two finite numbers, got \[nan, 1\.0\]"):
        pick(scene, camera, (math.nan, 1.0))
    with pytest.raises(ShapeError, match=r"expected \(x, y\) in pixels, got \(3,\)"):
        pick(scene, camera, torch.zeros(3))
    for wrong in ({"near": -1.0}, {"near": 2.0, "far": 1.0}, {"eps2d": -1.0}):
        with pytest.raises(L2MError, match="pick: expected"):
            pick(scene, camera, (1.0, 1.0), **wrong)


# --- rays -------------------------------------------------------------------------------------------------------------


def test_ray_along_the_optical_axis_is_the_middle_of_the_picture(hard_scene, camera_at):
    scene, camera = hard_scene(4), camera_at(0.3, -0.2, -0.6)
    forward = camera.c2w[:3, 2]
    along = pick_ray(scene, camera.center, 7 * forward, footprint=1 / 48)
    middle = pick(scene, camera, (HW[1] / 2, HW[0] / 2))
    # what is far beside the view is seen differently: J is clamped at the image's border, and this image is one pixel
    both = _scattered(along, len(scene)), _scattered(middle, len(scene))
    assert (both[0] - both[1]).abs().max() < 0.02
    assert along.strongest == middle.strongest
    assert along.depth == pytest.approx(middle.depth, rel=0.02)


def test_ray_has_no_up_and_depth_is_the_distance_along_it(camera_at):
    """Turned with the scene, a ray finds the same ball at 3 units, and beside it the same flank of its bell."""
    ball = Gaussians.from_activated(
        torch.tensor([[0.0, 0.0, 3.0], [0.5, 0.0, 2.0]]),
        torch.tensor([[1.0, 0.0, 0.0, 0.0]]).repeat(2, 1),
        torch.full((2, 3), 0.1),
        torch.tensor([0.6, 0.9]),
        torch.ones(2, 3),
    )
    generator = torch.Generator().manual_seed(0)
    axis_angles = [*(2 * torch.randn(5, 3, generator=generator)), torch.tensor([math.pi / 2, 0, 0])]
    for axis_angle in axis_angles:
        rotation, shift = rotation_from_axis_angle(axis_angle), torch.randn(3, generator=generator)
        turned = replace(ball, means=ball.means @ rotation.T + shift)
        picked = pick_ray(turned, shift, 5 * rotation[:, 2], footprint=0.01)
        assert picked.indices.tolist() == [0]
        assert picked.depths.item() == pytest.approx(3.0, abs=1e-5)
        assert picked.alphas.item() == pytest.approx(0.6, abs=1e-5)
        # 0.1 units beside it: sigma is 0.1 / 3 / 0.01 px, and 0.3 px^2 wider
        picked = pick_ray(turned, shift + 0.1 * rotation[:, 0], rotation[:, 2], footprint=0.01)
        variance = (0.1 / 3 / 0.01) ** 2 + 0.3
        assert picked.alphas.item() == pytest.approx(
            0.6 * math.exp(-((10 / 3) ** 2) / (2 * variance)), abs=1e-3
        )


def test_ray_into_the_void_finds_nothing(hard_scene):
    assert len(pick_ray(hard_scene(0), torch.tensor([0.0, 0.0, -500.0]), torch.tensor([0.0, 0.0, -1.0]))) == 0


def test_impossible_rays_are_refused(hard_scene):
    scene, origin, ahead = hard_scene(0), torch.zeros(3), torch.tensor([0.0, 0.0, 1.0])
    for wrong in (torch.zeros(3), torch.full((3,), math.nan)):
        with pytest.raises(L2MError, match="a direction that is not zero"):
            pick_ray(scene, origin, wrong)
    with pytest.raises(L2MError, match="a finite origin"):
        pick_ray(scene, origin / 0, ahead)
    with pytest.raises(L2MError, match="expected 0 to pi radians, got 0"):
        pick_ray(scene, origin, ahead, footprint=0.0)


def test_ray_through_any_pixel_finds_what_the_camera_shows_there(camera_at):
    """A wall of balls, one in each 4 x 4 px: ray and pixel agree on each ball, near the view's edge, too."""
    camera = camera_at()
    y, x = torch.meshgrid(torch.arange(0.5, 37, 4), torch.arange(0.5, 53, 4), indexing="ij")
    points = torch.stack([x, y], dim=-1).reshape(-1, 2)
    rays = ray_directions(points, camera.K)
    n = len(rays)
    shape = torch.ones(n, 4), torch.full((n, 3), 0.02), torch.full((n,), 0.9)
    wall = Gaussians.from_activated(3 * rays, *shape, torch.rand(n, 3))
    for index, (point, ray) in enumerate(zip(points, rays, strict=True)):
        picked = pick_ray(wall, camera.center, ray, footprint=1 / 48)
        assert picked.strongest == pick(wall, camera, point).strongest == index
        assert picked.alphas[0].item() == pytest.approx(0.9, abs=1e-4)
        assert picked.depths[0].item() == pytest.approx(3 * ray.norm().item(), rel=1e-5)


# --- similarity -------------------------------------------------------------------------------------------------------


def test_similarity_is_the_cosine(hard_scene):
    scene = hard_scene(0)
    features = scene.features * torch.logspace(-20, 15, 300)[:, None]
    features[10] = 0
    query = torch.randn(7, generator=torch.Generator().manual_seed(1))
    similarity = feature_similarity(replace(scene, features=features), 1e-3 * query)
    double = features.double().numpy()
    lengths = np.linalg.norm(double, axis=1) * np.linalg.norm(query.numpy())
    lengths[10] = 1
    np.testing.assert_allclose(similarity.numpy(), double @ query.double().numpy() / lengths, atol=1e-5)
    assert similarity[10] == 0
    assert feature_similarity(scene, scene.features[3])[3].item() == pytest.approx(1.0, abs=1e-6)
    assert feature_similarity(scene, torch.zeros(7)).abs().max() == 0


def test_similarity_needs_features_of_the_same_width(unchecked, hard_scene):
    scene = hard_scene(0)
    with pytest.raises(MissingError, match="carry no features"):
        feature_similarity(replace(scene, features=None), torch.zeros(7))
    with pytest.raises(ShapeError, match=r"expected \(7,\), got \(6,\)"):
        feature_similarity(scene, torch.zeros(6))
    with pytest.raises(L2MError, match="expected finite values"):
        feature_similarity(scene, torch.full((7,), math.nan))


@pytest.mark.gpu
def test_gaussians_on_the_gpu_are_picked_alike(hard_scene, camera_at):
    if not torch.cuda.is_available():
        pytest.skip("PyTorch finds no GPU")
    scene = hard_scene(1)
    ours, theirs = (pick(some, camera_at(), (20.5, 20.5)) for some in (scene, scene.to("cuda")))
    assert torch.equal(ours.indices, theirs.indices)
    torch.testing.assert_close(ours.weights, theirs.weights, atol=1e-5, rtol=1e-4)
