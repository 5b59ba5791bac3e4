"""Relative pose from matches, its error, and the area under the curve of such errors.

Symbols: ``T_A_to_B`` maps points of camera A to points of camera B; two views tell its rotation and the direction of
its translation, never the length. Errors are angles in degrees; a pair without a pose counts as `FAILED_DEG`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from l2m_viz.errors import L2MError
from l2m_viz.geometry import pose_from_rotation, ray_directions
from l2m_viz.matching.match import Matches

FAILED_DEG = 180.0
"""Error of a pair for which no pose was found: the largest angle there is."""

_MIN_MATCHES = 6  # five make an essential matrix, the sixth is the first that can vote
_FAR = 1e9  # baselines: recoverPose drops farther points as if they lay behind the cameras


@dataclass(frozen=True)
class PoseCfg:
    """How a pose is estimated; figures compare only where these are equal."""

    # Distance to the epipolar line in pixels within which a match is an inlier (LoFTR's and RoMa's value).
    threshold_px: float = 0.5
    confidence: float = 0.99999


@dataclass(frozen=True)
class Pose:
    """An estimated ``T_A_to_B`` with a translation of length 1, and the matches that agree with it."""

    T_A_to_B: Float[Tensor, "4 4"]
    inliers: Bool[Tensor, " n"]


class PoseError(NamedTuple):
    """Angles in degrees; ``max`` is the one that benchmarks count."""

    rotation: float
    translation: float
    max: float


def estimate_pose(
    matches: Matches,
    K_A: Float[Tensor, "3 3"],
    K_B: Float[Tensor, "3 3"],
    cfg: PoseCfg | None = None,
    generator: torch.Generator | None = None,
) -> Pose | None:
    """Estimate the relative pose by MAGSAC++ (Barath et al., CVPR 2020) over the five-point solver, as OpenCV has it.

    Its random draws follow the order of the matches, so ``generator`` shuffles them; without it they stay as they are.

    Returns:
        The pose that has most points in front of both cameras, or None: fewer than six matches, or no model.

    Raises:
        L2MError: the threshold is not positive, or the confidence not between 0 and 1.
    """
    cfg = cfg or PoseCfg()
    if not (cfg.threshold_px > 0 and 0 < cfg.confidence < 1):
        got = f"{cfg.threshold_px:g} px, {cfg.confidence:g}"
        raise L2MError("estimate_pose", expected="a threshold > 0 px and 0 < confidence < 1", got=got)
    if len(matches) < _MIN_MATCHES:
        return None
    order = _order(len(matches), generator)
    # Rays z = 1 know no pixel centres: points and K both count them at 0.5, and so OpenCV needs no shift here.
    rays_A, rays_B = (
        ray_directions(points[order].double(), K.double())[:, :2].numpy()
        for points, K in ((matches.points_A, K_A), (matches.points_B, K_B))
    )
    focal_px = torch.stack([K_A[0, 0], K_A[1, 1], K_B[0, 0], K_B[1, 1]]).double().mean().item()
    try:
        models, mask = cv2.findEssentialMat(
            rays_A, rays_B, np.eye(3), cv2.USAC_MAGSAC, cfg.confidence, cfg.threshold_px / focal_px
        )
    except cv2.error:  # degenerate points, such as all the same
        return None
    if models is None or mask is None:
        return None
    found = _most_in_front(models, rays_A, rays_B, mask)
    if found is None:
        return None
    inliers = torch.zeros(len(matches), dtype=torch.bool)
    inliers[order] = torch.from_numpy(mask[:, 0] > 0)
    return Pose(found, inliers)


def pose_error_deg(estimated: Pose | None, T_A_to_B: Float[Tensor, "4 4"]) -> PoseError:
    """Compare an estimate with the truth; without an estimate every angle is `FAILED_DEG`.

    The translation's angle is folded, min(e, 180 - e): an essential matrix does not know the sign, and benchmarks since
    SuperGlue leave the cheirality test out of it.

    Raises:
        L2MError: the true translation is zero, so that it has no direction.
    """
    truth = T_A_to_B.double()
    length = truth[:3, 3].norm()
    if length == 0:
        raise L2MError("pose_error_deg", expected="a true translation with a direction", got="0 0 0")
    if estimated is None:
        return PoseError(FAILED_DEG, FAILED_DEG, FAILED_DEG)
    found = estimated.T_A_to_B.double()
    turn = found[:3, :3].T @ truth[:3, :3]
    # |R - I| = 2 sqrt(2) sin(angle / 2) keeps its digits at small angles, where arccos of the trace loses half of them
    rotation = 2 * torch.asin(((turn - torch.eye(3, dtype=turn.dtype)).norm() / 8**0.5).clamp(max=1))
    directions = found[:3, 3] / found[:3, 3].norm(), truth[:3, 3] / length
    across = torch.linalg.cross(*directions).norm()
    translation = torch.atan2(across, torch.dot(*directions).abs())
    angles = torch.rad2deg(rotation).item(), torch.rad2deg(translation).item()
    return PoseError(*angles, max(angles))


def pose_errors(
    matches: Matches,
    K_A: Float[Tensor, "3 3"],
    K_B: Float[Tensor, "3 3"],
    T_A_to_B: Float[Tensor, "4 4"],
    num_shuffles: int = 15,
    cfg: PoseCfg | None = None,
    generator: torch.Generator | None = None,
) -> Float[Tensor, " shuffles"]:
    """Largest angle (deg) of one estimate a shuffle of the matches: a single draw of RANSAC is noise."""
    generator = generator or torch.Generator().manual_seed(0)
    estimates = (estimate_pose(matches, K_A, K_B, cfg, generator) for _ in range(num_shuffles))
    return torch.tensor([pose_error_deg(estimate, T_A_to_B).max for estimate in estimates])


def pose_auc(
    errors_deg: Float[Tensor, " n"], thresholds_deg: Sequence[float] = (5.0, 10.0, 20.0)
) -> tuple[float, ...]:
    """Area under recall over error up to each threshold, over that threshold; 1 is perfect.

    Recall after the i-th smallest of n errors is i / n; the curve starts at (0, 0), is straight between errors and flat
    from the last error below the threshold on (SuperGlue's and RoMa's form).

    Raises:
        L2MError: there are no errors, one is NaN or negative, or a threshold is not positive.

    >>> pose_auc(torch.tensor([2.0, 180.0]), (4.0,))
    (0.375,)
    """
    if len(errors_deg) == 0 or not (errors_deg >= 0).all():
        raise L2MError("pose_auc", expected="at least one error, all >= 0", got=str(errors_deg.tolist()))
    if not all(threshold > 0 for threshold in thresholds_deg):
        raise L2MError("pose_auc", expected="thresholds > 0", got=str(tuple(thresholds_deg)))
    errors = np.concatenate([[0.0], np.sort(errors_deg.double().numpy())])
    recall = np.arange(len(errors)) / (len(errors) - 1)
    areas = []
    for threshold in thresholds_deg:
        # at least 1: the start lies below any threshold
        below = int(np.searchsorted(errors, threshold))
        x, y = np.append(errors[:below], threshold), np.append(recall[:below], recall[below - 1])
        areas.append(float(np.trapezoid(y, x) / threshold))
    return tuple(areas)


def _order(num: int, generator: torch.Generator | None) -> Tensor:
    return torch.arange(num) if generator is None else torch.randperm(num, generator=generator)


def _most_in_front(
    models: np.ndarray, rays_A: np.ndarray, rays_B: np.ndarray, mask: np.ndarray
) -> Float[Tensor, "4 4"] | None:
    """Of the stacked essential matrices' decompositions, the one with most inliers in front of both cameras."""
    best, most = None, 0
    for model in models.reshape(-1, 3, 3):
        # the mask is changed in place: every model starts from the same inliers
        num, R, t = cv2.recoverPose(model, rays_A, rays_B, np.eye(3), _FAR, mask=mask.copy())[:3]
        if num > most:
            best, most = pose_from_rotation(torch.from_numpy(R), torch.from_numpy(t[:, 0])).float(), num
    return best
