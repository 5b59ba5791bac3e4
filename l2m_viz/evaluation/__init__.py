"""Figures of merit of views and matches, and matchers judged on pairs with truth."""

from l2m_viz.evaluation.dev import (
    DEV_BENCHMARKS as DEV_BENCHMARKS,
    DevBenchmark as DevBenchmark,
    load_dev_pairs as load_dev_pairs,
)
from l2m_viz.evaluation.evaluate import (
    EvalCfg as EvalCfg,
    EvalPair as EvalPair,
    evaluate as evaluate,
)
from l2m_viz.evaluation.metrics import (
    average_precision as average_precision,
    compare_with_truth as compare_with_truth,
    end_point_error as end_point_error,
    pck as pck,
    psnr as psnr,
    ssim as ssim,
)
from l2m_viz.evaluation.pose import (
    Pose as Pose,
    PoseCfg as PoseCfg,
    PoseError as PoseError,
    estimate_pose as estimate_pose,
    pose_auc as pose_auc,
    pose_error_deg as pose_error_deg,
    pose_errors as pose_errors,
)
from l2m_viz.evaluation.report import (
    BenchmarkResult as BenchmarkResult,
    PairResult as PairResult,
    Report as Report,
    report_format as report_format,
)
