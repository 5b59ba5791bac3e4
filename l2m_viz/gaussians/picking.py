"""Which Gaussians make one pixel, or lie along one ray, and how much each gives: the compositing table.

Symbols as in `l2m_viz.gaussians.reference`, whose rules hold here, too: alpha_i of a Gaussian at the point, the
transmittance T_i that reaches it, and its weight alpha_i T_i in everything that is blended.
"""

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from l2m_viz.errors import L2MError, MissingError, ShapeError
from l2m_viz.gaussians.container import Gaussians
from l2m_viz.gaussians.rasterize import check_limits
from l2m_viz.gaussians.reference import (
    FRUSTUM_MARGIN,
    MAX_ALPHA,
    MIN_ALPHA,
    MIN_TRANSMITTANCE,
    project_gaussians,
)
from l2m_viz.gaussians.spherical_harmonics import evaluate_colors
from l2m_viz.geometry import Camera, inside_image, look_at, to_normalized

_SLACK_PX2, _SLACK = 0.01, 1.01  # of the cheap test, whose rounding differs from the exact one's
_CHUNK = (
    1 << 16
)  # Gaussians whose intermediate results fit into the processor's cache: twice as fast as all at once


@dataclass(frozen=True)
class Picked:
    """The M Gaussians that are drawn at one point, front to back; M = 0 where there is nothing.

    Attributes:
        indices: Which ones, in the set that was asked.
        alphas: Share that each takes of the light that reaches it.
        transmittances: Share of all light that reaches each.
        depths: z of each centre in the camera's frame, or distance along the ray.
        colors: RGB of each, as seen from there.
        features: Descriptors of each, or None.
    """

    indices: Int[Tensor, " m"]
    alphas: Float[Tensor, " m"]
    transmittances: Float[Tensor, " m"]
    depths: Float[Tensor, " m"]
    colors: Float[Tensor, "m 3"]
    features: Float[Tensor, "m d"] | None

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def weights(self) -> Float[Tensor, " m"]:
        """Share of each in the pixel: alpha times transmittance."""
        return self.alphas * self.transmittances

    @property
    def alpha(self) -> float:
        """Sum of the weights: accumulated opacity."""
        return self.weights.sum().item()

    @property
    def depth(self) -> float:
        """Expected depth, sum(w z) / alpha; means something only where alpha > 0."""
        return (self.weights @ self.depths).item() / max(self.alpha, 1e-10)

    @property
    def color(self) -> Float[Tensor, " 3"]:
        """Blended colour over black."""
        return self.weights @ self.colors

    @property
    def feature(self) -> Float[Tensor, " d"] | None:
        """Blended descriptor."""
        return None if self.features is None else self.weights @ self.features

    @property
    def strongest(self) -> int | None:
        """Index of the Gaussian with the largest weight, in the set that was asked; None if there is none."""
        return int(self.indices[self.weights.argmax()]) if len(self) else None


@torch.no_grad()
def pick(
    gaussians: Gaussians,
    camera: Camera,
    point_px: Float[Tensor, " 2"] | tuple[float, float],
    *,
    near: float = 0.01,
    far: float = 1e10,
    eps2d: float = 0.3,
) -> Picked:
    """Take apart what `rasterize` blends at one point of the picture, pixel centre or not; on the CPU, no gradients.

    A point outside the image, or with nothing there, gives an empty result.

    Args:
        gaussians: What is drawn.
        camera: From where.
        point_px: Where: (x, y) in pixels, (0.5, 0.5) is the centre of the top-left one.
        near: Nearest drawn depth, in world units.
        far: Farthest drawn depth.
        eps2d: Variance in px^2 that is added on the screen, a low-pass filter.

    Raises:
        ShapeError: the point is not two numbers.
        L2MError: the point is not finite, or near, far or eps2d are impossible.
    """
    check_limits("pick", near, far, eps2d)
    camera = replace(camera, K=camera.K.to(gaussians.means), w2c=camera.w2c.to(gaussians.means))
    point = torch.as_tensor(point_px).to(gaussians.means)
    if tuple(point.shape) != (2,):
        raise ShapeError("pick point_px", expected="(x, y) in pixels", got=str(tuple(point.shape)))
    if not torch.isfinite(point).all():
        raise L2MError("pick point_px", expected="two finite numbers", got=str(point.tolist()))
    if not inside_image(to_normalized(point, camera.hw)):
        return _nothing(gaussians)
    near_by = _near_by(gaussians, camera, point, eps2d)
    if len(near_by) == 0:
        return _nothing(gaussians)
    some, near_by, point = gaussians.select(near_by).to("cpu"), near_by.cpu(), point.cpu()
    camera = replace(camera, K=camera.K.cpu(), w2c=camera.w2c.cpu())
    screen = project_gaussians(some, camera, near, far, eps2d)
    dx, dy = (point - screen.means2d).unbind(-1)
    xx, xy, yy = screen.conics.unbind(-1)
    power = 0.5 * (xx * dx * dx + yy * dy * dy) + xy * dx * dy  # [m]
    alphas = (some.opacities * torch.exp(-power)).clamp(max=MAX_ALPHA)
    drawn = (screen.visible & (alphas >= MIN_ALPHA) & (power >= 0)).nonzero()[:, 0]
    drawn = drawn[screen.depths[drawn].argsort(stable=True)]  # ties by index
    behind = torch.cumprod(1 - alphas[drawn], dim=0)  # T that each leaves
    drawn = drawn[: int((behind > MIN_TRANSMITTANCE).sum())]
    return Picked(
        indices=near_by[drawn],
        alphas=alphas[drawn],
        transmittances=torch.cat([behind.new_ones(1), behind])[: len(drawn)],
        depths=screen.depths[drawn],
        colors=evaluate_colors(some, camera)[drawn],
        features=None if some.features is None else some.features[drawn],
    )


