import math

import pytest
import torch
from torch import nn

from l2m_viz.encoders.linear import affine, linear, packed


@pytest.mark.parametrize("shape", [(5, 24), (2, 3, 24), (1, 24), (0, 24)])
@pytest.mark.parametrize("features", [16, 19])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("onednn", [True, False])  # a build of torch without it takes the other way
def test_it_is_the_layer(monkeypatch, shape, features, bias, onednn):
    if not onednn:
        monkeypatch.setattr("l2m_viz.encoders.linear._HAS_ONEDNN", False)
    torch.manual_seed(0)
    layer, x = nn.Linear(24, features, bias=bias), torch.randn(shape)
    exact = x.double() @ layer.weight.double().T + (layer.bias.double() if bias else 0)
    with torch.no_grad():
        got = linear(layer, x)
        rows = x.reshape(-1, 24)
        by_blocks = affine(rows, packed(layer.weight, max(1, len(rows))), layer.bias)
    assert got.shape == (*shape[:-1], features)
    torch.testing.assert_close(got.double(), exact, atol=1e-5, rtol=0)
    torch.testing.assert_close(by_blocks.view(got.shape).double(), exact, atol=1e-5, rtol=0)


def test_gelu_is_x_times_the_normal_distribution():
    """By the error function of the C library, from deep in one tail to deep in the other."""
    layer = nn.Linear(8, 8)
    nn.init.eye_(layer.weight)
    nn.init.zeros_(layer.bias)
    values = torch.linspace(-40, 40, 8 * 401).view(-1, 8)
    expected = [[x * 0.5 * math.erfc(-x / math.sqrt(2)) for x in row] for row in values.double().tolist()]
    with torch.no_grad():
        got = linear(layer, values, gelu=True)
    torch.testing.assert_close(
        got.double(), torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=1e-6
    )


def test_what_is_not_finite_stays_so():
    """A network that overflowed must not look sound again."""
    layer = nn.Linear(8, 8)
    nn.init.eye_(layer.weight)
    nn.init.zeros_(layer.bias)
    with torch.no_grad():
        layer.bias[0], layer.bias[1] = torch.nan, torch.inf
        plain, got = linear(layer, torch.ones(3, 8)), linear(layer, torch.ones(3, 8), gelu=True)
    assert plain[:, 0].isnan().all() and (plain[:, 1] == torch.inf).all()
    assert not got[:, :2].isfinite().any() and got[:, 2:].isfinite().all()


def test_gradients_are_torchs():
    torch.manual_seed(0)
    layer, x = nn.Linear(16, 16), torch.randn(3, 16)
    linear(layer, x, gelu=True).sum().backward()
    ours, layer.weight.grad = layer.weight.grad, None
    nn.functional.gelu(layer(x)).sum().backward()
    torch.testing.assert_close(ours, layer.weight.grad)
