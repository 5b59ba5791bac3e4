"""The density of matches that balanced sampling thins by: against the official numbers and the full sum."""

import numpy as np
import pytest
import torch

from l2m_viz.geometry import normalized_grid
from l2m_viz.matching import Match
from l2m_viz.matching.match import _density, _exact_density, _truncated_density


def _pairs(kind: str, num: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    a, noise = (2 * torch.rand(num, 2, generator=generator) - 1 for _ in range(2))
    b = a @ torch.tensor([[0.8, 0.1], [-0.1, 0.7]]) + 0.1
    if kind == "crowd":  # a third on one spot of B, a tenth at random
        b[: num // 3] = 0.05 * a[: num // 3] - 0.5
        b[-num // 10 :] = noise[-num // 10 :]
    return torch.cat([a, noise if kind == "noise" else b], dim=1).clamp(-1, 1)


def test_exact_density_reproduces_the_official_one(golden):
    official = golden("kde")
    density = _exact_density(torch.from_numpy(official["in.matches"]))
    np.testing.assert_allclose(density, official["out.density"], rtol=1e-4)


def test_exact_density_is_the_sum_of_gaussians():
    pairs = _pairs("crowd", 700)  # more than one block
    squared = (pairs[:, None].double() - pairs.double()).square().sum(dim=-1)
    torch.testing.assert_close(
        _exact_density(pairs).double(), (-squared / (2 * 0.1**2)).exp().sum(dim=1), atol=0, rtol=2e-4
    )


@pytest.mark.parametrize("kind", ["smooth", "crowd", "noise"])
def test_truncated_density_is_within_two_percent(kind):
    pairs = _pairs(kind, 6000)
    torch.testing.assert_close(_truncated_density(pairs), _exact_density(pairs), atol=0, rtol=0.02)


def test_truncated_density_at_the_borders_and_of_few():
    corners = torch.tensor([[-1.0, -1, 1, 1], [1, 1, -1, -1], [1, -1, 1, -1], [1, -1, 1, -1]])
    torch.testing.assert_close(_truncated_density(corners), torch.tensor([1.0, 1.0, 2.0, 2.0]))
    assert len(_density(torch.zeros(0, 4))) == 0
    assert len(_truncated_density(torch.zeros(0, 4))) == 0


def test_sampling_a_large_match_is_even_over_the_surface_and_never_repeats():
    warp = normalized_grid((200, 300))
    certainty = torch.ones(200, 300)
    match = Match(warp, certainty, warp, certainty, (200, 300), (200, 300))
    drawn = match.sample(5000, torch.Generator().manual_seed(0))
    assert len(drawn) == 5000
    counts = torch.histogramdd(drawn.points_A, bins=[3, 2], range=[0.0, 300.0, 0.0, 200.0]).hist
    # Near a border half of the neighbours are missing, so it is drawn from more: that is RoMa's balance.
    assert counts.max() / counts.min() < 1.35
    assert (
        len({(*a, *b) for a, b in zip(drawn.points_A.tolist(), drawn.points_B.tolist(), strict=True)}) > 4500
    )
