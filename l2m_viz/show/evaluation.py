"""Evaluated pairs to look at: where a matcher is wrong, and whether its certainty knows."""

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from matplotlib.figure import Figure
from torch import Tensor

from l2m_viz.data import atomic_write, fit_long_side
from l2m_viz.evaluation import EvalPair
from l2m_viz.geometry import HW, normalized_grid, pixel_grid, sample_image, to_normalized, to_pixel
from l2m_viz.matching import Match
from l2m_viz.show import figures
from l2m_viz.show.figures import Panel

# One scale for all pairs and matchers, or they could not be compared; an error beyond it is plainly a wrong match.
ERROR_LIMITS_PX = (0.0, 10.0)

_MIN_CERTAINTY = 0.05  # below it the matcher says nothing, and the warped colour would be an invention
_COLUMNS = 4


def match_panels(pair: EvalPair, match: Match, long_side: int = 400) -> tuple[Panel, Panel, Panel, Panel]:
    """Show A, B warped into A where the matcher is at all certain, the error in pixels of B, and the certainty.

    Errors are measured at the pixels of the original and then shown at the size of the picture.
    """
    hw_A, hw_B = _hw(pair.image_A), _hw(pair.image_B)
    points_B, certainty = match.query(pixel_grid(hw_A))
    error_px = (points_B - to_pixel(pair.warp_A_to_B, hw_B)).norm(dim=-1)
    warped_B = sample_image(pair.image_B, to_normalized(points_B, hw_B))
    judged = error_px[pair.covisibility_A_to_B]
    verdict = f"error, median {judged.median().item():.2f} px" if len(judged) else "no pixel is covisible"
    image_A = fit_long_side(pair.image_A, long_side)
    hw = _hw(image_A)
    certainty, covisible = _thinned(certainty, hw), _thinned(pair.covisibility_A_to_B, hw)
    return (
        Panel(f"{pair.title}: A", image_A),
        Panel(f"{match.matcher}: B warped into A", fit_long_side(warped_B, long_side), mask=certainty > _MIN_CERTAINTY),
        Panel(verdict, _thinned(error_px, hw), "error", covisible, "px, 10 or more at the top", ERROR_LIMITS_PX),
        Panel(f"certainty, overlap {match.overlap:.2f}", certainty, "certainty", label="certainty"),
    )  # fmt: skip


class Sheets:
    """Collects the pictures of pairs as `evaluate` goes on; small ones, so that all matches need not be kept."""

    def __init__(self) -> None:
        self._rows: dict[str, list[tuple[Panel, ...]]] = {}

    def add(self, pair: EvalPair, match: Match) -> None:
        """Draw one match; to be given to `evaluate` as ``on_match``."""
        self._rows.setdefault(f"{match.matcher}_{pair.benchmark}", []).append(match_panels(pair, match))

    def write(self, folder: Path) -> list[Path]:
        """Write one PNG a matcher and benchmark, MATCHER_BENCHMARK.png."""
        paths = []
        for name, rows in self._rows.items():
            paths.append(folder / f"{name}.png")
            with atomic_write(paths[-1]) as file:
                file.write(figures.to_png(sheet(rows)))
        return paths


def sheet(rows: Sequence[tuple[Panel, ...]]) -> Figure:
    """Put what `match_panels` gave for several pairs under each other.

    Raises:
        ShapeError: there are no rows.
    """
    return figures.panels(*(panel for row in rows for panel in row), columns=_COLUMNS)


def _thinned(
    values: Float[Tensor, "h w"] | Bool[Tensor, "h w"], hw: HW
) -> Float[Tensor, "h2 w2"] | Bool[Tensor, "h2 w2"]:
    """The nearest pixels at another size: means would hide errors and blur what is known."""
    picked = sample_image(values.float(), normalized_grid(hw), mode="nearest")
    return picked > 0.5 if values.dtype == torch.bool else picked


def _hw(image: Tensor) -> HW:
    return image.shape[0], image.shape[1]
