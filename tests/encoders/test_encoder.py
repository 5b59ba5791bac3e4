"""Encoders tile the image exactly; dense SIFT is judged by OpenCV's SIFT, PCA by algebra."""

import cv2
import numpy as np
import pytest
import torch

from l2m_viz.data import load_sample, to_uint8
from l2m_viz.encoders import FeaturePCA, load_encoder
from l2m_viz.errors import MissingError, ShapeError
from l2m_viz.geometry import sample_image, to_normalized


@pytest.fixture(scope="module")
def photo():
    return load_sample("coffee").image_A[100:260, 200:440].contiguous()


def test_cells_tile_the_image(photo):
    encoder = load_encoder("dense-sift")
    assert encoder(photo).shape == (40, 60, 128)
    assert encoder(photo[:157, :233]).shape == (40, 59, 128)  # resized up to the next multiple of the stride


def test_a_shift_by_one_cell_shifts_the_features(photo):
    encoder = load_encoder("dense-sift")
    a, b = encoder(photo[:, :200]), encoder(photo[:, 4:204])
    torch.testing.assert_close(a[6:-6, 7:-6], b[6:-6, 6:-7], atol=1e-4, rtol=0)


def test_the_cell_centre_is_where_the_contract_says():
    # a pattern that is symmetric about a cell's centre has a descriptor that is symmetric under mirroring
    x = torch.arange(64) + 0.5 - 4 * 7.5  # centre of cell 7 at (7 + 0.5) * 4 px
    blob = torch.exp(-(x[:, None] ** 2 + x[None, :] ** 2) / 50)[..., None].expand(64, 64, 3).contiguous()
    features = load_encoder("dense-sift")(blob[:, :60])[..., :]
    bins = features[7, 7].reshape(8, 4, 4)  # angle, cell y, cell x
    energy = bins.pow(2).sum(0)  # RootSIFT: squares are the histogram
    torch.testing.assert_close(energy, energy.flip(0), atol=1e-3, rtol=0)
    torch.testing.assert_close(energy, energy.flip(1), atol=1e-3, rtol=0)
    torch.testing.assert_close(energy, energy.T, atol=1e-3, rtol=0)


def test_matches_the_same_places_as_opencv_sift(photo):
    """Nearest neighbours of dense descriptors follow a known shift wherever there is texture, as SIFT's do."""
    grey = cv2.cvtColor(to_uint8(photo), cv2.COLOR_RGB2GRAY)
    keypoints = [
        k for k in cv2.SIFT.create(200).detect(grey, None) if 20 < k.pt[0] < 170 and 20 < k.pt[1] < 140
    ]
    points = torch.tensor([k.pt for k in keypoints]) + 0.5
    encoder = load_encoder("dense-sift")
    a, b = encoder(photo[:, :200]), encoder(photo[:, 12:212])
    query = sample_image(a, to_normalized(points, (160, 200)))
    similarity = torch.einsum("nd,hwd->nhw", query, b)
    best = similarity.flatten(1).argmax(1)
    found = torch.stack([best % 50, best // 50], -1) * 4 + 2.0
    error = (found - (points - torch.tensor([12.0, 0.0]))).norm(dim=-1)
    assert (error < 6).float().mean() > 0.9


def test_unknown_names_and_shapes(unchecked):
    with pytest.raises(MissingError, match="dense-sift"):
        load_encoder("dinov9")
    with pytest.raises(ShapeError, match=r"\(H, W, 3\)"):
        load_encoder("dense-sift")(torch.zeros(8, 8))


def test_pca_is_an_orthonormal_basis_that_explains_the_variance():
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(3, 12, generator=generator)
    features = torch.randn(30, 40, 3, generator=generator) @ mixing + 5
    pca = FeaturePCA.fit(features, 3)
    torch.testing.assert_close(pca.components @ pca.components.T, torch.eye(3), atol=1e-5, rtol=0)
    assert pca.explained.sum().item() == pytest.approx(1, abs=1e-4)
    rebuilt = pca.project(features) @ pca.components + pca.mean
    torch.testing.assert_close(rebuilt, features, atol=1e-3, rtol=0)
    singular = (
        np.linalg.svd((features - features.mean((0, 1))).reshape(-1, 12).numpy(), compute_uv=False)[:3] ** 2
    )
    np.testing.assert_allclose(pca.explained.numpy(), singular / singular.sum(), rtol=1e-3)


def test_pca_signs_and_colours_are_fixed():
    features = torch.randn(200, 6, generator=torch.Generator().manual_seed(1)) * torch.tensor(
        [5.0, 4, 3, 2, 1, 0.5]
    )
    pca, again = FeaturePCA.fit(features, 4), FeaturePCA.fit(features.flip(0), 4)
    torch.testing.assert_close(pca.components, again.components, atol=1e-4, rtol=0)
    assert (pca.components.gather(1, pca.components.abs().argmax(1, keepdim=True)) > 0).all()
    colors = pca.colors(pca.project(features))
    assert colors.shape == (200, 3)
    assert ((colors >= 0) & (colors <= 1)).all()
    inside = (colors > 0) & (colors < 1)
    assert (inside.float().mean(0) - 0.98).abs().max() < 0.02


def test_pca_round_trip_and_too_few_rows(tmp_path):
    pca = FeaturePCA.fit(torch.randn(50, 6, generator=torch.Generator().manual_seed(2)), 3)
    pca.save(tmp_path / "pca.npz")
    assert torch.equal(FeaturePCA.load(tmp_path / "pca.npz").components, pca.components)
    with pytest.raises(ShapeError, match="at least 16"):
        FeaturePCA.fit(torch.randn(10, 20), 16)
