"""View-dependent colour against scipy's complex harmonics, gsplat's own evaluation, and hand-written numbers."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from l2m_viz.gaussians import Gaussians, rasterize
from l2m_viz.gaussians.container import NUM_SH_REST
from l2m_viz.gaussians.spherical_harmonics import evaluate_colors, sh_basis
from l2m_viz.geometry import Camera, intrinsics, look_at


def _camera(eye=(0.3, -0.2, -1.0)) -> Camera:
    w2c = look_at(torch.tensor(eye), torch.tensor([0.0, 0.0, 4.0]))
    return Camera(intrinsics(48.0, (37, 53)), w2c, width=53, height=37)


def _gaussians(num_rest: int, n: int = 40, seed: int = 0) -> Gaussians:
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(n, 3, generator=generator) + torch.tensor([0.0, 0.0, 3.0])
    colors, sh_rest = (
        torch.rand(n, 3, generator=generator),
        torch.randn(n, num_rest, 3, generator=generator) / 4,
    )
    quats = torch.tensor([[1.0, 0.0, 0.0, 0.0]]).repeat(n, 1)
    return Gaussians(means, quats, torch.full((n, 3), -2.0), torch.ones(n), colors, sh_rest=sh_rest)


def _directions(n: int = 200) -> torch.Tensor:
    rough = torch.randn(n, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return rough / rough.norm(dim=-1, keepdim=True)


def test_basis_is_scipys():
    from scipy.special import sph_harm_y

    directions = _directions()
    polar, azimuth = (
        directions[:, 2].arccos().numpy(),
        torch.atan2(directions[:, 1], directions[:, 0]).numpy(),
    )
    columns = []
    for degree in range(5):
        for order in range(-degree, degree + 1):
            # complex, with the Condon-Shortley phase, which the splatting world keeps in the real basis, too
            value = sph_harm_y(degree, abs(order), polar, azimuth)
            columns.append(
                value.real if order == 0 else math.sqrt(2) * (value.real if order > 0 else value.imag)
            )
    np.testing.assert_allclose(sh_basis(directions, 4).numpy(), np.stack(columns, axis=-1), atol=1e-12)


def test_basis_is_orthonormal_on_the_sphere():
    """Gauss-Legendre in z times equal steps in azimuth integrates polynomials up to degree 8 exactly."""
    z, weight = np.polynomial.legendre.leggauss(6)
    azimuth = 2 * math.pi * np.arange(10) / 10
    radius = np.sqrt(1 - z**2)[:, None]
    points = np.stack([radius * np.cos(azimuth), radius * np.sin(azimuth), z[:, None].repeat(10, 1)], axis=-1)
    basis = sh_basis(torch.from_numpy(points), 4).numpy()
    gram = np.einsum("i,ijk,ijl->kl", weight * 2 * math.pi / 10, basis, basis)
    np.testing.assert_allclose(gram, np.eye(25), atol=1e-12)


@pytest.mark.parametrize("degree", range(1, 5))
def test_colours_are_gsplats(degree):
    reference = pytest.importorskip("gsplat.cuda._torch_impl")
    gaussians, camera = _gaussians(NUM_SH_REST[degree - 1], seed=degree), _camera()
    dc = (gaussians.colors - 0.5) / 0.28209479177387814
    coefficients = torch.cat([dc[:, None], gaussians.sh_rest], dim=1)
    raw = reference._spherical_harmonics(degree, gaussians.means - camera.center, coefficients) + 0.5
    assert (raw < 0).any()  # some are clamped
    torch.testing.assert_close(evaluate_colors(gaussians, camera), raw.clamp(min=0), atol=2e-6, rtol=0)


def test_degree_one_by_hand():
    """3DGS: -C1 y, C1 z, -C1 x with C1 = sqrt(3 / 4 pi); the Gaussian is straight ahead of (0.3, -0.2, 0)."""
    camera = Camera(torch.eye(3), torch.eye(4), width=53, height=37)
    camera.w2c[:2, 3] = torch.tensor([-0.3, 0.2])
    ahead = replace(
        _gaussians(3, n=1), means=torch.tensor([[0.3, -0.2, 5.0]]), colors=torch.full((1, 3), 0.25)
    )
    ahead = replace(ahead, sh_rest=torch.tensor([[[9.0, 9.0, 9.0], [0.1, 0.2, -9.0], [9.0, 9.0, 9.0]]]))
    c1 = math.sqrt(3 / (4 * math.pi))
    expected = torch.tensor([[0.25 + 0.1 * c1, 0.25 + 0.2 * c1, 0.0]])
    torch.testing.assert_close(evaluate_colors(ahead, camera), expected)


def test_without_coefficients_the_colours_are_the_same_tensor():
    gaussians = replace(_gaussians(3), sh_rest=None, colors=torch.full((40, 3), -0.5))
    assert evaluate_colors(gaussians, _camera()) is gaussians.colors


@pytest.mark.parametrize("num_rest", NUM_SH_REST)
def test_gradients_by_colour_coefficients_and_means(num_rest):
    gaussians, camera = _gaussians(num_rest, n=2), _camera()
    camera = replace(camera, K=camera.K.double(), w2c=camera.w2c.double())
    colors = gaussians.colors + 2  # away from the kink at zero
    leaves = [value.double().requires_grad_() for value in (gaussians.means, colors, gaussians.sh_rest)]
    double = gaussians.logit_opacities.double(), gaussians.quats.double(), gaussians.log_scales.double()

    def seen(means, colors, sh_rest):
        logits, quats, log_scales = double
        return evaluate_colors(Gaussians(means, quats, log_scales, logits, colors, sh_rest=sh_rest), camera)

    assert torch.autograd.gradcheck(seen, leaves)


def test_a_gaussian_at_the_camera_has_a_finite_colour_and_gradient():
    gaussians, camera = _gaussians(24, n=2), _camera()
    means = torch.stack([camera.center, camera.center + 1]).requires_grad_()
    seen = evaluate_colors(replace(gaussians, means=means), camera)
    seen.sum().backward()
    assert torch.isfinite(seen).all()
    assert torch.isfinite(means.grad).all()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_rasterize_draws_each_camera_with_its_own_colours(backend):
    gaussians, cameras = _gaussians(15), [_camera(), _camera((1.5, 0.4, -0.5))]
    together = rasterize(gaussians, cameras, backend=backend).color
    for index, camera in enumerate(cameras):
        plain = replace(gaussians, colors=evaluate_colors(gaussians, camera), sh_rest=None)
        assert torch.equal(together[index], rasterize(plain, camera, backend=backend).color)
    assert (together[0] - rasterize(replace(gaussians, sh_rest=None), cameras[0]).color).abs().max() > 0.05


def test_gradients_reach_the_coefficients_through_the_cpu_backend():
    gaussians = _gaussians(8)
    grads = {}
    for backend in ("reference", "cpu"):
        leaf = gaussians.sh_rest.clone().requires_grad_()
        render = rasterize(replace(gaussians, sh_rest=leaf), _camera(), backend=backend)
        (grads[backend],) = torch.autograd.grad(render.color.square().sum(), leaf)
    assert grads["cpu"].abs().max() > 0.1
    torch.testing.assert_close(grads["cpu"], grads["reference"], atol=1e-3, rtol=1e-3)
