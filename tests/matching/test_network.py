"""The whole network: the official decoder's numbers, the official names, sizes, symmetry and gradients."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from l2m_viz.encoders.conv_pyramid import ConvPyramidCfg
from l2m_viz.encoders.dinov2 import DinoCfg
from l2m_viz.encoders.vgg import VGG19Cfg
from l2m_viz.matching.attention import AttentionCoarseCfg
from l2m_viz.matching.gp import GPCfg, GPCoarseCfg
from l2m_viz.matching.network import DenseNetwork, NetworkCfg, VGGDinoCfg, official_cfg
from l2m_viz.matching.propagation import PropagationCfg
from l2m_viz.matching.refiner import RefinerCfg
from l2m_viz.matching.transformer_decoder import TransformerCfg
from l2m_viz.matching.weights import official_key

STATE_DICT = Path(__file__).parents[3] / "shared" / "reference" / "l2mpp_state_dict.json"


def tiny_cfg() -> NetworkCfg:
    return NetworkCfg(
        encoder=ConvPyramidCfg(widths=(8, 12, 16, 24), blocks=(1, 1, 1, 1)),
        coarse=AttentionCoarseCfg(stride=16, dim=16, layers=1, heads=2),
        refiners=(
            RefinerCfg(stride=8, displacement_dim=6, radius=2, hidden=16, blocks=1),
            RefinerCfg(stride=4, displacement_dim=4, radius=1, hidden=12, blocks=1),
            RefinerCfg(stride=2, displacement_dim=2, hidden=8, blocks=1),
        ),
        projections=((8, 10), (2, 6)),
    )


def small_official_cfg() -> NetworkCfg:
    """The official architecture at the widths of the golden file's decoder; trainings are tested on it, too."""
    return NetworkCfg(
        encoder=VGGDinoCfg(
            VGG19Cfg(widths=(8, 12, 16, 24), depths=(1, 1, 1, 1)),
            DinoCfg(dim=40, depth=1, num_heads=2, train_side=56),
        ),
        coarse=GPCoarseCfg(gp=GPCfg(dim=20), decoder=TransformerCfg(blocks=2, heads=4), wrap=True),
        refiners=(
            RefinerCfg(stride=14, displacement_dim=10, radius=3, blocks=2, reach=16),
            RefinerCfg(stride=8, displacement_dim=8, radius=2, blocks=2),
            RefinerCfg(stride=4, displacement_dim=6, radius=1, blocks=2),
            RefinerCfg(stride=2, displacement_dim=4, blocks=2),
            RefinerCfg(stride=1, displacement_dim=2, blocks=2),
        ),
        projections=((14, 16), (8, 12), (4, 8), (2, 6), (1, 3)),
    )


class _Given(nn.Module):
    """Stands for the encoder: hands out the feature maps of the golden file.

    All ones stand for the second image, and zeros for the first one: they may come together or one at a time.
    """

    def __init__(self, channels: dict[int, int], maps: dict[int, dict[int, torch.Tensor]]) -> None:
        super().__init__()
        self.channels, self.maps = channels, maps

    def forward(self, images: torch.Tensor) -> dict[int, torch.Tensor]:
        which = images[:, 0, 0, 0].long()
        return {stride: map_[which] for stride, map_ in self.maps[images.shape[-1]].items()}


@pytest.fixture
def official_decoder(golden):
    """Our network with the weights, and fed with the features, of the official decoder."""
    arrays = golden("decoder")
    meta = json.loads(str(arrays.pop("meta")))
    official = {key: torch.from_numpy(array) for key, array in arrays.items()}
    network = DenseNetwork(small_official_cfg()).eval()
    maps = {
        width: {
            14 if label == 16 else label: official[f"in.{phase}.{label}"]
            for label in (16, 8, 4, 2, 1)
            if f"in.{phase}.{label}" in official
        }
        for phase, width in (("coarse", 84), ("fine", 160))
    }
    network.encoder = _Given(network.encoder.channels, maps)
    names = {official_key(name): name for name in network.state_dict()}
    weights = {names[f"decoder.{key[2:]}"]: value for key, value in official.items() if key.startswith("w.")}
    network.load_state_dict(weights)
    return network, official, meta


