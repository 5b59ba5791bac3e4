"""Figures of merit of views and matches."""

from l2m_viz.evaluation.metrics import (
    average_precision as average_precision,
    compare_with_truth as compare_with_truth,
    end_point_error as end_point_error,
    pck as pck,
    psnr as psnr,
    ssim as ssim,
)
