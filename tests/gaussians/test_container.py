"""The container: activations, covariances, selection, joining, what it knows about itself, errors."""

from dataclasses import fields, replace

import pytest
import torch

from l2m_viz.data import load_npz, save_npz
from l2m_viz.encoders import FeaturePCA
from l2m_viz.errors import L2MError, ShapeError
from l2m_viz.gaussians import Gaussians

TENSORS = (
    "means",
    "quats",
    "log_scales",
    "logit_opacities",
    "colors",
    "features",
    "sh_rest",
    "sh_dc",
)


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


def _basis(seed: int = 0, d: int = 4, k: int = 2) -> FeaturePCA:
    return FeaturePCA.fit(torch.randn(50, d, generator=torch.Generator().manual_seed(seed)), k)


def _full(n: int = 5, seed: int = 0) -> Gaussians:
    """Every field is there."""
    generator = torch.Generator().manual_seed(seed)
    return replace(
        _random(n),
        sh_rest=torch.randn(n, 8, 3, generator=generator),
        sh_dc=torch.randn(n, 3, generator=generator),
        backbone="l2m-tiny",
        length_unit="m",
        pca=_basis(),
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


@pytest.mark.parametrize("make", [_full, _random])
def test_select_and_to_keep_everything_else(make):
    gaussians, rows = make(), torch.tensor([3, 1])
    for changed, expected in ((gaussians.select(rows), rows), (gaussians.to("cpu"), torch.arange(5))):
        for name in TENSORS:
            value = getattr(gaussians, name)
            assert (getattr(changed, name) is None) == (value is None)
            assert value is None or torch.equal(getattr(changed, name), value[expected])
        assert (changed.backbone, changed.length_unit) == (gaussians.backbone, gaussians.length_unit)
        assert (changed.pca is None) == (gaussians.pca is None)
        if gaussians.pca is not None:
            assert torch.equal(changed.pca.components, gaussians.pca.components)


@pytest.mark.gpu
def test_to_moves_the_basis():
    moved = _full().to("cuda")
    assert {moved.pca.mean.device.type, moved.pca.components.device.type, moved.sh_dc.device.type} == {"cuda"}
    assert torch.equal(moved.to("cpu").pca.components, _basis().components)


@pytest.mark.parametrize("make", [_full, _random])
def test_select_undoes_concat(make):
    one, two = make(3), make(2)
    both = Gaussians.concat([one, two])
    assert len(both) == 5
    for part, index in ((one, torch.arange(3)), (two, torch.tensor([3, 4]))):
        again = both.select(index)
        for name in TENSORS:
            value = getattr(part, name)
            assert value is None or torch.equal(getattr(again, name), value)
    assert (both.backbone, both.length_unit) == (one.backbone, one.length_unit)
    assert torch.equal(Gaussians.concat([one]).means, one.means)


def test_concat_keeps_gradients():
    colors = torch.rand(5, 3, requires_grad=True)
    one = replace(_random(), colors=colors)
    Gaussians.concat([one, _random()]).colors.sum().backward()
    assert torch.equal(colors.grad, torch.ones(5, 3))


def test_concat_drops_sh_dc_that_only_some_have():
    one = _full(3)
    both = Gaussians.concat([one, replace(one, sh_dc=None)])
    assert both.sh_dc is None
    assert torch.equal(both.colors, torch.cat([one.colors, one.colors]))
    assert Gaussians.concat([replace(one, sh_dc=None), one]).sh_dc is None


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"features": None}, ShapeError, r"features: expected \(4,\).*first set, got None in set 2"),
        ({"features": torch.zeros(5, 2)}, ShapeError, r"features: expected \(4,\).*got \(2,\) in set 2"),
        ({"sh_rest": None}, ShapeError, r"sh_rest: expected \(8, 3\).*got None"),
        ({"sh_rest": torch.zeros(5, 15, 3)}, ShapeError, r"sh_rest: expected \(8, 3\).*got \(15, 3\)"),
        ({"backbone": "vgg19-bn"}, L2MError, "backbone: expected 'l2m-tiny'.*got 'vgg19-bn'"),
        ({"backbone": None}, L2MError, "backbone: expected 'l2m-tiny'.*got None"),
        (
            {"length_unit": "relative"},
            L2MError,
            "length_unit: expected 'm'.*got 'relative'.*dataclasses.replace",
        ),
        ({"pca": None}, L2MError, "pca: expected one PCA basis"),
        ({"pca": _basis(seed=1)}, L2MError, "pca: expected one PCA basis"),
    ],
)
def test_concat_names_the_difference(change, error, message):
    one = _full()
    with pytest.raises(error, match=message):
        Gaussians.concat([one, one, replace(one, **change)])


