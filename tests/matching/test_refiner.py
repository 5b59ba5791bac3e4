"""Refiners against the official module's numbers, and what autocast, folding and gradients may change."""

import pytest
import torch
from torch.nn import functional as F

from l2m_viz.geometry import normalized_grid
from l2m_viz.matching.refiner import Refiner, RefinerCfg
from l2m_viz.matching.weights import official_key

HW = (6, 9)


def _inputs(width: int, *leading: int):
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(2, width, *HW, generator=generator) for _ in range(2))
    warp = normalized_grid(HW).permute(2, 0, 1) + 0.2 * torch.randn(2, 2, *HW, generator=generator)
    return a, b, warp


def _random(cfg: RefinerCfg, width: int) -> Refiner:
    """A refiner whose batch norms have seen something."""
    torch.manual_seed(0)
    refiner = Refiner(cfg, width)
    for _ in range(3):
        refiner(*_inputs(width))
    return refiner.eval()


@pytest.mark.parametrize(
    "grad", [True, False]
)  # without gradients the norms are folded into the convolutions
def test_reproduces_the_official_module(golden, grad):
    official = {
        key: torch.from_numpy(array) for key, array in golden("conv_refiner").items() if key != "meta"
    }
    refiner = Refiner(RefinerCfg(stride=8, displacement_dim=6, radius=2, blocks=3), width=8).eval()
    prefix = "decoder.conv_refiner.8."
    names = {official_key(f"refiners.8.{name}").replace(prefix, "w."): name for name in refiner.state_dict()}
    weights = {names[key]: value for key, value in official.items() if key.startswith("w.")}
    refiner.load_state_dict(weights)
    with torch.set_grad_enabled(grad):
        delta, certainty = refiner(official["in.x"], official["in.y"], official["in.flow"], scale_factor=1.5)
    torch.testing.assert_close(delta, official["out.delta"], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(certainty, official["out.certainty"], atol=1e-5, rtol=1e-4)


def test_hidden_width_is_free():
    refiner = _random(RefinerCfg(stride=4, displacement_dim=5, radius=1, hidden=16, blocks=2), 12)
    widths = [refiner.get_parameter(f"blocks.{i}.3.weight").shape[:2] for i in range(3)]
    assert widths == [(16, 12 + 12 + 5 + 9), (16, 16), (16, 16)]
    delta, certainty = refiner(*_inputs(12))
    assert delta.shape == (2, 2, *HW)
    assert certainty.shape == (2, 1, *HW)


def test_bfloat16_is_close_to_float32():
    refiner = _random(RefinerCfg(stride=4, displacement_dim=8, radius=2, blocks=8), 32)
    with torch.no_grad():
        exact = torch.cat(refiner(*_inputs(32)), dim=1)
        with torch.autocast("cpu", torch.bfloat16):
            fast = torch.cat(refiner(*_inputs(32)), dim=1)
    assert fast.dtype == torch.float32
    assert (fast - exact).norm() / exact.norm() < 2e-2


@pytest.mark.parametrize("grad", [True, False])
def test_under_autocast_places_keep_their_digits(grad):
    """On a map of 700 cells bfloat16 coordinates are off by up to a cell; what is sampled there must not be."""
    generator = torch.Generator().manual_seed(3)
    a, b = (torch.randn(1, 8, 5, 700, generator=generator).bfloat16() for _ in range(2))
    warp = normalized_grid((5, 700)).permute(2, 0, 1)[None]
    shifted = warp + torch.tensor([2 / 700, 0.0])[:, None, None]  # by one cell
    refiner = Refiner(RefinerCfg(stride=1, displacement_dim=4), 8)
    with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16):
        for places, expected in ((warp, b), (shifted, F.pad(b, (0, 1))[..., 1:])):
            _, sampled, _ = refiner._inputs(a, b, places, 1.0)
            torch.testing.assert_close(sampled, expected.float(), atol=1e-3, rtol=0)


def test_gradients_reach_every_parameter_and_both_features():
    refiner = Refiner(RefinerCfg(stride=4, displacement_dim=4, radius=1, blocks=1), 6)
    a, b, warp = _inputs(6)
    a.requires_grad_()
    b.requires_grad_()
    delta, certainty = refiner(a, b, warp)
    (delta.square().sum() + certainty.square().sum()).backward()
    assert a.grad.abs().sum() > 0
    assert b.grad.abs().sum() > 0  # as the sampled feature
    # a bias before a batch norm moves nothing
    idle = [name for name, p in refiner.named_parameters() if p.grad is None or not p.grad.abs().sum() > 1e-6]
    assert idle == []


@pytest.mark.parametrize("kernel", [3, 5])
def test_in_bands_is_the_same_as_in_one_go(kernel, monkeypatch):
    """On a CPU without gradients the blocks run a few rows at a time; here one, two, and all but a rest."""
    from l2m_viz.matching import refiner as module

    refiner = _random(
        RefinerCfg(stride=4, displacement_dim=3, radius=1, hidden=7, blocks=2, kernel=kernel), 5
    )
    expected = torch.cat(refiner(*_inputs(5)), dim=1)  # with gradients: in one go
    row_bytes = HW[1] * (5 + 5 + 3 + 9) * 4
    for rows in (0, 1, 2, 4, 100):
        monkeypatch.setattr(module, "_BAND_BYTES", rows * row_bytes)
        with torch.no_grad():
            torch.testing.assert_close(torch.cat(refiner(*_inputs(5)), dim=1), expected, atol=1e-5, rtol=1e-4)


def test_an_exported_refiner_holds_no_kernel_of_ours():
    """Export writes down torch operations; run on other inputs they give what the kernels give."""
    refiner = _random(RefinerCfg(stride=4, displacement_dim=3, radius=1, hidden=7, blocks=1), 5)
    a, b, warp = _inputs(5)
    with torch.no_grad():
        program = torch.export.export(refiner, (b, a, warp.flip(0)))
        exported, own = program.module()(a, b, warp), refiner(a, b, warp)
    for x, y in zip(exported, own, strict=True):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-4)