def _near_by(
    gaussians: Gaussians, camera: Camera, point: Float[Tensor, " 2"], eps2d: float
) -> Int[Tensor, " m"]:
    """Indices of all Gaussians that may reach a point, and few others: a bound that is cheap to compute.

    With d the offset on the screen, power >= |d|^2 / (2 lambda) where lambda, the largest eigenvalue of Sigma', is at
    most |J|^2 s^2 + eps2d for the longest axis s; |J|^2 <= c / z^2, as x/z and y/z are clamped in J. Times z^2: nothing
    is divided, and z d is affine in the mean. Fainter than 1/255 is what has power > ln(255 opacity).
    """
    (fx, _, cx), (_, fy, cy), _ = camera.K.tolist()
    slope_x = (max(abs(cx), abs(camera.width - cx)) + FRUSTUM_MARGIN * camera.width / 2) / fx
    slope_y = (max(abs(cy), abs(camera.height - cy)) + FRUSTUM_MARGIN * camera.height / 2) / fy
    c = fx * fx * (1 + slope_x * slope_x) + fy * fy * (1 + slope_y * slope_y)
    to_offset = camera.K.new_tensor(
        [[1.0, 0.0, -float(point[0])], [0.0, 1.0, -float(point[1])], [0.0, 0.0, 1.0]]
    )
    to_offset = to_offset.double() @ camera.K.double() @ camera.w2c[:3].double()  # [3 4]
    to_offset = to_offset.to(gaussians.means.dtype)
    two_powers = _SLACK * 2 * math.log(1 / MIN_ALPHA)
    found = []
    chunks = zip(gaussians.means.split(_CHUNK), gaussians.log_scales.split(_CHUNK), strict=True)
    for number, (means, log_scales) in enumerate(chunks):
        zdx, zdy, z = torch.addmm(to_offset[:, 3:], to_offset[:, :3], means.T).unbind(0)
        s2 = torch.exp(2 * log_scales.amax(dim=1))
        reach = two_powers * (c * s2 + (eps2d + _SLACK_PX2) * z * z)
        reaches = (zdx * zdx + zdy * zdy <= reach) & (z > 0)
        found.append(reaches.nonzero()[:, 0] + number * _CHUNK)
    return torch.cat(found)


def _nothing(gaussians: Gaussians) -> Picked:
    """What is found where nothing is."""
    features = None if gaussians.features is None else torch.empty(0, gaussians.features.shape[1])
    none = torch.empty(0)
    return Picked(torch.empty(0, dtype=torch.long), none, none, none, torch.empty(0, 3), features)


def pick_ray(
    gaussians: Gaussians,
    origin: Float[Tensor, " 3"],
    direction: Float[Tensor, " 3"],
    *,
    footprint: float = 1 / 640,
    near: float = 0.01,
    far: float = 1e10,
    eps2d: float = 0.3,
) -> Picked:
    """Take apart what lies along a ray: `pick` in a camera of one pixel that looks along it.

    A ray has no width, but the splatter's fixed blur is in pixels, so a pixel's size must be said.

    Args:
        gaussians: What is drawn.
        origin: Where the ray begins, in world units.
        direction: Where it goes; of any length.
        footprint: Angle that the pixel sees, in radians; as in the middle of a picture with a focal length of 640 px.
        near: Nearest distance along the ray, in world units.
        far: Farthest distance.
        eps2d: Variance in pixels^2 that is added on the screen.

    Raises:
        L2MError: the direction is zero or not finite, or footprint, near, far or eps2d are impossible.
    """
    if not (torch.isfinite(direction).all() and direction.abs().max() > 0 and torch.isfinite(origin).all()):
        got = f"origin {origin.tolist()}, direction {direction.tolist()}"
        raise L2MError("pick_ray", expected="a finite origin and a direction that is not zero", got=got)
    if not 0 < footprint < math.pi:
        raise L2MError("pick_ray footprint", expected="0 to pi radians", got=f"{footprint:g}")
    origin, forward = origin.double(), torch.nn.functional.normalize(direction.double(), dim=0)
    down = torch.zeros_like(forward)
    down[forward.abs().argmin()] = 1  # any axis that the ray is not parallel to
    K = torch.tensor([[1 / footprint, 0.0, 0.5], [0.0, 1 / footprint, 0.5], [0.0, 0.0, 1.0]])
    camera = Camera(K, look_at(origin, origin + forward, down), width=1, height=1)
    return pick(gaussians, camera, (0.5, 0.5), near=near, far=far, eps2d=eps2d)


def feature_similarity(gaussians: Gaussians, feature: Float[Tensor, " d"]) -> Float[Tensor, " n"]:
    """Cosine between a descriptor and each Gaussian's, -1 to 1; 0 where one of the two is zero.

    Raises:
        MissingError: the Gaussians carry no features.
        ShapeError: ``feature`` has another number of channels than they.
        L2MError: ``feature`` is not finite.
    """
    features = gaussians.features
    if features is None:
        raise MissingError("these Gaussians carry no features", todo="make them with `features=...`")
    if tuple(feature.shape) != (features.shape[1],):
        got = str(tuple(feature.shape))
        raise ShapeError("feature_similarity feature", expected=f"({features.shape[1]},)", got=got)
    if not torch.isfinite(feature).all():
        raise L2MError("feature_similarity feature", expected="finite values", got="NaN or infinity")
    direction = torch.nn.functional.normalize(feature.to(features), dim=0)
    lengths = torch.linalg.vector_norm(features, dim=1)
    tiny = torch.finfo(features.dtype).tiny
    return ((features @ direction) / lengths.clamp(min=tiny)).clamp(-1, 1)