def test_concat_of_nothing():
    with pytest.raises(ShapeError, match="at least one set"):
        Gaussians.concat([])


@pytest.mark.parametrize("features", [None, 4])
def test_save_and_load(tmp_path, features):
    gaussians = _random(features=features)
    gaussians.save(tmp_path / "g.npz")
    loaded = Gaussians.load(tmp_path / "g.npz")
    assert torch.equal(loaded.log_scales, gaussians.log_scales)
    assert (loaded.features is None) == (features is None)


def test_save_and_load_keep_everything(tmp_path):
    gaussians = _full()
    gaussians.save(tmp_path / "g.npz")
    loaded = Gaussians.load(tmp_path / "g.npz")
    for name in TENSORS:
        assert torch.equal(getattr(loaded, name), getattr(gaussians, name)), name
    assert (loaded.backbone, loaded.length_unit) == ("l2m-tiny", "m")
    for field in fields(FeaturePCA):
        assert torch.equal(getattr(loaded.pca, field.name), getattr(gaussians.pca, field.name)), field.name


def test_a_file_from_before_the_metadata_still_loads(tmp_path):
    _random().save(tmp_path / "g.npz")
    arrays, meta = load_npz(tmp_path / "g.npz")
    for name in ("sh_dc", "backbone", "length_unit", "pca"):
        del meta["fields"][name]
    save_npz(tmp_path / "old.npz", arrays, meta)
    loaded = Gaussians.load(tmp_path / "old.npz")
    assert torch.equal(loaded.features, _random().features)
    assert loaded.pca is None and loaded.sh_dc is None and loaded.backbone is None


def test_huge_values_are_finite():
    huge = torch.full((5, 4), 3e38)  # their sum is not
    assert torch.equal(replace(_random(), features=huge).features, huge)
    with pytest.raises(L2MError, match=r"features.*1 of 5 rows"):
        replace(_random(), features=torch.cat([huge[:4], torch.full((1, 4), float("inf"))]))


def test_both_infinities_do_not_cancel():
    features = torch.zeros(5, 4)
    features[0, 0], features[2, 1] = float("inf"), -float("inf")
    with pytest.raises(L2MError, match=r"features.*2 of 5 rows"):
        replace(_random(), features=features)


@pytest.mark.parametrize("count", [3, 8, 15, 24])
def test_spherical_harmonics_of_degree_1_to_4(count):
    assert replace(_random(), sh_rest=torch.zeros(5, count, 3)).sh_rest.shape == (5, count, 3)


@pytest.mark.parametrize(
    "shape", [(5, 0, 3), (5, 4, 3), (5, 16, 3), (5, 35, 3), (5, 3, 8), (4, 8, 3), (5, 24)]
)
def test_other_numbers_of_spherical_harmonics(unchecked, shape):
    with pytest.raises(ShapeError, match=r"sh_rest.*3, 8, 15 or 24.*got"):
        replace(_random(), sh_rest=torch.zeros(shape))


def test_a_basis_fits_coordinates_and_inputs():
    basis = _basis(d=6, k=3)
    for width in (1, 2, 3, 6):
        assert replace(_random(features=width), pca=basis).pca is basis
    assert replace(_random(features=None), pca=basis).pca is basis
    for width in (4, 5, 7):
        with pytest.raises(
            ShapeError, match=rf"pca: expected features of 6.*at most 3.*got features of {width}"
        ):
            replace(_random(features=width), pca=basis)


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
    with pytest.raises(ShapeError, match=r"sh_dc.*\(5, 3\).*\(5, 4\)"):
        Gaussians(**good, sh_dc=torch.zeros(5, 4))
    with pytest.raises(L2MError, match="opacities"):
        Gaussians.from_activated(
            good["means"], good["quats"], torch.ones(5, 3), torch.full((5,), 1.5), good["colors"]
        )
    with pytest.raises(L2MError, match="scales"):
        Gaussians.from_activated(
            good["means"], good["quats"], torch.zeros(5, 3), torch.ones(5), good["colors"]
        )