@pytest.mark.parametrize(
    "grad", [True, False]
)  # without gradients the norms are folded into the convolutions
def test_reproduces_the_official_decoder_in_both_passes(official_decoder, grad):
    network, official, meta = official_decoder
    with torch.set_grad_enabled(grad):
        coarse = network(torch.zeros(1, 3, 56, 84), torch.ones(1, 3, 56, 84))
        start = coarse[0][-1], coarse[1][-1]
        fine = network.upsample(
            torch.zeros(1, 3, 112, 160), torch.ones(1, 3, 112, 160), start, meta["scale_factor"]
        )
    for phase, (there, back) in (("coarse", coarse), ("fine", fine)):
        for a, b in zip(
            there[1:] if phase == "coarse" else there, back[1:] if phase == "coarse" else back, strict=True
        ):
            label = 16 if a.stride == 14 else a.stride
            for i, stage in enumerate((a, b)):
                flow, logit = (
                    official[f"out.{phase}.{label}.{name}"][i : i + 1] for name in ("flow", "certainty")
                )
                torch.testing.assert_close(stage.warp, flow, atol=1e-4, rtol=0)
                torch.testing.assert_close(stage.certainty_logit, logit, atol=1e-4, rtol=1e-4)


def test_full_size_has_the_official_names_and_shapes():
    if not STATE_DICT.is_file():
        pytest.skip(f"the official network's names are not here: {STATE_DICT}")
    official = json.loads(STATE_DICT.read_text())
    with torch.device("meta"):
        network = DenseNetwork(official_cfg())
    own = {official_key(name): list(value.shape) for name, value in network.state_dict().items()}
    vit = {f"encoder.vit.{name}": shape for name, shape in official["dinov2_vitl14"].items()}
    expected = official["matcher"] | vit
    assert own == expected


@pytest.mark.parametrize("cfg", [tiny_cfg(), small_official_cfg()], ids=["tiny", "official"])
def test_images_of_one_size_give_the_same_stacked_or_apart(cfg):
    """B beside A in a batch, or with one more column so that the directions run apart and the column is cut off."""
    torch.manual_seed(0)
    network = DenseNetwork(cfg).eval()
    image_A, image_B = torch.rand(2, 3, 56 * 2, 56 * 3), torch.rand(2, 3, 56 * 2, 56 * 3)
    with torch.no_grad():
        there, back = network(image_A, image_B)
        features_A, features_B = (network._project(network.encode(image)) for image in (image_A, image_B))
        start = network.coarse(features_A, features_B)
        apart = network.refine(
            features_B, features_A, start[1].warp, start[1].certainty_logit, (112, 168),
            strides=[refiner.stride for refiner in cfg.refiners],
        )  # fmt: skip
    for stacked, alone in zip(back[1:], apart, strict=True):
        torch.testing.assert_close(stacked.warp, alone.warp, atol=1e-5, rtol=0)
        torch.testing.assert_close(stacked.certainty_logit, alone.certainty_logit, atol=1e-4, rtol=1e-4)
    assert len(there) == len(back)


@pytest.mark.parametrize("cfg", [tiny_cfg(), small_official_cfg()], ids=["tiny", "official"])
@pytest.mark.parametrize("hw_B", [(112, 168), (56 * 2, 56 * 4)])
def test_swapping_the_images_swaps_the_directions(cfg, hw_B):
    torch.manual_seed(0)
    network = DenseNetwork(cfg).eval()
    image_A, image_B = torch.rand(1, 3, 112, 168), torch.rand(1, 3, *hw_B)
    with torch.no_grad():
        there, back = network(image_A, image_B)
        swapped_there, swapped_back = network(image_B, image_A)
    for stage, twin in zip(there + back, swapped_back + swapped_there, strict=True):
        torch.testing.assert_close(stage.warp, twin.warp, atol=1e-5, rtol=0)
        torch.testing.assert_close(stage.certainty_logit, twin.certainty_logit, atol=1e-4, rtol=1e-4)


