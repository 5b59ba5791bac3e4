import pytest
import torch
from torch import nn

from l2m_viz.matching.depthwise import DepthwiseConv2d, convolve


@pytest.mark.parametrize("channels", [1, 8, 19])
def test_value_and_gradients_are_torchs(channels):
    torch.manual_seed(0)
    ours = DepthwiseConv2d(channels, 5)
    theirs = nn.Conv2d(channels, channels, 5, padding=2, groups=channels)
    theirs.load_state_dict(ours.state_dict())
    found = []
    for conv in (ours, theirs):
        x = torch.linspace(-1, 1, 2 * channels * 7 * 11).sin().reshape(2, channels, 7, 11).requires_grad_()
        y = conv(x)
        (y * torch.arange(y.numel()).cos().reshape(y.shape)).sum().backward()
        found.append((y, x.grad, conv.weight.grad, conv.bias.grad))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_under_autocast_it_is_bfloat16_within_its_digits():
    torch.manual_seed(0)
    conv = DepthwiseConv2d(16, 5)
    x = torch.randn(1, 16, 9, 12, requires_grad=True)
    conv(x).square().sum().backward()
    exact = conv.weight.grad.clone()
    conv.weight.grad = None
    with torch.autocast("cpu", torch.bfloat16):
        y = conv(x)
    y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(conv.weight.grad, exact, atol=0.02 * exact.abs().max().item(), rtol=0)


def test_a_frozen_input_gets_no_gradient():
    conv = DepthwiseConv2d(4, 5)
    conv(torch.ones(1, 4, 6, 8)).sum().backward()
    # All-ones input: every tap's gradient is the number of places where it stays on the 6x8 map.
    counts = torch.tensor([4, 5, 6, 5, 4.0])[:, None] * torch.tensor([6, 7, 8, 7, 6.0])
    torch.testing.assert_close(conv.weight.grad, counts.expand(4, 1, 5, 5))


@pytest.mark.parametrize("hw", [(1, 1), (2, 3), (5, 6), (9, 21)])
@pytest.mark.parametrize("channels", [3, 8, 72, 77])
def test_any_rows_of_any_map(hw, channels):
    """Narrower than the kernel and wider than what is made at once, whole vectors or not, some rows only."""
    generator = torch.Generator().manual_seed(0)
    source, weight = (
        torch.randn(shape, generator=generator) for shape in ((2, *hw, channels), (channels, 1, 5, 5))
    )
    bias = torch.linspace(-1, 1, channels)
    whole = nn.functional.conv2d(
        source.permute(0, 3, 1, 2).double(), weight.double(), bias.double(), padding=2, groups=channels
    ).permute(0, 2, 3, 1)
    for first in {0, hw[0] // 2}:
        for relu in (False, True):
            out = torch.empty(2, hw[0] - first, hw[1], channels)
            convolve(source, first, weight, bias, out, relu=relu)
            expected = whole[:, first:].clamp(min=0) if relu else whole[:, first:]
            torch.testing.assert_close(out.double(), expected, atol=1e-4, rtol=0)


def test_nan_reaches_its_neighbourhood_and_is_not_rectified_away():
    source = torch.zeros(1, 9, 12, 8)
    source[0, 4, 5] = torch.nan
    out = torch.empty_like(source)
    convolve(source, 0, torch.ones(8, 1, 5, 5), None, out, relu=True)
    near = torch.zeros(9, 12, dtype=torch.bool)
    near[2:7, 3:8] = True
    assert torch.equal(out[0].isnan().all(dim=-1), near)
