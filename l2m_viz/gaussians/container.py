"""3D Gaussians that carry colours and any number of feature channels."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from l2m_viz.data.files import Saved
from l2m_viz.encoders.pca import FeaturePCA
from l2m_viz.errors import L2MError, ShapeError, require_tensor
from l2m_viz.geometry import rotation_from_quat

OPACITY_LIMIT = (
    1 - 1e-6
)  # logit(1) is infinite; this close to it, alpha is capped at 0.999 by the rasterizer anyway

# Coefficients of spherical harmonics beyond degree 0, (degree + 1)^2 - 1 for degree 1 to 4, the highest of gsplat.
NUM_SH_REST = (3, 8, 15, 24)
_METADATA = ("backbone", "length_unit", "pca")
SH_C0 = 0.28209479177387814  # Y_00 = 1 / (2 sqrt(pi)), the constant basis function


@dataclass(frozen=True)
class Gaussians(Saved):
    """N anisotropic 3D Gaussians (Kerbl et al. 2023), in gsplat's words; the stored parameters are unconstrained.

    Attributes:
        means: Centres in world units.
        quats: Rotations (w, x, y, z), not necessarily of unit length.
        log_scales: Logarithms of the standard deviations along the rotated axes.
        logit_opacities: Logits of the opacities.
        colors: RGB in [0, 1], the view-independent colour; from a file it may exceed 1, with ``sh_rest`` lie below 0.
        features: Learned or lifted descriptors, or None.
        sh_rest: Spherical-harmonic coefficients of degree 1 and more, K = 3, 8, 15 or 24 of them, or None.
        sh_dc: Coefficients of degree 0 as a file had them, or None. They are `colors` in other words
            (`colors_from_sh_dc`) and no renderer looks at them: `write_ply` does, to give back the file's very bits.
        backbone: Name of the encoder that the features come from, or None.
        length_unit: What one unit of the world is, "m" or "relative", or None if nobody knows.
        pca: Basis whose coordinates the features are (the first ones of them), or which takes them as input, or None.

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
    sh_dc: Float[Tensor, "n 3"] | None = None
    backbone: str | None = None
    length_unit: str | None = None
    pca: FeaturePCA | None = None

    def __post_init__(self) -> None:
        self._check_shapes()
        self._check_values()

    def _check_shapes(self) -> None:
        for name, value in self._tensors().items():
            require_tensor(f"Gaussians.{name}", value)
        n = len(self.means)
        expected = {"means": (n, 3), "quats": (n, 4), "log_scales": (n, 3), "logit_opacities": (n,)}
        expected |= {"colors": (n, 3), "sh_dc": (n, 3)}
        tensors = self._tensors()
        for name, shape in expected.items():
            if name in tensors and tuple(tensors[name].shape) != shape:
                got = str(tuple(tensors[name].shape))
                raise ShapeError(f"Gaussians.{name}", expected=f"{shape} as means has {n} rows", got=got)
        if self.features is not None and (self.features.ndim != 2 or len(self.features) != n):
            got = str(tuple(self.features.shape))
            raise ShapeError("Gaussians.features", expected=f"{n} rows, 2 axes", got=got)
        if self.sh_rest is not None and tuple(self.sh_rest.shape) not in {(n, k, 3) for k in NUM_SH_REST}:
            expected = f"({n}, K, 3) with K = 3, 8, 15 or 24, for degree 1 to 4"
            raise ShapeError("Gaussians.sh_rest", expected=expected, got=str(tuple(self.sh_rest.shape)))
        if self.features is not None and self.pca is not None:
            width, (k, d) = self.features.shape[1], self.pca.components.shape
            if width > k and width != d:
                expected = f"features of {d} channels, or at most {k} coordinates"
                raise ShapeError("Gaussians.pca", expected=expected, got=f"features of {width}")
        if n == 0:
            raise ShapeError(
                "Gaussians", expected="at least one", got="none", todo="check the mask that chose them"
            )

    def _check_values(self) -> None:
        n = len(self.means)
        for name, value in self._tensors().items():
            # What is not finite makes the sum so. Adding takes a thirtieth of the time of looking at each value, and a
            # fit builds new Gaussians at every step. Huge values can overflow: only a finite sum is an answer.
            if math.isfinite(value.detach().sum().item()):
                continue
            if bad := n - int(torch.isfinite(value.detach()).reshape(n, -1).all(dim=1).sum()):
                raise L2MError(
                    f"Gaussians.{name}", expected="finite values", got=f"NaN or infinity in {bad} of {n} rows"
                )
        if zero := n - int(self.quats.detach().any(dim=1).sum()):
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

    @classmethod
    def concat(cls, sets: Sequence[Self]) -> Self:
        """All Gaussians of one or more sets, in their order.

        Where only some have ``sh_dc`` the result has none, and loses nothing but a file's last bits: `colors` says the
        same, and there is nothing exact to put in the rows of the others.

        Raises:
            ShapeError: there are no sets, or they differ in having features or ``sh_rest``, or in the width of these.
            L2MError: they differ in backbone, unit of length or PCA basis.
        """
        if not sets:
            raise ShapeError("Gaussians.concat", expected="at least one set", got="none")
        for index, other in enumerate(sets[1:], start=1):
            _require_alike(sets[0], other, index)
        names = set.intersection(*(set(each._tensors()) for each in sets))
        joined = {name: torch.cat([getattr(each, name) for each in sets]) for name in names}
        return replace(sets[0], **{"sh_dc": None, **joined})

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
        return replace(self, **{name: value[index] for name, value in self._tensors().items()})

    def to(self, device: torch.device | str) -> Self:
        """The same Gaussians on another device, with their PCA basis."""
        moved: dict[str, Any] = {name: value.to(device) for name, value in self._tensors().items()}
        if self.pca is not None:
            basis = {field.name: getattr(self.pca, field.name).to(device) for field in fields(self.pca)}
            moved["pca"] = replace(self.pca, **basis)
        return replace(self, **moved)

    def _tensors(self) -> dict[str, Tensor]:
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in named.items() if value is not None and name not in _METADATA}


