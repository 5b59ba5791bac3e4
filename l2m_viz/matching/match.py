"""The result of matching two images densely, and what can be asked of it."""

import csv
import io
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from l2m_viz.data.files import Saved, write_text
from l2m_viz.errors import L2MError, ShapeError
from l2m_viz.geometry import (
    HW,
    from_integer_centers,
    inside_image,
    pixel_grid,
    sample_image,
    sample_warp,
    to_normalized,
    to_pixel,
)
from l2m_viz.parallel import run_kernel

Direction = Literal["A_to_B", "B_to_A"]

NO_OVERLAP = 0.1
"""Mean certainty below which two images hardly show the same thing. Measured on unrelated photos of `load_sample`: at
most 0.01 with dis, 0.08 with sift (16 accidental keypoints); the motorcycle pair has 0.71 and 0.52."""

_MIN_CERTAINTY = 0.05  # below it a pixel is never sampled (RoMa's sample threshold)
_OVERSAMPLING = 4  # draw this many times the wanted number by certainty, then thin by density (RoMa, DKM)
_DENSITY_SIGMA = 0.1  # of the Gaussian kernel over (xA, yA, xB, yB) in normalised units (RoMa)
_DENSITY_REACH = 4.5 * _DENSITY_SIGMA  # what lies beyond adds less than a 20,000th part of itself
_DENSITY_EXACT = 2048  # draws up to which every pair of them is looked at
_LONELY = 10  # draws with fewer neighbours than this are probably wrong and are taken last (RoMa)


@dataclass(frozen=True)
class Matches(Saved):
    """Sampled correspondences in pixels of the original images, with the certainty of each."""

    points_A: Float[Tensor, "n 2"]
    points_B: Float[Tensor, "n 2"]
    certainty: Float[Tensor, " n"]

    def __len__(self) -> int:
        return len(self.certainty)


@dataclass(frozen=True)
class Stage:
    """What one stage of a matching network said, at its own resolution.

    Attributes:
        stride: Pixels of the network's input to a cell.
        warp_A_to_B: Absolute normalised position in B of every cell of A after this stage.
        certainty_A_to_B: Probability that it is right, so far.
        warp_B_to_A: The other direction.
        certainty_B_to_A: The other direction.
        displacement: What the stage added to ``warp_A_to_B``, normalised; None at the coarse stage.
        displacement_B_to_A: The other direction.
        anchor_probs: Probability of each of the gh x gw anchors in B, at the coarse stage only.
        anchor_probs_B_to_A: The other direction.
    """

    stride: int
    warp_A_to_B: Float[Tensor, "ha wa 2"]
    certainty_A_to_B: Float[Tensor, "ha wa"]
    warp_B_to_A: Float[Tensor, "hb wb 2"]
    certainty_B_to_A: Float[Tensor, "hb wb"]
    displacement: Float[Tensor, "ha wa 2"] | None = None
    displacement_B_to_A: Float[Tensor, "hb wb 2"] | None = None
    anchor_probs: Float[Tensor, "ha wa gh gw"] | None = None
    anchor_probs_B_to_A: Float[Tensor, "hb wb gh2 gw2"] | None = None


