"""The network as a matcher: inputs, sizes, batches, both passes, certainty, stages; networks with random weights."""

import math

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F

from l2m_viz.data.images import to_uint8
from l2m_viz.encoders.conv_pyramid import ConvPyramidCfg
from l2m_viz.encoders.dinov2 import DinoCfg
from l2m_viz.encoders.imagenet import IMAGENET_MEAN, IMAGENET_STD
from l2m_viz.encoders.vgg import VGG19Cfg
from l2m_viz.errors import ShapeError
from l2m_viz.geometry import normalized_grid
from l2m_viz.matching import Match, load_matcher
from l2m_viz.matching.attention import AttentionCoarseCfg
from l2m_viz.matching.dense import DenseMatcher
from l2m_viz.matching.gp import GPCfg, GPCoarseCfg
from l2m_viz.matching.network import DenseNetwork, NetworkCfg, VGGDinoCfg
from l2m_viz.matching.refiner import RefinerCfg
from l2m_viz.matching.transformer_decoder import TransformerCfg

OFFICIAL = NetworkCfg(
    encoder=VGGDinoCfg(
        VGG19Cfg(widths=(4, 6, 8, 10), depths=(1, 1, 1, 1)),
        DinoCfg(dim=12, depth=1, num_heads=2, train_side=56),
    ),
    coarse=GPCoarseCfg(
        gp=GPCfg(dim=12), decoder=TransformerCfg(blocks=1, heads=2), anchor_hw=(8, 8), wrap=True
    ),
    refiners=(
        RefinerCfg(stride=14, displacement_dim=4, radius=1, blocks=1, reach=16),
        RefinerCfg(stride=8, displacement_dim=4, radius=1, blocks=1),
        RefinerCfg(stride=4, displacement_dim=4, blocks=1),
        RefinerCfg(stride=1, displacement_dim=2, blocks=1),
    ),
    projections=((14, 12), (8, 8), (1, 3)),
)
TINY = NetworkCfg(
    encoder=ConvPyramidCfg(widths=(8, 12, 16, 24), blocks=(1, 1, 1, 1)),
    coarse=AttentionCoarseCfg(stride=16, dim=16, layers=1, heads=2),
    refiners=(
        RefinerCfg(stride=8, displacement_dim=6, radius=2, hidden=16, blocks=1),
        RefinerCfg(stride=2, displacement_dim=2, hidden=8, blocks=1),
    ),
)


def _network(cfg: NetworkCfg, seed: int = 0) -> DenseNetwork:
    torch.manual_seed(seed)
    network = DenseNetwork(cfg)
    for refiner in network.refiners.values():  # moves of a few pixels, logits of both signs
        refiner.head.weight.data.mul_(20)
    return network


@pytest.fixture(scope="module")
def official():
    return DenseMatcher("o", _network(OFFICIAL), DenseMatcher.Cfg((56, 112), (72, 120)), "cpu")


@pytest.fixture(scope="module")
def tiny():
    cfg = DenseMatcher.Cfg((64, 64), None, keep_aspect=True, attenuate=False, batch_size=3)
    return DenseMatcher("t", _network(TINY), cfg, "cpu")


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(5)
    return [torch.rand(*hw, 3, generator=generator) for hw in ((60, 110), (90, 70))]


def _assert_equal(match: Match, other: Match, atol: float = 1e-4):
    for name in ("warp_A_to_B", "certainty_A_to_B", "warp_B_to_A", "certainty_B_to_A"):
        torch.testing.assert_close(getattr(match, name), getattr(other, name), atol=atol, rtol=0)
    assert (match.hw_A, match.hw_B) == (other.hw_A, other.hw_B)


def test_both_passes_end_at_the_second_resolution(official, images):
    match = official.match(*images)
    assert match.warp_A_to_B.shape == match.warp_B_to_A.shape == (72, 120, 2)
    assert (match.hw_A, match.hw_B, match.matcher) == ((60, 110), (90, 70), "o")
    assert match.stages == ()
    assert match.warp_A_to_B.abs().max() <= 1
    assert 0 < match.certainty_A_to_B.max() <= 1


def test_tiny_keeps_the_aspect_and_takes_the_shorter_side(tiny, images):
    match = tiny.match(*images)
    assert match.warp_A_to_B.shape == (32, 56, 2)  # 64x112 px: 60x110 enlarged by 64/60, in steps of 16
    assert match.warp_B_to_A.shape == (40, 32, 2)  # 80x64 px


