import numpy as np
import pytest
import torch

from l2m_viz.encoders.conv_pyramid import ConvPyramidCfg
from l2m_viz.errors import ShapeError
from l2m_viz.matching.attention import AttentionCoarseCfg
from l2m_viz.matching.dense import DenseMatcher
from l2m_viz.matching.export import INPUTS, export_onnx
from l2m_viz.matching.network import DenseNetwork, NetworkCfg
from l2m_viz.matching.refiner import RefinerCfg


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    cfg = NetworkCfg(
        encoder=ConvPyramidCfg(widths=(8, 12, 16, 24), blocks=(0, 0, 1, 1)),
        coarse=AttentionCoarseCfg(dim=32, layers=1, heads=2),
        refiners=(RefinerCfg(stride=8, displacement_dim=4, radius=1, hidden=16, blocks=1),),
        projections=((8, 8),),
    )
    return DenseNetwork(cfg).eval()


@pytest.mark.parametrize("hw_B", [(48, 80), (64, 64)])
def test_onnxruntime_says_what_torch_says(network, tmp_path, hw_B, unchecked):
    onnxruntime = pytest.importorskip("onnxruntime")
    hw_A = (48, 80)
    export_onnx(network, tmp_path / "small.onnx", hw_A, hw_B)
    session = onnxruntime.InferenceSession(tmp_path / "small.onnx", providers=["CPUExecutionProvider"])
    draw = torch.Generator().manual_seed(1)
    image_A, image_B = (torch.rand(*hw, 3, generator=draw) for hw in (hw_A, hw_B))
    feeds = {
        name: image.permute(2, 0, 1)[None].numpy()
        for name, image in zip(INPUTS, (image_A, image_B), strict=True)
    }
    found = session.run(None, feeds)
    cfg = DenseMatcher.Cfg(resolution=(48, 48), upsample_resolution=None, keep_aspect=True, attenuate=False)
    match = DenseMatcher("small", network, cfg, "cpu").match(image_A, image_B)
    expected = (match.warp_A_to_B, match.certainty_A_to_B, match.warp_B_to_A, match.certainty_B_to_A)
    if hw_B == hw_A:  # the matcher resizes B to its own short side otherwise
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a[0], b.numpy(), atol=1e-4)
    else:
        assert found[2].shape == (1, 8, 8, 2)
        assert np.isfinite(np.concatenate([a.ravel() for a in found])).all()


def test_sizes_must_fit_the_coarse_stride(network, tmp_path):
    with pytest.raises(ShapeError, match="sides that 16 divides"):
        export_onnx(network, tmp_path / "no.onnx", (50, 80), (48, 80))
    assert not (tmp_path / "no.onnx").exists()