@dataclass(frozen=True)
class Match(Saved):
    """Dense correspondence of two images, in both directions.

    Attributes:
        warp_A_to_B: Absolute normalised position in B of every pixel of A, at the matcher's resolution.
        certainty_A_to_B: Probability in [0, 1] that the match is right.
        warp_B_to_A: The other direction.
        certainty_B_to_A: The other direction.
        hw_A: Size (H, W) of the original image A in pixels.
        hw_B: Size (H, W) of the original image B in pixels.
        matcher: Name of the matcher.
        keypoints_A: A sparse matcher's own sub-pixel keypoints in original pixels of A, else None.
        keypoints_B: Their partners in B.
        keypoint_certainty: Their certainties.
        stages: How a network came to it, coarse first; empty unless asked for, and not saved.
        turns_B: Quarter turns counter-clockwise after which B was matched (`load_matcher(turns=True)`); all places are
            those of B as it is.

    Raises:
        ShapeError: a warp is not (h, w, 2), its certainty not (h, w), an image size not two positive numbers, or the
            keypoints are not as many in A, in B and in their certainties.
        L2MError: a number is not finite, a warp not float32, a certainty not from 0 to 1, or the turns not from 0 to 3.
    """

    warp_A_to_B: Float[Tensor, "ha wa 2"]
    certainty_A_to_B: Float[Tensor, "ha wa"]
    warp_B_to_A: Float[Tensor, "hb wb 2"]
    certainty_B_to_A: Float[Tensor, "hb wb"]
    hw_A: HW
    hw_B: HW
    matcher: str = ""
    keypoints_A: Float[Tensor, "n 2"] | None = None
    keypoints_B: Float[Tensor, "n 2"] | None = None
    keypoint_certainty: Float[Tensor, " n"] | None = None
    stages: tuple[Stage, ...] = ()
    turns_B: int = 0

    def __post_init__(self) -> None:
        for side in ("A_to_B", "B_to_A"):
            warp, certainty = getattr(self, f"warp_{side}"), getattr(self, f"certainty_{side}")
            if warp.ndim != 3 or warp.shape[-1] != 2 or warp.shape[:2] != certainty.shape or 0 in warp.shape:
                got = f"{tuple(warp.shape)} and {tuple(certainty.shape)}"
                raise ShapeError(f"Match {side}", expected="warp (h, w, 2) and certainty (h, w)", got=got)
            if not warp.dtype == certainty.dtype == torch.float32:
                got = f"{warp.dtype} and {certainty.dtype}"
                raise L2MError(f"Match {side}", expected="float32 warp and certainty", got=got)
            if not (torch.isfinite(warp).all() and torch.isfinite(certainty).all()):
                raise L2MError(f"Match {side}", expected="finite warp and certainty", got="NaN or infinity")
            if certainty.min() < 0 or certainty.max() > 1:
                got = f"{certainty.min():g} to {certainty.max():g}"
                raise L2MError(f"Match {side}", expected="certainties from 0 to 1", got=got)
        for name in ("hw_A", "hw_B"):
            if not _is_size(getattr(self, name)):
                got = repr(getattr(self, name))
                raise ShapeError(f"Match.{name}", expected="(H, W) in px, both > 0", got=got)
        if self.turns_B not in range(4):
            raise L2MError("Match.turns_B", expected="a whole number from 0 to 3", got=repr(self.turns_B))
        self._check_keypoints()

    def _check_keypoints(self) -> None:
        triple = self.keypoints_A, self.keypoints_B, self.keypoint_certainty
        given = [part for part in triple if part is not None]
        if not given:
            return
        shapes = [tuple(part.shape) for part in given]
        n = shapes[0][0] if shapes[0] else 0
        if shapes != [(n, 2), (n, 2), (n,)]:
            expected = "keypoints (n, 2) in A and B and their certainties (n,), or none of them"
            raise ShapeError("Match keypoints", expected=expected, got=str(shapes))
        if not all(torch.isfinite(part).all() for part in given):
            raise L2MError("Match keypoints", expected="finite numbers", got="NaN or infinity")

    def save(self, path: str | Path) -> None:
        """Write every field but the stages, which are large and for looking at."""
        Saved.save(replace(self, stages=()), path)

    def to_bytes(self) -> bytes:
        """What `save` writes, to be put inside another file."""
        return Saved.to_bytes(replace(self, stages=()))

    def query(
        self, points: Float[Tensor, "*n 2"], direction: Direction = "A_to_B"
    ) -> tuple[Float[Tensor, "*n 2"], Float[Tensor, "*n"]]:
        """Where do these points lie in the other image? Return (points, certainty), in pixels of the original images.

        A point outside its image is answered for the nearest border pixel, with certainty 0; an answer outside the
        other image is clamped to its border.

        Raises:
            ShapeError: the points are not (..., 2).
            L2MError: a point is not finite, or the direction is unknown.
        """
        try:
            points = torch.as_tensor(points, dtype=torch.float32)
        except (TypeError, ValueError) as error:
            raise ShapeError(
                "query", expected="points (..., 2) as (x, y) px", got=type(points).__name__
            ) from error
        if points.ndim == 0 or points.shape[-1] != 2:
            raise ShapeError("query", expected="points (..., 2) as (x, y) px", got=str(tuple(points.shape)))
        if not torch.isfinite(points).all():
            raise L2MError("query", expected="finite points", got="NaN or infinity")
        warp, certainty, hw_from, hw_to = self._side(direction)
        points_n = to_normalized(points, hw_from)
        target = sample_warp(warp, points_n.clamp(-1, 1)).clamp(-1, 1)
        return to_pixel(target, hw_to), sample_image(certainty, points_n) * inside_image(points_n)

    def sample(self, num: int, generator: torch.Generator | None = None) -> Matches:
        """Draw at most ``num`` matches, spread evenly over the matched surface, from both directions.

        Draws follow the certainty and are then thinned where they crowd in the joint space of both images (Edstedt et
        al., RoMa). Fewer certain pixels than ``num`` give fewer matches, none give an empty result. A sparse matcher
        returns its own keypoints, the most certain first.

        Raises:
            L2MError: ``num`` is negative.
        """
        if not isinstance(num, int) or num < 0:
            raise L2MError("sample", expected="a whole num >= 0", got=repr(num))
        if (
            self.keypoints_A is not None
            and self.keypoints_B is not None
            and self.keypoint_certainty is not None
        ):
            best = self.keypoint_certainty.argsort(descending=True, stable=True)[:num]
            return Matches(self.keypoints_A[best], self.keypoints_B[best], self.keypoint_certainty[best])
        drawn = _draw(self._weights, _OVERSAMPLING * num, generator)
        pairs, certainty = self._pairs(drawn), self._weights[drawn]
        density = _density(pairs)
        balance = torch.where(density < _LONELY, 1e-7, 1 / (density + 1))
        best = _draw(balance, num, generator)
        points_A, points_B = to_pixel(pairs[best, :2], self.hw_A), to_pixel(pairs[best, 2:], self.hw_B)
        return Matches(points_A, points_B, certainty[best])

    def cycle_error(self, direction: Direction = "A_to_B") -> Float[Tensor, "h w"]:
        """Distance in original pixels between each pixel and where it lands after going there and back."""
        there, _, hw_from, _ = self._side(direction)
        back, _, _, _ = self._side("B_to_A" if direction == "A_to_B" else "A_to_B")
        returned = to_pixel(sample_warp(back, there.clamp(-1, 1)), hw_from)
        start = to_pixel(to_normalized(pixel_grid(_hw(there)), _hw(there)), hw_from)
        return (returned - start).norm(dim=-1)

    @property
    def overlap(self) -> float:
        """Mean certainty over both directions: near 0 says that the two images do not show the same thing."""
        return 0.5 * (self.certainty_A_to_B.mean().item() + self.certainty_B_to_A.mean().item())

    def to_csv(self, path: str | Path, num: int = 5000, generator: torch.Generator | None = None) -> int:
        """Write sampled matches as x_A, y_A, x_B, y_B (px of the originals, first pixel's centre at 0.5), certainty.

        Returns:
            The number of rows written.
        """
        matches = self.sample(num, generator)
        rows = torch.cat([matches.points_A, matches.points_B, matches.certainty[:, None]], dim=1).tolist()
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["x_A_px", "y_A_px", "x_B_px", "y_B_px", "certainty"])
        writer.writerows([f"{value:.4f}" for value in row] for row in rows)
        write_text(path, text.getvalue())
        return len(rows)

    def to_hloc(
        self,
        folder: str | Path,
        name_A: str,
        name_B: str,
        *,
        num: int = 2500,
        min_certainty: float = 0.5,
    ) -> int:
        """Add this pair to ``features.h5`` and ``matches.h5`` of hloc in a folder; see `write_hloc`, also for many."""
        from l2m_viz.matching.reconstruction import NamedMatch, write_hloc

        pair = NamedMatch(name_A, name_B, self)
        return write_hloc(folder, [pair], num=num, min_certainty=min_certainty)

    def to_colmap(
        self,
        database: str | Path,
        name_A: str,
        name_B: str,
        *,
        K_A: Float[Tensor, "3 3"] | None = None,
        K_B: Float[Tensor, "3 3"] | None = None,
        num: int = 2500,
        min_certainty: float = 0.5,
    ) -> int:
        """Add this pair to a database of COLMAP; see `write_colmap`, also for many."""
        from l2m_viz.matching.reconstruction import NamedMatch, write_colmap

        pair = NamedMatch(name_A, name_B, self, K_A, K_B)
        return write_colmap(database, [pair], num=num, min_certainty=min_certainty)

    @cached_property
    def _weights(self) -> Float[Tensor, " n"]:
        """Certainties of all pixels of A, then of B; 0 for those that are never drawn."""
        weights = []
        for warp, certainty in (
            (self.warp_A_to_B, self.certainty_A_to_B),
            (self.warp_B_to_A, self.certainty_B_to_A),
        ):
            usable = (certainty > _MIN_CERTAINTY) & inside_image(warp)
            weights.append((certainty * usable).flatten())
        return torch.cat(weights)

    def _pairs(self, index: Int64[Tensor, " m"]) -> Float[Tensor, "m 4"]:
        """Normalised (xA, yA, xB, yB) of pixels, counted as in `_weights`."""
        count_A = self.certainty_A_to_B.numel()
        in_A = index < count_A
        pairs = self.warp_A_to_B.new_empty(len(index), 4)
        pairs[in_A] = torch.cat(_ends(self.warp_A_to_B, index[in_A]), dim=-1)
        pairs[~in_A] = torch.cat(_ends(self.warp_B_to_A, index[~in_A] - count_A)[::-1], dim=-1)
        return pairs

    def _side(self, direction: Direction) -> tuple[Tensor, Tensor, HW, HW]:
        if direction == "A_to_B":
            return self.warp_A_to_B, self.certainty_A_to_B, self.hw_A, self.hw_B
        if direction == "B_to_A":
            return self.warp_B_to_A, self.certainty_B_to_A, self.hw_B, self.hw_A
        raise L2MError("direction", expected="'A_to_B' or 'B_to_A'", got=repr(direction))


