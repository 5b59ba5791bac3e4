"""Run a matcher over pairs whose truth is known, and write down how it did."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from l2m_viz.errors import L2MError, ShapeError
from l2m_viz.evaluation.metrics import compare_with_truth
from l2m_viz.evaluation.pose import PoseCfg, pose_errors
from l2m_viz.evaluation.report import PairResult, Report, package_versions
from l2m_viz.matching.match import Match
from l2m_viz.matching.matcher import Matcher
from l2m_viz.progress import Progress


@dataclass(frozen=True)
class EvalPair:
    """Two images and what is known about them.

    Attributes:
        benchmark: What it is averaged with.
        name: Which of the benchmark's pairs.
        image_A: RGB in [0, 1].
        image_B: RGB in [0, 1].
        warp_A_to_B: Where each pixel of A is in B, normalised; means something where covisible.
        covisibility_A_to_B: True where B sees the pixel of A; all False for two different scenes.
        known: True where it is known whether B sees the pixel.
        K_A: Intrinsics in pixels, for pairs whose pose counts.
        K_B: Intrinsics in pixels.
        T_A_to_B: Maps points of camera A to camera B.

    Raises:
        ShapeError: the truth has another size than image A, or only a part of the pose is given.
    """

    benchmark: str
    name: str
    image_A: Float[Tensor, "ha wa 3"]
    image_B: Float[Tensor, "hb wb 3"]
    warp_A_to_B: Float[Tensor, "ha wa 2"]
    covisibility_A_to_B: Bool[Tensor, "ha wa"]
    known: Bool[Tensor, "ha wa"]
    K_A: Float[Tensor, "3 3"] | None = None
    K_B: Float[Tensor, "3 3"] | None = None
    T_A_to_B: Float[Tensor, "4 4"] | None = None

    def __post_init__(self) -> None:
        hw = self.image_A.shape[:2]
        for name in ("warp_A_to_B", "covisibility_A_to_B", "known"):
            if getattr(self, name).shape[:2] != hw:
                got = str(tuple(getattr(self, name).shape))
                raise ShapeError(f"{self.title} {name}", expected=f"the size of A, {tuple(hw)}", got=got)
        if len({value is None for value in (self.K_A, self.K_B, self.T_A_to_B)}) != 1:
            raise ShapeError(f"{self.title} pose", expected="K_A, K_B and T_A_to_B, or none", got="a part")

    @property
    def title(self) -> str:
        """Benchmark and name."""
        return f"{self.benchmark} {self.name}"


@dataclass(frozen=True)
class EvalCfg:
    """The protocol; figures compare only where it is the same."""

    # Matches that are sampled for the pose (RoMa's and GIM's number).
    num_matches: int = 5000
    # Pose estimates a pair, each on its own order of the matches.
    num_shuffles: int = 15
    # Error below which a match counts as right for the certainty's average precision.
    right_px: float = 10.0
    pose: PoseCfg = field(default_factory=PoseCfg)
    # Of the sampling and the shuffles.
    seed: int = 0


def evaluate(
    matcher: Matcher,
    pairs: Sequence[EvalPair],
    cfg: EvalCfg | None = None,
    progress: Progress | None = None,
    on_match: Callable[[EvalPair, Match], None] | None = None,
) -> Report:
    """Match every pair and judge the matches; errors are measured at every pixel of A.

    Args:
        matcher: What is judged.
        pairs: See `load_dev_pairs`.
        cfg: The protocol.
        progress: Told the share that is done and the next pair.
        on_match: Gets every match, for pictures: the report keeps figures only.

    Raises:
        L2MError: there are no pairs.
    """
    cfg = cfg or EvalCfg()
    tell = progress or (lambda share, what: None)
    if not pairs:
        raise L2MError("evaluate", expected="at least one pair", got="none")
    tell(0.0, f"{matcher.name}: warming up")
    matcher.match(
        pairs[0].image_A, pairs[0].image_B
    )  # compiles kernels, which would count as time of the first pair
    results = []
    for index, pair in enumerate(pairs):
        tell(index / len(pairs), f"{matcher.name}: {pair.title}")
        start = time.perf_counter()
        match = matcher.match(pair.image_A, pair.image_B)
        seconds = time.perf_counter() - start
        results.append(_judge(matcher.name, pair, match, seconds, cfg))
        if on_match:
            on_match(pair, match)
    tell(1.0, f"{matcher.name}: done")
    return Report(tuple(results), _protocol(cfg), package_versions())


def _judge(matcher: str, pair: EvalPair, match: Match, seconds: float, cfg: EvalCfg) -> PairResult:
    truth = pair.warp_A_to_B, pair.covisibility_A_to_B, pair.known
    measured = compare_with_truth(match, *truth, cfg.right_px) if pair.covisibility_A_to_B.any() else {}
    errors_deg: tuple[float, ...] = ()
    if pair.K_A is not None and pair.K_B is not None and pair.T_A_to_B is not None:
        draw = torch.Generator().manual_seed(cfg.seed)
        matches = match.sample(cfg.num_matches, draw)
        geometry = pair.K_A, pair.K_B, pair.T_A_to_B
        errors_deg = tuple(pose_errors(matches, *geometry, cfg.num_shuffles, cfg.pose, draw).tolist())
    return PairResult(
        matcher=matcher,
        benchmark=pair.benchmark,
        pair=pair.name,
        seconds=seconds,
        overlap=match.overlap,
        pose_errors_deg=errors_deg,
        **measured,
    )


def _protocol(cfg: EvalCfg) -> dict[str, float]:
    """The settings as flat numbers, to stand beside the figures."""
    return {
        "num_matches": cfg.num_matches,
        "num_shuffles": cfg.num_shuffles,
        "right_px": cfg.right_px,
        "pose_threshold_px": cfg.pose.threshold_px,
        "pose_confidence": cfg.pose.confidence,
        "seed": cfg.seed,
    }
