"""A PCA basis of features, fitted once, so that equal colour means equal feature in 2D, in 3D and across views."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor

from l2m_viz.data.files import Saved
from l2m_viz.errors import ShapeError

_MAX_ROWS = 50_000  # a covariance of 128 channels is known well enough from this many


@dataclass(frozen=True)
class FeaturePCA(Saved):
    """Principal components with fixed sign and fixed colour range.

    Attributes:
        mean: Mean feature.
        components: Orthonormal rows, by falling variance; the entry of largest magnitude of each is positive.
        low: 1st percentile of each projected component over the features it was fitted on; black in `colors`.
        high: 99th percentile; full brightness.
        explained: Share of the variance that each component explains.
    """

    mean: Float[Tensor, " d"]
    components: Float[Tensor, "k d"]
    low: Float[Tensor, " k"]
    high: Float[Tensor, " k"]
    explained: Float[Tensor, " k"]

    @classmethod
    def fit(cls, features: Float[Tensor, "*n d"], num_components: int = 16) -> Self:
        """Fit the basis on features of any leading shape; large sets are thinned evenly.

        Raises:
            ShapeError: fewer rows or channels than components.
        """
        rows = features.reshape(-1, features.shape[-1])
        if min(rows.shape) < num_components:
            raise ShapeError(
                "FeaturePCA",
                expected=f"at least {num_components} rows and channels",
                got=str(tuple(rows.shape)),
            )
        rows = rows[:: -(-len(rows) // _MAX_ROWS)]
        mean = rows.mean(dim=0)
        variance, vectors = torch.linalg.eigh(torch.cov(rows.T))  # ascending
        components = vectors.flip(1)[:, :num_components].T
        pivot = components.gather(1, components.abs().argmax(dim=1, keepdim=True))
        components = (components * pivot.sign()).contiguous()
        projected = (rows - mean) @ components.T
        low, high = torch.quantile(projected, torch.tensor([0.01, 0.99]), dim=0)
        explained = variance.flip(0)[:num_components] / variance.sum().clamp(min=1e-30)
        return cls(mean, components, low, high, explained)

    @classmethod
    def fit_by_width(cls, maps: Iterable[Float[Tensor, "*n d"]], num_components: int = 16) -> dict[int, Self]:
        """One basis for all features of one width, by the width: there encoders can be compared by colour."""
        rows: dict[int, list[Tensor]] = {}
        for features in maps:
            rows.setdefault(features.shape[-1], []).append(features.reshape(-1, features.shape[-1]))
        return {width: cls.fit(torch.cat(some), num_components) for width, some in rows.items()}

    def project(self, features: Float[Tensor, "*n d"]) -> Float[Tensor, "*n k"]:
        """Coordinates in the basis."""
        return (features - self.mean) @ self.components.T

    def colors(self, projected: Float[Tensor, "*n k"]) -> Float[Tensor, "*n 3"]:
        """RGB of the first three coordinates (of `project`, or rendered from Gaussians that carry them)."""
        low, high = self.low[:3], self.high[:3]
        return ((projected[..., :3] - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