def _hw(warp: Tensor) -> HW:
    return warp.shape[0], warp.shape[1]


def _ends(
    warp: Float[Tensor, "h w 2"], index: Int64[Tensor, " m"]
) -> tuple[Float[Tensor, "m 2"], Float[Tensor, "m 2"]]:
    """Where pixels are and where they go, normalised; pixels are counted row by row."""
    column, row = index % warp.shape[1], index // warp.shape[1]
    start = from_integer_centers(torch.stack([column, row], dim=-1).to(warp.dtype))
    return to_normalized(start, _hw(warp)), warp[row, column]


def _draw(weights: Float[Tensor, " n"], num: int, generator: torch.Generator | None) -> Tensor:
    """Indices of at most ``num`` draws without replacement, in proportion to the weights; one of 0 is never drawn.

    The largest keys log(u) / w are such a sample (Efraimidis and Spirakis 2006); unlike torch.multinomial, any number
    of weights and draws will do.
    """
    keys = torch.rand(len(weights), generator=generator).clamp(min=1e-30).log() / weights
    return keys.topk(min(num, int(torch.count_nonzero(weights)))).indices


def _density(pairs: Float[Tensor, "n 4"]) -> Float[Tensor, " n"]:
    """Number of draws near each one (itself is one), with a Gaussian kernel."""
    return _exact_density(pairs) if len(pairs) <= _DENSITY_EXACT else _truncated_density(pairs)