def test_stages_tell_how_the_warp_came_about():
    torch.manual_seed(0)
    network = DenseNetwork(tiny_cfg()).eval()
    with torch.no_grad():
        there, back = network(torch.rand(1, 3, 64, 96), torch.rand(1, 3, 96, 80))
    assert [stage.stride for stage in there] == [16, 8, 4, 2]
    assert there[0].anchor_hw == (6, 5)
    assert there[0].anchor_logits.shape == (1, 30, 4, 6)
    assert back[-1].warp.shape == (1, 2, 48, 40)
    for before, stage in pairwise(there):
        resized = nn.functional.interpolate(before.warp, stage.warp.shape[-2:], mode="bilinear")
        torch.testing.assert_close(stage.warp, resized + stage.displacement)


def test_an_output_of_one_moves_the_warp_by_reach_over_eight_pixels():
    torch.manual_seed(0)
    network = DenseNetwork(tiny_cfg()).eval()
    with torch.no_grad():
        for refiner in network.refiners.values():
            refiner.head.weight.zero_()
            refiner.head.bias.copy_(torch.tensor([1.0, -2.0, 0.5]))
        there, _ = network(torch.rand(1, 3, 64, 96), torch.rand(1, 3, 96, 80))
    moved_px = there[1].displacement[0, :, 2, 3] * torch.tensor([80, 96]) / 2  # B is 80 px wide, 96 high
    torch.testing.assert_close(moved_px, torch.tensor([8 / 8, -2 * 8 / 8]))
    raised = there[1].certainty_logit - nn.functional.interpolate(
        there[0].certainty_logit, there[1].warp.shape[-2:], mode="bilinear"
    )
    torch.testing.assert_close(raised, torch.full_like(raised, 0.5))


def test_gradients_stop_between_stages():
    torch.manual_seed(0)
    network = DenseNetwork(tiny_cfg())
    there, _ = network(torch.rand(2, 3, 64, 96), torch.rand(2, 3, 64, 96))
    (there[-1].warp.sum() + there[-1].certainty_logit.square().sum()).backward()
    assert all(parameter.grad is None for parameter in network.coarse.parameters())
    assert all(parameter.grad is None for parameter in network.refiners["8"].parameters())
    assert network.refiners["2"].head.weight.grad.abs().sum() > 0
    assert network.get_parameter("encoder.levels.0.0.0.weight").grad.abs().sum() > 0


def test_every_stage_can_be_trained():
    torch.manual_seed(0)
    network = DenseNetwork(small_official_cfg())
    there, back = network(torch.rand(2, 3, 56, 112), torch.rand(2, 3, 56, 112))
    loss = sum(stage.warp.square().mean() + stage.certainty_logit.square().mean() for stage in there + back)
    loss = loss + there[0].anchor_logits.logsumexp(dim=1).mean()
    loss.backward()
    without = [name for name, p in network.named_parameters() if p.grad is None]
    assert without == ["encoder.vit.mask_token"]
    assert all(np.isfinite(p.grad.norm().item()) for p in network.parameters() if p.grad is not None)


def test_the_refiners_may_see_the_first_pairs_only():
    torch.manual_seed(0)
    network = DenseNetwork(tiny_cfg()).eval()
    images = torch.rand(2, 3, 3, 48, 64)
    with torch.no_grad():
        all_of_them, _ = network(*images)
        coarse, *refined = network(*images, refined=2)[0]
    torch.testing.assert_close(coarse.warp, all_of_them[0].warp)
    for stage, whole in zip(refined, all_of_them[1:], strict=True):
        torch.testing.assert_close(stage.warp, whole.warp[:2], atol=1e-5, rtol=1e-4)


