"""Gaussians of a photo say what their features are, and those of several encoders can be compared."""

import pytest
import torch

from l2m_viz.encoders import FeaturePCA, load_encoder
from l2m_viz.errors import MissingError
from l2m_viz.gaussians import read_ply, write_ply
from l2m_viz.geometry import intrinsics
from l2m_viz.lifting import Depth
from l2m_viz.photo import ENCODER, NUM_FEATURES, comparable_gaussians, feature_gaussians

HW = (48, 72)
X, Y = 21, 14  # a pixel


def _photo(kind="metric"):
    image = torch.rand(*HW, 3, generator=torch.Generator().manual_seed(0))
    depth = Depth(torch.full(HW, 2.0), torch.ones(HW, dtype=torch.bool), kind, "made")
    return image, depth, intrinsics(60.0, HW)


def _between_cells(cells, stride):
    """What lies at the centre of pixel (X, Y) among cells of ``stride`` px: bilinear, by hand."""
    x, y = (X + 0.5) / stride - 0.5, (Y + 0.5) / stride - 0.5
    (left, right), (above, below) = (int(x), x - int(x)), (int(y), y - int(y))
    rows = [(1 - right) * cells[row, left] + right * cells[row, left + 1] for row in (above, above + 1)]
    return (1 - below) * rows[0] + below * rows[1]


@pytest.mark.parametrize("name", ["l2m-tiny", "l2m-tiny-2d", "dense-sift"])
def test_features_are_coordinates_of_the_named_encoder_in_their_own_basis(name):
    photo = _photo()
    gaussians, pca = feature_gaussians(*photo, name)
    assert gaussians.backbone == name
    assert gaussians.pca is pca
    assert gaussians.features.shape == (48 * 72, NUM_FEATURES)
    encoder = load_encoder(name)
    cells = encoder(photo[0])
    assert torch.equal(pca.components, FeaturePCA.fit(cells, NUM_FEATURES).components)
    feature = gaussians.features.reshape(*HW, -1)[Y, X]
    torch.testing.assert_close(
        feature, pca.project(_between_cells(cells, encoder.stride)), atol=1e-4, rtol=1e-5
    )


def test_the_default_is_the_3d_aware_encoder_of_the_package():
    photo = _photo()
    assert ENCODER == "l2m-tiny"
    default, named = feature_gaussians(*photo)[0], feature_gaussians(*photo, "l2m-tiny")[0]
    assert torch.equal(default.features, named.features)


def test_encoders_of_one_width_share_a_basis_and_others_have_their_own():
    image, depth, K = _photo()
    names = ["dense-sift", "l2m-tiny-2d", "l2m-tiny"]
    made = comparable_gaussians(image, depth, K, names)
    assert list(made) == [made[name].backbone for name in names] == names
    encoders = {name: load_encoder(name) for name in names}
    cells = {name: encoder(image) for name, encoder in encoders.items()}
    both = (cells["l2m-tiny"].mean(dim=(0, 1)) + cells["l2m-tiny-2d"].mean(dim=(0, 1))) / 2
    for name in ("l2m-tiny", "l2m-tiny-2d"):
        torch.testing.assert_close(made[name].pca.mean, both, atol=1e-5, rtol=1e-5)
        expected = made["l2m-tiny"].pca.project(_between_cells(cells[name], encoders[name].stride))
        feature = made[name].features.reshape(*HW, -1)[Y, X]
        torch.testing.assert_close(feature, expected, atol=1e-4, rtol=1e-5)
    alone = feature_gaussians(image, depth, K, "dense-sift")[0]
    assert torch.equal(made["dense-sift"].features, alone.features)
    assert torch.equal(made["dense-sift"].means, made["l2m-tiny"].means)  # the same scene


def test_an_encoder_that_is_none_is_refused_by_name():
    with pytest.raises(MissingError, match=r"no encoder named 'l2m-huge'.*l2m-tiny"):
        feature_gaussians(*_photo(), "l2m-huge")


def test_a_ply_of_them_says_so_too(tmp_path):
    for kind, unit in (("metric", "m"), ("relative", "relative")):
        gaussians, pca = feature_gaussians(*_photo(kind))
        write_ply(gaussians, tmp_path / "g.ply")
        read = read_ply(tmp_path / "g.ply")
        assert (read.backbone, read.length_unit) == ("l2m-tiny", unit)
        assert torch.equal(read.pca.components, pca.components)