def _exact_density(pairs: Float[Tensor, "n 4"]) -> Float[Tensor, " n"]:
    """The sum over all draws: time is quadratic, memory is not."""
    density = [
        # below -30 nothing counts, and exp would return denormal numbers, which are slow to make and to add
        torch.cdist(block, pairs).square_().mul_(-0.5 / _DENSITY_SIGMA**2).clamp_(min=-30).exp_().sum(dim=1)
        for block in pairs.split(512)
    ]
    return torch.cat(density) if density else pairs.new_zeros(0)


def _truncated_density(pairs: Float[Tensor, "n 4"]) -> Float[Tensor, " n"]:
    """The sum over the draws within reach, found through square cells over image A."""
    from l2m_viz.matching import _density

    reach = 2  # cells; smaller ones follow the circle better, and cost more to walk through
    cells = int(2 * reach / _DENSITY_REACH)
    column, row = ((pairs[:, :2] + 1) * (cells / 2)).long().clamp(0, cells - 1).unbind(dim=1)
    cell = row * cells + column
    order = cell.argsort()
    starts = torch.searchsorted(cell[order], torch.arange(cells * cells + 1))
    columns = pairs[order].T.contiguous()
    precision = 0.5 / _DENSITY_SIGMA**2
    density = torch.empty(len(pairs))
    run_kernel(
        _density.sum_gaussians, *columns.numpy(), starts.numpy(), cells, reach,
        np.float32(precision), np.float32(precision * _DENSITY_REACH**2), density.numpy(),
    )  # fmt: skip
    return torch.empty_like(density).scatter_(0, order, density)


def _is_size(hw: object) -> bool:
    """Whether this is (H, W), two whole numbers above 0; what is read from a file may be anything."""
    if not isinstance(hw, tuple) or len(hw) != 2:
        return False
    return all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in hw)