@pytest.mark.parametrize("name", ["official", "tiny"])
def test_paths_pil_arrays_and_tensors_are_the_same(name, request, images, tmp_path):
    matcher = request.getfixturevalue(name)
    array_A, array_B = (to_uint8(image) for image in images)
    expected = matcher.match(torch.from_numpy(array_A), torch.from_numpy(array_B))
    path = tmp_path / "a.png"
    PIL.Image.fromarray(array_A).save(path)
    for same in (array_A, PIL.Image.fromarray(array_A), path, str(path), path.read_bytes()):
        _assert_equal(matcher.match(same, array_B), expected, atol=0)


@pytest.mark.parametrize("name", ["official", "tiny"])
def test_a_list_gives_what_one_at_a_time_gives(name, request, images):
    matcher = request.getfixturevalue(name)
    a, b = images
    several = [(a, b), (a, b.flip(0)), (b, a), (b, b), (a.flip(1), b)]  # sizes change within a batch of three
    matches = matcher.match([pair[0] for pair in several], [pair[1] for pair in several])
    assert len(matches) == 5
    for match, pair in zip(matches, several, strict=True):
        _assert_equal(match, matcher.match(*pair))


def test_pairs_that_differ_in_the_second_pass_only_are_not_stacked(tiny):
    cfg = DenseMatcher.Cfg((64, 64), (160, 160), keep_aspect=True, batch_size=2)
    matcher = DenseMatcher("t", tiny.network, cfg, "cpu")
    b = torch.rand(64, 80, 3, generator=torch.Generator().manual_seed(0))
    wide, wider = (
        b.new_ones(64, 110, 3) * 0.5,
        b.new_ones(64, 118, 3) * 0.5,
    )  # 64x112 both; 160x272 and 160x288
    matches = matcher.match([wide, wider], [b, b])
    assert [match.warp_A_to_B.shape for match in matches] == [(80, 136, 2), (80, 144, 2)]
    _assert_equal(matches[1], matcher.match(wider, b))


@pytest.mark.parametrize("name", ["official", "tiny"])
def test_swapping_the_images_swaps_the_directions(name, request, images):
    matcher = request.getfixturevalue(name)
    match, swapped = matcher.match(*images), matcher.match(*images[::-1])
    torch.testing.assert_close(match.warp_A_to_B, swapped.warp_B_to_A, atol=1e-4, rtol=0)
    torch.testing.assert_close(match.certainty_B_to_A, swapped.certainty_A_to_B, atol=1e-4, rtol=0)


def test_query_at_the_grid_is_the_warp(tiny, images):
    match = tiny.match(*images)
    grid_px = (normalized_grid((32, 56)) + 1) / 2 * torch.tensor([110.0, 60.0])
    points, _ = match.query(grid_px)
    torch.testing.assert_close(
        2 * points / torch.tensor([70.0, 90.0]) - 1, match.warp_A_to_B, atol=1e-4, rtol=0
    )


def test_certainty_is_attenuated_as_in_the_official_code(official, images):
    """final logit - 0.5 * the coarse logit where that is negative; 0 where the warp leaves the image."""
    batch = official._batch([tuple(images)], (56, 112))
    larger = official._batch([tuple(images)], (72, 120))
    with torch.no_grad():
        there, back = official.network(*batch)
        there_up, _ = official.network.upsample(
            *larger, (there[-1], back[-1]), math.sqrt(72 * 120 / (56 * 112))
        )
    low = F.interpolate(there[1].certainty_logit, (72, 120), mode="bilinear", align_corners=False)
    low = 0.5 * low * (low < 0)
    expected = (there_up[-1].certainty_logit - low).sigmoid()[0, 0]
    outside = (there_up[-1].warp[0].abs() > 1).any(dim=0)
    expected[outside] = 0
    match = official.match(*images)
    torch.testing.assert_close(match.certainty_A_to_B, expected, atol=1e-5, rtol=0)
    assert low.min() < 0  # there was something to attenuate,
    assert 0 < outside.float().mean() < 1  # and something outside
    without = DenseMatcher(
        "o", official.network, DenseMatcher.Cfg((56, 112), (72, 120), attenuate=False), "cpu"
    )
    assert (match.certainty_A_to_B >= without.match(*images).certainty_A_to_B - 1e-6).all()


