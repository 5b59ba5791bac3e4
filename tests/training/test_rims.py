from dataclasses import replace

import pytest
import torch

from l2m_viz.errors import L2MError
from l2m_viz.geometry import normalized_grid, to_pixel
from l2m_viz.training.rims import RimCfg, Rims, sample_rims, with_rims

ALWAYS = RimCfg(share=1.0, same=0.5, black=0.5)


@pytest.fixture
def white_batch(make_batch):
    """Pairs whose images are wholly white, so that every dark pixel is a rim's."""
    batch = make_batch()
    return replace(batch, image_A=torch.ones_like(batch.image_A), image_B=torch.ones_like(batch.image_B))


def test_a_straight_rim_covers_its_share_of_each_side():
    rims = Rims(torch.tensor([[0.25, 0.5, 0.125, 0.0]]), torch.zeros(1, 4), torch.zeros(1))
    covered = rims.cover(normalized_grid((4, 8))[None])[0]
    seen = torch.zeros(4, 8, dtype=torch.bool)
    seen[2:, 2:7] = (
        True  # 2 of 8 columns on the left, 2 of 4 rows above, 1 column on the right, nothing below
    )
    assert torch.equal(covered, ~seen)


def test_a_bowed_side_is_wider_or_narrower_at_its_ends():
    grid = normalized_grid((101, 40))[None]
    for bow, ends in ((0.1, 0.2), (-0.1, 0.0)):
        rims = Rims(torch.tensor([[0.1, 0, 0, 0]]), torch.tensor([[bow, 0, 0, 0]]), torch.zeros(1))
        columns = rims.cover(grid)[0].sum(dim=1) / 40
        assert columns[50] == pytest.approx(0.1)
        assert columns[0] == columns[-1] == pytest.approx(ends, abs=1 / 40)


def test_nothing_below_a_rim_is_covisible_from_either_side(white_batch):
    before, after = white_batch, with_rims(white_batch, ALWAYS)
    assert (before.covisibility_A_to_B & ~after.covisibility_A_to_B).any()
    for one, other in (("A", "B"), ("B", "A")):
        was, is_ = (getattr(batch, f"covisibility_{one}_to_{other}") for batch in (before, after))
        own, others = (getattr(after, f"image_{name}")[..., 0] < 1 for name in (one, other))
        x, y = to_pixel(getattr(after, f"warp_{one}_to_{other}"), (48, 64)).unbind(-1)
        pair = torch.arange(len(own))[:, None, None]
        lands = others[pair, y.long().clamp(0, 47), x.long().clamp(0, 63)]
        expected = was & ~own & ~lands
        # a match lands between pixel centres: only where the border of the rim cuts its pixel may the two differ
        assert not (is_ & own).any() and not (is_ & ~was).any()
        assert (is_ != expected)[was].float().mean() < 0.03


def test_colours_beyond_the_rim_and_the_geometry_stay(white_batch):
    before, after = white_batch, with_rims(white_batch, ALWAYS)
    assert set(after.image_A[..., 0].unique().tolist()) - {1.0}  # there is a rim
    for name in ("depth_A", "depth_B", "valid_A", "valid_B", "warp_A_to_B", "warp_B_to_A", "K_B", "T_A_to_B"):
        assert torch.equal(getattr(before, name), getattr(after, name))


def test_a_pairs_rim_depends_on_its_seed_alone():
    rims_A, rims_B = sample_rims(ALWAYS, torch.arange(40))
    again_A, _ = sample_rims(ALWAYS, torch.tensor([7, 3]))
    assert torch.equal(again_A.width, rims_A.width[[7, 3]]) and torch.equal(again_A.grey, rims_A.grey[[7, 3]])
    same = (rims_A.width == rims_B.width).all(dim=1) & (rims_A.bow == rims_B.bow).all(dim=1)
    assert 8 <= same.sum() <= 32  # a fair coin's 40 tosses, outside less than once in 10,000


def test_shares_are_kept():
    seeds = torch.arange(2000)
    rims_A, _ = sample_rims(RimCfg(share=0.3, black=0.8), seeds)
    present = (rims_A.width > 0).any(dim=1)  # one in sixteen has four empty sides
    assert present.float().mean().item() == pytest.approx(0.3 * 15 / 16, abs=0.04)
    assert (rims_A.grey[present] == 0).float().mean().item() == pytest.approx(0.8, abs=0.06)
    assert rims_A.width.max() <= 0.06 and rims_A.bow.abs().max() <= 0.05


def test_without_rims_the_batch_is_the_same_object(white_batch):
    assert with_rims(white_batch, RimCfg()) is white_batch


@pytest.mark.parametrize("wrong", [{"share": 1.5}, {"black": float("nan")}, {"width": 0.3}, {"bow": -0.1}])
def test_settings_without_sense_are_refused(wrong):
    with pytest.raises(L2MError, match=next(iter(wrong))):
        replace(ALWAYS, **wrong)
