"""The reference splatter against closed forms, the CPU backend against the reference."""

import math

import pytest
import torch

from l2m_viz.errors import L2MError, ShapeError
from l2m_viz.gaussians import Gaussians, rasterize
from l2m_viz.geometry import Camera, intrinsics

HW = (37, 53)
BACKENDS = ["reference", "cpu"]
PARAMETERS = ["means", "quats", "log_scales", "logit_opacities", "colors", "features"]
FIELDS = ["color", "features", "depth", "alpha"]


def _gaussians(means, scales, opacities, colors=None, quats=None, features=None) -> Gaussians:
    n = len(means)
    return Gaussians.from_activated(
        torch.as_tensor(means, dtype=torch.float32),
        torch.tensor([[1.0, 0.0, 0.0, 0.0]]).repeat(n, 1) if quats is None else quats,
        torch.as_tensor(scales, dtype=torch.float32),
        torch.as_tensor(opacities, dtype=torch.float32),
        torch.ones(n, 3) if colors is None else torch.as_tensor(colors, dtype=torch.float32),
        features,
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_gaussian_is_a_gaussian_of_the_pixel(backend, camera_at):
    sigma, depth, opacity = 0.2, 3.0, 0.6
    render = rasterize(_gaussians([[0, 0, depth]], [[sigma] * 3], [opacity]), camera_at(), backend=backend)
    variance = (48.0 * sigma / depth) ** 2 + 0.3  # projected, plus the low-pass filter
    y, x = torch.meshgrid(torch.arange(HW[0]) + 0.5, torch.arange(HW[1]) + 0.5, indexing="ij")
    power = ((x - HW[1] / 2) ** 2 + (y - HW[0] / 2) ** 2) / (2 * variance)
    expected = opacity * torch.exp(-power)
    expected = torch.where(expected >= 1 / 255, expected, 0.0)
    torch.testing.assert_close(render.alpha, expected, atol=2e-6, rtol=0)
    torch.testing.assert_close(render.color[..., 1], expected, atol=2e-6, rtol=0)
    assert render.depth[render.alpha > 0].sub(depth).abs().max() < 1e-4


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_wide_layers_blend_front_to_back_over_the_background(backend, camera_at):
    far_first = _gaussians(
        [[0, 0, 5.0], [0, 0, 2.0]], [[1e3] * 3] * 2, [0.5, 0.25], colors=[[0, 1, 0], [1, 0, 0]]
    )
    background = torch.tensor([0.0, 0.0, 1.0])
    render = rasterize(far_first, camera_at(), backend=backend, background=background)
    torch.testing.assert_close(
        render.color[20, 30], torch.tensor([0.25, 0.75 * 0.5, 0.75 * 0.5]), atol=1e-3, rtol=0
    )
    assert render.depth[20, 30].item() == pytest.approx((0.25 * 2 + 0.375 * 5) / 0.625, abs=1e-2)


def test_the_mean_of_features_does_not_fade_where_gaussians_do(camera_at):
    layers = _gaussians(
        [[0, 0, 5.0], [0, 0, 2.0]],
        [[1e3] * 3] * 2,
        [0.5, 0.25],
        features=torch.tensor([[8.0, 2.0], [3.0, 2.0]]),
    )
    mean = rasterize(layers, camera_at()).mean_features[20, 30]
    expected = torch.tensor([(0.25 * 3 + 0.375 * 8) / 0.625, 2.0])
    torch.testing.assert_close(mean, expected, atol=1e-2, rtol=0)
    with pytest.raises(ShapeError, match="Gaussians with features"):
        _ = rasterize(_gaussians([[0, 0, 2.0]], [[1.0] * 3], [0.5]), camera_at()).mean_features


@pytest.mark.parametrize("backend", BACKENDS)
def test_alpha_is_capped_and_the_last_gaussian_is_not_drawn(backend, camera_at):
    # opacity 1 is capped to 0.999: T = 1e-3 after one layer; the second would bring it to 1e-6 and ends the pixel
    layers = _gaussians(
        [[0, 0, 2.0], [0, 0, 3.0]], [[1e3] * 3] * 2, [1.0, 1.0], colors=[[1, 0, 0], [0, 1, 0]]
    )
    render = rasterize(layers, camera_at(), backend=backend)
    assert render.alpha[18, 26].item() == pytest.approx(0.999, abs=1e-6)
    assert render.color[18, 26].tolist() == pytest.approx([0.999, 0.0, 0.0], abs=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_cpu_backend_equals_the_reference(seed, hard_scene, camera_at):
    gaussians, camera = hard_scene(seed), camera_at(0.3 * seed, -0.1, -0.5)
    fast, slow = (rasterize(gaussians, camera, backend=backend) for backend in ("cpu", "reference"))
    # a pixel may end one Gaussian earlier when T meets its limit within rounding: allow a few
    for name in FIELDS:
        difference = (getattr(fast, name) - getattr(slow, name)).abs()
        assert (difference < 1e-4).float().mean() > 0.999, name
        assert difference.median() < 1e-6, name


def test_reference_passes_gradcheck(hard_scene):
    gaussians = hard_scene(5, n=80).select(torch.tensor([0, 1, 33, 55, 76, 78]))
    camera = Camera(intrinsics(6.0, (5, 7)).double(), torch.eye(4).double(), width=7, height=5)
    parameters = [
        value.double().requires_grad_()
        for value in (
            gaussians.means,
            gaussians.quats,
            gaussians.log_scales,
            gaussians.logit_opacities,
            gaussians.colors,
        )
    ]

    def color_and_alpha(*values):
        render = rasterize(Gaussians(*values), camera, backend="reference")
        return render.color, render.alpha, render.depth * render.alpha

    assert torch.autograd.gradcheck(color_and_alpha, parameters, eps=1e-6, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_many_cameras_equal_one_at_a_time(backend, hard_scene, camera_at):
    gaussians, cameras = hard_scene(1), [camera_at(), camera_at(0.4, 0.2, 0.0)]
    together = rasterize(gaussians, cameras, backend=backend)
    assert together.color.shape == (2, *HW, 3)
    for index, camera in enumerate(cameras):
        alone = rasterize(gaussians, camera, backend=backend)
        for name in FIELDS:
            assert torch.equal(getattr(together, name)[index], getattr(alone, name)), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_in_sight_is_the_background(backend, camera_at):
    behind = _gaussians([[0, 0, -3.0]], [[0.1] * 3], [0.9], features=torch.ones(1, 2))
    render = rasterize(behind, camera_at(), backend=backend, background=torch.tensor([0.1, 0.2, 0.3]))
    assert render.alpha.abs().max() == 0
    torch.testing.assert_close(render.color, torch.tensor([0.1, 0.2, 0.3]).expand(*HW, 3))
    assert render.features.abs().max() == 0
    assert torch.isfinite(render.depth).all()


def test_near_and_far_cut(camera_at):
    line = _gaussians([[0, 0, z] for z in (1.0, 2.0, 3.0)], [[0.3] * 3] * 3, [0.5] * 3, features=torch.eye(3))
    render = rasterize(line, camera_at(), near=1.5, far=2.5)
    assert render.features[18, 26, 1] > 0.4
    assert render.features[..., [0, 2]].abs().max() == 0


def test_the_picture_does_not_depend_on_the_order_of_the_input(hard_scene, camera_at):
    gaussians = hard_scene(2).select(torch.arange(75, 300))  # without ties
    shuffled = gaussians.select(torch.randperm(225, generator=torch.Generator().manual_seed(0)))
    for name in FIELDS:
        a, b = (getattr(rasterize(scene, camera_at()), name) for scene in (gaussians, shuffled))
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_a_huge_image_row_and_a_single_pixel(camera_at):
    gaussians = _gaussians([[0, 0, 3.0]], [[20.0] * 3], [0.9])
    for hw in ((1, 1), (1, 300), (65, 2)):
        assert rasterize(gaussians, camera_at(hw=hw)).alpha.min() > 0.5


def test_errors(unchecked, hard_scene, camera_at):
    gaussians = hard_scene(0)
    with pytest.raises(ShapeError, match="one size"):
        rasterize(gaussians, [camera_at(), camera_at(hw=(10, 20))])
    with pytest.raises(ShapeError, match="no cameras"):
        rasterize(gaussians, [])


@pytest.mark.parametrize("seed", range(4))
def test_cpu_gradients_equal_the_reference(seed, hard_scene, camera_at):
    camera = camera_at(0.3 * seed, -0.1, -0.5)
    generator = torch.Generator().manual_seed(seed)
    weights = {"color": (*HW, 3), "features": (*HW, 7), "depth": HW, "alpha": HW}
    weights = {name: torch.randn(shape, generator=generator) for name, shape in weights.items()}
    gradients = {}
    for backend in BACKENDS:
        scene = hard_scene(seed)
        leaves = [getattr(scene, name).clone().requires_grad_() for name in PARAMETERS]
        render = rasterize(Gaussians(*leaves), camera, backend=backend)
        loss = sum(
            (getattr(render, name) * weight).sum() for name, weight in weights.items() if name != "depth"
        )
        loss = loss + (render.depth * render.alpha.detach() * weights["depth"]).sum()
        gradients[backend] = torch.autograd.grad(loss, leaves)
    for name, fast, slow in zip(PARAMETERS, gradients["cpu"], gradients["reference"], strict=True):
        scale = slow.abs().amax(dim=-1) if slow.ndim > 1 else slow.abs()
        error = (fast - slow).abs().amax(dim=-1) if slow.ndim > 1 else (fast - slow).abs()
        # pixels that end within rounding of the limit differ by one Gaussian: a few rows may
        assert (error < 2e-3 * scale + 2e-3).float().mean() > 0.98, name
        assert torch.isfinite(fast).all(), name


def test_impossible_options_and_camera_gradients_are_refused(unchecked, hard_scene, camera_at):
    gaussians, camera = hard_scene(0), camera_at()
    for wrong in ({"near": -1.0}, {"near": 2.0, "far": 1.0}, {"eps2d": -1.0}, {"near": math.nan}):
        with pytest.raises(L2MError, match="expected"):
            rasterize(gaussians, camera, **wrong)
    with pytest.raises(ShapeError, match="background"):
        rasterize(gaussians, camera, background=torch.ones(1))
    moving = Camera(camera.K, camera.w2c.clone().requires_grad_(), camera.width, camera.height)
    with pytest.raises(L2MError, match="reference"):
        rasterize(gaussians, moving)
    assert rasterize(gaussians, moving, backend="reference").color.requires_grad


def test_a_camera_in_double_precision_is_drawn_alike_by_both(hard_scene, camera_at):
    camera = camera_at()
    double = Camera(camera.K.double(), camera.w2c.double(), camera.width, camera.height)
    a, b = (rasterize(hard_scene(1), double, backend=backend).alpha for backend in BACKENDS)
    assert ((a - b).abs() < 1e-4).float().mean() > 0.999


def test_gradients_reach_only_what_was_drawn(camera_at):
    scene = _gaussians([[0, 0, 3.0], [0, 0, -3.0]], [[0.2] * 3] * 2, [0.5, 0.5], features=torch.ones(2, 3))
    leaves = [getattr(scene, name).clone().requires_grad_() for name in PARAMETERS]
    rasterize(Gaussians(*leaves), camera_at()).alpha.sum().backward()
    assert leaves[3].grad[0] > 0
    for leaf in leaves:
        assert leaf.grad is not None
        assert leaf.grad[1].abs().max() == 0


def test_no_gradient_reaches_shape_or_opacity_where_alpha_is_capped(camera_at):
    scene = _gaussians([[0, 0, 2.0]], [[1e3] * 3], [1.0], features=torch.ones(1, 3))
    for backend in BACKENDS:
        leaves = [getattr(scene, name).clone().requires_grad_() for name in PARAMETERS]
        render = rasterize(Gaussians(*leaves), camera_at(), backend=backend)
        (render.color.sum() + render.features.sum()).backward()
        assert leaves[3].grad.abs().max() == 0
        assert leaves[2].grad.abs().max() == 0
        torch.testing.assert_close(
            leaves[4].grad, torch.full((1, 3), 0.999 * HW[0] * HW[1]), rtol=1e-4, atol=0
        )
