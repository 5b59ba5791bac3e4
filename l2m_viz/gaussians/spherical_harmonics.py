"""View-dependent colour: real spherical harmonics, in the signs and the order of 3D Gaussian Splatting.

Symbols: Y_lm is the basis function of degree l and order m, -l <= m <= l; the coefficients of a Gaussian run through
l = 1, 2, ... and within it through m = -l ... l. Degree 0 is already in `Gaussians.colors` (0.5 + Y_00 c_00).
The factor (-1)^m (Condon-Shortley phase) stays in the basis, as in Kerbl et al. (2023) and gsplat.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from l2m_viz.gaussians.container import NUM_SH_REST, Gaussians
from l2m_viz.geometry import Camera


def evaluate_colors(gaussians: Gaussians, camera: Camera) -> Float[Tensor, "n 3"]:
    """Colours as seen from the camera's centre: max(0, colors + sum_k sh_rest_k Y_k(direction)).

    ``direction`` points from the centre to the Gaussian's mean. Differentiable by colours, coefficients, means and the
    camera. Gaussians without ``sh_rest`` look the same from everywhere: their own ``colors`` are returned.
    """
    if gaussians.sh_rest is None:
        return gaussians.colors
    degree = NUM_SH_REST.index(gaussians.sh_rest.shape[1]) + 1
    directions = gaussians.means - camera.center.to(gaussians.means)
    directions = torch.nn.functional.normalize(directions, dim=-1)
    basis = sh_basis(directions, degree)[:, 1:]  # [n k], without the constant
    return (gaussians.colors + torch.einsum("nk,nkc->nc", basis, gaussians.sh_rest)).clamp(min=0)


def sh_basis(directions: Float[Tensor, "*n 3"], degree: int) -> Float[Tensor, "*n k"]:
    """Real spherical harmonics of degree 0 to ``degree`` in unit directions, k = (degree + 1)^2.

    Y_lm = (-1)^m N_lm P_l^|m|(z) Re or Im (x + iy)^|m|, real part for m >= 0. P is the associated Legendre function
    over (1 - z^2)^(|m|/2), a polynomial that its recurrence in the degree gives (DLMF 14.10.3); N normalises the
    integral of the square over the sphere to one.
    """
    x, y, z = (axis.contiguous() for axis in directions.unbind(-1))
    terms: dict[tuple[int, int], Tensor] = {}
    real, imaginary = torch.ones_like(x), torch.zeros_like(x)  # of (x + iy)^m
    for m in range(degree + 1):
        before, legendre = torch.zeros_like(z), torch.full_like(z, math.prod(range(1, 2 * m, 2)))
        for l in range(m, degree + 1):
            if l > m:
                following = ((2 * l - 1) * z * legendre - (l + m - 1) * before) / (l - m)
                before, legendre = legendre, following
            scaled = (-1) ** m * _norm(l, m) * legendre
            terms[l, m] = scaled * real
            if m > 0:
                terms[l, -m] = scaled * imaginary
        real, imaginary = x * real - y * imaginary, x * imaginary + y * real
    return torch.stack([terms[key] for key in sorted(terms)], dim=-1)


def _norm(l: int, m: int) -> float:
    """N_lm of the real basis: sqrt((2l+1) / 4pi (l-m)! / (l+m)!), times sqrt(2) where m > 0."""
    ratio = math.factorial(l - m) / math.factorial(l + m)
    return math.sqrt((2 if m > 0 else 1) * (2 * l + 1) / (4 * math.pi) * ratio)
