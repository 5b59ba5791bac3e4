"""Do features of the same point agree across views? The nearest feature of the other view, and how far off it is.

For every cell of A whose centre B sees, too: the cell of B whose feature is most similar (cosine), and the distance of
its centre from where the point really is. The share that is within some pixels is the feature PCK.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from l2m_viz.data.images import fit_long_side
from l2m_viz.encoders import Encoder
from l2m_viz.errors import L2MError, ShapeError
from l2m_viz.evaluation.evaluate import EvalPair
from l2m_viz.geometry import HW, normalized_grid, sample_image, to_pixel
from l2m_viz.progress import Progress
from l2m_viz.training.pairs import PairCfg
from l2m_viz.training.stream import PairStream

THRESHOLDS_PX = (8.0, 16.0, 32.0)
"""Pixels at the working size: one, two and four cells of an encoder with stride 8."""


@dataclass(frozen=True)
class FeaturePckCfg:
    """The protocol; figures compare only where it is the same."""

    # Larger images are reduced to this long side in pixels: the working size.
    long_side: int = 320
    # Pairs that are made from photos, their size (H, W), their seed, and how far the cameras move.
    num_photo_pairs: int = 64
    hw: HW = (240, 320)
    seed: int = 12345
    difficulty: tuple[float, float] = (0.3, 1.2)


@dataclass(frozen=True)
class FeaturePck:
    """How one encoder did on the pairs of one benchmark: means over the pairs.

    Attributes:
        encoder: Its name.
        benchmark: The pairs'.
        num_pairs: Pairs with at least one covisible cell.
        median_px: Median error of a pair's cells.
        pck: Share of them below each of `THRESHOLDS_PX`.
    """

    encoder: str
    benchmark: str
    num_pairs: int
    median_px: float
    pck: tuple[float, ...]


def photo_pairs(folder: str | Path, cfg: FeaturePckCfg | None = None) -> list[EvalPair]:
    """Make pairs from the photos of a folder: random piecewise-planar geometry, both views as rendered.

    Raises:
        ImageError: no such folder, or no photo in it.
    """
    cfg = cfg or FeaturePckCfg()
    pairs = PairCfg(hw=cfg.hw, depth="random-planes", holes="background")
    stream = PairStream(folder, pairs, batch_size=1, seed=cfg.seed, difficulty=cfg.difficulty)
    found = []
    for index in range(cfg.num_photo_pairs):
        made = stream.pair(index)
        pair = made.pair
        found.append(
            EvalPair(
                "photos",
                f"{index} {made.photo}",
                pair.image_A,
                pair.image_B,
                pair.warp_A_to_B,
                pair.covisibility_A_to_B,
                torch.ones_like(pair.covisibility_A_to_B),
            )
        )
    return found


def evaluate_features(
    encoder: Encoder,
    pairs: Sequence[EvalPair],
    cfg: FeaturePckCfg | None = None,
    progress: Progress | None = None,
) -> list[FeaturePck]:
    """Compare features across the views of every pair; one result a benchmark.

    Args:
        encoder: What is judged.
        pairs: See `photo_pairs` and `load_dev_pairs`; those that see nothing of each other do not count.
        cfg: The protocol.
        progress: Told the share that is done and the next pair.

    Raises:
        L2MError: no pair has a covisible cell.
    """
    cfg = cfg or FeaturePckCfg()
    rows: dict[str, list[list[float]]] = {}
    for index, pair in enumerate(pairs):
        if progress:
            progress(index / len(pairs), f"{encoder.name}: {pair.title}")
        errors_px = feature_errors_px(encoder, pair, cfg.long_side)
        if len(errors_px):
            shares = [(errors_px < threshold).float().mean().item() for threshold in THRESHOLDS_PX]
            rows.setdefault(pair.benchmark, []).append([errors_px.median().item(), *shares])
    if progress:
        progress(1.0, f"{encoder.name}: done")
    if not rows:
        raise L2MError(
            "evaluate_features", expected="a pair with a covisible cell", got=f"{len(pairs)} pairs"
        )
    results = []
    for benchmark, found in rows.items():
        median_px, *pck = torch.tensor(found).mean(dim=0).tolist()
        results.append(FeaturePck(encoder.name, benchmark, len(found), median_px, tuple(pck)))
    return results


def feature_errors_px(encoder: Encoder, pair: EvalPair, long_side: int) -> Float[Tensor, " n"]:
    """Distance in pixels of B, at the working size, from the truth to the cell that is most similar.

    One number for every cell of A around whose centre all pixels are covisible.
    """
    image_A, image_B = (fit_long_side(image, long_side) for image in (pair.image_A, pair.image_B))
    features_A, features_B = encoder(image_A), encoder(image_B)
    centers = normalized_grid(_hw(features_A))
    seen = sample_image(pair.covisibility_A_to_B.float(), centers) > 1 - 1e-5
    truth = sample_image(pair.warp_A_to_B, centers)[seen]
    found = nearest_cells(features_A[seen], features_B)
    hw = _hw(image_B)
    return (to_pixel(found, hw) - to_pixel(truth, hw)).norm(dim=-1)


def nearest_cells(features: Float[Tensor, "n d"], grid: Float[Tensor, "h w d2"]) -> Float[Tensor, "n 2"]:
    """Normalised centre of the cell whose feature has the largest cosine with each.

    Raises:
        ShapeError: the features differ in width.
    """
    if features.shape[-1] != grid.shape[-1]:
        got = f"{features.shape[-1]} and {grid.shape[-1]} channels"
        raise ShapeError("nearest_cells", expected="features of one width", got=got)
    unit = F.normalize(grid.flatten(0, 1), dim=1)
    best = torch.cat([(rows @ unit.T).argmax(dim=1) for rows in features.split(_ROWS)])
    return normalized_grid(_hw(grid)).flatten(0, 1)[best]


def features_table(results: Sequence[FeaturePck], cfg: FeaturePckCfg | None = None) -> str:
    """The results as a markdown table, the protocol under it."""
    cfg = cfg or FeaturePckCfg()
    head = (
        "| benchmark | encoder | pairs | median px | " + " | ".join(f"pck{t:g}" for t in THRESHOLDS_PX) + " |"
    )
    rule = "|---|---|" + "--:|" * (2 + len(THRESHOLDS_PX))
    benchmarks = list(dict.fromkeys(result.benchmark for result in results))
    ordered = sorted(results, key=lambda result: benchmarks.index(result.benchmark))
    rows = [
        f"| {r.benchmark} | {r.encoder} | {r.num_pairs} | {r.median_px:.1f} | "
        + " | ".join(f"{share:.3f}" for share in r.pck)
        + " |"
        for r in ordered
    ]
    legend = (
        "Share of A's covisible cells whose most similar cell of B (cosine) is within so many pixels of the truth;"
        f" means over pairs; images at a long side of at most {cfg.long_side} px."
    )
    return "\n".join([head, rule, *rows, "", legend, ""])


def renamed(results: Sequence[FeaturePck], encoder: str) -> list[FeaturePck]:
    """The same results under another name: two files of weights make two encoders of one name."""
    return [replace(result, encoder=encoder) for result in results]


_ROWS = 4096  # of the table of similarities that is in memory at once


def _hw(image: Tensor) -> HW:
    return image.shape[0], image.shape[1]
