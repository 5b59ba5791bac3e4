"""Pose from exact correspondences of known cameras, and the area under hand-made curves."""

import math

import pytest
import torch

from l2m_viz.errors import L2MError
from l2m_viz.evaluation import Pose, PoseCfg, estimate_pose, pose_auc, pose_error_deg, pose_errors
from l2m_viz.geometry import pose_from_rotation, project, rotation_from_axis_angle, transform_points
from l2m_viz.matching import Matches

K_A = torch.tensor([[500.0, 0.0, 330.0], [0.0, 510.0, 225.0], [0.0, 0.0, 1.0]])
K_B = torch.tensor([[380.0, 0.0, 250.0], [0.0, 385.0, 260.0], [0.0, 0.0, 1.0]])  # another camera


def pose_of(axis_angle_deg, translation):
    rotation = rotation_from_axis_angle(torch.deg2rad(torch.tensor(axis_angle_deg)))
    return pose_from_rotation(rotation, torch.tensor(translation))


T = pose_of([3.0, -12.0, 5.0], [0.6, -0.1, 0.2])


def exact_matches(num=400, outlier_share=0.0, offset_px=0.0):
    """Points of a box before camera A, projected into both cameras."""
    generator = torch.Generator().manual_seed(3)
    points = torch.rand(num, 3, generator=generator, dtype=torch.float64) * 4 + torch.tensor(
        [-2.0, -2.0, 4.0]
    )
    points_A, _ = project(points, K_A.double())
    points_B, depth_B = project(transform_points(T.double(), points), K_B.double())
    assert (depth_B > 0).all()
    wrong = torch.arange(num) < outlier_share * num
    points_B[wrong] = torch.rand(int(wrong.sum()), 2, generator=generator, dtype=torch.float64) * 500
    matches = Matches((points_A + offset_px).float(), (points_B + offset_px).float(), torch.ones(num))
    return matches, wrong


@pytest.mark.parametrize("outlier_share", [0.0, 0.4])
def test_the_pose_of_exact_matches_between_two_cameras(outlier_share):
    matches, wrong = exact_matches(outlier_share=outlier_share)
    found = estimate_pose(matches, K_A, K_B)
    error = pose_error_deg(found, T)
    assert error.max == max(error.rotation, error.translation) < 0.05
    assert found.T_A_to_B[:3, 3].norm().item() == pytest.approx(1)
    assert found.T_A_to_B[:3, 3] @ T[:3, 3] > 0  # in front of both cameras: the sign is found too
    assert found.inliers[~wrong].float().mean() > 0.99
    assert (
        found.inliers[wrong].sum() <= 0.05 * wrong.sum()
    )  # chance puts few points onto their epipolar lines


def test_half_a_pixel_is_seen():
    """Points counted from integer centres with K counted from 0.5 are wrong by f-dependent angles."""
    right, _ = exact_matches()
    shifted, _ = exact_matches(offset_px=-0.5)
    errors = [pose_error_deg(estimate_pose(matches, K_A, K_B), T).max for matches in (right, shifted)]
    assert errors[0] < 0.01 < errors[1]


