"""3D Gaussians that carry colours and any number of feature channels."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from l2m_viz.data.files import Saved
from l2m_viz.errors import L2MError, ShapeError
from l2m_viz.geometry import rotation_from_quat

OPACITY_LIMIT = (
    1 - 1e-6
)  # logit(1) is infinite; this close to it, alpha is capped at 0.999 by the rasterizer anyway


@dataclass(frozen=True)
class Gaussians(Saved):
    """N anisotropic 3D Gaussians (Kerbl et al. 2023), in gsplat's words; the stored parameters are unconstrained.

    Attributes:
        means: Centres in world units.
        quats: Rotations (w, x, y, z), not necessarily of unit length.
        log_scales: Logarithms of the standard deviations along the rotated axes.
        logit_opacities: Logits of the opacities.
        colors: RGB in [0, 1], the view-independent colour.
        features: Learned or lifted descriptors, or None.
        sh_rest: Spherical-harmonic coefficients of degree >= 1, (N, K, 3), or None.

    Raises:
        ShapeError: there are no Gaussians, or the shapes do not fit each other.
        L2MError: a value is not finite, or a quaternion is zero.
    """

    means: Float[Tensor, "n 3"]
    quats: Float[Tensor, "n 4"]
    log_scales: Float[Tensor, "n 3"]
    logit_opacities: Float[Tensor, " n"]
    colors: Float[Tensor, "n 3"]
    features: Float[Tensor, "n d"] | None = None
    sh_rest: Float[Tensor, "n k 3"] | None = None

    def __post_init__(self) -> None:
        n = len(self.means)
        expected = {
            "means": (n, 3),
            "quats": (n, 4),
            "log_scales": (n, 3),
            "logit_opacities": (n,),
            "colors": (n, 3),
        }
        for name, shape in expected.items():
            if tuple(getattr(self, name).shape) != shape:
                got = str(tuple(getattr(self, name).shape))
                raise ShapeError(f"Gaussians.{name}", expected=f"{shape} as means has {n} rows", got=got)
        for name, ndim in (("features", 2), ("sh_rest", 3)):
            value = getattr(self, name)
            if value is not None and (value.ndim != ndim or len(value) != n):
                raise ShapeError(
                    f"Gaussians.{name}", expected=f"{n} rows, {ndim} axes", got=str(tuple(value.shape))
                )
        if n == 0:
            raise ShapeError(
                "Gaussians", expected="at least one", got="none", todo="check the mask that chose them"
            )
        for name, value in self._tensors().items():
            bad = n - int(
                torch.isfinite(value.detach()).flatten(1 if value.ndim > 1 else 0).reshape(n, -1).all(1).sum()
            )
            if bad:
                raise L2MError(
                    f"Gaussians.{name}", expected="finite values", got=f"NaN or infinity in {bad} of {n} rows"
                )
        if (zero := int((self.quats.detach().abs().amax(dim=1) == 0).sum())) > 0:
            raise L2MError("Gaussians.quats", expected="non-zero quaternions", got=f"{zero} zero rows of {n}")

    @classmethod
    def from_activated(
        cls,
        means: Float[Tensor, "n 3"],
        quats: Float[Tensor, "n 4"],
        scales: Float[Tensor, "n 3"],
        opacities: Float[Tensor, " n"],
        colors: Float[Tensor, "n 3"],
        features: Float[Tensor, "n d"] | None = None,
    ) -> Self:
        """Build from standard deviations > 0 and opacities in [0, 1].

        Raises:
            L2MError: a scale is not positive or an opacity lies outside [0, 1].
        """
        if (scales <= 0).any():
            raise L2MError("from_activated scales", expected="> 0", got=f"minimum {scales.min().item():g}")
        if (opacities < 0).any() or (opacities > 1).any():
            got = f"{opacities.min().item():g} to {opacities.max().item():g}"
            raise L2MError("from_activated opacities", expected="0 to 1", got=got)
        logits = torch.logit(opacities.clamp(1 - OPACITY_LIMIT, OPACITY_LIMIT))
        return cls(means, quats, scales.log(), logits, colors, features)

    def __len__(self) -> int:
        return len(self.means)

    @property
    def scales(self) -> Float[Tensor, "n 3"]:
        """Standard deviations in world units."""
        return self.log_scales.exp()

    @property
    def opacities(self) -> Float[Tensor, " n"]:
        """Opacities in (0, 1)."""
        return self.logit_opacities.sigmoid()

    @property
    def covars(self) -> Float[Tensor, "n 3 3"]:
        """Covariances R S S^T R^T in world units squared."""
        axes = rotation_from_quat(self.quats) * self.scales[:, None, :]  # [n 3 3] columns: scaled axes
        return axes @ axes.transpose(-1, -2)

    def select(self, index: Bool[Tensor, " n"] | Int[Tensor, " m"]) -> Self:
        """The Gaussians under a mask or an index list."""
        return self._map(lambda value: value[index])

    def to(self, device: torch.device | str) -> Self:
        """The same Gaussians on another device."""
        return self._map(lambda value: value.to(device))

    def _tensors(self) -> dict[str, Tensor]:
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in named.items() if value is not None}

    def _map(self, change: Callable[[Tensor], Tensor]) -> Self:
        return type(self)(**{name: change(value) for name, value in self._tensors().items()})
