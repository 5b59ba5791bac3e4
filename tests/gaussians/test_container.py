"""The container: activations, covariances, selection, errors."""

import pytest
import torch

from l2m_viz.errors import L2MError, ShapeError
from l2m_viz.gaussians import Gaussians


def _random(n: int = 5, features: int | None = 4) -> Gaussians:
    generator = torch.Generator().manual_seed(0)
    return Gaussians.from_activated(
        means=torch.randn(n, 3, generator=generator),
        quats=torch.randn(n, 4, generator=generator),
        scales=torch.rand(n, 3, generator=generator) + 0.1,
        opacities=torch.rand(n, generator=generator),
        colors=torch.rand(n, 3, generator=generator),
        features=None if features is None else torch.randn(n, features, generator=generator),
    )


def test_activated_values_round_trip():
    scales, opacities = torch.tensor([[0.5, 2.0, 1e-4]]), torch.tensor([0.25])
    gaussians = Gaussians.from_activated(
        torch.zeros(1, 3), torch.eye(4)[:1], scales, opacities, torch.zeros(1, 3)
    )
    torch.testing.assert_close(gaussians.scales, scales)
    torch.testing.assert_close(gaussians.opacities, opacities)
    assert gaussians.logit_opacities.item() == pytest.approx(-1.0986123)


def test_opacity_of_exactly_zero_and_one_is_kept_finite():
    ends = torch.tensor([0.0, 1.0])
    gaussians = Gaussians.from_activated(
        torch.zeros(2, 3), torch.ones(2, 4), torch.ones(2, 3), ends, torch.zeros(2, 3)
    )
    torch.testing.assert_close(gaussians.opacities, ends, atol=2e-6, rtol=0)


def test_covariance_of_a_quarter_turn_swaps_the_axes():
    quarter_turn_about_z = torch.tensor([[2**-0.5, 0.0, 0.0, 2**-0.5]]) * 3  # any length will do
    scales = torch.tensor([[1.0, 2.0, 3.0]])
    gaussians = Gaussians.from_activated(
        torch.zeros(1, 3), quarter_turn_about_z, scales, torch.ones(1), torch.zeros(1, 3)
    )
    torch.testing.assert_close(gaussians.covars[0], torch.diag(torch.tensor([4.0, 1.0, 9.0])))


def test_select_by_mask_and_by_index():
    gaussians = _random()
    mask = torch.tensor([True, False, True, False, False])
    assert len(gaussians.select(mask)) == 2
    assert torch.equal(gaussians.select(torch.tensor([0, 2])).features, gaussians.features[mask])


@pytest.mark.parametrize("features", [None, 4])
def test_save_and_load(tmp_path, features):
    gaussians = _random(features=features)
    gaussians.save(tmp_path / "g.npz")
    loaded = Gaussians.load(tmp_path / "g.npz")
    assert torch.equal(loaded.log_scales, gaussians.log_scales)
    assert (loaded.features is None) == (features is None)


def test_errors_name_the_field_and_the_count(unchecked):
    good = {
        name: getattr(_random(), name)
        for name in ("means", "quats", "log_scales", "logit_opacities", "colors")
    }
    with pytest.raises(ShapeError, match=r"quats.*\(5, 4\).*\(3, 4\)"):
        Gaussians(**{**good, "quats": good["quats"][:3]})
    with pytest.raises(L2MError, match=r"means.*2 of 5 rows"):
        bad = good["means"].clone()
        bad[1, 0], bad[3] = float("nan"), float("inf")
        Gaussians(**{**good, "means": bad})
    with pytest.raises(L2MError, match="zero rows"):
        Gaussians(**{**good, "quats": good["quats"] * torch.tensor([0.0, 1, 1, 1, 1])[:, None]})
    with pytest.raises(ShapeError, match="at least one"):
        Gaussians(*(value[:0] for value in good.values()))
    with pytest.raises(ShapeError, match="features"):
        Gaussians(**good, features=torch.zeros(4, 2))
    with pytest.raises(L2MError, match="opacities"):
        Gaussians.from_activated(
            good["means"], good["quats"], torch.ones(5, 3), torch.full((5,), 1.5), good["colors"]
        )
    with pytest.raises(L2MError, match="scales"):
        Gaussians.from_activated(
            good["means"], good["quats"], torch.zeros(5, 3), torch.ones(5), good["colors"]
        )