def test_the_order_of_the_matches_is_all_the_chance_there_is():
    matches, _ = exact_matches(outlier_share=0.6)
    shuffled = [
        estimate_pose(matches, K_A, K_B, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    ]
    assert torch.equal(shuffled[0].T_A_to_B, shuffled[1].T_A_to_B)
    assert not torch.equal(shuffled[0].T_A_to_B, shuffled[2].T_A_to_B)
    assert torch.equal(shuffled[0].inliers, shuffled[1].inliers)
    twice = [estimate_pose(matches, K_A, K_B).T_A_to_B for _ in range(2)]
    assert torch.equal(*twice)


def test_inliers_keep_the_order_of_the_matches_when_shuffled():
    matches, wrong = exact_matches(outlier_share=0.4)
    found = estimate_pose(matches, K_A, K_B, generator=torch.Generator().manual_seed(5))
    assert (found.inliers == ~wrong).float().mean() > 0.97


@pytest.mark.parametrize("num", [0, 5])
def test_too_few_matches_make_no_pose(num):
    matches, _ = exact_matches()
    few = Matches(matches.points_A[:num], matches.points_B[:num], matches.certainty[:num])
    assert estimate_pose(few, K_A, K_B) is None
    assert pose_error_deg(None, T) == (180.0, 180.0, 180.0)
    assert pose_errors(few, K_A, K_B, T, num_shuffles=3).tolist() == [180.0] * 3


def test_matches_of_one_point_make_no_pose_or_a_bad_one_but_no_crash():
    same = Matches(torch.full((50, 2), 100.0), torch.full((50, 2), 120.0), torch.ones(50))
    errors = pose_errors(same, K_A, K_B, T, num_shuffles=2)
    assert ((errors > 0) & (errors <= 180)).all()


def test_settings_that_cannot_be():
    matches, _ = exact_matches()
    for cfg in (PoseCfg(threshold_px=0.0), PoseCfg(confidence=1.0)):
        with pytest.raises(L2MError, match="threshold > 0 px"):
            estimate_pose(matches, K_A, K_B, cfg)


def test_error_angles_are_those_that_were_put_in():
    truth = pose_of([0.0, 0.0, 0.0], [1.0, 0.0, 0.0])
    seven = math.radians(7.0)
    turned = pose_of([0.0, 4.0, 0.0], [math.cos(seven), math.sin(seven), 0.0])
    error = pose_error_deg(Pose(turned, torch.ones(6, dtype=torch.bool)), truth)
    assert error == pytest.approx((4.0, 7.0, 7.0), abs=1e-4)
    backwards = pose_of([0.0, 0.0, 120.0], [-2.0, 0.0, 0.0])  # length does not count, the sign is folded away
    error = pose_error_deg(Pose(backwards, torch.ones(6, dtype=torch.bool)), truth)
    assert error == pytest.approx((120.0, 0.0, 120.0), abs=1e-4)
    half_turn = pose_of([180.0, 0.0, 0.0], [0.0, 0.0, 1.0])
    error = pose_error_deg(Pose(half_turn, torch.ones(6, dtype=torch.bool)), truth)
    assert error == pytest.approx((180.0, 90.0, 180.0), abs=1e-2)


def test_a_true_translation_of_zero_has_no_direction():
    with pytest.raises(L2MError, match="a direction"):
        pose_error_deg(None, torch.eye(4))


def test_auc_by_hand():
    # recall over error: (0, 0), (1, 1/4), (3, 2/4), (7, 3/4), then 180 is beyond every threshold
    errors = torch.tensor([7.0, 1.0, 180.0, 3.0])
    to_1, to_3, to_7 = 1 * (0 + 0.25) / 2, 2 * (0.25 + 0.5) / 2, 4 * (0.5 + 0.75) / 2
    expected = ((to_1 + to_3 + 2 * 0.5) / 5, (to_1 + to_3 + to_7 + 3 * 0.75) / 10)
    assert pose_auc(errors, (5.0, 10.0)) == pytest.approx(expected)


def test_auc_at_its_ends():
    assert pose_auc(torch.zeros(3)) == (1.0, 1.0, 1.0)
    assert pose_auc(torch.full((3,), 180.0)) == (0.0, 0.0, 0.0)
    assert pose_auc(torch.tensor([math.inf, 0.0]), (5.0,)) == (0.5,)
    # evenly spread errors up to the threshold: the diagonal
    assert pose_auc(torch.linspace(0, 10, 1001)[1:], (10.0,))[0] == pytest.approx(0.5, abs=2e-3)


@pytest.mark.parametrize("errors", [[], [1.0, math.nan], [-1.0]])
def test_auc_refuses_what_is_no_error(errors):
    with pytest.raises(L2MError, match="pose_auc"):
        pose_auc(torch.tensor(errors))
