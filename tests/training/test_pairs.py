"""Pairs from single photos: exact where they say so, and the same again from their seed."""

import pytest
import torch

from l2m_viz.data import load_sample
from l2m_viz.errors import L2MError
from l2m_viz.geometry import (
    project,
    sample_image,
    sample_warp,
    to_normalized,
    transform_points,
    unproject_depth,
)
from l2m_viz.lifting import estimate_depth
from l2m_viz.training import Pair, PairCfg, make_pair

HW = (96, 128)


@pytest.fixture(scope="module")
def photo():
    return load_sample("coffee").image_A


@pytest.fixture(scope="module", params=range(3))
def pair(photo, request):
    return make_pair(photo, PairCfg(hw=HW, difficulty=0.7), seed=request.param)


def test_the_warp_is_the_projection_of_the_depth(pair):
    points = transform_points(pair.T_A_to_B, unproject_depth(pair.depth_A, pair.K_A))
    expected = to_normalized(project(points, pair.K_B)[0], HW)
    seen = pair.covisibility_A_to_B
    torch.testing.assert_close(pair.warp_A_to_B[seen], expected[seen], atol=1e-4, rtol=0)


def test_covisible_points_look_alike_and_come_back(pair):
    seen = pair.covisibility_A_to_B
    assert pair.overlap >= 0.15
    error = (sample_image(pair.image_B, pair.warp_A_to_B) - pair.image_A).abs().mean(dim=-1)[seen]
    assert error.median() < 0.02
    there = pair.warp_A_to_B[seen]
    both = sample_image(pair.covisibility_B_to_A.float(), there) > 0.999
    back = sample_warp(pair.warp_B_to_A, there)[both]
    here = to_normalized(
        torch.stack(
            torch.meshgrid(torch.arange(HW[1]) + 0.5, torch.arange(HW[0]) + 0.5, indexing="xy"), dim=-1
        ),
        HW,
    )[seen][both]
    error_px = (back - here).norm(dim=-1) * HW[1] / 2
    assert both.float().mean() > 0.8 and error_px.median() < 0.05


def test_holes_and_what_is_unknown_are_never_covisible(pair):
    assert not (pair.covisibility_A_to_B & ~pair.valid_A).any()
    assert not (pair.covisibility_B_to_A & pair.hole_mask_B).any()
    landed = sample_image(pair.hole_mask_B.float(), pair.warp_A_to_B, mode="nearest")[
        pair.covisibility_A_to_B
    ]
    assert landed.mean() < 0.01  # bilinear depth may vouch for a point whose nearest sample is a hole


def test_a_seed_makes_the_same_pair_again(photo, tmp_path):
    cfg = PairCfg(hw=HW, holes="background")
    other = load_sample("rocket").image_A
    first = make_pair(photo, cfg, torch.Generator().manual_seed(5), background=other)
    again = make_pair(photo, cfg, seed=first.seed, background=other)
    assert torch.equal(first.image_B, again.image_B) and torch.equal(first.warp_A_to_B, again.warp_A_to_B)
    assert (first.inpainted_mask_B == first.hole_mask_B).all() and first.hole_mask_B.any()
    first.save(tmp_path / "pair.npz")
    assert torch.equal(Pair.load(tmp_path / "pair.npz").warp_B_to_A, first.warp_B_to_A)


def test_difficulty_moves_the_camera(photo):
    moves = []
    for difficulty in (0.0, 0.3, 1.0):
        pairs = [make_pair(photo, PairCfg(hw=HW, difficulty=difficulty), seed=seed) for seed in range(4)]
        moves.append(sum(pair.T_A_to_B[:3, 3].norm().item() for pair in pairs))
    assert moves[0] == 0 and moves[0] < moves[1] < moves[2]


def test_random_planes_are_random_and_reproducible(photo):
    depths = [
        estimate_depth(photo, "random-planes", generator=torch.Generator().manual_seed(s)).depth
        for s in (0, 0, 1)
    ]
    assert torch.equal(depths[0], depths[1]) and not torch.allclose(depths[0], depths[2])
    assert depths[0].min() >= 1 - 1e-5 and depths[0].max() <= 1 / 0.08 + 1e-3


def test_impossible_settings_are_refused(photo, unchecked):
    with pytest.raises(L2MError, match="difficulty"):
        make_pair(photo, PairCfg(hw=HW, difficulty=-1.0))
    with pytest.raises(L2MError, match="overlap"):
        make_pair(photo, PairCfg(hw=HW, min_overlap=1.1))
