"""Figures of merit: end-point error, PCK, average precision of a certainty, and picture quality inside a mask."""

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from l2m_viz.errors import L2MError
from l2m_viz.geometry import HW, normalized_grid, to_pixel
from l2m_viz.matching.match import Match

PCK_PX = (1, 3, 5, 10)
"""Thresholds of the shares that `compare_with_truth` gives."""


def end_point_error(
    warp: Float[Tensor, "*b 2"], warp_true: Float[Tensor, "*b 2"], hw_to: HW
) -> Float[Tensor, "*b"]:
    """Distance in pixels of the target image between two normalised warps."""
    return (to_pixel(warp, hw_to) - to_pixel(warp_true, hw_to)).norm(dim=-1)


def pck(errors_px: Float[Tensor, " n"], threshold_px: float) -> float:
    """Percentage of correct keypoints: the share of errors below the threshold.

    >>> pck(torch.tensor([0.5, 2.0]), 1.0)
    0.5
    """
    _require_some(errors_px, "pck")
    return (errors_px < threshold_px).float().mean().item()


def average_precision(scores: Float[Tensor, " n"], labels: Bool[Tensor, " n"]) -> float:
    """Area under the precision-recall curve of ``scores`` for ``labels``, sum of precision times gain in recall.

    Equal scores are one step of the curve, whatever their order. Without a positive label the result is NaN.

    >>> average_precision(torch.tensor([0.9, 0.8, 0.1]), torch.tensor([True, False, True]))
    0.8333333...
    """
    _require_some(scores, "average_precision")
    if not labels.any():
        return float("nan")
    order = scores.argsort(descending=True)
    hits = labels[order].double().cumsum(0)
    last_of_tie = torch.cat([scores[order].diff() != 0, hits.new_ones(1, dtype=torch.bool)])
    hits, drawn = hits[last_of_tie], (torch.arange(len(scores), device=hits.device) + 1)[last_of_tie]
    gain = hits.diff(prepend=hits.new_zeros(1)) / hits[-1]
    return (gain * hits / drawn).sum().item()


def psnr(image: Float[Tensor, "h w 3"], truth: Float[Tensor, "h w 3"], mask: Bool[Tensor, "h w"]) -> float:
    """Peak signal-to-noise ratio in dB over the pixels of the mask, for images in [0, 1]."""
    _require_some(mask[mask], "psnr")
    error = (image - truth)[mask].double().square().mean().item()
    return float("inf") if error == 0 else -10 * float(np.log10(error))


def ssim(image: Float[Tensor, "h w 3"], truth: Float[Tensor, "h w 3"], mask: Bool[Tensor, "h w"]) -> float:
    """Structural similarity (Wang et al. 2004, 7x7 windows, mean of R, G, B) over the pixels of the mask.

    Only windows that lie wholly inside the mask count: one that reaches into a hole would compare the hole's filling.
    """
    from scipy.ndimage import binary_erosion
    from skimage.metrics import structural_similarity

    window = 7
    whole = np.asarray(binary_erosion(mask.numpy(), np.ones((window, window))), bool)
    _require_some(torch.from_numpy(whole[whole]), "ssim")
    local = structural_similarity(
        image.numpy(), truth.numpy(), win_size=window, channel_axis=2, data_range=1.0, full=True
    )[1]
    return float(np.asarray(local)[whole].mean())


def compare_with_truth(
    match: Match,
    warp: Float[Tensor, "h w 2"],
    covisible: Bool[Tensor, "h w"],
    known: Bool[Tensor, "h w"],
    right_px: float = float("inf"),
) -> dict[str, float]:
    """Judge a match by the exact warp of A.

    ``epe_px`` is the median end-point error and ``pck1``, ``pck3``, ``pck5``, ``pck10`` are shares, over the covisible
    pixels. ``ap`` is the average precision of the certainty as a sign that a pixel is covisible and its match wrong by
    less than ``right_px``, over the pixels whose truth is ``known``; 0 if no match is right. Without covisible pixels
    every figure is NaN.
    """
    matched, certainty = match.query(to_pixel(normalized_grid((warp.shape[0], warp.shape[1])), match.hw_A))
    error = (matched - to_pixel(warp, match.hw_B)).norm(dim=-1)
    seen = error[covisible]
    if len(seen) == 0:
        return dict.fromkeys(("epe_px", *(f"pck{threshold}" for threshold in PCK_PX), "ap"), float("nan"))
    right = covisible & (error < right_px)
    return {
        "epe_px": seen.median().item(),
        **{f"pck{threshold}": pck(seen, threshold) for threshold in PCK_PX},
        "ap": average_precision(certainty[known], right[known]) if right.any() else 0.0,
    }


def _require_some(values: Tensor, name: str) -> None:
    if len(values) == 0:
        raise L2MError(
            name, expected="at least one pixel", got="none", todo="the mask is empty; check the overlap"
        )
