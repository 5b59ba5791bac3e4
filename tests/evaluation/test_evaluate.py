"""Matchers whose answer is known, judged on pairs whose truth is known."""

import math
from dataclasses import replace

import pytest
import torch

from l2m_viz.errors import L2MError, ShapeError
from l2m_viz.evaluation import EvalCfg, EvalPair, average_precision, compare_with_truth, evaluate
from l2m_viz.geometry import (
    Camera,
    intrinsics,
    look_at,
    normalized_grid,
    relative_pose,
    to_normalized,
    to_pixel,
)
from l2m_viz.geometry.scenes import sphere_on_plane
from l2m_viz.matching import Match, Matcher

HW_A, HW_B = (60, 90), (66, 80)


@pytest.fixture(scope="module")
def pair():
    """A sphere before a plane, from two places."""
    scene = sphere_on_plane()
    eyes = torch.zeros(3), torch.tensor([0.5, -0.2, 0.1])
    target = torch.tensor([0.0, 0.0, 3.5])
    A, B = (
        Camera(intrinsics(80.0, hw), look_at(eye, target), width=hw[1], height=hw[0])
        for hw, eye in zip((HW_A, HW_B), eyes, strict=True)
    )
    warp, covisible = scene.warp(A, B)
    known = torch.ones_like(covisible)
    known[:, :7] = False
    return EvalPair(
        "scenes", "sphere", scene.image(A), scene.image(B), warp, covisible & known, known,
        K_A=A.K, K_B=B.K, T_A_to_B=relative_pose(A.w2c, B.w2c),
    )  # fmt: skip


class Told(Matcher):
    """Answers with the truth moved by ``offset_px``; B to A it knows nothing."""

    name = "told"

    def __init__(self, pair, offset_px=(0.0, 0.0), certainty=None):
        moved = to_pixel(pair.warp_A_to_B, HW_B) + torch.tensor(offset_px)
        self.warp = to_normalized(moved, HW_B)
        self.certainty = pair.covisibility_A_to_B.float() if certainty is None else certainty
        self.calls = 0

    def _match_pair(self, image_A, image_B):
        self.calls += 1
        return Match(
            self.warp, self.certainty, normalized_grid(HW_B), torch.zeros(HW_B), HW_A, HW_B, matcher=self.name
        )


def test_the_truth_is_perfect(pair):
    (result,) = evaluate(Told(pair), [pair]).results
    assert (result.pck1, result.pck3, result.pck5, result.pck10) == (1.0,) * 4
    assert result.epe_px == pytest.approx(0, abs=1e-4)
    assert result.ap == 1.0
    assert result.overlap == pytest.approx(pair.covisibility_A_to_B.float().mean().item() / 2)
    assert len(result.pose_errors_deg) == 15
    assert max(result.pose_errors_deg) < 1.0


def test_an_offset_shows_in_every_figure_at_its_threshold(pair):
    inner = pair.covisibility_A_to_B & (
        (to_pixel(pair.warp_A_to_B, HW_B) + 5 < torch.tensor([80.0, 66.0])).all(-1)
    )
    pair = replace(pair, covisibility_A_to_B=inner)  # an answer outside B would be clamped to its border
    (result,) = evaluate(Told(pair, (3.0, 2.0)), [pair]).results
    assert result.epe_px == pytest.approx(math.hypot(3, 2), abs=1e-3)
    assert (result.pck1, result.pck3, result.pck5, result.pck10) == (0.0, 0.0, 1.0, 1.0)


def test_certainty_is_asked_whether_the_match_is_right_not_only_whether_it_exists(pair):
    """Wrong matches in the left half: certain of all that is covisible, a matcher is then right by half."""
    left = torch.zeros(HW_A, dtype=torch.bool)
    left[:, : HW_A[1] // 2] = True
    matcher = Told(pair)
    matcher.warp = torch.where(left[..., None], normalized_grid(HW_A).roll(20, dims=0), matcher.warp)
    match = matcher.match(pair.image_A, pair.image_B)
    truth = pair.warp_A_to_B, pair.covisibility_A_to_B, pair.known
    assert compare_with_truth(match, *truth)["ap"] == 1.0
    error = (to_pixel(matcher.warp, HW_B) - to_pixel(pair.warp_A_to_B, HW_B)).norm(dim=-1)
    right = pair.covisibility_A_to_B & (error < 10)
    assert 0.2 < right.sum() / pair.covisibility_A_to_B.sum() < 0.9
    # the certainty is 1 on the covisible and 0 elsewhere: one step at that precision, with all the recall
    expected = (right.sum() / pair.covisibility_A_to_B.sum()).item()
    assert compare_with_truth(match, *truth, right_px=10.0)["ap"] == pytest.approx(expected)
    assert average_precision(match.certainty_A_to_B[pair.known], right[pair.known]) == pytest.approx(expected)


def test_a_matcher_that_is_nowhere_right_has_an_average_precision_of_zero(pair):
    match = Told(pair, (500.0, 500.0)).match(pair.image_A, pair.image_B)
    measured = compare_with_truth(match, pair.warp_A_to_B, pair.covisibility_A_to_B, pair.known, right_px=1.0)
    assert measured["ap"] == 0.0


def test_pairs_without_overlap_or_pose_leave_figures_open(pair):
    nothing = torch.zeros(HW_A, dtype=torch.bool)
    unrelated = replace(
        pair, benchmark="unrelated", covisibility_A_to_B=nothing, K_A=None, K_B=None, T_A_to_B=None
    )
    (result,) = evaluate(Told(pair, certainty=torch.full(HW_A, 0.25)), [unrelated]).results
    assert (result.epe_px, result.pck1, result.ap, result.pose_errors_deg) == (None, None, None, ())
    assert result.overlap == pytest.approx(0.125)


def test_progress_pictures_and_time(pair):
    matcher, told, seen = Told(pair), [], []
    other = replace(pair, name="again")
    report = evaluate(
        matcher, [pair, other], EvalCfg(num_shuffles=2),
        progress=lambda share, what: told.append((share, what)),
        on_match=lambda pair, match: seen.append((pair.name, match.matcher)),
    )  # fmt: skip
    assert matcher.calls == 3  # one to warm up
    assert [share for share, _ in told] == [0.0, 0.0, 0.5, 1.0]
    assert "scenes again" in told[2][1]
    assert seen == [("sphere", "told"), ("again", "told")]
    assert all(0 <= result.seconds < 60 for result in report.results)
    assert report.protocol["num_shuffles"] == 2


def test_the_same_seed_gives_the_same_report(pair):
    cfg = EvalCfg(num_matches=200, num_shuffles=3)
    first, again, other = (
        evaluate(Told(pair), [pair], settings).results[0].pose_errors_deg
        for settings in (cfg, cfg, replace(cfg, seed=1))
    )
    assert first == again != other


def test_what_cannot_be_judged_is_refused(pair, unchecked):
    with pytest.raises(L2MError, match="at least one pair"):
        evaluate(Told(pair), [])
    with pytest.raises(ShapeError, match="K_A, K_B and T_A_to_B, or none"):
        replace(pair, K_B=None)
    with pytest.raises(ShapeError, match="the size of A"):
        replace(pair, known=torch.ones(HW_B, dtype=torch.bool))
