"""The Gaussian process against the official module, the textbook formula, and cases with a known answer."""

import math

import pytest
import torch

from l2m_viz.geometry import normalized_grid
from l2m_viz.matching.gp import GaussianProcess, GPCfg, GPCoarse, GPCoarseCfg
from l2m_viz.matching.transformer_decoder import TransformerCfg


def _features(*hw_pairs, channels=16):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, channels, *hw, generator=generator) for hw in hw_pairs]


def test_reproduces_the_official_module(golden):
    official = {key: torch.from_numpy(array) for key, array in golden("gp").items() if key != "meta"}
    gp = GaussianProcess(GPCfg(dim=24, temperature=0.2, noise=0.1))
    gp.load_state_dict({key[2:]: value for key, value in official.items() if key.startswith("w.")})
    mean_A, _ = gp(official["in.x"], official["in.y"])
    torch.testing.assert_close(mean_A, official["out.mu"], atol=1e-4, rtol=0)


def test_is_the_posterior_mean_in_double_precision_by_an_explicit_inverse():
    torch.manual_seed(0)
    x_map, y_map = _features((4, 6), (5, 3))
    gp = GaussianProcess(GPCfg(dim=8))
    mean_A, mean_B = gp(x_map, y_map)
    x, y = (m.double().flatten(2).transpose(1, 2) for m in (x_map, y_map))
    weight, bias = gp.pos_conv.weight.double()[:, :, 0, 0], gp.pos_conv.bias.double()

    def posterior(x, y, hw):
        def kernel(a, b):
            return torch.exp((torch.cosine_similarity(a[:, :, None], b[:, None], dim=-1) - 1) / 0.2)

        f = torch.cos(8 * math.pi * (normalized_grid(hw).reshape(-1, 2).double() @ weight.T + bias))
        inverse = torch.linalg.inv(kernel(y, y) + 0.1 * torch.eye(y.shape[1]))
        return (kernel(x, y) @ inverse @ f).transpose(1, 2)

    torch.testing.assert_close(mean_A.flatten(2).double(), posterior(x, y, (5, 3)), atol=1e-4, rtol=0)
    torch.testing.assert_close(mean_B.flatten(2).double(), posterior(y, x, (4, 6)), atol=1e-4, rtol=0)


def test_a_feature_of_zeros_and_equal_features_are_finite():
    torch.manual_seed(0)
    x, y = _features((4, 6), (4, 6))
    x[:, :, 0] = 0
    y[:] = y[:, :, :1, :1]  # a kernel of ones: singular but for the noise
    for mean in GaussianProcess(GPCfg(dim=8))(x, y):
        assert torch.isfinite(mean).all()


def test_under_autocast_it_stays_in_float32():
    torch.manual_seed(0)
    x, y = _features((4, 6), (5, 3))
    gp = GaussianProcess(GPCfg(dim=8))
    with torch.autocast("cpu", torch.bfloat16):
        mean, _ = gp(x, y)
    torch.testing.assert_close(mean, gp(x, y)[0], atol=0, rtol=0)


@pytest.mark.parametrize("hw_B", [(4, 6), (5, 3)])
def test_both_directions_are_what_each_gives_alone(hw_B):
    torch.manual_seed(0)
    cfg = GPCoarseCfg(gp=GPCfg(dim=8), decoder=TransformerCfg(blocks=1, heads=2), anchor_hw=(7, 9))
    coarse = GPCoarse(cfg, 16).eval()
    a, b = _features((4, 6), hw_B)
    there, back = coarse({14: a}, {14: b})
    back_alone, there_alone = coarse({14: b}, {14: a})
    for stage, alone in ((there, there_alone), (back, back_alone)):
        torch.testing.assert_close(stage.anchor_logits, alone.anchor_logits, atol=1e-4, rtol=1e-4)
        assert stage.warp.abs().max() < 1
    assert there.anchor_logits.shape == (2, 63, 4, 6)
    assert back.certainty_logit.shape == (2, 1, *hw_B)
