"""Gaussians of a photo say what their features are."""

import torch

from l2m_viz.encoders import load_encoder
from l2m_viz.gaussians import read_ply, write_ply
from l2m_viz.geometry import intrinsics
from l2m_viz.lifting import Depth
from l2m_viz.photo import NUM_FEATURES, feature_gaussians

HW = (48, 72)


def _made(kind="metric"):
    image = torch.rand(*HW, 3, generator=torch.Generator().manual_seed(0))
    depth = Depth(torch.full(HW, 2.0), torch.ones(HW, dtype=torch.bool), kind, "made")
    return image, *feature_gaussians(image, depth, intrinsics(60.0, HW))


def test_features_are_coordinates_of_the_named_encoder_in_their_own_basis():
    image, gaussians, pca = _made()
    assert gaussians.backbone == "dense-sift"
    assert gaussians.pca is pca
    assert gaussians.features.shape == (48 * 72, NUM_FEATURES)
    cells = gaussians.pca.project(load_encoder(gaussians.backbone)(image))
    # A cell is 4 px wide: the centre of pixel (10, 6), at (10.5, 6.5) px, is an eighth past that of cell (2, 1).
    above, below = (0.875 * cells[row, 2] + 0.125 * cells[row, 3] for row in (1, 2))
    feature = gaussians.features.reshape(*HW, -1)[6, 10]
    torch.testing.assert_close(feature, 0.875 * above + 0.125 * below, atol=1e-5, rtol=0)


def test_a_ply_of_them_says_so_too(tmp_path):
    for kind, unit in (("metric", "m"), ("relative", "relative")):
        _, gaussians, pca = _made(kind)
        write_ply(gaussians, tmp_path / "g.ply")
        read = read_ply(tmp_path / "g.ply")
        assert (read.backbone, read.length_unit) == ("dense-sift", unit)
        assert torch.equal(read.pca.components, pca.components)