def test_images_reach_the_network_as_pillow_resizes_them(official, images):
    """The official code resizes 8-bit pictures with Pillow, bicubically."""
    array = to_uint8(images[0])
    pillow = np.asarray(PIL.Image.fromarray(array).resize((40, 28), PIL.Image.Resampling.BICUBIC)) / 255
    cfg = DenseMatcher.Cfg((28, 40), None)
    ours = official._prepare(torch.from_numpy(array).float() / 255, cfg.resolution)[0].permute(1, 2, 0)
    assert np.abs(ours.numpy() - pillow).max() < 1.01 / 255  # Pillow rounds twice


def test_normalisation_is_part_of_the_settings(images):
    cfg = DenseMatcher.Cfg((56, 112), None, imagenet_normalised=True)
    matcher = DenseMatcher("o", _network(OFFICIAL), cfg, "cpu")
    plain = DenseMatcher("o", matcher.network, DenseMatcher.Cfg((56, 112), None), "cpu")
    expected = (
        plain._prepare(images[0], (56, 112))[0].permute(1, 2, 0) - torch.tensor(IMAGENET_MEAN)
    ) / torch.tensor(IMAGENET_STD)
    torch.testing.assert_close(matcher._prepare(images[0], (56, 112))[0].permute(1, 2, 0), expected)


def test_stages_hold_what_led_to_the_match(official, tiny, images):
    match = official.match(*images, stages=True)
    assert [stage.stride for stage in match.stages] == [14, 14, 8, 4, 1, 8, 4, 1]
    coarse = match.stages[0]
    assert coarse.anchor_probs.shape == (4, 8, 8, 8)
    torch.testing.assert_close(coarse.anchor_probs.sum(dim=(-1, -2)), torch.ones(4, 8))
    assert coarse.displacement is None
    assert match.stages[1].anchor_probs is None
    assert match.stages[1].displacement.shape == (4, 8, 2)
    torch.testing.assert_close(match.stages[-1].warp_A_to_B.clamp(-1, 1), match.warp_A_to_B)
    last = tiny.match(*images, stages=True)
    assert last.stages[0].anchor_probs_B_to_A.shape == (5, 4, 4, 7)  # 80x64 px in B, 64x112 in A
    inside = (last.stages[-1].warp_B_to_A.abs() <= 1).all(dim=-1)
    torch.testing.assert_close(last.stages[-1].certainty_B_to_A[inside], last.certainty_B_to_A[inside])


def test_stages_are_not_saved(official, images, tmp_path):
    match = official.match(*images, stages=True)
    match.save(tmp_path / "m.npz")
    loaded = Match.load(tmp_path / "m.npz")
    _assert_equal(loaded, match, atol=0)
    assert loaded.stages == Match.from_bytes(match.to_bytes(), "m").stages == ()


def test_bfloat16_is_close(images):
    network = _network(OFFICIAL)
    exact = DenseMatcher("o", network, DenseMatcher.Cfg((56, 112), None), "cpu").match(*images, stages=True)
    cfg = DenseMatcher.Cfg((56, 112), None, precision="bfloat16")
    fast = DenseMatcher("o", network, cfg, "cpu").match(*images, stages=True)
    assert fast.warp_A_to_B.dtype == torch.float32
    probs, fast_probs = exact.stages[0].anchor_probs, fast.stages[0].anchor_probs
    assert (fast_probs - probs).norm() / probs.norm() < 2e-2


def test_resolutions_that_cannot_be_say_so():
    with pytest.raises(ShapeError, match="multiples of 14"):
        DenseMatcher("o", _network(OFFICIAL), DenseMatcher.Cfg((60, 112)), "cpu")
    with pytest.raises(ShapeError, match="at least 14"):
        DenseMatcher("o", _network(OFFICIAL), DenseMatcher.Cfg((56, 112), (8, 120)), "cpu")


def test_an_image_of_one_colour_shows_nothing(images):
    """l2m-tiny itself: its certainty is about what looks alike, and any two blank places do."""
    shipped = load_matcher("l2m-tiny", "cpu", resolution=(64, 64), upsample_resolution=(96, 96))
    grey, white = torch.full((60, 90, 3), 0.5), torch.ones(40, 70, 3)
    for pair in ((grey, grey), (grey, white), (images[0], white), (white, images[0])):
        match = shipped.match(*pair)
        assert match.overlap == 0
        assert len(match.sample(100)) == 0
    both = shipped.match([grey, images[0]], [grey, images[0]])  # in one batch
    assert both[0].overlap == 0
    assert both[1].overlap > 0.5
