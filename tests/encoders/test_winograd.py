import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from l2m_viz.encoders.folding import conv_norm
from l2m_viz.encoders.winograd import suits_winograd, transform_filters, winograd_conv


def _filled(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _by_sums(x, weight, bias):
    """The convolution from its definition, in float64."""
    padded = np.pad(x.double().numpy(), ((0, 0), (0, 0), (1, 1), (1, 1)))
    height, width = x.shape[-2:]
    taps = (
        np.einsum("dc,bchw->bdhw", weight.double().numpy()[:, :, i, j], padded[:, :, i : i + height, j : j + width])
        for i in range(3)
        for j in range(3)
    )  # fmt: skip
    return sum(taps) + bias.double().numpy()[:, None, None]


@pytest.mark.parametrize("hw", [(1, 1), (3, 5), (4, 8), (13, 7), (40, 57)])
def test_it_is_the_convolution(hw):
    """Sizes that are whole tiles and that are not, one tile and many; to 1e-5 of the largest value."""
    x, weight, bias = _filled(2, 40, *hw), _filled(48, 40, 3, 3, seed=1) / 19, _filled(48, seed=2)
    exact = _by_sums(x, weight, bias)
    got = winograd_conv(x, transform_filters(weight), bias)
    np.testing.assert_allclose(got.numpy(), exact, atol=1e-5 * np.abs(exact).max())
    rectified = winograd_conv(x, transform_filters(weight), bias, relu=True)
    assert torch.equal(rectified, got.clamp(min=0))


def test_constant_maps_give_the_sum_of_the_taps_inside():
    """All ones: 9 taps inside, 6 at an edge, 4 at a corner."""
    ones = torch.ones(1, 32, 6, 9)
    got = winograd_conv(ones, transform_filters(torch.full((32, 32, 3, 3), 1 / 32)), torch.zeros(32))
    inside = torch.ones(6, 9) * 9
    inside[[0, -1]], inside[:, [0, -1]] = 6, 6
    inside[[0, 0, -1, -1], [0, -1, 0, -1]] = 4
    torch.testing.assert_close(got[0], inside.expand(32, 6, 9), atol=1e-4, rtol=0)


def test_nan_stays_where_torch_would_have_it_and_is_not_rectified_away():
    x = torch.zeros(1, 32, 12, 16)
    x[0, 3, 5, 6] = torch.nan
    got = winograd_conv(x, transform_filters(_filled(32, 32, 3, 3)), torch.zeros(32), relu=True)
    assert got[0, 0, 4:7, 5:8].isnan().all()
    assert not got[0, 0, :, 12:].isnan().any()  # beyond its tile nothing is touched


def test_a_layer_and_its_norm_by_either_way():
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(32, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64)
    norm(conv(_filled(4, 32, 8, 12)))  # statistics that are not 0 and 1
    norm.eval()
    x = _filled(1, 32, 9, 14, seed=3)
    expected = F.relu(norm(conv(x))).detach()
    with torch.no_grad():
        assert suits_winograd(x, conv)
        torch.testing.assert_close(conv_norm(x, conv, norm, relu=True), expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(
            conv_norm(x, conv, norm, relu=True), expected, atol=1e-5, rtol=0
        )  # kept filters


@pytest.mark.parametrize("change", ["weight", "data", "statistics", "load", "fused"])
def test_filters_are_made_anew_when_a_parameter_changes(change):
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32).eval()
    x = _filled(1, 32, 8, 12)
    with torch.no_grad():
        before = conv_norm(x, conv, norm)
        if change == "weight":
            conv.weight.mul_(2)
        elif change == "data":
            conv.weight.data.mul_(2)
        elif change == "fused":
            with torch.enable_grad():
                conv_norm(x, conv, norm).square().mean().backward()
            torch.optim.AdamW(conv.parameters(), lr=0.1, fused=True).step()
        elif change == "statistics":
            norm.running_mean.add_(1)
        else:
            conv.load_state_dict({key: value + 1 for key, value in conv.state_dict().items()})
        after = conv_norm(x, conv, norm)
        expected = norm(conv(x))
        torch.testing.assert_close(after, expected, atol=1e-5 * expected.abs().max().item(), rtol=0)
    assert not torch.allclose(before, after)


def test_what_does_not_suit_is_left_to_torch():
    x = _filled(1, 32, 8, 12)
    assert suits_winograd(x, nn.Conv2d(32, 32, 3, padding=1))
    for conv in (
        nn.Conv2d(32, 32, 3, padding=1, stride=2),
        nn.Conv2d(32, 32, 3),
        nn.Conv2d(32, 32, 5, padding=1),
        nn.Conv2d(32, 32, 3, padding=1, groups=2),
        nn.Conv2d(32, 36, 3, padding=1),
        nn.Conv2d(32, 32, 3, padding=1).double(),
    ):
        assert not suits_winograd(x.to(conv.weight.dtype), conv)
    with torch.autocast("cpu", torch.bfloat16):
        assert not suits_winograd(x, nn.Conv2d(32, 32, 3, padding=1))