def colors_from_sh_dc(sh_dc: Float[Tensor, "n 3"]) -> Float[Tensor, "n 3"]:
    """RGB of spherical-harmonic coefficients of degree 0, 0.5 + Y_00 c (Kerbl et al. 2023), not clamped to [0, 1]."""
    return 0.5 + SH_C0 * sh_dc


def _require_alike(first: Gaussians, other: Gaussians, index: int) -> None:
    """Refuse to join sets whose rows mean different things."""
    for name in ("features", "sh_rest"):
        wanted, got = (
            None if value is None else tuple(value.shape[1:])
            for value in (getattr(first, name), getattr(other, name))
        )
        if wanted != got:
            expected, got = f"{wanted} a row as in the first set", f"{got} in set {index}"
            raise ShapeError(f"Gaussians.concat: {name}", expected=expected, got=got)
    for name in ("backbone", "length_unit"):
        wanted, got = getattr(first, name), getattr(other, name)
        if wanted != got:
            todo = f"if they belong together, give both one {name} with dataclasses.replace"
            expected, got = f"{wanted!r} as in the first set", f"{got!r} in set {index}"
            raise L2MError(f"Gaussians.concat: {name}", expected=expected, got=got, todo=todo)
    if not _same_basis(first.pca, other.pca):
        expected, got = "one PCA basis, or none, in all sets", f"another one in set {index} than in the first"
        raise L2MError("Gaussians.concat: pca", expected=expected, got=got, todo="project on one basis")


def _same_basis(one: FeaturePCA | None, two: FeaturePCA | None) -> bool:
    if one is None or two is None:
        return one is two
    return all(torch.equal(getattr(one, field.name), getattr(two, field.name)) for field in fields(one))