def test_a_warp_is_propagated_in_the_second_pass_only():
    propagation = PropagationCfg(margin=0.0, asking=(0.0, 1.0))
    cfg = tiny_cfg()
    with_it = replace(cfg, refiners=(*cfg.refiners[:2], replace(cfg.refiners[2], propagation=propagation)))
    torch.manual_seed(0)
    plain = DenseNetwork(cfg).eval()
    other = DenseNetwork(with_it).eval()
    other.load_state_dict(plain.state_dict())
    generator = torch.Generator().manual_seed(1)
    image_A, image_B = (torch.rand(1, 3, *hw, generator=generator) for hw in ((64, 96), (48, 80)))
    larger_A, larger_B = (F.interpolate(image, scale_factor=2) for image in (image_A, image_B))
    with torch.no_grad():
        (there, back), (there_too, back_too) = plain(image_A, image_B), other(image_A, image_B)
        for stage, same in zip((*there, *back), (*there_too, *back_too), strict=True):
            assert torch.equal(stage.warp, same.warp)
        ups = [net.upsample(larger_A, larger_B, (there[-1], back[-1]), 2.0) for net in (plain, other)]
    for stages, others in zip(*ups, strict=True):
        assert torch.equal(stages[1].warp, others[1].warp)  # before it
        assert not torch.equal(stages[2].warp, others[2].warp)
        resized = F.interpolate(others[1].warp, others[2].warp.shape[-2:], mode="bilinear")
        torch.testing.assert_close(others[2].warp, resized + others[2].displacement)


def test_in_bfloat16_the_official_decoder_keeps_its_anchors_and_their_warp(official_decoder):
    """An arg-max over near ties may fall on another anchor; where it does not, the warp is the same to 2e-2."""
    network, _, _ = official_decoder
    with torch.no_grad():
        exact = network(torch.zeros(1, 3, 56, 84), torch.ones(1, 3, 56, 84))
        with torch.autocast("cpu", torch.bfloat16):
            fast = network(torch.zeros(1, 3, 56, 84), torch.ones(1, 3, 56, 84))
    for stages, fast_stages in zip(exact, fast, strict=True):
        logits, fast_logits = stages[0].anchor_logits, fast_stages[0].anchor_logits
        assert (fast_logits - logits).norm() / logits.norm() < 2e-2
        kept = logits.argmax(dim=1) == fast_logits.argmax(dim=1)
        assert kept.float().mean() >= 0.9
        for stage, fast_stage in zip(stages[:2], fast_stages[:2], strict=True):  # at the coarse cells
            assert (stage.warp - fast_stage.warp).abs().amax(dim=1)[kept].max() < 2e-2


@pytest.mark.parametrize("wider_B", [0, 16], ids=["stacked", "apart"])
def test_an_iterated_refiner_goes_on_from_where_it_came_to(wider_B):
    torch.manual_seed(0)
    once = DenseNetwork(tiny_cfg()).eval()
    first, *others = tiny_cfg().refiners
    thrice = DenseNetwork(replace(tiny_cfg(), refiners=(replace(first, iterations=3), *others))).eval()
    thrice.load_state_dict(once.state_dict())  # as many parameters
    image_A, image_B = torch.rand(1, 3, 64, 96), torch.rand(1, 3, 64, 96 + wider_B)
    with torch.no_grad():
        for direction, stages in enumerate(thrice(image_A, image_B)):
            assert [stage.stride for stage in stages] == [16, 8, 8, 8, 4, 2]
            images = (image_A, image_B) if direction == 0 else (image_B, image_A)
            maps = [once._project(once.encode(image)) for image in images]
            hw_to = (images[1].shape[-2], images[1].shape[-1])
            for before, after in pairwise(stages):
                (by_hand,) = once.refine(
                    *maps, before.warp, before.certainty_logit, hw_to, strides=[after.stride]
                )
                torch.testing.assert_close(after.warp, by_hand.warp, atol=1e-5, rtol=0)
                torch.testing.assert_close(
                    after.certainty_logit, by_hand.certainty_logit, atol=1e-5, rtol=1e-5
                )
