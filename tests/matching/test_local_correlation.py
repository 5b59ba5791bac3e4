"""Local correlation against sampling the features, against the official module's numbers, and its gradient."""

import pytest
import torch
import torch.nn.functional as F

from l2m_viz.geometry import normalized_grid
from l2m_viz.matching.local_correlation import _correlate_in_torch, _CorrelateInTorch, local_correlation


def _by_sampling(features_A, features_B, warp, radius):
    """The definition: sample every channel of B at every place of every window."""
    h, w = features_B.shape[-2:]
    places = []
    for dy in range(-radius, radius + 1):
        for dx in range(-radius, radius + 1):
            step = torch.tensor([2 * dx / w, 2 * dy / h], dtype=warp.dtype)
            sampled = F.grid_sample(features_B, warp.permute(0, 2, 3, 1) + step, align_corners=False)
            places.append((features_A * sampled).sum(dim=1) / features_A.shape[1] ** 0.5)
    return torch.stack(places, dim=1)


def _inputs(hw_A=(5, 8), hw_B=(7, 6), channels=12, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=dtype)  # noqa: E731
    # half of the targets are outside, some so far that the whole window is
    return draw(2, channels, *hw_A), draw(2, channels, *hw_B), 1.5 * draw(2, 2, *hw_A)


@pytest.mark.parametrize("radius", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # the kernel, and torch operations
def test_equals_sampling_every_channel(radius, dtype):
    features_A, features_B, warp = _inputs(dtype=dtype)
    result = local_correlation(features_A, features_B, warp, radius)
    expected = _by_sampling(features_A, features_B, warp, radius)
    assert result.dtype == dtype
    torch.testing.assert_close(result, expected, atol=2e-6, rtol=1e-5)


def test_reproduces_the_official_module(golden):
    official = {
        name: torch.from_numpy(array) for name, array in golden("local_correlation").items() if name != "meta"
    }
    result = local_correlation(
        official["in.feature0"], official["in.feature1"], official["in.flow"], radius=2
    )
    torch.testing.assert_close(result, official["out.corr"], atol=1e-5, rtol=0)


def test_identity_warp_has_each_pixels_own_norm_in_the_middle():
    features, _, _ = _inputs()
    warp = normalized_grid((5, 8)).permute(2, 0, 1).expand(2, 2, 5, 8)
    middle = local_correlation(features, features, warp, 2)[:, 12]
    torch.testing.assert_close(middle, features.square().sum(dim=1) / 12**0.5)


def test_targets_that_are_nowhere_are_zero():
    features_A, features_B, warp = _inputs()
    warp[:, :, 0] = torch.nan
    warp[:, :, 1] = torch.inf
    warp[:, :, 2] = -1e30
    for result in (
        local_correlation(features_A, features_B, warp, 1),
        local_correlation(features_A.double(), features_B.double(), warp.double(), 1),
    ):
        assert (result[:, :, :3] == 0).all()
        assert (result[:, :, 3:] != 0).any()


def test_half_precision_features_are_summed_in_float32():
    features_A, features_B, warp = _inputs(channels=512)
    half_A, half_B = features_A.bfloat16(), features_B.bfloat16()
    result = local_correlation(half_A, half_B, warp, 1)
    torch.testing.assert_close(
        result, _by_sampling(half_A.float(), half_B.float(), warp, 1), atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradient_reaches_the_features_of_A_only(dtype):
    features_A, features_B, warp = (x.requires_grad_() for x in _inputs(dtype=dtype))
    weight = torch.randn(2, 9, 5, 8, dtype=dtype, generator=torch.Generator().manual_seed(4))
    (local_correlation(features_A, features_B, warp, 1) * weight).sum().backward()
    assert features_B.grad is None
    assert warp.grad is None
    mine, features_A.grad = features_A.grad, None
    (_by_sampling(features_A, features_B.detach(), warp.detach(), 1) * weight).sum().backward()
    torch.testing.assert_close(mine, features_A.grad, atol=1e-5, rtol=1e-5)


def test_both_forms_agree():
    features_A, features_B, warp = _inputs(channels=33)
    targets = (warp.permute(0, 2, 3, 1) + 1) / 2 * torch.tensor([6.0, 7.0]) - 0.5
    expected = _correlate_in_torch(features_A, features_B, targets, 2).permute(0, 3, 1, 2)
    torch.testing.assert_close(
        local_correlation(features_A, features_B, warp, 2), expected, atol=1e-5, rtol=1e-5
    )


def test_any_number_of_cells_at_a_time_is_the_same(monkeypatch):
    features_A, features_B, warp = _inputs(dtype=torch.float64)
    weight = torch.randn(2, 25, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    results = []
    for cells in (10**6, 7):
        monkeypatch.setattr("l2m_viz.matching.local_correlation._MAX_CELLS", cells)
        leaf = features_A.clone().requires_grad_()
        result = local_correlation(leaf, features_B, warp, 2)
        (result * weight).sum().backward()
        results.append((result.detach(), leaf.grad))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("traced", [False, True])
def test_autocast_does_not_reach_the_sums(monkeypatch, traced):
    """The form that GPUs and compilers take, here on the CPU: products in bfloat16 would have three digits."""
    features_A, features_B, warp = _inputs(channels=64)
    expected = _by_sampling(features_A, features_B, warp, 2)
    monkeypatch.setattr("l2m_viz.matching.local_correlation.is_traced", lambda: traced)
    if not traced:  # the CPU's kernel steps aside
        monkeypatch.setattr("l2m_viz.matching.local_correlation._Correlate", _CorrelateInTorch)
    leaf = features_A.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        result = local_correlation(leaf, features_B, warp, 2)
    result.sum().backward()
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)
    exact = features_A.clone().requires_grad_()
    _by_sampling(exact, features_B, warp, 2).sum().backward()
    torch.testing.assert_close(leaf.grad, exact.grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("batch", "hw_A"), [(0, (5, 8)), (1, (0, 8))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_cells_the_result_is_empty(batch, hw_A, dtype):
    features_A, warp = torch.zeros(batch, 12, *hw_A, dtype=dtype), torch.zeros(batch, 2, *hw_A, dtype=dtype)
    result = local_correlation(features_A, torch.zeros(batch, 12, 7, 6, dtype=dtype), warp, 1)
    assert result.shape == (batch, 9, *hw_A)


@pytest.mark.gpu
def test_a_gpu_gives_the_same_values_and_gradients():
    features_A, features_B, warp = _inputs(channels=64)
    results = []
    for device in ("cpu", "cuda"):
        leaf = features_A.to(device).requires_grad_()
        result = local_correlation(leaf, features_B.to(device), warp.to(device), 3)
        result.square().sum().backward()
        results.append((result.detach().cpu(), leaf.grad.cpu()))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
